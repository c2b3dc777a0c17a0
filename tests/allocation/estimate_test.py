"""What is known of tasks follows from their verdicts, and the estimates from what is known."""

import functools

from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.allocation import prior
from kr_jax.allocation import recalibrate
from kr_jax.allocation.value import Beta, Window


def stats_of(successes_I, failures_I, **known) -> types.TaskStats:
  """Statistics after one visit of each task that has rollouts."""
  s, f = np.array(successes_I, float), np.array(failures_I, float)
  seen_I = (s + f > 0).astype(float)
  return estimate.init(len(s))._replace(
      successes_I=s, failures_I=f, rollouts_I=np.ceil(s + f).astype(np.int64), visits_I=seen_I,
      rates_I=s / np.maximum(s + f, 1), **known)


def window_of(*verdicts: int) -> list[int]:
  """A row of recent_IW, the newest verdict last."""
  return [-1] * (16 - len(verdicts)) + list(verdicts)


def observe(stats: types.TaskStats, index: int, *groups, discount: float = 1.0) -> types.TaskStats:
  """One group after another of a single task, a token each. discount: of a pass."""
  for group in groups:
    n = len(group)
    stats = estimate.observe(stats, np.array([index]), np.zeros(n, int), np.array(group, float),
                             np.ones(n, int), discount=discount)
  return stats


# Observing.


def test_init_knows_nothing():
  stats = estimate.init(3)
  for x_I in (stats.successes_I, stats.failures_I, stats.visits_I, stats.rates_I, stats.window_rate_I):
    np.testing.assert_array_equal(x_I, np.zeros(3))
    assert x_I.dtype == np.float64
  np.testing.assert_array_equal(stats.rollouts_I, np.zeros(3))
  assert stats.rollouts_I.dtype == np.int64
  np.testing.assert_array_equal(stats.recent_IW, np.full((3, 16), -1))
  assert stats.recent_IW.dtype == np.int8
  np.testing.assert_array_equal(stats.tokens_OI, np.zeros((2, 3)))
  np.testing.assert_array_equal(stats.gradient, np.zeros(4))
  np.testing.assert_array_equal(stats.calibration, [0, 1, 1, 1])
  stats.successes_I[0] = 1
  assert stats.failures_I[0] == stats.rates_I[0] == stats.window_rate_I[0] == 0  # no memory is shared


def test_observe_by_hand():
  """Ragged groups; the step's second task, row 0, has no rollout; row 1 is not in the step, which is half of a pass."""
  before = estimate.init(4, groups=0)._replace(
      successes_I=np.array([1, 2, 2, 0.0]), failures_I=np.array([0, 4, 1, 3.0]),
      tokens_OI=np.array([[0, 40, 3, 30.0], [4, 20, 6, 0.0]]), rollouts_I=np.array([1, 6, 3, 3]),
      visits_I=np.array([1, 2, 1, 1.0]), rates_I=np.array([1, 0.5, 0.75, 0.0]),
      recent_IW=np.array([window_of(1), window_of(0, 0, 0, 1, 0, 1), window_of(1, 1, 0),
                          window_of(0, 0, 0)], np.int8),
      window_rate_I=np.array([1, 1 / 3, 2 / 3, 0]), gradient=np.arange(4.0),
      reward_O2=np.array([[1, 10], [10, 10.0]]))
  kept = jax.tree.map(np.copy, before)
  after = estimate.observe(before, np.array([2, 0, 3]), np.array([0, 0, 0, 2]),
                           np.array([1, 0, 1, 1], np.float32), np.array([5, 6, 7, 8], np.int32),
                           discount=0.5 ** (4 / 3), reward_R=np.array([2, 0.5, 2, 1.0]))
  np.testing.assert_allclose(after.successes_I, [0.5, 1, 3, 1])
  np.testing.assert_allclose(after.failures_I, [0, 2, 1.5, 1.5])
  np.testing.assert_allclose(after.tokens_OI, [[0, 20, 1.5 + 6, 15], [2, 10, 3 + 12, 8]])
  np.testing.assert_allclose(after.visits_I, [0.5, 1, 1.5, 1.5])
  np.testing.assert_allclose(after.rates_I, [0.5, 0.25, 0.375 + 2 / 3, 1])
  np.testing.assert_allclose(after.reward_O2, [[0.9 + 0.5, 9 + 1], [9 + 5, 9 + 3]])
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
  whole = left_out = wrong = estimate.init(M, groups=0)
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
  ab = lambda stats: [x_I[0] for x_I in prior.fit(stats)]
  assert ab(left_out) == pytest.approx(ab(whole), rel=0.1)
  assert estimate.tokens(left_out, index_M, default=0.0) == pytest.approx(np.full(M, 3.0))


