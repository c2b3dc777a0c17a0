"""Values are those of their formulas, at points and expected under posteriors."""

import functools

from hypothesis import given
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from scipy import stats

from kr_jax import knobs
from kr_jax.allocation import value
from kr_jax.allocation.value import Beta, Group, Window

NAMES = tuple(value.VALUES)
# The information in a mixed group.
INFORMATION = {'mixed': lambda p: 1.0, 'infogain': lambda p: p * (1 - p) ** 2, 'variance': lambda p: p * (1 - p)}
OF_A_MIXED_GROUP = tuple(INFORMATION)
# Worth nothing at one rollout and at p = 1. The rest are `hit`, and `coba`, which depends on all tasks.
ALONE = (*OF_A_MIXED_GROUP, 'snr')


def value_of(name: str, p: float, n: int, nu: float = 2.0) -> float:
  """V(N, p) of N >= 1, written out."""
  if name == 'snr':
    q = p * (1 - p)
    return q * q * (n - 1) / (q * (n - 1) + nu)
  if name == 'hit':
    return 1 - (1 - p) ** n
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
  if name == 'hit':
    return float(weight @ -np.expm1(n * log_not_p))
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
  at(value.expected(p_M, budget_J, 'hit'), [zero, [0.25, 0.4375, 0.578125], [0.5, 0.75, 0.875], [1, 1, 1]])
  # A flat posterior. Mixed: 1 - 2 / (N + 1), a hit: 1 - 1 / (N + 1).
  at(value.prob_nonzero_gradient(flat, [1, 2, 3, 9]), [[0, 1 / 3, 1 / 2, 4 / 5]])
  at(value.expected(flat, [0, 1, 2, 9], 'hit'), [[0, 1 / 2, 2 / 3, 9 / 10]])
  # E[2 p^2 (1-p)^3] = 2 B(3, 4) = 1/30, E[2 p^2 (1-p)^2] = 2 B(3, 3) = 1/15; without end E[p (1-p)^2] = 1/12.
  at(value.expected(flat, [1, 2]), [[0, 1 / 30]])
  at(value.expected(flat, [1, 2], 'variance'), [[0, 1 / 15]])
  np.testing.assert_allclose(value.expected(flat, [10 ** 5]), [[1 / 12]], rtol=1e-8)


def test_coba_by_hand():
  """Of tasks at .25, .25 and 1: F = 1/2 becomes 1/2 by the logistic, so the density is that of Beta(5.5, 5.5).

  The variance is 1/8, tau = 3 + 9 * 3/4 = 9.75; at F = 0.8 the density is that of Beta(8.2, 2.8)."""
  value_MJ = value.expected([0.25, 0.25, 1], [0, 1, 4], 'coba')
  density = stats.beta(5.5, 5.5).pdf(0.25)
  np.testing.assert_allclose(
      value_MJ[0], [0, *(density * (1 - np.exp(-n * 3 / 16 / 9.75)) for n in (1, 4))], rtol=1e-12)
  np.testing.assert_array_equal(value_MJ[1:], [value_MJ[0], [0, 0, 0]])
  np.testing.assert_allclose(
      value.expected([0.25, 0.25, 1], [4], 'coba', failure_rate=0.8)[0],
      [stats.beta(8.2, 2.8).pdf(0.25) * (1 - np.exp(-4 * 3 / 16 / 9.75))], rtol=1e-12)
  # Tasks that are all alike have tau = 3, and such as are more unlike than 1/6 have tau = 12.
  assert value.coba(6.0, 0.5, 0.5, 0.0) / value.coba(24.0, 0.5, 0.5, 0.25) == pytest.approx(1)
  # At .25 failures the logistic says .0759, at .45 it says .378.
  for failure_rate, mode in ((0.25, 0.07585818), (0.45, 0.37754067), (0.55, 0.55)):
    assert value.coba(1.0, 0.3, failure_rate, 0.0) == pytest.approx(
        stats.beta(1 + 9 * mode, 10 - 9 * mode).pdf(0.3) * (1 - np.exp(-0.07)), rel=1e-6)


