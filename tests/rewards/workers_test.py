"""Verdicts from worker processes, whatever the completions do to the verifier.

The verifiers stand at module level: worker processes import this file to find them.
"""

import importlib.util
import json
import multiprocessing
import os
import sys
import time

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from configs import common
from kr_jax import rewards
from kr_jax import types
from tests import knobs

LONG_S = 60.0  # where no verdict is meant to time out


class TwoArguments(Exception):
  """Pickles, but does not unpickle: BaseException.__reduce__ knows one argument."""

  def __init__(self, one, two):
    del two
    super().__init__(one)


def hostile(completion: str, task: types.Task) -> bool:
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
  if completion.startswith('memory'):
    bytearray(2 ** 31)
  if completion.startswith('two'):
    raise TwoArguments(1, 2)
  if completion.startswith('timeout'):
    raise TimeoutError(completion)
  return completion == task.answer


def hostile_answer(completion: str, task: types.Task) -> str | None:
  """Does what the completion says, else returns its first character; 'none' has no answer."""
  if completion == 'seven':
    return 7
  return None if completion == 'none' or hostile(completion, task) else completion[0]


def noting(completion: str, task: types.Task) -> bool:
  """Appends the completion to the file that the task's answer names."""
  with open(task.answer, 'a') as file:
    file.write(f'{completion}\n')
  return True


def shaping(completion: str, task: types.Task) -> tuple[bool, float]:
  """Right or not, and a reward that falls with the length; 'nan' has a reward that is none."""
  return completion.endswith(task.answer), float('nan') if completion == 'nan' else -len(completion) / 4


def tasks(*answers: str) -> list[types.Task]:
  return [types.Task(id=f'made/{i}', index=i, prompt='', answer=answer, difficulty=1, solution='',
                     tokens=(2,)) for i, answer in enumerate(answers)]


def config_of(**knobs) -> rewards.Config:
  return rewards.Config(**common.base().rewards.to_dict() | knobs)


def start(verifier, verifiers=(), completion_length=0, **knobs) -> rewards.Workers:
  return rewards.Workers(config_of(**{'verifier': verifier, 'workers': 1, 'timeout_s': LONG_S} | knobs),
                         verifiers=verifiers, completion_length=completion_length)


def score(workers: rewards.Workers, *completions: str) -> tuple[list[float], int, int]:
  """Verdicts on completions of tasks whose answer is '7'."""
  scores = workers.score(completions, tasks(*['7'] * len(completions)))
  assert scores.reward_R.dtype == scores.verdict_R.dtype == np.float32
  np.testing.assert_array_equal(scores.reward_R, scores.verdict_R)
  return scores.reward_R.tolist(), scores.timeouts, scores.errors


def test_a_verifier_without_its_package(monkeypatch):
  """Is refused before a run begins."""
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'reasoning_gym' else find(name))
  task = types.Task(id='t', index=0, prompt='', answer='', difficulty=0, solution='', tokens=(),
                    verifier='reasoning_gym')
  with pytest.raises(ValueError, match=r"the verifier of t='reasoning_gym' needs a package: .*kr_jax\[data\]"):
    rewards.names([task], knobs.verifiers('math'))
  assert rewards.names([task._replace(verifier='')], knobs.verifiers('math')) == ['math']


def test_ends_with():
  assert rewards.ends_with('031106', *tasks('06'))
  assert rewards.ends_with('06', *tasks('06'))
  assert not rewards.ends_with('0311060', *tasks('06'))
  assert not rewards.ends_with('6', *tasks('06'))
  assert not rewards.ends_with('', *tasks('06'))


def test_last_characters():
  assert rewards.last_characters('031106', *tasks('06')) == '06'
  assert rewards.last_characters('031106', *tasks('7')) == '6'
  assert rewards.last_characters('6', *tasks('06')) == '6'
  assert rewards.last_characters('', *tasks('06')) is None


def test_completions_that_end_with_one_answer_agree():
  """A verifier and its extraction must not contradict each other."""
  texts = ['', '6', '06', '106', '0306', '60', '6 ']
  right = [t for t in texts if rewards.ends_with(t, *tasks('06'))]
  assert right == [t for t in texts if rewards.last_characters(t, *tasks('06')) == '06'] and right


