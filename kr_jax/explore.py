"""The rollouts of a step: which tasks get how many, sampled and verified wave by wave.

Dynamic sampling (Yu et al. 2025, arXiv 2503.14476, section 3.2) is here too: batches of other tasks take the place of
waves. Differs: a step has no more than so many of them, and rollouts that no update learns from are charged, observed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kr_jax import completions
from kr_jax import knobs
from kr_jax import phases
from kr_jax import processes
from kr_jax import rewards
from kr_jax import sample
from kr_jax import sharding
from kr_jax import types
from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.allocation import value
from kr_jax.prepare import Setup
from kr_jax.record import steps
from kr_jax.types import Array


class Explored(NamedTuple):
  """What came of a step's budgets."""

  tasks_M: Sequence[types.Task]  # those that were sampled, of all generation batches
  rollouts: types.Rollouts  # of all waves
  budget_M: np.ndarray  # of all waves
  scores: rewards.Scores
  slots: int  # rollouts that each shard decoded at once
  sample_s: float  # seconds that sampling took
  logp_sum: Array  # of the log-probabilities of all tokens
  learnt: steps.Learnt  # what the update learns from


class Sampled(NamedTuple):
  """A wave or a generation batch: rollouts of M tasks, and what came of them."""

  rollouts: types.Rollouts
  scores: rewards.Scores
  sample_s: float

  @property
  def group(self) -> value.Group:
    """How many rollouts of each task are right, wrong and unverified."""
    task_R, M = np.asarray(self.rollouts.task_R), len(self.rollouts.prompts.length_M)
    count = lambda which_R: np.bincount(task_R[which_R], minlength=M)[:M]
    is_right_R = self.scores.verdict_R > 0
    right_M, wrong_M = count(is_right_R), count(self.scores.verified_R & ~is_right_R)
    return value.Group(right_M, wrong_M, count(task_R < M) - right_M - wrong_M)


