"""Budgets maximise the summed value within what there is, and share evenly among equals."""

import doctest
import functools
import itertools
import pathlib
import re

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax import knobs
from kr_jax.allocation import allocate
from kr_jax.allocation import value as value_lib
from kr_jax.allocation.allocate import budgets
from kr_jax.allocation.value import Beta, Window
from kr_jax.kernels.knapsack import knapsack

few = functools.partial(settings, deadline=None)
solvers = pytest.mark.parametrize('solver', knobs.Alloc.choices('solver'))
values = pytest.mark.parametrize('value', tuple(value_lib.VALUES))
slow = pytest.mark.slow
# A handful of shapes, since each compiles: tasks, rollouts, low, high.
SHAPES = ((1, 5, 2, 9), (2, 9, 1, 7), (3, 9, 3, 3), (3, 16, 1, 9), (4, 15, 2, 8))


def beta(*a_and_b: tuple[float, float]) -> Beta:
  a_M, b_M = zip(*a_and_b)
  return Beta(np.array(a_M, float), np.array(b_M, float))


def window(rate, known=None) -> Window:
  known_M = np.ones(len(rate), bool) if known is None else np.array(known)
  return Window(np.array(rate, float), known_M)


def length(success_rate) -> int:
  return len(success_rate[0] if isinstance(success_rate, Beta | Window) else success_rate)


@functools.cache
def vectors(num_tasks: int, low: int, high: int, total: int | None = None) -> np.ndarray:
  """Every vector of M integers in low..high, of the given sum if there is one."""
  return np.array([v for v in itertools.product(range(low, high + 1), repeat=num_tasks)
                   if total in (None, sum(v))])


def table(success_rate, low: int, high: int, value='infogain', nu: float = 2.0) -> np.ndarray:
  return value_lib.expected(success_rate, np.arange(low, high + 1), value, nu)


def worth(value_MJ: np.ndarray, budget_M: np.ndarray, low: int) -> float:
  """The summed value of budgets, each a column from `low` on."""
  return float(value_MJ[np.arange(len(value_MJ)), budget_M - low].sum())


def brute_force(value_MJ: np.ndarray, vector_VM: np.ndarray, low: int) -> float:
  return value_MJ[np.arange(len(value_MJ)), vector_VM - low].sum(axis=1).max()


def largest_gains(value_MJ: np.ndarray, units: int) -> float:
  """The optimum of concave values: the floors, and the largest gains there are."""
  gain = np.sort(np.diff(value_MJ, axis=1), axis=None)
  return float(value_MJ[:, 0].sum() + gain[len(gain) - units:].sum())


def rounding(value_MJ: np.ndarray, units: int) -> float:
  """What rounding may cost the dp: half of 2^-29 of the reach for a unit taken and one left."""
  reach = np.abs(value_MJ - value_MJ[:, :1]).max(axis=1).sum()
  return 1.1 * units * (reach / 2 ** 29 + 1e-13 * np.abs(value_MJ).max()) + 1e-30


def one_at_a_time(gain_MG, units: int) -> np.ndarray:
  """A unit at a time to the largest gain; of equals the fewest units, then the later task."""
  unit_M = np.zeros(len(gain_MG), int)
  for _ in range(units):
    unit_M[min((m for m in range(len(unit_M)) if unit_M[m] < len(gain_MG[m])),
               key=lambda m: (-gain_MG[m][unit_M[m]], unit_M[m], -m))] += 1
  return unit_M


def feasible(budget_M: np.ndarray, num_tasks: int, total: int, low: int, high: int):
  assert isinstance(budget_M, np.ndarray)
  assert budget_M.shape == (num_tasks,) and budget_M.dtype == np.int32
  assert budget_M.sum() == total and budget_M.min() >= low and budget_M.max() <= high


def within_capacity(budget_M, cost_M, capacity: float, low: int, high: int, value_MJ: np.ndarray):
  """Affordable, and no rollout is left out that fits and adds value."""
  cost_M = np.asarray(cost_M, float)
  assert budget_M.shape == cost_M.shape and budget_M.dtype == np.int32
  assert budget_M.min() >= low and budget_M.max() <= high
  # The least budgets may be all there is, summed in another order.
  assert budget_M @ cost_M <= capacity or np.all(budget_M == low)
  more_M = np.minimum(budget_M + 1, high)
  rows = np.arange(len(budget_M))
  gain_M = value_MJ[rows, more_M - low] - value_MJ[rows, budget_M - low]
  fits_M = np.array([np.where(rows == m, more_M, budget_M) @ cost_M <= capacity for m in rows])
  nothing = max(1e-12 * value_MJ.max(), np.finfo(float).tiny)
  assert not np.any(fits_M & (gain_M > nothing))


rates = st.floats(0, 1)
parameters = st.floats(0.05, 1000)


@st.composite
def success_rates(draw, num_tasks: int):
  """Known or up to a posterior, of tasks that may be equal."""
  lists = lambda x: st.lists(x, min_size=num_tasks, max_size=num_tasks)
  if draw(st.booleans()):
    some = st.sampled_from(draw(st.lists(rates, min_size=1, max_size=3)))
    return np.array(draw(lists(rates) | lists(some)))
  return beta(*draw(lists(st.tuples(parameters, parameters))))


@st.composite
def problems(draw, shapes=SHAPES):
  """Success rates, and what to share among them."""
  shape = draw(st.sampled_from(shapes))
  return draw(success_rates(shape[0])), shape


# The optimum of a total.


@solvers
def test_budgets_by_hand(solver):
  """Gains: .5 has 2^-N / 8, .05 has .00214 .00194 ..., .95 has .00011; the fifth to .05."""
  p_M = np.array([0.05, 0.5, 0.95])
  budget_M = budgets(p_M, 12, low=2, high=128, solver=solver)
  np.testing.assert_array_equal(budget_M, [3, 7, 2])
  assert budget_M.dtype == np.int32
  np.testing.assert_array_equal(budgets(p_M, 12, low=2, high=6, solver=solver), [4, 6, 2])
  np.testing.assert_array_equal(budgets([0.5, 0, 1, 0.5], 10, solver=solver), [3, 2, 2, 3])


@solvers
def test_budgets_of_variance_and_snr_by_hand(solver):
  by = functools.partial(budgets, [0.5, 0.2], solver=solver, low=1)
  # Gains of 'variance': .125 .0625 .03125 .015625 .. and .0512 .0256 .0174 ..
  np.testing.assert_array_equal(by(6, value='variance'), [4, 2])
  np.testing.assert_array_equal(by(7, value='variance'), [4, 3])
  # Without noise two rollouts are all it takes; with much of it they go to 1/2 alone.
  np.testing.assert_array_equal(by(4, value='snr', nu=1e-9), [2, 2])
  np.testing.assert_array_equal(by(9, value='snr', nu=1e9), [8, 1])
  # snr of nu = 2: 1/2 gains .0278 .0222 .0182 .0152 .0128 .., 0.2 gains .0119 .0102.
  np.testing.assert_array_equal(by(7, value='snr'), [6, 1])
  np.testing.assert_array_equal(by(8, value='snr'), [6, 2])


@solvers
def test_the_floors_count_at_their_own_value(solver):
  """The seventh of 1/2 adds 1/512, the third of .9 .00081. A program that starts from 0 instead of
  V(low) would see .00243 for the third of .9, and take it."""
  np.testing.assert_array_equal(budgets([0.5, 0.9], 9, low=2, solver=solver), [7, 2])


