"""Rollouts of any length -> microbatches of one shape.

A rollout that is kept becomes a segment of a row: its prompt and its completion without the last token, which
nothing reads. Of a completion of c tokens, each of the segment's last c tokens, the rollout's own, predicts one. The
tokens before them are the same in the whole group: they are the shared ones.

With prompt sharing, all but attention is computed on the T tokens of each of B shards. Attention alone reads rows of
whole segments. A group's shared tokens are computed once in a shard, and stand at many positions of its rows.
Without prompt sharing a shard is a row, and T the length of the row.

Tasks are packed one after the other, the task with the longest segment first, and the segments of a task longest
first. A segment goes into the first shard that has its prompt already and room for the rest, or else into the first
shard with room for all of it.

A mini-batch is what one optimiser step learns from: whole tasks, in microbatches of its own. With segments of at most
L tokens, a shard without room for a further segment holds at least k = min(T // L, rows (row_length // L)) of them.
Hence n rollouts need at most ceil(n / (k B)) microbatches, and R rollouts in m mini-batches at most
(R + m (k B - 1)) // (k B). This is the one static shape that all steps have in common.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kr_jax.types import Array, Rows


class Shape(NamedTuple):
  """The shape of a microbatch."""

  shards: int  # B: they have no prompt in common
  rows: int  # of each shard
  row_length: int
  tokens: int  # T, the tokens of a shard that are computed
  shared: bool  # whether a prompt's tokens are computed once for all its rollouts in a shard


class Microbatch(NamedTuple):
  """The tokens that are computed, and the rows that attention reads."""

  rollout_BT: Array  # int32, the rollout a token belongs to; of a shared token any of its group; -1 is padding
  position_BT: Array  # int32, the token's position in the rollout's prompt and completion
  rows: Rows | None  # None without prompt sharing: then the B shards are the rows


class Packed(NamedTuple):
  """All microbatches of a step."""

  microbatches: Microbatch  # each array has an axis of microbatches in front
  first: Array  # int32 [minibatches + 1]: the first microbatch of each mini-batch, and the end of the last


def shape(*, prompt_length: int, completion_length: int, rollouts_per_task: float, row_length: int,
          microbatch_rows: int, prompt_sharing: float, shards: int) -> Shape:
  """The shape of a microbatch.

  Args:
    prompt_length, completion_length: P and C, the longest.
    rollouts_per_task: the mean.
    row_length, microbatch_rows: tokens of a row, and rows of each device.
    prompt_sharing: the share of the rows' tokens that is computed when groups share their prompts. 1: no prompt is
      shared. 0: the share that rollouts of full length need, or 1 where this share is above 0.75.
    shards: devices that the rows are spread over.

  Raises:
    ValueError: the longest segment does not fit into a row.
  """
  longest = prompt_length + completion_length - 1
  if longest > row_length:
    raise ValueError(f'pack.row_length={row_length} is below the {longest} tokens that a prompt and '
                     'its completion, without the last token, may have; set it to at least that')
  if not prompt_sharing:
    n = max(rollouts_per_task, 1)
    share = (prompt_length - 1 + n * completion_length) / (n * longest)
    prompt_sharing = share if share <= 0.75 else 1
  if prompt_sharing == 1:
    return Shape(shards * microbatch_rows, 1, row_length, row_length, False)
  # A tile of bfloat16 has 16 rows.
  tokens = max(16 * math.ceil(prompt_sharing * microbatch_rows * row_length / 16), longest)
  return Shape(shards, microbatch_rows, row_length, min(tokens, microbatch_rows * row_length), True)


def max_microbatches(num_rollouts: int, longest: int, *, minibatches: int, shape: Shape) -> int:
  """The most microbatches that R segments of at most `longest` tokens can need."""
  per_shard = min(shape.tokens // longest, shape.rows * (shape.row_length // longest))
  per_microbatch = per_shard * shape.shards
  return (num_rollouts + minibatches * (per_microbatch - 1)) // per_microbatch


def assign(task_R: np.ndarray, length_R: np.ndarray, keep_R: np.ndarray, *, minibatches: int) -> np.ndarray:
  """minibatch_R: each rollout's mini-batch, or -1 for a rollout that is not kept.

  Tasks stay whole. The task with the most tokens comes first, and each task goes into the mini-batch with the
  fewest tokens so far, so that all mini-batches have about as many.
  """
  task_R = np.asarray(task_R)
  tokens_M = np.bincount(task_R, np.where(keep_R, length_R, 0), minlength=max(task_R, default=0) + 1)
  minibatch_M, filled = np.full(len(tokens_M), -1), np.zeros(minibatches)
  for m in np.argsort(-tokens_M, kind='stable'):
    if tokens_M[m] > 0:
      minibatch_M[m] = np.argmin(filled)
      filled[minibatch_M[m]] += tokens_M[m]
  return np.where(keep_R, minibatch_M[task_R], -1)


def segments(task_R: np.ndarray, shared_R: np.ndarray, own_R: np.ndarray, minibatch_R: np.ndarray, *,
             minibatches: int, microbatches: int, shape: Shape) -> Packed:
  """Packs the rollouts of each mini-batch.

  Args:
    task_R: int, the task of each rollout.
    shared_R, own_R: int, tokens at the beginning of a segment that are the same in its whole task, and tokens after.
    minibatch_R: int, as `assign` returns it.
    minibatches, microbatches: their numbers; `max_microbatches` are always enough.

  Raises:
    ValueError: a rollout fits into none of the microbatches.
  """
  if not shape.shared:  # each rollout is then like a task of its own, with nothing in common
    own_R = shared_R + own_R
    task_R, shared_R = np.arange(len(own_R)), np.zeros_like(own_R)
  task_R = np.asarray(task_R)
  shards = _Shards(microbatches * shape.shards, shape)
  first = np.zeros(minibatches + 1, np.int32)
  for u in range(minibatches):
    first_shard, prompts_of_task = first[u] * shape.shards, {}
    for r in _order(task_R, shared_R + own_R, np.flatnonzero(minibatch_R == u)):
      shards.add(r, shared_R[r], shared_R[r] + own_R[r], prompts_of_task.setdefault(task_R[r], {}), first_shard)
    shards_in_use = np.count_nonzero(shards.computed_Z[first_shard:])
    first[u + 1] = first[u] + math.ceil(shards_in_use / shape.shards)

  def by_microbatch(x_ZX):
    """The shards of a microbatch side by side: [microbatches, rows or shards, tokens]."""
    return x_ZX.reshape(microbatches, shape.shards * math.prod(x_ZX.shape[1:-1]), x_ZX.shape[-1])

  rows = Rows(*map(by_microbatch, (shards.segment_ZGS, shards.source_ZGS, shards.place_ZT))) if shape.shared else None
  return Packed(Microbatch(by_microbatch(shards.rollout_ZT), by_microbatch(shards.position_ZT), rows), first)


def _order(task_R: np.ndarray, length_R: np.ndarray, rollouts: np.ndarray) -> np.ndarray:
  """Rollouts task by task, longest first in both; stable, so that the order is the same on every machine."""
  rollouts = rollouts[np.argsort(-length_R[rollouts], kind='stable')]
  _, first_of_task, task = np.unique(task_R[rollouts], return_index=True, return_inverse=True)
  return rollouts[np.argsort(first_of_task[task], kind='stable')]


class _Shards:
  """The contents of all Z shards of a step, of T tokens and G rows of S positions each, which `add` fills."""

  def __init__(self, Z: int, shape: Shape):
    tokens, positions = (Z, shape.tokens), (Z, shape.rows, shape.row_length)
    self.shape = shape
    self.rollout_ZT = np.full(tokens, -1, np.int32)
    self.position_ZT, self.place_ZT = np.zeros((2, *tokens), np.int32)
    self.segment_ZGS = np.full(positions, -1, np.int32)
    self.source_ZGS = np.zeros(positions, np.int32)
    self.computed_Z = np.zeros(Z, np.int32)  # tokens in use
    self.filled_ZG = np.zeros((Z, shape.rows), np.int32)  # positions of each row in use

  def add(self, r: int, shared: int, n: int, prompts: dict[int, np.ndarray], first_shard: int) -> None:
    """Packs a rollout of n tokens. prompts: {shard: where it computes the shared tokens of the rollout's task}."""
    z = self._find(r, shared, n, prompts, first_shard)
    g = int(np.argmax(self.filled_ZG[z] + n <= self.shape.row_length))
    begin = self.filled_ZG[z, g]
    place = g * self.shape.row_length + begin + np.arange(n)
    if z not in prompts:
      prompts[z] = self._compute(z, r, np.arange(shared), place[:shared])
    own = self._compute(z, r, np.arange(shared, n), place[shared:])
    self.segment_ZGS[z, g, begin:begin + n] = r
    self.source_ZGS[z, g, begin:begin + n] = np.concatenate([prompts[z], own])
    self.filled_ZG[z, g] += n

  def _find(self, r: int, shared: int, n: int, prompts: dict[int, np.ndarray], first_shard: int) -> int:
    """The shard for a rollout of n tokens."""
    shape = self.shape
    free_tokens_Z = shape.tokens - self.computed_Z
    free_positions_Z = shape.row_length - self.filled_ZG.min(axis=1)  # of the emptiest row
    for z in sorted(prompts):
      if n - shared <= free_tokens_Z[z] and n <= free_positions_Z[z]:
        return z
    fits_Z = (n <= free_tokens_Z) & (n <= free_positions_Z)
    fits_Z[:first_shard] = False
    if not fits_Z.any():
      raise ValueError(f'rollout {r} of {n} tokens fits none of {len(fits_Z) - first_shard} times {shape.rows} rows '
                       f'of {shape.row_length}, {shape.tokens} tokens computed; pass more microbatches')
    return int(np.argmax(fits_Z))

  def _compute(self, z: int, r: int, position: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Adds tokens of rollout r to those that shard z computes, and returns their indices there."""
    index = self.computed_Z[z] + np.arange(len(position))
    self.rollout_ZT[z, index] = r
    self.position_ZT[z, index] = position
    self.place_ZT[z, index] = place
    self.computed_Z[z] += len(position)
    return index


def waste(packed: Packed) -> dict[str, float]:
  """Shares of padding in the microbatches in use, or 0: of tokens that are computed, and of positions of the rows."""
  def padding(rollout_IBX):
    used_IBX = rollout_IBX[:packed.first[-1]]
    return 1 - np.count_nonzero(used_IBX >= 0) / used_IBX.size if used_IBX.size else 0.0

  m = packed.microbatches
  return {'padding_waste': padding(m.rollout_BT),
          'attention_waste': padding(m.rows.segment_GS if m.rows else m.rollout_BT)}


def positions(packed: Packed) -> tuple[int, int]:
  """Tokens that the microbatches in use compute, and positions of them that are padding."""
  used_IBT = packed.microbatches.rollout_BT[:packed.first[-1]]
  computed = int(np.count_nonzero(used_IBT >= 0))
  return computed, used_IBT.size - computed
