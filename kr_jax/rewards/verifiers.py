"""Verifiers: whether a completion is right, what it answers, and the reward that it earns.

README.md says what a verifier and an extraction of answers are. An extraction may read the form of the task's answer,
such as its length, but the extracted answer must not depend on which answer is right.

    reward = the verifier's reward + format_weight [the completion matches format] + overlong(length)  (workers.py)

Imports nothing heavy: worker processes load this module at every start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import functools
import importlib
import importlib.util
import inspect
import re
from typing import Any

from kr_jax import answers
from kr_jax import knobs
from kr_jax import modules as modules_lib
from kr_jax.rewards import choice
from kr_jax.rewards import gym
from kr_jax.rewards import programs
from kr_jax.rewards import verdicts
from kr_jax.rewards.verdicts import Verdict
from kr_jax.types import Task

Verifier = Callable[[str, Task], bool | tuple[bool, float] | Verdict | None]
Extraction = Callable[[str, Task], str | None]


def ends_with(completion: str, task: Task) -> Verdict:
  """Whether the last characters of the completion are the answer."""
  return Verdict(completion.endswith(task.answer), answered=bool(completion))


def last_characters(completion: str, task: Task) -> str | None:
  """As many of the last characters as the answer has, which `ends_with` compares; None: the completion is empty."""
  return completion[max(0, len(completion) - len(task.answer)):] or None


def mathematics(completion: str, task: Task) -> Verdict:
  """Whether the marked answer is the same mathematical object as the task's answer (answers.py)."""
  answer = answers.extract(completion)
  return Verdict(answer is not None and answers.same(answer, task.answer), answered=answer is not None)


def math_answer(completion: str, task: Task) -> str | None:
  """The marked answer, as a text that equal mathematical objects share."""
  answer = answers.extract(completion)
  return answers.canonical(answer) if answer else None


VERIFIERS: dict[str, Verifier] = {
    'ends_with': ends_with,
    'math': mathematics,
    'choice': choice.verify,
    'reasoning_gym': gym.verify,
    'python_tests': programs.verify,
}
ANSWERS: dict[str, Extraction] = {
    'ends_with': last_characters,
    'math': math_answer,
    'choice': choice.answer,
    'reasoning_gym': gym.answer,
}
# What joins answers for maj@k whose texts differ: whether two answers of ANSWERS are the same.
SAME: dict[str, Callable[[str, str], bool]] = {'math': answers.same}
# Extractions that no text can make slow or fail: where rewards.pattern is not set, they need no worker process.
HARMLESS = frozenset({'ends_with'})
# Instead, if rewards.partial_credit.
PARTIAL_CREDIT: dict[str, Verifier] = {'reasoning_gym': gym.scored, 'python_tests': programs.scored}
# A function of the user, by its module or by the path of its file.
_OWN = re.compile(r'(?:\w+(?:\.\w+)*|.+\.py):\w+')
# What raises ValueError for tasks that a verifier cannot serve.
_CHECKS: dict[str, Callable[[list[Task]], None]] = {'choice': choice.check, 'reasoning_gym': gym.check}
_PACKAGES = {'reasoning_gym': 'reasoning_gym'}  # imported by the first call of a verifier


@knobs.section
class Config(knobs.Rewards):
  """How to verify, and what is added to rewards."""

  verifier: str | Verifier = 'ends_with'  # of tasks that name none; a function must be one that can be pickled


def check(config: Config, completion_length: int) -> None:
  """Raises ValueError for an unknown verifier, and for a length_buffer above completion_length."""
  check_name(config.verifier, 'rewards.verifier')
  if config.length_buffer > completion_length:
    raise ValueError(
        f'rewards.length_buffer={config.length_buffer} is not in 0..sample.completion_length={completion_length}')


def check_name(verifier: str | Verifier, whose: str) -> None:
  """Raises ValueError for an unknown verifier, or one whose package is missing. whose: what the error names."""
  if verifier == 'reasoning_gym' and importlib.util.find_spec('reasoning_gym') is None:
    raise ValueError(f"{whose}='reasoning_gym' needs a package: pip install 'kr_jax[data]'")
  if is_imported(verifier) and not _OWN.fullmatch(verifier):
    raise ValueError(f"{whose}={verifier!r} is not one of {sorted(VERIFIERS)}, nor 'module:function' or "
                     "'PATH.py:function'")


def names(tasks: Iterable[Task], config: Config) -> list[str | Verifier]:
  """The verifiers of tasks, each once. Raises ValueError for an unknown one."""
  first = {}  # the first task of each
  for task in tasks:
    first.setdefault(task.verifier or config.verifier, task.id)
  for name, task_id in first.items():
    check_name(name, f'the verifier of {task_id}')
  return list(first)


