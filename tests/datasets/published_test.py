"""What is wrong with a file is said with its row, before anything is stored, for all datasets of files."""

import copy
import json
import pathlib
import re

from etils import epath
import pyarrow
from pyarrow import parquet
import pytest

from kr_jax import tasks
from kr_jax.datasets import published
from tests.make_datasets import DIRECTORY, FILES, write

# By dataset, the name and the rows of one of its files.
FILE = {name.partition('/')[0]: (name.partition('/')[2], rows) for name, rows in FILES.items()}
DATASETS = sorted(FILE)


@pytest.fixture
def refused(tmp_path):
  """Asserts that a dataset's file is refused with a message, and that nothing is stored."""
  def refused(dataset, path, message):
    directory = tmp_path / 'refused'
    with pytest.raises(ValueError, match=f'(?s){re.escape(str(path))}{message}') as error:
      tasks.builder(dataset, str(directory), files={dataset: str(path)})
    assert not [p for p in directory.rglob('*') if p.is_file()]
    return str(error.value)
  return refused


def changed(dataset, number, change):
  """The dataset's rows, of which one (from 1) is changed in place; and its name in JSON lines."""
  name, rows = FILE[dataset]
  rows = copy.deepcopy(rows)
  change(rows[number - 1])
  return name.partition('.')[0] + '.jsonl', rows


def places(dataset):
  """Where each field of the dataset's schema stands: [('reward_model', 'ground_truth')]."""
  def walk(schema, at):
    if isinstance(schema, dict):
      return [place for field, inner in schema.items() for place in walk(inner, (*at, field))]
    return walk(schema[0], (*at, 0)) if isinstance(schema, list) else [at]
  return walk(tasks._module(dataset).Builder.SCHEMA, ())


FIELDS = [(dataset, place) for dataset in DATASETS for place in places(dataset)]


def named(place):
  return re.escape(''.join(f'[{x}]' if isinstance(x, int) else f'.{x}' for x in place)[1:])


def parent(row, place):
  for x in place[:-1]:
    row = row[x]
  return row


def test_every_dataset_of_files_has_a_knob_and_a_fixture():
  from configs import common
  modules = {p.stem for p in (pathlib.Path(tasks.__file__).parent / 'datasets').glob('*.py')}
  of_files = {name for name in modules - {'__init__', 'published'}
              if issubclass(tasks._module(name if name != 'reasoning_gym' else f'{name}/x').Builder,
                            published.Builder)}
  assert set(common.base().tasks.files) == of_files == set(DATASETS)


@pytest.mark.parametrize('name', FILES)
def test_the_fixtures_are_what_their_script_writes(name, tmp_path):
  path = write(tmp_path / name, FILES[name])
  rows = lambda p: [row for _, row in published.rows([epath.Path(p)])]
  assert rows(path) == rows(DIRECTORY / name)


@pytest.mark.parametrize('dataset', sorted(set(DATASETS) - {'gsm8k'}))  # which TFDS has
def test_without_a_file_it_says_where_it_is(dataset, tmp_path):
  with pytest.raises(ValueError, match=rf'{dataset}.* is read from .* on the Hugging Face hub.*; '
                                       'download it, and point to it with '
                                       rf'--config.tasks.files.{dataset}=PATH'):
    tasks.builder(dataset, str(tmp_path))


@pytest.mark.parametrize('dataset', DATASETS)
def test_a_path_without_a_file(dataset, tmp_path):
  for path in (tmp_path / 'none.jsonl', tmp_path / 'no' / '*.jsonl', tmp_path):
    with pytest.raises(ValueError, match=f"tasks.files.{dataset}='{re.escape(str(path))}' names no "
                                         'file; point to .* hub'):
      tasks.builder(dataset, str(tmp_path), files={dataset: str(path)})


@pytest.mark.parametrize('dataset, place', [f for f in FIELDS if not isinstance(f[1][-1], int)])
def test_a_missing_field(dataset, place, refused, tmp_path):
  name, rows = changed(dataset, 1, lambda row: parent(row, place).pop(place[-1]))
  path = write(tmp_path / name, rows)
  refused(dataset, path, f', row 1: {named(place)} is missing; there are ')


@pytest.mark.parametrize('dataset, place', FIELDS)
def test_a_field_of_another_type(dataset, place, refused, tmp_path):
  number = len(FILE[dataset][1])
  name, rows = changed(dataset, number, lambda row: parent(row, place).__setitem__(place[-1], [3]))
  path = write(tmp_path / name, rows)
  refused(dataset, path, rf', row {number}: {named(place)} is \[3\] \(list\), not ')


