"""Advantages are those of each ragged group alone, tokens weigh what was decided, and clips take the gradient
where they say so.

Each function is compiled once, at one padded shape and for all its kinds, and compared with loops in float64.
"""

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax import knobs as knobs_lib
from kr_jax.learning import grpo
from tests import knobs

NUM_TASKS, R = 6, 96
KINDS, WEIGHTS, AGGREGATES = (knobs_lib.Grpo.choices(name) for name in ('advantage', 'weight', 'aggregate'))
WEIGHINGS = list(itertools.product(WEIGHTS, AGGREGATES))


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
        mean_of_others = (sum(rewards) - reward_R[r]) / (n - 1)
        advantage_R[r] = {'std': (reward_R[r] - mean) / (std + eps), 'loo': reward_R[r] - mean_of_others,
                          'mean': reward_R[r] - mean}[kind]
  return advantage_R


def weights_by_loops(task_R, length_R, num_tasks: int, weight: str, aggregate: str,
                     completion_length: int) -> np.ndarray:
  """The weight of each token in a loss that is a mean."""
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
  """A token's loss, its derivatives by the log ratio and by logp, and whether it is clipped low or high."""
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


def padded(x, width: int, value=0) -> np.ndarray:
  return np.concatenate([x, np.full(width - len(x), value, np.asarray(x).dtype)])


@jax.jit
def advantages_of(reward_R, task_R, eps):
  return {kind: grpo.advantage(reward_R, task_R, NUM_TASKS, kind=kind, eps=eps) for kind in KINDS}


def advantages(reward_X, task_X, eps=1e-6) -> dict[str, np.ndarray]:
  """Of each kind. Behind the X rollouts stand rows that are none, whose rewards change nothing."""
  found = advantages_of(padded(np.float32(reward_X), R, 7), padded(np.int32(task_X), R, NUM_TASKS), eps)
  for x_R in found.values():
    assert x_R.dtype == np.float32 and not np.any(x_R[len(reward_X):])
  return {kind: np.asarray(x_R[:len(reward_X)]) for kind, x_R in found.items()}


@jax.jit
def weights_of(task_R, length_R, completion_length):
  return {(weight, aggregate): grpo.token_weights(
      task_R, length_R, NUM_TASKS, weight=weight, aggregate=aggregate, completion_length=completion_length)
          for weight, aggregate in WEIGHINGS}


def weights(task_X, length_X, completion_length=5) -> dict[tuple[str, str], np.ndarray]:
  """Of each weight and aggregate; behind the X rollouts stand rows that are none."""
  found = weights_of(padded(np.int32(task_X), R, NUM_TASKS), padded(np.int32(length_X), R), completion_length)
  for x_R in found.values():
    assert x_R.dtype == np.float32 and not np.any(x_R[len(task_X):])
  return {kinds: np.asarray(x_R[:len(task_X)]) for kinds, x_R in found.items()}


LOSSES = {'grpo': knobs.loss(), 'gspo': knobs.loss(loss='gspo'), 'dual clip': knobs.loss(dual_clip=3.0),
          'cispo': knobs.loss(loss='cispo'), 'cispo, no lower limit': knobs.loss(loss='cispo', clip_low=1.0)}


@jax.jit
def losses_of(log_ratio_BT, logp_BT, advantage_BT):
  """By name: the loss, its derivatives by the log ratio and by logp, and the flags."""
  def of(config):
    f = lambda log_ratio_BT, logp_BT: grpo.policy_loss(log_ratio_BT, logp_BT, advantage_BT, config)
    loss_BT, low_BT, high_BT = f(log_ratio_BT, logp_BT)
    gradients = jax.grad(lambda *x: f(*x)[0].sum(), (0, 1))(log_ratio_BT, logp_BT)
    return loss_BT, *gradients, low_BT, high_BT
  return {name: of(config) for name, config in LOSSES.items()}


def losses(log_ratio_X, logp_X, advantage_X) -> dict[str, list[np.ndarray]]:
  """Of up to 16 tokens."""
  args = (padded(np.float32(x), 16).reshape(2, 8) for x in (log_ratio_X, logp_X, advantage_X))
  return {name: [np.ravel(x)[:len(logp_X)] for x in found] for name, found in losses_of(*args).items()}


