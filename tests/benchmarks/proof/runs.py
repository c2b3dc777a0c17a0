"""Runs of the plan, several at a time, each of which leaves one line in a record; what is recorded is not run again.

A worker is a process that is pinned to one core and makes run after run in itself, so that it imports and compiles
once: `python -m tests.benchmarks.proof.runs CORE FOLDER`. It is told what to run, and tells what came of it, by pickled
messages on its standard input and output. The parent alone writes the record. A warm start is made by the first run
that needs it, and copied for the others, which are not begun before.

A stop or a crash loses the runs in flight: they begin anew, as what a run repeats would count among its costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import pickle
import queue
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

import numpy as np

from kr_jax.record import lines as lines_lib
from tests.benchmarks.proof import plan

ROOT = pathlib.Path(__file__).parents[3]
RECORDED = ROOT / 'configs' / 'recorded' / 'proof'
AXES = ('rollouts', 'tokens', 'flops', 'device_s')  # of cost, in a line
STATUSES = ('solved', 'mixed', 'hard')
_SOLVED = 0.8
# What a step takes; evaluations, the warm start, compilation and checkpoints are not of the rule.
_OF_STEPS = ('allocate', 'reshard', 'sample', 'detokenise', 'verify', 'pack', 'score', 'update', 'record', 'wait')
_FIGURES = ('effective_gradient_ratio', 'expected_gradient_ratio', 'uniform_gradient_ratio', 'mixed_tasks',
            'expected_mixed_tasks', 'uniform_mixed_tasks', 'log_loss', 'constant_log_loss', 'count_log_loss',
            'constant_count_log_loss', 'rollouts', 'tokens_generated', 'budget_max')
_MOST_MEMORY = 4 << 30  # bytes of a worker; one that has taken more is replaced
_STOP_S = 30  # for a worker to end in order


# The record.


def path_of(folder: pathlib.Path, cell: str) -> pathlib.Path:
  return folder / f'{cell}.jsonl'


def _files(folder: pathlib.Path) -> dict[pathlib.Path, lines_lib.Lines]:
  return {path: lines_lib.read(str(path), lambda line: line.keys() >= set(plan.Run._fields))
          for path in sorted(folder.glob('*_*.jsonl'))}


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of all cells that are recorded in a folder, of each run the last."""
  return list({key(line): line for found in _files(folder).values() for line in found.records}.values())


def damaged(folder: pathlib.Path) -> dict[pathlib.Path, int]:
  """How many lines of files in a folder are no record or are cut; of files that have some."""
  count = {path: len(found.unread) + found.is_cut for path, found in _files(folder).items()}
  return {path: n for path, n in count.items() if n}


def key(line: Mapping[str, Any]) -> tuple[Any, ...]:
  """As of plan.Run."""
  return plan.Run(*(line[name] for name in plan.Run._fields)).key


def append(folder: pathlib.Path, line: Mapping[str, Any]) -> None:
  """Appends a line to the record of its cell; a line there that a crash cut short is ended first."""
  folder.mkdir(parents=True, exist_ok=True)
  with open(path_of(folder, f"{line['family']}_{line['batch']}"), 'ab+') as file:
    if file.tell():
      file.seek(-1, os.SEEK_END)
      if file.read() != b'\n':
        file.write(b'\n')
    file.write(json.dumps(line, allow_nan=False).encode() + b'\n')
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def alone(folder: pathlib.Path):
  """Raises ValueError where another comparison is at work in a folder."""
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / 'lock', 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise ValueError(f'--folder={folder} is that of a comparison that is at work; wait for its end, or name another '
                       'one') from None
    yield


# What a run leaves.


def measured(run: plan.Run, workdir: str, digest: str) -> dict[str, Any]:
  """The line of a run that is complete."""
  from kr_jax.report import panels
  from kr_jax.report import run as run_lib
  from kr_jax.report import summary
  found = run_lib.read(workdir)
  of_steps = [entry for entry in found.ledger.entries if entry['phase'] in _OF_STEPS]
  curves = panels.curves(dataclasses.replace(found, ledger=found.ledger._replace(entries=of_steps)))
  figures = summary.summarize(found.steps, found.evaluations, rule=found.rule, seed=found.seed, score=found.score)
  columns = {axis: [point[axis] for point in curves] for axis in (*AXES, 'success')}
  columns['device_s'] = [x and max(x - loading_s(of_steps), 0.0) for x in columns['device_s']]
  columns |= by_status([record['eval_tasks'] for record in found.evaluations])
  for name in found.evaluations[-1]:
    if name.startswith('eval/pass@') and name.removeprefix('eval/pass@').isdigit():
      columns[name.removeprefix('eval/')] = [record.get(name) for record in found.evaluations]
  attempt = found.ledger.attempts[-1]
  return rounded({
      **run._asdict(), 'digest': digest, 'tasks': plan.digest(found.config.get('task_digests')),
      'versions': attempt.get('versions', {}) | {'commit': attempt.get('commit')}, 'points': columns,
      **{name: figures.get(name) for name in _FIGURES}, 'nu': found.steps[-1].get('nu'),
      'forgotten': forgotten(found.evaluations[0]['eval_tasks'], found.evaluations[-1]['eval_tasks'])})


