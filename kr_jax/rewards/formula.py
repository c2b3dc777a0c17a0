r"""Formulas: tokens -> a tree -> its value at given values of the variables.

Two formulas are equal where their values are at random points, which no rewriting can hide: exactly where all is
rational, else to 25 of 50 digits. There is no search for a simplification, so that a formula costs what its
operations cost, and one whose numbers would grow beyond all limits is refused (`TooLarge`) before they do.

A node is a tuple: ('number', Fraction), ('name', text) or (operation, node, ...).

Imports nothing heavy but mpmath.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
import functools
import math
import random
from typing import Any, NamedTuple

import mpmath

from kr_jax.rewards import notation
from kr_jax.rewards.notation import Token, Tokens

Node = tuple[Any, ...]
Number = Any  # Fraction where exact, else a number of mpmath

_MOST_BITS = 40_000  # of an exact number: 12,000 digits
_MOST_MAGNITUDE = 10_000  # of an inexact number, in powers of two
_MOST_FACTORIAL = 3_000
_MOST_TOKENS, _MOST_NESTING = 600, 30
_DIGITS = 50

mp = mpmath.MPContext()
mp.dps = _DIGITS


class NotAFormula(ValueError):
  """The tokens are no formula that is read here."""


class NoValue(ArithmeticError):
  """A formula has no value: it divides by zero."""


class TooLarge(ArithmeticError):
  """The value has too many digits."""


class Reading(NamedTuple):
  """How to read notation that means one thing here and another there."""

  calls: bool = True  # a(x + 1) is a function's value, not a product
  log_base: int = 0  # of \\log without a base; 0: e
  tight: bool = False  # 1/2x is 1/(2x)
  euler: bool = False  # 2e3 is a product, not 2000
  far: bool = True  # sin x y is sin(x y), not sin(x) y


# Reading.

_FUNCTIONS = {
    'sin': 'sin', 'cos': 'cos', 'tan': 'tan', 'tg': 'tan', 'cot': 'cot', 'ctg': 'cot', 'sec': 'sec', 'csc': 'csc',
    'sinh': 'sinh', 'cosh': 'cosh', 'tanh': 'tanh', 'coth': 'coth', 'ln': 'ln', 'log': 'log', 'lg': 'lg', 'exp': 'exp',
    'sqrt': 'sqrt', 'abs': 'abs', 'floor': 'floor', 'ceil': 'ceil', 'gcd': 'gcd', 'lcm': 'lcm', 'max': 'max',
    'min': 'min', 'factorial': 'factorial', 'binom': 'binom', 'cbrt': 'cbrt', 'sgn': 'sign', 'sign': 'sign',
    'Re': 're', 'Im': 'im', 'comb': 'binom', 'asinh': 'asinh', 'acosh': 'acosh', 'atanh': 'atanh', 'arcsinh': 'asinh',
    'arccosh': 'acosh', 'arctanh': 'atanh', 'arsinh': 'asinh', 'arcosh': 'acosh', 'artanh': 'atanh', 'erf': 'erf',
    'log2': 'log2', 'log10': 'lg', 'gamma': 'gamma'}
_FUNCTIONS |= {arc + name: 'a' + name for name in ('sin', 'cos', 'tan', 'cot', 'sec', 'csc') for arc in ('arc', 'a')}
_INVERSES = {name: 'a' + name for name in ('sin', 'cos', 'tan', 'cot', 'sec', 'csc', 'sinh', 'cosh', 'tanh')}
_WORDS = {'pi': ('name', 'pi'), 'inf': ('infinity',), 'infinity': ('infinity',), 'oo': ('infinity',)}
_GREEK = notation.GREEK_NAMES - {'mu', 'nu', 'xi'}  # without a backslash these are products
_DECORATIONS = ('vec', 'hat', 'dot', 'ddot', 'tilde', 'overline', 'widetilde', 'mathbb', 'mathfrak')
_TIMES = ('cdot', 'times')
_MODULES = ('np', 'numpy', 'math', 'sympy', 'sp', 'cmath')


def parse(tokens: Tokens, reading: Reading = Reading()) -> Node:
  """The tree of a formula. Raises NotAFormula."""
  if len(tokens) > _MOST_TOKENS:
    raise NotAFormula(f'{len(tokens)} tokens')
  level = deepest = 0
  for token in tokens:
    level += notation.depth(token)
    deepest = max(deepest, level)
  if deepest > _MOST_NESTING or level:
    raise NotAFormula('brackets')
  return _Reader(tokens, reading).whole()


class _Reader:
  """A recursive descent over tokens."""

  def __init__(self, tokens: Tokens, reading: Reading):
    self._tokens, self._i, self._reading = list(tokens), 0, reading
    self._bars = 0  # of absolute values that are open
    self._deep = 0

  def _peek(self, ahead: int = 0) -> Token:
    i = self._i + ahead
    return self._tokens[i] if i < len(self._tokens) else Token('end of text', '')

  def _next(self) -> Token:
    token = self._peek()
    self._i += 1
    return token

  def _expect(self, text: str) -> None:
    if not self._next().is_op(text):
      raise NotAFormula(f'{text} is missing')

  def whole(self) -> Node:
    node = self._infix(self.sum())
    if self._i < len(self._tokens):
      raise NotAFormula(f'{self._peek()} is left')
    return node

  def sum(self) -> Node:
    self._deep += 1
    if self._deep > 4 * _MOST_NESTING:
      raise NotAFormula('nesting')
    node = self._term()
    while self._peek().is_op('+', '-') or self._peek().is_command('pm', 'mp'):
      sign = self._next().text
      node = ({'+': 'add', '-': 'subtract'}.get(sign, sign), node, self._term())
    self._deep -= 1
    return node

  def _term(self) -> Node:
    node = self._unary()
    while True:
      token = self._peek()
      if token.is_op('*') or token.is_command(*_TIMES):
        self._next()
        node = ('multiply', node, self._unary())
      elif token.is_op('/'):
        self._next()
        divisor = self._unary()
        while self._reading.tight and self._starts_factor():
          divisor = ('multiply', divisor, self._power())
        node = ('divide', node, divisor)
      elif self._starts_factor():
        node = ('multiply', node, self._power())
      else:
        return node

  def _unary(self) -> Node:
    token = self._peek()
    if token.is_op('-', '+'):
      self._next()
      node = self._unary()
      return node if token.text == '+' else ('subtract', ('number', Fraction(0)), node)
    if token.is_command('pm', 'mp'):
      self._next()
      return (token.text, ('number', Fraction(0)), self._unary())
    return self._power()

  def _starts_factor(self) -> bool:
    token = self._peek()
    if token.kind in ('name', 'word', 'text', 'begin'):
      return True
    if token.kind == 'number':  # 2 3 is no product, x2 and (x)2 are
      before = self._tokens[self._i - 1]
      if before.kind == 'number' and token.text == '10' and self._peek(1).is_op('^'):  # 2.5 10^3
        return True
      return before.kind != 'number' and not (token.spaced and before.kind in ('text', 'word'))
    if token.kind == 'op':
      return token.text in ('(', '[', '{') or token.text in ('|', '||') and not self._bars
    return token.kind == 'command' and token.text not in (*_TIMES, *_NOT_FACTORS)

  def _power(self) -> Node:
    node = self._postfix(self._atom())
    if self._peek().is_op('^'):
      self._next()
      if self._peek().is_command('circ', 'degree'):
        self._next()
        return ('degrees', node)
      node = self._postfix(('power', node, self._exponent()))
    return node

  def _exponent(self) -> Node:
    token = self._peek()
    if token.is_op('-', '+'):
      self._next()
      inner = self._exponent()
      return inner if token.text == '+' else ('subtract', ('number', Fraction(0)), inner)
    if token.kind in ('word',):  # x^ab is x^a b
      letters = self._letters(token)
      self._tokens[self._i:self._i + 1] = letters
      return ('name', self._next().text)
    node = self._group('{') if token.is_op('{') else self._postfix(self._atom())
    if self._peek().is_op('^'):  # 2^3^2 is 2^(3^2)
      self._next()
      node = ('power', node, self._exponent())
    return node

  def _postfix(self, node: Node) -> Node:
    while True:
      token = self._peek()
      if token.is_op('!'):
        self._next()
        if self._peek().is_op('!') and not self._peek().spaced:
          self._next()
          node = ('double_factorial', node)
        else:
          node = ('factorial', node)
      elif token.is_command('degree'):
        self._next()
        node = ('degrees', node)
      else:
        return node

  def _letters(self, token: Token) -> list[Token]:
    """A word as variables; short ones only, as others are words of a language."""
    if len(token.text) > 4 or not token.text.isalpha():
      raise NotAFormula(token.text)
    return [Token('name', letter, token.spaced and i == 0) for i, letter in enumerate(token.text)]

  def _atom(self) -> Node:
    token = self._peek()
    read = {'number': self._number, 'name': self._name, 'word': self._word, 'text': self._word,
            'command': self._command, 'op': self._bracket, 'begin': self._determinant}.get(token.kind)
    if read is None:
      raise NotAFormula(f'{token} begins nothing')
    return read()

  def _number(self) -> Node:
    token = self._next()
    value = Fraction(token.text + '0' if token.text.endswith('.') else token.text)
    if self._peek().is_command('overline', 'dot') and '.' in token.text:
      return ('number', self._repeating(token.text))
    e, sign, exponent = self._peek(), self._peek(1), self._peek(2)
    if e.kind == 'name' and e.text in 'eE' and not e.spaced and not self._reading.euler:
      signed = sign.is_op('-', '+') and not sign.spaced
      digits = exponent if signed else sign
      if digits.kind == 'number' and digits.text.isdigit() and not digits.spaced:
        self._i += 3 if signed else 2
        ten = ('power', ('number', Fraction(10)), ('number', Fraction(('-' if sign.text == '-' else '') + digits.text)))
        return ('multiply', ('number', value), ten)
    if token.text.isdigit():
      return self._mixed(value)
    return ('number', value)

  def _mixed(self, whole: Fraction) -> Node:
    """A whole number, and a proper fraction that follows at once: 2 1/3."""
    second = self._peek()
    if second.is_command('frac'):
      begin = self._i
      fraction = self._command()
      if all(part[0] == 'number' and part[1].denominator == 1 for part in fraction[1:]) and fraction[1][1] < fraction[2][1]:
        return ('add', ('number', whole), fraction)
      self._i = begin
    elif (second.kind == 'number' and second.spaced and second.text.isdigit() and self._peek(1).is_op('/')
          and self._peek(2).kind == 'number' and self._peek(2).text.isdigit() and int(self._peek(2).text)):
      fraction = Fraction(int(second.text), int(self._peek(2).text))
      self._i += 3
      return ('number', whole + fraction)
    return ('number', whole)

  def _repeating(self, text: str) -> Fraction:
    """0.1\\overline{6}: the number whose last digits repeat for ever."""
    self._next()
    group = self._argument_tokens()
    if len(group) != 1 or not group[0].text.isdigit():
      raise NotAFormula('a repeating decimal')
    whole, _, once = text.partition('.')
    again, nines = group[0].text, 10 ** len(group[0].text) - 1
    return Fraction(int((whole + once) or '0') * nines + int(again), nines * 10 ** len(once))

  def _name(self) -> Node:
    name = self._next().text
    self._subscript_before_power()
    if self._peek().is_op('_'):
      self._next()
      name += '_' + notation.written(self._argument_tokens())
    name += self._primes()
    if self._peek().is_op('(') and name not in ('pi', 'e', 'i'):
      if call := self._call(name):
        return call
    return ('name', name)

  def _subscript_before_power(self) -> None:
    """Puts v^2_0 in the order of v_0^2."""
    if not self._peek().is_op('^'):
      return
    begin = self._i
    self._next()
    power = self._argument_tokens()
    if self._peek().is_op('_'):
      self._next()
      index = self._argument_tokens()
      braced = lambda inner: [Token('op', '{'), *inner, Token('op', '}')]
      self._tokens[begin:self._i] = [Token('op', '_'), *braced(index), Token('op', '^'), *braced(power)]
    self._i = begin

  def _primes(self) -> str:
    """The primes that follow a name, y' or y^{\\prime}."""
    begin, marks = self._i, ()
    if self._peek().is_op('^'):
      self._next()
      marks = self._argument_tokens() if self._peek().is_op('{') else ()
    while self._peek().is_op("'"):
      marks += (self._next(),)
    if marks and all(mark.is_op("'") for mark in marks):
      return "'" * len(marks)
    self._i = begin
    return ''

  def _call(self, name: str) -> Node | None:
    """A function's value f(x, 2); None where the brackets hold a factor."""
    begin = self._i
    try:
      arguments = self._arguments()
    except NotAFormula:
      self._i = begin
      return None
    # A variable times one number would be written with the number in front.
    if self._reading.calls or len(arguments) > 1 or arguments[0][0] == 'number':
      return ('call', ('name', name), *arguments)
    self._i = begin
    return None

  def _arguments(self) -> list[Node]:
    """What stands in round brackets, divided by commas."""
    bars, self._bars = self._bars, 0
    self._expect('(')
    found = [self.sum()]
    while self._peek().is_op(',', ';'):
      self._next()
      found.append(self.sum())
    self._expect(')')
    self._bars = bars
    return found

  def _word(self) -> Node:
    token = self._peek()
    text = token.text
    if text in _MODULES and self._peek(1).is_op('.'):
      self._i += 2
      return self._atom()
    if text in _FUNCTIONS:
      self._next()
      return self._function(_FUNCTIONS[text])
    if text.lower() in _WORDS:
      self._next()
      return _WORDS[text.lower()]
    if text in _GREEK or token.kind == 'text' and (len(text) == 1 or self._peek(1).is_op('_')):
      self._tokens[self._i] = Token('name', text, token.spaced)
    elif token.kind == 'text':
      raise NotAFormula(text)
    else:
      self._tokens[self._i:self._i + 1] = self._letters(token)
    return self._name()

  def _function(self, name: str) -> Node:
    base = power = None
    if self._peek().is_op('_'):
      self._next()
      base = self._argument()
    if self._peek().is_op('^'):
      self._next()
      power = self._exponent()
      if power == ('subtract', ('number', Fraction(0)), ('number', Fraction(1))) and name in _INVERSES:
        name, power = _INVERSES[name], None
    if name == 'sqrt' and self._peek().is_op('['):
      self._next()
      base = self.sum()
      self._expect(']')
    if self._peek().is_op('('):
      arguments = self._arguments()
      if self._peek().is_op('^') and power is None and len(arguments) == 1:
        self._next()
        power = self._exponent()
    elif self._peek().is_op('{', '['):
      arguments = [self._group(self._peek().text)]
    elif name in ('sqrt', 'cbrt'):
      arguments = [self._number() if self._peek().kind == 'number' else self._argument()]
    else:
      arguments = [self._juxtaposed()]
    if name == 'log':
      node = ('log', arguments[0], base) if base is not None else self._log(arguments)
    elif name == 'sqrt':
      node = ('root', arguments[0], base if base is not None else ('number', Fraction(2)))
    elif base is not None:
      raise NotAFormula(f'{name} with an index')
    else:
      node = ('apply', name, *arguments)
    return node if power is None else ('power', node, power)

  def _log(self, arguments: list[Node]) -> Node:
    if len(arguments) > 1:  # as in Python, log(x, 2)
      return ('log', *arguments[:2])
    if self._reading.log_base:
      return ('log', arguments[0], ('number', Fraction(self._reading.log_base)))
    return ('apply', 'ln', arguments[0])

  def _juxtaposed(self) -> Node:
    """The argument of a function without brackets: factors up to the next function or operator."""
    sign = self._peek().is_op('-')
    if sign:
      self._next()
    node = self._power()
    while self._starts_factor() and not takes_factors(self._peek()) and not self._peek().is_op('(', '[') and (
        self._reading.far or node[0] == 'number'):
      node = ('multiply', node, self._power())
    if self._peek().is_op('/') and self._peek(1).kind == 'number':  # sin pi/4
      self._next()
      node = ('divide', node, self._power())
    return ('subtract', ('number', Fraction(0)), node) if sign else node

  def _argument_tokens(self) -> Tokens:
    """The tokens of an argument of a command: of a group in braces, or one."""
    if not self._peek().is_op('{'):
      token = self._next()
      if token.kind == 'number' and len(token.text) > 1 and token.text.isdigit():  # \\frac12
        self._i -= 1
        self._tokens[self._i:self._i + 1] = [token._replace(text=token.text[1:])]
        return (token._replace(text=token.text[0]),)
      return (token,)
    begin, level = self._i + 1, 0
    while True:
      token = self._next()
      if token.kind == 'end of text':
        raise NotAFormula('a brace does not close')
      level += notation.depth(token)
      if level == 0:
        return tuple(self._tokens[begin:self._i - 1])

  def _argument(self) -> Node:
    if self._peek().is_op('{'):
      return self._group('{')
    if self._peek().kind == 'number':
      return ('number', Fraction(self._argument_tokens()[0].text))
    if self._peek().kind == 'word':
      self._tokens[self._i:self._i + 1] = self._letters(self._peek())
      return ('name', self._next().text)
    return self._atom()

  def _group(self, opening: str) -> Node:
    """What stands in brackets, whose opening one comes next."""
    bars, self._bars = self._bars, 0
    self._next()
    node = self._infix(self.sum())
    self._expect({'{': '}', '(': ')', '[': ']'}[opening])
    self._bars = bars
    return node

  def _infix(self, top: Node) -> Node:
    """What stands before \\over or \\choose, and the rest after it; what stands there alone if there is none."""
    if self._peek().is_command('over'):
      self._next()
      return ('divide', top, self.sum())
    if self._peek().is_command('choose'):
      self._next()
      return ('apply', 'binom', top, self.sum())
    return top

  def _bracket(self) -> Node:
    token = self._peek()
    if token.text in ('(', '[', '{'):
      return self._group(token.text)
    if token.text == '|':
      self._next()
      self._bars += 1
      node = self.sum()
      self._expect('|')
      self._bars -= 1
      return ('apply', 'abs', node)
    raise NotAFormula(f'{token.text} begins nothing')

  def _command(self) -> Node:
    name = self._next().text
    if name == 'frac':
      return ('divide', self._argument(), self._argument())
    if name == 'binom':
      return ('apply', 'binom', self._argument(), self._argument())
    if name in _FUNCTIONS:
      return self._function(_FUNCTIONS[name])
    if name == 'infty':
      return ('infinity',)
    if name in ('lfloor', 'lceil'):
      node = self.sum()
      if not self._next().is_command('r' + name[1:]):
        raise NotAFormula(f'{name} does not close')
      return ('apply', 'floor' if name == 'lfloor' else 'ceil', node)
    if name in ('angle', 'measuredangle', 'triangle', 'odot'):
      return ('name', _points(name, self._points()))
    if name in _DECORATIONS:
      inside = self._argument_tokens()
      text = notation.written(inside)
      if name == 'overline' and len(text) == 2 and text.isupper():  # a segment
        text = ''.join(sorted(text))
      return ('name', f'{name} {text}')
    raise NotAFormula(f'\\{name}')

  def _points(self) -> str:
    text = ''
    while self._peek().kind in ('name', 'word', 'text') and self._peek().text.isalpha():
      text += self._next().text
    return text

  def _determinant(self) -> Node:
    raise NotAFormula('a matrix')


