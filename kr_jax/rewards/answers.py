r"""Whether two mathematical answers are the same.

An answer is read as one of a few kinds of thing: words, a list, a set, a tuple or interval, a region of the line, an
equation or inequality, a time, a ratio, a matrix, or a quantity, which is a formula with or without a unit. Things
are compared by kind, formulas by their values (formula.py). Where notation is loose, equality is a convention:

  - One side may leave out a unit, a currency, a percent sign or a label 'x =' or 'P(A) ='. Units that measure
    different things make the answers differ; else they are converted. 50 % is 0.5, and also 50 if the other side has
    no percent sign; 180 degrees are pi.
  - A label names a quantity: a variable, a function's value, a word, a sum or product of variables such as m + n.
    2x = 42 and x^2 = 42 have none: they are equations.
  - Decimals are exact, with one exception: a decimal of six digits or more may be off by 1 in its last digit from
    a number of another form, so 0.333333 is 1/3.
  - Order and repetition count in (1, 2) and [1, 2], but not in {1, 2} or in 1, 2 without brackets.
  - a(x + 1) may be a function's value or a product, log of base e or of base 10, 1/2x either; it is read in the way
    that makes the two answers equal, if there is one, on both sides alike.
  - What divides by zero has no value, and is equal to nothing but itself as written.
"""

from __future__ import annotations

from fractions import Fraction
import functools
import itertools
import re
from typing import Any, NamedTuple

from kr_jax.rewards import formula
from kr_jax.rewards import marks
from kr_jax.rewards import notation
from kr_jax.rewards import regions
from kr_jax.rewards import units
from kr_jax.rewards.formula import Node, Reading
from kr_jax.rewards.notation import Token, Tokens

# Beyond so many characters an answer is compared as text, in one notation and as it is.
_MOST_CHARACTERS, _MOST_READ = 400, 20_000
# Texts that a process keeps read: the rollouts of a task share its reference, and often an answer.
_KEPT = 4096


class Words(NamedTuple):
  text: str


class Quantity(NamedTuple):
  """A formula with a unit; scale: what a word such as million multiplies it by."""

  tokens: Tokens
  unit: units.Unit | None = None
  scale: int = 1


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


# Reading.


@functools.lru_cache(_KEPT)
def read(text: str) -> Any:
  """What a text says; None: nothing."""
  tokens = notation.tokens(_without_dollars(text))
  return _read(tokens)


def _without_dollars(text: str) -> str:
  """The text without the signs that enclose formulas; one that is left over is a currency."""
  text = (marks.box(text) if '\\boxed' in text else None) or text  # some references mark their answer
  if '\\begin' not in text:  # and some escape each backslash twice
    text = re.sub(r'\\\\(?=[a-zA-Z])', r'\\', text)
  text = text.replace('\\$', '\ue000')
  if text.count('$') % 2:
    text = re.sub(r'\$(?=\s*[\d.])', '\ue000', text, count=1)
  return text.replace('$', ' ').replace('\ue000', '\\$')


_EDGES = ('.', ',', ';', ':', '\\\\', '"', '`', '*', "'")
_ABOUT = ('approximately', 'approx', 'about', 'roughly', 'nearly', 'around')
_ENDS = ('checkmark', 'qed', 'blacksquare', 'square', 'therefore')


def _strip(tokens: Tokens) -> Tokens:
  """The tokens without what stands around an answer and says nothing."""
  while True:
    before = tokens
    while tokens and (tokens[-1].is_op(*_EDGES[:-1]) or tokens[-1].is_command(*_ENDS)):
      tokens = tokens[:-1]
    if tokens and tokens[-1].kind == 'number' and tokens[-1].text.endswith('.'):
      tokens = (*tokens[:-1], tokens[-1]._replace(text=tokens[-1].text[:-1]))
    while tokens and (tokens[0].is_op(*_EDGES, '=') or tokens[0].is_command('approx', 'therefore', 'implies', 'sim')):
      tokens = tokens[1:]
    if tokens and tokens[0].kind in ('word', 'text') and tokens[0].text.lower() in _ABOUT and len(tokens) > 1:
      tokens = tokens[1:]
    last = [x.text.lower() for x in tokens[-3:]]
    if len(tokens) > 3 and last[0] == '(' and last[1] in _ABOUT and last[2] == ')':
      tokens = tokens[:-3]
    elif len(tokens) > 1 and last[-1] in _ABOUT:
      tokens = tokens[:-1]
    which = next((i for i, x in enumerate(tokens) if x.kind in ('word', 'text') and x.text in ('which', 'where')), 0)
    tokens = tokens[:which] or tokens
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


