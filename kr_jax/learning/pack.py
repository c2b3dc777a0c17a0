"""Rollouts of any length -> microbatches of one shape.

A kept rollout is a segment of a row: its prompt, and its completion but for the last token, which
nothing reads. Its last c tokens are its own, and each of them predicts one token of its completion of
c. The tokens before are the same in its whole group, so they need computing once.

So a microbatch has two shapes: B shards of T tokens that are computed, and rows of whole segments that
attention alone reads, with a place for each token of each segment. Within a shard a group's prompt is
computed once and stands in many places. Without sharing, a shard is a row, and T its length.

Tasks are packed one after the other, that of the longest segment first, and their segments longest
first: into the first shard with room that has their prompt already, or else the first with room.

A mini-batch is what one optimiser step learns from: whole tasks, in microbatches of its own. Let k be
the segments of the greatest length L that a shard surely takes, min(T // L, rows (row_length // L)):
one that has no room for a segment holds k of them or more. Hence n rollouts need at most ceil(n / k)
shards and ceil(n / (k B)) microbatches, and R of them in m mini-batches at most
(R + m (k B - 1)) // (k B), which is the one static shape all steps share.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kr_jax.types import Array, Rows


class Shape(NamedTuple):
  """What a microbatch holds."""

  shards: int  # B: they have no prompt in common
  rows: int  # of each shard
  row_length: int
  tokens: int  # T of each shard, that are computed
  shared: bool  # whether a prompt's tokens are computed once for all its rollouts in a shard


class Microbatch(NamedTuple):
  """The tokens that are computed."""

  rollout_BT: Array  # int32, which rollout a token belongs to; a shared one: any; -1 is padding
  position_BT: Array  # int32, its position in the rollout's prompt and completion
  rows: Rows | None  # None: those are the rows, and the rollouts the segments


class Packed(NamedTuple):
  """All microbatches of a step."""

  microbatches: Microbatch  # each array has an axis for them in front
  first: Array  # int32 [minibatches + 1], the first microbatch of each mini-batch, and their end


def shape(*, prompt_length: int, completion_length: int, rollouts_per_task: float, row_length: int,
          microbatch_rows: int, prompt_sharing: float, shards: int) -> Shape:
  """Of a microbatch of `microbatch_rows` rows for each of the devices that rows are spread over.

  Args:
    prompt_length, completion_length: P and C, of the longest.
    rollouts_per_task: the mean.
    prompt_sharing: share of the rows' tokens that are computed, as groups share their prompts; 1: all, none
      is shared; 0: what full lengths give, and 1 where that is above 0.75.
    shards: those devices: each has prompts of its own.

  Raises ValueError for a row that the longest segment does not fit in.
  """
  longest = prompt_length + completion_length - 1
  if longest > row_length:
    raise ValueError(f'pack.row_length={row_length} is below the {longest} tokens that a prompt and '
                     'its completion, but for the last, may have; set it to at least that')
  if not prompt_sharing:
    n = max(rollouts_per_task, 1)
    prompt_sharing = (prompt_length - 1 + n * completion_length) / (n * longest)
    prompt_sharing = prompt_sharing if prompt_sharing <= 0.75 else 1
  if prompt_sharing == 1:
    return Shape(shards * microbatch_rows, 1, row_length, row_length, False)
  # A multiple of what a tile of bfloat16 has of rows.
  tokens = max(16 * math.ceil(prompt_sharing * microbatch_rows * row_length / 16), longest)
  return Shape(shards, microbatch_rows, row_length, min(tokens, microbatch_rows * row_length), True)


def max_microbatches(num_rollouts: int, longest: int, *, minibatches: int, shape: Shape) -> int:
  """Microbatches that R segments of at most `longest` tokens need at the most."""
  of_shard = min(shape.tokens // longest, shape.rows * (shape.row_length // longest))
  least = of_shard * shape.shards
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


def segments(task_R: np.ndarray, shared_R: np.ndarray, own_R: np.ndarray, minibatch_R: np.ndarray, *,
             minibatches: int, microbatches: int, shape: Shape) -> Packed:
  """Packs the rollouts of each mini-batch.

  Args:
    shared_R: tokens at the beginning of each segment that are the same in its whole task.
    own_R: the tokens after them.
    minibatch_R: as of `assign`.
    microbatches: to return, at least `max_microbatches`.
  """
  Z, T, S = microbatches * shape.shards, shape.tokens, shape.row_length
  task_R, length_R = np.asarray(task_R), shared_R + own_R
  rollout_ZT, position_ZT = np.full((Z, T), -1, np.int32), np.zeros((Z, T), np.int32)
  segment_ZGS = np.full((Z, shape.rows, S), -1, np.int32)
  source_ZGS, place_ZT = np.zeros_like(segment_ZGS), np.zeros_like(rollout_ZT)
  computed_Z, filled_ZG = np.zeros(Z, np.int32), np.zeros((Z, shape.rows), np.int32)
  first = np.zeros(minibatches + 1, np.int32)

  def compute(z, r, position, place):
    """The shard's indices of tokens new to it."""
    index = computed_Z[z] + np.arange(len(position))
    rollout_ZT[z, index], position_ZT[z, index], place_ZT[z, index] = r, position, place
    computed_Z[z] += len(position)
    return index

  for u in range(minibatches):
    begin, task = first[u] * shape.shards, None
    for r in _order(task_R, length_R, np.flatnonzero(minibatch_R == u), by_task=shape.shared):
      shared, n = (shared_R[r] if shape.shared else 0), length_R[r]
      if task != task_R[r]:
        task, prompts = task_R[r], {}  # by shard, where the prompt's tokens are
      known_Z = shape.shared & np.isin(np.arange(begin, Z), list(prompts))
      room_Z = ((computed_Z[begin:] + np.where(known_Z, n - shared, n) <= T)
                & (filled_ZG[begin:].min(axis=1, initial=S) + n <= S))
      if not room_Z.any():
        raise ValueError(f'rollout {r} of {n} tokens fits none of {Z - begin} times {shape.rows} rows '
                         f'of {S}, {T} tokens computed')
      z = begin + int(np.argmax(room_Z & known_Z if np.any(room_Z & known_Z) else room_Z))
      g = int(np.argmax(filled_ZG[z] + n <= S))
      at, position = filled_ZG[z, g] + np.arange(n), np.arange(n)
      place = g * S + at
      if z not in prompts:
        prompts[z] = compute(z, r, position[:shared], place[:shared])
      own = compute(z, r, position[shared:], place[shared:])
      segment_ZGS[z, g, at] = r
      source_ZGS[z, g, at] = np.concatenate([prompts[z], own])
      filled_ZG[z, g] += n
    first[u + 1] = first[u] - -np.count_nonzero(computed_Z[begin:]) // shape.shards
  by_microbatch = lambda x, rows: x.reshape(microbatches, shape.shards * rows, x.shape[-1])
  rows = Rows(by_microbatch(segment_ZGS, shape.rows), by_microbatch(source_ZGS, shape.rows),
              by_microbatch(place_ZT, 1)) if shape.shared else None
  return Packed(Microbatch(by_microbatch(rollout_ZT, 1), by_microbatch(position_ZT, 1), rows), first)


def _order(task_R: np.ndarray, length_R: np.ndarray, which: np.ndarray, *, by_task: bool) -> np.ndarray:
  """Longest first, task by task or all together; stable, so that it is the same on every machine."""
  which = which[np.argsort(-length_R[which], kind='stable')]
  if not by_task:
    return which
  _, first, task = np.unique(task_R[which], return_index=True, return_inverse=True)
  return which[np.argsort(first[task], kind='stable')]


def waste(packed: Packed) -> dict[str, float]:
  """Share of padding in the microbatches in use; 0 if there are none.

  Returns: padding_waste, among the tokens computed, and attention_waste, among the places of rows.
  """
  m = packed.microbatches
  share = lambda used: 1 - np.count_nonzero(used >= 0) / used.size if used.size else 0.0
  of_rows = m.rows.segment_GS if m.rows else m.rollout_BT
  return {'padding_waste': share(m.rollout_BT[:packed.first[-1]]),
          'attention_waste': share(of_rows[:packed.first[-1]])}
