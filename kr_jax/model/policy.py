"""The policy: a decoder-only transformer of the families in families.py.

    x += o(attention(rope(q h), rope(k h), v h)),   h = rmsnorm(x)
    x += down(activation(gate h) * up h),           h = rmsnorm(x)

Query heads share key/value heads. A config may add tied embeddings, q/k norms of each head (Qwen3, Gemma 3) or of all
together (OLMo 2), q/k/v biases (Qwen2), scaled and partial rotations (Llama 3, yarn, Phi-4-mini), layers without
rotations (SmolLM3), layers that read a window (Gemma 3, OLMo 3), norms after attention and MLP beside or instead of
those before, experts instead of the MLP (moe.py), and Gemma 3's gelu and scaled embeddings. Parameters are float32 and
stacked over layers. Layers are scanned, so that compile time does not grow with depth. A sampler has programs of its
own (decode.py).

With `lora_rank` each matrix W of a layer has an adapter: y = x W + (alpha / rank) (x A) B, with B = 0 at first
(Hu et al. 2021, arXiv 2106.09685, eq. 3). The adapters alone are trained; a sampler reads merged parameters.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from kr_jax import knobs
from kr_jax import sharding
from kr_jax import types
from kr_jax.model import attention
from kr_jax.model import moe
from kr_jax.types import Array

# What a layer keeps for its backward pass; the rest is computed again.
REMAT = {
    'none': None,  # keeps everything
    # Products with weights. By name: jax's policies for products do not look into `_times`.
    'dots': jax.checkpoint_policies.save_only_these_names('product', 'attention'),
    'attention': jax.checkpoint_policies.save_only_these_names('attention'),
    'full': jax.checkpoint_policies.nothing_saveable,  # keeps the layer's input alone
}
ACTIVATIONS = {'silu': jax.nn.silu, 'gelu': functools.partial(jax.nn.gelu, approximate=True)}


class Kind(NamedTuple):
  """What layers of a policy have not in common."""

  window: int  # tokens that the layer reads, the token itself among them; 0: all
  local_rope: bool  # whether its rotations are those of local layers
  rotates: bool


@knobs.section
class Config(knobs.Sizes):
  """Sizes of a policy, and the parts that only published checkpoints have."""

  family: str = ''  # model_type of the checkpoint; '': from scratch
  context: int = 0  # tokens that the checkpoint was made to read; 0: not known
  activation: str = 'silu'  # a name in ACTIVATIONS
  rope_scaling: attention.Scaling | None = None
  rope_width: int = 0  # of a head's numbers, those that rotate; 0: all
  norm_offset: float = 0.0  # norms multiply by norm_offset + their parameter
  pre_norms: bool = True  # norms of the inputs of attention and MLP
  post_norms: bool = False  # norms of the outputs of attention and MLP
  qk_norm_whole: bool = False  # q/k norms are over all heads together
  embedding_scale: bool = False  # embeddings are multiplied by sqrt(D)
  query_scalar: float = 0.0  # attention divides by its square root; 0: head_width
  window: int = 0  # tokens that a local layer reads, the token itself among them
  local_layers: tuple[bool, ...] = ()  # which layers are local; (): none
  local_rope_theta: float = 0.0  # rope_theta of local layers, whose frequencies are not scaled
  no_rope_layers: tuple[bool, ...] = ()  # which layers do not rotate; (): none
  normalize_experts: bool = True  # the weights of a token's experts add up to 1

  def conflicts(self):
    yield from super().conflicts()
    if self.vocab_size < 1:
      yield f'policy.vocab_size={self.vocab_size} is below 1'
    if self.activation not in ACTIVATIONS:
      yield f'policy.activation={self.activation!r} is not one of {tuple(ACTIVATIONS)}'
    for name in ('local_layers', 'no_rope_layers'):
      if len(getattr(self, name)) not in (0, self.num_layers):
        yield f'policy.{name}={getattr(self, name)} must be of {self.num_layers} layers, or ()'
    if any(self.local_layers) and self.window < 1:
      yield f'policy.window={self.window} of local layers is below 1'

  @functools.cached_property
  def kinds(self) -> tuple[Kind, ...]:
    """The kinds of layers that there are, in the order of the first of each."""
    return tuple(dict.fromkeys(self._kind_of))

  @functools.cached_property
  def kind_of_layer(self) -> tuple[int, ...]:
    """Of each layer, the index of its kind."""
    return tuple(map(self.kinds.index, self._kind_of))

  @functools.cached_property
  def _kind_of(self) -> list[Kind]:
    none = (False,) * self.num_layers
    return [Kind(self.window if is_local else 0, is_local and self.local_rope_theta > 0, not no_rope)
            for is_local, no_rope in zip(self.local_layers or none, self.no_rope_layers or none)]


def rmsnorm(x: Array, scale: Array, eps: float) -> Array:
  """Root-mean-square norm over the axes of `scale`, the last ones, in float32. Zhang & Sennrich 2019, arXiv 1910.07467,
  eq. 4."""
  x32, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
  x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + eps)
  return (x32 * jnp.expand_dims(scale, range(x.ndim - scale.ndim))).astype(x.dtype)


# Cheap to compute again: only the input is kept for the backward pass.
_rmsnorm = jax.checkpoint(rmsnorm, static_argnums=2, prevent_cse=False)


def _norm_scale(config: Config, norm: Array) -> Array:
  return config.norm_offset + norm if config.norm_offset else norm


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _times(x: Array, weight: Array, i: str, o: str) -> Array:
  """x [B, T, *i] times a matrix [*i, *o]; i and o are letters."""
  return jnp.einsum(f'bt{i},{i}{o}->bt{o}', x, weight)


def _times_forward(x, weight, i, o):
  return _times(x, weight, i, o), (x, weight)


def _times_backward(i, o, kept, dy):
  x, weight = kept
  # Over one dimension: over two, XLA on a CPU transposes an operand, and all that is fused into it.
  flat = lambda y: y.reshape(math.prod(y.shape[:2]), -1)
  d_weight = jnp.einsum('ti,to->io', flat(x), flat(dy)).reshape(weight.shape)
  return jnp.einsum(f'bt{o},{i}{o}->bt{i}', dy, weight), d_weight


_times.defvjp(_times_forward, _times_backward)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
  return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class Block(nnx.Module):
  """One layer."""

  def __init__(self, c: Config, *, rngs: nnx.Rngs):
    D, N, K, H, F, E, A = (c.width, c.num_heads, c.num_kv_heads, c.head_width, c.hidden_width, c.num_experts,
                           c.lora_rank)
    norm = lambda *shape: nnx.Param(jnp.full(shape, 1 - c.norm_offset))
    zeros = lambda *shape: nnx.Param(jnp.zeros(shape))
    self.c = c
    if c.pre_norms:
      self.attention_norm_D, self.mlp_norm_D = norm(D), norm(D)
    if c.post_norms:
      self.attention_post_norm_D, self.mlp_post_norm_D = norm(D), norm(D)
    # Residual branches shrink with depth, so that the sum of 2L of them starts near the embedding.
    branch = (2 * c.num_layers) ** -0.5
    self.q_DNH = _normal(rngs, (D, N, H), D ** -0.5)
    self.k_DKH = _normal(rngs, (D, K, H), D ** -0.5)
    self.v_DKH = _normal(rngs, (D, K, H), D ** -0.5)
    self.o_NHD = _normal(rngs, (N, H, D), branch * (N * H) ** -0.5)
    if E:
      self.router_DE = _normal(rngs, (D, E), D ** -0.5)
      self.gate_EDF = _normal(rngs, (E, D, F), D ** -0.5)
      self.up_EDF = _normal(rngs, (E, D, F), D ** -0.5)
      self.down_EFD = _normal(rngs, (E, F, D), branch * F ** -0.5)
    else:
      self.gate_DF = _normal(rngs, (D, F), D ** -0.5)
      self.up_DF = _normal(rngs, (D, F), D ** -0.5)
      self.down_FD = _normal(rngs, (F, D), branch * F ** -0.5)
    if c.qkv_bias:
      self.q_bias_NH, self.k_bias_KH, self.v_bias_KH = zeros(N, H), zeros(K, H), zeros(K, H)
    if c.qk_norm and c.qk_norm_whole:
      self.q_norm_NH, self.k_norm_KH = norm(N, H), norm(K, H)
    elif c.qk_norm:
      self.q_norm_H, self.k_norm_H = norm(H), norm(H)
    adapter = lambda i, o: (
        (_normal(rngs, (*i, A), math.prod(i) ** -0.5), zeros(A, *o)) if c.lora_rank else (None, None))
    self.q_lora_DA, self.q_lora_ANH = adapter((D,), (N, H))
    self.k_lora_DA, self.k_lora_AKH = adapter((D,), (K, H))
    self.v_lora_DA, self.v_lora_AKH = adapter((D,), (K, H))
    self.o_lora_NHA, self.o_lora_AD = adapter((N, H), (D,))
    if not E:  # experts have no adapters: each would learn from few tokens alone
      self.gate_lora_DA, self.gate_lora_AF = adapter((D,), (F,))
      self.up_lora_DA, self.up_lora_AF = adapter((D,), (F,))
      self.down_lora_FA, self.down_lora_AD = adapter((F,), (D,))

  def cast(self, weight: nnx.Param) -> Array:
    """A weight in the dtype of the computation."""
    return weight[...].astype(self.c.dtype)

  def _norm(self, x: Array, norm: nnx.Param) -> Array:
    return _rmsnorm(x, _norm_scale(self.c, norm[...]), self.c.norm_eps)

  def _product(self, i: str, o: str, x: Array, matrix: nnx.Param, down: nnx.Param | None, up: nnx.Param | None
               ) -> Array:
    """x [B, T, *i] times a matrix [*i, *o], and times its adapter of two matrices; i and o are letters."""
    y = _times(x, self.cast(matrix), i, o)
    if self.c.lora_rank:
      y += self.c.lora_alpha / self.c.lora_rank * _times(_times(x, self.cast(down), i, 'a'), self.cast(up), 'a', o)
    return checkpoint_name(y, 'product')

  def qkv_products(self, h_BTD: Array) -> tuple[Array, Array, Array]:
    """Products with the matrices of queries, keys and values."""
    return (self._product('d', 'nh', h_BTD, self.q_DNH, self.q_lora_DA, self.q_lora_ANH),
            self._product('d', 'kh', h_BTD, self.k_DKH, self.k_lora_DA, self.k_lora_AKH),
            self._product('d', 'kh', h_BTD, self.v_DKH, self.v_lora_DA, self.v_lora_AKH))

  def qkv(self, x_BTD: Array, table: attention.RopeTable) -> tuple[Array, Array, Array]:
    """Queries, keys and values of the layer's input: q_BTNH, k_BTKH, v_BTKH."""
    c = self.c
    q_BTNH, k_BTKH, v_BTKH = self.qkv_products(self._norm(x_BTD, self.attention_norm_D) if c.pre_norms else x_BTD)
    if c.qkv_bias:
      q_BTNH += self.cast(self.q_bias_NH)[None, None]
      k_BTKH += self.cast(self.k_bias_KH)[None, None]
      v_BTKH += self.cast(self.v_bias_KH)[None, None]
    if c.qk_norm:
      q_norm, k_norm = (self.q_norm_NH, self.k_norm_KH) if c.qk_norm_whole else (self.q_norm_H, self.k_norm_H)
      q_BTNH, k_BTKH = self._norm(q_BTNH, q_norm), self._norm(k_BTKH, k_norm)
    if c.query_scalar:  # attention divides by sqrt(H)
      q_BTNH *= (c.head_width / c.query_scalar) ** 0.5
    return attention.rope(q_BTNH, table), attention.rope(k_BTKH, table), v_BTKH

  def add(self, x_BTD: Array, context_BTNH: Array, layer: int | Array | None = None) -> tuple[Array, Array | None]:
    """The layer's output, from its input and the context that attention read; and the experts that each token was
    sent to, expert_BTX, or None where there are none. layer: as of moe.mlp.
    """
    c = self.c
    attended_BTD = self._product('nh', 'd', context_BTNH, self.o_NHD, self.o_lora_NHA, self.o_lora_AD)
    if c.post_norms:
      attended_BTD = self._norm(attended_BTD, self.attention_post_norm_D)
    x_BTD += attended_BTD
    mlp_BTD, expert_BTX = self._mlp(self._norm(x_BTD, self.mlp_norm_D) if c.pre_norms else x_BTD, layer)
    if c.post_norms:
      mlp_BTD = self._norm(mlp_BTD, self.mlp_post_norm_D)
    return x_BTD + mlp_BTD, expert_BTX

  def _mlp(self, h_BTD: Array, layer: int | Array | None) -> tuple[Array, Array | None]:
    c = self.c
    if c.num_experts:
      return moe.mlp(
          h_BTD, self.router_DE[...], *map(self.cast, (self.gate_EDF, self.up_EDF, self.down_EFD)),
          per_token=c.experts_per_token, normalize=c.normalize_experts, activation=ACTIVATIONS[c.activation],
          layer=layer)
    gate_BTF = self._product('d', 'f', h_BTD, self.gate_DF, self.gate_lora_DA, self.gate_lora_AF)
    up_BTF = self._product('d', 'f', h_BTD, self.up_DF, self.up_lora_DA, self.up_lora_AF)
    # Of the two products nothing but them is kept for the backward pass.
    return jax.checkpoint(self._down, prevent_cse=False)(gate_BTF, up_BTF), None

  def _down(self, gate_BTF: Array, up_BTF: Array) -> Array:
    h_BTF = ACTIVATIONS[self.c.activation](gate_BTF) * up_BTF
    return self._product('f', 'd', h_BTF, self.down_FD, self.down_lora_FA, self.down_lora_AD)


