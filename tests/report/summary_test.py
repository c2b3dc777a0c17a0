"""A made-up run's summary, worked out by hand."""

import json
import os

import pytest

from kr_jax.record import calibration
from kr_jax.report import summary

CONFIG = {'seed': 5, 'alloc': {'rule': 'knapsack', 'low': 2}, 'evaluate': {'rollouts': 4}}


def evaluation(step, wall_s, rate, stderr):
  return {'step': step, 'wall_s': wall_s, 'eval/avg@4': rate, 'eval/avg@4_stderr': stderr, 'eval/unverified': 0.125,
          **{f'eval/difficulty_{d}/avg@4{end}': x for d in (3, 10)
             for end, x in (('', rate), ('_stderr', stderr))}}


def step(step, wall_s, unverified, **numbers):
  kinds = ('abstained', 'timeout', 'raised', 'died', 'invalid')
  of_kind = {f'unverified_{kind}': n for kind, n in zip(kinds, unverified)}
  return {'step': step, 'wall_s': wall_s, 'reward_mean': 0.5, 'expected_gradient_ratio': 0.5,
          'expected_mixed_tasks': 1.5, 'uniform_mixed_tasks': 1.25, 'reliability': [[4, 1.0, 2, 2, 1.0], [4, 3.0, 4, 2, 1.0]],
          **dict(zip(calibration.SCORES, (0.5, 0.25, 0.125, 0.75, 0.5, 0.25))),
          'loss': 0.0, 'grad_norm': 1.0, 'truncated': 0.0, 'slot_utilization': 0.75,
          'entropy': 1.0, 'budget_by_success_rate': [None] * 4 + [2.0, 6.5] + [None] * 4,
          'unverified': sum(unverified) / numbers['rollouts_total'], **of_kind, **numbers}


RECORDS = [
    evaluation(0, 1.5, 0.25, 0.0625),
    step(0, 4.0, (1, 0, 0, 0, 0), effective_gradient_ratio=0.25, uniform_gradient_ratio=0.5, mixed_tasks=1,
         objective=2.0, uniform_objective=1.0, budget_min=2, budget_max=6, rollouts_total=8,
         tokens_generated=100, tokens_updated=40, compile_count=9, no_answer=0.25, alarms=[]),
    evaluation(1, 5.0, 0.375, 0.0625),
    step(1, 6.0, (0, 2, 0, 0, 0), effective_gradient_ratio=0.75, uniform_gradient_ratio=0.25, mixed_tasks=2,
         objective=3.0, uniform_objective=0.5, budget_min=1, budget_max=7, rollouts_total=8,
         tokens_generated=60, tokens_updated=20, compile_count=11, no_answer=0.5, alarms=['a']),
    step(2, 7.0, (0, 1, 0, 2, 0), effective_gradient_ratio=0.5, uniform_gradient_ratio=0.75, mixed_tasks=3,
         objective=1.0, uniform_objective=0.75, budget_min=3, budget_max=5, rollouts_total=8,
         tokens_generated=50, tokens_updated=30, compile_count=11, no_answer=0.0,
         alarms=['b', 'c']),
    evaluation(3, 8.5, 0.75, 0.125),
]
SUMMARY = {
    'rule': 'knapsack', 'seed': 5, 'steps': 3, 'wall_s': 8.5,
    'avg@4_first': 0.25, 'avg@4_last': 0.75, 'avg@4_last_stderr': 0.125, 'avg@4_rise': 0.5,
    'effective_gradient_ratio': 0.5, 'expected_gradient_ratio': 0.5,
    'uniform_gradient_ratio': 0.5, 'mixed_tasks': 2.0, 'expected_mixed_tasks': 1.5, 'uniform_mixed_tasks': 1.25,
    'mixing_gap': [None, 0.25, -0.25, 0.0],
    'log_loss': 0.5, 'brier': 0.25, 'count_log_loss': 0.125, 'constant_log_loss': 0.75, 'constant_brier': 0.5,
    'constant_count_log_loss': 0.25, 'log_loss_last_quarter': 0.5, 'brier_last_quarter': 0.25,
    'count_log_loss_last_quarter': 0.125, 'constant_log_loss_last_quarter': 0.75, 'constant_brier_last_quarter': 0.5,
    'constant_count_log_loss_last_quarter': 0.25,
    'objective': 2.0, 'uniform_objective': 0.75, 'budget_min': 1, 'budget_max': 7, 'rollouts': 24,
    'tokens_generated': 210, 'tokens_updated': 90, 'compile_count': 11,
    'avg@4_last_unverified': 0.125, 'unverified': 6 / 24, 'no_answer': 0.25, 'unverified_abstained': 1,
    'unverified_timeout': 3, 'unverified_raised': 0, 'unverified_died': 2, 'unverified_invalid': 0, 'alarms': 3,
}


