"""FLOPs by arithmetic, against hand and against products counted one by one."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from kr_jax import queues as queues_lib
from kr_jax import sample
from kr_jax import types
from kr_jax.costs import arithmetic
from kr_jax.costs import flops
from kr_jax.kernels.decode_attention import ops as attention_ops
from kr_jax.learning import update
from kr_jax.model import decode
from kr_jax.model import policy
from tests import knobs

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


LENGTHS = arithmetic.equal_lengths(tasks=2, rollouts=6, prompt=10, completion=5)


def test_a_step_by_hand():
  """Of 6 completions of 5 tokens, of 2 prompts of 10: 9360 + 4800 a prompt, 11120 a completion.

  When they are scored the prompt's last token belongs to the completion: 12312 a prompt of 9, 10640 a completion.
  """
  assert arithmetic.sample_flops(TINY, LENGTHS) == 2 * (14160 + 88) + 6 * 11120 == 95216
  assert arithmetic.score_flops(TINY, LENGTHS) == 2 * 12312 + 6 * 10640 == 88464
  assert arithmetic.update_flops(TINY, LENGTHS) == 3 * 88464
  assert arithmetic.decode_attention_flops(TINY, LENGTHS) == 6 * 125 * 48 == 36000
  assert all(isinstance(flops_of(TINY, LENGTHS), int) for flops_of in (
      arithmetic.sample_flops, arithmetic.score_flops, arithmetic.update_flops, arithmetic.decode_attention_flops))


def test_a_step_of_adapters_by_hand():
  """Of rank 1 they have 4 + 8 elements at q and o, 4 + 4 at k and v, 4 + 5 at each of the MLP's. So a token takes
  2 x 3 x 67 = 402 more; and an update no product for the gradients of the 156, nor for those of the output."""
  lora = TINY.replace(lora_rank=1)
  assert arithmetic.adapter_weights(lora) == 2 * 12 + 2 * 8 + 3 * 9 == 67
  assert arithmetic.adapter_weights(lora.replace(num_experts=4, experts_per_token=2)) == 40
  assert arithmetic.adapter_weights(TINY) == 0
  score = 88464 + 402 * (2 * 9 + 6 * 5)
  assert arithmetic.score_flops(lora, LENGTHS) == score == 107760
  assert arithmetic.update_flops(lora, LENGTHS) == 2 * score + 402 * 48 + (2 * 81 + 6 * 115) * 48 == 275712


def test_lengths_are_those_of_rollouts_and_of_each_of_their_prompts_once():
  """In whatever order; rows without a rollout, of task M, and tasks without one do not count."""
  length_M, task_R = np.array([3, 9, 4, 7], np.int32), np.array([0, 2, 2, 3, 3, 4, 4], np.int32)
  length_R = np.array([5, 1, 6, 2, 2, 0, 0], np.int32)
  of = arithmetic.lengths(length_M, task_R, length_R)
  assert [x.tolist() for x in of] == [[3, 4, 7], [3, 4, 4, 7, 7], [5, 1, 6, 2, 2]]
  assert arithmetic.lengths(length_M, task_R, length_R, reads=False).read_M.tolist() == []
  for flops_of in (arithmetic.sample_flops, arithmetic.score_flops, arithmetic.update_flops):
    assert flops_of(TINY, of) == flops_of(TINY, arithmetic.lengths(length_M, task_R[::-1], length_R[::-1]))
    each = [flops_of(TINY, arithmetic.lengths(length_M, task_R[r:r + 1], length_R[r:r + 1])) for r in range(5)]
    again = [flops_of(TINY, arithmetic.Lengths(length_M[m:m + 1], *np.zeros((2, 0), int))) for m in (2, 3)]
    assert flops_of(TINY, of) == sum(each) - sum(again)  # their prompts are read for another rollout already


def test_flops_are_exact_where_they_are_many():
  """Of Qwen3-32B's sizes, of 4096 rollouts of 32768 tokens: of odd digits, beyond 2^53."""
  c = TINY.replace(num_layers=64, width=5120, num_heads=64, num_kv_heads=8, head_width=128, hidden_width=25600,
                   vocab_size=151936)
  of = arithmetic.equal_lengths(tasks=0, rollouts=4096, prompt=1001, completion=32767)
  weights = 5120 * (2 * 72 * 128 + 3 * 25600)
  assert arithmetic.score_flops(c, of) == 4096 * (
      32767 * 2 * (64 * weights + 5120 * 151936) + 2 * 64 * 64 * 128 * (33767 ** 2 - 1000 ** 2)) > 2 ** 53


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


