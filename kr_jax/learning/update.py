"""The optimiser steps of a batch of rollouts, over packed microbatches.

The gradient is a sum over tokens with weights that are fixed by the whole batch, accumulated over as
many microbatches as rows are in use: it does not depend on the packing, on the size of a microbatch
or on the mesh, and a batch in which half the groups are constant costs about half.

`step` learns from rewards (grpo.py), in `epochs` passes over `minibatches` updates each; `sft`
from given completions (maximum likelihood); `gradient_noise` measures how much of a rollout's
gradient is noise. Each microbatch is read by `score`: one compiled program serves all budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax

from kr_jax import knobs
from kr_jax import sharding
from kr_jax import types
from kr_jax.kernels.token_logprob import token_logprob
from kr_jax.learning import grpo
from kr_jax.learning import pack
from kr_jax.model import policy
from kr_jax.types import Array

MICROBATCHES = 'microbatches'  # name of the loops over as many as are in use
# Bounds of the bins in which ratios are counted: |log ratio| in steps of a tenth.
_BOUNDS = 1e-4 * 1.1 ** np.arange(120)
_BOUNDS = np.concatenate([-_BOUNDS[::-1], _BOUNDS]).astype(np.float32)


@knobs.section
class Config(knobs.Optimizer, knobs.Pack):
  """How to update."""

  SECTION = 'sample'
  grpo: knobs.Grpo = knobs.Grpo()
  temperature: float = knobs.knob(1.0, 'at which the rollouts were sampled', above=0)


class Tokens(NamedTuple):
  """The tokens of packed rollouts and what each predicts; of all microbatches with an axis in front."""

  token_BT: Array
  position_BT: Array
  segment_BT: Array  # the rollout a token belongs to; -1 is padding
  rows: types.Rows | None  # as of pack.Microbatch
  rollout_BT: Array  # as segment_BT; 0 where there is none
  target_BT: Array  # the token that follows
  mask_BT: Array  # True where that is a completion token; of each there is one
  sampler_logp_BT: Array  # of the target, when it was sampled
  old_logp_BT: Array | None = None  # before the first update; None: the policy's own, at ratio 1
  ref_logp_BT: Array | None = None  # of the initial policy; None: not asked for


class Experience(NamedTuple):
  """What an update learns from, beside the tokens, by rollout."""

  length_R: Array
  advantage_R: Array
  weight_R: Array  # of each of its tokens


def learning_rate(config: Config) -> optax.Schedule:
  """Of each update: a linear warm-up, then the schedule."""
  peak, fall = config.learning_rate, config.decay_steps - config.warmup_steps
  warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
  after = {'constant': lambda: optax.constant_schedule(peak),
           'linear': lambda: optax.linear_schedule(peak, config.final_rate * peak, fall),
           'cosine': lambda: optax.cosine_decay_schedule(peak, fall, config.final_rate)}
  return optax.join_schedules([warmup, after[config.schedule]()], [config.warmup_steps])


def optimizer(config: Config) -> optax.GradientTransformation:
  """AdamW after a clip of the global norm."""
  decays = lambda params: jax.tree_util.tree_map_with_path(
      lambda path, _: not any(word in jax.tree_util.keystr(path) for word in ('norm', 'bias')), params)
  return optax.chain(
      optax.clip_by_global_norm(config.max_grad_norm),
      optax.adamw(learning_rate(config), b1=config.b1, b2=config.b2, eps=config.eps,
                  weight_decay=config.weight_decay, mask=decays))


@functools.partial(jax.jit, static_argnums=2)
def init(params: Any, key: Array, config: Config) -> types.TrainState:
  """The state before the first update. params: those that are trained."""
  params = sharding.constrain(params)
  return types.TrainState(jnp.array(0), params, sharding.constrain(optimizer(config).init(params)), key)


def microbatch_shape(prompt_length: int, completion_length: int, rollouts_per_task: float,
                     config: Config) -> pack.Shape:
  """pack.shape on the mesh that is set."""
  return pack.shape(
      prompt_length=prompt_length, completion_length=completion_length,
      rollouts_per_task=rollouts_per_task, row_length=config.row_length,
      microbatch_rows=config.microbatch_rows, prompt_sharing=config.prompt_sharing,
      shards=sharding.row_shards())


def pack_rollouts(rollouts: types.Rollouts, keep_R: np.ndarray, config: Config) -> pack.Packed:
  """Microbatches of the rollouts to keep, in the one shape that any R rollouts fit (on the host)."""
  (R, C), (M, P) = rollouts.token_RC.shape, rollouts.prompts.token_MP.shape
  shape = microbatch_shape(P, C, R / M, config)
  task_R = np.asarray(rollouts.task_R)
  # The prompt's last token predicts the completion's first, another one in each rollout.
  shared_R = np.append(rollouts.prompts.length_M - 1, 0)[task_R]  # no rollout, no prompt
  own_R = np.asarray(rollouts.length_R)
  return pack.segments(
      task_R, shared_R, own_R,
      pack.assign(task_R, shared_R + own_R, keep_R, minibatches=config.minibatches),
      minibatches=config.minibatches, shape=shape, microbatches=pack.max_microbatches(
          R, P + C - 1, minibatches=config.minibatches, shape=shape))


def pack_mixed(rollouts: types.Rollouts, reward_R: np.ndarray, config: Config) -> pack.Packed:
  """Of the rollouts whose group has different rewards; the others have no advantage."""
  mixed_M = grpo.mixed_tasks(reward_R, rollouts.task_R, len(rollouts.prompts.length_M))
  return pack_rollouts(rollouts, np.append(mixed_M, False)[np.asarray(rollouts.task_R)], config)


def gather(rollouts: types.Rollouts, packed: pack.Packed) -> Tokens:
  """The tokens of all microbatches, each device's on it."""
  microbatches = sharding.put(packed.microbatches, PartitionSpec(None, sharding.ROWS))
  return _gather(rollouts, microbatches)


