"""What is known of tasks follows from their verdicts, and the estimates from what is known."""

import functools

from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.allocation.value import Beta, Window


def stats_of(successes_I, failures_I, **known) -> types.TaskStats:
  s, f = np.array(successes_I, float), np.array(failures_I, float)
  return estimate.init(len(s))._replace(
      successes_I=s, failures_I=f, rollouts_I=np.ceil(s + f).astype(np.int64), **known)


def window_of(*verdicts: int) -> list[int]:
  """A row of recent_IW, the newest verdict last."""
  return [-1] * (16 - len(verdicts)) + list(verdicts)


def observe(stats: types.TaskStats, index: int, *groups, discount: float = 1.0) -> types.TaskStats:
  """One group after another of a single task, a token each."""
  for group in groups:
    n = len(group)
    stats = estimate.observe(stats, np.array([index]), np.zeros(n, int), np.array(group, float),
                             np.ones(n, int), discount=discount)
  return stats


# Observing.


def test_init_knows_nothing():
  stats = estimate.init(3)
  for x_I in (stats.successes_I, stats.failures_I, stats.tokens_I, stats.window_rate_I):
    np.testing.assert_array_equal(x_I, np.zeros(3))
    assert x_I.dtype == np.float64
  np.testing.assert_array_equal(stats.rollouts_I, np.zeros(3))
  assert stats.rollouts_I.dtype == np.int64
  np.testing.assert_array_equal(stats.recent_IW, np.full((3, 16), -1))
  assert stats.recent_IW.dtype == np.int8
  np.testing.assert_array_equal(stats.gradient, np.zeros(4))
  stats.successes_I[0] = 1
  assert stats.failures_I[0] == stats.tokens_I[0] == stats.window_rate_I[0] == 0  # no memory is shared


def test_observe_by_hand():
  """Ragged groups; the step's second task, row 0, has no rollout; row 1 is not in the step."""
  before = estimate.init(4)._replace(
      successes_I=np.array([1, 2, 2, 0.0]), failures_I=np.array([0, 4, 1, 3.0]),
      tokens_I=np.array([4, 60, 9, 30.0]), rollouts_I=np.array([1, 6, 3, 3]),
      recent_IW=np.array([window_of(1), window_of(0, 0, 0, 1, 0, 1), window_of(1, 1, 0),
                          window_of(0, 0, 0)], np.int8),
      window_rate_I=np.array([1, 1 / 3, 2 / 3, 0]), gradient=np.arange(4.0))
  kept = jax.tree.map(np.copy, before)
  after = estimate.observe(before, np.array([2, 0, 3]), np.array([0, 0, 0, 2]),
                           np.array([1, 0, 1, 1], np.float32), np.array([5, 6, 7, 8], np.int32),
                           discount=0.5)
  np.testing.assert_array_equal(after.successes_I, [0.5, 1, 3, 1])
  np.testing.assert_array_equal(after.failures_I, [0, 2, 1.5, 1.5])
  np.testing.assert_array_equal(after.tokens_I, [2, 30, 4.5 + 18, 15 + 8])
  np.testing.assert_array_equal(after.rollouts_I, [1, 6, 6, 4])
  np.testing.assert_array_equal(
      after.recent_IW, [window_of(1), window_of(0, 0, 0, 1, 0, 1), window_of(1, 1, 0, 1, 0, 1),
                        window_of(0, 0, 0, 1)])
  np.testing.assert_allclose(after.window_rate_I, [1, 1 / 3, 4 / 6, 1 / 4], rtol=1e-15)
  np.testing.assert_array_equal(after.gradient, np.arange(4.0))
  for x, y in zip(after, before):
    assert x.dtype == y.dtype and x.shape == y.shape
  jax.tree.map(np.testing.assert_array_equal, before, kept)  # not changed in place


