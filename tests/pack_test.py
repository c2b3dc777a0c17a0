"""Every kept token is packed exactly once, in order, and within the rows promised."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from kr_jax import pack

few = functools.partial(settings, deadline=None)


def first_fit_decreasing(length_R, keep_R, row_length: int) -> list[list[int]]:
  """The rollouts of each row."""
  rows = []
  for r in sorted(np.flatnonzero(keep_R), key=lambda r: (-length_R[r], r)):
    for row in rows:
      if sum(length_R[x] for x in row) + length_R[r] <= row_length:
        row.append(r)
        break
    else:
      rows.append([r])
  return rows


@st.composite
def steps(draw):
  """Lengths, those to keep, the longest there may be, and a row that holds it."""
  row_length = draw(st.integers(1, 40))
  longest = draw(st.integers(1, row_length))
  # Many of one length or near it are what a bound on rows has to fear.
  lengths = draw(st.sampled_from((st.integers(1, longest),
                                  st.integers(max(1, longest - 1), longest),
                                  st.integers(longest // 2 + 1, longest))))
  drawn = draw(st.lists(st.tuples(lengths, st.sampled_from((True, True, True, False))),
                        max_size=30))
  length_R = np.array([n for n, _ in drawn], np.int32)
  return length_R, np.array([k for _, k in drawn], bool), longest, row_length


def packed_of(length_R, keep_R, longest, row_length) -> pack.Packed:
  num_rows = pack.max_rows(len(length_R), longest, row_length)
  return pack.rows(length_R, keep_R, num_rows=num_rows, row_length=row_length)


def test_rows_by_hand():
  """Longest first: 5, then 4, then 3 that fits neither, then the 2 beside the 4; 4 is dropped."""
  packed = pack.rows(np.array([3, 5, 2, 4, 1]), np.array([True, True, True, True, False]),
                     num_rows=4, row_length=6)
  np.testing.assert_array_equal(packed.rollout_BT, [
      [1, 1, 1, 1, 1, -1], [3, 3, 3, 3, 2, 2], [0, 0, 0, -1, -1, -1], [-1] * 6])
  np.testing.assert_array_equal(packed.position_BT, [
      [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0], [0] * 6])
  assert packed.num_rows == 3
  assert packed.num_rows.shape == ()
  assert {x.dtype for x in packed} == {np.dtype(np.int32)}


def test_the_first_row_with_room_is_taken_not_the_fullest():
  packed = pack.rows(np.array([8, 6, 6, 1]), np.ones(4, bool), num_rows=2, row_length=13)
  np.testing.assert_array_equal(packed.rollout_BT, [[0] * 8 + [3] + [-1] * 4,
                                                    [1] * 6 + [2] * 6 + [-1]])


def test_equal_lengths_keep_their_order():
  packed = pack.rows(np.full(5, 2), np.ones(5, bool), num_rows=3, row_length=4)
  np.testing.assert_array_equal(packed.rollout_BT, [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, -1, -1]])


@pytest.mark.parametrize('num_rollouts, longest, row_length, num_rows', [
    (10, 3, 8, 5), (10, 8, 8, 10), (10, 1, 8, 2), (9, 4, 8, 5), (8, 4, 8, 4), (1, 1, 100, 1),
    (0, 3, 8, 0)])
def test_max_rows_by_hand(num_rollouts, longest, row_length, num_rows):
  assert pack.max_rows(num_rollouts, longest, row_length) == num_rows


@given(step=steps())
@few(max_examples=200)
def test_every_kept_token_is_packed_once_and_in_order(step):
  length_R, keep_R, _, row_length = step
  packed = packed_of(*step)
  rollout_BT, position_BT, num_rows = packed
  assert rollout_BT.shape == position_BT.shape and rollout_BT.shape[1] == row_length
  for r, n in enumerate(length_R):
    b, t = np.nonzero(rollout_BT == r)
    if keep_R[r]:
      assert set(b) == {b[0]}  # one row
      np.testing.assert_array_equal(t, np.arange(t[0], t[0] + n))  # side by side
      np.testing.assert_array_equal(position_BT[b, t], np.arange(n))
    else:
      assert not len(b)
  assert np.count_nonzero(rollout_BT != -1) == length_R[keep_R].sum()
  assert np.all(position_BT[rollout_BT == -1] == 0)
  used_B = np.any(rollout_BT != -1, axis=1)
  np.testing.assert_array_equal(used_B, np.arange(len(used_B)) < num_rows)
  # Padding is at the end of a row.
  assert np.all(np.diff((rollout_BT == -1).astype(int), axis=1) >= 0)


@given(step=steps())
@few(max_examples=100)
def test_rows_are_those_of_first_fit_decreasing(step):
  length_R, keep_R, _, row_length = step
  packed = packed_of(*step)
  rows = first_fit_decreasing(length_R, keep_R, row_length)
  assert packed.num_rows == len(rows)
  for row, rollout_T in zip(rows, packed.rollout_BT):
    expected_T = [r for r in row for _ in range(length_R[r])]
    np.testing.assert_array_equal(rollout_T[:len(expected_T)], expected_T)


@given(step=steps())
@few(max_examples=300)
def test_no_step_needs_more_than_max_rows(step):
  length_R, keep_R, longest, row_length = step
  bound = pack.max_rows(len(length_R), longest, row_length)
  # Rows to spare: packing must leave them.
  packed = pack.rows(length_R, keep_R, num_rows=bound + 5, row_length=row_length)
  assert packed.num_rows <= bound


def test_max_rows_is_needed_where_all_are_the_longest():
  for longest, row_length in ((3, 8), (5, 8), (8, 8), (1, 8)):
    packed = packed_of(np.full(13, longest), np.ones(13, bool), longest, row_length)
    assert packed.num_rows == pack.max_rows(13, longest, row_length)


def test_nothing_kept_is_all_padding():
  packed = pack.rows(np.array([3, 2]), np.zeros(2, bool), num_rows=2, row_length=4)
  np.testing.assert_array_equal(packed.rollout_BT, np.full((2, 4), -1))
  np.testing.assert_array_equal(packed.position_BT, np.zeros((2, 4)))
  assert packed.num_rows == 0
  empty = pack.rows(np.zeros(0, np.int32), np.zeros(0, bool), num_rows=0, row_length=4)
  assert empty.rollout_BT.shape == (0, 4) and empty.num_rows == 0


def test_the_same_rollouts_pack_the_same():
  rng = np.random.default_rng(0)
  length_R, keep_R = rng.integers(1, 9, 64), rng.random(64) < 0.7
  before = length_R.copy(), keep_R.copy()
  first, second = (packed_of(length_R, keep_R, 8, 20) for _ in range(2))
  for x, y in zip(first, second):
    np.testing.assert_array_equal(x, y)
  for x, y in zip(before, (length_R, keep_R)):
    np.testing.assert_array_equal(x, y)


def test_a_row_too_short_for_the_longest():
  with pytest.raises(ValueError, match=r'pack\.row_length=7 .*8 tokens'):
    pack.max_rows(4, 8, 7)


def test_too_few_rows():
  with pytest.raises(ValueError, match='rollout 0 of 3 tokens fits none of 1 rows of 6'):
    pack.rows(np.array([3, 4]), np.ones(2, bool), num_rows=1, row_length=6)
  with pytest.raises(ValueError, match='rollout 1 of 7 tokens fits none of 2 rows of 6'):
    pack.rows(np.array([3, 7]), np.ones(2, bool), num_rows=2, row_length=6)