def _read(tokens: Tokens) -> Any:
  tokens = _strip(tokens)
  if not tokens:
    return None
  for kind in (_words, _joined, _thousands, _listed, _region, _relation, _enclosed, _time, _ratio, _based, _matrix):
    if (found := kind(tokens)) is not None:
      return found
  return _quantity(tokens)


_NUMBER_WORDS = {word: n for n, word in enumerate(
    'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen '
    'eighteen nineteen twenty'.split())} | {'thirty': 30, 'forty': 40, 'fifty': 50, 'sixty': 60, 'seventy': 70,
                                            'eighty': 80, 'ninety': 90}
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
  if text in _NUMBER_WORDS:
    return Quantity((Token('number', str(_NUMBER_WORDS[text])),))
  plain = len(tokens) == 1 and tokens[0].kind == 'word'
  if plain and (text in ('pi', 'infinity', 'inf', 'oo') or len(text) <= 4 and text.isalpha() and not tokens[0].text.isupper()):
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
    return Either((Quantity(mixed), Group('', (_read(tokens[:1]), _read(tokens[2:])))))
  parts = notation.split(tokens, lambda x: _is_word(x, 'and', 'or') or x.is_op(';') or x.is_command('land', 'lor'))
  parts = [part for part in parts if _strip(part)]
  if len(parts) < 2:
    return None
  joined = {x.text.lower() for x in tokens if _is_word(x, 'and', 'or')} | {
      'or' for x in tokens if x.is_command('lor')} | {'and' for x in tokens if x.is_command('land')}
  items = []
  for part in parts:
    found = _read(part)
    flat = isinstance(found, Group) and found.kind == ''
    items += found.items if flat else [found]
    if flat:
      joined.add(',')
  return Group('', tuple(items), joined.pop() if len(joined) == 1 else ',')


def _thousands(tokens: Tokens) -> Any:
  """A number whose digits are in groups of three; with commas it may also be a list."""
  for mark in (',', ''):
    groups, rest, start = [], tokens, 0
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
      found = _quantity((*tokens[:start], number, *rest))
      if not rest and mark and not start:
        return Either((found, Group('', tuple(_quantity((x,)) for x in tokens if x.kind == 'number'), 'thousands')))
      if not rest or all(x.kind != 'op' or not x.is_op(',') for x in rest):
        return found
  return None


def _listed(tokens: Tokens) -> Any:
  parts = [part for part in notation.split(tokens, lambda x: x.is_op(',')) if _strip(part)]
  return Group('', tuple(map(_read, parts))) if len(parts) > 1 else None


def _region(tokens: Tokens) -> Any:
  union = lambda x: x.is_command('cup') or x.kind == 'name' and x.text == 'U'
  parts = notation.split(tokens, union)
  if len(parts) > 1 and all(map(_strip, parts)):
    label = _label_and_rest(parts[0])
    found = Region(tuple(map(_read, (label[1] if label else parts[0], *parts[1:]))))
    return Named(label[0], found, None) if label else found
  parts = notation.split(tokens, lambda x: x.is_command('setminus'))
  if len(parts) == 2 and all(parts):
    label = _label_and_rest(parts[0])
    return Region((_read(label[1] if label else parts[0]),), (_read(parts[1]),))
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
    return Named(_label(sides[0]) or notation.written(sides[0]), _read(sides[1]), None)
  if 'in' in signs:
    return None
  if set(signs) == {'='}:
    if not _agree(sides[1:] if _label(sides[0]) else sides):
      return relation
    if label := _label(sides[0]):
      return Named(label, _read(sides[-1]), relation if len(sides) == 2 else None)
    if len(sides) > 1 and all(_is_number(side) for side in sides):
      return _read(sides[-1])
  return relation


def _agree(sides: Any) -> bool:
  """Whether those sides of a chain that are numbers are equal."""
  numbers = [_quantity(side) for side in sides if _is_number(side)]
  return all(_equal(x, y) for x, y in itertools.pairwise(numbers))


