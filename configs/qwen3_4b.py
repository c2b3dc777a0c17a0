"""Qwen3-4B, which thinks, on DAPO-Math-17k, evaluated on seven sets.

    launch/local.sh configs/qwen3_4b.py

Weights and data are fetched from the Hugging Face hub. GPQA is gated: ask for access at
https://huggingface.co/datasets/Idavidrein/gpqa and set HF_TOKEN, or leave it out of --config.tasks.test.

Hardware: v5e:4x4 or v6e:4x4 (16 chips), or a pod: v5e:16x16 with --config.mesh.data=16, and 16 times the
  tasks and rollouts for as much work a chip.
Time: not measured. By --mode=preflight, arithmetic at 40 % of the chips' peaks, with --mean_prompt=150
  --mean_completion=3000: 374 seconds a step on v5e:4x4, of 500 steps: 52 hours, and 5 for 11 evaluations.
Expect: not measured; avg@4. The paper reports 2 to 4 points more than uniform budgets on the mean of the seven.
"""

import ml_collections

from configs import common


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = common.math(
      common.base(), checkpoint='hf:Qwen/Qwen3-4B', vocab_size=151936, num_layers=36, width=2560,
      num_heads=32, num_kv_heads=8, head_width=128, hidden_width=9728, rope_theta=1e6)
  c.topologies = ('v5e:4x4', 'v6e:4x4')
  # Chips that share the sampler's parameters have room for more slots (--mode=preflight --suggest).
  c.mesh.sample_model = 8
  return common.finish(c, variant)
