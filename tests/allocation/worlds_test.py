"""The worlds by hand, and their rules against the oracle and against chance."""

import functools
import itertools
import re

import numpy as np
import pytest

from kr_jax import knobs
from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.allocation import worlds
from kr_jax.allocation.worlds import LearningSetup, Method, StaticSetup
from kr_jax.learning import grpo

STATIC = StaticSetup(tasks=24, repeats=3, high=40)
LEARNING = LearningSetup(tasks=64, features=6, per_step=16, steps=8, seeds=2, fitted_steps=1)


def of(*rates):
  """The population that holds exactly these tasks."""
  return {'mine': worlds.Population(lambda rng, M: np.array(rates, float))}


# The static world.


def test_uniform_by_hand():
  """Of .5 and 0, two rollouts each: only .5 counts; the oracle gives it all but the floor of 0."""
  result = worlds.static(of(0.5, 0), StaticSetup(tasks=2, per_task=2, low=1, repeats=2))['mine']
  # V(2, .5) = 1/2 of what a mixed group is worth, V(3, .5) = 3/4.
  assert result['uniform']['objective'] == pytest.approx([100 * 2 / 3, 0])
  assert result['uniform']['mixed_tasks'] == pytest.approx([0.5, 0])
  assert result['uniform']['effective_gradient_ratio'] == pytest.approx([2 * 0.5 / 4, 0])
  assert result['oracle']['objective'] == pytest.approx([100, 0])
  assert result['oracle']['mixed_tasks'] == pytest.approx([0.75, 0])
  assert result['oracle']['effective_gradient_ratio'] == pytest.approx([3 * 0.75 / 4, 0])


def test_budgets_of_each_rule_by_hand():
  """Histories of 8 with 4, 0 and 8 successes; 12 rollouts, at least 2 each."""
  p_M = np.array([0.6, 0.1, 0.9])
  task_R = np.repeat(np.arange(3), 8)
  stats = estimate.observe(
      estimate.init(3), np.arange(3), task_R, np.repeat([1, 0, 0, 1.0], [4, 4, 8, 8]),
      np.ones(24), discount=1.0)
  budgets = worlds.rule_budgets(p_M, stats, (0.5, 0.5), StaticSetup(per_task=4))
  np.testing.assert_array_equal(budgets['uniform'], [4, 4, 4])
  # ln(0.1) / ln(0.5) = 3 more for the task at 1/2; the surplus to the task at 0.
  np.testing.assert_array_equal(budgets['paper'], [5, 5, 2])
  np.testing.assert_array_equal(budgets['point'], [8, 2, 2])
  np.testing.assert_array_equal(budgets['oracle'], allocate.budgets(p_M, 12))
  np.testing.assert_array_equal(
      budgets['known prior'],
      allocate.budgets(allocate.Beta([4.5, 0.5, 8.5], [4.5, 8.5, 0.5]), 12, solver='greedy'))
  assert budgets['posterior'].sum() == 12 and budgets['posterior'][1] > budgets['posterior'][2]


def outcomes(tasks, rollouts):
  """Every luck_MN of tasks at 1/2, all of them equally likely."""
  for verdicts in itertools.product((0.0, 0.9), repeat=tasks * rollouts):
    yield np.array(verdicts).reshape(tasks, rollouts)


