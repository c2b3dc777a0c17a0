"""Group-relative advantages and the family of clipped policy losses.

    advantage    A_r = (reward_r - mean_g) / (std_g + eps)      'std',   g = task_R[r]
                       (reward_r - mean_g) N_g / (N_g - 1)      'loo': minus the mean of the others
                        reward_r - mean_g                       'mean'
                       (reward_r - mean_g) / mean_g             'maxrl'
                        reward_r - (c m + the others' sum) / (c + N_g - 1)      'posterior'
    ratio        w_t = exp(logp_t - old_logp_t)                 'grpo', 'cispo'
                       exp(mean over the rollout's tokens of logp - old_logp)    'gspo'
    loss         l_t = -min(w A, clip(w, 1 - low, 1 + high) A)  'grpo', 'gspo'
                 -stop_gradient(clip(w, 1 - low, 1 + high)) A logp_t             'cispo'
    whole        sum over tokens, weight_r [tis_t l_t + kl_coef kl_t - entropy_coef entropy_t]

A baseline leaves the policy gradient unbiased if the rollout's own reward decides neither it nor the weight.

- 'loo' and 'posterior' have such baselines. With weight 'task' and aggregate 'constant' the expected gradient of a task
  does not depend on its budget N, of 2 or more ('loo') or 1 or more ('posterior'), whatever earlier outcomes decided N.
- 'posterior' shrinks the mean of the others to m, which c rollouts' worth of earlier evidence expects. Evidence that is
  out of date costs variance and no bias. Groups whose rewards are all equal have an advantage too.
- 'std' and 'maxrl' divide by what the group's own rewards decide: the expected gradient of a task depends on N, and
  for 'std' most where successes are rare and rollouts many.
- Aggregate 'rollout' divides a score by its rollout's length, and such scores have no mean of 0: baselines of
  another mean give another gradient. So it depends on N with 'posterior', and with waves; with 'loo' and one wave it
  does not.
- Aggregate 'token' is 'constant' but for its divisor: the batch's tokens, which are not independent of the rewards. If
  a step has one task alone, right in 1 token and wrong in 8, with a success rate of .1, the expected gradient is 1.60,
  1.25 and 1.10 times that of N = 64 at N = 2, 4 and 8. With 8 such tasks it is 1.06 times at N = 2, and the excess
  falls like 1 / M. With a divisor that is decided before the step 'token' would be 'constant': set that where a step
  has few tasks.

A step's rollouts may come in waves, each with budgets by the rewards of those before. The group of a rollout is then
the rollouts of its task in its own wave and in earlier ones. Statistics of all waves would be biased, as the number
of rollouts that follow a reward depends on it: with 2 rollouts, and 6 more where both fail, 'loo' would push 1.12
times as much at a success rate of .5.

Rollouts without a verdict are left out of their groups: where verdicts are missing at random, a group has the expected
gradient of its smaller N.

Sources: Shao et al. 2024, arXiv 2402.03300, eq. 3 (GRPO) and 4 (k3); Kool et al. 2019, Buy 4 REINFORCE samples, get
a baseline for free, eq. 8, and Ahmadian et al. 2024, arXiv 2402.14740, section 3 (RLOO); Liu et al. 2025, arXiv
2503.20783, section 3.2 (Dr. GRPO); Yu et al. 2025, arXiv 2503.14476, eq. 10 (DAPO); Zheng et al. 2025, arXiv
2507.18071, eq. 5-7 (GSPO); MiniMax 2025, arXiv 2506.13585, eq. 4 (CISPO); arXiv 2602.02710 (MaxRL); Ye et al. 2020,
arXiv 1912.09729, eq. 5 (dual clip); Tang and Munos 2025, arXiv 2506.09477 (gradients of KL estimates); Yao et al. 2025,
Your efficient RL framework secretly brings you off-policy RL training (truncated importance sampling); Wangni et al.
2018, arXiv 1710.09854, section 3 (chances in proportion to size); compare arXiv 2509.13232, whose baseline is a Beta
posterior alone.
Differs: the standard deviation is the population's (ddof 0). Advantages are not clipped: a clip would push a task
with few successes down on the whole.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kr_jax import knobs
from kr_jax.types import Array


_MOST_WAVES = max(knobs.Alloc.choices('waves'))


class Past(NamedTuple):
  """What is known of the reward of a task's rollouts before the step."""

  mean_M: Array  # float32, the expected reward
  rollouts_M: Array  # float32, the rollouts that this evidence is worth


