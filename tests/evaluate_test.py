"""avg@n, pass@k and maj@k by hand and over all subsets; intervals; and batches that are filled up."""

import itertools
import json
import math

import jax
import numpy as np
import pytest

from kr_jax import evaluate
from kr_jax import processes
from kr_jax import knobs as knobs_lib
from kr_jax import rewards
from kr_jax import sample
from kr_jax import types
from kr_jax.model import decode
from kr_jax.model import policy
from kr_jax.model import tokenizer
from kr_jax.rewards import verdicts as verdicts_lib
from tests import knobs

POLICY = policy.Config(
    vocab_size=5, num_layers=1, width=8, num_heads=1, num_kv_heads=1, head_width=8, hidden_width=8,
    rope_theta=100.0, norm_eps=1e-6, qk_norm=False, qkv_bias=False, tie_embeddings=True,
    dtype='float32', remat='none', lora_rank=0, lora_alpha=1.0)
SAMPLE = knobs.sampler(slots=8, refill=1, prompt_length=3, completion_length=3)
TOKENIZER = tokenizer.Characters('abc')


def make_tasks(count):
  return [types.Task(id=f't{i}', index=i, prompt='abc'[:i % 3 + 1], answer='abc'[i % 3],
                     difficulty=i % 2, solution='', tokens=TOKENIZER.encode('abc'[:i % 3 + 1]))
          for i in range(count)]


def verdicts(*counts, of):
  """As many right rollouts of each task."""
  return np.arange(of) < np.array(counts)[:, None]


def outcomes(right_IR, answer_IR=None):
  """Of rollouts that are right or wrong."""
  return evaluate.Outcomes(np.where(right_IR, verdicts_lib.RIGHT, verdicts_lib.WRONG).astype(np.int8), answer_IR)


def of_letters(*letters_I):
  """Of a text a task: r is right, w wrong, - no answer, t a timeout, a an abstention."""
  codes = {'r': verdicts_lib.RIGHT, 'w': verdicts_lib.WRONG, '-': verdicts_lib.NO_ANSWER, 't': verdicts_lib.TIMEOUT,
           'a': verdicts_lib.ABSTAINED}
  return evaluate.Outcomes(np.array([[codes[x] for x in letters] for letters in letters_I], np.int8), None)


def pass_of(right_IR, k):
  """pass@k where all is verified."""
  return evaluate.pass_at(right_IR, np.ones_like(right_IR, bool), k)


def of_subsets(function, n, k):
  """The mean of a function of indices over all subsets of k of n."""
  return np.mean([function(list(subset)) for subset in itertools.combinations(range(n), k)])


def maj_of(answers, rights, k):
  """maj@k of one task."""
  rights = np.array([rights], bool)
  return evaluate.maj_at(rights, np.ones_like(rights), np.array([list(answers)], object), k)[0]


def test_pass_by_hand():
  for n, c, k, want in ((4, 1, 2, 0.5), (4, 0, 2, 0), (4, 4, 1, 1), (4, 1, 4, 1), (4, 3, 2, 1),
                        (8, 2, 4, 1 - 15 / 70), (1, 1, 1, 1), (5, 2, 1, 0.4)):
    assert pass_of(verdicts(c, of=n), k)[0] == pytest.approx(want, abs=1e-15)


@pytest.mark.parametrize('n', [1, 2, 5, 8])
def test_pass_over_all_subsets(n):
  for k in range(1, n + 1):
    verdict_IR = verdicts(*range(n + 1), of=n)
    want = [of_subsets(lambda some: verdict_R[some].any(), n, k) for verdict_R in verdict_IR]
    np.testing.assert_allclose(pass_of(verdict_IR, k), want, atol=1e-14)


def test_pass_where_binomials_do_not_fit():
  n, c, k = 1500, 3, 700
  want = 1 - math.comb(n - c, k) / math.comb(n, k)  # integers of Python
  np.testing.assert_allclose(pass_of(verdicts(c, of=n), k), want, rtol=1e-12)


