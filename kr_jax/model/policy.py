"""The policy: a decoder-only transformer of the Llama, Qwen and Gemma families.

    x += O attention(rope(Q h), rope(K h), V h),  h = rmsnorm(x)
    x += Wo (silu(Wg h) * Wi h),                  h = rmsnorm(x)

with grouped-query attention and, where the config says so: tied embeddings, q/k norms (Qwen3, Gemma 3),
q/k/v biases (Qwen2), scaled rotary frequencies (Llama 3), and what Gemma 3 has of its own: layers that
read a window, norms after attention and MLP, gelu, scaled embeddings. Rotary positions are split in
halves, as in the published checkpoints. Parameters are float32 and stacked over layers; layers are
scanned, so compile time does not grow with depth.

The module is split once: outside this file the policy is `config` (hashable) and `params` (nested
dicts of arrays), and pure functions read them: `hidden` reads packed tokens, `output_matrix` is what
turns it into logits, `prefill` reads prompts into a cache, `decode` extends what each slot has read
by one token. These two read what `sampling_params` makes of the parameters, once a step, in stages of layers: on
a TPU all are one stage, which is scanned; elsewhere each is one, as XLA on a CPU copies what a loop
reads of a stack.

With `lora_rank` each matrix W of a layer has an adapter, y = x W + (alpha / rank) (x A) B, B = 0 at
first (Hu et al. 2021, arXiv 2106.09685, eq. 3). `split` parts the adapters, which are trained, from
the base, which is not; `merge` adds them to it. The sampler reads merged parameters.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from kr_jax import knobs
from kr_jax import sharding
from kr_jax import types
from kr_jax.kernels.decode_attention import decode_attention
from kr_jax.types import Array

# What the backward pass of a layer finds in memory; the rest is computed again.
REMAT = {
    'none': None,  # all is
    # Products with weights. By name: policies that look for products do not look into ours (`_times`).
    'dots': jax.checkpoint_policies.save_only_these_names('product', 'attention'),
    'attention': jax.checkpoint_policies.save_only_these_names('attention'),
    'full': jax.checkpoint_policies.nothing_saveable,  # the layer's input alone
}
ACTIVATIONS = {'silu': jax.nn.silu, 'gelu': functools.partial(jax.nn.gelu, approximate=True)}
# The matrices of a layer, in the order they are drawn: letters that go in, and that come out.
_MATRICES = {'q': ('D', 'NH'), 'k': ('D', 'KH'), 'v': ('D', 'KH'), 'o': ('NH', 'D'),
             'gate': ('D', 'F'), 'up': ('D', 'F'), 'down': ('F', 'D')}


@knobs.section
class Config(knobs.Sizes):
  """Sizes of a policy, and what published checkpoints have beside them; a policy from scratch has none of it."""

  activation: str = 'silu'  # a name in ACTIVATIONS
  rope_scaling: tuple[float, ...] = ()  # () none; (factor,); or Llama 3's (factor, low, high, context)
  norm_offset: float = 0.0  # norms multiply by this and their parameter
  post_norms: bool = False  # norms of what attention and MLP add
  embedding_scale: bool = False  # embeddings are multiplied by sqrt(D)
  query_scalar: float = 0.0  # attention divides by its root; 0: head_width
  window: int = 0  # tokens that a local layer reads, its own among them; 0: all layers read all
  global_every: int = 1  # of so many layers the last reads all
  local_rope_theta: float = 0.0  # of local layers, whose frequencies are not scaled

  def conflicts(self):
    yield from super().conflicts()
    if self.vocab_size < 1:
      yield f'policy.vocab_size={self.vocab_size} is below 1'
    if self.activation not in ACTIVATIONS:
      yield f'policy.activation={self.activation!r} is not one of {tuple(ACTIVATIONS)}'
    if len(self.rope_scaling) not in (0, 1, 4):
      yield (f'policy.rope_scaling={self.rope_scaling} is not (), (factor,) or '
             '(factor, low, high, context)')

  def is_local(self, layer: int) -> bool:
    """Whether a layer reads a window."""
    return self.window > 0 and (layer + 1) % self.global_every != 0


class Cache(NamedTuple):
  """Keys and values of a stage of layers, of S sequences, T columns of each.

  Heads stand before time, so that what one query reads of a head is contiguous.
  """

  k_LSKTH: Array  # in the dtype of the computation, or int8
  v_LSKTH: Array
  k_scale_LSKT: Array | None = None  # float32, of int8: a value is its integer times the scale
  v_scale_LSKT: Array | None = None


def rmsnorm(x: Array, scale: Array, eps: float) -> Array:
  """Root-mean-square norm over the last axis, in float32. Zhang & Sennrich 2019, eq. 4."""
  x32 = x.astype(jnp.float32)
  x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return (x32 * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _times(x: Array, weight: Array, i: str, o: str) -> Array:
  """x [B, T, *i] times a matrix [*i, *o]."""
  return jnp.einsum(f'bt{i},{i}{o}->bt{o}', x, weight)


def _times_forward(x, weight, i, o):
  return _times(x, weight, i, o), (x, weight)


def _times_backward(i, o, kept, dy):
  x, weight = kept
  # Over one dimension: over two, XLA on a CPU transposes an operand, with all that is fused into it.
  flat = lambda y: y.reshape(math.prod(y.shape[:2]), -1)
  d_weight = jnp.einsum('ti,to->io', flat(x), flat(dy)).reshape(weight.shape)
  return jnp.einsum(f'bt{o},{i}{o}->bt{i}', dy, weight), d_weight


_times.defvjp(_times_forward, _times_backward)

# Cheap to compute again: only the input is kept for the backward pass.
_rmsnorm = jax.checkpoint(rmsnorm, static_argnums=2, prevent_cse=False)


def _scale(config: Config, norm: Array) -> Array:
  """What a norm multiplies by, of its parameter."""
  return config.norm_offset + norm if config.norm_offset else norm


def frequencies(theta: float, head_width: int, scaling: tuple[float, ...] = ()) -> np.ndarray:
  """Radians a position, of each pair: theta^(-2i/H), float32 [H/2].

  Scaled by (factor,): all are divided by it. By (factor, low, high, context): those that turn less than
  `low` times in a context are divided, those that turn more than `high` times are not, and between them
  both are mixed (Llama 3.1's published code).
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


class Turns(NamedTuple):
  """What `rope` multiplies by at some positions: [B, T, 1, 2, H/2], float32."""

  cos: Array
  sin: Array  # with signs


def turns(position_BT: Array, config: Config) -> tuple[Turns, Turns]:
  """Of layers that read all, and of local ones.

  They are the same in all layers. XLA would compute them again in each, which on a CPU takes longer
  than the rotation.
  """
  def of(frequency_H):
    position_BT111 = position_BT[..., None, None, None].astype(jnp.float32)
    angle_BT11H = position_BT111 * frequency_H[None, None, None, None]
    cos, sin = jnp.cos(angle_BT11H), jnp.sin(angle_BT11H)
    return jax.lax.optimization_barrier(
        Turns(jnp.concatenate([cos, cos], axis=3), jnp.concatenate([-sin, sin], axis=3)))

  all_ = of(frequencies(config.rope_theta, config.head_width, config.rope_scaling))
  return all_, of(frequencies(config.local_rope_theta, config.head_width)) if config.window else all_


def rope(x_BTNH: Array, turns: Turns) -> Array:
  """Rotates the pairs (i, i + H/2) by position * theta^(-2i/H). Su et al. 2021, eq. 34."""
  x_BTN2H = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], 2, -1)
  turned_BTN2H = x_BTN2H * turns.cos + jnp.flip(x_BTN2H, axis=3) * turns.sin
  return turned_BTN2H.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


