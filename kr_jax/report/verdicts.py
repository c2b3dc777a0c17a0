"""One line an area that says how runs did: good, worth a look, or bad. Thresholds stand below, each with its reason.

A line speaks of each group of runs, by the means of its runs; its level is that of the worst group. What is not
recorded is 'unknown', never good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import datetime
import math
from typing import Any

from kr_jax.costs import hardware
from kr_jax.record import goodput as goodput_lib
from kr_jax.report import figures
from kr_jax.report import panels
from kr_jax.report import run as run_lib
from kr_jax.report.run import number

Runs = Sequence[run_lib.Run]
Figures = Sequence[dict[figures.Key, figures.Figure]]  # of each run
Verdict = tuple[str, str]  # level and text
LEVELS = ('good', 'unknown', 'warn', 'bad')  # from the best
# Where fewer rollouts are in mixed groups, most of the sampling teaches nothing; of one in twenty it is lost.
_GRADIENT_WARN, _GRADIENT_BAD = 0.25, 0.05
# Log loss over that of one rate for all tasks: above 1 the forecasts mislead budgets, just below they hardly help.
_LOSS_WARN, _LOSS_BAD = 0.95, 1.0
_GAP_WARN = 0.1  # mixed groups expected minus seen, of all rollouts: beyond it budgets go where nothing is learnt
# Unverified rollouts: 1 % is seen in alarms, and beyond 5 % what is left out is no longer by chance.
_UNVERIFIED_WARN, _UNVERIFIED_BAD = 0.01, 0.05
_NO_ANSWER_WARN = 0.5  # most rollouts end without an answer: the prompt or the pattern is likely wrong
# MFU of updates: dense training on TPUs is published at .4 to .6; below .1 something else than products takes the time.
_MFU_GOOD, _MFU_WARN = 0.3, 0.1
_MEMORY_WARN = 0.95  # of the device's memory: a longer batch may not fit
_IDLE_WARN = 0.5  # share in which devices wait: they take idle power for it
_EVALUATION_WARN = 0.2  # of the time: what the shipped configs keep below
_PRICE_DAYS = 365  # after which a price is old
_NETWORK_WARN = 0.5  # of the busy time, at the links' rate: the run may wait for its network
_GOODPUT_GOOD, _GOODPUT_WARN = 0.75, 0.5  # verification and evaluation take a part of a sound run


def of_groups(groups: Mapping[str, Runs]) -> list[dict[str, str]]:
  """The view's `verdicts`: a row an area. groups: the runs of each, by its label."""
  found, found_of = [], {group: [figures.of_run(run) for run in runs] for group, runs in groups.items()}
  for area, judge in _AREAS.items():
    of_each = {group: judge(runs, found_of[group]) for group, runs in groups.items()}
    level = max((level for level, _ in of_each.values()), key=LEVELS.index)
    text = '; '.join(text if len(groups) == 1 else f'{group}: {text}' for group, (_, text) in of_each.items())
    found.append({'area': area, 'level': level, 'text': text})
  return found


def _level(x: float, good: float, warn: float) -> str:
  """Of a figure of which more is better."""
  return 'good' if x >= good else 'warn' if x >= warn else 'bad'


def _mean(found: Sequence[float | None]) -> float | None:
  """The mean of what is known."""
  known = [x for x in found if x is not None]
  return math.fsum(known) / len(known) if known else None


def _percent(share: float) -> str:
  return f'{share:.1%}' if share >= 0.001 or not share else 'less than 0.1%'


def _steps(runs: Runs, name: str, last: float = 1.0) -> float | None:
  """The mean of a figure over steps, of the last part of each run."""
  return _mean([_mean([number(record, name) for record in run.steps[int(len(run.steps) * (1 - last)):]])
                for run in runs])


def _learning(runs: Runs, _: Figures) -> Verdict:
  rises = [x for run in runs if (x := panels.rise(run)) is not None]
  first, last = (_mean([run.success(run.evaluations[i]) for run in runs if run.evaluations]) for i in (0, -1))
  if not rises:
    return 'unknown', 'no two evaluations' if last is None else f'held-out success {last:.3f}; one evaluation alone'
  rise, error = (_mean(column) for column in zip(*rises))  # seeds share the tasks: their errors do not average out
  level = 'good' if rise > error else 'bad' if rise < -error else 'warn'
  seeds = f', mean of {len(rises)} runs' if len(rises) > 1 else ''
  return level, f'held-out success {first:.3f} to {last:.3f} ({rise:+.3f} ± {error:.3f}{seeds})'


