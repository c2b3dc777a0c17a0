"""The record of a run."""

import json
import math
import os

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from kr_jax import files
from kr_jax import processes
from kr_jax.costs import hardware
from kr_jax.record import metrics

RECORDS = [{'step': 0, 'eval': 0.25}, {'step': 0, 'loss': 1.5, 'budgets': [2, None, 4.5]},
           {'step': 1, 'loss': -0.5, 'budgets': []}, {'step': 2, 'loss': 0.125, 'budgets': [1]}]


def write(directory, records, *, keep=lambda record: True, first_step=0) -> list:
  """Writes records; returns what the writer held before."""
  with metrics.Writer(str(directory), keep=keep, first_step=first_step) as writer:
    before = list(writer.records)
    for record in records:
      writer.write(record)
  return before


def read(directory) -> list:
  return metrics.read(str(directory / 'metrics.jsonl'))


def events(directory) -> bytes:
  return b''.join(path.read_bytes() for path in sorted(directory.glob('events.out.tfevents.*')))


def test_round_trip(tmp_path):
  directory = tmp_path / 'new' / 'run'
  assert write(directory, RECORDS) == []
  assert read(directory) == RECORDS
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == RECORDS
  assert sorted(path.name.partition('.')[0] for path in directory.iterdir()) == [
      'events', 'metrics']


@settings(deadline=None, max_examples=20)
@given(st.floats(allow_nan=False), st.integers(-2**63, 2**63 - 1))
def test_numbers_come_back_bit_for_bit(tmp_path_factory, x, n):
  directory = tmp_path_factory.mktemp('run')
  write(directory, [{'step': 3, 'n': n, 'xs': [x]}])
  record, = read(directory)
  assert (record['n'], record['xs'], math.copysign(1, record['xs'][0])) == (
      n, [x], math.copysign(1, x))


def test_a_record_can_be_read_as_soon_as_it_is_written(tmp_path):
  with metrics.Writer(str(tmp_path), keep=lambda record: True, first_step=0) as writer:
    for i, record in enumerate(RECORDS, start=1):
      writer.write(record)
      assert read(tmp_path) == RECORDS[:i]
    assert writer.records == []  # memory does not grow with the steps


def test_no_file_is_no_record(tmp_path):
  assert metrics.read(str(tmp_path / 'metrics.jsonl')) == []


@pytest.mark.parametrize('cut', [1, 5, 20])
def test_a_last_line_cut_short_is_dropped(tmp_path, cut):
  write(tmp_path, RECORDS)
  path = tmp_path / 'metrics.jsonl'
  os.truncate(path, path.stat().st_size - cut)
  assert read(tmp_path) == RECORDS[:-1]
  assert write(tmp_path, RECORDS[-1:]) == RECORDS[:-1]
  assert read(tmp_path) == RECORDS


STEP = {'step': 1, 'wall_s': 2.5, 'reward_mean': 0.5, 'verification': {}, 'reliability': [[1, 0.5, 1, 1, 0]]}
EVALUATION = {'step': 1, 'wall_s': 1.5, 'eval/avg@8': 0.25, 'eval_tasks': {'right': [1], 'verified': [8]}}


@pytest.mark.parametrize('damage, repeated', [
    (b'garbage', 0), (b'\0\0\0', 0), (b'{"step": 1, "x": "\xff\xfe"}', 0), (b'[{"step": 1}]', 0), (b'', 0),
    (b'{"loss": 1}', 0), (b'{"step": "1"}', 0), (b'{"step": 1.5}', 0), (b'{"step": true}', 0),
    (b'{"step": -1}', 0), (b'{"step": null}', 0),
    (b'{"step": 1, "wall_s": NaN}', 0), (b'{"step": 1, "wall_s": "2"}', 0), (b'{"step": 1, "verification": [1]}', 0),
    (b'{"step": 1, "verification": {"math": {"right": 1}}}', 0), (b'{"step": 1, "reliability": [[1, 2]]}', 0),
    (b'{"step": 1, "eval/avg@8": 1, "eval_tasks": {"right": [1]}}', 0), (b'{"step": ' + b'9' * 5000 + b'}', 0),
    (json.dumps(STEP | {'reward_mean': 0.75}).encode(), 1), (json.dumps(EVALUATION | {'wall_s': 9}).encode(), 1)])
def test_a_damaged_record_is_repaired(tmp_path, caplog, damage, repeated):
  """What can be read is kept, of a step that is there twice the last; the damaged file stays beside, and is named."""
  path, after = tmp_path / 'metrics.jsonl', {'step': 2, 'wall_s': 4.0, 'reward_mean': 1.0}
  content = b'\n'.join([damage, *(json.dumps(x).encode() for x in (EVALUATION, STEP, after)), b'{"step": 3, "wal'])
  path.write_bytes(content)
  assert write(tmp_path, [RECORDS[3]]) == [EVALUATION, STEP, after]
  assert read(tmp_path) == [EVALUATION, STEP, after, RECORDS[3]]
  if damage.strip(b'\0'):
    assert (tmp_path / 'metrics.jsonl.unreadable-1').read_bytes() == content
    why = 'are of a step that is written again later' if repeated else 'cannot be read as records'
    assert f'{path} is damaged: line 1 {why}. The file is kept as {path}.unreadable-1' in caplog.text
  else:  # nothing is lost
    assert not caplog.text and not (tmp_path / 'metrics.jsonl.unreadable-1').exists()


