"""A run beside a recorded one of the same config and other budgets (record/beside.py): figures, and a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kr_jax.record import beside
from kr_jax.report import compare
from kr_jax.report import panels
from kr_jax.report import run as run_lib


class Paired(NamedTuple):
  """said: what the recorded run got, or why it is not shown; '' where no run is named. rows: its evaluations."""

  said: str = ''
  name: str = ''
  rows: Sequence[dict[str, Any]] = ()  # with beside.FIGURES


NOTHING = Paired()


def of(run: run_lib.Run) -> Paired:
  """What a run's config names as record.beside, where the two are a pair."""
  name = run.knob('record.beside')
  if not name or not isinstance(name, str):
    return NOTHING
  try:
    recorded = beside.read(name)
  except ValueError as error:  # it was there when the run began
    return Paired(f'nothing: {error}')
  if differ := beside.differences(recorded, run.config):
    return Paired(f'nothing: {beside.why_not(differ)} from the run recorded in {name}')
  return Paired(sentence(recorded, panels.curves(run)), recorded.name, recorded.evaluations)


def sentence(recorded: beside.Recorded, curve: list[dict[str, Any]]) -> str:
  """What a recorded run got, what another one did, and when the other was where the recorded one ended.

  Args:
    curve: of the other, as of panels.curves.
  """
  last, known = recorded.evaluations[-1], [row for row in curve if row['success'] is not None]
  ours = known[-1] if known else None
  is_same = ours is not None and ours['rollouts'] == last['rollouts']
  spent = 'seed and rollouts' if is_same else f'seed, {last["rollouts"]:,} rollouts'
  text = f'{recorded.name}, the same {spent} (recorded): {_success(last)}'
  if ours is None:
    return f'{text}; this run is not evaluated'
  text += f'; this run {_success(ours)}'
  if not last['success']:
    return text
  reach = compare.reach([row['rollouts'] for row in known], [row['success'] for row in known], last['success'])
  if reach.is_censored:
    return f'{text}, and it has not held {last["success"]:.3f}'
  if not reach.is_known:
    return text
  return f'{text}; it held {last["success"]:.3f} after {_about(reach.low)} of {ours["rollouts"]:,.0f} rollouts'


def _about(x: float) -> str:
  """A count with two digits, as it is interpolated."""
  return f'{float(f"{x:.2g}"):,.0f}'


def _success(row: dict[str, Any]) -> str:
  """A success rate with its interval."""
  mean, low, high = (row[name] for name in ('success', 'low', 'high'))
  return f'{mean:.3f}' if None in (low, high) else f'{mean:.3f} [{low:.3f}, {high:.3f}]'