@pytest.mark.parametrize('workers', [1, 3])
def test_verdicts_are_those_of_the_verifier(workers):
  with start('ends_with', workers=workers, timeout_s=LONG_S) as pool:
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
  with start(shaping, workers=1, timeout_s=LONG_S) as pool:
    scores = pool.score(['7', '8', 'nan', '77', ''], tasks(*'77777'))
  assert scores.verdict_R.tolist() == [1, 0, 0, 1, 0]
  assert scores.reward_R.tolist() == [-0.25, -0.25, 0, -0.5, 0]
  assert (scores.timeouts, scores.errors) == (0, 1)  # a reward must be finite


def test_equal_completions_of_a_task_are_verified_once(tmp_path):
  one, two = str(tmp_path / 'one'), str(tmp_path / 'two')
  with start(noting, workers=2, timeout_s=LONG_S) as pool:
    first, second = tasks(one, two)
    scores = pool.score(['b', 'a', 'b', 'c', 'b', 'a'], [first, first, first, first, second, first])
  assert scores.reward_R.tolist() == [1] * 6
  assert sorted((tmp_path / 'one').read_text().split()) == ['a', 'b', 'c']
  assert (tmp_path / 'two').read_text().split() == ['b']


@pytest.mark.slow
def test_what_hangs_scores_0_and_its_neighbours_keep_their_verdicts():
  with start(hostile, workers=2, timeout_s=1.5) as pool:
    assert score(pool, '7', 'sleep', '8', 'loop', 'sleep', '7') == ([1, 0, 0, 0, 0, 1], 3, 0)
    assert score(pool, '8', '7') == ([0, 1], 0, 0)


@pytest.mark.parametrize('bad', [
    'raise', 'die', 'local', 'exit', 'interrupt', 'two', 'timeout', 'memory'])
def test_what_fails_scores_0_and_its_neighbours_keep_their_verdicts(bad):
  with start(hostile, workers=1, timeout_s=LONG_S) as pool:
    try:
      assert score(pool, '7', bad, '8', bad, '7') == ([1, 0, 0, 0, 1], 0, 2)
      assert score(pool, '8', '7') == ([0, 1], 0, 0)
    except (SystemExit, KeyboardInterrupt) as error:  # these would end the test run
      pytest.fail(f'{error!r} of the verifier came out of score')


@pytest.mark.parametrize('bad', ['raise', 'die', 'seven', pytest.param('sleep', marks=pytest.mark.slow)])
def test_what_fails_has_no_answer_and_its_neighbours_keep_theirs(bad, monkeypatch):
  monkeypatch.setitem(rewards.VERIFIERS, 'hostile', hostile)
  monkeypatch.setitem(rewards.ANSWERS, 'hostile', hostile_answer)
  timeout_s = 5.0 if bad == 'sleep' else LONG_S
  with start('hostile', workers=1, timeout_s=timeout_s) as pool:
    found = pool.answers(['8', bad, 'none', '8', bad], tasks(*'77777'))
    assert found.answer_R == ('8', None, None, '8', None)
    assert (found.timeouts, found.errors) == ((2, 0) if bad == 'sleep' else (0, 2))
    assert pool.answers([], []) == ((), 0, 0)


def test_an_extraction_that_fails_on_everything_fails_the_step(monkeypatch):
  monkeypatch.setitem(rewards.VERIFIERS, 'hostile', hostile)
  monkeypatch.setitem(rewards.ANSWERS, 'hostile', hostile_answer)
  with start('hostile', workers=1, timeout_s=LONG_S) as pool:
    with pytest.raises(RuntimeError, match="answers of 'hostile' failed on all 2 completions"):
      pool.answers(['raise', 'seven'], tasks(*'77'))


def test_a_verifier_without_an_extraction_has_no_answers():
  with start(hostile, workers=1, timeout_s=LONG_S) as pool:
    with pytest.raises(ValueError, match='no extraction of answers; see rewards.ANSWERS'):
      pool.answers(['7'], tasks('7'))