def takes_factors(token: Token) -> bool:
  """Whether a token is a function whose argument may stand without brackets."""
  return token.kind in ('word', 'text', 'command') and token.text in _FUNCTIONS and token.text not in ('sqrt', 'binom')


_NOT_FACTORS = frozenset((
    'le', 'ge', 'ne', 'in', 'notin', 'cup', 'cap', 'pm', 'mp', 'to', 'approx', 'equiv', 'pmod', 'bmod', 'mod', 'over',
    'choose', 'implies', 'land', 'lor', 'rfloor', 'rceil', 'rangle', 'circ', 'degree', 'setminus', 'subset',
    'subseteq', 'ldots', 'sim', 'perp', 'parallel', 'forall', 'exists', 'therefore', 'because', 'qed', 'checkmark'))


def _points(name: str, points: str) -> str:
  """A name of what three points make; an angle's outer points and all of a triangle's change places."""
  if name == 'triangle':
    points = ''.join(sorted(points))
  elif len(points) == 3:
    points = min(points, points[::-1])
  return f'{name} {points}'


def names(node: Node) -> frozenset[str]:
  """The variables of a formula."""
  if node[0] == 'name':
    return frozenset() if node[1] in _CONSTANTS else frozenset((node[1],))
  return frozenset().union(*(names(x) for x in node[1:] if isinstance(x, tuple)))


