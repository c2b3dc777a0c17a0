r"""Units of measurement: the unit at the end of an answer, and how units relate; numbers in words.

    unit    = factor {[per | / | \cdot | * | space] factor}
    factor  = [square | cubic] name [squared | cubed | ^ whole number] | ( unit ) | \frac{unit}{unit}

A letter such as m or N is a unit only after a number and a space, or as text (\text{m}, \mathrm{m}): 5m and 3R are
products. Words that are no unit are not taken for one; `is_counted` says what may stand after a number beside.
"""

from __future__ import annotations

from fractions import Fraction
import re
from typing import NamedTuple

from kr_jax.answers import notation
from kr_jax.answers.cursor import Cursor
from kr_jax.answers.notation import Token, Tokens


class Unit(NamedTuple):
  """A unit as its size in base units: 1 km/h is 5/18 m^1 s^-1."""

  size: Fraction = Fraction(1)
  powers: tuple[tuple[str, int], ...] = ()  # of base units, in their order

  def times(self, other: Unit, power: int = 1) -> Unit:
    powers = dict(self.powers)
    for base, n in other.powers:
      powers[base] = powers.get(base, 0) + power * n
    return Unit(self.size * other.size ** power, tuple(sorted((base, n) for base, n in powers.items() if n)))


PERCENT, DEGREE = Unit(powers=(('%', 1),)), Unit(powers=(('degree', 1),))
RADIAN = Unit(powers=(('radian', 1),))
NO_UNIT = Unit()  # of the word units, which leaves the unit open

# symbol or names: size in base units, base units. A plural s is dropped before the look-up.
_TABLE = '''
  m meter metre: 1 m | g gm gram gramme: 1/1000 kg | s sec second: 1 s | A amp ampere: 1 A | K kelvin: 1 K
  mol mole: 1 mol | N newton: 1 kg m s-2 | J joule: 1 kg m2 s-2 | W watt: 1 kg m2 s-3 | V volt: 1 kg m2 s-3 A-1
  Pa pascal: 1 kg m-1 s-2 | Hz hertz: 1 s-1 | C coulomb: 1 A s | F farad: 1 A2 s4 kg-1 m-2
  Omega ohm: 1 kg m2 s-3 A-2 | T tesla: 1 kg s-2 A-1 | H henry: 1 kg m2 s-2 A-2 | Wb weber: 1 kg m2 s-2 A-1
  S siemens: 1 A2 s3 kg-1 m-2 | L l liter litre: 1/1000 m3
  eV electronvolt: 1602176634/10000000000000000000000000000 kg m2 s-2 | cal calorie: 523/125 kg m2 s-2
  bar: 100000 kg m-1 s-2 | Wh: 3600 kg m2 s-2 | bit: 1 bit | byte: 8 bit | pc parsec: 30856775814913673 m
  M molar: 1000 mol m-3 | Bq becquerel: 1 s-1 | Gy gray: 1 m2 s-2 | Sv sievert: 1 m2 s-2 | lm lumen: 1 cd
  cd candela: 1 cd | lx lux: 1 cd m-2 | D debye: 1 debye | Ah: 3600 A s | rpm: 1 rpm
  dyn dyne: 1/100000 kg m s-2 | erg: 1/10000000 kg m2 s-2
'''
_UNPREFIXED = '''
  min minute: 60 s | h hr hour: 3600 s | day: 86400 s | week wk: 604800 s | month: 1 month
  yr year annum: 1 year | decade: 10 year | century centurie: 100 year | in inch inche: 127/5000 m
  ft foot feet: 381/1250 m | yd yard: 1143/1250 m | mi mile: 201168/125 m | acre: 316160658/78125 m2
  hectare ha: 10000 m2 | lb lbs pound: 45359237/100000000 kg | oz ounce: 45359237/1600000000 kg
  ton tonne: 1000 kg | mph: 1397/3125 m s-1 | kph kmh kmph: 5/18 m s-1 | mps: 1 m s-1 | fps: 381/1250 m s-1
  gal gallon: 473176473/125000000000 m3 | qt quart: 473176473/500000000000 m3
  pint pt: 473176473/1000000000000 m3 | cup: 473176473/2000000000000 m3 | atm atmosphere: 101325 kg m-1 s-2
  psi: 1 psi | torr mmHg: 101325/760 kg m-1 s-2 | hp horsepower: 1 horsepower | knot: 463/900 m s-1
  AU au: 149597870700 m | ly lightyear: 9460730472580800 m | angstrom AA: 1/10000000000 m | rad radian: 1 radian
  deg degree: 1 degree | sr steradian: 1 steradian | rev revolution: 1 revolution | C celsius degC: 1 celsius
  fahrenheit degF: 1 fahrenheit | dollar usd buck: 1 dollar | cent: 1/100 dollar | euro eur: 1 euro
  yen jpy: 1 yen | gbp quid: 1 sterling | rupee rs inr: 1 rupee | yuan rmb cny: 1 yuan | peso: 1 peso
  ruble rouble: 1 ruble | percent percentage pct: 1 % | unit: 1 | amu dalton: 1 dalton | u: 1 dalton
  dB decibel: 1 decibel | ppm: 1 ppm | dpt diopter dioptre: 1 m-1 | fortnight: 1209600 s
'''
_PREFIXES = {'k': 3, 'c': -2, 'm': -3, 'd': -1, 'M': 6, 'G': 9, 'T': 12, 'mu': -6, 'n': -9, 'p': -12, 'f': -15, 'h': 2}
_SPELLED = {'kilo': 3, 'centi': -2, 'milli': -3, 'deci': -1, 'mega': 6, 'giga': 9, 'tera': 12, 'micro': -6, 'nano': -9,
            'pico': -12, 'femto': -15, 'hecto': 2}
