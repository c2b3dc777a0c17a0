"""The transformer against a plain numpy one, its programs against each other, and adapters."""

import jax
from jax.extend.core import jaxprs_in_params
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax import types
from kr_jax.model import attention
from kr_jax.model import policy

CONFIG = policy.Config(
    vocab_size=11, num_layers=3, width=16, num_heads=4, num_kv_heads=2, head_width=6, hidden_width=24,
    rope_theta=100.0, norm_eps=1e-6, qk_norm=True, qkv_bias=True, tie_embeddings=False,
    dtype='float32', remat='none', lora_rank=0, lora_alpha=1.0)
PLAIN = CONFIG.replace(qk_norm=False, qkv_bias=False, tie_embeddings=True)
GEMMA = CONFIG.replace(
    qkv_bias=False, tie_embeddings=True, activation='gelu', norm_offset=1.0, post_norms=True,
    embedding_scale=True, query_scalar=9.0, window=3, local_layers=(True, True, False),
    local_rope_theta=10.0, rope_scaling=attention.Scaling('linear', 8.0))
OLMO = CONFIG.replace(
    qkv_bias=False, qk_norm_whole=True, pre_norms=False, post_norms=True, rope_width=4,
    no_rope_layers=(False, True, False))
EXPERTS = CONFIG.replace(qkv_bias=False, num_experts=4, experts_per_token=2)
LORA = CONFIG.replace(lora_rank=2, lora_alpha=6.0)
B, T = 2, 8
TOKEN_BT = np.random.default_rng(0).integers(0, 11, (B, T))
# Last numbers of some parameters of LORA, from key 0.
DRAWS = (0.01779039, -0.11508771, -0.015708396, 0.02706628, -0.04744512, 0.40861136)
_logits = jax.jit(policy.logits, static_argnums=0)


def random_params(config, seed=0):
  """Parameters in which no scale is one and no bias zero."""
  params = policy.init(config, jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x + np.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params)


def logits(config, params, *rows):
  """Of one or two rows of at most eight tokens, by one program a config: later tokens are not read."""
  token_BT = np.zeros((B, T), int)
  for b, row in enumerate(rows):
    token_BT[b, :len(row)] = row
  logits_BTV = _logits(config, params, token_BT)
  return [logits_BTV[b, :len(row)] for b, row in enumerate(rows)]


