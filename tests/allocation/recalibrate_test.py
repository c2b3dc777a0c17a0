"""Recalibration finds how a posterior is off, by the likelihood of counts, and does nothing where nothing is seen."""

import itertools
import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import special
from scipy import stats

from kr_jax.allocation import recalibrate
from kr_jax.allocation.value import Beta


def loss_by_loops(theta, forecast_H4) -> float:
  """The penalised negative log-likelihood, group by group."""
  a, b, log_s, c = theta
  total = 2.0 * (a ** 2 + (b - 1) ** 2 + log_s ** 2) + 5.0 * (c - 1) ** 2
  for x, n, right, count in forecast_H4[forecast_H4[:, 3] > 0].tolist():
    mean = 1 / (1 + math.exp(-(a + b * x)))
    alpha, beta = math.exp(log_s) * n ** c * mean, math.exp(log_s) * n ** c * (1 - mean)
    total -= math.lgamma(alpha + right) + math.lgamma(beta + count - right) - math.lgamma(alpha + beta + count)
    total += math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
  return total


def groups(rng, H, *, a=0.0, b=1.0, s=1.0, c=1.0, count=8) -> np.ndarray:
  """Groups whose success rates come from the forecast's Beta, moved by (a, b, s, c)."""
  x_H, n_H = rng.normal(0, 1.5, H), rng.uniform(1, 30, H)
  mean_H, total_H = special.expit(a + b * x_H), s * n_H ** c
  p_H = rng.beta(total_H * mean_H, total_H * (1 - mean_H))
  return np.stack([x_H, n_H, rng.binomial(count, p_H), np.full(H, count)], axis=1)


def test_apply_by_hand():
  """Mean 3/4 and 4 rollouts' worth: log-odds log 3 go to log 3 / 2 - 1/2, and the concentration to 3 sqrt(4)."""
  a_M, b_M = recalibrate.apply(Beta(np.array([3.0]), np.array([1.0])), np.array([-0.5, 0.5, 3.0, 0.5]))
  mean = 1 / (1 + np.exp(0.5) / np.sqrt(3))
  np.testing.assert_allclose([a_M[0], b_M[0]], [6 * mean, 6 * (1 - mean)], rtol=1e-12)


def test_nothing_seen_changes_nothing():
  posterior = Beta(np.array([3.0, 0.5]), np.array([1.0, 40.0]))
  for x, y in zip(recalibrate.apply(posterior, recalibrate.NONE), posterior):
    np.testing.assert_allclose(x, y, rtol=1e-12)
  before = np.array([0.1, 0.9, 0.8, 1.0])
  np.testing.assert_array_equal(recalibrate.fit(np.zeros((5, 4)), before), before)


@settings(max_examples=8)
@given(seed=st.integers(0, 2 ** 32 - 1),
       move=st.sampled_from(((0, 1, 1, 1), (0.8, 1, 0.5, 1), (-1, 0.6, 0.3, 0.7), (0, 1.4, 2, 1))))
def test_the_fit_is_the_minimum_of_the_loops(seed, move):
  rng = np.random.default_rng(seed)
  forecast_H4 = groups(rng, 40, **dict(zip('absc', move)), count=int(rng.integers(1, 9)))
  forecast_H4[:3] = 0  # not seen yet
  calibration = recalibrate.NONE
  for _ in range(20):  # each goes half of the way
    calibration = recalibrate.fit(forecast_H4, calibration)
  theta = np.array([*calibration[:2], np.log(calibration[2]), calibration[3]])
  least = loss_by_loops(theta, forecast_H4)
  for step in itertools.product((-1, 0, 1), repeat=4):
    for size in (0.02, 0.3):
      assert loss_by_loops(theta + size * np.array(step), forecast_H4) >= least - 1e-6


