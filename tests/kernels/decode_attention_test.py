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

from kr_jax.kernels import chip
from kr_jax.kernels.decode_attention import decode_attention
from kr_jax.kernels.decode_attention import kernel
from kr_jax.kernels.decode_attention import ops
from kr_jax.kernels.decode_attention import reference
from kr_jax.kernels.decode_attention import tiles

TOPOLOGIES = ('v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1')
UNINITIALISED = pltpu.InterpretParams(uninitialized_memory='nan')
# A policy of 4 billion parameters: whole, and a shard of 'model' over 4.
LARGE = dict(S=32, N=32, K=8, M=16, P=512, T=2048, H=128)
LARGE_SHARD = dict(S=32, N=8, K=2, M=16, P=512, T=2048, H=128)
OF_SLOTS, OF_HEADS = PartitionSpec(('data', 'fsdp')), PartitionSpec(('data', 'fsdp'), 'model')
OF_PREFIX = PartitionSpec(None, 'model')
BLOCK_T = 128


def on_kernel(q_SNH, prefix, own, *of_slots, layer=None):
  if layer is None:
    layer, (prefix, own) = 0, stacked((prefix, own), 0, 1)
  (S, N, H), K = q_SNH.shape, prefix[0].shape[2]
  context_SKGH = ops.kernel_attend(
      q_SNH.reshape(S, K, N // K, H), prefix, own, layer, *of_slots,
      block=lambda T, *_: min(BLOCK_T, T), interpret=UNINITIALISED)
  return context_SKGH.reshape(S, N, H).astype(q_SNH.dtype)


def stacked(tree, layer: int, layers: int):
  """Keys and values among those of other layers, which are not finite."""
  def stack(x):
    filled = np.full((layers, *x.shape), -128 if x.dtype == jnp.int8 else np.nan, x.dtype)
    filled[layer] = x
    return filled
  return jax.tree.map(stack, tree) if layers > 1 else jax.tree.map(lambda x: x[None], tree)


RUN = {'reference': jax.jit(reference.decode_attention), 'public': jax.jit(decode_attention),
       'kernel': jax.jit(on_kernel)}
SCHEDULE = jax.jit(kernel.schedule, static_argnums=(3, 4))
backends = pytest.mark.parametrize('backend', list(RUN))
slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive


def alive(first_S, length_S, T: int) -> np.ndarray:
  """A column at a time."""
  live_ST = np.zeros((len(length_S), T), bool)
  for s, (first, length) in enumerate(zip(first_S, length_S)):
    for i in range(length):
      live_ST[s, (first + i) % T] = True
  return live_ST


def problem(length_S, first_S=None, *, N=4, K=2, M=3, P=70, T=300, H=32, chunks=1, dtype=np.float32,
            dead=0.0, seed=0):
  """The arguments. Slots of length 0 have no prefix. Dead columns hold `dead`, of int8 their scales."""
  rng = np.random.default_rng(seed)
  length_S = np.array(length_S, np.int32)
  S = len(length_S)
  first_S = np.array(rng.integers(0, T, S) if first_S is None else first_S, np.int32)
  row_S = rng.integers(0, M, S).astype(np.int32)
  prompt_M = rng.integers(1, P + 1, M)
  prompt_M[0] = P
  prompt_S = np.where(length_S > 0, prompt_M[row_S], 0)
  # Of every second slot a window, in which there may be nothing of the prompt.
  prefix_first_S = (np.arange(S) % 2 * rng.integers(0, prompt_S + 1)).clip(max=P - 1).astype(np.int32)
  prefix_length_S = np.maximum(prompt_S - prefix_first_S, 0).astype(np.int32)

  def columns(live):
    live_KT = np.broadcast_to(live[:, None], (len(live), K, live.shape[1]))
    if dtype == 'int8':
      values = lambda: jnp.asarray(rng.integers(-127, 128, (*live_KT.shape, H)), jnp.int8)
      scale = lambda: np.where(live_KT, rng.uniform(0.005, 0.02, live_KT.shape), dead).astype(np.float32)
      return values(), values(), scale(), scale()
    values = lambda: jnp.asarray(
        np.where(live_KT[..., None], rng.normal(size=(*live_KT.shape, H)), dead), dtype)
    return values(), values()

  ring = columns(alive(first_S, length_S, T))
  own = tuple(zip(*(np.array_split(np.asarray(x), chunks, axis=2) for x in ring)))
  q_SNH = jnp.asarray(rng.normal(size=(S, N, H)), jnp.bfloat16 if dtype == 'int8' else dtype)
  prefix = columns(alive(np.zeros(M, int), prompt_M, P))
  return q_SNH, prefix, own, row_S, prefix_first_S, prefix_length_S, first_S, length_S


def run(backend: str, args) -> np.ndarray:
  found = RUN[backend](*args)
  assert found.dtype == args[0].dtype and found.shape == args[0].shape
  return np.asarray(found, np.float32)


def by_loops(q_SNH, prefix, own, row_S, prefix_first_S, prefix_length_S, first_S, length_S) -> np.ndarray:
  """A head at a time, in float64, over the live columns alone."""
  def values(k, v, *scales):
    x = [np.asarray(x, np.float64) for x in (k, v)]
    return [x * scale[..., None] for x, scale in zip(x, scales)] if scales else x

  q_SNH = np.asarray(q_SNH, np.float64)
  prefix, ring = values(*prefix), [np.concatenate(x, axis=2) for x in zip(*(values(*c) for c in own))]
  live_ST = alive(first_S, length_S, ring[0].shape[2])
  context_SNH = np.zeros(q_SNH.shape)
  for s, n in np.ndindex(q_SNH.shape[:2]):
    k = n // (q_SNH.shape[1] // prefix[0].shape[1])
    of_prompt = slice(prefix_first_S[s], prefix_first_S[s] + prefix_length_S[s])
    k_TH, v_TH = (np.concatenate([x[row_S[s], k, of_prompt], y[s, k, live_ST[s]]])
                  for x, y in zip(prefix, ring))
    if len(k_TH):
      z_T = k_TH @ q_SNH[s, n] / math.sqrt(q_SNH.shape[2])
      p_T = np.exp(z_T - z_T.max())
      context_SNH[s, n] = p_T / p_T.sum() @ v_TH
  return context_SNH


@backends
def test_by_hand(backend):
  """Weights 1/4 for the prompt's column and 3/4 for the slot's, and the reverse for the second query head; then a
  prompt's last column alone; then the last and the first column, which weigh the same; then nothing."""
  dead = np.nan if backend == 'kernel' else 7
  prefix = np.full((2, 2, 1, 2, 4), dead, np.float32)  # k or v, prompts, heads, columns
  ring = np.full((2, 4, 1, 3, 4), dead, np.float32)
  prefix[0, 1, 0], prefix[1, 1, 0] = 0, [[4, 0, 0, 8], [0, 2, 0, 0]]
  ring[0, 0, 0, 1], ring[1, 0, 0, 1] = [math.log(3), 0, 0, 0], [0, 4, 0, 8]
  ring[0, 2, 0, [2, 0]], ring[1, 2, 0, [2, 0]] = 0, [[0, 0, 2, 0], [0, 0, 0, 2]]
  q_SNH = np.array([[[2, 0, 0, 0], [-2, 0, 0, 0]]] * 4, np.float32)  # H**-0.5 is 1 / 2
  integers = lambda *x: np.array(x, np.int32)
  found = run(backend, (q_SNH, tuple(prefix), (tuple(ring),), integers(1, 1, 0, 0), integers(0, 1, 0, 0),
                        integers(1, 1, 0, 0), integers(1, 0, 2, 0), integers(1, 0, 2, 0)))
  np.testing.assert_allclose(
      found, [[[1, 3, 0, 8], [3, 1, 0, 8]], [[0, 2, 0, 0]] * 2, [[0, 0, 1, 1]] * 2, [[0] * 4] * 2],
      rtol=1e-6, atol=1e-6)


# None, one, all, a block and one column less or more; free slots first, last and between.
RAGGED = (0, 1, 300, 127, 128, 0, 129, 257, 0)


@pytest.mark.parametrize('backend, chunks, dtype', [
    ('reference', 2, np.float32), ('public', 4, 'int8'), pytest.param('reference', 2, 'int8', marks=slow),
    pytest.param('public', 1, np.float32, marks=slow), pytest.param('public', 1, 'int8', marks=exhaustive),
    pytest.param('public', 4, np.float32, marks=exhaustive)])
def test_agrees_with_a_loop(backend, chunks, dtype):
  args = problem(RAGGED, dtype=dtype, dead=1e30, chunks=chunks)
  tolerance = 1e-5 if dtype == np.float32 else 0.01  # q and the result are bfloat16
  np.testing.assert_allclose(run(backend, args), by_loops(*args), atol=tolerance)


@pytest.mark.parametrize('S, M', [(40, 5), *(pytest.param(*x, marks=exhaustive) for x in ((1, 1), (30, 1), (9, 20)))])
def test_slots_of_a_prompt_read_it_together(S, M):
  """More slots read a prompt than a window has, or fewer, or none."""
  args = problem(np.random.default_rng(S).integers(0, 5, S), M=M, T=4, K=1)
  np.testing.assert_allclose(run('public', args), by_loops(*args), atol=1e-5)


@slow
def test_chunks_without_a_slot_are_not_read():
  """Counted as it runs: slots have columns in the first two of four chunks, and then also in the last."""
  own, reads = ops._own, []

  def counted(*args):
    jax.debug.callback(lambda: reads.append(1))
    return own(*args)

  for first, chunks in (([3, 10, 0], 2), ([3, 39, 0], 2), ([3, 29, 0], 3)):
    args = problem([5, 6, 0], first, T=40, chunks=4)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(ops, '_own', counted)
      reads.clear()
      q_SNH, *columns, row_S, of_prompt, in_prompt, of_slot, in_slot = args
      found = jax.jit(lambda *args: ops._shard.__wrapped__(*args))(
          q_SNH, *stacked(columns, 0, 1), 0, row_S, of_prompt, in_prompt, of_slot, in_slot)
      jax.block_until_ready(found)
      jax.effects_barrier()
    assert len(reads) == chunks
    np.testing.assert_allclose(found, by_loops(*args), atol=1e-5)


def check_kernel(tolerance: float, length_S=RAGGED, first_S=None, **shape) -> None:
  args = problem(length_S, first_S, dead=np.nan, **shape)
  expected = run('reference', args)
  assert np.all(np.isfinite(expected))
  found = run('kernel', args)
  np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
  assert not np.any(found[np.array(length_S) == 0])


@pytest.mark.parametrize('dtype, tolerance', [
    (np.float32, 1e-5), pytest.param('int8', 0.01, marks=slow), pytest.param(jnp.bfloat16, 0.01, marks=exhaustive)])
def test_kernel(dtype, tolerance):
  """As the reference; with bfloat16 the weights are rounded to 8 bits, as is the result."""
  check_kernel(tolerance, dtype=dtype)


@exhaustive
@pytest.mark.parametrize('N, K, P, T, H, dtype, tolerance', [
    (4, 4, 130, 384, 64, np.float32, 1e-5), (6, 3, 300, 300, 64, jnp.bfloat16, 0.01),
    (8, 2, 5, 257, 128, 'int8', 0.01), (8, 1, 384, 256, 128, np.float32, 1e-5),
    (16, 2, 128, 128, 64, 'int8', 0.01), (3, 1, 64, 70, 32, jnp.bfloat16, 0.01),
    (1, 1, 1, 1, 8, np.float32, 1e-5)])
def test_kernel_in_more_shapes(N, K, P, T, H, dtype, tolerance):
  of_blocks = {first + i for first in range(0, T + 1, BLOCK_T) for i in (-1, 0, 1)}
  lengths = sorted({n for n in of_blocks if 0 <= n <= T} | {T - 1, T})
  check_kernel(tolerance, lengths, N=N, K=K, P=P, T=T, H=H, dtype=dtype)


@exhaustive
@pytest.mark.parametrize('q, cache', [(jnp.bfloat16, np.float32), (np.float32, jnp.bfloat16),
                                      (np.float32, jnp.int8)])
def test_kernel_of_mixed_types(q, cache):
  args = problem(RAGGED, dtype='int8' if cache == jnp.int8 else cache, dead=np.nan)
  args = args[0].astype(q), *args[1:]
  tolerance = 1e-5 if q == np.float32 else 0.01
  np.testing.assert_allclose(run('kernel', args), run('reference', args), atol=tolerance)


@pytest.mark.parametrize('backend, layer', [
    ('public', 2), pytest.param('kernel', 2, marks=slow), pytest.param('public', 0, marks=exhaustive),
    pytest.param('kernel', 0, marks=exhaustive)])
def test_a_layer_of_a_stack(backend, layer):
  """Is as alone; the other layers are not read."""
  q_SNH, prefix, own, *of_slots = problem((0, 3, 40, 17), T=40)
  columns = prefix, own
  found = RUN[backend](q_SNH, *stacked(columns, layer, 3), *of_slots, layer=jnp.array(layer))
  np.testing.assert_allclose(found, by_loops(q_SNH, *columns, *of_slots), atol=1e-5)


@exhaustive
def test_all_slots_free():
  assert not np.any(run('kernel', problem([0, 0, 0], dead=np.nan)))


@slow
@backends
def test_large_logits(backend):
  """10^4 in the prompt or in one block of two, and -10^4 elsewhere."""
  value = np.arange(384, dtype=np.float32).reshape(1, 1, 384, 1)
  for first, expected in ((0, 63.5), (128, 191.5), (256, 319.5)):
    k = np.where((first <= value) & (value < first + 128), 1e4, -1e4).astype(np.float32)
    prefix, ring = zip((k[:, :, :128], k[:, :, 128:]), (value[:, :, :128], value[:, :, 128:]))
    one = lambda x: np.array([x], np.int32)
    args = np.ones((1, 1, 1), np.float32), prefix, (ring,), one(0), one(0), one(128), one(0), one(256)
    np.testing.assert_allclose(run(backend, args), expected, rtol=1e-6)


@pytest.mark.parametrize('first, lengths', [
    (0, RAGGED), (0, (0,)), (0, (0, 5, 0)), (0, (300, 300)), (0, (0, 0, 257, 0, 1)),
    (250, RAGGED), (299, (1, 2, 300, 0)), (130, (300, 299, 170, 171, 298))], ids=str)
def test_fetches_every_live_block_once(first, lengths):
  """The pipeline of a grid fetches a block where a step's is another than the one of the step before."""
  lengths = (*lengths, *[0] * (len(RAGGED) - len(lengths)))  # one program for all
  T, blocks, S = 300, 3, len(lengths)
  first_S, length_S = np.full(S, first, np.int32), np.array(lengths, np.int32)
  plan = jax.tree.map(np.asarray, SCHEDULE(None, first_S, length_S, T, BLOCK_T))
  steps = np.repeat(np.arange(S), blocks), np.tile(np.arange(blocks), S)
  found = [tuple(step) for step in np.stack(kernel.source(*steps, blocks, plan), axis=1).tolist()]
  fetched = [b for i, b in enumerate(found) if i == 0 or b != found[i - 1]]
  in_order = lambda columns: list(dict.fromkeys(column // BLOCK_T for column in columns))
  live = [(s, b) for s, n in enumerate(lengths) for b in in_order((first + i) % T for i in range(n))]
  assert fetched == live or not live and len(fetched) == 1
  assert plan.blocks.tolist() == [sum(b[0] == s for b in live) for s in range(S)]
  for s, n in enumerate(plan.blocks):  # the live steps of a slot find its own blocks
    assert [b for b in live if b[0] == s] == found[s * blocks:s * blocks + n]


def test_slots_of_a_prompt_fetch_it_once():
  """If it has one block; whatever the order of the slots, with free ones between."""
  row_S, length_S = np.array([[2, 0, 2, 1, 0, 2], [90, 5, 90, 0, 5, 90]], np.int32)
  plan = jax.tree.map(np.asarray, SCHEDULE(row_S, np.zeros_like(row_S), length_S, 100, 100))
  found = [kernel.source(s, 0, 1, plan) for s in range(6)]
  assert [int(row) for row, _ in found] == [0, 0, 2, 2, 2, 2]
  assert plan.slot.tolist() == [1, 4, 3, 0, 2, 5] and plan.length.tolist() == [5, 5, 0, 90, 90, 90]


@slow
def test_computes_live_blocks_only(monkeypatch):
  """Counted as it runs: two products to a block."""
  products = []
  dot = kernel.dot

  def counted(*args):
    jax.debug.callback(lambda: products.append(1))
    return dot(*args)

  monkeypatch.setattr(kernel, 'dot', counted)
  args = problem((0, 1, 300, 128, 129, 0), [0, 5, 7, 256, 0, 0])
  jax.block_until_ready(jax.jit(lambda *args: on_kernel(*args))(*args))
  jax.effects_barrier()
  blocks_of_prompts = np.count_nonzero(args[5])  # one each, but where the window has none of it
  assert 0 < blocks_of_prompts < 4
  assert len(products) == 2 * ((0 + 1 + 3 + 2 + 2 + 0) + blocks_of_prompts)


@exhaustive
def test_with_and_without_jit():
  args = problem((3, 0, 40), T=40)
  found = decode_attention(*args)
  np.testing.assert_allclose(found, run('public', args), rtol=1e-5, atol=1e-6)
  q_SNH, *rest = args
  with jax.disable_jit():
    context_SKGH = ops.attend(q_SNH.reshape(3, 2, 2, -1), *stacked(rest[:2], 0, 1), 0, *rest[2:])
  np.testing.assert_allclose(context_SKGH.reshape(found.shape)[::2], found[::2], rtol=1e-5, atol=1e-6)


def test_arguments_out_of_range_are_clipped():
  *columns, row_S, prefix_first_S, prefix_length_S, first_S, length_S = problem((3, 0, 40), T=40)
  found = run('public', (*columns, row_S, prefix_first_S, prefix_length_S, first_S, length_S))
  all_ = (prefix_first_S == 0) & (prefix_length_S == 70)
  beyond = (row_S + 5 * (row_S == 2), prefix_first_S - (prefix_first_S == 0),
            prefix_length_S - (prefix_length_S == 0) + all_, first_S + 40,
            np.array([3, -1, 41], np.int32))
  np.testing.assert_array_equal(run('public', (*columns, *beyond)), found)


def mesh_of(data: int, fsdp: int, model: int, devices=None, kind=AxisType.Auto) -> jax.sharding.Mesh:
  devices = jax.devices() if devices is None else devices
  sizes = data, fsdp, 1, model
  return jax.sharding.Mesh(np.array(devices)[:math.prod(sizes)].reshape(sizes), chip.AXES,
                           axis_types=(kind,) * len(sizes))


def specs(slots=OF_SLOTS, heads=OF_HEADS, prefix=OF_PREFIX):
  """Of the arguments."""
  return heads, prefix, heads, *[slots] * 5


@pytest.mark.parametrize('sizes, dtype', [
    pytest.param((2, 2, 2), np.float32, marks=slow), pytest.param((2, 2, 2), 'int8', marks=exhaustive),
    *(pytest.param(sizes, dtype, marks=exhaustive) for sizes in ((8, 1, 1), (4, 1, 2), (1, 2, 4), (1, 1, 1))
      for dtype in (np.float32, 'int8'))], ids=str)
def test_sharded(sizes, dtype):
  """As on one device, wherever the arguments are."""
  args = problem((0, 1, 40, 5, 0, 39, 17, 2), N=8, K=4, T=40, dtype=dtype)
  expected = run('public', args)
  mesh = mesh_of(*sizes)
  with jax.set_mesh(mesh):
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    assert_close(run('public', args), expected)
    placed = [jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), arg)
              for arg, spec in zip(args, specs())]
    found = RUN['public'](*placed)
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, OF_HEADS), 3)
    assert_close(np.asarray(found, np.float32), expected)


