"""Advantages are those of each ragged group alone, a task weighs what was decided, and a bound takes
the gradient where it says so."""

import functools
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from kr_jax import knobs as knobs_lib
from kr_jax.learning import grpo
from tests import knobs

few = functools.partial(settings, deadline=None)
NUM_TASKS, NUM_ROLLOUTS = 6, 14


kinds = pytest.mark.parametrize('kind', knobs_lib.Grpo.choices('advantage'))
weighings = pytest.mark.parametrize(
    'weight, aggregate', [(w, a) for w in knobs_lib.Grpo.choices('weight') for a in knobs_lib.Grpo.choices('aggregate')])


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
        advantage_R[r] = {'std': (reward_R[r] - mean) / (std + eps), 'loo': reward_R[r] - of_others,
                          'mean': reward_R[r] - mean}[kind]
  return advantage_R


def weights_by_loops(task_R, length_R, num_tasks: int, weight: str, aggregate: str,
                     completion_length: int) -> np.ndarray:
  """Of the loss as a mean: what each term counts, over what all count."""
  weight_R, total = np.zeros(len(task_R)), 0.0
  for task in range(num_tasks):
    group = [r for r in range(len(task_R)) if task_R[r] == task and length_R[r]]
    for r in group:
      of_task = {'rollout': len(group), 'task': 1, 'sqrt': len(group) ** 0.5}[weight]
      of_rollout = of_task / len(group)
      weight_R[r] = of_rollout / {'token': 1, 'rollout': length_R[r],
                                  'constant': completion_length}[aggregate]
      total += of_rollout * (length_R[r] if aggregate == 'token' else 1)
  return weight_R / total if total else weight_R


def loss_by_hand(ratio: float, logp: float, advantage: float, c: knobs_lib.Grpo
                 ) -> tuple[float, float, float, bool, bool]:
  """A token's loss, its derivatives by the log ratio and by logp, and the bounds that took either."""
  up, down = 1 + c.clip_high, 1 - c.clip_low
  if c.loss == 'cispo':
    bounded = min(max(ratio, down), up)
    return -bounded * advantage * logp, 0.0, -bounded * advantage, ratio < down, ratio > up
  if advantage > 0 and ratio > up:
    return -up * advantage, 0.0, 0.0, False, True
  if advantage < 0 and ratio < down:
    return -down * advantage, 0.0, 0.0, True, False
  if advantage < 0 and c.dual_clip and ratio > c.dual_clip:
    return -c.dual_clip * advantage, 0.0, 0.0, False, True
  return -ratio * advantage, -ratio * advantage, 0.0, False, False


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


def test_mean_advantage_by_hand():
  """The same groups; nothing is scaled."""
  task_R = np.array([0, 0, 0, 0, 1, 3, 3, 4, 4, 4, 5, 5], np.int32)
  reward_R = np.array([0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1], np.float32)
  np.testing.assert_allclose(
      grpo.advantage(reward_R, task_R, 6, kind='mean'),
      [-1 / 4, 3 / 4, -1 / 4, -1 / 4, 0, 0, 0, 0, 0, 0, -1 / 2, 1 / 2], rtol=1e-6)


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


# What a token counts.

# A task of one rollout of 3 tokens, one of four, of 2 tokens on the mean, one of none; then a row that
# is no rollout. C = 5.
TASK_R = np.array([0, 1, 1, 1, 1, 3], np.int32)
LENGTH_R = np.array([3, 1, 1, 2, 4, 0], np.int32)


compiled_weights = jax.jit(grpo.token_weights, static_argnums=2,
                           static_argnames=('weight', 'aggregate', 'completion_length'))


def weights(weight, aggregate, task_R=TASK_R, length_R=LENGTH_R, num_tasks=3):
  return np.asarray(grpo.token_weights(task_R, length_R, num_tasks, weight=weight, aggregate=aggregate,
                                       completion_length=5))


