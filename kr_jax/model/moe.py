"""Experts: of the MLPs of a layer a router chooses a few for each token, whose outputs are added up by its weights.

    p = softmax(h router)                            in float32, over all E experts
    y = sum_e w_e down_e(activation(gate_e h) * up_e h),   e of the X largest p, w = p or p / (sum of the X p)

No token is dropped, and no loss balances the experts. Tokens are sorted by expert, so that the products of an expert
stand side by side: a grouped product, which is megablox's kernel on a TPU and `jax.lax.ragged_dot` elsewhere.

On a mesh each device of ('expert', 'model') has experts of its own, whole. The devices along 'model' have the same
tokens; those along 'expert' have tokens of their own, as along 'fsdp', and gather one another's. A device computes its
experts for all tokens that it sees, and the sums over experts go back to where each token came from.

How many tokens come to a device's experts is not known when the program is compiled. So the sorted tokens are taken
in chunks of HEADROOM times the balanced share, as many as there are: one, unless routing is far from balanced. That
bounds the memory at any balance. For the same reason nothing but the inputs is kept for the backward pass, which
computes gate and up again, whatever policy.remat says of the other products.

Source: Shazeer et al. 2017, arXiv 1701.06538; as Qwen3 has it (Qwen team 2025, arXiv 2505.09388); grouped products
as in Gale et al. 2022, arXiv 2211.15841.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kr_jax import sharding
from kr_jax.types import Array

MATRICES = ('gate_EDF', 'up_EDF', 'down_EFD')
HEADROOM = 2  # rows of a chunk over the rows of a device's experts, if all experts were sent equally many tokens
CHUNKS = 'expert_chunks'  # the name of the loops over chunks
# Rows, and columns at the most, of a tile of the kernel: they fill 16 MiB of VMEM of a TPU, and a tile of weights,
# whole in the contracted dimension, is read once for all rows of its expert.
_TILE_BYTES, _TILE_CONTRACTED = 2048, 2048


def route(h_BTD: Array, router_DE: Array, *, per_token: int, normalize: bool) -> tuple[Array, Array]:
  """weight_BTX, float32, and expert_BTX, int32: the experts of each token, the likeliest first, of equal ones the
  one of the lowest number. normalize: whether the weights of a token add up to 1."""
  logits_BTE = jnp.einsum('btd,de->bte', h_BTD.astype(jnp.float32), router_DE.astype(jnp.float32),
                          precision=jax.lax.Precision.HIGHEST)
  weight_BTX, expert_BTX = jax.lax.top_k(jax.nn.softmax(logits_BTE, axis=-1), per_token)
  if normalize:
    weight_BTX /= jnp.sum(weight_BTX, axis=-1, keepdims=True)
  return weight_BTX, expert_BTX


def mlp(h_BTD: Array, router_DE: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, *, per_token: int,
        normalize: bool, activation: Callable[[Array], Array], layer: Array | None = None) -> tuple[Array, Array]:
  """y_BTD, the weighted sum of the outputs of each token's experts, and expert_BTX as of `route`.

  Args:
    router_DE: float32, whole on every device.
    gate_EDF, up_EDF, down_EFD: in the dtype of h_BTD; E divided over 'expert' and 'model', inside a jax.shard_map over
      sharding.ROWS, as of a sampler, over 'model'.
    layer: int32. Where it is given the matrices are those of several layers, with one more axis in front, of which this
      one is read. A TPU then reads it where it stands; a slice for the kernel would be a copy. There is no gradient.
  """
  weight_BTX, expert_BTX = route(h_BTD, router_DE, per_token=per_token, normalize=normalize)
  args = h_BTD, weight_BTX, expert_BTX, gate_EDF, up_EDF, down_EFD
  if layer is None:
    return _experts(activation, *args), expert_BTX
  axes = _axes()
  forward = _on_mesh(functools.partial(_forward, activation, axes), axes, 'tttMMM1', 't')
  return forward(*args, layer), expert_BTX


def load(expert_BTX: Array, counted_BT: Array, num_experts: int) -> Array:
  """load_E, int32: how many of the tokens that count each expert was sent."""
  sent_BTXE = expert_BTX[..., None] == jnp.arange(num_experts)[None, None, None]
  return jnp.sum(sent_BTXE & counted_BT[..., None, None], axis=(0, 1, 2), dtype=jnp.int32)


# Where experts are.


class _Axes(NamedTuple):
  """Axes of the mesh, none of which a surrounding jax.shard_map maps over."""

  rows: tuple[str, ...]  # that the rows of tokens are spread over
  experts: tuple[str, ...]  # that E is divided over

  @property
  def gathered(self) -> tuple[str, ...]:
    """Those along which devices of different experts have different tokens."""
    return tuple(axis for axis in self.experts if axis in self.rows)


def _axes() -> _Axes:
  return _Axes(sharding.unmapped(sharding.ROWS), sharding.unmapped(('expert', 'model')))


def _on_mesh(function: Callable[..., Any], axes: _Axes, specs: str, out_specs: str) -> Callable[..., Any]:
  """A function of arrays, each device computing on its own part.

  Args:
    specs, out_specs: a letter an argument or result: 't' for rows of tokens, 'm' for matrices, 'M' for matrices of
      several layers, 'I' and 'O' for the gradients of matrices whose second or third axis is D, which are divided over
      'fsdp', '1' for a number.
  """
  if not any(axes):
    return function
  experts, fsdp = axes.experts or None, 'fsdp' if 'fsdp' in axes.rows else None
  of = {'t': PartitionSpec(axes.rows or None), '1': PartitionSpec(), 'm': PartitionSpec(experts),
        'M': PartitionSpec(None, experts), 'I': PartitionSpec(experts, fsdp), 'O': PartitionSpec(experts, None, fsdp)}
  out = tuple(of[x] for x in out_specs)
  return jax.shard_map(function, in_specs=tuple(of[x] for x in specs), out_specs=out if len(out) > 1 else out[0],
                       axis_names={*axes.rows, *axes.experts}, check_vma=False)


# The experts, forward and backward. Shapes are of one device: E of its experts, T of the tokens that it sees.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(activation: Callable[[Array], Array], h_BTD: Array, weight_BTX: Array, expert_BTX: Array,
             gate_EDF: Array, up_EDF: Array, down_EFD: Array) -> Array:
  """y_BTD. Nothing but the arguments is kept for the backward pass."""
  axes = _axes()
  forward = _on_mesh(functools.partial(_forward, activation, axes), axes, 'tttmmm', 't')
  return forward(h_BTD, weight_BTX, expert_BTX, gate_EDF, up_EDF, down_EFD)


def _experts_forward(activation, *args):
  return _experts(activation, *args), args


def _experts_backward(activation, args, dy_BTD):
  axes = _axes()
  backward = _on_mesh(functools.partial(_backward, activation, axes), axes, 'tttmmmt', 'ttIIO')
  d_h, d_weight, *d_matrices = backward(*args, dy_BTD)
  return d_h, d_weight, None, *d_matrices


_experts.defvjp(_experts_forward, _experts_backward)


def _forward(activation, axes, h_BTD, weight_BTX, expert_BTX, gate_EDF, up_EDF, down_EFD, layer=None):
  h_TD, weight_TX, expert_TX = (_all_tokens(x, axes) for x in (h_BTD, weight_BTX, expert_BTX))
  pairs = _sorted(axes, expert_TX, gate_EDF.shape[-3])

  def add(chunk, y_TD):
    x_GD, groups = h_TD[chunk.token_G], chunk.groups._replace(layer=layer)
    gate_GF, up_GF = (times(x_GD, matrix, groups) for matrix in (gate_EDF, up_EDF))
    out_GD = times(activation(gate_GF) * up_GF, down_EFD, groups)
    return y_TD + _of_tokens(chunk, pairs, out_GD, weight_TX)

  y_TD = _over_chunks(pairs, add, jnp.zeros(h_TD.shape, jnp.float32))
  return _own_tokens(y_TD.astype(h_BTD.dtype), h_BTD.shape, axes)


def _backward(activation, axes, h_BTD, weight_BTX, expert_BTX, gate_EDF, up_EDF, down_EFD, dy_BTD):
  h_TD, weight_TX, expert_TX, dy_TD = (_all_tokens(x, axes) for x in (h_BTD, weight_BTX, expert_BTX, dy_BTD))
  pairs = _sorted(axes, expert_TX, len(gate_EDF))

  def add(chunk, sums):
    dh_TD, d_weight_Y, d_gate_EDF, d_up_EDF, d_down_EFD = sums
    x_GD, dy_GD, weight_G1 = h_TD[chunk.token_G], dy_TD[chunk.token_G], weight_TX.reshape(-1, 1)[chunk.pair_G]
    gate_GF, up_GF = (times(x_GD, matrix, chunk.groups) for matrix in (gate_EDF, up_EDF))
    a_GF, of_gate_and_up = jax.vjp(lambda gate_GF, up_GF: activation(gate_GF) * up_GF, gate_GF, up_GF)
    da_GF = times(dy_GD, down_EFD, chunk.groups, transposed=True)  # of a pair of weight 1
    d_weight_G = jnp.sum(da_GF.astype(jnp.float32) * a_GF, axis=-1)
    dgate_GF, dup_GF = of_gate_and_up((da_GF * weight_G1).astype(da_GF.dtype))
    dx_GD = (times(dgate_GF, gate_EDF, chunk.groups, transposed=True)
             + times(dup_GF, up_EDF, chunk.groups, transposed=True))
    return (dh_TD + _of_tokens(chunk, pairs, dx_GD),
            jax.lax.dynamic_update_slice_in_dim(d_weight_Y, d_weight_G, chunk.first, axis=0),
            d_gate_EDF + outer(x_GD, dgate_GF, chunk.groups), d_up_EDF + outer(x_GD, dup_GF, chunk.groups),
            d_down_EFD + outer((a_GF * weight_G1).astype(a_GF.dtype), dy_GD, chunk.groups))

  zeros = lambda *like: (jnp.zeros(x.shape, jnp.float32) for x in like)
  dh_TD, d_weight_Y, *d_matrices = _over_chunks(
      pairs, add, tuple(zeros(h_TD, pairs.pair_Y, gate_EDF, up_EDF, down_EFD)))
  here_TX = pairs.place_TX < pairs.end_E[-1]
  d_weight_TX = jnp.where(here_TX, d_weight_Y[jnp.where(here_TX, pairs.place_TX, 0)], 0)
  d_matrices = (_over_rows(d.astype(x.dtype), axis_of_D, axes)
                for d, x, axis_of_D in zip(d_matrices, (gate_EDF, up_EDF, down_EFD), (1, 1, 2)))
  return (_own_tokens(dh_TD.astype(h_BTD.dtype), h_BTD.shape, axes),
          _own_tokens(d_weight_TX, weight_BTX.shape, axes), *d_matrices)


def _all_tokens(x_BTD: Array, axes: _Axes) -> Array:
  """The tokens that this device computes experts for, in one row."""
  x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
  return jax.lax.all_gather(x_TD, axes.gathered, tiled=True) if axes.gathered else x_TD


def _own_tokens(x_TD: Array, shape: tuple[int, ...], axes: _Axes) -> Array:
  """Sums over experts for this device's tokens, of the sums of each device over its own."""
  if axes.gathered:
    x_TD = jax.lax.psum_scatter(x_TD, axes.gathered, tiled=True)
  if rest := tuple(axis for axis in axes.experts if axis not in axes.gathered):
    x_TD = jax.lax.psum(x_TD, rest)
  return x_TD.reshape(shape)


