"""Where figures of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, Google Cloud's goodput.

A sink is a convenience: each works in a thread of its own. One that raises, or that stands still, is dropped with one
warning, and the run goes on.

metrics.jsonl keeps flat names. A sink has names in groups, 'train/loss' for 'loss': GROUPS says which.

Sources: docs.wandb.ai/ref/python/init; github.com/AI-Hypercomputer/ml-goodput-measurement, README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import datetime
import fnmatch
import importlib.util
import math
import os
import queue
import re
import secrets
import threading
import time
from typing import Any

from absl import logging
import numpy as np

from kr_jax import knobs

# Flat names by group; a * stands for any characters. The first group that has a name counts.
GROUPS: dict[str, tuple[str, ...]] = {
    'train': ('loss', 'grad_norm', 'learning_rate', 'reward_mean', 'rewards', 'success_rate', 'clip_fraction*', 'kl*',
              'ratio_*', 'logp_error', 'tis_*', 'policy_entropy', 'policy_fidelity', 'argmax_agreement',
              'padding_waste', 'attention_waste', 'tokens_updated', 'expert*', 'skipped*'),
    'alloc': ('budget*', 'rollouts_total', 'nu', '*objective', '*gradient_ratio', '*mixed_tasks', '*log_loss',
              '*brier'),
    'sample': ('entropy', 'length*', 'tokens_generated', 'tokens_prefilled', 'truncated', 'slot_utilization',
               'tail_share', 'refills'),
    'verify': ('unverified*', 'no_answer'),
    'eval': ('eval_*',),
    'cost': ('cost_*', 'device_s', 'dollars', 'kwh', 'kg_co2', 'joules', 'flops*', 'mfu', 'bandwidth_use', '*_bytes'),
    'time': ('time_*', '*_s', 'compile_count', 'tokens_per_s'),
}
_OTHER = 'other'
_MOST_WAITING = 10_000  # calls that a sink may be behind by
_CLOSE_S = 30  # seconds that a sink has to end
_BINS = 32  # of a histogram of numbers that are not whole, or wide
_RUN_ID = 'run_id'  # file in the workdir


def tag(name: str) -> str:
  """The name of a figure in its group; one that has a slash has its group already.

  A figure that GROUPS does not know is in 'other/'.
  """
  if '/' in name:
    return name
  group = next((group for group, names in GROUPS.items() if any(
      fnmatch.fnmatchcase(name, known) for known in names)), _OTHER)
  return f'{group}/{name.removeprefix(f"{group}_")}'


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
  """The finite numbers of a record by `tag`; 'step' is none, nor are lists, dicts, texts, truth values and None."""
  return {tag(name): float(x) for name, x in record.items() if name != 'step' and isinstance(x, (int, float))
          and not isinstance(x, bool) and math.isfinite(x)}


def edges(x_X: np.ndarray) -> np.ndarray:
  """Edges of a histogram's bins: one for each whole number where numbers are whole and within 64, else _BINS alike."""
  low, high = float(x_X.min()), float(x_X.max())
  if high - low < 64 and np.array_equal(x_X, np.round(x_X)):
    return np.arange(low, high + 2) - 0.5
  return np.linspace(low, high, _BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])


def run_id(workdir: str) -> str:
  """The name of the run in a workdir, the same whenever it goes on; kept in a file there."""
  path = os.path.join(workdir, _RUN_ID)
  if os.path.exists(path):
    with open(path, errors='replace') as file:
      if found := re.sub(r'\W', '', file.read()):
        return found
  found = secrets.token_hex(6)
  os.makedirs(workdir, exist_ok=True)
  with open(f'{path}.tmp', 'w') as file:
    file.write(f'{found}\n')
  os.replace(f'{path}.tmp', path)
  return found


def check(config: knobs.Record) -> None:
  """Raises ValueError where a sink is asked for whose package is missing. Imports none of them."""
  wrong = []
  for name, package in (('wandb', 'wandb'), ('goodput', 'ml_goodput_measurement'), ('codecarbon', 'codecarbon')):
    if getattr(config, name) and importlib.util.find_spec(package) is None:
      wrong.append(f"record.{name}=True needs a package: pip install 'kr_jax[{name}]'; or set record.{name}=False")
  if wrong:
    raise ValueError('; '.join(wrong))


