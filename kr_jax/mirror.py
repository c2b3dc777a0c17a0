"""A workdir in a bucket: the record of a run is written in a directory of this machine, and copied to the bucket.

    with mirror.opened('gs://BUCKET/RUN', create=True) as place:
      ...                     # all that reads and writes the record does so in place.path

Of a workdir of this machine `place.path` is the workdir. Of a bucket's it is a new directory, into which the record is
fetched first, so that a run goes on on a fresh disk. What has changed there is copied to the bucket every so many
seconds, before each checkpoint (`push`, so that metrics never lag behind a checkpoint), and at the end. Of several
processes the first writes; the others fetch config.json alone. Checkpoints are not copied: they are written to the
bucket itself (`url`).

Opening is nested: what a thread has open stays as it is, so that each function that is given a workdir opens it.
Another thread, which may read a run that is at work, has a directory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from typing import NamedTuple

import jax
import numpy as np

from kr_jax import disks
from kr_jax import files
from kr_jax import processes

EVERY_S = 30.0  # between two copies in the background
WAITS_S = (2.0, 8.0, 30.0, 60.0)  # before a copy that failed is tried again, where it has to succeed
_SHARE = 0.05  # of the time that copies in the background may take
_LONGEST_S = 600.0  # between two tries in the background, where they fail
_CONFIG = 'config.json'
# Directories of a workdir that are no record: they are written to the bucket directly, or are of no use to a run.
_NOT_FETCHED = ('checkpoints', 'export', 'profile', 'xla')
_UNFINISHED = ('.tmp', '.new')
_PREFIX = 'kr_jax-'  # of directories in that of temporary files


class _Sign(NamedTuple):
  """A file's state, another one whenever it is written."""

  size: int
  time_ns: int


class Place:
  """Where the record of a workdir stands.

  Attributes:
    path: the directory on this machine.
    url: the workdir as it was given.
    has_failed: whether `push` has.
  """

  def __init__(self, path: str, url: str, writes: bool):
    self.path, self.url, self._writes, self.has_failed = path, url, writes, False
    self._sent: dict[str, _Sign] = self._signs() if writes else {}
    self._lock, self._stopping, self._has_warned = threading.Lock(), threading.Event(), False
    self._thread = threading.Thread(target=self._beat, name='mirror', daemon=True) if writes else None
    if self._thread:
      self._thread.start()

  def push(self) -> None:
    """Copies to the bucket what has changed. Raises files.Unsaved where that fails for a while."""
    for wait_s in (*WAITS_S, None):
      try:
        self._push()
        return
      except OSError as error:
        if wait_s is None:
          self.has_failed = True
          raise files.Unsaved(f'the record cannot be copied to {self.url}: {error}. It stays in {self.path}') from error
        self._warn(error)
      time.sleep(wait_s)

  def stop(self) -> None:
    """Ends the copies in the background."""
    self._stopping.set()

  def close(self) -> None:
    """Copies what is left, and ends the copies in the background. Raises files.Unsaved as `push` does."""
    self.stop()
    if self._thread:
      self._thread.join()
    self.push()
    self._writes = False

  def shown(self, text: str) -> str:
    """A text in which the directory has the name of the workdir."""
    return text.replace(self.path, self.url)

  def remove(self) -> None:
    """Removes the directory, once it is copied."""
    shutil.rmtree(os.path.dirname(self.path), ignore_errors=True)

  def _push(self) -> None:
    if not self._writes:
      return
    with self._lock:
      now = self._signs()
      changed = [name for name, sign in now.items() if self._sent.get(name) != sign]
      # A directory that lost the config was emptied by another program, such as one that clears temporary files.
      gone = [name for name in self._sent if name not in now] if _CONFIG in now else []

      def send(name: str) -> None:
        try:
          content = _content(os.path.join(self.path, name))
        except FileNotFoundError:  # removed meanwhile
          return
        files.write(files.join(self.url, name), content)
        self._sent[name] = now[name]

      files.each(send, changed)
      for name in gone:
        files.remove(files.join(self.url, name))
        del self._sent[name]

  def _signs(self) -> dict[str, _Sign]:
    """The files of the directory by their names in it."""
    found = {}
    for folder, _, names in os.walk(self.path):
      for name in names:
        path = os.path.join(folder, name)
        if not name.endswith(_UNFINISHED):
          with contextlib.suppress(OSError):  # removed meanwhile
            status = os.stat(path)
            found[os.path.relpath(path, self.path)] = _Sign(status.st_size, status.st_mtime_ns)
    return found

  def _beat(self) -> None:
    wait_s = EVERY_S
    while not self._stopping.wait(wait_s):
      began = time.monotonic()
      try:
        self._push()
        wait_s = max(EVERY_S, (time.monotonic() - began) / _SHARE)
      except OSError as error:
        self._warn(error)
        wait_s = min(2 * wait_s, _LONGEST_S)

  def _warn(self, error: OSError) -> None:
    if not self._has_warned:
      logging.getLogger('absl').warning('the record is not copied to %s: %s. It is tried again', self.url, error)
    self._has_warned = True


