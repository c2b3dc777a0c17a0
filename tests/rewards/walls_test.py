"""Programs behind walls: what they are given, what is kept of them, and when they end. attacks_test.py attacks."""

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import time

import pytest

from kr_jax.rewards import isolation
from kr_jax.rewards import walls
from tests.rewards import sleepers

FAST = (sys.executable, '-I', '-S', '-c')


def run(folder, code: str, **limits) -> walls.Finished:
  stdin = limits.pop('stdin', b'')
  return walls.run([*FAST, code], stdin=stdin, folder=str(folder), limits=walls.Limits(**limits))


def test_a_program_has_its_input_and_an_environment_of_four(tmp_path):
  (tmp_path / 'beside').write_text('read')
  finished = run(tmp_path, 'import os; print(input(), sorted(os.environ), os.getcwd() == os.environ["HOME"], '
                 'open("beside").read()); open("new", "w").write("x")', stdin=b'given\n')
  assert finished == (0, b"given ['HOME', 'LANG', 'PATH', 'TMPDIR'] True read\n", b'', False)
  assert (tmp_path / 'new').read_text() == 'x'


@pytest.mark.parametrize('end, code', [('raise SystemExit(3)', 3), ('import os; os.kill(os.getpid(), 11)', 128 + 11),
                                       ('import os; os.kill(os.getpid(), 9)', 128 + 9), ('1 / 0', 1)])
def test_exit_status(end, code, tmp_path):
  finished = run(tmp_path, end)
  assert (finished.code, finished.timed_out) == (code, False)
  assert (b'ZeroDivisionError' in finished.stderr) == (end == '1 / 0')


def test_a_program_that_is_not_there(tmp_path):
  finished = walls.run([str(tmp_path / 'missing')], folder=str(tmp_path))
  assert finished.code == 127 and b'No such file' in finished.stderr and not finished.timed_out


def test_output_is_cut_and_input_may_be_ignored(tmp_path):
  code = 'import sys; print("x" * 10 ** 6); print("y" * 3000, file=sys.stderr)'
  finished = run(tmp_path, code, output_kb=2, stdin=b'z' * 10 ** 6)
  assert finished == (0, b'x' * 2048, b'y' * 2048, False)


def test_input_longer_than_a_pipe(tmp_path):
  code = 'import sys; print(len(sys.stdin.read()))'
  assert run(tmp_path, code, stdin=b'z' * 10 ** 6).stdout == b'1000000\n'


def test_time_is_limited_also_of_what_prints_nothing(tmp_path):
  start = time.monotonic()
  finished = run(tmp_path, 'import os, time; print("begun", flush=True); os.closerange(0, 3); time.sleep(100)',
                 seconds=0.6)
  assert finished == (128 + 9, b'begun\n', b'', True) and time.monotonic() - start < 10


def test_a_program_ends_though_its_children_do_not(tmp_path):
  code = f'import os; os.fork() or os.execvp("sleep", ["sleep", "{10 ** 6 + 2 + os.getpid()}"])'
  assert run(tmp_path, code, seconds=50)[0] == 0
  assert not sleepers.sleepers(10 ** 6 + 2 + os.getpid())


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux only')
def test_limits(tmp_path):
  for code, limits in (('bytearray(100 << 20)', {'memory_mb': 100}),
                       ('open("x", "w").write("x" * (5 << 20))', {'file_mb': 4}),
                       ('import os\nwhile os.fork(): pass', {'processes': 4})):
    assert run(tmp_path, code, **limits).code == 1
    if 'fork' not in code:
      assert run(tmp_path, code).code == 0


def test_programs_of_a_process_behind_walls(tmp_path):
  """Threads of it run programs at the same time; what is left of them ends with the last."""
  text = f"""
import concurrent.futures, os
from kr_jax.rewards import isolation, walls
def start(standing):
  walls.enter(walls.Limits(seconds=50), writable=[{str(tmp_path)!r}], standing=standing)
  run = lambda code: walls.run([*{FAST!r}, code], folder={str(tmp_path)!r})
  daemon = 'import os; os.fork() or (os.setsid(), os.execvp("sleep", ["sleep", "100"]))'
  codes = [daemon, *(f'import time; time.sleep({{i}} / 20); raise SystemExit({{i}})' for i in range(1, 4)), '1 / 0']
  with concurrent.futures.ThreadPoolExecutor(5) as pool:
    print([finished.code for finished in pool.map(run, codes)])
  print(walls.run(['/missing'], folder={str(tmp_path)!r}).code)
  print(walls.run(['/bin/cat'], stdin=b'x' * 9, folder={str(tmp_path)!r}))
  try:
    print(os.waitpid(-1, os.WNOHANG))
  except ChildProcessError:
    print('alone', flush=True)
  return 0
lifeline, _ = os.pipe()
isolation.confine(start, lifeline=lifeline, folder={str(tmp_path)!r})
"""
  done = subprocess.run([sys.executable, '-c', text], capture_output=True, text=True, check=False,
                        cwd=pathlib.Path(__file__).parents[2])
  assert done.stdout == ("[0, 1, 2, 3, 1]\n127\nFinished(code=0, stdout=b'xxxxxxxxx', stderr=b'', timed_out=False)\n"
                         'alone\n'), done.stderr


def test_programs_at_the_same_time(tmp_path):
  folders = [tmp_path / str(i) for i in range(3)]
  for folder in folders:
    folder.mkdir()
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    found = [*pool.map(lambda folder: run(folder, 'import os; print(os.getcwd())'), folders)]
  assert [finished.stdout.decode().strip() for finished in found] == [str(folder.resolve()) for folder in folders]


def test_a_folder_is_removed_whatever_is_in_it(tmp_path, request):
  deep = 'import os\nfor _ in range(1500): os.mkdir("d"); os.chdir("d")\nopen("f", "w"); os.symlink("/", "root")'
  folder = tmp_path / 'left'
  folder.mkdir()
  request.addfinalizer(lambda: subprocess.run(['rm', '-rf', folder], check=True))  # which pytest cannot
  subprocess.run([*FAST, deep], cwd=folder, check=True)
  walls.remove(str(folder))
  assert not folder.exists()
  walls.remove(str(folder))  # which is not there


def test_this_process_is_behind_no_walls():
  assert not isolation.is_behind()
