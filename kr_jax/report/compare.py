"""What runs cost until they succeed, compared; and what became of tasks.

**Cost to a target.** The target is a held-out success that is fixed before the runs are looked at. Success counts as
held from the first evaluation at or above the target whose next one is too; the last evaluation counts by itself. The
cost is interpolated on the line from the evaluation before:

    cost = x_0 + (target - y_0) / (y_1 - y_0) (x_1 - x_0)

A run that never gets there is censored: it would have cost more than it did.

**Ratios.** Runs of two groups that share a seed are a pair, with the ratio cost of the baseline / cost of the group.
The ratio of groups is the median over pairs. Its 95 % interval is the wider one of two: the percentile bootstrap over
pairs, and Student's interval of the mean log ratio. The bootstrap alone would not do: that of 3 pairs runs at the
most from the least ratio to the largest, which holds the true median with a chance of 75 %. Where a run of a pair is
censored its ratio is known to lie between two bounds. Then the lower end of the interval is computed of all lower
bounds, and the upper end of all upper ones. A multiple is spoken of only where the interval leaves 1 out: in
simulation (groups that cost the same, log-normal or heavy-tailed, 3 to 8 pairs, none to most of the runs censored)
that is so in 5 % of comparisons at the most.

**Status of a task**, by its share of right rollouts: none; (0, .2]; (.2, .8); [.8, 1); all. Source: Li et al. 2025,
arXiv 2509.25849; Efron and Tibshirani 1993, chapter 13 (the percentile bootstrap).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from kr_jax.report.run import AXES

CLASSES = ('extremely hard', 'hard', 'medium', 'easy', 'extremely easy')
_RESAMPLES, _SEED = 4000, 0  # of the bootstrap
_MOST_POINTS = 60  # of a band


class Reach(NamedTuple):
  """What a run cost until it held a target. low < high only where it is censored; both None where it is unknown."""

  low: float | None
  high: float | None

  @property
  def is_known(self) -> bool:
    return self.low is not None

  @property
  def is_censored(self) -> bool:
    return self.high == math.inf


class Ratio(NamedTuple):
  """How many times as much one group costs as another; None where it cannot be told."""

  median: float | None
  low: float | None  # of the interval
  high: float | None
  pairs: int
  censored: int  # pairs of which a run never got there


def reach(cost_E: Sequence[float | None], success_E: Sequence[float | None], target: float) -> Reach:
  """What evaluations, in their order, say of the cost until success holds a target.

  Args:
    cost_E: until each evaluation, never falling. None: unknown.
    success_E: None: unknown; such an evaluation is left out.

  Raises ValueError for a target that is no success, or lists of two lengths.
  """
  check_target(target)
  if len(cost_E) != len(success_E):
    raise ValueError(f'{len(cost_E)} costs and {len(success_E)} successes are not of the same evaluations; give one '
                     'of each an evaluation')
  points = [(x, y) for x, y in zip(cost_E, success_E) if y is not None]
  for i, (x, y) in enumerate(points):
    if y >= target and all(later >= target for _, later in points[i + 1:i + 2]):
      x_0, y_0 = points[i - 1] if i else (x, None)
      if None in (x_0, x):
        return Reach(None, None)
      cost = float(x if y_0 is None else x_0 + (target - y_0) / (y - y_0) * (x - x_0))
      return Reach(cost, cost)
  if not points or points[-1][0] is None:
    return Reach(None, None)
  return Reach(float(points[-1][0]), math.inf)


def check_target(target: float) -> None:
  """Raises ValueError for a target that is no success rate."""
  if not 0 < target <= 1:
    raise ValueError(f'the target {target!r} must be a held-out success above 0 and at most 1; give one that was fixed '
                     'before the runs')


def ratio(baseline_P: Sequence[Reach], group_P: Sequence[Reach], level: float = 0.95) -> Ratio:
  """The ratio of costs, baseline / group, of pairs of runs. Pairs with an unknown cost or one of 0 are left out.

  level: of the interval. Of K groups that are compared with one, 1 - .05 / K makes all K intervals hold together with a
    chance of 95 % (Bonferroni).
  """
  pairs = [(b, g) for b, g in zip(baseline_P, group_P, strict=True)
           if b.is_known and g.is_known and b.low > 0 and g.low > 0]
  censored = sum(b.is_censored or g.is_censored for b, g in pairs)
  if not pairs:
    return Ratio(None, None, None, 0, 0)
  low_P = np.array([b.low / g.high for b, g in pairs])  # 0 where the group's run is censored
  high_P = np.array([b.high / g.low for b, g in pairs])
  median, above = np.median(low_P), np.median(high_P)
  low, high = interval(low_P, level)[0], interval(high_P, level)[1]
  return Ratio(float(median) if median == above else None, low if low > 0 else None,
               high if math.isfinite(high) else None, len(pairs), censored)


def interval(ratio_P: Sequence[float], level: float = 0.95) -> tuple[float, float]:
  """The interval of the median of ratios, each in [0, inf]; (0, inf) of a single one.

  A ratio of 0 or infinity, a bound that says nothing, has no log. Beside the bootstrap there then stand the k-th least
  and the k-th largest, which hold the median with a chance of 1 - 2 P(B < k), B binomial of n and 1/2: of 12 pairs the
  third ones with 96 %. Of a few pairs not even the least and the largest do, and the interval is (0, inf); 95 % takes 6.

  Raises ValueError for a level that is none.
  """
  if not 0 < level < 1:
    raise ValueError(f'the level {level!r} of an interval must be above 0 and below 1; .95 is the usual one')
  ratio_P = np.asarray(ratio_P, float)
  n = len(ratio_P)
  if n < 2:
    return 0.0, math.inf
  drawn = np.random.default_rng(_SEED).integers(n, size=(_RESAMPLES, n))
  low, high = np.quantile(np.median(ratio_P[drawn], axis=1), ((1 - level) / 2, (1 + level) / 2),
                          method='inverted_cdf')
  if np.any(ratio_P == 0) or np.any(np.isinf(ratio_P)):
    if 2 ** (1 - n) > 1 - level:
      return 0.0, math.inf
    k = np.count_nonzero(2 * stats.binom.cdf(np.arange(n // 2), n, 0.5) <= 1 - level)
    sorted_P = np.sort(ratio_P)
    return min(float(low), float(sorted_P[k - 1])), max(float(high), float(sorted_P[-k]))
  log_P = np.log(ratio_P)
  half = stats.t.ppf((1 + level) / 2, n - 1) * log_P.std(ddof=1) / math.sqrt(n)
  return min(float(low), math.exp(log_P.mean() - half)), max(float(high), math.exp(log_P.mean() + half))


def costs(curves: Sequence[Mapping[str, Any]], seeds: Mapping[str, int | None], target: float | None,
          baseline: str | None) -> dict[str, Any]:
  """The view's `comparison` of runs: cost to the target of each group on each axis, beside a baseline group.

  Args:
    curves: of the view.
    seeds: of each run.
    target: None: nothing is compared.
    baseline: the group that others are compared with; None: only costs are told.
  """
  if target is None:
    return {'target': None, 'baseline': baseline, 'rows': []}
  check_target(target)
  runs_of, rows = _by_run(curves), []
  for axis in AXES:
    reach_of = {group: {run: reach([p[axis] for p in points], [p['success'] for p in points], target)
                        for run, points in runs.items()} for group, runs in runs_of.items()}
    for group, reach_R in reach_of.items():
      found = None
      if baseline in reach_of and group != baseline:
        by_seed = [{seeds[run]: x for run, x in reversed(of.items())} for of in (reach_of[baseline], reach_R)]
        shared = [seed for seed in by_seed[0] if seed in by_seed[1] and seed is not None]
        found = ratio(*([of[seed] for seed in shared] for of in by_seed))
      rows.append(_row(group, axis, list(reach_R.values()), found, baseline))
  return {'target': target, 'baseline': baseline, 'rows': rows}


def _by_run(curves: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
  """The points of each run of each group."""
  found = {}
  for point in curves:
    found.setdefault(point['group'], {}).setdefault(point['run'], []).append(point)
  return found


def _row(group: str, axis: str, reach_R: list[Reach], found: Ratio | None, baseline: str | None) -> dict[str, Any]:
  """A row of the comparison. found: of the group and the baseline, where they are compared."""
  known = [x for x in reach_R if x.is_known]
  cost = float(np.median([x.high for x in known])) if known else math.inf
  censored = sum(x.is_censored for x in known)
  if not known:
    text = f'unknown: no {AXES[axis]} are recorded'
  elif found is None:
    text = f'{len(known) - censored} of {len(known)} run{"s" * (len(known) != 1)} held the target'
  else:
    text = sentence(found, axis, group, baseline)
  numbers = Ratio(None, None, None, 0, 0) if found is None else found
  return {'group': group, 'axis': axis, 'cost': cost if math.isfinite(cost) else None, 'ratio': numbers.median,
          'low': numbers.low, 'high': numbers.high, 'pairs': numbers.pairs, 'censored': censored, 'text': text}


def sentence(found: Ratio, axis: str, group: str, baseline: str) -> str:
  """What a ratio says; a multiple only where its interval leaves 1 out."""
  unit, pairs = AXES[axis], f'{found.pairs} pair{"s" * (found.pairs != 1)}'
  if found.pairs == 0:
    return f'no pair: {baseline} and {group} have no seed in common of which both costs are known and above 0'
  if found.pairs == 1:
    return 'one pair has no interval; run more seeds'
  low, high = found.low or 0.0, math.inf if found.high is None else found.high
  if low <= 1 <= high:
    return f'no difference that {pairs} show'
  span = f'95 % interval {low:.2f} to {high:.2f}' if math.isfinite(high) else f'95 % interval from {low:.2f}'
  censored = f', {found.censored} of them censored' if found.censored else ''
  if found.median is not None:
    times = f'{found.median:.2f} times'
  else:
    times = f'at least {low:.2f} times' if low > 1 else f'at most {high:.2f} times'
  return f'{baseline} needs {times} the {unit} of {group} ({span}, {pairs}{censored})'


def bands(curves: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The view's `bands`: of each group and axis mean, least and largest success over its runs.

  Each run's success is interpolated between its evaluations, at all costs that all runs of the group have reached. The
  least and the largest are told, not an interval: of three seeds that would be wider than the scale.
  """
  found = []
  for group, runs in _by_run(curves).items():
    for axis in AXES:
      lines = [[(p[axis], p['success']) for p in points if None not in (p[axis], p['success'])]
               for points in runs.values()]
      if any(lines):
        found += [{'group': group, 'axis': axis, **point} for point in band([line for line in lines if line])]
  return found


