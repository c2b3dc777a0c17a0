"""Where the wall time of a run went, over all its starts, in the words of Google's ML Goodput.

    goodput = productive seconds / wall seconds

Productive is the time of steps that were not repeated, and of the warm start. All other time is badput, of one kind
each. The kinds and the productive time add up to the wall time, which is the sum over attempts; the time between two
attempts, in which nothing was held, is told apart.

A step is repeated where a kill came before it was saved, or a stop left it: the next attempt begins with an earlier step,
or with the same. Its seconds are wasted progress, whatever their phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kr_jax.record import ledger as ledger_lib

PRODUCTIVE = ('warm_start', 'allocate', 'reshard', 'sample', 'detokenise', 'pack', 'score', 'update')
# Phases -> badput. Of an attempt that goes on with a run 'start' and 'data' are recovery.
_BADPUT = {'start': 'init', 'data': 'data', 'compile': 'compile', 'checkpoint': 'checkpoint_save',
           'restore': 'checkpoint_restore', 'verify': 'verification', 'evaluate': 'evaluation', 'record': 'record',
           'report': 'record', 'wait': 'wait', 'other': 'other'}
KINDS = ('init', 'data', 'compile', 'checkpoint_save', 'checkpoint_restore', 'verification', 'evaluation',
         'wasted_progress', 'recovery', 'record', 'wait', 'other')
_ONCE = ('start', 'data', 'restore', 'warm_start')  # of an attempt, not of a step


def is_wasted(entry: Mapping[str, Any], first_step: Mapping[int, int], evaluated: Mapping[int, int]) -> bool:
  """Whether the work of an entry was done again.

  Args:
    first_step: of each attempt, by its number.
    evaluated: the last attempt that evaluated before a step, by the step.
  """
  again = min((first for attempt, first in first_step.items() if attempt > entry['attempt']), default=None)
  if again is None or entry['phase'] in _ONCE or entry['step'] < again:
    return False
  # An evaluation is taken before its step, and so is the page. It is kept, unless it was stopped. A step that was left
  # saves the step before.
  is_kept = {'evaluate': evaluated.get(again) == entry['attempt'], 'report': True,
             'checkpoint': not entry.get('cut')}.get(entry['phase'], False)
  return not (is_kept and entry['step'] == again)


def goodput(found: ledger_lib.Ledger) -> dict[str, Any]:
  """The seconds of a run.

  Returns:
    wall_s; productive_s; goodput, a share; badput, {kind: seconds} of all KINDS; attempts, their number;
    between_attempts_s; device_wait_share: of the time of steps and evaluations, but for compilation, the share in which
    the devices waited for the host, at the least. Shares are None where no time was recorded.
  """
  first_step = {attempt['attempt']: attempt['first_step'] for attempt in found.attempts}
  evaluated = {entry['step']: entry['attempt'] for entry in found.entries if entry['phase'] == 'evaluate'}
  badput, productive_s = dict.fromkeys(KINDS, 0.0), 0.0
  for entry in found.entries:
    phase, seconds = entry['phase'], entry['wall_s']
    if is_wasted(entry, first_step, evaluated):
      badput['wasted_progress'] += seconds
    elif phase in ('start', 'data') and entry['attempt'] > 0:
      badput['recovery'] += seconds
    elif phase in PRODUCTIVE:
      productive_s += seconds
    else:
      badput[_BADPUT.get(phase, 'other')] += seconds
  wall_s = productive_s + sum(badput.values())
  of_steps = [entry for entry in found.entries if entry['phase'] not in (*_ONCE, 'compile')]
  steps_s, busy_s = (sum(entry.get(name) or 0.0 for entry in of_steps) for name in ('wall_s', 'busy_s'))
  return {
      'wall_s': wall_s, 'productive_s': productive_s, 'goodput': productive_s / wall_s if wall_s else None,
      'badput': badput, 'attempts': len(found.attempts), 'between_attempts_s': _between(found),
      'device_wait_share': 1 - busy_s / steps_s if steps_s else None}


def _between(found: ledger_lib.Ledger) -> float:
  """Seconds between the last entry of an attempt and the beginning of the next."""
  total, entries = 0.0, found.entries
  for before, after in zip(found.attempts, found.attempts[1:]):
    wall_s = sum(entry['wall_s'] for entry in entries if entry['attempt'] == before['attempt'])
    total += max(after['started'] - before['started'] - wall_s, 0.0)
  return total
