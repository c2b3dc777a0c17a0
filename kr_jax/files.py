"""Files of this machine and of buckets by one name: a path, or a URL such as gs://BUCKET/PATH.

A bucket is read and written through fsspec, for gs:// with gcsfs, as Orbax does it too. What a library reads by itself
is copied to this machine first (`local`). Whatever fails says why in one sentence, within seconds; `explained` says it
of a disk that is full, read-only or gone.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
import concurrent.futures
import contextlib
import errno
import fcntl
import fnmatch
import functools
import hashlib
import logging
import os
import pathlib
import posixpath
import re
import secrets
import shutil
import sys
from typing import Any, NamedTuple

from kr_jax import disks

# Orbax and this module use the same client, whether TensorFlow is there or not, and plain HTTP. Zonal buckets need
# gRPC: set GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=true.
os.environ.setdefault('EPATH_USE_TF', 'false')
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
os.environ.setdefault('FSSPEC_GCS', '{"use_listings_cache": false}')  # other hosts write there too

LOOK_S = 10  # for an answer to a question
_LIST_S = 300  # for a list of any length
_COPY_S = 3600  # for a file of any size to be copied
_WRITE_S, _BYTES_PER_S = 60, 1e6  # for what is in memory to be written, and for each byte of it
_AT_ONCE = 8  # files
_PATTERN = re.compile(r'[*?[]')
_BUCKET_ROLE = "the role 'Storage Legacy Bucket Reader' (storage.buckets.get), which Orbax needs"


class File(NamedTuple):
  """A file of a bucket."""

  size: int
  version: str  # another one whenever the file is written
  md5: str = ''  # in base 64; '': the bucket does not tell


Unsaved = disks.Unsaved  # what a run leaves could not be written to its disk or bucket


def is_remote(path: str | os.PathLike) -> bool:
  """Whether a path is of a bucket."""
  return '://' in os.fspath(path)


def expanded(path: str | os.PathLike) -> str:
  """The path with ~ replaced by the home directory, without a slash at its end; pathlib's gs:/BUCKET is gs://BUCKET."""
  path = re.sub(r'^(gs|gcs):/(?=[^/])', r'\1://', os.fspath(path))
  if not is_remote(path):
    path = os.path.expanduser(path)
  return path if path.endswith('://') else path.rstrip('/') or path[:1]


def join(path: str | os.PathLike, *names: str) -> str:
  """The path of a file in a directory."""
  return posixpath.join(path, *names) if is_remote(path) else os.path.join(path, *names)


def cache(*parts: str) -> str:
  """A path in the directory of copies: $KR_JAX_CACHE, by default ~/.cache/kr_jax."""
  return os.path.join(os.path.expanduser(os.environ.get('KR_JAX_CACHE') or '~/.cache/kr_jax'), *parts)


def digest(text: str) -> str:
  """A short name for a text."""
  return hashlib.sha256(text.encode()).hexdigest()[:16]


# Buckets.


@functools.cache
def client(protocol: str) -> Any:
  """The client of a kind of bucket."""
  import fsspec  # slow to load
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # what it would log is in our errors
  logging.getLogger('google.auth').setLevel(logging.ERROR)
  return fsspec.filesystem(protocol, use_listings_cache=False)


def _call(url: str, method: str, *arguments: Any, limit_s: float | None = None, **named: Any) -> Any:
  """Calls a method of the client. Raises OSError that says why it fails; FileNotFoundError where nothing is there."""
  limit_s = limit_s or LOOK_S
  try:
    system = client(url.partition('://')[0])
    if not system.async_impl:
      return getattr(system, method)(*arguments, **named)
    from fsspec import asyn
    return asyn.sync(system.loop, getattr(system, f'_{method}'), *arguments, timeout=limit_s, **named)
  except Exception as error:  # of clients and of the network there are many kinds
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
    raise kind(f'{url}: {_reason(error, url, limit_s)}') from error


