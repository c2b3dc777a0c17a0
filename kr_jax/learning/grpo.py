"""Group-relative advantages and the family of clipped policy losses.

    advantage    A_r = (reward_r - mean_g) / (std_g + eps)      'std',   g = task_R[r]
                       (reward_r - mean_g) N_g / (N_g - 1)      'loo': minus the mean of the others
                        reward_r - mean_g                       'mean'
    ratio        w_t = exp(logp_t - old_logp_t)                 'grpo', 'cispo'
                       exp(mean over the rollout's tokens of logp - old_logp)    'gspo'
    loss         l_t = -min(w A, clip(w, 1 - low, 1 + high) A)  'grpo', 'gspo'
                 -stop_gradient(clip(w, 1 - low, 1 + high)) A logp_t             'cispo'
    whole        sum over tokens, weight_r [tis_t l_t + kl_coef kl_t - entropy_coef entropy_t]

With advantage 'std' the expected gradient of a task depends on its budget N, whatever the weight: its factor
depends on N and on the success rate, and is largest for rare successes among many rollouts. A group in which some
rollouts are left out, as they are not verified, is a group of as many fewer: where verdicts are missing at random,
'loo' with weight 'task' has the same expected gradient for every N of 2 or more, and 'std' that of the smaller N.

Sources: Shao et al. 2024, arXiv 2402.03300, eq. 3 (GRPO) and 4 (k3); Kool et al. 2019, Buy 4 REINFORCE samples, get
a baseline for free, eq. 8, and Ahmadian et al. 2024, arXiv 2402.14740, section 3 (RLOO); Liu et al. 2025, arXiv
2503.20783, section 3.2 (Dr. GRPO); Yu et al. 2025, arXiv 2503.14476, eq. 10 (DAPO); Zheng et al. 2025, arXiv
2507.18071, eq. 5-7 (GSPO); MiniMax 2025, arXiv 2506.13585, eq. 4 (CISPO); Ye et al. 2020, arXiv 1912.09729, eq. 5
(dual clip); Tang and Munos 2025, arXiv 2506.09477 (gradients of KL estimates); Yao et al. 2025, Your efficient RL
framework secretly brings you off-policy RL training (truncated importance sampling).
Differs: the standard deviation is the population's (ddof 0). Advantages are not clipped: a clip would push a task
with few successes down on the whole.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kr_jax import knobs
from kr_jax.types import Array


def advantage(reward_R: Array, task_R: Array, num_tasks: int, *, kind: str = 'std', eps: float = 1e-6) -> Array:
  """advantage_R, float32: relative to the group; exactly 0 in groups whose rewards are all equal.

  Args:
    reward_R: float32.
    task_R: int32 in 0..M-1, the group of each rollout, of any size; M: no group, and advantage 0.
    num_tasks: M.
    kind: 'std', 'loo' or 'mean'.
    eps: added to the standard deviation.
  """
  group_sum = lambda x_R: jax.ops.segment_sum(x_R, task_R, num_tasks)
  group_R = jnp.minimum(task_R, num_tasks - 1)
  count_M = jnp.maximum(group_sum(jnp.ones_like(reward_R)), 1)
  centred_R = reward_R - (group_sum(reward_R) / count_M)[group_R]
  if kind == 'std':
    scale_M = 1 / (jnp.sqrt(group_sum(jnp.square(centred_R)) / count_M) + eps)
  elif kind == 'loo':
    scale_M = count_M / jnp.maximum(count_M - 1, 1)
  else:
    scale_M = jnp.ones_like(count_M)
  # The rewards themselves decide, as the mean of equal rewards may be off by a rounding.
  mixed_M = jax.ops.segment_max(reward_R, task_R, num_tasks) > jax.ops.segment_min(reward_R, task_R, num_tasks)
  return jnp.where(mixed_M[group_R] & (task_R < num_tasks), centred_R * scale_M[group_R], 0.0)


def token_weights(task_R: Array, length_R: Array, num_tasks: int, *, weight: str, aggregate: str,
                  completion_length: int) -> Array:
  """The weight in the loss of each token of a rollout.

  With weight f = N ('rollout'), 1 ('task') or sqrt(N) ('sqrt') of a task of N rollouts, a token of a rollout of n
  tokens has the weight in the second column, divided by the sum in the third, which makes the loss a mean:

      'token'     f / N        / sum over rollouts of f n / N    mean over all tokens (DAPO)
      'rollout'   f / (N n)    / sum over tasks of f             mean over rollouts of their means (GRPO)
      'constant'  f / (N C)    / sum over tasks of f             a long rollout's tokens weigh no less (Dr. GRPO)

  So the tokens of a task together weigh f with 'rollout', and f times the mean length with 'token' and 'constant'.

  Args:
    task_R: int32 in 0..M; M where there is no rollout.
    length_R: int32, completion tokens; 0 where there is no rollout.
    num_tasks, completion_length: M and C.
    weight, aggregate: as in knobs.Grpo.

  Returns:
    weight_R, float32; 0 where there is no rollout.
  """
  count_M = jax.ops.segment_sum(jnp.ones(task_R.shape, jnp.float32), task_R, num_tasks)
  power = {'rollout': 0.0, 'task': -1.0, 'sqrt': -0.5}[weight]
  share_R = jnp.maximum(count_M, 1)[jnp.minimum(task_R, num_tasks - 1)] ** power
  share_R = jnp.where((task_R < num_tasks) & (length_R > 0), share_R, 0.0)
  n_R = jnp.maximum(length_R, 1).astype(jnp.float32)
  token_R, divisor_R = {'token': (share_R, share_R * n_R), 'rollout': (share_R / n_R, share_R),
                        'constant': (share_R / completion_length, share_R)}[aggregate]
  divisor = jnp.sum(divisor_R)
  return token_R / jnp.where(divisor > 0, divisor, 1.0)


def policy_loss(log_ratio: Array, logp: Array, advantage: Array, config: knobs.Grpo) -> tuple[Array, Array, Array]:
  """The loss of each token, and which tokens were clipped. All arrays have one shape, any.

  Args:
    log_ratio: log of the token's ratio; with 'gspo', of the ratio of its rollout.
    logp: read with 'cispo' only. There the gradient goes through logp and not through the ratio.

  Returns:
    loss, float32; low and high, bool: whether the lower or the upper limit of the ratio took the token's gradient
    away; with 'cispo', whether it applied.
  """
  # A ratio of e^30 has no meaning, but an overflow would make the gradient NaN.
  ratio = jnp.exp(jnp.minimum(log_ratio, 30.0))
  clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
  if config.loss == 'cispo':
    return -jax.lax.stop_gradient(clipped) * advantage * logp, ratio < clipped, ratio > clipped
  gain = jnp.minimum(ratio * advantage, clipped * advantage)
  low = (ratio < clipped) & (advantage < 0)
  high = (ratio > clipped) & (advantage > 0)
  if config.dual_clip:
    floor = config.dual_clip * advantage
    high |= (advantage < 0) & (gain < floor)
    gain = jnp.where(advantage < 0, jnp.maximum(gain, floor), gain)
  return -gain, low, high


def kl(logp: Array, ref_logp: Array, kind: str) -> Array:
  """An estimate of KL(policy | reference) at tokens that the policy sampled. Arrays of one shape, any.

  With d = ref_logp - logp, 'k3' is exp(d) - 1 - d, which is never negative, and 'k1' is -d. The derivative of -d is
  0 on average, so 'k1' has the derivative of d^2 / 2 instead: its mean is the derivative of the divergence.
  """
  d = jnp.minimum(ref_logp - logp, 30.0)
  if kind == 'k3':
    return jnp.exp(d) - 1 - d
  half_square = 0.5 * jnp.square(d)
  return half_square + jax.lax.stop_gradient(-d - half_square)


def mixed_tasks(reward_R: Array, task_R: Array, num_tasks: int) -> np.ndarray:
  """mixed_M, bool: the tasks whose group has different rewards. Runs on the host."""
  # The last row is for rows of the batch that are no rollout.
  high, low = np.full(num_tasks + 1, -np.inf), np.full(num_tasks + 1, np.inf)
  np.maximum.at(high, np.asarray(task_R), reward_R)
  np.minimum.at(low, np.asarray(task_R), reward_R)
  return (high > low)[:num_tasks]
