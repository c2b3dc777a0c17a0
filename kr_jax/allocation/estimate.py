"""Statistics of every task of the training split, and the success rates that follow from them.

    posterior   Beta(successes + a, failures + b), of discounted evidence and a prior (a, b) of the task's stratum
                (prior.py), fitted to the verdicts of the last steps (recalibrate.py).
    window      the paper's: the mean of a task's last group if the group had 16 rollouts or more, else of its last
                16 rollouts; not known before 8 (arXiv 2509.25849 and the authors' code).

Evidence is discounted by passes over the split: a task comes again once a pass, however many steps a pass has. How
fast the policy moves is seen in the verdicts, and recalibration answers for it.

The expected tokens of a rollout, its expected reward and the noise of its gradient (`nu`) are estimated here too.
"""

from __future__ import annotations

import numpy as np

from kr_jax import types
from kr_jax.allocation import prior
from kr_jax.allocation import recalibrate
from kr_jax.allocation.value import Beta, Window
from kr_jax.types import Array

_RECALIBRATION_STEPS = 8  # the last steps, whose groups estimates are recalibrated by
_WINDOW = 16  # rollouts of the window estimate
_KNOWN = 8  # rollouts after which the window estimate is used
_LENGTH_CONCENTRATION = 4.0  # rollouts of the mean length of an outcome that are added to those of a task
_REWARD_CONCENTRATION = 1.0  # rollouts of reward 0 if wrong and 1 if right that are added to those seen
_REWARD_DISCOUNT = 0.9  # share of what was seen of rewards that a step leaves
_NU_DISCOUNT = 0.98  # the same of measurements of nu
_NU_BOUNDS = (0.05, 200.0)  # of a measured nu; near either bound the budgets hardly change with nu
_NU_BELIEF = 20.0  # weight of the default nu, in units of signal_scale


def init(num_tasks: int, *, groups: int = 512, stratum_I: Array | None = None, prior_rate_I: Array | None = None,
         prior_rollouts: float = 4.0) -> types.TaskStats:
  """Statistics of tasks of which no rollout was seen.

  Args:
    groups: H, the last groups of tasks that recalibration is fitted to; 0: forecasts are not recalibrated.
    stratum_I: whole numbers from 0 on: the tasks that share a prior. None: all.
    prior_rate_I: success rates known before, such as another model's; nan where none is known. None: none.
    prior_rollouts: what a known rate is worth.
  """
  zero_I = lambda: np.zeros(num_tasks)
  rate_I = np.full(num_tasks, np.nan) if prior_rate_I is None else np.asarray(prior_rate_I, float)
  known_OI = prior_rollouts * np.nan_to_num(np.stack([1 - rate_I, rate_I]))
  return types.TaskStats(
      successes_I=zero_I(), failures_I=zero_I(), tokens_OI=np.zeros((2, num_tasks)), visits_I=zero_I(),
      rates_I=zero_I(), rollouts_I=np.zeros(num_tasks, np.int64),
      recent_IW=np.full((num_tasks, _WINDOW), -1, np.int8), window_rate_I=zero_I(),
      stratum_I=np.zeros(num_tasks, np.int32) if stratum_I is None else np.asarray(stratum_I, np.int32),
      known_OI=known_OI, forecast_H4=np.zeros((groups, 4)), calibration=recalibrate.NONE.copy(),
      reward_O2=np.zeros((2, 2)), gradient=np.zeros(4))


def recalibration_groups(tasks_per_step: int, recalibrate: bool = True) -> int:
  """`groups` of `init`, of a run: the tasks of its last steps."""
  return _RECALIBRATION_STEPS * tasks_per_step if recalibrate else 0


def observe(stats: types.TaskStats, index_M: Array, task_R: Array, verdict_R: Array, length_R: Array, *,
            discount: float, reward_R: Array | None = None) -> types.TaskStats:
  """The statistics after a step; the arrays of `stats` are not changed.

  A step of M of I tasks discounts the evidence on all tasks, seen in it or not, because the policy has changed.

  Args:
    index_M: the tasks' rows in the statistics.
    task_R: the task of each rollout, in 0..M-1; M where there is no rollout, or one that is not verified.
    verdict_R: 1.0 where the completion is right, 0.0 where it is wrong, whatever the reward is.
    length_R: completion tokens.
    discount: the share of the earlier evidence that a pass over the split leaves.
    reward_R: None: the verdicts.

  Raises:
    ValueError: a verdict that is neither 0 nor 1.
  """
  index_M, task_R = np.asarray(index_M), np.asarray(task_R)
  I, M = len(stats.rollouts_I), len(index_M)
  is_rollout_R = task_R < M
  task_R = task_R[is_rollout_R]
  verdict_R, length_R, reward_R = (np.asarray(x_R, float)[is_rollout_R] for x_R in (
      verdict_R, length_R, verdict_R if reward_R is None else reward_R))
  if not np.all((verdict_R == 0) | (verdict_R == 1)):
    bad = verdict_R[(verdict_R != 0) & (verdict_R != 1)][0]
    raise ValueError(f'verdict_R holds {bad:g}, and a verdict is 0.0 or 1.0; give what is in between as reward_R')
  index_R = index_M[task_R]
  of_task = lambda x_R: np.bincount(task_R, weights=x_R, minlength=M)
  right_M, count_M = of_task(verdict_R), of_task(np.ones(len(task_R)))
  recent_IW, window_rate_I = stats.recent_IW.copy(), stats.window_rate_I.copy()
  for m in np.flatnonzero(count_M):
    i, group = index_M[m], verdict_R[task_R == m]
    recent_IW[i] = np.concatenate([recent_IW[i], group.astype(np.int8)])[-_WINDOW:]
    counted = group if len(group) >= _WINDOW else recent_IW[i][recent_IW[i] >= 0]
    window_rate_I[i] = counted.mean()
  kept = discount ** (M / I)
  sum_of = lambda x_M: np.bincount(index_M, weights=x_M, minlength=I)
  by_outcome = lambda x_R: np.stack([np.bincount(index_R, (verdict_R == o) * x_R, minlength=I) for o in (0, 1)])
  reward_O2 = [[reward_R[verdict_R == o].sum(), np.sum(verdict_R == o)] for o in (0, 1)]
  return _recalibrated(stats, index_M, right_M, count_M)._replace(
      successes_I=kept * stats.successes_I + sum_of(right_M),
      failures_I=kept * stats.failures_I + sum_of(count_M - right_M),
      tokens_OI=kept * stats.tokens_OI + by_outcome(length_R),
      visits_I=kept * stats.visits_I + sum_of(count_M > 0),
      rates_I=kept * stats.rates_I + sum_of(right_M / np.maximum(count_M, 1)),
      rollouts_I=stats.rollouts_I + np.bincount(index_R, minlength=I),
      recent_IW=recent_IW, window_rate_I=window_rate_I,
      reward_O2=_REWARD_DISCOUNT * stats.reward_O2 + reward_O2)


