"""Success rate -> value -> budgets.

    max  sum_i V(N_i, p_i)    s.t.  sum_i N_i = R  or  sum_i c_i N_i <= C,    low <= N_i <= high

`budgets` stands alone: it takes success rates from any trainer. V is any of kr_jax/allocation/value.py, or a
function of one's own. Two solvers find the optimum: the dynamic program of kernels/knapsack, for any
value and any cost, and `greedy`, the largest gains first, for concave values and equal costs.

Source: Li et al. 2025, arXiv 2509.25849, eq. 8. Differs from the authors' code:
- A task's success rate may be a posterior, whose expected value needs no special case at p = 0, at
  p = 1 and for tasks never seen.
- The program starts from V(low), not from 0, so it is exact on its own objective.
- Every feasible total is met within the bounds; equal tasks get equal budgets (to within one).
- `Window` success rates reproduce the authors' rule, special cases included, within the bounds.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from kr_jax import knobs
from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.allocation import value as value_lib
from kr_jax.allocation.value import Beta, Value, Window
from kr_jax.kernels.knapsack import knapsack
from kr_jax.types import Array

# Table entries that a capacity is cut into, where costs are no integers or it is larger.
_COST_UNITS = 2 ** 14
# A gain this small beside the largest value is the rounding of a difference, as is one that is no
# normal number.
_NO_GAIN = 1e-13


def check(num_tasks: int, total_budget: int, low: int, high: int, rule: str) -> None:
  """Raises ValueError unless M tasks can share exactly the total within low..high."""
  _check_bounds(num_tasks, low, high, rule)
  if not low * num_tasks <= total_budget <= high * num_tasks:
    raise ValueError(
        f'{total_budget} rollouts cannot be shared by {num_tasks} tasks at {low}..{high} each: '
        f'the total must lie in {low * num_tasks}..{high * num_tasks}; change '
        'alloc.rollouts_per_step, tasks.per_step, alloc.low or alloc.high')


def _check_bounds(num_tasks: int, low: int, high: int, rule: str) -> None:
  if num_tasks < 1:
    raise ValueError('there are no tasks to give budgets to')
  knobs.Alloc.check(rule=rule, low=low)
  if high < low:
    raise ValueError(f'alloc.high={high} is below alloc.low={low}')


def budgets(success_rate: Array | Beta | Window, total_budget: float, *, low: int = 2,
            high: int = 128, rule: str = 'knapsack', value: str | Value = 'infogain',
            nu: float = 2.0, solver: str = 'dp', cost_M: Array | None = None) -> np.ndarray:
  """How many rollouts each task gets.

  Args:
    success_rate: success_rate_M in [0, 1], numpy, jax or a list; a Beta posterior of each; or a
      Window, which gets the special cases of the paper's code (`_window`).
    total_budget: R, the rollouts to share; with cost_M the capacity, in its units.
    low, high: bounds of each budget, 1 <= low <= high.
    rule: 'uniform' (the same for all, as nearly as the total allows) or 'knapsack'.
    value: of N rollouts of a task: 'infogain', 'variance', 'snr', or a function of (N, p).
    nu: noise-to-signal ratio of a rollout's gradient, for 'snr'.
    solver: 'dp', or 'greedy' for concave values (the three named are) without cost_M, for tens of
      thousands of tasks.
    cost_M: positive, of a rollout of each task, such as its expected tokens.

  Returns:
    budget_M, int32, each in low..high.
    Without cost_M it sums to R exactly and has the largest summed value: 'greedy' to the rounding of
    each gain to float32, 'dp' to the rounding of gains to 2^-29 of what all tasks' values sum to. Of
    equal gains the lower budgets get the first, then the later tasks.
    With cost_M sum(cost * budget) <= capacity (by a rounding more, if that is what the least budgets
    sum to), and no rollout that fits and adds value is left out.
    It has the largest value of all if the costs are integers and the capacity is at most 2^14; else
    costs are first rounded up to a 2^14th of it.

  Raises:
    ValueError: success rates that are not a vector in [0, 1], costs that are not positive, totals
      out of reach, an unknown name, or a value that 'greedy' cannot take.
    TypeError: a total of rollouts that is no integer.
  """
  rates = success_rate
  if isinstance(success_rate, Window):
    rates = np.where(success_rate.known_M, success_rate.rate_M, 0.5)
  M = value_lib.check_success_rate(rates)
  value_lib.check(value, nu)
  knobs.Alloc.check(solver=solver)
  if cost_M is not None:
    if isinstance(success_rate, Window):
      raise ValueError("the paper's rule knows no costs; estimate posteriors, or set "
                       "alloc.cost='rollouts'")
    return _with_costs(success_rate, total_budget, low, high, rule, value, nu, solver, cost_M)
  total_budget = operator.index(total_budget)
  check(M, total_budget, low, high, rule)
  if rule == 'uniform':
    return np.full(M, total_budget // M, np.int32) + (np.arange(M) < total_budget % M)
  if isinstance(success_rate, Window):
    return _window(success_rate, total_budget, low, high, value, nu, solver)
  units = total_budget - low * M
  return low + _solve(success_rate, units, np.full(M, True), low, high, value, nu, solver,
                      most_units=units)


def _solve(success_rate: Array | Beta, units: int, open_M: np.ndarray, low: int, high: int,
           value: str | Value, nu: float, solver: str, *, most_units: int) -> np.ndarray:
  """What each of the open tasks gets of the units beyond `low`; the others get none.

  One compilation serves all open_M and all units up to most_units.
  """
  gain_MG, concave = _gains(success_rate, low, high, value, nu)
  if not gain_MG.size:
    return np.zeros(len(gain_MG), np.int32)
  if solver == 'greedy':
    if not concave:
      raise ValueError("solver='greedy' needs a value whose gains never rise with N; "
                       "use solver='dp'")
    gain_MG = gain_MG / max(np.abs(gain_MG).max(), 1e-300)  # float32 has no numbers below 1e-45
    gain_MG = np.where(open_M[:, None], gain_MG, -np.inf)
    return np.asarray(greedy(gain_MG.astype(np.float32), units))
  fixed_MG = _fixed_point(np.where(open_M[:, None], gain_MG, 0))
  value_MJ = np.pad(np.cumsum(fixed_MG, axis=1, dtype=np.int32), ((0, 0), (1, 0)))
  cost_M = np.where(open_M, 1, most_units + 1).astype(np.int32)  # more than there is
  unit_M = knapsack(value_MJ, cost_M, units, capacity=most_units, exact=True)
  if concave:
    unit_M = _even(np.where(open_M[:, None], fixed_MG, np.iinfo(np.int32).min), unit_M)
  return np.asarray(unit_M)


def _gains(success_rate: Array | Beta, low: int, high: int, value: str | Value, nu: float
           ) -> tuple[np.ndarray, bool]:
  """gain_MG, what rollout low + 1 .. high adds; and whether no task's gains ever rise."""
  value_MJ = value_lib.expected(success_rate, np.arange(low, high + 1), value, nu)
  if not np.all(np.isfinite(value_MJ)):
    bad = np.argwhere(~np.isfinite(value_MJ))[0]
    raise ValueError(f'the value of {low + bad[1]} rollouts of task {bad[0]} is '
                     f'{value_MJ[tuple(bad)]}; values must be finite')
  gain_MG = np.diff(value_MJ, axis=1)
  nothing = max(_NO_GAIN * np.abs(value_MJ).max(initial=0.0), np.finfo(float).tiny)
  gain_MG[np.abs(gain_MG) <= nothing] = 0.0
  falling_MG = np.minimum.accumulate(gain_MG, axis=1)
  # The named values are, whatever a sum rounds.
  concave = isinstance(value, str) or bool(np.all(gain_MG - falling_MG <= 10 * nothing))
  return (falling_MG if concave else gain_MG), concave


