"""Completions that attack what verifies them: nothing outside changes, and none is right.

Each attack is a Python text that sets `right` where it succeeded. It runs in a worker process itself, by a verifier
that does what no shipped one does, and as a program behind walls.
"""

import json
import os
import pathlib
import socket
import stat
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from kr_jax import rewards
from kr_jax import types
from kr_jax.rewards import isolation
from kr_jax.rewards import verdicts
from kr_jax.rewards import walls
from tests import knobs
from tests.rewards import hosts
from tests.rewards import sleepers

ROOT = pathlib.Path(__file__).parents[2]
LIMIT_S = 1.0
# What stands for a place outside is replaced: OUTSIDE, a folder; VICTIM, a process; PORT; NAME, something unique.
ATTACKS = {
    'shell': "import os; right = os.system('touch OUTSIDE/new') == 0",
    'program': "import subprocess; subprocess.run(['touch', 'OUTSIDE/new'], check=True); right = True",
    'write beside the run': "open('ROOT/NAME', 'w'); right = True",
    'write to home': "open('HOME/NAME', 'w'); right = True",
    'write to /tmp': "open('/tmp/NAME', 'w'); right = True",
    'write to shared memory': "open('/dev/shm/NAME', 'w'); right = True",
    'overwrite': "open('OUTSIDE/kept', 'w').write('x'); right = True",
    'append': "open('OUTSIDE/kept', 'a').write('x'); right = True",
    'truncate': "import os; os.truncate('OUTSIDE/kept', 0); right = True",
    'remove': "import os; os.unlink('OUTSIDE/kept'); right = True",
    'rename': "import os; os.rename('OUTSIDE/kept', 'OUTSIDE/new'); right = True",
    'steal': "import os; os.rename('OUTSIDE/kept', 'kept'); right = True",
    'make a folder': "import os; os.mkdir('OUTSIDE/new'); right = True",
    'symbolic link': "import os; os.symlink('OUTSIDE/kept', 'link'); open('link', 'w').write('x'); right = True",
    'hard link': "import os; os.link('OUTSIDE/kept', 'linked'); open('linked', 'w').write('x'); right = True",
    'chmod': "import os; os.chmod('OUTSIDE/kept', 0o777); right = True",
    'chown': "import os; os.chown('OUTSIDE/kept', 1, 1); right = True",
    'touch': "import os; os.utime('OUTSIDE/kept', (1, 1)); right = True",
    'read a file': "open('OUTSIDE/kept').read(); right = True",
    'read credentials': "open('OUTSIDE/.config/token').read(); right = True",
    'read passwords': "open('/etc/shadow').read(); right = True",
    'list a folder': "import os; right = bool(os.listdir('OUTSIDE'))",
    'list home': "import os; right = bool(os.listdir('HOME'))",
    'environment': "import os; right = os.environ['TOKEN'] == 'secret'",
    'environment of a process': "right = b'secret' in open('/proc/VICTIM/environ', 'rb').read()",
    'memory of a process': "open('/proc/VICTIM/mem', 'r+b'); right = True",
    'environment of this run': "right = bool(open('/proc/RUN/environ', 'rb').read())",
    'TCP': "import socket; socket.create_connection(('127.0.0.1', PORT)).sendall(b'x'); right = True",
    'UDP': "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT)); right = True",
    'names': "import socket; socket.getaddrinfo('example.com', 80); right = True",
    'raw packets': "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW); right = True",
    'abstract socket': "import socket; socket.socket(socket.AF_UNIX).connect('\\0NAME'); right = True",
    'socket of a file': "import socket; socket.socket(socket.AF_UNIX).connect('OUTSIDE/socket'); right = True",
    'listener': "import socket; socket.create_server(('127.0.0.1', 0)); right = True",
    'fork bomb': ("import os, time\n"
                  "for i in range(2000):\n"
                  "  if not os.fork():\n"
                  "    time.sleep(1000)\n"
                  "right = True"),
    'fork bomb that grows': "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    'daemon': ("import os\n"
               "if not os.fork():\n"
               "  os.setsid()\n"
               "  if not os.fork():\n"
               "    os.execvp('sleep', ['sleep', 'SECONDS'])\n"
               "  os._exit(0)"),
    'child': "import subprocess; subprocess.Popen(['sleep', 'SECONDS'])",
    'kill': "import os; os.kill(VICTIM, 9); right = True",
    'kill the run': "import os; os.kill(RUN, 9); right = True",
    'kill all': "import os, signal; signal.signal(15, signal.SIG_IGN); os.kill(-1, 15)",
    'stop a process': "import os; os.kill(VICTIM, 19); right = True",
    'trace a process': "import ctypes; right = ctypes.CDLL(None).ptrace(16, VICTIM, 0, 0) == 0",
    'limits of a process': "import resource; resource.prlimit(VICTIM, resource.RLIMIT_CPU, (1, 1)); right = True",
    'priority of a process': "import os; os.setpriority(os.PRIO_PROCESS, VICTIM, 19); right = True",
    'processors of a process': "import os; os.sched_setaffinity(VICTIM, [0]); right = True",
    'limits of itself': "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); right = True",
    'become root': "import os; os.setuid(0); right = True",
    'namespaces': "import ctypes; right = ctypes.CDLL(None).unshare(0x10000000) == 0",
    'mount': "import ctypes; right = ctypes.CDLL(None).mount(b'x', b'.', b'tmpfs', 0, None) == 0",
    'unmount': "import ctypes; right = ctypes.CDLL(None).umount2(b'.', 2) == 0",
    'chroot': "import os; os.chroot('.'); right = True",
    'name of the host': "import socket; socket.sethostname('NAME'); right = True",
    'shared memory': "import ctypes; right = ctypes.CDLL(None).shmget(0x4b52, 4096, 0o1666) >= 0",
    '10 GB of memory': "x = bytearray(10 ** 10); right = True",
    '10 GB of memory, mapped': "import mmap; mmap.mmap(-1, 10 ** 10); right = True",
    'memory of a file': "import os; os.write(os.memfd_create('x'), bytes(10 ** 7)); right = True",
    'the last to be ended': "open('/proc/self/oom_score_adj', 'w').write('0'); right = True",
    '10 GB of a file': ("with open('big', 'wb') as file:\n"
                        "  for _ in range(10 ** 3):\n"
                        "    file.write(bytes(10 ** 7))\n"
                        "right = True"),
    'a file of holes': "open('holes', 'wb').truncate(10 ** 11); right = True",
    'endless output': "while True: print('x' * 10 ** 5)",
    'endless errors': "import sys\nwhile True: print('x' * 10 ** 5, file=sys.stderr)",
    'endless loop': 'while True: pass',
    'forged verdicts': ("import os\n"
                        "for fd in range(1, 256):\n"
                        "  try: os.write(fd, b'[0, \"\", 1, 1.0, \"\", null]\\n' * 3)\n"
                        "  except OSError: pass"),
    'endless line': ("import os\n"
                     "while True:\n"
                     "  for fd in range(3, 256):\n"
                     "    try: os.write(fd, b'[' * 10 ** 5)\n"
                     "    except OSError: pass"),
    'close all files': "import os; os.closerange(0, 256)",
    'exit': 'import os; os._exit(0)',
    'exit by exception': 'import sys; sys.exit(0)',
    'stop itself': 'import os; os.kill(os.getpid(), 19)',
    'abort': 'import os; os.abort()',
    'segfault': 'import ctypes; ctypes.string_at(0)',
    'recursion': 'f = lambda: f()\nf()',
    'deep recursion': ('import sys; sys.setrecursionlimit(10 ** 9)\n'
                       'class A:\n'
                       '  def __repr__(self): return repr(self)\n'
                       'repr(A())'),
    'regex': "import re; re.match('(a+)+$', 'a' * 50 + 'b')",
}
LONG = [name for name in ATTACKS if name.startswith('endless') or name in ('fork bomb that grows', 'regex')]


