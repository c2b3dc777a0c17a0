r"""What an answer says: tokens -> words, a list, a set, an equation, a time, a quantity with its unit, ..."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
import functools
import re
from typing import Any

from kr_jax.answers import marks
from kr_jax.answers import notation
from kr_jax.answers import syntax
from kr_jax.answers import units
from kr_jax.answers import values
from kr_jax.answers.kinds import Based, Common, Either, Group, Matrix, Named, Quantity, Ratio, Region, Relation, Time
from kr_jax.answers.kinds import Words
from kr_jax.answers.notation import Token, Tokens
from kr_jax.answers.syntax import Node

# Texts that a process keeps read: the rollouts of a task share its reference, and often an answer.
_KEPT = 4096


@functools.lru_cache(_KEPT)
def read(text: str) -> Any:
  """What a text says; None: nothing."""
  tokens = notation.tokens(marks.without_dollars(text))
  return read_tokens(tokens)


_EDGES = ('.', ',', ';', ':', '\\\\', '"', '`', '*', "'")
_ABOUT = ('approximately', 'approx', 'about', 'roughly', 'nearly', 'around', 'rounded')
_ENDS = ('checkmark', 'qed', 'blacksquare', 'square', 'therefore')


def strip(tokens: Tokens) -> Tokens:
  """The tokens without what stands around an answer and says nothing."""
  while True:
    before = tokens
    while tokens and (tokens[-1].is_op(*_EDGES[:-1]) or tokens[-1].is_command(*_ENDS)):
      tokens = tokens[:-1]
    if tokens and tokens[-1].kind == 'number' and tokens[-1].text.endswith('.'):
      tokens = (*tokens[:-1], tokens[-1]._replace(text=tokens[-1].text[:-1]))
    if len(tokens) > 1 and tokens[-1].is_command('ldots') and tokens[-2].kind == 'number':  # 3.14...
      tokens = tokens[:-1]
    while tokens and (tokens[0].is_op(*_EDGES, '=') or tokens[0].is_command('approx', 'therefore', 'implies', 'sim')):
      tokens = tokens[1:]
    if tokens and tokens[0].kind in ('word', 'text') and tokens[0].text.lower() in _ABOUT and len(tokens) > 1:
      tokens = tokens[1:]
    last = [x.text.lower() for x in tokens[-3:]]
    if len(tokens) > 3 and last[0] == '(' and last[1] in _ABOUT and last[2] == ')':
      tokens = tokens[:-3]
    elif len(tokens) > 1 and last[-1] in _ABOUT:
      tokens = tokens[:-1]
    clause = notation.split(tokens, lambda x: x.kind in ('word', 'text') and x.text in ('which', 'where'))
    tokens = clause[0] or tokens
    if len(tokens) > 1 and tokens[0].is_op('{') and _closing(tokens) == len(tokens) - 1:
      tokens = tokens[1:-1]
    if tokens == before:
      return tokens


def _closing(tokens: Tokens) -> int:
  """Where the bracket closes that the tokens begin with; -1: nowhere, or there is none."""
  level = 0
  for i, token in enumerate(tokens):
    level += notation.depth(token)
    if level <= 0:
      return i if level == 0 and i else -1
  return -1


def read_tokens(tokens: Tokens) -> Any:
  """What tokens say; None: nothing."""
  tokens = strip(tokens)
  if not tokens:
    return None
  for kind in (_words, _joined, _thousands, _listed, _region, _relation, _enclosed, _time, _ratio, _based, _matrix):
    if (found := kind(tokens)) is not None:
      return found
  return quantity(tokens)


_REALS = ('all real numbers', 'all reals', 'real numbers', 'all real', 'the set of all real numbers', 'all real values',
          'the real numbers', 'reals', 'set of all real numbers', 'any real number', 'the set of real numbers')
_NOTHING = ('empty set', 'the empty set', 'no solution', 'no solutions', 'no real solution', 'no real solutions',
            'null set', 'there is no solution', 'there are no solutions', 'no such solution')


def _words(tokens: Tokens) -> Any:
  if not all(x.kind in ('word', 'text', 'name') or x.is_op("'", '-', '.') for x in tokens) or not any(
      x.kind in ('word', 'text') and len(x.text) > 1 for x in tokens):
    return None
  if tokens[0].kind == 'op':  # a sign
    return None
  text = ' '.join(x.text for x in tokens if not x.is_op('.', '-')).lower()
  if text in _REALS:
    return Region((Token('command', 'reals'),))
  if text in _NOTHING:
    return Group('{}', ())
  if (number := units.number_in_words(text)) is not None:
    return Quantity((Token('number', str(number[0])),), scale=number[1])
  is_short = len(text) <= 4 and text.isalpha() and not tokens[0].text.isupper()  # xy may be a product, AB is a name
  if len(tokens) == 1 and tokens[0].kind == 'word' and (is_short or text == 'infinity'):
    return Either((Words(text), Quantity(tokens)))
  if any(x.kind == 'name' for x in tokens) and not any(len(x.text) > 3 for x in tokens):
    return None  # formulas such as x exp y
  if {'and', 'or'} & set(text.split()) and all(x.kind == 'name' or x.text in ('and', 'or') for x in tokens):
    return None  # A and B are a list
  return Words(text)


def _is_word(token: Token, *words: str) -> bool:
  return token.kind in ('word', 'text') and token.text.lower() in words


def _joined(tokens: Tokens) -> Any:
  """A list with 'and', 'or' or ';' in it."""
  if len(tokens) == 5 and _is_word(tokens[1], 'and') and tokens[3].is_op('/'):  # 3 and 1/2
    mixed = (tokens[0], *(x._replace(spaced=True) for x in tokens[2:]))
    return Either((Quantity(mixed), Group('', (read_tokens(tokens[:1]), read_tokens(tokens[2:])))))
  parts = notation.split(tokens, lambda x: _is_word(x, 'and', 'or') or x.is_op(';') or x.is_command('land', 'lor'))
  parts = [part for part in parts if strip(part)]
  if len(parts) < 2:
    return None
  joined = {x.text.lower() for x in tokens if _is_word(x, 'and', 'or')} | {
      'or' for x in tokens if x.is_command('lor')} | {'and' for x in tokens if x.is_command('land')}
  items = []
  for part in parts:
    found = read_tokens(part)
    flat = isinstance(found, Group) and found.kind == ''
    items += found.items if flat else [found]
    if flat:
      joined.add(',')
  listed = Group('', tuple(items), joined.pop() if len(joined) == 1 else ',')
  return Either((whole, listed)) if (whole := _parts_with_units(tokens)) else listed


def _thousands(tokens: Tokens) -> Any:
  """A number whose digits are in groups of three; with commas it may also be a list."""
  for mark in (',', ''):
    groups = []
    sign = bool(tokens and tokens[0].is_op('-', '+'))
    start = sign + bool(tokens[sign:] and tokens[sign].is_op(*units.CURRENCIES))
    i = start
    while i < len(tokens) and tokens[i].kind == 'number' and (
        not groups and re.fullmatch(r'[1-9]\d{0,2}', tokens[i].text)
        or groups and re.fullmatch(r'\d{3}(?:\.\d*)?', tokens[i].text)) and (mark or not groups or tokens[i].spaced):
      groups.append(tokens[i].text)
      i += 1
      if mark and i < len(tokens) and tokens[i].is_op(mark) and i + 1 < len(tokens) and not tokens[i + 1].spaced:
        i += 1
      elif mark:
        break
    rest = tokens[i:]
    if len(groups) > 1 and not (tokens[i - 1].is_op(',')) and not any('.' in x for x in groups[:-1]):
      number = Token('number', ''.join(groups), tokens[start].spaced)
      found = quantity((*tokens[:start], number, *rest))
      if not rest and mark and not start and not any(x[0] == '0' for x in groups):  # 40,000 is no list
        return Either((found, Group('', tuple(quantity((x,)) for x in tokens if x.kind == 'number'), 'thousands')))
      if not any(x.is_op(',') for x in rest):
        return found
  return None


def _listed(tokens: Tokens) -> Any:
  parts = [part for part in notation.split(tokens, lambda x: x.is_op(',')) if strip(part)]
  return Group('', tuple(map(read_tokens, parts))) if len(parts) > 1 else None


def _with_unions(tokens: Tokens) -> Tokens:
  """The tokens, a letter U between brackets as the sign of a union."""
  return tuple(
      Token('command', 'cup') if x.kind == 'name' and x.text == 'U' and 0 < i < len(tokens) - 1
      and notation.depth(tokens[i - 1]) < 0 < notation.depth(tokens[i + 1]) else x for i, x in enumerate(tokens))


def _region(tokens: Tokens) -> Any:
  parts = notation.split(_with_unions(tokens), lambda x: x.is_command('cup'))
  if len(parts) > 1 and all(map(strip, parts)):
    label = _label_and_rest(parts[0])
    found = Region(tuple(map(read_tokens, (label[1] if label else parts[0], *parts[1:]))))
    return Named(label[0], found, None) if label else found
  parts = notation.split(tokens, lambda x: x.is_command('cap'))
  if len(parts) > 1 and all(map(strip, parts)):
    return Common(tuple(map(read_tokens, parts)))
  parts = notation.split(tokens, lambda x: x.is_command('setminus'))
  if len(parts) == 2 and all(parts):
    label = _label_and_rest(parts[0])
    return Region((read_tokens(label[1] if label else parts[0]),), (read_tokens(parts[1]),))
  if len(tokens) == 1 and tokens[0].is_command(*notation.NUMBER_SETS.values()):
    return Region((tokens[0],))
  if len(tokens) == 1 and tokens[0].is_command('emptyset'):
    return Group('{}', ())
  return None


_SIGNS = {'=': '=', '<': '<', '>': '>', 'le': 'le', 'ge': 'ge', 'ne': 'ne', 'in': 'in', 'approx': '='}


def _sign(token: Token) -> str | None:
  return _SIGNS.get(token.text) if token.kind in ('op', 'command') else None


def _relation(tokens: Tokens) -> Any:
  sides = notation.split(tokens, lambda x: _sign(x) is not None)
  if len(sides) < 2 or not all(sides):
    return None
  level, signs = 0, []
  for token in tokens:
    level += notation.depth(token)
    if level == 0 and _sign(token):
      signs.append(_sign(token))
  relation = Relation(tuple(sides), tuple(signs))
  if signs == ['in']:
    return Named(_label(sides[0]) or notation.written(sides[0]), read_tokens(sides[1]), None)
  if 'in' in signs:
    return None
  if set(signs) == {'='}:
    label = None if _is_recursive(sides) else _label(sides[0])
    if label and (thing := _chain(sides[1:])) is not None:
      return Named(label, thing, relation if len(sides) == 2 else None)
    if len(sides) == 2 and (label := _label(sides[1])) and _value(sides[0]):  # 12 = x
      return Named(label, read_tokens(sides[0]), relation)
    if all(_value(side) for side in sides) and (thing := _chain(sides)) is not None:
      return thing
  return relation


def _is_recursive(sides: Sequence[Tokens]) -> bool:
  """Whether the first side is a variable that occurs in others: y = 1 - xy, or y = x y = 2 for two equations."""
  name, *nodes = map(syntax.node, sides)
  return name is not None and name[0] == 'name' and any(name[1] in syntax.names(node) for node in nodes if node)


def _chain(sides: Sequence[Tokens]) -> Any:
  """What equal sides say: the last, or the first number where later ones are rounded; None: they differ."""
  numbers = [(side, found) for side in sides if (found := _value(side))]
  if not all(_agree(numbers[0][1], other) for _, other in numbers[1:]):
    return None
  if not numbers or len(sides) == 1:
    return read_tokens(sides[-1])
  return Either((read_tokens(sides[-1]), read_tokens(numbers[0][0]))) if numbers[-1][0] is sides[-1] else None


def _value(tokens: Tokens) -> tuple[values.Number, values.Number, units.Unit] | None:
  """The value of a side that is a real number, by how much it may be rounded, and its unit; None: it is none."""
  tokens = strip(tokens)
  found = words if isinstance(words := _words(tokens), Quantity) else quantity(tokens)
  value = values.number(found.tokens)
  if value is None or not values.is_real(value):
    return None
  decimal = re.fullmatch(r'-?\d*\.(\d+)', notation.written(found.tokens))
  rounded = values.mp.mpf('0.51') / 10 ** len(decimal[1]) if decimal else values.mp.zero
  scale = values.inexact(found.scale)
  return values.inexact(value) * scale, rounded * scale, found.unit or units.NO_UNIT


def _agree(one: tuple, another: tuple) -> bool:
  """Whether what `_value` says of two sides is the same, but for rounding; one may leave out its unit."""
  (x, rounded, unit), (y, others, other) = one, another
  if unit.powers == other.powers:
    sizes = [(unit.size, other.size)]
  elif unit.powers and other.powers:
    return False
  else:
    sizes = [(Fraction(1), Fraction(1)), (FACTORS.get(unit, Fraction(1)), FACTORS.get(other, Fraction(1)))]
  return any(values.close(x * a, y * b) or abs(x * a - y * b) <= max(rounded * a, others * b)
             for a, b in (map(values.inexact, pair) for pair in sizes))


def _label_and_rest(tokens: Tokens) -> tuple[str, Tokens] | None:
  sides = notation.split(tokens, lambda x: _sign(x) in ('=', 'in'))
  if len(sides) == 2 and all(sides) and (label := _label(sides[0])):
    return label, sides[1]
  return None


def _label(tokens: Tokens) -> str | None:
  """The label that stands before '='; None: it is a side of an equation."""
  tokens = strip(tokens)
  if not tokens:
    return None
  text = notation.written(tokens)
  if all(x.kind in ('word', 'text') or x.is_op("'", '-', '.') for x in tokens):
    return text.lower() if units.number_in_words(text) is None else None
  if re.fullmatch(r"\|?[A-Z]{2,4}'?\|?", text):  # a segment, an angle's points
    return text
  opens = next((i for i, x in enumerate(tokens) if x.is_op('(', '[')), 0)
  if opens and _closing(tokens[opens:]) == len(tokens) - opens - 1 and tokens[0].kind != 'number' and all(
      x.kind in ('name', 'word', 'text', 'number') or x.is_op('_', "'", '{', '}') for x in tokens[:opens]):
    return text
  if tokens[0].is_op('(') and _closing(tokens) == len(tokens) - 1:
    names = notation.split(tokens[1:-1], lambda x: x.is_op(','))
    return text if len(names) > 1 and all(len(x) == 1 and x[0].kind == 'name' for x in names) else None
  node = syntax.node(tokens)
  if node is None:
    return None
  if node[0] == 'name':
    return text if node[1] not in ('pi', 'e', 'i') else None
  leaves = _leaves(node)  # with a derivative among them it is a differential equation
  return text if leaves and len(leaves) == len(set(leaves)) > 1 and "'" not in text else None


def _leaves(node: Node) -> list[str] | None:
  """The variables of sums, products and quotients of variables alone; None for another formula."""
  if node[0] == 'name':
    return [node[1]]
  if node[0] not in ('add', 'subtract', 'multiply', 'divide'):
    return None
  parts = [_leaves(x) for x in node[1:]]
  return None if None in parts else sum(parts, [])


def _enclosed(tokens: Tokens) -> Any:
  """A set, a tuple or an interval."""
  opening, last = tokens[0], tokens[-1]
  if not (opening.is_op('(', '[', ']', '\\{') or opening.is_command('langle')) or len(tokens) < 2:
    return None
  if opening.is_op(']') or last.is_op('[') or _closing(tokens) != len(tokens) - 1:
    return _reversed_interval(tokens)
  inner = tokens[1:-1]
  bracket = lambda x: {'langle': '(', 'rangle': ')', '\\{': '{', '\\}': '}'}.get(x.text, x.text)
  kind = bracket(opening) + bracket(last)
  if kind == '{}':
    builder = notation.split(inner, lambda x: x.is_op('|', ':'))
    if len(builder) == 2 and all(builder):
      return _built(*builder)
  parts = notation.split(inner, lambda x: x.is_op(',', ';'))
  if kind == '{}':
    return Group(kind, tuple(read_tokens(x) for x in parts if strip(x)))
  if len(parts) > 1:
    return Group(kind, tuple(map(read_tokens, parts)))
  if kind == '()' and len(inner) == 1 and inner[0].text.isupper() and len(inner[0].text) == 1:  # a choice
    return Quantity((inner[0]._replace(kind='name'),))
  return None


def _built(element: Tokens, condition: Tokens) -> Any:
  """The set {x in A | condition}."""
  sides = notation.split(element, lambda x: x.is_command('in'))
  if len(sides) > 2 or not _label(sides[0]):
    return None
  return read_tokens(condition)


def _reversed_interval(tokens: Tokens) -> Any:
  """]1, 2[ is (1, 2)."""
  left, right = tokens[0].text, tokens[-1].text
  if left not in '[](' or right not in '[])' or not (left == ']' or right == '['):
    return None
  parts = notation.split(tokens[1:-1], lambda x: x.is_op(',', ';'))
  if len(parts) != 2:
    return None
  return Group(('(' if left == ']' else left) + (')' if right == '[' else right), tuple(map(read_tokens, parts)))


def _time(tokens: Tokens) -> Any:
  half = ''.join(x.text for x in tokens if x.kind in ('word', 'text', 'name')).lower()
  clock = ''.join(x.text for x in tokens if x.kind not in ('word', 'text', 'name') and not x.is_op('.'))
  found = re.fullmatch(r'(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?', clock)
  if not found or half not in ('', 'am', 'pm') or not (half or found[2]):
    return None
  return Time(tuple(int(x or 0) for x in found.groups()), half)


def _ratio(tokens: Tokens) -> Any:
  parts = notation.split(tokens, lambda x: x.is_op(':'))
  return Ratio(tuple(parts)) if len(parts) > 1 and all(parts) else None


def _based(tokens: Tokens) -> Any:
  found = re.fullmatch(r'(-?[\dA-F]+)_\{?(\w+)\}?', notation.written(tokens).replace(' ', ''))
  base = found and str(units.NUMBER_WORDS.get(found[2].lower(), found[2]))
  return Based(found[1], base) if found and base.isdigit() and tokens[0].kind != 'name' else None


def _matrix(tokens: Tokens) -> Any:
  while len(tokens) > 2 and tokens[0].is_op('(', '[') and _closing(tokens) == len(tokens) - 1:
    tokens = tokens[1:-1]
  begin = next((i for i, x in enumerate(tokens) if x.kind == 'begin'), 0)
  factor = _strip_times(tokens[:begin]) if begin and _closing(tokens[begin:]) == len(tokens) - begin - 1 else ()
  if factor and syntax.node(factor):
    tokens = tokens[begin:]
  if tokens[0].kind != 'begin' or 'matrix' not in tokens[0].text and tokens[0].text != 'array':
    return None
  if tokens[0].text in ('vmatrix', 'Vmatrix') or _closing(tokens) != len(tokens) - 1:
    return None
  inner = tokens[1:-1]
  if tokens[0].text == 'array' and inner and inner[0].is_op('{'):
    inner = inner[_closing(inner) + 1:]
  rows = [row for row in notation.split(inner, lambda x: x.is_op('\\\\')) if row]
  times = lambda cell: (Token('op', '{'), *factor, Token('op', '}'), Token('op', '('), *cell, Token('op', ')'))
  cells = [notation.split(row, lambda x: x.is_op('&')) for row in rows]
  return Matrix(tuple(tuple(read_tokens(times(cell) if factor else cell) for cell in row) for row in cells))


def _strip_times(tokens: Tokens) -> Tokens:
  return tokens[:-1] if tokens and (tokens[-1].is_op('*') or tokens[-1].is_command('cdot', 'times')) else tokens


# What a number is multiplied by for what its unit says.
FACTORS = {units.PERCENT: Fraction(1, 100), units.DEGREE: values.mp.pi() / 180}
_CURRENCIES = frozenset(units.CURRENCIES.values())


def quantity(tokens: Tokens) -> Quantity:
  """A formula and its unit; what a number counts is left out: 12 apples are 12."""
  currency = None
  if len(tokens) > 1 and tokens[0].kind in ('word', 'text') and (unit := units.named(tokens[0].text)) in _CURRENCIES:
    currency, tokens = unit, tokens[1 + tokens[1].is_op('.'):]
  for i in (0, 1):
    if len(tokens) > i + 1 and tokens[i].is_op(*units.CURRENCIES) and (i == 0 or tokens[0].is_op('-', '+')):
      currency = units.CURRENCIES[tokens[i].text]
      tokens = tokens[:i] + tokens[i + 1:]
  if not currency and (parts := _parts_with_units(tokens)):
    return parts
  tokens, unit = units.split(tokens)
  if unit is None:
    tokens = units.without_count(tokens)
    tokens, unit = units.split(tokens)
  scale = Fraction(1)
  while len(tokens) > 1 and tokens[-1].kind in ('word', 'text') and (factor := units.scale(tokens[-1].text)):
    scale, tokens = scale * factor, tokens[:-1]
  return Quantity(strip(tokens), currency if currency is not None and unit in (None, units.NO_UNIT) else unit, scale)


def _parts_with_units(tokens: Tokens) -> Quantity | None:
  """The sum of 1 h 30 min; None: the tokens are no numbers with units that measure the same, in descending order."""
  starts = [i for i, x in enumerate(tokens) if x.kind == 'number' and (not i or tokens[i - 1].kind in ('text', 'word'))]
  if len(starts) < 2 or starts[0]:
    return None
  parts = [tokens[i:end] for i, end in zip(starts, (*starts[1:], len(tokens)))]
  found = [units.split(part[:-1] if _is_word(part[-1], 'and') else part) for part in parts]
  if not all(unit and unit.powers and len(number) == 1 for number, unit in found):
    return None
  sizes = [unit.size for _, unit in found]
  if len({unit.powers for _, unit in found}) > 1 or sizes != sorted(set(sizes), reverse=True):
    return None
  total = sum(Fraction(number[0].text) * size for (number, _), size in zip(found, sizes))
  return Quantity((Token('number', '1'),), found[0][1], total / sizes[0])
