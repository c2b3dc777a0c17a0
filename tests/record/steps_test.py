"""The figures of a step by hand, and when they are written."""

import json
import math

import numpy as np
import optax
import pytest
from scipy import stats as statistics

from kr_jax import knobs
from kr_jax import rewards
from kr_jax import types
from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.learning import guard
from kr_jax.record import bad_steps
from kr_jax.record import rollouts as rollouts_lib
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
FIRST = {'loss': np.float32(2), 'grad_norm': np.float32(1), 'tokens_updated': 4, 'clipped_low': 0.0,
         'clipped_high': 0.0, 'policy_entropy': 2.0, 'logp_error': 0.5, 'ratios': np.zeros(241, int),
         'divergence': 0.25, 'argmax_known': 2, 'argmax_same': 1, 'skipped': False,
         'largest': np.float32([3, 0.5, 2]), 'grad_norms': np.float32([1, 0]),
         'padding_waste': 0.25, 'attention_waste': 0.5}
NAMES = bad_steps.Names(('w', 'b'), ('params.w', 'params.b', 'opt_state.mu'))
UPDATE = [FIRST, FIRST | {'clipped_low': 2.0}]
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


def test_what_is_expected_of_a_step_and_of_uniform_budgets():
  """At the prior, of budgets 3, 1 and 0 and of 2, 1 and 1: a group of one rollout is never mixed."""
  prior = estimate.posterior(estimate.init(3), np.array([0, 1, 2]))
  mixed = lambda n: 1 - statistics.betabinom.pmf([0, n], n, prior.a_M[0], prior.b_M[0]).sum()
  want = {
      'expected_gradient_ratio': 3 * mixed(3) / 4, 'expected_mixed_tasks': mixed(3),
      'uniform_gradient_ratio': 2 * mixed(2) / 4, 'uniform_mixed_tasks': mixed(2)}
  found = measured()
  assert {name: found[name] for name in want} == pytest.approx(want)
  assert found['objective'] > found['uniform_objective'] > 0


def test_what_is_expected_of_waves():
  """Of the first group one rollout is of the first wave and right, then two are of the second: mixed unless both are
  right. The place without a rollout is of no wave."""
  prior = estimate.posterior(estimate.init(3), np.array([0, 1, 2]))
  all_right = statistics.betabinom.pmf(2, 2, prior.a_M[0] + 1, prior.b_M[0])
  found = steps.measure(knobs.Alloc(waves=2), estimate.init(3), BUDGET_M,
                        ROLLOUTS._replace(wave_R=np.array([0, 1, 1, 1, 0])), 2, 4.0, SCORES)
  want = {'expected_mixed_tasks': 1 - all_right, 'expected_gradient_ratio': 3 / 4 * (1 - all_right)}
  assert {name: found[name] for name in want} == pytest.approx(want)
  assert found['objective'] is None and found['uniform_objective'] == measured()['uniform_objective']
  changed = {*want, 'objective'}
  assert {name: x for name, x in found.items() if name not in changed} == {
      name: x for name, x in measured().items() if name not in changed}


def test_forecasts_are_scored_on_verified_rollouts():
  """Of four rollouts at 1/2, of which the second is right and two are not verified."""
  found = measured(scores_of('timeout', 'right', 'no_answer', 'died', 'none'))
  assert found['log_loss'] == pytest.approx(math.log(2)) and found['brier'] == pytest.approx(0.25)
  assert found['reliability'][5] == pytest.approx([2, 1, 1, 1, 0])


def test_uniform_budgets_may_be_of_other_tasks():
  """Of two tasks two rollouts each; in the step three tasks were chosen."""
  stats = estimate.observe(estimate.init(6), np.arange(6), np.arange(6).repeat(3), np.float32([1, 1, 0] * 6),
                           np.ones(18), discount=0.5)
  found = steps.measure(knobs.Alloc(), stats, BUDGET_M, ROLLOUTS, 2, 4.0, SCORES, uniform_index_M=np.array([4, 5]))
  uniform = estimate.posterior(stats, np.array([4, 5]))
  mixed = 1 - statistics.betabinom.pmf([0, 2], 2, uniform.a_M[0], uniform.b_M[0]).sum()
  assert found['uniform_gradient_ratio'] == pytest.approx(mixed)
  assert found['uniform_mixed_tasks'] == pytest.approx(2 * mixed)
  assert found['expected_mixed_tasks'] == pytest.approx(
      1 - statistics.betabinom.pmf([0, 3], 3, uniform.a_M[0], uniform.b_M[0]).sum())


