"""Strings of digits in ciphers."""

import math

from kr_jax.datasets import builder
from kr_jax.datasets import ciphers
from kr_jax.datasets import ciphers_hard
from kr_jax.datasets import ciphers_late


def test_ciphers_put_one_digit_for_each_and_slips_another():
  seen = set()
  for letter in ciphers.LETTERS:
    right, wrong = ciphers.cipher(letter)
    assert sorted(right) == sorted(wrong) == list(range(10))
    assert all(a != b for a, b in zip(right, wrong))
    assert (right, wrong) == ciphers.cipher(letter)
    seen.add(tuple(right))
  assert len(seen) == len(ciphers.LETTERS)


def test_a_task_by_hand():
  found = ciphers.splits((0.0, 0.5), 'name', 20)
  right, _ = ciphers.cipher('B')
  task = next(task for task in found['test'] if task['prompt'].startswith('B'))
  digits = task['prompt'][1:-1].strip()
  assert task['prompt'] == f'B{digits:<5}=' and len(task['prompt']) == 7
  assert task['answer'] == ''.join(str(right[int(digit)]) for digit in digits) == task['solution']
  assert (task['id'], task['difficulty']) == (f'name/B{digits}', len(digits))


def test_splits_share_no_problem_and_slips_are_the_share_of_wrong_digits():
  slips = (0.0, 0.3, 0.85)
  found = ciphers.splits(slips, 'name', 20)
  assert {split: len(tasks) for split, tasks in found.items()} == ciphers.SPLITS | {'train': 20}
  prompts = [task['prompt'] for tasks in found.values() for task in tasks]
  assert len(set(prompts)) == len(prompts) and set(''.join(prompts)) <= set(ciphers.ALPHABET)
  for letter, slip in zip(ciphers.LETTERS, slips):
    pairs = [pair for task in found['warm_start'] if task['prompt'].startswith(letter)
             for pair in zip(task['answer'], task['solution'])]
    wrong = sum(a != b for a, b in pairs)
    assert abs(wrong / len(pairs) - slip) < 4 * math.sqrt(0.25 / len(pairs))
  assert found == ciphers.splits(slips, 'name', 20)


def test_edited_ciphers_are_new_data():
  assert {builder.of_code(module).name for module in (ciphers_hard, ciphers_late)} == {
      f'code-{builder.code(module, ciphers)}' for module in (ciphers_hard, ciphers_late)}
