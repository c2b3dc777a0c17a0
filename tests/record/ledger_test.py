"""The ledger of a run: its lines, and what a kill leaves of them."""

import json
import os
import subprocess
import threading
import time

import jax
import pytest

from kr_jax import phases
from kr_jax.record import ledger


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


@pytest.mark.parametrize('error, reason', [
    (SystemExit('SIGTERM'), 'stopped'), (KeyboardInterrupt(), 'stopped'), (OSError('full'), 'failed')])
def test_how_an_attempt_ended(tmp_path, clock, error, reason):
  with pytest.raises(type(error)), ledger.Writer(str(tmp_path), clock, 0, {}):
    raise error
  assert ledger.read(str(tmp_path)).ends[0]['reason'] == reason


def test_what_a_kill_cuts_is_taken_from_the_heartbeat(tmp_path, clock):
  killed = ledger.Writer(str(tmp_path), clock, 0, {})
  killed.step(0)  # whose lines wait to be written, as they do in short steps
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
  killed.step(0)
  killed.flush()  # the lines hold what the heartbeat held
  with ledger.Writer(str(tmp_path), clock, 0, {}):
    pass
  assert not [e for e in ledger.read(str(tmp_path)).entries if e.get('cut')]


@pytest.mark.parametrize('now', ['', '[]', '{"size": 0}', '{"size": "x", "entries": 3}', '[' * 100_000,
                                 '{"size": 0, "entries": [{"a": 1}]}', '{"size": 0, "entries": [3]}'])
def test_a_heartbeat_that_is_none_is_left_out(tmp_path, clock, now):
  (tmp_path / 'ledger.now.json').write_text(now)
  with ledger.Writer(str(tmp_path), clock, 0, {}):
    pass
  found = ledger.read(str(tmp_path))
  assert len(found.attempts) == 1 and not found.problems and not any('cut' in entry for entry in found.entries)


def test_what_cannot_be_read_is_said(tmp_path):
  found = ledger.read(str(tmp_path))
  assert found[:3] == ([], [], []) and 'ledger.jsonl cannot be read: No such file' in found.problems[0]
  good = {'attempt': 0, 'step': 1, 'phase': 'verify', 'wall_s': 1.0}
  (tmp_path / 'ledger.jsonl').write_bytes(
      json.dumps(good).encode() + b'\n\x00\xff\n[]\n3\n"started"\n{"a": 1}\n' + json.dumps(good).encode()[:20])
  found = ledger.read(str(tmp_path))
  assert found.entries == [good] and '6 of 7 lines are no records' in found.problems[0]


@pytest.mark.parametrize('hours', [-5, 5])
def test_a_clock_that_is_set_changes_no_seconds(tmp_path, monkeypatch, hours):
  """The machine's clock jumps during the run: what the ledger says of times goes on evenly."""
  day, jumps = time.time, [0.0]
  monkeypatch.setattr(phases.time, 'time', lambda: day() + jumps[0])
  clock = phases.Clock(since=day() + 1)  # and it was set back since the process began
  with ledger.Writer(str(tmp_path), clock, 0, {}) as written:
    with_phase = lambda name: (clock.enter(name), clock.leave())
    with_phase('sample')
    jumps[0] = 3600.0 * hours
    with_phase('update')
    written.step(0)
  found = ledger.read(str(tmp_path))
  assert all(0 <= entry['wall_s'] < 60 and abs(entry['began'] - day()) < 60 for entry in found.entries)
  assert {'sample', 'update'} <= {entry['phase'] for entry in found.entries}
  assert 0 <= found.ends[0]['ended'] - found.attempts[0]['started'] < 60


def test_a_damaged_ledger_is_repaired(tmp_path, clock, caplog):
  """What cannot be read is kept beside it; what an unfinished step had taken is not lost with it."""
  good = [{'attempt': 4, 'started': 1.0}, {'attempt': 4, 'step': 1, 'phase': 'verify', 'wall_s': 1.0}]
  lines = [json.dumps(x).encode() for x in good]
  content = lines[0] + b'\n\x00\xff\n[]\n\n' + lines[1] + b'\n'
  (tmp_path / 'ledger.jsonl').write_bytes(content + lines[1][:9])
  (tmp_path / 'ledger.now.json').write_text(json.dumps({'size': len(content), 'entries': [good[1]]}))
  with ledger.Writer(str(tmp_path), clock, 0, {}) as written:
    assert written.attempt == 5
  found = ledger.read(str(tmp_path))
  assert found.attempts[0] == good[0] and found.entries[:2] == [good[1], good[1] | {'cut': True}] and not found.problems
  assert (tmp_path / 'ledger.jsonl.unreadable-1').read_bytes() == content
  assert 'ledger.jsonl is damaged: lines 2, 3 cannot be read as records' in caplog.text


