"""What came of rollouts by hand, and when it is spoken of."""

import numpy as np
import pytest
from scipy import stats as statistics

from kr_jax import health
from kr_jax import types
from kr_jax.record import metrics
from kr_jax.rewards import verdicts
from tests import knobs

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
def test_answers_that_never_match_are_noticed(groups, wrong, want):
  """Again whenever their number has doubled; completions without an answer do not count, and it is no alarm."""
  watch, said = health.Watch(), {}
  for i in range(1, 41):
    assert not watch.step(i, step(groups=groups, wrong=wrong, no_answer=wrong), (), lambda name: f'; see {name}')
    if watch.notices:
      said[i] = watch.notices
  assert said == {i: [f'step {i}: of {n} answers of aime/math none was right; see aime/math: the tasks are too hard '
                      "for this policy, or the verifier or the dataset's answers are wrong"]
                  for i, n in want.items()}


def test_one_right_answer_ends_the_notice():
  watch = health.Watch()
  watch.step(0, step(groups=1, right=1), (), no_example)
  assert not any(watch.step(i, step(groups=64, wrong=512), (), no_example) or watch.notices for i in range(9))


@pytest.mark.parametrize('of, alarms, notices', [
    (dict(groups=16, no_answer=64), [3, 7], []),  # 256 of 64 groups
    (dict(groups=4, no_answer=64), [7], []),  # the groups are later
    (dict(groups=16, no_answer=58, wrong=6), [4, 8], []),  # 90.6 % without an answer
    (dict(groups=16, no_answer=57, wrong=7), [], []),  # 89.1 %
    (dict(groups=16, no_answer=64, right=1), [], []),
    (dict(groups=16, no_answer=64, truncated_without_answer=64), [], [7]),  # cut: nothing tells of their form
])
def test_completions_without_an_answer_raise_an_alarm(of, alarms, notices):
  watch, said, noticed = health.Watch(), {}, {}
  for i in range(10):
    if texts := watch.step(i, step(**of), (), lambda name: ''):
      said[i] = texts
    if watch.notices:
      noticed[i] = watch.notices
  assert [*said] == alarms and [*noticed] == notices
  assert all('rewards.pattern' in texts[0] and 'found no answer' in texts[0] for texts in said.values())
  assert all('sample.completion_length' in texts[0] for texts in noticed.values())


@pytest.mark.parametrize('completion, answer, want', [
    (r'so $x = \boxed{\text{42}}$.', '42', True), ('#### 1,042\n', '1042', True), ('the answer is **42**.', '42', True),
    ('<answer> 42.0 </answer> as said', '42', True), ('That makes 42 apples.', '42', True), ('42', '42', True),
    ('The capital is Paris.\n', 'paris', True), (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}', True),
    ('x=\n−7', '-7', True), ('42 and 17 make 59', '42', False),
    ('not parisian', 'paris', False), ('', '42', False), ('142', '42', True), ('142', '2', False),
    ('42' + 'x\n' * 300 + '7', '42', False), ('.', '', False), ('so 3', '3x', False)])
def test_what_stands_at_the_end(completion, answer, want):
  assert health.holds(health.at_end(completion), answer) is want


HARD = lambda right, rng: rf'\boxed{{{right + rng.integers(1, 9)}}}'  # never right, but near
FORMS = {
    'a box under ####': (lambda right, rng: rf'so \boxed{{{right}}}', 'no_answer', 'stands at the end of 64 of 64'),
    'no form at all': (lambda right, rng: 'I do not know', 'no_answer', 'in 256 of 256 completions'),
    'answers that are not matched': (lambda right, rng: f'I get {right}', 'wrong', 'stands at the end of 64 of 64'),
    'right in a quarter': (lambda right, rng: f'{right + (rng.random() > .25)}', 'wrong', 'stands at the'),
    'hard tasks': (HARD, 'wrong', ''), 'hard tasks without a form': (lambda right, rng: '7 or 8?', 'wrong', ''),
}


