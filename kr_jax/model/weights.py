"""A published checkpoint -> the policy's config and parameters (README.md: families, examples).

A device reads its own shard of each tensor in blocks, in place: beside the shards of its devices a host holds no more
than a block (on a CPU, whose arrays these are) or one stacked parameter, on its way to a device.

A parameter's letters are its axes: the published q [N H, D] is q_DNH here. Where it lies: families.stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import itertools
import math
import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from kr_jax import processes
from kr_jax import sharding
from kr_jax.model import families
from kr_jax.model import policy
from kr_jax.model import pretrained

_EMBEDDING, _OUTPUT = 'model.embed_tokens.weight', 'lm_head.weight'
# How names begin where a model was saved without its output matrix; and text towers.
_PREFIXES = families.PREFIXES | {name: f'model.{name}' for name in ('embed_tokens.', 'layers.', 'norm.')}
# transformers may save the matrices of all experts as one: its name, and which of the parameters in it comes when.
_OF_EXPERTS = re.compile(r'(.*\.experts\.)(gate_up_proj|down_proj)')
_STACKED = {'gate_up_proj': ('gate_proj.weight', 'up_proj.weight'), 'down_proj': ('down_proj.weight',)}
_BLOCK = 2 ** 17  # numbers that are read at once: they are transposed in a processor's cache


def load(path: str | os.PathLike, *, dtype: str = 'float32', remat: str = 'none', length: int = 0
         ) -> tuple[policy.Config, Any]:
  """The policy of a checkpoint: its config, and its parameters in float32, on the mesh that is set.

  `path` is as pretrained.find takes it, `dtype` and `remat` as policy.Config has them, `length` as families.fields
  takes it. Raises ValueError where nothing is there, or the checkpoint is not supported or does not fit; the error
  names all reasons.
  """
  path = pretrained.pin(path)
  found = config(path, dtype=dtype, remat=remat, length=length)
  return found, params(path, found)


def config(path: str | os.PathLike, *, dtype: str = 'float32', remat: str = 'none', lora_rank: int = 0,
           lora_alpha: float = 16.0, length: int = 0) -> policy.Config:
  """The config of a checkpoint, which need not have its tensors. Raises ValueError as `load` does.

  As for transformers, embeddings are not tied where the file has an output matrix that is another one.
  """
  files = pretrained.read(path)
  fields = families.fields(files.config, files.path, length)
  if fields['tie_embeddings'] and _has_another_output(files):
    pretrained.note(f'{files.path}: {_OUTPUT} is kept, which is not {_EMBEDDING}, though tie_word_embeddings is true')
    fields['tie_embeddings'] = False
  return policy.Config(**fields, dtype=dtype, remat=remat, lora_rank=lora_rank, lora_alpha=lora_alpha)


class _Placed(NamedTuple):
  """Where a parameter lies in published files."""

  stored: families.Stored
  leading: int  # axes of the parameter whose elements have tensors of their own: layers, experts
  letters: str  # of the other axes

  def name(self, index: Sequence[int]) -> str:
    """The published name, for an index of the leading axes."""
    return self.stored.name.format(*index[:1], e=index[-1] if index else 0)


def _placed(config: policy.Config, parameter: str) -> _Placed:
  stored, of_layers = families.stored(config, parameter)
  of_experts = '{e}' in stored.name
  return _Placed(stored, of_layers + of_experts, parameter.rpartition('_')[2][of_experts:])


class _Source(NamedTuple):
  """Where the tensor of a published name lies in a file."""

  name: str  # there
  shape: tuple[int, ...]  # of the published tensor
  expert: int | None = None  # of a tensor of all experts
  first: int = 0  # row of the tensor


def _sources(files: Any) -> dict[str, _Source]:
  """By the name that the model of text alone has for a tensor. Raises ValueError where two tensors have one name."""
  found = {}
  for name, shape in files.shapes.items():
    own = next((new + name[len(old):] for old, new in _PREFIXES.items() if name.startswith(old)), name)
    if own in found:
      raise ValueError(f'{files.path}: {found[own].name} and {name} both are {own}; save it again with one of them')
    stacked = _OF_EXPERTS.fullmatch(own)
    if stacked and len(shape) == 3:
      parts = _STACKED[stacked[2]]
      rows = shape[1] // len(parts)
      found |= {f'{stacked[1]}{e}.{part}': _Source(name, (rows, shape[2]), e, i * rows)
                for e in range(shape[0]) for i, part in enumerate(parts)}
    else:
      found[own] = _Source(name, shape)
  return found


def _has_another_output(files: Any) -> bool:
  """Whether there is an output matrix that differs from the embedding; False where there are no tensors."""
  try:
    sources = _sources(files)
  except ValueError:  # which `params` raises again
    return False
  if not {_EMBEDDING, _OUTPUT} <= sources.keys():
    return False
  embedding, output = sources[_EMBEDDING], sources[_OUTPUT]
  if embedding.shape != output.shape or len(output.shape) != 2 or pretrained.unreadable(
      files, (embedding.name, output.name)):
    return True  # `params` says what is wrong with them
  rows, width = output.shape
  step = max(1, _BLOCK // width)

  def block(source: _Source, i: int) -> np.ndarray:
    return files.tensor(source.name, (slice(i, min(i + step, rows)), slice(0, width))).astype(np.float32)

  return any((block(embedding, i) != block(output, i)).any() for i in range(0, rows, step))


def check(path: str | os.PathLike, config: policy.Config) -> None:
  """Raises ValueError where `params` does, and reads no tensor."""
  _checked(path, config)


def _checked(path: str | os.PathLike, config: policy.Config) -> tuple[Any, dict[str, _Source], Any]:
  """The files, where their tensors lie, and the shapes of the parameters, which they hold."""
  files = pretrained.read(path)
  shapes = jax.eval_shape(lambda: policy.init(policy.without_lora(config), jax.random.key(0)))
  sources = _sources(files)
  if config.tie_embeddings and _EMBEDDING not in sources and _OUTPUT in sources:
    sources[_EMBEDDING] = sources[_OUTPUT]
  _check(files, sources, config, jax.tree_util.tree_leaves_with_path(shapes))
  return files, sources, shapes


def params(path: str | os.PathLike, config: policy.Config) -> Any:
  """The parameters of a checkpoint, without adapters: nested dicts of float32, on the mesh that is set.

  Raises ValueError that names all tensors that are missing, unknown, of other shapes or of dtypes that are not read.
  """
  files, sources, shapes = _checked(path, config)
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  mesh = jax.sharding.get_mesh()

  def parts(path, leaf):
    """Which parts this process's devices have, by how they are written: equal ones are read once."""
    if mesh.empty:
      return {'': (slice(None),) * len(leaf.shape)}
    of_devices = sharding.at(mesh, path, leaf.shape).addressable_devices_indices_map(leaf.shape)
    return {str(index): index for index in of_devices.values()}

  def size(path, leaf):
    return 4 * sum(math.prod(len(range(n)[i]) for n, i in zip(leaf.shape, index))
                   for index in parts(path, leaf).values())

  if isinstance(files, pretrained.Directory):
    files.fetch(_read_of(sources, config, [(path, leaf, parts(path, leaf).values()) for path, leaf in leaves]))
  bar = processes.progress('weights', 0, sum(size(path, leaf) for path, leaf in leaves), unit='B')
  bar.unit_scale = True

  def read(path, leaf):
    placed = _placed(config, path[-1].key)
    held = {name: _part(files, sources, placed, leaf.shape, index, bar) for name, index in parts(path, leaf).items()}
    if mesh.empty:
      x = jax.device_put(held[''])
    else:
      x = jax.make_array_from_callback(
          leaf.shape, sharding.at(mesh, path, leaf.shape), lambda index: held[str(index)])
    return jax.block_until_ready(x)  # until then it may be on the host as well

  with bar:
    return jax.tree_util.tree_map_with_path(read, shapes)


