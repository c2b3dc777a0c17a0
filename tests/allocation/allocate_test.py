"""Budgets maximise the summed value within what there is, and share evenly among equals."""

import functools
import itertools
import pathlib
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax import allocation
from kr_jax import knobs
from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.allocation import solve
from kr_jax.allocation import value as value_lib
from kr_jax.allocation.allocate import budgets
from kr_jax.allocation.value import Beta, Group, Window

ROOT = pathlib.Path(__file__).parents[2]
SOLVERS = knobs.Alloc.choices('solver')
solvers = pytest.mark.parametrize('solver', SOLVERS)
# Few shapes, since each compiles: tasks, rollouts, low, high.
SHAPES = ((2, 9, 1, 7), (3, 16, 1, 9), (4, 15, 2, 8))
CONCAVE = (*value_lib.VALUES, lambda budget, p: np.sqrt(budget - 1) * p * (1 - p))
JAGGED = {
    'from four on': lambda budget, p: (budget >= 4) * p * (1 - p),
    'convex': lambda budget, p: budget ** 2 * p * (1 - p),
    'a loss': lambda budget, p: -(budget - 3) ** 2 * p,
    'wave': lambda budget, p: np.sin(5 * budget * p) * p,
}


def window(rate, known=None) -> Window:
  return Window(np.array(rate, float), np.ones(len(rate), bool) if known is None else np.array(known, bool))


def table(success_rate, low: int, high: int, value='infogain', nu: float = 2.0) -> np.ndarray:
  return value_lib.expected(success_rate, np.arange(low, high + 1), value, nu)


def worth(value_MJ: np.ndarray, budget_M: np.ndarray, low: int) -> float:
  """The summed value of budgets."""
  return float(value_MJ[np.arange(len(value_MJ)), budget_M - low].sum())


@functools.cache
def vectors(num_tasks: int, low: int, high: int) -> np.ndarray:
  return np.array(list(itertools.product(range(low, high + 1), repeat=num_tasks)))


def brute_force(value_MJ: np.ndarray, low: int, high: int, allowed) -> float:
  """The largest summed value over all vectors of budgets that `allowed` says of."""
  vector_VM = vectors(len(value_MJ), low, high)
  value_V = value_MJ[np.arange(len(value_MJ)), vector_VM - low].sum(axis=1)
  return value_V[allowed(vector_VM)].max(initial=-np.inf)


def largest_gains(value_MJ: np.ndarray, units: int) -> float:
  """The optimum of concave values: the lower bounds, and the largest gains there are."""
  gain = np.diff(value_MJ, axis=1).ravel()
  return float(value_MJ[:, 0].sum() + np.partition(gain, len(gain) - units)[len(gain) - units:].sum())


def rounding(value_MJ: np.ndarray, units: int) -> float:
  """The most that rounding may cost the dp: half of 2^-29 of all values for a unit taken and one left."""
  largest = np.abs(value_MJ - value_MJ[:, :1]).max(axis=1).sum()
  return 2.2 * units * (largest / 2 ** 29 + 1e-13 * np.abs(value_MJ).max()) + 1e-30


def one_at_a_time(gain_MG, units: int) -> np.ndarray:
  """A unit at a time to the largest gain; of equals to the fewest units, then to the later task."""
  unit_M = np.zeros(len(gain_MG), int)
  for _ in range(units):
    unit_M[min((m for m in range(len(unit_M)) if unit_M[m] < len(gain_MG[m])),
               key=lambda m: (-gain_MG[m][unit_M[m]], unit_M[m], -m))] += 1
  return unit_M


def assert_feasible(budget_M: np.ndarray, num_tasks: int, total: int, low: int, high: int):
  assert isinstance(budget_M, np.ndarray)
  assert budget_M.shape == (num_tasks,) and budget_M.dtype == np.int32
  assert budget_M.sum() == total and budget_M.min() >= low and budget_M.max() <= high


def assert_nothing_left_out(budget_M, cost_M, capacity: float, low: int, high: int, value_MJ: np.ndarray):
  """Affordable, and no rollout is left out that fits and adds value."""
  cost_M, rows = np.asarray(cost_M, float), np.arange(len(budget_M))
  assert budget_M.shape == cost_M.shape and budget_M.dtype == np.int32
  assert budget_M.min() >= low and budget_M.max() <= high
  # The lower bounds may cost all there is, summed in another order.
  assert budget_M @ cost_M <= capacity or np.all(budget_M == low)
  more_M = np.minimum(budget_M + 1, high)
  gain_M = value_MJ[rows, more_M - low] - value_MJ[rows, budget_M - low]
  fits_M = np.array([np.where(rows == m, more_M, budget_M) @ cost_M <= capacity for m in rows])
  # Of values that are all below 0 the largest may be 0, and float64 sums them to 1e-16 of the least.
  assert not np.any(fits_M & (gain_M > max(1e-12 * np.abs(value_MJ).max(), np.finfo(float).tiny)))


rates, parameters = st.floats(0, 1), st.floats(0.05, 1000)


@st.composite
def success_rates(draw, num_tasks: int):
  """Numbers or posteriors, of tasks that may be equal."""
  lists = lambda x: st.lists(x, min_size=num_tasks, max_size=num_tasks)
  if draw(st.booleans()):
    some = st.sampled_from(draw(st.lists(rates, min_size=1, max_size=3)))
    return np.array(draw(lists(rates) | lists(some)))
  return Beta(*np.array(draw(lists(st.tuples(parameters, parameters)))).T)


@st.composite
def problems(draw, shapes=SHAPES):
  """Success rates, and what to share among them."""
  shape = draw(st.sampled_from(shapes))
  return draw(success_rates(shape[0])), shape


# The optimum of a total.


@solvers
def test_budgets_by_hand(solver):
  """Gains: .5 has 2^-N / 8, .05 has .00214 .00194 ..., .95 has .00011; the fifth goes to .05."""
  p_M = np.array([0.05, 0.5, 0.95])
  by = functools.partial(budgets, p_M, 12, solver=solver)
  np.testing.assert_array_equal(by(high=128), [3, 7, 2])
  np.testing.assert_array_equal(by(high=6), [4, 6, 2])
  # Gains of 'variance': .5 has .0625 .03125 .015625 .0078, .05 and .95 have .0023 each.
  np.testing.assert_array_equal(by(high=6, value='variance'), [3, 6, 3])
  # Without noise two rollouts are all it takes; with much of it they go to 1/2 alone.
  np.testing.assert_array_equal(by(high=9, low=1, value='snr', nu=1e-9), [4, 4, 4])
  np.testing.assert_array_equal(by(high=9, low=1, value='snr', nu=1e9), [1, 9, 2])
  np.testing.assert_array_equal(p_M, [0.05, 0.5, 0.95])  # as it was given


@given(problem=problems(), value=st.sampled_from(CONCAVE), nu=st.floats(0.05, 200))
def test_both_solvers_have_the_best_objective_of_all(problem, value, nu):
  success_rate, (num_tasks, total, low, high) = problem
  value_MJ = table(success_rate, low, high, value, nu)
  best = brute_force(value_MJ, low, high, lambda vector_VM: vector_VM.sum(axis=1) == total)
  for solver in SOLVERS:
    budget_M = budgets(success_rate, total, low=low, high=high, value=value, nu=nu, solver=solver)
    assert_feasible(budget_M, num_tasks, total, low, high)
    assert worth(value_MJ, budget_M, low) >= best * (1 - 1e-6) - rounding(value_MJ, total)
  assert best == pytest.approx(largest_gains(value_MJ, total - low * num_tasks), rel=1e-9, abs=1e-30)


