"""A published checkpoint <-> the policy's config and parameters.

    config, params = weights.load('path/to/Qwen3-4B')     # or a .gguf file, a name, gs://...
    policy.logits(config, params, tokens_BT)
    weights.save('path/to/export', config, params, source='path/to/Qwen3-4B')

Families: Llama 3.x and models of its form (SmolLM2), Qwen2 and 2.5, DeepSeek-R1-Distill-Qwen, Qwen3, Gemma 3
text; with config.json as transformers 4 and 5 write it. A device reads its own shard of each tensor, layer by
layer, so that a host never holds more than the shards of its devices and one stacked parameter.

A parameter's letters are its axes: the published q [N H, D] is q_DNH here.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from kr_jax import processes
from kr_jax import sharding
from kr_jax.model import policy
from kr_jax.model import pretrained

# Published name and letters of each parameter.
_NAMES = {'embed_VD': ('model.embed_tokens.weight', 'VD'), 'norm_D': ('model.norm.weight', 'D'),
          'output_DV': ('lm_head.weight', 'VD')}
_LAYER_NAMES = {
    'attention_norm_D': ('input_layernorm.weight', 'D'),
    'q_DNH': ('self_attn.q_proj.weight', 'NHD'), 'q_bias_NH': ('self_attn.q_proj.bias', 'NH'),
    'k_DKH': ('self_attn.k_proj.weight', 'KHD'), 'k_bias_KH': ('self_attn.k_proj.bias', 'KH'),
    'v_DKH': ('self_attn.v_proj.weight', 'KHD'), 'v_bias_KH': ('self_attn.v_proj.bias', 'KH'),
    'o_NHD': ('self_attn.o_proj.weight', 'DNH'),
    'q_norm_H': ('self_attn.q_norm.weight', 'H'), 'k_norm_H': ('self_attn.k_norm.weight', 'H'),
    'mlp_norm_D': ('post_attention_layernorm.weight', 'D'),
    'gate_DF': ('mlp.gate_proj.weight', 'FD'), 'up_DF': ('mlp.up_proj.weight', 'FD'),
    'down_FD': ('mlp.down_proj.weight', 'DF')}
_POST_NORM_NAMES = {
    'attention_post_norm_D': ('post_attention_layernorm.weight', 'D'),
    'mlp_norm_D': ('pre_feedforward_layernorm.weight', 'D'),
    'mlp_post_norm_D': ('post_feedforward_layernorm.weight', 'D')}
# `save` begins a new file after about so many bytes.
_FILE_BYTES = 4_000_000_000


def load(path: str | os.PathLike, *, dtype: str = 'float32', remat: str = 'none'
         ) -> tuple[policy.Config, Any]:
  """The policy of a checkpoint: its config, and its parameters in float32, on the mesh that is set.

  Args:
    path: as pretrained.find takes it.
    dtype, remat: of the computation, as policy.Config has them.

  Raises:
    ValueError: nothing is there, or the checkpoint is not supported or does not fit. The error names all reasons.
  """
  found = config(path, dtype=dtype, remat=remat)
  return found, params(path, found)


def config(path: str | os.PathLike, *, dtype: str = 'float32', remat: str = 'none', lora_rank: int = 0,
           lora_alpha: float = 16.0) -> policy.Config:
  """The config of a checkpoint; no tensor is read. Raises ValueError as `load` does."""
  files = pretrained.read(path)
  return policy.Config(**_fields(files.config, files.path), dtype=dtype, remat=remat,
                       lora_rank=lora_rank, lora_alpha=lora_alpha)


# Config.

_FAMILIES = ('gemma3_text', 'llama', 'qwen2', 'qwen3')
_ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu'}
# Fields that change the computation, with the values beside null that are supported.
_ONLY = {'attention_bias': (False,), 'mlp_bias': (False,), 'use_sliding_window': (False,),
         'rope_interleaved': (False,), 'partial_rotary_factor': (1,), 'attn_logit_softcapping': (),
         'final_logit_softcapping': (), 'use_bidirectional_attention': (False,),
         'quantization_config': ()}


def _fields(published: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
  """Fields of policy.Config, from config.json. Raises ValueError that names all that is not supported."""
  family = published.get('model_type')
  if family not in _FAMILIES:
    raise ValueError(f'{path}: model_type {family!r} is not one of {sorted(_FAMILIES)}')
  gemma = family == 'gemma3_text'
  wanted = ('vocab_size', 'num_hidden_layers', 'hidden_size', 'num_attention_heads', 'intermediate_size',
            *(('sliding_window',) if gemma else ()))
  wrong = [f'{name} is {published.get(name)!r}, not a number above 0' for name in wanted
           if not isinstance(published.get(name), int) or published[name] < 1]
  wrong += [f'{name}={published[name]!r} is not supported' for name, supported in _ONLY.items()
            if published.get(name) not in (None, *supported)]
  activation = published.get('hidden_activation', published.get('hidden_act'))
  activation = activation or ('gelu_pytorch_tanh' if gemma else 'silu')
  if activation not in _ACTIVATIONS:
    wrong.append(f'the activation {activation!r} is not one of {sorted(_ACTIVATIONS)}')
  rope, local_rope = _rope(published, gemma, wrong)
  local = _local_layers(published, gemma, wrong)
  if wrong:
    raise ValueError(f'{path}: {"; ".join(wrong)}')
  heads = published['num_attention_heads']
  head_width = {'gemma3_text': 256, 'qwen3': 128}.get(family, published['hidden_size'] // heads)
  fields = {
      'vocab_size': published['vocab_size'],
      'num_layers': published['num_hidden_layers'],
      'width': published['hidden_size'],
      'num_heads': heads,
      'num_kv_heads': published.get('num_key_value_heads') or heads,
      'head_width': published.get('head_dim') or head_width,
      'hidden_width': published['intermediate_size'],
      'rope_theta': rope[0],
      'rope_scaling': rope[1],
      'norm_eps': published.get('rms_norm_eps') or 1e-6,
      'qk_norm': family in ('qwen3', 'gemma3_text'),
      'qkv_bias': family == 'qwen2',
      'tie_embeddings': published.get('tie_word_embeddings', gemma),
      'activation': _ACTIVATIONS[activation]}
  if gemma:
    fields |= {
        'norm_offset': 1.0, 'post_norms': True, 'embedding_scale': True,
        'query_scalar': float(published.get('query_pre_attn_scalar') or 256),
        'local_rope_theta': local_rope, **local}
  return fields


def _rope(published: dict[str, Any], gemma: bool, wrong: list[str]
          ) -> tuple[tuple[float, tuple[float, ...]], float]:
  """((theta, scaling), local theta) of the rotations; adds errors to `wrong`."""
  both = published.get('rope_parameters') or {}  # transformers 5
  of_all = both.get('full_attention', both)
  theta = of_all.get('rope_theta', published.get('rope_theta')) or (1e6 if gemma else 1e4)
  of_local = both.get('sliding_attention') or {}
  local_theta = of_local.get('rope_theta', published.get('rope_local_base_freq')) or 1e4
  scaling = of_all if both else published.get('rope_scaling') or {}

  def found(scaling):
    kind = scaling.get('rope_type', scaling.get('type')) or 'default'
    names = {'default': (), 'linear': ('factor',), 'llama3': (
        'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')}
    if kind not in names:
      wrong.append(f'rope scaling of the type {kind!r} is not one of {sorted(names)}')
    elif missing := [name for name in names[kind] if not isinstance(scaling.get(name), (int, float))]:
      wrong.append(f'rope scaling of the type {kind!r} lacks {missing}')
    else:
      return tuple(float(scaling[name]) for name in names[kind])
    return ()

  if found(of_local):
    wrong.append('scaled rotations of local layers are not supported')
  return (float(theta), found(scaling)), float(local_theta)


def _local_layers(published: dict[str, Any], gemma: bool, wrong: list[str]) -> dict[str, int]:
  """window and global_every; adds errors to `wrong`."""
  kinds, layers = published.get('layer_types'), published.get('num_hidden_layers')
  layers = layers if isinstance(layers, int) else 0  # an error is noted already
  if kinds is None:
    every = published.get('sliding_window_pattern') or 6
    kinds = ['sliding_attention' if gemma and (i + 1) % every else 'full_attention' for i in range(layers)]
  if unknown := set(kinds) - {'full_attention', 'sliding_attention'}:
    wrong.append(f'layers of the types {sorted(unknown)} are not supported')
  is_local = [kind == 'sliding_attention' for kind in kinds]
  if not any(is_local):
    return {'window': 0, 'global_every': 1}
  if not gemma:
    wrong.append('layers that read a window are not supported')
  every = (is_local + [False]).index(False) + 1
  if is_local != [(i + 1) % every != 0 for i in range(layers or len(kinds))]:
    wrong.append(f'layer_types={kinds} has no period that ends with its only full_attention')
  return {'window': published.get('sliding_window') or 0, 'global_every': every}


def _published(c: policy.Config) -> dict[str, Any]:
  """config.json of a policy, as transformers 4 writes it and 5 reads it.

  Raises:
    ValueError: no family has the parts of this policy.
  """
  plain = dict(activation='silu', norm_offset=0.0, post_norms=False, embedding_scale=False,
               query_scalar=0.0, window=0)
  family = {(False, False): 'llama', (False, True): 'qwen2', (True, False): 'qwen3'}.get(
      (c.qk_norm, c.qkv_bias))
  if any(getattr(c, name) != x for name, x in plain.items()):
    family = 'gemma3_text'
    like = dataclasses.replace(c, activation='gelu', norm_offset=1.0, post_norms=True,
                               embedding_scale=True, qk_norm=True, qkv_bias=False)
    if like != c or not c.query_scalar:
      family = None
  if family is None:
    raise ValueError(f'no published family has the parts of {c}; export adapters merged, and a policy '
                     'with q/k norms or q/k/v biases, not both')
  scaling = None
  if c.rope_scaling:
    scaling = dict(zip(('factor', 'low_freq_factor', 'high_freq_factor'), c.rope_scaling))
    scaling['rope_type'] = 'linear' if len(c.rope_scaling) == 1 else 'llama3'
    if len(c.rope_scaling) == 4:
      scaling['original_max_position_embeddings'] = int(c.rope_scaling[3])
  name = {'gemma3_text': 'Gemma3', 'llama': 'Llama', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3'}[family]
  published = {
      'architectures': [f'{name}ForCausalLM'], 'model_type': family, 'vocab_size': c.vocab_size,
      'num_hidden_layers': c.num_layers, 'hidden_size': c.width, 'num_attention_heads': c.num_heads,
      'num_key_value_heads': c.num_kv_heads, 'head_dim': c.head_width,
      'intermediate_size': c.hidden_width, 'rope_theta': c.rope_theta, 'rope_scaling': scaling,
      'rms_norm_eps': c.norm_eps, 'tie_word_embeddings': c.tie_embeddings}
  if family != 'gemma3_text':
    return published | {'hidden_act': c.activation}
  local = lambda i: 'sliding_attention' if c.is_local(i) else 'full_attention'
  return published | {
      'hidden_activation': 'gelu_pytorch_tanh',
      # transformers 5 refuses a float.
      'query_pre_attn_scalar': int(c.query_scalar) if c.query_scalar.is_integer() else c.query_scalar,
      'rope_local_base_freq': c.local_rope_theta, 'sliding_window': c.window,
      'layer_types': [local(i) for i in range(c.num_layers)]}


# Tensors.


def _names(config: policy.Config, parameter: str) -> tuple[str, str, bool]:
  """Published name and letters of a parameter, and whether each layer has one."""
  if parameter in _NAMES:
    return *_NAMES[parameter], False
  of_layer = _LAYER_NAMES | (_POST_NORM_NAMES if config.post_norms else {})
  name, letters = of_layer[parameter]
  return f'model.layers.{{}}.{name}', letters, True


def _shapes(config: policy.Config) -> Any:
  return jax.eval_shape(lambda: policy.init(policy.without_lora(config), jax.random.key(0)))


def _stored(x: np.ndarray, parameter: str, letters: str) -> np.ndarray:
  """A parameter in its published form: heads and their width are one dimension."""
  own = parameter.rpartition('_')[2]
  shape = dict(zip(own, x.shape))
  return np.einsum(f'{own}->{letters}'.lower(), x).reshape(
      [shape[a] * shape.get(b, 1) for a, b in _dimensions(letters)])


def _dimensions(letters: str) -> list[tuple[str, str]]:
  """The letters of each published dimension: heads with their width, or one letter and none."""
  return [(a, 'H' if letters[i + 1:i + 2] == 'H' else '') for i, a in enumerate(letters)
          if a != 'H' or letters == 'H']


def _part(files, name: str, parameter: str, letters: str, shape: tuple[int, ...],
          index: tuple[slice, ...]) -> np.ndarray:
  """Part of one layer's parameter, float32; only its bytes of the file are read."""
  own = parameter.rpartition('_')[2]
  size = dict(zip(own, shape))
  bounds = {letter: i.indices(n)[:2] for letter, i, n in zip(own, index, shape)}
  if letters != 'H' and 'H' in bounds and bounds['H'] != (0, size['H']):
    raise ValueError(f'{parameter} is divided inside a head, which no axis of the mesh divides')
  stored = [slice(*(x * size.get(b, 1) for x in bounds[a])) for a, b in _dimensions(letters)]
  x = files.tensor(name, stored)
  x = x.reshape([bounds[letter][1] - bounds[letter][0] for letter in letters])
  return np.einsum(f'{letters}->{own}'.lower(), x.astype(np.float32))