def test_coba_prefers_easy_tasks_while_most_fail_and_hard_ones_later():
  p_M = np.linspace(0, 1, 101)
  best = lambda failure_rate: p_M[np.argmax(value.expected(p_M, [8], 'coba', failure_rate=failure_rate))]
  assert best(0.9) > 0.8 and 0.45 < best(0.5) < 0.55 and best(0.1) < 0.2


@pytest.mark.parametrize('a, b', [(0.3, 0.7), (2, 5), (40, 9)])
def test_coba_is_expected_under_posteriors(a, b):
  log_p, log_not_p, weight = log_odds(a, b)
  for failure_rate in (0.05, 0.6, 1.0):
    expected = [weight @ value.coba(float(n), np.exp(log_p), failure_rate, 0.0) for n in (1, 16)]
    np.testing.assert_allclose(
        value.expected(beta((a, b)), [1, 16], 'coba', failure_rate=failure_rate), [expected], rtol=1e-6)
  rate_M = np.array([a / (a + b), 0.5])
  np.testing.assert_allclose(  # of two tasks, whose mean rates say how many fail, and how unlike they are
      value.expected(beta((a, b), (3, 3)), [4], 'coba')[0],
      weight @ value.coba(4.0, np.exp(log_p), 1 - rate_M.mean(), rate_M.var()), rtol=1e-6)


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
  for name in (*ALONE, 'hit'):
    # A probability near 0 is 1 less a product of N factors, each rounded; the other values scale this error by p.
    rounding = n * np.finfo(float).eps if name in ('mixed', 'hit') else 1e-16
    expected = pytest.approx(value_of(name, p, n, nu), rel=1e-12, abs=rounding)
    assert value.expected([p], [n], name, nu)[0, 0] == expected
    assert value.expected([p], [n], as_function(name, nu))[0, 0] == expected
    assert value.VALUES[name](n, p, **({'nu': nu} if name == 'snr' else {})) == expected


@given(success_rate=one_task, nu=st.floats(0.05, 200))
def test_values_rise_ever_more_slowly(success_rate, nu):
  for name, limit in ((value.mixed, 1), ('infogain', 4 / 27), ('variance', 1 / 4), ('snr', 1 / 4), ('hit', 1),
                      ('coba', 11)):
    value_J = value.expected(success_rate, np.arange(name not in ('hit', 'coba'), 131), name, nu)[0]
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
  """In closed form, and by quadrature: of `snr`, and of functions that are 0 at p = 1."""
  budget_J = np.array([2, 8, 128])
  for a, b in pairs:
    by = functools.partial(value.expected, beta((a, b)), budget_J)
    for name in (*ALONE, 'hit'):
      expected_MJ = [[integral(name, a, b, n) for n in budget_J]]
      np.testing.assert_allclose(by(name), expected_MJ, rtol=1e-6)
      if name != 'hit':
        np.testing.assert_allclose(by(as_function(name)), expected_MJ, rtol=1e-6)
    for nu in (0.05, 200):
      np.testing.assert_allclose(by('snr', nu), [[integral('snr', a, b, n, nu) for n in budget_J]], rtol=1e-6)
    log_p, log_not_p, weight = log_odds(a, b)
    np.testing.assert_allclose(
        by(lambda budget, p: np.tanh(budget * p * (1 - p))),
        [[weight @ np.tanh(n * np.exp(log_p + log_not_p)) for n in budget_J]], rtol=1e-6)


@given(a=parameters, b=parameters, n=st.integers(2, 256))
def test_a_function_has_the_same_expectation_as_the_closed_form(a, b, n):
  for name in ALONE:
    np.testing.assert_allclose(value.expected(beta((a, b)), [n], as_function(name)),
                               value.expected(beta((a, b)), [n], name), rtol=1e-6)


