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
Rows = dict[tuple[str, str], Figure]  # of a resource, by metric and unit
_CERTAINTY = ('counted', 'measured', 'modelled')
_NO_LEDGER = 'no ledger'
_WIDTHS = {'bfloat16': 2, 'float32': 4}  # bytes of a parameter


def of_run(run: run_lib.Run, target: float | None = None) -> dict[Key, Figure]:
  """All figures of a run; the same keys for every run of one kind of record."""
  resources = {'computation': _computation(run), 'memory': _memory(run), 'energy': _energy(run),
               'money': _money(run, target), 'network': _network(run), 'other': _other(run)}
  return {(resource, *key): figure for resource, figures in resources.items() for key, figure in figures.items()}


def total(run: run_lib.Run, name: str, phase: str | None = None) -> float | int | None:
  """The sum of a counter over all attempts, of one phase or of all; None where nothing counted it."""
  entries = run.ledger.entries if phase is None else run.by_phase.get(phase, [])
  found = [x for entry in entries if (x := number(entry, name)) is not None]
  return sum(found) if found else None


def ratio(over: Figure, under: Figure) -> Figure:
  """A quotient; None where either is unknown or the divisor is 0."""
  if over.value is None or not under.value:
    return Figure(note=next((x.note for x in (over, under) if x.value is None), 'nothing to divide by'))
  return Figure(over.value / under.value, max(over.provenance, under.provenance, key=_CERTAINTY.index))


def _figure(x: float | None, provenance: str, why_unknown: str, note: str = '') -> Figure:
  return Figure(note=why_unknown) if x is None else Figure(x, provenance, note)


def _counted(run: run_lib.Run, name: str, phase: str | None = None, scale: float | int = 1) -> Figure:
  x = total(run, name, phase)
  return _figure(x and x * scale, 'counted', f'no {name} in the ledger' if run.ledger.entries else _NO_LEDGER)


def _seconds(run: run_lib.Run, phase: str | None = None) -> Figure:
  return _figure(total(run, 'wall_s', phase), 'measured', _NO_LEDGER)


def _wall(run: run_lib.Run) -> Figure:
  """Seconds of the run; where there is no ledger those of the record, which leave out what was repeated."""
  found, records = _seconds(run), [number(record, 'wall_s') for record in (*run.steps, *run.evaluations)]
  if found.value is not None or not records or None in records:
    return found
  return Figure(max(records), 'measured', 'of metrics.jsonl: without starts, warm start and repeated steps')


def _priced(run: run_lib.Run, name: str) -> Figure:
  """Of run.price: 'kwh', 'dollars', ..."""
  return getattr(run.price, name) if run.price else Figure(note=_NO_LEDGER)


def _use(run: run_lib.Run, phase: str, name: str) -> Figure:
  """Of a peak: 'mfu' or 'bandwidth_use' of a phase."""
  if run.price is None:
    return Figure(note=_NO_LEDGER)
  found = run.price.by_phase.get(phase, {}).get(name, Figure())
  counted = 'FLOPs' if name == 'mfu' else 'bytes read'
  return _figure(found.value, found.provenance, f'its {counted} or the peak of these devices are not known', found.note)


def _computation(run: run_lib.Run) -> Rows:
  generated = _counted(run, 'tokens_generated', 'sample')
  if generated.value is None and run.steps:
    tokens = [number(record, 'tokens_generated') for record in run.steps]
    if None not in tokens:
      generated = Figure(sum(tokens), 'counted', 'of metrics.jsonl, without repeated steps')
  step_s = [x for record in run.steps if (x := number(record, 'step_s')) is not None]
  useful, executed = (_counted(run, f'flops_{name}') for name in ('useful', 'executed'))
  held = _priced(run, 'device_s')
  busy = [(share * seconds, seconds) for entry in run.ledger.entries
          if None not in (share := number(entry, 'busy_share'), seconds := number(entry, 'wall_s'))]
  of_tpu = {('busy, as the TPU tells it', 'share'): ratio(*(
      Figure(math.fsum(x), 'measured') for x in zip(*busy)))} if busy else {}
  return of_tpu | {
      ('training time, all attempts', 's'): _wall(run),
      ('device time held', 'device-h'): held._replace(value=held.value and held.value / 3600),
      ('median time of a step', 's'): _figure(
          statistics.median(step_s) if step_s else None, 'measured', 'no step_s in metrics.jsonl'),
      ('useful work', 'FLOP'): useful,
      ('executed work', 'FLOP'): executed,
      ('useful part of the work', 'share'): ratio(useful, executed),
      ('MFU of updates', 'share'): _use(run, 'update', 'mfu'),
      ('MFU of sampling', 'share'): _use(run, 'sample', 'mfu'),
      ('bandwidth use of sampling', 'share'): _use(run, 'sample', 'bandwidth_use'),
      ('generated in training', 'tokens'): generated,
      ('throughput of sampling', 'tokens/s'): ratio(generated, _seconds(run, 'sample')),
      ('throughput of updates', 'tokens/s'): ratio(_counted(run, 'tokens_updated', 'update'), _seconds(run, 'update'))}


