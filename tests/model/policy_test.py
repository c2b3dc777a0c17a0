"""The transformer against a plain numpy one, its programs against each other, and adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax import sharding
from kr_jax import types
from kr_jax.model import policy
from kr_jax.preflight import hlo

CONFIG = policy.Config(
    vocab_size=11, num_layers=3, width=16, num_heads=4, num_kv_heads=2, head_width=6, hidden_width=24,
    rope_theta=100.0, norm_eps=1e-6, qk_norm=True, qkv_bias=True, tie_embeddings=False,
    dtype='float32', remat='none', lora_rank=0, lora_alpha=1.0)
PLAIN = dataclasses.replace(CONFIG, qk_norm=False, qkv_bias=False, tie_embeddings=True)
# A program for each config and shape.
logits = jax.jit(policy.logits, static_argnums=0)


def random_params(config, seed=0):
  """Parameters in which no scale is one and no bias zero."""
  params = policy.init(config, jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params)


def reference_logits(c, params, token_T):
  """One sequence, token by token and head by head, in float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  norm = lambda x, scale: x / np.sqrt(np.mean(x * x) + c.norm_eps) * scale

  def rope(x_H, position):
    half = c.head_width // 2
    out = np.zeros_like(x_H)
    for i in range(half):
      angle = position * c.rope_theta ** (-i / half)
      out[i] = x_H[i] * np.cos(angle) - x_H[i + half] * np.sin(angle)
      out[i + half] = x_H[i + half] * np.cos(angle) + x_H[i] * np.sin(angle)
    return out

  x_TD = p['embed_VD'][np.asarray(token_T)]
  for l in range(c.num_layers):
    w = {name: x[l] for name, x in p['layers'].items()}
    q, k, v = [], [], []
    for t, x_D in enumerate(x_TD):
      h_D = norm(x_D, w['attention_norm_D'])
      parts = []
      for name, heads in (('q', 'NH'), ('k', 'KH'), ('v', 'KH')):
        y = np.tensordot(h_D, w[f'{name}_D{heads}'], 1)
        if c.qkv_bias:
          y = y + w[f'{name}_bias_{heads}']
        if c.qk_norm and name != 'v':
          y = np.stack([norm(y_H, w[f'{name}_norm_H']) for y_H in y])
        parts.append(y if name == 'v' else np.stack([rope(y_H, t) for y_H in y]))
      for values, part in zip((q, k, v), parts):
        values.append(part)
    out_TD = []
    for t, x_D in enumerate(x_TD):
      context = np.zeros((c.num_heads, c.head_width))
      for n in range(c.num_heads):
        g = n // (c.num_heads // c.num_kv_heads)
        scores = np.array([q[t][n] @ k[s][g] for s in range(t + 1)]) / np.sqrt(c.head_width)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        context[n] = sum(weight * v[s][g] for s, weight in enumerate(weights))
      x_D = x_D + np.tensordot(context, w['o_NHD'], 2)
      h_D = norm(x_D, w['mlp_norm_D'])
      gate = h_D @ w['gate_DF']
      out_TD.append(x_D + (gate / (1 + np.exp(-gate)) * (h_D @ w['up_DF'])) @ w['down_FD'])
    x_TD = np.stack(out_TD)
  output_DV = p['embed_VD'].T if c.tie_embeddings else p['output_DV']
  return np.stack([norm(x_D, p['norm_D']) @ output_DV for x_D in x_TD])


@pytest.mark.parametrize('config', [CONFIG, PLAIN], ids=['qwen', 'llama'])
def test_logits_equal_a_plain_transformer(config):
  params = random_params(config)
  token_BT = np.random.default_rng(0).integers(0, 11, (2, 7))
  got = logits(config, params, jnp.asarray(token_BT))
  for b in range(2):
    np.testing.assert_allclose(got[b], reference_logits(config, params, token_BT[b]), atol=2e-4)


