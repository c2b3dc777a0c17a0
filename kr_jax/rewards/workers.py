"""Verdicts and answers of a step's completions, from worker processes with limits of time and memory.

A process is killed at the time limit, is refused memory beyond the memory limit, and is started again. A verifier
that raises on every completion is a bug, not a verdict: then the step fails with its error.

    overlong(length) = clip((C - length_buffer - length) / length_buffer, -1, 0)

is added to rewards: the soft overlong punishment of DAPO, arXiv 2503.14476, eq. 13; no length is beyond C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import TimeoutError  # what pebble raises
import contextlib
import functools
import importlib
import math
import multiprocessing
import resource
import sys
import traceback
from typing import Any, NamedTuple

import numpy as np
import pebble

from kr_jax.rewards import verdicts
from kr_jax.rewards import verifiers as verifiers_lib
from kr_jax.rewards.verifiers import Config, Verifier
from kr_jax.types import Task


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
  errors: int  # extractions that raised or died


_Function = Callable[[str, Task], Any]  # what a process computes: a verdict with its reward, or an answer


class _Pair(NamedTuple):
  """A completion of a task. Equal pairs share one outcome."""

  verifier: str | Verifier
  completion: str
  task: Task


class _Outcome(NamedTuple):
  """What a function returned on a pair, or why it returned nothing."""

  value: Any = None
  # A traceback, as not every exception can be pickled; TimeoutError; or pebble.ProcessExpired: the process died.
  failure: str | Exception | None = None


def _start_process(modules: Sequence[str], memory_mb: int) -> None:
  """Imports the verifiers' modules, then limits the memory."""
  for module in modules:
    with contextlib.suppress(Exception):  # the verifier raises it again when it is called, which can say so
      importlib.import_module(module)
  if sys.platform == 'linux':  # elsewhere this limit is not kept
    with open('/proc/self/statm') as file:
      used = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + memory_mb * 2 ** 20
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _apply(function: _Function, pairs: Sequence[_Pair]) -> list[_Outcome]:
  outcomes = []
  for pair in pairs:
    try:
      outcomes.append(_Outcome(function(pair.completion, pair.task)))
    except BaseException:  # SystemExit too: it must not end the run
      outcomes.append(_Outcome(failure=traceback.format_exc()))
  return outcomes


