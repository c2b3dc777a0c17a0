"""Attention of a decoding step, on every backend, over ragged slots, sharded, and for real TPUs."""

import functools
import math
import re

import jax
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from kr_jax.kernels.decode_attention import decode_attention
from kr_jax.kernels.decode_attention import kernel
from kr_jax.kernels.decode_attention import ops
from kr_jax.kernels.decode_attention import reference
from kr_jax.kernels.decode_attention import tiles

TOPOLOGIES = ('v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1')
UNINITIALISED = pltpu.InterpretParams(uninitialized_memory='nan')
LARGE = dict(S=32, N=32, K=8, T=2560, H=128)  # a policy of 4 billion parameters
LARGE_SHARD = dict(S=32, N=8, K=2, T=2560, H=128)  # of 'model' over 4
OF_SLOTS, OF_HEADS = PartitionSpec(('data', 'fsdp')), PartitionSpec(('data', 'fsdp'), 'model')
BLOCK_T = 128


def on_kernel(q_SNH, k_SKTH, v_SKTH, length_S, *, k_scale_SKT=None, v_scale_SKT=None):
  scales = () if k_scale_SKT is None else (k_scale_SKT, v_scale_SKT)
  return ops.kernel_attend(q_SNH, k_SKTH, v_SKTH, length_S, *scales,
                           block_T=min(BLOCK_T, k_SKTH.shape[2]), interpret=UNINITIALISED)


RUN = {'reference': jax.jit(reference.decode_attention), 'public': jax.jit(decode_attention),
       'kernel': jax.jit(on_kernel)}
SOURCES = jax.jit(functools.partial(kernel.sources, block_T=BLOCK_T))
backends = pytest.mark.parametrize('backend', list(RUN))


def problem(length_S, *, N=4, K=2, T=300, H=32, dtype=np.float32, dead=0.0, seed=0):
  """The arguments, and scales by name if dtype is int8. Dead columns hold `dead`, or dead scales."""
  rng = np.random.default_rng(seed)
  length_S = np.array(length_S, np.int32)
  S = len(length_S)
  live_SKT = np.broadcast_to((np.arange(T)[None] < length_S[:, None])[:, None], (S, K, T))
  integers = dtype == 'int8'

  def cache():
    if integers:
      return jnp.asarray(rng.integers(-127, 128, (S, K, T, H)), jnp.int8)
    x_SKTH = rng.normal(size=(S, K, T, H))
    return jnp.asarray(np.where(live_SKT[..., None], x_SKTH, dead), dtype)

  def scale():
    return np.where(live_SKT, rng.uniform(0.005, 0.02, (S, K, T)), dead).astype(np.float32)

  q_SNH = jnp.asarray(rng.normal(size=(S, N, H)), jnp.bfloat16 if integers else dtype)
  args = q_SNH, cache(), cache(), length_S
  return args, dict(k_scale_SKT=scale(), v_scale_SKT=scale()) if integers else {}


def run(backend: str, args, scales) -> np.ndarray:
  found = RUN[backend](*args, **scales)
  assert found.dtype == args[0].dtype and found.shape == args[0].shape
  return np.asarray(found, np.float32)


def slow(q_SNH, k_SKTH, v_SKTH, length_S, *, k_scale_SKT=None, v_scale_SKT=None) -> np.ndarray:
  """A head at a time, in float64, over the live columns alone."""
  q_SNH, k_SKTH, v_SKTH = (np.asarray(x, np.float64) for x in (q_SNH, k_SKTH, v_SKTH))
  if k_scale_SKT is not None:
    k_SKTH, v_SKTH = k_SKTH * k_scale_SKT[..., None], v_SKTH * v_scale_SKT[..., None]
  context_SNH = np.zeros(q_SNH.shape)
  for s, length in enumerate(length_S):
    for n in range(q_SNH.shape[1]):
      k = n // (q_SNH.shape[1] // k_SKTH.shape[1])
      if length:
        z_T = k_SKTH[s, k, :length] @ q_SNH[s, n] / math.sqrt(q_SNH.shape[2])
        p_T = np.exp(z_T - z_T.max())
        context_SNH[s, n] = p_T / p_T.sum() @ v_SKTH[s, k, :length]
  return context_SNH


