"""Rollouts of any length -> rows of one length, first-fit decreasing.

Each kept rollout is one segment (prompt and completion) of one row. Rows stay int32 maps (which
rollout, which of its tokens); the update gathers tokens by them on the device.

Every row but the last holds at least k = T // longest segments: a segment opens a row only when no
row has room, so each holds more than T - longest. Hence R rollouts need at most ceil(R / k) rows,
which is the one static shape all steps share.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
  """Rows of segments; what a row has left is padding."""

  rollout_BT: np.ndarray  # int32, which rollout a token belongs to; -1 is padding
  position_BT: np.ndarray  # int32, its position in the rollout's prompt and completion
  num_rows: np.ndarray  # int32 scalar, rows in use; the rest is padding


def max_rows(num_rollouts: int, longest: int, row_length: int) -> int:
  """Rows that R segments of at most `longest` tokens need at the most.

  Raises ValueError if a row cannot hold the longest segment.
  """
  if longest > row_length:
    raise ValueError(f'pack.row_length={row_length} is below the {longest} tokens that a prompt '
                     'and its completion may have; set it to at least that')
  return -(-num_rollouts // (row_length // longest))


def rows(length_R: np.ndarray, keep_R: np.ndarray, *, num_rows: int, row_length: int) -> Packed:
  """Packs the rollouts to keep.

  Args:
    length_R: prompt and completion tokens of each rollout.
    keep_R: bool, the rollouts to pack.
    num_rows: B, rows to return, at least `max_rows`.
    row_length: T.
  """
  rollout_BT = np.full((num_rows, row_length), -1, np.int32)
  position_BT = np.zeros((num_rows, row_length), np.int32)
  used_B = np.zeros(num_rows, np.int32)
  # Stable, so that equal lengths keep their order on every machine.
  for r in np.argsort(-length_R, kind='stable'):
    if keep_R[r]:
      n = int(length_R[r])
      b = int(np.argmax(used_B + n <= row_length))
      if used_B[b] + n > row_length:
        raise ValueError(f'rollout {r} of {n} tokens fits none of {num_rows} rows of {row_length}')
      rollout_BT[b, used_B[b]:used_B[b] + n] = r
      position_BT[b, used_B[b]:used_B[b] + n] = np.arange(n)
      used_B[b] += n
  return Packed(rollout_BT, position_BT, np.array(np.count_nonzero(used_B), np.int32))
