"""Training from Python: one call, as the command line trains."""

import importlib
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

import kr_jax
from kr_jax import library
from kr_jax import train
from kr_jax.rewards import worker
from tests import knobs

ROOT = pathlib.Path(__file__).parents[1]
STATUS = 75  # of a stop, which a run from Python does not end with


@pytest.fixture
def config(data_dir):
  return knobs.debug_config(data_dir, num_steps=2, evaluate__every=0, warm_start__num_steps=0)


def lines(workdir):
  return [json.loads(line) for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()]


def wrong(config, workdir='/nowhere'):
  with pytest.raises(ValueError) as caught:
    kr_jax.run(config, workdir)
  return str(caught.value)


@pytest.mark.exhaustive
def test_a_run_its_end_and_its_continuation(config, tmp_path):
  """In one process: a run, which is then complete; more steps of it; and another config, in another thread."""
  seen, workdir = [], str(tmp_path / 'run')
  run = kr_jax.run(config, workdir, on_step=seen.append)
  assert run.is_complete and run.steps.rows == 2 and run.tasks.rows and run.rollouts.rows
  assert seen == lines(workdir) and [x['step'] for x in seen] == [0, 0, 1, 2]
  assert 'eval/avg@8' in seen[0] and 'reward_mean' in seen[1]
  assert (pathlib.Path(workdir) / 'summary.json').exists() and run.config['num_steps'] == 2
  assert json.loads((pathlib.Path(workdir) / 'hardware.json').read_text())['profiles']['cpu']  # the shipped one
  again = kr_jax.run(config, workdir, on_step=lambda line: pytest.fail('nothing is left to do'))
  assert again.is_complete and again.steps['reward_mean'].tolist() == run.steps['reward_mean'].tolist()
  config.num_steps = 3
  found = []
  thread = threading.Thread(target=lambda: found.append(kr_jax.run(config, workdir, on_step=seen.append)))
  thread.start()
  thread.join()
  assert found[0].is_complete and found[0].steps.rows == 3
  assert [x['step'] for x in seen] == [0, 0, 1, 2, 2, 3] and seen == lines(workdir)
  config.num_steps = 4
  with pytest.raises(ZeroDivisionError):  # an error of on_step ends the run in order
    kr_jax.run(config, workdir, on_step=lambda line: 1 / 0)
  assert kr_jax.run(config, workdir).is_complete


@pytest.mark.slow
def test_an_interrupt_ends_the_run_in_order(config, tmp_path, capfd):
  """As a notebook's stop button does; the same call goes on after it."""
  seen, workdir = [], tmp_path / 'run'

  def on_step(line):
    seen.append(line)
    if 'reward_mean' not in line:  # the evaluation before the first step
      os.kill(os.getpid(), signal.SIGINT)

  run = kr_jax.run(config, workdir, on_step=on_step)
  assert not run.is_complete and run.evaluations.rows == 1 and seen == lines(workdir)
  assert 'stopped after 0 of 2 steps' in capfd.readouterr().out
  run = kr_jax.run(config, workdir, on_step=seen.append)
  assert run.is_complete and seen == lines(workdir) and len(seen) == 4


def test_a_stop_returns_what_there_is(config, tmp_path, monkeypatch, capsys):
  """SystemExit of a stop would end a notebook."""
  def stopped(setup, workdir, hardware, on_step):
    assert wrong(config).startswith('a run goes on in this process already') and hardware.profiles
    error = SystemExit('stopped after 0 of 2 steps')
    error.code = STATUS
    raise error

  monkeypatch.setattr(train, 'train', stopped)
  monkeypatch.setattr(library, 'begin', lambda config, workdir: None)
  monkeypatch.setattr(library, 'problems', lambda config: [])
  monkeypatch.setattr(library, 'unwritable', lambda directories: [])
  monkeypatch.setattr(library, 'keep', lambda *places: None)
  (tmp_path / 'run').mkdir()
  run = kr_jax.run(config, tmp_path / 'run')
  assert not run.is_complete and run.steps.rows == 0
  assert capsys.readouterr().out == 'stopped after 0 of 2 steps\n'
  kr_jax.run(config, tmp_path / 'run')  # the one before is over


def test_all_that_is_wrong_is_said_at_once(config, tmp_path):
  config = kr_jax.config('arithmetic:debug')
  config.alloc.rul, config.alloc.low = 1, -1
  assert wrong(config).splitlines()[0] == 'the run cannot start:'
  assert "there is no knob alloc.rul; did you mean 'rule'?" in wrong(config) and '\nalloc.low=-1 (' in wrong(config)
  config = kr_jax.config('arithmetic:debug')
  config.tasks = 3
  assert wrong(config) == 'tasks=3 must be a section, which holds knobs by name'
  config = kr_jax.config('arithmetic:debug')
  config.tasks.dataset, config.policy.checkpoint = 'arithmetc', 'nowhere'
  assert "did you mean 'arithmetic'" in wrong(config) and "'nowhere'" in wrong(config)
  assert wrong('arithmetc').startswith("there is no config 'arithmetc' in kr_jax")
  (tmp_path / 'file').write_text('')
  assert wrong('arithmetic:debug', tmp_path / 'file' / 'run').startswith('cannot write to workdir=')


@pytest.mark.parametrize('verifier, name', [
    (lambda completion, task: True, 'verify'), (wrong, 'wrong'), ('__main__:mine', 'mine')])
def test_a_function_of_a_notebook_is_no_verifier(verifier, name):
  config = kr_jax.config('arithmetic:debug')
  config.rewards.verifier = verifier
  said = wrong(config)
  assert '%%writefile verifiers.py' in said and said.endswith(f"set rewards.verifier='verifiers.py:{name}'")


