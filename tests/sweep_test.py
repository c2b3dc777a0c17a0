"""launch/sweep.py: what a sweep runs, and how its runs end."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SWEEP = ROOT / 'launch' / 'sweep.py'
CONFIG = '''
from configs import arithmetic

def get_config(variant=''):
  c = arithmetic.get_config('debug')
  c.num_steps, c.evaluate.tasks, c.tasks.warm_start_split = 2, 4, 'warm_start[:64]'
  c.mesh.devices = c.policy.num_layers = 1
  c.warm_start.num_steps = 2
  c.tasks.data_dir = {data_dir!r}
  return c.lock()

def sweep():
  {sweep}
'''


@pytest.fixture(scope='module')
def sweep():
  spec = importlib.util.spec_from_file_location('sweep', SWEEP)
  module = importlib.util.module_from_spec(spec)
  sys.modules['sweep'] = module  # as dataclasses asks for
  spec.loader.exec_module(module)
  yield module
  del sys.modules['sweep']


def config(tmp_path, body, data_dir=''):
  path = tmp_path / 'mine.py'
  path.write_text(CONFIG.format(sweep=body, data_dir=data_dir))
  return str(path)


def test_each_setting_is_a_run_of_its_own(sweep, tmp_path):
  path = config(tmp_path, "yield from ({'alloc.rule': r, 'optimizer.learning_rate': x} for r in ('uniform', "
                "'knapsack') for x in (1e-4, 0.5))")
  runs = sweep.planned(path, str(tmp_path / 'runs'), None, ['--config.num_steps=3'], ['--profile=0:1'])
  assert [run.name for run in runs] == [
      'rule-uniform-learning-rate-0-0001', 'rule-uniform-learning-rate-0-5', 'rule-knapsack-learning-rate-0-0001',
      'rule-knapsack-learning-rate-0-5']
  assert runs[1].command == [
      sys.executable, '-m', 'kr_jax.main', f'--config={path}', f'--workdir={tmp_path}/runs/{runs[1].name}',
      '--config.alloc.rule=uniform', '--config.optimizer.learning_rate=0.5', '--config.num_steps=3', '--profile=0:1']
  assert {run.state for run in runs} == {'new'} and runs[1].log == tmp_path / 'runs' / f'{runs[1].name}.log'


def test_the_shipped_sweep(sweep):
  runs = sweep.settings('kr_jax:arithmetic', [])
  assert len(runs) == 6 and {steps for *_, steps in runs} == {120}
  assert {setting['alloc.rule'] for _, setting, _ in runs} == {'uniform', 'knapsack'}


@pytest.mark.parametrize('body, given, message', [
    ('return []', [], 'yields no run'), ("yield {}", [], 'a run without knobs'),
    ("yield {'alloc.rul': 'uniform'}", [], "there is no knob 'alloc.rul'"),
    ("yield {'alloc.rule': 'fair'}", [], "alloc.rule='fair'"),
    ("yield {'seed': 0}", ['--config.seed=1'], '--config.seed is set for each run'),
    ("yield {'seed': 0}; yield {'seed': 0}", [], 'yields seed-0 twice')])
def test_what_is_no_sweep_is_refused(sweep, tmp_path, body, given, message):
  with pytest.raises(ValueError, match=message):
    sweep.settings(config(tmp_path, body), given)


def test_a_config_without_a_sweep_is_refused(sweep, tmp_path, monkeypatch, capfd):
  monkeypatch.chdir(tmp_path)  # configs of the checkout are found from anywhere
  assert sweep.main(['configs/qwen3_4b.py']) == 1
  assert 'configs/qwen3_4b.py has no sweep(); write one' in capfd.readouterr().err


@pytest.mark.parametrize('flags, message', [
    (['--conf.seed=1'], '--conf.seed=1 is no flag of a sweep'), (['--jobs=0'], '--jobs=0 must be 1 or more')])
def test_wrong_flags(sweep, flags, message, capfd):
  with pytest.raises(SystemExit) as end:
    sweep.main(['kr_jax:arithmetic', *flags])
  assert end.value.code == 2 and message in capfd.readouterr().err


def test_a_list_runs_nothing(sweep, tmp_path, capfd):
  assert sweep.main([config(tmp_path, "yield {'seed': 3}"), f'--workdir={tmp_path}/runs', '--list']) == 0
  name, command = capfd.readouterr().out.splitlines()
  assert name == 'seed-3 (new)' and command.endswith('/runs/seed-3 --config.seed=3')
  assert not (tmp_path / 'runs').exists()


def test_long_names_stay_apart(sweep):
  names = [sweep.slug(f'{"a_long_knob-" * 5}{i}') for i in range(3)]
  assert len(set(names)) == 3 and all(len(name) <= 40 and name[0].isalpha() for name in names)
  assert sweep.name_of({'alloc.rule': 'uniform', 'grpo.loss': 'x', 'alloc.loss': 1}) == (
      'rule-uniform-grpo.loss-x-alloc.loss-1')


def test_what_is_finished(sweep, tmp_path):
  state = lambda steps=4: sweep.state_of(str(tmp_path), steps)
  assert state() == 'new'
  (tmp_path / 'config.json').write_text('{"num_steps": 4}')
  assert state() == 'new'
  ledger = tmp_path / 'ledger.jsonl'
  for last, found in (({'phase': 'update'}, 'unfinished'), ({'ended': 1.0, 'reason': 'stopped'}, 'unfinished'),
                      ({'ended': 1.0, 'reason': 'done'}, 'finished')):
    ledger.write_text(json.dumps({'attempt': 0}) + '\n' + json.dumps(last) + '\n')
    assert state() == found
  assert state(5) == 'unfinished'
  ledger.write_text('{"ended": 1.0, "rea')
  assert state() == 'unfinished'


def test_runs_on_tpus_are_handed_to_tpu_sh(sweep, tmp_path, monkeypatch):
  monkeypatch.setattr(sweep, 'state_of', lambda workdir, steps: 'new')
  env = tmp_path / 'spot.env'
  env.write_text('# a slice\nname=ari\nzone=us-west4-a\nbucket="gs://b/runs/"\n')
  run, = sweep.planned(config(tmp_path, "yield {'seed': 1}"), '', str(env), [], [])
  assert run.command[0].endswith('launch/tpu.sh') and run.command[1:4] == ['up', f'--env={env}', '--name=ari-seed-1']
  assert run.command[5:] == ['--workdir=gs://b/runs/mine_sweep/seed-1', '--keep', '--delete-after', '--',
                             '--config.seed=1']
  env.write_text('zone=us-west4-a\n')
  with pytest.raises(ValueError, match='give --workdir=gs://BUCKET/DIR'):
    sweep.planned(config(tmp_path, "yield {'seed': 1}"), '', str(env), [], [])


def commands(sweep, tmp_path, *sources):
  return [sweep.Run(f'run{i}', str(tmp_path / f'run{i}'), 'new', [sys.executable, '-c', source], tmp_path / f'{i}.log')
          for i, source in enumerate(sources)]


def test_a_failure_leaves_the_others_alone(sweep, tmp_path, capfd):
  """A run that says "start me again" is started again, three times at most."""
  again = ('import pathlib, sys\np = pathlib.Path({!r})\nn = len(p.read_text()) if p.exists() else 0\n'
           "p.write_text('x' * (n + 1))\nsys.exit({})")
  runs = commands(sweep, tmp_path, "raise ValueError('no such knob')",
                  again.format(str(tmp_path / 'once'), '75 * (n < 1)'), again.format(str(tmp_path / 'always'), 75), '')
  codes = sweep.Children(2, of_group=False).run(runs)
  assert [codes[run] for run in runs] == [1, 0, 75, 0]
  assert (tmp_path / 'once').read_text() == 'xx' and (tmp_path / 'always').read_text() == 'xxx'
  out = capfd.readouterr().out
  assert 'run0: left with 1 after 0.0 min' in out and ': ValueError: no such knob; see' in out
  assert out.count('run1: goes on') == 1 and out.count('run2: left with 75, and is started again') == 2


@pytest.mark.parametrize('number, times', [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_signal_reaches_the_runs_that_run(sweep, tmp_path, number, times):
  """They end in order; what waits does not begin."""
  source = '''
import signal, sys, time
seen = []
for s in (signal.SIGINT, signal.SIGTERM):
  signal.signal(s, lambda number, frame: seen.append(number))
print('rea' + 'dy', flush=True)
while len(seen) < {times}:
  time.sleep(0.01)
sys.exit(10 * len(seen) + seen[0])
'''.format(times=times)
  runs = commands(sweep, tmp_path, source, source, 'print("must not run")')

  def send():
    is_ready = lambda log: log.exists() and 'ready' in log.read_text()
    while not all(is_ready(tmp_path / f'{i}.log') for i in range(2)):
      time.sleep(0.01)
    for _ in range(times):
      os.kill(os.getpid(), number)
      time.sleep(0.1)

  thread = threading.Thread(target=send)
  thread.start()
  children = sweep.Children(2, of_group=False)
  codes = children.run(runs)
  thread.join()
  assert codes == {runs[0]: 10 * times + number, runs[1]: 10 * times + number} and children.stopped_by == number
  assert not (tmp_path / '2.log').exists()


@pytest.mark.exhaustive
def test_two_arms_run_and_are_compared(tmp_path, data_dir):
  """A run that is finished is not run again, and one that stopped goes on."""
  path = config(tmp_path, "yield from ({'alloc.rule': rule} for rule in ('uniform', 'knapsack'))", data_dir)
  command = [sys.executable, SWEEP, path, f'--workdir={tmp_path}/runs', '--jobs=2']
  found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert found.returncode == 0, found.stdout + found.stderr
  assert '2 runs: 0 finished, 0 to go on with, 2 new; 2 at a time' in found.stdout
  assert f'see {tmp_path}/runs/report.html' in found.stdout
  page = (tmp_path / 'runs' / 'report.md').read_text()
  assert 'uniform' in page and 'knapsack' in page
  with (tmp_path / 'runs' / 'rule-uniform' / 'ledger.jsonl').open('a') as ledger:
    ledger.write('{"attempt": 9, "started": 1.0}\n')
  found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert found.returncode == 0, found.stdout + found.stderr
  assert '2 runs: 1 finished, 1 to go on with, 0 new' in found.stdout and 'rule-uniform: goes on' in found.stdout
  assert 'rule-knapsack:' not in found.stdout
