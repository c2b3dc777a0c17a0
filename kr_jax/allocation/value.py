"""The value V(N, p) of N rollouts of a task with success rate p, and its expectation where p is uncertain.

A group teaches nothing unless it is mixed, which means that it has a success and a failure. The named values are 0 at
N = 1, 0 at p = 0 and p = 1, and concave in N >= 1.

The success rate of a task is either a number or a Beta(a, b) posterior. Under a posterior the value is expected: in
closed form where V = mixed * p^i (1-p)^j, since

    E[p^k (1-p)^l] = B(a+k, b+l) / B(a, b)

and by quadrature for every other V. Source: Li et al. 2025, arXiv 2509.25849, eq. 5-8.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import NamedTuple

import numpy as np

from kr_jax import knobs
from kr_jax.types import Array

Value = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of (N, p), floats that broadcast; 0 at p = 0 and at p = 1


class Beta(NamedTuple):
  """A posterior Beta(a, b) of the success rate of each task."""

  a_M: np.ndarray
  b_M: np.ndarray


class Window(NamedTuple):
  """Success rates as the paper's code estimates them: the mean of each task's last rollouts."""

  rate_M: np.ndarray  # any number where not known
  known_M: np.ndarray  # bool, whether the task has been seen often enough to have one


def mixed(budget: Array, p: Array) -> np.ndarray:
  """The probability 1 - p^N - (1-p)^N that a group of N rollouts is mixed. arXiv 2509.25849, eq. 5."""
  return np.maximum(1 - np.power(p, budget) - np.power(1 - p, budget), 0.0)


def infogain(budget: Array, p: Array) -> np.ndarray:
  """V = mixed * p (1-p)^2, the paper's value. arXiv 2509.25849, eq. 7.

  With p = sigmoid(z), a gradient step on the log-likelihood of the successes moves z in proportion to d log p / dz =
  1-p, and dp = p (1-p) dz. To first order p rises by ~ p (1-p)^2, most at p = 1/3.
  """
  return mixed(budget, p) * p * (1 - p) ** 2


def variance(budget: Array, p: Array) -> np.ndarray:
  """V = mixed * p (1-p), where p (1-p) is the variance of the reward.

  It is the information gain of a step of fixed length, which Adam takes, or a clip of the gradient's norm
  that is active: |dz| is then the same for all tasks, and dp = p (1-p) dz. Symmetric, most at p = 1/2.
  """
  return mixed(budget, p) * p * (1 - p)


def snr(budget: Array, p: Array, nu: float) -> np.ndarray:
  """V_nu = q (N-1) q / ((N-1) q + nu), q = p (1-p): the part of the signal q that noise leaves.

  The gradient of a rollout is a signal that depends on the reward, (reward - p) x, and noise of power nu |x|^2. With
  leave-one-out advantages (reward - mean) N / (N-1), the mean over N rollouts has the signal q x, of power ~ q^2, and
  noise of power ~ q nu / (N-1). A linear (Wiener) estimate keeps of the signal the share q^2 / (q^2 + q nu / (N-1)).
  For nu -> 0 two rollouts have the whole value q; for large nu the value is linear in N.
  """
  q = p * (1 - p)
  signal = (budget - 1) * q
  return q * signal / (signal + nu)


VALUES = {'infogain': infogain, 'variance': variance, 'snr': snr}
_POWERS = {mixed: (0, 0), infogain: (1, 2), variance: (1, 1)}  # (i, j) of V = mixed * p^i (1-p)^j


def check(value: str | Value, nu: float) -> None:
  """Raises ValueError for an unknown value, or a nu that is not a positive number."""
  knobs.Alloc.check(nu=nu)
  if not callable(value):
    knobs.Alloc.check(value=value)


def check_success_rate(success_rate: Array | Beta | Window) -> int:
  """M, the number of tasks. Raises ValueError for anything but a success rate of each task."""
  if isinstance(success_rate, Window):
    if np.ndim(success_rate.known_M) != 1 or np.shape(success_rate.rate_M) != np.shape(success_rate.known_M):
      raise ValueError(f'a Window needs a rate and a known of each task, not vectors of shapes '
                       f'{np.shape(success_rate.rate_M)} and {np.shape(success_rate.known_M)}')
    return check_success_rate(np.where(success_rate.known_M, success_rate.rate_M, 0.5))
  if isinstance(success_rate, Beta):
    for x_M in success_rate:
      if np.ndim(x_M) != 1 or not np.all(np.isfinite(x_M)) or np.any(np.asarray(x_M) <= 0):
        raise ValueError(f'a Beta posterior needs vectors of finite positive numbers, not {x_M}')
    if len(success_rate.a_M) != len(success_rate.b_M):
      raise ValueError(f'a Beta posterior has {len(success_rate.a_M)} a and {len(success_rate.b_M)} b; each task '
                       'needs one of each')
    return len(success_rate.a_M)
  p_M = np.asarray(success_rate)
  if p_M.ndim != 1:
    raise ValueError(f'success_rate_M must be a vector, not of shape {p_M.shape}')
  if p_M.dtype.kind not in 'fiub':
    raise ValueError(f'success_rate_M must hold numbers, not {p_M.dtype}')
  if bad := [(int(i), float(p_M[i])) for i in np.flatnonzero(~((p_M >= 0) & (p_M <= 1)))]:
    raise ValueError(f'success rates must lie in [0, 1]; (row, value) of those that do not: {bad}')
  return len(p_M)


def expected(success_rate: Array | Beta, budget: Array, value: str | Value = 'infogain', nu: float = 2.0
             ) -> np.ndarray:
  """V(N, p) of M tasks; under posteriors its expectation.

  Args:
    success_rate: success_rate_M in [0, 1], or a Beta posterior of each task.
    budget: candidate budgets N >= 1: budget_J for all tasks, or budget_MJ.
    value: a name in VALUES or a function of (N, p).
    nu: noise-to-signal ratio of a rollout's gradient, for 'snr'.

  Returns:
    float64 [M, J].
  """
  check(value, nu)
  if not callable(value):
    value = functools.partial(snr, nu=nu) if value == 'snr' else VALUES[value]
  budget = np.asarray(budget)
  if value in _POWERS:
    return _closed_form(success_rate, budget, *_POWERS[value])
  if isinstance(success_rate, Beta):
    if budget.ndim == 2:
      return _quadrature(success_rate, budget, value)
    # Distinct posteriors, sorted: equal tasks have equal values to the last bit, in any order of the tasks.
    distinct, index_M = np.unique(np.stack(success_rate, axis=1), axis=0, return_inverse=True)
    return _quadrature(Beta(*distinct.T), budget, value)[index_M]
  return value(budget.astype(float), np.asarray(success_rate, float)[:, None])


def prob_nonzero_gradient(success_rate: Array | Beta, budget: Array) -> np.ndarray:
  """The probability that a group of each task is mixed. Arguments and result as for `expected`."""
  return expected(success_rate, budget, mixed)


def _closed_form(success_rate: Array | Beta, budget: np.ndarray, i: int, j: int) -> np.ndarray:
  """E[(1 - p^N - (1-p)^N) p^i (1-p)^j], where each moment follows from the one before it."""
  n = np.arange(budget.max(initial=0))
  if isinstance(success_rate, Beta):
    a, b = (np.asarray(x_M, float)[:, None] for x_M in success_rate)
    rising_factorial = lambda x, k: np.prod([x + l for l in range(k)], axis=0)
    base = rising_factorial(a, i) * rising_factorial(b, j) / rising_factorial(a + b, i + j)
    # E[p^(n+1) w] / E[p^n w] under the weight w = p^i (1-p)^j, and the same of 1-p.
    success = (a + i + n) / (a + b + i + j + n)
    failure = (b + j + n) / (a + b + i + j + n)
  else:
    p = np.asarray(success_rate, float)[:, None]
    base = p ** i * (1 - p) ** j
    success, failure = np.broadcast_to(p, (len(p), len(n))), np.broadcast_to(1 - p, (len(p), len(n)))
  # Column N - 1: the probability that all N rollouts have one outcome.
  equal = np.cumprod(success, axis=1) + np.cumprod(failure, axis=1)
  equal = equal[:, budget - 1] if budget.ndim == 1 else np.take_along_axis(equal, budget - 1, axis=1)
  return base * np.maximum(1 - equal, 0.0)  # at N = 1 the difference is 0 but for its rounding


# In log-odds x a Beta density falls like e^(a x) and e^(-b x). The density and the values are analytic for
# |Im x| < pi, so the trapezoidal rule converges geometrically. 80 nodes over 5 standard deviations and 18
# e-folds on each side have relative errors below 1e-7 (tests).
_NODES = 80


def _quadrature(posterior: Beta, budget: np.ndarray, value: Value) -> np.ndarray:
  """E[V] = E[q] E'[V / q], q = p (1-p), where E' is under Beta(a+1, b+1), whose tails are never heavy.

  Tasks whose posteriors have about the same width and position share their nodes, and so the values at the nodes.
  """
  a_M, b_M = (np.asarray(x_M, float) for x_M in posterior)
  mean_q_M = a_M * b_M / ((a_M + b_M) * (a_M + b_M + 1))
  a_M, b_M = a_M + 1, b_M + 1
  mode_M, sd_M = np.log(a_M / b_M), np.sqrt(1 / a_M + 1 / b_M)
  left_M, right_M = mode_M - 5 * sd_M - 18 / a_M, mode_M + 5 * sd_M + 18 / b_M
  octave_M = np.floor(np.log2((right_M - left_M) / (_NODES - 1)))  # of the distance between nodes
  position_M = np.floor(mode_M / (_NODES * 2 ** octave_M))
  group_M = np.unique(np.stack([octave_M, position_M]), axis=1, return_inverse=True)[1]
  out = np.empty((len(a_M), budget.shape[-1]))
  for group in range(group_M.max(initial=-1) + 1):
    m = np.flatnonzero(group_M == group)
    distance = 2 ** octave_M[m[0]]
    first, last = np.floor(left_M[m].min() / distance), np.ceil(right_M[m].max() / distance)
    x = distance * np.arange(first, last + 1)
    log_p, log_not_p = -np.logaddexp(0, -x), -np.logaddexp(0, x)
    density = np.outer(a_M[m], log_p) + np.outer(b_M[m], log_not_p)
    weight = np.exp(density - density.max(axis=1, keepdims=True))
    weight *= (mean_q_M[m] / weight.sum(axis=1))[:, None] / np.exp(log_p + log_not_p)
    if budget.ndim == 1:
      out[m] = weight @ value(budget.astype(float), np.exp(log_p)[:, None])
    else:
      for j in range(budget.shape[1]):
        out[m, j] = np.sum(weight * value(budget[m, j, None].astype(float), np.exp(log_p)), axis=1)
  return out
