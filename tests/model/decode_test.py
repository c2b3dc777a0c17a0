"""What a sampler runs against the scoring of whole sequences, in both layouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax import sharding
from kr_jax.model import decode as decode_lib
from kr_jax.model import policy
from tests.model.policy_test import CONFIG, EXPERTS, GEMMA, OLMO, random_params

LAYOUTS = {'plain': decode_lib.PLAIN, 'tpu': decode_lib.TPU}
TOKEN_BT = np.random.default_rng(1).integers(2, 11, (2, 8))
LENGTH_B = np.array([3, 5])
PROMPT_BP = np.where(np.arange(5)[None] < LENGTH_B[:, None], TOKEN_BT[:, :5], 0)
COLUMNS = 3
logits = jax.jit(policy.logits, static_argnums=0)


def sampling_params(config, params):
  """In the layout that is set now: not by a program that was traced before."""
  return decode_lib.sampling_params.__wrapped__(config, params)


@functools.cache
def programs(layout):
  """prefill and decode of a layout, which is set: a program of one is none of the other."""
  del layout
  return (jax.jit(lambda *args, int8=False: decode_lib.prefill(*args, int8=int8), static_argnums=0,
                  static_argnames='int8'),
          jax.jit(lambda *args: decode_lib.decode(*args), static_argnums=0))


def continued(config, layout='plain', int8=False):
  """Two prompts of different lengths, continued three tokens, the second a step later: logits by the
  cache, and by scoring. What a ring holds that is not a slot's own would show."""
  params, row_B = random_params(config), np.arange(2)
  prefill, decode = programs(layout)
  logits_BTV, sampled_from = logits(config, params, TOKEN_BT), sampling_params(config, params)
  logits_BV, prefix = prefill(config, sampled_from, PROMPT_BP, LENGTH_B, int8=int8)
  yield logits_BV, logits_BTV[row_B, LENGTH_B - 1]
  rings = jax.tree.map(lambda x: jnp.full_like(x, 99), decode_lib.empty(prefix, 2, COLUMNS))
  for i in range(4):
    count_B = np.array([[1, 0], [2, 1], [3, 2], [0, 3]][i])
    live_B, position_B = count_B > 0, LENGTH_B + np.maximum(count_B, 1) - 1
    # Slots hold the prompts the other way round, and the ring of three columns comes round.
    slots = decode_lib.Slots(row_B[::-1], LENGTH_B[::-1], count_B[::-1], np.array(5 + i))
    logits_BV, rings = decode(config, sampled_from, TOKEN_BT[row_B, position_B][::-1], slots, prefix, rings)
    yield logits_BV[::-1][live_B], logits_BTV[row_B, position_B][live_B]


@pytest.mark.parametrize('config, layout', [
    # By default two policies in each layout, the rest exhaustive.
    (CONFIG, 'plain'), (GEMMA, 'tpu'), pytest.param(CONFIG, 'tpu', marks=pytest.mark.exhaustive),
    pytest.param(GEMMA, 'plain', marks=pytest.mark.exhaustive), pytest.param(OLMO, 'plain', marks=pytest.mark.slow),
    pytest.param(OLMO, 'tpu', marks=pytest.mark.exhaustive),
    pytest.param(EXPERTS, 'plain', marks=pytest.mark.exhaustive),
    pytest.param(EXPERTS, 'tpu', marks=pytest.mark.slow)], ids=[
        f'{name}-{layout}' for name, layout in (
            ('qwen', 'plain'), ('gemma', 'tpu'), ('qwen', 'tpu'), ('gemma', 'plain'), ('olmo', 'plain'),
            ('olmo', 'tpu'), ('experts', 'plain'), ('experts', 'tpu'))])
def test_prefill_and_decode_equal_scoring(config, layout, monkeypatch):
  monkeypatch.setattr(decode_lib, 'layout', lambda: LAYOUTS[layout])
  assert len(sampling_params(config, random_params(config))['layers']) == (1 if layout == 'tpu' else 3)
  for got, want in continued(config, layout):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_value_of_an_integer_cache_is_near():
  """Off by 1/254 of the largest of its head and column at the most."""
  x_BTKH = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
  cache = decode_lib._stored(x_BTKH, 3 * x_BTKH, int8=True)
  for values, scale, exact in ((cache.k_LSKTH, cache.k_scale_LSKT, x_BTKH),
                               (cache.v_LSKTH, cache.v_scale_LSKT, 3 * x_BTKH)):
    exact = np.einsum('btkh->bkth', exact)
    assert values.dtype == jnp.int8
    limit = np.abs(exact).max(axis=-1, keepdims=True) / 254
    assert np.all(np.abs(values * scale[..., None] - exact) <= 1.001 * limit)


@pytest.mark.slow
def test_a_cache_of_integers_gives_near_logits():
  errors = [np.abs(got - want).max() for got, want in continued(CONFIG, int8=True)]
  assert errors[0] < 1e-5  # a prompt is read before it is stored
  assert 1e-5 < max(errors) < 0.1


