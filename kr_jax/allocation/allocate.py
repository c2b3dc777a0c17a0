"""Success rate -> value -> budgets.

    max  sum_i V(N_i, p_i)    s.t.  sum_i N_i = R  or  sum_i c_i N_i <= C,    low <= N_i <= high

With low = 0 a task may get nothing, and `most_tasks` says how many may get something: choice and budget in one
knapsack. A step of several waves solves it for each wave, with the verdicts of those before.

Source: Li et al. 2025, arXiv 2509.25849, eq. 8. README.md says how it differs.
"""

from __future__ import annotations

import operator

import numpy as np

from kr_jax import knobs
from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.allocation import solve
from kr_jax.allocation import value as value_lib
from kr_jax.allocation.value import Beta, Group, Value, Window
from kr_jax.types import Array


def check(num_tasks: int, total_budget: int, low: int, high: int, rule: str, waves: int = 1) -> None:
  """Raises ValueError unless the tasks, at most M, can share exactly the total within low..high, in every wave."""
  _check_bounds(num_tasks, low, high, rule)
  least, most = low * num_tasks, high * num_tasks
  if not least <= total_budget <= most:
    raise ValueError(
        f'{total_budget} rollouts cannot be shared by {num_tasks} tasks at {low}..{high} each: the total must lie in '
        f'{least}..{most}; change alloc.rollouts_per_step, tasks.per_step, alloc.low or alloc.high')
  rollouts_W = _parts(total_budget, waves)
  for w, (rollouts, low_w) in enumerate(zip(rollouts_W, _lows(low, waves))):
    if rollouts < low_w * num_tasks:
      raise ValueError(
          f'wave {w + 1} of {waves} has {rollouts} of {total_budget} rollouts, which do not hold {low_w} of each of '
          f'{num_tasks} tasks; lower alloc.waves or alloc.low, or raise alloc.rollouts_per_step')
  if low == 0 and rollouts_W[0] * high < total_budget:
    raise ValueError(f'the {rollouts_W[0]} tasks that wave 1 of {waves} can read have no room for {total_budget} '
                     f'rollouts at {high} each; raise alloc.high to alloc.waves={waves}, or lower alloc.waves')


def _check_bounds(num_tasks: int, low: int, high: int, rule: str) -> None:
  if num_tasks < 1:
    raise ValueError('there are no tasks to give budgets to')
  knobs.Alloc(rule=rule, low=low, high=high)  # checks them


def _check_most(num_tasks: int, most_tasks: int | None, low: int) -> int:
  """How many tasks may get rollouts."""
  if most_tasks is None or operator.index(most_tasks) >= num_tasks:
    return num_tasks
  if most_tasks < 1:
    raise ValueError(f'most_tasks={most_tasks} must be at least 1')
  if low:
    raise ValueError(f'most_tasks={most_tasks} of {num_tasks} tasks can get rollouts, but each gets alloc.low={low}; '
                     'set alloc.low=0')
  return most_tasks


