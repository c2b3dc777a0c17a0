"""Disks that are full, read-only or gone: what an error of one means, and what to free."""

from __future__ import annotations

from collections.abc import Iterator
import errno
import os
import re
import shutil

# What an error of a disk means, and what to do about it.
_OF_DISKS = {
    errno.ENOSPC: ('the disk of {place} is full ({free} now)', 'Free some room there'),
    errno.EDQUOT: ('the quota on the disk of {place} is used up', 'Remove files of yours there, or ask for a larger '
                   'quota'),
    errno.EFBIG: ('a file in {place} would be larger than this process or that disk allows',
                  'Look at `ulimit -f`, and name a directory of another disk if it is unlimited'),
    errno.EROFS: ('the disk of {place} can only be read', 'Mount it so that it can be written: Linux makes a disk '
                  'read-only where it fails, which `dmesg` says'),
    errno.EIO: ('the disk of {place} fails (input/output error)', 'Look at `dmesg`, and copy what is there to another '
                'disk'),
    errno.EMFILE: ('this process has as many files open as it may', 'Raise `ulimit -n`'),
}
_ELSEWHERE = ('a disk is full, though that of {place} is not ({free})',
              'Look at `df -h` and `df -i`, /tmp and /dev/shm among them, and free some room')
_GONE = ('what {place} held is not there any more: it was removed, or its disk unmounted, while it was used',
         'Put back what it held')
_DIRECTORY = ('{path} is a directory, where a file belongs', 'Move it away')
_REFUSED = ('{place} may not be written any more', "Look at its owner and permissions (`ls -ld`)")
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV, errno.ENOTCONN)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_TEXTS = {number: os.strerror(number) for number in (*_OF_DISKS, *_MISSING, *_FORBIDDEN, errno.EISDIR)}
_MUCH = 2 ** 30  # bytes: a disk that has them free is not full
_QUOTED = re.compile(r'"(/[^"]+)"')


class Unsaved(OSError):
  """What a run leaves could not be written to its disk or bucket; a sentence says why, and what to do.

  Attributes:
    again: whether a new start of the same command may mend it, with nothing done before.
    names_checkpoint: whether the sentence says which checkpoint is left.
    is_taken: whether another run writes there now, so that nothing more may be written.
  """

  is_taken = False

  def __init__(self, text: str, *, again: bool = True, names_checkpoint: bool = False):
    super().__init__(text)
    self.again, self.names_checkpoint = again, names_checkpoint


def explained(error: Exception, directory: str, what: str = 'the record', needed: int | None = None
              ) -> Exception:
  """An Unsaved that says in a sentence which disk is full, read-only or gone, and what to free; the error itself where
  it is no error of a disk.

  Args:
    error: an OSError, or that of a library, such as Orbax's, which tells the system's error in its text.
    directory: that was written. A file that is missing or forbidden is the disk's error only where it lies there.
    what: could not be written.
    needed: bytes that it takes; None: not known.
  """
  if isinstance(error, Unsaved):
    return error
  for cause in _chain(error):
    named = _named(cause)
    path = named or directory
    is_writing = not isinstance(cause, OSError) and 'writing' in str(cause)  # others may have made the directory anew
    is_gone = is_writing or not os.path.isdir(directory) or not os.path.isdir(os.path.dirname(path))
    is_inside = _is_inside(path, directory)
    number = _number(cause)
    if number == errno.ENOSPC and not named and (free_bytes(directory) or 0) > _MUCH:
      why, todo = _ELSEWHERE
    elif number in _OF_DISKS:
      why, todo = _OF_DISKS[number]
    elif number in _MISSING and is_inside and is_gone:
      why, todo = _GONE
    elif number == errno.EISDIR and named and is_inside:
      why, todo = _DIRECTORY
    elif number in _FORBIDDEN and named and is_inside:
      why, todo = _REFUSED
    else:
      continue
    place = directory if is_inside else os.path.dirname(path)
    needs = '' if needed is None else f'; it needs {size(needed)}'
    why = why.format(place=place, path=path, free=room(place))
    return Unsaved(f'{what} cannot be written: {why}{needs}. {todo}, and give the same command again', again=False)
  return error