def test_a_verifier_that_fails_on_everything_fails_the_step():
  with start(hostile, workers=2, timeout_s=LONG_S) as pool:
    with pytest.raises(RuntimeError, match='hostile.* failed on all 4 completions') as error:
      score(pool, 'raise 1', 'raise 2', 'raise 1', 'raise 3')
    assert 'raise 3' in str(error.value)
    assert score(pool, '7', 'raise 1') == ([1, 0], 0, 1)  # on some: a verdict


@pytest.mark.slow
def test_processes_that_die_on_everything_do_not_stop_the_step():
  with start(hostile) as pool:
    assert score(pool, 'die 1', 'die 2') == ([0, 0], 0, 2)


def test_a_verifier_that_processes_cannot_find_fails_the_step():
  with start(lambda completion, task: True, workers=1, timeout_s=LONG_S) as pool:
    with pytest.raises(RuntimeError, match='failed on all 1 completions'):
      score(pool, '7')


def test_close_ends_the_processes():
  before = set(multiprocessing.active_children())
  with start('ends_with', workers=2, timeout_s=LONG_S) as pool:
    score(pool, '7', '8')
    assert len(set(multiprocessing.active_children()) - before) == 2
  assert set(multiprocessing.active_children()) <= before


def test_as_many_completions_as_tasks():
  with start('ends_with', workers=1, timeout_s=LONG_S) as pool:
    for completions, answers in ((['7'], []), (['7'], ['7', '7'])):
      with pytest.raises(ValueError):
        pool.score(completions, tasks(*answers))


def mine(completion: str, task: types.Task) -> bool:
  """A verifier of one's own, which reads info."""
  return completion == task.info


def no_verifier(completion: str) -> bool:
  return True


def test_tasks_name_their_verifiers():
  one, two, three, four = tasks('7', 'B', '1/2', '7')
  two, three = two.replace(verifier='choice'), three.replace(verifier='math')
  four = four.replace(verifier=f'{__name__}:mine', info='8')
  given = [one, two, three, four]
  assert rewards.names(given, config_of()) == ['ends_with', 'choice', 'math', f'{__name__}:mine']
  with start('ends_with', rewards.names(given, config_of())) as pool:
    assert pool.score(['017', '(B)', '0.5', '8'], given).verdict_R.tolist() == [1, 1, 1, 1]
    assert pool.score(['(B)', '0.5', '017', '7'], given).verdict_R.tolist() == [0, 0, 0, 0]
    assert pool.answers(['7', 'b.', '.50'], given[:3]).answer_R == ('7', 'B', '1/2')
    with pytest.raises(ValueError, match='mine.* no extraction of answers'):
      pool.answers(['7', '8'], [one, four])
    with pytest.raises(ValueError, match="'reasoning_gym' of a task is not among the verifiers"):
      pool.score(['7'], [one.replace(verifier='reasoning_gym')])
  with pytest.raises(ValueError, match=r"verifier of made/0='maths' is not one of \[.*'math'"):
    rewards.names([one.replace(verifier='maths')], config_of())


def test_a_verifier_that_raises_on_all_it_gets_fails_the_step_whatever_the_others_do():
  one, two = tasks('7', 'none')
  with start('ends_with', ['choice']) as pool:
    with pytest.raises(RuntimeError, match="verifier of 'choice' failed on all 1 completions .* made/1"):
      pool.score(['7', 'B'], [one, two.replace(verifier='choice')])


@pytest.mark.parametrize('name, message', [
    ('no_module_of_this_name:f', "='no_module_of_this_name:f' cannot be imported: ModuleNotFoundError"),
    (f'{__name__}:missing', 'missing.* cannot be imported: AttributeError'),
    (f'{__name__}:no_verifier', r'no_verifier.* cannot be called with \(completion, task\): too many'),
    (f'{__name__}:LONG_S', r'LONG_S.* cannot be called with'),
])
def test_a_verifier_of_ones_own_is_checked_at_the_start(name, message):
  before = set(multiprocessing.active_children())
  with pytest.raises(ValueError, match=message):
    start(name)
  assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize('completion, answer, right', [
    (r'So $\boxed{0.5}$.', '1/2', True), ('The answer is 0.50.', r'\frac{1}{2}', True), ('0.6', '1/2',
                                                                                         False),
    ('7\nno mark\n', '7', False), ('', '7', False), ('7', '', False)])
