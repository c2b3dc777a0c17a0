"""The verifiers and extractions that are shipped, a user's own, and what a config adds to them; no process."""

import importlib.util
import json
import sys
import types as types_lib

import pytest

from kr_jax import rewards
from kr_jax import types
from kr_jax.rewards import verifiers
from tests import knobs
from tests.rewards import hostile


def task_of(answer: str, **fields) -> types.Task:
  return types.Task(id='made/0', index=0, prompt='', answer=answer, difficulty=1, solution='', tokens=(2,), **fields)


def verify(verifier, completion: str, answer: str = '7', **config) -> tuple[bool, float]:
  return verifiers.verify(verifier, knobs.verifiers('ends_with', **config), completion, task_of(answer))


def test_ends_with():
  task = task_of('06')
  assert [t for t in ('031106', '06', '0311060', '6', '06 ', '') if verifiers.ends_with(t, task)] == ['031106', '06']
  assert verifiers.last_characters('031106', task) == '06'
  assert verifiers.last_characters('031106', task_of('7')) == '6'
  assert verifiers.last_characters('6', task) == '6'
  assert verifiers.last_characters('', task) is None


@pytest.mark.parametrize('completion, answer, right', [
    (r'So $\boxed{0.5}$.', '1/2', True), ('The answer is 0.50.', r'\frac{1}{2}', True), ('0.6', '1/2', False),
    ('7\nno mark\n', '7', False), ('', '7', False), ('7', '', False)])
def test_math(completion, answer, right):
  assert verifiers.mathematics(completion, task_of(answer)) is right


@pytest.mark.parametrize('completion, right', [
    ('(B)', True), ('B.', True), (r'\boxed{B}', True), ('The answer is B', True),
    ('Long\n\n**Answer: B) 5 m**', True), (r'A is near, but \boxed{\text{(B)}}', True),
    ('The answer is (b), as A is wrong.', True),
    ('A', False), (r'\boxed{C}', False), ('The answer is Bob', False), ('B or C', False), ('', False),
    ('The answer is a mystery.', False)])
def test_choice(completion, right):
  for answer in ('B', '(B)'):
    assert verifiers.choice(completion, task_of(answer)) is right


def test_a_choice_needs_a_letter():
  with pytest.raises(ValueError, match="the answer 'none' of made/0 is not the letter of a choice"):
    verifiers.choice('B', task_of('none'))


@pytest.mark.parametrize('name, answer, texts', [
    ('ends_with', '06', ['', '6', '06', '106', '0306', '20306', '60', '6 ']),
    ('math', r'\frac{1}{2}', ['1/2', r'\boxed{\frac12}', 'The answer is 0.5.', r'0.50', '50', '2', '', 'x=0.5']),
    ('choice', 'B', ['B', '(B)', r'\boxed{B}', 'A', '', 'The answer is B'])])
def test_completions_that_are_right_agree(name, answer, texts):
  """A verifier and its extraction must not contradict each other."""
  task = task_of(answer)
  answer_of = {text: rewards.ANSWERS[name](text, task) for text in texts}
  right = {text for text in texts if rewards.VERIFIERS[name](text, task)}
  assert len(right) > 3 and len({answer_of[text] for text in right}) == 1
  assert right == {text for text in texts if answer_of[text] == answer_of[min(right)]}
  assert answer_of[''] is None


@pytest.mark.slow
def test_reasoning_gym(monkeypatch):
  import reasoning_gym
  sums, = reasoning_gym.create_dataset('chain_sum', size=1, seed=1)
  sums['answer'] = '42'
  gym = task_of('42', info=json.dumps({'dataset': 'chain_sum', 'entry': sums}))
  score = verifiers.reasoning_gym_score
  for right in ('The answer is 42.', '<answer>42</answer>', '42'):
    assert score(right, gym) == (True, 1)
  assert score('41', gym)[0] is False and score('', gym) == (False, 0)
  right, share = score(r'\boxed{42 apples}', gym)
  assert not right and 0 < share < 1
  assert verifiers.reasoning_gym('42', gym) is True and verifiers.reasoning_gym('42 apples', gym) is False
  assert verifiers.find('reasoning_gym')(r'\boxed{42 apples}', gym) is False
  assert verifiers.find('reasoning_gym', partial_credit=True)(r'\boxed{42 apples}', gym) == (False, share)
  for bad in ('', 'none', '{}', '[]', '{"dataset": "chain_sum"}'):
    with pytest.raises(ValueError, match='made/0 is not JSON with "dataset" and "entry"'):
      score('42', gym._replace(info=bad))
  # A completion is wrong if the scorer raises, or returns what is no score.
  for name, scorer in {'raises': lambda answer, entry: 1 / 0, 'none': lambda answer, entry: None,
                       'nan': lambda answer, entry: float('nan'), 'two': lambda answer, entry: 2.0}.items():
    monkeypatch.setattr(reasoning_gym, 'get_score_answer_fn', lambda dataset: scorer)
    assert score('42', gym._replace(info=json.dumps({'dataset': f'one that {name}', 'entry': sums}))) == (False, 0)