class Policy(nnx.Module):
  """Embedding, L stacked blocks, final norm, output."""

  def __init__(self, c: Config, *, rngs: nnx.Rngs):
    self.embed_VD = _normal(rngs, (c.vocab_size, c.width), 0.02)
    self.layers = nnx.vmap(lambda r: Block(c, rngs=r))(rngs.split(c.num_layers))
    self.norm_D = nnx.Param(jnp.full(c.width, 1 - c.norm_offset))
    if not c.tie_embeddings:
      self.output_DV = _normal(rngs, (c.width, c.vocab_size), c.width ** -0.5)


@functools.partial(jax.jit, static_argnums=0)
def init(config: Config, key: Array) -> Any:
  """Random parameters: nested dicts of float32 arrays, on the mesh that is set."""
  return sharding.constrain(nnx.to_pure_dict(nnx.state(Policy(config, rngs=nnx.Rngs(key)))))


def block(config: Config, cls: type[Block] = Block) -> Callable[[Any], Block]:
  """A function that makes a Block of the parameters of one layer. A program makes it once for all layers."""
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))
  return lambda params: nnx.merge(graphdef, params)


def rope_tables(config: Config, position_BT: Array) -> tuple[attention.RopeTable, ...]:
  """The table of each kind of layer."""
  width, scaling = config.rope_width or config.head_width, config.rope_scaling

  @functools.cache  # kinds that rotate alike share one
  def table(local_rope: bool, rotates: bool) -> attention.RopeTable:
    if not rotates:
      return attention.rope_table(position_BT, np.zeros(width // 2, np.float32))
    if local_rope:
      return attention.rope_table(position_BT, attention.frequencies(config.local_rope_theta, width))
    return attention.rope_table(position_BT, attention.frequencies(config.rope_theta, width, scaling),
                                scaling.attention_factor if scaling else 1.0)

  return tuple(table(kind.local_rope, kind.rotates) for kind in config.kinds)


def embed(config: Config, params: Any, token_BT: Array) -> Array:
  """x_BTD, the input of the first layer."""
  x_BTD = params['embed_VD'].astype(config.dtype)[token_BT]
  # The factor is rounded to the dtype, as Gemma was trained.
  return x_BTD * jnp.asarray(config.width ** 0.5, x_BTD.dtype) if config.embedding_scale else x_BTD


def last_norm(config: Config, params: Any, x_BTD: Array) -> Array:
  """hidden_BTD, from the output of the last layer."""
  return rmsnorm(x_BTD, _norm_scale(config, params['norm_D']), config.norm_eps)


def _take(x_BTNH: Array, index: Array, shards: int) -> Array:
  """Of each shard's tokens, in whatever rows, the tokens at `index`, in the rows of `index`."""
  of_shard = x_BTNH.reshape(shards, -1, *x_BTNH.shape[2:])
  taken = jax.vmap(lambda x, i: x[i])(of_shard, index.reshape(shards, -1))
  return taken.reshape(*index.shape, *x_BTNH.shape[2:])


def hidden(config: Config, params: Any, token_BT: Array, position_BT: Array, segment_BT: Array,
           rows: types.Rows | None = None) -> Array:
  """What the output matrix takes to next-token logits, of rows that may hold several sequences.

  Args:
    token_BT: int32.
    position_BT: position of each token in its sequence.
    segment_BT: int32, the number of a token's sequence. A token reads those before it in its row that share it.
    rows: the rows that attention reads instead of these; segment_BT is not read then.

  Returns:
    hidden_BTD, in the dtype of the computation.
  """
  return hidden_and_load(config, params, token_BT, position_BT, segment_BT, rows)[0]


def hidden_and_load(config: Config, params: Any, token_BT: Array, position_BT: Array, segment_BT: Array,
                    rows: types.Rows | None = None, counted_BT: Array | None = None) -> tuple[Array, Array | None]:
  """`hidden`; and load_LE, int32, how many of the tokens of counted_BT (None: of all) each expert was sent, or None."""
  B, block_of, windows = token_BT.shape[0], block(config), [kind.window for kind in config.kinds]
  tables = rope_tables(config, position_BT)

  def layer(x_BTD, params_and_kind):
    params, kind = params_and_kind
    params = {name: x if 'norm' in name else _gathered(config, name, x) for name, x in params.items()}
    one, kind = block_of(params), kind if len(tables) > 1 else 0
    qkv = one.qkv(x_BTD, attention.of_kind(kind, tables))
    attend = functools.partial(attention.packed, windows=windows, kind=kind)
    if rows is None:
      x_BTD, expert_BTX = one.add(x_BTD, attend(*qkv, segment_BT))
    else:
      context_GSNH = attend(*(_take(x, rows.source_GS, B) for x in qkv), rows.segment_GS)
      x_BTD, expert_BTX = one.add(x_BTD, _take(context_GSNH, rows.place_BT, B))
    return x_BTD, None if expert_BTX is None else _load(config, expert_BTX, counted_BT)

  if config.remat != 'none':
    layer = jax.checkpoint(layer, policy=REMAT[config.remat], prevent_cse=False)
  x_BTD = sharding.constrain_rows(embed(config, params, token_BT))
  x_BTD, load_LE = jax.lax.scan(layer, x_BTD, (params['layers'], np.array(config.kind_of_layer)))
  return last_norm(config, params, x_BTD), load_LE


def _load(config: Config, expert_BTX: Array, counted_BT: Array | None) -> Array:
  counted_BT = jnp.ones(expert_BTX.shape[:2], bool) if counted_BT is None else counted_BT
  return moe.load(expert_BTX, counted_BT, config.num_experts)


def _gathered(config: Config, name: str, x: Array) -> Array:
  # Near-ties of a router in fewer bits would send a token elsewhere than the sampler sent it.
  return sharding.gather(name, x if 'router' in name else x.astype(config.dtype))


def gather_vocabulary(config: Config, params: Any) -> Any:
  """Parameters whose embedding and output matrix are gathered: once for both, where they are the same."""
  return {name: _gathered(config, name, x) if name in ('embed_VD', 'output_DV') else x for name, x in params.items()}


def output_matrix(config: Config, params: Any) -> Array:
  """output_DV, in the dtype of the computation: logits are hidden @ output_DV."""
  output_DV = params['embed_VD'].T if config.tie_embeddings else params['output_DV']
  return output_DV.astype(config.dtype)


def logits_of(config: Config, params: Any, hidden_BTD: Array) -> Array:
  """logits_BTV, float32."""
  return jnp.einsum('btd,dv->btv', hidden_BTD, output_matrix(config, params), preferred_element_type=jnp.float32)


def logits(config: Config, params: Any, token_BT: Array) -> Array:
  """Next-token logits of rows of one sequence each: logits_BTV, float32."""
  B, T = token_BT.shape
  position_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
  return logits_of(config, params, hidden(config, params, token_BT, position_BT, jnp.zeros_like(position_BT)))


def without_lora(config: Config) -> Config:
  """The config of parameters without adapters."""
  return config.replace(lora_rank=0)


def split(config: Config, params: Any) -> tuple[Any, Any]:
  """The trained parameters and the base, which is not: (adapters, the rest), or (params, {}) without any."""
  if not config.lora_rank:
    return params, {}
  layers = params['layers']
  adapters = {name: x for name, x in layers.items() if '_lora_' in name}
  others = {name: x for name, x in layers.items() if '_lora_' not in name}
  return {'layers': adapters}, {**params, 'layers': others}


def join(config: Config, trained: Any, base: Any) -> Any:
  """The parameters that `split` separated."""
  if not config.lora_rank:
    return trained
  return {**base, 'layers': {**base['layers'], **trained['layers']}}


def merge(config: Config, trained: Any, base: Any) -> Any:
  """Parameters of `without_lora(config)` with the same logits: W + (alpha / rank) A B."""
  return _merge_adapters(config, trained, base) if config.lora_rank else trained


# The two matrices of the adapter of each matrix. The letters of a name are its axes.
_ADAPTERS = {
    'q_DNH': ('q_lora_DA', 'q_lora_ANH'),
    'k_DKH': ('k_lora_DA', 'k_lora_AKH'),
    'v_DKH': ('v_lora_DA', 'v_lora_AKH'),
    'o_NHD': ('o_lora_NHA', 'o_lora_AD'),
    'gate_DF': ('gate_lora_DA', 'gate_lora_AF'),
    'up_DF': ('up_lora_DA', 'up_lora_AF'),
    'down_FD': ('down_lora_FA', 'down_lora_AD'),
}


@functools.partial(jax.jit, static_argnums=0)
def _merge_adapters(config: Config, trained: Any, base: Any) -> Any:
  merged, adapters = dict(base['layers']), trained['layers']
  letters = lambda name: 'L' + name.rpartition('_')[2]
  for matrix, (down, up) in _ADAPTERS.items():
    if down not in adapters:
      continue  # experts have none
    product = f'{letters(down)},{letters(up)}->{letters(matrix)}'.lower()
    merged[matrix] += config.lora_alpha / config.lora_rank * jnp.einsum(product, adapters[down], adapters[up])
  return {**base, 'layers': merged}
