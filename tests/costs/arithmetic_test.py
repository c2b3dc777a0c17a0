"""FLOPs by arithmetic, against hand and against products counted one by one."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from kr_jax.model import decode
from kr_jax.model import policy
from kr_jax.costs import flops
from kr_jax.costs import arithmetic

TINY = policy.Config(
    vocab_size=11, num_layers=3, width=4, num_heads=4, num_kv_heads=2, head_width=2, hidden_width=5,
    rope_theta=1e4, norm_eps=1e-6, qk_norm=False, qkv_bias=False, tie_embeddings=False,
    dtype='float32', remat='none', lora_rank=0, lora_alpha=1.0)
WIDE = dataclasses.replace(
    TINY, num_layers=2, width=24, num_heads=3, num_kv_heads=1, head_width=10, hidden_width=7,
    qk_norm=True, qkv_bias=True, tie_embeddings=True)


def abstract_params(c):
  return jax.eval_shape(lambda key: policy.init(c, key), jax.random.key(0))


# By hand: q and o have 4 x 8 elements, k and v 4 x 4, each of the MLP's three 4 x 5. So of TINY a token
# read takes 2 x 3 x 156 = 936, an output 2 x 4 x 11 = 88, attention 2 x 3 x 8 = 48 of each t^2 - p^2.


def test_weights_of_a_layer_by_hand():
  assert arithmetic.layer_weights(TINY) == 2 * 32 + 2 * 16 + 3 * 20 == 156


EXPERTS = TINY.replace(num_experts=4, experts_per_token=2)


def test_weights_of_experts_by_hand():
  """Four MLPs of three 4 x 5 and a router of 4 x 4, of which a token meets two, and the router."""
  assert arithmetic.layer_weights(EXPERTS) == 96 + 4 * 60 + 16
  assert arithmetic.active_weights(EXPERTS) == 96 + 2 * 60 + 16 == 232
  assert arithmetic.forward_flops(EXPERTS, 5) == 5 * 2 * 3 * 232 + 25 * 48 + 5 * 88
  assert arithmetic.active_weights(TINY) == arithmetic.layer_weights(TINY)


@pytest.mark.parametrize('tokens, share', [(0, 0), (1, 1 / 2), (2, 3 / 4), (1000, 1)])
def test_experts_that_tokens_touch(tokens, share):
  assert arithmetic.touched_experts(EXPERTS, tokens) == pytest.approx(share)


@pytest.mark.parametrize('own, shared, outputs, flops', [
    (5, 0, None, 5 * 936 + 25 * 48 + 5 * 88), (5, 0, 0, 5880), (5, 0, 1, 5968), (5, 0, 5, 6320),
    (5, 10, None, 5 * 936 + (225 - 100) * 48 + 5 * 88), (5, 10, 0, 10680), (5, 10, 1, 10768),
    (0, 10, None, 0), (0.5, 0, None, 468 + 12 + 44)])
def test_a_forward_pass_by_hand(own, shared, outputs, flops):
  assert arithmetic.forward_flops(TINY, own, shared=shared, outputs=outputs) == flops


def test_a_step_by_hand():
  """Of 6 completions of 5 tokens, of 2 prompts of 10: 9360 + 4800 a prompt, 11120 a completion."""
  lengths = dict(rollouts=6, prompt=10, completion=5)
  assert arithmetic.sample_flops(TINY, tasks=2, **lengths) == 2 * (14160 + 88) + 6 * 11120 == 95216
  assert arithmetic.score_flops(TINY, tasks=2, **lengths) == 2 * 14160 + 6 * 11120 == 95040
  assert arithmetic.decode_attention_flops(TINY, **lengths) == 6 * 125 * 48 == 36000


@pytest.mark.parametrize('dtype, cache, size', [
    ('float32', '', 96), ('bfloat16', '', 48), ('float32', 'int8', 72), ('bfloat16', 'int8', 72)])
def test_a_column_is_as_large_as_that_of_a_cache(dtype, cache, size):
  """Of 3 layers keys and values of 2 heads, each of 2 numbers, and in int8 of a scale."""
  c = dataclasses.replace(TINY, dtype=dtype)
  assert arithmetic.column_bytes(c, cache) == size
  B, P = 2, 16
  _, caches = jax.eval_shape(
      lambda params: decode.prefill(c, decode.sampling_params(c, params), np.zeros((B, P), np.int32),
                                    np.ones(B, np.int32), int8=cache == 'int8'), abstract_params(c))
  assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches)) == B * P * size


@pytest.mark.parametrize('c', [TINY, WIDE, EXPERTS], ids=['tiny', 'wide', 'experts'])
def test_weights_are_the_parameters_of_matrices(c):
  layers = abstract_params(c)['layers']
  sizes = {name: x.size for name, x in layers.items() if 'norm' not in name and 'bias' not in name}
  assert len(sizes) == 7 + bool(c.num_experts) and sum(sizes.values()) == c.num_layers * arithmetic.layer_weights(c)


@pytest.mark.parametrize('c', [TINY, WIDE], ids=['tiny', 'wide'])
@pytest.mark.parametrize('B, T', [(1, 1), (3, 6), (1, 17)])
def test_products_of_the_policy_are_those_of_the_closed_form(c, B, T):
  """On a CPU attention reads the whole square, of which half counts."""
  jaxpr = jax.make_jaxpr(lambda params, x: policy.logits(c, params, x))(
      abstract_params(c), np.zeros((B, T), np.int32))
  half = 2 * c.num_layers * c.num_heads * c.head_width * B * T ** 2
  assert flops.count(jaxpr.jaxpr, {}) - half == B * arithmetic.forward_flops(c, T)


@pytest.mark.parametrize('p, own', [(0, 7), (1, 1), (10, 5), (3, 200)])
def test_a_prompt_and_then_its_completion_are_both(p, own):
  for outputs in (0, 1, p):
    both = (arithmetic.forward_flops(WIDE, p, outputs=outputs)
            + arithmetic.forward_flops(WIDE, own, shared=p))
    assert both == arithmetic.forward_flops(WIDE, p + own, outputs=outputs + own)


def test_tokens_one_by_one_are_all():
  """Each of them reads those before it, and half of itself."""
  p, own = 10, 6
  token = 2 * TINY.num_layers * arithmetic.layer_weights(TINY) + 2 * TINY.width * TINY.vocab_size
  read = [4 * TINY.num_layers * TINY.num_heads * TINY.head_width * (i + 0.5) for i in range(p, p + own)]
  assert arithmetic.forward_flops(TINY, own, shared=p) == sum(token + x for x in read)
  assert arithmetic.forward_flops(TINY, own, shared=p) == sum(
      arithmetic.forward_flops(TINY, 1, shared=i) for i in range(p, p + own))
  assert arithmetic.decode_attention_flops(TINY, rollouts=3, prompt=p, completion=own) == 3 * sum(read)


@pytest.mark.parametrize('rows', [(), (3,)], ids=['', '3'])
@pytest.mark.parametrize('kernel, products, first', [
    ('splash_mha_fwd_segmented_residuals', 2, 128), ('splash_mha_fwd_segmented_no_residuals', 2, 128),
    ('splash_mha_dq_segmented_no_residuals', 3, 64), ('splash_mha_dkv_segmented_no_residuals', 4, 64)])
def test_attention_of_blocks_up_to_the_diagonal(kernel, products, first, rows):
  """Scores and what they weigh; or scores, their gradient, and a gradient to q, or to k and to v."""
  N, K, T, H = 6, 2, 1024, 64
  for block in (256, 512):
    info, read = (1, T // block, T // block), (*rows, K, T, H)
    operands = (info, info, (*rows, N, T, H), read, read, (*rows, T, 128))
    results = ((*rows, block, first), (*rows, N, T, H))
    blocks = sum(len(range(0, i + 1, block)) for i in range(0, T, block))
    assert arithmetic.kernel_flops(kernel, operands, results) == (
        math.prod(rows) * N * blocks * products * 2 * block * block * H)


def test_token_logprob_computes_logits_once_a_pass():
  """And in the backward pass two gradients from theirs."""
  T, D, V = 48, 20, 700
  operands = ((T, D), (D, V), (T, 1))
  assert arithmetic.kernel_flops('token_logprob_forward', operands, ((T, 4),)) == 2 * T * D * V
  operands = ((3,), *operands, (T, 5), (T, D))
  assert arithmetic.kernel_flops('token_logprob_backward', operands, ((D, V), (T, D))) == 3 * 2 * T * D * V


def test_flops_of_the_decoding_kernel_depend_on_its_cache():
  assert arithmetic.kernel_flops('decode_attention', ((8,), (8, 4, 64)), ((8, 4, 64),)) == 0


@pytest.mark.parametrize('name', ['gmm', 'splash_mqa_fwd_segmented', 'decode_attention_2', ''])
def test_a_kernel_that_is_not_known_is_an_error(name):
  with pytest.raises(ValueError, match=f'the kernel {name!r} are not known'):
    arithmetic.kernel_flops(name, ((4, 4),) * 6, ((4, 4),))


@pytest.mark.parametrize('topology, flops, gib', [
    ('v4:2x2x1', 137.5e12, 15.25), ('v5e:4x4', 197e12, 15.75), ('v5p:2x2x1', 459e12, 95.74),
    ('v6e:8x8', 918e12, 31.25), ('v5e', 197e12, 15.75)])
def test_the_chip_of_a_topology(topology, flops, gib):
  chip = arithmetic.chip(topology)
  assert chip == arithmetic.CHIPS[topology.partition(':')[0]]
  assert chip.flops == flops and chip.hbm_bytes == int(gib * 2 ** 30)


def test_figures_are_of_the_right_size():
  """A chip takes over 100 multiply-adds to a byte of HBM, and HBM is faster than links."""
  for chip in arithmetic.CHIPS.values():
    assert all(x > 0 for x in chip) and isinstance(chip.hbm_bytes, int)
    assert chip.flops > 100 * chip.hbm_bytes_per_s > 100 * chip.ici_bytes_per_s
    assert 1 < chip.dollars_per_hour < 10


@pytest.mark.parametrize('topology', ['v3:2x2', 'V5E:2x2', ''])
def test_a_chip_without_figures_is_an_error(topology):
  with pytest.raises(ValueError) as e:
    arithmetic.chip(topology)
  assert repr(topology) in str(e.value) and repr(topology.partition(':')[0]) in str(e.value)
  assert all(repr(name) in str(e.value) for name in arithmetic.CHIPS)
