"""What the recorded runs say, by the rules of plan.py: tuned rates, finalists, costs to the target, goals.

    area        integral of success over rollouts, from 0 to uniform's total, over this total
    ratio       cost of the arm / cost of uniform, of one seed; the median over seeds (kr_jax/report/compare.py)
    difference  success of the arm - success of uniform, of one seed, at uniform's last evaluation; the mean over seeds

All of it is plain values: what is unknown is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
from typing import Any

import numpy as np
from scipy import stats

from kr_jax.report import compare
from tests.benchmarks.proof import plan
from tests.benchmarks.proof import runs

Line = Mapping[str, Any]
Seeds = dict[int, Line]  # the lines of an arm at a rate, by seed
_TINY = 1e-12


class Cell:
  """The lines of a family at a batch size."""

  def __init__(self, lines: Iterable[Line]):
    self._of: dict[tuple[str, str, float], Seeds] = {}
    self.lines = list(lines)
    for line in self.lines:
      self._of.setdefault((line['role'], line['arm'], plan.rounded(line['multiple'])), {})[line['seed']] = line

  def arms(self, role: str) -> list[str]:
    """Those that have lines of a role, in the order of the plan; uniform is the first."""
    return [arm for arm in plan.ARMS if any(key[:2] == (role, arm) for key in self._of)]

  def multiples(self, role: str, arm: str) -> dict[float, Seeds]:
    return {key[2]: seeds for key, seeds in sorted(self._of.items()) if key[:2] == (role, arm)}

  @property
  def total(self) -> float | None:
    """The rollouts of a uniform run; None where there is none."""
    totals = [line['points']['rollouts'][-1] for line in self.lines if line['arm'] == plan.BASELINE]
    return float(np.median(totals)) if totals else None

  def areas(self, arm: str) -> dict[float, dict[int, float]]:
    """Of each multiple and tuning seed; empty without a uniform run."""
    total = self.total
    return {} if total is None else {multiple: {seed: area(line, total) for seed, line in seeds.items()}
                                     for multiple, seeds in self.multiples('tuning', arm).items()}

  def tuned(self, arm: str) -> float | None:
    """The best multiple, of those that have all tuning seeds; None where there is none. Of equals the nearest to 1.

    Other seeds, which one rate may have and another not, are left out.
    """
    means = {multiple: float(np.mean([of[seed] for seed in plan.TUNING_SEEDS]))
             for multiple, of in self.areas(arm).items() if of.keys() >= set(plan.TUNING_SEEDS)}
    return max(means, key=lambda x: (means[x], -abs(math.log(x))), default=None)

  def test(self, arm: str) -> Seeds:
    """The lines of the test at the tuned multiple; where none is tuned, or has lines, at the one with most lines."""
    of, tuned = self.multiples('test', arm), self.tuned(arm)
    return of.get(tuned) or max(of.values(), key=len, default={})


def cells(lines: Iterable[Line]) -> dict[str, Cell]:
  """By name, in the order of the plan; those that have no lines are not there."""
  lines = list(lines)
  found = {}
  for family in plan.FAMILIES:
    for batch in plan.BATCHES:
      if some := [line for line in lines if (line['family'], line['batch']) == (family, batch)]:
        found[f'{family}_{batch}'] = Cell(some)
  return found


# Curves.


def points(line: Line, name: str = 'success', axis: str = 'rollouts') -> tuple[np.ndarray, np.ndarray]:
  """Costs and what was measured there, without evaluations of which either is unknown."""
  of = line['points']
  pairs = [(x, y) for x, y in zip(of[axis], of.get(name) or []) if None not in (x, y)]
  return tuple(np.array(pairs, float).reshape(-1, 2).T)


def area(line: Line, end: float) -> float:
  """Mean success from 0 to `end` rollouts; the last success is kept where the run ends before.

  Raises ValueError for an end that is not above 0.
  """
  if not end > 0:
    raise ValueError(f'the area up to {end!r} rollouts is none; uniform runs must have rollouts')
  x, y = points(line)
  x_X = np.unique([0.0, *x[x < end], end])
  return float(np.trapezoid(np.interp(x_X, x, y), x_X) / end)


def success_at(line: Line, end: float, name: str = 'success') -> float | None:
  """Interpolated; the last where the run ends before; None where nothing is known."""
  x, y = points(line, name)
  return float(np.interp(end, x, y)) if len(x) else None


# Statistics.


def paired(group: Mapping[int, float | None], baseline: Mapping[int, float | None], level: float = plan.LEVEL
           ) -> dict[str, Any]:
  """The mean difference of pairs by seed, with Student's interval and its p-value; None as far as it is not known."""
  seeds = [seed for seed in group if None not in (group[seed], baseline.get(seed))]
  difference_P = np.array([group[seed] - baseline[seed] for seed in seeds], float)
  n = len(difference_P)
  if n < 2:
    return {'mean': float(difference_P[0]) if n else None, 'low': None, 'high': None, 'p': None, 'pairs': n}
  mean, error = float(difference_P.mean()), max(float(difference_P.std(ddof=1)) / math.sqrt(n), _TINY)
  half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
  return {'mean': mean, 'low': mean - half, 'high': mean + half,
          'p': float(2 * stats.t.sf(abs(mean) / error, n - 1)), 'pairs': n}