def loading_s(entries: Sequence[Mapping[str, Any]]) -> float:
  """Seconds that the first step took more than the median step, as a process loads each program once."""
  of_step: dict[int, float] = {}
  for entry in entries:
    of_step[entry['step']] = of_step.get(entry['step'], 0.0) + entry['device_s']
  return max(of_step[min(of_step)] - float(np.median(list(of_step.values()))), 0.0) if of_step else 0.0


def rounded(tree: Any) -> Any:
  """A tree of plain values whose floats have 5 digits; None for what is not finite."""
  if isinstance(tree, float):
    return plan.rounded(tree) if math.isfinite(tree) else None
  if isinstance(tree, Mapping):
    return {name: rounded(x) for name, x in tree.items()}
  return [rounded(x) for x in tree] if isinstance(tree, (list, tuple)) else tree


def statuses(counts: Mapping[str, Sequence[int]]) -> np.ndarray:
  """status_I, of STATUSES: the status of held-out tasks by their right and verified rollouts; '' without any."""
  right_I, verified_I = (np.asarray(counts[name]) for name in ('right', 'verified'))
  rate_I = right_I / np.maximum(verified_I, 1)
  return np.select([verified_I == 0, right_I == 0, rate_I >= _SOLVED], ['', 'hard', 'solved'], 'mixed')


def by_status(counts_E: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, list[float | None]]:
  """Success at each evaluation, of the tasks of each status at the first one; None where there is no such task."""
  status_I, found = statuses(counts_E[0]), {}
  for status in STATUSES:
    of_status = []
    for counts in counts_E:
      right_I, verified_I = (np.asarray(counts[name]) for name in ('right', 'verified'))
      is_in_I = (status_I == status) & (verified_I > 0)
      of_status.append(float(np.mean(right_I[is_in_I] / verified_I[is_in_I])) if is_in_I.any() else None)
    found[status] = of_status
  return found


def forgotten(first: Mapping[str, Sequence[int]], last: Mapping[str, Sequence[int]]) -> float | None:
  """The share of the solved tasks whose rate fell to half or less; None where none was solved."""
  rate = lambda counts: np.asarray(counts['right']) / np.maximum(counts['verified'], 1)
  is_solved_I = (statuses(first) == 'solved') & (np.asarray(last['verified']) > 0)
  return float(np.mean(rate(last)[is_solved_I] <= rate(first)[is_solved_I] / 2)) if is_solved_I.any() else None


# A worker.


