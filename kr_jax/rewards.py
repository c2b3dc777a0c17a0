"""Completion text -> verdict and reward, in worker processes.

A verifier takes (completion, answer) and returns whether it is right; or (right, reward), where the
policy is to learn from another reward than 1.0 and 0.0. Success rates count what is right, whatever
the reward.

A verifier may have an extraction in ANSWERS, which says what a completion answers: completions of a
task agree if their answers are equal. It takes (completion, answer) as well, the reference for its form
alone: what it returns must not depend on which answer is right. Without one there is no majority vote.

A verifier runs on text that a policy wrote, so it may hang, raise or die. It runs in processes that
are killed at the time limit and started again; what it did not finish is wrong, earns 0.0 and is
counted. A verifier that raises on everything is a bug, not a verdict: then the step fails with its
error. Extractions run in the same way; what one does not finish has no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError  # what pebble raises
import functools
import math
import multiprocessing
import traceback
from typing import Any, NamedTuple

import numpy as np
import pebble

from kr_jax.types import Task


def ends_with(completion: str, answer: str) -> bool:
  """True if the completion's last characters are the answer."""
  return completion.endswith(answer)


def last_characters(completion: str, answer: str) -> str | None:
  """What `ends_with` compares: as many of the last characters as the answer has; None: there is none."""
  return completion[max(0, len(completion) - len(answer)):] or None


Verifier = Callable[[str, str], bool | tuple[bool, float]]
VERIFIERS: dict[str, Verifier] = {'ends_with': ends_with}
# What a completion answers, by verifier; see above.
ANSWERS: dict[str, Callable[[str, str], str | None]] = {'ends_with': last_characters}


class Scores(NamedTuple):
  """The verdicts on R rollouts."""

  verdict_R: np.ndarray  # float32, 1.0 or 0.0
  reward_R: np.ndarray  # float32, the verdict unless the verifier said otherwise
  timeouts: int  # verdicts that did not come within the limit
  errors: int  # verdicts that raised or died


class Answers(NamedTuple):
  """What R rollouts answer."""

  answer_R: tuple[str | None, ...]  # None: no answer
  timeouts: int  # extractions that did not come within the limit
  errors: int  # extractions that raised or died


def _verdict(verifier: Verifier, completion: str, answer: str) -> tuple[bool, float]:
  outcome = verifier(completion, answer)
  verdict, reward = outcome if isinstance(outcome, tuple) else (outcome, bool(outcome))
  if not math.isfinite(reward):
    raise ValueError(f'the reward of {completion!r} is {reward}; rewards must be finite')
  return bool(verdict), float(reward)


def _answer(extract: Callable[[str, str], str | None], completion: str, answer: str) -> str | None:
  extracted = extract(completion, answer)
  if not isinstance(extracted, (str, type(None))):
    raise TypeError(f'the answer of {completion!r} is {extracted!r}; answers must be text or None')
  return extracted


def _apply(function: Callable[[str, str], Any], pairs: Sequence[tuple[str, str]]
           ) -> list[tuple[Any] | str]:
  """(value,) of each; where the function raised, the traceback: an exception might not survive the
  way."""
  outcomes = []
  for completion, answer in pairs:
    try:
      outcomes.append((function(completion, answer),))
    except BaseException:  # SystemExit too: it must not end the run
      outcomes.append(traceback.format_exc())
  return outcomes


def check(*, verifier: str | Verifier, workers: int, timeout_s: float) -> None:
  """Raises ValueError for a knob out of its range."""
  if isinstance(verifier, str) and verifier not in VERIFIERS:
    raise ValueError(f'rewards.verifier={verifier!r} is not one of {sorted(VERIFIERS)}')
  if workers < 1:
    raise ValueError(f'rewards.workers={workers} is below 1')
  if not timeout_s > 0:
    raise ValueError(f'rewards.timeout_s={timeout_s} must be above 0')