@pytest.mark.parametrize('manual', [
    pytest.param(chip.ROWS, marks=slow), *(pytest.param(manual, marks=exhaustive)
                                           for manual in (('data',), chip.AXES))], ids=str)
def test_inside_a_shard_map(manual):
  """Over the other axes of the mesh, if any are left, in a loop as the sampler's."""
  args = problem((0, 1, 40, 5, 0, 39, 17, 2), N=8, K=4, T=40)
  of_heads, of_slots = PartitionSpec(manual[:3], *manual[3:]), PartitionSpec(manual[:3])

  def twice(q_SNH, *args):
    return jax.lax.fori_loop(0, 2, lambda _, q_SNH: decode_attention(q_SNH, *args), q_SNH)

  expected = jax.jit(twice)(*args)
  with jax.set_mesh(mesh_of(2, 2, 2)):
    found = jax.jit(jax.shard_map(
        twice, axis_names=set(manual), out_specs=of_heads, check_vma=False,
        in_specs=specs(of_slots, of_heads, PartitionSpec(None, *manual[3:]))))(*args)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('sizes, S, N, K, named', [
    ((2, 2, 2), 6, 4, 2, 'S=6 must be a multiple of 4, .* data and fsdp and expert; pad or choose another S'),
    ((1, 1, 4), 1, 6, 2, 'N=6 must be a multiple of 4, .* model; pad or choose'),
    ((1, 1, 8), 1, 8, 4, 'K=4 must be a multiple of 8, .* model; pad or choose')])
