"""Sections of a config: frozen dataclasses whose fields, the knobs, have a default, a meaning and bounds.

A section that is constructed with a wrong value raises a ValueError that names the knob, the value, the bounds and, of
a misspelt choice, the nearest name. Imports nothing heavy: configs load this module before anything else.

Numbers are computed with in 32 bits. So a whole number is at most MOST unless its knob says otherwise, and any other
number is 0 or of a size that float32 holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import difflib
import numbers
from typing import Any, ClassVar, Self

from kr_jax import checks
from kr_jax.checks import shown

MOST = 2 ** 31 - 1  # the largest whole number of 32 bits
ANY = 2 ** 63 - 1  # `high` of a whole number that is only compared with others: '20 at the most', 'every 20'
SEED = 2 ** 32 - 1  # `high` of a seed: of a larger one jax.random.key reads the last 32 bits, so that two are one run
_SMALL, _LARGE = 1e-30, 1e30  # sizes of other numbers


@dataclasses.dataclass(frozen=True)
class Bounds:
  """What a knob may be. None: no bound on that side."""

  low: float | None = None  # the least value
  above: float | None = None  # larger than this
  high: float | None = None  # the largest value
  below: float | None = None  # smaller than this
  choices: tuple[Any, ...] = ()  # one of these
  of: type | None = None  # of the values of a tuple; texts are not empty
  path: str = ''  # 'read' or 'written', of a text that is the path of a file or directory, or a URL

  def hold(self, value: Any) -> bool:
    if self.choices:
      return value in self.choices
    return ((self.low is None or value >= self.low) and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high) and (self.below is None or value < self.below))

  def as_text(self, value: Any) -> str:
    """The bounds as an error says them of a value; limits of no meaning of their own, where it is above them alone."""
    if self.choices:
      return 'one of ' + ', '.join(map(repr, self.choices))
    high = None if self.high in (MOST, ANY) and value <= self.high else self.high
    sides = (('at least', self.low), ('above', self.above), ('at most', high), ('below', self.below))
    return ' and '.join(f'{side} {bound if isinstance(bound, int) else f"{bound:g}"}' for side, bound in sides
                        if bound is not None)


def knob(default: Any, doc: str, **bounds: Any) -> Any:
  """A field of a section. bounds: as of Bounds; a whole number without any on that side is at most MOST."""
  if isinstance(default, int) and not isinstance(default, bool) and not {'high', 'below', 'choices'} & {*bounds}:
    bounds['high'] = MOST
  return dataclasses.field(default=default, metadata={'doc': doc, 'bounds': Bounds(**bounds)})


def nearest(name: str, known: Iterator[str] | Mapping[str, Any]) -> str:
  """'; did you mean NAME?', or '' where no known name is near."""
  found = difflib.get_close_matches(str(name), list(known), n=1)
  return f'; did you mean {found[0]!r}?' if found else ''


def _is_of_type(value: Any, default: Any) -> bool:
  if default is None:
    return value is None or isinstance(value, bool)
  if isinstance(default, bool) or isinstance(value, bool):
    return isinstance(default, bool) and isinstance(value, bool)
  if isinstance(default, float):
    return checks.is_finite(value)
  return isinstance(value, numbers.Integral if isinstance(default, int) else type(default))


_KINDS = {'int': 'a whole number', 'float': 'a finite number', 'str': 'a text', 'bool': 'True or False',
          'tuple': 'a tuple', 'NoneType': 'None, True or False'}


def _wrong(name: str, value: Any, field: dataclasses.Field) -> str | None:
  """What is wrong with the value of a knob; None where nothing is."""
  bounds, meaning = field.metadata['bounds'], f'{name}={shown(value)} ({field.metadata["doc"]})'
  if not _is_of_type(value, field.default):
    hint = f'; ({shown(value)},) makes one' if isinstance(field.default, tuple) and isinstance(value, str) else ''
    return f'{meaning} must be {_KINDS[type(field.default).__name__]}{hint}'
  problem = None
  if isinstance(value, str):
    problem = checks.text_problem(value) or (
        checks.path_problem(value, written=bounds.path == 'written') if bounds.path else None)
  elif isinstance(value, tuple):
    problem = next((problem for x in value if (problem := _of_element(x, bounds.of))), None)
  if problem:
    return f'{meaning} {problem}'
  if not bounds.hold(value):
    hint = nearest(value, bounds.choices) if bounds.choices and isinstance(value, str) else ''
    return f'{meaning} must be {bounds.as_text(value)}{hint}'
  if isinstance(field.default, float) and value and not _SMALL <= abs(value) <= _LARGE:
    zero = '0, or ' if bounds.hold(0.0) else ''
    return f'{meaning} must be {zero}of a size in {_SMALL:g}..{_LARGE:g}, as float32 holds it'
  return None


def _of_element(x: Any, of: type | None) -> str | None:
  """What is wrong with a value of a tuple."""
  if of is str and not (isinstance(x, str) and x):
    return f'must hold texts, none of them empty, not {shown(x)}'
  if of is int and not (isinstance(x, numbers.Integral) and not isinstance(x, bool)):
    return f'must hold whole numbers, not {shown(x)}'
  if isinstance(x, str) and (problem := checks.text_problem(x)):
    return f'holds a text that {problem}'
  return None


class Section:
  """A section of a config: its knobs are checked when it is constructed."""

  SECTION: ClassVar[str] = ''  # what its knobs are called by

  def __post_init__(self):
    wrong = []
    for field in dataclasses.fields(self):
      if 'bounds' in field.metadata:
        owner = next(c for c in type(self).__mro__ if field.name in c.__dict__.get('__annotations__', ()))
        name = '.'.join(filter(None, (owner.SECTION, field.name)))
        wrong.append(_wrong(name, getattr(self, field.name), field))
    wrong = [message for message in wrong if message] or list(self.conflicts())
    if wrong:
      raise ValueError('; '.join(wrong))

  def conflicts(self) -> Iterator[str]:
    """What is wrong with knobs together, each of which is within its own bounds."""
    yield from ()

  def replace(self, **changed: Any) -> Self:
    return dataclasses.replace(self, **changed)

  @classmethod
  def check(cls, **values: Any) -> None:
    """Raises ValueError for values out of the bounds of these knobs, as the construction of a section does."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    wrong = [_wrong(f'{cls.SECTION}.{name}', value, fields[name]) for name, value in values.items()]
    if any(wrong):
      raise ValueError('; '.join(filter(None, wrong)))

  @classmethod
  def choices(cls, name: str) -> tuple[Any, ...]:
    """What a knob may be, of one that has choices."""
    return next(field for field in dataclasses.fields(cls) if field.name == name).metadata['bounds'].choices


