"""Configs for tests: the project's own knobs, but for those that a test names."""

import dataclasses

from configs import arithmetic
from kr_jax import knobs as knobs_lib
from kr_jax import prepare
from kr_jax import rewards
from kr_jax import sample
from kr_jax import train
from kr_jax.learning import update
from kr_jax.model.tokenizer import STOP

loss = knobs_lib.Grpo
_OF_LOSS = [field.name for field in dataclasses.fields(knobs_lib.Grpo)]


def updates(**knobs) -> update.Config:
  """An update.Config: knobs of the sections grpo, optimizer and pack, and the temperature."""
  of_loss = {name: knobs.pop(name) for name in _OF_LOSS if name in knobs}
  return update.Config(grpo=loss(**of_loss), **knobs)


def sampler(**knobs) -> sample.Config:
  """A sample.Config, of tokenizer.Characters."""
  return sample.Config(**{'stop_ids': (STOP,)} | knobs)


def verifiers(verifier, *, workers: int = 1, **knobs) -> rewards.Config:
  """A rewards.Config."""
  return rewards.Config(verifier=verifier, workers=workers, **knobs)


def debug_config(data_dir, **knobs):
  """configs/arithmetic.py:debug with one layer, on one device, without a page. knobs: section__name=value."""
  c = arithmetic.get_config('debug')
  c.record.page = False  # which takes seconds to draw
  c.tasks.data_dir = data_dir
  c.tasks.warm_start_split = 'warm_start[:256]'  # the others take seconds to read
  c.rewards.verifier, c.rewards.workers = 'tests.graders:has_a_one', 1
  c.mesh.devices = c.policy.num_layers = 1
  c.update_from_flattened_dict({name.replace('__', '.'): x for name, x in knobs.items()})
  return c


def run(workdir, data_dir, **knobs) -> str:
  """Trains a debug config, and returns its workdir."""
  train.train(prepare.prepare(debug_config(data_dir, **knobs)), str(workdir))
  return str(workdir)
