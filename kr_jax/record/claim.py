"""Whose run a directory is: config.json in the workdir, and beside the checkpoints where they are elsewhere.

A run is known by its knobs and by facts that its knobs alone do not fix: its tasks, the commits of names of the hub.
The same command goes on with the run; another config is refused by the names of its knobs, before anything is written.
What may change is a table (resume.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import math
import os
from typing import Any

from absl import logging

from kr_jax import files
from kr_jax import knobs
from kr_jax.record import saved

CONFIG = 'config.json'
CHANGED = 'changed'  # in config.json: [{'step', 'knob', 'was', 'is'}], changes that a warning was given of
_WORKDIR = 'workdir'  # in the config.json beside checkpoints: of the run that they are of
FACTS = (CHANGED, _WORKDIR, 'train_ids')  # in config.json, and no knobs


def claim(workdir: str, config: Mapping[str, Any], *, may_change: Sequence[str] = (), warned: Sequence[str] = (),
          directory: str = '', url: str = '') -> list[dict[str, Any]]:
  """Makes the workdir this config's, or checks that it is; and the directory of its checkpoints likewise.

  Args:
    config: nested dicts of plain values.
    may_change: knobs ('section.knob') and sections that a run may go on with changed.
    warned: those that it may go on with as well, with a warning that stays in the record.
    directory: where the run's checkpoints are; '': none is looked for.
    url: the workdir as it was given; '': as `workdir`, where its record is.

  Returns:
    The changes that a warning was given of just now, as the record has them.

  Raises:
    ValueError: the workdir cannot be written, or belongs to a run with other knobs, or the checkpoints do; or the
      workdir has no record of the run that the checkpoints are of.
  """
  url = url or workdir
  if problem := files.unwritable(workdir):
    raise ValueError(f'cannot write to --workdir={problem}; name a directory that can be written')
  began, beside = run_config(workdir), _beside(directory, url)
  last = saved.latest(directory) if directory else None
  allowed = (*may_change, *warned, CHANGED, _WORKDIR)
  if changed := changes(workdir, config, may_change=allowed):
    raise ValueError(other_config(url, changed))
  if beside:
    _check_beside(beside, url, config, allowed)
  if last is not None and not began:
    of = run_config(beside).get(_WORKDIR) if beside else None
    raise ValueError(
        f'{directory} holds checkpoints of a run{f", whose workdir is {of}," if of else ","} and --workdir={url} has '
        'no record of it: copy what its workdir held there, or name another --workdir or checkpoint.directory')
  news = [] if not began else [
      {'step': last or 0, 'knob': name, 'was': was, 'is': now}
      for name, was, now in differences(workdir, config) if is_of(name, warned) and not is_of(name, may_change)]
  for new in news:
    logging.warning('%s was %r, and is %r from step %d on; config.json keeps both', new['knob'], new['was'], new['is'],
                    new['step'])
  if told := [*began.get(CHANGED, ()), *news]:
    config = {**config, CHANGED: told}
  files.write(files.join(workdir, CONFIG), _as_text(config))
  if beside:
    files.write(files.join(beside, CONFIG), _as_text({**config, _WORKDIR: _named(url)}))
  return news


def other_config(workdir: str, changed: Sequence[str]) -> str:
  """Says that a workdir is another run's. changed: as of `changes`."""
  return (f'--workdir={workdir} holds a run of another config: {"; ".join(changed)}. Name another --workdir, or set these '
          'knobs back')


def too_few(num_steps: int, done: int, workdir: str) -> str:
  """Says that a run would end before the step that it is at."""
  return (f'num_steps={num_steps}, and the run in --workdir={workdir} has done {done} steps, which are not undone. Set '
          f'num_steps={done} or more; or name another --workdir, for a run that ends after {num_steps}')


def _as_text(config: Mapping[str, Any]) -> str:
  return json.dumps(config, indent=1, sort_keys=True)


def _named(url: str) -> str:
  return url if files.is_remote(url) else os.path.abspath(url)


def _beside(directory: str, url: str) -> str:
  """The directory that holds the directory of the checkpoints, where that is not the workdir; else ''."""
  parent = directory.rstrip('/').rpartition('/')[0]
  same = lambda path: path if files.is_remote(path) else os.path.realpath(path)
  return parent if parent and same(parent) != same(url) else ''


