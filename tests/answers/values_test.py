"""Values of formulas, against Python's fractions and SymPy."""

from fractions import Fraction
import math

from hypothesis import given
from hypothesis import strategies as st
import pytest

from kr_jax.answers import notation
from kr_jax.answers import syntax
from kr_jax.answers import values
from kr_jax.answers.syntax import Reading

NOTHING = frozenset()


def value(text: str):
  return values.value(syntax.parse(notation.tokens(text)))


@pytest.mark.parametrize('text, expected', [
    (r'\frac12', '1/2'), ('2 1/3', '7/3'), ('3-10', '-7'), ('2^{-3}', '1/8'), ('(-8)^{1/3}', '-2'), (r'\sqrt[3]{-8}',
    '-2'),
    (r'\sqrt{\frac{9}{4}}', '3/2'), ('16^{3/4}', '8'), ('5!', '120'), ('0!', '1'), ('5!!', '15'), (r'\binom{10}{3}',
    '120'),
    (r'\binom{3}{5}', '0'), (r'\log_2 8', '3'), (r'\log_8 2', None), (r'\log_{10} 0.01', '-2'),
    (r'\lfloor -2.5\rfloor', '-3'),
    (r'\lceil 2.1\rceil', '3'), ('|-3|', '3'), (r'\gcd(12, 18)', '6'), ('max(1, 7/2)', '7/2'),
    (r'\frac{1503!}{1501!}', 1503 * 1502),
    ('1^{10^{30}}', '1'), ('(-1)^{10^{30}+1}', '-1'), (r'\ln 1', '0'), ('e^0', '1'), ('4.5e33', 45 * 10 ** 32)])
def test_exact_values_by_hand(text, expected):
  found = value(text)
  assert isinstance(found, Fraction) is (expected is not None)
  assert expected is None or found == Fraction(expected)


@pytest.mark.parametrize('text, expected', [
    (r'\sqrt2', math.sqrt(2)), (r'\pi', math.pi), ('e', math.e), (r'\sin\frac{\pi}{6}', 0.5), (r'\sin 30^\circ', 0.5),
    (r'\cos 2', math.cos(2)), (r'\tan^{-1} 2', math.atan(2)), (r'\arcsin\frac12', math.pi / 6),
    (r'\sec 1', 1 / math.cos(1)),
    (r'\cot 1', 1 / math.tan(1)), (r'\ln 5', math.log(5)), (r'\exp{2}', math.exp(2)), (r'\log_3 7', math.log(7, 3)),
    ('np.sqrt(2)/2', math.sqrt(2) / 2), (r'\left(\frac12\right)!', math.gamma(1.5)), ('2^{0.5}', math.sqrt(2)),
    (r'\sinh 1', math.sinh(1)), (r'e^{i\pi}', -1), ('i^2', -1), (r'|3+4i|', 5), (r'10^{-400}', 0)])
def test_values_by_hand(text, expected):
  assert complex(value(text)) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize('text', [
    r'\frac{1}{0}', r'\frac{0}{0}', '0^{-1}', '0^0', r'\log 0', r'\infty-\infty', r'\tan\frac{\pi}{2}', '(-3)!',
    r'\log_1 5',
    r'\gcd(1/2, 3)', r'\frac{1}{\sin\pi}', r'\lfloor i\rfloor'])
def test_what_has_no_value(text):
  with pytest.raises(values.NoValue):
    value(text)


@pytest.mark.parametrize('text', [
    '9^{9^{9^{9}}}', '10^{10^{10}}', '99999999!', '((9!)!)!', r'\binom{10^{12}}{5\cdot10^{11}}', '0.5^{10^{12}}',
    '2^{-10^{9}}',
    r'\sqrt{2}^{10^{9}}', r'e^{10^{9}}', r'\sin(10^{90})', r'\pi^{\pi^{\pi^{\pi^{\pi}}}}', '(10^{10})!'])
def test_what_is_too_large(text):
  with pytest.raises(values.TooLarge):
    value(text)


@st.composite
def formulas(draw, depth=3):
  """A formula in LaTeX, and its value at x = 2/3 by Python's fractions; None: it has none."""
  if depth == 0 or draw(st.booleans()):
    if draw(st.integers(0, 3)) == 0:
      return 'x', Fraction(2, 3)
    n = draw(st.integers(0, 9))
    return str(n), Fraction(n)
  (a, x), (b, y) = draw(formulas(depth=depth - 1)), draw(formulas(depth=depth - 1))
  kind = draw(st.sampled_from('+-*/^n'))
  if kind == '^':
    n = draw(st.integers(0, 3))
    return rf'\left({a}\right)^{{{n}}}', None if x is None or x == n == 0 else x ** n
  known = x is not None and y is not None
  return {
      '+': lambda: (f'({a}+{b})', x + y if known else None), '-': lambda: (f'({a}-({b}))', x - y if known else None),
      '*': lambda: (rf'({a})\cdot({b})', x * y if known else None),
      '/': lambda: (rf'\frac{{{a}}}{{{b}}}', x / y if known and y else None),
      'n': lambda: (f'-({a})', -x if x is not None else None)}[kind]()


@given(formulas())
def test_arithmetic_is_that_of_fractions(pair):
  text, expected = pair
  node = syntax.parse(notation.tokens(text))
  try:
    assert values.value(node, {'x': Fraction(2, 3)}) == expected
  except values.NoValue:
    assert expected is None