class Workers(contextlib.AbstractContextManager):
  """A pool of verifier processes; close it, or use it as a context.

  Args:
    verifiers: the verifiers that tasks name, in addition to the config's.
    completion_length: C, tokens at which a completion is cut; config.length_buffer needs it.

  Raises:
    ValueError: an unknown verifier, a length_buffer above C, or a function that cannot be imported or called.
  """

  def __init__(self, config: Config, *, verifiers: Iterable[str | Verifier] = (), completion_length: int = 0):
    verifiers_lib.check(config, completion_length)
    self._config, self._completion_length = config, completion_length
    names = (config.verifier, *verifiers)
    self._verifiers = {name: verifiers_lib.find(name, config.partial_credit) for name in names}
    self._start()
    try:
      for name in filter(verifiers_lib.is_imported, self._verifiers):
        self._pool.schedule(_check_import, args=(name,)).result()
    except BaseException:
      self.close()
      raise

  def __exit__(self, *_) -> None:
    self.close()

  def _start(self) -> None:
    # Spawned: a fork of a process with JAX's threads may deadlock.
    self._pool = pebble.ProcessPool(
        self._config.workers, context=multiprocessing.get_context('spawn'), initializer=_start_process,
        initargs=(verifiers_lib.modules(self._verifiers), self._config.memory_mb))

  def close(self) -> None:
    """Ends the processes."""
    self._pool.stop()
    self._pool.join()

  def _run(self, jobs: Sequence[tuple[_Function, Sequence[_Pair]]]) -> list[list[_Outcome] | Exception]:
    """The outcomes of each job, or what ended the job: TimeoutError, or the death of its process."""
    results = [RuntimeError('the pool of verifiers broke')] * len(jobs)
    remaining = range(len(jobs))
    for _ in range(3):
      futures = {}
      for i in remaining:
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
      # A process that dies at once can break pebble's pool, and end jobs that are innocent.
      self.close()
      self._start()
      remaining = [i for i in remaining if not isinstance(results[i], (list, TimeoutError))]
    return results

  def _outcomes(self, functions: dict[str | Verifier, _Function], pairs: Sequence[_Pair]) -> dict[_Pair, _Outcome]:
    """The outcome of each pair, in their order."""
    by_verifier = {}
    for pair in pairs:
      by_verifier.setdefault(pair.verifier, []).append(pair)
    size = max(1, math.ceil(len(pairs) / (8 * self._config.workers)))  # eight chunks a process, or a few more
    chunks = [some[i:i + size] for some in by_verifier.values() for i in range(0, len(some), size)]
    outcomes = {}
    for chunk, result in zip(chunks, self._run([(functions[chunk[0].verifier], chunk) for chunk in chunks])):
      if isinstance(result, list):
        outcomes.update(zip(chunk, result))
    # Of a chunk that did not finish each pair runs alone, so that only the bad one loses its value.
    alone = [pair for pair in pairs if pair not in outcomes]
    for pair, result in zip(alone, self._run([(functions[pair.verifier], [pair]) for pair in alone])):
      outcomes[pair] = result[0] if isinstance(result, list) else _Outcome(failure=result)
    return {pair: outcomes[pair] for pair in pairs}

  def _map(self, functions: dict[str | Verifier, _Function], what: str, completion_R: Sequence[str],
           task_R: Sequence[Task]) -> tuple[list[Any], int, int]:
    """The values of the functions on completions, None where there is none; the numbers of timeouts and of errors.

    what: what an error calls the functions. Raises RuntimeError if one raised on every completion that it read.
    """
    pair_R = [_Pair(task.verifier or self._config.verifier, completion, task)
              for completion, task in zip(completion_R, task_R, strict=True)]
    for pair in pair_R:
      if pair.verifier not in functions:
        raise ValueError(f'{pair.verifier!r} of a task is not among the verifiers of these Workers, '
                         f'{list(functions)}; name it in `verifiers`')
    outcomes = self._outcomes(functions, list(dict.fromkeys(pair_R)))
    _check_some_work(outcomes, what)
    outcome_R = [outcomes[pair] for pair in pair_R]
    failures = [outcome.failure for outcome in outcome_R if outcome.failure is not None]
    timeouts = sum(isinstance(failure, TimeoutError) for failure in failures)
    return [outcome.value for outcome in outcome_R], timeouts, len(failures) - timeouts

  def score(self, completion_R: Sequence[str], task_R: Sequence[Task], length_R: np.ndarray | None = None) -> Scores:
    """Scores R completions, each against its task; equal completions of a task share one verdict.

    length_R: tokens of each completion, for `overlong`; None: rewards without it. Raises ValueError for a verifier
    that this pool was not made with, RuntimeError if a verifier raised on every completion.
    """
    functions = {name: functools.partial(verifiers_lib.verify, verifier, self._config)
                 for name, verifier in self._verifiers.items()}
    scored_R, _, _ = self._map(functions, 'verifier', completion_R, task_R)
    outcome_R = np.array([verdicts.RAISED if scored is None else scored.outcome for scored in scored_R], np.int8)
    reward_R = np.array([0.0 if scored is None else scored.reward for scored in scored_R], np.float32)
    if length_R is not None:
      is_verified_R = np.isin(outcome_R, verdicts.VERIFIED)
      reward_R += is_verified_R * overlong(length_R, self._completion_length, self._config.length_buffer)
    return Scores(outcome_R, reward_R)

  def answers(self, completion_R: Sequence[str], task_R: Sequence[Task]) -> Answers:
    """The answers of R completions, by the extractions of their verifiers in ANSWERS.

    Raises ValueError for a verifier without one, RuntimeError if an extraction raised on every completion.
    """
    extractions = verifiers_lib.ANSWERS
    functions = {name: functools.partial(verifiers_lib.answer, extractions[name], self._config)
                 for name in self._verifiers if name in extractions}
    if missing := {task.verifier or self._config.verifier for task in task_R} - set(functions):
      raise ValueError(f'verifiers {missing} have no extraction of answers; see rewards.ANSWERS')
    answer_R, timeouts, errors = self._map(functions, 'extraction of answers', completion_R, task_R)
    return Answers(tuple(answer_R), timeouts, errors)


def _check_import(name: str) -> None:
  verifiers_lib.import_function(name)  # not returned: its pickle would import the module in this process too


def _check_some_work(outcomes: dict[_Pair, _Outcome], what: str) -> None:
  """Raises RuntimeError for a verifier whose function raised on all of its pairs."""
  for name in dict.fromkeys(pair.verifier for pair in outcomes):
    failure_of = {pair: outcome.failure for pair, outcome in outcomes.items() if pair.verifier == name}
    # Processes that die or are stopped do not count: the completions may be why.
    raised = [pair for pair, failure in failure_of.items()
              if failure is not None and not isinstance(failure, (TimeoutError, pebble.ProcessExpired))]
    if len(raised) == len(failure_of):
      last = raised[-1]
      raise RuntimeError(f'the {what} of {name!r} failed on all {len(raised)} completions of the step; on '
                         f'{last.completion!r} to {last.task.id}: {failure_of[last]}')


def overlong(length_R: np.ndarray, completion_length: int, buffer: int) -> np.ndarray:
  """What lengths, in tokens, add to rewards by the formula above, float32 [R]; buffer: in tokens, 0 adds nothing."""
  if not buffer:
    return np.zeros(len(length_R), np.float32)
  return np.clip((completion_length - buffer - np.asarray(length_R)) / buffer, -1, 0).astype(np.float32)