def test_bytes_that_decoding_reads_by_hand():
  """TINY has 3 x 156 + 4 x 11 = 512 numbers a step; completions of 1, 2 and 5 tokens read 11, 23 and 65 columns."""
  of = arithmetic.lengths([10], [0, 0, 0, 0], [1, 2, 5, 0])
  bytes_of = lambda c, **more: arithmetic.decode_bytes(c, of, **{'steps': 7, 'slots': 1} | more)
  assert bytes_of(TINY) == 7 * 4 * 512 + (11 + 23 + 65) * 96
  assert bytes_of(TINY.replace(dtype='bfloat16'), cache='int8') == 7 * 2 * 512 + 99 * 72
  # One token meets two of four experts, of 60 numbers each; many meet all.
  assert bytes_of(EXPERTS) == 7 * 4 * (3 * (96 + 2 * 60 + 16) + 44) + 99 * 96
  assert bytes_of(EXPERTS, slots=1000) == 7 * 4 * (3 * (96 + 4 * 60 + 16) + 44) + 99 * 96
  assert isinstance(bytes_of(EXPERTS, slots=3), int)


def test_tokens_one_by_one_are_all():
  """Each of them reads those before it, and half of itself."""
  p, own = 10, 6
  token = 2 * TINY.num_layers * arithmetic.layer_weights(TINY) + 2 * TINY.width * TINY.vocab_size
  read = [4 * TINY.num_layers * TINY.num_heads * TINY.head_width * (i + 0.5) for i in range(p, p + own)]
  assert arithmetic.forward_flops(TINY, own, shared=p) == sum(token + x for x in read)
  assert arithmetic.forward_flops(TINY, own, shared=p) == sum(
      arithmetic.forward_flops(TINY, 1, shared=i) for i in range(p, p + own))
  of = arithmetic.equal_lengths(tasks=0, rollouts=3, prompt=p, completion=own)
  assert arithmetic.decode_attention_flops(TINY, of) == 3 * sum(read)


# What programs execute on a CPU, without padding: the closed form, and the terms by which they do more or less.

DENSE = TINY.replace(vocab_size=64, num_layers=2, width=32, num_heads=4, num_kv_heads=4, head_width=8, hidden_width=48)
GROUPED = DENSE.replace(num_kv_heads=2, tie_embeddings=True)
LORA = GROUPED.replace(lora_rank=2)
P, C = 16, 64


def traced(function, *args, **trips):
  """FLOPs of a run on a CPU."""
  return flops.count(function.trace(*args).jaxpr.jaxpr, trips, platform='cpu')


def attention(c, *squares):
  """2 L A of each: of as many masked pairs, or of twice the pairs that are read."""
  return 2 * c.num_layers * c.num_heads * c.head_width * sum(squares)


