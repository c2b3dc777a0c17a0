"""The container of llama.cpp: the fields of a .gguf file, and its tensors by part; a split file with all of its parts.

    'GGUF' version tensors fields | fields | what each tensor is | padding | tensors

Integers are little-endian. A text is its length and its UTF-8 bytes. Source: docs/gguf.md of ggml, versions 2 and 3.
What a file says of its own lengths is compared with the bytes that it has before it is believed.
"""

from __future__ import annotations

import functools
import math
import mmap
import pathlib
import re
import struct
from typing import Any, NamedTuple

import gguf
from gguf import constants
import numpy as np

# What struct calls the types of fields, by their number in a file; 8 is a text and 9 a list.
_NUMBERS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
_TEXT, _LIST = 8, 9
_LFS = b'version https://git-lfs'  # how a pointer of Git LFS begins
_ALIGNMENT = 32  # bytes, where the field general.alignment says no other
_AT_ONCE = 1 << 22  # bytes that are dequantised at once, which takes several times as many
# Above all published files, whose lists have a token or a merge each, and below what takes gigabytes to hold.
_MOST_FIELDS, _MOST_TENSORS, _MOST_ELEMENTS, _MOST_TEXT = 10 ** 5, 10 ** 6, 2 ** 22, 2 ** 26
_SHOWN = 99  # characters of a name in errors: that of a broken file may be long
_PART = re.compile(r'(.+)-(\d{5})-of-(\d{5})\.gguf')


class Tensor(NamedTuple):
  """Where a tensor lies."""

  shape: tuple[int, ...]  # the last dimension is contiguous
  kind: gguf.GGMLQuantizationType
  data: np.ndarray  # bytes [*shape[:-1], bytes of a row], of which none is read yet


