"""Values are those of their formulas, at points and expected under posteriors."""

import functools

from hypothesis import given
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from kr_jax import knobs
from kr_jax.allocation import value
from kr_jax.allocation.value import Beta, Window

NAMES = tuple(value.VALUES)
# The information in a mixed group; `snr` has no such factor.
INFORMATION = {'mixed': lambda p: 1.0, 'infogain': lambda p: p * (1 - p) ** 2, 'variance': lambda p: p * (1 - p)}


def value_of(name: str, p: float, n: int, nu: float = 2.0) -> float:
  """V(N, p), written out."""
  if name == 'snr':
    q = p * (1 - p)
    return q * q * (n - 1) / (q * (n - 1) + nu)
  return (1 - p ** n - (1 - p) ** n) * INFORMATION[name](p)


def as_function(name: str, nu: float = 2.0) -> value.Value:
  """The same value as a caller's function, which is integrated numerically."""
  return lambda budget, p: value_of(name, p, budget, nu)


def beta(*a_and_b: tuple[float, float]) -> Beta:
  return Beta(*np.array(a_and_b, float).T)


@functools.cache
def log_odds(a: float, b: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """log p, log (1-p) and the weights of Beta(a, b) over log-odds, where the density has no poles."""
  x = np.arange(-900, 900, 0.02)
  log_p, log_not_p = special.log_expit(x), special.log_expit(-x)
  return log_p, log_not_p, np.exp(a * log_p + b * log_not_p - special.betaln(a, b)) * 0.02


def integral(name: str, a: float, b: float, n: int, nu: float = 2.0) -> float:
  """E[V(N, p)], with no difference of numbers near 1."""
  log_p, log_not_p, weight = log_odds(a, b)
  p, not_p = np.exp(log_p), np.exp(log_not_p)
  if name == 'snr':
    q = p * not_p
    return float(weight @ (q * q * (n - 1) / (q * (n - 1) + nu)))
  larger, smaller = np.maximum(log_p, log_not_p), np.minimum(log_p, log_not_p)
  mixed = -np.expm1(n * larger) - np.exp(n * smaller)
  information = {'mixed': 1.0, 'variance': p * not_p, 'infogain': p * not_p * not_p}[name]
  return float(weight @ (mixed * information))


rates = st.floats(0, 1)
parameters = st.floats(0.05, 1000)
one_task = rates.map(lambda p: np.array([p])) | st.tuples(parameters, parameters).map(beta)


# Known success rates.


def test_values_by_hand():
  p_M, budget_J, flat = np.array([0, 0.25, 0.5, 1]), np.array([1, 2, 3]), beta((1, 1))
  at = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15)
  zero = [0, 0, 0]
  at(value.prob_nonzero_gradient(p_M, budget_J), [zero, [0, 0.375, 0.5625], [0, 0.5, 0.75], zero])
  at(value.expected(p_M, budget_J), [zero, [0, 0.052734375, 0.0791015625], [0, 0.0625, 0.09375], zero])
  at(value.expected(p_M, budget_J, 'variance'), [zero, [0, 0.0703125, 0.10546875], [0, 0.125, 0.1875], zero])
  # snr of p = 1/2, N = 3, nu = 2: q = 1/4, and 1/4 * 1/2 / (1/2 + 2) = 1/20. nu is 2 unless given.
  at(value.expected([0, 0.5, 0.2, 1], budget_J, 'snr'),
     [zero, [0, 0.25 / 9, 0.05], [0, 0.16 * 0.16 / 2.16, 0.16 * 0.32 / 2.32], zero])
  at(value.expected([0.5], budget_J, 'snr', 0.25), [[0, 0.125, 1 / 6]])
  # A flat posterior. Mixed: 1 - 2 / (N + 1).
  at(value.prob_nonzero_gradient(flat, [1, 2, 3, 9]), [[0, 1 / 3, 1 / 2, 4 / 5]])
  # E[2 p^2 (1-p)^3] = 2 B(3, 4) = 1/30, E[2 p^2 (1-p)^2] = 2 B(3, 3) = 1/15; without end E[p (1-p)^2] = 1/12.
  at(value.expected(flat, [1, 2]), [[0, 1 / 30]])
  at(value.expected(flat, [1, 2], 'variance'), [[0, 1 / 15]])
  np.testing.assert_allclose(value.expected(flat, [10 ** 5]), [[1 / 12]], rtol=1e-8)


def test_snr_without_noise_and_under_much_noise():
  """Two rollouts count whole; the value is linear in the budget."""
  p_M, budget_J = np.array([0.1, 0.5, 0.8]), np.array([1, 2, 9])
  q_M = p_M * (1 - p_M)
  np.testing.assert_allclose(value.expected(p_M, budget_J, 'snr', 1e-12), np.outer(q_M, [0, 1, 1]), rtol=1e-10)
  np.testing.assert_allclose(1e12 * value.expected(p_M, budget_J, 'snr', 1e12),
                             np.outer(q_M ** 2, budget_J - 1), rtol=1e-10)
  np.testing.assert_allclose(  # E[q^2] = B(4, 5) / B(2, 3) = 3 / 70
      1e12 * value.expected(beta((2, 3)), budget_J, 'snr', 1e12), [3 / 70 * (budget_J - 1)], rtol=1e-6)


