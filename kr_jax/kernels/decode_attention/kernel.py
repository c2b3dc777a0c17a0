"""Decoding attention on a TPU: of the cache, what is dead is neither computed nor fetched.

Grid (slots, blocks of columns). A step has a block of columns of all key/value heads of a slot,
so that it moves megabytes; the G = N / K query heads of one stand side by side in a product.
Maxima, sums and contexts are carried from block to block in float32.

The steps of a slot that are left when its live blocks are through point at the first block of the
next slot in use, which is thus fetched while the last live one is computed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

LOW = -1e30  # below every logit, and such that LOW - LOW is 0


def _dot(x, y, contract: tuple[int, int]):
  """Of a matrix for each head, over one dimension of each, in float32."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((0,), (0,))),
                             precision=precision, preferred_element_type=jnp.float32)


def sources(length_S: jax.Array, block_T: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """How many blocks of each slot live, and the slot and the block that its other steps point at.

  With a slot in use behind it that is its first block, else the last live block there is, which has
  been fetched by then. So every live block is fetched once, and no other unless all slots are free;
  where two cores part the slots (v4, v5p), one more.
  """
  S = length_S.shape[0]
  slot_S = jnp.arange(S, dtype=jnp.int32)
  blocks_S = (length_S + block_T - 1) // block_T
  from_here_S = jax.lax.cummin(jnp.where(blocks_S > 0, slot_S, S), reverse=True)
  next_S = jnp.concatenate([from_here_S[1:], jnp.full(1, S, jnp.int32)])
  last = jnp.max(jnp.where(blocks_S > 0, slot_S, 0))
  return (blocks_S, jnp.where(next_S < S, next_S, last),
          jnp.where(next_S < S, 0, jnp.maximum(blocks_S[last] - 1, 0)))


def source(s, t, blocks_S, slot_S, block_S):
  """The slot and the block that step (s, t) finds in VMEM."""
  live = t < blocks_S[s]
  return jnp.where(live, s, slot_S[s]), jnp.where(live, t, block_S[s])


def _attend(length_ref, blocks_ref, slot_ref, block_ref, q_ref, k_ref, v_ref, *refs, dtype: Any):
  """One block of columns into the running maximum, sum and context of each query head."""
  *scales, context_ref, max_ref, sum_ref, total_ref = refs
  s, t = pl.program_id(0), pl.program_id(1)
  block_T, H = k_ref.shape[1:]
  live = length_ref[s] - t * block_T

  @pl.when(t == 0)
  def _():
    max_ref[...] = jnp.full_like(max_ref, LOW)
    for ref in (sum_ref, total_ref):
      ref[...] = jnp.zeros_like(ref)

  def step(masked: bool):
    def where_live(x, axis: int, dead):
      if not masked:
        return x
      return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < live, x, dead)

    z = _dot(q_ref[...].astype(dtype), k_ref[...].astype(dtype), (2, 2)) * H ** -0.5
    if scales:
      z *= scales[0][...][:, None]
    z = where_live(z, 2, LOW)
    old_max = max_ref[...]
    new_max = jnp.maximum(old_max, z.max(axis=2, keepdims=True))
    scale_old, exp = jnp.exp(old_max - new_max), jnp.exp(z - new_max)
    max_ref[...] = new_max
    sum_ref[...] = scale_old * sum_ref[...] + exp.sum(axis=2, keepdims=True)
    v = v_ref[...].astype(dtype)
    if scales:  # integers are finite also where they are dead, their scales need not be
      exp = where_live(exp * scales[1][...][:, None], 2, 0)
    else:
      v = where_live(v, 1, jnp.zeros((), dtype))
    total_ref[...] = scale_old * total_ref[...] + _dot(exp.astype(dtype), v, (2, 1))

  pl.when(live >= block_T)(lambda: step(False))
  pl.when((live > 0) & (live < block_T))(lambda: step(True))

  @pl.when(t == pl.num_programs(1) - 1)
  def _():
    # The sum is at least 1, the exponential at the maximum; of a free slot both are 0.
    context_ref[...] = (total_ref[...] / jnp.maximum(sum_ref[...], 1)).astype(context_ref.dtype)


def decode_attention(q_SKGH: jax.Array, k_SKTH: jax.Array, v_SKTH: jax.Array, length_S: jax.Array,
                     *scale_SKT: jax.Array, block_T: int, interpret: Any = False) -> jax.Array:
  """The context of each query head.

  Args:
    q_SKGH: bfloat16 or float32.
    k_SKTH, v_SKTH: bfloat16, float32 or int8.
    length_S: int32 in 0..T.
    scale_SKT: of int8, the scales of k and of v in float32; else none.
    block_T: columns of a block: T, or a multiple of 128.
    interpret: False, or pltpu.InterpretParams to run where there is no TPU.

  Returns:
    context_SKGH in the dtype of q.
  """
  (S, K, G, H), T = q_SKGH.shape, k_SKTH.shape[2]
  # A small cache XLA would rather move to VMEM first, all of it.
  k_SKTH, v_SKTH, *scale_SKT = (
      pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k_SKTH, v_SKTH, *scale_SKT))
  dtype = q_SKGH.dtype if scale_SKT else jnp.promote_types(q_SKGH.dtype, k_SKTH.dtype)

  def at(s, t, _, *sources):
    s, t = source(s, t, *sources)
    return s, 0, t, 0

  def scale_at(s, t, _, *sources):
    s, t = source(s, t, *sources)
    return s, 0, t

  of_slot = pl.BlockSpec((None, K, G, H), lambda s, t, *_: (s, 0, 0, 0))
  columns = pl.BlockSpec((None, K, block_T, H), at)
  return pl.pallas_call(
      functools.partial(_attend, dtype=dtype),
      out_shape=jax.ShapeDtypeStruct((S, K, G, H), q_SKGH.dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=4,
          grid=(S, pl.cdiv(T, block_T)),
          in_specs=[of_slot, columns, columns,
                    *[pl.BlockSpec((None, K, block_T), scale_at) for _ in scale_SKT]],
          out_specs=of_slot,
          scratch_shapes=[pltpu.VMEM((K, G, 1), jnp.float32), pltpu.VMEM((K, G, 1), jnp.float32),
                          pltpu.VMEM((K, G, H), jnp.float32)]),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
      interpret=interpret,
      name='decode_attention',
  )(length_S, *sources(length_S, block_T), q_SKGH, k_SKTH, v_SKTH, *scale_SKT)