def _check_group(group: Group | None, num_tasks: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
  """size_M, the rollouts that each task has, and room_M, those beyond `low` that it can get."""
  if group is None:
    return np.zeros(num_tasks, np.int32), np.full(num_tasks, high - low)
  size_M = np.asarray(group.size_M)
  if size_M.shape != (num_tasks,) or size_M.min() < 0:
    raise ValueError(f'a Group needs counts of each of {num_tasks} tasks, none of them negative, not {group}')
  room_M = high - low - size_M
  if room_M.min() < 0:
    m = int(room_M.argmin())
    raise ValueError(f'task {m} has {size_M[m]} rollouts already, and {low} more are above alloc.high={high}')
  return size_M, np.where((size_M > 0) | (low > 0), room_M, 0)


def budgets(success_rate: Array | Beta | Window, total_budget: float, *, low: int = 2, high: int = 128,
            rule: str = 'knapsack', value: str | Value = 'infogain', nu: float = 2.0, solver: str = 'dp',
            cost_M: Array | None = None, group: Group | None = None, evidence_M: Array | None = None,
            failure_rate: float | None = None, most_tasks: int | None = None) -> np.ndarray:
  """How many rollouts each task gets.

  Args:
    success_rate: success_rate_M in [0, 1], numpy, jax or a list; a Beta posterior of each; or a Window, to which the
      special cases of the paper's code apply (`_window`).
    total_budget: R, the rollouts to share; with cost_M the capacity, in the unit of cost_M.
    low, high: bounds of each budget, 0 <= low <= high.
    rule: 'uniform' (the same for all, as nearly as the total allows); or 'dynamic', which is uniform too, as its caller
      samples more tasks where too few groups are mixed; or 'knapsack'.
    value: of N rollouts of a task: a name in value.VALUES, or a function of (N, p).
    solver: 'dp'; or 'greedy', for tens of thousands of tasks, of a concave value without cost_M.
    cost_M: positive, the cost of one rollout of each task, such as its expected tokens.
    group: the rollouts that each task has already in this step, which success_rate knows. Further ones are shared
      then: low bounds these, and high the whole group. With low = 0 tasks without any get none.
    nu, evidence_M, failure_rate: of `value.expected`.
    most_tasks: how many tasks get rollouts at the most, with low = 0 alone; None: all.

  Returns:
    budget_M, int32, each in low..high.

    Without cost_M the sum is exactly R, and the summed value is the largest possible; with most_tasks it is that of
    the tasks that are worth most at one price of a rollout (`solve.most_valuable`). Before they are compared, 'greedy'
    rounds gains to float32 and 'dp' rounds them to 2^-29 of the sum of all tasks' values. Equal gains go to the
    smallest groups first, then to the later tasks; this holds of concave values, and with low = 0 among the tasks that
    get any.

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
  most = _check_most(M, most_tasks, low)
  if cost_M is not None or group is not None:
    _check_bounds(M, low, high, rule)
  size_M, room_M = _check_group(group, M, low, high)
  if isinstance(success_rate, Window):
    _check_window(low, cost_M, group)
  if cost_M is not None:
    cost_M = _check_costs(cost_M, M, total_budget, low, solver)
  else:
    total_budget = operator.index(total_budget)
    _check_total(most, total_budget, low, high, rule, group, int(room_M.sum()))
  if rule != 'knapsack':
    return _uniform(np.where(np.arange(M) < most, room_M, 0), size_M, total_budget, low, cost_M)
  rate = estimate.mean_rate(success_rate) if isinstance(success_rate, Window) else success_rate
  value_MJ = value_lib.expected(rate, np.arange(low, high + 1), value, nu, group=group, evidence_M=evidence_M,
                                failure_rate=failure_rate)
  if group is not None and solver == 'greedy':
    # Groups that no verdict came of are valued as new ones, not concave from 0 on. They must not stop a run.
    silent_M = np.asarray(group.right_M) + group.wrong_M == 0
    value_MJ[silent_M] = solve.concave(value_MJ[silent_M])
  gains = solve.gains(value_MJ, low, room_M)
  if isinstance(success_rate, Window):
    return _window(success_rate, gains, total_budget, low, high, solver)
  if low == 0 and group is None:
    return _with_choice(value_MJ, total_budget, most, solver, cost_M)
  if cost_M is not None:
    return solve.within(gains.gain_MG, cost_M, total_budget, low=low, room_M=room_M)
  return low + solve.exact(gains, total_budget - low * M, room_M=room_M, size_M=size_M, solver=solver)


def _check_window(low: int, cost_M: Array | None, group: Group | None) -> None:
  if cost_M is not None:
    raise ValueError("the paper's rule knows no costs; estimate posteriors, or set alloc.cost='rollouts'")
  if low == 0:
    raise ValueError("the paper's rule gives every task rollouts; estimate posteriors, or set alloc.low=1 or more")
  if group is not None:
    raise ValueError("the paper's rule knows no waves; estimate posteriors, or set alloc.waves=1")


def _check_total(num_tasks: int, total: int, low: int, high: int, rule: str, group: Group | None, room: int) -> None:
  if group is None:
    check(num_tasks, total, low, high, rule)
  elif not 0 <= total - low * num_tasks <= room:
    raise ValueError(f'{total} further rollouts cannot be shared by the groups of {num_tasks} tasks: the total must '
                     f'lie in {low * num_tasks}..{low * num_tasks + room}; raise alloc.high')


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


def _uniform(room_M: np.ndarray, size_M: np.ndarray, total: float, low: int, cost_M: np.ndarray | None) -> np.ndarray:
  """The most even groups, of which the first are larger by one; with costs the cheapest are.

  A capacity of costs pays for the same number of rollouts of each task, then for one more of the cheapest that fit.
  """
  if cost_M is None:
    last_first = lambda x_M: x_M[::-1]  # `fill` gives the later ones more
    group_M = solve.fill(*map(last_first, (size_M + low, size_M + low + room_M)), total + int(size_M.sum()))
    return last_first(group_M) - size_M.astype(np.int32)
  open_M = (room_M > 0) | (low > 0)
  even = int(min(max(total // cost_M[open_M].sum() - low, 0), room_M.max())) if open_M.any() else 0
  one_more_MG = np.arange(even + 1) < room_M[:, None]
  return solve.fill_up((low + np.minimum(room_M, even)).astype(np.int32), one_more_MG.astype(float), cost_M, total, low)


def _with_choice(value_MJ: np.ndarray, total: float, most: int, solver: str, cost_M: np.ndarray | None) -> np.ndarray:
  """The best budgets of which at most `most` are above 0, from the values of 0, 1, ... rollouts."""
  M, high = len(value_MJ), value_MJ.shape[1] - 1

  def share(row_X: np.ndarray, low: int) -> np.ndarray:
    gains, budget_M = solve.gains(value_MJ[row_X, low:], low), np.zeros(M, np.int32)
    room_X = np.full(len(row_X), high - low)
    if cost_M is not None:
      budget_M[row_X] = solve.within(gains.gain_MG, cost_M[row_X], total, low=low, room_M=room_X)
    else:
      budget_M[row_X] = low + solve.exact(gains, total - low * len(row_X), room_M=room_X,
                                          size_M=np.zeros(len(row_X)), solver=solver)
    return budget_M

  budget_M = share(np.arange(M), 0)
  if np.count_nonzero(budget_M) > most:
    choices = [share(row_X, 0) for row_X in solve.most_valuable(value_MJ, cost_M, total, most)]
    budget_M = max(choices, key=lambda budget_M: value_MJ[np.arange(M), budget_M].sum())
  if cost_M is not None:
    return budget_M
  # Few values are concave from 0 on, and most are from 1 on, where equals can share evenly.
  return share(np.flatnonzero(budget_M), 1)


def _window(window: Window, gains: solve.Gains, total: int, low: int, high: int, solver: str) -> np.ndarray:
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
    budget_M += solve.fill(np.zeros_like(room_M), room_M, given)
    surplus -= given
  return budget_M + solve.exact(gains, shared + surplus, room_M=np.where(between_M, high - low, 0),
                                size_M=np.zeros(len(p_M)), solver=solver, most_units=total - low * len(p_M))


def wave_rollouts(alloc: knobs.Alloc) -> tuple[int, ...]:
  """The rollouts of each wave of a step; the first has what equal parts leave over."""
  return _parts(alloc.rollouts_per_step, alloc.waves)


def _parts(total: int, waves: int) -> tuple[int, ...]:
  return (total - total // waves * (waves - 1),) + (total // waves,) * (waves - 1)


def _lows(low: int, waves: int) -> tuple[int, ...]:
  """The least rollouts of a task in each wave."""
  return tuple(low // waves + (w < low % waves) for w in range(waves))


def of_step(alloc: knobs.Alloc, stats: types.TaskStats, index_M: np.ndarray, *, completion_length: int, wave: int = 0,
            group: Group | None = None, most_tasks: int | None = None, counts_evidence: bool = False) -> np.ndarray:
  """budget_M: how many rollouts each task of a training step gets in a wave, from the statistics so far.

  Args:
    index_M: the tasks' rows in the statistics.
    completion_length: C, the expected tokens of a rollout before any rollout was seen.
    wave, group, most_tasks: of `of_wave`.
    counts_evidence: whether advantages use what is known of a task from before the step.

  Raises:
    ValueError: as `budgets`, such as for costs in tokens with the estimate 'window'.
  """
  rate, failure_rate, token_M = estimate.success_rate(stats, index_M, alloc.estimate), None, None
  evidence_M = rate.a_M + rate.b_M if counts_evidence and isinstance(rate, Beta) else None
  if group is not None:
    rate = Beta(rate.a_M + group.right_M, rate.b_M + group.wrong_M)
  if alloc.value == 'coba':
    all_I = estimate.success_rate(stats, np.arange(len(stats.rollouts_I)), alloc.estimate)
    failure_rate = 1 - float(estimate.mean_rate(all_I).mean())
  if alloc.cost == 'tokens':
    token_M = estimate.tokens(stats, index_M, default=completion_length, rate_M=estimate.mean_rate(rate))
  return of_wave(rate, alloc.replace(nu=estimate.nu(stats, default=alloc.nu)), wave=wave, group=group,
                 token_M=token_M, most_tasks=most_tasks, evidence_M=evidence_M, failure_rate=failure_rate,
                 due_M=estimate.due(stats, index_M))


def of_wave(success_rate: Array | Beta | Window, alloc: knobs.Alloc, *, wave: int = 0, group: Group | None = None,
            token_M: Array | None = None, most_tasks: int | None = None, evidence_M: Array | None = None,
            failure_rate: float | None = None, due_M: Array | None = None) -> np.ndarray:
  """budget_M: how many rollouts each task of a step gets in one of alloc.waves waves.

  With alloc.cost = 'rollouts' the budgets sum to wave_rollouts(alloc)[wave]. With 'tokens' the expected tokens of all
  rollouts are at most the wave's share of alloc.tokens_per_step (or what the least budgets cost, if this is more), and
  there are at most as many rollouts.

  With alloc.low = 0 the first wave decides which tasks get any: those that do if all rollouts of the step are shared at
  once. So no prompt is read late, and the groups have room for later waves: those that get R rollouts at once have room
  for R within alloc.high, whatever part of them the first wave gives to whom. Tasks that are due come before all
  others, and each gets a rollout at least: what is known of them has faded, and tasks that are known to be worth much
  would keep them away for ever. With alloc.low > 0 all tasks have room
  for alloc.high each, of which a wave leaves what later waves give them at least.

  Args:
    success_rate: of `budgets`, from the group's verdicts as well.
    wave: 0, 1, ...
    group: the rollouts of earlier waves; None in the first.
    token_M: the expected tokens of a rollout of each task, where they are the cost.
    most_tasks: how many of the tasks get rollouts at the most, with alloc.low = 0.
    evidence_M, failure_rate: of `budgets`.
    due_M: bool, the tasks that are due; None: none.
  """
  M = value_lib.check_success_rate(success_rate)
  R, rollouts_W, low_W = alloc.rollouts_per_step, wave_rollouts(alloc), _lows(alloc.low, alloc.waves)
  most, in_tokens = _check_most(M, most_tasks, alloc.low), alloc.cost == 'tokens'
  check(most, min(R, alloc.high * most) if in_tokens else R, alloc.low, alloc.high, alloc.rule, alloc.waves)
  if (wave > 0) != (group is not None):
    raise ValueError(f'wave={wave} needs {"the rollouts of earlier waves as its" if wave else "no"} group')
  if alloc.solver == 'greedy' and alloc.value == 'snr' and evidence_M is not None:
    raise ValueError("alloc.solver='greedy' needs a concave value, and alloc.value='snr' is not for every nu where it "
                     "counts evidence (grpo.advantage='posterior'); set alloc.solver='dp'")
  rows = lambda x_M, row_X: None if x_M is None else np.asarray(x_M)[row_X]

  def share(rollouts: int, low: int, row_X: np.ndarray, most_tasks: int | None = None) -> np.ndarray:
    rate = (type(success_rate)(*(rows(x_M, row_X) for x_M in success_rate))
            if isinstance(success_rate, (Beta, Window)) else rows(success_rate, row_X))
    total, cost_X = rollouts, None
    if in_tokens:
      # No rollout counts less than one R-th of the tokens, so that there are never more rollouts than there may be.
      cost_X = np.maximum(rows(token_M, row_X), alloc.tokens_per_step / R)
      total = max(alloc.tokens_per_step * rollouts / R, low * cost_X.sum())
    return budgets(
        rate, total, low=low, high=alloc.high - sum(low_W[wave + 1:]), rule=alloc.rule, value=alloc.value, nu=alloc.nu,
        solver=alloc.solver, cost_M=cost_X, group=group, evidence_M=rows(evidence_M, row_X), failure_rate=failure_rate,
        most_tasks=most_tasks)

  all_M, choice = np.arange(M), min(most, rollouts_W[0])
  due_X = all_M[:0] if due_M is None or alloc.rule != 'knapsack' else np.flatnonzero(due_M)
  if wave or alloc.low:
    return share(rollouts_W[wave], low_W[wave], all_M)
  if alloc.waves == 1 and not len(due_X):
    return share(R, 0, all_M, most)
  if len(due_X) > choice:
    row_X = due_X[np.argsort(-share(R, 0, due_X, choice), kind='stable')][:choice]
  else:
    at_once_M = share(R, 0, all_M, choice)
    wanted_X = np.argsort(-at_once_M, kind='stable')[:np.count_nonzero(at_once_M)]
    row_X = np.append(due_X, np.setdiff1d(wanted_X, due_X, assume_unique=True))[:choice]
  row_X = np.sort(row_X)
  budget_M = np.zeros(M, np.int32)
  if len(row_X):  # else the tokens do not pay for any rollout that adds value
    budget_M[row_X] = share(rollouts_W[0], 1, row_X)
  return budget_M


def chosen(budget_M: np.ndarray, most: int) -> np.ndarray:
  """index_X: `most` rows in order, all those with a budget above 0 among them, then the first others.

  Raises ValueError where there are more budgets above 0, or fewer rows.
  """
  row_X = np.flatnonzero(budget_M)
  if not len(row_X) <= most <= len(budget_M):
    raise ValueError(f'{most} rows cannot hold {len(row_X)} tasks with rollouts, of {len(budget_M)}')
  others = np.flatnonzero(np.asarray(budget_M) == 0)
  return np.sort(np.concatenate([row_X, others[:most - len(row_X)]]))


def objective(success_rate: Array | Beta, budget_M: Array, value: str | Value = 'infogain', nu: float = 2.0,
              **known: Group | Array | float | None) -> float:
  """sum_i V(N_i, p_i), which `budgets` maximises; known: group, evidence_M, failure_rate of `value.expected`."""
  return float(value_lib.expected(success_rate, np.asarray(budget_M)[:, None], value, nu, **known).sum())


def expected_mixed_tasks(success_rate: Array | Beta, budget_M: Array) -> float:
  """Expected number of tasks whose group has both outcomes."""
  return float(value_lib.prob_nonzero_gradient(success_rate, np.asarray(budget_M)[:, None]).sum())


def expected_gradient_ratio(success_rate: Array | Beta, budget_M: Array) -> float:
  """Expected share of the rollouts that are in groups with both outcomes."""
  budget_M = np.asarray(budget_M)
  mixed_M = value_lib.prob_nonzero_gradient(success_rate, budget_M[:, None])[:, 0]
  return float(budget_M @ mixed_M / budget_M.sum())