def test_what_is_no_rollout_is_not_observed():
  before = stats_of([1, 2], [3, 0])
  rollouts = np.array([0, 0, 1]), np.array([1, 0, 1.0]), np.array([5, 6, 7])
  padded = np.array([0, 0, 1, 2, 2]), np.array([1, 0, 1, 0, 1.0]), np.array([5, 6, 7, 0, 9])
  jax.tree.map(np.testing.assert_array_equal,
               estimate.observe(before, np.array([1, 0]), *padded, discount=0.5),
               estimate.observe(before, np.array([1, 0]), *rollouts, discount=0.5))


@pytest.mark.parametrize('discount', [1.0, 0.95])
def test_a_verifier_that_fails_at_random_leaves_the_estimates_as_they_are(discount):
  """Monte Carlo, of 600 tasks. A failure is left out; as a wrong answer it would lower all rates by its share."""
  rng, M, N, share = np.random.default_rng(0), 600, 6, 0.2
  p_M, index_M, task_R = rng.beta(1, 1, M), rng.permutation(M), np.repeat(np.arange(M), N)
  whole = left_out = wrong = estimate.init(M)
  for _ in range(8):
    verdict_R = (rng.random(M * N) < p_M[task_R]).astype(float)
    fails_R = rng.random(M * N) < share
    see = lambda stats, task_R, verdict_R: estimate.observe(
        stats, index_M, task_R, verdict_R, np.full(M * N, 3), discount=discount)
    whole = see(whole, task_R, verdict_R)
    left_out = see(left_out, np.where(fails_R, M, task_R), np.where(fails_R, 0, verdict_R))
    wrong = see(wrong, task_R, np.where(fails_R, 0, verdict_R))
  for kind, noise in (('posterior', 5e-3), ('window', 1e-2)):  # some two standard errors of a mean over the tasks
    error = lambda stats: estimate.mean_rate(estimate.success_rate(stats, index_M, kind)) - p_M
    assert abs(error(whole).mean()) < noise and abs(error(left_out).mean()) < noise
    # High rates and low ones alike.
    assert np.polyfit(p_M, error(left_out), 1)[0] == pytest.approx(np.polyfit(p_M, error(whole), 1)[0], abs=0.04)
    assert error(wrong).mean() < -0.08
  a, b = estimate.prior(left_out)
  assert (a, b) == pytest.approx(estimate.prior(whole), rel=0.1)
  assert estimate.tokens(left_out, index_M, default=0.0) == pytest.approx(np.full(M, 3.0))


def test_a_step_without_rollouts_only_discounts():
  before = stats_of([1, 2], [3, 0], tokens_I=np.array([8.0, 4.0]), window_rate_I=np.ones(2))
  none = np.zeros(0, int)
  after = estimate.observe(before, np.array([1]), none, none, none, discount=0.5)
  np.testing.assert_array_equal(after.successes_I, [0.5, 1])
  np.testing.assert_array_equal(after.failures_I, [1.5, 0])
  np.testing.assert_array_equal(after.tokens_I, [4, 2])
  for name in ('rollouts_I', 'recent_IW', 'window_rate_I'):
    np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_window_rate_by_hand():
  rate = lambda *groups: observe(estimate.init(2), 1, *groups).window_rate_I[1]
  assert rate([1]) == 1
  assert rate([1, 1], [0, 0]) == 1 / 2
  # Ten then eight: of the last 16, eight are from the first group.
  assert rate([1] * 2 + [0] * 8, [1] * 8) == 8 / 16
  assert rate([0] * 9 + [1], [1] * 8) == 9 / 16
  assert rate([1] * 15, [0] * 15) == 1 / 16
  # A group of 16 or more counts alone, and whole.
  assert rate([1] * 16, [0] * 16) == 0
  assert rate([1] * 16, [1] * 10 + [0] * 30) == 1 / 4
  assert rate([0] * 4 + [1] * 16) == 16 / 20
  # The next small group is taken with the last of the large one.
  assert rate([0] * 20 + [1] * 20, [0] * 4) == 12 / 16


