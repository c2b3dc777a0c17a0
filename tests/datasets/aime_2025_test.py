"""AIME 2025: two files."""

from tests.make_datasets import DIRECTORY


def test_its_tasks(stored):
  tasks = stored('aime_2025', DIRECTORY / 'aime_2025' / 'aime2025-*.jsonl')['test']
  assert {task['prompt']: task['answer'] for task in tasks.values()} == {
      'Find the sum of all divisors of $28$.': '56', 'Find the number of divisors of $28$.': '6'}


def test_ids_are_of_the_problem_alone(stored):
  both = stored('aime_2025', DIRECTORY / 'aime_2025' / 'aime2025-*.jsonl')['test']
  one = stored('aime_2025', DIRECTORY / 'aime_2025' / 'aime2025-II.jsonl')['test']
  assert one.items() < both.items()