@pytest.mark.parametrize('value', knobs.Alloc.choices('value'))
@pytest.mark.parametrize('waves', [1, 2, 3])
def test_waves_over_all_outcomes(value, waves):
  """What waves are expected to give, on the mean of all outcomes, is what they do give."""
  p_M = np.array([0.5, 0.5])
  alloc = worlds.alloc_of(StaticSetup(per_task=2, low=1, high=3), 2, value=value, nu=2.0, waves=waves)
  forecast = allocate.Beta(np.array([2.0, 0.5]), np.array([2.0, 3.0]))
  expected, observed = [], []
  whole_M = allocate.objective  # V(N, p) of one task, of whole groups
  for luck_MN in outcomes(2, 3):
    spent = worlds.spend(forecast, p_M, luck_MN, alloc)
    n_M, right_M = spent.budget_M, np.array([(luck < 0.5)[:n].sum() for luck, n in zip(luck_MN, spent.budget_M)])
    assert n_M.sum() == 4 and np.all((1 <= n_M) & (n_M <= 3))
    np.testing.assert_array_equal(spent.right_M, right_M)
    np.testing.assert_array_equal(spent.verdict_R, np.concatenate(
        [(luck < 0.5)[:n] for luck, n in zip(luck_MN, n_M)]))
    mixed_M = (0 < right_M) & (right_M < n_M)
    if value in ('snr', 'coba'):
      objective = whole_M(p_M, n_M, value)
    else:
      once = {'infogain': 1 / 8, 'variance': 1 / 4, 'mixed': 1.0}
      objective = np.sum(right_M > 0) if value == 'hit' else once[value] * mixed_M.sum()
    expected.append((spent.objective, spent.mixed_tasks, spent.gradient_ratio))
    observed.append((objective, mixed_M.sum(), n_M @ mixed_M / 4))
  np.testing.assert_allclose(np.mean(expected, axis=0), np.mean(observed, axis=0), atol=1e-12)


def test_one_wave_is_judged_as_its_budgets():
  p_M, rng = np.array([0.2, 0.7, 0.5, 0.99]), np.random.default_rng(0)
  alloc = worlds.alloc_of(STATIC, 4, value='infogain', nu=2.0)
  spent = worlds.spend(p_M, p_M, rng.random((4, 40)), alloc)
  np.testing.assert_array_equal(spent.budget_M, allocate.budgets(p_M, 32, high=40))
  assert spent.objective == pytest.approx(allocate.objective(p_M, spent.budget_M))
  assert spent.mixed_tasks == pytest.approx(allocate.expected_mixed_tasks(p_M, spent.budget_M))
  assert spent.gradient_ratio == pytest.approx(allocate.expected_gradient_ratio(p_M, spent.budget_M))


def test_a_second_wave_goes_where_the_first_failed():
  """Two tasks at 1/2 as far as anyone knows, two rollouts each; the one that is mixed already gets no more."""
  forecast = allocate.Beta(np.array([4.0, 4.0]), np.array([4.0, 4.0]))
  luck_MN = np.array([[0.1, 0.9, 0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.9, 0.1, 0.1, 0.1]])
  alloc = worlds.alloc_of(StaticSetup(per_task=4, low=1, high=6), 2, value='infogain', nu=2.0, waves=2)
  spent = worlds.spend(forecast, np.array([0.5, 0.5]), luck_MN, alloc)
  np.testing.assert_array_equal(spent.budget_M, [2, 6])
  np.testing.assert_array_equal(spent.right_M, [1, 3])
  # Wave 1: each is mixed with probability 1/2. Wave 2: with 1 - 2^-4 the second is. A mixed group is worth 1/8.
  assert spent.objective == pytest.approx((0.5 + 0.5 + 15 / 16) / 8)
  assert spent.mixed_tasks == pytest.approx(1 + 15 / 16)
  assert spent.gradient_ratio == pytest.approx((2 + 6 * 15 / 16) / 8)