_SYMBOLS = {'dollar': '$', 'sterling': '£', 'euro': '€', 'yen': '¥', 'rupee': '₹'}
CURRENCIES = {symbol: Unit(powers=((name, 1),)) for name, symbol in _SYMBOLS.items()}


def _read(table: str) -> dict[str, Unit]:
  units = {}
  for entry in re.split(r'[|\n]', table):
    if entry.strip():
      names, _, definition = entry.partition(':')
      size, *bases = definition.split()
      powers = [re.fullmatch(r'(\D+?)(-?\d+)?', base).groups() for base in bases]
      unit = Unit(Fraction(size), tuple(sorted((base, int(n or 1)) for base, n in powers)))
      units |= dict.fromkeys(names.split(), unit)
  return units


def _units() -> dict[str, Unit]:
  plain, units = _read(_TABLE), {}
  for name, unit in plain.items():
    prefixes = _PREFIXES if len(name) <= 2 or name in ('bar', 'cal', 'mol', 'Omega', 'bit') else {}
    spelled = _SPELLED if len(name) > 2 else {}
    for prefix, power in {**prefixes, **spelled}.items():
      units[prefix + name] = unit._replace(size=unit.size * Fraction(10) ** power)
  return {**units, **plain, **_read(_UNPREFIXED)}


_UNITS = _units()
_LETTERS = frozenset('mgsNJWVKLlhATHFCD')  # letters that are units after a number and a space
_NEED_SPACE = frozenset('mg ml ms mA in mm pm nm gal hr hp pt cd pc mi rs'.split())  # else they are products
_SCALED = {'square': 2, 'sq': 2, 'cubic': 3, 'cu': 3}
_RAISED = {'squared': 2, 'cubed': 3}


def named(word: str) -> Unit | None:
  """The unit of a name or symbol; None: there is none of this name."""
  for name in (word, word.lower() if len(word) > 2 else word):
    for form in (name, name.removesuffix('s') if len(name) > 2 else name, name.rstrip('.')):
      if form in _UNITS:
        return _UNITS[form]
  return None


_WRITTEN = ('text', 'name', 'word')


