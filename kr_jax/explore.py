"""The rollouts of a step: which tasks get how many, sampled and verified wave by wave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Explored(NamedTuple):
  """What came of a step's budgets."""

  rollouts: types.Rollouts  # of all waves
  budget_M: np.ndarray  # of all waves
  scores: rewards.Scores
  slots: int  # rollouts that each shard decoded at once
  sample_s: float  # seconds that sampling took
  logp_sum: jax.Array  # of the log-probabilities of all tokens


def chosen(c: knobs.Config, stats: types.TaskStats, considered: Sequence[types.Task]
            ) -> tuple[list[types.Task], np.ndarray]:
  """The tasks of a step, those of the tasks considered that get rollouts among them, and budgets of the first wave."""
  budget_X = allocate.of_step(
      c.alloc, stats, np.array([task.index for task in considered]), completion_length=c.sample.completion_length,
      most_tasks=c.tasks.per_step, counts_evidence=c.grpo.uses_past)
  row_M = allocate.chosen(budget_X, c.tasks.per_step)
  return [considered[x] for x in row_M], budget_X[row_M]


def rollouts(setup: Setup, params: Any, pool: rewards.Workers, stats: types.TaskStats, tasks_M: Sequence[types.Task],
             prompts: types.Prompts, budget_M: np.ndarray, key: jax.Array, meanwhile: Callable[[], None],
             stopping: processes.StopSignal) -> Explored:
  """Samples and verifies a step's rollouts, wave by wave; each but the first has budgets by the verdicts so far.

  Args:
    params: as of state.sampling_params; no other reference to them should be left, as an update may have no room.
    budget_M: of the first wave.
    key: of the step.
    meanwhile: called while the devices sample.

  Raises processes.Stopped where the run is to stop: nothing but the record of the step before has changed.
  """
  c, totals = setup.config, allocate.wave_rollouts(setup.config.alloc)
  expected_M = estimate.tokens(stats, prompts.index_M, default=0.0)
  group = value.Group(*np.zeros((3, len(tasks_M)), int))
  with sharding.on(setup.sample_mesh):
    slots = sample.slots(setup.sample, totals[0])
    waves = sample.Waves(setup.policy, params, prompts, sharding.move(key), setup.sample, totals=totals)
  del params
  rollouts_W, scores_W, sum_M, sample_s = [], [], 0, 0.0
  for wave in range(len(totals)):
    if wave:
      with phases.phase('allocate'):
        budget_M = allocate.of_step(
            c.alloc, stats, prompts.index_M, completion_length=c.sample.completion_length, wave=wave, group=group,
            counts_evidence=c.grpo.uses_past)
    processes.check_same(f'tasks and budgets of wave {wave}', prompts.index_M, budget_M, expected_M)
    started = time.monotonic()
    with phases.phase('sample'):
      with sharding.on(setup.sample_mesh):
        drawn = waves.sample(budget_M, expected_M)
      phases.devices_work(True)
      with phases.phase('record'):
        meanwhile()
      stopping.wait(drawn.length_R)
      phases.devices_work(False)
    sample_s += time.monotonic() - started
    with phases.phase('detokenise'):
      sampled = completions.apply_stop_strings(sharding.move(drawn), setup.tokenizer.decode, setup.sample)
    scores = _scores(setup, pool, tasks_M, sampled, stopping)
    if phases.is_running():
      phases.count('sample', **waves.counters(drawn))
    task_R = np.asarray(sampled.task_R)
    count = lambda which_R: np.bincount(task_R[which_R], minlength=len(tasks_M))
    is_right_R = scores.verdict_R > 0
    sum_M = sum_M + budget_M
    right_M, wrong_M = group.right_M + count(is_right_R), group.wrong_M + count(scores.verified_R & ~is_right_R)
    group = value.Group(right_M, wrong_M, sum_M - right_M - wrong_M)
    rollouts_W.append(sampled)
    scores_W.append(scores)
  task_WR = [np.asarray(sampled.task_R) for sampled in rollouts_W]
  joined = lambda x_WR: completions.join_rows(x_WR, task_WR, waves.rows)
  of_all = completions.join(rollouts_W, waves.rows)
  return Explored(
      of_all, sum_M,
      rewards.Scores(
          joined([scores.outcome_R for scores in scores_W]), joined([scores.reward_R for scores in scores_W]),
          tuple(example for scores in scores_W for example in scores.examples)),
      slots, sample_s, jnp.sum(of_all.logp_RC))


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