def test_a_step_without_rollouts_only_discounts():
  before = stats_of([1, 2], [3, 0], tokens_OI=np.array([[8.0, 4.0], [2, 0]]), window_rate_I=np.ones(2))
  none = np.zeros(0, int)
  after = estimate.observe(before, np.array([1]), none, none, none, discount=0.25)
  np.testing.assert_array_equal(after.successes_I, [0.5, 1])
  np.testing.assert_array_equal(after.failures_I, [1.5, 0])
  np.testing.assert_array_equal(after.tokens_OI, [[4, 2], [1, 0]])
  for name in ('rollouts_I', 'recent_IW', 'window_rate_I', 'forecast_H4', 'calibration'):
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


@pytest.mark.parametrize('per_step', [1, 4, 20])
def test_a_pass_leaves_the_same_share_of_the_evidence_however_many_steps_it_has(per_step):
  stats, order = estimate.init(20, groups=0), np.random.default_rng(0).permutation(20)
  for _ in range(2):
    for index_M in order.reshape(-1, per_step):
      stats = estimate.observe(stats, index_M, np.arange(per_step), np.ones(per_step), np.ones(per_step), discount=0.5)
  np.testing.assert_allclose(stats.successes_I[order[0]], (1 + 0.5) * 0.5 ** (1 - per_step / 20))
  np.testing.assert_allclose(stats.successes_I[order[-1]], 1 + 0.5)


@given(seed=st.integers(0, 2 ** 32 - 1), discount=st.floats(0, 1),
       sizes=st.sampled_from(((9, 9, 9, 9), (60, 3, 50), (0, 40, 0, 5))))
def test_observe_is_the_loop_over_rollouts(seed, discount, sizes):
  rng = np.random.default_rng(seed)
  stats = estimate.init(7, groups=0)
  successes_I, failures_I, visits_I, rates_I = [0.0] * 7, [0.0] * 7, [0.0] * 7, [0.0] * 7
  tokens_OI = [[0.0] * 7, [0.0] * 7]
  verdicts = [[] for _ in range(7)]
  window_rate_I = [0.0] * 7
  for size in sizes:
    index_M, task_R = rng.permutation(7)[:4], np.sort(rng.integers(0, 4, size))
    verdict_R = rng.integers(0, 2, size).astype(np.float32)
    length_R = rng.integers(1, 100, size).astype(np.int32)
    stats = estimate.observe(stats, index_M, task_R, verdict_R, length_R, discount=discount)
    fade = lambda x_I: [discount ** (4 / 7) * x for x in x_I]
    successes_I, failures_I, visits_I, rates_I = map(fade, (successes_I, failures_I, visits_I, rates_I))
    tokens_OI = [fade(x_I) for x_I in tokens_OI]
    groups = {}
    for task, verdict, length in zip(task_R, verdict_R, length_R):
      i = index_M[task]
      (successes_I if verdict else failures_I)[i] += 1
      tokens_OI[int(verdict)][i] += length
      groups.setdefault(i, []).append(int(verdict))
    for i, group in groups.items():
      verdicts[i] += group
      visits_I[i] += 1
      rates_I[i] += sum(group) / len(group)
      latest = group if len(group) >= 16 else verdicts[i][-16:]
      window_rate_I[i] = sum(latest) / len(latest)
  np.testing.assert_allclose(stats.successes_I, successes_I, rtol=1e-14)
  np.testing.assert_allclose(stats.failures_I, failures_I, rtol=1e-14)
  np.testing.assert_allclose(stats.tokens_OI, tokens_OI, rtol=1e-14)
  np.testing.assert_allclose(stats.visits_I, visits_I, rtol=1e-14)
  np.testing.assert_allclose(stats.rates_I, rates_I, rtol=1e-14)
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


# Estimates.


def test_posterior_by_hand():
  """The evidence and the prior; recalibrated, 1.5 of it at log-odds that are half as far from 0."""
  stats, index_M = stats_of([3, 0], [1, 0]), np.array([1, 0, 1])
  a_I, b_I = prior.fit(stats)
  a_M, b_M = estimate.evidence(stats, index_M)
  np.testing.assert_allclose(a_M, [a_I[1], 3 + a_I[0], a_I[1]])
  np.testing.assert_allclose(b_M, [b_I[1], 1 + b_I[0], b_I[1]])
  recalibrated = estimate.posterior(stats._replace(calibration=np.array([0, 0.5, 1.5, 1])), index_M)
  np.testing.assert_allclose(recalibrated.a_M + recalibrated.b_M, 1.5 * (a_M + b_M))
  np.testing.assert_allclose(recalibrated.a_M / recalibrated.b_M, np.sqrt(a_M / b_M))