def test_a_slot_that_is_free_changes_no_other():
  prefill, decode = programs('plain')
  params = sampling_params(CONFIG, random_params(CONFIG))
  _, prefix = prefill(CONFIG, params, PROMPT_BP, LENGTH_B)
  both, alone = (
      decode(CONFIG, params, np.array([7, 8]), decode_lib.Slots(
          np.array([1, 0]), LENGTH_B[::-1], np.array(count), np.array(0)), prefix,
             decode_lib.empty(prefix, 2, COLUMNS))[0] for count in ([1, 1], [1, 0]))
  np.testing.assert_array_equal(both[0], alone[0])
  assert np.isfinite(alone).all()


def test_the_columns_that_slots_read_by_hand():
  """Of a ring of 4 columns at step 9, which writes column 1: a new slot, one of 3 tokens, and a free one."""
  slots = decode_lib.Slots(None, np.array([5, 6, 7]), np.array([1, 3, 0]), None)
  found = lambda window: [list(x) for x in decode_lib._columns_read(slots, np.array(1), 4, window)]
  assert found(0) == [[0, 0, 0], [5, 6, 0], [1, 3, 2], [1, 3, 0]]
  assert found(4) == [[2, 5, 0], [3, 1, 0], [1, 3, 2], [1, 3, 0]]  # of its last four tokens
  assert found(2) == [[4, 6, 0], [1, 0, 0], [1, 0, 2], [1, 2, 0]]


@pytest.mark.parametrize('layout, columns, widths', [
    ('plain', 1, [1]), ('plain', 16, [16]), ('plain', 17, [9, 9]), ('plain', 66, [17] * 4),
    ('tpu', 1, [128]), ('tpu', 128, [128]), ('tpu', 129, [256])])
def test_a_ring_has_chunks_for_all_columns(layout, columns, widths, monkeypatch):
  monkeypatch.setattr(decode_lib, 'layout', lambda: LAYOUTS[layout])
  prefix = (decode_lib.Cache(jnp.zeros((6, 5, 3, 2, 4), jnp.int8), jnp.zeros((6, 5, 3, 2, 4), jnp.int8),
                             jnp.zeros((6, 5, 3, 2)), jnp.zeros((6, 5, 3, 2))),) * 2
  rings = decode_lib.empty(prefix, 7, columns)
  assert len(rings) == 2
  for ring in rings:
    assert [chunk.k_LSKTH.shape for chunk in ring] == [(6, 7, 3, width, 4) for width in widths]
    assert [chunk.v_scale_LSKT.shape for chunk in ring] == [(6, 7, 3, width) for width in widths]
    assert {x.dtype.name for x in jax.tree.leaves(ring)} == {'int8', 'float32'}


def test_every_column_of_a_ring_is_written_once():
  """In chunks of 9: a step's column of a layer, and no other."""
  zeros = jnp.zeros((2, 1, 1, 4))
  (ring,) = decode_lib.empty((decode_lib.Cache(zeros[None], zeros[None]),), 2, 17)
  ring = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), ring)  # of three layers
  append = jax.jit(decode_lib._append)
  for column in range(18):
    ring = append(ring, decode_lib.Cache(zeros + column + 1, zeros - column - 1), 1, column)
  k, v = (np.concatenate(x, axis=3) for x in zip(*(chunk[:2] for chunk in ring)))
  for column in range(18):
    assert np.all(k[1, :, :, column] == column + 1)
  assert not np.any(k[[0, 2]])
  np.testing.assert_array_equal(v, -k)


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_sampling_params_are_of_the_computation(platform, monkeypatch):
  """In its dtype; on a TPU with the heads first."""
  monkeypatch.setattr(sharding, 'platform', lambda: platform)
  half, params = CONFIG.replace(dtype='bfloat16'), random_params(CONFIG)
  found = sampling_params(half, params)
  stages = found['layers']
  assert len(stages) == (1 if platform == 'tpu' else half.num_layers)
  layers = jax.tree.map(lambda *x: np.concatenate(x), *stages)
  trained = {'q_NHD': 'q_DNH', 'k_KHD': 'k_DKH', 'v_KHD': 'v_DKH'} if platform == 'tpu' else {}
  assert {trained.get(name, name) for name in layers} == set(params['layers'])
  assert set(trained) <= set(layers) and not set(trained.values()) & set(layers)
  for name, x in layers.items():
    assert x.dtype == (jnp.float32 if 'norm' in name else jnp.bfloat16)
    want = np.asarray(params['layers'][trained.get(name, name)])
    np.testing.assert_array_equal(x, (want.transpose(0, 2, 3, 1) if name in trained else want).astype(x.dtype))
  assert found['embed_VD'].dtype == jnp.bfloat16 and found['norm_D'].dtype == jnp.float32
