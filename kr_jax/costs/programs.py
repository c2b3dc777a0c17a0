"""What one run of a program costs, counted from the program that ran.

    call = programs.begin(function, args)  # before the call, which may donate what it is given
    out = function(*args)
    programs.executed(call, {'microbatches': 3})  # {'flops_executed': ..., 'collective_bytes': ..., 'host_bytes': ...}

The jaxpr tells the FLOPs (flops.py), the compiled text the bytes that collectives send (hlo.py). jax keeps both of a
program that ran: `trace`, `lower` and `compile` of the same shapes on the same mesh return them, and compile nothing.

Both are linear in how often each loop runs:

    cost = what stands in no loop + sum over loops of (all its trips) * (what a trip costs, loops inside left out)

So a program is counted once, and each further run takes a few products. How often a chunk of experts runs is taken as
balanced routing has it. What cannot be counted is None, is said once in the log, and never stops a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import logging
from typing import Any, NamedTuple

import jax
import numpy as np

from kr_jax import phases
from kr_jax import sharding
from kr_jax.costs import flops
from kr_jax.costs import hlo
from kr_jax.model import moe

_NOT_IN_A_LOOP = ''


class Program(NamedTuple):
  """What one run costs, of all devices together."""

  flops_of: Mapping[str, float] | None  # of a trip of each loop, and of what stands in none; None: not known
  bytes_of: Mapping[str, float] | None  # that devices send to one another, by the same names
  memory: int | None  # most bytes that it takes of a device, arguments included
  decodes_by_kernel: bool = False  # whether it runs the decoding kernel, whose FLOPs are not among these

  def flops(self, trips: Mapping[str, float]) -> int | None:
    """Executed in a run. trips: of each loop, all trips of the run, of a mean device. Raises ValueError for loops that
    the program was not counted with."""
    return _sum(self.flops_of, trips)

  def collective_bytes(self, trips: Mapping[str, float]) -> int | None:
    """Sent by all devices together in a run. trips: as of `flops`."""
    return _sum(self.bytes_of, trips)


class _Shapes:
  """All calls of a jitted function that have the same shapes on the same mesh: they are one program."""

  def __init__(self, function: Any, args: tuple[Any, ...], mesh: jax.sharding.Mesh | None):
    self._function, self._args, self._mesh = function, args, mesh
    self._programs: dict[tuple[str, ...], Program] = {}

  def program(self, scopes: tuple[str, ...]) -> Program:
    """As of Call.program, counted once."""
    if scopes not in self._programs:
      self._programs[scopes] = _count(self._function, self._args, self._mesh, scopes)
    return self._programs[scopes]


class Call(NamedTuple):
  """A call of a jitted function, without its arrays."""

  shapes: _Shapes
  host_bytes: int  # that the call copies from the host to all devices

  def program(self, scopes: tuple[str, ...] = ()) -> Program:
    """What a run costs, once the call is made.

    scopes: the jax.named_scope of each loop whose trips are not in the program; one around another comes first.
    """
    return self.shapes.program(scopes)


# Of each function its shapes, beside what they are told by. Lists, as these are compared in no time and hashed in long.
_known: dict[Any, list[tuple[list[Any], _Shapes]]] = {}
_kinds: dict[type, str] = {}  # of leaves, by their class: a look at it takes longer


def _sum(of: Mapping[str, float] | None, trips: Mapping[str, float]) -> int | None:
  if of is None:
    return None
  if {_NOT_IN_A_LOOP, *trips} != of.keys():
    raise ValueError(f'trips are of the loops {sorted(trips)}; the program was counted with '
                     f'{sorted(set(of) - {_NOT_IN_A_LOOP})}; pass the trips of each of these')
  return round(of[_NOT_IN_A_LOOP] + sum(n * of[scope] for scope, n in trips.items() if of[scope]))


def _kind(x: Any) -> str:
  """What a leaf of arguments is: of the host, an array, a random key, or static."""
  if isinstance(x, (np.ndarray, np.generic)):
    return 'host'
  if not isinstance(x, jax.Array):
    return 'static'
  return 'random' if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else 'array'


def _struct(x: Any) -> Any:
  """A leaf without what it holds."""
  kind = _kind(x)
  if kind in ('host', 'static'):
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if kind == 'host' else x
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None,
                              weak_type=kind == 'array' and x.aval.weak_type)


def begin(function: Any, args: Sequence[Any]) -> Call:
  """Of a call that comes next, on the mesh that is set. Keeps no array.

  args: arrays and static arguments, in their places.
  """
  mesh, (leaves, tree) = jax.sharding.get_mesh(), jax.tree.flatten(tuple(args))
  told_by, host_bytes, is_divided = [mesh, tree], 0, not mesh.empty
  for x in leaves:
    kind = _kinds.get(type(x)) or _kinds.setdefault(type(x), _kind(x))
    if kind == 'array':
      told_by.append(x.aval)  # most are the same that jax kept
      if is_divided:
        told_by.append(x.sharding)
    elif kind == 'host':
      told_by += x.shape, x.dtype
      host_bytes += x.nbytes
    else:  # a random key makes aval and sharding anew, a thousand times as slowly
      told_by += (x.shape, x.dtype) if kind == 'random' else (x,)
  known = _known.setdefault(function, [])
  shapes = next((shapes for before, shapes in known if before == told_by), None)
  if shapes is None:
    shapes = _Shapes(function, jax.tree.unflatten(tree, map(_struct, leaves)), mesh if is_divided else None)
    known.append((told_by, shapes))
  # jit copies an array of the host to each device.
  return Call(shapes, host_bytes * (mesh.size if is_divided else 1))


def executed(call: Call, trips: Mapping[str, float]) -> dict[str, int]:
  """The counters of a call that was made: flops_executed, collective_bytes and host_bytes, without those not known.

  Args:
    trips: of each loop that ends when its work is done, by its jax.named_scope: all trips of the run, of a mean device.
      A loop around another comes first.
  """
  program = call.program(tuple(trips))
  found = {'flops_executed': program.flops(trips), 'collective_bytes': program.collective_bytes(trips),
           'host_bytes': call.host_bytes}
  return {name: n for name, n in found.items() if n is not None}


def run(function: Any, *args: Any, trips: Mapping[str, float] | None = None) -> Any:
  """function(*args). What it executes is counted in the phase that runs, where a clock does (phases.py).

  Within another function that is traced nothing is executed, and nothing counted.
  """
  if not phases.is_running() or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)):
    return function(*args)
  call = begin(function, args)
  out = function(*args)
  phases.count(**executed(call, trips or {}))
  return out


def _count(function: Any, args: tuple[Any, ...], mesh: jax.sharding.Mesh | None, scopes: tuple[str, ...]) -> Program:
  name = getattr(function, '__name__', str(function))

  def known(what: str, count: Callable[[], Any]) -> Any:
    try:
      return count()
    except Exception as error:  # whatever it is, the run goes on
      logging.getLogger('absl').warning(
          '%s of the program %s are not known: %s: %s', what, name, type(error).__name__,
          str(error).partition('\n')[0][:300])
      return None

  with sharding.on(mesh):
    platform = sharding.platform()
    traced = known('FLOPs', lambda: function.trace(*args))
    compiled = traced and known('collectives', lambda: traced.lower().compile())
  if traced is None:
    return Program(None, None, None)
  jaxpr = traced.jaxpr.jaxpr
  flops_of = known('FLOPs', lambda: _by_loop(lambda trips: flops.count(jaxpr, trips, platform=platform), scopes))
  return Program(
      flops_of, compiled and known('collectives', lambda: _collectives(compiled, mesh, scopes)),
      compiled and known('bytes in memory', lambda: _peak(compiled)),
      flops.runs_kernel(jaxpr, 'decode_attention', platform))


def _by_loop(count: Callable[[Mapping[str, float]], float], scopes: Sequence[str]) -> dict[str, float]:
  """What a trip of each loop adds, by its scope, and what remains without any."""
  trips = dict.fromkeys(scopes, 0) | {moe.CHUNKS: 1 / moe.HEADROOM}
  found = {_NOT_IN_A_LOOP: count(trips)}
  for scope in scopes:
    trips[scope] = 1
    found[scope] = count(trips) - sum(found.values())
  return found


def _collectives(compiled: jax.stages.Compiled, mesh: jax.sharding.Mesh | None, scopes: Sequence[str]
                 ) -> dict[str, float]:
  if mesh is None or mesh.size == 1:
    return dict.fromkeys((_NOT_IN_A_LOOP, *scopes), 0)
  program = hlo.read(compiled.as_text())
  return _by_loop(lambda trips: mesh.size * hlo.sent(hlo.count(program, mesh.shape, trips)), scopes)


def _peak(compiled: jax.stages.Compiled) -> int:
  m = compiled.memory_analysis()
  return (m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes)