def _is_number(tokens: Tokens) -> bool:
  quantity = _quantity(_strip(tokens))
  if not isinstance(quantity, Quantity):
    return False
  node = _node(quantity.tokens, Reading())
  return node is not None and not formula.names(node)


def _label_and_rest(tokens: Tokens) -> tuple[str, Tokens] | None:
  sides = notation.split(tokens, lambda x: _sign(x) in ('=', 'in'))
  if len(sides) == 2 and all(sides) and (label := _label(sides[0])):
    return label, sides[1]
  return None


def _label(tokens: Tokens) -> str | None:
  """The label that stands before '='; None: it is a side of an equation."""
  tokens = _strip(tokens)
  if not tokens:
    return None
  text = notation.written(tokens)
  if all(x.kind in ('word', 'text') or x.is_op("'", '-', '.') for x in tokens):
    return text.lower()
  if re.fullmatch(r"\|?[A-Z]{2,4}'?\|?", text):  # a segment, an angle's points
    return text
  closes = next((i for i, x in enumerate(tokens) if x.is_op('(', '[')), 0)
  if closes and _closing(tokens[closes:]) == len(tokens) - closes - 1 and all(
      x.kind in ('name', 'word', 'text') or x.is_op('_', "'", '{', '}') or x.kind == 'number' and i for i, x in enumerate(tokens[:closes])):
    return text
  if tokens[0].is_op('(') and _closing(tokens) == len(tokens) - 1:
    names = notation.split(tokens[1:-1], lambda x: x.is_op(','))
    return text if len(names) > 1 and all(len(x) == 1 and x[0].kind == 'name' for x in names) else None
  node = _node(tokens, Reading())
  if node is None:
    return None
  if node[0] == 'name':
    return text if node[1] not in ('pi', 'e', 'i') else None
  leaves = _leaves(node)
  return text if leaves and len(leaves) == len(set(leaves)) > 1 else None


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
    return Group(kind, tuple(_read(x) for x in parts if _strip(x)))
  if len(parts) > 1:
    return Group(kind, tuple(map(_read, parts)))
  if kind == '()' and len(inner) == 1 and inner[0].text.isupper() and len(inner[0].text) == 1:  # a choice
    return Quantity((inner[0]._replace(kind='name'),))
  return None


def _built(element: Tokens, condition: Tokens) -> Any:
  """The set {x in A | condition}."""
  sides = notation.split(element, lambda x: x.is_command('in'))
  if len(sides) > 2 or not _label(sides[0]):
    return None
  return _read(condition)


def _reversed_interval(tokens: Tokens) -> Any:
  """]1, 2[ is (1, 2)."""
  left, right = tokens[0].text, tokens[-1].text
  if left not in '[](' or right not in '[])' or not (left == ']' or right == '['):
    return None
  parts = notation.split(tokens[1:-1], lambda x: x.is_op(',', ';'))
  if len(parts) != 2:
    return None
  return Group(('(' if left == ']' else left) + (')' if right == '[' else right), tuple(map(_read, parts)))


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
  base = found and str(_NUMBER_WORDS.get(found[2].lower(), found[2]))
  return Based(found[1], base) if found and base.isdigit() and tokens[0].kind != 'name' else None


def _matrix(tokens: Tokens) -> Any:
  while len(tokens) > 2 and tokens[0].is_op('(', '[') and _closing(tokens) == len(tokens) - 1:
    tokens = tokens[1:-1]
  if tokens[0].kind != 'begin' or 'matrix' not in tokens[0].text and tokens[0].text != 'array':
    return None
  if tokens[0].text in ('vmatrix', 'Vmatrix') or _closing(tokens) != len(tokens) - 1:
    return None
  inner = tokens[1:-1]
  if tokens[0].text == 'array' and inner and inner[0].is_op('{'):
    inner = inner[_closing(inner) + 1:]
  rows = [row for row in notation.split(inner, lambda x: x.is_op('\\\\')) if row]
  return Matrix(tuple(tuple(_read(cell) for cell in notation.split(row, lambda x: x.is_op('&'))) for row in rows))


_SCALES = {'dozen': 12, 'hundred': 10 ** 2, 'thousand': 10 ** 3, 'million': 10 ** 6, 'billion': 10 ** 9,
           'trillion': 10 ** 12}


_CURRENCIES = frozenset(units.CURRENCIES.values())


