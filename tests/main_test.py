"""The command line, as a user meets it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from kr_jax import generate
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
           '--config.policy.num_layers=1')
  trained = main(*flags)
  assert trained.returncode == 0, trained.stderr
  assert 'done: 4 steps' in trained.stdout
  assert 'Traceback' not in trained.stderr and 'warm start' in trained.stderr
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['rule'] == 'knapsack' and summary['steps'] == 4
  plots = sorted(p.name for p in (tmp_path / 'run' / 'plots').iterdir())
  assert plots == ['budgets.png', 'calibration.png', 'gradient_ratio.png', 'success_by_difficulty.png']
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
# Calls of the command line, each in a fork of a process that has loaded what it needs.
CALLS = '''
import json, os, sys
from absl import app
from kr_jax import generate, main, prepare, state, train
from kr_jax.report import summary

for i, flags in enumerate(json.load(sys.stdin)):
  child = os.fork()
  if not child:
    output = os.open(f'{sys.argv[1]}/{i}', os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.argv = ['kr_jax.main', *flags]
    app.run(main.main, flags_parser=main._parse)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
'''


@pytest.mark.slow
def test_bad_flags_are_short_errors(tmp_path, data_dir):
  arithmetic = ('--config=configs/arithmetic.py:debug', f'--workdir={tmp_path}/none',
                f'--config.tasks.data_dir={data_dir}')
  generates = ('--mode=generate', f'--checkpoint={LLAMA}')
  cases = {
      (*arithmetic, '--config.alloc.rul=uniform'): 'Did you mean "rule" instead of "rul"?',
      (*arithmetic, '--config.aloc.rule=uniform'): 'Did you mean "alloc" instead of "aloc"?',
      (*arithmetic, '--config.alloc.low=two'): '--config.alloc.low=two: invalid literal',
      (*arithmetic, '--config.alloc.low=-1'): 'alloc.low=-1',
      (*arithmetic, '--config.alloc.rule=knapsak'): "did you mean 'knapsack'?",
      (*arithmetic, '--mode=tain'): 'should be one of <train|evaluate|report|export|generate|preflight>',
      (*arithmetic, '--config.policy.checkpoint=nowhere'): "checkpoint 'nowhere' is not there",
      (*arithmetic, 'more'): "unexpected arguments ['more']",
      (*arithmetic, '--config.evaluate.pass_at=(1, 9)'): 'evaluate.pass_at=(1, 9) holds 9',
      (*arithmetic, '--mode=report'): 'train first',
      generates: '--checkpoint and --prompt of generate',
      (*generates, '--prompt=x', '--coordinator=auto'): '--coordinator is of the modes train and evaluate',
      ('--mode=generate', '--checkpoint=nowhere', '--prompt=x'): "error: checkpoint 'nowhere' is not there",
      (): '--config and --workdir of the others'}
  done = subprocess.run([sys.executable, '-W', 'ignore', '-c', CALLS, tmp_path], cwd=ROOT, text=True,
                        capture_output=True, input=json.dumps(list(cases)), check=True)
  codes = list(map(int, done.stdout.split()))
  for i, (flags, message) in enumerate(cases.items()):
    output = (tmp_path / str(i)).read_text()
    assert codes[i] != 0 and message in output and 'Traceback' not in output, (flags, output)
  assert not (tmp_path / 'none').exists()


@pytest.mark.slow
def test_generate():
  got = main('--mode=generate', f'--checkpoint={LLAMA}', '--prompt=The sum', '--prompt=x', '--max_tokens=4',
             config=None)
  assert got.returncode == 0, got.stderr
  assert got.stdout == '\n\n'.join(generate.texts(LLAMA, ['The sum', 'x'], max_tokens=4)) + '\n'


@pytest.mark.slow
def test_an_error_inside_a_config_file_is_not_taken_for_a_knob(tmp_path):
  (tmp_path / 'broken.py').write_text('def get_config():\n  return None.missing\n')
  got = main(f'--workdir={tmp_path}/none', config=tmp_path / 'broken.py')
  assert got.returncode != 0 and 'Traceback' in got.stderr and 'missing' in got.stderr