def has(node: Node, operation: str) -> bool:
  """Whether an operation occurs in a formula."""
  return node[0] == operation or any(has(x, operation) for x in node[1:] if isinstance(x, tuple))


# Values.

_CONSTANTS: dict[str, Callable[[], Number]] = {'pi': lambda: mp.pi(), 'e': lambda: mp.e(), 'i': lambda: mp.mpc(0, 1)}


def value(node: Node, at: Mapping[str, Number] | None = None) -> Number:
  """The value of a formula at values of its variables.

  Returns a Fraction where all is rational, else a number of mpmath; infinity is mp.inf or -mp.inf.
  Raises NoValue, TooLarge, or KeyError for a variable without a value.
  """
  operation = node[0]
  if operation == 'number':
    return node[1]
  if operation == 'name':
    if at and node[1] in at:
      return at[node[1]]
    return _CONSTANTS[node[1]]()
  if operation == 'infinity':
    return mp.inf
  if operation == 'apply':
    return _checked(_apply(node[1], [value(x, at) for x in node[2:]]))
  if operation == 'call':
    return _checked(_unknown(node[1][1], [value(x, at) for x in node[2:]]))
  return _checked(_OPERATIONS[operation](*(value(x, at) for x in node[1:])))


def _checked(x: Number) -> Number:
  if isinstance(x, Fraction):
    if x.numerator.bit_length() > _MOST_BITS or x.denominator.bit_length() > _MOST_BITS:
      raise TooLarge
  elif mp.isnan(x):
    raise NoValue
  elif not mp.isinf(x) and x and mp.mag(x) > _MOST_MAGNITUDE:
    raise TooLarge
  return x


