"""Batches of skipped updates: kept whole, bounded, and read without trust; and what is said of them."""

import os

import numpy as np
import pytest

from kr_jax.allocation import estimate
from kr_jax.learning import guard
from kr_jax.record import bad_steps
from tests.record import steps_test

NAMES = bad_steps.Names(('w', 'b'), ('params.w', 'params.b', 'opt_state.mu'))


def batch_of(step=3, **changed):
  rollouts = steps_test.ROLLOUTS._replace(**changed)
  return bad_steps.batch(step, estimate.init(3), steps_test.TASKS, steps_test.BUDGET_M, rollouts, steps_test.SCORES)


@pytest.mark.parametrize('wave_R', [None, np.array([0, 0, 1, 0, 1])])
def test_a_batch_is_read_as_it_was_written(tmp_path, wave_R):
  wanted = batch_of(wave_R=wave_R)
  bad_steps.save(str(tmp_path), wanted)
  found = bad_steps.load(str(tmp_path), 3)
  assert (found.step, found.ids) == (3, ['t0', 't1', 't2'])
  for name in ('token_RC', 'logp_RC', 'task_R', 'length_R', 'ended_R', 'wave_R'):
    np.testing.assert_array_equal(getattr(found.rollouts, name), getattr(wanted.rollouts, name))
  for mine, other in zip((*found.rollouts.prompts, *found.past, found.outcome_R, found.reward_R, found.budget_M),
                         (*wanted.rollouts.prompts, *wanted.past, wanted.outcome_R, wanted.reward_R, wanted.budget_M)):
    np.testing.assert_array_equal(mine, other)


def test_the_newest_batches_are_kept(tmp_path):
  for step in range(5, 25):
    bad_steps.save(str(tmp_path), batch_of(step))
  assert bad_steps.kept(str(tmp_path)) == list(range(25 - bad_steps.MOST, 25))
  assert bad_steps.load(str(tmp_path)).step == 24
  with pytest.raises(ValueError, match='--step=5: its batch is not kept; there are those of 17, 18, '):
    bad_steps.load(str(tmp_path), 5)
  with pytest.raises(ValueError, match='holds no batch: of this run no update was skipped'):
    bad_steps.load(str(tmp_path / 'other'))


def rewritten(path, **changed):
  with np.load(path) as file:
    arrays = {name: file[name] for name in file.files}
  np.savez(path, **{name: x for name, x in (arrays | changed).items() if x is not None})


@pytest.mark.parametrize('changed', [
    {'token_RC': None}, {'reward_R': np.zeros(3, np.float32)}, {'task_R': np.array([0, 0, 0, 9, 3])},
    {'length_R': np.array([2, 1, 1, 400, 0])}, {'outcome_R': np.full(5, 99)}, {'token_RC': np.zeros((5, 4))},
    {'ids': np.array([{}, {}, {}], object)}, {'token_RC': np.full((5, 4), -1)}], ids=str)
def test_a_damaged_batch_is_refused(tmp_path, changed):
  bad_steps.save(str(tmp_path), batch_of())
  rewritten(bad_steps.path(str(tmp_path), 3), **changed)
  with pytest.raises(ValueError, match=r'3.npz cannot be read as a batch \(.+\); delete it'):
    bad_steps.load(str(tmp_path), 3)


@pytest.mark.parametrize('kept', [0, 4, 100, -40])
def test_a_batch_that_is_cut_is_refused(tmp_path, kept):
  bad_steps.save(str(tmp_path), batch_of())
  path = bad_steps.path(str(tmp_path), 3)
  with open(path, 'rb+') as file:
    file.truncate(kept % os.path.getsize(path))
  with pytest.raises(ValueError, match='3.npz cannot be read as a batch'):
    bad_steps.load(str(tmp_path), 3)


@pytest.mark.parametrize('changed, says', [
    ({'loss': np.nan}, 'the loss is nan; the largest parameter is 3, in params.w'),
    ({'grad_norm': np.inf, 'grad_norms': np.float32([np.nan, np.inf])},
     "the gradient's norm is inf, first in w; the largest parameter is 3, in params.w"),
    ({'grad_norm': np.inf}, "the gradient's norm is inf, most in w; the largest parameter is 3, in params.w"),
    ({'largest': np.float32([3, 2e15, 1])}, 'loss and gradient are finite, and the update would take a value of '
     'params.b to 2e+15'),
    ({'largest': np.float32([3, 1, np.inf])}, 'loss and gradient are finite, and the update would take a value of '
     'opt_state.mu to inf')])
def test_what_is_said_of_a_skipped_update(changed, says):
  done = {'loss': 1.0, 'grad_norm': 2.0, 'skipped': False, 'grad_norms': np.float32([2, 0]),
          'largest': np.float32([3, 1, 1e20])}
  assert bad_steps.why([done, done | {'skipped': True} | changed], NAMES) == says


def test_a_disk_that_is_full_stops_nothing(tmp_path, caplog):
  (tmp_path / bad_steps.FOLDER).write_text('no directory')
  watch = bad_steps.Watch(str(tmp_path), 3, [], NAMES, lambda: None)
  said = watch.step(1, [steps_test.SKIPPED], batch_of, 3, 0.5)
  watch.check()
  assert 'step 3: 1 of 1 updates skipped' in said[0] and 'is not kept for --mode=replay' in caplog.text


def test_bad_steps_before_a_start_count_in_all_processes(tmp_path, monkeypatch):
  """The first process alone has their lines, and all must stop after the same step."""
  first = [{'step': step, 'skipped': int(step > 1)} for step in range(4)]
  told = []
  monkeypatch.setattr(bad_steps.processes, 'of_first', lambda text: told.append(text) or told[0])
  for records in (first, []):
    with pytest.raises(guard.Diverged, match='the updates of steps 2 to 3 were skipped'):
      bad_steps.Watch(str(tmp_path), 2, records, NAMES, lambda: None).check()
