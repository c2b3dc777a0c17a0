"""Bars and plain lines: what is shown where, and that no stream can stop a run."""

import io
import os
import subprocess
import sys
import types

import pytest
import tqdm

from kr_jax import progress


class Terminal(io.StringIO):
  """A terminal of 90 columns."""

  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  """A clock that a test sets."""
  now = types.SimpleNamespace(s=100.0)
  fake = types.SimpleNamespace(monotonic=lambda: now.s, time=lambda: now.s)
  monkeypatch.setattr(progress, 'time', fake)
  return now


@pytest.fixture
def terminal(monkeypatch):
  """A function that makes stderr a terminal and returns its output; pytest sets sys.stderr between fixture and test."""

  def terminal():
    stream = Terminal()
    monkeypatch.setattr(sys, 'stderr', stream)
    monkeypatch.setattr(progress, '_is_terminal', progress.Stream.isatty)
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.delenv('NO_COLOR', raising=False)
    return stream

  return terminal


def test_plain_lines(capsys, clock):
  """A line every ten seconds at most, and one at the end; 4 s a step from step 2 on, compilation left out."""
  with progress.Progress('knapsack', 2, 8) as bar:
    bar.compiling()
    clock.s += 34
    bar.leave_out(30)
    for _ in range(3):
      bar.set_postfix(reward='0.52', budgets='2-16')
      bar.update()
      clock.s += 4
    bar.update(3)
  assert capsys.readouterr().err.splitlines() == [
      'knapsack: 2 of 8 steps, compiling',
      'knapsack: 3 of 8 steps, 4 s a step, 00:20 left; reward=0.52, budgets=2-16',
      'knapsack: 8 of 8 steps, 2.67 s a step; reward=0.52, budgets=2-16']
  assert (bar.n, bar.total) == (8, 8)


def test_plain_lines_of_bytes_and_of_what_leaves_nothing(capsys, clock):
  with progress.Progress('weights', 0, 3_000_000, 'B') as bar:
    bar.update(3_000_000)
    with progress.Progress('evaluation', 0, 3, 'rollout', leave=False) as inner:
      inner.update()
      clock.s += 10
      inner.update()
      inner.update()
  assert capsys.readouterr().err.splitlines() == [
      'evaluation: 2 of 3 rollouts, 5 s a rollout, 00:05 left', 'weights: 3.00MB of 3.00MB']


def test_nothing_is_shown_where_it_is_disabled(capsys):
  with progress.Progress('knapsack', 0, 2, disable=True) as bar:
    bar.compiling()
    bar.write('a line')
    bar.update()
  assert bar.n == 1 and capsys.readouterr() == ('', '')


def test_a_bar_in_a_terminal(terminal, capsys):
  stream = terminal()
  with progress.Progress('knapsack', 3, 10) as bar:
    bar.compiling()
    assert 'knapsack (compiling):' in stream.getvalue()
    bar.leave_out(1e6)  # more than has passed: the rate is of what is left, and nothing is negative
    bar.update(7)
    assert isinstance(bar._bar, tqdm.tqdm) and bar._bar.desc == 'knapsack'
    assert bar._bar.last_print_t <= bar._bar._time()
    bar.write('one')
    bar.write('two', alarm=True)
  shown = stream.getvalue()
  assert '\rknapsack' in shown and '10/10' in shown and '?step/s' in shown
  assert capsys.readouterr().out == 'one\nALARM: two\n'


def test_time_left_out_of_a_bar(terminal):
  terminal()
  with progress.Progress('knapsack', 0, 10) as bar:
    start, last = bar._bar.start_t, bar._bar.last_print_t
    bar._bar.start_t -= 40
    bar._bar.last_print_t -= 40
    bar.leave_out(30)
    assert bar._bar.start_t == pytest.approx(start - 10) and bar._bar.last_print_t == pytest.approx(last - 10)
    bar.update()
    assert bar._bar.format_dict['rate'] == pytest.approx(0.1, rel=0.1)


def test_an_alarm_stands_out_in_a_terminal(monkeypatch, terminal):
  stream = terminal()
  monkeypatch.setattr(sys, 'stdout', stream)
  progress.say('none was right', alarm=True)
  assert stream.getvalue() == '\x1b[1;33mALARM\x1b[0m: none was right\n'
  monkeypatch.setenv('NO_COLOR', '1')
  progress.say('none', alarm=True)
  assert stream.getvalue().endswith('\nALARM: none\n')


def test_a_notebook_has_its_own_bar(monkeypatch, capsys):
  made = []

  class Bar(tqdm.tqdm):
    def __init__(self, **given):
      made.append(given)
      super().__init__(**given, file=io.StringIO())

  monkeypatch.setitem(sys.modules, 'ipykernel.zmqshell', types.ModuleType('zmqshell'))
  monkeypatch.setitem(sys.modules, 'tqdm.notebook', types.SimpleNamespace(tqdm=Bar))
  monkeypatch.setattr(tqdm, 'notebook', types.SimpleNamespace(tqdm=Bar), raising=False)
  for has_widgets in (False, True):
    monkeypatch.setattr(progress.importlib.util, 'find_spec', lambda name: has_widgets or None)
    with progress.Progress('knapsack', 0, 2) as bar:
      bar.update(2)
  assert len(made) == 1 and made[0]['desc'] == 'knapsack' and 'file' not in made[0]
  assert capsys.readouterr().err.startswith('knapsack: 2 of 2 steps')  # without widgets: plain lines