def _read_of(sources: Mapping[str, _Source], config: policy.Config, parts: Iterable[Any]) -> set[str]:
  """The tensors that are read for parts of parameters: (path, leaf, the indices of the parts)."""
  names = set()
  for path, leaf, indices in parts:
    placed = _placed(config, path[-1].key)
    for index in indices:
      leading = [range(n)[i] for n, i in zip(leaf.shape, index)][:placed.leading]
      names |= {sources[placed.name(i)].name for i in itertools.product(*leading)}
  return names


def _part(files: Any, sources: Mapping[str, _Source], placed: _Placed, shape: Sequence[int],
          index: Sequence[slice], bar: Any) -> np.ndarray:
  """Part of a parameter of this shape."""
  ranges = [range(n)[i] for n, i in zip(shape, index)]
  x = _empty([len(r) for r in ranges])
  size, part = (dict(zip(placed.letters, of[placed.leading:])) for of in (shape, ranges))
  for i in np.ndindex(x.shape[:placed.leading]):
    source = sources[placed.name([r[j] for r, j in zip(ranges, i)])]
    in_stored_axes = np.einsum(f'{placed.letters}->{placed.stored.letters}', x[i])  # of the same memory
    _read_into(in_stored_axes, files, source, placed.stored, part, size)
    bar.update(x[i].nbytes)
  return x


