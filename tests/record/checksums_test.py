"""Checksums see every change of one element, and hang on values alone."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kr_jax.record import checksums

P = jax.sharding.PartitionSpec
ALL = 2 ** 32 - 1
RNG = np.random.default_rng(0)
BITS = RNG.integers(0, 256, 480, np.uint8).tobytes()  # of all kinds of numbers, such that are none among them


def mixed(x, *steps):
  for shift, factor in steps:
    x = (x ^ x >> shift) * factor & ALL
  return x


def reference(content: bytes, itemsize: int) -> tuple[int, int]:
  """Both sums of little-endian elements, in whole numbers; of 8 bytes each is two elements."""
  size, first, second = min(itemsize, 4), 0, 0
  for i in range(len(content) // size):
    h = mixed(int.from_bytes(content[i * size:][:size], 'little') ^ i * 0x9E3779B1 & ALL,
              (16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))
    first, second = first + h & ALL, second + mixed(h, (15, 0x846CA68B)) & ALL
  return first, second


def sums(x) -> checksums.Sums:
  return checksums.of({'x': x})['x']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'int32', 'uint8', 'int8'])
def test_as_the_reference_on_the_host_and_on_a_device(dtype):
  x = np.frombuffer(BITS, dtype if hasattr(np, dtype) else getattr(ml_dtypes, dtype)).reshape(-1, 4, 3)
  with np.errstate(invalid='ignore'):  # numpy warns of numbers of 2 bytes that are none
    expected = (dtype, x.shape, *reference(BITS, x.itemsize), np.sum(~np.isfinite(x)))
  assert sums(x) == sums(jnp.asarray(x)) == expected
  assert sums(x.transpose(1, 0, 2))[2:4] != expected[2:4]


@pytest.mark.parametrize('dtype', ['float64', 'int64'])
def test_of_eight_bytes(dtype):
  x = np.frombuffer(BITS, dtype).reshape(5, 12)
  assert sums(x)[2:] == (*reference(BITS, 8), np.sum(~np.isfinite(x)))
  assert sums(x[:, ::2])[2:4] == reference(x[:, ::2].tobytes(), 8)


def test_of_a_key_a_scalar_truth_and_nothing():
  key = jax.random.key(7)
  assert sums(key)[2:4] == reference(np.asarray(jax.random.key_data(key)).tobytes(), 4)
  assert sums(jnp.int32(-5)) == sums(np.int32(-5)) == ('int32', (), *reference(np.int32(-5).tobytes(), 4), 0)
  truth = np.array([True, False, True])
  assert sums(truth) == sums(jnp.asarray(truth)) == ('bool', (3,), *reference(truth.tobytes(), 1), 0)
  assert sums(np.zeros((0, 3), np.float32)) == sums(jnp.zeros((0, 3))) == ('float32', (0, 3), 0, 0, 0)


def test_every_bit_of_an_element_is_seen_by_both_sums():
  x = np.tile(RNG.normal(size=7).astype(np.float32), (32, 1))
  whole = sums(x[0])
  x.view(np.uint32)[:, 4] ^= np.uint32(1) << np.arange(32, dtype=np.uint32)
  assert all(changed[2] != whole[2] and changed[3] != whole[3] for changed in map(sums, x))


def test_what_sums_of_numbers_do_not_see():
  """Two signs, two elements that changed places, a row that moved, zeros in the place of zeros of another sign."""
  x = RNG.normal(size=(6, 5)).astype(np.float32)
  whole = sums(x)[2:4]
  signs, places, rows = x.copy(), x.copy(), np.roll(x, 1, axis=0)
  signs[1, 2:4] *= -1
  places[0, 0], places[3, 1] = x[3, 1], x[0, 0]
  zeros = x * 0
  assert len({whole, *(sums(y)[2:4] for y in (signs, places, rows, zeros, -zeros, abs(zeros)))}) >= 6


@pytest.mark.slow
def test_the_same_on_every_mesh():
  x = np.frombuffer(BITS, np.float32)[:96].reshape(8, 3, 4)
  tree = {'x': x, 'y': x.astype(ml_dtypes.bfloat16), 'z': np.int32(3)}
  mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 3)
  for spec in (P(), P('fsdp'), P(('data', 'fsdp'), None, 'model'), P(('data', 'fsdp', 'model'))):
    at = lambda y: jax.device_put(y, jax.NamedSharding(mesh, spec if np.ndim(y) else P()))
    assert checksums.of(jax.tree.map(at, tree)) == checksums.of(tree)
  apart = {'x': jax.device_put(x, jax.devices()[3]), 'y': jax.device_put(tree['y'], jax.devices()[5]), 'z': tree['z']}
  assert checksums.of(apart) == checksums.of(tree)


def test_names_of_arrays():
  tree = {'params': {'layers': {'w_DF': np.zeros((2, 3), np.float32)}}, 'opt_state': (np.ones(2, np.int32),)}
  assert checksums.shapes(tree) == {name: x[:2] for name, x in checksums.of(tree).items()} == {
      'params/layers/w_DF': ('float32', (2, 3)), 'opt_state/0': ('int32', (2,))}


def test_an_item_comes_back_and_no_other_one():
  trees = {'state': checksums.of({'a': np.arange(3), 'b': np.ones((2, 2))}), 'stats': {}}
  text = json.dumps(checksums.item(40, **trees))
  assert checksums.read(text) == (40, trees)
  assert json.loads(text)['libraries']['jax'] == jax.__version__
  for i in range(len(text)):
    for bit in (0, 2, 5, 7):
      content = bytearray(text.encode())
      content[i] ^= 1 << bit
      try:
        assert checksums.read(bytes(content)) == (40, trees)  # what means the same
      except checksums.Damaged:
        pass
  for other in ('', '{}', '[]', 'null', '7', text[:-1], text.replace('40', '41'), '[' * 100_000):
    with pytest.raises(checksums.Damaged, match='the list of its checksums is broken'):
      checksums.read(other)


def test_what_differs_is_named():
  x = {name: np.arange(3, dtype=np.float32) for name in 'abcde'}
  saved = checksums.of(x)
  checksums.check(saved, checksums.of(x))
  checksums.check(saved, checksums.of({'c': x['c']}))  # a part
  with pytest.raises(checksums.Damaged, match='^c is not as saved, by the checksums$'):
    checksums.check(saved, checksums.of(x | {'c': x['a'] + 1}))
  with pytest.raises(checksums.Damaged, match='^a, b, c and 2 others are not as saved'):
    checksums.check(saved, checksums.of({name: y + 1 for name, y in x.items()}))


def test_values_that_are_no_numbers_are_named():
  x = {'a': np.array([1, 2], np.float32), 'b': np.array([1, np.inf], np.float32), 'c': np.arange(2)}
  checksums.check_finite(checksums.of({'a': x['a'], 'c': x['c']}))
  with pytest.raises(checksums.Damaged, match='^b holds values that are infinite or no numbers$'):
    checksums.check_finite(checksums.of(x))
