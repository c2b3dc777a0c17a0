"""The policy: a decoder-only transformer of the Llama / Qwen family.

    x += O attention(rope(Q h), rope(K h), V h),  h = rmsnorm(x)
    x += Wo (silu(Wg h) * Wi h),                  h = rmsnorm(x)

with grouped-query attention, optional q/k norms (Qwen3), optional q/k/v biases (Qwen2) and tied
embeddings. Rotary positions are split in halves, as in the published checkpoints. Parameters are
float32 and stacked over layers; layers are scanned, so compile time does not grow with depth.

The module is split once: outside this file the policy is `config` (hashable) and `params` (nested
dicts of arrays), and three pure functions read them: `logits` scores packed rows, `prefill` reads
prompts into a cache, `decode` extends every slot of a cache by one token.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from kr_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of a policy."""

  vocab_size: int
  num_layers: int
  width: int  # D
  num_heads: int  # N
  num_kv_heads: int  # K
  head_width: int  # H, even
  hidden_width: int  # F
  rope_theta: float
  norm_eps: float
  qk_norm: bool
  qkv_bias: bool
  tie_embeddings: bool
  dtype: str  # of the computation; parameters and logits are float32

  def __post_init__(self):
    for name in ('vocab_size', 'num_layers', 'width', 'num_heads', 'num_kv_heads', 'head_width',
                 'hidden_width'):
      if getattr(self, name) < 1:
        raise ValueError(f'policy.{name}={getattr(self, name)} is below 1')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f'policy.num_heads={self.num_heads} is not a multiple of '
                       f'policy.num_kv_heads={self.num_kv_heads}')
    if self.head_width % 2:
      raise ValueError(f'policy.head_width={self.head_width} is odd; rotary positions need pairs')
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(f"policy.dtype={self.dtype!r} is not 'float32' or 'bfloat16'")


class Cache(NamedTuple):
  """Keys and values of B sequences; position t of a sequence stands in column t."""

  k_LBTKH: Array
  v_LBTKH: Array


def rmsnorm(x: Array, scale: Array, eps: float) -> Array:
  """Root-mean-square norm over the last axis, in float32. Zhang & Sennrich 2019, eq. 4."""
  x32 = x.astype(jnp.float32)
  x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return (x32 * jnp.expand_dims(scale[...], range(x.ndim - 1))).astype(x.dtype)


