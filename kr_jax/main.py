"""Flags -> train | evaluate | report | rollouts | export | generate | preflight.

    python -m kr_jax.main --config=configs/arithmetic.py --workdir=runs/arithmetic \
        --config.alloc.rule=uniform
    python -m kr_jax.main --mode=report --workdir=runs/knapsack --workdir=runs/uniform
    python -m kr_jax.main --mode=generate --checkpoint=smollm2-135m-instruct --prompt='What is 3 + 4?'
    python -m kr_jax.main --mode=preflight --config=configs/qwen3_4b.py --topology=v5e:4x4

Only flags are read at import: the verifier processes load this module too. What is wrong with flags, knobs and files is
said before anything heavy is loaded. Exit status: 0; 1 for an error, or a preflight of what does not fit; 2 for wrong
flags; 130 where a run was interrupted.
"""

from __future__ import annotations

import glob
import json
import os
import re
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from kr_jax import arguments
from kr_jax import inputs
from kr_jax import knobs
from kr_jax.arguments import Mode

_BEGAN = arguments.began()
MODES = {
    'train': Mode('the loop, then the report; the same command again goes on where it stopped', ('config', 'workdir'),
                  ('hardware', 'coordinator', 'processes', 'process'), fills=('hardware',)),
    'evaluate': Mode('the latest checkpoint on held-out tasks: a table and evaluation.json', ('config', 'workdir'),
                     ('coordinator', 'processes', 'process')),
    'report': Mode('report.html, report.md and summary.json of a run, or of several that are compared', ('workdir',),
                   ('hardware', 'target', 'output')),
    'rollouts': Mode('what the policy wrote, of the rollouts that a run keeps', ('workdir',),
                     ('step', 'task', 'status')),
    'export': Mode('the latest checkpoint as transformers reads it', ('config', 'workdir'), ('output', 'dtype')),
    'generate': Mode('what a checkpoint writes after prompts', ('checkpoint', 'prompt'),
                     ('temperature', 'max_tokens', 'seed')),
    'preflight': Mode('what a config takes on TPU slices, by the TPU compiler', ('config', 'hardware'),
                      ('topology', 'suggest', 'json', 'efficiency', 'mean_prompt', 'mean_completion'),
                      fills=('hardware',)),
}
_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'configs/NAME.py, or configs/NAME.py:debug for seconds instead of minutes; '
    '--config.SECTION.KNOB=VALUE sets a knob', lock_config=True)
_HARDWARE = config_flags.DEFINE_config_file(
    'hardware', None, 'FILE.py[:PROFILE][,REGION]: what chips do, draw and cost, to price a run or a preflight by; '
    "unless set, configs/hardware.py, and in a report the run's own; --hardware.profiles.v5e.dollars_per_hour=1 sets a "
    'figure', lock_config=True)
_WORKDIR = flags.DEFINE_multi_string(
    'workdir', None, 'directory of the run; a run in it is gone on with; for a report several may be given')
_MODE = flags.DEFINE_enum('mode', 'train', list(MODES), 'what to do, as above')
_TARGET = flags.DEFINE_float(
    'target', None, 'report: held-out success to reach, fixed beforehand, of which the cost is compared', lower_bound=0,
    upper_bound=1)
_STEP = flags.DEFINE_integer('step', None, 'rollouts: of this step; unless set, the newest', lower_bound=0)
_TASK = flags.DEFINE_string('task', None, 'rollouts: of the task of this id')
_STATUS = flags.DEFINE_string('status', None, "rollouts: of tasks of this status, or this verdict: 'mixed', 'wrong'")
_OUTPUT = flags.DEFINE_string('output', None, 'export, report: directory to write; unless set, WORKDIR/export, and the '
                              'first WORKDIR')
_DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16', 'float16'],
                           "export: of the tensors; unless set, the checkpoint's that training began with")