def test_a_mesh_that_does_not_divide(sizes, S, N, K, named):
  args = problem([1] * S, N=N, K=K, T=8)
  with jax.set_mesh(mesh_of(*sizes)), pytest.raises(ValueError, match=named):
    decode_attention(*args)


def test_a_mesh_of_another_type():
  args = problem([1] * 8, T=8)
  with jax.set_mesh(mesh_of(2, 2, 2, kind=AxisType.Explicit)), pytest.raises(
      ValueError, match="'data', 'fsdp', 'expert', 'model'.* Auto"):
    decode_attention(*args)


def bad(q=(2, 4, 4), prefix=(3, 2, 8, 4), own=(2, 2, 8, 4), slots=(2,), q_dtype=np.float32,
        dtype=np.float32, v_dtype=None, own_dtype=None, int_dtype=np.int32):
  zeros = lambda shape, dtype: (jnp.zeros(shape, dtype), jnp.zeros(shape, v_dtype or dtype))
  return (jnp.zeros(q, q_dtype), zeros(prefix, dtype), (zeros(own, own_dtype or dtype),),
          *[jnp.zeros(slots, int_dtype)] * 5)


@pytest.mark.parametrize('shapes', [
    dict(prefix=(3, 3, 8, 4)), dict(prefix=(3, 2, 8, 5)), dict(own=(3, 2, 8, 4)), dict(own=(2, 1, 8, 4)),
    dict(own=(2, 2, 8, 5)), dict(slots=(3,)), dict(slots=(2, 1)), dict(own=(2, 2, 0, 4)),
    dict(prefix=(0, 2, 8, 4)), dict(q=(0, 4, 4), own=(0, 2, 8, 4), slots=(0,))], ids=str)