class Broken:
  """A stream that fails at all."""

  encoding = 'utf-8'

  def __init__(self, error):
    self._error = error

  def write(self, text):
    raise self._error

  def flush(self):
    raise self._error

  def isatty(self):
    raise self._error


@pytest.mark.parametrize('error', [BrokenPipeError(), OSError(28, 'full'), ValueError('closed file'), None])
def test_a_stream_that_fails_stops_nothing(monkeypatch, error):
  for name in ('stdout', 'stderr'):
    monkeypatch.setattr(sys, name, error and Broken(error))
  with progress.Progress('knapsack', 0, 2) as bar:
    bar.compiling()
    bar.update()
    bar.write('x', alarm=True)


def test_a_terminal_that_breaks_stops_nothing(monkeypatch, terminal):
  terminal()
  with progress.Progress('knapsack', 0, 2) as bar:
    monkeypatch.setattr(sys, 'stderr', Broken(BrokenPipeError()))
    bar.update()
    bar.set_postfix(x=1)


def test_ascii_alone(monkeypatch):
  raw = io.BytesIO()
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, 'ascii'))
  progress.say('0.5 ± 0.1 … 中')
  assert raw.getvalue() == b'0.5 +- 0.1 ... ?\n'


@pytest.mark.parametrize('columns, is_terminal', [(0, False), (80, True)])
def test_a_terminal_without_columns_gets_lines(monkeypatch, columns, is_terminal):
  stream = types.SimpleNamespace(isatty=lambda: True, fileno=lambda: 7)
  monkeypatch.setattr(progress.os, 'get_terminal_size', lambda fd: types.SimpleNamespace(columns=columns))
  assert progress._is_terminal(progress.Stream(lambda: stream)) == is_terminal


PROGRAM = """
import os, sys
from kr_jax import progress
progress.harden()
progress.harden()
from absl import logging
assert open(os.devnull).fileno() > 2
for i in range(3000):
  print('grün ± 中', i)
logging.warning('wärning')
progress.say('0.5 ± 0.1 ü')
with progress.Progress('bar', 0, 3) as bar:
  bar.update(3)
os.system('echo of a child; echo of a child >&2')
print('the end')
if len(sys.argv) > 1:
  raise ValueError('Ümlaut')
sys.exit(7)
"""


def hardened(shell, *arguments, **environment):
  """The status and output of PROGRAM by a line of the shell, in which $P is it."""
  found = subprocess.run(
      ['bash', '-c', shell], capture_output=True, timeout=60, cwd=os.path.dirname(os.path.dirname(__file__)),
      env=os.environ | {'P': f'{sys.executable} - {" ".join(arguments)}', 'PROGRAM': PROGRAM} | environment)
  return found.returncode, found.stdout.decode(), found.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize('shell, arguments', [
    ('$P | head -1; exit ${PIPESTATUS[0]}', ''), ('$P >&- 2>&-', ''), ('$P >/dev/full 2>/dev/full', 'raise'),
    *(pytest.param(shell, argument, marks=pytest.mark.exhaustive) for argument in ('', 'raise') for shell in (
        '$P >&-', '$P 2>&-', '$P >/dev/full', '$P 2>/dev/full',
        '{ $P 2>&1 >&3; } 3>&1 | head -c 1; exit ${PIPESTATUS[0]}'))])
def test_a_broken_stream_changes_no_exit_status(shell, arguments):
  status, _, errors = hardened(shell.replace('$P', '$P <<<"$PROGRAM"', 1), *filter(None, [arguments]))
  assert status == (1 if arguments else 7) and 'BrokenPipe' not in errors and 'Exception ignored' not in errors


@pytest.mark.parametrize('encoding', ['ascii', 'ascii:strict', 'utf-8'])
def test_a_stream_of_any_encoding(encoding):
  status, output, errors = hardened('$P 2>&1 <<<"$PROGRAM"', 'raise', PYTHONIOENCODING=encoding)
  if encoding.startswith('ascii'):
    expected = ['gr\\xfcn +- \\u4e2d 2999', '0.5 +- 0.1 \\xfc', 'the end', 'ValueError: \\xdcmlaut']
  else:
    expected = ['grün ± 中 2999', '0.5 ± 0.1 ü', 'the end', 'ValueError: Ümlaut']
  assert status == 1 and set(expected) <= set(output.splitlines())


def test_who_hears_what_is_said(capsys):
  heard = []
  with progress.heard_by(lambda text, alarm: heard.append((text, alarm))):
    progress.say('x')
    progress.say('y', alarm=True)
    with progress.Progress('bar', 0, 1):
      pass
  progress.say('z')
  assert heard == [('x', False), ('y', True), ('bar: 0 of 1 steps', False)]


def test_a_clock_that_is_set_changes_no_bar(monkeypatch, terminal):
  """By hours, back and forth: tqdm takes the time of day, unless it is told another."""
  terminal()
  import time
  day = time.time
  with progress.Progress('knapsack', 0, 100) as bar:
    for hours in (-5, 5, 0):
      monkeypatch.setattr(time, 'time', lambda: day() + 3600 * hours)
      bar.leave_out(0.0)
      bar.update()
      assert 0 <= bar._bar.format_dict['elapsed'] < 60 and bar._bar.start_t <= bar._bar._time()