@pytest.mark.parametrize('config', [CONFIG, PLAIN], ids=['qwen', 'llama'])
def test_gradients_are_slopes_of_the_plain_transformer(config):
  """Of each parameter along one random direction, by central differences in float64."""
  params = random_params(config)
  rng = np.random.default_rng(3)
  token_T, by_logits_TV = rng.integers(0, 11, 6), rng.normal(size=(6, 11))
  gradient = jax.jit(jax.grad(lambda params: jnp.sum(
      logits(config, params, jnp.asarray(token_T)[None])[0] * np.float32(by_logits_TV))))(params)
  gradients, tree = jax.tree.flatten_with_path(gradient)
  leaves = [np.asarray(x, float) for x in jax.tree.leaves(params)]
  for k, (path, g) in enumerate(gradients):
    direction = rng.normal(size=g.shape)
    slope = 0.0
    for h in (1e-5, -1e-5):
      moved = jax.tree.unflatten(tree, [x + h * direction if i == k else x
                                        for i, x in enumerate(leaves)])
      slope += np.sum(reference_logits(config, moved, token_T) * by_logits_TV) / (2 * h)
    # To what float32 leaves of a sum of terms of either sign.
    scale = np.linalg.norm(g) * np.linalg.norm(direction)
    assert np.sum(g * direction) == pytest.approx(slope, abs=1e-4 * scale), jax.tree_util.keystr(path)
    assert scale > 0


def test_rmsnorm_and_rope_by_hand():
  x = jnp.array([[3.0, 4.0]])
  np.testing.assert_allclose(
      policy.rmsnorm(x, jnp.array([2.0, 1.0]), 0.0), [[6 / 12.5 ** .5, 4 / 12.5 ** .5]], rtol=1e-6)
  # A quarter turn takes (1, 0) to (0, 1).
  x_BTNH = jnp.array([1.0, 0.0])[None, None, None]
  config = dataclasses.replace(CONFIG, head_width=2, rope_theta=10.0)
  turned = policy.rope(x_BTNH, policy.turns(jnp.array([[np.pi / 2]]), config)[0])
  np.testing.assert_allclose(turned[0, 0, 0], [0.0, 1.0], atol=1e-6)


def test_a_packed_row_equals_its_sequences_alone():
  params = random_params(CONFIG)
  a, b = jnp.array([[3, 4, 5]]), jnp.array([[6, 7, 8, 9]])
  hidden_BTD = policy.hidden(
      CONFIG, params, jnp.concatenate([a, b, jnp.array([[0]])], axis=1),
      jnp.array([[0, 1, 2, 0, 1, 2, 3, 0]]), jnp.array([[5, 5, 5, 2, 2, 2, 2, -1]]))
  packed = hidden_BTD @ policy.output_matrix(CONFIG, params)
  np.testing.assert_allclose(packed[:, :3], logits(CONFIG, params, a), atol=1e-5)
  np.testing.assert_allclose(packed[:, 3:7], logits(CONFIG, params, b), atol=1e-5)
  # Segments that follow are not seen; those of the same number side by side would be.
  together = logits(CONFIG, params, jnp.concatenate([a, b], axis=1))
  assert np.abs(packed[:, 3:7] - together[:, 3:]).max() > 0.01


def test_a_prompt_computed_once_serves_both_of_its_rows():
  """Two shards: 3 4 goes on with 5 6 and with 7; 8 goes on with 9. The place that is left is padding."""
  params = random_params(CONFIG)
  token_BT = jnp.array([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0]])
  position_BT = jnp.array([[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]])
  rows = types.Rows(
      segment_GS=jnp.array([[1, 1, 1, -1], [2, 2, 2, 2], [3, 3, -1, -1], [-1] * 4]),
      source_GS=jnp.array([[0, 1, 4, 0], [0, 1, 2, 3], [0, 1, 0, 0], [0] * 4]),
      place_BT=jnp.array([[0, 1, 6, 7, 2], [0, 1, 0, 0, 0]]))
  found = policy.hidden(CONFIG, params, token_BT, position_BT, None, rows) @ policy.output_matrix(
      CONFIG, params)
  for row, at in (([3, 4, 5, 6], (0, [0, 1, 2, 3])), ([3, 4, 7], (0, [0, 1, 4])), ([8, 9], (1, [0, 1]))):
    np.testing.assert_allclose(found[at], logits(CONFIG, params, jnp.array([row]))[0], atol=1e-5)


