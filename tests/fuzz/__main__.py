"""Fuzzing of what comes from outside: python -m tests.fuzz --cases=N --seed=S [--target=NAME ...]

A case is made by (seed, target, number) alone. It is read within SECONDS; anything but success or a ValueError that
names the file is a finding. Cases run in a child process, so that one that hangs or ends the process is a finding as
well: the child says which case it is at before it begins. The last line of the output is an object of JSON: cases and
findings of each target, and cases a second.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time

SECONDS = 30  # of a case
_MEMORY = 2 ** 33  # bytes of address space that cases may add
_LONGEST = 6000  # characters of an error


def run(name: str, seed: int, first: int, count: int, folder: pathlib.Path, found, progress=None) -> None:
  """Runs cases; found(case, what) is called for each finding."""
  from tests.fuzz import targets
  target = targets.TARGETS[name]
  for case in range(first, first + count):
    if progress:
      os.pwrite(progress, case.to_bytes(8, 'little'), 0)
      signal.alarm(SECONDS)
    try:
      target.run(random.Random(f'{seed}/{name}/{case}'), folder)
    except ValueError as error:
      text = str(error)
      if target.names not in text or not 10 < len(text) < _LONGEST:
        found(case, f'an error that says too little or too much: {text[:300]}')
    except Exception as error:  # whatever it is
      found(case, f'{type(error).__name__}: {str(error)[:300]}')
  if progress:
    signal.alarm(0)


def _child(name: str, seed: int, first: int, count: int, progress: str) -> None:
  from tests.fuzz import targets
  targets.quiet()
  with open('/proc/self/statm', encoding='ascii') as file:
    has = int(file.read().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (has + _MEMORY,) * 2)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  say = lambda case, what: print(json.dumps({'case': case, 'what': what}), flush=True)
  # In memory, where there is such a place: a disk waits for each file that is written anew.
  with tempfile.TemporaryDirectory(dir='/dev/shm' if os.access('/dev/shm', os.W_OK) else None) as folder:
    run(name, seed, first, count, pathlib.Path(folder), say, os.open(progress, os.O_RDWR))


def fuzz(name: str, seed: int, count: int) -> tuple[list[dict], float]:
  """The findings of a target, and its seconds."""
  findings, began, first = [], time.monotonic(), 0
  with tempfile.NamedTemporaryFile() as progress:
    while first < count:
      os.pwrite(progress.fileno(), first.to_bytes(8, 'little'), 0)
      command = [sys.executable, '-m', 'tests.fuzz', '--child', name, *map(str, (seed, first, count - first)),
                 progress.name]
      done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
      findings += [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b'{"case"')]
      if not done.returncode:
        break
      last = int.from_bytes(os.pread(progress.fileno(), 8, 0), 'little')
      how = signal.Signals(-done.returncode).name if done.returncode < 0 else f'exit {done.returncode}'
      said = done.stderr.decode(errors='replace')[-300:]
      findings.append({'case': last, 'what': f'the process ended: {how}: {said}'})
      first = last + 1
  return findings, time.monotonic() - began


def main() -> int:
  if sys.argv[1:2] == ['--child']:
    name, seed, first, count, progress = sys.argv[2:]
    _child(name, int(seed), int(first), int(count), progress)
    return 0
  from tests.fuzz import targets
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--cases', type=int, default=1000, help='of all targets together')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--target', action='append', choices=targets.TARGETS, help='these alone')
  asked = parser.parse_args()
  chosen = {name: target.share for name, target in targets.TARGETS.items() if not asked.target or name in asked.target}
  result, total = {}, 0
  for name, share in chosen.items():
    count = -(-asked.cases * share // sum(chosen.values()))
    findings, seconds = fuzz(name, asked.seed, count)
    for finding in findings[:20]:
      print(f'{name} case {finding["case"]}: {finding["what"]}', flush=True)
    result[name] = {'cases': count, 'findings': len(findings), 'per_second': round(count / seconds, 1)}
    print(name, json.dumps(result[name]), file=sys.stderr, flush=True)
    total += count
  print(json.dumps({'seed': asked.seed, 'cases': total, 'findings': sum(x['findings'] for x in result.values()),
                    'targets': result}))
  return int(any(x['findings'] for x in result.values()))


if __name__ == '__main__':
  sys.exit(main())