@solvers
@values
@given(problem=problems())
@few(max_examples=60)
def test_budgets_have_the_best_objective_of_all(solver, value, problem):
  success_rate, (num_tasks, total, low, high) = problem
  budget_M = budgets(success_rate, total, low=low, high=high, value=value, solver=solver)
  feasible(budget_M, num_tasks, total, low, high)
  value_MJ = table(success_rate, low, high, value)
  best = brute_force(value_MJ, vectors(num_tasks, low, high, total), low)
  assert worth(value_MJ, budget_M, low) >= best * (1 - 1e-7) - rounding(value_MJ, total)
  assert best == pytest.approx(largest_gains(value_MJ, total - low * num_tasks), rel=1e-9, abs=1e-30)


MANY = ((1, 20, 2, 40), (2, 24, 2, 34), (5, 41, 1, 17), (8, 64, 2, 34), (16, 128, 2, 18))


@pytest.mark.parametrize('examples', [100, pytest.param(2_000, marks=slow)])
def test_both_solvers_have_the_same_objective(examples):
  """Gains are rounded to 2^-29 and to float32: with 16 * 16 candidates to 1e-6 of the objective."""
  @given(problem=problems(SHAPES + MANY), value=st.sampled_from(tuple(value_lib.VALUES)),
         nu=st.floats(0.05, 200))
  @few(max_examples=examples)
  def check(problem, value, nu):
    success_rate, (num_tasks, total, low, high) = problem
    solve = functools.partial(budgets, success_rate, total, low=low, high=high, value=value, nu=nu)
    dp_M, greedy_M = solve(solver='dp'), solve(solver='greedy')
    feasible(dp_M, num_tasks, total, low, high)
    feasible(greedy_M, num_tasks, total, low, high)
    assert allocate.objective(success_rate, dp_M, value, nu) == pytest.approx(
        allocate.objective(success_rate, greedy_M, value, nu), rel=1e-6, abs=1e-30)

  check()


@solvers
@pytest.mark.parametrize('seed', range(4))
def test_budgets_of_many_tasks_are_the_largest_gains(solver, seed):
  p_M = np.random.default_rng(seed).beta(0.5, 0.5, 48)
  budget_M = budgets(p_M, 400, low=2, high=40, solver=solver)
  best = largest_gains(table(p_M, 2, 40), 400 - 2 * 48)
  assert allocate.objective(p_M, budget_M) == pytest.approx(best, rel=1e-6)
  assert best > allocate.objective(p_M, budgets(p_M, 400, rule='uniform')) * 1.02


@solvers
@values
def test_a_small_step_is_exactly_the_greedy_choice(solver, value):
  """Far from the rounding of values, where no two gains are equal."""
  rng = np.random.default_rng(0)
  for _ in range(20):
    p_M = rng.uniform(0.03, 0.97, 8)
    gain_MG = np.diff(table(p_M, 1, 16, value), axis=1)
    np.testing.assert_array_equal(budgets(p_M, 40, low=1, high=16, value=value, solver=solver),
                                  1 + one_at_a_time(gain_MG, 32))


def test_greedy_is_the_optimum_of_16384_tasks():
  rng = np.random.default_rng(0)
  for success_rate in (rng.beta(0.5, 0.5, 16384), Beta(*rng.uniform(0.1, 20, (2, 16384)))):
    value_MJ = table(success_rate, 2, 128)
    budget_M = budgets(success_rate, 131072, solver='greedy')
    feasible(budget_M, 16384, 131072, 2, 128)
    gain = np.diff(value_MJ, axis=1).ravel()
    units = 131072 - 2 * 16384
    best = value_MJ[:, 0].sum() + np.partition(gain, gain.size - units)[-units:].sum()
    assert worth(value_MJ, budget_M, 2) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize('seed', range(2))
def test_both_solvers_have_the_optimum_of_a_real_step(seed):
  """256 tasks x 8, as in the paper."""
  rng = np.random.default_rng(seed)
  for success_rate in (rng.beta(0.3, 0.6, 256), Beta(*rng.uniform(0.1, 9, (2, 256)))):
    value_MJ = table(success_rate, 2, 128)
    for solver, rel in (('dp', 1e-6), ('greedy', 1e-9)):
      budget_M = budgets(success_rate, 2048, solver=solver)
      feasible(budget_M, 256, 2048, 2, 128)
      assert worth(value_MJ, budget_M, 2) == pytest.approx(largest_gains(value_MJ, 1536), rel=rel)


# Equal tasks, and tasks in any order.


@pytest.mark.parametrize('p, num_tasks, total, low, high', [
    (0.5, 256, 2048, 2, 128),  # the authors' code spends 1280 of these
    (1 / 3, 256, 2048, 2, 128),
    (0.0, 256, 2048, 2, 128),
    (1.0, 256, 2048, 2, 128),
    (0.01, 16, 512, 2, 128),
    (0.3, 1, 100, 2, 128),  # a single task
    (0.5, 8, 30, 2, 128),  # not a multiple
    (0.0, 8, 30, 2, 128),
    (0.9, 7, 14, 2, 128),  # the floors alone
    (0.2, 7, 35, 2, 5),  # the bounds alone
    (0.2, 7, 35, 5, 5),  # no choice
])
@solvers
def test_equal_tasks_share_evenly(solver, p, num_tasks, total, low, high):
  k, more = divmod(total, num_tasks)
  even_M = [k] * (num_tasks - more) + [k + 1] * more  # the later tasks have the rest
  share = functools.partial(budgets, total_budget=total, low=low, high=high, solver=solver)
  p_M = np.full(num_tasks, p)
  np.testing.assert_array_equal(share(p_M), even_M)
  np.testing.assert_array_equal(share(p_M, value='snr'), even_M)
  np.testing.assert_array_equal(share(Beta(p_M + 0.1, np.ones(num_tasks))), even_M)


@solvers
def test_equal_tasks_share_evenly_where_gains_are_below_the_rounding(solver):
  assert set(budgets(np.full(64, 1 / 3), 64 * 40, solver=solver)) == {40}


@solvers
@values
@pytest.mark.parametrize('p', [0.0, 1.0, 5e-324, 1e-160, 1e-18, 1e-12, 1e-6, 1 - 1e-16, 1 - 1e-9])
def test_equal_tasks_share_evenly_however_little_there_is_to_gain(solver, value, p):
  np.testing.assert_array_equal(
      budgets(np.full(4, p), 33, low=1, high=64, value=value, solver=solver), [8, 8, 8, 9])


@solvers
def test_tiny_rates_are_told_apart(solver):
  """Values of 1e-40 are worth as much as others where there are no others."""
  for value in ('variance', 'snr'):
    budget_M = budgets([1e-12, 1e-9], 20, low=1, high=16, value=value, solver=solver)
    np.testing.assert_array_equal(budget_M, [4, 16])
  np.testing.assert_array_equal(
      budgets([1e-25, 1e-22], 20, low=1, high=16, value='snr', solver=solver), [4, 16])


