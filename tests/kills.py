"""Ends runs of the command line at chosen moments, starts them again, and compares them with a run that was left alone.

    python -m tests.kills --kills=30                # SIGKILL, of which each needed phase has its share
    python -m tests.kills --kills=10 --processes=2
    python -m tests.kills --stops [--processes=2]   # SIGTERM and SIGINT, once, twice and to the group, in each phase

A run ends itself, so that it does so where it is meant to: a thread sends the signal some milliseconds after a phase
(kr_jax/phases.py) was entered for the nth time. Moments come from a seed.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterator, Sequence
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
# Of a line of metrics, what differs from run to run.
TIMES = ('wall_s', 'step_s', 'compile_count', 'tokens_per_s')
# Phases, and of how many of 30 kills each has to be the moment.
SHARES = {'checkpoint': 8, 'verify': 4, 'warm_start': 4, 'evaluate': 4, 'sample': 3, 'update': 3, 'restore': 1,
          'record': 1, 'allocate': 1, 'data': 1}
STOPPED_IN = ('data', 'restore', 'warm_start', 'evaluate', 'allocate', 'sample', 'verify', 'update', 'checkpoint',
              'report')
RUNS_S = 1800.0  # for a start to end: the machine may be busy
KNOBS = {'num_steps': 8, 'checkpoint.every': 1, 'checkpoint.keep': 2, 'evaluate.every': 2, 'warm_start.num_steps': 4,
         'warm_start.checkpoint_every': 2, 'policy.num_layers': 1, 'rewards.workers': 1, 'tasks.per_step': 4,
         'alloc.rollouts_per_step': 16, 'evaluate.tasks': 4, 'evaluate.tasks_per_batch': 2, 'record.page': False,
         'tasks.warm_start_split': 'warm_start[:256]'}
# The command line, which sends itself what the plan says.
CHILD = '''
import json, os, runpy, signal, sys, threading, time
from kr_jax import stopping
stopping.hear(may_end=True)
from kr_jax import phases, processes
plan = json.loads(os.environ['KILLS_PLAN'])
processes.SILENCE_S = 8
entries, enter = [], phases.Clock.enter

def send():
  print('KILLS now', flush=True)
  with open(plan['mark'], 'w') as file:
    file.write(repr(time.time()))
  for number, to_group, after_s in plan['signals']:
    time.sleep(after_s)
    (os.killpg if to_group else os.kill)(os.getpgid(0) if to_group else os.getpid(), number)

def entered(self, name, whole=False):
  enter(self, name, whole)
  if self.phase == plan['phase'] and threading.get_ident() == self._thread:
    entries.append(name)
    if len(entries) == plan['entry']:
      threading.Thread(target=send, daemon=True).start()

if plan['signals']:
  phases.Clock.enter = entered
runpy.run_module('kr_jax.main', run_name='__main__', alter_sys=True)
'''


class Moment(NamedTuple):
  """When a signal is sent, and which."""

  phase: str
  entry: int = 1  # how often the phase was entered, this time included
  signals: tuple[tuple[int, bool, float], ...] = ()  # number, whether to the group, after so many seconds
  process: int = 0  # the one that is told

  def __str__(self):
    sent = ', '.join(f'{signal.Signals(number).name}{" to the group" * group}' for number, group, _ in self.signals)
    return f'{sent} in {self.phase} {self.entry} of process {self.process}'


class Ended(NamedTuple):
  """What came of a start."""

  codes: list[int]
  took_s: float | None  # from the first signal to the end of all processes; None: none was sent
  output: list[str]


class Runs:
  """Starts of one command in several workdirs.

  Args:
    folder: in which they are.
    count: processes of a run, each of one device.
  """

  def __init__(self, folder: pathlib.Path, count: int = 1, data_dir: str = '', **knobs: Any):
    self._folder, self.count = folder, count
    self._knobs = KNOBS | {'tasks.data_dir': data_dir or str(folder / 'data')} | (
        {'mesh.devices': 1} if count == 1 else {'mesh.fsdp': count}) | knobs
    self._starts = 0

  def workdir(self, name: str) -> pathlib.Path:
    return self._folder / name

  def new(self, name: str) -> str:
    """A name of which there is no run."""
    shutil.rmtree(self.workdir(name), ignore_errors=True)
    return name

  def start(self, name: str, moment: Moment | None = None, **knobs: Any) -> Ended:
    """Starts a run, or goes on with it, and waits for its end."""
    self._starts += 1
    mark = self._folder / f'mark.{self._starts}'
    mark.unlink(missing_ok=True)
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    found, outputs = [], [self._folder / f'{name}.{self._starts}.{i}.txt' for i in range(self.count)]
    for i, output in enumerate(outputs):
      plan = moment._asdict() if moment and moment.process == i else {'signals': ()}
      flags = [f'--config.{knob}={x}' for knob, x in (self._knobs | knobs).items()]
      if self.count > 1:
        flags += [f'--coordinator=localhost:{port}', f'--processes={self.count}', f'--process={i}']
      env = os.environ | {
          'KILLS_PLAN': json.dumps(plan | {'mark': str(mark)}), 'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1',
          # As conftest.py, so that the programs are compiled once.
          'XLA_FLAGS': '--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0',
          'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.pytest_cache' / 'xla'),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
          'PYTHONPATH': str(ROOT)}
      with open(output, 'w') as file:
        found.append(subprocess.Popen(
            [sys.executable, '-c', CHILD, '--config=configs/arithmetic.py:debug', f'--workdir={self.workdir(name)}',
             *flags], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT,
            process_group=found[0].pid if found else 0))
    try:
      codes = [process.wait(timeout=RUNS_S) for process in found]
    finally:
      for process in found:
        if process.poll() is None:
          process.kill()
    now = time.time()
    took_s = now - float(mark.read_text()) if mark.exists() and mark.read_text() else None
    return Ended(codes, took_s, [output.read_text(errors='replace') for output in outputs])


def metrics_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl, and of the warm start's, without times."""
  found = []
  for path in (workdir / 'warm_start' / 'metrics.jsonl', workdir / 'metrics.jsonl'):
    for line in path.read_text().splitlines():
      found.append({name: x for name, x in json.loads(line).items() if name not in TIMES})
  return found