_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'generate: what config.policy.checkpoint takes')
_PROMPT = flags.DEFINE_multi_string('prompt', None, 'generate: a text; may be given several times')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, 'generate: of sampling; 0 is greedy', lower_bound=0)
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 64, 'generate: most tokens to write', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'generate: of sampling', lower_bound=0)
_TOPOLOGY = flags.DEFINE_multi_string(
    'topology', None, "preflight: a TPU slice, 'v5e:4x4'; may be given several times; unless set, those that the "
    'config is meant for')
_SUGGEST = flags.DEFINE_bool('suggest', False, 'preflight: search for the knobs of the fastest step that fits')
_JSON = flags.DEFINE_string('json', None, 'preflight: file to write the figures to')
_EFFICIENCY = flags.DEFINE_float('efficiency', 0.4, "preflight: share of a chip's peak that programs reach",
                                 lower_bound=0.01, upper_bound=1)
_MEAN_PROMPT = flags.DEFINE_integer('mean_prompt', 0, 'preflight: tokens; 0: as the longest', lower_bound=0)
_MEAN_COMPLETION = flags.DEFINE_integer('mean_completion', 0, 'preflight: tokens; 0: as the longest', lower_bound=0)
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, "of several processes: 'HOST:PORT' of the first, or 'auto', which asks Cloud TPU, "
    'GKE or Slurm for all three')
_PROCESSES = flags.DEFINE_integer('processes', 0, 'how many there are')
_PROCESS = flags.DEFINE_integer('process', -1, 'which this is, from 0')
_PROFILES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'configs', 'hardware.py')


def parse(argv: list[str]) -> list[str]:
  """Parses the flags, or says all that is wrong with them and ends the process."""
  return arguments.parse(
      argv, MODES, configs=('config', 'hardware'), everywhere=('config', 'workdir', 'hardware'),
      defaults={'hardware': _PROFILES} if os.path.exists(_PROFILES) else {})


def _problems(mode: str) -> list[str]:
  """What is wrong with knobs, and with files and names that a mode needs."""
  workdirs, found = _WORKDIR.value or [], []
  if len(workdirs) > 1 and mode != 'report':
    found.append(f'--workdir is given {len(workdirs)} times ({", ".join(workdirs)}); --mode=report compares several '
                 f'runs, --mode={mode} takes one')
  paths = [x.rstrip('/') if '://' in x else os.path.realpath(x) for x in workdirs]
  if repeated := {x for x, path in zip(workdirs, paths) if paths.count(path) > 1 and mode == 'report'}:
    found.append(f'--workdir={min(repeated)} is given twice; name different runs')
  if 'workdir' in MODES[mode].needs and mode != 'train':
    found += [f'--workdir={x} is no directory; train first' for x in workdirs if not _is_directory(x)]
  if 'hardware' in MODES[mode].needs + MODES[mode].takes:
    try:
      _hardware()
    except ValueError as error:
      found += _lines(error)
  if 'config' in MODES[mode].needs:
    found += _config_problems(mode)
  if mode == 'generate':
    found += inputs.checkpoint_problems(_CHECKPOINT.value, '--checkpoint')
  return found


def _config_problems(mode: str) -> list[str]:
  """What is wrong with the knobs of --config, or is not there of what it names."""
  try:
    config = knobs.read(_CONFIG.value)
  except ValueError as error:
    return _lines(error)
  found = inputs.problems(config, of_data=mode in ('train', 'evaluate'), of_checkpoint=mode != 'preflight')
  if mode == 'train' and (config.record.wandb or config.record.goodput or config.record.codecarbon):
    from kr_jax.record import sinks
    try:
      sinks.check(config.record)
    except ValueError as error:
      found += _lines(error)
  if mode == 'preflight' and not (_TOPOLOGY.value or config.topologies):
    found.append('the config names no topologies; say one: --topology=v5e:4x4')
  if mode in ('evaluate', 'export') and os.path.isdir(_WORKDIR.value[0]):
    directory = os.path.join(config.checkpoint.directory or _WORKDIR.value[0], 'checkpoints')
    if not _is_directory(directory):
      found.append(f'{directory} holds no checkpoint; train first')
  return found