@given(p=rates, n=st.integers(1, 200), nu=st.floats(0.05, 200))
def test_values_are_those_of_the_formula(p, n, nu):
  for name in NAMES:
    expected = pytest.approx(value_of(name, p, n, nu), rel=1e-12, abs=1e-16)
    assert value.expected([p], [n], name, nu)[0, 0] == expected
    assert value.expected([p], [n], as_function(name, nu))[0, 0] == expected
    assert value.VALUES[name](n, p, **({'nu': nu} if name == 'snr' else {})) == expected


@given(success_rate=one_task, nu=st.floats(0.05, 200))
def test_values_rise_ever_more_slowly(success_rate, nu):
  for name, limit in ((value.mixed, 1), ('infogain', 4 / 27), ('variance', 1 / 4), ('snr', 1 / 4)):
    value_J = value.expected(success_rate, np.arange(1, 131), name, nu)[0]
    assert value_J[0] == pytest.approx(0, abs=1e-11)
    assert np.all(value_J >= 0) and np.all(value_J <= limit + 1e-12)
    assert np.all(np.diff(value_J) >= -1e-11) and np.all(np.diff(value_J, 2) <= 1e-11)


def test_rates_may_be_numpy_jax_or_a_list():
  rate, budget_J = [0.25, 0.5, 0, 1], [1, 2, 5]
  for name in (*NAMES, as_function('snr')):
    expected_MJ = value.expected(np.array(rate), np.array(budget_J), name)
    assert expected_MJ.dtype == np.float64 and expected_MJ.shape == (4, 3)
    for kind in (list, np.float32, jnp.array):
      np.testing.assert_array_equal(value.expected(kind(rate), budget_J, name), expected_MJ)
    np.testing.assert_array_equal(value.expected(rate, jnp.array(budget_J), name), expected_MJ)


# Posteriors.


ENDS = (0.05, 0.5, 1, 7, 60, 1000)


@pytest.mark.parametrize('pairs', [
    ((0.05, 0.05), (0.05, 1000), (1000, 60), (1, 7)),
    pytest.param(tuple((a, b) for a in ENDS for b in ENDS), marks=pytest.mark.exhaustive)], ids=['few', 'all'])
def test_posterior_values_are_integrals(pairs):
  """In closed form, and by quadrature: of `snr`, and of functions."""
  budget_J = np.array([2, 8, 128])
  for a, b in pairs:
    by = functools.partial(value.expected, beta((a, b)), budget_J)
    for name in (*NAMES, 'mixed'):
      expected_MJ = [[integral(name, a, b, n) for n in budget_J]]
      np.testing.assert_allclose(by(value.mixed if name == 'mixed' else name), expected_MJ, rtol=1e-6)
      np.testing.assert_allclose(by(as_function(name)), expected_MJ, rtol=1e-6)
    for nu in (0.05, 200):
      np.testing.assert_allclose(by('snr', nu), [[integral('snr', a, b, n, nu) for n in budget_J]], rtol=1e-6)
    log_p, log_not_p, weight = log_odds(a, b)
    np.testing.assert_allclose(
        by(lambda budget, p: np.tanh(budget * p * (1 - p))),
        [[weight @ np.tanh(n * np.exp(log_p + log_not_p)) for n in budget_J]], rtol=1e-6)


@given(a=parameters, b=parameters, n=st.integers(2, 256))
def test_a_function_has_the_same_expectation_as_the_closed_form(a, b, n):
  for name in NAMES:
    np.testing.assert_allclose(value.expected(beta((a, b)), [n], as_function(name)),
                               value.expected(beta((a, b)), [n], name), rtol=1e-6)


def test_one_rollout_is_worth_nothing():
  for name in NAMES:
    for f in (name, as_function(name)):
      np.testing.assert_allclose(
          value.expected(beta((0.05, 0.05), (0.3, 1000), (1000, 1000)), [1], f), np.zeros((3, 1)), atol=1e-15)


def test_a_sharp_posterior_is_a_rate():
  p_M, budget_J = np.array([0.02, 0.3, 0.9]), np.array([2, 8, 64])
  for name in NAMES:
    np.testing.assert_allclose(value.expected(Beta(1e6 * p_M, 1e6 * (1 - p_M)), budget_J, name),
                               value.expected(p_M, budget_J, name), rtol=1e-3)


