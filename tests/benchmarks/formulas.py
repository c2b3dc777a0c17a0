r"""Whether two answers differ, by a small parser of LaTeX and values at random points.

Independent of kr_jax.rewards and of SymPy, so that it can judge them. It knows the notation of school mathematics, and
says None, in doubt, to all else.
"""

from __future__ import annotations

import random
import re

import mpmath

_TOKEN = re.compile(r'\d+(?:\.\d+)?(?:[eE]-?\d+)?|\.\d+|[a-zA-Z]{3,}|\\[a-zA-Z]+|\\.|\S', re.DOTALL)
_FUNCTIONS = {name: getattr(mpmath, function) for name, function in {
    'sin': 'sin', 'cos': 'cos', 'tan': 'tan', 'cot': 'cot', 'sec': 'sec', 'csc': 'csc', 'arcsin': 'asin',
    'arccos': 'acos', 'arctan': 'atan', 'ln': 'log', 'exp': 'exp', 'sinh': 'sinh', 'cosh': 'cosh'}.items()}
_STOPS = {'+', '-', ')', '}', ']', '|', ',', '*', '/', '\\cdot', '\\times', '\\div', '^', '_', '!'}
_GREEK = ('alpha beta gamma delta epsilon varepsilon theta lambda mu nu rho sigma tau phi varphi omega psi xi eta '
          'Gamma Delta Theta Lambda Sigma Phi Omega Psi').split()
_DIGITS = 40
_RELATION = re.compile(r'(\\(?:leqslant|geqslant|leq|geq|le|ge|lt|gt|neq|ne)(?![a-zA-Z])|[<>=])')


class _Unknown(Exception):
  """The text is of a form that the parser does not know."""


class _Parser:
  """Recursive descent; letters have values that depend on their names and the seed."""

  def __init__(self, text: str, seed: int):
    self.tokens, self.at, self.seed = _TOKEN.findall(text), 0, seed

  def peek(self) -> str:
    return self.tokens[self.at] if self.at < len(self.tokens) else ''

  def next(self) -> str:
    self.at += 1
    return self.tokens[self.at - 1] if self.at <= len(self.tokens) else ''

  def expect(self, token: str) -> None:
    if self.next() != token:
      raise _Unknown

  def variable(self, name: str) -> mpmath.mpf:
    return mpmath.mpf(random.Random(f'{name} {self.seed}').uniform(1, 2))

  def total(self) -> mpmath.mpf:
    value = self.product()
    while self.peek() in ('+', '-'):
      value = value + self.product() if self.next() == '+' else value - self.product()
    return value

  def product(self) -> mpmath.mpf:
    if self.peek() in ('+', '-'):
      return self.product() if self.next() == '+' else -self.product()
    value = self.power()
    while self.peek() and self.peek() not in _STOPS - {'*', '/', '\\cdot', '\\times', '\\div'}:
      token = self.peek()
      if token in ('*', '\\cdot', '\\times'):
        self.next()
        value *= self.signed()
      elif token in ('/', '\\div'):
        self.next()
        value /= self.signed()
      elif token[0].isdigit() or token[0] == '.':
        raise _Unknown  # 2 3, x2
      elif token in ('\\frac', '\\dfrac', '\\tfrac') and re.fullmatch(r'\d+', self.tokens[self.at - 1]):
        value += self.power()  # a mixed number
      else:
        value *= self.power()
    return value

  def signed(self) -> mpmath.mpf:
    if self.peek() == '-':
      self.next()
      return -self.signed()
    return self.power()

  def power(self) -> mpmath.mpf:
    value = self.atom()
    while self.peek() in ('^', '!'):
      value = mpmath.power(value, self.argument()) if self.next() == '^' else mpmath.factorial(value)
    return value

  def argument(self) -> mpmath.mpf:
    """A group in braces, or one token."""
    if self.peek() == '{':
      return self.atom()
    if re.fullmatch(r'\d{2,}', self.peek()) and self.tokens[self.at - 1] != '^':
      first, self.tokens[self.at] = self.peek()[0], self.peek()[1:]  # \frac12
      return mpmath.mpf(first)
    return self.signed() if self.peek() == '-' else self.atom()

  def group(self, end: str) -> mpmath.mpf:
    value = self.total()
    self.expect(end)
    return value

  def atom(self) -> mpmath.mpf:
    token = self.next()
    if token[:1].isdigit() or token[:1] == '.' and len(token) > 1:
      if self.peek() == '_':
        return mpmath.mpf(int(token, int(self.subscript().strip('{}'))))
      return mpmath.mpf(token)
    if token in ('{', '('):
      return self.group('}' if token == '{' else ')')
    if token == '|':
      return abs(self.group('|'))
    if token in ('\\frac', '\\dfrac', '\\tfrac', '\\cfrac'):
      top = self.argument()
      return top / self.argument()
    if token == '\\binom':
      top = self.argument()
      return mpmath.binomial(top, self.argument())
    if token == '\\sqrt':
      index = self.group(']') if self.peek() == '[' and self.next() else 2
      return mpmath.power(self.argument(), 1 / mpmath.mpf(index))
    return self.name(token)

  def subscript(self) -> str:
    self.expect('_')
    text = self.next()
    while text.count('{') > text.count('}'):
      text += self.next() or '}}'
    return text

  def name(self, token: str) -> mpmath.mpf:
    """A constant, a variable or a function."""
    word = token.removeprefix('\\')
    if token == '\\pi':
      return +mpmath.pi
    if token == 'e':
      return +mpmath.e
    if token == 'i':
      return mpmath.mpc(0, 1)
    if token == '\\log' or token.startswith('\\') and word in _FUNCTIONS:
      base = self.subscript() if word == 'log' and self.peek() == '_' else '10'
      exponent = self.argument() if self.peek() == '^' and self.next() else 1
      value = self.power()
      while self.peek() and self.peek() not in _STOPS and self.peek().removeprefix('\\') not in _FUNCTIONS:
        value *= self.power()
      if word == 'log':
        return (mpmath.log(value) / mpmath.log(_Parser(base, self.seed).total())) ** exponent
      return _FUNCTIONS[word](value) ** exponent
    if re.fullmatch('[a-zA-Z]', token) or token.startswith('\\') and word in _GREEK:
      return self.variable(token + (self.subscript().strip('{}') if self.peek() == '_' else ''))
    raise _Unknown


