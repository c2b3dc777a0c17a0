"""Programs that XLA has compiled, kept for the next start of a run; and a profiler's trace of some steps.

JAX's persistent compilation cache keeps each program under a key of the program, the compiler, its flags and the
devices, a CPU's instruction sets among them. `keep` turns it on, for programs of any size, so that a second start
compiles nothing that the first did. Of several processes JAX lets the first alone write, and all read: they need one
directory that all see, such as one of a bucket.

A kill may cut a program short that is just written. JAX would warn of it in each later start, and compile it anew each
time, as it writes over no file: `tidy` looks at what was written since it last did, and drops what is cut short.
JAX's own limit of a directory's size lists the directory for each program that it writes, and holds a lock meanwhile;
`tidy` drops the oldest once, at the start, and `tidy_bucket` those of a bucket.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
import threading
import time
from typing import Any
import zlib

from absl import logging
import jax

from kr_jax import files
from kr_jax import processes
from kr_jax import progress

MOST_BYTES = 8 * 2**30  # of the programs that are kept on this machine
MOST_BYTES_OF_BUCKET = 64 * 2**30  # and beside the runs of a bucket
_ZSTD = b'\x28\xb5\x2f\xfd'
_CHECKED = '.checked'  # touched when the files were last looked at
_SETTINGS = {'jax_persistent_cache_min_compile_time_secs': 0.0, 'jax_persistent_cache_min_entry_size_bytes': -1}


def keep(*places: str) -> str | None:
  """Keeps what is compiled from now on, and returns the directory; None where nothing is kept.

  JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE and what a program has set in jax.config hold.

  Args:
    places: where the run writes: the directory is `xla` beside the first that is in a bucket; else it is `xla` in
      $KR_JAX_CACHE, by default ~/.cache/kr_jax.
  """
  if not jax.config.jax_enable_compilation_cache:
    return None
  for name, value in _SETTINGS.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)
  if jax.config.jax_compilation_cache_dir:
    return jax.config.jax_compilation_cache_dir
  directory = _directory(*places)
  try:
    if not files.is_remote(directory):
      os.makedirs(directory, exist_ok=True)
      tidy(pathlib.Path(directory))
    elif not jax.distributed.is_initialized() or processes.is_first():  # else devices would be looked for
      threading.Thread(target=tidy_bucket, args=(directory,), daemon=True).start()
  except OSError as error:
    logging.warning('compiled programs are not kept, as %s cannot be written (%s); set KR_JAX_CACHE to a directory '
                    'that can', directory, error.strerror)
    return None
  if files.is_remote(directory) and 'JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES' not in os.environ:
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')  # XLA's own, which know no buckets
  jax.config.update('jax_compilation_cache_dir', directory)
  return directory


def directory() -> str | None:
  """Where compiled programs are kept; None: nowhere."""
  return jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None


def _directory(*places: str) -> str:
  for place in map(files.expanded, places):
    if files.is_remote(place):
      scheme, _, path = place.partition('://')
      return f'{scheme}://{os.path.dirname(path) or path}/xla'
  return files.cache('xla')


def tidy(directory: pathlib.Path, most_bytes: int = MOST_BYTES) -> None:
  """Drops programs that were cut short, and the oldest beyond a size. Raises OSError if it cannot write there."""
  checked = directory / _CHECKED
  since = checked.stat().st_mtime if checked.exists() else 0.0
  now = time.time()
  files = []  # last used, bytes, path
  for path in directory.rglob('*'):
    try:
      found = path.stat()
      if not path.is_file() or path == checked:
        continue
      if path.name.endswith('-cache') and found.st_mtime >= since and not _is_whole(path):
        path.unlink()
        continue
    except FileNotFoundError:  # another run has just dropped it
      continue
    files.append((max(found.st_atime, found.st_mtime), found.st_size, path))
  checked.touch()
  os.utime(checked, (now, now))  # what another run has written meanwhile is looked at next time
  total = sum(size for _, size, _ in files)
  for _, size, path in sorted(files):
    if total <= most_bytes:
      break
    path.unlink(missing_ok=True)
    total -= size


def tidy_bucket(url: str, most_bytes: int = MOST_BYTES_OF_BUCKET) -> None:
  """Drops the oldest programs of a bucket beyond a size. A bucket takes a file whole or not at all.

  What fails is logged: the run says soon enough what is wrong with its bucket.
  """
  try:
    found = {name: file for name, file in files.listed(url).items() if name.endswith(('-cache', '-atime'))}
    total = sum(file.size for file in found.values())
    dropped = []
    # The version of a file in a bucket of Google's is the time at which it was written.
    for name in sorted(found, key=lambda name: int(found[name].version) if found[name].version.isdecimal() else 0):
      if total <= most_bytes:
        break
      dropped.append(files.join(url, name))
      total -= found[name].size
    files.each(files.remove, dropped)
  except OSError as error:
    logging.info('%s cannot be tidied: %s', url, error)


def _is_whole(path: pathlib.Path) -> bool:
  """Whether a file of JAX's cache, by zstandard or zlib, has its end."""
  content = path.read_bytes()
  if content.startswith(_ZSTD):
    return _zstandard_is_whole(content)
  try:
    decompressor = zlib.decompressobj()
    decompressor.decompress(content)
    return decompressor.eof
  except zlib.error:
    return False


