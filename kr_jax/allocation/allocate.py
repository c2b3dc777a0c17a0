"""Success rate -> value -> budgets.

    max  sum_i V(N_i, p_i)    s.t.  sum_i N_i = R  or  sum_i c_i N_i <= C,    low <= N_i <= high

Two solvers find the optimum. The dynamic program of kernels/knapsack takes any value and any cost; `greedy` takes
the largest gains first, for concave values and equal costs.

Source: Li et al. 2025, arXiv 2509.25849, eq. 8. README.md says how it differs.
"""

from __future__ import annotations

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

_COST_UNITS = 2 ** 14  # that a capacity is divided into where it is larger, or where costs are not integers
_NO_GAIN = 1e-13  # gains below this share of the largest value are rounding errors of a difference and count as 0


def check(num_tasks: int, total_budget: int, low: int, high: int, rule: str) -> None:
  """Raises ValueError unless M tasks can share exactly the total within low..high."""
  _check_bounds(num_tasks, low, high, rule)
  least, most = low * num_tasks, high * num_tasks
  if not least <= total_budget <= most:
    raise ValueError(
        f'{total_budget} rollouts cannot be shared by {num_tasks} tasks at {low}..{high} each: the total must lie in '
        f'{least}..{most}; change alloc.rollouts_per_step, tasks.per_step, alloc.low or alloc.high')


def _check_bounds(num_tasks: int, low: int, high: int, rule: str) -> None:
  if num_tasks < 1:
    raise ValueError('there are no tasks to give budgets to')
  knobs.Alloc(rule=rule, low=low, high=high)  # checks them


def budgets(success_rate: Array | Beta | Window, total_budget: float, *, low: int = 2, high: int = 128,
            rule: str = 'knapsack', value: str | Value = 'infogain', nu: float = 2.0, solver: str = 'dp',
            cost_M: Array | None = None) -> np.ndarray:
  """How many rollouts each task gets.

  Args:
    success_rate: success_rate_M in [0, 1], numpy, jax or a list; a Beta posterior of each; or a Window, to which the
      special cases of the paper's code apply (`_window`).
    total_budget: R, the rollouts to share; with cost_M the capacity, in the unit of cost_M.
    low, high: bounds of each budget, 1 <= low <= high.
    rule: 'uniform' (the same for all, as nearly as the total allows) or 'knapsack'.
    value: of N rollouts of a task: 'infogain', 'variance', 'snr', or a function of (N, p).
    nu: noise-to-signal ratio of a rollout's gradient, for 'snr'.
    solver: 'dp'; or 'greedy', for tens of thousands of tasks, of a concave value (the named ones are) without cost_M.
    cost_M: positive, the cost of one rollout of each task, such as its expected tokens.

  Returns:
    budget_M, int32, each in low..high.

    Without cost_M the sum is exactly R, and the summed value is the largest possible. Before they are compared,
    'greedy' rounds gains to float32 and 'dp' rounds them to 2^-29 of the sum of all tasks' values. Equal gains go to
    the lower budgets first, then to the later tasks.

    With cost_M the summed cost is at most the capacity (or above it by a rounding error, if the lower bounds alone
    cost as much), and no rollout is left out that fits and adds value. The summed value is the largest possible if
    the costs are integers and the capacity is at most 2^14. Otherwise each cost is first rounded up to a multiple of
    capacity / 2^14.

  Raises:
    ValueError: success rates that are not a vector in [0, 1], costs that are not positive, totals out of reach, an
      unknown name, or a value that 'greedy' cannot take.
    TypeError: a total of rollouts that is not an integer.
  """
  M = value_lib.check_success_rate(success_rate)
  value_lib.check(value, nu)
  knobs.Alloc.check(solver=solver)
  rate = estimate.mean_rate(success_rate) if isinstance(success_rate, Window) else success_rate
  if cost_M is not None:
    if isinstance(success_rate, Window):
      raise ValueError("the paper's rule knows no costs; estimate posteriors, or set alloc.cost='rollouts'")
    _check_bounds(M, low, high, rule)
    cost_M = _check_costs(cost_M, M, total_budget, low, solver)
    if rule == 'uniform':
      return _uniform_with_costs(cost_M, total_budget, low, high)
    return _with_costs(_gains(rate, low, high, value, nu)[0], cost_M, total_budget, low)
  total_budget = operator.index(total_budget)
  check(M, total_budget, low, high, rule)
  if rule == 'uniform':
    even, more = divmod(total_budget, M)
    return np.where(np.arange(M) < more, even + 1, even).astype(np.int32)
  gains = _gains(rate, low, high, value, nu)
  if isinstance(success_rate, Window):
    return _window(success_rate, gains, total_budget, low, high, solver)
  units = total_budget - low * M
  return low + _solve(gains, units, np.full(M, True), solver, most_units=units)


