"""Verifier processes: their program, and what they and the pool (workers.py) say to each other.

    pool -> server     one process that imports the verifiers once; it forks a keeper for each pair of sockets it gets
    server -> keeper   makes namespaces, forks the worker, and ends it and its descendants when the pool hangs up
    keeper -> worker   goes behind walls (walls.py), then verifies one completion after the other

What goes down is pickled. What comes up is data: a process that read hostile text may have written it. A reply is a
line of JSON, of the form that `read_reply` checks, with the nonce of its request; prints of verifiers do not reach it.
The other socket is the worker's stderr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import json
import os
import pickle
import signal
import socket
import struct
import sys
import tempfile
import traceback
from typing import Any, NamedTuple

from kr_jax.rewards import isolation
from kr_jax.rewards import orphans
from kr_jax.rewards import verdicts
from kr_jax.rewards import verifiers
from kr_jax.rewards import walls
from kr_jax.types import Task

# What a worker does with a function of the setup: Request.kind.
VERIFY, ANSWER, JOIN = 'verify', 'answer', 'join'
MAX_LINE = 3 << 19  # bytes of a reply
MAX_NOTE = 300  # characters of a note
MAX_ANSWER = 100_000  # characters of an answer; JSON takes at most 12 bytes a character
_FILE_MB, _DISK_MB, _PROCESSES = 64, 256, 256  # what a worker may take
_FAILED = (verdicts.RAISED, verdicts.INVALID)  # outcomes of answers and joins that failed in the worker
_LENGTH = struct.Struct('<I')
# The program of the server. What ends it is ignored before anything is imported, which takes a second.
PROGRAM = ('import signal; [signal.signal(x, signal.SIG_IGN) for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]; '
           'from kr_jax.rewards import worker; worker.main()')
IS_VERIFIER = 'KR_JAX_VERIFIER'  # the variable that says so of a process


class Setup(NamedTuple):
  """What a server starts with."""

  modules: tuple[str, ...]  # to import
  imported: tuple[str, ...]  # verifiers 'module:function' or '/PATH.py:function', to check
  functions: tuple[tuple[tuple[str, str], bytes], ...]  # by kind and name of the verifier; pickled
  memory_mb: int
  readable: tuple[str, ...]  # folders, in addition to the verifiers' packages
  network: bool


class Request(NamedTuple):
  """One thing to compute."""

  number: int
  nonce: str
  kind: str
  verifier: str  # the name of the function among those of the kind
  completion: str = ''
  task: int = -1  # the number of a task that was sent before
  texts: tuple[str, ...] = ()  # of JOIN: answers to one task, each once, in an order


class Reply(NamedTuple):
  """What came of a request."""

  outcome: int  # of verdicts.OUTCOMES; NONE where an answer or a join succeeded
  reward: float = 0.0
  note: str = ''  # what went wrong; a text to be read
  value: Any = None  # of ANSWER: text or None; of JOIN: of each text the place of the first that is the same


def frame(message: Any) -> bytes:
  """A message to a worker: (index, Task), None, which forgets the tasks, or a Request."""
  packed = pickle.dumps(message)
  return _LENGTH.pack(len(packed)) + packed


def _frames(channel: socket.socket) -> Iterator[Any]:
  """Messages, until the other end hangs up."""
  with channel.makefile('rb') as file:
    while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
      yield pickle.loads(file.read(*_LENGTH.unpack(head)))


def line(request: Request, reply: Reply) -> bytes:
  """A reply as it is sent."""
  return json.dumps([request.number, request.nonce, *reply], allow_nan=False).encode() + b'\n'


def read_reply(text: bytes, request: Request) -> Reply:
  """The reply to a request in a line. Raises ValueError for a line that is not one."""
  read = json.loads(text, parse_constant=_no_constant)
  if not (isinstance(read, list) and len(read) == 6 and read[:2] == [request.number, request.nonce]):
    raise ValueError('it does not reply to the request')
  outcome, reward, note, value = read[2:]
  if type(outcome) is not int or not verdicts.NONE <= outcome < len(verdicts.OUTCOMES):
    raise ValueError('it has no outcome')
  if (outcome == verdicts.NONE) != (request.kind != VERIFY and outcome not in _FAILED):
    raise ValueError('it has the outcome of another kind of request')
  if type(reward) is not float or verdicts.reward_problem(reward):
    raise ValueError('its reward is no number, or out of range')
  if not isinstance(note, str) or len(note) > MAX_NOTE:
    raise ValueError('its note is not a short text')
  if outcome == verdicts.NONE and request.kind == JOIN:
    if not (isinstance(value, list) and len(value) == len(request.texts)
            and all(type(i) is int and 0 <= i <= j and value[i] == i for j, i in enumerate(value))):
      raise ValueError('it does not join answers')
  elif not (value is None or request.kind == ANSWER and isinstance(value, str) and len(value) <= MAX_ANSWER):
    raise ValueError('its answer is not a text')
  return Reply(outcome, reward, note, value)


def _no_constant(name: str) -> float:
  raise ValueError(f'{name} is no number')


def environment(folder: str) -> dict[str, str]:
  """The variables of a server, and of its workers: nothing of this process's own but what Python needs to start."""
  names = ('PATH', 'LANG', 'LD_LIBRARY_PATH')  # some interpreters find their own library by the last
  kept = {name: x for name, x in os.environ.items() if name in names or name.startswith('LC_')}
  threads = dict.fromkeys(('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'), '1')
  # JAX_PLATFORMS: a module of the user that imports JAX must not take the devices of the run.
  return kept | threads | {
      'HOME': folder, 'TMPDIR': folder, 'PYTHONHASHSEED': '0', 'JAX_PLATFORMS': 'cpu', IS_VERIFIER: '1',
      'PYTHONPATH': os.pathsep.join(dict.fromkeys(os.path.abspath(path) for path in sys.path))}