def band(lines: Sequence[Sequence[tuple[float, float]]]) -> list[dict[str, Any]]:
  """Points {'x', 'mean', 'low', 'high', 'seeds'} over lines (x, y), x never falling, where all of them are."""
  first, last = max(line[0][0] for line in lines), min(line[-1][0] for line in lines)
  x_X = np.unique(np.array([x for line in lines for x, _ in line if first <= x <= last], float))
  if len(x_X) > _MOST_POINTS:
    x_X = x_X[np.unique(np.linspace(0, len(x_X) - 1, _MOST_POINTS).round().astype(int))]
  y_LX = np.array([np.interp(x_X, *np.array(line, float).T) for line in lines])
  return [{'x': float(x), 'mean': float(y_L.mean()), 'low': float(y_L.min()), 'high': float(y_L.max()),
           'seeds': len(lines)} for x, y_L in zip(x_X, y_LX.T)]


def pareto(cost_E: Sequence[float], success_E: Sequence[float]) -> list[bool]:
  """Whether each point is on the front: no other costs no more and succeeds no less, and is better in one of both."""
  front, best, best_cost = [False] * len(cost_E), -math.inf, math.nan
  for e in sorted(range(len(cost_E)), key=lambda e: (cost_E[e], -success_E[e])):
    front[e] = success_E[e] > best or (success_E[e] == best and cost_E[e] == best_cost)
    if success_E[e] > best:
      best, best_cost = success_E[e], cost_E[e]
  return front


