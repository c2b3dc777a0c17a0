"""Scores of forecasts, against loops over single rollouts and cases worked out by hand."""

import math

import numpy as np
import pytest
from scipy import integrate
from scipy import stats

from kr_jax.allocation import scores
from kr_jax.allocation.value import Beta

# Three groups: 1 of 2 right, 3 of 3, none of 0.
P_M, RIGHT_M, ROLLOUTS_M = np.array([0.5, 0.8, 0.3]), np.array([1, 3, 0]), np.array([2, 3, 0])


def some_groups(seed, num=40):
  rng = np.random.default_rng(seed)
  posterior = Beta(rng.uniform(0.05, 9, num), rng.uniform(0.05, 9, num))
  rollouts_M = rng.integers(0, 12, num)
  right_M = rng.binomial(rollouts_M, rng.beta(*posterior))
  return posterior, posterior.a_M / (posterior.a_M + posterior.b_M), right_M, rollouts_M


def by_rollout(p_M, right_M, rollouts_M, score):
  """The mean of score(p, verdict) over single rollouts."""
  return np.mean([score(p, verdict) for p, right, n in zip(p_M, right_M, rollouts_M)
                  for verdict in [1] * right + [0] * (n - right)])


def test_scores_by_hand():
  """Five rollouts: log loss 2 log 2 + 3 log 1.25, Brier score 2 / 4 + 3 / 25."""
  assert scores.log_loss(P_M, RIGHT_M, ROLLOUTS_M) == pytest.approx((2 * math.log(2) + 3 * math.log(1.25)) / 5)
  assert scores.brier(P_M, RIGHT_M, ROLLOUTS_M) == pytest.approx((0.5 + 0.12) / 5)
  # Under Beta(1, 1) each count of n rollouts has 1 / (n + 1).
  flat = Beta(np.ones(3), np.ones(3))
  assert scores.count_log_loss(flat, RIGHT_M, ROLLOUTS_M) == pytest.approx((math.log(3) + math.log(4)) / 5)
  # Of independent rollouts C(2, 1) / 4 and .8^3.
  assert scores.count_log_loss(P_M, RIGHT_M, ROLLOUTS_M) == pytest.approx(-math.log(0.5 * 0.512) / 5)


@pytest.mark.parametrize('seed', range(3))
def test_scores_are_means_over_single_rollouts(seed):
  posterior, p_M, right_M, rollouts_M = some_groups(seed)
  want = by_rollout(p_M, right_M, rollouts_M, lambda p, verdict: -math.log(p if verdict else 1 - p))
  assert scores.log_loss(p_M, right_M, rollouts_M) == pytest.approx(want)
  want = by_rollout(p_M, right_M, rollouts_M, lambda p, verdict: (p - verdict) ** 2)
  assert scores.brier(p_M, right_M, rollouts_M) == pytest.approx(want)
  want = -np.sum(stats.betabinom.logpmf(right_M, rollouts_M, *posterior)) / rollouts_M.sum()
  assert scores.count_log_loss(posterior, right_M, rollouts_M) == pytest.approx(want)
  want = -np.sum(stats.binom.logpmf(right_M, rollouts_M, 0.3)) / rollouts_M.sum()
  assert scores.count_log_loss(0.3, right_M, rollouts_M) == pytest.approx(want)


def test_the_count_is_scored_under_the_whole_posterior():
  """The likelihood of 2 right ones of 5, integrated over the success rate."""
  density = stats.beta(0.7, 2.5)
  likelihood, _ = integrate.quad(lambda p: stats.binom.pmf(2, 5, p) * density.pdf(p), 0, 1)
  found = scores.count_log_loss(Beta(np.array([0.7]), np.array([2.5])), np.array([2]), np.array([5]))
  assert found == pytest.approx(-math.log(likelihood) / 5)


def test_one_rate_for_all_is_that_rate_of_each():
  for score in (scores.log_loss, scores.brier, scores.count_log_loss):
    assert score(0.4, RIGHT_M, ROLLOUTS_M) == score(np.full(3, 0.4), RIGHT_M, ROLLOUTS_M)


def test_a_certain_forecast_that_fails_costs_much_and_not_infinitely_much():
  assert scores.log_loss([0.0], [1], [1]) == pytest.approx(math.log(1e6))
  assert scores.log_loss([1.0], [0], [2]) == pytest.approx(math.log(1e6))
  assert scores.log_loss([1.0], [2], [2]) == pytest.approx(0, abs=2e-6)
  assert scores.brier([1.0], [0], [2]) == 1


