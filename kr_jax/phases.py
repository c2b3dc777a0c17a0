"""Which phase of a run the host is in, the seconds that it spends in each, and what is counted there.

At any moment exactly one phase runs, so that their seconds add up to the wall time, with nothing counted twice:

    clock = phases.start()                # the run's; phase 'start' until another begins
    with phases.phase('verify'):          # the phase around it stands still meanwhile
      phases.count(rollouts=512)          # integers, of the phase that runs
    rows = clock.drain()                  # a row a phase, and all begins at 0 again

What XLA compiles is taken out of the phase in which it happens and is the phase 'compile'. A phase that is entered with
`whole` keeps all that happens in it, but for compilation and checkpoints: an evaluation samples and verifies too. What
is sampled from outside, memory and energy, goes to the phase that runs (`Clock.sample`).

The devices work in some phases, and while others run: `devices_work` says when. Their seconds are an upper bound, as
they may be done before the host looks.

Without `start` nothing is kept, and all of this costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import statistics
import threading
import time
from typing import Any

import jax

# In the order in which a step has them; those of a run as a whole come first.
PHASES = ('start', 'data', 'restore', 'warm_start', 'allocate', 'reshard', 'sample', 'detokenise', 'verify', 'pack',
          'score', 'update', 'record', 'checkpoint', 'evaluate', 'report', 'wait', 'compile', 'other')
# Phases in which the devices work while the host waits for them.
ON_DEVICES = ('reshard', 'sample', 'score', 'update')
_APART = ('checkpoint', 'compile', 'wait')  # even in a phase that is entered whole
_COMPILING = ('/jax/core/compile/jaxpr_trace_duration', '/jax/core/compile/jaxpr_to_mlir_module_duration',
              '/jax/core/compile/backend_compile_duration')
_CACHED = '/jax/compilation_cache/cache_hits'


class _Row:
  """What came of a phase since the last drain."""

  def __init__(self, began: float):
    self.began, self.wall_s, self.busy_s = began, 0.0, 0.0
    self.counts: dict[str, int] = {}
    self.peak_bytes: int | None = None
    self.joules: float | None = None
    self.busy_shares: list[float] = []


class Clock:
  """The seconds of each phase. All but `sample`, `rows` and `drain` belongs to the thread that made it.

  Args:
    since: unix time at which phase 'start' began; None: now.
  """

  def __init__(self, since: float | None = None):
    self._offset = time.time() - time.monotonic()
    self._lock, self._thread = threading.RLock(), threading.get_ident()
    now = time.monotonic()
    self._mark = now if since is None else min(since - self._offset, now)  # the machine's clock may have been set back
    self._stack = [('start', False, False)]  # name, whether it is whole, whether the devices work in it
    self._rows: dict[str, _Row] = {}
    self._devices_work = False
    self._compiled: list[tuple[float, float]] = []  # intervals of the phase that runs
    self.began = self._mark + self._offset  # unix time of the clock's first moment

  @property
  def now(self) -> float:
    """The unix time by this clock, which goes on evenly when the machine's clock is set."""
    return time.monotonic() + self._offset

  @property
  def phase(self) -> str:
    """The phase that runs."""
    return self._stack[-1][0]

  def _row(self, name: str) -> _Row:
    if name not in self._rows:
      self._rows[name] = _Row(self._mark + self._offset)
    return self._rows[name]

  def _tick(self) -> None:
    """Gives the time since the last tick to the phase that runs, and of it to 'compile' what was compiled."""
    now, (name, _, on_devices) = time.monotonic(), self._stack[-1]
    row, elapsed = self._rows.get(name) or self._row(name), now - self._mark
    compiled = 0.0
    if self._compiled:
      # Functions that are traced within others are in their interval already.
      end = self._mark
      for first, last in sorted(self._compiled):
        compiled += max(0.0, last - max(first, end))
        end = max(end, last)
      compiled = min(compiled, elapsed)
      self._compiled.clear()
      self._row('compile').wall_s += compiled
    row.wall_s += elapsed - compiled
    if self._devices_work or on_devices:
      row.busy_s += elapsed - compiled
    self._mark = now

  def enter(self, name: str, whole: bool = False) -> None:
    with self._lock:
      self._tick()
      on_devices = name in ON_DEVICES
      if self._stack[-1][1] and name not in _APART:
        name, whole, _ = self._stack[-1]
      self._stack.append((name, whole, on_devices))

  def leave(self) -> None:
    with self._lock:
      self._tick()
      self._stack.pop()

  def begin(self, name: str) -> None:
    """Makes a phase the one that runs where no other does: what 'start' is at first."""
    with self._lock:
      self._tick()
      self._stack[0] = (name, False, False)

  def count(self, phase: str | None = None, **counts: int) -> None:
    with self._lock:
      row = self._row(phase or self.phase)
      for name, n in counts.items():
        row.counts[name] = row.counts.get(name, 0) + int(n)

  def devices_work(self, work: bool) -> None:
    with self._lock:
      self._tick()
      self._devices_work = work

  def sample(self, *, memory_bytes: int | None = None, joules: float | None = None,
             busy_share: float | None = None) -> None:
    """Notes, from any thread, memory in use now, energy since the last sample, and the share of time in which devices
    say that they are busy, of the phase that runs."""
    with self._lock:
      row = self._row(self.phase)
      if memory_bytes is not None:
        row.peak_bytes = max(row.peak_bytes or 0, memory_bytes)
      if joules is not None:
        row.joules = (row.joules or 0.0) + joules
      if busy_share is not None:
        row.busy_shares.append(busy_share)

  def on_duration(self, event: str, duration: float, **_: Any) -> None:
    """As jax.monitoring calls it, when something was compiled."""
    if event in _COMPILING and threading.get_ident() == self._thread:
      with self._lock:
        now = time.monotonic()
        self._compiled.append((now - duration, now))
        if event == _COMPILING[-1]:
          self.count('compile', compiles=1)

  def on_event(self, event: str, **_: Any) -> None:
    """As jax.monitoring calls it, when a program was read from the cache of compiled ones."""
    if event == _CACHED and threading.get_ident() == self._thread:
      self.count('compile', compiles_cached=1)

  def rows(self) -> list[dict[str, Any]]:
    """A row a phase since the last drain, the moment's included; from any thread."""
    with self._lock:
      # No tick, which would end the interval that a compilation is taken out of.
      running, more_s = self._row(self.phase), time.monotonic() - self._mark
      return [{'phase': name, 'began': round(row.began, 3), 'wall_s': row.wall_s + more_s * (row is running),
               'busy_s': row.busy_s, 'peak_bytes': row.peak_bytes, 'joules': row.joules,
               **({'busy_share': round(statistics.fmean(row.busy_shares), 4)} if row.busy_shares else {}), **row.counts}
              for name, row in self._rows.items()]

  def drain(self) -> list[dict[str, Any]]:
    """A row a phase since the last drain; all begins at 0 again."""
    with self._lock:
      self._tick()
      rows = self.rows()
      self._rows.clear()
      return rows