def call(url: str, method: str, *arguments: Any, **named: Any) -> Any:
  """What a method of a bucket's client returns. Raises OSError that says why it fails, with the client's own error as
  its cause; FileNotFoundError where nothing is there."""
  return _call(url, method, *arguments, **named)


def _reason(error: Exception, url: str, limit_s: float) -> str:
  """Why a bucket cannot be used, and what to do about it."""
  text, code = ' '.join(str(error).split())[:300], str(getattr(error, 'code', '') or getattr(error, 'status', ''))
  protocol, bucket = url.partition('://')[0], '/'.join(url.split('/')[:3])
  if isinstance(error, ImportError):
    return ("gcsfs is not installed: pip install 'kr_jax[gcs]'" if protocol in ('gs', 'gcs') else
            f'a package is missing: {text}')
  if isinstance(error, FileNotFoundError):
    return f'there is nothing of this name, or no bucket {bucket}'
  if text.startswith('Forbidden') or code == '403':
    return (f'no permission ({text}): grant the account that runs this the role Storage Object Admin on {bucket}, '
            'or create the machine with --scopes=cloud-platform')
  if code == '401':
    return (f'no credentials ({text}): on a machine of Google Cloud create it with --scopes=cloud-platform, elsewhere '
            'run `gcloud auth application-default login`')
  if 'Timeout' in type(error).__name__:
    return f'no answer within {limit_s:g} s: look at the network of this machine, or try again'
  if 'Protocol not known' in text:
    return f'{protocol}:// is no kind of bucket that is known here; give gs://BUCKET/PATH'
  return f'{type(error).__name__}: {text}'


def listed(url: str) -> dict[str, File]:
  """The files of a directory of a bucket, and of those in it, by their names in it; a file alone is named ''.

  Empty where there is nothing. Raises OSError where the bucket cannot be read.
  """
  url = expanded(url)
  base = url.partition('://')[2].strip('/')
  # With the slash, as without it a client may list all that begins alike.
  found = _call(f'{url}/', 'find', f'{url}/', detail=True, limit_s=_LIST_S)
  if not found:
    with contextlib.suppress(FileNotFoundError):
      found = {base: _call(url, 'info', url)}
  return {path.strip('/').removeprefix(base).lstrip('/'): _file(about) for path, about in found.items()
          if not path.endswith('/') and about.get('type') != 'directory'}


def _file(about: Mapping[str, Any]) -> File:
  times = (about.get(key) for key in ('generation', 'etag', 'ETag', 'mtime', 'created'))
  return File(int(about.get('size') or 0), str(next(filter(None, times), '')), str(about.get('md5Hash') or ''))


def fetch(url: str, path: str, file: File | None = None) -> None:
  """Copies a file of a bucket to this machine, the whole file or nothing. Raises OSError.

  file: what the bucket says of it; what came is refused where it has another size or checksum. None: it is not asked.
  """
  os.makedirs(os.path.dirname(path), exist_ok=True)
  unfinished = f'{path}.{secrets.token_hex(4)}.tmp'
  try:
    _call(url, 'get_file', url, unfinished, limit_s=_COPY_S)
    if file is not None and (wrong := _damage(unfinished, file)):
      raise OSError(f'{url}: {wrong}. It was cut short or overwritten on its way; try again')
    os.replace(unfinished, path)
  finally:
    with contextlib.suppress(OSError):
      os.remove(unfinished)


def _damage(path: str, file: File) -> str | None:
  """How a copy differs from what the bucket says of the file; None where it does not."""
  if (size := os.path.getsize(path)) != file.size:
    return f'{size} bytes came, of {file.size}'
  if not file.md5:
    return None
  with open(path, 'rb') as copy:
    found = base64.b64encode(hashlib.file_digest(copy, 'md5').digest()).decode()
  return None if found == file.md5 else f'its checksum is {found}, and the bucket says {file.md5}'


def send(path: str, url: str) -> None:
  """Copies a file of this machine to a bucket. Raises OSError."""
  _call(url, 'put_file', path, url, limit_s=_COPY_S)


