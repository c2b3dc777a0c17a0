"""Trains a config and records how many rollouts of each task were right and wrong at each step.

    .venv/bin/python -m tests.record_verdicts --config=configs/arithmetic.py --seed=0 --out=tests/data/verdicts

The records are what tests/benchmarks/replay.py judges estimates by. What is held of a step does not depend on the
estimates, but for the budgets.
"""

import argparse
import importlib
import pathlib
import tempfile
from unittest import mock

import numpy as np

from kr_jax import prepare
from kr_jax import train
from kr_jax.allocation import estimate


def run() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', required=True, help='file of a config')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--num_steps', type=int, default=0, help="0: the config's")
  parser.add_argument('--out', type=pathlib.Path, required=True, help='folder of NAME_SEED.npz')
  parser.add_argument('--workdir', default='', help="'': a temporary folder")
  args = parser.parse_args()
  config = importlib.import_module(f'configs.{pathlib.Path(args.config).stem}').get_config().unlock()
  config.seed = args.seed
  config.num_steps = args.num_steps or config.num_steps
  config.evaluate.every, config.evaluate.tasks, config.evaluate.rollouts = 0, 8, 1
  steps, observe = [], estimate.observe

  def observed(stats, index_M, task_R, verdict_R, length_R, **options):
    task_R, verdict_R, length_R = map(np.asarray, (task_R, verdict_R, length_R))
    there_R, M = task_R < len(index_M), len(index_M)
    of_outcome = lambda weight_R, outcome: np.bincount(
        task_R[there_R], np.where(verdict_R == outcome, weight_R, 0)[there_R], minlength=M)
    ones_R = np.ones(len(task_R))
    steps.append((index_M, *(of_outcome(x_R, outcome) for x_R in (ones_R, length_R) for outcome in (1, 0))))
    return observe(stats, index_M, task_R, verdict_R, length_R, **options)

  with mock.patch.object(estimate, 'observe', observed), tempfile.TemporaryDirectory() as temporary:
    setup = prepare.prepare(config)
    train.train(setup, args.workdir or temporary)
  index_TM, right_TM, wrong_TM, right_tokens_TM, wrong_tokens_TM = (np.stack(x_T) for x_T in zip(*steps))
  args.out.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(
      args.out / f'{pathlib.Path(args.config).stem}_{args.seed}.npz', index_TM=index_TM.astype(np.int16),
      right_TM=right_TM.astype(np.uint8), wrong_TM=wrong_TM.astype(np.uint8),
      right_tokens_TM=right_tokens_TM.astype(np.uint16), wrong_tokens_TM=wrong_tokens_TM.astype(np.uint16),
      difficulty_I=np.array([task.difficulty for task in setup.train_tasks], np.int8))


if __name__ == '__main__':
  run()
