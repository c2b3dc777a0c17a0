"""The record of a run: one JSON object a line, the same for other sinks (sinks.py), and compile counts.

`metrics.jsonl` is the truth; a resumed run first drops the records of the steps it will repeat. What of it cannot be
read is kept in a file beside it, and named, and the run goes on with the rest (lines.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import json
import math
import os
from typing import Any

from absl import logging
import jax

from kr_jax import files
from kr_jax import health
from kr_jax import knobs
from kr_jax import processes
from kr_jax.costs import hardware as hardware_lib
from kr_jax.costs import pricing
from kr_jax.record import lines
from kr_jax.record import sinks


class CompileCount:
  """XLA programs that this process asks for from now on, until it is closed, and the seconds that they took; `cached`
  are those of them that the cache of compiled programs had."""

  def __init__(self):
    self.count, self.cached, self.seconds = 0, 0, 0.0
    jax.monitoring.register_event_duration_secs_listener(self._on_duration)
    jax.monitoring.register_event_listener(self._on_event)

  def _on_duration(self, event: str, duration: float, **_) -> None:
    if event == '/jax/core/compile/backend_compile_duration':
      self.count += 1
      self.seconds += duration

  def _on_event(self, event: str, **_) -> None:
    self.cached += event == '/jax/compilation_cache/cache_hits'

  def close(self) -> None:
    jax.monitoring.unregister_event_duration_listener(self._on_duration)
    jax.monitoring.unregister_event_listener(self._on_event)


def read(path: str) -> list[dict[str, Any]]:
  """The records of a metrics.jsonl; what is none is left out, and so is a last line cut short by a kill. Empty where
  there is no file. Raises OSError."""
  return lines.read(path, is_record).records if os.path.exists(path) else []


def is_record(record: dict[str, Any]) -> bool:
  """Whether an object is a record of a step or an evaluation, with what a run that goes on reads of it."""
  is_number = lambda x: type(x) in (int, float) and math.isfinite(x)
  verification, tasks = record.get('verification', {}), record.get('eval_tasks') or {'right': [], 'verified': []}
  return (type(record.get('step')) is int and 0 <= record['step'] < 2 ** 53 and is_number(record.get('wall_s', 0))
          and isinstance(verification, dict) and all(
              isinstance(of, dict) and of.keys() >= set(health.UNVERIFIED) and all(type(n) is int for n in of.values())
              for of in verification.values())
          and isinstance(rows := record.get('reliability', []), list) and all(
              isinstance(row, list) and len(row) > 2 and all(map(is_number, row[:3])) for row in rows)
          and isinstance(tasks, dict) and isinstance(tasks.get('right'), list)
          and isinstance(tasks.get('verified'), list) and len(tasks['right']) == len(tasks['verified']))


def _is_step(record: Mapping[str, Any]) -> bool:
  return 'reward_mean' in record


def _is_evaluation(record: Mapping[str, Any]) -> bool:
  return any(name.startswith('eval/') for name in record)


def repaired(path: str) -> list[dict[str, Any]]:
  """The records of a metrics.jsonl, of each step and each evaluation the last, for a run that goes on.

  Where there is more in the file than such records and a last line cut short, the file is kept under another name, and
  it is said. Raises OSError.
  """
  if not os.path.exists(path):
    return []
  found = lines.read(path, is_record)
  last = {(record['step'], kind): number for record, number in zip(found.records, found.numbers)
          for kind in (_is_step, _is_evaluation) if kind(record)}
  is_last = lambda record, number: all(
      last[record['step'], kind] == number for kind in (_is_step, _is_evaluation) if kind(record))
  kept = [record for record, number in zip(found.records, found.numbers) if is_last(record, number)]
  repeated = [number for record, number in zip(found.records, found.numbers) if not is_last(record, number)]
  if found.unread or repeated:
    why = {'cannot be read as records': found.unread, 'are of a step that is written again later': repeated}
    what = [f'{lines.numbered(numbers)} {text}' for text, numbers in why.items() if numbers]
    logging.warning('%s is damaged: %s. The file is kept as %s, and the run goes on with the other %d records', path,
                    '; '.join(what), lines.set_aside(path), len(kept))
  return kept


def costs(entries: Sequence[Mapping[str, Any]], attempt: Mapping[str, Any], hardware: hardware_lib.Hardware | None
          ) -> dict[str, float | None]:
  """What some lines of the ledger add up to, by names that sinks have groups for; None: not known.

  Args:
    entries: of one step.
    attempt: the first line of the attempt.
    hardware: that it is priced by.

  Returns:
    time_PHASE_s of each phase; cost_device_s, cost_dollars, cost_kwh, cost_peak_bytes; and of the counters that there
    are cost_flops_useful, cost_flops_executed, cost_collective_bytes, cost_host_bytes, cost_checkpoint_bytes.
  """
  priced, found = pricing.price(entries, [attempt], hardware), {}
  for entry in entries:
    name = f'time_{entry["phase"]}_s'
    found[name] = found.get(name, 0.0) + entry['wall_s']
  for name in ('device_s', 'dollars', 'kwh'):
    found[f'cost_{name}'] = getattr(priced, name).value
  peaks = [entry['peak_bytes'] for entry in entries if entry.get('peak_bytes') is not None]
  found['cost_peak_bytes'] = max(peaks, default=None)
  for name in ('flops_useful', 'flops_executed', 'collective_bytes', 'host_bytes', 'checkpoint_bytes'):
    if counted := [entry[name] for entry in entries if name in entry]:
      found[f'cost_{name}'] = sum(counted)
  return found


class Writer:
  """Appends records to <directory>/metrics.jsonl, and gives them to the sinks of sinks.py; of several processes the
  first does.

  Args:
    keep: of the records there, those that this run will not write again.
    first_step: the step the run goes on from, for TensorBoard.
    record: which sinks are asked for besides TensorBoard.
    config: of the run, nested dicts of plain values, which Weights & Biases shows.
    on_line: called with each record that is written, as it will be read.

  Attributes:
    records: those that were there and are kept. What is written is not held in memory as well.
  """

  def __init__(self, directory: str, *, keep: Callable[[dict[str, Any]], bool], first_step: int,
               record: knobs.Record = knobs.Record(), config: Mapping[str, Any] | None = None,
               on_line: Callable[[dict[str, Any]], None] | None = None):
    self._on_line = on_line
    self.records, self._file, self._sinks = [], None, sinks.Sinks({})
    if not processes.is_first():
      return
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, 'metrics.jsonl')
    self.records, self._path = [r for r in repaired(path) if keep(r)], path
    files.write(path, ''.join(json.dumps(r) + '\n' for r in self.records))
    self._file = open(path, 'a')
    self._sinks = sinks.of_run(directory, first_step, record, config or {})

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def write(self, record: dict[str, Any], histograms: Mapping[str, Any] | None = None) -> None:
    """Writes a record: its 'step', numbers, and what sinks do not get: lists, dicts, texts and None.

    Args:
      histograms: arrays by name, which sinks alone get: 'budgets', 'lengths', 'rewards'.

    Raises OSError where the record cannot be written, and files.Unsaved where it was removed: without it a run could
    not go on.
    """
    if self._file is None:
      return
    line = json.dumps(record)
    if not os.fstat(self._file.fileno()).st_nlink:  # what is written there would be lost without an error
      raise files.Unsaved(f'{self._path} was removed while the run was at work. Put back what its workdir held, and '
                          'give the same command again', again=False)
    self._file.write(f'{line}\n')
    self._file.flush()
    self._sinks.write(record, histograms)
    if self._on_line is not None:
      self._on_line(json.loads(line))

  def costs(self, step: int, entries: Sequence[Mapping[str, Any]], attempt: Mapping[str, Any],
            hardware: hardware_lib.Hardware | None) -> None:
    """Gives the sinks, and them alone, `costs` of a step: the ledger holds them already."""
    self._sinks.write({'step': step, **costs(entries, attempt, hardware)})

  def event(self, name: str, step: int | None = None, at: float | None = None) -> None:
    """Tells the sinks that something begins or ends, as of sinks.Sinks.event."""
    self._sinks.event(name, step, at)

  def close(self) -> None:
    try:
      if self._file is not None:
        self._file.close()  # which writes, on a disk that was full, what it could not before
    finally:
      self._sinks.close()