def test_the_window_knows_no_discount():
  stats = observe(estimate.init(1), 0, [1, 1, 0, 0], [1], discount=0.1)
  assert stats.window_rate_I[0] == 3 / 5 and stats.rollouts_I[0] == 5
  assert stats.successes_I[0] == pytest.approx(1.2)


@given(seed=st.integers(0, 2 ** 32 - 1), discount=st.floats(0, 1),
       sizes=st.sampled_from(((9, 9, 9, 9), (60, 3, 50), (0, 40, 0, 5))))
def test_observe_is_the_loop_over_rollouts(seed, discount, sizes):
  rng = np.random.default_rng(seed)
  stats = estimate.init(7)
  successes_I, failures_I, tokens_I = [0.0] * 7, [0.0] * 7, [0.0] * 7
  verdicts = [[] for _ in range(7)]
  window_rate_I = [0.0] * 7
  for size in sizes:
    index_M, task_R = rng.permutation(7)[:4], np.sort(rng.integers(0, 4, size))
    verdict_R = rng.integers(0, 2, size).astype(np.float32)
    length_R = rng.integers(1, 100, size).astype(np.int32)
    stats = estimate.observe(stats, index_M, task_R, verdict_R, length_R, discount=discount)
    successes_I = [discount * s for s in successes_I]
    failures_I = [discount * f for f in failures_I]
    tokens_I = [discount * t for t in tokens_I]
    groups = {}
    for task, verdict, length in zip(task_R, verdict_R, length_R):
      i = index_M[task]
      (successes_I if verdict else failures_I)[i] += 1
      tokens_I[i] += length
      groups.setdefault(i, []).append(int(verdict))
    for i, group in groups.items():
      verdicts[i] += group
      latest = group if len(group) >= 16 else verdicts[i][-16:]
      window_rate_I[i] = sum(latest) / len(latest)
  np.testing.assert_allclose(stats.successes_I, successes_I, rtol=1e-14)
  np.testing.assert_allclose(stats.failures_I, failures_I, rtol=1e-14)
  np.testing.assert_allclose(stats.tokens_I, tokens_I, rtol=1e-14)
  np.testing.assert_array_equal(stats.rollouts_I, [len(v) for v in verdicts])
  np.testing.assert_array_equal(stats.recent_IW, [window_of(*v[-16:]) for v in verdicts])
  np.testing.assert_allclose(stats.window_rate_I, window_rate_I, rtol=1e-14)
  rate_M, known_M = estimate.window(stats, np.arange(7))
  np.testing.assert_array_equal(known_M, [len(v) >= 8 for v in verdicts])
  np.testing.assert_allclose(rate_M, window_rate_I, rtol=1e-14)


def test_observe_takes_jax_arrays_and_lists():
  args = ([2, 0], [0, 0, 1], [1.0, 0.0, 1.0], [3, 4, 5])
  expected = estimate.observe(estimate.init(3), *map(np.array, args), discount=0.9)
  for kind in (list, jax.numpy.array):
    got = estimate.observe(estimate.init(3), *map(kind, args), discount=0.9)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# The prior.


def test_prior_by_hand():
  """n = 2, S = 2, m (1-m) = 1/4, A = 7, B = 14: rho = 1/7, so a + b = 6."""
  assert estimate.prior(stats_of([2, 2, 0, 0, 1, 1, 1, 1], [0, 0, 2, 2, 1, 1, 1, 1])) == (
      pytest.approx((3, 3)))


def test_prior_keeps_to_its_bounds():
  sum_of = lambda *counts: sum(estimate.prior(stats_of(*counts)))
  assert sum_of([8, 0] * 8, [0, 8] * 8) == pytest.approx(1 / 0.95 - 1)  # each task all or nothing
  assert sum_of([4] * 16, [4] * 16) == pytest.approx(19)  # all tasks alike


