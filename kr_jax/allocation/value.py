"""The value V(N, p) of N rollouts of a task with success rate p, and its expectation where p is uncertain.

    mixed     1 - p^N - (1-p)^N, the probability of a mixed group: one with a right and a wrong rollout
    infogain  mixed * p (1-p)^2                variance  mixed * p (1-p)
    hit       1 - (1-p)^N, the probability of a right rollout
    snr       what noise leaves of the signal p (1-p)
    coba      (1 - exp(-N p (1-p) / tau)) * a density in p whose mode is the failure rate of all tasks

All are 0 at N = 0 and at p = 0, and all but `hit` at p = 1. They are concave in N >= 1 (but for `snr` where it counts
evidence), `hit` and `coba` in N >= 0.

The success rate of a task is either a number or a Beta(a, b) posterior. Under a posterior the value is expected: in
closed form where V is a probability above times p^i (1-p)^j, since

    E[p^k (1-p)^l] = B(a+k, b+l) / B(a, b)

and by quadrature for every other V. Source: Li et al. 2025, arXiv 2509.25849, eq. 5-8.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import numpy as np

from kr_jax import knobs
from kr_jax.types import Array

Value = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of (N, p), floats that broadcast; 0 at p = 0 and at p = 1
# Of `coba`, as the authors' code and its script for Qwen2.5-7B have them.
_DENSITY_SUM = 11.0  # alpha + beta
_TAU = (3.0, 12.0)  # tau of tasks that are all alike, and of tasks as unlike as can be
_MOST_VARIANCE = 1 / 6  # of success rates, at which they are


class Beta(NamedTuple):
  """A posterior Beta(a, b) of the success rate of each task."""

  a_M: np.ndarray
  b_M: np.ndarray

  @property
  def mean_M(self) -> np.ndarray:
    a_M = np.asarray(self.a_M, float)
    return a_M / (a_M + self.b_M)


class Window(NamedTuple):
  """Success rates as the paper's code estimates them: the mean of each task's last rollouts."""

  rate_M: np.ndarray  # any number where not known
  known_M: np.ndarray  # bool, whether the task has been seen often enough to have one


class Group(NamedTuple):
  """The rollouts that each task has already in this step, from its earlier waves."""

  right_M: np.ndarray
  wrong_M: np.ndarray
  unverified_M: Array = 0  # those that no verdict came of

  @property
  def size_M(self) -> np.ndarray:
    return np.asarray(self.right_M) + self.wrong_M + self.unverified_M


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


def hit(budget: Array, p: Array) -> np.ndarray:
  """The probability 1 - (1-p)^N that one of N rollouts is right, as in HORA, arXiv 2605.07114."""
  return 1 - np.power(1 - p, budget)


def snr(budget: Array, p: Array, nu: float, evidence: Array = 0.0) -> np.ndarray:
  """V_nu = q n q / (n q + nu), q = p (1-p), n = N - N / (c + N): the part of the signal q that noise leaves.

  The gradient of a rollout is a signal that depends on the reward, (reward - p) x, and noise of power nu |x|^2. With
  leave-one-out advantages (reward - mean) N / (N-1), the mean over N rollouts has the signal q x, of power ~ q^2, and
  noise of power ~ nu E[advantage^2] / N = q nu / (N-1). A linear (Wiener) estimate keeps of the signal the share
  q^2 / (q^2 + q nu / n), n = N - 1. For nu -> 0 two rollouts have the whole value q; for large nu the value is linear
  in N.

  Where the baseline also counts evidence from before the step, worth c rollouts, the advantage of a rollout is
  reward - (a + k) / (c + N - 1), with k right ones of the N - 1 others and a of the c. Under the posterior its square
  is expected to be q (c + N) / (c + N - 1), so that n = N (c + N - 1) / (c + N), and one rollout has a value.
  """
  q = p * (1 - p)
  signal = _independent(budget, evidence) * q
  return q * signal / (signal + nu)


def _independent(budget: Array, evidence: Array) -> np.ndarray:
  """n = N (c + N - 1) / (c + N), and 0 of no rollouts: how many a group's mean gradient is worth that know p."""
  return budget - budget / np.maximum(evidence + budget, np.finfo(float).tiny)


def coba(budget: Array, p: Array, failure_rate: float, variance: float) -> np.ndarray:
  """V = (1 - exp(-N p (1-p) / tau)) * f(p), f the density of Beta(alpha, 11 - alpha), alpha = 1 + 9 F.

  The mode of f is F: the failure rate of all tasks where it is above 1/2, else 1 / (1 + exp(-10 (failure_rate - 1/2))).
  While most rollouts fail easy tasks are worth most, later hard ones. tau rises with the variance of the tasks' success
  rates, from 3 at 0 to 12 at 1/6 and above.

  Source: CoBA-RL, Yao et al. 2026, arXiv 2602.03048, and its code (github.com/Within-yao/CoBA-RL). Differs: the value
  is expected under posteriors, where the code clips point estimates to .01...99, and all rollouts are shared by it,
  where the code gives tasks below .05 and above .99 a part of their own.
  """
  if failure_rate <= 0.5:
    failure_rate = 1 / (1 + math.exp(-10 * (failure_rate - 0.5)))
  alpha = 1 + (_DENSITY_SUM - 2) * failure_rate
  beta = _DENSITY_SUM - alpha
  scale = math.exp(math.lgamma(_DENSITY_SUM) - math.lgamma(alpha) - math.lgamma(beta))
  tau = _TAU[0] + (_TAU[1] - _TAU[0]) * min(variance / _MOST_VARIANCE, 1)
  return -np.expm1(-budget * p * (1 - p) / tau) * scale * np.power(p, alpha - 1) * np.power(1 - p, beta - 1)