def arrays_of(workdir: pathlib.Path) -> dict[str, Any]:
  """State and statistics of the newest checkpoint, by path."""
  from absl import logging
  import jax
  import numpy as np
  import orbax.checkpoint as ocp
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # Orbax warns of files that there never were
  step = max((int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()))
  found = {}
  for item in ('state', 'stats'):
    path = workdir / 'checkpoints' / str(step) / item
    with ocp.PyTreeCheckpointer() as reader:
      tree = reader.metadata(path).item_metadata.tree
      restored = reader.restore(path, restore_args=jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree))
    for where, x in jax.tree_util.tree_leaves_with_path(restored):
      found[f'{step}/{item}{jax.tree_util.keystr(where)}'] = np.asarray(x)
  logging.set_verbosity(before)
  return found


def differences(workdir: pathlib.Path, reference: pathlib.Path) -> list[str]:
  """What differs of two runs that are complete, bit for bit; []: nothing."""
  import numpy as np
  found, (mine, other) = [], (metrics_of(workdir), metrics_of(reference))
  if len(mine) != len(other):
    found.append(f'{len(mine)} lines of metrics, not {len(other)}')
  for a, b in zip(mine, other):
    found += [f'line of step {a.get("step")}: {name} is {a.get(name)}, not {b.get(name)}'
              for name in a.keys() | b.keys()
              if a.get(name) != b.get(name) and not (a.get(name) != a.get(name) and b.get(name) != b.get(name))]
  mine, other = arrays_of(workdir), arrays_of(reference)
  found += [f'{name} is there once' for name in mine.keys() ^ other.keys()]
  found += [f'{name} differs' for name in mine.keys() & other.keys()
            if mine[name].dtype != other[name].dtype or mine[name].tobytes() != other[name].tobytes()]
  return found


def kills(runs: Runs, number: int, seed: int, phases: Sequence[str] = ()) -> Iterator[tuple[Moment, list[str]]]:
  """Kills runs at so many moments, each followed by a start; yields each moment, and what went wrong.

  A run is killed several times, and once it is complete compared with one that was not.
  """
  rng = random.Random(seed)
  left = [phase for phase in phases or SHARES for _ in range(max(1, round(SHARES[phase] * number / 30)))]
  rng.shuffle(left)
  left = (left * number)[:number]
  reference = runs.start(runs.new('whole'))
  assert reference.codes == [0] * runs.count, reference.output
  for part in range(2 * number):
    name, killed = runs.new(f'killed{part}'), []
    for _ in range(2):
      if not left or left[-1] == 'warm_start' and killed:  # which is over
        break
      moment = _drawn(rng, left[-1], runs.count)
      ended = runs.start(name, moment)
      if not any(ended.codes):
        break  # it was over before
      is_killed = 0 not in ended.codes and ended.codes[moment.process] == -signal.SIGKILL
      wrong = [] if is_killed else [f'exit statuses {ended.codes}: {ended.output[0][-600:]}']
      killed.append((moment, wrong))
      left.pop()
    last = runs.start(name)
    wrong = differences(runs.workdir(name), runs.workdir('whole')) if last.codes == [0] * runs.count else [
        f'the start after it ended with {last.codes}: {last.output[0][-600:]}']
    for moment, found in killed:
      yield moment, found + wrong
    if not wrong:
      shutil.rmtree(runs.workdir(name))
    if not left:
      return


