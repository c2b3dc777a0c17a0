"""The loop: tasks -> budgets -> rollouts -> rewards -> update -> statistics.

Nothing is learnt from a rollout that is not verified (rewards/verdicts.py): the update and the statistics leave it out.
Figures of sampling count it. `train` runs the loop, keeps its record and its checkpoints, and goes on where the last
checkpoint stands.
"""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import hashlib
import json
import time

import jax
import numpy as np

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
    rollout_key, noise_key = (
        jax.random.fold_in(state.key, stream) for stream in (state_lib.ROLLOUTS, state_lib.NOISE))

    def evaluated(step):
      if not processes.any_of(record.has_evaluation(step)):
        params = state_lib.sampling_params(setup, state, base)
        record.evaluation(step, evaluate.record(state_lib.evaluation(setup, params, state.key, pool)))

    context.enter_context(sharding.on(setup.learn_mesh))
    for step in range(first_step, c.num_steps):
      if step == 0 or c.evaluate.every and step % c.evaluate.every == 0:
        evaluated(step)
      tasks_M = tasks_lib.batch(setup.train_tasks, step, per_step=c.tasks.per_step, seed=c.seed, weights=setup.shares)
      prompts = tasks_lib.prompts(tasks_M, c.sample.prompt_length)
      budget_M = allocate.of_step(c.alloc, stats, prompts.index_M, completion_length=c.sample.completion_length)
      expected_M = estimate.tokens(stats, prompts.index_M, default=0.0)
      processes.check_same(f'tasks and budgets of step {step}', prompts.index_M, budget_M, expected_M)
      started, params = time.monotonic(), state_lib.sampling_params(setup, state, base)
      key = jax.random.fold_in(rollout_key, step)
      with sharding.on(setup.sample_mesh):
        rollouts = sample.rollouts(
            setup.policy, params, prompts, budget_M, sharding.move(key), setup.sample,
            total=c.alloc.rollouts_per_step, expected_M=expected_M)
        slots = sample.slots(setup.sample, len(rollouts.task_R))
      record.flush()  # the last step's, while the device samples this one's
      jax.block_until_ready(rollouts.length_R)
      sample_s = time.monotonic() - started
      del params  # a copy of the policy, for which an update may have no room
      rollouts = sample.apply_stop_strings(sharding.move(rollouts), setup.tokenizer.decode, setup.sample)
      scores = _scores(setup, pool, tasks_M, rollouts)
      verified, is_any_verified = sample.keep(rollouts, scores.verified_R), scores.verified_R.any()
      measures_noise = is_any_verified and c.alloc.nu_every and step % c.alloc.nu_every == 0
      if measures_noise:
        measured_noise = noise.gradient_noise(
            state.params, base, verified, scores.verdict_R, jax.random.fold_in(noise_key, step),
            setup.trained, setup.update)
      state, measured = update.step(state, verified, scores.reward_R, base, setup.trained, setup.update)
      record.step(step, stats, tasks_M, budget_M, rollouts, slots, sample_s, scores, measured)
      if is_any_verified:  # without one the policy stays what it is, and so does what is known of it
        stats = estimate.observe(stats, prompts.index_M, verified.task_R, scores.verdict_R,
                                 verified.length_R, discount=c.alloc.discount)
      if measures_noise:
        stats = estimate.observe_gradient(stats, measured_noise, discount=c.alloc.discount ** c.alloc.nu_every)
      done, stop = step + 1, processes.any_of(stopping())
      if stop or done == c.num_steps or done % c.checkpoint.every == 0:
        record.flush()  # which stops at a loss that is not finite, before it is saved
        checkpoints.save(done, state, stats)
      if stop:
        raise SystemExit(f'stopped after {done} of {c.num_steps} steps; '
                         'run the same command again to go on')
    evaluated(c.num_steps)


def _scores(setup: Setup, pool: rewards.Workers, tasks_M: Sequence[types.Task],
            rollouts: types.Rollouts) -> rewards.Scores:
  """What came of a step's rollouts, of all processes, and their rewards; 0 where there is no rollout.

  The examples are of this process.
  """
  task_R, length_R = np.asarray(rollouts.task_R), np.asarray(rollouts.length_R)
  row_X, texts = sample.texts(rollouts, setup.tokenizer.decode)
  scores = pool.score(texts, [tasks_M[m] for m in task_R[row_X]], length_R[row_X])
  merge = lambda x_X: processes.merge_rows(row_X, x_X, len(task_R))
  return scores._replace(outcome_R=merge(scores.outcome_R), reward_R=merge(scores.reward_R))
