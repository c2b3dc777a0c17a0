"""The mesh, and the one table from a parameter's name to its partition.

A parameter's name ends in its shape letters, and each letter has its axis of the mesh:

    D -> 'fsdp' and 'expert' together    N K F V -> 'model'    other letters, and vectors: replicated

and so of the matrices of experts, whose first letter is E:

    E -> 'expert' and 'model' together    D -> 'fsdp'    F: whole

An axis that does not divide a dimension leaves the dimension whole: so it is with key/value heads that are fewer
than 'model', which attention repeats (`head_copies`).

Rows of a microbatch are spread over ('data', 'fsdp', 'expert'). Programs are traced under `jax.set_mesh(mesh)`, and
the XLA partitioner divides them; without a mesh all arrays are on one device. A run has two meshes of the same devices
in the same order, one to learn on and one to sample on. The 'model' axis of the second may be longer, as a sampler
reads all parameters for each token; its 'expert' is one device.
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

AXES = ('data', 'fsdp', 'expert', 'model')
ROWS = ('data', 'fsdp', 'expert')  # what the rows of a microbatch are spread over
_AXES_OF = {'D': ('fsdp', 'expert'), **dict.fromkeys('NKFV', ('model',))}
_AXES_OF_EXPERTS = {'E': ('expert', 'model'), 'D': ('fsdp',)}


def mesh(devices: Sequence[Any] | None = None, *, data: int = 1, fsdp: int = 1, expert: int = 1, model: int = 1
         ) -> Mesh:
  """A mesh of these devices (None: all). Raises ValueError if the axes do not multiply to their number."""
  devices = jax.devices() if devices is None else devices
  sizes = {'data': data, 'fsdp': fsdp, 'expert': expert, 'model': model}
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(f'a mesh of {", ".join(f"{axis}={n}" for axis, n in sizes.items())} needs '
                     f'{math.prod(sizes.values())} devices; there are {len(devices)}')
  return Mesh(np.array(devices).reshape(*sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def meshes(config: knobs.Mesh, sizes: Any, *, rollouts: int, devices: Sequence[Any] | None = None
           ) -> tuple[Mesh, Mesh] | tuple[None, None]:
  """The meshes to learn and to sample on; (None, None) where there is one device.

  Args:
    sizes: width, num_heads, num_kv_heads, hidden_width, num_experts and vocab_size, as policy.Config has them.
    rollouts: of a step.

  Raises:
    ValueError: the axes do not fit the devices, the sizes or the rollouts; the error names axes that fit.
  """
  devices = list(jax.devices() if devices is None else devices)
  n = config.devices or len(devices)
  if n > len(devices):
    raise ValueError(f'mesh.devices={n} is more than the {len(devices)} there are')
  expert, model = config.expert, config.model
  fsdp = config.fsdp or max(n // (config.data * expert * model), 1)
  copy = fsdp * expert * model
  sample_model = config.sample_model or model
  asked = ', '.join(f'mesh.{axis}={size}' for axis, size in (
      ('data', config.data), ('fsdp', fsdp), *[('expert', expert)] * (expert > 1), ('model', model)))

  def refuse(why: str, fitting: Iterator[str]):
    fitting = list(fitting)
    raise ValueError(f'{asked}, mesh.sample_model={sample_model} {why}; of {n} devices '
                     + ('would fit ' + ', '.join(fitting[:12]) if fitting else 'no mesh fits'))

  def shapes():
    for expert in _divisors(n) if sizes.num_experts else [1]:
      for model in _divisors(n // expert):
        for fsdp in _divisors(n // expert // model):
          if not misfit(sizes, fsdp, model, expert):
            of_experts = f'expert={expert}, ' if sizes.num_experts else ''
            yield f'(data={n // expert // model // fsdp}, fsdp={fsdp}, {of_experts}model={model})'

  if config.data * copy != n:
    refuse(f'make {config.data * copy} devices, not {n}', shapes())
  if why := misfit(sizes, fsdp, model, expert):
    refuse(why, shapes())
  why = misfit_of_sampler(sizes, sample_model)
  if copy % sample_model:
    why = f'part the {copy} devices of a copy unevenly'
  if why:
    refuse(f'{why} when sampling', (
        f'sample_model={x}' for x in _divisors(copy) if not misfit_of_sampler(sizes, x)))
  if rollouts * sample_model < n:
    raise ValueError(f'{asked}, mesh.sample_model={sample_model} spread alloc.rollouts_per_step={rollouts} '
                     f'over {n // sample_model} samplers; raise it to as many, or mesh.sample_model')
  if n == 1:
    return None, None
  learn = mesh(devices[:n], data=config.data, fsdp=fsdp, expert=expert, model=model)
  return learn, mesh(devices[:n], data=config.data, fsdp=copy // sample_model, model=sample_model)


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
  """Sets a mesh for the programs that are traced in this context; None: all arrays are on one device."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def misfit(sizes: Any, fsdp: int, model: int, expert: int = 1) -> str:
  """Why the mesh to learn on cannot divide a policy of these sizes; '' where it can."""
  if expert > 1 and not sizes.num_experts:
    return f"divide the experts of a policy that has none by {expert} of 'expert'"
  of_width = 'fsdp' if expert == 1 else "fsdp' and 'expert"
  return _indivisible(sizes, (('width', of_width, fsdp * expert), *_of_model(sizes, model, expert)))


