"""Rollouts of any length -> microbatches of one shape.

A rollout that is kept becomes a segment of a row: its prompt and its completion without the last token, which
nothing reads. In a segment of a completion of c tokens, each of the last c tokens predicts one token of the
completion. These c tokens are the rollout's own. The tokens before them are the same in the whole group: they
are the shared ones.

With prompt sharing a microbatch has two layouts. Its B shards hold T tokens each, and all but attention is
computed on these. Attention alone reads rows of whole segments, with one position for each token of each
segment. A group's shared tokens are computed once in a shard, and stand at many positions of its rows. Without
prompt sharing a shard is a row, and T the length of the row.

Tasks are packed one after the other, the task with the longest segment first, and the segments of a task
longest first. A segment goes into the first shard that has its prompt already and room for the rest, or else
into the first shard with room for all of it.

A mini-batch is what one optimiser step learns from: whole tasks, in microbatches of its own. Let L be the
greatest length of a segment, and k = min(T // L, rows (row_length // L)), so that every shard takes at least
k segments. A shard without room for a further segment holds at least k of them. Hence n rollouts need at most
ceil(n / k) shards, or ceil(n / (k B)) microbatches, and R rollouts in m mini-batches need at most
(R + m (k B - 1)) // (k B) microbatches. This is the one static shape that all steps have in common.
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
  """The shape of a microbatch of `microbatch_rows` rows on each device.

  Args:
    prompt_length, completion_length: P and C, the longest.
    rollouts_per_task: the mean.
    row_length: tokens of a row.
    microbatch_rows: rows of each device.
    prompt_sharing: the share of the rows' tokens that is computed when groups share their prompts. 1: no prompt
      is shared. 0: the share that rollouts of full length need, or 1 where that is above 0.75.
    shards: devices that the rows are spread over. Each has prompts of its own.

  Raises:
    ValueError: the longest segment does not fit into a row.
  """
  longest = prompt_length + completion_length - 1
  if longest > row_length:
    raise ValueError(f'pack.row_length={row_length} is below the {longest} tokens that a prompt and '
                     'its completion, without the last token, may have; set it to at least that')
  if not prompt_sharing:
    n = max(rollouts_per_task, 1)
    prompt_sharing = (prompt_length - 1 + n * completion_length) / (n * longest)
    prompt_sharing = prompt_sharing if prompt_sharing <= 0.75 else 1
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


def assign(task_R: np.ndarray, length_R: np.ndarray, keep_R: np.ndarray, *, minibatches: int
           ) -> np.ndarray:
  """minibatch_R: each rollout's mini-batch, or -1 for a rollout that is not kept.

  Tasks stay whole. The task with the most tokens comes first, and each task goes into the mini-batch with the
  fewest tokens so far, so that all mini-batches have about as many.
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


class _Shards(NamedTuple):
  """The contents of all Z shards of a step, of T tokens and G rows of S positions each. Packing fills them."""

  rollout_ZT: np.ndarray
  position_ZT: np.ndarray
  place_ZT: np.ndarray
  segment_ZGS: np.ndarray
  source_ZGS: np.ndarray
  computed_Z: np.ndarray  # tokens in use
  filled_ZG: np.ndarray  # positions of each row in use


def segments(task_R: np.ndarray, shared_R: np.ndarray, own_R: np.ndarray, minibatch_R: np.ndarray, *,
             minibatches: int, microbatches: int, shape: Shape) -> Packed:
  """Packs the rollouts of each mini-batch.

  Args:
    task_R: int, the task of each rollout.
    shared_R: int, tokens at the beginning of each segment that are the same in its whole task.
    own_R: int, the tokens after them.
    minibatch_R: int, as `assign` returns it.
    minibatches: number of mini-batches.
    microbatches: number of microbatches to return, at least `max_microbatches`.
    shape: of a microbatch.

  Raises:
    ValueError: a rollout fits into none of the microbatches.
  """
  if not shape.shared:  # each rollout is then like a task of its own, with nothing in common
    own_R = shared_R + own_R
    task_R, shared_R = np.arange(len(own_R)), np.zeros_like(own_R)
  shards = _empty_shards(microbatches * shape.shards, shape)
  first = np.zeros(minibatches + 1, np.int32)
  for u in range(minibatches):
    first_shard = first[u] * shape.shards
    rollouts = _order(np.asarray(task_R), shared_R + own_R, np.flatnonzero(minibatch_R == u))
    _pack_minibatch(shards, rollouts, task_R, shared_R, own_R, first_shard, shape)
    shards_in_use = np.count_nonzero(shards.computed_Z[first_shard:])
    first[u + 1] = first[u] + math.ceil(shards_in_use / shape.shards)

  def by_microbatch(x_ZX):
    return x_ZX.reshape(microbatches, shape.shards, x_ZX.shape[-1])

  def rows_by_microbatch(x_ZGS):
    return x_ZGS.reshape(microbatches, shape.shards * shape.rows, shape.row_length)

  rows = Rows(rows_by_microbatch(shards.segment_ZGS), rows_by_microbatch(shards.source_ZGS),
              by_microbatch(shards.place_ZT)) if shape.shared else None
  return Packed(Microbatch(by_microbatch(shards.rollout_ZT), by_microbatch(shards.position_ZT), rows), first)


