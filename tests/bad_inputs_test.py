"""The table of bad inputs (tests/data/bad_inputs.json): each gives a clear line, at once, and is tested.

A row has
    kind, input   what it is, in words
    gives         what the user sees: a part of the line
    test          the test that shows it; or
    flags         a command line that does, after `--config=configs/arithmetic.py:debug --workdir=...` unless it names
                  a mode; '{tmp}' is an empty directory, '{data}' tests/data
    exit          its exit status; 1 unless set
    late          whether it is refused by prepare.py, once jax is loaded, and not before
"""

import ast
import functools
import json
import os
import pathlib
import subprocess
import sys

from absl import flags as flags_lib
from ml_collections import config_flags
import pytest

from configs import arithmetic
from kr_jax import prepare

ROOT = pathlib.Path(__file__).parents[1]
ROWS = json.loads((ROOT / 'tests' / 'data' / 'bad_inputs.json').read_text())
COMMANDS = [row for row in ROWS if 'flags' in row]
KINDS = ('config', 'flags', 'data', 'checkpoint', 'tokenizer', 'template', 'verifier', 'memory', 'signal', 'disk',
         'record', 'clock', 'processes', 'two runs', 'run', 'network', 'learning')
# The beginning of kr_jax.main, in a fork of one process that has loaded it, as loading takes a second each.
PROBLEMS = '''
import json, os, sys, traceback
from kr_jax import main

for i, argv in enumerate(json.load(sys.stdin)):
  child = os.fork()
  if not child:
    output = os.open(f'{sys.argv[1]}/{i}', os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.argv, status = ['kr_jax.main', *argv], 99
    try:
      main.parse(sys.argv)
      found = main._problems(main._MODE.value)
      print(*(f'error: {problem}' for problem in found), sep='\\n')
      status = int(bool(found))
    except SystemExit as error:
      status = error.code
    except BaseException:
      traceback.print_exc()
    sys.stdout.flush()
    os._exit(98 if 'jax' in sys.modules else status)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
'''


def command(row, tmp) -> list[str]:
  """The flags of a row."""
  given = [flag.replace('{tmp}', str(tmp)).replace('{data}', str(ROOT / 'tests' / 'data')) for flag in row['flags']]
  modes = [flag for flag in given if flag.startswith('--mode=')]
  return given if modes else ['--config=configs/arithmetic.py:debug', f'--workdir={tmp}/run', *given]


def check(row, status, output) -> None:
  """Asserts that a row gives what it says, and no traceback."""
  lines = [line for line in output.splitlines() if line.startswith('error: ')]
  assert status == row.get('exit', 1), (row, status, output)
  assert any(row['gives'] in line for line in lines) and 'Traceback' not in output, (row, output)
  assert max(map(len, lines)) < 1500, (row, output)


@functools.cache
def names_in(path: str) -> set[str]:
  """The names of the functions in a file, those of classes included."""
  tree = ast.parse((ROOT / path).read_text())
  return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_table_is_whole():
  assert len(ROWS) >= 100
  for row in ROWS:
    assert set(row) <= {'kind', 'input', 'gives', 'test', 'flags', 'exit', 'late'} and row['kind'] in KINDS, row
    assert row['input'] and row['gives'] and '\n' not in row['gives'] and ('test' in row) != ('flags' in row), row
    if 'test' in row:
      path, _, name = row['test'].partition('::')
      assert (ROOT / path).is_file() and name.partition('[')[0] in names_in(path), row
  for name in ('input', 'flags'):
    named = [json.dumps(row[name]) for row in ROWS if name in row]
    assert len(set(named)) == len(named), [x for x in named if named.count(x) > 1]


@pytest.mark.slow
@pytest.mark.parametrize('some', [slice(0, None, 5), pytest.param(slice(None), marks=pytest.mark.exhaustive)], ids=str)
def test_what_can_be_known_at_start_is_said_before_anything_heavy_is_loaded(tmp_path, some):
  rows = [row for row in COMMANDS if not row.get('late')][some]
  done = subprocess.run([sys.executable, '-W', 'ignore', '-c', PROBLEMS, tmp_path], cwd=ROOT, text=True, check=True,
                        capture_output=True, input=json.dumps([command(row, tmp_path / 'dir') for row in rows]))
  statuses = done.stdout.split()
  assert len(statuses) == len(rows)
  for i, (row, status) in enumerate(zip(rows, statuses)):
    check(row, int(status), (tmp_path / str(i)).read_text())


@pytest.mark.parametrize('row', [row for row in COMMANDS if row.get('late')], ids=lambda row: row['input'])
def test_what_takes_the_sizes_of_a_policy_is_refused_before_data_are_read(tmp_path, monkeypatch, row):
  monkeypatch.setattr(prepare.tasks_lib, 'read', lambda *_, **__: pytest.fail('data were read'))
  values, argv = flags_lib.FlagValues(), [flag for flag in row['flags'] if flag.startswith('--config.')]
  assert argv == row['flags']
  config = config_flags.DEFINE_config_dict('config', arithmetic.get_config('debug'), flag_values=values, sys_argv=argv)
  values(['main', *argv])
  with pytest.raises(ValueError) as error:
    prepare.without_tasks(config.value, trains=True)
  check(row, 1, f'error: {error.value}')


@pytest.mark.exhaustive
@pytest.mark.parametrize('row', COMMANDS, ids=lambda row: row['input'])
def test_each_command_line_by_itself(tmp_path, row):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'KR_JAX_CACHE': str(tmp_path / 'cache')}
  done = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'kr_jax.main', *command(row, tmp_path / 'dir')],
                        cwd=ROOT, text=True, capture_output=True, env=environment, timeout=120)
  check(row, done.returncode, done.stderr)
  last = [line for line in done.stderr.splitlines() if line.strip()][-1]
  assert last.startswith('error: ') or done.returncode == 2 and last.startswith('-h '), done.stderr
  assert not (tmp_path / 'dir' / 'run' / 'config.json').exists()  # nothing was claimed