def test_later_waves_know_the_verdicts_of_earlier_ones():
  """Of equal forecasts, and equal groups, the mixed one's is nearer to 1/2 than those all right and all wrong."""
  forecast, p_M = allocate.Beta(np.full(3, 0.5), np.full(3, 0.5)), np.full(3, 0.5)
  luck_MN = np.tile(np.array([[0.1], [0.9], [0.1]]), 12)
  luck_MN[2, 1] = 0.9
  alloc = worlds.alloc_of(StaticSetup(per_task=6, low=3, high=12), 3, value='snr', nu=2.0, waves=2)
  solve = functools.partial(allocate.budgets, total_budget=9, value='snr')
  first_M = solve(forecast, low=2, high=11)
  right_M = np.array([(luck < p)[:n].sum() for luck, p, n in zip(luck_MN, p_M, first_M)])
  group = allocate.Group(right_M, first_M - right_M)
  posterior = allocate.Beta(forecast.a_M + right_M, forecast.b_M + first_M - right_M)
  more_M, blind_M = (solve(rate, low=1, high=12, group=group) for rate in (posterior, forecast))
  assert not np.array_equal(more_M, blind_M)
  np.testing.assert_array_equal(worlds.spend(forecast, p_M, luck_MN, alloc).budget_M, first_M + more_M)


def test_waves_stay_within_the_bounds():
  """One task is worth all that there is; its second wave needs a rollout of the four that it may have."""
  p_M = np.array([0.5] + [1e-6] * 7)
  alloc = worlds.alloc_of(StaticSetup(per_task=3, low=2, high=4), 8, value='infogain', nu=2.0, waves=2)
  budget_M = worlds.spend(p_M, p_M, np.full((8, 4), 0.9), alloc).budget_M
  assert budget_M[0] == 4 and budget_M.sum() == 24 and budget_M.min() >= 2


@pytest.mark.exhaustive
def test_waves_beat_one_wave():
  result = worlds.static({'Beta(1,1)': worlds.beta_populations()['Beta(1,1)']}, STATIC.replace(repeats=80))['Beta(1,1)']
  for rule in ('2 waves / one wave', '3 waves / one wave'):
    mean, half = result[rule]['objective']
    assert 100 < mean - half < mean < 125
  few = worlds.static(of(0.5, 0.1), StaticSetup(tasks=2, per_task=2, repeats=2))['mine']
  assert '2 waves' in few and '3 waves' not in few  # which 4 rollouts of 2 tasks cannot have


def test_no_rule_beats_the_oracle():
  for seed, value in enumerate(knobs.Alloc.choices('value')):
    setup, rng = STATIC.replace(value=value), np.random.default_rng(seed)
    p_M = rng.beta(0.5, 0.5, setup.tasks)
    budgets = worlds.rule_budgets(p_M, worlds.observed(p_M, setup.history, rng), (0.5, 0.5), setup)
    for rule, (objective, *_) in worlds.judge(p_M, budgets, setup).items():
      assert budgets[rule].sum() == setup.tasks * setup.per_task
      assert objective <= 100 + 1e-4


def test_without_history_no_rule_tells_tasks_apart():
  p_M = np.random.default_rng(0).uniform(size=STATIC.tasks)
  stats = worlds.observed(p_M, 0, np.random.default_rng(0))
  budgets = worlds.rule_budgets(p_M, stats, None, STATIC)
  for rule in ('uniform', 'paper', 'point', 'posterior'):
    np.testing.assert_array_equal(budgets[rule], np.full(STATIC.tasks, STATIC.per_task))


def test_tasks_that_cannot_be_mixed_are_all_a_rule_can_do():
  result = worlds.static(of(0, 1), StaticSetup(tasks=2, repeats=2))['mine']
  assert all(measured['objective'] == [100, 0] for rule, measured in result.items()
             if rule in worlds.RULES)


def test_interval_by_hand():
  """Of 1, 2, 3: deviation 1, t(.975, 2) = 4.302653."""
  assert worlds.interval([1, 2, 3]) == pytest.approx([2, 4.302653 / 3 ** 0.5])


