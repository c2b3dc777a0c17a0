"""How far something is: a bar in a terminal and in a notebook, plain lines elsewhere. Nothing of it can stop a run.

What a stream cannot take (it is closed or full, or knows ASCII alone) is written as well as it goes, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import importlib.util
import os
import sys
import time
from typing import Any

import tqdm

_EVERY_S = 10  # seconds from one plain line to the next
_ASCII = {'±': '+-', '…': '...', '–': '-', '—': '-', '→': '->', '·': '-', '−': '-', '×': 'x', '≥': '>=', '≤': '<='}
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
    return self._find() is (other._find() if isinstance(other, Stream) else other)

  __hash__ = None

  def write(self, text: str) -> None:
    stream = self._find()
    try:
      try:
        stream.write(text)
      except UnicodeEncodeError:
        for character, instead in _ASCII.items():
          text = text.replace(character, instead)
        stream.write(text.encode('ascii', 'replace').decode())
    except (OSError, ValueError, AttributeError):  # full or broken, closed, None
      pass

  def flush(self) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
      self._find().flush()

  def isatty(self) -> bool:
    try:
      return bool(self._find().isatty())
    except (OSError, ValueError, AttributeError):
      return False


ERR, OUT = Stream(lambda: sys.stderr), Stream(lambda: sys.stdout)


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
      self._bar.last_print_t = min(self._bar.last_print_t + seconds, time.time())

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
      ERR.write(f'{self._said}\n')
      ERR.flush()


def _kind() -> type:
  """tqdm's bar of a notebook, or of a terminal."""
  if not _is_notebook():
    return tqdm.tqdm
  from tqdm import notebook  # loads ipywidgets
  return notebook.tqdm
