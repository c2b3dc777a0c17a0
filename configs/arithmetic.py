"""placeholder"""

from configs import common

import ml_collections


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = common.base()
  c.num_steps = 150
  c.tasks.dataset = 'arithmetic'
  c.tasks.per_step = 32
  c.alloc.rollouts_per_step = 256
  c.alloc.high = 64
  c.warm_start.num_steps = 300
  c.sample.prompt_length = 27
  c.sample.completion_length = 33
  return c.lock()