def _quantity(tokens: Tokens) -> Quantity:
  """A formula and its unit; what a number counts is left out: 12 apples are 12."""
  currency = None
  if len(tokens) > 1 and tokens[0].kind in ('word', 'text') and (unit := units.named(tokens[0].text)) in _CURRENCIES:
    currency, tokens = unit, tokens[1 + tokens[1].is_op('.'):]
  for i in (0, 1):
    if len(tokens) > i + 1 and tokens[i].is_op(*units.CURRENCIES) and (i == 0 or tokens[0].is_op('-', '+')):
      currency = units.CURRENCIES[tokens[i].text]
      tokens = tokens[:i] + tokens[i + 1:]
  tokens, unit = units.split(tokens)
  if unit is None:
    tokens = units.without_count(tokens)
    tokens, unit = units.split(tokens)
  scale = 1
  while len(tokens) > 1 and tokens[-1].kind in ('word', 'text') and tokens[-1].text.lower() in _SCALES:
    scale *= _SCALES[tokens[-1].text.lower()]
    tokens = tokens[:-1]
  return Quantity(_strip(tokens), currency if currency is not None and unit in (None, units.NO_UNIT) else unit, scale)


# Comparing.


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
  return notation.written(_strip(notation.tokens(_without_dollars(text))))


def _equal(x: Any, y: Any) -> bool:
  if x == y:
    return True
  if isinstance(x, Either) or isinstance(y, Either):
    if isinstance(x, Either) and isinstance(y, Either):  # both in the same way
      return any(map(_equal, x.ways, y.ways))
    either, other = (x, y) if isinstance(x, Either) else (y, x)
    return any(_equal(way, other) for way in either.ways)
  if isinstance(x, Named) or isinstance(y, Named):
    return _equal_named(x, y)
  if isinstance(x, Quantity) and isinstance(y, Quantity):
    both = _both_signs(x), _both_signs(y)
    return _equal(*both) if all(both) else not any(both) and _equal_quantities(x, y)
  if isinstance(x, Relation) and isinstance(y, Relation) and _equal_relations(x, y):
    return True
  if isinstance(x, Group) and isinstance(y, Group) and (
      _equal_groups(x, y) or not {x.kind, y.kind} & {'', '{}'}):  # two intervals are equal end by end only
    return _equal_groups(x, y)
  if isinstance(x, Matrix) and isinstance(y, Matrix):
    return [len(row) for row in x.rows] == [len(row) for row in y.rows] and all(
        _equal(a, b) for row, other in zip(x.rows, y.rows) for a, b in zip(row, other))
  if isinstance(x, Time) and isinstance(y, Time):
    return x.parts == y.parts and (x.half == y.half or not x.half or not y.half)
  if isinstance(x, Ratio) and isinstance(y, Ratio):
    return _equal_ratios(x, y)
  if isinstance(x, Based) or isinstance(y, Based):
    return _equal_based(x, y)
  for one, other in ((x, y), (y, x)):
    if isinstance(other, Quantity):
      if both := _both_signs(other):
        return _equal(one, both)
      if isinstance(one, Group) and one.kind in ('', '{}') and one.items:  # a set of one needs no brackets
        return all(_equal(item, other) for item in one.items)
  return _equal_regions(x, y)


def _equal_named(x: Any, y: Any) -> bool:
  if not (isinstance(x, Named) and isinstance(y, Named)):
    named, other = (x, y) if isinstance(x, Named) else (y, x)
    if isinstance(other, Relation) and named.relation:
      return _equal_relations(named.relation, other) or _equal_regions(named.relation, other)
    return _equal(named.thing, other)
  if x.label.lower() == y.label.lower() or x.label.replace(' ', '') == y.label.replace(' ', ''):
    return _equal(x.thing, y.thing)
  return bool(x.relation and y.relation) and _equal_relations(x.relation, y.relation)


def _equal_groups(x: Group, y: Group) -> bool:
  kinds = {x.kind, y.kind}
  if x.joined == y.joined == 'thousands':  # then both are numbers
    return False
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


def _equal_ratios(x: Ratio, y: Ratio) -> bool:
  if len(x.parts) != len(y.parts):
    return False
  numbers = [[_number(part) for part in ratio.parts] for ratio in (x, y)]
  if None in numbers[0] + numbers[1] or not numbers[0][0] or not numbers[1][0]:
    return all(_equal(_quantity(a), _quantity(b)) for a, b in zip(x.parts, y.parts))
  return all(formula.close(a * numbers[1][0], b * numbers[0][0]) for a, b in zip(*numbers))


