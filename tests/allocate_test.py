"""Budgets maximise the summed value, sum to R exactly, and share evenly among equals."""

import functools
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
from scipy import special

from kr_jax import allocate, types

few = functools.partial(settings, deadline=None)
# A handful of shapes, since each compiles: tasks, rollouts, low, high.
SHAPES = ((1, 5, 2, 9), (2, 9, 1, 7), (3, 9, 3, 3), (4, 15, 2, 8))


def value_of(p, n: int):
  return (1 - p ** n - (1 - p) ** n) * p * (1 - p) ** 2


def beta(*a_and_b: tuple[float, float]) -> allocate.Beta:
  a_M, b_M = zip(*a_and_b)
  return allocate.Beta(np.array(a_M, float), np.array(b_M, float))


@functools.cache
def vectors(num_tasks: int, low: int, high: int, total: int) -> np.ndarray:
  """Every vector of M integers in low..high with the given sum."""
  return np.array([v for v in itertools.product(range(low, high + 1), repeat=num_tasks)
                   if sum(v) == total])


def greedy(success_rate_M, total: int, low: int, high: int) -> np.ndarray:
  """One rollout at a time to the largest marginal gain: exact for concave values."""
  budget_M = np.full(len(success_rate_M), low)
  for _ in range(total - budget_M.sum()):
    gain_M = [value_of(p, n + 1) - value_of(p, n) if n < high else -1
              for p, n in zip(success_rate_M, budget_M)]
    budget_M[np.argmax(gain_M)] += 1
  return budget_M


def stats_of(successes_I, failures_I) -> types.TaskStats:
  s, f = np.array(successes_I, float), np.array(failures_I, float)
  return types.TaskStats(s, f, np.ceil(s + f).astype(np.int64))


rates = st.floats(0, 1)
parameters = st.floats(0.05, 200)


@st.composite
def problems(draw):
  """Success rates, known or up to a posterior, and what to share among them."""
  shape = draw(st.sampled_from(SHAPES))
  known = st.lists(rates, min_size=shape[0], max_size=shape[0]).map(np.array)
  pairs = st.lists(st.tuples(parameters, parameters), min_size=shape[0], max_size=shape[0])
  return draw(known | pairs.map(lambda x: beta(*x))), shape


# What a rollout is worth.


def test_prob_nonzero_gradient_by_hand():
  np.testing.assert_allclose(
      allocate.prob_nonzero_gradient(np.array([0, 0.25, 0.5, 1]), np.array([1, 2, 3])),
      [[0, 0, 0], [0, 0.375, 0.5625], [0, 0.5, 0.75], [0, 0, 0]], rtol=1e-14)
  np.testing.assert_allclose(  # a flat posterior: 1 - 2 / (N + 1)
      allocate.prob_nonzero_gradient(beta((1, 1)), np.array([1, 2, 3, 9])),
      [[0, 1 / 3, 1 / 2, 4 / 5]], rtol=1e-13, atol=1e-15)


def test_value_by_hand():
  np.testing.assert_allclose(
      allocate.value(np.array([0, 0.25, 0.5, 1]), np.array([1, 2, 3])),
      [[0, 0, 0], [0, 0.052734375, 0.0791015625], [0, 0.0625, 0.09375], [0, 0, 0]], rtol=1e-14)
  # A flat posterior: E[2 p^2 (1-p)^3] = 2 B(3, 4) = 1/30, and without end E[p (1-p)^2] = 1/12.
  np.testing.assert_allclose(allocate.value(beta((1, 1)), np.array([1, 2, 10 ** 7])),
                             [[0, 1 / 30, 1 / 12]], rtol=1e-12, atol=1e-15)


def test_budgets_may_differ_by_task():
  p_M, budget_MJ = np.array([0.3, 0.6]), np.array([[2, 5], [9, 3]])
  for f in (allocate.value, allocate.prob_nonzero_gradient):
    for success_rate in (p_M, beta((0.4, 2), (3, 1))):
      all_MJ = f(success_rate, np.arange(1, 10))
      np.testing.assert_allclose(f(success_rate, budget_MJ), np.take_along_axis(
          all_MJ, budget_MJ - 1, axis=1), rtol=1e-13)