def _allocation(runs: Runs, _: Figures) -> Verdict:
  seen, expected, uniform = (_steps(runs, f'{name}_gradient_ratio') for name in ('effective', 'expected', 'uniform'))
  if seen is None:
    return 'unknown', 'no figures of steps'
  level = _level(seen, _GRADIENT_WARN, _GRADIENT_BAD)
  text = f'{seen:.0%} of the rollouts are in mixed groups'
  if None in (expected, uniform) or runs[0].rule == 'uniform':
    return level, text
  tasks = [_steps(runs, f'{name}mixed_tasks') for name in ('', 'expected_', 'uniform_')]
  if expected < uniform:
    level = max(level, 'warn', key=LEVELS.index)
  counts = '' if None in tasks else (
      f'; mixed tasks a step: {tasks[0]:.1f}, expected {tasks[1]:.1f}, of uniform budgets {tasks[2]:.1f}')
  return level, f'{text}; {expected:.0%} were expected, of uniform budgets {uniform:.0%}{counts}'


def _calibration(runs: Runs, _: Figures) -> Verdict:
  loss, constant = (_steps(runs, name, last=0.5) for name in ('log_loss', 'constant_log_loss'))
  if None in (loss, constant):
    return 'unknown', 'no forecasts are recorded'
  relative = loss / constant if constant else 1.0
  level = 'good' if relative < _LOSS_WARN else 'warn' if relative < _LOSS_BAD else 'bad'
  text = (f'forecasts of tasks lose {loss:.3f} nats a rollout in the second half of the run, one rate for all tasks '
          f'{constant:.3f}')
  expected, seen = (_steps(runs, f'{name}_gradient_ratio', last=0.5) for name in ('expected', 'effective'))
  if None not in (expected, seen) and abs(expected - seen) > _GAP_WARN:
    level, text = max(level, 'warn', key=LEVELS.index), (
        f'{text}; {expected:.0%} of the rollouts expected in mixed groups, {seen:.0%} seen')
  return level, text


def _verification(runs: Runs, _: Figures) -> Verdict:
  unverified, no_answer = (_steps(runs, name) for name in ('unverified', 'no_answer'))
  if unverified is None:
    return 'unknown', 'no counts of verdicts'
  alarms = sum(len(panels.alarms(run)) for run in runs)
  level = 'bad' if unverified > _UNVERIFIED_BAD else 'good'
  if level == 'good' and (unverified > _UNVERIFIED_WARN or alarms or (no_answer or 0) > _NO_ANSWER_WARN):
    level = 'warn'
  share = '' if no_answer is None else f', {no_answer:.1%} without an answer'
  return level, f'{unverified:.1%} of the rollouts unverified{share}; {alarms or "no"} alarm{"s" * (alarms != 1)}'


def _of(found: Figures, *key: str) -> tuple[float | None, str, str]:
  """A figure of the scorecard: the mean over runs, provenance and note of the first that is known."""
  of_runs = [of_run[key] for of_run in found]
  known = next((x for x in of_runs if x.value is not None), of_runs[0])
  return _mean([x.value for x in of_runs]), known.provenance or '', known.note


def _compute(runs: Runs, found: Figures) -> Verdict:
  mfu, _, note = _of(found, 'computation', 'MFU of updates', 'share')
  hours, _, _ = _of(found, 'computation', 'device time held', 'device-h')
  held = '' if hours is None else f'; {hours:.3g} device-hours{" a run" * (len(runs) > 1)}'
  if mfu is None:
    return 'unknown', f'use of peak FLOP/s: {note or "unknown"}{held}'
  return _level(mfu, _MFU_GOOD, _MFU_WARN), f'updates use {_percent(mfu)} of the peak FLOP/s{held}'


def _memory(runs: Runs, _: Figures) -> Verdict:
  peaks = [row for run in runs if (row := panels.peak(run))]
  if not peaks:
    return 'unknown', 'no peak was recorded'
  most, profile = max(peaks, key=lambda row: row['gb']), runs[0].profile
  if most['source'] == 'host':
    return 'unknown', f'at most {most["gb"]:.2f} GB of the process on the host; devices do not tell theirs'
  if profile is None or profile.hbm_gb is None:
    return 'unknown', f'at most {most["gb"]:.2f} GB of a device, of unknown size'
  gb = profile.hbm_gb / (profile.devices_per_chip or 1)
  text = f'at most {most["gb"]:.2f} of {gb:g} GB of a device, in {most["phase"]}'
  return 'warn' if most['gb'] >= _MEMORY_WARN * gb else 'good', text