def _over_rows(d: Array, axis_of_D: int, axes: _Axes) -> Array:
  """The sum of a gradient over all rows of tokens, divided over 'fsdp'."""
  for axis in axes.rows:
    if axis == 'fsdp':
      d = jax.lax.psum_scatter(d, axis, scatter_dimension=axis_of_D, tiled=True)
    elif axis not in axes.experts:
      d = jax.lax.psum(d, axis)
  return d


# Sorted pairs.


class _Sorted(NamedTuple):
  """The Y pairs of a token and one of its experts, by expert; those of other devices' experts come last."""

  pair_Y: Array  # token * X + which of its experts; Y is padded to a multiple of `rows`
  place_TX: Array  # where a pair stands; of another device's expert, beyond all
  end_E: Array  # where the pairs of an expert end
  rows: int  # of a chunk
  tile: int  # of the kernel, in rows
  all_here: bool  # whether this device has all experts


def _sorted(axes: _Axes, expert_TX: Array, num_experts: int) -> _Sorted:
  """num_experts: of this device."""
  parts = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes.experts)
  first = jax.lax.axis_index(axes.experts) * num_experts if axes.experts else 0
  n, tile = expert_TX.size, _tile(expert_TX.size / (parts * num_experts))
  rows = -(-min(HEADROOM * -(-n // parts), n) // tile) * tile
  if n * (num_experts + 1) >= 2 ** 31:
    raise ValueError(f'{n} pairs of a token and an expert at once are too many to sort among {num_experts} experts; '
                     'set a smaller pack.microbatch_rows or sample.prefill')
  expert_Y = expert_TX.reshape(-1) - first
  is_of_EY = expert_Y[None] == jnp.arange(num_experts)[:, None]
  number_EY = jnp.cumsum(is_of_EY, axis=1, dtype=jnp.int32)  # of a pair among those of its expert, from 1
  end_E = jnp.cumsum(number_EY[:, -1])
  place_Y = jnp.sum(jnp.where(is_of_EY, number_EY + jnp.pad(end_E[:-1], (1, 0))[:, None] - 1, 0), axis=0)
  here_Y = (expert_Y >= 0) & (expert_Y < num_experts)
  # One sort of one array: the TPU compiler takes a minute for those of several.
  key_Y = jnp.where(here_Y, expert_Y, num_experts) * n + jnp.arange(n, dtype=jnp.int32)
  pair_Y = jnp.pad(jax.lax.sort(key_Y, is_stable=False) % n, (0, -n % rows))
  place_Y = jnp.where(here_Y, place_Y, len(pair_Y))
  return _Sorted(pair_Y, place_Y.reshape(expert_TX.shape), end_E, rows, tile, parts == 1)


def _tile(mean_rows: float) -> int:
  """Rows of a tile, for so many rows of an expert. A tile with rows of two experts is computed for each."""
  return next((tile for tile in (512, 256) if 4 * tile <= mean_rows), 128)


class _Chunk(NamedTuple):
  """G consecutive sorted pairs; those behind the last one of this device's experts have no meaning."""

  first: int | Array
  pair_G: Array
  token_G: Array
  groups: Groups


def _over_chunks(pairs: _Sorted, function: Callable[[_Chunk, Any], Any], sums: Any) -> Any:
  """sums = function(chunk, sums) for each chunk that holds pairs of this device's experts."""
  def one(i, sums):
    first = i * pairs.rows
    pair_G = jax.lax.dynamic_slice_in_dim(pairs.pair_Y, first, pairs.rows)
    size_E = jnp.diff(jnp.clip(pairs.end_E - first, 0, pairs.rows), prepend=0)
    token_G = pair_G // pairs.place_TX.shape[1]
    return function(_Chunk(first, pair_G, token_G, Groups(size_E, pairs.tile)), sums)

  if pairs.all_here:
    return one(0, sums)
  with jax.named_scope(CHUNKS):
    return jax.lax.fori_loop(0, -(-pairs.end_E[-1] // pairs.rows), one, sums)


def _of_tokens(chunk: _Chunk, pairs: _Sorted, x_GD: Array, weight_TX: Array | None = None) -> Array:
  """Sums over the pairs of each token in a chunk, float32, of x_GD times their weights. None: all are 1."""
  end = jnp.minimum(pairs.end_E[-1], chunk.first + pairs.rows)

  def add(i, sum_TD):
    place_T = pairs.place_TX[:, i]
    here_T1 = ((place_T >= chunk.first) & (place_T < end))[:, None]
    # A pair elsewhere reads any row, which may hold anything.
    x_TD = x_GD[jnp.clip(place_T - chunk.first, 0, pairs.rows - 1)].astype(jnp.float32)
    return sum_TD + jnp.where(here_T1, x_TD if weight_TX is None else x_TD * weight_TX[:, i, None], 0)

  T, X = pairs.place_TX.shape
  return jax.lax.fori_loop(0, X, add, jnp.zeros((T, x_GD.shape[1]), jnp.float32))


# Grouped products.


class Groups(NamedTuple):
  """The expert e of row g has sum(size_E[:e]) <= g < sum(size_E[:e + 1]). Rows behind the last have no meaning."""

  size_E: Array  # int32
  tile: int  # rows of the kernel's tiles, of which the rows are a multiple
  layer: Array | None = None  # of the matrices, where these are of several layers: [L, E, I, O]


def times(x_GI: Array, matrix: Array, groups: Groups, transposed: bool = False) -> Array:
  """Each row times its expert's matrix [E, I, O], or [E, O, I] where that is transposed: [G, O]."""
  return (kernel_times if sharding.platform() == 'tpu' else plain_times)(x_GI, matrix, groups, transposed)


def outer(x_GI: Array, y_GO: Array, groups: Groups) -> Array:
  """The sum over each expert's rows of x_i y_o: [E, I, O], float32."""
  return (kernel_outer if sharding.platform() == 'tpu' else plain_outer)(x_GI, y_GO, groups)


def plain_times(x_GI: Array, matrix: Array, groups: Groups, transposed: bool) -> Array:
  if groups.layer is not None:
    matrix = jax.lax.dynamic_index_in_dim(matrix, groups.layer, keepdims=False)
  return _ragged(x_GI, matrix, groups, ([1], [2 if transposed else 1]), of_rhs=[0])


def plain_outer(x_GI: Array, y_GO: Array, groups: Groups) -> Array:
  return _ragged(x_GI, y_GO, groups, ([0], [0]), of_rhs=[], dtype=jnp.float32)


def _ragged(x, y, groups, contracted, of_rhs, dtype=None):
  numbers = jax.lax.RaggedDotDimensionNumbers(
      dot_dimension_numbers=(contracted, ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=of_rhs)
  return jax.lax.ragged_dot_general(x, y, groups.size_E, numbers, preferred_element_type=dtype)


def kernel_times(x_GI: Array, matrix: Array, groups: Groups, transposed: bool, *, interpret: bool = False) -> Array:
  """interpret: runs on a CPU, for tests."""
  size_E, columns = groups.size_E, matrix.shape[-2 if transposed else -1]
  if groups.layer is not None:  # to the kernel the experts of all layers are groups, of which the others have no rows
    E, matrix = len(size_E), matrix.reshape(-1, *matrix.shape[2:])
    size_E = jax.lax.dynamic_update_slice(jnp.zeros(len(matrix), jnp.int32), size_E, (groups.layer * E,))
  tiling = groups.tile, min(x_GI.shape[1], _TILE_CONTRACTED), min(columns, _TILE_BYTES // x_GI.dtype.itemsize)
  return gmm(x_GI, matrix, size_E, x_GI.dtype, tiling, transpose_rhs=transposed, interpret=interpret)


def kernel_outer(x_GI: Array, y_GO: Array, groups: Groups, *, interpret: bool = False) -> Array:
  tiling = groups.tile, *(min(x.shape[1], _TILE_BYTES // x.dtype.itemsize) for x in (x_GI, y_GO))
  return tgmm(x_GI.T, y_GO, groups.size_E, jnp.float32, tiling, interpret=interpret)
