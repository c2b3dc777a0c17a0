"""Decoding attention on a TPU: columns of the cache that a slot does not read are neither fetched nor computed.

The grid is (slots, blocks of columns). A step reads a block of columns of all key/value heads of a row, so that
it moves megabytes. The G = N / K query heads of a key/value head stand side by side in one product. Maxima, sums
and contexts are carried from block to block in float32.

The row that a slot reads, and its columns, are prefetched as scalars. A block is live if the slot reads one of
its columns. Slots come in the order of their rows: if several slots read the same row of a single live block,
the block is fetched once. A slot has as many steps as a row has blocks. Its steps after the last live block
point at the first block of the next slot in use, which is thus fetched while the last live block is computed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from kr_jax.kernels.chip import LOW, dot


class Plan(NamedTuple):
  """What each position in the grid's first dimension reads: int32 [S]."""

  slot: jax.Array
  row: jax.Array
  first: jax.Array  # column
  length: jax.Array  # columns from the first on; column 0 follows the last
  block: jax.Array  # the first live block
  blocks: jax.Array  # live blocks
  next_row: jax.Array  # of the block that the steps after the live blocks point at
  next_block: jax.Array


def schedule(row_S: jax.Array | None, first_S: jax.Array, length_S: jax.Array, T: int, block_T: int) -> Plan:
  """The slots in the order of their rows (None: slot s reads row s), and their blocks.

  Without a next slot in use, the steps after the live blocks point at the last live block of all. So each live
  block of a slot is fetched at most once, and no other block unless all slots are free. Where two cores share the
  slots (v4, v5p), one block more is fetched.
  """
  S, blocks = length_S.shape[0], pl.cdiv(T, block_T)
  position_S = jnp.arange(S, dtype=jnp.int32)
  slot_S = position_S if row_S is None else jnp.argsort(row_S).astype(jnp.int32)
  row_S, first_S, length_S = (slot_S if row_S is None else row_S[slot_S]), first_S[slot_S], length_S[slot_S]
  begin_S, end_S = first_S // block_T, (first_S + length_S - 1) % T // block_T
  wraps_S = first_S + length_S > T  # then the last block may be the first block too
  live_S = jnp.where(length_S > 0, jnp.minimum(end_S - begin_S + 1 + blocks * wraps_S, blocks), 0)
  in_use_from_S = jax.lax.cummin(jnp.where(live_S > 0, position_S, S), reverse=True)
  next_S = jnp.concatenate([in_use_from_S[1:], jnp.full(1, S, jnp.int32)])
  last = jnp.max(jnp.where(live_S > 0, position_S, 0))
  last_block = (begin_S[last] + jnp.maximum(live_S[last] - 1, 0)) % blocks
  follows_S, next_S = next_S < S, jnp.where(next_S < S, next_S, last)
  return Plan(slot_S, row_S, first_S, length_S, begin_S, live_S, row_S[next_S],
              jnp.where(follows_S, begin_S[next_S], last_block))


def source(s, t, blocks: int, plan: Plan):
  """The row and the block that step (s, t) finds in VMEM. blocks: of a row."""
  live = t < plan.blocks[s]
  return (jnp.where(live, plan.row[s], plan.next_row[s]),
          jnp.where(live, (plan.block[s] + t) % blocks, plan.next_block[s]))


