"""A place in a row of tokens, and the numbers there."""

from fractions import Fraction

import pytest

from kr_jax.answers import cursor
from kr_jax.answers import notation


def at(text: str) -> cursor.Cursor:
  return cursor.Cursor(notation.tokens(text))


def test_arguments():
  here = at(r'\frac12{3x}')
  here.next()
  written = lambda: notation.written(here.argument_tokens())
  assert [written(), written(), written()] == ['1', '2', '3x'] and here.peek().kind == 'end of text'
  with pytest.raises(cursor.NotAFormula, match='does not close'):
    at('{1').argument_tokens()
  with pytest.raises(cursor.NotAFormula, match='is missing'):
    at('1').expect('(')


@pytest.mark.parametrize('text, number', [
    ('12', 12), ('0.50', '1/2'), ('.5', '1/2'), ('3.', 3), ('2 1/3', '7/3'), (r'2\frac{1}{3}', '7/3'), (r'2\frac13',
    '7/3'),
    (r'0.\overline{3}', '1/3'), (r'0.1\overline{6}', '1/6'), (r'2.\dot{3}', '7/3'), (r'2\frac{3}{2}', 2), ('2 1', 2),
    (r'2\frac{x}{3}', 2)])
def test_numbers_by_hand(text, number):
  assert at(text).number() == Fraction(number)


def test_powers_of_ten():
  assert at('1.5e-3').power_of_ten() == (Fraction('1.5'), -3) and at('2E+4').power_of_ten() == (2, 4)
  assert at('2e').power_of_ten() is None and at('2 e3').power_of_ten() is None and at('2e 3').power_of_ten() is None


def test_letters():
  here = at('abc')
  assert [x.text for x in here.letters(here.peek())] == ['a', 'b', 'c']
  with pytest.raises(cursor.NotAFormula, match='apples'):
    at('apples').letters(at('apples').peek())
  with pytest.raises(cursor.NotAFormula, match='for'):
    at('for').letters(at('for').peek())