def test_tasks_do_not_touch_each_other():
  """But by the error of the quadrature, whose nodes they may share; budgets may differ by task."""
  rng = np.random.default_rng(0)
  posterior, budget_J = Beta(*10 ** rng.uniform(-1.3, 3, (2, 60))), np.arange(1, 101)
  budget_MJ = rng.integers(1, 101, (60, 20))
  for name in (*NAMES, as_function('infogain')):
    all_MJ = value.expected(posterior, budget_J, name)
    assert all_MJ.shape == (60, 100)
    np.testing.assert_allclose(value.expected(posterior, budget_MJ, name),
                               np.take_along_axis(all_MJ, budget_MJ - 1, axis=1), rtol=1e-12, atol=1e-17)
    for m in (0, 52, 59):
      alone = Beta(*(x_M[m:m + 1] for x_M in posterior))
      np.testing.assert_allclose(value.expected(alone, budget_J, name), all_MJ[m:m + 1], rtol=1e-7, atol=1e-17)
  np.testing.assert_allclose(value.expected([0.3, 0.6], [[2, 5], [9, 3]]), [
      [value_of('infogain', 0.3, 2), value_of('infogain', 0.3, 5)],
      [value_of('infogain', 0.6, 9), value_of('infogain', 0.6, 3)]], rtol=1e-13)


def test_equal_posteriors_have_equal_values_to_the_last_bit():
  rng = np.random.default_rng(1)
  a_M, b_M = rng.choice(10 ** rng.uniform(-1.3, 3, 9), (2, 60))
  value_MJ = value.expected(Beta(a_M, b_M), np.arange(1, 100), 'snr')
  order_M = rng.permutation(60)
  moved_MJ = value.expected(Beta(a_M[order_M], b_M[order_M]), np.arange(1, 100), 'snr')
  np.testing.assert_array_equal(moved_MJ, value_MJ[order_M])
  for m, n in np.argwhere((a_M[:, None] == a_M) & (b_M[:, None] == b_M)):
    np.testing.assert_array_equal(value_MJ[m], value_MJ[n])


def test_no_tasks_have_no_values():
  for name in NAMES:
    for none in (np.zeros(0), Beta(np.zeros(0), np.zeros(0))):
      assert value.expected(none, np.arange(1, 4), name).shape == (0, 3)


def test_a_function_is_given_floats():
  seen = []

  def f(budget, p):
    seen.append((budget.dtype, p.dtype))
    return budget * p * (1 - p)

  np.testing.assert_allclose(value.expected([0.5, 0], np.array([2], np.int32), f), [[0.5], [0]])
  value.expected(beta((1, 1)), np.array([2], np.int32), f)
  assert seen == [(np.float64, np.float64)] * 2


# Bad input.


def test_names_and_nu_are_those_of_the_config():
  assert NAMES == knobs.Alloc.choices('value')
  for name, nu in (('info_gain', 2.0), (None, 2.0), ('infogain', 0.0), (as_function('snr'), float('nan'))):
    with pytest.raises(ValueError, match=r'^alloc\.(value|nu)='):
      value.check(name, nu)
    with pytest.raises(ValueError, match=r'^alloc\.(value|nu)='):
      value.expected([0.5], [2], name, nu)
  for name in (*NAMES, as_function('snr')):
    value.check(name, 0.05)


@pytest.mark.parametrize('success_rate, match', [
    ([0.5, float('nan')], r'\[0, 1\].*\(1, nan\)'),
    ([2, 0, 1, -1], r'\(0, 2\.0\), \(3, -1\.0\)'),
    (0.5, r'vector.*\(\)'),
    ([[0.5, 0.5]], r'vector.*\(1, 2\)'),
    (['a', 'b'], 'numbers'),
    (np.array([0.5, None]), 'numbers.*object'),
    (Beta(np.array([1, 0.0]), np.ones(2)), 'positive.*0\\.'),
    (Beta(np.ones(2), np.array([1, float('nan')])), 'finite.*nan'),
    (Beta(np.ones((1, 2)), np.ones((1, 2))), 'vectors'),
    (Beta(np.ones(1), np.ones(3)), 'posterior has 1 a and 3 b'),
    (Window(np.array([0.5, 2.0]), np.array([True, True])), r'\(1, 2\.0\)'),
    (Window(np.array([0.5, 1.0]), np.array([True])), r'shapes \(2,\) and \(1,\)'),
])
def test_bad_success_rates_are_named(success_rate, match):
  with pytest.raises(ValueError, match=match):
    value.check_success_rate(success_rate)


def test_good_success_rates_are_counted():
  for kind in (list, np.array, jnp.array):
    assert value.check_success_rate(kind([0, 0.5, 1.0])) == 3
  assert value.check_success_rate([True, False]) == 2
  assert value.check_success_rate([]) == 0
  assert value.check_success_rate(beta((1, 2), (0.1, 1e6))) == 2
  assert value.check_success_rate(Window(np.array([0.5, np.nan]), np.array([True, False]))) == 2
