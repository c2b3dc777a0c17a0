"""Whether a Parquet file can be read within limits of time and memory: another process reads it first.

A file of a few kB may declare pages of gigabytes, or a dictionary of one long text that a million rows name. The reader
allocates what pages declare, so a process whose limits the kernel keeps reads all of it before this one does. This
module is also that process's program.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from typing import Any

BATCH = 1024  # rows that are read at once
_MOST_OF_BATCH = 2 ** 30  # bytes of so many rows
_MEMORY, _OF_FILE = 2 ** 32, 4  # bytes of address space, and for each byte of the file
_SECONDS, _BYTES_PER_S = 60, 2 ** 20  # of a processor, and one more for so many bytes


def check(path: str | os.PathLike) -> None:
  """Raises ValueError for a file whose reading takes too much, or ends the process that reads it.

  What is no Parquet is left to the reader, which says so.
  """
  environment = os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path)), 'PYTHONDONTWRITEBYTECODE': '1',
                              'OPENBLAS_NUM_THREADS': '1', 'OMP_NUM_THREADS': '1'}
  done = subprocess.run([sys.executable, '-P', '-s', __file__, os.fspath(path)], stdin=subprocess.DEVNULL,
                        capture_output=True, env=environment, check=False)
  if done.returncode:
    why = done.stdout.decode(errors='replace') if done.returncode == 1 else ''
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
      why = f'it takes more than {seconds(path)} s to read'
    raise ValueError(f'{path} cannot be read within limits: {why or f"its reader ended with {done.returncode}"}; write '
                     'it again, with smaller row groups and without repeated long texts')


def seconds(path: str | os.PathLike) -> int:
  """Of a processor, that reading a file may take."""
  return _SECONDS + os.path.getsize(path) // _BYTES_PER_S


def _size(column: Any) -> int:
  """Bytes of a column, each row with a text of its own."""
  from pyarrow import compute
  from pyarrow import types
  kind = column.type
  if types.is_dictionary(kind) and (types.is_string(kind.value_type) or types.is_binary(kind.value_type)):
    return column.nbytes + (compute.sum(compute.binary_length(column.dictionary).take(column.indices)).as_py() or 0)
  if 'dictionary' in str(kind) or 'run_end' in str(kind):  # of lists and structs no file of problems has them
    raise MemoryError
  return column.nbytes


def main(path: str) -> int:
  """Sets the limits, and reads a file within them."""
  from pyarrow import parquet as _  # the library may map much memory before it reads anything
  with contextlib.suppress(OSError, ValueError):  # not all systems have it
    with open('/proc/self/statm', encoding='ascii') as file:
      mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MEMORY + _OF_FILE * os.path.getsize(path),) * 2)
  resource.setrlimit(resource.RLIMIT_CPU, (seconds(path), seconds(path) + 1))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  return read_within(path)


def read_within(path: str) -> int:
  """Reads a file in the way in which published.rows does; 0, or 1 once it has printed what is too large."""
  import pyarrow
  from pyarrow import parquet
  pyarrow.set_cpu_count(1)
  pyarrow.set_io_thread_count(1)
  try:
    with open(path, 'rb') as file:
      for batch in parquet.ParquetFile(file).iter_batches(batch_size=BATCH, use_threads=False):
        if (size := sum(map(_size, batch.columns))) > _MOST_OF_BATCH:
          print(f'{batch.num_rows} of its rows have {size} bytes, above the limit of {_MOST_OF_BATCH}', end='')
          return 1
  except MemoryError:  # of pyarrow too
    print('it takes more memory than its size allows', end='')
    return 1
  except Exception:  # the reader says it
    return 0
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1]))