@pytest.mark.parametrize('config', [CONFIG, PLAIN], ids=['qwen', 'llama'])
def test_the_output_matrix_turns_what_is_hidden_into_logits(config):
  params = random_params(config)
  output_DV = policy.output_matrix(config, params)
  stored = params['embed_VD'].T if config.tie_embeddings else params['output_DV']
  np.testing.assert_array_equal(output_DV, stored)
  half = dataclasses.replace(config, dtype='bfloat16')
  position_BT = jnp.arange(4)[None]
  hidden_BTD = policy.hidden(half, params, jnp.array([[1, 2, 3, 4]]), position_BT, 0 * position_BT)
  assert hidden_BTD.dtype == policy.output_matrix(half, params).dtype == jnp.bfloat16


def continued(config, params, int8=False):
  """Two prompts of different lengths, continued three tokens, the second a step later: logits by the
  cache, and by scoring. What a ring holds that is not a slot's own would show."""
  token_BT = jnp.asarray(np.random.default_rng(1).integers(2, 11, (2, 8)))
  length_B = jnp.array([3, 5])
  prompt_BP = jnp.where(jnp.arange(5)[None] < length_B[:, None], token_BT[:, :5], 0)
  logits_BTV = logits(config, params, token_BT)
  sampling_params = policy.sampling_params(config, params)
  row_B = jnp.arange(2)
  prefill = jax.jit(policy.prefill, static_argnums=0, static_argnames='int8')
  logits_BV, prefix = prefill(config, sampling_params, prompt_BP, length_B, int8=int8)
  yield logits_BV, logits_BTV[row_B, length_B - 1]
  own = jax.tree.map(lambda x: jnp.full_like(x, 99), policy.empty(prefix, 2, 3))
  decode = jax.jit(policy.decode, static_argnums=0)
  for i in range(4):
    count_B = jnp.array([[1, 0], [2, 1], [3, 2], [0, 3]][i])
    live_B, position_B = count_B > 0, length_B + jnp.maximum(count_B, 1) - 1
    # Slots hold the prompts the other way round, and the ring of three columns comes round.
    slots = policy.Slots(row_B[::-1], length_B[::-1], count_B[::-1], jnp.array(5 + i))
    logits_BV, own = decode(config, sampling_params, token_BT[row_B, position_B][::-1], slots, prefix, own)
    yield logits_BV[::-1][live_B], logits_BTV[row_B, position_B][live_B]


@pytest.mark.parametrize('config', [CONFIG, PLAIN], ids=['qwen', 'llama'])
def test_prefill_and_decode_equal_scoring(config):
  for got, want in continued(config, random_params(config)):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_cache_of_integers_is_near():
  """A value is off by 1/254 of the largest of its head and column at the most."""
  errors = [np.abs(got - want).max() for got, want in continued(CONFIG, random_params(CONFIG), int8=True)]
  assert errors[0] < 1e-5  # a prompt is read before it is stored
  print('logits off by', np.round(errors, 4))
  assert 1e-5 < max(errors) < 0.1
  x_BTKH = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
  cache = policy._stored(x_BTKH, 3 * x_BTKH, int8=True)
  k, v, k_scale, v_scale = cache
  for values, scale, exact in ((k, k_scale, x_BTKH), (v, v_scale, 3 * x_BTKH)):
    exact = jnp.einsum('btkh->bkth', exact)
    assert values.dtype == jnp.int8
    bound = np.abs(exact).max(axis=-1, keepdims=True) / 254
    assert np.all(np.abs(values * scale[..., None] - exact) <= 1.001 * bound)


