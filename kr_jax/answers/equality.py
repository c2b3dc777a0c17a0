r"""Whether two mathematical answers are the same.

An answer is read as one of a few kinds of thing: words, a list, a set, a tuple or interval, a region of the line, an
equation or inequality, a time, a ratio, a matrix, or a quantity, which is a formula with or without a unit. Things
are compared by kind, formulas by their values (values.py). Where notation is loose, equality is a convention:

  - One side may leave out a unit, a currency, a percent sign or a label 'x =' or 'P(A) ='. Units that measure
    different things make the answers differ; else they are converted. 50 % is 0.5, and also 50 if the other side has
    no percent sign; 180 degrees are pi.
  - A label names a quantity: a variable, a function's value, a word, a sum or product of variables such as m + n.
    2x = 42 and x^2 = 42 have none: they are equations.
  - Decimals are exact, with one exception: a decimal of six digits or more may be off by less than 1 in its last
    digit from a number of another form, so 0.333333 is 1/3.
  - Order and repetition count in (1, 2) and [1, 2], but not in {1, 2}. Without brackets order does not count, and
    repetition only between lists of one length: 1, 1, 2 may be 1, 2, but is not 1, 2, 2.
  - a(x + 1) may be a function's value or a product, log of base e or of base 10, 1/2x either; it is read in the way
    that makes the two answers equal, if there is one, on both sides alike.
  - What divides by zero has no value, and is equal to nothing but itself as written.
"""

from __future__ import annotations

from fractions import Fraction
import functools
import itertools
import re
from typing import Any

from kr_jax.answers import kinds
from kr_jax.answers import marks
from kr_jax.answers import notation
from kr_jax.answers import regions
from kr_jax.answers import syntax
from kr_jax.answers import things
from kr_jax.answers import units
from kr_jax.answers import values
from kr_jax.answers.kinds import Based, Either, Group, Matrix, Named, Quantity, Ratio, Relation, Time, Words
from kr_jax.answers.notation import Token, Tokens
from kr_jax.answers.syntax import Node, Reading
from kr_jax.answers.things import quantity, read, read_tokens

# Beyond so many characters an answer is compared as text, in one notation and as it is.
_MOST_CHARACTERS, _MOST_READ = 400, 20_000
# Texts that a process keeps read: the rollouts of a task share its reference, and often an answer.
_KEPT = 4096
# Tokens that are read in one comparison of formulas, once for each way to read them.
_MOST_WORK = 3000


def same(answer: str, reference: str) -> bool:
  """Whether an answer is the reference, by the conventions above; an empty answer is not."""
  text = _written(answer)
  if not text:
    return False
  if text == _written(reference):
    return True
  if len(answer) > _MOST_CHARACTERS or len(reference) > _MOST_CHARACTERS:
    return False
  x, y = read(answer), read(reference)
  return x is not None and y is not None and _equal(x, y)


@functools.lru_cache(_KEPT)
def _written(text: str) -> str:
  """The text in one notation; of a very long one, without the spaces around it."""
  if len(text) > _MOST_READ:
    return marks.trim(text)
  return notation.written(things.strip(notation.tokens(marks.without_dollars(text))))


def _equal(x: Any, y: Any) -> bool:
  if x == y:
    return True
  if isinstance(x, Either) and isinstance(y, Either):  # both are read in the same way
    return any(map(_equal, x.ways, y.ways))
  for one, other in ((x, y), (y, x)):
    if isinstance(one, Either):
      return any(_equal(way, other) for way in one.ways)
  if isinstance(x, Named) or isinstance(y, Named):
    return _equal_named(x, y)
  if isinstance(x, Based) or isinstance(y, Based):
    return _equal_based(x, y)
  if type(x) is type(y) and type(x) in _OF_ONE_KIND and _OF_ONE_KIND[type(x)](x, y):
    return True
  for one, other in ((x, y), (y, x)):
    if isinstance(other, Quantity) and (both := _both_signs(other)):
      return _equal(one, both)
    if isinstance(one, Group) and isinstance(other, Quantity) and one.kind in ('', '{}') and one.items:
      return all(_equal(item, other) for item in one.items)  # a set of one needs no brackets
  if isinstance(x, Group) and isinstance(y, Group) and not {x.kind, y.kind} & {'', '{}'}:
    return False  # two intervals are equal end by end only, were they empty
  if _variable(x) != _variable(y) and _variable(x) and _variable(y):
    return False
  a, b = region(x), region(y)
  return a is not None and b is not None and regions.equal(a, b)


