"""Forecasts of shares: the signal of a step by hand, worlds that have the run's, and verdicts that ought to hold."""

import math

import numpy as np
import pytest

from kr_jax.allocation import forecast
from kr_jax.allocation import worlds
from kr_jax.allocation.forecast import Case, Noise, Outcome


def case(a=0.2, b=0.2, **changed):
  """A short run of a population Beta(a, b)."""
  population = worlds.Population(lambda rng, num: rng.beta(a, b, num), (a, b))
  return Case(population, tasks=128, per_step=16, per_task=4, steps=24, low=2, high=32)._replace(**changed)


def test_signal_to_noise_by_hand():
  """Of p = 1/2: q = 1/4. Of two verdicts s^2 is 1/2 or 0, of variance 1/16. No task has another in its family of 4."""
  half = np.array([0.5])
  assert forecast.batch_signal_to_noise(half, 4, 2, Noise(1.0, 0.4)) == pytest.approx((1 / 16) / (1 / 16 + 1 / 4))
  # 8 tasks: each has another one, whose direction is its own by .4.
  assert forecast.batch_signal_to_noise(half, 8, 2, Noise(1.0, 0.4)) == pytest.approx((1.4 / 16) / (1 / 16 + 1 / 4))
  assert forecast.batch_signal_to_noise(np.array([0.0, 1.0]), 8, 2, Noise(1.0, 0.4)) == 0
  # Of other tasks each time: the four families share .4 / 4 of the square, and the rest of it is noise.
  assert forecast.batch_signal_to_noise(half, 4, 2, Noise(1.0, 0.4), anew=True) == pytest.approx(0.4 / (0.9 + 1 + 4))
  # One task in two is at 1/2: E q = 1/8, E q^2 = 1/32, E var(s^2) = 1/32.
  assert forecast.batch_signal_to_noise(np.array([0.5, 1.0]), 4, 2, Noise(1.0, 0.0)) == pytest.approx(1 / (1 + 4))


def test_signal_to_noise_is_that_of_sampled_gradients():
  """Of sums of leave-one-out advantages over many draws of the rollouts of the same tasks."""
  rng, M, N, D = np.random.default_rng(0), 8, 4, 4096
  setup = worlds.LearningSetup(tasks=M, features=D, families=forecast.FAMILIES, alignment=0.5, per_step=M, per_task=N)
  world = worlds.make_world((0.0, 0.0), setup, seed=0)
  right_KM = rng.binomial(N, 0.5, (4000, M))
  push_KM = right_KM * (1 - right_KM / N) * N / (N - 1)  # N s^2
  gram_MM, nu = world.feature_ID @ world.feature_ID.T, 0.7
  mean_M = push_KM.mean(axis=0)
  signal = mean_M @ gram_MM @ mean_M
  off_KM = push_KM - mean_M
  noise = (np.einsum('km,mn,kn->k', off_KM, gram_MM, off_KM) + nu * (push_KM * N / (N - 1)).sum(axis=1)).mean()
  found = forecast.batch_signal_to_noise(np.full(M, 0.5), M, N, Noise(nu, 0.5))
  assert found == pytest.approx(signal / noise, rel=0.05)


def test_nu_of_a_signal_to_noise_is_its_inverse():
  p_X = np.random.default_rng(0).beta(0.5, 0.5, 100)
  for nu in (0.5, 3.0, 40.0):
    found = forecast.batch_signal_to_noise(p_X, 32, 8, Noise(nu, 0.3))
    assert forecast.nu_of(p_X, 32, 8, 0.3, found) == pytest.approx(nu)
    anew = forecast.batch_signal_to_noise(p_X, 32, 8, Noise(nu, 0.3), anew=True)
    assert anew < found and forecast.nu_of(p_X, 32, 8, 0.3, anew, anew=True) == pytest.approx(nu)
  assert forecast.nu_of(p_X, 4, 8, 0.3, 1e9) == 0.05  # no noise at all would not be enough
  assert forecast.nu_of(np.zeros(3), 4, 8, 0.3, 1.0) == 0.05


def test_the_world_has_the_passes_and_the_rollouts_of_the_run():
  """1000 steps of 256 of 17,398 tasks are 14.7 passes: 80 steps of 16 of 87 tasks."""
  setup = forecast.small(case(tasks=17_398, per_step=256, per_task=8.0, steps=1000, high=128))
  assert (setup.tasks, setup.per_step, setup.per_task, setup.steps) == (87, 16, 8, 80)
  assert (setup.low, setup.high, setup.families) == (2, 16 * 8 - 2 * 15, 4)
  few = forecast.small(case(tasks=2, per_step=2, per_task=2.4, steps=9, low=0, high=2))
  assert (few.tasks, few.per_step, few.per_task, few.steps, few.low, few.high, few.families) == (2, 2, 2, 9, 1, 2, 2)


