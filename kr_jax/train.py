"""The loop: tasks -> budgets -> rollouts -> rewards -> update -> statistics; the three in the middle in each wave.

Nothing is learnt from a rollout that is not verified (rewards/verdicts.py): the update and the statistics leave it out.
Figures of sampling count it. `train` runs the loop, keeps its record and its checkpoints, and goes on where the last
checkpoint stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import hashlib
import json
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from kr_jax import completions
from kr_jax import evaluate
from kr_jax import knobs
from kr_jax import processes
from kr_jax import rewards
from kr_jax import sample
from kr_jax import sharding
from kr_jax import state as state_lib
from kr_jax import tasks as tasks_lib
from kr_jax import types
from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.allocation import value
from kr_jax.learning import grpo
from kr_jax.learning import noise
from kr_jax.learning import update
from kr_jax.model import weights
from kr_jax.prepare import Setup
from kr_jax.record import checkpoint
from kr_jax.record import steps

# Knobs that a run may go on with changed: they say how long, how often and where, not what.
MAY_CHANGE = ('num_steps', 'topologies', 'checkpoint.every', 'checkpoint.keep', 'tasks.data_dir', 'tasks.files',
              'mesh', *(f'rewards.{name}' for name in (
                  'workers', 'timeout_s', 'memory_mb', 'max_faulty_steps', 'network', 'readable')),
              'evaluate.every', 'evaluate.pass_at', 'evaluate.maj_at')


def claim(setup: Setup, workdir: str) -> None:
  """Makes the workdir this run's. Raises ValueError if it cannot be written or is another run's, or a new run
  would begin with a checkpoint that cannot be read, and RuntimeError where the processes of a run have other configs
  or data."""
  source = setup.config.policy.checkpoint
  if source and checkpoint.recorded(workdir, 'seed') is None:
    weights.check(source, setup.policy)
  config = knobs.as_dict(setup.config)
  # Statistics are kept by row: the rows must be the tasks that they were.
  ids = hashlib.sha256('\n'.join(task.id for task in setup.train_tasks).encode()).hexdigest()
  processes.check_same('config and training tasks', f'{json.dumps(config)}{ids}'.encode())
  error = None
  if processes.is_first():
    try:
      checkpoint.claim(workdir, config | {'train_ids': ids}, may_change=MAY_CHANGE)
    except ValueError as found:
      error = found
  if processes.any_of(error is not None):
    raise error or ValueError(f'--workdir={workdir} was refused; see the message of process 0')


def train(setup: Setup, workdir: str) -> None:
  """Trains to config.num_steps in `workdir`, from where its last checkpoint stands.

  Writes metrics.jsonl, TensorBoard events, checkpoints/ and warm_start/.

  Raises:
    ValueError: the workdir cannot be written or holds a run of another config.
    FloatingPointError: the loss or the gradient is not finite.
    SystemExit: SIGTERM or SIGINT came; all is saved.
  """
  c = setup.config
  claim(setup, workdir)
  with contextlib.ExitStack() as context:
    stopping = context.enter_context(processes.StopSignal())
    pool = context.enter_context(state_lib.workers(setup))
    checkpoints = context.enter_context(checkpoint.Checkpoints(
        state_lib.checkpoint_directory(setup, workdir), keep=c.checkpoint.keep))
    state, stats, base = state_lib.start(setup, workdir, checkpoints, stopping)
    first_step = int(state.step)
    record = context.enter_context(steps.Record(c, workdir, first_step, setup.tokenizer.decode))
    rollout_key, noise_key, keep_key = (jax.random.fold_in(state.key, stream) for stream in (
        state_lib.ROLLOUTS, state_lib.NOISE, state_lib.KEEP))

    def evaluated(step):
      if not processes.any_of(record.has_evaluation(step)):
        params = state_lib.sampling_params(setup, state, base)
        record.evaluation(step, evaluate.record(state_lib.evaluation(setup, params, state.key, pool)))

    context.enter_context(sharding.on(setup.learn_mesh))
    for step in range(first_step, c.num_steps):
      if step == 0 or c.evaluate.every and step % c.evaluate.every == 0:
        evaluated(step)
      considered = tasks_lib.batch(setup.train_tasks, step, per_step=tasks_lib.considered(c.tasks), seed=c.seed,
                                   weights=setup.shares)
      tasks_M, budget_M = _chosen(c, stats, considered)
      prompts = tasks_lib.prompts(tasks_M, c.sample.prompt_length)
      found = _explore(setup, state_lib.sampling_params(setup, state, base), pool, stats, tasks_M, prompts, budget_M,
                       jax.random.fold_in(rollout_key, step), record.flush)
      rollouts, scores = found.rollouts, found.scores
      verified, is_any_verified = completions.keep(rollouts, scores.verified_R), scores.verified_R.any()
      measures_noise = is_any_verified and c.alloc.nu_every and step % c.alloc.nu_every == 0
      if measures_noise:
        measured_noise = noise.gradient_noise(
            state.params, base, verified, scores.verdict_R, jax.random.fold_in(noise_key, step),
            setup.trained, setup.update)
      past = grpo.Past(*(np.float32(x_M) for x_M in estimate.reward(
          stats, estimate.posterior(stats, prompts.index_M))))
      state, measured = update.step(state, verified, scores.reward_R, base, setup.trained, setup.update, past=past,
                                    key=jax.random.fold_in(keep_key, step))
      record.step(step, stats, tasks_M, found.budget_M, rollouts, found.slots, found.sample_s, scores, measured,
                  uniform_index_M=np.array([task.index for task in considered[:c.tasks.per_step]]))
      if is_any_verified:  # without one the policy stays what it is, and so does what is known of it
        stats = estimate.observe(
            stats, prompts.index_M, verified.task_R, scores.verdict_R, verified.length_R,
            discount=c.alloc.pass_discount, reward_R=scores.reward_R)
      if measures_noise:
        stats = estimate.observe_gradient(stats, measured_noise, steps=c.alloc.nu_every)
      done, stop = step + 1, processes.any_of(stopping())
      if stop or done == c.num_steps or done % c.checkpoint.every == 0:
        record.flush()  # which stops at a loss that is not finite, before it is saved
        checkpoints.save(done, state, stats)
      if stop:
        raise SystemExit(f'stopped after {done} of {c.num_steps} steps; '
                         'run the same command again to go on')
    evaluated(c.num_steps)


class _Explored(NamedTuple):
  """What came of a step's budgets."""

  rollouts: types.Rollouts  # of all waves
  budget_M: np.ndarray  # of all waves
  scores: rewards.Scores
  slots: int  # rollouts that each shard decoded at once
  sample_s: float  # seconds that sampling took


