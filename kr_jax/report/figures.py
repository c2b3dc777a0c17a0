"""The figures of a run's scorecard, each with where it comes from: measured, counted or modelled.

Seconds and bytes in use are measured, tokens, FLOPs and bytes sent are counted, energy is modelled unless a meter was
there. A quotient of two is as uncertain as the less certain of them: modelled before measured before counted.
"""

from __future__ import annotations

import math
import statistics

from kr_jax.costs import pricing
from kr_jax.report import compare
from kr_jax.report import panels
from kr_jax.report import run as run_lib
from kr_jax.report.run import number

Figure = pricing.Figure
Key = tuple[str, str, str]  # resource, metric, unit
_CERTAINTY = ('counted', 'measured', 'modelled')
_NO_LEDGER = 'no ledger'
_WIDTHS = {'bfloat16': 2, 'float32': 4}  # bytes of a parameter


def of_run(run: run_lib.Run, target: float | None = None) -> dict[Key, Figure]:
  """All figures of a run; the same keys for every run of one kind of record."""
  return _computation(run) | _memory(run) | _energy(run) | _money(run, target) | _network(run) | _other(run)


def total(run: run_lib.Run, name: str, phase: str | None = None) -> float | int | None:
  """The sum of a counter over all attempts, of one phase or of all; None where nothing counted it."""
  entries = run.ledger.entries if phase is None else run.by_phase.get(phase, [])
  found = [x for entry in entries if (x := number(entry, name)) is not None]
  return sum(found) if found else None


def ratio(over: Figure, under: Figure) -> Figure:
  """A quotient; None where either is unknown or the divisor is 0."""
  if over.value is None or not under.value:
    return Figure(None, None, next((x.note for x in (over, under) if x.value is None), 'nothing to divide by'))
  return Figure(over.value / under.value, max(over.provenance, under.provenance, key=_CERTAINTY.index))


def _counted(run: run_lib.Run, name: str, phase: str | None = None, scale: float = 1) -> Figure:
  x = total(run, name, phase)
  return Figure(None, None, _absent(run, name)) if x is None else Figure(x * scale if scale != 1 else x, 'counted')


def _seconds(run: run_lib.Run, phase: str | None = None) -> Figure:
  x = total(run, 'wall_s', phase)
  return Figure(None, None, _NO_LEDGER) if x is None else Figure(x, 'measured')


def _wall(run: run_lib.Run) -> Figure:
  """Seconds of the run; where there is no ledger those of the record, which leave out what was repeated."""
  found, records = _seconds(run), [number(record, 'wall_s') for record in (*run.steps, *run.evaluations)]
  if found.value is not None or not records or None in records:
    return found
  return Figure(max(records), 'measured', 'of metrics.jsonl: without starts, warm start and repeated steps')


def _absent(run: run_lib.Run, name: str) -> str:
  return f'no {name} in the ledger' if run.ledger.entries else _NO_LEDGER


def _use(run: run_lib.Run, phase: str, name: str) -> Figure:
  """Of a peak: 'mfu' or 'bandwidth_use' of a phase."""
  if run.price is None:
    return Figure(None, None, _NO_LEDGER)
  found = run.price.by_phase.get(phase, {}).get(name, pricing.UNKNOWN)
  if found.value is not None or found.note:
    return found
  counted = 'FLOPs' if name == 'mfu' else 'bytes read'
  return Figure(None, None, f'its {counted} or the peak of these devices are not known')


def _computation(run: run_lib.Run) -> dict[Key, Figure]:
  generated = _counted(run, 'tokens_generated', 'sample')
  if generated.value is None and run.steps:
    tokens = [number(record, 'tokens_generated') for record in run.steps]
    if None not in tokens:
      generated = Figure(sum(tokens), 'counted', 'of metrics.jsonl, without repeated steps')
  step_s = [x for record in run.steps if (x := number(record, 'step_s')) is not None]
  useful, executed = (_counted(run, f'flops_{name}') for name in ('useful', 'executed'))
  return {
      ('computation', 'training time, all attempts', 's'): _wall(run),
      ('computation', 'device time held', 'device-h'): _hours(run),
      ('computation', 'median time of a step', 's'): Figure(
          statistics.median(step_s), 'measured') if step_s else Figure(None, None, 'no step_s in metrics.jsonl'),
      ('computation', 'useful work', 'FLOP'): useful,
      ('computation', 'executed work', 'FLOP'): executed,
      ('computation', 'useful part of the work', 'share'): ratio(useful, executed),
      ('computation', 'MFU of updates', 'share'): _use(run, 'update', 'mfu'),
      ('computation', 'MFU of sampling', 'share'): _use(run, 'sample', 'mfu'),
      ('computation', 'bandwidth use of sampling', 'share'): _use(run, 'sample', 'bandwidth_use'),
      ('computation', 'generated in training', 'tokens'): generated,
      ('computation', 'throughput of sampling', 'tokens/s'): ratio(generated, _seconds(run, 'sample')),
      ('computation', 'throughput of updates', 'tokens/s'): ratio(
          _counted(run, 'tokens_updated', 'update'), _seconds(run, 'update'))}


