"""The processes of a run, one a host, all of which run the same program.

Each computes the same budgets from the same statistics and samples the same step; of the rollouts a process verifies
those on its own devices, and what came of them is gathered. With one process nothing of this does anything.

A process that is killed leaves the others waiting in a collective. They are ended with a message (`watch`), so
that all can be started again: the run goes on from the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from kr_jax import exits
from kr_jax import files
from kr_jax import phases
from kr_jax.progress import Progress

SILENCE_S = 40  # seconds without a heartbeat after which a process is taken for dead
AUTO = 'auto'


def start(coordinator: str, count: int = 0, index: int = -1) -> None:
  """Joins the processes of a run.

  Args:
    coordinator: 'HOST:PORT' of process 0, or AUTO: this and the others as the environment says them, of
      Cloud TPU, GKE or Slurm.
    count: of all processes.
    index: which of them this is, from 0.

  Raises:
    ValueError: an environment that says nothing, or an index that is none.
  """
  if coordinator != AUTO and not 0 <= index < count:
    raise ValueError(f'--process={index} of --processes={count}: --coordinator needs both, the first from 0')
  explicit = {} if coordinator == AUTO else {
      'coordinator_address': coordinator, 'num_processes': count, 'process_id': index}
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=SILENCE_S, **explicit)
  except (ValueError, RuntimeError) as error:
    raise ValueError(f'--coordinator={coordinator} starts no processes: {error}') from error


def is_first() -> bool:
  """Whether this process is the one that writes the record."""
  return jax.process_index() == 0


def progress(name: str, first: int, last: int, unit: str = 'step', *, leave: bool = True) -> Progress:
  """How far units first..last-1 are; nothing is shown but in the first process.

  Args:
    unit: 'B' are bytes.
    leave: whether it stays to be seen after its end.
  """
  return Progress(name, first, last, unit, leave=leave, disable=not is_first())


@contextlib.contextmanager
def progress_to(name: str, unit: str, *, compiled_s: Callable[[], float] | None = None
                ) -> Iterator[Callable[[int, int], None]]:
  """Yields a function of the units that are done and of all; what it shows is gone after the end.

  compiled_s: seconds of compilation so far, where what runs is compiled first: it is said, and left out of the rate.
  """
  bars, before_s = [], compiled_s() if compiled_s else 0.0

  def show(done: int, total: int) -> None:
    nonlocal before_s
    if not bars:
      bars.append(progress(name, 0, total, unit, leave=False))
      bars[0].compiling(compiled_s is not None)
    if done > bars[0].n:
      if compiled_s:
        bars[0].leave_out(compiled_s() - before_s)
        before_s = compiled_s()
      bars[0].update(done - bars[0].n)

  try:
    yield show
  finally:
    for bar in bars:
      bar.close()


def gather(x: np.ndarray) -> np.ndarray:
  """x of every process, bit for bit, with an axis of processes in front."""
  x = np.ascontiguousarray(x)
  if jax.process_count() == 1:
    return x[None]
  with phases.phase('wait'):  # for the slowest
    of_bytes = multihost_utils.process_allgather(np.frombuffer(x.tobytes(), np.uint8))
  return np.frombuffer(of_bytes.tobytes(), x.dtype).reshape(-1, *x.shape)


def of_first(text: str) -> str:
  """The text that the first process has."""
  content = np.frombuffer(text.encode(), np.uint8)
  same = np.zeros(gather(np.array(len(content)))[0], np.uint8)  # as long in all
  same[:len(content)] = content[:len(same)]
  return gather(same)[0].tobytes().decode()


def any_of(flag: bool) -> bool:
  """Whether it is so in any process."""
  return bool(gather(np.array(flag)).any())


def check_same(what: str, *arrays: Any) -> None:
  """Raises RuntimeError unless all processes have the same arrays, bit for bit."""
  digest = hashlib.sha256()
  for x in arrays:
    digest.update(x if isinstance(x, bytes) else np.ascontiguousarray(x).tobytes())
  found = gather(np.frombuffer(digest.digest(), np.uint8))
  other = np.flatnonzero((found != found[0]).any(axis=1))
  if len(other):
    raise RuntimeError(f'{what} of the processes {other.tolist()} differ from those of process 0; all must '
                       'run the same code and config on the same data')


def own_rows(x: Any) -> tuple[np.ndarray, np.ndarray]:
  """The rows of an array that this process is the one to read: their numbers, and what stands there.

  x: on the host, all are; on a mesh, those on this process's devices, of copies the first.
  """
  if not isinstance(x, jax.Array) or x.is_fully_addressable:
    return np.arange(len(x)), np.asarray(x)
  shards = sorted((s for s in x.addressable_shards if s.replica_id == 0), key=lambda s: s.index[0].start or 0)
  rows = [np.arange(x.shape[0])[s.index[0]] for s in shards]
  nothing = np.zeros((0, *x.shape[1:]), x.dtype)
  return (np.concatenate(rows or [np.zeros(0, int)]),
          np.concatenate([np.asarray(s.data) for s in shards] or [nothing]))


def merge_rows(row: np.ndarray, x: np.ndarray, total: int) -> np.ndarray:
  """All rows, of which each process has its own; 0 where none has one."""
  x = np.asarray(x)
  mine = np.zeros((total, *x.shape[1:]), x.dtype)
  mine[row] = x
  return gather(mine).sum(axis=0, dtype=x.dtype)


# What happens when a process is told to stop, or dies.


class StopSignal:
  """Notes SIGTERM and SIGINT, so that a step is finished and saved; a second SIGINT interrupts.

  The first is acknowledged at once, with what is waited for: `doing`, which whoever works sets, and the phase. A
  SystemExit that leaves it, a stop, gets an exit status: exits.INTERRUPTED after SIGINT, else exits.AGAIN, also where
  another process was told.
  """

  def __init__(self, doing: str = 'the start'):
    self.doing = doing
    self._number = 0  # of the signal

  def __enter__(self) -> StopSignal:
    self._number = 0
    if threading.current_thread() is threading.main_thread():
      self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
    else:
      self._old = {}
    return self

  def __call__(self) -> bool:
    """Whether it was asked to stop."""
    return self._number > 0

  def _note(self, number, frame):
    if self._number and number == signal.SIGINT:
      raise KeyboardInterrupt
    if not self._number:
      self._number = number
      _acknowledge(self._message(number))

  def _message(self, number: int) -> str:
    phase = phases.start().phase if phases.is_running() else ''
    work = f' ({_WORK[phase]})' if phase in _WORK else ''
    what = 'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name
    again = '; Ctrl-C again stops at once, and the last checkpoint stays' if number == signal.SIGINT else ''
    return f'{what}: finishing {self.doing}{work}, then saving{again}'

  def __exit__(self, kind, error, trace):
    for number, handler in self._old.items():
      signal.signal(number, handler)
    if isinstance(error, SystemExit):  # its message stays where it is, its argument
      error.code = exits.INTERRUPTED if self._number == signal.SIGINT else exits.AGAIN


# Phases as a message names what a stop waits for; the others are over in a moment.
_WORK = {'sample': 'sampling', 'verify': 'verifying', 'score': 'scoring', 'update': 'updating', 'reshard': 'sampling',
         'warm_start': 'warm start', 'restore': 'preparing the policy',
         'checkpoint': 'saving a checkpoint', 'compile': 'compiling', 'report': 'writing the report'}


def _acknowledge(text: str) -> None:
  """Writes a line, in a signal's handler: past the buffers, in which the interrupted program may just be writing."""
  try:
    if type(sys.stderr).__module__.startswith('ipykernel'):  # nobody sees what its file takes
      sys.stderr.write(f'{text}\n')
      sys.stderr.flush()
      return
    text = f'\n{text}\n' if sys.stderr.isatty() else f'{text}\n'  # below ^C and the bar
    os.write(sys.stderr.fileno(), text.encode(errors='replace'))
  except (OSError, ValueError, AttributeError):  # there is no terminal any more
    pass


