"""Units at the end of answers."""

from fractions import Fraction

import pytest

from kr_jax.answers import notation
from kr_jax.answers import units


def split(text: str) -> tuple[str, str]:
  """The quantity, and the base units with their powers."""
  tokens, unit = units.split(notation.tokens(text))
  return notation.written(tokens), '' if unit is None else ' '.join(f'{base}{n}' for base, n in unit.powers) or 'open'


@pytest.mark.parametrize('text, quantity, unit', [
    ('5 cm', '5', 'm1'), ('5cm', '5', 'm1'), (r'5\text{ cm}^2', '5', 'm2'), ('5 square meters', '5', 'm2'), ('8 ft²',
    '8', 'm2'),
    ('3 m/s', '3', 'm1 s-1'), (r'3\ \mathrm{m\,s^{-2}}', '3', 'm1 s-2'), ('3 miles per hour', '3', 'm1 s-1'),
    (r'2\ \text{N}\cdot\text{m}', '2', 'kg1 m2 s-2'), (r'4 kg \cdot m/s^2', '4', 'kg1 m1 s-2'), ('7 J', '7',
    'kg1 m2 s-2'),
    (r'7\ \Omega', '7', 'A-2 kg1 m2 s-3'), (r'\frac{3}{2}\text{ hours}', r'\frac3 2', 's1'),
    ('120 J/(kg K)', '120', 'K-1 m2 s-2'), (r'2 \frac{\text{m}}{\text{s}}', '2', 'm1 s-1'), (r'5 \mu m', '5', 'm1'),
    ('45°', '45', 'degree1'), (r'45^{\circ}', '45', 'degree1'), ('20 degrees Celsius', '20', 'celsius1'), ('20°F',
    '20', 'fahrenheit1'),
    ('50%', '50', '%1'), (r'50\%', '50', '%1'), ('75 cents', '75', 'dollar1'), ('5 €', '5', 'euro1'),
    ('8 square units', '8', 'open'),
    (r'12\pi\text{ cm}^3', '12pi', 'm3'), (r'2\,M_\odot', '2', 'solar M1'), (r'9\ \mathrm{ms^{-1}}', '9', 'm1 s-1'),
    ('3 km.', '3', 'm1'),
    ('6 per hour', '6', 's-1'), ('6 kWh', '6', 'kg1 m2 s-2'), ('2 hrs', '2', 's1'), ('5 inches', '5', 'm1')])
def test_units_by_hand(text, quantity, unit):
  assert split(text) == (quantity, unit)


@pytest.mark.parametrize('text', [
    '3R', '5x', '5 x', '2m', '3mg', '12 apples', '5 pi', '5', 'x', '5 dozen', r'3\cdot s^2',
    'm', '2x m', '5 of m', '5 m^x', '3 q'])
def test_what_is_no_unit(text):
  assert split(text)[1] == ''


def test_sizes():
  size = lambda text: units.split(notation.tokens(text))[1].size
  assert size('1 km/h') == Fraction(5, 18) and size('1 kWh') == 3_600_000 and size('1 mL') == Fraction(1, 10 ** 6)
  assert size('1 ft') * 3 == size('1 yard')
  assert size('1 mi') == 5280 * size('1 ft') and size('1 lb') == 16 * size('1 oz')
  assert size('1 cm^2') == Fraction(1, 10 ** 4)
  assert size('1 kJ') == size('1000 N m') * 1000 and size('1 MeV') == 10 ** 6 * size('1 eV')
  assert size('1 acre') == 43560 * size('1 ft^2')
  assert size('1 gallon') == 231 * size('1 cubic inch') and size('1 day') == 24 * size('1 h')


def test_names():
  assert units.named('metres') == units.named('m') and units.named('Newtons') == units.named('N')
  assert units.named('x') is None and units.named('apple') is None
  assert units.NO_UNIT.times(units.named('m'), -2).powers == (('m', -2),)


@pytest.mark.parametrize('text, number', [
    ('12 apples', '12'), ('12 red apples', '12'), (r'5\text{ students}', '5'), ('3 boxes of pens', '3'),
    ('18 every day', '18'),
    ('40 in total', '40'), ('7 people', '7'), ('1 apple', '1'), ('4 different ways', '4'), (r'\frac23 of the cake',
    r'\frac23'),
    ('6 cm long', '6 cm'), ('9 years old', '9 years')])
def test_counts_are_left_out(text, number):
  assert notation.written(units.without_count(notation.tokens(text))) == notation.written(notation.tokens(number))


@pytest.mark.parametrize('text', [
    '12 dozen', '3 halves', '5 factorial', '5 is not it', '5 or more', '5 squared', '4 thirds', '6 tenths',
    '3 hundredths', '9 times x',
    '5 degrees below zero', '12 apple', '5 of them', '2 more apples', 'apples', '8 not apples', '5 twentieths'])
def test_words_that_change_a_number_stay(text):
  tokens = notation.tokens(text)
  assert units.without_count(tokens) == tokens


@pytest.mark.parametrize('text, number, part_of', [
    ('two', 2, '1'), ('twenty-five', 25, '1'), ('three hundred and seven', 307, '1'), ('two thousand ten', 2010, '1'),
    ('five sixths', 5, '1/6'), ('a half', 1, '1/2')])
def test_numbers_in_words(text, number, part_of):
  assert units.number_in_words(text) == (number, Fraction(part_of))
  assert units.number_in_words(f'{text} dogs') is None
