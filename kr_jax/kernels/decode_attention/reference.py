"""Attention of one query per slot and head over what its sequence has read: the specification.

A sequence is a prompt and a completion. The prompt's keys and values stand in a row of the prefix, those of the
completion in the slot's own row, from some column on; column 0 follows the last column.

    z_snt = q_sn . k_skt / sqrt(H),   k = n // (N // K)
    t in prefix_first_s + 0..prefix_length_s - 1 of row_s of the prefix,
         (first_s + 0..length_s - 1) mod T of the slot's own
    context_sn = sum_t softmax(z_sn)_t v_skt
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def live(first_S: jax.Array, length_S: jax.Array, T: int) -> jax.Array:
  """live_ST: which of T columns are among the length_S from first_S on; column 0 follows the last."""
  return (jnp.arange(T)[None] - first_S[:, None]) % T < length_S[:, None]


def decode_attention(q_SNH: jax.Array, prefix: Sequence, own: Sequence[Sequence], row_S: jax.Array,
                     prefix_first_S: jax.Array, prefix_length_S: jax.Array, first_S: jax.Array,
                     length_S: jax.Array) -> jax.Array:
  """context_SNH, as `ops.decode_attention` documents it."""
  (S, N, H), (K, P) = q_SNH.shape, prefix[0].shape[1:3]
  T = sum(chunk[0].shape[2] for chunk in own)
  live_ST = jnp.concatenate([live(prefix_first_S, prefix_length_S, P), live(first_S, length_S, T)], axis=1)
  live_SKT = jnp.broadcast_to(live_ST[:, None], (S, K, P + T))

  def values(i):
    def read(columns):
      x, *scale = columns[i::2]
      return x.astype(jnp.float32) * (scale[0][..., None] if scale else 1)

    x_SKTH = jnp.concatenate([read(prefix)[row_S], *map(read, own)], axis=2)
    return jnp.where(live_SKT[..., None], x_SKTH, 0)  # 0 * NaN would be NaN

  q_SKGH = q_SNH.astype(jnp.float32).reshape(S, K, N // K, H)
  z_SKGT = jnp.einsum('skgh,skth->skgt', q_SKGH, values(0), precision=jax.lax.Precision.HIGHEST) * H ** -0.5
  p_SKGT = jax.nn.softmax(z_SKGT, axis=-1, where=live_SKT[:, :, None])
  context_SKGH = jnp.einsum('skgt,skth->skgh', p_SKGT, values(1), precision=jax.lax.Precision.HIGHEST)
  any_S = prefix_length_S + length_S > 0
  return jnp.where(any_S[:, None, None], context_SKGH.reshape(S, N, H), 0).astype(q_SNH.dtype)
