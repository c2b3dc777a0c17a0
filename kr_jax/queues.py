"""Which shard samples which rollouts, in which order, and where the prompts that they continue stand.

Arrays of the host: nothing here compiles, and what budgets change is data.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Queues(NamedTuple):
  """The rollouts of each of Z shards, in the order they are taken."""

  task_ZK: np.ndarray  # int32, the tasks whose prefix the shard holds; beyond its own: any
  tasks_Z: np.ndarray  # int32, how many
  local_ZQ: np.ndarray  # int32, of each rollout the task, in 0..K-1
  number_ZQ: np.ndarray  # int32, which of its task's rollouts it is
  rollouts_Z: np.ndarray  # int32, how many

  @property
  def task_ZQ(self) -> np.ndarray:
    """Of each rollout the task."""
    return np.take_along_axis(self.task_ZK, self.local_ZQ, axis=1)


def assign_to_queues(budget_M: np.ndarray, *, total: int, shards: int = 1, expected_M: np.ndarray | None = None
                     ) -> Queues:
  """Gives each shard an equal number of rollouts, to within one, of ceil(M / shards) + 1 tasks at most.

  Shards take their rollouts one after the other. Of n pieces of tasks that are left for Z shards, a shard takes
  ceil(n / Z) that are neighbours by size, the smallest neighbours that hold its share or more, and gives back the
  excess of the largest, which is less than all of it. So each shard adds at most one piece, and ceil(n / Z) stays
  within the limit.

  Args:
    budget_M: >= 0.
    total: R, which gives the shapes; the budgets sum to at most that.
    expected_M: tokens that a rollout of a task is expected to have: the longest are queued first.
  """
  budget_M = np.asarray(budget_M)
  M, n = len(budget_M), int(budget_M.sum())
  K = M if shards == 1 else min(M, math.ceil(M / shards) + 1)
  Q = math.ceil(total / shards)
  queues = Queues(*(np.zeros(shape, np.int32) for shape in ((shards, K), shards, (shards, Q), (shards, Q), shards)))
  left = [(int(b), m, 0) for m, b in enumerate(budget_M) if b > 0]  # size, task, first number
  for z in range(shards):
    share = n // shards + (1 if z < n % shards else 0)
    mine, left = _take(sorted(left), share, most=math.ceil(len(left) / (shards - z)))
    task_K = [m for _, m, _ in mine]
    local_Q = np.repeat(np.arange(len(mine)), [size for size, _, _ in mine])
    number_Q = np.concatenate([first + np.arange(size) for size, _, first in mine] or [[]])
    if expected_M is not None:
      order_Q = np.argsort(-np.asarray(expected_M)[task_K][local_Q], kind='stable')
      local_Q, number_Q = local_Q[order_Q], number_Q[order_Q]
    queues.task_ZK[z, :len(mine)], queues.tasks_Z[z] = task_K, len(mine)
    queues.local_ZQ[z, :share], queues.number_ZQ[z, :share] = local_Q, number_Q
    queues.rollouts_Z[z] = share
  return queues


def _take(pieces: list[tuple[int, int, int]], share: int, most: int) -> tuple[list, list]:
  """Of pieces by size, at most so many that hold `share` rollouts; and the pieces that are left."""
  if not share:
    return [], pieces
  size = np.cumsum([0] + [piece[0] for piece in pieces])
  first = int(np.argmax(size[most:] - size[:-most] >= share))
  mine, left = pieces[first:first + most], pieces[:first] + pieces[first + most:]
  excess = sum(piece[0] for piece in mine) - share
  while excess >= mine[-1][0]:  # even the smallest are too many
    left.append(mine.pop(0))
    excess -= left[-1][0]
  if excess:
    n, m, number = mine.pop()
    mine.append((n - excess, m, number))
    left.append((excess, m, number + n - excess))
  return sorted(mine, key=lambda piece: piece[1:]), left


def hold_all(queues: Queues, num_tasks: int) -> Queues:
  """The same rollouts of shards that hold the prefixes of all tasks: of those without a rollout where a place is left.

  There is one for each. Either a shard has M places, or there are Z more than tasks: and as each shard but the last
  splits one task at most, rollouts take Z - 1 more than they have tasks.
  """
  task_ZK, tasks_Z = queues.task_ZK.copy(), queues.tasks_Z.copy()
  is_held_ZK = np.arange(task_ZK.shape[1])[None] < tasks_Z[:, None]
  idle = np.setdiff1d(np.arange(num_tasks), task_ZK[is_held_ZK])
  z, k = (x[:len(idle)] for x in np.nonzero(~is_held_ZK))
  task_ZK[z, k] = idle
  np.add.at(tasks_Z, z, 1)
  return queues._replace(task_ZK=task_ZK, tasks_Z=tasks_Z)


def places(queues: Queues, num_tasks: int, *, width: int) -> np.ndarray:
  """place_M, int32: where a task's prefix is held, counted over shards of `width` places each; 0 where nowhere."""
  z, k = np.nonzero(np.arange(queues.task_ZK.shape[1])[None] < queues.tasks_Z[:, None])
  place_M = np.zeros(num_tasks, np.int32)
  place_M[queues.task_ZK[z, k]] = z * width + k
  return place_M
