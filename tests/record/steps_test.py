"""The figures of a step by hand, and when they are written."""

import json
import math

import numpy as np
import pytest

from kr_jax import knobs
from kr_jax import rewards
from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.record import steps

# Three tasks with 3, 1 and 0 of 4 rollouts; and one place that holds no rollout.
BUDGET_M = np.array([3, 1, 0])
ROLLOUTS = types.Rollouts(
    types.Prompts(np.zeros((3, 9), np.int32), np.array([5, 7, 9]), np.array([0, 1, 2])),
    task_R=np.array([0, 0, 0, 1, 3]), token_RC=np.zeros((5, 4), np.int32),
    logp_RC=np.array([[-1.0, -2, 0, 0], [-1, 0, 0, 0], [-4, 0, 0, 0], [-1, -1, -1, -1], [0, 0, 0, 0]], np.float32),
    length_R=np.array([2, 1, 1, 4, 0]), ended_R=np.array([1, 1, 1, 2, 0]), decode_steps=np.int32(8),
    tail_steps=np.int32(2), refills=np.int32(3))
SCORES = rewards.Scores(np.float32([1, 0, 1, 0, 0]), np.float32([1, 0, 0.5, 0, 0]), 1, 2)
UPDATE = [{'loss': np.float32(2), 'grad_norm': np.float32(1), 'tokens_updated': 4, 'clipped_low': 1.0,
           'clipped_high': 0.0, 'policy_entropy': 2.0, 'logp_error': 0.5, 'ratios': np.zeros(241, int),
           'padding_waste': 0.25, 'attention_waste': 0.5}]


def measured():
  return steps.measure(knobs.Alloc(), estimate.init(3), BUDGET_M, ROLLOUTS, 2, 4.0, SCORES)


def test_the_figures_of_a_step():
  found = measured()
  want = {
      'reward_mean': 1.5 / 4, 'success_rate': 2 / 4, 'effective_gradient_ratio': 3 / 4, 'mixed_tasks': 1,
      'budget_min': 0, 'budget_max': 3, 'rollouts_total': 4, 'tokens_generated': 8, 'truncated': 1 / 4,
      'slot_utilization': 8 / (8 * 2), 'tail_share': 2 / 8, 'refills': 3, 'tokens_per_s': 2.0,
      'tokens_prefilled': 5 + 7, 'entropy': 12 / 8, 'nu': 2.0, 'verifier_timeouts': 1, 'verifier_errors': 2}
  assert {name: found[name] for name in want} == pytest.approx(want)
  # Nothing was seen: all tasks have the prior, whose mean is 1/2.
  assert found['budget_by_success_rate'] == [None] * 5 + [pytest.approx(4 / 3)] + [None] * 4
  assert json.loads(json.dumps(found)) == found


def record_of(workdir, first_step=0):
  return steps.Record(knobs.Config(num_steps=9), str(workdir), first_step)


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def note(record, step, update=UPDATE):
  record.step(step, estimate.init(3), BUDGET_M, ROLLOUTS, 2, 4.0, SCORES, update)


def test_a_step_is_written_one_step_late(tmp_path):
  with record_of(tmp_path) as record:
    note(record, 0)
    assert lines(tmp_path) == []
    record.flush()
    record.flush()
    assert [row['step'] for row in lines(tmp_path)] == [0]
    row = lines(tmp_path)[0]
    assert row['loss'] == 2 and row['clip_fraction_low'] == 0.25 and row['compile_count'] >= 0
    note(record, 1)
    record.evaluation(2, {'eval/avg@8': 0.5, 'eval/avg@8_stderr': 0.1})
    assert [row['step'] for row in lines(tmp_path)] == [0, 1, 2]
    assert record.has_evaluation(2) and not record.has_evaluation(1)


def test_a_loss_that_is_not_finite_is_never_written(tmp_path):
  for broken in ({'loss': np.float32('nan')}, {'grad_norm': np.float32('inf')}):
    with record_of(tmp_path) as record:
      note(record, 4, [UPDATE[0] | broken])
      with pytest.raises(FloatingPointError, match=rf'{[*broken][0]} is (nan|inf) at step 4; .*learning_rate'):
        record.flush()
    assert lines(tmp_path) == []


def test_a_resumed_run_keeps_what_it_will_not_repeat(tmp_path):
  """Of its first step an evaluation, which was taken before it, and no figures."""
  with record_of(tmp_path) as record:
    for step in range(3):
      record.evaluation(step, {'eval/avg@8': 0.5, 'eval/avg@8_stderr': 0.1})
      note(record, step)
    record.flush()
  with record_of(tmp_path, first_step=1) as record:
    assert [(row['step'], 'loss' in row) for row in lines(tmp_path)] == [(0, False), (0, True), (1, False)]
    record.evaluation(3, {'eval/avg@8': 0.5, 'eval/avg@8_stderr': 0.1})
  wall_s = [row['wall_s'] for row in lines(tmp_path)]
  assert wall_s == sorted(wall_s) and all(math.isfinite(x) for x in wall_s)