def inexact(x: Number) -> Number:
  """The number as one of mpmath."""
  return mp.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def _arithmetic(operate):
  """An operation on exact numbers, and on numbers of mpmath where one is not exact."""
  def of(x, y):
    if isinstance(x, Fraction) and isinstance(y, Fraction):
      return operate(x, y)
    return operate(inexact(x), inexact(y))
  return of


@_arithmetic
def _divide(x: Number, y: Number) -> Number:
  if y == 0 or not isinstance(y, Fraction) and abs(y) < mp.mpf(10) ** -(_DIGITS - 8) and abs(x) > 1e-20:
    raise NoValue
  return x / y


def _power(x: Number, y: Number) -> Number:
  if x == 0 and (not isinstance(y, Fraction) and mp.re(y) <= 0 or isinstance(y, Fraction) and y <= 0):
    raise NoValue
  if isinstance(y, Fraction) and y.denominator == 1:
    n = int(y)
    if isinstance(x, Fraction):
      if abs(n) * max(x.numerator.bit_length(), x.denominator.bit_length()) > _MOST_BITS and abs(x) != 1 and x:
        raise TooLarge
      return x ** n if abs(x) != 1 else x ** (n % 2)
    if x and abs(mp.mag(x) * n) > _MOST_MAGNITUDE:
      raise TooLarge
    return x ** n
  if isinstance(y, Fraction) and y.denominator < 64:
    return _power(_root(x, Fraction(y.denominator)), Fraction(y.numerator))
  x, y = inexact(x), inexact(y)
  if x == 0:
    return mp.mpf(0)
  if mp.isinf(x) or mp.isinf(y):
    return x ** y
  if abs(mp.log(x) * y) > _MOST_MAGNITUDE:
    raise TooLarge
  return x ** y


