"""Processes of one run: what they agree on, what is gathered, and what happens when one dies."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from kr_jax import phases
from kr_jax import processes
from kr_jax import sharding

ROOT = os.path.dirname(os.path.dirname(__file__))
SILENCE_S = 8
# The main job, in which a death is seen sooner.
MAIN = f'''
from absl import app
from kr_jax import main, processes
processes.SILENCE_S = {SILENCE_S}
app.run(main.main, flags_parser=main.parse)
'''


def test_one_process_gathers_itself():
  x = np.array([[1, 2], [3, 4]], np.uint64)
  assert processes.is_first()
  np.testing.assert_array_equal(processes.gather(x), x[None])
  assert processes.any_of(True) and not processes.any_of(False)
  processes.check_same('budgets', x, b'text')
  with processes.watch():
    pass


def test_processes_that_differ_are_named(monkeypatch):
  monkeypatch.setattr(processes, 'gather', lambda x: np.stack([x, x, x + 1]))
  with pytest.raises(RuntimeError, match=r'budgets of the processes \[2\] differ from those of process 0'):
    processes.check_same('budgets', np.arange(3))


def test_rows_of_a_process():
  """On the host all; of a mesh those of its devices, each once."""
  x = np.arange(16).reshape(8, 2)
  row, rows = processes.own_rows(x)
  assert row.tolist() == list(range(8)) and rows is x
  mesh = sharding.mesh(data=4, model=2)
  row, rows = processes.own_rows(jax.device_put(x, NamedSharding(mesh, PartitionSpec('data'))))
  assert row.tolist() == list(range(8))
  np.testing.assert_array_equal(rows, x)


def test_rows_are_merged(monkeypatch):
  assert processes.merge_rows(np.array([2, 0]), np.array([1.5, 2.5]), 4).tolist() == [2.5, 0, 1.5, 0]
  other = np.array([0, 7, 0, 8])
  monkeypatch.setattr(processes, 'gather', lambda x: np.stack([x, other]))
  assert processes.merge_rows(np.array([0, 2]), np.array([5, 6]), 4).tolist() == [5, 7, 6, 8]


def test_what_a_process_waits_for_others_is_a_phase(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes.multihost_utils, 'process_allgather', lambda x: np.stack([x, x]))
  with phases.running() as clock, phases.phase('verify'):
    assert processes.any_of(True)
    assert {'verify', 'wait'} <= {row['phase'] for row in clock.rows()}


def test_progress_to_a_total_that_is_known_later(monkeypatch, capsys):
  made, make = [], processes.progress
  monkeypatch.setattr(processes, 'progress', lambda *given, **named: made.append(make(*given, **named)) or made[-1])
  for compiles in (False, True):
    seconds = itertools.count(100.0, 1000.0)
    with processes.progress_to('evaluate', 'rollout', compiled_s=seconds.__next__ if compiles else None) as show:
      assert len(made) == compiles
      show(0, 256)
      began = made[-1]._start
      show(64, 256)
      assert (made[-1]._start > began) == compiles
      show(192, 256)
    assert (made[-1].n, made[-1].total, made[-1].disable) == (192, 256, True) and len(made) == 1 + compiles
    # Less than ten seconds, and nothing stays.
    assert capsys.readouterr().err == 'evaluate: 0 of 256 rollouts, compiling\n' * compiles


def test_a_signal_is_acknowledged_at_once_and_a_second_interrupts(capfd):
  before = signal.getsignal(signal.SIGINT)
  with processes.StopSignal() as stopping, phases.running(), phases.phase('update'):
    assert not stopping() and capfd.readouterr().err == ''
    stopping.doing, stopping.has_more = 'step 12', True
    os.kill(os.getpid(), signal.SIGINT)
    assert stopping()
    assert capfd.readouterr().err == ('Ctrl-C: finishing step 12 (updating), then saving; Ctrl-C again stops at once, '
                                      'and the last checkpoint stays\n')
    os.kill(os.getpid(), signal.SIGTERM)  # it stops already
    assert capfd.readouterr().err == ''
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)
  assert signal.getsignal(signal.SIGINT) is before


def test_what_is_said_of_a_stop_names_what_is_waited_for(monkeypatch):
  stopping = processes.StopSignal('step 3')
  said = []
  with phases.running():
    for count in (1, 2):
      monkeypatch.setattr(jax, 'process_count', lambda: count)
      for stopping.has_more in (False, True):
        for phase in ('sample', 'verify', 'update'):
          with phases.phase(phase):
            said.append(stopping._plan())
  nothing, then = '; there is nothing new to save', ', then saving'
  assert said == [
      f'leaving step 3 (sampling){nothing}', f'leaving step 3 (verifying){nothing}',
      f'leaving step 3 (updating){nothing}',
      f'leaving step 3 (sampling){then}', f'leaving step 3 (verifying){then}', f'finishing step 3 (updating){then}',
      # The devices of two processes are at one program.
      f'finishing step 3 (sampling){nothing}', f'leaving step 3 (verifying){nothing}',
      f'finishing step 3 (updating){nothing}',
      f'finishing step 3 (sampling){then}', f'leaving step 3 (verifying){then}', f'finishing step 3 (updating){then}']


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 75), (signal.SIGINT, 130), (0, 75)])
def test_the_exit_status_of_a_stop(number, status):
  """0: another process was told."""
  with pytest.raises(SystemExit, match='stopped after 3') as stop:
    with processes.StopSignal() as stopping, stopping.ends():
      if number:
        os.kill(os.getpid(), number)
      raise processes.Stopped('stopped after 3 of 8 steps')
  assert stop.value.code == status


def test_a_signal_without_a_terminal_or_a_clock(capfd, monkeypatch):
  with processes.StopSignal('the start') as stopping:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopping() and capfd.readouterr().err == 'SIGTERM: leaving the start; there is nothing new to save\n'
  monkeypatch.setattr(sys, 'stderr', None)
  with processes.StopSignal() as stopping:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopping()


def test_the_devices_are_not_waited_for():
  """An array that does not come holds up nothing, and one that comes is waited for."""
  class Array:
    def __init__(self, seconds):
      self.seconds = seconds

    def block_until_ready(self):
      time.sleep(self.seconds)

  with processes.StopSignal('step 3') as stopping:
    stopping.wait(Array(0.05))
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with pytest.raises(processes.Stopped, match='stopped in step 3'):
      stopping.wait(Array(30))
    assert time.monotonic() - began < 10 and stopping.has_left_devices
    with pytest.raises(processes.Stopped):
      stopping.wait(Array(30))


def test_a_process_leaves_on_its_own_only_within_what_all_check_after():
  with processes.StopSignal('step 3') as stopping:
    assert stopping.during(lambda: 7) == 7
    os.kill(os.getpid(), signal.SIGTERM)
    stopping.leave()  # elsewhere it would be alone
    left = []
    with pytest.raises(processes.Stopped):
      stopping.during(lambda: [stopping.leave(), left.append(1)])
    assert not left
    stopping.leave()


def test_a_notice_of_preemption_stops_all(monkeypatch, capfd):
  """jax says so of one count, which all processes come to."""
  asked = []
  monkeypatch.setattr(processes.multihost_utils, 'reached_preemption_sync_point',
                      lambda count: asked.append(count) or count == 3)
  stopping = processes.StopSignal('step 5')
  stopping.check()
  assert not stopping.is_agreed() and not stopping()
  with pytest.raises(processes.Stopped):
    stopping.check()
  assert asked == [1, 2, 3] and stopping()
  assert capfd.readouterr().err == 'preemption notice: leaving step 5; there is nothing new to save\n'
  monkeypatch.setattr(processes.multihost_utils, 'reached_preemption_sync_point', lambda count: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    processes.StopSignal().check()


def test_processes_tell_one_another(monkeypatch, capfd):
  """Past what they compute together, through the service that joins them."""
  told = {}

  class Client:
    def key_value_set(self, key, value, allow_overwrite):
      told[key] = value

    def key_value_try_get(self, key):
      if key not in told:
        raise jax.errors.JaxRuntimeError(f'NOT_FOUND: {key}')
      return told[key]

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes, '_HEAR_S', 0.01)
  monkeypatch.setattr(processes.multihost_utils.distributed.global_state, 'client', Client())

  def until(is_so):
    end = time.monotonic() + 10
    while not is_so():
      assert time.monotonic() < end
      time.sleep(0.01)

  with processes.StopSignal('step 5') as stopping:
    os.kill(os.getpid(), signal.SIGTERM)
    until(lambda: told)
  assert list(told.values()) == ['0']
  with processes.StopSignal('step 6') as stopping:
    assert stopping._key not in told
    told[stopping._key] = '1'
    until(stopping)
  assert 'process 1 was told to stop: finishing step 6; there is nothing new to save\n' in capfd.readouterr().err


def test_the_text_of_the_first(monkeypatch):
  for first in ('é', 'longer than that of the other'):
    other = np.frombuffer(first.encode(), np.uint8)
    monkeypatch.setattr(processes, 'gather', lambda x: np.stack([np.array(len(other)) if not x.ndim else other, x]))
    assert processes.of_first('of the other') == first
  monkeypatch.undo()
  assert processes.of_first('alone') == 'alone'


STOP = '''
import jax
from kr_jax import files
from kr_jax import processes

jax.process_count = lambda: 2
processes.time.sleep = lambda s: print('waits', s, 's')
with processes.watch():
  raise {error}
'''


@pytest.mark.parametrize('error, waits, status', [
    ("jax.errors.JaxRuntimeError('connection closed')", True, 75),
    ("jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')", False, 1),
    ("FloatingPointError('loss nan')", False, 1),
    ("ValueError('not of jax')", False, 1), ('KeyboardInterrupt()', False, 130),
    ("files.Unsaved('no answer of gs://bucket')", False, 75)])
def test_an_error_ends_a_process(error, waits, status):
  """After a collective that failed JAX's service is waited for, which names the process that died."""
  got = subprocess.run([sys.executable, '-c', STOP.format(error=error)], cwd=ROOT, text=True,
                       capture_output=True)
  assert got.returncode == status
  assert f'process 0 stops: {error.split("(")[0].split(".")[-1]}, printed above. Start all' in got.stderr
  assert ('Traceback' in got.stderr) == ('Unsaved' not in error) and ('waits 50 s' in got.stdout) == waits


