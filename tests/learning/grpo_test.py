"""Advantages are those of each ragged group alone, tokens weigh what was decided, and clips take the gradient
where they say so.

Each function is compiled once, at one padded shape and for all its kinds, and compared with loops in float64.
"""

import functools
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


def advantage_by_loops(reward_R, task_R, num_tasks: int, kind: str, eps: float = 1e-6, *, wave_R=None, past=None
                       ) -> np.ndarray:
  """Each rollout against the rollouts of its task in its own wave and earlier ones."""
  R = len(reward_R)
  wave_R = np.zeros(R, int) if wave_R is None else wave_R
  advantage_R = np.zeros(R)
  for r in range(R):
    task, reward = int(task_R[r]), float(reward_R[r])
    if task == num_tasks:
      continue
    others = [float(reward_R[o]) for o in range(R) if o != r and task_R[o] == task and wave_R[o] <= wave_R[r]]
    group = [*others, reward]
    n, mean = len(group), sum(group) / len(group)
    if kind == 'posterior':
      evidence = float(past.rollouts_M[task]) + len(others)
      known = float(past.rollouts_M[task]) * float(past.mean_M[task]) + sum(others)
      advantage_R[r] = reward - (known / evidence if evidence else float(past.mean_M[task]))
    elif len(set(group)) > 1:
      std = (sum((x - mean) ** 2 for x in group) / n) ** 0.5
      advantage_R[r] = {'std': (reward - mean) / (std + eps), 'loo': reward - sum(others) / max(len(others), 1),
                        'mean': reward - mean, 'maxrl': (reward - mean) / mean if mean > 0 else 0}[kind]
  return advantage_R


def weights_by_loops(task_R, length_R, num_tasks: int, weight: str, aggregate: str, completion_length: int, *,
                     wave_R=None, share_W=(1.0,), least=1) -> np.ndarray:
  """The weight of each token in a loss that is a mean."""
  wave_R = np.zeros(len(task_R), int) if wave_R is None else wave_R
  weight_R, tokens, tasks, of_rollouts = np.zeros(len(task_R)), 0.0, 0.0, 0.0
  for task, wave in np.ndindex(num_tasks, len(share_W)):
    if wave == 0:
      share, seen = 0.0, 0
    share += share_W[wave]  # with what earlier waves left
    group = [r for r in range(len(task_R)) if task_R[r] == task and wave_R[r] == wave and length_R[r]]
    seen += len(group)
    if group:
      n = len(group) / share
      if seen >= least:
        share = 0.0
      of_task = {'rollout': n, 'task': 1, 'sqrt': n ** 0.5}[weight]
      tasks += of_task if wave == 0 else 0
      for r in group:
        weight_R[r] = of_task / n / {'token': 1, 'rollout': length_R[r], 'constant': completion_length}[aggregate]
        tokens += of_task / n * length_R[r]
        of_rollouts += of_task / n
  total = tokens if aggregate == 'token' else tasks or of_rollouts
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


# Of tasks of which much, little and nothing is known.
PAST = grpo.Past(np.float32([0.2, 0.5, 0.8, 0, 1, 0.3]), np.float32([4, 0, 1.5, 8, 0, 100]))


@jax.jit
def advantages_of(reward_R, task_R, eps):
  return {kind: grpo.advantage(reward_R, task_R, NUM_TASKS, kind=kind, eps=eps, past=PAST) for kind in KINDS}


@jax.jit
def advantages_in_waves(reward_R, task_R, wave_R):
  return {kind: grpo.advantage(reward_R, task_R, NUM_TASKS, kind=kind, wave_R=wave_R, past=PAST) for kind in KINDS}


def advantages(reward_X, task_X, eps=1e-6, wave_X=None) -> dict[str, np.ndarray]:
  """Of each kind. Behind the X rollouts stand rows that are none, whose rewards change nothing."""
  reward_R, task_R = padded(np.float32(reward_X), R, 7), padded(np.int32(task_X), R, NUM_TASKS)
  found = advantages_of(reward_R, task_R, eps) if wave_X is None else advantages_in_waves(
      reward_R, task_R, padded(np.int32(wave_X), R))
  for x_R in found.values():
    assert x_R.dtype == np.float32 and not np.any(x_R[len(reward_X):])
  return {kind: np.asarray(x_R[:len(reward_X)]) for kind, x_R in found.items()}


