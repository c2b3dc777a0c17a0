r"""Values of formulas, and whether two formulas are equal.

Two formulas are equal where their values are at random points, which no rewriting can hide: exactly where all is
rational, else to 25 of 50 digits. There is no search for a simplification, so that a formula costs what its
operations cost, and one whose numbers would grow beyond all limits is refused (`TooLarge`) before they do.
Source: Schwartz 1980, JACM 27 (polynomial identity testing).

Imports nothing heavy but mpmath.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
import functools
import math
import random
from typing import Any

import mpmath

from kr_jax.answers import syntax
from kr_jax.answers.notation import Tokens
from kr_jax.answers.syntax import Node, Reading

Number = Any  # Fraction where exact, else a number of mpmath

_MOST_BITS = 40_000  # of an exact number: 12,000 digits
_MOST_MAGNITUDE = 10_000  # of an inexact number, in powers of two
_MOST_FACTORIAL = 3_000
_DIGITS = 50

mp = mpmath.MPContext()
mp.dps = _DIGITS


class NoValue(ArithmeticError):
  """A formula has no value, as it divides by zero, or two, as 1 \\pm 2 has."""


class TooLarge(ArithmeticError):
  """The value has too many digits."""


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
def times(x: Number, y: Number) -> Number:
  return x * y


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
    if n == 0:
      if not isinstance(x, Fraction) and mp.isinf(x):
        raise NoValue
      return Fraction(1)
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
        'sin', 'cos', 'sinh', 'cosh', 'tanh', 'asin', 'acos', 'atan', 'asinh', 'acosh', 'atanh', 'erf')},
    'tan': lambda x: _divide(_bounded(mp.sin)(x), _bounded(mp.cos)(x)),
    'cot': lambda x: _divide(_bounded(mp.cos)(x), _bounded(mp.sin)(x)),
    'sec': _reciprocal(mp.cos), 'csc': _reciprocal(mp.sin), 'coth': _reciprocal(mp.tanh),
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


def _two_values(*_) -> Number:
  raise NoValue


_OPERATIONS: dict[str, Callable[..., Number]] = {
    'add': _arithmetic(lambda x, y: x + y), 'subtract': _arithmetic(lambda x, y: x - y),
    'multiply': times, 'divide': _divide, 'power': _power, 'root': _root,
    'factorial': _factorial, 'double_factorial': functools.partial(_factorial, step=2), 'log': _log,
    'degrees': lambda x: inexact(x) * mp.pi() / 180, 'pm': _two_values, 'mp': _two_values}


# Equality.

# Points of variables: some all positive, as are most quantities, and some of both signs. After the near ones come two
# far away and whole numbers, for functions that change only there.
_POINTS = tuple((draw, negative) for draw in range(11) for negative in (False, True))
_NEAR = 8
_FEWEST_POINTS = 3
_PIECEWISE = ('abs', 'ceil', 'floor', 'gcd', 'lcm', 'max', 'min', 'sign')


def _fraction(draw: random.Random) -> Fraction:
  return Fraction(draw.randrange(700, 2300), draw.randrange(800, 1200))


def point(variables: frozenset[str], draw: int, negative: bool) -> dict[str, Fraction]:
  """Values of variables that depend on their names only."""
  found = {}
  for name in sorted(variables):
    at = random.Random(f'{name} {draw} {negative}')
    size = _fraction(at) * (-1 if negative and at.random() < 0.6 else 1)
    if 2 * draw >= _NEAR:
      size = size * 10 ** 6 if 2 * draw == _NEAR else Fraction(int(12 * size))
    found[name] = size
  return found


def is_piecewise(node: Node) -> bool:
  """Whether there are functions in a formula that near points may not tell from constants or from x."""
  return node[0] == 'apply' and node[1] in _PIECEWISE or any(is_piecewise(x) for x in node[1:] if isinstance(x, tuple))


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


def at_points(node: Node, variables: frozenset[str], far: bool = False) -> list[Number | None]:
  """The values at each of the points; None where there is none. Raises TooLarge where there is none at any.

  far: whether at all points, not the near ones alone: if one of the formulas to be compared `is_piecewise`.
  """
  found, large = [], 0
  for draw, negative in _POINTS[:len(_POINTS) if far else _NEAR] if variables else _POINTS[:1]:
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


@functools.lru_cache(4096)
def of(tokens: Tokens, reading: Reading, variables: frozenset[str], far: bool = False) -> list[Number | None]:
  """`at_points` of the formula that tokens are, which must be one; [None] where its numbers are too large."""
  try:
    return at_points(syntax.node(tokens, reading), variables, far)
  except (ArithmeticError, KeyError, ValueError, TypeError, RecursionError):
    return [None]


def number(tokens: Tokens) -> Number | None:
  """The value of a formula without variables; None: there is no value, or no such formula."""
  node = syntax.node(tokens)
  return None if node is None or syntax.names(node) else of(tokens, Reading(), frozenset())[0]


def same_values(x: list[Number | None], y: list[Number | None]) -> bool:
  """Whether the values of two formulas at the same points are equal at all that decide, if there are enough."""
  deciding = [
      (a, b) for a, b, (_, negative) in zip(x, y, _POINTS) if a is not None and b is not None
      # Roots and logarithms of negative numbers have branches: there, real values alone decide. Where only one of two
      # is real, formulas differ by a branch, not by what is meant.
      and is_real(a) == is_real(b) and (is_real(a) or not negative)]
  return len(deciding) >= min(_FEWEST_POINTS, len(x)) and all(close(a, b) for a, b in deciding)


def is_real(x: Number) -> bool:
  """Whether a value is a real number, but for rounding."""
  return isinstance(x, Fraction) or not isinstance(x, mp.mpc) or abs(x.imag) <= 1e-30 * abs(x.real)
