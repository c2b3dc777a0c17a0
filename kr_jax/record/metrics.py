"""The record of a run: one JSON object a line, the same as TensorBoard events, and compile counts.

`metrics.jsonl` is the truth; a resumed run first drops the records of the steps it will repeat.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import math
import os
from typing import Any

import jax
from tensorboardX import SummaryWriter

from kr_jax import processes

class CompileCount:
  """XLA programs that this process compiles from now on, until it is closed."""

  def __init__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._on_event)

  def _on_event(self, event: str, duration: float, **_) -> None:
    del duration
    self.count += event == '/jax/core/compile/backend_compile_duration'

  def close(self) -> None:
    jax.monitoring.unregister_event_duration_listener(self._on_event)


def read(path: str) -> list[dict[str, Any]]:
  """The records of a metrics.jsonl. A last line cut short by a kill is dropped."""
  records = []
  if os.path.exists(path):
    with open(path) as file:
      lines = file.read().split('\n')
    for line in lines[:-1]:  # what follows the last line break is empty, or half a record
      records.append(json.loads(line))
  return records


class Writer:
  """Appends records to <directory>/metrics.jsonl and to TensorBoard events beside it; of several
  processes the first does.

  Args:
    keep: of the records there, those that this run will not write again.
    first_step: the step the run goes on from, for TensorBoard.
  """

  def __init__(self, directory: str, *, keep: Callable[[dict[str, Any]], bool], first_step: int):
    self.records, self._file = [], None
    if not processes.is_first():
      return
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, 'metrics.jsonl')
    self.records = [r for r in read(path) if keep(r)]
    rewritten = f'{path}.tmp'
    with open(rewritten, 'w') as file:
      file.writelines(json.dumps(r) + '\n' for r in self.records)
    os.replace(rewritten, path)  # a kill leaves the old file or the new one, whole
    self._file = open(path, 'a')
    self._events = SummaryWriter(directory, purge_step=first_step or None)

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def write(self, record: dict[str, Any]) -> None:
    """Writes a record: its 'step', numbers, and what TensorBoard does not get: lists, dicts, texts and None."""
    if self._file is None:
      return
    self.records.append(record)
    self._file.write(json.dumps(record) + '\n')
    self._file.flush()
    for name, x in record.items():
      if name != 'step' and isinstance(x, (int, float)) and math.isfinite(x):
        self._events.add_scalar(name, x, record['step'])

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._events.close()