def _attend_masked(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array, window: int = 0
                   ) -> Array:
  T = segment_BT.shape[1]
  same_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]
  age_TT = jnp.arange(T)[:, None] - jnp.arange(T)[None]
  read_TT = (age_TT >= 0) & (age_TT < (window or T))
  return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=(same_BTT & read_TT[None])[:, None])


def _attend_segments(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array, window: int = 0
                     ) -> Array:
  """Each token reads those of its own segment up to itself, in memory linear in T on a TPU.

  A segment is contiguous. window: how many of its tokens it reads at the most; 0: all.
  """
  if sharding.platform() != 'tpu':
    return checkpoint_name(_attend_masked(q_BTNH, k_BTKH, v_BTKH, segment_BT, window), 'attention')
  copies = sharding.head_copies(k_BTKH.shape[2])
  k_BTKH, v_BTKH = (jnp.repeat(x, copies, axis=2) for x in (k_BTKH, v_BTKH))
  attend = functools.partial(_splash, window=window)
  if jax.sharding.get_abstract_mesh().empty:
    return attend(q_BTNH, k_BTKH, v_BTKH, segment_BT)
  taken = sharding.unmapped(sharding.AXES)
  over = sharding.unmapped(sharding.ROWS) or None
  rows, heads = PartitionSpec(over), PartitionSpec(over, None, 'model')
  return jax.shard_map(attend, in_specs=(heads, heads, heads, rows), out_specs=heads,
                       axis_names=set(taken), check_vma=False)(q_BTNH, k_BTKH, v_BTKH, segment_BT)


