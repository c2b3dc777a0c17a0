"""A short supervised stage: a policy from scratch learns to answer before it learns by rewards.

Maximum likelihood on worked solutions of a split of their own. The stage has its own checkpoints
and record, and goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from kr_jax.learning import update
from kr_jax.model import policy
from kr_jax.types import PAD
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
        checkpoints: str, *, seed: int, stopping: Callable[[], bool]) -> Any:
  """Parameters after the stage, which goes on from its last checkpoint where there is one.

  Args:
    params: donated.
    directory: where the record of the stage is written.
    checkpoints: where its checkpoints are.
    seed: of the order of the tasks.
    stopping: asked after each step; once true, the stage is saved and left by SystemExit.
  """
  no_stats = estimate.init(1)
  state = sharding.place(update.init(params, jax.random.key(seed), update_config))
  with checkpoint.Checkpoints(checkpoints) as checkpoints:
    if checkpoints.latest() is not None:
      state, _ = checkpoints.restore(state, no_stats)
    first_step = int(state.step)
    with (metrics.Writer(directory, keep=lambda r: r['step'] < first_step, first_step=first_step)
          as writer, processes.progress('warm start', first_step, config.num_steps) as bar):
      bar.compiling()
      for step in range(first_step, config.num_steps):
        tasks_R = tasks_lib.batch(tasks, step, per_step=config.per_step, seed=seed)
        rollouts = solutions(tasks_R, tokenizer, sample_config)
        with phases.phase('update'):
          state, measured = update.sft(state, rollouts, policy_config, update_config)
          loss = float(measured['loss'])
        writer.write({'step': step, 'loss': loss, 'grad_norm': float(measured['grad_norm'])})
        bar.set_postfix(loss=f'{loss:.3f}', refresh=False)
        bar.update()
        done = step + 1
        if stopping() or done == config.num_steps or done % config.checkpoint_every == 0:
          with phases.phase('checkpoint'):
            checkpoints.save(done, state, no_stats)
        if stopping():
          raise SystemExit(f'stopped after {done} of {config.num_steps} warm-start steps; '
                           'run the same command again to go on')
  return state.params
