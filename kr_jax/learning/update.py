"""The optimiser steps of a batch of rollouts, over packed microbatches.

The gradient is a sum over tokens, of the microbatches in use only. The whole batch fixes the weight of each token, so
the gradient depends neither on the packing nor on the size of a microbatch nor on the mesh. One compiled program
serves all budgets.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax

from kr_jax import knobs
from kr_jax import phases
from kr_jax import sharding
from kr_jax import types
from kr_jax.costs import arithmetic
from kr_jax.costs import programs
from kr_jax.kernels.token_logprob import token_logprob
from kr_jax.learning import grpo
from kr_jax.learning import guard
from kr_jax.learning import measurements
from kr_jax.learning import pack
from kr_jax.model import policy
from kr_jax.types import Array

MICROBATCHES = 'microbatches'  # the name of the loops over the microbatches in use
# Ratios of tokens to the sampler's policy are off by 1e-2 and more in bfloat16.
_ROUNDING = 0.02


@knobs.section
class Config(knobs.Optimizer, knobs.Pack):
  """The optimiser, the packing and the loss of an update."""

  SECTION = 'sample'
  grpo: knobs.Grpo = knobs.Grpo()
  temperature: float = knobs.knob(1.0, 'at which the rollouts were sampled', above=0)
  # Of each wave of a step, where there are several; (): as many as it has rows, which a mesh may round up.
  wave_rollouts: tuple[int, ...] = ()


class Tokens(NamedTuple):
  """The tokens of a microbatch and their targets. Arrays of all microbatches have one more axis in front."""

  token_BT: Array
  position_BT: Array
  segment_BT: Array  # the rollout a token belongs to; -1 is padding
  rows: types.Rows | None  # as in pack.Microbatch
  rollout_BT: Array  # as segment_BT, but 0 for padding
  target_BT: Array  # the token that follows
  mask_BT: Array  # True where the target is a completion token; each completion token is a target once
  sampler_logp_BT: Array  # of the target, when it was sampled
  old_logp_BT: Array | None = None  # of the target, before the first update; None: ratios are 1
  ref_logp_BT: Array | None = None  # of the target, by the initial policy; None: the loss has no KL


class Experience(NamedTuple):
  """The figures of each rollout that an update learns from."""

  length_R: Array
  advantage_R: Array
  weight_R: Array  # the weight of each of its tokens


def learning_rate(config: Config) -> optax.Schedule:
  """The rate of each update: a linear warm-up, then the schedule."""
  peak, fall = config.learning_rate, config.decay_steps - config.warmup_steps
  warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
  after = {'constant': lambda: optax.constant_schedule(peak),
           'linear': lambda: optax.linear_schedule(peak, config.final_rate * peak, fall),
           'cosine': lambda: optax.cosine_decay_schedule(peak, fall, config.final_rate)}
  return optax.join_schedules([warmup, after[config.schedule]()], [config.warmup_steps])


def optimizer(config: Config) -> optax.GradientTransformation:
  """AdamW after a clip of the global norm."""
  is_matrix = lambda path, _: not any(part in jax.tree_util.keystr(path) for part in ('norm', 'bias'))
  matrices = functools.partial(jax.tree_util.tree_map_with_path, is_matrix)
  adamw = optax.adamw(learning_rate(config), b1=config.b1, b2=config.b2, eps=config.eps,
                      weight_decay=config.weight_decay, mask=matrices)
  return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


@functools.partial(jax.jit, static_argnums=2)
def init(params: Any, key: Array, config: Config) -> types.TrainState:
  """The state before the first update. params: the trained ones."""
  params = sharding.constrain(params)
  return types.TrainState(jnp.array(0), params, sharding.constrain(optimizer(config).init(params)), key)


def microbatch_shape(prompt_length: int, completion_length: int, rollouts_per_task: float, config: Config
                     ) -> pack.Shape:
  """`pack.shape` on the mesh that is set."""
  return pack.shape(
      prompt_length=prompt_length, completion_length=completion_length, rollouts_per_task=rollouts_per_task,
      row_length=config.row_length, microbatch_rows=config.microbatch_rows, prompt_sharing=config.prompt_sharing,
      shards=sharding.row_shards())


def pack_rollouts(rollouts: types.Rollouts, keep_R: np.ndarray, config: Config) -> pack.Packed:
  """Microbatches of the rollouts to keep, in the one shape that any R rollouts fit into. Runs on the host."""
  (R, C), (M, P) = rollouts.token_RC.shape, rollouts.prompts.token_MP.shape
  shape, m = microbatch_shape(P, C, R / M, config), config.minibatches
  task_R, own_R = np.asarray(rollouts.task_R), np.asarray(rollouts.length_R)
  # The prompt's last token is not shared: it predicts the completion's first token, which differs by rollout.
  shared_R = np.append(rollouts.prompts.length_M - 1, 0)[task_R]  # task M stands for rows without a rollout
  minibatch_R = pack.assign(task_R, shared_R + own_R, keep_R, minibatches=m)
  most = pack.max_microbatches(R, P + C - 1, minibatches=m, shape=shape)
  return pack.segments(task_R, shared_R, own_R, minibatch_R, minibatches=m, microbatches=most, shape=shape)


def gather(rollouts: types.Rollouts, packed: pack.Packed) -> Tokens:
  """The tokens of all microbatches; the rows of each device are put onto it."""
  put, mesh = sharding.put(packed.microbatches, PartitionSpec(None, sharding.ROWS)), jax.sharding.get_abstract_mesh()
  if not mesh.empty:  # else the program copies them; along 'model' devices receive the same rows
    copies = mesh.size // sharding.row_shards()
    phases.count(host_bytes=copies * sum(x.nbytes for x in jax.tree.leaves(packed.microbatches)))
  return programs.run(_gather, rollouts, put)


@jax.jit
def _gather(rollouts: types.Rollouts, microbatches: pack.Microbatch) -> Tokens:
  (segment_BT, position_BT, rows), prompts = microbatches, rollouts.prompts
  # Rollouts move between devices once, here, and not in each update.
  token_RC, logp_RC = sharding.replicate((rollouts.token_RC, rollouts.logp_RC))
  C, P = token_RC.shape[1], prompts.token_MP.shape[1]
  r_BT = jnp.maximum(segment_BT, 0)
  m_BT = jnp.minimum(rollouts.task_R[r_BT], len(prompts.length_M) - 1)  # padding reads row 0, which may be no rollout
  # The index in the completion of the token that follows: 0 for the prompt's last token, below 0 before it.
  next_BT = position_BT - prompts.length_M[m_BT] + 1
  c_BT = jnp.clip(next_BT, 0, C - 1)
  tokens = Tokens(
      token_BT=jnp.where(next_BT <= 0, prompts.token_MP[m_BT, jnp.minimum(position_BT, P - 1)],
                         token_RC[r_BT, jnp.clip(next_BT - 1, 0, C - 1)]),
      position_BT=position_BT, segment_BT=segment_BT, rows=rows, rollout_BT=r_BT, target_BT=token_RC[r_BT, c_BT],
      mask_BT=(segment_BT >= 0) & (next_BT >= 0) & (next_BT < rollouts.length_R[r_BT]),
      sampler_logp_BT=logp_RC[r_BT, c_BT])
  return sharding.constrain_rows(tokens, axis=1)


def score(policy_config: policy.Config, params: Any, tokens: Tokens, config: Config
          ) -> tuple[Array, Array, Array | None]:
  """logp_BT of the targets of a microbatch, entropy_BT of the distributions they are drawn from, and load_LE: how many
  tokens each expert was sent, or None where there are no experts."""
  params = policy.gather_vocabulary(policy_config, params)
  hidden_BTD, load_LE = policy.hidden_and_load(
      policy_config, params, tokens.token_BT, tokens.position_BT, tokens.segment_BT, tokens.rows,
      counted_BT=tokens.segment_BT >= 0)
  scores_T = token_logprob(
      hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), policy.output_matrix(policy_config, params),
      tokens.target_BT.reshape(-1), temperature=config.temperature)
  return *(x_T.reshape(tokens.token_BT.shape) for x_T in scores_T), load_LE


def microbatch_of(tokens: Tokens, i: Array) -> Tokens:
  return sharding.constrain_rows(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tokens))


def sum_over_microbatches(function: Callable[[Any, Tokens], Any], arguments: Any, tokens: Tokens, first: Array,
                          end: Array) -> Any:
  """The sum of function(arguments, microbatch), which reads nothing else, over microbatches first, ..., end - 1."""
  def of_copy(tokens, arguments, first, end):
    one = lambda i: function(arguments, microbatch_of(tokens, i))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jnp.array(0)))
    with jax.named_scope(MICROBATCHES):
      return jax.lax.fori_loop(first, end, lambda i, total: jax.tree.map(jnp.add, total, one(i)), zero)

  return sharding.sum_over_copies(of_copy, tokens, arguments, first, end)


def _update(state: types.TrainState, loss_and_counts: Callable[[Any, Any, Tokens], tuple[Array, Any]],
            arguments: Any, tokens: Tokens, first: Array, end: Array, config: Config
            ) -> tuple[types.TrainState, dict[str, Array]]:
  """One optimiser step on the sum of the loss of (params, arguments, microbatch); the counts are summed too."""
  def constrained(params_and_arguments, microbatch):
    out, grads = jax.value_and_grad(loss_and_counts, has_aux=True)(*params_and_arguments, microbatch)
    return out, sharding.constrain(grads)

  (loss, counts), grads = sum_over_microbatches(constrained, (state.params, arguments), tokens, first, end)
  squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]
  norm = jnp.sqrt(sum(squares))

  def moved():
    updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state

  # What an update would give is looked at before it is made, as there is no room for the state before and after it:
  # the first time nothing of it is kept, but the largest number of each array.
  learns, is_finite = end > first, jnp.isfinite(loss) & jnp.isfinite(norm)
  largest_X = jax.lax.cond(learns & is_finite, lambda: guard.of_state(*moved()),
                           lambda: guard.of_state(state.params, state.opt_state))
  skipped = learns & ~(is_finite & jnp.all(guard.sound(largest_X, state.params)))
  # Without a microbatch there is nothing to learn from, and momentum must not move the policy either.
  params, opt_state = jax.lax.cond(learns & ~skipped, moved, lambda: (state.params, state.opt_state))
  return (state._replace(params=params, opt_state=opt_state),
          sharding.replicate({'loss': loss, 'grad_norm': norm, 'skipped': skipped, 'largest': largest_X,
                              'grad_norms': jnp.sqrt(jnp.stack(squares)), **counts}))


def step(state: types.TrainState, rollouts: types.Rollouts, reward_R: Array, base: Any,
         policy_config: policy.Config, config: Config, *, past: grpo.Past | None = None, key: Array | None = None
         ) -> tuple[types.TrainState, list[dict[str, Array]]]:
  """The GRPO updates of a batch: epochs * minibatches of them. A mini-batch holds whole tasks.

  A token's weight in the batch is multiplied by the number of mini-batches. So to first order the updates of a pass
  add up to one update by the whole batch's gradient at `minibatches` times the learning rate, and a task weighs the
  same in each mini-batch.

  Args:
    state: donated; its params are the trained ones (policy.split).
    reward_R: float32, of all rollouts, as advantages are taken over whole groups; of what is no rollout (task M,
      length 0) it is not read.
    base: the initial policy's parameters, where adapters or a KL divergence need them; else {}.
    policy_config: of the policy that is trained, with its adapters.
    past: of each task, before the step; read by grpo.advantage='posterior' alone.
    key: new every step; read where grpo.keep is below 1.

  Returns:
    The state with its step counted up, and the measurements of each update, for `summarize`; those of the first have
    `advantage_R` too, 0 for rollouts that were dropped.

  Raises:
    ValueError: past or key is None, and is read.
  """
  measured = []
  experience, tokens, packed, of = read(state.params, rollouts, reward_R, base, policy_config, config, past, key)
  first = packed.first
  with phases.phase('update'):
    for u in [*range(config.minibatches)] * config.epochs:
      state, measured_u = programs.run(_step, state, base, experience, tokens, first[u:u + 2], policy_config, config,
                                       trips={MICROBATCHES: int(first[u + 1] - first[u])})
      measured.append(measured_u)
    _count_update(of, packed, policy_config, times=config.epochs)
  measured[0] |= pack.waste(packed) | {'advantage_R': experience.advantage_R}
  return state._replace(step=state.step + 1), measured


def read(trained: Any, rollouts: types.Rollouts, reward_R: Array, base: Any, policy_config: policy.Config,
         config: Config, past: grpo.Past | None, key: Array | None
         ) -> tuple[Experience, Tokens, pack.Packed, arithmetic.Lengths]:
  """What the updates of a batch read: figures of rollouts, tokens of all microbatches, their packing, and the lengths
  of the rollouts that are learnt from. Arguments and errors are those of `step`."""
  g = config.grpo
  with phases.phase('pack'):
    experience = _experience(rollouts, reward_R, config, past, key)
    # With these terms rollouts without an advantage have a gradient too.
    learns_R = np.asarray(rollouts.length_R if g.kl_coef or g.entropy_coef else experience.advantage_R) != 0
    packed = pack_rollouts(rollouts, learns_R, config)
    tokens, end = gather(rollouts, packed), packed.first[-1]
  of, old_logp, ref_logp = _learnt(rollouts, learns_R), None, None
  if not has_own_ratios(g):
    old_logp = tokens.sampler_logp_BT
  elif config.epochs * config.minibatches > 1:
    old_logp = _scored(trained, base, tokens, end, policy_config, config, of)
  if g.kl_coef:
    ref_logp = _scored(base, {}, tokens, end, policy.without_lora(policy_config), config, of)
  return experience, tokens._replace(old_logp_BT=old_logp, ref_logp_BT=ref_logp), packed, of


def _learnt(rollouts: types.Rollouts, learns_R: np.ndarray) -> arithmetic.Lengths:
  """The lengths of the rollouts that an update learns from."""
  return arithmetic.lengths(rollouts.prompts.length_M, rollouts.task_R, np.where(learns_R, rollouts.length_R, 0))


def _count_update(of: arithmetic.Lengths, packed: pack.Packed, policy_config: policy.Config, times: int) -> None:
  computed, padded = pack.positions(packed)
  phases.count(flops_useful=times * arithmetic.update_flops(policy_config, of), tokens_computed=times * computed,
               tokens_padded=times * padded, tokens_updated=times * of.completion_R.sum())


def _scored(trained: Any, base: Any, tokens: Tokens, end: Array, policy_config: policy.Config, config: Config,
            of: arithmetic.Lengths) -> Array:
  """`logps`, as a phase. of: as of `_learnt`."""
  with phases.phase('score'):
    phases.count(flops_useful=arithmetic.score_flops(policy_config, of))
    return programs.run(logps, trained, base, tokens, end, policy_config, config, trips={MICROBATCHES: int(end)})


def has_own_ratios(config: knobs.Grpo) -> bool:
  """Whether the ratios' old policy is the trainer's own, as it was before the first update, and not the sampler's.

  It is with tis_cap, which weighs the sampler's error by itself; and where the clip's limits are so near to 1 that the
  rounding between the two would clip: in bfloat16 up to half of a batch with gspo's limits of 3e-4 and 4e-4.
  """
  return config.tis_cap > 0 or min(config.clip_low, config.clip_high) < _ROUNDING


@functools.partial(jax.jit, static_argnums=2)
def _experience(rollouts: types.Rollouts, reward_R: Array, config: Config, past: grpo.Past | None = None,
                key: Array | None = None) -> Experience:
  M, C = rollouts.prompts.length_M.shape[0], rollouts.token_RC.shape[1]
  task_R, length_R, wave_R, g = rollouts.task_R, rollouts.length_R, rollouts.wave_R, config.grpo
  share_W = np.divide(config.wave_rollouts, sum(config.wave_rollouts)) if config.wave_rollouts else None
  advantage_R = grpo.advantage(reward_R, task_R, M, kind=g.advantage, wave_R=wave_R, past=past)
  weight_R = grpo.token_weights(
      task_R, length_R, M, weight=g.weight, aggregate=g.aggregate, completion_length=C, wave_R=wave_R,
      share_W=share_W, least=1 if g.advantage == 'posterior' else 2)
  if g.keep < 1:
    if key is None:
      raise ValueError(f'grpo.keep={g.keep:g} draws which rollouts are dropped by key=None; pass a key, or set it to 1')
    advantage_R = grpo.drop_small(advantage_R, g.keep * jnp.sum(length_R > 0), key)
  return sharding.replicate(Experience(length_R, advantage_R, config.minibatches * weight_R))


@functools.partial(jax.jit, static_argnums=(4, 5))
def logps(trained: Any, base: Any, tokens: Tokens, end: Array, policy_config: policy.Config, config: Config) -> Array:
  """logp_BT of the targets of all microbatches before the end; 0 in the microbatches after it."""
  params = policy.join(policy_config, trained, base)

  def put(i, logp):
    logp_BT, *_ = score(policy_config, params, microbatch_of(tokens, i), config)
    return sharding.constrain_rows(jax.lax.dynamic_update_index_in_dim(logp, logp_BT, i, axis=0), axis=1)

  with jax.named_scope(MICROBATCHES):
    return jax.lax.fori_loop(0, end, put, jnp.zeros(tokens.token_BT.shape))


@functools.partial(jax.jit, static_argnums=(5, 6), donate_argnums=0)
def _step(state: types.TrainState, base: Any, experience: Experience, tokens: Tokens, first_and_end: Array,
          policy_config: policy.Config, config: Config) -> tuple[types.TrainState, dict[str, Array]]:
  """The update of the microbatches first, ..., end - 1, and its measurements."""
  return _update(state, functools.partial(loss_and_counts, policy_config, config), (base, experience), tokens,
                 *first_and_end, config)


def loss_and_counts(policy_config: policy.Config, config: Config, trained: Any, arguments: tuple[Any, Experience],
                    microbatch: Tokens) -> tuple[Array, dict[str, Array]]:
  """The loss of a microbatch, and sums over its completion tokens. arguments: the base, and figures of rollouts."""
  base, experience = arguments
  params = policy.join(policy_config, trained, base)
  *scores, load_LE = score(policy_config, params, microbatch, config)
  loss, counts = _loss(*scores, microbatch, experience, config.grpo)
  return loss, counts if load_LE is None else counts | {'load': load_LE}


def _sampler_errors(log_ratio_BT: Array, mask_BT: Array) -> dict[str, Array]:
  """Of the ratios to the sampler's policy. One sum, as two take 1.4 GB more of a TPU in an update of qwen3_4b."""
  of_each_BT2 = jnp.stack([jnp.abs(log_ratio_BT), grpo.divergence_bits(log_ratio_BT)], axis=-1)
  error, divergence = jnp.sum(jnp.where(mask_BT[..., None], of_each_BT2, 0), axis=(0, 1))
  return {'logp_error': error, 'divergence': divergence}