@pytest.mark.parametrize('answers, rights, k, want', [
    ('xxy', [1, 1, 0], 3, 1),
    ('xyy', [1, 0, 0], 3, 0),
    ('xyy', [1, 0, 0], 1, 1 / 3),
    ('xyy', [1, 0, 0], 2, 1 / 3),  # xy twice: a tie; yy
    ('xxyyz', [1, 1, 0, 0, 0], 5, 1 / 2),  # two answers tie
    ('xyz', [1, 0, 0], 3, 1 / 3),  # three
    ((None, None, 'x'), [0, 0, 1], 3, 1),  # no answer, no vote
    ((None, None, 'x'), [0, 0, 1], 1, 1 / 3),
    ((None, None), [0, 0], 2, 0),
    ('xxyy', [1, 0, 0, 0], 4, 1 / 4),  # a tie, and x is right every other time
    ('xxxx', [1, 1, 1, 1], 2, 1),
])
def test_majority_by_hand(answers, rights, k, want):
  assert maj_of(answers, rights, k) == pytest.approx(want, abs=1e-14)


def majority_by_counting(answer_R, verdict_R):
  votes = [a for a in answer_R if a is not None]
  most = [a for a in set(votes) if votes.count(a) == max(map(votes.count, votes))]
  return np.mean([bool(a in 'xw') for a in most]) if most else 0.0


@pytest.mark.parametrize('seed', range(5))
def test_majority_over_all_subsets(seed):
  rng = np.random.default_rng(seed)
  n = int(rng.integers(1, 9))
  answer_R = rng.choice(np.array(['x', 'y', 'z', 'w', None], object)[:rng.integers(1, 6)], n)
  verdict_R = np.array([a is not None and a in 'xw' for a in answer_R])  # two answers may be right
  for k in range(1, n + 1):
    want = of_subsets(lambda some: majority_by_counting(answer_R[some], verdict_R[some]), n, k)
    assert maj_of(answer_R, verdict_R, k) == pytest.approx(want, abs=1e-12)


def test_majority_of_many():
  """One vote is avg; two answers, 300 to 200 votes: a large draw is nearly always right."""
  rights = np.arange(500) < 300
  answers = np.where(rights, 'x', 'y')
  assert maj_of(answers, rights, 1) == pytest.approx(0.6, rel=1e-12)
  assert 0.9999 < maj_of(answers, rights, 251) <= 1
  assert maj_of(answers, rights, 500) == pytest.approx(1, rel=1e-12)


# Rollouts that are not verified.


def test_unverified_rollouts_are_left_out_of_every_metric_by_hand():
  """Of four tasks 4, 3, 2 and 0 of 4 rollouts are verified; 2, 1, 0 and none are right."""
  found = of_letters('rrw-', 'rtww', 'wa-t', 'tttt')
  nan = np.nan
  for k, want in ((1, [1 / 2, 1 / 3, 0, nan]), (2, [1 - 1 / 6, 2 / 3, 0, nan]), (3, [1, 1, nan, nan]),
                  (4, [1, nan, nan, nan]), (5, [nan] * 4)):
    np.testing.assert_allclose(evaluate.pass_at(found.right_IR, found.verified_IR, k), want, atol=1e-15)
  np.testing.assert_allclose(evaluate.avg(found.right_IR, found.verified_IR), [1 / 2, 1 / 3, 0, nan])
  # The rollout that timed out has no vote: two of y to one of x, not a tie.
  answer_IR = np.array([list('xxyz'), list('xxyy'), list('yyyy'), list('xxxx')])
  # Three of the first task's: xxy and xxz are right, and of xyz, twice, three answers tie.
  for k, want in ((1, [1 / 2, 1 / 3, 0, nan]), (3, [2 / 3, 0, nan, nan]), (4, [1, nan, nan, nan])):
    np.testing.assert_allclose(evaluate.maj_at(found.right_IR, found.verified_IR, answer_IR, k), want, atol=1e-14)


