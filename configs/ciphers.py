"""A 0.3 M parameter policy from scratch learns two ciphers of eight, which it writes badly (kr_jax/datasets/ciphers.py).

    launch/local.sh
    launch/sweep.py configs/ciphers.py       # uniform budgets and this rule, three seeds each

Three quarters of the tasks are solved when reinforcement learning begins; the others stand between .02 and .25. So it
matters where rollouts go: 16 of 32 tasks are chosen a step, and the last lines of the run say what uniform budgets got.

Hardware: 2 CPU cores, 1 GB of memory.
Time: 4.1 minutes beside other work (load 10), of which 1.7 compile, and about one to install before.
Expect: held-out avg@1 from 0.763 after the warm start to 0.977 after step 96 (seed 0), which uniform budgets reach too.
  This run holds it after 9,500 of its 12,288 rollouts, and is at 0.938 after 5,120, where uniform budgets are at 0.896.
  Of its rollouts 0.47 are in mixed groups, of those of uniform budgets 0.20; a task gets 0 to 50 of them.
"""

import ml_collections

from configs import common


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = common.ciphers(common.base(), 'ciphers_late')
  c.num_steps = 96
  c.tasks.per_step = 16
  c.tasks.candidates_per_step = 32
  c.alloc.rollouts_per_step = 128
  c.alloc.low = 0
  c.optimizer.learning_rate = 2e-4
  c.evaluate.every = 20
  c.evaluate.rollouts = 1
  c.record.beside = 'kr_jax:ciphers_uniform'
  return common.finish(c, variant)


def sweep():
  """The runs of launch/sweep.py."""
  for seed in range(3):
    yield {'alloc.rule': 'uniform', 'tasks.candidates_per_step': 0, 'seed': seed}
    yield {'seed': seed}