def test_math(completion, answer, right):
  assert rewards.VERIFIERS['math'](completion, *tasks(answer)) is right


@pytest.mark.parametrize('completion, right', [
    ('(B)', True), ('B.', True), (r'\boxed{B}', True), ('The answer is B', True),
    ('Long\n\n**Answer: B) 5 m**', True),
    (r'A is near, but \boxed{\text{(B)}}', True), ('The answer is (b), as A is wrong.', True),
    ('A', False), (r'\boxed{C}', False), ('The answer is Bob', False), ('B or C', False), ('', False),
    ('The answer is a mystery.', False)])
def test_choice(completion, right):
  for answer in ('B', '(B)', r'\boxed{B}'[7:8]):
    assert rewards.choice(completion, *tasks(answer)) is right


def test_a_choice_needs_a_letter():
  with pytest.raises(ValueError, match="the answer 'none' of made/0 is not the letter of a choice"):
    rewards.choice('B', *tasks('none'))


def test_completions_that_are_right_agree():
  """A verifier and its extraction must not contradict each other."""
  texts = {'math': ['1/2', r'\boxed{\frac12}', 'The answer is 0.5.', r'0.50', '50', '2', '', 'x=0.5'],
           'choice': ['B', '(B)', r'\boxed{B}', 'A', '', 'The answer is B']}
  for name, answer in (('math', r'\frac{1}{2}'), ('choice', 'B')):
    task, = tasks(answer)
    answer_of = {t: rewards.ANSWERS[name](t, task) for t in texts[name]}
    right = {t for t in texts[name] if rewards.VERIFIERS[name](t, task)}
    assert len(right) > 3 and len({answer_of[t] for t in right}) == 1
    assert right == {t for t in texts[name] if answer_of[t] == answer_of[min(right)]}
    assert answer_of[''] is None


@pytest.fixture(scope='module')
def gym():
  """A task of reasoning-gym, and the same with a scorer that gives shares."""
  import reasoning_gym
  sums, = reasoning_gym.create_dataset('chain_sum', size=1, seed=1)
  sums['answer'] = '42'
  info = json.dumps({'dataset': 'chain_sum', 'entry': sums})
  return tasks('42')[0]._replace(verifier='reasoning_gym', info=info)


@pytest.mark.slow
def test_reasoning_gym(gym, monkeypatch):
  score = rewards.reasoning_gym_score
  assert score('The answer is 42.', gym) == score('<answer>42</answer>', gym) == score('42',
                                                                                       gym) == (True, 1)
  assert score('41', gym)[0] is False and score('', gym) == (False, 0)
  partly, share = score(r'\boxed{42 apples}', gym)
  assert not partly and 0 < share < 1
  assert rewards.reasoning_gym('42', gym) is True and rewards.reasoning_gym('42 apples', gym) is False
  for bad in ('', 'none', '{}', '[]', '{"dataset": "chain_sum"}'):
    with pytest.raises(ValueError, match='made/0 is not JSON with "dataset" and "entry"'):
      score('42', gym.replace(info=bad))
  # A scorer that raises, or returns what is no score, says that it is wrong.
  for scorer in (lambda answer, entry: 1 / 0, lambda answer, entry: None,
                 lambda answer, entry: float('nan')):
    monkeypatch.setattr(rewards, '_scorer', lambda dataset: scorer)
    assert score('42', gym) == (False, 0)


@pytest.mark.slow
@pytest.mark.parametrize('partial_credit', [False, True])
def test_scores_are_rewards_only_where_they_are_asked_for(gym, partial_credit):
  with start('reasoning_gym', partial_credit=partial_credit) as pool:
    scores = pool.score([r'\boxed{42}', r'\boxed{42 apples}'], [gym, gym])
  assert scores.verdict_R.tolist() == [1, 0]
  assert scores.reward_R[0] == 1 and (0 < scores.reward_R[1] < 1) == partial_credit


