"""Who works in a directory: a lock that names its holder, and that a dead holder does not keep.

    with lock.held('runs/arithmetic', '--workdir=runs/arithmetic'):
      ...                     # nobody else is in it; else a ValueError names who is

On a disk it is flock on a file `lock`, which the system lets go when its holder ends, however it ends. (NFS keeps such
locks for all hosts. A file system that knows none, which a warning says, keeps out nobody.) In a bucket it is an object
`lock`, which is created only where there is none and renewed every _RENEWED_S seconds: a holder whose process is gone
from this host is replaced at once, any other one once it was not renewed for _EXPIRES_S seconds by the bucket's own
clock.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from typing import Any, NamedTuple, Self

from absl import logging

from kr_jax import files

FILE = 'lock'
_RENEWED_S, _EXPIRES_S, _LOOK_S = 30.0, 180.0, 5.0
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_READ_S = 1.0  # for a holder to have written who it is


class Lost(files.Unsaved):
  """Another run took a lock that this one held, as it was not renewed for long."""

  is_taken = True


class Holder(NamedTuple):
  """A process that works in a directory."""

  host: str
  pid: int
  started: str  # when the process did, UTC
  ticks: int  # when it did, in the system's ticks since it booted: a number that is used again has others
  boot: str  # of the system
  namespace: str  # of process numbers: a container has its own
  token: str

  @classmethod
  def own(cls) -> Self:
    """This process."""
    began = time.time() - _age_s()
    when = datetime.datetime.fromtimestamp(began, datetime.UTC).strftime('%Y-%m-%d %H:%M:%S UTC')
    return cls(socket.gethostname(), os.getpid(), when, _ticks(os.getpid()) or 0, _boot(), _namespace(),
               secrets.token_hex(8))

  @classmethod
  def read(cls, content: bytes) -> Self | None:
    """Of what a lock holds; None where it is no holder."""
    try:
      tree = json.loads(content)
      return cls(**{name: kind(tree[name]) for name, kind in zip(cls._fields, (str, int, str, int, str, str, str))})
    except (ValueError, TypeError, LookupError):
      return None

  def is_alive(self) -> bool:
    """Whether it is known to be: a process of this host that runs."""
    return self._is_here() and _ticks(self.pid) == self.ticks

  def is_dead(self) -> bool:
    """Whether it is known to be: a process of this host that is gone."""
    return self._is_here() and _ticks(self.pid) != self.ticks

  def _is_here(self) -> bool:
    """Whether its number is of this host's processes, as this process sees them: a container may see others, and hosts
    may have one name."""
    here = socket.gethostname(), _boot(), _namespace()
    return (self.host, self.boot, self.namespace) == here and all(here)

  def __str__(self) -> str:
    return f'process {self.pid} on {self.host}, which began at {self.started}'


def _ticks(pid: int) -> int | None:
  """When a process of this host began, in ticks since it booted; None: there is none, or the system does not tell."""
  try:
    with open(f'/proc/{pid}/stat') as file:
      state, *rest = file.read().rpartition(')')[2].split()
      return None if state in 'ZX' else int(rest[18])
  except (OSError, ValueError, LookupError):
    return None


def _age_s() -> float:
  ticks = _ticks(os.getpid())
  return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK'), 0.0) if ticks else 0.0


def _boot() -> str:
  """What tells this boot of the system from others; '' where it does not tell."""
  try:
    with open('/proc/sys/kernel/random/boot_id') as file:
      return file.read().strip()
  except OSError:
    return ''


def _namespace() -> str:
  try:
    return os.readlink('/proc/self/ns/pid')
  except OSError:
    return ''


_held: dict[tuple[int, str], list[Any]] = {}  # by process and directory: how often it is held, and the lock


@contextlib.contextmanager
def held(directory: str | os.PathLike, whose: str) -> Iterator[None]:
  """Holds the lock of a directory while in it; a process that holds it already does so once more.

  Where no lock can be made, as the directory cannot be written, none is held: whoever writes there says why.

  Args:
    whose: the flag or knob with its value, as messages name the directory.

  Raises ValueError that names the holder where another process holds it.
  """
  directory = files.expanded(directory)
  key = os.getpid(), directory if files.is_remote(directory) else os.path.realpath(directory)
  if key not in _held:
    kind = _Object if files.is_remote(directory) else _File
    _held[key] = [0, kind.taken(directory, whose)]
  _held[key][0] += 1
  try:
    yield
  finally:
    _held[key][0] -= 1
    if not _held[key][0]:
      _, lock = _held.pop(key)
      if lock is not None:
        lock.release()


def check() -> None:
  """Raises Lost where another run has taken a lock that this process holds: nothing more may be written there."""
  for (pid, _), (_, lock) in list(_held.items()):
    if pid == os.getpid() and lock is not None and lock.lost:
      raise Lost(lock.lost)


def _refusal(whose: str, holder: Holder | None) -> ValueError:
  name = whose.partition('=')[0]
  stop = f', stop it (kill {holder.pid} on {holder.host})' if holder else ', stop it'
  return ValueError(f'{whose} is in use by a run: {holder or "another process"}. Wait for its end{stop}, or name '
                    f'another {name}')


class _File:
  """A lock of this machine, or of a file system that hosts share."""

  lost = ''

  def __init__(self, path: str, number: int, folders: list[str]):
    self._path, self._number, self._folders = path, number, folders

  @classmethod
  def taken(cls, directory: str, whose: str) -> Self | None:
    """The lock; None where none can be made. Raises ValueError as `held` does."""
    path, folders = os.path.join(directory, FILE), _missing_folders(directory)
    try:
      os.makedirs(directory, exist_ok=True)
      while True:
        number = _opened(path)
        try:
          fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
          if _is_still(path, number):
            break
        except BlockingIOError:
          raise _refusal(whose, _holder_of(path)) from None
        except OSError:
          os.close(number)
          raise
        except BaseException:
          os.close(number)
          raise
        os.close(number)  # its holder removed the file just now
      content = json.dumps(Holder.own()._asdict()).encode()
      with contextlib.suppress(OSError):  # a full disk, or a file of another user: the lock holds all the same
        os.ftruncate(number, 0)
        os.pwrite(number, content, 0)
    except OSError as error:
      if error.errno in _NO_LOCKS:
        logging.warning('the file system of %s keeps no locks (%s): see to it that no two runs work there', directory,
                        error.strerror)
      return None
    return cls(path, number, folders)

  def release(self) -> None:
    """Lets it go; folders that were made for it alone are removed."""
    with contextlib.suppress(OSError):
      if _is_still(self._path, self._number):
        os.remove(self._path)  # while it is held: who opened it meanwhile finds that it is another file
    os.close(self._number)
    with contextlib.suppress(OSError):  # something is there
      for folder in self._folders:
        os.rmdir(folder)


def _missing_folders(directory: str) -> list[str]:
  """The directory and those that it lies in, as far as they are not there, the innermost first."""
  found = []
  while directory and not os.path.lexists(directory):
    found.append(directory)
    directory = os.path.dirname(directory)
  return found


def _opened(path: str) -> int:
  try:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
  except PermissionError:  # of another user, whose lock may be read
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _is_still(path: str, number: int) -> bool:
  """Whether an open file is what stands at a path."""
  try:
    return os.path.samestat(os.stat(path), os.fstat(number))
  except FileNotFoundError:
    return False


def _holder_of(path: str) -> Holder | None:
  """Who a file says that holds it; None where it says so neither now nor in a moment."""
  end = time.monotonic() + _READ_S
  while True:
    with contextlib.suppress(OSError):
      if found := Holder.read(files.read(path)):
        return found
    if time.monotonic() > end:
      return None
    time.sleep(0.05)


class _Object:
  """A lock in a bucket.

  Attributes:
    lost: why it is not held any more; '': it is.
  """

  def __init__(self, url: str, holder: Holder):
    self._url, self._holder, self.lost = url, holder, ''
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._renew, name='lock', daemon=True)

  @classmethod
  def taken(cls, directory: str, whose: str) -> Self | None:
    """As of _File; says what it waits for."""
    lock, seen, since = cls(files.join(directory, FILE), Holder.own()), b'', 0.0
    try:
      while not lock._create():
        found = lock._look()
        if found is None:  # it was let go just now
          continue
        if found.content != seen:
          if seen or found.holder and found.holder.is_alive():
            raise _refusal(whose, found.holder)
          seen, since = found.content, time.monotonic() - found.age_s
          if not found.is_left(since):
            logging.warning(
                '%s may be in use by a run: %s. If it is, its lock there is renewed within %.0f s; if it is not, this '
                'run begins in %.0f s', whose, found.holder or 'an unknown process', _RENEWED_S,
                since + _EXPIRES_S - time.monotonic())
        if found.is_left(since):
          logging.warning('%s was left by a run that ended without a word: %s; this one goes on', whose,
                          found.holder or 'an unknown process')
          lock._remove(found.generation)
          seen = b''
          continue
        time.sleep(_LOOK_S)
    except OSError:  # whoever writes there says why
      return None
    lock._thread.start()
    return lock

  def release(self) -> None:
    self._ended.set()
    self._thread.join()
    with contextlib.suppress(OSError):
      found = self._look()
      if found and self._is_own(found):
        self._remove(found.generation)

  def _content(self) -> bytes:
    return json.dumps(self._holder._asdict() | {'renewed': time.time()}).encode()

  def _create(self) -> bool:
    """Whether the object was not there, and is now this lock."""
    try:
      files.call(self._url, 'pipe_file', self._url, self._content(), mode='create')
      return True
    except OSError as error:
      if _is_of_another(error):
        # A try that was sent twice, as its answer was lost, met itself.
        found = self._look()
        return bool(found and self._is_own(found))
      raise

  def _is_own(self, found: _Seen) -> bool:
    return bool(found.holder) and found.holder.token == self._holder.token

  def _look(self) -> _Seen | None:
    """What is there; None: nothing."""
    try:
      about = files.call(self._url, 'info', self._url)
      content = files.read(self._url)
    except FileNotFoundError:
      return None
    return _Seen(content, Holder.read(content), str(about.get('generation') or ''), self._age_s(about))

  def _age_s(self, about: dict[str, Any]) -> float:
    """Seconds since it was renewed, by the clock of the bucket, which dates a file that is written now."""
    probe = f'{self._url}-{secrets.token_hex(4)}'
    files.call(probe, 'pipe_file', probe, b'')
    try:
      now, then = _date(files.call(probe, 'info', probe)), _date(about)
    finally:
      files.remove(probe)
    return (now - then).total_seconds() if now and then else 0.0

  def _remove(self, generation: str) -> None:
    """Removes the object; of Google's buckets only if it is still this generation of it."""
    with contextlib.suppress(FileNotFoundError):
      if not self._url.startswith(('gs://', 'gcs://')):
        files.call(self._url, 'rm_file', self._url)
        return
      bucket, _, name = self._url.partition('://')[2].partition('/')
      try:
        files.call(self._url, 'call', 'DELETE', 'b/{}/o/{}', bucket, name, ifGenerationMatch=generation)
      except OSError as error:
        if not _is_of_another(error):
          raise

  def _renew(self) -> None:
    while not self._ended.wait(_RENEWED_S):
      try:
        found = self._look()
        if found and not self._is_own(found):
          self.lost = (f'{self._url} was taken by another run: {found.holder or "an unknown process"}. This one did '
                       f'not renew it for {_EXPIRES_S:.0f} s, as its machine or network stood still, and stops; its '
                       'last checkpoint stays')
          logging.error('%s', self.lost)
          return
        if not self._ended.is_set():
          files.write(self._url, self._content())
      except OSError:  # tried again in a while
        pass


class _Seen(NamedTuple):
  """A lock in a bucket, as it was found."""

  content: bytes
  holder: Holder | None
  generation: str
  age_s: float  # since it was renewed; 0.0: not known

  def is_left(self, since: float) -> bool:
    """Whether its holder is gone. since: by this process's clock, when it was last seen to be renewed."""
    return bool(self.holder) and self.holder.is_dead() or time.monotonic() - since > _EXPIRES_S


def _is_of_another(error: OSError) -> bool:
  """Whether a call failed as the object is not what it was taken for: not absent, or of another generation."""
  return isinstance(error.__cause__, FileExistsError) or str(getattr(error.__cause__, 'code', '')) == '412'


def _date(about: dict[str, Any]) -> datetime.datetime | None:
  """When a file of a bucket was written; None where it is not told."""
  found = about.get('updated') or about.get('LastModified') or about.get('mtime')
  try:
    found = datetime.datetime.fromisoformat(found) if isinstance(found, str) else found
  except ValueError:
    return None
  return found if isinstance(found, datetime.datetime) else None  # some clients give seconds
