"""The transformer against a plain numpy one, and its three programs against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax import policy

CONFIG = policy.Config(
    vocab_size=11, num_layers=3, width=16, num_heads=4, num_kv_heads=2, head_width=6, hidden_width=24,
    rope_theta=100.0, norm_eps=1e-6, qk_norm=True, qkv_bias=True, tie_embeddings=False,
    dtype='float32')
PLAIN = dataclasses.replace(CONFIG, qk_norm=False, qkv_bias=False, tie_embeddings=True)


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
  got = policy.logits(config, params, jnp.asarray(token_BT))
  for b in range(2):
    np.testing.assert_allclose(got[b], reference_logits(config, params, token_BT[b]), atol=2e-4)


def test_rmsnorm_and_rope_by_hand():
  x = jnp.array([[3.0, 4.0]])
  np.testing.assert_allclose(
      policy.rmsnorm(x, jnp.array([2.0, 1.0]), 0.0), [[6 / 12.5 ** .5, 4 / 12.5 ** .5]], rtol=1e-6)
  # A quarter turn takes (1, 0) to (0, 1).
  x_BTNH = jnp.array([1.0, 0.0])[None, None, None]
  turned = policy.rope(x_BTNH, jnp.array([[np.pi / 2]]), 10.0)
  np.testing.assert_allclose(turned[0, 0, 0], [0.0, 1.0], atol=1e-6)


def test_a_packed_row_equals_its_sequences_alone():
  params = random_params(CONFIG)
  a, b = jnp.array([[3, 4, 5]]), jnp.array([[6, 7, 8, 9]])
  packed = policy.logits(
      CONFIG, params, jnp.concatenate([a, b, jnp.array([[0]])], axis=1),
      jnp.array([[0, 1, 2, 0, 1, 2, 3, 0]]), jnp.array([[5, 5, 5, 2, 2, 2, 2, -1]]))
  np.testing.assert_allclose(packed[:, :3], policy.logits(CONFIG, params, a), atol=1e-5)
  np.testing.assert_allclose(packed[:, 3:7], policy.logits(CONFIG, params, b), atol=1e-5)


@pytest.mark.parametrize('config', [CONFIG, PLAIN], ids=['qwen', 'llama'])
def test_prefill_and_decode_equal_scoring(config):
  """Two prompts of different lengths, continued one token at a time."""
  params = random_params(config)
  token_BT = jnp.asarray(np.random.default_rng(1).integers(2, 11, (2, 8)))
  length_B = jnp.array([3, 5])
  prompt_BP = jnp.where(jnp.arange(5)[None] < length_B[:, None], token_BT[:, :5], 0)
  logits_BTV = policy.logits(config, params, token_BT)
  logits_BV, prefix = policy.prefill(config, params, prompt_BP, length_B)
  cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 3), (0, 0), (0, 0))), prefix)
  row_B = jnp.arange(2)
  np.testing.assert_allclose(logits_BV, logits_BTV[row_B, length_B - 1], atol=1e-5)
  decode = jax.jit(policy.decode, static_argnums=0)
  for i in range(3):
    position_B = length_B + i
    logits_BV, cache = decode(config, params, token_BT[row_B, position_B], position_B, cache)
    np.testing.assert_allclose(logits_BV, logits_BTV[row_B, position_B], atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_params():
  config = dataclasses.replace(CONFIG, dtype='bfloat16')
  params = random_params(config)
  token_BT = jnp.array([[1, 2, 3]])
  got = policy.logits(config, params, token_BT)
  assert got.dtype == jnp.float32
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  exact = policy.logits(CONFIG, params, token_BT)
  assert 0 < jnp.max(jnp.abs(got - exact)) < 0.2


def test_the_params_of_a_policy():
  params = policy.init(PLAIN, jax.random.key(0))
  shapes = jax.tree.map(jnp.shape, params)
  assert shapes['layers']['k_DKH'] == (3, 16, 2, 6)
  assert 'output_DV' not in params and 'q_norm_H' not in params['layers']
  # Layers are drawn apart.
  assert not np.array_equal(params['layers']['q_DNH'][0], params['layers']['q_DNH'][1])


@pytest.mark.parametrize('changed, named', [
    ({'num_layers': 0}, 'policy.num_layers=0'),
    ({'num_heads': 3}, 'policy.num_heads=3 is not a multiple of policy.num_kv_heads=2'),
    ({'head_width': 5}, 'policy.head_width=5 is odd'),
    ({'dtype': 'float16'}, "policy.dtype='float16'"),
])
def test_bad_sizes(changed, named):
  with pytest.raises(ValueError, match=named):
    dataclasses.replace(CONFIG, **changed)