def test_no_rollout_has_no_score():
  for score in (scores.log_loss, scores.brier, scores.count_log_loss):
    assert math.isnan(score(0.5, np.zeros(2), np.zeros(2)))
    assert math.isnan(score(np.zeros(0), np.zeros(0), np.zeros(0)))


def test_the_true_rate_scores_best():
  """In expectation over the counts of 6 rollouts at .3."""
  right = np.arange(7)
  weight = stats.binom.pmf(right, 6, 0.3)
  for score in (scores.log_loss, scores.brier, scores.count_log_loss):
    expected = lambda p: weight @ [score(p, np.array([k]), np.array([6])) for k in right]
    assert expected(0.3) < min(expected(0.25), expected(0.35))


def test_reliability_by_hand():
  """A rate of 1 is in the last bin; a group without a rollout is none."""
  found = scores.reliability([0.1, 0.49, 0.2, 0.5, 1.0], [1, 0, 0, 2, 3], [4, 2, 0, 2, 3], bins=2)
  np.testing.assert_allclose(found, [[6, 0.4 + 0.98, 1, 2, 0.6 ** 2 + 0.98 ** 2], [5, 1 + 3, 5, 2, 1]])


def test_reliability_adds_up():
  _, p_M, right_M, rollouts_M = some_groups(7)
  whole = scores.reliability(p_M, right_M, rollouts_M)
  parts = [scores.reliability(p_M[i], right_M[i], rollouts_M[i]) for i in (slice(0, 13), slice(13, None))]
  np.testing.assert_allclose(whole, sum(parts))
  np.testing.assert_allclose(whole[:, :4].sum(axis=0), [
      rollouts_M.sum(), p_M @ rollouts_M, right_M.sum(), np.sum(rollouts_M > 0)])
  np.testing.assert_allclose(scores.reliability(0.25, RIGHT_M, ROLLOUTS_M)[2], [5, 1.25, 4, 2, 0.5 ** 2 + 2.25 ** 2])


def rows(p, right_M, rollouts_M):
  """The bin of groups with one forecast."""
  return scores.reliability(p, right_M, rollouts_M, bins=1)


def test_intervals_of_single_rollouts_are_wilsons():
  """8 of 10 right: .490 to .943; none of 10: 0 to .278. Of an empty bin there is none."""
  bins = [rows(0.8, [1] * 8 + [0] * 2, np.ones(10)), rows(0.1, np.zeros(10), np.ones(10)), np.zeros((1, 5))]
  low_B, high_B = scores.interval(np.concatenate(bins))
  np.testing.assert_allclose(low_B, [0.490, 0, np.nan], atol=5e-4)
  np.testing.assert_allclose(high_B, [0.943, 0.278, np.nan], atol=5e-4)


@pytest.mark.parametrize('right', [[8] * 4 + [0] * 6, [0] * 10, [8] * 10])
def test_groups_that_are_right_together_say_as_much_as_single_rollouts(right):
  right = np.array(right)
  groups, singles = rows(0.5, right, np.full(10, 8)), rows(0.5, right // 8, np.ones(10))
  np.testing.assert_allclose(scores.interval(groups), scores.interval(singles))


def test_one_group_says_as_much_as_one_rollout():
  low_B, high_B = scores.interval(rows(0.5, [4], [8]))
  assert low_B[0] < 0.1 and high_B[0] > 0.9


@pytest.mark.parametrize('forecast', [1 / 3, 0.6])
def test_intervals_hold_the_rate_as_often_as_they_say(forecast):
  """Of 20 groups of 6 at rates Beta(1, 2), forecast right or wrong: in 92.5 to 97 % of 2,000 draws."""
  rng, held = np.random.default_rng(0), 0
  for _ in range(2000):
    low_B, high_B = scores.interval(rows(forecast, rng.binomial(6, rng.beta(1, 2, 20)), np.full(20, 6)))
    held += low_B[0] <= 1 / 3 <= high_B[0]
  assert 0.925 < held / 2000 < 0.97


@pytest.mark.parametrize('arguments, text', [
    (([1.5], [1], [2]), r'must lie in \[0, 1\], not \[1.5\]'), (([np.nan], [1], [2]), r'not \[nan\]'),
    ((0.5, [3], [2]), '3 right ones of 2 rollouts'), ((0.5, [1, -1], [2, 2]), 'group 1 has -1 right'),
    (([0.5, 0.5], [1], [2]), r'\(2,\).*\(1,\)'), ((0.5, [1, 1], [2]), 'same groups'), ((0.5, 1, 2), 'same groups')])
def test_what_is_no_forecast_or_no_count_is_refused(arguments, text):
  for score in (scores.log_loss, scores.brier, scores.count_log_loss, scores.reliability):
    with pytest.raises(ValueError, match=text):
      score(*arguments)