def test_a_slot_that_is_free_changes_no_other():
  params = policy.sampling_params(CONFIG, random_params(CONFIG))
  prefill = jax.jit(policy.prefill, static_argnums=0)
  _, prefix = prefill(CONFIG, params, jnp.array([[3, 4], [5, 6]]), jnp.array([2, 2]))
  decode = jax.jit(policy.decode, static_argnums=0)
  both, alone = (
      decode(CONFIG, params, jnp.array([7, 8]), policy.Slots(
          jnp.array([0, 1]), jnp.array([2, 2]), jnp.array(count), jnp.array(0)), prefix,
          policy.empty(prefix, 2, 1))[0] for count in ([1, 1], [1, 0]))
  np.testing.assert_array_equal(both[0], alone[0])
  assert np.isfinite(alone).all()


@pytest.mark.parametrize('columns, widths', [(1, [1]), (16, [16]), (17, [9, 9]), (66, [17] * 4)])
def test_a_ring_has_chunks_for_all_columns(columns, widths):
  prefix = (policy.Cache(jnp.zeros((6, 5, 3, 2, 4), jnp.int8), jnp.zeros((6, 5, 3, 2, 4), jnp.int8),
                         jnp.zeros((6, 5, 3, 2)), jnp.zeros((6, 5, 3, 2))),) * 2
  rings = policy.empty(prefix, 7, columns)
  assert len(rings) == 2
  for ring in rings:
    assert [chunk.k_LSKTH.shape for chunk in ring] == [(6, 7, 3, width, 4) for width in widths]
    assert [chunk.v_scale_LSKT.shape for chunk in ring] == [(6, 7, 3, width) for width in widths]
    assert {x.dtype.name for x in jax.tree.leaves(ring)} == {'int8', 'float32'}


def test_every_column_of_a_ring_is_written_once():
  """In chunks of 9: a step's column of a layer, and no other."""
  zeros = jnp.zeros((2, 1, 1, 4))
  (ring,) = policy.empty((policy.Cache(zeros[None], zeros[None]),), 2, 17)
  ring = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), ring)  # of three layers
  append = jax.jit(policy._append)
  for column in range(18):
    new = policy.Cache(zeros + column + 1, zeros - column - 1)
    ring = append(ring, new, jnp.array(1), jnp.array(column))
  k, v = (np.concatenate(x, axis=3) for x in zip(*(chunk[:2] for chunk in ring)))
  for column in range(18):
    assert np.all(k[1, :, :, column] == column + 1)
  assert not np.any(k[[0, 2]])
  np.testing.assert_array_equal(v, -k)


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_what_is_served_is_of_the_computation(platform, monkeypatch):
  """On a TPU with the heads first."""
  monkeypatch.setattr(sharding, 'platform', lambda: platform)
  half = dataclasses.replace(CONFIG, dtype='bfloat16')
  params = random_params(half)
  sampling_params = policy.sampling_params.__wrapped__(half, params)
  stages = sampling_params['layers']
  assert len(stages) == (1 if platform == 'tpu' else half.num_layers)
  layers = jax.tree.map(lambda *x: jnp.concatenate(x), *stages)
  assert len(layers) == len(params['layers'])
  for name, x in layers.items():
    assert x.dtype == (jnp.float32 if 'norm' in name else jnp.bfloat16)
    trained = {'q_NHD': 'q_DNH', 'k_KHD': 'k_DKH', 'v_KHD': 'v_DKH'}.get(name, name)
    assert (trained != name) == (platform == 'tpu' and name[:2] in ('q_', 'k_', 'v_') and 'D' in name)
    want = params['layers'][trained]
    want = (want if trained == name else want.transpose(0, 2, 3, 1)).astype(x.dtype)
    np.testing.assert_array_equal(x, want)
  assert sampling_params['embed_VD'].dtype == jnp.bfloat16 and sampling_params['norm_D'].dtype == jnp.float32