class _Reader(Cursor):
  """Reads tokens as a unit."""

  def all(self) -> Unit | None:
    found = self._product('end of text')
    return found if self.i == len(self.tokens) else None

  def _product(self, end: str) -> Unit | None:
    found, power = None, 1
    if self._word() == 'per' or self.peek().is_op('/'):  # 5 per hour
      found = NO_UNIT
    while self.peek().kind != end and not self.peek().is_op(end):
      token = self.peek()
      if found is not None and (token.is_op('*', '-', '.') or token.is_command('cdot', 'times')):
        self.i += 1
      elif found is not None and (token.is_op('/') or self._word() in ('per', 'a', 'an', 'each')):
        self.i += 1
        power = -1
      factor = self._factor(power)
      if factor is None:
        return None
      found = factor if found is None else found.times(factor)
      power = 1
    return found

  def _word(self) -> str:
    token = self.peek()
    return token.text if token.kind in ('word', 'text', 'name') else ''

  def _factor(self, power: int) -> Unit | None:
    token = self.peek()
    if token.is_op('('):
      self.i += 1
      inner = self._product(')')
      self.i += 1
      return inner and NO_UNIT.times(inner, power)
    if token.is_command('frac'):
      self.i += 1
      top, bottom = self._braced(), self._braced()
      return top and bottom and NO_UNIT.times(top.times(bottom, -1), power)
    if token.is_op('{'):
      inner = self._braced()
      return inner and NO_UNIT.times(inner, power)
    scaled = _SCALED.get(self._word(), 0)
    if scaled:
      self.i += 1
      self.i += self.peek().is_op('.')
    unit = self._name()
    if unit is None:
      return None
    n = self._exponent()
    return None if n is None else NO_UNIT.times(unit, power * (scaled or n))

  def _braced(self) -> Unit | None:
    self.i += 1
    inner = self._product('}')
    self.i += 1
    return inner

  def _name(self) -> Unit | None:
    token, after = self.peek(), self.peek(1)
    if token.is_op('%', '°'):
      self.i += 1
      return PERCENT
    if token.is_op('^') and (self.peek(2) if after.is_op('{') else after).is_command('circ', 'degree'):
      self.i += 4 if after.is_op('{') else 2
      return self._scale_of_degrees()
    if token.is_command('degree', 'circ'):
      self.i += 1
      return self._scale_of_degrees()
    if token.kind == 'op' and token.text in CURRENCIES:
      self.i += 1
      return CURRENCIES[token.text]
    if token.is_command('AA'):
      self.i += 1
      return _UNITS['AA']
    if (token.text == 'mu' or token.text in _PREFIXES and after.text == 'Omega') and after.kind in _WRITTEN:
      self.i += 2
      return named(token.text + after.text)
    if token.kind in _WRITTEN and after.text == '_' and token.text in ('M', 'L', 'R'):
      if self.peek(2).text in ('odot', 'oplus', '{'):
        self.i += 3 if self.peek(2).text != '{' else 5
        return Unit(powers=((f'solar {token.text}', 1),))
    if token.kind not in ('text', 'word', 'name'):
      return None
    if token.text.lower() in ('degree', 'degrees', 'deg'):
      self.i += 1
      return self._scale_of_degrees()
    if token.text == 'ms' and after.is_op('^') and self.peek(2).is_op('{', '-'):  # m s^-1 without the space
      self.i += 1
      n = self._exponent()
      return None if n is None else _UNITS['m'].times(_UNITS['s'], n)
    self.i += 1
    unit = named(token.text)
    if unit is not None and self.peek().is_op('.') and self.i + 1 == len(self.tokens):
      self.i += 1
    return unit

  def _scale_of_degrees(self) -> Unit:
    scale = self._word()
    for names, unit in ((('C', 'Celsius', 'celsius', 'centigrade'), _UNITS['celsius']),
                        (('F', 'Fahrenheit', 'fahrenheit'), _UNITS['fahrenheit'])):
      if scale in names:
        self.i += 1
        return unit
    return DEGREE

  def _exponent(self) -> int | None:
    """What a unit is raised to; None: what stands there is no whole number."""
    if self._word() in _RAISED:
      self.i += 1
      return _RAISED[self.tokens[self.i - 1].text]
    if not self.peek().is_op('^') or self.peek(1).is_command('circ', 'degree'):
      return 1
    self.i += 1
    braced = self.peek().is_op('{')
    self.i += braced
    sign = -1 if self.peek().is_op('-') else 1
    self.i += self.peek().is_op('-', '+')
    number = self.peek().text
    self.i += 1 + braced
    return sign * int(number) if number.isdigit() and len(number) < 3 else None