def _is_of_jax(error: BaseException) -> bool:
  """Whether jax raised it, and none of our own functions."""
  return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(os.path.dirname(jax.__file__))


@contextlib.contextmanager
def watch() -> Iterator[None]:
  """While in it, an error in this process ends it at once, and the death of another one within a minute.

  JAX's coordination service sees that a process has died, names it and ends the others (`start`). An error here
  is printed and ends this process without waiting for the others, who wait in a collective. A collective fails
  at once where a connection broke, and does not say whose: then the service, which knows, is waited for.
  """
  if jax.process_count() == 1:
    yield
    return
  try:
    yield
  except SystemExit:  # all processes stop after the same step
    raise
  except BaseException as error:
    traceback.print_exc()
    of_another = isinstance(error, jax.errors.JaxRuntimeError) or isinstance(error, ValueError) and _is_of_jax(error)
    if of_another:
      time.sleep(SILENCE_S + 10)
    print(f'process {jax.process_index()} stops: {type(error).__name__}, printed above. Start all processes again: '
          'the run goes on from its last checkpoint', file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():
      child.kill()
    # Leaving in order would wait for the others.
    is_again = of_another or isinstance(error, files.Unsaved)
    os._exit(exits.AGAIN if is_again else exits.INTERRUPTED if isinstance(error, KeyboardInterrupt) else exits.FAILED)
