"""Configs of modules for tests: the project's own knobs, but for those that a test names."""

from configs import common
from kr_jax import rewards
from kr_jax import sample
from kr_jax.learning import grpo
from kr_jax.learning import update
from kr_jax.model.tokenizer import STOP


def loss(**knobs) -> grpo.Config:
  """A grpo.Config."""
  section = common.base().grpo.to_dict()
  del section['preset']
  return grpo.Config(**section | knobs)


def updates(temperature: float = 1.0, **knobs) -> update.Config:
  """An update.Config: knobs of the sections grpo, optimizer and pack."""
  c = common.base()
  of_loss = {k: knobs.pop(k) for k in grpo.Config._fields if k in knobs}
  return update.Config(grpo=loss(**of_loss), temperature=temperature,
                       **(c.optimizer.to_dict() | c.pack.to_dict() | knobs))


def sampler(**knobs) -> sample.Config:
  """A sample.Config, of tokenizer.Characters."""
  return sample.Config(**common.base().sample.to_dict() | {'stop_ids': (STOP,)} | knobs)


def verifiers(verifier, *, workers: int = 1, **knobs) -> rewards.Config:
  """A rewards.Config."""
  section = common.base().rewards.to_dict()
  return rewards.Config(**section | {'verifier': verifier, 'workers': workers} | knobs)
