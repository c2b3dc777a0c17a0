"""Log-probabilities, entropies and their gradients, on every backend, sharded, and for real TPUs."""

import functools
import math

from hypothesis import given
from hypothesis import strategies as st
import jax
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from kr_jax.kernels import chip
from kr_jax.kernels.token_logprob import ops
from kr_jax.kernels.token_logprob import reference
from kr_jax.kernels.token_logprob import tiles
from kr_jax.kernels.token_logprob import token_logprob

TOPOLOGIES = ('v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1')
UNINITIALISED = pltpu.InterpretParams(uninitialized_memory='nan')
LARGE = dict(T=16384, D=2560, V=151936)  # a microbatch of a model of 4 billion parameters


def with_gradients(function):
  """(hidden, output, target, g_logp, g_entropy, temperature) -> logp, entropy and both gradients."""
  @functools.partial(jax.jit, static_argnames='temperature')
  def run(hidden_TD, output_DV, target_T, *g, temperature):
    values, back = jax.vjp(
        lambda *x: function(*x, target_T, temperature=temperature), hidden_TD, output_DV)
    return *values, *back(g)
  return run


def in_parts(forward, backward):
  """The same of the two passes on one device."""
  @functools.partial(jax.jit, static_argnames='temperature')
  def run(hidden_TD, output_DV, target_T, *g, temperature):
    args = hidden_TD, output_DV, target_T
    s, z_TV = forward(*args, temperature=temperature)
    d_hidden_TD, d_output_DV = backward(*args, z_TV, s, *g, temperature=temperature)
    assert d_hidden_TD.dtype == np.float32
    return (s.target_T - s.max_T - s.log_sum_T, s.entropy_T,
            d_hidden_TD.astype(hidden_TD.dtype), d_output_DV)
  return run


def on_kernel(tile):
  return in_parts(functools.partial(ops.kernel_forward, tile=tile, interpret=UNINITIALISED),
                  functools.partial(ops.kernel_backward, tile=tile, interpret=UNINITIALISED))


RUN = {
    'reference': with_gradients(reference.token_logprob),
    'public': with_gradients(token_logprob),
    'blocks': in_parts(functools.partial(ops.forward, width=96),
                       functools.partial(ops.backward, width=96)),
    'kernel': on_kernel((128, 128)),
    'wide_kernel': on_kernel((128, 256)),
}
slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
backends = pytest.mark.parametrize('backend', [
    'reference', pytest.param('public', marks=exhaustive), 'blocks', pytest.param('kernel', marks=slow)])


def run(backend: str, *args, temperature: float = 1.0) -> list[np.ndarray]:
  return [np.asarray(x) for x in RUN[backend](*args, temperature=temperature)]


def problem(T: int, D: int, V: int, dtype=np.float32, seed: int = 0):
  """Hidden, output, targets (among them the first and the last) and what both results weigh."""
  rng = np.random.default_rng(seed)
  target_T = rng.integers(0, V, T).astype(np.int32)
  target_T[0], target_T[-1] = 0, V - 1
  return (jnp.asarray(rng.normal(size=(T, D)), dtype), jnp.asarray(rng.normal(size=(D, V)), dtype),
          target_T, rng.normal(size=T).astype(np.float32), rng.normal(size=T).astype(np.float32))


def assert_close(found, expected, tolerance: float = 1e-5,
                 names=('logp', 'entropy', 'hidden', 'output')):
  """Relative to the largest number of an array, or to 0.1."""
  for name, x, y in zip(names, found, expected, strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape, name
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.all(np.isfinite(x)), name
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 0.1), err_msg=name)