def chosen(c: knobs.Config, stats: types.TaskStats, considered: Sequence[types.Task]
            ) -> tuple[list[types.Task], np.ndarray]:
  """The tasks of a step, those of the tasks considered that get rollouts among them, and budgets of the first wave.

  With alloc.rule='dynamic' they are all tasks considered, each with the budget that it has if it is sampled.
  """
  budget_X = allocate.of_step(
      c.alloc, stats, np.array([task.index for task in considered]), completion_length=c.sample.completion_length,
      most_tasks=c.tasks.per_step, counts_evidence=c.grpo.uses_past)
  if c.alloc.rule == 'dynamic':  # the first tasks.per_step are the first generation batch, and all batches are alike
    return list(considered), np.tile(budget_X[:c.tasks.per_step], len(considered) // c.tasks.per_step)
  row_M = allocate.chosen(budget_X, c.tasks.per_step)
  return [considered[x] for x in row_M], budget_X[row_M]


def rollouts(setup: Setup, params: Any, pool: rewards.Workers, stats: types.TaskStats, tasks_M: Sequence[types.Task],
             prompts: types.Prompts, budget_M: np.ndarray, key: jax.Array, meanwhile: Callable[[], None],
             stopping: processes.StopSignal) -> Explored:
  """Samples and verifies a step's rollouts, wave by wave; each but the first has budgets by the verdicts so far.

  With alloc.rule='dynamic' a generation batch of tasks.per_step tasks takes the place of a wave, until as many groups
  are mixed or no task is left; the update learns from the first of these groups.

  Args:
    params: as of state.sampling_params; no other reference to them should be left, as an update may have no room.
    budget_M: as of `chosen`.
    key: of the step.
    meanwhile: called while the devices sample.

  Raises processes.Stopped where the run is to stop: nothing but the record of the step before has changed.
  """
  c, totals = setup.config, allocate.wave_rollouts(setup.config.alloc)
  expected_M = estimate.tokens(stats, prompts.index_M, default=0.0)

  def begin(prompts: types.Prompts) -> sample.Waves:
    with sharding.on(setup.sample_mesh):
      return sample.Waves(setup.policy, params, prompts, sharding.move(key), setup.sample, totals=totals)

  take = functools.partial(_sampled, setup, pool, meanwhile, stopping)
  with sharding.on(setup.sample_mesh):
    slots = sample.slots(setup.sample, totals[0])
  if c.alloc.rule == 'dynamic':
    M, batches, mixed = c.tasks.per_step, [], 0
    while mixed < M and len(batches) * M < len(tasks_M):
      of_batch = slice(len(batches) * M, (len(batches) + 1) * M)
      waves = begin(types.Prompts(*(x_M[of_batch] for x_M in prompts)))
      batches.append(take(waves, tasks_M[of_batch], prompts.index_M[of_batch], budget_M[of_batch], expected_M[of_batch],
                          f'generation batch {len(batches)}'))
      mixed += np.count_nonzero(_is_mixed(batches[-1]))
    return of_batches(batches, tasks_M, prompts, budget_M, slots)
  waves = begin(prompts)
  del params
  waves_W, sum_M, group = [], 0, value.Group(*np.zeros((3, len(tasks_M)), int))
  for wave in range(len(totals)):
    if wave:
      with phases.phase('allocate'):
        budget_M = allocate.of_step(
            c.alloc, stats, prompts.index_M, completion_length=c.sample.completion_length, wave=wave, group=group,
            counts_evidence=c.grpo.uses_past)
    waves_W.append(take(waves, tasks_M, prompts.index_M, budget_M, expected_M, f'wave {wave}'))
    sum_M = sum_M + budget_M
    group = value.Group(*(x_M + more_M for x_M, more_M in zip(group, waves_W[-1].group)))
  of_all, scores = _joined(waves_W, [np.asarray(of.rollouts.task_R) for of in waves_W], waves.rows)
  return Explored(tasks_M, of_all, sum_M, scores, slots, sum(of.sample_s for of in waves_W), jnp.sum(of_all.logp_RC),
                  steps.Learnt(tasks_M, sum_M, of_all, scores))


def _sampled(setup: Setup, pool: rewards.Workers, meanwhile: Callable[[], None], stopping: processes.StopSignal,
             waves: sample.Waves, tasks_M: Sequence[types.Task], index_M: np.ndarray, budget_M: np.ndarray,
             expected_M: np.ndarray, name: str) -> Sampled:
  """Samples and verifies the next wave. Raises processes.Stopped where the run is to stop."""
  processes.check_same(f'tasks and budgets of {name}', index_M, budget_M, expected_M)
  started = time.monotonic()
  with phases.phase('sample'):
    with sharding.on(setup.sample_mesh):
      drawn = waves.sample(budget_M, expected_M)
    phases.devices_work(True)
    with phases.phase('record'):
      meanwhile()
    stopping.wait(drawn.length_R)
    phases.devices_work(False)
  sample_s = time.monotonic() - started
  with phases.phase('detokenise'):
    sampled = completions.apply_stop_strings(sharding.move(drawn), setup.tokenizer.decode, setup.sample)
  scores = _scores(setup, pool, tasks_M, sampled, stopping)
  if phases.is_running():
    phases.count('sample', **waves.counters(drawn))
  return Sampled(sampled, scores, sample_s)


def _joined(parts: Sequence[Sampled], task_WR: Sequence[np.ndarray], rows: int | None
            ) -> tuple[types.Rollouts, rewards.Scores]:
  """The rollouts of waves or generation batches as those of the step, as completions.join has them."""
  by_row = lambda name: completions.join_rows([getattr(of.scores, name) for of in parts], task_WR, rows)
  examples = tuple(example for of in parts for example in of.scores.examples)
  return (completions.join([of.rollouts for of in parts], rows),
          rewards.Scores(by_row('outcome_R'), by_row('reward_R'), examples))


# Dynamic sampling.


def _is_mixed(batch: Sampled) -> np.ndarray:
  return (batch.group.right_M > 0) & (batch.group.wrong_M > 0)


def of_batches(batches: Sequence[Sampled], tasks_X: Sequence[types.Task], prompts: types.Prompts, budget_X: np.ndarray,
               slots: int) -> Explored:
  """The rollouts of a step's generation batches, and the first M mixed groups, which its update learns from.

  Shapes are the same however many batches were sampled, and whichever groups are mixed.

  Args:
    batches: the first ones, of M tasks each.
    tasks_X, prompts, budget_X: all tasks that the step might have sampled.
  """
  (first, outcomes, _), X = batches[0], len(tasks_X)
  M, rows = len(first.prompts.length_M), len(first.task_R)
  n, missing = len(batches) * M, X // M - len(batches)
  is_mixed_X = np.concatenate([_is_mixed(batch) for batch in batches])
  is_learnt_X = is_mixed_X & (np.cumsum(is_mixed_X) <= M)
  learnt_X = np.where(is_learnt_X, budget_X[:n], 0)
  x_M = allocate.chosen(learnt_X, M)  # where fewer are mixed, others stand there without a rollout
  m_X = np.full(X + 1, M)
  m_X[x_M] = np.where(is_learnt_X[x_M], np.arange(M), M)
  task_KR = [np.asarray(batch.rollouts.task_R) for batch in batches]
  task_KR = [np.where(task_R < M, task_R + k * M, X) for k, task_R in enumerate(task_KR)]
  # A batch that was not sampled has the tokens of the first, and no rollout.
  nothing = Sampled(first._replace(decode_steps=0, tail_steps=0, refills=0), outcomes._replace(examples=()), 0.0)
  batches_K, task_KR = [*batches, *[nothing] * missing], task_KR + [np.full(rows, X)] * missing
  take = lambda x: types.Prompts(*(x_X[x] for x_X in prompts))

  def joined(prompts, task_KR, rows):
    parts = [_of_tasks(batch, prompts, task_R) for batch, task_R in zip(batches_K, task_KR, strict=True)]
    rollouts, scores = _joined(parts, task_KR, rows)
    return rollouts._replace(prompts=prompts, wave_R=None), scores

  learnt = joined(take(x_M), [m_X[task_R] for task_R in task_KR], rows)
  of_all, scores = joined(prompts, task_KR, None)
  of_all = of_all._replace(prompts=take(slice(n)), task_R=np.minimum(np.asarray(of_all.task_R), n))
  row_L = np.flatnonzero(np.append(is_learnt_X, False)[of_all.task_R])
  return Explored(
      tasks_X[:n], of_all, budget_X[:n], scores, slots, sum(batch.sample_s for batch in batches),
      np.float32(sum(float(jnp.sum(batch.rollouts.logp_RC)) for batch in batches)),
      steps.Learnt([tasks_X[x] for x in x_M], learnt_X[x_M], *learnt, row_L))


def _of_tasks(batch: Sampled, prompts: types.Prompts, task_R: np.ndarray) -> Sampled:
  """A batch whose rollouts are those of other prompts, by task_R; those of none of them are no rollouts."""
  of, (outcome_R, reward_R, examples), _ = batch
  there = lambda x_R: np.where(task_R < len(prompts.length_M), x_R, 0)
  # Of numpy always, so that one program joins them.
  of = of._replace(
      prompts=prompts, task_R=task_R.astype(np.int32), length_R=there(of.length_R), ended_R=there(of.ended_R),
      **{name: np.int32(getattr(of, name)) for name in ('decode_steps', 'tail_steps', 'refills')})
  return batch._replace(rollouts=of, scores=rewards.Scores(there(outcome_R), there(reward_R), examples))


def _scores(setup: Setup, pool: rewards.Workers, tasks_M: Sequence[types.Task],
            rollouts: types.Rollouts, stopping: processes.StopSignal) -> rewards.Scores:
  """What came of a step's rollouts, of all processes, and their rewards; 0 where there is no rollout.

  The examples are of this process. Raises processes.Stopped where the run is to stop.
  """
  task_R, length_R = np.asarray(rollouts.task_R), np.asarray(rollouts.length_R)
  row_X, texts = completions.texts(rollouts, setup.tokenizer.decode)
  with phases.phase('verify'):
    scores = stopping.during(
        lambda: pool.score(texts, [tasks_M[m] for m in task_R[row_X]], length_R[row_X]))
  merge = lambda x_X: processes.merge_rows(row_X, x_X, len(task_R))
  return scores._replace(outcome_R=merge(scores.outcome_R), reward_R=merge(scores.reward_R))