def _take(x_BTNH: Array, index: Array, shards: int) -> Array:
  """Of each shard's tokens, in whatever rows, those at `index`, in the rows of the index."""
  of_shard = x_BTNH.reshape(shards, -1, *x_BTNH.shape[2:])
  taken = jax.vmap(lambda x, i: x[i])(of_shard, index.reshape(shards, -1))
  return taken.reshape(*index.shape, *x_BTNH.shape[2:])


def _splash(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_BT: Array, window: int) -> Array:
  T, N, H = q_BTNH.shape[1:]
  block = max((b for b in (128, 256, 512) if T % b == 0), default=None)
  if block is None:
    raise ValueError(f'rows of {T} tokens (pack.row_length) must be a multiple of 128 on a TPU')
  mask = splash.LocalMask((T, T), (window - 1, 0), 0) if window else splash.CausalMask((T, T))
  kernel = splash.make_splash_mha(
      splash.MultiHeadMask([mask] * N), head_shards=1, q_seq_shards=1,
      block_sizes=splash.BlockSizes(
          block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block,
          block_kv_dq=block),
      residual_checkpoint_name='attention')
  heads_first = lambda x_BTNH: jnp.einsum('btnh->bnth', x_BTNH)
  context_BNTH = jax.vmap(lambda q, k, v, s: kernel(q, k, v, splash.SegmentIds(q=s, kv=s)))(
      heads_first(q_BTNH) * H ** -0.5, heads_first(k_BTKH), heads_first(v_BTKH), segment_BT)
  return jnp.einsum('bnth->btnh', context_BNTH)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
  return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


def _letters(name: str, heads_first: bool) -> str:
  """Of a matrix: those that go in, and those that come out, or heads before."""
  i, o = _MATRICES[name]
  return o + i if heads_first and 'H' in o else i + o


