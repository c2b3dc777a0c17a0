"""What is made of a run reads the run's own config, and says so where it is told another one."""

import json
import pathlib

import pytest

from kr_jax import knobs
from kr_jax import run_config
from kr_jax.record import claim
from tests.knobs import debug_config
from tests.main_test import calls


@pytest.fixture
def workdir(tmp_path):
  """Of a run with knobs of its own."""
  config = claim.as_read(knobs.as_dict(knobs.read(debug_config(
      '/data', policy__norm_eps=1e-5, num_steps=3, evaluate__rollouts=4, sample__slots=8,
      tasks__mixture=(('arithmetic', 1.0),)))))
  claim.claim(str(tmp_path), config | {'train_ids': '0', 'hub': {}})
  return str(tmp_path)


def given(**changed):
  """The config of a command line that says no more than the config file, but for these knobs."""
  return debug_config('', tasks__mixture=(('arithmetic', 1.0),), policy__norm_eps=1e-5, **changed)


def test_without_a_config_it_is_the_run_s_own(workdir):
  own = run_config.recorded(workdir)
  assert (own.policy.norm_eps, own.num_steps, own.tasks.mixture) == (1e-5, 3, (('arithmetic', 1.0),))
  c = run_config.get_config(workdir)
  assert knobs.read(c) == own
  c.evaluate.pass_at = (1, 2)
  c.tasks.thinking = None
  assert knobs.read(run_config.of_run(c, workdir)) == own.replace(evaluate=own.evaluate.replace(pass_at=(1, 2)))
  assert knobs.read(run_config.get_config(f'{workdir}/none')) == knobs.Config()


def test_what_may_be_otherwise(workdir):
  """How it is evaluated, and where things are. What a file leaves open, or what is of training, is the run's."""
  c = knobs.read(run_config.of_run(given(
      evaluate__rollouts=2, mesh__devices=0, sample__slots=9, num_steps=7, optimizer__learning_rate=1.0,
      checkpoint__directory='/other', rewards__workers=3), workdir))
  assert (c.evaluate.rollouts, c.mesh.devices, c.sample.slots, c.checkpoint.directory) == (2, 0, 9, '/other')
  assert (c.num_steps, c.tasks.data_dir, c.rewards.workers) == (3, '/data', 3) and c.optimizer.learning_rate < 1
  assert knobs.read(run_config.of_run(given(), workdir, ['tasks.data_dir'])).tasks.data_dir == ''


def test_what_may_not_is_refused_by_name(workdir):
  other = given(policy__rope_theta=5.0, rewards__verifier='math', seed=3)
  with pytest.raises(ValueError) as error:
    run_config.of_run(other, workdir, ['policy.rope_theta'])
  assert str(error.value) == (
      "seed=3 of --config: the run has 0; --config.policy.rope_theta=5.0: the run has 10000.0; rewards.verifier='math' "
      f"of --config: the run has 'tests.graders:has_a_one'. Policy, data and seed are those of the run in "
      f'{workdir}: leave these flags out, and --config as well, which is not needed')
  with pytest.raises(ValueError, match='^--config.num_steps=4: the run has 3. Policy, .*: leave this flag out, and'):
    run_config.of_run(given(num_steps=4), workdir, ['num_steps'])
  with pytest.raises(ValueError, match='has no config.json, which says what its run is'):
    run_config.of_run(given(), f'{workdir}/none')


def test_the_checkpoints_are_the_run_s_own(workdir, tmp_path):
  """Wherever they are."""
  other = claim.as_read(knobs.as_dict(knobs.read(given())))
  claim.claim(str(tmp_path / 'other'), other | {'train_ids': '1'})
  same = claim.as_read(knobs.as_dict(run_config.recorded(workdir)))
  claim.claim(str(tmp_path / 'same'), same | {'train_ids': '0', 'num_steps': 7})
  for name in ('same', 'nothing'):
    directory = str(tmp_path / name)
    found = run_config.of_run(given(checkpoint__directory=directory), workdir)
    assert found['checkpoint']['directory'] == directory
  other['seed'] = 5
  claim.claim(str(tmp_path / 'third'), other)
  with pytest.raises(ValueError, match=f'checkpoint.directory={tmp_path}/third holds the checkpoints of another run than '
                     rf'that in {workdir}: seed was 5, is 0'):
    run_config.of_run(given(checkpoint__directory=f'{tmp_path}/third'), workdir)


def test_the_dataset_s_own_verifier_is_what_the_run_took(workdir):
  assert run_config.of_run(given(rewards__verifier=''), workdir)['rewards']['verifier'] == 'tests.graders:has_a_one'