def status(right: int, rollouts: int) -> int:
  """The class of a task by its right rollouts, of CLASSES. Raises ValueError for counts that are none."""
  if not 0 <= right <= rollouts or rollouts < 1:
    raise ValueError(f'{right} right ones of {rollouts} rollouts have no class; right must lie in 0..rollouts, of '
                     'which there must be one')
  if right in (0, rollouts):
    return 4 * (right == rollouts)
  return 1 if 5 * right <= rollouts else 3 if 5 * right >= 4 * rollouts else 2


def status_matrix(moves: Sequence[tuple[int, int]]) -> list[list[int]]:
  """How many tasks moved from each class, a row, to each class, a column. moves: (start, end), of CLASSES."""
  matrix = [[0] * len(CLASSES) for _ in CLASSES]
  for start, end in moves:
    matrix[start][end] += 1
  return matrix


def moves_held_out(first: Mapping[str, Sequence[int]], last: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
  """The classes of held-out tasks at two evaluations, of their {'right': [...], 'verified': [...]} in one order. Tasks
  without a verified rollout at either are left out."""
  counts = zip(*(of[name] for of in (first, last) for name in ('right', 'verified')), strict=True)
  return [(status(right_0, n_0), status(right_1, n_1)) for right_0, n_0, right_1, n_1 in counts if n_0 and n_1]


def moves_in_training(visits: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
  """The classes of training tasks at their first and at their last visit.

  Args:
    visits: (task, right, verified) in their order. Those without a verified rollout, and tasks with one visit, are
      left out.
  """
  first, last, times = {}, {}, {}
  for task, right, verified in visits:
    if verified:
      last[task] = status(right, verified)
      first.setdefault(task, last[task])
      times[task] = times.get(task, 0) + 1
  return [(first[task], last[task]) for task in first if times[task] > 1]
