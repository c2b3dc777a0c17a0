#!/usr/bin/env python3
"""Runs a config once for each setting of its sweep(), and compares the runs.

    launch/sweep.py CONFIG [--workdir=DIR] [--jobs=N] [--list] [--config.SECTION.KNOB=VALUE ...] [-- OTHER FLAGS]
    launch/sweep.py CONFIG --tpu=ENVFILE [--workdir=gs://BUCKET/DIR] ...

CONFIG is a file or the name of a shipped config ('kr_jax:arithmetic'), with a variant or without. Its sweep() yields
the knobs of each run, {'alloc.rule': 'uniform', 'seed': 0}. Each run has a workdir of its own in DIR (runs/CONFIG_sweep
unless given), named by its knobs, and a log beside it. N of them run at a time; a GPU or a TPU serves one at a time.
OTHER FLAGS are of kr_jax.main.

The same command again skips what is finished and goes on with what is not. With --tpu each run is handed to
`launch/tpu.sh up --env=ENVFILE --keep --delete-after`, a slice for each. Ctrl-C has the runs finish their step and
save; a second one stops them at once. Runs on TPUs go on, unwatched: stop them by launch/tpu.sh.

Exit status: 0; 1 where a run failed, after all others have run; 2 for wrong flags; 75 after SIGTERM; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
try:
  from kr_jax import exits
  from kr_jax import files
  from kr_jax import knobs
  from kr_jax import shipped
except ImportError:  # this is not the Python of .venv
  has_tpu = os.path.exists('/dev/accel0') or os.path.exists('/dev/vfio/0')
  if sys.prefix == str(ROOT / '.venv'):
    raise
  subprocess.run([ROOT / 'launch' / 'environment.sh', *['tpu'] * has_tpu], check=True)
  python = str(ROOT / '.venv' / 'bin' / 'python')  # as argv[0], by which an interpreter finds its packages
  os.execv(python, [python, *sys.argv])

TRIES = 3  # of a run that says "start me again"
PROGRESS_S = 30.0  # from one line of a run to the next
_LONGEST = 40  # letters of a name: Google Cloud adds its own to it, and takes 63
_PROGRESS = re.compile(r': \d+ of \d+ \w+')


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """One setting."""

  name: str
  workdir: str
  state: str  # 'finished', 'unfinished', 'new'
  command: list[str]
  log: pathlib.Path


# What is to run.


def slug(text: str, longest: int = _LONGEST) -> str:
  """A name as Google Cloud takes it, and any file system: small letters, digits and '-'."""
  name = re.sub('[^a-z0-9]+', '-', text.lower()).strip('-')
  if len(name) > longest:
    name = f'{name[:longest - 7].strip("-")}-{hashlib.sha256(text.encode()).hexdigest()[:6]}'
  return name


def name_of(setting: dict[str, Any]) -> str:
  """A run's name: the last parts of its knobs, the whole where two are alike, each with its value."""
  last = [knob.rpartition('.')[2] for knob in setting]
  parts = [part if last.count(part) == 1 else knob for part, knob in zip(last, setting)]
  return '-'.join(f'{part}-{value}' for part, value in zip(parts, setting.values()))