def _parameters(run: run_lib.Run) -> Figure:
  found = [n for attempt in run.ledger.attempts if (n := number(attempt, 'parameters')) is not None]
  return _figure(found[-1] if found else None, 'counted', _NO_LEDGER)


def _memory(run: run_lib.Run) -> Rows:
  last, parameters = run.ledger.attempts[-1] if run.ledger.attempts else {}, _parameters(run)
  width = _WIDTHS.get(str(run.knob('policy.dtype')))
  size = Figure(note='the type of the parameters is not known')
  if width and parameters.value is not None:
    size = Figure(parameters.value * width / 1e9, 'counted', f'as {run.knob("policy.dtype")}')
  peak = Figure(note='no peak was seen' if run.ledger.entries else _NO_LEDGER)
  if most := panels.peak(run):
    of_what = 'the busiest device' if most['source'] == 'device' else 'the process on the host'
    peak = Figure(most['gb'], 'measured', f'of {of_what}, in {most["phase"]}')
  part = lambda name: _figure(number(last, name), 'counted', 'not recorded' if last else _NO_LEDGER,
                              'bytes uncompressed over bytes that the sampler reads')
  return {
      ('parameters', ''): parameters, ('size of the model', 'GB'): size, ('peak in use', 'GB'): peak,
      ("compression of the sampler's weights", 'ratio'): part('weights_compression'),
      ("compression of the sampler's cache", 'ratio'): part('cache_compression')}


def _energy(run: run_lib.Run) -> Rows:
  return {('energy', 'kWh'): _priced(run, 'kwh'), ('emissions', 'kg CO2e'): _priced(run, 'kg_co2')}


def _money(run: run_lib.Run, target: float | None) -> Rows:
  dollars = _priced(run, 'dollars')
  found = {
      ('the run', '$'): dollars,
      ('a parameter', '$'): ratio(dollars, _parameters(run)),
      ('a million generated tokens', '$'): ratio(dollars, _counted(run, 'tokens_generated', scale=1e-6))}
  if target is not None:
    rows = panels.curves(run)
    reached = compare.reach([row['dollars'] for row in rows], [row['success'] for row in rows], target)
    known = reached.is_known and not reached.is_censored
    note = '' if known else f'not held after ${reached.low:.3g}' if reached.is_known else dollars.note or 'unknown'
    found[f'to a held-out success of {target:g}', '$'] = Figure(
        reached.low if known else None, dollars.provenance if known else None, note)
  return found


def _network(run: run_lib.Run) -> Rows:
  return {('sent by collectives', 'GB'): _counted(run, 'collective_bytes', scale=1e-9),
          ('copied between host and devices', 'GB'): _counted(run, 'host_bytes', scale=1e-9),
          ('written in checkpoints', 'GB'): _counted(run, 'checkpoint_bytes', scale=1e-9)}


def _other(run: run_lib.Run) -> Rows:
  last, rise = run.evaluations[-1] if run.evaluations else {}, panels.rise(run)
  measured = lambda x, note='': Figure(x, None if x is None else 'measured', note)
  found = {
      ('held-out success, last', 'share'): measured(
          run.success(last) if last else None, f'{run.score}, at step {last["step"]}' if last else 'no evaluation'),
      ('rise of held-out success', 'share'): measured(
          rise and rise.mean, f'± {rise.error:.3f} (95 %)' if rise else 'needs two evaluations'),
      ("fidelity of the sampler's policy, 1 - sqrt(JS)", 'share'): _mean(run, 'policy_fidelity'),
      ('agreement on the likeliest token', 'share'): _mean(run, 'argmax_agreement')}
  for row in panels.robustness(run):
    span = '' if None in (row['low'], row['high']) else f'95 % interval {row["low"]:.3f} to {row["high"]:.3f}, '
    found[f'robustness: success kept under {row["name"]}', 'ratio'] = measured(
        row['ratio'], f'{span}at step {row["step"]}')
  share = run.goodput['goodput'] if run.goodput else None
  return found | {('goodput', 'share'): _figure(share, 'measured', _NO_LEDGER),
                  ('unverified rollouts', 'share'): _mean(run, 'unverified')}


def _mean(run: run_lib.Run, name: str) -> Figure:
  found = [x for record in run.steps if (x := number(record, name)) is not None]
  why = 'not known at any step' if any(name in record for record in run.steps) else f'no {name} in metrics.jsonl'
  return _figure(math.fsum(found) / len(found) if found else None, 'measured', why, 'mean over steps')
