"""The filter against integrals, the world and its measures by hand, and what the defaults promise."""

import importlib

import numpy as np
import pytest
from scipy import integrate
from scipy import special

from kr_jax import tasks
from kr_jax.allocation import allocate
from kr_jax.allocation import passes
from kr_jax.allocation import worlds
from kr_jax.allocation.passes import Method, PassesSetup
from kr_jax.allocation.value import Beta, Window
from kr_jax.datasets import arithmetic
from kr_jax.datasets import sums

TINY = PassesSetup(tasks=24, per_step=6, per_task=4, high=12, passes=4, seeds=2)


def run(name, setup=TINY, seed=0):
  return passes.follow(passes.make_world(setup, seed), passes.parse(name), seed=seed)


# The world.


def test_moves_by_hand():
  setup = TINY.replace(drift=0.1, drift_steps=3, change=-2.0, change_step=5, strata=2, strata_spread=1.5)
  world = passes.make_world(setup, seed=0)
  offset_M = 1.5 * np.array([-0.6744898, 0.6744898, 0.6744898])  # quartiles of the normal distribution
  for step, more in ((0, 0.0), (2, 0.2), (3, 0.3), (4, 0.3), (5, -1.7), (15, -1.7)):
    moved_M = world.moved(step, np.array([0, 1, 23]))
    np.testing.assert_allclose(moved_M, offset_M + more, rtol=1e-6)
    np.testing.assert_allclose(world.rates(step, np.array([0, 1, 23])),
                               special.expit(world.start_I[[0, 1, 23]] + moved_M))


def test_draws_are_of_the_population():
  setup = PassesSetup(tasks=40_000, a=0.3, b=0.9, drift=0.02, drift_spread=0.5, prior_noise=0.7)
  world = passes.make_world(setup, seed=0)
  rate_I = special.expit(world.start_I)
  assert rate_I.mean() == pytest.approx(0.25, abs=0.01)  # a / (a + b)
  assert rate_I.var() == pytest.approx(0.25 * 0.75 / 2.2, abs=0.005)  # over a + b + 1
  assert world.slope_I.mean() == pytest.approx(0.02, rel=0.02)
  assert np.log(world.slope_I).std() == pytest.approx(0.5, rel=0.02)
  assert (world.known_I - world.start_I).std() == pytest.approx(0.7, rel=0.02)
  assert not np.array_equal(world.start_I, passes.make_world(setup, seed=1).start_I)


def test_presets_are_the_configs():
  config = lambda name: importlib.import_module(f'configs.{name}').get_config()
  for preset, names in (('arithmetic', ['arithmetic']), ('smollm2', ['smollm2_arithmetic']),
                        ('gsm8k', ['gsm8k_qwen3_1p7b']), ('mbpp', ['mbpp_qwen25_coder_1p5b']),
                        ('dapo', ['qwen3_4b', 'r1_distill_1p5b', 'qwen3_30b_a3b']), ('paper', ['qwen25_math_7b'])):
    sizes = passes.PRESETS[preset]
    for c in map(config, names):
      assert (c.tasks.per_step, c.alloc.rollouts_per_step / c.tasks.per_step, c.alloc.high) == (
          sizes['per_step'], sizes['per_task'], sizes['high']), names
  assert passes.PRESETS['arithmetic']['tasks'] == arithmetic.SPLITS['train'] * len(arithmetic.DIFFICULTIES)
  assert passes.PRESETS['smollm2']['tasks'] == sum(sums.SPLITS['train'].values())


# The filter.


def test_without_moves_the_filter_is_the_conjugate_posterior():
  setup = TINY.replace(a=0.3, b=0.9)
  exact = passes.Filter(passes.make_world(setup, seed=0))
  np.testing.assert_allclose(exact.forecast(0, np.arange(2)), [[0.3, 0.3], [0.9, 0.9]], rtol=1e-4)
  # Task 5: 2 of 3 right, then 1 of 2. Task 7: 4 of 4. Others are as they were.
  exact.observe(0, np.array([7, 5]), np.array([0, 0, 0, 0, 1, 1, 1]), np.array([1.0, 1, 1, 1, 1, 0, 1]))
  exact.observe(9, np.array([5]), np.array([0, 0]), np.array([0.0, 1]))
  np.testing.assert_allclose(exact.forecast(11, np.array([5, 7, 0])), [[3.3, 4.3, 0.3], [2.9, 0.9, 0.9]], rtol=1e-4)