def a_run(form, before=(), steps=range(12), outcome='wrong'):
  """Alarms and notices by step of 16 tasks with 4 rollouts, and what the record has of each step."""
  watch, alarms, notices, record = health.Watch(before, seed=3), {}, {}, []
  for i in steps:
    rng = np.random.default_rng((7, i))
    right_M = rng.choice(900, 16, replace=False) + 100
    tasks = [TASK._replace(id=f't{x}', answer=str(x), source='sums') for x in right_M]
    texts, task_R = [form(x, rng) for x in right_M.repeat(4)], np.arange(16).repeat(4)
    outcome_R, ended_R = np.full(64, verdicts.OUTCOMES.index(outcome), np.int8), np.ones(64, int)
    found = health.counts(outcome_R, ended_R, task_R, ['sums/math'] * 16)
    examples = watch.look(i, found, health.Rollouts(
        tasks, ['sums/math'] * 16, task_R, ended_R, outcome_R, np.arange(64), texts.__getitem__))
    alarms[i] = watch.step(i, found, (), no_example)
    notices[i] = watch.notices
    record.append({'step': i, 'verification': found, 'verification_examples': examples})
  return alarms, notices, record


@pytest.mark.parametrize('name', FORMS)
def test_an_alarm_is_of_the_form_and_not_of_hard_tasks(name):
  """The first at the 64th group or the 256th completion, of step 3; of hard tasks a notice at the 512th answer."""
  form, outcome, says = FORMS[name]
  alarms, notices, _ = a_run(form, outcome=outcome)
  if says:
    assert [i for i, texts in alarms.items() if texts] == [3, 7] and not any(notices.values())
    said, = alarms[3]
    assert says in said and 'ends' in said and 'where the answer is' in said and 'sums/math' in said
    assert all(knob in said for knob in ('rewards.verifier', 'rewards.pattern', 'tasks.template'))
  else:
    assert not any(alarms.values()) and [i for i, texts in notices.items() if texts] == [7]
    assert 'too hard for this policy: the right answer stands at the end of 0 of 128' in notices[7][0]


def test_an_answer_that_always_stands_there_is_no_sign():
  """The last number is a small one, as is every answer: half of the own and half of the others' answers fit."""
  watch = health.Watch()
  found = step(groups=64, wrong=256, looked_at=640, holds_answer=320, others=5120, holds_other=2560)
  assert not watch.step(0, found, (), no_example) and not watch.notices
  assert health.Watch().step(0, step(groups=64, wrong=256, looked_at=640, holds_answer=320, others=5120,
                                     holds_other=500), (), lambda name: '')