def test_bad_shapes(shapes):
  args = bad(**shapes)
  with pytest.raises(ValueError) as error:
    decode_attention(*args)
  named = f'not {args[0].shape}, {args[1][0].shape}, [{args[2][0][0].shape}] and {[args[3].shape] * 5}'
  assert f'{named}; heads stand' in str(error.value)


@pytest.mark.parametrize('changed', [{0: np.zeros((2, 4))}, {2: ()}, {1: (np.zeros((3, 2, 8, 4)),)},
                                     {1: (np.zeros((3, 2, 8)),) * 2}])
def test_bad_structure(changed):
  args = [changed.get(i, x) for i, x in enumerate(bad())]
  with pytest.raises(ValueError, match='needs q .* of one chunk or more'):
    decode_attention(*args)


def test_keys_and_values_that_differ():
  q, (k, v), *rest = bad()
  with pytest.raises(ValueError, match=r'k and v must be alike, .*\(3, 2, 8, 4\) and \(3, 2, 7, 4\)'):
    decode_attention(q, (k, v[:, :, 1:]), *rest)


def test_heads_that_do_not_divide():
  with pytest.raises(ValueError, match='N=3 query heads must be a multiple of K=2 .*; use'):
    decode_attention(*bad(q=(2, 3, 4)))


