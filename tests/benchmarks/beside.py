"""The run beside which runs of a config are shown (record.beside): trains it with uniform budgets, and records it.

    .venv/bin/python -m tests.benchmarks.beside [--config=configs/ciphers.py] [--workdir=runs/beside]
        [--output=configs/recorded/ciphers_uniform.json]

A run that is finished in the workdir is recorded as it is. The file has knobs, versions and evaluations, and of each
step its mixed tasks and the share of its rollouts in mixed groups (kr_jax/record/beside.py).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from kr_jax.record import beside
from kr_jax.report import panels
from kr_jax.report import run as run_lib

ROOT = pathlib.Path(__file__).parents[2]
KNOBS = {'alloc.rule': 'uniform', 'record.beside': ''}
STEPS = {'mixed_tasks': 0, 'effective_gradient_ratio': 2}  # figures of steps, and how many digits behind the point


def text(run: run_lib.Run, name: str, command: str) -> str:
  """The file of a run. Raises ValueError for a run that is not complete."""
  end = run.knob('num_steps')
  if not run.evaluations or run.evaluations[-1]['step'] != end or len(run.steps) != end:
    raise ValueError(f'the run in {run.workdir} has {len(run.steps)} of {end} steps; let it end first')
  # Success as it is: rounded up, a run that gets as far would be short of it.
  rounded = lambda row: {name: round(row[name], 4) for name in ('low', 'high') if row[name] is not None}
  evaluations = [row | rounded(row) for row in panels.curves(run)]
  steps = {figure: [round(record[figure], digits or None) for record in run.steps] for figure, digits in STEPS.items()}
  versions = run.ledger.attempts[-1].get('versions', {}) if run.ledger.attempts else {}
  return beside.as_text(name, command, run.config, versions, evaluations, steps)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/ciphers.py')
  parser.add_argument('--workdir', default='runs/beside')
  parser.add_argument('--output', default='configs/recorded/ciphers_uniform.json')
  args: Any = parser.parse_args(argv)
  if not os.path.exists(os.path.join(args.workdir, 'summary.json')):
    subprocess.run(
        [sys.executable, '-m', 'kr_jax.main', f'--config={args.config}', f'--workdir={args.workdir}',
         *(f'--config.{name}={x}' for name, x in KNOBS.items())], check=True, cwd=ROOT)
  made = text(run_lib.read(args.workdir), f'{KNOBS["alloc.rule"]} budgets', 'python -m tests.benchmarks.beside '
              f'--config={args.config}')
  pathlib.Path(args.output).write_text(made)
  print(f'{args.output}: {len(made.encode()):,} bytes, {json.loads(made)["evaluations"][-1]}')


if __name__ == '__main__':
  main()
