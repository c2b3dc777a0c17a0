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

The key of a token is folded from (step, task, number of the rollout in its group, position). So a
rollout's tokens depend on nothing else: not on S, its slot, its shard, its neighbours or the budgets.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from kr_jax import knobs
from kr_jax import processes
from kr_jax import sharding
from kr_jax import types
from kr_jax.model import decode as decode_lib
from kr_jax.model import policy
from kr_jax.types import PAD, Array

# Names of the loops that end when their work is done, for whoever counts what they do (preflight.py).
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


# Which shard samples which rollouts.


class Queues(NamedTuple):
  """The rollouts of each of Z shards, in the order they are taken."""

  task_ZK: np.ndarray  # int32, the tasks whose prefix the shard holds; beyond its own: any
  tasks_Z: np.ndarray  # int32, how many
  local_ZQ: np.ndarray  # int32, of each rollout the task, in 0..K-1
  number_ZQ: np.ndarray  # int32, which of its task's rollouts it is
  rollouts_Z: np.ndarray  # int32, how many


def assign_to_queues(budget_M: np.ndarray, *, total: int, shards: int = 1, expected_M: np.ndarray | None = None
                     ) -> Queues:
  """Gives each shard an equal number of rollouts, to within one, of ceil(M / shards) + 1 tasks at most.

  Shards take their rollouts one after the other. Of n pieces of tasks that are left for Z shards, a shard takes
  ceil(n / Z) that are neighbours by size, the smallest neighbours that hold its share or more, and gives back the
  excess of the largest, which is less than all of it. So each shard adds at most one piece, and ceil(n / Z) stays
  within the limit.

  Args:
    budget_M: >= 0.
    total: R, which gives the shapes; the budgets sum to at most that.
    expected_M: tokens that a rollout of a task is expected to have: the longest are queued first.
  """
  budget_M = np.asarray(budget_M)
  M, n = len(budget_M), int(budget_M.sum())
  K = M if shards == 1 else min(M, math.ceil(M / shards) + 1)
  Q = math.ceil(total / shards)
  queues = Queues(*(np.zeros(shape, np.int32) for shape in ((shards, K), shards, (shards, Q), (shards, Q), shards)))
  left = [(int(b), m, 0) for m, b in enumerate(budget_M) if b > 0]  # size, task, first number
  for z in range(shards):
    share = n // shards + (1 if z < n % shards else 0)
    mine, left = _take(sorted(left), share, most=math.ceil(len(left) / (shards - z)))
    task_K = [m for _, m, _ in mine]
    local_Q = np.repeat(np.arange(len(mine)), [size for size, _, _ in mine])
    number_Q = np.concatenate([first + np.arange(size) for size, _, first in mine] or [[]])
    if expected_M is not None:
      order_Q = np.argsort(-np.asarray(expected_M)[task_K][local_Q], kind='stable')
      local_Q, number_Q = local_Q[order_Q], number_Q[order_Q]
    queues.task_ZK[z, :len(mine)], queues.tasks_Z[z] = task_K, len(mine)
    queues.local_ZQ[z, :share], queues.number_ZQ[z, :share] = local_Q, number_Q
    queues.rollouts_Z[z] = share
  return queues


def _take(pieces: list[tuple[int, int, int]], share: int, most: int) -> tuple[list, list]:
  """Of pieces by size, at most so many that hold `share` rollouts; and the pieces that are left."""
  if not share:
    return [], pieces
  size = np.cumsum([0] + [piece[0] for piece in pieces])
  first = int(np.argmax(size[most:] - size[:-most] >= share))
  mine, left = pieces[first:first + most], pieces[:first] + pieces[first + most:]
  excess = sum(piece[0] for piece in mine) - share
  while excess >= mine[-1][0]:  # even the smallest are too many
    left.append(mine.pop(0))
    excess -= left[-1][0]
  if excess:
    n, m, number = mine.pop()
    mine.append((n - excess, m, number))
    left.append((excess, m, number + n - excess))
  return sorted(mine, key=lambda piece: piece[1:]), left


# The program.


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


def rollouts(policy_config: policy.Config, params: Any, prompts: types.Prompts, budget_M: np.ndarray,
             key: Array, config: Config, *, total: int, expected_M: np.ndarray | None = None
             ) -> types.Rollouts:
  """Samples budget_M[m] completions of task m.

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
  budget_M = np.asarray(budget_M, np.int32)
  if budget_M.min() < 0 or budget_M.sum() > total:
    raise ValueError(f'budgets {budget_M.tolist()} must be >= 0 and sum to at most {total}')
  queues = assign_to_queues(budget_M, total=total, shards=sharding.row_shards(), expected_M=expected_M)
  decoded = _decode(policy_config, params, prompts, queues, key, config)
  return _by_task(prompts, budget_M, queues, *decoded)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _decode(policy_config, params, prompts, queues, key, config) -> tuple[Array, ...]:
  """token_ZQC, logp_ZQC, length_ZQ and ended_ZQ of all queues, each shard's on it, and counts_Z3."""
  of_shard = functools.partial(_shard_rollouts, policy_config, config)
  if sharding.row_shards() > 1:
    mine, all_ = PartitionSpec(sharding.ROWS), PartitionSpec()
    of_shard = jax.shard_map(of_shard, in_specs=(all_, all_, mine, all_), out_specs=mine,
                             axis_names=set(sharding.ROWS), check_vma=False)
  return of_shard(params, prompts, queues, key)


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


