"""How far something is: a bar in a terminal and in a notebook, plain lines elsewhere. Nothing of it can stop a run.

What a stream cannot take (it is closed or full, or knows ASCII alone) is written as well as it goes, or not at all. A
program whose own stdout and stderr shall be so too calls `harden` at its start.
"""

from __future__ import annotations

import atexit
import codecs
from collections.abc import Callable, Iterator
import contextlib
import errno
import importlib.util
import logging
import os
import sys
import time
from typing import Any

from absl import logging as absl_logging
import tqdm

_EVERY_S = 10  # seconds from one plain line to the next
_ASCII = {'±': '+-', '…': '...', '–': '-', '—': '-', '→': '->', '·': '-', '−': '-', '×': 'x', '≥': '>=', '≤': '<='}
_INSTEAD = 'kr_jax'  # the name of `_instead`, as open() takes it
_ENDED = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ENXIO)  # what is at the other end takes nothing any more
_ALARM, _PLAIN = '\x1b[1;33m', '\x1b[0m'  # bold and yellow; and as before


class Stream:
  """A stream that takes what it can, and never raises.

  Args:
    find: the stream; it is asked each time, as notebooks and tests change sys.stderr.
  """

  def __init__(self, find: Callable[[], Any]):
    self._find = find

  def __getattr__(self, name: str) -> Any:
    return getattr(self._find(), name)

  def __eq__(self, other: Any) -> bool:  # tqdm asks so which of its bars are in the way of a line
    return _innermost(self) is _innermost(other)

  __hash__ = None

  def write(self, text: str) -> int:
    size, stream = len(text), self._find()
    try:
      try:
        stream.write(text)
      except UnicodeEncodeError:
        for character, instead in _ASCII.items():
          text = text.replace(character, instead)
        stream.write(text.encode('ascii', 'replace').decode())
    except (OSError, ValueError, AttributeError) as error:  # full or broken, closed, None
      self._has_failed(error)
    return size  # as if all had been taken

  def flush(self) -> None:
    try:
      self._find().flush()
    except (OSError, ValueError, AttributeError) as error:
      self._has_failed(error)

  def _has_failed(self, error: Exception) -> None:
    """Is told of an error, of which nobody else hears."""

  def isatty(self) -> bool:
    try:
      return bool(self._find().isatty())
    except (OSError, ValueError, AttributeError):
      return False


def _innermost(stream: Any) -> Any:
  """The stream that others are wrapped around."""
  while isinstance(stream, Stream):
    stream = stream._find()
  return stream


ERR, OUT = Stream(lambda: sys.stderr), Stream(lambda: sys.stdout)


class _Standard(Stream):
  """stdout or stderr of this process: once its other end is gone, what is written there goes nowhere."""

  def _has_failed(self, error: Exception) -> None:
    if isinstance(error, OSError) and error.errno in _ENDED:
      self.let_go()

  def let_go(self) -> None:
    """Has the stream, and all that writes past it, write to nowhere, so that its buffer can be emptied."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._find().fileno())
      os.close(nowhere)

  def end(self) -> None:
    """Writes what waits, or drops it: the interpreter would end with an error of its own."""
    try:
      self._find().flush()
    except (OSError, ValueError, AttributeError):
      self.let_go()


def harden() -> None:
  """Makes stdout and stderr of this process streams that take what they can and never raise, until its end.

  It is for a program's start: nothing that it prints, logs or raises then ends it, and its exit status is its own.
  """
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:  # closed: the next file that is opened would have its number, and get what is printed
      os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # as those of the processes that this one starts are
  codecs.register_error(_INSTEAD, _instead)
  for name, number in (('stdout', 1), ('stderr', 2)):
    stream = getattr(sys, name)
    if isinstance(stream, Stream):
      continue
    if stream is None:
      stream = open(number, 'w', errors=_INSTEAD, closefd=False)
    elif hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors=_INSTEAD)
    standard = _Standard(lambda stream=stream: stream)
    for handler in (*logging.root.handlers, absl_logging.get_absl_handler().python_handler):
      if isinstance(handler, logging.StreamHandler) and handler.stream in (stream, None):
        handler.setStream(standard)
    setattr(sys, name, standard)
    atexit.register(standard.end)


def _instead(error: UnicodeError) -> tuple[str, int]:
  """What is written of characters that a stream's encoding does not have, as codecs.register_error takes it."""
  if not isinstance(error, UnicodeEncodeError):
    raise error
  text = error.object[error.start:error.end]
  return ''.join(_ASCII.get(x) or x.encode('ascii', 'backslashreplace').decode() for x in text), error.end


# Who else is told what is said, but for bars: a function of a text and whether it is an alarm.
_listeners: list[Callable[[str, bool], None]] = []


@contextlib.contextmanager
def heard_by(listener: Callable[[str, bool], None]) -> Iterator[None]:
  """While in it, a function is told each text that is said, and whether it is an alarm."""
  _listeners.append(listener)
  try:
    yield
  finally:
    _listeners.remove(listener)


def _tell(text: str, alarm: bool = False) -> None:
  for listener in [*_listeners]:
    listener(text, alarm)


