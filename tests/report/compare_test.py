"""Costs to a target, their ratios, bands, the Pareto front and the status of tasks: by hand, and against slow ways."""

import itertools
import math

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import stats

from kr_jax.report import compare
from kr_jax.report.compare import Reach

INF = math.inf
exact = lambda x: Reach(x, x)
shares = st.integers(0, 10).map(lambda n: n / 10)


def test_cost_to_a_target_by_hand():
  cost, success = [0, 10, 20, 40], [0.1, 0.3, 0.5, 0.9]
  assert compare.reach(cost, success, 0.4) == exact(15.0)
  assert compare.reach(cost, success, 0.5) == exact(20.0)
  assert compare.reach(cost, success, 0.8) == exact(35.0)  # the last evaluation counts by itself
  assert compare.reach(cost, success, 0.1) == exact(0.0)
  assert compare.reach(cost, success, 0.95) == Reach(40.0, INF)


def test_one_lucky_evaluation_is_not_held():
  assert compare.reach([0, 10, 20, 30, 40], [0.1, 0.6, 0.4, 0.6, 0.7], 0.5) == exact(25.0)
  assert compare.reach([0, 10, 20], [0.1, 0.6, 0.4], 0.5) == Reach(20.0, INF)


def test_what_is_unknown_is_neither_held_nor_censored():
  unknown = Reach(None, None)
  assert compare.reach([None, None], [0.1, 0.9], 0.5) == unknown
  assert compare.reach([0, None], [0.1, 0.2], 0.5) == unknown
  assert compare.reach([], [], 0.5) == unknown
  assert compare.reach([0, 10, 20], [0.1, None, 0.9], 0.5) == exact(10.0)  # an evaluation without verdicts
  assert not unknown.is_known and not unknown.is_censored and Reach(1.0, INF).is_censored


@hypothesis.given(st.lists(shares, min_size=1, max_size=8), st.integers(1, 10))
def test_cost_against_a_walk_along_the_line(success, tenths):
  """Where the line of success first meets the target on the way to an evaluation that holds it."""
  target, cost = tenths / 10, list(range(len(success)))
  found = compare.reach(cost, success, target)
  held = [i for i in cost if success[i] >= target and (i + 1 == len(success) or success[i + 1] >= target)]
  if not held:
    assert found == Reach(float(cost[-1]), INF)
    return
  walk = np.linspace(max(held[0] - 1, 0), held[0], 1001)
  meets = walk[np.interp(walk, cost, success) >= target - 1e-9][0]
  assert found.low == found.high == pytest.approx(meets, abs=2e-3)


@pytest.mark.parametrize('target', [0, -0.1, 1.5, math.nan])
def test_a_target_that_is_no_success(target):
  with pytest.raises(ValueError, match='must be a held-out success above 0 and at most 1'):
    compare.reach([1], [0.5], target)


def test_lists_of_two_lengths():
  with pytest.raises(ValueError, match='2 costs and 1 successes are not of the same evaluations'):
    compare.reach([1, 2], [0.5], 0.5)


def test_ratio_by_hand():
  found = compare.ratio([exact(20.0), exact(40.0), exact(30.0)], [exact(10.0), exact(10.0), exact(10.0)])
  assert (found.median, found.pairs, found.censored) == (3.0, 3, 0)
  # Student's interval of the logs of 2, 4 and 3, with t = 4.303 of two degrees of freedom, is the wider one.
  logs = np.log([2, 4, 3])
  half = 4.302653 * logs.std(ddof=1) / math.sqrt(3)
  assert found.low == pytest.approx(math.exp(logs.mean() - half), rel=1e-5)
  assert found.high == pytest.approx(math.exp(logs.mean() + half), rel=1e-5)


def test_pairs_of_which_a_cost_is_unknown_or_zero_are_left_out():
  known = [exact(20.0), exact(30.0)]
  more = compare.ratio([*known, Reach(None, None), exact(5.0)], [exact(10.0), exact(10.0), exact(1.0), exact(0.0)])
  assert more == compare.ratio(known, [exact(10.0), exact(10.0)])
  assert compare.ratio([], []) == (None, None, None, 0, 0)


def test_censored_runs_bound_the_ratio():
  """The baseline never got there: at least 2, 3 and 4 times; no upper end. And the other way round."""
  group = [exact(10.0)] * 3
  never = [Reach(x, INF) for x in (20.0, 30.0, 40.0)]
  found = compare.ratio(never, group)
  assert (found.median, found.high, found.pairs, found.censored) == (None, None, 3, 3)
  assert found.low == pytest.approx(compare.interval([2.0, 3.0, 4.0])[0])
  other = compare.ratio(group, never)
  assert (other.median, other.low) == (None, None)
  assert other.high == pytest.approx(1 / found.low)
  both = compare.ratio(never, never)
  assert (both.median, both.low, both.high, both.censored) == (None, None, None, 3)


def test_one_censored_pair_of_three_leaves_the_median_known():
  found = compare.ratio([exact(20.0), exact(30.0), Reach(90.0, INF)], [exact(10.0)] * 3)
  assert (found.median, found.high, found.censored) == (3.0, None, 1)


