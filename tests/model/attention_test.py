"""Attention of packed rows against a plain loop, and the TPU's kernel against its plain form."""

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax import sharding
from kr_jax.model import attention

B, T, N, K, H = 2, 42, 4, 2, 8


def inputs(length=T, seed=0):
  """q, k, v, and segments of random lengths, the last of which is padding."""
  rng = np.random.default_rng(seed)
  q, k, v = (rng.normal(size=(B, length, heads, H)).astype(np.float32) for heads in (N, K, K))
  segment_BT = np.sort(rng.integers(0, 4, (B, length)), axis=1)
  return q, k, v, np.where(segment_BT == 3, -1, segment_BT).astype(np.int32)


def by_loop(q, k, v, segment_BT, window):
  """Token by token and head by head, in float64."""
  q, k, v = (np.asarray(x, float) for x in (q, k, v))
  found = np.zeros(q.shape)
  for b, t, n in np.ndindex(q.shape[:3]):
    read = [s for s in range(t + 1) if segment_BT[b, s] == segment_BT[b, t] and (not window or t - s < window)]
    weight = np.exp([q[b, t, n] @ k[b, s, n // (N // K)] / H ** 0.5 for s in read])
    found[b, t, n] = weight / weight.sum() @ v[b, read, n // (N // K)]
  return found


def test_rotations_by_hand():
  """A quarter of a rotation takes (1, 0) to (0, 1); heads turn alike, positions do not."""
  x_BTNH = jnp.broadcast_to(jnp.array([1.0, 0.0]), (1, 3, 2, 2))
  position_BT = jnp.array([[0.0, 1.0, np.pi / 2]])
  found = attention.rope(x_BTNH, attention.rope_table(position_BT, attention.frequencies(10.0, 2)))
  wanted = [[1, 0], [np.cos(1), np.sin(1)], [0, 1]]
  for n in range(2):
    np.testing.assert_allclose(found[0, :, n], wanted, atol=1e-6)
  # The pairs are (i, i + H/2); the second turns by theta^(-1/2).
  table = attention.rope_table(jnp.array([[1.0]]), attention.frequencies(100.0, 4))
  found = attention.rope(jnp.array([[[[1.0, 2.0, 0.0, 0.0]]]]), table)
  np.testing.assert_allclose(found[0, 0, 0], [np.cos(1), 2 * np.cos(0.1), np.sin(1), 2 * np.sin(0.1)], rtol=1e-6)


def test_llama_3_scaling_by_its_published_formula():
  """High frequencies stay, low ones are divided by 8, between them both are mixed."""
  found = attention.frequencies(500_000.0, 128, attention.Scaling('llama3', 8.0, 1.0, 4.0, 8192.0))
  for i, x in enumerate(found):
    frequency = 500_000.0 ** (-i / 64)
    wavelength = 2 * np.pi / frequency
    if wavelength > 8192:
      frequency /= 8
    elif wavelength > 8192 / 4:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      frequency = (1 - smooth) * frequency / 8 + smooth * frequency
    assert x == pytest.approx(frequency, rel=1e-6)
  np.testing.assert_allclose(attention.frequencies(100.0, 4, attention.Scaling('linear', 4.0)), [0.25, 0.025])


def test_yarn_by_its_published_formula():
  """Pairs that turn more than 32 times in the context stay, those below one turn are divided, by the pair's number."""
  theta, width, context, factor = 1e6, 128, 32_768, 4.0
  pair = lambda turns: width * np.log(context / (turns * 2 * np.pi)) / (2 * np.log(theta))
  for truncate in (True, False):
    first, last = (np.floor(pair(32)), np.ceil(pair(1))) if truncate else (pair(32), pair(1))
    found = attention.frequencies(theta, width, attention.Scaling(
        'yarn', factor, low=1.0, high=32.0, context=context, truncate=truncate))
    for i, x in enumerate(found):
      frequency = theta ** (-2 * i / width)
      divided = min(max((i - first) / (last - first), 0), 1)
      assert x == pytest.approx(frequency * (1 - divided) + frequency / factor * divided, rel=1e-6)
    assert found[0] == 1 and found[-1] == pytest.approx(theta ** (-126 / 128) / factor, rel=1e-6)
  # All pairs turn less than once: the bounds meet, and no share is a quotient of zeros.
  assert np.all(np.isfinite(attention.frequencies(1e4, 8, attention.Scaling('yarn', 2.0, 1.0, 32.0, context=4))))


def test_longrope_has_a_divisor_of_each_pair():
  found = attention.frequencies(100.0, 4, attention.Scaling('longrope', divisors=(1.0, 4.0)))
  np.testing.assert_allclose(found, [1, 0.1 / 4], rtol=1e-6)


def test_a_part_of_a_head_rotates():
  """The first numbers, in pairs of their own; the rest stay, and a factor lengthens what rotates."""
  table = attention.rope_table(jnp.array([[np.pi / 2]]), attention.frequencies(10.0, 2), 1.5)
  found = attention.rope(jnp.array([[[[1.0, 0.0, 5.0, 7.0]]]]), table)
  np.testing.assert_allclose(found[0, 0, 0], [0, 1.5, 5, 7], atol=1e-6)


def test_a_layer_takes_what_is_for_its_kind():
  options = [{'x': jnp.array([i, 2 * i])} for i in range(3)]
  for i, wanted in enumerate(options):
    assert attention.of_kind(i, options) is wanted
    np.testing.assert_array_equal(attention.of_kind(jnp.array(i), options)['x'], wanted['x'])


def test_masked_attention_is_that_of_a_loop():
  q, k, v, segment_BT = inputs(12)
  for window in (0, 1, 3):
    np.testing.assert_allclose(
        attention.masked(q, k, v, segment_BT, window), by_loop(q, k, v, segment_BT, window), atol=1e-5)


def test_packed_is_masked_by_the_kind_of_a_layer():
  """Where the layer is known and where layers are scanned; the result has a name for jax.checkpoint."""
  q, k, v, segment_BT = inputs()
  windows = (3, 0, 3)
  packed = jax.jit(lambda kind: attention.packed(q, k, v, segment_BT, windows=windows, kind=kind))
  for kind, window in enumerate(windows):
    wanted = attention.masked(q, k, v, segment_BT, window)
    known = attention.packed(q, k, v, segment_BT, windows=windows, kind=kind)
    np.testing.assert_array_equal(known, wanted)
    np.testing.assert_allclose(packed(kind), wanted, atol=1e-6)
  for kind in (0, jnp.array(1)):  # all layers read the same window: there is nothing to choose
    np.testing.assert_array_equal(attention.packed(q, k, v, segment_BT, windows=(3, 3), kind=kind),
                                  attention.masked(q, k, v, segment_BT, 3))
  jaxpr = jax.make_jaxpr(lambda q: attention.packed(q, k, v, segment_BT))(q)
  assert 'name=attention' in str(jaxpr)


def with_gradient(attend):
  """context_BTNH of attend(q, k, v), and the gradients of a sum of it."""
  weight_H = jnp.arange(1.0, H + 1)[None, None, None]
  gradient = jax.grad(lambda qkv: (jnp.sum((y := attend(*qkv)) * weight_H), y), has_aux=True)
  return jax.jit(lambda *qkv: gradient(qkv))


@pytest.mark.parametrize('length, window', [
    (42, 0), pytest.param(42, 5, marks=pytest.mark.slow), pytest.param(128, 0, marks=pytest.mark.exhaustive),
    pytest.param(128, 5, marks=pytest.mark.slow), pytest.param(300, 7, marks=pytest.mark.exhaustive)])
def test_the_tpu_kernel_is_masked_attention(length, window):
  """Values and gradients, of rows that are whole tiles and of rows that are not, interpreted on this CPU."""
  q, k, v, segment_BT = inputs(length)
  found, wanted = (with_gradient(attend)(q, k, v) for attend in (
      lambda *qkv: attention.splash(*qkv, segment_BT, window, interpret=True),
      lambda *qkv: attention.masked(*qkv, segment_BT, window)))
  assert found[1].shape == q.shape
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-5), found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{'data': 1}, {'data': 2, 'model': 2}], ids=str)
def test_rows_of_the_shipped_config_compile_for_a_tpu(axes):
  """Of 42 tokens, of layers of both kinds, with the gradient; on a mesh key/value heads are repeated."""
  devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices
  mesh = sharding.mesh(devices[:int(np.prod(list(axes.values())))], **axes)
  at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shapes = [jax.ShapeDtypeStruct((B, 42, heads, 64), jnp.bfloat16, sharding=at) for heads in (4, 1, 1)]
  segment_BT = jax.ShapeDtypeStruct((B, 42), jnp.int32, sharding=at)
  kind = jax.ShapeDtypeStruct((), jnp.int32, sharding=at)
  loss = lambda q, k, v, segment_BT, kind: jnp.sum(
      attention.packed(q, k, v, segment_BT, windows=(0, 16), kind=kind).astype(jnp.float32))
  with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, segment_BT, kind).compile().as_text()
  assert 'splash_mha_fwd' in text and 'splash_mha_dkv' in text and 'conditional' in text
