"""A workdir and its checkpoints are one run's."""

import json

import pytest

from kr_jax.record import claim
from kr_jax.record import saved

CONFIG = {'seed': 0, 'tasks': {'dataset': 'arithmetic', 'per_step': 32, 'data_dir': ''},
          'checkpoint': {'every': 20, 'keep': 2}}


def changed(**knobs) -> dict:
  """CONFIG with 'section__knob' set."""
  config = json.loads(json.dumps(CONFIG))
  for name, x in knobs.items():
    *sections, knob = name.split('__')
    node = config
    for section in sections:
      node = node[section]
    node[knob] = x
  return config


def claimed(workdir) -> dict:
  return json.loads((workdir / 'config.json').read_text())


def test_claim_a_fresh_workdir_and_again(tmp_path):
  workdir = tmp_path / 'runs' / 'one'
  for _ in range(2):
    claim.claim(str(workdir), CONFIG)
    assert claimed(workdir) == CONFIG
    assert [path.name for path in workdir.iterdir()] == ['config.json']


def test_claim_a_workdir_without_the_record_of_the_checkpoints(tmp_path):
  directory, workdir = tmp_path / 'run' / 'checkpoints', str(tmp_path / 'run')
  (directory / '4.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
  (directory / '4').mkdir()  # which holds nothing, and is no checkpoint
  claim.claim(workdir, CONFIG, directory=str(directory))
  (directory / '4' / 'state').mkdir()
  assert saved.latest(str(directory)) == 4
  claim.claim(workdir, CONFIG, directory=str(directory))
  (tmp_path / 'run' / 'config.json').unlink()
  with pytest.raises(ValueError, match=f'{directory} holds checkpoints of a run, and --workdir={workdir} has no '
                     'record of it'):
    claim.claim(workdir, CONFIG, directory=str(directory))


def test_the_claim_stands_beside_the_checkpoints_too(tmp_path):
  """By another config, or from another workdir, they are not gone on with; nor is anything written."""
  directory = str(tmp_path / 'shared' / 'checkpoints')
  of = lambda name, config=CONFIG: claim.claim(str(tmp_path / name), config, directory=directory)
  of('one')
  assert claimed(tmp_path / 'shared') == CONFIG | {'workdir': str(tmp_path / 'one')}
  shared = f'checkpoint.directory={tmp_path}/shared'
  with pytest.raises(ValueError, match=f'{shared} holds the checkpoints of a run of another config: seed was 0, '
                     'is 1. Name'):
    of('two', changed(seed=1))
  with pytest.raises(ValueError, match=f'{shared} is that of the run in {tmp_path}/one, and --workdir={tmp_path}/two '
                     'is another'):
    of('two')
  with pytest.raises(ValueError, match=f'checkpoint.directory={tmp_path}/one is that of the run in {tmp_path}/one'):
    claim.claim(str(tmp_path / 'two'), changed(checkpoint__directory='one'), directory=f'{tmp_path}/one/checkpoints')
  (tmp_path / 'steps' / '4' / 'state').mkdir(parents=True)
  with pytest.raises(ValueError, match=f'checkpoint.directory={tmp_path}/steps holds steps itself: .* Name the'):
    claim.claim(str(tmp_path / 'two'), CONFIG, directory=f'{tmp_path}/steps/checkpoints')
  assert not (tmp_path / 'two' / 'config.json').exists()
  (tmp_path / 'one').rename(tmp_path / 'moved')
  of('moved')
  assert claimed(tmp_path / 'shared')['workdir'] == str(tmp_path / 'moved')
  (tmp_path / 'shared' / 'checkpoints' / '4' / 'state').mkdir(parents=True)
  (tmp_path / 'moved' / 'config.json').unlink()
  with pytest.raises(ValueError, match=f'holds checkpoints of a run, whose workdir is {tmp_path}/moved, and --wor'):
    of('two')


def test_a_run_of_an_older_version_gets_the_second_claim(tmp_path):
  claim.claim(str(tmp_path / 'run'), CONFIG)
  (tmp_path / 'shared' / 'checkpoints' / '4' / 'state').mkdir(parents=True)
  claim.claim(str(tmp_path / 'run'), CONFIG, directory=str(tmp_path / 'shared' / 'checkpoints'))
  assert claimed(tmp_path / 'shared')['seed'] == 0 and 'workdir' not in claimed(tmp_path / 'run')


def test_a_warned_change_is_recorded_with_its_step(tmp_path, caplog):
  directory = tmp_path / 'checkpoints'
  of = lambda config: claim.claim(str(tmp_path), config, warned=('checkpoint.every', 'tasks'), directory=str(directory))
  assert of(CONFIG) == [] and 'changed' not in claimed(tmp_path)
  assert of(changed(tasks__per_step=3)) == [{'step': 0, 'knob': 'tasks.per_step', 'was': 32, 'is': 3}]
  assert of(changed(tasks__per_step=3)) == [] and len(claimed(tmp_path)['changed']) == 1
  (directory / '7' / 'state').mkdir(parents=True)
  of(changed(tasks__per_step=3, checkpoint__every=5))
  assert claimed(tmp_path)['changed'] == [{'step': 0, 'knob': 'tasks.per_step', 'was': 32, 'is': 3},
                                          {'step': 7, 'knob': 'checkpoint.every', 'was': 20, 'is': 5}]
  assert 'checkpoint.every was 20, and is 5 from step 7 on; config.json keeps both' in caplog.text


@pytest.mark.parametrize('x, y, is_same', [
    (float('nan'), float('nan'), True), ([1, [float('nan')]], [1.0, [float('nan')]], True), (float('nan'), 1.0, False),
    (True, 1, False), (None, 0, False), ([1], [1, 1], False), ('a', 'a', True)])
def test_what_is_the_same(x, y, is_same):
  assert claim.same(x, y) == is_same


def test_a_knob_that_is_nan_does_not_differ_from_itself(tmp_path):
  for _ in range(2):
    claim.claim(str(tmp_path), changed(seed=float('nan')))


@pytest.mark.parametrize('content', [b'', b'{"seed": 0', b'[]', b'\xff\xfe', b'[' * 100_000])
def test_a_record_that_cannot_be_read_is_not_overwritten(tmp_path, content):
  (tmp_path / 'config.json').write_bytes(content)
  with pytest.raises(ValueError, match=f'{tmp_path}/config.json, the config of the run, cannot be read: .* Put a '
                     'copy of it'):
    claim.claim(str(tmp_path), CONFIG)
  assert (tmp_path / 'config.json').read_bytes() == content


def test_claim_with_changed_knobs_names_old_and_new(tmp_path):
  claim.claim(str(tmp_path), CONFIG)
  with pytest.raises(ValueError) as error:
    claim.claim(str(tmp_path), changed(seed=3, tasks__per_step=16, tasks__data_dir='/data'),
                     may_change=('tasks.data_dir', 'checkpoint'))
  message = str(error.value)
  assert f'--workdir={tmp_path} holds a run of another config' in message
  assert 'seed was 0, is 3; tasks.per_step was 32, is 16' in message
  assert 'Name another --workdir' in message
  assert 'data_dir' not in message and 'checkpoint' not in message
  assert claimed(tmp_path) == CONFIG


def test_claim_with_a_knob_more_or_less(tmp_path):
  claim.claim(str(tmp_path), CONFIG)
  with pytest.raises(ValueError, match=r'tasks.extra was None, is 1\.'):
    claim.claim(str(tmp_path), changed(tasks__extra=1))
  less = changed()
  del less['tasks']['per_step']
  with pytest.raises(ValueError, match=r'tasks.per_step was 32, is None\.'):
    claim.claim(str(tmp_path), less)


def test_claim_with_a_knob_that_is_newer_than_the_run(tmp_path):
  """It was its default."""
  claim.claim(str(tmp_path), CONFIG)
  newer = changed(tasks__columns={'problem': '', 'answer': ''}, mesh={'data': 1}, topologies=[])
  claim.claim(str(tmp_path), newer)
  assert claimed(tmp_path) == newer
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
  with pytest.raises(ValueError, match=r"config: tasks.columns.answer was '', is 'x'\."):
    claim.claim(str(tmp_path), changed(tasks__columns={'answer': 'x', 'problem': ''}))


@pytest.mark.parametrize('knobs, may_change', [
    ({'checkpoint__every': 5, 'checkpoint__keep': 9}, ('checkpoint',)),
    ({'checkpoint__every': 5}, ('checkpoint.every',)),
    ({'seed': 1}, ('seed', 'tasks')),
    ({'tasks__files': {'one': 'a', 'two': 'b'}}, ('tasks.files',)),
])
def test_claim_with_knobs_that_may_change(tmp_path, knobs, may_change):
  claim.claim(str(tmp_path), CONFIG, may_change=may_change)
  claim.claim(str(tmp_path), changed(**knobs), may_change=may_change)
  assert claimed(tmp_path) == changed(**knobs)
  with pytest.raises(ValueError, match='holds a run of another config'):  # by no other name
    claim.claim(str(tmp_path), CONFIG, may_change=('keep', 'every', 'check', 'tasks.seed'))


@pytest.mark.parametrize('name', ['file', 'file/workdir'])
def test_claim_what_cannot_be_written(tmp_path, name):
  (tmp_path / 'file').write_text('held')
  with pytest.raises(ValueError, match=rf'cannot write to --workdir={tmp_path}/{name}: .*; '
                                       'name a directory that can be written'):
    claim.claim(str(tmp_path / name), CONFIG)
  assert (tmp_path / 'file').read_text() == 'held'