@pytest.mark.parametrize('value', ['snr', 'coba'])
def test_the_objective_is_that_of_the_budgets(value):
  """With what is known of all tasks, and with evidence where advantages count it."""
  stats = estimate.observe(estimate.init(9), np.arange(9), np.arange(9).repeat(3), np.float32([1, 1, 0] * 3 + [0] * 18),
                           np.ones(27), discount=0.5)
  prior = estimate.posterior(stats, np.array([0, 1, 2]))
  for counts_evidence in (False, True):
    found = steps.measure(knobs.Alloc(value=value), stats, BUDGET_M, ROLLOUTS, 2, 4.0, SCORES,
                          counts_evidence=counts_evidence)
    failure_rate = 1 - estimate.mean_rate(estimate.posterior(stats, np.arange(9))).mean()
    want = allocate.objective(prior, BUDGET_M, value, failure_rate=failure_rate,
                              evidence_M=prior.a_M + prior.b_M if counts_evidence else None)
    assert found['objective'] == pytest.approx(want)


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
  assert found['log_loss'] is found['constant_brier'] is None and found['expected_mixed_tasks'] > 0
  assert json.loads(json.dumps(found, allow_nan=False)) == found


def record_of(workdir, first_step=0):
  decode = lambda token_C: f'{len(token_C)} tokens'
  return steps.Record(
      knobs.Config(num_steps=99, rewards=knobs.Rewards(verifier='ends_with')), str(workdir), first_step, decode,
      optax.linear_schedule(0.5, 0.0, 4), names=NAMES, last_good=lambda: 'ckpt/3')


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
    assert row['alarms'] == []
    note(record, 1)
    record.evaluation(2, EVALUATION)
    assert [row['step'] for row in lines(tmp_path)] == [0, 1, 2]
    assert record.has_evaluation(2) and not record.has_evaluation(1)


SKIPPED = FIRST | {'loss': np.float32('nan'), 'grad_norm': np.float32('inf'), 'skipped': True,
                   'grad_norms': np.float32([1, np.inf])}


def test_a_step_that_was_skipped_is_recorded_and_its_batch_is_kept(tmp_path, capsys):
  with record_of(tmp_path) as record:
    note(record, 0, [SKIPPED, FIRST])
    record.flush()
    note(record, 1)
    record.flush()
  row, after = lines(tmp_path)
  assert (row['skipped'], row['loss'], row['grad_norm'], after['skipped']) == (1, 2, 1, 0)
  assert row['alarms'] == [
      'step 0: 1 of 2 updates skipped: the loss is nan and the gradient\'s norm is inf, first in b; the largest '
      'parameter is 3, in params.w; learning rate 0.5, rewards 0 to 1, the sampler\'s log-probabilities -4 to -1. '
      'Look at it: '
      f'kr_jax --mode=replay --workdir={tmp_path} --step=0'] and after['alarms'] == []
  assert row['alarms'][0] in capsys.readouterr().out
  assert bad_steps.kept(str(tmp_path)) == [0]


def test_what_an_update_does_not_learn_from_is_recorded_and_not_effective(tmp_path):
  """Of the mixed group of three its first and third rollout stay; the batch of a skipped update is what it read."""
  of_two = ROLLOUTS._replace(task_R=np.array([0, 0, 3, 3, 3]))
  learnt = steps.Learnt(TASKS[1:] + TASKS[:1], np.array([2, 0, 0]), of_two, SCORES, np.array([0, 2]))
  skipped = SKIPPED | {'advantage_R': np.float32([9, -1, 7, 7, 7])}
  with record_of(tmp_path) as record:
    record.step(0, estimate.init(3), TASKS, BUDGET_M, ROLLOUTS, 2, 4.0, SCORES, [skipped], learnt=learnt)
    record.flush()
  row, = lines(tmp_path)
  assert (row['effective_gradient_ratio'], row['mixed_tasks'], row['rollouts_total']) == (2 / 4, 1, 4)
  assert [x['advantage'] for x in rollouts_lib.read(str(tmp_path))] == [9, None, -1, None]
  batch = bad_steps.load(str(tmp_path), 0)
  assert (list(batch.ids), batch.budget_M.tolist()) == (['t1', 't2', 't0'], [2, 0, 0])
  assert batch.rollouts.task_R.tolist() == [0, 0, 3, 3, 3]


@pytest.mark.parametrize('resumed', [False, True])
def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path, resumed):
  """Which its record counts, over a start."""
  record = record_of(tmp_path)
  for step, update in enumerate([[SKIPPED], UPDATE, [SKIPPED, FIRST], [SKIPPED]]):
    note(record, step, update)
    record.flush()
  if resumed:
    record.__exit__()
    record = record_of(tmp_path, first_step=4)
  note(record, 4, [SKIPPED])
  with record, pytest.raises(guard.Diverged, match=(
      r'the updates of steps 2 to 4 were skipped, train.max_bad_steps=3 in a row. At step 4 the loss is nan .* '
      r'The last good checkpoint is ckpt/3.*--mode=replay --workdir=\S+ --step=4; then lower optimizer.learning_rate')):
    record.flush()
  assert [row['loss'] for row in lines(tmp_path)] == [None, 2, 2, None, None]


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