def _clean(text: str) -> str:
  """The text without spacing, units behind a number, and a name in front."""
  text = text.replace('$', '').replace('−', '-').replace('{,}', ',').replace(',\\!', ',')
  text = re.sub(r'\\(?:left|right|displaystyle|big|Big)(?![a-zA-Z])|\\[,;:! ]|~|\\\$', ' ', text)
  text = re.sub(r'\^\s*\{?\s*\\circ\s*\}?|\\degree|\\?%', '', text).strip().rstrip('.')
  text = re.sub(r'(?<=[\d)}])\s*\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$', '', text)
  text = re.sub(r'(?<=\d)\s*(?:~\\mathrm\{\w+\}|[a-z]{2,}(?: [a-z]+)*)(?:\^\{?\d\}?)?$', '', text)
  if re.fullmatch(r'-?[1-9]\d{0,2}(?:,\s?\d{3})+(?:\.\d+)?', text):
    text = re.sub(r'[,\s]', '', text)
  return re.sub(r'^[a-zA-Z](?:_\{?\w\}?)?\s*=(?=[^=<>]+$)', '', text).strip()


def split(text: str, separator: str) -> list[str]:
  """The parts between matches of a regex that stand outside of brackets."""
  parts, depth, start = [], 0, 0
  for token in re.finditer(rf'\\[{{}}]|[][(){{}}]|{separator}', text):
    if token[0].removeprefix('\\') in ('{', '(', '['):
      depth += 1
    elif token[0].removeprefix('\\') in ('}', ')', ']'):
      depth -= 1
    elif depth == 0:
      parts.append(text[start:token.start()].strip())
      start = token.end()
  return [*parts, text[start:].strip()]


