"""What ends a process of verifiers, and what does not."""

import signal
import socket
import subprocess
import sys

import pytest

from kr_jax.rewards import orphans

END = '''
import os, signal, socket, sys
from kr_jax.rewards import orphans
{before}
orphans.end_with(socket.socket(fileno=int(sys.argv[1])))
print('armed', flush=True)
{then}
'''


@pytest.mark.slow
@pytest.mark.parametrize('before, then', [
    ('', 'while True: pass'), ('', 'os.kill(os.getpid(), signal.SIGSTOP)'),
    ('orphans.fcntl.F_SETSIG = -1', 'while True: pass')])
def test_a_process_ends_with_its_lifeline(before, then):
  """The last: where a kernel sends no signal of it."""
  ours, theirs = socket.socketpair()
  with theirs:
    process = subprocess.Popen([sys.executable, '-c', END.format(before=before, then=then), str(theirs.fileno())],
                               pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == 'armed\n'
  assert process.poll() is None
  ours.close()
  assert process.wait(5) == -signal.SIGKILL
  process.stdout.close()


NOTE = """
import os, signal, subprocess, sys, time
from kr_jax.rewards import orphans
noted = []
orphans.note_signals(lambda: noted.append(1))
for number in orphans.OF_THE_RUN:
  os.kill(os.getpid(), number)
end = 'import os, signal; os.kill(os.getpid(), signal.SIGTERM)'
of_program = subprocess.run([sys.executable, '-S', '-c', end]).returncode
if not (forked := os.fork()):
  os.kill(os.getpid(), signal.SIGTERM)
  os._exit(0)
print(len(noted), of_program, os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]))
"""


def test_signals_are_noted_here_and_heeded_by_what_is_started():
  done = subprocess.run([sys.executable, '-c', NOTE], capture_output=True, text=True)
  assert done.stdout.split() == ['3', '-15', '-15'], done.stderr
