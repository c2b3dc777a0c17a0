"""What each phase of each step took, over all starts of a run: ledger.jsonl in the workdir.

An attempt is one start of the process. It begins with a line of its own, has a line for each phase of each step, and
ends with a line, 'done', 'stopped' or 'failed', unless it is killed. Lines are appended and never dropped: the steps
that are repeated after a kill cost what they cost. While a step runs, what it has taken so far stands in
ledger.now.json, written again whenever the attempt has taken a fiftieth more, every half second at most and every two
seconds at least, so that a kill loses no more, and before each checkpoint, so that a kill loses no step that is not
repeated; the next attempt appends it, as `cut`.

A line of a phase: attempt, step, phase (of phases.PHASES), began (unix time), wall_s, device_s (wall_s times the
devices held), busy_s (seconds in which the devices had work, at the most), peak_bytes (of the busiest device where
devices tell, else of the process; null: not seen), joules (measured; null: nothing measures them), busy_share (of time,
as a TPU tells it; absent: it does not), and counters, exact integers, each where there is something to count: rollouts,
tokens_prompt, tokens_generated, tokens_updated, tokens_computed, tokens_padded, flops_useful, flops_executed,
collective_bytes, host_bytes, hbm_bytes_read (at least, by decoding), checkpoint_bytes, compiles (programs that
XLA was asked for), compiles_cached (those of them that the cache of compiled programs had).
The seconds of all lines of an attempt add up to its wall time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import contextlib
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

from absl import logging
import jax
import psutil

from kr_jax import files
from kr_jax import phases
from kr_jax import processes
from kr_jax.record import lines as lines_lib

_NAME, _NOW = 'ledger.jsonl', 'ledger.now.json'
_EVERY_S = 0.5  # between two samples; and two writes of what a step has taken so far, at the least
_LOST = 0.02  # of an attempt, the most that a kill loses, where it is between _EVERY_S and _APPEND_S
_APPEND_S = 2.0  # between two writes of the steps that have ended since; until then they stand in ledger.now.json too
_BUSY_EVERY = 4  # samples
_JOIN_S = 10  # for a sample to end: a driver may hang


class Ledger(NamedTuple):
  """What a ledger.jsonl holds."""

  attempts: list[dict[str, Any]]
  entries: list[dict[str, Any]]
  ends: list[dict[str, Any]]
  problems: list[str]  # what could not be read


def read(workdir: str) -> Ledger:
  """The ledger of a run; empty, with a problem that says so, where there is none."""
  found = Ledger([], [], [], [])
  path = os.path.join(workdir, _NAME)
  try:
    lines = lines_lib.read(path, is_record)
  except OSError as error:
    found.problems.append(f'{path} cannot be read: {error.strerror}')
    return found
  for record in lines.records:
    kind = found.attempts if 'started' in record else found.ends if 'ended' in record else found.entries
    kind.append(record)
  if unread := len(lines.unread) + lines.is_cut:
    found.problems.append(f'{path}: {unread} of {len(lines.records) + unread} lines are no records and were left out')
  return found


def is_record(record: dict[str, Any]) -> bool:
  """Whether an object is a line of a ledger: of a phase, or the first or the last of an attempt."""
  return 'started' in record or 'ended' in record or {'attempt', 'step', 'phase', 'wall_s'} <= record.keys()


def environment() -> dict[str, Any]:
  """Of this process: its command, the commit of the code, where it is a checkout, versions and devices."""
  device = jax.devices()[0]
  return {'command': _command(), 'commit': _commit(),
          'versions': {name: _version(name) for name in ('kr_jax', 'jax')},
          'platform': device.platform, 'device_kind': device.device_kind, 'devices': jax.device_count(),
          'processes': jax.process_count(), 'cores': os.cpu_count()}


def _command() -> str | None:
  """None where it was another program that called, such as a notebook."""
  main = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'main.py')
  if sys.argv and os.path.basename(sys.argv[0]) == 'kr_jax':  # the console command
    return shlex.join(['kr_jax', *sys.argv[1:]])
  is_main = bool(sys.argv) and os.path.abspath(sys.argv[0]) == main
  return shlex.join(['python', '-m', 'kr_jax.main', *sys.argv[1:]]) if is_main else None


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
    return None


def _commit() -> str | None:
  """Of the checkout that this code is a part of, with a + where files have changed since; None where it is of none."""
  git = lambda *args: subprocess.run(('git', '-C', os.path.dirname(__file__), *args), capture_output=True, text=True,
                                     check=True, timeout=10).stdout.strip()
  try:
    git('ls-files', '--error-unmatch', os.path.basename(__file__))  # a package may lie in another project's checkout
    return git('rev-parse', '--short=12', 'HEAD') + '+' * bool(git('status', '--porcelain', '--untracked-files=no'))
  except (OSError, subprocess.SubprocessError):
    return None


class Writer:
  """Writes the ledger of this attempt; of several processes the first does.

  Args:
    clock: of the run.
    first_step: the step that the attempt begins with.
    about: of the attempt, for its first line: plain values.
    meter: joules that the machine has taken so far, or None.
    busy: the share of time in which devices say that they are busy, or None; asked once a second, unless it is None at
      first.

  Attributes:
    about: the attempt's first line.
  """

  def __init__(self, workdir: str, clock: phases.Clock, first_step: int, about: dict[str, Any],
               meter: Callable[[], float | None] = lambda: None, busy: Callable[[], float | None] = lambda: None):
    self._clock, self._step, self._meter, self._joules = clock, first_step, meter, meter()
    self._devices, self._thread, self._samples = jax.device_count(), None, 0
    self._busy = busy if busy() is not None else lambda: None
    self._path, self._now = (os.path.join(workdir, name) for name in (_NAME, _NOW))
    self.memory = 'device' if any(device.memory_stats() for device in jax.local_devices()) else 'host'
    self._peaks, self._process = {}, psutil.Process()
    self._waiting: list[str] = []  # lines of steps that have ended
    self._appended = time.monotonic()
    self._is_first, self._lock, self._stopping = processes.is_first(), threading.Lock(), threading.Event()
    self.attempt = 0
    if self._is_first:
      self._recover(workdir)
    self.about = {'attempt': self.attempt, 'started': round(clock.began, 3), 'first_step': first_step,
                  'memory': self.memory, **about}
    if not self._is_first:
      return
    self._append([json.dumps(self.about)])
    self._thread = threading.Thread(target=self._beat, name='ledger', daemon=True)
    self._thread.start()

  def _recover(self, workdir: str) -> None:
    """Appends what a kill has cut, and finds the number of this attempt."""
    if os.path.exists(self._path):
      with open(self._path, 'rb+') as file:
        size = file.truncate(file.read().rfind(b'\n') + 1)  # a line that was cut short
      lines = lines_lib.read(self._path, is_record)
      if lines.unread:
        logging.warning('%s is damaged: %s cannot be read as records. The file is kept as %s, and the run goes on with '
                        'the other %d lines', self._path, lines_lib.numbered(lines.unread),
                        lines_lib.set_aside(self._path), len(lines.records))
        files.write(self._path, ''.join(json.dumps(record) + '\n' for record in lines.records))
    else:
      open(self._path, 'ab').close()
      size = 0
    numbers = (attempt.get('attempt') for attempt in read(workdir).attempts)
    self.attempt = max((n for n in numbers if type(n) is int), default=-1) + 1
    try:
      with open(self._now) as file:
        now = json.load(file)
      # If lines were appended after it was written, they hold what it holds.
      if now['size'] == size:
        self._append([json.dumps(entry | {'cut': True}) for entry in now['entries'] if is_record(entry)])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
      pass  # there is none, or nothing in it

  def _append(self, lines: Iterable[str]) -> None:
    with open(self._path, 'ab') as file:
      file.write(''.join(line + '\n' for line in lines).encode())

  def go_back(self, step: int) -> None:
    """Corrects the step that the attempt begins with, before any of its lines: an older checkpoint had to be taken."""
    with self._lock:
      self.about['first_step'] = self._step = step
      if self._is_first:
        with open(self._path, 'rb+') as file:
          file.truncate(file.read().rstrip(b'\n').rfind(b'\n') + 1)  # the last line, which is the attempt's first
        self._append([json.dumps(self.about)])

  def _entries(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{'attempt': self.attempt, 'step': self._step, **row, 'wall_s': round(row['wall_s'], 6),
             'busy_s': round(row['busy_s'], 6), 'device_s': round(row['wall_s'] * self._devices, 6)} for row in rows]

  def sample(self) -> None:
    """Notes memory and energy now, of the phase that runs."""
    in_use = None
    if self.memory == 'host':
      in_use = self._process.memory_info().rss
    for device in jax.local_devices() if self.memory == 'device' else ():
      stats = device.memory_stats() or {}
      peak = stats.get('peak_bytes_in_use', 0)  # of the process: it tells of this phase where it has grown
      grown, self._peaks[device.id] = peak > self._peaks.get(device.id, 0), peak
      in_use = max(in_use or 0, peak if grown else stats.get('bytes_in_use', 0))
    joules, before = self._meter(), self._joules
    more = None if joules is None or before is None else max(joules - before, 0.0)
    if joules is not None:  # else the next reading tells what was taken meanwhile
      self._joules = joules
    self._samples += 1
    busy_share = None if self._samples % _BUSY_EVERY else self._busy()
    self._clock.sample(memory_bytes=in_use, joules=more, busy_share=busy_share)

  def _beat(self) -> None:
    written = time.monotonic()
    while not self._stopping.wait(_EVERY_S):
      with contextlib.suppress(Exception):  # of a full disk the run's own writes will tell
        self.sample()
        now, took_s = time.monotonic(), self._clock.now - self._clock.began
        if now + _EVERY_S - written > min(_LOST * took_s, _APPEND_S):  # if it waited for the next sample
          self.snapshot()
          written = now

  def snapshot(self) -> None:
    """Writes what the step has taken so far."""
    with self._lock:
      if not self._is_first or self._stopping.is_set():  # what it would write is in the ledger, or soon will be
        return
      entries = ', '.join([*self._waiting, *map(json.dumps, self._entries(self._clock.rows()))])
      with open(f'{self._now}.tmp', 'w') as file:
        file.write(f'{{"size": {os.path.getsize(self._path)}, "entries": [{entries}]}}')
      os.replace(f'{self._now}.tmp', self._now)

  def step(self, step: int, next_step: int | None = None) -> list[dict[str, Any]]:
    """Writes what a step took, and returns it. next_step: of what follows; None: the one after it."""
    with self._lock:
      self._step = step
      entries = self._entries(self._clock.drain())
      self._step = step + 1 if next_step is None else next_step
      if self._is_first:
        self._waiting += map(json.dumps, entries)
        if time.monotonic() - self._appended >= _APPEND_S:
          self._flush()
      return entries

  def flush(self) -> None:
    """Writes the lines of the steps that have ended."""
    with self._lock:
      self._flush()

  def _flush(self) -> None:
    waiting, self._waiting = self._waiting, []
    self._append(waiting)
    self._appended = time.monotonic()

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, error: type[BaseException] | None, *_) -> None:
    if not self._is_first:
      return
    self._stopping.set()
    self._thread.join(_JOIN_S)
    reason = 'done' if error is None else 'stopped' if issubclass(error, (SystemExit, KeyboardInterrupt)) else 'failed'
    # Where the run fails, its own error is raised, and not that the ledger's disk is full too.
    with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):
      self.step(self._step)
      self.flush()
      self._append([json.dumps({'attempt': self.attempt, 'ended': round(self._clock.now, 3), 'reason': reason})])
      with contextlib.suppress(FileNotFoundError):
        os.remove(self._now)