@given(problem=problems(), value=st.sampled_from(tuple(JAGGED.values())))
def test_a_value_in_any_form_is_solved_by_the_dp(problem, value):
  success_rate, (num_tasks, total, low, high) = problem
  budget_M = budgets(success_rate, total, low=low, high=high, value=value)
  assert_feasible(budget_M, num_tasks, total, low, high)
  value_MJ = table(success_rate, low, high, value)
  best = brute_force(value_MJ, low, high, lambda vector_VM: vector_VM.sum(axis=1) == total)
  assert worth(value_MJ, budget_M, low) >= best - rounding(value_MJ, total)


def test_a_jagged_value_by_hand():
  """Four rollouts or nothing: two tasks can have them, .2 goes without."""
  by = functools.partial(budgets, [0.3, 0.2, 0.5], 9, low=1, high=4)
  np.testing.assert_array_equal(by(value=JAGGED['from four on']), [4, 1, 4])
  for name in ('from four on', 'convex', 'wave'):
    with pytest.raises(ValueError, match=r"solver='greedy' needs .*never rise.*solver='dp'"):
      by(value=JAGGED[name], solver='greedy')


@solvers
def test_a_small_step_is_exactly_the_greedy_choice(solver):
  """Far from the rounding of values, where no two gains are equal; and in any order of the tasks."""
  rng = np.random.default_rng(0)
  for value in value_lib.VALUES:
    solve = functools.partial(budgets, total_budget=40, low=1, high=16, value=value, solver=solver)
    for _ in range(5):
      p_M, order_M, posterior = rng.uniform(0.03, 0.97, 8), rng.permutation(8), rng.uniform(0.1, 9, (2, 8))
      gain_MG = np.diff(table(p_M, 1, 16, value), axis=1)
      np.testing.assert_array_equal(solve(p_M), 1 + one_at_a_time(gain_MG, 32))
      np.testing.assert_array_equal(solve(p_M[order_M]), solve(p_M)[order_M])
      np.testing.assert_array_equal(solve(Beta(*posterior[:, order_M])), solve(Beta(*posterior))[order_M])


