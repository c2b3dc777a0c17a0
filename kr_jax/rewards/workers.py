"""Completion text -> verdict and reward, in worker processes.

A verifier takes (completion, task) and returns whether the completion is right; or (right, reward),
where the policy is to learn from another reward than 1.0 and 0.0. Success rates count what is right,
whatever the reward. A task may name its verifier; for the others it is that of the config: a name in
VERIFIERS, or a function of your own as 'module:function'.

A verifier may have an extraction in ANSWERS, which says what a completion answers: completions of a
task agree if their answers are equal. It takes (completion, task) as well, the reference for its form
alone: what it returns must not depend on which answer is right. Without one there is no majority vote.

A verifier runs on text that a policy wrote, so it may hang, raise, die or fill the memory. It runs in
processes that are killed at the time limit, are refused memory beyond theirs, and are started again;
what they did not finish is wrong, earns 0.0 and is counted. A verifier that raises on everything is a
bug, not a verdict: then the step fails with its error. Extractions run in the same way; what one does
not finish has no answer.

Rewards may be shaped, verdicts never:

    reward = of the verifier + format_weight [the completion matches format]
             + clip((C - length_buffer - length) / length_buffer, -1, 0)

The last is the soft overlong punishment of DAPO, arXiv 2503.14476, eq. 13; C is the completion length at
which the sampler cuts, so there is nothing beyond it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import TimeoutError  # what pebble raises
import functools
import importlib
import importlib.util
import inspect
import json
import math
import multiprocessing
import re
import resource
import sys
import traceback
from typing import Any, NamedTuple

import numpy as np
import pebble

from kr_jax import knobs
from kr_jax.rewards import answers
from kr_jax.types import Task


def ends_with(completion: str, task: Task) -> bool:
  """True if the completion's last characters are the answer."""
  return completion.endswith(task.answer)


def last_characters(completion: str, task: Task) -> str | None:
  """What `ends_with` compares: as many of the last characters as the answer has; None: there is none."""
  return completion[max(0, len(completion) - len(task.answer)):] or None


def mathematics(completion: str, task: Task) -> bool:
  """Whether the marked answer is the same mathematical object as the task's (kr_jax/rewards/answers.py)."""
  answer = answers.extract(completion)
  return answer is not None and answers.same(answer, task.answer)


def math_answer(completion: str, task: Task) -> str | None:
  answer = answers.extract(completion)
  return answers.canonical(answer) if answer else None


def choice(completion: str, task: Task) -> bool:
  """Multiple choice: whether the marked letter is the task's. Raises ValueError if that is none."""
  right = answers.letter(task.answer)
  if right is None:
    raise ValueError(f'the answer {task.answer!r} of {task.id} is not the letter of a choice')
  return choice_answer(completion, task) == right


def choice_answer(completion: str, task: Task) -> str | None:
  answer = answers.extract(completion)
  return answers.letter(answer) if answer else None


@functools.cache
def _scorer(dataset: str) -> Callable[[str, dict], float]:
  import reasoning_gym  # here, as it takes seconds
  return reasoning_gym.get_score_answer_fn(dataset)


def reasoning_gym_score(completion: str, task: Task) -> tuple[bool, float]:
  """Right, and the score in 0..1, by the scorer of reasoning-gym that task.info names.

  task.info is JSON: {"dataset": its name in reasoning-gym, "entry": {"answer", "metadata", ...}}, in
  which {"tuple": [...]} is a tuple.
  Right is a score of 1. Raises ValueError for another info; what the scorer raises on is wrong.
  """
  try:
    info = json.loads(task.info, object_hook=lambda x: tuple(x['tuple']) if x.keys() == {'tuple'} else x)
    dataset, entry = info['dataset'], info['entry']
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f'the info {task.info!r} of {task.id} is not JSON with "dataset" and "entry", as '
                     'the verifier reasoning_gym needs it') from error
  score_answer = _scorer(dataset)
  try:
    score = float(score_answer(reasoning_gym_answer(completion, task), entry))
  except Exception:
    score = 0.0
  score = score if 0 <= score <= 1 else 0.0
  return score >= 1 - 1e-9, score


def reasoning_gym(completion: str, task: Task) -> bool:
  """The verdict of `reasoning_gym_score`."""
  return reasoning_gym_score(completion, task)[0]


def reasoning_gym_answer(completion: str, task: Task) -> str | None:
  """What the scorer reads: the marked answer, or all of the completion where none is."""
  return answers.extract(completion) or completion.strip() or None


