"""Modules of Python that a config names by the path of their file: 'my/verifiers.py'."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import sys
import types

ENDING = '.py'


def is_path(name: str) -> bool:
  """Whether a module is named by the path of its file."""
  return name.endswith(ENDING)


def located(path: str) -> str:
  """The path from the root, whatever the folder is that a process works in."""
  return os.path.abspath(os.path.expanduser(path))


def digest(path: str) -> str:
  """Sixteen characters that name the text of a file. Raises ValueError where there is none."""
  try:
    with open(located(path), 'rb') as file:
      return hashlib.sha256(file.read()).hexdigest()[:16]
  except OSError as error:
    raise ValueError(f'{path} cannot be read: {error.strerror}') from error


def load(path: str) -> types.ModuleType:
  """The module of a file, which runs once in a process, and again if its text has changed.

  The folder of the file is not put on sys.path: what the file imports must be importable from where the run starts.

  Raises ValueError where there is no such file, or its code raises.
  """
  return _load(located(path), digest(path))


@functools.cache
def _load(path: str, text: str) -> types.ModuleType:
  """text: its digest."""
  name = f'{re.sub(r"[^0-9a-zA-Z_]", "_", os.path.basename(path)[:-len(ENDING)])}_{text}'
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module  # where classes and pickles look for it
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    del sys.modules[name]
    raise ValueError(f'{path} cannot be imported: {error!r}; what it imports must be importable from where the run '
                     'starts') from error
  return module