def test_the_chance_of_a_false_alarm_is_as_said():
  """In all steps of 8 groups together, at the worst rate of answers that stand there, the right one as any other."""
  rates, false = np.linspace(.02, .06, 5)[:, None], 0.0
  for n in range(64, 300, 8):
    others = np.arange(8 * n // 4)  # more stand there with no chance to speak of
    least = np.ceil(np.maximum(.15 * n, 5 * (others + 1) / 8))
    false += (statistics.binom.pmf(others, 8 * n, rates) * statistics.binom.sf(least - 1, n, rates)).sum(axis=1)
  assert 1e-6 < false.max() < 1e-4
  assert statistics.binom.sf(230, 256, .8) < 1e-5  # silent


def test_nothing_is_called_hard_while_the_look_tells_otherwise():
  """After 512 answers, of which the look has seen few: half of those were right."""
  watch = health.Watch()
  found = step(groups=64, wrong=256, looked_at=16, holds_answer=8, others=128, holds_other=2)
  alarms = [watch.step(i, found, (), lambda name: '') + watch.notices for i in range(5)]
  assert [len(texts) for texts in alarms] == [0, 0, 0, 1, 0] and 'stands at the end of 32 of 64' in alarms[3][0]


def test_completions_that_were_cut_are_not_looked_at():
  """Of two groups of one dataset, both wrong: what the second would have said is not known."""
  tasks, texts = [TASK._replace(answer=x, source='aime') for x in '78'], ['7', '8']
  found, names = step(groups=2, wrong=2), ['aime/math'] * 2
  wrong_R = np.full(2, verdicts.WRONG, np.int8)
  health.Watch().look(0, found, health.Rollouts(
      tasks, names, np.arange(2), np.array([types.ENDED_STOP, types.ENDED_LENGTH]), wrong_R, np.arange(2),
      texts.__getitem__))
  assert {key: x for key, x in found['aime/math'].items() if key not in NOTHING} == {
      'looked_at': 1, 'holds_answer': 1, 'others': 1, 'holds_other': 0}


def test_examples_are_few_and_hostile_text_is_escaped():
  """Three of the first step with a kind, then one of the second, fourth and eighth."""
  _, _, record = a_run(lambda right, rng: f'\x1b[2J\u202e{right + 1}')
  of = {row['step']: row['verification_examples'] for row in record}
  assert {i: len(x['sums/math']['wrong']) for i, x in of.items() if x} == {0: 3, 1: 1, 3: 1, 7: 1}
  assert [*of[0]['sums/math']] == ['wrong']
  first = of[0]['sums/math']['wrong'][0]
  assert first.startswith('t') and '\\x1b[2J\\u202e' in first and '\x1b' not in first and 'the answer is' in first
  kept = health.kept(record)['sums/math']['wrong']
  assert kept == [first, of[3]['sums/math']['wrong'][0], of[7]['sums/math']['wrong'][0]]


def test_examples_of_every_kind():
  """By hand: of the first dataset the second rollout is cut and the fourth is not; an error says why."""
  watch, tasks = health.Watch(), [task._replace(id=f't{i}') for i, task in enumerate(TASKS)]
  names = health.names(tasks, 'math')
  found = health.counts(OUTCOME_R, ENDED_R, TASK_R, names)
  examples = watch.look(0, found, health.Rollouts(
      tasks, names, TASK_R, ENDED_R, OUTCOME_R, np.arange(9), 'abcdefghi'.__getitem__),
                        ('math: timeout (2 of 7): t0 c',))
  assert {name: {kind: len(x) for kind, x in of.items()} for name, of in examples.items()} == {
      'aime/math': {'no_answer': 1, 'truncated_without_answer': 2, 'timeout': 2}, 'quiz/choice': {
          'wrong': 1, 'abstained': 1}}
  assert "t0 ends 'd', where" in examples['aime/math']['no_answer'][0]
  assert all(x.endswith('math: timeout (2 of 7): t0 c') for x in examples['aime/math']['timeout'])


@pytest.mark.parametrize('name', FORMS)
def test_a_resumed_run_goes_on(name):
  form, outcome, _ = FORMS[name]
  alarms, notices, record = a_run(form, outcome=outcome)
  before = [(row['step'], row['verification']) for row in record[:5]]
  resumed = a_run(form, before, range(5, 12), outcome)
  assert resumed[2] == record[5:]
  assert resumed[:2] == ({i: alarms[i] for i in range(5, 12)}, {i: notices[i] for i in range(5, 12)})


def test_a_verifier_that_matches_is_not_looked_behind():
  """From 256 rollouts on, if more than 2 % are right: decoding takes time."""
  watch, read = health.Watch([(0, step(groups=64, right=6, wrong=250))]), []
  rollouts = health.Rollouts(TASKS[:1], ['aime/math'], np.zeros(1, int), np.ones(1, int),
                             np.array([verdicts.WRONG], np.int8), np.arange(1), lambda r: read.append(r) or 'x')
  watch._steps['aime/math', 'wrong'] = 2
  found = step(groups=1, wrong=1)
  assert watch.look(1, found, rollouts) == {} and not read and 'looked_at' not in found['aime/math']


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


@pytest.mark.exhaustive
@pytest.mark.parametrize('of_run, says', [
    (dict(rewards__pattern='####(.*)'), ['found no answer']),
    (dict(rewards__verifier='tests.graders:never'), [])])
def test_a_run_with_a_grader_of_another_form_raises_an_alarm(tmp_path, data_dir, of_run, says):
  """Of a policy that ends its completions by itself; and a run of hard tasks does not."""
  workdir = knobs.run(tmp_path, data_dir, num_steps=11, evaluate__every=0, checkpoint__every=99, **of_run)
  alarms = [text for record in metrics.read(f'{workdir}/metrics.jsonl') for text in record.get('alarms', ())
            if 'clipped' not in text]
  assert len(alarms) == len(says) and all(part in text for part, text in zip(says, alarms))