@pytest.mark.slow
def test_heads_first_changes_no_product(monkeypatch):
  params = random_params(CONFIG)
  monkeypatch.setattr(sharding, 'platform', lambda: 'tpu')
  sampling_params = policy.sampling_params.__wrapped__(CONFIG, params)
  token_BP, length_B = jnp.array([[3, 4, 5], [5, 6, 0]]), jnp.array([3, 2])
  found, _ = policy.prefill(CONFIG, sampling_params, token_BP, length_B)
  monkeypatch.undo()
  want, _ = policy.prefill(CONFIG, policy.sampling_params(CONFIG, params), token_BP, length_B)
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_params():
  config = dataclasses.replace(CONFIG, dtype='bfloat16')
  params = random_params(config)
  token_BT = jnp.array([[1, 2, 3]])
  got = logits(config, params, token_BT)
  assert got.dtype == jnp.float32
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  exact = logits(CONFIG, params, token_BT)
  assert 0 < jnp.max(jnp.abs(got - exact)) < 0.2


def test_the_params_of_a_policy():
  params = policy.init(PLAIN, jax.random.key(0))
  shapes = jax.tree.map(jnp.shape, params)
  assert shapes['layers']['k_DKH'] == (3, 16, 2, 6)
  assert 'output_DV' not in params and 'q_norm_H' not in params['layers']
  # Layers are drawn apart.
  assert not np.array_equal(params['layers']['q_DNH'][0], params['layers']['q_DNH'][1])


# Adapters.

LORA = dataclasses.replace(CONFIG, lora_rank=2, lora_alpha=6.0)


def random_adapters(config, seed=1):
  """Adapters of which neither half is zero, and a base."""
  trained, base = policy.split(config, random_params(config))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), trained), base


@pytest.mark.parametrize('config', [
    LORA, pytest.param(dataclasses.replace(PLAIN, lora_rank=3, lora_alpha=1.5), marks=pytest.mark.slow)],
                         ids=['qwen', 'llama'])
def test_merged_adapters_give_the_logits_of_joined_ones(config):
  trained, base = random_adapters(config)
  token_BT = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)))
  joined = logits(config, policy.join(config, trained, base), token_BT)
  merged = policy.merge(config, trained, base)
  np.testing.assert_allclose(joined, logits(policy.without_lora(config), merged, token_BT),
                             rtol=1e-5, atol=1e-5)
  assert np.abs(joined - logits(policy.without_lora(config), base, token_BT)).max() > 0.1
  assert jax.tree.structure(merged) == jax.tree.structure(base)


def test_merge_by_hand():
  """W + alpha / rank A B of one layer's matrix, over all axes of what goes in and comes out."""
  trained, base = random_adapters(LORA)
  merged = policy.merge(LORA, trained, base)
  a_DA, b_AF = (np.asarray(trained['layers'][f'up_lora_{x}'][1], float) for x in ('DA', 'AF'))
  np.testing.assert_allclose(merged['layers']['up_DF'][1], base['layers']['up_DF'][1] + 3 * a_DA @ b_AF,
                             atol=1e-6)
  a_NHA, b_AD = (np.asarray(trained['layers'][f'o_lora_{x}'][2], float) for x in ('NHA', 'AD'))
  np.testing.assert_allclose(
      merged['layers']['o_NHD'][2],
      base['layers']['o_NHD'][2] + 3 * np.tensordot(a_NHA, b_AD, 1), atol=1e-6)
  for name in ('q_norm_H', 'attention_norm_D', 'v_bias_KH'):
    np.testing.assert_array_equal(merged['layers'][name], base['layers'][name])


