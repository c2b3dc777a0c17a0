"""Verdicts from worker processes, whatever the completions do to the verifier."""

import multiprocessing

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from kr_jax import rewards
from kr_jax import types
from kr_jax.rewards import verifiers
from kr_jax.rewards import workers
from tests import knobs
from tests.rewards import hostile

LIMIT_S = 1.0
OWN = 'tests.rewards.hostile:reads_info'


def tasks(*answers: str, verifier: str = '', info: str = '') -> list[types.Task]:
  return [types.Task(id=f'made/{i}', index=i, prompt='', answer=answer, difficulty=1, solution='', tokens=(2,),
                     verifier=verifier, info=info) for i, answer in enumerate(answers)]


@pytest.fixture(scope='module')
def pool():
  """Two processes for all tests that do not change the config."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ('hostile', 'noting', 'shaping'):
      patch.setitem(rewards.VERIFIERS, name, getattr(hostile, name))
    patch.setitem(rewards.VERIFIERS, 'not found', lambda completion, task: True)
    patch.setitem(rewards.ANSWERS, 'hostile', hostile.hostile_answer)
    names = ['hostile', 'noting', 'shaping', 'not found', 'choice', OWN]
    config = knobs.verifiers('ends_with', workers=2, timeout_s=LIMIT_S, format='^<t>|^(o+)+$', format_weight=0.25,
                             length_buffer=4)
    with rewards.Workers(config, verifiers=names, completion_length=10) as workers:
      yield workers


def score(pool: rewards.Workers, *completions: str, verifier: str = 'hostile') -> tuple[list[float], int, int]:
  """Verdicts on completions of tasks whose answer is '7'."""
  scores = pool.score(completions, tasks(*'7' * len(completions), verifier=verifier))
  assert scores.reward_R.dtype == scores.verdict_R.dtype == np.float32
  np.testing.assert_array_equal(scores.reward_R, scores.verdict_R)
  return scores.reward_R.tolist(), scores.timeouts, scores.errors


@given(st.lists(st.tuples(st.text('67', max_size=3), st.sampled_from('67')), max_size=40))
def test_verdicts_are_those_of_the_verifier(pool, pairs):
  scores = pool.score([c for c, _ in pairs], tasks(*[a for _, a in pairs], verifier='hostile'))
  assert scores.reward_R.tolist() == scores.verdict_R.tolist() == [c == a for c, a in pairs]
  assert scores.verdict_R.shape == (len(pairs),) and (scores.timeouts, scores.errors) == (0, 0)


def test_tasks_name_their_verifiers(pool):
  one, two, three = tasks('7', 'B', '7')
  two, three = two._replace(verifier='choice'), three._replace(verifier=OWN, info='8')
  assert pool.score(['17', '(B)', '8'], [one, two, three]).verdict_R.tolist() == [1, 1, 1]
  assert pool.score(['(B)', '17', '7'], [one, two, three]).verdict_R.tolist() == [0, 0, 0]
  assert pool.answers(['17', 'b.'], [one, two]).answer_R == ('7', 'B')
  with pytest.raises(ValueError, match='reads_info.* no extraction of answers; see rewards.ANSWERS'):
    pool.answers(['B', '8'], [two, three])
  with pytest.raises(ValueError, match="'reasoning_gym' of a task is not among the verifiers"):
    pool.score(['7'], [one._replace(verifier='reasoning_gym')])


def test_as_many_completions_as_tasks(pool):
  for completions, answers in ((['7'], []), (['7'], ['7', '7'])):
    with pytest.raises(ValueError):
      pool.score(completions, tasks(*answers))


def test_equal_completions_of_a_task_are_verified_once(pool, tmp_path):
  first, second = tasks(str(tmp_path / 'one'), str(tmp_path / 'two'), verifier='noting')
  scores = pool.score(['b', 'a', 'b', 'c', 'b', 'a'], [first, first, first, first, second, first])
  assert scores.reward_R.tolist() == [1] * 6
  assert sorted((tmp_path / 'one').read_text().split()) == ['a', 'b', 'c']
  assert (tmp_path / 'two').read_text().split() == ['b']


def test_a_verifier_may_set_the_reward_beside_its_verdict(pool):
  scores = pool.score(['7', '8', 'nan', '77', ''], tasks(*'77777', verifier='shaping'))
  assert scores.verdict_R.tolist() == [1, 0, 0, 1, 0]
  assert scores.reward_R.tolist() == [-0.25, -0.25, 0, -0.5, 0]
  assert (scores.timeouts, scores.errors) == (0, 1)  # a reward must be finite


def test_shaping_changes_rewards_and_no_verdict(pool):
  """C = 10, the last 4 tokens are the buffer."""
  completions, sevens = ['<t>7', '7', '<t>7', '8'], tasks('<t>7', '7', '8', '7', verifier='hostile')
  scores = pool.score(completions, sevens, np.array([10, 8, 9, 6]))
  assert scores.verdict_R.tolist() == [1, 1, 0, 0]
  assert scores.reward_R.tolist() == [0.25, 0.5, -0.5, 0]
  assert pool.score(completions, sevens).reward_R.tolist() == [1.25, 1, 0.25, 0]


def test_what_fails_scores_0_and_its_neighbours_keep_their_verdicts(pool):
  bad = ['raise', 'local', 'exit', 'interrupt', 'two', 'timeout', 'memory']
  try:
    assert score(pool, '7', *bad, '8', *bad, '7') == ([1] + [0] * 15 + [1], 0, 14)
    assert score(pool, '8', '7') == ([0, 1], 0, 0)
  except (SystemExit, KeyboardInterrupt) as error:  # these would end the test run
    pytest.fail(f'{error!r} of the verifier came out of score')


def test_what_fails_has_no_answer_and_its_neighbours_keep_theirs(pool):
  found = pool.answers(['8', 'raise', 'none', '9', 'seven', 'raise'], tasks(*'777777', verifier='hostile'))
  assert found.answer_R == ('8', None, None, '9', None, None)
  assert (found.timeouts, found.errors) == (0, 3)
  assert pool.answers([], []) == ((), 0, 0)


@pytest.mark.slow
def test_what_hangs_or_dies_scores_0_and_its_neighbours_keep_their_verdicts(pool):
  """There are more completions than chunks, so that good ones share a chunk with bad ones."""
  many, bad = [*map(str, range(40))], ['sleep', 'loop', 'die', 'o' * 50 + '!']
  scores, timeouts, errors = score(pool, *many[:20], *bad, *many[20:])
  assert [i for i, x in enumerate(scores) if x] == [7]
  assert (timeouts, errors) == (3, 1)
  found = pool.answers([*many, 'sleep'], tasks(*['-'] * 41, verifier='hostile'))
  assert found == ((*(x[0] for x in many), None), 1, 0)


@pytest.mark.slow
def test_processes_that_die_on_everything_do_not_stop_the_step(pool):
  """The completions may be why, other than where a verifier raises."""
  assert score(pool, 'die 1', 'die at once 2') == ([0, 0], 0, 2)


def test_a_verifier_that_fails_on_everything_fails_the_step(pool):
  with pytest.raises(RuntimeError, match="verifier of 'hostile' failed on all 4 completions .* 'raise 3' to made/3"):
    score(pool, 'raise 1', 'raise 2', 'raise 1', 'raise 3')
  assert score(pool, '7', 'raise 1') == ([1, 0], 0, 1)  # on some: a verdict
  with pytest.raises(RuntimeError, match="answers of 'hostile' failed on all 2 completions"):
    pool.answers(['raise', 'seven'], tasks(*'77', verifier='hostile'))
  # Whatever the other verifiers do.
  with pytest.raises(RuntimeError, match="verifier of 'choice' failed on all 1 completions .* made/0"):
    pool.score(['7', 'B'], [*tasks('7'), *tasks('none', verifier='choice')])
  with pytest.raises(RuntimeError, match="'not found' failed on all 1 completions"):
    score(pool, '7', verifier='not found')


def test_a_pool_that_breaks_is_made_again():
  """As pebble's pool does where a process dies that runs nothing."""
  before = set(multiprocessing.active_children())
  with rewards.Workers(knobs.verifiers(hostile.hostile)) as pool:
    for _ in range(2):
      assert score(pool, '7', '8', '9', verifier='') == ([1, 0, 0], 0, 0)
      for process in set(multiprocessing.active_children()) - before:
        process.kill()
        process.join()
    assert score(pool, '8', '7', verifier='') == ([0, 1], 0, 0)