@pytest.mark.parametrize('calls', [20, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_extreme_success_rates_have_the_optimum(calls):
  """Next to 0 and 1, below the normal numbers, and posteriors of all widths; a failure says which call it is."""
  for call in range(calls):
    rng = np.random.default_rng(call)
    tiny = [5e-324, 1e-310, 2e-308, 1e-160, 1e-17]
    near_one = [1 - 1e-16, 1 - 1e-15, 1 - 1e-9, 1.0]
    success_rate = (rng.choice(tiny, 16), rng.choice(near_one, 16), 10 ** rng.uniform(-320, 0, 16),
                    rng.choice([0, 1, rng.uniform(), 1e-12], 16), Beta(*10 ** rng.uniform(-8, 8, (2, 16))),
                    Beta(*10 ** rng.uniform(-2, 3, (2, 16))))[call % 6]
    value, nu = rng.choice(list(value_lib.VALUES)), 10 ** rng.uniform(-1.3, 2.3)
    value_MJ = table(success_rate, 1, 64, value, nu)
    best = largest_gains(value_MJ, 112)
    for solver in SOLVERS:
      budget_M = budgets(success_rate, 128, low=1, high=64, value=value, nu=nu, solver=solver)
      assert_feasible(budget_M, 16, 128, 1, 64)
      # Below its smallest normal number a float32 may count as 0.
      loss = rounding(value_MJ, 112) + (1e-7 * best + 112 * 2e-38 if solver == 'greedy' else 0)
      assert worth(value_MJ, budget_M, 1) >= best * (1 - 1e-12) - loss, call


@solvers
@pytest.mark.parametrize('M', [128, pytest.param(256, marks=pytest.mark.slow)])
def test_a_step_of_the_shipped_configs_has_the_optimum(solver, M):
  """Of 17,398 tasks, 2048 rollouts among those of a step."""
  rng = np.random.default_rng(M)
  stats = estimate.init(17_398)
  index_M = rng.permutation(17_398)[:M]
  task_R = np.repeat(np.arange(M), 2048 // M)
  rate_M = rng.beta(0.5, 0.5, M)
  stats = estimate.observe(stats, index_M, task_R, rng.uniform(size=2048) < rate_M[task_R],
                           rng.integers(1, 3072, 2048), discount=0.98)
  alloc = knobs.Alloc(rollouts_per_step=2048, high=128, solver=solver)
  budget_M = allocate.of_step(alloc, stats, index_M, completion_length=3072)
  assert_feasible(budget_M, M, 2048, 2, 128)
  value_MJ = table(estimate.posterior(stats, index_M), 2, 128)
  assert worth(value_MJ, budget_M, 2) == pytest.approx(largest_gains(value_MJ, 2048 - 2 * M), rel=1e-6)
  assert worth(value_MJ, budget_M, 2) > 1.01 * worth(value_MJ, np.full(M, 2048 // M), 2)


@pytest.mark.slow
def test_greedy_is_the_optimum_of_16384_tasks():
  rng = np.random.default_rng(0)
  for success_rate in (rng.beta(0.5, 0.5, 16384), Beta(*rng.uniform(0.1, 20, (2, 16384)))):
    budget_M = budgets(success_rate, 131072, solver='greedy')
    assert_feasible(budget_M, 16384, 131072, 2, 128)
    value_MJ = table(success_rate, 2, 128)
    best = largest_gains(value_MJ, 131072 - 2 * 16384)
    assert worth(value_MJ, budget_M, 2) == pytest.approx(best, rel=1e-9)


@pytest.mark.exhaustive
def test_the_dp_is_the_optimum_of_4096_tasks():
  p_M = np.random.default_rng(0).beta(0.5, 0.5, 4096)
  budget_M = budgets(p_M, 16384, high=30)
  assert_feasible(budget_M, 4096, 16384, 2, 30)
  value_MJ = table(p_M, 2, 30)
  assert worth(value_MJ, budget_M, 2) == pytest.approx(largest_gains(value_MJ, 16384 - 2 * 4096), rel=1e-5)


# Equal tasks, bounds and kinds of arguments.


@solvers
def test_equal_tasks_share_evenly_however_little_there_is_to_gain(solver):
  """At 40 rollouts each the gains of 1/2 and of 1/3 are below the rounding of both solvers."""
  share = functools.partial(budgets, total_budget=161, low=1, high=64, solver=solver)
  for value in value_lib.VALUES:
    for p in (0.0, 1.0, 0.5, 1 / 3, 5e-324, 1e-160, 1e-12, 1 - 1e-16, 1 - 1e-9):
      np.testing.assert_array_equal(share(np.full(4, p), value=value), [40, 40, 40, 41])
    np.testing.assert_array_equal(share(Beta(np.full(4, 0.6), np.ones(4)), value=value), [40, 40, 40, 41])


@solvers
def test_tiny_rates_are_told_apart(solver):
  """Values of 1e-40 are worth as much as others where there are no others."""
  by = functools.partial(budgets, total_budget=20, low=1, high=16, solver=solver)
  np.testing.assert_array_equal(by([1e-12, 1e-9], value='variance'), [4, 16])
  np.testing.assert_array_equal(by([1e-25, 1e-22], value='snr'), [4, 16])


@solvers
def test_the_bounds_hold(solver):
  p_M = np.array([0, 0.3, 0, 1, 0])
  by = functools.partial(budgets, low=2, high=12, solver=solver)
  for success_rate in (p_M, Beta(p_M + 1, p_M + 0.5), window(p_M), window(p_M, [0, 1, 1, 1, 0])):
    for total in (10, 60):  # where they leave no choice
      np.testing.assert_array_equal(by(success_rate, total), np.full(5, total // 5))
  np.testing.assert_array_equal(by(p_M, 32), [5, 12, 5, 5, 5])  # one task alone can learn
  np.testing.assert_array_equal(by(p_M, 15, low=3, high=3), np.full(5, 3))


def test_uniform_budgets():
  uniform = functools.partial(budgets, rule='uniform')
  np.testing.assert_array_equal(uniform(np.array([0.1, 0.5, 1]), 8), [3, 3, 2])
  np.testing.assert_array_equal(uniform(np.array([0.1, 0.5, 1]), 12, low=4, high=4), [4, 4, 4])
  np.testing.assert_array_equal(uniform(Beta([1, 9], [9, 1]), 5), [3, 2])
  np.testing.assert_array_equal(uniform(window([0, 0.5, 1]), 10), [4, 3, 3])
  assert uniform([0.5, 0.5], 9, solver='greedy').dtype == np.int32


@solvers
def test_success_rates_may_be_numpy_jax_or_a_list(solver):
  rate, known = [0.25, 0.5, 0, 1, 0.125, 0.5], [True, True, True, False, True, True]
  solve = functools.partial(budgets, total_budget=40, solver=solver)
  posterior = Beta(np.array(rate) + 0.5, np.array(rate[::-1]) + 0.5)
  for kind in (list, tuple, np.float32, jnp.array):
    np.testing.assert_array_equal(solve(kind(rate)), solve(np.array(rate)))
    np.testing.assert_array_equal(solve(Beta(*map(kind, posterior))), solve(posterior))
  for kind in (list, jnp.array):
    np.testing.assert_array_equal(solve(Window(kind(rate), kind(known))), solve(window(rate, known)))
  np.testing.assert_array_equal(budgets([False, True, True], np.int64(9), solver=solver), [3, 3, 3])


# Which tasks get any.


def allowed_choice(total: int, most: int):
  return lambda vector_VM: (vector_VM.sum(axis=1) == total) & ((vector_VM > 0).sum(axis=1) <= most)


def test_choice_and_budget_by_hand():
  """Three tasks, two of which get any. Values of 2, 3, 4 rollouts: .125, .1875, .21875 of 1/2; .093.., .1406.., .1648..
  of 1/4 with 'variance'; of 1 none."""
  by = functools.partial(budgets, [0.5, 1, 0.25], low=0, high=4, value='variance')
  np.testing.assert_array_equal(by(5, most_tasks=2), [3, 0, 2])
  np.testing.assert_array_equal(by(4, most_tasks=1), [4, 0, 0])
  np.testing.assert_array_equal(by(3), [3, 0, 0])  # a third of 1/2 adds .0625, a first of 1/4 nothing
  np.testing.assert_array_equal(by(10), [4, 2, 4])  # all that there is must be spent
  # At low = 1 each has one, which is worth nothing.
  np.testing.assert_array_equal(budgets([0.5, 1, 0.25], 4, low=1, high=4, value='variance'), [2, 1, 1])
  # Of hits, one rollout is worth p.
  np.testing.assert_array_equal(budgets([0.5, 1, 0.25], 4, low=0, high=4, value='hit'), [2, 1, 1])
  np.testing.assert_array_equal(budgets([0.5, 1, 0.25], 4, low=0, high=4, value='hit', most_tasks=1), [0, 4, 0])


CHOICE_SHAPES = ((4, 6), (5, 4))


@given(shape=st.sampled_from(CHOICE_SHAPES), value=st.sampled_from((*value_lib.VALUES, *JAGGED.values())),
       data=st.data())
def test_choice_and_budget_have_the_best_objective_of_all(shape, value, data):
  """Of all choices of at most so many tasks. The choice is by one price; its gap was 0 in 3000 random cases."""
  num_tasks, high = shape
  most = data.draw(st.integers(1, num_tasks))
  total = data.draw(st.integers(1, most * high))
  success_rate = data.draw(success_rates(num_tasks))
  budget_M = budgets(success_rate, total, low=0, high=high, value=value, most_tasks=most)
  assert_feasible(budget_M, num_tasks, total, 0, high)
  assert np.count_nonzero(budget_M) <= most
  value_MJ = table(success_rate, 0, high, value)
  best = brute_force(value_MJ, 0, high, allowed_choice(total, most))
  reached = worth(value_MJ, budget_M, 0)
  scale = value_MJ.max()
  if most == num_tasks:
    assert reached >= best - rounding(value_MJ, total)
  elif value in value_lib.VALUES:
    assert reached >= best - 0.05 * scale


@pytest.mark.slow
@pytest.mark.parametrize('value', ['infogain', 'snr', 'mixed', 'hit', 'coba'])
def test_the_choice_of_a_step_is_within_a_ten_thousandth_of_any(value):
  """By duality: at any price x, no choice of 32 of 64 is worth more than 256 x and its net values."""
  rng = np.random.default_rng(0)
  counts_M = rng.binomial(8, rng.beta(0.5, 0.5, 64))
  for success_rate in (Beta(*rng.uniform(0.2, 9, (2, 64))), Beta(counts_M + 0.5, 8.5 - counts_M)):
    budget_M = budgets(success_rate, 256, low=0, value=value, most_tasks=32)
    assert budget_M.sum() == 256 and np.count_nonzero(budget_M) <= 32
    value_MJ = table(success_rate, 0, 128, value)
    bound = min(256 * x + np.sort((value_MJ - x * np.arange(129)).max(axis=1))[-32:].sum()
                for x in np.geomspace(1e-5, 1, 400) * value_MJ.max())
    assert 0.9998 * bound <= worth(value_MJ, budget_M, 0) <= bound * (1 + 1e-12)


@solvers
def test_those_that_are_chosen_share_evenly(solver):
  for most in (3, 5):
    budget_M = budgets(Beta(np.full(8, 0.6), np.ones(8)), 32, low=0, high=16, value='hit', solver=solver,
                       most_tasks=most)
    assert sorted(budget_M[budget_M > 0]) == sorted([32 // most + (m < 32 % most) for m in range(most)])
  # Also where what they gain is below the rounding of the solver.
  if solver == 'dp':
    np.testing.assert_array_equal(budgets(np.full(4, 0.5), 161, low=0, high=64), [40, 40, 40, 41])
  # Two rollouts are what makes a group mixed: two tasks have them, and two have none.
  np.testing.assert_array_equal(np.sort(budgets(np.full(4, 0.5), 4, low=0, high=16)), [0, 0, 2, 2])


def test_uniform_budgets_of_the_first_tasks():
  uniform = functools.partial(budgets, np.full(5, 0.5), rule='uniform', low=0, high=9)
  np.testing.assert_array_equal(uniform(8, most_tasks=3), [3, 3, 2, 0, 0])
  np.testing.assert_array_equal(uniform(3), [1, 1, 1, 0, 0])
  np.testing.assert_array_equal(uniform(10, most_tasks=3, cost_M=[2, 1, 1, 1, 1]), [2, 3, 3, 0, 0])


def test_a_choice_within_a_capacity():
  rng = np.random.default_rng(0)
  for call in range(20):
    success_rate, cost_M = Beta(*rng.uniform(0.2, 6, (2, 5))), rng.integers(1, 4, 5)
    most, capacity = int(rng.integers(1, 6)), int(rng.integers(3, 25))
    budget_M = budgets(success_rate, capacity, low=0, high=5, cost_M=cost_M, most_tasks=most)
    assert budget_M @ cost_M <= capacity and np.count_nonzero(budget_M) <= most and budget_M.max() <= 5
    value_MJ = table(success_rate, 0, 5)
    best = brute_force(value_MJ, 0, 5, lambda vector_VM: (vector_VM @ cost_M <= capacity) & (
        (vector_VM > 0).sum(axis=1) <= most))
    assert worth(value_MJ, budget_M, 0) >= best - 1e-8, call


def test_what_a_choice_needs():
  by = functools.partial(budgets, np.full(4, 0.5), 8, high=8)
  with pytest.raises(ValueError, match=r'most_tasks=2 of 4 tasks.*alloc\.low=2; set alloc\.low=0'):
    by(low=2, most_tasks=2)
  with pytest.raises(ValueError, match='most_tasks=0 must be at least 1'):
    by(low=0, most_tasks=0)
  with pytest.raises(ValueError, match=r'^8 rollouts cannot be shared by 2 tasks at 0\.\.3 each'):
    budgets(np.full(4, 0.5), 8, low=0, high=3, most_tasks=2)
  with pytest.raises(ValueError, match="solver='greedy' needs .*rollout 2 of task 0 adds .*solver='dp'"):
    by(low=0, solver='greedy')
  with pytest.raises(ValueError, match='gives every task rollouts.*alloc.low=1'):
    budgets(window([0.5, 0.5]), 8, low=0)
  assert by(low=2, most_tasks=4).sum() == 8  # all of them are no choice


def test_the_rows_that_are_chosen():
  np.testing.assert_array_equal(allocate.chosen(np.array([0, 3, 0, 0, 2]), 3), [0, 1, 4])
  np.testing.assert_array_equal(allocate.chosen(np.array([0, 3, 0, 0, 2]), 2), [1, 4])
  np.testing.assert_array_equal(allocate.chosen(np.array([1, 3]), 2), [0, 1])
  for most in (1, 6):
    with pytest.raises(ValueError, match=f'{most} rows cannot hold 2 tasks with rollouts, of 5'):
      allocate.chosen(np.array([0, 3, 0, 0, 2]), most)


# Waves.


def test_further_rollouts_by_hand():
  """Under flat priors: one mixed, one of two wrong ones, one of two right ones, two of none.

  Of 'mixed', what n more add is 0; n / (n + 3): .25, .15, .1, .07; the same; 1 - 2 / (n + 1): 0, .33, .17, .1, .07."""
  group = Group(np.array([1, 0, 2, 0]), np.array([1, 2, 0, 0]))
  by = functools.partial(budgets, Beta(1.0 + group.right_M, 1.0 + group.wrong_M), value='mixed', group=group, low=0)
  np.testing.assert_array_equal(by(5, high=9), [0, 2, 3, 0])  # those without any get none where low is 0
  np.testing.assert_array_equal(by(6, high=4), [2, 2, 2, 0])  # and high bounds the whole group
  # Where nothing is to be gained, the smallest groups get it.
  done = Group(np.array([1, 1, 2]), np.array([1, 3, 1]))
  np.testing.assert_array_equal(
      budgets(Beta(1.0 + done.right_M, 1.0 + done.wrong_M), 5, low=0, value='mixed', group=done), [2, 1, 2])
  np.testing.assert_array_equal(budgets([0.5] * 3, 5, low=0, rule='uniform', group=done), [3, 1, 1])
  np.testing.assert_array_equal(budgets([0.5] * 3, 9, low=1, rule='uniform', group=done), [4, 2, 3])


@given(data=st.data(), value=st.sampled_from((*value_lib.VALUES, JAGGED['wave'])), low=st.integers(0, 1),
       solver=st.sampled_from(SOLVERS))
def test_further_rollouts_have_the_best_objective_of_all(data, value, low, solver):
  """Over all budgets within the bounds, of groups in any state."""
  num_tasks, high = 4, 6
  counts = lambda: np.array(data.draw(st.lists(st.integers(0, 2), min_size=num_tasks, max_size=num_tasks)))
  group = Group(counts(), counts(), counts() // 2)
  success_rate = data.draw(success_rates(num_tasks))
  if low == 0 and not group.size_M.any():
    group = group._replace(wrong_M=np.ones(num_tasks, int))
  room_M = np.where((low > 0) | (group.size_M > 0), high - group.size_M, 0)
  total = data.draw(st.integers(low * num_tasks, int(room_M.sum())))
  by = functools.partial(budgets, success_rate, total, low=low, high=high, value=value, group=group)
  if solver == 'greedy' and value is JAGGED['wave']:
    return
  budget_M = by(solver=solver)
  assert budget_M.sum() == total and budget_M.min() >= low and np.all(budget_M <= room_M)
  value_MJ = value_lib.expected(success_rate, np.arange(low, high + 1), value, group=group)
  best = brute_force(value_MJ, low, high, lambda vector_VM: (vector_VM.sum(axis=1) == total) & (
      vector_VM <= room_M).all(axis=1))
  loss = rounding(value_MJ, total) + 1e-6 * np.abs(value_MJ).max()
  if solver == 'greedy' and low == 0 and np.any(group.right_M + group.wrong_M == 0):
    loss += value_MJ.max()  # groups that no verdict came of are not concave; one of them may have got half of its units
  assert worth(value_MJ, budget_M, low) >= best - loss
  if low == 0 and value is not JAGGED['wave']:
    cost_M = data.draw(st.lists(st.integers(1, 3), min_size=num_tasks, max_size=num_tasks))
    budget_M = budgets(success_rate, 2 * total, low=low, high=high, value=value, group=group, cost_M=cost_M)
    assert budget_M @ cost_M <= 2 * total and np.all(budget_M <= room_M)


def test_the_rollouts_of_waves():
  of = lambda total, waves: allocate.wave_rollouts(knobs.Alloc(rollouts_per_step=total, waves=waves))
  assert [of(256, 1), of(256, 2), of(255, 2), of(256, 3), of(257, 3)] == [
      (256,), (128, 128), (128, 127), (86, 85, 85), (87, 85, 85)]


@pytest.mark.parametrize('cost', ['rollouts', pytest.param('tokens', marks=pytest.mark.slow)])
@pytest.mark.parametrize('calls', [24, pytest.param(1500, marks=pytest.mark.exhaustive)])
def test_waves_spend_the_step_within_its_bounds_whatever_their_verdicts(calls, cost):
  """Also where verifiers fail, and where nothing is left over; a failure says which call it is."""
  for call in range(calls):
    rng = np.random.default_rng(call)
    low, waves, M = int(rng.integers(0, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 9))
    most = int(rng.integers(1, M + 1)) if low == 0 else M
    high = max(low, waves, 1) + int(rng.integers(0, 4))
    rollouts = int(rng.integers(max(low * most, waves), high * most + 1)) if high * most > waves else high * most
    if call % 2:
      rollouts = high * most  # which leaves no choice in the end
    alloc = knobs.Alloc(
        rollouts_per_step=rollouts, low=low, high=high, waves=min(waves, rollouts), cost=cost,
        tokens_per_step=rollouts * 7 if cost == 'tokens' else 0, value=str(rng.choice(list(value_lib.VALUES))),
        rule=str(rng.choice(['knapsack', 'knapsack', 'uniform'])))
    try:
      allocate.check(most, rollouts, low, high, alloc.rule, alloc.waves)
    except ValueError:
      continue
    stats, group, size_M = estimate.init(M), None, np.zeros(M, int)
    token_M = rng.uniform(1, 20, M)
    for wave, wave_rollouts in enumerate(allocate.wave_rollouts(alloc)):
      rate = estimate.posterior(stats, np.arange(M))
      if wave:
        rate = Beta(rate.a_M + group.right_M, rate.b_M + group.wrong_M)
      budget_M = allocate.of_wave(rate, alloc, wave=wave, group=group, token_M=token_M, most_tasks=most)
      if cost == 'rollouts':
        assert budget_M.sum() == wave_rollouts, call
      assert budget_M.sum() <= wave_rollouts and budget_M.min() >= 0, call
      if low == 0 and wave:
        assert not budget_M[size_M == 0].any(), call
      size_M += budget_M
      right_M = rng.binomial(budget_M, rng.choice([0, 0.4, 1], M))
      unverified_M = (budget_M - right_M) * (rng.uniform(size=M) < 0.2)
      added = (right_M, budget_M - right_M - unverified_M, unverified_M)
      group = Group(*(added if group is None else (x_M + y_M for x_M, y_M in zip(group, added))))
    assert size_M.max() <= high and size_M.min() >= low and np.count_nonzero(size_M) <= most, call


def test_the_waves_of_a_step_by_hand(stats):
  """low = 3 in two waves: two of each task, then one; the second wave knows the verdicts of the first."""
  alloc = knobs.Alloc(rollouts_per_step=18, low=3, high=8, waves=2)
  posterior = estimate.posterior(stats, INDEX_M)
  step = functools.partial(allocate.of_step, stats=stats, index_M=INDEX_M, completion_length=50)
  np.testing.assert_array_equal(step(alloc), budgets(posterior, 9, low=2, high=7))
  group = Group(np.array([1, 0, 2]), np.array([3, 3, 0]))
  np.testing.assert_array_equal(
      step(alloc, wave=1, group=group),
      budgets(Beta(posterior.a_M + group.right_M, posterior.b_M + group.wrong_M), 9, low=1, high=8, group=group))
  # Evidence is that of earlier steps.
  noisy = alloc.replace(value='snr')
  np.testing.assert_array_equal(
      step(noisy, wave=1, group=group, counts_evidence=True),
      budgets(Beta(posterior.a_M + group.right_M, posterior.b_M + group.wrong_M), 9, low=1, high=8, group=group,
              value='snr', evidence_M=posterior.a_M + posterior.b_M))
  # Each wave has its part of the tokens, at a length expected after the verdicts so far.
  tokens = alloc.replace(cost='tokens', tokens_per_step=9000, low=1)
  rate = Beta(posterior.a_M + group.right_M, posterior.b_M + group.wrong_M)
  cost_M = np.maximum(estimate.tokens(stats, INDEX_M, default=50, rate_M=rate.mean_M), 500)
  np.testing.assert_array_equal(step(tokens, wave=1, group=group), budgets(
      rate, 4500, low=0, high=8, group=group, cost_M=cost_M))


def test_the_first_wave_reads_the_tasks_of_the_whole_step():
  """Of four equal tasks: two get the 16 rollouts of the step at once, of at most 8; each of three waves has 6 or 5."""
  posterior = Beta(np.ones(4), np.ones(4))
  alloc = knobs.Alloc(rollouts_per_step=16, low=0, high=8, waves=3)
  budget_M = allocate.of_wave(posterior, alloc, most_tasks=2)
  np.testing.assert_array_equal(np.sort(budget_M), [0, 0, 3, 3])
  # Eight at once are two for each; the first four would be two for two.
  np.testing.assert_array_equal(allocate.of_wave(posterior, alloc.replace(rollouts_per_step=8, waves=2)), [1, 1, 1, 1])


def test_bad_groups_and_waves_are_named():
  by = functools.partial(budgets, [0.5, 0.5], low=1, high=4)
  with pytest.raises(ValueError, match='each of 2 tasks'):
    by(4, group=Group(np.array([1]), np.array([1])))
  with pytest.raises(ValueError, match='none of them negative'):
    by(4, group=Group(np.array([1, -3]), np.array([1, 1])))
  with pytest.raises(ValueError, match=r'task 1 has 4 rollouts already, and 1 more are above alloc\.high=4'):
    by(4, group=Group(np.array([1, 3]), np.array([1, 1])))
  with pytest.raises(ValueError, match=r'5 further rollouts .* 2 tasks: .*2\.\.4; raise alloc\.high'):
    by(5, group=Group(np.array([1, 1]), np.array([1, 1])))
  with pytest.raises(ValueError, match='knows no waves'):
    budgets(window([0.5, 0.5]), 4, low=1, group=Group(np.array([1, 1]), np.array([1, 1])))
  with pytest.raises(ValueError, match=r'wave 1 of 3 has 3 of 9 rollouts.* 1 of each of 4 tasks; lower alloc\.waves'):
    allocate.check(4, 9, 2, 8, 'knapsack', 3)
  with pytest.raises(ValueError, match=r'the 4 tasks that wave 1 of 3 can read .* 12 rollouts at 2 each; raise alloc'):
    allocate.check(8, 12, 0, 2, 'knapsack', 3)
  alloc = knobs.Alloc(rollouts_per_step=8, waves=2)
  for wave, group in ((1, None), (0, Group(np.ones(2, int), np.ones(2, int)))):
    with pytest.raises(ValueError, match=f'wave={wave} needs .*group'):
      allocate.of_wave([0.5, 0.5], alloc, wave=wave, group=group)


# Costs.


def test_budgets_with_costs_by_hand():
  by = functools.partial(budgets, low=2, high=8, cost_M=[2, 3])
  # The third of 1/4 adds .0264 for 2, the third of 1/2 adds .03125 for 3: more value, if less for its cost.
  np.testing.assert_array_equal(by([0.25, 0.5], 13), [2, 3])
  np.testing.assert_array_equal(by([0.25, 0.5], 12), [3, 2])
  # Six more: .0547 for three of the first, .0469 for two of the second, .0625 for one of each.
  np.testing.assert_array_equal(by([0.5, 0.5], 16), [3, 3])
  # Where nothing can be gained nothing is spent; where there is plenty, all that adds is.
  np.testing.assert_array_equal(by([0, 1], 16), [2, 2])
  for capacity in (40, 1e9, 1e300):
    np.testing.assert_array_equal(by([0.2, 0.3], capacity), [8, 8])
  assert by([0.2, 0.3], 16).dtype == np.int32


# Tasks, low, high, capacity.
COST_SHAPES = ((2, 1, 6, 17), (3, 2, 6, 40))


@st.composite
def cost_problems(draw, whole: bool):
  num_tasks, low, high, capacity = draw(st.sampled_from(COST_SHAPES))
  most = capacity / (low * num_tasks)
  costs = st.integers(1, int(most)) if whole else st.floats(1e-3, most * (1 - 1e-12))
  cost = draw(st.lists(costs, min_size=num_tasks, max_size=num_tasks))
  return draw(success_rates(num_tasks)), np.array(cost, float), low, high, capacity


@given(problem=cost_problems(whole=True), value=st.sampled_from(CONCAVE + tuple(JAGGED.values())))
def test_budgets_with_whole_costs_have_the_best_objective_of_all(problem, value):
  success_rate, cost_M, low, high, capacity = problem
  budget_M = budgets(success_rate, capacity, low=low, high=high, value=value, cost_M=cost_M)
  value_MJ = table(success_rate, low, high, value)
  assert_nothing_left_out(budget_M, cost_M, capacity, low, high, value_MJ)
  best = brute_force(value_MJ, low, high, lambda vector_VM: vector_VM @ cost_M <= capacity)
  assert worth(value_MJ, budget_M, low) >= best - rounding(value_MJ, capacity)


@given(problem=cost_problems(whole=False), value=st.sampled_from(CONCAVE))
def test_budgets_with_any_costs_are_as_good_as_with_costs_rounded_up(problem, value):
  success_rate, cost_M, low, high, capacity = problem
  budget_M = budgets(success_rate, capacity, low=low, high=high, value=value, cost_M=cost_M)
  value_MJ, unit = table(success_rate, low, high, value), capacity / 2 ** 14
  assert_nothing_left_out(budget_M, cost_M, capacity, low, high, value_MJ)
  best = brute_force(value_MJ, low, high, lambda vector_VM: (
      low * cost_M.sum() + (vector_VM - low) @ (np.ceil(cost_M / unit) * unit) <= capacity - unit))
  assert worth(value_MJ, budget_M, low) >= best - rounding(value_MJ, 64)


def test_equal_costs_have_the_objective_of_no_costs():
  rng = np.random.default_rng(0)
  for cost in (3, 0.7, 1 / 3):
    success_rate = rng.uniform(size=4)
    budget_M = budgets(success_rate, cost * 15 * (1 + 1e-12), low=2, high=8, cost_M=np.full(4, cost))
    assert budget_M.sum() == 15
    assert allocate.objective(success_rate, budget_M) == pytest.approx(
        allocate.objective(success_rate, budgets(success_rate, 15, low=2, high=8)), rel=1e-6)
  # The fifteenth rollout does not fit by three of 2^14 units, of which rounding costs down would save seven.
  assert budgets(np.full(4, 0.5), 1.6384, low=2, high=8, cost_M=np.full(4, 1.6387 / 15)).sum() == 14


def test_budgets_with_costs_keep_to_capacity_bounds_and_order():
  rng = np.random.default_rng(1)
  for capacity, cost_M in ((150, rng.integers(1, 6, 8)), (150.5, rng.integers(1, 6, 8)),
                           (150, rng.uniform(1, 6, 8)), (1e9, rng.uniform(1, 6, 8)), (20_000, np.arange(1, 9) * 60)):
    solve = functools.partial(budgets, total_budget=capacity, low=1, high=16)
    p_M, order_M = rng.uniform(0.03, 0.97, 8), rng.permutation(8)
    budget_M = solve(p_M, cost_M=cost_M)
    assert_nothing_left_out(budget_M, cost_M, capacity, 1, 16, table(p_M, 1, 16))
    np.testing.assert_array_equal(solve(p_M[order_M], cost_M=cost_M[order_M]), budget_M[order_M])
  for cost_M in (np.array([0.3, 0.1, 0.7]), np.array([1e-3, 1.0, 1e3])):  # the lower bounds are all that is paid
    by = functools.partial(budgets, [0.5, 0.2, 0.9], cost_M=cost_M, low=7)
    np.testing.assert_array_equal(by(7 * cost_M.sum(), high=9), [7, 7, 7])
    np.testing.assert_array_equal(by(1e3 * cost_M.sum(), high=7), [7, 7, 7])


def test_uniform_budgets_with_costs():
  uniform = functools.partial(budgets, [0.5, 0.1, 1], rule='uniform', low=1, high=20, cost_M=[3, 1, 1])
  np.testing.assert_array_equal(uniform(10), [2, 2, 2])
  np.testing.assert_array_equal(uniform(12), [2, 3, 3])
  np.testing.assert_array_equal(uniform(1000), [20, 20, 20])
  np.testing.assert_array_equal(uniform(5), [1, 1, 1])
  assert uniform(10).dtype == np.int32


@pytest.mark.parametrize('cost, capacity, match', [
    ([1, 0.0], 90, r'cost_M\[1\]=0\.0 .*positive'),
    ([1, float('nan')], 90, r'cost_M\[1\]=nan .*positive'),
    ([float('inf'), 1], 90, r'cost_M\[0\]=inf .*positive'),
    ([1.0], 90, r'each of 2 tasks.*\(1,\)'),
    ([1, 2], 5, r'capacity of 5 .* 2 rollouts of each of 2 tasks, .*cost 6'),
    ([1, 2], float('nan'), 'capacity of nan '),
    ([1, 2], float('inf'), 'capacity of inf '),
])
def test_bad_costs_are_named(cost, capacity, match):
  for rule in knobs.Alloc.choices('rule'):
    with pytest.raises(ValueError, match=match):
      budgets([0.5, 0.2], capacity, low=2, high=9, rule=rule, cost_M=cost)


def test_what_takes_no_costs():
  with pytest.raises(ValueError, match="solver='greedy' .*equal costs.*solver='dp'"):
    budgets([0.5, 0.2], 90, solver='greedy', cost_M=[1, 2])
  with pytest.raises(ValueError, match="costs.*posteriors.*alloc.cost='rollouts'"):
    budgets(window([0.5, 0.2]), 90, cost_M=[1, 2])


# The paper's rule, and the faults of the authors' allocator.


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


def test_the_papers_rule_by_hand():
  by = lambda rate, known, total, high=16, solver='greedy': list(
      budgets(window(rate, known), total, low=2, high=high, solver=solver))
  # Not known: 32 / 4. Solved: the lower bound. 1/2 needs int(ln .1 / ln .5) = 3 more. 0 gets the rest.
  for solver in SOLVERS:
    assert by([0.5, 1, 0, 0.3], [1, 1, 1, 0], 32, 128, solver) == [5, 2, 17, 8]
    assert by([0, 1, 0.5, 0.9], [1, 1, 1, 0], 32, 8, solver) == [8, 8, 8, 8]
  assert by([0.5, 0, 0, 1], [1, 1, 1, 1], 26) == [5, 9, 10, 2]  # in equal parts
  assert by([0, 1, 1, 0.5], [1, 1, 1, 1], 40) == [16, 9, 10, 5]  # beyond the bound: to those at 1
  assert by([0, 1, 0.5, 0.9], [1, 1, 1, 0], 54) == [16, 16, 6, 16]  # to those not known, to those between
  assert by([0.5, 0, 1, 1], [1, 1, 1, 1], 11) == [5, 2, 2, 2]  # what is needed, and nothing more
  assert by([0.5, 0, 1, 1], [1, 1, 1, 1], 12) == [5, 3, 2, 2]
  assert by([0.5, 0.2, 0.9, 0], [0, 0, 0, 0], 35) == [8, 9, 9, 9]  # none known
  assert by([1, 1, 1, 1], [1, 1, 1, 1], 34) == [8, 8, 9, 9]
  assert by([float('nan'), 7.0, 0.5, 1], [0, 0, 1, 1], 32) == [8, 8, 5, 11]  # not known: any number
  # So near 0 that 1 - p is 1, a task needs what it can get.
  for p in (1e-17, 5e-324, 1 - 1e-16, 1e-9):
    assert by([p, 1, 1, 0], [1, 1, 1, 1], 22) == [16, 2, 2, 2]
  with pytest.raises(ValueError, match=r'shapes \(3,\) and \(1,\)'):
    budgets(Window(np.array([0.5, 0, 1]), np.array([True])), 12)


@given(rate=st.lists(st.integers(0, 16).map(lambda k: k / 16), min_size=6, max_size=6),
       known=st.lists(st.sampled_from((True, True, False)), min_size=6, max_size=6),
       total=st.integers(12, 96), high=st.sampled_from((9, 16)))
@settings(max_examples=100)
def test_the_papers_rule_is_that_of_the_loops(rate, known, total, high):
  total = min(total, 6 * high)
  budget_M = budgets(window(rate, known), total, low=2, high=high, solver='greedy')
  assert_feasible(budget_M, 6, total, 2, high)
  np.testing.assert_array_equal(budget_M, window_by_loops(*window(rate, known), total, 2, high))


@solvers
def test_fault_1_the_lower_bound_counts_at_its_own_value(solver):
  """The seventh of 1/2 adds 1/512, the third of .9 adds .00081. A program that starts from 0 instead of
  V(low) would see .00243 for the third of .9, and take it."""
  np.testing.assert_array_equal(budgets([0.5, 0.9], 9, low=2, solver=solver), [7, 2])


def test_fault_2_mixed_and_cheap_tasks_are_allocated():
  """The authors' code asserts that it spent the total, and stops at these."""
  for rate_M in (np.full(256, 0.5), np.full(256, 1 / 3), np.random.default_rng(0).uniform(0.2, 0.8, 256),
                 np.array([0.5]), *np.random.default_rng(1).integers(0, 9, (20, 16)) / 8):
    M = len(rate_M)
    for success_rate in (rate_M, window(rate_M), window(rate_M, np.arange(M) % 3 > 0)):
      for total in (2 * M, 2 * M + 1, 8 * M, 128 * M):
        assert_feasible(budgets(success_rate, total, solver='greedy'), M, total, 2, 128)
  with pytest.raises(ValueError, match=r'^3 rollouts.* 2 tasks at 2\.\.128 each'):  # below the lower bounds
    budgets(window([0.5, 0.5]), 3)


def test_fault_3_the_surplus_keeps_to_the_upper_bound():
  """One hopeless task among 255 solved ones: the authors' code gives it 1538 of 2048."""
  budget_M = budgets(window([0] + [1] * 255), 2048, solver='greedy')
  np.testing.assert_array_equal(budget_M, [128] + [7] * 120 + [8] * 135)


def test_fault_4_what_is_no_success_rate_is_refused():
  for bad in ([0.5, np.nan], [1.01, 0.5], window([0.5, np.nan]), window([0.5, 2.0]), Beta([1, np.nan], [1, 1])):
    for rule in knobs.Alloc.choices('rule'):
      with pytest.raises(ValueError, match=r'nan|1\.01|2\.0'):
        budgets(bad, 8, low=1, rule=rule)
  # A task that was never seen is not hopeless: it has the prior, or the mean budget.
  np.testing.assert_array_equal(budgets(window([0.0, 0.0], [0, 1]), 12, high=16), [6, 6])
  unseen, hopeless = budgets(estimate.posterior(
      estimate.init(2)._replace(failures_I=np.array([0.0, 40.0])), np.arange(2)), 16, high=16)
  assert unseen > hopeless


def test_fault_5_a_posterior_has_no_hard_switch():
  """Of two hopeless and two mixed tasks: a further success makes the window move 11 rollouts at once."""
  window_of = lambda k: budgets(window([0, 0, k / 16, k / 16]), 40, high=32)
  assert list(window_of(0)) == [10, 10, 10, 10] and list(window_of(8)) == [15, 15, 5, 5]
  previous = None
  for hits in np.linspace(0, 8, 33):
    a_M = np.array([0, 0, hits, hits]) + 0.5
    budget_M = budgets(Beta(a_M, 17 - a_M), 40, high=32)
    assert previous is None or np.abs(budget_M - previous).max() <= 2
    previous = budget_M


# Bad input.


@pytest.mark.parametrize('num_tasks, total, low, high, match', [
    (0, 8, 2, 8, 'no tasks'),
    (2, 8, 5, 4, r'alloc\.high=4 .*alloc\.low=5'),
    (2, 3, 2, 8, r'^3 rollouts.* 2 tasks at 2\.\.8 .*in 4\.\.16'),
    (2, 17, 2, 8, r'^17 rollouts.* 2 tasks at 2\.\.8 .*in 4\.\.16; change alloc\.rollouts_per_step'),
])
def test_bad_totals_are_named(num_tasks, total, low, high, match):
  rate_M = np.full(num_tasks, 0.5)
  for rule in knobs.Alloc.choices('rule'):
    with pytest.raises(ValueError, match=match):
      allocate.check(num_tasks, total, low, high, rule)
    for success_rate in (rate_M, Beta(rate_M, rate_M), window(rate_M)):
      with pytest.raises(ValueError, match=match):
        budgets(success_rate, total, low=low, high=high, rule=rule)
  for total in (4, 16):
    allocate.check(2, total, 2, 8, 'knapsack')
  for total in (8.0, '8', None):
    with pytest.raises(TypeError):
      budgets([0.5, 0.2], total)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(bad):
  value = lambda budget, p: np.where((budget == 5) & (p > 0.4), bad, budget * 0.0 + p)
  for more in ({'solver': 'dp'}, {'solver': 'greedy'}, {'cost_M': np.ones(3)}):
    with pytest.raises(ValueError, match=f'5 rollouts of task 1 is {bad}; .*finite'):
      budgets([0.2, 0.5, 0.6], 12, low=2, high=9, value=value, **more)


def test_bad_names_are_named():
  for named in ({'value': 'info_gain'}, {'nu': 0.0}, {'solver': 'ilp'}, {'rule': 'homogeneous'}, {'low': -1}):
    for cost_M in (None, [1, 2]):
      with pytest.raises(ValueError, match=rf'alloc\.{min(named)}='):
        budgets([0.5, 0.2], 30, cost_M=cost_M, **named)


# One program for all steps.


class Compilations:
  """Counts programs that are compiled, by whomever, while it is open."""

  def __enter__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._on_event)
    return self

  def _on_event(self, event: str, duration: float, **_):
    self.count += event == '/jax/core/compile/backend_compile_duration'

  def __exit__(self, *_):
    jax.monitoring.unregister_event_duration_listener(self._on_event)


def test_one_compilation_serves_every_step():
  """Whatever the success rates, the costs, what is known, the totals and the number of tasks up to a bucket."""
  rng = np.random.default_rng(3)

  def steps():
    M = int(rng.integers(2, 65))
    by = functools.partial(budgets, low=2, high=17)
    for solver in SOLVERS:
      by(rng.uniform(size=M), int(rng.integers(2 * M, 8 * M)), solver=solver)
      by(Beta(*rng.uniform(0.1, 9, (2, M))), 5 * M, solver=solver, value='snr', nu=rng.uniform(1, 9))
      by(window(rng.integers(0, 9, M) / 8, rng.uniform(size=M) < 0.8), 6 * M, solver=solver)
      size_M = rng.integers(1, 5, M)
      by(rng.uniform(size=M), int(rng.integers(2 * M, 8 * M)), group=Group(size_M, size_M), solver=solver)
    by(rng.uniform(size=M), 400, cost_M=rng.integers(1, 3, M))
    by(rng.uniform(size=M), 20 * M, cost_M=rng.uniform(1, 9, M))
    by(rng.uniform(size=M), 4 * M, rule='uniform')

  steps()
  with Compilations() as compilations:
    for _ in range(4):
      steps()
  assert compilations.count == 0
  with Compilations() as compilations:
    budgets(np.full(257, 0.3), 550, low=2, high=17)
  assert compilations.count > 0  # the count counts


@pytest.mark.slow
def test_twenty_calls_compile_a_few_programs():
  """Of 33 to 256 tasks, 2 to 8 rollouts each: a knapsack for each of five capacities, and one program for ties."""
  rng = np.random.default_rng(0)
  with Compilations() as compilations:
    for _ in range(20):
      M = int(rng.integers(33, 257))
      budgets(Beta(*rng.uniform(0.1, 9, (2, M))), int(rng.integers(2 * M, 8 * M)), high=33)
  assert compilations.count <= 6


@pytest.mark.slow
def test_budgets_with_and_without_jit(monkeypatch):
  monkeypatch.setattr(solve, '_LEAST_TASKS', 1)
  monkeypatch.setattr(solve, '_LEAST_CAPACITY', 1)
  p_M, cost_M = np.array([0.2, 0.5, 0.9]), np.array([2, 1, 3])
  by = functools.partial(budgets, low=1, high=4)
  for call in (*(functools.partial(by, p_M, 8, solver=solver) for solver in SOLVERS),
               functools.partial(by, window(np.round(p_M)), 8), functools.partial(by, p_M, 12, cost_M=cost_M)):
    compiled_M = call()
    with jax.disable_jit():
      np.testing.assert_array_equal(call(), compiled_M)


# The budgets of a training step, and what budgets are expected to give.


@pytest.fixture(name='stats')
def _stats():
  """Rows 3, 0, 2 of the statistics, of 8 rollouts each: half right, all wrong, all right."""
  return estimate.observe(
      estimate.init(4), np.array([3, 0, 2]), np.repeat(np.arange(3), 8), np.repeat([1, 0, 0, 1.0], [4, 4, 8, 8]),
      np.repeat([10, 1000, 30], 8), discount=1.0)


INDEX_M = np.array([3, 0, 2])


def test_budgets_of_a_step_by_hand(stats):
  by = lambda stats=stats, **changed: allocate.of_step(
      knobs.Alloc(rollouts_per_step=18, high=8, **changed), stats, INDEX_M, completion_length=50)
  np.testing.assert_array_equal(by(rule='uniform'), [6, 6, 6])
  np.testing.assert_array_equal(by(estimate='window'), [5, 8, 5])  # 0 gets the surplus up to the bound
  posterior = estimate.posterior(stats, INDEX_M)
  for changed in ({}, {'solver': 'greedy'}, {'value': 'snr', 'nu': 8.0}):
    np.testing.assert_array_equal(by(**changed), budgets(
        posterior, 18, high=8, value=changed.get('value', 'infogain'), nu=changed.get('nu', 2.0)))
  measured = stats._replace(gradient=np.array([0.1, 1e12, 20.0, 1.0]))  # of nothing but noise
  np.testing.assert_array_equal(by(measured, value='snr'), budgets(posterior, 18, high=8, value='snr', nu=200.0))


def test_a_step_knows_what_its_value_needs(stats):
  """snr what advantages count of earlier steps, coba the failure rate of all tasks of the split, seen or not."""
  posterior = estimate.posterior(stats, INDEX_M)
  by = lambda value, **more: allocate.of_step(
      knobs.Alloc(rollouts_per_step=6, low=1, high=16, value=value, nu=0.1), stats, INDEX_M, completion_length=50,
      **more)
  np.testing.assert_array_equal(by('snr', counts_evidence=True), budgets(
      posterior, 6, low=1, high=16, value='snr', nu=0.1, evidence_M=posterior.a_M + posterior.b_M))
  assert list(by('snr')) != list(by('snr', counts_evidence=True))
  all_I = estimate.posterior(stats, np.arange(4))
  np.testing.assert_array_equal(by('coba'), budgets(
      posterior, 6, low=1, high=16, value='coba', failure_rate=1 - all_I.mean_M.mean()))
  with pytest.raises(ValueError, match=r"alloc.solver='greedy'.*not for every nu.*alloc.solver='dp'"):
    allocate.of_step(knobs.Alloc(rollouts_per_step=18, value='snr', solver='greedy'), stats, INDEX_M,
                     completion_length=50, counts_evidence=True)


def test_tokens_are_shared_within_the_rollouts_of_a_step(stats):
  by = lambda tokens, rollouts=18, stats=stats, index_M=INDEX_M: allocate.of_step(
      knobs.Alloc(rollouts_per_step=rollouts, high=8, cost='tokens', tokens_per_step=tokens), stats, index_M,
      completion_length=50)
  posterior = estimate.posterior(stats, INDEX_M)
  cost_M = np.maximum(estimate.tokens(stats, INDEX_M, default=50, rate_M=posterior.mean_M), 4000 / 18)
  budget_M = by(4000)
  assert budget_M @ cost_M <= 4000
  np.testing.assert_array_equal(budget_M, budgets(posterior, 4000, high=8, cost_M=cost_M))
  np.testing.assert_array_equal(by(10), [2, 2, 2])  # less than the least budgets cost
  assert by(100_000, rollouts=12).sum() <= 12  # tokens for more rollouts than there are
  # Nothing seen: 50 tokens each.
  assert by(50 * 13, rollouts=100, stats=estimate.init(3), index_M=np.arange(3)).sum() == 13


def test_expectations_by_hand():
  flat, p_M, budget_M = Beta([1, 1], [1, 1]), np.array([0.5, 0.25, 0]), np.array([2, 3, 1])
  assert allocate.objective([0.5, 0.25, 1], [3, 2, 9]) == pytest.approx(0.09375 + 0.052734375)
  assert allocate.objective(flat, [2, 1]) == pytest.approx(1 / 30)
  assert allocate.objective([0.5, 0], [3, 9], 'snr', 1.0) == pytest.approx(0.25 / 3)
  assert allocate.objective([0.5, 0.2], [2, 5], lambda n, p: n * p) == pytest.approx(2)
  assert allocate.expected_mixed_tasks(p_M, budget_M) == pytest.approx(0.5 + 0.5625)
  assert allocate.expected_mixed_tasks(flat, [2, 3]) == pytest.approx(1 / 3 + 1 / 2)
  assert allocate.expected_gradient_ratio(p_M, budget_M) == pytest.approx((2 * 0.5 + 3 * 0.5625) / 6)
  assert allocate.expected_gradient_ratio(flat, [2, 3]) == pytest.approx((2 / 3 + 3 / 2) / 5)
  for f in (allocate.objective, allocate.expected_mixed_tasks, allocate.expected_gradient_ratio):
    assert type(f([0.5], [3])) is float


# The face of the folder.


def test_another_trainer_can_import_it_alone():
  """It loads jax, what jax needs, and nothing of the trainer."""
  loaded = subprocess.run(
      [sys.executable, '-c', 'import sys; from kr_jax import allocation; print(*sys.modules)'], cwd=ROOT, check=True,
      capture_output=True, text=True).stdout.split()
  heavy = {'flax', 'optax', 'orbax', 'tensorflow_datasets', 'tensorflow', 'matplotlib', 'tqdm'}
  assert 'jax' in loaded and not heavy & set(loaded)
  ours = {name.split('.')[1] for name in loaded if name.startswith('kr_jax.')}
  assert ours == {'allocation', 'checks', 'data_knobs', 'kernels', 'knobs', 'sections', 'types'}


def test_a_loop_of_another_trainer():
  stats, rng, p_M = allocation.init_stats(4), np.random.default_rng(0), np.array([0, 0.3, 0.6, 1])
  for _ in range(3):
    seen = allocation.posterior(stats, np.arange(4))
    budget_M = allocation.budgets(seen, 32, high=16)
    task_R = np.repeat(np.arange(4), budget_M)
    verdict_R = rng.uniform(size=32) < p_M[task_R]
    stats = allocation.observe(stats, np.arange(4), task_R, verdict_R, np.full(32, 7), discount=0.98)
  assert budget_M.sum() == 32 and budget_M[3] == budget_M.min()
  assert allocation.expected_mixed_tasks(seen, budget_M) < 4
  np.testing.assert_allclose(allocation.expected_tokens(stats, np.arange(4), default=1.0), 7)


def test_tasks_that_are_due_come_first():
  """Two tasks at 1/3, whose value is the largest, would take all; one that is due and looks hopeless gets a rollout."""
  rate = Beta(np.array([30.0, 30, 0.1, 0.1]), np.array([60.0, 60, 90, 90]))
  alloc = knobs.Alloc(low=0, high=16, rollouts_per_step=12)
  of = lambda due_M, **more: allocate.of_wave(rate, alloc.replace(**more), most_tasks=2, due_M=due_M)
  np.testing.assert_array_equal(of(None), [6, 6, 0, 0])
  np.testing.assert_array_equal(of(np.zeros(4, bool)), [6, 6, 0, 0])
  for waves in (1, 2):
    budget_M = of(np.array([False, False, False, True]), waves=waves)
    assert budget_M[3] == 1 and np.count_nonzero(budget_M) == 2 and budget_M.sum() == 12 // waves
    # Of more due tasks than there is room for, those that are worth most.
    budget_M = of(np.array([False, True, True, True]), waves=waves)
    assert budget_M[0] == 0 and budget_M[1] > 1 == budget_M[2] and budget_M.sum() == 12 // waves