def check_tasks(tasks: Iterable[Task], config: Config) -> None:
  """Raises ValueError, naming the task, where the verifier of tasks cannot serve them.

  So it is for tasks of multiple choice whose answer is no letter, and for tasks of reasoning-gym whose scorer refuses
  their own answer or accepts a wrong one, by some tasks of each dataset, and for tasks of programs without tests or
  whose tests may take longer than a verdict. Imports reasoning-gym if a task needs it.
  """
  by_verifier: dict[str | Verifier, list[Task]] = {}
  for task in tasks:
    by_verifier.setdefault(task.verifier or config.verifier, []).append(task)
  for verifier, some in by_verifier.items():
    if verifier in _CHECKS:
      _CHECKS[verifier](some)
    if verifier == 'python_tests':
      programs.check(some, config.timeout_s)


def find(verifier: str | Verifier, partial_credit: bool = False) -> Verifier:
  """The function of a verifier; one of the user is imported when it is called, so in worker processes only."""
  check_name(verifier, 'rewards.verifier')
  if is_imported(verifier):
    return functools.partial(_import_and_call, located(verifier))
  if partial_credit and verifier in PARTIAL_CREDIT:
    return PARTIAL_CREDIT[verifier]
  return VERIFIERS.get(verifier, verifier)


def is_imported(verifier: str | Verifier) -> bool:
  """Whether a verifier is a function of the user, named 'module:function' or 'PATH.py:function'."""
  return isinstance(verifier, str) and verifier not in VERIFIERS


def located(name: str) -> str:
  """The name of a function of the user, as worker processes find it, which work in another folder."""
  module, _, function = name.rpartition(':')
  return f'{modules_lib.located(module)}:{function}' if modules_lib.is_path(module) else name


@functools.cache  # a worker cannot read the file, and one that is edited during a run changes no verdict
def import_module(module: str) -> Any:
  """The module of a name, 'package.module' or 'PATH.py'. Raises what its code raises."""
  return modules_lib.load(module) if modules_lib.is_path(module) else importlib.import_module(module)


def import_function(name: str) -> Verifier:
  """The function of a name. Raises ValueError if it is not found or does not take two arguments."""
  module, _, function = name.rpartition(':')
  try:
    found = getattr(import_module(module), function)
  except Exception as error:
    raise ValueError(f"rewards.verifier={name!r} cannot be imported: {error!r}; it must be 'module:function', the "
                     "module importable from where the run starts, or 'PATH.py:function'") from error
  try:
    inspect.signature(found).bind('', None)
  except (TypeError, ValueError) as error:
    raise ValueError(f'rewards.verifier={name!r} cannot be called with (completion, task): {error}') from error
  return found


def _import_and_call(name: str, completion: str, task: Task) -> Any:
  return import_function(name)(completion, task)


def modules(verifiers: Iterable[str | Verifier]) -> list[str]:
  """The modules that the verifiers import when they are called first."""
  return [_PACKAGES.get(name) or located(name).rpartition(':')[0] for name in verifiers
          if name in _PACKAGES or is_imported(name)]


def verify(verifier: Verifier, config: Config, completion: str, task: Task) -> Verdict:
  """The verdict on a completion, its reward without `overlong`; an abstention earns 0.

  Raises what the verifier raises, TypeError for what is no verdict, and ValueError for a reward out of range.
  """
  text = _read(config.pattern, completion)
  verdict = verdicts.checked(verifier(text, task)) if text is not None else Verdict(False, 0.0, answered=False)
  if verdict.right is not None and config.format_weight and re.search(config.format, completion):
    verdict = verdict._replace(reward=verdict.reward + config.format_weight)
    if problem := verdicts.reward_problem(verdict.reward):
      raise ValueError(f'with rewards.format_weight={config.format_weight:g} it is {problem}')
  return verdict


def answer(extraction: Extraction, config: Config, completion: str, task: Task) -> str | None:
  """The answer of a completion; None: it has none. Raises TypeError if it is neither a text nor None."""
  text = _read(config.pattern, completion)
  extracted = extraction(text, task) if text is not None else None
  if not isinstance(extracted, (str, type(None))):
    raise TypeError(f'the answer of {completion!r} is {extracted!r}; answers must be text or None')
  return extracted


def _read(pattern: str, completion: str) -> str | None:
  """What verifiers read: the last match of the pattern, or its group 1 if it has groups; None: it is not found."""
  if not pattern:
    return completion
  matches = [*re.finditer(pattern, completion)]
  if not matches:
    return None
  return (matches[-1][1] or '') if matches[-1].re.groups else matches[-1][0]