@backends
def test_by_hand(backend):
  """Probabilities 1/8, 2/8 and 5/8, at a temperature of 2."""
  p_V = np.array([1, 2, 5]) / 8
  hidden_TD = np.array([[2, 0], [0, 2]], np.float32)
  output_DV = np.log([[1, 2, 5], [4, 4, 4]]).astype(np.float32)
  logp_T, entropy_T, d_hidden_TD, d_output_DV = run(
      backend, hidden_TD, output_DV, np.array([1, 0], np.int32), np.array([1, 0], np.float32),
      np.array([0, 1], np.float32), temperature=2.0)
  np.testing.assert_allclose(logp_T, [math.log(1 / 4), math.log(1 / 3)], rtol=1e-6)
  np.testing.assert_allclose(entropy_T, [-np.sum(p_V * np.log(p_V)), math.log(3)], rtol=1e-6)
  # Of the first row the log-probability counts, (1[v = 1] - p) / 2; the second has the most entropy.
  dz_V = np.array([-1, 6, -5]) / 16
  np.testing.assert_allclose(d_output_DV, [2 * dz_V, [0, 0, 0]], atol=1e-6)
  np.testing.assert_allclose(d_hidden_TD, [output_DV @ dz_V, [0, 0]], atol=1e-6)


# Tiles and blocks that are full, or not full in tokens, columns or both; less than one; one token.
SHAPES = [(200, 16, 300), (1, 8, 70)]
MORE_SHAPES = [(128, 16, 256), (1, 8, 1), (384, 24, 512), (129, 8, 129), (128, 8, 127), (3, 40, 900),
               (300, 8, 96), (7, 1, 2)]


def check_agreement(backend: str, shape):
  *args, a_T, b_T = problem(*shape)
  zero_T = np.zeros_like(a_T)
  early_T = np.where(np.arange(len(a_T)) < 100, a_T, 0)  # the tokens after it, a tile for some, are skipped
  late_T = np.where(np.arange(len(a_T)) < 100, 0, a_T)
  for g in ((a_T, b_T), (a_T, zero_T), (zero_T, b_T), (zero_T, zero_T), (early_T, zero_T),
            (zero_T, early_T), (late_T, late_T)):
    expected = run('reference', *args, *g, temperature=0.7)
    assert_close(run(backend, *args, *g, temperature=0.7), expected)


@pytest.mark.parametrize('backend, shape', [
    ('blocks', SHAPES[0]), pytest.param('public', SHAPES[0], marks=slow),
    pytest.param('kernel', SHAPES[0], marks=slow),
    pytest.param('kernel', SHAPES[1], marks=slow), pytest.param('public', SHAPES[1], marks=exhaustive),
    pytest.param('blocks', SHAPES[1], marks=exhaustive)], ids=str)
def test_agrees_with_the_reference(backend, shape):
  check_agreement(backend, shape)


@exhaustive
@pytest.mark.parametrize('backend', ['public', 'blocks', 'kernel', 'wide_kernel'])
def test_agrees_with_the_reference_in_more_shapes(backend):
  for shape in MORE_SHAPES + (SHAPES if backend == 'wide_kernel' else []):
    check_agreement(backend, shape)


def test_blocks_of_the_width_in_use():
  args = problem(5, 4, 2 * tiles.BLOCK_WIDTH + 100)
  assert_close(run('public', *args), run('reference', *args))


@pytest.mark.parametrize('backend', [pytest.param('blocks', marks=slow), pytest.param('kernel', marks=slow)])
def test_bfloat16(backend):
  """Values are as exact as from float32; in the gradients dz and the result are rounded to 8 bits."""
  args = problem(200, 16, 300, jnp.bfloat16)
  found, expected = run(backend, *args), run('reference', *args)
  assert_close(found[:2], expected[:2], names=('logp', 'entropy'))
  assert_close(found[2:], expected[2:], 0.01, names=('hidden', 'output'))


