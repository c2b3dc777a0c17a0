"""Verifiers that worker processes import: this module imports nothing heavy."""

import os
import signal
import subprocess
import sys
import time

from kr_jax import types
from kr_jax.rewards import Verdict

_SEEN = []  # by this process


class TwoArguments(Exception):
  """Can be pickled, but not unpickled: BaseException.__reduce__ keeps one argument."""

  def __init__(self, one, two):
    del two
    super().__init__(one)


class Silent(Exception):
  """Has no text."""

  def __str__(self):
    raise ValueError


def hostile(completion: str, task: types.Task) -> bool | None:
  """Does what the completion says, else compares."""
  if completion.startswith('sleep'):
    time.sleep(1e6)
  while completion.startswith('loop'):
    pass
  if completion.startswith('die'):
    os._exit(3)
  if completion.startswith('segfault'):
    import ctypes
    ctypes.string_at(0)
  if completion.startswith('exit'):
    sys.exit(3)
  if completion.startswith('interrupt'):
    raise KeyboardInterrupt
  if completion.startswith('raise'):
    raise ZeroDivisionError(completion)
  if completion.startswith('local'):
    class Local(Exception):
      """Cannot be pickled."""
    raise Local(completion)
  if completion.startswith('silent'):
    raise Silent
  if completion.startswith('memory'):
    bytearray(2 ** 31)
  if completion.startswith('two'):
    raise TwoArguments(1, 2)
  if completion.startswith('timeout'):
    raise TimeoutError(completion)
  if completion.startswith('recursion'):
    return hostile(completion, task)
  if completion.startswith('wide'):
    return {'score': 0.0}
  if completion.startswith('abstain'):
    return None
  if completion.startswith('reason'):
    return Verdict(None, reason='not mine')
  return completion == task.answer


def hostile_answer(completion: str, task: types.Task) -> str | None:
  """Does what the completion says, else returns its first character; 'none' has no answer."""
  if completion == 'seven':
    return 7
  return None if completion == 'none' or hostile(completion, task) else completion[0]


def same_digit(one: str, other: str) -> bool:
  """Whether two answers begin with the same character; 'x' and what begins with it hangs."""
  while one.startswith('x'):
    pass
  return one[0] == other[0]


def whole_answer(completion: str, task: types.Task) -> str | None:
  return completion or None


def slow(completion: str, task: types.Task) -> bool:
  """Takes a fiftieth of a second."""
  time.sleep(0.02)
  return completion == task.answer


def process_of(completion: str, task: types.Task) -> tuple[bool, float]:
  """The reward is the number of completions that this process has seen; 'crowded' ends it unless it is the first."""
  _SEEN.append(completion)
  if completion.startswith('crowded') and len(_SEEN) > 1:
    os._exit(9)  # as where memory was taken by what came before
  return True, float(len(_SEEN))


def leaving(completion: str, task: types.Task) -> bool:
  """Leaves a process behind: a child, or one of a session of its own whose parent is gone; and writes to files."""
  print('noise', flush=True)
  print('noise', file=sys.stderr, flush=True)
  if completion.startswith('child'):
    subprocess.Popen(['sleep', task.info])
  if completion.startswith('daemon') and not os.fork():
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not os.fork():
      os.execvp('sleep', ['sleep', task.info])
    os._exit(0)
  time.sleep(0.1)  # until it is what it becomes
  return True


def environment(completion: str, task: types.Task) -> Verdict:
  """Abstains, and gives the names of the variables of its environment as the reason, sorted."""
  return Verdict(None, reason=' '.join(sorted(os.environ)))


def reading(completion: str, task: types.Task) -> bool:
  """Whether the file that the completion names holds the answer."""
  with open(completion) as file:
    return file.read() == task.answer


def executing(completion: str, task: types.Task) -> bool:
  """What no verifier should do: runs the completion, which may set `right`."""
  names = {'task': task, 'right': False}
  exec(completion, names)  # pylint: disable=exec-used
  return names['right']


def shaping(completion: str, task: types.Task) -> tuple[bool, float]:
  """Right or not, and a reward that falls with the length; 'nan' has a reward that is none."""
  return completion.endswith(task.answer), float('nan') if completion == 'nan' else -len(completion) / 4


def share(completion: str, task: types.Task) -> tuple[bool, float]:
  """A reward of a quarter for the character '4'."""
  return completion == task.answer, 0.25 * completion.count('4')


def reads_info(completion: str, task: types.Task) -> bool:
  return completion == task.info


def one_argument(completion: str) -> bool:
  return True


NO_FUNCTION = 60.0