@pytest.mark.parametrize('weight, aggregate, want_R', [
    # All 11 tokens alike.
    ('rollout', 'token', [1 / 11, 1 / 11, 1 / 11, 1 / 11, 1 / 11, 0]),
    # 3 + 8/4 = 5.
    ('task', 'token', [1 / 5, 1 / 20, 1 / 20, 1 / 20, 1 / 20, 0]),
    # 3 + 8/2 = 7.
    ('sqrt', 'token', [1 / 7, 1 / 14, 1 / 14, 1 / 14, 1 / 14, 0]),
    # 1 + 4 = 5 rollouts.
    ('rollout', 'rollout', [1 / 15, 1 / 5, 1 / 5, 1 / 10, 1 / 20, 0]),
    # 1 + 1 = 2 tasks.
    ('task', 'rollout', [1 / 6, 1 / 8, 1 / 8, 1 / 16, 1 / 32, 0]),
    # 1 + 2 = 3.
    ('sqrt', 'rollout', [1 / 9, 1 / 6, 1 / 6, 1 / 12, 1 / 24, 0]),
    ('rollout', 'constant', [1 / 25, 1 / 25, 1 / 25, 1 / 25, 1 / 25, 0]),
    ('task', 'constant', [1 / 10, 1 / 40, 1 / 40, 1 / 40, 1 / 40, 0]),
    ('sqrt', 'constant', [1 / 15, 1 / 30, 1 / 30, 1 / 30, 1 / 30, 0]),
])
def test_token_weights_by_hand(weight, aggregate, want_R):
  got_R = weights(weight, aggregate)
  np.testing.assert_allclose(got_R, want_R, rtol=1e-6)
  assert got_R.dtype == np.float32


@pytest.mark.parametrize('aggregate', knobs_lib.Grpo.choices('aggregate'))
@pytest.mark.parametrize('weight, want', [('rollout', 4), ('task', 1), ('sqrt', 2)])
def test_what_the_tokens_of_a_task_of_four_weigh_against_those_of_one(weight, aggregate, want):
  of_tokens_M = np.bincount(TASK_R, weights=weights(weight, aggregate) * LENGTH_R, minlength=4)
  mean_lengths = 1.0 if aggregate == 'rollout' else 2 / 3
  assert of_tokens_M[1] / of_tokens_M[0] == pytest.approx(want * mean_lengths, rel=1e-6)
  assert of_tokens_M[2] == of_tokens_M[3] == 0


@weighings
def test_without_a_rollout_there_is_no_weight(weight, aggregate):
  for task_R, length_R in (([3, 3], [0, 0]), ([0, 2], [0, 0])):
    np.testing.assert_array_equal(
        weights(weight, aggregate, np.array(task_R, np.int32), np.array(length_R, np.int32)), [0, 0])


@weighings
@given(drawn=st.lists(st.tuples(st.integers(0, NUM_TASKS), st.integers(1, 9)),
                      min_size=NUM_ROLLOUTS, max_size=NUM_ROLLOUTS))
@few(max_examples=40)
def test_token_weights_are_the_loop_over_tasks(weight, aggregate, drawn):
  task_R, length_R = (np.array(x, np.int32) for x in zip(*drawn))
  length_R = np.where(task_R < NUM_TASKS, length_R, 0)
  kinds = {'weight': weight, 'aggregate': aggregate, 'completion_length': 9}
  got_R = np.asarray(compiled_weights(task_R, length_R, NUM_TASKS, **kinds))
  np.testing.assert_allclose(got_R, weights_by_loops(task_R, length_R, NUM_TASKS, **kinds), rtol=1e-5)
  # Where it is a mean, the tokens' weights sum to 1; where no rollout counts more, to at most that.
  total = float(got_R @ length_R)
  if not length_R.any():
    assert total == 0
  elif aggregate == 'constant':
    assert 0 < total < 1 + 1e-5
  else:
    assert total == pytest.approx(1, rel=1e-5)
  np.testing.assert_array_equal(got_R > 0, task_R < NUM_TASKS)


def test_token_weights_with_and_without_jit():
  compiled_weights.clear_cache()
  kinds = {'weight': 'sqrt', 'aggregate': 'rollout', 'completion_length': 5}
  for task_R in (TASK_R, np.array([0, 0, 1, 2, 2, 3], np.int32)):
    np.testing.assert_allclose(compiled_weights(task_R, LENGTH_R, 3, **kinds),
                               grpo.token_weights(task_R, LENGTH_R, 3, **kinds), rtol=1e-6)
  assert compiled_weights._cache_size() == 1