def settings(config: str, given: Sequence[str]) -> list[tuple[str, dict[str, Any], int]]:
  """The name, the knobs and the steps of each run.

  Args:
    config: as --config takes it.
    given: flags --config.KNOB=VALUE, which hold for all runs.

  Raises:
    ValueError: there is no such config or no sweep() in it; or a knob is wrong, or set by a flag too.
  """
  path = shipped.located(config).partition(':')[0]
  shipped.config(config)  # refuses what is no config
  with shipped.importable(path):
    sweep = getattr(shipped.load(path), 'sweep', None)
    if sweep is None:
      raise ValueError(f'{path} has no sweep(); write one that yields the knobs of each run, as configs/arithmetic.py '
                       'does')
    found = [dict(setting) for setting in sweep()]
  if not found or not all(found):
    raise ValueError(f'sweep() of {path} yields {"no run" if not found else "a run without knobs"}; it must yield '
                     "the knobs of each, {'alloc.rule': 'uniform', 'seed': 0}")
  flags = {flag.removeprefix('--config.').partition('=')[0] for flag in given}
  if both := flags & {knob for setting in found for knob in setting}:
    raise ValueError(f'--config.{min(both)} is set for each run by sweep() of {path}; leave the flag out')
  runs = []
  for setting in found:
    c = shipped.config(config)
    if unknown := [knob for knob in setting if not _has(c, knob)]:
      raise ValueError(f'sweep() of {path}: there is no knob {unknown[0]!r}')
    c.update_from_flattened_dict(setting)
    if not given:  # else the program itself looks at all of them together
      knobs.read(c)
    steps = [flag.partition('=')[2] for flag in given if flag.startswith('--config.num_steps=')]
    runs.append((slug(name_of(setting)), setting, int((steps or [c.num_steps])[-1])))
  if repeated := [name for name, n in collections.Counter(name for name, *_ in runs).items() if n > 1]:
    raise ValueError(f'sweep() of {path} yields {repeated[0]} twice; let each run differ from the others')
  return runs


def _has(config: Any, knob: str) -> bool:
  """Whether a config has a knob, 'section.knob'."""
  for part in knob.split('.'):
    if not hasattr(config, 'keys') or part not in config:
      return False
    config = config[part]
  return True


def state_of(workdir: str, num_steps: int) -> str:
  """'finished' if a run of so many steps was completed there, 'unfinished' if one has begun, 'new'. Raises OSError."""
  try:
    config = json.loads(files.read(files.join(workdir, 'config.json')))
    *_, last = files.read(files.join(workdir, 'ledger.jsonl')).splitlines()
    is_done = json.loads(last).get('reason') == 'done' and config['num_steps'] >= num_steps
  except FileNotFoundError:
    return 'new'
  except (ValueError, KeyError, AttributeError):  # it was cut short
    is_done = False
  return 'finished' if is_done else 'unfinished'


def environment(path: str) -> dict[str, str]:
  """The settings of an environment file of launch/tpu.sh. Raises ValueError where there is none."""
  try:
    lines = pathlib.Path(path).read_text().splitlines()
  except OSError as error:
    raise ValueError(f'--tpu={path}: {error.strerror}') from error
  pairs = (line.strip().partition('=') for line in lines if not line.strip().startswith('#') and '=' in line)
  return {name.strip().lower(): value.strip().strip('"') for name, _, value in pairs}


def planned(config: str, workdir: str, tpu: str | None, given: Sequence[str], others: Sequence[str]) -> list[Run]:
  """The runs of a sweep, in its order.

  Raises ValueError as `settings` does, and OSError where a bucket cannot be read.
  """
  stem = slug(re.sub(r'\.py\b', '', os.path.basename(config.removeprefix(shipped.PREFIX))))
  about = environment(tpu) if tpu else {}
  base = about.get('name') or stem
  where = files.expanded(workdir or about.get('workdir') or (
      files.join(about['bucket'].rstrip('/'), f'{stem}_sweep') if about.get('bucket') else
      ROOT / 'runs' / f'{stem.replace("-", "_")}_sweep'))
  if tpu and not files.is_remote(where):
    raise ValueError(f'--workdir={where}: with --tpu the runs are in a bucket; give --workdir=gs://BUCKET/DIR, or '
                     f'bucket= in {tpu}')
  logs = ROOT / 'runs' / f'{stem.replace("-", "_")}_sweep' if files.is_remote(where) else pathlib.Path(where)
  runs = []
  for name, setting, num_steps in settings(config, given):
    at = files.join(where, name)
    flags = [*(f'--config.{knob}={value}' for knob, value in setting.items()), *given, *others]
    if tpu:
      command = [str(ROOT / 'launch' / 'tpu.sh'), 'up', f'--env={tpu}', f'--name={slug(f"{base}-{name}")}',
                 f'--config={config}', f'--workdir={at}', '--keep', '--delete-after', '--', *flags]
    else:
      command = [sys.executable, '-m', 'kr_jax.main', f'--config={config}', f'--workdir={at}', *flags]
    runs.append(Run(name, at, state_of(at, num_steps), command, logs / f'{name}.log'))
  return runs


