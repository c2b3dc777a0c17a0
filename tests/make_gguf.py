"""Writes a .gguf file of a directory of safetensors as llama.cpp's converter does, without torch.

    python tests/make_gguf.py DIRECTORY FILE.gguf [KIND]

Names of tensors are those of gguf-py's own table. KIND, a name in gguf.GGMLQuantizationType, is that of matrices whose
rows are whole blocks of it; other tensors are F32. Where a directory has a tokenizer.json, its vocabulary is written.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
import sys
from typing import Any

import gguf
import numpy as np

from kr_jax.model import families
from kr_jax.model import policy
from kr_jax.model import pretrained

ARCHITECTURES = {
    'llama': 'llama', 'mistral': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3', 'qwen3_moe': 'qwen3moe',
    'gemma3_text': 'gemma3', 'gemma3': 'gemma3', 'phi3': 'phi3', 'smollm3': 'smollm3', 'olmo2': 'olmo2',
    'olmo3': 'olmo2'}
TYPES = {'NORMAL': 1, 'UNKNOWN': 2, 'CONTROL': 3, 'USER_DEFINED': 4, 'UNUSED': 5, 'BYTE': 6}


def write(path: pathlib.Path, folder: pathlib.Path, *, kind: str = 'F32', fields: dict[str, Any] | None = None,
          parts: int = 1) -> None:
  """Writes a file, or the parts of a split one: of NAME.gguf then NAME-00001-of-00002.gguf and so on.

  `fields` replaces fields, and removes those that it says are None.
  """
  files = pretrained.Directory(folder)
  config = policy.Config(**families.fields(files.config, folder))
  architecture = ARCHITECTURES[config.family]
  all_fields = model_fields(config, architecture)
  if (folder / 'tokenizer.json').exists():
    all_fields |= vocabulary(folder, config.vocab_size)
  tensors = {text_name(name): tensor(files, name, config, architecture) for name in files.shapes if text_name(name)}
  for i in range(config.num_layers if config.num_experts else 0):
    for kind_ in ('gate_proj', 'up_proj', 'down_proj'):
      of_layer = [tensors.pop(f'model.layers.{i}.mlp.experts.{e}.{kind_}.weight') for e in range(config.num_experts)]
      tensors[f'model.layers.{i}.mlp.experts.{kind_}.weight'] = np.stack(of_layer)
  names = gguf.get_tensor_name_map(
      next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_layers)
  tensors = {names.get_name(name, ('.weight', '.bias')): x for name, x in tensors.items()}
  write_raw(path, architecture, {key: x for key, x in (all_fields | (fields or {})).items() if x is not None},
            tensors | divisors(config), kind=kind, parts=parts)


def write_raw(path: pathlib.Path, architecture: str, fields: dict[str, Any], tensors: dict[str, np.ndarray], *,
              kind: str = 'F32', parts: int = 1) -> None:
  writer = gguf.GGUFWriter(path, architecture, split_max_tensors=-(-len(tensors) // parts) if parts > 1 else 0)
  for key, value in fields.items():
    if isinstance(value, list):
      writer.add_array(key, value)
    else:
      of_int = gguf.GGUFValueType.UINT32 if isinstance(value, int) and not isinstance(value, bool) else None
      writer.add_key_value(key, value, of_int or gguf.GGUFValueType.get_type(value))
  block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
  for name, x in tensors.items():
    quantised = gguf.GGMLQuantizationType[kind if x.ndim > 1 and x.shape[-1] % block == 0 else 'F32']
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(x, np.float32), quantised), raw_dtype=quantised)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def text_name(name: str) -> str:
  """The name that a tensor has in a model of texts alone; '' where it has none."""
  return '' if re.search('vision|projector', name) else re.sub(r'^(model\.)?language_model\.(model\.)?', 'model.', name)


def tensor(files: pretrained.Directory, name: str, config: policy.Config, architecture: str) -> np.ndarray:
  """A tensor as llama.cpp holds it."""
  x = np.asarray(files.tensor(name, (slice(None),) * len(files.shapes[name]))).astype(np.float32)
  if architecture in ('llama', 'smollm3') and (proj := re.search(r'([qk])_proj\.', name)):
    heads = config.num_heads if proj[1] == 'q' else config.num_kv_heads
    x = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
  return x + 1 if architecture == 'gemma3' and 'norm' in name else x


def model_fields(c: policy.Config, architecture: str) -> dict[str, Any]:
  """The fields of a model, without its vocabulary's."""
  of = {
      'block_count': c.num_layers, 'context_length': c.context, 'embedding_length': c.width,
      'feed_forward_length': c.hidden_width, 'attention.head_count': c.num_heads,
      'attention.head_count_kv': c.num_kv_heads, 'attention.layer_norm_rms_epsilon': float(c.norm_eps),
      'attention.key_length': c.head_width, 'attention.value_length': c.head_width,
      'rope.freq_base': float(c.rope_theta)}
  if c.num_experts:
    of |= {'expert_count': c.num_experts, 'expert_used_count': c.experts_per_token,
           'expert_feed_forward_length': c.hidden_width}
  if architecture in ('llama', 'phi3'):
    of['rope.dimension_count'] = c.rope_width or c.head_width
  if architecture in ('gemma3', 'olmo2') and any(c.local_layers):
    of['attention.sliding_window'] = c.window
    period = 6 if architecture == 'gemma3' else 4
    if list(c.local_layers) != [(i + 1) % period != 0 for i in range(c.num_layers)] or architecture == 'olmo2':
      of['attention.sliding_window_pattern'] = [bool(local) for local in c.local_layers]
    if architecture == 'gemma3' and c.local_rope_theta != 10_000:
      of['rope.freq_base_swa'] = float(c.local_rope_theta)
  if architecture == 'phi3':
    of['attention.sliding_window'] = c.window
  if (scaling := c.rope_scaling) is not None and scaling.kind in ('linear', 'yarn'):
    of |= {'rope.scaling.type': scaling.kind, 'rope.scaling.factor': float(scaling.factor)}
    if scaling.kind == 'yarn':
      of |= {'rope.scaling.original_context_length': int(scaling.context),
             'rope.scaling.yarn_beta_fast': float(scaling.high), 'rope.scaling.yarn_beta_slow': float(scaling.low)}
      if not math.isclose(scaling.attention_factor, 0.1 * math.log(scaling.factor) + 1, rel_tol=1e-6):
        of['rope.scaling.yarn_attn_factor'] = float(scaling.attention_factor)
  if scaling is not None and scaling.kind == 'longrope':
    of |= {'rope.scaling.original_context_length': int(scaling.context),
           'rope.scaling.attn_factor': float(scaling.attention_factor)}
  return {f'{architecture}.{key}': value for key, value in of.items()}


