"""Queues of shards: equal, of few tasks, and each task's prefix where a rollout needs it."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np

from kr_jax import queues as queues_lib


@st.composite
def budgets(draw):
  budget_M = draw(st.lists(st.integers(0, draw(st.sampled_from((1, 3, 40)))), min_size=1, max_size=24))
  return np.array(budget_M), draw(st.integers(1, 9)), draw(st.integers(0, 9))


@given(drawn=budgets(), seed=st.integers(0, 99))
@settings(max_examples=100)
def test_shards_have_equal_queues_of_few_tasks(drawn, seed):
  budget_M, shards, beyond = drawn
  M, n = len(budget_M), budget_M.sum()
  expected_M = np.random.default_rng(seed).integers(0, 5, M)
  q = queues_lib.assign_to_queues(budget_M, total=n + beyond, shards=shards, expected_M=expected_M)
  assert q.task_ZK.shape == (shards, min(M, -(-M // shards) + (shards > 1)))
  assert q.local_ZQ.shape == q.number_ZQ.shape == (shards, -(-(n + beyond) // shards))
  assert q.rollouts_Z.sum() == n and np.ptp(q.rollouts_Z) <= 1
  seen = []
  for z in range(shards):
    k, end = q.tasks_Z[z], q.rollouts_Z[z]
    assert len(set(q.task_ZK[z, :k])) == k
    assert set(q.local_ZQ[z, :end]) == set(range(k))  # no prefix without a rollout
    task_Q = q.task_ZK[z][q.local_ZQ[z, :end]]
    seen += zip(task_Q.tolist(), q.number_ZQ[z, :end].tolist())
    assert np.all(np.diff(expected_M[task_Q]) <= 0)  # the longest first
  assert sorted(seen) == [(m, i) for m in range(M) for i in range(budget_M[m])]


def test_places_by_hand():
  """Of 1, 2, 3 and 6 rollouts each shard takes two tasks that hold 6: the 6 and the 3, and gives back 3
  of the 6; what is left are pieces of 1, 2 and 3."""
  q = queues_lib.assign_to_queues(np.array([1, 6, 2, 3]), total=12, shards=2)
  assert q.task_ZK.tolist() == [[1, 3, 0], [0, 1, 2]]
  assert q.tasks_Z.tolist() == [2, 3] and q.rollouts_Z.tolist() == [6, 6]
  assert q.local_ZQ.tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]]
  assert q.number_ZQ.tolist() == [[0, 1, 2, 0, 1, 2], [0, 3, 4, 5, 0, 1]]


# Prefixes of later waves.


@given(drawn=budgets(), seed=st.integers(0, 99))
@settings(max_examples=100)
def test_every_prefix_is_held_wave_after_wave(drawn, seed):
  """Places that hold numbers of tasks, three times moved: each rollout finds its task's."""
  budget_M, shards, beyond = drawn
  M, rng = len(budget_M), np.random.default_rng(seed)
  total = budget_M.sum() + beyond
  q = queues_lib.assign_to_queues(budget_M, total=total, shards=shards)
  width = q.task_ZK.shape[1] + seed % 3  # places beyond K hold nothing
  held = np.full((shards, width), -1)
  for z, k in enumerate(q.tasks_Z):
    held[z, :k] = q.task_ZK[z, :k]  # what the first wave reads
  place_M = queues_lib.places(q, M, width=width)
  for _ in range(3):
    more_M = rng.multinomial(rng.integers(0, total + 1), rng.dirichlet(np.ones(M))) * (budget_M > 0)
    before = queues_lib.assign_to_queues(more_M, total=total, shards=shards)
    q = queues_lib.hold_all(before, M)
    assert all(getattr(q, name) is getattr(before, name) for name in ('local_ZQ', 'number_ZQ', 'rollouts_Z'))
    held[:, :q.task_ZK.shape[1]] = held.ravel()[place_M[q.task_ZK]]
    place_M = queues_lib.places(q, M, width=width)
    read = np.flatnonzero(budget_M)
    assert held.ravel()[place_M[read]].tolist() == read.tolist()
    for z, end in enumerate(q.rollouts_Z):
      assert held[z, q.local_ZQ[z, :end]].tolist() == before.task_ZQ[z, :end].tolist()


def test_idle_tasks_take_the_places_that_are_left_by_hand():
  """Of four tasks the second alone has rollouts, one on each of two shards of three places; places count them."""
  q = queues_lib.hold_all(queues_lib.assign_to_queues(np.array([0, 2, 0, 0]), total=6, shards=2), 4)
  assert q.task_ZK.tolist() == [[1, 0, 2], [1, 3, 0]] and q.tasks_Z.tolist() == [3, 2]
  assert queues_lib.places(q, 4, width=5).tolist() == [1, 5, 2, 6]
