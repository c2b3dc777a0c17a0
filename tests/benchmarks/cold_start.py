"""What a start compiles, and how long it takes to its first step: with an empty cache, again, and where a run goes on.

    .venv/bin/python -m tests.benchmarks.cold_start [--config=configs/arithmetic.py:debug] [--devices=1] [--processes=1]
        [--json] [-- --config.grpo.kl_coef=0.1 ...]

Each start is of fresh processes, with a cache of compiled programs in a new directory: `cold` finds it empty; `warm`
is the same run in another workdir; `resumed` goes on with the first run after its newest checkpoint is taken away, as
after a kill. The figures are of the ledger: programs that XLA was asked for, those that the cache had, seconds of
tracing and compiling, and seconds from the start of the process to the end of its first step, evaluation and warm start
included. Of several processes they are the first's; `others_compiled` counts what the others compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile

from kr_jax.record import ledger
from tests.benchmarks import machine

ROOT = pathlib.Path(__file__).parents[2]


def start(config: str, workdir: pathlib.Path, cache: pathlib.Path, *, devices: int = 1, processes: int = 1,
          flags: tuple[str, ...] = (), xla_flags: str = '') -> dict[str, float | int | list[str]]:
  """Trains in fresh processes, and returns the figures of this start.

  Args:
    cache: $KR_JAX_CACHE.
    devices: virtual ones, of each process.
    flags: others of kr_jax.main.
    xla_flags: others in XLA_FLAGS.
  """
  environment = {name: x for name, x in os.environ.items() if not name.startswith(('JAX_', 'XLA_'))} | {
      'JAX_PLATFORMS': 'cpu', 'KR_JAX_CACHE': str(cache), 'PYTHONPATH': str(ROOT), 'JAX_EXPLAIN_CACHE_MISSES': 'true',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} {xla_flags}'}
  command = [sys.executable, '-m', 'kr_jax.main', f'--config={config}', f'--workdir={workdir}', *flags]
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  joined = lambda i: [f'--coordinator=localhost:{port}', f'--processes={processes}', f'--process={i}'] * (processes > 1)
  logs = [workdir.parent / f'{workdir.name}.{i}.log' for i in range(processes)]
  with contextlib.ExitStack() as files:
    outputs = [files.enter_context(log.open('w')) for log in logs]
    running = [subprocess.Popen(command + joined(i), cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
               for i, output in enumerate(outputs)]
    codes = [process.wait() for process in running]
  if any(codes):
    raise RuntimeError('\n'.join(log.read_text()[-3000:] for log in logs))
  entries = ledger.read(str(workdir)).entries
  ours = [entry for entry in entries if entry['attempt'] == entries[-1]['attempt']]
  total = lambda name: sum(entry.get(name, 0) for entry in ours if entry['phase'] == 'compile')
  # JAX says what it compiles anew, also in processes that have no ledger.
  missed = [set(re.findall(r"PERSISTENT COMPILATION CACHE MISS for '([^']+)'", log.read_text())) for log in logs]
  return {'asked': total('compiles'), 'cached': total('compiles_cached'), 'compile_s': total('wall_s'),
          'first_step_s': sum(entry['wall_s'] for entry in ours if entry['step'] == ours[0]['step']),
          'others_compiled': sum(map(len, missed[1:])), 'missed': sorted(missed[0])}


def measure(config: str, directory: pathlib.Path, **how) -> dict[str, dict[str, float | int | list[str]]]:
  """The figures of a start with an empty cache (`cold`), in another workdir (`warm`), and of a run that goes on
  (`resumed`), where it left two checkpoints. how: as of `start`."""
  go = lambda name: start(config, directory / name, directory / 'cache', **how)
  found = {'cold': go('first'), 'warm': go('second')}
  checkpoints = directory / 'first' / 'checkpoints'
  *before, newest = sorted((int(path.name), path) for path in checkpoints.iterdir() if path.name.isdigit())
  if before:
    shutil.rmtree(newest[1])
    found['resumed'] = go('first')
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/arithmetic.py:debug')
  parser.add_argument('--devices', type=int, default=1)
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--json', action='store_true')
  parser.add_argument('flags', nargs='*', help='of kr_jax.main, after --')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as directory:
    found = measure(args.config, pathlib.Path(directory), devices=args.devices, processes=args.processes,
                    flags=tuple(args.flags))
  print(machine.describe(), f'load {os.getloadavg()[0]:.1f}')
  for name, x in found.items():
    others = f'; the other processes compiled {x["others_compiled"]}' if args.processes > 1 else ''
    print(f'{name:<8}{x["asked"]} programs, of which the cache had {x["cached"]}; {x["compile_s"]:.1f} s of tracing '
          f'and compiling; first step after {x["first_step_s"]:.1f} s{others}')
    if name != 'cold' and x['missed']:
      print(f'        compiled: {", ".join(x["missed"])}')
  if args.json:
    print(json.dumps(found))


if __name__ == '__main__':
  main()
