"""The faults of a soak, and what each must come to."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from typing import Any, NamedTuple

from kr_jax import exits
from tests.soak import watch

_KILLED = -signal.SIGKILL


class Fault(NamedTuple):
  """What is done to a run at a step, or to what a killed one left."""

  do: Callable[[Any], str | None]  # of the soak, while the run runs; a text: what went wrong
  codes: tuple[int, ...] = ()  # one of which the run must end with; (): it must go on
  seconds: float = 60.0  # for its end, or for its next step
  keeps: str = 'checkpoint'  # what the next start goes on from: 'step', 'checkpoint', 'one before'
  then: Callable[[Any], str | None] = lambda soak: None  # after its end


def _signals(*numbers: int, to_group: bool = False) -> Callable[[Any], None]:
  def do(soak) -> None:
    for number in numbers:
      if to_group:
        os.killpg(soak.pid, number)
      else:
        watch.send(soak.pid, number)
      time.sleep(0.3)
  return do


def _kill_a_worker(soak) -> str | None:
  """The youngest process below: a worker."""
  if not (found := watch.below(soak.pid)):
    return 'there is no process below'
  watch.send(found[-1])


def _kill_the_server(soak) -> str | None:
  if not (found := watch.below(soak.pid)):
    return 'there is no process below'
  watch.send(found[0])


def _verifier(what: str, seconds: float) -> Callable[[Any], None]:
  def do(soak) -> None:
    path = os.path.join(soak.folder, 'faults', what)
    with open(path, 'w'):
      time.sleep(seconds)
    os.unlink(path)
  return do


def _damage(soak) -> str | None:
  """Of a file of the newest checkpoint a bit is turned, or it is cut, or it is gone."""
  if not (numbers := soak.checkpoints()):
    return None  # killed before there was one
  newest = os.path.join(soak.workdir, 'checkpoints', str(numbers[-1]))
  paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(newest) for name in names)
  path, how = soak.random.choice(paths), soak.random.choice(('bit', 'cut', 'gone'))
  size = os.path.getsize(path)
  if how == 'gone' or not size:
    os.unlink(path)
  elif how == 'cut':
    os.truncate(path, soak.random.randrange(size))
  else:
    with open(path, 'r+b') as file:
      at = soak.random.randrange(size)
      file.seek(at)
      byte = file.read(1)[0]
      file.seek(at)
      file.write(bytes([byte ^ 1 << soak.random.randrange(8)]))
  soak.note(f'{how}: {os.path.relpath(path, soak.workdir)}')


def _cut_metrics(soak) -> None:
  """The last line is half a line, then there is what is no line at all. Where a checkpoint is behind its step, no step
  of the run writes it again."""
  path = os.path.join(soak.workdir, 'metrics.jsonl')
  before = watch.steps(soak.workdir)
  os.truncate(path, max(0, os.path.getsize(path) - soak.random.randrange(1, 60)))
  with open(path, 'ab') as file:
    file.write(soak.random.choice((b'', b'\0\0\0\0', b'\n[1, 2]\n\n', b'\xff\xfe\n')))
  soak.cut.update({*before} - {*watch.steps(soak.workdir)})


def _second(soak) -> str | None:
  """The same command, while the run runs."""
  try:
    done = subprocess.run(soak.command(), env=soak.environment(), capture_output=True, text=True, timeout=120)
  except subprocess.TimeoutExpired:
    return 'the second run was still there after 120 s'
  last = (done.stderr.strip().splitlines() or [''])[-1]
  soak.note(f'the second: exit {done.returncode}, {last[:200]}')
  return None if done.returncode == exits.FAILED and last.startswith('error:') else (
      f'the second run ended with {done.returncode}: {last[:300]}')


def _fill(soak) -> str | None:
  """Fills the disk until the run has ended, or for long enough to see that it goes on."""
  path = os.path.join(soak.folder, 'disk', 'fill')
  try:
    with contextlib.suppress(OSError), open(path, 'wb', buffering=0) as file:
      while True:
        file.write(bytes(1 << 16))
    for _ in watch.every(0.2, 90):
      if soak.process.poll() is not None:
        soak.note(f'ended {soak.process.returncode} on the full disk')
        return None
    return 'the run was still there after 90 s on a full disk'
  finally:
    os.unlink(path)


def _jump(soak) -> None:
  """An hour, a day or a month, on or back; it stays so until the next jump."""
  seconds = soak.random.choice((-1, 1)) * soak.random.choice((3600, 86400, 30 * 86400))
  with open(os.path.join(soak.folder, 'clock'), 'w') as file:
    file.write(str(seconds))
  soak.note(f'the clock is {seconds:+d} s off')


def _stop_early(soak) -> None:
  """The next start is told to stop while it starts."""
  soak.early_s = soak.random.uniform(0.0, 8.0)


def _close_stderr(soak) -> None:
  soak.closes_stderr = True


FAULTS = {
    'SIGKILL': Fault(_signals(signal.SIGKILL), (_KILLED,)),
    'SIGTERM': Fault(_signals(signal.SIGTERM), (exits.AGAIN,), 30.0, 'step'),
    'SIGINT': Fault(_signals(signal.SIGINT), (exits.INTERRUPTED,), 30.0, 'step'),
    'SIGINT to the group': Fault(_signals(signal.SIGINT, to_group=True), (exits.INTERRUPTED,), 30.0, 'step'),
    'SIGTERM to the group': Fault(_signals(signal.SIGTERM, to_group=True), (exits.AGAIN,), 30.0, 'step'),
    'SIGINT twice': Fault(_signals(signal.SIGINT, signal.SIGINT), (exits.INTERRUPTED,), 30.0),
    'SIGHUP': Fault(_signals(signal.SIGHUP)),
    'a stop in the start': Fault(_signals(signal.SIGKILL), (_KILLED,), then=_stop_early),
    'a worker killed': Fault(_kill_a_worker),
    'the server of the workers killed': Fault(_kill_the_server),
    'a verifier that hangs': Fault(_verifier('hang', 3.0), seconds=120.0),
    'a verifier that raises': Fault(_verifier('raise', 1.0)),
    'a damaged checkpoint': Fault(_signals(signal.SIGKILL), (_KILLED,), keeps='one before', then=_damage),
    'a cut metrics.jsonl': Fault(_signals(signal.SIGKILL), (_KILLED,), then=_cut_metrics),
    'a second run': Fault(_second),
    'a closed stderr': Fault(_signals(signal.SIGKILL), (_KILLED,), then=_close_stderr),
    'a clock that jumps': Fault(_jump),
    'a full disk': Fault(_fill, (exits.AGAIN, exits.FAILED), 5.0),
}
NEEDS_MOUNT = ('a full disk',)


def mount(folder: str, megabytes: int) -> bool:
  """Makes a small disk in memory of a folder; whether that is allowed."""
  if not shutil.which('mount') or os.geteuid():
    return False
  return not subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={megabytes}m', 'soak', folder],
                            stderr=subprocess.DEVNULL, check=False).returncode


def unmount(folder: str) -> None:
  subprocess.run(['umount', '-l', folder], stderr=subprocess.DEVNULL, check=False)


def plan(steps: int, every: float, seed: int, kinds: list[str]) -> list[tuple[int, str]]:
  """(step, fault), one in `every` steps in the mean, at random moments; each kind comes before one comes again."""
  source = random.Random(f'soak {seed}')
  found, step, left = [], 0.0, []
  while True:
    step += max(2.0, source.expovariate(1 / every))
    if step >= steps - 2:
      return found
    if not left:
      left = source.sample(kinds, len(kinds))
    found.append((int(step), left.pop()))
