"""Where a computation first gives a number that is not finite.

The jaxpr of a function is run one operation after the other, into its loops and the functions that it calls, and what
each operation gives is looked at. That is slow, and for looking at one batch. An operation gives the first nan where
none of what it takes is nan, and the first infinity likewise. An infinity need not be wrong: a mask may put it there,
or leave it out later. So the search ends at the first nan, and remembers the first infinity on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import math
import os
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Place(NamedTuple):
  """An operation that gave a number that is not finite, though what it took had none such."""

  what: str  # 'nan' or 'inf'
  operation: str  # of jax, with the type of what it gave: 'log float32[4,8]'
  source: str  # 'model/policy.py:123 (hidden)'; '' where it is not known
  trips: tuple[int, ...]  # of the loops around it, the outermost first
  inputs: tuple[str, ...]  # the range of each thing that it took

  def __str__(self) -> str:
    trips = f', trip {", ".join(map(str, self.trips))} of its loops' if self.trips else ''
    at = f' at {self.source}' if self.source else ''
    return f'{self.what}: {self.operation}{at}{trips}, of {"; ".join(self.inputs)}'


class _Found(Exception):
  """Ends the search."""


class _Search:
  """Runs a jaxpr, and notes the first nan and the first infinity that an operation gives."""

  def __init__(self):
    self.nan: Place | None = None
    self.inf: Place | None = None

  def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], trips: tuple[int, ...]) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    read = lambda x: x.val if isinstance(x, core.Literal) else values[x]
    for eqn in jaxpr.eqns:
      given = [read(x) for x in eqn.invars]
      values.update(zip(eqn.outvars, self._one(eqn, given, trips)))
    return [read(x) for x in jaxpr.outvars]

  def _one(self, eqn: Any, given: list[Any], trips: tuple[int, ...]) -> Sequence[Any]:
    name, p = eqn.primitive.name, eqn.params
    if name == 'scan':
      return self._scan(p, given, trips)
    if name == 'while':
      return self._while(p, given, trips)
    if name == 'cond':
      branch = p['branches'][int(np.clip(given[0], 0, len(p['branches']) - 1))]
      return self.run(branch.jaxpr, branch.consts, given[1:], trips)
    inner = p.get('jaxpr', p.get('call_jaxpr'))
    closed = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ()) if isinstance(
        inner, core.Jaxpr) else None
    if closed and len(closed.jaxpr.invars) == len(given) and name not in ('shard_map', 'pallas_call'):
      return self.run(closed.jaxpr, closed.consts, given, trips)
    out = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(p))
    out = out if eqn.primitive.multiple_results else [out]
    self._look(eqn, given, out, trips)
    return out

  def _scan(self, p: Any, given: list[Any], trips: tuple[int, ...]) -> list[Any]:
    closed, n = p['jaxpr'], p['num_consts']
    consts, carry, rows = given[:n], given[n:n + p['num_carry']], given[n + p['num_carry']:]
    out = []
    for i in reversed(range(p['length'])) if p['reverse'] else range(p['length']):
      found = self.run(closed.jaxpr, closed.consts, [*consts, *carry, *(x[i] for x in rows)], (*trips, i))
      carry = found[:p['num_carry']]
      out.append(found[p['num_carry']:])
    out = out[::-1] if p['reverse'] else out
    return [*carry, *(jnp.stack(x) for x in zip(*out))]

  def _while(self, p: Any, given: list[Any], trips: tuple[int, ...]) -> list[Any]:
    n, m = p['cond_nconsts'], p['body_nconsts']
    of_cond, of_body, carry, trip = given[:n], given[n:n + m], given[n + m:], 0
    goes_on, body = p['cond_jaxpr'], p['body_jaxpr']
    while self.run(goes_on.jaxpr, goes_on.consts, [*of_cond, *carry], (*trips, trip))[0]:
      carry = self.run(body.jaxpr, body.consts, [*of_body, *carry], (*trips, trip))
      trip += 1
    return carry

  def _look(self, eqn: Any, given: Sequence[Any], out: Sequence[Any], trips: tuple[int, ...]) -> None:
    for what, is_so in (('nan', math.isnan), ('inf', math.isinf)):
      if getattr(self, what) or not any(map(is_so, _numbers(out))) or any(map(is_so, _numbers(given))):
        continue
      aval = next(x.aval for x, y in zip(eqn.outvars, out) if any(map(is_so, _numbers([y]))))
      setattr(self, what, Place(what, f'{eqn.primitive.name} {aval.str_short()}', _source(eqn), trips,
                                tuple(map(_range, given))))
    if self.nan:
      raise _Found


def _numbers(values: Sequence[Any]) -> Iterator[float]:
  """Of each array of numbers with a fraction its least and largest number, and nan if it has one, in turn."""
  for x in values:
    if hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.floating) and np.size(x):
      yield from _extremes(x)


@jax.jit
def _of(x):
  # A minimum of XLA on a CPU leaves nan out of arrays that are large.
  is_nan = jnp.isnan(x)
  return (jnp.min(jnp.where(is_nan, jnp.inf, x)).astype(jnp.float32),
          jnp.max(jnp.where(is_nan, -jnp.inf, x)).astype(jnp.float32), jnp.any(is_nan))


def _extremes(x: Any) -> list[float]:
  """The least and the largest number but for nan; and nan if there is one."""
  low, high, has_nan = (y.item() for y in jax.device_get(_of(x)))
  return ([low, high] if low <= high else []) + [math.nan] * has_nan


def _range(x: Any) -> str:
  kind = x.dtype if hasattr(x, 'dtype') else type(x).__name__
  if not np.shape(x):
    return f'{x}' if not hasattr(x, 'dtype') or jnp.issubdtype(x.dtype, jnp.number) else str(kind)
  if not (jnp.issubdtype(kind, jnp.floating) and x.size):
    return f'{kind}[{",".join(map(str, x.shape))}]'
  low, *high = (f'{number:.4g}' for number in _extremes(x))
  return f'{kind}[{",".join(map(str, x.shape))}] from {low}' + (f' to {" and ".join(high)}' if high else '')


def _source(eqn: Any) -> str:
  """The innermost line of this package that an operation comes from; of no package, of whatever asked for it."""
  frames = eqn.source_info.traceback.frames if eqn.source_info.traceback else ()
  for frame in frames:
    if frame.file_name.startswith(_PACKAGE + os.sep):
      return f'{os.path.relpath(frame.file_name, _PACKAGE)}:{frame.line_num} ({frame.function_name})'
  of_jax = os.path.dirname(jax.__file__)
  outside = next((f for f in frames if not f.file_name.startswith(of_jax)), None)
  return f'{os.path.basename(outside.file_name)}:{outside.line_num} ({outside.function_name})' if outside else ''


def places(function: Callable[..., Any], *args: Any) -> list[Place]:
  """The first infinity and the first nan that a function comes to, in the order in which it does; [] where all that it
  computes is finite.

  args: trees of arrays. Arguments that are not finite are no place: what is computed of them is not looked at.
  """
  closed = jax.make_jaxpr(function)(*args)
  search = _Search()
  try:
    search.run(closed.jaxpr, closed.consts, jax.tree.leaves(args), ())
  except _Found:
    pass
  return [place for place in (search.inf, search.nan) if place]