def test_a_fit_goes_half_of_the_way():
  forecast_H4 = groups(np.random.default_rng(1), 200, a=1.0)
  once, often = recalibrate.fit(forecast_H4, recalibrate.NONE), recalibrate.NONE
  for _ in range(16):
    often = recalibrate.fit(forecast_H4, often)
  assert once[0] == pytest.approx(often[0] / 2, abs=1e-3) and once[2] == pytest.approx(np.sqrt(often[2]), abs=1e-3)


@pytest.mark.parametrize('move', [{}, {'a': 0.7}, {'b': 0.6}, {'s': 0.4}, {'c': 0.5}, {'a': -0.5, 'b': 1.3, 's': 0.5}])
def test_the_fit_finds_what_moved(move):
  """Of 4,000 groups, so that the penalty and the noise are small."""
  forecast_H4, calibration = groups(np.random.default_rng(2), 4000, **move), recalibrate.NONE
  for _ in range(8):
    calibration = recalibrate.fit(forecast_H4, calibration)
  wanted = {'a': 0.0, 'b': 1.0, 's': 1.0, 'c': 1.0} | move
  np.testing.assert_allclose(calibration, list(wanted.values()), atol=0.15)


@given(seed=st.integers(0, 2 ** 32 - 1))
def test_the_slope_and_the_curvature_are_those_of_the_loss(seed):
  rng = np.random.default_rng(seed)
  forecast_H4 = groups(rng, 12, count=int(rng.integers(1, 9)))
  theta = np.array([0, 1, 0, 1]) + rng.normal(0, 0.3, 4)
  loss, slope, curvature = recalibrate._loss(forecast_H4, theta)
  assert loss == pytest.approx(loss_by_loops(theta, forecast_H4), rel=1e-9)
  h = 1e-4 * np.eye(4)
  nearby = [(recalibrate._loss(forecast_H4, theta + d), recalibrate._loss(forecast_H4, theta - d)) for d in h]
  np.testing.assert_allclose(slope, [(up[0] - down[0]) / 2e-4 for up, down in nearby], atol=1e-4, rtol=1e-5)
  np.testing.assert_allclose(curvature, [(up[1] - down[1]) / 2e-4 for up, down in nearby], atol=1e-4, rtol=1e-5)


def test_a_beta_binomial_is_that_of_scipy():
  forecast_H4 = np.array([[0.4, 5.0, 3.0, 7.0]])
  mean = special.expit(0.4)
  assert -loss_by_loops((0, 1, 0, 1), forecast_H4) + np.log(special.comb(7, 3)) == pytest.approx(
      stats.betabinom(7, 5 * mean, 5 * (1 - mean)).logpmf(3))


def test_rates_at_0_and_1_lower_the_concentration_and_leave_the_mean():
  """Forecasts of 1/2 with much evidence, where half of the groups are all right and half all wrong: a fit of the mean
  alone would see nothing wrong, and expect every group to be mixed."""
  forecast_H4 = np.array([[0.0, 20.0, right, 8.0] for right in (0, 8)] * 64)
  calibration = recalibrate.NONE
  for _ in range(12):
    calibration = recalibrate.fit(forecast_H4, calibration)
  assert calibration[0] == pytest.approx(0, abs=1e-3) and calibration[2] * 20 ** calibration[3] < 0.4


@given(seed=st.integers(0, 2 ** 32 - 1))
def test_extreme_forecasts_stay_finite(seed):
  rng = np.random.default_rng(seed)
  H = int(rng.integers(1, 30))
  count_H = rng.integers(0, 100, H)
  forecast_H4 = np.stack([rng.choice([-30.0, 0, 30], H), rng.choice([1e-3, 1, 1e5], H),
                          rng.choice([0, 1], H) * count_H, count_H], axis=1)
  calibration = recalibrate.fit(forecast_H4, recalibrate.NONE)
  assert np.all(np.isfinite(calibration)) and calibration[1] > 0 and calibration[2] > 0 and calibration[3] >= 0
  posterior = recalibrate.apply(Beta(np.array([1e-3, 1e5]), np.array([1e5, 1e-3])), calibration)
  assert all(np.all(np.isfinite(x_M)) and np.all(x_M > 0) for x_M in posterior)