# gain_MG, what each of the rollouts low + 1 .. high of each task adds; whether no task's gains ever rise.
_Gains = tuple[np.ndarray, bool]


def _gains(success_rate: Array | Beta, low: int, high: int, value: str | Value, nu: float) -> _Gains:
  """Raises ValueError for values that are not finite."""
  value_MJ = value_lib.expected(success_rate, np.arange(low, high + 1), value, nu)
  if not np.all(np.isfinite(value_MJ)):
    m, j = np.argwhere(~np.isfinite(value_MJ))[0]
    raise ValueError(f'the value of {low + j} rollouts of task {m} is {value_MJ[m, j]}; values must be finite')
  gain_MG = np.diff(value_MJ, axis=1)
  nothing = max(_NO_GAIN * np.abs(value_MJ).max(initial=0.0), np.finfo(float).tiny)
  gain_MG[np.abs(gain_MG) <= nothing] = 0.0
  falling_MG = np.minimum.accumulate(gain_MG, axis=1)
  # The named values are concave, whatever the rounding of their sums says.
  concave = isinstance(value, str) or bool(np.all(gain_MG - falling_MG <= 10 * nothing))
  return falling_MG if concave else gain_MG, concave


def _solve(gains: _Gains, units: int, open_M: np.ndarray, solver: str, *, most_units: int) -> np.ndarray:
  """unit_M: the rollouts beyond `low` of each task; tasks that are not open get none.

  One compilation serves all open_M and all units up to most_units.
  """
  gain_MG, concave = gains
  if not gain_MG.size:
    return np.zeros(len(gain_MG), np.int32)
  if solver == 'greedy':
    if not concave:
      raise ValueError("solver='greedy' needs a value whose gains never rise with N; use solver='dp'")
    gain_MG = gain_MG / max(np.abs(gain_MG).max(), 1e-300)  # float32 has no numbers below 1e-45
    return np.asarray(greedy(np.where(open_M[:, None], gain_MG, -np.inf).astype(np.float32), units))
  fixed_MG, value_MJ = _fixed_point(np.where(open_M[:, None], gain_MG, 0))
  cost_M = np.where(open_M, 1, most_units + 1).astype(np.int32)  # closed: costs more than there is
  unit_M = knapsack(value_MJ, cost_M, units, capacity=most_units, exact=True)
  if concave:
    unit_M = _even(np.where(open_M[:, None], fixed_MG, np.iinfo(np.int32).min), unit_M)
  return np.asarray(unit_M)