def test_bad_scales():
  q, (k, v, *scales), *rest = problem([1], T=8, M=1, P=8, dtype='int8')
  for found, named in (([], r'not \[\]; int8'), (scales[:1], r'not \[\(1, 2, 8\)\]; int8'),
                       ([scales[0], scales[1][..., None]], r'not .*\(1, 2, 8, 1\)\]; int8')):
    with pytest.raises(ValueError, match=r'int8 need 2 scales of shape \(1, 2, 8\), ' + named):
      decode_attention(q, (k, v, *found), *rest)
  with pytest.raises(TypeError, match='scales must be float32, not .*bfloat16.*; cast'):
    decode_attention(q, (k, v, scales[0], jnp.asarray(scales[1], jnp.bfloat16)), *rest)
  q, (k, v), *rest = problem([1], T=8, M=1, P=8)
  with pytest.raises(ValueError, match='float32 need 0 scales'):
    decode_attention(q, (k, v, *scales), *rest)


@pytest.mark.parametrize('dtypes, named', [
    (dict(q_dtype=np.float16), 'q must be .* not float16 and float32; cast'),
    (dict(v_dtype=jnp.bfloat16), 'not float32, float32 and bfloat16; cast'),
    (dict(own_dtype=jnp.bfloat16), 'not float32, bfloat16 and bfloat16; cast'),
    (dict(dtype=np.int16), 'not float32 and int16; cast'),
    (dict(int_dtype=np.int16), 'lengths must be int32, not .*int16.*; cast')], ids=str)
