"""Temporary folders of a run. A killed run removes none: the next start does.

Whoever makes a folder holds a lock on a file in it. The kernel drops the lock with the process, however it ends, so
that a folder whose lock is free has no owner any more. Numbers of processes would not say so: another container, or
another machine that shares the folder, has its own.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import fcntl
import os
import shutil
import tempfile
import time

PREFIX = 'kr_jax-'
_OWNER = '.owner'
_OLD_S = 86400.0  # an empty folder of this age was left by a run that was killed before it had its lock
_held: dict[str, int] = {}  # by folder, the file that is locked


def folder(directory: str | None = None) -> str:
  """A new folder, which this process owns until `release`. directory: where it is; None: the system's."""
  path = tempfile.mkdtemp(prefix=PREFIX, dir=directory)
  made, owner = os.path.join(path, f'{_OWNER}.tmp'), os.path.join(path, _OWNER)
  file = os.open(made, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
  with contextlib.suppress(OSError):  # a file system without locks: nobody will take the folder for left over
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.rename(made, owner)  # so that nobody finds it unlocked
  _held[path] = file
  return path


def release(path: str) -> None:
  """Gives a folder up, before it is removed."""
  if (file := _held.pop(path, None)) is not None:
    os.close(file)


def sweep(remove: Callable[[str], None] = lambda path: shutil.rmtree(path, ignore_errors=True),
          directory: str | None = None) -> list[str]:
  """Removes the folders of runs that were killed, and returns their paths. remove: of a folder with all in it."""
  directory, found = directory or tempfile.gettempdir(), []
  with contextlib.suppress(OSError), os.scandir(directory) as entries:
    found = [entry.path for entry in entries if entry.name.startswith(PREFIX)]
  return [path for path in found if path not in _held and _is_left(path) and not remove(path)]


def _is_left(path: str) -> bool:
  """Whether a folder of this user has no owner any more."""
  try:
    found = os.lstat(path)
    if found.st_uid != os.geteuid() or os.path.islink(path):
      return False
    file = os.open(os.path.join(path, _OWNER), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
  except FileNotFoundError:
    with contextlib.suppress(OSError):  # its owner may just have removed it
      if time.time() - os.lstat(path).st_mtime > _OLD_S:
        os.rmdir(path)  # where it is empty
    return False
  except OSError:
    return False
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
  except OSError:
    return False
  finally:
    os.close(file)