def test_one_rollout_is_worth_nothing():
  """But where a hit counts, and for coba; and no rollouts are of no value, which functions are not asked for."""
  some = beta((0.05, 0.05), (0.3, 1000), (1000, 1000))
  for name in ALONE:
    for f in (name, as_function(name)):
      np.testing.assert_allclose(value.expected(some, [1], f), np.zeros((3, 1)), atol=1e-15)
  for f in (*NAMES, lambda budget, p: p / budget):
    for success_rate in (some, [0.0, 0.3, 1.0]):
      value_MJ = value.expected(success_rate, [0, 5], f)
      np.testing.assert_array_equal(value_MJ[:, 0], 0)
      np.testing.assert_allclose(value_MJ[:, 1:], value.expected(success_rate, [5], f), rtol=1e-12)


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
    for m in (0, 52, 59) if name != 'coba' else ():
      alone = Beta(*(x_M[m:m + 1] for x_M in posterior))
      np.testing.assert_allclose(value.expected(alone, budget_J, name), all_MJ[m:m + 1], rtol=1e-7, atol=1e-17)
  np.testing.assert_allclose(value.expected([0.3, 0.6], [[2, 5], [9, 3]]), [
      [value_of('infogain', 0.3, 2), value_of('infogain', 0.3, 5)],
      [value_of('infogain', 0.6, 9), value_of('infogain', 0.6, 3)]], rtol=1e-13)


@pytest.mark.parametrize('known, message', [
    (dict(failure_rate=1.5), r'failure_rate=1.5 must lie in \[0, 1\]'),
    (dict(evidence_M=[-1.0, 2.0]), 'must hold finite numbers of rollouts, 0 or more')])
def test_what_cannot_be_known_is_refused(known, message):
  with pytest.raises(ValueError, match=message):
    value.expected([0.3, 0.5], [1, 2], 'coba', **known)


@pytest.mark.parametrize('evidence', [False, True])
def test_equal_posteriors_have_equal_values_to_the_last_bit(evidence):
  rng = np.random.default_rng(1)
  a_M, b_M = rng.choice(10 ** rng.uniform(-1.3, 3, 9), (2, 60))
  by = lambda a_M, b_M: value.expected(
      Beta(a_M, b_M), np.arange(1, 100), 'snr', evidence_M=a_M + b_M if evidence else None)
  value_MJ, order_M = by(a_M, b_M), rng.permutation(60)
  np.testing.assert_array_equal(by(a_M[order_M], b_M[order_M]), value_MJ[order_M])
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


# What advantages know from before the step.


def test_snr_counts_evidence_by_hand():
  """c = 3, N = 2: n = 2 * 4 / 5 = 1.6, and q n q / (n q + nu) = .25 * .4 / 2.4. N = 1: n = 3/4. c = 0: n = N - 1."""
  by = functools.partial(value.expected, [0.5, 0.5], [0, 1, 2], 'snr')
  np.testing.assert_allclose(by(evidence_M=[3.0, 0.0]), [
      [0, 0.25 * 0.1875 / 2.1875, 0.25 * 0.4 / 2.4], [0, 0, 0.25 * 0.25 / 2.25]], rtol=1e-14)
  np.testing.assert_array_equal(by(evidence_M=[0.0, 0.0]), by())
  for name in set(NAMES) - {'snr'}:  # the others do not read it
    np.testing.assert_array_equal(value.expected([0.5, 0.5], [0, 1, 2], name, evidence_M=[3.0, 0.0]),
                                  value.expected([0.5, 0.5], [0, 1, 2], name))


@pytest.mark.parametrize('a, b, n', [(0.5, 0.5, 1), (0.5, 0.5, 2), (3, 1, 4), (2, 6, 2)])
def test_the_advantage_that_counts_evidence_has_the_power_that_snr_expects(a, b, n):
  """E[advantage^2] = E[q] (c + N) / (c + N - 1), c = a + b, over 400,000 groups of tasks drawn from the posterior."""
  rng = np.random.default_rng(0)
  p_M = rng.beta(a, b, 400_000)
  reward_MN = rng.uniform(size=(len(p_M), n)) < p_M[:, None]
  others_M = reward_MN[:, 1:].sum(axis=1)
  square_M = (reward_MN[:, 0] - (a + others_M) / (a + b + n - 1)) ** 2
  expected = a * b / ((a + b) * (a + b + 1)) * (a + b + n) / (a + b + n - 1)
  assert abs(square_M.mean() - expected) < 4 * square_M.std() / np.sqrt(len(p_M)) + 1e-12
  # So the n of snr, that which power q nu / n would come of, is N (c + N - 1) / (c + N).
  assert value._independent(n, a + b) == pytest.approx(n * a * b / ((a + b) * (a + b + 1)) / expected)


