"""metrics.jsonl -> summary.json and plots/*.png: what a run did, from its record alone."""

from __future__ import annotations

import json
import os
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np

from kr_jax import health
from kr_jax.allocation import scores
from kr_jax.record import calibration
from kr_jax.record import metrics


def write(workdir: str) -> dict[str, Any]:
  """Writes <workdir>/summary.json and <workdir>/plots/*.png; returns the summary.

  Raises:
    ValueError: the workdir has no record of a step.
  """
  path = os.path.join(workdir, 'metrics.jsonl')
  records = metrics.read(path)
  steps = [r for r in records if 'reward_mean' in r]
  evaluations = [r for r in records if 'reward_mean' not in r]
  if not steps or not evaluations:
    raise ValueError(f'{path} holds no step and evaluation to report; train first')
  with open(os.path.join(workdir, 'config.json')) as file:
    config = json.load(file)
  summary = summarize(steps, evaluations, config)
  save(os.path.join(workdir, 'summary.json'), summary)
  _plot(workdir, steps, evaluations, _score_name(config))
  return summary


def _score_name(config: dict[str, Any]) -> str:
  return f'avg@{config["evaluate"]["rollouts"]}'


def summarize(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]],
              config: dict[str, Any]) -> dict[str, Any]:
  """The run in one object. Means and sums are over all steps; wall_s leaves the warm start out.

  Of gradient ratio and mixed tasks there are three figures: what was observed, what was expected of the run's budgets,
  and what was expected, by the same forecasts, of uniform budgets (`uniform_...`). How the forecasts did is said by
  calibration.summarize. A held-out score is None where no rollout was verified; the objective is None where a step has
  waves.
  """
  score = _score_name(config)
  column = lambda name: np.array([r[name] for r in steps], float)
  first, last = evaluations[0], evaluations[-1]
  rollouts = column('rollouts_total')
  mean = lambda name: None if steps[-1][name] is None else float(column(name).mean())
  share = lambda name: float(column(name) @ rollouts / rollouts.sum())
  return {
      'rule': config['alloc']['rule'],
      'seed': config['seed'],
      'steps': len(steps),
      'wall_s': max(steps[-1]['wall_s'], last['wall_s']),
      f'{score}_first': first[f'eval/{score}'],
      f'{score}_last': last[f'eval/{score}'],
      f'{score}_last_stderr': last[f'eval/{score}_stderr'],
      f'{score}_rise': None if None in (last[f'eval/{score}'], first[f'eval/{score}']) else (
          last[f'eval/{score}'] - first[f'eval/{score}']),
      f'{score}_last_unverified': last['eval/unverified'],
      **{name: mean(name) for name in (
          'effective_gradient_ratio', 'expected_gradient_ratio', 'uniform_gradient_ratio',
          'mixed_tasks', 'expected_mixed_tasks', 'uniform_mixed_tasks', 'objective', 'uniform_objective')},
      **calibration.summarize(steps),
      'budget_min': int(column('budget_min').min()),
      'budget_max': int(column('budget_max').max()),
      'rollouts': int(rollouts.sum()),
      'tokens_generated': int(column('tokens_generated').sum()),
      'tokens_updated': int(column('tokens_updated').sum()),
      'compile_count': int(steps[-1]['compile_count']),
      'unverified': share('unverified'),
      'no_answer': share('no_answer'),
      **{f'unverified_{kind}': int(column(f'unverified_{kind}').sum()) for kind in health.UNVERIFIED},
      'alarms': sum(len(r['alarms']) for r in steps),
  }


def save(path: str, tree: dict[str, Any]) -> None:
  """Writes strict JSON, the whole file or none. Raises ValueError for a number that is not finite."""
  with open(f'{path}.tmp', 'w') as file:
    json.dump(tree, file, indent=1, allow_nan=False)
    file.write('\n')
  os.replace(f'{path}.tmp', path)


def _plot(workdir: str, steps, evaluations, score: str) -> None:
  directory = os.path.join(workdir, 'plots')
  os.makedirs(directory, exist_ok=True)
  for name, draw, records in (('success_by_difficulty', _success, evaluations),
                              ('budgets', _budgets, steps), ('gradient_ratio', _ratio, steps)):
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout='constrained', dpi=120)
    axes = figure.add_subplot()
    axes.set_xlabel('step')
    draw(figure, axes, records, score)
    figure.savefig(os.path.join(directory, f'{name}.png'))
  figure = matplotlib.figure.Figure(figsize=(11, 4.6), layout='constrained', dpi=120)
  _calibration(figure, steps)
  figure.savefig(os.path.join(directory, 'calibration.png'))


