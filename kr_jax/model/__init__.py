"""The policy: its parameters, the checkpoints that they come from, and its tokenizer."""

from kr_jax.model.export import save
from kr_jax.model.policy import Config, init, logits
from kr_jax.model.weights import load