def test_prior_without_enough_to_fit():
  assert estimate.prior(estimate.init(5)) == pytest.approx((0.5, 0.5))
  assert estimate.prior(estimate.init(0)) == pytest.approx((0.5, 0.5))
  assert estimate.prior(stats_of([8] * 20, [0] * 20)) == pytest.approx((161 / 162, 1 / 162))
  assert estimate.prior(stats_of([0] * 20, [8] * 20)) == pytest.approx((1 / 162, 161 / 162))
  assert estimate.prior(stats_of([3, 0, 1], [1, 4, 0])) == pytest.approx((5 / 11, 6 / 11))
  seven = stats_of([2, 2, 0, 0, 1, 1, 1], [0, 0, 2, 2, 1, 1, 1])  # one too few
  assert estimate.prior(seven) == pytest.approx((0.5, 0.5))
  # Single rollouts say how many succeed, but nothing of the spread.
  assert estimate.prior(stats_of([1, 0] * 20, [0, 1] * 20)) == pytest.approx((0.5, 0.5))
  # The mean, though, is that of all.
  a, b = estimate.prior(stats_of([2, 2, 0, 0, 1, 1, 1, 1] + [1] * 8,
                                 [0, 0, 2, 2, 1, 1, 1, 1] + [0] * 8))
  assert (a, b) == pytest.approx((6 * 17 / 26, 6 * 9 / 26))


def test_prior_finds_the_population():
  rng = np.random.default_rng(4)
  for n_I in (np.full(4000, 8), rng.integers(2, 30, 4000)):
    for a, b in ((0.5, 0.5), (2, 2), (0.3, 0.9)):
      successes_I = rng.binomial(n_I, rng.beta(a, b, 4000))
      assert estimate.prior(stats_of(successes_I, n_I - successes_I)) == pytest.approx((a, b), rel=0.12)


def prior_by_loops(stats: types.TaskStats) -> tuple[float, float]:
  """Moments, term by term, of tasks with more than 1.5 rollouts left."""
  s_I, f_I = stats.successes_I, stats.failures_I
  mean = (sum(s_I) + 1) / (sum(s_I) + sum(f_I) + 2)
  seen = [(s + f, s / (s + f)) for s, f in zip(s_I, f_I) if s + f > 1.5]
  concentration = 1.0
  W, hits = sum(n for n, _ in seen), sum(n * p for n, p in seen)
  if len(seen) >= 8 and 0 < hits < W:
    m = hits / W
    S = sum(n * (p - m) ** 2 for n, p in seen)
    A = sum(1 - n / W for n, _ in seen)
    B = sum(n * (1 - n / W) for n, _ in seen)
    rho = min(max((S / (m * (1 - m)) - A) / (B - A), 0.05), 0.95)
    concentration = 1 / rho - 1
  return mean * concentration, (1 - mean) * concentration


counts = st.just(0.0) | st.integers(0, 9).map(float) | st.floats(0, 300)


@given(evidence=st.lists(st.tuples(counts, counts), max_size=24))
def test_prior_is_positive_and_that_of_the_loops(evidence):
  stats = stats_of([s for s, _ in evidence], [f for _, f in evidence])
  a, b = estimate.prior(stats)
  assert np.isfinite(a) and np.isfinite(b) and a > 0 and b > 0
  assert 1 / 0.95 - 1 - 1e-9 <= a + b <= 19 + 1e-9
  assert (a, b) == pytest.approx(prior_by_loops(stats), rel=1e-6)
  turned = stats_of(stats.failures_I, stats.successes_I)
  assert estimate.prior(turned) == pytest.approx((b, a), rel=1e-6)


# Estimates.


def test_posterior_by_hand():
  """Two tasks are too few for a fit: mean 4/6, a + b = 1."""
  a_M, b_M = estimate.posterior(stats_of([3, 0], [1, 0]), np.array([1, 0, 1]))
  np.testing.assert_allclose(a_M, [2 / 3, 3 + 2 / 3, 2 / 3])
  np.testing.assert_allclose(b_M, [1 / 3, 1 + 1 / 3, 1 / 3])


