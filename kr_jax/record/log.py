"""WORKDIR/log.txt: what a run said, warned of and ended with, each with its time, over all its starts.

    with log.kept(workdir) as kept:   # what is said from now on waits
      ...                             # a run that is refused here leaves nothing in the workdir of another one
      kept.begin()                    # and is written

The first process writes log.txt; another one of the run writes log.N.txt, once it warns of something (in a bucket the
first's alone is copied). A file that grows beyond its bound becomes log.old.txt, so that two of them are the most.
Nothing of it stops a run, whatever the disk does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import datetime
import logging
import os
import re
import shlex
import socket
import sys
import threading
import traceback
from typing import Any
import warnings

import jax

from kr_jax import errors
from kr_jax import files
from kr_jax import processes
from kr_jax import progress

_MOST = 10 * 2 ** 20  # bytes of a file
_LONGEST = 20_000  # characters of a text
_MOST_WAITING = 1000  # texts before `begin`
_CACHE = re.compile(r'Error (reading|writing) persistent compilation cache entry')


class Log:
  """The log of a process.

  Args:
    index: of the process.
  """

  def __init__(self, workdir: str, index: int = 0):
    name = 'log' if index == 0 else f'log.{index}'
    self._path, self._old = (os.path.join(workdir, f'{name}{end}') for end in ('.txt', '.old.txt'))
    self.workdir, self._index = workdir, index
    self._lock, self._has_begun, self._has_warned = threading.RLock(), False, False
    self._waiting: list[str] = []
    self._is_cut = False

  def begin(self) -> None:
    """Says that the run starts, and writes from now on, at first what has waited."""
    if self._has_begun:
      return
    with self._lock:
      waiting, self._waiting, self._has_begun = self._waiting, [], True
      start = _line(f'start: process {self._index} of {jax.process_count()}, {os.getpid()} on {socket.gethostname()}: '
                    f'{shlex.join(sys.argv)}')
      if self._index == 0:
        self._write(start + ''.join(waiting))
      else:
        self._waiting = [start, *waiting]

  def add(self, text: str, kind: str = '') -> None:
    """Notes a text, with the time. kind: 'WARNING'."""
    line = _line(f'{kind} {text}' if kind else text)
    with self._lock:
      self._has_warned |= bool(kind)
      if not self._has_begun or self._index and not self._has_warned:
        self._waiting = [*self._waiting, line][-_MOST_WAITING:]
      else:
        waiting, self._waiting = self._waiting, []
        self._write(''.join([*waiting, line]))

  def heard(self, text: str, alarm: bool) -> None:
    """As progress.heard_by calls it."""
    self.add(text, 'ALARM' if alarm else '')

  def end(self, error: BaseException | None) -> None:
    """Says how the run ended."""
    if error is None:
      self.add('end: done')
    elif isinstance(error, (SystemExit, processes.Stopped)):
      self.add(f'end: stopped: {error.args[0] if error.args else ""}')
    elif isinstance(error, KeyboardInterrupt):
      self.add('end: interrupted')
    elif isinstance(error, (files.Unsaved, errors.Told)):  # a sentence that says what to do
      self.add(f'end: {error}', 'ERROR')
    else:
      self.add(f'end: {"".join(traceback.format_exception(error))}', 'ERROR')

  def _write(self, text: str) -> None:
    with contextlib.suppress(OSError):
      with contextlib.suppress(FileNotFoundError):
        if os.path.getsize(self._path) + len(text) > _MOST:
          os.replace(self._path, self._old)
      file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
      try:
        content = text.encode(errors='backslashreplace')
        written = os.write(file, b'\n' * self._is_cut + content)
        self._is_cut = written < self._is_cut + len(content)  # as on a full disk
      finally:
        os.close(file)


def _line(text: str) -> str:
  """A text with its time; whatever a model wrote does nothing to a terminal that shows it."""
  now = datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%dT%H:%M:%SZ')
  if len(text) > _LONGEST:
    text = f'{text[:_LONGEST // 2]}\n[... {len(text) - _LONGEST} characters are left out ...]\n{text[-_LONGEST // 2:]}'
  shown = ''.join(x if x.isprintable() or x == '\n' else ascii(x)[1:-1] for x in text.strip().replace('\t', '    '))
  return f'{now} ' + shown.replace('\n', '\n  ') + '\n'


class _Handler(logging.Handler):
  """Gives a log what is logged, from warnings on."""

  def __init__(self, log: Log):
    super().__init__(logging.WARNING)
    self._log = log

  def emit(self, record: logging.LogRecord) -> None:
    if logging.root.handlers == [self]:  # without it, Python would have shown the record
      logging.lastResort.handle(record)
    try:
      text = record.getMessage()
      if record.exc_info and record.exc_info[1] is not None:
        text += '\n' + ''.join(traceback.format_exception(record.exc_info[1]))
      self._log.add(text, record.levelname)
    except Exception:  # of a message that fits none of its arguments, which whoever shows it says
      pass


class _OfDisks(logging.Filter):
  """Of errors of a disk, which Orbax logs with the traces of all its threads, lets the first pass, in a sentence: the
  run ends with it too."""

  def __init__(self, workdir: str):
    super().__init__()
    self._workdir, self.has_said = workdir, False

  def filter(self, record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    found = files.explained(error, self._workdir, 'a file') if isinstance(error, Exception) else None
    if not isinstance(found, files.Unsaved):
      return True
    record.msg, record.args, record.exc_info, has_said = str(found), (), None, self.has_said
    self.has_said = True
    return not has_said

  def is_of_one(self, error: BaseException | None) -> bool:
    """Whether an error that nobody catches is the end of Orbax's threads, after one of a disk that was said."""
    return self.has_said and isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'


