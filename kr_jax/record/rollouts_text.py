"""Kept rollouts as a person reads them on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import itertools
import re
import shutil
import textwrap
from typing import Any

from kr_jax import progress
from kr_jax.record import rollouts
from kr_jax.sections import nearest

LIMIT = 100  # rollouts that are shown unless more are asked for
_ENDS = {'stop': 'ended by itself', 'length': 'cut at the limit', 'stop_string': 'ended by a stop string'}
_BOLD, _DIM, _RED, _GREEN, _YELLOW = (f'\x1b[{code}m' for code in (1, 2, 31, 32, 33))


def visible(text: Any) -> str:
  r"""A text that does nothing to a terminal: but for line breaks, what is not printed is written as Python writes it.

  So are escapes, marks that change the direction of text, NUL and '\r'. A tab is blanks.
  """
  return ''.join(x if x.isprintable() or x == '\n' else ascii(x)[1:-1] for x in str(text).replace('\t', '    '))


def _wrapped(text: Any, indent: str, width: int) -> Iterator[str]:
  for line in visible(text).split('\n'):
    lead = re.match(' *', line)[0][:width // 4]  # what a line of code goes on with
    parts = textwrap.wrap(line, width, initial_indent=indent, subsequent_indent=indent + lead, drop_whitespace=False,
                          replace_whitespace=False, expand_tabs=False)
    yield from (part.rstrip() for part in parts or [indent])


def lines(record: Mapping[str, Any], *, header: bool, width: int = 80, colour: bool = False) -> Iterator[str]:
  """A rollout, line by line. header: begins with the task and its prompt."""
  paint = lambda code, text: f'{code}{text}\x1b[0m' if colour else text
  value = lambda name: visible(record[name]) if record.get(name) is not None else 'unknown'
  number = lambda x, form: format(x, form) if isinstance(x, (int, float)) else 'unknown'
  if header:
    before = record['estimate'] if isinstance(record.get('estimate'), dict) else {}
    mean, low, high = (number(before.get(key), '.2f') for key in ('mean', 'low', 'high'))
    yield paint(_BOLD, f'step {value("step")}  {value("task")}')
    yield from (paint(_DIM, line) for line in _wrapped(
        f'{value("status")}: {value("right_in_group")} of {value("verified_in_group")} verified are right; budget '
        f'{value("budget")}; success estimated before: {mean} ({low} to {high}); difficulty {value("difficulty")}; '
        f'{value("source")}, verifier {value("verifier")}', '  ', width))
    yield from _wrapped(record.get('prompt', ''), '  > ', width)
    yield from (paint(_DIM, line) for line in _wrapped(f'expected: {value("answer")}', '  ', width))
  verdict = value('verdict')
  why = visible(', '.join(map(str, record.get('why') or ())))
  yield ''
  yield '    ' + paint({'right': _GREEN, 'wrong': _RED, 'no_answer': _RED}.get(verdict, _YELLOW), verdict) + (
      f': reward {number(record.get("reward"), "g")}, advantage {number(record.get("advantage"), "+.2f")}; '
      f'{value("length")} {"token" if record.get("length") == 1 else "tokens"}, '
      f'{_ENDS.get(record.get("ended"), "unknown end")}; kept: {why}')
  yield from _wrapped(record.get('completion') or '(empty)', '      ', width)
  if record.get('extracted') is not None:
    yield from (paint(_DIM, line) for line in _wrapped(f'answer read: {record["extracted"]}', '    ', width))


def show(workdir: str, *, step: int | None = None, task: str | None = None, status: str | None = None,
         limit: int = LIMIT, width: int | None = None, colour: bool | None = None) -> Iterator[str]:
  """The rollouts of a run that are kept, as text, line by line: of a step or a task all, else the newest ones.

  Args:
    step, task, status: as of rollouts.read.
    limit: rollouts, at most; what is left out is said.
    width: None: of the terminal.
    colour: None: as of progress.has_colours.

  Raises:
    ValueError: nothing is kept, or nothing of what is asked for.
  """
  kept = rollouts.steps(workdir)
  if not kept:
    raise ValueError(f'there are no rollouts in {rollouts.folder(workdir)}; a run keeps them unless record.rollouts=0')
  if step is not None and step not in kept:
    raise ValueError(f'--step={step}: rollouts of this step were not kept; those of {_ranges(kept)} were')
  if status is not None and status not in rollouts.STATUSES:
    raise ValueError(f'--status={status!r} is not one of {", ".join(rollouts.STATUSES)}'
                     f'{nearest(status, rollouts.STATUSES)}')
  problems: list[str] = []
  newest = rollouts.read(workdir, step, task, status, problems=problems, newest_first=True)
  found = [*itertools.islice(newest, limit + 1)]
  if not found and not problems:
    if task is not None and not any(True for _ in rollouts.read(workdir, step, task, problems=problems)):
      tasks = sorted({str(record['task']) for record in rollouts.read(workdir, step, problems=[])})
      raise ValueError(f'--task={task!r}: no rollout of it was kept; of {len(tasks)} tasks some were, such as '
                       f'{", ".join(tasks[:3])}{nearest(task, tasks)}')
    raise ValueError(f'no rollout that was kept is --status={status}'
                     + (f' and --task={task}' if task is not None else ''))
  return _shown(found[:limit], problems, len(found) > limit,
                max(20, min(width or shutil.get_terminal_size((100, 24)).columns, 140)),
                progress.has_colours(progress.OUT) if colour is None else colour)


def _shown(found: Sequence[Mapping[str, Any]], problems: Sequence[str], is_cut: bool, width: int, colour: bool
           ) -> Iterator[str]:
  """Rollouts whose steps come the newest first, in the order of steps, those of a task under one header."""
  yield from map(visible, problems)
  before = None
  for record in sorted(found, key=lambda record: record['step']):
    group = record.get('step'), record['task']
    if before and group != before:
      yield ''
    yield from lines(record, header=group != before, width=width, colour=colour)
    before = group
  yield ''
  yield f'{len(found)} {"rollout" if len(found) == 1 else "rollouts"}' + (
      '; more are kept: choose by --step, --task and --status' if is_cut else '')


def _ranges(kept: Sequence[int]) -> str:
  """Numbers in order, as '0 to 4, 6, 8'; of many the first and the last."""
  runs: list[list[int]] = []
  for x in kept:
    if runs and x == runs[-1][1] + 1:
      runs[-1][1] = x
    else:
      runs.append([x, x])
  texts = [f'{a}' if a == b else f'{a} to {b}' for a, b in runs]
  return ', '.join(texts if len(texts) <= 12 else [*texts[:6], '...', *texts[-6:]])