# The expected gradient of a task, against its budget.

# A policy that chooses among three completions, by softmax: their lengths and rewards.
LOGITS_V, LENGTH_V, REWARD_V = np.array([0.3, -0.8, 0.1]), np.array([2, 5, 3]), np.array([1, 0, 0])
OTHERS = 4  # rollouts of another task in the same step


def expected_gradient(budget, kind, weight, aggregate):
  """gradient_V of the loss of a task with a budget, the mean over all that it may draw."""
  p_V = np.exp(LOGITS_V) / np.exp(LOGITS_V).sum()
  counts = [(a, b, budget - a - b) for a in range(budget + 1) for b in range(budget + 1 - a)]
  drawn_XN = np.array([np.repeat(np.arange(3), x) for x in counts])
  chance_X = np.array([math.factorial(budget) * np.prod(
      [p ** n / math.factorial(n) for p, n in zip(p_V, x)]) for x in counts])
  assert chance_X.sum() == pytest.approx(1)
  task_R = jnp.array([0] * budget + [1] * OTHERS)
  with_others = lambda x_XN, other: np.pad(x_XN, ((0, 0), (0, OTHERS)), constant_values=other)
  push_XR = jax.jit(jax.vmap(
      lambda reward_R, length_R: grpo.advantage(reward_R, task_R, 2, kind=kind) * grpo.token_weights(
          task_R, length_R, 2, weight=weight, aggregate=aggregate, completion_length=5)))(
              with_others(np.float32(REWARD_V)[drawn_XN], 0), with_others(LENGTH_V[drawn_XN], 4))
  push_XN = np.asarray(push_XR, float)[:, :budget]
  # Of log p(v) by the logits; a completion's tokens all weigh the same.
  score_VV = np.eye(3) - p_V
  return -np.einsum('x,xn,xnv->v', chance_X, push_XN, score_VV[drawn_XN])


@pytest.mark.parametrize('aggregate', ['constant', 'rollout'])
def test_the_expected_gradient_does_not_depend_on_the_budget(aggregate):
  """With leave-one-out advantages and tasks that weigh the same; exactly, by enumeration."""
  want_V = expected_gradient(2, 'loo', 'task', aggregate)
  assert np.abs(want_V).max() > 0.01
  for budget in (3, 8):
    np.testing.assert_allclose(expected_gradient(budget, 'loo', 'task', aggregate), want_V,
                               atol=1e-5 * np.abs(want_V).max())
  # It is the policy gradient: of the mean over tasks of the expected reward, where no length counts.
  if aggregate == 'constant':
    p_V = np.exp(LOGITS_V) / np.exp(LOGITS_V).sum()
    exact_V = -p_V * (REWARD_V - p_V @ REWARD_V)
    np.testing.assert_allclose(want_V, exact_V / 5 / 2, rtol=1e-5)


@pytest.mark.parametrize('kind, weight', [
    ('std', 'task'), ('mean', 'task'), ('std', 'rollout'), ('loo', 'rollout'), ('std', 'sqrt')])
def test_with_other_kinds_it_does(kind, weight):
  size = {n: np.linalg.norm(expected_gradient(n, kind, weight, 'constant')) for n in (2, 8)}
  assert abs(size[8] / size[2] - 1) > 0.1


def test_by_the_rollout_a_task_weighs_its_share_of_them():
  size = {n: np.linalg.norm(expected_gradient(n, 'loo', 'rollout', 'constant')) for n in (2, 8)}
  assert size[8] / size[2] == pytest.approx((8 / 12) / (2 / 6), rel=1e-5)


# The clipped losses.


@functools.partial(jax.jit, static_argnums=3)
def loss_and_gradients(log_ratio, logp, advantage, config):
  """The loss, its derivatives by the log ratio and by logp, and the flags."""
  f = lambda log_ratio, logp: grpo.policy_loss(log_ratio, logp, advantage, config)
  loss, low, high = f(log_ratio, logp)
  return loss, *jax.grad(lambda *x: f(*x)[0].sum(), (0, 1))(log_ratio, logp), low, high