def split(tokens: Tokens) -> tuple[Tokens, Unit | None]:
  """A quantity and its unit: the longest end of the tokens that is a unit; None: there is none."""
  first = next((i + 1 for i, token in enumerate(tokens) if token.kind == 'number'), 1)
  for i in range(first, len(tokens)):
    if _may_begin(tokens, i, first) and (unit := _Reader(tokens[i:]).all()) is not None:
      return tokens[:i], unit
  return tokens, None


def _may_begin(tokens: Tokens, i: int, first: int) -> bool:
  """Whether a unit may begin at the i-th token; the first number ends before the token `first`."""
  token, before = tokens[i], tokens[i - 1]
  if before.is_op('_', '^', '*', '/', '+', '-') or before.is_command('cdot', 'times'):
    return False
  if token.is_op('/'):
    return i == first
  if (token.is_op('^') or token.is_command('degree')) and any(map(notation.takes_factors, tokens[:i])):
    return False  # cos 60 degrees
  if token.is_command('frac'):
    return before.kind == 'number' and any(x.kind == 'text' for x in tokens[i:])
  if token.is_op('-', '*', '(', '{', '.') or token.is_command('cdot', 'times'):
    return False
  if token.kind not in ('name', 'word'):
    return True
  if any(x.kind in ('name', 'word', 'text') and x.text not in ('pi', 'e') for x in tokens[:i]):
    return False  # after variables only text is a unit
  if token.kind == 'word':
    return token.spaced or token.text not in _NEED_SPACE
  is_solar = token.text in ('M', 'R') and i + 1 < len(tokens) and tokens[i + 1].is_op('_')
  is_kilo = token.text in _PREFIXES and i + 1 < len(tokens) and tokens[i + 1].text == 'Omega'
  return token.text == 'Omega' or token.spaced and (token.text in _LETTERS or token.text == 'mu' or is_solar or is_kilo)


SCALES = {'dozen': 12, 'hundred': 10 ** 2, 'thousand': 10 ** 3, 'million': 10 ** 6, 'billion': 10 ** 9,
          'trillion': 10 ** 12}
_PARTS = ('half third quarter fifth sixth seventh eighth ninth tenth eleventh twelfth twentieth hundredth thousandth '
          'millionth').split()
_PARTS = dict(zip(_PARTS, (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 20, 100, 1000, 10 ** 6))) | {'halve': 2, 'fourth': 4}


def scale(word: str) -> Fraction | None:
  """What a word after a number multiplies it by: 12 for dozen, 1/3 for thirds; None: it is no such word."""
  word = word.lower().removesuffix('s')
  return Fraction(SCALES[word]) if word in SCALES else Fraction(1, _PARTS[word]) if word in _PARTS else None


NUMBER_WORDS = {word: n for n, word in enumerate(
    'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen '
    'eighteen nineteen twenty'.split())} | {'thirty': 30, 'forty': 40, 'fifty': 50, 'sixty': 60, 'seventy': 70,
                                            'eighty': 80, 'ninety': 90}


def number_in_words(text: str) -> tuple[int, Fraction] | None:
  """(205, 1) for 'two hundred and five', (2, 1/3) for 'two thirds'; None: the words are no number."""
  words = [word for word in re.split(r'[\s-]+', text) if word not in ('and', 'a')]
  part_of = scale(words[-1]) if words else None
  if part_of is None or part_of > 1:
    part_of = Fraction(1)
  else:
    words = words[:-1] or ['one']
  total = part = 0
  for word in words:
    if word in NUMBER_WORDS:
      part += NUMBER_WORDS[word]
    elif word == 'hundred':
      part = 100 * (part or 1)
    elif word in SCALES and word != 'dozen':
      total, part = total + SCALES[word] * (part or 1), 0
    else:
      return None
  return (total + part, part_of) if words else None