def divisors(c: policy.Config) -> dict[str, np.ndarray]:
  """The tensors that hold divisors of rope frequencies."""
  s = c.rope_scaling
  if s is None or s.kind not in ('llama3', 'longrope'):
    return {}
  if s.kind == 'longrope':
    return {f'rope_factors_{name}.weight': np.array(x, np.float32)
            for name, x in (('short', s.divisors), ('long', s.long_divisors))}
  found = []
  for i in range(0, c.head_width, 2):
    wave = 2 * np.pi * c.rope_theta ** (i / c.head_width)
    smooth = np.clip((s.context / wave - s.low) / (s.high - s.low), 0, 1)
    found.append(1 / ((1 - smooth) / s.factor + smooth))
  return {'rope_freqs.weight': np.array(found, np.float32)}


def vocabulary(folder: pathlib.Path, size: int) -> dict[str, Any]:
  """The fields of a tokenizer of byte-level BPE, or of sentencepiece's BPE with scores in the order of its merges."""
  of_json = json.loads((folder / 'tokenizer.json').read_text(encoding='utf-8'))
  read = lambda name: json.loads((folder / name).read_text(encoding='utf-8')) if (folder / name).exists() else {}
  model, added = of_json['model'], {x['content']: x for x in of_json['added_tokens']}
  tokens, kinds = [f'[PAD{i}]' for i in range(size)], [TYPES['UNUSED']] * size
  spm = bool(model.get('byte_fallback'))
  for token, i in (model['vocab'] | {text: x['id'] for text, x in added.items()}).items():
    is_byte = spm and re.fullmatch('<0x[0-9A-F]{2}>', token)
    kind = 'BYTE' if is_byte else 'UNKNOWN' if token == model.get('unk_token') else 'NORMAL'
    if token in added and kind != 'UNKNOWN':
      kind = 'CONTROL' if added[token]['special'] or token.startswith('<|') else 'USER_DEFINED'
    tokens[i], kinds[i] = token, TYPES[kind]
  found = {'model': 'llama' if spm else 'gpt2', 'pre': 'default', 'tokens': tokens, 'token_type': kinds}
  merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]
  if spm:
    rank = {merge.replace(' ', ''): i for i, merge in reversed(list(enumerate(merges)))}
    found['scores'] = [-1000.0 if token in added else -float(rank.get(token, 10_000)) for token in tokens]
    found['add_space_prefix'] = 'Prepend' in json.dumps(of_json['normalizer'])
  else:
    found['merges'] = merges
  config = read('tokenizer_config.json')
  for name, key in (('bos', 'bos'), ('eos', 'eos'), ('unk', 'unknown'), ('pad', 'padding')):
    token = config.get(f'{name}_token')
    if token is not None:
      found[f'{key}_token_id'] = tokens.index(token['content'] if isinstance(token, dict) else token)
  found['add_bos_token'] = bool(of_json.get('post_processor')) and 'TemplateProcessing' in json.dumps(
      of_json['post_processor'])
  template = config.get('chat_template')
  found = {f'tokenizer.ggml.{key}': x for key, x in found.items()}
  return found | ({'tokenizer.chat_template': template} if isinstance(template, str) else {})


if __name__ == '__main__':
  write(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[1]), kind=(sys.argv[3:] or ['F32'])[0])
