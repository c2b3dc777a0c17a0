"""How much of a rollout's gradient is noise, measured from two halves of a batch.

In the model of value.snr the score s_r = grad log prob(rollout r) of a task with success rate p is (v_r - p) x plus
noise of power nu |x|^2, where v_r is the verdict. Each half h of a group is taken as a group of its own, with
leave-one-out advantages A_r. These sum to 0, so that p drops out:

    g_h = sum over tasks, sign * sum over r in h, A_r s_r        c_h = sum over r in h, A_r v_r
    E[g_0 . g_1]     = |x|^2 sum over tasks, c_0 c_1
    E[|g_0 - g_1|^2] = |x|^2 sum over tasks, (c_0 - c_1)^2 + nu |x|^2 sum over r, A_r^2

Both hold given the verdicts, so that neither the budgets nor the waves that led to them matter: a group is here all
rollouts of a task.

The random signs make the products of different tasks' directions x 0 on average. A task with two successes and two
failures or more tells of the signal.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kr_jax import sharding
from kr_jax import types
from kr_jax.costs import programs
from kr_jax.learning import grpo
from kr_jax.learning import update
from kr_jax.model import policy
from kr_jax.types import Array


def gradient_noise(trained: Any, base: Any, rollouts: types.Rollouts, verdict_R: np.ndarray,
                   key: Array, policy_config: policy.Config, config: update.Config) -> Array:
  """Signal and noise of a rollout's gradient, at the cost of a forward and two backward passes.

  Args:
    trained, base, rollouts, policy_config, config: as in `update.step`.
    verdict_R: float32, 1.0 or 0.0; 0.0 where there is no rollout.
    key: of the signs, new every step.

  Returns:
    float32 [4]: signal, its scale, noise, its scale. Of sums over steps, signal / its scale estimates |x|^2, and
    noise / its scale nu |x|^2 (estimate.nu).
  """
  mixed_M = grpo.mixed_tasks(verdict_R, rollouts.task_R, len(rollouts.prompts.length_M))
  packed = update.pack_rollouts(rollouts, np.append(mixed_M, False)[np.asarray(rollouts.task_R)], config)
  return programs.run(
      gradient_noise_of_tokens, trained, base, rollouts.task_R, verdict_R, update.gather(rollouts, packed),
      packed.first[-1], key, len(rollouts.prompts.length_M), policy_config, config,
      trips={update.MICROBATCHES: int(packed.first[-1])})


@functools.partial(jax.jit, static_argnums=(7, 8, 9))
def gradient_noise_of_tokens(trained: Any, base: Any, task_R: Array, verdict_R: Array, tokens: update.Tokens,
                             end: Array, key: Array, M: int, policy_config: policy.Config, config: update.Config
                             ) -> Array:
  """`gradient_noise` on the device, of the microbatches before the end."""
  right_R = verdict_R > 0
  wrong_R = ~right_R & (task_R < M)
  # Every other rollout of each verdict of a task, as the rollouts of a task stand together.
  half_R = jnp.where(right_R, jnp.cumsum(right_R), jnp.cumsum(wrong_R)) % 2
  group_R = 2 * task_R + half_R
  advantage_R = grpo.advantage(verdict_R, group_R, 2 * M, kind='loo')
  sign_R = jax.random.rademacher(key, (M,), jnp.float32)[jnp.minimum(task_R, M - 1)]
  weight_2R = jnp.where(half_R[None] == jnp.arange(2)[:, None], sign_R * advantage_R, 0.0)

  def half_gradients(arguments, microbatch):
    trained, base, weight_2R = arguments

    def weighted_logp(trained):
      params = policy.join(policy_config, trained, base)
      logp_BT, *_ = update.score(policy_config, params, microbatch, config)
      logp_BT = jnp.where(microbatch.mask_BT, logp_BT, 0.0)
      return jnp.einsum('hbt,bt->h', weight_2R[:, microbatch.rollout_BT], logp_BT)

    _, pull = jax.vjp(weighted_logp, trained)
    return tuple(sharding.constrain(pull(half_2)[0]) for half_2 in jnp.eye(2))

  halves = update.sum_over_microbatches(half_gradients, (trained, base, weight_2R), tokens, jnp.array(0), end)
  c_2M = jax.ops.segment_sum(advantage_R * verdict_R, group_R, 2 * M).reshape(M, 2).T
  signal, signal_scale = optax.tree.vdot(*halves), jnp.sum(c_2M[0] * c_2M[1])
  spread = optax.tree.norm(jax.tree.map(jnp.subtract, *halves), squared=True)
  noise = spread - jnp.sum((c_2M[0] - c_2M[1]) ** 2) * signal / jnp.maximum(signal_scale, 1e-30)
  # Without a scale of the signal, nothing tells which part of the spread is noise.
  sums = jnp.stack([signal, signal_scale, noise, jnp.sum(advantage_R ** 2)])
  return sharding.replicate(jnp.where(signal_scale > 0, sums, 0.0))