def _recalibrated(stats: types.TaskStats, index_M: np.ndarray, right_M: np.ndarray, count_M: np.ndarray
                  ) -> types.TaskStats:
  """The statistics with the calibration by the groups of one step more."""
  H = len(stats.forecast_H4)
  if not H:
    return stats
  forecast = evidence(stats, index_M)
  group_M4 = np.stack([recalibrate.log_odds(forecast), forecast.a_M + forecast.b_M, right_M, count_M], axis=1)
  forecast_H4 = np.concatenate([stats.forecast_H4, group_M4[count_M > 0]])[-H:]
  return stats._replace(forecast_H4=forecast_H4, calibration=recalibrate.fit(forecast_H4, stats.calibration))


def evidence(stats: types.TaskStats, index_M: Array) -> Beta:
  """The posterior of tasks' success rates if the policy had not moved: discounted evidence and the prior."""
  a_I, b_I = prior.fit(stats)
  return Beta(stats.successes_I[index_M] + a_I[index_M], stats.failures_I[index_M] + b_I[index_M])


def posterior(stats: types.TaskStats, index_M: Array) -> Beta:
  """The forecast of tasks' success rates: the posterior, recalibrated."""
  return recalibrate.apply(evidence(stats, index_M), stats.calibration)


def due(stats: types.TaskStats, index_M: Array) -> np.ndarray:
  """bool, the tasks of which less than one rollout's worth of evidence is left, or of which none was ever seen."""
  return stats.successes_I[index_M] + stats.failures_I[index_M] < 1


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


def tokens(stats: types.TaskStats, index_M: Array, *, default: float, rate_M: Array | None = None) -> np.ndarray:
  """Expected completion tokens of a rollout of each task: p L_right + (1 - p) L_wrong, as failures are often longer.

  L_right and L_wrong are the task's mean tokens by outcome, shrunk to those of all tasks: (tokens of the task + k *
  mean of all tasks) / (rollouts of the task + k), k = 4, all discounted alike. An outcome that was never seen has the
  mean of the other; before any rollout was seen all tasks have the default.

  Args:
    rate_M: p, the expected success rate; None: of `posterior`.
  """
  count_OI = np.stack([stats.failures_I, stats.successes_I])
  count_O, sum_O = count_OI.sum(axis=1), stats.tokens_OI.sum(axis=1)
  if not count_O.any():
    return np.full(np.shape(index_M), float(default))
  mean_O = np.where(count_O > 0, sum_O / np.where(count_O > 0, count_O, 1), sum_O.sum() / count_O.sum())
  k = _LENGTH_CONCENTRATION
  wrong_M, right_M = (stats.tokens_OI[:, index_M] + k * mean_O[:, None]) / (count_OI[:, index_M] + k)
  p_M = mean_rate(posterior(stats, index_M)) if rate_M is None else np.asarray(rate_M)
  return p_M * right_M + (1 - p_M) * wrong_M


def reward(stats: types.TaskStats, posterior: Beta) -> tuple[np.ndarray, np.ndarray]:
  """Expected reward of a rollout of each task, and how many rollouts' worth of evidence tell of it.

  The reward expected of an outcome is the mean of the steps before, p times that of right rollouts plus 1 - p times
  that of wrong ones. Where rewards are verdicts, these are a / (a + b) and a + b.
  """
  (wrong, wrongs), (right, rights) = stats.reward_O2
  k = _REWARD_CONCENTRATION
  right, wrong = (right + k) / (rights + k), wrong / (wrongs + k)
  total_M = posterior.a_M + posterior.b_M
  return (posterior.a_M * right + posterior.b_M * wrong) / total_M, total_M


def observe_gradient(stats: types.TaskStats, gradient: Array, *, steps: int) -> types.TaskStats:
  """Adds a measurement of `noise.gradient_noise`: (signal, signal_scale, noise, noise_scale), if it is finite.

  `nu` is a ratio of sums, which is steadier than a mean of ratios: a single signal can be near 0.

  Args:
    steps: since the measurement before, each of which discounts it.
  """
  gradient = np.asarray(gradient, float)
  if not np.isfinite(gradient).all():
    return stats
  return stats._replace(gradient=_NU_DISCOUNT ** steps * stats.gradient + gradient)


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
