"""Gains -> units: the solvers of the knapsack.

    max  sum_i V_i(N_i)    s.t.  sum_i N_i = R  or  sum_i c_i N_i <= C,    N_i within bounds

`exact` spends a total of rollouts, `within` a capacity of costs. The dynamic program of kernels/knapsack takes any
value and any cost; `greedy` takes the largest gains first, for concave values and equal costs. `most_valuable` says
which tasks are worth most, where not all of them can have rollouts.

Tasks and capacities are padded to buckets, so that one compiled program serves every total, and every number of tasks,
of a bucket. The padding changes no result.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kr_jax.kernels.knapsack import FORBIDDEN, knapsack
from kr_jax.types import Array

COST_UNITS = 2 ** 14  # that a capacity is divided into where it is larger, or where costs are not integers
_NO_GAIN = 1e-13  # gains below this share of the largest value are rounding errors of a difference and count as 0
_LEAST_TASKS, _LEAST_CAPACITY = 256, 512  # of a bucket; of 64 tasks a call takes 1.0 ms instead of .7 for it
_PRICES = 40  # halvings of the range of prices


class Gains(NamedTuple):
  """What further units are worth."""

  gain_MG: np.ndarray  # float64, what each of the units 1..G adds to each task
  rise: str  # which gain is above the one before it; '' where none is: the values are concave


def gains(value_MJ: np.ndarray, first: int = 0, room_M: np.ndarray | None = None) -> Gains:
  """The gains of values at the budgets first, first + 1, ...; those beyond room_M do not matter.

  Raises ValueError for values that are not finite.
  """
  if not np.all(np.isfinite(value_MJ)):
    m, j = np.argwhere(~np.isfinite(value_MJ))[0]
    raise ValueError(f'the value of {first + j} rollouts of task {m} is {value_MJ[m, j]}; values must be finite')
  gain_MG = np.diff(value_MJ, axis=1)
  nothing = max(_NO_GAIN * np.abs(value_MJ).max(initial=0.0), np.finfo(float).tiny)
  gain_MG[np.abs(gain_MG) <= nothing] = 0.0
  falling_MG = np.minimum.accumulate(gain_MG, axis=1)
  rises_MG = gain_MG - falling_MG > 10 * nothing
  if rises_MG.any() and room_M is not None:
    rises_MG &= np.arange(gain_MG.shape[1]) < room_M[:, None]
  if not rises_MG.any():
    return Gains(falling_MG, '')  # but for the rounding of sums
  m, g = np.argwhere(rises_MG)[0]
  return Gains(gain_MG, f'rollout {first + g + 1} of task {m} adds {gain_MG[m, g]:.3g}, and rollout {first + g} adds '
               f'{gain_MG[m, g - 1]:.3g}')


def concave(value_MJ: np.ndarray) -> np.ndarray:
  """The least values that are concave and nowhere below these: where gains rise, their mean takes their place.

  Source: the pool adjacent violators algorithm, Barlow et al. 1972, Statistical Inference under Order Restrictions.
  """
  gain_MG = np.diff(value_MJ, axis=1)
  for m in np.flatnonzero(np.any(np.diff(gain_MG, axis=1) > 0, axis=1)):
    pools = []  # mean gain, and how many have it
    for gain in gain_MG[m]:
      pools.append((gain, 1))
      while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
        (x, n), (y, k) = pools.pop(), pools.pop()
        pools.append(((n * x + k * y) / (n + k), n + k))
    gain_MG[m] = np.repeat(*zip(*pools))
  return value_MJ[:, :1] + np.pad(np.cumsum(gain_MG, axis=1), ((0, 0), (1, 0)))


def bucket(n: int, least: int, *, halves: bool = False) -> int:
  """The smallest least * 2^k that holds n; with halves also least * 3 * 2^k / 2."""
  size = least
  while size < n:
    size *= 2
  return size * 3 // 4 if halves and size > least and n <= size * 3 // 4 else size


def _padded(x: np.ndarray, fill: float = 0) -> np.ndarray:
  """Rows for all tasks of the bucket."""
  more = bucket(len(x), _LEAST_TASKS) - len(x)
  return np.pad(x, ((0, more),) + ((0, 0),) * (x.ndim - 1), constant_values=fill) if more else x


def exact(gains: Gains, units: int, *, room_M: np.ndarray, size_M: np.ndarray, solver: str,
          most_units: int | None = None) -> np.ndarray:
  """unit_M, int32, that sums to `units` and adds the most value.

  Args:
    gains: of each task's units.
    units: to share, at most the summed room.
    room_M: the most units of each task; at most G count.
    size_M: int, the rollouts that each task has already: of equal gains the smallest groups get the first, then the
      later tasks.
    solver: 'dp' or 'greedy'.
    most_units: of any call that shall share a compiled program; None: units.

  Raises:
    ValueError: values that 'greedy' cannot take, or too many for 'dp'.
  """
  gain_MG, rise = gains
  M, G = gain_MG.shape
  if not gain_MG.size or not units:
    return np.zeros(M, np.int32)
  allowed_MG = np.arange(G) < room_M[:, None]
  size_M = _padded(np.asarray(size_M, np.int32))
  if solver == 'greedy':
    if rise:
      raise ValueError(f"solver='greedy' needs a value whose gains never rise with N, but {rise}; use solver='dp'")
    gain_MG = gain_MG / max(np.abs(gain_MG).max(), 1e-300)  # float32 has no numbers below 1e-45
    key_MG = _padded(np.where(allowed_MG, gain_MG, -np.inf).astype(np.float32), -np.inf)
    return np.asarray(greedy(key_MG, size_M, np.int32(units)))[:M]
  capacity = bucket(max(units, most_units or 0), _LEAST_CAPACITY, halves=True)
  fixed_MG, value_MJ = fixed_point(np.where(allowed_MG, gain_MG, 0))
  value_MJ[:, 1:][~allowed_MG] = FORBIDDEN
  cost_M = np.where(allowed_MG[:, 0], 1, capacity + 1).astype(np.int32)  # closed tasks take no time then
  unit_M = knapsack(_padded(value_MJ), _padded(cost_M, capacity + 1), np.int32(units), capacity=capacity, exact=True)
  if not rise:
    least = np.iinfo(np.int32).min
    unit_M = even(_padded(np.where(allowed_MG, fixed_MG, least), least), size_M, unit_M)
  return np.asarray(unit_M)[:M]


def fixed_point(gain_MG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def within(gain_MG: np.ndarray, cost_M: np.ndarray, capacity: float, *, low: int, room_M: np.ndarray) -> np.ndarray:
  """budget_M, low + the best units, whose summed cost, each rounded up to whole units, is within the capacity."""
  least_M = np.full(len(cost_M), low, np.int32)
  if not gain_MG.size:
    return least_M
  gain_MG = np.where(np.arange(gain_MG.shape[1]) < room_M[:, None], gain_MG, 0)  # what adds nothing is not bought
  least = least_M @ cost_M
  if np.all(cost_M == np.rint(cost_M)) and capacity <= COST_UNITS:
    unit, num_units, spend = 1.0, bucket(int(capacity), _LEAST_CAPACITY, halves=True), capacity - least
  else:
    # Sums of costs round, so a little less is spent; `fill_up` spends the rest.
    unit, num_units, spend = capacity / COST_UNITS, COST_UNITS, max(capacity * (1 - 1e-12) - least, 0)
  unit_cost_M = np.minimum(np.ceil(cost_M / unit), 2 ** 30).astype(np.int32)
  _, value_MJ = fixed_point(gain_MG)
  unit_M = knapsack(_padded(value_MJ), _padded(unit_cost_M, num_units + 1), np.int32(spend / unit),
                    capacity=num_units, exact=False)
  return fill_up(low + np.asarray(unit_M)[:len(cost_M)], gain_MG, cost_M, capacity, low)


def fill_up(budget_M: np.ndarray, gain_MG: np.ndarray, cost_M: np.ndarray, capacity: float, low: int) -> np.ndarray:
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


def most_valuable(value_MJ: np.ndarray, cost_M: np.ndarray | None, capacity: float, most: int) -> list[np.ndarray]:
  """Rows of `most` tasks that are worth most at a price: just below and just above the price that spends the capacity.

  At the price x of a unit of cost, task m is worth max_N V_m(N) - x c_m N. The tasks worth most are the best choice
  for what they then spend, and x * capacity + their worth bounds what any choice of `most` tasks can have (Lagrangian
  duality; Kellerer, Pferschy, Pisinger 2004, section 11.2). Of equals the first are taken. Without costs all units
  must be spent, so that the price may be negative.
  """
  unit_cost_M = np.ones(len(value_MJ)) if cost_M is None else cost_M
  spent_MJ = unit_cost_M[:, None] * np.arange(value_MJ.shape[1])
  above = float(np.ptp(value_MJ) / unit_cost_M.min())  # no gain is larger
  value_MJ = np.where(spent_MJ <= capacity, value_MJ, -np.inf)

  def at(price: float) -> tuple[np.ndarray, float]:
    net_MJ = value_MJ - price * spent_MJ
    row_X = np.sort(np.argsort(-net_MJ.max(axis=1), kind='stable')[:most])
    return row_X, spent_MJ[row_X, net_MJ[row_X].argmax(axis=1)].sum()

  below = -above if cost_M is None else 0.0
  for _ in range(_PRICES):
    price = (below + above) / 2
    below, above = (price, above) if at(price)[1] > capacity else (below, price)
  return [at(below)[0], at(above)[0]]


@jax.jit
def greedy(gain_MG: Array, size_M: Array, units: Array) -> Array:
  """Gives units to the largest gains: the largest possible sum, since gains never rise.

  Bisection over the 32 bits of a float finds the smallest gain that is taken. So the work is 32 counts over the
  table, whatever the total, and a new total compiles nothing.

  Args:
    gain_MG: float32, what the g-th unit adds to task m; no row rises.
    size_M: int32, what each task has already.
    units: int32 in 0..M * G.

  Returns:
    unit_M, int32. Of equal gains the tasks with the smallest size + units get the first, then the later tasks.
  """
  # -0.0 becomes 0.0. By a select, because XLA removes an addition of 0.
  bits = jax.lax.bitcast_convert_type(jnp.where(gain_MG == 0, 0.0, gain_MG), jnp.uint32)
  sign = jnp.uint32(1 << 31)
  key_MG = jnp.where(bits >= sign, ~bits, bits | sign)  # integers in the order of the floats

  def bit(i, least):
    trial = least | (sign >> jnp.uint32(i))
    return jnp.where(jnp.sum(key_MG >= trial, dtype=jnp.int32) >= units, trial, least)

  least = jax.lax.fori_loop(0, 32, bit, jnp.uint32(0))
  return _from(key_MG, least, size_M, units)


@jax.jit
def even(gain_MG: Array, size_M: Array, unit_M: Array) -> Array:
  """An optimal choice unit_M, with units of equal gains moved to where `greedy` puts them; no row of gains rises."""
  G = gain_MG.shape[1]
  taken_MG = jnp.arange(G)[None] < unit_M[:, None]
  # No gain that was left is larger than the least that was taken; the equal ones can be exchanged.
  least = jnp.min(jnp.where(taken_MG, gain_MG, jnp.iinfo(jnp.int32).max))
  return jnp.where(jnp.any(taken_MG), _from(gain_MG, least, size_M, jnp.sum(unit_M)), unit_M)


def _from(key_MG: Array, least: Array, size_M: Array, units: Array) -> Array:
  """unit_M that takes all keys above `least`, and of those equal to it as many as there are units for."""
  return _level(size_M + jnp.sum(key_MG > least, axis=1, dtype=jnp.int32),
                size_M + jnp.sum(key_MG >= least, axis=1, dtype=jnp.int32), units + jnp.sum(size_M)) - size_M


def fill(least_M: np.ndarray, most_M: np.ndarray, units: int) -> np.ndarray:
  """The most even int32 unit_M within least_M..most_M (>= 0) whose sum is units; later tasks first."""
  return np.asarray(_level(*(_padded(np.asarray(x_M, np.int32)) for x_M in (least_M, most_M)), np.int32(units))
                    )[:len(least_M)]


@jax.jit
def _level(least_M: Array, most_M: Array, units: Array) -> Array:
  def bit(i, level):
    trial = level | (jnp.int32(1 << 30) >> i)
    return jnp.where(jnp.sum(jnp.clip(trial, least_M, most_M)) <= units, trial, level)

  level = jax.lax.fori_loop(0, 31, bit, jnp.int32(0))
  unit_M = jnp.clip(level, least_M, most_M)
  may_have_more_M = (level >= least_M) & (level < most_M)
  turn_M = jnp.cumsum(may_have_more_M[::-1])[::-1]  # 1 for the last of them
  return unit_M + (may_have_more_M & (turn_M <= units - jnp.sum(unit_M)))
