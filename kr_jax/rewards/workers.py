"""Verdicts and answers of a step's completions, from worker processes behind walls.

Each verdict has a limit of time of its own: its process is killed at the limit, and another takes its place. A rollout
whose verdict does not come is unverified; so is one whose process dies twice, the second time alone in a new process.

    overlong(length) = clip((C - length_buffer - length) / length_buffer, -1, 0)

is added to rewards: the soft overlong punishment of DAPO, arXiv 2503.14476, eq. 13; no length is beyond C.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import functools
import itertools
import os
import pickle
import secrets
from typing import Any, NamedTuple

import numpy as np

from kr_jax import errors
from kr_jax.rewards import pool
from kr_jax.rewards import verdicts
from kr_jax.rewards import verifiers as verifiers_lib
from kr_jax.rewards import worker
from kr_jax.rewards.verifiers import Config, Verifier
from kr_jax.rewards.worker import Reply, Request
from kr_jax.types import Task

MOST_WORKERS = 64  # that rewards.workers=0 may mean
_EXAMPLES = 3  # of an error


class NoVerdicts(errors.Told, RuntimeError):
  """Everything of a verifier was unverified, in too many calls in a row."""


class Scores(NamedTuple):
  """The verdicts on R rollouts."""

  outcome_R: np.ndarray  # int8, of verdicts.OUTCOMES
  reward_R: np.ndarray  # float32, the verdict unless the verifier or the config changes it; 0 if unverified
  examples: tuple[str, ...] = ()  # of what was not verified: the first of each verifier and outcome

  @property
  def verdict_R(self) -> np.ndarray:
    """float32: 1.0 if right, else 0.0."""
    return (self.outcome_R == verdicts.RIGHT).astype(np.float32)

  @property
  def verified_R(self) -> np.ndarray:
    """bool: whether the verdict is right or wrong."""
    return np.isin(self.outcome_R, verdicts.VERIFIED)


class Answers(NamedTuple):
  """The answers of R rollouts."""

  answer_R: tuple[str | None, ...]  # None: no answer
  timeouts: int  # extractions that did not come within the limit
  errors: int  # extractions that failed otherwise: raised, died, or returned neither a text nor None


class _Found(NamedTuple):
  """What came of verifying, or of extracting, R completions."""

  reply_R: list[Reply]
  completion_R: list[str]
  task_R: Sequence[Task]
  name_R: list[str]  # of the verifiers

  def example(self, r: int, of: str = '') -> str:
    """What came of a completion, as a text of one line."""
    reply, completion = self.reply_R[r], self.completion_R[r]
    shown = repr(completion[:200] + ('...' if len(completion) > 200 else ''))
    note = f' - {reply.note}' if reply.note else ''
    return f'{verdicts.OUTCOMES[reply.outcome]}{of}: {self.task_R[r].id}, {shown}{note}'


class Workers(contextlib.AbstractContextManager):
  """A pool of verifier processes, which are started when they are needed; close it, or use it as a context.

  Args:
    config: `workers` of 0 are as many as the processors that this process may use, at most MOST_WORKERS.
    verifiers: the verifiers that tasks name, in addition to the config's.
    completion_length: C, tokens at which a completion is cut; config.length_buffer needs it.
    calls_a_step: how often a step calls `score`: config.max_faulty_steps counts as many calls as one step.

  Raises:
    ValueError: an unknown verifier, a length_buffer above C, or a function that worker processes cannot import or call.
    RuntimeError: the import of a verifier's module ended its process.
  """

  def __init__(self, config: Config, *, verifiers: Iterable[str | Verifier] = (), completion_length: int = 0,
               calls_a_step: int = 1):
    verifiers_lib.check(config, completion_length)
    self._calls_a_step = calls_a_step
    self._config, self._completion_length = config, completion_length
    self._names = {name: _name(name) for name in (config.verifier, *verifiers)}
    self._numbers = itertools.count()
    self._faulty: collections.Counter[tuple[str, str]] = collections.Counter()
    self._functions = {}
    for verifier, name in self._names.items():
      found = verifiers_lib.find(verifier, config.partial_credit)
      self._functions[worker.VERIFY, name] = functools.partial(verifiers_lib.verify, found, config)
      if verifier in verifiers_lib.ANSWERS:
        extraction = verifiers_lib.ANSWERS[verifier]
        self._functions[worker.ANSWER, name] = functools.partial(verifiers_lib.answer, extraction, config)
      if verifier in verifiers_lib.SAME:
        self._functions[worker.JOIN, name] = verifiers_lib.SAME[verifier]
    imported = tuple(map(verifiers_lib.located, filter(verifiers_lib.is_imported, self._names)))
    setup = worker.Setup(
        tuple(verifiers_lib.modules(self._names)), imported,
        tuple((key, _pickled(function, key[1])) for key, function in self._functions.items()),
        config.memory_mb, config.readable, config.network)
    self._pool = pool.Pool(setup, config.workers or _processors(), config.timeout_s)
    try:
      if any(map(_is_own, self._names)):
        self._pool.check()
    except BaseException:
      self.close()
      raise

  def __exit__(self, *_) -> None:
    self.close()

  def leave_by(self, leave: Callable[[], None]) -> None:
    """Has calls ended by an error that `leave` raises, which is called once a second or more often."""
    self._pool.leave = leave

  def close(self) -> None:
    """Ends the processes."""
    self._pool.close()

  def _map(self, kind: str, completions: Iterable[str], task_R: Sequence[Task]) -> _Found:
    """What comes of completions, each with its task; a completion is taken when a process has room.

    Raises ValueError for an unknown verifier, and if there are not as many completions as tasks; NoVerdicts if
    everything of a verifier failed, in as many calls in a row as max_faulty_steps have.
    """
    for task in task_R:
      if (task.verifier or self._config.verifier) not in self._names:
        raise ValueError(f'{task.verifier!r} of a task is not among the verifiers of these Workers, '
                         f'{[*self._names.values()]}; name it in `verifiers`')
    name_R = [self._names[task.verifier or self._config.verifier] for task in task_R]
    number_R, tasks = _numbered(task_R)
    completion_R: list[str] = []
    request_of: dict[tuple[str, int], Request] = {}  # of a completion and the number of its task

    def requests() -> Iterator[Request]:
      for completion, task, name in zip(completions, number_R, name_R, strict=True):
        completion_R.append(completion)
        if (completion, task) not in request_of:
          request = self._request(kind, name, completion=completion, task=task)
          request_of[completion, task] = request
          yield request

    with contextlib.closing(self._pool.run(requests(), tasks)) as run:  # closed where this call is interrupted, too
      replies = {request.number: reply for request, reply in run}
    found = _Found([replies[request_of[pair].number] for pair in zip(completion_R, number_R)], completion_R, task_R,
                   name_R)
    self._check_faults(kind, found)
    return found

  def _request(self, kind: str, name: str, **what: Any) -> Request:
    return Request(next(self._numbers), secrets.token_hex(8), kind, name, **what)

  def _check_faults(self, kind: str, found: _Found) -> None:
    """Counts calls in which everything of a verifier failed. Raises NoVerdicts after max_faulty_steps of them."""
    succeeded = verdicts.VERIFIED if kind == worker.VERIFY else (verdicts.NONE,)
    for name in dict.fromkeys(found.name_R):
      places = [r for r, other in enumerate(found.name_R) if other == name]
      if any(found.reply_R[r].outcome in succeeded for r in places):
        self._faulty[kind, name] = 0
        continue
      self._faulty[kind, name] += 1
      if self._faulty[kind, name] >= self._config.max_faulty_steps * self._calls_a_step:
        what = 'verdict' if kind == worker.VERIFY else 'answer'
        examples = '; '.join(found.example(r) for r in places[:_EXAMPLES])
        raise NoVerdicts(
            f'the verifier {name} gave no {what} on any completion, {self._faulty[kind, name]} times in a row '
            f'(rewards.max_faulty_steps={self._config.max_faulty_steps}); the last time on {len(places)}: {examples}. '
            'Correct it, or what it needs (rewards.timeout_s, rewards.memory_mb), and give the same command again')

  def score(self, completions: Iterable[str], task_R: Sequence[Task], length_R: np.ndarray | None = None) -> Scores:
    """Scores R completions, each against its task; equal completions of a task share one verdict.

    Args:
      completions: R texts. An iterator is read while others are verified, so that it may make them.
      length_R: tokens of each completion, for `overlong`; None: rewards without it.

    Raises:
      ValueError: a task names a verifier that this pool was not made with, or there are not R completions.
      NoVerdicts: everything of a verifier was unverified, in as many calls in a row as config.max_faulty_steps have.
      RuntimeError: no process can be started.
    """
    found = self._map(worker.VERIFY, completions, task_R)
    outcome_R = np.array([reply.outcome for reply in found.reply_R], np.int8)
    reward_R = np.array([reply.reward for reply in found.reply_R], np.float32)
    if length_R is not None:
      is_verified_R = np.isin(outcome_R, verdicts.VERIFIED)
      reward_R += is_verified_R * overlong(length_R, self._completion_length, self._config.length_buffer)
    total, places = collections.Counter(found.name_R), {}
    for r, (name, outcome) in enumerate(zip(found.name_R, outcome_R.tolist())):
      if outcome not in verdicts.VERIFIED:
        places.setdefault((name, outcome), []).append(r)
    return Scores(outcome_R, reward_R, tuple(
        f'{name}: ' + found.example(some[0], f' ({len(some)} of {total[name]})') + self._may_be_slow(outcome)
        for (name, outcome), some in places.items()))

  def _may_be_slow(self, outcome: int) -> str:
    """Names the config's regexes where a verdict did not come in time: one may go back without end."""
    named = [f'rewards.{name}={x!r}' for name in ('pattern', 'format') if (x := getattr(self._config, name))]
    return f'; {" or ".join(named)} may take as long' if named and outcome == verdicts.TIMEOUT else ''

  def answers(self, completions: Iterable[str], task_R: Sequence[Task]) -> Answers:
    """The answers of R completions, by the extractions of their verifiers in ANSWERS.

    Of answers to a task that are the same by the verifier's function in SAME, all are given as the first of them,
    where texts are in the order of their lengths.

    Raises ValueError for a verifier without an extraction, and what `score` raises.
    """
    names = {self._names.get(task.verifier or self._config.verifier) for task in task_R} - {None}
    if missing := {name for name in names if (worker.ANSWER, name) not in self._functions}:
      raise ValueError(f'verifiers {missing} have no extraction of answers; see rewards.ANSWERS')
    verifier_R = [task.verifier or self._config.verifier for task in task_R]
    if verifiers_lib.HARMLESS & self._names.keys() >= set(verifier_R) and not self._config.pattern:
      return Answers(tuple(verifiers_lib.ANSWERS[verifier](completion, task) for verifier, completion, task in zip(
          verifier_R, completions, task_R, strict=True)), 0, 0)
    found = self._map(worker.ANSWER, completions, task_R)
    outcomes = collections.Counter(reply.outcome for reply in found.reply_R)
    timeouts = outcomes[verdicts.TIMEOUT]
    return Answers(tuple(self._joined(found)), timeouts,
                   outcomes.total() - timeouts - outcomes[verdicts.NONE])

  def _joined(self, found: _Found) -> list[str | None]:
    """The answers, one text for those that are the same."""
    number_R, _ = _numbered(found.task_R)
    of_task: dict[tuple[str, int], set[str]] = {}
    for reply, name, number in zip(found.reply_R, found.name_R, number_R):
      if reply.value is not None and (worker.JOIN, name) in self._functions:
        of_task.setdefault((name, number), set()).add(reply.value)
    number_of = {}  # of the task of a request
    for (name, number), texts in of_task.items():
      if len(texts) > 1:
        in_order = tuple(sorted(texts, key=lambda text: (len(text), text)))
        number_of[self._request(worker.JOIN, name, texts=in_order)] = number
    joined = {}
    for request, reply in self._pool.run(number_of, ()):
      if reply.outcome == verdicts.NONE:  # else the texts stand as they are
        joined |= {(number_of[request], text): request.texts[i] for text, i in zip(request.texts, reply.value)}
    return [joined.get((number, reply.value), reply.value) for number, reply in zip(number_R, found.reply_R)]