VALUES = {'infogain': infogain, 'variance': variance, 'snr': snr, 'mixed': mixed, 'hit': hit, 'coba': coba}
# Of V = probability * p^i (1-p)^j: i, j, and whether the probability is that of a wrong rollout as well as a right one.
_CLOSED = {mixed: (0, 0, True), infogain: (1, 2, True), variance: (1, 1, True), hit: (0, 0, False)}


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


def expected(success_rate: Array | Beta, budget: Array, value: str | Value = 'infogain', nu: float = 2.0, *,
             group: Group | None = None, evidence_M: Array | None = None, failure_rate: float | None = None
             ) -> np.ndarray:
  """V(N, p) of M tasks; under posteriors its expectation.

  Args:
    success_rate: success_rate_M in [0, 1], or a Beta posterior of each task, which knows the verdicts of its group.
    budget: candidate budgets N >= 0: budget_J for all tasks, or budget_MJ. With a group, further rollouts.
    value: a name in VALUES or a function of (N, p), which is not called for N = 0: no rollouts have no value.
    nu: noise-to-signal ratio of a rollout's gradient, for 'snr'.
    group: the rollouts that each task has already. Of 'mixed', 'infogain', 'variance' and 'hit' the result is then
      what N further rollouts add: nothing where the group is mixed (or has a hit) already, and where it is all wrong
      (or all right) the probability 1 - (1-p)^N (or 1 - p^N) that it becomes mixed takes the place of that of a mixed
      group. Of any other value it is V(group + N, p), which differs from what they add by a constant of each task.
    evidence_M: how many rollouts the evidence is worth that advantages use from before the step (a + b of a
      posterior), for 'snr'. None: they use none.
    failure_rate: of all tasks, for 'coba'. None: that of these tasks.

  Returns:
    float64 [M, J].

  Raises:
    ValueError: an unknown value, or a nu, evidence or failure rate out of its bounds.
  """
  check(value, nu)
  if failure_rate is not None and not 0 <= failure_rate <= 1:
    raise ValueError(f'failure_rate={failure_rate} must lie in [0, 1]; it is the share of all rollouts that are wrong')
  if evidence_M is not None and not np.all((np.asarray(evidence_M) >= 0) & np.isfinite(evidence_M)):
    raise ValueError(f'evidence_M={evidence_M} must hold finite numbers of rollouts, 0 or more')
  value = value if callable(value) else VALUES[value]
  budget = np.asarray(budget)
  if value in _CLOSED:
    return _closed_form(success_rate, budget, *_CLOSED[value], group)
  budget = budget.astype(float)
  if group is not None:
    budget = group.size_M[:, None] + budget
  if value is snr:
    # snr sees N through n alone: as if the success rate were known.
    budget = _independent(budget, 0.0 if evidence_M is None else np.asarray(evidence_M, float)[:, None])
    function = lambda n, p: p * (1 - p) * (n * p * (1 - p)) / (n * p * (1 - p) + nu)
  elif value is coba:
    rate_M = success_rate.mean_M if isinstance(success_rate, Beta) else np.asarray(success_rate, float)
    mean = rate_M.sum() / max(len(rate_M), 1)
    function = functools.partial(coba, failure_rate=1 - mean if failure_rate is None else failure_rate,
                                 variance=((rate_M - mean) ** 2).sum() / max(len(rate_M), 1))
  else:
    function = value if budget.all() else lambda n, p: np.where(n > 0, value(np.maximum(n, 1.0), p), 0.0)
  if not isinstance(success_rate, Beta):
    return function(budget, np.asarray(success_rate, float)[:, None])
  if budget.ndim == 2:
    return _quadrature(success_rate, budget, function)
  # Distinct posteriors, sorted: equal tasks have equal values to the last bit, in any order of the tasks.
  distinct, index_M = np.unique(np.stack(success_rate, axis=1), axis=0, return_inverse=True)
  return _quadrature(Beta(*distinct.T), budget, function)[index_M]


def prob_nonzero_gradient(success_rate: Array | Beta, budget: Array) -> np.ndarray:
  """The probability that a group of each task is mixed. Arguments and result as for `expected`."""
  return expected(success_rate, budget, mixed)


def _closed_form(success_rate: Array | Beta, budget: np.ndarray, i: int, j: int, both: bool, group: Group | None
                 ) -> np.ndarray:
  """E[(1 - p^N - (1-p)^N) p^i (1-p)^j], where each moment follows from the one before it.

  An outcome that the group has already, or that is not wanted (a wrong rollout, unless `both` are), is not waited for:
  its term is left out.
  """
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
  # Column N: the probability that N rollouts all have the outcome that is not waited for.
  def power(factor: np.ndarray) -> np.ndarray:
    power = np.ones((len(factor), len(n) + 1))
    np.cumprod(factor, axis=1, out=power[:, 1:])
    return power

  missing = power(failure)
  if group is not None:
    wants_right, wants_wrong = (np.asarray(x_M)[:, None] == 0 for x_M in group[:2])
    wants_wrong &= both
    missing = np.where(wants_right | wants_wrong, wants_wrong * power(success) + wants_right * missing, 1.0)
  elif both:
    missing = power(success) + missing
  missing = missing[:, budget] if budget.ndim == 1 else np.take_along_axis(missing, budget, axis=1)
  return base * np.maximum(1 - missing, 0.0)  # at N = 1 the difference may be 0 but for its rounding


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
      out[m] = weight @ value(budget, np.exp(log_p)[:, None])
    else:
      for j in range(budget.shape[1]):
        out[m, j] = np.sum(weight * value(budget[m, j, None], np.exp(log_p)), axis=1)
  return out
