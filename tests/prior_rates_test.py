"""Rates that are known before training, from each kind of file, and what is wrong with others."""

import csv
import json
import logging
import reprlib

import numpy as np
import pyarrow
from pyarrow import parquet
import pytest

from kr_jax import prior_rates
from kr_jax import types


def task(id, source='sums', difficulty=0):
  return types.Task(id=id, index=0, prompt='', answer='', difficulty=difficulty, solution='', tokens=(), source=source)


TASKS = [task(f'sums/{name}') for name in ('one', 'two', 'three', '4')]
RATES = {'sums/two': 0.25, 'sums/4': 1, 'elsewhere': 0.5, 'sums/one': 0.0, 'sums/three': None}
WANT_I = [0.0, 0.25, np.nan, 1.0]
ROWS = [{'id': name, 'other': 'x', 'rate': rate} for name, rate in RATES.items()]


def write(path, rows):
  if path.suffix == '.jsonl':
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  elif path.suffix == '.json':
    path.write_text(json.dumps(rows))
  elif path.suffix == '.csv':
    with open(path, 'w', newline='') as file:
      writer = csv.DictWriter(file, list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)
  else:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  return path


def test_an_object_of_rates(tmp_path, caplog):
  path = write(tmp_path / 'rates.json', RATES)
  with caplog.at_level(logging.INFO, 'absl'):
    found = prior_rates.read(str(path), TASKS)
  np.testing.assert_array_equal(found, WANT_I)
  assert found.dtype == np.float64 and 'known of 3 of 4 tasks; their mean is 0.417' in caplog.text


@pytest.mark.parametrize('name', ['rates.jsonl', 'rates.csv', 'rates.parquet', 'rows.json', 'a:b.jsonl'])
def test_a_column_of_rates(tmp_path, name):
  """A rate that is null, or empty, is not known."""
  path = write(tmp_path / name, ROWS)
  np.testing.assert_array_equal(prior_rates.read(f'{path}:rate', TASKS), WANT_I)


def test_ids_may_be_numbers(tmp_path):
  path = write(tmp_path / 'rates.jsonl', [{'id': 17, 'rate': 0.5}])
  np.testing.assert_array_equal(prior_rates.read(f'{path}:rate', [task('17'), task('18')]), [0.5, np.nan])


def test_no_file_has_no_rates():
  found = prior_rates.read('', TASKS)
  assert found.shape == (4,) and np.isnan(found).all()


@pytest.mark.parametrize('rate', [
    1.5, -0.1, float('nan'), float('inf'), True, 'half', '0_1', 10 ** 400, [0.5]])
def test_a_rate_that_is_none_is_refused_by_id_and_value(tmp_path, rate):
  path = write(tmp_path / 'rates.json', RATES | {'sums/one': rate})
  with pytest.raises(ValueError, match=r"rates.json, entry 4: the rate of 'sums/one' is .* in \[0, 1\]; give") as error:
    prior_rates.read(str(path), TASKS)
  assert reprlib.repr(rate) in str(error.value)


def test_a_rate_of_a_row_is_refused_by_its_row(tmp_path):
  rows = [*ROWS[:2], {'id': 'sums/one', 'other': '', 'rate': 62.5}]
  for name in ('rates.jsonl', 'rates.csv'):
    path = write(tmp_path / name, rows)
    with pytest.raises(ValueError, match=rf"{name}, row 3: the rate of 'sums/one' is .*62\.5.*share of rollouts"):
      prior_rates.read(f'{path}:rate', TASKS)


def test_an_id_that_is_there_twice_is_refused(tmp_path):
  path = write(tmp_path / 'rates.jsonl', [*ROWS, ROWS[0]])
  with pytest.raises(ValueError, match="rates.jsonl, row 6: the id 'sums/two' is there a second time"):
    prior_rates.read(f'{path}:rate', TASKS)
  path = tmp_path / 'rates.json'
  path.write_text('{"sums/one": 0.5, "sums/one": 0.25}')
  with pytest.raises(ValueError, match="rates.json, entry 2: the id 'sums/one' is there a second time"):
    prior_rates.read(str(path), TASKS)


