"""The config of a run that was recorded, for what is made of the run later: --mode=evaluate and --mode=export.

This file is a config file itself, `run_config.py:WORKDIR`, for a command line that gives no --config: knobs that are
set there are set of the run's own. Policy, data and seed are the run's. What may be otherwise is how an evaluation is made,
and where things are (record/resume.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from kr_jax import files
from kr_jax import hub
from kr_jax import knobs
from kr_jax.record import claim
from kr_jax.record import resume
from kr_jax.record import saved
from kr_jax.record import unbegun


def get_config(workdir: str = '') -> ml_collections.ConfigDict:
  """The knobs of the run in a workdir; their defaults where there is no run."""
  c = ml_collections.ConfigDict(knobs.as_dict(recorded(workdir)))
  if c.tasks.thinking is None:  # a flag needs to know its type
    c.tasks.thinking = ml_collections.config_dict.placeholder(bool)
  return c


def recorded(workdir: str) -> knobs.Config:
  """The config of the run in a workdir. Knobs that are newer than the run have their defaults; the defaults alone where
  there is no run.

  Raises ValueError for a record that cannot be read, or that is of no config.
  """
  known = claim.flat(knobs.as_dict(knobs.Config()))
  found = {name: x for name, x in claim.record(files.expanded(workdir)).items() if name in known}
  try:
    return knobs.read(_nested(known | found))
  except ValueError as error:
    raise ValueError(f'{files.join(workdir, claim.CONFIG)} is no config of this version: {error}') from error


def problems(config: knobs.Config, workdir: str) -> list[str]:
  """Why a run of this config cannot go on in a workdir, as far as its knobs say: attempt.claim says it too, of more, once
  the data are read."""
  try:
    began, directory = claim.run_config(workdir), config.checkpoint.directory
    if not began or not unbegun.has_begun(workdir):  # the command may be corrected; of a bucket not all is looked at
      return []
  except ValueError as error:
    return [str(error)]
  except OSError:  # a bucket that cannot be read: whoever writes there says why
    return []
  changed = changes(config, workdir)
  found = [claim.other_config(workdir, changed)] if changed else []
  done = saved.latest(files.join(files.expanded(directory or workdir), 'checkpoints'))
  if done is not None and config.num_steps < done:
    found.append(claim.too_few(config.num_steps, done, workdir))
  return found


def changes(config: knobs.Config, workdir: str) -> list[str]:
  """How a config, as it was given, differs from the run in a workdir, by knobs that make it another run."""
  began = claim.run_config(workdir)
  return [f'{name} was {was!r}, is {now!r}' for name, was, now in claim.differences(workdir, knobs.as_dict(config))
          if not claim.is_of(name, (*resume.FREE, *resume.WARNED, *resume.FACTS, *claim.FACTS))
          and not (name == 'rewards.verifier' and now == '') and not _stands_for(now, was, began)]


def of_run(config: Mapping[str, Any], workdir: str, typed: Collection[str] = ()) -> dict[str, Any]:
  """A config with what it may say otherwise than the run in a workdir; the rest is the run's.

  Args:
    config: as it was given.
    typed: the knobs of it that were set on the command line; others come of a file.

  Returns:
    Nested dicts, as prepare.prepare takes them.

  Raises:
    ValueError: there is no record of a run; or other knobs are given otherwise than the run has them, each is named.
  """
  began = claim.run_config(workdir)
  if not began:
    raise ValueError(f'{workdir} has no {claim.CONFIG}, which says what its run is; put it back')
  own, given = (claim.flat(knobs.as_dict(c)) for c in (recorded(workdir), knobs.read(config)))
  own_read, given_read = (claim.flat(claim.as_read(_nested(x))) for x in (own, given))
  wrong = []
  for name in own:
    was, now, is_typed = own_read[name], given_read[name], name in typed
    if claim.same(was, now) or not is_typed and (now == '' or claim.is_of(name, resume.OF_TRAINING)):
      continue
    if claim.is_of(name, (*resume.OF_EVALUATION, *resume.FREE)):
      own[name] = given[name]
    elif not _stands_for(now, was, began):
      wrong.append(f'{"--config." * is_typed}{name}={now!r}{"" if is_typed else " of --config"}: the run has {was!r}')
  if wrong:
    flags = 'these flags' if len(wrong) > 1 else 'this flag'
    raise ValueError(f'{"; ".join(wrong)}. Policy, data and seed are those of the run in {workdir}: leave {flags} out, '
                     'and --config as well, which is not needed')
  _check_directory(own['checkpoint.directory'], _nested(own), workdir)
  return _nested(own)


def _check_directory(directory: str, config: Mapping[str, Any], workdir: str) -> None:
  """Raises ValueError where checkpoints elsewhere are of another run than that of the workdir."""
  facts = (*resume.FACTS, *claim.FACTS)
  if directory and (changed := claim.changes(files.expanded(directory), config, may_change=(
      *resume.FREE, *resume.WARNED, *resume.OF_EVALUATION, *resume.OF_TRAINING, *facts))):
    raise ValueError(f'checkpoint.directory={directory} holds the checkpoints of another run than that in {workdir}: '
                     f'{"; ".join(changed)}')


def _stands_for(now: Any, was: Any, began: Mapping[str, Any]) -> bool:
  """Whether a value names what the run has: of the hub, without the commit, or with a revision that it was given."""
  if isinstance(now, list) and isinstance(was, list):
    return len(now) == len(was) and all(_stands_for(x, y, began) for x, y in zip(now, was))
  if not isinstance(now, str) or not isinstance(was, str) or hub.PREFIX not in now:
    return claim.same(now, was)
  pinned = {name: x for of_kind in began.get('hub', {}).values() for name, x in of_kind.items()}
  named = [now.replace(name, x) for name, x in pinned.items() if name in now]
  is_bare = '@' not in now and now == ''.join(_without_commits(was))
  return was in named or is_bare


def _without_commits(name: str) -> list[str]:
  """The parts of a name of the hub, with a split behind it, without the revision."""
  head, at, rest = name.partition('@')
  return [head, *(rest.partition(':')[1:] if at else ())]


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of claim.flat; lists, in which JSON has them, are tuples."""
  tree: dict[str, Any] = {}
  for name, x in flat.items():
    *sections, knob = name.split('.')
    node = tree
    for section in sections:
      node = node.setdefault(section, {})
    node[knob] = _tuples(x)
  return tree


def _tuples(x: Any) -> Any:
  return tuple(map(_tuples, x)) if isinstance(x, list | tuple) else x