class Outside(NamedTuple):
  """What attacks are after."""

  folder: pathlib.Path
  victim: subprocess.Popen
  name: str
  sockets: list[socket.socket]

  def attack(self, text: str) -> str:
    places = {'OUTSIDE': self.folder, 'ROOT': ROOT, 'HOME': pathlib.Path.home(), 'VICTIM': self.victim.pid,
              'RUN': os.getpid(), 'PORT': self.sockets[0].getsockname()[1], 'NAME': self.name,
              'SECONDS': 10 ** 6 + os.getpid()}
    for place, what in places.items():
      text = text.replace(place, str(what))
    return text

  def check(self) -> None:
    """Nothing has changed."""
    assert sorted(path.name for path in self.folder.iterdir()) == ['.config', 'kept', 'socket']
    kept = self.folder / 'kept'
    assert kept.read_text() == 'kept' and kept.stat().st_nlink == 1 and kept.stat().st_mtime > 1
    assert stat.S_IMODE(kept.stat().st_mode) == 0o644 and kept.stat().st_uid == os.getuid()
    assert not [place for place in (ROOT, pathlib.Path.home(), pathlib.Path('/tmp'), pathlib.Path('/dev/shm'))
                if (place / self.name).exists()]
    with open(f'/proc/{self.victim.pid}/stat') as file:
      assert file.read().rpartition(')')[2].split()[0] == 'S'
    for listener in self.sockets:
      with pytest.raises(BlockingIOError):
        listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(1)
    assert not sleepers.sleepers(10 ** 6 + os.getpid())


