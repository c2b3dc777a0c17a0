"""What N rollouts of a task with success rate p are worth: V(N, p), and what it is expected to be.

A group teaches nothing unless it is mixed, that is, has a success and a failure:

    prob_nonzero_gradient(N, p) = 1 - p^N - (1-p)^N

The value is that probability times what a mixed group teaches; `infogain`, `variance` and `snr`
differ in the second factor. All three are 0 at N = 1, 0 at p = 0 and p = 1, and concave in N >= 1.

The success rate of a task may be known, or known up to a Beta(a, b) posterior. Then the value is its
expectation: in closed form where V = prob_nonzero_gradient * p^i (1-p)^j, since

    E[p^k (1-p)^l] = B(a+k, b+l) / B(a, b)

and by quadrature for every other V. Source: Li et al. 2025, arXiv 2509.25849, eq. 5-8.

A value of one's own is a function of (N, p), numpy in and out, that is 0 at p = 0 and p = 1.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import NamedTuple

import numpy as np

from kr_jax import knobs
from kr_jax.types import Array

Value = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Beta(NamedTuple):
  """Success rates known up to a Beta(a, b) posterior each."""

  a_M: np.ndarray
  b_M: np.ndarray


class Window(NamedTuple):
  """Success rates as the paper's code estimates them: means of a task's last rollouts."""

  rate_M: np.ndarray  # any number where unknown
  known_M: np.ndarray  # bool, whether the task has been seen often enough to have one


def mixed(budget: Array, p: Array) -> np.ndarray:
  """P(a group of N rollouts is mixed) = 1 - p^N - (1-p)^N. arXiv 2509.25849, eq. 5."""
  return np.maximum(1 - np.power(p, budget) - np.power(1 - p, budget), 0.0)


def infogain(budget: Array, p: Array) -> np.ndarray:
  """V = mixed * p (1-p)^2, the paper's value. arXiv 2509.25849, eq. 7.

  With p = sigmoid(z), a gradient step on the log-likelihood of the successes moves z by an amount
  ~ d log p / dz = 1-p, and dp = p (1-p) dz: to first order p rises by ~ p (1-p)^2. Most at p = 1/3.
  """
  return mixed(budget, p) * p * (1 - p) ** 2


def variance(budget: Array, p: Array) -> np.ndarray:
  """V = mixed * p (1-p), the variance of the reward.

  As `infogain` for a step of fixed length, which a normalised gradient makes (Adam, or a clip of its
  norm that binds): |dz| is then the same for all tasks, and dp = p (1-p) dz. Symmetric, most at 1/2.
  """
  return mixed(budget, p) * p * (1 - p)


def snr(budget: Array, p: Array, nu: float) -> np.ndarray:
  """V_nu = q (N-1) q / ((N-1) q + nu), q = p (1-p): what is left of `variance` under noise.

  A rollout's score is reward-dependent signal, (reward - p) x, and noise of power nu |x|^2. With
  leave-one-out advantages (reward - mean) N / (N-1), the mean over N rollouts has signal q x, power
  ~ q^2, and noise of power ~ q nu / (N-1). A linear (Wiener) estimate of the signal keeps the share
  q^2 / (q^2 + q nu / (N-1)) = (N-1) q / ((N-1) q + nu) of it, of the q that `variance` counts whole
  once the group is mixed. nu -> 0: all tasks with two rollouts count whole; nu large: linear in N.
  """
  q = p * (1 - p)
  signal = (budget - 1) * q
  return q * signal / (signal + nu)


VALUES = {'infogain': infogain, 'variance': variance, 'snr': snr}
# V = mixed * p^i (1-p)^j.
_POWERS = {mixed: (0, 0), infogain: (1, 2), variance: (1, 1)}


def check(value: str | Value, nu: float) -> None:
  """Raises ValueError for an unknown value, or a nu that is not a positive number."""
  knobs.Alloc.check(nu=nu, **{} if callable(value) else {'value': value})


def check_success_rate(success_rate: Array | Beta) -> int:
  """M. Raises ValueError for what is no vector of success rates."""
  if isinstance(success_rate, Beta):
    for x_M in success_rate:
      if np.ndim(x_M) != 1 or not np.all(np.isfinite(x_M)) or np.any(np.asarray(x_M) <= 0):
        raise ValueError(f'a Beta posterior needs vectors of finite positive numbers, not {x_M}')
    if len(success_rate.a_M) != len(success_rate.b_M):
      raise ValueError(f'a Beta posterior has {len(success_rate.a_M)} a and '
                       f'{len(success_rate.b_M)} b; each task needs one of each')
    return len(success_rate.a_M)
  p_M = np.asarray(success_rate)
  if p_M.ndim != 1:
    raise ValueError(f'success_rate_M must be a vector, not of shape {p_M.shape}')
  if p_M.dtype.kind not in 'fiub':
    raise ValueError(f'success_rate_M must hold numbers, not {p_M.dtype}')
  if bad := [(int(i), float(p_M[i])) for i in np.flatnonzero(~((p_M >= 0) & (p_M <= 1)))]:
    raise ValueError(f'success rates must lie in [0, 1]; (row, value) of those that do not: {bad}')
  return len(p_M)


def expected(success_rate: Array | Beta, budget: Array, value: str | Value = 'infogain',
             nu: float = 2.0) -> np.ndarray:
  """V(N, p) of M tasks, expected under the posterior where there is one.

  Args:
    success_rate: success_rate_M in [0, 1], or a Beta posterior of each.
    budget: candidate budgets N >= 1: budget_J for all tasks, or budget_MJ.
    value: a name in VALUES or a function of (N, p).
    nu: of 'snr'.

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
    # Each posterior once, in an order of their own: equal tasks have equal values to the last bit,
    # whatever their places.
    once, of_M = np.unique(np.stack(success_rate, axis=1), axis=0, return_inverse=True)
    return _quadrature(Beta(*once.T), budget, value)[of_M]
  return value(budget.astype(float), np.asarray(success_rate, float)[:, None])