def advantage(reward_R: Array, task_R: Array, num_tasks: int, *, kind: str = 'std', eps: float = 1e-6,
              wave_R: Array | None = None, past: Past | None = None) -> Array:
  """advantage_R, float32: relative to the group; with all kinds but 'posterior' exactly 0 if its rewards are all equal.

  Args:
    reward_R: float32.
    task_R: int32 in 0..M-1, the group of each rollout, of any size; M: no group, and advantage 0.
    num_tasks: M.
    kind: as in knobs.Grpo. With 'maxrl' a group whose mean is not above 0 has advantage 0; rewards below 0 may bring
      the mean near 0, and advantages are then large.
    eps: added to the standard deviation.
    wave_R: int32; None: one wave. A group is then of a rollout's own wave and of earlier ones.
    past: read by 'posterior' alone. Where neither it nor the others tell anything, the baseline is its mean.

  Raises:
    ValueError: kind is 'posterior', and past is None.
  """
  if kind == 'posterior' and past is None:
    raise ValueError("kind='posterior' reads past=None; pass what is known of each task (Past), or set kind='loo'")
  of_groups = lambda task_R: _advantage_in_group(reward_R, task_R, num_tasks, kind, eps, past)
  if wave_R is None:
    return of_groups(task_R)
  advantage_R = jnp.zeros(task_R.shape)
  for wave in range(_MOST_WAVES):
    until_R = jnp.where(wave_R <= wave, task_R, num_tasks)
    advantage_R = jnp.where(wave_R == wave, of_groups(until_R), advantage_R)
  return advantage_R


def _advantage_in_group(reward_R: Array, task_R: Array, num_tasks: int, kind: str, eps: float, past: Past | None
                        ) -> Array:
  group_sum = lambda x_R: jax.ops.segment_sum(x_R, task_R, num_tasks)
  group_R, is_rollout_R = jnp.minimum(task_R, num_tasks - 1), task_R < num_tasks
  count_M = jnp.maximum(group_sum(jnp.ones_like(reward_R)), 1)
  mean_M = group_sum(reward_R) / count_M
  # The rewards themselves decide, as the mean of equal rewards may be off by a rounding.
  mixed_M = jax.ops.segment_max(reward_R, task_R, num_tasks) > jax.ops.segment_min(reward_R, task_R, num_tasks)
  centred_R = jnp.where(mixed_M[group_R] & is_rollout_R, reward_R - mean_M[group_R], 0.0)
  if kind == 'posterior':
    # N_g (reward - mean_g) is (N_g - 1) times the distance to the mean of the others.
    past_mean_M, past_rollouts_M = (jnp.asarray(x_M, jnp.float32) for x_M in past)
    from_past_R = reward_R - past_mean_M[group_R]
    summed_R = past_rollouts_M[group_R] * from_past_R + count_M[group_R] * centred_R
    evidence_R = (past_rollouts_M + (count_M - 1))[group_R]
    relative_R = jnp.where(evidence_R > 0, summed_R / jnp.where(evidence_R > 0, evidence_R, 1), from_past_R)
    return jnp.where(is_rollout_R, relative_R, 0.0)
  if kind == 'std':
    scale_M = 1 / (jnp.sqrt(group_sum(jnp.square(centred_R)) / count_M) + eps)
  elif kind == 'loo':
    scale_M = count_M / jnp.maximum(count_M - 1, 1)
  elif kind == 'maxrl':
    scale_M = jnp.where(mean_M > 0, 1 / jnp.where(mean_M > 0, mean_M, 1), 0.0)
  else:
    scale_M = jnp.ones_like(count_M)
  return jnp.where(centred_R != 0, centred_R * scale_M[group_R], 0.0)


def drop_small(advantage_R: Array, keep: Array, key: Array) -> Array:
  """Advantages of which `keep` are not 0 on average, and whose expectation is advantage_R.

  A rollout keeps its advantage, divided by its chance of it, with a chance of min(1, |A_r| / tau), where tau makes the
  chances sum to `keep`; else it has none. So an advantage below tau becomes 0, or tau with its sign; the others stay.

  Args:
    keep: float, 0 or more. Where as many advantages or fewer are not 0, all stay as they are.
    key: of the draws.
  """
  size_R = jnp.abs(advantage_R)
  chance_R = lambda tau: jnp.where(size_R > 0, jnp.minimum(size_R / tau, 1.0), 0.0)

  def halve(_, low_and_high):
    low, high = low_and_high
    middle = (low + high) / 2
    too_many = jnp.sum(chance_R(middle)) > keep
    return jnp.where(too_many, middle, low), jnp.where(too_many, high, middle)

  # Where tau is the sum of sizes over `keep`, the chances sum to `keep` at the most.
  highest = jnp.sum(size_R) / jnp.maximum(keep, 1e-6)
  _, tau = jax.lax.fori_loop(0, 60, halve, (jnp.zeros_like(highest), jnp.maximum(highest, 1e-30)))
  stays_R = jax.random.uniform(key, size_R.shape) < chance_R(tau)
  return jnp.where(stays_R, jnp.sign(advantage_R) * jnp.maximum(size_R, tau), 0.0)


