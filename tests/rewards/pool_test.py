"""The pool itself: processes that do not start, servers that end, and callers that go away."""

import functools
import itertools
import pickle

import pytest

from kr_jax import types
from kr_jax.rewards import pool as pool_lib
from kr_jax.rewards import verdicts
from kr_jax.rewards import verifiers
from kr_jax.rewards import worker
from tests import knobs
from tests.rewards import hostile

TASKS = [types.Task(id=f'made/{i}', index=i, prompt='', answer=f'{i}', difficulty=1, solution='', tokens=(2,))
         for i in range(3)]
NUMBERS = itertools.count()


def pool_of(*, modules=(), count=2, memory_mb=512) -> pool_lib.Pool:
  function = functools.partial(verifiers.verify, hostile.hostile, knobs.verifiers('ends_with'))
  setup = worker.Setup(tuple(modules), (), (((worker.VERIFY, 'it'), pickle.dumps(function)),), memory_mb, (), False)
  return pool_lib.Pool(setup, count, timeout_s=1.0)


def requests(*completions: str, task: int = 1) -> list[worker.Request]:
  return [worker.Request(next(NUMBERS), 'ab', worker.VERIFY, 'it', completion, task) for completion in completions]


@pytest.fixture(scope='module')
def pool():
  pool = pool_of()
  yield pool
  pool.close()


def outcomes(pool, asked) -> list[int]:
  found = {request: reply.outcome for request, reply in pool.run(asked, TASKS)}
  assert len(found) == len(asked)
  return [found[request] for request in asked]


def test_replies_are_those_of_their_requests(pool):
  asked = [request for task in range(3) for request in requests(*'01201', task=task)]
  right = [request.completion == f'{request.task}' for request in asked]
  assert outcomes(pool, asked) == [verdicts.RIGHT if x else verdicts.WRONG for x in right]
  assert outcomes(pool, []) == []


def test_tasks_are_those_of_the_call(pool):
  assert outcomes(pool, requests('1')) == [verdicts.RIGHT]
  (request,) = requests('8')
  assert [reply.outcome for _, reply in pool.run([request], [TASKS[0], TASKS[1]._replace(answer='8')])] == [
      verdicts.RIGHT]


def test_large_messages(pool):
  """Larger than what a socket takes at once, to processes that are busy."""
  asked = requests('sleep', '1', *(f'{i}' * 10 ** 6 for i in range(1, 8)))
  assert outcomes(pool, asked) == [verdicts.TIMEOUT, verdicts.RIGHT] + [verdicts.WRONG] * 7


def test_a_caller_that_goes_away_leaves_nothing_behind(pool):
  replies = pool.run(requests(*'1234567'), TASKS)
  next(replies)
  replies.close()
  assert outcomes(pool, requests('1', '2')) == [verdicts.RIGHT, verdicts.WRONG]

  def source():
    yield from requests('1', '2', '3')
    raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    list(pool.run(source(), TASKS))
  assert outcomes(pool, requests('1', '2')) == [verdicts.RIGHT, verdicts.WRONG]


def test_few_requests_start_few_processes():
  pool = pool_of(count=8)
  assert outcomes(pool, requests('1')) == [verdicts.RIGHT] and len(pool._processes) == 1
  pool.close()
  assert not pool._processes


def test_processes_that_cannot_start_end_the_run(monkeypatch, tmp_path):
  """A module that ends its process when it is imported."""
  (tmp_path / 'ending.py').write_text('import os; os._exit(4)')
  monkeypatch.syspath_prepend(str(tmp_path))
  pool = pool_of(modules=['ending'], count=1)
  with pytest.raises(RuntimeError, match='the process that imports the verifiers ended with 4'):
    pool.check()
  with pytest.raises(RuntimeError, match='do not start: the process that imports the verifiers ended with 4'):
    outcomes(pool, requests('1'))
  pool.close()


def test_workers_that_cannot_start_end_the_run(monkeypatch):
  """What a process says before it ends is in the error."""
  monkeypatch.setattr(pool_lib, '_STARTS', 2)
  pool = pool_of(memory_mb='none', count=1)
  with pytest.raises(RuntimeError, match="do not start: .*its process ended with exit status 1"):
    outcomes(pool, requests('1'))
  pool.close()
