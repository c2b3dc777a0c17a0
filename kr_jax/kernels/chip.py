"""What the kernels share: registers, exact products, figures of the chip, and the mesh of their arguments."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import AxisType

LANES, SUBLANES = 128, 8  # of a register
LOW = -1e30  # below every logit, and such that LOW - LOW and 0 * (LOW - logit) are 0

ROWS = ('data', 'fsdp', 'expert')  # the axes of a mesh that slots or tokens are split over
AXES = (*ROWS, 'model')  # heads or the vocabulary are split over 'model'


def round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Products of matrices over one dimension of each, in float32; dimensions before the last two are a batch."""
  batch = tuple(range(x.ndim - 2))
  return jax.lax.dot_general(x, y, (((contract[0],), (contract[1],)), (batch, batch)), precision=precision(x),
                             preferred_element_type=jnp.float32)


def precision(x: jax.Array) -> jax.lax.Precision | None:
  """Products with this precision are exact for bfloat16, and of float32 precision for float32."""
  return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def of_chip(figure: str, otherwise: Any) -> Any:
  """A figure of the chip of the mesh that is set, or else of this process. otherwise: where there is no TPU."""
  try:
    return getattr(pltpu.get_tpu_info(), figure)
  except ValueError:
    return otherwise


def mesh() -> jax.sharding.AbstractMesh | None:
  """The mesh to split arguments over, if one with AXES is set."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if set(AXES) <= set(mesh.axis_names) else None


def unsplit(mesh: jax.sharding.AbstractMesh, axes: tuple[str, ...]) -> tuple[str, ...]:
  """The axes that no surrounding jax.shard_map has split arguments over already."""
  return tuple(axis for axis in axes if axis not in mesh.manual_axes)


def check_mesh(mesh: jax.sharding.AbstractMesh, *splits: tuple[str, int, tuple[str, ...]]) -> None:
  """Raises ValueError. splits: (name, size, the axes that must divide it, which must be of type Auto)."""
  for name, size, axes in splits:
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if size % shards:
      raise ValueError(f'{name}={size} must be a multiple of {shards}, the size of the mesh over '
                       f'{" and ".join(axes)}; pad or choose another {name}, or another mesh')
  used = set().union(*(axes for _, _, axes in splits))
  wrong = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types) if axis in used and kind != AxisType.Auto]
  if wrong:
    raise ValueError(f'axes {wrong} of the mesh must be of type Auto; pass axis_types to jax.make_mesh, and do not '
                     'call this inside a shard_map over them')
