"""Solvers find the optimum, whatever is padded, and share evenly among equals."""

import functools
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from kr_jax.allocation import solve
from kr_jax.allocation import value as value_lib
from kr_jax.allocation.value import Beta

SOLVERS = ('dp', 'greedy')


def one_at_a_time(gain_MG, units: int, size_M=None, room_M=None) -> np.ndarray:
  """A unit at a time to the largest gain; of equals to the smallest group, then to the later task."""
  unit_M = np.zeros(len(gain_MG), int)
  size_M = np.zeros(len(gain_MG), int) if size_M is None else np.asarray(size_M)
  room_M = [len(gain_G) for gain_G in gain_MG] if room_M is None else room_M
  for _ in range(units):
    unit_M[min((m for m in range(len(unit_M)) if unit_M[m] < room_M[m]),
               key=lambda m: (-gain_MG[m][unit_M[m]], size_M[m] + unit_M[m], -m))] += 1
  return unit_M


def brute_force(value_MJ: np.ndarray, room_M, units: int) -> float:
  """The largest summed value over all choices of as many units."""
  return max(sum(value_MJ[m][j] for m, j in enumerate(unit_M))
             for unit_M in itertools.product(*(range(room + 1) for room in room_M)) if sum(unit_M) == units)


# Which values are concave.


def test_gains_by_hand():
  value_MJ = np.array([[0, 0, 4, 6.0], [0, 3, 5, 6]])
  gain_MG, rise = solve.gains(value_MJ)
  np.testing.assert_array_equal(gain_MG, [[0, 4, 2], [3, 2, 1]])
  assert rise == 'rollout 2 of task 0 adds 4, and rollout 1 adds 0'
  gain_MG, rise = solve.gains(value_MJ[:, 1:], 1)
  np.testing.assert_array_equal(gain_MG, [[4, 2], [2, 1]])
  assert not rise
  assert not solve.gains(value_MJ, room_M=np.array([1, 3])).rise and solve.gains(value_MJ, room_M=np.array([2, 3])).rise
  # Rounding of sums is no rise, and is straightened; what is 1e-13 of the largest value is nothing.
  gain_MG, rise = solve.gains(np.array([[0, 0.1, 0.1 + 0.2 - 0.1, 0.3], [0, 1e-14, 1.0, 1.0]])[:1])
  assert not rise and np.all(np.diff(gain_MG) <= 0)
  np.testing.assert_array_equal(solve.gains(np.array([[1, 1 + 1e-15, 1 - 1e-15]])).gain_MG, [[0, 0]])


def test_vip_is_not_concave():
  """-q (n-1) / n^2 of n = 1, 2, 3, 4 is 0, -1/4, -2/9, -3/16 times q: it falls, then rises (arXiv 2602.01601)."""
  vip = lambda n, p: -p * (1 - p) * (n - 1) / n ** 2
  assert 'rollout 3 of task 0' in solve.gains(value_lib.expected([0.5], np.arange(1, 5), vip), 1).rise


@pytest.mark.parametrize('name', list(value_lib.VALUES))
def test_which_named_values_are_concave(name):
  """All from one rollout on; from none on those for which one rollout is worth something.

  snr that counts evidence is not under much noise: it is linear in n = N - 1 + c / (c + N) then, which is convex.
  """
  rng = np.random.default_rng(0)
  for success_rate in (rng.beta(0.5, 0.5, 60), Beta(*10 ** rng.uniform(-1.3, 2, (2, 60)))):
    value_MJ = value_lib.expected(success_rate, np.arange(65), name)
    assert not solve.gains(value_MJ[:, 1:], 1).rise
    assert bool(solve.gains(value_MJ).rise) == (name not in ('hit', 'coba'))
    if name == 'snr':
      value_MJ = value_lib.expected(success_rate, np.arange(1, 65), name, 200.0, evidence_M=np.full(60, 8.0))
      assert solve.gains(value_MJ, 1).rise


def test_concave_by_hand():
  """The gains 0 4 2 become 2 2 2; 1 2 4 0 becomes 7/3 7/3 7/3 0; those that fall stay."""
  value_MJ = np.array([[0, 0, 4, 6.0, 6], [5, 6, 8, 12, 12], [0, 3, 5, 6, 6]])
  np.testing.assert_allclose(solve.concave(value_MJ), [
      [0, 2, 4, 6, 6], [5, 22 / 3, 29 / 3, 12, 12], [0, 3, 5, 6, 6]], rtol=1e-14)


@given(gain=st.lists(st.integers(-9, 9), min_size=1, max_size=8))
def test_concave_values_are_the_upper_hull(gain):
  """The largest mean of two points about each."""
  value_J = np.concatenate([[0.0], np.cumsum(gain)])
  hull_J = [max([value_J[j]] + [((k - j) * value_J[i] + (j - i) * value_J[k]) / (k - i)
                                for i in range(j) for k in range(j + 1, len(value_J))]) for j in range(len(value_J))]
  np.testing.assert_allclose(solve.concave(value_J[None])[0], hull_J, rtol=1e-12, atol=1e-12)