def holm(p_K: Sequence[float | None]) -> list[float | None]:
  """p-values that are corrected for their number (Holm 1979); None stays, and is not counted."""
  known = sorted((p, k) for k, p in enumerate(p_K) if p is not None)
  found, most = [None] * len(p_K), 0.0
  for rank, (p, k) in enumerate(known):
    most = max(most, min(1.0, (len(known) - rank) * p))
    found[k] = most
  return found


def geometric(group: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> dict[str, Any]:
  """As `paired`, of the ratio group / baseline: its geometric mean. Pairs that are not both above 0 are left out."""
  log = lambda of: {seed: math.log(x) if x else None for seed, x in of.items()}
  found = paired(log(group), log(baseline))
  return {name: x if x is None or name in ('p', 'pairs') else math.exp(x) for name, x in found.items()}


# The stages.


def screening(of: Mapping[str, Cell]) -> list[dict[str, Any]]:
  """Arms by the area at their best rate minus uniform's, the mean over the cells of the screening; the best first.

  An arm that is not tuned in one of the cells comes last, with a gain of None.
  """
  rows = []
  for arm in plan.ARMS:
    by_cell = {name: _gain(of[name], arm) if name in of else None for name in plan.SCREENED_IN}
    gains = list(by_cell.values())
    rows.append({'arm': arm, 'gain': None if None in gains else float(np.mean(gains)), 'by_cell': by_cell})
  return sorted(rows, key=lambda row: (row['gain'] is None, -(row['gain'] or 0.0)))


def _gain(cell: Cell, arm: str) -> float | None:
  best = {name: cell.tuned(name) for name in (arm, plan.BASELINE)}
  if None in best.values():
    return None
  of, baseline = (cell.areas(name)[multiple] for name, multiple in best.items()) if arm != plan.BASELINE else [{}, {}]
  return paired(of, baseline)['mean'] if arm != plan.BASELINE else 0.0


def finalists(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Of screening: those that are reserved and the best others, MOST_FINALISTS in all; fewer where fewer are tuned."""
  ranked = [row['arm'] for row in rows if row['gain'] is not None and row['arm'] != plan.BASELINE]
  others = [arm for arm in ranked if arm not in plan.RESERVED]
  return [*plan.RESERVED, *others[:plan.MOST_FINALISTS - len(plan.RESERVED)]]


def is_screened(of: Mapping[str, Cell]) -> bool:
  """Whether all arms are tuned at all rates in the cells of the screening."""
  rates = len(plan.MULTIPLES)
  return all(name in of and all(
      sum(found.keys() >= set(plan.TUNING_SEEDS) for found in of[name].areas(arm).values()) >= rates
      for arm in plan.ARMS) for name in plan.SCREENED_IN)


def compared(cell: Cell, target: float) -> dict[str, dict[str, Any]]:
  """What each arm of the test did, beside uniform."""
  arms, total = cell.arms('test'), cell.total
  by_arm = {arm: cell.test(arm) for arm in arms}
  baseline, others = by_arm.get(plan.BASELINE, {}), [arm for arm in arms if arm != plan.BASELINE]
  level, found = 1 - (1 - plan.LEVEL) / max(len(others), 1), {}
  for arm in arms:
    seeds = by_arm[arm]
    rates = [line['multiple'] for line in seeds.values()]
    found[arm] = {'seeds': sorted(seeds), 'multiple': rates[0] if rates else None, 'tuned': cell.tuned(arm),
                  'reach': {axis: _reached(seeds, axis, target) for axis in runs.AXES},
                  'figures': {name: mean(line.get(name) for line in seeds.values()) for name in (
                      'effective_gradient_ratio', 'expected_gradient_ratio', 'mixed_tasks', 'expected_mixed_tasks',
                      'log_loss', 'constant_log_loss', 'count_log_loss', 'forgotten', 'rollouts', 'budget_max')},
                  'by_seed': {seed: None if total is None else success_at(line, total)
                              for seed, line in sorted(seeds.items())},
                  'success': {} if total is None else {
                      name: mean(success_at(line, total, name) for line in seeds.values()) for name in measures(cell)}}
    if arm != plan.BASELINE:
      found[arm] |= _beside(seeds, baseline, target, total, level, measures(cell))
  for name in measures(cell):
    rows = [found[arm]['difference'][name] for arm in others]
    for row, p in zip(rows, holm([row['p'] for row in rows])):
      row['p_holm'] = p
  if plan.PAPER in by_arm and total is not None:
    at = lambda arm: {seed: success_at(line, total) for seed, line in by_arm[arm].items()}
    of_paper = {arm: paired(at(arm), at(plan.PAPER)) for arm in others if arm != plan.PAPER}
    for (arm, row), p in zip(of_paper.items(), holm([row['p'] for row in of_paper.values()])):
      found[arm]['beside_paper'] = row | {'p_holm': p}
  return found


def measures(cell: Cell) -> list[str]:
  """What is measured at evaluations: success, of each status, and pass@k where it is there."""
  passes = sorted({name for line in cell.lines for name in line['points'] if name.startswith('pass@')})
  return ['success', *runs.STATUSES, *passes]


def _reach(line: Line, axis: str, target: float) -> compare.Reach:
  return compare.reach(line['points'][axis], line['points']['success'], target)


def _reached(seeds: Seeds, axis: str, target: float) -> dict[int, float | None]:
  """The cost to the target by seed; None: it was never held, or is unknown."""
  found = {seed: _reach(line, axis, target) for seed, line in sorted(seeds.items())}
  return {seed: x.low if x.is_known and not x.is_censored else None for seed, x in found.items()}


def _beside(seeds: Seeds, baseline: Seeds, target: float, total: float | None, level: float, names: Sequence[str]
            ) -> dict[str, Any]:
  """An arm beside uniform."""
  shared = sorted(seeds.keys() & baseline.keys())
  ratios = {axis: compare.ratio([_reach(seeds[seed], axis, target) for seed in shared],
                                [_reach(baseline[seed], axis, target) for seed in shared], level)._asdict()
            for axis in runs.AXES}
  at = lambda of, name: {seed: None if total is None else success_at(of[seed], total, name) for seed in shared}
  column = lambda of, name: {seed: of[seed].get(name) for seed in shared}
  return {
      'level': level, 'ratio': ratios,
      'difference': {name: paired(at(seeds, name), at(baseline, name)) for name in names},
      'gradient': geometric(*(column(of, 'effective_gradient_ratio') for of in (seeds, baseline))),
      **{f'{name}_difference': paired(column(seeds, name), column(baseline, name))
         for name in ('mixed_tasks', 'forgotten')}}


def mean(numbers: Iterable[float | None]) -> float | None:
  known = [x for x in numbers if x is not None]
  return float(np.mean(known)) if known else None


# The goals.


def all_of(answers: Iterable[bool | None]) -> bool | None:
  """Whether all hold; None: it is not known."""
  answers = list(answers)
  return False if False in answers else None if None in answers else True


def at_least(count: int, answers: Iterable[bool | None]) -> bool | None:
  """Whether so many hold; None: it is not known."""
  answers = list(answers)
  sure, unknown = answers.count(True), answers.count(None)
  return True if sure >= count else None if sure + unknown >= count else False


def goals(test: Mapping[str, Mapping[str, Mapping[str, Any]]], arm: str) -> dict[str, bool | None]:
  """Which goals of plan.py an arm meets: True, False, or None where it is not known."""
  names = [f'{family}_{batch}' for family in plan.FAMILIES for batch in plan.BATCHES]
  goal_cells = [f'{family}_small' for family in plan.GOAL_FAMILIES]

  def of(cell: str, ask: Callable[[Mapping[str, Any]], bool | None]) -> bool | None:
    row = test.get(cell, {}).get(arm)
    return None if row is None or 'ratio' not in row else ask(row)

  def saves(row):
    found = row['ratio']['rollouts']
    at_most = found['median'] if found['median'] is not None else found['high']
    return None if found['pairs'] < plan.LEAST_PAIRS else at_most is not None and at_most <= plan.MOST_ROLLOUTS

  def is_never_worse(row):
    found = row['ratio']['rollouts']
    return None if found['pairs'] < plan.LEAST_PAIRS else found['high'] is not None and found['high'] <= 1

  def gradient(row):
    return None if row['gradient']['pairs'] < plan.LEAST_PAIRS else row['gradient']['mean'] >= plan.LEAST_GRADIENT

  def is_not_below(row):
    if row is None or row['pairs'] < plan.LEAST_PAIRS:
      return None
    return not (row['mean'] < 0 and row['p_holm'] < 1 - plan.LEVEL)

  return {
      'rollouts': all_of([at_least(2, [of(cell, saves) for cell in goal_cells]),
                          *(of(cell, is_never_worse) for cell in names)]),
      'gradient': all_of(of(cell, gradient) for cell in goal_cells),
      'success': all_of(of(cell, lambda row: is_not_below(row['difference']['success'])) for cell in names),
      'paper': True if arm == plan.PAPER else all_of(
          of(cell, lambda row: is_not_below(row.get('beside_paper'))) for cell in names)}


def analysed(lines: Iterable[Line], targets: Callable[[str], float]) -> dict[str, Any]:
  """All of it. targets: of a family."""
  of = cells(lines)
  rows = screening(of)
  test = {name: compared(cell, targets(name.rpartition('_')[0])) for name, cell in of.items() if cell.arms('test')}
  arms = [arm for arm in plan.ARMS if arm != plan.BASELINE and any(arm in row for row in test.values())]
  return {
      'tuning': {name: {arm: {'best': cell.tuned(arm), 'area': {str(multiple): mean(by_seed.values())
                                                                 for multiple, by_seed in cell.areas(arm).items()}}
                        for arm in cell.arms('tuning')} for name, cell in of.items() if cell.arms('tuning')},
      'screening': rows, 'is_screened': is_screened(of), 'finalists': finalists(rows), 'test': test,
      'targets': {name: targets(name.rpartition('_')[0]) for name in test},
      'goals': {arm: goals(test, arm) for arm in arms}}
