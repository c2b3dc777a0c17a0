"""The processes of a run meet before JAX joins them, so that one that waits says for whom, and gives up in words.

JAX waits without a word, and aborts in C++ when its time is over. Here process 0 listens at the coordinator's address,
and each other one connects to it and says which it is. Process 0 says who is missing, and lets all go once they are
there; then JAX's own service takes the address. What goes over the wire is a line of JSON:

    process i -> 0     {"kr_jax": 1, "process": 1, "processes": 4}
    0 -> process i     {"missing": [2, 3]}, again and again; then {"go": true}, or {"error": "..."}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import contextlib
import json
import os
import selectors
import socket
import time
from typing import Any

from kr_jax import exits
from kr_jax import progress

PATIENCE_S = 300.0  # that a process waits for the others
SAY_S = 15.0  # between two lines that say what is waited for
_FIRST_S = 1.0  # before the first: most processes start together
_BEAT_S = 1.0  # between two messages of process 0, and between two attempts to connect
_SILENT_S = 10.0  # without a word, after which a connection is taken for dead
_LONGEST = 65536  # bytes of a line


class _Refused(Exception):
  """What a process says of itself does not fit the run."""


def meet(address: str, count: int, index: int) -> None:
  """Returns when all processes of a run are there.

  Args:
    address: 'HOST:PORT' of process 0.

  Raises:
    ValueError: the address is none, or what the processes say of themselves does not fit together.
    SystemExit: with exits.AGAIN, after PATIENCE_S.
  """
  host, port = parsed(address)
  if count < 2:
    return
  wait = _Wait(address, count, index)
  try:
    if index == 0:
      _gather(host, port, count, wait)
    else:
      _join(host, port, count, index, wait)
  except _Refused as error:
    raise ValueError(str(error)) from error


def parsed(address: str) -> tuple[str, int]:
  """Host and port. Raises ValueError for an address that is none."""
  host, colon, port = address.rpartition(':')
  if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise ValueError(f"--coordinator={address} is no 'HOST:PORT': the machine of process 0, and a port of it that is "
                     "free (1 to 65535), as in '10.0.0.2:8476'")
  return host.strip('[]'), int(port)


class _Wait:
  """What a process waits for, which it says from time to time; its patience is limited."""

  def __init__(self, address: str, count: int, index: int):
    self._address, self._who = address, f'process {index} of {count}'
    self._began = time.monotonic()
    self._next = self._began + _FIRST_S
    self.has_said = False

  def look(self, missing: str, why: str) -> None:
    """Says what is missing, if it is time. Raises SystemExit where the time is over."""
    now = time.monotonic()
    waited = now - self._began
    if waited > PATIENCE_S:
      stop = SystemExit(f'{self._who} gave up after {waited:.0f} s: {missing} did not come to {self._address} ({why}). '
                        'Start all processes again, each with its own --process and the same --coordinator and '
                        '--processes')
      stop.code = exits.AGAIN
      raise stop
    if now >= self._next:
      self._next, self.has_said = now + SAY_S, True
      progress.say(f'{self._who} waits for {missing} at {self._address}: {why} ({waited:.0f} of {PATIENCE_S:.0f} s)')

  def done(self) -> None:
    if self.has_said:
      progress.say(f'{self._who}: all are there')


class _Line:
  """A connection on which lines of JSON come and go, none of which is waited for."""

  def __init__(self, connection: socket.socket):
    connection.setblocking(False)
    self.connection, self.heard = connection, time.monotonic()
    self._unread, self.is_open = b'', True

  def read(self) -> Iterator[Any]:
    """The messages that have come; nothing more comes where `is_open` is not."""
    with contextlib.suppress(BlockingIOError):
      try:
        read = self.connection.recv(_LONGEST)
      except BlockingIOError:
        raise
      except OSError:
        read = b''
      self.is_open = self.is_open and bool(read)
      self._unread += read
      self.heard = time.monotonic()
    while b'\n' in self._unread:
      line, _, self._unread = self._unread.partition(b'\n')
      try:
        yield json.loads(line)
      except ValueError:  # UnicodeDecodeError too: another program
        yield None
    if len(self._unread) > _LONGEST:
      self.is_open = False

  def send(self, message: Any) -> None:
    try:
      self.connection.send(json.dumps(message).encode() + b'\n')
    except OSError:  # a few bytes always have room where somebody reads
      self.is_open = False


def _gather(host: str, port: int, count: int, wait: _Wait) -> None:
  """Waits for the others, as process 0."""
  server = _listening(host, port, count)
  lines: dict[_Line, int | None] = {}  # which process it is, once it has said so
  with server, contextlib.ExitStack() as context:
    while missing := sorted({*range(1, count)} - {*lines.values()}):
      _wait_for([server, *(line.connection for line in lines)])
      with contextlib.suppress(BlockingIOError, ConnectionError):
        connection, _ = server.accept()
        lines[_Line(context.enter_context(connection))] = None
      for line in [*lines]:
        _hear(line, lines, count)
        if lines.get(line) is not None:
          line.send({'missing': missing})
        if not line.is_open or lines[line] is None and time.monotonic() - line.heard > _SILENT_S:
          line.connection.close()
          del lines[line]
      wait.look(named(missing), 'start them, or look at what they print' if len(missing) > 1 else
                'start it, or look at what it prints' + _elsewhere(host))
    for line in lines:
      line.send({'go': True})
    _let_go(lines)
  wait.done()


def _hear(line: _Line, lines: dict[_Line, int | None], count: int) -> None:
  """Takes what a process says of itself."""
  for message in line.read():
    try:
      lines[line] = _said(message, {x for other, x in lines.items() if other is not line}, count)
    except _Refused as error:
      peer = ''
      with contextlib.suppress(OSError):
        peer = f' from {line.connection.getpeername()[0]}'
      progress.say(f'a process{peer} was refused: {error}')
      line.send({'error': str(error)})
      line.is_open = False


def _said(message: Any, others: set[int | None], count: int) -> int:
  """Which process a message is of. Raises _Refused."""
  if not isinstance(message, dict) or message.get('kr_jax') != 1:
    raise _Refused('it is no process of a run of this version')
  index, of = message.get('process'), message.get('processes')
  if of != count:
    raise _Refused(f'it has --processes={of}, and process 0 has --processes={count}; give all the same')
  if type(index) is not int or not 0 <= index < count:
    raise _Refused(f'--process={index} of --processes={count} is none of 0 to {count - 1}')
  if index == 0 or index in others:
    raise _Refused(f'--process={index} is there already; give each process a --process of its own')
  return index


def _let_go(lines: dict[_Line, int | None]) -> None:
  """Waits until the others have hung up, so that this end of the connections does not keep the address."""
  until = time.monotonic() + _SILENT_S
  while (left := [line for line in lines if line.is_open]) and time.monotonic() < until:
    _wait_for([line.connection for line in left])
    for line in left:
      [*line.read()]


def _listening(host: str, port: int, count: int) -> socket.socket:
  """A socket at the port of this machine, or at that which JAX is told to listen at in its place. Raises _Refused where
  it is not free."""
  bound = os.environ.get('JAX_COORDINATOR_BIND_ADDRESS', '').rpartition(':')[2]
  port, options = int(bound) if bound.isdecimal() else port, {'backlog': count + 8}
  try:
    if socket.has_dualstack_ipv6():
      with contextlib.suppress(OSError):
        return _without_waiting(socket.create_server(
            ('', port), family=socket.AF_INET6, dualstack_ipv6=True, **options))
    return _without_waiting(socket.create_server(('', port), **options))
  except OSError as error:
    raise _Refused(f'--coordinator={host}:{port} cannot be listened at by process 0: {error.strerror}. Another process '
                   '0, or another run or program, has the port: end it, or name another port to all processes'
                   ) from error


def _without_waiting(server: socket.socket) -> socket.socket:
  server.setblocking(False)
  return server


def _elsewhere(host: str) -> str:
  """Says so where a host is not this machine, as far as this machine can know."""
  try:
    addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
  except OSError:
    return f'; the name {host} is not known here'
  for address in addresses:
    with contextlib.suppress(OSError), socket.socket(
        socket.AF_INET6 if ':' in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
      probe.bind((address, 0))
      return ''
  return f'; {host} is no address of this machine, which is to be that of process 0'


def _join(host: str, port: int, count: int, index: int, wait: _Wait) -> None:
  """Goes to process 0, and waits there for the others."""
  missing, why = 'process 0', ''
  while True:
    try:
      with socket.create_connection((host, port), timeout=_SILENT_S) as connection:
        line = _Line(connection)
        line.send({'kr_jax': 1, 'process': index, 'processes': count})
        missing, why = 'process 0', 'something answers there that is no process 0 of a run that begins; has the run ' \
            'of before not ended?'
        for message in _messages(line, lambda: wait.look(missing, why)):
          if not isinstance(message, dict):
            break
          if 'error' in message:
            raise _Refused(f'process 0 at {host}:{port} refused this process: {message["error"]}')
          if message.get('go') is True:
            wait.done()
            return
          if isinstance(message.get('missing'), list):
            missing, why = named(message['missing']), 'process 0 waits for it, too'
    except OSError as error:
      missing, why = 'process 0', error.strerror or str(error)
    wait.look(missing, why)
    time.sleep(_BEAT_S / 2)


def _messages(line: _Line, look: Callable[[], None]) -> Iterator[Any]:
  """Messages, until the connection ends or says nothing for long."""
  while line.is_open and time.monotonic() - line.heard < _SILENT_S:
    if _wait_for([line.connection]):
      yield from line.read()
    look()


def _wait_for(sockets: Iterable[socket.socket]) -> bool:
  """Whether one of them can be read, within _BEAT_S."""
  with selectors.DefaultSelector() as selector:
    for one in sockets:
      selector.register(one, selectors.EVENT_READ)
    return bool(selector.select(_BEAT_S))


def of_environment() -> tuple[str, int, int] | None:
  """Address, count and index as Cloud TPU, GKE or Slurm say them to JAX; None: JAX does not tell."""
  try:
    from jax._src import clusters  # there is no public function of it
    address, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get('JAX_COORDINATOR_ADDRESS'), None, None, None, None, int(PATIENCE_S))
  except Exception:  # JAX says what is wrong when it is asked to join
    return None
  return None if None in (address, count, index) else (address, count, index)


def named(processes: list[int]) -> str:
  """'process 1', 'processes 1 and 3', 'processes 1, 2, 3, 4 and 12 more'."""
  if len(processes) == 1:
    return f'process {processes[0]}'
  shown = [str(x) for x in processes[:5]]
  last = f'{len(processes) - 5} more' if len(processes) > 5 else shown.pop()
  return f'processes {", ".join(shown)} and {last}'
