"""The ledger of a run: its lines, and what a kill leaves of them."""

import json
import os
import time

import jax
import pytest

from kr_jax import phases
from kr_jax.record import ledger


@pytest.fixture
def clock():
  yield phases.start()
  phases.stop()


def lines(path):
  return [json.loads(line) for line in (path / 'ledger.jsonl').read_text().splitlines()]


def test_an_attempt(tmp_path, clock):
  joules = iter([10.0, 12.0, 15.0])
  with ledger.Writer(str(tmp_path), clock, 3, {'commit': None}, lambda: next(joules, 15.0)) as written:
    clock.begin('other')
    with phases.phase('verify'):
      phases.count(rollouts=2 ** 60 + 1)
      written.sample()
    written.step(3)
    with phases.phase('sample'):
      pass
    written.step(4)
  found = ledger.read(str(tmp_path))
  assert not found.problems and [a['attempt'] for a in found.attempts] == [0]
  assert {'started', 'first_step', 'memory', 'commit'} <= set(found.attempts[0])
  assert found.ends == [{'attempt': 0, 'ended': found.ends[0]['ended'], 'reason': 'done'}]
  entry = next(e for e in found.entries if e['phase'] == 'verify')
  assert entry['step'] == 3 and entry['rollouts'] == 2 ** 60 + 1  # exact
  assert entry['device_s'] == pytest.approx(jax.device_count() * entry['wall_s'], abs=1e-5)
  assert entry['joules'] == 2.0 and entry['peak_bytes'] > 10e6
  assert {(e['step'], e['phase']) for e in found.entries} >= {(3, 'start'), (3, 'verify'), (4, 'sample'), (5, 'other')}
  assert not (tmp_path / 'ledger.now.json').exists()
  wall_s = found.ends[0]['ended'] - found.attempts[0]['started']
  assert sum(e['wall_s'] for e in found.entries) == pytest.approx(wall_s, abs=0.1)


@pytest.mark.parametrize('error, reason', [(SystemExit('SIGTERM'), 'stopped'), (OSError('full'), 'failed')])
def test_how_an_attempt_ended(tmp_path, clock, error, reason):
  with pytest.raises(type(error)), ledger.Writer(str(tmp_path), clock, 0, {}):
    raise error
  assert ledger.read(str(tmp_path)).ends[0]['reason'] == reason


def test_what_a_kill_cuts_is_taken_from_the_heartbeat(tmp_path, clock):
  killed = ledger.Writer(str(tmp_path), clock, 0, {})
  killed.step(0)
  with phases.phase('sample'):
    phases.count('sample', rollouts=5)
    deadline = time.monotonic() + 30
    while not (tmp_path / 'ledger.now.json').exists() and time.monotonic() < deadline:
      time.sleep(0.02)
    killed._stopping.set()  # and no line any more
    killed._thread.join()
  with open(tmp_path / 'ledger.jsonl', 'a') as file:
    file.write('{"attempt": 0, "st')  # half a line
  with ledger.Writer(str(tmp_path), clock, 0, {}) as again:
    assert again.attempt == 1
  found = ledger.read(str(tmp_path))
  cut, = (e for e in found.entries if e.get('cut') and e['phase'] == 'sample')
  assert cut['attempt'] == 0 and cut['step'] == 1 and cut['rollouts'] == 5 and cut['wall_s'] > 0
  assert not found.problems and [a['attempt'] for a in found.attempts] == [0, 1]
  assert [e['attempt'] for e in found.ends] == [1]


def test_a_heartbeat_from_before_the_last_line_counts_once(tmp_path, clock):
  killed = ledger.Writer(str(tmp_path), clock, 0, {})
  killed._stopping.set()
  killed._thread.join()
  stale = {'size': os.path.getsize(tmp_path / 'ledger.jsonl'), 'entries': killed._entries(clock.rows())}
  (tmp_path / 'ledger.now.json').write_text(json.dumps(stale))
  killed.step(0)  # its lines hold what the heartbeat held
  with ledger.Writer(str(tmp_path), clock, 0, {}):
    pass
  assert not [e for e in ledger.read(str(tmp_path)).entries if e.get('cut')]


@pytest.mark.parametrize('now', ['', '[]', '{"size": 0}', '{"size": "x", "entries": 3}'])
def test_a_heartbeat_that_is_none_is_left_out(tmp_path, clock, now):
  (tmp_path / 'ledger.now.json').write_text(now)
  with ledger.Writer(str(tmp_path), clock, 0, {}):
    pass
  assert len(ledger.read(str(tmp_path)).attempts) == 1


def test_what_cannot_be_read_is_said(tmp_path):
  found = ledger.read(str(tmp_path))
  assert found[:3] == ([], [], []) and 'ledger.jsonl cannot be read: No such file' in found.problems[0]
  good = {'attempt': 0, 'step': 1, 'phase': 'verify', 'wall_s': 1.0}
  (tmp_path / 'ledger.jsonl').write_bytes(
      json.dumps(good).encode() + b'\n\x00\xff\n[]\n3\n{"a": 1}\n' + json.dumps(good).encode()[:20])
  found = ledger.read(str(tmp_path))
  assert found.entries == [good] and '5 of 6 lines are no records' in found.problems[0]