def _fixed_point(gain_MG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Gains as integers, and their sums from 0 on: value_MJ of 0..G units, the same on every machine.

  Gains are rounded rather than values, because rounded gains still fall with N. The knapsack needs
  sum_m max_j |value of task m| < 2^29: gains are scaled to it.
  """
  limit = 2 ** 29 - 1 - gain_MG.size // 2  # rounding adds at most a half to each gain
  if limit < 2 ** 24:
    raise ValueError(f"{gain_MG.shape[0]} tasks times {gain_MG.shape[1]} candidate budgets are too many for "
                     "solver='dp'; use solver='greedy', or lower alloc.high")
  largest_sum = np.abs(np.cumsum(gain_MG, axis=1)).max(axis=1).sum()
  fixed_MG = np.rint(gain_MG / max(largest_sum, 1e-300) * limit).astype(np.int32)  # 1e-300: all gains may be 0
  return fixed_MG, np.pad(np.cumsum(fixed_MG, axis=1, dtype=np.int32), ((0, 0), (1, 0)))


def _check_costs(cost_M: Array, num_tasks: int, capacity: float, low: int, solver: str) -> np.ndarray:
  """cost_M as float64. Raises ValueError for costs, or a capacity, that cannot be solved for."""
  cost_M = np.asarray(cost_M, float)
  if cost_M.shape != (num_tasks,):
    raise ValueError(f'cost_M must hold a cost for each of {num_tasks} tasks, not be of shape {cost_M.shape}')
  good_M = (cost_M > 0) & (cost_M < np.inf)
  if not good_M.all():
    bad = int(np.argmin(good_M))
    raise ValueError(f'cost_M[{bad}]={cost_M[bad]} must be a positive number')
  if solver == 'greedy':
    raise ValueError("solver='greedy' is exact for equal costs only; use solver='dp' with cost_M")
  least = np.full(num_tasks, low) @ cost_M
  # The caller may have summed the same costs in another order, and rounded otherwise.
  if not least <= capacity * (1 + 1e-12) < np.inf:
    raise ValueError(f'a capacity of {capacity} does not hold {low} rollouts of each of {num_tasks} tasks, '
                     f'which cost {least}; raise the capacity or lower alloc.low')
  return cost_M


def _uniform_with_costs(cost_M: np.ndarray, capacity: float, low: int, high: int) -> np.ndarray:
  """The same budget for all that the capacity pays for, and one more for the cheapest tasks that fit."""
  even = min(high, max(low, int(capacity // cost_M.sum())))
  one_more_MG = np.ones((len(cost_M), min(even + 1, high) - low))
  return _fill_up(np.full(len(cost_M), even, np.int32), one_more_MG, cost_M, capacity, low)


def _with_costs(gain_MG: np.ndarray, cost_M: np.ndarray, capacity: float, low: int) -> np.ndarray:
  """The best budgets whose summed cost, each rounded up to whole units, is within the capacity."""
  least_M = np.full(len(cost_M), low, np.int32)
  if not gain_MG.size:
    return least_M
  least = least_M @ cost_M
  if np.all(cost_M == np.rint(cost_M)) and capacity <= _COST_UNITS:
    unit, num_units, spend = 1.0, int(capacity), capacity - least
  else:
    # Sums of costs round, so a little less is spent; `_fill_up` spends the rest.
    unit, num_units, spend = capacity / _COST_UNITS, _COST_UNITS, max(capacity * (1 - 1e-12) - least, 0)
  unit_cost_M = np.minimum(np.ceil(cost_M / unit), 2 ** 30).astype(np.int32)
  _, value_MJ = _fixed_point(gain_MG)
  unit_M = knapsack(value_MJ, unit_cost_M, int(spend / unit), capacity=num_units, exact=False)
  return _fill_up(low + np.asarray(unit_M), gain_MG, cost_M, capacity, low)


def _fill_up(budget_M: np.ndarray, gain_MG: np.ndarray, cost_M: np.ndarray, capacity: float, low: int) -> np.ndarray:
  """Adds the rollouts that still fit and add value, those of the most value for their cost first."""
  rows, G = np.arange(len(budget_M)), gain_MG.shape[1]
  budget_M, fits_M = budget_M.copy(), np.full(len(budget_M), True)
  while G:
    gain_M = np.where(budget_M < low + G, gain_MG[rows, np.minimum(budget_M - low, G - 1)], 0)
    worth_M = np.where(fits_M & (gain_M > 0), gain_M / cost_M, 0)
    if not worth_M.any():
      break
    # Of equals the lowest budget, then the first task.
    m = np.argmin(np.where(worth_M == worth_M.max(), budget_M, np.iinfo(np.int32).max))
    budget_M[m] += 1
    # Compared is the sum that a caller would compute: another order of adding up may round otherwise.
    if budget_M @ cost_M > capacity:
      budget_M[m] -= 1
      fits_M[m] = False
  return budget_M


def _window(window: Window, gains: _Gains, total: int, low: int, high: int, solver: str) -> np.ndarray:
  """The authors' rule on point estimates, within the bounds for every feasible total.

  Tasks that are not known get R // M. Tasks at 0 and at 1 get `low`. A task between 0 and 1 needs ln(0.1) /
  ln(max(p, 1-p)) rollouts more, for a mixed group with probability 0.9. If these tasks need more than what is left,
  they share it by the knapsack. Otherwise they share what they need, and the surplus goes to the tasks at 0 in equal
  parts: a hard switch. What exceeds the upper bound of the tasks at 0 goes to the tasks at 1, then to those not
  known, then to those between; there the authors' code exceeds the bound or stops.
  """
  p_M, known_M = np.asarray(window.rate_M, float), np.asarray(window.known_M, bool)
  budget_M = np.where(known_M, low, np.clip(total // len(p_M), low, high)).astype(np.int32)
  between_M = known_M & (p_M > 0) & (p_M < 1)
  # The rate of the rarer outcome; at 0, ln(max(p, 1-p)) would be 0.
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
  return budget_M + _solve(gains, shared + surplus, between_M, solver, most_units=total - low * len(p_M))


@jax.jit
def greedy(gain_MG: Array, units: Array) -> Array:
  """Gives units to the largest gains: the largest possible sum, since gains never rise.

  Bisection over the 32 bits of a float finds the smallest gain that is taken. So the work is 32 counts over the
  table, whatever the total, and a new total compiles nothing.

  Args:
    gain_MG: float32, what the g-th unit adds to task m; no row rises.
    units: int32 in 0..M * G.

  Returns:
    unit_M, int32. Of equal gains the tasks with fewer units get the first, then the later tasks.
  """
  # -0.0 becomes 0.0. By a select, because XLA removes an addition of 0.
  bits = jax.lax.bitcast_convert_type(jnp.where(gain_MG == 0, 0.0, gain_MG), jnp.uint32)
  sign = jnp.uint32(1 << 31)
  key_MG = jnp.where(bits >= sign, ~bits, bits | sign)  # integers in the order of the floats

  def bit(i, least):
    trial = least | (sign >> jnp.uint32(i))
    return jnp.where(jnp.sum(key_MG >= trial, dtype=jnp.int32) >= units, trial, least)

  least = jax.lax.fori_loop(0, 32, bit, jnp.uint32(0))
  return _from(key_MG, least, units)


@jax.jit
def _even(gain_MG: Array, unit_M: Array) -> Array:
  """An optimal choice unit_M, with units of equal gains moved to where `greedy` puts them; no row of gains rises."""
  G = gain_MG.shape[1]
  taken_MG = jnp.arange(G)[None] < unit_M[:, None]
  # No gain that was left is larger than the least that was taken; the equal ones can be exchanged.
  least = jnp.min(jnp.where(taken_MG, gain_MG, jnp.iinfo(jnp.int32).max))
  return jnp.where(jnp.any(taken_MG), _from(gain_MG, least, jnp.sum(unit_M)), unit_M)


def _from(key_MG: Array, least: Array, units: Array) -> Array:
  """unit_M that takes all keys above `least`, and of those equal to it as many as there are units for."""
  return _fill(jnp.sum(key_MG > least, axis=1, dtype=jnp.int32),
               jnp.sum(key_MG >= least, axis=1, dtype=jnp.int32), units)


@jax.jit
def _fill(least_M: Array, most_M: Array, units: Array) -> Array:
  """The most even int32 unit_M within least_M..most_M (>= 0) whose sum is units; later tasks first."""
  def bit(i, level):
    trial = level | (jnp.int32(1 << 30) >> i)
    return jnp.where(jnp.sum(jnp.clip(trial, least_M, most_M)) <= units, trial, level)

  level = jax.lax.fori_loop(0, 31, bit, jnp.int32(0))
  unit_M = jnp.clip(level, least_M, most_M)
  may_have_more_M = (level >= least_M) & (level < most_M)
  turn_M = jnp.cumsum(may_have_more_M[::-1])[::-1]  # 1 for the last of them
  return unit_M + (may_have_more_M & (turn_M <= units - jnp.sum(unit_M)))


def of_step(alloc: knobs.Alloc, stats: types.TaskStats, index_M: np.ndarray, *, completion_length: int) -> np.ndarray:
  """budget_M: how many rollouts each task of a training step gets, from the statistics so far.

  With alloc.cost = 'rollouts' the budgets sum to alloc.rollouts_per_step. With 'tokens' the expected tokens of all
  rollouts are at most alloc.tokens_per_step (or what the least budgets cost, if this is more), and there are at most
  alloc.rollouts_per_step rollouts.

  Args:
    index_M: the tasks' rows in the statistics.
    completion_length: C, the expected tokens of a rollout before any rollout was seen.

  Raises:
    ValueError: as `budgets`, such as for costs in tokens with the estimate 'window'.
  """
  total, cost_M = alloc.rollouts_per_step, None
  if alloc.cost == 'tokens':
    # No rollout counts less than one R-th of the tokens, so that there are never more than R rollouts.
    token_M = estimate.tokens(stats, index_M, default=completion_length)
    cost_M = np.maximum(token_M, alloc.tokens_per_step / alloc.rollouts_per_step)
    total = max(alloc.tokens_per_step, alloc.low * cost_M.sum())
  rate, nu = estimate.success_rate(stats, index_M, alloc.estimate), estimate.nu(stats, default=alloc.nu)
  return budgets(rate, total, low=alloc.low, high=alloc.high, rule=alloc.rule, value=alloc.value, nu=nu,
                 solver=alloc.solver, cost_M=cost_M)


def objective(success_rate: Array | Beta, budget_M: Array, value: str | Value = 'infogain', nu: float = 2.0) -> float:
  """sum_i V(N_i, p_i), which `budgets` maximises; arguments as there."""
  return float(value_lib.expected(success_rate, np.asarray(budget_M)[:, None], value, nu).sum())


def expected_mixed_tasks(success_rate: Array | Beta, budget_M: Array) -> float:
  """Expected number of tasks whose group has both outcomes."""
  return float(value_lib.prob_nonzero_gradient(success_rate, np.asarray(budget_M)[:, None]).sum())


def expected_gradient_ratio(success_rate: Array | Beta, budget_M: Array) -> float:
  """Expected share of the rollouts that are in groups with both outcomes."""
  budget_M = np.asarray(budget_M)
  mixed_M = value_lib.prob_nonzero_gradient(success_rate, budget_M[:, None])[:, 0]
  return float(budget_M @ mixed_M / budget_M.sum())
