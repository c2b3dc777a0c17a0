"""Mutations of bytes and of JSON, by a random.Random."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

HOSTILE = (
    None, True, False, 0, -1, 1, 2, 7, 255, 2 ** 31, 2 ** 32 - 1, 2 ** 53 + 1, 2 ** 63, 2 ** 64, 10 ** 400, -10 ** 30,
    0.5, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan, '', ' ', '0', 'nan', '1e999', 'x' * 3000, '\0', '\ud800',
    '\u202e', '\x1b[2J', '../../etc/passwd', '/etc/passwd', 'a/../../b', '{problem:>99999999}', '%s%n', '(a+)+$',
    '<|im_end|>', [], {}, [[]], [None] * 50, {'a': 1}, {'': {}}, ['a', 1])
_BYTES = (b'\0', b'\xff', b'\xff' * 8, b'\x80', b'\n', b'\r\n', b'"', b',', b'{', b'}', b'[' * 2000, b'\xef\xbb\xbf',
          b'\x1b', b'1e999', b'NaN', b'-' * 40, b'9' * 5000, b'\xed\xa0\x80')


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
  """The bytes with one to four places that are others."""
  for _ in range(rng.choice((1, 1, 2, 4))):
    at = rng.randrange(len(data) + 1)
    size = rng.choice((1, 1, 2, 4, 8, rng.randrange(64)))
    what = rng.randrange(6)
    if what == 0 and data:
      at = min(at, len(data) - 1)
      data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
    elif what == 1:
      data = data[:at] + data[at + size:]
    elif what == 2:
      data = data[:at] + rng.choice(_BYTES) + data[at:]
    elif what == 3:
      number = rng.choice((0, 1, 255, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 40, 2 ** 63 - 1, 2 ** 63, 2 ** 64 - 1))
      n = rng.choice((1, 2, 4, 8))
      data = data[:at] + (number % 2 ** (8 * n)).to_bytes(n, 'little') + data[at + n:]
    elif what == 4:
      data = data[:at] + data[at:at + size] * rng.choice((2, 9)) + data[at + size:]
    else:
      data = data[:at] if rng.randrange(2) else data[at:]
  return data


def mutated_json(rng: random.Random, content: Any, more: tuple[Any, ...] = ()) -> Any:
  """A copy of a content with one to three places that are others. more: values to put there."""
  content = json.loads(json.dumps(content))
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    content = _changed(rng, content, more)
  return content


def _changed(rng: random.Random, content: Any, more: tuple[Any, ...]) -> Any:
  """The content with one place that is another."""
  holders = []  # (holder, key) on a random way down
  node = content
  while isinstance(node, (dict, list)) and node:
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    holders.append((node, key))
    node = node[key]
  if not holders or rng.randrange(40) == 0:
    return copy.deepcopy(rng.choice(HOSTILE + more))
  holder, key = rng.choice(holders)
  what = rng.randrange(6)
  if what == 0:
    del holder[key]
  elif what == 1 and isinstance(holder, dict):
    holder[rng.choice(('', 'x', '../x', '\0', *map(str, more)))] = holder[key]
  elif what == 2 and isinstance(holder, list):
    holder.extend([holder[key]] * rng.choice((1, 30)))
  elif what == 3:
    for _ in range(rng.choice((1, 3, 600))):
      holder[key] = [holder[key]]
  else:
    holder[key] = copy.deepcopy(rng.choice(HOSTILE + more))
  return content


def as_json(rng: random.Random, content: Any) -> bytes:
  """The text of a content, now and then with bytes that are others."""
  try:
    data = json.dumps(content).encode()
  except RecursionError:
    data = b'[' * 5000
  return mutated_bytes(rng, data) if rng.randrange(8) == 0 else data
