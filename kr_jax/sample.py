"""Budgets -> rollouts: each task is prefilled once, and S cache slots decode a queue of R rollouts.

    while rollouts are left:                    # one jitted program, no host round trip
      free slots take the next rollouts of the queue and a copy of their task's prefix
      while fewer than `refill` slots are free, or the queue is empty and a slot is live:
        every slot samples a token; slots whose rollout ended become free

A budget is data, not a shape: R is fixed, `task_R` repeats each task by its budget, and one
compilation serves every allocation. Where the budgets sum to less than R, the rest of the queue is
never taken.

The key of a token is folded from (step, task, number of the rollout in its group, position). So a
rollout's tokens depend on nothing else: not on S, its slot, its neighbours or the other budgets.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kr_jax import policy
from kr_jax import types
from kr_jax.tokenizer import PAD, STOP
from kr_jax.types import Array


class Config(NamedTuple):
  """How to sample."""

  slots: int  # S
  refill: int  # free slots to wait for before the queue is asked, 1..S
  prompt_length: int  # P, the longest prompt
  completion_length: int  # C, where a completion is cut off
  temperature: float  # 0 is greedy


def check(config: Config) -> None:
  """Raises ValueError for a knob out of its range."""
  if config.slots < 1:
    raise ValueError(f'sample.slots={config.slots} is below 1; rollouts need a cache slot')
  if not 1 <= config.refill <= config.slots:
    raise ValueError(f'sample.refill={config.refill} is not in 1..sample.slots={config.slots}')
  for name in ('prompt_length', 'completion_length'):
    if getattr(config, name) < 1:
      raise ValueError(f'sample.{name}={getattr(config, name)} is below 1')
  if not config.temperature >= 0:
    raise ValueError(f'sample.temperature={config.temperature} is below 0')


class _Decoding(NamedTuple):
  """The state of the decode loops."""

  cache: policy.Cache
  logits_SV: Array  # of the token to sample next
  rollout_S: Array  # which rollout a slot decodes; R: none, the slot is free
  count_S: Array  # completion tokens the slot's rollout has
  queued: Array  # first rollout that no slot has taken
  steps: Array
  token_RC: Array
  logp_RC: Array
  length_R: Array
  ended_R: Array


def rollouts(policy_config: policy.Config, params: Any, prompts: types.Prompts, budget_M: np.ndarray,
             key: Array, config: Config, *, total: int) -> types.Rollouts:
  """Samples budget_M[m] completions of task m.

  Args:
    prompts: of M tasks.
    budget_M: host integers >= 0 that sum to at most R = total.
    key: of the step.
    total: R. It names the compiled program; budgets do not.

  Returns:
    Rollouts, grouped by task. log-probabilities are those of the sampling distribution (at the
    temperature; greedy: at temperature 1).

  Raises:
    ValueError: budgets that are negative or sum to more than R.
  """
  budget_M = np.asarray(budget_M, np.int32)
  if budget_M.min() < 0 or budget_M.sum() > total:
    raise ValueError(f'budgets {budget_M.tolist()} must be >= 0 and sum to at most {total}')
  return _rollouts(policy_config, params, prompts, budget_M, key, config, total)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _rollouts(policy_config, params, prompts, budget_M, key, config, R) -> types.Rollouts:
  M, P = prompts.token_MP.shape
  S, C = min(config.slots, R), config.completion_length
  end = jnp.sum(budget_M)
  task_R = jnp.repeat(jnp.arange(M), budget_M, total_repeat_length=R)  # beyond the end M - 1
  first_M = jnp.cumsum(budget_M) - budget_M
  number_R = jnp.arange(R) - first_M[task_R]
  fold = jax.vmap(jax.random.fold_in)
  key_R = fold(jax.vmap(lambda i: jax.random.fold_in(key, i))(prompts.index_M)[task_R], number_R)

  prompt_logits_MV, prefix = policy.prefill(
      policy_config, params, prompts.token_MP, prompts.length_M)

  def take(d: _Decoding) -> _Decoding:
    """Free slots take the next rollouts of the queue."""
    free_S = d.rollout_S == R
    next_S = d.queued + jnp.cumsum(free_S) - 1
    taken_S = free_S & (next_S < end)
    rollout_S = jnp.where(taken_S, next_S, d.rollout_S)
    task_S = task_R[jnp.minimum(rollout_S, R - 1)]

    def copy(cache_LSTKH, prefix_LMPKH):
      return cache_LSTKH.at[:, :, :P].set(jnp.where(
          taken_S[None, :, None, None, None], prefix_LMPKH[:, task_S], cache_LSTKH[:, :, :P]))

    return d._replace(
        cache=jax.tree.map(copy, d.cache, prefix),
        logits_SV=jnp.where(taken_S[:, None], prompt_logits_MV[task_S], d.logits_SV),
        rollout_S=rollout_S,
        count_S=jnp.where(taken_S, 0, d.count_S),
        queued=d.queued + jnp.sum(taken_S))

  def decode(d: _Decoding) -> _Decoding:
    """Every slot samples a token and reads it."""
    r_S = jnp.minimum(d.rollout_S, R - 1)  # a free slot runs along; nothing it does is kept
    if config.temperature > 0:
      logits_SV = d.logits_SV / config.temperature
      noise_SV = jax.vmap(lambda k: jax.random.gumbel(k, logits_SV.shape[1:]))(
          fold(key_R[r_S], d.count_S))
      token_S = jnp.argmax(logits_SV + noise_SV, axis=-1)
    else:
      logits_SV = d.logits_SV
      token_S = jnp.argmax(logits_SV, axis=-1)
    logp_S = jnp.take_along_axis(
        jax.nn.log_softmax(logits_SV), token_S[:, None], axis=-1)[:, 0]
    ended_S = jnp.where(
        token_S == STOP, types.ENDED_STOP,
        jnp.where(d.count_S + 1 == C, types.ENDED_LENGTH, types.NOT_SAMPLED))
    # Row R is out of bounds: what a free slot writes is dropped.
    write = lambda out, *where: out.at[d.rollout_S, *where]
    position_S = prompts.length_M[task_R[r_S]] + jnp.minimum(d.count_S, C - 1)
    logits_SV, cache = policy.decode(policy_config, params, token_S, position_S, d.cache)
    return d._replace(
        cache=cache,
        logits_SV=logits_SV,
        rollout_S=jnp.where(ended_S == types.NOT_SAMPLED, d.rollout_S, R),
        count_S=d.count_S + 1,
        steps=d.steps + 1,
        token_RC=write(d.token_RC, d.count_S).set(token_S, mode='drop'),
        logp_RC=write(d.logp_RC, d.count_S).set(logp_S, mode='drop'),
        length_R=write(d.length_R).set(d.count_S + 1, mode='drop'),
        ended_R=write(d.ended_R).set(ended_S, mode='drop'))

  def keep_decoding(d: _Decoding) -> Array:
    free = jnp.sum(d.rollout_S == R)
    return (free < S) & ((free < config.refill) | (d.queued == end))

  def empty(prefix_LMPKH):
    L, _, _, K, H = prefix_LMPKH.shape
    return jnp.zeros((L, S, P + C, K, H), prefix_LMPKH.dtype)

  d = _Decoding(
      cache=jax.tree.map(empty, prefix),
      logits_SV=jnp.zeros((S, prompt_logits_MV.shape[1])),
      rollout_S=jnp.full(S, R),
      count_S=jnp.zeros(S, int),
      queued=jnp.array(0),
      steps=jnp.array(0),
      token_RC=jnp.full((R, C), PAD),
      logp_RC=jnp.zeros((R, C)),
      length_R=jnp.zeros(R, int),
      ended_R=jnp.full(R, types.NOT_SAMPLED))
  d = jax.lax.while_loop(
      lambda d: (d.queued < end) | jnp.any(d.rollout_S < R),
      lambda d: jax.lax.while_loop(keep_decoding, decode, take(d)),
      d)
  return types.Rollouts(
      prompts=types.Prompts(*map(jnp.asarray, prompts)),
      task_R=jnp.where(jnp.arange(R) < end, task_R, M), token_RC=d.token_RC, logp_RC=d.logp_RC,
      length_R=d.length_R, ended_R=d.ended_R, decode_steps=d.steps)