def _loss(logp_BT: Array, entropy_BT: Array, tokens: Tokens, experience: Experience, config: knobs.Grpo
          ) -> tuple[Array, dict[str, Array]]:
  """The loss of a microbatch, and sums over its completion tokens."""
  mask_BT, rollout_BT, sampler_logp_BT = tokens.mask_BT, tokens.rollout_BT, tokens.sampler_logp_BT
  # Prompts and padding have no old log-probability, so their ratio may overflow. A mask put on afterwards would
  # not help, as a gradient of NaN survives it.
  logp_BT = jnp.where(mask_BT, logp_BT, sampler_logp_BT)

  masked = lambda x_BT: jnp.where(mask_BT, x_BT, logp_BT)
  total = lambda x_BT: jnp.sum(jnp.where(mask_BT, x_BT, 0))
  old_logp_BT = jax.lax.stop_gradient(logp_BT) if tokens.old_logp_BT is None else masked(tokens.old_logp_BT)
  log_ratio_BT = logp_BT - old_logp_BT
  if config.loss == 'gspo':
    # All tokens of a rollout stand in one microbatch.
    sum_R = jnp.zeros(experience.length_R.shape).at[rollout_BT].add(jnp.where(mask_BT, log_ratio_BT, 0))
    log_ratio_BT = (sum_R / jnp.maximum(experience.length_R, 1))[rollout_BT]
  loss_BT, low_BT, high_BT = grpo.policy_loss(log_ratio_BT, logp_BT, experience.advantage_R[rollout_BT], config)
  likely_BT, sampler_likely_BT = (x_BT > -np.log(2) for x_BT in (logp_BT, sampler_logp_BT))
  counts = {
      'tokens_updated': jnp.sum(mask_BT), 'clipped_low': total(low_BT), 'clipped_high': total(high_BT),
      'policy_entropy': total(entropy_BT), **_sampler_errors(logp_BT - sampler_logp_BT, mask_BT),
      'argmax_known': total(likely_BT | sampler_likely_BT), 'argmax_same': total(likely_BT & sampler_likely_BT),
      'ratios': jnp.zeros(len(measurements.LOG_RATIO_EDGES) + 1, jnp.int32).at[
          jnp.searchsorted(measurements.LOG_RATIO_EDGES, log_ratio_BT)].add(mask_BT)}
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


