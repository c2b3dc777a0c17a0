"""The kinds of thing that an answer says."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

from kr_jax.answers.notation import Tokens
from kr_jax.answers.units import Unit


class Words(NamedTuple):
  text: str


class Quantity(NamedTuple):
  """A formula with a unit; scale: what words such as million or thirds multiply it by."""

  tokens: Tokens
  unit: Unit | None = None
  scale: Fraction = Fraction(1)


class Group(NamedTuple):
  """Things of a kind: '' for a list without brackets, else two brackets, such as '()', '[)' and '{}'."""

  kind: str
  items: tuple[Any, ...]
  joined: str = ','  # 'or' or 'and' where a list is joined by one of them alone; 'thousands': it may be a number


class Relation(NamedTuple):
  """Formulas and the relations between them: '=', '<', '>', 'le', 'ge', 'ne'."""

  sides: tuple[Tokens, ...]
  signs: tuple[str, ...]


class Named(NamedTuple):
  """A thing and its label; relation: the equation as written, where it is one."""

  label: str
  thing: Any
  relation: Relation | None


class Common(NamedTuple):
  """What things have in common."""

  parts: tuple[Any, ...]


class Region(NamedTuple):
  """A union of things, less those that are left out."""

  parts: tuple[Any, ...]
  without: tuple[Any, ...] = ()


class Time(NamedTuple):
  parts: tuple[int, ...]  # hours, minutes, seconds
  half: str  # 'am', 'pm' or ''


class Ratio(NamedTuple):
  parts: tuple[Tokens, ...]


class Based(NamedTuple):
  digits: str
  base: str


class Matrix(NamedTuple):
  rows: tuple[tuple[Any, ...], ...]


class Either(NamedTuple):
  """What can be read in two ways."""

  ways: tuple[Any, ...]
