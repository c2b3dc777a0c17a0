"""What an attempt says at its beginning."""

import json
import re

import jax
import pytest

from configs import hardware as profiles
from kr_jax import attempt
from kr_jax import prepare
from kr_jax import train
from kr_jax.costs import hardware as hardware_lib
from kr_jax.model import policy
from kr_jax.record import claim as claim_lib
from kr_jax.record import ledger
from tests.knobs import debug_config
from tests.record.lock_test import held_by_another


def test_the_beginning_of_an_attempt(tmp_path, data_dir, clock, capsys):
  setup = prepare.prepare(debug_config(data_dir))
  hardware = hardware_lib.read(profiles.get_config())
  with attempt.begin(setup, str(tmp_path), hardware, clock, 2):
    assert clock.phase == 'other'
  said = capsys.readouterr().out
  parameters = sum(x.size for x in jax.tree.leaves(policy.init(setup.policy, jax.random.key(0))))
  assert 'R = 32 rollouts of M = 8 tasks, by knapsack' in said and 'going on at 2' in said and '$' in said
  first, *_ = ledger.read(str(tmp_path)).attempts
  assert (first['parameters'], first['first_step'], first['hardware']) == (parameters, 2, 'cpu')
  assert first['weights_compression'] == first['cache_compression'] == 1
  assert hardware_lib.load(str(tmp_path)) == hardware
  with attempt.begin(setup, str(tmp_path), None, clock, 2):
    pass
  assert hardware_lib.load(str(tmp_path)) == hardware  # that of the attempt before stays
  assert ledger.read(str(tmp_path)).attempts[1]['hardware'] is None
  json.loads((tmp_path / 'hardware.json').read_text())


@pytest.fixture(scope='module')
def setup(data_dir):
  return prepare.prepare(debug_config(data_dir, tasks__train_split='train[:40]', tasks__test_split='test[:4]',
                                      warm_start__num_steps=0))


def with_config(setup, **sections):
  """A setup whose config has other knobs: section={knob: value}, or knob=value."""
  c = setup.config
  return setup._replace(config=c.replace(**{
      name: getattr(c, name).replace(**x) if isinstance(x, dict) else x for name, x in sections.items()}))


def with_task(setup, split, row, **fields):
  tasks = list(getattr(setup, split))
  tasks[row] = tasks[row]._replace(**fields)
  return setup._replace(**{split: tasks})


def test_a_run_goes_on_with_what_changes_no_result(setup, tmp_path, caplog):
  workdir = str(tmp_path / 'run')
  attempt.claim(setup, workdir)
  attempt.claim(with_config(setup, sample={'slots': 3}, pack={'microbatch_rows': 2}, policy={'remat': 'full'},
                            evaluate={'tasks_per_batch': 3}), workdir)
  record = claim_lib.run_config(workdir)
  assert record['sample']['slots'] == 3 and 'changed' not in record and not caplog.text


def test_a_run_goes_on_with_another_rate_which_is_recorded(setup, tmp_path, caplog):
  workdir = str(tmp_path / 'run')
  attempt.claim(setup, workdir)
  (tmp_path / 'run' / 'checkpoints' / '3' / 'state').mkdir(parents=True)
  for _ in range(2):
    attempt.claim(with_config(setup, optimizer={'learning_rate': .5}), workdir)
  was = setup.config.optimizer.learning_rate
  assert claim_lib.run_config(workdir)['changed'] == [
      {'step': 3, 'knob': 'optimizer.learning_rate', 'was': was, 'is': .5}]
  assert caplog.text.count(f'optimizer.learning_rate was {was}, and is 0.5 from step 3 on') == 1


def test_another_policy_is_refused_before_anything_is_said_of_its_tasks(setup, tmp_path):
  workdir = str(tmp_path / 'run')
  attempt.claim(setup, workdir)
  other = with_task(with_config(setup, policy={'norm_eps': .5}), 'train_tasks', 0, answer='x')
  with pytest.raises(ValueError, match='holds a run of another config: policy.norm_eps was 1e-06, is 0.5. Name'):
    attempt.claim(other, workdir)


def test_a_run_does_not_end_before_the_step_that_it_is_at(setup, tmp_path):
  """Its policy would be taken for that of an earlier step."""
  workdir = str(tmp_path / 'run')
  attempt.claim(setup, workdir)
  (tmp_path / 'run' / 'checkpoints' / '4' / 'state').mkdir(parents=True)
  attempt.claim(setup, workdir)
  with pytest.raises(ValueError, match=f'^num_steps=3, and the run in --workdir={workdir} has done 4 steps, which are '
                     'not undone. Set num_steps=4 or more'):
    attempt.claim(with_config(setup, num_steps=3), workdir)
  assert claim_lib.recorded(workdir, 'num_steps') == 4


@pytest.mark.parametrize('split, name', [('train_tasks', 'training'), ('test_tasks', 'held-out')])
def test_tasks_are_compared_by_content(setup, tmp_path, split, name):
  """Not by their ids alone."""
  workdir = str(tmp_path / 'run')
  attempt.claim(setup, workdir)
  attempt.claim(with_task(setup, split, 2, difficulty=9), workdir)
  for fields, how in (({'answer': 'x'}, 'answer differs'),
                      ({'prompt': 'x', 'tokens': (1, 2)}, 'prompt and tokens differ')):
    task = getattr(setup, split)[2]
    with pytest.raises(ValueError, match=rf'the {name} tasks are not those that the run in --workdir={workdir} began '
                       rf"with: {how}, of 1 of \d+ tasks, first of '{re.escape(task.id)}' \(row 2\)\. Put the data back"):
      attempt.claim(with_task(setup, split, 2, **fields), workdir)


def test_a_run_of_an_older_version_goes_on_and_gets_its_digests(setup, tmp_path):
  workdir = str(tmp_path / 'run')
  attempt.claim(setup, workdir)
  record = claim_lib.run_config(workdir)
  digests = record.pop('task_digests')
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(record))
  (tmp_path / 'run' / 'task_digests.npz').unlink()
  attempt.claim(setup, workdir)
  assert claim_lib.run_config(workdir)['task_digests'] == digests


def test_names_of_the_hub_stay_where_a_start_names_the_commit_itself(setup, tmp_path):
  workdir = str(tmp_path / 'run')
  attempt.claim(setup._replace(pinned={'dataset': {'hf:org/x': 'hf:org/x@1'}}), workdir)
  attempt.claim(setup._replace(pinned={'dataset': {'hf:org/x@1': 'hf:org/x@1'}}), workdir)
  assert claim_lib.run_config(workdir)['hub'] == {'dataset': {'hf:org/x': 'hf:org/x@1', 'hf:org/x@1': 'hf:org/x@1'}}


def test_an_evaluation_of_other_tasks_says_so(setup, tmp_path, caplog):
  workdir = str(tmp_path / 'run')
  attempt.claim(setup, workdir)
  attempt.tell_of_changes(setup, workdir)
  fewer = with_config(setup, evaluate={'tasks': 2})._replace(test_tasks=setup.test_tasks[:2])
  attempt.tell_of_changes(fewer, workdir)
  assert not caplog.text
  attempt.tell_of_changes(with_task(setup, 'test_tasks', 1, answer='x'), workdir)
  assert f'the held-out tasks are not those that the run in {workdir} began with: answer differs, of 1' in caplog.text


def test_a_second_run_is_refused_before_anything_is_written(setup, tmp_path):
  """In one workdir, and in one directory of checkpoints."""
  shared = tmp_path / 'shared'
  with held_by_another(shared) as process:
    try:
      for config, workdir, whose in (
          (setup, shared, f'--workdir={shared}'),
          (with_config(setup, checkpoint={'directory': str(shared)}), tmp_path / 'other',
           f'checkpoint.directory={shared}')):
        with pytest.raises(ValueError, match=f'^{whose} is in use by a run: process {process.pid} on '):
          train.train(config, str(workdir))
    finally:
      process.kill()
  assert [path.name for path in tmp_path.rglob('*')] == ['shared', 'lock']


def test_the_workdir_and_the_directory_of_the_checkpoints_are_held(tmp_path, monkeypatch):
  workdir, directory = str(tmp_path / 'run'), str(tmp_path / 'shared')
  with attempt.held(workdir, directory), attempt.held(workdir, directory):
    assert {path.parent.name for path in tmp_path.glob('*/lock')} == {'run', 'shared'}
  with attempt.held(workdir, workdir):
    pass

  def refuse(path, whose):
    raise ValueError(f'{whose} is in use')

  monkeypatch.setattr(attempt.lock, 'held', refuse)
  with pytest.raises(ValueError, match=f'--workdir={workdir} is in use'):
    with attempt.held(workdir):
      pass


def test_a_disk_without_room_for_a_checkpoint_is_refused(setup, tmp_path, monkeypatch, caplog):
  """9,856 parameters, two moments of each, and 64 bytes a task. Room for one alone is warned of."""
  takes, workdir = 12 * 9856 + 64 * len(setup.train_tasks), str(tmp_path / 'run')
  monkeypatch.setattr(attempt.disks, 'free_bytes', lambda path: takes - 1)
  with pytest.raises(ValueError, match=f'takes about 12. kB, and the disk of {workdir}/checkpoints has 12. kB free'):
    attempt.claim(setup, workdir)
  assert claim_lib.run_config(workdir) == {} and not caplog.text
  monkeypatch.setattr(attempt.disks, 'free_bytes', lambda path: 2 * takes - 1)
  attempt.claim(setup, workdir)
  assert 'two have to fit' in caplog.text
  caplog.clear()
  monkeypatch.setattr(attempt.disks, 'free_bytes', lambda path: 2 * takes)
  attempt.claim(setup, workdir)
  assert not caplog.text