def _zstandard_is_whole(content: bytes) -> bool:
  """Whether a frame has its last block, and its checksum: RFC 8878, section 3.1.1. Nothing is decompressed."""
  if len(content) < 5:
    return False
  descriptor = content[4]
  is_single, has_checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
  at = 6 - is_single + (0, 1, 2, 4)[descriptor & 3] + (is_single, 2, 4, 8)[descriptor >> 6]
  while at + 3 <= len(content):
    block = int.from_bytes(content[at:at + 3], 'little')
    is_last, kind, size = block & 1, block >> 1 & 3, block >> 3
    if kind == 3:  # reserved
      return False
    at += 3 + (1 if kind == 1 else size)  # 1: one byte, repeated
    if is_last:
      return at + 4 * has_checksum <= len(content)
  return False


# A profiler's trace of some steps.


class Profile:
  """Traces steps first..last, and writes <directory>/plugins/profile/steps_FIRST_LAST, a file of each process.

  Args:
    steps: None: none is traced.
    first_step: that the run goes on from; what was before it is not traced, and it is said.
  """

  def __init__(self, directory: str, steps: tuple[int, int] | None, first_step: int = 0):
    self._directory, self._steps, self._scratch, self._annotation = directory, steps, None, None
    if steps and first_step > steps[1]:
      self._say(f'--profile: the run goes on at step {first_step}, so that none of steps {steps[0]} to {steps[1]} is '
                'traced')
    elif steps and first_step > steps[0]:
      self._steps = first_step, steps[1]
      self._say(f'--profile: the run goes on at step {first_step}, so that steps {first_step} to {steps[1]} are traced')

  def __enter__(self) -> Profile:
    return self

  def __exit__(self, *_: Any) -> None:
    self.end(None)

  def begin(self, step: int) -> None:
    """Says that a step begins."""
    if not self._steps or not self._steps[0] <= step <= self._steps[1]:
      return
    if self._scratch is None and not self._start():
      return
    self._annotation = jax.profiler.StepTraceAnnotation('step', step_num=step)
    self._annotation.__enter__()

  def _start(self) -> bool:
    """Begins the trace; False where that fails, of which a run does not end."""
    try:
      self._scratch = tempfile.mkdtemp(prefix='kr_jax_profile_')
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # calls of Python functions, of which there are too many to read
      # Perfetto reads a form of its own; JAX writes it as one that it makes of its trace.
      jax.profiler.start_trace(self._scratch, create_perfetto_trace=True, profiler_options=options)
    except Exception as error:
      logging.warning('--profile: nothing is traced: %s: %s', type(error).__name__, error)
      shutil.rmtree(self._scratch or '', ignore_errors=True)
      self._scratch = self._steps = None
    return self._scratch is not None

  def end(self, step: int | None) -> None:
    """Says that a step has ended, and the devices are done with it; None: the run ends."""
    if self._scratch is None:
      return
    if self._annotation is not None:
      self._annotation.__exit__(None, None, None)
      self._annotation = None
    if step is not None and step < self._steps[1]:
      return
    scratch, self._scratch = self._scratch, None
    try:
      jax.profiler.stop_trace()
      self._write(pathlib.Path(scratch))
    except Exception as error:  # a trace is no reason to lose a run
      logging.warning('--profile: no trace is written: %s: %s', type(error).__name__, error)
    finally:
      shutil.rmtree(scratch, ignore_errors=True)

  def _write(self, scratch: pathlib.Path) -> None:
    """Copies the files, which JAX names by host and second, where those of all processes are one session."""
    first, last = self._steps
    session = files.join(self._directory, 'plugins', 'profile', f'steps_{first}_{last}')
    for path in scratch.rglob('*'):
      if not path.is_file():
        continue
      kind = next((end for end in ('.xplane.pb', '.trace.json.gz') if path.name.endswith(end)), f'.{path.name}')
      files.write(files.join(session, f'process_{jax.process_index()}{kind}'), path.read_bytes())
    self._say(f'trace of steps {first} to {last}: {self._directory}')

  @staticmethod
  def _say(text: str) -> None:
    if processes.is_first():
      progress.say(text)