@pytest.fixture(scope='module')
def outside(tmp_path_factory):
  folder = tmp_path_factory.mktemp('outside')
  (folder / 'kept').write_text('kept')
  (folder / 'kept').chmod(0o644)
  (folder / '.config').mkdir()
  (folder / '.config' / 'token').write_text('secret')
  name = f'attacked-{os.getpid()}-{time.time_ns()}'
  tcp = socket.create_server(('127.0.0.1', 0))
  udp = socket.socket(type=socket.SOCK_DGRAM)
  udp.bind(tcp.getsockname())
  abstract, of_file = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
  abstract.bind(f'\0{name}')
  of_file.bind(str(folder / 'socket'))
  sockets = [tcp, udp, abstract, of_file]
  for listener in sockets:
    if listener.type == socket.SOCK_STREAM:
      listener.listen()
    listener.setblocking(False)
  with subprocess.Popen(['sleep', '1000'], env={**os.environ, 'TOKEN': 'secret'}) as victim:
    time.sleep(0.05)  # until it sleeps
    yield Outside(folder, victim, name, sockets)
    victim.kill()
  for listener in sockets:
    listener.close()


@pytest.fixture(scope='module')
def pool():
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TOKEN', 'secret')
    config = knobs.verifiers('tests.rewards.hostile:executing', workers=2, timeout_s=LIMIT_S, max_faulty_steps=10 ** 6)
    with rewards.Workers(config) as workers:
      score(workers, 'right = True')
      if missing := set(isolation.WALLS) - set(workers._pool.standing):
        assert not hosts.allows_all_walls(), missing
        pytest.skip(f'this machine does not allow walls for {missing}')
      yield workers


def score(pool: rewards.Workers, *completions: str) -> list[int]:
  task = types.Task(id='made/0', index=0, prompt='', answer='', difficulty=1, solution='', tokens=(2,))
  return pool.score(completions, [task] * len(completions)).outcome_R.tolist()


def _attack_worker(name, pool, outside):
  ends = score(pool, outside.attack(ATTACKS[name]), f'right = True  # beside {name}')
  assert ends[0] not in (verdicts.RIGHT, verdicts.NONE) and ends[1] == verdicts.RIGHT
  outside.check()


@pytest.mark.parametrize('name', [name for name in ATTACKS if name not in LONG])
def test_an_attack_from_a_worker_process(name, pool, outside):
  _attack_worker(name, pool, outside)


@pytest.mark.slow
@pytest.mark.parametrize('name', LONG)
def test_a_long_attack_from_a_worker_process(name, pool, outside):
  _attack_worker(name, pool, outside)


