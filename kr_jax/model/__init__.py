"""The policy: its parameters, the checkpoints that they come from, and its tokenizer.

    config, params = model.load('path/to/Qwen3-4B')
    logits_BTV = model.logits(config, params, tokens_BT)
    model.save('path/to/export', config, params, source='path/to/Qwen3-4B')
"""

from kr_jax.model.policy import Config, init, logits
from kr_jax.model.weights import load, save
