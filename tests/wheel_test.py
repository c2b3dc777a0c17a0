"""The wheel: what it holds, and what it gives in an environment and a directory of its own."""

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PIP = (sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q')
# README.md of kr_jax/allocation, from "In another trainer".
ALLOCATE = '''
import numpy as np
from kr_jax.allocation import Allocator, budgets, window
allocator = Allocator(num_tasks=4, low=2, high=64)
print(allocator.budgets(['a', 'b', 'c', 'd'], 32).sum())
'''


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> pathlib.Path:
  """Built without a network, from a copy, as a build leaves files beside what it builds."""
  source, built = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
  for name in ('kr_jax', 'configs', 'tests'):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__', 'data', 'plots'))
  for name in ('setup.cfg', 'pyproject.toml', 'README.md'):
    shutil.copy(ROOT / name, source)
  subprocess.run([*PIP, 'wheel', '--no-build-isolation', '--no-deps', '--no-index', '-w', built, source], check=True)
  found, = built.glob('*.whl')
  return found


@pytest.mark.slow
def test_what_it_holds(wheel):
  """All modules of kr_jax, the configs in a place of their own, and nothing else."""
  with zipfile.ZipFile(wheel) as file:
    names = {name for name in file.namelist() if '.dist-info/' not in name}
    about = {name.rpartition('/')[2]: file.read(name).decode() for name in file.namelist() if '.dist-info/' in name}
  modules = {str(path.relative_to(ROOT)) for path in (ROOT / 'kr_jax').rglob('*.py')}
  configs = {f'kr_jax/wheel/configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')}
  recorded = {f'kr_jax/wheel/configs/recorded/{path.name}' for path in (ROOT / 'configs' / 'recorded').glob('*.json')}
  assert names - modules - configs == recorded | {
      f'kr_jax/report/page.{end}' for end in ('css', 'js', 'html.jinja', 'md.jinja')}
  assert modules | configs <= names
  assert about['top_level.txt'].split() == ['kr_jax']
  assert 'kr_jax = kr_jax.main:command' in about['entry_points.txt']
  head, _, description = about['METADATA'].partition('\n\n')
  assert 'Description-Content-Type: text/markdown' in head
  assert description.strip() == (ROOT / 'README.md').read_text().strip()


def environment(folder: pathlib.Path, wheel: pathlib.Path) -> pathlib.Path:
  """A virtual environment with the wheel alone: its folder of packages."""
  subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
  python = folder / 'bin' / 'python'
  subprocess.run([*PIP, '--python', python, 'install', '--no-deps', '--no-index', wheel], check=True)
  packages, = folder.glob('lib/python3*/site-packages')
  return packages


def with_what_it_requires(name: str, found: dict[str, importlib.metadata.Distribution]) -> None:
  """Adds a distribution of this environment, and those that it requires without an extra."""
  if name in found:
    return
  found[name] = importlib.metadata.distribution(name)
  for line in found[name].requires or ():
    if 'extra' not in line and not re.search('python_version *<', line):
      with_what_it_requires(re.match(r'[\w.-]+', line)[0], found)


def call(folder: pathlib.Path, *arguments, **changed):
  """In a directory with nothing of the project, and without its variables."""
  kept = {name: x for name, x in os.environ.items() if name in ('PATH', 'HOME', 'KR_JAX_CACHE')}
  away = folder / 'away'
  away.mkdir(exist_ok=True)
  return subprocess.run([folder / 'bin' / arguments[0], *arguments[1:]], cwd=away, capture_output=True, text=True,
                        env=kept | {'JAX_PLATFORMS': 'cpu'} | changed)


@pytest.mark.exhaustive
def test_alone(wheel, tmp_path):
  """With what a plain pip install brings: help, configs by name, the allocator; what else is needed is said."""
  packages, needed = environment(tmp_path, wheel), {}
  head = importlib.metadata.PathDistribution(next(packages.glob('*.dist-info')))
  for line in head.requires:
    if 'extra ==' not in line:
      with_what_it_requires(re.match(r'[\w.-]+', line)[0], needed)
  for distribution in needed.values():
    for first in {path.parts[0] for path in distribution.files} - {'..', '__pycache__'}:
      if not (packages / first).exists():
        (packages / first).symlink_to(distribution.locate_file(first))
  for command in (('python', '-m', 'kr_jax.main'), ('kr_jax',)):
    shown = call(tmp_path, *command, '--help')
    assert shown.returncode == 0, shown.stderr
    assert 'usage: ' in shown.stdout and '--config=kr_jax:NAME: arithmetic, ' in shown.stdout
  wrong = call(tmp_path, 'kr_jax', '--config=kr_jax:arithmetc', '--workdir=x')
  assert wrong.returncode == 2 and "did you mean 'arithmetic'?" in wrong.stderr
  refused = call(tmp_path, 'kr_jax', '--config=kr_jax:arithmetic:debug', '--workdir=x')
  assert refused.returncode == 1 and 'Traceback' not in refused.stderr
  assert "tensorflow_datasets" in refused.stderr and "are not installed: pip install 'kr_jax[train]'" in refused.stderr
  allocated = call(tmp_path, 'python', '-c', ALLOCATE)
  assert allocated.stdout == '32\n', allocated.stderr
  code = "import kr_jax; print(kr_jax.config('qwen3_4b:dapo').grpo.clip_high); kr_jax.run('arithmetic', 'x')"
  python = call(tmp_path, 'python', '-c', code)
  assert python.stdout == '0.28\n' and "pip install 'kr_jax[train]'" in python.stderr.splitlines()[-1]
  assert not (tmp_path / 'away' / 'x').exists()


@pytest.mark.exhaustive
def test_with_the_extra(wheel, tmp_path):
  """It trains by the name of a shipped config, priced by the shipped profiles; a verifier is found where it starts."""
  packages = environment(tmp_path, wheel)
  (packages / 'train.pth').write_text(f'{importlib.metadata.distribution("jax").locate_file("")}\n')
  (tmp_path / 'away').mkdir()
  (tmp_path / 'away' / 'mine.py').write_text('def even(completion, task):\n  return len(completion) % 2 == 0\n')
  flags = ('--config=kr_jax:arithmetic:debug', '--workdir=run', '--config.num_steps=1', '--config.evaluate.tasks=8',
           '--config.warm_start.num_steps=0', '--config.policy.num_layers=1', '--config.tasks.data_dir=data',
           '--config.rewards.verifier=mine:even')
  trained = call(tmp_path, 'kr_jax', *flags)
  assert trained.returncode == 0, trained.stderr
  run = tmp_path / 'away' / 'run'
  assert (run / 'report.html').exists() and json.loads((run / 'hardware.json').read_text())['profiles']['v5e']
  began = json.loads((run / 'ledger.jsonl').read_text().splitlines()[0])
  assert began['command'].startswith('kr_jax --config=kr_jax:arithmetic:debug --workdir=run') and not began['commit']
  where = call(tmp_path, 'python', '-c', "import kr_jax; print(kr_jax.__file__, kr_jax.read('run').is_complete)")
  assert where.stdout == f'{packages}/kr_jax/__init__.py True\n', where.stderr
