"""Sums of two-digit numbers, worked out by running totals.

A task of difficulty d has d additions or subtractions:

    prompt '17+25-38='   solution '42,4'   answer '4'   (difficulty 2)

A completion may write whatever it likes; the number after its last comma is its answer. The chance
of a right answer falls about geometrically with the difficulty, so one skill at every level of
mastery spreads the success rates of the levels over 0..1. Running totals stay in 0..999.

The splits share no problem. `id` is the problem itself, so it never changes.
"""

from __future__ import annotations

from collections.abc import Iterator
import random

import numpy as np
import tensorflow_datasets as tfds

ALPHABET = '0123456789+-=,'
MAX_DIFFICULTY = 8
# Problems of each difficulty in each split.
SPLITS = {'test': 48, 'train': 128, 'warm_start': 2048}


def problem(rng: random.Random, difficulty: int) -> dict[str, str | int]:
  """A random problem with its running totals."""
  total = rng.randint(10, 99)
  prompt, totals = str(total), []
  for _ in range(difficulty):
    term = rng.randint(10, 99)
    sign = rng.choice('+-') if total >= term else '+'
    total += term if sign == '+' else -term
    prompt += f'{sign}{term}'
    totals.append(str(total))
  return {
      'id': f'arithmetic/{prompt}',
      'prompt': f'{prompt}=',
      'answer': totals[-1],
      'difficulty': difficulty,
      'solution': ','.join(totals),
  }


def splits() -> dict[str, list[dict[str, str | int]]]:
  """Every split's problems, shuffled; no problem stands in two of them."""
  rng = random.Random(2509_25849)
  examples = {split: [] for split in SPLITS}
  for difficulty in range(1, MAX_DIFFICULTY + 1):
    drawn: dict[str, dict[str, str | int]] = {}
    while len(drawn) < sum(SPLITS.values()):
      example = problem(rng, difficulty)
      drawn.setdefault(example['id'], example)
    queue = iter(drawn.values())
    for split, count in SPLITS.items():
      examples[split].extend(next(queue) for _ in range(count))
  for split in examples.values():
    rng.shuffle(split)
  return examples


class Builder(tfds.core.GeneratorBasedBuilder):
  """TFDS builder of `arithmetic`; generated, nothing is downloaded."""

  name = 'arithmetic'
  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Sums of 1 to 8 two-digit terms with running totals.'}

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
        description=__doc__,
        features=tfds.features.FeaturesDict({
            'id': tfds.features.Text(),
            'prompt': tfds.features.Text(),
            'answer': tfds.features.Text(),
            'difficulty': tfds.features.Scalar(np.int32),
            'solution': tfds.features.Text(),
        }))

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    del dl_manager
    return {split: ((e['id'], e) for e in examples) for split, examples in splits().items()}

  def _generate_examples(self, examples) -> Iterator:
    yield from examples