Verifier = Callable[[str, Task], bool | tuple[bool, float]]
VERIFIERS: dict[str, Verifier] = {
    'ends_with': ends_with, 'math': mathematics, 'choice': choice, 'reasoning_gym': reasoning_gym}
# What a completion answers, by verifier; see above.
ANSWERS: dict[str, Callable[[str, Task], str | None]] = {
    'ends_with': last_characters, 'math': math_answer, 'choice': choice_answer,
    'reasoning_gym': reasoning_gym_answer}
# Takes the verifier's place where rewards.partial_credit is asked for.
PARTIAL_CREDIT: dict[str, Verifier] = {'reasoning_gym': reasoning_gym_score}
# What a process imports before its time is taken.
_IMPORTS = {'math': 'math_verify', 'reasoning_gym': 'reasoning_gym'}


@knobs.section
class Config(knobs.Rewards):
  """How to verify, and what is added to rewards."""

  verifier: str | Verifier = 'ends_with'  # of tasks that name none; a function must be one that can be pickled


class Scores(NamedTuple):
  """The verdicts on R rollouts."""

  verdict_R: np.ndarray  # float32, 1.0 or 0.0
  reward_R: np.ndarray  # float32, the verdict unless the verifier or the config said otherwise
  timeouts: int  # verdicts that did not come within the limit
  errors: int  # verdicts that raised or died


class Answers(NamedTuple):
  """What R rollouts answer."""

  answer_R: tuple[str | None, ...]  # None: no answer
  timeouts: int  # extractions that did not come within the limit
  errors: int  # extractions that raised or died


@functools.cache
def _own(name: str) -> Verifier:
  """The function of 'module:function'. Raises ValueError where none takes two arguments."""
  module, _, function = name.partition(':')
  try:
    found = getattr(importlib.import_module(module), function)
  except Exception as error:
    raise ValueError(f'rewards.verifier={name!r} cannot be imported: {error!r}; it is to be '
                     "'module:function', the module importable from where the run starts") from error
  try:
    inspect.signature(found).bind('', None)
  except (TypeError, ValueError) as error:
    raise ValueError(f'rewards.verifier={name!r} cannot be called with (completion, task): {error}'
                     ) from error
  return found


def _call_own(name: str, completion: str, task: Task) -> bool | tuple[bool, float]:
  return _own(name)(completion, task)


def _read(pattern: str, completion: str) -> str | None:
  """What a verifier sees of a completion; None: the pattern is not in it."""
  if not pattern:
    return completion
  found = None
  for found in re.finditer(pattern, completion):
    pass
  return found and (found[1] or '' if found.re.groups else found[0])


def _verdict(verifier: Verifier, config: Config, completion: str, task: Task) -> tuple[bool, float]:
  seen = _read(config.pattern, completion)
  outcome = verifier(seen, task) if seen is not None else False
  verdict, reward = outcome if isinstance(outcome, tuple) else (outcome, bool(outcome))
  if config.format_weight and re.search(config.format, completion):
    reward += config.format_weight
  if not math.isfinite(reward):
    raise ValueError(f'the reward of {completion!r} is {reward}; rewards must be finite')
  return bool(verdict), float(reward)


def _answer(extract: Callable[[str, Task], str | None], config: Config, completion: str, task: Task
            ) -> str | None:
  seen = _read(config.pattern, completion)
  extracted = extract(seen, task) if seen is not None else None
  if not isinstance(extracted, (str, type(None))):
    raise TypeError(f'the answer of {completion!r} is {extracted!r}; answers must be text or None')
  return extracted


