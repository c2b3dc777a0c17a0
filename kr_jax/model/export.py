"""A policy -> a directory that transformers, vLLM and `weights.load` read.

Everything is written into a directory beside the one that is asked for and then moved, config.json last, so that an
export that was killed is not taken for a checkpoint. A list of the files, in kr_jax_export.json, tells a later export
which of them it may remove.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import math
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from kr_jax import processes
from kr_jax.model import families
from kr_jax.model import policy
from kr_jax.model import pretrained

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}
MARK = 'kr_jax_export.json'
_FILE_BYTES = 4_000_000_000  # a new file is begun after about so many
# Fields of a source's config.json that are other forms of fields that a policy has, or code beside it.
_DROPPED = ('rope_parameters', 'rope_scaling', 'rope_local_base_freq', 'partial_rotary_factor',
            'original_max_position_embeddings', 'sliding_window_pattern', '_sliding_window_pattern',
            'max_window_layers', 'no_rope_layer_interval', 'num_local_experts', 'auto_map', '_name_or_path',
            'attn_implementation', '_attn_implementation')


class _Piece(NamedTuple):
  """What is written of a parameter, as rows of a tensor."""

  first: int  # row
  parameter: str
  leaf: jax.Array
  index: tuple[int, ...]  # of the layer and the expert, where there are several
  letters: str  # axes of the tensor


def save(directory: str | os.PathLike, config: policy.Config, params: Any, *,
         source: str | os.PathLike | None = None, dtype: str = '', tokenizer: Any = None) -> None:
  """Writes a directory that transformers, vLLM and `weights.load` read.

  A text tower that came out of a multimodal checkpoint is written as the model of text that it is. With several
  processes all of them call this, and the first writes.

  Args:
    directory: a new or an empty one, or one that this function wrote before: its files are replaced.
    config, params: without adapters (policy.merge).
    source: the checkpoint that training began with; its other files, and other fields of its config, are kept.
    dtype: of the tensors: 'float32', which `load` reads bit for bit, 'bfloat16' or 'float16'; '': that of the
      source, 'float32' where there is none.
    tokenizer: whose files are written instead of the source's; it has save(directory).

  Raises ValueError where no published family has the parts of this policy, the dtype is another one or too small for
  a number, or the directory is the source or holds something else.
  """
  if config.lora_rank:
    raise ValueError(f'a policy with adapters of rank {config.lora_rank} is no published model; export '
                     'policy.merge of its parameters, with policy.without_lora of its config')
  target = _target(directory, source)
  files = None if source is None else pretrained.read(source)
  of_json, dtype = _config(config, files, dtype)
  tensors = _tensors(config, params)
  partial = target.with_name(f'.{target.name}.partial') if processes.is_first() else None
  try:
    if partial:
      shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
      partial.mkdir(parents=True)
    _save_tensors(partial, tensors, np.dtype(DTYPES[dtype]))
    if partial:
      _save_text(partial, of_json, files, tokenizer)
      _move(partial, target)
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(
        f'{target} cannot be written: {error}; name a directory that can be, on a disk with room') from error
  finally:
    if partial:
      shutil.rmtree(partial, ignore_errors=True)


def _target(directory: str | os.PathLike, source: str | os.PathLike | None) -> pathlib.Path:
  """The directory to write, symbolic links followed. Raises ValueError where it must not be written."""
  if '://' in os.fspath(directory):
    raise ValueError(f'the export {os.fspath(directory)!r} is not a directory of this machine; export to one and '
                     'copy it')
  target = pathlib.Path(directory).expanduser().resolve()
  if source is not None and target == pretrained.find(source).resolve():
    raise ValueError(f'the export would replace its own source, {target}; name another directory')
  if target.exists() and not target.is_dir():
    raise ValueError(f'{target} is a file; name a directory')
  if target.exists() and (held := sorted(os.listdir(target))) and MARK not in held:
    raise ValueError(f'{target} holds {held[:9]}, which no export wrote: an export replaces none but its own files; '
                     'name a new directory, or empty this one')
  _listed(target)
  return target


def _config(config: policy.Config, files: Any, dtype: str) -> tuple[dict[str, Any], str]:
  """config.json, and the dtype of the tensors: of the source's config, or else of its tensors."""
  published = families.published(config)
  of_source = {} if files is None else files.config
  if isinstance(tower := of_source.get('text_config'), dict):
    of_whole = {name: x for name, x in of_source.items() if name.endswith(('_token_id', 'dtype'))}
    of_source = of_whole | tower | {'model_type': published['model_type']}
  if not dtype:
    found = str(of_source.get('dtype') or of_source.get('torch_dtype'))
    dtype = found if found in DTYPES else _usual_dtype(files)
  if dtype not in DTYPES:
    raise ValueError(f'export in dtype {dtype!r}, which is not one of {sorted(DTYPES)}')
  if of_source.get('model_type') != published['model_type']:
    of_source = {}
  kept = {name: x for name, x in of_source.items() if x is not None and name not in _DROPPED}
  if not kept:  # the ids that are usual in the family are of its own vocabulary
    kept = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))
  return kept | published | {'dtype': dtype, 'torch_dtype': dtype}, dtype  # transformers 5 and 4


