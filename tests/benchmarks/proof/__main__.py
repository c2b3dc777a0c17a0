"""The comparison of plan.py, in pieces that can be stopped and gone on with: launch/proof.sh.

Tunes and screens, names the finalists, and runs the test; then writes report.md and a plot beside the recorded lines.
What is recorded is not run again: to run it again, delete its lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import json
import math
import os
import pathlib
import signal
import sys
import time
from typing import Any

from kr_jax import exits
from tests.benchmarks.proof import analysis
from tests.benchmarks.proof import plan
from tests.benchmarks.proof import runs
from tests.benchmarks.proof import tables


def parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog='launch/proof.sh', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--quick', action='store_true',
                      help='one family, two arms, three seeds, run anew and recorded in the folder; 12 minutes')
  parser.add_argument('--family', nargs='+', choices=plan.FAMILIES, default=None)
  parser.add_argument('--batch', nargs='+', choices=plan.BATCHES, default=None)
  parser.add_argument('--arms', nargs='+', choices=[*plan.ARMS], default=None, metavar='ARM',
                      help='; '.join(f'{name}: {arm.about}' for name, arm in plan.ARMS.items()).replace('%', '%%'))
  parser.add_argument('--seeds', nargs='+', type=int, default=None, help='unless set, those of the plan')
  parser.add_argument('--role', choices=('tuning', 'test'), help='unless set, tuning and then the test')
  parser.add_argument('--jobs', type=int, default=2, help='runs at once, each on a core of its own')
  parser.add_argument('--folder', type=pathlib.Path, default=runs.ROOT / 'runs' / 'proof', help='of workdirs')
  parser.add_argument('--record', type=pathlib.Path, help='folder of the recorded lines; unless set, the shipped one')
  parser.add_argument('--minutes', type=float, default=math.inf, help='after which no run is begun')
  parser.add_argument('--keep', action='store_true', help='keep the workdirs of finished runs')
  parser.add_argument('--signal', action='store_true',
                      help='measure the batch signal-to-noise of the cells, and run nothing')
  parser.add_argument('--report', action='store_true', help='run nothing; report on what is recorded')
  parser.add_argument('--json', action='store_true', help='print one JSON object last')
  args = parser.parse_args(argv)
  if args.minutes < 0 or min(args.seeds or [0]) < 0:
    parser.error('--minutes and --seeds must be 0 or more')
  cores = len(os.sched_getaffinity(0))
  if not 1 <= args.jobs <= cores:
    parser.error(f'--jobs={args.jobs} must be 1 to {cores}, as each run has a core of its own')
  if args.quick:
    if any((args.family, args.batch, args.arms, args.seeds, args.role, args.report)):
      parser.error('--quick says which runs there are; leave out --family, --batch, --arms, --seeds, --role, --report')
    args.role = 'test'
    vars(args).update(plan.QUICK)
  args.folder, args.record = args.folder.absolute(), args.record and args.record.absolute()
  args.tuned_in = args.record or runs.RECORDED  # which tells the rates
  args.record = args.record or (args.folder / 'quick' if args.quick else runs.RECORDED)
  return args


def next_stage(args: argparse.Namespace, failed: Sequence[plan.Run] = ()) -> list[plan.Run]:
  """The runs that are left of the first stage that has any: tuning with the screening, tuning elsewhere, the test.

  failed: runs that are not tried again.
  """
  lines = runs.read(args.record)
  of = analysis.cells(lines if args.record == args.tuned_in else [*lines, *runs.read(args.tuned_in)])
  done = {*map(runs.key, lines), *(run.key for run in failed)}
  cells = [f'{family}_{batch}' for family in args.family or plan.FAMILIES for batch in args.batch or plan.BATCHES]
  screened = [cell for cell in cells if cell in plan.SCREENED_IN]
  of_test = args.arms or [plan.BASELINE, *analysis.finalists(analysis.screening(of))]

  def left(cells, arms, role):
    of_role, others = (plan.TUNING_SEEDS, plan.TEST_SEEDS) if role == 'tuning' else (plan.TEST_SEEDS, plan.TUNING_SEEDS)
    seeds = [seed for seed in args.seeds or of_role if seed not in others]  # nothing is tuned on what is tested
    found = plan.runs(cells, arms, seeds, role, plan.MULTIPLES if role == 'tuning' else lambda cell, arm: (
        1.0 if cell not in of else of[cell].tuned(arm) or 1.0,))
    return [run for run in found if run.key not in done]

  if args.role != 'test':
    if stage := left(screened, args.arms or [*plan.ARMS], 'tuning'):
      return stage
    if screened and not args.arms and not analysis.is_screened(of):
      print(f'the screening in {" and ".join(plan.SCREENED_IN)} is not complete, so that there are no finalists yet',
            flush=True)
      return []
    if stage := left([cell for cell in cells if cell not in screened], of_test, 'tuning'):
      return stage
  return left(cells, of_test, 'test') if args.role != 'tuning' else []


def outdated(lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
  """How many lines of each cell were made by another config than that of their arm today: a knob was changed, or added.

  What they say is of that config. A change of the plan asks for new ones.
  """
  found: dict[str, int] = {}
  for line in lines:
    run = plan.Run(*(line[name] for name in plan.Run._fields))
    exact = [x for x in plan.MULTIPLES if plan.rounded(x) == plan.rounded(run.multiple)]  # which are recorded rounded
    if line.get('digest') not in {plan.digest(plan.config(run._replace(multiple=x))) for x in (run.multiple, *exact)}:
      found[run.cell] = found.get(run.cell, 0) + 1
  return found


def carry_out(args: argparse.Namespace) -> list[tuple[plan.Run, str]]:
  """Makes what is left, stage after stage, as the results of one decide the runs of the next. Returns what failed."""
  failed, until = [], time.monotonic() + 60 * args.minutes
  cores = sorted(os.sched_getaffinity(0))
  with runs.alone(args.folder):
    while time.monotonic() < until and (stage := next_stage(args, [run for run, _ in failed])):
      print(f'{len(stage)} runs of {stage[0].role}, {args.jobs} at a time, recorded in {args.record}', flush=True)
      failed += runs.carry_out(
          runs.orders(stage, args.folder, args.keep),
          lambda number, inbox: runs.Worker(cores[number], args.folder, inbox), args.jobs,
          lambda line: runs.append(args.record, line), until=until, say=lambda text: print(text, flush=True))
  return failed


def measure_signal(args: argparse.Namespace) -> None:
  """Measures the cells whose batch signal-to-noise is not recorded."""
  from tests.benchmarks.proof import signal as signal_lib
  known = {(line['family'], line['batch'], line['seed']) for line in signal_lib.read(args.record)}
  with runs.alone(args.folder):
    for family in args.family or plan.FAMILIES:
      for batch in args.batch or plan.BATCHES:
        for seed in args.seeds or plan.TUNING_SEEDS[:1]:
          if (family, batch, seed) not in known:
            line = signal_lib.of_cell(family, batch, seed, args.folder)
            signal_lib.append(args.record, line)
            print(json.dumps(line), flush=True)


def told(args: argparse.Namespace) -> dict[str, Any]:
  """Writes the report and the plot, and returns the analysis."""
  from tests.benchmarks.proof import signal as signal_lib
  lines = runs.read(args.record)
  if args.tuned_in != args.record:  # so that the rates are known as tuned
    lines += [line for line in runs.read(args.tuned_in) if line['role'] == 'tuning']
  found = analysis.analysed(lines, plan.target)
  text = tables.report(found, signal_lib.read(args.record))
  args.record.mkdir(parents=True, exist_ok=True)
  (args.record / 'report.md').write_text(text)
  tables.draw(analysis.cells(lines), found['targets'], args.record / tables.PICTURE)
  return found


def main(argv: Sequence[str]) -> int:
  args = parse(argv)
  signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has ignored by what it starts with &
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(exits.AGAIN))  # so that workers are ended
  failed = []
  try:
    if args.signal:
      measure_signal(args)
    elif not args.report:
      failed = carry_out(args)
  except KeyboardInterrupt:
    print('stopped; the same command goes on', file=sys.stderr)
    return exits.INTERRUPTED
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  for cell, count in outdated(runs.read(args.record)).items():
    print(f'{count} lines of {runs.path_of(args.record, cell)} are of other configs than the plan has now; delete them '
          'to run them again, as they are told beside the others')
  for path, count in runs.damaged(args.record).items():
    print(f'{path}: {count} lines are cut or damaged, and left out')
  found = told(args)
  print(f'{args.record / "report.md"} holds:\n' if found['test'] else f'nothing is tested yet: {args.record}')
  if args.quick and found['test']:
    print(tables.report(found | {'tuning': {}, 'screening': []}))
  for run, why in failed:
    print(f'FAILED {run}: {why}')
  if args.json:
    print(json.dumps(runs.rounded(found)))
  return int(bool(failed))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