@pytest.mark.parametrize('seed', range(3))
def test_metrics_are_those_of_the_verified_rollouts_alone(seed):
  """Of each task as if the others had not been sampled, over all subsets of k."""
  rng = np.random.default_rng(seed)
  right_IR, verified_IR = rng.random((2, 5, 6)) < 0.6
  answer_IR = rng.choice(np.array(['x', 'y', 'z', None], object), (5, 6))
  right_IR = np.where(answer_IR == 'x', True, right_IR & (answer_IR != None))  # noqa: E711, of each element
  for k in range(1, 7):
    found = (evaluate.pass_at(right_IR, verified_IR, k), evaluate.maj_at(right_IR, verified_IR, answer_IR, k))
    for i, verified_R in enumerate(verified_IR):
      n = verified_R.sum()
      if n < k:
        assert np.isnan([x_I[i] for x_I in found]).all()
        continue
      right_R, answer_R = right_IR[i, verified_R], answer_IR[i, verified_R]
      assert found[0][i] == pytest.approx(of_subsets(lambda some: right_R[some].any(), n, k), abs=1e-13)
      assert found[1][i] == maj_of(answer_R, right_R, k)


def test_a_summary_counts_what_is_left_out():
  found = of_letters('rrw-', 'rtww', 'wa-t', 'tttt')
  summary = evaluate.summarize(found, make_tasks(4), ['one', 'one', 'two', 'three'], passes=(2, 4))
  measured = evaluate.record(summary)
  assert measured['eval/unverified'] == 7 / 16 and measured['eval/no_answer'] == 2 / 16
  assert (measured['eval/unverified_timeout'], measured['eval/unverified_abstained']) == (6, 1)
  assert measured['eval/avg@4'] == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
  assert measured['eval/pass@2'] == pytest.approx((5 / 6 + 2 / 3 + 0) / 3) and measured['eval/pass@4'] == 1
  assert [measured[f'eval/{name}_left_out'] for name in ('avg@4', 'pass@2', 'pass@4')] == [1, 1, 3]
  assert measured['eval_tasks'] == {'right': [2, 1, 0, 0], 'verified': [4, 3, 2, 0]}
  three = summary['groups']['source_three']
  assert three['tasks'] == 1
  assert three['metrics']['avg@4'] == {'mean': None, 'stderr': None, 'low': None, 'high': None, 'left_out': 1}
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary
  *lines, last = evaluate.table(summary).splitlines()
  assert lines[-2].split() == [
      'difficulty_1', '2', '0.333', '[0.333,', '0.333]', '0.667', '[0.667,', '0.667]', 'unknown']
  assert last == ('43.8% of the rollouts are unverified and left out (abstained 1, timeout 6); tasks that are left '
                  'out: 1 of avg@4, 1 of pass@2, 3 of pass@4')


def test_a_summary_of_nothing_verified():
  summary = evaluate.summarize(of_letters('tt', 'aa'), make_tasks(2), ['one'] * 2, passes=(1,))
  assert evaluate.record(summary)['eval/avg@2'] is None is evaluate.record(summary)['eval/pass@1_low']
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary
  assert '100.0% of the rollouts are unverified' in evaluate.table(summary)


def test_interval_is_near_the_normal_one():
  rate_I = np.random.default_rng(1).binomial(8, 0.3, size=2000) / 8
  low, high = evaluate.interval(rate_I)
  error = rate_I.std(ddof=1) / 2000 ** 0.5
  np.testing.assert_allclose([low, high], rate_I.mean() + np.array([-1.96, 1.96]) * error,
                             atol=0.15 * error)
  assert evaluate.interval(rate_I) == evaluate.interval(rate_I[::-1]) == (low, high)


def test_interval_by_enumeration():
  """Of 0 and 1, resamples have the mean 0, 1/2, 1/2, 1: 2.5 % lies at 0, 97.5 % at 1."""
  assert evaluate.interval(np.array([0.0, 1.0])) == (0, 1)
  # Of seven 1s and a 0, a mean below 5/8 has the chance 1.6 %, one below 6/8 7.8 %.
  assert evaluate.interval(np.array([1.0] * 7 + [0.0])) == (0.625, 1)
  assert evaluate.interval(np.full(3, 0.3)) == pytest.approx((0.3, 0.3))


def test_interval_covers_the_mean_it_is_of():
  rng = np.random.default_rng(2)
  covered = [low <= 0.25 <= high for low, high in (
      evaluate.interval(rng.binomial(4, rng.choice([0.0, 0.5], size=100)) / 4) for _ in range(200))]
  assert 0.9 <= np.mean(covered) <= 0.99


