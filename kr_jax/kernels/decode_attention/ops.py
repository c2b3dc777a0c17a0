"""Attention of one decoding step: every slot's query over the columns of the cache that it has filled.

Heads stand before time in the cache, so that a head's keys lie together. A step reads each live
column once and multiplies it by the few query heads that share it: memory alone decides the time.

How a column is written decides how XLA for TPUs lays the cache out. With an index for the slot, the
head and the column, as in

    k_SKTH.at[jnp.arange(S)[:, None], jnp.arange(K)[None], column_S[:, None]].set(new_SKH)

it lies as the kernel reads it. With `.at[slot_S, :, column_S]` time comes to stand before the heads,
and a loop of decoding steps copies the whole cache at each of them.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from kr_jax.kernels.decode_attention import kernel
from kr_jax.kernels.decode_attention import tiles

AXES = ('data', 'fsdp', 'model')
_ROWS = ('data', 'fsdp')  # the axes that slots are sharded over; heads are over 'model'


def attend(q_SNH: jax.Array, k_SKTH: jax.Array, v_SKTH: jax.Array, length_S: jax.Array,
           *scale_SKT: jax.Array) -> jax.Array:
  """The context, for CPU and GPU: all columns are read, and the dead ones must be finite.

  One product of a matrix and a vector for each of the G query heads of a key/value head: with G = 1
  as fast as two CPU cores read memory, and faster than products of matrices with G = 2, 3 and 4.
  Milliseconds with S = 128, N = 4 G, K = 4, T = 128, H = 64, float32, 34 MB, the least of 15:
            vectors   matrices   sums of products   values masked too   copying the cache
    G = 1   1.9       1.9        3.3                2.9                 2.4
    G = 2   5.1       6.8        9.2                8.1                 2.9
    G = 4   6.9       7.9        9.1                9.1                 2.8
  """
  (S, N, H), (K, T) = q_SNH.shape, k_SKTH.shape[1:3]

  def times(spec, x_SKG, y_SKTH):
    y_SKTH = y_SKTH.astype(jnp.float32)
    return jnp.stack([jnp.einsum(spec, x_SKG[:, :, g], y_SKTH, precision=jax.lax.Precision.HIGHEST)
                      for g in range(N // K)], axis=2)

  q_SKGH = q_SNH.astype(jnp.float32).reshape(S, K, N // K, H)
  z_SKGT = times('skh,skth->skt', q_SKGH, k_SKTH) * H ** -0.5
  live_S11T = (jnp.arange(T)[None] < length_S[:, None])[:, None, None]
  if scale_SKT:
    z_SKGT *= scale_SKT[0][:, :, None]
  z_SKGT = jnp.where(live_S11T, z_SKGT, kernel.LOW)
  p_SKGT = jnp.exp(z_SKGT - z_SKGT.max(axis=3, keepdims=True))
  p_SKGT /= p_SKGT.sum(axis=3, keepdims=True)
  if scale_SKT:
    p_SKGT *= scale_SKT[1][:, :, None]
  context_SNH = times('skt,skth->skh', p_SKGT, v_SKTH).reshape(S, N, H)
  return jnp.where((length_S > 0)[:, None, None], context_SNH, 0).astype(q_SNH.dtype)


def kernel_attend(q_SNH: jax.Array, k_SKTH: jax.Array, v_SKTH: jax.Array, length_S: jax.Array,
                  *scale_SKT: jax.Array, block_T: int, interpret=False) -> jax.Array:
  """As `attend`, by the kernel in blocks of block_T columns, whatever the dead ones hold."""
  (S, N, H), K = q_SNH.shape, k_SKTH.shape[1]
  context_SKGH = kernel.decode_attention(
      q_SNH.reshape(S, K, N // K, H), k_SKTH, v_SKTH, length_S, *scale_SKT, block_T=block_T,
      interpret=interpret)
  return context_SKGH.reshape(S, N, H)


# Jitted because outside a program every platform's branch would be compiled for this one.
@jax.jit
def _shard(q_SNH, k_SKTH, v_SKTH, length_S, *scale_SKT):
  """Of what is on one device, by the platform that the program is lowered for."""
  (N, H), (K, T) = q_SNH.shape[1:], k_SKTH.shape[1:3]
  args = q_SNH, k_SKTH, v_SKTH, jnp.clip(length_S, 0, T), *scale_SKT
  block_T = tiles.block(T, K, N // K, H, k_SKTH.dtype.itemsize)
  if block_T is None:
    return attend(*args)
  on_tpu = functools.partial(kernel_attend, block_T=block_T)
  return jax.lax.platform_dependent(*args, tpu=on_tpu, default=attend)


def decode_attention(q_SNH: jax.Array, k_SKTH: jax.Array, v_SKTH: jax.Array, length_S: jax.Array, *,
                     k_scale_SKT: jax.Array | None = None, v_scale_SKT: jax.Array | None = None
                     ) -> jax.Array:
  """softmax(q k / sqrt(H)) v over columns 0..length-1 of each slot, computed in float32.

  Query head n reads key/value head n // (N // K). Under a mesh with the axes 'data', 'fsdp' and
  'model' (jax.set_mesh) slots are split over the first two and heads over the last, however the
  arguments arrive; inside a jax.shard_map over some of the three, which needs check_vma=False, over
  the others.

  Args:
    q_SNH: bfloat16 or float32.
    k_SKTH, v_SKTH: bfloat16, float32 or int8, both alike. Columns from the length on may hold
      anything that is finite.
    length_S: int32, 1..T; 0: the slot is free, and on a TPU costs nothing. More than T is T.
    k_scale_SKT, v_scale_SKT: float32, of int8 only: a value is the integer times its scale.

  Returns:
    context_SNH in the dtype of q; zeros for a free slot.

  Raises:
    ValueError: shapes that do not fit, scales that are missing or of no use, or a mesh that does not
      divide S, N and K or has axes of type Explicit.
    TypeError: dtypes other than these.
  """
  args = [jnp.asarray(x) for x in (q_SNH, k_SKTH, v_SKTH, length_S)]
  _check(*args)
  scales = [None if x is None else jnp.asarray(x) for x in (k_scale_SKT, v_scale_SKT)]
  args += _check_scales(args[1], *scales)
  mesh = jax.sharding.get_abstract_mesh()
  types = dict(zip(mesh.axis_names, mesh.axis_types))
  auto = {axis for axis, kind in types.items() if kind != AxisType.Manual}
  if not set(AXES) <= set(types) or not auto:
    return _shard(*args)
  rows = tuple(axis for axis in _ROWS if axis in auto)
  model = 'model' if 'model' in auto else None
  _check_mesh(mesh, auto & set(AXES), rows, model, *args[0].shape[:2], args[1].shape[1])
  heads, slots = PartitionSpec(rows, model), PartitionSpec(rows)
  return jax.shard_map(
      _shard, mesh=mesh, axis_names=auto, out_specs=heads, check_vma=False,
      in_specs=tuple(slots if x.ndim == 1 else heads for x in args))(*args)


def _check(q_SNH, k_SKTH, v_SKTH, length_S) -> None:
  shapes = q, k, v, length = [x.shape for x in (q_SNH, k_SKTH, v_SKTH, length_S)]
  if ([len(shape) for shape in shapes] != [3, 4, 4, 1] or k != v or q[0] != k[0] or q[2] != k[3]
      or length != q[:1] or not q_SNH.size or not k_SKTH.size):
    raise ValueError('decode_attention needs q [S, N, H], k and v [S, K, T, H] and lengths [S], none '
                     f'of them empty, not the shapes {q}, {k}, {v} and {length}; heads stand before '
                     'time, and there is one query a slot')
  if q[1] % k[1]:
    raise ValueError(f'N={q[1]} query heads must be a multiple of K={k[1]} key/value heads; '
                     'use another number of heads')
  if q_SNH.dtype not in (jnp.float32, jnp.bfloat16):
    raise TypeError(f'q must be bfloat16 or float32, not {q_SNH.dtype}; cast it')
  if k_SKTH.dtype not in (jnp.float32, jnp.bfloat16, jnp.int8) or v_SKTH.dtype != k_SKTH.dtype:
    raise TypeError('k and v must both be bfloat16, both float32 or both int8, not '
                    f'{k_SKTH.dtype} and {v_SKTH.dtype}; cast one to the other')
  if length_S.dtype != jnp.int32:
    raise TypeError(f'lengths must be int32, not {length_S.dtype}; cast them')


def _check_scales(k_SKTH, *scales: jax.Array | None) -> list[jax.Array]:
  """Both, or none where there is none to be."""
  if k_SKTH.dtype != jnp.int8:
    if any(x is not None for x in scales):
      raise ValueError(f'k and v of {k_SKTH.dtype} have no scales; leave k_scale_SKT and v_scale_SKT '
                       'out, or pass int8')
    return []
  found = [None if x is None else x.shape for x in scales]
  if found != [k_SKTH.shape[:3]] * 2:
    raise ValueError(f'k and v of int8 need k_scale_SKT and v_scale_SKT, of shape {k_SKTH.shape[:3]}, '
                     f'not {found[0]} and {found[1]}; pass a scale for each slot, head and column')
  for x in scales:
    if x.dtype != jnp.float32:
      raise TypeError(f'scales must be float32, not {x.dtype}; cast them')
  return list(scales)


def _check_mesh(mesh, auto, rows, model, S: int, N: int, K: int) -> None:
  for name, size, axes in (('S', S, rows), ('N', N, (model,)), ('K', K, (model,))):
    axes = [axis for axis in axes if axis]
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if size % shards:
      raise ValueError(f'{name}={size} must be a multiple of {shards}, the size of the mesh over '
                       f'{" and ".join(axes)}; choose another {name} or another mesh')
  explicit = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types)
              if axis in auto and kind == AxisType.Explicit]
  if explicit:
    raise ValueError(f'axes {explicit} of the mesh must be of type Auto; pass axis_types to '
                     'jax.make_mesh')
