"""Values are those of their formulas, at points and expected under posteriors."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from kr_jax.allocation import value
from kr_jax.allocation.value import Beta

few = functools.partial(settings, deadline=None)
NAMES = tuple(value.VALUES)
named = pytest.mark.parametrize('name', NAMES)
# What a mixed group teaches; `snr` has no such factor.
TEACHES = {'mixed': lambda p: 1.0, 'infogain': lambda p: p * (1 - p) ** 2,
           'variance': lambda p: p * (1 - p)}


def value_of(name: str, p: float, n: int, nu: float = 2.0) -> float:
  """V(N, p), written out."""
  if name == 'snr':
    q = p * (1 - p)
    return q * q * (n - 1) / (q * (n - 1) + nu)
  return (1 - p ** n - (1 - p) ** n) * TEACHES[name](p)


def own(name: str, nu: float = 2.0) -> value.Value:
  """The same value as a user's function, which is integrated numerically."""
  return lambda budget, p: value_of(name, p, budget, nu)


def beta(*a_and_b: tuple[float, float]) -> Beta:
  a_M, b_M = zip(*a_and_b)
  return Beta(np.array(a_M, float), np.array(b_M, float))


@functools.cache
def log_odds(a: float, b: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """log p, log (1-p) and the weights of Beta(a, b) over log-odds, where the density has no poles."""
  x = np.arange(-900, 900, 0.01)
  log_p, log_not_p = special.log_expit(x), special.log_expit(-x)
  density = np.exp(a * log_p + b * log_not_p - special.betaln(a, b))
  return log_p, log_not_p, density * 0.01


def integral(name: str, a: float, b: float, n: int, nu: float = 2.0) -> float:
  """E[V(N, p)], with no difference of numbers near 1."""
  log_p, log_not_p, weight = log_odds(a, b)
  p, not_p = np.exp(log_p), np.exp(log_not_p)
  if name == 'snr':
    q = p * not_p
    return float(weight @ (q * q * (n - 1) / (q * (n - 1) + nu)))
  larger, smaller = np.maximum(log_p, log_not_p), np.minimum(log_p, log_not_p)
  mixed = -np.expm1(n * larger) - np.exp(n * smaller)
  teaches = {'mixed': 1.0, 'variance': p * not_p, 'infogain': p * not_p * not_p}[name]
  return float(weight @ (mixed * teaches))


rates = st.floats(0, 1)
parameters = st.floats(0.05, 1000)
one = rates.map(lambda p: np.array([p])) | st.tuples(parameters, parameters).map(beta)


# Known success rates.


def test_prob_nonzero_gradient_by_hand():
  np.testing.assert_allclose(
      value.prob_nonzero_gradient(np.array([0, 0.25, 0.5, 1]), np.array([1, 2, 3])),
      [[0, 0, 0], [0, 0.375, 0.5625], [0, 0.5, 0.75], [0, 0, 0]], rtol=1e-14)
  np.testing.assert_allclose(  # a flat posterior: 1 - 2 / (N + 1)
      value.prob_nonzero_gradient(beta((1, 1)), np.array([1, 2, 3, 9])),
      [[0, 1 / 3, 1 / 2, 4 / 5]], rtol=1e-13, atol=1e-15)


def test_infogain_by_hand():
  np.testing.assert_allclose(
      value.expected(np.array([0, 0.25, 0.5, 1]), np.array([1, 2, 3])),
      [[0, 0, 0], [0, 0.052734375, 0.0791015625], [0, 0.0625, 0.09375], [0, 0, 0]], rtol=1e-14)
  # A flat posterior: E[2 p^2 (1-p)^3] = 2 B(3, 4) = 1/30, and without end E[p (1-p)^2] = 1/12.
  np.testing.assert_allclose(value.expected(beta((1, 1)), np.array([1, 2, 10 ** 7])),
                             [[0, 1 / 30, 1 / 12]], rtol=1e-12, atol=1e-15)


def test_variance_by_hand():
  np.testing.assert_allclose(
      value.expected(np.array([0, 0.25, 0.5, 1]), np.array([1, 2, 3]), 'variance'),
      [[0, 0, 0], [0, 0.0703125, 0.10546875], [0, 0.125, 0.1875], [0, 0, 0]], rtol=1e-14)
  # E[2 p^2 (1-p)^2] = 2 B(3, 3) = 1/15, and without end E[p (1-p)] = 1/6.
  np.testing.assert_allclose(value.expected(beta((1, 1)), np.array([1, 2, 10 ** 7]), 'variance'),
                             [[0, 1 / 15, 1 / 6]], rtol=1e-12, atol=1e-15)


def test_snr_by_hand():
  """p = 1/2, N = 3, nu = 2: q = 1/4, and 1/4 * 1/2 / (1/2 + 2) = 1/20. nu is 2 unless given."""
  p_M, budget_J = np.array([0, 0.5, 0.2, 1]), np.array([1, 2, 3])
  np.testing.assert_allclose(
      value.expected(p_M, budget_J, 'snr', 2),
      [[0, 0, 0], [0, 0.25 / 9, 0.05], [0, 0.16 * 0.16 / 2.16, 0.16 * 0.32 / 2.32], [0, 0, 0]],
      rtol=1e-14)
  np.testing.assert_array_equal(value.expected(p_M, budget_J, 'snr'),
                                value.expected(p_M, budget_J, 'snr', 2.0))
  np.testing.assert_allclose(value.expected(p_M, budget_J, 'snr', 0.25)[1], [0, 0.125, 1 / 6])


def test_snr_without_noise_counts_two_rollouts_whole():
  p_M = np.array([0.1, 0.5, 0.8])
  q_M = p_M * (1 - p_M)
  np.testing.assert_allclose(value.expected(p_M, np.array([1, 2, 9]), 'snr', 1e-12),
                             np.outer(q_M, [0, 1, 1]), rtol=1e-10)


def test_snr_under_much_noise_is_linear_in_the_budget():
  p_M, budget_J = np.array([0.1, 0.5, 0.8]), np.array([1, 2, 3, 64])
  q_M = p_M * (1 - p_M)
  np.testing.assert_allclose(1e12 * value.expected(p_M, budget_J, 'snr', 1e12),
                             np.outer(q_M ** 2, budget_J - 1), rtol=1e-10)
  posterior = beta((2, 3))  # E[q^2] = B(4, 5) / B(2, 3) = 3 / 70
  np.testing.assert_allclose(1e12 * value.expected(posterior, budget_J, 'snr', 1e12),
                             [3 / 70 * (budget_J - 1)], rtol=1e-6)


@named
@given(p=rates, n=st.integers(1, 200), nu=st.floats(0.05, 200))
@few(max_examples=100)
def test_values_are_those_of_the_formula(name, p, n, nu):
  np.testing.assert_allclose(value.expected(np.array([p]), np.array([n]), name, nu),
                             [[value_of(name, p, n, nu)]], rtol=1e-12, atol=1e-16)
  np.testing.assert_allclose(
      value.VALUES[name](n, p, **({'nu': nu} if name == 'snr' else {})),
      value_of(name, p, n, nu), rtol=1e-12, atol=1e-16)


@named
@given(p=rates, n=st.integers(1, 200))
@few(max_examples=100)
def test_values_of_the_functions_are_those_of_the_names(name, p, n):
  np.testing.assert_allclose(value.expected(np.array([p]), np.array([n]), own(name)),
                             value.expected(np.array([p]), np.array([n]), name), rtol=1e-12,
                             atol=1e-16)


@named
def test_values_are_symmetric_but_for_infogain(name):
  p_M, budget_J = np.array([0.1, 0.37, 0.5]), np.array([2, 5, 30])
  same = np.allclose(value.expected(p_M, budget_J, name), value.expected(1 - p_M, budget_J, name))
  assert same == (name != 'infogain')


@named
@given(success_rate=one, nu=st.floats(0.05, 200))
@few(max_examples=60)
def test_values_rise_ever_more_slowly(name, success_rate, nu):
  limit = 4 / 27 if name == 'infogain' else 1 / 4
  f_J = value.expected(success_rate, np.arange(1, 131), name, nu)[0]
  gain_J = np.diff(f_J)
  assert f_J[0] == pytest.approx(0, abs=1e-11)
  assert np.all(f_J >= 0) and np.all(f_J <= limit + 1e-12)
  assert np.all(gain_J >= -1e-11)
  assert np.all(np.diff(gain_J) <= 1e-11)


@given(success_rate=one)
@few(max_examples=60)
def test_prob_nonzero_gradient_rises_ever_more_slowly(success_rate):
  f_J = value.prob_nonzero_gradient(success_rate, np.arange(1, 131))[0]
  assert f_J[0] == pytest.approx(0, abs=1e-11) and np.all((f_J >= 0) & (f_J <= 1 + 1e-12))
  assert np.all(np.diff(f_J) >= -1e-11) and np.all(np.diff(f_J, 2) <= 1e-11)


def test_rates_may_be_numpy_jax_or_a_list():
  rate, budget_J = [0.25, 0.5, 0, 1], [1, 2, 5]
  for name in NAMES + (own('snr'),):
    expected_MJ = value.expected(np.array(rate), np.array(budget_J), name)
    assert expected_MJ.dtype == np.float64 and expected_MJ.shape == (4, 3)
    for kind in (list, tuple, np.float32, jnp.array):
      np.testing.assert_array_equal(value.expected(kind(rate), np.array(budget_J), name), expected_MJ)
    np.testing.assert_array_equal(value.expected(rate, budget_J, name), expected_MJ)
    np.testing.assert_array_equal(value.expected(rate, jnp.array(budget_J), name), expected_MJ)


# Posteriors.

ENDS = (0.05, 0.5, 1, 7, 60, 1000)


@pytest.mark.parametrize('name', NAMES + ('mixed',))
@pytest.mark.parametrize('a', ENDS)
@pytest.mark.parametrize('b', ENDS)
def test_posterior_values_are_integrals(name, a, b):
  budget_J = np.array([2, 3, 8, 32, 128])
  expected_J = [integral(name, a, b, n) for n in budget_J]
  f = functools.partial(value.expected, beta((a, b)), budget_J)
  np.testing.assert_allclose(f(value.mixed if name == 'mixed' else name), [expected_J], rtol=1e-6)
  if name == 'snr':
    for nu in (0.05, 200):
      np.testing.assert_allclose(f(name, nu), [[integral(name, a, b, n, nu) for n in budget_J]],
                                 rtol=1e-6)
  else:
    np.testing.assert_allclose(f(own(name)), [expected_J], rtol=1e-6)


@named
@given(a=parameters, b=parameters, n=st.integers(2, 256))
@few(max_examples=60)
def test_a_users_function_has_the_same_expectation_as_the_closed_form(name, a, b, n):
  np.testing.assert_allclose(value.expected(beta((a, b)), np.array([n]), own(name)),
                             value.expected(beta((a, b)), np.array([n]), name), rtol=1e-6)


@named
@pytest.mark.parametrize('a, b', [(0.05, 0.05), (0.3, 1000), (1, 1), (1000, 1000)])
def test_one_rollout_is_worth_nothing(name, a, b):
  for f in (name, own(name)):
    np.testing.assert_allclose(value.expected(beta((a, b)), np.array([1]), f), [[0]], atol=1e-15)


def test_posterior_moments_by_hand():
  """E[p (1-p)] and E[p (1-p)^2] are what very many rollouts are worth, as a user's own value too."""
  posterior = beta((2, 3), (0.5, 0.5))
  q_M = np.array([[2 * 3 / 30], [0.25 / 2]])
  np.testing.assert_allclose(value.expected(posterior, np.array([4]), lambda n, p: p * (1 - p) + 0 * n),
                             q_M, rtol=1e-7)
  np.testing.assert_allclose(  # E[p (1-p)^2] = a b (b+1) / ((a+b) (a+b+1) (a+b+2))
      value.expected(posterior, np.array([4]), lambda n, p: n * p * (1 - p) ** 2),
      [[4 * 24 / 210], [4 * 0.375 / 6]], rtol=1e-7)


@named
def test_a_sharp_posterior_is_a_rate(name):
  p_M, budget_J = np.array([0.02, 0.3, 0.9]), np.array([2, 8, 64])
  sharp = Beta(1e6 * p_M, 1e6 * (1 - p_M))
  np.testing.assert_allclose(value.expected(sharp, budget_J, name),
                             value.expected(p_M, budget_J, name), rtol=1e-3)


@named
def test_tasks_do_not_touch_each_other(name):
  """But by the error of the quadrature, whose nodes they may share."""
  rng = np.random.default_rng(0)
  posterior, budget_J = Beta(*10 ** rng.uniform(-1.3, 3, (2, 150))), np.arange(1, 1001)
  budget_MJ = rng.integers(1, 1001, (150, 1000))
  all_MJ = value.expected(posterior, budget_J, name)
  ragged_MJ = value.expected(posterior, budget_MJ, name)
  assert all_MJ.shape == ragged_MJ.shape == (150, 1000)
  np.testing.assert_allclose(ragged_MJ, np.take_along_axis(all_MJ, budget_MJ - 1, axis=1),
                             rtol=1e-12, atol=1e-17)
  for m in (0, 52, 53, 149):
    alone = Beta(*(x_M[m:m + 1] for x_M in posterior))
    np.testing.assert_allclose(value.expected(alone, budget_J, name), all_MJ[m:m + 1],
                               rtol=1e-7 if name == 'snr' else 1e-12, atol=1e-17)


def test_equal_posteriors_have_equal_values_to_the_last_bit():
  rng = np.random.default_rng(1)
  a_M, b_M = rng.choice(10 ** rng.uniform(-1.3, 3, 9), (2, 60))
  value_MJ = value.expected(Beta(a_M, b_M), np.arange(1, 100), 'snr')
  order_M = rng.permutation(60)
  moved_MJ = value.expected(Beta(a_M[order_M], b_M[order_M]), np.arange(1, 100), 'snr')
  np.testing.assert_array_equal(moved_MJ, value_MJ[order_M])
  for m, n in np.argwhere((a_M[:, None] == a_M) & (b_M[:, None] == b_M)):
    np.testing.assert_array_equal(value_MJ[m], value_MJ[n])


@pytest.mark.parametrize('name', NAMES + (value.mixed, own('snr'), own('infogain')))
def test_budgets_may_differ_by_task(name):
  p_M, budget_MJ = np.array([0.3, 0.6]), np.array([[2, 5], [9, 3]])
  for success_rate in (p_M, beta((0.4, 2), (3, 1))):
    all_MJ = value.expected(success_rate, np.arange(1, 10), name)
    np.testing.assert_allclose(value.expected(success_rate, budget_MJ, name), np.take_along_axis(
        all_MJ, budget_MJ - 1, axis=1), rtol=1e-13)


def test_no_tasks_have_no_values():
  for name in NAMES:
    for none in (np.zeros(0), Beta(np.zeros(0), np.zeros(0))):
      assert value.expected(none, np.arange(1, 4), name).shape == (0, 3)


# A user's own value.


def test_a_users_value_of_points():
  f = lambda budget, p: np.sqrt(budget - 1) * p * (1 - p)
  np.testing.assert_allclose(value.expected([0.5, 0, 0.2], [1, 2, 5], f),
                             [[0, 0.25, 0.5], [0, 0, 0], [0, 0.16, 0.32]], rtol=1e-14)


@pytest.mark.parametrize('a, b', [(0.05, 1000), (0.3, 0.3), (2, 5), (1000, 60)])
def test_a_users_value_of_posteriors_is_an_integral(a, b):
  f = lambda budget, p: np.tanh(budget * p * (1 - p))
  log_p, log_not_p, weight = log_odds(a, b)
  budget_J = np.array([1, 4, 32])
  np.testing.assert_allclose(
      value.expected(beta((a, b)), budget_J, f),
      [[weight @ np.tanh(n * np.exp(log_p + log_not_p)) for n in budget_J]], rtol=1e-6)


def test_a_users_value_is_given_floats():
  seen = []

  def f(budget, p):
    seen.append((budget.dtype, p.dtype))
    return budget * p * (1 - p)

  value.expected([0.5], np.array([2], np.int32), f)
  value.expected(beta((1, 1)), np.array([2], np.int32), f)
  assert seen == [(np.float64, np.float64)] * 2


# Bad input.


@pytest.mark.parametrize('name', ['info_gain', '', None, 3])
def test_unknown_values_are_named(name):
  with pytest.raises(ValueError, match=rf"alloc\.value={name!r} .*'infogain', 'variance', 'snr'"):
    value.check(name, 2.0)
  with pytest.raises(ValueError, match=r'alloc\.value='):
    value.expected([0.5], np.array([2]), name)


@pytest.mark.parametrize('nu', [0, -1.0, float('nan'), float('inf')])
@named
def test_nu_must_be_a_positive_number(name, nu):
  with pytest.raises(ValueError, match=rf'alloc\.nu={nu} .*positive'):
    value.check(name, nu)
  with pytest.raises(ValueError, match=r'alloc\.nu='):
    value.expected([0.5], np.array([2]), name, nu)


def test_good_values_pass():
  for name in NAMES + (own('snr'),):
    value.check(name, 0.05)


@pytest.mark.parametrize('success_rate, match', [
    ([0.5, float('nan')], r'\[0, 1\].*\(1, nan\)'),
    ([1.01, 0.5], r'\(0, 1\.01\)'),
    ([0.5, 0.5, -1e-9], r'\(2, -1e-09\)'),
    ([float('inf')], r'\(0, inf\)'),
    ([2, 0, 1, -1], r'\(0, 2\.0\), \(3, -1\.0\)'),
    (0.5, r'vector.*\(\)'),
    ([[0.5, 0.5]], r'vector.*\(1, 2\)'),
    (['a', 'b'], 'numbers'),
    (np.array([0.5, None]), 'numbers.*object'),
    (np.array([0.5j]), 'numbers.*complex'),
    (Beta(np.array([1, 0.0]), np.ones(2)), 'positive.*0\\.'),
    (Beta(np.array([1, -2.0]), np.ones(2)), 'positive.*-2\\.'),
    (Beta(np.ones(2), np.array([1, float('nan')])), 'finite.*nan'),
    (Beta(np.ones(1), np.array([float('inf')])), 'finite.*inf'),
    (Beta(np.ones((1, 2)), np.ones((1, 2))), 'vectors'),
    (Beta(np.ones(1), np.ones(3)), 'posterior has 1 a and 3 b'),
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