def test_with_moves_the_filter_is_the_integral():
  """Two visits of two tasks that drift unequally, and of one whose rate was known before, by adaptive quadrature."""
  setup = TINY.replace(drift=0.3, drift_spread=0.6, change=-1.5, change_step=6, strata=3, prior_noise=0.8)
  world = passes.make_world(setup, seed=3)
  for knows_prior in (False, True):
    exact = passes.Filter(world, knows_prior=knows_prior)
    exact.observe(2, np.array([4, 8]), np.array([0, 0, 0, 1, 1, 1]), np.array([1.0, 0, 0, 1, 1, 1]))
    exact.observe(7, np.array([8, 4]), np.array([0, 0, 1, 1]), np.array([1.0, 0, 0, 1]))
    forecast = exact.forecast(9, np.array([4, 8]))
    for m, (i, visits) in enumerate(((4, ((2, 1, 3), (7, 1, 2))), (8, ((2, 3, 3), (7, 1, 2))))):
      moved = lambda step, i=i: world.moved(step, np.array([i]))[0]

      def log_density(x, i=i, visits=visits, moved=moved):
        total = setup.a * special.log_expit(x) + setup.b * special.log_expit(-x)
        for step, right, count in visits:
          total += right * special.log_expit(x + moved(step)) + (count - right) * special.log_expit(-x - moved(step))
        return total - knows_prior * (x + world.offset_I[i] - world.known_I[i]) ** 2 / (2 * 0.8 ** 2)

      integral = lambda f: integrate.quad(
          lambda x: f(x) * np.exp(log_density(x)), -60, 60, epsabs=0, epsrel=1e-9, limit=900)[0]
      p = lambda x, moved=moved: special.expit(x + moved(9))
      mean = integral(p) / integral(lambda x: 1.0)
      variance = integral(lambda x: (p(x) - mean) ** 2) / integral(lambda x: 1.0)
      a, b = forecast.a_M[m], forecast.b_M[m]
      assert a / (a + b) == pytest.approx(mean, rel=1e-4)
      assert a * b / ((a + b) ** 2 * (a + b + 1)) == pytest.approx(variance, rel=1e-4)


# Methods.


def test_methods():
  assert passes.parse('recalibrated') == Method('recalibrated', 0.75, False, 8)
  assert passes.parse('recalibrated:.9:4') == Method('recalibrated', 0.9, False, 4)
  assert passes.parse('discounted:.98:step') == Method('discounted', 0.98, True, 0)
  assert passes.parse('discounted:1+waves=3+strata') == Method('discounted', 1.0, False, 0, strata=True, waves=3)
  assert passes.parse('oracle+value=snr+evidence+candidates=4+prior') == Method(
      'oracle', 1.0, False, 0, prior=True, candidates=4, value='snr', evidence=True)
  for name in passes.METHODS + passes.PARTS:
    assert passes.parse(name).estimate in passes.ESTIMATES


def test_bad_methods_are_named():
  for text in ('', 'posterior', 'recalibrated:', 'recalibrated:0', 'recalibrated:1.5', 'recalibrated:.9:-1',
               'recalibrated:.9:4:2', 'discounted', 'discounted:.9:pass', 'window:8', 'window+waves=2',
               'uniform+waves=2', 'recalibrated+waves=4', 'recalibrated+waves', 'recalibrated+candidates=0',
               'recalibrated+value=gain', 'recalibrated+waves=2+candidates=2', 'recalibrated+tokens',
               'recalibrated+strata=2'):
    with pytest.raises(ValueError, match='--method .* is not ESTIMATE') as error:
      passes.parse(text)
    assert repr(text) in str(error.value)


