"""Budgets -> rollouts: each task is prefilled once, and S cache slots decode a queue of rollouts.

    while rollouts are left:                    # one jitted program, no host round trip
      free slots take the next rollouts of the queue, and read the prefixes of their tasks
      while fewer than `refill` slots are free, or the queue is empty and a slot is live:
        every slot samples a token; slots whose rollout ended become free

A budget is data, not a shape: R is fixed, `task_R` repeats each task by its budget, and one
compilation serves every allocation. Where the budgets sum to less than R, the rest of the queue is
never taken. Rollouts that are expected to be long go first, so that the last to end are short.

On a mesh each shard of ('data', 'fsdp') has S slots, a queue of its own and the prefixes of its own
tasks, and loops until its own queue is empty: `assign_to_queues` says which rollouts are whose. Over 'model'
heads, hidden units and vocabulary are divided.

A step's rollouts may come in waves, so that the budgets of each can heed the verdicts on those before
(`Waves`). The first reads the prompts, and their prefixes stay until the last.

The key of a token is folded from (step, task, number of the rollout in its group, position). So a
rollout's tokens depend on nothing else: not on S, its slot, its shard, its neighbours or the budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import fractions
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from kr_jax import draw
from kr_jax import knobs
from kr_jax import phases
from kr_jax import queues as queues_lib
from kr_jax import sharding
from kr_jax import types
from kr_jax.costs import arithmetic
from kr_jax.costs import programs
from kr_jax.kernels.decode_attention import ops as attention_ops
from kr_jax.model import decode as decode_lib
from kr_jax.model import policy
from kr_jax.types import PAD, Array

# Names of the loops that end when their work is done, for whoever counts what they do (preflight.py,
# costs/programs.py).
PREFILL, REFILL, DECODE = 'prefill', 'refill', 'decode'


@knobs.section
class Config(knobs.Filters, knobs.Sample):
  """How to sample: the section of a config, with the filters of its user."""

  stop_ids: tuple[int, ...] = ()  # tokens that end a completion: the tokenizer's

  def conflicts(self):
    yield from super().conflicts()
    if not self.stop_ids:
      yield 'sample.stop_ids is empty; a completion needs a token that ends it'


def slots(config: Config, total: int) -> int:
  """S of each shard, where R = total."""
  return min(config.slots, math.ceil(total / sharding.row_shards()))


# A step.


def rollouts(policy_config: policy.Config, params: Any, prompts: types.Prompts, budget_M: np.ndarray,
             key: Array, config: Config, *, total: int, expected_M: np.ndarray | None = None
             ) -> types.Rollouts:
  """Samples budget_M[m] completions of task m, in one wave.

  Args:
    params: sampling params (kr_jax/model/decode.py).
    prompts: of M tasks.
    budget_M: host integers >= 0 that sum to at most the total.
    key: of the step.
    total: most rollouts of a step. It names the compiled program; budgets do not.
    expected_M: tokens that a rollout of a task is expected to have, where that is known.

  Returns:
    R rollouts, grouped by task; R is the total, made a multiple of the shards. Log-probabilities are the
    policy's at the temperature (greedy: at 1), whatever top_k, top_p and min_p leave out.

  Raises:
    ValueError: budgets that are negative or sum to more than R.
  """
  waves = Waves(policy_config, params, prompts, key, config, totals=(total,))
  with phases.phase('sample'):
    found = waves.sample(budget_M, expected_M)
    if phases.is_running():
      phases.count(**waves.counters(found))
  return found


class Waves:
  """The rollouts of one step, wave by wave.

  A rollout's number in its group goes on from the waves before, so that it has the tokens that it would have in
  one wave of all the budgets together. To be made and used where the mesh to sample on is set. Nothing stays on
  the devices after the last wave.
  """

  def __init__(self, policy_config: policy.Config, params: Any, prompts: types.Prompts, key: Array, config: Config, *,
               totals: Sequence[int]):
    """Arguments are those of `rollouts`, but for totals: most rollouts of each wave. They name the compiled programs,
    which later waves of one total share."""
    self.rows = sharding.row_shards() * math.ceil(sum(totals) / sharding.row_shards())  # R, if there were one wave
    self._policy, self._params, self._prompts, self._key, self._config = policy_config, params, prompts, key, config
    self._totals, self._wave = tuple(totals), 0
    self._done_M = np.zeros(len(prompts.length_M), np.int32)  # rollouts of the waves before
    self._prefixes: _Prefixes | None = None
    self._place_M: np.ndarray | None = None  # of the prefix of each task, among the places of all shards
    self._calls: list[programs.Call] = []  # of the last wave, where a clock runs
    self._held: queues_lib.Queues | None = None  # of the last wave

  def sample(self, budget_M: np.ndarray, expected_M: np.ndarray | None = None) -> types.Rollouts:
    """The next wave: rollouts as `rollouts` returns them, of these budgets.

    Raises:
      ValueError: budgets that are negative or sum to more than the wave's total, or that give a task its first
        rollouts after the first wave, which read the prompts; or all waves are sampled.
    """
    wave, M, shards = self._wave, len(self._done_M), sharding.row_shards()
    if wave == len(self._totals):
      raise ValueError(f'all waves of the step are sampled; totals={self._totals} names {wave}, set one more')
    budget_M, total, is_last = np.asarray(budget_M, np.int32), self._totals[wave], wave + 1 == len(self._totals)
    if budget_M.min() < 0 or budget_M.sum() > total:
      raise ValueError(f'budgets {budget_M.tolist()} must be >= 0 and sum to at most {total}')
    unread = np.flatnonzero((wave > 0) & (self._done_M == 0) & (budget_M > 0)).tolist()
    if unread:
      raise ValueError(f'tasks {unread} have budgets {budget_M[unread].tolist()} in wave {wave} and none in wave 0, '
                       'which alone reads prompts; set them to 0, or give the tasks a rollout in wave 0')
    queues = queues_lib.assign_to_queues(budget_M, total=total, shards=shards, expected_M=expected_M)
    held = queues if wave == 0 else queues_lib.hold_all(queues, M)
    held = held._replace(number_ZQ=held.number_ZQ + self._done_M[held.task_ZQ])
    self._calls, self._held = [], held
    program = self._policy, self._params, self._prompts, held, self._key, self._config
    if wave == 0:
      decoded, self._prefixes = self._run(_decode, *program, not is_last)
    else:
      width = len(self._prefixes.logits_KV) // shards
      source_ZK = np.pad(self._place_M[held.task_ZK], ((0, 0), (0, width - held.task_ZK.shape[1])))
      self._prefixes = self._run(_place, self._prefixes, source_ZK)
      decoded = self._run(_decode_on, *program, self._prefixes)
    self._wave, self._done_M = wave + 1, self._done_M + budget_M
    if is_last:
      self._params = self._prefixes = None
    else:
      self._place_M = queues_lib.places(held, M, width=len(self._prefixes.logits_KV) // shards)
    return self._run(_by_task, self._prompts, budget_M, queues, *decoded)

  def _run(self, function: Any, *args: Any) -> Any:
    if phases.is_running():
      self._calls.append(programs.begin(function, args))
    return function(*args)

  def counters(self, rollouts: types.Rollouts) -> dict[str, int]:
    """What the last wave took, for phases.count. Waits for the rollouts.

    Those that are not known are left out: so are the last three of these where no clock ran (phases.py).

    rollouts: as `sample` returned them, with nothing left out or shortened.

    Returns:
      tokens_prompt: read by all shards; a prompt of two shards counts twice.
      tokens_generated, rollouts, flops_useful: of the rollouts, however they were sampled.
      hbm_bytes_read: by the decode loops, at the least.
      flops_executed, collective_bytes, host_bytes: of the programs; and of what the host reads of the rollouts.
    """
    length_R, task_R, length_M, steps, refills = (np.asarray(x) for x in (
        rollouts.length_R, rollouts.task_R, self._prompts.length_M, rollouts.decode_steps, rollouts.refills))
    is_first, held, calls = self._wave == 1, self._held, self._calls
    of = arithmetic.lengths(length_M, task_R, length_R, reads=is_first)
    trips = _trips(held, int(steps), int(refills), self._config, reads=is_first)
    ran = [programs.executed(call, trips) for call in calls]
    found = {name: sum(x[name] for x in ran) for name in ('flops_executed', 'collective_bytes', 'host_bytes')
             if ran and all(name in x for x in ran)}
    if 'flops_executed' in found and any(call.program(tuple(trips)).decodes_by_kernel for call in calls):
      found['flops_executed'] += arithmetic.decode_attention_flops(self._policy, of)
    if 'host_bytes' in found:
      found['host_bytes'] += sum(
          x.nbytes for x in (rollouts.token_RC, rollouts.task_R, rollouts.length_R, rollouts.ended_R))
    is_read_ZK = np.arange(held.task_ZK.shape[1])[None] < held.tasks_Z[:, None]
    return found | {
        'tokens_prompt': int(length_M[held.task_ZK[is_read_ZK]].sum()) if is_first else 0,
        'tokens_generated': int(length_R.sum()), 'rollouts': int(np.count_nonzero(length_R)),
        'flops_useful': arithmetic.sample_flops(self._policy, of),
        'hbm_bytes_read': arithmetic.decode_bytes(
            self._policy, of, steps=int(steps), slots=min(self._config.slots, held.local_ZQ.shape[1]),
            cache=self._config.cache)}


def _trips(queues: queues_lib.Queues, steps: int, refills: int, config: Config, *, reads: bool
           ) -> dict[str, int | fractions.Fraction]:
  """All trips of each loop of a wave, of a mean shard.

  The windows of slots that read their prompt together are estimated, where attention has them: all rollouts of a
  shard have so many, of which those of the slots are there at once.
  """
  (shards, K), Q = queues.task_ZK.shape, queues.local_ZQ.shape[1]
  mean = lambda total: fractions.Fraction(total, shards) if shards > 1 else total
  windows = sum(int(np.sum(-(-np.bincount(local_Q[:n]) // attention_ops.TOGETHER)))
                for local_Q, n in zip(queues.local_ZQ, queues.rollouts_Z))
  chunks = sum(-(-n // min(config.prefill, K)) for n in queues.tasks_Z.tolist()) if reads else 0
  return {PREFILL: mean(chunks), REFILL: mean(refills), DECODE: mean(steps),
          attention_ops.WINDOWS: fractions.Fraction(steps * min(config.slots, Q) * windows, shards ** 2 * Q)}


# The programs.


class _Prefixes(NamedTuple):
  """What was read of the prompts of a shard's K tasks."""

  logits_KV: Array  # float32, of the token after a prompt
  cache: tuple[decode_lib.Cache, ...]  # by stage