def test_a_longer_update_learns_what_is_asked():
  setup = forecast.small(case()).replace(alignment=0.4)
  world = worlds.make_world(case().population, setup, 0)
  of = lambda lift: forecast.calibrated(world, setup, lift, advantage='std', sigma=1.0, seed=0)
  assert of(0.1) < of(0.4)
  method = worlds.parse_method('uniform:std')
  success = worlds.learn(world, method, setup.replace(length=of(0.4)), sigma=1.0, seed=0)
  assert (forecast.smooth(success)[-1] - success[0]) / (1 - success[0]) == pytest.approx(0.4, abs=0.06)


def test_summary_by_hand():
  of = lambda *shares: [Outcome(Noise(1, 0.1), i, x, i / 10) for i, x in enumerate(shares)]
  assert forecast.summary(of(0.9, 0.5, 0.8)) == (0.8, 0.5, 0.9, 0.1, 3, 3)
  assert forecast.summary(of(0.9, None, 0.5, None)) == (None, 0.5, None, pytest.approx(0.15), 2, 4)
  assert forecast.shown(forecast.summary(of(0.9, None, 0.5))) == '0.90 (0.50->1.2)'


def test_uniform_needs_what_uniform_needs():
  found = forecast.outcomes(case(), [Noise(2.0, 0.2)], {'same': 'uniform:{advantage}'}, seeds=1)['same'][0]
  assert found.share == pytest.approx(1, abs=0.02) and found.gain == 0 and found.seed == 0


@pytest.mark.slow
def test_noise_and_spread_are_what_a_knapsack_lives_of():
  """Where most tasks are solved or hopeless and gradients are noise it wins; where all are alike it cannot."""
  rule = {'knapsack': forecast.RULES['knapsack']}
  share = lambda run: forecast.summary(forecast.outcomes(run, [Noise(16.0, 0.25)], rule, seeds=1)['knapsack']).median
  run = case(steps=40, per_task=8)
  assert share(run) < 0.9
  assert 0.93 < share(run._replace(population=worlds.Population(lambda rng, num: np.full(num, 0.5)))) < 1.07


def ranges(**of_rules):
  return {rule: forecast.Range(*x, 0.0, 2, 2) for rule, x in of_rules.items()}


def test_verdicts_by_hand():
  assert forecast.verdict(ranges(paper_rule=(0.7, 0.6, 0.9), knapsack=(0.8, 0.7, 0.9))) == ('worth it', 'paper_rule')
  assert forecast.verdict(ranges(paper_rule=(0.7, 0.6, 0.9), knapsack=(0.72, 0.7, 0.9))) == ('worth it', 'knapsack')
  for no_difference in ((0.7, 0.6, 0.99), (0.7, 0.6, None), (0.96, 0.95, 0.97), (None, 0.9, None)):
    assert forecast.verdict(ranges(knapsack=no_difference)) == ('no difference expected', None)
  assert forecast.verdict(ranges(knapsack=(1.1, 1.01, None), snr=(None,) * 3)) == ('not worth it', None)


@pytest.mark.slow
def test_a_row_of_the_decision_table():
  (spread, (a, b)), = [x for x in forecast.SPREADS.items() if x[1] == (4, 4)]
  found = forecast.decision(seeds=1, spreads=[spread], epochs=[8], signals=[10.0], steps=6)
  (cell, by_rule), = found.items()
  assert cell == (spread, 8, 10.0) and list(by_rule) == list(forecast.RULES)
  assert all(x.worlds == 1 for x in by_rule.values())


@pytest.mark.parametrize('change, match', [
    ({'steps': 0}, '0 steps of 16 of 128 tasks are no run'), ({'tasks': 8}, '24 steps of 16 of 8 tasks'),
    ({'lift': 1.0}, r'lift=1\.0 must lie between 0 and 1'), ({'lift': math.nan}, 'lift=nan')])
def test_bad_cases_are_named(change, match):
  with pytest.raises(ValueError, match=match):
    forecast.outcomes(case(**change), [Noise(1.0, 0.1)])


def test_bad_noise_is_named():
  with pytest.raises(ValueError, match='4 tasks of 1 rollouts have no gradient'):
    forecast.batch_signal_to_noise([0.5], 4, 1, Noise(1.0, 0.1))
  for bad in (0.0, -1.0, math.nan, math.inf):
    with pytest.raises(ValueError, match=f'a batch signal-to-noise of {bad} must be a number above 0'):
      forecast.nu_of([0.5], 4, 2, 0.1, bad)
  with pytest.raises(ValueError, match="--method 'posterior:gain:loo' is not"):
    forecast.outcomes(case(), [Noise(1.0, 0.1)], {'mine': 'posterior:gain:loo'})
  with pytest.raises(ValueError, match='--seeds 0 and --jobs 1 must be at least 1'):
    forecast.decision(seeds=0)