def test_a_scorer_reads_tuples(monkeypatch):
  """JSON has none: {"tuple": [...]} stands for one, at any depth."""
  read = []
  gym = types_lib.SimpleNamespace(
      get_score_answer_fn=lambda dataset: lambda answer, entry: read.append((answer, entry)) or 0.5)
  monkeypatch.setitem(sys.modules, 'reasoning_gym', gym)
  entry = '{"board": {"tuple": [1, {"tuple": []}, [2]]}, "tuple": 3, "n": 4}'
  info = f'{{"dataset": "one that reads tuples", "entry": {entry}}}'
  assert verifiers.reasoning_gym_score(r'So \boxed{7}', task_of('', info=info)) == (False, 0.5)
  assert read == [('7', {'board': (1, (), [2]), 'tuple': 3, 'n': 4})]
  assert [verifiers.reasoning_gym_answer(text, task_of('')) for text in ('a\nb ', ' ')] == ['a\nb', None]


def test_a_pattern_says_what_verifiers_read():
  texts = ['A=7', 'A=8, A=17 or so', 'A=7, A=8', '7', '']
  assert [verify(verifiers.ends_with, t, pattern=r'A=(\d+)')[0] for t in texts] == [True, True, False, False, False]
  # Without a group it is the match; a group that matched nothing is empty.
  assert [verify(verifiers.ends_with, t, pattern=r'\d')[0] for t in ('7.', '78', '')] == [True, False, False]
  assert verify(lambda completion, task: completion == '', 'A', pattern=r'A(\d)?') == (True, 1)
  config = knobs.verifiers('ends_with', pattern=r'A=(\d+)')
  last = [verifiers.answer(verifiers.last_characters, config, t, task_of('7')) for t in texts[1:4]]
  assert last == ['7', '8', None]


def test_shaped_rewards():
  format = {'format': '^<t>', 'format_weight': 0.25}
  assert verify(verifiers.ends_with, '<t>7', **format) == (True, 1.25)
  assert verify(verifiers.ends_with, '<t>8', **format) == (False, 0.25)
  assert verify(verifiers.ends_with, '7<t>7', **format) == (True, 1)
  # The format is of the whole completion, whatever the pattern is.
  assert verify(verifiers.ends_with, '<t>8', pattern='7', **format) == (False, 0.25)
  assert verify(hostile.shaping, '<t>7', **format) == (True, -0.75)
  assert verify(lambda completion, task: 1, '') == (True, 1.0)
  for bad in (float('nan'), float('inf')):
    with pytest.raises(ValueError, match="the reward of 'x' is .*; rewards must be finite"):
      verify(lambda completion, task: (True, bad), 'x')
  with pytest.raises(TypeError, match="the answer of 'seven' is 7; answers must be text or None"):
    verifiers.answer(hostile.hostile_answer, knobs.verifiers('ends_with'), 'seven', task_of('7'))


def test_names():
  config = knobs.verifiers('ends_with')
  own = 'tests.rewards.hostile:reads_info'
  tasks = [task_of('7', verifier=name) for name in ('', 'choice', own, '', 'choice')]
  assert rewards.names(tasks, config) == ['ends_with', 'choice', own]
  with pytest.raises(ValueError, match=r"verifier of made/0='maths' is not one of \[.*'math'"):
    rewards.names([task_of('7', verifier='maths')], config)
  for wrong in ('begins_with', 'a b:c', 'a:b:c', 'a.:b'):
    with pytest.raises(ValueError, match=rf"rewards.verifier='{wrong}' is not one of \[.*\], nor 'module:function'"):
      rewards.check(knobs.verifiers(wrong), 10)
  rewards.check(knobs.verifiers(own, length_buffer=10), 10)
  with pytest.raises(ValueError, match=r'rewards.length_buffer=11 is not in 0..sample.completion_length=10'):
    rewards.check(knobs.verifiers(own, length_buffer=11), 10)


def test_a_verifier_without_its_package(monkeypatch):
  """Is refused before a run begins."""
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'reasoning_gym' else find(name))
  with pytest.raises(ValueError, match=r"the verifier of made/0='reasoning_gym' needs a package: .*kr_jax\[data\]"):
    rewards.names([task_of('7', verifier='reasoning_gym')], knobs.verifiers('math'))
  assert rewards.names([task_of('7')], knobs.verifiers('math')) == ['math']


def test_a_function_of_the_user():
  own = 'tests.rewards.hostile:reads_info'
  function = verifiers.find(own)
  assert function('8', task_of('7', info='8')) is True and function('7', task_of('7', info='8')) is False
  assert verifiers.find(hostile.shaping) is hostile.shaping
  assert verifiers.find('math', partial_credit=True) is verifiers.mathematics
  assert verifiers.modules(['ends_with', 'math', own, hostile.shaping]) == ['math_verify', 'tests.rewards.hostile']


@pytest.mark.parametrize('name, message', [
    ('no_module_of_this_name:f', "='no_module_of_this_name:f' cannot be imported: ModuleNotFoundError"),
    ('tests.rewards.hostile:missing', "missing.* cannot be imported: AttributeError.* must be 'module:function'"),
    ('tests.rewards.hostile:one_argument', r'one_argument.* cannot be called with \(completion, task\): too many'),
    ('tests.rewards.hostile:NO_FUNCTION', r'NO_FUNCTION.* cannot be called with')])
def test_a_function_of_the_user_that_cannot_be_called(name, message):
  with pytest.raises(ValueError, match=message):
    verifiers.import_function(name)