def rope(x_BTNH: Array, position_BT: Array, theta: float) -> Array:
  """Rotates the pairs (i, i + H/2) by position * theta^(-2i/H). Su et al. 2021, eq. 34."""
  half = x_BTNH.shape[-1] // 2
  frequency_H = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_BT1H = position_BT[..., None, None].astype(jnp.float32) * frequency_H[None, None, None]
  cos, sin = jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def _attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array) -> Array:
  return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None])


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
  return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class Block(nnx.Module):
  """One layer."""

  def __init__(self, c: Config, *, rngs: nnx.Rngs):
    self.c = c
    D, N, K, H, F = c.width, c.num_heads, c.num_kv_heads, c.head_width, c.hidden_width
    # Residual branches shrink with depth, so that the sum of 2L of them starts near the embedding.
    out = (2 * c.num_layers) ** -0.5
    self.attention_norm_D = nnx.Param(jnp.ones(D))
    self.q_DNH = _normal(rngs, (D, N, H), D ** -0.5)
    self.k_DKH = _normal(rngs, (D, K, H), D ** -0.5)
    self.v_DKH = _normal(rngs, (D, K, H), D ** -0.5)
    self.o_NHD = _normal(rngs, (N, H, D), out * (N * H) ** -0.5)
    if c.qkv_bias:
      self.q_bias_NH = nnx.Param(jnp.zeros((N, H)))
      self.k_bias_KH = nnx.Param(jnp.zeros((K, H)))
      self.v_bias_KH = nnx.Param(jnp.zeros((K, H)))
    if c.qk_norm:
      self.q_norm_H = nnx.Param(jnp.ones(H))
      self.k_norm_H = nnx.Param(jnp.ones(H))
    self.mlp_norm_D = nnx.Param(jnp.ones(D))
    self.gate_DF = _normal(rngs, (D, F), D ** -0.5)
    self.up_DF = _normal(rngs, (D, F), D ** -0.5)
    self.down_FD = _normal(rngs, (F, D), out * F ** -0.5)

  def _weight(self, param: nnx.Param) -> Array:
    return param[...].astype(self.c.dtype)

  def qkv(self, x_BTD: Array, position_BT: Array) -> tuple[Array, Array, Array]:
    c = self.c
    h_BTD = rmsnorm(x_BTD, self.attention_norm_D, c.norm_eps)
    q_BTNH = jnp.einsum('btd,dnh->btnh', h_BTD, self._weight(self.q_DNH))
    k_BTKH = jnp.einsum('btd,dkh->btkh', h_BTD, self._weight(self.k_DKH))
    v_BTKH = jnp.einsum('btd,dkh->btkh', h_BTD, self._weight(self.v_DKH))
    if c.qkv_bias:
      q_BTNH += self._weight(self.q_bias_NH)[None, None]
      k_BTKH += self._weight(self.k_bias_KH)[None, None]
      v_BTKH += self._weight(self.v_bias_KH)[None, None]
    if c.qk_norm:
      q_BTNH = rmsnorm(q_BTNH, self.q_norm_H, c.norm_eps)
      k_BTKH = rmsnorm(k_BTKH, self.k_norm_H, c.norm_eps)
    return (rope(q_BTNH, position_BT, c.rope_theta), rope(k_BTKH, position_BT, c.rope_theta),
            v_BTKH)

  def add(self, x_BTD: Array, context_BTNH: Array) -> Array:
    """The layer's output, from its input and what attention read."""
    x_BTD += jnp.einsum('btnh,nhd->btd', context_BTNH, self._weight(self.o_NHD))
    h_BTD = rmsnorm(x_BTD, self.mlp_norm_D, self.c.norm_eps)
    gate_BTF = jax.nn.silu(jnp.einsum('btd,df->btf', h_BTD, self._weight(self.gate_DF)))
    up_BTF = jnp.einsum('btd,df->btf', h_BTD, self._weight(self.up_DF))
    return x_BTD + jnp.einsum('btf,fd->btd', gate_BTF * up_BTF, self._weight(self.down_FD))


class Policy(nnx.Module):
  """Embedding, L stacked blocks, final norm, output."""

  def __init__(self, c: Config, *, rngs: nnx.Rngs):
    self.c = c
    self.embed_VD = _normal(rngs, (c.vocab_size, c.width), 0.02)
    self.layers = nnx.vmap(lambda r: Block(c, rngs=r))(rngs.split(c.num_layers))
    self.norm_D = nnx.Param(jnp.ones(c.width))
    if not c.tie_embeddings:
      self.output_DV = _normal(rngs, (c.width, c.vocab_size), c.width ** -0.5)

  def embed(self, token_BT: Array) -> Array:
    return self.embed_VD[...].astype(self.c.dtype)[token_BT]

  def output(self, x_BTD: Array) -> Array:
    h_BTD = rmsnorm(x_BTD, self.norm_D, self.c.norm_eps)
    output_DV = self.embed_VD[...].T if self.c.tie_embeddings else self.output_DV[...]
    return jnp.einsum('btd,dv->btv', h_BTD, output_DV.astype(self.c.dtype),
                      preferred_element_type=jnp.float32)


@functools.lru_cache
def _graphdef(config: Config) -> nnx.GraphDef:
  return nnx.split(nnx.eval_shape(lambda: Policy(config, rngs=nnx.Rngs(0))))[0]


def _merge(config: Config, params: Any) -> tuple[Policy, nnx.GraphDef, Any]:
  """The module, and its layers split again for the scan."""
  module = nnx.merge(_graphdef(config), params)
  return module, *nnx.split(module.layers)