def test_forecasts_by_hand():
  """Task 0: 3 of 4 right in the first step; task 1: 0 of 2 in the second. A step of two tasks is half of a pass."""
  setup = TINY.replace(tasks=4, per_step=2, a=0.5, b=1.5)
  world = passes.make_world(setup, seed=0)

  def forecast(name):
    estimator = passes.Estimator(passes.parse(name), world)
    estimator.observe(0, np.array([0, 2]), np.zeros(4, int), np.array([1.0, 0, 1, 1]))
    estimator.observe(1, np.array([3, 1]), np.ones(2, int), np.zeros(2))
    return estimator.forecast(2, np.array([0, 1]))

  np.testing.assert_allclose(forecast('known_prior'), [[3.5, 0.5], [2.5, 3.5]])
  np.testing.assert_allclose(forecast('known_drift'), [[3.5, 0.5], [2.5, 3.5]], rtol=1e-4)
  np.testing.assert_allclose(forecast('uniform'), [0.5, 0.5])  # 3 of 6, with a success and a failure more 4 of 8
  np.testing.assert_allclose(forecast('oracle'), world.rates(2, np.array([0, 1])))
  assert isinstance(forecast('window'), Window)
  # Evidence of task 0 that is left: all, half and the root of a half; the prior is the same for both tasks.
  for name, kept in (('discounted:1', 1.0), ('discounted:.5:step', 0.5), ('discounted:.5', 0.5 ** 0.5)):
    a_M, b_M = forecast(name)
    assert (a_M + b_M)[0] - 4 * kept == pytest.approx((a_M + b_M)[1] - 2)
    assert a_M[0] - 3 * kept == pytest.approx(a_M[1])


def test_where_nothing_moves_the_known_prior_is_exact():
  known_prior, exact = run('known_prior'), run('known_drift')
  assert exact['lost'] == 0 and known_prior['lost'] == pytest.approx(0, abs=1e-4)
  assert known_prior['log_loss'] == pytest.approx(exact['log_loss'], abs=1e-4)


def test_the_oracle_has_it_all():
  measured = run('oracle', TINY.replace(drift=0.1))
  assert measured['objective'] == pytest.approx(100)
  for name in ('log_loss', 'count_log_loss', 'brier', 'calibration'):
    assert measured[name] == pytest.approx(0, abs=1e-12)
  assert measured['lost'] < 0


def test_uniform_budgets_by_hand():
  measured = run('uniform')
  assert measured['of_uniform'] == pytest.approx(100)
  assert measured['objective'] < 100


# Measures.


def test_scores_by_hand():
  """Forecasts .5 and .8 of rates .25 and .8; 2 and 4 rollouts, of which 1 and 4 are right."""
  p_M, n_M, right_M = np.array([0.25, 0.8]), np.array([2, 4]), np.array([1, 4])
  forecast, best = Beta(np.array([1.0, 4.0]), np.array([1.0, 1.0])), Beta(np.array([1.0, 4.0]), np.array([3.0, 1.0]))
  spent = worlds.Spent(n_M, right_M, None, 0.0, 0.0, 0.0)
  log_loss, lost, counts, brier, calibration, expected, observed, expected_mixed, observed_mixed = passes._scores(
      forecast, best, p_M, spent, 1)
  # The divergence of rates .25 and .5: .25 log .5 + .75 log 1.5, of 2 rollouts of 6.
  assert log_loss == pytest.approx(2 / 6 * (0.25 * np.log(0.5) + 0.75 * np.log(1.5)))
  assert lost == pytest.approx(log_loss)  # the exact filter has both means right
  assert brier == pytest.approx(2 / 6 * 0.25 ** 2)
  assert calibration == pytest.approx(2 * 0.25 / 6)
  # Of counts Beta(1, 1) gives each of 0, 1, 2 a third; Beta(4, 1) gives 4 of 4 the chance B(8, 1) / B(4, 1) = 1/2.
  assert counts == pytest.approx((np.log(3) + np.log(2) + np.log(2 * 0.25 * 0.75) + 4 * np.log(0.8)) / 6)
  # Mixed: 1 - 2/3; 1 - 1/2 - 4! / (5 .. 8).
  assert expected_mixed == pytest.approx(1 / 3 + 1 / 2 - 1 / 70)
  assert expected == pytest.approx((2 / 3 + 4 * (1 / 2 - 1 / 70)) / 6)
  assert (observed_mixed, observed) == (1, pytest.approx(1 / 3))
  assert np.isnan(passes._scores(forecast, best, p_M, spent, 2)[5])