@backends
def test_extreme_logits(backend):
  """Differences of 1 between logits of 10^4, which are exact; elsewhere 20000 below the maximum."""
  hidden_TD = np.array([[1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, 0, 1]], np.float32)
  output_DV = np.full((3, 150), -1e4, np.float32)  # 150 is no whole tile: the last columns are no logits
  output_DV[0, [3, 140]] = 1e4, 1e4 - 1
  output_DV[1, 7] = 1e4
  target_T = np.array([140, 7, 140, 0], np.int32)
  g_T = np.ones(4, np.float32)
  logp_T, entropy_T, d_hidden_TD, d_output_DV = run(backend, hidden_TD, output_DV, target_T, g_T, g_T)
  p = 1 / (1 + math.e)  # of the target of the first token, whose rival is 1 above
  np.testing.assert_allclose(
      logp_T, [math.log(p), 0, -1e4 - 1e4 - math.log(148) + 1, -math.log(150)], rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(
      entropy_T, [-p * math.log(p) - (1 - p) * math.log(1 - p), 0, math.log(148), math.log(150)],
      rtol=1e-6, atol=1e-6)
  assert np.all(np.isfinite(d_hidden_TD)) and np.all(np.isfinite(d_output_DV))


@pytest.mark.parametrize('blocks', [pytest.param(False, marks=exhaustive), True])
def test_ranges(blocks):
  """A log-probability never exceeds 0, an entropy is in 0..log V, up to rounding."""
  T, D, V = 4, 3, 130

  @given(seed=st.integers(0, 2 ** 31), scale=st.sampled_from((0.0, 0.1, 1.0, 10.0, 1000.0)))
  def check(seed, scale):
    hidden_TD, *args = problem(T, D, V, seed=seed)
    logp_T, entropy_T, *gradients = run('blocks' if blocks else 'public', scale * hidden_TD, *args)
    assert np.all(logp_T <= 0)
    assert np.all(entropy_T >= -1e-6) and np.all(entropy_T <= math.log(V) + 1e-5)
    assert all(np.all(np.isfinite(x)) for x in gradients)

  check()


@exhaustive
def test_with_and_without_jit():
  *args, _, _ = problem(5, 4, 2500)
  found = token_logprob(*args, temperature=1.5)
  compiled = jax.jit(functools.partial(token_logprob, temperature=1.5))(*args)
  assert_close(found, compiled, 1e-6, names=('logp', 'entropy'))
  with jax.disable_jit():
    found = ops.forward(*args, temperature=1.5, width=1000)[0]
  np.testing.assert_allclose(found.target_T - found.max_T - found.log_sum_T, compiled[0], rtol=1e-5)


def mesh_of(data: int, fsdp: int, model: int, devices=None, kind=jax.sharding.AxisType.Auto) -> jax.sharding.Mesh:
  devices = jax.devices() if devices is None else devices
  sizes = data, fsdp, 1, model
  return jax.sharding.Mesh(np.array(devices)[:math.prod(sizes)].reshape(sizes), chip.AXES,
                           axis_types=(kind,) * len(sizes))


@pytest.mark.parametrize('sizes, V', [
    pytest.param((2, 2, 2), 136, marks=slow), pytest.param((2, 2, 2), 8 * 2100, marks=exhaustive),
    *(pytest.param(sizes, V, marks=exhaustive) for sizes in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (1, 1, 1))
      for V in (136, 8 * 2100))], ids=str)
def test_sharded(sizes, V):
  """As on one device, in one block and in several, wherever the arguments are."""
  args = problem(16, 8, V)
  expected = run('public', *args)
  mesh = mesh_of(*sizes)
  with jax.set_mesh(mesh):
    assert_close(run('public', *args), expected)
    output_DV = jax.device_put(
        args[1], jax.sharding.NamedSharding(mesh, PartitionSpec('fsdp', 'model')))
    found = RUN['public'](args[0], output_DV, *args[2:], temperature=1.0)
    assert_close(found, expected)


@pytest.mark.parametrize('sizes, T, V, named', [
    ((2, 2, 2), 6, 8, 'T=6 must be a multiple of 4, .* data and fsdp and expert; pad or choose another T'),
    ((1, 1, 8), 6, 12, 'V=12 must be a multiple of 8, .* model; pad or choose another V')])
def test_a_mesh_that_does_not_divide(sizes, T, V, named):
  *args, _, _ = problem(T, 4, V)
  with jax.set_mesh(mesh_of(*sizes)), pytest.raises(ValueError, match=named):
    token_logprob(*args)