@contextlib.contextmanager
def _hooked(log: Log, of_disks: _OfDisks) -> Iterator[None]:
  """Has a log told of Python's warnings, and of errors in threads and in what calls back, which nobody catches."""
  show, in_thread, unraisable = warnings.showwarning, threading.excepthook, sys.unraisablehook
  said: set[str | None] = set()

  def warned(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any, **named: Any) -> None:
    if (cached := _CACHE.match(str(message))) and cached[1] in said:  # jax says it of each program
      return
    said.add(cached and cached[1])
    log.add(f'{category.__name__}: {message} ({filename}:{lineno})', 'WARNING')
    show(message, category, filename, lineno, *rest, **named)

  def uncaught(found: Any, hook: Callable[[Any], Any]) -> None:
    if not of_disks.is_of_one(found.exc_value):
      if found.exc_value is not None:
        log.add(''.join(traceback.format_exception(found.exc_value)), 'ERROR')
      hook(found)

  warnings.showwarning = warned
  threading.excepthook = lambda found: uncaught(found, in_thread)
  sys.unraisablehook = lambda found: uncaught(found, unraisable)
  try:
    yield
  finally:
    warnings.showwarning, threading.excepthook, sys.unraisablehook = show, in_thread, unraisable


def _index() -> int:
  """Which process of a run this is; devices are not looked for to know it."""
  return jax.process_index() if jax.distributed.is_initialized() else 0


_kept: Log | None = None  # of this process


@contextlib.contextmanager
def kept(workdir: str) -> Iterator[Log]:
  """The log of a workdir, which gets what is said, logged and warned of while in this; the one that is kept already, if
  it is of the same workdir. How this is left is said at its end."""
  global _kept
  if _kept is not None and _kept.workdir == workdir:
    yield _kept
    return
  before, _kept = _kept, Log(workdir, _index())
  log, handler, of_disks, absl = _kept, _Handler(_kept), _OfDisks(workdir), logging.getLogger('absl')
  absl.addFilter(of_disks)
  logging.root.addHandler(handler)
  try:
    with progress.heard_by(log.heard), _hooked(log, of_disks):
      yield log
  except BaseException as error:
    log.end(error)
    raise
  else:
    log.end(None)
  finally:
    logging.root.removeHandler(handler)
    absl.removeFilter(of_disks)
    _kept = before
