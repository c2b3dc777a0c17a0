"""The loop: tasks -> budgets -> rollouts -> rewards -> update -> statistics; the three in the middle in each wave.

Nothing is learnt from a rollout that is not verified (rewards/verdicts.py): the update and the statistics leave it out.
Figures of sampling count it. `train` runs the loop, keeps its record and its checkpoints, and goes on where the last
checkpoint stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
from typing import Any

import jax
import numpy as np

from kr_jax import attempt
from kr_jax import compiled
from kr_jax import completions
from kr_jax import evaluate
from kr_jax import explore
from kr_jax import files
from kr_jax import knobs
from kr_jax import mirror
from kr_jax import phases
from kr_jax import processes
from kr_jax import rewards
from kr_jax import sharding
from kr_jax import state as state_lib
from kr_jax import tasks as tasks_lib
from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.costs import hardware as hardware_lib
from kr_jax.learning import grpo
from kr_jax.learning import noise
from kr_jax.learning import update
from kr_jax.prepare import Setup
from kr_jax.record import checkpoint
from kr_jax.record import steps
from kr_jax.report import refresh

def train(setup: Setup, workdir: str, hardware: hardware_lib.Hardware | None = None, *,
          profile: tuple[int, int] | None = None, on_step: Callable[[dict[str, Any]], None] | None = None
          ) -> None:
  """Trains to config.num_steps in `workdir`, from where its last checkpoint stands.

  Writes what kr_jax/record/README.md says.

  Args:
    hardware: that the run is priced by; None: by none.
    profile: the first and the last step that are traced; None: none is.
    on_step: called with each line of metrics.jsonl as it is written.

  Raises:
    ValueError: the workdir cannot be written or holds a run of another config, or prompts cannot be perturbed.
    FloatingPointError: the loss or the gradient is not finite.
    SystemExit: SIGTERM or SIGINT came; all is saved.
  """
  c, perturbed = setup.config, state_lib.perturbed_tasks(setup)
  attempt.claim(setup, workdir)
  with contextlib.ExitStack() as context:
    workdir = context.enter_context(mirror.opened(workdir, create=True)).path
    clock = context.enter_context(phases.running())
    stopping = context.enter_context(processes.StopSignal())
    checkpoints = checkpoint.Checkpoints(state_lib.checkpoint_directory(setup, workdir), keep=c.checkpoint.keep)
    # What the end of the others takes is in the ledger, which therefore ends last.
    ledger = context.enter_context(attempt.begin(setup, workdir, hardware, clock, checkpoints.latest() or 0))
    context.enter_context(checkpoints)
    pool = context.enter_context(state_lib.workers(setup))
    with phases.phase('restore'):
      state, stats, base = state_lib.start(setup, workdir, checkpoints, stopping)
    first_step = int(state.step)
    record = context.enter_context(steps.Record(
        c, workdir, first_step, setup.tokenizer.decode, update.learning_rate(setup.update), pool.answers,
        clock.began, on_step))
    page = refresh.Refresher(workdir, c.record.page)
    trace = context.enter_context(compiled.Profile(files.join(mirror.url(workdir), 'profile'), profile, first_step))
    keys = {stream: jax.random.fold_in(state.key, stream) for stream in (
        state_lib.ROLLOUTS, state_lib.NOISE, state_lib.KEEP)}

    def evaluated(step, perturbed={}):
      stopping.doing = f'the evaluation before step {step}' if step < c.num_steps else 'the last evaluation'
      is_whole = _evaluated(setup, step, state, base, pool, record, stopping, perturbed)
      stops = lambda: step < c.num_steps and processes.any_of(stopping())
      if is_whole and step and not stops():
        ledger.flush()
        page.refresh()
      if not is_whole or stops():
        _save(c, step, state, stats, checkpoints, record, stops=True)

    context.enter_context(sharding.on(setup.learn_mesh))
    for step in range(first_step, c.num_steps):
      if step == 0 or c.evaluate.every and step % c.evaluate.every == 0:
        evaluated(step)
      record.begin(step)
      trace.begin(step)
      stopping.doing = f'step {step}'
      with phases.phase('allocate'):
        considered = tasks_lib.batch(setup.train_tasks, step, per_step=tasks_lib.considered(c.tasks), seed=c.seed,
                                     weights=setup.shares)
        tasks_M, budget_M = explore.chosen(c, stats, considered)
        prompts = tasks_lib.prompts(tasks_M, c.sample.prompt_length)
      found = explore.rollouts(
          setup, state_lib.sampling_params(setup, state, base), pool, stats, tasks_M, prompts, budget_M,
          jax.random.fold_in(keys[state_lib.ROLLOUTS], step), record.flush)
      before = stats
      state, stats, measured = _learn(setup, state, stats, base, prompts, found, keys, step)
      with phases.phase('record'):
        record.step(step, before, tasks_M, found.budget_M, found.rollouts, found.slots, found.sample_s, found.scores,
                    measured, uniform_index_M=np.array([task.index for task in considered[:c.tasks.per_step]]),
                    logp_sum=found.logp_sum)
      with phases.phase('update'):
        jax.block_until_ready(measured)
      phases.devices_work(False)
      trace.end(step)
      done, stops = step + 1, processes.any_of(stopping())
      if stops or done == c.num_steps or done % c.checkpoint.every == 0:
        _save(c, done, state, stats, checkpoints, record, stops=stops)
      record.costs(step, ledger.step(step), ledger.about, hardware)
    evaluated(c.num_steps, perturbed)
    with phases.phase('checkpoint'):
      checkpoints.wait()
    ledger.step(c.num_steps, next_step=c.num_steps)
    ledger.flush()
    page.refresh(last=True)


def _evaluated(setup: Setup, step: int, state: types.TrainState, base: Any, pool: rewards.Workers,
               record: steps.Record, stopping: Callable[[], bool], perturbed: Mapping[str, Sequence[types.Task]]
               ) -> bool:
  """Evaluates before a step, where the record has no evaluation of it. Returns False if it was stopped.

  perturbed: as of state.evaluation.
  """
  if processes.any_of(record.has_evaluation(step)):
    return True
  try:
    with phases.phase('evaluate', whole=True), record.evaluating() as progress:
      found = state_lib.evaluation(
          setup, state_lib.sampling_params(setup, state, base), state.key, pool, perturbed=perturbed, stopping=stopping,
          progress=progress)
  except evaluate.Stopped:
    return False
  record.evaluation(step, evaluate.record(found))
  return True


def _save(c: knobs.Config, done: int, state: types.TrainState, stats: types.TaskStats,
          checkpoints: checkpoint.Checkpoints, record: steps.Record, *, stops: bool) -> None:
  """Saves what is so after so many steps. Raises SystemExit, once it is saved, if the run stops."""
  record.flush()  # which stops at a loss that is not finite, before it is saved
  record.flush_rollouts()
  with phases.phase('checkpoint'):
    checkpoints.save(done, state, stats)
    if stops:
      checkpoints.wait()
      raise SystemExit(f'stopped after {done} of {c.num_steps} steps; run the same command again to go on')


def _learn(setup: Setup, state: types.TrainState, stats: types.TaskStats, base: Any, prompts: types.Prompts,
           found: explore.Explored, keys: dict[int, jax.Array], step: int
           ) -> tuple[types.TrainState, types.TaskStats, list[dict[str, Any]]]:
  """State and statistics after a step, and the measurements of its update, which the devices may still be at.

  Args:
    state: donated.
    keys: of each stream.
  """
  c, rollouts, scores = setup.config, found.rollouts, found.scores
  key = lambda stream: jax.random.fold_in(keys[stream], step)
  verified, is_any_verified = completions.keep(rollouts, scores.verified_R), scores.verified_R.any()
  measures_noise = is_any_verified and c.alloc.nu_every and step % c.alloc.nu_every == 0
  if measures_noise:
    with phases.phase('update'):
      measured_noise = noise.gradient_noise(
          state.params, base, verified, scores.verdict_R, key(state_lib.NOISE), setup.trained, setup.update)
  past = grpo.Past(*(np.float32(x_M) for x_M in estimate.reward(stats, estimate.posterior(stats, prompts.index_M))))
  state, measured = update.step(state, verified, scores.reward_R, base, setup.trained, setup.update, past=past,
                                key=key(state_lib.KEEP))
  phases.devices_work(True)
  if is_any_verified:  # without one the policy stays what it is, and so does what is known of it
    stats = estimate.observe(
        stats, prompts.index_M, verified.task_R, scores.verdict_R, verified.length_R,
        discount=c.alloc.pass_discount, reward_R=scores.reward_R)
  if measures_noise:
    stats = estimate.observe_gradient(stats, measured_noise, steps=c.alloc.nu_every)
  return state, stats, measured
