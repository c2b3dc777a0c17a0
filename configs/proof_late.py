"""Does allocation pay late in training, where most tasks are solved? A family of the proof.

    launch/proof.sh --family late                 # all of it; --quick: two arms, three seeds
    launch/local.sh configs/proof_late.py:small       # one run

Hardware: 2 CPU cores, 1 GB of memory.
Time: a run takes 15 to 30 seconds on one core, without its warm start.
Expect: not known before the test; tests/benchmarks/README.md has what tuning showed.

Fixed before the test: three quarters of the tasks are solved when reinforcement learning begins, the others stand
between .03 and .17 (kr_jax/datasets/ciphers_late.py). 64 tasks, passed over in 8 steps of the small batch and in 2 of
the large one, so that uniform budgets take several passes to the target, as runs of 17,000 tasks do; with 256 tasks a
tuned run was at it before its first pass ended. 6,144 rollouts of either batch. Arms, seeds, metric and goals:
tests/benchmarks/proof/plan.py.
"""

import ml_collections

from configs import common

TARGET = 0.92
BATCHES = {
    'small': {'tasks.per_step': 8, 'alloc.rollouts_per_step': 64, 'num_steps': 96, 'evaluate.every': 8,
              'optimizer.learning_rate': 6e-4},
    'large': {'tasks.per_step': 32, 'alloc.rollouts_per_step': 256, 'num_steps': 24, 'evaluate.every': 2,
              'optimizer.learning_rate': 1.2e-3}}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = common.ciphers(common.base(), 'ciphers_late')
  c.evaluate.pass_at = (2,)
  return common.finish(c, common.with_batch(c, variant, BATCHES))