def reference_logits(c, params, token_T):
  """One sequence, token by token and head by head, in float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  norm = lambda x, scale: x / np.sqrt(np.mean(x * x) + c.norm_eps) * scale

  def rope(x_H, position):
    width = c.rope_width or c.head_width
    half, out = width // 2, x_H.copy()
    for i in range(half):
      angle = position * c.rope_theta ** (-i / half)
      out[i] = x_H[i] * np.cos(angle) - x_H[i + half] * np.sin(angle)
      out[i + half] = x_H[i + half] * np.cos(angle) + x_H[i] * np.sin(angle)
    return out

  def mlp(gate, up, down, h_D):
    gated = h_D @ gate
    return (gated / (1 + np.exp(-gated)) * (h_D @ up)) @ down

  def experts(w, h_D):
    probability_E = np.exp(h_D @ w['router_DE']) / np.exp(h_D @ w['router_DE']).sum()
    chosen = np.argsort(-probability_E)[:c.experts_per_token]
    return sum(probability_E[e] / probability_E[chosen].sum() *
               mlp(w['gate_EDF'][e], w['up_EDF'][e], w['down_EFD'][e], h_D) for e in chosen)

  x_TD = p['embed_VD'][np.asarray(token_T)]
  for l in range(c.num_layers):
    w = {name: x[l] for name, x in p['layers'].items()}
    before = lambda x_D, name: norm(x_D, w[name]) if c.pre_norms else x_D
    after = lambda x_D, name: norm(x_D, w[name]) if c.post_norms else x_D
    q, k, v = [], [], []
    for t, x_D in enumerate(x_TD):
      h_D = before(x_D, 'attention_norm_D')
      parts = []
      for name, heads in (('q', 'NH'), ('k', 'KH'), ('v', 'KH')):
        y = np.tensordot(h_D, w[f'{name}_D{heads}'], 1)
        if c.qkv_bias:
          y = y + w[f'{name}_bias_{heads}']
        if c.qk_norm_whole and name != 'v':
          y = norm(y.ravel(), w[f'{name}_norm_{heads}'].ravel()).reshape(y.shape)
        elif c.qk_norm and name != 'v':
          y = np.stack([norm(y_H, w[f'{name}_norm_H']) for y_H in y])
        still = name == 'v' or c.no_rope_layers and c.no_rope_layers[l]
        parts.append(y if still else np.stack([rope(y_H, t) for y_H in y]))
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
      x_D = x_D + after(np.tensordot(context, w['o_NHD'], 2), 'attention_post_norm_D')
      h_D = before(x_D, 'mlp_norm_D')
      y_D = experts(w, h_D) if c.num_experts else mlp(w['gate_DF'], w['up_DF'], w['down_FD'], h_D)
      out_TD.append(x_D + after(y_D, 'mlp_post_norm_D'))
    x_TD = np.stack(out_TD)
  output_DV = p['embed_VD'].T if c.tie_embeddings else p['output_DV']
  return np.stack([norm(x_D, p['norm_D']) @ output_DV for x_D in x_TD])


@pytest.mark.parametrize('config', [
    CONFIG, pytest.param(PLAIN, marks=pytest.mark.exhaustive), pytest.param(OLMO, marks=pytest.mark.slow),
    pytest.param(EXPERTS, marks=pytest.mark.slow)], ids=['qwen', 'llama', 'olmo', 'experts'])
def test_logits_and_gradients_are_those_of_the_plain_transformer(config):
  """Gradients of each parameter along one random direction, by central differences in float64."""
  params, rng = random_params(config), np.random.default_rng(3)
  weight_TV = rng.normal(size=(T, 11)).astype(np.float32)
  weighted = lambda logits_TV: np.sum(logits_TV * weight_TV)
  # Of the first row alone; what a row reads is not in the others.
  gradient, logits_BTV = jax.jit(jax.grad(lambda params: (
      jnp.sum((y := policy.logits(config, params, TOKEN_BT))[0] * weight_TV), y), has_aux=True))(params)
  for b in range(B):
    np.testing.assert_allclose(logits_BTV[b], reference_logits(config, params, TOKEN_BT[b]), atol=2e-4)
  gradients, tree = jax.tree.flatten_with_path(gradient)
  leaves = [np.asarray(x, float) for x in jax.tree.leaves(params)]
  for k, (path, g) in enumerate(gradients):
    direction, slope = rng.normal(size=g.shape), 0.0
    for h in (1e-5, -1e-5):
      moved = jax.tree.unflatten(tree, [x + h * direction if i == k else x for i, x in enumerate(leaves)])
      slope += weighted(reference_logits(config, moved, TOKEN_BT[0])) / (2 * h)
    # To the rounding of float32, in a sum of terms of either sign.
    scale = np.linalg.norm(g) * np.linalg.norm(direction)
    assert np.sum(g * direction) == pytest.approx(slope, abs=1e-4 * scale), jax.tree_util.keystr(path)
    assert scale > 0


def test_rmsnorm_by_hand():
  x = jnp.array([[3.0, 4.0]])
  np.testing.assert_allclose(
      policy.rmsnorm(x, jnp.array([2.0, 1.0]), 0.0), [[6 / 12.5 ** .5, 4 / 12.5 ** .5]], rtol=1e-6)
  np.testing.assert_allclose(policy.rmsnorm(x, jnp.ones(2), 3.5), [[3 / 4, 4 / 4]], rtol=1e-6)


def test_a_packed_row_equals_its_sequences_alone():
  params, sequences = random_params(CONFIG), ([3, 4, 5], [6, 7, 8, 9])
  hidden_BTD = jax.jit(policy.hidden, static_argnums=0)(
      CONFIG, params, np.array([[3, 4, 5, 6, 7, 8, 9, 0]]), np.array([[0, 1, 2, 0, 1, 2, 3, 0]]),
      np.array([[5, 5, 5, 2, 2, 2, 2, -1]]))
  packed = hidden_BTD[0] @ policy.output_matrix(CONFIG, params)
  alone = logits(CONFIG, params, *sequences)
  np.testing.assert_allclose(packed[:3], alone[0], atol=1e-5)
  np.testing.assert_allclose(packed[3:7], alone[1], atol=1e-5)
  # Segments before are not read; a sequence of both would read them.
  (together,) = logits(CONFIG, params, [*sequences[0], *sequences[1]])
  assert np.abs(packed[3:7] - together[3:]).max() > 0.01


def test_a_prompt_computed_once_serves_both_of_its_rows():
  """Two shards: 3 4 goes on with 5 6 and with 7; 8 goes on with 9. The place that is left is padding."""
  params = random_params(CONFIG)
  token_BT = np.array([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0]])
  position_BT = np.array([[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]])
  rows = types.Rows(
      segment_GS=np.array([[1, 1, 1, -1], [2, 2, 2, 2], [3, 3, -1, -1], [-1] * 4]),
      source_GS=np.array([[0, 1, 4, 0], [0, 1, 2, 3], [0, 1, 0, 0], [0] * 4]),
      place_BT=np.array([[0, 1, 6, 7, 2], [0, 1, 0, 0, 0]]))
  found = jax.jit(policy.hidden, static_argnums=0)(
      CONFIG, params, token_BT, position_BT, None, rows) @ policy.output_matrix(CONFIG, params)
  first, second = logits(CONFIG, params, [3, 4, 5, 6], [3, 4, 7])
  np.testing.assert_allclose(found[0, [0, 1, 2, 3]], first, atol=1e-5)
  np.testing.assert_allclose(found[0, [0, 1, 4]], second, atol=1e-5)
  np.testing.assert_allclose(found[1, [0, 1]], logits(CONFIG, params, [8, 9])[0], atol=1e-5)


@pytest.mark.slow
def test_layers_that_read_a_window_in_packed_rows():
  """Sequences side by side in a row, and gathered to rows of their own, are as alone; by the derivative too,
  whatever is kept of a layer. (tests/model/weights_test.py: the values are Gemma's.)"""
  params = random_params(GEMMA)
  token_1T = np.random.default_rng(1).integers(0, 11, (1, 12))
  segment_1T, position_1T = np.repeat([[0, 1]], [5, 7], axis=1), np.r_[0:5, 0:7][None]
  apart = types.Rows(
      segment_GS=np.array([[0] * 5 + [-1] * 2, [1] * 7]),
      source_GS=np.array([[0, 1, 2, 3, 4, 0, 0], [*range(5, 12)]]),
      place_BT=np.array([[*range(5), *range(7, 14)]]))

  @jax.jit
  def of(params):
    hidden = lambda params, rows, remat: policy.hidden(
        GEMMA.replace(remat=remat), params, token_1T, position_1T, segment_1T, rows)
    gradient = lambda remat: jax.grad(lambda params: jnp.sum(hidden(params, None, remat) ** 2))(params)
    logits_of = lambda rows: policy.logits_of(GEMMA, params, hidden(params, rows, 'none'))[0]
    return logits_of(None), logits_of(apart), gradient('none'), gradient('full')

  packed, gathered, kept, again = of(params)
  alone = np.concatenate(logits(GEMMA, params, token_1T[0, :5], token_1T[0, 5:]))
  np.testing.assert_allclose(packed, alone, atol=2e-5)
  np.testing.assert_allclose(gathered, alone, atol=2e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), kept, again)
  assert all(np.any(x != 0) for x in jax.tree.leaves(kept))