# Running.


class Children:
  """Runs commands, so many at a time, each with a log; Ctrl-C and SIGTERM reach all of them.

  Args:
    jobs: how many at a time.
    of_group: whether a signal goes to all processes that a command started; else to the command alone.
  """

  def __init__(self, jobs: int, of_group: bool):
    self._jobs, self._of_group = jobs, of_group
    self._running: dict[Run, subprocess.Popen] = {}
    self._began: dict[Run, float] = {}
    self._tries = collections.Counter()
    self._said: dict[Run, str] = {}
    self.stopped_by = 0  # a signal

  def run(self, runs: Sequence[Run]) -> dict[Run, int]:
    """The exit status of each that was started."""
    waiting, codes, total = collections.deque(runs), {}, len(runs)
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {number: signal.signal(number, self._on_signal) for number in signals}
    said_at = time.monotonic()
    try:
      while self._running or waiting and not self.stopped_by:
        while waiting and len(self._running) < self._jobs and not self.stopped_by:
          self._start(waiting.popleft())
        for run, process in list(self._running.items()):
          if (code := process.poll()) is None:
            continue
          del self._running[run]
          if code == exits.AGAIN and not self.stopped_by and self._tries[run] < TRIES:
            print(f'{run.name}: left with {code}, and is started again', flush=True)
            waiting.appendleft(run)
            continue
          codes[run] = code
          self._say_end(run, code, len(codes), total)
        if time.monotonic() - said_at >= PROGRESS_S:
          said_at = time.monotonic()
          self._say_progress()
        time.sleep(0.2)
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)
    return codes

  def _start(self, run: Run) -> None:
    self._tries[run] += 1
    run.log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    with run.log.open('a') as log:
      log.write(f'$ {shlex.join(run.command)}\n')
      log.flush()
      # In a session of its own, so that Ctrl-C reaches it through us, once.
      self._running[run] = subprocess.Popen(run.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env=os.environ | {'PYTHONPATH': path}, start_new_session=True)
    self._began.setdefault(run, time.monotonic())
    verb = 'goes on' if run.state == 'unfinished' or self._tries[run] > 1 else 'begins'
    print(f'{run.name}: {verb}; see {run.log}', flush=True)

  def _on_signal(self, number: int, frame: Any) -> None:
    is_first, self.stopped_by = not self.stopped_by, self.stopped_by or number
    if is_first:
      what = ('runs on TPUs go on, and are watched no longer' if self._of_group else
              'runs finish their step and save; again stops them at once')
      os.write(2, f'\n{len(self._running)} {what}\n'.encode())
    for process in self._running.values():
      try:
        (os.killpg if self._of_group else os.kill)(process.pid, number)
      except ProcessLookupError:  # it has just ended
        pass

  def _say_end(self, run: Run, code: int, done: int, total: int) -> None:
    took = f'{(time.monotonic() - self._began[run]) / 60:.1f} min'
    if code == 0:
      print(f'{run.name}: finished in {took} ({done} of {total})', flush=True)
    else:
      reason = _reason(run.log)
      why = f': {reason}' if reason else ''
      print(f'{run.name}: left with {code} after {took} ({done} of {total}){why}; see {run.log}', flush=True)

  def _say_progress(self) -> None:
    for run in self._running:
      found = [line for line in _tail(run.log) if _PROGRESS.search(line)]
      if found and self._said.get(run) != found[-1]:
        self._said[run] = found[-1]
        print(f'{run.name}: {found[-1][:160]}', flush=True)