def _content(path: str) -> bytes:
  with open(path, 'rb') as file:
    return file.read()


_open: dict[tuple[int, str], Place] = {}  # by thread, and workdir or directory


@contextlib.contextmanager
def opened(workdir: str | os.PathLike, *, create: bool = False) -> Iterator[Place]:
  """The place of a workdir's record, while in it.

  Args:
    create: whether there may be nothing yet.

  Raises:
    ValueError: nothing is there, or the bucket cannot be read.
    files.Unsaved: at the end, what was written could not be copied; it stays on this machine. Or, with `create`, a disk
      is full, read-only or gone: what was raised in it is said in a sentence, with the checkpoint that is left.
  """
  workdir, thread = files.expanded(workdir), threading.get_ident()
  if (thread, workdir) in _open or not files.is_remote(workdir):
    place = _open.get((thread, workdir)) or _here(workdir, create)
    try:
      yield place
    except Exception as error:
      _rename(error, place)
      _raise_explained(error, place, create)
      raise
    return
  place = _fetched(workdir, create)
  _open[thread, place.path] = _open[thread, workdir] = place
  try:
    yield place
    place.close()
  except BaseException as error:
    if place.has_failed or getattr(error, 'is_taken', False):
      raise
    explained = _unsaved(error, place) if create else None
    if explained is None:
      _rename(error, place)
    try:
      place.close()
    except files.Unsaved as unsaved:  # what ends the run is raised
      if error.args and isinstance(error.args[0], str):
        error.args = (f'{error.args[0]}; {unsaved}', *error.args[1:])
      else:
        logging.getLogger('absl').error('%s', unsaved)
    else:
      place.remove()
    if explained is not None and explained is not error:
      raise explained from error
    raise
  else:
    place.remove()
  finally:
    place.stop()
    del _open[thread, place.path], _open[thread, workdir]


def _rename(error: BaseException, place: Place) -> None:
  """Has an error name the workdir, as it was given, in the place of the directory."""
  if error.args and isinstance(error.args[0], str):
    error.args = (place.shown(error.args[0]), *error.args[1:])


def _raise_explained(error: Exception, place: Place, writes: bool) -> None:
  """Raises, in the place of an error of the disk that a run is written to, the sentence that says what to free."""
  if writes and (unsaved := _unsaved(error, place)) is not None and unsaved is not error:
    raise unsaved from error


def _unsaved(error: BaseException, place: Place) -> files.Unsaved | None:
  """The error of a disk with the checkpoint that a run goes on from once that is mended; None for any other error."""
  if not isinstance(error, Exception) or str(error).startswith('cannot write to '):  # which says all of it
    return None
  found = files.explained(error, place.path)
  if not isinstance(found, files.Unsaved) or found.again:
    return None
  if not found.names_checkpoint:
    directory = _checkpoints(place)
    step = None if files.is_remote(directory) else disks.last_checkpoint(directory)
    goes_on = ('it goes on from the last checkpoint' if files.is_remote(directory) else
               'there is no checkpoint of a step yet' if step is None else
               f'it goes on from the checkpoint of step {step} in {directory}')
    found.args, found.names_checkpoint = (f'{found}: {goes_on}',), True
  return found


def _checkpoints(place: Place) -> str:
  """The directory of a run's checkpoints, as its config says; beside the record where that is not known."""
  directory = ''
  with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
    directory = str(json.loads(files.read(os.path.join(place.path, _CONFIG)))['checkpoint']['directory'])
  return files.join(files.expanded(directory or place.url), 'checkpoints')


def _here(workdir: str, create: bool) -> Place:
  """Of a workdir of this machine."""
  if not create and not os.path.isdir(workdir):
    raise ValueError(f'{workdir} is no directory; train first')
  return Place(workdir, workdir, writes=False)