def test_an_error_of_one_process_waits_for_no_other(monkeypatch):
  """A stop, of all processes, takes as long as they do."""
  ended = []
  monkeypatch.setattr(processes.jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes, '_LEAVE_S', 0.0)
  monkeypatch.setattr(processes.stopping, 'end', ended.append)
  stop = SystemExit('stopped after 3 steps')
  stop.code = 75
  for error, found in ((stop, []), (SystemExit('error: no such file'), [1])):
    with pytest.raises(SystemExit), processes.watch():
      raise error
    for timer in (x for x in threading.enumerate() if isinstance(x, threading.Timer)):
      timer.join()
    assert ended == found


@pytest.mark.parametrize('index', [-1, 2])
def test_an_index_beyond_the_count(index):
  with pytest.raises(ValueError, match=f'--process={index} of --processes=2'):
    processes.start('localhost:1', 2, index)


def test_an_environment_that_says_nothing():
  code = 'from kr_jax import processes; processes.start(processes.AUTO)'
  got = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True)
  assert '--coordinator=auto starts no processes' in got.stderr


# A run of several.


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def start(workdir, data_dir, count, **knobs):
  """The processes of a run of eight devices, and their output."""
  of_all = {
      'mesh.fsdp': 4, 'mesh.data': 2, 'tasks.data_dir': data_dir, 'policy.num_layers': 1, 'tasks.per_step': 4,
      'alloc.rollouts_per_step': 16, 'warm_start.num_steps': 0, 'warm_start.warmup_steps': 0,
      'rewards.verifier': 'tests.graders:even_or_nothing', 'rewards.workers': 1, 'evaluate.every': 0,
      'evaluate.tasks': 4, 'evaluate.rollouts': 4, 'evaluate.tasks_per_batch': 4, 'checkpoint.every': 2,
      'record.page': False} | knobs
  flags = [f'--config.{name}={x}' for name, x in of_all.items()]
  port, found = free_port(), []
  for i in range(count):
    of_process = [f'--coordinator=localhost:{port}', f'--processes={count}', f'--process={i}'] * (count > 1)
    env = os.environ | {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace(
        'device_count=8', f'device_count={8 // count}')}  # of conftest.py
    with open(f'{workdir}.{i}', 'w') as output:
      found.append(subprocess.Popen(
          [sys.executable, '-c', MAIN, '--config=configs/arithmetic.py:debug', f'--workdir={workdir}', *flags,
           *of_process], cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT))
  return found


