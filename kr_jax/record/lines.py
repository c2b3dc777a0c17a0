"""Files of JSON lines that may have been damaged: what of them can be read, and what cannot.

A kill cuts the last line short. A disk that failed, or an editor, leaves worse: NULs, bytes that are no UTF-8, lines
that are no objects or have no end. Readers take the records that there are, say how many lines they left out, and move
nothing. A run that goes on keeps the damaged file beside the new one (`set_aside`), so that nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import itertools
import json
import os
import shutil
from typing import Any, NamedTuple

_LONGEST = 2 ** 26  # bytes of a line: one that is longer is no record, and is not held in memory
_PADDING = b'\0 \t\r\n'  # around a record, harmless: after a crash some file systems fill a file with NULs


class Lines(NamedTuple):
  """What a file of JSON lines holds."""

  records: list[dict[str, Any]]
  numbers: list[int]  # of the records' lines, from 1
  unread: list[int]  # numbers of lines that are no records
  is_cut: bool  # whether the last line has no end, and was left out


def read(path: str, is_record: Callable[[dict[str, Any]], bool] = lambda record: True) -> Lines:
  """The records of a file; blank lines are none, and are nothing that is missed. Raises OSError.

  Args:
    is_record: of an object, whether it is what such a file holds.
  """
  found = Lines([], [], [], False)
  with open(path, 'rb') as file:
    for number in itertools.count(1):
      line = file.readline(_LONGEST)
      if not line:
        return found
      if not line.endswith(b'\n'):
        if len(line) < _LONGEST:
          return found._replace(is_cut=True)
        while (more := file.readline(_LONGEST)) and not more.endswith(b'\n'):
          pass
        found.unread.append(number)
      elif text := line.strip(_PADDING):
        record = _object(text)
        if record is None or not is_record(record):
          found.unread.append(number)
        else:
          found.records.append(record)
          found.numbers.append(number)


def _object(text: bytes) -> dict[str, Any] | None:
  """The object that a line is; None where it is none."""
  try:
    record = json.loads(text.decode())
  except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
    return None
  return record if isinstance(record, dict) else None


def set_aside(path: str) -> str:
  """Keeps a file as it is under another name too, `PATH.unreadable-N`, and returns that. Raises OSError."""
  for n in itertools.count(1):
    kept = f'{path}.unreadable-{n}'
    try:
      os.link(path, kept)
      return kept
    except FileExistsError:
      continue
    except OSError:  # a file system without links
      if os.path.exists(kept):
        continue
      with contextlib.suppress(OSError):
        shutil.copyfile(path, f'{kept}.tmp')
        os.replace(f'{kept}.tmp', kept)
        return kept
      with contextlib.suppress(OSError):
        os.remove(f'{kept}.tmp')
      raise


def numbered(numbers: list[int], most: int = 5) -> str:
  """The numbers of lines as a sentence has them: 'line 3', 'lines 3, 4 and 7 more'."""
  shown = ', '.join(map(str, numbers[:most]))
  more = f' and {len(numbers) - most} more' if len(numbers) > most else ''
  return f'line{"s" * (len(numbers) > 1)} {shown}{more}'
