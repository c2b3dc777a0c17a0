"""Success rate -> value -> budgets, and the statistics the success rate is estimated from.

    max  sum_i V(N_i, p_i)    s.t.  sum_i N_i = R,  low <= N_i <= high
    V(N, p) = [1 - p^N - (1-p)^N] * p (1-p)^2
               prob_nonzero_gradient * info_gain

Source: Li et al. 2025, arXiv 2509.25849, eq. 5-8. Differs:
- The success rate of a task is a Beta posterior (discounted evidence, prior fitted to all tasks),
  and V its expectation under it, in closed form. Tasks at p = 0, at p = 1 and never seen need no
  special case, and no first epoch of uniform budgets.
- The dynamic program starts from V(low), not from 0, so it is exact on its own objective; ties go
  to the most even budgets, then to later tasks; every feasible total is met within the bounds.

`budgets` stands alone: it takes success rates from any trainer.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from kr_jax import types
from kr_jax.types import Array

RULES = ('uniform', 'knapsack')
# Of the prior that stands in until enough tasks were seen to fit one: Jeffreys'.
_DEFAULT_CONCENTRATION = 1.0


class Beta(NamedTuple):
  """Success rates known up to a Beta(a, b) posterior each."""

  a_M: np.ndarray
  b_M: np.ndarray


# --- the knapsack -------------------------------------------------------------------------------


def check(num_tasks: int, total_budget: int, low: int, high: int, rule: str) -> None:
  """Raises ValueError unless M tasks can share exactly the total within low..high."""
  if rule not in RULES:
    raise ValueError(f'alloc.rule={rule!r} is not one of {RULES}')
  if num_tasks < 1:
    raise ValueError('there are no tasks to give budgets to')
  if low < 1:
    raise ValueError(f'alloc.low={low} is below 1; each task needs a rollout to be observed')
  if high < low:
    raise ValueError(f'alloc.high={high} is below alloc.low={low}')
  if not low * num_tasks <= total_budget <= high * num_tasks:
    raise ValueError(
        f'{total_budget} rollouts cannot be shared by {num_tasks} tasks at {low}..{high} each: '
        f'the total must lie in {low * num_tasks}..{high * num_tasks}; change '
        'alloc.rollouts_per_step, tasks.per_step, alloc.low or alloc.high')


def budgets(success_rate: Array | Beta, total_budget: int, *, low: int = 2, high: int = 128,
            rule: str = 'knapsack') -> np.ndarray:
  """How many rollouts each task gets.

  Args:
    success_rate: success_rate_M in [0, 1], or a Beta posterior of each.
    total_budget: R, the rollouts to share.
    low, high: bounds of each budget, 1 <= low <= high.
    rule: 'uniform' (R // M each, the first R % M tasks one more) or 'knapsack'.

  Returns:
    budget_M, int32: sums to R exactly, each in low..high. 'knapsack' maximises the summed value;
    among equals it takes the most even budgets.

  Raises:
    ValueError: success rates that are not a vector in [0, 1], or totals out of reach.
    TypeError: a total that is no integer.
  """
  M = _check_success_rate(success_rate)
  total_budget = operator.index(total_budget)
  check(M, total_budget, low, high, rule)
  if rule == 'uniform':
    return np.full(M, total_budget // M, np.int32) + (np.arange(M) < total_budget % M)
  # Integers make sums exact and so ties equal on every machine; 2^29 is shared by M tasks. Gains are
  # rounded, not values: rounded gains still fall with N, so that equal tasks get equal budgets.
  gain_MJ = np.diff(value(success_rate, np.arange(low, high + 1)), axis=1, prepend=0)
  gain_MJ[:, 0] = 0
  most = max(gain_MJ.sum(axis=1).max(), 1e-30)
  scale = 2.0 ** np.floor(29 - np.log2(M) - np.log2(most))
  fixed_MJ = np.cumsum(np.rint(gain_MJ * scale), axis=1).astype(np.int32)
  return low + np.asarray(knapsack(fixed_MJ, capacity=total_budget - low * M))


@functools.partial(jax.jit, static_argnames='capacity')
def knapsack(value_MJ: Array, *, capacity: int) -> Array:
  """Solves the multiple-choice knapsack by dynamic programming over tasks.

    best[m, u] = max_j best[m - 1, u - j] + value[m, j],   j <= u

  Args:
    value_MJ: int32, the value of giving task m j units, j = 0..J-1; the largest sum over tasks is
      below 2^29 in size.
    capacity: U, the units to give, exactly; in 0..M * (J - 1).

  Returns:
    unit_M, int32 in 0..J-1 with sum U and the largest summed value; ties go to the smallest sum of
    squares, then to the most units for the last task, then for the one before it, and so on.
  """
  J = value_MJ.shape[1]
  U = capacity + 1
  j_J = jnp.arange(J)
  source_UJ = jnp.arange(U)[:, None] - j_J[None]
  unreachable = -2**31 + 2**30  # a value added to it does not wrap

  def add(best, value_J):
    value_U, squares_U = best
    total_UJ = jnp.where(source_UJ >= 0, value_U[source_UJ], unreachable) + value_J[None]
    squares_UJ = squares_U[source_UJ] + jnp.square(j_J)[None]
    value_U = total_UJ.max(axis=1)
    value_U = jnp.where(value_U < unreachable // 2, unreachable, value_U)  # it must not add up
    squares_UJ = jnp.where(
        total_UJ == total_UJ.max(axis=1, keepdims=True), squares_UJ, jnp.iinfo(jnp.int32).max)
    # argmin takes the first of equals: counted from the largest, the most units for this task.
    unit_U = J - 1 - jnp.argmin(squares_UJ[:, ::-1], axis=1)
    return (value_U, squares_UJ.min(axis=1)), unit_U

  nothing_U = jnp.full(U, unreachable).at[0].set(0)
  _, unit_MU = jax.lax.scan(add, (nothing_U, jnp.zeros(U, int)), value_MJ)

  def trace(u, unit_U):
    return u - unit_U[u], unit_U[u]

  _, unit_M = jax.lax.scan(trace, jnp.array(capacity), unit_MU, reverse=True)
  return unit_M


# --- what a rollout is worth --------------------------------------------------------------------


def _check_success_rate(success_rate: Array | Beta) -> int:
  """M; raises ValueError for what is no vector of success rates."""
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
  if bad := [(int(i), float(p_M[i])) for i in np.flatnonzero(~((p_M >= 0) & (p_M <= 1)))]:
    raise ValueError(f'success rates must lie in [0, 1]; (row, value) of those that do not: {bad}')
  return len(p_M)


def _moment(posterior: Beta, i: Array, j: Array) -> np.ndarray:
  """E[p^i (1-p)^j] = B(a+i, b+j) / B(a, b)."""
  a, b = np.asarray(posterior.a_M)[:, None], np.asarray(posterior.b_M)[:, None]
  return np.exp(special.betaln(a + i, b + j) - special.betaln(a, b))


def prob_nonzero_gradient(success_rate: Array | Beta, budget: Array) -> np.ndarray:
  """P(a group has both outcomes) = 1 - p^N - (1-p)^N. arXiv 2509.25849, eq. 5.

  Args:
    success_rate: of M tasks.
    budget: candidate budgets N >= 1: budget_J for all tasks, or budget_MJ.

  Returns:
    float64 [M, J], expected under the posterior where there is one.
  """
  budget = np.asarray(budget)
  if isinstance(success_rate, Beta):
    p = 1 - _moment(success_rate, budget, 0) - _moment(success_rate, 0, budget)
  else:
    p_M1 = np.asarray(success_rate, float)[:, None]
    p = 1 - p_M1 ** budget - (1 - p_M1) ** budget
  return np.maximum(p, 0.0)  # N = 1 is 0 up to rounding


def value(success_rate: Array | Beta, budget: Array) -> np.ndarray:
  """V(N, p) = [1 - p^N - (1-p)^N] p (1-p)^2, the expected learning value. arXiv 2509.25849, eq. 7.

  Concave in N >= 1. Under a Beta posterior, term by term, with B the beta function:
    E[V] = [B(a+1, b+2) - B(a+N+1, b+2) - B(a+1, b+N+2)] / B(a, b)
  Arguments and result as for `prob_nonzero_gradient`.
  """
  budget = np.asarray(budget)
  if isinstance(success_rate, Beta):
    v = (_moment(success_rate, 1, 2) - _moment(success_rate, budget + 1, 2)
         - _moment(success_rate, 1, budget + 2))
    return np.maximum(v, 0.0)
  p_M1 = np.asarray(success_rate, float)[:, None]
  return prob_nonzero_gradient(success_rate, budget) * p_M1 * (1 - p_M1) ** 2


def objective(success_rate: Array | Beta, budget_M: Array) -> float:
  """sum_i V(N_i, p_i)."""
  return float(value(success_rate, np.asarray(budget_M)[:, None]).sum())


def expected_gradient_ratio(success_rate: Array | Beta, budget_M: Array) -> float:
  """Expected share of the rollouts that land in groups with both outcomes."""
  budget_M = np.asarray(budget_M)
  return float(budget_M @ prob_nonzero_gradient(success_rate, budget_M[:, None])[:, 0]
               / budget_M.sum())


# --- what is known of the tasks -----------------------------------------------------------------


def init(num_tasks: int) -> types.TaskStats:
  """Statistics of a split no rollout of which was seen."""
  return types.TaskStats(np.zeros(num_tasks), np.zeros(num_tasks), np.zeros(num_tasks, np.int64))


def observe(stats: types.TaskStats, index_M: Array, task_R: Array, reward_R: Array, *,
            discount: float) -> types.TaskStats:
  """Adds a step's verdicts to the evidence, of which every step leaves `discount`.

  The discount is by steps for all tasks, seen or not: it is the policy that moves.

  Args:
    index_M: the rows of the step's tasks.
    task_R: the task of each rollout, in 0..M-1.
    reward_R: 1.0 where the verifier said yes, else 0.0.
  """
  index_R = np.asarray(index_M)[np.asarray(task_R)]
  reward_R = np.asarray(reward_R, float)
  I = len(stats.rollouts_I)
  count = lambda weight_R: np.bincount(index_R, weights=weight_R, minlength=I)
  return types.TaskStats(
      successes_I=discount * stats.successes_I + count(reward_R),
      failures_I=discount * stats.failures_I + count(1 - reward_R),
      rollouts_I=stats.rollouts_I + np.bincount(index_R, minlength=I))


def prior(stats: types.TaskStats) -> tuple[float, float]:
  """(a, b) of the Beta prior that fits all tasks: empirical Bayes by moments.

  With n_i rollouts and rate p_i of task i, W = sum n_i, m = sum n_i p_i / W, the weighted spread
  S = sum n_i (p_i - m)^2 has the expectation m (1-m) [(1-rho) A + rho B], A = sum 1 - n_i/W,
  B = sum n_i (1 - n_i/W), rho = 1 / (a+b+1). Source: Kleinman 1973, JASA 68, eq. 2.3-2.5.
  """
  n_I = stats.successes_I + stats.failures_I
  # One more success and failure keep the mean off 0 and 1, where no prior could be left again.
  mean = (stats.successes_I.sum() + 1) / (n_I.sum() + 2)
  seen = n_I > 1.5  # less says nothing of the spread
  n, p = n_I[seen], stats.successes_I[seen] / n_I[seen]
  concentration = _DEFAULT_CONCENTRATION
  if len(n) >= 8 and 0 < p @ n < n.sum():
    m, rest = p @ n / n.sum(), 1 - n / n.sum()
    A, B = rest.sum(), n @ rest
    rho = (n @ (p - m) ** 2 / (m * (1 - m)) - A) / (B - A)
    concentration = 1 / np.clip(rho, 0.05, 0.95) - 1
  return mean * concentration, (1 - mean) * concentration


def posterior(stats: types.TaskStats, index_M: Array) -> Beta:
  """The success rates of tasks, from their discounted evidence and the fitted prior."""
  a, b = prior(stats)
  return Beta(stats.successes_I[index_M] + a, stats.failures_I[index_M] + b)
