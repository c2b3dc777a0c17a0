"""Files of published problem sets: what is wrong with one is said with its row, before anything is stored."""

import dataclasses
import gzip
import json
import re

from etils import epath
import pyarrow
from pyarrow import parquet
import pytest

from kr_jax import tasks
from kr_jax.datasets import published
from tests.make_datasets import DIRECTORY, FILES, write

ROW = {'q': 'one?', 'a': '1', 'level': 3}
MADE = published.ProblemSet(
    'made', about='Made up.', where='made.jsonl of nobody', schema={'q': str, 'a': str, 'level': int},
    task=lambda row: {'prompt': row['q'], 'answer': row['a'], 'difficulty': row['level']})


def read(path, problem_set=MADE):
  return published.read(problem_set, published.rows([epath.Path(path)]))


def refused(path, message, problem_set=MADE):
  """Asserts that a file is refused with a message, which begins with its path; returns the whole message."""
  with pytest.raises(ValueError, match=f'(?s)^{re.escape(str(path))}{message}') as error:
    read(path, problem_set)
  return str(error.value)


@pytest.mark.parametrize('ending', [ending[1:] for ending in published.ENDINGS])
def test_every_format_holds_the_same_rows(ending, tmp_path):
  rows = [{'q': 'one,\n "é"?', 'a': '1'}, {'q': 'two?', 'a': '2'}]
  path = write(tmp_path / f'a.{ending}', rows)
  assert list(published.rows([epath.Path(path)])) == [
      (f'{path}, row 1', rows[0]), (f'{path}, row 2', rows[1])]
  if ending in ('csv', 'json', 'jsonl'):  # a byte order mark is no part of a field
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    assert [row for _, row in published.rows([epath.Path(path)])] == rows


def test_tasks_of_rows(tmp_path):
  path = write(tmp_path / 'a.jsonl', [ROW, {'q': ' two? ', 'a': ' 2\n', 'level': 0, 'more': None}])
  assert read(path) == [
      {'id': 'made/4294091930f0de05', 'prompt': 'one?', 'answer': '1', 'difficulty': 3},
      {'id': 'made/7561cce63ef3bf1e', 'prompt': 'two?', 'answer': '2', 'difficulty': 0}]


@pytest.mark.parametrize('changed, message', [
    ({'a': ...}, r"a is missing; there are \['level', 'q'\]"),
    ({'level': '3'}, r"level is '3' \(str\), not int"),
    ({'level': True}, r'level is True \(bool\), not int'),
    ({'a': None}, r'a is None \(NoneType\), not str'),
    ({'q': '\n '}, 'the prompt is empty'), ({'a': ''}, 'the answer is empty'),
    ({'q': 'one?'}, r'its id .*, of its problem unless it has its own, is that of .*a.jsonl, row 1; ids')])
def test_rows_that_are_no_tasks(changed, message, tmp_path):
  row = {name: x for name, x in (ROW | {'q': 'two?'} | changed).items() if x is not ...}
  refused(write(tmp_path / 'a.jsonl', [ROW, row]), f', row 2: {message}')


def test_a_long_value_is_shortened(tmp_path):
  assert len(refused(write(tmp_path / 'a.jsonl', [ROW | {'level': 'x' * 10_000}]), ', row 1: level is ')) < 300


@pytest.mark.parametrize('ending', ['jsonl', 'parquet', 'csv'])
def test_an_empty_file(ending, tmp_path):
  path = tmp_path / f'a.{ending}'
  if ending == 'parquet':
    parquet.write_table(pyarrow.table({'q': pyarrow.array([], pyarrow.string())}), path)
  else:
    path.write_text('q,a\n' if ending == 'csv' else '\n')
  refused(path, ' is empty: it has no row; download it again')


def test_lines_that_are_no_json(tmp_path):
  path = tmp_path / 'a.jsonl'
  for line, message in ((b'{"q": ', 'not JSON'), (b'[' * 100_000, 'not JSON'), (b'"caf\xe9"', 'not UTF-8'),
                        (b'[1]', r'it is \[1\] \(list\), not an object')):
    path.write_bytes(b'\n' + line + b'\n')  # rows are numbered as lines
    refused(path, f', row 2: {message}')


def test_a_list_that_is_none(tmp_path):
  path = tmp_path / 'a.json'
  for data, message in ((b'{"q": 1}', r" is {'q': 1} \(dict\), not a list of rows"), (b'[1', ': not JSON'),
                        (b'["caf\xe9"]', ': not UTF-8'), (b'[]', ' is empty')):
    path.write_bytes(data)
    refused(path, message)


def test_gzip_that_cannot_be_read(tmp_path):
  path = write(tmp_path / 'a.jsonl.gz', [ROW | {'q': f'{i}?'} for i in range(100)])
  for data in (path.read_bytes()[:-20], b'{"q": 1}\n'):
    path.write_bytes(data)
    refused(path, ' is not gzip: ')


