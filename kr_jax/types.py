"""The shape letters and the records that flow through the loop.

Arrays are named by shape, one letter an axis, as a suffix:

    M tasks in a step   R rollouts in a step   J candidate budgets   U units of capacity
    I tasks in a split  P prompt tokens        C completion tokens   T = P + C, or of a packed row
    B rows of a batch   L layers               D model               F feed-forward
    N query heads       K key/value heads      H head width          V vocabulary
    S cache slots, or places of a row          G rows that attention alone reads
    Z shards, with K tasks and Q rollouts of its own each
    W rollouts of a window                     A rank of an adapter  E experts
    X experts of a token                       Y pairs of a token and an expert, sorted

Imports nothing heavy: reward workers load this module at every start.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy or jax

PAD = 0  # stands behind the end of every row of tokens; nothing reads it

# Why a rollout ended (Rollouts.ended_R).
NOT_SAMPLED, ENDED_STOP, ENDED_LENGTH = 0, 1, 2


class Task(NamedTuple):
  """A prompt with a checkable answer."""

  id: str  # stable over runs, machines and versions of the data
  index: int  # row of its split, in 0..I-1
  prompt: str
  answer: str
  difficulty: int
  solution: str  # a worked completion, for supervised fine-tuning; '' where there is none
  tokens: tuple[int, ...]  # the prompt's tokens
  source: str = ''  # the dataset it is from
  verifier: str = ''  # in rewards.VERIFIERS, or 'module:function'; '': the config's
  info: str = ''  # JSON that its verifier needs in addition to the answer; '': nothing


class Prompts(NamedTuple):
  """The prompts of M tasks, as the sampler and the loss read them."""

  token_MP: Array  # int32, padded on the right
  length_M: Array  # int32, 1..P
  index_M: Array  # int32, each task's row of its split


class Rollouts(NamedTuple):
  """R completions of M tasks: one step's experience."""

  prompts: Prompts
  task_R: Array  # int32, which task, in 0..M-1, those of a task side by side; M where there is no rollout
  token_RC: Array  # int32, padded on the right; the stop token is part of it
  logp_RC: Array  # float32, log-probability of each token when it was sampled
  length_R: Array  # int32, 1..C: completion tokens, the stop token counted; 0: no rollout
  ended_R: Array  # int32: ENDED_STOP, ENDED_LENGTH or NOT_SAMPLED
  decode_steps: Array  # int32 scalar: iterations of the decode loops, of all shards
  tail_steps: Array = np.int32(0)  # those with fewer than half of the slots live
  refills: Array = np.int32(0)  # times that free slots took rollouts of the queue
  wave_R: Array | None = None  # int32, the wave of the step that a row is of, rollout or not; None: there is one


class Rows(NamedTuple):
  """Rows of whole sequences for attention, G of S places, of tokens that are computed elsewhere.

  Tokens and rows are in B shards, a shard's rows side by side. What sequences of a shard have in common
  is computed once and stands in several places.
  """

  segment_GS: Array  # int32, the sequence that a place belongs to; -1 is padding
  source_GS: Array  # int32, which of its shard's tokens stands there
  place_BT: Array  # int32, one of the places in its shard's rows at which a token stands


class TaskStats(NamedTuple):
  """What is known of every task of the training split, from verified rollouts alone.

  Axes of outcomes, O = 2, hold wrong rollouts first, then right ones.
  """

  successes_I: np.ndarray  # float64, discounted count of right rollouts
  failures_I: np.ndarray  # float64, discounted count of wrong ones
  tokens_OI: np.ndarray  # float64, discounted count of completion tokens, by outcome
  visits_I: np.ndarray  # float64, discounted count of steps with a rollout of the task
  rates_I: np.ndarray  # float64, discounted sum over these steps of the share of right rollouts
  rollouts_I: np.ndarray  # int64, verified rollouts ever seen
  recent_IW: np.ndarray  # int8, the last 16 verdicts, the newest last; -1 where there were fewer
  window_rate_I: np.ndarray  # float64, the paper's estimate after the task's last group
  stratum_I: np.ndarray  # int32, the tasks that share a prior
  known_OI: np.ndarray  # float64, rollouts by outcome that rates known before training are worth
  forecast_H4: np.ndarray  # float64, the last H groups: log-odds and concentration forecast, right and all rollouts
  calibration: np.ndarray  # float64 [4]: a, b, s, c of allocation/recalibrate.py
  reward_O2: np.ndarray  # float64, discounted sum of rewards and count of rollouts, by outcome
  gradient: np.ndarray  # float64 [4], discounted sums: signal, its scale, noise, its scale


class TrainState(NamedTuple):
  """What a training step changes on the device, and the key all its randomness comes from."""

  step: Array  # int32 scalar: batches learnt from
  params: Any  # those that are trained: all, or the adapters
  opt_state: Any
  key: Array  # typed PRNG key of the run; never advanced, only folded
