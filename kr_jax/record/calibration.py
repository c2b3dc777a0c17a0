"""How well the verdicts of a step were forecast before it: figures of a step, and of a run.

A forecast is the recalibrated posterior of a task's success rate (allocation/estimate.py), whatever the estimate that
the budgets came from. It is scored by allocation/scores.py on the rollouts that were verified, beside a constant: one
rate for all tasks, the share of right rollouts in the steps before, (right + 1) / (rollouts + 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from kr_jax.allocation import estimate
from kr_jax.allocation import scores
from kr_jax.allocation import value
from kr_jax.allocation.value import Beta
from kr_jax.types import Array

SCORES = ('log_loss', 'brier', 'count_log_loss', 'constant_log_loss', 'constant_brier', 'constant_count_log_loss')
_QUARTERS = 4


class Seen(NamedTuple):
  """Verified rollouts of a run's steps so far."""

  right: int = 0
  rollouts: int = 0

  @property
  def rate(self) -> float:
    """The constant forecast: 1/2 before any rollout, and never 0 or 1."""
    return (self.right + 1) / (self.rollouts + 2)

  def add(self, records: Iterable[dict[str, Any]]) -> Seen:
    """With the rollouts of more steps, which have a `reliability`."""
    rows = [row for record in records for row in record.get('reliability', [])]
    return Seen(self.right + int(sum(row[2] for row in rows)), self.rollouts + int(sum(row[0] for row in rows)))


def of_step(forecast: Beta, right_M: Array, rollouts_M: Array, seen: Seen) -> dict[str, Any]:
  """The scores of a step's forecasts, in nats a rollout (Brier: squared error of a rollout), beside the constant's.

  Args:
    forecast: of each task, from before the step.
    right_M, rollouts_M: right ones of the step's verified rollouts, and all of these.
    seen: of the steps before.

  Returns:
    SCORES, None where no rollout was verified; `reliability`, the rows of scores.reliability in ten bins.
  """
  mean_M = estimate.mean_rate(forecast)
  found = {}
  for name, score, success_rate in (('log_loss', scores.log_loss, mean_M), ('brier', scores.brier, mean_M),
                                    ('count_log_loss', scores.count_log_loss, forecast)):
    found[name] = score(success_rate, right_M, rollouts_M)
    found[f'constant_{name}'] = score(seen.rate, right_M, rollouts_M)
  found = {name: None if math.isnan(x) else x for name, x in found.items()}
  return found | {'reliability': scores.reliability(mean_M, right_M, rollouts_M).tolist()}


def expected_mixed(forecast: Beta, budget_WM: Array, right_WM: Array, wrong_WM: Array) -> tuple[float, float]:
  """How many groups, and rollouts in them, were expected to be mixed.

  With one wave it is what was expected before the step. The budgets of a later wave depend on the verdicts of those
  before, so what the wave adds is expected when it begins, of its budgets and of posteriors that have the verdicts so
  far; the sum over waves is returned. If the forecasts are right, the number that is seen differs from it by 0 on
  average (Doob's decomposition: the differences of waves are those of a martingale).

  Args:
    forecast: from before the step.
    budget_WM: rollouts of each wave and task.
    right_WM, wrong_WM: the verified ones of these.
  """
  tasks = rollouts = 0.0
  budget_M = right_M = wrong_M = np.zeros(len(forecast.a_M), int)
  for more_M, more_right_M, more_wrong_M in zip(*(np.asarray(x_WM, int) for x_WM in (budget_WM, right_WM, wrong_WM))):
    now = Beta(forecast.a_M + right_M, forecast.b_M + wrong_M)
    # The probability that a group becomes mixed; 0 of those that are.
    added_M = value.expected(now, more_M[:, None], 'mixed', group=value.Group(right_M, wrong_M))[:, 0]
    tasks += added_M.sum()
    rollouts += (budget_M + more_M) @ added_M + more_M @ ((right_M > 0) & (wrong_M > 0))
    budget_M, right_M, wrong_M = budget_M + more_M, right_M + more_right_M, wrong_M + more_wrong_M
  return float(tasks), float(rollouts)


def summarize(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """SCORES of a run and of its last quarter ('..._last_quarter'), means over verified rollouts, None where there is
  none; and `mixing_gap`, the expected effective gradient ratio minus the observed one, by quarter of the run, None for
  a quarter without a step."""
  quarters = [steps[len(steps) * i // _QUARTERS:len(steps) * (i + 1) // _QUARTERS] for i in range(_QUARTERS)]
  gap = lambda part: float(np.mean([r['expected_gradient_ratio'] - r['effective_gradient_ratio'] for r in part]))
  return {
      **{name: _mean(steps, name) for name in SCORES},
      **{f'{name}_last_quarter': _mean(quarters[-1], name) for name in SCORES},
      'mixing_gap': [gap(part) if part else None for part in quarters],
  }


def reliability(steps: Sequence[dict[str, Any]]) -> np.ndarray:
  """reliability_B5 of several steps: the sum of theirs."""
  return np.sum([r['reliability'] for r in steps], axis=0)


def _mean(steps: Sequence[dict[str, Any]], name: str) -> float | None:
  pairs = [(r[name], sum(row[0] for row in r['reliability'])) for r in steps if r[name] is not None]
  return float(np.average([x for x, _ in pairs], weights=[n for _, n in pairs])) if pairs else None