def params(path: str | os.PathLike, config: policy.Config) -> Any:
  """The parameters of a checkpoint, without adapters: nested dicts of float32, on the mesh that is set.

  Raises:
    ValueError: tensors are missing, unknown or of other shapes. The error names all of them.
  """
  files, shapes = pretrained.read(path), _shapes(config)
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  _check(files, config, leaves)
  mesh, bar = jax.sharding.get_mesh(), processes.progress('weights', 0, len(leaves))

  def read(path, leaf):
    parameter = path[-1].key
    name, letters, of_layers = _names(config, parameter)

    def part(index: tuple[slice, ...]) -> np.ndarray:
      if not of_layers:
        return _part(files, name, parameter, letters, leaf.shape, index)
      layers = range(*index[0].indices(leaf.shape[0]))
      first = _part(files, name.format(layers[0]), parameter, letters, leaf.shape[1:], index[1:])
      stacked = np.empty((len(layers), *first.shape), np.float32)
      stacked[0] = first
      for i, layer in enumerate(layers[1:], 1):
        stacked[i] = _part(files, name.format(layer), parameter, letters, leaf.shape[1:], index[1:])
      return stacked

    whole = (slice(None),) * len(leaf.shape)
    if mesh.empty:
      x = jax.numpy.array(part(whole))
    else:
      x = jax.make_array_from_callback(leaf.shape, sharding.at(mesh, path, leaf.shape), part)
    bar.update()
    return x

  with bar:
    return jax.tree_util.tree_map_with_path(read, shapes)


