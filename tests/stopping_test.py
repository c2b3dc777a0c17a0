"""What a signal does to a process, whatever the process is at."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from kr_jax import processes
from kr_jax import rewards
from kr_jax import stopping
from kr_jax import types
from tests import kills
from tests.knobs import run

# Listens, says that it does, and then works; what it is sent while it works is the test's.
CHILD = '''
import os, signal, sys, threading, time
from kr_jax import stopping
listener = stopping.hear(may_end=True)
stopping.HURRY_S = 0.1
{setup}
try:
  print('ready', flush=True)
{work}
except KeyboardInterrupt:
  print('caught', flush=True)
{caught}
else:
  print('worked', flush=True)
'''

def child(work, *numbers, setup='', caught='raise', gap_s=0.0):
  """The exit status, stdout and stderr of a child that gets signals at its work."""
  process = subprocess.Popen([sys.executable, '-c', CHILD.format(
      setup=setup, work=textwrap.indent(work, '  '), caught=textwrap.indent(caught, '  '))], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, cwd=kills.ROOT)
  assert process.stdout.readline() == 'ready\n'
  for number in numbers:
    process.send_signal(number)
    time.sleep(gap_s)
  output, errors = process.communicate(timeout=60)
  return process.returncode, output, errors


def test_a_process_that_has_nothing_to_lose_ends_at_once():
  """While its main thread waits for what no signal ends."""
  for number, code, what in ((signal.SIGTERM, 75, 'SIGTERM'), (signal.SIGINT, 130, 'Ctrl-C')):
    assert child('threading.Event().wait(30)', number) == (code, '', f'{what}: stopping; there is nothing to save\n')


def test_keyboard_interrupt_is_raised_once_and_a_program_that_does_not_end_is_ended():
  told = 'SIGTERM: stopping; there is nothing to save\n'
  for caught, numbers in (('sys.exit(listener.code)', [signal.SIGTERM] * 2), ('time.sleep(30)', [signal.SIGTERM])):
    assert child('time.sleep(30)', *numbers, setup='listener.interrupt()', caught=caught) == (75, 'caught\n', told)


SAVES = 'listener.raises, listener.patience, listener.describe = False, lambda: None, lambda number: "so"'


@pytest.mark.slow
def test_a_program_with_something_to_save_goes_on_until_a_second_ctrl_c():
  work = 'while not listener.told: time.sleep(0.01)\ntime.sleep({})'
  assert child(work.format(0.1), signal.SIGTERM, signal.SIGTERM, setup=SAVES) == (0, 'worked\n', 'so\n')
  code, output, errors = child(work.format(30), signal.SIGINT, signal.SIGINT, setup=SAVES, gap_s=0.1)
  assert (code, output) == (-signal.SIGINT, 'caught\n') and 'KeyboardInterrupt' in errors
  assert child(work.format(30), signal.SIGINT, signal.SIGINT, setup=SAVES, caught='time.sleep(30)', gap_s=0.1) == (
      130, 'caught\n', 'so\nended at once; what was saved stays\n')


def test_an_interrupt_that_python_drops_ends_the_process_without_a_traceback():
  """It comes while the garbage collector is at its callbacks."""
  setup = ('import gc\ngc.callbacks.append(lambda *_: time.sleep(30))\nlistener.interrupt()\n'
           'threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()')
  assert child('gc.collect(); time.sleep(30)', setup=setup) == (75, '', 'SIGTERM: stopping; there is nothing to save\n')


def test_sighup_ends_nothing():
  code, output, errors = child('time.sleep(0.2)', signal.SIGHUP, signal.SIGHUP, gap_s=0.05)
  assert (code, output) == (0, 'worked\n') and errors.count('SIGHUP: the terminal is gone; the run goes on') == 1


def test_a_second_ctrl_c_hurries_and_nothing_else_does(capfd):
  listener = stopping.Listener()
  listener.hear(signal.SIGINT)
  assert listener.told and not listener.is_hurried and listener.code == 130
  assert capfd.readouterr().err == 'Ctrl-C: stopping; there is nothing to save\n'
  listener.hear(signal.SIGTERM)
  assert not listener.is_hurried
  listener.hear(signal.SIGINT)
  assert listener.is_hurried and capfd.readouterr().err == ''


def test_a_signal_that_comes_while_the_program_holds_locks_counts_once():
  """The handler takes none, and leaves it to the thread to count."""
  listener = stopping.hear()
  listener.patience = lambda: None
  changed = threading.Event()
  listener.watchers.append(changed.set)
  try:
    with threading._active_limbo_lock, changed._cond:
      began = time.monotonic()
      os.kill(os.getpid(), signal.SIGINT)
      assert time.monotonic() - began < 10
    assert changed.wait(10) and listener.told and not listener.is_hurried
  finally:
    stopping.close()


def test_an_interrupt_that_became_another_error_is_an_interrupt(monkeypatch):
  fails = lambda: 1 / 0
  with pytest.raises(ZeroDivisionError):
    stopping.uninterrupted(fails)
  listener = stopping.Listener()
  monkeypatch.setattr(stopping, '_listener', listener)
  listener.told = True  # and what is at hand is finished
  with pytest.raises(ZeroDivisionError):
    stopping.uninterrupted(fails)
  listener.raises = True
  with pytest.raises(KeyboardInterrupt):
    stopping.uninterrupted(fails)
  assert stopping.uninterrupted(lambda: 7) == 7


def test_the_first_ctrl_c_after_another_process_was_told_is_no_second_one(capfd):
  listener = stopping.Listener()
  listener.tell('process 1 was told')
  listener.tell('again')
  assert capfd.readouterr().err == 'process 1 was told\n' and listener.code == 75
  listener.hear(signal.SIGINT)
  assert not listener.is_hurried and listener.code == 130
  listener.hear(signal.SIGINT)
  assert listener.is_hurried


@pytest.mark.filterwarnings('ignore:os.fork')  # which jax warns of, and which ends here
def test_signals_are_left_as_they_were():
  before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
  listener = stopping.hear()
  try:
    assert stopping.hear() is listener is stopping.current() and signal.getsignal(signal.SIGTERM) not in before
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a library may
    listener.install()
    assert signal.getsignal(signal.SIGTERM) == listener._handle
    child = os.fork()
    if not child:
      os._exit(0 if stopping.current() is None and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
  finally:
    stopping.close()
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
  assert stopping.current() is None


class Slow:
  """An array that the devices do not come to."""

  def block_until_ready(self):
    time.sleep(100)


@pytest.mark.slow
def test_a_wave_that_is_left_loses_nothing(finished, tmp_path, data_dir, monkeypatch):
  """SIGTERM in the third step's wave, which goes on: the state of two steps is saved past the devices."""
  with monkeypatch.context() as patch:
    wait = processes.StopSignal.wait

    def waits(self, x):
      if self.doing == 'step 2':
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        x = Slow()
      wait(self, x)

    patch.setattr(processes.StopSignal, 'wait', waits)
    with pytest.raises(SystemExit, match='stopped after 2 of 4 steps'):
      run(tmp_path, data_dir, evaluate__every=0)
  run(tmp_path, data_dir, evaluate__every=0)
  assert kills.arrays_of(tmp_path).keys() == kills.arrays_of(pathlib.Path(finished)).keys()
  of_steps = lambda workdir: [line for line in kills.metrics_of(pathlib.Path(workdir)) if 'loss' in line]
  assert of_steps(tmp_path) == of_steps(finished)
  assert not [name for name in kills.differences(tmp_path, pathlib.Path(finished)) if name.endswith('differs')]


@pytest.mark.slow
def test_a_verdict_that_hangs_does_not_hold_up_a_stop(tmp_path, capfd):
  """The pool asks while it waits for replies, of workers that start or compute."""
  (tmp_path / 'slow.py').write_text('import time\n\n\ndef slow(completion, task):\n  time.sleep(100)\n')
  with processes.StopSignal('step 2') as stopping, rewards.Workers(
      rewards.Config(verifier=f'{tmp_path}/slow.py:slow', timeout_s=100.0, workers=1)) as pool:
    stopping.begin()
    pool.leave_by(stopping.leave)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    task = types.Task(id='t', index=0, prompt='', answer='', difficulty=0, solution='', tokens=(2,))
    began = time.monotonic()
    with pytest.raises(processes.Stopped):
      stopping.during(lambda: pool.score(['x'], [task]))
    assert time.monotonic() - began < 30
  assert 'SIGTERM: leaving step 2' in capfd.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize('count', [1, 2])
def test_a_stop_in_each_phase_loses_nothing(tmp_path, data_dir, count):
  for moment, ended, wrong in kills.stops(kills.Runs(tmp_path, count, data_dir)):
    print(moment, ended.codes, ended.took_s)
    assert not wrong, (moment, wrong)