# A total.


@st.composite
def problems(draw, concave: bool):
  """Gains of few different numbers, what each task has and may get, and some units."""
  M, G = draw(st.integers(1, 4)), 4
  order = (lambda x: sorted(x, reverse=True)) if concave else (lambda x: x)
  rows = st.lists(st.integers(-2 if concave else -9, 9).map(float), min_size=G, max_size=G).map(order)
  gain_MG = np.array(draw(st.lists(rows, min_size=M, max_size=M)))
  room_M = np.array(draw(st.lists(st.integers(0, G), min_size=M, max_size=M)))
  size_M = np.array(draw(st.lists(st.integers(0, 5), min_size=M, max_size=M)))
  return gain_MG, room_M, size_M, draw(st.integers(0, int(room_M.sum())))


def values_of(gain_MG: np.ndarray) -> np.ndarray:
  return np.pad(np.cumsum(gain_MG, axis=1), ((0, 0), (1, 0)))


@pytest.mark.parametrize('solver', SOLVERS)
def test_units_go_to_the_largest_gains_and_then_to_the_smallest_groups(solver):
  @given(problem=problems(concave=True))
  def check(problem):
    gain_MG, room_M, size_M, units = problem
    unit_M = solve.exact(solve.Gains(gain_MG, ''), units, room_M=room_M, size_M=size_M, solver=solver)
    assert unit_M.dtype == np.int32
    np.testing.assert_array_equal(unit_M, one_at_a_time(gain_MG, units, size_M, room_M))

  check()


@given(problem=problems(concave=False))
def test_any_gains_are_solved_by_the_dp_within_the_room(problem):
  gain_MG, room_M, size_M, units = problem
  value_MJ = values_of(gain_MG)
  unit_M = solve.exact(solve.gains(value_MJ), units, room_M=room_M, size_M=size_M, solver='dp')
  assert unit_M.sum() == units and np.all(unit_M <= room_M)
  worth = value_MJ[np.arange(len(room_M)), unit_M].sum()
  assert worth == pytest.approx(brute_force(value_MJ, room_M, units), abs=1e-6)


def test_a_full_group_gets_nothing_even_where_all_else_is_a_loss():
  gains = solve.Gains(np.array([[5.0, 5, 5, 5], [-100] * 4, [-100] * 4]), '')
  for solver in SOLVERS:
    np.testing.assert_array_equal(
        solve.exact(gains, 3, room_M=np.array([1, 2, 2]), size_M=np.zeros(3), solver=solver), [1, 1, 1])


def test_greedy_refuses_rising_gains_with_the_reason():
  with pytest.raises(ValueError, match=r"solver='greedy' needs .*never rise.* rollout 2 of task 1 adds 3, and "
                     r"rollout 1 adds 1; use solver='dp'"):
    solve.exact(solve.gains(np.array([[0, 4.0, 6], [0, 1, 4]])), 2, room_M=np.full(2, 2), size_M=np.zeros(2),
                solver='greedy')


# One program for a bucket.


def test_buckets_by_hand():
  assert [solve.bucket(n, 64) for n in (0, 1, 64, 65, 256, 257)] == [64, 64, 64, 128, 256, 512]
  assert [solve.bucket(n, 512, halves=True) for n in (1, 512, 513, 768, 769, 1536, 1537, 6144)] == [
      512, 512, 768, 768, 1024, 1536, 2048, 6144]


@pytest.mark.slow
def test_padding_changes_nothing(monkeypatch):
  """Neither tasks nor capacity, whatever the bucket."""
  rng = np.random.default_rng(0)
  value_MJ = value_lib.expected(rng.beta(0.5, 0.5, 11), np.arange(1, 10))
  jagged_MJ = rng.uniform(-1, 1, (11, 9))
  size_M, cost_M = rng.integers(0, 3, 11), rng.uniform(1, 3, 11)

  def results():
    for table_MJ in (value_MJ, jagged_MJ):
      for solver in SOLVERS if table_MJ is value_MJ else ('dp',):
        yield solve.exact(solve.gains(table_MJ), 40, room_M=8 - size_M, size_M=size_M, solver=solver)
      for costs_M in (cost_M, np.rint(cost_M)):
        yield solve.within(solve.gains(table_MJ).gain_MG, costs_M, 80, low=1, room_M=8 - size_M)
    yield solve.fill(size_M, size_M + 5, 40)

  padded = list(results())
  monkeypatch.setattr(solve, '_LEAST_TASKS', 11)
  monkeypatch.setattr(solve, '_LEAST_CAPACITY', 40)
  for exact_M, padded_M in zip(results(), padded, strict=True):
    np.testing.assert_array_equal(exact_M, padded_M)


# Costs.