def misfit_of_sampler(sizes: Any, model: int) -> str:
  """Why the mesh to sample on cannot; '' where it can."""
  return _indivisible(sizes, _of_model(sizes, model))


def _of_model(sizes: Any, model: int, expert: int = 1) -> tuple[tuple[str, str, int], ...]:
  """What the axes but 'fsdp' divide: names, axes, parts."""
  of_experts = 'num_experts', 'model' if expert == 1 else "expert' and 'model", expert * model
  of_mlp = of_experts if sizes.num_experts else ('hidden_width', 'model', model)
  return ('num_heads', 'model', model), of_mlp, ('vocab_size', 'model', model)


def _indivisible(sizes: Any, parts_of: Sequence[tuple[str, str, int]]) -> str:
  for name, axes, parts in parts_of:
    if getattr(sizes, name) % parts:
      return f"divide policy.{name}={getattr(sizes, name)} by {parts} of '{axes}'"
  return ''


def _divisors(n: int) -> list[int]:
  return [x for x in range(1, n + 1) if n % x == 0]


def partition(path: tuple[Any, ...], axes: Sequence[str] = AXES) -> PartitionSpec:
  """Of the leaf at a path of jax.tree_util, over some axes: of parameters, and of trees of the same shapes."""
  names = [str(getattr(k, 'key', getattr(k, 'name', ''))) for k in path]
  letters = names[-1].rpartition('_')[2] if names else ''
  if len(letters) < 2 or not letters.isupper():
    return PartitionSpec()
  table = _AXES_OF_EXPERTS if _is_of_experts(letters) else _AXES_OF
  found = [tuple(axis for axis in table.get(letter, ()) if axis in axes) or None for letter in letters]
  return PartitionSpec(*[None] * ('layers' in names), *found)


def _is_of_experts(letters: str) -> bool:
  return letters.startswith('E')


def _fitting(mesh: Any, path: tuple[Any, ...], shape: Sequence[int], axes: Sequence[str] = AXES) -> PartitionSpec:
  """The partition without the axes that do not divide their dimensions, or divide nothing."""
  def fitting(of: str | tuple[str, ...] | None, n: int) -> tuple[str, ...] | None:
    of = tuple(axis for axis in ((of,) if isinstance(of, str) else of or ()) if mesh.shape[axis] > 1)
    return of if of and n % math.prod(mesh.shape[axis] for axis in of) == 0 else None

  return PartitionSpec(*(fitting(of, n) for of, n in zip(partition(path, axes), shape)))


def at(mesh: Mesh, path: tuple[Any, ...], shape: Sequence[int], axes: Sequence[str] = AXES) -> NamedSharding:
  """The sharding of the leaf of this shape at a path."""
  return NamedSharding(mesh, _fitting(mesh, path, shape, axes))


def of(mesh: Mesh, tree: Any, axes: Sequence[str] = AXES) -> Any:
  """The sharding of each leaf of parameters, or of a state that holds such trees."""
  return jax.tree_util.tree_map_with_path(lambda path, x: at(mesh, path, x.shape, axes), tree)


def shapes_on(mesh: Mesh | None, shapes: Any) -> Any:
  """Shapes of parameters, or of a state that holds them, with their shardings."""
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  at = jax.tree.map(lambda _: one, shapes) if mesh is None else of(mesh, shapes)
  return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, at)


def place(tree: Any) -> Any:
  """Arrays that are new, as they are where a checkpoint is read, so that a run that goes on compiles nothing again.

  To jax some new arrays are of a weak type, and without a mesh all of them may move to another device. Neither is so of
  those that are read, and what a program takes is a part of the program.
  """
  strong = lambda x: jax.lax.convert_element_type(x, x.dtype) if getattr(x, 'weak_type', False) else x
  tree = jax.tree.map(strong, tree)
  return jax.device_put(tree, jax.devices()[0]) if jax.sharding.get_abstract_mesh().empty else tree