def _chosen(c: knobs.Config, stats: types.TaskStats, considered: Sequence[types.Task]
            ) -> tuple[list[types.Task], np.ndarray]:
  """The tasks of a step, those of the tasks considered that get rollouts among them, and budgets of the first wave."""
  budget_X = allocate.of_step(
      c.alloc, stats, np.array([task.index for task in considered]), completion_length=c.sample.completion_length,
      most_tasks=c.tasks.per_step, counts_evidence=c.grpo.uses_past)
  row_M = allocate.chosen(budget_X, c.tasks.per_step)
  return [considered[x] for x in row_M], budget_X[row_M]


def _explore(setup: Setup, params: Any, pool: rewards.Workers, stats: types.TaskStats, tasks_M: Sequence[types.Task],
             prompts: types.Prompts, budget_M: np.ndarray, key: jax.Array, meanwhile: Callable[[], None]) -> _Explored:
  """Samples and verifies a step's rollouts, wave by wave; each but the first has budgets by the verdicts so far.

  Args:
    params: as of state.sampling_params; no other reference to them should be left, as an update may have no room.
    budget_M: of the first wave.
    key: of the step.
    meanwhile: called while the devices sample.
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
      budget_M = allocate.of_step(
          c.alloc, stats, prompts.index_M, completion_length=c.sample.completion_length, wave=wave, group=group,
          counts_evidence=c.grpo.uses_past)
    processes.check_same(f'tasks and budgets of wave {wave}', prompts.index_M, budget_M, expected_M)
    started = time.monotonic()
    with sharding.on(setup.sample_mesh):
      rollouts = waves.sample(budget_M, expected_M)
    meanwhile()
    jax.block_until_ready(rollouts.length_R)
    sample_s += time.monotonic() - started
    rollouts = completions.apply_stop_strings(sharding.move(rollouts), setup.tokenizer.decode, setup.sample)
    scores = _scores(setup, pool, tasks_M, rollouts)
    task_R = np.asarray(rollouts.task_R)
    count = lambda which_R: np.bincount(task_R[which_R], minlength=len(tasks_M))
    is_right_R = scores.verdict_R > 0
    sum_M = sum_M + budget_M
    right_M, wrong_M = group.right_M + count(is_right_R), group.wrong_M + count(scores.verified_R & ~is_right_R)
    group = value.Group(right_M, wrong_M, sum_M - right_M - wrong_M)
    rollouts_W.append(rollouts)
    scores_W.append(scores)
  task_WR = [np.asarray(rollouts.task_R) for rollouts in rollouts_W]
  joined = lambda x_WR: completions.join_rows(x_WR, task_WR, waves.rows)
  return _Explored(
      completions.join(rollouts_W, waves.rows), sum_M,
      rewards.Scores(
          joined([scores.outcome_R for scores in scores_W]), joined([scores.reward_R for scores in scores_W]),
          tuple(example for scores in scores_W for example in scores.examples)),
      slots, sample_s)


def _scores(setup: Setup, pool: rewards.Workers, tasks_M: Sequence[types.Task],
            rollouts: types.Rollouts) -> rewards.Scores:
  """What came of a step's rollouts, of all processes, and their rewards; 0 where there is no rollout.

  The examples are of this process.
  """
  task_R, length_R = np.asarray(rollouts.task_R), np.asarray(rollouts.length_R)
  row_X, texts = completions.texts(rollouts, setup.tokenizer.decode)
  scores = pool.score(texts, [tasks_M[m] for m in task_R[row_X]], length_R[row_X])
  merge = lambda x_X: processes.merge_rows(row_X, x_X, len(task_R))
  return scores._replace(outcome_R=merge(scores.outcome_R), reward_R=merge(scores.reward_R))