def token_weights(task_R: Array, length_R: Array, num_tasks: int, *, weight: str, aggregate: str,
                  completion_length: int, wave_R: Array | None = None, share_W: Array | None = None,
                  least: int = 1) -> Array:
  """The weight in the loss of each token of a rollout.

  With weight f = N ('rollout'), 1 ('task') or sqrt(N) ('sqrt') of a task of N rollouts, a token of a rollout of n
  tokens has the weight in the second column, divided by the sum in the third, which makes the loss a mean:

      'token'     f / N        / sum over rollouts of f n / N    mean over all tokens (DAPO)
      'rollout'   f / (N n)    / sum over tasks of f             mean over rollouts of their means (GRPO)
      'constant'  f / (N C)    / sum over tasks of f             a long rollout's tokens weigh no less (Dr. GRPO)

  So the tokens of a task together weigh f with 'rollout', and f times the mean length with 'token' and 'constant'.

  With waves, N is the number of a task's rollouts in a wave, divided by the wave's share of all rollouts: as many as
  the task would have if all waves gave it alike. So f is decided before the wave. A rollout weighs 1 with 'rollout'; a
  task's n rollouts of a wave weigh share ('task') or sqrt(share n) ('sqrt') together. A wave in which a task has no
  rollout, or one that is alone and learns nothing, gives its share to the task's next wave: with 'task' a task weighs
  1 if it has rollouts in the last wave, and else less by the shares of the waves after its last. The sums over tasks
  are of the first wave's N, which no reward of the step decides.

  Args:
    task_R: int32 in 0..M; M where there is no rollout.
    length_R: int32, completion tokens; 0 where there is no rollout.
    num_tasks, completion_length: M and C.
    weight, aggregate: as in knobs.Grpo.
    wave_R: int32, of all rows; None: one wave.
    share_W: float32, each wave's share of the rollouts; None: of the rows of wave_R.
    least: rollouts of the smallest group that has advantages: 2, or 1 with 'posterior'; read with waves alone.

  Returns:
    weight_R, float32; 0 where there is no rollout.
  """
  if wave_R is None:
    wave_R, share_W = jnp.zeros_like(task_R), jnp.ones(1)
  elif share_W is None:
    share_W = jnp.bincount(wave_R, length=_MOST_WAVES) / len(wave_R)
  count_MW = jnp.zeros((num_tasks, len(share_W))).at[task_R, wave_R].add(1.0, mode='drop')
  N_MW = count_MW / _shares(count_MW, share_W, least)
  N_R = N_MW[jnp.minimum(task_R, num_tasks - 1), wave_R]
  power = {'rollout': 0.0, 'task': -1.0, 'sqrt': -0.5}[weight]
  is_rollout_R = (task_R < num_tasks) & (length_R > 0)
  of_rollout_R = jnp.where(is_rollout_R, jnp.where(is_rollout_R, N_R, 1.0) ** power, 0.0)  # f / N
  n_R = jnp.maximum(length_R, 1).astype(jnp.float32)
  if aggregate == 'token':
    token_R, divisor = of_rollout_R, jnp.sum(of_rollout_R * n_R)
  else:
    token_R = of_rollout_R / (n_R if aggregate == 'rollout' else completion_length)
    of_first = jnp.sum(jnp.where(wave_R == 0, of_rollout_R, 0.0)) / share_W[0]
    divisor = jnp.where(of_first > 0, of_first, jnp.sum(of_rollout_R))  # without a verdict in the first wave: of all
  return token_R / jnp.where(divisor > 0, divisor, 1.0)


def _shares(count_MW: Array, share_W: Array, least: int) -> Array:
  """share_MW: of a wave, and of those just before it in which the task learns nothing; 1 where it has no rollout."""
  found, waiting_M, group_M = [], jnp.zeros(len(count_MW)), jnp.zeros(len(count_MW))
  for wave, share in enumerate(share_W):
    count_M = count_MW[:, wave]
    share_M, group_M = waiting_M + share, group_M + count_M
    waiting_M = jnp.where((count_M > 0) & (group_M >= least), 0.0, share_M)
    found.append(jnp.where(count_M > 0, share_M, 1.0))
  return jnp.stack(found, axis=1)


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


def divergence_bits(log_ratio: Array) -> Array:
  """f(p / q) of the log ratios, whose mean over tokens that q sampled is the Jensen-Shannon divergence of p and q.

    JS = 1/2 E_q[log2(2 / (1 + r))] + 1/2 E_q[r log2(2 r / (1 + r))] = E_q[(1 + r)/2 (h tanh h - ln cosh h)] / ln 2,
    with r = p / q and h = ln(r) / 2

  It is 0 where p = q and never below. The last form keeps the digits of small differences, which the first one loses:
  there the two logs are nearly opposite. Where q is 0 nothing is sampled, and the half of p there is not counted.
  """
  h = jnp.clip(jax.lax.stop_gradient(log_ratio), -60.0, 60.0) / 2  # beyond that sinh(h)^2 overflows
  return (1 + jnp.exp(2 * h)) / 2 * (h * jnp.tanh(h) - jnp.log1p(jnp.sinh(h) ** 2) / 2) / np.log(2)


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