def _check(files, config: policy.Config, leaves) -> None:
  """Raises ValueError that names all tensors that are missing, unknown or of another shape."""
  wanted = {}
  for path, leaf in leaves:
    name, letters, of_layers = _names(config, path[-1].key)
    size = dict(zip(path[-1].key.rpartition('_')[2], leaf.shape[of_layers:]))
    shape = tuple(size[a] * size.get(b, 1) for a, b in _dimensions(letters))
    wanted |= {name.format(i): shape for i in range(leaf.shape[0] if of_layers else 1)}
  # Buffers that old versions saved, and a copy of a tied embedding.
  ignored = lambda name: name.endswith('rotary_emb.inv_freq') or (
      name == 'lm_head.weight' and config.tie_embeddings)
  shapes = {name: shape for name, shape in files.shapes.items() if not ignored(name)}
  wrong = [f'{name} is missing' for name in sorted(wanted.keys() - shapes)]
  wrong += [f'{name} {list(shapes[name])} is unknown' for name in sorted(shapes.keys() - wanted)]
  wrong += [f'{name} has the shape {list(shapes[name])}, not {list(shape)}'
            for name, shape in wanted.items() if shapes.get(name, shape) != shape]
  if wrong:
    raise ValueError(f'{files.path} does not hold the tensors that its config asks for: '
                     + '; '.join(wrong))