def test_new_adapters_change_nothing():
  """Exactly: one half is zero. And the base is drawn as it is without them."""
  params = policy.init(LORA, jax.random.key(0))
  trained, base = policy.split(LORA, params)
  plain = policy.init(CONFIG, jax.random.key(0))
  token_BT = jnp.array([[1, 2, 3, 4]])
  np.testing.assert_array_equal(logits(LORA, params, token_BT),
                                logits(CONFIG, base, token_BT))
  jax.tree.map(np.testing.assert_array_equal, policy.merge(LORA, trained, base), base)
  assert jax.tree.structure(base) == jax.tree.structure(plain)
  assert any(np.any(x) for x in trained['layers'].values())


def test_split_and_join():
  params = random_params(LORA)
  trained, base = policy.split(LORA, params)
  names = {f'{name}_lora_{letters}' for name, letters in (
      ('q', 'DA'), ('q', 'ANH'), ('k', 'DA'), ('k', 'AKH'), ('v', 'DA'), ('v', 'AKH'), ('o', 'NHA'),
      ('o', 'AD'), ('gate', 'DA'), ('gate', 'AF'), ('up', 'DA'), ('up', 'AF'), ('down', 'FA'),
      ('down', 'AD'))}
  assert set(trained) == {'layers'} and set(trained['layers']) == names
  assert not names & set(base['layers'])
  joined = policy.join(LORA, trained, base)
  assert jax.tree.structure(joined) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, joined, params)
  assert trained['layers']['q_lora_ANH'].shape == (3, 2, 4, 6)
  assert trained['layers']['o_lora_NHA'].shape == (3, 4, 6, 2)


def test_without_adapters_all_is_trained():
  params = random_params(CONFIG)
  trained, base = policy.split(CONFIG, params)
  assert base == {}
  for tree in (trained, policy.join(CONFIG, trained, base), policy.merge(CONFIG, trained, base)):
    jax.tree.map(np.testing.assert_array_equal, tree, params)
  assert policy.without_lora(LORA) == dataclasses.replace(CONFIG, lora_alpha=6.0)
  assert policy.without_lora(CONFIG) == CONFIG


@pytest.mark.parametrize('remat', policy.REMAT)
def test_what_is_computed_again_is_no_part_of_the_result(remat):
  """The gradients are compared where they are used, in the tests of update."""
  config = dataclasses.replace(CONFIG, remat=remat)
  params, token_BT = random_params(CONFIG), jnp.array([[1, 2, 3, 4]])
  np.testing.assert_allclose(logits(config, params, token_BT),
                             logits(CONFIG, params, token_BT), rtol=1e-5, atol=1e-6)


def test_what_is_kept_is_not_computed_again():
  """Products with weights, which a backward pass has twice more, and attention, by their FLOPs."""
  T = 8
  params, token_BT = random_params(CONFIG), jnp.ones((1, T), int)

  def flops(remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(policy.logits(config, params, token_BT) ** 2)))
    return hlo.count(gradient.lower(params).compile().as_text(), {}, {}).flops

  none, dots, attention, full = map(flops, policy.REMAT)
  c = CONFIG
  heads, down = c.num_heads * c.head_width, c.width * c.hidden_width
  products = 2 * T * c.num_layers * (2 * c.width * (heads + c.num_kv_heads * c.head_width) + 3 * down)
  square = 2 * T * T * heads * c.num_layers  # of attention, which has two forward and four back
  words = 2 * T * c.width * c.vocab_size
  assert none == 3 * (products + words) + 6 * square
  assert dots == none + square  # the probabilities, of which only what they were good for is kept
  # Of the last product nobody asks for the result again.
  assert attention == dots + products - 2 * T * c.num_layers * down
  assert full == attention + square