def test_interval_of_one_ratio_says_nothing():
  assert compare.interval([2.0]) == (0.0, INF)


def test_the_bootstrap_of_many_pairs_against_all_resamples():
  """Of five ratios there are 3125 resamples."""
  ratios = [1.0, 1.1, 2.0, 3.0, 9.0]
  medians = [np.median(x) for x in itertools.product(ratios, repeat=5)]
  low, high = np.quantile(medians, (0.025, 0.975), method='inverted_cdf')
  logs = np.log(ratios)
  student = np.exp(stats.t.interval(0.95, 4, loc=logs.mean(), scale=stats.sem(logs)))
  assert compare.interval(ratios) == pytest.approx((min(low, student[0]), max(high, student[1])))
  assert compare.interval([2.0, 3.0, INF]) == (0.0, INF)


def test_ends_of_many_ratios_of_which_one_is_open_by_hand():
  """2 P(B < 2) = 18 / 256 of eight, so that 95 % takes the least and the largest. Of twelve 2 P(B < 3) = 158 / 4096,
  3.9 %, and 2 P(B < 2) = 26 / 4096, .6 %; the bootstrap's ends are within these."""
  assert compare.interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, INF]) == (1.0, INF)
  twelve = [*map(float, range(1, 12)), INF]
  low, high = compare.interval(twelve)
  assert low <= 3.0 and 10.0 <= high <= 11.0
  low, high = compare.interval(twelve, 0.992)
  assert low <= 2.0 and high == 11.0


def test_an_interval_of_another_level_by_hand():
  """Of three groups beside a baseline: 98.3 %, with t = 7.649 of two degrees of freedom."""
  pairs = [exact(20.0), exact(40.0), exact(30.0)], [exact(10.0)] * 3
  found, logs = compare.ratio(*pairs, level=1 - 0.05 / 3), np.log([2, 4, 3])
  half = 7.648804 * logs.std(ddof=1) / math.sqrt(3)
  assert (found.low, found.high) == pytest.approx((math.exp(logs.mean() - half), math.exp(logs.mean() + half)), rel=1e-5)
  # Six pairs are enough for 95 %, seven for 98 %: their ends hold the median with 1 - 2^-5 and 1 - 2^-6.
  assert compare.interval([2.0] * 5 + [INF])[0] == 2.0 and compare.interval([2.0] * 5 + [INF], 0.98) == (0.0, INF)
  assert compare.interval([2.0] * 6 + [INF], 0.98)[0] == 2.0
  with pytest.raises(ValueError, match='the level 1 of an interval must be above 0 and below 1'):
    compare.interval([2.0, 3.0], 1)


def test_groups_that_cost_the_same_are_rarely_told_apart():
  """Three pairs: in 5 % of comparisons; the bootstrap alone would tell a multiple in 25 %."""
  rng = np.random.default_rng(1)
  told = 0
  for _ in range(300):
    baseline, group = ([exact(x) for x in np.exp(rng.normal(0, 0.3, 3)).tolist()] for _ in range(2))
    told += 'needs' in compare.sentence(compare.ratio(baseline, group), 'rollouts', 'knapsack', 'uniform')
  assert told <= 27


@pytest.mark.parametrize('ratio, text', [
    (compare.Ratio(2.0, 1.5, 2.5, 3, 0),
     'uniform needs 2.00 times the rollouts of knapsack (95 % interval 1.50 to 2.50, 3 pairs)'),
    (compare.Ratio(0.5, 0.25, 0.75, 3, 0),
     'uniform needs 0.50 times the rollouts of knapsack (95 % interval 0.25 to 0.75, 3 pairs)'),
    (compare.Ratio(2.0, 0.9, 2.5, 3, 0), 'no difference that 3 pairs show'),
    (compare.Ratio(2.0, 1.0, 2.5, 4, 0), 'no difference that 4 pairs show'),
    (compare.Ratio(None, None, None, 5, 5), 'no difference that 5 pairs show'),
    (compare.Ratio(None, 1.5, None, 3, 2), 'uniform needs at least 1.50 times the rollouts of knapsack (95 % interval '
     'from 1.50, 3 pairs, 2 of them censored)'),
    (compare.Ratio(None, None, 0.5, 3, 3), 'uniform needs at most 0.50 times the rollouts of knapsack (95 % interval '
     '0.00 to 0.50, 3 pairs, 3 of them censored)'),
    (compare.Ratio(2.0, None, None, 1, 0), 'one pair has no interval; run more seeds'),
    (compare.Ratio(None, None, None, 0, 0), 'no pair: uniform and knapsack have no seed in common of which both costs '
     'are known and above 0'),
])
def test_a_multiple_is_told_only_where_its_interval_leaves_1_out(ratio, text):
  assert compare.sentence(ratio, 'rollouts', 'knapsack', 'uniform') == text


def curve(group, seed, success, scale):
  """Evaluations after 0, 1, 2, ... steps; each axis costs `scale` a step, dollars are not known."""
  return [{'run': f'{group} {seed}', 'group': group, 'step': i, 'success': y, 'dollars': None,
           **{axis: float(i * scale) for axis in compare.AXES if axis != 'dollars'}} for i, y in enumerate(success)]


