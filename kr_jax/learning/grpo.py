"""Group-relative advantages and the family of clipped policy losses.

    advantage    A_r = (reward_r - mean_g) / (std_g + eps)      'std',   g = task_R[r]
                       (reward_r - mean_g) N_g / (N_g - 1)      'loo': less the mean of the others
                        reward_r - mean_g                       'mean'
    ratio        w_t = exp(logp_t - old_logp_t)                 'grpo', 'cispo'
                       exp(mean over the rollout's tokens of logp - old_logp)    'gspo'
    loss         l_t = -min(w A, clip(w, 1 - low, 1 + high) A)  'grpo', 'gspo'
                 -stop_gradient(clip(w, 1 - low, 1 + high)) A logp_t             'cispo'
    whole        sum over tokens, weight_r [tis_t l_t + kl_coef kl_t - entropy_coef entropy_t]

Groups are ragged, so their statistics are segment sums over `task_R`; nothing is reshaped.

The weight of a task is a decision: N, 1 or sqrt(N) of its N rollouts (`weight`), shared out by rollouts
or by tokens (`aggregate`, see `token_weights`). With 'loo' and weight 'task' the expected gradient of
a task does not depend on its budget; with 'std' it does, whatever the weight: the factor depends on N
and the success rate, and is largest for rare successes among many rollouts.

Sources: Shao et al. 2024, arXiv 2402.03300, eq. 3 (GRPO) and 4 (k3); Kool et al. 2019, Buy 4 REINFORCE
samples, get a baseline for free, eq. 8, and Ahmadian et al. 2024, arXiv 2402.14740, section 3 (RLOO);
Liu et al. 2025, arXiv 2503.20783, section 3.2 (Dr. GRPO); Yu et al. 2025, arXiv 2503.14476, eq. 10
(DAPO); Zheng et al. 2025, arXiv 2507.18071, eq. 5-7 (GSPO); MiniMax 2025, arXiv 2506.13585, eq. 4
(CISPO); Ye et al. 2020, arXiv 1912.09729, eq. 5 (dual clip); Tang and Munos 2025, arXiv 2506.09477
(gradients of KL estimates); Yao et al. 2025, Your efficient RL framework secretly brings you
off-policy RL training (truncated importance sampling).
Differs: population standard deviation (ddof 0), and advantages are not clipped, which would push a
task with few successes down on the whole.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kr_jax import knobs
from kr_jax.types import Array

def advantage(reward_R: Array, task_R: Array, num_tasks: int, *, kind: str = 'std',
              eps: float = 1e-6) -> Array:
  """Group-relative advantages; exactly 0 in groups whose rewards are all equal.

  Args:
    reward_R: float32.
    task_R: int32 in 0..M-1, the group of each rollout; groups may have any size, 0 and 1 included.
      Rollouts of task M are of no group, and have 0.
    num_tasks: M.
    kind: 'std', 'loo' or 'mean'.
    eps: added to the std.
  """
  sum_of = lambda x_R: jax.ops.segment_sum(x_R, task_R, num_tasks)
  of_R = jnp.minimum(task_R, num_tasks - 1)
  count_M = jnp.maximum(sum_of(jnp.ones_like(reward_R)), 1)
  centred_R = reward_R - (sum_of(reward_R) / count_M)[of_R]
  if kind == 'std':
    scale_M = 1 / (jnp.sqrt(sum_of(jnp.square(centred_R)) / count_M) + eps)
  elif kind == 'loo':
    scale_M = count_M / jnp.maximum(count_M - 1, 1)
  else:
    scale_M = jnp.ones_like(count_M)
  # Decided by the rewards themselves: a mean of equal rewards may be off by a rounding.
  mixed_M = (jax.ops.segment_max(reward_R, task_R, num_tasks)
             > jax.ops.segment_min(reward_R, task_R, num_tasks))
  return jnp.where(mixed_M[of_R] & (task_R < num_tasks), centred_R * scale_M[of_R], 0.0)


def token_weights(task_R: Array, length_R: Array, num_tasks: int, *, weight: str, aggregate: str,
                  completion_length: int) -> Array:
  """What each token of a rollout counts in the loss.

  A task of N rollouts weighs f = N ('rollout'), 1 ('task') or sqrt(N) ('sqrt'), each of its rollouts
  f / N, and a token of a rollout of n tokens, over the sum that makes the loss a mean:

      'token'     f / N        / sum over rollouts of f n / N    mean over all tokens (DAPO)
      'rollout'   f / (N n)    / sum over tasks of f             mean over rollouts of their means (GRPO)
      'constant'  f / (N C)    / sum over tasks of f             no longer rollout counts more (Dr. GRPO)

  So a task's tokens weigh f together with 'rollout', f times their mean number n with 'token' and
  'constant', relative to those of other tasks.

  Args:
    task_R: int32 in 0..M; M where there is no rollout.
    length_R: int32, completion tokens; 0 where there is no rollout.
    num_tasks: M.
    weight, aggregate: as of knobs.Grpo.
    completion_length: C.

  Returns:
    weight_R, float32; 0 where there is no rollout.
  """
  count_M = jax.ops.segment_sum(jnp.ones(task_R.shape, jnp.float32), task_R, num_tasks)
  power = {'rollout': 0.0, 'task': -1.0, 'sqrt': -0.5}[weight]
  share_R = jnp.maximum(count_M, 1)[jnp.minimum(task_R, num_tasks - 1)] ** power
  share_R = jnp.where((task_R < num_tasks) & (length_R > 0), share_R, 0.0)
  n_R = jnp.maximum(length_R, 1).astype(jnp.float32)
  a_token_R, total_R = {'token': (share_R, share_R * n_R), 'rollout': (share_R / n_R, share_R),
                        'constant': (share_R / completion_length, share_R)}[aggregate]
  total = jnp.sum(total_R)
  return a_token_R / jnp.where(total > 0, total, 1.0)


def policy_loss(log_ratio: Array, logp: Array, advantage: Array, config: knobs.Grpo
                ) -> tuple[Array, Array, Array]:
  """The loss of each token, and whether a bound took its gradient: at the lower end of the ratio, or
  at its upper end. Any one shape.

  Args:
    log_ratio: log of the token's ratio, or of its rollout's with 'gspo'.
    logp: read with 'cispo' only, whose gradient goes through it and not through the ratio.
  """
  # No ratio means anything at e^30; without a bound, an overflow would make the gradient NaN.
  ratio = jnp.exp(jnp.minimum(log_ratio, 30.0))
  bounded = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
  if config.loss == 'cispo':
    # Each token keeps its gradient; a bound only limits it.
    loss = -jax.lax.stop_gradient(bounded) * advantage * logp
    return loss, ratio < bounded, ratio > bounded
  gain = jnp.minimum(ratio * advantage, bounded * advantage)
  low = (ratio < bounded) & (advantage < 0)
  high = (ratio > bounded) & (advantage > 0)
  if config.dual_clip:
    floor = config.dual_clip * advantage
    high |= (advantage < 0) & (gain < floor)
    gain = jnp.where(advantage < 0, jnp.maximum(gain, floor), gain)
  return -gain, low, high


def kl(logp: Array, ref_logp: Array, kind: str) -> Array:
  """An estimate of KL(policy | reference) at tokens that the policy sampled. Any one shape.

  'k3' is exp(d) - 1 - d, d = ref_logp - logp, never negative. 'k1' is -d; its own derivative is 0 on
  average, so it is given d's derivative times d, which is that of the divergence.
  """
  d = jnp.minimum(ref_logp - logp, 30.0)
  if kind == 'k3':
    return jnp.exp(d) - 1 - d
  half = 0.5 * jnp.square(d)
  return half + jax.lax.stop_gradient(-d - half)


def mixed_tasks(reward_R: Array, task_R: Array, num_tasks: int) -> np.ndarray:
  """mixed_M: the tasks whose group has different rewards, on the host."""
  # And one row for what is no rollout's.
  high, low = np.full(num_tasks + 1, -np.inf), np.full(num_tasks + 1, np.inf)
  np.maximum.at(high, np.asarray(task_R), reward_R)
  np.minimum.at(low, np.asarray(task_R), reward_R)
  return (high > low)[:num_tasks]
