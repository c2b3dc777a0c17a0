"""Walls around processes that read hostile text, and around programs that are hostile (isolation.py makes the walls).

A process puts itself behind walls by `enter`; `run` runs a program behind walls, from anywhere, and returns what it
printed. On Linux all of isolation.WALLS may stand, elsewhere only limits of a process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import contextlib
import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

from kr_jax.rewards import isolation
from kr_jax.rewards.isolation import Limits, end_descendants

# What processes may read of the system, and what they need of it to use the network. Not all of /etc: some of its
# files are secrets that only the user of the files keeps from others.
_SYSTEM = ('/usr', '/lib', '/lib64', '/bin', '/sbin', '/etc/ld.so.cache', '/etc/ld.so.conf', '/etc/ld.so.conf.d',
           '/etc/localtime', '/etc/timezone', '/etc/passwd', '/etc/group', '/etc/nsswitch.conf', '/etc/mime.types',
           '/etc/alternatives', '/etc/ssl/openssl.cnf', '/dev/zero', '/dev/full', '/dev/random', '/dev/urandom',
           '/proc/self', '/proc/cpuinfo', '/proc/meminfo', '/sys/devices/system/cpu')
_NETWORK = ('/etc/resolv.conf', '/etc/hosts', '/etc/host.conf', '/etc/gai.conf', '/etc/services', '/etc/protocols',
            '/etc/ssl/certs', '/etc/pki', '/etc/ca-certificates', '/run/systemd/resolve')

_lock, _running = threading.Lock(), 0  # how many programs run behind the walls of this process


def interpreter() -> tuple[str, ...]:
  """What Python programs read: the interpreter and the packages that are installed for it."""
  installed = [path for path in sys.path if os.path.basename(path) in ('site-packages', 'dist-packages')]
  programs = [os.path.dirname(path) for path in (sys.executable, os.path.realpath(sys.executable)) if sys.executable]
  return tuple(dict.fromkeys(map(os.path.realpath, (
      sys.prefix, sys.base_prefix, *programs, os.path.dirname(os.__file__), *installed))))


def enter(limits: Limits, *, writable: Sequence[str] = (), readable: Iterable[str] | None = None,
          network: bool = False, standing: Sequence[str] = ()) -> tuple[str, ...]:
  """Puts the calling process, which has one thread, behind walls, and what it starts from now on.

  Args:
    limits: `memory_mb` is beyond what it has now.
    writable: folders that it may write in.
    readable: folders and files that it may read in addition to the system's; None: those of `interpreter`.
    network: whether it may open sockets.
    standing: walls that `confine` put up.

  Returns:
    The names, in isolation.WALLS, of the walls that stand.
  """
  return isolation.enter(limits, writable=writable, readable=_readable(readable, network), network=network,
                         standing=standing)


def _readable(own: Iterable[str] | None = None, network: bool = False) -> list[str]:
  return [*_SYSTEM, *(_NETWORK if network else ()), *(interpreter() if own is None else own)]


def remove(folder: str) -> None:
  """Removes a folder that hostile processes wrote in, which have ended, whatever its depth and modes are."""
  with contextlib.suppress(RecursionError):
    shutil.rmtree(folder, ignore_errors=True)
  if os.path.exists(folder):
    for command in (['chmod', '-R', 'u+rwx'], ['rm', '-rf']):
      with contextlib.suppress(OSError):
        subprocess.run([*command, folder], stderr=subprocess.DEVNULL, check=False)


class Finished(NamedTuple):
  """What came of a program."""

  code: int  # its exit status; as in a shell, 128 plus the signal that ended it, or 127 if it could not be started
  stdout: bytes  # at most output_kb
  stderr: bytes  # at most output_kb
  timed_out: bool


def run(command: Sequence[str], *, stdin: bytes = b'', limits: Limits = Limits(), folder: str) -> Finished:
  """Runs a program behind walls, in a folder, the only one that it may write in; its descendants end with it.

  Its environment is PATH, LANG, and HOME and TMPDIR, which are the folder.
  """
  folder = os.path.realpath(folder)
  environment = {'PATH': os.environ.get('PATH', os.defpath), 'LANG': 'C.UTF-8', 'HOME': folder, 'TMPDIR': folder}
  start = functools.partial(
      subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder,
      env=environment)
  run_it = _run_here if isolation.is_behind() else _run_confined
  try:
    code, *output = run_it(start, command, stdin, limits, folder)
  except (FileNotFoundError, PermissionError) as error:
    return Finished(127, b'', str(error).encode(), False)
  return Finished(isolation.exit_status(code), *output)


def _run_here(start: Callable[..., subprocess.Popen], command: Sequence[str], stdin: bytes, limits: Limits,
              folder: str) -> tuple[int, bytes, bytes, bool]:
  """Runs a program from a process behind walls, all of whose children are such programs; threads may share it."""
  global _running
  process = None

  def end() -> None:
    global _running
    if process:
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
      process.kill()
      process.wait()
    with _lock:
      _running -= 1
      if not _running:
        end_descendants()  # those that left the group

  with _lock:
    _running += 1
  try:
    process = start(command, start_new_session=True,
                    preexec_fn=functools.partial(isolation.enter_program, limits, folder, _readable()))
  except BaseException:
    end()
    raise
  output = _exchange(process, stdin, limits, end)
  return process.returncode, *output


def _run_confined(start: Callable[..., subprocess.Popen], command: Sequence[str], stdin: bytes, limits: Limits,
                  folder: str) -> tuple[int, bytes, bytes, bool]:
  """Runs a program from a process that may have threads, which a fork does not copy, and other children."""
  lifeline, ours = os.pipe()
  with open(ours, 'wb') as ours:
    process = start([sys.executable, '-I', '-S', os.path.abspath(isolation.__file__),
                     json.dumps([lifeline, limits, folder, _readable()]), *command], pass_fds=[lifeline])
    os.close(lifeline)

    def end() -> None:
      ours.close()
      process.wait()

    output = _exchange(process, stdin, limits, end)
  return process.returncode, *output


def _exchange(process: subprocess.Popen, stdin: bytes, limits: Limits, end: Callable[[], None]
              ) -> tuple[bytes, bytes, bool]:
  """Serves the pipes of a program until it ends or its time is over, and ends it: (stdout, stderr, timed out)."""
  until = time.monotonic() + limits.seconds
  kept = {process.stdout: bytearray(), process.stderr: bytearray()}
  unsent = memoryview(stdin)

  def serve(wait_s: float) -> None:
    nonlocal unsent
    for key, _ in selector.select(wait_s):
      pipe, is_over = key.fileobj, False
      try:
        if pipe is process.stdin:
          unsent = unsent[os.write(pipe.fileno(), unsent[:65536]) if unsent else 0:]
          is_over = not unsent
        else:
          read = os.read(pipe.fileno(), 65536)
          kept[pipe] += read[:max(0, (limits.output_kb << 10) - len(kept[pipe]))]
          is_over = not read
      except BrokenPipeError:
        is_over = True
      if is_over:
        selector.unregister(pipe)
        pipe.close()

  with process.stdin, process.stdout, process.stderr, selectors.DefaultSelector() as selector:
    for pipe in (process.stdin, *kept):
      os.set_blocking(pipe.fileno(), False)
      selector.register(pipe, selectors.EVENT_WRITE if pipe is process.stdin else selectors.EVENT_READ)
    while process.poll() is None and time.monotonic() < until:
      if selector.get_map():
        serve(0.02)
      else:
        time.sleep(0.001)  # it closed its pipes and goes on
    timed_out = process.returncode is None
    end()
    last = time.monotonic() + 1  # nobody writes any more: this reads to the ends of the pipes
    while not (process.stdout.closed and process.stderr.closed) and time.monotonic() < last:
      serve(0.02)
  return bytes(kept[process.stdout]), bytes(kept[process.stderr]), timed_out
