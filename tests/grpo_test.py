"""Advantages are those of each ragged group alone; the clip takes gradients where it says so."""

import functools
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax import grpo

few = functools.partial(settings, deadline=None)
CLIP = {'clip_low': 0.2, 'clip_high': 0.28}
NUM_TASKS, NUM_ROLLOUTS = 6, 14


kinds = pytest.mark.parametrize('kind', grpo.ADVANTAGES)


def advantage_by_loops(reward_R, task_R, num_tasks: int, kind: str, eps: float = 1e-6
                       ) -> np.ndarray:
  advantage_R = np.zeros(len(reward_R))
  for task in range(num_tasks):
    group = [r for r in range(len(reward_R)) if task_R[r] == task]
    rewards = [float(reward_R[r]) for r in group]
    if len(set(rewards)) > 1:
      n, mean = len(rewards), sum(rewards) / len(rewards)
      std = (sum((x - mean) ** 2 for x in rewards) / n) ** 0.5
      for r in group:
        of_others = (sum(rewards) - reward_R[r]) / (n - 1)
        advantage_R[r] = ((reward_R[r] - mean) / (std + eps) if kind == 'std'
                          else reward_R[r] - of_others)
  return advantage_R


def loss_by_hand(logp: float, old_logp: float, advantage: float) -> tuple[float, bool]:
  ratio = np.exp(logp - old_logp)
  if advantage > 0 and ratio > 1.28:
    return -1.28 * advantage, True
  if advantage < 0 and ratio < 0.8:
    return -0.8 * advantage, True
  return -ratio * advantage, False


# Any order, any sizes: most draws leave some task without rollouts and some with one.
groups = st.lists(st.integers(0, NUM_TASKS - 1), min_size=NUM_ROLLOUTS,
                  max_size=NUM_ROLLOUTS).map(lambda x: np.array(x, np.int32))
rewards = (st.sampled_from([(0, 1), (0, 0, 0, 1), (0.7,), (-1, 0.3, 0.7, 2)])
           .flatmap(lambda values: st.lists(st.sampled_from(values), min_size=NUM_ROLLOUTS,
                                            max_size=NUM_ROLLOUTS))
           .map(lambda x: np.array(x, np.float32)))


# Advantages.


def test_advantage_by_hand():
  """One right of four, one alone, none, all right, all wrong, one of two."""
  task_R = np.array([0, 0, 0, 0, 1, 3, 3, 4, 4, 4, 5, 5], np.int32)
  reward_R = np.array([0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1], np.float32)
  advantage_R = grpo.advantage(reward_R, task_R, 6)
  third = 3 ** -0.5
  np.testing.assert_allclose(
      advantage_R, [-third, 3 * third, -third, -third, 0, 0, 0, 0, 0, 0, -1, 1], rtol=1e-5)
  assert advantage_R.dtype == jnp.float32


def test_leave_one_out_advantage_by_hand():
  """Of each reward the mean of the others; the groups of the test above."""
  task_R = np.array([0, 0, 0, 0, 1, 3, 3, 4, 4, 4, 5, 5], np.int32)
  reward_R = np.array([0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1], np.float32)
  np.testing.assert_allclose(
      grpo.advantage(reward_R, task_R, 6, kind='loo'),
      [-1 / 3, 1, -1 / 3, -1 / 3, 0, 0, 0, 0, 0, 0, -1, 1], rtol=1e-6)


@kinds
def test_what_is_no_rollout_has_no_advantage_and_changes_none(kind):
  task_R = np.array([0, 0, 1, 1, 1, 2, 2], np.int32)
  reward_R = np.array([0, 1, 1, 0, 0, 5, 7], np.float32)
  advantage_R = np.asarray(grpo.advantage(reward_R, task_R, 2, kind=kind))
  np.testing.assert_array_equal(advantage_R[5:], [0, 0])
  np.testing.assert_array_equal(
      advantage_R[:5], grpo.advantage(reward_R[:5], task_R[:5], 2, kind=kind))
  np.testing.assert_array_equal(grpo.mixed_tasks(reward_R, task_R, 2), [True, True])


@pytest.mark.parametrize('p, budget', [(0.05, 8), (0.5, 3), (0.9, 20)])
def test_leave_one_out_pushes_by_the_budget_times_the_gradient(p, budget):
  """E[sum A_r (v_r - p)] = N p (1-p), by enumeration; with 'std' it is not proportional to N."""
  push = {'loo': 0.0, 'std': 0.0}
  for k in range(budget + 1):
    verdict_R = np.float32([1] * k + [0] * (budget - k))
    chance = math.comb(budget, k) * p ** k * (1 - p) ** (budget - k)
    for kind in push:
      advantage_R = np.asarray(grpo.advantage(verdict_R, np.zeros(budget, np.int32), 1, kind=kind))
      push[kind] += chance * float(advantage_R @ (verdict_R - np.float32(p)))
  assert push['loo'] == pytest.approx(budget * p * (1 - p), rel=1e-4)
  assert push['std'] != pytest.approx(budget * p * (1 - p), rel=1e-2)


