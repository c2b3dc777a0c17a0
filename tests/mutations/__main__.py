"""Plants each fault of faults.json in a copy of the tree, and runs the test that must fail then.

    .venv/bin/python -m tests.mutations [--only 3 17] [--list] [--jobs 2] [--json]

Exits with 1 where a fault is not caught, or where a test fails without any.
"""

from __future__ import annotations

import argparse
from concurrent import futures
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from tests.mutations import ROOT, Fault, faults


def copy_tree(to: pathlib.Path) -> None:
  """What a checkout holds, as it stands in the working tree."""
  names = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, text=True, capture_output=True,
                         check=True).stdout.splitlines()
  for name in names:
    if (ROOT / name).is_file():
      (to / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / name, to / name)


def run_tests(tree: pathlib.Path, *tests: str) -> tuple[int, str]:
  """pytest's exit code, 1 where a test failed, and its output. tree: whose tests and package are run."""
  done = subprocess.run(
      [sys.executable, '-m', 'pytest', '-q', '-x', '-n', '0', '-p', 'no:cacheprovider', *tests], cwd=tree, text=True,
      capture_output=True, env=os.environ | {'PYTHONPATH': str(tree), 'PYTHONDONTWRITEBYTECODE': '1'})
  return done.returncode, done.stdout + done.stderr


def is_caught(fault: Fault) -> tuple[bool, float, str]:
  """Whether the test fails with the fault; the seconds taken, and what pytest printed."""
  started = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    tree = pathlib.Path(folder)
    copy_tree(tree)
    path = tree / fault.file
    path.write_text(fault.planted(path.read_text()))
    code, output = run_tests(tree, fault.test)
  return code == 1, time.monotonic() - started, output


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', nargs='+', type=int, default=[], help='numbers of faults, from 1; unless given, all')
  parser.add_argument('--list', action='store_true', help='print the faults and stop')
  parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='faults at once')
  parser.add_argument('--json', action='store_true', help='print one JSON object last')
  args = parser.parse_args()
  chosen = {number: fault for number, fault in enumerate(faults(), start=1) if not args.only or number in args.only}
  if args.list:
    for number, fault in chosen.items():
      print(f'{number:3} {fault.file}: {fault.what}\n      {fault.old.strip()}  ->  {fault.new.strip()}')
    return
  code, output = run_tests(ROOT, *dict.fromkeys(fault.test for fault in chosen.values()))
  if code:
    sys.exit(f'a test fails without any fault:\n{output[-3000:]}')
  missed = []
  with futures.ThreadPoolExecutor(args.jobs) as pool:
    for (number, fault), (caught, seconds, output) in zip(
        chosen.items(), pool.map(is_caught, chosen.values())):
      verdict = 'caught' if caught else 'MISSED'
      print(f'{number:3} {verdict} in {seconds:5.1f} s  {fault.file}: {fault.what}', flush=True)
      if not caught:
        missed.append(number)
        print(output[-1500:])
  print(f'{len(chosen) - len(missed)} of {len(chosen)} faults caught')
  if args.json:
    print(json.dumps({'faults': len(chosen), 'caught': len(chosen) - len(missed), 'missed': missed}))
  sys.exit(bool(missed))


if __name__ == '__main__':
  main()
