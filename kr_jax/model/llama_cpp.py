"""A .gguf file of llama.cpp in the form in which transformers publishes models.

Names, layouts, metadata and vocabulary (gguf_vocabulary.py) are translated. Of a tensor only the part that is asked
for is read. Source: conversion/ of llama.cpp, which writes these files, and src/models/, which says what they leave
out: where a file does not tell a field of config.json, it is what llama.cpp computes with.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from kr_jax.model import gguf_file
from kr_jax.model import gguf_vocabulary
from kr_jax.model import pipeline

_ARCHITECTURES = {
    'llama': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3', 'qwen3moe': 'qwen3_moe', 'gemma3': 'gemma3_text',
    'phi3': 'phi3', 'smollm3': 'smollm3', 'olmo2': 'olmo2'}
_NO_MODELS = ('adapter', 'imatrix', 'mmproj')  # which have the architecture of a model
_TENSORS = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
_LAYER_TENSORS = {
    'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm', 'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj',
    'attn_q_norm': 'self_attn.q_norm', 'attn_k_norm': 'self_attn.k_norm', 'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj', 'attn_qkv': 'self_attn.qkv_proj', 'ffn_gate_inp': 'mlp.gate',
    'ffn_gate_exps': 'mlp.experts.{e}.gate_proj', 'ffn_up_exps': 'mlp.experts.{e}.up_proj',
    'ffn_down_exps': 'mlp.experts.{e}.down_proj',
    'post_attention_norm': 'post_attention_layernorm', 'post_ffw_norm': 'post_feedforward_layernorm'}
_OWN_TENSORS = {'gemma3': {'ffn_norm': 'pre_feedforward_layernorm'}, 'phi3': {'ffn_up': 'mlp.gate_up_proj'}}
# No parameters: divisors of rope frequencies, and a vision tower that some converters leave in the file.
_NO_PARAMETER = re.compile(
    r'rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd\.weight|(v|mm)\..*')
# llama.cpp rotates neighbours in these, so it interleaves the halves of a head; in others it rotates halves.
_INTERLEAVED = ('llama', 'smollm3')
_NO_ROPE_EVERY = 4  # of smollm3
_MOST_LAYERS = 1000  # of a file that has no tensors, but a vocabulary alone
# Fields that change the computation, with the values that do not.
_ONLY = {'attention.causal': (True,), 'attention.scale': (0,), 'attention.clamp_kqv': (0,),
         'attention.temperature_scale': (0,), 'attn_logit_softcapping': (0,), 'embedding_scale': (0, 1),
         'logit_scale': (0, 1), 'residual_scale': (0, 1), 'rope.scaling.yarn_ext_factor': (-1, 1),
         'rope.scaling.yarn_log_multiplier': (0,)}
_OLMO3_PERIOD, _GEMMA3_PERIOD = 4, 6  # every so many layers the last reads all tokens


class _Source(NamedTuple):
  """Where a parameter lies."""

  tensor: gguf_file.Tensor
  expert: int | None = None  # of a tensor of all experts
  head_width: int = 0  # not 0: the rows of each head are interleaved
  offset: float = 0.0  # llama.cpp adds it


class Gguf:
  """A file of llama.cpp, translated to the names and layouts of transformers.

  Raises ValueError, which names file and field, where the file is broken or no architecture that is read.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._fields, self._tensors = gguf_file.read(path)
    if (kind := self._fields.get('general.type')) in _NO_MODELS:
      raise ValueError(f'{path}: general.type={kind!r}, and only a whole model is read; give the file of the model '
                       '(llama-export-lora merges an adapter into it)')
    self._architecture = self._fields.get('general.architecture')
    if self._architecture not in tuple(_ARCHITECTURES):  # it may be a list, which no dict looks up
      raise ValueError(f'{path}: general.architecture={self._architecture!r} is not one of {sorted(_ARCHITECTURES)}')

  # Fields.

  def _of(self, key: str, kind: type, default: Any = ...) -> Any:
    """A field of the architecture: a number of this kind, of 0 or more. Equal numbers, one a layer, are one."""
    key = f'{self._architecture}.{key}'
    value = self._fields.get(key)
    if value is None:
      if default is ...:
        raise ValueError(f'{self.path} lacks the field {key}; convert the model again with a newer llama.cpp')
      return default
    if isinstance(value, list):
      if len(set(value)) != 1:
        raise ValueError(f'{self.path}: {key}={value} differs between layers, which is not supported')
      value = value[0]
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind) or value < 0 or (
        not math.isfinite(value)):
      raise ValueError(f'{self.path}: {key}={value!r} is not {"a number" if kind is float else "a whole number"} of 0 '
                       'or more; convert the model again')
    return value

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """The fields of config.json. Raises ValueError where the file lacks one or does not fit its architecture."""
    self._check()
    of, family = self._of, _ARCHITECTURES[self._architecture]
    heads, width = of('attention.head_count', int), of('embedding_length', int)
    head_dim = of('attention.key_length', int, width // heads)
    config = {
        'model_type': family, 'vocab_size': self._vocab_size(), 'num_hidden_layers': of('block_count', int),
        'hidden_size': width, 'intermediate_size': of('feed_forward_length', int, 0 if family == 'qwen3_moe' else ...),
        'num_attention_heads': heads, 'num_key_value_heads': of('attention.head_count_kv', int, heads),
        'head_dim': head_dim, 'rms_norm_eps': of('attention.layer_norm_rms_epsilon', float),
        'max_position_embeddings': of('context_length', int),
        'tie_word_embeddings': 'output.weight' not in self._tensors,
        'rope_theta': of('rope.freq_base', float, 10_000.0), 'rope_scaling': None}
    if (rotated := of('rope.dimension_count', int, head_dim)) != head_dim:
      config['partial_rotary_factor'] = rotated / head_dim
    if family == 'llama' and 'blk.0.attn_q.bias' in self._tensors:
      config['attention_bias'] = True
    if (cap := of('final_logit_softcapping', float, 0.0)) > 0:
      config['final_logit_softcapping'] = cap
    config |= self._ends()
    config['rope_scaling'] = self._scaling(config)
    return config | self._of_family(config)

  def _check(self) -> None:
    """Raises ValueError where fields do not fit each other or the tensors, or are not supported."""
    of, key = self._of, lambda name: f'{self._architecture}.{name}'
    heads, width, layers = (of(name, int) for name in ('attention.head_count', 'embedding_length', 'block_count'))
    wrong = [f'{key(name)}={value} is below 1' for name, value in (
        ('attention.head_count', heads), ('block_count', layers), ('rope.freq_base', of('rope.freq_base', float, 1.0)),
        ('attention.key_length', of('attention.key_length', int, width // max(heads, 1)))) if value < 1]
    only = _ONLY | ({} if self._architecture == 'qwen3moe' else {'expert_count': (0,)})
    wrong += [f'{key(name)}={self._fields[key(name)]!r} is not supported' for name, values in only.items()
              if self._fields.get(key(name)) not in (None, *values)]
    # Lists with an element a layer and an expert are made below.
    if layers > max(len(self._tensors), _MOST_LAYERS):
      wrong.append(f'{key("block_count")}={layers}, but the file has {len(self._tensors)} tensors')
    experts = self._tensors.get('blk.0.ffn_gate_exps.weight')
    if experts is not None and experts.shape[0] != of('expert_count', int):
      wrong.append(f'{key("expert_count")}={of("expert_count", int)}, but blk.0.ffn_gate_exps.weight has the shape '
                   f'{list(experts.shape)}')
    both = [of(f'attention.{name}_length', int, None) for name in ('key', 'value')]
    if None not in both and both[0] != both[1]:
      wrong.append(f'{key("attention.key_length")}={both[0]} and {key("attention.value_length")}={both[1]} differ')
    if wrong:
      raise ValueError(f'{self.path}: {"; ".join(wrong)}')

  def _vocab_size(self) -> int:
    if (embedding := self._tensors.get('token_embd.weight')) is not None:
      return embedding.shape[0]
    tokens = self._fields.get('tokenizer.ggml.tokens')
    return self._of('vocab_size', int, len(tokens) if isinstance(tokens, list) else 0)

  def _of_family(self, config: dict[str, Any]) -> dict[str, Any]:
    """Fields that only one family has."""
    window, layers = self._of('attention.sliding_window', int, 0), config['num_hidden_layers']
    match self._architecture:
      case 'qwen3moe':  # llama.cpp always divides the chosen experts' weights by their sum
        return {'num_experts': self._of('expert_count', int), 'norm_topk_prob': True,
                'num_experts_per_tok': self._of('expert_used_count', int),
                'moe_intermediate_size': self._of('expert_feed_forward_length', int)}
      case 'gemma3':
        if f'{self._architecture}.rope.freq_base' not in self._fields:
          raise ValueError(f'{self.path} lacks the field gemma3.rope.freq_base, and then it may scale rotations '
                           'without saying so; take a file that llama.cpp converted')
        # Of the sizes that were published, in 27B alone (62 layers) the query is not scaled by head_dim.
        scalar = config['hidden_size'] // config['num_attention_heads'] if layers == 62 else config['head_dim']
        return {'sliding_window': window or None, 'query_pre_attn_scalar': scalar,
                'layer_types': self._layer_types(layers, _GEMMA3_PERIOD if window else 0),
                'rope_local_base_freq': self._of('rope.freq_base_swa', float, 10_000.0)}
      case 'phi3':
        return {'sliding_window': window or None, 'original_max_position_embeddings': self._of(
            'rope.scaling.original_context_length', int, config['max_position_embeddings'])}
      case 'smollm3':
        return {'no_rope_layers': [int((i + 1) % _NO_ROPE_EVERY != 0) for i in range(layers)]}
      case 'olmo2' if window:
        theta = config['rope_theta']
        return {'model_type': 'olmo3', 'sliding_window': window, 'rope_scaling': None,
                'layer_types': self._layer_types(layers, _OLMO3_PERIOD), 'rope_parameters': {
                    'full_attention': (config['rope_scaling'] or {'rope_type': 'default'}) | {'rope_theta': theta},
                    'sliding_attention': {
                        'rope_type': 'default', 'rope_theta': self._of('rope.freq_base_swa', float, theta)}}}
    return {}

  def _layer_types(self, layers: int, period: int) -> list[str]:
    """Kinds of layers, as the file has them or one full layer a period; period 0: all are full."""
    key = f'{self._architecture}.attention.sliding_window_pattern'
    pattern = self._fields.get(key, period) if period else [False] * layers
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
      pattern = [(i + 1) % pattern != 0 for i in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers or not all(isinstance(x, int) for x in pattern):
      raise ValueError(f'{self.path}: {key}={pattern!r} is neither a period nor a list of {layers} layers')
    return ['sliding_attention' if local else 'full_attention' for local in pattern]

  # Rotations.

  def _scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
    """rope_scaling of config.json."""
    found = self._llama_3_scaling(config) if 'rope_freqs.weight' in self._tensors else None
    if 'rope_factors_long.weight' in self._tensors:
      both = {name: self._divisors(config, f'rope_factors_{name}.weight').tolist() for name in ('short', 'long')}
      found = {'rope_type': 'longrope', 'short_factor': both['short'], 'long_factor': both['long']}
      if factor := self._of('rope.scaling.attn_factor', float, 0.0):
        found['attention_factor'] = factor
      return found
    of = functools.partial(self._of, default=0.0)
    key, factor = f'{self._architecture}.rope.scaling.type', of('rope.scaling.factor', float)
    factor = factor or of('rope.scale_linear', float)  # the older name
    kind = self._fields.get(key, 'linear' if factor else 'none')
    if kind not in ('none', 'linear', 'yarn'):
      raise ValueError(f"{self.path}: {key}={kind!r} is not one of ('none', 'linear', 'yarn'), and the file has no "
                       'divisors of frequencies')
    if kind == 'none' or (kind, factor) == ('linear', 1):
      return found
    if found:
      raise ValueError(f'{self.path}: {key}={kind!r} and the divisors in rope_freqs.weight scale rotations twice, '
                       'which is not supported; take the safetensors of this model')
    if not factor:
      raise ValueError(f'{self.path}: {key}={kind!r}, but {self._architecture}.rope.scaling.factor is missing; '
                       'convert the model again')
    found = {'rope_type': kind, 'factor': factor}
    if kind == 'yarn':
      found['original_max_position_embeddings'] = self._of('rope.scaling.original_context_length', int)
      for name, its_key in (('attention_factor', 'yarn_attn_factor'), ('beta_fast', 'yarn_beta_fast'),
                            ('beta_slow', 'yarn_beta_slow')):
        if value := of(f'rope.scaling.{its_key}', float):
          found[name] = value
    return found

  def _divisors(self, config: dict[str, Any], name: str) -> np.ndarray:
    count = round(config['head_dim'] * config.get('partial_rotary_factor', 1)) // 2
    if name not in self._tensors:
      raise ValueError(f'{self.path} lacks the tensor {name}; convert the model again')
    divisor_H = gguf_file.part(self._tensors[name], (), slice(None)).astype(np.float64)
    if divisor_H.shape != (count,):
      raise ValueError(f'{self.path}: {name} has the shape {list(divisor_H.shape)}, where {count} frequencies rotate; '
                       'take another file of this model')
    if not (np.isfinite(divisor_H).all() and divisor_H.min() > 0):
      raise ValueError(f'{self.path}: {name} holds numbers that divide no frequency: {divisor_H[:9]}; take another '
                       'file of this model')
    return np.array([float(str(np.float32(x))) for x in divisor_H])  # as they were written in config.json

  def _llama_3_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
    """rope_scaling, from the divisors of the frequencies that it gave."""
    divisor_H = self._divisors(config, 'rope_freqs.weight')
    factor, low, high = float(divisor_H.max()), 1.0, 4.0  # the bounds of all published models
    if factor == divisor_H.min() == 1:
      return None
    rotations_H = config['rope_theta'] ** (-np.arange(len(divisor_H)) / len(divisor_H)) / (2 * np.pi)
    kept_H = (1 / divisor_H - 1 / factor) / (1 - 1 / factor) if factor > 1 else np.zeros(len(divisor_H))
    mixed_H = (kept_H > 1e-3) & (kept_H < 1 - 1e-3)
    context_H = (low + kept_H * (high - low)) / rotations_H
    context = int(np.round(np.median(context_H[mixed_H]))) if mixed_H.any() else 0
    wanted_H = np.clip((context * rotations_H - low) / (high - low), 0, 1)
    if not context or np.abs(wanted_H - kept_H).max() > 1e-3:
      raise ValueError(f'{self.path}: rope_freqs.weight holds other divisors than Llama 3 with bounds of '
                       '1 and 4 rotations; take the safetensors of this model')
    return {'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': low, 'high_freq_factor': high,
            'original_max_position_embeddings': context}

  # Tensors.

  @functools.cached_property
  def _sources(self) -> dict[str, _Source]:
    """Where each parameter lies, by its published name. A tensor that is none keeps its own name."""
    of_layer = _LAYER_TENSORS | _OWN_TENSORS.get(self._architecture, {})
    found = {}
    for own, tensor in self._tensors.items():
      if _NO_PARAMETER.fullmatch(own):
        continue
      stem, _, kind = own.rpartition('.')
      layer = re.fullmatch(r'blk\.(\d+)\.(.*)', stem)
      name = own
      if layer and layer[2] in of_layer:
        name = f'model.layers.{layer[1]}.{of_layer[layer[2]]}.{kind}'
      elif stem in _TENSORS:
        name = f'{_TENSORS[stem]}.{kind}'
      interleaved = self._architecture in _INTERLEAVED and re.search(r'\.[qk]_proj\.', name)
      source = _Source(tensor, head_width=self.config['head_dim'] if interleaved else 0,
                       offset=1.0 if self._architecture == 'gemma3' and 'norm' in name else 0.0)
      if '{e}' in name and len(tensor.shape) == 3:
        found |= {name.replace('{e}', str(e)): source._replace(expert=e) for e in range(tensor.shape[0])}
      else:
        found[name] = source
    return found

  @functools.cached_property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that is a parameter."""
    return {name: source.tensor.shape[source.expert is not None:] for name, source in self._sources.items()}

  def tensor(self, name: str, index: Sequence[slice]) -> np.ndarray:
    """Part of a tensor, float32; only the blocks that hold it are read."""
    source, index = self._sources[name], tuple(index)
    if source.expert is not None:
      return gguf_file.part(source.tensor, (source.expert, *index[:-1]), index[-1])
    if source.head_width:
      rows = self._rows(name, source)[index[0]]
      if len(index) == 1:  # a bias
        return gguf_file.part(source.tensor, (), slice(None))[rows]
      return gguf_file.part(source.tensor, (rows,), index[1])
    x = gguf_file.part(source.tensor, index[:-1], index[-1])
    return x - source.offset if source.offset else x

  def _rows(self, name: str, source: _Source) -> np.ndarray:
    """The row of the file that each published row is: number i of half j of a head lies at 2 i + j."""
    count, width = source.tensor.shape[0], source.head_width
    if width % 2 or count % width:
      raise ValueError(f'{self.path}: {name} has {count} rows, which are no heads of {width}; take another file of '
                       'this model')
    return np.arange(count).reshape(-1, width // 2, 2).swapaxes(1, 2).reshape(-1)

  # Text.

  @functools.cached_property
  def _vocabulary(self) -> gguf_vocabulary.Vocabulary:
    return gguf_vocabulary.read(self.path, self._architecture, self._fields)

  def _ends(self) -> dict[str, Any]:
    """bos_token_id and eos_token_id of config.json, None where the file has no vocabulary or says none."""
    return {f'{name}_token_id': self._fields.get(f'tokenizer.ggml.{name}_token_id') for name in ('bos', 'eos')}

  @functools.cached_property
  def tokenizer_config(self) -> dict[str, Any]:
    return self._vocabulary.tokenizer_config

  @functools.cached_property
  def generation_config(self) -> dict[str, Any]:
    return {'eos_token_id': list(self._vocabulary.ends)}

  @functools.cached_property
  def tokenizer_json(self) -> str:
    vocabulary = self._vocabulary
    try:
      return pipeline.within(lambda: gguf_vocabulary.tokenizer(vocabulary).to_str())
    except ValueError as error:
      raise ValueError(f'{self.path}: no tokenizer can be made of its fields: {error}; convert the model again with a '
                       'newer llama.cpp') from error

  def json(self, name: str) -> dict[str, Any]:
    """The object in a file of transformers; {} for those that this file has nothing for."""
    return {'config.json': self.config, 'tokenizer_config.json': self.tokenizer_config,
            'generation_config.json': self.generation_config}.get(name, {})

  def save_text(self, directory: pathlib.Path) -> None:
    """Writes the files that a tokenizer is read from."""
    (directory / 'tokenizer.json').write_text(self.tokenizer_json, encoding='utf-8')
    for name in ('tokenizer_config', 'generation_config'):
      (directory / f'{name}.json').write_text(json.dumps(getattr(self, name), indent=2), encoding='utf-8')