class _Bytes:
  """The bytes of a file, read one after the other; every error names the file and what was being read."""

  def __init__(self, path: pathlib.Path, data: Any):
    self.path, self.data, self.at, self.what = path, data, 0, 'the header'

  def error(self, problem: str) -> ValueError:
    return ValueError(f'{self.path} is no GGUF file, or a broken one: {self.what} {problem}; fetch it again')

  def need(self, size: int) -> int:
    """Goes on by so many bytes; where they begin."""
    if size > len(self.data) - self.at:
      raise self.error(f'takes {size} bytes at {self.at}, and the file ends at {len(self.data)}')
    self.at += size
    return self.at - size

  def number(self, code: str) -> Any:
    value, = struct.unpack_from(f'<{code}', self.data, self.need(struct.calcsize(f'<{code}')))
    # 32 bits hold 1e-5 as 9.999999747378752e-06.
    return float(str(np.float32(value))) if code == 'f' else value

  def text(self) -> str:
    size = self.number('Q')
    start = self.need(size)
    if size > _MOST_TEXT:
      raise self.error(f'has a text of {size} bytes, above the limit of {_MOST_TEXT}')
    try:
      return self.data[start:start + size].decode('utf-8')
    except UnicodeDecodeError as error:
      raise self.error(f'holds a text that is not UTF-8: {error}') from error

  def value(self) -> Any:
    """A number, a text, or a list of them."""
    kind = self.number('I')
    if kind != _LIST:
      return self._one(kind)
    kind, count = self.number('I'), self.number('Q')
    least = 8 if kind == _TEXT else struct.calcsize(f'<{_NUMBERS.get(kind, "B")}')
    if count * least > len(self.data) - self.at:
      raise self.error(f'says that it has {count} elements, more than the file has bytes for')
    if count > _MOST_ELEMENTS:
      raise self.error(f'has {count} elements, above the limit of {_MOST_ELEMENTS}')
    if kind in _NUMBERS:
      return np.frombuffer(self.data, f'<{_NUMBERS[kind]}', count, self.need(count * least)).tolist()
    return [self._one(kind) for _ in range(count)]

  def _one(self, kind: int) -> Any:
    if kind == _TEXT:
      return self.text()
    if kind not in _NUMBERS:
      raise self.error(f'is of the type {kind}, which is not known')
    return self.number(_NUMBERS[kind])


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Fields and tensors of a .gguf file; of any part of a split file those of all of its parts.

  Raises ValueError where the file is none or broken, a part is missing, or a tensor's type is not one that is read.
  """
  fields, tensors = _read_one(path)
  count = fields.get('split.count', 0)
  if count not in (0, 1):
    tensors = {}
    for k, part in enumerate(_parts(path, fields.get('split.no'), count)):
      of_part, found = _read_one(part)
      if (of_part.get('split.no'), of_part.get('split.count')) != (k, count):
        raise ValueError(f'{part} says that it is part {of_part.get("split.no")} (from 0) of '
                         f'{of_part.get("split.count")}, not part {k} of {count}: it belongs to another file; fetch '
                         'all parts again')
      if both := tensors.keys() & found:
        raise ValueError(f'{part} holds tensors that an earlier part holds too: {sorted(both)[:3]}; fetch all '
                         'parts again')
      tensors |= found
      if k == 0:
        fields = of_part  # the others have none beside those of the split
    if (wanted := fields.get('split.tensors.count', len(tensors))) != len(tensors):
      raise ValueError(f'the {count} parts of {path} hold {len(tensors)} tensors, not {wanted} as they say; '
                       'fetch all parts again')
  if unread := {name: tensor.kind.name for name, tensor in tensors.items() if not _is_read(tensor.kind)}:
    raise ValueError(f'{path}: tensors of the types {sorted(set(unread.values()))} are not read, such as '
                     f'{min(unread)}; take another quantisation of this model, or its safetensors')
  return fields, tensors


def _parts(path: pathlib.Path, number: Any, count: Any) -> list[pathlib.Path]:
  """The paths of all parts of a split file. Raises ValueError where one is missing."""
  named = _PART.fullmatch(path.name)
  if not isinstance(count, int) or not named or int(named[3]) != count or int(named[2]) - 1 != number:
    raise ValueError(f'{path} is part {number} (from 0) of {count} of a split file; parts are found by names of the '
                     'form NAME-00001-of-00002.gguf')
  parts = [path.with_name(f'{named[1]}-{k + 1:05d}-of-{count:05d}.gguf') for k in range(count)]
  if missing := [part.name for part in parts if not part.exists()]:
    raise ValueError(f'{path} is part of a split file of which {missing[:9]} are missing ({len(missing)} of {count}); '
                     'put all parts into one directory')
  return parts


def _read_one(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
  try:
    with open(path, 'rb') as file:
      data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except (ValueError, OSError) as error:
    raise ValueError(f'{path} is no GGUF file, or a broken one: {error}; fetch it again') from error
  if data[:len(_LFS)] == _LFS:
    raise ValueError(f'{path} is a pointer of Git LFS, not the file; run `git lfs pull` in its directory')
  x = _Bytes(path, data)
  if (magic := x.number('I')) != constants.GGUF_MAGIC:
    raise x.error(f'begins with {struct.pack("<I", magic)!r}, not with {b"GGUF"!r}; give safetensors by their '
                  'directory')
  version = x.number('I')
  if version not in (2, 3):
    swapped = version & 0xffff == 0
    raise x.error(f'says version {version}, not 2 or 3' + (
        ': it is written for big-endian machines' if swapped else ': convert the model with a newer llama.cpp'))
  count, number = x.number('Q'), x.number('Q')
  fields = {}
  for i in range(number):
    x.what = f'field {i} of {number}'
    if i >= _MOST_FIELDS:
      raise x.error(f'is above the limit of {_MOST_FIELDS} fields')
    key = x.text()
    x.what = f'the field {key[:_SHOWN]}'
    if key in fields:
      raise x.error('stands twice')
    fields[key] = x.value()
  return fields, _tensors(x, count, fields.get('general.alignment', _ALIGNMENT))


def _tensors(x: _Bytes, count: int, alignment: Any) -> dict[str, Tensor]:
  described = {}
  for i in range(count):
    x.what = f'the description of tensor {i} of {count}'
    if i >= _MOST_TENSORS:
      raise x.error(f'is above the limit of {_MOST_TENSORS} tensors')
    name = x.text()
    x.what = f'the tensor {name[:_SHOWN]}'
    rank = x.number('I')
    if not 1 <= rank <= 4:
      raise x.error(f'has {rank} dimensions, not 1 to 4')
    shape = tuple(x.number('Q') for _ in range(rank))[::-1]
    kind, offset = x.number('I'), x.number('Q')
    if name in described:
      raise x.error('stands twice')
    if kind not in constants.GGML_QUANT_SIZES:
      raise x.error(f'is of the type {kind}, which is not known')
    described[name] = shape, gguf.GGMLQuantizationType(kind), offset
  if not isinstance(alignment, int) or alignment < 1:
    x.what = 'the field general.alignment'
    raise x.error(f'is {alignment!r}, not a number of bytes')
  start, found = -(-x.at // alignment) * alignment, {}
  for name, (shape, kind, offset) in described.items():
    x.what = f'the tensor {name}'
    block, size = constants.GGML_QUANT_SIZES[kind]
    if shape[-1] % block or 0 in shape:
      raise x.error(f'has the shape {list(shape)}; rows of {kind.name} are multiples of {block}')
    stored = *shape[:-1], shape[-1] // block * size
    total, x.at = math.prod(stored), start + offset
    found[name] = Tensor(shape, kind, np.frombuffer(x.data, np.uint8, total, x.need(total)).reshape(stored))
  return found


@functools.cache
def _is_read(kind: gguf.GGMLQuantizationType) -> bool:
  try:
    gguf.dequantize(np.zeros((1, constants.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
  except NotImplementedError:
    return False
  return True


def part(tensor: Tensor, rows: tuple[Any, ...], columns: slice) -> np.ndarray:
  """Part of a tensor, float32; only the blocks that hold it are read.

  Args:
    rows: what numpy takes as indices of all dimensions but the last.
    columns: of the last dimension.
  """
  block, size = constants.GGML_QUANT_SIZES[tensor.kind]
  start, stop, step = columns.indices(tensor.shape[-1])
  first, last = start // block, -(-stop // block)
  stored = np.ascontiguousarray(tensor.data[(*rows, slice(first * size, last * size))])
  flat = stored.reshape(math.prod(stored.shape[:-1]), stored.shape[-1])
  x, count = np.empty((len(flat), (last - first) * block), np.float32), max(1, _AT_ONCE // max(1, flat.shape[1]))
  for i in range(0, len(x) if x.size else 0, count):
    x[i:i + count] = gguf.dequantize(flat[i:i + count], tensor.kind)
  return x.reshape(*stored.shape[:-1], x.shape[1])[..., start - first * block:stop - first * block:step]