def test_a_mesh_of_another_type():
  *args, _, _ = problem(8, 4, 8)
  explicit = mesh_of(2, 2, 2, kind=jax.sharding.AxisType.Explicit)
  with jax.set_mesh(explicit), pytest.raises(ValueError, match="'data', 'fsdp', 'expert', 'model'.* Auto"):
    token_logprob(*args)


@pytest.mark.parametrize('hidden, output, target', [
    ((2, 3, 4), (4, 5), (6,)), ((3, 4), (5, 4), (3,)), ((3, 4), (4, 5), (2,)), ((3, 4), (4, 5), (3, 1)),
    ((0, 4), (4, 5), (0,)), ((3, 4), (4, 0), (3,)), ((3, 0), (0, 5), (3,))])
def test_bad_shapes(hidden, output, target):
  with pytest.raises(ValueError) as error:
    token_logprob(np.zeros(hidden, np.float32), np.zeros(output, np.float32), np.zeros(target, np.int32))
  assert f'{hidden}, {output} and {target}; flatten' in str(error.value)


@pytest.mark.parametrize('hidden, output, target, named', [
    (np.float32, jnp.bfloat16, np.int32, 'not float32 and bfloat16; cast'),
    (np.float16, np.float16, np.int32, 'not float16 and float16'),
    (np.float32, np.float32, np.int16, 'int32, not int16; cast')])
def test_bad_types(hidden, output, target, named):
  with pytest.raises(TypeError, match=named):
    token_logprob(jnp.zeros((3, 4), hidden), jnp.zeros((4, 5), output), jnp.zeros(3, target))


@pytest.mark.parametrize('temperature, error', [
    (0.0, ValueError), (-1.0, ValueError), (math.inf, ValueError), (math.nan, ValueError),
    ('1', TypeError), (np.ones(1), TypeError)])
def test_bad_temperatures(temperature, error):
  *args, _, _ = problem(3, 4, 5)
  with pytest.raises(error, match='temperature='):
    token_logprob(*args, temperature=temperature)


def multiplied(tile_T: int, tile_V: int, T: int, V: int) -> int:
  """Logits that a pass of the kernel computes, with those of the padding."""
  full, rest = divmod(V, tile_V)
  return -(-T // tile_T) * tile_T * (full * tile_V + -(-rest // 128) * 128)


@pytest.mark.parametrize('vmem', [16, 64, 128])
def test_nothing_is_multiplied_twice(vmem, monkeypatch):
  """2 T D V operations forward and 6 backward, with little padding."""
  monkeypatch.setattr(tiles, 'vmem', lambda: vmem * 2 ** 20)
  T, D, V = LARGE.values()
  operations = D * (2 * multiplied(*tiles.forward(T, D, 2), T, V)
                    + 6 * multiplied(*tiles.backward(T, D, 2), T, V))
  assert 8 * T * D * V == operations
  # A shard of an eighth of the vocabulary, which is not whole rows of lanes, and tokens in no tiles.
  T, V = 5000, V // 8
  assert multiplied(*tiles.forward(T, D, 2), T, V) < 1.1 * T * V
  assert multiplied(*tiles.backward(T, D, 2), T, V) < 1.1 * T * V


@pytest.mark.parametrize('choose', [tiles.forward, tiles.backward])
def test_tiles(choose, monkeypatch):
  for T in (1, 127, 129, 1000, 2 ** 17):
    tile_T, tile_V = choose(T, 512, 2)
    assert tile_T % 128 == tile_V % 128 == 0
    assert tile_T <= 1024 and -T % tile_T < 128 * -(-T // tile_T)
  assert choose(4096, 4096, 2) and choose(4096, 1024, 4)
  assert choose(4096, 2 ** 15, 2) is None
  monkeypatch.setattr(tiles, 'vmem', lambda: 128 * 2 ** 20)
  assert max(choose(4096, 2560, 2)) == 1024


@functools.cache  # of five names
def devices(topology: str):
  return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices


@functools.cache  # two tests measure the same large program
def compile_for(topology: str, sizes=None, *, T: int, D: int, V: int, dtype='bfloat16',
                function=token_logprob):
  """The program of a sum of both results and its gradients, on one chip or over a mesh that is set."""
  mesh = mesh_of(*(sizes or (1, 1, 1)), devices=devices(topology))
  shard = lambda *axes: jax.sharding.NamedSharding(mesh, PartitionSpec(*axes))
  rows = ('data', 'fsdp')
  placed = [((T, D), dtype, shard(rows)), ((D, V), dtype, shard('fsdp', 'model')),
            ((T,), 'int32', shard(rows)), ((T,), 'float32', shard(rows)), ((T,), 'float32', shard(rows))]
  args = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype, where in placed]

  def loss(hidden_TD, output_DV, target_T, a_T, b_T):
    logp_T, entropy_T = function(hidden_TD, output_DV, target_T)
    return jnp.sum(logp_T * a_T + entropy_T * b_T)

  lower = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)),
                  out_shardings=(shard(), (placed[0][2], placed[1][2]))).lower
  if sizes is None:
    return lower(*args).compile()
  with jax.set_mesh(mesh):
    return lower(*args).compile()