def test_old_evidence_fades_into_the_prior():
  fresh = observe(estimate.init(2), 0, [1] * 8)
  none = np.zeros(0, int)
  faded = fresh
  for _ in range(50):
    faded = estimate.observe(faded, np.array([1]), none, none, none, discount=0.5)
  mean_M = lambda stats: estimate.mean_rate(estimate.posterior(stats, np.arange(2)))
  assert mean_M(fresh)[0] > mean_M(fresh)[1]
  np.testing.assert_allclose(mean_M(faded), 0.5)
  np.testing.assert_array_equal(faded.rollouts_I, [8, 0])


def test_window_by_hand():
  stats = observe(estimate.init(4), 2, [1] * 7)
  stats = observe(stats, 0, [1] * 2 + [0] * 4, [1, 0])
  rate_M, known_M = estimate.window(stats, np.array([2, 0, 3]))
  np.testing.assert_array_equal(known_M, [False, True, False])
  assert known_M.dtype == bool and rate_M[1] == 3 / 8


def test_a_task_is_known_from_its_eighth_rollout():
  """Whatever the discount leaves of them."""
  for groups, known in (([[1] * 7], False), ([[1] * 8], True), ([[1]] * 8, True)):
    stats = observe(estimate.init(1), 0, *groups, discount=0.5)
    assert estimate.window(stats, np.array([0])).known_M[0] == known


def test_success_rates_by_their_kind():
  stats, index_M = observe(estimate.init(2), 1, [1, 0, 0] * 3), np.array([1, 0])
  for kind, f in (('posterior', estimate.posterior), ('window', estimate.window)):
    success_rate = estimate.success_rate(stats, index_M, kind)
    assert type(success_rate) is type(f(stats, index_M))
    jax.tree.map(np.testing.assert_array_equal, success_rate, f(stats, index_M))


def test_mean_rate_by_hand():
  np.testing.assert_allclose(
      estimate.mean_rate(Beta(np.array([1, 0.5, 30]), np.array([3, 0.5, 10]))), [0.25, 0.5, 0.75])
  np.testing.assert_array_equal(
      estimate.mean_rate(Window(np.array([0, 0.25, 1, np.nan]), np.array([True, True, False, False]))),
      [0, 0.25, 0.5, 0.5])


def test_estimates_are_those_of_the_tasks_asked_for():
  rng = np.random.default_rng(0)
  stats, index_M = estimate.init(9), np.array([7, 0, 7, 3])
  for i in range(9):
    stats = observe(stats, i, rng.integers(0, 2, i))
  for f in (estimate.posterior, estimate.window, functools.partial(estimate.tokens, default=1.0)):
    of_all, of_some = f(stats, np.arange(9)), f(stats, index_M)
    jax.tree.map(lambda x_I, x_M: np.testing.assert_array_equal(x_I[index_M], x_M), of_all, of_some)


# Tokens.


def test_tokens_by_hand():
  """100 tokens of 10 rollouts: 10 on average, and four rollouts of 10 are added to each."""
  stats = stats_of([1, 0, 6], [1, 0, 2], tokens_I=np.array([30.0, 0, 70]))
  np.testing.assert_allclose(estimate.tokens(stats, np.array([2, 0, 1]), default=99.0),
                             [110 / 12, 70 / 6, 10])


def test_tokens_before_any_was_seen_are_the_default():
  np.testing.assert_array_equal(estimate.tokens(estimate.init(3), np.array([0, 2]), default=50.0),
                                [50, 50])


def test_tokens_go_from_the_mean_of_all_to_that_of_the_task():
  stats = estimate.init(2)
  expected = []
  for _ in range(200):  # of task 0 alone, five tokens each; task 1 has one rollout of 25
    stats = estimate.observe(stats, np.array([0, 1]), np.array([0, 0, 1]), np.ones(3),
                             np.array([5, 5, 25]), discount=1.0)
    expected.append(estimate.tokens(stats, np.arange(2), default=1.0))
  np.testing.assert_allclose(expected[0], [(10 + 4 * 35 / 3) / 6, (25 + 4 * 35 / 3) / 5])
  assert np.all(np.diff(expected, axis=0)[:, 0] < 0) and np.all(np.diff(expected, axis=0)[:, 1] > 0)
  np.testing.assert_allclose(expected[-1], [5, 25], rtol=0.02)


