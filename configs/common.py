"""What the configs share: `base()`, sizes of large runs, and `finish`, which applies a variant and locks.

Every knob is declared in kr_jax/knobs.py, with its unit and bounds. A config sets what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections

from configs import presets
from kr_jax import knobs


def base() -> ml_collections.ConfigDict:
  """Every knob at its default."""
  c = ml_collections.ConfigDict(knobs.as_dict(knobs.Config()))
  # A flag needs to know the type of a knob that is None unless it is set.
  c.tasks.thinking = ml_collections.config_dict.placeholder(bool)
  return c


BOXED = '{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}.'


def large(c: ml_collections.ConfigDict, checkpoint: str, **sizes) -> ml_collections.ConfigDict:
  """Knobs of published checkpoints of billions of parameters, of these sizes, on TPUs."""
  c.policy.checkpoint = checkpoint
  c.policy.update(sizes)
  c.policy.dtype = 'bfloat16'
  c.policy.remat = 'attention'
  c.sample.slots = 64
  c.sample.prefill = 8
  c.pack.microbatch_rows = 1
  return c


def math(c: ml_collections.ConfigDict, checkpoint: str, **sizes) -> ml_collections.ConfigDict:
  """The paper's data and evaluations, of the Hugging Face hub, with half of its tasks a step."""
  c = large(c, checkpoint, **sizes)
  c.num_steps = 500
  c.tasks.per_step = 128
  c.alloc.rollouts_per_step = 1024
  c.optimizer.learning_rate = 1e-6
  c.optimizer.minibatches = 4
  c.sample.prompt_length = 1024
  c.sample.completion_length = 4096
  c.pack.row_length = 5120
  c.tasks.dataset = 'dapo_math_17k'
  c.tasks.test = ('aime_2024', 'aime_2025', 'amc_2023', 'math_500', 'minerva_math', 'olympiad_bench',
                  'gpqa_diamond')
  c.tasks.template = BOXED
  c.rewards.verifier = 'math'
  # 1,744 tasks: 15 % of the rollouts that are trained on. --mode=evaluate takes 16 of each task, as the paper does.
  c.evaluate.every = 50
  c.evaluate.rollouts = 4
  c.evaluate.temperature = 0.6
  return c


def ciphers(c: ml_collections.ConfigDict, dataset: str) -> ml_collections.ConfigDict:
  """A 0.3 M parameter policy from scratch, for kr_jax/datasets/ciphers.py."""
  c.tasks.dataset = dataset
  c.alloc.high = 64
  c.policy.num_layers = 2
  c.policy.width = 128
  c.policy.head_width = 32
  c.policy.hidden_width = 256
  c.warm_start.num_steps = 400
  c.warm_start.learning_rate = 3e-3
  c.sample.slots = 64
  c.sample.prefill = 8
  c.sample.prompt_length = 7
  c.sample.completion_length = 6
  c.pack.row_length = 64
  c.optimizer.warmup_steps = 5
  c.evaluate.rollouts = 2
  return c


def with_batch(c: ml_collections.ConfigDict, variant: str, batches: Mapping[str, Mapping[str, Any]]) -> str:
  """Sets the knobs of a batch of a proof, the first that the variant names, else the first of all.

  Returns the variant without it.
  """
  names = [name for name in variant.split(',') if name]
  batch = next((name for name in names if name in batches), next(iter(batches)))
  c.update_from_flattened_dict(batches[batch])
  return ','.join(name for name in names if name != batch)


def finish(c: ml_collections.ConfigDict, variant: str) -> ml_collections.ConfigDict:
  """Applies a variant, what follows the colon in configs/NAME.py:VARIANT, and locks the config.

  Flags come after: a preset sets knobs, and `--config.SECTION.KNOB=VALUE` has the last word.

  Args:
    variant: names with commas between them: 'debug', and those of configs/presets.py.

  Raises:
    ValueError: a name that there is not.
  """
  for name in filter(None, variant.split(',')):
    if name != 'debug' and name not in presets.PRESETS:
      known = ['debug', *presets.PRESETS]
      raise ValueError(f'config variant {name!r} is not one of {known}{knobs.nearest(name, known)}')
    if name != 'debug':
      presets.PRESETS[name](c)
  if 'debug' in variant.split(','):
    shrink(c)
  return c.lock()


def shrink(c: ml_collections.ConfigDict) -> None:
  """Makes a config one of seconds."""
  c.num_steps = 4
  c.tasks.candidates_per_step = c.tasks.candidates_per_step // c.tasks.per_step * 8  # as many times as many
  c.tasks.per_step = 8
  c.alloc.rollouts_per_step = 32
  c.topologies = ()
  c.mesh = base().mesh
  c.policy.vocab_size = 0
  c.policy.num_layers = 2
  c.policy.width = 32
  c.policy.num_heads = 2
  c.policy.num_kv_heads = 1
  c.policy.head_width = 16
  c.policy.hidden_width = 64
  if c.policy.num_experts:
    c.policy.num_experts = 4
    c.policy.experts_per_token = 2
  c.warm_start.num_steps = min(c.warm_start.num_steps, 4)
  c.warm_start.per_step = 16
  c.warm_start.warmup_steps = 1
  c.warm_start.checkpoint_every = 2
  c.sample.slots = 16
  if c.sample.completion_length > 64:
    c.sample.completion_length = 64
    c.pack.row_length = c.sample.prompt_length + 64
  c.record.beside = ''  # which is of the whole run
  c.evaluate.every = 2
  c.evaluate.tasks = 16
  c.evaluate.rollouts = 8
  c.evaluate.tasks_per_batch = 16
  c.checkpoint.every = 2
