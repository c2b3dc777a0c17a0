"""Parquet files that take more than they should."""

import os
import subprocess

import pyarrow
from pyarrow import parquet
import pytest

from kr_jax.datasets import parquet_file


def bomb(path, rows=3000, characters=2 ** 21):
  """A file of a kB whose rows all name one long text."""
  names = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), ['x' * characters])
  parquet.write_table(pyarrow.table({'problem': names}), path, compression='zstd')
  return str(path)


def test_rows_of_one_long_text(tmp_path, capsys):
  path = bomb(tmp_path / 'a.parquet')
  assert os.path.getsize(path) < 2000
  assert parquet_file.read_within(path) == 1
  assert capsys.readouterr().out.startswith('1024 of its rows have 21495')


def test_a_usual_file_and_what_is_none(tmp_path):
  path = tmp_path / 'a.parquet'
  parquet.write_table(pyarrow.table({'a': ['x', None], 'b': [[1], []]}), path)
  assert parquet_file.read_within(str(path)) == 0
  path.write_bytes(b'not a table')
  assert parquet_file.read_within(str(path)) == 0  # the reader says it


@pytest.mark.slow
def test_another_process_reads_it_first(tmp_path):
  path = tmp_path / 'a.parquet'
  parquet.write_table(pyarrow.table({'a': ['x']}), path)
  parquet_file.check(path)
  with pytest.raises(ValueError, match='a.parquet cannot be read within limits: 1024 of its rows have 2.* bytes'):
    parquet_file.check(bomb(path))


@pytest.mark.parametrize('code, said', [(-24, 'it takes more than 60 s to read'), (-11, 'its reader ended with -11')])
def test_a_reader_that_ends(monkeypatch, tmp_path, code, said):
  (tmp_path / 'a.parquet').write_bytes(b'')
  monkeypatch.setattr(subprocess, 'run', lambda *args, **options: subprocess.CompletedProcess(args, code, b'', b''))
  with pytest.raises(ValueError, match=f'a.parquet cannot be read within limits: {said}'):
    parquet_file.check(tmp_path / 'a.parquet')
