"""Sums of two numbers of one or two digits, for a published checkpoint: '46 + 31', answer '77'.

The difficulty is the number of digits of both numbers. 'a + b' and 'b + a' are in one split.
"""

from __future__ import annotations

import random

from kr_jax.datasets import builder

# Sums of each difficulty in each split. There are 81 of two digits.
SPLITS = {'test': {2: 40, 3: 60, 4: 92}, 'train': {2: 40, 3: 200, 4: 272}}


def splits() -> dict[str, list[tuple[int, int]]]:
  """The pairs of numbers of each split, shuffled."""
  rng = random.Random(2509_25849)
  pairs = {split: [] for split in SPLITS}
  for difficulty in (2, 3, 4):
    found = [(a, b) for a in range(1, 100) for b in range(a, 100) if len(f'{a}{b}') == difficulty]
    rng.shuffle(found)
    for split, counts in SPLITS.items():
      some = []
      while len(some) < counts[difficulty]:
        pair = found.pop()
        some += sorted({pair, pair[::-1]})
      pairs[split] += some[:counts[difficulty]]
  for some in pairs.values():
    rng.shuffle(some)
  return pairs


class Builder(builder.TaskBuilder):
  """Sums of two numbers of one or two digits; generated."""

  name = 'sums'

  def splits(self) -> dict[str, list[dict[str, str | int]]]:
    return {split: [{'id': f'sums/{a}+{b}', 'prompt': f'{a} + {b}', 'answer': str(a + b),
                     'difficulty': len(f'{a}{b}')} for a, b in pairs]
            for split, pairs in splits().items()}