# Words after a number that change what it says.
_CHANGING = frozenset('''
  is are was were be not no or and nor but than less more fewer greater most least over under above below plus minus
  times divided multiplied choose factorial mod modulo squared cubed power root half halves quarter quarters score
  pair pairs if when unless except without about because since from as does cannot infinity undefined remainder base
  pi negative percent other others dozen dozens hundred hundreds thousand thousands million millions billion billions
  trillion trillions tens ones perhaps maybe twice double triple to wrong right incorrect false'''.split())
# Parts of a whole: thirds, tenths, hundredths.
_ORDINAL = re.compile(
    r'(?:third|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w*teen|\w*tie|hundred|thousand|million|billion)th)s?')
_PLURALS = frozenset('people children men women feet mice geese teeth dice sheep fish deer cattle oxen data'.split())
# What may follow a quantity or what it counts, up to the end: 5 cm long, 3 boxes of pens, 18 every day.
_TAILS = frozenset('''
  long tall high wide deep old away apart left remaining total altogether overall each every per in of for at on a an
  that ago together only exactly too'''.split())
_NEED_NOUN = frozenset('of for at on that too'.split())


def _is_word(token: Token) -> bool:
  return token.kind in ('word', 'text') or token.kind == 'name' and token.text == 'a' or token.is_op("'", '-')


def without_count(tokens: Tokens) -> Tokens:
  """A number without the words that say what it counts, or that follow its unit; else the tokens as they are.

  12 apples are 12, and so are 12 red apples in total. 12 dozen, 3 halves and 5 or more stay.
  """
  begin = len(tokens)
  while begin and _is_word(tokens[begin - 1]):
    begin -= 1
  if tokens and tokens[-1].is_op(')') and (opens := max(
      (i for i, x in enumerate(tokens) if x.is_op('(')), default=0)) and all(map(_is_word, tokens[opens + 1:-1])):
    return without_count((*tokens[:opens], *tokens[opens + 1:-1]))  # 6 (buses)
  words = [token.text.lower() for token in tokens[begin:] if not token.kind == 'op']
  numbers = [token for token in tokens[:begin] if token.kind == 'number']
  if not words or not numbers or tokens[begin - 1].kind == 'name' or len(words) > 12:
    return tokens
  if words[0].removesuffix('s') in SCALES:  # 3 dozen eggs are 3 dozen
    rest = without_count((*numbers[-1:], *tokens[begin + 1:]))
    return (*tokens[:begin + 1], *rest[1:])
  if _CHANGING & set(words) or any(map(_ORDINAL.fullmatch, words)):
    return tokens
  tail = next((i for i, word in enumerate(words) if word in _TAILS), len(words))
  nouns = words[:tail]
  if nouns and named(nouns[-1]) is not None:  # a unit, which is read after this
    at = next(i for i in range(begin, len(tokens)) if tokens[i].text.lower() == words[tail - 1]) + 1
    return tokens[:at] if tail < len(words) else tokens
  if not nouns:
    is_part = any(x.is_op('/') or x.is_command('frac') or '.' in x.text for x in tokens[:begin])  # 2/3 of the cake
    lacks = words[0] in _NEED_NOUN and not is_part or words[0] in ('in', 'a', 'an') and len(words) == 1
    return tokens if lacks else tokens[:begin]
  is_one = len(numbers) == 1 and numbers[0].text == '1' and begin == 1
  plural = nouns[-1].endswith('s') and not nouns[-1].endswith('ss') or nouns[-1] in _PLURALS
  return tokens[:begin] if len(nouns) <= 4 and (plural or is_one) and all(len(x) > 1 for x in nouns) else tokens
