"""What a sampler runs: `prefill` reads prompts into a cache, `decode` extends each slot by one token.

Both read the parameters as `sampling_params` arranges them once a step, and go through the layers in stages. A
prompt's keys and values stand in a prefix, once for all slots that continue it; the tokens of all slots stand in a
ring of columns, one column a step (kernels/decode_attention). `layout` chooses what a TPU and a CPU want otherwise;
the plain layout is the reference that the other is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import re
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from kr_jax import sharding
from kr_jax.kernels.decode_attention import decode_attention
from kr_jax.model import attention
from kr_jax.model import moe
from kr_jax.model import policy
from kr_jax.types import Array


class HeadsFirst(policy.Block):
  """A layer without adapters, whose matrices of queries, keys and values have the heads as their first axis."""

  def __init__(self, c: policy.Config, *, rngs: nnx.Rngs):
    super().__init__(c, rngs=rngs)
    self.q_NHD, self.k_KHD, self.v_KHD = self.q_DNH, self.k_DKH, self.v_DKH  # names alone: arrays come later
    del self.q_DNH, self.k_DKH, self.v_DKH

  def qkv_products(self, h_BTD: Array) -> tuple[Array, Array, Array]:
    return (jnp.einsum('btd,nhd->btnh', h_BTD, self.cast(self.q_NHD)),
            jnp.einsum('btd,khd->btkh', h_BTD, self.cast(self.k_KHD)),
            jnp.einsum('btd,khd->btkh', h_BTD, self.cast(self.v_KHD)))


class Layout(NamedTuple):
  """How the arrays of a sampler are arranged."""

  block: type[policy.Block]  # of a layer
  scanned: bool  # all layers are one stage, which is scanned; else each layer is a stage
  chunks: int  # of a ring, at the most
  tile: int  # a chunk holds a multiple of so many columns


# XLA on a CPU copies a layer that a loop reads out of a stack. Chunks of a ring where no slot lives are not read.
PLAIN = Layout(policy.Block, scanned=False, chunks=4, tile=1)
# A TPU reads the heads first in its products, and else copies these matrices. A program of scanned layers is
# small, and needs no copy there. The kernel reads a ring of whole tiles without a copy, and skips columns itself.
TPU = Layout(HeadsFirst, scanned=True, chunks=1, tile=128)
_CHUNK_COLUMNS = 16  # a ring has no more chunks than it has these


def layout() -> Layout:
  """The layout for the platform of the program that is traced now."""
  return TPU if sharding.platform() == 'tpu' else PLAIN


class Cache(NamedTuple):
  """Keys and values of a stage of layers, of S sequences, T columns of each."""

  # Heads stand before time, so that the keys that one query reads of a head are contiguous.
  k_LSKTH: Array  # in the dtype of the computation, or int8
  v_LSKTH: Array
  k_scale_LSKT: Array | None = None  # float32, of int8: a value is its integer times the scale
  v_scale_LSKT: Array | None = None


@functools.partial(jax.jit, static_argnums=0)
def sampling_params(config: policy.Config, params: Any) -> Any:
  """The parameters as `prefill` and `decode` read them: in the dtype of the computation, layers in stages.

  On a mesh they are divided over 'model' alone, so that no step of a sampler gathers parameters, and key/value
  heads are repeated until 'model' divides them.
  """
  cast = lambda path, x: x if re.search('norm|router', path[-1].key) else x.astype(config.dtype)
  # From the partition of learning first to the table's on this mesh: each device sends parts of parts.
  cast_params = sharding.constrain(jax.tree_util.tree_map_with_path(cast, params))
  layers, copies = dict(cast_params['layers']), sharding.head_copies(config.num_kv_heads)
  for name, x in layers.items():
    letters = name.rpartition('_')[2]
    if 'K' in letters:
      layers[name] = jnp.repeat(x, copies, axis=1 + letters.index('K'))
  if layout().block is HeadsFirst:
    for plain, heads_first in (('q_DNH', 'q_NHD'), ('k_DKH', 'k_KHD'), ('v_DKH', 'v_KHD')):
      layers[heads_first] = jnp.einsum('ldnh->lnhd', layers.pop(plain))
  stages = tuple(jax.tree.map(lambda x: x[stage.start:stage.stop], layers) for stage in _stages(config))
  return sharding.constrain({**cast_params, 'layers': stages}, axes=('model',))


def _stages(config: policy.Config) -> tuple[range, ...]:
  size = config.num_layers if layout().scanned else 1
  return tuple(range(i, i + size) for i in range(0, config.num_layers, size))


def _through(config: policy.Config, stage: range, layer: Callable[..., tuple[Any, Any]], carry: Any, params: Any
             ) -> tuple[Any, Any]:
  """Scans carry, output = layer(carry, params, i, kind) over the layers of a stage; i counts in the stage."""
  kinds = config.kind_of_layer[stage.start:stage.stop]
  # Experts are those of all layers, read where they stand: what a scan takes out of them for a kernel is a copy.
  experts = {name: x for name, x in params.items() if name in moe.MATRICES}
  params = {name: x for name, x in params.items() if name not in experts}
  if len(stage) == 1:
    params = jax.tree.map(lambda x: x[0], params)
    carry, output = layer(carry, params | experts, 0, kinds[0])
    return carry, jax.tree.map(lambda x: x[None], output)
  return jax.lax.scan(
      lambda carry, x: layer(carry, x[0] | experts, x[1], x[2] if len(config.kinds) > 1 else 0), carry,
      (params, np.arange(len(stage), dtype=np.int32), np.array(kinds)))


def _stored(k_BTKH: Array, v_BTKH: Array, int8: bool) -> Cache:
  k_BKTH, v_BKTH = (jnp.einsum('btkh->bkth', x) for x in (k_BTKH, v_BTKH))
  if not int8:
    return Cache(k_BKTH, v_BKTH)

  def quantized(x_BKTH):
    x_BKTH = x_BKTH.astype(jnp.float32)
    scale_BKT = jnp.maximum(jnp.max(jnp.abs(x_BKTH), axis=-1), 1e-30) / 127
    return jnp.round(x_BKTH / scale_BKT[..., None]).astype(jnp.int8), scale_BKT

  (k_BKTH, k_scale_BKT), (v_BKTH, v_scale_BKT) = map(quantized, (k_BKTH, v_BKTH))
  return Cache(k_BKTH, v_BKTH, k_scale_BKT, v_scale_BKT)


def prefill(config: policy.Config, params: Any, token_BP: Array, length_B: Array, *, int8: bool = False
            ) -> tuple[Array, tuple[Cache, ...]]:
  """Reads prompts that are padded on the right, with sampling params. int8: whether the cache holds integers.

  Returns:
    logits_BV, float32, of the token after the last one of each prompt; and the cache by stage, P columns. The
    columns from a prompt's length on hold padding.
  """
  B, P = token_BP.shape
  tables = policy.rope_tables(config, jnp.broadcast_to(jnp.arange(P)[None], (B, P)))
  windows = [kind.window for kind in config.kinds]
  last_token = jax.vmap(lambda x_P, length: jax.lax.dynamic_slice_in_dim(x_P, length - 1, 1))
  stages, block = _stages(config), policy.block(config, layout().block)

  def layer(x_BPD, params, i, kind, only_last):
    one = block(params)
    q, k, v = one.qkv(x_BPD, attention.of_kind(kind, tables))
    context_BPNH = attention.packed(q, k, v, jnp.zeros_like(token_BP), windows=windows, kind=kind)
    if only_last:
      x_BPD, context_BPNH = last_token(x_BPD, length_B), last_token(context_BPNH, length_B)
    return one.add(x_BPD, context_BPNH, i)[0], _stored(k, v, int8)

  x_BPD, cache = policy.embed(config, params, token_BP), []
  for stage, stage_params in zip(stages, params['layers'], strict=True):
    only_last = stage[0] == config.num_layers - 1  # nothing reads the last layer's other tokens
    x_BPD, stored = _through(config, stage, functools.partial(layer, only_last=only_last), x_BPD, stage_params)
    cache.append(stored)
  x_B1D = x_BPD if only_last else last_token(x_BPD, length_B)
  return policy.logits_of(config, params, policy.last_norm(config, params, x_B1D))[:, 0], tuple(cache)


def empty(prefix: tuple[Cache, ...], slots: int, columns: int) -> tuple[tuple[Cache, ...], ...]:
  """Rings of at least this many columns, by stage, each in chunks of columns of equal size."""
  of = layout()
  chunks = min(of.chunks, -(-columns // _CHUNK_COLUMNS))
  width = -(-columns // (chunks * of.tile)) * of.tile
  chunk = lambda x: jnp.zeros((x.shape[0], slots, x.shape[2], width, *x.shape[4:]), x.dtype)
  return tuple(tuple(jax.tree.map(chunk, stage) for _ in range(chunks)) for stage in prefix)


def _append(ring: tuple[Cache, ...], new: Cache, layer: int | Array, column: Array) -> tuple[Cache, ...]:
  """A stage's ring, after all slots write to one column of one layer."""
  width = ring[0].k_LSKTH.shape[3]

  def write(i, chunk):
    def put(chunk):
      start = (layer, 0, 0, column - i * width, 0)
      return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice(x, y[None], start[:x.ndim]), chunk, new)
    if len(ring) == 1:
      return put(chunk)
    return jax.lax.cond(column // width == i, put, lambda chunk: chunk, chunk)

  return tuple(write(i, chunk) for i, chunk in enumerate(ring))


class Slots(NamedTuple):
  """The sequences of S slots, when `decode` reads their next tokens."""

  prompt_S: Array  # row of the prefix that a slot continues
  prompt_length_S: Array  # tokens
  count_S: Array  # tokens that a slot has decoded, the one to read among them; 0: the slot is free
  step: Array  # one for all slots: the token of step t stands in column t of the ring


def _columns_read(slots: Slots, column: Array, columns: int, window: int = 0) -> tuple[Array, ...]:
  """The columns that slots read: first and number in the prompt, first and number in the ring."""
  count_S, prompt_S = slots.count_S, jnp.where(slots.count_S > 0, slots.prompt_length_S, 0)
  skipped_S = jnp.zeros_like(prompt_S)
  if window:
    skipped_S = jnp.clip(prompt_S + count_S - window, 0, prompt_S)
    count_S = jnp.minimum(count_S, window)
  return skipped_S, prompt_S - skipped_S, (column - count_S + 1) % columns, count_S


def decode(config: policy.Config, params: Any, token_S: Array, slots: Slots, prefix: tuple[Cache, ...],
           rings: tuple[tuple[Cache, ...], ...]) -> tuple[Array, tuple[tuple[Cache, ...], ...]]:
  """Appends one token (int32) to each of S sequences: a prompt, and the tokens decoded after it.

  Args:
    params: sampling params.
    slots: a slot decodes at most as many tokens as a ring has columns, and steps without a break.
    prefix: the prompts, as `prefill` returns them.
    rings: as `empty` and this function return them.

  Returns:
    logits_SV, float32, of the token after this one, and without a meaning where a slot is free; and the rings
    with the tokens in them.
  """
  columns = sum(chunk.k_LSKTH.shape[3] for chunk in rings[0])
  column = slots.step % columns
  tables = policy.rope_tables(config, (slots.prompt_length_S + slots.count_S - 1)[:, None])
  read = [_columns_read(slots, column, columns, kind.window) for kind in config.kinds]
  x_S1D, block = policy.embed(config, params, token_S[:, None]), policy.block(config, layout().block)
  after = []
  for stage, stage_params, prompts, ring in zip(_stages(config), params['layers'], prefix, rings, strict=True):
    def layer(carry, params, i, kind, prompts=prompts):
      (x_S1D, ring), one = carry, block(params)
      q_S1NH, k, v = one.qkv(x_S1D, attention.of_kind(kind, tables))
      ring = _append(ring, _stored(k, v, prompts.k_scale_LSKT is not None), i, column)
      context_SNH = decode_attention(
          q_S1NH[:, 0], prompts, ring, slots.prompt_S, *attention.of_kind(kind, read), layer=i)
      return (one.add(x_S1D, context_SNH[:, None], i)[0], ring), None

    (x_S1D, ring), _ = _through(config, stage, layer, (x_S1D, ring), stage_params)
    after.append(ring)
  return policy.logits_of(config, params, policy.last_norm(config, params, x_S1D))[:, 0], tuple(after)