def prob_nonzero_gradient(success_rate: Array | Beta, budget: Array) -> np.ndarray:
  """P(a group is mixed) of M tasks. Arguments and result as for `expected`."""
  return expected(success_rate, budget, mixed)


def _closed_form(success_rate: Array | Beta, budget: np.ndarray, i: int, j: int) -> np.ndarray:
  """E[(1 - p^N - (1-p)^N) p^i (1-p)^j], each moment from the one before it."""
  n = np.arange(budget.max(initial=0))
  if isinstance(success_rate, Beta):
    a, b = (np.asarray(x_M, float)[:, None] for x_M in success_rate)
    rising = lambda x, k: np.prod([x + l for l in range(k)], axis=0)
    base = rising(a, i) * rising(b, j) / rising(a + b, i + j)
    # E[p^(n+1) w] / E[p^n w] under the weight w = p^i (1-p)^j, and the same of 1-p.
    up, down = ((a + i + n) / (a + b + i + j + n), (b + j + n) / (a + b + i + j + n))
  else:
    p = np.asarray(success_rate, float)[:, None]
    base = p ** i * (1 - p) ** j
    up, down = np.broadcast_to(p, (len(p), len(n))), np.broadcast_to(1 - p, (len(p), len(n)))
  lost = np.cumprod(up, axis=1) + np.cumprod(down, axis=1)  # column N - 1: all one outcome
  lost = lost[:, budget - 1] if budget.ndim == 1 else np.take_along_axis(lost, budget - 1, axis=1)
  return base * np.maximum(1 - lost, 0.0)  # N = 1 is 0 up to rounding


# In log-odds x a Beta density falls like e^(a x) and e^(-b x), and both it and the values are analytic
# for |Im x| < pi: the trapezoidal rule converges geometrically. 80 nodes over 18 e-folds and 5
# standard deviations a side: relative errors below 1e-7 (tests).
_NODES = 80


def _quadrature(posterior: Beta, budget: np.ndarray, value: Value) -> np.ndarray:
  """E[V] = E[q] E'[V / q], q = p (1-p), with E' under Beta(a+1, b+1), whose tails are never heavy.

  Tasks with posteriors of like width and place share their nodes, and so the values there: the sum
  over nodes is a product of matrices.
  """
  a_M, b_M = (np.asarray(x_M, float) for x_M in posterior)
  mean_q_M = a_M * b_M / ((a_M + b_M) * (a_M + b_M + 1))
  a_M, b_M = a_M + 1, b_M + 1
  mode_M, sd_M = np.log(a_M / b_M), np.sqrt(1 / a_M + 1 / b_M)
  left_M, right_M = mode_M - 5 * sd_M - 18 / a_M, mode_M + 5 * sd_M + 18 / b_M
  octave_M = np.floor(np.log2((right_M - left_M) / (_NODES - 1)))  # of the distance of nodes
  place_M = np.floor(mode_M / (_NODES * 2 ** octave_M))
  group_M = np.unique(np.stack([octave_M, place_M]), axis=1, return_inverse=True)[1]
  out = np.empty((len(a_M), budget.shape[-1]))
  for group in range(group_M.max(initial=-1) + 1):
    m = np.flatnonzero(group_M == group)
    step = 2 ** octave_M[m[0]]
    x = step * np.arange(np.floor(left_M[m].min() / step), np.ceil(right_M[m].max() / step) + 1)
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