def test_an_attempt_has_a_number_of_its_own(tmp_path, clock):
  (tmp_path / 'ledger.jsonl').write_text(
      '{"attempt": 0, "started": 1}\n{"attempt": 1, "sta\n{"attempt": 2, "started": 3}\n{"attempt": "x", "started": 4}\n')
  with ledger.Writer(str(tmp_path), clock, 0, {}) as written:
    assert written.attempt == 3


def test_a_meter_that_fails_for_a_while_loses_nothing(tmp_path, clock, monkeypatch):
  monkeypatch.setattr(ledger, '_EVERY_S', 60)
  joules, busy = iter([10.0, None, 15.0]), iter([0.5, 0.25])
  with ledger.Writer(str(tmp_path), clock, 0, {}, lambda: next(joules), lambda: next(busy)) as written:
    clock.begin('other')
    monkeypatch.setattr(ledger, '_BUSY_EVERY', 2)
    written.sample()
    written.sample()
    entry, = (entry for entry in written.step(0) if entry['phase'] == 'other')
  assert entry['joules'] == 5.0 and entry['busy_share'] == 0.25


def test_the_heartbeat_goes_on_after_an_error(tmp_path, clock, monkeypatch):
  monkeypatch.setattr(ledger, '_EVERY_S', 0.01)
  said = []

  def sample(self):
    said.append(1)
    if len(said) < 3:
      raise RuntimeError('the device tells nothing')

  monkeypatch.setattr(ledger.Writer, 'sample', sample)
  with ledger.Writer(str(tmp_path), clock, 0, {}):
    deadline = time.monotonic() + 5
    while not (tmp_path / 'ledger.now.json').exists() and time.monotonic() < deadline:
      time.sleep(0.01)
    assert len(said) >= 3


@pytest.mark.parametrize('took_s, writes', [(0, True), (1000, False)])
def test_a_long_attempt_writes_seldom(tmp_path, monkeypatch, took_s, writes):
  """Whenever it has taken a fiftieth more, and a short one at each sample."""
  monkeypatch.setattr(ledger, '_EVERY_S', 0.01)
  monkeypatch.setattr(ledger, '_APPEND_S', 60)
  written, sampled = [], threading.Semaphore(0)
  monkeypatch.setattr(ledger.Writer, 'snapshot', lambda self: written.append(1))
  monkeypatch.setattr(ledger.Writer, 'sample', lambda self: sampled.release())
  with ledger.Writer(str(tmp_path), phases.Clock(since=time.time() - took_s), 0, {}):
    assert all(sampled.acquire(timeout=30) for _ in range(5))
  assert len(written) >= 4 if writes else not written


def test_a_meter_that_hangs_does_not_hold_up_the_end(tmp_path, clock, monkeypatch):
  monkeypatch.setattr(ledger, '_EVERY_S', 0.01)
  monkeypatch.setattr(ledger, '_JOIN_S', 0.05)
  reads, asked, goes_on = iter([1.0]), threading.Event(), threading.Event()

  def meter():
    for joules in reads:
      return joules
    asked.set()
    goes_on.wait(30)

  with ledger.Writer(str(tmp_path), clock, 0, {}, meter) as written:
    assert asked.wait(5)
  assert written._thread.is_alive() and ledger.read(str(tmp_path)).ends[0]['reason'] == 'done'
  goes_on.set()
  written._thread.join()
  assert not (tmp_path / 'ledger.now.json').exists()


@pytest.mark.parametrize('error, raised', [(SystemExit('stopped'), SystemExit), (None, OSError)])
def test_a_full_disk_does_not_hide_why_a_run_ends(tmp_path, clock, monkeypatch, error, raised):
  def full(self, records):
    raise OSError('no space')

  with pytest.raises(raised), ledger.Writer(str(tmp_path), clock, 0, {}):
    monkeypatch.setattr(ledger.Writer, '_append', full)
    if error:
      raise error


def test_what_an_attempt_says_of_the_code(monkeypatch, tmp_path):
  """A notebook has no command; a package that lies in another project's checkout has not its commit."""
  monkeypatch.setattr('sys.argv', [ledger.__file__.replace('record/ledger.py', 'main.py'), '--config=x y.py'])
  found = ledger.environment()
  assert found['command'] == "python -m kr_jax.main '--config=x y.py'" and set(found['versions']) == {'kr_jax', 'jax'}
  monkeypatch.setattr('sys.argv', ['ipykernel_launcher.py', '-f', 'kernel.json'])
  assert ledger.environment()['command'] is None
  folder = tmp_path / 'venv'
  folder.mkdir()
  for command in ('init -q', '-c user.name=x -c user.email=x commit -q --allow-empty -m x'):
    subprocess.run(('git', '-C', str(tmp_path), *command.split()), check=True)
  monkeypatch.setattr(ledger, '__file__', str(folder / 'ledger.py'))
  assert ledger._commit() is None