def _fixed_point(gain_MG: np.ndarray) -> np.ndarray:
  """Gains as integers, whose sums are exact and so equal on every machine.

  Gains are rounded, not values: rounded gains still fall with N. The largest |sum of gains| of each
  task add up to less than 2^29, which the knapsack asks for.
  """
  reach = np.abs(np.cumsum(gain_MG, axis=1)).max(axis=1).sum()
  # Rounding adds at most a half a gain. The small number keeps 0 gains from dividing by 0.
  room = 2 ** 29 - 1 - gain_MG.size // 2
  if room < 2 ** 24:
    raise ValueError(f"{gain_MG.shape[0]} tasks times {gain_MG.shape[1]} candidate budgets are too "
                     "many for solver='dp'; use solver='greedy', or lower alloc.high")
  return np.rint(gain_MG / max(reach, 1e-300) * room).astype(np.int32)


def _with_costs(success_rate: Array | Beta, capacity: float, low: int, high: int, rule: str,
                value: str | Value, nu: float, solver: str, cost_M: Array) -> np.ndarray:
  M = value_lib.check_success_rate(success_rate)
  _check_bounds(M, low, high, rule)
  cost_M = np.asarray(cost_M, float)
  if cost_M.shape != (M,):
    raise ValueError(f'cost_M must hold a cost for each of {M} tasks, not be of shape {cost_M.shape}')
  if not np.all((cost_M > 0) & (cost_M < np.inf)):
    bad = int(np.argmin((cost_M > 0) & (cost_M < np.inf)))
    raise ValueError(f'cost_M[{bad}]={cost_M[bad]} must be a positive number')
  if solver == 'greedy':
    raise ValueError("solver='greedy' is exact for equal costs only; use solver='dp' with cost_M")
  least = np.full(M, low) @ cost_M
  if not least <= capacity * (1 + 1e-12) < np.inf:  # whichever way its user summed up
    raise ValueError(f'a capacity of {capacity} does not hold {low} rollouts of each of {M} tasks, '
                     f'which cost {least}; raise the capacity or lower alloc.low')
  if rule == 'uniform':
    even = min(high, max(low, int(capacity // cost_M.sum())))
    # And one more for the cheapest, as far as they fit.
    one_more_MG = np.ones((M, min(even + 1, high) - low))
    return _fill_up(np.full(M, even, np.int32), one_more_MG, cost_M, capacity, low)
  gain_MG, _ = _gains(success_rate, low, high, value, nu)
  if not gain_MG.size:
    return np.full(M, low, np.int32)
  whole = np.all(cost_M == np.rint(cost_M)) and capacity <= _COST_UNITS
  unit = 1.0 if whole else capacity / _COST_UNITS
  value_MJ = np.pad(np.cumsum(_fixed_point(gain_MG), axis=1, dtype=np.int32), ((0, 0), (1, 0)))
  # Less a hair, as sums of costs round; what it takes is filled up again.
  spend = capacity - least if whole else max(capacity * (1 - 1e-12) - least, 0)
  unit_M = knapsack(
      value_MJ, np.minimum(np.ceil(cost_M / unit), 2 ** 30).astype(np.int32),
      int(spend / unit), capacity=int(capacity) if whole else _COST_UNITS, exact=False)
  budget_M = low + np.asarray(unit_M)
  return _fill_up(budget_M, gain_MG, cost_M, capacity, low)


def _fill_up(budget_M: np.ndarray, gain_MG: np.ndarray, cost_M: np.ndarray, capacity: float,
             low: int) -> np.ndarray:
  """Adds the rollouts that still fit and add value, the most value for its cost first."""
  rows, G = np.arange(len(budget_M)), gain_MG.shape[1]
  budget_M, fits_M = budget_M.copy(), np.full(len(budget_M), True)
  while G:
    gain_M = np.where(budget_M < low + G, gain_MG[rows, np.minimum(budget_M - low, G - 1)], 0)
    worth_M = np.where(fits_M & (gain_M > 0), gain_M / cost_M, 0)
    if not worth_M.any():
      break
    # Of equals the lowest budget, then the first.
    best_M = worth_M == worth_M.max()
    m = np.argmin(np.where(best_M, budget_M, np.iinfo(np.int32).max))
    budget_M[m] += 1
    # The sum itself is compared, as its user would: another way to it might round otherwise.
    if budget_M @ cost_M > capacity:
      budget_M[m] -= 1
      fits_M[m] = False
  return budget_M


def _window(window: Window, total: int, low: int, high: int, value: str | Value, nu: float,
            solver: str) -> np.ndarray:
  """The authors' rule on point estimates, within the bounds for every feasible total.

  Tasks not known get R // M. Of the others, those at 0 and at 1 get `low`; those between are thought
  to need ln(0.1) / ln(max(p, 1-p)) rollouts more, for a mixed group with probability 0.9. They share
  what is left by the knapsack; but if they need less than that, they share what they need, and the
  surplus goes to the tasks at 0, in equal parts: a hard switch. What is beyond the upper bound of
  those goes to tasks at 1, then to those not known, then to those between; the authors' code breaks
  the bound, or stops, there.
  """
  p_M, known_M = np.asarray(window.rate_M, float), np.asarray(window.known_M, bool)
  budget_M = np.where(known_M, low, np.clip(total // len(p_M), low, high)).astype(np.int32)
  between_M = known_M & (p_M > 0) & (p_M < 1)
  # Of the rarer outcome, away from 0, where ln(max(p, 1-p)) is.
  rare = np.clip(np.minimum(p_M, 1 - p_M)[between_M], 1e-9, 0.5)
  need = np.minimum(np.log(0.1) / np.log1p(-rare), high).astype(int)
  surplus = total - int(budget_M.sum())
  shared = min(surplus, int(need.sum()), int(between_M.sum()) * (high - low))
  surplus -= shared
  for group_M in (known_M & (p_M == 0), known_M & (p_M == 1), ~known_M):
    room_M = np.where(group_M, high - budget_M, 0).astype(np.int32)
    given = min(surplus, int(room_M.sum()))
    budget_M += np.asarray(_fill(np.zeros_like(room_M), room_M, given))
    surplus -= given
  return budget_M + _solve(np.where(known_M, p_M, 0.5), shared + surplus, between_M, low, high, value,
                           nu, solver, most_units=total - low * len(p_M))


# Gains, the largest first.


@jax.jit
def greedy(gain_MG: Array, units: Array) -> Array:
  """Gives units to the largest gains: the largest sum there is, since gains never rise.

  The smallest gain taken is found by bisection over the 32 bits of a float, so the work is 32
  counts over the table, whatever the total; and a new total compiles nothing.

  Args:
    gain_MG: float32, what the g-th unit adds to task m; no row rises.
    units: int32 in 0..M * G.

  Returns:
    unit_M, int32. Of equal gains the tasks with fewer units get the first, then the later tasks.
  """
  # -0.0 becomes 0.0, by a select, as XLA takes an addition of 0 out.
  bits = jax.lax.bitcast_convert_type(jnp.where(gain_MG == 0, 0.0, gain_MG), jnp.uint32)
  top = jnp.uint32(1 << 31)
  key_MG = jnp.where(bits >= top, ~bits, bits | top)  # in the order of the floats
  return _largest(key_MG, units)


@jax.jit
def _even(gain_MG: Array, unit_M: Array) -> Array:
  """The optimal choice unit_M, with what hangs on equal gains given as `greedy` gives it.

  gain_MG: int32, no row rises.
  """
  M, G = gain_MG.shape
  key_MG = jax.lax.bitcast_convert_type(gain_MG, jnp.uint32) ^ jnp.uint32(1 << 31)
  taken_MG = jnp.arange(G)[None] < unit_M[:, None]
  # The least that was taken is as large as the most that was left; only where they are equal is
  # there anything to move.
  least = jnp.min(jnp.where(taken_MG, key_MG, jnp.uint32(2 ** 32 - 1)))
  least_M = jnp.sum(key_MG > least, axis=1, dtype=jnp.int32)
  most_M = jnp.sum(key_MG >= least, axis=1, dtype=jnp.int32)
  even_M = _fill(least_M, most_M, jnp.sum(unit_M))
  return jnp.where(jnp.any(taken_MG), even_M, unit_M)


def _largest(key_MG: Array, units: Array) -> Array:
  """How many of the `units` largest keys (uint32, falling in each row) each row holds."""

  def bit(i, least):
    trial = least | (jnp.uint32(1 << 31) >> jnp.uint32(i))
    return jnp.where(jnp.sum(key_MG >= trial, dtype=jnp.int32) >= units, trial, least)

  least = jax.lax.fori_loop(0, 32, bit, jnp.uint32(0))
  return _fill(jnp.sum(key_MG > least, axis=1, dtype=jnp.int32),
               jnp.sum(key_MG >= least, axis=1, dtype=jnp.int32), units)


@jax.jit
def _fill(least_M: Array, most_M: Array, units: Array) -> Array:
  """The most even int32 unit_M within least_M..most_M (>= 0) that sums to units; later tasks first."""
  level_of = lambda level: jnp.clip(level, least_M, most_M)

  def bit(i, level):
    trial = level | (jnp.int32(1 << 30) >> i)
    return jnp.where(jnp.sum(level_of(trial)) <= units, trial, level)

  level = jax.lax.fori_loop(0, 31, bit, jnp.int32(0))
  unit_M = level_of(level)
  can_M = (level >= least_M) & (level < most_M)  # to have one more than the level
  turn_M = jnp.cumsum(can_M[::-1])[::-1]
  return unit_M + (can_M & (turn_M <= units - jnp.sum(unit_M)))


# The budgets of a training step, and what they are expected to give.


def of_step(alloc: knobs.Alloc, stats: types.TaskStats, index_M: np.ndarray, *, completion_length: int
            ) -> np.ndarray:
  """budget_M: how many rollouts each task of a step gets, by what is known of them.

  Args:
    index_M: the tasks' rows in the statistics.
    completion_length: C, the tokens that a rollout is thought to have before any was seen.
  """
  success_rate_of = {'posterior': estimate.posterior, 'window': estimate.window}[alloc.estimate]
  total, cost_M = alloc.rollouts_per_step, None
  if alloc.cost == 'tokens':
    # No rollout counts less than a share of one in R, so that there are never more than R.
    cost_M = np.maximum(estimate.tokens(stats, index_M, default=completion_length),
                        alloc.tokens_per_step / alloc.rollouts_per_step)
    # Where the policy has become so wordy that the least budgets cost more, they are what is spent.
    total = max(alloc.tokens_per_step, alloc.low * cost_M.sum())
  return budgets(
      success_rate_of(stats, index_M), total, low=alloc.low, high=alloc.high, rule=alloc.rule,
      value=alloc.value, nu=estimate.nu(stats, default=alloc.nu), solver=alloc.solver, cost_M=cost_M)


def objective(success_rate: Array | Beta, budget_M: Array, value: str | Value = 'infogain',
              nu: float = 2.0) -> float:
  """sum_i V(N_i, p_i)."""
  return float(value_lib.expected(success_rate, np.asarray(budget_M)[:, None], value, nu).sum())


def expected_mixed_tasks(success_rate: Array | Beta, budget_M: Array) -> float:
  """Expected number of tasks whose group has both outcomes."""
  return float(value_lib.prob_nonzero_gradient(success_rate, np.asarray(budget_M)[:, None]).sum())


def expected_gradient_ratio(success_rate: Array | Beta, budget_M: Array) -> float:
  """Expected share of the rollouts that land in groups with both outcomes."""
  budget_M = np.asarray(budget_M)
  mixed_M = value_lib.prob_nonzero_gradient(success_rate, budget_M[:, None])[:, 0]
  return float(budget_M @ mixed_M / budget_M.sum())