def test_static_repeats_with_its_seed():
  populations = worlds.beta_populations()
  one = worlds.static(populations, STATIC)
  assert one == worlds.static(populations, STATIC)
  assert one != worlds.static(populations, STATIC.replace(seed=1))
  assert list(one) == ['Beta(0.5,0.5)', 'Beta(1,1)', 'Beta(0.2,0.2)', 'Beta(0.15,0.6)']
  for by_rule in one.values():
    for measure in worlds.MEASURES:
      for rule in ('posterior', 'known prior'):
        assert by_rule[f'{rule} - paper'][measure][0] == pytest.approx(
            by_rule[rule][measure][0] - by_rule['paper'][measure][0], abs=1e-9)


@pytest.mark.parametrize('change, match', [
    ({'repeats': 1}, r'repeats=1 .* must be at least 2'),
    ({'history': -1}, r'history=-1 .* 0'),
    ({'low': 9}, r'per_task=8 must lie in low\.\.high, 9\.\.40'),
    ({'high': 1}, r'per_task=8 must lie in low\.\.high, 2\.\.1'),
    ({'value': 'gain'}, "value='gain' .* must be one of 'infogain'"),
])
def test_bad_static_options_are_named(change, match):
  with pytest.raises(ValueError, match=match):
    worlds.static(of(0.5), STATIC.replace(**change))


# The learning world.


@pytest.mark.parametrize('kind', knobs.Grpo.choices('advantage'))
def test_the_expected_gradient_over_all_outcomes(kind):
  """A task pushes along x_i by N p (1-p) with 'loo', N > 1, and with 'posterior', whatever it expected; by
  (N - 1) p (1-p) with 'mean', by N E[sqrt(K/N (1 - K/N))] with 'std' and by N E[1 - K/N; K > 0] with 'maxrl'."""
  p_M, budget_M = np.array([0.2, 0.7, 0.5]), np.array([3, 4, 1])
  feature_MD = np.array([[1.0, 0], [0.5, -1], [3, 3]])
  task_R = np.repeat(np.arange(3), budget_M)
  past = grpo.Past(np.float32([0.3, 0.9, 0.1]), np.float32([2.0, 0.5, 4.0]))
  gradient_D = np.zeros(2)
  for reward_R in itertools.product((0.0, 1.0), repeat=8):
    reward_R = np.array(reward_R)
    probability = np.prod(np.where(reward_R == 1, p_M[task_R], 1 - p_M[task_R]))
    gradient_D += probability * worlds.gradient(feature_MD, p_M, reward_R, task_R, kind, np.zeros(2), past)
  if kind == 'loo':
    push_M = [3 * 0.16, 4 * 0.21, 0]
  elif kind == 'posterior':
    push_M = [3 * 0.16, 4 * 0.21, 0.25]
  elif kind == 'maxrl':
    push_M = [3 * (1 - 0.2 - 0.512), 4 * (1 - 0.7 - 0.0081), 0]
  elif kind == 'mean':
    push_M = [2 * 0.16, 3 * 0.21, 0]
  else:
    k = np.arange(5)
    root = lambda N: np.sqrt(k[:N + 1] / N * (1 - k[:N + 1] / N))
    push_M = [3 * root(3) @ [0.512, 0.384, 0.096, 0.008],
              4 * root(4) @ [0.0081, 0.0756, 0.2646, 0.4116, 0.2401], 0]
  np.testing.assert_allclose(gradient_D, push_M @ feature_MD, rtol=1e-5)


def test_the_noise_of_a_gradient_is_that_of_its_rollouts():
  """The same variance as a noise of its own for each rollout, times its advantage."""
  noise_D = np.array([3.0, -4.0])
  gradient_D = worlds.gradient(  # advantages 1, -1, 0, 0
      np.zeros((2, 2)), np.array([0.5, 0.5]), np.array([1.0, 0, 0, 0]), np.array([0, 0, 1, 1]),
      'loo', noise_D)
  np.testing.assert_allclose(gradient_D, noise_D * 2 ** 0.5, rtol=1e-6)