def _root(x: Number, n: Number) -> Number:
  """The real n-th root where there is one, else the principal one."""
  if not isinstance(n, Fraction) or n.denominator > 1 or n < 1:
    return _power(x, _divide(Fraction(1), n))
  n = int(n)
  if n == 1:
    return x
  if isinstance(x, Fraction):
    if x < 0 and n % 2:
      return -_root(-x, Fraction(n))
    if x >= 0:
      top, bottom = _whole_root(x.numerator, n), _whole_root(x.denominator, n)
      if top is not None and bottom is not None:
        return Fraction(top, bottom)
  elif n % 2 and not isinstance(x, mp.mpc) and x < 0:
    return -mp.root(-x, n)
  x = inexact(x)
  return mp.sqrt(x) if n == 2 else mp.root(x, n)


def _whole_root(x: int, n: int) -> int | None:
  if n == 2:
    root = math.isqrt(x)
  elif x.bit_length() > 150:  # whose root needs more digits than are computed with
    return None
  else:
    root = int(mp.nint(mp.root(x, n)))
  return root if root ** n == x else None


def _factorial(x: Number, step: int = 1) -> Number:
  if isinstance(x, Fraction) and x.denominator == 1:
    n = int(x)
    if n < 0:
      raise NoValue
    if n > _MOST_FACTORIAL:
      raise TooLarge
    return Fraction(math.factorial(n) if step == 1 else math.prod(range(n, 0, -2)))
  if step > 1:
    raise NoValue
  return _gamma(inexact(x) + 1)