@pytest.mark.slow
def test_the_load_of_experts_counts_the_tokens_that_are_asked_for():
  params = random_params(EXPERTS)
  counted_BT = np.arange(T)[None] < np.array([[5], [2]])
  position_BT, segment_BT = np.arange(T)[None] + np.zeros((B, 1), int), np.zeros((B, T), int)
  all_of, load_LE = (policy.hidden_and_load(
      EXPERTS, params, TOKEN_BT, position_BT, segment_BT, counted_BT=counted)[1] for counted in (None, counted_BT))
  np.testing.assert_array_equal(np.sum(all_of, axis=1), [2 * B * T] * 3)
  np.testing.assert_array_equal(np.sum(load_LE, axis=1), [2 * 7] * 3)
  assert np.all(load_LE <= all_of)
  assert policy.hidden_and_load(CONFIG, random_params(CONFIG), TOKEN_BT, position_BT, segment_BT)[1] is None


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_params():
  half, params = CONFIG.replace(dtype='bfloat16'), random_params(CONFIG)
  assert jax.tree.leaves(jax.eval_shape(lambda: policy.init(half, jax.random.key(0))))[0].dtype == jnp.float32
  at_BT = jnp.zeros((B, T), int)
  hidden_BTD = jax.eval_shape(lambda params: policy.hidden(half, params, at_BT, at_BT, at_BT), params)
  assert hidden_BTD.dtype == policy.output_matrix(half, params).dtype == jnp.bfloat16
  (got,), (exact,) = (logits(config, params, TOKEN_BT[0]) for config in (half, CONFIG))
  assert got.dtype == jnp.float32
  assert 0 < jnp.max(jnp.abs(got - exact)) < 0.2