def remove(url: str) -> None:
  """Removes a file of a bucket, if it is there. Raises OSError."""
  with contextlib.suppress(FileNotFoundError):
    _call(url, 'rm_file', url)


def each(work: Callable[..., None], *arguments: Any) -> None:
  """Calls `work` with the elements of each list, several at once. Raises the first error once all have ended."""
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    list(pool.map(work, *arguments))


def fetch_all(url: str, directory: str, *, last: str) -> None:
  """Copies a directory of a bucket to a directory that is not there, if the file is there that was sent last.

  Raises ValueError where the bucket cannot be read.
  """
  if os.path.exists(directory):
    return
  unfinished = f'{directory}.{secrets.token_hex(4)}.tmp'
  try:
    found = listed(url)
    if last in found:
      each(lambda name: fetch(join(url, name), os.path.join(unfinished, name), found[name]), found)
      with contextlib.suppress(FileExistsError):  # another process was faster
        os.rename(unfinished, directory)
  except OSError as error:
    raise ValueError(str(error)) from error
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def send_all(directory: str, url: str, *, last: str) -> list[str]:
  """Copies a directory to a bucket, one file last, and returns the names of all. Raises ValueError where that fails."""
  names = [os.path.relpath(os.path.join(folder, name), directory)
           for folder, _, held in os.walk(directory) for name in held]
  try:
    for some in ([name for name in names if name != last], [name for name in names if name == last]):
      each(lambda name: send(os.path.join(directory, name), join(url, name)), some)
  except OSError as error:
    raise ValueError(str(error)) from error
  return names


# Both kinds.


def write(path: str | os.PathLike, content: bytes | str) -> None:
  """Writes a whole file or none, and the directories that it needs. Raises OSError."""
  path = expanded(path).removeprefix('file://')
  content = content.encode() if isinstance(content, str) else content
  if is_remote(path):
    _call(path, 'pipe_file', path, content, limit_s=_WRITE_S + len(content) / _BYTES_PER_S)
    return
  os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
  unfinished = f'{path}.tmp'
  try:
    with open(unfinished, 'wb') as file:
      file.write(content)
    os.replace(unfinished, path)
  except OSError:  # a full disk needs the room
    with contextlib.suppress(OSError):
      os.remove(unfinished)
    raise


def read(path: str | os.PathLike) -> bytes:
  """The content of a file. Raises OSError; FileNotFoundError where it is not there."""
  path = expanded(path)
  if is_remote(path):
    return _call(path, 'cat_file', path, limit_s=_COPY_S)
  with open(path, 'rb') as file:
    return file.read()


def missing(path: str | os.PathLike) -> str | None:
  """Why nothing can be read at a path, whose last part may be a pattern; None where something is there."""
  path = expanded(path)
  if not is_remote(path):
    return None if os.path.exists(path) else f'{path} is not there'
  parent, _, last = path.rpartition('/')
  try:
    if _PATTERN.search(last):
      found = any(fnmatch.fnmatchcase(name, last) for name in listed(parent))
    else:
      found = _call(path, 'info', path)
  except FileNotFoundError:
    found = False
  except OSError as error:
    return str(error)
  return None if found else f'{path} is not there'


def unwritable(directory: str | os.PathLike) -> str | None:
  """Why a directory cannot be written; None where it can: a small file was written there, read back and removed."""
  directory = expanded(directory)
  path, token = join(directory, f'.writable-{secrets.token_hex(4)}'), secrets.token_hex(8).encode()
  try:
    if is_remote(path):
      _call(path, 'pipe_file', path, token)
      found = _call(path, 'cat_file', path)
      _call(path, 'rm_file', path)
      return _of_google(directory) if found == token else f'{directory}: what was written there is not read back'
    os.makedirs(directory, exist_ok=True)
    with open(path, 'wb') as file:
      file.write(token)
    os.remove(path)
  except OSError as error:
    return str(error).replace(path, directory) if is_remote(path) else f'{directory}: {_why(error, directory)}'
  return None