def test_a_task_needs_an_answer_or_info(tmp_path):
  path = write(tmp_path / 'a.jsonl', [ROW | {'a': ' '}])
  refused(path, ', row 1: the answer is empty')
  tested = dataclasses.replace(MADE, task=lambda row: {'prompt': row['q'], 'answer': row['a'], 'info': '{}'})
  assert [task['answer'] for task in read(path, tested)] == ['']


def test_parquet_that_cannot_be_read(tmp_path):
  count = 5000  # of two batches: the fault is in the second
  path = tmp_path / 'a.parquet'
  data = pyarrow.array([b'problem %d' % i for i in range(count - 1)] + [b'caf\xe9'])
  parquet.write_table(pyarrow.table({'q': data.view(pyarrow.string())}), path)
  with pytest.raises(ValueError, match=f'{re.escape(str(path))}, row {count}: not UTF-8'):
    list(published.rows([epath.Path(path)]))
  path.write_bytes(b'not a table')
  refused(path, ' is not Parquet, or broken after row 0: ')


def test_csv_that_cannot_be_read(tmp_path):
  path = write(tmp_path / 'a.csv', [{'q': f'{name},\nof "these"?', 'a': name} for name in ('one', 'two', 'six')])
  words = published.ProblemSet('words', about='', where='', schema={'q': str, 'a': str}, task=MADE.task)
  whole = path.read_bytes()
  for data, message in (
      (whole.replace(b'six,', b's\xefx,'), ', row 3: not UTF-8'),  # fields before have line breaks
      (whole.replace(b'"two,', b'"tw\xf6,'), ', row 2: not UTF-8'),
      (b'\xef\xbb\xbf' + whole.replace(b'six,', b's\xefx,'), ', row 3: not UTF-8'),  # with the mark of a spreadsheet
      (b'\xef\xbb\xbfq\xff', ', row 0: not UTF-8'),  # whose place, less the mark's three bytes, is within the mark
      (whole + b'"ten?\r\n', ', row 4: not CSV')):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f'{path}{message}')):
      list(published.rows([epath.Path(path)]))
  path.write_bytes(whole.splitlines()[0] + b'\r\nten?\r\n')
  refused(path, r', row 1: a is None \(NoneType\), not str', words)


