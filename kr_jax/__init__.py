"""Reinforcement learning of language models with knapsack-allocated rollouts.

    run = kr_jax.run('arithmetic:debug', 'runs/debug')      # trains, or goes on
    run = kr_jax.read('runs/debug')                          # the record of a run

`run` and `read` need the extra `train`; `config` and kr_jax.allocation do not. Imports nothing before it is used.
"""

from __future__ import annotations

import importlib

__version__ = '0.1.0'


def run(config, workdir, *, on_step=None, hardware=None):
  """Trains, and returns the record of the run: steps, evaluations, tasks and rollouts as numpy columns.

  The same call again goes on where the run stopped. The first interrupt (Ctrl-C, a notebook's stop button) ends the
  step that runs, saves, and returns what there is.

  Args:
    config: a ConfigDict, as kr_jax.config gives it; or a name: 'arithmetic', 'arithmetic:debug', 'FILE.py'.
    workdir: directory of the run; a path or gs://BUCKET/RUN.
    on_step: called with each line of metrics.jsonl as it is written: steps have 'reward_mean', evaluations
      'eval/avg@N'. What it raises ends the run.
    hardware: what the run is priced by: a config, or its name as --hardware takes it; None: the shipped profiles.

  Raises:
    ImportError: the extra `train` is not installed.
    ValueError: knobs or files are wrong (all that is wrong is said at once), the workdir is another run's, or a run
      goes on in this process already.
    FloatingPointError: the policy is not finite, or the updates of too many steps in a row (train.max_bad_steps).
  """
  return _module('library', 'run').run(config, workdir, on_step=on_step, hardware=hardware)


def config(name):
  """A config to change and to run: a ConfigDict of all knobs, which are checked when it is run.

  name: of a shipped config, 'arithmetic' or 'arithmetic:debug'; or a file, 'FILE.py:VARIANT'.
  """
  return _module('shipped', 'config').config(name)


def read(workdir):
  """The record of a run, on this machine or in a bucket: steps, evaluations, tasks and rollouts as numpy columns."""
  return _module('reader', 'read').read(workdir)


def _module(name, what):
  """A module of the package. Raises ImportError that names the extra, where what it needs is not installed."""
  try:
    return importlib.import_module(f'kr_jax.{name}')
  except ModuleNotFoundError as error:
    if (error.name or '').split('.')[0] == 'kr_jax':
      raise
    raise ImportError(f"kr_jax.{what} needs {error.name}, which is not installed; the extra `train` brings it: "
                      "pip install 'kr_jax[train]'") from error
