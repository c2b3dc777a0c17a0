"""Qwen3-30B-A3B, a mixture of 128 experts of which a token meets 8, on DAPO-Math-17k, evaluated on seven sets.

    launch/local.sh configs/qwen3_30b_a3b.py

Weights and data are fetched from the Hugging Face hub. GPQA is gated: ask for access at
https://huggingface.co/datasets/Idavidrein/gpqa and set HF_TOKEN, or leave it out of --config.tasks.test.

Hardware: v5p:2x2x4 (16 chips) or v6e:8x8 (64 chips).
Time: not measured. By --mode=preflight, arithmetic at 40 % of the chips' peaks, with --mean_prompt=150
  --mean_completion=3000: 280 seconds a step on v5p:2x2x4 and 101 on v6e:8x8, of 500 steps: 39 and 14 hours, and 5 and
  2 for 11 evaluations.
Expect: not measured; avg@4. metrics.jsonl tells expert_load, the tokens of the busiest expert over the mean expert's:
  nothing balances the experts but what the checkpoint was trained to.
"""

import ml_collections

from configs import common


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = common.math(
      common.base(), checkpoint='hf:Qwen/Qwen3-30B-A3B', vocab_size=151936, num_layers=48, width=2048,
      num_heads=32, num_kv_heads=4, head_width=128, hidden_width=768, num_experts=128, experts_per_token=8,
      rope_theta=1e6, tie_embeddings=False)
  c.topologies = ('v5p:2x2x4', 'v6e:8x8')
  c.mesh.expert = 8
  c.mesh.sample_model = 8
  return common.finish(c, variant)
