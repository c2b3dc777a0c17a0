"""Which tasks of a step get how many rollouts, and what each wave knows of the waves before."""

import os

import numpy as np
import pytest

from kr_jax import explore
from kr_jax import knobs
from kr_jax import rewards
from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.record import metrics
from kr_jax.rewards import verdicts
from tests.knobs import run

TASKS = [types.Task(id=str(i), index=i, prompt='', answer='', difficulty=0, solution='', tokens=()) for i in range(12)]


def test_the_tasks_with_rollouts_are_chosen_in_order():
  """Of twelve tasks the six that were solved always teach nothing."""
  config = knobs.Config(tasks=knobs.Tasks(per_step=4, candidates_per_step=12),
                        alloc=knobs.Alloc(rollouts_per_step=24, low=0, high=8, value='mixed', recalibrate=False))
  stats, task_R = estimate.init(12), np.repeat(np.arange(12), 8)
  right_R = (task_R % 2 == 0) | (np.arange(96) % 2 == 0)  # of odd tasks every second rollout
  for _ in range(4):
    stats = estimate.observe(stats, np.arange(12), task_R, right_R.astype(np.float32), np.full(96, 5),
                             discount=1.0, reward_R=right_R.astype(np.float32))
  chosen, budget_M = explore.chosen(config, stats, TASKS)
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


# Dynamic sampling.


def test_every_candidate_of_dynamic_sampling_has_the_budget_of_uniform():
  config = knobs.Config(tasks=knobs.Tasks(per_step=4, candidates_per_step=12),
                        alloc=knobs.Alloc(rule='dynamic', rollouts_per_step=24, low=0))
  tasks, budget_X = explore.chosen(config, estimate.init(12), TASKS)
  assert tasks == TASKS and budget_X.tolist() == [6] * 12


PROMPTS = types.Prompts(np.arange(12).reshape(6, 2), np.full(6, 2), np.arange(20, 26))


def batch_of(k, *groups):
  """Batch k of two groups of two rollouts, 'r' right, 'w' wrong, '?' unverified, and a row beyond them. Token and
  reward of rollout r are 10 k + r + 1."""
  outcome = {'r': verdicts.RIGHT, 'w': verdicts.WRONG, '?': verdicts.TIMEOUT}
  of = types.Rollouts(
      types.Prompts(*(x[2 * k:2 * k + 2] for x in PROMPTS)), np.array([0, 0, 1, 1, 2]),
      np.array([[10 * k + r + 1] for r in range(4)] + [[0]]), np.float32([[-1]] * 4 + [[0]]), np.array([1, 1, 1, 1, 0]),
      np.array([types.ENDED_STOP] * 4 + [types.NOT_SAMPLED]), np.int32(7))
  return explore.Sampled(of, rewards.Scores(
      np.array([outcome[x] for x in ''.join(groups)] + [verdicts.NONE], np.int8),
      np.float32([*of.token_RC[:4, 0], 0]), (f'of {k}',)), 0.5)


@pytest.mark.parametrize('batches, learnt, names, rows', [
    # The second group of the second batch is mixed, too, and one too many.
    ([('rw', 'rr'), ('wr', 'rw')], [1, 2, 11, 12], ['0', '2'], [0, 1, 4, 5]),
    ([('rw', 'wr')], [1, 2, 3, 4], ['0', '1'], [0, 1, 2, 3]),
    # One group is mixed of all candidates; the first other stands beside it. What is not verified mixes no group.
    ([('rr', 'ww'), ('r?', 'ww'), ('rr', 'rw')], [23, 24], ['0', '5'], [10, 11]),
    ([('ww', 'ww')] * 3, [], ['0', '1'], [])])
def test_the_first_mixed_groups_are_learnt_from_by_hand(batches, learnt, names, rows):
  found = explore.of_batches([batch_of(k, *groups) for k, groups in enumerate(batches)], TASKS[:6], PROMPTS,
                             np.full(6, 2), slots=3)
  n, M = len(batches), 2
  # All of the step.
  assert [t.id for t in found.tasks_M] == [str(i) for i in range(n * M)] and found.budget_M.tolist() == [2] * (n * M)
  assert found.rollouts.prompts.index_M.tolist() == list(range(20, 20 + n * M))
  want = [10 * k + r + 1 for k in range(n) for r in range(4)]
  assert np.asarray(found.rollouts.token_RC)[:4 * n, 0].tolist() == want == found.scores.reward_R[:4 * n].tolist()
  beyond = 15 - 4 * n  # the shape is of three batches
  assert found.rollouts.task_R.tolist() == [m for m in range(n * M) for _ in range(2)] + [n * M] * beyond
  assert np.asarray(found.rollouts.length_R).tolist() == [1] * 4 * n + [0] * beyond
  assert found.scores.outcome_R[4 * n:].tolist() == [verdicts.NONE] * beyond == found.scores.reward_R[4 * n:].tolist()
  assert found.scores.examples == tuple(f'of {k}' for k in range(n))
  assert (found.sample_s, found.logp_sum, int(found.rollouts.decode_steps)) == (0.5 * n, -4.0 * n, 7 * n)
  # What the update learns from: R rows, those of two tasks.
  of, there = found.learnt, len(learnt)
  assert [t.id for t in of.tasks_M] == names and of.row_L.tolist() == rows
  assert of.rollouts.prompts.index_M.tolist() == [20 + int(name) for name in names]
  assert len(of.rollouts.task_R) == 5 and np.asarray(of.rollouts.token_RC)[:there, 0].tolist() == learnt
  assert of.scores.reward_R.tolist() == [*learnt, *[0] * (5 - there)]
  assert np.asarray(of.rollouts.length_R).tolist() == [1] * there + [0] * (5 - there)
  task_R = np.asarray(of.rollouts.task_R)
  assert (task_R[there:] == M).all() and np.bincount(task_R[:there], minlength=M).tolist() == of.budget_M.tolist()
  assert [int(names[m]) for m in task_R[:there]] == [want.index(x) // 2 for x in learnt]
  assert verdicts.TIMEOUT not in of.scores.outcome_R