def test_unseen_is_the_longest_wait():
  """In passes; also of tasks at the end, and of tasks before their first step."""
  setup = TINY.replace(tasks=26)  # two tasks are left over in each pass
  assert run('uniform', setup.replace(passes=1))['unseen'] == pytest.approx(5 * 6 / 26)  # 4 steps, none of them theirs
  seen_I, longest = np.full(26, -1), 0
  for step in range(16):
    here = np.array(tasks.batch(range(26), step, per_step=6, seed=5))
    longest = max(longest, (step - seen_I[here]).max())
    seen_I[here] = step
  longest = max(longest, (16 - seen_I).max())
  assert run('uniform', setup, seed=5)['unseen'] == pytest.approx(longest * 6 / 26)


def test_late_verdicts_are_not_known_yet():
  """With all verdicts later than the run, nothing is learnt; with none late, something is."""
  never, late, in_time = (run('discounted:1', TINY.replace(lag=lag)) for lag in (16, 4, 0))
  assert never['objective'] == pytest.approx(run('uniform')['objective'])  # all tasks look alike
  assert never['log_loss'] > late['log_loss'] > in_time['log_loss']


def test_verdicts_are_as_late_as_the_lag(monkeypatch):
  calls = []
  for name in ('forecast', 'observe'):
    method = getattr(passes.Estimator, name)
    monkeypatch.setattr(passes.Estimator, name, lambda self, step, *rest, name=name, method=method: (
        calls.append((name, step)), method(self, step, *rest))[1])
  run('discounted:1', TINY.replace(passes=1, lag=2))
  forecast, observe = (lambda step, name=name: (name, step) for name in ('forecast', 'observe'))
  assert calls == [forecast(0), forecast(1), forecast(2), observe(0), forecast(3), observe(1)]


def test_losses_by_visits_since_a_change():
  """Against a run step by step, of a forecast that can be written down."""
  setup = TINY.replace(tasks=12, passes=5, change=2.0, change_step=5)
  measured, world = run('discounted:1', setup), passes.make_world(setup, seed=0)
  estimator, exact = passes.Estimator(passes.parse('discounted:1'), world), passes.Filter(world)
  visits_I, lost, count = np.zeros(12, int), np.zeros(5), np.zeros(5)
  for step in range(10):
    index_M = np.array(tasks.batch(range(12), step, per_step=6, seed=0))
    p_M, forecast, best = world.rates(step, index_M), estimator.forecast(step, index_M), exact.forecast(step, index_M)
    budget_M = allocate.budgets(forecast, 24, low=2, high=12)
    for i, p, q, q_best, n in zip(index_M, p_M, forecast.mean_M, best.mean_M, budget_M):
      visit = 0 if step < 5 else min(visits_I[i] + 1, 4)
      if step >= 3:
        loss = lambda q, p=p: -p * np.log(q) - (1 - p) * np.log1p(-q)
        lost[visit] += n * (loss(q) - loss(q_best))
        count[visit] += n
      visits_I[i] += step >= 5
    task_R = np.repeat(np.arange(6), budget_M)
    luck_MN = np.random.default_rng((0, 1, step)).random((6, 12))
    verdict_R = np.concatenate([luck[:n] < p for luck, n, p in zip(luck_MN, budget_M, p_M)])
    estimator.observe(step, index_M, task_R, verdict_R)
    exact.observe(step, index_M, task_R, verdict_R)
  np.testing.assert_allclose([measured[visit] for visit in passes.VISITS[:4]], (lost / np.maximum(count, 1))[:4],
                             rtol=1e-6)
  assert np.isnan(measured['later']) and count[4] == 0  # 2.5 passes follow the change
  assert not set(passes.VISITS) & set(run('discounted:1'))


def test_candidates_that_get_nothing_are_not_seen(monkeypatch):
  """At most M of the candidates get rollouts, and estimates learn of no other."""
  seen, observe = [], passes.Estimator.observe
  monkeypatch.setattr(passes.Estimator, 'observe', lambda self, step, index_M, *rest: (
      seen.append((index_M, rest[0])), observe(self, step, index_M, *rest))[1])
  measured = run('recalibrated:.75:1+candidates=2', TINY)
  for index_M, task_R in seen:
    assert len(set(index_M)) == 6 and len(task_R) == 24 and np.all((0 <= task_R) & (task_R < 6))
  assert len(seen) == 16 and measured['of_uniform'] > 100