def _variable(x: Any) -> str | None:
  """The variable that a relation, or a list of them, is about; None: there is none, or there are several."""
  if isinstance(x, Group):
    names = {_variable(item) for item in x.items}
  elif isinstance(x, Relation):
    names = set().union(*(syntax.names(node) for side in x.sides if (node := syntax.node(side))))
  else:
    names = {x.label} if isinstance(x, Named) else set()
  return names.pop() if len(names) == 1 else None


def _equal_named(x: Any, y: Any) -> bool:
  if not (isinstance(x, Named) and isinstance(y, Named)):
    named, other = (x, y) if isinstance(x, Named) else (y, x)
    if isinstance(other, Relation) and named.relation:
      return _equal(named.relation, other)
    return _equal(named.thing, other)
  if x.label.lower() == y.label.lower() or x.label.replace(' ', '') == y.label.replace(' ', ''):
    return _equal(x.thing, y.thing)
  return bool(x.relation and y.relation) and _equal_relations(x.relation, y.relation)


def _equal_groups(x: Group, y: Group) -> bool:
  kinds = {x.kind, y.kind}
  if x.joined == y.joined == 'thousands':  # then both are numbers
    return False
  if kinds == {''} and len(x.items) == len(y.items):
    rest = list(y.items)
    for item in x.items:
      if (other := next((z for z in rest if _equal(item, z)), None)) is None:
        return False
      rest.remove(other)
    return True
  if kinds <= {'', '{}'}:
    return (all(any(_equal(a, b) for b in y.items) for a in x.items)
            and all(any(_equal(b, a) for a in x.items) for b in y.items))
  if len(kinds) > 1:
    if kinds != {'', '()'}:
      return False
    # x = 3, y = 4 is (3, 4); and so is 3, 4.
    listed = x if x.kind == '' else y
    labels = [item.label for item in listed.items if isinstance(item, Named)]
    if labels and (len(labels) < len(listed.items) or labels != sorted(set(labels))):
      return False
  return len(x.items) == len(y.items) and all(map(_equal, x.items, y.items))


def _equal_matrices(x: Matrix, y: Matrix) -> bool:
  return [*map(len, x.rows)] == [*map(len, y.rows)] and all(
      _equal(a, b) for row, other in zip(x.rows, y.rows) for a, b in zip(row, other))


def _equal_times(x: Time, y: Time) -> bool:
  return x.parts == y.parts and (x.half == y.half or not x.half or not y.half)


def _equal_ratios(x: Ratio, y: Ratio) -> bool:
  if len(x.parts) != len(y.parts):
    return False
  numbers = [[values.number(part) for part in ratio.parts] for ratio in (x, y)]
  if None in numbers[0] + numbers[1] or not numbers[0][0] or not numbers[1][0]:
    return all(_equal(quantity(a), quantity(b)) for a, b in zip(x.parts, y.parts))
  return all(values.close(a * numbers[1][0], b * numbers[0][0]) for a, b in zip(*numbers))


def _equal_based(x: Any, y: Any) -> bool:
  """A number in a base and the same digits; one side may leave out the base."""
  digits = lambda z: z.digits if isinstance(z, Based) else (
      notation.written(z.tokens) if isinstance(z, Quantity) and z.unit is None else None)
  bases = {z.base for z in (x, y) if isinstance(z, Based)}
  return len(bases) == 1 and digits(x) == digits(y)


def _both_signs(x: Quantity) -> Group | None:
  r"""The list of 1 + a and 1 - a that 1 \pm a stands for; None: there is no such sign."""
  if not any(token.is_command('pm', 'mp') for token in x.tokens):
    return None
  replaced = lambda plus, minus: x._replace(tokens=tuple(
      Token('op', {'pm': plus, 'mp': minus}[t.text]) if t.is_command('pm', 'mp') else t for t in x.tokens))
  return Group('', (replaced('+', '-'), replaced('-', '+')))


