"""The training tasks of a run, by row: who they are, and what is known of their success rates.

`tasks.jsonl.zst` in the workdir has a line a task, in the order of the rows that `group_index` of metrics.jsonl names;
it is written once. With it, the statistics that budgets come from follow from metrics.jsonl alone (`replay`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
from typing import Any, NamedTuple

import numpy as np

from kr_jax import files
from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.record import rollouts

FILE = 'tasks.jsonl.zst'
# The last steps whose calibration is fitted again, which takes most of the time: each goes half of the way from the one
# before, so that where the first began is no more to be seen.
_FITTED = 48


class Split(NamedTuple):
  """The training tasks."""

  id_I: list[str]
  source_I: list[str]
  difficulty_I: np.ndarray  # int64
  stratum_I: np.ndarray  # int32, the tasks that share a prior
  known_OI: np.ndarray  # float64, as of types.TaskStats


class Groups(NamedTuple):
  """What came of the tasks of a step."""

  index_M: np.ndarray  # rows of the split
  budget_M: np.ndarray
  right_M: np.ndarray
  verified_M: np.ndarray


def write(workdir: str, tasks: Sequence[types.Task], stats: types.TaskStats) -> None:
  """Writes the file, where it is not there. stats: from before any rollout. Raises OSError."""
  path = os.path.join(workdir, FILE)
  if os.path.exists(path):
    return
  files.write(path, rollouts.packed([
      {'id': task.id, 'source': task.source, 'difficulty': int(task.difficulty), 'stratum': stratum, 'known': known}
      for task, stratum, known in zip(tasks, stats.stratum_I.tolist(), stats.known_OI.T.tolist(), strict=True)]))


def read(workdir: str) -> Split | None:
  """None where there is none, as of runs of older versions. Raises ValueError where it cannot be read."""
  path = os.path.join(workdir, FILE)
  try:
    lines = rollouts.unpacked(path)
    if not lines:
      raise ValueError('it is empty')
    columns = [[line[name] for line in lines] for name in ('id', 'source', 'difficulty', 'stratum', 'known')]
    if not all(isinstance(x, str) for column in columns[:2] for x in column):
      raise TypeError('an id or a source is no text')
    return Split(*columns[:2], np.array(columns[2], np.int64), np.array(columns[3], np.int32),
                 np.array(columns[4], float).reshape(len(lines), 2).T)
  except FileNotFoundError:
    return None
  except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
    raise ValueError(f'{path} cannot be read: {error!r}') from error


def groups(record: Mapping[str, Any], num_tasks: int | None = None) -> Groups | None:
  """The groups of a step's record; None where it has none, or what cannot be such.

  num_tasks: rows of the split; None: any.
  """
  columns = [record.get(f'group_{name}') for name in ('index', 'budget', 'right', 'verified')]
  if not all(isinstance(column, list) and len(column) == len(columns[0] or ()) for column in columns):
    return None
  if not all(type(x) is int and 0 <= x < 2 ** 40 for column in columns for x in column):
    return None
  found = Groups(*(np.array(column, np.int64) for column in columns))
  within = num_tasks is None or (found.index_M < num_tasks).all()
  is_sound = (found.right_M <= found.verified_M).all() and (found.verified_M <= found.budget_M).all()
  return found if within and is_sound and len(np.unique(found.index_M)) == len(found.index_M) else None


def replay(split: Split, of_steps: Sequence[Groups], *, pass_discount: float, recalibration_groups: int
           ) -> types.TaskStats:
  """The statistics after some steps, of which posteriors are those of the run; tokens and rewards are not in them.

  Args:
    of_steps: of all steps from the first on, in their order.
    recalibration_groups: `groups` of estimate.init.
  """
  learnt = [found for found in of_steps if found.verified_M.any()]  # train.py learns nothing of the others
  stats = estimate.init(len(split.id_I), groups=0, stratum_I=split.stratum_I)._replace(known_OI=split.known_OI)
  for i, found in enumerate(learnt):
    if i == max(0, len(learnt) - _FITTED):
      stats = stats._replace(forecast_H4=np.zeros((recalibration_groups, 4)))
    task_R = np.repeat(np.arange(len(found.index_M)), found.verified_M)
    first_M = np.cumsum(found.verified_M) - found.verified_M
    verdict_R = (np.arange(len(task_R)) < (first_M + found.right_M)[task_R]).astype(float)
    stats = estimate.observe(stats, found.index_M, task_R, verdict_R, np.zeros(len(task_R)), discount=pass_discount)
  return stats
