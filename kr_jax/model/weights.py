"""A published checkpoint <-> the policy's config and parameters (kr_jax/README.md: families, examples).

config.json is read as transformers 4 and 5 write it. A device reads its own shard of each tensor, layer by layer, so
that a host never holds more than the shards of its devices and one stacked parameter.

A parameter's letters are its axes: the published q [N H, D] is q_DNH here.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import json
import os
import pathlib
import re
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
    'attention_norm_D': ('input_layernorm.weight', 'D'), 'mlp_norm_D': ('post_attention_layernorm.weight', 'D'),
    'q_DNH': ('self_attn.q_proj.weight', 'NHD'), 'q_bias_NH': ('self_attn.q_proj.bias', 'NH'),
    'k_DKH': ('self_attn.k_proj.weight', 'KHD'), 'k_bias_KH': ('self_attn.k_proj.bias', 'KH'),
    'v_DKH': ('self_attn.v_proj.weight', 'KHD'), 'v_bias_KH': ('self_attn.v_proj.bias', 'KH'),
    'o_NHD': ('self_attn.o_proj.weight', 'DNH'), 'down_FD': ('mlp.down_proj.weight', 'DF'),
    'q_norm_H': ('self_attn.q_norm.weight', 'H'), 'k_norm_H': ('self_attn.k_norm.weight', 'H'),
    'gate_DF': ('mlp.gate_proj.weight', 'FD'), 'up_DF': ('mlp.up_proj.weight', 'FD')}
_POST_NORM_NAMES = {
    'attention_post_norm_D': ('post_attention_layernorm.weight', 'D'),
    'mlp_norm_D': ('pre_feedforward_layernorm.weight', 'D'),
    'mlp_post_norm_D': ('post_feedforward_layernorm.weight', 'D')}
# `save` begins a new file after about so many bytes.
_FILE_BYTES = 4_000_000_000


def load(path: str | os.PathLike, *, dtype: str = 'float32', remat: str = 'none') -> tuple[policy.Config, Any]:
  """The policy of a checkpoint: its config, and its parameters in float32, on the mesh that is set.

  `path` is as pretrained.find takes it, `dtype` and `remat` as policy.Config has them. Raises ValueError where
  nothing is there, or the checkpoint is not supported or does not fit; the error names all reasons.
  """
  found = config(path, dtype=dtype, remat=remat)
  return found, params(path, found)


def config(path: str | os.PathLike, *, dtype: str = 'float32', remat: str = 'none', lora_rank: int = 0,
           lora_alpha: float = 16.0) -> policy.Config:
  """The config of a checkpoint; no tensor is read. Raises ValueError as `load` does."""
  files = pretrained.read(path)
  fields = _fields(files.config, files.path)
  return policy.Config(**fields, dtype=dtype, remat=remat, lora_rank=lora_rank, lora_alpha=lora_alpha)


_FAMILIES = ('gemma3_text', 'llama', 'qwen2', 'qwen3')
_ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu'}
# Types of rope scaling, and the fields that each has.
_SCALINGS = {'default': (), 'linear': ('factor',), 'llama3': (
    'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')}
# Fields that change the computation, with the values beside null that are supported.
_ONLY = {'attention_bias': (False,), 'mlp_bias': (False,), 'use_sliding_window': (False,),
         'use_bidirectional_attention': (False,), 'rope_interleaved': (False,), 'partial_rotary_factor': (1,),
         'attn_logit_softcapping': (), 'final_logit_softcapping': (), 'quantization_config': ()}


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
  theta, scaling, local_theta = _rope(published, gemma, wrong)
  local = _local_layers(published, gemma, wrong)
  if wrong:
    raise ValueError(f'{path}: {"; ".join(wrong)}')
  heads = published['num_attention_heads']
  head_width = {'gemma3_text': 256, 'qwen3': 128}.get(family, published['hidden_size'] // heads)
  fields = {
      'vocab_size': published['vocab_size'], 'num_layers': published['num_hidden_layers'],
      'width': published['hidden_size'], 'num_heads': heads,
      'num_kv_heads': published.get('num_key_value_heads') or heads,
      'head_width': published.get('head_dim') or head_width, 'hidden_width': published['intermediate_size'],
      'rope_theta': theta, 'rope_scaling': scaling, 'norm_eps': published.get('rms_norm_eps') or 1e-6,
      'qk_norm': family in ('qwen3', 'gemma3_text'), 'qkv_bias': family == 'qwen2',
      'tie_embeddings': published.get('tie_word_embeddings', gemma), 'activation': _ACTIVATIONS[activation]}
  if not gemma:
    return fields
  return fields | local | {
      'norm_offset': 1.0, 'post_norms': True, 'embedding_scale': True, 'local_rope_theta': local_theta,
      'query_scalar': float(published.get('query_pre_attn_scalar') or 256)}


def _rope(published: dict[str, Any], gemma: bool, wrong: list[str]) -> tuple[float, tuple[float, ...], float]:
  """Theta and scaling of the rotations, and theta of local layers; adds errors to `wrong`."""
  both = published.get('rope_parameters') or {}  # transformers 5
  of_all = both.get('full_attention', both)
  theta = of_all.get('rope_theta', published.get('rope_theta')) or (1e6 if gemma else 1e4)
  of_local = both.get('sliding_attention') or {}
  local_theta = of_local.get('rope_theta', published.get('rope_local_base_freq')) or 1e4
  scaling = of_all if both else published.get('rope_scaling') or {}

  def found(scaling):
    kind = scaling.get('rope_type', scaling.get('type')) or 'default'
    if kind not in _SCALINGS:
      wrong.append(f'rope scaling of the type {kind!r} is not one of {sorted(_SCALINGS)}')
    elif missing := [name for name in _SCALINGS[kind] if not isinstance(scaling.get(name), (int, float))]:
      wrong.append(f'rope scaling of the type {kind!r} lacks {missing}')
    else:
      return tuple(float(scaling[name]) for name in _SCALINGS[kind])
    return ()

  if found(of_local):
    wrong.append('scaled rotations of local layers are not supported')
  return float(theta), found(scaling), float(local_theta)


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
  """config.json of a policy, as transformers 4 writes it and 5 reads it. Raises ValueError where no family fits."""
  plain = dict(activation='silu', norm_offset=0, post_norms=False, embedding_scale=False, query_scalar=0, window=0)
  gemma = dict(activation='gelu', norm_offset=1, post_norms=True, embedding_scale=True, qk_norm=True, qkv_bias=False)
  family = {(False, False): 'llama', (False, True): 'qwen2', (True, False): 'qwen3'}.get((c.qk_norm, c.qkv_bias))
  if plain != {name: getattr(c, name) for name in plain}:
    is_gemma = c.query_scalar and gemma == {name: getattr(c, name) for name in gemma}
    family = 'gemma3_text' if is_gemma else None
  if family is None:
    raise ValueError(f'no published family has the parts of {c}; export adapters merged, and a policy '
                     'with q/k norms or q/k/v biases, not both')
  scaling = None
  if c.rope_scaling:
    scaling = dict(zip(_SCALINGS['llama3'], c.rope_scaling))
    scaling['rope_type'] = 'linear' if len(scaling) == 1 else 'llama3'
    if len(c.rope_scaling) == 4:
      scaling['original_max_position_embeddings'] = int(c.rope_scaling[3])
  name = {'gemma3_text': 'Gemma3', 'llama': 'Llama', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3'}[family]
  published = {
      'architectures': [f'{name}ForCausalLM'], 'model_type': family, 'vocab_size': c.vocab_size,
      'num_hidden_layers': c.num_layers, 'hidden_size': c.width, 'num_attention_heads': c.num_heads,
      'num_key_value_heads': c.num_kv_heads, 'head_dim': c.head_width, 'intermediate_size': c.hidden_width,
      'rope_theta': c.rope_theta, 'rope_scaling': scaling, 'rms_norm_eps': c.norm_eps,
      'tie_word_embeddings': c.tie_embeddings}
  if family != 'gemma3_text':
    return published | {'hidden_act': c.activation}
  return published | {
      'hidden_activation': 'gelu_pytorch_tanh',
      # transformers 5 refuses a float.
      'query_pre_attn_scalar': int(c.query_scalar) if c.query_scalar.is_integer() else c.query_scalar,
      'rope_local_base_freq': c.local_rope_theta, 'sliding_window': c.window,
      'layer_types': ['sliding_attention' if c.is_local(i) else 'full_attention' for i in range(c.num_layers)]}


def _names(config: policy.Config, parameter: str) -> tuple[str, str, bool]:
  """Published name and letters of a parameter, and whether each layer has one."""
  if parameter in _NAMES:
    return *_NAMES[parameter], False
  of_layer = _LAYER_NAMES | (_POST_NORM_NAMES if config.post_norms else {})
  name, letters = of_layer[parameter]
  return f'model.layers.{{}}.{name}', letters, True


def _stored(leaf: jax.Array, layer: Any, parameter: str, letters: str, dtype: np.dtype) -> np.ndarray:
  """A layer's parameter, or all of it (...), in its published form."""
  x = np.asarray(leaf[layer])
  x = np.einsum(f'{parameter.rpartition("_")[2]}->{letters}', x).reshape(_stored_shape(parameter, letters, x.shape))
  return np.ascontiguousarray(x.astype(dtype))


