"""Late training: six ciphers that the pupil knows, and two (a quarter of the tasks) of which it is right on 3 to 5 digits
with chances of about .17 to .03 (ciphers.py)."""

from __future__ import annotations

from kr_jax.datasets import builder
from kr_jax.datasets import ciphers

ALPHABET = ciphers.ALPHABET
MADE_WITH = (ciphers,)
SLIPS = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.45, 0.5)
TRAIN = 64


class Builder(builder.TaskBuilder):
  """Strings of digits in ciphers of which most are known; generated."""

  name = 'ciphers_late'

  def splits(self) -> dict[str, list[dict[str, str | int]]]:
    return ciphers.splits(SLIPS, self.name, TRAIN)