def sft(state: types.TrainState, rollouts: types.Rollouts, policy_config: policy.Config, config: Config
        ) -> tuple[types.TrainState, dict[str, Array]]:
  """One update of supervised fine-tuning. Donates the state; measures loss, a mean over tokens, and grad_norm."""
  learns_R = np.asarray(rollouts.length_R) > 0
  packed = pack_rollouts(rollouts, learns_R, config.replace(minibatches=1))
  tokens, end = gather(rollouts, packed), packed.first[-1]
  _count_update(_learnt(rollouts, learns_R), packed, policy_config, times=1)
  return programs.run(_sft, state, tokens, end, np.sum(rollouts.length_R), policy_config, config,
                      trips={MICROBATCHES: int(end)})


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=0)
def _sft(state: types.TrainState, tokens: Tokens, end: Array, num_tokens: Array, policy_config: policy.Config,
         config: Config) -> tuple[types.TrainState, dict[str, Array]]:
  def loss_and_counts(params, num_tokens, microbatch):
    logp_BT, *_ = score(policy_config, params, microbatch, config)
    return -jnp.sum(jnp.where(microbatch.mask_BT, logp_BT, 0)) / jnp.maximum(num_tokens, 1), {}

  state, measured = _update(state, loss_and_counts, num_tokens, tokens, jnp.array(0), end, config)
  return state._replace(step=state.step + 1), measured