@pytest.mark.parametrize('c', [pytest.param(DENSE, marks=pytest.mark.slow), GROUPED], ids=['dense', 'grouped'])
def test_a_sampler_executes_the_closed_form(c):
  """Of 5 prompts and 8 rollouts of each, all decoded at once.

  The masked half of squares and of columns of the ring comes on top. In the last layer nothing but keys and values,
  and attention, is computed of a prompt's tokens before its last. (A sampler reads no adapters.)
  """
  M, R = 5, 40
  config = knobs.sampler(slots=R, prefill=M, prompt_length=P, completion_length=C)
  params = jax.eval_shape(lambda params: decode.sampling_params(c, params), abstract_params(c))
  token_MP, length_M = np.zeros((M, P), np.int32), np.full(M, P, np.int32)
  last = 2 * (c.num_heads * c.head_width * c.width + 3 * c.width * c.hidden_width)
  more = attention(c, M * P ** 2) - last * M * (P - 1)
  prefill = traced(jax.jit(lambda params: decode.prefill(c, params, token_MP, length_M)), params)
  read = arithmetic.equal_lengths(tasks=M, rollouts=0, prompt=P, completion=C)
  assert prefill == arithmetic.sample_flops(c, read) + more
  queues = queues_lib.assign_to_queues(np.full(M, 8), total=R)
  whole = traced(
      sample._decode, c, params, types.Prompts(token_MP, length_M, length_M), queues, jax.random.key(0), config,
      **{sample.PREFILL: 1, sample.REFILL: 1, sample.DECODE: C, attention_ops.WINDOWS: M})
  of = arithmetic.equal_lengths(tasks=M, rollouts=R, prompt=P, completion=C)
  assert whole == arithmetic.sample_flops(c, of) + more + attention(c, R * C ** 2)
  assert whole - prefill == arithmetic.forward_flops(c, of.completion_R, of.prompt_R) + attention(c, R * C ** 2)


@pytest.mark.parametrize('c', [DENSE, pytest.param(GROUPED, marks=pytest.mark.slow), LORA],
                         ids=['dense', 'grouped', 'lora'])
def test_an_update_and_scores_execute_the_closed_form(c):
  """Of rows of one rollout each, of a task of its own.

  The masked half of squares comes on top, and outputs of the prompts' tokens, which predict nothing that is learnt.
  """
  R, T = 6, P + C - 1
  config = knobs.updates(row_length=T, microbatch_rows=R, prompt_sharing=1.0)
  token_RC = np.zeros((R, C), np.int32)
  rollouts = types.Rollouts(
      types.Prompts(np.zeros((R, P), np.int32), np.full(R, P, np.int32), np.arange(R, dtype=np.int32)),
      task_R=np.arange(R, dtype=np.int32), token_RC=token_RC, logp_RC=np.float32(token_RC),
      length_R=np.full(R, C, np.int32), ended_R=np.ones(R, np.int32), decode_steps=np.int32(1))
  packed = update.pack_rollouts(rollouts, np.ones(R, bool), config)
  assert packed.first.tolist() == [0, 1]
  tokens = jax.eval_shape(update._gather, rollouts, packed.microbatches)
  trained, base = jax.eval_shape(lambda key: policy.split(c, policy.init(c, key)), jax.random.key(0))
  of, once = arithmetic.equal_lengths(tasks=R, rollouts=R, prompt=P, completion=C), {update.MICROBATCHES: 1}
  masked, unread = attention(c, R * T ** 2), 2 * c.width * c.vocab_size * R * (P - 1)
  score = traced(update.logps, trained, base, tokens, np.int32(1), c, config, **once)
  assert score == arithmetic.score_flops(c, of) + masked + unread
  state = jax.eval_shape(lambda params, key: update.init(params, key, config), trained, jax.random.key(0))
  experience = update.Experience(rollouts.length_R, *np.ones((2, R), np.float32))
  tokens = tokens._replace(old_logp_BT=tokens.sampler_logp_BT)
  moved = traced(update._step, state, base, experience, tokens, packed.first, c, config, **once)
  # With adapters the output has no gradient. Down and its adapter are computed again for the gradient of the latter.
  again = 2 * c.num_layers * R * T * c.lora_rank * c.hidden_width
  assert moved == arithmetic.update_flops(c, of) + 3 * masked + (2 if c.lora_rank else 3) * unread + again


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
