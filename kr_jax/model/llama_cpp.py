"""A .gguf file of llama.cpp in the form in which transformers publishes models.

Names, layouts, metadata and vocabulary are translated. Of a tensor only the part that is asked for is given.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import json
import pathlib
import re
from typing import Any

import gguf
import numpy as np

_ARCHITECTURES = {'llama': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3', 'gemma3': 'gemma3_text'}
_TENSORS = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
_LAYER_TENSORS = {
    'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm', 'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj',
    'attn_q_norm': 'self_attn.q_norm', 'attn_k_norm': 'self_attn.k_norm', 'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj'}
_GEMMA_TENSORS = {'ffn_norm': 'pre_feedforward_layernorm', 'post_ffw_norm': 'post_feedforward_layernorm',
                  'post_attention_norm': 'post_attention_layernorm'}
_CONTROL, _USER_DEFINED = 3, 4  # token types
# How a text is split before byte pairs are merged, by llama.cpp's name of the rule.
_QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r'|\s*[\r\n]+|\s+(?!\S)|\s+')
_LLAMA_3 = _QWEN.replace(r'|\p{N}|', r'|\p{N}{1,3}|')
_SPLIT = {'qwen2': _QWEN, 'deepseek-r1-qwen': _QWEN, 'llama-bpe': _LLAMA_3, 'llama3': _LLAMA_3}


class Gguf:
  """A file of llama.cpp, translated to the names and layouts of transformers."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    try:
      reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
      raise ValueError(f'{path} is no GGUF file, or a broken one: {error}') from error
    self._fields = reader.fields
    self._architecture = self._get('general.architecture')
    if self._architecture not in _ARCHITECTURES:
      raise ValueError(f'{path}: architecture {self._architecture!r} is not one of {sorted(_ARCHITECTURES)}')
    self._tensors = {self._name(tensor.name): tensor for tensor in reader.tensors}
    self._last = '', np.zeros(0)  # the last tensor that was read: its shards are asked for in turn

  def _get(self, key: str, default: Any = None) -> Any:
    if key not in self._fields:
      return default
    value = self._fields[key].contents()
    # Numbers are stored in 32 bits: 1e-5, not 9.999999747378752e-06.
    return float(str(np.float32(value))) if isinstance(value, float) else value

  def _of(self, key: str, default: Any = None) -> Any:
    return self._get(f'{self._architecture}.{key}', default)

  def _name(self, name: str) -> str:
    stem, _, kind = name.rpartition('.')
    layer = re.fullmatch(r'blk\.(\d+)\.(.*)', stem)
    if not layer:
      return f'{_TENSORS[stem]}.{kind}' if stem in _TENSORS else name
    of_layer = _LAYER_TENSORS | (_GEMMA_TENSORS if self._architecture == 'gemma3' else {})
    return f'model.layers.{layer[1]}.{of_layer[layer[2]]}.{kind}' if layer[2] in of_layer else name

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """The fields of config.json; None for those that the file does not tell."""
    heads, width = self._of('attention.head_count'), self._of('embedding_length')
    embedding = self._tensors.get('model.embed_tokens.weight')
    config = {
        'model_type': _ARCHITECTURES[self._architecture],
        'vocab_size': None if embedding is None else int(embedding.shape[1]),
        'num_hidden_layers': self._of('block_count'),
        'hidden_size': width, 'intermediate_size': self._of('feed_forward_length'),
        'num_attention_heads': heads, 'num_key_value_heads': self._of('attention.head_count_kv', heads),
        'head_dim': self._of('attention.key_length', width and heads and width // heads),
        'rms_norm_eps': self._of('attention.layer_norm_rms_epsilon'),
        'max_position_embeddings': self._of('context_length'),
        'tie_word_embeddings': 'lm_head.weight' not in self._tensors,
        'rope_theta': self._of('rope.freq_base', 10_000.0), 'rope_scaling': None,
        **{f'{name}_token_id': self._get(f'tokenizer.ggml.{name}_token_id') for name in ('bos', 'eos')}}
    if (kind := self._of('rope.scaling.type', 'none')) != 'none':
      config['rope_scaling'] = {'rope_type': kind, 'factor': self._of('rope.scaling.factor')}
    if 'rope_freqs.weight' in self._tensors:
      config['rope_scaling'] = self._llama_3_scaling(config)
    if self._architecture == 'gemma3':  # llama.cpp's code has the other fields, its files do not
      config |= {'sliding_window': self._of('attention.sliding_window'),
                 'layer_types': self._layer_types(config['num_hidden_layers']),
                 'rope_local_base_freq': self._of('rope.freq_base_swa', 10_000.0),
                 'query_pre_attn_scalar': width // heads if config['num_hidden_layers'] == 62 else config['head_dim']}
    return config

  def _layer_types(self, layers: int) -> list[str]:
    every = self._of('attention.sliding_window_pattern', 6)
    local = every if isinstance(every, list) else [(i + 1) % every != 0 for i in range(layers)]
    return ['sliding_attention' if x else 'full_attention' for x in local]

  def _llama_3_scaling(self, config: dict[str, Any]) -> dict[str, Any]:
    """rope_scaling, from the divisors of the frequencies that it gave."""
    divisor_H = self.tensor('rope_freqs.weight', (slice(None),)).astype(np.float64)
    rotations_H = config['rope_theta'] ** (-np.arange(len(divisor_H)) / len(divisor_H)) / (2 * np.pi)
    factor, low, high = float(divisor_H.max()), 1.0, 4.0  # the bounds of all published models
    kept_H = (1 / divisor_H - 1 / factor) / (1 - 1 / factor)
    mixed_H = (kept_H > 1e-3) & (kept_H < 1 - 1e-3)
    context_H = (low + kept_H * (high - low)) / rotations_H
    context = int(np.round(np.median(context_H[mixed_H]))) if mixed_H.any() else 0
    wanted_H = np.clip((context * rotations_H - low) / (high - low), 0, 1)
    if np.abs(wanted_H - kept_H).max() > 1e-3:
      raise ValueError(f'{self.path}: rope_freqs.weight holds other divisors than Llama 3 with bounds of '
                       '1 and 4 rotations; take the safetensors of this model')
    return {'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': low, 'high_freq_factor': high,
            'original_max_position_embeddings': context}

  @functools.cached_property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that is a parameter."""
    return {name: tuple(tensor.shape[::-1].tolist())
            for name, tensor in self._tensors.items() if name != 'rope_freqs.weight'}

  def tensor(self, name: str, index: Sequence[slice]) -> np.ndarray:
    """Part of a tensor, float32."""
    if self._last[0] != name:
      self._last = name, self._whole(name)
    return self._last[1][tuple(index)]

  def _whole(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    x = gguf.dequantize(tensor.data, tensor.tensor_type)
    if self._architecture == 'llama' and re.search(r'\.[qk]_proj\.', name):
      # llama.cpp rotates neighbours, so it interleaves the halves of a head.
      half = self.config['head_dim'] // 2
      x = x.reshape(-1, half, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    if self._architecture == 'gemma3' and 'norm' in name:
      x = x - 1  # llama.cpp adds the 1 that the published parameter leaves out
    return x

  @functools.cached_property
  def tokenizer_config(self) -> dict[str, Any]:
    tokens = self._get('tokenizer.ggml.tokens', [])
    found = {'tokenizer_class': 'PreTrainedTokenizerFast'}
    for name, key in (('bos', 'bos'), ('eos', 'eos'), ('unk', 'unknown'), ('pad', 'padding')):
      if (token := self._get(f'tokenizer.ggml.{key}_token_id')) is not None:
        found[f'{name}_token'] = tokens[token]
    template = self._get('tokenizer.chat_template')
    return found | ({'chat_template': template} if template else {})

  @functools.cached_property
  def generation_config(self) -> dict[str, Any]:
    ends = [self._get(f'tokenizer.ggml.{name}_token_id') for name in ('eos', 'eot')]
    return {'eos_token_id': sorted({token for token in ends if token is not None})}

  @functools.cached_property
  def tokenizer_json(self) -> str:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    tokens, kinds = self._get('tokenizer.ggml.tokens'), self._get('tokenizer.ggml.token_type')
    model, rule = self._get('tokenizer.ggml.model'), self._get('tokenizer.ggml.pre', 'default')
    vocab = {token: i for i, token in enumerate(tokens or [])}
    if model == 'gpt2':
      split = {name: pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated') for name, pattern in _SPLIT.items()}
      split['smollm'] = pre_tokenizers.Digits(individual_digits=True)
      if rule not in (*split, 'default', 'gpt-2'):
        raise ValueError(f'{self.path}: tokenizer.ggml.pre={rule!r} is not one of {sorted(split)}; take the '
                         'safetensors of this model, with its tokenizer.json')
      merges = [tuple(merge.split(' ')) for merge in self._get('tokenizer.ggml.merges')]
      made = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=rule in ('llama-bpe', 'llama3')))
      made.pre_tokenizer = pre_tokenizers.Sequence([
          *([split[rule]] if rule in split else []),
          pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in _SPLIT)])
      if _SPLIT.get(rule) == _QWEN:
        made.normalizer = normalizers.NFC()
      made.decoder = decoders.ByteLevel()
    elif model == 'llama' and self._architecture == 'gemma3':
      made = tokenizers.Tokenizer(models.BPE(
          vocab, _merges(vocab, self._get('tokenizer.ggml.scores')), byte_fallback=True, fuse_unk=True,
          unk_token=tokens[self._get('tokenizer.ggml.unknown_token_id', 3)]))
      made.normalizer = normalizers.Replace(' ', '\u2581')
      made.decoder = decoders.Sequence([decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()])
    else:
      raise ValueError(f'{self.path}: a tokenizer of the kind {model!r} is not read from a GGUF file of '
                       f'{self._architecture!r}; take the safetensors of this model')
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
      made.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)
                       for token, kind_ in zip(tokens, kinds) if kind_ == kind])
    if self._get('tokenizer.ggml.add_bos_token', rule in ('llama-bpe', 'llama3')):
      bos = self._get('tokenizer.ggml.bos_token_id')
      made.post_processor = processors.TemplateProcessing(
          single=f'{tokens[bos]} $A', special_tokens=[(tokens[bos], bos)])
    return made.to_str()

  def save_text(self, directory: pathlib.Path) -> None:
    """Writes the files that a tokenizer is read from."""
    (directory / 'tokenizer.json').write_text(self.tokenizer_json, encoding='utf-8')
    for name in ('tokenizer_config', 'generation_config'):
      (directory / f'{name}.json').write_text(json.dumps(getattr(self, name), indent=2), encoding='utf-8')


def _merges(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
  """The merges of a sentencepiece vocabulary: the pair whose token has the highest score is merged first."""
  found = []
  for token, i in vocab.items():
    pairs = [(token[:n], token[n:]) for n in range(1, len(token))]
    found += [(-scores[i], vocab[a], vocab[b], (a, b)) for a, b in pairs if a in vocab and b in vocab]
  return [pair for *_, pair in sorted(found)]
