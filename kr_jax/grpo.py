"""Group-relative advantages and the clipped policy loss.

    A_r = (reward_r - mean_g) / (std_g + eps)        'std',   g = task_R[r]
    A_r = (reward_r - mean_g) N_g / (N_g - 1)        'loo',   the mean of the others as baseline
    loss_t = -min(w_t A, clip(w_t, 1 - low, 1 + high) A),   w_t = exp(logp_t - old_logp_t)

Groups are ragged, so their statistics are segment sums over `task_R`; nothing is reshaped.
With 'loo' a task of N rollouts and success rate p pushes by N times the gradient of p; with 'std' by a
factor that depends on N and p, and is largest for rare successes among many rollouts.
Sources: Shao et al. 2024, arXiv 2402.03300, eq. 3 (GRPO); Kool et al. 2019, Buy 4 REINFORCE samples,
get a baseline for free, eq. 8 (leave-one-out); Yu et al. 2025, arXiv 2503.14476, eq. 10
(DAPO: separate bounds, mean over tokens). Differs: population standard deviation (ddof 0), and
advantages are not clipped, which would push a task with few successes down on the whole.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kr_jax.types import Array

ADVANTAGES = ('std', 'loo')


def advantage(reward_R: Array, task_R: Array, num_tasks: int, *, kind: str = 'std',
              eps: float = 1e-6) -> Array:
  """Group-relative advantages; exactly 0 in groups whose rewards are all equal.

  Args:
    reward_R: float32.
    task_R: int32 in 0..M-1, the group of each rollout; groups may have any size, 0 and 1 included.
      Rollouts of task M are of no group, and have 0.
    num_tasks: M.
    kind: 'std' or 'loo'.
    eps: added to the std.
  """
  sum_of = lambda x_R: jax.ops.segment_sum(x_R, task_R, num_tasks)
  of_R = jnp.minimum(task_R, num_tasks - 1)
  count_M = jnp.maximum(sum_of(jnp.ones_like(reward_R)), 1)
  centred_R = reward_R - (sum_of(reward_R) / count_M)[of_R]
  if kind == 'std':
    scale_M = 1 / (jnp.sqrt(sum_of(jnp.square(centred_R)) / count_M) + eps)
  else:
    scale_M = count_M / jnp.maximum(count_M - 1, 1)
  # Decided by the rewards themselves: a mean of equal rewards may be off by a rounding.
  mixed_M = (jax.ops.segment_max(reward_R, task_R, num_tasks)
             > jax.ops.segment_min(reward_R, task_R, num_tasks))
  return jnp.where(mixed_M[of_R] & (task_R < num_tasks), centred_R * scale_M[of_R], 0.0)


def clipped_loss(logp: Array, old_logp: Array, advantage: Array, *, clip_low: float,
                 clip_high: float) -> tuple[Array, Array]:
  """The loss of each token, and whether the clip took its gradient. Any one shape."""
  # e^30 lies beyond any clip; without a bound, an overflow would make the gradient NaN.
  ratio = jnp.exp(jnp.minimum(logp - old_logp, 30.0))
  free = ratio * advantage
  bounded = jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantage
  return -jnp.minimum(free, bounded), bounded < free


def mixed_tasks(reward_R: Array, task_R: Array, num_tasks: int) -> np.ndarray:
  """mixed_M: the tasks whose group has different rewards, on the host."""
  # And one row for what is no rollout's.
  high, low = np.full(num_tasks + 1, -np.inf), np.full(num_tasks + 1, np.inf)
  np.maximum.at(high, np.asarray(task_R), reward_R)
  np.minimum.at(low, np.asarray(task_R), reward_R)
  return (high > low)[:num_tasks]
