"""Attention of one query per slot and head over the live columns of its cache: the specification.

    z_snt = q_sn . k_skt / sqrt(H),   t < length_s,   k = n // (N // K)
    context_sn = sum_t softmax(z_sn)_t v_skt

All T columns are read here; the kernel reads those that live.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def decode_attention(q_SNH: jax.Array, k_SKTH: jax.Array, v_SKTH: jax.Array, length_S: jax.Array, *,
                     k_scale_SKT: jax.Array | None = None, v_scale_SKT: jax.Array | None = None
                     ) -> jax.Array:
  """context_SNH, as `ops.decode_attention` documents it."""
  (S, N, H), (K, T) = q_SNH.shape, k_SKTH.shape[1:3]
  live_SKT = jnp.broadcast_to((jnp.arange(T)[None] < length_S[:, None])[:, None], (S, K, T))

  def values(x_SKTH, scale_SKT):
    x_SKTH = x_SKTH.astype(jnp.float32)
    if scale_SKT is not None:
      x_SKTH *= scale_SKT[..., None]
    return jnp.where(live_SKT[..., None], x_SKTH, 0)  # 0 * NaN would be NaN

  q_SKGH = q_SNH.astype(jnp.float32).reshape(S, K, N // K, H)
  z_SKGT = jnp.einsum('skgh,skth->skgt', q_SKGH, values(k_SKTH, k_scale_SKT),
                      precision=jax.lax.Precision.HIGHEST) * H ** -0.5
  p_SKGT = jax.nn.softmax(z_SKGT, axis=-1, where=live_SKT[:, :, None])
  context_SKGH = jnp.einsum('skgt,skth->skgh', p_SKGT, values(v_SKTH, v_scale_SKT),
                            precision=jax.lax.Precision.HIGHEST)
  return jnp.where((length_S > 0)[:, None, None], context_SKGH.reshape(S, N, H), 0).astype(q_SNH.dtype)
