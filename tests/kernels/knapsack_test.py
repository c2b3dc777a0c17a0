"""The knapsack is the best of all choices and breaks ties as documented, on every backend."""

import functools
import itertools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax.kernels.knapsack import FORBIDDEN
from kr_jax.kernels.knapsack import kernel
from kr_jax.kernels.knapsack import knapsack
from kr_jax.kernels.knapsack import ops
from kr_jax.kernels.knapsack import reference
from kr_jax.kernels.knapsack import tiles

TOPOLOGIES = ('v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1')
TILE_ROWS = 8
LIMIT = 2 ** 29 - 1  # the largest sum of values
UNINITIALISED = pltpu.InterpretParams(uninitialized_memory='nan')  # of integers, the largest


def interpreted_best(value_MJ, cost_M, *, capacity: int):
  """The kernel's table on this CPU, in tiles of 1024 entries."""
  tile_count = -(-(capacity + 1) // (TILE_ROWS * tiles.LANES))
  return kernel.best(value_MJ, cost_M, rows=tile_count * TILE_ROWS, tile_rows=TILE_ROWS,
                     interpret=UNINITIALISED)


@functools.partial(jax.jit, static_argnames=('capacity', 'exact'))
def interpreted(value_MJ, cost_M, spend, *, capacity: int, exact: bool):
  cost_M = jnp.minimum(cost_M, capacity + 1)
  best = interpreted_best(value_MJ, cost_M, capacity=capacity)
  return ops.trace(best, value_MJ, cost_M, spend, capacity=capacity, exact=exact)


SOLVE = {
    'reference': jax.jit(reference.knapsack, static_argnames=('capacity', 'exact')),
    'xla': knapsack,
    'kernel': interpreted,
}
slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
# Some run on the kernel in the default tier, some on what CPUs and GPUs run alone.
backends = pytest.mark.parametrize('backend', ['reference', 'xla', pytest.param('kernel', marks=slow)])
portable = pytest.mark.parametrize('backend', ['reference', 'xla', pytest.param('kernel', marks=exhaustive)])
corners = pytest.mark.parametrize('backend', [
    'xla', pytest.param('reference', marks=exhaustive), pytest.param('kernel', marks=exhaustive)])


def solve(backend: str, value_MJ, cost_M, spend: int, exact: bool, capacity: int | None = None) -> np.ndarray:
  """capacity: of a larger table, whose program serves several amounts to spend. (The reference spends all of its.)"""
  args = np.array(value_MJ, np.int32), np.array(cost_M, np.int32)
  if backend == 'reference':
    unit_M = SOLVE[backend](*args, capacity=spend, exact=exact)
  else:
    unit_M = SOLVE[backend](*args, np.int32(spend), capacity=spend if capacity is None else capacity, exact=exact)
  assert unit_M.dtype == np.int32 and unit_M.shape == (len(value_MJ),)
  return np.asarray(unit_M)


def best_units(value_MJ, cost_M, capacity: int, exact: bool) -> tuple[int, ...] | None:
  """By brute force: the largest value, then the least spent, then the fewest units for the last tasks."""
  M, J = np.shape(value_MJ)
  value_MJ = [[int(v) for v in value_J] for value_J in value_MJ]  # they cannot wrap
  spent = lambda unit_M: int(np.dot(unit_M, cost_M))
  allowed = [unit_M for unit_M in itertools.product(range(J), repeat=M)
             if (spent(unit_M) == capacity if exact else spent(unit_M) <= capacity)]
  return min(allowed, default=None, key=lambda unit_M: (
      -sum(value_MJ[m][j] for m, j in enumerate(unit_M)), spent(unit_M), unit_M[::-1]))


def table(value_MJ, cost_M, capacity: int) -> np.ndarray:
  """best[m, u], entry by entry in 64 bits; -2^62 where nothing costs u."""
  before_U, rows = np.array([0] + [-2 ** 62] * capacity), []
  for value_J, cost in zip(value_MJ, cost_M):
    best_U = np.full(capacity + 1, -2 ** 62)
    for u, j in itertools.product(range(capacity + 1), range(len(value_J))):
      if cost * j <= u and before_U[u - cost * j] > -2 ** 62:
        best_U[u] = max(best_U[u], before_U[u - cost * j] + value_J[j])
    rows.append(best_U)
    before_U = best_U
  return np.stack(rows)


SHAPES = ((1, 5, 3), (2, 4, 0), (2, 9, 8), (3, 5, 11), (4, 4, 7), (3, 1, 4), (2, 3, 30))


@st.composite
def problems(draw, shapes=((3, 5, 11),)):
  """Values in any order, few enough of them that many sums are equal, costs and a capacity."""
  M, J, capacity = draw(st.sampled_from(shapes))
  most = LIMIT // M
  values = draw(st.sampled_from((st.integers(0, 1), st.integers(-3, 3),
                                 st.sampled_from((-most, 0, most)), st.integers(-most, most))))
  value_MJ = draw(st.lists(st.lists(values, min_size=J, max_size=J), min_size=M, max_size=M))
  cost_M = draw(st.lists(st.integers(1, draw(st.sampled_from((1, 2, 5)))), min_size=M, max_size=M))
  exact = draw(st.booleans()) and best_units(value_MJ, cost_M, capacity, True) is not None
  return value_MJ, cost_M, capacity, exact


@portable
def test_by_hand(backend):
  value_MJ = [[0, 5, 0, 0], [0, 1, 2, 9], [0, 4, 7, 8]]
  for spend, unit_M in ((3, [1, 0, 2]), (4, [1, 3, 0]), (9, [3, 3, 3])):
    np.testing.assert_array_equal(solve(backend, value_MJ, [1, 1, 1], spend, True, 9), unit_M)
  # At most 9: one unit of the first is best. Two of the second cost 4; 5 + 9 + 7 costs 1 + 6 + 2.
  for spend, cost_M, unit_M in ((9, [1, 1, 1], [1, 3, 3]), (9, [1, 2, 1], [1, 3, 2]),
                                (4, [5, 2, 3], [0, 0, 1]), (2, [5, 2, 3], [0, 1, 0])):
    np.testing.assert_array_equal(solve(backend, value_MJ, cost_M, spend, False, 9), unit_M)


@portable
def test_ties(backend):
  equal = functools.partial(solve, backend, np.zeros((3, 4)))
  # The fewest units for the last task, then for the one before it.
  np.testing.assert_array_equal(equal([1, 1, 1], 5, True), [3, 2, 0])
  np.testing.assert_array_equal(equal([2, 1, 2], 5, True), [2, 1, 0])
  np.testing.assert_array_equal(equal([1, 1, 1], 5, False), [0, 0, 0])
  # Spending less comes before either.
  value_MJ = [[0, 0, 6], [0, 6, 0]]
  np.testing.assert_array_equal(solve(backend, value_MJ, [1, 1], 2, False), [0, 1])
  np.testing.assert_array_equal(solve(backend, value_MJ, [1, 2], 2, False), [2, 0])


@backends
def test_is_the_best_of_all(backend):
  @given(problem=problems())
  def check(problem):
    np.testing.assert_array_equal(solve(backend, *problem), best_units(*problem))

  check()


@exhaustive
@pytest.mark.parametrize('backend, examples', [('reference', 100), ('xla', 400), ('kernel', 150)])
def test_is_the_best_of_all_in_more_shapes(backend, examples):
  @settings(max_examples=examples)
  @given(problem=problems(SHAPES))
  def check(problem):
    np.testing.assert_array_equal(solve(backend, *problem), best_units(*problem))

  check()


@corners
@pytest.mark.parametrize('exact', [True, False])
def test_nothing_to_spend(backend, exact):
  np.testing.assert_array_equal(
      solve(backend, [[-5, 9], [0, 9], [5, 9]], [1, 3, 2], 0, exact), [0, 0, 0])


@corners
def test_a_single_candidate_and_a_single_task(backend):
  np.testing.assert_array_equal(solve(backend, [[4], [-4], [0]], [1, 2, 3], 6, False), [0, 0, 0])
  np.testing.assert_array_equal(solve(backend, [[4], [-4], [0]], [1, 2, 3], 0, True), [0, 0, 0])
  np.testing.assert_array_equal(solve(backend, [[2, 7, 7, 9]], [3], 8, False), [1])
  np.testing.assert_array_equal(solve(backend, [[2, 7, 7, 9]], [3], 6, True), [2])


@corners
def test_more_than_can_be_spent(backend):
  np.testing.assert_array_equal(
      solve(backend, [[0, 1, 2], [0, 2, 1], [-3, -2, -1]], [1, 2, 3], 500, False), [2, 1, 2])


@corners
def test_a_unit_may_cost_more_than_there_is(backend):
  """Even so much that the cost of two does not fit 32 bits, and wraps below 0."""
  value_MJ = [[0, 7, 50], [1, 50, 60]]
  np.testing.assert_array_equal(solve(backend, value_MJ, [1, 2 ** 31 - 1], 2, False), [2, 0])
  np.testing.assert_array_equal(solve(backend, value_MJ, [3, 2], 2, False), [0, 1])


@backends
def test_values_up_to_the_limit(backend):
  """Entries in reach are as low as they may be, next to entries out of reach."""
  low = [-(2 ** 28 - 1), -2 ** 28]
  value_MJ = [[2 ** 28 - 1, low[0], low[0]], [2 ** 28, low[1], low[1]]]
  np.testing.assert_array_equal(solve(backend, value_MJ, [2, 2], 4, True, 7), [2, 0])
  np.testing.assert_array_equal(solve(backend, value_MJ, [2, 2], 6, True, 7), [2, 1])
  np.testing.assert_array_equal(solve(backend, value_MJ, [2, 2], 7, False), [0, 0])
  np.testing.assert_array_equal(
      solve(backend, [[low[0]] * 3, [low[1]] * 3], [3, 2], 7, True), [1, 2])
  many = np.full((64, 2), -(LIMIT // 64))
  np.testing.assert_array_equal(solve(backend, many, [3] * 64, 9, True), [1, 1, 1] + [0] * 61)


@backends
def test_what_is_forbidden_is_never_taken(backend):
  """Whatever it would save, by how often it is forbidden; values are as large as they may be."""
  most = LIMIT // 3
  value_MJ = np.array([[0, most, FORBIDDEN, FORBIDDEN], [0, -most, -most, FORBIDDEN], [0, FORBIDDEN, -most, most]])
  by = functools.partial(solve, backend, value_MJ, [1, 1, 1], capacity=9)
  np.testing.assert_array_equal(by(1, True), [1, 0, 0])
  np.testing.assert_array_equal(by(2, True), [1, 1, 0])
  np.testing.assert_array_equal(by(4, True), [1, 0, 3])
  np.testing.assert_array_equal(by(6, True), [1, 2, 3])
  np.testing.assert_array_equal(by(9, False), [1, 0, 3])
  many = np.full((64, 3), FORBIDDEN)
  many[:, 0], many[7, 1], many[63, 2] = 0, -5, 5
  np.testing.assert_array_equal(np.flatnonzero(solve(backend, many, [1] * 64, 3, True)), [7, 63])


# 128 entries are a row of lanes, 1024 a tile; the costs move candidates by less, just and more.
@pytest.mark.parametrize('best, capacity', [
    (ops.best, 2100), pytest.param(interpreted_best, 128, marks=slow),
    pytest.param(interpreted_best, 2100, marks=slow),
    *(pytest.param(best, capacity, marks=exhaustive) for best in (ops.best, interpreted_best)
      for capacity in (127, 128, 129, 1023, 1024, 1025, 2100))])
def test_tables_over_rows_and_tiles(best, capacity):
  rng = np.random.default_rng(capacity)
  cost_M = np.array([1, 127, 3, 128, 700], np.int32)
  value_MJ = rng.integers(-50, 50, (5, 10)).astype(np.int32)
  best_MU = np.asarray(best(value_MJ, np.minimum(cost_M, capacity + 1), capacity=capacity))
  best_MU = best_MU.reshape(5, -1)[:, :capacity + 1]
  expected_MU = table(value_MJ, cost_M, capacity)
  reached_MU = expected_MU > -2 ** 62
  np.testing.assert_array_equal(best_MU[reached_MU], expected_MU[reached_MU])
  assert np.all(best_MU[~reached_MU] < -2 ** 29)


@pytest.mark.parametrize('exact', [True, False])
def test_many_tasks(exact):
  """The backends agree where brute force cannot go."""
  rng = np.random.default_rng(7)
  value_MJ, cost_M = rng.integers(-9, 9, (40, 17)), rng.integers(1, 4, 40)
  cost_M[0] = 1
  expected_M = solve('reference', value_MJ, cost_M, 500, exact)
  np.testing.assert_array_equal(solve('xla', value_MJ, cost_M, 500, exact), expected_M)
  assert value_MJ[np.arange(40), expected_M].sum() == (
      table(value_MJ, cost_M, 500)[-1][500 if exact else slice(None)].max())


@pytest.mark.parametrize('exact', [True, False])
def test_less_may_be_spent_than_the_table_holds(exact):
  rng = np.random.default_rng(3)
  value_MJ = rng.integers(-5, 20, (5, 6)).astype(np.int32)
  cost_M = np.ones(5, np.int32) if exact else np.array([3, 1, 2, 2, 4], np.int32)
  for spend in (0, 1, 7, 18):
    np.testing.assert_array_equal(
        knapsack(value_MJ, cost_M, spend, capacity=20, exact=exact),
        best_units(value_MJ, cost_M, spend, exact))


@exhaustive
@pytest.mark.parametrize('exact', [True, False])
def test_with_and_without_jit(exact):
  value_MJ = np.random.default_rng(2).integers(0, 50, (4, 6)).astype(np.int32)
  cost_M = np.array([1, 2, 1, 3], np.int32)
  compiled_M = knapsack(value_MJ, cost_M, capacity=11, exact=exact)
  with jax.disable_jit():
    np.testing.assert_array_equal(
        knapsack(value_MJ, cost_M, capacity=11, exact=exact), compiled_M)


@pytest.mark.parametrize('value_MJ, cost_M, capacity, named', [
    (np.zeros(3, np.int32), np.ones(3, np.int32), 1, r'\(3,\)'),
    (np.zeros((3, 2), np.int32), np.ones(2, np.int32), 1, r'\(3, 2\) and \(2,\)'),
    (np.zeros((0, 2), np.int32), np.ones(0, np.int32), 1, r'at least 1.*\(0, 2\)'),
    (np.zeros((3, 0), np.int32), np.ones(3, np.int32), 0, r'at least 1.*\(3, 0\)'),
    (np.zeros((3, 2), np.int32), np.ones(3, np.int32), -1, 'capacity=-1 .*0..'),
    (np.zeros((3, 2), np.int32), np.ones(3, np.int32), 2 ** 30 - 1, 'capacity=1073741823 '),
])
def test_bad_shapes_and_capacities(value_MJ, cost_M, capacity, named):
  with pytest.raises(ValueError, match=named):
    knapsack(value_MJ, cost_M, capacity=capacity, exact=False)


def test_bad_types():
  with pytest.raises(TypeError, match='int32, not float32 and int32'):
    knapsack(np.zeros((3, 2), np.float32), np.ones(3, np.int32), capacity=1, exact=False)
  with pytest.raises(TypeError, match='int32 and float32'):
    knapsack(np.zeros((3, 2), np.int32), np.ones(3, np.float32), capacity=1, exact=False)


@pytest.mark.parametrize('capacity', [0, 127, 128, 1023, 1024, 16383, 16384, 65536, 1000000])
def test_tiles_hold_the_table(capacity):
  rows, tile_rows = tiles.rows(capacity)
  assert rows % tile_rows == 0 and tile_rows % 8 == 0 and tile_rows <= tiles.TILE_ROWS
  assert capacity < rows * 128 < 1.2 * capacity + 1200
  assert tiles.fits(capacity)


@functools.cache  # of five names
def device(topology: str):
  return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[0]


def compile_for(topology: str, M: int, J: int, capacity: int, exact: bool):
  """The compiled program on one chip."""
  sharding = jax.sharding.SingleDeviceSharding(device(topology))
  abstract = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
  return knapsack.lower(abstract(M, J), abstract(M), capacity=capacity, exact=exact).compile()


@pytest.mark.parametrize('topology, M, J, capacity, exact', [
    pytest.param('v5e:2x2', 256, 127, 1536, True, marks=slow),
    *(pytest.param(topology, *shape, marks=exhaustive) for topology in TOPOLOGIES for shape in (
        (1, 2, 1, False), (4, 5, 60, True), (256, 127, 1536, True), (4096, 127, 65536, True),
        (4096, 127, 65536, False)))])
def test_compiles_for_tpus(topology, M, J, capacity, exact):
  program = compile_for(topology, M, J, capacity, exact)
  assert 'custom_call_target="tpu_custom_call"' in program.as_text()
  # The streamed table, of which nothing makes a copy.
  assert program.memory_analysis().temp_size_in_bytes < 1.2 * 4 * M * capacity + 2 ** 23


@pytest.mark.parametrize('topology', [
    pytest.param(topology, marks=slow if topology == 'v5e:2x2' else exhaustive) for topology in TOPOLOGIES])
def test_the_largest_table_fits(topology):
  capacity = next(c for c in itertools.count(2 ** 20, -1024) if tiles.fits(c))
  assert capacity > 10 ** 6
  assert 'tpu_custom_call' in compile_for(topology, 2, 9, capacity, False).as_text()
  assert 'tpu_custom_call' not in compile_for(topology, 2, 9, 2 ** 20, False).as_text()