_clock: Clock | None = None


def start(since: float | None = None) -> Clock:
  """The clock of a run, from now on or from a unix time before; the one that runs already, if one does."""
  global _clock
  if _clock is None:
    _clock = Clock(since)
    jax.monitoring.register_event_duration_secs_listener(_clock.on_duration)
    jax.monitoring.register_event_listener(_clock.on_event)
  return _clock


def stop() -> None:
  """Ends the clock, if one runs."""
  global _clock
  if _clock is not None:
    jax.monitoring.unregister_event_duration_listener(_clock.on_duration)
    jax.monitoring.unregister_event_listener(_clock.on_event)
    _clock = None


def is_running() -> bool:
  return _clock is not None


@contextlib.contextmanager
def running() -> Iterator[Clock]:
  """The clock that runs already, which whoever started it stops; or else one while in this."""
  is_mine = _clock is None
  try:
    yield start()
  finally:
    if is_mine:
      stop()


@contextlib.contextmanager
def phase(name: str, *, whole: bool = False) -> Iterator[None]:
  """A phase, one of PHASES. whole: keeps what happens in it, but for compilation and checkpoints.

  Raises ValueError for a name that is none.
  """
  if name not in PHASES:
    raise ValueError(f'{name!r} is no phase; there are {PHASES}')
  clock = _clock
  if clock is None or threading.get_ident() != clock._thread:
    yield
    return
  clock.enter(name, whole)
  try:
    with jax.profiler.TraceAnnotation(name):  # the same names in a profiler's trace
      yield
  finally:
    clock.leave()


def count(phase: str | None = None, **counts: int) -> None:
  """Adds to the counters of a phase, or of the one that runs. Counters are exact: integers."""
  if _clock is not None:
    _clock.count(phase, **counts)


def devices_work(work: bool) -> None:
  """Says that the devices have begun with what they were given, or that the host has seen them end."""
  if _clock is not None:
    _clock.devices_work(work)
