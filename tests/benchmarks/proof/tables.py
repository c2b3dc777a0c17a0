"""The analysis as report.md and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import matplotlib
import matplotlib.backends.backend_agg
import matplotlib.figure
import numpy as np
from scipy import stats

from tests.benchmarks.proof import analysis
from tests.benchmarks.proof import plan
from tests.benchmarks.proof import runs

PICTURE = 'success.png'
_GOALS = {
    'rollouts': f'at most {plan.MOST_ROLLOUTS:g} of the rollouts to the target in two families, at most 1 in all cells',
    'gradient': f'effective gradient ratio at least {plan.LEAST_GRADIENT:g} times',
    'success': 'success at equal rollouts never significantly below uniform',
    'paper': "nor below the paper's rule"}
_ANSWERS = {True: 'met', False: 'missed', None: 'not known'}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of Markdown, and a blank one."""
  line = lambda cells: f'| {" | ".join(cells)} |'
  return [line(columns), line(['---'] * len(columns)), *map(line, rows), '']


def number(x: float | None, digits: int = 3) -> str:
  return '' if x is None else f'{x:.{digits}f}'


def of_ratio(found: Mapping[str, Any]) -> str:
  """'.61 (.48-.75)'; a bound where censored runs leave the median open."""
  if not found['pairs']:
    return 'no pair'
  low, high = number(found['low'] or 0.0, 2), '' if found['high'] is None else number(found['high'], 2)
  censored = f', {found["censored"]} of {found["pairs"]} censored' if found['censored'] else ''
  middle = 'open' if found['median'] is None else number(found['median'], 2)
  return f'{middle} ({low}-{high}{censored})'


def of_difference(found: Mapping[str, Any], digits: int = 3) -> str:
  """'+.021 (+.004-+.038, p .03)', p corrected where it is."""
  if found['mean'] is None:
    return ''
  sign = lambda x: f'{x:+.{digits}f}'
  p = found.get('p_holm', found['p'])
  return sign(found['mean']) if found['low'] is None else (
      f'{sign(found["mean"])} ({sign(found["low"])} to {sign(found["high"])}, p {p:.2g})')


def report(found: Mapping[str, Any], signal: Sequence[Mapping[str, Any]] = ()) -> str:
  """report.md of an analysis.

  signal: lines of tests/benchmarks/proof/signal.py.
  """
  lines = ['# The proof, as recorded', '',
           'Made by `launch/proof.sh --report` from the lines beside it. What is compared, and what would count as '
           'what, is in tests/benchmarks/proof/plan.py. Ratios and differences are to uniform budgets, of pairs of '
           'runs of one seed; a ratio below 1 is better.', '']
  if found['goals']:
    lines += ['## Goals', '', *table(['arm', *_GOALS.values()], [
        [arm, *(_ANSWERS[answers[goal]] for goal in _GOALS)] for arm, answers in found['goals'].items()])]
  if found['test']:
    lines += [f'![Held-out success against rollouts]({PICTURE})', '']
  for name, of_arm in found['test'].items():
    lines += _of_cell(name, of_arm, found['targets'][name])
  lines += _of_signal(signal) + _of_screening(found) + _of_tuning(found)
  return '\n'.join(lines).rstrip('\n') + '\n'


def _of_cell(name: str, of_arm: Mapping[str, Any], target: float) -> list[str]:
  lines = [f'## {name}: the target is {target:g}', '']
  others = {arm: row for arm, row in of_arm.items() if 'ratio' in row}
  if others:
    level = next(iter(others.values()))['level']
    lines += [f'Cost to the target over uniform\'s, median of pairs, with intervals of {level:.1%}:', '', *table(
        ['arm', 'rate', 'seeds', 'rollouts', 'tokens', 'FLOPs', 'seconds'],
        [[arm, f'x{row["multiple"]:.3g}{"" if row["tuned"] else " untuned"}', str(len(row['seeds'])),
          *(of_ratio(row['ratio'][axis]) for axis in runs.AXES)] for arm, row in others.items()])]
    names = list(next(iter(others.values()))['difference'])
    lines += ['Success at equal rollouts minus uniform\'s, with 95 % intervals and p-values corrected over the arms; '
              'and minus that of the paper\'s rule:', '', *table(
                  ['arm', *names, "beside the paper's rule"],
                  [[arm, *(of_difference(row['difference'][x]) for x in names),
                    of_difference(row['beside_paper']) if 'beside_paper' in row else '']
                   for arm, row in others.items()])]
    lines += ['Beside uniform, what groups were like:', '', *table(
        ['arm', 'effective gradient ratio, times', 'mixed tasks', 'forgotten share of the solved'],
        [[arm, f'{number(row["gradient"]["mean"], 2)} ({number(row["gradient"]["low"], 2)}-'
               f'{number(row["gradient"]["high"], 2)})', of_difference(row['mixed_tasks_difference'], 2),
          of_difference(row['forgotten_difference'])] for arm, row in others.items()])]
  figures = ('effective_gradient_ratio', 'expected_gradient_ratio', 'mixed_tasks', 'expected_mixed_tasks', 'log_loss',
             'constant_log_loss', 'count_log_loss', 'forgotten', 'rollouts', 'budget_max')
  lines += ['Means over seeds; success is that at equal rollouts:', '', *table(
      ['arm', 'success', *(x.replace('_', ' ') for x in figures)],
      [[arm, number(row['success'].get('success')), *(
          number(row['figures'][x], 0 if x == 'rollouts' else 3) for x in figures)] for arm, row in of_arm.items()])]
  seeds = sorted({seed for row in of_arm.values() for seed in row['seeds']})
  lines += ['Rollouts to the target (never: it was not held), and success at equal rollouts, by seed:', '', *table(
      ['arm', *map(str, seeds)], [[arm, *(_of_seed(row, seed) for seed in seeds)] for arm, row in of_arm.items()])]
  return lines


