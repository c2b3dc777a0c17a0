"""What work costs: FLOPs and bytes of a policy by arithmetic.

With n_l parameters of a layer's matrices that a token meets (of experts, those it is sent to), a_l of its adapters',
n_o of the output's, L layers, A = N H and sequences of t tokens, of which the first p are shared:

    a token that is read      2 L (n_l + a_l)          an output        2 n_o
    attention                 2 L A t^2 of t tokens    2 L A (t^2 - p^2) of the last t - p

A multiply-add is two FLOPs. Of each product a backward pass takes one more for the gradient to its input, and one for
the gradient to its matrix where the matrix is trained: with adapters these alone are. These FLOPs are useful. They are
exact integers of lengths, and depend neither on packing nor on slots. A product that is computed again, and products
of padding, of free slots and of the masked half of a square are executed (flops.py), not useful. The other way round, a
sampler leaves out what nothing reads of its last layer, so that a prefill may execute less than is useful.

Source of the terms: Bai et al. 2023, arXiv 2401.00625; Kaplan et al. 2020, arXiv 2001.08361, table 1. Differs:
attention reads half of a causal square, and outputs are counted where they are needed. Tokens that a window leaves out
are counted too.
"""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np

from kr_jax.model import policy
from kr_jax.types import Array


def layer_weights(c: policy.Config) -> int:
  """Parameters of the matrices of a layer."""
  return _layer_weights(c, c.num_experts or 1)


def active_weights(c: policy.Config) -> int:
  """n_l: those that a token meets."""
  return _layer_weights(c, c.experts_per_token if c.num_experts else 1)


def _layer_weights(c: policy.Config, mlps: int) -> int:
  return c.width * (2 * (c.num_heads + c.num_kv_heads) * c.head_width + 3 * mlps * c.hidden_width + c.num_experts)


def touched_experts(c: policy.Config, tokens: float) -> float:
  """Share of the experts of a layer to which so many tokens are sent, if all experts are equally likely."""
  return 1 - (1 - c.experts_per_token / c.num_experts) ** tokens


def adapter_weights(c: policy.Config) -> int:
  """a_l: parameters of the adapters of a layer; experts have none."""
  heads, kv_heads = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
  of_mlp = 0 if c.num_experts else 3 * (c.width + c.hidden_width)
  return c.lora_rank * (2 * (c.width + heads) + 2 * (c.width + kv_heads) + of_mlp)


class Lengths(NamedTuple):
  """Tokens of prompts and completions: all that useful FLOPs depend on."""

  read_M: Array  # int, of each prompt that is read
  prompt_R: Array  # int, of each rollout's prompt
  completion_R: Array  # int


def lengths(length_M: Array, task_R: Array, length_R: Array, *, reads: bool = True) -> Lengths:
  """Of the rollouts of a step; rows of length 0 are no rollouts.

  Args:
    length_M: of the prompts of M tasks.
    reads: whether the prompts of tasks with rollouts are read, each once.
  """
  length_M, task_R, length_R = (np.asarray(x, np.int64) for x in (length_M, task_R, length_R))
  task_R, length_R = task_R[length_R > 0], length_R[length_R > 0]
  return Lengths(length_M[np.unique(task_R)] if reads else length_M[:0], length_M[task_R], length_R)


def equal_lengths(*, tasks: int, rollouts: int, prompt: int, completion: int) -> Lengths:
  """Of so many prompts that are read and so many rollouts, if all are as long."""
  return Lengths(np.full(tasks, prompt), np.full(rollouts, prompt), np.full(rollouts, completion))


def _exact(x: Array) -> np.ndarray:
  x = np.asarray(x)
  return x.astype(np.int64 if x.dtype.kind in 'iu' else float, copy=False)


def _total(x: Array) -> int | float:
  return _exact(x).sum().item()


def _attention_flops(c: policy.Config, own: Array, shared: Array) -> int | float:
  own, shared = _exact(own), _exact(shared)
  return 2 * c.num_layers * c.num_heads * c.head_width * _total(own * (own + 2 * shared))


def forward_flops(c: policy.Config, own: Array, shared: Array = 0, outputs: int | float | None = None) -> int | float:
  """Of a forward pass over `own` tokens that follow `shared` ones, with so many outputs (None: of all own).

  own and shared are of one sequence, or arrays with a number of each sequence; outputs are of all together.
  """
  tokens = _total(own)
  outputs = tokens if outputs is None else outputs
  return (2 * c.num_layers * (active_weights(c) + adapter_weights(c)) * tokens + _attention_flops(c, own, shared)
          + 2 * c.width * c.vocab_size * outputs)


