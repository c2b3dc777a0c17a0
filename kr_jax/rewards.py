"""Completion text -> reward: 1.0 where the verifier says yes, else 0.0, in worker processes.

A verifier runs on text that a policy wrote, so it may hang, raise or die. It runs in processes that
are killed at the time limit and started again; what it did not finish scores 0.0 and is counted. A
verifier that raises on everything is a bug, not a verdict: then the step fails with its error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError  # what pebble raises
import multiprocessing
from typing import NamedTuple

import numpy as np
import pebble

from kr_jax.types import Task


def ends_with(completion: str, answer: str) -> bool:
  """True if the completion's last characters are the answer."""
  return completion.endswith(answer)


VERIFIERS: dict[str, Callable[[str, str], bool]] = {'ends_with': ends_with}


class Scores(NamedTuple):
  """The verdicts on R rollouts."""

  reward_R: np.ndarray  # float32, 1.0 or 0.0
  timeouts: int  # verdicts that did not come within the limit
  errors: int  # verdicts that raised or died


def _verify(verifier: Callable[[str, str], bool], pairs: Sequence[tuple[str, str]]) -> list[bool]:
  return [bool(verifier(completion, answer)) for completion, answer in pairs]


def check(*, verifier: str, workers: int, timeout_s: float) -> None:
  """Raises ValueError for a knob out of its range."""
  if verifier not in VERIFIERS:
    raise ValueError(f'rewards.verifier={verifier!r} is not one of {sorted(VERIFIERS)}')
  if workers < 1:
    raise ValueError(f'rewards.workers={workers} is below 1')
  if not timeout_s > 0:
    raise ValueError(f'rewards.timeout_s={timeout_s} must be above 0')


class Workers:
  """A pool of verifier processes; close it, or use it as a context.

  Args:
    verifier: a name in VERIFIERS, or a picklable (completion, answer) -> bool.
    workers: processes.
    timeout_s: seconds one verdict may take.
  """

  def __init__(self, verifier: str | Callable[[str, str], bool], *, workers: int, timeout_s: float):
    if isinstance(verifier, str):
      check(verifier=verifier, workers=workers, timeout_s=timeout_s)
      verifier = VERIFIERS[verifier]
    self._verifier = verifier
    self._workers, self._timeout_s = workers, timeout_s
    # Spawned: a fork of a process with JAX's threads may deadlock.
    self._pool = pebble.ProcessPool(workers, context=multiprocessing.get_context('spawn'))

  def __enter__(self) -> Workers:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    self._pool.stop()
    self._pool.join()

  def _send(self, pairs):
    return self._pool.schedule(_verify, args=(self._verifier, pairs), timeout=self._timeout_s)

  def score(self, completion_R: Sequence[str], task_R: Sequence[Task]) -> Scores:
    """Scores R completions, each against its task. Equal pairs are verified once.

    Raises:
      RuntimeError: the verifier raised on every pair.
    """
    pairs = list(dict.fromkeys((c, t.answer) for c, t in zip(completion_R, task_R, strict=True)))
    verdict, timeouts, errors = {}, set(), {}
    size = max(1, -(-len(pairs) // self._workers))
    chunks = [pairs[i:i + size] for i in range(0, len(pairs), size)]
    futures = [self._send(chunk) for chunk in chunks]
    alone = []
    for chunk, future in zip(chunks, futures):
      try:
        verdict.update(zip(chunk, future.result()))
      except Exception:  # one bad pair: find it, so that its neighbours keep their verdicts
        alone += chunk
    futures = [self._send([pair]) for pair in alone]
    for pair, future in zip(alone, futures):
      try:
        verdict[pair], = future.result()
      except TimeoutError:
        timeouts.add(pair)
      except Exception as error:
        errors[pair] = error
    if pairs and len(errors) == len(pairs):
      raise RuntimeError(f'the verifier failed on all {len(pairs)} completions of the step; the '
                         'last error is above') from errors[pairs[-1]]
    key_R = [(c, t.answer) for c, t in zip(completion_R, task_R)]
    return Scores(np.array([verdict.get(k, False) for k in key_R], np.float32),
                  sum(k in timeouts for k in key_R), sum(k in errors for k in key_R))