def test_features_of_a_family_have_the_alignment():
  setup = LearningSetup(tasks=1024, features=512, families=4, alignment=0.4)
  world = worlds.make_world((-1.5, 3.0), setup, seed=0)
  cosine_II = world.feature_ID @ world.feature_ID.T
  np.testing.assert_allclose(np.diag(cosine_II).mean(), 1, atol=0.05)
  family_I = np.arange(1024) % 4
  same_II = family_I[:, None] == family_I
  np.fill_diagonal(same_II, False)
  assert cosine_II[same_II].mean() == pytest.approx(0.4, abs=0.05)
  assert cosine_II[family_I[:, None] != family_I].mean() == pytest.approx(0, abs=0.05)
  # Half the variance: quantiles -1.150, -.319, .319, 1.150 times 3 / sqrt(2).
  mean = [world.start_I[family_I == family].mean() for family in range(4)]
  np.testing.assert_allclose(mean, [-3.94, -2.18, -0.82, 0.94], atol=0.3)
  apart = worlds.make_world((-1.5, 3.0), setup.replace(alignment=0.0), seed=0)
  off_II = apart.feature_ID @ apart.feature_ID.T - np.eye(1024)
  assert abs(off_II.mean()) < 1e-3 and np.abs(off_II).max() < 0.5


def test_start_logits_have_the_mean_and_deviation():
  setup = LearningSetup(tasks=20_000, features=1, families=5000)
  start_I = worlds.make_world((-4.0, 2.0), setup, seed=1).start_I
  assert start_I.mean() == pytest.approx(-4, abs=0.1)
  assert start_I.std() == pytest.approx(2, abs=0.1)


def test_an_update_has_the_length_and_learns():
  """One task, one feature of 2: each step moves theta by the length, the logit by twice that."""
  setup = LearningSetup(tasks=1, features=1, per_step=1, per_task=64, steps=5, length=0.25)
  world = worlds.World(np.full((1, 1), 2.0), np.zeros(1))
  success = worlds.learn(world, Method('uniform', 'infogain', 1.0, 'loo'), setup, sigma=0.0, seed=0)
  np.testing.assert_allclose(success, 1 / (1 + np.exp(-0.5 * np.arange(6))), rtol=1e-12)


def test_nothing_moves_where_no_group_is_mixed():
  world = worlds.make_world((-800.0, 0.0), LEARNING, seed=0)
  method = worlds.parse_method('posterior:snr:2:loo')
  success = worlds.learn(world, method, LEARNING, sigma=5.0, seed=0)
  np.testing.assert_array_equal(success, np.zeros(9))


def sampled(method, p_I, luck, **changed):
  """index_M, task_R, reward_R and rollouts of a step of 2 tasks with 2 rollouts each, where `luck` decides."""
  setup = LearningSetup(tasks=len(p_I), per_step=2, per_task=2, low=1, high=3, fitted_steps=0).replace(**changed)

  class Luck:
    def random(self, size):
      return np.resize(luck, size)

  stats = estimate.init(len(p_I), groups=0)
  return worlds._sampled(worlds.parse_method(method), setup, stats, np.arange(len(p_I)), np.array(p_I), Luck())


def test_dynamic_sampling_by_hand():
  """Tasks at 1/2, 1, 1/2 and 1/2 and verdicts right, wrong each: the first batch has one mixed group, so that a second
  one is sampled, and two of its three mixed groups come first."""
  index_M, task_R, reward_R, rollouts = sampled('dynamic:std', [0.5, 1, 0.5, 0.5, 1, 1], [0.2, 0.9])
  np.testing.assert_array_equal(index_M, [0, 2])
  np.testing.assert_array_equal(task_R, [0, 0, 1, 1])
  np.testing.assert_array_equal(reward_R, [1, 0, 1, 0])
  assert rollouts == 8
  index_M, _, reward_R, rollouts = sampled('dynamic:std', [1, 1, 1, 0.5, 1, 1], [0.2, 0.9])  # too few: all are sampled
  np.testing.assert_array_equal(index_M, [3, 0])  # one that teaches nothing fills up
  np.testing.assert_array_equal(reward_R, [1, 0, 1, 1])
  assert rollouts == 12
  assert sampled('dynamic:std', [0.5] * 6, [0.2, 0.9])[3] == 4