def kernels(program) -> int:
  return program.as_text().count('custom_call_target="tpu_custom_call"')


def assert_lean(program, T: int, D: int) -> None:
  """Temporaries are the gradient to the hidden states in float32, and columns of 128 lanes."""
  assert kernels(program) == 2
  assert program.memory_analysis().temp_size_in_bytes < T * (4 * D + 8 * 4 * 128)


@pytest.mark.parametrize('topology', [
    pytest.param(topology, marks=slow if topology == 'v5e:2x2' else exhaustive) for topology in TOPOLOGIES])
def test_compiles_for_tpus(topology):
  """In tiles that fit every chip, as without a mesh the chip is unknown."""
  assert_lean(compile_for(topology, **LARGE), LARGE['T'], LARGE['D'])


@exhaustive
@pytest.mark.parametrize('topology', TOPOLOGIES)
def test_compiles_in_the_tiles_of_the_chip(topology):
  assert_lean(compile_for(topology, (1, 1, 1), **LARGE), LARGE['T'], LARGE['D'])


@exhaustive
@pytest.mark.parametrize('topology', ['v4:2x2x1', 'v5e:2x2'])
@pytest.mark.parametrize('D, V, dtype', [
    (576, 49152, 'float32'), (896, 5000, 'bfloat16'), (4096, 9999, 'bfloat16')])
def test_compiles_in_other_shapes(topology, D, V, dtype):
  assert kernels(compile_for(topology, (1, 1, 1), T=1000, D=D, V=V, dtype=dtype)) == 2


@exhaustive
@pytest.mark.parametrize('sizes', [(1, 1, 4), (2, 1, 2), (1, 2, 2)], ids=str)
def test_compiles_over_a_mesh(sizes):
  program = compile_for('v5e:2x2', sizes, **LARGE)
  assert kernels(program) == 2
  T, D, V = LARGE.values()
  # The gradient to the hidden states; the output matrix gathered, its gradient, and their sum.
  share = 2 * D * V // sizes[2]
  assert program.memory_analysis().temp_size_in_bytes < (
      1.5 * 4 * T * D // (sizes[0] * sizes[1]) + (3 * share if sizes[2] < 4 else share))


@exhaustive
def test_temporaries_are_a_twentieth_of_those_of_plain_logits():
  """On one v5e, whose memory the plain logits exceed: they are compiled for v5p."""
  temporaries = lambda program: program.memory_analysis().temp_size_in_bytes
  plain = temporaries(compile_for('v5p:2x2x1', function=reference.token_logprob, **LARGE))
  ours = [temporaries(compile_for('v5e:2x2', sizes, **LARGE)) for sizes in (None, (1, 1, 1))]
  print(plain, ours)
  assert 20 * max(ours) < 9.3e9 < plain


@exhaustive
def test_too_wide_for_a_kernel():
  assert not kernels(compile_for('v5e:2x2', T=128, D=2 ** 15, V=4096))