def _readings(*all_tokens: Tokens) -> list[Reading]:
  """The ways to read formulas that could differ for them; of long ones not all."""
  calls, logs, tight, euler, far = [True], [0], [False], [False], [True]
  for tokens in all_tokens:
    for before, token in itertools.pairwise(tokens):
      if token.is_op('(') and (before.kind in ('name', 'text', 'word') or before.is_op('}', "'")):
        calls = [True, False]
      if before.text == 'log' and not token.is_op('_'):
        logs = [0, 10]
      if notation.takes_factors(before) and not token.is_op('(', '{'):
        far = [True, False]
      if before.is_op('/'):
        tight = [False, True]
      if before.kind == 'number' and token.kind == 'name' and token.text in 'eE':
        euler = [False, True]
  most = max(4, _MOST_WORK // (1 + sum(map(len, all_tokens))))
  return [Reading(*flags) for flags in itertools.islice(itertools.product(calls, logs, tight, euler, far), most)]


def _equal_quantities(x: Quantity, y: Quantity) -> bool:
  both = _both_signs(x), _both_signs(y)
  if any(both):
    return all(both) and _equal(*both)
  if (x.unit is None) != (y.unit is None):  # 5m is a product, unless it stands beside 5 m
    x, y = _with_letter(x, y), _with_letter(y, x)
  x_unit, y_unit = (z.unit if z.unit != units.NO_UNIT else None for z in (x, y))
  if x_unit and y_unit:
    if x_unit.powers == y_unit.powers:
      return _same_values(x, y, x_unit.size, y_unit.size)
    angles = {units.DEGREE: things.FACTORS[units.DEGREE], units.RADIAN: None}
    return x_unit in angles and y_unit in angles and _same_values(x, y, angles[x_unit], angles[y_unit])
  factors = [things.FACTORS.get(unit) for unit in (x_unit, y_unit)]
  return _same_values(x, y) or factors != [None, None] and _same_values(x, y, *factors)


def _with_letter(x: Quantity, other: Quantity) -> Quantity:
  """A number with the letter at its end as its unit, if the other quantity has this unit."""
  if x.unit is None and len(x.tokens) > 1 and x.tokens[-1].kind == 'name':
    tokens, unit = units.split((*x.tokens[:-1], x.tokens[-1]._replace(spaced=True)))
    if unit is not None and unit.powers == other.unit.powers:
      return Quantity(tokens, unit, x.scale)
  return x


def _same_values(x: Quantity, y: Quantity, x_factor: Any = None, y_factor: Any = None) -> bool:
  """Whether formulas are equal once each is multiplied by its factor."""
  if x_factor is y_factor and x.scale == y.scale and notation.written(x.tokens) == notation.written(y.tokens):
    return True
  for reading in _readings(x.tokens, y.tokens):
    nodes = syntax.node(x.tokens, reading), syntax.node(y.tokens, reading)
    if None in nodes:
      continue
    variables = syntax.names(nodes[0]) | syntax.names(nodes[1])
    far = bool(variables) and any(map(values.is_piecewise, nodes))
    of_x, of_y = ([_times(value, factor, z.scale) for value in values.of(z.tokens, reading, variables, far)]
                  for z, factor in ((x, x_factor), (y, y_factor)))
    if values.same_values(of_x, of_y):
      return True
    if not variables and None not in of_x + of_y and _rounded(x, y, *of_x, *of_y):
      return True
  return False


def _times(value: Any, factor: Any, scale: Fraction) -> Any:
  if value is None or factor is None and scale == 1:
    return value
  return values.times(values.times(value, scale), Fraction(1) if factor is None else factor)


def _rounded(x: Quantity, y: Quantity, x_value: Any, y_value: Any) -> bool:
  """Whether one is a decimal of six digits or more that the other, of another form, may be rounded to."""
  decimals = [re.fullmatch(r'-?(\d*)\.(\d+)', notation.written(z.tokens)) for z in (x, y)]
  if (decimals[0] is None) == (decimals[1] is None):
    return False
  if not (values.is_real(x_value) and values.is_real(y_value)) or x.scale * y.scale != 1:
    return False
  whole, places = (decimals[0] or decimals[1]).groups()
  apart = abs(values.inexact(x_value) - values.inexact(y_value))
  return len((whole + places).lstrip('0')) >= 6 and bool(apart < 0.999999 * values.mp.mpf(10) ** -len(places))


def _equal_relations(x: Relation, y: Relation) -> bool:
  """Whether the solutions are the same because one is a multiple of the other, side by side or turned round."""
  if len(x.sides) != len(y.sides):
    return False
  for sides, signs in ((y.sides, y.signs), (y.sides[::-1], [_TURNED[sign] for sign in y.signs[::-1]])):
    if list(x.signs) == list(signs) and all(map(_equal, map(read_tokens, x.sides), map(read_tokens, sides))):
      return True
  if len(x.sides) != 2:
    return False
  for reading in _readings(*x.sides, *y.sides):
    nodes = [_difference(z, reading) for z in (x, y)]
    if None in nodes:
      continue
    (one, sign), (two, other) = nodes
    variables = syntax.names(one) | syntax.names(two)
    if sign == other and variables:
      far = values.is_piecewise(one) or values.is_piecewise(two)
      try:
        a, b = values.at_points(one, variables, far), values.at_points(two, variables, far)
      except (ArithmeticError, ValueError, RecursionError):
        continue
      if _proportional(a, b, signed=sign not in ('=', 'ne')):
        return True
  return False


_TURNED = {'=': '=', 'ne': 'ne', '<': '>', '>': '<', 'le': 'ge', 'ge': 'le'}


def _difference(x: Relation, reading: Reading) -> tuple[Node, str] | None:
  """The relation as a formula and '<', 'le', '=' or 'ne', by which it relates to 0."""
  left, right = (syntax.node(side, reading) for side in x.sides)
  if left is None or right is None:
    return None
  if x.signs[0] in ('>', 'ge'):
    left, right = right, left
  return ('subtract', left, right), {'>': '<', 'ge': 'le'}.get(x.signs[0], x.signs[0])


def _proportional(x: list[Any], y: list[Any], signed: bool) -> bool:
  """Whether x is a constant times y, the constant positive where the sign counts."""
  both = [(values.inexact(a), values.inexact(b)) for a, b in zip(x, y) if a is not None and b is not None]
  if len(both) < 3 or any(values.mp.isinf(z) for pair in both for z in pair):
    return False
  (a, b), *rest = both
  if all(values.close(a, c) for c, _ in rest):  # f(3) = 7 is no multiple of f(4) = 9
    return all(map(values.close, *zip(*both)))
  if not a or not b or signed and not (values.mp.im(a / b) == 0 and values.mp.re(a / b) > 0):
    return False
  return all(values.close(a * d, b * c) for c, d in rest)


def region(x: Any) -> regions.Region | None:
  """The part of the real line that a thing is; None: it is none."""
  if isinstance(x, Token):
    return regions.LINE if x.text == 'reals' else None
  if isinstance(x, Named):
    return region(x.thing) if x.relation is None else region(x.relation)
  if isinstance(x, kinds.Region):
    parts, without = [region(part) for part in x.parts], [region(part) for part in x.without]
    if None in parts or None in without:
      return None
    return regions.minus(regions.union(*parts), regions.union(*without))
  if isinstance(x, kinds.Common):
    parts = [region(part) for part in x.parts]
    return None if None in parts else regions.intersection(*parts)
  if isinstance(x, Relation):
    return _solution(x)
  if isinstance(x, Either):
    return None
  if isinstance(x, Group):
    if x.kind in ('()', '[]', '(]', '[)'):
      ends, closed = [_real(item) for item in x.items], (x.kind[0] == '[', x.kind[1] == ']')
      if len(ends) != 2 or None in ends or any(map(regions.is_infinite, itertools.compress(ends, closed))):
        return None
      return regions.interval(*ends, *closed)
    if x.kind == '' and x.items and all(isinstance(item, (Relation, Named)) for item in x.items):
      parts = [region(item) for item in x.items]
      if None in parts or x.joined == ',' or _variable(x) is None:
        return None
      # x = 1 and x = 2 is a list of solutions, not one that nothing solves.
      return regions.union(*parts) if x.joined == 'or' else regions.intersection(*parts) or None
    if x.kind == '{}':
      points = [_real(item) for item in x.items]
      return None if None in points else regions.union(*(regions.interval(p, p, True, True) for p in points))
  return None


def _real(x: Any) -> Any:
  """The value of a quantity that is a real number, or infinite; None: it is none."""
  found = values.number(x.tokens) if isinstance(x, Quantity) and x.scale == 1 else None
  return None if found is None or not values.is_real(found) else found


_OF_ONE_KIND = {Quantity: _equal_quantities, Relation: _equal_relations, Group: _equal_groups, Matrix: _equal_matrices,
                Time: _equal_times, Ratio: _equal_ratios}


def _solution(x: Relation) -> regions.Region | None:
  """The solution of inequalities in one variable that are linear, or linear once absolute values are resolved."""
  nodes = [syntax.node(side) for side in x.sides]
  if None in nodes or len(frozenset().union(*map(syntax.names, nodes))) != 1:
    return None
  parts = [_half_lines(left, right, sign) for left, right, sign in zip(nodes, nodes[1:], x.signs)]
  return None if None in parts else regions.intersection(*parts)


def _half_lines(left: Node, right: Node, sign: str) -> regions.Region | None:
  if right[:2] == ('apply', 'abs'):
    left, right, sign = right, left, _TURNED[sign]
  if left[:2] == ('apply', 'abs'):  # |u| < a: u < a and -u < a
    inner = left[2]
    both = _half_lines(inner, right, sign), _half_lines(('subtract', ('number', Fraction(0)), inner), right, sign)
    join = regions.intersection if sign in ('<', 'le', 'ne') else regions.union
    return None if None in both else join(*both)
  name = next(iter(syntax.names(left) | syntax.names(right)), '')
  try:
    at = [values.value(('subtract', left, right), {name: place}) for place in _PLACES]
  except (ArithmeticError, KeyError):
    return None
  return regions.linear(_PLACES, at, sign)


# Where a function is tried for being linear: such as is linear at all of them by chance is not written.
_PLACES = (*map(Fraction, (0, 1)), Fraction(-1009, 7), Fraction(7, 3), Fraction(100_003, 11))


# Votes.


def canonical(answer: str) -> str | None:
  """A text that stands for an answer, and is the same answer by `same`; None for an empty one.

  Rational numbers, lists and tuples of them, and words have one text, whatever their form; other answers have the text
  that they come with, so that `same` must join them.
  """
  found = read(answer) if len(answer) <= _MOST_CHARACTERS else None
  lines = marks.trim(answer).splitlines()
  return _canonical(found) or '\n'.join(' '.join(line.split()) for line in lines if line.strip()) or None


def _canonical(x: Any) -> str | None:
  if isinstance(x, Either):
    return _canonical(x.ways[0])
  if isinstance(x, Named):
    return _canonical(x.thing)
  if isinstance(x, Words):
    return x.text
  if isinstance(x, Quantity):
    value = values.number(x.tokens)
    is_short = isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) < 1000
    return str(value * x.scale) if is_short and x.unit in (None, units.NO_UNIT) and not _both_signs(x) else None
  if isinstance(x, Group):
    items = [*map(_canonical, x.items)]
    is_named = any(isinstance(item, Named) for item in x.items)  # by several names, which the text must keep
    if None in items or not items or is_named and _variable(x) is None:
      return None
    if x.kind in ('', '{}'):
      different = sorted(set(items))
      if x.kind == '' and 1 < len(different) < len(items):  # where repetition counts
        return ', '.join(sorted(items))
      return different[0] if len(different) == 1 else f'\\{{{", ".join(different)}\\}}'
    return f'{x.kind[0]}{", ".join(items)}{x.kind[1]}'
  return None
