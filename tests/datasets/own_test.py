"""Files of problems and answers of a user: columns, splits, and rows that are no tasks."""

import json
import re

import pytest

from kr_jax import rewards
from kr_jax import tasks
from kr_jax.datasets import own
from kr_jax.datasets import published
from kr_jax.model.tokenizer import Characters
from tests.make_datasets import write

ROW = {'question': 'one?', 'answer': '1'}


class Bytes:
  """A tokenizer of any text."""

  def prompt(self, text):
    return tuple(text.encode())


def read(path, split='all', data_dir=None, **columns):
  return tasks.read(f'file:{path}', split, Bytes(), data_dir=str(data_dir or path.parent / 'stored'), columns=columns)


def of(row, **columns):
  """The task of the first row of a file."""
  return own.Columns(columns).task(row)


@pytest.mark.parametrize('ending', [ending[1:] for ending in published.ENDINGS])
def test_every_format_is_tasks(ending, tmp_path):
  path = write(tmp_path / f'my sums.{ending}', [{'Question': f'{i}+1?', 'answer': f'{i + 1}'} for i in range(3)])
  found = read(path)
  assert sorted((task.prompt, task.answer) for task in found) == [('0+1?', '1'), ('1+1?', '2'), ('2+1?', '3')]
  assert {(task.source, task.verifier, task.id[:8]) for task in found} == {(f'file:{path}', '', 'my_sums/')}


def test_a_tenth_is_held_out_by_ids_alone(tmp_path):
  """Other rows, another order and another folder move no task but those at the limit."""
  rows = [{'id': i, 'problem': f'{i}?', 'answer': i} for i in range(40)]
  splits = {}
  for name, some in (('a', rows), ('b', rows[::-1]), ('c', rows[:30])):
    path = write(tmp_path / name / 'set.jsonl', some)
    splits[name] = {split: {task.id for task in read(path, split)} for split in ('train', 'test', 'all')}
  assert splits['a'] == splits['b'] and [len(x) for x in splits['a'].values()] == [36, 4, 40]
  for found in splits.values():
    assert found['train'] | found['test'] == found['all'] and not found['train'] & found['test']
  assert splits['c']['test'] >= splits['a']['test'] & splits['c']['all'] and len(splits['c']['test']) == 3
  assert {id.partition('/')[0] for id in splits['a']['all']} == {'set'}
  assert [own.count_tested(n) for n in (0, 1, 2, 19, 20, 5120, 9000)] == [0, 0, 1, 1, 2, 512, 512]


def test_a_file_of_one_row_has_nothing_held_out(tmp_path):
  path = write(tmp_path / 'a.csv', [ROW])
  assert len(read(path, 'train')) == len(read(path)) == 1
  with pytest.raises(ValueError, match=r"a.csv' has no split 'test'; it has \['train'\]"):
    read(path, 'test')


def test_columns_are_found_by_what_they_are_called():
  assert of({'a': '', 'Prompt': ' two? ', 'final_answer': 2.0, 'uuid': 7, 'Level': 'Level 5', 'solution': 'x'}) == {
      'prompt': 'two?', 'answer': '2', 'id': '7', 'difficulty': 5, 'solution': 'x', 'info': ''}
  # Words of difficulty, lists of solutions: not what they could be taken for.
  assert of({'prompt': 'q', 'question': 'p', 'answer': 1, 'difficulty': 'hard', 'solution': ['x'], 'id': None}) == {
      'prompt': 'p', 'answer': '1', 'difficulty': 0, 'solution': '', 'info': ''}
  table = own.Columns({})  # settled by the first row
  rows = ({'level': 0, 'solution': ''}, {'level': '2'}, {})
  assert [table.task(ROW | more)['difficulty'] for more in rows] == [0, 2, 0]
  chat = [{'role': 'user', 'content': 'q'}]
  assert of({'prompt': chat, 'reward_model': {'ground_truth': '3', 'style': 'rule'}})['answer'] == '3'
  assert 'verifier' not in of(ROW | {'verifier': 'nonsense', 'info': 'nonsense'})


def test_columns_that_are_named():
  row = {'q': 'q', 'x': {'y': {'a': 5}}, 'n': 3, 'level': 9, 'v': 'choice', 'tests': [1, 2], 'w': 'worked', 'key': 'k'}
  assert of(row, problem='q', answer='x.y.a', difficulty='n', verifier='v', info='tests', solution='w', id='key') == {
      'prompt': 'q', 'answer': '5', 'difficulty': 3, 'verifier': 'choice', 'info': '[1, 2]', 'solution': 'worked',
      'id': 'k'}
  assert of({'q': 'q', 'tests': '{}'}, problem='q', info='tests')['info'] == '{}'  # which needs no answer
  worked = {'question': 'q', 'answer': 'It is 6*7. #### 1\n#### 42 '}
  assert of(worked, after='####') == {
      'prompt': 'q', 'answer': '42', 'difficulty': 0, 'solution': 'It is 6*7. #### 1\n#### 42', 'info': ''}