def test_advantage_eps_by_hand():
  advantage_R = grpo.advantage(np.array([0, 1], np.float32), np.zeros(2, np.int32), 1, eps=0.5)
  np.testing.assert_allclose(advantage_R, [-0.5, 0.5], rtol=1e-6)


@kinds
@pytest.mark.parametrize('reward', [0.7, 0.1, 1e6 + 0.1])
def test_groups_of_equal_rewards_have_exactly_none(kind, reward):
  """The sum of three 0.7 is not thrice 0.7 in float32."""
  for n in (3, 93):
    task_R = np.array([0, 0] + [1] * n, np.int32)
    reward_R = np.array([0, 1] + [reward] * n, np.float32)
    advantage_R = np.asarray(grpo.advantage(reward_R, task_R, 2, kind=kind))
    assert np.all(advantage_R[2:] == 0) and np.all(advantage_R[:2] != 0)


def test_advantage_of_a_rare_success_is_not_clipped():
  reward_R = np.zeros(93, np.float32)
  reward_R[40] = 1
  advantage_R = np.asarray(grpo.advantage(reward_R, np.zeros(93, np.int32), 1))
  assert advantage_R[40] == pytest.approx(92 ** 0.5, rel=1e-4)
  assert advantage_R.sum() == pytest.approx(0, abs=1e-4)


@kinds
@given(reward_R=rewards, task_R=groups)
@few(max_examples=60)
def test_advantage_is_the_loop_over_groups(kind, reward_R, task_R):
  advantage_R = np.asarray(grpo.advantage(reward_R, task_R, NUM_TASKS, kind=kind))
  np.testing.assert_allclose(advantage_R, advantage_by_loops(reward_R, task_R, NUM_TASKS, kind),
                             rtol=1e-4, atol=1e-5)
  sum_M = np.bincount(task_R, weights=advantage_R, minlength=NUM_TASKS)
  np.testing.assert_allclose(sum_M, 0, atol=1e-5)


@given(reward_R=rewards, task_R=groups, seed=st.integers(0, 2 ** 32 - 1))
@few(max_examples=30)
def test_advantage_goes_with_its_rollout_and_group(reward_R, task_R, seed):
  rng = np.random.default_rng(seed)
  order_R, name_M = rng.permutation(NUM_ROLLOUTS), rng.permutation(NUM_TASKS).astype(np.int32)
  advantage_R = np.asarray(grpo.advantage(reward_R, task_R, NUM_TASKS))
  moved_R = grpo.advantage(reward_R[order_R], name_M[task_R[order_R]], NUM_TASKS)
  np.testing.assert_allclose(moved_R, advantage_R[order_R], rtol=1e-5, atol=1e-6)


def test_advantage_with_and_without_jit():
  rng = np.random.default_rng(0)
  reward_R = rng.integers(0, 2, 40).astype(np.float32)
  compiled = jax.jit(grpo.advantage, static_argnums=2)
  for _ in range(2):
    task_R = np.sort(rng.integers(0, 9, 40)).astype(np.int32)
    np.testing.assert_allclose(compiled(reward_R, task_R, 9),
                               grpo.advantage(reward_R, task_R, 9), rtol=1e-5, atol=1e-6)
  assert compiled._cache_size() == 1  # budgets vary, shapes do not


# The clipped loss.


@pytest.mark.parametrize('ratio, advantage, loss, clipped', [
    (1.5, 1.0, -1.28, True),  # gone up far enough
    (1.5, -1.0, 1.5, False),
    (0.5, 1.0, -0.5, False),
    (0.5, -1.0, 0.8, True),  # gone down far enough
    (1.1, 2.0, -2.2, False),
    (1.1, -2.0, 2.2, False),
    (1.25, 1.0, -1.25, False),  # beyond the lower side's width, within the upper's
    (0.75, -1.0, 0.8, True),  # within the upper side's width, beyond the lower's
    (1.0, 3.0, -3.0, False),
    (1.5, 0.0, 0.0, False),
    (0.5, 0.0, 0.0, False),
])
def test_clipped_loss_by_hand(ratio, advantage, loss, clipped):
  logp = jnp.log(jnp.float32(ratio)) - 2
  f = lambda logp: grpo.clipped_loss(logp, jnp.float32(-2), jnp.float32(advantage), **CLIP)
  (value, flag), gradient = f(logp), jax.grad(lambda x: f(x)[0])(logp)
  assert value == pytest.approx(loss, rel=1e-6)
  assert bool(flag) == clipped
  assert gradient == pytest.approx(0 if clipped else -ratio * advantage, rel=1e-5, abs=1e-12)
  assert gradient == 0 or not clipped