def _stored_shape(parameter: str, letters: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The published shape of a parameter: heads and their width are one dimension."""
  size = dict(zip(parameter.rpartition('_')[2], shape))
  return tuple(size[a] * size.get(b, 1) for a, b in _dimensions(letters))


def _dimensions(letters: str) -> list[tuple[str, str]]:
  """The letters of each published dimension: heads with their width, or one letter and none."""
  return re.findall('([^H]|^H)(H?)', letters)


def _part(files, name: str, parameter: str, letters: str, shape: tuple[int, ...],
          index: tuple[slice, ...]) -> np.ndarray:
  """Part of one layer's parameter, float32; only its bytes of the file are read."""
  own = parameter.rpartition('_')[2]
  size, part = dict(zip(own, shape)), {letter: range(n)[i] for letter, n, i in zip(own, shape, index)}
  if letters != 'H' and 'H' in part and part['H'] != range(size['H']):
    raise ValueError(f'{parameter} is divided inside a head, which no axis of the mesh divides')
  stored = [slice(part[a].start * size.get(b, 1), part[a].stop * size.get(b, 1)) for a, b in _dimensions(letters)]
  x = files.tensor(name, stored).reshape([len(part[letter]) for letter in letters])
  return np.einsum(f'{letters}->{own}', x.astype(np.float32))


def params(path: str | os.PathLike, config: policy.Config) -> Any:
  """The parameters of a checkpoint, without adapters: nested dicts of float32, on the mesh that is set.

  Raises ValueError that names all tensors that are missing, unknown or of other shapes.
  """
  files = pretrained.read(path)
  shapes = jax.eval_shape(lambda: policy.init(policy.without_lora(config), jax.random.key(0)))
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  _check(files, config, leaves)
  mesh, bar = jax.sharding.get_mesh(), processes.progress('weights', 0, len(leaves))

  def read(path, leaf):
    parameter = path[-1].key
    name, letters, of_layers = _names(config, parameter)

    def part(index: tuple[slice, ...]) -> np.ndarray:
      if not of_layers:
        return _part(files, name, parameter, letters, leaf.shape, index)
      stacked = np.empty([len(range(n)[i]) for n, i in zip(leaf.shape, index)], np.float32)
      for i, layer in enumerate(range(leaf.shape[0])[index[0]]):
        stacked[i] = _part(files, name.format(layer), parameter, letters, leaf.shape[1:], index[1:])
      return stacked

    if mesh.empty:
      x = jax.numpy.array(part((slice(None),) * len(leaf.shape)))
    else:
      x = jax.make_array_from_callback(leaf.shape, sharding.at(mesh, path, leaf.shape), part)
    bar.update()
    return x

  with bar:
    return jax.tree_util.tree_map_with_path(read, shapes)


def _check(files, config: policy.Config, leaves) -> None:
  wanted = {}
  for path, leaf in leaves:
    name, letters, of_layers = _names(config, path[-1].key)
    shape = _stored_shape(path[-1].key, letters, leaf.shape[of_layers:])
    wanted |= {name.format(i): shape for i in range(leaf.shape[0] if of_layers else 1)}
  # Buffers that old versions saved, and a copy of a tied embedding.
  ignored = lambda name: name.endswith('rotary_emb.inv_freq') or (name == 'lm_head.weight' and config.tie_embeddings)
  shapes = {name: shape for name, shape in files.shapes.items() if not ignored(name)}
  wrong = [f'{name} is missing' for name in sorted(wanted.keys() - shapes)]
  wrong += [f'{name} {list(shapes[name])} is unknown' for name in sorted(shapes.keys() - wanted)]
  wrong += [f'{name} has the shape {list(shapes[name])}, not {list(shape)}'
            for name, shape in wanted.items() if shapes.get(name, shape) != shape]
  if wrong:
    raise ValueError(f'{files.path} does not hold the tensors that its config asks for: {"; ".join(wrong)}')


def save(directory: str | os.PathLike, config: policy.Config, params: Any, *,
         source: str | os.PathLike | None = None, dtype: str = 'float32') -> None:
  """Writes a directory that transformers and `load` can read.

  Args:
    config, params: without adapters (policy.merge).
    source: the checkpoint that training began with; its tokenizer and other files are copied.
    dtype: of the tensors: 'float32', which `load` reads bit for bit, or 'bfloat16'.

  Raises ValueError where no published family has the parts of this policy, or the dtype is another one.
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
  tensors: list[tuple[str, int, Callable[[], np.ndarray]]] = []  # name, bytes
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    parameter = path[-1].key
    name, letters, of_layers = _names(config, parameter)
    layers = range(leaf.shape[0]) if of_layers else [...]
    for i in layers:
      stored = functools.partial(_stored, leaf, i, parameter, letters, dtype)
      tensors.append((name.format(i), leaf.size // len(layers) * dtype.itemsize, stored))
  end = np.cumsum([size for _, size, _ in tensors])
  file_of = (np.append(0, end[:-1]) // _FILE_BYTES).tolist()
  count = file_of[-1] + 1
  named = lambda k: 'model.safetensors' if count == 1 else f'model-{k + 1:05d}-of-{count:05d}.safetensors'
  for k in range(count):
    safetensors.numpy.save_file(
        {name: stored() for (name, _, stored), file in zip(tensors, file_of) if file == k},
        directory / named(k), metadata={'format': 'pt'})
  if count > 1:
    (directory / 'model.safetensors.index.json').write_text(json.dumps({
        'metadata': {'total_size': int(end[-1])},
        'weight_map': {name: named(file) for (name, *_), file in zip(tensors, file_of)}}, indent=2))
