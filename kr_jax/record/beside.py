"""A run that was recorded earlier, small, so that a run of the same config can be shown beside it: record.beside.

The file is one JSON object (configs/README.md says how one is made):

    name          of the recorded run, 'uniform budgets'
    command       that made it
    config        its knobs by 'section.knob', and the digests of its tasks; without those that may differ
    versions      of the packages that it ran with
    evaluations   in their order, each {'step', 'rollouts', 'tokens', 'success', 'low', 'high'}; costs are before it
    steps         figures of each step, which are there to be looked at

Two runs are a pair where they differ by no more than budgets, and by what changes no result (resume.FREE). They then
share the warm start, the order of the data and the draws of evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
from typing import Any, NamedTuple

from kr_jax import files
from kr_jax import knobs
from kr_jax import shipped
from kr_jax.record import claim
from kr_jax.record import resume

FIGURES = ('step', 'rollouts', 'tokens', 'success', 'low', 'high')  # of an evaluation
_MAY_BE_UNKNOWN = ('tokens', 'low', 'high')
# Budgets and what they are estimated from, how finely success is measured, and where things are.
_MAY_DIFFER = (*resume.FREE, 'alloc', 'tasks.candidates_per_step', 'evaluate.rollouts', 'checkpoint.directory',
               'train_ids', 'workdir')
_MUST_NOT = ('alloc.rollouts_per_step',)
_NAMED = 3  # knobs that a sentence names


class Recorded(NamedTuple):
  """What such a file holds; the fields are said above."""

  name: str
  config: dict[str, Any]
  evaluations: list[dict[str, Any]]


def path(name: str) -> str:
  """The file that record.beside names: that of a shipped recording, 'kr_jax:NAME', or the path itself.

  Raises ValueError for a shipped one that there is not.
  """
  if not name.startswith(shipped.PREFIX):
    return files.expanded(name)
  folder, of = os.path.join(shipped.FOLDER, 'recorded'), name.removeprefix(shipped.PREFIX)
  found = os.path.join(folder, f'{of}.json')
  if os.path.basename(of) != of or not os.path.isfile(found):
    known = sorted(x.removesuffix('.json') for x in os.listdir(folder) if x.endswith('.json')) if os.path.isdir(
        folder) else []
    raise ValueError(f'record.beside={name!r}: there is no recorded run {of!r} in kr_jax'
                     f"{knobs.nearest(of, known)}; name another, or set record.beside=''")
  return found


def read(name: str) -> Recorded:
  """The recorded run that record.beside names. Raises ValueError for a file that is missing, or that is none."""
  file = path(name)
  try:
    found = json.loads(files.read(file), parse_constant=_no_number)
    problem = _problem(found)
  except OSError as error:
    problem = f'it cannot be read: {error.strerror or error}'
  except (ValueError, RecursionError) as error:
    problem = f'it is no JSON: {error}'
  if problem:
    raise ValueError(f'record.beside={name!r}: {file} holds no recorded run, as {problem}; put the file back, name '
                     "another, or set record.beside=''")
  return Recorded(found['name'], found['config'], found['evaluations'])


def problems(name: str) -> list[str]:
  """What is wrong with record.beside, in one line; '' names nothing."""
  try:
    return [] if not name or read(name) else []
  except ValueError as error:
    return [str(error)]


def _no_number(name: str) -> None:
  raise ValueError(f'{name} is no number')


def _problem(found: Any) -> str:
  """Why what a file holds is no recorded run; '' where it is one."""
  kinds = {'name': str, 'config': dict, 'evaluations': list}
  if not isinstance(found, dict):
    return 'it is no object'
  if wrong := [name for name, kind in kinds.items() if not isinstance(found.get(name), kind) or not found[name]]:
    return f'it has no {wrong[0]!r}'
  before = {'step': -1, 'rollouts': 0, 'tokens': 0}
  for i, row in enumerate(found['evaluations']):
    if not isinstance(row, dict):
      return f'evaluation {i} is no object'
    for figure in FIGURES:
      x, is_share = row.get(figure), figure in ('success', 'low', 'high')
      if x is None and figure in _MAY_BE_UNKNOWN:
        continue
      if type(x) not in (int, float) or not (0 <= x <= 1 if is_share else before[figure] <= x < 1e30):
        return f'{figure}={x!r} of evaluation {i} is no {"success in 0..1" if is_share else "count that rises"}'
      before[figure] = x
  return ''


def compared(config: Mapping[str, Any]) -> dict[str, Any]:
  """The knobs and facts by which two runs are a pair, by 'section.knob'. config: nested dicts, as of config.json."""
  return {name: x for name, x in claim.flat(claim.as_read(config)).items()
          if claim.is_of(name, _MUST_NOT) or not claim.is_of(name, _MAY_DIFFER)}


def differences(recorded: Recorded, config: Mapping[str, Any]) -> list[str]:
  """The knobs and facts in which a run is no pair of the recorded one.

  A knob that one of them does not have is newer than it, and was its default.
  """
  defaults = compared(knobs.as_dict(knobs.Config()))
  then, now = defaults | recorded.config, defaults | compared(config)
  return [name for name in sorted(then | now) if not claim.same(then.get(name), now.get(name))]


def why_not(names: list[str]) -> str:
  """Says in which knobs two runs differ: 'seed differs', 'num_steps, seed, tasks.dataset and 4 more differ'."""
  more = len(names) - _NAMED
  text = ', '.join(names[:_NAMED]) + (f' and {more} more' if more > 0 else '')
  return f'{text} differ{"s" if len(names) == 1 else ""}'


def as_text(name: str, command: str, config: Mapping[str, Any], versions: Mapping[str, str],
            evaluations: list[dict[str, Any]], steps: Mapping[str, list[Any]]) -> str:
  """The file of a run: a line a field, an evaluation and a list of steps' figures. config: as of `compared`."""
  line = lambda x: json.dumps(x, allow_nan=False)
  rows = ',\n  '.join(line({figure: row[figure] for figure in FIGURES}) for row in evaluations)
  columns = ',\n  '.join(f'{line(key)}: {line(x)}' for key, x in steps.items())
  return (f'{{"name": {line(name)},\n"command": {line(command)},\n"config": {line(compared(config))},\n'
          f'"versions": {line(versions)},\n"evaluations": [\n  {rows}],\n"steps": {{\n  {columns}}}}}\n')
