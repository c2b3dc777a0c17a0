"""What work costs: FLOPs of a policy by arithmetic, and what TPU chips do in a second for how much.

With n_l parameters of a layer's matrices that a token meets (of experts, those it is sent to), n_o of the output's, L
layers, A = N H and sequences of t tokens, of which the first p are shared:

    a token that is read      2 L n_l                  an output        2 n_o
    attention                 2 L A t^2 of t tokens    2 L A (t^2 - p^2) of the last t - p

A multiply-add is two FLOPs. A backward pass takes twice a forward pass; a product that is computed again is
executed (flops.py), not useful. Source of the terms: Bai et al. 2023, arXiv 2401.00625; Kaplan et al. 2020, arXiv
2001.08361, table 1. Differs: attention reads half of a causal square, and outputs are counted where they are
needed. Tokens that a window leaves out are counted too, adapters are not.
"""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import NamedTuple

from kr_jax.model import policy


class Chip(NamedTuple):
  """A device as JAX counts it; of v4, compiled for without one, that is one of a chip's two cores."""

  flops: float  # a second, bfloat16
  hbm_bytes: int  # that programs may use: the TPU compiler's own limit
  hbm_bytes_per_s: float
  ici_bytes_per_s: float  # that it sends, over all its links together
  dollars_per_hour: float  # on demand, list price of February 2025


_GIB = 2 ** 30
CHIPS = {
    'v4': Chip(137.5e12, int(15.25 * _GIB), 600e9, 135e9, 1.61),
    'v5e': Chip(197e12, int(15.75 * _GIB), 819e9, 200e9, 1.20),
    'v5p': Chip(459e12, int(95.74 * _GIB), 2765e9, 600e9, 4.20),
    'v6e': Chip(918e12, int(31.25 * _GIB), 1638e9, 400e9, 2.70)}


def chip(topology: str) -> Chip:
  """Of a slice, 'v5e:4x4'. Raises ValueError for one there are no figures of."""
  name = topology.partition(':')[0]
  if name not in CHIPS:
    raise ValueError(f'there are no figures of the chip {name!r} of {topology!r}; there are of '
                     f'{tuple(CHIPS)}')
  return CHIPS[name]


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


def forward_flops(c: policy.Config, own: float, shared: float = 0, outputs: float | None = None) -> float:
  """Of a forward pass over `own` tokens that follow `shared` ones, with so many outputs (None: of all own)."""
  attention = 2 * c.num_layers * c.num_heads * c.head_width * ((shared + own) ** 2 - shared ** 2)
  outputs = own if outputs is None else outputs
  return 2 * c.num_layers * active_weights(c) * own + attention + 2 * c.width * c.vocab_size * outputs


def sample_flops(c: policy.Config, *, tasks: float, rollouts: float, prompt: float, completion: float
                 ) -> float:
  """Of prompts that are read once a task, and of completions: attention of each reads its prompt."""
  return (tasks * forward_flops(c, prompt, outputs=1)
          + rollouts * forward_flops(c, completion, shared=prompt))


def score_flops(c: policy.Config, *, tasks: float, rollouts: float, prompt: float, completion: float
                ) -> float:
  """Of a forward pass over completions, whose prompts are read once a task. An update of all parameters takes three
  times as many."""
  return (tasks * forward_flops(c, prompt, outputs=0)
          + rollouts * forward_flops(c, completion, shared=prompt))


def column_bytes(c: policy.Config, cache: str = '') -> int:
  """Of a token's keys and values of all layers."""
  value = 1 if cache == 'int8' else 2 if c.dtype == 'bfloat16' else 4
  return 2 * c.num_layers * c.num_kv_heads * (c.head_width * value + 4 * (cache == 'int8'))


def kernel_flops(name: str | None, operands: Sequence[tuple[int, ...]], results: Sequence[tuple[int, ...]]) -> float:
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
    return 0.0
  raise ValueError(f'FLOPs of the kernel {name!r} are not known; add them to resources.kernel_flops')


def decode_attention_flops(c: policy.Config, *, rollouts: float, prompt: float, completion: float) -> float:
  """Of the attention of completions that are decoded."""
  return rollouts * 2 * c.num_layers * c.num_heads * c.head_width * (
      (prompt + completion) ** 2 - prompt ** 2)
