"""Parts of the real line: unions of intervals and points, with numbers of values.py as their ends."""

from __future__ import annotations

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


def linear(at_0: Any, at_1: Any, at_2: Any, sign: str) -> Region | None:
  """Where a linear function, given by three of its values, relates to 0; None: it is not linear.

  sign: '=', 'ne', '<', '>', 'le' or 'ge'.
  """
  given = at_0, at_1, at_2
  if not all(isinstance(x, Fraction) or values.is_real(x) for x in given):
    return None
  at_0, at_1, at_2 = given if all(isinstance(x, Fraction) for x in given) else map(values.inexact, given)
  slope = at_1 - at_0
  if not values.close(at_2, at_0 + 2 * slope) or values.close(at_1, at_0):
    return None
  root = -at_0 / slope
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
