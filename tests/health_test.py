"""What came of rollouts by hand, and when it is spoken of."""

import numpy as np
import pytest

from kr_jax import health
from kr_jax import types
from kr_jax.rewards import verdicts

TASK = types.Task(id='', index=0, prompt='', answer='', difficulty=0, solution='', tokens=())
# Four tasks: two of one dataset, one of another, one without a rollout. Then a row without a rollout.
TASKS = [TASK._replace(source='aime'), TASK._replace(source='quiz', verifier='choice'), TASK._replace(source='aime'),
         TASK._replace(source='gym')]
TASK_R = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 4])
ENDED_R = np.array([1, 2, 2, 1, 2, 1, 1, 2, 1, 0])
OUTCOME_R = np.array([verdicts.OUTCOMES.index(x) for x in (
    'right', 'no_answer', 'timeout', 'no_answer', 'wrong', 'abstained', 'right', 'no_answer', 'timeout', 'none')],
    np.int8)
NOTHING = {'groups': 0, 'truncated_without_answer': 0} | dict.fromkeys(verdicts.OUTCOMES[1:], 0)


def step(**counts):
  return {'aime/math': NOTHING | counts}


def no_example(name):
  raise AssertionError('an example is looked for without a message')


def test_counts_by_hand():
  names = health.names(TASKS, 'math')
  assert names == ['aime/math', 'quiz/choice', 'aime/math', 'gym/math']
  assert health.counts(OUTCOME_R, ENDED_R, TASK_R, names) == {
      'aime/math': NOTHING | {
          'groups': 2, 'right': 2, 'no_answer': 3, 'truncated_without_answer': 2, 'timeout': 2},
      'quiz/choice': NOTHING | {'groups': 1, 'wrong': 1, 'abstained': 1}, 'gym/math': NOTHING}


def test_totals_by_hand():
  want = {'unverified': 3 / 9, 'no_answer': 3 / 9, 'unverified_abstained': 1, 'unverified_timeout': 2,
          'unverified_raised': 0, 'unverified_died': 0, 'unverified_invalid': 0}
  assert health.totals(OUTCOME_R) == want == health.totals(OUTCOME_R.reshape(2, 5))
  assert health.totals(np.zeros(4, np.int8)) == dict.fromkeys(want, 0)


def test_unverified_rollouts_are_spoken_of_now_and_then():
  watch, said = health.Watch(), {}
  for i in range(45):
    found = step(right=3, timeout=int(i >= 2), raised=2 * (i == 5))
    said[i] = watch.step(i, found, ('it took long',) if i != 5 else (), no_example)
  assert [i for i, texts in said.items() if texts] == [2, 5, 25]  # 5: another kind
  assert said[2] == [
      'step 2: unverified and left out: 1 of 4 rollouts (aime/math timeout 1); for example: it took long']
  assert said[5] == ['step 5: unverified and left out: 3 of 6 rollouts (aime/math timeout 1, aime/math raised 2)']


def test_a_long_example_keeps_both_ends():
  said, = health.Watch().step(0, step(raised=1), ('begins' + 9999 * 'x' + 'ends',), no_example)
  assert 'begins' in said and said.endswith('ends') and len(said) < 600


def test_an_example_does_not_steer_the_terminal():
  said, = health.Watch().step(0, step(invalid=1), ('\x1b[2Jgone\r\nüber',), no_example)
  assert said.endswith('for example: \\x1b[2Jgone\\r\nüber')


@pytest.mark.parametrize('groups, wrong, want', [
    (8, 64, {8: 512, 16: 1024, 32: 2048}),  # 512 answers and 64 groups at once
    (4, 64, {16: 1024, 32: 2048}),  # the groups are later
    (64, 8, {}), (100, 600, {1: 600, 2: 1200, 4: 2400, 7: 4200, 14: 8400, 28: 16800})])
def test_answers_that_never_match_raise_an_alarm(groups, wrong, want):
  """Again whenever their number has doubled; completions without an answer do not count."""
  watch, said = health.Watch(), {}
  for i in range(1, 41):
    texts = watch.step(i, step(groups=groups, wrong=wrong, no_answer=900), (), lambda name: f'; see {name}')
    if texts:
      said[i] = texts
  assert said == {i: [f'step {i}: of {n} answers of aime/math none was right; see aime/math: the tasks are too hard '
                      "for this policy, or the verifier or the dataset's answers are wrong"]
                  for i, n in want.items()}


def test_one_right_answer_ends_the_alarm():
  watch = health.Watch()
  watch.step(0, step(groups=1, right=1), (), no_example)
  assert not any(watch.step(i, step(groups=64, wrong=512), (), no_example) for i in range(9))


def test_a_resumed_run_counts_on():
  before = [step(groups=32, wrong=256)] * 3
  whole, resumed = health.Watch(), health.Watch(enumerate(before))
  said = [whole.step(i, found, (), lambda name: '') for i, found in enumerate(before)]
  assert [len(texts) for texts in said] == [0, 1, 0]
  last = step(groups=32, wrong=256)
  assert resumed.step(3, last, (), lambda name: '') == whole.step(3, last, (), lambda name: '') != []


def test_a_resumed_run_does_not_say_again_what_was_said():
  found = step(raised=1)
  whole, resumed = health.Watch(), health.Watch(enumerate([found] * 7))
  said = [len(whole.step(i, found, (), no_example)) for i in range(40)]
  assert said == [1] + 19 * [0] + [1] + 19 * [0]
  assert [len(resumed.step(i, found, (), no_example)) for i in range(7, 40)] == said[7:]


def test_the_example_of_a_wrong_answer():
  assert health.wrong_example('so 7', '8') == "; the last one ends 'so 7', where the answer is '8'"
  long = health.wrong_example('\n'.join(['begin', 'x' * 200, '\\boxed{3}']), '8')
  assert 'begin' not in long and '…' in long and long.endswith("\\\\boxed{3}', where the answer is '8'")
