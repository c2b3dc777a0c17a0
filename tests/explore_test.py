"""Which tasks of a step get how many rollouts, and what each wave knows of the waves before."""

import os

import numpy as np
import pytest

from kr_jax import explore
from kr_jax import knobs
from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.record import metrics
from tests.knobs import run


def test_the_tasks_with_rollouts_are_chosen_in_order():
  """Of twelve tasks the six that were solved always teach nothing."""
  config = knobs.Config(tasks=knobs.Tasks(per_step=4, candidates_per_step=12),
                        alloc=knobs.Alloc(rollouts_per_step=24, low=0, high=8, value='mixed', recalibrate=False))
  stats, task_R = estimate.init(12), np.repeat(np.arange(12), 8)
  right_R = (task_R % 2 == 0) | (np.arange(96) % 2 == 0)  # of odd tasks every second rollout
  for _ in range(4):
    stats = estimate.observe(stats, np.arange(12), task_R, right_R.astype(np.float32), np.full(96, 5),
                             discount=1.0, reward_R=right_R.astype(np.float32))
  tasks = [types.Task(id=str(i), index=i, prompt='', answer='', difficulty=0, solution='', tokens=()) for i in range(12)]
  chosen, budget_M = explore.chosen(config, stats, tasks)
  numbers = [task.index for task in chosen]
  assert len(chosen) == len(budget_M) <= 4 and all(n % 2 for n in numbers) and numbers == sorted(numbers)
  assert budget_M.sum() == 24 and budget_M.min() > 0


@pytest.mark.exhaustive
def test_waves_heed_what_was_not_verified(tmp_path, data_dir):
  """A task whose verifier abstains has rollouts in the first wave, so that it may have more; no group outgrows its
  limit."""
  workdir = run(tmp_path, data_dir, rewards__verifier='tests.graders:abstains', num_steps=4, alloc__waves=2,
                alloc__low=0, alloc__high=6, alloc__value='mixed', tasks__candidates_per_step=12, evaluate__every=0,
                tasks__train_split='train[:24]')
  steps = [r for r in metrics.read(os.path.join(workdir, 'metrics.jsonl')) if 'reward_mean' in r]
  assert all(0 < r['unverified'] < 1 and r['rollouts_total'] == 32 and r['budget_max'] <= 6 for r in steps)
