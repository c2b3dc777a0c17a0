"""DAPO-Math-17k: bare problems, each once."""

import pytest

from kr_jax.datasets import dapo_math_17k
from tests.make_datasets import AFTER, BEFORE, DIRECTORY, dapo, write

FILE = DIRECTORY / 'dapo_math_17k' / 'dapo-math-17k.parquet'


def test_its_tasks(stored, caplog):
  tasks = stored('dapo_math_17k', FILE)
  assert list(tasks) == ['train']
  assert {(task['prompt'], task['answer']) for task in tasks['train'].values()} == {
      ('How many even numbers lie in 1 to 21?', '10'), ('What is the sum of the digits of 456?', '15')}
  for name, task in tasks['train'].items():
    assert name.startswith('dapo_math_17k/') and task['verifier'] == 'math'
  assert ('dapo_math_17k: 1 of 3 problems have different answers in different rows and are left out: '
          f"{FILE}, row 6 has '6', {FILE}, row 4 '5'") in caplog.text


def test_the_instructions_of_the_file_are_known():
  assert (dapo_math_17k.BEFORE, dapo_math_17k.AFTER) == (BEFORE.strip(), AFTER.strip())


def test_a_prompt_of_several_messages(stored, tmp_path):
  row = dapo('1+1?', '2', 'a')
  row['prompt'].insert(0, {'role': 'system', 'content': 'Be good.'})
  with pytest.raises(ValueError, match=r"row 1: prompt has the roles \['system', 'user'\], not one"):
    stored('dapo_math_17k', write(tmp_path / 'a.parquet', [row]))
