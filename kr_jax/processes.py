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

from kr_jax import errors
from kr_jax import exits
from kr_jax import files
from kr_jax import phases
from kr_jax import progress as progress_lib
from kr_jax import rendezvous
from kr_jax import stopping
from kr_jax.progress import Progress

Stopped = stopping.Stopped
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
    ValueError: an environment that says nothing, an index that is none, or processes that do not fit together.
    SystemExit: some did not come, as of rendezvous.meet.
  """
  if coordinator != AUTO and not 0 <= index < count:
    raise ValueError(f'--process={index} of --processes={count}: --coordinator needs both, the first from 0')
  explicit = {} if coordinator == AUTO else {
      'coordinator_address': coordinator, 'num_processes': count, 'process_id': index}
  if members := rendezvous.of_environment() if coordinator == AUTO else (coordinator, count, index):
    rendezvous.meet(*members)
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=SILENCE_S, **explicit)
  except (ValueError, RuntimeError) as error:
    raise ValueError(f'--coordinator={coordinator} starts no processes: {error}') from error
  if listener := stopping.current():
    listener.install()  # as jax has taken SIGTERM, which it hears as a notice (`_preempted`)


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
  """Whether the run is to stop: as this process was told to (stopping.py), another one was, or the machine goes away.

  The run looks at safe points: `check`, at which all processes stop together, and within what can take long. There
  `leave` says at once what all have to agree on soon. A second Ctrl-C interrupts. What is waited for is said at once:
  `doing`, which whoever works sets, and the phase.

  Stopped becomes SystemExit in `ends`, with the exit status exits.INTERRUPTED after SIGINT, else exits.AGAIN, also
  where another process was told.

  Attributes:
    has_more: whether a stop has anything to save: steps since the last checkpoint.
    has_left_devices: whether they are still at what was not waited for.
  """

  _number = 0  # of those that were made

  def __init__(self, doing: str = 'the start'):
    self.doing, self.has_more, self.has_left_devices = doing, False, False
    self._checks, self._may_leave, self._is_leaving = 0, False, False
    self._listener = stopping.Listener()  # which hears nothing, until this is entered
    StopSignal._number += 1
    self._key = f'kr_jax/told/{StopSignal._number}'  # which all processes count alike

  def __enter__(self) -> StopSignal:
    self._is_mine = stopping.current() is None
    self._listener = stopping.hear()
    self._before = {name: getattr(self._listener, name) for name in ('raises', 'patience', 'describe')}
    self._listener.patience, self._listener.describe = self._patience, self._message
    if jax.process_count() > 1:
      self._listener.raises = False  # the others would wait for this one
    self._changed, self._is_closed = threading.Event(), False
    self._listener.watchers.append(self._changed.set)
    if jax.process_count() > 1:
      self._thread = threading.Thread(target=self._tell_and_hear, name='stops of others', daemon=True)
      self._thread.start()
    return self

  def begin(self) -> None:
    """From now on there is something to lose: the program is not left but where it looks."""
    self._listener.raises = False

  def __call__(self) -> bool:
    """Whether it was asked to stop: as far as this process has heard."""
    return self._listener.told

  def check(self) -> None:
    """A safe point, which all processes come to. Raises Stopped in all where any was told to stop."""
    if self.is_agreed():
      raise Stopped(f'stopped in {self.doing}')

  def is_agreed(self) -> bool:
    """Whether any process was told to stop: in all the same, which all ask. Where it is so, the run has to end."""
    self._checks += 1
    if _preempted(self._checks):
      self._listener.tell(f'preemption notice: {self._plan()}')
    self._is_leaving = any_of(self())
    return self._is_leaving

  def during(self, work: Callable[[], Any]) -> Any:
    """What work returns, in which each process may `leave` on its own; then a `check` of all."""
    self._may_leave = True
    try:
      found = work()
    except Stopped:
      found = None  # in the others there is something, of no use
    finally:
      self._may_leave = False
    self.check()
    return found

  def leave(self) -> None:
    """Raises Stopped where this process has heard that it is to stop, within `during`; elsewhere does nothing."""
    if self._may_leave and self():
      raise Stopped(f'stopped in {self.doing}')

  @contextlib.contextmanager
  def ends(self) -> Iterator[None]:
    """Makes Stopped a SystemExit with its text as argument, and with an exit status: the end of a run in order."""
    try:
      yield
    except Stopped as stop:
      end = SystemExit(str(stop))
      end.code = self._listener.code
      raise end from None

  def wait(self, x: jax.Array) -> None:
    """Waits for the devices, as block_until_ready does. In a run of one process raises Stopped once that is told to
    stop; of several, the devices are at one program, which all have to see end."""
    if jax.process_count() > 1 or not self._listener.is_hearing:
      jax.block_until_ready(x)
      return
    changed, ready = threading.Event(), threading.Event()

    def wait():
      with contextlib.suppress(Exception):  # which is raised below
        jax.block_until_ready(x)
      ready.set()
      changed.set()

    self._listener.watchers.append(changed.set)
    try:
      threading.Thread(target=wait, name='wait', daemon=True).start()
      if not self():
        changed.wait()
    finally:
      self._listener.watchers.remove(changed.set)
    if not ready.is_set():
      self.has_left_devices = True
      self.check()
    jax.block_until_ready(x)

  def _patience(self) -> float | None:
    is_alone = jax.process_count() == 1  # others would wait for this one
    return _PATIENCE_S if is_alone and not self.has_more and not self._is_leaving else None

  def _tell_and_hear(self) -> None:
    """Tells the other processes once this one is told to stop, and hears of them, past what they compute together."""
    index, has_told = jax.process_index(), False
    while True:
      self._changed.wait(_HEAR_S)
      if self._is_closed and not self._listener.told:
        return
      try:
        client = multihost_utils.distributed.global_state.client
        if self._listener.told:
          if not has_told:
            client.key_value_set(self._key, str(index), allow_overwrite=True)
          return
        try:
          who = client.key_value_try_get(self._key)
        except jax.errors.JaxRuntimeError as error:
          if 'NOT_FOUND' in str(error):
            continue
          raise
        has_told = True
        self._listener.tell(f'process {who} was told to stop: {self._plan()}')
      except Exception:  # the others are gone, or jax has no such client: `check` still agrees
        return

  def _message(self, number: int) -> str:
    again = '; Ctrl-C again stops at once, and the last checkpoint stays' if number == signal.SIGINT else ''
    text = f'{stopping.name(number)}: {self._plan()}{again}'
    # A handler does not wait for the locks of a log, which the program that it interrupts may hold.
    threading.Thread(target=progress_lib.note, args=(text,), daemon=True).start()
    return text

  def _plan(self) -> str:
    phase = phases.start().phase if phases.is_running() else ''
    work = f' ({_WORK[phase]})' if phase in _WORK else ''
    is_alone = jax.process_count() == 1
    is_left = is_alone and not self.has_more or phase in _LEFT and (is_alone or phase not in _ONE_PROGRAM)
    return (f'{"leaving" if is_left else "finishing"} {self.doing}{work}'
            f'{", then saving" if self.has_more else "; there is nothing new to save"}')

  def __exit__(self, kind, error, trace):
    self._listener.watchers.remove(self._changed.set)
    self._is_closed = True
    self._changed.set()
    if self._is_mine:
      stopping.close()
    else:
      for name, x in self._before.items():
        setattr(self._listener, name, x)
      if self._listener.told:
        self._listener.raises, self._listener.patience = False, lambda: None


NEVER = StopSignal()  # nothing tells it to stop
_PATIENCE_S = 10.0  # that a process may take to leave what it is at, where it has nothing to save
_LEAVE_S = 10.0  # that it may take to leave in order, for which others may be waited
_HEAR_S = 0.5  # between two looks at whether another process was told to stop
# Phases as a message names what a stop leaves or waits for; the others are over in a moment.
_WORK = {'sample': 'sampling', 'verify': 'verifying', 'score': 'scoring', 'update': 'updating', 'reshard': 'sampling',
         'warm_start': 'warm start', 'restore': 'preparing the policy', 'evaluate': 'evaluating',
         'checkpoint': 'saving a checkpoint', 'compile': 'compiling', 'report': 'writing the report'}
_LEFT = ('allocate', 'reshard', 'sample', 'detokenise', 'verify', 'evaluate')
_ONE_PROGRAM = ('reshard', 'sample')  # of all processes


def _preempted(count: int) -> bool:
  """Whether all processes have a notice that machines go away. Each calls it with the same counts, one after the
  other, and it is true of one."""
  try:
    return multihost_utils.reached_preemption_sync_point(count)
  except RuntimeError:  # the service is switched off
    return False


def _is_of_jax(error: BaseException) -> bool:
  """Whether jax raised it, and none of our own functions."""
  return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(os.path.dirname(jax.__file__))


def _is_told() -> bool:
  """Whether this process is to stop, of which it may be about to hear."""
  listener, until = stopping.current(), time.monotonic() + 4 * _HEAR_S
  while listener and not listener.told and time.monotonic() < until:
    time.sleep(_HEAR_S / 4)
  return bool(listener and listener.told)


@contextlib.contextmanager
def watch() -> Iterator[None]:
  """While in it, an error in this process ends it at once, and the death of another one within a minute.

  JAX's coordination service sees that a process has died, names it and ends the others (`start`). An error here
  is printed and ends this process without waiting for the others, who wait in a collective. A collective fails
  at once where a connection broke, and does not say whose: then the service, which knows, is waited for; but not in a
  process that is to stop, as the other one was told too. An error that was said already ends this process in order,
  if the others end too, and in any case soon.
  """
  if jax.process_count() == 1:
    yield
    return
  try:
    yield
  except SystemExit as stop:
    if isinstance(stop.code, str):  # no stop, in which all end alike, but an error, which may be of this one alone
      timer = threading.Timer(_LEAVE_S, stopping.end, (exits.FAILED,))
      timer.daemon = True
      timer.start()
    raise
  except BaseException as error:
    listener = stopping.current()
    if listener and listener.interrupted:
      stopping.end(listener.code, 'interrupted; the same command again goes on from the last checkpoint')
    if isinstance(error, (files.Unsaved, errors.Told)):  # a sentence that says what to do
      print(f'error: {error}', file=sys.stderr)
    else:
      traceback.print_exc()
    is_failed_collective = isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' not in str(error)
    of_another = is_failed_collective or isinstance(error, ValueError) and _is_of_jax(error)
    if of_another and not _is_told():
      time.sleep(SILENCE_S + 10)
    print(f'process {jax.process_index()} stops: {type(error).__name__}, printed above. Start all processes again: '
          'the run goes on from its last checkpoint', file=sys.stderr, flush=True)
    # Leaving in order would wait for the others.
    is_again = of_another or isinstance(error, files.Unsaved) and error.again
    stopping.end(
        exits.AGAIN if is_again else exits.INTERRUPTED if isinstance(error, KeyboardInterrupt) else exits.FAILED)