@solvers
@pytest.mark.parametrize('total', [10, 60])
def test_totals_at_the_bounds_leave_no_choice(solver, total):
  p_M = np.array([0, 0.1, 0.5, 0.9, 1])
  for success_rate in (p_M, Beta(p_M + 1, p_M + 0.5), window(p_M),
                       window(p_M, [False, True, True, True, False])):
    np.testing.assert_array_equal(
        budgets(success_rate, total, low=2, high=12, solver=solver), np.full(5, total // 5))


@solvers
def test_no_budget_exceeds_the_bound_where_one_task_alone_can_learn(solver):
  budget_M = budgets(np.array([0, 0.3, 0, 1, 0]), 64, low=2, high=32, solver=solver)
  assert budget_M.sum() == 64 and budget_M.max() <= 32 and budget_M[1] == 32
  assert np.ptp(np.delete(budget_M, 1)) == 0  # 8 each: nothing to choose between them


def test_uniform_budgets():
  uniform = functools.partial(budgets, rule='uniform')
  np.testing.assert_array_equal(uniform(np.array([0.1, 0.5, 1]), 8), [3, 3, 2])
  np.testing.assert_array_equal(uniform(np.array([0.1, 0.5, 1]), 12, low=4, high=4), [4, 4, 4])
  np.testing.assert_array_equal(uniform(beta((1, 9), (9, 1)), 5), [3, 2])
  np.testing.assert_array_equal(uniform(window([0, 0.5, 1]), 10), [4, 3, 3])
  assert uniform([0.5, 0.5], 9, solver='greedy').dtype == np.int32


@given(problem=problems(), rule=st.sampled_from(knobs.Alloc.choices('rule')),
       solver=st.sampled_from(knobs.Alloc.choices('solver')))
@few(max_examples=60)
def test_budgets_are_feasible_under_either_rule(problem, rule, solver):
  success_rate, (num_tasks, total, low, high) = problem
  feasible(budgets(success_rate, total, low=low, high=high, rule=rule, solver=solver),
           num_tasks, total, low, high)


@solvers
@values
def test_budgets_go_with_their_tasks(solver, value):
  rng = np.random.default_rng(1)
  solve = functools.partial(budgets, total_budget=40, low=1, high=16, value=value, solver=solver)
  for _ in range(10):
    p_M, order_M = rng.uniform(0.03, 0.97, 8), rng.permutation(8)
    np.testing.assert_array_equal(solve(p_M[order_M]), solve(p_M)[order_M])
    a_M, b_M = rng.uniform(0.1, 9, (2, 8))
    np.testing.assert_array_equal(solve(Beta(a_M[order_M], b_M[order_M])),
                                  solve(Beta(a_M, b_M))[order_M])


def test_budgets_go_with_their_tasks_and_costs():
  rng = np.random.default_rng(1)
  for cost_M in (rng.integers(1, 6, 8), rng.uniform(1, 6, 8)):
    solve = functools.partial(budgets, total_budget=150, low=1, high=16)
    for _ in range(10):
      p_M, order_M = rng.uniform(0.03, 0.97, 8), rng.permutation(8)
      np.testing.assert_array_equal(solve(p_M[order_M], cost_M=cost_M[order_M]),
                                    solve(p_M, cost_M=cost_M)[order_M])


@solvers
def test_the_same_call_has_the_same_budgets(solver):
  rng = np.random.default_rng(2)
  for success_rate in (rng.uniform(size=16), Beta(*rng.uniform(0.1, 9, (2, 16))),
                       window(rng.integers(0, 5, 16) / 4, rng.uniform(size=16) < 0.7)):
    solve = lambda: budgets(success_rate, 128, value='snr', solver=solver)
    np.testing.assert_array_equal(solve(), solve())


@solvers
def test_success_rates_may_be_numpy_jax_or_a_list(solver):
  rate = [0.25, 0.5, 0, 1, 0.125, 0.5]
  solve = functools.partial(budgets, total_budget=40, solver=solver)
  expected_M = solve(np.array(rate))
  for kind in (list, tuple, np.float32, jnp.array):
    np.testing.assert_array_equal(solve(kind(rate)), expected_M)
  posterior = Beta(np.array(rate) + 0.5, np.array(rate[::-1]) + 0.5)
  for kind in (list, jnp.array):
    np.testing.assert_array_equal(solve(Beta(*map(kind, posterior))), solve(posterior))
  known = [True, True, True, False, True, True]
  for kind in (list, jnp.array):
    np.testing.assert_array_equal(solve(Window(kind(rate), kind(known))), solve(window(rate, known)))
  np.testing.assert_array_equal(solve([False, True, True], total_budget=np.int64(9)), [3, 3, 3])


def test_success_rates_are_not_changed():
  p_M, kept_M = np.array([0.1, 0.5, 1]), np.array([0.1, 0.5, 1])
  budgets(p_M, 20)
  budgets(window(p_M), 20)
  budgets(p_M, 20, cost_M=np.ones(3))
  np.testing.assert_array_equal(p_M, kept_M)


@solvers
def test_unsure_tasks_are_worth_more_than_hopeless_ones(solver):
  budget_M = budgets(beta((0.5, 0.5), (0.5, 200), (200, 0.5)), 24, solver=solver)
  assert budget_M[0] > max(budget_M[1:])


# A value of one's own.


@given(problem=problems(), power=st.floats(0.1, 1))
@few(max_examples=40)
def test_a_users_concave_value_is_solved_by_both(problem, power):
  success_rate, (num_tasks, total, low, high) = problem
  value = lambda budget, p: (budget - 1) ** power * p * (1 - p)
  value_MJ = table(success_rate, low, high, value)
  best = brute_force(value_MJ, vectors(num_tasks, low, high, total), low)
  for solver in knobs.Alloc.choices('solver'):
    budget_M = budgets(success_rate, total, low=low, high=high, value=value, solver=solver)
    feasible(budget_M, num_tasks, total, low, high)
    assert worth(value_MJ, budget_M, low) >= best * (1 - 1e-6) - rounding(value_MJ, total)


JAGGED = {
    'from four on': lambda budget, p: (budget >= 4) * p * (1 - p),
    'convex': lambda budget, p: budget ** 2 * p * (1 - p),
    'a loss': lambda budget, p: -(budget - 3) ** 2 * p,
    'wave': lambda budget, p: np.sin(5 * budget * p) * p,
}


@pytest.mark.parametrize('value', JAGGED.values(), ids=JAGGED)
@given(problem=problems())
@few(max_examples=40)
def test_a_users_value_in_any_form_is_solved_by_the_dp(value, problem):
  success_rate, (num_tasks, total, low, high) = problem
  budget_M = budgets(success_rate, total, low=low, high=high, value=value)
  feasible(budget_M, num_tasks, total, low, high)
  value_MJ = table(success_rate, low, high, value)
  best = brute_force(value_MJ, vectors(num_tasks, low, high, total), low)
  # A gain, up to twice the reach of the sums, is rounded to half a unit of 2^-29 of it.
  assert worth(value_MJ, budget_M, low) >= best - 2 * rounding(value_MJ, total)


def test_a_users_jagged_value_by_hand():
  """Four rollouts or nothing: two tasks can have them, .2 goes without."""
  np.testing.assert_array_equal(
      budgets([0.3, 0.2, 0.5], 9, low=1, high=4, value=JAGGED['from four on']), [4, 1, 4])


@pytest.mark.parametrize('name', ['from four on', 'convex', 'wave'])
def test_greedy_refuses_gains_that_rise(name):
  with pytest.raises(ValueError, match=r"solver='greedy' needs .*never rise.*solver='dp'"):
    budgets([0.5, 0.2], 9, low=1, high=9, value=JAGGED[name], solver='greedy')


@solvers
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(solver, bad):
  value = lambda budget, p: np.where((budget == 5) & (p > 0.4), bad, budget * 0.0 + p)
  with pytest.raises(ValueError, match=f'5 rollouts of task 1 is {bad}; .*finite'):
    budgets([0.2, 0.5, 0.6], 12, low=2, high=9, value=value, solver=solver)
  with pytest.raises(ValueError, match=f'5 rollouts of task 1 is {bad}; .*finite'):
    budgets([0.2, 0.5, 0.6], 12, low=2, high=9, value=value, cost_M=np.ones(3))


# Costs.

# Tasks, low, high, capacity.
COST_SHAPES = ((1, 2, 7, 11), (2, 1, 6, 17), (2, 2, 2, 12), (3, 1, 5, 12), (3, 2, 6, 40))


@st.composite
def cost_problems(draw, whole: bool):
  num_tasks, low, high, capacity = draw(st.sampled_from(COST_SHAPES))
  most = capacity / (low * num_tasks)
  costs = st.integers(1, int(most)) if whole else st.floats(1e-3, most * (1 - 1e-12))
  cost = draw(st.lists(costs, min_size=num_tasks, max_size=num_tasks))
  return draw(success_rates(num_tasks)), cost, low, high, capacity


def test_budgets_with_costs_by_hand():
  # The third of 1/4 adds .0264 for 2, that of 1/2 .03125 for 3: more value, if less for the cost.
  np.testing.assert_array_equal(budgets([0.25, 0.5], 13, low=2, cost_M=[2, 3]), [2, 3])
  np.testing.assert_array_equal(budgets([0.25, 0.5], 12, low=2, cost_M=[2, 3]), [3, 2])
  np.testing.assert_array_equal(budgets([0.25, 0.5], 15, low=2, cost_M=[2, 3]), [3, 3])
  # Six more: .0547 for three of the first, .0469 for two of the second, .0625 for one of each.
  np.testing.assert_array_equal(budgets([0.5, 0.5], 16, low=2, cost_M=[2, 3]), [3, 3])
  # Where nothing can be gained nothing is spent; where there is plenty, all that adds is.
  np.testing.assert_array_equal(budgets([0, 1], 90, low=2, cost_M=[2, 3]), [2, 2])
  np.testing.assert_array_equal(budgets([0.2, 0.3], 90, low=2, high=8, cost_M=[2, 3]), [8, 8])
  assert budgets([0.2, 0.3], 90, low=2, high=8, cost_M=[2, 3]).dtype == np.int32


@values
@given(problem=cost_problems(whole=True))
@few(max_examples=60)
def test_budgets_with_whole_costs_have_the_best_objective_of_all(value, problem):
  success_rate, cost, low, high, capacity = problem
  budget_M = budgets(success_rate, capacity, low=low, high=high, value=value, cost_M=cost)
  value_MJ = table(success_rate, low, high, value)
  within_capacity(budget_M, cost, capacity, low, high, value_MJ)
  vector_VM = vectors(len(cost), low, high)
  best = brute_force(value_MJ, vector_VM[vector_VM @ np.array(cost) <= capacity], low)
  assert worth(value_MJ, budget_M, low) >= best - rounding(value_MJ, capacity)


@values
@given(problem=cost_problems(whole=False))
@few(max_examples=60)
def test_budgets_with_any_costs_are_as_good_as_with_costs_rounded_up(value, problem):
  success_rate, cost, low, high, capacity = problem
  budget_M = budgets(success_rate, capacity, low=low, high=high, value=value, cost_M=cost)
  value_MJ = table(success_rate, low, high, value)
  within_capacity(budget_M, cost, capacity, low, high, value_MJ)
  unit = capacity / 2 ** 14
  vector_VM = vectors(len(cost), low, high)
  more_V = (vector_VM - low) @ (np.ceil(np.array(cost) / unit) * unit)
  allowed_V = low * np.sum(cost) + more_V <= capacity - unit
  best = brute_force(value_MJ, vector_VM[allowed_V], low) if allowed_V.any() else 0.0
  assert worth(value_MJ, budget_M, low) >= best - rounding(value_MJ, 64)


@given(success_rate=success_rates(4), cost=st.sampled_from((1, 3, 0.7, 1e-3, 1e6, 0.1, 1 / 3)))
@few(max_examples=60)
def test_equal_costs_have_the_objective_of_no_costs(success_rate, cost):
  budget_M = budgets(success_rate, cost * 23 * (1 + 1e-12), low=2, high=9, cost_M=np.full(4, cost))
  free_M = budgets(success_rate, 23, low=2, high=9)
  assert budget_M.sum() <= 23
  value_MJ = table(success_rate, 2, 9)
  assert worth(value_MJ, budget_M, 2) == pytest.approx(worth(value_MJ, free_M, 2), rel=1e-6,
                                                       abs=1e-12 * value_MJ.max() + 1e-30)


def test_all_get_the_bound_where_everything_can_be_paid():
  p_M, cost_M = np.array([0.1, 0.2, 0.3, 0.8]), np.array([1, 2.5, 1000, 3])
  for capacity in (1e6, 1e9, 1e15, 1e300, 2 ** 31, 16 * cost_M.sum()):
    np.testing.assert_array_equal(budgets(p_M, capacity, low=1, high=16, cost_M=cost_M),
                                  np.full(4, 16))
  np.testing.assert_array_equal(budgets(p_M, 16 * 10, low=1, high=16, cost_M=[1, 2, 3, 4]),
                                np.full(4, 16))


def test_the_floors_can_be_all_that_can_be_paid():
  for cost_M in (np.array([1, 2, 3]), np.array([0.3, 0.1, 0.7]), np.array([1e-3, 1.0, 1e3])):
    for low in (1, 2, 7):
      np.testing.assert_array_equal(
          budgets([0.5, 0.2, 0.9], low * cost_M.sum(), low=low, high=9, cost_M=cost_M), [low] * 3)
      np.testing.assert_array_equal(
          budgets([0.5, 0.2, 0.9], 1e3 * cost_M.sum(), low=low, high=low, cost_M=cost_M), [low] * 3)


def test_cheap_tasks_get_more():
  budget_M = budgets([0.3, 0.3, 0.3], 60, low=2, high=20, cost_M=[1, 2, 4])
  assert budget_M[0] > budget_M[1] > budget_M[2]


@pytest.mark.parametrize('capacity', [90, 90.5, 16384, 16384.5, 20000])
def test_whole_costs_of_any_capacity_stay_within_it(capacity):
  rng = np.random.default_rng(0)
  for _ in range(5):
    p_M, cost_M = rng.uniform(size=8), rng.integers(1, max(2, int(capacity) // 64), 8)
    budget_M = budgets(p_M, capacity, low=1, high=40, cost_M=cost_M)
    within_capacity(budget_M, cost_M, capacity, 1, 40, table(p_M, 1, 40))


def test_uniform_budgets_with_costs():
  uniform = functools.partial(budgets, [0.5, 0.1, 1], rule='uniform', low=1, high=20)
  np.testing.assert_array_equal(uniform(10, cost_M=[3, 1, 1]), [2, 2, 2])
  np.testing.assert_array_equal(uniform(12, cost_M=[3, 1, 1]), [2, 3, 3])
  np.testing.assert_array_equal(uniform(1000, cost_M=[3, 1, 1]), [20, 20, 20])
  np.testing.assert_array_equal(uniform(5, cost_M=[3, 1, 1]), [1, 1, 1])
  assert uniform(10, cost_M=[3, 1, 1]).dtype == np.int32


@given(cost=st.lists(st.floats(0.01, 100) | st.integers(1, 9), min_size=1, max_size=6),
       times=st.floats(1, 12))
@few(max_examples=100)
def test_uniform_budgets_with_costs_differ_by_one_at_most(cost, times):
  capacity = 2 * np.sum(cost) * times * (1 + 1e-12)
  budget_M = budgets(np.full(len(cost), 0.5), capacity, rule='uniform', low=2, high=15, cost_M=cost)
  assert budget_M.min() >= 2 and budget_M.max() <= 15
  assert budget_M @ np.array(cost, float) <= capacity
  assert np.ptp(budget_M) <= 1


@pytest.mark.parametrize('cost, capacity, match', [
    ([1, 0.0], 90, r'cost_M\[1\]=0\.0 .*positive'),
    ([-2, 1.0], 90, r'cost_M\[0\]=-2\.0 .*positive'),
    ([1, float('nan')], 90, r'cost_M\[1\]=nan .*positive'),
    ([float('inf'), 1], 90, r'cost_M\[0\]=inf .*positive'),
    ([1.0], 90, r'each of 2 tasks.*\(1,\)'),
    ([1.0, 1, 1], 90, r'each of 2 tasks.*\(3,\)'),
    (1.0, 90, r'each of 2 tasks.*\(\)'),
    ([[1.0, 1]], 90, r'each of 2 tasks.*\(1, 2\)'),
    ([1, 2], 5, r'capacity of 5 .* 2 rollouts of each of 2 tasks, .*cost 6'),
    ([1, 2], -1, r'capacity of -1 '),
    ([1, 2], float('nan'), 'capacity of nan '),
    ([1, 2], float('inf'), 'capacity of inf '),
])
@pytest.mark.parametrize('rule', knobs.Alloc.choices('rule'))
def test_bad_costs_are_named(cost, capacity, match, rule):
  with pytest.raises(ValueError, match=match):
    budgets([0.5, 0.2], capacity, low=2, high=9, rule=rule, cost_M=cost)


def test_greedy_takes_no_costs():
  with pytest.raises(ValueError, match="solver='greedy' .*equal costs.*solver='dp'"):
    budgets([0.5, 0.2], 90, solver='greedy', cost_M=[1, 2])


def test_windows_take_no_costs():
  with pytest.raises(ValueError, match="costs.*posteriors.*alloc.cost='rollouts'"):
    budgets(window([0.5, 0.2]), 90, cost_M=[1, 2])


@pytest.mark.parametrize('low, high, match', [(0, 8, r'alloc\.low=0 '), (5, 4, r'alloc\.high=4 ')])
def test_bad_bounds_with_costs_are_named(low, high, match):
  with pytest.raises(ValueError, match=match):
    budgets([0.5, 0.2], 90, low=low, high=high, cost_M=[1, 2])


# The paper's rule.


def window_by_loops(rate_M, known_M, total: int, low: int, high: int) -> np.ndarray:
  """A rollout at a time, where the rule gives it."""
  M = len(rate_M)
  between = [m for m in range(M) if known_M[m] and 0 < rate_M[m] < 1]
  budget_M = np.array([low if known_M[m] else total // M for m in range(M)])
  surplus = total - budget_M.sum()
  need = sum(int(min(np.log(0.1) / np.log(max(p, 1 - p)), high)) for p in rate_M[between])
  shared = min(surplus, need, len(between) * (high - low))
  groups = ([m for m in range(M) if known_M[m] and rate_M[m] == 0],
            [m for m in range(M) if known_M[m] and rate_M[m] == 1],
            [m for m in range(M) if not known_M[m]])
  for _ in range(surplus - shared):
    for group in groups:
      if room := [m for m in group if budget_M[m] < high]:
        budget_M[min(room, key=lambda m: (budget_M[m], -m))] += 1
        break
    else:
      shared += 1
  if between:
    gain_MG = np.diff(table(rate_M[between], low, high), axis=1)
    budget_M[between] = low + one_at_a_time(gain_MG, shared)
  return budget_M


@solvers
@pytest.mark.parametrize('rate, known, total, high, expected', [
    # Not known: 32 / 4. Solved: the floor. 1/2 needs int(ln .1 / ln .5) = 3 more. 0 gets the rest.
    ([0.5, 1, 0, 0.3], [1, 1, 1, 0], 32, 128, [5, 2, 17, 8]),
    ([0.5, 0, 0], [1, 1, 1], 24, 128, [5, 9, 10]),  # in equal parts
    ([0, 1, 1, 0.5], [1, 1, 1, 1], 40, 16, [16, 9, 10, 5]),  # beyond the bound: to those at 1
    ([0, 1, 0.5, 0.9], [1, 1, 1, 0], 31, 8, [8, 8, 7, 8]),  # to those not known, to those between
    ([0, 1, 0.5, 0.9], [1, 1, 1, 0], 32, 8, [8, 8, 8, 8]),
    ([0.5, 0, 1], [1, 1, 1], 6, 128, [2, 2, 2]),  # the floors alone
    ([0.5, 0, 1], [1, 1, 1], 9, 128, [5, 2, 2]),  # what is needed, and nothing more
    ([0.5, 0, 1], [1, 1, 1], 10, 128, [5, 3, 2]),
    ([0.5, 0.2, 0.9, 0], [0, 0, 0, 0], 32, 128, [8, 8, 8, 8]),  # none known
    ([0.5, 0.2, 0.9, 0], [0, 0, 0, 0], 35, 128, [8, 9, 9, 9]),
    ([0, 0, 1], [1, 1, 1], 24, 128, [11, 11, 2]),  # none between
    ([1, 1, 1, 1], [1, 1, 1, 1], 34, 128, [8, 8, 9, 9]),
    ([0, 0, 0, 0], [1, 1, 1, 1], 34, 128, [8, 8, 9, 9]),
    ([0.5], [1], 20, 128, [20]),
    ([float('nan'), 0.5], [0, 1], 20, 128, [15, 5]),  # unknown: any number
    ([7.0, 0.5], [0, 1], 20, 128, [15, 5]),
])
def test_the_papers_rule_by_hand(solver, rate, known, total, high, expected):
  np.testing.assert_array_equal(
      budgets(window(rate, np.array(known, bool)), total, low=2, high=high, solver=solver), expected)


@solvers
def test_the_papers_rule_is_the_knapsack_where_mixed_tasks_need_more_than_there_is(solver):
  """.02 alone needs 113."""
  rate = [0.02, 0, 0.3, 1, 0.6]
  budget_M = budgets(window(rate), 40, solver=solver)
  np.testing.assert_array_equal(budget_M[[1, 3]], [2, 2])
  np.testing.assert_array_equal(budget_M[[0, 2, 4]], budgets([0.02, 0.3, 0.6], 36, solver=solver))
  mixed = [0.02, 0.3, 0.6, 0.9]
  np.testing.assert_array_equal(budgets(window(mixed), 40, solver=solver),
                                budgets(mixed, 40, solver=solver))


@solvers
def test_the_papers_rule_keeps_to_the_bound_where_the_authors_code_does_not(solver):
  """One hopeless task among 255 solved ones: their code gives it 1538 of 2048."""
  budget_M = budgets(window([0] + [1] * 255), 2048, solver=solver)
  np.testing.assert_array_equal(budget_M, [128] + [7] * 120 + [8] * 135)


FAULTS = {
    'all 1/2': np.full(256, 0.5),
    'all 1/3': np.full(256, 1 / 3),
    'easy': np.random.default_rng(0).uniform(0.2, 0.8, 256),
    'all 0': np.zeros(256),
    'all 1': np.ones(256),
    'all 0 or 1': np.arange(256) % 2.0,
    'alone': np.array([0.5]),
    'alone and hopeless': np.array([0.0]),
    **{f'sixteen {seed}': np.random.default_rng(seed).integers(0, 9, 16) / 8 for seed in range(20)},
}


@solvers
@pytest.mark.parametrize('rate', FAULTS.values(), ids=FAULTS)
def test_what_the_authors_code_stops_at_is_allocated(solver, rate):
  """Their code asserts that it spent the total; here all of it is spent within the bounds."""
  M = len(rate)
  for success_rate in (rate, window(rate), window(rate, np.arange(M) % 3 > 0)):
    for total in (8 * M, 2 * M, 2 * M + 1, 128 * M):
      feasible(budgets(success_rate, total, solver='greedy'), M, total, 2, 128)
    if not isinstance(success_rate, Window) or M < 256:
      feasible(budgets(success_rate, 8 * M, solver=solver), M, 8 * M, 2, 128)


@given(rate=st.lists(st.integers(0, 16).map(lambda k: k / 16), min_size=6, max_size=6),
       known=st.lists(st.sampled_from((True, True, False)), min_size=6, max_size=6),
       total=st.integers(12, 96), high=st.sampled_from((9, 16)))
@few(max_examples=150)
def test_the_papers_rule_is_that_of_the_loops(rate, known, total, high):
  total = min(total, 6 * high)
  success_rate = window(rate, known)
  budget_M = budgets(success_rate, total, low=2, high=high, solver='greedy')
  feasible(budget_M, 6, total, 2, high)
  np.testing.assert_array_equal(budget_M, window_by_loops(*success_rate, total, 2, high))


@pytest.mark.parametrize('p', [1e-17, 5e-324, 1 - 1e-16, 1e-9])
def test_the_papers_rule_of_rates_next_to_its_special_cases(p):
  """So near 0 that 1 - p is 1, a task needs what it can get."""
  np.testing.assert_array_equal(budgets(window([p, 1]), 33, low=2, high=31), [31, 2])
  np.testing.assert_array_equal(budgets(window([p, 0, 1]), 33, low=2, high=128), [29, 2, 2])


# All sorts of calls.


def draw_rate(rng: np.random.Generator, M: int) -> np.ndarray:
  """Success rates of some kind, chosen with equal chances."""
  kind = rng.integers(11)
  if kind == 0:
    return np.full(M, rng.choice([0.5, 1 / 3, 0, 1, rng.uniform()]))
  if kind == 1:
    return rng.uniform(0.2, 0.8, M)
  if kind == 2:
    return 10 ** rng.uniform(-13, -11, M)
  if kind == 3:
    return rng.choice([5e-324, 1e-320, 1e-310, 2e-308, 1e-160, 1e-17], M)
  if kind == 4:
    return rng.choice([1 - 1e-16, 1 - 1e-15, 1 - 1e-9, 1.0], M)
  if kind == 5:
    return rng.choice([0.0, 1.0], M)
  if kind == 6:
    return rng.choice([0, 1, rng.uniform()], M)
  if kind == 7:
    return rng.beta(*10 ** rng.uniform(-1, 1, 2), M)
  if kind == 8:
    return rng.integers(0, 9, M) / 8
  if kind == 9:
    return 10 ** rng.uniform(-320, 0, M)
  return np.where(rng.uniform(size=M) < 0.5, rng.uniform(size=M), rng.choice([0, 1, 1e-12, 0.5], M))


def draw_posterior(rng: np.random.Generator, M: int) -> Beta:
  kind = rng.integers(4)
  if kind == 0:  # of counts of eight and a prior
    hits_M = rng.binomial(8, draw_rate(rng, M))
    return Beta(hits_M + 0.3, 8 - hits_M + 0.7)
  if kind == 1:  # equal
    return Beta(*np.broadcast_to(10 ** rng.uniform(-2, 3, (2, 1)), (2, M)))
  return Beta(*10 ** rng.uniform(*((-2, 3) if kind == 2 else (-8, 8)), (2, M)))


def draw_value(rng: np.random.Generator) -> dict:
  return {'value': rng.choice(list(value_lib.VALUES)), 'nu': 10 ** rng.uniform(-1.3, 2.3)}


# Tasks, rollouts above the floors, candidates above the floor; each compiles.
DP_SHAPES = ((1, 1, 1), (1, 33, 126), (2, 5, 4), (3, 0, 7), (3, 20, 7), (5, 30, 8), (8, 8, 1),
             (8, 48, 126), (16, 96, 126), (16, 2016, 126), (64, 384, 30), (256, 1536, 126))


def call_with_a_total(rng: np.random.Generator):
  """A random call of either solver has the optimum of points or posteriors."""
  low = int(rng.integers(1, 5))
  if rng.uniform() < 0.5:
    M, units, G = DP_SHAPES[rng.integers(len(DP_SHAPES) - 2 * (rng.uniform() < 0.95))]
    solver = 'dp'
  else:
    M = int(rng.choice((1, 2, 3, 5, 16) if rng.uniform() < 0.95 else (64, 256)))
    G, solver = int(rng.choice((0, 1, 7, 126))), 'greedy'
    units = int(rng.choice((0, M * G, rng.integers(M * G + 1), min(6 * M, M * G))))
  success_rate = draw_posterior(rng, M) if rng.uniform() < 0.4 else draw_rate(rng, M)
  total, high, value = low * M + units, low + G, draw_value(rng)
  budget_M = budgets(success_rate, total, low=low, high=high, solver=solver, **value)
  feasible(budget_M, M, total, low, high)
  value_MJ = table(success_rate, low, high, **value)
  best = largest_gains(value_MJ, units)
  # A float32 below its smallest normal number may count as 0.
  loss = 1e-7 * best + units * 2e-38 if solver == 'greedy' else 0.0
  assert worth(value_MJ, budget_M, low) >= best * (1 - 1e-12) - rounding(value_MJ, units) - loss


def call_with_a_window(rng: np.random.Generator):
  """A random call spends the total within the bounds, on each group before the next."""
  low, G = int(rng.integers(1, 5)), int(rng.choice((0, 3, 30, 126)))
  M = int(rng.choice((1, 2, 3, 7, 16)))
  high = low + G
  total = int(rng.choice((low * M, high * M, rng.integers(low * M, high * M + 1),
                          min(8 * M, high * M) if high >= 8 else low * M)))
  rate_M = draw_rate(rng, M)
  rate_M = np.where(rng.uniform(size=M) < 0.3, rng.choice([0.0, 1.0], M), rate_M)
  known_M = rng.uniform(size=M) < rng.choice([0, 0.5, 0.9, 1])
  rate_M[~known_M & (rng.uniform(size=M) < 0.2)] = np.nan
  budget_M = budgets(Window(rate_M, known_M), total, low=low, high=high, solver='greedy',
                     **draw_value(rng))
  feasible(budget_M, M, total, low, high)
  even = np.clip(total // M, low, high)
  zero_M, one_M = known_M & (rate_M == 0), known_M & (rate_M == 1)
  assert np.all(budget_M[~known_M] >= even)
  if np.any(budget_M[one_M] > low):
    assert np.all(budget_M[zero_M] == high)
  if np.any(budget_M[~known_M] > even):
    assert np.all(budget_M[zero_M | one_M] == high)


COST_CALLS = ((1, 126, 60), (3, 7, 50), (8, 30, 400), (16, 126, 1000))  # tasks, G, capacity


def call_with_costs(rng: np.random.Generator):
  """A random call is affordable, and leaves out nothing that is and adds value."""
  M, G, capacity = COST_CALLS[rng.integers(len(COST_CALLS))]
  low = 1
  success_rate = draw_posterior(rng, M) if rng.uniform() < 0.4 else draw_rate(rng, M)
  kind = rng.integers(5)
  if kind < 2:
    cost_M = rng.integers(1, capacity // M + 1, M)
  else:
    low = int(rng.integers(1, 4))
    cost_M = (10 ** rng.uniform(-6, 6, M), np.full(M, rng.choice([0.1, 0.7, 1 / 3])),
              rng.uniform(1, 2, M))[kind - 2]
    capacity = low * cost_M.sum() * rng.choice([1, 1 + 1e-15, rng.uniform(1, 20), 1e4])
    if rng.uniform() < 0.3:  # what some budgets cost exactly
      capacity = max(capacity, float(rng.integers(low, low + G + 1, M) @ cost_M))
  value = draw_value(rng)
  budget_M = budgets(success_rate, capacity, low=low, high=low + G, cost_M=cost_M, **value)
  within_capacity(budget_M, cost_M, capacity, low, low + G,
                  table(success_rate, low, low + G, **value))


@pytest.mark.parametrize('calls', [60, pytest.param(3_000, marks=slow)])
def test_all_sorts_of_calls(calls):
  """Random and adversarial; a failure says which call of the generator it is."""
  for i in range(calls):
    rng = np.random.default_rng(i)
    call = rng.choice([call_with_a_total, call_with_a_window, call_with_costs], p=[0.7, 0.15, 0.15])
    try:
      call(rng)
    except Exception as e:
      e.add_note(f'call {i}: {call.__name__}')
      raise


# Bad input.


@pytest.mark.parametrize('success_rate, match', [
    ([0.5, float('nan')], r'\[0, 1\].*\(1, nan\)'),
    ([1.01, 0.5], r'\(0, 1\.01\)'),
    ([0.5, 0.5, -1e-9], r'\(2, -1e-09\)'),
    ([float('inf')], r'\(0, inf\)'),
    (0.5, r'vector.*\(\)'),
    ([[0.5, 0.5]], r'vector.*\(1, 2\)'),
    (Beta(np.array([1, 0.0]), np.ones(2)), 'positive.*0\\.'),
    (Beta(np.ones(2), np.array([1, float('nan')])), 'finite.*nan'),
    (Beta(np.ones(1), np.array([float('inf')])), 'finite.*inf'),
    (Beta(np.ones((1, 2)), np.ones((1, 2))), 'vectors'),
    (Beta(np.ones(1), np.ones(3)), 'posterior'),
    (window([0.5, float('nan')]), r'\(1, nan\)'),
    (window([0.5, 2.0]), r'\(1, 2\.0\)'),
])
@pytest.mark.parametrize('rule', knobs.Alloc.choices('rule'))
def test_bad_success_rates_are_named(success_rate, match, rule):
  with pytest.raises(ValueError, match=match):
    budgets(success_rate, 8, low=1, rule=rule)
  if not isinstance(success_rate, Window):
    with pytest.raises(ValueError, match=match):
      budgets(success_rate, 8, low=1, rule=rule, cost_M=np.ones(2))


@pytest.mark.parametrize('known', [[True], [True, False], True])
def test_windows_of_two_lengths_are_refused(known):
  with pytest.raises(ValueError):
    budgets(Window(np.array([0.5, 0, 1]), np.array(known)), 12)


@pytest.mark.parametrize('num_tasks, total, low, high, rule, match', [
    (2, 8, 2, 8, 'homogeneous', r"alloc\.rule='homogeneous'.*'uniform', 'knapsack'"),
    (0, 8, 2, 8, 'knapsack', 'no tasks'),
    (2, 8, 0, 8, 'knapsack', r'alloc\.low=0 .*1'),
    (2, 8, 5, 4, 'knapsack', r'alloc\.high=4 .*alloc\.low=5'),
    (2, 3, 2, 8, 'knapsack', r'^3 rollouts.* 2 tasks at 2\.\.8 .*in 4\.\.16'),
    (2, 17, 2, 8, 'knapsack', r'^17 rollouts.* 2 tasks at 2\.\.8 .*in 4\.\.16'),
    (2, 17, 2, 8, 'uniform', r'^17 rollouts.*in 4\.\.16'),
])
def test_bad_totals_are_named(num_tasks, total, low, high, rule, match):
  with pytest.raises(ValueError, match=match):
    allocate.check(num_tasks, total, low, high, rule)
  rate_M = np.full(num_tasks, 0.5)
  for success_rate in (rate_M, Beta(rate_M, rate_M), window(rate_M)):
    for solver in knobs.Alloc.choices('solver'):
      with pytest.raises(ValueError, match=match):
        budgets(success_rate, total, low=low, high=high, rule=rule, solver=solver)


def test_totals_within_reach_pass():
  for total in (4, 9, 16):
    allocate.check(2, total, 2, 8, 'knapsack')


@pytest.mark.parametrize('total', [8.0, 8.5, '8', None, float('nan')])
@pytest.mark.parametrize('rule', knobs.Alloc.choices('rule'))
def test_a_total_that_is_no_integer(total, rule):
  with pytest.raises(TypeError):
    budgets([0.5, 0.2], total, rule=rule)


@pytest.mark.parametrize('named, match', [
    ({'value': 'info_gain'}, r"alloc\.value='info_gain' .*'infogain', 'variance', 'snr'"),
    ({'nu': 0.0}, r'alloc\.nu=0\.0 .*positive'),
    ({'nu': float('nan')}, r'alloc\.nu=nan .*positive'),
    ({'solver': 'ilp'}, r"alloc\.solver='ilp' .*'dp', 'greedy'"),
])
@pytest.mark.parametrize('rule', knobs.Alloc.choices('rule'))
def test_bad_names_are_named(named, match, rule):
  for cost_M in (None, [1, 2]):
    with pytest.raises(ValueError, match=match):
      budgets([0.5, 0.2], 30, rule=rule, cost_M=cost_M, **named)


# One program for all steps.


def compiled() -> int:
  return sum(f._cache_size() for f in (knapsack, allocate.greedy, allocate._even, allocate._fill))


@values
@solvers
def test_one_compilation_serves_every_allocation(solver, value):
  rng = np.random.default_rng(3)
  solve = functools.partial(budgets, low=2, high=17, solver=solver, value=value)
  solve(rng.uniform(size=9), 47)
  before = compiled()
  for _ in range(3):
    solve(rng.uniform(size=9), 47)
    solve(Beta(*rng.uniform(0.1, 9, (2, 9))), 47)
    solve(rng.uniform(size=9), 47, nu=rng.uniform(1, 9))
  solve(np.zeros(9), 47)
  assert compiled() == before


def test_the_count_of_compilations_counts():
  budgets(np.full(9, 0.3), 46, low=2, high=17)
  before = compiled()
  budgets(np.full(9, 0.3), 49, low=2, high=17)
  assert compiled() > before


def test_one_compilation_of_greedy_serves_every_total():
  rng = np.random.default_rng(3)
  solve = functools.partial(budgets, low=2, high=17, solver='greedy')
  solve(rng.uniform(size=9), 47)
  before = compiled()
  for total in (18, 19, 60, 152, 153, np.int64(77)):
    solve(rng.uniform(size=9), total)
  assert compiled() == before


@pytest.mark.parametrize('draw', [lambda rng: rng.integers(1, 9, 9), lambda rng: rng.uniform(1, 9, 9)])
def test_one_compilation_serves_every_cost(draw):
  rng = np.random.default_rng(3)
  solve = functools.partial(budgets, total_budget=200, low=2, high=17)
  solve(rng.uniform(size=9), cost_M=draw(rng))
  before = compiled()
  for _ in range(3):
    solve(rng.uniform(size=9), cost_M=draw(rng))
    solve(Beta(*rng.uniform(0.1, 9, (2, 9))), cost_M=draw(rng))
  assert compiled() == before


@solvers
def test_one_compilation_serves_every_window(solver):
  rng = np.random.default_rng(3)
  draw = lambda: window(rng.integers(0, 9, 9) / 8, rng.uniform(size=9) < 0.8)
  solve = functools.partial(budgets, total_budget=47, low=2, high=17, solver=solver)
  for _ in range(2):
    solve(draw())
  before = compiled()
  for _ in range(10):
    solve(draw())
  assert compiled() == before


@slow
@solvers
def test_budgets_with_and_without_jit(solver):
  rng = np.random.default_rng(4)
  p_M, cost_M = rng.uniform(size=5), rng.integers(1, 5, 5)
  calls = (lambda: budgets(p_M, 20, low=1, high=8, solver=solver),
           lambda: budgets(window(np.round(p_M)), 20, low=1, high=8, solver=solver),
           lambda: budgets(p_M, 40, low=1, high=8, cost_M=cost_M))
  for call in calls:
    compiled_M = call()
    with jax.disable_jit():
      np.testing.assert_array_equal(call(), compiled_M)


# The largest gains.


@st.composite
def gain_tables(draw, elements, sizes=((1, 1), (1, 6), (3, 4), (5, 3))):
  """Rows that never rise, of few different numbers, and some units."""
  M, G = draw(st.sampled_from(sizes))
  rows = st.lists(elements, min_size=G, max_size=G).map(lambda x: sorted(x, reverse=True))
  gain_MG = draw(st.lists(rows, min_size=M, max_size=M))
  return gain_MG, draw(st.sampled_from((0, M * G)) | st.integers(0, M * G))


floats = st.floats(-2.0 ** 100, 2.0 ** 100, width=32, allow_subnormal=False)
few_floats = st.sampled_from((-2.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 1.5))


@given(problem=gain_tables(floats | few_floats) | gain_tables(few_floats))
@few(max_examples=300)
def test_greedy_is_a_unit_at_a_time(problem):
  gain_MG, units = problem
  unit_M = allocate.greedy(np.array(gain_MG, np.float32), units)
  assert unit_M.dtype == np.int32
  np.testing.assert_array_equal(unit_M, one_at_a_time(gain_MG, units))


def test_greedy_by_hand():
  gain_MG = np.array([[5, 3, 1], [4, 3, 3], [3, 0, -1]], np.float32)
  for units, unit_M in ((0, [0, 0, 0]), (1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1]),
                        (4, [1, 2, 1]), (5, [2, 2, 1]), (6, [2, 3, 1]), (7, [3, 3, 1]),
                        (8, [3, 3, 2]), (9, [3, 3, 3])):
    np.testing.assert_array_equal(allocate.greedy(gain_MG, units), unit_M)


def test_greedy_takes_both_zeros_for_one():
  gain_MG = np.array([[0.0, -0.0], [-0.0, -0.0], [0.0, 0.0]], np.float32)
  for units in range(7):
    k, more = divmod(units, 3)
    np.testing.assert_array_equal(allocate.greedy(gain_MG, units), [k + (3 - m <= more) for m in range(3)])


@given(problem=gain_tables(st.integers(-3, 3) | st.integers(-2 ** 28, 2 ** 28)))
@few(max_examples=300)
def test_even_moves_an_optimum_to_that_of_the_greedy_choice(problem):
  """From the least even optimum, which takes the whole of equal gains from the first tasks."""
  gain_MG, units = problem
  order = sorted((-gain, m) for m, gain_G in enumerate(gain_MG) for gain in gain_G)
  uneven_M = np.bincount([m for _, m in order[:units]], minlength=len(gain_MG)).astype(np.int32)
  even_M = allocate._even(np.array(gain_MG, np.int32), uneven_M)
  assert even_M.dtype == np.int32
  np.testing.assert_array_equal(even_M, one_at_a_time(gain_MG, units))


@given(bounds=st.sampled_from((1, 4, 7)).flatmap(lambda M: st.lists(
           st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted), min_size=M, max_size=M)),
       share=rates)
@few(max_examples=300)
def test_fill_is_a_unit_at_a_time(bounds, share):
  least_M, most_M = np.array(bounds, np.int32).T
  units = round(int(least_M.sum()) + share * int((most_M - least_M).sum()))
  expected_M = least_M.copy()
  for _ in range(units - least_M.sum()):
    expected_M[min((m for m in range(len(bounds)) if expected_M[m] < most_M[m]),
                   key=lambda m: (expected_M[m], -m))] += 1
  unit_M = allocate._fill(least_M, most_M, units)
  assert unit_M.dtype == np.int32
  np.testing.assert_array_equal(unit_M, expected_M)


def test_fill_by_hand():
  fill = lambda *args: list(map(int, allocate._fill(*map(np.int32, args))))
  assert fill([0, 0, 0], [9, 9, 9], 7) == [2, 2, 3]
  assert fill([4, 0, 0], [9, 9, 1], 7) == [4, 2, 1]
  assert fill([4, 0, 0], [4, 0, 0], 4) == [4, 0, 0]
  assert fill([0, 0], [2 ** 29, 2 ** 30], 2 ** 30) == [2 ** 29, 2 ** 29]


# What a step's budgets are expected to give.


def test_objective_by_hand():
  assert allocate.objective(np.array([0.5, 0.25, 1]), np.array([3, 2, 9])) == pytest.approx(
      0.09375 + 0.052734375)
  assert allocate.objective(beta((1, 1), (1, 1)), np.array([2, 1])) == pytest.approx(1 / 30)
  assert allocate.objective([0.5, 0], [3, 9], 'snr') == pytest.approx(0.05)
  assert allocate.objective([0.5, 0], [3, 9], 'snr', 1.0) == pytest.approx(0.25 / 3)
  assert allocate.objective([0.5, 0.2], [2, 5], lambda n, p: n * p) == pytest.approx(2)
  assert isinstance(allocate.objective([0.5], [3]), float)


def test_expected_mixed_tasks_by_hand():
  assert allocate.expected_mixed_tasks([0.5, 0.25, 0], [2, 3, 9]) == pytest.approx(0.5 + 0.5625)
  assert allocate.expected_mixed_tasks(beta((1, 1), (1, 1)), [2, 3]) == pytest.approx(1 / 3 + 1 / 2)


def test_expected_gradient_ratio_by_hand():
  assert allocate.expected_gradient_ratio(np.array([0.5, 0.25, 0]), np.array([2, 3, 1])) == (
      pytest.approx((2 * 0.5 + 3 * 0.5625) / 6))
  assert allocate.expected_gradient_ratio(beta((1, 1), (1, 1)), np.array([2, 3])) == (
      pytest.approx((2 / 3 + 3 / 2) / 5))


def test_expectations_over_all_outcomes():
  p_M, budget_M = np.array([0.2, 0.5, 0.9]), np.array([3, 1, 4])
  task_R = np.repeat(np.arange(3), budget_M)
  ratio = mixed_tasks = 0.0
  for reward_R in itertools.product((0, 1), repeat=8):
    reward_R = np.array(reward_R)
    probability = np.prod(np.where(reward_R == 1, p_M[task_R], 1 - p_M[task_R]))
    mixed = [len(set(reward_R[task_R == task])) == 2 for task in range(3)]
    ratio += probability * np.mean(np.array(mixed)[task_R])
    mixed_tasks += probability * sum(mixed)
  assert allocate.expected_gradient_ratio(p_M, budget_M) == pytest.approx(ratio, rel=1e-12)
  assert allocate.expected_mixed_tasks(p_M, budget_M) == pytest.approx(mixed_tasks, rel=1e-12)


def test_the_examples_of_the_readme():
  readme = (pathlib.Path(__file__).parents[2] / 'README.md').read_text()
  blocks = '\n'.join(re.findall(r'```python\n(.*?)```', readme, re.DOTALL))
  runner = doctest.DocTestRunner()
  runner.run(doctest.DocTestParser().get_doctest(blocks, {}, 'README.md', None, None))
  tried = runner.summarize()
  assert tried.attempted >= 5 and not tried.failed
