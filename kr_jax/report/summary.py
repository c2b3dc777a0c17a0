"""metrics.jsonl -> summary.json: what a run did, from its record alone. Its plots are those of the page (page.py)."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
import statistics
from typing import Any

import numpy as np

from kr_jax import health
from kr_jax.record import calibration
from kr_jax.report import run


def write(workdir: str) -> dict[str, Any]:
  """Writes <workdir>/summary.json; returns the summary.

  Raises:
    ValueError: the workdir has no record of a step.
  """
  found = run.read(workdir)
  if not found.steps or not found.evaluations:
    raise ValueError(f'{os.path.join(workdir, "metrics.jsonl")} holds no step and evaluation to report; train first')
  summary = summarize(found.steps, found.evaluations, rule=found.rule, seed=found.seed, score=found.score)
  save(os.path.join(workdir, 'summary.json'), summary)
  return summary


def summarize(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], *, rule: str | None, seed: int | None,
              score: str) -> dict[str, Any]:
  """The run in one object. Means and sums are over all steps; wall_s leaves the warm start out.

  Of gradient ratio and mixed tasks there are three figures: what was observed, what was expected of the run's budgets,
  and what was expected, by the same forecasts, of uniform budgets (`uniform_...`). How the forecasts did is said by
  calibration.summarize. A held-out score is None where no rollout was verified; the objective is None where a step has
  waves; a figure is None where a step lacks it, as in records of older versions.

  Args:
    score: the name of the held-out success: 'avg@8'.
  """
  first, last = evaluations[0], evaluations[-1]
  rollouts = _column(steps, 'rollouts_total')
  held_out = lambda record, end='': run.number(record, f'eval/{score}{end}')
  rises = (held_out(last), held_out(first))
  return {
      'rule': rule,
      'seed': seed,
      'steps': len(steps),
      'wall_s': _over([steps[-1], last], 'wall_s', max),
      f'{score}_first': held_out(first),
      f'{score}_last': held_out(last),
      f'{score}_last_stderr': held_out(last, '_stderr'),
      f'{score}_rise': None if None in rises else rises[0] - rises[1],
      f'{score}_last_unverified': run.number(last, 'eval/unverified'),
      **{name: _over(steps, name, statistics.fmean) for name in (
          'effective_gradient_ratio', 'expected_gradient_ratio', 'uniform_gradient_ratio',
          'mixed_tasks', 'expected_mixed_tasks', 'uniform_mixed_tasks', 'objective', 'uniform_objective')},
      **_calibration_of(steps),
      'budget_min': _over(steps, 'budget_min', min),
      'budget_max': _over(steps, 'budget_max', max),
      **{name: _over(steps, of, sum) for name, of in (
          ('rollouts', 'rollouts_total'), ('tokens_generated', 'tokens_generated'),
          ('tokens_updated', 'tokens_updated'))},
      'compile_count': run.number(steps[-1], 'compile_count'),
      **{name: None if None in (rollouts, share := _column(steps, name)) else float(
          np.dot(share, rollouts) / np.sum(rollouts)) for name in ('unverified', 'no_answer')},
      **{f'unverified_{kind}': _over(steps, f'unverified_{kind}', sum) for kind in health.UNVERIFIED},
      'alarms': sum(len(record.get('alarms') or ()) for record in steps),
  }


def _column(records: list[dict[str, Any]], name: str) -> list[float | int] | None:
  """A figure of each record; None where one lacks it."""
  found = [run.number(record, name) for record in records]
  return None if None in found else found


def _over(records: list[dict[str, Any]], name: str, of: Callable[[list[Any]], Any]) -> float | int | None:
  """A function of a figure of each record; None where one lacks it."""
  found = _column(records, name)
  return None if found is None else of(found)


def _calibration_of(steps) -> dict[str, Any]:
  """As of calibration.summarize; all None where a step was recorded without forecasts."""
  if all('reliability' in record for record in steps):
    return calibration.summarize(steps)
  names = [f'{name}{end}' for end in ('', '_last_quarter') for name in calibration.SCORES]
  return dict.fromkeys([*names, 'mixing_gap'])


def save(path: str, tree: dict[str, Any]) -> None:
  """Writes strict JSON, the whole file or none. Raises ValueError for a number that is not finite."""
  with open(f'{path}.tmp', 'w') as file:
    json.dump(tree, file, indent=1, allow_nan=False)
    file.write('\n')
  os.replace(f'{path}.tmp', path)