def save(directory: str | os.PathLike, config: policy.Config, params: Any, *,
         source: str | os.PathLike | None = None, dtype: str = 'float32') -> None:
  """Writes a directory that transformers and `load` can read.

  Args:
    config, params: without adapters (policy.merge).
    source: the checkpoint that training began with; its tokenizer and other files are copied.
    dtype: of the tensors: 'float32', which `load` reads bit for bit, or 'bfloat16'.

  Raises:
    ValueError: no published family has the parts of this policy, or the dtype is another one.
  """
  if dtype not in ('float32', 'bfloat16'):
    raise ValueError(f"export in dtype {dtype!r}; only 'float32' and 'bfloat16' are written")
  directory = pathlib.Path(directory)
  of_json = _published(config)
  directory.mkdir(parents=True, exist_ok=True)
  if source is not None:
    files = pretrained.read(source)
    files.save_text(directory)
    of_json = {name: x for name, x in files.config.items() if x is not None} | of_json
    for name in ('rope_parameters', 'sliding_window_pattern', '_sliding_window_pattern', 'torch_dtype'):
      of_json.pop(name, None)  # another form of fields that are set above
  (directory / 'config.json').write_text(json.dumps(of_json | {'dtype': dtype}, indent=2))
  _save_tensors(directory, config, params, np.dtype(getattr(ml_dtypes, dtype, dtype)))


