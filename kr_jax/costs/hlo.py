"""Bytes that one chip sends by collectives in one run of a compiled program, counted from its text.

The partitioner inserts the collectives, so no jaxpr has them. The text is `compiled.as_text()`: shapes are those of
a chip. Over a ring of n chips, or between pairs, a chip sends

    all-gather           (n - 1) times its operand
    reduce-scatter       (n - 1) / n of its operand
    all-reduce           2 (n - 1) / n of its operand
    all-to-all           (n - 1) / n of its operand
    collective-permute   its operand

A collective in a loop counts in each trip. The trip count is in the text where XLA writes it there, or where the
condition compares a counter, from 0 on, with a constant: so XLA writes loops of jax.lax.scan, and loops around a
ring of chips, which take two steps a trip. Another loop stands in a jax.named_scope, whose trip count the caller
gives. Of a conditional the branch that sends most counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import collections
import math
import re
from typing import NamedTuple

import numpy as np

from kr_jax.costs import flops

KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')
# No program of this project has these; they would be missed.
_UNCOUNTED = ('ragged-all-to-all', 'collective-broadcast')
# Instructions that hand on an array as it is.
_SAME = ('copy', 'copy-done', 'bitcast', 'convert', 'reshape', 'optimization-barrier', 'get-tuple-element')

_NAME = re.compile(r'%([\w.-]+)')
_COMPUTATION = re.compile(r'(ENTRY )?%([\w.-]+) \(.*\{$')
_INSTRUCTION = re.compile(r' +(ROOT )?%([\w.-]+) = ')
_SHAPE = re.compile(r'\b([a-z]\w*)\[([^\]]*)\]')
_BRACES = r'\{(?:\{[\d,]*\},?)*\}'  # groups of chips
_MESH = re.compile(r'mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^()]*\))*)\))? \{([^}]*)\}')
_NAMES = r'(\{[^}]*\}|%[\w.-]+)'  # of one computation, or of several in braces
_CALLED = re.compile(r'\b(?:calls|to_apply|called_computations)=' + _NAMES)
_BRANCHES = re.compile(r'\b(?:branch_computations|true_computation|false_computation)=' + _NAMES)


class Moved(NamedTuple):
  """By a kind of collective over some axes."""

  bytes: float  # that one chip sends
  count: float  # of executions


# By one of KINDS and the axes along which the chips of a group differ, in the mesh's order.
Collectives = dict[tuple[str, tuple[str, ...]], Moved]


class _Instruction(NamedTuple):
  name: str
  opcode: str  # without the -start of one that is not waited for
  bytes: float  # of the result
  operands: tuple[str, ...]  # names; of a constant what it is
  rest: str  # all that follows
  is_root: bool

  @property
  def op_name(self) -> str:
    found = re.search(r'\bop_name="([^"]*)"', self.rest)
    return found[1] if found else ''


_Computation = dict[str, _Instruction]  # by name


class Program(NamedTuple):
  """The text of a program, read."""

  computations: dict[str, _Computation]
  entry: str  # the computation that is the program


def count(text: str | Program, mesh_shape: Mapping[str, int], trips: Mapping[str, float]) -> Collectives:
  """What the collectives of a program send.

  Args:
    text: or what `read` made of it.
    mesh_shape: axes of the mesh that the program was compiled for, in order, with their sizes.
    trips: trip count of a loop each time it is reached, by the name of the jax.named_scope that the loop stands in.

  Raises:
    ValueError: the trips of a loop with collectives are not known, or the mesh is another one.
  """
  program = read(text) if isinstance(text, str) else text
  return _Counter(program.computations, mesh_shape, trips).of_computation(program.entry, set())


def read(text: str) -> Program:
  """The computations of a program's text. Raises ValueError where it is none."""
  computations, entry, name, lines = {}, '', None, []

  def take():
    if lines:
      instruction = _instruction('\n'.join(lines))
      computations[name][instruction.name] = instruction
      lines.clear()

  for line in text.splitlines():
    if name is None:
      if found := _COMPUTATION.match(line):
        name = found[2]
        computations[name] = {}
        entry = name if found[1] else entry
    elif line == '}' or line.startswith('}, execution_thread'):
      take()
      name = None
    else:
      if _INSTRUCTION.match(line):
        take()
      lines.append(line)  # metadata of kernels has lines of its own
  if not entry:
    raise ValueError('this is not the text of a compiled program: it has no ENTRY')
  return Program(computations, entry)


