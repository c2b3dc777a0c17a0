"""What the record costs: processor seconds of the ledger and of the rollouts that are kept, over those of a run's steps.

    .venv/bin/python -m tests.benchmarks.overhead [--config=configs/arithmetic.py] [--num_steps=30] [--json]

One run, in which each function of theirs is timed (time.thread_time, so that what others do on the machine does not
count; calls within calls count once). The steps' own time is wall time, so that a share is the most that it can be where
the machine is idle. Steps before the third compile, and are left out.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import statistics
import tempfile
import threading
import time

from kr_jax import phases
from kr_jax import prepare
from kr_jax import sample
from kr_jax import train
from kr_jax.costs import arithmetic
from kr_jax.costs import programs
from kr_jax.learning import update
from kr_jax.record import ledger
from kr_jax.record import rollouts
from tests.benchmarks import machine

# What is timed, by part.
TIMED = {
    'ledger': ((ledger.Writer, 'step'), (phases.Clock, 'enter'), (phases.Clock, 'leave'), (phases.Clock, 'count'),
               (phases.Clock, 'devices_work'), (phases.Clock, 'on_duration'), (phases.Clock, 'on_event'),
               (sample.Waves, 'counters'), (programs, 'begin'), (programs, 'executed'), (update, '_count_update'),
               (arithmetic, 'lengths')),
    'heartbeat': ((ledger.Writer, 'sample'), (ledger.Writer, 'snapshot')),  # in a thread of its own
    'rollouts': ((rollouts.Sampler, 'step'),),  # while the devices work on the update
}
_SKIPPED = 2  # steps


class Timer:
  """Seconds by part and step."""

  def __init__(self):
    self.seconds = collections.defaultdict(lambda: collections.defaultdict(float))
    self.step, self._inside = 0, threading.local()

  def wrap(self, owner, name: str, part: str) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def timed(*args, **kwargs):
      if getattr(self._inside, 'now', False):
        return function(*args, **kwargs)
      self._inside.now, began = True, time.thread_time()
      try:
        return function(*args, **kwargs)
      finally:
        self._inside.now = False
        self.seconds[part][self.step] += time.thread_time() - began

    setattr(owner, name, timed)


def measure(config, workdir: str) -> dict:
  """Shares of the time of the steps, each a median over steps and a share of the sum."""
  timer = Timer()
  for part, functions in TIMED.items():
    for owner, name in functions:
      timer.wrap(owner, name, part)
  write = ledger.Writer.step

  def step(self, number, *args, **kwargs):
    entries = write(self, number, *args, **kwargs)
    timer.step = number + 1
    return entries

  ledger.Writer.step = step
  train.train(prepare.prepare(config), workdir)
  of_step = collections.defaultdict(float)
  for entry in ledger.read(workdir).entries:
    if entry['phase'] not in ('evaluate', 'report', 'compile', 'checkpoint') and entry['step'] < config.num_steps:
      of_step[entry['step']] += entry['wall_s']
  steps = sorted(of_step)[_SKIPPED:]
  total = sum(of_step[s] for s in steps)
  share = lambda part: sum(timer.seconds[part][s] for s in steps) / total
  return {
      'config': config.tasks.dataset, 'steps': len(steps), 'step_s': statistics.median(of_step[s] for s in steps),
      **{f'{part}_share': share(part) for part in TIMED}, 'share': sum(map(share, TIMED)),
      'share_median': statistics.median(sum(timer.seconds[part][s] for part in TIMED) / of_step[s] for s in steps)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/arithmetic.py')
  parser.add_argument('--num_steps', type=int, default=30)
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  path, _, variant = args.config.partition(':')
  names = {}
  with open(path) as file:
    exec(compile(file.read(), path, 'exec'), names)
  config = names['get_config'](variant).unlock()
  config.num_steps, config.evaluate.every, config.evaluate.tasks = args.num_steps, 0, 16
  config.warm_start.num_steps = min(config.warm_start.num_steps, 60)
  with tempfile.TemporaryDirectory() as workdir:
    found = measure(config, os.path.join(workdir, 'run'))
  print(machine.describe())
  print(f'steps of {found["step_s"]:.2f} s: the ledger {found["ledger_share"]:.2%}, its heartbeat '
        f'{found["heartbeat_share"]:.2%}, the rollouts kept {found["rollouts_share"]:.2%}, together '
        f'{found["share"]:.2%} (median of steps {found["share_median"]:.2%})')
  if args.json:
    print(json.dumps(found))


if __name__ == '__main__':
  main()