@given(p=rates, n=st.integers(1, 200))
@few(max_examples=100)
def test_values_are_those_of_the_formula(p, n):
  np.testing.assert_allclose(allocate.value(np.array([p]), np.array([n])), [[value_of(p, n)]],
                             rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize('a, b', [(0.05, 0.1), (0.5, 0.5), (1, 1), (2, 5), (30, 3), (200, 800)])
def test_posterior_values_are_integrals(a, b):
  """Summed over the log-odds x, in which the density p^a (1-p)^b has no poles."""
  x = np.arange(-900, 900, 0.01)
  p = special.expit(x)
  density = np.exp(a * special.log_expit(x) + b * special.log_expit(-x))
  density /= density.sum()
  budget_J = np.array([1, 2, 3, 8, 32, 128])
  prob_J = [density @ (1 - p ** n - (1 - p) ** n) for n in budget_J]
  value_J = [density @ value_of(p, n) for n in budget_J]
  np.testing.assert_allclose(allocate.prob_nonzero_gradient(beta((a, b)), budget_J), [prob_J],
                             rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(allocate.value(beta((a, b)), budget_J), [value_J], rtol=1e-9,
                             atol=1e-12)


def test_a_sharp_posterior_is_a_rate():
  p_M, budget_J = np.array([0.02, 0.3, 0.9]), np.array([2, 8, 64])
  sharp = allocate.Beta(1e6 * p_M, 1e6 * (1 - p_M))
  np.testing.assert_allclose(allocate.value(sharp, budget_J), allocate.value(p_M, budget_J),
                             rtol=1e-3)


@given(success_rate=rates.map(lambda p: np.array([p]))
       | st.tuples(parameters, parameters).map(beta))
@few(max_examples=100)
def test_value_rises_ever_more_slowly(success_rate):
  for f, limit in ((allocate.value, 4 / 27), (allocate.prob_nonzero_gradient, 1)):
    f_J = f(success_rate, np.arange(1, 131))[0]
    gain_J = np.diff(f_J)
    assert f_J[0] == pytest.approx(0, abs=1e-11)
    assert np.all(f_J >= 0) and np.all(f_J <= limit + 1e-12)
    assert np.all(gain_J >= -1e-11)
    assert np.all(np.diff(gain_J) <= 1e-11)


def test_objective_by_hand():
  assert allocate.objective(np.array([0.5, 0.25, 1]), np.array([3, 2, 9])) == pytest.approx(
      0.09375 + 0.052734375)
  assert allocate.objective(beta((1, 1), (1, 1)), np.array([2, 1])) == pytest.approx(1 / 30)


def test_expected_gradient_ratio_by_hand():
  assert allocate.expected_gradient_ratio(np.array([0.5, 0.25, 0]), np.array([2, 3, 1])) == (
      pytest.approx((2 * 0.5 + 3 * 0.5625) / 6))
  assert allocate.expected_gradient_ratio(beta((1, 1), (1, 1)), np.array([2, 3])) == (
      pytest.approx((2 / 3 + 3 / 2) / 5))


def test_expected_gradient_ratio_over_all_outcomes():
  p_M, budget_M = np.array([0.2, 0.5, 0.9]), np.array([3, 1, 4])
  task_R = np.repeat(np.arange(3), budget_M)
  expected = 0.0
  for reward_R in itertools.product((0, 1), repeat=8):
    reward_R = np.array(reward_R)
    probability = np.prod(np.where(reward_R == 1, p_M[task_R], 1 - p_M[task_R]))
    mixed = [len(set(reward_R[task_R == task])) == 2 for task in range(3)]
    expected += probability * np.mean(np.array(mixed)[task_R])
  assert allocate.expected_gradient_ratio(p_M, budget_M) == pytest.approx(expected, rel=1e-12)


# Budgets.


def test_budgets_by_hand():
  """Gains: .5 has 2^-N / 8, .05 has .00214 .00194 ..., .95 has .00011; the fifth to .05."""
  budget_M = allocate.budgets(np.array([0.05, 0.5, 0.95]), 12, low=2, high=128)
  np.testing.assert_array_equal(budget_M, [3, 7, 2])
  assert budget_M.dtype == np.int32
  np.testing.assert_array_equal(
      allocate.budgets(np.array([0.05, 0.5, 0.95]), 12, low=2, high=6), [4, 6, 2])
  np.testing.assert_array_equal(allocate.budgets([0.5, 0, 1, 0.5], 10), [3, 2, 2, 3])


@given(problem=problems())
@few(max_examples=80)
def test_budgets_have_the_best_objective_of_all(problem):
  success_rate, (num_tasks, total, low, high) = problem
  budget_M = allocate.budgets(success_rate, total, low=low, high=high)
  value_MJ = allocate.value(success_rate, np.arange(high + 1))
  best = value_MJ[np.arange(num_tasks), vectors(num_tasks, low, high, total)].sum(axis=1).max()
  assert budget_M.sum() == total and budget_M.min() >= low and budget_M.max() <= high
  # To the rounding of values to integers, 2^-29 of the largest a task.
  assert allocate.objective(success_rate, budget_M) >= best - 1e-7 * value_MJ.max() - 1e-28


@pytest.mark.parametrize('seed', range(4))
def test_budgets_of_many_tasks_are_those_of_the_greedy_choice(seed):
  p_M = np.random.default_rng(seed).beta(0.5, 0.5, 48)
  budget_M = allocate.budgets(p_M, 400, low=2, high=40)
  best = sum(map(value_of, p_M, greedy(p_M, 400, 2, 40)))
  assert allocate.objective(p_M, budget_M) == pytest.approx(best, rel=1e-6)
  assert best > allocate.objective(p_M, allocate.budgets(p_M, 400, rule='uniform')) * 1.02


def test_a_small_step_is_exactly_the_greedy_choice():
  """Far from the rounding of values, where no two gains are equal."""
  rng = np.random.default_rng(0)
  for _ in range(20):
    p_M = rng.uniform(0.03, 0.97, 8)
    np.testing.assert_array_equal(allocate.budgets(p_M, 40, low=1, high=16),
                                  greedy(p_M, 40, 1, 16))


@given(problem=problems(), rule=st.sampled_from(allocate.RULES))
@few(max_examples=60)
def test_budgets_are_feasible_under_either_rule(problem, rule):
  success_rate, (num_tasks, total, low, high) = problem
  budget_M = allocate.budgets(success_rate, total, low=low, high=high, rule=rule)
  assert budget_M.shape == (num_tasks,) and budget_M.dtype == np.int32
  assert budget_M.sum() == total and budget_M.min() >= low and budget_M.max() <= high


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
])
def test_equal_tasks_share_evenly(p, num_tasks, total, low, high):
  k, more = divmod(total, num_tasks)
  even_M = [k] * (num_tasks - more) + [k + 1] * more  # the later tasks have the rest
  same = [np.full(num_tasks, p), allocate.Beta(np.full(num_tasks, p + 0.1), np.ones(num_tasks))]
  for success_rate in same:
    np.testing.assert_array_equal(
        allocate.budgets(success_rate, total, low=low, high=high), even_M)


