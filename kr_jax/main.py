"""Flags -> train | evaluate | report | advise | rollouts | export | generate | preflight.

    python -m kr_jax.main --config=configs/arithmetic.py --workdir=runs/arithmetic \
        --config.alloc.rule=uniform
    python -m kr_jax.main --mode=report --workdir=runs/knapsack --workdir=runs/uniform
    python -m kr_jax.main --mode=generate --checkpoint=smollm2-135m-instruct --prompt='What is 3 + 4?'
    python -m kr_jax.main --mode=preflight --config=configs/qwen3_4b.py --topology=v5e:4x4

Only flags are read at import: the verifier processes load this module too. What is wrong with flags, knobs and files is
said before anything heavy is loaded. Exit status: 0; 1 for an error, or a preflight of what does not fit; 2 for wrong
flags; 75 for a run that a new start of the same command goes on with, as SIGTERM stopped it, another of its processes
died, or its bucket could not be written; 130 where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import gc
import json
import math
import os
import sys
from typing import Any

from kr_jax import stopping as stopping_lib

if __name__ == '__main__' or os.path.basename(sys.argv[0]) == 'kr_jax':  # this process is the command line's
  stopping_lib.hear(may_end=True)  # before what takes time to load

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from kr_jax import arguments
from kr_jax import errors
from kr_jax import exits
from kr_jax import files
from kr_jax import inputs
from kr_jax import knobs
from kr_jax import library
from kr_jax import progress
from kr_jax import run_config
from kr_jax import shipped
from kr_jax.arguments import Mode

_BEGAN = arguments.began()
MODES = {
    'train': Mode('the loop, then the report; the same command again goes on where it stopped', ('config', 'workdir'),
                  ('hardware', 'coordinator', 'processes', 'process', 'profile'), fills=('hardware',)),
    'evaluate': Mode('the latest checkpoint on held-out tasks: a table and evaluation.json', ('workdir',),
                     ('config', 'step', 'coordinator', 'processes', 'process'), of_run=True),
    'report': Mode('report.html, report.md and summary.json of a run, or of several that are compared', ('workdir',),
                   ('hardware', 'target', 'output')),
    'advise': Mode('whether a knapsack is worth it, by the record of a run', ('workdir',), ('step', 'json')),
    'rollouts': Mode('what the policy wrote, of the rollouts that a run keeps', ('workdir',),
                     ('step', 'task', 'status')),
    'replay': Mode('the update of a step whose update was skipped, again: what is not finite, and where', ('workdir',),
                   ('step',)),
    'export': Mode('the latest checkpoint as transformers reads it', ('workdir',),
                   ('config', 'step', 'output', 'dtype'), of_run=True),
    'generate': Mode('what a checkpoint writes after prompts', ('checkpoint', 'prompt'),
                     ('temperature', 'max_tokens', 'seed')),
    'preflight': Mode('what a config takes on TPU slices, by the TPU compiler', ('config', 'hardware'),
                      ('topology', 'suggest', 'json', 'efficiency', 'mean_prompt', 'mean_completion'),
                      fills=('hardware',)),
}
_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'FILE.py, or FILE.py:debug for seconds instead of minutes; or a shipped one, kr_jax:NAME; '
    '--config.SECTION.KNOB=VALUE sets a knob', lock_config=True)
_HARDWARE = config_flags.DEFINE_config_file(
    'hardware', None, 'FILE.py[:PROFILE][,REGION]: what chips do, draw and cost, to price a run or a preflight by; '
    "unless set, kr_jax:hardware, and in a report the run's own; --hardware.profiles.v5e.dollars_per_hour=1 sets a "
    'figure', lock_config=True)
_WORKDIR = flags.DEFINE_multi_string(
    'workdir', None, 'directory of the run, gs://BUCKET/RUN too; a run in it is gone on with; for a report or '
    'for advice several may be given')
_MODE = flags.DEFINE_enum('mode', 'train', list(MODES), 'what to do, as above')
_TARGET = flags.DEFINE_float(
    'target', None, 'report: held-out success to reach, fixed beforehand, of which the cost is compared', lower_bound=0,
    upper_bound=1)
_STEP = flags.DEFINE_integer('step', None, 'rollouts, replay: of this step; evaluate, export: the checkpoint after so '
                             'many steps; unless set, the newest; advise: the first to read', lower_bound=0)
_TASK = flags.DEFINE_string('task', None, 'rollouts: of the task of this id')
_STATUS = flags.DEFINE_string('status', None, "rollouts: of tasks of this status, or this verdict: 'mixed', 'wrong'")
_OUTPUT = flags.DEFINE_string('output', None, 'export, report: directory to write, gs://BUCKET/PATH too; unless set, '
                              'WORKDIR/export, and the first WORKDIR')
_DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16', 'float16'],
                           "export: of the tensors; unless set, the checkpoint's that training began with")
_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'generate: what config.policy.checkpoint takes')
_PROMPT = flags.DEFINE_multi_string('prompt', None, 'generate: a text; may be given several times')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, 'generate: of sampling; 0 is greedy', lower_bound=0,
                                  upper_bound=100)
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 64, 'generate: most tokens to write', lower_bound=1,
                                   upper_bound=1_000_000)
_SEED = flags.DEFINE_integer('seed', 0, 'generate: of sampling', lower_bound=0, upper_bound=2 ** 32 - 1)
_TOPOLOGY = flags.DEFINE_multi_string(
    'topology', None, "preflight: a TPU slice, 'v5e:4x4'; may be given several times; unless set, those that the "
    'config is meant for')
_SUGGEST = flags.DEFINE_bool('suggest', False, 'preflight: search for the knobs of the fastest step that fits')
_JSON = flags.DEFINE_string('json', None, 'preflight, advise: file to write the figures to')
_EFFICIENCY = flags.DEFINE_float('efficiency', 0.4, "preflight: share of a chip's peak that programs reach",
                                 lower_bound=0.01, upper_bound=1)
_MEAN_PROMPT = flags.DEFINE_integer('mean_prompt', 0, 'preflight: tokens; 0: as the longest', lower_bound=0,
                                    upper_bound=10_000_000)
_MEAN_COMPLETION = flags.DEFINE_integer('mean_completion', 0, 'preflight: tokens; 0: as the longest', lower_bound=0,
                                        upper_bound=10_000_000)
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, "of several processes: 'HOST:PORT' of the first, or 'auto', which asks Cloud TPU, "
    'GKE or Slurm for all three')
_PROCESSES = flags.DEFINE_integer('processes', 0, 'how many there are')
_PROCESS = flags.DEFINE_integer('process', -1, 'which this is, from 0')
_PROFILE = flags.DEFINE_string('profile', None, "train: FIRST:LAST, steps whose trace JAX's profiler writes to "
                               'WORKDIR/profile')
for _name in ('target', 'temperature', 'efficiency'):  # a bound lets nan in
  flags.register_validator(_name, lambda x: x is None or math.isfinite(x), 'it must be a number')


def parse(argv: list[str]) -> list[str]:
  """Parses the flags, or says all that is wrong with them and ends the process."""
  return arguments.parse(
      argv, MODES, configs=('config', 'hardware'), everywhere=('config', 'workdir', 'hardware'),
      defaults={'hardware': f'{shipped.PREFIX}hardware'}, run_config=run_config.__file__)


def _problems(mode: str) -> list[str]:
  """What is wrong with knobs, and with files and names that a mode needs."""
  workdirs, found = _workdirs(), [*library.missing(), *arguments.path_problems({
      'workdir': _WORKDIR.value, 'output': _OUTPUT.value, 'json': _JSON.value, 'checkpoint': _CHECKPOINT.value},
      written=() if mode == 'report' else ('workdir', 'output', 'json'))]
  if len(workdirs) > 1 and mode not in ('report', 'advise'):
    found.append(f'--workdir is given {len(workdirs)} times ({", ".join(workdirs)}); --mode=report compares several '
                 f'runs, --mode={mode} takes one')
  paths = [x if files.is_remote(x) else os.path.realpath(x) for x in workdirs]
  if repeated := {x for x, path in zip(workdirs, paths) if paths.count(path) > 1 and mode == 'report'}:
    found.append(f'--workdir={min(repeated)} is given twice; name different runs')
  if 'workdir' in MODES[mode].needs and mode != 'train':
    wrong = [files.missing(x) if files.is_remote(x) else None if os.path.isdir(x) else f'{x} is no directory'
             for x in workdirs]
    found += [f'--workdir={problem}; train first' for problem in wrong if problem]
  if 'hardware' in MODES[mode].needs + MODES[mode].takes:
    try:
      _hardware()
    except ValueError as error:
      found += library.lines(error)
  if 'config' in MODES[mode].needs + MODES[mode].takes:
    found += _config_problems(mode)
  if mode == 'generate':
    found += inputs.checkpoint_problems(_CHECKPOINT.value, '--checkpoint')
  return found or _unwritable(mode)


def _config_problems(mode: str) -> list[str]:
  """What is wrong with the knobs of --config, or is not there of what it names."""
  try:
    config = knobs.read(_config(mode))
  except ValueError as error:
    return library.lines(error)
  found = _profile_problems(config) + run_config.problems(config, _workdirs()[0]) if mode == 'train' else []
  found += library.problems(_CONFIG.value) if mode == 'train' else inputs.problems(
      config, of_data=mode == 'evaluate', of_checkpoint=mode != 'preflight')
  if mode == 'preflight':
    hardware = None
    with contextlib.suppress(ValueError):  # which is said elsewhere
      hardware = _hardware()
    found += arguments.topology_problems(_TOPOLOGY.value or config.topologies, hardware)
  if mode in ('evaluate', 'export') and not files.missing(_workdirs()[0]):
    directory = files.join(files.expanded(config.checkpoint.directory or _workdirs()[0]), 'checkpoints')
    if files.missing(directory):
      found.append(f'{directory} holds no checkpoint; train first')
  return found


def _config(mode: str) -> Mapping[str, Any]:
  """The config of the command line; of what is made of a run, the run's own, and what is given as far as it may be.

  Raises ValueError as of run_config.of_run.
  """
  workdir = MODES[mode].of_run and _workdirs()[0]
  if not workdir or files.missing(files.join(workdir, 'config.json')):  # there is no run, which is said elsewhere
    return _CONFIG.value
  return run_config.of_run(_CONFIG.value, workdir, config_flags.get_override_values(flags.FLAGS['config']))


def _unwritable(mode: str) -> list[str]:
  """What of the directories that a mode writes cannot be written; they are made, and a small file is written."""
  written = {}
  if mode == 'train':
    written = {'--workdir': _workdirs()[0], 'checkpoint.directory': _CONFIG.value.checkpoint.directory}
  elif mode == 'evaluate' or mode in ('report', 'export') and not _OUTPUT.value:
    written = {'--workdir': _workdirs()[0]}
  elif _OUTPUT.value:
    written = {'--output': _OUTPUT.value}
  elif _JSON.value and not files.is_remote(_JSON.value):
    written = {'--json': os.path.dirname(files.expanded(_JSON.value)) or '.'}
  return library.unwritable(written)


def _workdirs() -> list[str]:
  """The values of --workdir."""
  return [files.expanded(path) for path in _WORKDIR.value or ()]


def _profile_problems(config: knobs.Config) -> list[str]:
  """What is wrong with --profile."""
  try:
    arguments.profiled(_PROFILE.value, config.num_steps)
  except ValueError as error:
    return [str(error)]
  return []


def _hardware():
  """The profiles of --hardware; None where none is given. Raises ValueError that names every wrong figure."""
  from kr_jax.costs import hardware
  return None if _HARDWARE.value is None else hardware.read(_HARDWARE.value)


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
    files.write(_JSON.value, json.dumps(reports if len(reports) > 1 else reports[0], indent=1))
  return int(not all(report['fits'] for report in reports))


def _report() -> None:
  """Writes report and summaries, and prints where they are."""
  from kr_jax import mirror  # heavy: see above
  from kr_jax.report import page
  with contextlib.ExitStack() as context:
    places = [context.enter_context(mirror.opened(workdir)) for workdir in _workdirs()]
    output = context.enter_context(mirror.output(_OUTPUT.value or places[0].path))
    summaries = {place.url: found for place in places if (found := library.summarize(place.path))}
    print(json.dumps(summaries if len(places) > 1 else summaries.get(places[0].url, {}), indent=1))
    written = page.write([place.path for place in places], hardware=_hardware(), target=_TARGET.value, output=output)
  for path in written[:2]:
    print(f'see {path.replace(output, files.expanded(_OUTPUT.value or places[0].url))}')


def _advise() -> None:
  os.environ['JAX_PLATFORMS'] = 'cpu'  # a run may hold the devices
  from kr_jax import advise
  advise.run(_workdirs(), first_step=_STEP.value or 0, output=_JSON.value)


def _print_any(text: str) -> None:
  """Prints what a model wrote, on a terminal of ASCII too."""
  if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='backslashreplace')
  print(text)


def _rollouts() -> None:
  from kr_jax import mirror
  from kr_jax.record import rollouts_text
  with mirror.opened(_workdirs()[0]) as place:
    for line in rollouts_text.show(place.path, step=_STEP.value, task=_TASK.value, status=_STATUS.value):
      _print_any(line)


def _replay() -> None:
  from kr_jax import compiled
  from kr_jax import mirror
  from kr_jax import replay
  compiled.keep()
  with mirror.opened(_workdirs()[0]) as place:
    for line in replay.lines(place.path, _STEP.value):
      _print_any(line)


def _generate() -> None:
  from kr_jax import compiled
  from kr_jax import generate
  from kr_jax.record import rollouts_text
  compiled.keep()
  texts = generate.texts(_CHECKPOINT.value, _PROMPT.value, temperature=_TEMPERATURE.value,
                         max_tokens=_MAX_TOKENS.value, seed=_SEED.value)
  if sys.stdout.isatty():  # which obeys control characters
    texts = map(rollouts_text.visible, texts)
  _print_any('\n\n'.join(texts))


def _export() -> None:
  from kr_jax import mirror
  from kr_jax import prepare
  from kr_jax import state
  from kr_jax.model import export
  workdir = _workdirs()[0]
  output = files.expanded(_OUTPUT.value or files.join(workdir, 'export'))
  with mirror.opened(workdir) as place:
    setup = prepare.without_tasks(_config('export'), place.path)
    with mirror.output(output, mark=export.MARK) as directory:
      step = state.export_checkpoint(setup, place.path, directory, step=_STEP.value, dtype=_DTYPE.value or '')
  print(f'step {step}; see {output}')


def _evaluate() -> None:
  from kr_jax import attempt
  from kr_jax import evaluate
  from kr_jax import mirror
  from kr_jax import prepare
  from kr_jax import processes
  from kr_jax import state
  from kr_jax.record import metrics
  from kr_jax.report import summary
  _start_processes()
  with processes.watch(), processes.StopSignal('the evaluation') as stopping, stopping.ends(), mirror.opened(
      _workdirs()[0]) as place:
    setup, compiles = prepare.prepare(_config('evaluate'), place.path, trains=False), metrics.CompileCount()
    attempt.tell_of_changes(setup, place.path)
    with processes.progress_to('evaluate', 'rollout', compiled_s=lambda: compiles.seconds) as progress:
      evaluation = state.evaluate_checkpoint(
          setup, place.path, step=_STEP.value, progress=progress, stopping=stopping)
    if not processes.is_first():
      return
    print(f'step {evaluation["step"]}, temperature {setup.evaluate.temperature}\n{evaluate.table(evaluation)}')
    summary.save(os.path.join(place.path, 'evaluation.json'), evaluation)
  print(f'see {files.join(place.url, "evaluation.json")}')


def _start_processes() -> None:
  """Joins the other processes of a run, where there are some; keeps what is compiled."""
  from kr_jax import processes
  if _COORDINATOR.value:
    processes.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  library.keep(_workdirs()[0], _config(_MODE.value)['checkpoint']['directory'])


def _end_if_users(error: BaseException) -> None:
  """Ends the process with one line where an error is the user's."""
  if errors.is_users(error):
    sys.exit(f'error: {" ".join(str(error).split())}')