def _number(error: BaseException) -> int | None:
  """The system's number of an error; None where it has none that matters here."""
  if isinstance(error, OSError) and error.errno:
    return error.errno
  text = str(error)
  return next((number for number, words in _TEXTS.items()
               if f"os_error_code='{number}'" in text or words in text), None)


def _named(error: BaseException) -> str | None:
  """The file that an error is of; None where it names none."""
  name = getattr(error, 'filename', None)
  if isinstance(name, bytes):
    name = os.fsdecode(name)
  return name if isinstance(name, str) else next(iter(_QUOTED.findall(str(error))), None)


def _is_inside(path: str, directory: str) -> bool:
  path, directory = os.path.abspath(path), os.path.abspath(directory)
  return os.path.commonpath([path, directory]) == directory


def _chain(error: BaseException) -> Iterator[BaseException]:
  """An error and those that it came of."""
  seen: list[BaseException] = []
  waiting = [error]
  while waiting and len(seen) < 100:
    if (found := waiting.pop(0)) is not None and found not in seen:
      seen.append(found)
      context = None if found.__suppress_context__ else found.__context__
      waiting += [found.__cause__, context, *getattr(found, 'exceptions', ())]
      yield found


def size(n: float) -> str:
  """Bytes in words: 1.5 GB."""
  for unit, name in ((1e15, 'PB'), (1e12, 'TB'), (1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB')):
    if n >= unit:
      return f'{n / unit:.3g} {name}' if n < 1e18 else f'{n / unit:,.0f} {name}'
  return f'{n:.0f} bytes'


def room(path: str) -> str:
  """How much of a disk is free, in words."""
  try:
    found = os.statvfs(_existing(path))
  except OSError:
    return 'how much is free cannot be told'
  if found.f_files and not found.f_favail:
    return f'it has no room for another file, and {size(found.f_bavail * found.f_frsize)} free'
  return f'{size(found.f_bavail * found.f_frsize)} of {size(found.f_blocks * found.f_frsize)} free'


def _existing(path: str) -> str:
  """The nearest directory above that is there."""
  path = os.path.abspath(path)
  while not os.path.exists(path) and path != os.path.dirname(path):
    path = os.path.dirname(path)
  return path


def free_bytes(path: str) -> int | None:
  """Bytes that this user may still write where a path is or will be; None where nothing tells."""
  try:
    found = shutil.disk_usage(_existing(path))
  except OSError:
    return None
  return found.free if found.total else None  # a file system that does not tell has 0 of 0


# The disk of a run.


def last_checkpoint(directory: str) -> int | None:
  """The step of the newest checkpoint in a directory of checkpoints, by its name; None where there is none."""
  try:
    return max((int(entry.name) for entry in os.scandir(directory) if entry.name.isdecimal() and entry.is_dir()),
               default=None)
  except OSError:
    return None


def lacking(directory: str, checkpoint_bytes: int) -> tuple[str | None, str | None]:
  """What is wrong with the room for checkpoints: why a run must not start, and what it is to be warned of.

  The newest checkpoint is dropped only once the next is whole, so that two have to fit beside what is there.

  Args:
    checkpoint_bytes: that one takes, about.
  """
  free = free_bytes(directory)
  if free is None or free >= 2 * checkpoint_bytes:
    return None, None
  text = (f'a checkpoint takes about {size(checkpoint_bytes)}, and the disk of {directory} has {size(free)} free')
  if free < checkpoint_bytes:
    return f'{text}: free some room there, or name another disk by --workdir or checkpoint.directory', None
  return None, f'{text}: two have to fit, as one is dropped only once the next is whole; free some room there'
