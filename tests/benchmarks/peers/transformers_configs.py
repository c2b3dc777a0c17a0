"""What transformers computes with config.json files: for tests/benchmarks/published_configs.py.

    PYTHON transformers_configs.py REQUEST.json ANSWER.json

REQUEST: {name: config.json}. ANSWER: {name: {'error': text} or fields: sizes, windows by layer (0: all tokens), which
layers rotate, frequencies and factors of rotations by kind of layer, also of sequences beyond the original context}.
"""

import importlib
import json
import pathlib
import sys
import tempfile

import torch
import transformers

ALL_LOCAL = ('mistral', 'phi3', 'qwen3_moe')  # whose model classes take the window for all layers, if there is one
BY_KIND = ('gemma3_text', 'olmo3')


def rotations(rotary, config, kind):
  prefix = f'{kind}_' if kind else ''
  of = config.rope_parameters[kind] if kind else config.rope_parameters
  found = {'frequency_H': getattr(rotary, f'{prefix}inv_freq').tolist(),
           'factor': float(getattr(rotary, f'{prefix}attention_scaling'))}
  if of['rope_type'] == 'longrope':
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS['longrope']
    beyond = of['original_max_position_embeddings'] + 1
    found['long_frequency_H'] = init(config, None, seq_len=beyond, layer_type=kind)[0].tolist()
  return found


def described(published):
  with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, 'config.json').write_text(json.dumps(published))
    whole = transformers.AutoConfig.from_pretrained(folder)
  c = whole.get_text_config()
  family = c.model_type
  modeling = importlib.import_module(f'transformers.models.{family.removesuffix("_text")}.modeling_'
                                     f'{family.removesuffix("_text")}')
  of_class = lambda end: next(x for name, x in vars(modeling).items() if name.endswith(end) and 'Vision' not in name
                              and isinstance(x, type) and x.__module__ == modeling.__name__)
  with torch.device('meta'):
    attention = of_class('Attention')(c, 0)
  rotary = of_class('RotaryEmbedding')(c)
  layers = c.num_hidden_layers
  window = getattr(c, 'sliding_window', None) or 0
  windows = [window if family in ALL_LOCAL else 0] * layers
  if family not in ALL_LOCAL and family not in ('llama', 'olmo2'):
    windows = [window if kind == 'sliding_attention' else 0 for kind in c.layer_types]
    if 'sliding_attention' in c.layer_types and not window:
      raise ValueError('local layers without a window, which the mask of transformers refuses')
  kinds = ('full_attention', 'sliding_attention') if family in BY_KIND else (None,)
  kinds = [kind for kind in kinds if kind is None or kind in c.layer_types]
  return {
      'vocab_size': c.vocab_size, 'num_layers': layers, 'width': c.hidden_size, 'num_heads': c.num_attention_heads,
      'num_kv_heads': c.num_key_value_heads, 'head_width': attention.head_dim, 'query_scale': attention.scaling,
      'hidden_width': c.moe_intermediate_size if family == 'qwen3_moe' else c.intermediate_size,
      'context': c.max_position_embeddings, 'norm_eps': c.rms_norm_eps, 'tie_embeddings': whole.tie_word_embeddings,
      'activation': getattr(c, 'hidden_activation', None) or c.hidden_act, 'windows': windows,
      'rotates': [bool(x) for x in getattr(c, 'no_rope_layers', None) or [1] * layers],
      'experts': [c.num_experts, c.num_experts_per_tok, c.norm_topk_prob] if family == 'qwen3_moe' else None,
      'biases': [name for name in ('q_proj', 'qkv_proj', 'o_proj')
                 if getattr(getattr(attention, name, None), 'bias', None) is not None],
      'rotations': {kind or 'all': rotations(rotary, c, kind) for kind in kinds}}


def main():
  transformers.logging.set_verbosity_error()
  found = {}
  for name, published in json.loads(pathlib.Path(sys.argv[1]).read_text()).items():
    try:
      found[name] = described(published)
    except Exception as error:
      found[name] = {'error': f'{type(error).__name__}: {error}'[:200]}
  pathlib.Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == '__main__':
  main()
