"""WORKDIR/log.txt."""

import logging
import os
import re
import sys
import threading
import types
import warnings

from absl import logging as absl_logging
import pytest

from kr_jax import files
from kr_jax import progress
from kr_jax.record import log


def written(workdir, name='log.txt') -> list[str]:
  """The lines without their times, which each first line of a text has."""
  texts = (workdir / name).read_text().splitlines()
  assert all(re.match(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ |  ', text) for text in texts)
  return [text[21:] if text[0] != ' ' else text for text in texts]


def test_what_a_run_says(tmp_path, capsys, monkeypatch):
  """What is said before the run has the workdir waits; alarms, warnings of each kind, and plain progress."""
  with log.kept(str(tmp_path)) as kept:
    absl_logging.warning('early %d', 1)
    assert not os.listdir(tmp_path)
    kept.begin()
    with log.kept(str(tmp_path)) as same:
      same.begin()
    progress.say('avg@8 0.5 ± 0.1\nmore \x1b[31m\tü')
    progress.say('none was right', alarm=True)
    logging.getLogger('orbax').error('late')
    absl_logging.info('not this')
    with progress.Progress('knapsack', 0, 2) as bar:
      bar.update(2)
    shown = []
    monkeypatch.setattr(warnings, '_showwarnmsg_impl', shown.append)
    warnings.showwarning('the cache', UserWarning, 'x.py', 3)
    for name in ('jit_f', 'jit_g'):  # of a full disk
      warnings.showwarning(f"Error writing persistent compilation cache entry for '{name}'", UserWarning, 'x.py', 4)
    assert len(shown) == 2
  capsys.readouterr()
  absl_logging.warning('after')
  lines = written(tmp_path)
  assert lines[0].startswith(f'start: process 0 of 1, {os.getpid()} on ')
  assert lines[1:6] == [
      'WARNING early 1', 'avg@8 0.5 ± 0.1', '  more \\x1b[31m    ü', 'ALARM none was right', 'ERROR late']
  assert lines[6].startswith('knapsack: 2 of 2 steps') and lines[7] == 'WARNING UserWarning: the cache (x.py:3)'
  assert 'jit_f' in lines[8] and lines[9:] == ['end: done']


def test_a_run_that_is_refused_leaves_nothing(tmp_path):
  with pytest.raises(SystemExit), log.kept(str(tmp_path)):
    absl_logging.warning('x')
    raise SystemExit('error: another config')
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize('error, ends', [
    (SystemExit('stopped after 3 of 4 steps'), ['end: stopped: stopped after 3 of 4 steps']),
    (KeyboardInterrupt(), ['end: interrupted']),
    (files.Unsaved('the disk is full'), ['ERROR end: the disk is full']),
    (ValueError('ours'), ['ERROR end: Traceback (most recent call last):', '  ValueError: ours'])])
def test_how_a_run_ended(tmp_path, error, ends):
  for _ in range(2):  # what a start before wrote stays
    with pytest.raises(type(error)), log.kept(str(tmp_path)) as kept:
      kept.begin()
      raise error
  lines = written(tmp_path)
  assert [line for line in lines if line in ends] == 2 * ends and sum(x.startswith('start: ') for x in lines) == 2


def test_two_files_of_a_bounded_size(tmp_path, monkeypatch):
  monkeypatch.setattr(log, '_MOST', 1000)
  monkeypatch.setattr(log, '_LONGEST', 100)
  with log.kept(str(tmp_path)) as kept:
    kept.begin()
    for i in range(100):
      kept.add(f'{i} {"x" * 1000}')
  assert sorted(os.listdir(tmp_path)) == ['log.old.txt', 'log.txt']
  assert all((tmp_path / name).stat().st_size <= 1000 for name in os.listdir(tmp_path))
  assert written(tmp_path)[-1] == 'end: done' and 'characters are left out' in (tmp_path / 'log.txt').read_text()


def test_other_processes_write_where_they_warn(tmp_path, monkeypatch):
  monkeypatch.setattr(log, '_index', lambda: 1)
  for warns in (False, True):
    with log.kept(str(tmp_path)) as kept:
      kept.begin()
      kept.add('a step')
      assert not os.listdir(tmp_path)
      if warns:
        absl_logging.warning('slow')
  assert written(tmp_path, 'log.1.txt')[1:] == ['a step', 'WARNING slow', 'end: done']


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
  (tmp_path / 'log.txt').mkdir()
  for workdir in (tmp_path, tmp_path / 'none'):
    with log.kept(str(workdir)) as kept:
      kept.begin()
      kept.add('x')
  monkeypatch.setattr(log.os, 'write', lambda file, content: len(content) // 2)  # a disk that becomes full
  (tmp_path / 'new').mkdir()
  with log.kept(str(tmp_path / 'new')) as kept:
    kept.begin()
    monkeypatch.undo()
  assert (tmp_path / 'new' / 'log.txt').read_text().startswith('\n')  # what follows is a line of its own


def test_a_full_disk_is_logged_once_and_without_the_traces_of_threads(tmp_path, caplog):
  with log.kept(str(tmp_path)) as kept:
    kept.begin()
    for _ in range(3):
      try:
        raise OSError(28, 'No space left on device', str(tmp_path / 'x'))
      except OSError:
        absl_logging.exception('[process=0] a thread failed')
    try:
      raise ValueError('ours')
    except ValueError:
      absl_logging.exception('another failed')
  lines = written(tmp_path)
  assert len([x for x in lines if 'is full' in x]) == 1 and not any('a thread failed' in x for x in lines)
  assert 'ERROR another failed' in lines and '  ValueError: ours' in lines and len(caplog.records) == 2


def test_errors_that_nobody_catches_are_logged(tmp_path, monkeypatch):
  """In a thread, and in what a library calls back; but for the end of Orbax's threads once a full disk was said."""
  shown = []
  monkeypatch.setattr(threading, 'excepthook', shown.append)
  monkeypatch.setattr(sys, 'unraisablehook', shown.append)
  with log.kept(str(tmp_path)) as kept:
    kept.begin()
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    closed = types.SimpleNamespace(exc_value=RuntimeError('Event loop is closed'))
    sys.unraisablehook(closed)
    absl_logging.error('a thread failed', exc_info=OSError(28, 'No space left on device', str(tmp_path / 'x')))
    sys.unraisablehook(closed)
  text = (tmp_path / 'log.txt').read_text()
  assert 'ZeroDivisionError: division by zero' in text and text.count('Event loop is closed') == 1 and len(shown) == 2
  assert sys.unraisablehook.__self__ is shown