def test_a_file_of_other_tasks_is_refused_with_the_nearest_id(tmp_path):
  path = write(tmp_path / 'rates.json', {'sum/one': 0.5, 'b': 0.25})
  with pytest.raises(ValueError, match="none of the 4 tasks .* no id 'sums/one'; did you mean 'sum/one'.* has 2 ids"):
    prior_rates.read(str(path), TASKS)
  path = write(tmp_path / 'empty.json', {})
  with pytest.raises(ValueError, match='none of the 4 tasks .* it has 0 ids'):
    prior_rates.read(str(path), TASKS)
  path = write(tmp_path / 'null.jsonl', [{'id': 'sums/one', 'rate': None}])
  with pytest.raises(ValueError, match='none of the 4 tasks'):
    prior_rates.read(f'{path}:rate', TASKS)


@pytest.mark.parametrize('name, text, column, message', [
    ('no.json', None, '', r"there is no file '.*no.json'; give 'FILE.json' of id -> rate, or"),
    ('no.csv', None, ':rate', "there is no file '.*no.csv'"),
    ('a.jsonl', '{}', '', 'names no column'), ('a.json', '[{"id": "a"}]', '', "name the column: '.*a.json:COLUMN'"),
    ('a.json', '{"a": 1', '', 'a.json is not JSON in UTF-8'), ('a.json', '3', '', 'is no object'),
    ('a.json', '{"id": 1}', ':rate', 'not a list of rows'),
    ('a.jsonl', '{"id": "a", "rates": 0.5}\n', ':rate', "row 1 has no column 'rate'; did you mean 'rates'"),
    ('a.csv', 'name,rate\na,0.5\n', ':rate', "row 1 has no column 'id'"),
    ('a.jsonl', '{"id": "a", "rate": 0.5}\n{"rate": 0.5}\n', ':rate', 'row 2 has no id'),
    ('a.jsonl', '{"id": ["a"], "rate": 0.5}\n', ':rate', r"row 1 has the id \['a'\], neither a text nor a number"),
    ('a.json', '{"a": ' + '[' * 10 ** 5, '', 'a.json is not JSON'),
    ('a.jsonl', '{"id": "a", "id": "b", "rate": 1}\n', ':rate', "row 1: not JSON .it names 'id' twice"),
    ('a.jsonl', '[1]\n', ':rate', r'row 1 is \[1\], not an object'),
    ('a.jsonl', '', ':rate', 'is empty'), ('a.txt', 'x', ':rate', 'ends in none of')])
def test_what_is_no_file_of_rates_is_refused(tmp_path, name, text, column, message):
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=message):
    prior_rates.read(f'{tmp_path / name}{column}', TASKS)


def test_strata_of_large_cells_and_of_what_is_left_of_a_dataset():
  """Of b, difficulties 1 and 3 have a task each: they are together. The order of tasks changes nothing."""
  tasks = [task('1', 'b', 2), task('2', 'a', 5), task('3', 'b', 1), task('4', 'b', 2), task('5', 'a', 5),
           task('6', 'b', 3), task('7', 'c', 2)]
  found = prior_rates.strata(tasks, 2)
  np.testing.assert_array_equal(found, [2, 0, 1, 2, 0, 1, 3])
  assert found.dtype == np.int32
  np.testing.assert_array_equal(prior_rates.strata(tasks[::-1], 2), found[::-1])


def test_strata_are_datasets_where_no_cell_is_large_and_cells_where_all_are():
  tasks = [task('1', 'b', 2), task('2', 'a', 5), task('3', 'b', 1)]
  np.testing.assert_array_equal(prior_rates.strata(tasks, 9), [1, 0, 1])
  np.testing.assert_array_equal(prior_rates.strata(tasks, 1), [2, 0, 1])
  assert prior_rates.strata([], 1).shape == (0,)


def test_an_object_that_is_too_large(tmp_path, monkeypatch):
  path = write(tmp_path / 'rates.json', RATES)
  monkeypatch.setattr(prior_rates, '_MOST_BYTES', 10)
  with pytest.raises(ValueError, match=r'rates.json has \d+ bytes, above the limit of 10 for an object of id -> rat'):
    prior_rates.read(str(path), TASKS)
