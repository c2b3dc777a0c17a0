"""The mesh, and the one table from a parameter's name to its partition.

A parameter's name ends in its shape, and each letter has its axis of the mesh:

    D -> 'fsdp'      N K F V -> 'model'      the others, and whole vectors: replicated

An axis that does not divide a dimension leaves it whole: key/value heads that are fewer than 'model',
which are then repeated where attention reads them (`head_copies`).

Rows of a microbatch are spread over ('data', 'fsdp'). Programs are traced under `jax.set_mesh(mesh)`,
the XLA partitioner does the rest; without a mesh all stands on one device. A run has two meshes of the
same devices in the same order: one to learn on, and one to sample on, whose 'model' axis may be longer, as
a sampler reads all parameters for each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import functools
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from kr_jax import knobs

AXES = ('data', 'fsdp', 'model')
ROWS = ('data', 'fsdp')  # what the rows of a microbatch are spread over
_AXIS = {'D': 'fsdp', 'N': 'model', 'K': 'model', 'F': 'model', 'V': 'model'}


def mesh(devices: Sequence[Any] | None = None, *, data: int = 1, fsdp: int = 1, model: int = 1) -> Mesh:
  """A mesh of all devices given. Raises ValueError if the axes do not multiply to their number."""
  devices = jax.devices() if devices is None else devices
  if data * fsdp * model != len(devices):
    raise ValueError(f'a mesh of data={data}, fsdp={fsdp}, model={model} needs {data * fsdp * model} '
                     f'devices; there are {len(devices)}')
  return Mesh(np.array(devices).reshape(data, fsdp, model), AXES, axis_types=(AxisType.Auto,) * 3)


def meshes(config: knobs.Mesh, sizes: Any, *, rollouts: int, devices: Sequence[Any] | None = None
           ) -> tuple[Mesh, Mesh] | tuple[None, None]:
  """The meshes to learn and to sample on; None, None where there is one device.

  Args:
    sizes: width, num_heads, num_kv_heads, hidden_width and vocab_size, as policy.Config has them.
    rollouts: of a step.

  Raises:
    ValueError: the axes do not fit the devices, the sizes or the rollouts, with some that do.
  """
  devices = list(jax.devices() if devices is None else devices)
  n = config.devices or len(devices)
  if n > len(devices):
    raise ValueError(f'mesh.devices={n} is more than the {len(devices)} there are')
  fsdp = config.fsdp or max(n // (config.data * config.model), 1)
  sample_model = config.sample_model or config.model
  asked = f'mesh.data={config.data}, mesh.fsdp={fsdp}, mesh.model={config.model}'

  def refuse(why: str, fitting: Iterator[str]):
    fitting = list(fitting)
    raise ValueError(f'{asked}, mesh.sample_model={sample_model} {why}; of {n} devices '
                     + ('would fit ' + ', '.join(fitting[:12]) if fitting else 'no mesh fits'))

  def shapes():
    for model in _divisors(n):
      for fsdp in _divisors(n // model):
        if not misfit(sizes, fsdp, model):
          yield f'(data={n // model // fsdp}, fsdp={fsdp}, model={model})'

  if config.data * fsdp * config.model != n:
    refuse(f'make {config.data * fsdp * config.model} devices, not {n}', shapes())
  if why := misfit(sizes, fsdp, config.model):
    refuse(why, shapes())
  why = misfit(sizes, 1, sample_model)
  if (fsdp * config.model) % sample_model:
    why = f'part the {fsdp * config.model} devices of a copy unevenly'
  if why:
    refuse(f'{why} when sampling', (
        f'sample_model={x}' for x in _divisors(fsdp * config.model) if not misfit(sizes, 1, x)))
  if rollouts * sample_model < n:
    raise ValueError(f'{asked}, mesh.sample_model={sample_model} spread alloc.rollouts_per_step={rollouts} '
                     f'over {n // sample_model} samplers; raise it to as many, or mesh.sample_model')
  if n == 1:
    return None, None
  learn = mesh(devices[:n], data=config.data, fsdp=fsdp, model=config.model)
  return learn, mesh(devices[:n], data=config.data, fsdp=fsdp * config.model // sample_model, model=sample_model)


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
  """Sets a mesh for the programs that are traced in it; None: all stands on one device."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def misfit(sizes: Any, fsdp: int, model: int) -> str:
  """Why a policy of these sizes cannot be divided so; '' where it can."""
  for name, axis, parts in (('width', 'fsdp', fsdp), ('num_heads', 'model', model),
                            ('hidden_width', 'model', model), ('vocab_size', 'model', model)):
    if getattr(sizes, name) % parts:
      return f"divide policy.{name}={getattr(sizes, name)} by {parts} of '{axis}'"
  return ''


def _divisors(n: int) -> list[int]:
  return [x for x in range(1, n + 1) if n % x == 0]


def partition(path: tuple[Any, ...], axes: Sequence[str] = AXES) -> PartitionSpec:
  """Of the leaf at a path of jax.tree_util: parameters, and what is shaped as they are; over `axes`."""
  names = [str(getattr(k, 'key', getattr(k, 'name', ''))) for k in path]
  letters = names[-1].rpartition('_')[2] if names else ''
  if len(letters) < 2 or not letters.isupper():
    return PartitionSpec()
  stacked = 'layers' in names
  found = [_AXIS.get(letter) for letter in letters]
  return PartitionSpec(*[None] * stacked, *(axis if axis in axes else None for axis in found))