def _empty_shards(Z: int, shape: Shape) -> _Shards:
  tokens, positions = (Z, shape.tokens), (Z, shape.rows, shape.row_length)
  return _Shards(
      rollout_ZT=np.full(tokens, -1, np.int32), position_ZT=np.zeros(tokens, np.int32),
      place_ZT=np.zeros(tokens, np.int32), segment_ZGS=np.full(positions, -1, np.int32),
      source_ZGS=np.zeros(positions, np.int32), computed_Z=np.zeros(Z, np.int32),
      filled_ZG=np.zeros((Z, shape.rows), np.int32))


def _order(task_R: np.ndarray, length_R: np.ndarray, rollouts: np.ndarray) -> np.ndarray:
  """Rollouts task by task, longest first in both; stable, so that the order is the same on every machine."""
  rollouts = rollouts[np.argsort(-length_R[rollouts], kind='stable')]
  _, first_of_task, task = np.unique(task_R[rollouts], return_index=True, return_inverse=True)
  return rollouts[np.argsort(first_of_task[task], kind='stable')]


def _pack_minibatch(shards: _Shards, rollouts: np.ndarray, task_R: np.ndarray, shared_R: np.ndarray,
                    own_R: np.ndarray, first_shard: int, shape: Shape) -> None:
  """Packs rollouts, which come task by task, into the shards from the first on."""
  task = None
  for r in rollouts:
    if task_R[r] != task:
      task, prompts = task_R[r], {}  # {shard: the indices of the shared tokens in it}
    shared, n = shared_R[r], shared_R[r] + own_R[r]
    z = _find_shard(shards, prompts, shared, n, first_shard, shape)
    if z is None:
      raise ValueError(
          f'rollout {r} of {n} tokens fits none of {len(shards.computed_Z) - first_shard} times {shape.rows} rows '
          f'of {shape.row_length}, {shape.tokens} tokens computed; pass more microbatches')
    g = int(np.argmax(shards.filled_ZG[z] + n <= shape.row_length))
    begin = shards.filled_ZG[z, g]
    place = g * shape.row_length + begin + np.arange(n)
    if z not in prompts:
      prompts[z] = _compute(shards, z, r, np.arange(shared), place[:shared])
    own = _compute(shards, z, r, np.arange(shared, n), place[shared:])
    shards.segment_ZGS[z, g, begin:begin + n] = r
    shards.source_ZGS[z, g, begin:begin + n] = np.concatenate([prompts[z], own])
    shards.filled_ZG[z, g] += n


def _find_shard(shards: _Shards, prompts: dict[int, np.ndarray], shared: int, n: int, first_shard: int,
                shape: Shape) -> int | None:
  """The shard for a segment of n tokens; None where no shard has room."""
  free_tokens_Z = shape.tokens - shards.computed_Z
  free_positions_Z = shape.row_length - shards.filled_ZG.min(axis=1)  # of the emptiest row
  for z in sorted(prompts):
    if n - shared <= free_tokens_Z[z] and n <= free_positions_Z[z]:
      return z
  fits_Z = (n <= free_tokens_Z) & (n <= free_positions_Z)
  fits_Z[:first_shard] = False
  return int(np.argmax(fits_Z)) if fits_Z.any() else None


def _compute(shards: _Shards, z: int, r: int, position: np.ndarray, place: np.ndarray) -> np.ndarray:
  """Adds tokens of rollout r to those that shard z computes, and returns their indices there."""
  begin = shards.computed_Z[z]
  index = begin + np.arange(len(position))
  shards.rollout_ZT[z, index] = r
  shards.position_ZT[z, index] = position
  shards.place_ZT[z, index] = place
  shards.computed_Z[z] += len(position)
  return index


def waste(packed: Packed) -> dict[str, float]:
  """The share of padding in the microbatches in use; 0 if none is.

  Returns:
    padding_waste, among the tokens that are computed; attention_waste, among the positions of the rows.
  """
  def padding(rollout_IBX):
    used_IBX = rollout_IBX[:packed.first[-1]]
    return 1 - np.count_nonzero(used_IBX >= 0) / used_IBX.size if used_IBX.size else 0.0

  m = packed.microbatches
  return {'padding_waste': padding(m.rollout_BT),
          'attention_waste': padding(m.rows.segment_GS if m.rows else m.rollout_BT)}
