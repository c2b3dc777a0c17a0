"""The measurement of a gradient's noise against a loop over rollouts, a hand case, and a planted noise."""

import jax
import numpy as np
import pytest

from kr_jax import types
from kr_jax.learning import noise
from kr_jax.learning import update
from tests.learning import update_test
from tests.learning.update_test import BUDGET_M, C, CONFIG, POLICY, REWARD_R


def halves_of(verdict_R, task_R):
  """Every other rollout of an outcome of a task; which half begins does not matter."""
  half_R, seen = np.zeros(len(verdict_R), int), {0: 0, 1: 0}
  for r, v in enumerate(verdict_R):
    seen[int(v)] += 1
    half_R[r] = seen[int(v)] % 2
  return half_R


def noise_by_loops(score_RG, verdict_R, task_R, sign_M):
  """The formulas of noise.py, rollout by rollout. score_RG: the gradient of each."""
  half_R = halves_of(verdict_R, task_R)
  gradient, scale, squares = np.zeros((2, score_RG.shape[1])), np.zeros((2, len(sign_M))), 0.0
  for m, h in np.ndindex(len(sign_M), 2):
    group = [r for r in range(len(task_R)) if task_R[r] == m and half_R[r] == h]
    for r in group:
      others = [verdict_R[o] for o in group if o != r]
      advantage = verdict_R[r] - np.mean(others) if others else 0.0
      gradient[h] += sign_M[m] * advantage * score_RG[r]
      scale[h, m] += advantage * verdict_R[r]
      squares += advantage ** 2
  signal, signal_scale = gradient[0] @ gradient[1], scale[0] @ scale[1]
  if signal_scale == 0:
    return np.zeros(4)
  spread = np.sum((gradient[0] - gradient[1]) ** 2)
  noise = spread - signal / signal_scale * np.sum((scale[0] - scale[1]) ** 2)
  return np.array([signal, signal_scale, noise, squares])


@pytest.mark.slow
def test_gradient_noise_equals_a_loop_over_rollouts():
  """Rows beyond the rollouts change nothing."""
  rollouts, params = update_test.make_rollouts(), update_test.params_of()
  mask_RC = np.arange(C)[None] < rollouts.length_R[:, None]
  score_RG = np.stack([np.concatenate([np.ravel(np.asarray(x, float)) for x in jax.tree.leaves(
      update_test.pulled_back(
          POLICY, params, rollouts, update_test.rows(rollouts), CONFIG.temperature,
          np.float32(mask_RC * one_R[:, None]), np.zeros(mask_RC.shape, np.float32)))])
                       for one_R in np.eye(len(REWARD_R))])
  key = jax.random.key(0)
  sign_M = np.asarray(jax.random.rademacher(key, (len(BUDGET_M),), np.float32))
  assert sign_M[0] != sign_M[5]  # of the mixed groups
  want = noise_by_loops(score_RG, REWARD_R, rollouts.task_R, sign_M)
  got = noise.gradient_noise(params, {}, *update_test.padded(rollouts, REWARD_R), key, POLICY, CONFIG)
  assert want[1] > 0
  np.testing.assert_allclose(got, want, rtol=2e-4)


@pytest.mark.slow
def test_halves_are_of_what_is_not_left_out():
  """A rollout that is left out counts in no half, wherever it stands in its group. (The shapes are those of the test
  above, whose program serves.)"""
  task_R = np.repeat([0, 1], [12, 2])
  verdict_R = np.float32([1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0] + [0, 1])
  stays_R = np.array([1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1, 0] + [1, 1], bool)
  rollouts, _ = update_test.padded(update_test.make_rollouts(), REWARD_R)
  token_RC = np.tile(2 + np.arange(14, dtype=np.int32)[:, None] % 5, (1, C))
  rows = lambda x_R, rest=0: np.concatenate(
      [x_R, np.full((len(rollouts.task_R) - 14, *x_R.shape[1:]), rest)]).astype(x_R.dtype)
  measured = []
  for order_R in (np.arange(14), np.argsort(~stays_R, kind='stable')):  # and behind all that stay
    in_R = stays_R[order_R]
    measured.append(noise.gradient_noise(
        update_test.params_of(), {}, rollouts._replace(
            task_R=rows(np.where(in_R, task_R[order_R], len(BUDGET_M)).astype(np.int32), len(BUDGET_M)),
            length_R=rows(np.int32(in_R)), token_RC=rows(token_RC[order_R]),
            logp_RC=np.zeros_like(rollouts.logp_RC)),
        rows(verdict_R[order_R] * in_R), jax.random.key(0), POLICY, CONFIG))
  assert measured[0][1] > 0
  np.testing.assert_allclose(*measured, rtol=1e-4)