def _is_directory(path: str) -> bool:
  """Whether a directory is there; those of buckets are not looked up."""
  return '://' in path or os.path.isdir(path)


def _lines(error: ValueError) -> list[str]:
  """The error of a config, as a line a knob."""
  return re.split(r'; (?=(?:\w+\.)*\w+=\S|there is no )', str(error))


def _hardware():
  """The profiles of --hardware; None where none is given. Raises ValueError that names every wrong figure."""
  from kr_jax.costs import hardware
  return None if _HARDWARE.value is None else hardware.read(_HARDWARE.value)


def _quiet_libtpu() -> None:
  """Tells libtpu, where no TPU is used, what it would ask a TPU's host for.

  A preflight installs libtpu, and jax loads it in each later run; unless these are set, it complains.
  """
  has_tpu = glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')
  if not has_tpu or _MODE.value == 'preflight':
    for name, value in (('TPU_WORKER_HOSTNAMES', 'localhost'), ('TPU_ACCELERATOR_TYPE', 'v5litepod-16')):
      os.environ.setdefault(name, value)


def _preflight() -> int:
  """Prints what a config takes on each slice, and returns 1 where it does not fit."""
  # The compiler looks for no TPU, and needs none to itself.
  os.environ |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'  # which could not be read without a TPU
  from kr_jax import preflight  # heavy: see above
  config, hardware, reports = _CONFIG.value, _hardware(), []
  assumed = preflight.Assumed(_EFFICIENCY.value, _MEAN_PROMPT.value, _MEAN_COMPLETION.value)
  for topology in _TOPOLOGY.value or config.topologies:
    report = preflight.run(config, topology, assumed, hardware)
    print(preflight.table(report), flush=True)
    if _SUGGEST.value or not report['fits']:
      phases = () if _SUGGEST.value else [name for name, p in report['phases'].items() if not p['fits']]
      report['suggestion'] = preflight.suggest(config, topology, assumed, hardware, phases)
      print(preflight.advice(report))
    reports.append(report)
  if _JSON.value:
    with open(_JSON.value, 'w') as f:
      json.dump(reports if len(reports) > 1 else reports[0], f, indent=1)
  return int(not all(report['fits'] for report in reports))


def _report() -> None:
  """Writes report and summaries, and prints where they are."""
  from kr_jax.report import page  # heavy: see above
  workdirs = _WORKDIR.value
  summaries = {workdir: found for workdir in workdirs if (found := _summary(workdir))}
  print(json.dumps(summaries if len(workdirs) > 1 else summaries.get(workdirs[0], {}), indent=1))
  for path in page.write(workdirs, hardware=_hardware(), target=_TARGET.value, output=_OUTPUT.value)[:2]:
    print(f'see {path}')


def _summary(workdir: str) -> dict[str, Any] | None:
  """Writes the summary of a run, and returns it; None, and a line that says why, where its record is not enough."""
  from kr_jax.report import summary
  try:
    return summary.write(workdir)
  except (ValueError, LookupError, TypeError, OSError) as error:  # there is none, or it is of an older version
    print(f'no summary of {workdir}: {error!r}' if not isinstance(error, ValueError) else f'no summary: {error}',
          file=sys.stderr)
    return None


def _print_any(text: str) -> None:
  """Prints what a model wrote, on a terminal of ASCII too."""
  if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='backslashreplace')
  print(text)


def _rollouts() -> None:
  from kr_jax.record import rollouts
  for line in rollouts.show(_WORKDIR.value[0], step=_STEP.value, task=_TASK.value, status=_STATUS.value):
    _print_any(line)


def _generate() -> None:
  from kr_jax import generate
  _print_any('\n\n'.join(generate.texts(_CHECKPOINT.value, _PROMPT.value, temperature=_TEMPERATURE.value,
                                        max_tokens=_MAX_TOKENS.value, seed=_SEED.value)))