@jax.jit
def _gather(rollouts: types.Rollouts, microbatches: pack.Microbatch) -> Tokens:
  segment_BT, position_BT, rows = microbatches
  prompts = rollouts.prompts
  # Rollouts move between devices here, once, and not in the update.
  token_RC, logp_RC = sharding.replicate((rollouts.token_RC, rollouts.logp_RC))
  C, P = token_RC.shape[1], prompts.token_MP.shape[1]
  r_BT = jnp.maximum(segment_BT, 0)
  m_BT = rollouts.task_R[r_BT]
  # Which token of the completion comes next: a prompt's last token is followed by the first.
  next_BT = position_BT - prompts.length_M[m_BT] + 1
  c_BT = jnp.clip(next_BT, 0, C - 1)
  tokens = Tokens(
      token_BT=jnp.where(next_BT <= 0, prompts.token_MP[m_BT, jnp.minimum(position_BT, P - 1)],
                         token_RC[r_BT, jnp.clip(next_BT - 1, 0, C - 1)]),
      position_BT=position_BT, segment_BT=segment_BT, rows=rows, rollout_BT=r_BT,
      target_BT=token_RC[r_BT, c_BT],
      mask_BT=(segment_BT >= 0) & (next_BT >= 0) & (next_BT < rollouts.length_R[r_BT]),
      sampler_logp_BT=logp_RC[r_BT, c_BT])
  return sharding.constrain_rows(tokens, axis=1)


def score(policy_config: policy.Config, params: Any, tokens: Tokens, config: Config
          ) -> tuple[Array, Array]:
  """logp_BT of the targets of a microbatch, and entropy_BT of what they are drawn from."""
  params = policy.gather_vocabulary(policy_config, params)
  hidden_BTD = policy.hidden(policy_config, params, tokens.token_BT, tokens.position_BT,
                             tokens.segment_BT, tokens.rows)
  scores_T = token_logprob(
      hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), policy.output_matrix(policy_config, params),
      tokens.target_BT.reshape(-1), temperature=config.temperature)
  return tuple(x_T.reshape(tokens.token_BT.shape) for x_T in scores_T)


