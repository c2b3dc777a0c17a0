"""What a soak sees of a run from outside: its steps, and what the process and those below it hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import glob
import json
import os
import re
import signal
import time
from typing import Any, NamedTuple

LONG = 400  # steps of an attempt whose slopes are judged: memory settles in the first few hundred
# Of the last half of a long attempt: the most that each may grow in 100 steps.
MOST_GROWTH = {'memory_kb': 2048.0, 'open_files': 1.0, 'threads': 1.0, 'processes': 1.0, 'compiled': 1.0}


class Sample(NamedTuple):
  """Of one moment."""

  step: int
  memory_kb: int  # resident, of the main process
  open_files: int
  threads: int
  processes: int  # below it
  compiled: int  # programs, as the last step's line says


def records(workdir: str) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl that can be read."""
  found = []
  with contextlib.suppress(OSError), open(os.path.join(workdir, 'metrics.jsonl'), 'rb') as file:
    for line in file.read().split(b'\n')[:-1]:
      with contextlib.suppress(ValueError):
        if isinstance(record := json.loads(line), dict):
          found.append(record)
  return found


def steps(workdir: str) -> list[int]:
  """The steps that have a line, in their order."""
  return [record['step'] for record in records(workdir) if 'reward_mean' in record]


class Tail:
  """The newest step of a metrics.jsonl that grows, and that the next attempt writes anew."""

  def __init__(self, workdir: str):
    self._path, self._file, self._at = os.path.join(workdir, 'metrics.jsonl'), None, 0
    self.step, self.compiled = -1, 0

  def look(self) -> int:
    try:
      found = os.stat(self._path)
    except OSError:
      return self.step
    if found.st_ino != self._file or found.st_size < self._at:
      self._file, self._at, self.step = found.st_ino, 0, -1
    with contextlib.suppress(OSError), open(self._path, 'rb') as file:
      file.seek(self._at)
      read = file.read()
      whole = read[:read.rfind(b'\n') + 1]
      self._at += len(whole)
      for line in whole.split(b'\n'):
        with contextlib.suppress(ValueError, TypeError, KeyError):
          record = json.loads(line)
          if 'reward_mean' in record:
            self.step, self.compiled = record['step'], record['compile_count']
    return self.step


def below(pid: int) -> list[int]:
  """The processes that a process has started, and theirs."""
  of_parent: dict[int, list[int]] = {}
  for path in glob.glob('/proc/[0-9]*/stat'):
    with contextlib.suppress(OSError), open(path) as file:
      state, parent = file.read().rpartition(')')[2].split()[:2]
      if state != 'Z':
        of_parent.setdefault(int(parent), []).append(int(path.split('/')[2]))
  found = [*of_parent.get(pid, [])]
  for child in found:
    found += of_parent.get(child, [])
  return found


def sample(pid: int, tail: Tail) -> Sample | None:
  """What a process holds; None: it is gone."""
  try:
    with open(f'/proc/{pid}/status') as file:
      status = dict(re.findall(r'^(\w+):\s+(\d+)', file.read(), re.MULTILINE))
    return Sample(tail.look(), int(status['VmRSS']), len(os.listdir(f'/proc/{pid}/fd')), int(status['Threads']),
                  len(below(pid)), tail.compiled)
  except (OSError, KeyError):
    return None


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
  """Of the least squares line."""
  mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
  spread = sum((x - mean_x) ** 2 for x in xs)
  return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / spread if spread else 0.0


def growth(samples: Sequence[Sample]) -> dict[str, Any] | None:
  """How what an attempt holds grows over the last half of its steps, in 100 of them; None: it had few steps. At its
  last step it may be ending."""
  samples = [x for x in samples if 0 <= x.step < samples[-1].step]
  if not samples or samples[-1].step - samples[0].step < LONG:
    return None
  half = [x for x in samples if x.step >= (samples[0].step + samples[-1].step) / 2]
  found = {name: round(100 * slope([x.step for x in half], [getattr(x, name) for x in half]), 3)
           for name in MOST_GROWTH}
  grows = [name for name, most in MOST_GROWTH.items() if found[name] > most]
  return {'steps': [samples[0].step, samples[-1].step], 'of_steps': [half[0].step, half[-1].step],
          'last': half[-1]._asdict(), 'growth_in_100_steps': found, 'grows': grows}


def living(pids: Sequence[int]) -> list[int]:
  """Which of the processes are not dead."""
  found = []
  for pid in pids:
    with contextlib.suppress(OSError), open(f'/proc/{pid}/stat') as file:
      found += [pid] if file.read().rpartition(')')[2].split()[0] != 'Z' else []
  return found


def gone(pids: Sequence[int], seconds: float) -> bool:
  """Whether all are dead within so many seconds."""
  return next((True for _ in every(0.05, seconds) if not living(pids)), False)


def every(wait_s: float, seconds: float) -> Iterator[None]:
  """Goes on for so many seconds, in steps of wait_s."""
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    yield
    time.sleep(wait_s)


def send(pid: int, number: int = signal.SIGKILL) -> None:
  """A signal to a process that may be gone."""
  with contextlib.suppress(ProcessLookupError):
    os.kill(pid, number)