def _start_process(modules: Sequence[str], memory_mb: int) -> None:
  """Imports what verdicts need, then bounds the memory."""
  for module in modules:
    try:
      importlib.import_module(module)
    except Exception:  # it comes again where the verifier is called, which can say so
      pass
  if sys.platform == 'linux':  # elsewhere this limit is not kept
    with open('/proc/self/statm') as file:
      now = int(file.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + memory_mb * 2 ** 20
    resource.setrlimit(resource.RLIMIT_AS, (
        limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _apply(function: Callable[[str, Task], Any], pairs: Sequence[tuple[str, Task]]
           ) -> list[tuple[Any] | str]:
  """(value,) of each; where the function raised, the traceback: an exception might not survive the
  way."""
  outcomes = []
  for completion, task in pairs:
    try:
      outcomes.append((function(completion, task),))
    except BaseException:  # SystemExit too: it must not end the run
      outcomes.append(traceback.format_exc())
  return outcomes


def check(config: Config, completion_length: int) -> None:
  """Raises ValueError for a knob out of its range."""
  _check_name(config.verifier, 'rewards.verifier')
  if config.length_buffer > completion_length:
    raise ValueError(f'rewards.length_buffer={config.length_buffer} is not in 0..'
                     f'sample.completion_length={completion_length}')


def _check_name(verifier: str | Verifier, whose: str) -> None:
  if verifier == 'reasoning_gym' and importlib.util.find_spec('reasoning_gym') is None:
    raise ValueError(f"{whose}='reasoning_gym' needs a package: pip install 'kr_jax[data]'")
  if not isinstance(verifier, str) or verifier in VERIFIERS:
    return
  if not re.fullmatch(r'\w+(?:\.\w+)*:\w+', verifier):
    raise ValueError(f"{whose}={verifier!r} is not one of {sorted(VERIFIERS)}, nor 'module:function'")


def names(tasks: Iterable[Task], config: Config) -> list[str | Verifier]:
  """The verifiers of tasks. Raises ValueError for one that there is not."""
  found = {}
  for task in tasks:
    name = task.verifier or config.verifier
    if name not in found:
      _check_name(name, f'the verifier of {task.id}')
    found[name] = None
  return list(found)


class Workers:
  """A pool of verifier processes; close it, or use it as a context.

  Args:
    verifiers: those that tasks name, beside the config's.
    completion_length: C, tokens at which a completion is cut; needed for config.length_buffer.

  Raises:
    ValueError: a knob out of its range, or a verifier of your own that cannot be imported or called.
  """

  def __init__(self, config: Config, *, verifiers: Iterable[str | Verifier] = (),
               completion_length: int = 0):
    check(config, completion_length)
    self._config, self._completion_length = config, completion_length
    self._verifiers = {name: self._find(name) for name in (config.verifier, *verifiers)}
    self._start()
    own = [name for name in self._verifiers if isinstance(name, str) and name not in VERIFIERS]
    for name in own:
      try:
        self._pool.schedule(_check_own, args=(name,)).result()
      except BaseException:
        self.close()
        raise

  def __enter__(self) -> Workers:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _find(self, name: str | Verifier) -> Verifier:
    if not isinstance(name, str):
      return name
    _check_name(name, 'rewards.verifier')
    if name not in VERIFIERS:
      return functools.partial(_call_own, name)
    return PARTIAL_CREDIT.get(name, VERIFIERS[name]) if self._config.partial_credit else VERIFIERS[name]

  def _start(self) -> None:
    modules = [_IMPORTS.get(name) or name.partition(':')[0] for name in self._verifiers
               if name in _IMPORTS or isinstance(name, str) and ':' in name]
    # Spawned: a fork of a process with JAX's threads may deadlock.
    self._pool = pebble.ProcessPool(
        self._config.workers, context=multiprocessing.get_context('spawn'),
        initializer=_start_process, initargs=(modules, self._config.memory_mb))

  def close(self) -> None:
    self._pool.stop()
    self._pool.join()

  def _run(self, jobs: Sequence[tuple[Callable[[str, Task], Any], Sequence[tuple[str, Task]]]]
           ) -> list[list[tuple[Any] | str] | Exception]:
    """Each job's outcomes, or what ended it: TimeoutError, or the death of its process."""
    results = [RuntimeError('the pool of verifiers broke')] * len(jobs)
    left = range(len(jobs))
    for _ in range(3):
      futures = {}
      for i in left:
        try:
          futures[i] = self._pool.schedule(_apply, args=jobs[i], timeout=self._config.timeout_s)
        except RuntimeError:  # the pool broke
          break
      for i, future in futures.items():
        try:
          results[i] = future.result()
        except Exception as error:
          results[i] = error
      if self._pool.active:
        break
      # A process that dies at once can take pebble's pool along, and with it jobs that are innocent.
      self.close()
      self._start()
      left = [i for i in left if not isinstance(results[i], (list, TimeoutError))]
    return results

  def _map(self, functions: dict[str | Verifier, Callable[[str, Task], Any]], what: str,
           completion_R: Sequence[str], task_R: Sequence[Task]) -> tuple[list[Any], int, int]:
    """The value on each (completion, task) of its verifier's function, None where it has none;
    timeouts; errors.

    Equal completions of a task share one value. Raises RuntimeError if a function, called what, raised
    on all that it was given.
    """
    key_R = [(t.verifier or self._config.verifier, c, t)
             for c, t in zip(completion_R, task_R, strict=True)]
    keys = list(dict.fromkeys(key_R))
    size = -(-len(keys) // (8 * self._config.workers)) or 1
    chunks = []
    for name in dict.fromkeys(name for name, _, _ in keys):
      if name not in functions:
        raise ValueError(f'{name!r} of a task is not among the verifiers of these Workers, '
                         f'{list(functions)}; name it in `verifiers`')
      of_name = [key for key in keys if key[0] == name]
      chunks += [of_name[i:i + size] for i in range(0, len(of_name), size)]
    run = lambda chunks: self._run([(functions[chunk[0][0]], [key[1:] for key in chunk])
                                    for chunk in chunks])
    outcome = {}
    for chunk, result in zip(chunks, run(chunks)):
      if isinstance(result, list):
        outcome.update(zip(chunk, result))
    # A chunk that did not end: its pairs alone, so that only the bad one loses its value.
    alone = [key for key in keys if key not in outcome]
    for key, result in zip(alone, run([[key] for key in alone])):
      outcome[key] = result[0] if isinstance(result, list) else result
    errors = {key: x for key, x in outcome.items() if not isinstance(x, (tuple, TimeoutError))}
    for name in {name for name, _, _ in keys}:
      of_name = [key for key in keys if key[0] == name]
      # A process that dies may be the completion's doing.
      raised = [key for key in of_name
                if key in errors and not isinstance(errors[key], pebble.ProcessExpired)]
      if len(raised) == len(of_name):
        _, completion, task = raised[-1]
        raise RuntimeError(f'the {what} of {name!r} failed on all {len(raised)} completions of the '
                           f'step; on {completion!r} to {task.id}: {errors[raised[-1]]}')
    return ([x[0] if isinstance(x, tuple) else None for x in map(outcome.get, key_R)],
            sum(isinstance(outcome[key], TimeoutError) for key in key_R),
            sum(key in errors for key in key_R))

  def score(self, completion_R: Sequence[str], task_R: Sequence[Task],
            length_R: np.ndarray | None = None) -> Scores:
    """Scores R completions, each against its task; equal completions of a task share one verdict.

    Args:
      length_R: tokens of each, for the part of the reward that depends on them; None: without it.

    Raises:
      RuntimeError: a verifier raised on every completion.
    """
    functions = {name: functools.partial(_verdict, verifier, self._config)
                 for name, verifier in self._verifiers.items()}
    scored_R, timeouts, errors = self._map(functions, 'verifier', completion_R, task_R)
    scored_R = [(False, 0.0) if scored is None else scored for scored in scored_R]
    reward_R = np.array([reward for _, reward in scored_R], np.float32)
    if length_R is not None:
      reward_R += overlong(length_R, self._completion_length, self._config.length_buffer)
    return Scores(np.array([verdict for verdict, _ in scored_R], np.float32), reward_R, timeouts, errors)

  def answers(self, completion_R: Sequence[str], task_R: Sequence[Task]) -> Answers:
    """What R completions answer, by the extraction that their verifier has in ANSWERS.

    Raises:
      ValueError: it has none.
      RuntimeError: an extraction raised on every completion.
    """
    functions = {name: functools.partial(_answer, ANSWERS[name], self._config)
                 for name in self._verifiers if name in ANSWERS}
    if missing := {t.verifier or self._config.verifier for t in task_R} - set(functions):
      raise ValueError(f'verifiers {missing} have no extraction of answers; see rewards.ANSWERS')
    answer_R, timeouts, errors = self._map(functions, 'extraction of answers', completion_R, task_R)
    return Answers(tuple(answer_R), timeouts, errors)


def overlong(length_R: np.ndarray, completion_length: int, buffer: int) -> np.ndarray:
  """float32 [R], 0 up to completion_length - buffer tokens, from there linearly to -1 at
  completion_length; 0 where there is no buffer."""
  if not buffer:
    return np.zeros(len(length_R), np.float32)
  return np.clip((completion_length - buffer - np.asarray(length_R)) / buffer, -1, 0).astype(np.float32)


def _check_own(name: str) -> None:
  _own(name)
