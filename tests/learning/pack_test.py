"""Every token of the rollouts that are kept is computed once, stands in order in a row of a microbatch of its
mini-batch, and no more microbatches are needed than promised."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from kr_jax.learning import pack


def unshared(row_length, microbatch_rows):
  return pack.Shape(microbatch_rows, 1, row_length, row_length, False)


def by_loops(task_R, shared_R, own_R, which_R, shape: pack.Shape) -> list[list[list[int]]]:
  """The rollouts of each row of each shard of one mini-batch, token by token."""
  length_R = np.asarray(shared_R) + own_R
  which = sorted(np.flatnonzero(which_R), key=lambda r: (-length_R[r], r))
  if shape.shared:
    tasks = list(dict.fromkeys(task_R[r] for r in which))
    which = [r for task in tasks for r in which if task_R[r] == task]
  shards = []

  def computed(rows):
    rollouts = [r for row in rows for r in row]
    if not shape.shared:
      return sum(length_R[r] for r in rollouts)
    return sum(own_R[r] for r in rollouts) + sum({task_R[r]: shared_R[r] for r in rollouts}.values())

  def put(rows, r):
    """Whether a shard took it."""
    for row in rows:
      if sum(length_R[x] for x in row) + length_R[r] <= shape.row_length:
        row.append(r)
        if computed(rows) <= shape.tokens:
          return True
        row.pop()
        return False
    return False

  for r in which:
    # Those that have its prompt come first.
    known = [rows for rows in shards if task_R[r] in [task_R[x] for row in rows for x in row]]
    for rows in (known if shape.shared else []) + shards:
      if put(rows, r):
        break
    else:
      shards.append([[] for _ in range(shape.rows)])
      assert put(shards[-1], r)
  return shards


@st.composite
def steps(draw):
  """Tasks, shared and own tokens, those to keep, and the shapes: the longest there may be is in them."""
  row_length = draw(st.integers(1, 40))
  longest = draw(st.integers(1, row_length))
  longest_prompt = draw(st.integers(0, longest - 1))
  # Many segments of about one length leave the most padding.
  most = longest - longest_prompt
  owns = draw(st.sampled_from((st.integers(1, most), st.integers(max(1, most - 1), most),
                               st.integers(most // 2 + 1, most))))
  shared_M = draw(st.lists(st.integers(0, longest_prompt), min_size=7, max_size=7))
  drawn = draw(st.lists(st.tuples(owns, st.sampled_from((True, True, True, False)),
                                  st.integers(0, 6)), max_size=30))
  own_R, keep_R, task_R = (np.array([x[i] for x in drawn], dtype)
                           for i, dtype in enumerate((np.int32, bool, np.int32)))
  task_R = np.sort(task_R)
  shards, rows = draw(st.integers(1, 3)), draw(st.integers(1, 3))
  shared = draw(st.booleans())
  shape = (pack.Shape(shards, rows, row_length, draw(st.integers(longest, rows * row_length)), True)
           if shared else unshared(row_length, shards))
  return task_R, np.array(shared_M, np.int32)[task_R], own_R, keep_R, longest, {
      'minibatches': draw(st.integers(1, 4)), 'shape': shape}


def packed_of(task_R, shared_R, own_R, minibatch_R, longest, limits, more=0) -> pack.Packed:
  return pack.segments(task_R, shared_R, own_R, minibatch_R, **limits,
                       microbatches=pack.max_microbatches(len(own_R), longest, **limits) + more)


def alone(length_R, minibatch_R, **limits) -> pack.Packed:
  """Segments with nothing in common, a task each."""
  length_R = np.asarray(length_R)
  return pack.segments(np.arange(len(length_R)), 0 * length_R, length_R, np.asarray(minibatch_R), **limits)


# Without sharing.


def test_rows_by_hand():
  """Longest first: 5, then 4, then 3 that fits neither, then the 2 into the row of the 4; 1 is dropped."""
  packed = alone([3, 5, 2, 4, 1], [0, 0, 0, 0, -1], minibatches=1, microbatches=2, shape=unshared(6, 2))
  np.testing.assert_array_equal(packed.microbatches.rollout_BT, [
      [[1, 1, 1, 1, 1, -1], [3, 3, 3, 3, 2, 2]], [[0, 0, 0, -1, -1, -1], [-1] * 6]])
  np.testing.assert_array_equal(packed.microbatches.position_BT, [
      [[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 0, 1]], [[0, 1, 2, 0, 0, 0], [0] * 6]])
  np.testing.assert_array_equal(packed.first, [0, 2])
  assert packed.microbatches.rows is None
  assert {x.dtype for x in (*packed.microbatches[:2], packed.first)} == {np.dtype(np.int32)}


def test_minibatches_by_hand():
  """The first has two rows, the second none, the third one: each begins with a microbatch of its own,
  and takes no room that another has left."""
  packed = alone([3, 4, 1, 2], [0, 0, 2, 2], minibatches=3, microbatches=5, shape=unshared(5, 2))
  np.testing.assert_array_equal(packed.first, [0, 1, 1, 2])
  np.testing.assert_array_equal(packed.microbatches.rollout_BT.reshape(10, 5), [
      [1, 1, 1, 1, -1], [0, 0, 0, -1, -1], [3, 3, 2, -1, -1]] + [[-1] * 5] * 7)


def test_the_first_row_with_room_is_taken_not_the_fullest():
  packed = alone([8, 6, 6, 1], np.zeros(4, int), minibatches=1, microbatches=1, shape=unshared(13, 2))
  np.testing.assert_array_equal(packed.microbatches.rollout_BT[0], [[0] * 8 + [3] + [-1] * 4,
                                                                    [1] * 6 + [2] * 6 + [-1]])


def test_equal_lengths_keep_their_order():
  packed = alone(np.full(5, 2), np.zeros(5, int), minibatches=1, microbatches=3, shape=unshared(4, 1))
  np.testing.assert_array_equal(packed.microbatches.rollout_BT[:, 0],
                                [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, -1, -1]])


# Shared prompts.


def test_a_shared_prompt_by_hand():
  """Task 0 has 2 tokens in common and rollouts of 1 and 3 more, task 1 of one rollout 1 and 2. A shard
  has two rows of 6 positions, and computes 9 tokens: prompt and own of rollout 1, own of 0, all of 2."""
  packed = pack.segments(
      np.array([0, 0, 1]), np.array([2, 2, 1]), np.array([1, 3, 2]), np.zeros(3, int), minibatches=1,
      microbatches=1, shape=pack.Shape(1, 2, 6, 9, True))
  m = packed.microbatches
  np.testing.assert_array_equal(m.rollout_BT, [[[1, 1, 1, 1, 1, 0, 2, 2, 2]]])
  np.testing.assert_array_equal(m.position_BT, [[[0, 1, 2, 3, 4, 2, 0, 1, 2]]])
  np.testing.assert_array_equal(m.rows.segment_GS, [[[1, 1, 1, 1, 1, -1], [0, 0, 0, 2, 2, 2]]])
  np.testing.assert_array_equal(m.rows.source_GS, [[[0, 1, 2, 3, 4, 0], [0, 1, 5, 6, 7, 8]]])
  np.testing.assert_array_equal(m.rows.place_BT, [[[0, 1, 2, 3, 4, 8, 9, 10, 11]]])
  np.testing.assert_array_equal(packed.first, [0, 1])
  assert pack.waste(packed) == {'padding_waste': 0, 'attention_waste': pytest.approx(1 / 12)}
  assert pack.positions(packed) == (9, 0)
  assert {x.dtype for x in (*m[:2], *m.rows)} == {np.dtype(np.int32)}


def test_a_task_goes_on_where_its_prompt_is():
  """Rollouts of 1 + 2: two fill the first shard of 5 tokens, the third and fourth the second. Task 1,
  of 1 + 1, finds no room in either; its second follows its first."""
  task_R = np.array([0, 0, 0, 0, 1, 1])
  packed = pack.segments(
      task_R, np.ones(6, int), np.array([2, 2, 2, 2, 1, 1]), np.zeros(6, int), minibatches=1,
      microbatches=3, shape=pack.Shape(1, 2, 4, 5, True))
  np.testing.assert_array_equal(packed.microbatches.rollout_BT[:, 0], [
      [0, 0, 0, 1, 1], [2, 2, 2, 3, 3], [4, 4, 5, -1, -1]])


# Either.


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
  assert pack.max_microbatches(num_rollouts, longest, minibatches=minibatches,
                               shape=unshared(row_length, microbatch_rows)) == want


@pytest.mark.parametrize('tokens, rows, want', [
    (8, 2, 10),  # one that is computed at full length
    (24, 2, 5),  # two rows of one each
    (16, 1, 10), (17, 4, 5)])
def test_max_microbatches_are_bounded_by_tokens_and_by_rows(tokens, rows, want):
  assert pack.max_microbatches(10, 8, minibatches=1,
                               shape=pack.Shape(1, rows, 12, tokens, True)) == want


def check_tokens(step):
  task_R, shared_R, own_R, keep_R, longest, limits = step
  shape = limits['shape']
  minibatch_R = pack.assign(task_R, shared_R + own_R, keep_R, minibatches=limits['minibatches'])
  packed = packed_of(task_R, shared_R, own_R, minibatch_R, longest, limits)
  m, first = packed.microbatches, packed.first
  I, B, T = m.rollout_BT.shape
  assert (B, T) == (shape.shards, shape.tokens) and m.position_BT.shape == (I, B, T)
  if m.rows is None:
    assert not shape.shared
    segment, source = m.rollout_BT[:, :, None], np.broadcast_to(np.arange(T), (I, B, 1, T))
    place = np.broadcast_to(np.arange(T), (I, B, T))
  else:
    of_shard = lambda x: x.reshape(I, B, shape.rows, shape.row_length)
    segment, source, place = of_shard(m.rows.segment_GS), of_shard(m.rows.source_GS), m.rows.place_BT
  # Segments: whole, in order, of tokens that are the rollout's own or its task's.
  for r in range(len(task_R)):
    i, b, g, s = np.nonzero(segment == r)
    n = shared_R[r] + own_R[r] if keep_R[r] else 0
    np.testing.assert_array_equal(s, s[:1] + np.arange(n))
    if n:
      assert len({*zip(i, b, g)}) == 1 and first[minibatch_R[r]] <= i[0] < first[minibatch_R[r] + 1]
      token = source[i, b, g, s]
      np.testing.assert_array_equal(m.position_BT[i, b, token], np.arange(n))
      of_R = m.rollout_BT[i, b, token]
      np.testing.assert_array_equal(task_R[of_R], task_R[r])
      np.testing.assert_array_equal(of_R[shared_R[r]:], r)
  # Tokens: none twice in a shard, own ones nowhere else, and each at its place.
  i, b, t = np.nonzero(m.rollout_BT >= 0)
  r, position = m.rollout_BT[i, b, t], m.position_BT[i, b, t]
  common = shape.shared & (position < shared_R[r])
  once = {*zip(i, b, np.where(common, -task_R[r] - 1, r), position)}
  assert len(once) == len(r) and np.count_nonzero(~common) == (
      own_R + (0 if shape.shared else shared_R))[keep_R].sum()
  for i, b, t in zip(i, b, t):
    assert place[i, b, t] in np.flatnonzero((source[i, b] == t) & (segment[i, b] >= 0))
  # No microbatch is without rollouts, from the first to the end; padding is at the ends.
  used_I = np.any(m.rollout_BT >= 0, axis=(1, 2))
  assert np.all(used_I[:first[-1]]) and not np.any(used_I[first[-1]:])
  assert first[0] == 0 and np.all(np.diff(first) >= 0)
  for x in (m.rollout_BT, segment):
    assert np.all(np.diff((x == -1).astype(int), axis=-1) >= 0)
  assert np.all(m.position_BT[m.rollout_BT == -1] == 0)


def check_first_fit(step):
  task_R, shared_R, own_R, keep_R, longest, limits = step
  shape = limits['shape']
  minibatch_R = pack.assign(task_R, shared_R + own_R, keep_R, minibatches=limits['minibatches'])
  packed = packed_of(task_R, shared_R, own_R, minibatch_R, longest, limits)
  m = packed.microbatches
  segment = m.rollout_BT if m.rows is None else m.rows.segment_GS
  segment = segment.reshape(-1, shape.rows, shape.row_length)  # by shard
  for u in range(limits['minibatches']):
    shards = by_loops(task_R, shared_R, own_R, minibatch_R == u, shape)
    begin, end = packed.first[u:u + 2]
    assert end - begin == -(-len(shards) // shape.shards)
    for rows, found in zip(shards, segment[begin * shape.shards:]):
      for row, rollout_S in zip(rows, found, strict=True):
        expected_S = [r for r in row for _ in range(shared_R[r] + own_R[r])]
        np.testing.assert_array_equal(rollout_S[:len(expected_S)], expected_S)
        assert np.all(rollout_S[len(expected_S):] == -1)


def check_microbatches(step, data):
  task_R, shared_R, own_R, keep_R, longest, limits = step
  # However uneven the mini-batches are. Microbatches to spare: packing must leave them.
  minibatch_R = np.array([data.draw(st.integers(0, limits['minibatches'] - 1)) if keep else -1
                          for keep in keep_R], int)
  packed = packed_of(task_R, shared_R, own_R, minibatch_R, longest, limits, more=3)
  assert packed.first[-1] <= pack.max_microbatches(len(own_R), longest, **limits)


@given(step=steps(), data=st.data())
def test_a_step(step, data):
  """Tokens stand where they should, rows are those of first fit decreasing, and microbatches suffice."""
  check_tokens(step)
  check_first_fit(step)
  check_microbatches(step, data)


@pytest.mark.exhaustive
@settings(max_examples=1000)
@given(step=steps(), data=st.data())
def test_many_steps(step, data):
  check_tokens(step)
  check_first_fit(step)
  check_microbatches(step, data)


def test_max_microbatches_are_needed_where_all_are_the_longest():
  for longest, row_length in ((3, 8), (5, 8), (8, 8), (1, 8)):
    for shape in (unshared(row_length, 2), pack.Shape(2, 1, row_length, row_length, True)):
      limits = {'minibatches': 1, 'shape': shape}
      packed = packed_of(np.arange(13), np.zeros(13, int), np.full(13, longest), np.zeros(13, int),
                         longest, limits)
      assert packed.first[-1] == pack.max_microbatches(13, longest, **limits)


@pytest.mark.parametrize('shape', [unshared(4, 1), pack.Shape(1, 2, 4, 6, True)])
def test_nothing_kept_is_all_padding(shape):
  packed = alone([3, 2], np.full(2, -1), minibatches=2, microbatches=2, shape=shape)
  np.testing.assert_array_equal(packed.microbatches.rollout_BT, np.full((2, 1, shape.tokens), -1))
  np.testing.assert_array_equal(packed.microbatches.position_BT, np.zeros((2, 1, shape.tokens)))
  np.testing.assert_array_equal(packed.first, [0, 0, 0])
  assert pack.waste(packed) == {'padding_waste': 0, 'attention_waste': 0} and pack.positions(packed) == (0, 0)
  empty = alone(np.zeros(0, np.int32), np.zeros(0, int), minibatches=2, microbatches=0, shape=shape)
  assert empty.microbatches.rollout_BT.shape == (0, 1, shape.tokens) and not empty.first.any()


@pytest.mark.parametrize('shape', [unshared(20, 2), pack.Shape(1, 2, 20, 30, True)])
def test_the_same_rollouts_pack_the_same(shape):
  rng = np.random.default_rng(0)
  own_R, minibatch_R = rng.integers(1, 6, 64), rng.integers(-1, 2, 64)
  task_R = np.repeat(np.arange(16), 4)
  shared_R = task_R % 4
  before = own_R.copy(), minibatch_R.copy()
  first, second = (packed_of(task_R, shared_R, own_R, minibatch_R, 8,
                             {'minibatches': 2, 'shape': shape}) for _ in range(2))
  for x, y in zip((*first.microbatches[:2], first.first, *(first.microbatches.rows or ())),
                  (*second.microbatches[:2], second.first, *(second.microbatches.rows or ()))):
    np.testing.assert_array_equal(x, y)
  for x, y in zip(before, (own_R, minibatch_R)):
    np.testing.assert_array_equal(x, y)


# Shapes.


def shape_of(**changed):
  return pack.shape(**{'prompt_length': 64, 'completion_length': 64, 'rollouts_per_task': 8,
                       'row_length': 128, 'microbatch_rows': 16, 'prompt_sharing': 0.0, 'shards': 1} | changed)


def test_shapes_by_hand():
  """Full groups of 8 compute 63 + 512 of 8 x 127 tokens: of 16 x 128 positions 1159.06, in sixteens."""
  assert shape_of() == pack.Shape(1, 16, 128, 1168, True)
  assert shape_of(shards=4, microbatch_rows=4) == pack.Shape(4, 4, 128, 304, True)
  assert shape_of(shards=4, prompt_sharing=1.0) == unshared(128, 64)
  assert shape_of(prompt_sharing=0.25) == pack.Shape(1, 16, 128, 512, True)
  assert shape_of(prompt_sharing=1.0) == unshared(128, 16)
  # The longest must fit, and there are no more tokens than positions.
  assert shape_of(prompt_sharing=0.01).tokens == 127
  assert shape_of(prompt_sharing=0.99, microbatch_rows=1).tokens == 128
  # A rollout alone has nothing to share; long completions have little: (63 + 16 x 256) / (16 x 319).
  assert shape_of(rollouts_per_task=1) == shape_of(rollouts_per_task=0.5) == unshared(128, 16)
  assert shape_of(completion_length=256, rollouts_per_task=16, row_length=320) == unshared(320, 16)


def test_a_row_too_short_for_the_longest():
  with pytest.raises(ValueError, match=r'pack\.row_length=126 .*127 tokens'):
    shape_of(row_length=126)
  assert shape_of(row_length=127).row_length == 127


def test_too_few_microbatches():
  limits = {'minibatches': 1, 'shape': unshared(6, 1)}
  with pytest.raises(ValueError, match='rollout 0 of 3 tokens fits none of 1 times 1 rows of 6, .* pass more'):
    alone([3, 4], np.zeros(2, int), microbatches=1, **limits)
  with pytest.raises(ValueError, match='rollout 1 of 7 tokens fits none of 2 times 1 rows of 6'):
    alone([3, 7], np.zeros(2, int), microbatches=2, **limits)


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
def test_minibatches_are_whole_tasks_and_balanced(step):
  task_R, shared_R, own_R, keep_R, _, limits = step
  m, length_R = limits['minibatches'], shared_R + own_R
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
  packed = alone([3, 5, 2, 4], np.zeros(4, int), minibatches=1, microbatches=3, shape=unshared(6, 2))
  share = pytest.approx(1 - 14 / 24)
  assert pack.waste(packed) == {'padding_waste': share, 'attention_waste': share}
  assert pack.positions(packed) == (14, 10)


def test_little_is_padding_where_lengths_are_log_normal():
  """Completions of median 256 and sigma 1, cut off at 2048, after prompts of 64."""
  limits = {'minibatches': 1, 'shape': shape_of(
      completion_length=2048, row_length=2048 + 64, microbatch_rows=2)}
  wasted = []
  for seed in range(20):
    rng = np.random.default_rng(seed)
    own_R = np.minimum(256 * np.exp(rng.normal(size=512)), 2048).astype(np.int32)
    packed = packed_of(np.arange(512) // 8, np.full(512, 63), own_R, np.zeros(512, int), 2048 + 63, limits)
    wasted.append(pack.waste(packed)['padding_waste'])
  print(f'mean {np.mean(wasted):.3f}, most {max(wasted):.3f}')
  assert max(wasted) <= 0.05


def test_little_is_padding_where_prompts_are_shared():
  """Groups of 2 to 30 after prompts of 512, completions of median 128 and sigma 0.5, cut off at 512."""
  limits = {'minibatches': 1, 'shape': shape_of(
      prompt_length=512, completion_length=512, row_length=2048, microbatch_rows=8, prompt_sharing=0.3)}
  wasted, saved = [], []
  for seed in range(20):
    rng = np.random.default_rng(seed)
    task_R = np.repeat(np.arange(32), rng.multinomial(512 - 64, rng.dirichlet(np.ones(32))) + 2)
    own_R = np.minimum(128 * np.exp(0.5 * rng.normal(size=512)), 512).astype(np.int32)
    shared_R = rng.integers(200, 512, 32)[task_R]
    packed = packed_of(task_R, shared_R, own_R, np.zeros(512, int), 1023, limits)
    wasted.append(pack.waste(packed)['padding_waste'])
    computed = np.count_nonzero(packed.microbatches.rollout_BT >= 0)
    saved.append(1 - computed / (shared_R + own_R).sum())
  print(f'mean {np.mean(wasted):.3f}, most {max(wasted):.3f}, saved {np.mean(saved):.3f}')
  assert max(wasted) <= 0.1 and min(saved) > 0.5
