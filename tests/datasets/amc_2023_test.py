"""AMC 2023."""

import pytest

from tests.make_datasets import DIRECTORY, write


def test_its_tasks(stored):
  tasks = stored('amc_2023', DIRECTORY / 'amc_2023' / '*.parquet')['test']
  assert {task['prompt']: task['answer'] for task in tasks.values()} == {
      'A train of 9 cars loses 2. How many remain?': '7', 'What is half of 5, as a decimal?': '2.5'}


@pytest.mark.parametrize('answer, text', [(27.0, '27'), (2.5, '2.5'), (7, '7'), ('27.0', '27.0')])
def test_answers_that_are_numbers(stored, tmp_path, answer, text):
  path = write(tmp_path / 'a.jsonl', [{'question': 'How many?', 'answer': answer}])
  assert [task['answer'] for task in stored('amc_2023', path)['test'].values()] == [text]