def test_what_is_said_of_verdicts_counts_over_a_resume(tmp_path, capsys):
  """Of groups of 8 and 1: the 64th group of sums is that of step 63, its 512th answer too."""
  budget_M = np.array([8, 1, 0])
  rollouts = ROLLOUTS._replace(
      task_R=np.repeat([0, 1, 3], [8, 1, 1]), token_RC=np.zeros((10, 4), np.int32), length_R=np.repeat([3, 0], [9, 1]),
      logp_RC=np.zeros((10, 4), np.float32), ended_R=np.ones(10, int))
  scores = scores_of(*['wrong'] * 7, 'wrong', 'right', 'none', reward=[0] * 10)

  def go_on(first, last):
    with record_of(tmp_path, first) as record:
      for step in range(first, last):
        record.step(step, estimate.init(3), TASKS, budget_M, rollouts, 2, 4.0, scores, UPDATE)
        record.flush()

  go_on(0, 40)
  go_on(40, 66)
  shown = capsys.readouterr().out
  assert shown.count('answers of sums/ends_with none was right') == 1
  assert ("step 63: of 512 answers of sums/ends_with none was right; the last one ends '3 tokens', where the answer is "
          "'0!'") in shown
  assert not any(row['alarms'] for row in lines(tmp_path))  # the tasks may just be hard
  assert [row['step'] for row in lines(tmp_path) if 'verification_examples' in row] == [0, 1, 3, 7, 15, 31, 63]


def test_rollouts_are_kept_with_their_advantages(tmp_path):
  advantage_R = np.linspace(-1, 1, 5).astype(np.float32)
  with record_of(tmp_path) as record:
    note(record, 0, [FIRST | {'advantage_R': advantage_R}, FIRST])
    record.flush()
  kept = [*rollouts_lib.read(str(tmp_path), 0)]
  assert sorted(x['advantage'] for x in kept) == pytest.approx([-1, -0.5, 0, 0.5])  # the fifth is none


def test_the_constant_beside_the_forecasts_counts_over_a_resume(tmp_path):
  """2 of 4 rollouts are right, then none of 4: 1/2, 1/2 and 3/10, whether or not the run was stopped in between."""
  wrong = scores_of(*['wrong'] * 4, 'none')
  for directory, starts in ((tmp_path / 'whole', [0]), (tmp_path / 'parts', [0, 1, 2])):
    for first, last in zip(starts, [*starts[1:], 3]):
      with record_of(directory, first) as record:
        for step in range(first, last):
          note(record, step, scores=[SCORES, wrong, SCORES][step])
          record.flush()
    rates = [0.5, 0.5, 3 / 10]
    assert [row['constant_brier'] for row in lines(directory)] == pytest.approx([
        0.25, 0.25, (rates[2] ** 2 + (1 - rates[2]) ** 2) / 2])


def test_the_bar_shows_what_was_seen_beside_what_was_expected(tmp_path, capsys):
  with record_of(tmp_path) as record:
    note(record, 0)
    record.flush()
  row, = lines(tmp_path)
  assert (f'gradient=0.75 (expected {row["expected_gradient_ratio"]:.2f}, of uniform '
          f'{row["uniform_gradient_ratio"]:.2f})') in capsys.readouterr().err


@pytest.mark.parametrize('clipped, step, says', [(0.25, 0, True), (0.03, 0, False), (0.25, 1, False)])
def test_tokens_clipped_before_the_policy_moved_are_said(tmp_path, capsys, clipped, step, says):
  """Of 4 tokens of the first update .25 are 6.2 %, and .03 below 1 %."""
  with record_of(tmp_path, step) as record:
    note(record, step, [FIRST | {'clipped_high': clipped}, FIRST])
    record.flush()
  row, = lines(tmp_path)
  if says:
    said, = row['alarms']
    assert '6.2% of the tokens were clipped before the policy had moved' in said and 'grpo.tis_cap=2' in said
    assert 'grpo.clip_low=0.2 and grpo.clip_high=0.28' in said and said in capsys.readouterr().out
  else:
    assert row['alarms'] == []


def test_an_unknown_score_is_shown_as_such(tmp_path, capsys):
  unknown = EVALUATION | {'eval/avg@8': None, 'eval/avg@8_stderr': None, 'eval/unverified': 1.0}
  with record_of(tmp_path) as record:
    record.evaluation(0, unknown)
    note(record, 0, scores=scores_of(*['died'] * 4, 'none', reward=[0] * 5))
    record.flush()
  assert lines(tmp_path)[0]['eval/avg@8'] is None and lines(tmp_path)[1]['reward_mean'] is None
  shown = capsys.readouterr()
  assert 'avg@8 of held-out tasks unknown; 100.0% of rollouts unverified' in shown.out
  assert 'reward=unknown' in shown.err