def test_what_needs_the_extra_says_so(monkeypatch):
  def absent(name):
    raise ModuleNotFoundError(f'No module named {lacking!r}', name=lacking)

  monkeypatch.setattr(importlib, 'import_module', absent)
  lacking = 'etils.epath'
  with pytest.raises(ImportError, match=r"kr_jax.read needs etils.epath, .* pip install 'kr_jax\[train\]'"):
    kr_jax.read('x')
  lacking = 'kr_jax.nothing'  # an error of ours
  with pytest.raises(ModuleNotFoundError, match='No module named'):
    kr_jax.run('x', 'y')
  monkeypatch.setattr(library, '_OF_TRAIN', ('os', 'no_such_module', 'nor_this'))
  assert library.missing() == ["no_such_module, nor_this are not installed: pip install 'kr_jax[train]'"]


def test_the_import_is_light():
  code = 'import sys; before = set(sys.modules); import kr_jax; print(*sorted(set(sys.modules) - before))'
  done = subprocess.run(
      [sys.executable, '-I', '-c', f'import importlib, sys; sys.path.insert(0, {str(ROOT)!r}); {code}'],
      capture_output=True, text=True, check=True)
  assert done.stdout.split() == ['kr_jax']


SCRIPT = '''
import sys
import kr_jax
print('begun', __name__)
config = kr_jax.config('arithmetic:debug')
config.num_steps, config.tasks.data_dir, config.record.page = 1, sys.argv[2], False
config.warm_start.num_steps, config.evaluate.tasks, config.policy.num_layers = 0, 8, 1
config.rewards.verifier = 'tests.graders:has_a_one'
print(kr_jax.run(config, sys.argv[1]).is_complete)
'''


@pytest.mark.exhaustive
def test_a_script_without_a_main_guard(tmp_path, data_dir):
  """Worker processes import nothing of it: it runs once."""
  (tmp_path / 'script.py').write_text(SCRIPT)
  done = subprocess.run([sys.executable, tmp_path / 'script.py', tmp_path / 'run', data_dir], capture_output=True,
                        text=True, env={'PATH': '/usr/bin:/bin', 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('begun __main__') == 1 and done.stdout.splitlines()[-1] == 'True'


@pytest.mark.slow
def test_a_verifier_is_refused_before_the_workdir_is_claimed(config, tmp_path):
  """One that is not there, that ends its process, that cannot be called. The corrected config begins there."""
  ending, wrong_call = tmp_path / 'ending.py', tmp_path / 'wrong_call.py'
  ending.write_text('import sys; sys.exit(3)')
  wrong_call.write_text('def verify(completion): return True')
  for verifier, message in (('tests.graders:has_a_onr', 'cannot be imported: AttributeError'),
                            (f'{wrong_call}:verify', 'cannot be called with'),
                            (f'{ending}:verify', 'the process that imports the verifiers ended with 3')):
    config.rewards.verifier = verifier
    with pytest.raises(ValueError, match=message):
      library.begin(config, str(tmp_path / 'run'))
    assert not (tmp_path / 'run' / 'config.json').exists()
  config.rewards.verifier = 'tests.graders:has_a_one'
  for seed in (0, 3):  # and where the start failed after that
    config.seed = seed
    library.begin(config, str(tmp_path / 'run'))
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['seed'] == seed


NO_GUARD = '''
import kr_jax

def verify(completion, task):
  return True

config = kr_jax.config('arithmetic:debug')
config.num_steps, config.tasks.data_dir = 1, {data_dir!r}
config.rewards.verifier = f'{{__file__}}:verify'
kr_jax.run(config, {workdir!r})
'''


def test_a_program_that_only_imports_the_script_does_not_run_it(monkeypatch):
  """As the processes of verifiers do, and those that multiprocessing spawns."""
  monkeypatch.setenv(worker.IS_VERIFIER, '1')
  with pytest.raises(RuntimeError, match="processes of verifiers import the file.*under if __name__ == '__main__':"):
    kr_jax.run('arithmetic:debug', '/nowhere')
  monkeypatch.delenv(worker.IS_VERIFIER)
  monkeypatch.setattr(multiprocessing.current_process(), '_inheriting', True, raising=False)
  with pytest.raises(RuntimeError, match='a process of multiprocessing imports the file'):
    kr_jax.run('arithmetic:debug', '/nowhere')


@pytest.mark.slow
def test_a_verifier_in_a_script_without_a_main_guard(tmp_path, data_dir):
  """It is told at once, and the script is not run again and again."""
  script = tmp_path / 'script.py'
  script.write_text(NO_GUARD.format(data_dir=data_dir, workdir=str(tmp_path / 'run')))
  done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env={
      'PATH': '/usr/bin:/bin', 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("put the call under if __name__ == '__main__':")
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_a_run_goes_on_with_its_own_prices(tmp_path, caplog):
  """Unless others are given."""
  from kr_jax.costs import hardware
  assert library.priced(str(tmp_path)) is None and not caplog.text
  profiles = kr_jax.config('hardware')
  profiles.site.pue = 1.75
  own = hardware.read(profiles)
  hardware.save(str(tmp_path), own)
  assert library.priced(str(tmp_path)) == own
  (tmp_path / 'hardware.json').write_text('{')
  assert library.priced(str(tmp_path)) is None
  assert f'{tmp_path}/hardware.json cannot be read: ' in caplog.text and 'profiles that it would begin' in caplog.text