def test_summary_by_hand():
  found = outcomes(verdicts(8, 0, 4, 2, of=8))
  summary = evaluate.summarize(found, make_tasks(4), ['one', 'one', 'one', 'two'], passes=(1, 8))
  measured = evaluate.record(summary)
  assert measured['eval/avg@8'] == 0.4375
  # Squared distances .5625^2 + .4375^2 + .0625^2 + .1875^2 = .546875, over 3, over 4 tasks.
  np.testing.assert_allclose(measured['eval/avg@8_stderr'], (0.546875 / 3 / 4) ** 0.5)
  assert measured['eval/difficulty_0/avg@8'] == 0.75
  assert measured['eval/difficulty_1/avg@8'] == 0.125
  assert measured['eval/difficulty_0/avg@8_stderr'] == 0.25
  assert measured['eval/difficulty_0/avg@8_low'] == 0.5
  assert measured['eval/difficulty_0/avg@8_high'] == 1
  assert measured['eval/source_one/avg@8'] == 0.5
  assert measured['eval/source_two/avg@8'] == 0.25
  np.testing.assert_allclose(measured['eval/pass@1'], 0.4375)
  assert measured['eval/pass@8'] == 0.75
  assert measured['eval/unverified'] == measured['eval/unverified_died'] == measured['eval/pass@8_left_out'] == 0
  groups = summary['groups']
  assert {name: x['tasks'] for name, x in groups.items()} == {
      'all': 4, 'source_one': 3, 'source_two': 1, 'difficulty_0': 2, 'difficulty_1': 2}
  # Shares, counts of five kinds and of extractions; of each group and metric an estimate; tasks that are left out; and
  # counts of each task.
  assert len(measured) == 2 + 5 + 1 + 5 * 3 * 4 + 3 + 1
  assert measured['eval_tasks'] == {'right': [8, 0, 4, 2], 'verified': [8] * 4}


def test_a_summary_is_json_as_it_is():
  answer_IR = np.array([['a', 'b'], [None, 'b'], ['c', 'c']], object)
  summary = evaluate.summarize(outcomes(verdicts(1, 0, 2, of=2), answer_IR), make_tasks(3), ['s'] * 3,
                               passes=[2], majorities=[1, 2])
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary
  assert summary['groups']['all']['metrics']['maj@2']['mean'] == pytest.approx((0.5 + 0 + 1) / 3)


def test_table():
  summary = evaluate.summarize(outcomes(verdicts(2, 0, of=2)), make_tasks(2), ['made'] * 2, passes=[2])
  assert evaluate.table(summary) == '''\
              tasks  avg@2                 pass@2
all               2  0.500 [0.000, 1.000]  0.500 [0.000, 1.000]
source_made       2  0.500 [0.000, 1.000]  0.500 [0.000, 1.000]
difficulty_0      1  1.000 [1.000, 1.000]  1.000 [1.000, 1.000]
difficulty_1      1  0.000 [0.000, 0.000]  0.000 [0.000, 0.000]
mean [95 % bootstrap interval over tasks]'''


def test_one_task_has_no_spread():
  summary = evaluate.summarize(outcomes(verdicts(1, of=2)), make_tasks(1), ['made'])
  assert summary['groups']['all']['metrics']['avg@2'] == {
      'mean': 0.5, 'stderr': 0, 'low': 0.5, 'high': 0.5, 'left_out': 0}


def test_a_vote_needs_answers_of_every_verifier():
  evaluate.check_verifiers(['ends_with', 'math', 'choice', 'reasoning_gym'], (8,))
  evaluate.check_verifiers(['ends_with', 'mute'], ())
  with pytest.raises(ValueError, match=r"verifier 'mute' has no extraction .*evaluate.maj_at=\(\)"):
    evaluate.check_verifiers(['ends_with', 'mute'], (8,))


@pytest.mark.parametrize(
    'batch', [pytest.param(2, marks=pytest.mark.exhaustive), pytest.param(5, marks=pytest.mark.exhaustive),
              pytest.param(7, marks=pytest.mark.slow)])
