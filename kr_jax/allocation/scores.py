"""How well success rates were forecast: scores of forecasts against the verdicts that came after them.

Of a group with k right ones of n rollouts, whose success rate was forecast as p, or as Beta(a, b):

    log loss         -[k log p + (n - k) log(1 - p)]                          of the mean alone
    Brier score      k (1 - p)^2 + (n - k) p^2                                of the mean alone
    count log loss   -log [C(n, k) B(a + k, b + n - k) / B(a, b)]             of the whole posterior, spread included

Each is summed over groups and divided by the number of rollouts. A lower score is better, and its expectation is least
for the forecast that is true. The log loss of a rate of 1/2 is log 2 = .693, its Brier score .25.

Sources: Brier 1950, Monthly Weather Review 78; Gneiting and Raftery 2007, JASA 102 (proper scores); Skellam 1948,
JRSS B 10 (the Beta-binomial likelihood of counts).
"""

from __future__ import annotations

import numpy as np
from scipy import special

from kr_jax.allocation.value import Beta
from kr_jax.types import Array

_LEAST = 1e-6  # of the probability of a verdict: a forecast of 0 that fails once would cost infinitely much
_Z = 1.96  # standard deviations of an interval of 95 %


def log_loss(p_M: Array, right_M: Array, rollouts_M: Array) -> float:
  """The log loss of forecast success rates, in nats a rollout.

  Args:
    p_M: in [0, 1], of each group; or one number for all. It counts as if it were in 1e-6..1 - 1e-6.
    right_M: right rollouts of each group.
    rollouts_M: all of its rollouts.

  Returns:
    nan where there is no rollout.
  """
  p_M, right_M, rollouts_M = _checked(p_M, right_M, rollouts_M)
  return _a_rollout(-_log_likelihood(p_M, right_M, rollouts_M), rollouts_M)


def brier(p_M: Array, right_M: Array, rollouts_M: Array) -> float:
  """The Brier score of forecast success rates: the mean of (p - verdict)^2. Arguments and nan as of `log_loss`."""
  p_M, right_M, rollouts_M = _checked(p_M, right_M, rollouts_M)
  return _a_rollout(right_M * (1 - p_M) ** 2 + (rollouts_M - right_M) * p_M ** 2, rollouts_M)


def count_log_loss(success_rate: Array | Beta, right_M: Array, rollouts_M: Array) -> float:
  """The log loss of the groups' numbers of right rollouts, in nats a rollout.

  Args:
    success_rate: the posterior of each group; or p_M, which says that rollouts of a group are independent.
    The others, and nan: as of `log_loss`.
  """
  if isinstance(success_rate, Beta):
    a_M, b_M = (np.asarray(x_M, float) for x_M in success_rate)
    _, right_M, rollouts_M = _checked(a_M / (a_M + b_M), right_M, rollouts_M)
    log_M = special.betaln(a_M + right_M, b_M + rollouts_M - right_M) - special.betaln(a_M, b_M)
  else:
    p_M, right_M, rollouts_M = _checked(success_rate, right_M, rollouts_M)
    log_M = _log_likelihood(p_M, right_M, rollouts_M)
  ways_M = -special.betaln(right_M + 1, rollouts_M - right_M + 1) - np.log1p(rollouts_M)  # log C(n, k)
  return _a_rollout(-log_M - ways_M, rollouts_M)


def reliability(p_M: Array, right_M: Array, rollouts_M: Array, *, bins: int = 10) -> np.ndarray:
  """What came of forecasts, by bins of the forecast rate of equal width; bins of several steps may be added.

  Returns:
    float64 [bins, 5]: rollouts, their forecast right ones (sum n p), the right ones (sum k), the groups with a rollout,
    and the sum of (k - n p)^2 over groups, which `interval` reads.
  """
  p_M, right_M, rollouts_M = _checked(p_M, right_M, rollouts_M)
  expected_M = rollouts_M * p_M
  bin_M = np.broadcast_to(np.minimum((p_M * bins).astype(int), bins - 1), rollouts_M.shape)
  return np.stack([np.bincount(bin_M, weights=x_M, minlength=bins) for x_M in (
      rollouts_M, expected_M, right_M, rollouts_M > 0, (right_M - expected_M) ** 2)], axis=1)


def interval(reliability_B5: Array) -> tuple[np.ndarray, np.ndarray]:
  """95 % intervals of the share of right rollouts in each bin, low_B and high_B; nan where a bin has none.

  Rollouts of a group are right together: n of them say less than n tasks would. Wilson's interval is taken for
  n / max(1, D) rollouts, where D is how many times as much the counts k - n p of groups vary as those of independent
  rollouts do (the design effect). Where that is not known, of one group, or if all or no rollouts are right, each group
  counts as one rollout. Source: Wilson 1927, JASA 22.
  """
  n_B, expected_B, right_B, groups_B, squares_B = np.asarray(reliability_B5, float).T
  some_B = n_B > 0
  n_B, groups_B = np.where(some_B, n_B, 1), np.where(some_B, groups_B, 1)
  rate = right_B / n_B
  spread_B = squares_B - (right_B - expected_B) ** 2 / groups_B
  known_B = (groups_B > 1) & (rate > 0) & (rate < 1)
  effect_B = np.divide(spread_B, n_B * rate * (1 - rate), out=n_B / groups_B, where=known_B)
  n = n_B / np.maximum(effect_B, 1)
  middle = (rate + _Z ** 2 / (2 * n)) / (1 + _Z ** 2 / n)
  half = _Z / (1 + _Z ** 2 / n) * np.sqrt(rate * (1 - rate) / n + _Z ** 2 / (4 * n ** 2))
  return np.where(some_B, middle - half, np.nan), np.where(some_B, middle + half, np.nan)


def _checked(p_M: Array, right_M: Array, rollouts_M: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The arguments as floats. Raises ValueError for what is no success rate or no count of right rollouts."""
  p_M, right_M, rollouts_M = (np.asarray(x, float) for x in (p_M, right_M, rollouts_M))
  if right_M.ndim != 1 or right_M.shape != rollouts_M.shape or p_M.ndim and p_M.shape != right_M.shape:
    raise ValueError(f'forecasts of shape {p_M.shape}, right rollouts of {right_M.shape} and all rollouts of '
                     f'{rollouts_M.shape} are not of the same groups; give a vector with an entry a group for each')
  if not np.all((p_M >= 0) & (p_M <= 1)):
    raise ValueError(f'forecast success rates must lie in [0, 1], not {p_M[~((p_M >= 0) & (p_M <= 1))][:5]}')
  if np.any(bad_M := ~((right_M >= 0) & (right_M <= rollouts_M))):
    m = np.flatnonzero(bad_M)[0]
    raise ValueError(f'group {m} has {right_M[m]:g} right ones of {rollouts_M[m]:g} rollouts; they must lie in '
                     '0..rollouts')
  return p_M, right_M, rollouts_M


def _log_likelihood(p_M: np.ndarray, right_M: np.ndarray, rollouts_M: np.ndarray) -> np.ndarray:
  p_M = np.clip(p_M, _LEAST, 1 - _LEAST)
  return right_M * np.log(p_M) + (rollouts_M - right_M) * np.log1p(-p_M)


def _a_rollout(loss_M: np.ndarray, rollouts_M: np.ndarray) -> float:
  return float(loss_M.sum() / rollouts_M.sum()) if rollouts_M.sum() else float('nan')
