"""Verdicts from worker processes, whatever the completions do to the verifier.

The verifiers stand at module level: worker processes import this file to find them.
"""

import multiprocessing
import os
import sys
import time

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from kr_jax import rewards
from kr_jax import types

LONG_S = 60.0  # where no verdict is meant to time out


class TwoArguments(Exception):
  """Pickles, but does not unpickle: BaseException.__reduce__ knows one argument."""

  def __init__(self, one, two):
    del two
    super().__init__(one)


def hostile(completion: str, answer: str) -> bool:
  """Does what the completion says, else compares."""
  if completion.startswith('sleep'):
    time.sleep(1e6)
  while completion.startswith('loop'):
    pass
  if completion.startswith('die'):
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
      """Does not pickle."""
    raise Local(completion)
  if completion.startswith('two'):
    raise TwoArguments(1, 2)
  if completion.startswith('timeout'):
    raise TimeoutError(completion)
  return completion == answer


def hostile_answer(completion: str, answer: str) -> str | None:
  """Does what the completion says, else returns its first character; 'none' has no answer."""
  if completion == 'seven':
    return 7
  return None if completion == 'none' or hostile(completion, answer) else completion[0]


def noting(completion: str, answer: str) -> bool:
  """Appends the completion to the file that the answer names."""
  with open(answer, 'a') as file:
    file.write(f'{completion}\n')
  return True


def shaping(completion: str, answer: str) -> tuple[bool, float]:
  """Right or not, and a reward that falls with the length; 'nan' has a reward that is none."""
  return completion.endswith(answer), float('nan') if completion == 'nan' else -len(completion) / 4


def tasks(*answers: str) -> list[types.Task]:
  return [types.Task(id=f'made/{i}', index=i, prompt='', answer=answer, difficulty=1, solution='',
                     tokens=(2,)) for i, answer in enumerate(answers)]


def score(workers: rewards.Workers, *completions: str) -> tuple[list[float], int, int]:
  """Verdicts on completions of tasks whose answer is '7'."""
  scores = workers.score(completions, tasks(*['7'] * len(completions)))
  assert scores.reward_R.dtype == scores.verdict_R.dtype == np.float32
  np.testing.assert_array_equal(scores.reward_R, scores.verdict_R)
  return scores.reward_R.tolist(), scores.timeouts, scores.errors


def test_ends_with():
  assert rewards.ends_with('031106', '06')
  assert rewards.ends_with('06', '06')
  assert not rewards.ends_with('0311060', '06')
  assert not rewards.ends_with('6', '06')
  assert not rewards.ends_with('', '06')


def test_last_characters():
  assert rewards.last_characters('031106', '06') == '06'
  assert rewards.last_characters('031106', '7') == '6'
  assert rewards.last_characters('6', '06') == '6'
  assert rewards.last_characters('', '06') is None


def test_completions_that_end_with_one_answer_agree():
  """A verifier and its extraction must not contradict each other."""
  for name in rewards.ANSWERS:
    verifier, extract = rewards.VERIFIERS[name], rewards.ANSWERS[name]
    texts = ['', '6', '06', '106', '0306', '60', '6 ']
    right = [t for t in texts if verifier(t, '06')]
    assert right == [t for t in texts if extract(t, '06') == '06'] and right


@pytest.mark.parametrize('workers', [1, 3])
def test_verdicts_are_those_of_the_verifier(workers):
  with rewards.Workers('ends_with', workers=workers, timeout_s=LONG_S) as pool:
    scores = pool.score(['0306', '06', '60', ''], tasks('06', '03', '60', '1'))
    assert scores.reward_R.tolist() == [1, 0, 1, 0]
    assert (scores.timeouts, scores.errors) == (0, 0)
    assert score(pool) == ([], 0, 0)

    @settings(deadline=None, max_examples=10)
    @given(st.lists(st.tuples(st.text('67', max_size=3), st.text('67', max_size=2)), max_size=20))
    def same(pairs):
      scores = pool.score([c for c, _ in pairs], tasks(*[a for _, a in pairs]))
      assert scores.reward_R.tolist() == [c.endswith(a) for c, a in pairs]

    same()


def test_a_verifier_may_set_the_reward_beside_its_verdict():
  with rewards.Workers(shaping, workers=1, timeout_s=LONG_S) as pool:
    scores = pool.score(['7', '8', 'nan', '77', ''], tasks(*'77777'))
  assert scores.verdict_R.tolist() == [1, 0, 0, 1, 0]
  assert scores.reward_R.tolist() == [-0.25, -0.25, 0, -0.5, 0]
  assert (scores.timeouts, scores.errors) == (0, 1)  # a reward must be finite


def test_equal_pairs_are_verified_once(tmp_path):
  one, two = str(tmp_path / 'one'), str(tmp_path / 'two')
  with rewards.Workers(noting, workers=2, timeout_s=LONG_S) as pool:
    scores = pool.score(['b', 'a', 'b', 'c', 'b', 'a'], tasks(one, one, one, one, two, one))
  assert scores.reward_R.tolist() == [1] * 6
  assert sorted((tmp_path / 'one').read_text().split()) == ['a', 'b', 'c']
  assert (tmp_path / 'two').read_text().split() == ['b']


