"""Names of datasets, as a config has them: 'gsm8k', 'reasoning_gym/TASK', 'file:PATH', 'PATH.py'; after each, ':SPLIT'.

Imports nothing heavy.
"""

from __future__ import annotations

import re

FILE = 'file:'  # before the path of a file of problems and answers
# A revision of the hub is no part of what a dataset is called, as the record has the commit there.
_REVISION = re.compile(r'(file:hf:[^@]*)@.*', re.DOTALL)


def part(name: str, split: str) -> tuple[str, str]:
  """Dataset and split of a name, 'DATASET:SPLIT' or 'DATASET', which leaves the split at `split`."""
  dataset, own = re.fullmatch(r'((?:file:)?.*?)(?::(\w+(?:\[[^\]]*\])?))?', name, re.DOTALL).groups()
  return dataset, own or split


def is_file(dataset: str) -> bool:
  """Whether it is a file of problems and answers."""
  return dataset.startswith(FILE)


def is_module(dataset: str) -> bool:
  """Whether it is a module of Python, by the path of its file."""
  return dataset.endswith('.py') and not is_file(dataset)


def path(dataset: str) -> str:
  """The path, or name of the hub, of a file of problems and answers."""
  return dataset.removeprefix(FILE)


def source(dataset: str) -> str:
  """What the tasks of a dataset say that they are from."""
  found = _REVISION.fullmatch(dataset)
  return found[1] if found else dataset