def test_gradient_noise_by_hand():
  """Four rollouts, two right, scores 1, 2, 3, 4 on one parameter.

  Halves: successes 1 and 2, failures 3 and 4, so (1, 3) and (2, 4); with two rollouts A = 1 and -1:
  gradients 1 - 3 = 2 - 4 = -2, scales 1 and 1, no spread, four A^2.
  """
  np.testing.assert_allclose(
      noise_by_loops(np.array([[1.0], [2], [3], [4]]), np.array([1, 1, 0, 0.0]), np.zeros(4, int),
                     np.array([-1.0])), [4, 1, 0, 4])


@pytest.mark.slow
def test_without_two_of_either_outcome_there_is_no_measurement():
  rollouts, _ = update_test.padded(update_test.make_rollouts(), REWARD_R)
  verdict_R = np.zeros(len(rollouts.task_R), np.float32)
  verdict_R[0] = 1
  got = noise.gradient_noise(update_test.params_of(), {}, rollouts, verdict_R, jax.random.key(0), POLICY, CONFIG)
  np.testing.assert_array_equal(got, np.zeros(4))


@pytest.mark.slow
@pytest.mark.parametrize('nu, alignment', [(0.5, 0.4), (8.0, 0.0)])
def test_a_planted_nu_is_found(monkeypatch, nu, alignment):
  """Scores (v - p) x + noise of power nu |x|^2, of tasks whose x share a direction."""
  M, N, G, steps = 48, 8, 128, 40
  task_R = np.repeat(np.arange(M), N).astype(np.int32)
  R, rng = M * N, np.random.default_rng(3)
  unit = lambda *shape: (lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True))(
      rng.normal(size=shape))
  x_MG = alignment ** 0.5 * unit(1, G) + (1 - alignment) ** 0.5 * unit(M, G)
  rollouts = update_test.make_rollouts()._replace(
      prompts=types.Prompts(np.ones((M, 1), np.int32), np.ones(M, np.int32),
                            np.arange(M, dtype=np.int32)),
      task_R=task_R, length_R=np.ones(R, np.int32), token_RC=np.zeros((R, 1), np.int32))

  def planted(policy_config, params, tokens, config):
    # logp of a rollout is linear in the parameters, in which its score stands.
    score_RG, theta_G = params
    logp_BT = jax.lax.stop_gradient(score_RG)[tokens.rollout_BT] @ theta_G
    return logp_BT, logp_BT

  monkeypatch.setattr(update, 'score', planted)
  config = CONFIG.replace(weight_decay=0.375)  # a mark: no other test runs the program of this score
  total = np.zeros(4)
  p_M = rng.uniform(0.2, 0.8, M)
  for step in range(steps):
    verdict_R = (rng.uniform(size=R) < p_M[task_R]).astype(np.float32)
    noise_RG = nu ** 0.5 * rng.normal(size=(R, G)) / G ** 0.5
    score_RG = (verdict_R - p_M[task_R])[:, None] * x_MG[task_R] + noise_RG
    total += np.asarray(noise.gradient_noise(
        (score_RG.astype(np.float32), np.zeros(G, np.float32)), {}, rollouts, verdict_R,
        jax.random.key(step), POLICY, config))
  signal, signal_scale, spread, spread_scale = total
  assert signal / signal_scale == pytest.approx(1, rel=0.25)
  assert spread / spread_scale == pytest.approx(nu, rel=0.1)
