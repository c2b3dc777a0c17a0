"""Log-probabilities of target tokens, and entropies, without logits in memory."""

from kr_jax.kernels.token_logprob.ops import token_logprob