@backends
def test_by_hand(backend):
  """Weights 1/4 and 3/4, of two query heads the second turned round; then a single column; then none."""
  k_SKTH, v_SKTH = np.full((2, 3, 1, 4, 4), np.nan if backend == 'kernel' else 7, np.float32)
  k_SKTH[:2, 0, 0], k_SKTH[:2, 0, 1] = 0, [math.log(3), 0, 0, 0]
  v_SKTH[:2, 0, 0], v_SKTH[:2, 0, 1] = [4, 0, 0, 8], [0, 4, 0, 8]
  q_SNH = np.array([[[2, 0, 0, 0], [-2, 0, 0, 0]]] * 3, np.float32)  # H**-0.5 is 1 / 2
  found = run(backend, (q_SNH, k_SKTH, v_SKTH, np.array([2, 1, 0], np.int32)), {})
  np.testing.assert_allclose(
      found, [[[1, 3, 0, 8], [3, 1, 0, 8]], [[4, 0, 0, 8]] * 2, [[0] * 4] * 2], rtol=1e-6, atol=1e-6)


# None, one, all, at a block's bounds and beside them; free slots first, last and between.
RAGGED = (0, 1, 300, 127, 128, 0, 129, 257, 0)


@pytest.mark.parametrize('dtype', [np.float32, 'int8'])
@pytest.mark.parametrize('backend', ['reference', 'public'])
def test_agrees_with_a_slow_loop(backend, dtype):
  args, scales = problem(RAGGED, dtype=dtype, dead=1e30)
  tolerance = 1e-5 if dtype == np.float32 else 0.01  # q and the result are bfloat16
  np.testing.assert_allclose(run(backend, args, scales), slow(*args, **scales), atol=tolerance)


def check_kernel(tolerance: float, length_S=RAGGED, **shape) -> None:
  args, scales = problem(length_S, dead=np.nan, **shape)
  expected = run('reference', args, scales)
  assert np.all(np.isfinite(expected))
  found = run('kernel', args, scales)
  np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
  assert not np.any(found[np.array(length_S) == 0])


@pytest.mark.parametrize('dtype, tolerance', [
    (np.float32, 1e-5), ('int8', 0.01), pytest.param(jnp.bfloat16, 0.01, marks=pytest.mark.slow)])
