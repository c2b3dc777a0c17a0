"""Walls that the kernel makes: those that stand, those of a platform that has fewer, and what they let through."""

import json
import os
import pathlib
import platform
import struct
import subprocess
import sys
import textwrap

import pytest

from kr_jax.rewards import isolation
from tests.rewards import hosts
from tests.rewards import sleepers

linux = pytest.mark.skipif(sys.platform != 'linux', reason='Linux only')
LOAD, EQUAL, GREATER, ABOVE, ANY, END = 0x20, 0x15, 0x35, 0x25, 0x45, 0x06
ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


def decide(program: bytes, machine: int, call: int, *arguments: int) -> int:
  """What a filter of seccomp returns: its machine, by hand."""
  data = struct.pack('<IIQ6Q', call, machine, 0, *arguments, *(0,) * (6 - len(arguments)))
  steps = [struct.unpack('HBBI', program[i:i + 8]) for i in range(0, len(program), 8)]
  x, at = 0, 0
  while True:
    code, yes, no, k = steps[at]
    at += 1
    if code == END:
      return k
    if code == LOAD:
      x = struct.unpack_from('<I', data, k)[0]
    else:
      at += yes if {EQUAL: x == k, GREATER: x >= k, ABOVE: x > k, ANY: x & k}[code] else no


@pytest.fixture(params=['x86_64', 'aarch64'])
def machine(request, monkeypatch):
  monkeypatch.setattr(platform, 'machine', lambda: request.param)
  return request.param


def test_calls_that_are_refused(machine):
  """Numbers of some calls as the kernel's tables have them."""
  number = isolation._MACHINES[machine][0]
  of = lambda x86, arm: x86 if machine == 'x86_64' else arm
  decided = lambda call, *arguments, **filters: decide(
      isolation._filter(**{'network': False, 'guarded': (), 'guards_modes': False} | filters), number, call, *arguments)
  read, execve, kill, chmod = of(0, 63), of(59, 221), of(62, 129), of(91, 52)
  socket, ptrace, clone, prlimit, ioctl = of(41, 198), of(101, 117), of(56, 220), of(302, 261), of(16, 29)
  assert {decided(x) for x in (read, execve, kill, chmod, clone, prlimit, ioctl, of(53, 199))} == {ALLOW}
  assert {decided(x) for x in (socket, ptrace, of(272, 97), of(321, 280), 425, of(165, 40), of(310, 270))} == {EPERM}
  assert decided(socket, network=True) == ALLOW and decided(ptrace, network=True) == EPERM
  assert decided(chmod, guards_modes=True) == EPERM and decided(read, guards_modes=True) == ALLOW
  assert decided(435) == ENOSYS  # clone3
  assert decided(clone, 0x10000000 | 17) == EPERM and decided(clone, 0x003D0F00) == ALLOW  # a namespace; a thread
  assert decided(prlimit, 0, 7) == ALLOW and decided(prlimit, 1) == EPERM
  assert decided(ioctl, 0, 0x5401) == ALLOW and decided(ioctl, 0, 0x5412) == EPERM
  guarded = {'guarded': (1, 70)}
  assert {decided(kill, pid, 9, **guarded) for pid in (0, 1, 70, 2 ** 32 - 1, 2 ** 64 - 80)} == {EPERM}
  assert decided(kill, 71, 9, **guarded) == ALLOW and decided(kill, 70, 9) == ALLOW
  assert decide(isolation._filter(False, (), False), 0x40000003, read) == KILL  # the calls of another machine
  if machine == 'x86_64':
    assert decided(0x40000000 | read) == EPERM


def test_every_call_is_named_once():
  calls = [*isolation._REFUSED, *isolation._OF_ANOTHER, *isolation._KILLS, *isolation._MODES, isolation._SOCKET,
           isolation._CLONE, isolation._IOCTL]
  for column in (0, 1):
    numbers = [pair[column] for pair in calls if pair[column] is not None]
    assert len(set(numbers)) == len(numbers)


def in_child(text: str, *arguments: str, folder: pathlib.Path) -> list:
  """What a process prints that confines itself and runs `start` of a text."""
  text = f"""
import json, os, sys, time
from kr_jax.rewards import isolation, walls
{textwrap.dedent(text)}
lifeline = globals().get('lifeline', lambda: os.pipe()[0])()
code = isolation.confine(start, lifeline=lifeline, folder={str(folder)!r}, disk_mb=DISK_MB)
print(json.dumps(['code', code]))
"""
  done = subprocess.run([sys.executable, '-c', text, *arguments], capture_output=True, text=True, check=False,
                        cwd=pathlib.Path(__file__).parents[2])
  assert done.returncode == 0, done.stderr
  return [json.loads(line) for line in done.stdout.splitlines()]