def test_costs_beyond_the_room_are_not_spent():
  gain_MG = np.array([[5.0, 4, 3], [1, 1, 1]])
  by = functools.partial(solve.within, gain_MG, np.array([2.0, 3.0]), low=1)
  np.testing.assert_array_equal(by(13, room_M=np.array([3, 3])), [4, 1])
  np.testing.assert_array_equal(by(13, room_M=np.array([1, 3])), [2, 3])
  np.testing.assert_array_equal(by(13, room_M=np.array([0, 1])), [1, 2])


# Which tasks.


def test_the_most_valuable_by_hand():
  """At a price of 1 a unit: 2 - 1 of task 0, 9 - 3 of task 1, 4 - 2 of task 2, nothing of task 3."""
  value_MJ = np.array([[0, 2.0, 2, 2], [0, 0, 0, 9], [0, 0, 4, 4], [0, 0.5, 0.9, 1.2]])
  for rows in solve.most_valuable(value_MJ, None, 5, 2):
    np.testing.assert_array_equal(rows, [1, 2])
  # Where a unit of task 1 costs 2 and there are 7, tasks 1 and 2 are worth most below a price of 1.4 and cost 8; above
  # it tasks 0 and 2 are, and cost 3. So a choice that is worth most at no price is not found: tasks 0 and 1 for 7.
  below_X, above_X = solve.most_valuable(value_MJ, np.array([1.0, 2, 1, 1]), 7, 2)
  np.testing.assert_array_equal(below_X, [1, 2])
  np.testing.assert_array_equal(above_X, [0, 2])
  # What costs more than there is counts for nothing: of 3 units, the 9 of task 1.
  for rows in solve.most_valuable(value_MJ, np.array([1.0, 2, 1, 1]), 3, 2):
    np.testing.assert_array_equal(rows, [0, 2])


def test_where_all_is_a_loss_the_least_is_taken():
  for rows in solve.most_valuable(np.array([[0, -5.0, -9], [0, -5, -9], [0, -1, -3], [0, -1, -3]]), None, 4, 2):
    np.testing.assert_array_equal(rows, [2, 3])


def test_equals_are_taken_from_the_first():
  for rows in solve.most_valuable(np.tile([0, 0, 1.0], (6, 1)), None, 4, 2):
    np.testing.assert_array_equal(rows, [0, 1])


# The largest gains.


@st.composite
def gain_tables(draw, elements, sizes=((1, 6), (3, 4))):
  """Rows that never rise, of few different numbers, and some units."""
  M, G = draw(st.sampled_from(sizes))
  rows = st.lists(elements, min_size=G, max_size=G).map(lambda x: sorted(x, reverse=True))
  return draw(st.lists(rows, min_size=M, max_size=M)), draw(st.integers(0, M * G))


floats = st.floats(-2.0 ** 100, 2.0 ** 100, width=32, allow_subnormal=False)
few_floats = st.sampled_from((-2.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 1.5))


@given(problem=gain_tables(floats | few_floats) | gain_tables(few_floats))
@settings(max_examples=100)
def test_greedy_is_a_unit_at_a_time(problem):
  gain_MG, units = problem
  size_M = np.arange(len(gain_MG), dtype=np.int32) % 2
  unit_M = solve.greedy(np.array(gain_MG, np.float32), size_M, units)
  assert unit_M.dtype == np.int32
  np.testing.assert_array_equal(unit_M, one_at_a_time(gain_MG, units, size_M))


@given(problem=gain_tables(st.integers(-3, 3) | st.integers(-2 ** 28, 2 ** 28)))
@settings(max_examples=100)
def test_even_moves_an_optimum_to_that_of_the_greedy_choice(problem):
  """From the least even optimum, which takes the whole of equal gains from the first tasks."""
  gain_MG, units = problem
  order = sorted((-gain, m) for m, gain_G in enumerate(gain_MG) for gain in gain_G)
  uneven_M = np.bincount([m for _, m in order[:units]], minlength=len(gain_MG)).astype(np.int32)
  size_M = np.arange(len(gain_MG), dtype=np.int32) % 2
  even_M = solve.even(np.array(gain_MG, np.int32), size_M, uneven_M)
  assert even_M.dtype == np.int32
  np.testing.assert_array_equal(even_M, one_at_a_time(gain_MG, units, size_M))


def test_fill_by_hand():
  fill = lambda *arguments: list(solve.fill(*arguments))
  assert fill([0, 0, 0], [9, 9, 9], 7) == [2, 2, 3]
  assert fill([4, 0, 0], [9, 9, 1], 7) == [4, 2, 1]
  assert fill([4, 0, 0], [4, 0, 0], 4) == [4, 0, 0]
  assert fill([0, 0, 0], [2 ** 28, 2 ** 29, 2 ** 28], 2 ** 30) == [2 ** 28, 2 ** 29, 2 ** 28]


def test_too_many_gains_for_the_integers_of_the_dp():
  gain_MG = np.broadcast_to(0.0, (2 ** 16, 2 ** 14))  # takes no memory
  with pytest.raises(ValueError, match="65536 tasks times 16384 .* too many for solver='dp'; use solver='greedy'"):
    solve.fixed_point(gain_MG)