def test_close_ends_the_processes():
  before = set(multiprocessing.active_children())
  with rewards.Workers(knobs.verifiers('ends_with', workers=2)) as pool:
    score(pool, '17', '8', verifier='ends_with')
    assert len(set(multiprocessing.active_children()) - before) == 2
  assert set(multiprocessing.active_children()) <= before


def test_scores_are_rewards_only_where_they_are_asked_for(monkeypatch):
  monkeypatch.setitem(verifiers.PARTIAL_CREDIT, 'ends_with', hostile.share)
  for partial_credit, rewards_R in ((False, [1, 0]), (True, [0, 0.5])):
    with rewards.Workers(knobs.verifiers('ends_with', partial_credit=partial_credit)) as pool:
      scores = pool.score(['7', '44'], tasks(*'77'))
      assert scores.verdict_R.tolist() == [1, 0] and scores.reward_R.tolist() == rewards_R


def test_a_function_of_the_user_is_checked_at_the_start():
  before = set(multiprocessing.active_children())
  with pytest.raises(ValueError, match='missing.* cannot be imported: AttributeError'):
    rewards.Workers(knobs.verifiers('ends_with'), verifiers=['tests.rewards.hostile:missing'])
  assert set(multiprocessing.active_children()) <= before
  with pytest.raises(ValueError, match='length_buffer=11 is not in 0..sample.completion_length=10'):
    rewards.Workers(knobs.verifiers('ends_with', length_buffer=11), completion_length=10)


def test_overlong_by_hand():
  """C = 100, buffer 20."""
  np.testing.assert_allclose(
      workers.overlong(np.array([0, 79, 80, 81, 90, 99, 100]), 100, 20),
      [0, 0, 0, -0.05, -0.5, -0.95, -1], rtol=1e-6)
  assert workers.overlong(np.array([1, 100]), 100, 0).tolist() == [0, 0]
  assert workers.overlong(np.array([], int), 100, 20).shape == (0,)