@pytest.mark.parametrize('row, columns, said', [
    ({'text': 'q', 'answer': 1}, {}, r"there is no problem: .* one of \['problem', .* there are \['text', 'ans"),
    ({'question': 'q', 'ans': 1}, {}, r'there is no answer: .*name it with --config.tasks.columns.answer=COLUMN'),
    ({'question': 'q', 'answers': 1}, {'answer': 'answer'}, r"columns.answer='answer' is no column; .*mean 'answers"),
    (ROW, {'answer': 'answer.text'}, "tasks.columns.answer='answer.text' is no column"),
    (ROW | {'answer': True}, {}, r'answer is True \(bool\), neither a text nor a number'),
    (ROW | {'answer': ['1']}, {}, r"answer is \['1'\] \(list\)"), (ROW | {'answer': float('nan')}, {}, 'answer is nan'),
    (ROW | {'question': {}}, {}, r'question is {} \(dict\), neither'),
    (ROW | {'level': 'x'}, {'difficulty': 'level'}, r"level is 'x' \(str\), not a whole number"),
    (ROW | {'level': -1}, {'difficulty': 'level'}, 'not a whole number'),
    (ROW | {'v': 'os:system'}, {'verifier': 'v'}, r"the verifier 'os:system' is not one of \['choice', .* by rewards."),
    (ROW, {'after': '####'}, r"the answer has no '####' \(tasks.columns.after\): '1'"),
    ({'prompt': [{'role': 'system', 'content': ''}, {'role': 'user', 'content': 'q'}], 'answer': 1}, {},
     r"prompt has the roles \['system', 'user'\], not one user; tasks.system"),
    ({'prompt': ['q'], 'answer': 1}, {}, r"prompt\[0\] is 'q' \(str\), not an object")])
def test_rows_that_are_no_tasks(row, columns, said):
  with pytest.raises(ValueError, match=said):
    of(row, **columns)


@pytest.mark.parametrize('second, said', [
    ({'question': 'two?', 'answer': ' '}, 'row 2: the answer is empty'),
    ({'question': '', 'answer': 2}, 'row 2: the prompt is empty'),
    ({'question': 'two?'}, 'row 2: it has no answer'), ([1], r'row 2: it is \[1\] \(list\), not an object'),
    (ROW | {'answer': '7'}, r'row 2: its id .* is that of .*a.jsonl, row 1'),
    (ROW | {'id': 2}, r'row 2: its problem is that of .*a.jsonl, row 1; leave one of them'),
    ({'question': 'two?', 'answer': 2, 'id': 1}, r"row 2: its id '1'.* is that of .*row 1")])
def test_an_error_says_file_and_row_and_nothing_is_stored(second, said, tmp_path):
  ids = {'id': 1} if isinstance(second, dict) and 'id' in second else {}
  path = tmp_path / 'a.jsonl'
  path.write_text(f'{json.dumps(ROW | ids)}\n{json.dumps(second)}\n')
  with pytest.raises(ValueError, match=f'^{re.escape(str(path))}, .*{said}|^{re.escape(str(path))}, {said}'):
    read(path)
  assert not [p for p in (tmp_path / 'stored').rglob('*') if p.is_file()]


def test_a_path_that_names_no_file(tmp_path):
  with pytest.raises(ValueError, match="tasks.dataset=file:'.*no.csv' names no file; give the path of a file that en"):
    read(tmp_path / 'no.csv')
  (tmp_path / 'a.txt').write_text('x')
  with pytest.raises(ValueError, match='a.txt ends in none of'):
    read(tmp_path / 'a.txt')


def test_other_rows_and_columns_are_other_data(tmp_path):
  path = write(tmp_path / 'a.csv', [ROW | {'other': 'three'}])
  assert [read(path, **columns)[0].answer for columns in ({}, {'answer': 'other'}, {})] == ['1', 'three', '1']
  write(path, [ROW | {'answer': '4'}])
  assert read(path)[0].answer == '4'


def test_labels_of_ids():
  for path, label in (('/d/sums.csv', 'sums'), ('/d/my set-2.v1.jsonl.gz', 'my_set-2_v1'), ('/d/*.csv', 'd'),
                      ('gs://b/math/[ab]*.parquet', 'math'), ('x/train-*.csv', 'train'), ('*.csv', 'file')):
    assert own.label(path) == label


def test_the_alphabet_of_a_file(tmp_path):
  path = write(tmp_path / 'a.csv', [{'question': '3+4=', 'answer': '7', 'solution': '7é'}])
  found = tasks.alphabet([f'file:{path}'], str(tmp_path / 'stored'), 'so {problem}')
  assert sorted(found) == sorted('3+4=7éso ')
  assert Characters(found).prompt('so 3+4=')
  with pytest.raises(ValueError, match="dataset 'file:x' has 600 different characters, .* 512 at the most; train a"):
    own.alphabet([''.join(map(chr, range(1000, 1600)))], 'file:x')


def test_verifiers_that_a_file_may_name():
  assert set(own.VERIFIERS) == set(rewards.VERIFIERS)