class _Decoding(NamedTuple):
  """The state of the decode loops."""

  own: tuple[tuple[decode_lib.Cache, ...], ...]
  logits_SV: Array  # of the token to sample next
  rollout_S: Array  # which rollout a slot decodes; Q: none, the slot is free
  count_S: Array  # completion tokens the slot's rollout has
  queued: Array  # first rollout that no slot has taken
  steps: Array
  tail_steps: Array
  refills: Array
  token_QC: Array
  logp_QC: Array
  length_Q: Array
  ended_Q: Array


# On a mesh: what each shard has of its own, what all have, and prefixes, whose caches have layers in front.
_MINE, _ALL = PartitionSpec(sharding.ROWS), PartitionSpec()
_HELD = _Prefixes(_MINE, PartitionSpec(None, sharding.ROWS))


def _on_shards(of_shard: Callable[..., Any], in_specs: Any, out_specs: Any, axes: Sequence[str] = sharding.ROWS
               ) -> Callable[..., Any]:
  """A function of one shard's arrays, on the arrays of all shards."""
  if sharding.row_shards() == 1:
    return of_shard
  return jax.shard_map(of_shard, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _decode(policy_config, params, prompts, queues, key, config, keeps=False) -> tuple[tuple[Array, ...], Any]:
  """token_ZQC, logp_ZQC, length_ZQ and ended_ZQ of all queues, each shard's on it, and counts_Z3; and the prefixes,
  if it keeps them."""
  def of_shard(params, prompts, queues, key):
    task_K, tasks = queues.task_ZK[0], queues.tasks_Z[0]
    prefixes = _prefill(policy_config, params, prompts.token_MP[task_K], prompts.length_M[task_K], tasks, config)
    decoded = _shard_rollouts(policy_config, config, params, prompts, queues, key, prefixes)
    return decoded, _divided(prefixes) if keeps else None

  return _on_shards(of_shard, (_ALL, _ALL, _MINE, _ALL), (_MINE, _HELD if keeps else None))(
      params, prompts, queues, key)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _decode_on(policy_config, params, prompts, queues, key, config, prefixes) -> tuple[Array, ...]:
  """What `_decode` returns first, of prompts that are read already."""
  of_shard = functools.partial(_shard_rollouts, policy_config, config)
  return _on_shards(of_shard, (_ALL, _ALL, _MINE, _ALL, _HELD), _MINE)(params, prompts, queues, key, prefixes)


@jax.jit
def _place(prefixes: _Prefixes, source_ZK: Array) -> _Prefixes:
  """The prefixes that stand in places source_ZK, counted over all shards.

  A device receives those of all shards for it, but of one layer at a time.
  """
  def of_shard(prefixes, source_ZK):
    def take(x_KX):
      if sharding.row_shards() > 1:
        x_KX = jax.lax.all_gather(x_KX, sharding.ROWS, tiled=True)
      return x_KX[source_ZK[0]]

    return _Prefixes(take(prefixes.logits_KV), jax.tree.map(lambda x_LKX: jax.lax.map(take, x_LKX), prefixes.cache))

  # Over 'model' too, as the partitioner would gather the heads that it divides.
  held = _HELD._replace(cache=PartitionSpec(*_HELD.cache, 'model'))
  return _on_shards(of_shard, (held, _MINE), held, axes=sharding.AXES)(prefixes, source_ZK)


def _divided(prefixes: _Prefixes) -> _Prefixes:
  """A shard's prefixes, whose heads 'model' divides."""
  return _Prefixes(sharding.replicate(prefixes.logits_KV), sharding.constrain(prefixes.cache, axes=('model',)))


@jax.jit
def _by_task(prompts, budget_M, queues, token_ZQC, logp_ZQC, length_ZQ, ended_ZQ, counts_Z3) -> types.Rollouts:
  """Rollouts in the order of their tasks: tokens divided by rows, the rest whole on every device."""
  M, (Z, Q) = len(budget_M), length_ZQ.shape
  R, end = Z * Q, jnp.sum(budget_M)
  task_R = jnp.repeat(jnp.arange(M), budget_M, total_repeat_length=R)  # beyond the end M - 1
  first_M = jnp.cumsum(budget_M) - budget_M
  task_ZQ = jnp.take_along_axis(queues.task_ZK, queues.local_ZQ, axis=1)
  queued_ZQ = jnp.arange(Q)[None] < queues.rollouts_Z[:, None]
  r_ZQ = jnp.where(queued_ZQ, first_M[task_ZQ] + queues.number_ZQ, R)
  place_R = jnp.zeros(R, int).at[r_ZQ.ravel()].set(jnp.arange(R), mode='drop')
  there_R = jnp.arange(R) < end

  def by_task(x_ZQ):
    x_R = sharding.replicate(x_ZQ.reshape(R, *x_ZQ.shape[2:]))[place_R]
    return jnp.where(jnp.expand_dims(there_R, range(1, x_R.ndim)), x_R, 0)

  token_RC, logp_RC = sharding.constrain_rows((by_task(token_ZQC), by_task(logp_ZQC)))
  steps, tail_steps, refills = jnp.sum(counts_Z3, axis=0)
  whole = sharding.replicate({
      'task_R': jnp.where(there_R, task_R, M), 'length_R': by_task(length_ZQ), 'ended_R': by_task(ended_ZQ),
      'decode_steps': steps, 'tail_steps': tail_steps, 'refills': refills})
  return types.Rollouts(types.Prompts(*map(jnp.asarray, prompts)), token_RC=token_RC, logp_RC=logp_RC, **whole)


def _shard_rollouts(policy_config, config, params, prompts, queues, key, prefixes) -> tuple[Array, ...]:
  """token, logp, length and ended of one shard's queue, and its counts, with an axis of 1 in front."""
  task_K, _, local_Q, number_Q, end = (x[0] for x in queues)
  (Q,), C = local_Q.shape, config.completion_length
  S = min(config.slots, Q)
  length_K = prompts.length_M[task_K]
  fold = jax.vmap(jax.random.fold_in)
  key_K = jax.vmap(lambda i: jax.random.fold_in(key, i))(prompts.index_M[task_K])
  key_Q = fold(key_K[local_Q], number_Q)

  def take(d: _Decoding) -> _Decoding:
    """Free slots take the next rollouts of the queue."""
    free_S = d.rollout_S == Q
    r_S = d.queued + jnp.cumsum(free_S) - 1
    take_S = free_S & (r_S < end)
    task_S = local_Q[jnp.minimum(r_S, Q - 1)]
    return d._replace(
        logits_SV=jnp.where(take_S[:, None], prompt_logits_KV[task_S], d.logits_SV),
        rollout_S=jnp.where(take_S, r_S, d.rollout_S),
        count_S=jnp.where(take_S, 0, d.count_S),
        queued=d.queued + jnp.sum(take_S),
        refills=d.refills + 1)

  def decode(d: _Decoding) -> _Decoding:
    """Every slot samples a token and reads it."""
    live_S = d.rollout_S < Q
    r_S = jnp.minimum(d.rollout_S, Q - 1)  # a free slot runs along; nothing it does is kept
    token_S, logp_S = draw.token(d.logits_SV, fold(key_Q[r_S], d.count_S), config)
    stop_S = functools.reduce(jnp.logical_or, [token_S == stop for stop in config.stop_ids])
    ended_S = jnp.where(stop_S, types.ENDED_STOP, jnp.where(
        d.count_S + 1 == C, types.ENDED_LENGTH, types.NOT_SAMPLED))
    # Row Q is out of bounds: what a free slot writes is dropped.
    write = lambda out, *where: out.at[d.rollout_S, *where]
    task_S = local_Q[r_S]
    slots = decode_lib.Slots(prompt_S=task_S, prompt_length_S=length_K[task_S],
                         count_S=jnp.where(live_S, d.count_S + 1, 0), step=d.steps)
    logits_SV, own = decode_lib.decode(policy_config, params, token_S, slots, prefixes.cache, d.own)
    return d._replace(
        own=own,
        logits_SV=sharding.replicate(logits_SV),
        rollout_S=jnp.where(ended_S == types.NOT_SAMPLED, d.rollout_S, Q),
        count_S=d.count_S + 1,
        steps=d.steps + 1,
        tail_steps=d.tail_steps + (2 * jnp.sum(live_S) < S),
        token_QC=write(d.token_QC, d.count_S).set(token_S, mode='drop'),
        logp_QC=write(d.logp_QC, d.count_S).set(logp_S, mode='drop'),
        length_Q=write(d.length_Q).set(d.count_S + 1, mode='drop'),
        ended_Q=write(d.ended_Q).set(ended_S, mode='drop'))

  def keep_decoding(d: _Decoding) -> Array:
    free = jnp.sum(d.rollout_S == Q)
    return (free < S) & ((free < config.refill) | (d.queued == end))

  # Whole over 'model': a draw from a divided vocabulary would send logits around, and a collective that all shards
  # of rollouts take part in would wait for ever, as each loops as often as its own queue asks.
  prompt_logits_KV = sharding.replicate(prefixes.logits_KV)
  d = _Decoding(
      own=decode_lib.empty(prefixes.cache, S, C),
      logits_SV=jnp.zeros((S, prompt_logits_KV.shape[1])),
      rollout_S=jnp.full(S, Q),
      count_S=jnp.zeros(S, int),
      queued=jnp.array(0), steps=jnp.array(0), tail_steps=jnp.array(0), refills=jnp.array(0),
      token_QC=jnp.full((Q, C), PAD),
      logp_QC=jnp.zeros((Q, C)),
      length_Q=jnp.zeros(Q, int),
      ended_Q=jnp.full(Q, types.NOT_SAMPLED))

  def refill(d: _Decoding) -> _Decoding:
    with jax.named_scope(DECODE):
      return jax.lax.while_loop(keep_decoding, decode, take(d))

  with jax.named_scope(REFILL):
    d = jax.lax.while_loop(lambda d: (d.queued < end) | jnp.any(d.rollout_S < Q), refill, d)
  counts_3 = jnp.stack([d.steps, d.tail_steps, d.refills])
  return tuple(x[None] for x in (d.token_QC, d.logp_QC, d.length_Q, d.ended_Q, counts_3))


def _prefill(policy_config, params, token_KP, length_K, tasks, config) -> _Prefixes:
  """Of the first `tasks` prompts, `config.prefill` at a time; K is made a multiple of that."""
  K, P = token_KP.shape
  B = min(config.prefill, K)
  chunks = math.ceil(K / B)
  more = chunks * B - K
  token_KP = jnp.pad(token_KP, ((0, more), (0, 0)), constant_values=PAD)
  length_K = jnp.pad(length_K, (0, more), constant_values=1)
  chunk = lambda x, i: jax.lax.dynamic_slice_in_dim(x, i * B, B)
  read = lambda i: decode_lib.prefill(policy_config, params, chunk(token_KP, i), chunk(length_K, i),
                                  int8=config.cache == 'int8')
  shapes = jax.eval_shape(read, jnp.array(0))
  axes = (0, jax.tree.map(lambda _: 1, shapes[1]))  # of prompts: caches have layers in front
  store = jax.tree.map(lambda x, axis: jnp.zeros(
      (*x.shape[:axis], chunks * B, *x.shape[axis + 1:]), x.dtype), shapes, axes)
  put = lambda i, store: jax.tree.map(
      lambda x, y, axis: jax.lax.dynamic_update_slice_in_dim(x, y, i * B, axis=axis), store, read(i), axes)
  with jax.named_scope(PREFILL):
    return _Prefixes(*jax.lax.fori_loop(0, -(-tasks // B), put, store))
