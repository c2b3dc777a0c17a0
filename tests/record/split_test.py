"""The training tasks of a run, and statistics that follow from its metrics."""

import numpy as np
import pytest

from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.record import split


def _tasks(n):
  return [types.Task(f'sum/{i}', i, '', '', i % 3, '', (), source='sums' if i < 6 else 'other') for i in range(n)]


def _stats(n, groups=16):
  return estimate.init(n, groups=groups, stratum_I=np.arange(n) % 2,
                       prior_rate_I=np.where(np.arange(n) == 1, 0.25, np.nan))


def test_what_is_written_is_read(tmp_path):
  assert split.read(str(tmp_path)) is None
  split.write(str(tmp_path), _tasks(9), _stats(9))
  split.write(str(tmp_path), _tasks(2), _stats(2))  # a run that goes on: it is there
  found = split.read(str(tmp_path))
  assert found.id_I[8] == 'sum/8' and found.source_I[5:7] == ['sums', 'other']
  assert found.difficulty_I.tolist() == [0, 1, 2] * 3 and found.stratum_I.tolist() == [0, 1] * 4 + [0]
  assert found.known_OI[:, 1].tolist() == [3.0, 1.0] and found.known_OI.sum() == 4


@pytest.mark.parametrize('content', [b'', b'no zstd', 'half'])
def test_a_file_that_is_damaged_is_said(tmp_path, content):
  split.write(str(tmp_path), _tasks(9), _stats(9))
  path = tmp_path / split.FILE
  path.write_bytes(path.read_bytes()[:40] if content == 'half' else content)
  with pytest.raises(ValueError, match='tasks.jsonl.zst cannot be read'):
    split.read(str(tmp_path))


def test_statistics_follow_from_counts(tmp_path):
  """Posteriors, recalibrated and of strata, of what the run observed rollout by rollout in any order."""
  rng, n = np.random.default_rng(0), 9
  split.write(str(tmp_path), _tasks(n), _stats(n))
  stats, of_steps = _stats(n), []
  for step in range(6):
    index_M, budget_M = rng.permutation(n)[:4], rng.integers(0, 20, 4)
    task_R = rng.permutation(np.repeat(np.arange(4), budget_M))
    verdict_R, is_verified_R = rng.random(len(task_R)) < 0.2 + 0.1 * index_M[task_R], rng.random(len(task_R)) < 0.8
    if step == 3:
      is_verified_R[:] = False
    count = lambda which_R: np.bincount(task_R[which_R], minlength=4)
    record = {'step': step, 'group_index': index_M.tolist(), 'group_budget': budget_M.tolist(),
              'group_right': count(verdict_R & is_verified_R).tolist(), 'group_verified': count(is_verified_R).tolist()}
    of_steps.append(split.groups(record, n))
    if is_verified_R.any():
      stats = estimate.observe(stats, index_M, np.where(is_verified_R, task_R, 4), verdict_R.astype(float),
                               np.full(len(task_R), 7), discount=0.5)
  found = split.replay(split.read(str(tmp_path)), of_steps, pass_discount=0.5, recalibration_groups=16)
  expected, got = (estimate.posterior(x, np.arange(n)) for x in (stats, found))
  np.testing.assert_allclose(got, expected, rtol=1e-12)
  assert np.abs(found.calibration - estimate.recalibrate.NONE).max() > 0.01  # it was fitted


def test_where_the_calibration_began_is_no_more_to_be_seen(tmp_path, monkeypatch):
  rng, n = np.random.default_rng(1), 30
  split.write(str(tmp_path), _tasks(n), _stats(n, groups=24))
  read, of_steps = split.read(str(tmp_path)), []
  for step in range(40):
    index_M = rng.permutation(n)[:6]
    right_M = rng.binomial(9, (0.1 + 0.02 * index_M) * min(1, step / 20))  # of a policy that learns
    of_steps.append(split.Groups(index_M, np.full(6, 9), right_M, np.full(6, 9)))
  found = []
  for fitted in (100, 30, 3):
    monkeypatch.setattr(split, '_FITTED', fitted)
    found.append(split.replay(read, of_steps, pass_discount=0.5, recalibration_groups=24).calibration)
  np.testing.assert_allclose(found[1], found[0], atol=1e-6)
  assert np.abs(found[2] - found[0]).max() > 0.01


@pytest.mark.parametrize('changed', [
    {'group_index': [0, 9]}, {'group_index': [0, 0]}, {'group_index': [0]}, {'group_right': None},
    {'group_right': [3, 0]}, {'group_verified': [2, 4]}, {'group_budget': [2, 'x']}, {'group_budget': [2, True]}])
def test_counts_that_are_none(changed):
  record = {'group_index': [0, 1], 'group_budget': [2, 3], 'group_right': [2, 0], 'group_verified': [2, 1]}
  assert split.groups(record, 9).verified_M.tolist() == [2, 1]
  assert split.groups(record | changed, 9) is None
