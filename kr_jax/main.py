"""Flags -> train | evaluate | report.

    python -m kr_jax.main --config=configs/arithmetic.py --workdir=runs/arithmetic \
        --config.alloc.rule=uniform

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
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'evaluate', 'report'],
                          'train: the loop, then the report; evaluate: the latest checkpoint on '
                          'held-out tasks, a table and evaluation.json; report: summary.json and '
                          'plots/ from metrics.jsonl')
flags.mark_flags_as_required(['config', 'workdir'])


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
  from kr_jax import report
  from kr_jax import train
  workdir = _WORKDIR.value
  try:
    if _MODE.value == 'report':
      print(json.dumps(report.write(workdir), indent=1))
      return
    setup = train.prepare(_CONFIG.value)
    if _MODE.value == 'evaluate':
      evaluation = train.evaluate_checkpoint(setup, workdir)
      path = os.path.join(workdir, 'evaluation.json')
      print(f'step {evaluation["step"]}, temperature {setup.evaluate.temperature}\n'
            f'{evaluate.table(evaluation)}')
      report.save(path, evaluation)
      print(f'see {path}')
      return
    train.claim(setup, workdir)
  except ValueError as error:  # the user's; later ones are ours, and keep their traceback
    sys.exit(f'error: {error}')
  train.train(setup, workdir)
  report.write(workdir)
  print(f'done: {setup.config.num_steps} steps; see {os.path.join(workdir, "summary.json")} and '
        f'{os.path.join(workdir, "plots")}')


if __name__ == '__main__':
  app.run(main, flags_parser=_parse)