def test_readers_move_nothing(tmp_path):
  (tmp_path / 'metrics.jsonl').write_bytes(b'\xff\n' + json.dumps(STEP).encode() + b'\n')
  assert read(tmp_path) == [STEP]
  assert os.listdir(tmp_path) == ['metrics.jsonl']


def test_a_record_that_was_removed_is_not_written_into_nothing(tmp_path):
  with metrics.Writer(str(tmp_path), keep=lambda record: True, first_step=0) as writer:
    writer.write(RECORDS[0])
    os.remove(tmp_path / 'metrics.jsonl')
    with pytest.raises(files.Unsaved, match='metrics.jsonl was removed while the run was at work. Put back') as error:
      writer.write(RECORDS[1])
  assert not error.value.again


def test_records_that_are_not_kept_are_dropped(tmp_path):
  write(tmp_path, RECORDS)
  assert write(tmp_path, [{'step': 1, 'loss': 9.0}], keep=lambda record: record['step'] < 1,
               first_step=1) == RECORDS[:2]
  assert read(tmp_path) == [*RECORDS[:2], {'step': 1, 'loss': 9.0}]
  assert write(tmp_path, [], keep=lambda record: 'eval' in record, first_step=1) == RECORDS[:1]
  assert read(tmp_path) == RECORDS[:1]
  assert write(tmp_path, [], keep=lambda record: False) == read(tmp_path) == []


def test_the_file_is_whole_while_it_is_rewritten(tmp_path):
  write(tmp_path, RECORDS)

  def killed(record):
    if record['step'] == 1:
      raise KeyboardInterrupt
    return True

  with pytest.raises(KeyboardInterrupt):
    write(tmp_path, [], keep=killed)
  assert read(tmp_path) == RECORDS


def test_events_hold_numbers_alone(tmp_path):
  write(tmp_path, [{'step': 7, 'some_loss': 1.5, 'some_list': [1, 2], 'some_text': 'x',
                    'some_none': None, 'some_dict': {'some_inner': 2.5}, 'some_nan': math.nan, 'some_inf': math.inf}])
  held = events(tmp_path)
  assert b'some_loss' in held
  assert np.float32(1.5).tobytes() in held
  for name in (b'some_list', b'some_text', b'some_none', b'some_inner', b'some_nan', b'some_inf'):
    assert name not in held
  assert math.isnan(read(tmp_path)[0]['some_nan'])


def test_compile_count_counts_programs_not_calls():
  triple = jax.jit(lambda x: x * 3 + 1)
  compiles = metrics.CompileCount()
  counts = [compiles.count]
  for x in (np.ones(3, np.float32), np.zeros(3, np.float32), np.ones(4, np.float32),
            np.ones(3, np.float32)):
    triple(x).block_until_ready()
    counts.append(compiles.count)
  assert np.diff(counts).tolist() == [1, 0, 1, 0]
  assert 0 < compiles.seconds < 60
  compiles.close()
  triple(np.ones(5, np.float32)).block_until_ready()
  assert compiles.count == counts[-1]


def test_progress_starts_where_the_run_goes_on(capsys):
  with processes.progress('knapsack', 3, 10) as bar:
    assert (bar.n, bar.total) == (3, 10)
  assert 'knapsack' in capsys.readouterr().err


def test_costs_of_a_step(tmp_path):
  """Two chips for an hour and a half in all, of $2 an hour each; and nothing is made up where nothing is known."""
  entries = [
      {'attempt': 0, 'step': 3, 'phase': 'sample', 'wall_s': 1800.0, 'device_s': 3600.0, 'busy_s': 0.0,
       'peak_bytes': 5, 'flops_useful': 7},
      {'attempt': 0, 'step': 3, 'phase': 'update', 'wall_s': 3000.0, 'device_s': 6000.0, 'busy_s': 0.0,
       'peak_bytes': 9, 'flops_useful': 4, 'host_bytes': 2},
      {'attempt': 0, 'step': 3, 'phase': 'sample', 'wall_s': 600.0, 'device_s': 1200.0, 'busy_s': 0.0,
       'peak_bytes': None}]
  attempt = {'attempt': 0, 'device_kind': 'TPU v5e', 'devices': 2, 'processes': 1}
  chip = hardware.Profile('v5e', ('tpu v5e',), dollars_per_hour=2.0, watts_idle=100.0, watts_max=300.0)
  expected = {'time_sample_s': 2400.0, 'time_update_s': 3000.0, 'cost_device_s': 10800.0, 'cost_dollars': 6.0,
              'cost_kwh': 0.3, 'cost_peak_bytes': 9, 'cost_flops_useful': 11, 'cost_host_bytes': 2}
  assert metrics.costs(entries, attempt, hardware.Hardware((chip,))) == pytest.approx(expected)
  unknown = metrics.costs(entries, attempt, None)
  assert unknown['cost_dollars'] is None and unknown['cost_kwh'] is None and unknown['cost_device_s'] == 10800
  with metrics.Writer(str(tmp_path), keep=lambda record: True, first_step=0) as writer:
    writer.costs(3, entries, attempt, None)
  assert read(tmp_path) == [] and b'time/sample_s' in events(tmp_path) and b'cost/device_s' in events(tmp_path)
  assert b'other/' not in events(tmp_path) and b'cost/dollars' not in events(tmp_path)