def _numbered(task_R: Sequence[Task]) -> tuple[list[int], list[Task]]:
  """Numbers of tasks, equal ones for equal tasks, and the tasks by number."""
  by_identity, by_value = {}, {}
  for task in task_R:
    if id(task) not in by_identity:  # hashing a task takes time
      by_identity[id(task)] = by_value.setdefault(task, len(by_value))
  return [by_identity[id(task)] for task in task_R], list(by_value)


def _processors() -> int:
  available = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  return min(available, MOST_WORKERS)


def _function(verifier: str | Verifier) -> Any:
  return verifiers_lib.VERIFIERS.get(verifier, verifier)


def _is_own(verifier: str | Verifier) -> bool:
  """Whether a verifier is the user's, and may fail to be imported."""
  return not getattr(_function(verifier), '__module__', '').startswith('kr_jax.')


def _name(verifier: str | Verifier) -> str:
  """What a verifier is called."""
  if isinstance(verifier, str):
    return verifier
  return f'{getattr(verifier, "__module__", "")}:{getattr(verifier, "__qualname__", repr(verifier))}'


def _pickled(function: Callable, name: str) -> bytes:
  """The function of a verifier as it is sent to worker processes: where to import it from."""
  inner = function
  while isinstance(inner, functools.partial):
    inner = inner.args[0] if inner.args and callable(inner.args[0]) else inner.func
  try:
    if getattr(inner, '__module__', None) == '__main__':
      raise pickle.PicklingError('it is defined in __main__')
    return pickle.dumps(function)
  except (pickle.PicklingError, AttributeError, TypeError) as error:
    raise ValueError(f'the verifier {name} cannot be sent to worker processes: {error}; put it in a module that is '
                     "importable from where the run starts, and name it 'module:function'") from error


def overlong(length_R: np.ndarray, completion_length: int, buffer: int) -> np.ndarray:
  """What lengths, in tokens, add to rewards by the formula above, float32 [R]; buffer: in tokens, 0 adds nothing."""
  if not buffer:
    return np.zeros(len(length_R), np.float32)
  return np.clip((completion_length - buffer - np.asarray(length_R)) / buffer, -1, 0).astype(np.float32)