ENTER = f"""
DISK_MB = 0
def start(standing):
  names = walls.enter(walls.Limits(seconds=50), writable=[FOLDER], standing=standing)
  print(json.dumps(names), flush=True)
  for attempt in ATTEMPTS:
    try:
      eval(attempt)
      print('true', flush=True)
    except OSError:
      print('false', flush=True)
  if not os.fork():
    os.setsid()
    if not os.fork():
      os.execvp('sleep', ['sleep', '{10 ** 6 + 1 + os.getpid()}'])
    os._exit(0)
  return 7
"""


@linux
@pytest.mark.parametrize('missing', [(), ('namespaces',), ('namespaces', 'files'), ('files',), ('calls',),
                                     ('namespaces', 'user', 'scopes')])
def test_walls_that_are_missing_are_not_named_and_the_others_stand(missing, tmp_path):
  """Without namespaces too, descendants end, and the process that started all gets no signal."""
  attempts = ["os.kill(int(sys.argv[1]), 0)", "open(f'{FOLDER}/new', 'w')", "open(f'{FOLDER}/../other', 'w')",
              "os.chmod(f'{FOLDER}/..', 0o755)"]
  faults = {'namespaces': "def fails(*_): raise OSError\nisolation._make_namespaces = fails\n",
            'files': "isolation._landlock_version = lambda: 0\n",
            'calls': "isolation._MACHINES.clear()\n",
            'user': "isolation._leave_root = lambda *_: False\n",
            'scopes': "found = min(5, isolation._landlock_version())\nisolation._landlock_version = lambda: found\n"}
  folder = tmp_path / 'folder'
  folder.mkdir()
  names, *reached, code = in_child(
      f'FOLDER = {str(folder)!r}\nATTEMPTS = {attempts!r}\n' + ''.join(faults[x] for x in missing) + ENTER,
      str(os.getpid()), folder=folder)
  assert code == ['code', 7]
  names = set(names)
  assert not names & {'namespaces': {'descendants', 'mounts'}, 'files': {'files'}, 'calls': {'calls'}}.get(
      missing[0] if missing else '', set())
  if not missing and set(isolation.WALLS) - names:
    assert not hosts.allows_all_walls(), names
    pytest.skip(f'this machine does not allow {set(isolation.WALLS) - names}')
  assert reached[1] and (reached[0] is False or not names & {'signals', 'calls'})
  assert reached[2] is False or not names & {'files', 'mounts', 'privileges'}
  assert reached[3] is False or not names & {'mounts', 'calls'}
  assert not sleepers.sleepers(10 ** 6 + 1 + os.getpid())


@linux
def test_a_child_ends_with_its_lifeline(tmp_path):
  text = """
  DISK_MB = 8
  def start(standing):
    time.sleep(100)
  def lifeline():
    end, other = os.pipe()
    if not os.fork():
      time.sleep(0.2)
      os._exit(0)
    os.close(other)
    return end
  """
  assert in_child(text, folder=tmp_path) == [['code', 128 + 9]]


@linux
def test_a_child_that_raises_or_is_ended_has_an_exit_status(tmp_path):
  for text, code in (('raise ValueError', 1), ('os._exit(5)', 5), ('import ctypes; ctypes.string_at(0)', 128 + 11)):
    assert in_child(f'DISK_MB = 0\ndef start(standing):\n  {text}', folder=tmp_path) == [['code', code]]


def test_a_path_that_others_may_reach(tmp_path):
  (tmp_path / 'closed').mkdir()
  (tmp_path / 'closed' / 'file').write_text('')
  for mode, is_open in ((0o755, True), (0o711, True), (0o700, False)):
    os.chmod(tmp_path / 'closed', mode)
    parents_open = all(path.stat().st_mode & 1 for path in tmp_path.parents) and tmp_path.stat().st_mode & 1
    assert isolation._is_open_to_all(str(tmp_path / 'closed' / 'file')) == bool(is_open and parents_open)
  assert isolation._is_open_to_all('/usr/bin') and isolation._is_open_to_all('/etc/passwd')
