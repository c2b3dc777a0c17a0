"""The directory that a run's checkpoints are in: which there are, which are kept, and what is in the way.

A checkpoint is a directory whose name is its step, with something in it of what a checkpoint has. In a bucket, where no
directory appears at once, it has the file that is written last as well. All else there is no checkpoint: an empty
directory, a file, what a save that was killed has left, a checkpoint that was moved aside.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
import contextlib
import json
import os
import re
import shutil

from absl import logging

from kr_jax import files

PARTS = ('state', 'stats', '_CHECKPOINT_METADATA')  # of a checkpoint; one of them makes a directory one
_LAST = 'commit_success.txt'  # is written last, in a bucket
_SCORES = 'scores.json'
_STEP = re.compile('0|[1-9][0-9]*')
_UNFINISHED = '.orbax-checkpoint-tmp'  # in the name of what is being written
_REMOVED = '.removed'  # at the end of the name of what is being removed


def steps(directory: str) -> list[int]:
  """The steps of the checkpoints in a directory, in order. Raises OSError where it cannot be listed."""
  if files.is_remote(directory):
    found = [name[:-len(_LAST) - 1] for name in files.listed(directory) if name.endswith(f'/{_LAST}')]
  else:
    try:
      names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
      return []
    found = [name for name in names if any(os.path.exists(os.path.join(directory, name, part)) for part in PARTS)]
  return sorted(int(name) for name in found if _STEP.fullmatch(name))


def latest(directory: str) -> int | None:
  """The step of the newest checkpoint in a directory; None: there is none. Raises OSError as `steps` does."""
  return max(steps(directory), default=None)


def kept(found: Collection[int], *, keep: int, best: int = 0, scores: Mapping[int, float] = {}) -> set[int]:
  """Those steps that are kept: the latest `keep`, and the `best` of the highest scores, of equal ones the later."""
  by_score = sorted((step for step in found if step in scores), key=lambda step: (scores[step], step))
  return set(sorted(found)[-keep:]) | set(by_score[len(by_score) - best:] if best else ())


def read_scores(directory: str) -> dict[int, float]:
  """The scores of steps that `write_scores` wrote; {} where there are none, or they cannot be read."""
  path = files.join(directory, _SCORES)
  try:
    return {int(step): float(score) for step, score in json.loads(files.read(path)).items()}
  except (FileNotFoundError, NotADirectoryError):
    return {}
  except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
    logging.warning(
        '%s cannot be read (%s): which of the older checkpoints are best is not known any more', path, error)
    return {}


def write_scores(directory: str, scores: Mapping[int, float]) -> None:
  """Keeps the scores of steps beside the checkpoints. Raises OSError."""
  files.write(files.join(directory, _SCORES), json.dumps({str(step): x for step, x in sorted(scores.items())}))


def remove(directory: str, step: int) -> None:
  """Removes a checkpoint; at no moment is half of it taken for one. Raises OSError."""
  if files.is_remote(directory):
    files.remove(files.join(directory, str(step), _LAST))
    _remove_objects(directory, f'{step}/')
    return
  path = os.path.join(directory, f'{step}{_REMOVED}')
  shutil.rmtree(path, ignore_errors=True)
  with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
    os.rename(os.path.join(directory, str(step)), path)
    shutil.rmtree(path)


def move_aside(directory: str, step: int) -> str:
  """Renames what has the name of a step, a damaged checkpoint or none at all. Returns its new path. Raises OSError."""
  old, number = files.join(directory, str(step)), 1
  while not files.missing(new := f'{old}.damaged-{number}') or files.is_remote(directory) and files.listed(new):
    number += 1
  if files.is_remote(directory):
    from etils import epath  # heavy, and this module is read before any check
    epath.Path(old).rename(new)  # one copy after the other, and no checkpoint any more once the first is gone
  else:
    os.rename(old, new)
  return new


def clear(directory: str, step: int | None = None) -> None:
  """Removes what saves and removals that were killed have left: of a step, or of all. What cannot be removed stays."""
  wanted = _STEP if step is None else re.compile(str(step))
  try:
    if files.is_remote(directory):
      found = files.listed(directory)
      whole = {name.partition('/')[0] for name in found if name.endswith(f'/{_LAST}') and name.count('/') == 1}
      for name in {path.partition('/')[0] for path in found if '/' in path} - whole:
        if wanted.fullmatch(name.partition(_UNFINISHED)[0]):
          _remove_objects(directory, f'{name}/')
      return
    for name in os.listdir(directory):
      is_left = _UNFINISHED in name or name.endswith(_REMOVED)
      if is_left and wanted.fullmatch(name.partition(_UNFINISHED)[0].removesuffix(_REMOVED)):
        shutil.rmtree(os.path.join(directory, name), ignore_errors=True)
  except OSError:
    pass  # there is none, or it cannot be read, which whoever needs it will say


def _remove_objects(directory: str, start: str) -> None:
  """Removes the objects of a bucket whose names in a directory begin so. Raises OSError."""
  files.each(lambda name: files.remove(files.join(directory, name)),
             [name for name in files.listed(directory) if name.startswith(start)])