def _check_beside(beside: str, url: str, config: Mapping[str, Any], allowed: Sequence[str]) -> None:
  """Raises ValueError where the checkpoints in a directory are of another run."""
  other = run_config(beside)
  if not other and saved.latest(beside) is not None:
    raise ValueError(f'checkpoint.directory={beside} holds steps itself: checkpoints are kept in a directory in it. '
                     'Name the directory that it is in, or another')
  if changed := changes(beside, config, may_change=(*allowed, 'checkpoint.directory')):
    raise ValueError(f'checkpoint.directory={beside} holds the checkpoints of a run of another config: '
                     f'{"; ".join(changed)}. Name another checkpoint.directory, or set these knobs back')
  of = other.get(_WORKDIR) or beside  # without it, it is a run's workdir itself
  is_other = of != _named(url) and (files.is_remote(of) or os.path.realpath(of) != os.path.realpath(url))
  if is_other and run_config(of):  # else it was moved
    raise ValueError(f'checkpoint.directory={beside} is that of the run in {of}, and --workdir={url} is another: name '
                     f'another checkpoint.directory, or go on with --workdir={of}')


def differences(workdir: str, config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
  """The knobs of a config that differ from those of the run in a workdir: (name, was, is); [] where there is no record.

  A knob that the record does not have is newer than the run, and was its default: a new knob's default is what was done
  before there was the knob.
  """
  began, new = record(workdir), flat(as_read(config))
  if not began:
    return []
  old = {name: x for name, x in flat(as_read(knobs.as_dict(knobs.Config()))).items() if name in new} | began
  return [(name, old.get(name), new.get(name)) for name in sorted(old | new) if not same(old.get(name), new.get(name))]


def changes(workdir: str, config: Mapping[str, Any], *, of: Sequence[str] = ('',), may_change: Sequence[str] = ()
            ) -> list[str]:
  """How a config differs from that of the run in a workdir: 'seed was 0, is 1'; [] where there is no record of it.

  Args:
    config: nested dicts of plain values.
    of: knobs ('section.knob') and sections that are compared; '': all.
    may_change: those of them that are not.
  """
  return [f'{name} was {was!r}, is {now!r}' for name, was, now in differences(workdir, config)
          if is_of(name, of) and not is_of(name, may_change)]


def is_of(name: str, parts: Sequence[str]) -> bool:
  """Whether a knob is one of these knobs, or of one of these sections."""
  return any(not part or f'{name}.'.startswith(f'{part}.') for part in parts)


def same(x: Any, y: Any) -> bool:
  """Whether two values of knobs are the same, as JSON has them: a NaN is the same as another."""
  if isinstance(x, list) and isinstance(y, list):
    return len(x) == len(y) and all(map(same, x, y))
  are_nan = [isinstance(z, float) and math.isnan(z) for z in (x, y)]
  return all(are_nan) or x == y and isinstance(x, bool) == isinstance(y, bool)


def as_read(tree: Mapping[str, Any]) -> dict[str, Any]:
  """The tree as JSON gives it back: tuples are lists."""
  return json.loads(json.dumps(tree))


def recorded(workdir: str, knob: str) -> Any:
  """The value of a knob, 'section.knob', of the run in a workdir; None where there is no record of it."""
  return record(workdir).get(knob)


def record(workdir: str) -> dict[str, Any]:
  """The knobs of the run in a workdir, by 'section.knob'; {} where there is no record of it."""
  return flat(run_config(workdir))


def run_config(workdir: str) -> dict[str, Any]:
  """The config of the run in a workdir, with the facts beside it, as it was recorded; {} where there is no record.

  Raises ValueError for a record that cannot be read.
  """
  path = files.join(workdir, CONFIG)
  try:
    content = files.read(path)
  except (FileNotFoundError, NotADirectoryError):
    return {}
  try:
    found = json.loads(content)
    if not isinstance(found, dict):
      raise ValueError(f'it holds no object, but {type(found).__name__}')
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}, the config of the run, cannot be read: {error}. Put a copy of it back, or name another '
                     '--workdir') from error
  return found


def flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested dicts as one, by 'section.knob'."""
  found = {}
  for name, x in tree.items():
    found |= flat(x, f'{prefix}{name}.') if isinstance(x, dict) else {prefix + name: x}
  return found