def _export() -> None:
  from kr_jax import prepare
  from kr_jax import state
  workdir = _WORKDIR.value[0]
  setup, output = prepare.without_tasks(_CONFIG.value), _OUTPUT.value or os.path.join(workdir, 'export')
  print(f'step {state.export_checkpoint(setup, workdir, output, dtype=_DTYPE.value or "")}; see {output}')


def _evaluate() -> None:
  from kr_jax import evaluate
  from kr_jax import prepare
  from kr_jax import processes
  from kr_jax import state
  from kr_jax.record import metrics
  from kr_jax.report import summary
  _start_processes()
  setup, workdir = prepare.prepare(_CONFIG.value), _WORKDIR.value[0]
  compiles = metrics.CompileCount()
  with processes.progress_to('evaluate', 'rollout', compiled_s=lambda: compiles.seconds) as progress:
    evaluation = state.evaluate_checkpoint(setup, workdir, progress=progress)
  if not processes.is_first():
    return
  print(f'step {evaluation["step"]}, temperature {setup.evaluate.temperature}\n{evaluate.table(evaluation)}')
  path = os.path.join(workdir, 'evaluation.json')
  summary.save(path, evaluation)
  print(f'see {path}')


def _start_processes() -> None:
  """Joins the other processes of a run, where there are some; makes TFDS write lines where there is no terminal."""
  import tensorflow_datasets as tfds
  from kr_jax import processes
  from kr_jax import progress
  if _COORDINATOR.value:
    processes.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  if not progress.ERR.isatty():
    tfds.disable_progress_bar()


def _train() -> None:
  from kr_jax import phases
  from kr_jax import prepare
  from kr_jax import processes
  from kr_jax import train
  workdir = _WORKDIR.value[0]
  phases.start(_BEGAN)
  try:
    hardware = _hardware()
    _start_processes()
    with phases.phase('data'):
      setup = prepare.prepare(_CONFIG.value)
    train.claim(setup, workdir)
  except ValueError as error:  # the user's; later ones are ours, and keep their traceback
    sys.exit(f'error: {error}')
  with processes.watch():
    train.train(setup, workdir, hardware)
  if processes.is_first():
    _summary(workdir)
    print(f'done: {setup.config.num_steps} steps; see {os.path.join(workdir, "summary.json")} and '
          f'{os.path.join(workdir, "plots")}')
    _print_closing(setup.config, workdir, hardware)


def _print_closing(config: knobs.Config, workdir: str, hardware) -> None:
  """Prints what was learnt and what it cost, of the run's record."""
  from kr_jax import progress
  from kr_jax.record import terminal
  from kr_jax.report import run
  found = run.read(workdir, hardware=hardware)
  score, page = f'avg@{config.evaluate.rollouts}', os.path.join(workdir, 'report.html')
  progress.say(terminal.closing(
      [record for record in found.evaluations if f'eval/{score}' in record], score, steps=config.num_steps,
      seconds=sum(entry['wall_s'] for entry in found.ledger.entries) if found.ledger.entries else None,
      price=found.price, page=page if os.path.exists(page) else None))


_RUN = {'train': _train, 'evaluate': _evaluate, 'report': _report, 'rollouts': _rollouts, 'export': _export,
        'generate': _generate, 'preflight': _preflight}


def main(argv: list[str]) -> None:
  del argv  # `parse` has seen to it
  logging.set_verbosity(logging.WARNING)  # Orbax and TFDS report each file otherwise
  mode = _MODE.value
  if found := _problems(mode):
    for problem in found:
      print(f'error: {problem}', file=sys.stderr)
    sys.exit(1)
  _quiet_libtpu()
  try:
    sys.exit(_RUN[mode]())
  except BrokenPipeError:  # whoever read the output has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except (ValueError, OSError) as error:  # such as a disk that is full or cannot be written
    if mode == 'train':
      raise
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    again = '; the same command again goes on from the last checkpoint' if mode == 'train' else ''
    print(f'interrupted{again}', file=sys.stderr)
    sys.exit(130)


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
