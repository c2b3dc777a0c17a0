"""How much of a batch's gradient is signal: of a cell, at a seed's warm start, with uniform budgets.

    signal   |E g|^2                  estimated by the mean of g_b . g_b' over pairs of batches b != b'
    noise    trace of Cov g           estimated by the mean of |g_b|^2, minus the signal
    ratio    signal / noise

g_b is the gradient of the loss of one batch, without an update, of rollouts of its own. Tasks come as in training, by
shuffled passes: batches of a pass share none, so that the signal is estimated low, by at most 1 / (batches - 1) of the
noise. Where the ratio is below 1, most of an update is noise. The gradient is linear in the advantages, so that
it is the sum of those of solved, mixed and hard tasks (by the success of 8 other rollouts of each task); `share` is
the part of the signal that a status brings: the mean of g_status,b . g_b' over pairs, over the signal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
import json
import pathlib
import shutil
from typing import Any

import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np

from kr_jax import completions
from kr_jax import explore
from kr_jax import prepare
from kr_jax import processes
from kr_jax import rewards
from kr_jax import sharding
from kr_jax import state as state_lib
from kr_jax import tasks as tasks_lib
from kr_jax import types
from kr_jax.learning import update
from kr_jax.model import policy
from kr_jax.record import checkpoint
from kr_jax.record import lines as lines_lib
from tests.benchmarks.proof import plan
from tests.benchmarks.proof import runs

BATCHES = 32
_NAME = 'signal.jsonl'
_ROLLOUTS = 8  # that tell the status of a training task
_RESAMPLES, _SEED = 2000, 0


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The lines that are recorded in a folder."""
  path = folder / _NAME
  return lines_lib.read(str(path)).records if path.exists() else []


def append(folder: pathlib.Path, line: Mapping[str, Any]) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / _NAME, 'a') as file:
    file.write(json.dumps(line, allow_nan=False) + '\n')


def ratio(gram_BB: np.ndarray) -> dict[str, float | None]:
  """Signal, noise and their ratio with a 95 % interval (bootstrap over batches), of the products of gradients.

  The ratio may be below 0 where there is no signal; None where there is no noise.

  Raises ValueError for fewer than 3 batches.
  """
  B = len(gram_BB)
  if B < 3:
    raise ValueError(f'{B} batches have no signal-to-noise ratio with an interval; take 3 or more')
  signal, noise = (float(x_X[0]) for x_X in _of(gram_BB, np.ones((1, B))))
  count_XB = np.random.default_rng(_SEED).multinomial(B, np.full(B, 1 / B), size=_RESAMPLES)
  signal_X, noise_X = _of(gram_BB, count_XB[np.count_nonzero(count_XB, axis=1) > 1].astype(float))
  ratio_X = np.where(noise_X > 0, signal_X / np.where(noise_X > 0, noise_X, 1), np.inf)
  low, high = np.quantile(ratio_X, (0.025, 0.975), method='nearest')
  is_known = noise > 0
  return {'signal': signal, 'noise': noise, 'ratio': signal / noise if is_known else None,
          'low': float(low) if is_known and np.isfinite(low) else None,
          'high': float(high) if is_known and np.isfinite(high) else None}


