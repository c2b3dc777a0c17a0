"""Both passes on a TPU: tiles of logits stand in VMEM only, and each matrix is read as few times as VMEM allows.

Forward, grid (tokens, vocabulary): a tile of tokens stays while the output matrix streams by.
Backward, grid (vocabulary, tokens): a tile of the output matrix and its gradient stay while the tokens stream
by. The gradient to the tokens, float32 in HBM, is read, added to and written back at every step. These steps must
come in order, so the backward pass runs on one core where a device has two (v4, v5p).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from kr_jax.kernels.chip import LANES, LOW, dot, round_up


def _with_width(step, v, V: int, tile_V: int):
  """Runs step(columns) for block v of the vocabulary; there is no memory behind column V - 1."""
  last, rest = V // tile_V, V % tile_V
  if not rest:
    step(tile_V)
  elif not last:
    step(rest)
  else:
    pl.when(v < last)(lambda: step(tile_V))
    pl.when(v == last)(lambda: step(rest))


def _reduce(hidden_ref, output_ref, target_ref, statistics_ref, max_ref, sum_ref, product_ref,
            target_logit_ref, *, V: int, scale: float):
  """Adds one tile of logits to the running statistics of its tokens, columns [tile_T, 1]."""
  v, tile_V = pl.program_id(1), output_ref.shape[1]

  @pl.when(v == 0)
  def _():
    max_ref[...] = jnp.full_like(max_ref, LOW)
    for ref in (sum_ref, product_ref, target_logit_ref):
      ref[...] = jnp.zeros_like(ref)

  def step(width):
    z = dot(hidden_ref[...], output_ref[:, :round_up(width, LANES)], (1, 0)) * scale
    column = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    if width % LANES:
      z = jnp.where(column < width, z, LOW)
    old_max = max_ref[...]
    new_max = jnp.maximum(old_max, z.max(axis=1, keepdims=True))
    shifted, shift = z - new_max, old_max - new_max
    exp, scale_old = jnp.exp(shifted), jnp.exp(shift)
    max_ref[...] = new_max
    product_ref[...] = (scale_old * (product_ref[...] + shift * sum_ref[...])
                        + (exp * shifted).sum(axis=1, keepdims=True))
    sum_ref[...] = scale_old * sum_ref[...] + exp.sum(axis=1, keepdims=True)
    target_logit_ref[...] += jnp.where(column == target_ref[...] - v * tile_V, z, 0).sum(axis=1, keepdims=True)

  _with_width(step, v, V, tile_V)

  @pl.when(v == pl.num_programs(1) - 1)
  def _():
    log_sum = jnp.log(sum_ref[...])
    statistics_ref[:, 0:1] = max_ref[...]
    statistics_ref[:, 1:2] = log_sum
    statistics_ref[:, 2:3] = log_sum - product_ref[...] / sum_ref[...]
    statistics_ref[:, 3:4] = target_logit_ref[...]


def forward(hidden_TD: jax.Array, output_DV: jax.Array, target_T: jax.Array, *, temperature: float,
            tile_T: int, tile_V: int, vmem: int, interpret: Any = False) -> jax.Array:
  """The statistics of each token.

  Args:
    hidden_TD, output_DV: both bfloat16 or both float32; T a multiple of tile_T.
    target_T: int32; a target outside 0..V-1 is in no column.
    tile_T, tile_V: tokens and columns of a tile, multiples of 16 and 128.
    vmem: bytes that the kernel may use.
    interpret: False, or pltpu.InterpretParams to run where there is no TPU.

  Returns:
    float32 [T, 4]: the fields of ops.Statistics.
  """
  (T, D), V = hidden_TD.shape, output_DV.shape[1]
  return pl.pallas_call(
      functools.partial(_reduce, V=V, scale=1 / temperature),
      out_shape=jax.ShapeDtypeStruct((T, 4), jnp.float32),
      grid=(T // tile_T, pl.cdiv(V, tile_V)),
      in_specs=[pl.BlockSpec((tile_T, D), lambda t, v: (t, 0)),
                pl.BlockSpec((D, tile_V), lambda t, v: (0, v)),
                pl.BlockSpec((tile_T, 1), lambda t, v: (t, 0))],
      out_specs=pl.BlockSpec((tile_T, 4), lambda t, v: (t, 0)),
      scratch_shapes=[pltpu.VMEM((tile_T, 1), jnp.float32)] * 4,
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=vmem),
      interpret=interpret,
      name='token_logprob_forward',
  )(hidden_TD, output_DV, target_T[:, None])


def _differentiate(in_use_ref, hidden_ref, output_ref, target_ref, column_ref, _, d_output_ref, d_hidden_hbm,
                   d_hidden_ref, sum_ref, writing_ref, read, write, *, V: int, scale: float):
  """Computes one tile of logits, and adds its part to both gradients."""
  v, t = pl.program_id(0), pl.program_id(1)
  tile_T, tile_V = hidden_ref.shape[0], output_ref.shape[1]
  last_t = t == pl.num_programs(1) - 1
  here = d_hidden_hbm.at[pl.ds(pl.multiple_of(t * tile_T, tile_T), tile_T), :]
  copy_in = pltpu.make_async_copy(here, d_hidden_ref, read)
  copy_out = pltpu.make_async_copy(d_hidden_ref, here, write)

  @pl.when((v == 0) & (t == 0))
  def _():
    writing_ref[0] = 0

  @pl.when(t == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  def wait_for_write():
    """Waits for a write of any tile: all tiles are of one size, and one write is under way at a time."""
    @pl.when(writing_ref[0] == 1)
    def _():
      copy_out.wait()
      writing_ref[0] = 0

  def step(width):
    lanes = round_up(width, LANES)
    wait_for_write()  # it uses the buffer, and with a single tile of tokens it writes what is read next
    copy_in.start()
    output = output_ref[:, :lanes]
    if width % LANES:
      at = jax.lax.broadcasted_iota(jnp.int32, output.shape, 1)
      output = jnp.where(at < width, output, jnp.zeros_like(output))
    hidden = hidden_ref[...]
    row_max, log_sum, g_logp, g_entropy, offset = (column_ref[:, i:i + 1] for i in range(5))
    logp = dot(hidden, output, (1, 0)) * scale - row_max - log_sum
    column = jax.lax.broadcasted_iota(jnp.int32, logp.shape, 1)
    dz = (jnp.where(column == target_ref[...] - v * tile_V, g_logp, 0) - jnp.exp(logp) * (offset + g_entropy * logp))
    if width % LANES:
      dz = jnp.where(column < width, dz, 0)
    dz = dz.astype(hidden.dtype)
    copy_in.wait()
    d_hidden_ref[...] += dot(dz, output, (1, 1))
    copy_out.start()
    writing_ref[0] = 1
    sum_ref[:, :lanes] += dot(hidden, dz, (0, 0))

  @pl.when(in_use_ref[t] == 1)
  def _():
    _with_width(step, v, V, tile_V)

  @pl.when(last_t)
  def _():
    d_output_ref[...] = sum_ref[...].astype(d_output_ref.dtype)

  @pl.when(last_t & (v == pl.num_programs(0) - 1))
  def _():
    wait_for_write()


def backward(hidden_TD: jax.Array, output_DV: jax.Array, target_T: jax.Array, column_T5: jax.Array, *,
             temperature: float, tile_T: int, tile_V: int, vmem: int, interpret: Any = False
             ) -> tuple[jax.Array, jax.Array]:
  """Both gradients. A tile of tokens whose g_logp and g_entropy are all 0 is skipped.

  Args: as of `forward`, with tile_T a multiple of 128, and
    column_T5: float32: max and log_sum of ops.Statistics, g_logp, g_entropy, and g_logp + g_entropy * entropy, the
      last three divided by the temperature.

  Returns:
    The gradient to hidden_TD in float32, and to output_DV in its dtype.
  """
  (T, D), V = hidden_TD.shape, output_DV.shape[1]
  in_use = jnp.any(column_T5[:, 2:4].reshape(T // tile_T, -1) != 0, axis=1).astype(jnp.int32)
  of_tokens = lambda width: pl.BlockSpec((tile_T, width), lambda v, t, _: (t, 0))
  of_output = pl.BlockSpec((D, tile_V), lambda v, t, _: (0, v))
  in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
  d_output_DV, d_hidden_TD = pl.pallas_call(
      functools.partial(_differentiate, V=V, scale=1 / temperature),
      out_shape=(jax.ShapeDtypeStruct((D, V), output_DV.dtype), jax.ShapeDtypeStruct((T, D), jnp.float32)),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(pl.cdiv(V, tile_V), T // tile_T),
          in_specs=[of_tokens(D), of_output, of_tokens(1), of_tokens(5), in_hbm],
          out_specs=[of_output, in_hbm],
          scratch_shapes=[pltpu.VMEM((tile_T, D), jnp.float32), pltpu.VMEM((D, tile_V), jnp.float32),
                          pltpu.SMEM((1,), jnp.int32), pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA]),
      input_output_aliases={5: 1},  # the zeros that d_hidden_TD grows from
      compiler_params=pltpu.CompilerParams(dimension_semantics=('arbitrary', 'arbitrary'), vmem_limit_bytes=vmem),
      interpret=interpret,
      name='token_logprob_backward',
  )(in_use, hidden_TD, output_DV, target_T[:, None], column_T5, jnp.zeros((T, D)))
  return d_hidden_TD, d_output_DV