def test_names_of_the_hub_stand_for_the_commits_of_the_run(tmp_path):
  first, second = 'a' * 40, 'b' * 40
  config = lambda checkpoint, dataset: debug_config('', policy__checkpoint=checkpoint, tasks__dataset=dataset,
                                                    tasks__test=(f'{dataset}:test[:5]',))
  had = config(f'hf:org/x@{first}', f'file:hf:org/y/a.csv@{second}')
  claim.claim(str(tmp_path), claim.as_read(knobs.as_dict(knobs.read(had))) | {
      'hub': {'model': {'hf:org/x@main': f'hf:org/x@{first}'},
              'dataset': {'hf:org/y/a.csv': f'hf:org/y/a.csv@{second}'}}})
  for checkpoint in ('hf:org/x', 'hf:org/x@main', f'hf:org/x@{first}'):
    assert knobs.read(run_config.of_run(config(checkpoint, 'file:hf:org/y/a.csv'), str(tmp_path))) == knobs.read(had)
  for checkpoint, dataset in (('hf:org/x@v2', 'file:hf:org/y/a.csv'), ('hf:org/x', f'file:hf:org/y/a.csv@{first}'),
                              ('hf:org/z', 'file:hf:org/y/a.csv')):
    with pytest.raises(ValueError, match='the run has'):
      run_config.of_run(config(checkpoint, dataset), str(tmp_path))


def test_knobs_that_are_older_or_newer_than_the_run(workdir):
  tree = claim.run_config(workdir)
  del tree['evaluate']['perturb']
  tree['alloc']['discount'] = .5
  (pathlib.Path(workdir) / 'config.json').write_text(json.dumps(tree))
  assert run_config.recorded(workdir).evaluate.perturb == ()
  tree['seed'] = -1
  (pathlib.Path(workdir) / 'config.json').write_text(json.dumps(tree))
  with pytest.raises(ValueError, match=f'{workdir}/config.json is no config of this version: seed=-1'):
    run_config.recorded(workdir)


@pytest.mark.slow
def test_the_command_line_of_an_evaluation(workdir, tmp_path):
  """It needs no config, and what is wrong is said before anything heavy is loaded."""
  at = ('--mode=evaluate', f'--workdir={workdir}')
  (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "reward_mean": 0.5}\n')
  cases = {
      at: (1, f'error: {workdir}/checkpoints holds no checkpoint; train first'),
      (*at, '--config.evaluate.rollouts=2', '--config.evaluate.pass_at=(1, 2)'): (1, 'checkpoints holds no checkpoint'),
      (*at, '--config.policy.norm_eps=1.0'): (1, 'error: --config.policy.norm_eps=1.0: the run has 1e-05. Policy, data'),
      ('--mode=export', at[1], '--config.num_steps=9'): (1, 'error: --config.num_steps=9: the run has 3'),
      (*at, '--config=configs/arithmetic.py:debug'): (1, "policy.num_layers=2 of --config: the run has 1"),
      (*at, '--config.policy.norm_ep=1'): (2, "there is no such knob; did you mean 'policy.norm_eps'?"),
      ('--config=configs/arithmetic.py:debug', at[1]): (
          1, f'error: {at[1]} holds a run of another config: '),
      ('--mode=evaluate', f'--workdir={tmp_path}/none'): (1, f'error: --workdir={tmp_path}/none is no directory; train')}
  for flags, (status, output) in zip(cases, calls(tmp_path, [('', *flags) for flags in cases])):
    assert (status, cases[flags][1] in output) == (cases[flags][0], True), (flags, output)


def test_a_run_goes_on_as_far_as_its_knobs_say(workdir, tmp_path):
  """A look at the record, before anything is loaded."""
  own = run_config.recorded(workdir)
  changed = own.replace(num_steps=4, sample=own.sample.replace(slots=2), rewards=own.rewards.replace(verifier=''))
  assert run_config.problems(changed, workdir) == run_config.problems(changed, f'{workdir}/none') == []
  assert run_config.problems(own.replace(seed=4), workdir) == []  # no step is done: another run may begin there
  (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "reward_mean": 0.5}\n')
  assert run_config.problems(own.replace(seed=4), workdir) == [
      f'--workdir={workdir} holds a run of another config: seed was 0, is 4. Name another --workdir, or set these knobs '
      'back']
  (tmp_path / 'checkpoints' / '7' / 'state').mkdir(parents=True)
  assert run_config.problems(own, workdir)[0].startswith(f'num_steps=3, and the run in --workdir={workdir} has done 7')
  (tmp_path / 'config.json').write_text('x')
  assert run_config.problems(own, workdir)[0].startswith(f'{workdir}/config.json, the config of the run, cannot be read')


def test_the_command_line_where_the_record_cannot_be_read(workdir, tmp_path):
  (tmp_path / 'config.json').write_text('{"seed": 0')
  (status, output), = calls(tmp_path, [('', '--mode=evaluate', f'--workdir={workdir}')])
  assert status == 1 and output.startswith(f'error: {workdir}/config.json, the config of the run, cannot be read: ')
  assert output.count('\n') == 1
