"""The run of a soak: its starts, one after the other, and what becomes of each fault."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from tests.soak import faults
from tests.soak import watch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_LOOK_S = 0.25  # between two samples
_STUCK_S = 400.0  # without a step, after which a run is taken to hang
_MOST_EARLY_ENDS = 5  # in a row, without a step
_DISK_MB = 192
# A step is to be cheap: what is tested is what is around it.
KNOBS = {
    'policy.num_layers': 1, 'policy.width': 64, 'policy.head_width': 16, 'policy.hidden_width': 64, 'mesh.devices': 1,
    'tasks.per_step': 4, 'alloc.rollouts_per_step': 16, 'sample.slots': 16, 'warm_start.num_steps': 20,
    'warm_start.warmup_steps': 1, 'warm_start.per_step': 16, 'evaluate.every': 100, 'evaluate.tasks': 8,
    'evaluate.tasks_per_batch': 8, 'evaluate.rollouts': 2, 'checkpoint.every': 10, 'rewards.workers': 1,
    'rewards.timeout_s': 0.5, 'rewards.max_faulty_steps': 1000, 'record.page': False}


class Soak:
  """A run, its attempts and its faults.

  Attributes:
    early_s: after which the next start is told to stop; None: it is not.
    closes_stderr: whether the next start has no stderr.
  """

  def __init__(self, args: argparse.Namespace, folder: str):
    self.args, self.folder, self.random = args, folder, random.Random(f'how {args.seed}')
    self.workdir = os.path.join(folder, 'disk', 'run')
    for name in ('disk', 'faults', 'tmp', 'log'):
      os.makedirs(os.path.join(folder, name), exist_ok=True)
    os.chmod(folder, 0o755)  # workers are other users
    shutil.copy(os.path.join(ROOT, 'tests', 'soak', 'verifier.py'), folder)
    self.is_mounted = faults.mount(os.path.join(folder, 'disk'), _DISK_MB)
    self.plan = faults.plan(args.steps, args.every, args.seed, [
        name for name in args.only or faults.FAULTS if self.is_mounted or name not in faults.NEEDS_MOUNT])
    self.early_s, self.closes_stderr = None, False
    self.attempts, self.done, self.lost, self.notes = [], [], [], []
    self.kept: list[tuple[int, int, str]] = []  # (start, step, fault): a start that must go on behind a step, at least
    self.process, self.tail, self._ends_without_a_step = None, watch.Tail(self.workdir), 0
    self._seen: set[int] = set()  # processes
    self.cut: set[int] = set()  # steps whose lines a fault took away

  @property
  def pid(self) -> int:
    return self.process.pid

  def note(self, text: str) -> None:
    self.notes.append(text)

  def lose(self, text: str) -> None:
    self.lost.append(text)
    print(f'LOST {text}', flush=True)

  def command(self) -> list[str]:
    knobs = {**KNOBS, 'num_steps': self.args.steps, 'seed': self.args.seed,
             'rewards.verifier': f'{self.folder}/verifier.py:verify', 'rewards.readable': f"('{self.folder}/faults',)"}
    return [sys.executable, os.path.join(ROOT, 'tests', 'soak', 'program.py'), f'{self.folder}/clock',
            f'--config={self.args.config}', f'--workdir={self.workdir}',
            *(f'--config.{name}={x}' for name, x in knobs.items()), *self.args.knobs]

  def environment(self) -> dict[str, str]:
    path = os.pathsep.join([ROOT, *filter(None, [os.environ.get('PYTHONPATH')])])
    return os.environ | {'PYTHONPATH': path, 'TMPDIR': f'{self.folder}/tmp', 'JAX_PLATFORMS': 'cpu'}

  def checkpoints(self) -> list[int]:
    """The numbers of the checkpoints that are whole by their names."""
    with contextlib.suppress(OSError):
      return sorted(int(name) for name in os.listdir(f'{self.workdir}/checkpoints') if name.isdecimal())
    return []

  def close(self) -> None:
    """Ends what runs, and takes the small disk away; what is on it is copied where something was lost."""
    if self.process and self.process.poll() is None:
      self._seen.update([self.pid, *watch.below(self.pid)])
    for pid in self._seen:
      watch.send(pid)
    if self.is_mounted:
      if self.lost:
        shutil.copytree(self.workdir, f'{self.folder}/run', dirs_exist_ok=True, ignore_dangling_symlinks=True)
      faults.unmount(f'{self.folder}/disk')

  # One start after the other.

  def run(self) -> None:
    while self.attempt():
      if self._ends_without_a_step >= _MOST_EARLY_ENDS:
        self.lose(f'{_MOST_EARLY_ENDS} starts in a row made no step; the last says: {self.last_words()}')
        return

  def attempt(self) -> int:
    """One start of the run, to its end: its exit status."""
    number, closes = len(self.attempts), self.closes_stderr
    self.closes_stderr = False
    with open(f'{self.folder}/log/{number}.txt', 'wb') as log:
      self.process = subprocess.Popen(
          self.command(), env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
          start_new_session=True, preexec_fn=(lambda: os.close(2)) if closes else None)
    samples, fault, began, progressed = [], None, time.monotonic(), time.monotonic()
    early_s, self.early_s = self.early_s, None
    while self.process.poll() is None:
      if (found := watch.sample(self.pid, self.tail)) is not None:
        if samples and found.step != samples[-1].step:
          progressed = time.monotonic()
        samples.append(found)
      if early_s is not None and time.monotonic() - began > early_s:
        fault, early_s = self.inject('SIGTERM', is_early=True), None
        continue
      if time.monotonic() - progressed > _STUCK_S:
        self.lose(f'attempt {number} made no step for {_STUCK_S:.0f} s after step {self.tail.step}')
        watch.send(self.pid)
      if self.plan and samples[-1:] and samples[-1].step >= self.plan[0][0] and self.has_begun(samples):
        fault = self.inject(self.plan.pop(0)[1]) or fault
        progressed = time.monotonic()
      time.sleep(_LOOK_S)
    code = self.process.wait()
    self.end(number, code, fault, samples)
    return code

  def has_begun(self, samples: list[watch.Sample]) -> bool:
    """Whether this attempt has made a step: what stands in the record may be of the one before."""
    return len({x.step for x in samples}) > 1

  def end(self, number: int, code: int, fault: str | None, samples: list[watch.Sample]) -> None:
    """Judges the end of an attempt."""
    self.tail.look()
    has_moved = self.has_begun(samples)
    self._ends_without_a_step = 0 if has_moved or code == 0 or fault else self._ends_without_a_step + 1
    if code and not fault:
      self.lose(f'attempt {number} ended with {code} after step {self.tail.step}, and no fault was there: '
                f'{self.last_words()}')
    if not watch.gone([*self._seen], 3.0):
      self.lose(f'processes of attempt {number} live after its end: {watch.living([*self._seen])}')
      for pid in watch.living([*self._seen]):
        watch.send(pid)
    self._seen.clear()
    self.attempts.append({
        'attempt': number, 'code': code, 'fault': fault, 'last_step': self.tail.step, 'samples': len(samples),
        'growth': watch.growth([x for x in samples if has_moved and x.step != samples[0].step]),
        'ledger': len(self.ledger()[0])})
    print(f'attempt {number}: exit {code} after step {self.tail.step} of {self.args.steps}'
          f'{f" ({fault})" if fault else ""}', flush=True)

  def last_words(self) -> str:
    number = len(self.attempts) if self.process.poll() is None else len(os.listdir(f'{self.folder}/log')) - 1
    with contextlib.suppress(OSError), open(f'{self.folder}/log/{number}.txt', 'rb') as file:
      return ' | '.join(file.read().decode(errors='replace').strip().splitlines()[-3:])[-400:]
    return ''

  # Faults.

  def inject(self, name: str, is_early: bool = False) -> str | None:
    """Does a fault, and judges what comes of it. Returns its name where it ended the run."""
    fault, step, self.notes = faults.FAULTS[name], self.tail.look(), []
    time.sleep(self.random.uniform(0.0, 0.5))
    self._seen.update(watch.below(self.pid))
    checkpoints, began = self.checkpoints(), time.monotonic()
    wrong = fault.do(self)
    codes = (*fault.codes, -signal.SIGTERM) if is_early else fault.codes  # before anything is loaded
    if fault.codes:
      wrong = wrong or self.ends(codes, fault.seconds * self.args.slack)
      took = time.monotonic() - began
      if not wrong:
        newest = self.tail.look()
        kept = {'step': newest, 'checkpoint': (checkpoints or [0])[-1] - 1,
                'one before': ([0, 0] + checkpoints)[-2] - 1}[fault.keeps if not is_early else 'checkpoint']
        wrong = fault.then(self)
        self.kept.append((len(self.attempts) + 1, kept, name))
    else:
      wrong = wrong or self.goes_on(fault.seconds * self.args.slack)
      took = time.monotonic() - began
    self.done.append({'fault': name + ' in the start' * is_early, 'step': step, 'wrong': wrong,
                      'took_s': round(took, 1), 'notes': self.notes})
    print(f'step {step}: {self.done[-1]["fault"]}: {wrong or "as it must"} ({took:.1f} s) {"; ".join(self.notes)}',
          flush=True)
    if wrong:
      self.lose(f'{name} at step {step}: {wrong}')
    return name if fault.codes else None

  def ends(self, codes: tuple[int, ...], seconds: float) -> str | None:
    """What is wrong with the end of the run."""
    try:
      code = self.process.wait(seconds)
    except subprocess.TimeoutExpired:
      watch.send(self.pid)
      return f'it did not end in {seconds:.0f} s'
    return None if code in codes else f'it ended with {code}, not {" or ".join(map(str, codes))}: {self.last_words()}'

  def goes_on(self, seconds: float) -> str | None:
    """What is wrong, where no two steps come."""
    before = self.tail.look()
    for _ in watch.every(0.1, seconds):
      if self.process.poll() is not None and self.process.returncode:
        return f'it ended with {self.process.returncode}: {self.last_words()}'
      if self.process.poll() is not None or self.tail.look() >= min(before + 2, self.args.steps - 1):
        return None
    return f'no step in {seconds:.0f} s'

  # What is left at the end.

  def ledger(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first lines of the attempts in the ledger, and the lines of phases."""
    found = []
    with contextlib.suppress(OSError), open(f'{self.workdir}/ledger.jsonl', 'rb') as file:
      for line in file.read().split(b'\n'):
        with contextlib.suppress(ValueError):
          found.append(json.loads(line))
    return [x for x in found if 'started' in x], [x for x in found if 'phase' in x]

  def account(self) -> dict[str, Any]:
    """What is there of each step, and where each start went on."""
    found, (attempts, entries) = watch.steps(self.workdir), self.ledger()
    missing = sorted({*range(self.args.steps)} - {*found})
    if found != sorted({*found}) or not {*missing} <= self.cut or found[-1:] != [self.args.steps - 1]:
      self.lose(f'metrics.jsonl has {len(found)} lines of steps; missing: {missing[:20]}; more than once or out of '
                f'order: {[b for a, b in zip(found, found[1:]) if b <= a][:20]}')
    updated: dict[int, set[int]] = {}
    for entry in entries:
      if entry['phase'] == 'update':
        updated.setdefault(entry['attempt'], set()).add(entry['step'])
    without = sorted({*range(self.args.steps)} - set().union(*updated.values()))
    if without and not any(x['fault'] == 'a full disk' for x in self.done):  # on which no line of it can be written
      self.lose(f'the ledger has no update of the steps {without[:20]}')
    numbers = [x['attempt'] for x in attempts]
    if numbers != sorted({*numbers}):
      self.lose(f'the attempts of the ledger are {numbers}')
    for start, kept, fault in self.kept:
      first = self.first_step(start, updated)
      if first is not None and first <= kept:
        self.lose(f'after {fault} start {start} went on at step {first}, and step {kept} was saved')
    if left := [name for name in os.listdir(f'{self.folder}/tmp') if name.startswith('kr_jax-')]:
      self.lose(f'folders are left in TMPDIR: {left}')
    return {'steps': len(found), 'lines_that_a_fault_took': missing, 'starts': len(self.attempts),
            'attempts_in_ledger': len(numbers), 'updates': sum(map(len, updated.values())),
            'steps_without_update_in_ledger': without}

  def first_step(self, start: int, updated: dict[int, set[int]]) -> int | None:
    """The first step of a start, or of the first one after it that made one; None: none did, or nothing tells."""
    for attempt in self.attempts[start:]:
      before = self.attempts[attempt['attempt'] - 1]['ledger'] if attempt['attempt'] else 0
      if attempt['ledger'] > before and (steps := updated.get(self.ledger()[0][attempt['ledger'] - 1]['attempt'])):
        return min(steps)
    return None