def constrain(tree: Any, axes: Sequence[str] = AXES) -> Any:
  """Parameters or gradients, constrained to their partition over `axes` where a mesh is set."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree
  return jax.tree_util.tree_map_with_path(
      lambda path, x: jax.lax.with_sharding_constraint(x, _fitting(mesh, path, x.shape, axes)), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather(name: str, x: jax.Array) -> jax.Array:
  """A parameter of one layer, or of none, whole in all but what 'model' divides and, of experts, 'expert'; its
  gradient is divided by the table.

  Without this constraint the partitioner may gather the parameter before it is cast, or gather the other factor,
  and every device would add up whole gradients before they are divided.
  """
  axes = ('expert', 'model') if _is_of_experts(name.rpartition('_')[2]) else ('model',)
  return constrain({name: x}, axes=axes)[name]


gather.defvjp(lambda name, x: (gather(name, x), None), lambda name, _, g: (constrain({name: g})[name],))


def _constrain_to(tree: Any, spec: PartitionSpec) -> Any:
  """Arrays, constrained to a partition where a mesh is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree
  return jax.lax.with_sharding_constraint(tree, spec)


def constrain_rows(tree: Any, axis: int = 0) -> Any:
  """Arrays whose `axis` is rows of a microbatch, or rollouts, which are spread over ROWS where a mesh is set."""
  return _constrain_to(tree, PartitionSpec(*[None] * axis, unmapped(ROWS)))


def sum_over_copies(function: Any, rows: Any, *others: Any) -> Any:
  """function(rows, *others), a sum over rows, for which each copy of the parameters adds up its own rows.

  A loop in the function adds up without communication; the copies exchange one sum, not one a turn.

  Args:
    rows: arrays whose second axis is spread over ROWS.
    others: arrays that all rows share.
  """
  shape = jax.sharding.get_abstract_mesh().shape
  # With two other axes XLA's partitioner aborts at the gradient of the embedding (jax 0.10.2): then the copies
  # exchange a sum in each turn.
  if shape.get('data', 1) == 1 or sum(shape[axis] > 1 for axis in AXES if axis != 'data') > 1:
    return function(rows, *others)
  summed = lambda *args: jax.lax.psum(function(*args), 'data')
  whole = PartitionSpec()
  return jax.shard_map(summed, in_specs=(PartitionSpec(None, 'data'), *[whole] * len(others)), out_specs=whole,
                       axis_names={'data'}, check_vma=False)(rows, *others)


def replicate(tree: Any) -> Any:
  """Arrays, whole on every device where a mesh is set."""
  return _constrain_to(tree, PartitionSpec())


def put(tree: Any, spec: PartitionSpec) -> Any:
  """Arrays of the host, the same in all processes, put on the mesh that is set: a device receives its part alone."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return tree
  of = NamedSharding(mesh, spec)
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, of, lambda i: x[i]), tree)


def move(tree: Any) -> Any:
  """Arrays of a run's other mesh, on the mesh that is set: divided by rows if they were divided, else whole."""
  mesh = jax.sharding.get_mesh()

  def moved(x):
    if mesh.empty or not isinstance(x, jax.Array) or getattr(x.sharding, 'mesh', mesh) == mesh:
      return x
    by_rows = not x.is_fully_replicated and x.shape[0] % row_shards() == 0
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(ROWS) if by_rows else PartitionSpec()))

  return jax.tree.map(moved, tree)


def unmapped(axes: Sequence[str]) -> tuple[str, ...]:
  """Of these axes, the axes of the mesh over which no surrounding jax.shard_map maps."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(axis for axis in axes if axis in mesh.axis_names and axis not in mesh.manual_axes)


def row_shards() -> int:
  """The number of devices that the rows of a microbatch are spread over."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROWS)


def head_copies(num_kv_heads: int) -> int:
  """How often key/value heads are repeated, so that 'model' divides them."""
  model = jax.sharding.get_abstract_mesh().shape.get('model', 1)
  return math.lcm(num_kv_heads, model) // num_kv_heads


def platform() -> str:
  """'tpu', 'cpu' or 'gpu': the platform that a program is traced for, which need not be this machine's."""
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
  return jax.default_backend() if device is None else getattr(device, 'platform', device)