def _energy(runs: Runs, found: Figures) -> Verdict:
  kwh, provenance, note = _of(found, 'energy', 'energy', 'kWh')
  co2, _, _ = _of(found, 'energy', 'emissions', 'kg CO2e')
  if kwh is None:
    return 'unknown', note or 'unknown'
  waits = _mean([run.goodput['device_wait_share'] for run in runs if run.goodput])
  text = f'{kwh:.3g} kWh ({provenance})' + ('' if co2 is None else f', {co2:.3g} kg CO2e')
  if waits is not None and waits > _IDLE_WARN:
    return 'warn', f'{text}; the devices wait for {waits:.0%} of the time, at idle power'
  return 'good', text


def _money(runs: Runs, found: Figures) -> Verdict:
  dollars, provenance, note = _of(found, 'money', 'the run', '$')
  if dollars is None:
    return 'unknown', note or 'unknown'
  level, text = 'good', f'${dollars:.3g}{" a run" * (len(runs) > 1)} ({provenance})'
  evaluating, all_s = (sum(figures.total(run, 'wall_s', phase) or 0.0 for run in runs) for phase in ('evaluate', None))
  share = evaluating / all_s if all_s else 0.0
  if share > _EVALUATION_WARN:
    level, text = 'warn', f'{text}; {share:.0%} of it for evaluation'
  dated = str(getattr(runs[0].profile, 'price_date', '') or '')
  if (age := _days_since(dated, runs[0])) is not None and age > _PRICE_DAYS:
    level, text = 'warn', f'{text}; the price is of {dated}'
  return level, text


def _days_since(dated: str, run: run_lib.Run) -> float | None:
  """Days from a date, '2025-02' or '2025-02-01', to the run's start; None where either is unknown."""
  try:
    date = datetime.datetime.fromisoformat(f'{dated}-01' if len(dated) == 7 else dated)
  except ValueError:
    return None
  started = run.ledger.attempts[0]['started'] if run.ledger.attempts else None
  return None if started is None else (started - date.replace(tzinfo=datetime.timezone.utc).timestamp()) / 86400


def _network(runs: Runs, _: Figures) -> Verdict:
  sent = [figures.total(run, 'collective_bytes') for run in runs]
  mean = _mean(sent)
  if mean is None:
    return 'unknown', 'bytes sent were not counted'
  busy = _mean([figures.total(run, 'busy_s') for run in runs])
  profile = runs[0].profile
  chips = None if profile is None else hardware.chips(runs[0].ledger.attempts[-1], profile)
  text = f'{mean / 1e9:.3g} GB sent between devices'
  if not mean:
    return 'good', 'nothing is sent between devices'
  if not busy or not chips or profile.ici_gb_per_s is None:
    return 'unknown', f'{text}; the rate of their links is not known'
  share = mean / (profile.ici_gb_per_s * 1e9 * chips) / busy
  return 'warn' if share > _NETWORK_WARN else 'good', (
      f'{text}, {_percent(share)} of the busy time at the rate of the links')


def _goodput(runs: Runs, _: Figures) -> Verdict:
  found = [run.goodput for run in runs if run.goodput]
  share = _mean([of['goodput'] for of in found])
  if share is None:
    return 'unknown', 'no seconds were recorded'
  kinds = {kind: sum(of['badput'][kind] for of in found) for kind in goodput_lib.KINDS}
  most, wall_s = max(kinds, key=kinds.get), sum(of['wall_s'] for of in found)
  attempts = sum(of['attempts'] for of in found)
  return _level(share, _GOODPUT_GOOD, _GOODPUT_WARN), (
      f'{share:.0%} of {wall_s:,.0f} s productive, in {attempts} attempt{"s" * (attempts != 1)}; most of the rest is '
      f'{most.replace("_", " ")} ({kinds[most] / wall_s:.0%})')


_AREAS: dict[str, Callable[[Any], Verdict]] = {
    'learning': _learning, 'allocation': _allocation, 'calibration': _calibration, 'verification': _verification,
    'compute': _compute, 'memory': _memory, 'energy': _energy, 'money': _money, 'network': _network,
    'goodput': _goodput}