def fill(workdir, records):
  (workdir / 'config.json').write_text(json.dumps(CONFIG))
  (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))


def test_summary(tmp_path):
  fill(tmp_path, RECORDS)
  assert summary.write(str(tmp_path)) == SUMMARY
  assert json.loads((tmp_path / 'summary.json').read_text()) == SUMMARY


def test_again_after_more_steps(tmp_path):
  fill(tmp_path, RECORDS[:2])
  first = summary.write(str(tmp_path))
  assert (first['steps'], first['avg@4_rise'], first['wall_s']) == (1, 0.0, 4.0)
  fill(tmp_path, RECORDS)
  assert summary.write(str(tmp_path)) == SUMMARY
  assert sorted(os.listdir(tmp_path)) == ['config.json', 'metrics.jsonl', 'summary.json']


def test_a_score_that_is_unknown(tmp_path):
  """No held-out rollout was verified: neither the last score nor the rise is a number."""
  fill(tmp_path, [*RECORDS[:-1], evaluation(3, 8.5, None, None)])
  found = summary.write(str(tmp_path))
  changed = {'avg@4_last': None, 'avg@4_last_stderr': None, 'avg@4_rise': None}
  assert found == SUMMARY | changed == json.loads((tmp_path / 'summary.json').read_text())


def test_a_run_with_waves_and_a_step_without_verdicts(tmp_path):
  """There is no objective, and scores are of the other steps."""
  of_waves = [r | {'objective': None} if 'objective' in r else r for r in RECORDS]
  of_waves[3] |= dict.fromkeys(calibration.SCORES) | {'reliability': [[0] * 5] * 2}
  fill(tmp_path, of_waves)
  found = summary.write(str(tmp_path))
  assert found == SUMMARY | {'objective': None} == json.loads((tmp_path / 'summary.json').read_text())


def test_records_of_an_older_version(tmp_path):
  """Figures that they lack are None; without config.json so are rule and seed."""
  lacking = ('reliability', 'uniform_mixed_tasks', 'tokens_updated', 'no_answer', *calibration.SCORES)
  fill(tmp_path, [{name: x for name, x in r.items() if name not in lacking} for r in RECORDS])
  (tmp_path / 'config.json').unlink()
  unknown = [name for name in SUMMARY if name in ('rule', 'seed', 'mixing_gap', *lacking)
             or name.removesuffix('_last_quarter') in calibration.SCORES]
  assert summary.write(str(tmp_path)) == SUMMARY | dict.fromkeys(unknown)


def test_half_a_record_is_left_out(tmp_path):
  fill(tmp_path, RECORDS)
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 4, "reward_mean"')
  assert summary.write(str(tmp_path)) == SUMMARY


def test_a_file_is_strict_json_or_is_not_written(tmp_path):
  path = tmp_path / 'made.json'
  summary.save(str(path), {'a': 1.5})
  with pytest.raises(ValueError):
    summary.save(str(path), {'a': float('nan')})
  assert json.loads(path.read_text()) == {'a': 1.5}


@pytest.mark.parametrize('records', [
    None, [], RECORDS[:1], RECORDS[1:2]],
    ids=['no file', 'no record', 'an evaluation only', 'a step only'])
def test_nothing_to_report(tmp_path, records):
  if records is not None:
    fill(tmp_path, records)
  with pytest.raises(ValueError, match=r'metrics.jsonl holds no step and evaluation .* train first'
                     ) as error:
    summary.write(str(tmp_path))
  assert str(tmp_path) in str(error.value)
  assert not (tmp_path / 'summary.json').exists()