def sample_flops(c: policy.Config, of: Lengths) -> int:
  """Of prompts that are read once a task, and of completions: attention of each reads its prompt."""
  return (forward_flops(c, of.read_M, outputs=len(of.read_M))
          + forward_flops(c, of.completion_R, shared=of.prompt_R))


def score_flops(c: policy.Config, of: Lengths) -> int:
  """Of a forward pass over completions, whose prompts are read once a task.

  A completion's tokens are predicted from its prompt's last token and from the tokens of the completion but the last.
  """
  return _score_flops(c, *_scored(c, of))


def _scored(c: policy.Config, of: Lengths) -> tuple[int, int, int]:
  """Tokens that are read, tokens that are predicted, and FLOPs of attention."""
  read_M, completions = _shared(of.read_M), _total(of.completion_R)
  attention = _attention_flops(c, read_M, 0) + _attention_flops(c, of.completion_R, _shared(of.prompt_R))
  return _total(read_M) + completions, completions, attention


def _score_flops(c: policy.Config, tokens: int, completions: int, attention: int) -> int:
  return (2 * c.num_layers * (active_weights(c) + adapter_weights(c)) * tokens + attention
          + 2 * c.width * c.vocab_size * completions)


def update_flops(c: policy.Config, of: Lengths) -> int:
  """Of a forward and a backward pass. With adapters (c.lora_rank) these alone have gradients."""
  tokens, completions, attention = _scored(c, of)
  if c.lora_rank:
    of_matrices = 2 * c.num_layers * adapter_weights(c) * tokens
  else:
    of_matrices = 2 * c.num_layers * active_weights(c) * tokens + 2 * c.width * c.vocab_size * completions
  # Both factors of a product of attention are computed from what is trained.
  return 2 * _score_flops(c, tokens, completions, attention) + of_matrices + attention


def _shared(prompt: Array) -> Array:
  """The prompt's last token is not shared: it predicts the completion's first token, which differs by rollout."""
  return np.maximum(np.asarray(prompt) - 1, 0)


def column_bytes(c: policy.Config, cache: str = '') -> int:
  """Of a token's keys and values of all layers."""
  value = 1 if cache == 'int8' else 2 if c.dtype == 'bfloat16' else 4
  return 2 * c.num_layers * c.num_kv_heads * (c.head_width * value + 4 * (cache == 'int8'))


def kernel_flops(name: str | None, operands: Sequence[tuple[int, ...]], results: Sequence[tuple[int, ...]]) -> int:
  """FLOPs of one run of a Pallas kernel, of the attention or the experts of an update or of this project, by the
  shapes of its operands and results.

  Those of the decoding kernel depend on how much of its cache lives: 0 here, and `decode_attention_flops` by the
  lengths that are assumed.

  Raises ValueError for a kernel that is not known.
  """
  if name is None:  # megablox's have none: rows by the matrix of their group, and groups' sums of rows' outer products
    return 2 * math.prod(operands[-2]) * results[0][-1]
  for kind, products in (('fwd', 2), ('dq', 3), ('dkv', 4)):
    if name.startswith(f'splash_mha_{kind}_'):
      *rows, heads, T, width = operands[2]
      # Blocks up to the diagonal: those that a local layer's window leaves out too are counted.
      return products * math.prod(rows) * heads * width * T * (T + results[0][-2])
  if name == 'token_logprob_forward':
    (T, D), (_, V) = operands[:2]
    return 2 * T * D * V
  if name == 'token_logprob_backward':
    (T, D), (_, V) = operands[1:3]
    return 6 * T * D * V
  if name == 'decode_attention':
    return 0
  raise ValueError(f'FLOPs of the kernel {name!r} are not known; add them to arithmetic.kernel_flops')


def decode_attention_flops(c: policy.Config, of: Lengths) -> int:
  """Of the attention of completions that are decoded."""
  return _attention_flops(c, of.completion_R, of.prompt_R)


def decode_bytes(c: policy.Config, of: Lengths, *, steps: int, slots: float, cache: str = '') -> int:
  """That decoding reads from memory at the least, on all devices of a copy of the weights together.

  Each step reads the weights, but those of experts without a token; each token reads the keys and values of its prompt
  and of its completion so far.

  Args:
    steps: of the decode loops, of all copies.
    slots: tokens of a step.
    cache: sample.cache.
  """
  layer = layer_weights(c)
  if c.num_experts:
    layer -= (1 - touched_experts(c, slots)) * 3 * c.num_experts * c.width * c.hidden_width
  weights = (2 if c.dtype == 'bfloat16' else 4) * (c.num_layers * layer + c.width * c.vocab_size)
  completion_R = _exact(of.completion_R)
  columns = _total(completion_R * _exact(of.prompt_R)) + _total(completion_R * (completion_R + 1)) // 2
  return round(steps * weights) + columns * column_bytes(c, cache)