def test_a_pattern_says_what_verifiers_see():
  with start('ends_with', pattern=r'A=(\d+)') as pool:
    assert score(pool, 'A=7', 'A=8, A=17 or so', 'A=7, A=8', '7', '') == ([1, 1, 0, 0, 0], 0, 0)
    assert pool.answers(['A=8, A=17 or so', '7'], tasks('7', '7')).answer_R == ('7', None)
  with start('ends_with', pattern=r'\d') as pool:  # without a group: the match
    assert score(pool, '7.', '78', '') == ([1, 0, 0], 0, 0)


def test_overlong_by_hand():
  """C = 100, buffer 20."""
  np.testing.assert_allclose(
      rewards.overlong(np.array([0, 79, 80, 81, 90, 99, 100]), 100, 20),
      [0, 0, 0, -0.05, -0.5, -0.95, -1], rtol=1e-6)
  assert rewards.overlong(np.array([1, 100]), 100, 0).tolist() == [0, 0]
  assert rewards.overlong(np.array([], int), 100, 20).shape == (0,)


def test_shaping_changes_rewards_and_no_verdict():
  completions, seven = ['<t>7', '7', '<t>8', '8'], tasks('7') * 4
  length_R = np.array([10, 8, 9, 4])
  with start('ends_with', completion_length=10, format='^<t>',
             format_weight=0.25, length_buffer=4) as pool:
    scores = pool.score(completions, seven, length_R)
    assert scores.verdict_R.tolist() == [1, 1, 0, 0]
    assert scores.reward_R.tolist() == [0.25, 0.5, -0.5, 0]
    assert pool.score(completions, seven).reward_R.tolist() == [1.25, 1, 0.25, 0]
  with start('ends_with', completion_length=10) as pool:
    assert pool.score(completions, seven, length_R).reward_R.tolist() == [1, 1, 0, 0]


def test_a_format_that_hangs_is_stopped():
  with start('ends_with', format=r'^(a+)+$', format_weight=1.0, timeout_s=1.5) as pool:
    scores = pool.score(['7', 'a' * 50 + '!7'], tasks('7', '7'))
    assert scores.reward_R.tolist() == [1, 0] and scores.timeouts == 1


@pytest.mark.parametrize('changed, message', [
    ({'verifier': 'begins_with'},
     r"rewards.verifier='begins_with' is not one of \[.*'ends_with'.*\], nor 'module:function'"),
    ({'verifier': 'a b:c'}, "verifier='a b:c' is not one of"),
    ({'workers': 0}, r'rewards.workers=0 is below 1'),
    ({'workers': -1}, r'rewards.workers=-1 is below 1'),
    ({'timeout_s': 0}, r'rewards.timeout_s=0 must be above 0'),
    ({'timeout_s': -1.5}, r'rewards.timeout_s=-1.5 must be above 0'),
    ({'timeout_s': float('nan')}, r'rewards.timeout_s=nan must be above 0'),
    ({'memory_mb': 0}, 'rewards.memory_mb=0 is below 1'),
    ({'pattern': '(7'}, r"rewards.pattern='\(7' is not a regex: missing \)"),
    ({'format': '[', 'format_weight': 1.0}, r"rewards.format='\[' is not a regex"),
    ({'format': 'x'}, "rewards.format='x' and rewards.format_weight=0.0 go together"),
    ({'format_weight': 1.0}, "rewards.format='' and rewards.format_weight=1.0 go together"),
    ({'format_weight': float('inf')}, 'rewards.format_weight=inf must be finite'),
    ({'length_buffer': 11}, r'rewards.length_buffer=11 is not in 0..sample.completion_length=10'),
    ({'length_buffer': -1}, r'rewards.length_buffer=-1 is not in 0..'),
])
def test_bad_knobs(changed, message):
  with pytest.raises(ValueError, match=message):
    rewards.check(config_of(**changed), 10)
  with pytest.raises(ValueError, match=message):
    rewards.Workers(config_of(**changed), completion_length=10)
