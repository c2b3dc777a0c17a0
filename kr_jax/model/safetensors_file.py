"""Files of safetensors: opened by the library, once their heads are checked for what it lets pass.

    length of the head in 8 bytes | head, JSON: name -> dtype, shape, where | tensors

The library refuses offsets that overlap or leave gaps, unknown dtypes, and shapes that do not fit. It takes a head of
any size up to 100 MB, and of a name that stands twice the last.
"""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

import safetensors

_MOST_HEAD = 2 ** 25  # bytes; 100 thousand tensors have 10 ** 7


def opened(path: pathlib.Path) -> Any:
  """An open file. Raises ValueError for one that is broken."""
  if problem := _of_head(path):
    raise ValueError(f'{path} is broken: {problem}; fetch it again')
  try:
    return safetensors.safe_open(path, framework='numpy')
  except Exception as error:  # of the library, and of the disk
    raise ValueError(f'{path} is broken: {error}; fetch it again') from error


def _of_head(path: pathlib.Path) -> str:
  """What is wrong with the head; '' where the library says it, if anything."""
  twice = []

  def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(named := dict(found)) < len(found):
      twice.append(collections.Counter(name for name, _ in found).most_common(1)[0][0])
    return named

  with open(path, 'rb') as file:
    size = int.from_bytes(file.read(8), 'little')
    if size > _MOST_HEAD:
      return f'its head has {size} bytes, above the limit of {_MOST_HEAD}'
    head = file.read(size)
  try:
    json.loads(head.decode(), object_pairs_hook=pairs)
  except (ValueError, RecursionError):
    return ''
  return f'its head names {twice[0]!r} twice' if twice else ''
