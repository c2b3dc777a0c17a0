"""The view: its form, how runs are called and grouped, and what is said of runs that should not be compared."""

import dataclasses
import json

import pytest

from kr_jax.report import compare
from kr_jax.report import run as run_lib
from kr_jax.report import scorecard
from tests.report import made_run

FIELDS = {
    'curves': 'run group step success low high rollouts tokens flops device_s dollars kwh',
    'bands': 'group axis x mean low high seeds', 'difficulty': 'run step difficulty success',
    'reliability': 'run half forecast observed low high rollouts', 'log_loss': 'run step name nats',
    'budgets': 'run step bin_low bin_high budget', 'gradient': 'run step name ratio', 'mixed': 'run step name tasks',
    'status': 'run of classes matrix', 'goodput': 'run category kind seconds',
    'phases': 'run phase seconds device_busy_share mfu bandwidth_use', 'memory': 'run phase gb source',
    'network': 'run phase what bytes', 'verification': 'run name kind rollouts share examples',
    'alarms': 'run step text', 'hardest': 'run task prompt answer rollouts_before step completion estimate',
    'pareto': 'run step axis cost success on_front'}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Two seeds of each rule; knapsack learns faster."""
  path = tmp_path_factory.mktemp('runs')
  return [run_lib.read(made_run.make(path / f'{rule}{seed}', rule=rule, seed=seed, gain=gain, kills=seed))
          for rule, gain in (('uniform', 0.03), ('knapsack', 0.1)) for seed in (0, 1)]


def made(path, **how):
  return run_lib.read(made_run.make(path, steps=2, every=2, **how))


def test_the_view_of_runs(runs):
  view = scorecard.view(runs, target=0.5)
  json.dumps(view, allow_nan=False)
  assert set(view) == {
      *FIELDS, 'title', 'generated', 'missing', 'runs', 'verdicts', 'scorecard', 'comparison', 'reproduce', 'beside'}
  for name, fields in FIELDS.items():
    assert view[name] and {tuple(sorted(row)) for row in view[name]} == {tuple(sorted(fields.split()))}, name
  assert [(of['run'], of['group'], of['seed']) for of in view['runs']] == [
      ('uniform, seed 0', 'uniform', 0), ('uniform, seed 1', 'uniform', 1),
      ('knapsack, seed 0', 'knapsack', 0), ('knapsack, seed 1', 'knapsack', 1)]
  assert view['missing'] == []
  assert len(view['verdicts']) == 10
  for row in view['scorecard']:
    assert [x['run'] for x in row['values']] == [of['run'] for of in view['runs']]
    assert all((x['value'] is None) == (x['provenance'] is None) for x in row['values'])
  resources = list(dict.fromkeys(row['resource'] for row in view['scorecard']))
  assert resources == ['computation', 'memory', 'energy', 'money', 'network', 'other']
  rows = {(row['group'], row['axis']): row for row in view['comparison']['rows']}
  assert view['comparison']['baseline'] == 'uniform' and rows['knapsack', 'rollouts']['pairs'] == 2
  assert rows['knapsack', 'rollouts']['ratio'] > 1


def test_without_a_target_costs_are_not_compared(runs):
  view = scorecard.view(runs[:1])
  assert view['comparison'] == {'target': None, 'baseline': None, 'rows': []}
  assert view['title'] == 'uniform: what it learnt and what it cost'
  assert view['curves'] and view['bands']
  front = [row for row in view['pareto'] if row['axis'] == 'tokens']
  assert [row['on_front'] for row in front] == compare.pareto(
      [row['cost'] for row in front], [row['success'] for row in front])


def test_bad_arguments(runs):
  with pytest.raises(ValueError, match='there is no run to report; give --workdir'):
    scorecard.view([])
  with pytest.raises(ValueError, match='the target 2 must be a held-out success'):
    scorecard.view(runs[:1], target=2)


def test_the_header(runs):
  header = dict(scorecard.header(runs[1]))
  assert header['hardware'] == '8 × TPU v5 lite'
  assert header['prices'] == 'v5e: $1.2 a chip-hour, cloud.google.com/tpu/pricing, on demand, 2025-02'
  assert header['model'] == '4 layers of width 128, from random parameters; 800,000 parameters'
  assert header['steps'] == '12 of 12' and header['attempts'] == '2; the last one done'
  assert header['when'] == '2023-11-14 22:13 UTC to 2023-11-14 22:14 UTC'
  of_no_end = lambda **more: dict(scorecard.header(dataclasses.replace(
      runs[1], ledger=runs[1].ledger._replace(ends=[]), **more)))['attempts']
  assert of_no_end() == '2; the last one done but for its last page'
  assert of_no_end(evaluations=runs[1].evaluations[:-1]) == '2; the last one runs, or was killed'


def test_the_header_names_what_changed(tmp_path):
  change = {'step': 4, 'knob': 'optimizer.learning_rate', 'was': 1e-4, 'is': .5}
  made_with = lambda changed: dict(scorecard.header(made(tmp_path / 'a', changed=changed)))
  assert made_with([change, 'x'])['changed'] == 'optimizer.learning_rate was 0.0001, and is 0.5 from step 4 on'
  assert 'changed' not in made_with([])


def test_what_is_recorded_of_tasks_and_changes_makes_no_other_group(tmp_path):
  other = made(tmp_path / 'b', seed=1, changed=[{'step': 1}], task_digests={'train': {'id': 'x'}})
  labels, missing = scorecard.label([made(tmp_path / 'a'), other])
  assert [of['group'] for of in labels] == ['knapsack'] * 2 and missing == []


def test_runs_of_other_configs_say_so(tmp_path):
  other = made(tmp_path / 'b', grpo={'keep': 0.5}, train_ids='1' * 64)
  labels, missing = scorecard.label([made(tmp_path / 'a'), other])
  assert [of['group'] for of in labels] == ['knapsack, keep=1.0, tasks 000000', 'knapsack, keep=0.5, tasks 111111']
  assert missing == ['the runs differ by more than rule and seed, so that differences are not of the rule alone: '
                     'grpo.keep is 1.0 or 0.5', 'the runs have other training tasks']


def test_where_and_how_often_a_run_works_makes_no_other_group(tmp_path):
  same = made(tmp_path / 'b', seed=1, checkpoint={'every': 7}, rewards={'workers': 3}, record={'wandb': True})
  labels, missing = scorecard.label([made(tmp_path / 'a'), same])
  assert [of['group'] for of in labels] == ['knapsack'] * 2 and missing == []


def test_a_run_of_before_a_knob_had_its_default(tmp_path):
  old, new = made(tmp_path / 'a'), made(tmp_path / 'b', seed=1)
  del old.config['tasks']['columns'], old.config['grpo']['keep']
  labels, missing = scorecard.label([old, new])
  assert [of['group'] for of in labels] == ['knapsack'] * 2 and missing == []


def test_groups_that_differ_by_more_knobs_than_are_named(tmp_path):
  more = lambda **last: {'grpo': {'keep': 0.5, 'clip_low': 0.1, 'clip_high': 0.3, **last}}
  runs = [made(tmp_path / 'a'), made(tmp_path / 'b', **more()), made(tmp_path / 'c', **more(kl_coef=0.5)),
          made(tmp_path / 'd', seed=1, **more(kl_coef=0.5))]
  named = 'knapsack, keep=0.5, clip_low=0.1, clip_high=0.3'
  assert [of['group'] for of in scorecard.label(runs)[0]][1:] == [named, f'{named} (2)', f'{named} (2)']


def test_labels_are_unique(tmp_path):
  runs = [made(tmp_path / 'a'), made(tmp_path / 'b'), made(tmp_path / 'x' / 'b'),
          made(tmp_path / 'c', skip=('config.json',))]
  labels, _ = scorecard.label(runs)
  assert [of['run'] for of in labels] == [
      'knapsack, seed 0, a', 'knapsack, seed 0, b (1)', 'knapsack, seed 0, b (2)', 'c']
  assert [of['group'] for of in labels] == ['knapsack'] * 3 + ['c']
  unknown = [made(tmp_path / path, skip=('config.json',)) for path in ('y/c', 'z/c')]
  assert [of['group'] for of in scorecard.label([runs[-1], *unknown])[0]] == ['c', 'c (2)', 'c (3)']


def test_what_is_missing_of_which_run(tmp_path):
  view = scorecard.view([made(tmp_path / 'a'), made(tmp_path / 'b', seed=1, skip=('ledger.jsonl',))])
  assert len(view['missing']) == 1
  assert view['missing'][0].startswith('knapsack, seed 1: ledger.jsonl is not there or empty')
  values = {row['metric']: row['values'] for row in view['scorecard']}
  assert [x['value'] is None for x in values['device time held']] == [False, True]


def test_the_command_of_a_run(tmp_path):
  run = made(tmp_path / 'a')
  assert scorecard.reproduce(run)[1] == f'python -m kr_jax.main --mode=report --workdir={tmp_path}/a'
  run.ledger.attempts[0]['command'] = 'python -m kr_jax.main --config=x.py'
  assert scorecard.reproduce(run)[0] == 'python -m kr_jax.main --config=x.py'