def _success(figure, axes, evaluations, score: str) -> None:
  column = lambda name: np.array([r[name] for r in evaluations], float)  # None becomes NaN
  x = column('step')
  prefix, suffix = 'eval/difficulty_', f'/{score}'
  difficulties = sorted(int(k[len(prefix):-len(suffix)]) for k in evaluations[0]
                        if k.startswith(prefix) and k.endswith(suffix))
  colors = matplotlib.colormaps['viridis'](np.linspace(0, 0.9, len(difficulties)))
  for difficulty, color in zip(difficulties, colors):
    axes.plot(x, column(f'{prefix}{difficulty}{suffix}'), color=color, lw=1,
              label=f'difficulty {difficulty}')
  y, error = column(f'eval/{score}'), column(f'eval/{score}_stderr')
  axes.fill_between(x, y - error, y + error, color='black', alpha=0.15, lw=0)
  axes.plot(x, y, color='black', lw=2.5, marker='o', ms=4, label='all (± standard error)')
  axes.set(ylabel=f'{score} of held-out tasks', ylim=(0, 1), title='Success by difficulty')
  figure.legend(loc='outside right center', frameon=False, fontsize=8)


def _budgets(figure, axes, steps, _) -> None:
  budget = np.array([r['budget_by_success_rate'] for r in steps], float).T  # None becomes NaN
  last = steps[-1]['step'] + 1
  image = axes.imshow(budget, origin='lower', aspect='auto', extent=(steps[0]['step'], last, 0, 1),
                      interpolation='nearest', cmap='magma_r')
  axes.set(ylabel='estimated success rate', title='Budgets by success rate (blank: no task there)')
  figure.colorbar(image, label='mean rollouts of a task')


def _ratio(figure, axes, steps, _) -> None:
  for name, label, style in (
      ('effective_gradient_ratio', 'this run, observed', {'color': 'tab:blue', 'lw': 2}),
      ('expected_gradient_ratio', 'this run, expected by the forecasts', {'color': 'tab:blue', 'lw': 2, 'ls': '--'}),
      ('uniform_gradient_ratio', 'uniform budgets, expected by the same forecasts', {'color': 'gray', 'ls': ':'})):
    _trailing(axes, steps, name, label, faint=name == 'effective_gradient_ratio', **style)
  axes.set(ylabel='rollouts in mixed groups / all', ylim=(0, 1),
           title=f'Effective gradient ratio{_mean_of(steps)}')
  axes.legend(frameon=False, fontsize=8)


def _window(steps) -> int:
  """Steps that a curve is averaged over."""
  return max(1, len(steps) // 15)


def _mean_of(steps) -> str:
  return f' (mean of {_window(steps)} steps)' if _window(steps) > 1 else ''


def _trailing(axes, steps, name: str, label: str, *, faint: bool = False, **style) -> None:
  """A figure's trailing mean: each point holds only what was known by its step. faint: the steps themselves too."""
  x, y = [r['step'] for r in steps], np.array([r[name] for r in steps], float)  # None becomes NaN, a gap
  if faint:
    axes.plot(x, y, color=style['color'], alpha=0.25, lw=0.8)
  window = _window(steps)
  axes.plot(x, [y[max(0, i + 1 - window):i + 1].mean() for i in range(len(y))], label=label, **style)


def _calibration(figure, steps) -> None:
  grid = figure.add_gridspec(2, 2, height_ratios=(3.2, 1))
  curve, loss = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[:, 1])
  sizes = figure.add_subplot(grid[1, 0], sharex=curve)
  curve.plot([0, 1], [0, 1], color='gray', lw=1, ls=':', label='as forecast')
  half = (len(steps) + 1) // 2
  for i, (part, color) in enumerate(((steps[:half], 'tab:orange'), (steps[half:], 'tab:blue'))):
    if not part:
      continue
    reliability_B5 = calibration.reliability(part)
    low_B, high_B = scores.interval(reliability_B5)
    rollouts_B, bins = reliability_B5[:, 0], len(reliability_B5)
    b = np.flatnonzero(rollouts_B)
    forecast, observed = reliability_B5[b, 1] / rollouts_B[b], reliability_B5[b, 2] / rollouts_B[b]
    curve.errorbar(forecast, observed, [np.maximum(observed - low_B[b], 0), np.maximum(high_B[b] - observed, 0)],
                   color=color, marker='o', ms=4, lw=1, capsize=2,
                   label=f'steps {part[0]["step"]} to {part[-1]["step"]}')
    sizes.bar((np.arange(bins) + 0.3 + 0.4 * i) / bins, rollouts_B, width=0.4 / bins, color=color)
  curve.set(ylabel='observed', xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), title='Success rates, forecast and observed')
  curve.legend(frameon=False, fontsize=8, loc='lower right', title='bins of forecasts, with 95 % intervals',
               title_fontsize=8)
  curve.tick_params(labelbottom=False)
  sizes.set(xlabel='forecast before the step', ylabel='rollouts')
  _trailing(loss, steps, 'log_loss', 'forecasts of each task', faint=True, color='tab:blue', lw=2)
  _trailing(loss, steps, 'constant_log_loss', 'one rate for all tasks, that of the steps before', color='gray', ls=':')
  loss.set(xlabel='step', ylabel='nats a rollout (lower is better)', ylim=(0, None),
           title=f'Log loss of the forecasts{_mean_of(steps)}')
  loss.legend(frameon=False, fontsize=8)