def test_an_unknown_ending(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('{}')
  refused(path, r" ends in none of \['.csv', '.csv.gz', '.json', '.json.gz', .*, '.parquet'\]; name it by its format")


def test_merged_rows(caplog):
  located = [(f'row {i}', {'q': q, 'a': a, 'level': 0}) for i, (q, a) in enumerate(
      [('one', '1'), ('two', '2'), (' one ', '1'), ('two', '3'), ('t\nwo', '4'), ('two', '2')])]
  merged = published.ProblemSet('made', about='', where='', schema=MADE.schema, task=MADE.task, merged=True)
  assert [(t['prompt'], t['answer']) for t in published.read(merged, located)] == [('one', '1'), ('t\nwo', '4')]
  assert ("made: 1 of 3 problems have different answers in different rows and are left out: row 3 has '3', row 1 '2'"
          in caplog.text)


@pytest.mark.parametrize('one, two, are_one', [
    ('7', '07', True), ('7', '7.0', True), ('1,000', '1000', True), ('1{,}000', '$1000$', True), ('-0', '0', True),
    ('x + 1', ' x  + 1', True), ('7', '-7', False), ('7', '70', False), ('0.5', '.50', False), ('1,0', '10', False)])
def test_whole_numbers_conflict_by_value_only(one, two, are_one):
  """The first row's answer stays as it is."""
  merged = dataclasses.replace(MADE, merged=True)
  located = [(f'row {i}', {'q': 'one', 'a': a, 'level': 0}) for i, a in enumerate((one, two))]
  assert [task['answer'] for task in published.read(merged, located)] == ([one] if are_one else [])


def test_misfit():
  for x, schema, found in (
      ({'a': 1, 'b': 2}, {'a': int}, None), ({'a': 1.0}, {'a': int | float}, None),
      ({'a': None}, {'a': str | None}, None), ({'a': ['x']}, {'a': [str]}, None),
      ({'a': {'b': 1}}, {'a': {'b': str}}, 'a.b is 1 (int), not str'),
      ({'a': ['x', 2]}, {'a': [str]}, 'a[1] is 2 (int), not str'),
      ({'a': []}, {'a': [str]}, 'a is [] (list), not a list of one or more'),
      ({'a': 'x'}, {'a': [str]}, "a is 'x' (str), not a list of one or more"),
      ({'a': None}, {'a': {'b': str}}, 'a is None (NoneType), not an object'),
      ({'a': [{}]}, {'a': [{'b': str}]}, 'a[0].b is missing; there are []'),
      ({'a': True}, {'a': int | str}, 'a is True (bool), not int | str')):
    assert published.misfit(x, schema) == found


def test_paths(tmp_path):
  with pytest.raises(ValueError, match=r"dataset 'made' is fetched .*pip install 'kr_jax\[hub\]'. Or download made.jsonl "
                                       'of nobody, and point to it with --config.tasks.files.made=PATH'):
    published.files(MADE, '')
  for path in (tmp_path / 'none.jsonl', tmp_path / 'no' / '*.jsonl', tmp_path):
    with pytest.raises(ValueError, match=f"tasks.files.made='{re.escape(str(path))}' names no file; point to made"):
      published.files(MADE, str(path))
  for name in 'ba':
    write(tmp_path / f'{name}.jsonl', [ROW])
  found = published.files(MADE, str(tmp_path / '*.jsonl'))
  assert [path.name for path in found.paths] == ['a.jsonl', 'b.jsonl']
  assert re.fullmatch('made-[0-9a-f]{16}', found.name) and str(found.version) == '1.0.0'


def test_other_files_give_other_data_and_a_refused_one_stores_nothing(stored, tmp_path):
  path = tmp_path / 'test.jsonl'
  answers = lambda: [task['answer'] for task in stored('minerva_math', path)['test'].values()]
  path.write_text('{"question": "1+1?"}\n')
  with pytest.raises(ValueError, match=f'^{re.escape(str(path))}, row 1: answer is missing'):
    answers()
  assert not [p for p in (tmp_path / 'stored').rglob('*') if p.is_file()]
  for answer in '23':
    write(path, [{'question': '1+1?', 'answer': answer}])
    assert answers() == [answer]


def test_what_is_stored_can_be_read_without_the_rows(tmp_path, monkeypatch):
  """A second run does not check the rows again."""
  read = lambda: tasks.read('minerva_math', 'test', Bytes(), data_dir=str(tmp_path),
                            files={'minerva_math': str(DIRECTORY / 'minerva_math' / '*')})
  first = read()
  monkeypatch.setattr(published, 'rows', None)
  assert read() == first and {task.source for task in first} == {'minerva_math'}


class Bytes:
  """A tokenizer of any text."""

  def prompt(self, text):
    return tuple(text.encode())


def test_the_fixtures_are_what_their_script_writes(tmp_path):
  rows = lambda path: [row for _, row in published.rows([epath.Path(path)])]
  for name, written in FILES.items():
    assert rows(write(tmp_path / name, written)) == rows(DIRECTORY / name)
    assert name.endswith('.csv') or rows(DIRECTORY / name) == json.loads(json.dumps(written))


@pytest.mark.parametrize('text, said', [
    ('q,a,q\none?,1,2\n', ": its header names the column 'q' twice; leave one of them"),
    ('q,a\none?,1,2\n', r", row 1: it has more fields than the header: \['2'\] \(list\); quote a field"),
    (f'q,a\n{"x" * 200_000},1\n', ', row 1: not CSV .field larger than field limit')])
def test_csv_that_says_two_things(tmp_path, text, said):
  (tmp_path / 'a.csv').write_text(text)
  refused(tmp_path / 'a.csv', said)


def test_json_that_says_two_things(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"q": "one?", "a": "1", "a": "2"}')
  refused(tmp_path / 'a.jsonl', ", row 1: not JSON .it names 'a' twice")
  (tmp_path / 'a.json').write_text('[{"q": {"x": 1, "x": 1}}]')
  refused(tmp_path / 'a.json', ": not JSON .it names 'x' twice")
  (tmp_path / 'a.jsonl').write_text('{"q": ' + '[' * 10 ** 6)
  refused(tmp_path / 'a.jsonl', ', row 1: not JSON')
  (tmp_path / 'a.jsonl').write_text('{"q": "one?", "a": 1' + '0' * 5000 + '}')
  refused(tmp_path / 'a.jsonl', ', row 1: not JSON .Exceeds the limit')


def test_files_that_are_too_large(tmp_path, monkeypatch):
  """Whatever they unpack to: it is not read to its end."""
  monkeypatch.setattr(published, '_MOST_ROW', 1000)
  monkeypatch.setattr(published, '_MOST_AT_ONCE', 1000)
  monkeypatch.setattr(published, '_MOST_UNPACKED', 50_000)
  row = b'{"q": "one?", "a": "1", "level": 3}'
  for name, data, said in (
      ('a.jsonl', row + b' ' * 1000, ', row 1: it has more than 1000 bytes, the limit of a row'),
      ('b.jsonl.gz', gzip.compress(row + b'\n' + b' ' * 10 ** 6), ', row 2: it has more than 1000 bytes'),
      ('c.jsonl.gz', gzip.compress(row + b'\n' * 10 ** 6), ' unpacks to more than 100 times its size and 50000 bytes'),
      ('d.json', b'[' + row + b' ' * 1000, ' has more than 1000 bytes, the limit of a file that is read at once'),
      ('e.csv.gz', gzip.compress(b'q,a\n' + b'\n' * 1000), ' has more than 1000 bytes')):
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, said)
  (tmp_path / 'f.jsonl').write_bytes(row + b'\n' * 10 ** 5)  # of a file that is not packed, its own size is the limit
  assert len(read(tmp_path / 'f.jsonl')) == 1


def test_a_parquet_file_is_read_by_another_process_first(tmp_path, monkeypatch):
  path = write(tmp_path / 'a.parquet', [ROW])

  def check(path):
    raise ValueError(f'{path} cannot be read within limits')

  monkeypatch.setattr(published.parquet_file, 'check', check)
  refused(path, ' cannot be read within limits')