def test_bad_types(dtypes, named):
  with pytest.raises(TypeError, match=named):
    decode_attention(*bad(**dtypes))


def test_blocks():
  """T or a multiple of 128, and no more of it than one is needed for."""
  for T in (1, 100, 128, 130, 2500, 2560, 2 ** 15):
    for itemsize in (1, 2, 4):
      block_T = tiles.block(T, 8, 4, 128, itemsize)
      assert block_T == T or (block_T % 128 == 0 and block_T < T)
      assert -T % block_T < 128 * -(-T // block_T)
  assert tiles.block(2560, 8, 4, 128, 2) <= tiles.block(2560, 2, 4, 128, 2)
  assert tiles.block(128, 128, 1, 128, 4) is None


@functools.cache  # of five names
def devices(topology: str):
  return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices


def abstract(mesh, S: int, N: int, K: int, M: int, P: int, T: int, H: int, dtype: str,
             q: str = 'bfloat16'):
  """Arguments on the mesh; of int8 with scales."""
  def columns(rows, length, spec):
    like = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    scales = [like(rows, K, length, dtype='float32')] * 2 if dtype == 'int8' else []
    return (*[like(rows, K, length, H, dtype=dtype)] * 2, *scales)

  of_slots = jax.ShapeDtypeStruct((S,), 'int32', sharding=NamedSharding(mesh, OF_SLOTS))
  q_SNH = jax.ShapeDtypeStruct((S, N, H), q, sharding=NamedSharding(mesh, OF_HEADS))
  return q_SNH, columns(M, P, OF_PREFIX), (columns(S, T, OF_HEADS),), *[of_slots] * 5


def lower(function, topology: str, sizes, **shape):
  """The compiled program; over a mesh that is set, or without a mesh, on one chip."""
  mesh = mesh_of(*(sizes or (1, 1, 1)), devices=devices(topology))
  program = jax.jit(function)
  if sizes is None:
    return program.lower(*abstract(mesh, **shape)).compile()
  with jax.set_mesh(mesh):
    return program.lower(*abstract(mesh, **shape)).compile()


def of_size(program, least: int) -> set[str]:
  """The operations with a result of at least so many numbers, without those that move no memory.

  They are read from the text, as the memory analysis leaves out temporaries in VMEM.
  """
  found = re.findall(r'= \w+\[([\d,]*)\]\S* ([\w-]+)\(', program.as_text())
  return {name for shape, name in found if math.prod(map(int, filter(None, shape.split(',')))) >= least
          } - {'parameter', 'get-tuple-element', 'bitcast'}


def kernels(program) -> int:
  return program.as_text().count('custom_call_target="tpu_custom_call"')


def assert_lean(program, S: int, K: int, T: int, H: int, chips: int = 1, **_) -> None:
  """Two calls of the kernel, and nothing as large as a sixteenth of the slots' keys."""
  assert kernels(program) == 2
  assert not of_size(program, S * K * T * H // (16 * chips))
  assert program.memory_analysis().temp_size_in_bytes < 2 ** 22 < S * K * T * H // chips


@pytest.mark.parametrize('dtype', [pytest.param('int8', marks=slow), pytest.param('bfloat16', marks=exhaustive)])
def test_compiles_for_an_unknown_chip(dtype):
  assert_lean(lower(decode_attention, 'v5e:2x2', None, dtype=dtype, **LARGE), **LARGE)


@exhaustive
@pytest.mark.parametrize('topology, shape, dtype', [
    *((topology, LARGE_SHARD, 'bfloat16') for topology in TOPOLOGIES), ('v5e:2x2', LARGE_SHARD, 'int8'),
    ('v4:2x2x1', LARGE, 'int8'), ('tpu7x:2x2x1', LARGE, 'bfloat16')],
    ids=lambda x: x if isinstance(x, str) else f'K={x["K"]}')
def test_compiles_in_the_blocks_of_the_chip(topology, shape, dtype):
  assert_lean(lower(decode_attention, topology, (1, 1, 1), dtype=dtype, **shape), **shape)


@exhaustive
def test_a_loop_over_layers_copies_none():
  """A loop over layers writes and reads a stack, as the sampler's."""
  def loop(q_SNH, prefix, own, *of_slots):
    def layer(carry, i):
      q_SNH, (chunk,) = carry
      new = q_SNH[:, :2, None]
      chunk = tuple(jax.lax.dynamic_update_slice(x, new[None].astype(x.dtype), (i, 0, 0, 5, 0)) for x in chunk)
      q_SNH += decode_attention(q_SNH, prefix, (chunk,), *of_slots, layer=i)
      return (q_SNH, (chunk,)), None
    return jax.lax.scan(layer, (q_SNH, own), jnp.arange(3))[0]

  mesh = mesh_of(1, 1, 1, devices=devices('v5e:2x2'))
  q_SNH, prefix, own, *of_slots = abstract(mesh, dtype='bfloat16', **LARGE_SHARD)
  stack = lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype, sharding=x.sharding)
  with jax.set_mesh(mesh):
    program = jax.jit(loop, donate_argnums=2).lower(
        q_SNH, *jax.tree.map(stack, (prefix, own)), *of_slots).compile()
  assert kernels(program) == 2
  large = LARGE_SHARD['S'] * LARGE_SHARD['K'] * LARGE_SHARD['T'] * LARGE_SHARD['H'] // 16
  assert not of_size(program, large) - {'dynamic-update-slice', 'while', 'tuple', 'fusion'}
  assert program.memory_analysis().temp_size_in_bytes < 2 ** 22


@exhaustive
@pytest.mark.parametrize('topology, N, K, P, T, H, q, dtype', [
    ('v5e:2x2', 4, 4, 64, 128, 64, 'float32', 'float32'),
    ('v4:2x2x1', 9, 3, 1000, 1024, 64, 'bfloat16', 'bfloat16'),
    ('tpu7x:2x2x1', 14, 2, 2500, 256, 64, 'bfloat16', 'int8'),
    ('v5e:2x2', 16, 2, 130, 130, 128, 'float32', 'bfloat16'),
    ('v4:2x2x1', 32, 32, 512, 2560, 128, 'bfloat16', 'bfloat16'),
    ('v5e:2x2', 4, 2, 100, 100, 32, 'bfloat16', 'int8'),
    ('tpu7x:2x2x1', 8, 8, 999, 32768, 128, 'float32', 'float32'),
    ('v5e:2x2', 64, 8, 8192, 8192, 128, 'float32', 'int8')])
def test_compiles_in_other_shapes(topology, N, K, P, T, H, q, dtype):
  program = lower(decode_attention, topology, (1, 1, 1), S=8, N=N, K=K, M=4, P=P, T=T, H=H, q=q,
                  dtype=dtype)
  assert kernels(program) == 2


@exhaustive
@pytest.mark.parametrize('sizes, dtype', [
    ((4, 1, 1), 'bfloat16'), ((1, 1, 4), 'int8'), ((2, 1, 2), 'bfloat16')], ids=str)
def test_compiles_over_a_mesh(sizes, dtype):
  """Each chip reads its part; none is sent to another."""
  program = lower(decode_attention, 'v5e:2x2', sizes, dtype=dtype, **LARGE)
  assert_lean(program, **LARGE, chips=4)
  assert not re.search(r'all-|collective', program.as_text())


def steps(q_SNH, prefix, own, row_S, prefix_first_S, prefix_length_S, first_S, length_S):
  """100 decoding steps from an empty ring, with stand-ins for keys and values."""
  def step(i, carry):
    q_SNH, length_S, *ring = carry
    new_SK1H = q_SNH[:, :ring[0].shape[1], None]
    new = [new_SK1H] * 2 + [jnp.abs(new_SK1H[..., 0]).astype(jnp.float32)] * len(ring[2:])
    ring = [jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), i, axis=2)
            for x, y in zip(ring, new, strict=True)]
    q_SNH = decode_attention(q_SNH, prefix, (ring,), row_S, prefix_first_S, prefix_length_S, first_S,
                             length_S + 1)
    return q_SNH, length_S + 1, *ring

  return jax.lax.fori_loop(0, 100, step, (q_SNH, length_S, *map(jnp.zeros_like, own[0])))[0]