def _number(tokens: Tokens) -> Any:
  node = _node(tokens, Reading())
  return None if node is None or formula.names(node) else _values(tokens, Reading(), frozenset())[0]


def _equal_based(x: Any, y: Any) -> bool:
  """A number in a base and the same digits; one side may leave out the base."""
  digits = lambda z: z.digits if isinstance(z, Based) else (
      z.tokens[0].text if isinstance(z, Quantity) and len(z.tokens) == 1 and z.unit is None else None)
  bases = {z.base for z in (x, y) if isinstance(z, Based)}
  return len(bases) == 1 and digits(x) == digits(y)


def _both_signs(x: Quantity) -> Group | None:
  r"""The list of 1 + a and 1 - a that 1 \pm a stands for; None: there is no such sign."""
  if not any(token.is_command('pm', 'mp') for token in x.tokens):
    return None
  replaced = lambda plus, minus: Quantity(tuple(
      Token('op', {'pm': plus, 'mp': minus}[t.text]) if t.is_command('pm', 'mp') else t for t in x.tokens), x.unit, x.scale)
  return Group('', (replaced('+', '-'), replaced('-', '+')))


@functools.lru_cache(_KEPT)
def _node(tokens: Tokens, reading: Reading) -> Node | None:
  try:
    return formula.parse(tokens, reading)
  except (formula.NotAFormula, ValueError, RecursionError):
    return None


@functools.lru_cache(_KEPT)
def _values(tokens: Tokens, reading: Reading, variables: frozenset[str]) -> list[Any]:
  try:
    return formula.values(_node(tokens, reading), variables)
  except (ArithmeticError, KeyError, ValueError, TypeError, RecursionError):
    return [None]


def _readings(*all_tokens: Tokens) -> list[Reading]:
  """The ways to read formulas that could differ for them."""
  calls, logs, tight, euler, far = [True], [0], [False], [False], [True]
  for tokens in all_tokens:
    for before, token in itertools.pairwise(tokens):
      if token.is_op('(') and (before.kind in ('name', 'text', 'word') or before.is_op('}', "'")):
        calls = [True, False]
      if before.text == 'log' and not token.is_op('_'):
        logs = [0, 10]
      if formula.takes_factors(before) and not token.is_op('(', '{'):
        far = [True, False]
      if before.is_op('/'):
        tight = [False, True]
      if before.kind == 'number' and token.kind == 'name' and token.text in 'eE':
        euler = [False, True]
  return [Reading(*flags) for flags in itertools.product(calls, logs, tight, euler, far)]


def _equal_quantities(x: Quantity, y: Quantity) -> bool:
  if (x.unit is None) != (y.unit is None):  # 5m is a product, unless it stands beside 5 m
    x, y = (_with_letter(z, other) for z, other in ((x, y), (y, x)))
  x_unit, y_unit = (z.unit if z.unit != units.NO_UNIT else None for z in (x, y))
  if x_unit and y_unit:
    if x_unit.powers != y_unit.powers:
      return {x_unit, y_unit} == {units.DEGREE, units.RADIAN} and _equal_values(
          x, y, *(('pi/180' if u == units.DEGREE else None) for u in (x_unit, y_unit)))
    return _equal_values(x, y, x_unit.size, y_unit.size)
  if _equal_values(x, y):
    return True
  for unit, factors in ((x_unit, lambda f: (f, None)), (y_unit, lambda f: (None, f))):
    if unit == units.PERCENT:
      return _equal_values(x, y, *factors(Fraction(1, 100)))
    if unit == units.DEGREE:
      return _equal_values(x, y, *factors('pi/180'))
  return False


def _with_letter(x: Quantity, other: Quantity) -> Quantity:
  """A number with the letter at its end as its unit, if the other quantity has this unit."""
  if x.unit is None and len(x.tokens) > 1 and x.tokens[-1].kind == 'name':
    tokens, unit = units.split((*x.tokens[:-1], x.tokens[-1]._replace(spaced=True)))
    if unit is not None and unit.powers == other.unit.powers:
      return Quantity(tokens, unit, x.scale)
  return x