def _usual_dtype(files: Any) -> str:
  """The dtype of most tensors of a directory; 'float32' where they are of another one, or not there."""
  if not isinstance(files, pretrained.Directory):
    return 'float32'
  try:
    held = list(files.dtypes.values())
  except ValueError:
    return 'float32'
  return {'BF16': 'bfloat16', 'F16': 'float16'}.get(max(held, key=held.count, default=''), 'float32')


def _tensors(config: policy.Config, params: Any) -> dict[str, list[_Piece]]:
  """What each published tensor is made of, by its name."""
  found: dict[str, list[_Piece]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    parameter = path[-1].key
    stored, of_layers = families.stored(config, parameter)
    shape = leaf.shape[:of_layers + ('{e}' in stored.name)]
    for index in np.ndindex(shape):
      name = stored.name.format(*index[:1], e=index[-1] if index else 0)
      found.setdefault(name, []).append(_Piece(stored.first, parameter, leaf, index, stored.letters))
  return found


_at = jax.jit(lambda x, index: x[index])  # one program for all layers


def _on_host(piece: _Piece) -> np.ndarray:
  """The rows of a piece, in the published form."""
  x = _at(piece.leaf, tuple(map(np.int32, piece.index))) if piece.index else piece.leaf
  x = np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
  own = piece.parameter.rpartition('_')[2][-x.ndim:]
  size = dict(zip(own, x.shape))
  shape = [math.prod(size[letter] for letter in letters) for letters in families.dimensions(piece.letters)]
  return np.einsum(f'{own}->{piece.letters}', x).reshape(shape)


def _save_tensors(directory: pathlib.Path | None, tensors: Mapping[str, list[_Piece]], dtype: np.dtype) -> None:
  """Writes files of about _FILE_BYTES, one after the other, and an index where there are several.

  directory: None where another process writes, which all have to send their shards to.
  """
  size = lambda pieces: sum(math.prod(p.leaf.shape[len(p.index):]) for p in pieces) * dtype.itemsize
  sizes = [size(pieces) for pieces in tensors.values()]
  file_of = ((np.cumsum(sizes) - sizes) // _FILE_BYTES).tolist()
  file_of = np.unique(file_of, return_inverse=True)[1].tolist()  # a tensor larger than a file leaves numbers out
  count = file_of[-1] + 1
  named = lambda k: 'model.safetensors' if count == 1 else f'model-{k + 1:05d}-of-{count:05d}.safetensors'
  with processes.progress('export', 0, len(tensors), unit='tensor') as bar:
    for k in range(count):
      held = {}
      for (name, pieces), file in zip(tensors.items(), file_of):
        if file == k:
          rows = [_on_host(piece) for piece in sorted(pieces, key=lambda piece: piece.first)]
          held[name] = _cast(name, rows[0] if len(rows) == 1 else np.concatenate(rows), dtype)
          bar.update()
      if directory:
        safetensors.numpy.save_file(held, directory / named(k), metadata={'format': 'pt'})
  if directory and count > 1:
    _write(directory / 'model.safetensors.index.json', {
        'metadata': {'total_size': sum(sizes)}, 'weight_map': {name: named(k) for name, k in zip(tensors, file_of)}})


def _cast(name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
  with np.errstate(over='ignore'):
    cast = np.ascontiguousarray(x.astype(dtype))
  if dtype == np.float16 and not np.isfinite(cast).all():
    raise ValueError(f'{name} holds {float(np.abs(x).max()):g}, beyond the largest number of float16, 65504; export '
                     "in dtype 'bfloat16' or 'float32'")
  return cast


def _save_text(directory: pathlib.Path, of_json: Mapping[str, Any], files: Any, tokenizer: Any) -> None:
  """Writes the config and the files of the tokenizer, then the list of all files."""
  _write(directory / 'config.json', of_json)
  if tokenizer is not None:
    tokenizer.save(directory)
  elif files is not None:
    files.save_text(directory)
  _write(directory / MARK, {'files': sorted([*os.listdir(directory), MARK])})


def _write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2), encoding='utf-8')


def _listed(directory: pathlib.Path) -> list[str]:
  """The files of an older export. Raises ValueError where its list is broken."""
  try:
    found = json.loads((directory / MARK).read_text(encoding='utf-8'))['files']
  except FileNotFoundError:
    return []
  except (ValueError, KeyError, TypeError):
    found = None
  if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
    raise ValueError(f'{directory / MARK} is not the list of files that an export wrote; name a new directory, or '
                     'empty this one')
  return found


def _move(partial: pathlib.Path, target: pathlib.Path) -> None:
  """Moves the files of an export to their directory, where those of an older export are removed."""
  target.mkdir(exist_ok=True)
  old = _listed(target)
  # Without config.json a directory is no checkpoint; the list stays, so that a later export may go on here.
  in_order = lambda names: sorted(set(names), key=lambda name: (name == 'config.json', name != MARK))
  for name in reversed(in_order(old)):
    if name != MARK:
      (target / pathlib.Path(name).name).unlink(missing_ok=True)
  for name in in_order(os.listdir(partial)):
    shutil.copymode(partial / 'config.json', partial / name)  # safetensors lets nobody else read
    (partial / name).replace(target / name)