def steps_of(workdir):
  path = os.path.join(workdir, 'metrics.jsonl')
  if not os.path.exists(path):
    return []
  with open(path) as file:
    rows = [json.loads(line) for line in file.read().split('\n')[:-1]]
  return [row for row in rows if 'loss' in row]


def finished(workdir, found):
  for i, process in enumerate(found):
    with open(f'{workdir}.{i}') as output:
      assert process.wait(timeout=300) == 0, output.read()
  return steps_of(workdir)


def comparable(row):
  return {k: x for k, x in row.items() if k not in ('wall_s', 'step_s', 'compile_count', 'tokens_per_s')}


@pytest.mark.slow
def test_a_death_loses_nothing(tmp_path, data_dir):
  """Of two processes one is killed in the middle of a step; both are started again."""
  workdir = tmp_path / 'parts'
  found = start(workdir, data_dir, 2, num_steps=400)
  while len(steps_of(workdir)) < 3:
    assert all(process.poll() is None for process in found), (tmp_path / 'parts.0').read_text()
    time.sleep(0.1)
  found[1].send_signal(signal.SIGKILL)
  found[1].wait()
  killed = time.monotonic()
  assert found[0].wait(timeout=60) != 0
  assert time.monotonic() - killed < 60
  assert 'tasks are unhealthy (stopped sending heartbeats):\n1\n' in (tmp_path / 'parts.0').read_text()
  before = steps_of(workdir)
  first = max(int(name) for name in os.listdir(workdir / 'checkpoints') if name.isdigit())
  assert first < len(before)  # so that a step is repeated
  rows = finished(workdir, start(workdir, data_dir, 2, num_steps=len(before)))
  assert [row['step'] for row in rows] == list(range(len(before)))
  for row, other in zip(map(comparable, before), map(comparable, rows), strict=True):
    assert {name for name in row.keys() | other.keys() if row.get(name) != other.get(name)} == set(), row['step']