@jax.jit
def weights_of(task_R, length_R, completion_length):
  return {(weight, aggregate): grpo.token_weights(
      task_R, length_R, NUM_TASKS, weight=weight, aggregate=aggregate, completion_length=completion_length)
          for weight, aggregate in WEIGHINGS}


@functools.partial(jax.jit, static_argnums=5)
def weights_in_waves(task_R, length_R, completion_length, wave_R, share_W, least):
  return {(weight, aggregate): grpo.token_weights(
      task_R, length_R, NUM_TASKS, weight=weight, aggregate=aggregate, completion_length=completion_length,
      wave_R=wave_R, share_W=share_W, least=least) for weight, aggregate in WEIGHINGS}


def weights(task_X, length_X, completion_length=5, wave_X=None, share_W=None, least=1
            ) -> dict[tuple[str, str], np.ndarray]:
  """Of each weight and aggregate; behind the X rollouts stand rows that are none."""
  args = padded(np.int32(task_X), R, NUM_TASKS), padded(np.int32(length_X), R), completion_length
  found = weights_of(*args) if wave_X is None else weights_in_waves(
      *args, padded(np.int32(wave_X), R), np.float32(share_W), least)
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
waves = st.lists(st.integers(0, 2), min_size=14, max_size=14).map(np.int32)
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
                       ('mean', [-1 / 4, 3 / 4, -1 / 4, -1 / 4, 0, 0, 0, 0, 0, 0, -1 / 2, 1 / 2]),
                       ('maxrl', [-1, 3, -1, -1, 0, 0, 0, 0, 0, 0, -1, 1]),
                       # Known: 4 rollouts of mean .2, nothing (mean .5), 8 of mean 0, nothing, 100 of mean .3.
                       ('posterior', [-1.8 / 7, 1 - 0.8 / 7, -1.8 / 7, -1.8 / 7, 0.5, 1 - 1 / 9, 1 - 1 / 9, 0, 0, 0,
                                      -31 / 101, 1 - 30 / 101])):
    np.testing.assert_allclose(found[kind], want_R, rtol=1e-5)
  np.testing.assert_allclose(advantages([0, 1], [0, 0], eps=0.5)['std'], [-0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize('reward', [0.7, 0.1, 1e6 + 0.1])
def test_groups_of_equal_rewards_have_exactly_none(reward):
  """The sum of three 0.7 is not thrice 0.7 in float32."""
  for n in (3, 93):
    for kind, advantage_R in advantages([0, 1] + [reward] * n, [0, 0] + [1] * n).items():
      # Of task 1 nothing is known: the baseline is exactly the others' mean.
      assert np.all(advantage_R[2:] == 0) and np.all(advantage_R[:2] != 0), kind


def test_waves_by_hand():
  """A task of 2 rollouts, one right, and 2 more, both right; one of a wrong rollout and 2 right ones."""
  found = advantages([0, 1, 1, 1, 0, 1, 1], [0] * 4 + [1] * 3, wave_X=[0, 0, 1, 1, 0, 1, 1])
  std = (3 / 16) ** 0.5
  for kind, want_R in (('loo', [-1, 1, 1 / 3, 1 / 3, 0, 1 / 2, 1 / 2]),
                       ('mean', [-1 / 2, 1 / 2, 1 / 4, 1 / 4, 0, 1 / 3, 1 / 3]),
                       ('std', [-1, 1, 1 / 4 / std, 1 / 4 / std, 0, 2 ** -0.5, 2 ** -0.5]),
                       ('maxrl', [-1, 1, 1 / 3, 1 / 3, 0, 1 / 2, 1 / 2]),
                       # Of task 0 four rollouts of mean .2 are known: .8 right ones.
                       ('posterior', [-1.8 / 5, 1 - 0.8 / 5, 1 - 2.8 / 7, 1 - 2.8 / 7, -0.5, 1 / 2, 1 / 2])):
    np.testing.assert_allclose(found[kind], want_R, rtol=1e-5, err_msg=kind)


def test_a_mean_that_is_not_above_0_has_no_advantage_over_it():
  """Rewards with a penalty: means of 0, below it, and of .1."""
  found = advantages([-1, 1, -1, 0, -0.8, 1], [0, 0, 1, 1, 2, 2])['maxrl']
  np.testing.assert_allclose(found, [0, 0, 0, 0, -9, 9], rtol=1e-5)


def test_a_posterior_needs_to_know_the_past():
  with pytest.raises(ValueError, match=r"kind='posterior' reads past=None; pass .* or set kind='loo'"):
    grpo.advantage(np.zeros(2, np.float32), np.zeros(2, np.int32), 1, kind='posterior')


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
    want_R = advantage_by_loops(reward_R, task_R, NUM_TASKS, kind, past=PAST)
    if kind == 'maxrl':  # a mean near 0 has any sign
      sum_M = np.bincount(task_R, weights=reward_R, minlength=NUM_TASKS)
      advantage_R, want_R = (x_R[np.abs(sum_M[task_R]) > 1e-3] for x_R in (advantage_R, want_R))
    np.testing.assert_allclose(advantage_R, want_R, rtol=1e-4, atol=1e-5)
    if kind in ('std', 'loo', 'mean'):
      learns_M = np.bincount(task_R, weights=advantage_R != 0, minlength=NUM_TASKS) > 0
      np.testing.assert_array_equal(learns_M, mixed_M)


@given(verdict_R=st.lists(st.booleans(), min_size=14, max_size=14).map(np.float32), task_R=groups, wave_R=waves)
def test_waves_are_the_loop_over_earlier_rollouts(verdict_R, task_R, wave_R):
  """And one wave is the whole group, bit for bit."""
  for kind, advantage_R in advantages(verdict_R, task_R, wave_X=wave_R).items():
    np.testing.assert_allclose(
        advantage_R, advantage_by_loops(verdict_R, task_R, NUM_TASKS, kind, wave_R=wave_R, past=PAST),
        rtol=1e-4, atol=1e-5)
  for kind, advantage_R in advantages(verdict_R, task_R, wave_X=0 * wave_R).items():
    np.testing.assert_array_equal(advantage_R, advantages(verdict_R, task_R)[kind])


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


def test_token_weights_of_waves_by_hand():
  """A task of two rollouts and three more, and one of two alone; the waves have 2/3 and 1/3 of the rollouts. C = 5.

  N is 3 and 9, and 3: of the first wave sum f = 6 ('rollout'), 2 ('task') and 2 sqrt(3) ('sqrt').
  """
  found = weights([0, 0, 0, 0, 0, 1, 1], [1, 2, 1, 1, 2, 1, 1], 5, [0, 0, 1, 1, 1, 0, 0], [2 / 3, 1 / 3])
  for kinds, want_R in {
      ('rollout', 'constant'): [1 / 30] * 7,
      ('task', 'constant'): [1 / 30, 1 / 30, 1 / 90, 1 / 90, 1 / 90, 1 / 30, 1 / 30],
      ('task', 'rollout'): [1 / 6, 1 / 12, 1 / 18, 1 / 18, 1 / 36, 1 / 6, 1 / 6],
      ('sqrt', 'constant'): [1 / 30, 1 / 30, *[3 ** -0.5 / 30] * 3, 1 / 30, 1 / 30],
      # (3 + 2) / 3 + 4 / 9 = 19 / 9.
      ('task', 'token'): [3 / 19, 3 / 19, 1 / 19, 1 / 19, 1 / 19, 3 / 19, 3 / 19],
  }.items():
    np.testing.assert_allclose(found[kinds], want_R, rtol=1e-5, err_msg=str(kinds))
  # Without shares those of the rows count: 4 and 3 of 7.
  of_rows = jax.jit(functools.partial(
      grpo.token_weights, num_tasks=2, weight='task', aggregate='constant', completion_length=1))
  np.testing.assert_allclose(
      of_rows(np.int32([0, 0, 0, 0, 0, 1, 1]), np.ones(7, np.int32), wave_R=np.int32([0, 0, 1, 1, 1, 0, 0])),
      [4 / 7 / 4, 4 / 7 / 4, *[3 / 7 / 6] * 3, 4 / 7 / 4, 4 / 7 / 4], rtol=1e-6)


def test_a_wave_that_teaches_nothing_gives_its_share_to_the_next_by_hand():
  """Waves of 1/2, 1/4 and 1/4; tasks of (2, 0, 1), (1, 1, 1), (0, 1, 0) and (1, 0, 0) rollouts."""
  task_X, wave_X = [0, 0, 0, 1, 1, 1, 2, 3], [0, 0, 2, 0, 1, 2, 1, 0]
  for least, want_X in ((1, [1 / 4, 1 / 4, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 3 / 4, 1 / 2]),
                        # The second rollout of task 1 learns for the first too; those of 2 and 3 have no advantage.
                        (2, [1 / 4, 1 / 4, 1 / 2, 1 / 2, 3 / 4, 1 / 4, 3 / 4, 1 / 2])):
    found = weights(task_X, [1] * 8, 1, wave_X, [0.5, 0.25, 0.25], least)['task', 'constant']
    np.testing.assert_allclose(found, np.array(want_X) / 3, rtol=1e-6)  # three tasks have a first wave


@pytest.mark.parametrize('least', [1, 2])
@given(drawn=st.lists(st.tuples(st.integers(0, NUM_TASKS), st.integers(1, 9), st.integers(0, 2)), max_size=14))
def test_token_weights_of_waves_are_the_loop_over_tasks(drawn, least):
  """Also where the first wave has no rollout."""
  task_R, length_R, wave_R = np.int32(drawn).reshape(-1, 3).T
  length_R, share_W = np.where(task_R < NUM_TASKS, length_R, 0), [0.5, 0.3, 0.2]
  for (weight, aggregate), got_R in weights(task_R, length_R, 9, wave_R, share_W, least).items():
    np.testing.assert_allclose(got_R, weights_by_loops(
        task_R, length_R, NUM_TASKS, weight, aggregate, 9, wave_R=wave_R, share_W=share_W, least=least), rtol=1e-5)


# Rollouts that are dropped.


@jax.jit
def dropped(advantage_R, keep, keys):
  return jax.vmap(lambda key: grpo.drop_small(advantage_R, keep, key))(keys)


def test_drop_small_by_hand():
  """Two of six stay: tau = 2, so that chances are 1, 1/2, 1/2, and 0 where there is no advantage."""
  found = np.asarray(dropped(np.float32([4, -1, 1, 0, 0, 0]), 2.0, jax.random.split(jax.random.key(0), 4096)))
  np.testing.assert_allclose(np.abs(found).max(axis=0), [4, 2, 2, 0, 0, 0], rtol=1e-5)
  assert set(np.round(np.unique(found), 4)) == {-2, 0, 2, 4}
  assert np.all(found[:, 0] == 4) and np.all(found[:, 1] <= 0)
  # Three standard errors of a share of 1/2 in 4096 draws.
  np.testing.assert_allclose((found != 0).mean(axis=0), [1, 0.5, 0.5, 0, 0, 0], atol=3 * 0.5 / 64)


@pytest.mark.parametrize('keep', [6, 6.5, 93.0])
def test_where_fewer_have_an_advantage_all_stay(keep):
  advantage_R = np.float32([0.3, -1e-8, 0, 0.1, 7, -2, 0, 1])
  found = dropped(advantage_R, keep, jax.random.split(jax.random.key(1), 8))
  np.testing.assert_array_equal(found, np.tile(advantage_R, (8, 1)))


@pytest.mark.parametrize('keep', [0.5, 7.3, 20])
def test_dropping_leaves_the_expectation(keep):
  """`keep` stay on the mean, and the mean advantage is the advantage, to four standard errors of 8192 draws, and one
  draw: |A| (tau - |A|) is the variance of what is 0 or tau with the mean A."""
  advantage_R = np.random.default_rng(0).normal(size=32).astype(np.float32) ** 3
  found = np.asarray(dropped(advantage_R, keep, jax.random.split(jax.random.key(2), 8192)), float)
  kept = (found != 0).sum(axis=1)
  assert kept.mean() == pytest.approx(keep, abs=4 * kept.std() / 8192 ** 0.5 + 1e-5)
  tau, size_R = np.abs(found[found != 0]).min(), np.abs(advantage_R)
  error_R = np.sqrt(size_R * np.maximum(tau - size_R, 0) / 8192)
  assert np.all(np.abs(found.mean(axis=0) - advantage_R) <= 4 * error_R + tau / 8192 + 1e-5 * size_R)


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
def advantages_and_weights(reward_R, task_R, length_R):
  past = grpo.Past(np.float32([0.8, 0.5]), np.float32([3, 0]))  # far from the success rate
  return ({kind: grpo.advantage(reward_R, task_R, 2, kind=kind, past=past) for kind in KINDS},
          {kinds: grpo.token_weights(task_R, length_R, 2, weight=kinds[0], aggregate=kinds[1], completion_length=5)
           for kinds in WEIGHINGS})


def pushes_of(*rows) -> dict[tuple[str, str, str], np.ndarray]:
  """By kind, weight and aggregate: what multiplies the score of each rollout of each draw."""
  advantages, weights = jax.tree.map(np.asarray, advantages_and_weights(*rows))
  return {(kind, *kinds): advantages[kind] * weights[kinds] for kind, kinds in itertools.product(KINDS, WEIGHINGS)}


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
  """It does not depend on it where tasks weigh the same, with leave-one-out advantages, and with posteriors where no
  length counts; exactly, by enumeration."""
  by_budget = {n: expected_gradient(n) for n in (1, 2, 3, 8)}
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
  for n in (1, 2, 3, 8):
    np.testing.assert_allclose(by_budget[n]['posterior', 'task', 'constant'], exact_V / 5 / 2, rtol=1e-4)
  one_V, eight_V = (by_budget[n]['posterior', 'task', 'rollout'] for n in (1, 8))
  assert np.linalg.norm(one_V - eight_V) > 0.1 * np.linalg.norm(eight_V)
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


# The expected gradient under budgets that follow the rewards.

# Three tasks of three completions: their chances, and the lengths and rewards of all. Right ones are short.
CHANCE_MV = np.array([[0.1, 0.6, 0.3], [0.5, 0.1, 0.4], [0.3, 0.3, 0.4]])
LENGTHS_V, RIGHT_V = np.array([1, 8, 3]), np.array([1, 0, 0])
FIRST, LATER = 4, 6  # the most rollouts of a task in each wave
WAVE_R = np.tile(np.repeat([0, 1], [FIRST, LATER]), 3).astype(np.int32)
SHARE_W = np.float32([8 / 16, 8 / 16, 0])
UNBIASED = [(kind, weight) for kind in ('loo', 'posterior') for weight in WEIGHTS]


@functools.partial(jax.jit, static_argnums=4)
def pushes_in_waves(reward_TR, task_TR, length_TR, past_TM, pairs):
  """Of each trial, by kind, weight and whether waves are told apart: the advantages times the weights, and those."""
  def one(reward_R, task_R, length_R, past_M, kind, weight, wave_R):
    weight_R = grpo.token_weights(
        task_R, length_R, 3, weight=weight, aggregate='constant', completion_length=8, wave_R=wave_R, share_W=SHARE_W,
        least=2 if kind == 'loo' else 1)
    past = grpo.Past((past_M + 0.5) / 5, jnp.full(3, 5.0))
    return weight_R * grpo.advantage(reward_R, task_R, 3, kind=kind, wave_R=wave_R, past=past), weight_R
  args = reward_TR, task_TR, length_TR, past_TM
  return {(kind, weight, name): jax.vmap(functools.partial(one, kind=kind, weight=weight, wave_R=wave_R))(*args)
          for kind, weight in pairs for name, wave_R in (('apart', WAVE_R), ('together', None))}


def bias_in_waves(trials: int, pairs=tuple(UNBIASED)) -> dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]:
  """The mean over trials, in standard errors, of gradient_MV - (sum of the task's weights) times the policy gradient;
  and the sum's standard deviation over trials.

  Earlier rewards decide a task's budget in the first wave, 1 to 4 rollouts, and the first wave's the second, 1 to 6.
  One first rollout alone has no advantage with 'loo', and does not count for the sum.
  """
  rng = np.random.default_rng(0)
  past_TM = rng.binomial(4, CHANCE_MV[:, 0], (trials, 3))
  drawn_TMN = np.stack([rng.choice(3, (trials, FIRST + LATER), p=p_V) for p_V in CHANCE_MV], axis=1)
  by_size = lambda x_TM: np.argsort(np.argsort(x_TM + rng.random(x_TM.shape), axis=1), axis=1)  # 0: the least
  first_TM = np.array([4, 3, 1])[by_size(past_TM)]
  number_N = np.arange(FIRST)
  hits_TM = np.sum(RIGHT_V[drawn_TMN[..., :FIRST]] * (number_N < first_TM[..., None]), axis=2)
  later_TM = np.array([6, 1, 1])[by_size(hits_TM)]
  in_TMN = np.concatenate([number_N < first_TM[..., None], np.arange(LATER) < later_TM[..., None]], axis=2)
  flat = lambda x_TMN: x_TMN.reshape(trials, -1)
  task_TR = flat(np.where(in_TMN, np.arange(3)[:, None], 3)).astype(np.int32)
  found = pushes_in_waves(flat(RIGHT_V[drawn_TMN]).astype(np.float32), task_TR,
                          flat(np.where(in_TMN, LENGTHS_V[drawn_TMN], 0)), past_TM.astype(np.float32), pairs)
  gradient_MV = CHANCE_MV * (RIGHT_V - CHANCE_MV @ RIGHT_V[:, None])  # of the expected reward, by the logits
  scores = [np.eye(3) - p_V for p_V in CHANCE_MV]
  bias = {}
  for kinds, of in found.items():
    push_TMN, weight_TMN = (np.asarray(x, float).reshape(trials, 3, -1) for x in of)
    got_TMV = np.stack([np.einsum('tn,tnv->tv', push_TMN[:, m], scores[m][drawn_TMN[:, m]]) for m in range(3)], axis=1)
    if kinds[0] == 'loo':
      weight_TMN[..., :FIRST] *= (first_TM > 1)[..., None]
    weight_TM = weight_TMN.sum(axis=2)
    rest_TMV = got_TMV - weight_TM[..., None] * gradient_MV
    bias[kinds] = rest_TMV.mean(axis=0) / (rest_TMV.std(axis=0) / trials ** 0.5), weight_TM.std(axis=0)
  return bias


@pytest.mark.parametrize('trials, pairs', [
    (20_000, (('loo', 'task'),)), pytest.param(100_000, tuple(UNBIASED), marks=pytest.mark.exhaustive)], ids=['one', 'all'])
def test_gradients_under_budgets_that_follow_the_rewards_are_unbiased(trials, pairs):
  """To three standard errors each, in direction and size; statistics of all waves are not."""
  bias = bias_in_waves(trials, pairs)
  for kind, weight in pairs:
    errors_MV, spread_M = bias[kind, weight, 'apart']
    assert np.abs(errors_MV).max() < 3, (kind, weight, errors_MV)
    if weight == 'task':  # as with uniform budgets: each task weighs the same, whatever its rewards
      assert spread_M.max() < 1e-7
    if (kind, weight) in (('loo', 'rollout'), ('loo', 'task')):
      assert np.abs(bias[kind, weight, 'together'][0]).max() > 5, (kind, weight)


def push_of(verdict_TR, task_R, *, kind, wave_R=None, past_T=None) -> np.ndarray:
  """advantage_TR of each trial. past_T: of 8 earlier rollouts the right ones, with a prior Beta(.5, .5)."""
  def one(verdict_R, task_R, past):
    known = grpo.Past((past[None] + 0.5) / 9, jnp.full(1, 9.0))
    return grpo.advantage(verdict_R, task_R, 1, kind=kind, wave_R=wave_R, past=known)
  task_TR = np.broadcast_to(np.int32(task_R), verdict_TR.shape)
  past_T = np.zeros(len(verdict_TR)) if past_T is None else past_T
  return np.asarray(jax.jit(jax.vmap(one))(np.float32(verdict_TR), task_TR, np.float32(past_T)), float)


@pytest.mark.slow
@pytest.mark.parametrize('p, loo, std', [
    (0.05, 1.01, 2.14), (0.5, 1.12, 1.61), pytest.param(0.2, 1.05, 1.90, marks=pytest.mark.exhaustive),
    pytest.param(0.9, 1.08, 1.17, marks=pytest.mark.exhaustive)])
def test_how_much_waves_bias_statistics_of_all(p, loo, std):
  """E[sum A (v - p)] / (E[N] p (1 - p)), which should be 1, of two rollouts, and six more where both fail."""
  rng, trials = np.random.default_rng(0), 200_000
  verdict_TR = rng.random((trials, 8)) < p
  task_TR = np.where(verdict_TR[:, :2].any(axis=1)[:, None] & (np.arange(8) >= 2), 1, 0)
  wave_R = np.int32([0, 0] + [1] * 6)
  def ratio(kind, wave_R=None):
    advantage_TR = push_of(verdict_TR, task_TR, kind=kind, wave_R=wave_R)
    return (advantage_TR * (verdict_TR - p)).sum(axis=1).mean() / ((task_TR == 0).sum(axis=1).mean() * p * (1 - p))
  assert ratio('loo') == pytest.approx(loo, abs=0.02)
  assert ratio('std') == pytest.approx(std, abs=0.02)
  assert 1 < ratio('std', wave_R) < ratio('std')  # what is left is the factor that 'std' has without waves
  for kind in ('loo', 'posterior'):
    assert ratio(kind, wave_R) == pytest.approx(1, abs=0.015)


@pytest.mark.slow
@pytest.mark.parametrize('n, low, high', [
    (2, 1.4, 2.1), (8, 1.03, 1.12), pytest.param(4, 1.15, 1.3, marks=pytest.mark.exhaustive),
    pytest.param(16, 1.01, 1.05, marks=pytest.mark.exhaustive)])
def test_what_the_past_adds_to_signal_and_noise(n, low, high):
  """mean^2 / variance of a group's gradient, of 'posterior' over 'loo', with 8 rollouts of the past; a rollout's score
  is (v - p) x and noise of power 8 |x|^2."""
  rng, trials = np.random.default_rng(n), 100_000
  for p in (0.05, 0.2, 0.5, 0.9):
    past_T, verdict_TR = rng.binomial(8, p, trials), rng.random((trials, n)) < p
    def ratio(kind):
      advantage_TR = push_of(verdict_TR, np.zeros(n), kind=kind, past_T=past_T)
      push_T = (advantage_TR * (verdict_TR - p)).sum(axis=1)
      assert push_T.mean() == pytest.approx(n * p * (1 - p), abs=4 * push_T.std() / trials ** 0.5)
      return push_T.mean() ** 2 / (push_T.var() + 8 * np.square(advantage_TR).sum(axis=1).mean())
    assert low < ratio('posterior') / ratio('loo') < high, p


@pytest.mark.slow
@pytest.mark.parametrize('n', [4, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (2, 8))])
def test_what_dropping_costs_in_signal(n):
  """Signal to noise of a step's gradient over that of 'loo', as above; 64 tasks of success rates Beta(.5, .5)."""
  rng, M, trials = np.random.default_rng(n), 64, 2_000
  p_M, task_R = rng.beta(0.5, 0.5, M), np.repeat(np.arange(M), n).astype(np.int32)
  verdict_TR = np.float32(rng.random((trials, M * n)) < p_M[task_R])
  mean_TM = np.float32((rng.binomial(8, p_M, (trials, M)) + 0.5) / 9)
  keys = jax.random.split(jax.random.key(n), trials)

  def measured(kind, keep):
    def one(verdict_R, mean_M, key):
      advantage_R = grpo.advantage(verdict_R, task_R, M, kind=kind, past=grpo.Past(mean_M, jnp.full(M, 9.0)))
      return grpo.drop_small(advantage_R, keep * M * n, key) if keep < 1 else advantage_R
    advantage_TR = np.asarray(jax.jit(jax.vmap(one))(verdict_TR, mean_TM, keys), float)
    push_TM = (advantage_TR * (verdict_TR - p_M[task_R])).reshape(trials, M, n).sum(axis=2)
    noise = push_TM.var(axis=0).sum() + 8 * np.square(advantage_TR).sum(axis=1).mean()
    return np.square(push_TM.mean(axis=0)).sum() / noise, (advantage_TR != 0).mean()

  of_loo, share = measured('loo', 1)
  of = {keep: measured('posterior', keep) for keep in (1, 0.75, 0.5, share)}
  print(f'\nn = {n}: loo computes {share:.2f} of the rollouts; posterior', ', '.join(
      f'{computed:.2f} at {ratio / of_loo:.2f} times the signal to noise' for ratio, computed in of.values()))
  for keep, (ratio, computed) in of.items():
    assert computed == pytest.approx(keep, abs=0.01)
    assert ratio <= 1.02 * of[1][0]
  assert of[1][0] > 1.04 * of_loo
  assert of[0.75][0] > 0.96 * of[1][0]