# The server.


def main() -> None:
  """The program of the server: a Setup comes on stdin, and sockets on the socket that its first argument names.

  Its second is the lifeline, its third the folder of the pool, which is removed here where the pool went away.
  """
  orphans.open_standard_files()
  control, lifeline = (socket.socket(fileno=int(x)) for x in sys.argv[1:3])
  control.set_inheritable(False)
  lifeline.set_inheritable(False)
  orphans.ignore_signals()
  orphans.end_with(lifeline)
  setup = pickle.load(sys.stdin.buffer)
  functions, errors = _load(setup)
  with contextlib.suppress(BrokenPipeError):  # the pool was closed, which the loop below sees
    control.sendall(json.dumps(errors).encode() + b'\n')
  readable = tuple(dict.fromkeys((*walls.interpreter(), *_packages(), *setup.readable)))
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
  while True:
    try:
      _, files, _, _ = socket.recv_fds(control, 1, 2)
    except ConnectionError:  # the pool did not read what it was sent above
      files = []
    if not files:
      break
    if not os.fork():
      control.close()
      lifeline.close()
      _keep(setup, functions, readable, *map(lambda fd: socket.socket(fileno=fd), files))
    for file in files:
      os.close(file)
  walls.remove(sys.argv[3])


def _load(setup: Setup) -> tuple[dict[tuple[str, str], Callable], list[str]]:
  """The functions, and what is wrong with some of them."""
  for module in setup.modules:
    with contextlib.suppress(Exception):  # the verifier raises it again when it is called, which can say so
      verifiers.import_module(module)
  errors, functions = [], {}
  for name in setup.imported:
    try:
      verifiers.import_function(name)
    except ValueError as error:
      errors.append(str(error))
  for (kind, name), pickled in setup.functions:
    try:
      functions[kind, name] = pickle.loads(pickled)
    except Exception as error:
      errors.append(f'the verifier {name} cannot be imported by verifier processes: {error!r}; put it in a module that '
                    'is importable from where the run starts')
  return functions, errors


def _packages() -> Iterator[str]:
  """The folders and files of the packages that are imported: what modules may read, and no more of where they lie."""
  for name, module in sorted(sys.modules.items()):
    if '.' not in name and name != '__main__':
      yield from getattr(module, '__path__', [])
      if file := getattr(module, '__file__', None):
        yield os.path.dirname(file) if os.path.basename(file) == '__init__.py' else file


# The keeper.