class Block(nnx.Module):
  """One layer."""

  def __init__(self, c: Config, *, rngs: nnx.Rngs, heads_first: bool = False):
    self.c, self.heads_first = c, heads_first
    size = {'D': c.width, 'N': c.num_heads, 'K': c.num_kv_heads, 'H': c.head_width,
            'F': c.hidden_width, 'A': c.lora_rank}
    shape = lambda letters: tuple(size[letter] for letter in letters)
    draw = lambda letters, std: _normal(rngs, shape(letters), std)
    fan_in = {name: math.prod(shape(i)) for name, (i, _) in _MATRICES.items()}
    norm = lambda width: nnx.Param(jnp.full(width, 1 - c.norm_offset))
    self.attention_norm_D, self.mlp_norm_D = norm(c.width), norm(c.width)
    if c.post_norms:
      self.attention_post_norm_D, self.mlp_post_norm_D = norm(c.width), norm(c.width)
    for name, (i, o) in _MATRICES.items():
      # Residual branches shrink with depth, so that the sum of 2L of them starts near the embedding.
      out = (2 * c.num_layers) ** -0.5 if o == 'D' else 1
      letters = _letters(name, heads_first)
      setattr(self, f'{name}_{letters}', draw(letters, out * fan_in[name] ** -0.5))
    if c.qkv_bias:
      for name, letters in (('q', 'NH'), ('k', 'KH'), ('v', 'KH')):
        setattr(self, f'{name}_bias_{letters}', nnx.Param(jnp.zeros(shape(letters))))
    if c.qk_norm:
      self.q_norm_H, self.k_norm_H = norm(c.head_width), norm(c.head_width)
    if c.lora_rank:
      for name, (i, o) in _MATRICES.items():
        setattr(self, f'{name}_lora_{i}A', draw(i + 'A', fan_in[name] ** -0.5))
        setattr(self, f'{name}_lora_A{o}', nnx.Param(jnp.zeros(shape('A' + o))))

  def _weight(self, name: str) -> Array:
    return getattr(self, name)[...].astype(self.c.dtype)

  def _norm(self, name: str, x: Array) -> Array:
    return _rmsnorm(x, _scale(self.c, getattr(self, name)[...]), self.c.norm_eps)

  def _product(self, name: str, x: Array) -> Array:
    """x times a matrix and its adapter."""
    i, o = _MATRICES[name]
    if self.heads_first:
      letters = _letters(name, True)
      return jnp.einsum(f'bt{i},{letters}->bt{o}'.lower(), x,
                        self._weight(f'{name}_{letters}'))
    times = lambda x, name, i, o: _times(x, self._weight(name), i.lower(), o.lower())
    y = times(x, f'{name}_{i}{o}', i, o)
    if self.c.lora_rank:
      y += self.c.lora_alpha / self.c.lora_rank * times(
          times(x, f'{name}_lora_{i}A', i, 'A'), f'{name}_lora_A{o}', 'A', o)
    return checkpoint_name(y, 'product')

  def qkv(self, x_BTD: Array, turns: Turns) -> tuple[Array, Array, Array]:
    c = self.c
    h_BTD = self._norm('attention_norm_D', x_BTD)
    q_BTNH, k_BTKH, v_BTKH = (self._product(name, h_BTD) for name in 'qkv')
    if c.qkv_bias:
      q_BTNH += self._weight('q_bias_NH')[None, None]
      k_BTKH += self._weight('k_bias_KH')[None, None]
      v_BTKH += self._weight('v_bias_KH')[None, None]
    if c.qk_norm:
      q_BTNH, k_BTKH = self._norm('q_norm_H', q_BTNH), self._norm('k_norm_H', k_BTKH)
    if c.query_scalar:  # whoever attends divides by the root of H
      q_BTNH *= (c.head_width / c.query_scalar) ** 0.5
    return rope(q_BTNH, turns), rope(k_BTKH, turns), v_BTKH

  def add(self, x_BTD: Array, context_BTNH: Array) -> Array:
    """The layer's output, from its input and what attention read."""
    c = self.c
    post = lambda name, y_BTD: self._norm(name, y_BTD) if c.post_norms else y_BTD
    x_BTD += post('attention_post_norm_D', self._product('o', context_BTNH))
    h_BTD = self._norm('mlp_norm_D', x_BTD)
    gated = jax.checkpoint(
        lambda gate, up: self._product('down', ACTIVATIONS[c.activation](gate) * up), prevent_cse=False)
    added_BTD = gated(self._product('gate', h_BTD), self._product('up', h_BTD))
    return x_BTD + post('mlp_post_norm_D', added_BTD)


class Policy(nnx.Module):
  """Embedding, L stacked blocks, final norm, output."""

  def __init__(self, c: Config, *, rngs: nnx.Rngs):
    self.c = c
    self.embed_VD = _normal(rngs, (c.vocab_size, c.width), 0.02)
    self.layers = nnx.vmap(lambda r: Block(c, rngs=r))(rngs.split(c.num_layers))
    self.norm_D = nnx.Param(jnp.full(c.width, 1 - c.norm_offset))
    if not c.tie_embeddings:
      self.output_DV = _normal(rngs, (c.width, c.vocab_size), c.width ** -0.5)


