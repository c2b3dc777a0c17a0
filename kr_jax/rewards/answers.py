r"""Whether two mathematical answers are the same.

Two answers are compared by their units, then their normalised texts, then their parts. Where notation is loose,
equality is a convention:

  - One side may leave out a unit, a currency, a percent sign or a name 'x ='; two that differ make the answers
    differ. 50 % is 0.5, and also 50 if the other side has no percent sign.
  - Decimals are exact, with one exception: a decimal of six digits or more may be off by 1 in its last digit from
    a number of another form, so 0.333333 is 1/3.
  - Order and repetition count in (1, 2) and [1, 2], but not in {1, 2} or in 1, 2 without brackets.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
from typing import Any

from kr_jax.rewards.marks import trim

# Beyond one of these limits an answer is compared as text: math-verify's parser would take seconds, or hang.
_MOST_CHARACTERS, _MOST_NESTING, _MOST_DIGITS = 400, 12, 10_000

_LETTER = re.compile(
    r'(?:(?:option|choice)\s+)?(?:\(([A-Z])\)|([A-Z])[).:]|([A-Z])(?=\s+(?:because|since|as|is)\b)|([A-Z])$)', re.I)


def letter(text: str) -> str | None:
  """The letter of a choice, A..Z, that an answer starts with: B of 'B', '(b)' or 'B. 5 m'; None: there is none."""
  text = trim(re.sub(r'\\(?:text|mathrm|mathbf|textbf|rm|bf)\b|[{}*$]', '', text))
  found = _LETTER.match(text)
  return next(filter(None, found.groups())).upper() if found else None


# The first name of each group stands for all of the group; a plural s is dropped before the look-up.
_UNITS = {name: names.split()[0] for names in (
  'mm millimeter millimetre', 'cm centimeter centimetre', 'm meter metre', 'km kilometer kilometre', 'in inch inche',
  'ft foot feet', 'yd yard', 'mi mile', 'sec s second', 'min minute', 'h hr hour', 'day', 'week', 'month', 'yr year',
  'mg milligram', 'g gram', 'kg kilogram', 'lb pound', 'oz ounce', 'ml milliliter millilitre', 'l liter litre', 'mph',
  'km/h kmh kph', 'm/s', 'deg degree', 'rad radian', 'dollar usd', 'cent', 'euro', '% percent percentage pct')
  for name in names.split()}
_POWERS = {'square': '^2', 'sq': '^2', 'cubic': '^3', 'cu': '^3'}
_SCALES = {'hundred': 2, 'thousand': 3, 'million': 6, 'billion': 9, 'trillion': 12}
_NOT_UNITS = {'pi', 'or', 'and', 'to', 'mod', 'sqrt', 'inf', 'infinity', *_SCALES}

_CHARACTERS = str.maketrans({
  '−': '-', '–': '-', '×': r'\times ', '·': r'\cdot ', '∙': r'\cdot ', '÷': '/', 'π': r'\pi ', '∞': r'\infty ',
  '°': r'^\circ', '≤': r'\le ', '≥': r'\ge ', '≠': r'\ne ', '∪': r'\cup ', '∩': r'\cap ', '±': r'\pm ', '²': '^2',
  '³': '^3', '½': r'\frac{1}{2}', '¼': r'\frac{1}{4}', '¾': r'\frac{3}{4}', '⅓': r'\frac{1}{3}', '⅔': r'\frac{2}{3}',
  '∅': r'\emptyset ', '∈': r'\in ', '‘': "'", '’': "'", '\u00a0': ' ', '\u2009': ' ', '\u202f': ' ', '（': '(',
  '）': ')', '，': ', ', '％': '%', '€': ' euro'})

_REWRITES = [(re.compile(pattern), to) for pattern, to in (
  # Appearance and spaces.
  (r'\\(?:left|right|[bB]ig+[lrm]?)(?![a-zA-Z])\.?|\\(?:displaystyle|limits|nolimits)(?![a-zA-Z])', ''),
  (r'\{,\}', ','), (r'(?<=\d),?\\[!,;: ] *(?=\d{3}(?!\d))', ','), (r'(?<!\\)\\[!,;: ]|\\q?quad(?![a-zA-Z])|~', ' '),
  (r'\\(?:text|mathrm|mbox|textbf|mathbf|textit|mathit|operatorname|textrm|textnormal|mathsf|rm|bf)\s*'
   r'\{([^{}]*)\}', r' \1 '),
  (r'\\[dtc]frac(?![a-zA-Z])', r'\\frac'),
  (r'\\(?:leq|leqslant)(?![a-zA-Z])|<=', r'\\le '), (r'\\(?:geq|geqslant)(?![a-zA-Z])|>=', r'\\ge '),
  (r'\\neq(?![a-zA-Z])|!=', r'\\ne '), (r'\\varnothing(?![a-zA-Z])', r'\\emptyset '),
  (r'\\lbrace(?![a-zA-Z])', r'\\{'), (r'\\rbrace(?![a-zA-Z])', r'\\}'), (r'\\%', '%'),
  (r'\\degree(?![a-zA-Z])|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])', ' degree '),
  # Formulas without LaTeX.
  (r'\*\*', '^'),
  (r'(?<![\d.])(\d+(?:\.\d+)?|\.\d+)\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s*([+-]?\d+)\s*\}?',
   r'\1\\times10^{\2}'),
  (r'(?<![\w.\\])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d+)(?![\w.])', r'\1\\times10^{\2}'),
  (r'\^\s*\(([^()]*)\)', r'^{\1}'), (r'\^\s*(-?\d+)', r'^{\1}'),
  (r'(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)', r'\\sqrt{\1}'), (r'(?<![\\a-zA-Z])sqrt\s*(\d+)', r'\\sqrt{\1}'),
  (r'√\s*\(([^()]*)\)', r'\\sqrt{\1}'), (r'√\s*(\w+)', r'\\sqrt{\1}'),
  (r'(?<![\\a-zA-Z])pi\b', r'\\pi '), (r'(?<![\\a-zA-Z])(?:infinity|inf|oo)\b', r'\\infty '),
  (r'(?<![\\a-zA-Z])(sin|cos|tan|ln|log)\b', r'\\\1 '), (r'\*', r'\\cdot '),
  # Arguments without braces.
  (r'\\frac\s*(\d)\s*(\d)', r'\\frac{\1}{\2}'), (r'\\frac\s*(\d)\s*\{', r'\\frac{\1}{'),
  (r'\\sqrt\s*(\w)', r'\\sqrt{\1}'),
  # Numbers.
  (r'(?<![\w.}])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])', r'\1\\frac{\2}{\3}'),
  (r'(?<![\w.}])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}', r'(\1+\\frac{\2}{\3})'),
  (r'(?<![\w.])(\d+)\s+and\s+\(?(\d+)\s*/\s*(\d+)\)?', r'(\1+\\frac{\2}{\3})'),
  (r'(?<![\d.,])(?<!\d )0+(?=\d)', ''), (r'\s+', ' '))]

# Texts that a process keeps normalised and parsed: the rollouts of a task share its reference, and often an answer.
_KEPT = 4096


@functools.lru_cache(_KEPT)
def normal(text: str) -> tuple[str, str]:
  r"""The answer as LaTeX in one style, and its unit or '': r'\$1,234' is normalised to ('1234', 'dollar')."""
  if len(text) > _MOST_CHARACTERS:
    return text.strip(), ''
  text = trim(text.translate(_CHARACTERS))
  money = re.match(r'([+-]?)\s*\\?\$\s*(?=[\d.])', text) if text.count('$') % 2 else None
  if money:
    text = money[1] + text[money.end():]
  text = re.sub(r'\\?\$', '', text)
  for pattern, to in _REWRITES:
    text = pattern.sub(to, text)
  text, unit = _split_unit(trim(text))
  if re.fullmatch(r'[+-]?\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?', text):  # groups of thousands
    text = re.sub('[, ]', '', text)
  text = re.sub(r'^\(([A-Z])\)$', r'\1', text)
  return text, unit or ('dollar' if money else '')


def _split_unit(text: str) -> tuple[str, str]:
  """A quantity, and its unit or ''; words after a quantity that are not a known unit are dropped."""
  if found := re.fullmatch(r'(.*[\d})])\s*%', text):
    return found[1].strip(), '%'
  found = re.fullmatch(
      r'([^a-zA-Z]*\d|.*[\d})](?=\s)|[^a-zA-Z]*\\(?:frac|sqrt)\{.*\}|.*\\pi(?=\s))\s*'
      r"([a-zA-Z][a-zA-Z/' ]*)(?:\^\{?(\d)\}?)?", text)
  words = found[2].lower().split() if found else []
  if not words or _NOT_UNITS & set(words[1:]) or len(words[0]) == 1 and not re.search(r'\s', text):
    return text, ''
  quantity = found[1].strip()
  if words[0] in _SCALES:
    quantity, words = rf'{quantity}\times10^{{{_SCALES[words[0]]}}}', words[1:]
  elif words[0] in _NOT_UNITS or len(words[0]) == 1 and words[0] not in _UNITS:
    return text, ''
  power = f'^{found[3]}' if found[3] else ''
  if words and words[0] in _POWERS:
    power, words = _POWERS[words[0]], words[1:]
  elif words and words[-1] in ('squared', 'cubed'):
    power, words = '^2' if words[-1] == 'squared' else '^3', words[:-1]
  name = ' '.join(words)
  unit = _UNITS.get(name) or _UNITS.get(name.removesuffix('s'))
  return quantity, unit + power if unit else ''


def _is_words(text: str) -> bool:
  return bool(re.fullmatch(r"[^\W\d_]{2,}(?:[ '.-]+[^\W\d_]+)*", text))


def _squeezed(text: str) -> str:
  """The text for comparison as text: without spaces, words in lower case."""
  text = text.casefold() if _is_words(text) else text
  text = re.sub(r'(?<!\d)\s+|\s+(?!\d)', '', text)  # '1 2' is not '12'
  return re.sub(r'\{(\w)\}', r'\1', text)


def same(answer: str, reference: str) -> bool:
  """Whether an answer is the reference, by the conventions above; an empty answer is not."""
  (a, unit), (b, reference_unit) = normal(answer), normal(reference)
  if unit and reference_unit and unit != reference_unit:
    if {unit, reference_unit} != {'dollar', 'cent'}:
      return False
    a, b = (x if u == 'cent' else rf'100\cdot({x})' for x, u in ((a, unit), (b, reference_unit)))
  if not a or not b:
    return False
  if _same(a, b):
    return True
  if (unit == '%') != (reference_unit == '%'):
    a, b = (rf'\frac{{{x}}}{{100}}' if u == '%' else x for x, u in ((a, unit), (b, reference_unit)))
    return _same(a, b)
  return False


def _same(a: str, b: str) -> bool:
  if _squeezed(a) == _squeezed(b):
    return True
  if _is_words(a) or _is_words(b) or _is_huge(a) or _is_huge(b):
    return False
  (digits_a, base_a), (digits_b, base_b) = _split_base(a), _split_base(b)
  if base_a or base_b:
    return digits_a == digits_b and (not base_a or not base_b or base_a == base_b)
  (name_a, value_a), (name_b, value_b) = _split_name(a), _split_name(b)
  if name_a and name_b and name_a != name_b or bool(name_a) != bool(name_b) and '=' in a and '=' in b:
    return _same_formula(a, b)
  a, b = value_a, value_b
  split_a, split_b = _split(a), _split(b)
  if split_a and split_b:
    (kind_a, parts_a), (kind_b, parts_b) = split_a, split_b
    kinds = {kind_a, kind_b}
    if len(kinds) > 1 and kinds not in ({'', '{}'}, {'', '()'}):
      return False
    if kinds <= {'', '{}', 'cup'}:
      return (all(any(_same(x, y) for y in parts_b) for x in parts_a)
              and all(any(_same(y, x) for x in parts_a) for y in parts_b))
    return len(parts_a) == len(parts_b) and all(map(_same, parts_a, parts_b))
  if (split_a or split_b) and not _RELATION.search(a + b):
    one, (kind, parts) = (a, split_b) if split_b else (b, split_a)
    return kind == '{}' and len(parts) == 1 and _same(one, parts[0])  # a set of one element needs no brackets
  return _same_formula(a, b)


_RELATION = re.compile(r'[<>=]|\\(?:le|ge|ne|lt|gt|in|pm|emptyset)(?![a-zA-Z])')


def _split_base(text: str) -> tuple[str, str]:
  """The digits and the base of '1011_2'; (text, '') for a text of another form."""
  found = re.fullmatch(r'([\dA-F]+)_\{?(\d+)\}?', text)
  return (found[1], found[2]) if found else (text, '')


def _split_name(text: str) -> tuple[str, str]:
  r"""The name and the value of 'x = 3' or 'x \in {3}'; ('', text) for a text of another form."""
  found = re.fullmatch(
      r"\s*([a-zA-Z](?:_\{?\w+\}?|'|\([a-z]\))?|\\[a-zA-Z]+|\([a-z](?:\s*,\s*[a-z])+\))"
      r"\s*(?:=|\\in(?![a-zA-Z]))\s*([^=]*(?:=[^=]*)*)", text)
  if (not found or re.match(r'\\(?:frac|sqrt|sin|cos|tan|log|ln)(?![a-zA-Z])', found[1])
      or '=' in found[2] and re.search(r'[,;]|\b(?:and|or)\b', found[2])):
    return '', text
  return re.sub(r'[\s{}]', '', found[1]), found[2].split('=')[-1].strip()


def _split(text: str) -> tuple[str, list[str]] | None:
  """The kind and the parts of a collection; None: the text is no collection.

  The kind of a set, tuple or interval is its two brackets, of a union 'cup', of a list without brackets ''.
  """
  if re.search(r'\\begin\b', text):
    return None
  for kind, separator in ('cup', r'\\cup(?![a-zA-Z])|\bU\b'), ('', r',(?:\s*(?:and|or)\b)?|;|(?<=\s)(?:and|or)\b'):
    parts = _split_at(text, separator)
    if len(parts) > 1:
      return kind, parts
  if found := re.fullmatch(r'(\\\{|[(\[])(.*?)(\\\}|[)\]])', text.strip(), re.DOTALL):
    parts = _split_at(found[2], '[,;]')
    if len(parts) > 1 or found[1] == '\\{':
      return found[1].removeprefix('\\') + found[3].removeprefix('\\'), parts
  return None


_DEPTH = {'(': 1, '[': 1, '{': 1, ')': -1, ']': -1, '}': -1}  # of nesting


def _split_at(text: str, separator: str) -> list[str]:
  """The parts between matches of a regex outside of brackets; [text] if brackets do not match."""
  parts, start, depth = [], 0, 0
  for token in re.finditer(rf'{separator}|[][(){{}}]', text):
    depth += _DEPTH.get(token[0], 0)
    if depth < 0:
      return [text]
    if depth == 0 and token[0] not in _DEPTH:
      parts.append(text[start:token.start()].strip())
      start = token.end()
  return [*parts, text[start:].strip()] if depth == 0 else [text]


def _is_huge(text: str) -> bool:
  """Whether parsing the text could take long."""
  nesting = max(itertools.accumulate(_DEPTH.get(character, 0) for character in text), default=0)
  return len(text) > _MOST_CHARACTERS or nesting > _MOST_NESTING or not text.isprintable()


@functools.lru_cache(_KEPT)
def _parse(text: str) -> Any:
  """The SymPy object of a text, decimals as fractions; None: no formula, or a number of too many digits."""
  import math_verify  # here, as the import takes a second and runs of other verifiers do not need it
  logging.getLogger('math_verify').setLevel(logging.ERROR)  # it warns that its own time limit is off
  text = re.sub(r'(\d*)\.(\d*)\\overline\{(\d+)\}|(\d*)\.(\d*)\\dot\{?(\d)\}?', _repeating, text)
  text = re.sub(r'(\d*)\.(\d+)', _fraction, text)
  config = math_verify.LatexExtractionConfig(normalization_config=math_verify.LatexNormalizationConfig(
      basic_latex=True, units=False, malformed_operators=True, nits=True, boxed='none'))
  # Its own time limit is a signal, which works in main threads only; the time limit of worker processes holds.
  parsed = math_verify.parse(f'${text}$', [config], parsing_timeout=None, fallback_mode='no_fallback')
  return parsed[0] if parsed and _digits(parsed[0]) <= _MOST_DIGITS else None


def _fraction(decimal: re.Match[str]) -> str:
  return rf'\frac{{{int(decimal[1] + decimal[2])}}}{{{10 ** len(decimal[2])}}}'


def _repeating(decimal: re.Match[str]) -> str:
  whole, once, again = (x or '' for x in (decimal.groups()[:3] if decimal[3] else decimal.groups()[3:]))
  nines = 10 ** len(again) - 1
  return rf'\frac{{{int((whole + once or "0")) * nines + int(again)}}}{{{nines * 10 ** len(once)}}}'


def _digits(x: Any) -> float:
  """A bound on the digits of a number, or of a polynomial, that evaluation of a SymPy object could give."""
  import sympy
  if getattr(x, 'is_Rational', False):
    return math.log10(max(abs(x.p), x.q, 2))
  inner = [_digits(y) for y in getattr(x, 'args', ())] or [1.0]
  power_of_ten = lambda digits: 10 ** min(digits, 9)
  if isinstance(x, (sympy.Pow, sympy.exp)):
    return inner[0] * power_of_ten(inner[-1])
  if isinstance(x, (sympy.factorial, sympy.binomial, sympy.factorial2)):
    return inner[0] * power_of_ten(inner[0])
  return sum(inner)


def _same_formula(a: str, b: str) -> bool:
  """Whether SymPy finds two formulas equal; formulas that it cannot read or compare are not."""
  try:
    import math_verify
    import sympy
    x, y = _parse(a), _parse(b)
    if x is None or y is None:
      return False
    if all(isinstance(z, sympy.Expr) and z.is_number for z in (x, y)):
      return _same_number(x, y, a, b)
    return math_verify.verify(y, x, timeout_seconds=None, allow_set_relation_comp=True)
  except Exception:  # RecursionError and MemoryError too
    return False


def _same_number(x: Any, y: Any, a: str, b: str) -> bool:
  """Whether numbers x and y, written as a and b, are equal by the convention of decimals above."""
  x, y = x.doit(), y.doit()
  if x == y:
    return True
  exact = x.is_Rational and y.is_Rational
  x, y = x.evalf(40), y.evalf(40)
  if not (x.is_finite and y.is_finite):
    return False
  apart = abs(x - y)
  if not exact and apart <= 1e-25 * abs(y):
    return True
  decimals = [found for found in (re.fullmatch(r'-?(\d*)\.(\d+)', z) for z in (a, b)) if found]
  if len(decimals) != 1:
    return False
  whole, places = decimals[0].groups()
  return len((whole + places).lstrip('0')) >= 6 and bool(apart <= 10.0 ** -len(places))


def canonical(answer: str) -> str | None:
  """A text that equal answers share, unless only `same` can tell (0.333333 and 1/3); None for an empty answer."""
  return _canonical(normal(answer)[0]) or None


def _canonical(text: str) -> str:
  if _is_words(text) or _is_huge(text):
    return _squeezed(text)
  _, text = _split_name(text)
  split = _split(text)
  if split:
    kind, parts = split[0], [_canonical(part) for part in split[1]]
    if kind in ('', '{}', 'cup'):
      kind, parts = kind or '{}', sorted(set(parts))
      if len(parts) == 1:
        return parts[0]
    return f'{kind}: {", ".join(parts)}'
  try:
    import sympy
    x = _parse(text)
    if x is None:
      return _squeezed(text)
    if isinstance(x, sympy.Expr) and x.is_number:
      x = x.doit()
      return str(x) if x.is_Rational or not x.is_finite else str(x.evalf(20).evalf(15))
    return str(sympy.expand(x) if isinstance(x, sympy.Expr) else x)
  except Exception:  # RecursionError and MemoryError too
    return _squeezed(text)