def _fetched(workdir: str, create: bool) -> Place:
  """Of a workdir of a bucket, with its record fetched."""
  is_first = not jax.distributed.is_initialized() or processes.is_first()  # else devices would be looked for
  try:
    folder = tempfile.mkdtemp(prefix=_PREFIX)
  except OSError as error:
    raise ValueError(f'the record of {workdir} has no place on this machine: {error}; set TMPDIR to a directory that '
                     'can be written') from error
  path = os.path.join(folder, workdir.rpartition('/')[2])

  def fetch(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile, by a run that is at work
      files.fetch(files.join(workdir, name), os.path.join(path, name), found[name] if create else None)

  try:
    os.mkdir(path)
    found = files.listed(workdir)
    if not found and not create:
      raise ValueError(f'{workdir} holds nothing; train first')
    files.each(fetch, [name for name in found if (_is_record(name) if is_first else name == _CONFIG)])
  except BaseException as error:
    explained = files.explained(error, folder, f'the record of {workdir}') if isinstance(error, OSError) else error
    shutil.rmtree(folder, ignore_errors=True)
    if isinstance(explained, files.Unsaved):
      raise ValueError(f'{explained}; or set TMPDIR to a directory of another disk') from error
    if isinstance(error, OSError):
      raise ValueError(str(error)) from error
    raise
  return Place(path, workdir, writes=is_first)


def _is_record(name: str) -> bool:
  return bool(name) and name != 'lock' and not any(part in _NOT_FETCHED for part in name.split('/')[:-1])


def url(path: str | os.PathLike) -> str:
  """Where a directory is copied to; the path itself, expanded, where it is not."""
  path = files.expanded(path)
  return next((place.url for place in list(_open.values()) if place.path == path), path)


def push() -> None:
  """Copies what has changed of every workdir that this thread has open; before a checkpoint. Raises files.Unsaved."""
  for (thread, name), place in list(_open.items()):
    if thread == threading.get_ident() and name == place.path:
      place.push()


@contextlib.contextmanager
def output(directory: str | os.PathLike, mark: str = '') -> Iterator[str]:
  """A directory of this machine to write to, which is the given one, or is copied to it at the end where that is of a
  bucket.

  Args:
    mark: a file that each directory has which may be replaced, an object whose `files` are those that are: others stay;
      '': all stay.

  Raises:
    ValueError: the directory holds other files, or the bucket cannot be read or written.
  """
  directory = files.expanded(directory)
  if not files.is_remote(directory):
    yield directory
    return
  try:
    found = files.listed(directory)
    if mark and found and mark not in found:
      raise ValueError(f'{directory} holds {sorted(found)[:9]}, which were not written by this command: it replaces '
                       'none but its own files; name a new directory, or empty this one')
    old = _named(files.join(directory, mark)) & set(found) if mark and found else set()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
      path = os.path.join(folder, directory.rpartition('/')[2])
      yield path
      if mark and _CONFIG in found:  # without which a directory is no checkpoint
        files.remove(files.join(directory, _CONFIG))
      if mark and not found:  # first, so that what is cut short may be replaced
        files.send(os.path.join(path, mark), files.join(directory, mark))
      names = files.send_all(path, directory, last=_CONFIG)
      for name in old - set(names):
        files.remove(files.join(directory, name))
  except OSError as error:
    is_full = error.errno == errno.ENOSPC  # here: what buckets raise has no number
    place = f'; it is put together in {tempfile.gettempdir()} first, which TMPDIR sets' if is_full else ''
    raise ValueError(f'{directory} cannot be written: {error}{place}') from error


def _named(url: str) -> set[str]:
  """The files that a mark names. Raises ValueError for a broken one."""
  try:
    return set(json.loads(files.read(url))['files'])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{url} is not the list of files that this command wrote; name a new directory, or empty this '
                     'one') from error


def check_shared(directory: str) -> None:
  """Raises ValueError, in every process of a run, unless all see the same directory."""
  if jax.process_count() == 1:
    return
  token = processes.gather(np.frombuffer(os.urandom(8), np.uint8))[0].tobytes().hex()
  path, is_first, error = files.join(files.expanded(directory), f'.seen-{token}'), processes.is_first(), ''
  if is_first:
    try:
      files.write(path, token)
    except OSError as found:
      error = str(files.explained(found, directory, 'what all processes read'))
  refused = processes.any_of(bool(error))  # none reads before it is written
  try:
    sees = files.read(path).decode() == token
  except OSError:
    sees = False
  sees_P = processes.gather(np.array(sees))
  host = np.zeros(64, np.uint8)
  name = socket.gethostname().encode()[:len(host)]
  host[:len(name)] = np.frombuffer(name, np.uint8)
  host_P = [bytes(x).rstrip(b'\0').decode(errors='replace') for x in processes.gather(host)]
  if is_first and not refused:
    with contextlib.suppress(OSError):
      files.remove(path) if files.is_remote(path) else os.remove(path)
  if refused:
    raise ValueError(error or f'{directory} cannot be written by process 0; see its message')
  if blind := [f'{i} ({host_P[i]})' for i in np.flatnonzero(~sees_P)]:
    raise ValueError(
        f'process {", ".join(blind)} does not see what process 0 ({host_P[0]}) writes to {directory}: all processes '
        'save one checkpoint together. Name a directory that all hosts share, --workdir=gs://BUCKET/RUN or '
        '--config.checkpoint.directory=gs://BUCKET/RUN')