# Any order, any sizes: most draws leave some task without rollouts and some with one.
groups = st.lists(st.integers(0, NUM_TASKS - 1), min_size=14, max_size=14).map(np.int32)
rewards = (st.sampled_from([(0, 1), (0, 0, 0, 1), (0.7,), (-1, 0.3, 0.7, 2)])
           .flatmap(lambda values: st.lists(st.sampled_from(values), min_size=14, max_size=14)).map(np.float32))


# Advantages.


def test_advantage_by_hand():
  """One right of four, one alone, none, all right, all wrong, one of two."""
  task_R = [0, 0, 0, 0, 1, 3, 3, 4, 4, 4, 5, 5]
  reward_R = [0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1]
  found, third = advantages(reward_R, task_R), 3 ** -0.5
  for kind, want_R in (('std', [-third, 3 * third, -third, -third, 0, 0, 0, 0, 0, 0, -1, 1]),
                       ('loo', [-1 / 3, 1, -1 / 3, -1 / 3, 0, 0, 0, 0, 0, 0, -1, 1]),
                       ('mean', [-1 / 4, 3 / 4, -1 / 4, -1 / 4, 0, 0, 0, 0, 0, 0, -1 / 2, 1 / 2])):
    np.testing.assert_allclose(found[kind], want_R, rtol=1e-5)
  np.testing.assert_allclose(advantages([0, 1], [0, 0], eps=0.5)['std'], [-0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize('reward', [0.7, 0.1, 1e6 + 0.1])
def test_groups_of_equal_rewards_have_exactly_none(reward):
  """The sum of three 0.7 is not thrice 0.7 in float32."""
  for n in (3, 93):
    for advantage_R in advantages([0, 1] + [reward] * n, [0, 0] + [1] * n).values():
      assert np.all(advantage_R[2:] == 0) and np.all(advantage_R[:2] != 0)


def test_advantage_of_a_rare_success_is_not_clipped():
  advantage_R = advantages([0] * 40 + [1] + [0] * 52, [0] * 93)['std']
  assert advantage_R[40] == pytest.approx(92 ** 0.5, rel=1e-4)
  assert advantage_R.sum() == pytest.approx(0, abs=1e-4)


@given(reward_R=rewards, task_R=groups)
def test_advantage_is_the_loop_over_groups(reward_R, task_R):
  """Whatever the order of rollouts and tasks. Where rewards differ is where advantages are."""
  mixed_M = grpo.mixed_tasks(reward_R, task_R, NUM_TASKS)
  np.testing.assert_array_equal(
      mixed_M, [len(set(reward_R[task_R == task])) > 1 for task in range(NUM_TASKS)])
  for kind, advantage_R in advantages(reward_R, task_R).items():
    np.testing.assert_allclose(advantage_R, advantage_by_loops(reward_R, task_R, NUM_TASKS, kind),
                               rtol=1e-4, atol=1e-5)
    learns_M = np.bincount(task_R, weights=advantage_R != 0, minlength=NUM_TASKS) > 0
    np.testing.assert_array_equal(learns_M, mixed_M)


@pytest.mark.parametrize('p, budget', [(0.05, 8), (0.5, 3), (0.9, 20)])
def test_leave_one_out_pushes_by_the_budget_times_the_gradient(p, budget):
  """E[sum A_r (v_r - p)] = N p (1-p), by enumeration; with 'std' it is not proportional to N."""
  push = dict.fromkeys(KINDS, 0.0)
  for k in range(budget + 1):
    verdict_R = np.float32([1] * k + [0] * (budget - k))
    chance = math.comb(budget, k) * p ** k * (1 - p) ** (budget - k)
    for kind, advantage_R in advantages(verdict_R, [0] * budget).items():
      push[kind] += chance * float(advantage_R @ (verdict_R - np.float32(p)))
  assert push['loo'] == pytest.approx(budget * p * (1 - p), rel=1e-4)
  assert push['std'] != pytest.approx(budget * p * (1 - p), rel=1e-2)


# The weights of tokens.

# A task of one rollout of 3 tokens, one of four, of 2 tokens on the mean, one of none; then a row that
# is no rollout. C = 5.
TASK_R, LENGTH_R = np.int32([0, 1, 1, 1, 1, NUM_TASKS]), np.int32([3, 1, 1, 2, 4, 0])


def test_token_weights_by_hand():
  for kinds, want_R in {
      # All 11 tokens alike.
      ('rollout', 'token'): [1 / 11, 1 / 11, 1 / 11, 1 / 11, 1 / 11, 0],
      # 3 + 8/4 = 5.
      ('task', 'token'): [1 / 5, 1 / 20, 1 / 20, 1 / 20, 1 / 20, 0],
      # 3 + 8/2 = 7.
      ('sqrt', 'token'): [1 / 7, 1 / 14, 1 / 14, 1 / 14, 1 / 14, 0],
      # 1 + 4 = 5 rollouts.
      ('rollout', 'rollout'): [1 / 15, 1 / 5, 1 / 5, 1 / 10, 1 / 20, 0],
      # 1 + 1 = 2 tasks.
      ('task', 'rollout'): [1 / 6, 1 / 8, 1 / 8, 1 / 16, 1 / 32, 0],
      # 1 + 2 = 3.
      ('sqrt', 'rollout'): [1 / 9, 1 / 6, 1 / 6, 1 / 12, 1 / 24, 0],
      ('rollout', 'constant'): [1 / 25, 1 / 25, 1 / 25, 1 / 25, 1 / 25, 0],
      ('task', 'constant'): [1 / 10, 1 / 40, 1 / 40, 1 / 40, 1 / 40, 0],
      ('sqrt', 'constant'): [1 / 15, 1 / 30, 1 / 30, 1 / 30, 1 / 30, 0],
  }.items():
    np.testing.assert_allclose(weights(TASK_R, LENGTH_R)[kinds], want_R, rtol=1e-6, err_msg=str(kinds))


@given(drawn=st.lists(st.tuples(st.integers(0, NUM_TASKS), st.integers(1, 9)), max_size=14))
def test_token_weights_are_the_loop_over_tasks(drawn):
  task_R, length_R = np.int32(drawn).reshape(-1, 2).T
  length_R = np.where(task_R < NUM_TASKS, length_R, 0)
  for (weight, aggregate), got_R in weights(task_R, length_R, 9).items():
    np.testing.assert_allclose(
        got_R, weights_by_loops(task_R, length_R, NUM_TASKS, weight, aggregate, 9), rtol=1e-5)
    # Where the loss is a mean, the tokens' weights sum to 1; with 'constant' to at most 1.
    total = float(got_R @ length_R)
    if not length_R.any():
      assert total == 0
    elif aggregate == 'constant':
      assert 0 < total < 1 + 1e-5
    else:
      assert total == pytest.approx(1, rel=1e-5)


@pytest.mark.slow
def test_with_and_without_jit():
  rng = np.random.default_rng(0)
  x_R, task_R = rng.integers(0, 2, R).astype(np.float32), np.sort(rng.integers(0, 7, R)).astype(np.int32)
  length_R, other_task_R = np.where(task_R < NUM_TASKS, 3, 0).astype(np.int32), np.sort(task_R[::-1] // 2)
  log_ratio, logp, advantage = rng.normal(size=(3, 2, 8)).astype(np.float32)
  advantages_of(x_R, other_task_R, 1e-6), weights_of(other_task_R, length_R, 5)
  kinds = {'weight': 'sqrt', 'aggregate': 'rollout', 'completion_length': 5}
  for got, want in (
      (advantages_of(x_R, task_R, 1e-6)['std'], grpo.advantage(x_R, task_R, NUM_TASKS)),
      (weights_of(task_R, length_R, 5)['sqrt', 'rollout'],
       grpo.token_weights(task_R, length_R, NUM_TASKS, **kinds)),
      (losses_of(log_ratio, logp, advantage)['dual clip'][0],
       grpo.policy_loss(log_ratio, logp, advantage, LOSSES['dual clip'])[0])):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  # Budgets vary, shapes do not.
  assert advantages_of._cache_size() == weights_of._cache_size() == 1


# The expected gradient of a task, against its budget.

# A policy that chooses among three completions, by softmax: their lengths and rewards.
LOGITS_V, LENGTH_V, REWARD_V = np.array([0.3, -0.8, 0.1]), np.array([2, 5, 3]), np.array([1, 0, 0])
MOST, OTHERS = 8, 4  # the largest budget, and the rollouts of another task in the same step


@jax.jit
@jax.vmap
def pushes_of(reward_R, task_R, length_R):
  return {(kind, weight, aggregate): grpo.advantage(reward_R, task_R, 2, kind=kind) * grpo.token_weights(
      task_R, length_R, 2, weight=weight, aggregate=aggregate, completion_length=5)
          for kind, weight, aggregate in itertools.product(KINDS, WEIGHTS, AGGREGATES)}


def expected_gradient(budget: int, unverified: float = 0.0, *, left_out: bool = True
                      ) -> dict[tuple[str, str, str], np.ndarray]:
  """gradient_V of the loss of a task with a budget, the mean over all that it may draw.

  unverified: the chance that a rollout of the task has no verdict, whatever it is. left_out: such a rollout is no
  rollout; else it is wrong.
  """
  p_V = np.exp(LOGITS_V) / np.exp(LOGITS_V).sum()
  # Six kinds of rollouts: with a verdict, and without.
  p_K = np.concatenate([p_V * (1 - unverified), p_V * unverified])
  kinds = range(6 if unverified else 3)
  drawn_XN = np.array([*itertools.combinations_with_replacement(kinds, budget)])
  counts_XK = (drawn_XN[:, :, None] == np.arange(6)).sum(axis=1)
  chance_X = np.array([math.factorial(budget) * np.prod(
      [p ** n / math.factorial(n) for p, n in zip(p_K, counts_K)]) for counts_K in counts_XK])
  assert chance_X.sum() == pytest.approx(1)
  out_XN, drawn_XN = drawn_XN >= 3, drawn_XN % 3

  def rows(x_XN, others, none):
    """Of so many draws of 8 rollouts at most: what the others have, and what no rollout has."""
    x_XN = np.where(out_XN, none, x_XN) if left_out else x_XN
    x_XN = np.pad(x_XN, ((0, (252 if unverified else 45) - len(x_XN)), (0, OTHERS)), constant_values=others)
    return np.pad(x_XN, ((0, 0), (0, MOST - budget)), constant_values=none)

  pushes = pushes_of(rows(np.float32(REWARD_V[drawn_XN] * ~out_XN), 0, 0), rows(0 * drawn_XN, 1, 2),
                     rows(LENGTH_V[drawn_XN], 4, 0))
  # Of log p(v) by the logits; a completion's tokens all weigh the same.
  score_VV = np.eye(3) - p_V
  return {kinds: -np.einsum('x,xn,xnv->v', chance_X, np.asarray(push_XR, float)[:len(drawn_XN), :budget],
                            score_VV[drawn_XN]) for kinds, push_XR in pushes.items()}


def test_the_expected_gradient_against_the_budget():
  """It does not depend on it with leave-one-out advantages and tasks that weigh the same; exactly, by enumeration."""
  by_budget = {n: expected_gradient(n) for n in (2, 3, 8)}
  for aggregate in ('constant', 'rollout'):
    want_V = by_budget[2]['loo', 'task', aggregate]
    assert np.abs(want_V).max() > 0.01
    for n in (3, 8):
      np.testing.assert_allclose(
          by_budget[n]['loo', 'task', aggregate], want_V, atol=1e-5 * np.abs(want_V).max())
  # It is the policy gradient: of the mean over tasks of the expected reward, where no length counts.
  p_V = np.exp(LOGITS_V) / np.exp(LOGITS_V).sum()
  exact_V = -p_V * (REWARD_V - p_V @ REWARD_V)
  np.testing.assert_allclose(by_budget[2]['loo', 'task', 'constant'], exact_V / 5 / 2, rtol=1e-5)
  growth = {kinds: np.linalg.norm(by_budget[8][kinds]) / np.linalg.norm(by_budget[2][kinds])
            for kinds in by_budget[2]}
  for kind, weight in (('std', 'task'), ('mean', 'task'), ('std', 'rollout'), ('loo', 'rollout'),
                       ('std', 'sqrt')):
    assert abs(growth[kind, weight, 'constant'] - 1) > 0.1
  # By the rollout a task weighs its share of them.
  assert growth['loo', 'rollout', 'constant'] == pytest.approx((8 / 12) / (2 / 6), rel=1e-5)


def test_unverified_rollouts_that_are_left_out_change_no_expected_gradient():
  """A verifier fails at random on a share of rollouts; exactly, by enumeration.

  A group of N of which n are left is a group of n: its expected gradient is that of the budget n, with every
  advantage and weight. With leave-one-out advantages and tasks that weigh the same it is the same for every n >= 2,
  so that only groups of fewer lose theirs. Were such rollouts wrong, the gradient would be another one.
  """
  share, budget = 0.2, 5
  chance_n = [math.comb(budget, n) * (1 - share) ** n * share ** (budget - n) for n in range(budget + 1)]
  of_budget = [None, *(expected_gradient(n) for n in range(1, budget + 1))]
  left_out, wrong = (expected_gradient(budget, share, left_out=x) for x in (True, False))
  for kinds, got_V in left_out.items():
    want_V = sum(chance * of_n[kinds] for chance, of_n in zip(chance_n[1:], of_budget[1:]))
    np.testing.assert_allclose(got_V, want_V, atol=1e-5 * np.abs(want_V).max(), err_msg=str(kinds))
  for aggregate in ('constant', 'rollout'):
    kinds = 'loo', 'task', aggregate
    np.testing.assert_allclose(left_out[kinds], sum(chance_n[2:]) * of_budget[budget][kinds], rtol=1e-5)
    assert sum(chance_n[2:]) > 0.99
    np.testing.assert_allclose(wrong[kinds], (1 - share) * of_budget[budget][kinds], rtol=0.1)
    assert np.linalg.norm(wrong[kinds] - of_budget[budget][kinds]) > 0.1 * np.linalg.norm(of_budget[budget][kinds])


# The clipped losses.


@pytest.mark.parametrize('name, cases', [
    ('grpo', [
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
        (0.5, 0.0, 0.0, '')]),
    ('dual clip', [
        (4.0, -1.0, 3.0, 'high'),  # went up however wrong it is: the dual limit
        (2.5, -2.0, 5.0, ''),  # not so far
        (0.5, -1.0, 0.8, 'low'),
        (4.0, 1.0, -1.28, 'high'),  # the dual limit is for negative advantages
        (4.0, 0.0, 0.0, '')])])
def test_clipped_loss_by_hand(name, cases):
  ratio, advantage, want, clipped = zip(*cases)
  names = ('grpo', 'gspo') if name == 'grpo' else (name,)
  for found in map(losses(np.log(ratio), np.full(len(ratio), -2), advantage).get, names):
    loss, by_ratio, by_logp, low, high = found
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_array_equal(low, [x == 'low' for x in clipped])
    np.testing.assert_array_equal(high, [x == 'high' for x in clipped])
    expected = np.where([bool(x) for x in clipped], 0, -np.array(ratio) * advantage)
    np.testing.assert_allclose(by_ratio, expected, rtol=1e-5, atol=0)
    assert not np.any(by_logp)


def test_cispo_by_hand():
  """The gradient goes through logp alone, and the clip limits but never takes it, whatever the advantage."""
  ratio, advantage, weight, clipped = zip(
      (1.5, 1.0, 1.28, 'high'), (1.5, -2.0, 1.28, 'high'), (0.5, 1.0, 0.8, 'low'), (0.5, -2.0, 0.8, 'low'),
      (1.1, 2.0, 1.1, ''), (1.1, -2.0, 1.1, ''), (1.5, 0.0, 1.28, 'high'))
  loss, by_ratio, by_logp, low, high = losses(np.log(ratio), np.full(7, -2), advantage)['cispo']
  np.testing.assert_allclose(loss, 2 * np.array(weight) * advantage, rtol=1e-6)
  np.testing.assert_allclose(by_logp, -np.array(weight) * advantage, rtol=1e-6)
  np.testing.assert_array_equal(low, [x == 'low' for x in clipped])
  np.testing.assert_array_equal(high, [x == 'high' for x in clipped])
  assert not np.any(by_ratio)


@given(drawn=st.lists(st.tuples(st.floats(-3, 3), st.floats(-8, 0), st.floats(0.01, 4), st.booleans()),
                      min_size=16, max_size=16))
def test_policy_loss_is_the_loop_over_tokens(drawn):
  log_ratio, logp, size, up = (np.array(x) for x in zip(*drawn))
  limits = np.log([[0.8], [1.28], [3.0]])
  log_ratio[np.abs(log_ratio - limits).min(axis=0) < 1e-4] = 0  # the kinks have no one gradient
  log_ratio, logp, advantage = np.float32([log_ratio, logp, np.where(up, size, -size)])
  for name, found in losses(log_ratio, logp, advantage).items():
    want = np.array([loss_by_hand(np.exp(float(x)), float(y), float(a), LOSSES[name])
                     for x, y, a in zip(log_ratio, logp, advantage)]).T
    np.testing.assert_allclose(found[:3], want[:3], rtol=1e-5, atol=1e-30, err_msg=name)
    np.testing.assert_array_equal(found[3:], want[3:].astype(bool), err_msg=name)


def test_on_policy_gradient_is_that_of_the_policy():
  """At a ratio of 1 the gradient is -A whatever the clip: plain policy gradient."""
  advantage_R = np.float32([1.5, -0.5, 0])
  for _, by_ratio, by_logp, low, high in losses(np.zeros(3), [-0.1, -3, -9], advantage_R).values():
    np.testing.assert_array_equal(by_ratio + by_logp, -advantage_R)
    assert not np.any(low | high)


def test_no_ratio_is_too_large():
  """e^99 overflows in float32; its product with a gradient of 0 would be NaN."""
  for found in losses([99, 99, -99, -99], [-1, -1, -100, -100], [1, -1, 1, -1]).values():
    assert all(np.all(np.isfinite(x)) for x in found)
    _, by_ratio, _, low, high = found
    assert not np.any(by_ratio[[0, 3]])  # clipped
    assert high[0]
  assert losses([-99], [-100], [-1])['grpo'][3][0]


def test_an_advantage_of_another_rank_is_an_error():
  with pytest.raises(ValueError, match='rank'):
    grpo.policy_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.ones(3), knobs.loss())


# The divergence from a reference.

KL = knobs_lib.Grpo.choices('kl')


@jax.jit
def kl_of(logp_X, ref_logp_X):
  """By kind: the values, and their derivatives by logp."""
  of = lambda kind: lambda logp_X: grpo.kl(logp_X, ref_logp_X, kind)
  return {kind: (of(kind)(logp_X), jax.grad(lambda x: of(kind)(x).sum())(logp_X)) for kind in KL}


def test_kl_by_hand():
  """Of ratios 1, 2 and 1/2 of the reference's probability to the policy's; then of references far away."""
  found = kl_of(np.float32([-1.5, -1.5, -1.5, -200, -1e5]),
                np.float32([-1.5, -1.5 + math.log(2), -1.5 - math.log(2), 0, 0]))
  for kind, values, gradients in (
      ('k3', [0, 1 - math.log(2), math.log(2) - 0.5], [0, -1, 0.5]),
      ('k1', [0, -math.log(2), math.log(2)], [0, -math.log(2), math.log(2)])):
    np.testing.assert_allclose(found[kind][0][:3], values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[kind][1][:3], gradients, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(found[kind]))


def test_the_estimates_of_kl_on_average():
  """Over a vocabulary. Both values are KL(policy | reference). The gradient of 'k1' is its gradient, the
  gradient of 'k3' is the one of KL(reference | policy)."""
  rng = np.random.default_rng(0)
  z_V, ref_V = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)

  @jax.jit
  def of(z_V, ref_V):
    log_q_V, p_V = jax.nn.log_softmax(ref_V), jax.nn.softmax(z_V)
    divergence = lambda log_p_V, log_q_V: jnp.sum(jnp.exp(log_p_V) * (log_p_V - log_q_V))
    of_policy = lambda z_V: divergence(jax.nn.log_softmax(z_V), log_q_V)
    of_reference = lambda z_V: divergence(log_q_V, jax.nn.log_softmax(z_V))
    # The policy draws by its own probabilities, which have no gradient here.
    mean = lambda z_V, kind: jnp.sum(p_V * grpo.kl(jax.nn.log_softmax(z_V), log_q_V, kind))
    return (of_policy(z_V), jax.grad(of_policy)(z_V), jax.grad(of_reference)(z_V),
            {kind: jax.value_and_grad(mean)(z_V, kind) for kind in KL})

  exact, by_policy_V, by_reference_V, found = of(z_V, ref_V)
  for kind, gradient_V in (('k1', by_policy_V), ('k3', by_reference_V)):
    np.testing.assert_allclose(found[kind][0], exact, rtol=1e-5)
    np.testing.assert_allclose(found[kind][1], gradient_V, rtol=1e-4, atol=1e-6)
  assert np.max(np.abs(by_policy_V - by_reference_V)) > 0.01


# Mixed tasks.


def test_mixed_tasks_by_hand():
  """Task 0 is mixed; the last rows are no rollouts."""
  task_R = np.array([0, 0, 0, 1, 3, 3, 4, 4, 5, 5, 5, 6, 6])
  reward_R = np.array([0, 1, 0, 1, 1, 1, 0, 0, 0.7, 0.7, 0.7, 0, 1], np.float32)
  for array in (np.asarray, jnp.asarray):
    mixed_M = grpo.mixed_tasks(array(reward_R), array(task_R), 6)
    assert isinstance(mixed_M, np.ndarray)
    np.testing.assert_array_equal(mixed_M, [True, False, False, False, False, False])
  np.testing.assert_array_equal(
      grpo.mixed_tasks(np.zeros(0, np.float32), np.zeros(0, np.int32), 3), [False] * 3)