def copied(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a folder, whole or not at all."""
  temporary = target.with_name(f'{target.name}.{os.getpid()}.tmp')
  shutil.copytree(source, temporary, dirs_exist_ok=True)
  os.replace(temporary, target)


def make(run: plan.Run, config: Any, workdir: pathlib.Path, warm: pathlib.Path | None,
         on_warm: Callable[[], None] = lambda: None) -> dict[str, Any] | None:
  """Makes a run from its beginning, and returns its line; None where it was told to stop.

  Args:
    warm: where the warm start is, or is put once it is made, which on_warm is told.
  """
  import kr_jax
  shutil.rmtree(workdir, ignore_errors=True)
  own = workdir / 'warm_start'
  is_made = warm is not None and warm.exists()
  if is_made:
    workdir.mkdir(parents=True, exist_ok=True)
    copied(warm, own)

  def on_step(_):
    nonlocal is_made
    if warm is not None and not is_made:
      warm.parent.mkdir(parents=True, exist_ok=True)
      copied(own, warm)
      is_made = True
      on_warm()

  done = kr_jax.run(config, str(workdir), on_step=on_step)
  return measured(run, str(workdir), plan.digest(config)) if done.is_complete else None


def serve(core: int, folder: pathlib.Path) -> int:
  """Makes the runs that standard input names, until it ends."""
  os.sched_setaffinity(0, [core])  # before jax counts its threads
  inbox, outbox = sys.stdin.buffer, os.fdopen(os.dup(1), 'wb')
  log = os.open(folder / f'worker_{core}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(log, 1)
  os.dup2(log, 2)

  def tell(**message):
    pickle.dump(message, outbox)
    outbox.flush()

  while True:
    try:
      order = pickle.load(inbox)
    except EOFError:
      return 0
    workdir = folder / 'runs' / order['name']
    try:
      line = make(plan.Run(*order['run']), order['config'], workdir, order['warm'], lambda: tell(warm=True))
    except Exception as error:
      traceback.print_exc()
      tell(error=f'{type(error).__name__}: {error}')
      continue
    if line is None:
      return 75
    if not order['keep']:
      shutil.rmtree(workdir, ignore_errors=True)
    leaves = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > _MOST_MEMORY
    tell(line=line, leaves=leaves)
    if leaves:
      return 0


class Worker:
  """A process of `serve`. Its messages come to an inbox as (worker, message); {'died': status} is the last."""

  def __init__(self, core: int, folder: pathlib.Path, inbox: queue.Queue):
    self.process = subprocess.Popen(
        [sys.executable, '-m', 'tests.benchmarks.proof.runs', str(core), str(folder)], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, start_new_session=True)  # Ctrl-C is the parent's
    self.core, self._inbox = core, inbox
    threading.Thread(target=self._listen, daemon=True).start()

  def _listen(self) -> None:
    while True:
      try:
        self._inbox.put((self, pickle.load(self.process.stdout)))
      except (EOFError, pickle.UnpicklingError):
        self._inbox.put((self, {'died': self.process.wait()}))
        return

  def begin(self, order: Mapping[str, Any]) -> None:
    try:
      pickle.dump(order, self.process.stdin)
      self.process.stdin.flush()
    except BrokenPipeError:
      pass  # its death is told

  def close(self) -> None:
    """Tells it to end, and the run that it is at."""
    with contextlib.suppress(OSError):
      self.process.stdin.close()
    self.process.send_signal(signal.SIGTERM)

  def wait(self) -> None:
    try:
      self.process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()


# The parent.


def orders(todo: Iterable[plan.Run], folder: pathlib.Path, keep: bool) -> dict[plan.Run, dict[str, Any]]:
  """What workers are told of each run."""
  found = {}
  for run in todo:
    c = plan.config(run)
    warm, of_config = plan.warm_start(run.family, c), plan.digest(c)
    found[run] = {'run': tuple(run), 'config': c, 'keep': keep, 'name': f'{run.cell}_{run.arm}_{run.seed}_{of_config}',
                  'warm': warm and folder / 'warm' / warm}
  return found


def carry_out(todo: Mapping[plan.Run, Mapping[str, Any]], start: Callable[[int, queue.Queue], Any], jobs: int,
              on_line: Callable[[dict[str, Any]], None], *, until: float = math.inf,
              say: Callable[[str], None] = print) -> list[tuple[plan.Run, str]]:
  """Makes runs, and returns those that failed, with the reason.

  Args:
    todo: the orders, in the order in which they are to be made.
    start: starts the worker of a number, which tells the queue.
    on_line: called with each line.
    until: as time.monotonic tells it; no run is begun after.
  """
  inbox, waiting, busy, failed = queue.Queue(), list(todo), {}, []
  last, began, done, told_s = {}, time.monotonic(), 0, []  # what each number made last
  made = {order['warm'] for order in todo.values() if order['warm'] is None or order['warm'].exists()}
  making, workers = set(), {}

  def next_run(number):
    free = [run for run in waiting if todo[run]['warm'] in made or todo[run]['warm'] not in making]
    group = lambda run: (run.cell, run.arm, run.multiple)
    of_others = {group(run) for run, *_ in busy.values()}
    return next((run for run in free if group(run) == last.get(number)), None) or next(
        (run for run in free if group(run) not in of_others), None) or (free[0] if free else None)

  def ended(number, worker, error=None):
    nonlocal done
    run, since = busy.pop(worker)
    done, last[number] = done + 1, (run.cell, run.arm, run.multiple)
    told_s.append(time.monotonic() - since)
    making.discard(todo[run]['warm'])
    if error is not None:
      failed.append((run, error))
    seconds = float(np.mean(told_s)) * len(waiting) / max(jobs, 1) + float(np.mean(told_s)) / 2 * bool(busy)
    say(f'{done} of {len(todo)}, {seconds / 60:.0f} minutes left: {run}'
        + (f' FAILED: {error}' if error is not None else ''))

  try:
    while True:
      for number in range(jobs):
        worker = workers.get(number)
        if worker in busy or not waiting or time.monotonic() >= until or (run := next_run(number)) is None:
          continue
        if worker is None:
          workers[number] = worker = start(number, inbox)
        waiting.remove(run)
        busy[worker] = run, time.monotonic()
        if todo[run]['warm'] not in made:
          making.add(todo[run]['warm'])
        worker.begin(todo[run])
      if not busy:
        break
      worker, message = inbox.get()
      number = next((n for n, x in workers.items() if x is worker), None)
      if message.get('warm'):
        made.add(todo[busy[worker][0]]['warm'])
      elif 'line' in message:
        on_line(message['line'])
        ended(number, worker)
        if message.get('leaves'):
          del workers[number]
      elif 'error' in message:
        ended(number, worker, message['error'])
      elif number is not None:
        del workers[number]
        if worker in busy:
          ended(number, worker, f"the worker ended with {message['died']}; its log says why")
    if waiting:
      say(f'{len(waiting)} of {len(todo)} runs are left for another time')
  finally:
    for worker in workers.values():
      worker.close()
    for worker in workers.values():
      worker.wait()
  say(f'{done} runs in {(time.monotonic() - began) / 60:.1f} minutes')
  return failed


if __name__ == '__main__':
  sys.exit(serve(int(sys.argv[1]), pathlib.Path(sys.argv[2])))