def test_the_params_of_a_policy():
  params = policy.init(CONFIG, jax.random.key(0))
  layers = params['layers']
  assert layers['k_DKH'].shape == (3, 16, 2, 6)
  # Layers and matrices are drawn apart, of a variance of one over what goes in; and shrink with depth.
  assert not np.array_equal(layers['q_DNH'][0], layers['q_DNH'][1])
  assert not np.array_equal(layers['k_DKH'], layers['v_DKH'])
  for name, fan_in in (('q_DNH', 16), ('k_DKH', 16), ('v_DKH', 16), ('o_NHD', 24 * 6), ('gate_DF', 16),
                       ('up_DF', 16), ('down_FD', 24 * 6)):
    assert np.std(layers[name]) == pytest.approx(fan_in ** -0.5, rel=0.1)
  plain = jax.eval_shape(lambda: policy.init(PLAIN, jax.random.key(0)))
  assert 'output_DV' not in plain and 'q_norm_H' not in plain['layers'] and 'q_bias_NH' not in plain['layers']


def test_the_draws_of_the_parameters_stay():
  """Runs of a seed are repeatable from one version to the next."""
  params = policy.init(LORA, jax.random.key(0))
  found = [float(np.asarray(x).ravel()[-1]) for x in (
      params['embed_VD'], params['output_DV'], *(params['layers'][name] for name in (
          'q_DNH', 'down_FD', 'q_lora_DA', 'down_lora_FA')))]
  np.testing.assert_allclose(found, DRAWS, rtol=1e-6)


# Adapters.


def random_adapters(seed=1):
  """Adapters of which neither half is zero, and a base."""
  trained, base = policy.split(LORA, random_params(LORA))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), trained), base


def test_merged_adapters_give_the_logits_of_joined_ones():
  trained, base = random_adapters()
  assert policy.without_lora(LORA) == CONFIG.replace(lora_alpha=6.0)
  merged = policy.merge(LORA, trained, base)
  (joined,) = logits(LORA, policy.join(LORA, trained, base), TOKEN_BT[0])
  np.testing.assert_allclose(joined, logits(CONFIG, merged, TOKEN_BT[0])[0], rtol=1e-5, atol=1e-5)
  assert np.abs(joined - logits(CONFIG, base, TOKEN_BT[0])[0]).max() > 0.1
  assert jax.tree.structure(merged) == jax.tree.structure(base)