def _instruction(text: str) -> _Instruction:
  found = _INSTRUCTION.match(text)
  start = found.end()
  end = _closing(text, start) if text[start] == '(' else text.index(' ', start)
  opening = text.index('(', end)
  closing = _closing(text, opening)
  opcode, inside = text[end:opening].strip(), text[opening + 1:closing - 1]
  return _Instruction(
      name=found[2], opcode=opcode.removesuffix('-start'), bytes=_bytes(text[start:end]),
      operands=(inside,) if opcode == 'constant' else tuple(_NAME.findall(inside)), rest=text[closing:],
      is_root=bool(found[1]))


def _closing(text: str, opening: int) -> int:
  """The position after the bracket that closes the one at `opening`."""
  depth = 0
  for found in re.compile(r'[()]').finditer(text, opening):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return found.end()
  raise ValueError(f'no bracket closes {text[opening:opening + 80]!r}')


def _bytes(shapes: str) -> float:
  """Of all arrays of a type, which may be a tuple: (f32[8,2]{1,0}, pred[<=3])."""
  total = 0.0
  for dtype, dims in _SHAPE.findall(shapes):
    found = re.search(r'\d+', dtype)
    bits = int(found[0]) if found else 8 * (dtype == 'pred')
    total += bits / 8 * math.prod(int(x.removeprefix('<=')) for x in dims.split(',') if x)
  return total


def _names(attribute: re.Pattern[str], rest: str) -> list[str]:
  return [x for found in attribute.findall(rest) for x in _NAME.findall(found)]


def sent(collectives: Collectives) -> float:
  """Bytes that one chip sends, of all kinds together."""
  return sum(moved.bytes for moved in collectives.values())


class _Counter(NamedTuple):
  """Of one program."""

  computations: dict[str, _Computation]
  mesh_shape: Mapping[str, int]
  trips: Mapping[str, float]

  def of_computation(self, name: str, chains: set[tuple[str, ...]], *, fused: bool = False) -> Collectives:
    """Of one execution of a computation.

    Args:
      chains: of collectives that were met already in what calls it; new ones are added.
      fused: whether it is a fusion's.
    """
    total: Collectives = {}
    for i in self.computations[name].values():
      for found, times in self._of_instruction(name, i, chains, fused):
        for key, moved in found.items():
          before = total.get(key, Moved(0.0, 0.0))
          total[key] = Moved(before.bytes + times * moved.bytes, before.count + times * moved.count)
    return total

  def _of_instruction(self, name: str, i: _Instruction, chains: set[tuple[str, ...]], fused: bool
                      ) -> Iterator[tuple[Collectives, float]]:
    """What each part of it sends in one execution, and how often that is executed."""
    if i.opcode in KINDS:
      yield self._of_collective(name, i, chains, fused), 1
    elif i.opcode == 'while':
      body, condition = (re.search(rf'\b{x}=%([\w.-]+)', i.rest)[1] for x in ('body', 'condition'))
      once = self.of_computation(body, set())
      if once:
        yield once, self._trip_count(i, body, condition)
    elif i.opcode == 'conditional':
      yield max((self.of_computation(x, set()) for x in _names(_BRANCHES, i.rest)), key=sent), 1
    elif i.opcode in ('fusion', 'async'):  # parts of one collective may be in several of them
      for called in _names(_CALLED, i.rest):
        yield self.of_computation(called, chains, fused=True), 1
    elif i.opcode in ('call', 'custom-call'):
      for called in _names(_CALLED, i.rest):
        yield self.of_computation(called, set()), 1
    elif i.opcode in _UNCOUNTED:
      raise ValueError(f'{i.opcode} of {i.op_name or i.name} is not counted')

  def _of_collective(self, name: str, i: _Instruction, chains: set[tuple[str, ...]], fused: bool) -> Collectives:
    """Nothing of one whose chain was met, or whose groups are of one chip."""
    if chain := re.search(r'\bchain_id="([^"]*)"', i.rest):
      chain = chain[1], *re.findall(r'\bchannel_id=(\d+)', i.rest)
      if chain in chains:
        return {}
      chains.add(chain)
    sizes = tuple(self.mesh_shape.values())
    groups = _groups(i.rest, math.prod(sizes))
    if max(max(g) for g in groups) >= math.prod(sizes):
      raise ValueError(f'{i.name} is among more chips than mesh={dict(self.mesh_shape)} has')
    positions = [np.unravel_index(g, sizes) for g in groups]
    axes = tuple(axis for n, axis in enumerate(self.mesh_shape) if any(len(set(p[n])) > 1 for p in positions))
    if not axes:
      return {}
    kind, n = i.opcode, max(len(g) for g in groups)
    if kind == 'all-reduce' and fused and self._is_scattered(name, i.name):
      kind = 'reduce-scatter'
    share = {'all-gather': n - 1, 'all-reduce': 2 * (n - 1) / n, 'collective-permute': 1}.get(kind, (n - 1) / n)
    operand_bytes = sum(self.computations[name][x].bytes for x in i.operands)
    return {(kind, axes): Moved(share * operand_bytes, 1.0)}

  def _is_scattered(self, name: str, made: str) -> bool:
    """Whether all that is read of an array is a slice: so a TPU writes a reduce-scatter."""
    users = [i for i in self.computations[name].values() if made in i.operands]
    return bool(users) and all(
        i.opcode == 'dynamic-slice' or i.opcode in _SAME and self._is_scattered(name, i.name) for i in users)

  def _trip_count(self, i: _Instruction, body: str, condition: str) -> float:
    """How often a loop runs."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest):
      return int(known[1])
    made = self.computations[condition]
    root = _root(made)
    if root.opcode == 'compare' and 'direction=LT' in root.rest:
      counter, limit = (made[x] for x in root.operands)
      if counter.opcode == 'get-tuple-element' and limit.opcode == 'constant':
        position = int(re.search(r'\bindex=(\d+)', counter.rest)[1])
        return math.ceil(int(limit.operands[0]) / self._step(body, position))
    path = i.op_name
    if not path:  # the instructions of the body say where it stands
      inside = collections.Counter(
          x.op_name.rpartition('/body/')[0] for x in self.computations[body].values() if '/while/body/' in x.op_name)
      path = inside.most_common(1)[0][0] if inside else ''
    if not path.endswith('/while'):
      raise ValueError(f'the loop {path or i.name} is none that the program wrote, and its trips are not in the text')
    return flops.loop_trips(path.rpartition('/while/body/')[2], self.trips)

  def _step(self, body: str, position: int) -> int:
    """What a trip adds to the counter at a position of what a loop carries."""
    made = self.computations[body]
    counter = made[_root(made).operands[position]]
    if counter.opcode == 'fusion':
      made = self.computations[_names(_CALLED, counter.rest)[0]]
      counter = _root(made)
    steps = [int(made[x].operands[0]) for x in counter.operands if made[x].opcode == 'constant']
    if counter.opcode != 'add' or len(steps) != 1:
      raise ValueError(f'what a trip of {body} adds to its counter, {counter.name}, is no constant')
    return steps[0]


def _root(computation: _Computation) -> _Instruction:
  return next(i for i in computation.values() if i.is_root)


def _groups(rest: str, chips: int) -> list[tuple[int, ...]]:
  """The chips that take part with one another, by number, of a collective's replica_groups or pairs."""
  if found := re.search(r'\bsource_target_pairs=' + _BRACES, rest):
    return _braces(found[0])
  text = rest[rest.index('replica_groups=') + len('replica_groups='):]
  if found := _MESH.match(text):
    return _mesh_groups(*found.groups())
  if found := re.match(r'\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)', text):
    groups = _iota(found[2]).reshape([int(x) for x in found[1].split(',')])
    return [tuple(map(int, g)) for g in groups.reshape(len(groups), -1)]
  return _braces(re.match(_BRACES, text)[0]) or [tuple(range(chips))]


