"""What one execution of a compiled program does on one chip, counted from its text.

The text is that of `compiled.as_text()`, after partitioning: shapes are those of a chip. XLA's own cost
analysis counts the body of a loop once; here it counts as often as it runs. That is known where a
counter goes from a constant to a constant, as those of jax.lax.scan do; another loop stands in a
jax.named_scope, and who asks says how often it runs.

    flops         2 for each multiplication with addition of products whose factors are both there:
                  not for those with padding, of which a TPU's products (convolutions) are full
    kernels       those of Pallas, which count as executions: what they do stands in no text
    collectives   bytes that one chip sends, over a ring of n chips (or of pairs of neighbours):

                  all-gather           (n - 1) times what it has
                  reduce-scatter       (n - 1) / n of what it has
                  all-reduce           2 (n - 1) / n of what it has
                  all-to-all           (n - 1) / n of what it has
                  collective-permute   what it has

Of a conditional the branch with most flops is counted: with most executions of kernels if those are
equal, and then with most bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import collections
import math
import re
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[str, tuple[int, ...]]  # dtype and dimensions
KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')
# None of ours has any; they would be missed.
_UNCOUNTED = ('ragged-dot', 'ragged-all-to-all', 'collective-broadcast')
# Loops whose counter takes more steps than this are not followed.
_MOST_TRIPS = 100_000
# What hands on a number as it is.
_SAME = ('copy', 'copy-start', 'copy-done', 'bitcast', 'convert', 'reshape', 'optimization-barrier')
_ARITHMETIC = {
    'add': lambda x, y: x + y, 'subtract': lambda x, y: x - y, 'multiply': lambda x, y: x * y,
    'minimum': min, 'maximum': max, 'and': lambda x, y: x & y, 'or': lambda x, y: x | y,
    'select': lambda p, x, y: x if p else y, 'clamp': lambda low, x, high: min(max(x, low), high)}
_COMPARE = {'LT': lambda x, y: x < y, 'LE': lambda x, y: x <= y, 'GT': lambda x, y: x > y,
            'GE': lambda x, y: x >= y, 'EQ': lambda x, y: x == y, 'NE': lambda x, y: x != y}

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


class Counts(NamedTuple):
  """What one execution does on one chip."""

  flops: float  # of products
  # By name of a kernel and shapes, of its operands and of its results: executions.
  kernels: dict[tuple[str, tuple[tuple[Shape, ...], tuple[Shape, ...]]], float]
  # By one of KINDS and the axes over which those differ that take part, in the mesh's order.
  collectives: dict[tuple[str, tuple[str, ...]], Moved]


class Value(NamedTuple):
  """An array that an instruction makes."""

  opcode: str  # without the -start or -done of one that is not waited for
  dtype: str
  dims: tuple[int, ...]
  op_name: str  # where it comes from; '' unknown


class _Instruction(NamedTuple):
  name: str
  opcode: str
  shapes: tuple[Shape, ...]  # of the parts of a tuple, one after the other
  operands: tuple[str, ...]  # names; of a constant and a parameter what stands there
  rest: str  # all that follows

  @property
  def base(self) -> str:
    return self.opcode.removesuffix('-start')

  @property
  def op_name(self) -> str:
    found = re.search(r'\bop_name="([^"]*)"', self.rest)
    return found[1] if found else ''


class _Computation(NamedTuple):
  instructions: dict[str, _Instruction]
  root: _Instruction


# The integer at (number of a parameter, place in it if it is a tuple); None where it is not known.
_Given = Callable[[int, int | None], Any]


def count(text: str, mesh_shape: Mapping[str, int], trips: Mapping[str, float]) -> Counts:
  """What the program does on one chip.

  Args:
    mesh_shape: axes of the mesh it was compiled for, in order, with their sizes.
    trips: by the name of a jax.named_scope, how often a loop right in it runs each time it is come to,
      if the text does not tell.

  Raises:
    ValueError: a loop that does anything has no such scope, or the mesh is another one.
  """
  return _Counter(text, mesh_shape, trips).of_entry()


def shapes(text: str) -> Iterator[Value]:
  """All that is made anywhere in the program, in fusions and loops too, once each."""
  for computation in _parse(text)[0].values():
    for i in computation.instructions.values():
      for dtype, dims in i.shapes:
        yield Value(re.sub('-(start|done)$', '', i.opcode), dtype, dims, i.op_name)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  """The computations, and the name of the one that is the program."""
  computations, entry, name, root, lines, instructions = {}, '', None, None, [], {}

  def take():
    nonlocal root
    if lines:
      is_root, i = _instruction('\n'.join(lines))
      instructions[i.name] = i
      root = i if is_root else root
      lines.clear()

  for line in text.splitlines():
    if name is None:
      if found := _COMPUTATION.match(line):
        name, root, instructions = found[2], None, {}
        entry = name if found[1] else entry
    elif line == '}' or line.startswith('}, execution_thread'):
      take()
      computations[name] = _Computation(instructions, root or list(instructions.values())[-1])
      name = None
    elif _INSTRUCTION.match(line):
      take()
      lines.append(line)
    else:  # metadata of kernels has lines of its own
      lines.append(line)
  if entry not in computations:
    raise ValueError('this is not the text of a compiled program: it has no ENTRY')
  return computations, entry


def _instruction(text: str) -> tuple[bool, _Instruction]:
  found = _INSTRUCTION.match(text)
  start = found.end()
  end = _closing(text, start) if text[start] == '(' else text.index(' ', start)
  opening = text.index('(', end)
  opcode = text[end:opening].strip()
  closing = _closing(text, opening)
  inside = text[opening + 1:closing - 1]
  operands = (inside,) if opcode in ('constant', 'parameter') else tuple(_NAME.findall(inside))
  return bool(found[1]), _Instruction(found[2], opcode, _shapes(text[start:end]), operands,
                                      text[closing:])


def _closing(text: str, opening: int) -> int:
  """The place after the bracket that closes the one at `opening`."""
  depth = 0
  for found in re.compile(r'[()]').finditer(text, opening):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return found.end()
  raise ValueError(f'no bracket closes {text[opening:opening + 80]!r}')


def _shapes(text: str) -> tuple[Shape, ...]:
  return tuple((dtype, tuple(int(x.removeprefix('<=')) for x in dims.split(',') if x))
               for dtype, dims in _SHAPE.findall(text))


def _bytes(shape: Shape) -> float:
  dtype, dims = shape
  found = re.search(r'\d+', dtype)
  bits = int(found[0]) if found else 8 * (dtype == 'pred')
  return math.prod(dims) * bits / 8


def _names(attribute: re.Pattern[str], rest: str) -> list[str]:
  return [x for found in attribute.findall(rest) for x in _NAME.findall(found)]


class _Counter:
  """Of one program."""

  def __init__(self, text: str, mesh_shape: Mapping[str, int], trips: Mapping[str, float]):
    self.computations, self.entry = _parse(text)
    self.axes, self.sizes, self.trips = tuple(mesh_shape), tuple(mesh_shape.values()), trips

  def of_entry(self) -> Counts:
    return self._of(self.entry, lambda *_: None)

  def _of(self, name: str, given: _Given, chains: set[Any] | None = None) -> Counts:
    """Of one execution of a computation.

    chains: of collectives that were already met, where this is a part of another computation.
    """
    total, fused = Counts(0.0, {}, {}), chains is not None
    chains = set() if chains is None else chains
    for i in self.computations[name].instructions.values():
      if i.base in ('convolution', 'dot'):
        total = total._replace(flops=total.flops + self._flops(name, i))
      elif i.base in KINDS:
        total = _sum(total, self._moved(name, i, chains, fused))
      elif i.base == 'while':
        total = _sum(total, *self._loop(name, i, given))
      elif i.base == 'conditional':
        branches = _names(_BRANCHES, i.rest)
        counts = [self._of(x, self._handed(name, i.operands[n + 1:n + 2], given))
                  for n, x in enumerate(branches)]
        total = _sum(total, max(counts, key=lambda c: (
            c.flops, sum(c.kernels.values()), sum(x.bytes for x in c.collectives.values()))))
      elif i.base in ('fusion', 'async', 'call', 'custom-call'):
        if 'custom_call_target="tpu_custom_call"' in i.rest:
          key = _kernel(i), (self._operand_shapes(name, i), i.shapes)
          total = _sum(total, Counts(0.0, {key: 1.0}, {}))
        # Parts of a collective that is spread over fusions are all called from here.
        here = chains if i.base in ('fusion', 'async') else None
        for called in _names(_CALLED, i.rest):
          total = _sum(total, self._of(called, self._handed(name, i.operands, given), here))
      elif i.base in _UNCOUNTED:
        raise ValueError(f'{i.opcode} of {i.op_name or i.name} is not counted')
    return total

  def _operand_shapes(self, name: str, i: _Instruction) -> tuple[Shape, ...]:
    made = self.computations[name].instructions
    return tuple(shape for x in i.operands for shape in made[x].shapes)

  def _flops(self, name: str, i: _Instruction) -> float:
    """2 for each multiplication of what is no padding and no hole."""
    lhs, rhs = self._operand_shapes(name, i)
    (_, out), = i.shapes
    if i.base == 'dot':
      contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.rest)
      return 2.0 * math.prod(out) * math.prod(lhs[1][int(d)] for d in re.findall(r'\d+', contracted[1]))
    of_lhs, of_rhs, of_out = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.rest).groups()
    window = re.search(r'\bwindow=\{([^}]*)\}', i.rest)
    window = dict(x.split('=') for x in window[1].split()) if window else {}
    products = out[of_out.index('b')] * out[of_out.index('f')] * rhs[1][of_rhs.index('i')]
    for d in range(len(of_out) - 2):
      at = lambda key, default: window[key].split('x')[d] if key in window else default
      low = int(at('pad', '0_0').rsplit('_', 1)[0])
      products *= _pairs(
          lhs[1][of_lhs.index(str(d))], out[of_out.index(str(d))], rhs[1][of_rhs.index(str(d))],
          int(at('stride', 1)), low, int(at('lhs_dilate', 1)), int(at('rhs_dilate', 1)))
    return 2.0 * products

  def _moved(self, name: str, i: _Instruction, chains: set[Any], fused: bool) -> Counts:
    """Of a collective; nothing of one whose chain was met, or whose groups are of one chip."""
    nothing = Counts(0.0, {}, {})
    if chain := re.search(r'\bchain_id="([^"]*)"', i.rest):
      chain = chain[1], *re.findall(r'\bchannel_id=(\d+)', i.rest)
      if chain in chains:
        return nothing
      chains.add(chain)
    groups = _groups(i.rest, math.prod(self.sizes))
    if max(max(g) for g in groups) >= math.prod(self.sizes):
      raise ValueError(f'{i.name} is among more chips than mesh={dict(zip(self.axes, self.sizes))} has')
    places = [np.unravel_index(g, self.sizes) for g in groups]
    axes = tuple(axis for n, axis in enumerate(self.axes) if any(len(set(p[n])) > 1 for p in places))
    if not axes:
      return nothing
    kind, n = i.base, max(len(g) for g in groups)
    if kind == 'all-reduce' and fused and self._is_scattered(name, i.name):
      kind = 'reduce-scatter'
    sent = {'all-gather': n - 1, 'all-reduce': 2 * (n - 1) / n, 'collective-permute': 1}
    size = sum(map(_bytes, self._operand_shapes(name, i))) * sent.get(kind, (n - 1) / n)
    return Counts(0.0, {}, {(kind, axes): Moved(size, 1.0)})

  def _is_scattered(self, name: str, made: str) -> bool:
    """Whether all that is read of it is a slice: so a TPU writes a reduce-scatter."""
    users = [i for i in self.computations[name].instructions.values() if made in i.operands]
    return bool(users) and all(
        i.opcode == 'dynamic-slice' or i.opcode in ('get-tuple-element', *_SAME)
        and self._is_scattered(name, i.name) for i in users)

  def _loop(self, name: str, i: _Instruction, given: _Given) -> tuple[Counts, float]:
    """Of one turn, and how many there are."""
    body, condition = (re.search(rf'\b{x}=%([\w.-]+)', i.rest)[1] for x in ('body', 'condition'))
    first = lambda place: self._value(name, i.operands[0], place, given)
    once = self._of(body, lambda _, place: first(place) if self._stays(body, place) else None)
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest)
    trips = int(known[1]) if known else self._turns(body, condition, first)
    if trips is None and once != Counts(0.0, {}, {}):
      trips = self._scoped(i, body)
    return once, trips or 0

  def _scoped(self, i: _Instruction, body: str) -> float:
    """The trips of the scope that a loop stands right in."""
    path = i.op_name
    if not path:
      inside = collections.Counter(
          x.op_name[:x.op_name.rindex('/while/body') + len('/while')]
          for x in self.computations[body].instructions.values() if '/while/body' in x.op_name)
      path = inside.most_common(1)[0][0] if inside else ''
    parts = [re.sub(r'^(?:(?:jvp|transpose|vmap)\()*|\)*$', '', x) for x in path.split('/')]
    # The scope of a loop around this one says nothing of it.
    loop = next((n for n in reversed(range(len(parts) - 1)) if parts[n] == 'while'), -1)
    found = [x for x in parts[loop + 1:] if x in self.trips]
    if not found or parts[-1] != 'while':
      raise ValueError(f'how often the loop {path or i.name} runs is not in the text: it needs a '
                       f'jax.named_scope with trips; those given are {sorted(self.trips)}')
    return self.trips[found[-1]]

  def _turns(self, body: str, condition: str, first: Callable[[int], Any]) -> int | None:
    """How often a loop runs whose counter is known from the first to the last turn, else None."""
    state = {}  # what is asked for, as it is in this turn

    def now(_, place):
      if place not in state:
        state[place] = first(place)  # in the first turn all are asked for
      return state[place]

    for turns in range(_MOST_TRIPS):
      on = self._value(condition, self.computations[condition].root.name, None, now)
      if on is None:
        return None
      if not on:
        return turns
      after = {}
      while missing := state.keys() - after:  # what these are made of is asked for in turn
        after |= {place: self._value(body, self.computations[body].root.name, place, now)
                  for place in missing}
      state.update(after)
    return None

  def _stays(self, body: str, place: int | None) -> bool:
    """Whether each turn of a loop hands on what it found there."""
    mark = object()
    only = lambda _, at: mark if at == place else None
    return self._value(body, self.computations[body].root.name, place, only) is mark

  def _handed(self, name: str, operands: Sequence[str], given: _Given) -> _Given:
    """What a computation is given that is called with operands."""
    return lambda n, place: (self._value(name, operands[n], place, given) if n < len(operands) else None)

  def _value(self, name: str, made: str, place: int | None, given: _Given) -> Any:
    """The integer that an instruction makes, or that stands at a place of the tuple; None if unknown."""
    i = self.computations[name].instructions[made]
    of = lambda operand, place=None: self._value(name, operand, place, given)
    if i.opcode == 'parameter':
      return given(int(i.operands[0]), place)
    if i.opcode in _SAME:
      return of(i.operands[0], place)
    if i.opcode in ('fusion', 'call'):
      called, = _names(_CALLED, i.rest)
      return self._value(called, self.computations[called].root.name, place,
                         self._handed(name, i.operands, given))
    if i.opcode == 'while' and self._stays(re.search(r'\bbody=%([\w.-]+)', i.rest)[1], place):
      return of(i.operands[0], place)
    if i.opcode == 'tuple' and place is not None:
      return of(i.operands[place])
    if place is not None:
      return None
    if i.opcode == 'get-tuple-element':
      return of(i.operands[0], int(re.search(r'\bindex=(\d+)', i.rest)[1]))
    if i.opcode == 'constant':
      found = re.fullmatch(r'-?\d+|true|false', i.operands[0])
      return None if not found else int(found[0] == 'true' if found[0].isalpha() else found[0])
    compute = _ARITHMETIC.get(i.opcode)
    if i.opcode == 'compare':
      compute = _COMPARE[re.search(r'\bdirection=(\w+)', i.rest)[1]]
    if compute is None:
      return None
    operands = [of(x) for x in i.operands]
    if not all(isinstance(x, int) for x in operands):
      return None
    return _wrapped(int(compute(*operands)), i.shapes[0][0])


def _wrapped(x: int, dtype: str) -> int:
  """As an integer of this type."""
  found = re.fullmatch(r'([su])(\d+)', dtype)
  if not found:
    return x
  top = 1 << int(found[2])
  x %= top
  return x - top if found[1] == 's' and x >= top // 2 else x


def _sum(x: Counts, y: Counts, times: float = 1) -> Counts:
  """x, and y so many times."""
  kernels, collectives = dict(x.kernels), dict(x.collectives)
  for key, executions in y.kernels.items():
    kernels[key] = kernels.get(key, 0.0) + times * executions
  for key, moved in y.collectives.items():
    old = collectives.get(key, Moved(0.0, 0.0))
    collectives[key] = Moved(old.bytes + times * moved.bytes, old.count + times * moved.count)
  return Counts(x.flops + times * y.flops, kernels, collectives)


def _kernel(i: _Instruction) -> str:
  """The name that pl.pallas_call was given, or that of its function."""
  found = re.search(r'([\w.-]+)\)*/pallas_call$', i.op_name)
  return found[1] if found else re.sub(r'(\.(\d+|clone|remat\d*))+$', '', i.name)


def _pairs(lhs: int, out: int, taps: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int
           ) -> int:
  """Places of the output and of the window, of one dimension, that meet an element of the input."""
  last, pairs = (lhs - 1) * lhs_dilate, 0
  for tap in range(taps):
    start = tap * rhs_dilate - low
    first, end = max(0, -(start // stride)), min(out, (last - start) // stride + 1)
    if lhs_dilate == 1:
      pairs += max(0, end - first)
    else:
      pairs += sum((start + o * stride) % lhs_dilate == 0 for o in range(first, end))
  return pairs


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