def _tail(log: pathlib.Path) -> list[str]:
  """The last lines of a log."""
  with log.open('rb') as file:
    file.seek(max(0, log.stat().st_size - 16384))
    return file.read().decode(errors='replace').splitlines()


def _reason(log: pathlib.Path) -> str:
  """Why a run failed, of its log: its last line that names an error, or its last line."""
  lines = [line for line in _tail(log) if line.strip() and not line.startswith('$ ')]
  errors = [line for line in lines if re.match(r'(\w+\.)*\w*(error|Error|Exception)\b.*:', line)]
  return (errors or lines or [''])[-1][:200]


def comparison(runs: Sequence[Run], workdir: str) -> list[str]:
  """The command that compares runs."""
  return [sys.executable, '-m', 'kr_jax.main', '--mode=report', *(f'--workdir={run.workdir}' for run in runs),
          f'--output={workdir}']


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                   usage=argparse.SUPPRESS, allow_abbrev=False)
  parser.add_argument('config')
  parser.add_argument('--workdir', default='')
  parser.add_argument('--jobs', type=int, default=1)
  parser.add_argument('--tpu', metavar='ENVFILE')
  parser.add_argument('--list', action='store_true', help='says what would run, and runs nothing')
  argv, others = (argv[:argv.index('--')], argv[argv.index('--') + 1:]) if '--' in argv else (argv, [])
  args, given = parser.parse_known_args(argv)
  for flag in given:
    if not re.match(r'--config\.[\w.]+=', flag):
      parser.error(f'{flag} is no flag of a sweep; knobs are --config.SECTION.KNOB=VALUE, and other flags of '
                   'kr_jax.main stand behind --')
  if args.jobs < 1:
    parser.error(f'--jobs={args.jobs} must be 1 or more')
  config = args.config
  if not os.path.isfile(config.partition(':')[0]) and (ROOT / config.partition(':')[0]).is_file():
    config = str(ROOT / config)  # as launch/local.sh finds it
  try:
    runs = planned(config, args.workdir, args.tpu, given, others)
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  if args.list:
    for run in runs:
      print(f'{run.name} ({run.state})\n  {shlex.join(run.command)}')
    return 0
  count = collections.Counter(run.state for run in runs)
  print(f'{len(runs)} runs: {count["finished"]} finished, {count["unfinished"]} to go on with, {count["new"]} new; '
        f'{args.jobs} at a time', flush=True)
  children = Children(args.jobs, of_group=bool(args.tpu))
  codes = children.run([run for run in runs if run.state != 'finished'])
  return _end(runs, codes, children.stopped_by, bool(args.tpu))


def _end(runs: Sequence[Run], codes: dict[Run, int], stopped_by: int, of_tpu: bool) -> int:
  """Compares what is finished, says what is not, and returns the exit status."""
  if stopped_by:
    again = ', and is what watches the slices; launch/tpu.sh stop --name=NAME, delete' if of_tpu else ''
    print(f'stopped; the same command again goes on{again}', file=sys.stderr)
    return exits.INTERRUPTED if stopped_by == signal.SIGINT else exits.AGAIN
  failed = [run for run, code in codes.items() if code]
  finished = [run for run in runs if run not in failed]
  if failed:
    print(f'{len(failed)} of {len(runs)} runs failed: {", ".join(run.name for run in failed)}', file=sys.stderr)
  code = 0
  if finished:
    command = comparison(finished, os.path.dirname(runs[0].workdir))
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    print(f'compared by: {shlex.join(command)}\nsee {files.join(os.path.dirname(runs[0].workdir), "report.html")}'
          if code == 0 else f'error: the comparison failed: {shlex.join(command)}', flush=True)
  return int(bool(failed or code))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