class Workers:
  """A pool of verifier processes; close it, or use it as a context.

  Args:
    verifier: a name in VERIFIERS, or one of your own that can be pickled.
    workers: processes.
    timeout_s: seconds one verdict may take.
  """

  def __init__(self, verifier: str | Verifier, *, workers: int, timeout_s: float):
    check(verifier=verifier, workers=workers, timeout_s=timeout_s)
    self._extract = ANSWERS.get(verifier) if isinstance(verifier, str) else None
    if isinstance(verifier, str):
      verifier = VERIFIERS[verifier]
    self._verifier, self._workers, self._timeout_s = verifier, workers, timeout_s
    self._start()

  def __enter__(self) -> Workers:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _start(self) -> None:
    # Spawned: a fork of a process with JAX's threads may deadlock.
    self._pool = pebble.ProcessPool(self._workers, context=multiprocessing.get_context('spawn'))

  def close(self) -> None:
    self._pool.stop()
    self._pool.join()

  def _run(self, function: Callable[[str, str], Any], jobs: Sequence[Sequence[tuple[str, str]]]
           ) -> list[list[tuple[Any] | str] | Exception]:
    """Each job's outcomes, or what ended it: TimeoutError, or the death of its process."""
    results = [RuntimeError('the pool of verifiers broke')] * len(jobs)
    left = range(len(jobs))
    for _ in range(3):
      futures = {}
      for i in left:
        try:
          futures[i] = self._pool.schedule(
              _apply, args=(function, jobs[i]), timeout=self._timeout_s)
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

  def _map(self, function: Callable[[str, str], Any], name: str, completion_R: Sequence[str],
           task_R: Sequence[Task]) -> tuple[list[Any], int, int]:
    """The function's value on each (completion, answer), None where it has none; timeouts; errors.

    Equal pairs share one value. Raises RuntimeError if the function, called name, failed on every pair.
    """
    key_R = [(c, t.answer) for c, t in zip(completion_R, task_R, strict=True)]
    pairs = list(dict.fromkeys(key_R))
    size = -(-len(pairs) // (8 * self._workers)) or 1
    chunks = [pairs[i:i + size] for i in range(0, len(pairs), size)]
    outcome = {}
    for chunk, result in zip(chunks, self._run(function, chunks)):
      if isinstance(result, list):
        outcome.update(zip(chunk, result))
    # A chunk that did not end: its pairs alone, so that only the bad one loses its value.
    alone = [pair for pair in pairs if pair not in outcome]
    for pair, result in zip(alone, self._run(function, [[pair] for pair in alone])):
      outcome[pair] = result[0] if isinstance(result, list) else result
    errors = {pair: x for pair, x in outcome.items()
              if not isinstance(x, (tuple, TimeoutError))}
    if pairs and len(errors) == len(pairs):
      raise RuntimeError(f'the {name} failed on all {len(pairs)} completions of the step; on '
                         f'{pairs[-1]}: {errors[pairs[-1]]}')
    return ([x[0] if isinstance(x, tuple) else None for x in map(outcome.get, key_R)],
            sum(isinstance(outcome[key], TimeoutError) for key in key_R),
            sum(key in errors for key in key_R))

  def score(self, completion_R: Sequence[str], task_R: Sequence[Task]) -> Scores:
    """Scores R completions, each against its task; equal pairs share one verdict.

    Raises:
      RuntimeError: the verifier raised on every pair.
    """
    scored_R, timeouts, errors = self._map(
        functools.partial(_verdict, self._verifier), 'verifier', completion_R, task_R)
    scored_R = [(False, 0.0) if scored is None else scored for scored in scored_R]
    return Scores(np.array([verdict for verdict, _ in scored_R], np.float32),
                  np.array([reward for _, reward in scored_R], np.float32), timeouts, errors)

  def answers(self, completion_R: Sequence[str], task_R: Sequence[Task]) -> Answers:
    """What R completions answer, by the extraction that the verifier has in ANSWERS.

    Raises:
      ValueError: it has none.
      RuntimeError: the extraction raised on every pair.
    """
    if self._extract is None:
      raise ValueError('the verifier has no extraction of answers; see rewards.ANSWERS')
    answer_R, timeouts, errors = self._map(
        functools.partial(_answer, self._extract), 'extraction of answers', completion_R, task_R)
    return Answers(tuple(answer_R), timeouts, errors)
