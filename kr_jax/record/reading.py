"""Whether a checkpoint is what was saved, of that step and of this config; on which all processes of a run agree.

A damaged file ends in as many kinds of errors as there are layers above it, or in none and other values. What comes of
reading is therefore one of three: it is as saved, it is damaged, or it is whole and of another config. Only what is no
fault of the checkpoint's is an error of its own: no permission, a bucket that does not answer, too little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import gc
import re
import sys
import time
from typing import Any, TypeVar

from absl import logging
import jax
import numpy as np

from kr_jax import files
from kr_jax import processes
from kr_jax.record import checksums

CHECKSUMS = 'checksums'  # the item of a checkpoint that holds them, as Orbax's JSON
_T = TypeVar('_T')
_Array = tuple[str, tuple[int, ...]]  # dtype, shape
_SAME, _DAMAGED, _OTHER = range(3)
# What Orbax and tensorstore say where it is not the checkpoint that is at fault.
_UNREADABLE = re.compile('PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|Permission denied|'
                         'Too many open files')
_SETTLE_S = 0.05
_LONGEST = 240  # characters of an error that a message shows


class Other(ValueError):
  """A checkpoint is whole, and of other shapes than the config asks for."""


def expected(path: str, step: int, wanted: Mapping[str, Mapping[str, _Array]], is_part: bool = False
             ) -> dict[str, dict[str, checksums.Sums]] | None:
  """The checksums that a checkpoint holds, by tree and array; None: it is of a version that kept none.

  Args:
    step: that it is to be of.
    wanted: checksums.shapes of each tree, by its name.
    is_part: whether the checkpoint may hold more than that.

  Raises:
    checksums.Damaged: it is not as it was written, or not of this step.
    Other: it holds other arrays than those that are wanted.
  """
  try:
    held, trees = checksums.read(files.read(files.join(path, CHECKSUMS, 'metadata')))
  except (FileNotFoundError, NotADirectoryError):
    if CHECKSUMS.encode() in files.read(files.join(path, '_CHECKPOINT_METADATA')):
      raise checksums.Damaged('its checksums are gone') from None
    logging.warning('%s holds no checksums: it is of an older version, and is taken as it is', path)
    return None
  if held != step:
    raise checksums.Damaged(f'it is the checkpoint of step {held}')
  for name, tree in wanted.items():
    there = {path: sums[:2] for path, sums in trees.get(name, {}).items()}
    if name == 'stats' and (rows := there.get('rollouts_I', ('', ()))[1]) != (asked := tree['rollouts_I'][1]):
      raise Other(other_tasks(*rows, *asked))
    for path in [path for path in {**there, **tree} if path in tree or not is_part]:
      if there.get(path) != tree.get(path):
        raise Other(f'{path} is {_described(there.get(path))} in it, and {_described(tree.get(path))} by the config')
  return trees


def other_tasks(there: int, asked: int) -> str:
  """Why statistics of so many tasks are not those of a run of other tasks."""
  return f'it holds statistics of {there} tasks, and the training split has {asked}'


def _described(array: _Array | None) -> str:
  return 'not' if array is None else f'{array[0]}{array[1]}'


def verify(saved: Mapping[str, Mapping[str, checksums.Sums]] | None, found: Mapping[str, Mapping[str, checksums.Sums]]
           ) -> None:
  """Raises checksums.Damaged where what was read is not what was saved, or where its parameters are no policy.

  Args:
    saved: as of `expected`.
    found: checksums.of each tree that was read, by its name; 'state' is one of them.
  """
  for name, tree in found.items() if saved is not None else ():
    checksums.check(saved[name], tree)
  checksums.check_finite({path: sums for path, sums in found['state'].items() if path.startswith('params/')})


def agreed(path: str, part: Callable[[], _T]) -> tuple[_T | None, str]:
  """What a part of reading a checkpoint returns, and why it is damaged, '' where it is not: in all processes the same.

  Raises ValueError where it is of another config; and what is no fault of the checkpoint's.
  """
  result, why, outcome, others_go_on = None, '', _SAME, False
  with quiet() as settle:
    try:
      result = part()
    except Other as error:
      why, outcome = str(error), _OTHER
    except checksums.Damaged as error:
      why, outcome = str(error), _DAMAGED
    except (processes.Stopped, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:  # of a damaged file there are many kinds
      if _UNREADABLE.search(str(error)):
        raise ValueError(f'the checkpoint {path} cannot be read: {_line(error)}') from error
      why, outcome, others_go_on = _line(error), _DAMAGED, True
    if others_go_on:
      settle()
  outcomes = processes.gather(np.array(outcome))
  if outcomes.max() == _SAME:
    return result, ''
  why = why or f'process {int(outcomes.argmax())} cannot read it'
  if outcomes.max() == _OTHER:
    raise ValueError(f'the checkpoint {path} is not of this config: {why}; give the config of the run, or name another '
                     '--workdir')
  return None, why


@contextlib.contextmanager
def quiet() -> Iterator[Callable[[], None]]:
  """Keeps off the terminal what becomes of Orbax's other reads or writes where one has failed: a traceback of each.
  Yields a function that waits for them, once nothing holds the error any more."""
  before, sys.unraisablehook = sys.unraisablehook, lambda about: logging.debug('%r', about.exc_value)

  def settle():
    time.sleep(_SETTLE_S)
    gc.collect()

  try:
    yield settle
  finally:
    sys.unraisablehook = before


def _line(error: Exception) -> str:
  """An error in a line of bearable length."""
  text = f'{type(error).__name__}: {" ".join(str(error).split())}'
  return text if len(text) <= _LONGEST else f'{text[:_LONGEST - 3]}...'