def test_outcomes_do_not_depend_on_the_batch(batch):
  """And equal what a plain loop over tasks verifies."""
  tasks = make_tasks(5)
  params = decode.sampling_params(POLICY, jax.tree.map(lambda x: 4 * x, policy.init(POLICY, jax.random.key(0))))
  key = jax.random.key(5)
  with rewards.Workers(knobs.verifiers('ends_with', timeout_s=60.0)) as workers:
    found = evaluate.outcomes(
        POLICY, params, tasks, key, SAMPLE, workers, TOKENIZER, rollouts=6, batch=batch, answers=True)
  verdicts_of, answers_of = [], []
  for task in tasks:
    # Alone, by the program of a batch of 7: the budgets of the others are 0.
    token_MP = np.zeros((7, 3), np.int32)
    token_MP[0, :len(task.tokens)] = task.tokens
    rollouts = sample.rollouts(
        POLICY, params, types.Prompts(token_MP, np.full(7, len(task.tokens)), np.full(7, task.index)),
        np.array([6] + [0] * 6), key, SAMPLE, total=42)
    texts = [TOKENIZER.decode(token_C) for token_C in rollouts.token_RC[:6]]
    verdicts_of.append([text.endswith(task.answer) for text in texts])
    answers_of.append([text[-1:] or None for text in texts])
  np.testing.assert_array_equal(found.right_IR, verdicts_of)
  # Equal where the answers are.
  number = {None: 0} | {a: found.answer_IR[i, r] for i, row in enumerate(answers_of) for r, a in enumerate(row) if a}
  assert found.answer_IR.tolist() == [[number[a] for a in row] for row in answers_of]
  assert len(set(number.values())) == len(number)
  assert found.verified_IR.all() and found.failed_extractions == 0
  assert 0 < found.right_IR.mean() < 1 and len(number) > 2


class Abstains:
  """Workers that abstain on every third completion, and find no answer in time of two."""

  def score(self, texts, tasks):
    self.scored = list(texts)
    assert len(self.scored) == len(tasks)
    outcome_R = np.where(np.arange(len(tasks)) % 3 == 0, verdicts_lib.ABSTAINED, verdicts_lib.RIGHT)
    return rewards.Scores(outcome_R.astype(np.int8), np.zeros(len(tasks), np.float32))

  def answers(self, texts, tasks):
    self.answered = list(texts)
    return rewards.Answers((None,) * 2 + ('a',) * (len(tasks) - 2), 1, 1)


def test_outcomes_keep_what_came_of_verifying_and_of_extracting():
  """The tasks that fill up a batch are not verified."""
  pool = Abstains()
  params = decode.sampling_params(POLICY, policy.init(POLICY, jax.random.key(0)))
  found = evaluate.outcomes(POLICY, params, make_tasks(5), jax.random.key(5), SAMPLE, pool, TOKENIZER, rollouts=6,
                            batch=7, answers=True)
  assert found.verified_IR.tolist() == [[False, True, True] * 2] * 5 and found.failed_extractions == 2
  assert pool.scored == pool.answered and len(pool.scored) == 30
  assert (found.answer_IR == 0).sum() == 2 and len(np.unique(found.answer_IR)) == 2


class StopIf(processes.StopSignal):
  """As told to stop once a function says so."""

  def __init__(self, is_told):
    super().__init__('the evaluation')
    self._is_told = is_told

  def __call__(self):
    return self._is_told()


def test_an_evaluation_tells_of_its_batches_and_stops_between_them():
  """Of ten tasks in two batches; what fills up the second is not counted. Asked to stop, it ends without a result."""
  params = decode.sampling_params(POLICY, policy.init(POLICY, jax.random.key(0)))
  tasks, done = make_tasks(10), []
  run = lambda **kwargs: evaluate.outcomes(POLICY, params, tasks, jax.random.key(5), SAMPLE, Abstains(), TOKENIZER,
                                           rollouts=6, batch=7, progress=done.append, **kwargs)
  found = run(stopping=StopIf(lambda: False))
  assert found.outcome_IR.shape == (10, 6) and done == [42, 18]
  with pytest.raises(processes.Stopped, match='stopped in the evaluation'):
    run(stopping=StopIf(lambda: len(done) > 2))
  assert done == [42, 18, 42]


# Perturbed prompts.