def value(text: str, seed: int = 0) -> mpmath.mpf | None:
  """The value of a formula, its letters at random points; None: it is not known."""
  parser = _Parser(_clean(text), seed)
  try:
    with mpmath.workdps(_DIGITS):
      found = parser.total()
    return found if parser.at >= len(parser.tokens) and mpmath.isfinite(found) else None
  except (_Unknown, ZeroDivisionError, OverflowError, ValueError, RecursionError, TypeError, MemoryError, IndexError):
    return None


def _apart(a: str, b: str) -> bool | None:
  """Whether the values of two formulas differ."""
  for seed in (1, 2):
    x, y = value(a, seed), value(b, seed)
    if x is None or y is None:
      return None
    with mpmath.workdps(_DIGITS):
      if abs(x - y) > mpmath.mpf(10) ** (-_DIGITS // 2) * max(abs(x), abs(y)):
        return True
  return False


def _parts(text: str) -> tuple[str, list[str]]:
  """The brackets of a collection and its elements; ('', [text]) for one value."""
  found = re.fullmatch(r'(\\\{|[(\[])(.*)(\\\}|[)\]])', text, re.DOTALL)
  if found:
    parts = split(found[2], ',')
    if found[1] == '\\{' or len(parts) > 1:
      return found[1] + found[3], parts
  return '', split(text, r',|;|\\text\s*\{\s*(?:and|or)\s*\}')


def _word(text: str) -> str:
  """A text of words alone in one form; '' for others."""
  text = re.sub(r'\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}', r'\1', text.replace('$', ''))
  return text.strip(' .').casefold() if re.fullmatch(r'[ a-zA-Z]*[a-zA-Z]{3,}[ a-zA-Z.]*', text) else ''


def differ(a: str, b: str) -> bool | None:
  """Whether two answers differ; None: in doubt."""
  word_a, word_b = _word(a), _word(b)
  if word_a or word_b:
    return word_a.replace(' ', '') != word_b.replace(' ', '') if word_a and word_b else (
        True if value(b if word_a else a) is not None else None)
  one_percent = ('%' in a) != ('%' in b)
  if bool(re.search(r'\d_', a)) != bool(re.search(r'\d_', b)):
    return None  # a base that one side leaves out
  a, b = _clean(a), _clean(b)
  relations_a, relations_b = _RELATION.split(a), _RELATION.split(b)
  if len(relations_a) > 1 or len(relations_b) > 1:
    return _relations_differ(relations_a, relations_b)
  (kind_a, parts_a), (kind_b, parts_b) = _parts(a), _parts(b)
  if len(parts_a) == len(parts_b) == 1:
    apart = _apart(parts_a[0], parts_b[0])
    if apart and one_percent:
      return None if any(_apart(rf'100({x})', y) is False for x, y in ((a, b), (b, a))) else True
    return apart
  ordered = any(kind and kind != r'\{\}' for kind in (kind_a, kind_b))
  found = [[_apart(x, y) for y in parts_b] for x in parts_a]
  if any(x is None for row in found for x in row):
    return None
  if ordered:
    if kind_a and kind_b and kind_a != kind_b or len(parts_a) != len(parts_b):
      return True
    return any(found[i][i] for i in range(len(parts_a)))
  return any(map(all, found)) or any(map(all, zip(*found)))


def _relations_differ(a: list[str], b: list[str]) -> bool | None:
  """Of 'left relation right' each: other values at one side, or equations that are no multiple of each other."""
  if len(a) != len(b) or len(a) != 3 or a[1] != b[1]:
    return None
  if a[1] == '=':
    ratios = []
    for seed in (1, 2, 3):
      values = [value(x, seed) for x in (a[0], a[2], b[0], b[2])]
      if None in values or values[0] == values[1]:
        return None
      ratios.append((values[2] - values[3]) / (values[0] - values[1]))
    return any(abs(x - ratios[0]) > 1e-9 * abs(x) for x in ratios)
  simple = re.fullmatch('[a-zA-Z]', a[0].strip()) and a[0].strip() == b[0].strip()
  return _apart(a[2], b[2]) if simple else None
