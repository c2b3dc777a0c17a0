"""A run as columns: all of a whole one, and what can be read of a damaged one."""

import json
import os
import pathlib
import sys

import numpy as np
import pytest

import kr_jax
from kr_jax import files
from kr_jax import reader
from kr_jax import record
from kr_jax.allocation import estimate
from kr_jax.record import checkpoint
from tests import knobs
from tests.report import made_run

UNKNOWN_TASKS = 'tasks.jsonl.zst is not there, as of runs of older versions'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A run without a file of its tasks, as older versions left them."""
  return made_run.make(tmp_path_factory.mktemp('made') / 'run', steps=4, every=2)


def lines(workdir):
  return [json.loads(line) for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('values, dtype, expected', [
    ([1, 2], np.int64, [1, 2]), ([1, None], float, [1, np.nan]), ([1, 0.5], float, [1, 0.5]), ([], float, []),
    ([2 ** 70, 1], float, [2.0 ** 70, 1]), ([True, False], bool, [True, False]), (['a', None], object, ['a', None]),
    ([None, None], object, [None, None]), ([True, 1], object, [True, 1]), ([{'a': 1}], object, [{'a': 1}]),
    ([[1, 2], [3, 4]], np.int64, [[1, 2], [3, 4]]), ([[1, None], [3, 4]], float, [[1, np.nan], [3, 4]]),
    ([[[1], [2]], [[3], [4]]], np.int64, [[[1], [2]], [[3], [4]]]), ([[1], [2, 3]], object, [[1], [2, 3]]),
    ([['a'], ['b']], object, [['a'], ['b']]), ([[], []], object, [[], []]), ([[1], None], object, [[1], None]),
    ([[[1], [2]], [[3], [4, 5]]], object, [[[1], [2]], [[3], [4, 5]]])])
def test_a_column(values, dtype, expected):
  found = reader.column(values)
  assert found.dtype == dtype and len(found) == len(values)
  if dtype is object:
    assert found.shape == (len(values),) and found.tolist() == expected
  else:
    np.testing.assert_array_equal(found, expected)


def test_columns_of_records_that_differ():
  found = reader.columns([{'a': 1}, {'a': 2, 'b': 'x', 'c': [1, 2]}])
  assert list(found) == ['a', 'b', 'c'] and len(found) == 3 and found.rows == 2
  assert found['a'].tolist() == [1, 2] and found['b'].tolist() == [None, 'x'] and found['c'].tolist() == [None, [1, 2]]
  with pytest.raises(KeyError, match="no column 'aa'; did you mean 'a'"):
    found['aa']
  assert repr(found) == '2 rows of a, b, c' and 'aa' not in found
  assert reader.columns([]).rows == 0 and repr(reader.columns([])) == '0 rows of nothing'


@pytest.mark.slow
def test_a_frame(monkeypatch):
  found = reader.columns([{'a': 1, 'v': [1, 2]}, {'a': None, 'v': [3, 4]}])
  import pandas  # slow to load
  frame = found.frame()
  assert isinstance(frame, pandas.DataFrame) and frame['v'].tolist() == [[1, 2], [3, 4]] and frame['a'].isna()[1]
  monkeypatch.setitem(sys.modules, 'pandas', None)
  with pytest.raises(ImportError, match='frame.. needs pandas: pip install pandas'):
    found.frame()


@pytest.mark.slow
def test_a_whole_run(finished):
  run = kr_jax.read(finished)
  assert type(run) is record.Run and run.is_complete and run.workdir == finished
  assert repr(run) == f'<run {finished}: 4 of 4 steps, avg@8 {run.evaluations["eval/avg@8"][-1]:.3f}; complete>'
  steps = [x for x in lines(finished) if 'reward_mean' in x]
  assert run.steps['step'].tolist() == [0, 1, 2, 3] and run.steps['step'].dtype == np.int64
  assert run.steps['reward_mean'].tolist() == [x['reward_mean'] for x in steps]
  assert run.steps['group_budget'].tolist() == [x['group_budget'] for x in steps]
  assert run.evaluations['step'].tolist() == [0, 2, 4] and run.config['alloc']['rule'] == 'knapsack'
  assert run.rollouts.rows == 4 * min(32, run.config['record']['rollouts'])
  assert set(run.rollouts['verdict']) <= {'right', 'wrong'} and run.rollouts['estimate_low'].dtype == float
  assert [text for text in run.problems if 'hardware' not in text] == []  # it was priced by none


@pytest.mark.slow
def test_the_tasks_of_a_run(finished):
  """Counts are of all groups, and estimates those that the next step's budgets would come from."""
  run, config = kr_jax.read(finished), knobs.debug_config('')
  tasks = run.tasks
  assert tasks['rollouts'].sum() == run.steps['rollouts_total'].sum() == 4 * config.alloc.rollouts_per_step
  assert tasks['right'].sum() == run.steps['group_right'].sum() and (np.diff(tasks['index']) > 0).all()
  assert tasks['visits'].sum() == 4 * config.tasks.per_step and tasks['last_step'].max() == 3
  kept = {name: of for name, of in zip(run.rollouts['task'], run.rollouts['difficulty'])}
  ids = dict(zip(tasks['id'], tasks['difficulty']))
  assert kept.items() <= ids.items() and set(tasks['source']) == {'arithmetic'}
  for status, right, verified in zip(tasks['status'], tasks['last_right'], tasks['last_verified']):
    assert status in reader.STATUSES and (status == 'extremely easy') == (right == verified > 0)
  # The last checkpoint holds the statistics themselves.
  saved = checkpoint.ocp.PyTreeCheckpointer().restore(os.path.join(finished, 'checkpoints', '4', 'stats'))
  zero = estimate.init(len(saved['rollouts_I']), groups=len(saved['forecast_H4']))
  belief = estimate.posterior(zero._replace(**saved), tasks['index'])
  np.testing.assert_allclose(tasks['estimate_mean'], estimate.mean_rate(belief), rtol=1e-9)
  assert ((tasks['estimate_low'] < tasks['estimate_mean']) & (tasks['estimate_mean'] < tasks['estimate_high'])).all()


