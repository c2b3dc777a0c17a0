"""Attention of packed rows, and rotary positions.

    context_t = sum_s softmax_s(q_t k_s / sqrt(H)) v_s,   s <= t of the segment of t, at most `window` tokens

A row holds several sequences one after the other, its segments. `masked` is the plain form; `splash` is JAX's
TPU kernel, whose memory is linear in the length of a row. `packed` chooses.

Rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 34) rotate the pairs (i, i + H/2), as published
checkpoints do, and not neighbours as in the paper.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from kr_jax import sharding
from kr_jax.types import Array

_TILE = 128  # tokens; the TPU kernel reads rows in blocks of one, two or four tiles


def frequencies(theta: float, head_width: int, scaling: tuple[float, ...] = ()) -> np.ndarray:
  """Radians a position of each pair: theta^(-2i/H), float32 [H/2].

  Args:
    scaling: () for none. (factor,) divides all frequencies by the factor. (factor, low, high, context) is
      Llama 3.1's published code: frequencies below `low` rotations in a context are divided by the factor,
      frequencies above `high` rotations stay, and between them both are mixed.
  """
  frequency_H = theta ** (-2 * np.arange(head_width // 2) / head_width)
  if scaling:
    factor, *bounds = scaling
    kept_H = np.zeros(head_width // 2)
    if bounds:
      low, high, context = bounds
      kept_H = np.clip((context * frequency_H / (2 * np.pi) - low) / (high - low), 0, 1)
    frequency_H *= kept_H + (1 - kept_H) / factor
  return frequency_H.astype(np.float32)


class RopeTable(NamedTuple):
  """Cosines and signed sines of the angles at some positions: [B, T, 1, 2, H/2], float32."""

  cos: Array
  sin: Array  # negative for the first of a pair


def rope_table(position_BT: Array, frequency_H: np.ndarray) -> RopeTable:
  """The table of these positions, which all layers of a kind share.

  Without the barrier XLA computes the table again in each layer, which takes a CPU longer than the rotation.
  """
  angle_BT11H = position_BT[..., None, None, None].astype(jnp.float32) * frequency_H[None, None, None, None]
  cos, sin = jnp.cos(angle_BT11H), jnp.sin(angle_BT11H)
  return jax.lax.optimization_barrier(
      RopeTable(jnp.concatenate([cos, cos], axis=3), jnp.concatenate([-sin, sin], axis=3)))


def rope(x_BTNH: Array, table: RopeTable) -> Array:
  """Rotates the pairs (i, i + H/2) by position * frequency."""
  x_BTN2H = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], 2, -1)
  rotated_BTN2H = x_BTN2H * table.cos + jnp.flip(x_BTN2H, axis=3) * table.sin
  return rotated_BTN2H.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


def by_kind(is_local: bool | Array, local: Any, full: Any) -> Any:
  """Of two trees of arrays the one for the kind of a layer: of local layers, or of those that read all."""
  if isinstance(is_local, bool):
    return local if is_local else full
  return jax.tree.map(functools.partial(jnp.where, is_local), local, full)


def packed(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array, *, window: int = 0,
           is_local: bool | Array = False) -> Array:
  """Each token's attention to its own segment, up to the token itself.

  Args:
    segment_BT: int32; a segment is contiguous.
    window: tokens that a local layer reads at the most, the token itself among them.
    is_local: whether this layer is local; an array where layers are scanned.

  Returns:
    context_BTNH.
  """
  # On a TPU [T, T] scores of long rows would not fit, and the kernel skips blocks that are masked as a whole.
  attend = _splash_on_mesh if sharding.platform() == 'tpu' else masked
  full, local = (functools.partial(attend, window=size) for size in (0, window))
  if isinstance(is_local, bool):
    return (local if is_local else full)(q_BTNH, k_BTKH, v_BTKH, segment_BT)
  return jax.lax.cond(is_local, local, full, q_BTNH, k_BTKH, v_BTKH, segment_BT)


def masked(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array, window: int = 0) -> Array:
  """The plain form: scores of all pairs of tokens, and a mask. window: 0 is none."""
  T = segment_BT.shape[1]
  same_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]
  age_TT = jnp.arange(T)[:, None] - jnp.arange(T)[None]
  read_TT = (age_TT >= 0) & (age_TT < (window or T))
  context_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=(same_BTT & read_TT[None])[:, None])
  return checkpoint_name(context_BTNH, 'attention')


def splash(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array, window: int = 0, *,
           interpret: bool = False) -> Array:
  """JAX's TPU kernel, for rows of any length. window: 0 is none. interpret: runs on a CPU, for tests."""
  length, N, H = q_BTNH.shape[1:]
  T = -(-length // _TILE) * _TILE
  # The kernel takes whole tiles: padding has a segment of its own, and is cut off below.
  pad = lambda x, value=0: jnp.pad(x, [(0, 0), (0, T - length)] + [(0, 0)] * (x.ndim - 2), constant_values=value)
  q_BTNH, k_BTKH, v_BTKH, segment_BT = pad(q_BTNH), pad(k_BTKH), pad(v_BTKH), pad(segment_BT, -1)
  block = max(size for size in (_TILE, 2 * _TILE, 4 * _TILE) if T % size == 0)
  mask = splash_attention.LocalMask((T, T), (window - 1, 0), 0) if window else splash_attention.CausalMask((T, T))
  kernel = splash_attention.make_splash_mha(
      splash_attention.MultiHeadMask([mask] * N), head_shards=1, q_seq_shards=1,
      block_sizes=splash_attention.BlockSizes(
          block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block),
      residual_checkpoint_name='attention', interpret=interpret)
  heads_first = lambda x_BTNH: jnp.einsum('btnh->bnth', x_BTNH)
  of_row = lambda q, k, v, segment: kernel(q, k, v, splash_attention.SegmentIds(q=segment, kv=segment))
  context_BNTH = jax.vmap(of_row)(
      heads_first(q_BTNH) * H ** -0.5, heads_first(k_BTKH), heads_first(v_BTKH), segment_BT)
  return jnp.einsum('bnth->btnh', context_BNTH)[:, :length]


def _splash_on_mesh(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array, window: int) -> Array:
  """`splash`; each device of the mesh computes its own rows and heads."""
  copies = sharding.head_copies(k_BTKH.shape[2])
  k_BTKH, v_BTKH = (jnp.repeat(x, copies, axis=2) for x in (k_BTKH, v_BTKH))
  attend = functools.partial(splash, window=window)
  if jax.sharding.get_abstract_mesh().empty:
    return attend(q_BTNH, k_BTKH, v_BTKH, segment_BT)
  row_axes = sharding.unmapped(sharding.ROWS) or None
  rows, heads = PartitionSpec(row_axes), PartitionSpec(row_axes, None, 'model')
  of_device = jax.shard_map(attend, in_specs=(heads, heads, heads, rows), out_specs=heads,
                            axis_names=set(sharding.unmapped(sharding.AXES)), check_vma=False)
  return of_device(q_BTNH, k_BTKH, v_BTKH, segment_BT)
