"""Checksums of the values that a checkpoint holds: what is read must be what was saved, bit for bit.

  h_i = mix(bits_i ^ c i),   first = sum_i h_i,   second = sum_i mix'(h_i)   (mod 2^32)

over the elements i of an array, in row-major order. Both mixes are bijections of 32 bits, so that no change of one
element leaves a sum as it was; changes of several do with a chance of 2^-64. A sum knows no order: devices add up
their own parts, and the sums are the same on every mesh, so that a checkpoint may be saved on one and read on another.
Nothing is gathered, and no file is read twice.

Values are summed, not files: Orbax divides files by process and by chunk, writes them in threads and merges them at the
end, and a file's checksum says nothing of a chunk that is missing and read as zeros. The sums see that.
Source of the mixes: MurmurHash3's fmix32 (A. Appleby), and a round of lowbias32 (C. Wellons); c is 2^32 / golden ratio.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import functools
import hashlib
import importlib.metadata
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_POSITION = 0x9E3779B1  # c
_MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))  # x ^= x >> shift; x *= factor
_MIX_AGAIN = ((15, 0x846CA68B),)
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}  # of 8 bytes there are two
_LIBRARIES = ('kr_jax', 'jax', 'jaxlib', 'numpy', 'orbax-checkpoint', 'tensorstore')
_DIGEST = 'sha256'


class Sums(NamedTuple):
  """What is known of an array: its checksums, and how many of its elements are infinite or no number."""

  dtype: str
  shape: tuple[int, ...]
  first: int
  second: int
  not_finite: int


def of(tree: Any) -> dict[str, Sums]:
  """The checksums of each array of a tree, by its path: 'params/layers/w_LDF'. Computed where the array is.

  In a run of several processes all of them call it together.
  """
  leaves = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  by_devices: dict[Any, list[str]] = {}
  found: dict[str, np.ndarray] = {}
  for name, x in leaves.items():
    if isinstance(x, jax.Array):
      by_devices.setdefault(frozenset(x.sharding.device_set) if x.committed else None, []).append(name)
    else:
      found[name] = _sums(np, np.asarray(x))
  for names in by_devices.values():
    arrays = [leaves[name] for name in names]
    mesh = next((x.sharding.mesh for x in arrays if isinstance(x.sharding, jax.sharding.NamedSharding)), None)
    found |= dict(zip(names, np.asarray(_program(mesh)(arrays))))
  return {name: Sums(*described(x), *(int(n) for n in found[name])) for name, x in leaves.items()}


def described(x: Any) -> tuple[str, tuple[int, ...]]:
  """The dtype and the shape of an array, or of a jax.ShapeDtypeStruct, as checkpoints tell them."""
  return str(x.dtype), tuple(x.shape)


def shapes(tree: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
  """`described` of each array of a tree, by its path."""
  return {_name(path): described(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


@functools.cache
def _program(mesh: Any) -> Any:
  """The program of arrays on the devices of a mesh; None: on one device."""
  whole = {} if mesh is None else {'out_shardings': jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())}
  return jax.jit(lambda arrays: jnp.stack([_sums(jnp, x) for x in arrays]), **whole)


def _sums(xp: Any, x: Any) -> Any:
  """uint32[3]: both checksums, and the number of elements that are infinite or no number. xp: numpy or jax.numpy."""
  is_key = xp is jnp and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  x = jax.random.key_data(x) if is_key else x
  bits = _bits(xp, x)
  first = _mixed(bits ^ _index(xp, bits.shape) * np.uint32(_POSITION), _MIX)
  second = _mixed(first, _MIX_AGAIN)
  with np.errstate(invalid='ignore'):
    not_finite = ~xp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.inexact) else xp.zeros(x.shape, bool)
  if xp is np:
    return np.array([part.sum(dtype=np.uint32) for part in (first, second, not_finite)])
  if x.dtype.itemsize == 8:  # each has two words, of which one tells
    not_finite = jnp.stack([not_finite, jnp.zeros_like(not_finite)], axis=-1)
  # One reduction of all: on a CPU XLA takes 2 ns an element for it, and 8 for each sum of its own.
  return jnp.stack(jax.lax.reduce(
      (first, second, not_finite.astype(np.uint32)), (np.uint32(0),) * 3,
      lambda these, others: tuple(x + y for x, y in zip(these, others)), tuple(range(first.ndim))))


def _bits(xp: Any, x: Any) -> Any:
  """The bits of each element as uint32; of an element of 8 bytes two, the lower ones first."""
  unsigned = _UNSIGNED[x.dtype.itemsize]
  if xp is np:
    x = np.ascontiguousarray(x)
    return (x.reshape(*x.shape, 1) if x.dtype.itemsize == 8 else x).view(unsigned).astype(np.uint32)
  if x.dtype == bool:
    return x.astype(np.uint32)
  return jax.lax.bitcast_convert_type(x, unsigned).astype(np.uint32)


def _index(xp: Any, shape: tuple[int, ...]) -> Any:
  """The number of each element in row-major order, modulo 2^32."""
  if xp is np:
    return np.arange(np.prod(shape, dtype=int), dtype=np.uint64).astype(np.uint32).reshape(shape)
  index, stride = jnp.zeros(shape, np.uint32), 1
  for axis in reversed(range(len(shape))):
    index += jax.lax.broadcasted_iota(np.uint32, shape, axis) * np.uint32(stride % 2 ** 32)
    stride *= shape[axis]
  return index


def _mixed(x: Any, mix: Iterable[tuple[int, int]]) -> Any:
  for shift, factor in mix:
    x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
  return x


# What stands beside the arrays in a checkpoint.


class Damaged(Exception):
  """What was read is not what was saved; a text says why."""


def item(step: int, **trees: Mapping[str, Sums]) -> dict[str, Any]:
  """A JSON object that says what a checkpoint holds, and whether it is itself as it was written.

  Args:
    step: of the checkpoint.
    trees: `of` each tree that is saved, by its name.
  """
  content = {'step': step, 'libraries': {name: _version(name) for name in _LIBRARIES},
             'arrays': {name: {path: list(sums) for path, sums in tree.items()} for name, tree in trees.items()}}
  return {**content, _DIGEST: _digest(content)}


def read(text: bytes | str) -> tuple[int, dict[str, dict[str, Sums]]]:
  """The step and the trees of an item. Raises Damaged where it is not as it was written."""
  try:
    content = json.loads(text)
    if content.pop(_DIGEST) != _digest(content):
      raise ValueError
    return content['step'], {
        name: {path: Sums(dtype, tuple(shape), *rest) for path, (dtype, shape, *rest) in tree.items()}
        for name, tree in content['arrays'].items()}
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise Damaged('the list of its checksums is broken') from error


def check(saved: Mapping[str, Sums], found: Mapping[str, Sums]) -> None:
  """Raises Damaged where arrays differ from those that were saved. found: some of them, or all."""
  if wrong := sorted(name for name, sums in found.items() if saved[name][:4] != sums[:4]):
    raise Damaged(f'{shown(wrong)} {"is" if len(wrong) == 1 else "are"} not as saved, by the checksums')


def check_finite(found: Mapping[str, Sums]) -> None:
  """Raises Damaged where an array holds what is infinite or no number."""
  if wrong := sorted(name for name, sums in found.items() if sums.not_finite):
    raise Damaged(f'{shown(wrong)} {"holds" if len(wrong) == 1 else "hold"} values that are infinite or no numbers')


def shown(names: list[str]) -> str:
  """Some names as a message shows them."""
  return ', '.join(names[:3]) + (f' and {len(names) - 3} others' if len(names) > 3 else '')


def _digest(content: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@functools.cache
def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
    return None