def _of_seed(row: Mapping[str, Any], seed: int) -> str:
  """'1234; .871'."""
  if seed not in row['by_seed']:
    return ''
  cost = row['reach']['rollouts'][seed]
  return f'{"never" if cost is None else round(cost)}; {number(row["by_seed"][seed])}'


def _of_screening(found: Mapping[str, Any]) -> list[str]:
  if all(row['gain'] is None and not any(x is not None for x in row['by_cell'].values()) for row in found['screening']):
    return []
  return ['## Screening', '',
          'Area under success against rollouts at the best rate minus uniform\'s, over the tuning seeds. '
          + (f'Finalists: {", ".join(found["finalists"])}.' if found['is_screened'] else 'It is not complete.'),
          '', *table(
              ['arm', 'what it is', 'gain', *plan.SCREENED_IN],
              [[row['arm'], plan.ARMS[row['arm']].about, number(row['gain'], 4),
                *(number(row['by_cell'][name], 4) for name in plan.SCREENED_IN)] for row in found['screening']])]


def _of_tuning(found: Mapping[str, Any]) -> list[str]:
  lines = []
  for name, of_arm in found['tuning'].items():
    rates = sorted({rate for row in of_arm.values() for rate in row['area']}, key=float)
    lines += [f'## Tuning in {name}', '', 'Areas by multiples of the base rate:', '', *table(
        ['arm', 'best', *(f'x{float(rate):.3g}' for rate in rates)],
        [[arm, '' if row['best'] is None else f'x{row["best"]:.3g}', *(number(row['area'].get(rate), 4)
                                                                       for rate in rates)]
         for arm, row in of_arm.items()])]
  return lines


def _of_signal(signal: Sequence[Mapping[str, Any]]) -> list[str]:
  if not signal:
    return []
  span = lambda row: f'{number(row["ratio"], 3)} ({number(row["low"], 3)}-{number(row["high"], 3)})'
  return ['## Batch signal-to-noise', '',
          'Of the gradient of uniform budgets at the warm start: |mean|^2 over the trace of the covariance of one '
          'batch\'s gradient, with 95 % intervals; of all tasks and of those of each status alone, with their share of '
          'the signal:', '', *table(
              ['cell', 'seed', 'batches', 'all', *runs.STATUSES],
              [[f'{row["family"]}_{row["batch"]}', str(row['seed']), str(row['batches']), span(row['of']['all']),
                *(f'{span(row["of"][x])}, {number(row["of"][x]["share"], 2)}' if x in row['of'] else ''
                  for x in runs.STATUSES)] for row in signal])]


# The plot.


def band(of: analysis.Seeds, end: float, size: int = 60) -> dict[str, np.ndarray] | None:
  """Mean success over seeds at some rollouts, and Student's 95 % interval of the mean; None without a line."""
  if not of:
    return None
  x_X = np.linspace(0, end, size)
  y_SX = np.array([np.interp(x_X, *analysis.points(line)) for line in of.values()])
  n = len(y_SX)
  half_X = stats.t.ppf(0.975, n - 1) * y_SX.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.zeros(size)
  return {'x': x_X, 'mean': y_SX.mean(axis=0), 'half': half_X}


def draw(of: Mapping[str, analysis.Cell], targets: Mapping[str, float], path: pathlib.Path) -> None:
  """Draws success against rollouts of each cell of the test."""
  shown = {name: cell for name, cell in of.items() if cell.arms('test') and cell.total}
  if not shown:
    return
  columns = min(2, len(shown))
  rows = -(-len(shown) // columns)
  figure = matplotlib.figure.Figure(figsize=(5 * columns, 3.2 * rows), layout='constrained')
  matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  arms = [arm for arm in plan.ARMS if any(arm in cell.arms('test') for cell in shown.values())]
  colors = {arm: matplotlib.colormaps['tab10'](i % 10) for i, arm in enumerate(arms)}
  for axis, (name, cell) in zip(axes, shown.items()):
    for arm in cell.arms('test'):
      found = band(cell.test(arm), cell.total)
      axis.plot(found['x'], found['mean'], color=colors[arm], label=arm, linewidth=1.4)
      axis.fill_between(found['x'], found['mean'] - found['half'], found['mean'] + found['half'], color=colors[arm],
                        alpha=0.15, linewidth=0)
    axis.axhline(targets[name], color='grey', linewidth=0.8, linestyle='--')
    axis.set(title=name, xlabel='rollouts', ylabel='held-out success', xlim=(0, cell.total))
    axis.legend(fontsize=7, loc='lower right')
  for axis in axes[len(shown):]:
    axis.set_visible(False)
  figure.savefig(path, dpi=70)
