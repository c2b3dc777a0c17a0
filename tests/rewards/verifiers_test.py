"""The verifiers and extractions that are shipped, a user's own, and what a config adds to them; no process."""

import importlib.util

import pytest

from kr_jax import rewards
from kr_jax import types
from kr_jax.rewards import verifiers
from tests import knobs
from tests.rewards import hostile


def task_of(answer: str, **fields) -> types.Task:
  return types.Task(id='made/0', index=0, prompt='', answer=answer, difficulty=1, solution='', tokens=(2,), **fields)


def verify(verifier, completion: str, answer: str = '7', **config) -> tuple[bool, float]:
  verdict = verifiers.verify(verifier, knobs.verifiers('ends_with', **config), completion, task_of(answer))
  return verdict.right, verdict.reward


def test_ends_with():
  task = task_of('06')
  right = [t for t in ('031106', '06', '0311060', '6', '06 ', '') if verifiers.ends_with(t, task).right]
  assert right == ['031106', '06']
  assert verifiers.ends_with('', task) == rewards.Verdict(False, answered=False)
  assert verifiers.last_characters('031106', task) == '06'
  assert verifiers.last_characters('031106', task_of('7')) == '6'
  assert verifiers.last_characters('6', task) == '6'
  assert verifiers.last_characters('', task) is None


@pytest.mark.parametrize('completion, answer, right', [
    (r'So $\boxed{0.5}$.', '1/2', True), ('The answer is 0.50.', r'\frac{1}{2}', True), ('0.6', '1/2', False),
    ('7\nno mark\n', '7', False), ('', '7', False), ('7', '', False)])
def test_math(completion, answer, right):
  assert verifiers.mathematics(completion, task_of(answer)).right is right


def test_math_tells_no_answer_from_a_wrong_one():
  assert verifiers.mathematics('The answer is 8.', task_of('7')) == rewards.Verdict(False)
  for completion in ('7\nno mark\n', ''):
    assert verifiers.mathematics(completion, task_of('7')) == rewards.Verdict(False, answered=False)


@pytest.mark.parametrize('name, answer, texts', [
    ('ends_with', '06', ['', '6', '06', '106', '0306', '20306', '60', '6 ']),
    ('math', r'\frac{1}{2}', ['1/2', r'\boxed{\frac12}', 'The answer is 0.5.', r'0.50', '50', '2', '', 'x=0.5']),
    ('choice', 'B', ['B', '(B)', r'\boxed{B}', 'A', '', 'The answer is B'])])
def test_completions_that_are_right_agree(name, answer, texts):
  """A verifier and its extraction must not contradict each other."""
  task = task_of(answer)
  answer_of = {text: rewards.ANSWERS[name](text, task) for text in texts}
  right = {text for text in texts if rewards.VERIFIERS[name](text, task).right}
  assert len(right) > 3 and len({answer_of[text] for text in right}) == 1
  assert right == {text for text in texts if answer_of[text] == answer_of[min(right)]}
  assert answer_of[''] is None


def test_tasks_that_a_verifier_cannot_serve(monkeypatch):
  """Are refused before a run begins; reasoning-gym is imported for its own tasks alone."""
  config = knobs.verifiers('math')
  checked = []
  monkeypatch.setitem(verifiers._CHECKS, 'reasoning_gym', checked.append)
  letters = [task_of(answer, verifier='choice') for answer in ('B', '(C)')]
  verifiers.check_tasks([task_of('none'), *letters, task_of('', verifier='tests.rewards.hostile:shaping')], config)
  assert not checked
  gym = [task_of('7', verifier='reasoning_gym')]
  verifiers.check_tasks([*letters, *gym], config)
  verifiers.check_tasks(gym, knobs.verifiers(hostile.shaping))
  assert checked == [gym, gym]
  for tasks, name in (([*letters, task_of('none', verifier='choice')], 'math'), ([task_of('none')], 'choice')):
    with pytest.raises(ValueError, match="the answer 'none' of made/0 is not the letter of a choice"):
      verifiers.check_tasks(tasks, knobs.verifiers(name))


def test_what_joins_answers():
  assert set(verifiers.SAME) <= set(verifiers.ANSWERS)
  assert verifiers.SAME['math']('0.333333', r'\frac{1}{3}') and not verifiers.SAME['math']('0.33', r'\frac{1}{3}')


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
  # Beyond the range too, and by the format's weight.
  for bad, weight in ((float('nan'), 0.1), (float('inf'), 0.1), (1e300, 0.1), (1e6, 0.1)):
    with pytest.raises(ValueError, match='rewards must be finite, and from'):
      verify(lambda completion, task: (True, bad), 'x', format='x', format_weight=weight)
  # An abstention earns nothing, in any format.
  assert verify(lambda completion, task: None, '<t>7', **format) == (None, 0)


@pytest.mark.parametrize('returned', [{'score': 0.0}, [False, 0.0], 0.3, 1, 'no', (True, 'no'), ()])
def test_what_is_no_verdict(returned):
  with pytest.raises(TypeError, match='it must return a bool, .* None to abstain, or kr_jax.rewards.Verdict'):
    verify(lambda completion, task: returned, 'x')


def test_answers_that_are_none():
  with pytest.raises(TypeError, match="the answer of 'seven' is 7; answers must be text or None"):
    verifiers.answer(hostile.hostile_answer, knobs.verifiers('ends_with'), 'seven', task_of('7'))


def test_names():
  config = knobs.verifiers('ends_with')
  own = 'tests.rewards.hostile:reads_info'
  tasks = [task_of('7', verifier=name) for name in ('', 'choice', own, '', 'choice')]
  assert rewards.names(tasks, config) == ['ends_with', 'choice', own]
  with pytest.raises(ValueError, match=r"verifier of made/0='maths' is not one of \[.*'math'"):
    rewards.names([task_of('7', verifier='maths')], config)
  for wrong in ('begins_with', 'a b:c', 'a:b:c', 'a.:b', 'a.py', 'a.py:', '.py:a'):
    with pytest.raises(ValueError, match=rf"rewards.verifier='{wrong}' is not one of \[.*\], nor 'module:function' or"):
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
  assert verifiers.modules(['ends_with', 'math', own, hostile.shaping]) == ['tests.rewards.hostile']


def test_a_function_of_a_file(tmp_path, monkeypatch):
  (tmp_path / 'mine.py').write_text('def near(completion, task):\n  return completion in task.answer\n')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path))
  for name in ('mine.py:near', './mine.py:near', '~/mine.py:near', f'{tmp_path}/mine.py:near'):
    assert rewards.names([task_of('7', verifier=name)], knobs.verifiers('math')) == [name]
    assert verifiers.find(name)('7', task_of('78')) and verifiers.located(name) == f'{tmp_path}/mine.py:near'
    assert verifiers.modules([name]) == [f'{tmp_path}/mine.py']
  assert verifiers.located('a.b:c') == 'a.b:c'


@pytest.mark.parametrize('name, message', [
    ('no_module_of_this_name:f', "='no_module_of_this_name:f' cannot be imported: ModuleNotFoundError"),
    ('tests.rewards.hostile:missing', "missing.* cannot be imported: AttributeError.* must be 'module:function'"),
    ('tests.rewards.hostile:one_argument', r'one_argument.* cannot be called with \(completion, task\): too many'),
    ('tests.rewards.hostile:NO_FUNCTION', r'NO_FUNCTION.* cannot be called with')])
def test_a_function_of_the_user_that_cannot_be_called(name, message):
  with pytest.raises(ValueError, match=message):
    verifiers.import_function(name)