def test_observe_recalibrates_by_the_forecasts_that_it_meets():
  """A step's groups stand last, with what was forecast of them; groups without a rollout do not count."""
  stats = stats_of([3, 0, 6], [1, 0, 2])._replace(forecast_H4=np.arange(12.0).reshape(3, 4))
  forecast = estimate.evidence(stats, np.array([2, 0, 1]))
  after = estimate.observe(stats, np.array([2, 0, 1]), np.array([0, 0, 2]), np.array([1, 0, 1.0]), np.ones(3),
                           discount=1.0)
  group = lambda m, right, count: [np.log(forecast.a_M[m] / forecast.b_M[m]), forecast.a_M[m] + forecast.b_M[m],
                                   right, count]
  np.testing.assert_allclose(after.forecast_H4, [[8, 9, 10, 11], group(0, 1, 2), group(2, 1, 1)])
  np.testing.assert_array_equal(after.calibration, recalibrate.fit(after.forecast_H4, stats.calibration))


@pytest.mark.slow
@pytest.mark.parametrize('drift', [0.0, 0.05])
def test_forecasts_keep_up_with_a_policy_that_moves(drift):
  """256 tasks of Beta(.5, .5), 16 a step of 8 rollouts; every log-odds rises by the drift each step. Without
  recalibration the forecasts of a moving policy are off by a tenth and more."""
  rng, I, M = np.random.default_rng(0), 256, 16
  p_I = rng.beta(0.5, 0.5, I)
  for groups, most in ((8 * M, 0.03), (0, None)):
    x_I, stats, off = np.log(p_I) - np.log1p(-p_I), estimate.init(I, groups=groups), []
    for step in range(96):
      index_M = np.random.default_rng(step // 16).permutation(I)[step % 16 * M:][:M]
      rate_M = 1 / (1 + np.exp(-x_I[index_M]))
      if step >= 32:
        off.append(np.mean(estimate.mean_rate(estimate.posterior(stats, index_M)) - rate_M))
      task_R = np.repeat(np.arange(M), 8)
      verdict_R = (rng.random(len(task_R)) < rate_M[task_R]).astype(float)
      stats = estimate.observe(stats, index_M, task_R, verdict_R, np.ones(len(task_R)), discount=0.75)
      x_I += drift
    assert abs(np.mean(off)) < most if most else abs(np.mean(off)) > 0.08 or not drift


def test_what_is_no_verdict_is_refused():
  with pytest.raises(ValueError, match='verdict_R holds 0.5, and a verdict is 0.0 or 1.0; give .* as reward_R'):
    observe(estimate.init(2), 0, [1, 0.5])


def test_a_task_is_due_when_less_than_a_rollout_is_left():
  stats = stats_of([8, 0, 0, 0.5], [0, 1, 0, 0.4])
  np.testing.assert_array_equal(estimate.due(stats, np.arange(4)), [False, False, True, True])
  none = np.zeros(0, int)
  for passes, is_due in ((7, False), (8, True)):  # 8 * .75^7 = 1.07
    faded = stats
    for _ in range(4 * passes):
      faded = estimate.observe(faded, np.array([2]), none, none, none, discount=0.75)
    assert estimate.due(faded, np.array([0]))[0] == is_due


def test_old_evidence_fades_into_the_prior():
  fresh = observe(estimate.init(2), 0, [1] * 8)
  none = np.zeros(0, int)
  faded = fresh
  for _ in range(50):
    faded = estimate.observe(faded, np.array([1]), none, none, none, discount=0.5 ** 2)
  mean_M = lambda stats: estimate.mean_rate(estimate.posterior(stats, np.arange(2)))
  assert mean_M(fresh)[0] > mean_M(fresh)[1]
  assert mean_M(faded)[0] == pytest.approx(mean_M(faded)[1])
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
  """Right rollouts have 60 tokens of 6, so 10 on the mean, wrong ones 80 of 4, so 20; four of these join each."""
  stats = stats_of([1, 0, 5], [1, 0, 3], tokens_OI=np.array([[50.0, 0, 30], [20, 0, 40]]))
  np.testing.assert_allclose(
      estimate.tokens(stats, np.array([2, 0, 1]), default=99.0, rate_M=np.array([0.75, 0.5, 0.1])),
      [0.75 * 80 / 9 + 0.25 * 110 / 7, 0.5 * 60 / 5 + 0.5 * 130 / 5, 0.1 * 10 + 0.9 * 20])


def test_tokens_of_an_outcome_never_seen_are_those_of_the_other():
  stats = stats_of([0, 0], [2, 0], tokens_OI=np.array([[30.0, 0], [0, 0]]))
  np.testing.assert_allclose(estimate.tokens(stats, np.arange(2), default=99.0, rate_M=np.array([1.0, 0.3])), 15)


def test_tokens_expect_the_rate_of_the_posterior():
  stats, index_M = stats_of([9, 1], [1, 9], tokens_OI=np.array([[40.0, 360], [90, 10]])), np.arange(2)
  p_M = estimate.mean_rate(estimate.posterior(stats, index_M))
  found_M = estimate.tokens(stats, index_M, default=1.0)
  np.testing.assert_array_equal(found_M, estimate.tokens(stats, index_M, default=1.0, rate_M=p_M))
  assert found_M[1] > 2 * found_M[0]  # the task that mostly fails is the longer


def test_tokens_before_any_was_seen_are_the_default():
  np.testing.assert_array_equal(estimate.tokens(estimate.init(3), np.array([0, 2]), default=50.0),
                                [50, 50])


def test_tokens_go_from_the_mean_of_all_to_that_of_the_task():
  stats = estimate.init(2)
  expected = []
  for _ in range(200):  # of task 0 alone, five tokens each; task 1 has one rollout of 25
    stats = estimate.observe(stats, np.array([0, 1]), np.array([0, 0, 1]), np.ones(3),
                             np.array([5, 5, 25]), discount=1.0)
    expected.append(estimate.tokens(stats, np.arange(2), default=1.0, rate_M=np.ones(2)))
  np.testing.assert_allclose(expected[0], [(10 + 4 * 35 / 3) / 6, (25 + 4 * 35 / 3) / 5])
  assert np.all(np.diff(expected, axis=0)[:, 0] < 0) and np.all(np.diff(expected, axis=0)[:, 1] > 0)
  np.testing.assert_allclose(expected[-1], [5, 25], rtol=0.02)


def test_discounted_tokens_keep_their_mean():
  stats = stats_of([4, 1], [0, 3], tokens_OI=np.array([[0, 30.0], [40, 20]]))
  none = np.zeros(0, int)
  faded = estimate.observe(stats, np.array([0]), none, none, none, discount=0.25)
  np.testing.assert_allclose(estimate.tokens(faded, np.arange(2), default=1.0, rate_M=np.ones(2)),
                             [(20 + 48) / 6, (10 + 48) / 4.5])


# Rewards.


def test_rewards_by_hand():
  """Right rollouts have earned 1.4 on the mean of 9 and one of 1, wrong ones -.3 on the mean of 2 and one of 0."""
  stats = estimate.init(1)._replace(reward_O2=np.array([[-0.6, 2], [12.6, 9]]))
  mean_M, rollouts_M = estimate.reward(stats, Beta(np.array([3.0, 0.5]), np.array([1.0, 0.5])))
  np.testing.assert_allclose(mean_M, [0.75 * 1.36 - 0.25 * 0.2, 0.5 * 1.36 - 0.5 * 0.2])
  np.testing.assert_allclose(rollouts_M, [4, 1])


def test_where_rewards_are_verdicts_they_are_expected_as_the_posterior_says():
  stats = observe(estimate.init(2), 0, [1, 0, 0], [1, 1])
  for known in (estimate.init(2), stats):
    mean_M, _ = estimate.reward(known, Beta(np.array([3.0]), np.array([1.0])))
    np.testing.assert_allclose(mean_M, 0.75)


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
  after = estimate.observe_gradient(before, jax.numpy.array([10.0, 20, 30, 40]), steps=3)
  np.testing.assert_allclose(after.gradient, 0.98 ** 3 * np.array([1, 2, 3, 4]) + [10.0, 20, 30, 40])
  assert after.gradient.dtype == np.float64
  for bad in (np.nan, np.inf):  # of an update that will be skipped
    assert estimate.observe_gradient(before, np.array([1, bad, 1, 1]), steps=3) is before
  jax.tree.map(np.testing.assert_array_equal, before, kept)  # not changed in place
  jax.tree.map(np.testing.assert_array_equal, after._replace(gradient=before.gradient), before)


def test_nu_is_a_ratio_of_sums():
  stats = estimate.init(1)
  for gradient in ((3, 1, 2, 1), (-1, 1, 4, 1)):  # signal 2 / 2 and noise 6 / 2
    stats = estimate.observe_gradient(stats, 1e12 * np.array(gradient), steps=0)
  assert estimate.nu(stats, default=9.0) == pytest.approx(3)


def test_old_measurements_of_the_gradient_fade():
  stats = measured(1, 1, 100, 1)
  for _ in range(100):
    stats = estimate.observe_gradient(stats, 1e12 * np.array([1, 1, 4, 1]), steps=10)
  assert estimate.nu(stats, default=9.0) == pytest.approx(4)