def _save_tensors(directory: pathlib.Path, config: policy.Config, params: Any, dtype: np.dtype) -> None:
  """Writes files of about _FILE_BYTES, one after the other, and an index where there are several."""
  tensors: list[tuple[str, Callable[[], np.ndarray], int]] = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    parameter = path[-1].key
    name, letters, of_layers = _names(config, parameter)
    for i in range(leaf.shape[0] if of_layers else 1):
      one = lambda leaf=leaf, i=i, of_layers=of_layers: np.asarray(leaf[i] if of_layers else leaf)
      stored = lambda one=one, parameter=parameter, letters=letters: np.ascontiguousarray(
          _stored(one(), parameter, letters).astype(dtype))
      size = leaf.size // (leaf.shape[0] if of_layers else 1) * dtype.itemsize
      tensors.append((name.format(i), stored, size))
  before = np.cumsum([0] + [size for *_, size in tensors[:-1]])
  file_of = (before // _FILE_BYTES).tolist()
  count = file_of[-1] + 1
  named = lambda k: 'model.safetensors' if count == 1 else f'model-{k + 1:05d}-of-{count:05d}.safetensors'
  for k in range(count):
    safetensors.numpy.save_file(
        {name: stored() for (name, stored, _), file in zip(tensors, file_of) if file == k},
        directory / named(k), metadata={'format': 'pt'})
  if count > 1:
    (directory / 'model.safetensors.index.json').write_text(json.dumps({
        'metadata': {'total_size': int(before[-1] + tensors[-1][2])},
        'weight_map': {name: named(file) for (name, *_), file in zip(tensors, file_of)}}, indent=2))
