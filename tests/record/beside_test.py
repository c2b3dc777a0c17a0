"""Recorded runs: which files are such, and which runs are a pair with one."""

import json

import pytest

from configs import ciphers
from kr_jax import knobs
from kr_jax import prepare
from kr_jax.record import beside
from kr_jax.record import fingerprint

ROW = {'step': 0, 'rollouts': 0, 'tokens': 0, 'success': 0.5, 'low': 0.4, 'high': 0.6}
LAST = {'step': 4, 'rollouts': 64, 'tokens': None, 'success': 0.75, 'low': None, 'high': None}
CONFIG = knobs.as_dict(knobs.Config()) | {'task_digests': {'train': {'id': 'ab'}}, 'workdir': '/w', 'train_ids': 'cd'}


def config(**changed):
  """CONFIG with knobs changed, those of a section by its name."""
  return CONFIG | {name: CONFIG[name] | x if isinstance(x, dict) else x for name, x in changed.items()}


def write(path, of=CONFIG):
  path.write_text(beside.as_text('uniform budgets', 'COMMAND', of, {'jax': '1'}, [ROW, LAST], {'mixed_tasks': [3, 4]}))
  return str(path)


@pytest.fixture
def recorded(tmp_path):
  return beside.read(write(tmp_path / 'run.json'))


def test_a_run_that_is_written_is_read(tmp_path, recorded):
  assert recorded.name == 'uniform budgets' and recorded.evaluations == [ROW, LAST]
  assert recorded.config['seed'] == 0 and recorded.config['alloc.rollouts_per_step'] == 256
  assert not recorded.config.keys() & {'alloc.rule', 'record.beside', 'mesh.devices', 'train_ids', 'workdir'}
  assert json.loads((tmp_path / 'run.json').read_text())['steps'] == {'mixed_tasks': [3, 4]}


def test_budgets_and_what_changes_no_result_may_differ(recorded):
  pair = config(alloc={'rule': 'uniform', 'low': 0, 'waves': 2}, tasks={'candidates_per_step': 64, 'data_dir': '/d'},
                evaluate={'rollouts': 1}, record={'beside': 'x.json', 'page': False}, checkpoint={'directory': '/c'},
                mesh={'devices': 2}, workdir='/elsewhere', train_ids='ef')
  assert beside.differences(recorded, pair) == []


@pytest.mark.parametrize('changed, name', [
    ({'seed': 1}, 'seed'), ({'alloc': {'rollouts_per_step': 128}}, 'alloc.rollouts_per_step'),
    ({'evaluate': {'temperature': 0.5}}, 'evaluate.temperature'), ({'tasks': {'per_step': 8}}, 'tasks.per_step'),
    ({'num_steps': 7}, 'num_steps'), ({'optimizer': {'learning_rate': 1.0}}, 'optimizer.learning_rate'),
    ({'task_digests': {'train': {'id': 'xy'}}}, 'task_digests.train.id'), ({'changed': [{'knob': 'seed'}]}, 'changed')])
def test_what_changes_results_may_not(recorded, changed, name):
  found = beside.differences(recorded, config(**changed))
  assert found == [name] and beside.why_not(found) == f'{name} differs'


def test_a_knob_that_is_newer_than_the_recorded_run_was_its_default(recorded):
  older = recorded._replace(config={name: x for name, x in recorded.config.items() if name != 'grpo.keep'})
  assert beside.differences(older, CONFIG) == []
  assert beside.differences(older, config(grpo={'keep': 0.5})) == ['grpo.keep']


def test_of_many_differences_three_are_named():
  assert beside.why_not(['a', 'b', 'c']) == 'a, b, c differ'
  assert beside.why_not(['a', 'b', 'c', 'd', 'e']) == 'a, b, c and 2 more differ'


@pytest.mark.parametrize('content, why', [
    (b'', 'it is no JSON'), (b'{"name": "u", "conf', 'it is no JSON'), (b'\xff\xfe{}', 'it is no JSON'),
    (b'[' * 100_000, 'it is no JSON'), (b'[]', 'it is no object'), (b'{}', "it has no 'name'"),
    (b'{"name": "u", "config": {"seed": 0}, "evaluations": []}', "it has no 'evaluations'"),
    (b'{"name": "u", "config": {"seed": NaN}, "evaluations": [1]}', 'NaN is no number'),
    (b'{"name": "u", "config": {"seed": 0}, "evaluations": [1]}', 'evaluation 0 is no object'),
    (json.dumps({'name': 'u', 'config': {'seed': 0}, 'evaluations': [ROW, {**ROW, 'success': 1.5}]}).encode(),
     'success=1.5 of evaluation 1 is no success in 0..1'),
    (json.dumps({'name': 'u', 'config': {'seed': 0}, 'evaluations': [LAST, {**ROW, 'step': 5}]}).encode(),
     'rollouts=0 of evaluation 1 is no count that rises')])
def test_a_file_that_is_none_is_refused(tmp_path, content, why):
  path = tmp_path / 'run.json'
  path.write_bytes(content)
  found, = beside.problems(str(path))
  assert found.startswith(f"record.beside='{path}': {path} holds no recorded run, as ") and why in found
  assert found.endswith("; put the file back, name another, or set record.beside=''")


def test_a_file_that_is_missing_is_refused(tmp_path):
  assert beside.problems('') == []
  assert 'cannot be read: No such file' in beside.problems(str(tmp_path / 'none.json'))[0]
  assert "no recorded run 'ciphers_unifrom' in kr_jax; did you mean 'ciphers_uniform'?" in beside.problems(
      'kr_jax:ciphers_unifrom')[0]
  assert "no recorded run '../report'" in beside.problems('kr_jax:../report')[0]


@pytest.mark.slow
def test_the_shipped_run_is_a_pair_of_its_config(data_dir):
  """It is recorded anew where the config or the tasks change: python -m tests.benchmarks.beside."""
  given = ciphers.get_config()
  given.tasks.data_dir = data_dir
  recorded = beside.read(given.record.beside)
  with open(beside.path(given.record.beside), 'rb') as file:
    assert len(file.read()) < 8000
  assert recorded.evaluations[-1]['rollouts'] == given.num_steps * given.alloc.rollouts_per_step
  right = [384 * row['success'] for row in recorded.evaluations]
  assert right == [pytest.approx(round(x), abs=1e-9) for x in right]  # not rounded: who gets as far is not short of it
  setup = prepare.prepare(given)
  digests = fingerprint.as_dict({'train': fingerprint.of(setup.train_tasks), 'test': fingerprint.of(setup.test_tasks)})
  assert beside.differences(recorded, {**knobs.as_dict(setup.config), 'task_digests': digests}) == []