@pytest.mark.parametrize('kind', ['grpo', 'gspo'])
@pytest.mark.parametrize('ratio, advantage, loss, clipped', [
    (1.5, 1.0, -1.28, 'high'),  # gone up far enough
    (1.5, -1.0, 1.5, ''),
    (0.5, 1.0, -0.5, ''),
    (0.5, -1.0, 0.8, 'low'),  # gone down far enough
    (1.1, 2.0, -2.2, ''),
    (1.1, -2.0, 2.2, ''),
    (1.25, 1.0, -1.25, ''),  # beyond the lower side's width, within the upper's
    (0.75, -1.0, 0.8, 'low'),  # within the upper side's width, beyond the lower's
    (1.0, 3.0, -3.0, ''),
    (1.5, 0.0, 0.0, ''),
    (0.5, 0.0, 0.0, ''),
])
def test_clipped_loss_by_hand(kind, ratio, advantage, loss, clipped):
  log_ratio = jnp.log(jnp.float32(ratio))
  value, by_ratio, by_logp, low, high = loss_and_gradients(
      log_ratio, jnp.float32(-2), jnp.float32(advantage), knobs.loss(loss=kind))
  assert value == pytest.approx(loss, rel=1e-6)
  assert (bool(low), bool(high)) == (clipped == 'low', clipped == 'high')
  assert by_ratio == pytest.approx(0 if clipped else -ratio * advantage, rel=1e-5, abs=1e-12)
  assert by_ratio == 0 or not clipped
  assert by_logp == 0


