"""Qwen3-1.7B, without thinking, on GSM8K: a first run on a TPU.

    launch/local.sh configs/gsm8k_qwen3_1p7b.py

Hardware: v5e:2x4 (8 chips). The weights are fetched from the Hugging Face hub, GSM8K by TFDS.
Time: not measured. By --mode=preflight, arithmetic at 40 % of the chips' peaks, with --mean_prompt=100
  --mean_completion=250: 7 seconds a step on v5e:2x4, of 200 steps: 23 minutes, and 4 for 6 evaluations.
Expect: not measured; avg@2 of the 1,319 test problems.
"""

import ml_collections

from configs import common


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = common.large(
      common.base(), checkpoint='hf:Qwen/Qwen3-1.7B', vocab_size=151936, num_layers=28, width=2048,
      num_heads=16, num_kv_heads=8, head_width=128, hidden_width=6144, rope_theta=1e6)
  c.topologies = ('v5e:2x4',)
  c.mesh.sample_model = 2
  # A microbatch holds a whole group a device, so that each prompt is computed once.
  c.pack.microbatch_rows = 8
  c.evaluate.tasks_per_batch = 64
  c.num_steps = 200
  c.tasks.dataset = 'gsm8k'
  c.tasks.template = common.BOXED
  c.tasks.thinking = False
  c.tasks.per_step = 64
  c.alloc.rollouts_per_step = 512
  c.optimizer.learning_rate = 1e-6
  c.rewards.verifier = 'math'
  c.sample.prompt_length = 512
  c.sample.completion_length = 1024
  c.pack.row_length = 1536
  c.evaluate.every = 40
  c.evaluate.rollouts = 2
  return common.finish(c, variant)
