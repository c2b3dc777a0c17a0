"""Log-probabilities of target tokens, and entropies, of [T, V] logits that never stand in memory.

The logits are computed in blocks of the vocabulary, reduced at once, and computed again in the backward pass.
With p the probabilities and H the entropy, the gradient with respect to the logits is

    dz_tv = [g_logp_t (1[v = target_t] - p_tv) - g_entropy_t p_tv (log p_tv + H_t)] / temperature

Of a row only the maximum, the logarithm of sum_v exp(z_v - maximum) and H are kept. Maximum and logarithm are
kept apart, so that nothing is lost where logits are large and their differences small, and no logp exceeds 0.

Source: the online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867; logits in blocks, Wijmans
et al. 2024, arXiv 2411.09009 (Cut Cross-Entropy). Differs: the entropy has a gradient too.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kr_jax.kernels import chip
from kr_jax.kernels.token_logprob import kernel
from kr_jax.kernels.token_logprob import tiles


class Statistics(NamedTuple):
  """The figures that are kept of the logits of each token."""

  max_T: jax.Array
  log_sum_T: jax.Array  # log sum_v exp(z_v - max), at least 0
  entropy_T: jax.Array
  target_T: jax.Array  # the target's logit; 0 if the target is not among the columns


def _einsum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(spec, x, y, precision=chip.precision(x), preferred_element_type=jnp.float32)


def _blocks(step, carry, V: int, width: int):
  """carry = step(carry, first column, columns) over blocks of the vocabulary; the last may be narrow.

  The narrow block comes after the loop, in a shape of its own, as padding would copy the output matrix.
  """
  if V <= width:
    return step(carry, 0, V)
  full = V // width
  carry = jax.lax.fori_loop(0, full, lambda i, carry: step(carry, i * width, width), carry)
  return step(carry, full * width, V - full * width) if V % width else carry


def _logits(hidden_TD, output_DV, first, width: int, temperature: float):
  output_DB = jax.lax.dynamic_slice_in_dim(output_DV, first, width, axis=1)
  return _einsum('td,db->tb', hidden_TD, output_DB) * (1 / temperature), output_DB


def forward(hidden_TD: jax.Array, output_DV: jax.Array, target_T: jax.Array, *, temperature: float,
            width: int) -> tuple[Statistics, jax.Array | None]:
  """Statistics over blocks of `width` columns, and the logits, to be kept, if they are a single block.

  A target outside 0..V-1 is in no column.
  """
  T, V = hidden_TD.shape[0], output_DV.shape[1]

  def step(carry, first, width):
    max_T, sum_T, product_T, target_logit_T, _ = carry
    z_TB, _ = _logits(hidden_TD, output_DV, first, width, temperature)
    new_max_T = jnp.maximum(max_T, z_TB.max(axis=1))
    shifted_TB = z_TB - new_max_T[:, None]
    shift_T = max_T - new_max_T
    exp_TB, scale_T = jnp.exp(shifted_TB), jnp.exp(shift_T)
    b_T = target_T - first
    at_T = jnp.take_along_axis(z_TB, jnp.clip(b_T, 0, width - 1)[:, None], axis=1)[:, 0]
    return (new_max_T,
            scale_T * sum_T + exp_TB.sum(axis=1),
            scale_T * (product_T + shift_T * sum_T) + (exp_TB * shifted_TB).sum(axis=1),
            target_logit_T + jnp.where((b_T >= 0) & (b_T < width), at_T, 0),
            z_TB if width == V else None)

  zero_T = jnp.zeros(T)
  max_T, sum_T, product_T, target_logit_T, z_TV = _blocks(
      step, (jnp.full(T, chip.LOW), zero_T, zero_T, zero_T, None), V, width)
  log_sum_T = jnp.log(sum_T)
  return Statistics(max_T, log_sum_T, log_sum_T - product_T / sum_T, target_logit_T), z_TV


def backward(hidden_TD: jax.Array, output_DV: jax.Array, target_T: jax.Array, z_TV: jax.Array | None,
             statistics: Statistics, g_logp_T: jax.Array, g_entropy_T: jax.Array, *,
             temperature: float, width: int) -> tuple[jax.Array, jax.Array]:
  """Gradients: to hidden_TD in float32, to output_DV in its dtype."""
  g_logp_T, g_entropy_T = g_logp_T / temperature, g_entropy_T / temperature
  offset_T = g_logp_T + g_entropy_T * statistics.entropy_T

  def step(carry, first, width):
    d_hidden_TD, d_output_DV = carry
    z_TB, output_DB = (z_TV, output_DV) if z_TV is not None else _logits(
        hidden_TD, output_DV, first, width, temperature)
    logp_TB = z_TB - statistics.max_T[:, None] - statistics.log_sum_T[:, None]
    is_target_TB = jnp.arange(width)[None] == (target_T - first)[:, None]
    dz_TB = (jnp.where(is_target_TB, g_logp_T[:, None], 0)
             - jnp.exp(logp_TB) * (offset_T[:, None] + g_entropy_T[:, None] * logp_TB)).astype(hidden_TD.dtype)
    d_output_DB = _einsum('td,tb->db', hidden_TD, dz_TB).astype(output_DV.dtype)
    return (d_hidden_TD + _einsum('tb,db->td', dz_TB, output_DB),
            jax.lax.dynamic_update_slice_in_dim(d_output_DV, d_output_DB, first, axis=1))

  return _blocks(step, (jnp.zeros(hidden_TD.shape), jnp.zeros_like(output_DV)), output_DV.shape[1], width)


def _pad_tokens(tile_T: int, *arrays: jax.Array) -> list[jax.Array]:
  """With zeros, up to whole tiles."""
  missing = -arrays[0].shape[0] % tile_T
  return [jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1)) for x in arrays]


def kernel_forward(hidden_TD: jax.Array, output_DV: jax.Array, target_T: jax.Array, *,
                   temperature: float, tile: tuple[int, int], interpret: Any = False
                   ) -> tuple[Statistics, None]:
  """As `forward`, by the kernel in tiles (tile_T, tile_V), for any T."""
  statistics_T4 = kernel.forward(
      *_pad_tokens(tile[0], hidden_TD), output_DV, *_pad_tokens(tile[0], target_T),
      temperature=temperature, tile_T=tile[0], tile_V=tile[1], vmem=tiles.vmem(), interpret=interpret)
  return Statistics(*statistics_T4[:hidden_TD.shape[0]].T), None


def kernel_backward(hidden_TD: jax.Array, output_DV: jax.Array, target_T: jax.Array, _: None,
                    statistics: Statistics, g_logp_T: jax.Array, g_entropy_T: jax.Array, *,
                    temperature: float, tile: tuple[int, int], interpret: Any = False
                    ) -> tuple[jax.Array, jax.Array]:
  """As `backward`, by the kernel in tiles (tile_T, tile_V), for any T."""
  g_logp_T, g_entropy_T = g_logp_T / temperature, g_entropy_T / temperature
  column_T5 = jnp.stack([statistics.max_T, statistics.log_sum_T, g_logp_T, g_entropy_T,
                         g_logp_T + g_entropy_T * statistics.entropy_T], axis=1)
  d_hidden_TD, d_output_DV = kernel.backward(
      *_pad_tokens(tile[0], hidden_TD), output_DV, *_pad_tokens(tile[0], target_T, column_T5),
      temperature=temperature, tile_T=tile[0], tile_V=tile[1], vmem=tiles.vmem(), interpret=interpret)
  return d_hidden_TD[:hidden_TD.shape[0]], d_output_DV


# Both are jitted, as outside of a program the branches of all platforms would be compiled for this one.
@functools.partial(jax.jit, static_argnames='temperature')
def _shard_forward(hidden_TD, output_DV, target_T, *, temperature: float):
  """Statistics of what is on one device, by the platform that the program is lowered for."""
  (T, D), V = hidden_TD.shape, output_DV.shape[1]
  on_any = functools.partial(forward, temperature=temperature, width=tiles.BLOCK_WIDTH)
  tile = tiles.forward(T, D, hidden_TD.dtype.itemsize)
  if V <= tiles.BLOCK_WIDTH or not tile:
    return on_any(hidden_TD, output_DV, target_T)
  on_tpu = functools.partial(kernel_forward, temperature=temperature, tile=tile)
  return jax.lax.platform_dependent(hidden_TD, output_DV, target_T, tpu=on_tpu, default=on_any)


@functools.partial(jax.jit, static_argnames='temperature')
def _shard_backward(hidden_TD, output_DV, target_T, z_TV, *rest, temperature: float):
  (T, D), V = hidden_TD.shape, output_DV.shape[1]
  on_any = functools.partial(backward, temperature=temperature, width=tiles.BLOCK_WIDTH)
  tile = tiles.backward(T, D, hidden_TD.dtype.itemsize)
  args = hidden_TD, output_DV, target_T, z_TV, *rest
  if z_TV is not None or not tile:
    return on_any(*args)
  on_tpu = functools.partial(kernel_backward, temperature=temperature, tile=tile)
  return jax.lax.platform_dependent(*args, tpu=on_tpu, default=on_any)


def _combine(part: Statistics) -> Statistics:
  """The statistics of all columns from the statistics of each shard of 'model'.

  H = sum_i w_i (H_i - log w_i), where w_i is the probability of shard i. No term is negative.
  """
  total = functools.partial(jax.lax.psum, axis_name='model')
  max_T = jax.lax.pmax(part.max_T, 'model')
  share_T = part.log_sum_T + part.max_T - max_T
  log_sum_T = jnp.log(total(jnp.exp(share_T)))
  log_weight_T = jnp.minimum(share_T - log_sum_T, 0)
  entropy_T = total(jnp.exp(log_weight_T) * (part.entropy_T - log_weight_T))
  return Statistics(max_T, log_sum_T, entropy_T, total(part.target_T))


def _on_shard(target_T, V: int):
  """Targets counted from the first of the V columns of this shard."""
  return target_T - jax.lax.axis_index('model') * V


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_logprob(hidden_TD, output_DV, target_T, temperature, mesh):
  return _token_logprob_forward(hidden_TD, output_DV, target_T, temperature, mesh)[0]


def _token_logprob_forward(hidden_TD, output_DV, target_T, temperature, mesh):
  run = functools.partial(_shard_forward, temperature=temperature)
  if mesh is None:
    s, z_TV = run(hidden_TD, output_DV, target_T)
  else:
    def shard(hidden_TD, output_DV, target_T):
      part, z_TV = run(hidden_TD, output_DV, _on_shard(target_T, output_DV.shape[1]))
      return _combine(part), z_TV

    rows = chip.unsplit(mesh, chip.ROWS)
    of_tokens, of_output, of_logits = PartitionSpec(rows), PartitionSpec(None, 'model'), PartitionSpec(rows, 'model')
    s, z_TV = jax.shard_map(
        shard, mesh=mesh, axis_names={*rows, 'model'}, in_specs=(of_tokens, of_output, of_tokens),
        out_specs=(of_tokens, of_logits), check_vma=False)(hidden_TD, output_DV, target_T)
  # At most 0 also after rounding, as the maximum is subtracted first.
  logp_T = s.target_T - s.max_T - s.log_sum_T
  return (logp_T, s.entropy_T), (hidden_TD, output_DV, target_T, z_TV, s)


def _token_logprob_backward(temperature, mesh, residuals, g):
  run = functools.partial(_shard_backward, temperature=temperature)
  if mesh is None:
    d_hidden_TD, d_output_DV = run(*residuals, *g)
  else:
    rows = chip.unsplit(mesh, chip.ROWS)
    of_tokens, of_output, of_logits = PartitionSpec(rows), PartitionSpec(None, 'model'), PartitionSpec(rows, 'model')

    def shard(hidden_TD, output_DV, target_T, *rest):
      d_hidden_TD, d_output_DV = run(hidden_TD, output_DV, _on_shard(target_T, output_DV.shape[1]), *rest)
      return jax.lax.psum(d_hidden_TD, 'model'), jax.lax.psum(d_output_DV, rows)

    d_hidden_TD, d_output_DV = jax.shard_map(
        shard, mesh=mesh, axis_names={*rows, 'model'}, out_specs=(of_tokens, of_output), check_vma=False,
        in_specs=(of_tokens, of_output, of_tokens, of_logits, *[of_tokens] * 3))(*residuals, *g)
  return d_hidden_TD.astype(residuals[0].dtype), d_output_DV, None


_token_logprob.defvjp(_token_logprob_forward, _token_logprob_backward)


def token_logprob(hidden_TD: jax.Array, output_DV: jax.Array, target_T: jax.Array, *,
                  temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target, and entropy, of softmax(hidden @ output / temperature).

  Both have gradients, to hidden and output in their own dtype. Under a mesh with the axes of chip.AXES
  (jax.set_mesh) tokens are split over 'data', 'fsdp' and 'expert' and the vocabulary over 'model', wherever the
  arguments are. Inside a jax.shard_map over some of the first three they are split over the other axes, and the
  gradient to the output is the one of the shard's own tokens.

  Args:
    hidden_TD: bfloat16 or float32, the state that each token is predicted from.
    output_DV: of the same dtype, the output matrix.
    target_T: int32 in 0..V-1, the target tokens. The results of a target out of range have no meaning.
    temperature: above 0, a constant of the program.

  Returns:
    logp_T and entropy_T, float32: at most 0, and in 0..log V up to rounding.

  Raises:
    ValueError: shapes, temperature or a mesh that does not divide T and V or has axes that are not of type Auto.
    TypeError: other dtypes.
  """
  hidden_TD, output_DV, target_T = map(jnp.asarray, (hidden_TD, output_DV, target_T))
  shapes = hidden_TD.shape, output_DV.shape, target_T.shape
  if ([len(shape) for shape in shapes] != [2, 2, 1] or shapes[0] != (*shapes[2], output_DV.shape[0])
      or not hidden_TD.size or not output_DV.size):
    raise ValueError('token_logprob needs hidden [T, D], output [D, V] and targets [T], none of them empty, not the '
                     f'shapes {shapes[0]}, {shapes[1]} and {shapes[2]}; flatten leading axes, and transpose an '
                     'embedding that serves as output')
  if hidden_TD.dtype not in (jnp.float32, jnp.bfloat16) or output_DV.dtype != hidden_TD.dtype:
    raise TypeError('hidden and output must both be bfloat16 or both float32, not '
                    f'{hidden_TD.dtype} and {output_DV.dtype}; cast one to the other')
  if target_T.dtype != jnp.int32:
    raise TypeError(f'targets must be int32, not {target_T.dtype}; cast them')
  if not isinstance(temperature, (int, float)):
    raise TypeError(f'temperature={temperature!r} must be a Python number, a constant of the program')
  if not 0 < temperature < math.inf:
    raise ValueError(f'temperature={temperature} must be above 0 and finite; greedy is not a policy')
  mesh = chip.mesh()
  if mesh is not None:
    rows = chip.unsplit(mesh, chip.ROWS)
    chip.check_mesh(mesh, ('T', hidden_TD.shape[0], rows), ('V', output_DV.shape[1], ('model',)))
  return _token_logprob(hidden_TD, output_DV, target_T, float(temperature), mesh)