def _gamma(x: Number) -> Number:
  x = inexact(x)
  if mp.isinf(x) or abs(x) > _MOST_FACTORIAL:
    raise TooLarge
  if not isinstance(x, mp.mpc) and x <= 0 and x == mp.nint(x):
    raise NoValue
  return mp.gamma(x)


def _binomial(n: Number, k: Number) -> Number:
  if all(isinstance(x, Fraction) and x.denominator == 1 for x in (n, k)) and n >= 0:
    if k < 0 or k > n:
      return Fraction(0)
    if n > 4 * _MOST_FACTORIAL:
      raise TooLarge
    return Fraction(math.comb(int(n), int(k)))
  return _gamma(inexact(n) + 1) / (_gamma(inexact(k) + 1) * _gamma(inexact(n) - inexact(k) + 1))


def _log(x: Number, base: Number | None = None) -> Number:
  if x == 0 or base is not None and (base == 0 or base == 1):
    raise NoValue
  found = mp.log(_of_size(x))
  if base is None:
    return Fraction(0) if x == 1 else found
  quotient = found / mp.log(_of_size(base))
  if isinstance(x, Fraction) and isinstance(base, Fraction) and not isinstance(quotient, mp.mpc):  # log_2 8 is 3
    whole = Fraction(int(mp.nint(quotient)))
    if abs(quotient - int(whole)) < 1e-30 and abs(whole) < 4000 and _power(base, whole) == x:
      return whole
  return quotient


