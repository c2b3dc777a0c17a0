"""The clock of a run, on a time that stands still unless a test moves it."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from kr_jax import phases


@pytest.fixture
def now(monkeypatch):
  """A function that moves the time, which is 100 at first."""
  moment = [100.0]
  monkeypatch.setattr(time, 'monotonic', lambda: moment[0])
  monkeypatch.setattr(time, 'time', lambda: moment[0] + 1000)

  def move(seconds):
    moment[0] += seconds

  return move


def seconds(rows, name='wall_s'):
  return {row['phase']: row[name] for row in rows}


def test_one_phase_runs_at_a_time(now, clock):
  now(1)
  with phases.phase('verify'):
    now(2)
    with phases.phase('detokenise'):
      now(4)
      phases.count(rollouts=3)
    now(8)
    phases.count(rollouts=2)
  now(16)
  rows = clock.drain()
  assert seconds(rows) == {'start': 17, 'verify': 10, 'detokenise': 4}
  assert {row['phase']: row.get('rollouts') for row in rows} == {'start': None, 'verify': 2, 'detokenise': 3}
  assert [row['began'] for row in rows] == [1100, 1101, 1103]
  now(5)
  assert seconds(clock.drain()) == {'start': 5}  # all begins at 0 again


def test_a_clock_may_begin_before_it_is_made(now):
  clock = phases.start(since=1060.0)
  assert clock is phases.start()  # there is one
  now(1)
  assert seconds(clock.drain()) == {'start': 41} and clock.began == 1060
  phases.stop()
  assert not phases.is_running()


def test_a_whole_phase_keeps_what_happens_in_it(now, clock):
  clock.begin('other')
  with phases.phase('evaluate', whole=True):
    now(1)
    with phases.phase('sample'):
      now(2)
      phases.count(tokens_generated=7)
    with phases.phase('checkpoint'):
      now(4)
  rows = clock.drain()
  assert seconds(rows) == {'start': 0, 'other': 0, 'evaluate': 3, 'checkpoint': 4}
  assert seconds(rows, 'busy_s')['evaluate'] == 2  # the devices work in 'sample'
  assert rows[2]['tokens_generated'] == 7


def test_devices_work_in_their_phases_and_where_it_is_said(now, clock):
  with phases.phase('update'):
    now(1)
  phases.devices_work(True)
  with phases.phase('record'):
    now(2)
  phases.devices_work(False)
  with phases.phase('verify'):
    now(4)
  assert seconds(clock.drain(), 'busy_s') == {'start': 0, 'update': 1, 'record': 2, 'verify': 0}


def test_compilation_is_a_phase_of_its_own(now, clock):
  trace, lower, build = phases._COMPILING
  with phases.phase('sample'):
    now(1)
    clock.on_duration(trace, 0.5)
    now(8)
    clock.on_duration(trace, 7.0)  # an inner function, within
    clock.on_duration(trace, 8.0)
    now(4)
    clock.on_duration(build, 3.0)
    clock.on_duration('/another', 3.0)
    now(16)
  rows = clock.drain()
  assert seconds(rows) == {'start': 0, 'sample': 29 - 11.5, 'compile': 11.5}
  assert seconds(rows, 'busy_s')['sample'] == 29 - 11.5
  assert rows[1].get('compiles', rows[2].get('compiles')) == 1
  with phases.phase('sample'):
    now(1)
    clock.on_duration(lower, 5.0)  # the phase did not run then
  assert seconds(clock.drain())['compile'] == 1


def test_a_program_that_is_compiled_is_seen(clock):
  with phases.phase('sample'):
    jax.block_until_ready(jax.jit(lambda x: jnp.cos(x) * 3 + 1)(jnp.ones(3)))
  rows = {row['phase']: row for row in clock.drain()}
  assert rows['compile']['wall_s'] > 0 and rows['compile']['compiles'] >= 1


def test_a_program_that_was_kept_is_counted_as_one(clock):
  with phases.phase('sample'):
    jax.monitoring.record_event('/jax/compilation_cache/cache_hits')
    jax.monitoring.record_event('/jax/compilation_cache/cache_misses')
    thread = threading.Thread(target=jax.monitoring.record_event, args=('/jax/compilation_cache/cache_hits',))
    thread.start()  # of another thread, whose phases are not ours
    thread.join()
  assert {row['phase']: row.get('compiles_cached') for row in clock.drain()}['compile'] == 1


def test_samples_from_outside_go_to_the_phase_that_runs(now, clock):
  def from_a_thread():
    clock.sample(memory_bytes=5, joules=1.0)
    clock.sample(memory_bytes=3, joules=2.5, busy_share=0.5)
    clock.sample(busy_share=1.0)
    with phases.phase('update'):  # another thread has no phases
      now(2)

  with phases.phase('verify'):
    now(1)
    thread = threading.Thread(target=from_a_thread)
    thread.start()
    thread.join()
    rows = {row['phase']: row for row in clock.rows()}
  assert rows['verify'] == {'phase': 'verify', 'began': 1100.0, 'wall_s': 3.0, 'busy_s': 0.0, 'peak_bytes': 5,
                            'joules': 3.5, 'busy_share': 0.75}
  assert rows['start']['peak_bytes'] is rows['start']['joules'] is None  # not seen, and not 0
  assert seconds(clock.drain()) == {'start': 0, 'verify': 3}  # reading has changed nothing


def test_an_error_leaves_the_phase(now, clock):
  with pytest.raises(KeyError), phases.phase('verify'):
    now(1)
    raise KeyError
  now(2)
  assert seconds(clock.drain()) == {'start': 2, 'verify': 1}


def test_bad_names_and_no_clock():
  with pytest.raises(ValueError, match="'verfy' is no phase; there are"), phases.phase('verfy'):
    pass
  with phases.phase('verify'):
    phases.count(rollouts=1)
    phases.devices_work(True)
  assert not phases.is_running()
