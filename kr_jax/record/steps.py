"""What a step leaves in the record: a line of metrics, written one step late.

A step's figures are fetched while the device samples the next one, so that the device never waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from kr_jax import health
from kr_jax import knobs
from kr_jax import processes
from kr_jax import rewards
from kr_jax import types
from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.learning import grpo
from kr_jax.learning import update
from kr_jax.record import metrics
from kr_jax.rewards import verdicts

_BINS = 10  # of estimated success rates, in which budgets are averaged


def measure(alloc: knobs.Alloc, stats: types.TaskStats, budget_M: np.ndarray, rollouts: types.Rollouts,
            slots: int, sample_s: float, scores: rewards.Scores) -> dict[str, Any]:
  """The figures of a step but for those of its update and the counts of its verdicts.

  Rewards and success are of verified rollouts, None where there is none; `effective_gradient_ratio` is the share of
  all rollouts that are verified and in a group of both verdicts. What is expected is so under the posterior, whatever
  the estimate that the budgets came from, so that rules can be compared.

  Args:
    stats: from before the step.
    slots: rollouts that each shard decoded at once.
    sample_s: seconds that sampling took.
  """
  n, tokens = int(budget_M.sum()), int(np.asarray(rollouts.length_R).sum())
  verified_R = scores.verified_R
  task_R = np.where(verified_R, rollouts.task_R, len(budget_M))
  success_rate_M = estimate.posterior(stats, rollouts.prompts.index_M)
  nu = estimate.nu(stats, default=alloc.nu)
  uniform_M = allocate.budgets(success_rate_M, n, low=1, high=n, rule='uniform')
  objective = lambda budget_M: allocate.objective(success_rate_M, budget_M, alloc.value, nu)
  mixed_M = grpo.mixed_tasks(scores.verdict_R, task_R, len(budget_M))
  mean = lambda x_R: float(x_R[verified_R].mean(dtype=float)) if verified_R.any() else None
  bin_M = np.minimum((estimate.mean_rate(success_rate_M) * _BINS).astype(int), _BINS - 1)
  return {
      'reward_mean': mean(scores.reward_R),
      'success_rate': mean(scores.verdict_R),
      'effective_gradient_ratio': float(np.append(mixed_M, False)[task_R].sum() / n),
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
      **health.totals(scores.outcome_R),
      'budget_by_success_rate': [
          float(budget_M[bin_M == i].mean()) if np.any(bin_M == i) else None for i in range(_BINS)],
  }


class Record:
  """The run's metrics.jsonl, TensorBoard events and progress bar.

  Args:
    first_step: the step that the run goes on from; what the record holds beyond it is dropped.
    decode: tokens -> text, of completions that messages show.
  """

  def __init__(self, config: knobs.Config, workdir: str, first_step: int, decode: Callable[[np.ndarray], str]):
    self._config, self._decode = config, decode
    self._last = None  # step, figures, and those of the update, still on the device
    self._shown = {}  # on the bar, beside a step's figures
    # An evaluation of step k was taken before that step.
    is_evaluation = lambda record: 'reward_mean' not in record
    self._writer = metrics.Writer(
        workdir, first_step=first_step, keep=lambda record: record['step'] < first_step or (
            record['step'] == first_step and is_evaluation(record)))
    self._bar = processes.progress(config.alloc.rule, first_step, config.num_steps)
    self._compiles = metrics.CompileCount()
    self._health = health.Watch(
        (record['step'], record['verification']) for record in self._writer.records if 'verification' in record)
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
    self._shown['eval'] = _number(mean, '.3f')
    unverified = f'; {share:.1%} of rollouts unverified' if (share := measured['eval/unverified']) else ''
    self._say(f'step {step}: {name} of held-out tasks {_number(mean, ".3f")} ± {_number(stderr, ".3f")}{unverified}')

  def step(self, step: int, stats: types.TaskStats, tasks_M: Sequence[types.Task], budget_M: np.ndarray,
           rollouts: types.Rollouts, slots: int, sample_s: float, scores: rewards.Scores,
           measured: list[dict[str, Any]]) -> None:
    """Notes a step, for `flush` to write; says what is wrong with its verdicts.

    Args:
      rollouts: all, verified or not.
      measured: as of update.step.
      The others: as of `measure`.
    """
    figures = measure(self._config.alloc, stats, budget_M, rollouts, slots, sample_s, scores)
    task_R, length_R = np.asarray(rollouts.task_R), np.asarray(rollouts.length_R)
    name_M = health.names(tasks_M, self._config.rewards.verifier)

    def wrong_example(name: str) -> str:
      row_X, token_XC = processes.own_rows(rollouts.token_RC)
      for r, token_C in zip(row_X[::-1], token_XC[::-1]):
        if scores.outcome_R[r] == verdicts.WRONG and name_M[task_R[r]] == name:
          completion = self._decode(token_C[:length_R[r]])
          return health.wrong_example(completion, tasks_M[task_R[r]].answer)
      return ''

    found = health.counts(scores.outcome_R, rollouts.ended_R, task_R, name_M)
    alarms = self._health.step(step, found, scores.examples, wrong_example)
    for text in alarms:
      self._say(text)
    self._last = step, figures | {'verification': found, 'alarms': alarms}, measured

  def _say(self, text: str) -> None:
    """Writes a line above the bar, in the first process."""
    if not self._bar.disable:
      self._bar.write(text)

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
    unverified = {'unverified': f'{figures["unverified"]:.0%}'} if figures['unverified'] else {}
    self._bar.set_postfix(
        reward=_number(figures['reward_mean'], '.2f'), **unverified,
        gradient=f'{figures["effective_gradient_ratio"]:.2f}'
                 f' (uniform {figures["uniform_gradient_ratio"]:.2f})',
        budgets=f'{figures["budget_min"]}-{figures["budget_max"]}', **self._shown, refresh=False)
    self._bar.update()

  def _wall_s(self) -> float:
    return round(time.monotonic() - self._start, 3)


def _number(x: float | None, form: str) -> str:
  return 'unknown' if x is None else format(x, form)