def _of_size(x: Number) -> Number:
  return inexact(x)


def _bounded(function):
  """A function of one number that would take long, or overflow, at large ones."""
  def of(x):
    x = inexact(x)
    if mp.isinf(x) or x and mp.mag(x) > 200:
      raise TooLarge
    return function(x)
  return of


def _exp(x: Number) -> Number:
  if x == 0:
    return Fraction(1)
  x = inexact(x)
  if abs(x) > _MOST_MAGNITUDE / 2:
    raise TooLarge
  return mp.exp(x)


def _reciprocal(function):
  return lambda x: _divide(Fraction(1), _bounded(function)(x))


def _inverse_reciprocal(function):
  return lambda x: function(inexact(_divide(Fraction(1), x)))


def _rounded(function):
  def of(x):
    if isinstance(x, Fraction):
      return Fraction({'floor': math.floor, 'ceil': math.ceil}[function](x))
    if isinstance(x, mp.mpc) or mp.isinf(x) or mp.mag(x) > 150:
      raise NoValue
    return Fraction(int(getattr(mp, function)(x)))
  return of


def _integers(function):
  def of(*xs):
    if not all(isinstance(x, Fraction) and x.denominator == 1 for x in xs):
      raise NoValue
    return Fraction(function(*map(int, xs)))
  return of


def _chosen(function):
  def of(*xs):
    if any(isinstance(x, mp.mpc) for x in xs):
      raise NoValue
    return function(xs, key=inexact)
  return of


_FUNCTION_VALUES: dict[str, Callable[..., Number]] = {
    **{name: _bounded(getattr(mp, name)) for name in (
        'sin', 'cos', 'tan', 'sinh', 'cosh', 'tanh', 'asin', 'acos', 'atan', 'asinh', 'acosh', 'atanh', 'erf')},
    'cot': _reciprocal(mp.tan), 'sec': _reciprocal(mp.cos), 'csc': _reciprocal(mp.sin), 'coth': _reciprocal(mp.tanh),
    'acot': lambda x: mp.pi() / 2 - mp.atan(inexact(x)), 'asec': _inverse_reciprocal(mp.acos),
    'acsc': _inverse_reciprocal(mp.asin), 'ln': _log, 'exp': _exp, 'abs': abs, 'gamma': _gamma,
    'lg': lambda x: _log(x, Fraction(10)), 'log2': lambda x: _log(x, Fraction(2)),
    'floor': _rounded('floor'), 'ceil': _rounded('ceil'), 'gcd': _integers(math.gcd), 'lcm': _integers(math.lcm),
    'max': _chosen(max), 'min': _chosen(min), 'factorial': _factorial, 'binom': _binomial,
    'cbrt': lambda x: _root(x, Fraction(3)), 'sign': lambda x: mp.sign(inexact(x)), 're': lambda x: mp.re(inexact(x)),
    'im': lambda x: mp.im(inexact(x))}


def _apply(name: str, arguments: list[Number]) -> Number:
  try:
    return _FUNCTION_VALUES[name](*arguments)
  except TypeError as error:  # of the number of arguments, or for complex ones
    raise NoValue from error


def _unknown(name: str, arguments: list[Number]) -> Number:
  """The value of a function of which nothing is known: one smooth function for each name."""
  draw = random.Random(f'function {name}')
  angle = sum((_fraction(draw) * inexact(x) for x in arguments), mp.mpf(0))
  return 2 + _bounded(mp.cos)(angle + inexact(_fraction(draw)))


