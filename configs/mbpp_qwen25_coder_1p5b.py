"""Qwen2.5-Coder-1.5B-Instruct on MBPP, evaluated on the test problems of sanitized MBPP and on HumanEval.

    launch/local.sh configs/mbpp_qwen25_coder_1p5b.py

Weights and data are fetched from the Hugging Face hub. The programs that the policy writes run on the hosts, behind
walls (kr_jax/rewards/README.md, Programs).

Hardware: v5e:2x4 (8 chips).
Time: not measured. By --mode=preflight, arithmetic at 40 % of the chips' peaks, with --mean_prompt=200
  --mean_completion=200: 6 seconds a step on v5e:2x4, of 200 steps: 20 minutes, and 2 for 11 evaluations.
Expect: not measured; avg@4 of the 257 test problems of sanitized MBPP, and of HumanEval's 164.
"""

import ml_collections

from configs import common


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = common.large(
      common.base(), checkpoint='hf:Qwen/Qwen2.5-Coder-1.5B-Instruct', vocab_size=151936, num_layers=28, width=1536,
      num_heads=12, num_kv_heads=2, head_width=128, hidden_width=8960, rope_theta=1e6, qk_norm=False, qkv_bias=True)
  c.topologies = ('v5e:2x4',)
  c.mesh.sample_model = 2
  # A microbatch holds a whole group a device, so that each prompt is computed once.
  c.pack.microbatch_rows = 8
  c.evaluate.tasks_per_batch = 64
  c.num_steps = 200
  c.tasks.dataset = 'mbpp'
  c.tasks.test = ('mbpp_sanitized', 'human_eval')
  c.tasks.template = '{problem}\n\nWrite the whole program in one block of code, between ```python and ```.'
  c.tasks.per_step = 64
  c.alloc.rollouts_per_step = 512
  c.optimizer.learning_rate = 1e-6
  c.rewards.verifier = 'python_tests'
  c.rewards.timeout_s = 6.0  # the tests of a task have 4 seconds
  c.sample.prompt_length = 1536  # of the longest test problem; most have 200
  c.sample.completion_length = 1024
  c.pack.row_length = 2560
  c.evaluate.every = 20
  c.evaluate.rollouts = 4
  return common.finish(c, variant)
