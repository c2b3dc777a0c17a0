"""Does allocation pay where most tasks are out of reach at first? A family of the proof.

    launch/proof.sh --family hard                  # all of it; --quick: of the family late
    launch/local.sh configs/proof_hard.py:small        # one run

Hardware: 2 CPU cores, 1 GB of memory.
Time: a run takes about a minute on one core, its warm start included.
Expect: configs/README.md.

Fixed before the runs: eight ciphers that do not help one another. When reinforcement learning begins, tasks of the easiest
stand at .2 or below, and half of all below .01 (kr_jax/datasets/ciphers_hard.py). 256 tasks, passed over in 32 steps of the
small batch and in 8 of the large one. Arms, seeds, metric and goals: tests/benchmarks/proof/plan.py.
"""

import ml_collections

from configs import common

TARGET = 0.3
# 12,288 rollouts each.
BATCHES = {
    'small': {'tasks.per_step': 8, 'alloc.rollouts_per_step': 64, 'num_steps': 192, 'evaluate.every': 24,
              'optimizer.learning_rate': 2e-4},
    'large': {'tasks.per_step': 32, 'alloc.rollouts_per_step': 256, 'num_steps': 48, 'evaluate.every': 6,
              'optimizer.learning_rate': 4e-4}}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = common.ciphers(common.base(), 'ciphers_hard')
  c.evaluate.pass_at = (2,)
  return common.finish(c, common.with_batch(c, variant, BATCHES))
