"""Forecasts of success rates, fitted to the verdicts of the last steps.

A posterior lags behind a policy that learns: it counts rollouts of a policy that is no more. How much of it still holds
is read from how well the last steps were forecast. With the log-odds x and the concentration n = a + b of a forecast
Beta(a, b) the recalibrated one has

    log-odds a + b x,    concentration s n^c

and (a, b, s, c) maximise the likelihood of the right rollouts of the last groups (Beta-binomial), less a penalty

    1/2 [4 a^2 + 4 (b - 1)^2 + 4 (log s)^2 + 10 (c - 1)^2]

which keeps (0, 1, 1, 1) until the groups say otherwise. Of a policy that has moved evenly a is the move; b < 1 says
that high and low rates have come together, s < 1 that all evidence has lost weight, and c < 1 that much evidence has
lost more of it than little. The likelihood of counts decides, not the error of the mean: it also fits how often whole
groups are right or wrong.

Source: Cox 1958, Two further applications of a model for binary regression, Biometrika 45 (a and b); the Beta-binomial
likelihood is that of Skellam 1948, JRSS B 10.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from kr_jax.allocation.value import Beta

NONE = np.array([0.0, 1.0, 1.0, 1.0])  # (a, b, s, c) that change nothing
_PENALTY = np.array([4.0, 4.0, 4.0, 10.0])
_LOW, _HIGH = np.array([-5.0, 0.1, -5.0, 0.0]), np.array([5.0, 3.0, 2.0, 1.5])  # of a, b, log s and c
_KEPT = 0.5  # share of the former (a, b, log s, c) that a fit leaves
_LEAST = 1e-3  # of a and b: below it a task is as good as known, and the moments of values lose their digits


def apply(posterior: Beta, calibration: np.ndarray) -> Beta:
  """The recalibrated posterior of each task. calibration: (a, b, s, c)."""
  a, b, s, c = calibration
  z_M, total_M = a + b * log_odds(posterior), s * (posterior.a_M + posterior.b_M) ** c
  return Beta(np.maximum(total_M * special.expit(z_M), _LEAST), np.maximum(total_M * special.expit(-z_M), _LEAST))


def log_odds(posterior: Beta) -> np.ndarray:
  """The log-odds of each posterior's mean."""
  return np.log(posterior.a_M / posterior.b_M)


def fit(forecast_H4: np.ndarray, calibration: np.ndarray) -> np.ndarray:
  """(a, b, s, c) of the last H groups, half way from what it was.

  Args:
    forecast_H4: log-odds and concentration of the forecast, right rollouts and all rollouts of each group; groups
      without rollouts do not count.
    calibration: as it was.
  """
  forecast_H4 = forecast_H4[forecast_H4[:, 3] > 0]
  if not len(forecast_H4):
    return calibration
  a, b, s, c = calibration
  start = np.array([a, b, np.log(s), c])
  a, b, log_s, c = _KEPT * start + (1 - _KEPT) * _minimum(forecast_H4, start)
  return np.array([a, b, np.exp(log_s), c])


def _minimum(forecast_H4: np.ndarray, theta: np.ndarray) -> np.ndarray:
  """The (a, b, log s, c) of the least loss, by Newton's method from theta.

  A solver of scipy would take longer to call than the fit takes: this runs in every step.
  """
  loss, slope, curvature = _loss(forecast_H4, theta)
  for _ in range(50):
    # Where the loss is not convex, its absolute curvature still gives a way down.
    size, axes = np.linalg.eigh(curvature)
    move = -axes @ (axes.T @ slope / np.maximum(np.abs(size), 1e-3))
    for _ in range(30):
      tried = np.clip(theta + move, _LOW, _HIGH)
      found = _loss(forecast_H4, tried)
      if found[0] <= loss:
        break
      move = move / 2
    else:
      return theta
    gained, theta, (loss, slope, curvature) = loss - found[0], tried, found
    if gained < 1e-7 * (1 + abs(loss)):
      break
  return theta


def _loss(forecast_H4: np.ndarray, theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
  """The penalised negative log-likelihood of (a, b, log s, c), its gradient [4] and its second derivatives [4, 4]."""
  x_H, n_H, right_H, count_H = forecast_H4.T
  wrong_H, log_H = count_H - right_H, np.log(n_H)
  a, b, log_s, c = theta
  # The forecast is Beta(alpha, beta) of log-odds z and a concentration whose logarithm is t.
  z_H, total_H = a + b * x_H, np.exp(log_s + c * log_H)
  mean_H, rest_H = special.expit(z_H), special.expit(-z_H)
  alpha_H, beta_H = total_H * mean_H, total_H * rest_H
  rise = lambda f: (
      f(alpha_H + right_H) - f(alpha_H), f(beta_H + wrong_H) - f(beta_H), f(total_H + count_H) - f(total_H))
  of_alpha_H, of_beta_H, of_total_H = rise(special.gammaln)
  likelihood = np.sum(of_alpha_H + of_beta_H - of_total_H)
  # First and second derivatives by alpha and by beta, less what alpha + beta has of them.
  of_alpha_H, of_beta_H, of_total_H = rise(special.digamma)
  of_alphas_H, of_betas_H, of_totals_H = rise(lambda y_H: special.zeta(2, y_H))  # the trigamma function
  # By z, in which d alpha = -d beta = d dz; and by t, in which d alpha = alpha dt.
  d_H = total_H * mean_H * rest_H
  of_z_H = d_H * (of_alpha_H - of_beta_H)
  of_t_H = alpha_H * of_alpha_H + beta_H * of_beta_H - total_H * of_total_H
  of_zz_H = d_H ** 2 * (of_alphas_H + of_betas_H) + (rest_H - mean_H) * of_z_H
  of_zt_H = of_z_H + d_H * (alpha_H * of_alphas_H - beta_H * of_betas_H)
  of_tt_H = of_t_H + alpha_H ** 2 * of_alphas_H + beta_H ** 2 * of_betas_H - total_H ** 2 * of_totals_H
  # By a, b, log s and c, on which z and t depend linearly.
  z_4H, t_4H = np.zeros((2, 4, len(x_H)))
  z_4H[0], z_4H[1], t_4H[2], t_4H[3] = 1, x_H, 1, log_H
  slope = z_4H @ of_z_H + t_4H @ of_t_H
  zt = (z_4H * of_zt_H) @ t_4H.T
  curvature = (z_4H * of_zz_H) @ z_4H.T + zt + zt.T + (t_4H * of_tt_H) @ t_4H.T
  off = theta - (0, 1, 0, 1)
  return np.sum(_PENALTY * off ** 2) / 2 - likelihood, _PENALTY * off - slope, np.diag(_PENALTY) - curvature