def test_candidates_by_hand():
  """Of four unseen tasks two get the rollouts; all are due, and of equals the later ones come first or last."""
  index_M, task_R, reward_R, rollouts = sampled('posterior:infogain:std+candidates=2', [0.5] * 4, [0.2, 0.9])
  assert len(set(index_M)) == 2 and rollouts == 4
  np.testing.assert_array_equal(task_R, [0, 0, 1, 1])
  np.testing.assert_array_equal(reward_R, [1, 0, 1, 0])


def test_dynamic_sampling_is_charged_for_what_it_discards():
  """Of tasks that are all solved but one in twelve, it samples three batches a step: a third of the steps."""
  setup = LearningSetup(tasks=12, features=4, per_step=2, per_task=2, low=1, steps=6, fitted_steps=0)
  world = worlds.World(np.eye(12, 4), np.array([0.0] + [40.0] * 11))
  method = worlds.parse_method('dynamic:std')
  success = worlds.learn(world, method, setup, sigma=0.0, seed=0)
  assert success.shape == (7,)
  np.testing.assert_allclose(np.diff(success, 2)[[0, 3]], 0, atol=1e-12)  # a step costs three times the rollouts
  alone = worlds.World(np.ones((1, 1)), np.zeros(1))
  setup = LearningSetup(tasks=1, features=1, per_step=1, per_task=64, steps=2, length=0.25)
  success = worlds.learn(alone, method, setup, sigma=0.0, seed=0)  # one batch a step: as uniform budgets
  np.testing.assert_allclose(success, 1 / (1 + np.exp(-0.25 * np.arange(3))), rtol=1e-12)


def test_a_population_is_the_start_of_a_world():
  """Rates as they were drawn, within 1/1000; families are of unequal difficulty and of equal size."""
  rates = np.repeat([0.0, 0.2, 0.8, 1.0], 64)
  setup = LearningSetup(tasks=256, features=2, families=4)
  world = worlds.make_world(worlds.Population(lambda rng, num: rng.permutation(rates)), setup, seed=0)
  np.testing.assert_allclose(np.sort(1 / (1 + np.exp(-world.start_I))),
                             np.clip(rates, 0.001, 0.999), rtol=1e-9)
  aligned = worlds.make_world(worlds.Population(lambda rng, num: rates), setup.replace(alignment=1.0), seed=0)
  families, family_I = np.unique(aligned.feature_ID, axis=0, return_inverse=True)
  assert len(families) == 4 and np.all(np.bincount(family_I) == 64)
  mean = np.array([aligned.start_I[family_I == family].mean() for family in range(4)])
  assert mean.std() > 0.4 * aligned.start_I.std() and mean.std() < 0.95 * aligned.start_I.std()


def test_smooth_by_hand():
  np.testing.assert_allclose(worlds.smooth(np.array([4.0, 2, 0, 3]), 2), [4, 3, 1, 1.5])
  np.testing.assert_allclose(worlds.smooth(np.array([4.0, 2, 0, 3]), 9), [4, 3, 2, 2.25])


def test_share_needed_by_hand():
  for success, share in (([0, 1, 2, 3, 4], 1.0), ([0, 2, 4, 4, 4], 0.5), ([0, 3, 5, 0, 0], 0.375),
                         ([5, 0, 0, 0, 0], 0)):
    assert worlds.share_needed(np.array(success, float), np.arange(5.0)) == pytest.approx(share)
  assert worlds.share_needed(np.array([0, 1, 2, 3, 3.9]), np.arange(5.0)) is None


