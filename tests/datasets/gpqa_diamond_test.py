"""GPQA Diamond: choices in an order of the id's, the letter of the right one."""

import re

import pytest

from tests.make_datasets import DIRECTORY, FILES, gpqa, write

PATH = DIRECTORY / 'gpqa_diamond' / 'gpqa_diamond.csv'


def test_its_tasks(stored):
  tasks = stored('gpqa_diamond', PATH)['test']
  assert set(tasks) == {'gpqa_diamond/rec1', 'gpqa_diamond/rec6', 'gpqa_diamond/rec9'}
  for row in FILES['gpqa_diamond/gpqa_diamond.csv']:
    task = tasks[f'gpqa_diamond/{row["Record ID"]}']
    question, _, listed = task['prompt'].rpartition('\n\n')
    choices = dict(re.fullmatch(r'\(([A-D])\) (.+)', line).groups() for line in listed.split('\n'))
    assert question == row['Question']
    assert ''.join(choices) == 'ABCD'
    assert choices[task['answer']] == row['Correct Answer']
    assert set(choices.values()) == {x.strip() for name, x in row.items() if name.endswith(
        ('Correct Answer', '1', '2', '3'))}
    assert task['verifier'] == 'choice'


def test_the_order_is_the_same_on_every_machine(stored):
  tasks = stored('gpqa_diamond', PATH)['test']
  assert [tasks[f'gpqa_diamond/rec{i}']['answer'] for i in (1, 6, 9)] == ['A', 'C', 'B']


def test_right_answers_fall_on_every_letter(stored, tmp_path):
  rows = [gpqa(f'rec{i}', f'Question {i}?', 'right', 'a', 'b', 'c') for i in range(400)]
  answers = [task['answer'] for task in stored(
      'gpqa_diamond', write(tmp_path / 'a.csv', rows))['test'].values()]
  assert all(70 < answers.count(letter) < 130 for letter in 'ABCD')  # 100, standard deviation 8.7


@pytest.mark.parametrize('choices, message', [
    (('a', 'b', ' ', 'd'), "row 1: 'Incorrect Answer 2' is empty"),
    (('a', 'b', 'a ', 'd'), "row 1: the right choice 'a' stands among the wrong ones")])
def test_choices_that_do_not_tell(stored, tmp_path, choices, message):
  with pytest.raises(ValueError, match=message):
    stored('gpqa_diamond', write(tmp_path / 'a.csv', [gpqa('rec1', 'Which?', *choices)]))
