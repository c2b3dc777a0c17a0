"""Verifiers that worker processes import: this module imports nothing heavy."""

import os
import sys
import time

from kr_jax import types


class TwoArguments(Exception):
  """Can be pickled, but not unpickled: BaseException.__reduce__ keeps one argument."""

  def __init__(self, one, two):
    del two
    super().__init__(one)


def hostile(completion: str, task: types.Task) -> bool:
  """Does what the completion says, else compares."""
  if completion.startswith('sleep'):
    time.sleep(1e6)
  while completion.startswith('loop'):
    pass
  if completion.startswith('die'):
    if 'at once' not in completion:
      time.sleep(0.5)  # pebble loses its pool where a process dies before its start is noted
    os._exit(3)
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
  if completion.startswith('memory'):
    bytearray(2 ** 31)
  if completion.startswith('two'):
    raise TwoArguments(1, 2)
  if completion.startswith('timeout'):
    raise TimeoutError(completion)
  return completion == task.answer


def hostile_answer(completion: str, task: types.Task) -> str | None:
  """Does what the completion says, else returns its first character; 'none' has no answer."""
  if completion == 'seven':
    return 7
  return None if completion == 'none' or hostile(completion, task) else completion[0]


def noting(completion: str, task: types.Task) -> bool:
  """Appends the completion to the file that the task's answer names."""
  with open(task.answer, 'a') as file:
    file.write(f'{completion}\n')
  return True


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
