"""A family of published models <-> policy.Config: the fields of config.json, and where each parameter lies in a file.

`fields` reads config.json as transformers 4 and 5 write it; an absent field is what it is to transformers 5 (its
models/*/configuration_*.py). `published` writes it. `stored` names the tensor of a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
import os
import re
from typing import Any, NamedTuple

from kr_jax.model import config_json
from kr_jax.model import policy

# Text towers of multimodal checkpoints: how names of tensors begin there, and without the rest of the model.
PREFIXES = {'language_model.model.': 'model.', 'model.language_model.': 'model.', 'language_model.lm_head.': 'lm_head.'}
# The parts of multimodal checkpoints that no text is read by.
OTHER_TOWERS = ('vision_tower.', 'model.vision_tower.', 'multi_modal_projector.', 'model.multi_modal_projector.')


class Stored(NamedTuple):
  """Where a parameter lies in a published file."""

  name: str  # of the tensor; '{}' stands for the number of the layer, '{e}' for that of the expert
  letters: str  # axes of the tensor of one layer and one expert: 'NHD' is [N * H, D]
  first: int = 0  # first row of the parameter, of a tensor that holds several
  rows: int = 0  # of such a tensor; 0: the parameter is the whole tensor


_OF_MODEL = {'embed_VD': Stored('model.embed_tokens.weight', 'VD'), 'norm_D': Stored('model.norm.weight', 'D'),
             'output_DV': Stored('lm_head.weight', 'VD')}
_OF_LAYER = {
    'attention_norm_D': Stored('input_layernorm.weight', 'D'),
    'mlp_norm_D': Stored('post_attention_layernorm.weight', 'D'),
    'q_DNH': Stored('self_attn.q_proj.weight', 'NHD'), 'q_bias_NH': Stored('self_attn.q_proj.bias', 'NH'),
    'k_DKH': Stored('self_attn.k_proj.weight', 'KHD'), 'k_bias_KH': Stored('self_attn.k_proj.bias', 'KH'),
    'v_DKH': Stored('self_attn.v_proj.weight', 'KHD'), 'v_bias_KH': Stored('self_attn.v_proj.bias', 'KH'),
    'o_NHD': Stored('self_attn.o_proj.weight', 'DNH'),
    'q_norm_H': Stored('self_attn.q_norm.weight', 'H'), 'k_norm_H': Stored('self_attn.k_norm.weight', 'H'),
    'q_norm_NH': Stored('self_attn.q_norm.weight', 'NH'), 'k_norm_KH': Stored('self_attn.k_norm.weight', 'KH'),
    'gate_DF': Stored('mlp.gate_proj.weight', 'FD'), 'up_DF': Stored('mlp.up_proj.weight', 'FD'),
    'down_FD': Stored('mlp.down_proj.weight', 'DF'),
    'router_DE': Stored('mlp.gate.weight', 'ED'), 'gate_EDF': Stored('mlp.experts.{e}.gate_proj.weight', 'FD'),
    'up_EDF': Stored('mlp.experts.{e}.up_proj.weight', 'FD'),
    'down_EFD': Stored('mlp.experts.{e}.down_proj.weight', 'DF')}
_POST_NORMS = {
    'attention_post_norm_D': Stored('post_attention_layernorm.weight', 'D'),
    'mlp_norm_D': Stored('pre_feedforward_layernorm.weight', 'D'),
    'mlp_post_norm_D': Stored('post_feedforward_layernorm.weight', 'D')}


def stored(config: policy.Config, parameter: str) -> tuple[Stored, bool]:
  """Where a parameter lies, and whether each layer has one."""
  if parameter in _OF_MODEL:
    return _OF_MODEL[parameter], False
  others = (_POST_NORMS if config.post_norms else {}) | (_fused(config) if config.family == 'phi3' else {})
  found = (_OF_LAYER | others)[parameter]
  return found._replace(name=f'model.layers.{{}}.{found.name}'), True


def dimensions(letters: str) -> list[str]:
  """The letters of each dimension of a published tensor, in which heads and their width are one: 'NH' and 'D'."""
  return re.findall('[^H]H?|^H', letters)


def _fused(c: policy.Config) -> dict[str, Stored]:
  """Phi-3 has one matrix for queries, keys and values, and one for both products of the MLP."""
  q, k = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
  qkv, gate_up = 'self_attn.qkv_proj.weight', 'mlp.gate_up_proj.weight'
  return {'q_DNH': Stored(qkv, 'NHD', 0, q + 2 * k), 'k_DKH': Stored(qkv, 'KHD', q, q + 2 * k),
          'v_DKH': Stored(qkv, 'KHD', q + k, q + 2 * k),
          'gate_DF': Stored(gate_up, 'FD', 0, 2 * c.hidden_width),
          'up_DF': Stored(gate_up, 'FD', c.hidden_width, 2 * c.hidden_width)}


class _Family(NamedTuple):
  """What models of a family have in common."""

  name: str  # of its classes in transformers
  defaults: dict[str, Any]  # fields of config.json that it need not hold
  parts: dict[str, Any] = {}  # fields of policy.Config, where they differ from _PLAIN
  local: str = ''  # which layers read the window: '' none, 'all', 'kinds' by their kind
  by_kind: bool = False  # whether rotations are given for each kind of layer


def _sizes(vocab: int, width: int, hidden: int, layers: int, heads: int, kv_heads: int | None, context: int,
           **others: Any) -> dict[str, Any]:
  return {'vocab_size': vocab, 'hidden_size': width, 'intermediate_size': hidden, 'num_hidden_layers': layers,
          'num_attention_heads': heads, 'num_key_value_heads': kv_heads, 'max_position_embeddings': context,
          'head_dim': None, 'rms_norm_eps': 1e-6, 'tie_word_embeddings': False, 'rope_theta': 1e4,
          'hidden_act': 'silu', 'sliding_window': None} | others


_PLAIN = {'qk_norm': False, 'qk_norm_whole': False, 'qkv_bias': False, 'norm_offset': 0.0, 'pre_norms': True,
          'post_norms': False, 'embedding_scale': False}
_OLMO = {'qk_norm': True, 'qk_norm_whole': True, 'pre_norms': False, 'post_norms': True}
# In the order in which a policy from scratch, which has no family, is looked for.
_FAMILIES = {
    'llama': _Family('Llama', _sizes(32_000, 4096, 11_008, 32, 32, None, 2048)),
    'qwen2': _Family('Qwen2', _sizes(151_936, 4096, 22_016, 32, 32, 32, 32_768, sliding_window=4096,
                                     max_window_layers=28), {'qkv_bias': True}, 'kinds'),
    'qwen3': _Family('Qwen3', _sizes(151_936, 4096, 22_016, 32, 32, 32, 32_768, head_dim=128, sliding_window=4096,
                                     max_window_layers=28), {'qk_norm': True}, 'kinds'),
    'qwen3_moe': _Family('Qwen3Moe', _sizes(
        151_936, 2048, 6144, 24, 32, 4, 32_768, sliding_window=4096, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=False), {'qk_norm': True}, 'all'),
    'mistral': _Family('Mistral', _sizes(32_000, 4096, 14_336, 32, 32, 8, 131_072, sliding_window=4096), {}, 'all'),
    'phi3': _Family('Phi3', _sizes(32_064, 3072, 8192, 32, 32, None, 4096, rms_norm_eps=1e-5,
                                   original_max_position_embeddings=4096), {}, 'all'),
    'smollm3': _Family('SmolLM3', _sizes(128_256, 2048, 11_008, 36, 16, 4, 32_768, tie_word_embeddings=True,
                                         rope_theta=2e6, no_rope_layer_interval=4), {}, 'kinds'),
    'olmo2': _Family('Olmo2', _sizes(50_304, 4096, 11_008, 32, 32, None, 2048, rms_norm_eps=1e-5), _OLMO),
    'olmo3': _Family('Olmo3', _sizes(50_304, 4096, 11_008, 32, 32, None, 2048, rms_norm_eps=1e-5, rope_theta=5e5,
                                     rope_local_base_freq=5e5, sliding_window=4096), _OLMO, 'kinds', by_kind=True),
    'gemma3_text': _Family('Gemma3', _sizes(
        262_208, 2304, 9216, 26, 8, 4, 131_072, head_dim=256, tie_word_embeddings=True, rope_theta=1e6,
        rope_local_base_freq=1e4, sliding_window=4096, sliding_window_pattern=6, hidden_activation='gelu_pytorch_tanh',
        query_pre_attn_scalar=256),
        {'qk_norm': True, 'norm_offset': 1.0, 'post_norms': True, 'embedding_scale': True}, 'kinds', by_kind=True)}
_TOWERS = {'gemma3': 'gemma3_text'}  # multimodal models, and the family of their text towers
_ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'gelu_pytorch_tanh': 'gelu', 'gelu_new': 'gelu'}
_MOST_LAYERS, _MOST_EXPERTS = 10_000, 2 ** 18  # each has names of its own; experts of all layers together
_LONGEST = 400  # characters of what is said of a field, whose value may be long
_KINDS = {'full_attention': False, 'attention': False, 'sliding_attention': True}  # of layers: whether they are local
# Fields that change the computation or what is read, with the values beside null that are supported.
_ONLY = {'attention_bias': (False,), 'mlp_bias': (False,), 'use_bidirectional_attention': (False,),
         'rope_interleaved': (False,), 'use_mrope': (False,), 'attn_logit_softcapping': (),
         'final_logit_softcapping': (), 'mlp_only_layers': ([],), 'decoder_sparse_step': (1,), 'per_layer_config': (),
         'transformers_weights': ('model.safetensors',)}


def fields(published: Mapping[str, Any], path: str | os.PathLike, length: int = 0) -> dict[str, Any]:
  """Fields of policy.Config.

  Args:
    published: config.json; an absent field has its family's default.
    path: named by errors.
    length: tokens of the longest sequence that will be read. Long models of Phi-3 have one list of divisors for
      sequences up to their original context, and one for longer ones. Here one list holds for all sequences, so
      that a token keeps its rotation when its sequence grows: the list for this length.

  Raises ValueError that names all that is not supported, or is not what it should be.
  """
  tower, name, known = published, published.get('model_type'), sorted([*_FAMILIES, *_TOWERS])
  if name not in known:
    raise ValueError(f'{path}: model_type {repr(name)[:_LONGEST]} is not one of {known}')
  if name in _TOWERS:
    name, tower = _TOWERS[name], published.get('text_config') or {}
    if not isinstance(tower, Mapping):
      raise ValueError(f'{path}: text_config is {repr(tower)[:_LONGEST]}, not an object')
    # The output matrix belongs to the whole.
    tower = dict(tower, model_type=name, tie_word_embeddings=published.get('tie_word_embeddings', True))
  family = _FAMILIES[name]
  read = config_json.Reader(tower, family.defaults)
  sizes = _read_sizes(read)
  _note_unsupported(read, published)
  activation = read.of['hidden_activation' if name == 'gemma3_text' else 'hidden_act']
  if str(activation) not in _ACTIVATIONS:
    read.wrong.append(f'the activation {activation!r} is not one of {sorted(_ACTIVATIONS)}')
  found = _PLAIN | family.parts | sizes | _local_layers(read, family, sizes['num_layers']) | config_json.rope(
      read, head_width=sizes['head_width'], context=sizes['context'], length=length, by_kind=family.by_kind) | {
          'family': name, 'activation': _ACTIVATIONS.get(str(activation)),
          'norm_eps': float(read.number('rms_norm_eps')),
          'tie_embeddings': read.flag('tie_word_embeddings'),
          'no_rope_layers': _no_rope_layers(read, sizes['num_layers']) if name == 'smollm3' else (),
          'query_scalar': float(read.number('query_pre_attn_scalar')) if name == 'gemma3_text' else 0.0}
  if read.wrong:
    raise ValueError(f'{path}: {"; ".join(x[:_LONGEST] for x in dict.fromkeys(read.wrong))}')
  return found


def _read_sizes(read: config_json.Reader) -> dict[str, Any]:
  is_moe = 'moe_intermediate_size' in read.of
  whole = lambda name: read.number(name, at_least=1)
  optional = lambda name, default: default if read.of[name] is None else whole(name)
  width, heads = whole('hidden_size'), whole('num_attention_heads')
  usual_head = 2 if read.wrong else max(1, width // heads)  # an error is noted once
  sizes = {
      'vocab_size': whole('vocab_size'), 'num_layers': whole('num_hidden_layers'), 'width': width, 'num_heads': heads,
      'num_kv_heads': optional('num_key_value_heads', heads),
      'head_width': optional('head_dim', usual_head), 'context': whole('max_position_embeddings'),
      'hidden_width': whole('moe_intermediate_size' if is_moe else 'intermediate_size')}
  if (layers := sizes['num_layers']) > _MOST_LAYERS:
    read.wrong.append(f'num_hidden_layers is {layers}, above the limit of {_MOST_LAYERS}')
    sizes['num_layers'] = 1
  if not read.wrong and heads % sizes['num_kv_heads']:
    read.wrong.append(f'num_attention_heads={heads} is not a multiple of num_key_value_heads={sizes["num_kv_heads"]}')
  if not is_moe:
    return sizes
  # transformers 5 writes another name.
  experts, chosen = read.number('num_experts', at_least=1), read.number('num_experts_per_tok', at_least=1)
  if 'num_local_experts' in read.of:
    experts = whole('num_local_experts')
  if chosen > experts:
    read.wrong.append(f'num_experts_per_tok={chosen} is above num_experts={experts}')
  if layers * experts > _MOST_EXPERTS:
    read.wrong.append(f'num_experts={experts} in each of {layers} layers are above the limit of {_MOST_EXPERTS}')
  return sizes | {'num_experts': experts, 'experts_per_token': chosen,
                  'normalize_experts': read.flag('norm_topk_prob')}


def _note_unsupported(read: config_json.Reader, whole: Mapping[str, Any]) -> None:
  """Notes what changes the computation and is not supported. whole: config.json, also of other towers."""
  unread = ('attention_bias',) if read.of['model_type'] == 'qwen2' else ()  # which has its biases anyway
  read.wrong += [f'{name}={read.of[name]!r} is not supported' for name, supported in _ONLY.items()
                 if name not in unread and read.of.get(name) not in (None, *supported)]
  for name in ('quantization_config', 'compression_config'):
    if found := read.mapping(name) or read.mapping(name, whole):
      method = found.get('quant_method', 'a method without a name')
      read.wrong.append(f'{name}: the weights are quantised by {method!r}; take the checkpoint that this one was '
                        'made of, in bfloat16 or float32')


def _local_layers(read: config_json.Reader, family: _Family, layers: int) -> dict[str, Any]:
  """local_layers and window."""
  name, kinds, window = read.of['model_type'], read.of.get('layer_types'), read.of['sliding_window']
  if name.startswith('qwen') and not read.flag('use_sliding_window'):
    window = None
  local = usual = _usual_local(read, family, layers, window)
  if kinds is not None:
    if not isinstance(kinds, list) or len(kinds) != layers or not set(map(str, kinds)) <= _KINDS.keys():
      held = f'{len(kinds)} of {sorted(set(map(str, kinds)))}' if isinstance(kinds, list) else repr(kinds)
      read.wrong.append(f'layer_types holds {held}, not num_hidden_layers={layers} of {sorted(_KINDS)}')
    elif family.local == 'kinds':
      local = [_KINDS[kind] for kind in kinds]
    elif usual != [_KINDS[kind] for kind in kinds]:
      read.wrong.append(f'layer_types={kinds} is not supported of {name!r}, whose layers all read '
                        f'{"the window" if any(usual) else "all tokens"}')
  if not any(local):
    return {'local_layers': (), 'window': 0}
  if window is None:
    read.wrong.append('layers read a window, and sliding_window is null or use_sliding_window false')
    return {'local_layers': (), 'window': 0}
  return {'local_layers': tuple(local), 'window': read.number('sliding_window', at_least=1)}


def _usual_local(read: config_json.Reader, family: _Family, layers: int, window: Any) -> list[bool]:
  """Which layers read the window where layer_types does not say it."""
  every = lambda n: [(i + 1) % n != 0 for i in range(layers)]
  match read.of['model_type']:
    case 'gemma3_text':
      return every(read.number('sliding_window_pattern', at_least=1))
    case 'olmo3':
      return every(4)
    case 'smollm3' if read.flag('use_sliding_window') and window is not None:
      return list(_no_rope_layers(read, layers)) or [False] * layers
    case 'qwen2' | 'qwen3' if window is not None:
      first = read.number('max_window_layers', at_least=0)
      return [i >= first for i in range(layers)]
  return [family.local == 'all' and window is not None] * layers


def _no_rope_layers(read: config_json.Reader, layers: int) -> tuple[bool, ...]:
  """Which layers do not rotate; () where all do."""
  rotates = read.of.get('no_rope_layers')
  if rotates is None:
    every = read.number('no_rope_layer_interval', at_least=1)
    rotates = [int((i + 1) % every != 0) for i in range(layers)]
  if not isinstance(rotates, list) or len(rotates) != layers or not all(x in (0, 1) for x in rotates):
    read.wrong.append(f'no_rope_layers={rotates!r} must hold num_hidden_layers={layers} numbers: 1 of a layer that '
                      'rotates, 0 of one that does not')
    return ()
  return () if all(rotates) else tuple(not x for x in rotates)


def stretched(config: policy.Config, factor: float) -> policy.Config:
  """The policy with its checkpoint's context times `factor`, by yarn.

  Raises ValueError where the context is not known, the checkpoint scales its rotations itself, or its family is not
  published with yarn.
  """
  if config.rope_scaling:
    raise ValueError(f'policy.yarn={factor:g}: the checkpoint scales its rotations itself, by '
                     f'{config.rope_scaling.kind!r}; set policy.yarn=0')
  if not config.context:
    raise ValueError(f'policy.yarn={factor:g} stretches the context of a checkpoint, and there is none; '
                     'set policy.yarn=0')
  if config.family == 'phi3':
    raise ValueError(f"policy.yarn={factor:g}: models of 'phi3' are not published with yarn; set policy.yarn=0")
  return config.replace(rope_scaling=config_json.yarn(factor, config.context))


def longest(config: policy.Config) -> int:
  """Tokens of the longest sequence that the checkpoint was made to read; 0: not known."""
  scaling = config.rope_scaling
  return max(config.context, int(scaling.factor * scaling.context) if scaling and scaling.kind == 'yarn' else 0)


def published(c: policy.Config) -> dict[str, Any]:
  """config.json of a policy.

  Raises ValueError where the family that it is of, or of a policy from scratch every family, lacks some of its parts.
  """
  name = c.family or next((name for name in _FAMILIES if not _lacks(name, c)), None)
  if name is None:
    raise ValueError(f'no published family has the parts of {c}; a policy with q/k norms or q/k/v biases has one, '
                     'with both it has none')
  if lacks := _lacks(name, c):
    raise ValueError(f'{name!r}, the family of this policy, is not published with {", ".join(lacks)}')
  family, local = _FAMILIES[name], c.local_layers or (False,) * c.num_layers
  found = {
      'architectures': [f'{family.name}ForCausalLM'], 'model_type': name, 'vocab_size': c.vocab_size,
      'num_hidden_layers': c.num_layers, 'hidden_size': c.width, 'num_attention_heads': c.num_heads,
      'num_key_value_heads': c.num_kv_heads, 'head_dim': c.head_width, 'intermediate_size': c.hidden_width,
      'rms_norm_eps': c.norm_eps, 'tie_word_embeddings': c.tie_embeddings,
      'hidden_activation' if name == 'gemma3_text' else 'hidden_act': {'gelu': 'gelu_pytorch_tanh'}.get(
          c.activation, c.activation)}
  if c.context:
    found['max_position_embeddings'] = c.context
  # Where rotations are by kind of layer, transformers makes the mask of a window even if no layer reads it.
  if any(local) or family.local and not family.by_kind:
    found['sliding_window'] = c.window if any(local) else None
  if family.local == 'kinds':
    found['layer_types'] = ['sliding_attention' if x else 'full_attention' for x in local]
  if name.startswith('qwen') or name == 'smollm3':
    found['use_sliding_window'] = any(local)
  if name == 'smollm3':
    found['no_rope_layers'] = [int(not x) for x in c.no_rope_layers or (False,) * c.num_layers]
  if name == 'gemma3_text':  # transformers 5 refuses a float
    found['query_pre_attn_scalar'] = int(c.query_scalar) if c.query_scalar.is_integer() else c.query_scalar
  if c.num_experts:
    found |= {'moe_intermediate_size': c.hidden_width, 'num_experts': c.num_experts,
              'num_experts_per_tok': c.experts_per_token, 'norm_topk_prob': c.normalize_experts}
  share = (c.rope_width or c.head_width) / c.head_width
  if int(c.head_width * share) < c.rope_width:
    share = math.nextafter(share, 1.0)
  return found | config_json.published_rope(
      c.rope_theta, c.rope_scaling, share=share, context=c.context,
      local_theta=c.local_rope_theta if family.by_kind else 0.0)


def _lacks(name: str, c: policy.Config) -> list[str]:
  """The parts of a policy that models of a family have not."""
  family = _FAMILIES[name]
  may_have = {
      'num_experts': name == 'qwen3_moe', 'query_scalar': name == 'gemma3_text', 'rope_width': name == 'phi3',
      'no_rope_layers': name == 'smollm3', 'local_rope_theta': family.by_kind,
      'local_layers': family.local == 'kinds' or family.local == 'all' and all(c.local_layers)}
  lacks = [part for part, value in (_PLAIN | family.parts).items() if getattr(c, part) != value]
  lacks += [part for part, may in may_have.items() if getattr(c, part) and not may]
  if name == 'qwen3_moe' and not c.num_experts:
    lacks.append('num_experts')
  if name == 'phi3' and c.rope_scaling and c.rope_scaling.kind != 'longrope':
    lacks.append('rope_scaling')
  return [f'policy.{part}={getattr(c, part)}' for part in lacks]
