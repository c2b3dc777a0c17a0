"""Minerva Math."""

from tests.make_datasets import DIRECTORY


def test_its_tasks(stored):
  tasks = stored('minerva_math', DIRECTORY / 'minerva_math' / 'test.jsonl')['test']
  assert {task['prompt'][:6]: task['answer'] for task in tasks.values()} == {
      'A lens': '25', 'A gas ': 'p V'}
