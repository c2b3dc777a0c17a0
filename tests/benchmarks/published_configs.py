"""config.json as we read it, and as transformers does: made-up ones of all families, and those of a folder.

    .venv/bin/python -m tests.benchmarks.published_configs --parity=PYTHON [--configs=FOLDER] [--json]

Compares sizes, windows, which layers rotate, frequencies and factors of rotations, and the same of what we write back.
FOLDER holds *.json. PYTHON has the [parity] extra.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import tempfile
from typing import Any

import numpy as np

from kr_jax.model import attention
from kr_jax.model import families
from kr_jax.model import policy
from tests.benchmarks import machine

SMALL = {'vocab_size': 96, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 4, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'max_position_embeddings': 128}
FAMILIES = ('llama', 'mistral', 'qwen2', 'qwen3', 'qwen3_moe', 'gemma3_text', 'phi3', 'smollm3', 'olmo2', 'olmo3')
LLAMA_3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
           'original_max_position_embeddings': 64}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32}
LONG = {'type': 'longrope', 'short_factor': [1.0, 1.1, 1.2, 1.3], 'long_factor': [2.0, 3.0, 5.0, 9.0]}
KINDS = ['sliding_attention', 'full_attention'] * 2
# Family, and what differs from SMALL; None takes a field out.
MADE = {
    **{f'{name}, all defaults': (name, dict.fromkeys(SMALL)) for name in FAMILIES},
    **{f'{name}, small': (name, {}) for name in FAMILIES},
    'theta beside': ('llama', {'rope_theta': 5e5}),
    'theta inside rope_scaling': ('llama', {'rope_scaling': LLAMA_3 | {'rope_theta': 7e5}, 'rope_theta': 5e5}),
    'theta inside rope_parameters': ('qwen3', {'rope_parameters': {'rope_type': 'default', 'rope_theta': 3e5},
                                               'rope_theta': 5e5}),
    'both rope fields': ('llama', {'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5},
                                   'rope_scaling': YARN}),
    'both, an empty rope_scaling': ('llama', {'rope_parameters': YARN | {'rope_theta': 5e5}, 'rope_scaling': {}}),
    'both, null rope_scaling': ('llama', {'rope_parameters': YARN | {'rope_theta': 5e5}, 'rope_scaling': None}),
    'type and rope_type': ('llama', {'rope_scaling': {'type': 'linear', 'rope_type': 'yarn', 'factor': 2.0}}),
    'old type': ('llama', {'rope_scaling': {'type': 'linear', 'factor': 2.0}}),
    'linear, whole factor': ('mistral', {'rope_scaling': {'type': 'linear', 'factor': 4}}),
    'llama3 without original context': ('llama', {'rope_scaling': LLAMA_3 | {'original_max_position_embeddings': 128}}),
    'original context beside': ('llama', {'rope_scaling': LLAMA_3, 'original_max_position_embeddings': 32}),
    'yarn': ('qwen2', {'rope_scaling': YARN, 'rope_theta': 1e6}),
    'yarn without original context': ('qwen2', {'rope_scaling': {'type': 'yarn', 'factor': 4.0}}),
    'yarn, original context beside': ('qwen2', {'rope_scaling': YARN, 'original_max_position_embeddings': 64}),
    'yarn, factor null': ('qwen3', {'rope_scaling': YARN | {'factor': None}}),
    'yarn, attention_factor': ('qwen3', {'rope_scaling': YARN | {'attention_factor': 1.5}}),
    'yarn, mscale': ('qwen3', {'rope_scaling': YARN | {'mscale': 0.7, 'mscale_all_dim': 1.2}}),
    'yarn, mscale alone': ('qwen3', {'rope_scaling': YARN | {'mscale': 0.7}}),
    'yarn, bounds': ('qwen3', {'rope_scaling': YARN | {'beta_fast': 8, 'beta_slow': 2.5}}),
    'yarn, not truncated': ('qwen3', {'rope_scaling': YARN | {'truncate': False}}),
    'yarn of factor 1': ('qwen3', {'rope_scaling': YARN | {'factor': 1.0}}),
    'dynamic': ('llama', {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}),
    'a rope type that there is not': ('llama', {'rope_scaling': {'type': 'ntk', 'factor': 2.0}}),
    'longrope of llama': ('llama', {'rope_scaling': LONG | {'factor': 4.0, 'original_max_position_embeddings': 32}}),
    'phi3, longrope': ('phi3', {'rope_scaling': LONG, 'original_max_position_embeddings': 32}),
    'phi3, su': ('phi3', {'rope_scaling': LONG | {'type': 'su', 'original_max_position_embeddings': 32},
                          'original_max_position_embeddings': 32}),
    'phi3, its yarn': ('phi3', {'rope_scaling': LONG | {'type': 'yarn'}, 'original_max_position_embeddings': 32}),
    'phi3, longrope, original context by default': ('phi3', {'rope_scaling': LONG, 'max_position_embeddings': 8192}),
    'phi3, partial': ('phi3', {'partial_rotary_factor': 0.5, 'original_max_position_embeddings': 32, 'rope_scaling': {
        'type': 'longrope', 'short_factor': [1.0, 1.5], 'long_factor': [4.0, 8.0]}}),
    'phi3, partial inside': ('phi3', {'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4,
                                                          'partial_rotary_factor': 0.75}}),
    'phi3, attention_factor': ('phi3', {'rope_scaling': LONG | {'attention_factor': 1.25},
                                        'original_max_position_embeddings': 32}),
    'phi3, lists too short': ('phi3', {'rope_scaling': LONG | {'short_factor': [1.0]}}),
    'phi3, linear': ('phi3', {'rope_scaling': {'type': 'linear', 'factor': 2.0}}),
    'phi3, window': ('phi3', {'sliding_window': 16}),
    'mistral without a window': ('mistral', {'sliding_window': None, 'head_dim': 16}),
    'qwen2 with a window it does not use': ('qwen2', {'sliding_window': 16, 'max_window_layers': 2}),
    'qwen2 with a window': ('qwen2', {'sliding_window': 16, 'max_window_layers': 2, 'use_sliding_window': True}),
    'qwen3 with a window, later': ('qwen3', {'sliding_window': 16, 'max_window_layers': 9, 'use_sliding_window': True}),
    'qwen3, kinds': ('qwen3', {'sliding_window': 16, 'layer_types': KINDS, 'use_sliding_window': True}),
    'qwen3, kinds without their window': ('qwen3', {'sliding_window': 16, 'layer_types': KINDS}),
    'qwen3, attention': ('qwen3', {'layer_types': ['attention'] * 4}),
    'qwen3, too few kinds': ('qwen3', {'layer_types': ['full_attention'] * 3}),
    'qwen3, another kind': ('qwen3', {'layer_types': ['linear_attention'] * 4}),
    'moe of transformers 5': ('qwen3_moe', {'num_local_experts': 8, 'num_experts_per_tok': 2, 'norm_topk_prob': True}),
    'moe of transformers 4': ('qwen3_moe', {'num_experts': 8, 'num_experts_per_tok': 2, 'moe_intermediate_size': 24}),
    'moe with a window': ('qwen3_moe', {'use_sliding_window': True, 'sliding_window': 16}),
    'gemma3, 4': ('gemma3_text', {'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}, 'rope_theta': 1e6,
                                  'rope_local_base_freq': 2e4, 'sliding_window': 16, 'sliding_window_pattern': 3}),
    'gemma3, 5': ('gemma3_text', {'sliding_window': 16, 'layer_types': KINDS, 'rope_parameters': {
        'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 5e5},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 3e4}}}),
    'gemma3, both forms': ('gemma3_text', {'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}, 'rope_parameters': {
        'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 5e5}}}),
    'gemma3, flat rope_parameters': ('gemma3_text', {'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}}),
    'gemma3, no window': ('gemma3_text', {'sliding_window': None}),
    'gemma3, query scalar': ('gemma3_text', {'query_pre_attn_scalar': 168}),
    'gemma3, multimodal': ('gemma3', {**dict.fromkeys(SMALL), 'text_config': {
        'model_type': 'gemma3_text', 'hidden_size': 64, 'intermediate_size': 32, 'num_hidden_layers': 7,
        'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'}, 'sliding_window': 1024}}),
    'gemma3, untied multimodal': ('gemma3', {**dict.fromkeys(SMALL), 'tie_word_embeddings': False, 'text_config': {
        'model_type': 'gemma3_text', 'hidden_size': 64, 'num_hidden_layers': 2}}),
    'olmo3, 4': ('olmo3', {'rope_theta': 3e5, 'rope_scaling': YARN, 'sliding_window': 16}),
    'olmo3, 5': ('olmo3', {'sliding_window': 16, 'rope_parameters': {
        'full_attention': YARN | {'rope_theta': 5e5, 'truncate': False},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 4e5}}}),
    'olmo3, scaled local layers': ('olmo3', {'sliding_window': 16, 'rope_parameters': {
        'full_attention': YARN, 'sliding_attention': {'rope_type': 'linear', 'factor': 2.0}}}),
    'olmo3, original context beside': ('olmo3', {'sliding_window': 16, 'original_max_position_embeddings': 64,
                                                 'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}}),
    'smollm3, list': ('smollm3', {'no_rope_layers': [1, 0, 0, 1]}),
    'smollm3, interval': ('smollm3', {'no_rope_layer_interval': 2}),
    'smollm3, window': ('smollm3', {'no_rope_layer_interval': 2, 'use_sliding_window': True, 'sliding_window': 16}),
    'smollm3, too few': ('smollm3', {'no_rope_layers': [1, 0]}),
    'smollm3, too many': ('smollm3', {'no_rope_layers': [1, 0] * 4}),
    'kv heads null': ('llama', {'num_key_value_heads': 'null'}),
    'head_dim': ('qwen2', {'head_dim': 16}),
    'number as a text': ('llama', {'num_hidden_layers': '4'}),
    'whole number as a float': ('llama', {'num_hidden_layers': 4.0}),
    'flag as a number': ('llama', {'tie_word_embeddings': 1}),
    'number as a flag': ('llama', {'num_hidden_layers': True}),
    'theta as a text': ('llama', {'rope_theta': '1e4'}),
    'attention bias': ('llama', {'attention_bias': True}),
    'attention bias of qwen2': ('qwen2', {'attention_bias': True}),
    'activation': ('llama', {'hidden_act': 'gelu'}),
    'softcap': ('gemma3_text', {'final_logit_softcapping': 30.0}),
    'partial rotary of llama': ('llama', {'partial_rotary_factor': 0.5}),
}


def made() -> dict[str, dict[str, Any]]:
  found = {}
  for name, (family, changed) in MADE.items():
    fields = {'model_type': family} | SMALL | changed
    found[name] = {key: None if value == 'null' else value for key, value in fields.items() if value is not None or (
        key in changed and key not in SMALL)}
  return found


def ours(published: dict[str, Any]) -> dict[str, Any]:
  """As peers/transformers_configs.py describes it."""
  try:
    c = policy.Config(**families.fields(published, 'config.json'))
    long = policy.Config(**families.fields(published, 'config.json', length=1 << 40))
  except ValueError as error:
    return {'error': str(error)}
  width, none = c.rope_width or c.head_width, (False,) * c.num_layers
  rotation = {'frequency_H': attention.frequencies(c.rope_theta, width, c.rope_scaling),
              'factor': c.rope_scaling.attention_factor if c.rope_scaling else 1.0}
  if c.rope_scaling and c.rope_scaling.kind == 'longrope':
    rotation['long_frequency_H'] = attention.frequencies(c.rope_theta, width, long.rope_scaling)
  rotations = {'all': rotation}
  if c.local_rope_theta:
    local = {'frequency_H': attention.frequencies(c.local_rope_theta, width), 'factor': 1.0}
    rotations = {'full_attention': rotation, 'sliding_attention': local}
  return {
      **{name: getattr(c, name) for name in (
          'vocab_size', 'num_layers', 'width', 'num_heads', 'num_kv_heads', 'context', 'head_width', 'hidden_width',
          'norm_eps', 'tie_embeddings')},
      'query_scale': (c.query_scalar or c.head_width) ** -0.5, 'activation': c.activation,
      'windows': [c.window if x else 0 for x in c.local_layers or none],
      'rotates': [not x for x in c.no_rope_layers or none], 'biases': ['q_proj'] if c.qkv_bias else [],
      'experts': [c.num_experts, c.experts_per_token, c.normalize_experts] if c.num_experts else None,
      'rotations': rotations}


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
  found = []
  activation = {'gelu_pytorch_tanh': 'gelu', 'gelu_new': 'gelu', 'swish': 'silu'}
  theirs = theirs | {'activation': activation.get(theirs['activation'], theirs['activation'])}
  for name, value in theirs.items():
    if name == 'rotations':
      for kind, rotation in value.items():
        found += [f'{kind} {part}' for part, x in rotation.items()
                  if np.shape(mine[name][kind].get(part)) != np.shape(x)
                  or not np.allclose(mine[name][kind][part], x, rtol=2e-5, atol=0)]
    elif mine[name] != value and not (name == 'query_scale' and np.isclose(mine[name], value)):
      found.append(f'{name}: {mine[name]!r}, theirs {value!r}')
  return found


def outcome(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
  if 'error' in mine:
    return f'refused{" by both" if "error" in theirs else ""}: {mine["error"]}'
  if 'error' in theirs:
    return f'refused by transformers alone: {theirs["error"]}'
  found = differences(mine, theirs)
  return f'DIFFERENT: {"; ".join(found)}' if found else 'equal'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--parity', required=True, help='interpreter of an environment with torch and transformers')
  parser.add_argument('--configs', type=pathlib.Path, help='folder of *.json')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  configs = made()
  for path in sorted(args.configs.glob('*.json')) if args.configs else ():
    configs[path.stem] = json.loads(path.read_text())
  mine = {name: ours(published) for name, published in configs.items()}
  for name in [name for name, x in mine.items() if 'error' not in x]:
    configs[f'{name}, written back'] = families.published(policy.Config(**families.fields(configs[name], name)))
    mine[f'{name}, written back'] = mine[name]
  with tempfile.TemporaryDirectory() as folder:
    request, answer = pathlib.Path(folder, 'request.json'), pathlib.Path(folder, 'answer.json')
    request.write_text(json.dumps(configs))
    peer = pathlib.Path(__file__).parent / 'peers' / 'transformers_configs.py'
    subprocess.run([args.parity, peer, request, answer], check=True)
    theirs = json.loads(answer.read_text())
  outcomes = {name: outcome(mine[name], theirs[name]) for name in configs}
  kinds = [x.partition(':')[0] for x in outcomes.values()]
  counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
  if args.json:
    print(json.dumps({'machine': machine.describe(), 'counts': counts, 'outcomes': outcomes}))
    return
  for name, found in outcomes.items():
    print(f'{name:<48} {found}')
  print(counts)


if __name__ == '__main__':
  main()