class Sink:
  """What a sink can be told, each by its thread, and does not care for. Anything may be raised."""

  def write(self, step: int, scalar_by_tag: dict[str, float], histogram_by_tag: dict[str, np.ndarray]) -> None:
    pass

  def event(self, name: str, step: int | None, at: float) -> None:
    """Something begins or ends; names as of Sinks.event. at: unix time."""

  def close(self) -> None:
    pass


class TensorBoard(Sink):
  """Event files in a directory.

  They are written by this thread, not by the writer's own, whose errors nobody would see, and which would then stand
  still.

  Args:
    first_step: events of this step and later ones, of an earlier start, are hidden; 0: there are none.
  """

  def __init__(self, directory: str, first_step: int):
    from tensorboardX import event_file_writer  # slow to load
    from tensorboardX import summary
    from tensorboardX.proto import event_pb2
    self._summary, self._proto = summary, event_pb2
    os.makedirs(directory, exist_ok=True)
    self._file = event_file_writer.EventsWriter(os.path.join(directory, 'events'))
    if first_step:
      self._add(step=first_step, file_version='brain.Event:2')
      self._add(step=first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
    self._file.flush()

  def _add(self, **fields: Any) -> None:
    self._file.write_event(self._proto.Event(wall_time=time.time(), **fields))

  def write(self, step: int, scalar_by_tag: dict[str, float], histogram_by_tag: dict[str, np.ndarray]) -> None:
    for name, x in scalar_by_tag.items():
      self._add(step=step, summary=self._summary.scalar(name, x))
    for name, x_X in histogram_by_tag.items():
      self._add(step=step, summary=self._summary.histogram(name, x_X, edges(x_X)))
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class Wandb(Sink):
  """A run of Weights & Biases, the same whenever the run in the workdir goes on.

  Its environment variables say the rest: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY. Steps that a
  run repeats are written again, as wandb's own count of steps only rises.
  """

  def __init__(self, workdir: str, config: Mapping[str, Any]):
    import wandb  # slow to load, and only some have it
    self._wandb = wandb
    is_online = os.environ.get('WANDB_MODE', 'online') in ('online', 'shared')
    if is_online and not wandb.login(prompt=False):  # which would ask in the terminal, where nobody waits for it
      raise ValueError('it knows no API key: run `wandb login`, or set WANDB_MODE=offline')
    self._run = wandb.init(
        project=os.environ.get('WANDB_PROJECT', 'kr_jax'), id=run_id(workdir), name=os.path.basename(
            os.path.abspath(workdir)), dir=workdir, config=dict(config), resume='allow' if is_online else None,
        settings=wandb.Settings(console='off', silent=True))
    self._run.define_metric('step')
    self._run.define_metric('*', step_metric='step')

  def write(self, step: int, scalar_by_tag: dict[str, float], histogram_by_tag: dict[str, np.ndarray]) -> None:
    histograms = {name: self._wandb.Histogram(np_histogram=np.histogram(x_X, edges(x_X)))
                  for name, x_X in histogram_by_tag.items()}
    self._run.log({'step': step, **scalar_by_tag, **histograms})

  def close(self) -> None:
    self._run.finish()


class Goodput(Sink):
  """Google Cloud's record of when a job, its steps and its evaluations began, in Cloud Logging."""

  def __init__(self, workdir: str):
    from ml_goodput_measurement import goodput  # only some have it
    job = f'{os.path.basename(os.path.abspath(workdir))}-{run_id(workdir)}'
    self._recorder = goodput.GoodputRecorder(job_name=job, logger_name=f'goodput_{job}', logging_enabled=True)

  def event(self, name: str, step: int | None, at: float) -> None:
    to, when = self._recorder, datetime.datetime.fromtimestamp(at, datetime.timezone.utc)
    if name == 'start':
      to.record_job_start_time(when)
      to.record_training_preparation_start_time(when)
    elif name == 'ready':
      to.record_training_preparation_end_time(when)
    elif name == 'step':
      to.record_step_start_time(step, when)
    elif name in ('evaluation', 'evaluated'):
      record = (to.record_custom_badput_event_start_time if name == 'evaluation'
                else to.record_custom_badput_event_end_time)
      record(when, custom_badput_event_type='evaluation')
    elif name == 'end':
      to.record_job_end_time(when)


class _Thread:
  """A sink in its thread; dropped for good where it fails or is too far behind.

  Args:
    name: of the sink, in a warning.
    begin: makes the sink, in the thread.
  """

  def __init__(self, name: str, begin: Callable[[], Sink]):
    self._name, self._calls = name, queue.Queue(_MOST_WAITING)
    self._is_dropped = False
    self._thread = threading.Thread(target=self._work, args=(begin,), name=f'sink {name}', daemon=True)
    self._thread.start()

  def _drop(self, why: str) -> None:
    if not self._is_dropped:
      self._is_dropped = True
      logging.warning('%s is left out from now on, as %s; the run goes on, and metrics.jsonl has all figures',
                      self._name, why)

  def _work(self, begin: Callable[[], Sink]) -> None:
    try:
      sink = begin()
      while (call := self._calls.get()) is not None and not self._is_dropped:
        method, arguments = call
        getattr(sink, method)(*arguments)
      sink.close()
    except BaseException as error:  # of any kind, SystemExit of a package's own included
      self._drop(f'it failed: {type(error).__name__}: {" ".join(str(error).split())[:300]}')

  def call(self, method: str, *arguments: Any) -> None:
    if self._is_dropped:
      return
    try:
      self._calls.put_nowait((method, arguments))
    except queue.Full:
      self._drop(f'it stands still: {_MOST_WAITING} calls wait')

  def close(self, timeout_s: float) -> None:
    if not self._is_dropped:
      try:
        self._calls.put_nowait(None)
      except queue.Full:
        pass  # it has the time below, and is dropped then
      self._thread.join(timeout_s)
    if self._thread.is_alive():
      self._drop(f'it has not ended within {_CLOSE_S:g} s')


class Sinks:
  """All sinks of a run, of which none can stop it.

  Args:
    begin_by_name: what makes each sink.
  """

  def __init__(self, begin_by_name: Mapping[str, Callable[[], Sink]]):
    self._threads = [_Thread(name, begin) for name, begin in begin_by_name.items()]

  def write(self, record: Mapping[str, Any], histograms: Mapping[str, Any] | None = None) -> None:
    """Writes the numbers of a record, and histograms of arrays by flat name, of which empty ones are left out."""
    found = {}
    for name, x_X in (histograms or {}).items():
      x_X = np.array(x_X, float).ravel()  # a copy
      if len(x_X := x_X[np.isfinite(x_X)]):
        found[tag(name)] = x_X
    for thread in self._threads:
      thread.call('write', int(record['step']), scalars(record), found)

  def event(self, name: str, step: int | None = None, at: float | None = None) -> None:
    """Says that something begins or ends: 'start' of the process, 'ready' to train, 'step', 'evaluation',
    'evaluated', 'end'. at: unix time; None: now."""
    for thread in self._threads:
      thread.call('event', name, step, time.time() if at is None else at)

  def close(self) -> None:
    end = time.monotonic() + _CLOSE_S
    for thread in self._threads:
      thread.close(max(0.0, end - time.monotonic()))


def of_run(directory: str, first_step: int, record: knobs.Record, config: Mapping[str, Any]) -> Sinks:
  """TensorBoard, and the sinks that are asked for.

  Args:
    directory: where event files are written; the workdir.
    first_step: the step that the run goes on from.
    config: nested dicts of plain values, which Weights & Biases shows.
  """
  begin: dict[str, Callable[[], Sink]] = {'TensorBoard': lambda: TensorBoard(directory, first_step)}
  if record.wandb:
    begin['Weights & Biases'] = lambda: Wandb(directory, config)
  if record.goodput:
    begin["Google Cloud's goodput"] = lambda: Goodput(directory)
  return Sinks(begin)