def _fitting(mesh: Any, path: tuple[Any, ...], shape: Sequence[int], axes: Sequence[str] = AXES) -> PartitionSpec:
  """The partition without the axes that do not divide."""
  return PartitionSpec(*(axis if axis and n % mesh.shape[axis] == 0 else None
                         for axis, n in zip(partition(path, axes), shape)))


def at(mesh: Mesh, path: tuple[Any, ...], shape: Sequence[int], axes: Sequence[str] = AXES) -> NamedSharding:
  """Of the leaf of this shape at a path."""
  return NamedSharding(mesh, _fitting(mesh, path, shape, axes))


def of(mesh: Mesh, tree: Any, axes: Sequence[str] = AXES) -> Any:
  """The sharding of each leaf of parameters, or of a state that holds such trees."""
  return jax.tree_util.tree_map_with_path(lambda path, x: at(mesh, path, x.shape, axes), tree)


def shapes_on(mesh: Mesh | None, shapes: Any) -> Any:
  """Shapes of parameters, or of a state that holds them, with their shardings."""
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  at = jax.tree.map(lambda _: one, shapes) if mesh is None else of(mesh, shapes)
  return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, at)


def constrain(tree: Any, axes: Sequence[str] = AXES) -> Any:
  """Parameters or gradients, held to their partition over `axes` where a mesh is set."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree
  return jax.tree_util.tree_map_with_path(
      lambda path, x: jax.lax.with_sharding_constraint(x, _fitting(mesh, path, x.shape, axes)), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather(name: str, x: jax.Array) -> jax.Array:
  """A parameter of one layer, or of none, whole but for 'model'; its gradient is divided by the table.

  Without this the partitioner may gather it before it is cast, or gather what it is multiplied by, and
  gradients would be added up whole on every device before they are divided.
  """
  return constrain({name: x}, axes=('model',))[name]


gather.defvjp(lambda name, x: (gather(name, x), None), lambda name, _, g: (constrain({name: g})[name],))


def _hold(tree: Any, spec: PartitionSpec) -> Any:
  """Arrays, held to a partition where a mesh is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree
  return jax.lax.with_sharding_constraint(tree, spec)


def constrain_rows(tree: Any, axis: int = 0) -> Any:
  """Arrays whose `axis` is rows, of a microbatch or of rollouts: spread over ROWS where a mesh is set."""
  return _hold(tree, PartitionSpec(*[None] * axis, unmapped(ROWS)))


def sum_over_copies(function: Any, rows: Any, *others: Any) -> Any:
  """function(rows, *others), a sum over rows, where each copy of the parameters adds up its own.

  Of what a loop in the function adds up the copies send one another one sum, and not one of each turn.

  Args:
    rows: arrays whose second axis is spread over ROWS.
    others: the same for all rows.
  """
  shape = jax.sharding.get_abstract_mesh().shape
  # With both other axes XLA's partitioner breaks off at the gradient of the embedding (jax 0.10.2): then
  # the copies do send one another each turn's.
  if shape.get('data', 1) == 1 or shape['fsdp'] > 1 and shape['model'] > 1:
    return function(rows, *others)
  summed = lambda *args: jax.lax.psum(function(*args), 'data')
  whole = PartitionSpec()
  return jax.shard_map(summed, in_specs=(PartitionSpec(None, 'data'), *[whole] * len(others)), out_specs=whole,
                       axis_names={'data'}, check_vma=False)(rows, *others)


def replicate(tree: Any) -> Any:
  """Arrays, whole on every device where a mesh is set."""
  return _hold(tree, PartitionSpec())


def put(tree: Any, spec: PartitionSpec) -> Any:
  """Arrays of the host, the same in all processes, put on the mesh that is set: no device holds more than its part."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return tree
  of = NamedSharding(mesh, spec)
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, of, lambda i: x[i]), tree)


def move(tree: Any) -> Any:
  """Arrays of the other mesh of a run, on the one that is set: whole, or by rows where they were divided."""
  mesh = jax.sharding.get_mesh()

  def moved(x):
    if mesh.empty or not isinstance(x, jax.Array) or getattr(x.sharding, 'mesh', mesh) == mesh:
      return x
    by_rows = not x.is_fully_replicated and x.shape[0] % row_shards() == 0
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(ROWS) if by_rows else PartitionSpec()))

  return jax.tree.map(moved, tree)


def unmapped(axes: Sequence[str]) -> tuple[str, ...]:
  """Those of the axes of the mesh that no jax.shard_map around here has taken."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(axis for axis in axes if axis in mesh.axis_names and axis not in mesh.manual_axes)


def row_shards() -> int:
  """Over how many devices the rows of a microbatch are spread."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROWS)


def head_copies(num_kv_heads: int) -> int:
  """How often key/value heads are repeated, so that 'model' divides them."""
  model = jax.sharding.get_abstract_mesh().shape.get('model', 1)
  return math.lcm(num_kv_heads, model) // num_kv_heads


def platform() -> str:
  """'tpu', 'cpu' or 'gpu': what the program now traced is for, which need not be this machine."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform
