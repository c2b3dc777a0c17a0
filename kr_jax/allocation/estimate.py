"""Statistics of every task of the training split, and the success rates that follow from them.

    posterior   Beta(successes + a, failures + b), of discounted evidence and a prior (a, b) fitted to all tasks
                (empirical Bayes).
    window      the paper's: the mean of a task's last group if the group had 16 rollouts or more, else of its last
                16 rollouts; not known before 8 (arXiv 2509.25849 and the authors' code).

The expected tokens of a rollout and the noise of its gradient (`nu`) are estimated here too.
"""

from __future__ import annotations

import numpy as np

from kr_jax import types
from kr_jax.allocation.value import Beta, Window
from kr_jax.types import Array

_DEFAULT_CONCENTRATION = 1.0  # a + b of the prior until enough tasks were seen to fit one, as of Jeffreys' prior
_FEWEST_TASKS = 8  # to fit a prior to
_WINDOW = 16  # rollouts of the window estimate
_KNOWN = 8  # rollouts after which the window estimate is used
_LENGTH_CONCENTRATION = 4.0  # rollouts of the mean length of all tasks that are added to those of a task
_NU_BOUNDS = (0.05, 200.0)  # of a measured nu; near either bound the budgets hardly change with nu
_NU_BELIEF = 20.0  # weight of the default nu, in units of signal_scale


def init(num_tasks: int) -> types.TaskStats:
  """Statistics of tasks of which no rollout was seen."""
  zero_I = lambda: np.zeros(num_tasks)
  return types.TaskStats(
      successes_I=zero_I(), failures_I=zero_I(), tokens_I=zero_I(), rollouts_I=np.zeros(num_tasks, np.int64),
      recent_IW=np.full((num_tasks, _WINDOW), -1, np.int8), window_rate_I=zero_I(), gradient=np.zeros(4))


def observe(stats: types.TaskStats, index_M: Array, task_R: Array, verdict_R: Array, length_R: Array, *,
            discount: float) -> types.TaskStats:
  """The statistics after a step; the arrays of `stats` are not changed.

  A step discounts the evidence on all tasks, seen in it or not, because the policy has changed.

  Args:
    index_M: the tasks' rows in the statistics.
    task_R: the task of each rollout, in 0..M-1; M where there is no rollout, or one that is not verified.
    verdict_R: 1.0 where the completion is right, 0.0 where it is wrong, whatever the reward is.
    length_R: completion tokens.
    discount: the share of the earlier evidence that is kept.
  """
  index_M, task_R = np.asarray(index_M), np.asarray(task_R)
  is_rollout_R = task_R < len(index_M)
  task_R = task_R[is_rollout_R]
  verdict_R, length_R = (np.asarray(x_R, float)[is_rollout_R] for x_R in (verdict_R, length_R))
  index_R = index_M[task_R]
  I = len(stats.rollouts_I)
  sum_of = lambda weight_R: np.bincount(index_R, weights=weight_R, minlength=I)
  recent_IW, window_rate_I = stats.recent_IW.copy(), stats.window_rate_I.copy()
  for m in np.unique(task_R):
    i, group = index_M[m], verdict_R[task_R == m]
    recent_IW[i] = np.concatenate([recent_IW[i], group.astype(np.int8)])[-_WINDOW:]
    counted = group if len(group) >= _WINDOW else recent_IW[i][recent_IW[i] >= 0]
    window_rate_I[i] = counted.mean()
  return stats._replace(
      successes_I=discount * stats.successes_I + sum_of(verdict_R),
      failures_I=discount * stats.failures_I + sum_of(1 - verdict_R),
      tokens_I=discount * stats.tokens_I + sum_of(length_R),
      rollouts_I=stats.rollouts_I + np.bincount(index_R, minlength=I),
      recent_IW=recent_IW, window_rate_I=window_rate_I)


def prior(stats: types.TaskStats) -> tuple[float, float]:
  """(a, b) of the Beta prior that fits all tasks: empirical Bayes by moments.

  With n_i rollouts and rate p_i of task i, W = sum n_i, m = sum n_i p_i / W, the weighted spread
  S = sum n_i (p_i - m)^2 has the expectation m (1-m) [(1-rho) A + rho B], A = sum 1 - n_i/W,
  B = sum n_i (1 - n_i/W), rho = 1 / (a+b+1). Source: Kleinman 1973, JASA 68, eq. 2.3-2.5.
  """
  n_I = stats.successes_I + stats.failures_I
  # One success and one failure more keep the mean away from 0 and 1, where a or b would be 0.
  mean = (stats.successes_I.sum() + 1) / (n_I.sum() + 2)
  seen = n_I > 1.5  # about one rollout says nothing of the spread
  n, p = n_I[seen], stats.successes_I[seen] / n_I[seen]
  concentration = _DEFAULT_CONCENTRATION
  if len(n) >= _FEWEST_TASKS and 0 < p @ n < n.sum():
    m, rest = p @ n / n.sum(), 1 - n / n.sum()
    A, B = rest.sum(), n @ rest
    rho = (n @ (p - m) ** 2 / (m * (1 - m)) - A) / (B - A)
    concentration = 1 / np.clip(rho, 0.05, 0.95) - 1
  return mean * concentration, (1 - mean) * concentration


def posterior(stats: types.TaskStats, index_M: Array) -> Beta:
  """The posterior of tasks' success rates, from their discounted evidence and the fitted prior."""
  a, b = prior(stats)
  return Beta(stats.successes_I[index_M] + a, stats.failures_I[index_M] + b)


def window(stats: types.TaskStats, index_M: Array) -> Window:
  """The success rates of tasks as the paper's code estimates them."""
  return Window(stats.window_rate_I[index_M], stats.rollouts_I[index_M] >= _KNOWN)


def success_rate(stats: types.TaskStats, index_M: Array, kind: str) -> Beta | Window:
  """The success rates of tasks; kind: 'posterior' or 'window'."""
  return {'posterior': posterior, 'window': window}[kind](stats, index_M)


def mean_rate(success_rate: Beta | Window) -> np.ndarray:
  """success_rate_M, one number a task: the mean of its posterior; 1/2 where a Window does not know it."""
  if isinstance(success_rate, Beta):
    return success_rate.a_M / (success_rate.a_M + success_rate.b_M)
  return np.where(success_rate.known_M, success_rate.rate_M, 0.5)


def tokens(stats: types.TaskStats, index_M: Array, *, default: float) -> np.ndarray:
  """Expected completion tokens of a rollout of each task, shrunk to the mean of all tasks.

  (tokens of the task + k * mean of all tasks) / (rollouts of the task + k), k = 4, where tokens and rollouts are
  discounted alike. Before any rollout was seen all tasks have the default.
  """
  n_I = stats.successes_I + stats.failures_I
  mean = stats.tokens_I.sum() / n_I.sum() if n_I.sum() > 0 else default
  return (stats.tokens_I[index_M] + _LENGTH_CONCENTRATION * mean) / (n_I[index_M] + _LENGTH_CONCENTRATION)


def observe_gradient(stats: types.TaskStats, gradient: Array, *, discount: float) -> types.TaskStats:
  """Adds a measurement of `noise.gradient_noise`: (signal, signal_scale, noise, noise_scale).

  `nu` is a ratio of sums, which is steadier than a mean of ratios: a single signal can be near 0.
  """
  return stats._replace(gradient=discount * stats.gradient + np.asarray(gradient, float))


def nu(stats: types.TaskStats, *, default: float) -> float:
  """The noise-to-signal ratio of a rollout's gradient, as measured so far, within 0.05..200.

  With the summed measurements (S, s, E, e) and the noise v = E / e it is v / ((S + k v / default) / (s + k)).
  While the measurements are few it is near the default; as s outgrows k it goes to (E / e) / (S / s). k = 20 is
  about the s of ten mixed groups of eight rollouts: the signal of the first few can be far off, even negative.
  """
  signal, signal_scale, noise, noise_scale = stats.gradient
  if not (signal_scale > 0 and noise_scale > 0):
    return default
  low, high = _NU_BOUNDS
  noise /= noise_scale
  signal = (signal + _NU_BELIEF * noise / default) / (signal_scale + _NU_BELIEF)
  if noise <= 0:
    return low
  return float(np.clip(noise / signal, low, high)) if signal > 0 else high