WRITING = {'broadcast', 'dynamic-update-slice', 'fusion'}  # the ring is made empty, and written to


@pytest.mark.parametrize('topology, dtype, H', [
    pytest.param('v5e:2x2', 'bfloat16', 128, marks=slow), *(pytest.param(*x, marks=exhaustive) for x in (
        *((topology, 'bfloat16', 128) for topology in TOPOLOGIES if topology != 'v5e:2x2'),
        ('v4:2x2x1', 'int8', 128), ('v5e:2x2', 'bfloat16', 64), ('v5e:2x2', 'int8', 128),
        ('tpu7x:2x2x1', 'int8', 128)))])
def test_a_loop_does_not_copy_the_cache(topology, dtype, H):
  """Columns are written in place, and lie as the kernel reads them."""
  shape = {**LARGE, 'H': H}
  program = lower(steps, topology, (1, 1, 1), dtype=dtype, **shape)
  assert of_size(program, math.prod(shape[i] for i in 'SKTH')) <= WRITING
  cache = 2 * math.prod(shape[i] for i in 'SKT') * (2 * 128 if dtype == 'bfloat16' else 128 + 4)
  assert program.memory_analysis().temp_size_in_bytes < 1.01 * cache + 2 ** 21


@exhaustive
@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_a_loop_inside_a_shard_map_does_not_copy_the_cache(dtype):
  """As the sampler's, over all axes but 'model', which is left to the partitioner."""
  sizes = (2, 1, 2)
  mesh = mesh_of(*sizes, devices=devices('v5e:2x2'))
  sharded = jax.shard_map(
      steps, mesh=mesh, axis_names=set(chip.ROWS), out_specs=OF_SLOTS, check_vma=False,
      in_specs=specs(OF_SLOTS, OF_SLOTS, PartitionSpec()))
  program = lower(sharded, 'v5e:2x2', sizes, dtype=dtype, **LARGE)
  assert of_size(program, math.prod(LARGE[i] for i in 'SKTH') // 4) <= WRITING
  assert kernels(program) == 2