def test_methods_of_one_world():
  setup = TINY.replace(tasks=96, per_step=24, passes=2, strata=3, strata_spread=4.0, prior_noise=0.3)
  result = passes.passes(['discounted:1', 'discounted:1+strata', 'discounted:1+prior'], setup)
  assert result == passes.passes(list(result), setup)
  assert result != passes.passes(list(result), setup.replace(seed=2))
  plain, strata, prior = (result[name]['log_loss'][0] for name in result)
  assert prior < strata < plain
  assert all(list(measured) == list(passes.MEASURES) for measured in result.values())


@pytest.mark.exhaustive
def test_processes_change_nothing():
  one, two = (passes.passes(['discounted:1', 'known_drift+waves=2'], TINY, jobs=jobs) for jobs in (1, 2))
  np.testing.assert_equal(one, two)  # nan is nan


@pytest.mark.parametrize('change, match', [
    ({'per_step': 25}, 'per_step=25 is more than tasks=24'),
    ({'measured': 5}, 'measured=5 is more than passes=4'),
    ({'change': 1.0}, r'change_step=0 must lie in 1\.\.15, as there are 16 steps'),
    ({'change': 1.0, 'change_step': 16}, r'change_step=16 must lie in 1\.\.15'),
    ({'strata': 25}, 'strata=25 is more than tasks=24'),
    ({'a': 0.01}, r'a=0\.01 .* at least 0\.1'),
    ({'lag': -1}, r'lag=-1'),
    ({'seeds': 1}, r'seeds=1 .* at least 2'),
    ({'per_task': 13}, r'per_task=13 must lie in low\.\.high, 2\.\.12'),
])
def test_bad_options_are_named(change, match):
  with pytest.raises(ValueError, match=match):
    TINY.replace(**change)


def test_bad_calls_are_named():
  with pytest.raises(ValueError, match="--method names 'oracle' twice"):
    passes.passes(['oracle', 'uniform', 'oracle'], TINY)
  with pytest.raises(ValueError, match='--jobs 0 must be at least 1'):
    passes.passes(['oracle'], TINY, jobs=0)


# What the defaults promise, at the sizes of configs/arithmetic.py with 8 rollouts a task.


ARITHMETIC = PassesSetup(seeds=2, **passes.PRESETS['arithmetic'] | {'per_task': 8})


@pytest.mark.slow
def test_estimates_of_what_stands_still_miss_little():
  result = passes.passes(['discounted:.1', 'recalibrated'], ARITHMETIC)  # the first as .98 a step in 114 steps a pass
  assert result['recalibrated']['objective'][0] >= 97 > 96 > result['discounted:.1']['objective'][0]
  assert result['recalibrated']['lost'][0] < 0.002 < 0.02 < result['discounted:.1']['lost'][0]


@pytest.mark.slow
def test_estimates_keep_up_with_drift():
  result = passes.passes(['discounted:.98:step', 'recalibrated'], ARITHMETIC.replace(drift=0.05))
  assert result['recalibrated']['lost'][0] <= 0.02 < 0.05 < result['discounted:.98:step']['lost'][0]
  assert abs(result['recalibrated']['calibration'][0]) <= 0.02


@pytest.mark.exhaustive  # by default the drift above
def test_estimates_recover_from_a_change():
  changed = passes.passes(['recalibrated'], ARITHMETIC.replace(passes=6, change=1.0, change_step=48))['recalibrated']
  assert changed['third'][0] <= 0.02 and changed['third'][0] < changed['first'][0]


@pytest.mark.exhaustive
def test_no_task_starves():
  """Of twice as many candidates as get rollouts each has some within 15 of the passes that all tasks would take."""
  setup = ARITHMETIC.replace(tasks=64, per_step=8, passes=40)
  assert passes.passes(['recalibrated+candidates=2'], setup)['recalibrated+candidates=2']['unseen'][0] < 15
