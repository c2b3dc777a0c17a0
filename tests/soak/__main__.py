"""A long run with faults, started again as a launcher would, and a report: launch/soak.sh.

Exit status 1 where something was lost: a step without its line or with two, a fault that ended otherwise than it must,
memory, files, threads, processes or programs that grow, a process that outlived its run.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

from kr_jax import exits
from tests.soak import faults
from tests.soak import runs
from tests.soak import watch


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog='launch/soak.sh', description='A long run with faults injected by seed.')
  parser.add_argument('--steps', type=int, default=3000)
  parser.add_argument('--every', type=float, default=100.0, help='steps between two faults, in the mean')
  parser.add_argument('--seed', type=int, default=0, help='of the faults, and of the run')
  parser.add_argument('--config', default='configs/arithmetic.py:debug')
  parser.add_argument('--slack', type=float, default=1.0,
                      help='times as long as a fault may take, where other programs load the machine')
  parser.add_argument('--only', action='append', default=[], choices=[*faults.FAULTS],
                      help='a fault; may be given several times')
  parser.add_argument('--folder', help='for the run and its logs; unless set, a temporary one, which stays if '
                      'something was lost')
  parser.add_argument('--json', action='store_true', help='ends in the report as one JSON object on a line')
  args, knobs = parser.parse_known_args(argv)
  for flag in knobs:
    if not flag.startswith('--config.'):
      parser.error(f'{flag} is no flag of a soak; knobs are --config.SECTION.KNOB=VALUE')
  if args.steps < 10 or args.every < 1:
    parser.error(f'--steps={args.steps} must be 10 or more, --every={args.every:g} 1 or more')
  args.knobs = knobs
  return args


def grown(soak: runs.Soak) -> None:
  """Says what grows in an attempt that is long enough to tell."""
  for attempt in soak.attempts:
    if attempt['growth'] and attempt['growth']['grows']:
      soak.lose(f"attempt {attempt['attempt']}: {', '.join(attempt['growth']['grows'])} grow: "
                f"{attempt['growth']['growth_in_100_steps']} in 100 steps")


def report(soak: runs.Soak, account: dict[str, Any], seconds: float) -> dict[str, Any]:
  by_fault: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
  for one in soak.done:
    by_fault[one['fault']].append(one)
  return {
      'steps': soak.args.steps, 'every': soak.args.every, 'seed': soak.args.seed, 'config': soak.args.config,
      'seconds': round(seconds), 'machine': f'{platform.platform()}, {os.cpu_count()} processors',
      'disk': 'a small one in memory' if soak.is_mounted else 'none could be mounted: it was never full',
      'account': account,
      'faults': {name: {'times': len(some), 'as_they_must': sum(not x['wrong'] for x in some),
                        'longest_s': max(x['took_s'] for x in some), 'steps': [x['step'] for x in some],
                        'notes': [note for x in some for note in x['notes']]} for name, some in by_fault.items()},
      'growth': [{'attempt': x['attempt'], **x['growth']} for x in soak.attempts if x['growth']],
      'most_in_100_steps': watch.MOST_GROWTH, 'lost': soak.lost}


def show(found: dict[str, Any]) -> str:
  """The report as text."""
  account = found['account']
  lines = [f"{account['steps']} of {found['steps']} steps in {account['starts']} starts, {found['seconds']} s, seed "
           f"{found['seed']}; {account['updates'] - account['steps']} steps taken twice", '',
           f'{"fault":36}{"times":>6}{"as it must":>12}{"longest s":>11}  at steps']
  for name, x in sorted(found['faults'].items()):
    lines.append(f"{name:36}{x['times']:6}{x['as_they_must']:12}{x['longest_s']:11.1f}  "
                 f"{' '.join(map(str, x['steps']))}")
  lines += ['', 'growth in 100 steps, over the last half of each attempt of '
            f'{watch.LONG} steps or more (limits: {found["most_in_100_steps"]})',
            f'{"attempt":>8}{"steps":>14}{"memory kB":>12}{"files":>8}{"threads":>9}{"processes":>11}{"compiled":>10}'
            '   now: MB, files, threads, processes, programs']
  for x in found['growth']:
    rate, last = x['growth_in_100_steps'], x['last']
    lines.append(f"{x['attempt']:8}{x['of_steps'][0]:7}-{x['of_steps'][1]:<6}{rate['memory_kb']:12.0f}"
                 f"{rate['open_files']:8.2f}{rate['threads']:9.2f}{rate['processes']:11.2f}{rate['compiled']:10.2f}"
                 f"   {last['memory_kb'] / 1024:.0f}, {last['open_files']}, {last['threads']}, {last['processes']}, "
                 f"{last['compiled']}")
  lines += ['', *(f'LOST: {text}' for text in found['lost'])] if found['lost'] else ['', 'nothing is lost']
  return '\n'.join(lines)


def main(argv: list[str]) -> int:
  args, began = parse(argv), time.monotonic()
  signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has ignored by what it starts with &
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(exits.AGAIN))  # so that the run ends, and the disk is taken away
  if not args.folder:
    args.folder = tempfile.mkdtemp(prefix='soak-')
  args.folder = os.path.abspath(args.folder)
  soak = runs.Soak(args, args.folder)
  try:
    print(f'{len(soak.plan)} faults in {args.steps} steps; logs in {args.folder}/log', flush=True)
    soak.run()
    account = soak.account()
    grown(soak)
  finally:
    soak.close()
  found = report(soak, account, time.monotonic() - began)
  print(show(found), flush=True)
  if args.json:
    print(json.dumps(found), flush=True)
  if found['lost']:
    print(f'the logs stay in {args.folder}', file=sys.stderr)
  elif not any(x.startswith('--folder') for x in argv):
    shutil.rmtree(args.folder, ignore_errors=True)
  return int(bool(found['lost']))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