_OPERATIONS: dict[str, Callable[..., Number]] = {
    'add': _arithmetic(lambda x, y: x + y), 'subtract': _arithmetic(lambda x, y: x - y),
    'multiply': _arithmetic(lambda x, y: x * y), 'divide': _divide, 'power': _power, 'root': _root,
    'factorial': _factorial, 'double_factorial': functools.partial(_factorial, step=2), 'log': _log,
    'degrees': lambda x: inexact(x) * mp.pi() / 180, 'pm': _arithmetic(lambda x, y: x + y),
    'mp': _arithmetic(lambda x, y: x - y)}


# Equality.

# Points of variables: some all positive, as are most quantities, and some of both signs.
_POINTS = tuple((draw, negative) for draw in range(4) for negative in (False, True))
_FEWEST_POINTS = 3


def _fraction(draw: random.Random) -> Fraction:
  return Fraction(draw.randrange(700, 2300), draw.randrange(800, 1200))


def point(variables: frozenset[str], draw: int, negative: bool) -> dict[str, Fraction]:
  """Values of variables that depend on their names only."""
  found = {}
  for name in sorted(variables):
    at = random.Random(f'{name} {draw} {negative}')
    found[name] = _fraction(at) * (-1 if negative and at.random() < 0.6 else 1)
  return found


_PRECISION, _NOTHING = mp.mpf(10) ** -25, mp.mpf(10) ** -40


def close(x: Number, y: Number) -> bool:
  """Whether two values are equal: rationals exactly, others to 25 digits, and 0 to 40 places."""
  if isinstance(x, Fraction) and isinstance(y, Fraction):
    return x == y
  x, y = inexact(x), inexact(y)
  if mp.isinf(x) or mp.isinf(y):
    return x == y
  if not x or not y:
    return abs(x - y) <= _NOTHING
  return abs(x - y) <= _PRECISION * max(abs(x), abs(y))


def values(node: Node, variables: frozenset[str]) -> list[Number | None]:
  """The values at each of the points; None where there is none. Raises TooLarge where there is none at any."""
  found, large = [], 0
  for draw, negative in _POINTS if variables else _POINTS[:1]:
    at = point(variables, draw, negative)
    try:
      try:
        found.append(value(node, at))
      except TooLarge:  # exact numbers may be, where numbers of 50 digits are not
        if not at:
          raise
        found.append(value(node, {name: inexact(x) for name, x in at.items()}))
    except (NoValue, ZeroDivisionError, OverflowError):
      found.append(None)
    except (TooLarge, ValueError):
      found.append(None)
      large += 1
  if large == len(found):
    raise TooLarge
  return found


def equal(x: Node, y: Node) -> bool:
  """Whether two formulas are: have equal values at the points at which both have one, and there are enough."""
  return same_values(values(x, names(x) | names(y)), values(y, names(x) | names(y)))


def same_values(x: list[Number | None], y: list[Number | None]) -> bool:
  both = [(a, b) for a, b in zip(x, y) if a is not None and b is not None]
  if len(both) < min(_FEWEST_POINTS, len(x)):
    return False
  # Where only one of two is real, they differ by the branch of a root or a logarithm, not by what is meant.
  real = [(a, b) for a, b in both if is_real(a) == is_real(b)]
  return len(real) >= min(_FEWEST_POINTS, len(x)) and all(close(a, b) for a, b in real)


def is_real(x: Number) -> bool:
  """Whether a value is a real number, but for rounding."""
  return isinstance(x, Fraction) or not isinstance(x, mp.mpc) or abs(x.imag) <= 1e-30 * abs(x.real)


def written(x: Number) -> str:
  """A text that equal values share, unless their 15th digits are rounded apart."""
  if isinstance(x, Fraction):  # Python refuses to write 4,300 digits
    return str(x) if max(x.numerator.bit_length(), x.denominator.bit_length()) < 1000 else f'{x.numerator:x}/{x.denominator:x}'
  if is_real(x):
    x = mp.re(x)
  nearest = mp.nint(mp.re(x))
  if close(x, Fraction(int(nearest)) if not mp.isinf(nearest) and mp.mag(nearest) < 100 else x) and not mp.isinf(x):
    return str(int(nearest)) if mp.mag(nearest) < 100 else mp.nstr(x, 15)
  return mp.nstr(x, 15)