def _microbatch(tokens: Tokens, i: Array) -> Tokens:
  return sharding.constrain_rows(jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tokens))


def _sum_over_microbatches(function: Callable[[Any, Tokens], Any], given: Any, tokens: Tokens, first: Array,
                           end: Array) -> Any:
  """The sum of function(given, microbatch), a tree, from the first to before the end.

  given: all arrays that the function reads beside.
  """
  def of_copy(tokens, given, first, end):
    one = lambda i: function(given, _microbatch(tokens, i))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jnp.array(0)))
    with jax.named_scope(MICROBATCHES):
      return jax.lax.fori_loop(first, end, lambda i, total: jax.tree.map(jnp.add, total, one(i)), zero)

  return sharding.sum_over_copies(of_copy, tokens, given, first, end)


def _update(state: types.TrainState,
            loss_and_counts: Callable[[Any, Any, Tokens], tuple[Array, Any]], given: Any,
            tokens: Tokens, first: Array, end: Array, config: Config
            ) -> tuple[types.TrainState, dict[str, Array]]:
  """One optimiser step on the sum of a loss over microbatches.

  loss_and_counts: (params, given, microbatch) -> (loss, {name: count}); the counts are summed too.
  """
  gradient = jax.value_and_grad(loss_and_counts, has_aux=True)

  def constrained(params_and_given, microbatch):
    out, grads = gradient(*params_and_given, microbatch)
    return out, sharding.constrain(grads)

  (loss, counts), grads = _sum_over_microbatches(constrained, (state.params, given), tokens, first, end)

  def move(_):
    updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state

  # With nothing to learn from, momentum must not carry the policy on.
  params, opt_state = jax.lax.cond(
      end > first, move, lambda _: (state.params, state.opt_state), None)
  return (state._replace(params=params, opt_state=opt_state),
          sharding.replicate({'loss': loss, 'grad_norm': optax.tree.norm(grads), **counts}))


def step(state: types.TrainState, rollouts: types.Rollouts, reward_R: Array, base: Any,
         policy_config: policy.Config, config: Config
         ) -> tuple[types.TrainState, list[dict[str, Array]]]:
  """The GRPO updates of a batch: epochs * minibatches of them, a mini-batch being whole tasks.

  Each token's weight is that of the whole batch times the number of mini-batches, so that to first
  order the updates of a pass add up to one of the whole batch's gradient at `minibatches` times the
  rate, and no task counts more for the mini-batch it is in.

  Args:
    state: donated; its params are those that are trained (policy.split).
    reward_R: float32, of all rollouts: advantages are taken over whole groups.
    base: the initial policy's parameters, where adapters or a KL divergence need them; else {}.
    policy_config: of the policy that is trained, with its adapters.

  Returns:
    The state, one step on, and the measurements of each update, for `summarize`.
  """
  g = config.grpo
  one_update = config.epochs * config.minibatches == 1
  if g.kl_coef or g.entropy_coef:
    packed = pack_rollouts(rollouts, np.asarray(rollouts.length_R) > 0, config)
  else:
    packed = pack_mixed(rollouts, reward_R, config)
  tokens = gather(rollouts, packed)
  score_all = lambda params, base, policy_config: logps(
      params, base, tokens, packed.first[-1], policy_config, config)
  old_logp = ref_logp = None
  if not g.tis_cap:
    old_logp = tokens.sampler_logp_BT
  elif not one_update:
    old_logp = score_all(state.params, base, policy_config)
  if g.kl_coef:
    ref_logp = score_all(base, {}, policy.without_lora(policy_config))
  tokens = tokens._replace(old_logp_BT=old_logp, ref_logp_BT=ref_logp)
  experience = _experience(rollouts, reward_R, config)
  measured = []
  for _ in range(config.epochs):
    for u in range(config.minibatches):
      state, one = _step(state, base, experience, tokens, packed.first[u:u + 2], policy_config, config)
      measured.append(one)
  measured[0] |= pack.waste(packed)
  return state._replace(step=state.step + 1), measured