def test_merge_by_hand():
  """W + alpha / rank A B of one layer's matrix, over all axes of what goes in and comes out."""
  trained, base = random_adapters()
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
  trained, base = policy.split(LORA, policy.init(LORA, jax.random.key(0)))
  jax.tree.map(np.testing.assert_array_equal, policy.merge(LORA, trained, base), base)
  jax.tree.map(np.testing.assert_array_equal, base, policy.init(CONFIG, jax.random.key(0)))
  assert any(np.any(x) for x in trained['layers'].values())


@pytest.mark.slow
def test_experts_have_no_adapters():
  config = EXPERTS.replace(lora_rank=2)
  trained, base = policy.split(config, random_params(config))
  assert {name[0] for name in trained['layers']} == set('qkvo')
  merged = policy.merge(config, trained, base)
  np.testing.assert_array_equal(merged['layers']['up_EDF'], base['layers']['up_EDF'])
  assert np.any(merged['layers']['q_DNH'] != base['layers']['q_DNH'])


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
  assert policy.without_lora(LORA) == CONFIG.replace(lora_alpha=6.0)
  assert policy.without_lora(CONFIG) == CONFIG


def products(jaxpr) -> int:
  """FLOPs of the products of a jaxpr, loops and what is computed again included."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      inputs = equation.invars[0].aval.shape
      total += 2 * equation.outvars[0].aval.size * int(np.prod([inputs[d] for d in contracted]))
    inner = jaxprs_in_params(equation.params)
    total += equation.params.get('length', 1) * sum(map(products, inner))
  return total


def test_what_is_kept_is_not_computed_again():
  """Products with weights, which a backward pass has twice more, and attention, by their FLOPs."""
  c, params = CONFIG, random_params(CONFIG)

  def flops(remat):
    loss = lambda params: jnp.sum(policy.logits(c.replace(remat=remat), params, TOKEN_BT[:1]) ** 2)
    return products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

  none, dots, attention, full = map(flops, policy.REMAT)
  heads, down = c.num_heads * c.head_width, c.width * c.hidden_width
  matrices = 2 * T * c.num_layers * (2 * c.width * (heads + c.num_kv_heads * c.head_width) + 3 * down)
  square = 2 * T * T * heads * c.num_layers  # of attention, which has two forward and four back
  vocabulary = 2 * T * c.width * c.vocab_size
  print(none, dots, attention, full, matrices, square, vocabulary, down)
  assert none == 3 * (matrices + vocabulary) + 6 * square
  assert dots == none + square  # the probabilities, of which only their product is kept
  # Nobody asks for the result of the last product again.
  assert attention == dots + matrices - 2 * T * c.num_layers * down
  assert full == attention + square


@pytest.mark.parametrize('changed, named', [
    ({'vocab_size': 0}, 'policy.vocab_size=0 is below 1'),
    ({'activation': 'relu'}, "activation='relu' is not one of"),
    ({'local_layers': (True,)}, r'local_layers=\(True,\) must be of 3 layers'),
    ({'local_layers': (True, False, False)}, 'policy.window=0 of local layers is below 1'),
    ({'num_experts': 4}, 'experts_per_token=8 is more than policy.num_experts=4'),
    ({'num_heads': 3}, 'policy.num_heads=3 is not a multiple of policy.num_kv_heads=2')])
def test_configs_that_are_none(changed, named):
  with pytest.raises(ValueError, match=named):
    CONFIG.replace(**changed)


def test_the_kinds_of_layers():
  local, full = policy.Kind(3, True, True), policy.Kind(0, False, True)
  assert GEMMA.kinds == (local, full) and GEMMA.kind_of_layer == (0, 0, 1)
  assert CONFIG.kinds == (full,) and CONFIG.kind_of_layer == (0, 0, 0)
  still = CONFIG.replace(no_rope_layers=(False, True, False))
  assert still.kinds == (full, full._replace(rotates=False)) and still.kind_of_layer == (0, 1, 0)
  # All are local, and rotate as any layer.
  assert CONFIG.replace(window=3, local_layers=(True,) * 3).kinds == (policy.Kind(3, False, True),)
