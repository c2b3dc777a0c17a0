"""Trains one config under several allocation rules and seeds, at the same rollouts, and compares.

    .venv/bin/python -m tests.benchmarks.rules --workdir=runs/rules [--config=configs/arithmetic.py]
        [--rules uniform knapsack] [--seeds 0 1 2] [--jobs 1] [--json]
        [-- --config.num_steps=100 ...]

A rule is a value of alloc.rule, knobs (alloc.value=snr,alloc.nu_every=10,grpo.advantage=loo), or a variant
of the config (:paper_rule). Runs that are finished are not run again. The rise is held-out avg@k after the
last step minus that before the first. Rules of one seed start from one warm start, that of the first, so the difference of their
last scores is taken by seed; its interval is Student's t over the seeds.
"""

from __future__ import annotations

import argparse
from concurrent import futures
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import numpy as np
from scipy import stats

ROOT = pathlib.Path(__file__).parents[2]


def run(config: str, workdir: str, rule: str, seed: int, overrides: list[str],
        warm_start: str | None) -> dict:
  """The summary of one run, which starts from the warm start of another run of the seed."""
  if rule.startswith(':'):
    config, knobs = f'{config},{rule[1:]}' if ':' in config else config + rule, ''
  else:
    knobs = rule if '=' in rule else f'alloc.rule={rule}'
  directory = os.path.join(workdir, f'{rule}_{seed}')
  summary = os.path.join(directory, 'summary.json')
  if not os.path.exists(summary):
    os.makedirs(directory, exist_ok=True)
    ours = os.path.join(directory, 'warm_start')
    if warm_start and os.path.exists(warm_start) and not os.path.exists(ours):
      shutil.copytree(warm_start, f'{ours}.tmp', dirs_exist_ok=True)
      os.replace(f'{ours}.tmp', ours)
    with open(os.path.join(directory, 'log.txt'), 'a') as log:
      subprocess.run(
          [sys.executable, '-m', 'kr_jax.main', f'--config={config}', f'--workdir={directory}',
           *(f'--config.{knob}' for knob in knobs.split(',') if knob), f'--config.seed={seed}', *overrides],
          check=True, cwd=ROOT, stdout=log, stderr=log)
  with open(summary) as file:
    return json.load(file)


def run_seed(config: str, workdir: str, rules: list[str], seed: int, overrides: list[str]
             ) -> list[dict]:
  """The summaries of one seed, by rule."""
  first = os.path.join(workdir, f'{rules[0]}_{seed}', 'warm_start')
  return [run(config, workdir, rule, seed, overrides, None if rule == rules[0] else first)
          for rule in rules]


def interval(x: np.ndarray) -> list[float]:
  """95 % confidence interval of the mean, Student's t."""
  if len(x) < 2:
    return [float('-inf'), float('inf')]
  return list(map(float, stats.t.interval(0.95, len(x) - 1, x.mean(), stats.sem(x) or 1e-12)))


def compare(summaries: dict[str, list[dict]]) -> dict:
  """By rule, each figure's values by seed and their mean; by pair of rules, the paired difference."""
  first = next(iter(summaries.values()))[0]
  score = next(k for k in first if k.endswith('_rise')).removesuffix('_rise')
  names = (f'{score}_first', f'{score}_last', f'{score}_rise', 'effective_gradient_ratio',
           'expected_gradient_ratio', 'uniform_gradient_ratio', 'mixed_tasks', 'expected_mixed_tasks',
           'uniform_mixed_tasks', 'objective', 'uniform_objective', 'log_loss', 'constant_log_loss', 'count_log_loss',
           'constant_count_log_loss', 'log_loss_last_quarter', 'count_log_loss_last_quarter', 'budget_max', 'rollouts',
           'tokens_generated', 'tokens_updated', 'wall_s')
  # A run with waves has no objective.
  result = {rule: {name: {'mean': float(np.mean([s[name] for s in runs])),
                          'seeds': [s[name] for s in runs]} for name in names if runs[0][name] is not None}
            for rule, runs in summaries.items()}
  for rule, runs in summaries.items():
    gap_SQ = np.array([s['mixing_gap'] for s in runs], float)  # of each seed and quarter; None becomes NaN
    result[rule] |= {f'mixing_gap_{q + 1}': {'mean': float(gap_SQ[:, q].mean()), 'seeds': gap_SQ[:, q].tolist()}
                     for q in range(gap_SQ.shape[1])}
  rules = list(summaries)
  for other in rules[1:]:
    difference = np.array([b[f'{score}_last'] - a[f'{score}_last']
                           for a, b in zip(summaries[rules[0]], summaries[other])])
    result[f'{other} - {rules[0]}'] = {
        f'{score}_last': {'mean': float(difference.mean()), 'seeds': difference.tolist(),
                          'interval_95': interval(difference)}}
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/arithmetic.py')
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--rules', nargs='+', default=['uniform', 'knapsack'])
  parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
  parser.add_argument('--jobs', type=int, default=1, help='seeds at once; times are of one at 1')
  parser.add_argument('--json', action='store_true', help='print one JSON object last')
  parser.add_argument('overrides', nargs='*', help='after --: flags of kr_jax.main')
  args = parser.parse_args()
  with futures.ThreadPoolExecutor(args.jobs) as pool:
    by_seed = list(pool.map(
        lambda seed: run_seed(args.config, os.path.abspath(args.workdir), args.rules, seed,
                              args.overrides), args.seeds))
    summaries = dict(zip(args.rules, map(list, zip(*by_seed))))
  result = compare(summaries)
  for rule, figures in result.items():
    print(rule)
    for name, figure in figures.items():
      print(f'  {name:28}{figure["mean"]:12.4g}   by seed '
            + ' '.join(f'{x:.4g}' for x in figure['seeds'])
            + (f'   95 % {figure["interval_95"]}' if 'interval_95' in figure else ''))
  if args.json:
    print(json.dumps({'config': args.config, 'seeds': args.seeds, 'jobs': args.jobs,
                      'machine': f'{platform.machine()}, {os.cpu_count()} cores', **result}))


if __name__ == '__main__':
  main()
