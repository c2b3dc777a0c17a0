"""Being told to stop: SIGTERM and Ctrl-C, heard from the start of the process on.

Python runs a signal's handler when its main thread comes back from C, which takes as long as a program on the devices
does, or for ever where another process is waited for. So a thread hears the signals, through the pipe that Python
writes each signal's number to at once: what is done about a signal is said at once, and a process that is to end ends.

What a signal does depends on what there is to lose. `Listener.raises`: nothing, so that KeyboardInterrupt is raised
where the program stands. Else the program looks at `told`, at points where all is whole. A second Ctrl-C raises
KeyboardInterrupt in any case. Where the program does not end of itself in `patience` seconds, the thread ends it.

SIGHUP, a terminal that is closed, ends nothing.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
import contextlib
import fcntl
import os
import select
import signal
import sys
import threading
import time
from typing import Any

from absl import logging

from kr_jax import exits

HURRY_S = 5.0  # that a process may take to end, once it was told to end at once
_TOLD = (signal.SIGTERM, signal.SIGINT)
_HANGUP = getattr(signal, 'SIGHUP', None)


class Stopped(Exception):
  """The run was told to stop; raised at points where nothing is half done."""


def name(number: int) -> str:
  """What a signal is called."""
  return 'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name


class Listener:
  """Hears the signals of this process, of which the main thread alone can take hold: in another, nothing is heard.

  Args:
    may_end: whether the process may be ended: it is the run's own, and no notebook.

  Attributes:
    told: whether it was told to stop.
    number: of the signal that told it first; 0: none did.
    raises: whether a signal raises KeyboardInterrupt in the main thread, as nothing would be lost.
    patience: seconds that the process may take to end once it was told; None: as long as it takes.
    describe: what is said of the first signal, by its number.
    watchers: called once it is told, from any thread; they do no more than set an event.
  """

  def __init__(self, *, may_end: bool = False):
    self.may_end, self.told, self.number, self.raises = may_end, False, 0, False
    self.patience: Callable[[], float | None] = lambda: 0.0
    self.describe: Callable[[int], str] = lambda number: f'{name(number)}: stopping; there is nothing to save'
    self.watchers: list[Callable[[], None]] = []
    self.is_hearing = False
    self._since = self._hurried = 0.0  # when it was told, and told to be quick
    self._handled = dict.fromkeys((*_TOLD, _HANGUP), 0)  # how often each came, as the handler counts
    self._heard = dict(self._handled)  # as the thread does
    self._lock = threading.Lock()
    self._old, self._quiet, self._has_raised = {}, False, False

  def start(self) -> Listener:
    if threading.current_thread() is not threading.main_thread():
      return self
    pipe = os.pipe()
    # Above the numbers of stdin, stdout and stderr, which are free where they were closed.
    self._read, self._write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in pipe)
    for end in pipe:
      os.close(end)
    for end in (self._read, self._write):
      os.set_blocking(end, False)
    self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    self._old = {number: signal.getsignal(number) for number in (*_TOLD, _HANGUP) if number is not None}
    self.is_hearing = True
    self.install()
    self._old_hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
    if self.may_end:
      atexit.register(self.ignore)  # before others, so that it is done after them
    self._thread = threading.Thread(target=self._listen, name='signals', daemon=True)
    self._thread.start()
    return self

  def install(self) -> None:
    """Takes hold of the signals: again, where a library has taken them since."""
    if self.is_hearing and threading.current_thread() is threading.main_thread():
      for number in self._old:
        signal.signal(number, self._handle)

  def close(self) -> None:
    """Leaves the signals as they were."""
    if not self.is_hearing:
      return
    for number, handler in self._old.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    signal.set_wakeup_fd(self._old_wakeup)
    sys.unraisablehook = self._old_hook
    atexit.unregister(self.ignore)
    self.is_hearing = False
    os.write(self._write, b'\0')
    self._thread.join()
    for end in (self._read, self._write):
      os.close(end)

  def ignore(self) -> None:
    """Ignores signals, at the interpreter's end, which takes handlers away: a signal would change the exit status."""
    if self.is_hearing:
      for number in self._old:
        signal.signal(number, signal.SIG_IGN)

  def forget(self) -> None:
    """Leaves the signals to a process that was forked from this one."""
    signal.set_wakeup_fd(-1)
    for number in self._old:
      signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

  @property
  def interrupted(self) -> bool:
    """Whether KeyboardInterrupt was raised, or will be."""
    return self.told and (self.raises or self._hurried > 0)

  @property
  def is_hurried(self) -> bool:
    """Whether a second Ctrl-C came."""
    return self._hurried > 0

  @property
  def code(self) -> int:
    """The exit status of a process that was told to stop."""
    return exits.INTERRUPTED if self.number == signal.SIGINT or self._hurried else exits.AGAIN

  def tell(self, text: str) -> None:
    """Notes that another one was told to stop, which is said in a line."""
    with self._lock:
      if not self.told:
        self._note(0, text)
    if self.is_hearing:
      with contextlib.suppress(OSError):
        os.write(self._write, b'\0')  # so that the thread looks at the clock

  def interrupt(self) -> None:
    """From now on KeyboardInterrupt is raised, which the program ends with in order."""
    self.raises, self.patience = True, lambda: HURRY_S

  def ending(self, *, is_alone: bool) -> None:
    """The process ends of itself now; the thread helps where it is told to stop, and does not.

    is_alone: whether no other process is waited for.
    """
    self.raises, self._quiet, self._since = False, True, time.monotonic()
    self.patience = lambda: HURRY_S if is_alone else None

  def _handle(self, number, frame) -> None:
    """Raises KeyboardInterrupt, where that is due. All else is the thread's: what is interrupted may hold any lock."""
    self._handled[number] += 1
    until = time.monotonic() + 1.0
    while self._heard[number] < self._handled[number] and time.monotonic() < until:
      time.sleep(0.001)
    if number == _HANGUP:
      return
    if self._hurried and number == signal.SIGINT or self.raises and not self._has_raised:
      self._has_raised = True
      raise KeyboardInterrupt

  def _unraisable(self, unraisable) -> None:
    """Says nothing of a KeyboardInterrupt that was raised where Python drops errors, as in a callback of its garbage
    collector: the thread ends the process."""
    if not (self.told and issubclass(unraisable.exc_type, KeyboardInterrupt)):
      self._old_hook(unraisable)

  def _listen(self) -> None:
    while self.is_hearing:
      ready = _is_ready(self._read, select.POLLIN, 0.2 if self.told else None)
      for number in os.read(self._read, 64) if ready else b'':
        if number in self._heard:
          self.hear(number)
          self._heard[number] += 1
      if self.told and self.may_end and self.is_hearing:
        self._end_if_late()

  def hear(self, number: int) -> None:
    """Notes a signal."""
    with self._lock:
      if number == _HANGUP:
        if not self._heard[number]:  # the log may be in use, of which this thread does not wait for the end
          text = 'SIGHUP: the terminal is gone; the run goes on'
          threading.Thread(target=logging.warning, args=(text,), daemon=True).start()
      elif not self.told:
        self._note(number, '')
      elif not self.number:  # until now it was another process that was told
        self.number = number
      elif number == signal.SIGINT and not self._hurried:
        self._hurried = time.monotonic()

  def _note(self, number: int, text: str) -> None:
    self.number, self._since, self.told = number, time.monotonic(), True
    try:
      text = text or self.describe(number)
    except Exception:  # whatever is wrong with a message, the signal counts
      text = f'{name(number)}: stopping'
    if text and not self._quiet:
      acknowledge(text)
    for told in [*self.watchers]:
      told()

  def _end_if_late(self) -> None:
    now, patience = time.monotonic(), self.patience()
    is_late = patience is not None and now - self._since >= patience
    if self._hurried and (now - self._hurried >= HURRY_S or self._heard[signal.SIGINT] > 2) or is_late:
      end(self.code, 'ended at once; what was saved stays' if self._hurried and not self._quiet else '')