def test_what_hangs_scores_0_and_its_neighbours_keep_their_verdicts():
  with rewards.Workers(hostile, workers=2, timeout_s=1.5) as pool:
    assert score(pool, '7', 'sleep', '8', 'loop', 'sleep', '7') == ([1, 0, 0, 0, 0, 1], 3, 0)
    assert score(pool, '8', '7') == ([0, 1], 0, 0)


@pytest.mark.parametrize('bad', [
    'raise', 'die', 'local', 'exit', 'interrupt', 'two', 'timeout'])
def test_what_fails_scores_0_and_its_neighbours_keep_their_verdicts(bad):
  with rewards.Workers(hostile, workers=1, timeout_s=LONG_S) as pool:
    try:
      assert score(pool, '7', bad, '8', bad, '7') == ([1, 0, 0, 0, 1], 0, 2)
      assert score(pool, '8', '7') == ([0, 1], 0, 0)
    except (SystemExit, KeyboardInterrupt) as error:  # these would end the test run
      pytest.fail(f'{error!r} of the verifier came out of score')


@pytest.mark.parametrize('bad', ['raise', 'die', 'seven', pytest.param('sleep', marks=pytest.mark.slow)])
def test_what_fails_has_no_answer_and_its_neighbours_keep_theirs(bad, monkeypatch):
  monkeypatch.setitem(rewards.VERIFIERS, 'hostile', hostile)
  monkeypatch.setitem(rewards.ANSWERS, 'hostile', hostile_answer)
  with rewards.Workers('hostile', workers=1, timeout_s=5.0 if bad == 'sleep' else LONG_S) as pool:
    found = pool.answers(['8', bad, 'none', '8', bad], tasks(*'77777'))
    assert found.answer_R == ('8', None, None, '8', None)
    assert (found.timeouts, found.errors) == ((2, 0) if bad == 'sleep' else (0, 2))
    assert pool.answers([], []) == ((), 0, 0)


def test_an_extraction_that_fails_on_everything_fails_the_step(monkeypatch):
  monkeypatch.setitem(rewards.VERIFIERS, 'hostile', hostile)
  monkeypatch.setitem(rewards.ANSWERS, 'hostile', hostile_answer)
  with rewards.Workers('hostile', workers=1, timeout_s=LONG_S) as pool:
    with pytest.raises(RuntimeError, match='the extraction of answers failed on all 2 completions'):
      pool.answers(['raise', 'seven'], tasks(*'77'))


def test_a_verifier_without_an_extraction_has_no_answers():
  with rewards.Workers(hostile, workers=1, timeout_s=LONG_S) as pool:
    with pytest.raises(ValueError, match='no extraction of answers; see rewards.ANSWERS'):
      pool.answers(['7'], tasks('7'))


def test_a_verifier_that_fails_on_everything_fails_the_step():
  with rewards.Workers(hostile, workers=2, timeout_s=LONG_S) as pool:
    with pytest.raises(RuntimeError, match='the verifier failed on all 3 completions') as error:
      score(pool, 'raise 1', 'raise 2', 'raise 1', 'raise 3')
    assert 'raise 3' in str(error.value)
    assert score(pool, '7', 'raise 1') == ([1, 0], 0, 1)  # on some: a verdict


def test_a_verifier_that_processes_cannot_find_fails_the_step():
  with rewards.Workers(lambda completion, answer: True, workers=1, timeout_s=LONG_S) as pool:
    with pytest.raises(RuntimeError, match='failed on all 1 completions'):
      score(pool, '7')


def test_close_ends_the_processes():
  before = set(multiprocessing.active_children())
  with rewards.Workers('ends_with', workers=2, timeout_s=LONG_S) as pool:
    score(pool, '7', '8')
    assert len(set(multiprocessing.active_children()) - before) == 2
  assert set(multiprocessing.active_children()) <= before


def test_as_many_completions_as_tasks():
  with rewards.Workers('ends_with', workers=1, timeout_s=LONG_S) as pool:
    for completions, answers in ((['7'], []), (['7'], ['7', '7'])):
      with pytest.raises(ValueError):
        pool.score(completions, tasks(*answers))


@pytest.mark.parametrize('arguments, message', [
    ({'verifier': 'begins_with'},
     r"rewards.verifier='begins_with' is not one of \[.*'ends_with'.*\]"),
    ({'workers': 0}, r'rewards.workers=0 is below 1'),
    ({'workers': -1}, r'rewards.workers=-1 is below 1'),
    ({'timeout_s': 0}, r'rewards.timeout_s=0 must be above 0'),
    ({'timeout_s': -1.5}, r'rewards.timeout_s=-1.5 must be above 0'),
    ({'timeout_s': float('nan')}, r'rewards.timeout_s=nan must be above 0'),
])
def test_bad_arguments(arguments, message):
  arguments = {'verifier': 'ends_with', 'workers': 1, 'timeout_s': 1.0} | arguments
  with pytest.raises(ValueError, match=message):
    rewards.check(**arguments)
  with pytest.raises(ValueError, match=message):
    rewards.Workers(**arguments)
