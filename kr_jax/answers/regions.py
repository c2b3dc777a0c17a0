"""Parts of the real line: unions of intervals and points, with numbers of values.py as their ends."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from kr_jax.answers import values


class Interval(NamedTuple):
  """The numbers between two ends, which belong to it where they are closed; low <= high."""

  low: Any
  high: Any
  low_closed: bool
  high_closed: bool


Region = tuple[Interval, ...]  # apart, in ascending order

_INFINITY = values.mp.inf
LINE: Region = (Interval(-_INFINITY, _INFINITY, False, False),)


def is_infinite(x: Any) -> bool:
  return not isinstance(x, Fraction) and bool(values.mp.isinf(x))


def _less(x: Any, y: Any) -> bool:
  return not values.close(x, y) and bool(values.inexact(x) < values.inexact(y))


def interval(low: Any, high: Any, low_closed: bool, high_closed: bool) -> Region | None:
  """An interval; () where it holds no number, None where its ends are in the wrong order."""
  if _less(high, low):
    return None
  if values.close(low, high) and not (low_closed and high_closed):
    return ()
  return (Interval(low, high, low_closed, high_closed),)


def union(*parts: Region) -> Region:
  """All numbers of the parts, joined where they touch."""
  found: list[Interval] = []
  pieces = sorted((piece for part in parts for piece in part), key=lambda x: (values.inexact(x.low), not x.low_closed))
  for piece in pieces:
    last = found[-1] if found else None
    if last is None or _less(last.high, piece.low) or (
        values.close(last.high, piece.low) and not (last.high_closed or piece.low_closed)):
      found.append(piece)
    elif _less(last.high, piece.high) or values.close(last.high, piece.high) and piece.high_closed:
      found[-1] = last._replace(high=piece.high, high_closed=piece.high_closed)
  return tuple(found)


def complement(part: Region) -> Region:
  """All other numbers."""
  found, low, closed = [], -_INFINITY, False
  for piece in part:
    found += interval(low, piece.low, closed, not piece.low_closed) or ()
    low, closed = piece.high, not piece.high_closed
  found += interval(low, _INFINITY, closed, False) or ()
  return tuple(found)


def intersection(*parts: Region) -> Region:
  """The numbers of all parts."""
  return complement(union(*map(complement, parts)))


def minus(part: Region, without: Region) -> Region:
  """The numbers of a part that are not in another one."""
  return intersection(part, complement(without))


def linear(places: Sequence[Fraction], at: Sequence[Any], sign: str) -> Region | None:
  """Where a linear function, given by its values at 0, 1 and other places, relates to 0; None: it is not linear.

  sign: '=', 'ne', '<', '>', 'le' or 'ge'.
  """
  if not all(values.is_real(x) and not is_infinite(x) for x in at):
    return None
  if not all(isinstance(x, Fraction) for x in at):
    at = [*map(values.inexact, at)]
  slope = at[1] - at[0]
  line = [at[0] + values.times(place, slope) for place in places]
  if values.close(at[1], at[0]) or not all(map(values.close, at, line)):
    return None
  root = -at[0] / slope
  point = interval(root, root, True, True)
  if sign in ('=', 'ne'):
    return point if sign == '=' else complement(point)
  closed = sign in ('le', 'ge')
  if (sign in ('<', 'le')) == (slope > 0):
    return interval(-_INFINITY, root, False, closed)
  return interval(root, _INFINITY, closed, False)


def equal(x: Region, y: Region) -> bool:
  """Whether they have the same numbers."""
  return len(x) == len(y) and all(
      values.close(a.low, b.low) and values.close(a.high, b.high)
      and (a.low_closed, a.high_closed) == (b.low_closed, b.high_closed) for a, b in zip(x, y))