def test_many_files_do_not_fill_the_disk(pool, outside):
  many = ("for i in range(100):\n"
          "  with open(f'{i}', 'wb') as file: file.write(bytes(10 ** 7))\n"
          "right = True")
  assert score(pool, many) == [verdicts.RAISED]
  others = [f"open('x{i}', 'wb').write(bytes(10 ** 7)); right = True" for i in range(4)]
  assert score(pool, *others) == [verdicts.RIGHT] * 4
  outside.check()


@pytest.mark.slow
@pytest.mark.parametrize('name', ATTACKS)
def test_an_attack_from_a_program(name, pool, outside, tmp_path):
  del pool  # which skips where a wall is missing
  program = f'right = False\n{outside.attack(ATTACKS[name])}\nprint("right" if right else "wrong")'
  finished = walls.run([sys.executable, '-I', '-c', program], folder=str(tmp_path),
                       limits=walls.Limits(seconds=LIMIT_S))
  assert finished.timed_out or finished.stdout.decode()[-6:] != 'right\n'
  assert len(finished.stdout) <= 256 << 10 and len(finished.stderr) <= 256 << 10
  outside.check()


# A task of each shipped verifier, whose answer no attack gives.
SHIPPED = {
    'ends_with': {'answer': 'seven'}, 'math': {'answer': r'\frac{22}{7}'}, 'choice': {'answer': 'Q'},
    'reasoning_gym': {'answer': '7*3-4', 'info': json.dumps({'dataset': 'countdown', 'entry': {
        'question': '', 'answer': '7*3-4', 'metadata': {'numbers': [7, 3, 4], 'target': 17, 'expression': '7*3-4'}}})},
    'python_tests': {'answer': '', 'info': json.dumps({
        'form': 'stdin', 'seconds': LIMIT_S, 'tests': [{'input': '2\n', 'output': '4\n'}]})}}


@pytest.mark.slow
def test_attacks_on_each_shipped_verifier(pool, outside):
  """As an answer in a tag and in a box, as a program, and in one line, as what evaluates text would run it."""
  del pool  # which skips where a wall is missing
  attacks = [outside.attack(text) for name, text in ATTACKS.items() if name not in LONG]
  with rewards.Workers(knobs.verifiers('math', workers=2, timeout_s=3 * LIMIT_S, max_faulty_steps=10 ** 6),
                       verifiers=SHIPPED) as workers:
    for verifier, fields in SHIPPED.items():
      task = types.Task(id=f'made/{verifier}', index=0, prompt='', difficulty=1, solution='', tokens=(2,),
                        verifier=verifier, **fields)
      forms = ['```python\n%s\n```'] if verifier == 'python_tests' else [
          '<answer>%s</answer>', r'\boxed{%s}', '```python\n%s\n```', '<answer>exec(%r)</answer>']
      completions = [form % attack for form in forms for attack in attacks]
      outcomes = workers.score(completions, [task] * len(completions)).outcome_R
      assert len(completions) >= 25 and verdicts.RIGHT not in outcomes and verdicts.NONE not in outcomes
      outside.check()


@pytest.mark.parametrize('name', ['read a file', 'read credentials', 'list a folder', 'environment of a process',
                                  'environment of this run', 'listener'])
def test_an_attack_succeeds_where_there_are_no_walls(name, outside):
  """Of those that change nothing."""
  program = f'{outside.attack(ATTACKS[name])}\nassert right'
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, check=False)
  assert done.returncode == 0, done.stderr


def test_where_memory_is_out_the_run_is_not_ended_first(pool):
  assert score(pool, "right = int(open('/proc/self/oom_score_adj').read()) == 1000") == [verdicts.RIGHT]


def test_nothing_is_left_in_temporary_folders(pool):
  """Those of processes that were ended, and of verdicts."""
  assert score(pool, "open('left', 'w').write('x')", 'import os; os._exit(0)') == [verdicts.WRONG, verdicts.DIED]
  folder = pathlib.Path(pool._pool._folder)
  assert len([*folder.iterdir()]) <= len(pool._pool._processes) + 1  # the mark of their owner and not [*folder.glob('*/*')]
