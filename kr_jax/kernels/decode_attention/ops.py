"""Attention of one decoding step: every slot's query over its task's prompt and its own completion.

A prompt's keys and values are computed once and stand once, in a row of the prefix, which a slot refers to. So a
slot takes another rollout without a copy, and slots of one task read the same memory. The keys and values of the
completions stand in a ring of columns. At each step all slots write the same column, which is one slice, and a
slot reads the columns since it began. Keys hold their positions, so their order does not matter. The axis of heads
stands before the axis of time, so that a head's keys lie together.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kr_jax.kernels import chip
from kr_jax.kernels.decode_attention import kernel
from kr_jax.kernels.decode_attention import reference
from kr_jax.kernels.decode_attention import tiles

TOGETHER = 8  # slots of a task whose queries are multiplied by its prompt in one product, on a CPU
WINDOWS = 'windows'  # the name of the loops over these products, for whoever counts what they do


class _Part(NamedTuple):
  """Attention to some of the columns."""

  context_SKGH: jax.Array
  lse_SKG1: jax.Array  # the log of the sum of exponentials that the context was divided by


def _merge(parts: Sequence[_Part]) -> jax.Array:
  """context_SKGH of the columns of all parts."""
  lse_XSKG1 = jnp.stack([part.lse_SKG1 for part in parts])
  # Without the barrier XLA on a CPU computes each weight again for every number that it multiplies.
  weight_XSKG1 = jax.lax.optimization_barrier(jax.nn.softmax(lse_XSKG1, axis=0))
  return sum(weight_SKG1 * part.context_SKGH for weight_SKG1, part in zip(weight_XSKG1, parts))


def _weights(z_SKGT: jax.Array, live_ST: jax.Array, scale_SKT: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
  """softmax(z)_SKGT and lse_SKG1; without a live column, any finite numbers and about LOW.

  scale_SKT: of keys and of values, which are multiplied into z and the weights; or none.
  """
  if scale_SKT:
    z_SKGT *= scale_SKT[0][:, :, None]
  z_SKGT = jnp.where(live_ST[:, None, None], z_SKGT, chip.LOW)
  largest = z_SKGT.max(axis=3, keepdims=True)
  p_SKGT = jnp.exp(z_SKGT - largest)
  sum_SKG1 = p_SKGT.sum(axis=3, keepdims=True)
  p_SKGT /= sum_SKG1
  return p_SKGT * scale_SKT[1][:, :, None] if scale_SKT else p_SKGT, largest + jnp.log(sum_SKG1)


def _own(q_SKGH: jax.Array, live_ST: jax.Array, k_SKTH, v_SKTH, *scale_SKT) -> _Part:
  """The attention of each slot to its own columns.

  There is one product of a matrix and a vector for each of the G query heads of a key/value head. With G = 1
  it is as fast as two CPU cores read memory; with G = 2, 3 and 4 it is faster than products of matrices.
  Milliseconds with S = 128, N = 4 G, K = 4, T = 128, H = 64, float32, 34 MB, the least of 15:
            vectors   matrices   sums of products   values masked too   copying the cache
    G = 1   1.9       1.9        3.3                2.9                 2.4
    G = 2   5.1       6.8        9.2                8.1                 2.9
    G = 4   6.9       7.9        9.1                9.1                 2.8
  """
  def times(spec, x_SKG, y_SKTH):
    y_SKTH = y_SKTH.astype(jnp.float32)
    return jnp.stack([jnp.einsum(spec, x_SKG[:, :, g], y_SKTH, precision=jax.lax.Precision.HIGHEST)
                      for g in range(q_SKGH.shape[2])], axis=2)

  z_SKGT = times('skh,skth->skt', q_SKGH, k_SKTH)
  p_SKGT, lse_SKG1 = _weights(z_SKGT, live_ST, scale_SKT)
  return _Part(times('skt,skth->skh', p_SKGT, v_SKTH), lse_SKG1)


def _shared(q_SKGH: jax.Array, row_S: jax.Array, first_S: jax.Array, length_S: jax.Array, k_MKPH, v_MKPH,
            *scale_MKP) -> _Part:
  """The attention of each slot to some columns of a row that other slots may read too.

  Slots are sorted by their rows. A window is TOGETHER slots of one row, which are multiplied by the row in one
  product. A window may reach beyond the last slot of its row: the next window begins there and overwrites the rest.
  """
  (S, K, G, H), (M, _, P, _) = q_SKGH.shape, k_MKPH.shape
  row_S = jnp.where(length_S > 0, row_S, M)
  slot_S = jnp.argsort(row_S)
  slots_M = jnp.sum(row_S[None] == jnp.arange(M)[:, None], axis=1)
  windows_M = -(-slots_M // TOGETHER)
  end_M = jnp.cumsum(windows_M)
  first_M = jnp.cumsum(slots_M) - slots_M

  def times(spec, x_SKGY, y_MKPH, width):
    """The product of x of each slot and y of its row, [., width] for each head, in the order of slot_S."""
    x_KSGY = jnp.pad(jnp.moveaxis(x_SKGY, 1, 0), ((0, 0), (0, TOGETHER), (0, 0), (0, 0)))

    def window(i, out_KSGW):
      m = jnp.sum(end_M <= i)
      at = first_M[m] + (i - end_M[m] + windows_M[m]) * TOGETHER
      x_KXY = jax.lax.dynamic_slice_in_dim(x_KSGY, at, TOGETHER, axis=1).reshape(K, TOGETHER * G, -1)
      y_KPH = jax.lax.dynamic_index_in_dim(y_MKPH, m, keepdims=False).astype(jnp.float32)
      out_KXW = jnp.einsum(spec, x_KXY, y_KPH, precision=jax.lax.Precision.HIGHEST)
      out_KXGW = out_KXW.reshape(K, TOGETHER, G, width)
      return jax.lax.dynamic_update_slice_in_dim(out_KSGW, out_KXGW, at, axis=1)

    with jax.named_scope(WINDOWS):
      out_KSGW = jax.lax.fori_loop(0, end_M[-1], window, jnp.zeros((K, S + TOGETHER, G, width)))
    return jnp.moveaxis(out_KSGW[:, :S], 0, 1)

  z_SKGP = times('kxh,kph->kxp', q_SKGH[slot_S], k_MKPH, P)
  scale_SKP = [scale[jnp.minimum(row_S, M - 1)[slot_S]] for scale in scale_MKP]
  p_SKGP, lse_SKG1 = _weights(z_SKGP, reference.live(first_S, length_S, P)[slot_S], scale_SKP)
  context_SKGH = times('kxp,kph->kxh', p_SKGP, v_MKPH, H)
  back_S = jnp.argsort(slot_S)
  return _Part(context_SKGH[back_S], lse_SKG1[back_S])


def attend(q_SKGH, prefix, own, layer, row_S, prefix_first_S, prefix_length_S, first_S, length_S) -> jax.Array:
  """context_SKGH, for CPU and GPU. Chunks of the ring in which no slot has a column are not read."""
  prefix, own = jax.tree.map(lambda x: x[layer], (prefix, own))
  q_SKGH = q_SKGH.astype(jnp.float32) * q_SKGH.shape[3] ** -0.5
  parts = [_shared(q_SKGH, row_S, prefix_first_S, prefix_length_S, *prefix)]
  T = sum(chunk[0].shape[2] for chunk in own)
  live_ST, column = reference.live(first_S, length_S, T), 0
  nothing = _Part(jnp.zeros_like(q_SKGH), jnp.full_like(q_SKGH[..., :1], chip.LOW))
  for chunk in own:
    chunk_ST = live_ST[:, column:(column := column + chunk[0].shape[2])]
    read = functools.partial(jax.lax.cond, jnp.any(chunk_ST), _own, lambda *_: nothing) if len(own) > 1 else _own
    parts.append(read(q_SKGH, chunk_ST, *chunk))
  return _merge(parts)


def kernel_attend(q_SKGH, prefix, own, layer, row_S, prefix_first_S, prefix_length_S, first_S, length_S,
                  *, block=tiles.block, interpret=False) -> jax.Array:
  """As `attend`, by the kernel, which reads a layer where it stands among all layers, as a slice would be a copy.

  Columns that no slot reads may hold anything.
  """
  own = [jnp.concatenate(chunks, axis=3) for chunks in zip(*own)]  # a single chunk is not copied
  K, G, H = q_SKGH.shape[1:]

  def part(columns, row_S, *which):
    rows, dtype = columns[0].shape[1], columns[0].dtype
    k, v, *scales = (x.reshape(-1, *x.shape[2:]) for x in columns)
    block_T = block(k.shape[2], K, G, H, dtype.itemsize)
    return _Part(*kernel.attend(
        q_SKGH, k, v, row_S, layer * rows, *which, *scales, block_T=block_T, interpret=interpret))

  return _merge([part(prefix, row_S, prefix_first_S, prefix_length_S), part(own, None, first_S, length_S)])


# Jitted, as outside of a program the branches of all platforms would be compiled for this one.
@jax.jit
def _shard(q_SNH, prefix, own, layer, row_S, prefix_first_S, prefix_length_S, first_S, length_S):
  """The attention of what is on one device, by the platform that the program is lowered for."""
  (S, N, H), (M, K, P) = q_SNH.shape, prefix[0].shape[1:4]
  T = sum(chunk[0].shape[3] for chunk in own)
  row_S = jnp.clip(row_S, 0, M - 1)
  prefix_first_S = jnp.clip(prefix_first_S, 0, P - 1)
  prefix_length_S = jnp.clip(prefix_length_S, 0, P - prefix_first_S)
  length_S = jnp.clip(length_S, 0, T)
  args = (q_SNH.reshape(S, K, N // K, H), prefix, own, layer, row_S, prefix_first_S, prefix_length_S,
          first_S % T, length_S)
  if all(tiles.block(columns, K, N // K, H, prefix[0].dtype.itemsize) for columns in (P, T)):
    context_SKGH = jax.lax.platform_dependent(*args, tpu=kernel_attend, default=attend)
  else:
    context_SKGH = attend(*args)
  any_S = prefix_length_S + length_S > 0
  return jnp.where(any_S[:, None, None], context_SKGH.reshape(S, N, H), 0).astype(q_SNH.dtype)


def decode_attention(q_SNH: jax.Array, prefix: Sequence, own: Sequence[Sequence], row_S: jax.Array,
                     prefix_first_S: jax.Array, prefix_length_S: jax.Array, first_S: jax.Array,
                     length_S: jax.Array, *, layer: int | jax.Array | None = None) -> jax.Array:
  """softmax(q k / sqrt(H)) v over a slot's prompt and its completion, computed in float32.

  Query head n reads key/value head n // (N // K). Under a mesh with the axes of chip.AXES
  (jax.set_mesh) slots are split over 'data', 'fsdp' and 'expert' and heads over 'model', wherever the arguments are.
  The prefix is whole on each shard of slots. Inside a jax.shard_map over some of these axes, which needs
  check_vma=False, slots and heads are split over the other axes.

  Keys and values are (k, v) in bfloat16 or float32, or (k, v, k_scale, v_scale) with k and v in int8. The scales
  are float32, without the last axis: a value is the integer times its scale.

  Args:
    q_SNH: bfloat16 or float32.
    prefix: keys and values [M, K, P, H] of the prompts.
    own: keys and values [S, K, ., H] of the ring's T columns in one or more chunks. On a TPU several chunks are
      copied into one. Elsewhere a chunk is not read while no slot has a column in it.
    row_S: int32 in 0..M-1, the prompt that a slot continues.
    prefix_first_S: int32 in 0..P-1, the first column of the prompt that the slot reads: 0, except with a window.
    prefix_length_S: int32, the number of columns of the prompt it reads. Other columns may hold anything finite.
    first_S: int32, the column of the ring where a slot begins.
    length_S: int32 in 0..T, the number of columns of the ring it reads. A slot that reads no column is free.
    layer: which layer, where keys and values have an axis of layers in front. None: there is no such axis.

  Returns:
    context_SNH in the dtype of q; zeros for a free slot, which costs nothing on a TPU.

  Raises:
    ValueError: shapes that do not fit, scales that are missing or not needed, or a mesh that does not divide
      S, N and K or has axes of type Explicit.
    TypeError: other dtypes.
  """
  q_SNH, *of_slots = map(jnp.asarray, (q_SNH, row_S, prefix_first_S, prefix_length_S, first_S, length_S))
  prefix, *own = (tuple(jnp.asarray(x) for x in columns if x is not None) for columns in (prefix, *own))
  if layer is None:
    layer, (prefix, *own) = 0, jax.tree.map(lambda x: x[None], (prefix, *own))
  of_layer = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
  _check(q_SNH, jax.tree.map(of_layer, (prefix, *own)), of_slots)
  args = q_SNH, prefix, tuple(own), jnp.asarray(layer), *of_slots
  mesh = chip.mesh()
  rows, model = (chip.unsplit(mesh, axes) for axes in (chip.ROWS, ('model',))) if mesh is not None else ((), ())
  if not rows + model:
    return _shard(*args)
  (S, N, _), K = q_SNH.shape, prefix[0].shape[2]
  chip.check_mesh(mesh, ('S', S, rows), ('N', N, model), ('K', K, model))
  heads, slots = PartitionSpec(rows, model), PartitionSpec(rows)
  of_prefix, of_own = PartitionSpec(None, None, model), PartitionSpec(None, rows, model)
  return jax.shard_map(
      _shard, mesh=mesh, axis_names={*rows, *model}, out_specs=heads, check_vma=False,
      in_specs=(heads, of_prefix, of_own, PartitionSpec(), *[slots] * len(of_slots)))(*args)


def _check(q_SNH, columns, of_slots) -> None:
  """columns: of the prefix and of each chunk."""
  if q_SNH.ndim != 3 or len(columns) < 2 or any(len(x) < 2 or x[0].ndim != 4 for x in columns):
    raise ValueError('decode_attention needs q [S, N, H], and (k, v) or (k, v, k_scale, v_scale) of a '
                     'prefix [M, K, P, H] and of one chunk or more [S, K, T, H]')
  (S, N, H), (_, K, _, H_kv) = q_SNH.shape, columns[0][0].shape
  prefix, *own = (x[0].shape for x in columns)
  if H != H_kv or any(shape[:2] + shape[3:] != (S, K, H) for shape in own) or any(
      x.shape != (S,) for x in of_slots) or not q_SNH.size or 0 in sum(own, prefix):
    raise ValueError('decode_attention needs q [S, N, H], a prefix [M, K, P, H], chunks [S, K, T, H], rows, columns '
                     f'and lengths [S], none of them empty, not {q_SNH.shape}, {prefix}, {own} and '
                     f'{[x.shape for x in of_slots]}; heads stand before time, and there is one query a slot')
  if N % K:
    raise ValueError(f'N={N} query heads must be a multiple of K={K} key/value heads; use another number of heads')
  dtype = columns[0][0].dtype
  if q_SNH.dtype not in (jnp.float32, jnp.bfloat16) or dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
    raise TypeError('q must be bfloat16 or float32, and k and v bfloat16, float32 or int8, not '
                    f'{q_SNH.dtype} and {dtype}; cast them')
  for k, v, *scales in columns:
    if k.shape != v.shape:
      raise ValueError(f'k and v must be alike, not of the shapes {k.shape} and {v.shape}')
    if not k.dtype == v.dtype == dtype:
      raise TypeError(f'k and v must all be of one dtype, not {dtype}, {k.dtype} and {v.dtype}; cast')
    found, needed = [x.shape for x in scales], [k.shape[:3]] * 2 if dtype == jnp.int8 else []
    if found != needed:
      raise ValueError(f'k and v of {dtype} need {len(needed)} scales of shape {k.shape[:3]}, not {found}; int8 has '
                       'a scale for each row, head and column, other dtypes have none')
    if any(x.dtype != jnp.float32 for x in scales):
      raise TypeError(f'scales must be float32, not {[str(x.dtype) for x in scales]}; cast them')
  if any(x.dtype != jnp.int32 for x in of_slots):
    raise TypeError(f'rows, columns and lengths must be int32, not {[str(x.dtype) for x in of_slots]}; cast them')
