"""Configs of modules for tests: the project's own knobs, but for those that a test names."""

import dataclasses

from kr_jax import knobs as knobs_lib
from kr_jax import rewards
from kr_jax import sample
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
