"""What a run says of its forecasts, by hand and by enumeration."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from kr_jax.allocation import allocate
from kr_jax.allocation import scores
from kr_jax.allocation.value import Beta
from kr_jax.record import calibration

FORECAST = Beta(np.array([1.0, 3.0]), np.array([1.0, 1.0]))  # means 1/2 and 3/4


def test_the_scores_of_a_step():
  """Groups with 1 of 2 and 4 of 4 right ones, beside 3 of 6 in the steps before: a constant of 4 / 8."""
  found = calibration.of_step(FORECAST, [1, 4], [2, 4], calibration.Seen(3, 6))
  log2, log4_3 = math.log(2), math.log(4 / 3)
  want = {
      'log_loss': (2 * log2 + 4 * log4_3) / 6, 'brier': (2 / 4 + 4 / 16) / 6,
      # Beta(1, 1): each count of 2 has 1/3. Beta(3, 1): 4 of 4 have 3/4 * 4/5 * 5/6 * 6/7.
      'count_log_loss': (math.log(3) + math.log(7 / 3)) / 6,
      'constant_log_loss': log2, 'constant_brier': 0.25, 'constant_count_log_loss': (log2 + 4 * log2) / 6}
  assert {name: found[name] for name in calibration.SCORES} == pytest.approx(want)
  assert found['reliability'][5] == [2, 1, 1, 1, 0] and found['reliability'][7] == [4, 3, 4, 1, 1]
  assert np.sum(found['reliability']) == 18 and json.loads(json.dumps(found)) == found


def test_a_step_without_verified_rollouts_has_no_score():
  found = calibration.of_step(FORECAST, [0, 0], [0, 0], calibration.Seen())
  assert {found[name] for name in calibration.SCORES} == {None} and np.sum(found['reliability']) == 0
  assert calibration.Seen(3, 6).add([found]) == (3, 6)


def test_the_constant_is_of_the_steps_before():
  steps = [calibration.of_step(FORECAST, [1, 4], [2, 4], calibration.Seen()),
           calibration.of_step(FORECAST, [0, 1], [3, 3], calibration.Seen())]
  assert calibration.Seen().rate == 0.5
  assert calibration.Seen().add([{'eval/avg@8': 1.0}, *steps]) == calibration.Seen(6, 12)
  assert calibration.Seen(6, 12).rate == 0.5 and calibration.Seen(0, 6).rate == 1 / 8


def test_mixed_groups_of_one_wave_are_expected_as_of_budgets():
  budget_M = np.array([2, 5])
  tasks, rollouts = calibration.expected_mixed(FORECAST, [budget_M], [[0, 0]], [[2, 5]])
  assert tasks == pytest.approx(allocate.expected_mixed_tasks(FORECAST, budget_M))
  assert rollouts / 7 == pytest.approx(allocate.expected_gradient_ratio(FORECAST, budget_M))
  # Beta(1, 1): 1 - 2 / 3 of two rollouts. Beta(3, 1): 5 of 5 have 3/8, none has 3! 5! / 8! = 1 / 56.
  assert tasks == pytest.approx(1 / 3 + 1 - 3 / 8 - 1 / 56)
  assert rollouts == pytest.approx(2 / 3 + 5 * (1 - 3 / 8 - 1 / 56))


def test_mixed_groups_of_two_waves_by_hand():
  """Expected before the first wave 1/3 of a group and 2/3 of a rollout, at Beta(1, 1). Both are right: at Beta(3, 1)
  two more leave them so with 3/5, and four rollouts are mixed with 2/5. Where they differ all stay mixed."""
  flat = Beta(np.ones(1), np.ones(1))
  assert calibration.expected_mixed(flat, [[2], [2]], [[2], [0]], [[0], [0]]) == pytest.approx((1 / 3 + 2 / 5,
                                                                                                2 / 3 + 4 * 2 / 5))
  assert calibration.expected_mixed(flat, [[2], [2]], [[1], [2]], [[1], [0]]) == pytest.approx((1 / 3, 2 / 3 + 2))
  # A first rollout alone cannot be mixed; the second then is with 1/3 if it was right.
  assert calibration.expected_mixed(flat, [[1], [1]], [[1], [0]], [[0], [1]]) == pytest.approx((1 / 3, 2 / 3))


def further(right_M, wrong_M):
  """Four rollouts to the groups that are not mixed, or else to the first."""
  open_M = (right_M == 0) | (wrong_M == 0)
  return np.array([[4, 0], [4, 0], [0, 4], [2, 2]][int(open_M @ [1, 2])])


@pytest.mark.parametrize('of_one_shot', [False, True])
def test_over_all_outcomes_of_waves_what_is_seen_is_what_was_expected(of_one_shot):
  """Enumerated under the forecasts, with a second wave that depends on the first; not so of the summed budgets."""
  tasks = rollouts = total = 0.0
  first_M = np.array([2, 3])
  for right in itertools.product(*(range(n + 1) for n in first_M)):
    right_M = np.array(right)
    more_M = further(right_M, first_M - right_M)
    after = Beta(FORECAST.a_M + right_M, FORECAST.b_M + first_M - right_M)
    weight = stats.betabinom.pmf(right_M, first_M, *FORECAST).prod()
    for more in itertools.product(*(range(n + 1) for n in more_M)):
      more_right_M = np.array(more)
      chance = weight * stats.betabinom.pmf(more_right_M, more_M, *after).prod()
      budget_M, all_right_M = first_M + more_M, right_M + more_right_M
      mixed_M = (all_right_M > 0) & (all_right_M < budget_M)
      if of_one_shot:
        expected = (allocate.expected_mixed_tasks(FORECAST, budget_M),
                    9 * allocate.expected_gradient_ratio(FORECAST, budget_M))
      else:
        expected = calibration.expected_mixed(
            FORECAST, [first_M, more_M], [right_M, more_right_M], [first_M - right_M, more_M - more_right_M])
      tasks += chance * (mixed_M.sum() - expected[0])
      rollouts += chance * (budget_M @ mixed_M - expected[1])
      total += chance
  assert total == pytest.approx(1)
  if of_one_shot:
    assert abs(tasks) > 0.05
  else:
    assert (tasks, rollouts) == pytest.approx((0, 0), abs=1e-12)


def record(expected, observed, **changed):
  """A step whose verified rollouts are 4, all of one bin."""
  return {'expected_gradient_ratio': expected, 'effective_gradient_ratio': observed,
          'reliability': [[4, 3.0, 2, 1, 1.0], [0] * 5], **dict.fromkeys(calibration.SCORES, 0.5), **changed}


def test_the_summary_of_a_run():
  """Means over rollouts; the last quarter of five steps is the last two."""
  steps = [record(0.5, 0.25), record(0.5, 0.5), record(0.25, 0.5, log_loss=1.0),
           record(0.5, 0.5, log_loss=None, reliability=[[0] * 5]),
           record(0.75, 0.5, log_loss=2.0, reliability=[[12, 1, 2, 3, 3]])]
  found = calibration.summarize(steps)
  assert found['mixing_gap'] == [0.25, 0, -0.25, 0.125]
  assert found['log_loss'] == pytest.approx((4 * 0.5 + 4 * 0.5 + 4 * 1 + 12 * 2) / 24)
  assert found['log_loss_last_quarter'] == 2.0 and found['brier_last_quarter'] == 0.5
  assert set(found) == {'mixing_gap', *calibration.SCORES, *(f'{name}_last_quarter' for name in calibration.SCORES)}


def test_the_summary_of_one_step_and_of_none_that_was_verified():
  found = calibration.summarize([record(0.5, 0.25)])
  assert found['mixing_gap'] == [None, None, None, 0.25] and found['brier'] == found['brier_last_quarter'] == 0.5
  found = calibration.summarize([record(0.5, 0.0, **dict.fromkeys(calibration.SCORES), reliability=[[0] * 5])])
  assert found['log_loss'] is found['log_loss_last_quarter'] is None


def test_reliability_of_steps_is_their_sum():
  steps = [calibration.of_step(FORECAST, right_M, [2, 4], calibration.Seen()) for right_M in ([1, 4], [0, 2])]
  np.testing.assert_array_equal(calibration.reliability(steps), scores.reliability(
      [0.5, 0.75, 0.5, 0.75], [1, 4, 0, 2], [2, 4, 2, 4]))