tokens = st.tuples(st.floats(-3, 3), st.floats(-8, 0), st.floats(0.01, 4), st.booleans())


@given(drawn=st.lists(tokens, min_size=12, max_size=12))
@few(max_examples=60)
def test_clipped_loss_is_the_loop_over_tokens(drawn):
  change, old_logp, size, up = (np.array(x) for x in zip(*drawn))
  bounds = np.log([[0.8], [1.28]])
  change[np.abs(change - bounds).min(axis=0) < 1e-4] = 0  # the kinks have no one gradient
  old_BT = old_logp.reshape(3, 4).astype(np.float32)
  logp_BT = (old_BT + change.reshape(3, 4)).astype(np.float32)
  advantage_BT = np.where(up, size, -size).reshape(3, 4).astype(np.float32)
  f = lambda x_BT: grpo.clipped_loss(x_BT, old_BT, advantage_BT, **CLIP)
  loss_BT, clipped_BT = f(logp_BT)
  gradient_BT = np.asarray(jax.grad(lambda x_BT: f(x_BT)[0].sum())(logp_BT))
  for b, t in np.ndindex(3, 4):
    loss, clipped = loss_by_hand(logp_BT[b, t], old_BT[b, t], advantage_BT[b, t])
    assert loss_BT[b, t] == pytest.approx(loss, rel=1e-5)
    assert clipped_BT[b, t] == clipped
    assert gradient_BT[b, t] == pytest.approx(0 if clipped else loss, rel=1e-5)
  np.testing.assert_array_equal(gradient_BT == 0, clipped_BT)


def test_on_policy_gradient_is_that_of_the_policy():
  """At a ratio of 1 the gradient is -A whatever the clip: plain policy gradient."""
  logp_R, advantage_R = np.float32([-0.1, -3, -9]), np.float32([1.5, -0.5, 0])
  loss = lambda x_R: grpo.clipped_loss(x_R, logp_R, advantage_R, **CLIP)[0].sum()
  np.testing.assert_array_equal(jax.grad(loss)(logp_R), -advantage_R)


def test_a_clipped_token_has_no_gradient_however_far_it_went():
  loss = lambda logp: grpo.clipped_loss(logp, jnp.float32(-100), jnp.float32(1), **CLIP)[0]
  assert jax.grad(loss)(jnp.float32(-1)) == 0


def test_clipped_loss_with_and_without_jit():
  rng = np.random.default_rng(1)
  logp_BT, old_BT, advantage_BT = rng.normal(size=(3, 4, 5)).astype(np.float32)
  f = functools.partial(grpo.clipped_loss, **CLIP)
  loss_BT, clipped_BT = f(logp_BT, old_BT, advantage_BT)
  compiled_loss_BT, compiled_clipped_BT = jax.jit(f)(logp_BT, old_BT, advantage_BT)
  np.testing.assert_allclose(compiled_loss_BT, loss_BT, rtol=1e-6)
  np.testing.assert_array_equal(compiled_clipped_BT, clipped_BT)
  assert 0 < clipped_BT.sum() < clipped_BT.size


def test_an_advantage_of_another_rank_is_an_error():
  with pytest.raises(ValueError, match='rank'):
    grpo.clipped_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.ones(3), **CLIP)


# Mixed tasks.


def test_mixed_tasks_by_hand():
  task_R = np.array([0, 0, 0, 1, 3, 3, 4, 4, 5, 5, 5])
  reward_R = np.array([0, 1, 0, 1, 1, 1, 0, 0, 0.7, 0.7, 0.7], np.float32)
  mixed_M = grpo.mixed_tasks(reward_R, task_R, 6)
  assert isinstance(mixed_M, np.ndarray)
  np.testing.assert_array_equal(mixed_M, [True, False, False, False, False, False])


def test_no_rollout_no_mixed_task():
  mixed_M = grpo.mixed_tasks(np.zeros(0, np.float32), np.zeros(0, np.int32), 3)
  np.testing.assert_array_equal(mixed_M, [False] * 3)


@given(reward_R=rewards, task_R=groups)
@few(max_examples=60)
def test_mixed_tasks_are_those_with_advantages(reward_R, task_R):
  mixed_M = grpo.mixed_tasks(reward_R, task_R, NUM_TASKS)
  expected_M = [len(set(reward_R[task_R == task])) > 1 for task in range(NUM_TASKS)]
  np.testing.assert_array_equal(mixed_M, expected_M)
  np.testing.assert_array_equal(grpo.mixed_tasks(jnp.array(reward_R), jnp.array(task_R),
                                                 NUM_TASKS), expected_M)
  learns_R = np.asarray(grpo.advantage(reward_R, task_R, NUM_TASKS)) != 0
  learns_M = np.bincount(task_R, weights=learns_R, minlength=NUM_TASKS) > 0
  np.testing.assert_array_equal(learns_M, expected_M)