def test_a_run_of_an_older_version(made):
  run = reader.read(made)
  assert run.steps.rows == 4 and run.is_complete and run.problems == []
  tasks = run.tasks
  assert tasks['rollouts'].sum() == 4 * 64 and tasks['id'].tolist() == [None] * tasks.rows
  assert np.isnan(tasks['estimate_mean']).all() and tasks['estimate_low'].dtype == float
  assert [text for text in run.problems if text.startswith(UNKNOWN_TASKS)]
  assert run.rollouts.rows > 0


def test_a_damaged_run_gives_what_can_be_read(tmp_path):
  workdir = pathlib.Path(made_run.make(tmp_path / 'run', steps=4, every=2))
  text = (workdir / 'metrics.jsonl').read_text()
  (workdir / 'metrics.jsonl').write_text(text[:-40])
  kept = sorted((workdir / 'rollouts').iterdir())
  kept[0].write_bytes(b'no zstd')
  (workdir / 'tasks.jsonl.zst').write_bytes(b'nor this')
  (workdir / 'config.json').unlink()
  run = kr_jax.read(str(workdir))
  assert run.steps.rows == 4 and run.evaluations.rows == 2 and not run.is_complete and run.config == {}
  assert set(run.rollouts['step']) == {1, 2, 3} and run.tasks.rows > 0
  for said in ('config.json is not there', 'lines of metrics.jsonl are no records', f'{kept[0]} cannot be read',
               'tasks.jsonl.zst cannot be read'):
    assert sum(said in text for text in run.problems) == 1, run.problems
  assert repr(run).startswith(f'<run {workdir}: 4 of unknown steps')


@pytest.mark.slow
def test_steps_that_are_missing_leave_estimates_unknown(finished, tmp_path):
  for name in ('config.json', 'tasks.jsonl.zst'):
    (tmp_path / name).write_bytes((pathlib.Path(finished) / name).read_bytes())
  made_run.write_lines(tmp_path / 'metrics.jsonl', [x for x in lines(finished) if x['step'] != 1])
  run = reader.read(tmp_path)
  assert np.isnan(run.tasks['estimate_mean']).all() and None not in run.tasks['id'].tolist()
  assert any('they need every step' in text for text in run.problems) and not run.is_complete


def test_a_run_in_a_bucket(made, monkeypatch):
  """All is read at once, as the copy on this machine is removed; a report is written there."""
  for path in pathlib.Path(made).rglob('*'):
    if path.is_file():
      files.write(f'memory://bucket/run/{path.relative_to(made)}', path.read_bytes())
  run, here = kr_jax.read('memory://bucket/run/'), kr_jax.read(made)
  assert run.workdir == 'memory://bucket/run' and run.steps.rows == 4
  assert run.rollouts['completion'].tolist() == here.rollouts['completion'].tolist()
  assert run.tasks.rows == here.tasks.rows
  assert not any('/tmp' in text for text in run.problems)
  monkeypatch.setattr(reader.page, 'write', lambda workdirs, output: files.write(f'{output}/report.html', 'page') or [
      f'{output}/report.html'])
  assert run.report() == 'memory://bucket/run/report.html' and files.read(run.report()) == b'page'
  assert run.report('memory://bucket/page') == 'memory://bucket/page/report.html'
  assert files.read('memory://bucket/page/report.html') == b'page'


def test_what_is_no_run(tmp_path):
  with pytest.raises(ValueError, match=f'{tmp_path}/none is no directory'):
    kr_jax.read(f'{tmp_path}/none')
  empty = kr_jax.read(tmp_path)
  assert (empty.steps.rows, empty.tasks.rows, empty.rollouts.rows) == (0, 0, 0) and not empty.is_complete


def test_a_report(made, tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(reader.page, 'write', lambda workdirs, output: asked.append((*workdirs, output)) or [
      f'{output}/report.html'])
  assert reader.read(made).report(tmp_path / 'page') == f'{tmp_path}/page/report.html'
  assert reader.read(made).report() == f'{made}/report.html'
  assert asked == [(made, str(tmp_path / 'page')), (made, made)]