@functools.partial(jax.jit, static_argnums=2)
def _experience(rollouts: types.Rollouts, reward_R: Array, config: Config) -> Experience:
  M, C = rollouts.prompts.length_M.shape[0], rollouts.token_RC.shape[1]
  g = config.grpo
  return Experience(
      rollouts.length_R, grpo.advantage(reward_R, rollouts.task_R, M, kind=g.advantage),
      config.minibatches * grpo.token_weights(
          rollouts.task_R, rollouts.length_R, M, weight=g.weight, aggregate=g.aggregate,
          completion_length=C))


@functools.partial(jax.jit, static_argnums=(4, 5))
def logps(trained: Any, base: Any, tokens: Tokens, end: Array, policy_config: policy.Config,
          config: Config) -> Array:
  """logp_BT of the targets of all microbatches before the end; 0 in those after it."""
  params = policy.join(policy_config, trained, base)

  def put(i, logp):
    logp_BT, _ = score(policy_config, params, _microbatch(tokens, i), config)
    return sharding.constrain_rows(jax.lax.dynamic_update_index_in_dim(logp, logp_BT, i, axis=0), axis=1)

  with jax.named_scope(MICROBATCHES):
    return jax.lax.fori_loop(0, end, put, jnp.zeros(tokens.token_BT.shape))


@functools.partial(jax.jit, static_argnums=(5, 6), donate_argnums=0)
def _step(state: types.TrainState, base: Any, experience: Experience, tokens: Tokens, bounds: Array,
          policy_config: policy.Config, config: Config) -> tuple[types.TrainState, dict[str, Array]]:
  """The update of the microbatches from bounds[0] to before bounds[1], and its measurements."""
  def loss_and_counts(trained, given, microbatch):
    base, experience = given
    params = policy.join(policy_config, trained, base)
    scores = score(policy_config, params, microbatch, config)
    return _loss(*scores, microbatch, experience, config.grpo)

  return _update(state, loss_and_counts, (base, experience), tokens, *bounds, config)


def _loss(logp_BT: Array, entropy_BT: Array, tokens: Tokens, experience: Experience,
          config: knobs.Grpo) -> tuple[Array, dict[str, Array]]:
  """The loss of a microbatch, and sums over its completion tokens."""
  mask_BT, rollout_BT, sampler_logp_BT = tokens.mask_BT, tokens.rollout_BT, tokens.sampler_logp_BT
  # Prompts and padding have no old log-probability: there a ratio may overflow, and a gradient of
  # NaN would survive a mask put on afterwards.
  logp_BT = jnp.where(mask_BT, logp_BT, sampler_logp_BT)
  masked = lambda x_BT: jnp.where(mask_BT, x_BT, logp_BT)
  old_logp_BT = (jax.lax.stop_gradient(logp_BT) if tokens.old_logp_BT is None
                 else masked(tokens.old_logp_BT))
  total = lambda x_BT: jnp.sum(jnp.where(mask_BT, x_BT, 0))

  log_ratio_BT = logp_BT - old_logp_BT
  if config.loss == 'gspo':
    # A rollout's tokens stand in one microbatch, so their mean is at hand.
    sum_R = jnp.zeros(experience.length_R.shape).at[rollout_BT].add(
        jnp.where(mask_BT, log_ratio_BT, 0))
    log_ratio_BT = (sum_R / jnp.maximum(experience.length_R, 1))[rollout_BT]
  loss_BT, low_BT, high_BT = grpo.policy_loss(
      log_ratio_BT, logp_BT, experience.advantage_R[rollout_BT], config)
  counts = {
      'tokens_updated': jnp.sum(mask_BT), 'clipped_low': total(low_BT), 'clipped_high': total(high_BT),
      'policy_entropy': total(entropy_BT),
      'logp_error': total(jnp.abs(logp_BT - sampler_logp_BT)),
      'ratios': jnp.zeros(len(_BOUNDS) + 1, jnp.int32).at[
          jnp.searchsorted(_BOUNDS, log_ratio_BT)].add(mask_BT)}
  if config.tis_cap:
    tis_BT = jnp.minimum(jnp.exp(jnp.minimum(old_logp_BT - sampler_logp_BT, 30.0)), config.tis_cap)
    loss_BT *= jax.lax.stop_gradient(tis_BT)
    counts['tis_weight'] = total(tis_BT)
  if tokens.ref_logp_BT is not None:
    kl_BT = grpo.kl(logp_BT, masked(tokens.ref_logp_BT), config.kl)
    loss_BT += config.kl_coef * kl_BT
    counts['kl'] = total(kl_BT)
  if config.entropy_coef:
    loss_BT -= config.entropy_coef * entropy_BT
  return total(experience.weight_R[rollout_BT] * loss_BT), counts