def end(code: int, text: str = '') -> None:
  """Ends this process as it stands, with what it started."""
  if text:
    acknowledge(text)
  for stream in (sys.stdout, sys.stderr):  # what was said stays said, unless nobody reads it
    if stream is not None:
      flush = threading.Thread(target=_flush, args=(stream,), daemon=True)
      flush.start()
      flush.join(1.0)
  if 'multiprocessing.process' in sys.modules:
    for child in sys.modules['multiprocessing.process'].active_children():
      child.kill()
  os._exit(code)


def _flush(stream) -> None:
  with contextlib.suppress(Exception):
    stream.flush()


def acknowledge(text: str) -> None:
  """Writes a line, past the buffers, which the program may just be writing to, or be stuck in."""
  try:
    if type(sys.stderr).__module__.startswith('ipykernel'):  # nobody sees what its file takes
      sys.stderr.write(f'{text}\n')
      sys.stderr.flush()
      return
    text = f'\n{text}\n' if sys.stderr.isatty() else f'{text}\n'  # below ^C and the bar
    number = sys.stderr.fileno()
    if _is_ready(number, select.POLLOUT, 0.5):  # else nobody reads it
      os.write(number, text.encode(errors='replace'))
  except (OSError, ValueError, AttributeError):  # there is no terminal any more
    pass


def _is_ready(file: int, event: int, seconds: float | None) -> bool:
  """Whether a file can be read or written, or is broken, in so many seconds; None: it is waited for."""
  poll = select.poll()
  poll.register(file, event)
  return bool(poll.poll(None if seconds is None else 1000 * seconds))


_listener: Listener | None = None


def current() -> Listener | None:
  """The one that hears the signals of this process."""
  return _listener


def hear(*, may_end: bool = False) -> Listener:
  """Begins to hear the signals of this process, if nobody does."""
  global _listener
  if _listener is None:
    _listener = Listener(may_end=may_end).start()
  return _listener


def interrupt() -> Listener | None:
  """As of the listener that there is, which it returns."""
  if _listener is not None:
    _listener.interrupt()
  return _listener


def ending(*, is_alone: bool) -> None:
  """As of the listener that there is."""
  if _listener is not None:
    _listener.ending(is_alone=is_alone)


def close() -> None:
  """Leaves the signals as they were."""
  global _listener
  if _listener is not None:
    _listener.close()
    _listener = None


def uninterrupted(work: Callable[[], Any]) -> Any:
  """What work returns. Raises KeyboardInterrupt where a signal raised it, whatever else became of it on its way."""
  try:
    return work()
  except Exception:
    if _listener is not None and _listener.interrupted:
      raise KeyboardInterrupt from None
    raise


def _forked() -> None:
  global _listener
  if _listener is not None and _listener.is_hearing:
    _listener.forget()
  _listener = None


os.register_at_fork(after_in_child=_forked)
