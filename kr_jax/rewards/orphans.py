"""How the processes of verifiers end with the run, whatever they are at.

    pool ── a socket, the lifeline ── server ── keeper ── worker ── what a verdict starts

The kernel closes the run's end of the lifeline when the run ends, and kills the server for it at once: in a loop in C,
or stopped, too (fcntl(2), F_SETSIG). Each process below has the death of the one above as its own (prctl(2),
PR_SET_PDEATHSIG; isolation.py). Where there is no F_SETSIG, as on macOS, a thread waits at the lifeline: an import that
never lets other threads run outlives the run there.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import fcntl
import os
import select
import signal
import socket
import threading

# What may reach all processes of a run at once: Ctrl-C, a launcher that ends a group, a terminal that is closed. The
# run alone heeds them, finishes its step, and ends these processes itself.
OF_THE_RUN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_kept: list[socket.socket] = []  # else this end would be closed as garbage


def open_standard_files() -> None:
  """Opens stdin, stdout and stderr, to nowhere, where this process was started without them: else a socket would have
  their numbers, and what is printed would go there."""
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def ignore_signals() -> None:
  """Leaves the signals of the run to the run."""
  for number in OF_THE_RUN:
    signal.signal(number, signal.SIG_IGN)


def note_signals(note: Callable[[], None]) -> None:
  """Calls `note` for each signal of the run, and does nothing else of it; programs that this process starts, and its
  forks, have the usual actions."""
  for number in OF_THE_RUN:
    signal.signal(number, lambda *_: note())  # a handler, as an ignored signal would be ignored by programs, too
  os.register_at_fork(after_in_child=_heed)


def _heed() -> None:
  for number in OF_THE_RUN:
    with contextlib.suppress(ValueError):  # in a thread
      signal.signal(number, signal.SIG_DFL)


def end_with(lifeline: socket.socket) -> None:
  """Ends this process with SIGKILL when the other end of the lifeline is closed."""
  _kept.append(lifeline)
  try:
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
  except (OSError, AttributeError):  # AttributeError: not Linux
    threading.Thread(target=_wait, args=(lifeline,), daemon=True).start()
  if select.select([lifeline], [], [], 0)[0]:  # it was closed before
    _kill()


def _wait(lifeline: socket.socket) -> None:
  select.select([lifeline], [], [])
  _kill()


def _kill() -> None:
  os.kill(os.getpid(), signal.SIGKILL)