def test_costs_of_groups():
  curves = [*curve('uniform', 0, [0.1, 0.3, 0.5], 20), *curve('uniform', 1, [0.1, 0.3, 0.5], 22),
            *curve('knapsack', 1, [0.1, 0.5, 0.7], 10), *curve('knapsack', 2, [0.1, 0.2, 0.3], 10)]
  seeds = {f'{group} {seed}': seed for group in ('uniform', 'knapsack') for seed in range(3)}
  found = compare.costs(curves, seeds, 0.3, 'uniform')
  rows = {(row['group'], row['axis']): row for row in found['rows']}
  assert (found['target'], found['baseline'], len(rows)) == (0.3, 'uniform', 12)
  assert rows['uniform', 'tokens'] == {
      'group': 'uniform', 'axis': 'tokens', 'cost': 21.0, 'ratio': None, 'low': None, 'high': None, 'pairs': 0,
      'censored': 0, 'text': '2 of 2 runs held the target'}
  # Seed 1 alone is in both: 22 over 5. The median of 5 and 20.
  assert rows['knapsack', 'tokens'] == {
      'group': 'knapsack', 'axis': 'tokens', 'cost': 12.5, 'ratio': pytest.approx(4.4), 'low': None, 'high': None,
      'pairs': 1, 'censored': 0, 'text': 'one pair has no interval; run more seeds'}
  assert rows['knapsack', 'dollars']['text'] == 'unknown: no dollars are recorded'
  assert compare.costs(curves, seeds, 0.7, None)['rows'][0]['text'] == '0 of 2 runs held the target'
  assert compare.costs(curves, seeds, None, 'uniform') == {'target': None, 'baseline': 'uniform', 'rows': []}


def test_bands_by_hand():
  assert compare.band([[(0, 0.0), (10, 1.0)], [(0, 0.5), (5, 0.5), (20, 0.8)]]) == [
      {'x': 0.0, 'mean': 0.25, 'low': 0.0, 'high': 0.5, 'seeds': 2},
      {'x': 5.0, 'mean': 0.5, 'low': 0.5, 'high': 0.5, 'seeds': 2},
      {'x': 10.0, 'mean': pytest.approx(0.8), 'low': pytest.approx(0.6), 'high': 1.0, 'seeds': 2}]


def test_bands_are_thinned_and_leave_out_what_is_unknown():
  long = [(x, x / 1000) for x in range(1000)]
  found = compare.band([long])
  assert len(found) == 60 and (found[0]['x'], found[-1]['x']) == (0, 999)
  assert all(point['mean'] == point['x'] / 1000 for point in found)
  rows = compare.bands(curve('a', 0, [0.1, None, 0.3], 1))
  assert {row['axis'] for row in rows} == set(compare.AXES) - {'dollars'}
  assert [row['x'] for row in rows if row['axis'] == 'kwh'] == [0.0, 2.0]
  assert compare.band([[(0, 0.1), (1, 0.2)], [(5, 0.1), (6, 0.2)]]) == []  # no cost that both reached


def test_pareto_by_hand():
  assert compare.pareto([1, 2, 2, 3, 4, 1], [0.1, 0.3, 0.2, 0.3, 0.5, 0.1]) == [True, True, False, False, True, True]


@hypothesis.given(st.lists(st.tuples(shares, shares), max_size=12))
def test_pareto_against_all_pairs(points):
  beaten = lambda p: any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points)
  assert compare.pareto([x for x, _ in points], [y for _, y in points]) == [not beaten(p) for p in points]


def test_status_by_hand():
  """The bounds of the paper's classes: 0; (0, .2]; (.2, .8); [.8, 1); 1."""
  assert [compare.status(right, 10) for right in range(11)] == [0, 1, 1, 2, 2, 2, 2, 2, 3, 3, 4]
  assert [compare.status(right, 1) for right in (0, 1)] == [0, 4]
  for bad in ((-1, 3), (4, 3), (0, 0)):
    with pytest.raises(ValueError, match='have no class'):
      compare.status(*bad)


def test_moves_of_tasks_by_hand():
  first = {'right': [0, 1, 2, 0, 4], 'verified': [4, 4, 4, 0, 4]}
  last = {'right': [4, 1, 0, 4, 4], 'verified': [4, 4, 4, 4, 4]}
  moves = compare.moves_held_out(first, last)
  assert moves == [(0, 4), (2, 2), (2, 0), (4, 4)]  # the fourth had no verdict at first
  matrix = compare.status_matrix(moves)
  assert matrix == [[0, 0, 0, 0, 1], [0] * 5, [1, 0, 1, 0, 0], [0] * 5, [0, 0, 0, 0, 1]]
  visits = [(7, 0, 4), (8, 1, 4), (7, 0, 0), (9, 4, 4), (7, 1, 8), (8, 8, 8), (7, 7, 8)]
  assert compare.moves_in_training(visits) == [(0, 3), (2, 4)]  # task 9 was visited once