def test_equal_tasks_share_evenly_where_gains_are_below_the_rounding():
  budget_M = allocate.budgets(np.full(64, 1 / 3), 64 * 40)
  assert set(budget_M) == {40}


@pytest.mark.parametrize('total', [10, 60])
def test_totals_at_the_bounds_leave_no_choice(total):
  p_M = np.array([0, 0.1, 0.5, 0.9, 1])
  np.testing.assert_array_equal(
      allocate.budgets(p_M, total, low=2, high=12), np.full(5, total // 5))


def test_no_budget_exceeds_the_bound_where_one_task_alone_can_learn():
  budget_M = allocate.budgets(np.array([0, 0.3, 0, 1, 0]), 64, low=2, high=32)
  assert budget_M.sum() == 64 and budget_M.max() <= 32 and budget_M[1] == 32
  assert np.ptp(np.delete(budget_M, 1)) == 0  # 8 each: nothing to choose between them


def test_uniform_budgets():
  uniform = functools.partial(allocate.budgets, rule='uniform')
  np.testing.assert_array_equal(uniform(np.array([0.1, 0.5, 1]), 8), [3, 3, 2])
  np.testing.assert_array_equal(uniform(np.array([0.1, 0.5, 1]), 12, low=4, high=4), [4, 4, 4])
  np.testing.assert_array_equal(uniform(beta((1, 9), (9, 1)), 5), [3, 2])


def test_budgets_go_with_their_tasks():
  rng = np.random.default_rng(1)
  for _ in range(10):
    p_M, order_M = rng.uniform(0.03, 0.97, 8), rng.permutation(8)
    np.testing.assert_array_equal(allocate.budgets(p_M[order_M], 40, low=1, high=16),
                                  allocate.budgets(p_M, 40, low=1, high=16)[order_M])


def test_never_seen_tasks_need_no_special_case():
  stats = allocate.init(6)
  budget_M = allocate.budgets(allocate.posterior(stats, np.array([5, 0, 3])), 24)
  np.testing.assert_array_equal(budget_M, [8, 8, 8])


def test_unsure_tasks_are_worth_more_than_hopeless_ones():
  budget_M = allocate.budgets(beta((0.5, 0.5), (0.5, 200), (200, 0.5)), 24)
  assert budget_M[0] > max(budget_M[1:])


@pytest.mark.parametrize('success_rate, named', [
    ([0.5, float('nan')], r'\[0, 1\].*\(1, nan\)'),
    ([1.01, 0.5], r'\(0, 1\.01\)'),
    ([0.5, 0.5, -1e-9], r'\(2, -1e-09\)'),
    ([float('inf')], r'\(0, inf\)'),
    (0.5, r'vector.*\(\)'),
    ([[0.5, 0.5]], r'vector.*\(1, 2\)'),
    (allocate.Beta(np.array([1, 0.0]), np.ones(2)), 'positive.*0\\.'),
    (allocate.Beta(np.ones(2), np.array([1, float('nan')])), 'finite.*nan'),
    (allocate.Beta(np.ones(1), np.array([float('inf')])), 'finite.*inf'),
    (allocate.Beta(np.ones((1, 2)), np.ones((1, 2))), 'vectors'),
])
@pytest.mark.parametrize('rule', allocate.RULES)
def test_bad_success_rates(success_rate, named, rule):
  with pytest.raises(ValueError, match=named):
    allocate.budgets(success_rate, 8, low=1, rule=rule)


def test_a_posterior_of_two_lengths():
  with pytest.raises(ValueError, match='posterior'):
    allocate.budgets(allocate.Beta(np.ones(1), np.ones(3)), 12)


@pytest.mark.parametrize('num_tasks, total, low, high, rule, named', [
    (2, 8, 2, 8, 'homogeneous', r"alloc\.rule='homogeneous'.*'uniform', 'knapsack'"),
    (0, 8, 2, 8, 'knapsack', 'no tasks'),
    (2, 8, 0, 8, 'knapsack', r'alloc\.low=0 .*1'),
    (2, 8, 5, 4, 'knapsack', r'alloc\.high=4 .*alloc\.low=5'),
    (2, 3, 2, 8, 'knapsack', r'^3 rollouts.* 2 tasks at 2\.\.8 .*in 4\.\.16'),
    (2, 17, 2, 8, 'knapsack', r'^17 rollouts.* 2 tasks at 2\.\.8 .*in 4\.\.16'),
    (2, 17, 2, 8, 'uniform', r'^17 rollouts.*in 4\.\.16'),
])
def test_bad_totals(num_tasks, total, low, high, rule, named):
  with pytest.raises(ValueError, match=named):
    allocate.check(num_tasks, total, low, high, rule)
  with pytest.raises(ValueError, match=named):
    allocate.budgets(np.full(num_tasks, 0.5), total, low=low, high=high, rule=rule)


def test_totals_within_reach_pass():
  for total in (4, 9, 16):
    allocate.check(2, total, 2, 8, 'knapsack')


# The knapsack.


def best_units(value_MJ: np.ndarray, capacity: int) -> np.ndarray:
  """Of all: the largest value, then fewest squares, then most units for the latest tasks."""
  tasks = np.arange(len(value_MJ))
  return min(vectors(len(value_MJ), 0, value_MJ.shape[1] - 1, capacity), key=lambda unit_M: (
      -value_MJ[tasks, unit_M].sum(), np.square(unit_M).sum(), *-unit_M[::-1]))


@st.composite
def tables(draw):
  """Values in no order, few enough of them that many sums are equal, and a capacity."""
  num_tasks, num_budgets, capacity = draw(st.sampled_from((
      (1, 5, 3), (2, 4, 0), (2, 5, 8), (3, 5, 6), (4, 4, 7))))
  values = draw(st.sampled_from((st.integers(0, 1), st.integers(-3, 3),
                                 st.integers(-2 ** 27, 2 ** 27))))
  size = num_tasks * num_budgets
  table = draw(st.lists(values, min_size=size, max_size=size))
  return np.array(table, np.int32).reshape(num_tasks, num_budgets), capacity


def test_knapsack_by_hand():
  value_MJ = np.array([[0, 5, 0, 0], [0, 1, 2, 9], [0, 4, 7, 8]], np.int32)
  for capacity, unit_M in ((0, [0, 0, 0]), (3, [1, 0, 2]), (4, [1, 3, 0]), (8, [2, 3, 3])):
    np.testing.assert_array_equal(allocate.knapsack(value_MJ, capacity=capacity), unit_M)


def test_knapsack_ties():
  even_M = allocate.knapsack(np.zeros((4, 6), np.int32), capacity=10)
  np.testing.assert_array_equal(even_M, [2, 2, 3, 3])
  # Equal in value and in squares: 0 + 4 + 5 and 1 + 2 + 6.
  value_MJ = np.zeros((3, 7), np.int32)
  value_MJ[[0, 0, 1, 1, 2, 2], [0, 1, 4, 2, 5, 6]] = 1
  np.testing.assert_array_equal(allocate.knapsack(value_MJ, capacity=9), [1, 2, 6])


@given(table=tables())
@few(max_examples=150)
def test_knapsack_is_the_best_of_all(table):
  value_MJ, capacity = table
  unit_M = allocate.knapsack(value_MJ, capacity=capacity)
  assert unit_M.dtype == np.int32
  np.testing.assert_array_equal(unit_M, best_units(value_MJ, capacity))


def test_knapsack_of_values_up_to_its_limit():
  value_MJ = np.array([[2 ** 28 - 1, 0], [2 ** 28, 0]], np.int32)
  np.testing.assert_array_equal(allocate.knapsack(value_MJ, capacity=2), [1, 1])


def test_knapsack_with_and_without_jit():
  value_MJ = np.random.default_rng(2).integers(0, 50, (4, 6)).astype(np.int32)
  compiled_M = allocate.knapsack(value_MJ, capacity=11)
  with jax.disable_jit():
    np.testing.assert_array_equal(allocate.knapsack(value_MJ, capacity=11), compiled_M)


def test_one_compilation_serves_every_allocation():
  rng = np.random.default_rng(3)
  allocate.budgets(rng.uniform(size=9), 47, low=2, high=17)
  before = allocate.knapsack._cache_size()
  for _ in range(3):
    allocate.budgets(rng.uniform(size=9), 47, low=2, high=17)
    allocate.budgets(allocate.Beta(*rng.uniform(0.1, 9, (2, 9))), 47, low=2, high=17)
  allocate.budgets(np.zeros(9), 47, low=2, high=17)
  assert allocate.knapsack._cache_size() == before
  allocate.budgets(np.zeros(9), 48, low=2, high=17)  # the count does count
  assert allocate.knapsack._cache_size() == before + 1


# What is known of the tasks.


def test_init_knows_nothing():
  stats = allocate.init(3)
  for x_I in stats:
    np.testing.assert_array_equal(x_I, np.zeros(3))
  assert stats.rollouts_I.dtype == np.int64


def test_observe_by_hand():
  """Ragged groups; the step's second task, row 0, has no rollout; row 1 is not in the step."""
  before = types.TaskStats(np.array([1, 2, 2, 0.0]), np.array([0, 4, 1, 3.0]),
                           np.array([1, 6, 3, 3]))
  kept = jax.tree.map(np.copy, before)
  after = allocate.observe(before, np.array([2, 0, 3]), np.array([0, 0, 0, 2]),
                           np.array([1, 0, 1, 1], np.float32), discount=0.5)
  np.testing.assert_array_equal(after.successes_I, [0.5, 1, 3, 1])
  np.testing.assert_array_equal(after.failures_I, [0, 2, 1.5, 1.5])
  np.testing.assert_array_equal(after.rollouts_I, [1, 6, 6, 4])
  assert after.successes_I.dtype == np.float64 and after.rollouts_I.dtype == np.int64
  jax.tree.map(np.testing.assert_array_equal, before, kept)  # not changed in place


@given(seed=st.integers(0, 2 ** 32 - 1), discount=st.floats(0, 1))
@few(max_examples=40)
def test_observe_is_the_loop_over_rollouts(seed, discount):
  rng = np.random.default_rng(seed)
  stats, successes_I, failures_I, rollouts_I = allocate.init(7), [0.0] * 7, [0.0] * 7, [0] * 7
  for _ in range(3):
    index_M, task_R = rng.permutation(7)[:4], np.sort(rng.integers(0, 4, 9))
    reward_R = rng.integers(0, 2, 9).astype(np.float32)
    stats = allocate.observe(stats, index_M, task_R, reward_R, discount=discount)
    successes_I = [discount * s for s in successes_I]
    failures_I = [discount * f for f in failures_I]
    for task, reward in zip(task_R, reward_R):
      (successes_I if reward else failures_I)[index_M[task]] += 1
      rollouts_I[index_M[task]] += 1
  np.testing.assert_allclose(stats.successes_I, successes_I, rtol=1e-14)
  np.testing.assert_allclose(stats.failures_I, failures_I, rtol=1e-14)
  np.testing.assert_array_equal(stats.rollouts_I, rollouts_I)
  assert stats.rollouts_I.sum() == 27


def test_prior_by_hand():
  """n = 2, S = 2, m (1-m) = 1/4, A = 7, B = 14: rho = 1/7, so a + b = 6."""
  assert allocate.prior(stats_of([2, 2, 0, 0, 1, 1, 1, 1], [0, 0, 2, 2, 1, 1, 1, 1])) == (
      pytest.approx((3, 3)))


def test_prior_keeps_to_its_bounds():
  sum_of = lambda *counts: sum(allocate.prior(stats_of(*counts)))
  assert sum_of([8, 0] * 8, [0, 8] * 8) == pytest.approx(1 / 0.95 - 1)  # each task all or nothing
  assert sum_of([4] * 16, [4] * 16) == pytest.approx(19)  # all tasks alike


def test_prior_without_enough_to_fit():
  assert allocate.prior(allocate.init(5)) == pytest.approx((0.5, 0.5))
  assert allocate.prior(allocate.init(0)) == pytest.approx((0.5, 0.5))
  assert allocate.prior(stats_of([8] * 20, [0] * 20)) == pytest.approx((161 / 162, 1 / 162))
  assert allocate.prior(stats_of([0] * 20, [8] * 20)) == pytest.approx((1 / 162, 161 / 162))
  assert allocate.prior(stats_of([3, 0, 1], [1, 4, 0])) == pytest.approx((5 / 11, 6 / 11))
  seven = stats_of([2, 2, 0, 0, 1, 1, 1], [0, 0, 2, 2, 1, 1, 1])  # one too few
  assert allocate.prior(seven) == pytest.approx((0.5, 0.5))
  # Single rollouts say how many succeed, but nothing of the spread.
  assert allocate.prior(stats_of([1, 0] * 20, [0, 1] * 20)) == pytest.approx((0.5, 0.5))
  # The mean, though, is that of all.
  a, b = allocate.prior(stats_of([2, 2, 0, 0, 1, 1, 1, 1] + [1] * 8,
                                 [0, 0, 2, 2, 1, 1, 1, 1] + [0] * 8))
  assert (a, b) == pytest.approx((6 * 17 / 26, 6 * 9 / 26))


@pytest.mark.parametrize('a, b', [(0.5, 0.5), (2, 2), (0.3, 0.9), (1, 1)])
@pytest.mark.parametrize('ragged', [False, True])
def test_prior_finds_the_population(a, b, ragged):
  rng = np.random.default_rng(4)
  n_I = rng.integers(2, 30, 4000) if ragged else np.full(4000, 8)
  successes_I = rng.binomial(n_I, rng.beta(a, b, 4000))
  assert allocate.prior(stats_of(successes_I, n_I - successes_I)) == pytest.approx(
      (a, b), rel=0.12)


def prior_by_loops(stats: types.TaskStats) -> tuple[float, float]:
  """Moments, term by term, of tasks with more than 1.5 rollouts left."""
  s_I, f_I = stats.successes_I, stats.failures_I
  mean = (sum(s_I) + 1) / (sum(s_I) + sum(f_I) + 2)
  seen = [(s + f, s / (s + f)) for s, f in zip(s_I, f_I) if s + f > 1.5]
  concentration = 1.0
  W, hits = sum(n for n, _ in seen), sum(n * p for n, p in seen)
  if len(seen) >= 8 and 0 < hits < W:
    m = hits / W
    S = sum(n * (p - m) ** 2 for n, p in seen)
    A = sum(1 - n / W for n, _ in seen)
    B = sum(n * (1 - n / W) for n, _ in seen)
    rho = min(max((S / (m * (1 - m)) - A) / (B - A), 0.05), 0.95)
    concentration = 1 / rho - 1
  return mean * concentration, (1 - mean) * concentration


counts = st.just(0.0) | st.integers(0, 9).map(float) | st.floats(0, 300)


@given(evidence=st.lists(st.tuples(counts, counts), max_size=24))
@few(max_examples=150)
def test_prior_is_positive_and_that_of_the_loops(evidence):
  stats = stats_of([s for s, _ in evidence], [f for _, f in evidence])
  a, b = allocate.prior(stats)
  assert np.isfinite(a) and np.isfinite(b) and a > 0 and b > 0
  assert 1 / 0.95 - 1 - 1e-9 <= a + b <= 19 + 1e-9
  assert (a, b) == pytest.approx(prior_by_loops(stats), rel=1e-6)
  turned = types.TaskStats(stats.failures_I, stats.successes_I, stats.rollouts_I)
  assert allocate.prior(turned) == pytest.approx((b, a), rel=1e-6)


def test_posterior_by_hand():
  """Two tasks are too few for a fit: mean 4/6, a + b = 1."""
  a_M, b_M = allocate.posterior(stats_of([3, 0], [1, 0]), np.array([1, 0, 1]))
  np.testing.assert_allclose(a_M, [2 / 3, 3 + 2 / 3, 2 / 3])
  np.testing.assert_allclose(b_M, [1 / 3, 1 + 1 / 3, 1 / 3])


def test_old_evidence_fades_into_the_prior():
  stats = allocate.init(2)
  stats = allocate.observe(stats, np.array([0]), np.zeros(8, int), np.ones(8), discount=1.0)
  fresh = allocate.posterior(stats, np.arange(2))
  for _ in range(50):
    stats = allocate.observe(stats, np.array([1]), np.zeros(0, int), np.zeros(0), discount=0.5)
  faded = allocate.posterior(stats, np.arange(2))
  mean_M = lambda posterior: posterior.a_M / (posterior.a_M + posterior.b_M)
  assert mean_M(fresh)[0] > mean_M(fresh)[1]
  np.testing.assert_allclose(mean_M(faded), 0.5)
  np.testing.assert_array_equal(stats.rollouts_I, [8, 0])
