"""Sums and differences of digits, worked out by running totals.

A task of difficulty d has d signed digits; the worked completion writes the total after each, two
digits a total, and the last two digits of a completion are its answer:

    prompt '+3+8-5              ='   solution '031106'   answer '06'   (difficulty 3)

Totals stay in 0..99. The blanks give every prompt the same length, so that the distance from a term to its
total is fixed: a small transformer learns the step in minutes.

The solutions of the split `warm_start` are those of a careless pupil, who forgets every second carry or borrow
('+3+8-5': '030106' or '031116' as well) and goes on from the wrong total. A policy that is fine-tuned on them knows
its digits, and is right on a task with c carries about one time in 2^c: its success rates spread over all of 0..1,
and its most likely answers are often wrong. Only the verified answers can teach it to carry always.

The splits share no problem.
"""

from __future__ import annotations

import random

import tensorflow_datasets as tfds

from kr_jax.datasets import builder

ALPHABET = '0123456789+-= '
DIFFICULTIES = range(3, 11)
# Problems of each difficulty in each split.
SPLITS = {'test': 48, 'train': 128, 'warm_start': 1024}
CARELESS = ('warm_start',)
# Chance that the careless pupil forgets a carry or a borrow.
SLIP = 0.5


def add(total: int, term: int, *, forget: bool = False) -> int:
  """total + term; if `forget`, the tens of the total are left as they were."""
  return total // 10 * 10 + (total + term) % 10 if forget else total + term


def problem(rng: random.Random, difficulty: int) -> list[int]:
  """Random signed digits whose running totals all lie in 0..99."""
  terms = []
  for _ in range(difficulty):
    digit = rng.randint(1, 9)
    terms.append(rng.choice([t for t in (digit, -digit) if 0 <= sum(terms) + t <= 99]))
  return terms


def solution(terms: list[int], *, rng: random.Random | None = None) -> str:
  """The running totals, two digits each; with an rng, those of the careless pupil."""
  total, text = 0, ''
  for term in terms:
    # A pupil who is off by tens may leave 0..99, and has two digits to write.
    total = add(total, term, forget=rng is not None and rng.random() < SLIP) % 100
    text += f'{total:02d}'
  return text


def splits() -> dict[str, list[dict[str, str | int]]]:
  """The tasks of each split, shuffled."""
  rng = random.Random(2509_25849)
  examples = {split: [] for split in SPLITS}
  for difficulty in DIFFICULTIES:
    drawn: dict[str, list[int]] = {}
    while len(drawn) < sum(SPLITS.values()):
      terms = problem(rng, difficulty)
      drawn.setdefault(''.join(f'{term:+d}' for term in terms), terms)
    queue = iter(drawn.items())
    for split, count in SPLITS.items():
      for _ in range(count):
        text, terms = next(queue)
        examples[split].append({
            'id': f'arithmetic/{text}',
            'prompt': f'{text:<{2 * max(DIFFICULTIES)}}=',
            'answer': solution(terms)[-2:],
            'difficulty': difficulty,
            'solution': solution(terms, rng=rng if split in CARELESS else None),
        })
  for split in examples.values():
    rng.shuffle(split)
  return examples


class Builder(builder.TaskBuilder):
  """Sums and differences of digits; generated."""

  name = 'arithmetic'
  VERSION = tfds.core.Version('1.1.0')  # 1.0.0 has no fields `verifier` and `info`

  def splits(self) -> dict[str, list[dict[str, str | int]]]:
    return splits()