def of_a_ratio(budget: int, tasks: int = 1, p: float = 0.1) -> float:
  """The expected gradient of a task, of `tasks` with the same budget, over that of a divisor of the expected tokens:
  aggregate 'token', weight 'task'. Right completions have 1 token, wrong ones 8. Exactly, by enumeration."""
  others = (tasks - 1) * budget
  chance = lambda k, n: math.comb(n, k) * p ** k * (1 - p) ** (n - k)
  cases = list(itertools.product(range(budget + 1), range(others + 1)))
  verdict_XR = np.array([[1] * k + [0] * (budget - k) + [1] * o + [0] * (others - o) for k, o in cases], np.float32)
  task_R = np.repeat(np.arange(tasks), budget).astype(np.int32)
  weigh = lambda verdict_R: grpo.token_weights(
      task_R, jnp.where(verdict_R > 0, 1, 8), tasks, weight='task', aggregate='token', completion_length=8)
  push_XR = jax.jit(jax.vmap(lambda v_R: weigh(v_R) * grpo.advantage(v_R, task_R, tasks, kind='loo')))(verdict_XR)
  of_task_X = np.sum(np.asarray(push_XR, float)[:, :budget] * (verdict_XR[:, :budget] - p), axis=1)
  expected = sum(chance(k, budget) * chance(o, others) * x for (k, o), x in zip(cases, of_task_X))
  return expected / (p * (1 - p) / (p + 8 * (1 - p)) / tasks)


@pytest.mark.slow
def test_the_size_of_the_bias_of_a_mean_over_tokens():
  of_64 = of_a_ratio(64)
  assert [round(of_a_ratio(n) / of_64, 2) for n in (2, 4, 8)] == [1.60, 1.25, 1.10]
  assert of_64 == pytest.approx(1, abs=0.02)
  # It falls like 1 / M.
  assert of_a_ratio(2, tasks=8) == pytest.approx(1.056, abs=1e-3)
  assert of_a_ratio(2, tasks=16) - 1 == pytest.approx(0.056 / 2, rel=0.1)


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
