"""Does allocation pay where tasks share one skill, most of them in the middle? A family of the proof.

    launch/proof.sh --family shared                # all of it; --quick: of the family late
    launch/local.sh configs/proof_shared.py:small       # one run

Hardware: 2 CPU cores, 1 GB of memory.
Time: a run takes one to two minutes on one core, its warm start included.
Expect: no difference; the test has not been run.

Fixed before the test: the tasks and the policy of configs/arithmetic.py, where most success rates stand between .2
and .8 when reinforcement learning begins, and what one task teaches helps all. 1,024 tasks, passed over in 16 steps
of the large batch and in 64 of the small one. Arms, seeds, metric and goals: tests/benchmarks/proof/plan.py.
"""

import ml_collections

from configs import arithmetic
from configs import common

TARGET = 0.7
BATCHES = {
    'small': {'tasks.per_step': 16, 'alloc.rollouts_per_step': 64, 'num_steps': 320, 'evaluate.every': 40,
              'optimizer.learning_rate': 5e-5},
    'large': {'tasks.per_step': 64, 'alloc.rollouts_per_step': 256, 'num_steps': 80, 'evaluate.every': 10,
              'optimizer.learning_rate': 1e-4}}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = arithmetic.get_config().copy_and_resolve_references()
  c.unlock()
  c.sample.slots = 64
  c.evaluate.pass_at = (2,)
  return common.finish(c, common.with_batch(c, variant, BATCHES))