@pytest.mark.exhaustive
def test_two_processes_are_one(tmp_path, data_dir):
  """One process of eight devices, and two of four; in waves, of tasks that are chosen, each wave's rows rounded up."""
  waves = {'alloc.waves': 2, 'alloc.low': 0, 'tasks.candidates_per_step': 6, 'alloc.rollouts_per_step': 18,
           'grpo.advantage': 'posterior', 'grpo.keep': 0.5, 'grpo.weight': 'task', 'sample.stop_strings': "('7',)",
           'rewards.max_faulty_steps': 9}
  whole, parts = (finished(tmp_path / str(count), start(tmp_path / str(count), data_dir, count, num_steps=4, **waves))
                  for count in (1, 2))
  for row, other in zip(whole, parts, strict=True):
    for name in ('tokens_generated', 'reward_mean', 'budget_max', 'mixed_tasks', 'unverified', 'no_answer'):
      assert row[name] == other[name], name
    of, of_other = (x['verification']['arithmetic/tests.graders:even_or_nothing'] for x in (row, other))
    # The first process takes a second look at rollouts that it can read, its own.
    for name in of.keys() - {'looked_at', 'holds_answer', 'others', 'holds_other'}:
      assert of[name] == of_other[name], name
    for name in ('loss', 'grad_norm', 'entropy'):
      assert row[name] == pytest.approx(other[name], rel=1e-5), name
