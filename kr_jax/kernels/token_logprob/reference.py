"""Log-probability of each target and entropy of its distribution, from all logits: the specification.

    z_tv = hidden_t . output_v / temperature,   p_t = softmax(z_t)
    logp_t = log p_t[target_t],   entropy_t = -sum_v p_tv log p_tv

[T, V] stands in memory here, several times over; ops.py holds a block of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_logprob(hidden_TD: jax.Array, output_DV: jax.Array, target_T: jax.Array, *,
                  temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
  """(logp_T, entropy_T), as `ops.token_logprob` documents them."""
  z_TV = jnp.einsum('td,dv->tv', hidden_TD, output_DV, precision=jax.lax.Precision.HIGHEST,
                    preferred_element_type=jnp.float32)
  logp_TV = jax.nn.log_softmax(z_TV / temperature)
  logp_T = jnp.take_along_axis(logp_TV, target_T[:, None], axis=1)[:, 0]
  return logp_T, -jnp.sum(jnp.exp(logp_TV) * logp_TV, axis=1)