def _keep(setup: Setup, functions: dict[tuple[str, str], Callable], readable: Sequence[str],
          channel: socket.socket, errors: socket.socket) -> None:
  """Runs a worker until it ends or the pool hangs up; does not return."""
  try:
    folder = tempfile.mkdtemp()
    start = functools.partial(_work, setup, functions, readable, channel, errors, folder)
    code = isolation.confine(start, lifeline=errors.fileno(), folder=folder, disk_mb=_DISK_MB, network=setup.network)
    channel.close()
    walls.remove(folder)
    ended = f'exit status {code}' if code <= 128 else f'signal {code - 128}'
    with contextlib.suppress(OSError):
      errors.send(f'\nits process ended with {ended}'.encode(), socket.MSG_DONTWAIT)
  except BaseException:
    with contextlib.suppress(OSError):
      errors.send(traceback.format_exc().encode(), socket.MSG_DONTWAIT)
  finally:
    os._exit(0)


# The worker.


def _work(setup: Setup, functions: dict[tuple[str, str], Callable], readable: Sequence[str],
          channel: socket.socket, errors: socket.socket, folder: str, standing: tuple[str, ...]) -> int:
  """Answers requests until the pool hangs up, or the disk is half full."""
  signals: list[int] = []
  orphans.note_signals(lambda: signals.append(1))
  os.environ['HOME'] = os.environ['TMPDIR'] = tempfile.tempdir = folder
  os.chdir(folder)
  os.dup2(errors.fileno(), 2)
  errors.close()
  limits = isolation.Limits(seconds=float('inf'), memory_mb=setup.memory_mb, processes=_PROCESSES, file_mb=_FILE_MB)
  standing = walls.enter(limits, writable=(folder,), readable=readable, network=setup.network, standing=standing)
  channel.sendall(json.dumps(list(standing)).encode() + b'\n')
  tasks: dict[int, Task] = {}
  for message in _frames(channel):
    if message is None:
      tasks.clear()
    elif not isinstance(message, Request):
      tasks.update([message])
    else:
      for _ in range(2):
        signals.clear()
        reply = _reply(functions[message.kind, message.verifier], message, tasks.get(message.task))
        isolation.end_descendants()
        if not signals:  # which may have ended what the verdict had started
          break
      channel.sendall(line(message, reply))
      disk = os.statvfs(folder)
      if 'mounts' in standing and 2 * min(disk.f_bavail / disk.f_blocks, disk.f_favail / disk.f_files) < 1:
        break  # what verdicts left behind must not fail those to come: another process takes its place
  return 0


def _reply(function: Callable, request: Request, task: Task | None) -> Reply:
  try:
    if request.kind == JOIN:
      return Reply(verdicts.NONE, value=_join(function, request.texts))
    found = function(request.completion, task)
    if request.kind == VERIFY:
      return Reply(found.outcome, found.reward, found.reason[:MAX_NOTE])
    if found is not None and len(found) > MAX_ANSWER:
      return Reply(verdicts.INVALID, note=f'an answer of {len(found)} characters; at most {MAX_ANSWER}')
    return Reply(verdicts.NONE, value=found)
  except BaseException as error:  # SystemExit too: it must not end the worker
    return Reply(verdicts.INVALID if _is_of_check(error) else verdicts.RAISED, note=_last_line(error))


def _is_of_check(error: BaseException) -> bool:
  """Whether the error says that what a verifier returned is no verdict or no answer."""
  step = error.__traceback__
  while step and step.tb_next:
    step = step.tb_next
  return isinstance(error, (TypeError, ValueError)) and step.tb_frame.f_code in (
      verdicts.checked.__code__, verifiers.verify.__code__, verifiers.answer.__code__)


def _last_line(error: BaseException) -> str:
  try:
    return traceback.format_exception_only(error)[-1].strip()[:MAX_NOTE]
  except BaseException:  # an exception may be anything
    return type(error).__name__[:MAX_NOTE]


def _join(same: Callable[[str, str], bool], texts: Sequence[str]) -> list[int]:
  """Of each text the place of the first that stands for itself and is the same."""
  first = []
  for j, text in enumerate(texts):
    first.append(next((i for i in range(j) if first[i] == i and same(text, texts[i])), j))
  return first
