"""The pool of verifier processes: which process computes what, when a process is ended, and what counts as a reply.

A process has a few requests in its pipe, as many as take some milliseconds, so that it never waits for the pool. The
clock of a request starts when the reply before it came. If a process dies, its first request is tried once more,
when all others are done, alone in a new process; the other requests in its pipe go to other processes.

A verifier that fails on everything must not take R timeouts of a call. Once so many seconds passed without one of its
verdicts as _MOST_LOST timeouts take, requests of tasks that had a part in it are put off; at twice that, all of its
requests are. They are tried if a verdict comes after all, else they fail unseen.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import json
import os
import pickle
import selectors
import socket
import subprocess
import sys
import time
import weakref

from absl import logging

from kr_jax import scratch
from kr_jax.rewards import isolation
from kr_jax.rewards import orphans
from kr_jax.rewards import verdicts
from kr_jax.rewards import walls
from kr_jax.rewards import worker
from kr_jax.rewards.worker import Reply, Request
from kr_jax.types import Task

_START_S = 300.0  # for a process to start: imports of verifiers on a machine that is busy
_END_S = 10.0  # for a process that is killed to be gone
_AHEAD_S = 0.005  # requests in the pipe of a process take this long together
_MOST_AHEAD = 32
_TAIL = 2000  # bytes that are kept of what a process wrote to stderr
_MOST_LOST, _MOST_LOST_EACH = 16, 4  # timeouts of a verifier without a verdict; of each process, if that is more
_STARTS = 3  # attempts to start a process that fail, in a row, before the pool gives up


class _Process:
  """A worker process, as the pool sees it."""

  def __init__(self, channel: socket.socket, errors: socket.socket):
    self.channel, self.errors = channel, errors
    self.queue: collections.deque[Request] = collections.deque()  # the first is what it computes now
    self.tasks: set[int] = set()  # the numbers of those that it was sent
    self.unsent, self.unread, self.tail = bytearray(), bytearray(), b''
    self.is_ready = False  # whether it is behind its walls
    self.is_new = True  # whether it got no request yet
    self.ending: tuple[int, str] | None = None  # why it is ended: outcome and note of its first request
    self.since = time.monotonic()  # when it began what it does now
    self.pace_s = _AHEAD_S  # running mean of the time of a request

  @property
  def room(self) -> int:
    """How many more requests it may get."""
    return 1 + min(_MOST_AHEAD, int(_AHEAD_S / self.pace_s)) - len(self.queue)


class Pool:
  """Worker processes, which are started when they are needed; close it.

  Args:
    count: how many processes, at most.
    timeout_s: seconds that a request may take.

  Attributes:
    standing: the names, in isolation.WALLS, of the walls that processes are behind; None: none is ready yet.
    leave: called once a second or more often while replies are waited for; an error that it raises ends `run`.
  """

  def __init__(self, setup: worker.Setup, count: int, timeout_s: float):
    self._setup, self._count, self._timeout_s = setup, count, timeout_s
    orphans.open_standard_files()
    scratch.sweep(walls.remove)
    self._folder = scratch.folder()
    os.chmod(self._folder, 0o711)  # workers, which are other users, have folders in it
    self._remove_folder = weakref.finalize(self, _remove, self._folder)
    self._selector = selectors.DefaultSelector()
    self._processes: list[_Process] = []
    self._waiting: collections.deque[Request] = collections.deque()
    self._again: collections.deque[Request] = collections.deque()  # their process died
    self._tried: set[int] = set()  # numbers of requests whose process died
    self._put_off: list[Request] = []  # nothing of their verifier succeeded
    self._most_lost_s = max(_MOST_LOST, _MOST_LOST_EACH * count) * timeout_s
    # By kind and verifier: seconds that brought nothing, of which tasks, and whether a request succeeded.
    self._lost_s: collections.Counter[tuple[str, str]] = collections.Counter()
    self._losers: set[tuple[str, str, int]] = set()
    self._successful: set[tuple[str, str]] = set()
    self._failed_starts = 0
    self.standing: tuple[str, ...] | None = None
    self.leave: Callable[[], None] = lambda: None
    self._start_server()

  def _start_server(self) -> None:
    self._control, theirs = socket.socketpair()
    self._lifeline, other_end = socket.socketpair()  # the server dies with this process's end (orphans.py)
    with theirs, other_end:
      ends = [theirs.fileno(), other_end.fileno()]
      self._server = subprocess.Popen(
          [sys.executable, '-c', worker.PROGRAM, *map(str, ends), self._folder], env=worker.environment(self._folder),
          stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=ends, start_new_session=True)
    with contextlib.suppress(BrokenPipeError), self._server.stdin as stdin:
      pickle.dump(self._setup, stdin)  # where it is dead, it is found so when it is asked for a process

  def check(self) -> None:
    """Waits for the verifiers to be imported.

    Raises ValueError if that fails, RuntimeError if it ends the process or takes more than _START_S seconds.
    """
    self._control.settimeout(_START_S)
    try:
      with self._control.makefile('rb') as file:  # nothing else comes on this socket
        answer = file.readline()
    except TimeoutError:
      raise RuntimeError(f'the import of the modules {self._setup.modules} took more than {_START_S:g} s') from None
    finally:
      self._control.settimeout(None)
    if not answer:
      raise RuntimeError(f'the process that imports the verifiers ended with {self._server.wait()}; what it printed '
                         'may say why')
    if errors := json.loads(answer):
      raise ValueError('; '.join(errors))

  def _start(self) -> _Process:
    """A new process, which becomes ready later.

    Raises RuntimeError if servers end, one after the other, and ValueError after `close`.
    """
    if not self._remove_folder.alive:
      raise ValueError('these verifier processes were closed')
    (channel, theirs), (errors, their_errors) = socket.socketpair(), socket.socketpair()
    process = _Process(channel, errors)
    with theirs, their_errors, contextlib.ExitStack() as closing:
      closing.enter_context(channel)
      closing.enter_context(errors)
      while True:
        try:
          socket.send_fds(self._control, [b'+'], [theirs.fileno(), their_errors.fileno()])
          break
        except OSError:
          self._count_failed_start(f'the process that imports the verifiers ended with {self._server.wait()}')
          self._hang_up_server()
          self._start_server()
      closing.pop_all()  # they stay open
    for end in (channel, errors):
      end.setblocking(False)
      self._selector.register(end, selectors.EVENT_READ, process)
    self._processes.append(process)
    return process

  def _hang_up_server(self) -> None:
    self._control.close()
    self._lifeline.close()

  def _count_failed_start(self, why: str) -> None:
    self._failed_starts += 1
    if self._failed_starts >= _STARTS * self._count:
      raise RuntimeError(f'verifier processes do not start: {why}')

  def run(self, requests: Iterable[Request], tasks: Sequence[Task]) -> Iterator[tuple[Request, Reply]]:
    """The replies to requests, in the order in which they come.

    requests: with unique numbers; they are taken when a process has room. tasks: by Request.task.
    """
    source, is_more = iter(requests), True
    for process in self._processes:
      process.tasks.clear()
      process.unsent += worker.frame(None)
    try:
      while True:
        self.leave()
        is_more, is_busy = self._feed(source, is_more, tasks)
        if not is_more and not self._waiting and not any(process.queue for process in self._processes):
          if self._again:
            self._feed_again(tasks)
          elif self._put_off:
            yield from self._give_up()
            continue
          else:
            return
        yield from self._serve(is_busy)
    finally:  # where the source raised, or the caller went away
      for process in [*self._processes]:
        if process.queue:
          self._end(process, verdicts.NONE, '')
          process.queue.clear()
      for kept in (self._waiting, self._again, self._tried, self._put_off, self._lost_s, self._losers,
                   self._successful):
        kept.clear()

  def _feed(self, source: Iterator[Request], is_more: bool, tasks: Sequence[Task]) -> tuple[bool, bool]:
    """Sends requests to processes with room, for some milliseconds: whether the source has more; whether there is
    room still."""
    until = time.monotonic() + _AHEAD_S
    while time.monotonic() < until:
      if not self._waiting:
        if not is_more or (request := next(source, None)) is None:
          return False, False
        self._waiting.append(request)
      if self._is_hopeless(self._waiting[0]):
        self._put_off.append(self._waiting.popleft())
        continue
      process = min((p for p in self._processes if not p.ending), key=lambda p: len(p.queue), default=None)
      if (process is None or process.queue) and len(self._processes) < self._count:
        process = self._start()
      if process is None or process.room <= 0:
        return is_more, False
      self._send(process, self._waiting.popleft(), tasks)
    return is_more, True

  def _feed_again(self, tasks: Sequence[Task]) -> None:
    """Sends requests whose process died to new processes, one to each."""
    for process in [*self._processes]:
      if not process.is_new and not process.ending:
        self._end(process, verdicts.NONE, '')
    free = [process for process in self._processes if not process.ending]
    while self._again and (free or len(self._processes) < self._count):
      self._send(free.pop() if free else self._start(), self._again.popleft(), tasks)

  def _is_hopeless(self, request: Request) -> bool:
    """Whether the verifier took long and gave nothing, for several tasks or for this one."""
    of = (request.kind, request.verifier)
    lost_s = 0.0 if of in self._successful else self._lost_s[of]
    return lost_s >= 2 * self._most_lost_s or lost_s >= self._most_lost_s and (*of, request.task) in self._losers

  def _note(self, request: Request, outcome: int, since: float) -> None:
    """Notes what a request brought that was begun at a time."""
    of = (request.kind, request.verifier)
    if outcome in (verdicts.NONE, *verdicts.VERIFIED):
      self._successful.add(of)
    else:
      self._lost_s[of] += min(self._timeout_s, time.monotonic() - since)  # it may have been seen late
      self._losers.add((*of, request.task))

  def _give_up(self) -> Iterator[tuple[Request, Reply]]:
    """Replies to the requests that were put off, or lets them be tried where others succeeded since."""
    given_up = [request for request in self._put_off if self._is_hopeless(request)]
    self._waiting.extend(request for request in self._put_off if not self._is_hopeless(request))
    self._put_off.clear()
    for (kind, name), number in collections.Counter((x.kind, x.verifier) for x in given_up).items():
      logging.warning('%d completions were not tried: the verifier %s gave nothing in %.1f s.', number, name,
                      self._lost_s[kind, name])
    for request in given_up:
      yield request, Reply(verdicts.TIMEOUT, note='not tried: the verifier gave nothing on others')

  def _send(self, process: _Process, request: Request, tasks: Sequence[Task]) -> None:
    if not process.queue and process.is_ready:
      process.since = time.monotonic()
    if request.task >= 0 and request.task not in process.tasks:
      process.tasks.add(request.task)
      process.unsent += worker.frame((request.task, tasks[request.task]))
    process.unsent += worker.frame(request)
    process.queue.append(request)
    process.is_new = False
    self._flush(process)

  def _flush(self, process: _Process) -> None:
    """Sends what the socket takes; the rest when there is room."""
    if process.channel.fileno() < 0:
      return
    try:
      while process.unsent:
        del process.unsent[:process.channel.send(process.unsent)]
    except BlockingIOError:
      pass
    except OSError:
      process.unsent.clear()  # it is dead, which the other socket tells
    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if process.unsent else 0)
    if self._selector.get_key(process.channel).events != events:
      self._selector.modify(process.channel, events, process)

  def _serve(self, is_busy: bool) -> Iterator[tuple[Request, Reply]]:
    """Reads from processes, and ends those whose time is over. is_busy: does not wait for anything."""
    ends = [self._end_of_time(process) for process in self._processes]
    wait_s = 0.0 if is_busy else max(0.0, min([*ends, time.monotonic() + 1.0]) - time.monotonic())
    for key, events in self._selector.select(wait_s):
      process = key.data
      if key.fileobj is process.errors:
        yield from self._read_errors(process)
      elif process.ending is None:
        if events & selectors.EVENT_WRITE:
          self._flush(process)
        if events & selectors.EVENT_READ:
          yield from self._read(process)
    now = time.monotonic()
    for process in [*self._processes]:
      if now >= self._end_of_time(process):
        if process.ending:
          yield from self._bury(process)  # it cannot be killed
        elif process.is_ready:
          self._end(process, verdicts.TIMEOUT, f'none in {self._timeout_s:g} s')
        else:
          self._end(process, verdicts.NONE, f'it did not start in {_START_S:g} s')

  def _end_of_time(self, process: _Process) -> float:
    if process.ending:
      return process.since + _END_S
    if not process.is_ready:
      return process.since + _START_S
    return process.since + self._timeout_s if process.queue else float('inf')

  def _end(self, process: _Process, outcome: int, note: str) -> None:
    """Lets a process be killed. It is gone when its errors are at their end."""
    if process.queue and outcome != verdicts.NONE:
      self._note(process.queue[0], outcome, process.since)
    process.ending, process.since = (outcome, note), time.monotonic()
    self._hang_up(process)
    with contextlib.suppress(OSError):  # it is gone
      process.errors.shutdown(socket.SHUT_WR)

  def _hang_up(self, process: _Process) -> None:
    if process.channel.fileno() >= 0:
      self._selector.unregister(process.channel)
      process.channel.close()

  def _read(self, process: _Process) -> Iterator[tuple[Request, Reply]]:
    """Takes what a process wrote: replies, and first of all the walls that it is behind."""
    try:
      read = process.channel.recv(1 << 16)
    except OSError:
      return
    if not read:
      self._hang_up(process)  # its keeper tells the rest on the other socket
    process.unread += read
    while process.ending is None and (length := process.unread.find(b'\n')) >= 0:
      text = bytes(process.unread[:length])
      del process.unread[:length + 1]
      if not process.is_ready:
        self._make_ready(process, text)
        continue
      try:
        request = process.queue[0]
        reply = worker.read_reply(text, request)
      except (ValueError, IndexError, RecursionError) as error:
        self._end(process, verdicts.INVALID, f'its process sent what is no reply: {error}')
        return
      process.queue.popleft()
      now = time.monotonic()
      process.pace_s = max(1e-6, 0.9 * process.pace_s + 0.1 * (now - process.since))
      self._note(request, reply.outcome, process.since)
      process.since = now
      yield request, reply
    if process.ending is None and len(process.unread) > worker.MAX_LINE:
      self._end(process, verdicts.INVALID, f'its process sent a reply of more than {worker.MAX_LINE} bytes')

  def _make_ready(self, process: _Process, text: bytes) -> None:
    """Reads the names of the walls that a process is behind."""
    try:
      standing = json.loads(text)
      if not isinstance(standing, list) or not all(name in isolation.WALLS for name in standing):
        raise ValueError('it does not name walls')
    except (ValueError, TypeError, RecursionError) as error:
      self._end(process, verdicts.NONE, f'its process sent what is no greeting: {error}')
      return
    process.is_ready, process.since, self._failed_starts = True, time.monotonic(), 0
    if self.standing is None:
      self.standing = tuple(standing)
      missing = [name for name in isolation.WALLS if name not in standing]
      logging.log(logging.WARNING if missing else logging.INFO,
                  'Verifier processes are behind these walls: %s; not behind: %s.%s', ', '.join(standing) or 'none',
                  ', '.join(missing) or 'none', ' kr_jax/rewards/README.md says what they need.' if missing else '')

  def _read_errors(self, process: _Process) -> Iterator[tuple[Request, Reply]]:
    """Takes what a process and its keeper wrote to stderr; buries the process at the end of it."""
    try:
      read = process.errors.recv(1 << 16)
    except BlockingIOError:
      return
    except OSError:
      read = b''
    process.tail = (process.tail + read)[-_TAIL:]
    if not read:
      if process.ending is None and process.channel.fileno() >= 0:
        yield from self._read(process)  # replies that it wrote before it died
      yield from self._bury(process)

  def _bury(self, process: _Process) -> Iterator[tuple[Request, Reply]]:
    """Forgets a process that is gone, and decides what becomes of its requests."""
    self._hang_up(process)
    self._selector.unregister(process.errors)
    process.errors.close()
    self._processes.remove(process)
    last_words = ' '.join(process.tail.decode(errors='replace').split())[-worker.MAX_NOTE:]
    outcome, note = process.ending or (verdicts.DIED, last_words)
    if not process.is_ready:
      self._count_failed_start(note or last_words)
    elif process.queue and outcome != verdicts.NONE:
      request = process.queue.popleft()
      if not process.ending:
        self._note(request, outcome, process.since)
      if outcome == verdicts.DIED and request.number not in self._tried:
        self._tried.add(request.number)
        self._again.append(request)
      else:
        yield request, Reply(outcome, note=note)
    self._waiting.extendleft(reversed(process.queue))
    process.queue.clear()

  def close(self) -> None:
    """Ends the processes, and waits until they are gone."""
    for process in self._processes:
      process.queue.clear()
      if not process.ending:
        self._end(process, verdicts.NONE, '')
    self._failed_starts = -len(self._processes)  # those that did not start yet do not count
    while self._processes:
      for _ in self._serve(False):
        pass
    self._hang_up_server()
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._server.wait(_END_S)
    self._server.kill()  # where it may be in an import of the user's, and has no lifeline
    self._server.wait()
    self._selector.close()
    self._remove_folder()


def _remove(folder: str) -> None:
  scratch.release(folder)
  walls.remove(folder)