def test_discounted_tokens_keep_their_mean():
  stats = stats_of([4, 1], [0, 3], tokens_I=np.array([40.0, 80.0]))
  none = np.zeros(0, int)
  faded = estimate.observe(stats, np.array([0]), none, none, none, discount=0.5)
  np.testing.assert_allclose(estimate.tokens(faded, np.arange(2), default=1.0),
                             [(20 + 60) / 6, (40 + 60) / 6])


# The gradient's noise.


def measured(*gradient: float) -> types.TaskStats:
  return estimate.init(1)._replace(gradient=np.array(gradient, float))


def test_nu_by_hand():
  """Noise 9 / 3; signal 2 of scale 4, and 3 / 2 of scale 20: 32 / 24."""
  nu = estimate.nu(measured(2, 4, 9, 3), default=2.0)
  assert nu == pytest.approx(2.25) and isinstance(nu, float)


def test_nu_goes_from_the_default_to_what_is_measured():
  of = lambda n: estimate.nu(measured(2 * n, 4 * n, 9 * n, 3 * n), default=2.0)
  assert of(1e-9) == pytest.approx(2) and of(1e9) == pytest.approx(6)
  assert np.all(np.diff([of(n) for n in (0.1, 1, 10, 100)]) > 0)
  assert 2 < estimate.nu(measured(-1, 4, 9, 3), default=2.0) < 4  # one bad measurement is no proof


def test_nu_is_the_default_where_nothing_was_measured():
  assert estimate.nu(estimate.init(3), default=1.5) == 1.5
  assert estimate.nu(measured(1, 0, 1, 1), default=1.5) == 1.5
  assert estimate.nu(measured(1, 1, 1, 0), default=1.5) == 1.5


def test_nu_keeps_to_its_bounds():
  """Where so much was measured that the default no longer counts."""
  for (signal, signal_scale, noise, noise_scale), nu in (
      ((1, 1, 0.04, 1), 0.05), ((1, 1, 0.06, 1), 0.06), ((1, 1, 0, 1), 0.05), ((1, 1, 199, 1), 199),
      ((1, 1, 201, 1), 200), ((0, 1, 1, 1), 200), ((-1, 1, 1, 1), 200), ((-1, 1, -1, 1), 0.05)):
    many = measured(1e12 * signal, 1e12 * signal_scale, noise, noise_scale)
    assert estimate.nu(many, default=2.0) == pytest.approx(nu)


def test_observe_gradient_by_hand():
  before = measured(1, 2, 3, 4)
  kept = jax.tree.map(np.copy, before)
  after = estimate.observe_gradient(before, jax.numpy.array([10.0, 20, 30, 40]), discount=0.5)
  np.testing.assert_array_equal(after.gradient, [10.5, 21, 31.5, 42])
  assert after.gradient.dtype == np.float64
  jax.tree.map(np.testing.assert_array_equal, before, kept)  # not changed in place
  jax.tree.map(np.testing.assert_array_equal, after._replace(gradient=before.gradient), before)


def test_nu_is_a_ratio_of_sums():
  stats = estimate.init(1)
  for gradient in ((3, 1, 2, 1), (-1, 1, 4, 1)):  # signal 2 / 2 and noise 6 / 2
    stats = estimate.observe_gradient(stats, 1e12 * np.array(gradient), discount=1.0)
  assert estimate.nu(stats, default=9.0) == pytest.approx(3)


def test_old_measurements_of_the_gradient_fade():
  stats = measured(1, 1, 100, 1)
  for _ in range(100):
    stats = estimate.observe_gradient(stats, 1e12 * np.array([1, 1, 4, 1]), discount=0.8)
  assert estimate.nu(stats, default=9.0) == pytest.approx(4)