def _drawn(rng: random.Random, phase: str, count: int) -> Moment:
  """A moment in a phase. Most phases take milliseconds, and are entered once a step or more often."""
  most, after_s = {'warm_start': (5, 0.2), 'restore': (1, 1.5), 'data': (1, 0.5), 'evaluate': (10, 0.05),
                   'checkpoint': (4, 0.25)}.get(phase, (3, 0.03))
  return Moment(phase, rng.randint(1, most), ((signal.SIGKILL, False, rng.uniform(0, after_s)),),
                process=rng.randrange(count))


def stops(runs: Runs, phases: Sequence[str] = STOPPED_IN, kinds: Sequence[str] = ('TERM', 'INT', 'INT2', 'GROUP')
          ) -> Iterator[tuple[Moment, Ended, list[str]]]:
  """Tells runs to stop in each phase, goes on with them, and compares; yields moment, end and what was wrong."""
  reference = runs.start(runs.new('whole'))
  assert reference.codes == [0] * runs.count, reference.output
  sent = {'TERM': ((signal.SIGTERM, False, 0.0),), 'INT': ((signal.SIGINT, False, 0.0),),
          'INT2': ((signal.SIGINT, False, 0.0), (signal.SIGINT, False, 0.02)), 'GROUP': ((signal.SIGTERM, True, 0.0),),
          'TERM2': ((signal.SIGTERM, False, 0.0), (signal.SIGTERM, False, 0.02))}
  for phase in phases:
    for kind in kinds:
      entry = 1 if phase in ('warm_start', 'restore', 'data', 'report') else 2
      process = 0 if phase == 'report' else len(phase + kind) % runs.count  # the first alone draws the page
      moment = Moment(phase, entry, sent[kind], process=process)
      name = runs.new(f'{phase}-{kind}')
      ended = runs.start(name, moment, **{'record.page': phase == 'report'})
      told = 130 if kind.startswith('INT') else 75
      wrong = []
      if ended.took_s is None:
        wrong.append('the moment did not come')
      # A run that is complete but for its last page may end as it would.
      allowed = {told} | ({0} if phase == 'report' else set())
      for i, code in enumerate(ended.codes):
        # Where process 0 is gone at once, so is jax's service, without which the others abort.
        others = {75, -signal.SIGABRT} if kind == 'INT2' else {75}
        if code not in allowed | (others if i != moment.process else set()):
          wrong.append(f'exit statuses {ended.codes}: {ended.output[i][-600:]}')
        if 'Traceback' in ended.output[i] and not (kind == 'INT2' and i != moment.process):
          wrong.append(f'a traceback: {ended.output[i][-600:]}')
      again = runs.start(name)
      wrong += differences(runs.workdir(name), runs.workdir('whole')) if again.codes == [0] * runs.count else [
          f'the start after it ended with {again.codes}: {again.output[0][-600:]}']
      yield moment, ended, wrong
      if not wrong:
        shutil.rmtree(runs.workdir(name))


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--kills', type=int, default=0)
  parser.add_argument('--stops', action='store_true')
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--phases', nargs='*', default=())
  parser.add_argument('--kinds', nargs='*', default=('TERM', 'INT', 'INT2', 'GROUP'))
  parser.add_argument('--data_dir', default='')
  parser.add_argument('--keep', default='', help='folder of the runs, which stays')
  args = parser.parse_args()
  with contextlib.nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
    runs = Runs(pathlib.Path(folder), args.processes, args.data_dir)
    bad, counts, slowest = 0, collections.Counter(), 0.0
    if args.kills:
      for moment, wrong in kills(runs, args.kills, args.seed, args.phases):
        counts[moment.phase] += 1
        bad += bool(wrong)
        print(moment, '; '.join(wrong) or 'nothing lost', flush=True)
    if args.stops:
      for moment, ended, wrong in stops(runs, args.phases or STOPPED_IN, args.kinds):
        counts[moment.phase] += 1
        slowest = max(slowest, ended.took_s or 0.0)
        bad += bool(wrong)
        print(f'{moment}: {ended.codes} after {ended.took_s or -1:.1f} s,', '; '.join(wrong) or 'nothing lost',
              flush=True)
    print(json.dumps({'moments': dict(counts), 'bad': bad, 'slowest_s': round(slowest, 1)}))
  return int(bad > 0)


if __name__ == '__main__':
  sys.exit(main())