@pytest.mark.parametrize('ratio, advantage, loss, clipped', [
    (4.0, -1.0, 3.0, 'high'),  # went up however wrong it is: the dual bound
    (2.5, -2.0, 5.0, ''),  # not that far
    (0.5, -1.0, 0.8, 'low'),
    (4.0, 1.0, -1.28, 'high'),  # the dual bound is for negative advantages
    (4.0, 0.0, 0.0, ''),
])
def test_dual_clip_by_hand(ratio, advantage, loss, clipped):
  value, by_ratio, _, low, high = loss_and_gradients(
      jnp.log(jnp.float32(ratio)), jnp.float32(-2), jnp.float32(advantage), knobs.loss(dual_clip=3.0))
  assert value == pytest.approx(loss, rel=1e-6)
  assert (bool(low), bool(high)) == (clipped == 'low', clipped == 'high')
  assert by_ratio == pytest.approx(0 if clipped else -ratio * advantage, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize('ratio, advantage, bounded, clipped', [
    (1.5, 1.0, 1.28, 'high'),
    (1.5, -2.0, 1.28, 'high'),  # whatever the advantage
    (0.5, 1.0, 0.8, 'low'),
    (0.5, -2.0, 0.8, 'low'),
    (1.1, 2.0, 1.1, ''),
    (1.1, -2.0, 1.1, ''),
    (1.5, 0.0, 1.28, 'high'),
])
def test_cispo_by_hand(ratio, advantage, bounded, clipped):
  """The gradient goes through logp alone, and a bound limits but never takes it."""
  value, by_ratio, by_logp, low, high = loss_and_gradients(
      jnp.log(jnp.float32(ratio)), jnp.float32(-2), jnp.float32(advantage), knobs.loss(loss='cispo'))
  assert value == pytest.approx(2 * bounded * advantage, rel=1e-6)
  assert by_ratio == 0
  assert by_logp == pytest.approx(-bounded * advantage, rel=1e-6)
  assert (bool(low), bool(high)) == (clipped == 'low', clipped == 'high')


tokens = st.tuples(st.floats(-3, 3), st.floats(-8, 0), st.floats(0.01, 4), st.booleans())


@pytest.mark.parametrize('changed', [
    {}, {'dual_clip': 3.0}, {'loss': 'gspo'}, {'loss': 'cispo'}, {'loss': 'cispo', 'clip_low': 1.0}],
    ids=str)
@given(drawn=st.lists(tokens, min_size=12, max_size=12))
@few(max_examples=60)
def test_policy_loss_is_the_loop_over_tokens(changed, drawn):
  config = knobs.loss(**changed)
  log_ratio, logp, size, up = (np.array(x) for x in zip(*drawn))
  bounds = np.log([[0.8], [1.28], [3.0]])
  log_ratio[np.abs(log_ratio - bounds).min(axis=0) < 1e-4] = 0  # the kinks have no one gradient
  log_ratio_BT, logp_BT, advantage_BT = (
      x.reshape(3, 4).astype(np.float32) for x in (log_ratio, logp, np.where(up, size, -size)))
  got = [np.asarray(x) for x in loss_and_gradients(log_ratio_BT, logp_BT, advantage_BT, config)]
  for b, t in np.ndindex(3, 4):
    want = loss_by_hand(np.exp(float(log_ratio_BT[b, t])), float(logp_BT[b, t]),
                        float(advantage_BT[b, t]), config)
    np.testing.assert_allclose([x[b, t] for x in got[:3]], want[:3], rtol=1e-5, atol=1e-30)
    assert tuple(bool(x[b, t]) for x in got[3:]) == want[3:]


def test_on_policy_gradient_is_that_of_the_policy():
  """At a ratio of 1 the gradient is -A whatever the clip: plain policy gradient."""
  logp_R, advantage_R = np.float32([-0.1, -3, -9]), np.float32([1.5, -0.5, 0])
  for kind in knobs_lib.Grpo.choices('loss'):
    _, by_ratio_R, by_logp_R, low_R, high_R = loss_and_gradients(
        np.zeros(3, np.float32), logp_R, advantage_R, knobs.loss(loss=kind))
    np.testing.assert_array_equal(by_ratio_R + by_logp_R, -advantage_R)
    assert not np.any(low_R | high_R)


@pytest.mark.parametrize('kind', knobs_lib.Grpo.choices('loss'))
@pytest.mark.parametrize('dual_clip', [0.0, 3.0])
def test_no_ratio_is_too_large(kind, dual_clip):
  """e^99 overflows in float32; its product with a gradient of 0 would be NaN."""
  got = loss_and_gradients(np.float32([99, 99, -99, -99]), np.float32([-1, -1, -100, -100]),
                           np.float32([1, -1, 1, -1]), knobs.loss(loss=kind, dual_clip=dual_clip))
  assert all(np.all(np.isfinite(x)) for x in got)
  by_ratio, low, high = got[1], got[3], got[4]
  assert np.all(np.abs(np.asarray(by_ratio)[[0, 3]]) == 0)  # clipped
  assert high[0] and low[3]


@pytest.mark.parametrize('kind', knobs_lib.Grpo.choices('loss'))
def test_policy_loss_with_and_without_jit(kind):
  rng = np.random.default_rng(1)
  log_ratio_BT, logp_BT, advantage_BT = rng.normal(size=(3, 4, 5)).astype(np.float32)
  f = functools.partial(grpo.policy_loss, config=knobs.loss(loss=kind, dual_clip=1.5))
  plain, compiled = (g(log_ratio_BT, logp_BT, advantage_BT) for g in (f, jax.jit(f)))
  np.testing.assert_allclose(compiled[0], plain[0], rtol=1e-6)
  for got, want in zip(compiled[1:], plain[1:]):
    np.testing.assert_array_equal(got, want)
    assert 0 < want.sum() < want.size


def test_an_advantage_of_another_rank_is_an_error():
  with pytest.raises(ValueError, match='rank'):
    grpo.policy_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.ones(3), knobs.loss())


# The divergence from a reference.


@pytest.mark.parametrize('kind, ratio, value, gradient', [
    # ratio: of the reference's probability to the policy's.
    ('k3', 1.0, 0.0, 0.0),
    ('k3', 2.0, 1 - math.log(2), -1.0),
    ('k3', 0.5, math.log(2) - 0.5, 0.5),
    ('k1', 1.0, 0.0, 0.0),
    ('k1', 2.0, -math.log(2), -math.log(2)),
    ('k1', 0.5, math.log(2), math.log(2)),
])
def test_kl_by_hand(kind, ratio, value, gradient):
  logp = jnp.float32(-1.5)
  f = lambda logp: grpo.kl(logp, jnp.float32(-1.5 + math.log(ratio)), kind)
  assert f(logp) == pytest.approx(value, rel=1e-5, abs=1e-6)
  assert jax.grad(f)(logp) == pytest.approx(gradient, rel=1e-5, abs=1e-6)