def test_kernel(dtype, tolerance):
  """As the reference; of bfloat16 the weights are rounded to 8 bits, as the result is."""
  check_kernel(tolerance, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize('dtype, tolerance', [(np.float32, 1e-5), (jnp.bfloat16, 0.01), ('int8', 0.01)])
@pytest.mark.parametrize('N, K, T, H', [
    (4, 4, 384, 64), (6, 3, 300, 64), (8, 2, 257, 128), (8, 1, 256, 128), (16, 2, 128, 64),
    (3, 1, 70, 32), (1, 1, 1, 8)])
def test_kernel_in_more_shapes(N, K, T, H, dtype, tolerance):
  bounds = {first + i for first in range(0, T + 1, BLOCK_T) for i in (-1, 0, 1)}
  lengths = sorted({n for n in bounds if 0 <= n <= T} | {T - 1, T})
  check_kernel(tolerance, lengths, N=N, K=K, T=T, H=H, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize('q, cache', [(jnp.bfloat16, np.float32), (np.float32, jnp.bfloat16),
                                      (np.float32, jnp.int8)])
def test_kernel_of_mixed_types(q, cache):
  args, scales = problem(RAGGED, dtype='int8' if cache == jnp.int8 else cache, dead=np.nan)
  args = args[0].astype(q), *args[1:]
  expected = run('reference', args, scales)
  tolerance = 1e-5 if q == np.float32 else 0.01
  np.testing.assert_allclose(run('kernel', args, scales), expected, atol=tolerance)


@pytest.mark.slow
def test_all_slots_free():
  args, scales = problem([0, 0, 0], dead=np.nan)
  assert not np.any(run('kernel', args, scales))


@pytest.mark.parametrize('backend', [
    'reference', 'public', pytest.param('kernel', marks=pytest.mark.slow)])
def test_large_logits(backend):
  """Of 10^4 in one block, the first or the second, and of -10^4 in the other."""
  v_SKTH = np.arange(256, dtype=np.float32).reshape(1, 1, 256, 1)
  for first, expected in ((1e4, 63.5), (-1e4, 191.5)):
    k_SKTH = np.where(v_SKTH < 128, first, -first).astype(np.float32)
    args = np.ones((1, 1, 1), np.float32), k_SKTH, v_SKTH, np.array([256], np.int32)
    np.testing.assert_allclose(run(backend, args, {}), expected, rtol=1e-6)


@pytest.mark.parametrize('lengths', [
    RAGGED, (0, 0, 0), (0, 5, 0), (300, 300), (5,), (0, 0, 257, 0, 1, 0)], ids=str)
def test_fetches_every_live_block_once(lengths):
  """The pipeline of a grid fetches a block where a step's is another than that of the step before."""
  blocks = 3
  sources = [np.asarray(x) for x in SOURCES(np.array(lengths, np.int32))]
  steps = np.repeat(np.arange(len(lengths)), blocks), np.tile(np.arange(blocks), len(lengths))
  found = [tuple(step) for step in np.stack(kernel.source(*steps, *sources), axis=1).tolist()]
  fetched = [b for i, b in enumerate(found) if i == 0 or b != found[i - 1]]
  live = [(s, t) for s, length in enumerate(lengths) for t in range(-(-length // BLOCK_T))]
  assert fetched == (live or [(0, 0)])
  for step, there in zip(zip(*(x.tolist() for x in steps)), found, strict=True):
    assert step not in live or there == step


def test_computes_live_blocks_only(monkeypatch):
  """Counted as it runs: two products to a block."""
  products = []
  dot = kernel._dot

  def counted(*args):
    jax.debug.callback(lambda: products.append(1))
    return dot(*args)

  monkeypatch.setattr(kernel, '_dot', counted)
  args, _ = problem((0, 1, 300, 128, 129, 0))
  jax.block_until_ready(jax.jit(lambda *args: on_kernel(*args))(*args))
  jax.effects_barrier()
  assert len(products) == 2 * (0 + 1 + 3 + 1 + 2 + 0)


def test_with_and_without_jit():
  args, scales = problem((3, 0, 40), T=40)
  found = decode_attention(*args, **scales)
  np.testing.assert_allclose(found, run('public', args, scales), rtol=1e-5, atol=1e-6)
  with jax.disable_jit():
    np.testing.assert_allclose(ops.attend(*args), found, rtol=1e-5, atol=1e-6)
  beyond = *args[:3], np.array([3, -1, 41], np.int32)
  np.testing.assert_array_equal(decode_attention(*beyond), found)


def mesh_of(*sizes: int, devices=None, kind=AxisType.Auto) -> jax.sharding.Mesh:
  devices = jax.devices() if devices is None else devices
  return jax.sharding.Mesh(np.array(devices)[:math.prod(sizes)].reshape(sizes), ops.AXES,
                           axis_types=(kind,) * 3)


@pytest.mark.parametrize('dtype', [np.float32, pytest.param('int8', marks=pytest.mark.slow)])
@pytest.mark.parametrize('sizes', [
    (8, 1, 1), (4, 1, 2),
    *(pytest.param(sizes, marks=pytest.mark.slow)
      for sizes in ((2, 2, 2), (1, 2, 4), (1, 1, 1)))], ids=str)
def test_sharded(sizes, dtype):
  """As on one device, wherever the arguments are."""
  args, scales = problem((0, 1, 40, 5, 0, 39, 17, 2), N=8, K=4, T=40, dtype=dtype)
  expected = run('public', args, scales)
  mesh = mesh_of(*sizes)
  with jax.set_mesh(mesh):
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    assert_close(run('public', args, scales), expected)
    placed = [jax.device_put(x, NamedSharding(mesh, OF_SLOTS if x.ndim == 1 else OF_HEADS))
              for x in args]
    found = RUN['public'](*placed, **scales)
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, OF_HEADS), 3)
    assert_close(np.asarray(found, np.float32), expected)


@pytest.mark.parametrize('manual', [
    ('data', 'fsdp'), *(pytest.param(manual, marks=pytest.mark.slow)
                        for manual in (('data',), ('data', 'fsdp', 'model')))], ids=str)
def test_inside_a_shard_map(manual):
  """Over what is left of the mesh, in a loop as the sampler's; over all axes there is nothing left."""
  args, _ = problem((0, 1, 40, 5, 0, 39, 17, 2), N=8, K=4, T=40)
  of_heads = PartitionSpec(manual[:2], *manual[2:])

  def twice(q_SNH, *args):
    return jax.lax.fori_loop(0, 2, lambda _, q_SNH: decode_attention(q_SNH, *args), q_SNH)

  expected = jax.jit(twice)(*args)
  with jax.set_mesh(mesh_of(2, 2, 2)):
    found = jax.jit(jax.shard_map(
        twice, axis_names=set(manual), in_specs=(of_heads,) * 3 + (PartitionSpec(manual[:2]),),
        out_specs=of_heads, check_vma=False))(*args)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('sizes, S, N, K, named', [
    ((2, 2, 2), 6, 4, 2, 'S=6 must be a multiple of 4, .* data and fsdp; choose another S'),
    ((1, 1, 4), 1, 6, 2, 'N=6 must be a multiple of 4, .* model; choose'),
    ((1, 1, 8), 1, 8, 4, 'K=4 must be a multiple of 8, .* model; choose')])
def test_a_mesh_that_does_not_divide(sizes, S, N, K, named):
  args, _ = problem([1] * S, N=N, K=K, T=8)
  with jax.set_mesh(mesh_of(*sizes)), pytest.raises(ValueError, match=named):
    decode_attention(*args)


def test_a_mesh_of_another_type():
  args, _ = problem([1] * 8, T=8)
  with jax.set_mesh(mesh_of(2, 2, 2, kind=AxisType.Explicit)), pytest.raises(
      ValueError, match="'data', 'fsdp', 'model'.* Auto"):
    decode_attention(*args)


@pytest.mark.parametrize('q, k, v, length', [
    ((2, 4), (2, 2, 8, 4), (2, 2, 8, 4), (2,)), ((2, 4, 4), (2, 2, 8, 4), (2, 2, 9, 4), (2,)),
    ((2, 4, 4), (3, 2, 8, 4), (3, 2, 8, 4), (2,)), ((2, 4, 4), (2, 2, 8, 5), (2, 2, 8, 5), (2,)),
    ((2, 4, 4), (2, 2, 8, 4), (2, 2, 8, 4), (3,)), ((2, 4, 4), (2, 2, 8, 4), (2, 2, 8, 4), (2, 1)),
    ((2, 4, 4), (2, 2, 0, 4), (2, 2, 0, 4), (2,)), ((0, 4, 4), (0, 2, 8, 4), (0, 2, 8, 4), (0,))])
def test_bad_shapes(q, k, v, length):
  with pytest.raises(ValueError) as error:
    decode_attention(*(np.zeros(x, np.float32) for x in (q, k, v)), np.zeros(length, np.int32))
  assert f'not the shapes {q}, {k}, {v} and {length}; heads stand' in str(error.value)


def test_heads_that_do_not_divide():
  args, _ = problem([1], N=3, K=2, T=8)
  with pytest.raises(ValueError, match='N=3 query heads must be a multiple of K=2 .*; use'):
    decode_attention(*args)


def test_bad_scales():
  args, scales = problem([1], T=8, dtype='int8')
  k, v = scales.values()
  for found, named in (
      ({}, 'not None and None; pass'), (dict(k_scale_SKT=k), r'not \(1, 2, 8\) and None; pass'),
      (dict(k_scale_SKT=k, v_scale_SKT=v[..., None]), r'not \(1, 2, 8\) and \(1, 2, 8, 1\); pass')):
    with pytest.raises(ValueError, match=r'int8 need k_scale_SKT and v_scale_SKT, of shape \(1, 2, 8\), '
                       + named):
      decode_attention(*args, **found)
  with pytest.raises(TypeError, match='scales must be float32, not bfloat16; cast'):
    decode_attention(*args, k_scale_SKT=k, v_scale_SKT=jnp.asarray(v, jnp.bfloat16))
  args, _ = problem([1], T=8)
  with pytest.raises(ValueError, match='float32 have no scales; leave'):
    decode_attention(*args, k_scale_SKT=k)


@pytest.mark.parametrize('q, k, v, length, named', [
    (np.float16, np.float32, np.float32, np.int32, 'q must be .* not float16; cast'),
    (np.float32, np.float32, jnp.bfloat16, np.int32, 'not float32 and bfloat16; cast'),
    (np.float32, np.int16, np.int16, np.int32, 'not int16 and int16; cast'),
    (np.float32, np.float32, np.float32, np.int16, 'lengths must be int32, not int16; cast')])
def test_bad_types(q, k, v, length, named):
  with pytest.raises(TypeError, match=named):
    decode_attention(jnp.zeros((1, 2, 4), q), jnp.zeros((1, 2, 8, 4), k), jnp.zeros((1, 2, 8, 4), v),
                     jnp.zeros(1, length))


def test_blocks():
  """T or a multiple of 128, and no more of it than one is needed for."""
  for T in (1, 100, 128, 130, 2500, 2560, 2 ** 15):
    for itemsize in (1, 2, 4):
      block_T = tiles.block(T, 8, 4, 128, itemsize)
      assert block_T == T or (block_T % 128 == 0 and block_T < T)
      assert -T % block_T < 128 * -(-T // block_T)
  assert tiles.block(2560, 8, 4, 128, 2) <= tiles.block(2560, 2, 4, 128, 2)
  assert tiles.block(128, 128, 1, 128, 4) is None


@functools.cache
def devices(topology: str):
  return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices


def abstract(mesh, S: int, N: int, K: int, T: int, H: int, dtype: str, q: str = 'bfloat16'):
  """Arguments on the mesh; for int8 with scales."""
  heads, slots = NamedSharding(mesh, OF_HEADS), NamedSharding(mesh, OF_SLOTS)
  like = lambda shape, dtype, where=heads: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  scales = [like((S, K, T), 'float32')] * 2 if dtype == 'int8' else []
  return [like((S, N, H), q), *[like((S, K, T, H), dtype)] * 2, like((S,), 'int32', slots), *scales]


def with_scales(q_SNH, k_SKTH, v_SKTH, length_S, *scales):
  return decode_attention(q_SNH, k_SKTH, v_SKTH, length_S,
                          **dict(zip(('k_scale_SKT', 'v_scale_SKT'), scales)))


def lower(function, topology: str, sizes, **shape):
  """The compiled program; over a mesh that is set, or on one chip that nothing is said of."""
  mesh = mesh_of(*(sizes or (1, 1, 1)), devices=devices(topology))
  program = jax.jit(function)
  if sizes is None:
    return program.lower(*abstract(mesh, **shape)).compile()
  with jax.set_mesh(mesh):
    return program.lower(*abstract(mesh, **shape)).compile()


def of_size(program, least: int) -> set[str]:
  """Operations with a result of so many numbers, but those that move none.

  Asked of the text, as temporaries that the compiler finds room for in VMEM are not counted.
  """
  found = re.findall(r'= \w+\[([\d,]*)\]\S* ([\w-]+)\(', program.as_text())
  return {name for shape, name in found if math.prod(map(int, filter(None, shape.split(',')))) >= least
          } - {'parameter', 'get-tuple-element', 'bitcast'}


def assert_lean(program, S: int, N: int, K: int, T: int, H: int, chips: int = 1) -> None:
  """One kernel, and nothing as large as a sixteenth of the keys."""
  assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
  assert not of_size(program, S * K * T * H // (16 * chips))
  assert program.memory_analysis().temp_size_in_bytes < 2 ** 20 < S * K * T * H // chips


@pytest.mark.parametrize('topology, dtype', [
    pytest.param(topology, dtype, marks=[pytest.mark.slow] * ((topology, dtype) != ('v5e:2x2', 'int8')))
    for topology in TOPOLOGIES for dtype in ('bfloat16', 'int8')])
def test_compiles_for_tpus(topology, dtype):
  assert_lean(lower(with_scales, topology, None, dtype=dtype, **LARGE), **LARGE)


@pytest.mark.slow
@pytest.mark.parametrize('topology', TOPOLOGIES)
@pytest.mark.parametrize('shape', [LARGE, LARGE_SHARD], ids=['whole', 'shard'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_compiles_in_the_blocks_of_the_chip(topology, shape, dtype):
  assert_lean(lower(with_scales, topology, (1, 1, 1), dtype=dtype, **shape), **shape)


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v4:2x2x1', 'v5e:2x2', 'tpu7x:2x2x1'])
@pytest.mark.parametrize('N, K, T, H, q, dtype', [
    (4, 4, 128, 64, 'float32', 'float32'), (9, 3, 1000, 64, 'bfloat16', 'bfloat16'),
    (14, 2, 2500, 64, 'bfloat16', 'int8'), (16, 2, 130, 128, 'float32', 'bfloat16'),
    (32, 32, 2560, 128, 'bfloat16', 'bfloat16'), (4, 2, 100, 32, 'bfloat16', 'int8'),
    (8, 8, 32768, 128, 'float32', 'float32'), (64, 8, 8192, 128, 'float32', 'int8')])
def test_compiles_in_other_shapes(topology, N, K, T, H, q, dtype):
  program = lower(with_scales, topology, (1, 1, 1), S=8, N=N, K=K, T=T, H=H, q=q, dtype=dtype)
  assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(4, 1, 1), (1, 1, 4), (2, 1, 2)], ids=str)
@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_compiles_over_a_mesh(sizes, dtype):
  """Each chip reads its part; none is sent to another."""
  program = lower(with_scales, 'v5e:2x2', sizes, dtype=dtype, **LARGE)
  assert_lean(program, **LARGE, chips=4)
  assert not re.search(r'all-|collective', program.as_text())


def steps(q_SNH, k_SKTH, v_SKTH, length_S, *scale_SKT):
  """100 decoding steps from an empty cache, of what stands for keys and values."""
  S, K = k_SKTH.shape[:2]

  def step(_, carry):
    q_SNH, length_S, *cache = carry
    new_SKH = q_SNH[:, :K]
    new = [new_SKH] * 2 + [jnp.abs(new_SKH[..., 0]).astype(jnp.float32)] * len(scale_SKT)
    at = jnp.arange(S)[:, None], jnp.arange(K)[None], length_S[:, None]
    cache = [x.at[at].set(y.astype(x.dtype), mode='drop') for x, y in zip(cache, new, strict=True)]
    length_S += 1
    return with_scales(q_SNH, *cache[:2], length_S, *cache[2:]), length_S, *cache

  empty = [jnp.zeros_like(x) for x in (k_SKTH, v_SKTH, *scale_SKT)]
  return jax.lax.fori_loop(0, 100, step, (q_SNH, length_S, *empty))[0]


WRITING = {'broadcast', 'scatter', 'fusion'}  # the cache is made empty, and written to


@pytest.mark.slow
@pytest.mark.parametrize('topology', TOPOLOGIES)
@pytest.mark.parametrize('dtype, H', [('bfloat16', 128), ('bfloat16', 64), ('int8', 128)])
def test_a_loop_does_not_copy_the_cache(topology, dtype, H):
  """Columns that are written as ops.py says are written in place, and lie as the kernel reads them."""
  shape = {**LARGE, 'H': H}
  program = lower(steps, topology, (1, 1, 1), dtype=dtype, **shape)
  assert of_size(program, math.prod(shape[i] for i in 'SKTH')) <= WRITING
  cache = 2 * math.prod(shape[i] for i in 'SKT') * (2 * 128 if dtype == 'bfloat16' else 128 + 4)
  assert program.memory_analysis().temp_size_in_bytes < 1.01 * cache


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_a_loop_inside_a_shard_map_does_not_copy_the_cache(dtype):
  """As the sampler's, over 'data' and 'fsdp', with 'model' left to the partitioner."""
  sizes = (2, 1, 2)
  mesh = mesh_of(*sizes, devices=devices('v5e:2x2'))
  sharded = jax.shard_map(steps, mesh=mesh, axis_names={'data', 'fsdp'}, in_specs=OF_SLOTS,
                          out_specs=OF_SLOTS, check_vma=False)
  program = lower(sharded, 'v5e:2x2', sizes, dtype=dtype, **LARGE)
  assert of_size(program, math.prod(LARGE[i] for i in 'SKTH') // 4) <= WRITING
  assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
