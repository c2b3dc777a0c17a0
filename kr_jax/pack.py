"""Rollouts of any length -> rows of one length, first-fit decreasing; rows -> microbatches.

Each kept rollout is one segment (prompt and completion) of one row. Rows stay int32 maps (which
rollout, which of its tokens); the update gathers tokens by them on the device.

A mini-batch is what one optimiser step learns from: whole tasks, in microbatches of its own. With k =
row_length // longest, every row of a mini-batch but its last holds at least k segments: a segment
opens a row only when no row has room, so each holds more than row_length - longest. Hence n rollouts
need at most ceil(n / k) rows and ceil(n / (k B)) microbatches, and R of them in m mini-batches at most
(R + m (k B - 1)) // (k B), which is the one static shape all steps share.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
  """Rows of segments, B to a microbatch; what a row has left is padding."""

  rollout_BT: np.ndarray  # int32, which rollout a token belongs to; -1 is padding
  position_BT: np.ndarray  # int32, its position in the rollout's prompt and completion
  first: np.ndarray  # int32 [minibatches + 1], the first microbatch of each mini-batch, and their end


def segments_per_row(longest: int, row_length: int) -> int:
  """Segments of `longest` tokens that fit in a row.

  Raises ValueError if there are none.
  """
  if longest > row_length:
    raise ValueError(f'pack.row_length={row_length} is below the {longest} tokens that a prompt '
                     'and its completion may have; set it to at least that')
  return row_length // longest


def max_microbatches(num_rollouts: int, longest: int, *, minibatches: int, row_length: int,
                     microbatch_rows: int) -> int:
  """Microbatches that R segments of at most `longest` tokens need at the most.

  Raises ValueError if a row cannot hold the longest segment.
  """
  least = segments_per_row(longest, row_length) * microbatch_rows
  return (num_rollouts + minibatches * (least - 1)) // least


def assign(task_R: np.ndarray, length_R: np.ndarray, keep_R: np.ndarray, *, minibatches: int
           ) -> np.ndarray:
  """minibatch_R: each rollout's mini-batch, or -1 for one that is not kept.

  Tasks stay whole. The longest comes first, into the mini-batch with the fewest tokens so far, so
  that all have about as many.
  """
  task_R = np.asarray(task_R)
  tokens_M = np.bincount(task_R, weights=np.where(keep_R, length_R, 0),
                         minlength=max(task_R, default=0) + 1)
  minibatch_M, filled = np.full(len(tokens_M), -1), np.zeros(minibatches)
  for m in np.argsort(-tokens_M, kind='stable'):
    if tokens_M[m] > 0:
      minibatch_M[m] = np.argmin(filled)
      filled[minibatch_M[m]] += tokens_M[m]
  return np.where(keep_R, minibatch_M[task_R], -1)


def rows(length_R: np.ndarray, minibatch_R: np.ndarray, *, minibatches: int, microbatches: int,
         microbatch_rows: int, row_length: int) -> Packed:
  """Packs the rollouts of each mini-batch.

  Args:
    length_R: prompt and completion tokens of each rollout.
    minibatch_R: as of `assign`.
    microbatches: to return, at least `max_microbatches`.
    microbatch_rows: B.
    row_length: T.
  """
  shape = microbatches * microbatch_rows, row_length
  rollout_BT, position_BT = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
  used_B = np.zeros(len(rollout_BT), np.int32)
  first = np.zeros(minibatches + 1, np.int32)
  # Stable, so that equal lengths keep their order on every machine.
  longest_first_R = np.argsort(-length_R, kind='stable')
  for u in range(minibatches):
    begin = first[u] * microbatch_rows
    for r in longest_first_R[minibatch_R[longest_first_R] == u]:
      n = int(length_R[r])
      room_B = used_B[begin:] + n <= row_length
      if not room_B.any():
        raise ValueError(f'rollout {r} of {n} tokens fits none of {len(room_B)} rows of {row_length}')
      b = begin + int(np.argmax(room_B))
      rollout_BT[b, used_B[b]:used_B[b] + n] = r
      position_BT[b, used_B[b]:used_B[b] + n] = np.arange(n)
      used_B[b] += n
    first[u + 1] = first[u] - -np.count_nonzero(used_B[begin:]) // microbatch_rows
  return Packed(rollout_BT, position_BT, first)


def waste(packed: Packed, microbatch_rows: int) -> float:
  """Share of padding among the tokens of the microbatches in use; 0 if there are none."""
  computed = int(packed.first[-1]) * microbatch_rows * packed.rollout_BT.shape[1]
  return 1 - np.count_nonzero(packed.rollout_BT >= 0) / computed if computed else 0.0
