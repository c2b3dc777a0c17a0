"""The command line, as a user meets it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from kr_jax.model import weights

ROOT = pathlib.Path(__file__).parents[1]


def main(*flags, config='configs/arithmetic.py:debug'):
  return subprocess.run(
      [sys.executable, '-m', 'kr_jax.main', *[f'--config={config}'] * bool(config), *flags], cwd=ROOT,
      text=True,
      capture_output=True, env=os.environ | {'PYTHONWARNINGS': ''})


@pytest.mark.slow
def test_train_report_evaluate(tmp_path, data_dir):
  flags = (f'--workdir={tmp_path}/run', f'--config.tasks.data_dir={data_dir}', '--config.mesh.devices=1',
           '--config.policy.num_layers=1', '--config.tasks.warm_start_split=warm_start[:256]',
           '--config.evaluate.every=0')
  trained = main(*flags)
  assert trained.returncode == 0, trained.stderr
  assert 'Traceback' not in trained.stderr and 'warm start' in trained.stderr
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['rule'] == 'knapsack' and summary['steps'] == 4
  plots = {p.name for p in (tmp_path / 'run' / 'plots').iterdir()}
  assert {'budgets.png', 'calibration.png', 'gradient_ratio.png', 'success_by_difficulty.png'} <= plots
  for said in ('\ndone: 4 steps; see ', f' {tmp_path}/run/report.html\n', 'R = 32 rollouts of M = 8 tasks',
               'step 4: avg@8 of held-out tasks ', '\nlearnt    avg@8 of held-out tasks ', ' device-hours (measured)'):
    assert said in trained.stdout, said
  assert '\r' not in trained.stdout + trained.stderr  # there is no terminal
  evaluated = main(*flags, '--mode=evaluate', '--config.evaluate.pass_at=(1, 8)',
                   '--config.evaluate.maj_at=8')
  assert evaluated.returncode == 0, evaluated.stderr
  written = json.loads((tmp_path / 'run' / 'evaluation.json').read_text())
  assert written['step'] == 4 and written['config']['evaluate']['maj_at'] == [8]
  metrics = written['groups']['all']['metrics']
  assert list(metrics) == ['avg@8', 'pass@1', 'pass@8', 'maj@8']
  assert metrics['avg@8']['mean'] == summary['avg@8_last']
  lines = evaluated.stdout.splitlines()
  assert lines[0] == 'step 4, temperature 1.0'
  assert lines[1].split() == ['tasks', 'avg@8', 'pass@1', 'pass@8', 'maj@8']
  assert lines[2].split()[:3] == ['all', '16', f'{metrics["avg@8"]["mean"]:.3f}']
  exported = main(*flags, '--mode=export', '--config.tasks.data_dir=/nowhere', '--dtype=bfloat16')
  assert exported.returncode == 0, exported.stderr
  assert exported.stdout == f'step 4; see {tmp_path}/run/export\n'
  assert weights.load(tmp_path / 'run' / 'export')[0].num_layers == 1
  assert json.loads((tmp_path / 'run' / 'export' / 'config.json').read_text())['dtype'] == 'bfloat16'


LLAMA = ROOT / 'tests' / 'data' / 'checkpoints' / 'llama'
# Calls of the command line, each in a fork of a process that has loaded no more than flags need.
CALLS = '''
import json, os, sys, traceback
from kr_jax import main

for i, (error, *flags) in enumerate(json.load(sys.stdin)):
  child = os.fork()
  if not child:
    output = os.open(f'{sys.argv[1]}/{i}', os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.argv, status = ['kr_jax.main', *flags], 99
    if error:  # that the mode ends in
      main._RUN = dict.fromkeys(main._RUN, lambda: exec(f'raise {error}'))
    try:
      main.start()
      status = 0
    except SystemExit as error:
      status = 1 if isinstance(error.code, str) else error.code or 0
      print(error.code)
    except BaseException:
      traceback.print_exc()
    sys.stdout.flush()
    os._exit(98 if 'jax' in sys.modules else status)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
'''


def calls(folder, cases):
  """The exit status and output of each command line, which stands behind an error that the mode then ends in, or ''.

  Status 98: jax was loaded; 99: a traceback.
  """
  done = subprocess.run([sys.executable, '-W', 'ignore', '-c', CALLS, folder], cwd=ROOT, text=True,
                        capture_output=True, input=json.dumps(cases), check=True)
  return [(int(code), (folder / str(i)).read_text()) for i, code in enumerate(done.stdout.split())]


def test_errors_are_short_and_said_before_anything_heavy_is_loaded(tmp_path):
  arithmetic = ('--config=configs/arithmetic.py:debug', f'--workdir={tmp_path}/none')
  cases = {
      ('--config=configs/arithmetc.py:debug', '--workdr=x'): (2, [
          "there is no file 'configs/arithmetc.py'; did you mean 'configs/arithmetic.py'?",
          "there is no flag --workdr; did you mean 'workdir'?", '--mode=train needs --workdir']),
      ('--config=configs/arithmetic.py:debgu', arithmetic[1]): (2, ["did you mean 'debug'?"]),
      (*arithmetic, '--config.alloc.rul=uniform'): (2, ["--config.alloc.rul: there is no such knob; did you mean"]),
      (*arithmetic, '--config.alloc.low=two'): (2, ['--config.alloc.low=two: invalid literal']),
      (*arithmetic, '--config.alloc.low=-1', '--config.alloc.rule=knapsak'): (1, [
          "\nerror: alloc.low=-1", "did you mean 'knapsack'?"]),
      (*arithmetic, '--config.evaluate.pass_at=(1, 9)'): (1, ['evaluate.pass_at=(1, 9) holds 9']),
      (*arithmetic, '--mode=tain'): (2, ["did you mean 'train'?"]),
      (*arithmetic, 'more'): (2, ["unexpected arguments ['more']"]),
      ('--config=configs/qwen3_4b.py', arithmetic[1], '--config.rewards.verifier=mth',
       '--config.policy.checkpoint=nowhere', '--config.tasks.files.math_500=no/*.jsonl'): (1, [
           "tasks.files.math_500='no/*.jsonl' names no file", "rewards.verifier='mth' is not one of",
           "checkpoint 'nowhere' is not there"]),
      (*arithmetic, '--workdir=other'): (1, ['--workdir is given 2 times', '--mode=train takes one']),
      (*arithmetic, '--hardware.profiles.v5e.watts_max=-1'): (1, ['profiles.v5e.watts_max=-1.0 must be above 0']),
      ('--config=configs/arithmetic.py:debug', '--workdir=tests', '--mode=evaluate'): (1, [
          'error: tests/checkpoints holds no checkpoint; train first']),
      ('--config=configs/arithmetic.py:debug', '--mode=preflight', '--hardware.profiles.v5e.watts_max=-1'): (1, [
          'watts_max', 'the config names no topologies']),
      (*arithmetic, '--mode=report'): (1, ['is no directory; train first']),
      ('--mode=advise', f'--workdir={tmp_path}/none', '--json=tests'): (1, [
          'is no directory; train first', "--json='tests' is a directory; name a file"]),
      ('--mode=advise',): (2, ['--mode=advise needs --workdir']),
      ('--mode=report', '--workdir=tests', '--workdir=./tests/'): (1, ['--workdir=./tests is given twice']),
      ('--mode=generate',): (2, ['--mode=generate needs --checkpoint and --prompt']),
      ('--mode=generate', '--checkpoint=x', '--prompt=x', '--coordinator=auto'): (2, [
          '--coordinator is of --mode=train and evaluate, not of generate']),
      ('--mode=generate', '--checkpoint=nowhere', '--prompt=x'): (1, ["checkpoint 'nowhere' is not there"]),
      (): (2, ['--mode=train needs --config and --workdir']),
      ('-h',): (0, ['usage: python -m kr_jax.main', 'preflight  what a config takes', '--status'])}
  for flags, (status, output) in zip(cases, calls(tmp_path, [('', *flags) for flags in cases])):
    expected, messages = cases[flags]
    assert status == expected and len(output.splitlines()) < 65, (flags, status, output)
    assert all(message in output for message in messages), (flags, output)
  assert not (tmp_path / 'none').exists()


def test_how_a_mode_ends(tmp_path):
  errors = ('KeyboardInterrupt', 'BrokenPipeError', "UnicodeError('no')", "OSError('full')",
            "SystemExit('3 of 4 steps')", "ValueError('of no check')", "__import__('kr_jax.knobs').knobs.Alloc(low=-1)")
  *ended, ours, of_a_check = calls(tmp_path, [(error, '--mode=rollouts', '--workdir=tests') for error in errors])
  assert ended == [(130, 'interrupted\n130\n'), (0, ''), (1, 'error: no\n'), (1, 'error: full\n'),
                   (1, '3 of 4 steps\n')]
  assert ours[0] == 99 and 'Traceback' in ours[1] and ours[1].endswith('ValueError: of no check\n')
  assert of_a_check[0] == 1 and of_a_check[1].startswith('error: alloc.low=-1 ')
  unsaved = "main.files.Unsaved('no answer')"
  ended = calls(tmp_path, [(unsaved, '--config=configs/arithmetic.py:debug', f'--workdir={tmp_path}/run'),
                           (unsaved, '--mode=rollouts', '--workdir=tests')])
  assert ended == [(75, 'error: no answer\n75\n'), (1, 'error: no answer\n')]


@pytest.mark.slow
def test_what_is_not_finite_ends_a_run_with_one_line():
  program = ('from kr_jax import errors\nfrom kr_jax.learning import guard\n'
             'with errors.told():\n  raise guard.Diverged("the loss is nan")')
  done = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], cwd=ROOT, text=True, capture_output=True)
  assert (done.returncode, done.stdout, done.stderr) == (1, '', 'error: the loss is nan\n')


@pytest.mark.slow
def test_generate():
  got = main('--mode=generate', f'--checkpoint={LLAMA}', '--prompt=The sum', '--prompt=x', '--max_tokens=4',
             config=None)
  assert got.returncode == 0, got.stderr
  from kr_jax import generate  # slow to load, and no other test needs it
  assert got.stdout == '\n\n'.join(generate.texts(LLAMA, ['The sum', 'x'], max_tokens=4)) + '\n'


@pytest.mark.slow
def test_an_error_inside_a_config_file_is_not_taken_for_a_knob(tmp_path):
  (tmp_path / 'broken.py').write_text('def get_config():\n  return None.missing\n')
  got = main(f'--workdir={tmp_path}/none', config=tmp_path / 'broken.py')
  assert got.returncode == 2 and 'Traceback' not in got.stderr
  assert "AttributeError: 'NoneType' object has no attribute 'missing' (line 2 of " in got.stderr
