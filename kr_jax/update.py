"""One jitted optimiser step over packed microbatches.

The gradient is a sum over tokens divided by one global count, accumulated over as many microbatches
as rows are in use: it does not depend on the packing or on the size of a microbatch, and a step in
which half the groups are constant costs about half.

`step` learns from rewards (GRPO), `imitate` from given completions (maximum likelihood);
`gradient_noise` measures how much of a rollout's gradient is noise.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kr_jax import grpo
from kr_jax import pack
from kr_jax import policy
from kr_jax import types
from kr_jax.types import Array


class Config(NamedTuple):
  """How to update."""

  learning_rate: float
  warmup_steps: int  # updates of linear warm-up
  decay_steps: int  # updates after which the rate has fallen to 0, linearly; 0: it stays
  weight_decay: float
  max_grad_norm: float
  row_length: int  # T of a packed row
  microbatch_rows: int  # B
  clip_low: float
  clip_high: float
  advantage: str  # 'std' or 'loo'
  temperature: float  # at which the rollouts were sampled


class Scores(NamedTuple):
  """The targets of packed rows: what token t of a row predicts."""

  logp_BT: Array
  old_logp_BT: Array
  rollout_BT: Array
  mask_BT: Array  # True where the target is a completion token


def check(config: Config) -> None:
  """Raises ValueError for a knob out of its range."""
  for name, low in (('learning_rate', 0), ('warmup_steps', 0), ('weight_decay', 0),
                    ('clip_low', 0), ('clip_high', 0), ('microbatch_rows', 1)):
    if not getattr(config, name) >= low:
      raise ValueError(f'{name}={getattr(config, name)} is below {low}')
  if config.advantage not in grpo.ADVANTAGES:
    raise ValueError(f'grpo.advantage={config.advantage!r} is not one of {grpo.ADVANTAGES}')
  for name in ('max_grad_norm', 'temperature'):
    if not getattr(config, name) > 0:
      raise ValueError(f'{name}={getattr(config, name)} must be above 0')


def optimizer(config: Config) -> optax.GradientTransformation:
  """AdamW after a clip of the global norm; the rate warms up linearly, then stays or decays."""
  rate = optax.linear_schedule(
      config.learning_rate / (config.warmup_steps + 1), config.learning_rate, config.warmup_steps)
  if config.decay_steps:
    fall = config.decay_steps - config.warmup_steps
    rate = optax.join_schedules(
        [rate, optax.linear_schedule(config.learning_rate, 0.0, fall)], [config.warmup_steps])
  return optax.chain(optax.clip_by_global_norm(config.max_grad_norm),
                     optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay))


def pack_rollouts(rollouts: types.Rollouts, keep_R: np.ndarray, config: Config) -> pack.Packed:
  """Rows of the rollouts to keep, in the one shape that any R rollouts fit (on the host)."""
  R, C = rollouts.token_RC.shape
  P = rollouts.prompts.token_MP.shape[1]
  length_M = np.append(rollouts.prompts.length_M, 0)  # no rollout, no prompt
  length_R = length_M[np.asarray(rollouts.task_R)] + np.asarray(rollouts.length_R)
  microbatches = -(-pack.max_rows(R, P + C, config.row_length) // config.microbatch_rows)
  return pack.rows(length_R, keep_R, num_rows=microbatches * config.microbatch_rows,
                   row_length=config.row_length)


@functools.partial(jax.jit, static_argnums=2)
def init(params: Any, key: Array, config: Config) -> types.TrainState:
  """The state before the first update."""
  return types.TrainState(jnp.array(0), params, optimizer(config).init(params), key)


def score(policy_config: policy.Config, params: Any, rollouts: types.Rollouts, packed: pack.Packed,
          microbatch: Array, config: Config) -> Scores:
  """Log-probabilities of the completion tokens that stand in the rows of a microbatch."""
  rows = config.microbatch_rows
  cut = lambda x_BT: jax.lax.dynamic_slice_in_dim(x_BT, microbatch * rows, rows)
  rollout_BT, position_BT = cut(packed.rollout_BT), cut(packed.position_BT)
  prompts = rollouts.prompts
  R, C = rollouts.token_RC.shape
  P = prompts.token_MP.shape[1]
  r_BT = jnp.maximum(rollout_BT, 0)
  m_BT = rollouts.task_R[r_BT]
  start_BT = position_BT - prompts.length_M[m_BT]  # index in the completion; below 0: prompt
  token_BT = jnp.where(
      start_BT < 0,
      prompts.token_MP[m_BT, jnp.minimum(position_BT, P - 1)],
      rollouts.token_RC[r_BT, jnp.clip(start_BT, 0, C - 1)])
  target_BT = start_BT + 1
  mask_BT = (rollout_BT >= 0) & (target_BT >= 0) & (target_BT < rollouts.length_R[r_BT])
  c_BT = jnp.clip(target_BT, 0, C - 1)
  logits_BTV = policy.logits(policy_config, params, token_BT, position_BT, rollout_BT)
  logp_BT = jnp.take_along_axis(
      jax.nn.log_softmax(logits_BTV / config.temperature),
      rollouts.token_RC[r_BT, c_BT][..., None], axis=-1)[..., 0]
  return Scores(logp_BT, rollouts.logp_RC[r_BT, c_BT], rollout_BT, mask_BT)


def _sum_over_microbatches(function, packed: pack.Packed, config: Config) -> Any:
  """The sum of function(i), a tree, over the microbatches i that have rows in use."""
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                      jax.eval_shape(function, jnp.array(0)))
  return jax.lax.fori_loop(
      0, (packed.num_rows + config.microbatch_rows - 1) // config.microbatch_rows,
      lambda i, total: jax.tree.map(jnp.add, total, function(i)), zero)


def _apply(state: types.TrainState, rollouts: types.Rollouts, packed: pack.Packed, token_loss,
           policy_config: policy.Config, config: Config) -> tuple[types.TrainState, dict[str, Array]]:
  """One optimiser step on sum(loss over tokens) / (completion tokens of all rollouts).

  token_loss: Scores -> (loss_BT, {name: count_BT}); the counts are summed over tokens.
  """
  normalizer = jnp.maximum(jnp.sum(rollouts.length_R), 1)

  def loss_and_counts(params, i):
    scores = score(policy_config, params, rollouts, packed, i, config)
    loss_BT, counts = token_loss(scores)
    counts = counts | {'tokens_updated': jnp.ones_like(scores.mask_BT)}
    total = lambda x_BT: jnp.sum(jnp.where(scores.mask_BT, x_BT, 0))
    return total(loss_BT) / normalizer, {k: total(v) for k, v in counts.items()}

  gradient = jax.value_and_grad(loss_and_counts, has_aux=True)
  (loss, counts), grads = _sum_over_microbatches(
      lambda i: gradient(state.params, i), packed, config)

  def move(_):
    updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state

  # With nothing to learn from, momentum must not carry the policy on.
  params, opt_state = jax.lax.cond(
      packed.num_rows > 0, move, lambda _: (state.params, state.opt_state), None)
  metrics = {'loss': loss, 'grad_norm': optax.tree.norm(grads), **counts}
  return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=0)
def step(state: types.TrainState, rollouts: types.Rollouts, reward_R: Array, packed: pack.Packed,
         policy_config: policy.Config, config: Config) -> tuple[types.TrainState, dict[str, Array]]:
  """One GRPO update.

  Args:
    state: donated.
    reward_R: float32, of all rollouts: advantages are taken over whole groups.
    packed: rows of the rollouts that can have an advantage; a multiple of microbatch_rows.

  Returns:
    The state, and scalars: loss, grad_norm (before the clip), tokens_updated, clip_fraction.
  """
  advantage_R = grpo.advantage(reward_R, rollouts.task_R, rollouts.prompts.length_M.shape[0],
                               kind=config.advantage)

  def token_loss(s: Scores):
    # Prompts and padding have no old log-probability: there a ratio may overflow, and a gradient of
    # NaN would survive a mask put on afterwards.
    logp_BT = jnp.where(s.mask_BT, s.logp_BT, s.old_logp_BT)
    loss_BT, clipped_BT = grpo.clipped_loss(
        logp_BT, s.old_logp_BT, advantage_R[jnp.maximum(s.rollout_BT, 0)],
        clip_low=config.clip_low, clip_high=config.clip_high)
    return loss_BT, {'clipped': clipped_BT}

  state, metrics = _apply(state, rollouts, packed, token_loss, policy_config, config)
  metrics['clip_fraction'] = metrics.pop('clipped') / jnp.maximum(metrics['tokens_updated'], 1)
  return state, metrics


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def imitate(state: types.TrainState, rollouts: types.Rollouts, packed: pack.Packed,
            policy_config: policy.Config, config: Config
            ) -> tuple[types.TrainState, dict[str, Array]]:
  """One maximum-likelihood update on completions that are given. As `step`; donates the state."""
  return _apply(state, rollouts, packed, lambda s: (-s.logp_BT, {}), policy_config, config)


@functools.partial(jax.jit, static_argnums=(5, 6))
def gradient_noise(params: Any, rollouts: types.Rollouts, verdict_R: Array, packed: pack.Packed,
                   key: Array, policy_config: policy.Config, config: Config) -> Array:
  """Signal and noise of a rollout's gradient, from two halves of the batch.

  In the model of value.snr the score s_r = grad log prob(rollout r) of a task with success rate p is
  (v_r - p) x + noise of power nu |x|^2, v the verdict. Each half h of a group is a group of its own,
  with leave-one-out advantages A_r, which sum to 0, so that p drops out:

      g_h = sum over tasks, sign * sum over r in h, A_r s_r        c_h = sum over r in h, A_r v_r
      E[g_0 . g_1]     = |x|^2 sum over tasks, c_0 c_1
      E[|g_0 - g_1|^2] = |x|^2 sum over tasks, (c_0 - c_1)^2 + nu |x|^2 sum over r, A_r^2

  A random sign of each task puts the directions x of different tasks at right angles on the mean.
  Tasks with two successes and two failures or more tell of the signal. It costs a forward and two
  backward passes.

  Args:
    verdict_R: float32, 1.0 or 0.0.
    packed: rows with all rollouts of the groups whose verdicts differ.
    key: of the signs, new every step.

  Returns:
    float32 [4], to be summed over steps: signal and its scale, noise and its scale, so that
    signal / its scale estimates |x|^2, and noise / its scale nu |x|^2 (estimate.nu).
  """
  M, task_R = rollouts.prompts.length_M.shape[0], rollouts.task_R
  right_R = verdict_R > 0
  # Of each outcome of a task every other rollout, as task_R does not fall.
  half_R = jnp.where(right_R, jnp.cumsum(right_R), jnp.cumsum(~right_R)) % 2
  group_R = 2 * task_R + half_R
  advantage_R = grpo.advantage(verdict_R, group_R, 2 * M, kind='loo')
  sign_R = jax.random.rademacher(key, (M,), jnp.float32)[jnp.minimum(task_R, M - 1)]
  weight_2R = jnp.where(half_R[None] == jnp.arange(2)[:, None], sign_R * advantage_R, 0.0)

  def half_gradients(i):
    def weighted_logp(params):
      s = score(policy_config, params, rollouts, packed, i, config)
      weight_2BT = weight_2R[:, jnp.maximum(s.rollout_BT, 0)]
      return jnp.einsum('hbt,bt->h', weight_2BT, jnp.where(s.mask_BT, s.logp_BT, 0.0))

    return jax.jacrev(weighted_logp)(params)

  halves = _sum_over_microbatches(half_gradients, packed, config)
  c_2M = jax.ops.segment_sum(advantage_R * verdict_R, group_R, 2 * M).reshape(M, 2).T
  signal = optax.tree.vdot(*(jax.tree.map(lambda g: g[h], halves) for h in (0, 1)))
  signal_scale = jnp.sum(c_2M[0] * c_2M[1])
  spread = optax.tree.norm(jax.tree.map(lambda g: g[0] - g[1], halves), squared=True)
  noise = spread - jnp.sum((c_2M[0] - c_2M[1]) ** 2) * signal / jnp.maximum(signal_scale, 1e-30)
  # Without a signal's scale there is no knowing what of the spread is noise.
  return jnp.where(signal_scale > 0,
                   jnp.stack([signal, signal_scale, noise, jnp.sum(advantage_R ** 2)]), 0.0)
