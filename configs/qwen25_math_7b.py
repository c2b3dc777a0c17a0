"""The paper's run: Qwen2.5-Math-7B on DAPO-Math-17k, evaluated on seven sets, with its hyper-parameters.

    launch/local.sh configs/qwen25_math_7b.py

Weights and data are fetched from the Hugging Face hub. GPQA is gated: ask for access at
https://huggingface.co/datasets/Idavidrein/gpqa and set HF_TOKEN, or leave it out of --config.tasks.test.

Rule and loss are the paper's (configs/presets.py); `--config.alloc.estimate=posterior` is this project's rule.

Prompts of 2048 tokens and completions of 4096 are the paper's, of a checkpoint that was made to read 4096 tokens in
all: a run warns of it, and completions that reach positions beyond them are likely to be bad. `--config.policy.yarn=2`
stretches the checkpoint's context, `--config.sample.completion_length=2048` stays within it; neither is the paper's.

Hardware: v5p:2x2x4 (16 chips) or v5e:8x8 (64).
Time: not measured. By --mode=preflight, arithmetic at 40 % of the chips' peaks, with --mean_prompt=150
  --mean_completion=1000: 95 seconds a step on v5p:2x2x4, of 1000 steps: 26 hours, and 1.4 for 11 evaluations.
Expect: not measured; avg@16, as the paper's, which reports 2 to 4 points more than uniform budgets on the mean of the
  seven.
"""

import ml_collections

from configs import common
from configs import presets


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = common.math(
      common.base(), checkpoint='hf:Qwen/Qwen2.5-Math-7B', vocab_size=152064, num_layers=28, width=3584,
      num_heads=28, num_kv_heads=4, head_width=128, hidden_width=18944, qk_norm=False, qkv_bias=True,
      tie_embeddings=False)
  presets.paper(c)
  c.topologies = ('v5p:2x2x4', 'v5e:8x8')
  c.policy.yarn = 0.0  # as the paper: see above
  c.mesh.sample_model = 4
  c.num_steps = 1000
  c.evaluate.every = 100
  c.evaluate.rollouts = 16
  c.tasks.per_step = 256
  c.alloc.rollouts_per_step = 2048
  c.optimizer.b2 = 0.999
  c.optimizer.minibatches = 8
  c.sample.prompt_length = 2048
  c.pack.row_length = 6144
  return common.finish(c, variant)
