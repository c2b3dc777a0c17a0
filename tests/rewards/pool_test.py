"""The pool itself: processes that do not start, servers that end, and callers that go away."""

import functools
import itertools
import logging
import os
import pathlib
import pickle
import subprocess
import sys
import time
import types as python_types

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
MANY = [TASKS[0]._replace(index=i, answer='7') for i in range(60)]
NUMBERS = itertools.count()


def pool_of(*, modules=(), count=2, memory_mb=512, timeout_s=1.0) -> pool_lib.Pool:
  function = functools.partial(verifiers.verify, hostile.hostile, knobs.verifiers('ends_with'))
  setup = worker.Setup(tuple(modules), (), (((worker.VERIFY, 'it'), pickle.dumps(function)),), memory_mb, (), False)
  return pool_lib.Pool(setup, count, timeout_s)


def requests(*completions: str, task: int = 1) -> list[worker.Request]:
  return [worker.Request(next(NUMBERS), 'ab', worker.VERIFY, 'it', completion, task) for completion in completions]


@pytest.fixture(scope='module')
def pool():
  pool = pool_of(timeout_s=0.5)
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


@pytest.fixture
def impatient(monkeypatch):
  """A pool whose verifiers may lose four timeouts, two of them of the same task."""
  monkeypatch.setattr(pool_lib, '_MOST_LOST', 2)
  monkeypatch.setattr(pool_lib, '_MOST_LOST_EACH', 1)
  pool = pool_of(timeout_s=0.1)
  yield pool
  pool.close()


def test_a_verifier_that_hangs_on_everything_takes_few_timeouts(impatient):
  for _ in range(2):  # each call begins anew
    asked = [request for task in range(len(MANY)) for request in requests('sleep', task=task)]
    found = [reply for _, reply in impatient.run(asked, MANY)]
    assert [reply.outcome for reply in found] == [verdicts.TIMEOUT] * len(MANY)
    tried = sum(reply.note == 'none in 0.1 s' for reply in found)
    assert 4 <= tried <= 8 and {reply.note for reply in found[tried:]} == {
        'not tried: the verifier gave nothing on others'}


def test_a_task_that_hangs_does_not_stand_for_the_verifier(impatient):
  """Its own completions are put off, and tried when there was a verdict on another."""
  asked = [*requests(*['sleep'] * 6, task=0), *requests('7', '8', task=1)]
  found = dict(impatient.run(asked, MANY))
  assert {found[request].note for request in asked[:6]} == {'none in 0.1 s'}
  assert [found[request].outcome for request in asked[6:]] == [verdicts.RIGHT, verdicts.WRONG]


def test_what_fails_at_once_is_tried_throughout(impatient):
  asked = [request for task in range(len(MANY)) for request in requests('raise', task=task)]
  assert {reply.outcome for _, reply in impatient.run(asked, MANY)} == {verdicts.RAISED}


def test_few_requests_start_few_processes():
  pool = pool_of(count=8)
  assert outcomes(pool, requests('1')) == [verdicts.RIGHT] and len(pool._processes) == 1
  pool.close()
  assert not pool._processes
  pool.close()
  with pytest.raises(ValueError, match='were closed'):
    outcomes(pool, requests('1'))


def test_an_import_that_hangs_ends_the_start(monkeypatch, tmp_path):
  (tmp_path / 'hanging.py').write_text('import time; time.sleep(100)')
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setattr(pool_lib, '_START_S', 0.1)
  monkeypatch.setattr(pool_lib, '_END_S', 0.1)
  pool = pool_of(modules=['hanging'])
  with pytest.raises(RuntimeError, match=r"import of the modules \('hanging',\) took more than 0.1 s"):
    pool.check()
  pool.close()
  assert pool._server.poll() is not None


def test_nothing_is_left_of_a_run_that_is_killed():
  """Not its processes, nor its folder."""
  code = """
import time
from kr_jax.rewards import pool, worker
pool = pool.Pool(worker.Setup((), (), (), 64, (), False), 2, 1.0)
process = pool._start()
while not process.is_ready:
  list(pool._serve(False))
print(pool._server.pid, pool._folder, flush=True)
time.sleep(100)
"""
  with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True,
                        cwd=pathlib.Path(__file__).parents[2]) as run:
    server, folder = run.stdout.readline().split()
    run.kill()
  left = lambda: os.path.exists(folder) or pathlib.Path(f'/proc/{server}/cmdline').exists() and pathlib.Path(
      f'/proc/{server}/cmdline').read_bytes()  # of a zombie it is empty
  until = time.monotonic() + 10
  while left() and time.monotonic() < until:
    time.sleep(0.01)
  assert not left()


def test_walls_that_are_missing_are_a_warning(caplog):
  pool = pool_of(count=1)
  with caplog.at_level(logging.INFO, 'absl'):
    pool._make_ready(python_types.SimpleNamespace(), b'["memory", "network"]')
  pool.close()
  (record,) = caplog.records
  assert record.levelname == 'WARNING' and 'not behind: processes, descendants' in record.getMessage()


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
