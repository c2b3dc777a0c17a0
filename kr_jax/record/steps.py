"""What a step leaves in the record: a line of metrics, written one step late.

A step's figures are fetched while the device samples the next one, so that the device never waits for them.
"""

from __future__ import annotations

import math
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from kr_jax import knobs
from kr_jax import processes
from kr_jax import rewards
from kr_jax import types
from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.learning import grpo
from kr_jax.learning import update
from kr_jax.record import metrics

_BINS = 10  # of estimated success rates, in which budgets are averaged


def measure(alloc: knobs.Alloc, stats: types.TaskStats, budget_M: np.ndarray, rollouts: types.Rollouts,
            slots: int, sample_s: float, scores: rewards.Scores) -> dict[str, Any]:
  """The figures of a step but for those of its update.

  What is expected is so under the posterior, whatever the estimate that the budgets came from, so that rules
  can be compared.

  Args:
    stats: from before the step.
    slots: rollouts that each shard decoded at once.
    sample_s: seconds that sampling took.
  """
  n, tokens = int(budget_M.sum()), int(np.asarray(rollouts.length_R).sum())
  success_rate_M = estimate.posterior(stats, rollouts.prompts.index_M)
  nu = estimate.nu(stats, default=alloc.nu)
  uniform_M = allocate.budgets(success_rate_M, n, low=1, high=n, rule='uniform')
  objective = lambda budget_M: allocate.objective(success_rate_M, budget_M, alloc.value, nu)
  mixed_M = grpo.mixed_tasks(scores.verdict_R, rollouts.task_R, len(budget_M))
  bin_M = np.minimum((estimate.mean_rate(success_rate_M) * _BINS).astype(int), _BINS - 1)
  return {
      'reward_mean': float(scores.reward_R.sum() / n),
      'success_rate': float(scores.verdict_R.sum() / n),
      'effective_gradient_ratio': float(budget_M @ mixed_M / n),
      'expected_gradient_ratio': allocate.expected_gradient_ratio(success_rate_M, budget_M),
      'uniform_gradient_ratio': allocate.expected_gradient_ratio(success_rate_M, uniform_M),
      'mixed_tasks': int(mixed_M.sum()),
      'objective': objective(budget_M),
      'uniform_objective': objective(uniform_M),
      'nu': nu,
      'budget_min': int(budget_M.min()),
      'budget_max': int(budget_M.max()),
      'rollouts_total': n,
      'tokens_generated': tokens,
      'truncated': float(np.sum(np.asarray(rollouts.ended_R) == types.ENDED_LENGTH) / n),
      'slot_utilization': tokens / (int(rollouts.decode_steps) * slots),
      'tail_share': int(rollouts.tail_steps) / int(rollouts.decode_steps),
      'refills': int(rollouts.refills),
      'tokens_per_s': tokens / sample_s,  # of the sampler
      'tokens_prefilled': int(np.asarray(rollouts.prompts.length_M)[budget_M > 0].sum()),
      # The sampled tokens' mean -log p: an unbiased estimate, over all rollouts.
      'entropy': -float(jnp.sum(rollouts.logp_RC)) / tokens,
      'verifier_timeouts': scores.timeouts,
      'verifier_errors': scores.errors,
      'budget_by_success_rate': [
          float(budget_M[bin_M == i].mean()) if np.any(bin_M == i) else None for i in range(_BINS)],
  }


class Record:
  """The run's metrics.jsonl, TensorBoard events and progress bar.

  Args:
    first_step: the step that the run goes on from; what the record holds beyond it is dropped.
  """

  def __init__(self, config: knobs.Config, workdir: str, first_step: int):
    self._config = config
    self._last = None  # step, figures, and those of the update, still on the device
    self._shown = {}  # on the bar, beside a step's figures
    # An evaluation of step k was taken before that step.
    is_evaluation = lambda record: 'reward_mean' not in record
    self._writer = metrics.Writer(
        workdir, first_step=first_step, keep=lambda record: record['step'] < first_step or (
            record['step'] == first_step and is_evaluation(record)))
    self._bar = processes.progress(config.alloc.rule, first_step, config.num_steps)
    self._compiles = metrics.CompileCount()
    # wall_s counts seconds from here, and leaves out the time in which a run was stopped.
    before = [record['wall_s'] for record in self._writer.records]
    self._start = time.monotonic() - max(before, default=0.0)

  def __enter__(self) -> Record:
    return self

  def __exit__(self, *_) -> None:
    self._compiles.close()
    self._bar.close()
    self._writer.close()

  def has_evaluation(self, step: int) -> bool:
    name = f'eval/avg@{self._config.evaluate.rollouts}'
    return any(record['step'] == step and name in record for record in self._writer.records)

  def evaluation(self, step: int, measured: dict[str, float]) -> None:
    """Writes an evaluation that was taken before a step. measured: as of evaluate.record."""
    self.flush()
    self._writer.write({'step': step, 'wall_s': self._wall_s(), **measured})
    name = f'avg@{self._config.evaluate.rollouts}'
    mean, stderr = measured[f'eval/{name}'], measured[f'eval/{name}_stderr']
    self._shown['eval'] = f'{mean:.3f}'
    if not self._bar.disable:
      self._bar.write(f'step {step}: {name} of held-out tasks {mean:.3f} ± {stderr:.3f}')

  def step(self, step: int, stats: types.TaskStats, budget_M: np.ndarray, rollouts: types.Rollouts,
           slots: int, sample_s: float, scores: rewards.Scores, measured: list[dict[str, Any]]) -> None:
    """Notes a step, for `flush` to write. measured: as of update.step; the others as of `measure`."""
    figures = measure(self._config.alloc, stats, budget_M, rollouts, slots, sample_s, scores)
    self._last = step, figures, measured

  def flush(self) -> None:
    """Writes the last step's record. Raises FloatingPointError if its update was not finite."""
    if self._last is None:
      return
    step, figures, measured = self._last
    self._last = None
    of_update = update.summarize(measured)
    for name in ('loss', 'grad_norm'):
      if not math.isfinite(of_update[name]):
        raise FloatingPointError(
            f'{name} is {of_update[name]} at step {step}; the last checkpoint is from before. '
            'Lower optimizer.learning_rate or optimizer.max_grad_norm, in another --workdir')
    self._writer.write({'step': step, 'wall_s': self._wall_s(), **figures, **of_update,
                        'compile_count': self._compiles.count})
    self._bar.set_postfix(
        reward=f'{figures["reward_mean"]:.2f}',
        gradient=f'{figures["effective_gradient_ratio"]:.2f}'
                 f' (uniform {figures["uniform_gradient_ratio"]:.2f})',
        budgets=f'{figures["budget_min"]}-{figures["budget_max"]}', **self._shown, refresh=False)
    self._bar.update()

  def _wall_s(self) -> float:
    return round(time.monotonic() - self._start, 3)
