"""DeepSeek-R1-Distill-Qwen-1.5B on DAPO-Math-17k, evaluated on seven sets.

    launch/local.sh configs/r1_distill_1p5b.py

Weights and data are fetched from the Hugging Face hub. GPQA is gated: ask for access at
https://huggingface.co/datasets/Idavidrein/gpqa and set HF_TOKEN, or leave it out of --config.tasks.test.

Hardware: v5e:2x4 (8 chips).
Time: not measured. By --mode=preflight, arithmetic at 40 % of the chips' peaks, with --mean_prompt=150
  --mean_completion=3000: 202 seconds a step on v5e:2x4, of 500 steps: 28 hours, and 2 for 11 evaluations.
Expect: not measured; avg@4. The paper reports 2 to 4 points more than uniform budgets on the mean of the seven.
"""

import ml_collections

from configs import common


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = common.math(
      common.base(), checkpoint='hf:deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B', vocab_size=151936, num_layers=28,
      width=1536, num_heads=12, num_kv_heads=2, head_width=128, hidden_width=8960, qk_norm=False, qkv_bias=True,
      tie_embeddings=False)
  c.topologies = ('v5e:2x4',)
  # Chips that share the sampler's parameters have room for more slots (--mode=preflight --suggest).
  c.mesh.sample_model = 2
  c.sample.slots = 128
  return common.finish(c, variant)