def test_what_the_estimates_of_kl_are_on_average():
  """Over a vocabulary. Both values are KL(policy | reference); the gradient of 'k1' is that of it,
  that of 'k3' is that of KL(reference | policy)."""
  rng = np.random.default_rng(0)
  z_V, ref_V = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
  log_q_V = jax.nn.log_softmax(ref_V)
  p_V = jax.nn.softmax(z_V)
  divergence = lambda log_p_V, log_q_V: jnp.sum(jnp.exp(log_p_V) * (log_p_V - log_q_V))
  exact = divergence(jax.nn.log_softmax(z_V), log_q_V)
  of_policy = lambda z_V: divergence(jax.nn.log_softmax(z_V), log_q_V)
  of_reference = lambda z_V: divergence(log_q_V, jax.nn.log_softmax(z_V))
  for kind, f in (('k1', of_policy), ('k3', of_reference)):
    # What is drawn, and how often, is the policy's own and has no gradient.
    mean = lambda z_V: jnp.sum(p_V * grpo.kl(jax.nn.log_softmax(z_V), log_q_V, kind))
    np.testing.assert_allclose(mean(z_V), exact, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(mean)(z_V), jax.grad(f)(z_V), rtol=1e-4, atol=1e-6)
  assert np.max(np.abs(jax.grad(of_policy)(z_V) - jax.grad(of_reference)(z_V))) > 0.01


@pytest.mark.parametrize('kind', knobs_lib.Grpo.choices('kl'))
def test_kl_of_a_reference_far_away_is_finite(kind):
  f = lambda logp: grpo.kl(logp, jnp.float32(0), kind)
  for logp in (jnp.float32(-200), jnp.float32(-1e5)):
    assert jnp.isfinite(f(logp)) and jnp.isfinite(jax.grad(f)(logp))


# Knobs.


@pytest.mark.parametrize('name', grpo.PRESETS)
def test_presets_are_configs(name):
  preset = grpo.PRESETS[name]
  assert set(preset) <= set(knobs_lib.Grpo._fields)
  grpo.check(knobs.loss(**preset))


def test_a_config_has_every_knob_of_its_section():
  assert {*knobs_lib.Grpo._fields, 'preset'} == set(common.base().grpo)


@pytest.mark.parametrize('changed, named', [
    ({'advantage': 'max'}, r"grpo\.advantage='max' is not one of \('std', 'loo', 'mean'\)"),
    ({'weight': 'tasks'}, r"grpo\.weight='tasks' is not one of \('rollout', 'task', 'sqrt'\)"),
    ({'aggregate': 'mean'}, r"grpo\.aggregate='mean' is not one of \('token', 'rollout', 'constant'\)"),
    ({'loss': 'ppo'}, r"grpo\.loss='ppo' is not one of \('grpo', 'gspo', 'cispo'\)"),
    ({'kl': 'k2'}, r"grpo\.kl='k2' is not one of \('k1', 'k3'\)"),
    ({'clip_low': -0.1}, r'grpo\.clip_low=-0\.1 is below 0'),
    ({'clip_high': float('nan')}, r'grpo\.clip_high=nan'),
    ({'kl_coef': -1.0}, r'grpo\.kl_coef=-1\.0 is below 0'),
    ({'entropy_coef': -1.0}, r'grpo\.entropy_coef=-1\.0 is below 0'),
    ({'tis_cap': -1.0}, r'grpo\.tis_cap=-1\.0 is below 0'),
    ({'dual_clip': 1.2}, r'grpo\.dual_clip=1\.2 must be above 1 \+ grpo\.clip_high=1\.28'),
    ({'dual_clip': -1.0}, r'grpo\.dual_clip=-1\.0 must be above'),
])
def test_bad_knobs_are_named(changed, named):
  with pytest.raises(ValueError, match=named):
    grpo.check(knobs.loss(**changed))


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
