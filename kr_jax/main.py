"""Flags -> train | evaluate | report | export | generate.

    python -m kr_jax.main --config=configs/arithmetic.py --workdir=runs/arithmetic \
        --config.alloc.rule=uniform
    python -m kr_jax.main --mode=generate --checkpoint=smollm2-135m-instruct --prompt='What is 3 + 4?'

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
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'evaluate', 'report', 'export', 'generate'],
                          'train: the loop, then the report; evaluate: the latest checkpoint on '
                          'held-out tasks, a table and evaluation.json; report: summary.json and '
                          'plots/ from metrics.jsonl; export: the latest checkpoint as transformers reads '
                          'it, in --output; generate: what --checkpoint writes after --prompt')
_OUTPUT = flags.DEFINE_string('output', None, 'export: directory to write; unless set, WORKDIR/export')
_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'generate: what config.policy.checkpoint takes')
_PROMPT = flags.DEFINE_multi_string('prompt', None, 'generate: a text; may be given several times')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, 'generate: of sampling; 0 is greedy', lower_bound=0)
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 64, 'generate: most tokens to write', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'generate: of sampling', lower_bound=0)
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, "of several processes: 'HOST:PORT' of the first, or 'auto', which asks Cloud TPU, "
    'GKE or Slurm for all three')
_PROCESSES = flags.DEFINE_integer('processes', 0, 'how many there are')
_PROCESS = flags.DEFINE_integer('process', -1, 'which this is, from 0')
_NEEDED = {'generate': ('checkpoint', 'prompt')}  # flags of a mode


@flags.multi_flags_validator(
    ['mode', 'config', 'workdir', 'checkpoint', 'prompt'], 'a flag that the mode needs is not given: '
    '--checkpoint and --prompt of generate, --config and --workdir of the others')
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
    names = {name for arg in argv if arg.startswith('--config.')
             for name in arg.partition('=')[0].split('.')}
    if not any(repr(name) in str(error) or f"'{name}" in str(error) for name in names):
      raise
    sys.exit(f'unknown knob of --config: {error.args[0]}')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f'unexpected arguments {argv[1:]}; flags start with --')
  logging.set_verbosity(logging.WARNING)  # Orbax and TFDS report each file otherwise
  from kr_jax import evaluate  # heavy: see above
  from kr_jax import generate
  from kr_jax import processes
  from kr_jax import report
  from kr_jax import train
  workdir = _WORKDIR.value
  try:
    if _MODE.value == 'generate':
      written = generate.texts(_CHECKPOINT.value, _PROMPT.value, temperature=_TEMPERATURE.value,
                               max_tokens=_MAX_TOKENS.value, seed=_SEED.value)
      print('\n\n'.join(written))
      return
    if _MODE.value == 'report':
      print(json.dumps(report.write(workdir), indent=1))
      return
    if _COORDINATOR.value:
      processes.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    setup = train.prepare(_CONFIG.value)
    if _MODE.value == 'evaluate':
      evaluation = train.evaluate_checkpoint(setup, workdir)
      path = os.path.join(workdir, 'evaluation.json')
      if not processes.is_first():
        return
      print(f'step {evaluation["step"]}, temperature {setup.evaluate.temperature}\n'
            f'{evaluate.table(evaluation)}')
      report.save(path, evaluation)
      print(f'see {path}')
      return
    if _MODE.value == 'export':
      output = _OUTPUT.value or os.path.join(workdir, 'export')
      print(f'step {train.export_checkpoint(setup, workdir, output)}; see {output}')
      return
    train.claim(setup, workdir)
  except ValueError as error:  # the user's; later ones are ours, and keep their traceback
    sys.exit(f'error: {error}')
  with processes.watch():
    train.train(setup, workdir)
  if processes.is_first():
    report.write(workdir)
    print(f'done: {setup.config.num_steps} steps; see {os.path.join(workdir, "summary.json")} and '
          f'{os.path.join(workdir, "plots")}')


if __name__ == '__main__':
  app.run(main, flags_parser=_parse)