def section(cls: type) -> type:
  return dataclasses.dataclass(frozen=True)(cls)


def as_dict(config: Section) -> dict[str, Any]:
  """Nested dicts of plain values."""
  return dataclasses.asdict(config)


def read(tree: Mapping[str, Any], cls: Callable[..., Any]) -> Any:
  """A section of this class, and those in it, of nested mappings such as an ml_collections.ConfigDict.

  Raises ValueError that names every knob that is unknown, missing or out of its bounds.
  """
  if not hasattr(tree, 'keys'):
    raise ValueError(f'{cls.SECTION}={shown(tree)} must be a section, which holds knobs by name')
  fields = {field.name: field for field in dataclasses.fields(cls)}
  called = lambda name: '.'.join(filter(None, (cls.SECTION, str(name))))
  wrong = [f'there is no knob {called(name)}{nearest(name, fields)}' for name in tree if name not in fields]
  wrong += [f'{called(name)} is missing' for name in fields if name not in tree]
  values = {}
  for name, field in fields.items():
    value = tree[name] if name in tree else field.default
    if isinstance(field.default, Section):
      try:
        value = read(value, type(field.default))
      except ValueError as error:
        wrong.append(str(error))
        value = field.default
    elif isinstance(field.default, tuple) and isinstance(value, list):
      value = tuple(value)
    elif isinstance(field.default, float) and isinstance(value, int) and checks.is_finite(value):
      value = float(value)
    values[name] = value
  try:
    section_ = cls(**values)
  except ValueError as error:
    wrong.append(str(error))
  if wrong:
    raise ValueError('; '.join(wrong))
  return section_