@pytest.mark.parametrize('ending', ['.jsonl', '.parquet', '.csv'])
@pytest.mark.parametrize('dataset', DATASETS)
def test_an_empty_file(dataset, ending, refused, tmp_path):
  path = tmp_path / f'test{ending}'
  if ending == '.parquet':
    parquet.write_table(pyarrow.table({'question': pyarrow.array([], pyarrow.string())}), path)
  else:
    path.write_text('question,answer\n' if ending == '.csv' else '')
  refused(dataset, path, ' is empty: it has no row')


@pytest.mark.parametrize('dataset', DATASETS)
def test_bytes_that_are_not_utf_8(dataset, refused, tmp_path):
  path = tmp_path / 'test.jsonl'
  path.write_bytes(json.dumps(FILE[dataset][1][0]).encode() + b'\n{"question": "caf\xe9?"}\n')
  refused(dataset, path, ', row 2: not UTF-8')


@pytest.mark.parametrize('text', ['', '   ', '\n'])
@pytest.mark.parametrize('dataset', sorted(set(DATASETS) - {'gpqa_diamond', 'gsm8k'}))  # whose are made
def test_an_empty_answer(dataset, text, refused, tmp_path):
  place = next(p for p in places(dataset) if set(p) & {'answer', 'final_answer', 'ground_truth'})
  name, rows = changed(dataset, 1, lambda row: parent(row, place).__setitem__(place[-1], text))
  refused(dataset, write(tmp_path / name, rows), ', row 1: the answer is empty')


def test_an_empty_answer_of_gsm8k(refused, tmp_path):
  path = write(tmp_path / 'test.jsonl', [{'question': '1+1?', 'answer': 'Add.\n#### '}])
  refused('gsm8k', path, ', row 1: the answer is empty')


@pytest.mark.parametrize('dataset', DATASETS)
def test_an_empty_problem(dataset, refused, tmp_path):
  place = next(p for p in places(dataset) if set(p) & {'question', 'Question', 'problem', 'content'})
  name, rows = changed(dataset, 1, lambda row: parent(row, place).__setitem__(place[-1], ' '))
  refused(dataset, write(tmp_path / name, rows), ', row 1: the prompt is empty')


@pytest.mark.parametrize('dataset', sorted(set(DATASETS) - {'dapo_math_17k'}))  # which merges them
def test_a_repeated_id(dataset, refused, tmp_path):
  rows = FILE[dataset][1]
  path = write(tmp_path / 'test.jsonl', [*rows, rows[0]])
  error = refused(dataset, path, rf', row {len(rows) + 1}: its id .* is that of ')
  assert f'{path}, row 1; ids must be unique' in error


def test_an_unknown_ending(refused, tmp_path):
  path = tmp_path / 'test.txt'
  path.write_text('{}')
  refused('math_500', path, r" ends in none of \['.csv', '.jsonl', '.parquet'\]")


@pytest.mark.parametrize('line, message', [
    ('{"problem": ', 'not JSON'), ('[' * 100_000, 'not JSON'),
    ('[1]', r'it is \[1\] \(list\), not an object'), ('"text"', 'it is \'text\' .*, not an object'),
    ('{"unique_id": "a", "problem": "b", "solution": "c", "answer": "d", "level": true}',
     r'level is True \(bool\), not int')])
def test_lines_that_are_no_row(line, message, refused, tmp_path):
  path = tmp_path / 'test.jsonl'
  path.write_text(f'\n{line}\n')  # rows are numbered as lines
  refused('math_500', path, f', row 2: {message}')


def test_a_long_value_is_shortened(refused, tmp_path):
  name, rows = changed('math_500', 2, lambda row: row.update(level='x' * 10_000))
  assert len(refused('math_500', write(tmp_path / name, rows), ', row 2: level is ')) < 1000


def test_parquet_of_other_columns_and_types(refused, tmp_path):
  name, rows = FILE['aime_2024']
  some = [{'id': row['id'], 'problem': row['problem']} for row in rows]
  refused('aime_2024', write(tmp_path / 'a.parquet', some), ', row 1: solution is missing')
  refused('aime_2024', write(tmp_path / 'b.parquet', [r | {'answer': 7} for r in rows]),
          r', row 1: answer is 7 \(int\), not str')
  refused('aime_2024', write(tmp_path / 'c.parquet', [rows[0], rows[1] | {'answer': None}]),
          r', row 2: answer is None \(NoneType\), not str')
  path = tmp_path / 'd.parquet'
  path.write_bytes(b'not a table')
  refused('aime_2024', path, ' is not Parquet: ')