_FACTORS = {'pi/180': formula.mp.pi / 180}


def _equal_values(x: Quantity, y: Quantity, x_factor: Any = None, y_factor: Any = None) -> bool:
  """Whether formulas are equal once each is multiplied by its factor."""
  same_factors = x_factor == y_factor and x.scale == y.scale
  if same_factors and notation.written(x.tokens) == notation.written(y.tokens):
    return True
  for reading in _readings(x.tokens, y.tokens):
    nodes = _node(x.tokens, reading), _node(y.tokens, reading)
    if None in nodes:
      continue
    variables = formula.names(nodes[0]) | formula.names(nodes[1])
    values = [
        [_times(value, factor, z.scale) for value in _values(z.tokens, reading, variables)]
        for z, factor in ((x, x_factor), (y, y_factor))]
    if formula.same_values(*values):
      return True
    if not variables and len(values[0]) == len(values[1]) == 1 and None not in values[0] + values[1]:
      if _rounded(x, y, *values[0], *values[1]):
        return True
  return False


def _times(value: Any, factor: Any, scale: int) -> Any:
  if value is None or factor is None and scale == 1:
    return value
  value = value * scale
  factor = _FACTORS.get(factor, factor) if isinstance(factor, str) else factor
  if factor is None:
    return value
  exact = isinstance(value, Fraction) and isinstance(factor, Fraction)
  return value * factor if exact else formula.inexact(value) * formula.inexact(factor)


def _rounded(x: Quantity, y: Quantity, x_value: Any, y_value: Any) -> bool:
  """Whether one is a decimal of six digits or more that the other, of another form, may be rounded to."""
  decimals = [re.fullmatch(r'-?(\d*)\.(\d+)', notation.written(z.tokens)) for z in (x, y)]
  if (decimals[0] is None) == (decimals[1] is None):
    return False
  if not all(isinstance(z, Fraction) or not isinstance(z, formula.mp.mpc) for z in (x_value, y_value)):
    return False
  whole, places = (decimals[0] or decimals[1]).groups()
  apart = abs(formula.inexact(x_value) - formula.inexact(y_value))
  if (x.unit, x.scale) != (y.unit, y.scale) and (x.scale, y.scale) != (1, 1):
    return False
  return len((whole + places).lstrip('0')) >= 6 and bool(apart <= formula.mp.mpf(10) ** -len(places))


def _equal_relations(x: Relation, y: Relation) -> bool:
  """Whether the solutions are the same because one is a multiple of the other, side by side or turned round."""
  if len(x.sides) != len(y.sides):
    return False
  for sides, signs in ((y.sides, y.signs), (y.sides[::-1], [_TURNED[sign] for sign in y.signs[::-1]])):
    if list(x.signs) == list(signs) and all(_equal(_read(a), _read(b)) for a, b in zip(x.sides, sides)):
      return True
  if len(x.sides) != 2:
    return False
  for reading in _readings(*x.sides, *y.sides):
    nodes = [_difference(z, reading) for z in (x, y)]
    if None in nodes:
      continue
    (one, sign), (two, other) = nodes
    variables = formula.names(one) | formula.names(two)
    if sign == other and variables:
      try:
        a, b = formula.values(one, variables), formula.values(two, variables)
      except (ArithmeticError, ValueError, RecursionError):
        continue
      if _proportional(a, b, signed=sign not in ('=', 'ne')):
        return True
  return False


_TURNED = {'=': '=', 'ne': 'ne', '<': '>', '>': '<', 'le': 'ge', 'ge': 'le'}


def _difference(x: Relation, reading: Reading) -> tuple[Node, str] | None:
  """The relation as a formula and '<', 'le', '=' or 'ne', by which it relates to 0."""
  left, right = (_node(side, reading) for side in x.sides)
  if left is None or right is None:
    return None
  if x.signs[0] in ('>', 'ge'):
    left, right = right, left
  return ('subtract', left, right), {'>': '<', 'ge': 'le'}.get(x.signs[0], x.signs[0])


def _proportional(x: list[Any], y: list[Any], signed: bool) -> bool:
  """Whether x is a constant times y, the constant positive where the sign counts."""
  both = [(formula.inexact(a), formula.inexact(b)) for a, b in zip(x, y) if a is not None and b is not None]
  if len(both) < 3:
    return False
  (a, b), *rest = both
  if not a or not b or signed and not (formula.mp.im(a / b) == 0 and formula.mp.re(a / b) > 0):
    return False
  return all(formula.close(a * d, b * c) for c, d in rest)