EQUAL = [
    ('(x+1)^2', 'x^2+2x+1'), (r'\sin^2 x', r'1-\cos^2 x'), (r'\frac{1}{x}-\frac{1}{y}', r'\frac{y-x}{xy}'),
    (r'\ln x^2', r'2\ln x'), ('e^{2x}', '(e^x)^2'), (r'\sqrt{x^2y}', r'|x|\sqrt y'), (r'\binom{n}{2}',
    r'\frac{n(n-1)}{2}'),
    (r'\tan x', r'\frac{\sin x}{\cos x}'), (r'\sin 2x', r'2\sin x\cos x'), ('f(x+x)', 'f(2x)'),
    (r'\frac{(n+1)!}{n!}', 'n+1'), ('x^{100}x', 'x^{101}')]
UNEQUAL = [('|x|', 'x'), ('x^2', 'x^3'), ('f(x)', 'f(y)'), ('f(x)', 'g(x)'), ('M/m', 'm/M'), (r'\theta', r'\Theta'),
           ("y'", 'y'), ('x', 'y'), (r'\sqrt{x^2}', 'x'), ('x^{20}+x', 'x^{20}'), (r'\cos x', r'\sin x'),
           (r'\lfloor n/7\rfloor', r'\lfloor n/8\rfloor'), (r'\min(x,40)', 'x'), (r'\gcd(n,6)', r'\gcd(n,3)')]


def equal(x: str, y: str) -> bool:
  nodes = [syntax.parse(notation.tokens(text), Reading(calls='f(' in x or 'g(' in y)) for text in (x, y)]
  variables = syntax.names(nodes[0]) | syntax.names(nodes[1])
  far = any(map(values.is_piecewise, nodes))
  return values.same_values(*(values.at_points(node, variables, far) for node in nodes))


@pytest.mark.parametrize('x, y', EQUAL)
def test_equal_formulas(x, y):
  assert equal(x, y) and equal(y, x) and not equal(x, f'({y})+1')


@pytest.mark.parametrize('x, y', UNEQUAL)
def test_unequal_formulas(x, y):
  assert not equal(x, y) and not equal(y, x) and equal(x, x) and equal(y, y)


@pytest.mark.slow
@pytest.mark.parametrize('text, of_sympy', [
    (r'\sin^2 2x', 'sin(2*x)**2'), (r'\frac{\ln x}{\log_3 y}', 'log(x)/log(y, 3)'), (r'\binom{x}{2}', 'binomial(x, 2)'),
    ('x!', 'gamma(x + 1)'), (r'\arctan\frac{y}{x}', 'atan(y/x)'), (r'x^{y}e^{-xy}', 'x**y*exp(-x*y)'),
    (r'\sec x\cot y', 'sec(x)*cot(y)'),
    (r'\sqrt[5]{x+y}', '(x + y)**Rational(1, 5)'), (r'|x-3y|', 'Abs(x - 3*y)'), (r'\cosh x+\tanh^{-1}\frac{x}{9}',
    'cosh(x) + atanh(x/9)'),
    (r'\frac{1}{1+\frac{1}{1+x}}', '1/(1 + 1/(1 + x))'), (r'\lfloor 7x\rfloor+\lceil 5y\rceil',
    'floor(7*x) + ceiling(5*y)'),
    (r'(2+3i)^3 x', '(2 + 3*I)**3*x'), (r'\csc^{-1}(3x)', 'acsc(3*x)'), (r'\sin\frac{x\pi}{4}', 'sin(x*pi/4)')])
def test_sympy_agrees(text, of_sympy):
  import sympy
  node = syntax.parse(notation.tokens(text))
  for draw in range(3):
    at = values.point(frozenset('xy'), draw, False)
    exact = sympy.sympify(of_sympy).subs({name: sympy.Rational(x.numerator, x.denominator) for name, x in at.items()})
    expected = complex(sympy.N(exact, 40))
    assert complex(values.value(node, at)) == pytest.approx(expected, rel=1e-14)


def test_close_and_real():
  assert values.close(Fraction(1, 3), Fraction(1, 3))
  assert not values.close(Fraction(1, 3), Fraction('0.333333333333333333'))
  tiny = values.mp.mpf(10) ** -300
  assert not values.close(tiny, 2 * tiny) and values.close(tiny, Fraction(0)) and not values.close(values.mp.inf, tiny)
  assert values.is_real(value(r'e^{i\pi}')) and not values.is_real(value('i'))


def test_points_depend_on_names_only():
  one = values.point(frozenset('xy'), 0, True)
  assert one['x'] == values.point(frozenset('xz'), 0, True)['x'] != one['y']
  assert all(x > 0 for x in values.point(frozenset('abcdef'), 1, False).values())


def test_numbers_and_texts():
  tokens = notation.tokens
  assert values.number(tokens('1/2')) == Fraction(1, 2) and values.number(tokens('x')) is None
  assert values.number(tokens('1/0')) is None and values.number(tokens('9^{9^{9^9}}')) is None
  assert values.number(tokens(r'3 \pm 1')) is None  # there are two
  assert values.of(tokens('2x'), Reading(), frozenset('x')) != [None]
