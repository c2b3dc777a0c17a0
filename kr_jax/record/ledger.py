"""What each phase of each step took, over all starts of a run: ledger.jsonl in the workdir.

An attempt is one start of the process. It begins with a line of its own, has a line for each phase of each step, and
ends with a line, 'done', 'stopped' or 'failed', unless it is killed. Lines are appended and never dropped: the steps
that are repeated after a kill cost what they cost. While a step runs, what it has taken so far stands in
ledger.now.json, written again every quarter of a second, so that a kill loses no more; the next attempt appends it, as
`cut`.

A line of a phase: attempt, step, phase (of phases.PHASES), began (unix time), wall_s, device_s (wall_s times the
devices held), busy_s (seconds in which the devices had work, at the most), peak_bytes (of the busiest device where
devices tell, else of the process; null: not seen), joules (measured; null: nothing measures them), and counters, exact
integers, each where there is something to count: rollouts, tokens_prompt, tokens_generated, tokens_updated,
tokens_computed, tokens_padded, flops_useful, flops_executed, collective_bytes, host_bytes, hbm_bytes_read (at least, by
decoding), checkpoint_bytes, compiles.
The seconds of all lines of an attempt add up to its wall time.
"""

from __future__ import annotations

from collections.abc import Callable
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

import jax
import psutil

from kr_jax import phases
from kr_jax import processes

_NAME, _NOW = 'ledger.jsonl', 'ledger.now.json'
_EVERY_S = 0.25  # between two writes of what a step has taken so far


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
    with open(path, 'rb') as file:
      *lines, rest = file.read().split(b'\n')
  except OSError as error:
    found.problems.append(f'{path} cannot be read: {error.strerror}')
    return found
  unread = bool(rest)
  for line in lines:
    try:
      record = json.loads(line)
      kind = (found.attempts if 'started' in record else found.ends if 'ended' in record else found.entries)
      if kind is found.entries and not {'attempt', 'step', 'phase', 'wall_s'} <= set(record):
        raise ValueError
      kind.append(record)
    except (ValueError, TypeError):
      unread += 1
  if unread:
    found.problems.append(f'{path}: {unread:d} of {len(lines) + bool(rest)} lines are no records and were left out')
  return found


def environment() -> dict[str, Any]:
  """Of this process: its command, the commit of the code, where it is a checkout, versions and devices."""
  device = jax.devices()[0]
  return {'command': shlex.join(['python', '-m', 'kr_jax.main', *sys.argv[1:]]), 'commit': _commit(),
          'versions': {name: importlib.metadata.version(name) for name in ('kr_jax', 'jax')},
          'platform': device.platform, 'device_kind': device.device_kind, 'devices': jax.device_count(),
          'processes': jax.process_count(), 'cores': os.cpu_count()}


def _commit() -> str | None:
  """Of the checkout that this code stands in, with a + where files have changed since."""
  git = lambda *args: subprocess.run(('git', '-C', os.path.dirname(__file__), *args), capture_output=True, text=True,
                                     check=True, timeout=10).stdout.strip()
  try:
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

  Attributes:
    about: the attempt's first line.
  """

  def __init__(self, workdir: str, clock: phases.Clock, first_step: int, about: dict[str, Any],
               meter: Callable[[], float | None] = lambda: None):
    self._clock, self._step, self._meter, self._joules = clock, first_step, meter, meter()
    self._devices, self._thread = jax.device_count(), None
    self._path, self._now = (os.path.join(workdir, name) for name in (_NAME, _NOW))
    self.memory = 'device' if any(device.memory_stats() for device in jax.local_devices()) else 'host'
    self._peaks, self._process = {}, psutil.Process()
    self._is_first, self._lock, self._stopping = processes.is_first(), threading.Lock(), threading.Event()
    self.attempt = 0
    if self._is_first:
      self._recover(workdir)
    self.about = {'attempt': self.attempt, 'started': round(clock.began, 3), 'first_step': first_step,
                  'memory': self.memory, **about}
    if not self._is_first:
      return
    self._append([self.about])
    self._thread = threading.Thread(target=self._beat, name='ledger', daemon=True)
    self._thread.start()

  def _recover(self, workdir: str) -> None:
    """Appends what a kill has cut, and finds the number of this attempt."""
    if os.path.exists(self._path):
      with open(self._path, 'rb+') as file:
        file.truncate(file.read().rfind(b'\n') + 1)  # a line that was cut short
    else:
      open(self._path, 'ab').close()
    self.attempt = len(read(workdir).attempts)
    try:
      with open(self._now) as file:
        now = json.load(file)
      # If lines were appended after it was written, they hold what it holds.
      if now['size'] == os.path.getsize(self._path):
        self._append([entry | {'cut': True} for entry in now['entries']])
    except (OSError, ValueError, KeyError, TypeError):
      pass  # there is none, or nothing in it

  def _append(self, records: list[dict[str, Any]]) -> None:
    with open(self._path, 'ab') as file:
      file.write(''.join(json.dumps(record) + '\n' for record in records).encode())

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
    self._joules = joules
    self._clock.sample(memory_bytes=in_use, joules=more)

  def _beat(self) -> None:
    while not self._stopping.wait(_EVERY_S):
      with contextlib.suppress(OSError):  # of a full disk the run's own writes will tell
        self.snapshot()

  def snapshot(self) -> None:
    """Samples, and writes what the step has taken so far."""
    self.sample()
    with self._lock:
      now = {'size': os.path.getsize(self._path), 'entries': self._entries(self._clock.rows())}
      with open(f'{self._now}.tmp', 'w') as file:
        json.dump(now, file)
      os.replace(f'{self._now}.tmp', self._now)

  def step(self, step: int, next_step: int | None = None) -> list[dict[str, Any]]:
    """Writes what a step took, and returns it. next_step: of what follows; None: the one after it."""
    with self._lock:
      self._step = step
      entries = self._entries(self._clock.drain())
      self._step = step + 1 if next_step is None else next_step
      if self._is_first:
        self._append(entries)
      return entries

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, error: type[BaseException] | None, *_) -> None:
    if self._is_first:
      self._stopping.set()
      self._thread.join()
      self.step(self._step)
      reason = 'done' if error is None else 'stopped' if issubclass(error, SystemExit) else 'failed'
      self._append([{'attempt': self.attempt, 'ended': round(time.time(), 3), 'reason': reason}])
      with contextlib.suppress(FileNotFoundError):
        os.remove(self._now)
