"""The loop: tasks -> budgets -> rollouts -> rewards -> update -> statistics; the three in the middle in each wave.

Nothing is learnt from a rollout that is not verified (rewards/verdicts.py): the update and the statistics leave it out.
Figures of sampling count it. `train` runs the loop, keeps its record and its checkpoints, and goes on where the last
checkpoint stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
from typing import Any, NamedTuple

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
from kr_jax.learning import guard
from kr_jax.learning import noise
from kr_jax.learning import update
from kr_jax.prepare import Setup
from kr_jax.record import bad_steps
from kr_jax.record import checkpoint
from kr_jax.record import lock
from kr_jax.record import log
from kr_jax.record import ledger as ledger_lib
from kr_jax.record import steps
from kr_jax.report import refresh

def train(setup: Setup, workdir: str, hardware: hardware_lib.Hardware | None = None, *,
          profile: tuple[int, int] | None = None, on_step: Callable[[dict[str, Any]], None] | None = None,
          stopping: processes.StopSignal | None = None) -> None:
  """Trains to config.num_steps in `workdir`, from where its last checkpoint stands.

  Writes what kr_jax/record/README.md says.

  Args:
    hardware: that the run is priced by; None: by none.
    profile: the first and the last step that are traced; None: none is.
    on_step: called with each line of metrics.jsonl as it is written.
    stopping: that has heard signals since before; None: they are heard from now on.

  Raises:
    ValueError: the workdir cannot be written or holds a run of another config, or prompts cannot be perturbed.
    guard.Diverged: what is learnt is not finite, train.max_bad_steps in a row, or in the policy itself.
    SystemExit: SIGTERM or SIGINT came; all is saved.
  """
  c, perturbed = setup.config, state_lib.perturbed_tasks(setup)
  with contextlib.ExitStack() as context:
    context.enter_context(attempt.held(workdir, c.checkpoint.directory))
    attempt.claim(setup, workdir)
    workdir = context.enter_context(mirror.opened(workdir, create=True)).path
    context.enter_context(log.kept(workdir)).begin()
    clock = context.enter_context(phases.running())
    stopping = stopping or context.enter_context(processes.StopSignal())
    stopping.begin()
    directory = state_lib.checkpoint_directory(setup, workdir)
    last_good = lambda: None if checkpoints.latest() is None else files.join(directory, str(checkpoints.latest()))
    checkpoints = checkpoint.Checkpoints(directory, keep=c.checkpoint.keep, best=c.checkpoint.best,
                                         every=c.checkpoint.every, minutes=c.checkpoint.minutes)
    # What the end of the others takes is in the ledger, which therefore ends last.
    ledger = context.enter_context(attempt.begin(setup, workdir, hardware, clock, checkpoints.latest() or 0))
    context.enter_context(checkpoints)
    pool = context.enter_context(state_lib.workers(setup))
    pool.leave_by(stopping.leave)
    context.enter_context(stopping.ends())
    with phases.phase('restore'):
      stopping.check()
      state, stats, base = state_lib.start(setup, workdir, checkpoints, stopping)
      with sharding.on(setup.learn_mesh):
        guard.check(setup.trained, state.params, state.opt_state, base, last_good() or 'the initial policy',
                    'Begin with another one')
    first_step = int(state.step)
    if first_step < ledger.about['first_step']:
      ledger.go_back(first_step)
    record = context.enter_context(steps.Record(
        c, workdir, first_step, setup.tokenizer.decode, update.learning_rate(setup.update), pool.answers,
        clock.began, on_step, names=bad_steps.names(state), last_good=last_good))
    page = refresh.Refresher(workdir, c.record.page)
    trace = context.enter_context(compiled.Profile(files.join(mirror.url(workdir), 'profile'), profile, first_step))
    _loop(_Run(setup, pool, record, page, trace, ledger, checkpoints, stopping, hardware, perturbed), state, stats,
          base)
    with phases.phase('checkpoint'):
      checkpoints.wait()
    ledger.step(c.num_steps, next_step=c.num_steps)
    ledger.flush()
    stopping.doing, stopping.has_more = 'the last page', False
    page.refresh(last=True)


class _Run(NamedTuple):
  """What the steps of a run work with."""

  setup: Setup
  pool: rewards.Workers
  record: steps.Record
  page: refresh.Refresher
  trace: compiled.Profile
  ledger: ledger_lib.Writer
  checkpoints: checkpoint.Checkpoints
  stopping: processes.StopSignal
  hardware: hardware_lib.Hardware | None
  perturbed: Mapping[str, Sequence[types.Task]]


def _loop(run: _Run, state: types.TrainState, stats: types.TaskStats, base: Any) -> None:
  """Takes the steps that are left, then evaluates. Raises processes.Stopped, once all is saved, if the run stops.

  A stop leaves a step where it is, unless its update has begun: state and statistics are those of the step before, and
  the next start takes the same step from its beginning.
  """
  setup, pool, record, page, trace, ledger, checkpoints, stopping = run[:8]
  c, first_step, done = setup.config, int(state.step), int(state.step)
  keys = {stream: jax.random.fold_in(state.key, stream) for stream in (
      state_lib.ROLLOUTS, state_lib.NOISE, state_lib.KEEP)}

  def save():
    lock.check()  # nothing is written where another run is now
    record.flush()  # which stops at a loss that is not finite, before it is saved
    record.flush_rollouts()
    with phases.phase('checkpoint'):
      guard.check(setup.trained, state.params, state.opt_state, base, f'after {done} steps the policy',
                  f'It is not saved. {guard.go_back(record.last_good())}')
      ledger.snapshot()  # after a kill these steps are not repeated, so that nothing else would tell their costs
      checkpoints.save(done, state, stats)

  def evaluated(step, perturbed={}):
    stopping.doing = f'the evaluation before step {step}' if step < c.num_steps else 'the last evaluation'
    if step and c.checkpoint.best:
      save()
    _evaluated(run, step, state, base, perturbed)
    checkpoints.note_score(step, record.success(step))
    if step and step < c.num_steps:
      stopping.check()
      ledger.flush()
      page.refresh()
      stopping.check()

  try:
    with sharding.on(setup.learn_mesh):
      for step in range(first_step, c.num_steps):
        stopping.check()
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
            jax.random.fold_in(keys[state_lib.ROLLOUTS], step), record.flush, stopping)
        guard.check_sampled(found.logp_sum, step, record.last_good())
        before = stats
        state, stats, measured = _learn(setup, state, stats, base, found, keys, step)
        done, stopping.has_more = step + 1, True
        with phases.phase('record'):
          record.step(step, before, found.tasks_M, found.budget_M, found.rollouts, found.slots, found.sample_s,
                      found.scores, measured, logp_sum=found.logp_sum, learnt=found.learnt,
                      uniform_index_M=np.array([task.index for task in considered[:c.tasks.per_step]]))
        with phases.phase('update'):
          jax.block_until_ready(measured)
        phases.devices_work(False)
        trace.end(step)
        if done == c.num_steps or checkpoints.is_due(done):
          save()
        record.costs(step, ledger.step(step), ledger.about, run.hardware)
      evaluated(c.num_steps, run.perturbed)
  except processes.Stopped:
    is_saved = done in (first_step, checkpoints.latest())  # else the state would be copied for nothing
    if not is_saved and stopping.has_left_devices:  # which take no other program before the one they are at ends
      with state_lib.off_devices(setup, state, base) as (state, base):
        save()
    elif not is_saved:
      with sharding.on(setup.learn_mesh):
        save()
    with phases.phase('checkpoint'):
      checkpoints.wait()
    raise processes.Stopped(
        f'stopped after {done} of {c.num_steps} steps; run the same command again to go on') from None


def _evaluated(run: _Run, step: int, state: types.TrainState, base: Any,
               perturbed: Mapping[str, Sequence[types.Task]]) -> None:
  """Evaluates before a step, where the record has no evaluation of it. Raises processes.Stopped if the run stops.

  perturbed: as of state.evaluation.
  """
  record = run.record
  if processes.any_of(record.has_evaluation(step)):
    return
  with phases.phase('evaluate', whole=True), record.evaluating() as progress:
    found = state_lib.evaluation(
        run.setup, state_lib.sampling_params(run.setup, state, base), state.key, run.pool, perturbed=perturbed,
        stopping=run.stopping, progress=progress)
  record.evaluation(step, evaluate.record(found))


def _learn(setup: Setup, state: types.TrainState, stats: types.TaskStats, base: Any, found: explore.Explored,
           keys: dict[int, jax.Array], step: int
           ) -> tuple[types.TrainState, types.TaskStats, list[dict[str, Any]]]:
  """State and statistics after a step, and the measurements of its update, which the devices may still be at.

  Args:
    state: donated.
    keys: of each stream.
  """
  c, learnt, index_M = setup.config, found.learnt, np.asarray(found.rollouts.prompts.index_M)
  key = lambda stream: jax.random.fold_in(keys[stream], step)
  verified, verified_R = completions.keep(learnt.rollouts, learnt.scores.verified_R), found.scores.verified_R
  is_any_verified = verified_R.any()
  measures_noise = is_any_verified and c.alloc.nu_every and step % c.alloc.nu_every == 0
  if measures_noise:
    with phases.phase('update'):
      measured_noise = noise.gradient_noise(
          state.params, base, verified, learnt.scores.verdict_R, key(state_lib.NOISE), setup.trained, setup.update)
  learnt_index_M = np.asarray(learnt.rollouts.prompts.index_M)
  past = grpo.Past(*(np.float32(x_M) for x_M in estimate.reward(stats, estimate.posterior(stats, learnt_index_M))))
  state, measured = update.step(state, verified, learnt.scores.reward_R, base, setup.trained, setup.update, past=past,
                                key=key(state_lib.KEEP))
  phases.devices_work(True)
  if is_any_verified:  # without one the policy stays what it is, and so does what is known of it
    stats = estimate.observe(
        stats, index_M, np.where(verified_R, found.rollouts.task_R, len(index_M)), found.scores.verdict_R,
        found.rollouts.length_R, discount=c.alloc.pass_discount, reward_R=found.scores.reward_R)
  if measures_noise:
    stats = estimate.observe_gradient(stats, measured_noise, steps=c.alloc.nu_every)
  return state, stats, measured
