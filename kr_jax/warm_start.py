"""A short supervised stage: a policy from scratch learns to answer before it learns by rewards.

Maximum likelihood on worked solutions of a split of their own. The stage has its own checkpoints
and record, and goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
from typing import Any

import jax
import numpy as np

from kr_jax import knobs
from kr_jax import phases
from kr_jax import processes
from kr_jax import sample
from kr_jax import sharding
from kr_jax import tasks as tasks_lib
from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.learning import guard
from kr_jax.learning import update
from kr_jax.model import policy
from kr_jax.types import PAD
from kr_jax.record import bad_steps
from kr_jax.record import checkpoint
from kr_jax.record import metrics


def solutions(tasks: Sequence[types.Task], tokenizer, config: sample.Config) -> types.Rollouts:
  """The tasks' worked solutions as rollouts, one a task.

  Raises ValueError for a task without one, or one that does not fit in C with its stop token.
  """
  token_RC = np.full((len(tasks), config.completion_length), PAD, np.int32)
  length_R = np.zeros(len(tasks), np.int32)
  for r, task in enumerate(tasks):
    tokens = (*tokenizer.encode(task.solution), tokenizer.stop_ids[0])
    if not task.solution:
      raise ValueError(f'{task.id!r} has no solution for the warm start to learn from; warm_start.num_steps=0 leaves '
                       "it out, and tasks.columns.solution names a file's column of solutions")
    if len(tokens) > config.completion_length:
      raise ValueError(f'{task.id!r} has the solution {task.solution!r} of {len(tokens)} tokens; '
                       f'a warm start needs 2..sample.completion_length={config.completion_length}')
    token_RC[r, :len(tokens)] = tokens
    length_R[r] = len(tokens)
  return types.Rollouts(
      prompts=tasks_lib.prompts(tasks, config.prompt_length), task_R=np.arange(len(tasks), dtype=np.int32),
      token_RC=token_RC, logp_RC=np.zeros(token_RC.shape, np.float32), length_R=length_R,
      ended_R=np.full(len(tasks), types.ENDED_STOP, np.int32), decode_steps=np.zeros((), np.int32))


def run(params: Any, tasks: Sequence[types.Task], tokenizer, policy_config: policy.Config,
        sample_config: sample.Config, config: knobs.WarmStart, update_config: update.Config, directory: str,
        checkpoints: str, *, seed: int, stopping: processes.StopSignal, max_bad_steps: int, minutes: float = 0.0
        ) -> Any:
  """Parameters after the stage, which goes on from its last checkpoint where there is one.

  Args:
    params: donated.
    directory: where the record of the stage is written.
    checkpoints: where its checkpoints are.
    seed: of the order of the tasks.
    stopping: asked after each step; where the run is to stop, the stage is saved.
    max_bad_steps: as of knobs.Train.
    minutes: as of knobs.Checkpoint.

  Raises processes.Stopped, in all processes, where the run is to stop, and guard.Diverged where the policy is not
  finite any more, or the updates of too many steps in a row.
  """
  no_stats = estimate.init(1)
  state = sharding.place(update.init(params, jax.random.key(seed), update_config))
  directory_of_checkpoints, names = checkpoints, bad_steps.names(state)
  with checkpoint.Checkpoints(checkpoints, keep=2, every=config.checkpoint_every, minutes=minutes) as checkpoints:
    last_good = lambda: '' if checkpoints.latest() is None else os.path.join(
        directory_of_checkpoints, str(checkpoints.latest()))
    if checkpoints.latest() is not None:
      state, _ = checkpoints.restore(state, no_stats)
    first_step = int(state.step)
    with (metrics.Writer(directory, keep=lambda r: r['step'] < first_step, first_step=first_step)
          as writer, processes.progress('warm start', first_step, config.num_steps) as bar):
      bar.compiling()
      in_a_row = int(processes.gather(np.array([_skipped_last(writer.records)]))[0, 0])  # the first has the record
      for step in range(first_step, config.num_steps):
        stopping.doing, stopping.has_more = f'warm-start step {step}', step > first_step
        tasks_R = tasks_lib.batch(tasks, step, per_step=config.per_step, seed=seed)
        rollouts = solutions(tasks_R, tokenizer, sample_config)
        with phases.phase('update'):
          state, measured = update.sft(state, rollouts, policy_config, update_config)
          skipped, loss, norm = (x.item() for x in jax.device_get(
              tuple(measured[name] for name in ('skipped', 'loss', 'grad_norm'))))
        in_a_row = in_a_row + 1 if skipped else 0
        writer.write({'step': step, 'loss': None if skipped else loss, 'grad_norm': None if skipped else norm,
                      'skipped': int(skipped)})
        if skipped:
          _refuse_more(step, in_a_row, max_bad_steps, bad_steps.why([measured], names), last_good(), bar)
        bar.set_postfix(loss=f'{loss:.3f}', refresh=False)
        bar.update()
        done, stops = step + 1, stopping.is_agreed()
        if stops or done == config.num_steps or checkpoints.is_due(done):
          with phases.phase('checkpoint'):
            guard.check(policy_config, state.params, state.opt_state, {}, f'after {done} warm-start steps the policy',
                        f'It is not saved. {_advice(last_good())}')
            checkpoints.save(done, state, no_stats)
        if stops:
          raise processes.Stopped(f'stopped after {done} of {config.num_steps} warm-start steps; '
                                  'run the same command again to go on')
  stopping.has_more = False  # all is saved
  return state.params


def _skipped_last(records: Sequence[Mapping[str, Any]]) -> int:
  """How many of the last steps were skipped, in a row."""
  count = 0
  for record in records:
    count = count + 1 if record.get('skipped') else 0
  return count


def _refuse_more(step: int, in_a_row: int, most: int, why: str, last_good: str, bar: processes.Progress) -> None:
  """Says why the update of a step was skipped. Raises guard.Diverged after too many in a row."""
  said = f'warm-start step {step}: the update was skipped: {why}'
  if in_a_row >= most:
    raise guard.Diverged(f'{said}. So were train.max_bad_steps={most} in a row. {_advice(last_good)}')
  bar.write(said, alarm=True)


def _advice(last_good: str) -> str:
  where = f'The last good checkpoint is {last_good}' if last_good else 'No checkpoint was saved'
  return f'{where}. Lower warm_start.learning_rate, in another --workdir'
