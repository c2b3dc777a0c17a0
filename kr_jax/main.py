"""Flags -> train | evaluate | report | export | generate | preflight.

    python -m kr_jax.main --config=configs/arithmetic.py --workdir=runs/arithmetic \
        --config.alloc.rule=uniform
    python -m kr_jax.main --mode=generate --checkpoint=smollm2-135m-instruct --prompt='What is 3 + 4?'
    python -m kr_jax.main --mode=preflight --config=configs/qwen3_4b.py --topology=v5e:4x4

Only flags are read at import: the verifier processes load this module too.
"""

from __future__ import annotations

import json
import os
import sys

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'configs/NAME.py, or configs/NAME.py:debug for seconds instead of minutes; '
    '--config.SECTION.KNOB=VALUE sets a knob', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'directory of the run; a run in it is gone on with')
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'evaluate', 'report', 'export', 'generate',
                                           'preflight'],
                          'train: the loop, then the report; evaluate: the latest checkpoint on '
                          'held-out tasks, a table and evaluation.json; report: summary.json and '
                          'plots/ from metrics.jsonl; export: the latest checkpoint as transformers reads '
                          'it, in --output; generate: what --checkpoint writes after --prompt; preflight: what '
                          'the config takes on --topology, by the TPU compiler')
_OUTPUT = flags.DEFINE_string('output', None, 'export: directory to write; unless set, WORKDIR/export')
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
_NEEDED = {'generate': ('checkpoint', 'prompt'), 'preflight': ('config',)}  # flags of a mode


@flags.multi_flags_validator(
    ['mode', 'config', 'workdir', 'checkpoint', 'prompt'], 'a flag that the mode needs is not given: '
    '--checkpoint and --prompt of generate, --config of preflight, --config and --workdir of the others')
def _complete(values):
  return all(values[name] is not None for name in _NEEDED.get(values['mode'], ('config', 'workdir')))


@flags.multi_flags_validator(['mode', 'coordinator'], '--coordinator is of the modes train and evaluate')
def _alone(values):
  return values['coordinator'] is None or values['mode'] in ('train', 'evaluate')


def _parse(argv: list[str]) -> list[str]:
  """Flags, with a short error where the config knows no such knob."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError) as error:
    names = {name for arg in argv if arg.startswith('--config.') for name in arg.partition('=')[0].split('.')}
    if not any(repr(name) in str(error) or f"'{name}" in str(error) for name in names):
      raise
    sys.exit(f'unknown knob of --config: {error.args[0]}')


def _preflight() -> int:
  """Prints what a config takes on each slice, and returns 1 where it does not fit."""
  # The compiler looks for no TPU, and needs none to itself.
  os.environ |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'  # which could not be read without a TPU
  # Unless these are there, it says that they are not.
  for name, value in (('TPU_WORKER_HOSTNAMES', 'localhost'), ('TPU_ACCELERATOR_TYPE', 'v5litepod-16')):
    os.environ.setdefault(name, value)
  from kr_jax import preflight  # heavy: see above
  config, reports = _CONFIG.value, []
  assumed = preflight.Assumed(_EFFICIENCY.value, _MEAN_PROMPT.value, _MEAN_COMPLETION.value)
  for topology in _TOPOLOGY.value or config.topologies:
    report = preflight.run(config, topology, assumed)
    print(preflight.table(report), flush=True)
    if _SUGGEST.value or not report['fits']:
      phases = () if _SUGGEST.value else [name for name, p in report['phases'].items() if not p['fits']]
      report['suggestion'] = preflight.suggest(config, topology, assumed, phases)
      print(preflight.advice(report))
    reports.append(report)
  if not reports:
    raise ValueError('the config names no topologies; say one: --topology=v5e:4x4')
  if _JSON.value:
    with open(_JSON.value, 'w') as f:
      json.dump(reports if len(reports) > 1 else reports[0], f, indent=1)
  return int(not all(report['fits'] for report in reports))


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f'unexpected arguments {argv[1:]}; flags start with --')
  logging.set_verbosity(logging.WARNING)  # Orbax and TFDS report each file otherwise
  if _MODE.value == 'preflight':
    try:
      sys.exit(_preflight())
    except ValueError as error:
      sys.exit(f'error: {error}')
  from kr_jax import evaluate  # heavy: see above
  from kr_jax import generate
  from kr_jax import prepare
  from kr_jax import processes
  from kr_jax import state
  from kr_jax.report import summary
  from kr_jax import train
  workdir = _WORKDIR.value
  try:
    if _MODE.value == 'generate':
      written = generate.texts(_CHECKPOINT.value, _PROMPT.value, temperature=_TEMPERATURE.value,
                               max_tokens=_MAX_TOKENS.value, seed=_SEED.value)
      print('\n\n'.join(written))
      return
    if _MODE.value == 'report':
      print(json.dumps(summary.write(workdir), indent=1))
      return
    if _COORDINATOR.value:
      processes.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if _MODE.value == 'export':
      setup, output = prepare.without_tasks(_CONFIG.value), _OUTPUT.value or os.path.join(workdir, 'export')
      print(f'step {state.export_checkpoint(setup, workdir, output, dtype=_DTYPE.value or "")}; see {output}')
      return
    setup = prepare.prepare(_CONFIG.value)
    if _MODE.value == 'evaluate':
      evaluation = state.evaluate_checkpoint(setup, workdir)
      path = os.path.join(workdir, 'evaluation.json')
      if not processes.is_first():
        return
      print(f'step {evaluation["step"]}, temperature {setup.evaluate.temperature}\n'
            f'{evaluate.table(evaluation)}')
      summary.save(path, evaluation)
      print(f'see {path}')
      return
    train.claim(setup, workdir)
  except ValueError as error:  # the user's; later ones are ours, and keep their traceback
    sys.exit(f'error: {error}')
  with processes.watch():
    train.train(setup, workdir)
  if processes.is_first():
    summary.write(workdir)
    print(f'done: {setup.config.num_steps} steps; see {os.path.join(workdir, "summary.json")} and '
          f'{os.path.join(workdir, "plots")}')


if __name__ == '__main__':
  app.run(main, flags_parser=_parse)