def _shard_rollouts(policy_config, config, params, prompts, queues, key) -> tuple[Array, ...]:
  """token, logp, length and ended of one shard's queue, and its counts, with an axis of 1 in front."""
  task_K, tasks, local_Q, number_Q, end = (x[0] for x in queues)
  (Q,), C = local_Q.shape, config.completion_length
  S = min(config.slots, Q)
  length_K = prompts.length_M[task_K]
  fold = jax.vmap(jax.random.fold_in)
  key_K = jax.vmap(lambda i: jax.random.fold_in(key, i))(prompts.index_M[task_K])
  key_Q = fold(key_K[local_Q], number_Q)
  prompt_logits_KV, prefix = _prefill(policy_config, params, prompts.token_MP[task_K], length_K, tasks, config)

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
    token_S, logp_S = _token(d.logits_SV, fold(key_Q[r_S], d.count_S), config)
    stop_S = functools.reduce(jnp.logical_or, [token_S == stop for stop in config.stop_ids])
    ended_S = jnp.where(stop_S, types.ENDED_STOP, jnp.where(
        d.count_S + 1 == C, types.ENDED_LENGTH, types.NOT_SAMPLED))
    # Row Q is out of bounds: what a free slot writes is dropped.
    write = lambda out, *where: out.at[d.rollout_S, *where]
    task_S = local_Q[r_S]
    slots = decode_lib.Slots(prompt_S=task_S, prompt_length_S=length_K[task_S],
                         count_S=jnp.where(live_S, d.count_S + 1, 0), step=d.steps)
    logits_SV, own = decode_lib.decode(policy_config, params, token_S, slots, prefix, d.own)
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
  prompt_logits_KV = sharding.replicate(prompt_logits_KV)
  d = _Decoding(
      own=decode_lib.empty(prefix, S, C),
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


def _prefill(policy_config, params, token_KP, length_K, tasks, config) -> tuple[Array, Any]:
  """Of the first `tasks` prompts the logits after them and the cache, `config.prefill` at a time."""
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
    return jax.lax.fori_loop(0, -(-tasks // B), put, store)


def _token(logits_SV: Array, key_S: Array, config: Config) -> tuple[Array, Array]:
  """A token of each slot, and the policy's log-probability of it."""
  if config.temperature == 0:
    token_S = jnp.argmax(logits_SV, axis=-1)
  else:
    logits_SV = logits_SV / config.temperature
    token_S = _draw(truncate(logits_SV, config), key_S)
  logp_S = jnp.take_along_axis(jax.nn.log_softmax(logits_SV), token_S[:, None], axis=-1)[:, 0]
  return token_S, logp_S


def _draw(logits_SV: Array, key_S: Array) -> Array:
  """A token of each softmax: one number decides on a block of the vocabulary, another on the token in it.

  Gumbel noise for each token of the vocabulary would take longer than the policy's last layer: of 1024 tokens and
  128 slots 3 ms on two CPU cores, and this .2.
  """
  S, V = logits_SV.shape
  width = max(w for w in (2**i for i in range(10)) if w == 1 or w * w <= V and V % w == 0)  # of a block
  mass_SXW = jnp.exp(logits_SV - logits_SV.max(axis=-1, keepdims=True)).reshape(S, -1, width)
  uniform_S2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(key_S)
  block_S = _invert(mass_SXW.sum(axis=2), uniform_S2[:, 0])
  mass_SW = jnp.take_along_axis(mass_SXW, block_S[:, None, None], axis=1)[:, 0]
  return block_S * width + _invert(mass_SW, uniform_S2[:, 1])


def _invert(mass_SX: Array, uniform_S: Array) -> Array:
  """The first x with mass up to which there is more than this share of all; if rounding leaves none, the
  last with mass."""
  sum_SX = jnp.cumsum(mass_SX, axis=-1)
  beyond_SX = sum_SX > (uniform_S * sum_SX[:, -1])[:, None]
  X = mass_SX.shape[1]
  place_X = jnp.arange(X)[None]
  order_SX = jnp.where(mass_SX > 0, jnp.where(beyond_SX, 2 * X - place_X, place_X), -1)
  return jnp.argmax(order_SX, axis=-1)


def truncate(logits_SV: Array, config: Config) -> Array:
  """Logits that are -inf where top_k, top_p or min_p leave a token out; the likeliest always stays.

  Each reads the policy's own probabilities at the temperature. Tokens as likely as the last that stays
  stay too. Sources: Holtzman et al. 2019, arXiv 1904.09751 (top-p); Nguyen et al. 2024, arXiv
  2407.01082 (min-p).
  """
  V = logits_SV.shape[-1]
  least_S = jnp.full(len(logits_SV), -jnp.inf)
  if config.min_p:
    least_S = jnp.maximum(least_S, logits_SV.max(axis=-1) + jnp.log(config.min_p))
  if config.top_p < 1:
    sorted_SV = -jnp.sort(-logits_SV, axis=-1)
    before_SV = jnp.cumsum(jax.nn.softmax(sorted_SV), axis=-1) - jax.nn.softmax(sorted_SV)
    last_S = jnp.sum(before_SV < config.top_p, axis=-1) - 1
    least_S = jnp.maximum(least_S, jnp.take_along_axis(sorted_SV, last_S[:, None], axis=-1)[:, 0])
  if 0 < config.top_k < V:
    least_S = jnp.maximum(least_S, jax.lax.top_k(logits_SV, config.top_k)[0][:, -1])
  return jnp.where(logits_SV >= least_S[:, None], logits_SV, -jnp.inf)


# What is done on the host.


def texts(rollouts: types.Rollouts, decode: Callable[[np.ndarray], str]) -> tuple[np.ndarray, Iterator[str]]:
  """The rollouts that are this process's to read: row_X, those with a completion, and their texts.

  A text is decoded when it is taken, so that the first can be verified while the others are decoded.
  decode: tokens -> text.
  """
  row_X, token_XC = processes.own_rows(rollouts.token_RC)
  length_X = np.asarray(rollouts.length_R)[row_X]
  there_X = length_X > 0
  return row_X[there_X], (decode(token_C[:n]) for token_C, n in zip(token_XC[there_X], length_X[there_X]))


def apply_stop_strings(rollouts: types.Rollouts, decode: Callable[[np.ndarray], str], config: Config) -> types.Rollouts:
  """Ends each completion with the first token that completes one of `stop_strings`.

  Device programs see tokens alone, so a completion is cut once it is there, by the process that reads it.
  What stays has the tokens and log-probabilities that it had. decode: tokens -> text; of more tokens it
  begins with that of fewer.
  """
  if not config.stop_strings:
    return rollouts
  row_X, token_XC = processes.own_rows(rollouts.token_RC)
  length_X = np.asarray(rollouts.length_R)[row_X]
  short_X, cut_X = length_X.copy(), np.zeros(len(length_X), bool)
  for x, length in enumerate(length_X):
    stops = lambda n: any(stop in decode(token_XC[x, :n]) for stop in config.stop_strings)
    if length and stops(length):
      short_X[x], cut_X[x] = bisect.bisect_left(range(length), True, lo=1, key=stops), True
  short_R, cut_R = (processes.merge_rows(row_X, x, len(rollouts.length_R)) for x in (short_X, cut_X))
  return _shorten(rollouts, short_R, cut_R)


@jax.jit
def _shorten(rollouts: types.Rollouts, length_R: Array, cut_R: Array) -> types.Rollouts:
  there_RC = jnp.arange(rollouts.token_RC.shape[1])[None] < length_R[:, None]
  return rollouts._replace(
      token_RC=jnp.where(there_RC, rollouts.token_RC, PAD), logp_RC=jnp.where(there_RC, rollouts.logp_RC, 0),
      length_R=length_R, ended_R=jnp.where(cut_R, types.ENDED_STOP, rollouts.ended_R))


def keep(rollouts: types.Rollouts, keep_R: np.ndarray) -> types.Rollouts:
  """The rollouts of keep_R, bool; the others are no rollouts: their task is M and their length 0.

  Shapes and partitions stay, and one program serves every keep_R.
  """
  task_R, length_R, ended_R = _keep(
      rollouts.task_R, rollouts.length_R, rollouts.ended_R, keep_R, len(rollouts.prompts.length_M))
  return rollouts._replace(task_R=task_R, length_R=length_R, ended_R=ended_R)


@functools.partial(jax.jit, static_argnums=4)
def _keep(task_R: Array, length_R: Array, ended_R: Array, keep_R: Array, num_tasks: int) -> tuple[Array, ...]:
  return sharding.replicate((
      jnp.where(keep_R, task_R, num_tasks), jnp.where(keep_R, length_R, 0),
      jnp.where(keep_R, ended_R, types.NOT_SAMPLED)))