def _attend(*refs, T: int, dtype: Any):
  """Adds one block of columns to the running maximum, sum and context of each query head."""
  plan = Plan(*refs[:len(Plan._fields)])
  q_ref, k_ref, v_ref, *scales, context_ref, lse_ref, max_ref, sum_ref, total_ref = refs[len(plan):]
  s, t = pl.program_id(0), pl.program_id(1)
  block_T, H = k_ref.shape[1:]
  _, block = source(s, t, pl.num_programs(1), plan)
  column, first, length = block * block_T, plan.first[s], plan.length[s]
  # In a block that holds the first column and also columns before it, the age here is above T - block_T.
  age = jnp.where(column >= first, column - first, column - first + T)
  whole = (age + block_T <= length) & (column + block_T <= T)

  @pl.when(t == 0)
  def _():
    max_ref[...] = jnp.full_like(max_ref, LOW)
    for ref in (sum_ref, total_ref):
      ref[...] = jnp.zeros_like(ref)

  def step(masked: bool):
    def where_live(x, axis: int, dead):
      if not masked:
        return x
      column_T = column + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
      age_T = jnp.where(column_T >= first, column_T - first, column_T - first + T)
      return jnp.where((age_T < length) & (column_T < T), x, dead)

    z = dot(q_ref[...].astype(dtype), k_ref[...].astype(dtype), (2, 2)) * H ** -0.5
    if scales:
      z *= scales[0][...][:, None]
    z = where_live(z, 2, LOW)
    old_max = max_ref[...]
    new_max = jnp.maximum(old_max, z.max(axis=2, keepdims=True))
    scale_old, exp = jnp.exp(old_max - new_max), jnp.exp(z - new_max)
    max_ref[...] = new_max
    sum_ref[...] = scale_old * sum_ref[...] + exp.sum(axis=2, keepdims=True)
    v = v_ref[...].astype(dtype)
    if scales:  # an integer is finite in every column, a scale need not be
      exp = where_live(exp * scales[1][...][:, None], 2, 0)
    else:
      v = where_live(v, 1, jnp.zeros((), dtype))
    total_ref[...] = scale_old * total_ref[...] + dot(exp.astype(dtype), v, (2, 1))

  live = t < plan.blocks[s]
  pl.when(live & whole)(lambda: step(False))
  pl.when(live & ~whole)(lambda: step(True))

  @pl.when(t == pl.num_programs(1) - 1)
  def _():
    # The sum is at least 1, the exponential at the maximum. Sum and total of a free slot are 0.
    at_least_1 = jnp.maximum(sum_ref[...], 1)
    context_ref[...] = total_ref[...] / at_least_1
    lse_ref[...] = max_ref[...] + jnp.log(at_least_1)


def attend(q_SKGH: jax.Array, k_YKTH: jax.Array, v_YKTH: jax.Array, row_S: jax.Array | None,
           first_row: jax.Array | int, first_S: jax.Array, length_S: jax.Array, *scale_YKT: jax.Array, block_T: int,
           interpret: Any = False) -> tuple[jax.Array, jax.Array]:
  """The context of each query head, and the log of the sum of exponentials that it was divided by.

  Args:
    q_SKGH: bfloat16 or float32.
    k_YKTH, v_YKTH: bfloat16, float32 or int8, of Y rows.
    row_S: int32, the row that a slot reads; None: slot s reads row s. first_row is the row of the Y that counts as 0.
    first_S, length_S: int32 in 0..T-1 and 0..T, the columns that a slot reads; column 0 follows the last.
    scale_YKT: float32, the scales of k and of v if these are int8; else none.
    block_T: columns of a block: T, or a multiple of 128.
    interpret: False, or pltpu.InterpretParams to run where there is no TPU.

  Returns:
    context_SKGH and lse_SKG1, float32; zeros and LOW where the length is 0.
  """
  (S, K, G, H), T = q_SKGH.shape, k_YKTH.shape[2]
  # XLA would move a small cache to VMEM first, all of it.
  k_YKTH, v_YKTH, *scale_YKT = (
      pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k_YKTH, v_YKTH, *scale_YKT))
  dtype = q_SKGH.dtype if scale_YKT else jnp.promote_types(q_SKGH.dtype, k_YKTH.dtype)
  blocks = pl.cdiv(T, block_T)
  plan = schedule(row_S, first_S, length_S, T, block_T)
  plan = plan._replace(row=first_row + plan.row, next_row=first_row + plan.next_row)

  def at(s, t, *plan):
    row, block = source(s, t, blocks, Plan(*plan))
    return row, 0, block, 0

  of_slot = lambda width: pl.BlockSpec((None, K, G, width), lambda s, t, *plan: (Plan(*plan).slot[s], 0, 0, 0))
  columns = pl.BlockSpec((None, K, block_T, H), at)
  scales = pl.BlockSpec((None, K, block_T), lambda *args: at(*args)[:3])
  return pl.pallas_call(
      functools.partial(_attend, T=T, dtype=dtype),
      out_shape=[jax.ShapeDtypeStruct((S, K, G, width), jnp.float32) for width in (H, 1)],
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=len(Plan._fields),
          grid=(S, blocks),
          in_specs=[of_slot(H), columns, columns, *[scales] * len(scale_YKT)],
          out_specs=[of_slot(H), of_slot(1)],
          scratch_shapes=[pltpu.VMEM((K, G, width), jnp.float32) for width in (1, 1, H)]),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
      interpret=interpret,
      name='decode_attention',
  )(*plan, q_SKGH, k_YKTH, v_YKTH, *scale_YKT)