PROSE = ('Natalia sold clips to seven friends (48 of them), then about half as many later. Each `plain string` costs '
         '$x$ dollars, or $\\frac{total amount}{12}$; her "quoted words here" stay.\n    indent = total\n'
         'Please put the final answer within \\boxed{the number}.')


def test_perturbations_by_hand():
  perturb = lambda text, name: evaluate.perturb(text, name, 'a')
  assert perturb('She bakes 3 for $4', 'case') == 'She BAKES 3 for $4'
  assert perturb('She bakes 3 for $4', 'spaces') == 'She  bakes 3 for $4'
  assert perturb('She bakes 3 for $4', 'typos') in ('She bkaes 3 for $4', 'She baeks 3 for $4')
  assert perturb('12+34=', 'opening').endswith('\n\n12+34=') and perturb('12+34=', 'typos') == '12+34='
  # Nothing that a meaning hangs on: numbers and operators, names, calls, code, LaTeX, quotations.
  for text in ('seven hundredths minus twenty', 'Alice and Bob', 'print(total)', '```\nwhile count\n```',
               '`while count`', '$while count$', '\\[ while count \\]', 'a "small words" b', "a 'small words' b",
               '\\boxed{while count }', '\twhile count', 'x = total_count', 'non-zero', 'eight', ''):
    for name in ('case', 'spaces', 'typos'):
      assert perturb(text, name) == text


@pytest.mark.parametrize('seed', ['a', 'b', 'c'])
def test_perturbations_keep_all_but_what_they_are_of(seed):
  case, spaces, typos, opening = (evaluate.perturb(PROSE, name, seed) for name in (
      'case', 'spaces', 'typos', 'opening'))
  assert case != PROSE and case.lower() == PROSE.lower()
  assert spaces != PROSE and spaces.split() == PROSE.split()
  assert typos != PROSE and opening != PROSE and opening.endswith(PROSE)
  for new, old in zip(typos.split(' '), PROSE.split(' '), strict=True):
    assert sorted(new) == sorted(old) and (new[:1], new[-1:]) == (old[:1], old[-1:])
  kept = ('Natalia', 'seven', '48', 'half', '`plain string`', '$\\frac{total amount}{12}$', '"quoted words here"',
          '    indent = total', '\\boxed{the number}')
  assert all(text.count(x) == 1 for text in (case, spaces, typos, opening) for x in kept)
  assert typos == evaluate.perturb(PROSE, 'typos', seed)  # and nothing else than the task
  assert len({evaluate.perturb(PROSE, 'typos', f'{seed}{i}') for i in range(8)}) > 1


def test_perturbed_tasks_and_what_cannot_be_perturbed():
  letters = tokenizer.Characters('abcdefghijklmnopqrstuvwxyz ')
  tasks = [task._replace(prompt=text, tokens=letters.encode(text), verifier=verifier) for task, text, verifier in zip(
      make_tasks(3), ('abc', 'count the letters', 'sum'), ('', 'math', ''))]
  perturbed = lambda name, some=tasks, verifier='ends_with', length=20: evaluate.perturbed(
      some, name, letters, prompt_length=length, verifier=verifier)
  found = perturbed('spaces')
  assert [task.tokens == letters.encode(task.prompt) for task in found] == [True] * 3
  assert [new == task for new, task in zip(found, tasks)] == [True, False, True]
  assert found[1]._replace(prompt='', tokens=()) == tasks[1]._replace(prompt='', tokens=())
  for what, call in {
      r"perturb='case' makes a prompt of 't1' that the policy cannot read: .* not in the alphabet .*; leave 'case' out":
          lambda: perturbed('case'),
      r"perturb='typos' changes none of the 2 held-out prompts.*leave 'typos' out":
          lambda: perturbed('typos', [tasks[0], tasks[2]]),
      r"perturb='typos' may change what 't0' asks.*'reasoning_gym' letters.*use 'opening'":
          lambda: perturbed('typos', verifier='reasoning_gym'),
      r"perturb='spaces': the prompt of 't1' has 1\d tokens, not 1..sample.prompt_length=17; set the knob to":
          lambda: perturbed('spaces', length=17)}.items():
    with pytest.raises(ValueError, match=what):
      call()
  for wrong in (('typo',), ('case', 'case')):
    with pytest.raises(ValueError, match=r"evaluate.perturb=\(.* must hold names of \('case', .*each once"):
      knobs_lib.Evaluate(perturb=wrong)


