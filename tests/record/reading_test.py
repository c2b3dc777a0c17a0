"""What reading a checkpoint comes to: as saved, damaged, of another config; in all processes the same."""

import gc
import json
import sys

import jax
import numpy as np
import pytest

from kr_jax import processes
from kr_jax.record import checksums
from kr_jax.record import reading

STATE = {'params': {'w': np.arange(6.0)}, 'step': np.int32(7)}
STATS = {'rollouts_I': np.arange(5), 'other_I': np.ones(5)}


@pytest.fixture
def path(tmp_path):
  """What of a checkpoint of step 7 says what it holds."""
  sums = {'state': checksums.of(STATE), 'stats': checksums.of(STATS)}
  (tmp_path / '7' / reading.CHECKSUMS).mkdir(parents=True)
  (tmp_path / '7' / reading.CHECKSUMS / 'metadata').write_text(json.dumps(checksums.item(7, **sums)))
  (tmp_path / '7' / '_CHECKPOINT_METADATA').write_text('{"item_handlers": {"checksums": "x", "state": "y"}}')
  return tmp_path / '7'


def expected(path, *, step=7, state=STATE, stats=STATS, **how):
  wanted = {'state': checksums.shapes(state), 'stats': checksums.shapes(stats)}
  return reading.expected(str(path), step, {name: tree for name, tree in wanted.items() if tree}, **how)


def test_what_is_to_be_there(path):
  assert expected(path) == {'state': checksums.of(STATE), 'stats': checksums.of(STATS)}
  part = {'params': STATE['params']}
  assert expected(path, state=part, stats={}, is_part=True) == expected(path)
  with pytest.raises(reading.Other, match=r'^step is int32\(\) in it, and not by the config$'):
    expected(path, state=part)


@pytest.mark.parametrize('state, stats, why', [
    (STATE | {'params': {'w': np.arange(7.0)}}, STATS, r'params/w is float64\(6,\) in it, and float64\(7,\) by the '
     'config'),
    (STATE | {'params': {'w': np.arange(6)}}, STATS, r'params/w is float64\(6,\) in it, and int64\(6,\) by the config'),
    (STATE | {'params': {'u': np.arange(6.0)}}, STATS, r'params/w is float64\(6,\) in it, and not by the config'),
    (STATE | {'more': np.ones(1)}, STATS, r'more is not in it, and float64\(1,\) by the config'),
    (STATE, {'rollouts_I': np.arange(6), 'other_I': np.ones(6)}, 'it holds statistics of 5 tasks, and .* split has 6'),
    (STATE, {'rollouts_I': np.arange(5)}, r'other_I is float64\(5,\) in it, and not by the config')])
def test_another_config_is_no_damage(path, state, stats, why):
  with pytest.raises(reading.Other, match=f'^{why}$'):
    expected(path, state=state, stats=stats)
  with pytest.raises(ValueError, match=f'^the checkpoint x is not of this config: {why}; give the config of'):
    reading.agreed('x', lambda: expected(path, state=state, stats=stats))


def test_a_checkpoint_of_another_step_or_without_its_list(path, caplog):
  with pytest.raises(checksums.Damaged, match='it is the checkpoint of step 7'):
    expected(path, step=9)
  item = path / reading.CHECKSUMS / 'metadata'
  item.unlink()
  with pytest.raises(checksums.Damaged, match='its checksums are gone'):
    expected(path)
  assert not caplog.records
  (path / '_CHECKPOINT_METADATA').write_text('{"item_handlers": {"state": "y"}}')
  assert expected(path) is None
  assert caplog.messages == [f'{path} holds no checksums: it is of an older version, and is taken as it is']


def test_what_was_read_is_verified():
  trees = {'state': checksums.of(STATE), 'stats': checksums.of(STATS)}
  reading.verify(trees, trees)
  reading.verify(trees, {'state': {'params/w': trees['state']['params/w']}})
  reading.verify(None, trees)
  other = trees | {'stats': checksums.of(STATS | {'other_I': np.zeros(5)})}
  with pytest.raises(checksums.Damaged, match='^other_I is not as saved'):
    reading.verify(trees, other)
  reading.verify(None, other)
  bad = {'state': checksums.of(STATE | {'params': {'w': np.full(6, np.nan)}, 'moments': np.full(2, np.inf)})}
  for saved in (None, bad):
    with pytest.raises(checksums.Damaged, match='^params/w holds values that are infinite or no numbers'):
      reading.verify(saved, bad)


def raised(error):
  raise error


def test_of_many_kinds_of_errors_a_checkpoint_is_damaged():
  assert reading.agreed('x', lambda: 7) == (7, '')
  for error, why in ((checksums.Damaged('a is gone'), 'a is gone'),
                     (ValueError('DATA_LOSS:\n  bad  crc'), 'ValueError: DATA_LOSS: bad crc'),
                     (RecursionError('x' * 999), f'RecursionError: {"x" * 221}...')):
    assert reading.agreed('x', lambda: raised(error)) == (None, why)


@pytest.mark.parametrize('error', [
    processes.Stopped('told'), MemoryError(), PermissionError(13, 'Permission denied'),
    jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory'), KeyboardInterrupt()])
def test_what_is_no_fault_of_the_checkpoint_is_an_error_of_its_own(error):
  with pytest.raises(type(error)):
    reading.agreed('x', lambda: raised(error))


def test_a_bucket_that_does_not_answer_is_no_damage():
  with pytest.raises(ValueError, match='^the checkpoint x cannot be read: ValueError: UNAVAILABLE: no answer$'):
    reading.agreed('x', lambda: raised(ValueError('UNAVAILABLE: no answer')))


def test_all_processes_agree(monkeypatch):
  """Of process 1 the outcome stands here."""
  for theirs, found in ((0, (7, '')), (1, (None, 'process 1 cannot read it'))):
    monkeypatch.setattr(processes, 'gather', lambda mine: np.array([mine, theirs]))
    assert reading.agreed('x', lambda: 7) == found
    assert reading.agreed('x', lambda: raised(KeyError('w'))) == (None, "KeyError: 'w'")
  monkeypatch.setattr(processes, 'gather', lambda mine: np.array([mine, 2]))
  with pytest.raises(ValueError, match='not of this config: process 1 cannot read it'):
    reading.agreed('x', lambda: 7)


def test_what_becomes_of_other_reads_is_kept_off_the_terminal(capfd):
  class Read:
    def __del__(self):
      raise RuntimeError('Event loop is closed')

  def part():
    reads = Read()
    reads.self = reads  # until garbage is collected
    raise ValueError('DATA_LOSS')

  gc.collect()
  before = sys.unraisablehook
  assert reading.agreed('x', part)[1] == 'ValueError: DATA_LOSS'
  assert sys.unraisablehook is before and capfd.readouterr() == ('', '')
