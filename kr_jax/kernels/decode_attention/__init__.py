"""Attention of one decoding step over a cache whose slots are filled to different lengths."""

from kr_jax.kernels.decode_attention.ops import decode_attention