def test_ratio_by_hand():
  """Of tasks with both; of two tasks one is drawn twice with the chance 1/2."""
  assert evaluate.ratio(np.array([0.25, 0.5, np.nan, 1]), np.array([0.5, 0.5, 0.5, np.nan])) == {
      'mean': 0.75, 'low': 0.5, 'high': 1.0}
  # A resample without the second task, a quarter of them, has no ratio.
  assert evaluate.ratio(np.array([0.0, 0.5]), np.array([0.0, 1.0])) == {'mean': 0.5, 'low': 0, 'high': None}
  nothing = {'mean': None, 'low': None, 'high': None}
  assert evaluate.ratio(np.array([0.5, np.nan]), np.array([0.0, 1.0])) == evaluate.ratio(*np.zeros((2, 0))) == nothing


def test_ratio_is_that_of_a_plain_bootstrap():
  rng = np.random.default_rng(0)
  y_I = rng.binomial(8, 0.5, 300) / 8
  x_I = rng.binomial(8, 0.8 * y_I) / 8
  row_XI = rng.integers(300, size=(4000, 300))
  want = np.quantile(x_I[row_XI].sum(axis=1) / y_I[row_XI].sum(axis=1), (0.025, 0.975))
  found = evaluate.ratio(x_I, y_I)
  assert found['mean'] == x_I.mean() / y_I.mean()
  np.testing.assert_allclose([found['low'], found['high']], want, atol=0.1 * np.ptp(want))


def test_robustness_stands_beside_the_other_figures():
  tasks, found = make_tasks(4), of_letters('rrr-', 'rrww', 'wwww', 'tttt')
  others = [task._replace(tokens=()) if i < 3 else task for i, task in enumerate(tasks)]
  of_perturbed = of_letters('rrww', 'rwww', 'wwww', 'rrrr')
  summary = evaluate.summarize(found, tasks, ['made'] * 4, passes=[2])
  assert 'perturbed' not in ' '.join(evaluate.record(summary))
  summary['perturbed'] = {'typos': evaluate.robustness(found, of_perturbed, tasks, others)}
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary
  measured = evaluate.record(summary)
  assert {name.removeprefix('eval/perturbed_typos/'): x for name, x in measured.items() if 'perturbed' in name} == {
      'avg@4': 0.4375, 'avg@4_stderr': pytest.approx(0.2135, abs=1e-4), 'avg@4_low': 0.125, 'avg@4_high': 0.8125,
      'ratio': pytest.approx((0.5 + 0.25) / (0.75 + 0.5)), 'ratio_low': 0.0, 'ratio_high': None, 'changed': 0.75}
  lines = evaluate.table(summary).splitlines()
  assert lines[5].split() == ['perturbed_typos', '4', '0.438', '[0.125,', '0.812]']  # and no pass@2
  assert lines[-1] == ('perturbed_typos: 0.600 [0.000, unknown] times the avg@4 of the same tasks unperturbed; 75% of '
                       'the prompts are changed')
  summary['perturbed'] = {'case': evaluate.robustness(of_letters(*['wwww'] * 4), of_perturbed, tasks, tasks)}
  assert evaluate.table(summary).splitlines()[-1] == (
      'perturbed_case: no ratio, as nothing is right unperturbed; 0% of the prompts are changed')


@pytest.mark.slow
def test_a_greedy_rollout_is_the_most_likely_one():
  """Whatever the key."""
  params = decode.sampling_params(POLICY, policy.init(POLICY, jax.random.key(0)))
  with rewards.Workers(knobs.verifiers('ends_with', timeout_s=60.0)) as workers:
    one, two = (evaluate.outcomes(
        POLICY, params, make_tasks(3), jax.random.key(seed), SAMPLE.replace(temperature=0.0), workers,
        TOKENIZER, rollouts=1, batch=3, answers=True) for seed in (0, 1))
  np.testing.assert_array_equal(one.outcome_IR, two.outcome_IR)
  np.testing.assert_array_equal(one.answer_IR, two.answer_IR)
