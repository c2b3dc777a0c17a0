"""The prior of success rates, a Beta distribution of each stratum of the tasks: empirical Bayes by moments.

Each task that was seen counts once, whatever its rollouts: budgets follow from estimates, so a mean over rollouts
leans to the tasks that got most of them. The rate of a task is the mean over its visits of the share of right
rollouts. As a budget is decided before its rollouts, each share has the task's rate as its expectation. With the mean m
of these rates and n_i rollouts of task i, the squared deviation of a task's share p_i has the expectation

    m (1 - m) [rho + (1 - rho) / n_i],    rho = 1 / (a + b + 1)

from which the sum over tasks tells rho. A stratum of few tasks is drawn to what all tasks have.

Source: Kleinman 1973, JASA 68, eq. 2.3-2.5, with equal weights.
"""

from __future__ import annotations

import numpy as np

from kr_jax.types import TaskStats

_RHO_BOUNDS = (0.05, 0.95)
_DEFAULT_RHO = 0.5  # a + b = 1, as of Jeffreys' prior, until there is a spread to see
_FEWEST_ROLLOUTS = 1.5  # of a task whose spread counts: about one says nothing
_BELIEF = 8.0  # tasks that the default counts for among all, and the values of all tasks in a stratum


def fit(stats: TaskStats) -> tuple[np.ndarray, np.ndarray]:
  """(a_I, b_I) of each task's prior, known rates included."""
  seen_I = stats.visits_I > 0
  n_I = stats.successes_I + stats.failures_I
  strata = int(stats.stratum_I.max(initial=0)) + 1
  of_stratum = lambda x_X, which: np.bincount(stats.stratum_I[which], weights=x_X, minlength=strata)
  rate_X = stats.rates_I[seen_I] / stats.visits_I[seen_I]
  count_Y, sum_Y = of_stratum(np.ones(len(rate_X)), seen_I), of_stratum(rate_X, seen_I)
  # One success and one failure more keep the mean away from 0 and 1, where a or b would be 0.
  mean = (sum_Y.sum() + 1) / (count_Y.sum() + 2)
  mean_Y = (sum_Y + _BELIEF * mean) / (count_Y + _BELIEF)

  spread_I = seen_I & (n_I > _FEWEST_ROLLOUTS)
  n_X, m_X = n_I[spread_I], mean_Y[stats.stratum_I[spread_I]]
  square_X = (stats.successes_I[spread_I] / n_X - m_X) ** 2 / (m_X * (1 - m_X))
  excess_Y, scale_Y = of_stratum(square_X - 1 / n_X, spread_I), of_stratum(1 - 1 / n_X, spread_I)
  rho = (excess_Y.sum() + _BELIEF * _DEFAULT_RHO) / (scale_Y.sum() + _BELIEF)
  rho_Y = np.clip((excess_Y + _BELIEF * rho) / (scale_Y + _BELIEF), *_RHO_BOUNDS)
  concentration_Y = 1 / rho_Y - 1
  wrong_I, right_I = stats.known_OI
  mean_I, concentration_I = mean_Y[stats.stratum_I], concentration_Y[stats.stratum_I]
  return mean_I * concentration_I + right_I, (1 - mean_I) * concentration_I + wrong_I