def _train() -> None:
  from kr_jax import mirror
  from kr_jax import phases
  from kr_jax import processes
  from kr_jax import train
  from kr_jax.record import log
  phases.start(_BEGAN)
  try:
    hardware = _hardware()
    _start_processes()
  except ValueError as error:
    _end_if_users(error)
    raise
  with processes.watch(), errors.told(), contextlib.ExitStack() as context:
    stopping = context.enter_context(processes.StopSignal())
    with stopping.ends():
      stopping.check()
    try:
      context.enter_context(library.held(_CONFIG.value, _workdirs()[0]))
      place = context.enter_context(mirror.opened(_workdirs()[0], create=True))
      context.enter_context(log.kept(place.path))
      if not arguments.is_given(sys.argv, 'hardware'):
        hardware = library.priced(place.path) or hardware
      setup = library.begin(_CONFIG.value, place.path)
    except ValueError as error:  # later ones are ours, and keep their traceback
      _end_if_users(error)
      raise
    train.train(setup, place.path, hardware, profile=arguments.profiled(_PROFILE.value), stopping=stopping)
    if processes.is_first():
      library.summarize(place.path)
      print(f'done: {setup.config.num_steps} steps; see {files.join(place.url, "summary.json")} and '
            f'{files.join(place.url, "plots")}')
      library.say_closing(setup.config, place.path, hardware)


