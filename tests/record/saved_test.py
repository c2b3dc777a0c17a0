"""Which directories are checkpoints, which of them are kept, and what is moved out of the way."""

import json
import os

import pytest

from kr_jax import files
from kr_jax.record import saved


def made(directory, *names: str) -> str:
  """A directory with these files in it; a name that ends with a slash is a directory."""
  for name in names:
    path = directory / name
    (path if name.endswith('/') else path.parent).mkdir(parents=True, exist_ok=True)
    if not name.endswith('/'):
      path.write_text('held')
  return str(directory)


def test_which_directories_are_checkpoints(tmp_path):
  assert saved.steps(str(tmp_path / 'none')) == []
  strays = ('7/', '12', 'tmp/state/d', '8/notes.txt', '7.orbax-checkpoint-tmp-123/state/_METADATA', '05/state/d',
            '9.orbax-checkpoint-tmp/state/d', '3.damaged-1/state/d', '-4/state/d', '1e3/state/d', '٣/state/d',
            '6.removed/state/d', 'scores.json')
  directory = made(tmp_path, *strays)
  assert saved.steps(directory) == []
  made(tmp_path, '40/state/d', '0/_CHECKPOINT_METADATA', '5/stats/d')
  assert saved.steps(directory) == [0, 5, 40]
  assert saved.steps(str(tmp_path / '12')) == []


def test_which_are_kept():
  kept = lambda found, **how: sorted(saved.kept(found, **how))
  scores = {2: .5, 4: .9, 6: .1, 8: .5, 99: 1.0}
  assert kept([2, 4, 6, 8, 10], keep=1) == [10] and kept([2, 4], keep=3) == [2, 4] and kept([], keep=1) == []
  assert kept([2, 4, 6, 8, 10], keep=1, best=1, scores=scores) == [4, 10]
  assert kept([2, 4, 6, 8, 10], keep=2, best=2, scores=scores) == [4, 8, 10]  # of equal ones the later
  assert kept([2, 4, 6, 8], keep=1, best=3, scores=scores) == [2, 4, 8]
  assert kept([2, 4, 6], keep=1, best=5, scores={}) == [6]
  assert kept([2, 4, 6], keep=1, best=0, scores=scores) == [6]


def test_scores_come_back_and_a_broken_file_is_told_of(tmp_path, caplog):
  directory = str(tmp_path)
  assert saved.read_scores(directory) == {}
  saved.write_scores(directory, {4: .5, 2: .25})
  assert saved.read_scores(directory) == {2: .25, 4: .5} and not caplog.records
  for content in ('', '[1]', '{"a": 1}', '{"1": null}', '\xff', '[' * 100_000):
    (tmp_path / 'scores.json').write_bytes(content.encode('latin-1'))
    caplog.clear()
    assert saved.read_scores(directory) == {}
    assert f'{directory}/scores.json cannot be read' in caplog.text


def test_one_is_removed_and_one_moved_aside(tmp_path):
  directory = made(tmp_path, '3/state/d', '4/state/d', '5/state/d', '3.removed/state/half', '5.damaged-1/state/d')
  saved.remove(directory, 3)
  saved.remove(directory, 9)  # was removed by another
  assert saved.move_aside(directory, 5) == f'{directory}/5.damaged-2'
  assert sorted(os.listdir(directory)) == ['4', '5.damaged-1', '5.damaged-2'] and saved.steps(directory) == [4]


def test_a_removal_that_was_killed_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch):
  directory = made(tmp_path, '3/state/d', '4/state/d')
  with monkeypatch.context() as killed:
    killed.setattr(saved.shutil, 'rmtree', lambda *args, **how: None)
    saved.remove(directory, 3)
  assert saved.steps(directory) == [4]


def test_what_was_left_is_cleared_and_nothing_else(tmp_path):
  others = ('4/state/d', '7/', '8/notes.txt', '5.damaged-1/state/d', 'tmp/x', 'mine.orbax-checkpoint-tmp/x', 'config')
  left = ('3.removed/state/d', '9.orbax-checkpoint-tmp/state/d', '7.orbax-checkpoint-tmp-123/x')
  directory = made(tmp_path, *others, *left, '17.orbax-checkpoint-tmp/x')
  names = lambda some: {name.partition('/')[0] for name in some}
  saved.clear(directory, 17)
  assert set(os.listdir(directory)) == names(others + left)
  saved.clear(directory)
  assert set(os.listdir(directory)) == names(others)
  saved.clear(str(tmp_path / 'none'))


@pytest.mark.slow
def test_in_a_bucket(bucket):
  url = f'{bucket}/run/checkpoints'
  write = lambda *names: [files.write(f'{url}/{name}', 'held') for name in names]
  assert saved.steps(url) == []
  write('4/state/d', '4/commit_success.txt', '4/state/commit_success.txt', '5/commit_success.txt', '5/state/d',
        '6/state/d', '6/state/commit_success.txt', 'scores.json', 'x/state/d')  # 6 is not finished
  assert saved.steps(url) == [4, 5]
  assert saved.move_aside(url, 5) == f'{url}/5.damaged-1'
  write('5/commit_success.txt')
  assert saved.move_aside(url, 5) == f'{url}/5.damaged-2'
  saved.clear(url)
  saved.write_scores(url, {4: .5})
  assert saved.read_scores(url) == {4: .5} and json.loads(files.read(f'{url}/scores.json')) == {'4': .5}
  held = {name.partition('/')[0] for name in files.listed(url)}
  assert held == {'4', '5.damaged-1', '5.damaged-2', 'scores.json', 'x'}
  saved.remove(url, 4)
  assert saved.steps(url) == [] and not files.listed(f'{url}/4')
