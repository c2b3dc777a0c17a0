"""The mesh, and the one table from a parameter's name to its partition.

A parameter's name ends in its shape, and each letter has its axis of the mesh:

    D -> 'fsdp'      N K F V -> 'model'      the others, and whole vectors: replicated

Rows of a microbatch are spread over ('data', 'fsdp'). Programs are traced under `jax.set_mesh(mesh)`,
the XLA partitioner does the rest; without a mesh all stands on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ('data', 'fsdp', 'model')
ROWS = ('data', 'fsdp')  # what the rows of a microbatch are spread over
_AXIS = {'D': 'fsdp', 'N': 'model', 'K': 'model', 'F': 'model', 'V': 'model'}


def mesh(devices: Sequence[Any] | None = None, *, data: int = 1, fsdp: int = 1, model: int = 1
         ) -> Mesh:
  """A mesh of all devices given. Raises ValueError if the axes do not multiply to their number."""
  devices = jax.devices() if devices is None else devices
  if data * fsdp * model != len(devices):
    raise ValueError(f'a mesh of data={data}, fsdp={fsdp}, model={model} needs {data * fsdp * model} '
                     f'devices; there are {len(devices)}')
  return Mesh(np.array(devices).reshape(data, fsdp, model), AXES, axis_types=(AxisType.Auto,) * 3)


def partition(path: tuple[Any, ...], axes: Sequence[str] = AXES) -> PartitionSpec:
  """Of the leaf at a path of jax.tree_util: parameters, and what is shaped as they are; over `axes`."""
  names = [str(getattr(k, 'key', getattr(k, 'name', ''))) for k in path]
  letters = names[-1].rpartition('_')[2] if names else ''
  if len(letters) < 2 or not letters.isupper():
    return PartitionSpec()
  # Layers are stacked, or a tuple, whose places have no name.
  stacked = 'layers' in names and names[names.index('layers') + 1] != ''
  found = [_AXIS.get(letter) for letter in letters]
  return PartitionSpec(*[None] * stacked, *(axis if axis in axes else None for axis in found))


def of(mesh: Mesh, tree: Any) -> Any:
  """The sharding of each leaf of parameters, or of a state that holds such trees."""
  return jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(mesh, partition(path)), tree)


def constrain(tree: Any, axes: Sequence[str] = AXES) -> Any:
  """Parameters or gradients, held to their partition over `axes` where a mesh is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree
  return jax.tree_util.tree_map_with_path(
      lambda path, x: jax.lax.with_sharding_constraint(x, partition(path, axes)), tree)


def constrain_rows(x: jax.Array) -> jax.Array:
  """Rows of a microbatch, spread over ROWS where a mesh is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))


def unmapped(axes: Sequence[str]) -> tuple[str, ...]:
  """Those of the axes of the mesh that no jax.shard_map around here has taken."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(axis for axis in axes if axis in mesh.axis_names and axis not in mesh.manual_axes)


def row_shards() -> int:
  """Over how many devices the rows of a microbatch are spread."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROWS)


def platform() -> str:
  """'tpu', 'cpu' or 'gpu': what the program now traced is for, which need not be this machine."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform
