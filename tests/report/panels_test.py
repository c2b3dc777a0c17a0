"""Rows for charts, of a run made by hand and of made-up runs."""

import pathlib

import numpy as np
import pytest

from kr_jax.allocation import scores
from kr_jax.report import compare
from kr_jax.report import panels
from kr_jax.report import run as run_lib
from tests.report import made_run
from tests.report.made_run import evaluation
from tests.report.made_run import run_of


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  return run_lib.read(made_run.make(tmp_path_factory.mktemp('made') / 'run', steps=8, kills=1))


def test_costs_of_evaluations_by_hand():
  """An evaluation was taken before its step; what a kill wasted counts, and what an evaluation sampled does not."""
  attempts = [{'attempt': i, 'started': 0.0, 'first_step': first, 'devices': 2} for i, first in enumerate((0, 1))]
  entry = lambda attempt, step, phase, **more: {
      'attempt': attempt, 'step': step, 'phase': phase, 'wall_s': 1.0, 'device_s': 2.0, **more}
  sampled = {'rollouts': 8, 'tokens_generated': 100, 'flops_executed': 1000}
  entries = [entry(0, 0, 'evaluate', rollouts=99, tokens_generated=99), entry(0, 0, 'sample', **sampled),
             entry(0, 1, 'sample', **sampled), entry(0, 2, 'sample', **sampled),  # until the kill
             entry(1, 1, 'sample', **sampled), entry(1, 2, 'sample', **sampled)]
  rows = panels.curves(run_of(evaluations=[evaluation(step, 0.5) for step in (0, 1, 3, 9)], entries=entries,
                           attempts=attempts))
  of = lambda axis: [row[axis] for row in rows]
  assert of('rollouts') == [0.0, 8, 40, None]
  assert of('tokens') == [0.0, 100, 500, None]
  assert of('flops') == [0.0, 1000, 5000, None]
  assert of('device_s') == [0.0, 4.0, 12.0, None]
  assert of('dollars') == of('kwh') == [None] * 4


def test_costs_without_a_ledger_and_of_one_that_begins_late():
  steps = [{'step': i, 'reward_mean': 0.5, 'rollouts_total': 8, 'tokens_generated': 10 * (i + 1)} for i in range(3)]
  evaluations = [evaluation(step, 0.5) for step in (0, 2, 3)]
  rows = panels.curves(run_of(steps, evaluations))
  assert [(row['rollouts'], row['tokens'], row['device_s']) for row in rows] == [
      (0.0, 0.0, None), (16, 30, None), (24, 60, None)]
  # Where a step's record is lost nothing is known of the sums.
  assert {row['tokens'] for row in panels.curves(run_of(steps[1:], evaluations))} == {None}
  late = run_of(steps, evaluations, [{'attempt': 0, 'step': 1, 'phase': 'sample', 'wall_s': 1.0, 'rollouts': 8}],
             [{'attempt': 0, 'started': 0.0, 'first_step': 1}])
  assert all(row[axis] is None for row in panels.curves(late) for axis in compare.AXES)


def test_trailing_means_against_slices():
  x = np.random.default_rng(0).normal(size=30).tolist()
  for window in (1, 4, 40):
    assert panels.trailing(x, window) == pytest.approx(
        [np.mean(x[max(0, i + 1 - window):i + 1]) for i in range(30)])
  assert panels.trailing([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
  assert panels.trailing([], 3) == []


def test_thinned_by_hand():
  assert panels.thinned(3, 5) == [0, 1, 2]
  assert panels.thinned(10, 5) == [1, 3, 5, 7, 9]
  assert panels.thinned(0, 5) == []
  assert len(set(panels.thinned(1000, 60))) == 60 and panels.thinned(1000, 60)[-1] == 999


def test_reliability_of_halves():
  step = lambda right: {'step': 0, 'reward_mean': 0.5, 'reliability': [[0, 0, 0, 0, 0], [8, 6.0, right, 2, 1.0]]}
  first, second = panels.reliability(run_of([step(4), step(8), step(2)]))
  assert (first['half'], first['forecast'], first['observed'], first['rollouts']) == ('first', 0.75, 0.75, 16)
  assert (second['half'], second['forecast'], second['observed'], second['rollouts']) == ('second', 0.75, 0.25, 8)
  low, high = scores.interval([[16, 12.0, 12, 4, 2.0]])
  assert (first['low'], first['high']) == (low[0], high[0])
  assert panels.reliability(run_of([{'step': 0, 'reward_mean': 0.5, 'reliability': [[8, 6.0, 9, 2, 1.0]]}])) == []


def test_budgets_are_means_of_parts():
  rows = lambda n: [{'step': i, 'reward_mean': 0.5, 'budget_by_success_rate': [None, float(i)]} for i in range(n)]
  found = panels.budgets(run_of(rows(120)))
  assert len(found) == 60
  assert found[0] == {'step': 0, 'bin_low': 0.5, 'bin_high': 1.0, 'budget': 0.5}
  assert found[-1] == {'step': 118, 'bin_low': 0.5, 'bin_high': 1.0, 'budget': 118.5}


def test_lines_have_a_point_a_step_of_short_runs(made):
  assert [row['step'] for row in panels.gradient(made) if row['name'] == 'uniform'] == list(range(8))
  assert {row['name'] for row in panels.mixed(made)} == {'observed', 'expected', 'uniform'}
  assert {row['name'] for row in panels.log_loss(made)} == {'forecast', 'constant'}
  first = next(row for row in panels.mixed(made) if row['name'] == 'observed')
  assert first == {'step': 0, 'name': 'observed', 'tasks': made.steps[0]['mixed_tasks']}


def test_status_by_hand():
  steps = [{'step': 0, 'reward_mean': 0.5, 'group_index': [3, 5], 'group_right': [0, 4], 'group_verified': [4, 4]},
           {'step': 1, 'reward_mean': 0.5, 'group_index': [3, 9], 'group_right': [2, 1], 'group_verified': [4, 4]}]
  evaluations = [evaluation(0, 0.5, [0, 4]), evaluation(1, 0.5), evaluation(2, 0.5, [4, 4])]
  held_out, training = panels.status(run_of(steps, evaluations))
  assert (held_out['of'], held_out['classes']) == ('held-out', list(compare.CLASSES))
  assert held_out['matrix'] == [[0, 0, 0, 0, 1], [0] * 5, [0] * 5, [0] * 5, [0, 0, 0, 0, 1]]
  assert training['matrix'] == [[0, 0, 1, 0, 0], [0] * 5, [0] * 5, [0] * 5, [0] * 5]  # of task 3 alone
  assert panels.status(run_of(steps[:1], evaluations[:1])) == []


def test_rise_by_hand():
  """Rises of .5, .25 and 0 a task: mean .25, standard error .25 / sqrt(3), of which 1.96 are the half interval."""
  rise, error = panels.rise(run_of(evaluations=[evaluation(0, 0.25, [0, 1, 2]), evaluation(4, 0.5, [2, 2, 2])]))
  assert (rise, error) == pytest.approx((0.25, 1.959964 * 0.25 / np.sqrt(3)))
  # Without counts of tasks evaluations are independent.
  rise, error = panels.rise(run_of(evaluations=[
      evaluation(0, 0.25, **{'eval/avg@4_stderr': 0.03}), evaluation(4, 0.5, **{'eval/avg@4_stderr': 0.04})]))
  assert (rise, error) == pytest.approx((0.25, 1.959964 * 0.05))
  assert panels.rise(run_of(evaluations=[evaluation(0, 0.25)])) is None
  assert panels.rise(run_of(evaluations=[evaluation(0, None, [0, 1, 2]), evaluation(1, 0.5, [2, 2, 2])])) is None


def test_robustness():
  """Of the last evaluation that tells; else of evaluation.json."""
  told = {'eval/perturbed_typos/ratio': 0.8, 'eval/perturbed_typos/ratio_low': 0.7}
  rows = panels.robustness(run_of(evaluations=[evaluation(0, 0.5, **told), evaluation(4, 0.5)]))
  assert rows == [{'name': 'typos', 'step': 0, 'ratio': 0.8, 'low': 0.7, 'high': None}]
  other = run_of(evaluations=[evaluation(0, 0.5)])
  other.evaluation.update(step=9, perturbed={'case': {'metrics': {'ratio': {'mean': 0.9, 'low': 0.8, 'high': 1.0}}}})
  assert panels.robustness(other) == [{'name': 'case', 'step': 9, 'ratio': 0.9, 'low': 0.8, 'high': 1.0}]
  assert panels.robustness(run_of()) == []


def test_seconds_bytes_and_goodput_add_up(made):
  wall_s = sum(entry['wall_s'] for entry in made.ledger.entries)
  assert sum(row['seconds'] for row in panels.goodput(made)) == pytest.approx(wall_s)
  assert sum(row['seconds'] for row in panels.phases(made)) == pytest.approx(wall_s)
  assert {row['category']: row['kind'] for row in panels.goodput(made)}['wasted_progress'] == 'badput'
  update = next(row for row in panels.phases(made) if row['phase'] == 'update')
  assert update['device_busy_share'] == pytest.approx(0.97) and update['mfu'] > 0
  sent = sum(row['bytes'] for row in panels.network(made) if row['what'] == 'collectives')
  assert sent == sum(entry.get('collective_bytes', 0) for entry in made.ledger.entries)
  assert panels.peak(made) == {'phase': 'update', 'gb': 500 * 2 ** 20 / 1e9, 'source': 'device'}
  assert panels.peak(made) in panels.memory(made) and panels.peak(run_of()) is None


def test_verification_by_hand():
  examples = lambda *texts: {'verification_examples': {'a/b': {'wrong': list(texts)}}}
  steps = [
      {'step': 0, 'reward_mean': 0.5, **examples('1', '2', '3'),
       'verification': {'a/b': {'groups': 2, 'right': 3, 'wrong': 4, 'no_answer': 1, 'truncated_without_answer': 1}}},
      {'step': 1, 'reward_mean': 0.5, **examples('4'), 'alarms': ['step 1: x'],
       'verification': {'a/b': {'groups': 2, 'looked_at': 9, 'right': 1, 'wrong': 0, 'no_answer': 1}}}]
  assert panels.verification(run_of(steps)) == [
      {'name': 'a/b', 'kind': 'right', 'rollouts': 4, 'share': 0.4, 'examples': []},
      {'name': 'a/b', 'kind': 'wrong', 'rollouts': 4, 'share': 0.4, 'examples': ['1', '3', '4']},
      {'name': 'a/b', 'kind': 'no_answer', 'rollouts': 2, 'share': 0.2, 'examples': []},
      {'name': 'a/b', 'kind': 'truncated_without_answer', 'rollouts': 1, 'share': 0.1, 'examples': []}]
  assert panels.alarms(run_of(steps)) == [{'step': 1, 'text': 'step 1: x'}]


def test_difficulty(made):
  rows = panels.difficulty(made)
  assert len(rows) == 5 * len(made.evaluations)
  assert rows[0] == {'step': 0, 'difficulty': '1', 'success': made.evaluations[0]['eval/difficulty_1/avg@4']}


def test_the_hardest_tasks_and_what_solved_them(made):
  found = panels.hardest(made, problems := [])
  means = [row['estimate']['mean'] for row in found]
  assert found and not problems and means == sorted(means)
  # What a task had had before, by the records of steps: of a task whose row is unique.
  row = next(row for row in found if row['rollouts_before'] is not None)
  index = int(row['task'].removeprefix('arithmetic-'))
  before = sum(budget for record in made.steps if record['step'] < row['step']
               for i, budget in zip(record['group_index'], record['group_budget']) if i == index)
  assert row['rollouts_before'] == before > 0
  assert row['completion'].strip() == row['answer']


def test_a_file_of_rollouts_that_cannot_be_read_is_said(made, tmp_path):
  step = panels.hardest(made, [])[0]['step']
  workdir = made_run.make(tmp_path, steps=8, kills=1)
  (pathlib.Path(workdir) / 'rollouts' / f'{step:06}.jsonl.zst').write_bytes(b'x')
  panels.hardest(run_lib.read(workdir), problems := [])
  assert len(problems) == 1 and 'cannot be read' in problems[0]
