"""A hard start: eight ciphers, of which the pupil is right on 3 to 5 digits with chances of about .2 to .0001
(ciphers.py)."""

from __future__ import annotations

from kr_jax.datasets import builder
from kr_jax.datasets import ciphers

ALPHABET = ciphers.ALPHABET
MADE_WITH = (ciphers,)
SLIPS = (0.4, 0.6, 0.7, 0.75, 0.8, 0.8, 0.85, 0.85)
TRAIN = 128


class Builder(builder.TaskBuilder):
  """Strings of digits in ciphers of which none is known well; generated."""

  name = 'ciphers_hard'

  def splits(self) -> dict[str, list[dict[str, str | int]]]:
    return ciphers.splits(SLIPS, self.name, TRAIN)