def test_parquet_that_is_not_utf_8(refused, tmp_path):
  """In the second of two batches of rows."""
  count = 5000
  data = pyarrow.array([b'problem %d' % i for i in range(count - 1)] + [b'caf\xe9'])
  path = tmp_path / 'a.parquet'
  columns = {'question': data.view(pyarrow.string()), 'answer': ['7'] * count}
  parquet.write_table(pyarrow.table(columns), path)
  refused('amc_2023', path, f', row {count}: not UTF-8')


def test_csv_that_is_not_utf_8_or_short(refused, tmp_path):
  path = write(tmp_path / 'a.csv', FILE['gpqa_diamond'][1])
  whole = path.read_bytes()
  path.write_bytes(whole.replace(b'lepton', b'l\xe9pton'))  # a question before has a line break
  refused('gpqa_diamond', path, ', row 3: not UTF-8')
  path.write_bytes(whole.replace(b'rec6,', b'rec\xe9,'))
  refused('gpqa_diamond', path, ', row 2: not UTF-8')
  path.write_bytes(whole + b'rec4,Which?\r\n')
  refused('gpqa_diamond', path, r', row 4: Correct Answer is None \(NoneType\), not str')
  path.write_bytes(whole + b'rec4,"Which?\r\n')
  refused('gpqa_diamond', path, ', row 4: not CSV')


def test_a_byte_order_mark_is_no_part_of_a_field(tmp_path):
  for name in ('gpqa_diamond/gpqa_diamond.csv', 'math_500/test.jsonl'):
    path = epath.Path(tmp_path) / pathlib.Path(name).name
    path.write_bytes(b'\xef\xbb\xbf' + (DIRECTORY / name).read_bytes())
    assert [row for _, row in published.rows([path])] == [
        row for _, row in published.rows([epath.Path(DIRECTORY / name)])]


def test_another_file_gives_other_data(stored, tmp_path):
  path = tmp_path / 'test.jsonl'
  answers = lambda: [task['answer'] for task in stored('minerva_math', path)['test'].values()]
  write(path, [{'question': '1+1?', 'answer': '2'}])
  assert answers() == ['2']
  write(path, [{'question': '1+1?', 'answer': '3'}])
  assert answers() == ['3']


def test_a_file_that_was_refused_can_be_mended(stored, tmp_path):
  path = tmp_path / 'test.jsonl'
  path.write_text('')
  with pytest.raises(ValueError, match='is empty'):
    stored('minerva_math', path)
  write(path, [{'question': '1+1?', 'answer': '2'}])
  assert len(stored('minerva_math', path)['test']) == 1


def test_merged_rows():
  located = [(f'row {i}', {'q': q, 'a': a}) for i, (q, a) in enumerate(
      [('one', '1'), ('two', '2'), (' one ', '1'), ('two', '3'), ('t\nwo', '4'), ('two', '2')])]
  task = lambda row: {'prompt': row['q'], 'answer': row['a']}
  found = published.read('made', located, {'q': str, 'a': str}, task, merged=True)
  assert [(t['prompt'], t['answer']) for t in found] == [('one', '1'), ('t\nwo', '4')]


@pytest.mark.parametrize('x, schema, found', [
    ({'a': 1}, {'a': int}, None), ({'a': 1, 'b': 2}, {'a': int}, None),
    ({'a': 1.0}, {'a': int | float}, None),
    ({'a': None}, {'a': str | None}, None), ({'a': ['x']}, {'a': [str]}, None),
    ({'a': {'b': 1}}, {'a': {'b': str}}, 'a.b is 1 (int), not str'),
    ({'a': ['x', 2]}, {'a': [str]}, 'a[1] is 2 (int), not str'),
    ({'a': []}, {'a': [str]}, 'a is [] (list), not a list of one or more'),
    ({'a': 'x'}, {'a': [str]}, "a is 'x' (str), not a list of one or more"),
    ({'a': None}, {'a': {'b': str}}, 'a is None (NoneType), not an object'),
    ({'a': True}, {'a': int | str}, 'a is True (bool), not int | str'),
    ({}, {'a': str}, 'a is missing; there are []')])
def test_misfit(x, schema, found):
  assert published.misfit(x, schema) == found