def note(text: str) -> None:
  """Tells those who hear what is said a text that stands on the terminal already."""
  _tell(text)


def _is_notebook() -> bool:
  """Whether this is a notebook that can draw a bar: Jupyter, Colab, VS Code."""
  return 'ipykernel.zmqshell' in sys.modules and importlib.util.find_spec('ipywidgets') is not None


def _is_terminal(stream: Stream) -> bool:
  """Whether a bar has room there: some runners give a terminal without columns."""
  try:
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
  except (OSError, ValueError, AttributeError):
    return False


def has_colours(stream: Stream) -> bool:
  """Whether it is a terminal that shows colours, and NO_COLOR is not set."""
  return stream.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb'


def say(text: str, *, alarm: bool = False) -> None:
  """Writes a text to stdout, above any bar, at once. alarm: so that it stands out."""
  _tell(text, alarm)
  if alarm:
    text = f'{_ALARM}ALARM{_PLAIN}: {text}' if has_colours(OUT) else f'ALARM: {text}'
  with tqdm.tqdm.external_write_mode(file=OUT):
    OUT.write(f'{text}\n')
    OUT.flush()


class Progress:
  """A bar, or plain lines: one every ten seconds at most, one at the end, and no carriage returns.

  Args:
    first, last: of the units, of which those before `first` are done already.
    unit: 'B' are bytes.
    leave: whether it stays to be seen after its end.
    disable: shows nothing.
  """

  def __init__(self, name: str, first: int, last: int, unit: str = 'step', *, leave: bool = True,
               disable: bool = False):
    self.n, self.total, self.disable = first, last, disable
    self._name, self._first, self._unit, self._leave = name, first, unit, leave
    self._postfix, self._is_compiling = '', False
    self._start = self._said_at = time.monotonic()
    self._said = None  # what was said last
    self._bar = None
    if not disable and (_is_notebook() or _is_terminal(ERR)):
      of_scale = {'unit_scale': True, 'unit_divisor': 1000} if unit == 'B' else {}
      shown = {'file': ERR, 'dynamic_ncols': True} if not _is_notebook() else {}
      self._bar = _kind()(desc=name, initial=first, total=last, unit=unit, leave=leave, mininterval=0.5, **of_scale,
                          **shown)
      self._bar._time = time.monotonic  # a machine's clock may be set meanwhile, and tqdm takes that one
      self._bar.start_t = self._bar.last_print_t = time.monotonic()

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def update(self, n: int = 1) -> None:
    """Notes that n more units are done."""
    self.n += n
    self.compiling(False)
    if self._bar is not None:
      self._bar.update(n)
    elif time.monotonic() - self._said_at >= _EVERY_S:
      self._line()

  def compiling(self, is_so: bool = True) -> None:
    """Says that what runs now is compiled first; until the next update."""
    if is_so == self._is_compiling:
      return
    self._is_compiling = is_so
    if self._bar is not None:
      self._bar.set_description_str(f'{self._name} (compiling)' if is_so else self._name, refresh=is_so)
    elif is_so:
      self._line()

  def leave_out(self, seconds: float) -> None:
    """Leaves seconds that have just passed, such as those of compilation, out of the rate and the time that is left."""
    now = time.monotonic()
    self._start = min(self._start + seconds, now)
    if self._bar is not None:
      self._bar.start_t += seconds
      # The time since is what the next unit is taken to need.
      self._bar.last_print_t = min(self._bar.last_print_t + seconds, now)

  def set_postfix(self, refresh: bool = True, **shown: Any) -> None:
    """What is shown beside how far it is."""
    self._postfix = ', '.join(f'{name}={x}' for name, x in shown.items())
    if self._bar is not None:
      self._bar.set_postfix_str(self._postfix, refresh=refresh)

  def write(self, text: str, *, alarm: bool = False) -> None:
    """Writes a line above the bar."""
    if not self.disable:
      say(text, alarm=alarm)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
    elif self._leave and self._text() != self._said:
      self._is_compiling = False
      self._line()
    self.disable = True

  def _text(self) -> str:
    """How far it is, in words."""
    show = (lambda n: tqdm.tqdm.format_sizeof(n, 'B')) if self._unit == 'B' else str
    units = '' if self._unit == 'B' else f' {self._unit}s'
    text = f'{self._name}: {show(self.n)} of {show(self.total)}{units}'
    done, seconds = self.n - self._first, time.monotonic() - self._start
    if self._is_compiling:
      text += ', compiling'
    elif done > 0 and self._unit != 'B':
      text += f', {seconds / done:.3g} s a {self._unit}'
      if self.n < self.total:
        text += f', {tqdm.tqdm.format_interval(seconds / done * (self.total - self.n))} left'
    return f'{text}; {self._postfix}' if self._postfix else text

  def _line(self) -> None:
    self._said_at = time.monotonic()
    if not self.disable:
      self._said = self._text()
      _tell(self._said)
      ERR.write(f'{self._said}\n')
      ERR.flush()


def _kind() -> type:
  """tqdm's bar of a notebook, or of a terminal."""
  if not _is_notebook():
    return tqdm.tqdm
  from tqdm import notebook  # loads ipywidgets
  return notebook.tqdm
