"""The launch scripts: any directory, twice the same, and what they say."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path):
  """The scripts beside an environment whose python repeats its arguments."""
  for name in ('launch', 'configs', '.ci'):
    shutil.copytree(ROOT / name, tmp_path / name)
  shutil.copy(ROOT / 'setup.cfg', tmp_path)
  python = tmp_path / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/sh\necho "python $*"\n')
  python.chmod(0o755)
  return tmp_path


def run(script, *args, cwd='/'):
  return subprocess.run([script, *args], cwd=cwd, text=True, capture_output=True, check=True,
                        env={'PATH': os.environ['PATH']}).stdout.splitlines()


def test_local_installs_once_and_runs_the_main_job(clone):
  first = run(clone / 'launch' / 'local.sh')
  assert any('-m pip install' in line and line.endswith(f'-e {clone}[train]') for line in first)
  second = run(clone / 'launch' / 'local.sh')
  assert not any('pip' in line for line in second)
  command = (f'python -m kr_jax.main --config={clone}/configs/arithmetic.py '
             f'--workdir={clone}/runs/arithmetic')
  assert first[-1] == second[-1] == command


def test_local_takes_a_config_and_flags(clone):
  last = run(clone / 'launch' / 'local.sh', 'configs/arithmetic.py:debug', '--config.seed=1',
             cwd=clone)[-1]
  assert last == ('python -m kr_jax.main --config=configs/arithmetic.py:debug --config.seed=1 '
                  f'--workdir={clone}/runs/arithmetic_debug')
  last = run(clone / 'launch' / 'local.sh', 'configs/arithmetic.py', '--workdir=/x')[-1]
  assert last == f'python -m kr_jax.main --config={clone}/configs/arithmetic.py --workdir=/x'


def test_local_installs_the_tpu_compiler_for_a_preflight(clone):
  out = run(clone / 'launch' / 'local.sh', '--mode=preflight')
  assert any('-m pip install' in line and line.endswith(f'-e {clone}[tpu]') for line in out)


def test_test_and_ci_run_pytest_with_its_extra(clone):
  out = run(clone / 'launch' / 'test.sh', '-k', 'name')
  assert any(line.endswith(f'-e {clone}[test]') for line in out)
  assert out[-1] == 'python -m pytest -n auto --dist loadfile --no-loadscope-reorder -k name'
  assert run(clone / '.ci' / 'run')[-1] == 'python -m pytest -n auto --dist loadfile --no-loadscope-reorder'


def test_a_changed_setup_is_installed_again(clone):
  run(clone / 'launch' / 'test.sh')
  with open(clone / 'setup.cfg', 'a') as file:
    file.write('# changed\n')
  assert any('pip install' in line for line in run(clone / 'launch' / 'test.sh'))
