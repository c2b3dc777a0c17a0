"""Does allocation pay late in training, where most tasks are solved? A family of the proof.

    launch/proof.sh --family late                  # all of it; --quick: two arms, three seeds
    launch/local.sh configs/proof_late.py:small        # one run

Hardware: 2 CPU cores, 1 GB of memory.
Time: a run takes about a minute on one core, its warm start included.
Expect: configs/README.md.

Fixed before the runs: three quarters of the tasks are solved when reinforcement learning begins, the others stand between .02
and .25 (kr_jax/datasets/ciphers_late.py). 256 tasks, passed over in 32 steps of the small batch and in 8 of the large one.
Arms, seeds, metric and goals: tests/benchmarks/proof/plan.py.
"""

import ml_collections

from configs import common

TARGET = 0.9
# 12,288 rollouts each.
BATCHES = {
    'small': {'tasks.per_step': 8, 'alloc.rollouts_per_step': 64, 'num_steps': 192, 'evaluate.every': 24,
              'optimizer.learning_rate': 2e-4},
    'large': {'tasks.per_step': 32, 'alloc.rollouts_per_step': 256, 'num_steps': 48, 'evaluate.every': 6,
              'optimizer.learning_rate': 4e-4}}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = common.ciphers(common.base(), 'ciphers_late')
  c.evaluate.pass_at = (2,)
  return common.finish(c, common.with_batch(c, variant, BATCHES))