# Groups of earlier waves.


def worth_of_more(name: str, a: float, b: float, right: int, wrong: int, n: int) -> float:
  """E[(whether the outcomes wanted are there after n more - whether they are there now) g(p)], outcome by outcome."""
  log_p, log_not_p, weight = (x[::25] for x in log_odds(a, b))
  wanted = lambda k, f: k > 0 and (f > 0 or name == 'hit')
  added = sum(special.comb(n, k) * np.exp(k * log_p + (n - k) * log_not_p) * (
      wanted(right + k, wrong + n - k) - wanted(right, wrong)) for k in range(n + 1))
  return float(25 * weight @ (added * INFORMATION.get(name, lambda p: 1.0)(np.exp(log_p))))


def test_what_a_group_gains_by_hand():
  """Under a flat posterior, E[1 - (1-p)^n] = n / (n + 1) of a group of wrong ones, and so of one of right ones."""
  flat, group = beta(*[(1, 1)] * 4), Group(np.array([0, 0, 2, 1]), np.array([0, 3, 0, 1]))
  np.testing.assert_allclose(value.expected(flat, [0, 1, 3], 'mixed', group=group), [
      [0, 0, 1 / 2], [0, 1 / 2, 3 / 4], [0, 1 / 2, 3 / 4], [0, 0, 0]], rtol=1e-14)
  np.testing.assert_allclose(value.expected(flat, [0, 1, 3], 'hit', group=group), [
      [0, 1 / 2, 3 / 4], [0, 1 / 2, 3 / 4], [0, 0, 0], [0, 0, 0]], rtol=1e-14)
  # At p = 1/4: p (1-p) = 3/16, times 1 - (3/4)^2 for the wrong ones and 1 - (1/4)^2 for the right ones.
  np.testing.assert_allclose(value.expected([0.25] * 4, [2], 'variance', group=group)[:, 0], [
      3 / 16 * 3 / 8, 3 / 16 * 7 / 16, 3 / 16 * 15 / 16, 0], rtol=1e-14)


@pytest.mark.parametrize('name', [*OF_A_MIXED_GROUP, 'hit'])
def test_what_further_rollouts_add_is_an_integral(name):
  for a, b in ((0.5, 0.5), (3, 1.5), (0.2, 9)):
    for right, wrong in ((0, 0), (0, 1), (0, 4), (1, 0), (3, 0), (1, 1), (2, 3)):
      group = Group(np.array([right]), np.array([wrong]))
      after = beta((a + right, b + wrong))
      expected = [worth_of_more(name, *(x_M[0] for x_M in after), right, wrong, n) for n in (0, 1, 2, 7)]
      actual = value.expected(after, [0, 1, 2, 7], name, group=group)
      np.testing.assert_allclose(actual, [expected], rtol=1e-7, atol=1e-12)


def test_other_values_are_those_of_the_whole_group():
  group = Group(np.array([1, 0]), np.array([1, 3]), np.array([0, 1]))
  np.testing.assert_array_equal(group.size_M, [2, 4])
  for posterior in (beta((2, 3), (0.5, 6)), np.array([0.4, 0.1])):
    for name in ('snr', 'coba', as_function('snr')):
      whole_MJ = value.expected(posterior, np.arange(9), name)
      np.testing.assert_allclose(value.expected(posterior, np.arange(4), name, group=group),
                                 np.stack([whole_MJ[0, 2:6], whole_MJ[1, 4:8]]), rtol=1e-12)
  np.testing.assert_allclose(
      value.expected([0.5, 0.5], [1], 'snr', group=group, evidence_M=[1.0, 4.0]),
      value.expected([0.5, 0.5], [[3], [5]], 'snr', evidence_M=[1.0, 4.0]), rtol=1e-14)


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