def _hours(run: run_lib.Run) -> Figure:
  found = run.price.device_s if run.price else Figure(None, None, _NO_LEDGER)
  return found if found.value is None else found._replace(value=found.value / 3600)


def _parameters(run: run_lib.Run) -> Figure:
  found = [n for attempt in run.ledger.attempts if (n := number(attempt, 'parameters')) is not None]
  return Figure(found[-1], 'counted') if found else Figure(None, None, _NO_LEDGER)


def _memory(run: run_lib.Run) -> dict[Key, Figure]:
  last, parameters = run.ledger.attempts[-1] if run.ledger.attempts else {}, _parameters(run)
  width = _WIDTHS.get(str(run.knob('policy.dtype')))
  size = Figure(None, None, 'the type of the parameters is not known')
  if width and parameters.value is not None:
    size = Figure(parameters.value * width / 1e9, 'counted', f'as {run.knob("policy.dtype")}')
  peak = Figure(None, None, _NO_LEDGER if not run.ledger.entries else 'no peak was seen')
  if most := panels.peak(run):
    of_what = 'the busiest device' if most['source'] == 'device' else 'the process on the host'
    peak = Figure(most['gb'], 'measured', f'of {of_what}, in {most["phase"]}')
  part = lambda x: Figure(None, None, 'not recorded' if last else _NO_LEDGER) if x is None else Figure(
      x, 'counted', "bytes uncompressed over bytes that the sampler reads")
  return {
      ('memory', 'parameters', ''): parameters,
      ('memory', 'size of the model', 'GB'): size,
      ('memory', 'peak in use', 'GB'): peak,
      ('memory', "compression of the sampler's weights", 'ratio'): part(number(last, 'weights_compression')),
      ('memory', "compression of the sampler's cache", 'ratio'): part(number(last, 'cache_compression'))}


def _energy(run: run_lib.Run) -> dict[Key, Figure]:
  unknown = Figure(None, None, _NO_LEDGER)
  return {('energy', 'energy', 'kWh'): run.price.kwh if run.price else unknown,
          ('energy', 'emissions', 'kg CO2e'): run.price.kg_co2 if run.price else unknown}


def _money(run: run_lib.Run, target: float | None) -> dict[Key, Figure]:
  dollars = run.price.dollars if run.price else Figure(None, None, _NO_LEDGER)
  found = {
      ('money', 'the run', '$'): dollars,
      ('money', 'a parameter', '$'): ratio(dollars, _parameters(run)),
      ('money', 'a million generated tokens', '$'): ratio(dollars, _counted(run, 'tokens_generated', scale=1e-6))}
  if target is not None:
    rows = panels.curves(run)
    reached = compare.reach([row['dollars'] for row in rows], [row['success'] for row in rows], target)
    known = reached.is_known and not reached.is_censored
    note = '' if known else f'not held after ${reached.low:.3g}' if reached.is_known else dollars.note or 'unknown'
    found['money', f'to a held-out success of {target:g}', '$'] = Figure(
        reached.low if known else None, dollars.provenance if known else None, note)
  return found


def _network(run: run_lib.Run) -> dict[Key, Figure]:
  return {('network', 'sent by collectives', 'GB'): _counted(run, 'collective_bytes', scale=1e-9),
          ('network', 'copied between host and devices', 'GB'): _counted(run, 'host_bytes', scale=1e-9),
          ('network', 'written in checkpoints', 'GB'): _counted(run, 'checkpoint_bytes', scale=1e-9)}


def _other(run: run_lib.Run) -> dict[Key, Figure]:
  last = run.evaluations[-1] if run.evaluations else {}
  measured = lambda x, note='': Figure(x, None if x is None else 'measured', note)
  rise = panels.rise(run)
  found = {
      ('other', 'held-out success, last', 'share'): measured(
          run.success(last) if last else None, f'{run.score}, at step {last["step"]}' if last else 'no evaluation'),
      ('other', 'rise of held-out success', 'share'): measured(
          rise and rise[0], f'± {1.96 * rise[1]:.3f} (95 %)' if rise else 'needs two evaluations')}
  found['other', "fidelity of the sampler's policy, 1 - sqrt(JS)", 'share'] = _mean(run, 'policy_fidelity')
  found['other', 'agreement on the likeliest token', 'share'] = _mean(run, 'argmax_agreement')
  for row in panels.robustness(run):
    span = '' if None in (row['low'], row['high']) else f'95 % interval {row["low"]:.3f} to {row["high"]:.3f}, '
    found['other', f'robustness: success kept under {row["name"]}', 'ratio'] = measured(
        row['ratio'], f'{span}at step {row["step"]}')
  share = run.goodput['goodput'] if run.goodput else None
  found['other', 'goodput', 'share'] = measured(share, '' if share is not None else _NO_LEDGER)
  found['other', 'unverified rollouts', 'share'] = _mean(run, 'unverified')
  return found


def _mean(run: run_lib.Run, name: str) -> Figure:
  found = [x for record in run.steps if (x := number(record, name)) is not None]
  if found:
    return Figure(math.fsum(found) / len(found), 'measured', 'mean over steps')
  return Figure(None, None, 'not known at any step' if any(name in record for record in run.steps) else
                f'no {name} in metrics.jsonl')
