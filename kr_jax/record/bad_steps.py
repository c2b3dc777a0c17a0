"""Steps whose update was skipped: loss, gradient or what the update would give is not finite.

The state stays what it was, and the step counts as done. Its batch is kept in replay/STEP.npz, for --mode=replay; too
many such steps in a row stop the run. The verdicts of such a step count in the statistics of its tasks like any others:
the policy that wrote the rollouts was sound, and what was verified of them does not hang on what is learnt from them.

A batch is plain arrays: its file is read without pickle, and its sizes are checked before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import io
import json
import os
import re
from typing import Any, NamedTuple
import zipfile

from absl import logging
import jax
import numpy as np

from kr_jax import files
from kr_jax import mirror
from kr_jax import processes
from kr_jax import rewards
from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.learning import grpo
from kr_jax.learning import guard

FOLDER = 'replay'
MOST = 8  # batches that are kept, the newest
_LARGEST = 2 ** 34  # bytes of a batch
_NAME = re.compile(r'(\d+)\.npz')
_OF_PROMPTS = ('token_MP', 'length_M', 'index_M')
_OF_ROLLOUTS = ('task_R', 'token_RC', 'logp_RC', 'length_R', 'ended_R')


class Batch(NamedTuple):
  """What an update learns from, on the host, and what is known of it."""

  step: int
  rollouts: types.Rollouts  # all of the step, verified or not
  outcome_R: np.ndarray  # as of rewards.Scores
  reward_R: np.ndarray
  budget_M: np.ndarray
  past: grpo.Past
  ids: Sequence[str]  # of the tasks


class Names(NamedTuple):
  """The names of the arrays that an update measures."""

  trained: Sequence[str]  # of 'grad_norms'
  state: Sequence[str]  # of 'largest'; parameters first


def names(state: types.TrainState) -> Names:
  """The names of what an update of a state measures."""
  return Names(guard.names(state.params), guard.state_names(state.params, state.opt_state))


def batch(step: int, stats: types.TaskStats, tasks_M: Sequence[types.Task], budget_M: np.ndarray,
          rollouts: types.Rollouts, scores: rewards.Scores) -> Batch:
  """The batch of a step; of several processes each has its own rows, and all must call it. stats: from before it."""
  whole = lambda x: processes.merge_rows(*processes.own_rows(x), total=len(x))
  host = rollouts._replace(
      prompts=types.Prompts(*map(np.asarray, rollouts.prompts)), token_RC=whole(rollouts.token_RC),
      logp_RC=whole(rollouts.logp_RC), **{name: np.asarray(getattr(rollouts, name)) for name in (
          'task_R', 'length_R', 'ended_R', 'decode_steps')},
      wave_R=None if rollouts.wave_R is None else np.asarray(rollouts.wave_R))
  index_M = host.prompts.index_M
  past = grpo.Past(*(np.float32(x_M) for x_M in estimate.reward(stats, estimate.posterior(stats, index_M))))
  return Batch(step, host, scores.outcome_R, scores.reward_R, np.asarray(budget_M), past, [t.id for t in tasks_M])


def save(workdir: str, of: Batch) -> None:
  """Writes a batch, and drops the oldest beyond MOST. Raises OSError."""
  r = of.rollouts
  arrays = {name: getattr(r.prompts, name) for name in _OF_PROMPTS} | {name: getattr(r, name) for name in _OF_ROLLOUTS}
  arrays |= {'step': np.int64(of.step), 'outcome_R': of.outcome_R, 'reward_R': of.reward_R, 'budget_M': of.budget_M,
             'mean_M': of.past.mean_M, 'rollouts_M': of.past.rollouts_M, 'ids': np.array(list(of.ids), np.str_)}
  if r.wave_R is not None:
    arrays['wave_R'] = r.wave_R
  content = io.BytesIO()
  np.savez_compressed(content, **arrays)
  files.write(path(workdir, of.step), content.getvalue())
  for step in kept(workdir)[:-MOST]:
    os.remove(path(workdir, step))


def path(workdir: str, step: int) -> str:
  return os.path.join(workdir, FOLDER, f'{step}.npz')


def kept(workdir: str) -> list[int]:
  """The steps whose batches are kept, in order."""
  folder = os.path.join(workdir, FOLDER)
  names = os.listdir(folder) if os.path.isdir(folder) else ()
  return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


def load(workdir: str, step: int | None = None) -> Batch:
  """The batch of a step; None: of the newest that is kept. Raises ValueError where there is none, or it is damaged."""
  steps = kept(workdir)
  if not steps:
    raise ValueError(f'{os.path.join(workdir, FOLDER)} holds no batch: of this run no update was skipped')
  if step is not None and step not in steps:
    raise ValueError(f'--step={step}: its batch is not kept; there are those of {", ".join(map(str, steps))}')
  name = path(workdir, steps[-1] if step is None else step)
  try:
    with zipfile.ZipFile(name) as archive:
      if (size := sum(member.file_size for member in archive.infolist())) > _LARGEST:
        raise ValueError(f'it unpacks to {size:,} bytes, more than {_LARGEST:,}')
    with np.load(name, allow_pickle=False) as file:
      x = {key: file[key] for key in file.files}
    found = Batch(
        int(x['step']), types.Rollouts(
            types.Prompts(*(x[key] for key in _OF_PROMPTS)), *(x[key] for key in _OF_ROLLOUTS),
            decode_steps=np.int32(0), wave_R=x.get('wave_R')),
        x['outcome_R'], x['reward_R'], x['budget_M'], grpo.Past(x['mean_M'], x['rollouts_M']), x['ids'].tolist())
    _check(found)
  except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f'{name} cannot be read as a batch ({error}); delete it') from error
  return found


def _check(of: Batch) -> None:
  """Raises ValueError unless sizes, types and ranges are those of a batch."""
  r, (M, P) = of.rollouts, of.rollouts.prompts.token_MP.shape
  R, C = r.token_RC.shape
  wave = () if r.wave_R is None else (r.wave_R,)
  by_task = (r.prompts.length_M, r.prompts.index_M, of.budget_M, *of.past, of.ids)
  by_rollout = (r.task_R, r.logp_RC, r.length_R, r.ended_R, of.outcome_R, of.reward_R, *wave)
  if {len(x) for x in by_task} != {M} or {len(x) for x in by_rollout} != {R} or r.logp_RC.shape != (R, C):
    raise ValueError('its arrays are of different sizes')
  whole = (r.prompts.token_MP, r.token_RC, r.prompts.length_M, r.task_R, r.length_R, of.outcome_R, *wave)
  if any(x.dtype.kind != 'i' for x in whole) or r.logp_RC.dtype != np.float32 or of.reward_R.dtype.kind != 'f':
    raise ValueError('its arrays are of other types')
  within = lambda x, low, high: x.size == 0 or low <= x.min() and x.max() <= high
  if not (within(r.task_R, 0, M) and within(r.length_R, 0, C) and within(r.prompts.length_M, 1, P)
          and within(of.outcome_R, 0, len(rewards.OUTCOMES) - 1) and within(r.token_RC, 0, 2 ** 31 - 1)):
    raise ValueError('it holds numbers out of range')


def why(measured: Sequence[Mapping[str, Any]], names: Names) -> str:
  """What is not finite of the first update that was skipped, in words."""
  m = jax.device_get(next(m for m in measured if m['skipped']))
  loss, norm, norm_X, largest_X = (np.asarray(m[name]) for name in ('loss', 'grad_norm', 'grad_norms', 'largest'))
  what = []
  if not np.isfinite(loss):
    what.append(f'the loss is {loss:g}')
  if not np.isfinite(norm):
    bad_X = ~np.isfinite(norm_X)
    first = int(bad_X.argmax() if bad_X.any() else norm_X.argmax())
    what.append(f"the gradient's norm is {norm:g}, {'first' if bad_X.any() else 'most'} in {names.trained[first]}")
  n = len(names.trained)
  limit_X = np.where(np.arange(len(largest_X)) < n, guard.LARGEST, np.inf)
  bad_X = ~(np.isfinite(largest_X) & (largest_X <= limit_X))
  if not what and bad_X.any():
    first = int(bad_X.argmax())
    return f'loss and gradient are finite, and the update would take a value of {names.state[first]} to ' \
           f'{largest_X[first]:g}'
  most = int(largest_X[:n].argmax())
  return f'{" and ".join(what)}; the largest parameter is {largest_X[most]:.3g}, in {names.state[most]}'


class Watch:
  """Counts the bad steps in a row, keeps their batches, and stops the run.

  Args:
    workdir: of the record.
    most: in a row, with which the run stops.
    records: the lines of the steps before, of which the last ones may have been bad too; those of the first process
      count.
    names: of what an update measures.
    last_good: names the latest checkpoint, each of which was looked at before it was written; None: there is none.
  """

  def __init__(self, workdir: str, most: int, records: Iterable[Mapping[str, Any]], names: Names,
               last_good: Callable[[], str | None]):
    self._workdir, self._most, self._names, self._last_good = workdir, most, names, last_good
    self._row: list[int] = []  # the bad steps, up to the last one
    self._why = ''
    for record in records:
      if 'skipped' in record:
        self._count(record['step'], record['skipped'])
    self._row = json.loads(processes.of_first(json.dumps(self._row)))  # which alone has the record

  def _count(self, step: int, skipped: int) -> None:
    self._row = [*self._row, step] if skipped else []

  def step(self, skipped: int, measured: Sequence[Mapping[str, Any]], of: Callable[[], Batch], step: int,
           rate: float) -> list[str]:
    """Notes a step; keeps its batch if it is bad. Returns what is to be said of it.

    Args:
      skipped: updates that were.
      measured: as of update.step.
      of: makes the batch; called by all processes alike.
      rate: at which was learnt.
    """
    self._count(step, skipped)
    if not skipped:
      return []
    found = of()
    length_R, logp_RC = found.rollouts.length_R, found.rollouts.logp_RC
    live_R, live_RC = length_R > 0, np.arange(logp_RC.shape[1])[None] < length_R[:, None]
    self._why = (f'{why(measured, self._names)}; learning rate {rate:g}, rewards {_range(found.reward_R[live_R])}, '
                 f"the sampler's log-probabilities {_range(logp_RC[live_RC])}")
    if processes.is_first():
      try:
        save(self._workdir, found)
      except OSError as error:
        logging.warning('the batch of step %d is not kept for --mode=replay: %s', step, error)
    return [f'step {step}: {skipped} of {len(measured)} updates skipped: {self._why}. Look at it: '
            f'{self._replay(step)}']

  def _replay(self, step: int) -> str:
    return f'kr_jax --mode=replay --workdir={mirror.url(self._workdir)} --step={step}'

  def check(self) -> None:
    """Raises guard.Diverged after too many bad steps in a row."""
    if len(self._row) < self._most:
      return
    last, good = self._row[-1], self._last_good()
    steps = f'steps {self._row[0]} to {last}' if self._most > 1 else f'step {last}'
    raise guard.Diverged(
        f'the updates of {steps} were skipped, train.max_bad_steps={self._most} in a row. At step {last} {self._why}. '
        f'{f"The last good checkpoint is {good}: its policy is finite" if good else "No checkpoint was saved"}. '
        f'Look at what was not: {self._replay(last)}; then lower optimizer.learning_rate or optimizer.max_grad_norm')


def _range(x: np.ndarray) -> str:
  return f'{x.min():.4g} to {x.max():.4g}' if x.size else 'of none'