def _why(error: OSError, directory: str) -> str:
  """What the system says of an error, and how much is free where that is what matters."""
  return f'{error.strerror} ({disks.room(directory)})' if error.errno == errno.ENOSPC else str(error.strerror)


def _of_google(url: str) -> str | None:
  """Why Orbax could not use a bucket of Google, whose own resource it reads; None where it could."""
  protocol, _, rest = url.partition('://')
  if protocol not in ('gs', 'gcs'):
    return None
  try:
    _call(url, 'call', 'GET', f'b/{rest.partition("/")[0]}', json_out=True)
  except OSError as error:
    return f'{error}; the account needs {_BUCKET_ROLE}'
  return None


# Copies.


def local(path: str | os.PathLike, wanted: Callable[[str], bool] = lambda name: True) -> str:
  """The path on this machine of what a path names: itself, or a copy of a file or directory of a bucket.

  Copies stay in `cache`, and processes that start together make one. What was overwritten in its bucket is fetched
  anew, and the older copy is removed; an interrupted copy goes on with the files that are missing.

  Args:
    path: the last part of a URL may be a pattern ('*.parquet'): the files of the directory that fit it are copied.
    wanted: of the name of a file in the directory, whether it is copied; '' is the file that `path` itself names.

  Raises:
    ValueError: the bucket cannot be read, or nothing is there.
  """
  path = expanded(path)
  if not is_remote(path):
    return path
  url, _, last = path.rpartition('/')
  if pattern := last if _PATTERN.search(last) else '':
    of_all, wanted = wanted, lambda name: of_all(name) and fnmatch.fnmatchcase(name, pattern)
  else:
    url = path
  try:
    found = {name: file for name, file in sorted(listed(url).items()) if wanted(name)}
    if not found:
      raise FileNotFoundError(f'{path} is not there')
    return join(_copied(path, url, found), *filter(None, [pattern]))
  except OSError as error:
    raise ValueError(str(error)) from error


def version(copy: str | os.PathLike) -> str:
  """What tells a copy that `local` made from others of the same URL."""
  return os.path.relpath(copy, cache('buckets')).split(os.sep)[1]


def _copied(path: str, url: str, found: Mapping[str, File]) -> str:
  """The local copy of these files of a directory or of one file, made if it is not there. path: as it was asked for."""
  last, root = url.rpartition('/')[2], cache('buckets', digest(path))
  version = digest(repr([(name, file.size, file.version) for name, file in found.items()]))
  kept = os.path.join(root, version, last)
  if os.path.exists(kept):
    return kept
  os.makedirs(root, exist_ok=True)
  with open(os.path.join(root, 'lock'), 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if os.path.exists(kept):
      return kept
    partial = os.path.join(root, f'{version}.partial', last)
    path_of = lambda name: os.path.join(partial, name) if name else partial
    for left in pathlib.Path(os.path.dirname(partial)).rglob('*.????????.tmp'):  # by a fetch that was killed
      left.unlink()
    needed = [name for name in found if not os.path.exists(path_of(name))]
    for name in needed:
      print(f'{url}: fetching {name or last}', file=sys.stderr)
    each(lambda name: fetch(join(url, name) if name else url, path_of(name), found[name]), needed)
    for old in os.listdir(root):
      if old not in ('lock', f'{version}.partial'):
        shutil.rmtree(os.path.join(root, old), ignore_errors=True)
    os.rename(os.path.dirname(partial), os.path.dirname(kept))
  return kept


# Disks.


def explained(error: Exception, directory: str | os.PathLike, what: str = 'the record', needed: int | None = None
              ) -> Exception:
  """disks.explained of a directory that was written; an error of a bucket, which says why itself, as it is."""
  directory = expanded(directory)
  return error if is_remote(directory) else disks.explained(error, directory, what, needed)


def free_bytes(path: str | os.PathLike) -> int | None:
  """Bytes that this user may still write where a path is or will be; None where nothing tells, as of a bucket."""
  path = expanded(path)
  return None if is_remote(path) else disks.free_bytes(path)