def _braces(text: str) -> list[tuple[int, ...]]:
  return [tuple(map(int, re.findall(r'\d+', g))) for g in re.findall(r'\{([\d,]+)\}', text)]


def _iota(text: str) -> np.ndarray:
  """0, 1, 2, ... in the order of `<=[4,4]T(1,0)`: of these dimensions, transposed."""
  dims, order = re.fullmatch(r'(?:<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?', text).groups()
  dims = [int(x) for x in dims.split(',')]
  order = [int(x) for x in order.split(',')] if order else range(len(dims))
  return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1)


def _mesh_groups(mesh: str, device_ids: str | None, over: str) -> list[tuple[int, ...]]:
  """Of `mesh['a'=2,'b'=8] {'b':(2)4}`: over axes of XLA's own, or parts of them, '(before)size'."""
  sizes = {name: int(size) for name, size in (x.split('=') for x in mesh.split(','))}
  chips = np.arange(math.prod(sizes.values()))
  if device_ids:
    chips = (_iota(device_ids) if '[' in device_ids
             else np.array([int(x) for x in device_ids.split(',')]))
  parts = collections.defaultdict(list)
  for x in over.split(','):
    name, _, part = x.partition(':')
    before, size = re.fullmatch(r'\((\d+)\)(\d+)', part).groups() if part else (1, sizes[name])
    parts[name].append((int(before), int(size)))
  dims, grouped = [], []
  for name, size in sizes.items():
    done = 1
    for before, part in sorted(parts[name]):
      dims += [before // done, part]
      grouped.append(len(dims) - 1)
      done = before * part
    dims.append(size // done)
  alone = [d for d in range(len(dims)) if d not in grouped]
  chips = chips.reshape(dims).transpose(alone + grouped)
  return [tuple(map(int, g)) for g in chips.reshape(-1, math.prod(dims[d] for d in grouped))]
