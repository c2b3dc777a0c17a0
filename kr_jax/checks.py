"""What a value of a config may be, whatever its knob is: texts, paths, numbers, templates, pairs of a mixture.

Each function says what is wrong, to follow a value in an error, or None. Imports nothing heavy.
"""

from __future__ import annotations

import math
import numbers
import re
import string
from typing import Any

_TEXT = 100_000  # characters of a text
_SHOWN = 200  # of a value in an error
_BOUND = r'-?\d[\d_.]*(?:%|shard)?'
_PART = rf'[\w-]+(?:\[(?:{_BOUND}|(?:{_BOUND})?:(?:{_BOUND})?)\])?'
_SPLIT = re.compile(rf'{_PART}(?:\s*\+\s*{_PART})*')
_PROBLEMS = 16  # how often a problem may stand in its prompt


def shown(value: Any) -> str:
  """A value as an error shows it: its repr, not too long."""
  try:
    text = repr(value)
  except ValueError:  # a number of thousands of digits
    return 'a number of thousands of digits'
  except RecursionError:
    return 'values nested hundreds deep'
  return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}...'


def is_finite(value: Any) -> bool:
  """Whether it is a number, neither True nor False, that a float holds."""
  try:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
  except OverflowError:
    return False


def path_problem(path: str, *, written: bool = False) -> str | None:
  """Why a text is no path of a file or directory, nor a URL of one, or of what is written; None where it may be."""
  url = re.match(r'([^/]*):/+', path)
  if url and not path[url.end():].strip('/'):
    return f"names no bucket; give '{url[1]}://BUCKET/PATH'"
  if written and url and url[1] in ('http', 'https'):
    return 'cannot be written; name a directory, or gs://BUCKET/PATH'
  if any(len(part.encode(errors='replace')) > 255 for part in path.split('/')):
    return 'has a part of more than the 255 bytes that the name of a file may have'
  return None


def text_problem(text: str) -> str | None:
  """Why a text is none that can be used; None where it can."""
  if '\0' in text:
    return 'holds a NUL character'
  try:
    text.encode()
  except UnicodeEncodeError:
    return 'holds bytes that are not UTF-8'
  return f'has {len(text):,} characters; the limit is {_TEXT:,}' if len(text) > _TEXT else None


def template_problem(template: str) -> str | None:
  """Why a text is no prompt of a problem, which stands in it as {problem} alone; None where it is.

  str.format would read attributes of what it fills in, and pad it to any length.
  """
  doubled = 'other braces are doubled: \\boxed{{}}'
  try:
    fields = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template)
              if name is not None]
  except ValueError as error:
    return f'is no text around {{problem}} ({error}); {doubled}'
  other = next((field for field in fields if field != ('problem', '', None)), None)
  if other:
    name, spec, conversion = other
    found = f'{name}{conversion and f"!{conversion}" or ""}{spec and f":{spec}"}'
    return f'is no text around {{problem}} (it has {{{found}}}); {doubled}'
  if not fields:
    return f'is no text around {{problem}} (it has no {{problem}}); {doubled}'
  if len(fields) > _PROBLEMS:
    return f'has {{problem}} {len(fields)} times; the limit is {_PROBLEMS}'
  return None


def split_problem(split: str) -> str | None:
  """Why a text is no split of TFDS; None where it may be one."""
  if len(split) < 1000 and _SPLIT.fullmatch(split):
    return None
  return "is no split; write 'train', 'train[:100]', 'train[5%:10%]' or 'train+test'"


def pair_problem(pair: Any) -> str | None:
  """Why a pair of a mixture is none; None where it is."""
  wanted = 'which is not (DATASET, WEIGHT) with a weight above 0'
  if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not (isinstance(pair[0], str) and pair[0]):
    return f"{wanted}; (('gsm8k', 1.0),) is a mixture of one" if isinstance(pair, (str, int, float)) else wanted
  if problem := text_problem(pair[0]):
    return f'whose dataset {problem}'
  if not is_finite(pair[1]) or pair[1] <= 0:
    return wanted
  return None if 1e-6 <= pair[1] <= 1e6 else f'{wanted}, in 1e-06..1e+06'
