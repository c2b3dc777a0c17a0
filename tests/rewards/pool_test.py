"""The pool itself: processes that do not start, servers that end, and callers that go away."""

import contextlib
import functools
import itertools
import logging
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time
import types as python_types

import pytest

from kr_jax import scratch
from kr_jax import types
from kr_jax.rewards import pool as pool_lib
from kr_jax.rewards import verdicts
from kr_jax.rewards import verifiers
from kr_jax.rewards import walls
from kr_jax.rewards import worker
from tests import knobs
from tests.rewards import hostile
from tests.rewards import sleepers

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


RUN = """
import sys, tempfile, threading
tempfile.tempdir = sys.argv[1]
from kr_jax import types
from kr_jax.rewards import worker, workers
from tests import knobs
worker.PROGRAM = {patch!r} + worker.PROGRAM
task = types.Task(id='a', index=0, prompt='', answer='7', difficulty=1, solution='', tokens=())

def score():
  made = workers.Workers(knobs.verifiers('tests.rewards.hostile:executing', timeout_s=60.0))
  print(made._pool._folder, flush=True)
  made.score(["import subprocess; subprocess.Popen(['sleep', '{sleep}'], start_new_session=True)\\nwhile True: pass"],
             [task])

threading.Thread(target=score).start()
"""
NO_NAMESPACES = """from kr_jax.rewards import isolation
def fails(*_): raise OSError
isolation._make_namespaces = fails
"""


def living() -> dict[int, int]:
  """The parents of the processes that are not dead."""
  found = {}
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError):  # it ended
      state, parent = path.read_text().rpartition(')')[2].split()[:2]
      if state != 'Z':
        found[int(path.parent.name)] = int(parent)
  return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere no kernel ends them')
@pytest.mark.parametrize('stops, patch', [
    (True, ''), pytest.param(False, '', marks=pytest.mark.exhaustive),
    pytest.param(False, NO_NAMESPACES, marks=pytest.mark.exhaustive)])
def test_nothing_is_left_of_a_run_that_is_killed(tmp_path, stops, patch):
  """Neither a verdict in a loop, nor what it started, nor processes that are stopped. The next start removes the
  folder."""
  sleep = 10 ** 6 + os.getpid()
  with subprocess.Popen([sys.executable, '-c', RUN.format(patch=patch, sleep=sleep), str(tmp_path)], text=True,
                        stdout=subprocess.PIPE, cwd=pathlib.Path(__file__).parents[2]) as run:
    folder, until = run.stdout.readline().strip(), time.monotonic() + 60
    while time.monotonic() < until and not sleepers.sleepers(sleep):
      time.sleep(0.05)
    assert scratch.sweep(directory=str(tmp_path)) == []
    parents, below = living(), [run.pid]
    for pid in below:
      below += [child for child, parent in parents.items() if parent == pid]
    assert len(below) >= 5  # the server, a keeper, a worker, sleep
    for pid in below[1:] if stops else ():
      os.kill(pid, signal.SIGSTOP)
    run.kill()
  until = time.monotonic() + 2
  while (left := living().keys() & below) and time.monotonic() < until:
    time.sleep(0.01)
  assert not left and not sleepers.sleepers(sleep)
  assert os.path.exists(folder) and scratch.sweep(walls.remove, str(tmp_path)) == [folder]
  assert not os.path.exists(folder)


WITHOUT_FILES = """
import os
os.closerange(0, 3)
from kr_jax.rewards import pool
from tests.rewards import pool_test
found = pool_test.outcomes(pool_test.pool_of(count=1, timeout_s=30.0), pool_test.requests('1', '2'))
os._exit(0 if found == [pool_test.verdicts.RIGHT, pool_test.verdicts.WRONG] else 1)
"""


@pytest.mark.exhaustive
def test_a_run_without_stdin_stdout_and_stderr():
  assert subprocess.run([sys.executable, '-c', WITHOUT_FILES], cwd=pathlib.Path(__file__).parents[2], timeout=60
                        ).returncode == 0


@pytest.mark.slow
def test_signals_of_the_run_are_not_for_verifiers():
  """Each process gets them, in a verdict and before: none ends, and no verdict is lost or taken twice from a start."""
  pool = pool_of(count=1, timeout_s=30.0)
  assert outcomes(pool, requests('1')) == [verdicts.RIGHT]
  parents, below = living(), [pool._server.pid]
  for pid in below:
    below += [child for child, parent in parents.items() if parent == pid]
  assert len(below) == 3
  for pid, number in itertools.product(below, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
    os.kill(pid, number)
  assert outcomes(pool, requests('1', '2')) == [verdicts.RIGHT, verdicts.WRONG]
  assert living().keys() >= set(below)
  pool.close()


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
