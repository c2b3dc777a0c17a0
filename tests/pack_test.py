"""Every kept token is packed exactly once, in order, in a microbatch of its mini-batch, and within the
rows promised."""

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
  """Lengths, tasks, those to keep, and the shapes: the longest there may be is among them."""
  row_length = draw(st.integers(1, 40))
  longest = draw(st.integers(1, row_length))
  # Many of one length or near it are what a bound on rows has to fear.
  lengths = draw(st.sampled_from((st.integers(1, longest),
                                  st.integers(max(1, longest - 1), longest),
                                  st.integers(longest // 2 + 1, longest))))
  drawn = draw(st.lists(st.tuples(lengths, st.sampled_from((True, True, True, False)),
                                  st.integers(0, 6)), max_size=30))
  length_R, keep_R, task_R = (np.array([x[i] for x in drawn], dtype)
                              for i, dtype in enumerate((np.int32, bool, np.int32)))
  shape = {'minibatches': draw(st.integers(1, 4)), 'row_length': row_length,
           'microbatch_rows': draw(st.integers(1, 3))}
  return length_R, keep_R, np.sort(task_R), longest, shape


def packed_of(length_R, minibatch_R, longest, shape, more=0) -> pack.Packed:
  return pack.rows(length_R, minibatch_R, **shape,
                   microbatches=pack.max_microbatches(len(length_R), longest, **shape) + more)


# Rows.


def test_rows_by_hand():
  """Longest first: 5, then 4, then 3 that fits neither, then the 2 beside the 4; 1 is dropped."""
  packed = pack.rows(np.array([3, 5, 2, 4, 1]), np.array([0, 0, 0, 0, -1]), minibatches=1,
                     microbatches=2, microbatch_rows=2, row_length=6)
  np.testing.assert_array_equal(packed.rollout_BT, [
      [1, 1, 1, 1, 1, -1], [3, 3, 3, 3, 2, 2], [0, 0, 0, -1, -1, -1], [-1] * 6])
  np.testing.assert_array_equal(packed.position_BT, [
      [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0], [0] * 6])
  np.testing.assert_array_equal(packed.first, [0, 2])
  assert {x.dtype for x in packed} == {np.dtype(np.int32)}


def test_minibatches_by_hand():
  """The first has two rows, the second none, the third one: each begins with a microbatch of its own,
  and takes no room that another has left."""
  packed = pack.rows(np.array([3, 4, 1, 2]), np.array([0, 0, 2, 2]), minibatches=3, microbatches=5,
                     microbatch_rows=2, row_length=5)
  np.testing.assert_array_equal(packed.first, [0, 1, 1, 2])
  np.testing.assert_array_equal(packed.rollout_BT, [
      [1, 1, 1, 1, -1], [0, 0, 0, -1, -1], [3, 3, 2, -1, -1]] + [[-1] * 5] * 7)


def test_the_first_row_with_room_is_taken_not_the_fullest():
  packed = pack.rows(np.array([8, 6, 6, 1]), np.zeros(4, int), minibatches=1, microbatches=1,
                     microbatch_rows=2, row_length=13)
  np.testing.assert_array_equal(packed.rollout_BT, [[0] * 8 + [3] + [-1] * 4,
                                                    [1] * 6 + [2] * 6 + [-1]])


def test_equal_lengths_keep_their_order():
  packed = pack.rows(np.full(5, 2), np.zeros(5, int), minibatches=1, microbatches=3,
                     microbatch_rows=1, row_length=4)
  np.testing.assert_array_equal(packed.rollout_BT, [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, -1, -1]])


@pytest.mark.parametrize('num_rollouts, longest, row_length, minibatches, microbatch_rows, want', [
    (10, 3, 8, 1, 1, 5), (10, 8, 8, 1, 1, 10), (10, 1, 8, 1, 1, 2), (9, 4, 8, 1, 1, 5),
    (8, 4, 8, 1, 1, 4), (1, 1, 100, 1, 1, 1), (0, 3, 8, 1, 1, 0),
    # 10 rows of one rollout: 3 + 3 + 3 + 1.
    (10, 8, 8, 1, 3, 4),
    # 7 + 1 + 1 + 1 in microbatches of 4: 2 + 1 + 1 + 1.
    (10, 8, 8, 4, 4, 5),
    # More mini-batches than rollouts.
    (3, 8, 8, 9, 1, 3)])
def test_max_microbatches_by_hand(num_rollouts, longest, row_length, minibatches, microbatch_rows, want):
  assert pack.max_microbatches(num_rollouts, longest, minibatches=minibatches, row_length=row_length,
                               microbatch_rows=microbatch_rows) == want


@given(step=steps())
@few(max_examples=200)
def test_every_kept_token_is_packed_once_and_in_order(step):
  length_R, keep_R, task_R, longest, shape = step
  minibatch_R = pack.assign(task_R, length_R, keep_R, minibatches=shape['minibatches'])
  rollout_BT, position_BT, first = packed_of(length_R, minibatch_R, longest, shape)
  assert rollout_BT.shape == position_BT.shape and rollout_BT.shape[1] == shape['row_length']
  microbatch_B = np.arange(len(rollout_BT)) // shape['microbatch_rows']
  for r, n in enumerate(length_R):
    b, t = np.nonzero(rollout_BT == r)
    if keep_R[r]:
      assert set(b) == {b[0]}  # one row
      np.testing.assert_array_equal(t, np.arange(t[0], t[0] + n))  # side by side
      np.testing.assert_array_equal(position_BT[b, t], np.arange(n))
      u = minibatch_R[r]
      assert first[u] <= microbatch_B[b[0]] < first[u + 1]
    else:
      assert not len(b)
  assert np.count_nonzero(rollout_BT != -1) == length_R[keep_R].sum()
  assert np.all(position_BT[rollout_BT == -1] == 0)
  # No microbatch is without rollouts, from the first to the end.
  used = {m for m, row_T in zip(microbatch_B, rollout_BT) if np.any(row_T != -1)}
  assert used == set(range(first[-1])) and first[0] == 0 and np.all(np.diff(first) >= 0)
  # Padding is at the end of a row.
  assert np.all(np.diff((rollout_BT == -1).astype(int), axis=1) >= 0)


@given(step=steps())
@few(max_examples=100)
def test_rows_are_those_of_first_fit_decreasing(step):
  length_R, keep_R, task_R, longest, shape = step
  minibatch_R = pack.assign(task_R, length_R, keep_R, minibatches=shape['minibatches'])
  packed = packed_of(length_R, minibatch_R, longest, shape)
  for u in range(shape['minibatches']):
    rows = first_fit_decreasing(length_R, minibatch_R == u, shape['row_length'])
    begin, end = packed.first[u:u + 2]
    assert end - begin == -(-len(rows) // shape['microbatch_rows'])
    for row, rollout_T in zip(rows, packed.rollout_BT[begin * shape['microbatch_rows']:]):
      expected_T = [r for r in row for _ in range(length_R[r])]
      np.testing.assert_array_equal(rollout_T[:len(expected_T)], expected_T)
      assert np.all(rollout_T[len(expected_T):] == -1)


@given(step=steps(), data=st.data())
@few(max_examples=300)
def test_no_step_needs_more_than_max_microbatches(step, data):
  length_R, keep_R, _, longest, shape = step
  # However uneven the mini-batches are. Rows to spare: packing must leave them.
  minibatch_R = np.array([data.draw(st.integers(0, shape['minibatches'] - 1)) if keep else -1
                          for keep in keep_R], int)
  packed = packed_of(length_R, minibatch_R, longest, shape, more=3)
  assert packed.first[-1] <= pack.max_microbatches(len(length_R), longest, **shape)


def test_max_microbatches_are_needed_where_all_are_the_longest():
  for longest, row_length in ((3, 8), (5, 8), (8, 8), (1, 8)):
    shape = {'minibatches': 1, 'row_length': row_length, 'microbatch_rows': 2}
    packed = packed_of(np.full(13, longest), np.zeros(13, int), longest, shape)
    assert packed.first[-1] == pack.max_microbatches(13, longest, **shape)


def test_nothing_kept_is_all_padding():
  shape = {'minibatches': 2, 'microbatch_rows': 1, 'row_length': 4}
  packed = pack.rows(np.array([3, 2]), np.full(2, -1), microbatches=2, **shape)
  np.testing.assert_array_equal(packed.rollout_BT, np.full((2, 4), -1))
  np.testing.assert_array_equal(packed.position_BT, np.zeros((2, 4)))
  np.testing.assert_array_equal(packed.first, [0, 0, 0])
  assert pack.waste(packed, 1) == 0
  empty = pack.rows(np.zeros(0, np.int32), np.zeros(0, int), microbatches=0, **shape)
  assert empty.rollout_BT.shape == (0, 4) and not empty.first.any()


def test_the_same_rollouts_pack_the_same():
  rng = np.random.default_rng(0)
  length_R, minibatch_R = rng.integers(1, 9, 64), rng.integers(-1, 2, 64)
  before = length_R.copy(), minibatch_R.copy()
  shape = {'minibatches': 2, 'microbatch_rows': 2, 'row_length': 20}
  first, second = (packed_of(length_R, minibatch_R, 8, shape) for _ in range(2))
  for x, y in zip(first, second):
    np.testing.assert_array_equal(x, y)
  for x, y in zip(before, (length_R, minibatch_R)):
    np.testing.assert_array_equal(x, y)


def test_a_row_too_short_for_the_longest():
  with pytest.raises(ValueError, match=r'pack\.row_length=7 .*8 tokens'):
    pack.max_microbatches(4, 8, minibatches=1, row_length=7, microbatch_rows=1)


def test_too_few_rows():
  shape = {'minibatches': 1, 'microbatch_rows': 1, 'row_length': 6}
  with pytest.raises(ValueError, match='rollout 0 of 3 tokens fits none of 1 rows of 6'):
    pack.rows(np.array([3, 4]), np.zeros(2, int), microbatches=1, **shape)
  with pytest.raises(ValueError, match='rollout 1 of 7 tokens fits none of 2 rows of 6'):
    pack.rows(np.array([3, 7]), np.zeros(2, int), microbatches=2, **shape)


# Mini-batches.


def test_assign_by_hand():
  """Tasks of 5, 4, 3, 3 and 0 tokens kept, into two: 5 | 4, then 3 to the 4, then 3 to the 5."""
  minibatch_R = pack.assign(np.array([0, 1, 1, 2, 3, 3, 4]), np.array([3, 2, 2, 5, 1, 2, 9]),
                            np.array([True] * 6 + [False]), minibatches=2)
  np.testing.assert_array_equal(minibatch_R, [1, 1, 1, 0, 0, 0, -1])


def test_more_minibatches_than_tasks_leave_some_empty():
  minibatch_R = pack.assign(np.array([0, 0, 1]), np.array([1, 1, 5]), np.ones(3, bool), minibatches=4)
  np.testing.assert_array_equal(minibatch_R, [1, 1, 0])
  assert not len(pack.assign(np.zeros(0, int), np.zeros(0, int), np.zeros(0, bool), minibatches=2))


@given(step=steps())
@few(max_examples=200)
def test_minibatches_are_whole_tasks_and_balanced(step):
  length_R, keep_R, task_R, _, shape = step
  m = shape['minibatches']
  minibatch_R = pack.assign(task_R, length_R, keep_R, minibatches=m)
  np.testing.assert_array_equal(minibatch_R == -1, ~keep_R)
  assert np.all((minibatch_R >= -1) & (minibatch_R < m))
  tokens_M = np.bincount(task_R[keep_R], weights=length_R[keep_R], minlength=7)
  for task in range(7):
    assert len(set(minibatch_R[keep_R & (task_R == task)])) <= 1
  tokens_of = np.bincount(minibatch_R[keep_R], weights=length_R[keep_R], minlength=m)
  assert tokens_of.max() - tokens_of.min() <= tokens_M.max()


# Padding.


def test_waste_by_hand():
  """Of two microbatches of two rows of 6 tokens, 14 hold some."""
  packed = pack.rows(np.array([3, 5, 2, 4]), np.zeros(4, int), minibatches=1, microbatches=3,
                     microbatch_rows=2, row_length=6)
  assert pack.waste(packed, 2) == pytest.approx(1 - 14 / 24)


def test_little_is_padding_where_lengths_are_log_normal():
  """Completions of median 256 and sigma 1, cut off at 2048, after prompts of 64."""
  shape = {'minibatches': 1, 'row_length': 2048 + 64, 'microbatch_rows': 2}
  wasted = []
  for seed in range(20):
    rng = np.random.default_rng(seed)
    length_R = 64 + np.minimum(256 * np.exp(rng.normal(size=512)), 2048).astype(np.int32)
    packed = packed_of(length_R, np.zeros(512, int), 2048 + 64, shape)
    wasted.append(pack.waste(packed, 2))
  print(f'mean {np.mean(wasted):.3f}, most {max(wasted):.3f}')
  assert max(wasted) <= 0.05