def _empty(shape: Sequence[int]) -> np.ndarray:
  """float32 as JAX on a CPU uses it without a copy: at a multiple of 64 bytes."""
  size = 4 * math.prod(shape)
  x = np.empty(size + 64, np.uint8)
  start = -x.ctypes.data % 64
  return x[start:start + size].view(np.float32).reshape(shape)


def _read_into(x: np.ndarray, files: Any, source: _Source, stored: families.Stored, part: Mapping[str, range],
               size: Mapping[str, int]) -> None:
  """Reads a part of a tensor, of which only the bytes of this part are read.

  Args:
    x: the part, in the axes of the tensor.
    part, size: of each axis, by its letter.

  Raises ValueError where the part divides heads inside.
  """
  if 'H' in part and len(part) > 1 and part['H'] != range(size['H']):
    raise ValueError(f'{source.name} is divided inside a head, which no axis of the mesh divides')
  # Of heads that one dimension holds with their width, the width is whole.
  first, *others = families.dimensions(stored.letters)
  width = lambda letters: size['H'] if len(letters) > 1 else 1
  columns = [slice(part[d[0]].start * width(d), part[d[0]].stop * width(d)) for d in others]
  start = source.first + stored.first + part[first[0]].start * width(first)
  step = max(1, _BLOCK // max(1, math.prod(x.shape[1:])))
  for i in range(0, len(x), step):
    block = x[i:i + step]
    rows = slice(start + i * width(first), start + (i + len(block)) * width(first))
    index = rows, *columns
    if source.expert is not None:
      index = slice(source.expert, source.expert + 1), *index
    block[...] = files.tensor(source.name, index).astype(np.float32).reshape(block.shape)


def _check(files: Any, sources: Mapping[str, _Source], config: policy.Config, leaves: Iterable[Any]) -> None:
  wanted = {}
  for path, leaf in leaves:
    placed = _placed(config, path[-1].key)
    size = dict(zip(placed.letters, leaf.shape[placed.leading:]))
    rows, *columns = (math.prod(size[letter] for letter in d) for d in families.dimensions(placed.stored.letters))
    for index in np.ndindex(leaf.shape[:placed.leading]):
      wanted[placed.name(index)] = (placed.stored.rows or rows, *columns)
  # Buffers that old versions saved, and a copy of a tied embedding.
  ignored = lambda name: name.endswith('rotary_emb.inv_freq') or (name == _OUTPUT and config.tie_embeddings)
  shapes = {name: source.shape for name, source in sources.items() if not ignored(name)}
  others = [name for name in shapes if name.startswith(families.OTHER_TOWERS)]
  if others:
    pretrained.note(f'{files.path}: {", ".join(_grouped(others))} left out: no text is read by them')
  wrong = [f'{group} is missing' for group in _grouped(wanted.keys() - shapes)]
  wrong += [f'{group} is unknown' for group in _grouped(
      f'{name} {list(shapes[name])}' for name in shapes.keys() - wanted - set(others))]
  wrong += _grouped(f'{name} has the shape {list(shapes[name])}, not {list(shape)}'
                    for name, shape in wanted.items() if shapes.get(name, shape) != shape)
  wrong += pretrained.unreadable(files, {sources[name].name for name in wanted.keys() & shapes})
  if wrong:
    raise ValueError(f'{files.path} does not hold the tensors that its config asks for: {"; ".join(wrong)}. Take the '
                     'checkpoint that save_pretrained of the whole model writes')


def _grouped(texts: Iterable[str]) -> list[str]:
  """Texts that begin with names of tensors, once for all that differ in numbers of layers and experts alone, or are
  of a part of the model that no policy has: 'vision_tower.* (412 tensors)'."""
  groups: dict[str, list[str]] = {}
  for text in sorted(texts):
    other = re.match(r'(?!model\.(layers|embed_tokens|norm)\.|lm_head\.)((model\.)?\w+\.)', text)
    groups.setdefault(f'{other[2]}*' if other else re.sub(r'\.\d+\.', '.*.', text), []).append(text)
  return [held[0] if len(held) == 1 else f'{group} ({len(held)} tensors)' for group, held in groups.items()]
