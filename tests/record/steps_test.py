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
OUTCOMES = {name: i for i, name in enumerate(rewards.OUTCOMES)}


def scores_of(*outcomes, reward=(1, 0, 0.5, 0, 0), examples=()):
  return rewards.Scores(np.array([OUTCOMES[name] for name in outcomes], np.int8), np.float32(reward), examples)


SCORES = scores_of('right', 'no_answer', 'right', 'wrong', 'none')
TASKS = [types.Task(id=f't{i}', index=i, prompt='', answer=f'{i}!', difficulty=0, solution='', tokens=(),
                    source=source, verifier=verifier)
         for i, (source, verifier) in enumerate([('sums', ''), ('quiz', 'choice'), ('sums', '')])]
UPDATE = [{'loss': np.float32(2), 'grad_norm': np.float32(1), 'tokens_updated': 4, 'clipped_low': 1.0,
           'clipped_high': 0.0, 'policy_entropy': 2.0, 'logp_error': 0.5, 'ratios': np.zeros(241, int),
           'padding_waste': 0.25, 'attention_waste': 0.5}]
EVALUATION = {'eval/avg@8': 0.5, 'eval/avg@8_stderr': 0.1, 'eval/unverified': 0.0}


def measured(scores=SCORES):
  return steps.measure(knobs.Alloc(), estimate.init(3), BUDGET_M, ROLLOUTS, 2, 4.0, scores)


def test_the_figures_of_a_step():
  found = measured()
  want = {
      'reward_mean': 1.5 / 4, 'success_rate': 2 / 4, 'effective_gradient_ratio': 3 / 4, 'mixed_tasks': 1,
      'budget_min': 0, 'budget_max': 3, 'rollouts_total': 4, 'tokens_generated': 8, 'truncated': 1 / 4,
      'slot_utilization': 8 / (8 * 2), 'tail_share': 2 / 8, 'refills': 3, 'tokens_per_s': 2.0,
      'tokens_prefilled': 5 + 7, 'entropy': 12 / 8, 'nu': 2.0, 'unverified': 0,
      'no_answer': 1 / 4, 'unverified_timeout': 0}
  assert {name: found[name] for name in want} == pytest.approx(want)
  # Nothing was seen: all tasks have the prior, whose mean is 1/2.
  assert found['budget_by_success_rate'] == [None] * 5 + [pytest.approx(4 / 3)] + [None] * 4
  assert json.loads(json.dumps(found)) == found


SAMPLING = ('rollouts_total', 'tokens_generated', 'truncated', 'slot_utilization', 'entropy', 'tokens_prefilled')


def test_unverified_rollouts_have_no_reward_and_their_tokens_count():
  """Of the first group the third is left out, of the second the only one."""
  found = measured(scores_of('right', 'no_answer', 'timeout', 'abstained', 'none', reward=(1, 0.25, 0, 0, 0)))
  want = {'reward_mean': 1.25 / 2, 'success_rate': 1 / 2, 'effective_gradient_ratio': 2 / 4, 'mixed_tasks': 1,
          'budget_min': 0, 'budget_max': 3, 'unverified': 1 / 2, 'no_answer': 1 / 4, 'unverified_timeout': 1,
          'unverified_abstained': 1, 'unverified_died': 0}
  assert {name: found[name] for name in want} == want
  before = measured()
  assert {name: found[name] for name in SAMPLING} == {name: before[name] for name in SAMPLING}


def test_a_timeout_beside_a_right_rollout_makes_no_mixed_group():
  found = measured(scores_of('right', 'timeout', 'right', 'right', 'none'))
  assert (found['success_rate'], found['mixed_tasks'], found['effective_gradient_ratio']) == (1, 0, 0)


def test_rewards_are_unknown_where_nothing_is_verified():
  found = measured(scores_of(*['died'] * 4, 'none', reward=[0] * 5))
  assert found['reward_mean'] is found['success_rate'] is None and found['unverified'] == 1
  assert found['mixed_tasks'] == found['effective_gradient_ratio'] == 0 and found['budget_max'] == 3
  assert json.loads(json.dumps(found, allow_nan=False)) == found


def record_of(workdir, first_step=0):
  decode = lambda token_C: f'{len(token_C)} tokens'
  return steps.Record(knobs.Config(num_steps=9), str(workdir), first_step, decode)


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def note(record, step, update=UPDATE, scores=SCORES, rollouts=ROLLOUTS, tasks=TASKS):
  record.step(step, estimate.init(3), tasks, BUDGET_M, rollouts, 2, 4.0, scores, update)


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
    record.evaluation(2, EVALUATION)
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
      record.evaluation(step, EVALUATION)
      note(record, step)
    record.flush()
  with record_of(tmp_path, first_step=1) as record:
    assert [(row['step'], 'loss' in row) for row in lines(tmp_path)] == [(0, False), (0, True), (1, False)]
    record.evaluation(3, EVALUATION)
  wall_s = [row['wall_s'] for row in lines(tmp_path)]
  assert wall_s == sorted(wall_s) and all(math.isfinite(x) for x in wall_s)


def test_verdicts_by_dataset_and_verifier(tmp_path, capsys):
  """In the record and, where something is wrong with them, on the screen."""
  with record_of(tmp_path) as record:
    note(record, 0)
    record.flush()
    note(record, 1, scores=scores_of('right', 'timeout', 'no_answer', 'no_answer', 'none', examples=('too slow',)))
    record.flush()
  first, second = lines(tmp_path)
  assert set(first['verification']) == {'sums/ends_with', 'quiz/choice'} and first['alarms'] == []
  kinds = ('groups', 'right', 'wrong', 'no_answer', 'truncated_without_answer', 'timeout')
  of = lambda row: {name: [x[kind] for kind in kinds] for name, x in row['verification'].items()}
  assert of(first) == {'sums/ends_with': [1, 2, 0, 1, 0, 0], 'quiz/choice': [1, 0, 1, 0, 0, 0]}
  assert of(second) == {'sums/ends_with': [1, 1, 0, 1, 0, 1], 'quiz/choice': [1, 0, 0, 1, 1, 0]}
  said = 'step 1: unverified and left out: 1 of 4 rollouts (sums/ends_with timeout 1); for example: too slow'
  assert second['alarms'] == [said]
  shown = capsys.readouterr()
  assert said in shown.out and 'unverified=25%' in shown.err


def test_an_alarm_shows_the_last_wrong_answer_and_counts_over_a_resume(tmp_path, capsys):
  """Of groups of 8 and 1: the 64th group of sums is that of step 63, its 512th answer too."""
  budget_M = np.array([8, 1, 0])
  rollouts = ROLLOUTS._replace(
      task_R=np.repeat([0, 1, 3], [8, 1, 1]), token_RC=np.zeros((10, 4), np.int32), length_R=np.full(10, 3),
      logp_RC=np.zeros((10, 4), np.float32), ended_R=np.ones(10, int))
  scores = scores_of(*['wrong'] * 7, 'wrong', 'right', 'none', reward=[0] * 10)

  def go_on(first, last):
    with record_of(tmp_path, first) as record:
      for step in range(first, last):
        record.step(step, estimate.init(3), TASKS, budget_M, rollouts, 2, 4.0, scores, UPDATE)
        record.flush()

  go_on(0, 40)
  go_on(40, 66)
  alarms = {row['step']: row['alarms'] for row in lines(tmp_path) if row['alarms']}
  assert [*alarms] == [63]
  assert "512 answers of sums/ends_with none was right; the last one ends '3 tokens', where the answer is '0!'" in (
      alarms[63][0])
  assert alarms[63][0] in capsys.readouterr().out


def test_an_unknown_score_is_shown_as_such(tmp_path, capsys):
  unknown = EVALUATION | {'eval/avg@8': None, 'eval/avg@8_stderr': None, 'eval/unverified': 1.0}
  with record_of(tmp_path) as record:
    record.evaluation(0, unknown)
    note(record, 0, scores=scores_of(*['died'] * 4, 'none', reward=[0] * 5))
    record.flush()
  assert lines(tmp_path)[0]['eval/avg@8'] is None and lines(tmp_path)[1]['reward_mean'] is None
  shown = capsys.readouterr()
  assert 'avg@8 of held-out tasks unknown ± unknown; 100.0% of rollouts unverified' in shown.out
  assert 'reward=unknown' in shown.err
