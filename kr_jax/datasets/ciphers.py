"""Strings of digits to be written in ciphers, for families of tasks whose success rates are spread on purpose.

A cipher puts one digit for another. The prompt names it by a letter, and the completion is the string in that cipher:

    prompt 'B3071 ='   answer '8529'   (difficulty 4, the length)

The solutions of the split `warm_start` are those of a careless pupil, who writes each digit in a second, wrong cipher with
a chance that is the cipher's own, its slip. A policy that is fine-tuned on them is right on n digits with a chance of about
(1 - slip)^n. A cipher is ten facts of its own: to learn one teaches little of another. So slips decide which share of the
tasks is solved, in reach or out of reach when training begins.

The splits share no problem.
"""

from __future__ import annotations

from collections.abc import Sequence
import random

from kr_jax.datasets import builder

LETTERS = 'ABCDEFGH'  # of ciphers, in the order of their slips
ALPHABET = f'0123456789{LETTERS}= '
LENGTHS = range(3, 6)
# Problems in each split, but for those to train on.
SPLITS = {'test': 384, 'warm_start': 8192}
CARELESS = ('warm_start',)


def cipher(letter: str) -> tuple[list[int], list[int]]:
  """What a cipher puts for each digit, and what the careless pupil does: another digit for each."""
  rng = random.Random(f'cipher {letter}')
  right, wrong = list(range(10)), list(range(10))
  rng.shuffle(right)
  while any(a == b for a, b in zip(right, wrong)):
    rng.shuffle(wrong)
  return right, wrong


def splits(slips: Sequence[float], name: str, train: int) -> dict[str, list[dict[str, str | int]]]:
  """The tasks of each split, for ciphers of these slips.

  Args:
    name: of the dataset, with which ids begin.
    train: how many to train on.
  """
  rng, seen = random.Random(2509_25849), set()
  return {split: [_task(name, slips, rng, seen, split in CARELESS) for _ in range(count)]
          for split, count in (SPLITS | {'train': train}).items()}


def _task(name: str, slips: Sequence[float], rng: random.Random, seen: set[str], careless: bool) -> dict[str, str | int]:
  """A problem that is not among those seen, and is from then on."""
  text = ''
  while not text or text in seen:
    which = rng.randrange(len(slips))
    digits = [rng.randrange(10) for _ in range(rng.choice(LENGTHS))]
    text = LETTERS[which] + ''.join(map(str, digits))
  seen.add(text)
  right, wrong = cipher(LETTERS[which])
  slipped = [(wrong if careless and rng.random() < slips[which] else right)[digit] for digit in digits]
  written = lambda digits: ''.join(map(str, digits))
  return {'id': f'{name}/{text}', 'prompt': f'{text:<{1 + max(LENGTHS)}}=',
          'answer': written(right[digit] for digit in digits), 'difficulty': len(digits), 'solution': written(slipped)}