def _equal_regions(x: Any, y: Any) -> bool:
  """Whether two things are the same part of the real line."""
  a, b = region(x), region(y)
  return a is not None and b is not None and regions.equal(a, b)


def region(x: Any) -> regions.Region | None:
  """The part of the real line that a thing is; None: it is none."""
  if isinstance(x, Token):
    return regions.LINE if x.text == 'reals' else None
  if isinstance(x, Named):
    return region(x.thing) if x.relation is None else region(x.relation)
  if isinstance(x, Region):
    parts, without = [region(part) for part in x.parts], [region(part) for part in x.without]
    if None in parts or None in without:
      return None
    return regions.minus(regions.union(*parts), regions.union(*without))
  if isinstance(x, Relation):
    return _solution(x)
  if isinstance(x, Either):
    return None
  if isinstance(x, Group):
    if x.kind in ('()', '[]', '(]', '[)'):
      ends = [_real(item) for item in x.items]
      return None if len(ends) != 2 or None in ends else regions.interval(*ends, x.kind[0] == '[', x.kind[1] == ']')
    if x.kind == '' and x.items and all(isinstance(item, (Relation, Named)) for item in x.items):
      parts = [region(item) for item in x.items]
      return None if None in parts or x.joined == ',' else (
          regions.intersection(*parts) if x.joined == 'and' else regions.union(*parts))
    if x.kind == '{}':
      points = [_real(item) for item in x.items]
      return None if None in points else regions.union(*(regions.interval(p, p, True, True) for p in points))
  return None


def _real(x: Any) -> Any:
  """The value of a quantity that is a real number, or infinite."""
  if not isinstance(x, Quantity) or x.scale != 1:
    return None
  node = _node(x.tokens, Reading())
  if node is None or formula.names(node):
    return None
  found = _values(x.tokens, Reading(), frozenset())[0]
  return None if found is None or not formula.is_real(found) else found


def _solution(x: Relation) -> regions.Region | None:
  """The solution of linear inequalities in one variable."""
  nodes = [_node(side, Reading()) for side in x.sides]
  if None in nodes:
    return None
  variables = frozenset().union(*map(formula.names, nodes))
  if len(variables) != 1:
    return None
  name, = variables
  parts = []
  for left, right, sign in zip(nodes, nodes[1:], x.signs):
    try:
      at = [formula.value(('subtract', left, right), {name: Fraction(n)}) for n in (0, 1, 2)]
    except (ArithmeticError, KeyError):
      return None
    found = regions.linear(*at, sign)
    if found is None:
      return None
    parts.append(found)
  return regions.intersection(*parts)


# Votes.


def canonical(answer: str) -> str | None:
  """A text that equal answers share, unless only `same` can tell (0.333333 and 1/3); None for an empty answer."""
  if len(answer) > _MOST_CHARACTERS:
    return _written(answer) or None
  found = read(answer)
  return None if found is None else _canonical(found)


def _canonical(x: Any) -> str:
  if isinstance(x, Either):
    return _canonical(x.ways[0])
  if isinstance(x, Named):
    return _canonical(x.thing)
  if isinstance(x, Quantity):
    if both := _both_signs(x):
      return _canonical(both)
    return _canonical_quantity(x)
  if isinstance(x, Group):
    items = [*map(_canonical, x.items)]
    if x.kind in ('', '{}'):
      items = sorted(set(items))
      return items[0] if len(items) == 1 else f'{{{"; ".join(items)}}}'
    return f'{x.kind[0]}{"; ".join(items)}{x.kind[1]}'
  if isinstance(x, (Region, Relation)):
    found = region(x)
    return str(x) if found is None else regions.written(found)
  if isinstance(x, Words):
    return x.text
  return str(x)


def _canonical_quantity(x: Quantity) -> str:
  node = _node(x.tokens, Reading())
  if node is None:
    return notation.written(x.tokens)
  variables = formula.names(node)
  found = [_times(value, None, x.scale) for value in _values(x.tokens, Reading(), variables)]
  if all(value is None for value in found):
    return notation.written(x.tokens)
  return '; '.join(('' if value is None else formula.written(value)) for value in found)