def _of(gram_BB: np.ndarray, count_XB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Signal and noise of resamples in which each batch counts so many times; its pairs with itself are none."""
  square_B, size_X = np.diag(gram_BB), count_XB.sum(axis=1)
  pairs_X = size_X ** 2 - (count_XB ** 2).sum(axis=1)
  signal_X = (np.sum(count_XB @ gram_BB * count_XB, axis=1) - count_XB ** 2 @ square_B) / pairs_X
  return signal_X, count_XB @ square_B / size_X - signal_X


def summarized(gradient_SBX: Mapping[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
  """The ratios of all tasks and of each status, of the gradients of each status and batch."""
  all_BX = np.sum(list(gradient_SBX.values()), axis=0, dtype=np.float64)
  found, B = {'all': ratio(all_BX @ all_BX.T)}, len(all_BX)
  signal = found['all']['signal']
  for status, g_BX in gradient_SBX.items():
    if not np.any(g_BX):
      continue
    g_BX = g_BX.astype(np.float64)
    product_BB = g_BX @ all_BX.T
    share = (product_BB.sum() - np.trace(product_BB)) / (B * (B - 1)) / signal if signal > 0 else None
    found[status] = ratio(g_BX @ g_BX.T) | {'share': share}
  return found


def of_cell(family: str, batch: str, seed: int, folder: pathlib.Path, batches: int = BATCHES, config: Any = None
            ) -> dict[str, Any]:
  """The line of a cell and a seed.

  Args:
    folder: of the comparison, which may hold the warm start; else it is made there.
    config: of a uniform run; None: as of the plan.
  """
  run = plan.Run(family, batch, plan.BASELINE, seed, 'signal', 1.0)
  c = plan.config(run) if config is None else config
  name, workdir = plan.warm_start(family, c), folder / 'runs' / f'signal_{run.cell}_{seed}'
  warm = name and folder / 'warm' / name
  if warm and warm.exists() and not workdir.exists():
    workdir.mkdir(parents=True)
    runs.copied(warm, workdir / 'warm_start')
  gradients = measured(c, str(workdir), batches)
  if warm and not warm.exists():
    warm.parent.mkdir(parents=True, exist_ok=True)
    runs.copied(workdir / 'warm_start', warm)
  shutil.rmtree(workdir, ignore_errors=True)
  return runs.rounded({'family': family, 'batch': batch, 'seed': seed, 'batches': batches,
                       'rollouts': c.alloc.rollouts_per_step, 'digest': plan.digest(c), 'of': summarized(gradients)})


def measured(c: Any, workdir: str, batches: int) -> dict[str, np.ndarray]:
  """gradient_BX of each status, of the first batches of a run."""
  setup = prepare.prepare(c, workdir)
  c = setup.config
  found = {status: [] for status in runs.STATUSES}
  with state_lib.workers(setup) as pool, checkpoint.Checkpoints(
      state_lib.checkpoint_directory(setup, workdir), keep=1) as checkpoints:
    state, stats, base = state_lib.start(setup, workdir, checkpoints)
    status_I = _statuses(setup, state, base, pool, batches)
    with sharding.on(setup.learn_mesh):
      key = jax.random.fold_in(state.key, state_lib.ROLLOUTS)
      for step in range(batches):
        tasks_M = tasks_lib.batch(setup.train_tasks, step, per_step=c.tasks.per_step, seed=c.seed, weights=setup.shares)
        tasks_M, budget_M = explore.chosen(c, stats, tasks_M)
        prompts = tasks_lib.prompts(tasks_M, c.sample.prompt_length)
        drawn = explore.rollouts(
            setup, state_lib.sampling_params(setup, state, base), pool, stats, tasks_M, prompts, budget_M,
            jax.random.fold_in(key, step), lambda: None, processes.NEVER)
        for status, g_X in _gradients(setup, state, base, drawn, status_I[prompts.index_M]).items():
          found[status].append(g_X)
  return {status: np.stack(g_BX) for status, g_BX in found.items()}


def _statuses(setup: prepare.Setup, state: types.TrainState, base: Any, pool: rewards.Workers, batches: int
              ) -> np.ndarray:
  """status_I of the training tasks, by rollouts of their own; '' of those that no batch holds."""
  c = setup.config
  used = {task.index: task for step in range(batches) for task in tasks_lib.batch(
      setup.train_tasks, step, per_step=c.tasks.per_step, seed=c.seed, weights=setup.shares)}
  of_train = setup._replace(test_tasks=list(used.values()), config=c.replace(evaluate=c.evaluate.replace(
      rollouts=_ROLLOUTS, pass_at=(), maj_at=())))
  counts = state_lib.evaluation(
      of_train, state_lib.sampling_params(setup, state, base), state.key, pool)['tasks']
  status_I = np.full(len(setup.train_tasks), '', object)
  status_I[list(used)] = runs.statuses(counts)
  return status_I


def _gradients(setup: prepare.Setup, state: types.TrainState, base: Any, drawn: explore.Explored,
               status_M: Sequence[str]) -> dict[str, np.ndarray]:
  """The gradient of a batch's loss, float32, the part of the tasks of each status."""
  rollouts = completions.keep(drawn.rollouts, drawn.scores.verified_R)
  experience, tokens, packed, _ = update.read(
      state.params, rollouts, drawn.scores.reward_R, base, setup.trained, setup.update, None, state.key)
  task_R, found = np.asarray(rollouts.task_R), {}
  for status in runs.STATUSES:
    is_in_R = np.append(np.asarray(status_M) == status, False)[task_R]
    of_status = experience._replace(advantage_R=jnp.where(is_in_R, experience.advantage_R, 0.0))
    found[status] = np.asarray(_gradient(
        state.params, base, of_status, tokens, packed.first[-1], setup.trained, setup.update))
  return found


@functools.partial(jax.jit, static_argnums=(5, 6))
def _gradient(trained: Any, base: Any, experience: update.Experience, tokens: update.Tokens, end: jax.Array,
              policy_config: policy.Config, config: update.Config) -> jax.Array:
  """The gradient of the loss of the microbatches before the end, as one vector."""

  def of_one(arguments, microbatch):
    trained, base, experience = arguments
    loss = lambda trained: update.loss_and_counts(policy_config, config, trained, (base, experience), microbatch)[0]
    return jax.grad(loss)(trained)

  total = update.sum_over_microbatches(of_one, (trained, base, experience), tokens, jnp.array(0), end)
  return flatten_util.ravel_pytree(total)[0]
