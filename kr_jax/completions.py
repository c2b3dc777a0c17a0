"""Rollouts once they are sampled: waves joined, texts, stop strings, and which rollouts are kept.

What is done with tokens that stand divided over devices; of several processes each reads the rows that it has.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kr_jax import knobs
from kr_jax import phases
from kr_jax import processes
from kr_jax import sharding
from kr_jax import types
from kr_jax.types import PAD, Array

_AT_A_TIME = 32  # texts that are decoded before they are handed on


def join(waves: Sequence[types.Rollouts], rows: int | None = None) -> types.Rollouts:
  """The rollouts of a step's waves as those of the step: of a task side by side, earlier waves first.

  Args:
    rows: R of the result, at least the rollouts that there are (Waves.rows); None: of all waves together.

  A step of one wave is returned as it is. One program serves all budgets.
  """
  return waves[0] if len(waves) == 1 else _join(tuple(waves), rows)


@functools.partial(jax.jit, static_argnums=1)
def _join(waves: tuple[types.Rollouts, ...], rows: int | None) -> types.Rollouts:
  of_all = lambda name: jnp.concatenate([sharding.replicate(getattr(wave, name)) for wave in waves])
  order_R = jnp.argsort(of_all('task_R'), stable=True)[:rows]  # what is no rollout is the last
  wave_R = jnp.concatenate([jnp.full(len(wave.task_R), w) for w, wave in enumerate(waves)])[order_R]
  by_row = _divided_rows({name: of_all(name)[order_R] for name in ('token_RC', 'logp_RC')})
  whole = {name: of_all(name)[order_R] for name in ('task_R', 'length_R', 'ended_R')}
  counts = {name: sum(getattr(wave, name) for wave in waves) for name in ('decode_steps', 'tail_steps', 'refills')}
  return types.Rollouts(waves[0].prompts, **by_row, **sharding.replicate(whole | counts | {'wave_R': wave_R}))


def join_rows(x_WR: Sequence[np.ndarray], task_WR: Sequence[np.ndarray], rows: int | None = None) -> np.ndarray:
  """What the host knows of each wave's rollouts, a row for each, in the rows that `join` gives them.

  task_WR: task_R of each wave, as `join` sees it.
  """
  order_R = np.argsort(np.concatenate([np.asarray(task_R) for task_R in task_WR]), kind='stable')[:rows]
  return np.concatenate([np.asarray(x_R) for x_R in x_WR])[order_R]


def texts(rollouts: types.Rollouts, decode: Callable[[np.ndarray], str]) -> tuple[np.ndarray, Iterator[str]]:
  """The rollouts that are this process's to read: row_X, those with a completion, and their texts.

  Texts are decoded some at a time, when they are taken, so that the first can be verified while the others are decoded.
  decode: tokens -> text.
  """
  row_X, token_XC = processes.own_rows(rollouts.token_RC)
  length_X = np.asarray(rollouts.length_R)[row_X]
  there_X = length_X > 0
  place_X = np.flatnonzero(there_X)

  def found() -> Iterator[str]:
    for first in range(0, len(place_X), _AT_A_TIME):
      with phases.phase('detokenise'):
        some = [decode(token_XC[x, :length_X[x]]) for x in place_X[first:first + _AT_A_TIME]]
      yield from some

  return row_X[there_X], found()


def apply_stop_strings(rollouts: types.Rollouts, decode: Callable[[np.ndarray], str], config: knobs.Sample
                       ) -> types.Rollouts:
  """Ends each completion with the first token that completes one of `stop_strings`.

  Device programs see tokens alone, so a completion is cut once it is there, by the process that reads it.
  What stays has the tokens and log-probabilities that it had. decode: tokens -> text; of more tokens it
  begins with that of fewer.
  """
  if not config.stop_strings:
    return rollouts
  row_X, token_XC = processes.own_rows(rollouts.token_RC)
  length_X = np.asarray(rollouts.length_R)[row_X]
  short_X, cut_X = length_X.copy(), np.zeros(len(length_X), bool)
  for x, length in enumerate(length_X):
    stops = lambda n: any(stop in decode(token_XC[x, :n]) for stop in config.stop_strings)
    if length and stops(length):
      short_X[x], cut_X[x] = bisect.bisect_left(range(length), True, lo=1, key=stops), True
  short_R, cut_R = (processes.merge_rows(row_X, x, len(rollouts.length_R)) for x in (short_X, cut_X))
  return _shorten(rollouts, short_R, cut_R)


@jax.jit
def _shorten(rollouts: types.Rollouts, length_R: Array, cut_R: Array) -> types.Rollouts:
  there_RC = jnp.arange(rollouts.token_RC.shape[1])[None] < length_R[:, None]
  by_row = {'token_RC': jnp.where(there_RC, rollouts.token_RC, PAD),
            'logp_RC': jnp.where(there_RC, rollouts.logp_RC, 0)}
  ended_R = jnp.where(cut_R, types.ENDED_STOP, rollouts.ended_R)
  return rollouts._replace(
      **_divided_rows(by_row), **sharding.replicate({'length_R': length_R, 'ended_R': ended_R}))


def _divided_rows(tree: Any) -> Any:
  """Arrays of R rows, divided by rows where the shards divide R."""
  (R,) = {len(x) for x in jax.tree.leaves(tree)}
  return tree if R % sharding.row_shards() else sharding.constrain_rows(tree)


def keep(rollouts: types.Rollouts, keep_R: np.ndarray) -> types.Rollouts:
  """The rollouts of keep_R, bool; the others are no rollouts: their task is M and their length 0.

  Shapes and partitions stay, and one program serves every keep_R.
  """
  task_R, length_R, ended_R = _keep(
      rollouts.task_R, rollouts.length_R, rollouts.ended_R, keep_R, len(rollouts.prompts.length_M))
  return rollouts._replace(task_R=task_R, length_R=length_R, ended_R=ended_R)


@functools.partial(jax.jit, static_argnums=4)
def _keep(task_R: Array, length_R: Array, ended_R: Array, keep_R: Array, num_tasks: int) -> tuple[Array, ...]:
  return sharding.replicate((
      jnp.where(keep_R, task_R, num_tasks), jnp.where(keep_R, length_R, 0),
      jnp.where(keep_R, ended_R, types.NOT_SAMPLED)))
