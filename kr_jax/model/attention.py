"""Attention of packed rows, and rotary positions.

    context_t = sum_s softmax_s(q_t k_s / sqrt(H)) v_s,   s <= t of the segment of t, at most `window` tokens

A row holds several sequences one after the other, its segments. `masked` is the plain form; `splash` is JAX's
TPU kernel, whose memory is linear in the length of a row. `packed` chooses.

Rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 34) rotate the pairs (i, i + H/2), as published
checkpoints do, and not neighbours as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Scaling(NamedTuple):
  """How a checkpoint changes the frequencies of its rotations, so that positions beyond its training are known ones.

  The divisor of a frequency is between 1, for pairs that turn often in the original context, and `factor`.
  """

  kind: str  # 'linear', 'llama3', 'yarn' or 'longrope'
  factor: float = 1.0
  low: float = 0.0  # turns in the context below which a frequency is divided; yarn: beta_slow
  high: float = 0.0  # turns above which it stays; yarn: beta_fast
  context: float = 0.0  # tokens, of the training before the change
  attention_factor: float = 1.0  # cosines and sines are multiplied by it
  truncate: bool = True  # yarn: whether the bounds are whole pairs
  divisors: tuple[float, ...] = ()  # longrope: of each pair
  long_divisors: tuple[float, ...] = ()  # longrope: those of sequences beyond the context, which are not in force


def frequencies(theta: float, rope_width: int, scaling: Scaling | None = None) -> np.ndarray:
  """Radians a position of each pair: theta^(-2i/W) of W numbers that rotate, float32 [W/2], after the scaling.

    linear    all are divided by the factor
    llama3    the share that stays rises linearly with a frequency's turns in the context (Llama 3.1's code)
    yarn      the share that stays falls linearly with the pair's number (Peng et al. 2023, arXiv 2309.00071, sec. 3.2)
    longrope  each has its own divisor (Ding et al. 2024, arXiv 2402.13753)
  """
  pair_H = np.arange(rope_width // 2)
  frequency_H = theta ** (-2 * pair_H / rope_width)
  if scaling is None:
    return frequency_H.astype(np.float32)
  kept_H = np.zeros(len(pair_H))
  if scaling.kind == 'longrope':
    return (frequency_H / np.array(scaling.divisors)).astype(np.float32)
  if scaling.kind == 'llama3':
    turns_H = scaling.context * frequency_H / (2 * np.pi)
    kept_H = np.clip((turns_H - scaling.low) / (scaling.high - scaling.low), 0, 1)
  if scaling.kind == 'yarn':
    # The pair, a fraction, that turns so often in the context.
    first, last = (rope_width * np.log(scaling.context / (turns * 2 * np.pi)) / (2 * np.log(theta))
                   for turns in (scaling.high, scaling.low))
    if scaling.truncate:
      first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0), min(last, rope_width - 1)
    kept_H = 1 - np.clip((pair_H - first) / (last - first or 0.001), 0, 1)
  return (frequency_H * (kept_H + (1 - kept_H) / scaling.factor)).astype(np.float32)


class RopeTable(NamedTuple):
  """Cosines and signed sines of the angles at some positions: [B, T, 1, 2, W/2], float32."""

  cos: Array
  sin: Array  # negative for the first of a pair


def rope_table(position_BT: Array, frequency_H: np.ndarray, factor: float = 1.0) -> RopeTable:
  """The table of these positions, times a factor, which all layers of a kind share.

  Without the barrier XLA computes the table again in each layer, which takes a CPU longer than the rotation.
  """
  angle_BT11H = position_BT[..., None, None, None].astype(jnp.float32) * frequency_H[None, None, None, None]
  cos, sin = factor * jnp.cos(angle_BT11H), factor * jnp.sin(angle_BT11H)
  return jax.lax.optimization_barrier(
      RopeTable(jnp.concatenate([cos, cos], axis=3), jnp.concatenate([-sin, sin], axis=3)))


def rope(x_BTNH: Array, table: RopeTable) -> Array:
  """Rotates the pairs (i, i + W/2) of the first W numbers of each head by position * frequency."""
  width = 2 * table.cos.shape[-1]
  turning, rest = x_BTNH[..., :width], x_BTNH[..., width:]
  x_BTN2H = turning.astype(jnp.float32).reshape(*turning.shape[:-1], 2, -1)
  rotated_BTN2H = x_BTN2H * table.cos + jnp.flip(x_BTN2H, axis=3) * table.sin
  rotated = rotated_BTN2H.reshape(turning.shape).astype(x_BTNH.dtype)
  return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def of_kind(kind: int | Array, options: Sequence[Any]) -> Any:
  """Of trees of arrays, one a kind of layer, the one for this kind; `kind` is an array where layers are scanned."""
  if isinstance(kind, int):
    return options[kind]
  return jax.tree.map(lambda *x: functools.reduce(
      lambda chosen, i: jnp.where(kind == i, x[i], chosen), range(1, len(x)), x[0]), *options)


def packed(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array, *, windows: Sequence[int] = (0,),
           kind: int | Array = 0) -> Array:
  """Each token's attention to its own segment, up to the token itself.

  Args:
    segment_BT: int32; a segment is contiguous.
    windows: of each kind of layer, tokens that it reads at the most, the token itself among them; 0: all.
    kind: of this layer; an array where layers are scanned.

  Returns:
    context_BTNH.
  """
  # On a TPU [T, T] scores of long rows would not fit, and the kernel skips blocks that are masked as a whole.
  attend = _splash_on_mesh if sharding.platform() == 'tpu' else masked
  of_window = {window: functools.partial(attend, window=window) for window in windows}
  if isinstance(kind, int) or len(of_window) == 1:
    return of_window[windows[kind if isinstance(kind, int) else 0]](q_BTNH, k_BTKH, v_BTKH, segment_BT)
  which = of_kind(kind, [jnp.array(list(of_window).index(window)) for window in windows])
  return jax.lax.switch(which, list(of_window.values()), q_BTNH, k_BTKH, v_BTKH, segment_BT)


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