def summarize(measured: Sequence[dict[str, Array]]) -> dict[str, float]:
  """One record of the updates of a batch, fetched from the device.

  Returns: loss and grad_norm (before the clip), means over the updates; tokens_updated, a sum;
    padding_waste and attention_waste (pack.waste); and over the tokens with gradient: policy_entropy
    (nats), logp_error, mean |logp - sampler's logp| in the first update, before the policy has moved,
    clip_fraction_low and _high, quantiles of the ratio to the old policy, to 10 % of their log, and kl
    and tis_weight where they are in the loss.
  """
  measured = jax.device_get(measured)
  sums = {name: np.sum([m[name] for m in measured], axis=0) for name in measured[-1]}
  tokens, first_tokens = (max(int(x), 1) for x in (sums['tokens_updated'],
                                                   measured[0]['tokens_updated']))
  record = {'loss': sums['loss'] / len(measured), 'grad_norm': sums['grad_norm'] / len(measured),
            'tokens_updated': sums['tokens_updated'],
            'padding_waste': measured[0]['padding_waste'],
            'attention_waste': measured[0]['attention_waste'],
            'logp_error': measured[0]['logp_error'] / first_tokens,
            'clip_fraction_low': sums['clipped_low'] / tokens,
            'clip_fraction_high': sums['clipped_high'] / tokens}
  for name in ('policy_entropy', 'kl', 'tis_weight'):
    if name in sums:
      record[name] = sums[name] / tokens
  return {**{name: np.asarray(x).item() for name, x in record.items()},
          **ratio_quantiles(sums['ratios'])}


def ratio_quantiles(count: np.ndarray) -> dict[str, float]:
  """Quantiles of the ratio from the counts in the bins of _BOUNDS; 1 where nothing was counted."""
  middle = np.concatenate([_BOUNDS[:1], (_BOUNDS[1:] + _BOUNDS[:-1]) / 2, _BOUNDS[-1:]])
  below = np.cumsum(count) / max(count.sum(), 1)
  at = lambda q: float(np.exp(middle[min(np.searchsorted(below, q), len(middle) - 1)]))
  return {f'ratio_p{round(100 * q):02}': at(q) if count.sum() else 1.0 for q in (0.01, 0.5, 0.99)}