@functools.partial(jax.jit, static_argnums=0)
def init(config: Config, key: Array) -> Any:
  """Random parameters: nested dicts of float32 arrays."""
  return nnx.to_pure_dict(nnx.state(Policy(config, rngs=nnx.Rngs(key))))


def logits(config: Config, params: Any, token_BT: Array, position_BT: Array | None = None,
           segment_BT: Array | None = None) -> Array:
  """Next-token logits of rows that may hold several sequences.

  Args:
    token_BT: int32.
    position_BT: position of each token in its sequence; by default rows hold one sequence.
    segment_BT: number of the sequence each token belongs to; a token sees the tokens before it in
      its row that have its own number.

  Returns:
    logits_BTV, float32.
  """
  B, T = token_BT.shape
  if position_BT is None:
    position_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
  mask_BTT = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool))[None], (B, T, T))
  if segment_BT is not None:
    mask_BTT &= segment_BT[:, :, None] == segment_BT[:, None, :]
  module, graphdef, layers = _merge(config, params)

  def layer(x_BTD, params):
    block = nnx.merge(graphdef, params)
    return block.add(x_BTD, _attend(*block.qkv(x_BTD, position_BT), mask_BTT)), None

  x_BTD, _ = jax.lax.scan(layer, module.embed(token_BT), layers)
  return module.output(x_BTD)


def prefill(config: Config, params: Any, token_BP: Array, length_B: Array) -> tuple[Array, Cache]:
  """Reads prompts padded on the right.

  Returns:
    logits_BV, float32: of the token after each prompt's last; and the cache, P columns. Columns
    from a prompt's length on hold padding: `decode` overwrites each before any query may see it.
  """
  B, P = token_BP.shape
  position_BP = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
  mask_BPP = jnp.broadcast_to(jnp.tril(jnp.ones((P, P), bool))[None], (B, P, P))
  module, graphdef, layers = _merge(config, params)

  def layer(x_BPD, params):
    block = nnx.merge(graphdef, params)
    q, k, v = block.qkv(x_BPD, position_BP)
    return block.add(x_BPD, _attend(q, k, v, mask_BPP)), (k, v)

  x_BPD, (k_LBPKH, v_LBPKH) = jax.lax.scan(layer, module.embed(token_BP), layers)
  last_B1D = jnp.take_along_axis(x_BPD, (length_B - 1)[:, None, None], axis=1)
  return module.output(last_B1D)[:, 0], Cache(k_LBPKH, v_LBPKH)


def decode(config: Config, params: Any, token_B: Array, position_B: Array,
           cache: Cache) -> tuple[Array, Cache]:
  """Appends one token to each of B sequences.

  Args:
    token_B: int32, the tokens.
    position_B: int32, the column each is written to; it sees columns 0..position.

  Returns:
    logits_BV, float32, of the token after it; and the cache with the tokens in it.
  """
  B, T = cache.k_LBTKH.shape[1:3]
  row_B = jnp.arange(B)
  mask_B1T = (jnp.arange(T)[None] <= position_B[:, None])[:, None]
  module, graphdef, layers = _merge(config, params)

  def layer(carry, params_and_l):
    x_B1D, cache = carry
    params, l = params_and_l
    block = nnx.merge(graphdef, params)
    q, k, v = block.qkv(x_B1D, position_B[:, None])
    # The cache is a carry, written in place; as scanned input and output it would be copied.
    cache = Cache(cache.k_LBTKH.at[l, row_B, position_B].set(k[:, 0]),
                  cache.v_LBTKH.at[l, row_B, position_B].set(v[:, 0]))
    context = _attend(q, cache.k_LBTKH[l], cache.v_LBTKH[l], mask_B1T)
    return (block.add(x_B1D, context), cache), None

  (x_B1D, cache), _ = jax.lax.scan(
      layer, (module.embed(token_B[:, None]), cache), (layers, jnp.arange(config.num_layers)))
  return module.output(x_B1D)[:, 0], cache
