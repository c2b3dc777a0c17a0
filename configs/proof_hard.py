"""Does allocation pay where most tasks are out of reach at first? A family of the proof.

    launch/proof.sh --family hard                 # all of it; --quick: of the family late
    launch/local.sh configs/proof_hard.py:small       # one run

Hardware: 2 CPU cores, 1 GB of memory.
Time: a run takes 15 to 30 seconds on one core, without its warm start.
Expect: not known before the test; tests/benchmarks/README.md has what tuning showed.

Fixed before the test: eight ciphers that do not help one another. When reinforcement learning begins, tasks of the
easiest stand at .2 or below, and half of all below .01 (kr_jax/datasets/ciphers_hard.py). 128 tasks, passed over in
16 steps of the small batch and in 4 of the large one. 10,240 rollouts of either. Arms, seeds, metric and goals:
tests/benchmarks/proof/plan.py.
"""

import ml_collections

from configs import common

TARGET = 0.4
BATCHES = {
    'small': {'tasks.per_step': 8, 'alloc.rollouts_per_step': 64, 'num_steps': 160, 'evaluate.every': 16,
              'optimizer.learning_rate': 6e-4},
    'large': {'tasks.per_step': 32, 'alloc.rollouts_per_step': 256, 'num_steps': 40, 'evaluate.every': 4,
              'optimizer.learning_rate': 1.2e-3}}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = common.ciphers(common.base(), 'ciphers_hard')
  c.evaluate.pass_at = (2,)
  return common.finish(c, common.with_batch(c, variant, BATCHES))