@functools.lru_cache
def _graphdef(config: Config, heads_first: bool) -> nnx.GraphDef:
  return nnx.split(nnx.eval_shape(
      lambda: Block(config, rngs=nnx.Rngs(0), heads_first=heads_first)))[0]


def _block(config: Config, params: Any) -> Block:
  """A layer, of its parameters."""
  return nnx.merge(_graphdef(config, 'q_NHD' in params), params)


def _embed(config: Config, params: Any, token_BT: Array) -> Array:
  x_BTD = params['embed_VD'].astype(config.dtype)[token_BT]
  # The factor is rounded to the dtype, as Gemma was trained.
  return x_BTD * jnp.asarray(config.width ** 0.5, x_BTD.dtype) if config.embedding_scale else x_BTD


def _last_norm(config: Config, params: Any, x_BTD: Array) -> Array:
  return rmsnorm(x_BTD, _scale(config, params['norm_D']), config.norm_eps)


def _output(config: Config, params: Any, hidden_BTD: Array) -> Array:
  return jnp.einsum('btd,dv->btv', hidden_BTD, output_matrix(config, params),
                    preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def init(config: Config, key: Array) -> Any:
  """Random parameters: nested dicts of float32 arrays, on the mesh that is set."""
  return sharding.constrain(nnx.to_pure_dict(nnx.state(Policy(config, rngs=nnx.Rngs(key)))))


def hidden(config: Config, params: Any, token_BT: Array, position_BT: Array, segment_BT: Array,
           rows: types.Rows | None = None) -> Array:
  """What the output matrix turns into next-token logits, of rows that may hold several sequences.

  Args:
    token_BT: int32.
    position_BT: position of each token in its sequence.
    segment_BT: int32, the sequence each token belongs to; a token sees the tokens before it in its
      row that have its own number.
    rows: those that attention reads, where it shall not read these; segment_BT is not looked at then.

  Returns:
    hidden_BTD, in the dtype of the computation.

  Raises:
    ValueError: rows whose length the TPU's attention kernel does not take.
  """
  B, (at_all, at_local) = token_BT.shape[0], turns(position_BT, config)

  def layer(x_BTD, of_layer):
    params, is_local = of_layer
    params = {name: x if 'norm' in name else _whole(config, name, x) for name, x in params.items()}
    block, is_local = _block(config, params), bool(config.window) and is_local
    qkv = block.qkv(x_BTD, _of_kind(is_local, at_local, at_all))
    if rows is None:
      context_BTNH = _attend(config, is_local, _attend_segments, *qkv, segment_BT)
    else:
      context_GSNH = _attend(config, is_local, _attend_segments,
                             *(_take(x, rows.source_GS, B) for x in qkv), rows.segment_GS)
      context_BTNH = _take(context_GSNH, rows.place_BT, B)
    return block.add(x_BTD, context_BTNH), None

  if config.remat != 'none':
    layer = jax.checkpoint(layer, policy=REMAT[config.remat], prevent_cse=False)
  is_local_L = np.array([config.is_local(i) for i in range(config.num_layers)])
  x_BTD, _ = jax.lax.scan(
      layer, sharding.constrain_rows(_embed(config, params, token_BT)), (params['layers'], is_local_L))
  return _last_norm(config, params, x_BTD)


def _of_kind(is_local: bool | Array, local: Any, others: Any) -> Any:
  """What a layer of its kind takes of two trees of arrays."""
  if isinstance(is_local, bool):
    return local if is_local else others
  return jax.tree.map(functools.partial(jnp.where, is_local), local, others)


def _attend(config: Config, is_local: bool | Array, attend: Callable[..., Array], *args: Array) -> Array:
  """attend(*args), in its window if the layer is local."""
  local = functools.partial(attend, window=config.window)
  if isinstance(is_local, bool):
    return (local if is_local else attend)(*args)
  return jax.lax.cond(is_local, local, attend, *args)


def _whole(config: Config, name: str, x: Array) -> Array:
  """A matrix in the dtype of the computation, as `sharding.gather` has it."""
  return sharding.gather(name, x.astype(config.dtype))


def gather_vocabulary(config: Config, params: Any) -> Any:
  """Parameters whose embedding and output are gathered: once for both, where they are the same."""
  return {name: _whole(config, name, x) if name in ('embed_VD', 'output_DV') else x
          for name, x in params.items()}


def output_matrix(config: Config, params: Any) -> Array:
  """output_DV, in the dtype of the computation: logits are hidden @ output_DV."""
  output_DV = params['embed_VD'].T if config.tie_embeddings else params['output_DV']
  return output_DV.astype(config.dtype)


def logits(config: Config, params: Any, token_BT: Array) -> Array:
  """Next-token logits of rows of one sequence each: logits_BTV, float32."""
  B, T = token_BT.shape
  position_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
  return _output(config, params, hidden(
      config, params, token_BT, position_BT, jnp.zeros_like(position_BT)))


def without_lora(config: Config) -> Config:
  """The config of parameters without adapters."""
  return dataclasses.replace(config, lora_rank=0)


def split(config: Config, params: Any) -> tuple[Any, Any]:
  """What is trained, and the base that is not: (adapters, the rest), or (params, {}) without any."""
  if not config.lora_rank:
    return params, {}
  layers = params['layers']
  adapter = lambda want: {k: x for k, x in layers.items() if ('_lora_' in k) == want}
  return {'layers': adapter(True)}, {**params, 'layers': adapter(False)}


def join(config: Config, trained: Any, base: Any) -> Any:
  """The parameters that `split` parted."""
  if not config.lora_rank:
    return trained
  return {**base, 'layers': {**base['layers'], **trained['layers']}}


def merge(config: Config, trained: Any, base: Any) -> Any:
  """Parameters of `without_lora(config)` with the same logits: W + (alpha / rank) A B."""
  return _merge_adapters(config, trained, base) if config.lora_rank else trained


@functools.partial(jax.jit, static_argnums=0)
def _merge_adapters(config: Config, trained: Any, base: Any) -> Any:
  merged, adapters = dict(base['layers']), trained['layers']
  for name, (i, o) in _MATRICES.items():
    merged[f'{name}_{i}{o}'] += config.lora_alpha / config.lora_rank * jnp.einsum(
        f'l{i}a,la{o}->l{i}{o}'.lower(), adapters[f'{name}_lora_{i}A'], adapters[f'{name}_lora_A{o}'])
  return {**base, 'layers': merged}


@functools.partial(jax.jit, static_argnums=0)
def sampling_params(config: Config, params: Any) -> Any:
  """What `prefill` and `decode` read: matrices in the dtype of the computation, in stages of layers.

  For a TPU heads stand first, as products read them there; else each step would copy a matrix. On a mesh
  they are divided over 'model' alone, so that no step of a sampler gathers parameters, and key/value
  heads are as many as that needs.
  """
  heads_first, copies = sharding.platform() == 'tpu', sharding.head_copies(config.num_kv_heads)

  cast = lambda path, x: x if 'norm' in path[-1].key else x.astype(config.dtype)
  # From the partition of learning first to the table's on this mesh: each device sends parts of parts.
  sampling_params = sharding.constrain(jax.tree_util.tree_map_with_path(cast, params))
  layers = dict(sampling_params['layers'])
  for name, x in layers.items():
    letters = name.rpartition('_')[2]
    if 'K' in letters:
      layers[name] = jnp.repeat(x, copies, axis=1 + letters.index('K'))
  for name, (i, o) in _MATRICES.items():
    letters = _letters(name, heads_first)
    layers[f'{name}_{letters}'] = jnp.einsum(
        f'l{i}{o}->l{letters}'.lower(), layers.pop(f'{name}_{i}{o}'))
  stages = tuple(jax.tree.map(lambda x: x[stage.start:stage.stop], layers) for stage in _stages(config))
  return sharding.constrain({**sampling_params, 'layers': stages}, axes=('model',))


def _stages(config: Config) -> tuple[range, ...]:
  """The layers of each stage of `prefill` and `decode`."""
  size = config.num_layers if sharding.platform() == 'tpu' else 1
  return tuple(range(i, i + size) for i in range(0, config.num_layers, size))


def _through(config: Config, stage: range, layer: Callable[..., tuple[Any, Any]], carry: Any, params: Any
             ) -> tuple[Any, Any]:
  """Carries something through a stage by layer(carry, params, i, is_local), where i counts in the stage.

  Returns what is carried, and what each layer gives beside it, stacked.
  """
  if len(stage) == 1:
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    carry, given = layer(carry, first(params), 0, config.is_local(stage[0]))
    return carry, jax.tree.map(lambda x: x[None], given)
  is_local_L = np.array([config.is_local(i) for i in stage])
  return jax.lax.scan(
      lambda carry, x: layer(carry, x[0], x[1], bool(config.window) and x[2]), carry,
      (params, np.arange(len(stage), dtype=np.int32), is_local_L))


def _stored(k_BTKH: Array, v_BTKH: Array, int8: bool) -> Cache:
  """Keys and values of one layer as a cache holds them."""
  k_BKTH, v_BKTH = (jnp.einsum('btkh->bkth', x) for x in (k_BTKH, v_BTKH))
  if not int8:
    return Cache(k_BKTH, v_BKTH)

  def quantized(x_BKTH):
    x_BKTH = x_BKTH.astype(jnp.float32)
    scale_BKT = jnp.maximum(jnp.max(jnp.abs(x_BKTH), axis=-1), 1e-30) / 127
    return jnp.round(x_BKTH / scale_BKT[..., None]).astype(jnp.int8), scale_BKT

  (k_BKTH, k_scale_BKT), (v_BKTH, v_scale_BKT) = map(quantized, (k_BKTH, v_BKTH))
  return Cache(k_BKTH, v_BKTH, k_scale_BKT, v_scale_BKT)


def prefill(config: Config, params: Any, token_BP: Array, length_B: Array, *, int8: bool = False
            ) -> tuple[Array, tuple[Cache, ...]]:
  """Reads prompts padded on the right.

  Args:
    params: as `sampling_params` gives them.
    int8: whether the cache is of integers.

  Returns:
    logits_BV, float32: of the token after each prompt's last; and by stage the cache, P columns, of
    which those from a prompt's length on hold padding.
  """
  B, P = token_BP.shape
  at_all, at_local = turns(jnp.broadcast_to(jnp.arange(P)[None], (B, P)), config)
  attend = _attend_masked if P % 128 else _attend_segments
  of_last = jax.vmap(lambda x_P, length: jax.lax.dynamic_slice_in_dim(x_P, length - 1, 1))
  stages = _stages(config)

  def layer(x_BPD, params, i, is_local, read=lambda x_BP, _: x_BP):
    block = _block(config, params)
    q, k, v = block.qkv(x_BPD, _of_kind(is_local, at_local, at_all))
    context_BPNH = _attend(config, is_local, attend, q, k, v, jnp.zeros_like(token_BP))
    return block.add(read(x_BPD, length_B), read(context_BPNH, length_B)), _stored(k, v, int8)

  x_BPD, cache = _embed(config, params, token_BP), []
  for stage, of_stage in zip(stages, params['layers'], strict=True):
    last_alone = stage[0] == config.num_layers - 1  # of its other tokens nothing is read any more
    x_BPD, kept = _through(
        config, stage, functools.partial(layer, read=of_last) if last_alone else layer, x_BPD, of_stage)
    cache.append(kept)
  x_B1D = x_BPD if last_alone else of_last(x_BPD, length_B)
  return _output(config, params, _last_norm(config, params, x_B1D))[:, 0], tuple(cache)


def empty(prefix: tuple[Cache, ...], slots: int, columns: int) -> tuple[tuple[Cache, ...], ...]:
  """Rings for what S slots decode, of at least so many columns: by stage, in chunks of columns.

  On a TPU in one, of whole tiles, which its kernel reads without a copy; elsewhere in some, of which
  those where no slot lives are not read.
  """
  if sharding.platform() == 'tpu':
    chunks, width = 1, -(-columns // 128) * 128
  else:
    chunks = min(4, -(-columns // 16))
    width = -(-columns // chunks)
  chunk = lambda x: jnp.zeros((x.shape[0], slots, x.shape[2], width, *x.shape[4:]), x.dtype)
  return tuple(tuple(jax.tree.map(chunk, stage) for _ in range(chunks)) for stage in prefix)


def _append(chunks: tuple[Cache, ...], new: Cache, layer: int | Array, column: Array) -> tuple[Cache, ...]:
  """The ring with what all slots write to a column of a layer of it."""
  width = chunks[0].k_LSKTH.shape[3]

  def write(i, chunk):
    def put(chunk):
      at = lambda x: (layer, 0, 0, column - i * width, 0)[:x.ndim]
      return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice(x, y[None], at(x)), chunk, new)
    if len(chunks) == 1:
      return put(chunk)
    return jax.lax.cond(column // width == i, put, lambda chunk: chunk, chunk)

  return tuple(write(i, chunk) for i, chunk in enumerate(chunks))


class Slots(NamedTuple):
  """Where S slots stand, as `decode` reads their next tokens."""

  prompt_S: Array  # row of the prefix that a slot continues
  prompt_length_S: Array  # tokens of that
  count_S: Array  # tokens it has decoded, with this one; 0: it is free
  step: Array  # of all slots: what is read at step t stands in column t of the ring


def _read(slots: Slots, column: Array, columns: int, window: int = 0) -> tuple[Array, ...]:
  """First column and length in the prompt, and in the ring of so many columns, of what slots read."""
  count_S, prompt_S = slots.count_S, jnp.where(slots.count_S > 0, slots.prompt_length_S, 0)
  skipped_S = jnp.zeros_like(prompt_S)
  if window:
    skipped_S = jnp.clip(prompt_S + count_S - window, 0, prompt_S)
    count_S = jnp.minimum(count_S, window)
  return skipped_S, prompt_S - skipped_S, (column - count_S + 1) % columns, count_S


def decode(config: Config, params: Any, token_S: Array, slots: Slots, prefix: tuple[Cache, ...],
           own: tuple[tuple[Cache, ...], ...]) -> tuple[Array, tuple[tuple[Cache, ...], ...]]:
  """Appends one token to each of S sequences, a prompt and what has been decoded after it.

  Args:
    params: as `sampling_params` gives them.
    token_S: int32, the tokens.
    slots: a slot has as many tokens as there are columns at the most, and steps without a break.
    prefix: of the prompts, as `prefill` gives it.
    own: as `empty` gives it, and this.

  Returns:
    logits_SV, float32, of the token after it, which mean nothing where a slot is free; and `own` with
    the tokens in it.
  """
  columns = sum(chunk.k_LSKTH.shape[3] for chunk in own[0])
  column = slots.step % columns
  at_all, at_local = turns((slots.prompt_length_S + slots.count_S - 1)[:, None], config)
  read, read_local = (_read(slots, column, columns, window) for window in (0, config.window))
  x_S1D, after = _embed(config, params, token_S[:, None]), []
  for stage, of_stage, prompts, ring in zip(_stages(config), params['layers'], prefix, own, strict=True):
    def layer(carry, params, i, is_local, prompts=prompts):
      (x_S1D, ring), block = carry, _block(config, params)
      q_S1NH, k, v = block.qkv(x_S1D, _of_kind(is_local, at_local, at_all))
      ring = _append(ring, _stored(k, v, prompts.k_scale_LSKT is not None), i, column)
      context_SNH = decode_attention(
          q_S1NH[:, 0], prompts, ring, slots.prompt_S, *_of_kind(is_local, read_local, read), layer=i)
      return (block.add(x_S1D, context_SNH[:, None]), ring), None

    (x_S1D, ring), _ = _through(config, stage, layer, (x_S1D, ring), of_stage)
    after.append(ring)
  return _output(config, params, _last_norm(config, params, x_S1D))[:, 0], tuple(after)