def sft(state: types.TrainState, rollouts: types.Rollouts, policy_config: policy.Config,
            config: Config) -> tuple[types.TrainState, dict[str, Array]]:
  """One maximum-likelihood update on all completions, which are given.

  Donates the state. Returns the state and scalars: loss, a mean over tokens, and grad_norm.
  """
  packed = pack_rollouts(rollouts, np.asarray(rollouts.length_R) > 0,
                         config.replace(minibatches=1))
  return _sft(state, gather(rollouts, packed), packed.first[-1], np.sum(rollouts.length_R),
                  policy_config, config)


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=0)
def _sft(state: types.TrainState, tokens: Tokens, end: Array, total: Array,
             policy_config: policy.Config, config: Config
             ) -> tuple[types.TrainState, dict[str, Array]]:
  def loss(params, total, microbatch):
    logp_BT, _ = score(policy_config, params, microbatch, config)
    return -jnp.sum(jnp.where(microbatch.mask_BT, logp_BT, 0)) / jnp.maximum(total, 1), {}

  state, measured = _update(state, loss, total, tokens, jnp.array(0), end, config)
  return state._replace(step=state.step + 1), measured


def gradient_noise(trained: Any, base: Any, rollouts: types.Rollouts, verdict_R: np.ndarray,
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
    trained, base: parameters, as policy.split parts them.
    verdict_R: float32, 1.0 or 0.0.
    key: of the signs, new every step.

  Returns:
    float32 [4], to be summed over steps: signal and its scale, noise and its scale, so that
    signal / its scale estimates |x|^2, and noise / its scale nu |x|^2 (estimate.nu).
  """
  packed = pack_mixed(rollouts, verdict_R, config)
  return _gradient_noise(
      trained, base, rollouts.task_R, verdict_R, gather(rollouts, packed), packed.first[-1], key,
      len(rollouts.prompts.length_M), policy_config, config)


@functools.partial(jax.jit, static_argnums=(7, 8, 9))
def _gradient_noise(trained: Any, base: Any, task_R: Array, verdict_R: Array, tokens: Tokens, end: Array,
                    key: Array, M: int, policy_config: policy.Config, config: Config) -> Array:
  right_R = verdict_R > 0
  # Of each outcome of a task every other rollout, as task_R does not fall.
  half_R = jnp.where(right_R, jnp.cumsum(right_R), jnp.cumsum(~right_R)) % 2
  group_R = 2 * task_R + half_R
  advantage_R = grpo.advantage(verdict_R, group_R, 2 * M, kind='loo')
  sign_R = jax.random.rademacher(key, (M,), jnp.float32)[jnp.minimum(task_R, M - 1)]
  weight_2R = jnp.where(half_R[None] == jnp.arange(2)[:, None], sign_R * advantage_R, 0.0)

  def half_gradients(given, microbatch):
    trained, base, weight_2R = given

    def weighted_logp(trained):
      logp_BT, _ = score(policy_config, policy.join(policy_config, trained, base), microbatch, config)
      return jnp.einsum('hbt,bt->h', weight_2R[:, microbatch.rollout_BT],
                        jnp.where(microbatch.mask_BT, logp_BT, 0.0))

    _, pull = jax.vjp(weighted_logp, trained)
    return tuple(sharding.constrain(pull(half_2)[0]) for half_2 in jnp.eye(2))

  halves = _sum_over_microbatches(
      half_gradients, (trained, base, weight_2R), tokens, jnp.array(0), end)
  c_2M = jax.ops.segment_sum(advantage_R * verdict_R, group_R, 2 * M).reshape(M, 2).T
  signal = optax.tree.vdot(*halves)
  signal_scale = jnp.sum(c_2M[0] * c_2M[1])
  spread = optax.tree.norm(jax.tree.map(jnp.subtract, *halves), squared=True)
  noise = spread - jnp.sum((c_2M[0] - c_2M[1]) ** 2) * signal / jnp.maximum(signal_scale, 1e-30)
  # Without a signal's scale there is no knowing what of the spread is noise.
  return sharding.replicate(jnp.where(
      signal_scale > 0, jnp.stack([signal, signal_scale, noise, jnp.sum(advantage_R ** 2)]), 0.0))