def test_methods():
  assert worlds.parse_method('uniform:std') == ('uniform', 'infogain', 1.0, 'std', 1)
  assert worlds.parse_method('window:infogain:std') == ('window', 'infogain', 1.0, 'std', 1)
  assert worlds.parse_method('posterior:snr:0.5:loo') == ('posterior', 'snr', 0.5, 'loo', 1)
  assert worlds.parse_method('posterior:snr:2:std+candidates=4') == ('posterior', 'snr', 2.0, 'std', 4)
  assert worlds.parse_method('dynamic:std') == ('dynamic', 'infogain', 1.0, 'std', 3)


def test_bad_methods_are_named():
  for text in ('', 'uniform', 'std', 'uniform:snr:2:loo', 'oracle:infogain:std', 'posterior:std',
               'posterior:snr:loo', 'posterior:snr:-1:loo', 'posterior:snr:two:loo',
               'posterior:variance:2:loo', 'posterior:gain:loo', 'posterior:infogain:max', 'uniform:std+candidates=2',
               'posterior:infogain:std+candidates=1', 'posterior:infogain:std+candidates=x', 'dynamic:snr:2:loo'):
    with pytest.raises(ValueError, match=rf"^--method '{re.escape(text)}' is not uniform:ADVANTAGE, dynamic:"):
      worlds.parse_method(text)


@pytest.mark.parametrize('change, match', [
    ({'per_step': 65}, 'per_step=65 is more than tasks=64'),
    ({'alignment': 1.5}, r'alignment=1\.5 .* at most 1'),
    ({'pass_discount': 0.0}, r'pass_discount=0\.0'),
    ({'fitted_steps': -1}, 'fitted_steps=-1 .* must be at least 0'),
    ({'length': float('nan')}, 'length=nan'),
    ({'seeds': 0}, 'seeds=0 .* must be at least 1'),
    ({'per_task': 65}, r'per_task=65 must lie in low\.\.high, 1\.\.64'),
])
def test_bad_learning_options_are_named(change, match):
  with pytest.raises(ValueError, match=match):
    worlds.learning(['uniform:loo'], [(0.0, 1.0)], [0.0], LEARNING.replace(**change))


@pytest.mark.parametrize('start, sigma, match', [
    ((0.0, 1.0), -1.0, '--sigma and the SD of --start .* not -1'),
    ((0.0, float('inf')), 1.0, '--sigma and the SD of --start .* not inf'),
    ((float('nan'), 1.0), 1.0, 'the MEAN of --start must be a number'),
])
def test_bad_worlds_are_named(start, sigma, match):
  with pytest.raises(ValueError, match=match):
    worlds.learning(['uniform:loo'], [start], [sigma], LEARNING)


def test_learning_repeats_with_its_seed():
  run = lambda setup: worlds.learning(['posterior:snr:2:loo'], [(-1.5, 3.0)], [2.0], setup)[0]
  one, again, other = run(LEARNING), run(LEARNING), run(LEARNING.replace(seed=7))
  assert list(one['share']) == ['uniform:std', 'posterior:snr:2:loo']
  for name, success_by_seed in one['success_by_seed'].items():
    assert success_by_seed.shape == (2, 9)
    np.testing.assert_array_equal(success_by_seed, again['success_by_seed'][name])
    assert np.all(success_by_seed != other['success_by_seed'][name])
    assert np.all(success_by_seed[0] != success_by_seed[1])
  assert one['share']['uniform:std'] == [1.0, 1.0]


def test_rollouts_hang_on_the_seed():
  # Of equal tasks, whose order is nothing; the noise decides between up and down.
  world = worlds.World(np.ones((16, 4)), np.zeros(16))
  runs = [worlds.learn(world, worlds.parse_method('uniform:loo'), LEARNING, sigma=9.0, seed=s)
          for s in (0, 0, 1)]
  np.testing.assert_array_equal(runs[0], runs[1])
  assert runs[0][1] != pytest.approx(runs[2][1], rel=1e-9)
