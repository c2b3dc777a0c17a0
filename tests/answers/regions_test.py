"""Parts of the real line, against membership of many points."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from kr_jax.answers import regions
from kr_jax.answers import values

INFINITY = values.mp.inf
POINTS = [Fraction(n, 4) for n in range(-30, 31)]


def has(region, x) -> bool:
  return any((low < x or piece.low_closed and low == x) and (x < high or piece.high_closed and x == high)
             for piece in region for low, high in [(float(piece.low), float(piece.high))])


ENDS = st.integers(-6, 6).map(Fraction)
INTERVALS = st.builds(
    lambda a, b, c, d: regions.interval(min(a, b), max(a, b), c, d), ENDS, ENDS, st.booleans(), st.booleans())


@given(st.lists(INTERVALS, max_size=4), st.lists(INTERVALS, max_size=3))
def test_operations_are_those_of_sets(some, others):
  x, y = regions.union(*some), regions.union(*others)
  for point in POINTS:
    in_x, in_y = any(has(part, point) for part in some), any(has(part, point) for part in others)
    assert has(x, point) is in_x
    assert has(regions.complement(x), point) is not in_x
    assert has(regions.intersection(x, y), point) is (in_x and in_y)
    assert has(regions.minus(x, y), point) is (in_x and not in_y)
  assert regions.equal(regions.complement(regions.complement(x)), x)
  assert regions.equal(x, y) is (x == y)


def test_intervals_by_hand():
  assert regions.interval(Fraction(2), Fraction(1), True, True) is None
  assert regions.interval(Fraction(1), Fraction(1), True, False) == ()
  one, two = regions.interval(0, Fraction(1), True, False), regions.interval(Fraction(1), Fraction(2), True, True)
  assert regions.union(two, one) == regions.interval(0, Fraction(2), True, True)
  assert regions.union(one, regions.interval(Fraction(1), Fraction(2), False, True)) != regions.union(one, two)
  assert regions.complement(()) == regions.LINE


def test_linear_by_hand():
  places = [*map(Fraction, (0, 1, -7, 50))]
  linear = lambda function, sign: regions.linear(places, [*map(function, places)], sign)
  line, falling = lambda x: x - 3, lambda x: 6 - 2 * x
  assert linear(line, '<') == regions.interval(-INFINITY, Fraction(3), False, False)
  assert linear(line, 'ge') == regions.interval(Fraction(3), INFINITY, True, False)
  assert linear(falling, '<') == regions.interval(Fraction(3), INFINITY, False, False)
  assert linear(line, '=') == regions.interval(Fraction(3), Fraction(3), True, True)
  assert linear(line, 'ne') == regions.complement(linear(line, '='))
  for other in (lambda x: x ** 2, lambda x: Fraction(1), abs, lambda x: INFINITY):
    assert linear(other, '<') is None