@pytest.mark.parametrize('changed, named', [
    ({'num_layers': 0}, 'policy.num_layers=0'),
    ({'num_heads': 3}, 'policy.num_heads=3 is not a multiple of policy.num_kv_heads=2'),
    ({'head_width': 5}, 'policy.head_width=5 is odd'),
    ({'dtype': 'float16'}, "policy.dtype='float16'"),
    ({'remat': 'some'}, r"policy.remat='some' is not one of \('none', 'dots', 'attention', 'full'\)"),
    ({'lora_rank': -1}, 'policy.lora_rank=-1 is below 0'),
    ({'lora_rank': 2, 'lora_alpha': 0.0}, 'policy.lora_alpha=0.0 must be above 0'),
])
def test_bad_sizes(changed, named):
  with pytest.raises(ValueError, match=named):
    dataclasses.replace(CONFIG, **changed)


GEMMA = dataclasses.replace(
    CONFIG, qkv_bias=False, tie_embeddings=True, activation='gelu', norm_offset=1.0, post_norms=True,
    embedding_scale=True, query_scalar=9.0, window=3, global_every=3, local_rope_theta=10.0,
    rope_scaling=(8.0,))


@pytest.mark.slow
def test_layers_that_read_a_window_in_packed_rows():
  """Sequences beside each other in a row, and gathered to rows of their own, are as alone; by the
  derivative too, whatever is kept of a layer. (tests/weights_test.py: the values are Gemma's.)"""
  params = random_params(GEMMA)
  token_1T = np.random.default_rng(1).integers(0, 11, (1, 12))
  segment_1T, position_1T = np.repeat([[0, 1]], [5, 7], axis=1), np.r_[0:5, 0:7][None]
  alone = jnp.concatenate([
      policy.hidden(GEMMA, params, x, np.arange(x.shape[1])[None], np.zeros_like(x))
      for x in (token_1T[:, :5], token_1T[:, 5:])], axis=1)
  apart = types.Rows(
      segment_GS=np.array([[0] * 5 + [-1] * 2, [1] * 7]), source_GS=np.array([[0, 1, 2, 3, 4, 0, 0],
                                                                              [*range(5, 12)]]),
      place_BT=np.array([[*range(5), *range(7, 14)]]))
  for rows in (None, apart):
    found = policy.hidden(GEMMA, params, token_1T, position_1T, segment_1T, rows)
    np.testing.assert_allclose(found, alone, atol=1e-5)

  def loss(params, remat):
    config = dataclasses.replace(GEMMA, remat=remat)
    return jnp.sum(policy.hidden(config, params, token_1T, position_1T, segment_1T) ** 2)

  kept, again = (jax.grad(loss)(params, remat) for remat in ('none', 'full'))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), kept, again)
  assert all(np.any(x != 0) for x in jax.tree.leaves(kept))


@pytest.mark.parametrize('config', [CONFIG, GEMMA], ids=['qwen', 'gemma'])
def test_scanned_layers_prefill_and_decode_as_scored(config, monkeypatch):
  """In one stage, as on a TPU."""
  monkeypatch.setattr(policy, '_stages', lambda config: (range(config.num_layers),))
  monkeypatch.setattr(policy, 'sampling_params', policy.sampling_params.__wrapped__)
  assert len(policy.sampling_params(config, random_params(config))['layers']) == 1
  for got, want in continued(config, random_params(config)):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_window_is_so_many_tokens():
  """What a token is told, by the derivative of a local layer's attention."""
  x = jax.random.normal(jax.random.key(0), (1, 6, 1, 4))
  told = jax.jacobian(lambda v: policy._attend_masked(x, x, v, np.zeros((1, 6), int), 3)[0, :, 0, 0])(x)
  np.testing.assert_array_equal(np.any(told[:, 0, :, 0] != 0, axis=-1), [
      [i - 3 < j <= i for j in range(6)] for i in range(6)])


def test_configs_that_are_none():
  for knobs, named in (({'activation': 'relu'}, "activation='relu' is not one of"),
                       ({'rope_scaling': (1.0, 2.0)}, 'is not .*factor, low, high, context')):
    with pytest.raises(ValueError, match=named):
      dataclasses.replace(CONFIG, **knobs)
