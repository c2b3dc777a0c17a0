"""Logits -> a token of each slot, and its log-probability."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kr_jax import knobs
from kr_jax.types import Array


def token(logits_SV: Array, key_S: Array, config: knobs.Filters) -> tuple[Array, Array]:
  """A token of each slot, and the policy's log-probability of it."""
  if config.temperature == 0:
    token_S = jnp.argmax(logits_SV, axis=-1)
  else:
    logits_SV = logits_SV / config.temperature
    token_S = _draw(truncate(logits_SV, config), key_S)
  logp_S = jnp.take_along_axis(jax.nn.log_softmax(logits_SV), token_S[:, None], axis=-1)[:, 0]
  return token_S, logp_S


def _draw(logits_SV: Array, key_S: Array) -> Array:
  """A token of each softmax: one number decides on a block of the vocabulary, another on the token in it.

  Gumbel noise for each token of the vocabulary would take longer than the policy's last layer: of 1024 tokens and
  128 slots 3 ms on two CPU cores, and this .2.
  """
  S, V = logits_SV.shape
  width = max(w for w in (2**i for i in range(10)) if w == 1 or w * w <= V and V % w == 0)  # of a block
  mass_SXW = jnp.exp(logits_SV - logits_SV.max(axis=-1, keepdims=True)).reshape(S, -1, width)
  uniform_S2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(key_S)
  block_S = _invert(mass_SXW.sum(axis=2), uniform_S2[:, 0])
  mass_SW = jnp.take_along_axis(mass_SXW, block_S[:, None, None], axis=1)[:, 0]
  return block_S * width + _invert(mass_SW, uniform_S2[:, 1])


def _invert(mass_SX: Array, uniform_S: Array) -> Array:
  """The first x with mass up to which there is more than this share of all; if rounding leaves none, the
  last with mass."""
  sum_SX = jnp.cumsum(mass_SX, axis=-1)
  beyond_SX = sum_SX > (uniform_S * sum_SX[:, -1])[:, None]
  X = mass_SX.shape[1]
  place_X = jnp.arange(X)[None]
  order_SX = jnp.where(mass_SX > 0, jnp.where(beyond_SX, 2 * X - place_X, place_X), -1)
  return jnp.argmax(order_SX, axis=-1)


def truncate(logits_SV: Array, config: knobs.Filters) -> Array:
  """Logits that are -inf where top_k, top_p or min_p leave a token out; the likeliest always stays.

  Each reads the policy's own probabilities at the temperature. Tokens as likely as the last that stays
  stay too. Sources: Holtzman et al. 2019, arXiv 1904.09751 (top-p); Nguyen et al. 2024, arXiv
  2407.01082 (min-p).
  """
  V = logits_SV.shape[-1]
  least_S = jnp.full(len(logits_SV), -jnp.inf)
  if config.min_p:
    least_S = jnp.maximum(least_S, logits_SV.max(axis=-1) + jnp.log(config.min_p))
  if config.top_p < 1:
    sorted_SV = -jnp.sort(-logits_SV, axis=-1)
    before_SV = jnp.cumsum(jax.nn.softmax(sorted_SV), axis=-1) - jax.nn.softmax(sorted_SV)
    last_S = jnp.sum(before_SV < config.top_p, axis=-1) - 1
    least_S = jnp.maximum(least_S, jnp.take_along_axis(sorted_SV, last_S[:, None], axis=-1)[:, 0])
  if 0 < config.top_k < V:
    least_S = jnp.maximum(least_S, jax.lax.top_k(logits_SV, config.top_k)[0][:, -1])
  return jnp.where(logits_SV >= least_S[:, None], logits_SV, -jnp.inf)