_RUN = {'train': _train, 'evaluate': _evaluate, 'report': _report, 'advise': _advise, 'rollouts': _rollouts,
        'replay': _replay, 'export': _export, 'generate': _generate, 'preflight': _preflight}


def main(argv: list[str]) -> None:
  del argv  # `parse` has seen to it
  logging.set_verbosity(logging.WARNING)  # Orbax and TFDS report each file otherwise
  mode = _MODE.value
  if found := _problems(mode):
    for problem in found:
      print(f'error: {problem}', file=sys.stderr)
    sys.exit(exits.FAILED)
  library.quiet_libtpu(uses_tpu=mode != 'preflight')
  try:
    with errors.told():
      sys.exit(stopping_lib.uninterrupted(_RUN[mode]))
  except BrokenPipeError:
    raise
  except (ValueError, OSError) as error:  # such as a disk that is full or cannot be written
    found = files.explained(error, next(iter([*filter(None, [_OUTPUT.value]), *_workdirs()]), '.'), 'the output')
    if mode == 'train' and not isinstance(found, files.Unsaved):
      raise
    if mode != 'train':
      if found is error:
        _end_if_users(error)
        raise
      sys.exit(f'error: {found}')
    print(f'error: {found}', file=sys.stderr)
    # A new start finds out at once whether a bucket can be written; a disk is full until somebody frees some room.
    sys.exit(exits.AGAIN if found.again else exits.FAILED)
  except SystemExit as stop:
    if isinstance(stop.code, int) and stop.args and isinstance(stop.args[0], str):  # of processes.StopSignal
      print(stop.args[0], file=sys.stderr)
    raise
  finally:
    gc.freeze()  # the interpreter's end takes a third of a second otherwise, looking for garbage


def command() -> None:
  """The console command `kr_jax`, which finds modules where it is started, as `python -m kr_jax.main` does."""
  sys.path.insert(0, os.getcwd())
  start()


def start() -> None:
  """Runs the command line of this process."""
  progress.harden()
  listener = stopping_lib.interrupt()
  try:
    app.run(main, flags_parser=parse)
  except BrokenPipeError:  # whoever read the output has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except KeyboardInterrupt:
    if not listener or not listener.told or listener.is_hurried:  # else it was said that it stops
      is_train = flags.FLAGS.is_parsed() and _MODE.value == 'train'
      print(f'interrupted{"; the same command again goes on from the last checkpoint" * is_train}', file=sys.stderr)
    sys.exit(listener.code if listener and listener.told else exits.INTERRUPTED)
  finally:
    stopping_lib.ending(is_alone=not _COORDINATOR.present)


if __name__ == '__main__':
  start()
