"""SmolLM2-135M, a real pretrained model, learns to add (kr_jax/datasets/sums.py), from three examples.

    launch/local.sh configs/smollm2_arithmetic.py

Hardware: 2 CPU cores, 7 GB of memory (6.0 GB resident), 3 GB of disk.
Time: 90 minutes beside other work on the same cores: 13 s a step while it had them alone, 23 on the median.
Expect: held-out avg@4 at temperature 1 from 0.26 to above 0.6 by step 40 and 0.71 at step 200 (seed 0, standard
  error 0.03): configs/recorded/smollm2_arithmetic.jsonl, which was evaluated every 20 steps.
"""

import ml_collections

from configs import common


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = common.base()
  c.num_steps = 200
  c.policy.checkpoint = 'smollm2-135m-instruct'
  c.tasks.dataset = 'sums'
  # Bare text: the model adds better than it keeps to a format, and answers in five tokens.
  c.tasks.chat = False
  c.tasks.template = '3 + 5 = 8\n28 + 7 = 35\n46 + 31 = 77\n{problem} ='
  c.tasks.per_step = 16
  c.alloc.rollouts_per_step = 128
  c.alloc.high = 32
  c.sample.slots = 128
  c.sample.prefill = 16
  c.sample.prompt_length = 36
  c.sample.completion_length = 8
  c.sample.stop_strings = ('\n',)
  c.rewards.verifier = 'math'
  c.rewards.pattern = r'\A\s*(\d+)\s*\Z'  # a number, and nothing else
  c.pack.row_length = 86
  c.pack.microbatch_rows = 4
  c.optimizer.learning_rate = 2e-5
  c.optimizer.warmup_steps = 5
  c.evaluate.every = 40
  c.evaluate.rollouts = 4
  c.evaluate.tasks_per_batch = 32
  c.checkpoint.every = 10
  c.checkpoint.keep = 1
  return common.finish(c, variant)
