"""Makes tests/data/checkpoints: a tiny random checkpoint of each family, and what transformers computes with it.

    pip install 'kr_jax[parity]' && python tests/make_checkpoints.py

NAME/ holds config.json, safetensors, a tokenizer and chat template of the family's kind, and
expected.npz: logits of three sequences, and 64 greedy tokens after each of three prompts of different lengths,
each likelier than any other token by more than GAP; expected.json: the tokens of some texts and chats. NAME.gguf
holds the same tensors in the form of llama.cpp, NAME.npz their logits.
"""

from __future__ import annotations

import json
import pathlib
import re

import gguf
import numpy as np
import safetensors.torch
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
import torch
import transformers

ROOT = pathlib.Path(__file__).parent / 'data' / 'checkpoints'
VOCAB, GAP, LENGTHS = 320, 2e-3, (3, 14, 25)
TEXT = '''The sum of 12 and 34 is 46; what is the sum of 7 and 9? def add(a, b): return a + b
Please reason step by step, and put your final answer within \\boxed{}. Let x = 3.14 and y = 2,718.
The quick brown fox jumps over the lazy dog. Ein Bär läßt grüßen: naïve café, 数学は楽しい。 user assistant system
If f(x) = x^2 + 1, find f(2).  The answer is 5.  You are a helpful assistant. It's what we've said, isn't it?
'''
TEXTS = ['Hello, world', ' leading and trailing  ', 'x = 12345 + 678', 'naïve café – 数学 🙂', 'a\n\n\nb\t c',
         'def f(x):\n    return x**2  # ok', "it's 3.14159", '']
MESSAGES = ['What is 12 + 34?', '  padded  ', 'two\nlines\n\n', '数学 9']
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r'|\s*[\r\n]+|\s+(?!\S)|\s+')
CHATML = '''{%- if messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
'''
TEMPLATES = {
    'llama': CHATML + '{%- endif %}',
    'qwen3': CHATML + '''{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}''',
    'llama3': '''{{- bos_token }}
{%- if strftime_now is defined %}{%- set day = strftime_now("%d %b %Y") %}{%- else %}{%- set day = "26 Jul 2024" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + day + "\\n\\n" }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{%- set messages = messages[1:] %}{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}''',
    'qwen2': '''{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] }}
{%- elif message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}
{%- else %}{{ raise_exception('roles are system and user') }}
{%- endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}''',
    'gemma3': '''{{ bos_token }}
{%- set first = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
{%- for message in messages if message['role'] != 'system' %}
{{ '<start_of_turn>' + message['role'] + '\\n' + (first if loop.first else '') }}
{{- message['content'] | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{ '<start_of_turn>model\\n' }}
{%- endif %}'''}
# Control tokens, with which of them are special; the first begins, the second ends.
CONTROL = {
    'llama': [('<|endoftext|>', True), ('<|im_end|>', True), ('<|im_start|>', True)],
    'llama3': [('<|begin_of_text|>', True), ('<|eot_id|>', True), ('<|start_header_id|>', True),
               ('<|end_header_id|>', True), ('<|eom_id|>', True)],
    'qwen2': [('<|begin|>', True), ('<|end|>', True), ('<|User|>', False), ('<|Assistant|>', False),
              ('<think>', False), ('</think>', False)],
    'qwen3': [('<|endoftext|>', True), ('<|im_end|>', True), ('<|im_start|>', True), ('<think>', False),
              ('</think>', False)],
    'gemma3': [('<bos>', True), ('<eos>', True), ('<start_of_turn>', True), ('<end_of_turn>', True),
               ('\n\n', False), ('\n\n\n', False)]}
SIZES = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=64, max_position_embeddings=512)
CONFIGS = {
    'llama': lambda: transformers.LlamaConfig(
        **SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={'rope_type': 'default', 'rope_theta': 1e5}),
    'llama3': lambda: transformers.LlamaConfig(
        **SIZES, head_dim=16, tie_word_embeddings=False, rms_norm_eps=1e-5, rope_parameters={
            'rope_type': 'llama3', 'rope_theta': 1e4, 'factor': 8.0, 'low_freq_factor': 1.0,
            'high_freq_factor': 4.0, 'original_max_position_embeddings': 32}),
    'qwen2': lambda: transformers.Qwen2Config(
        **SIZES, tie_word_embeddings=False, rms_norm_eps=1e-6,
        rope_parameters={'rope_type': 'default', 'rope_theta': 1e6}),
    'qwen3': lambda: transformers.Qwen3Config(
        **SIZES, head_dim=12, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_parameters={'rope_type': 'default', 'rope_theta': 1e6}),
    'gemma3': lambda: transformers.Gemma3TextConfig(
        **SIZES | dict(num_hidden_layers=5, hidden_size=24), head_dim=12, query_pre_attn_scalar=20,
        sliding_window=8,
        layer_types=['sliding_attention', 'sliding_attention', 'full_attention'] + ['sliding_attention'] * 2,
        rope_parameters={
            'full_attention': {'rope_type': 'linear', 'rope_theta': 1e6, 'factor': 8.0},
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4}})}


# Tokenizers.


def tokenizer(name: str) -> tokenizers.Tokenizer:
  """A byte-level or, of gemma3, sentencepiece-like BPE of at most VOCAB tokens, the control tokens among them."""
  control = [tokenizers.AddedToken(text, special=special, normalized=False) for text, special in CONTROL[name]]
  first = [text for text, _ in CONTROL[name]]
  if name == 'gemma3':
    bytes_ = [f'<0x{i:02X}>' for i in range(256)]
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token='<unk>'))
    made.normalizer = normalizers.Replace(' ', '\u2581')
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 4, special_tokens=['<pad>', *first[:2], '<unk>', *first[2:], *bytes_],
                                  show_progress=False, limit_alphabet=36)
    made.train_from_iterator(TEXT.splitlines(), trainer)
    # The trainer takes its special tokens for added ones; only those of CONTROL are.
    of_json = json.loads(made.to_str())
    of_json['added_tokens'] = []
    made = tokenizers.Tokenizer.from_str(json.dumps(of_json))
    made.decoder = decoders.Sequence([
        decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()])
  else:
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=name == 'llama3'))
    word = {'llama': pre_tokenizers.Digits(individual_digits=True)} | {
        other: pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated') for other, pattern in (
            ('qwen2', QWEN), ('qwen3', QWEN), ('llama3', QWEN.replace(r'|\p{N}|', r'|\p{N}{1,3}|')))}
    made.pre_tokenizer = pre_tokenizers.Sequence([
        word[name], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == 'llama')])
    if name.startswith('qwen'):
      made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    in_vocab = first if name == 'llama' else []
    made.train_from_iterator(TEXT.splitlines(), trainers.BpeTrainer(
        vocab_size=VOCAB - 12, special_tokens=in_vocab, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  made.add_tokens(control)
  if name in ('llama3', 'gemma3'):
    bos = first[0]
    made.post_processor = processors.TemplateProcessing(
        single=f'{bos} $A', special_tokens=[(bos, made.token_to_id(bos))])
  assert made.get_vocab_size() <= VOCAB
  return made


def write_tokenizer(folder: pathlib.Path, name: str) -> transformers.PreTrainedTokenizerFast:
  made = tokenizer(name)
  made.save(str(folder / 'tokenizer.json'), pretty=False)
  bos, eos = (text for text, _ in CONTROL[name][:2])
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': eos, 'model_max_length': 512,
            'clean_up_tokenization_spaces': False}
  config['bos_token'] = {'content': bos, '__type': 'AddedToken', 'lstrip': False, 'rstrip': False,
                         'normalized': False, 'single_word': False} if name == 'qwen2' else bos
  if name == 'llama3':
    (folder / 'chat_template.jinja').write_text(TEMPLATES[name])
  elif name == 'qwen2':
    config['chat_template'] = [{'name': 'default', 'template': TEMPLATES[name]},
                               {'name': 'tool_use', 'template': '{{ raise_exception("no tools") }}'}]
  else:
    config['chat_template'] = TEMPLATES[name]
  (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=1, ensure_ascii=False))
  ends = {'llama3': [eos, '<|eom_id|>'], 'gemma3': [eos, '<end_of_turn>']}.get(name, [eos])
  ids = [made.token_to_id(end) for end in ends]
  (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': ids if len(ids) > 1 else ids[0]}))
  read = transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(folder / 'tokenizer.json'), bos_token=bos, eos_token=eos)
  read.chat_template = TEMPLATES[name]
  chats = []
  for message in MESSAGES:
    for system in ('', 'Count well.'):
      for thinking in (True, False) if name == 'qwen3' else (True,):
        messages = [{'role': 'system', 'content': system}] * bool(system) + [{'role': 'user', 'content': message}]
        text = read.apply_chat_template(messages, add_generation_prompt=True, tokenize=False,
                                        enable_thinking=thinking)
        # transformers gives templates the day; ours has none.
        text = re.sub(r'Today: \d+ \w+ \d+', 'Today: 26 Jul 2024', text)
        chats.append({'message': message, 'system': system, 'thinking': thinking,
                      'tokens': read.encode(text, add_special_tokens=False)})
  (folder / 'expected.json').write_text(json.dumps({
      'stop_ids': sorted(set(ids)),
      'texts': [{'text': text, 'tokens': read.encode(text, add_special_tokens=False),
                 'prompt': read.encode(text)} for text in TEXTS],
      'chats': chats}, ensure_ascii=False))
  return read


# Weights.


def model(name: str, seed: int) -> transformers.PreTrainedModel:
  """A model of whose numbers none is that of its initialisation."""
  torch.manual_seed(seed)
  config = CONFIGS[name]()
  config._attn_implementation = 'eager'
  made = transformers.AutoModelForCausalLM.from_config(config).float().eval()
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for parameter, x in made.named_parameters():
      scale = 0.3 if 'norm' in parameter or 'bias' in parameter else 0.35
      if 'embed' in parameter:
        scale = 1.0
      noise = torch.tensor(rng.normal(size=x.shape), dtype=torch.float32) * scale
      x.copy_(x + noise if 'norm' in parameter else noise)
      # Numbers of 16 bits, so that files are half as large.
      x.copy_(x.bfloat16().float())
  return made


def expected(made) -> dict[str, np.ndarray] | None:
  """Logits and greedy tokens; None where a greedy token is not the likeliest by GAP."""
  rng = np.random.default_rng(0)
  found = {'token_BT': rng.integers(0, VOCAB, (3, max(LENGTHS))).astype(np.int32)}
  with torch.no_grad():
    found['logits_BTV'] = made(torch.tensor(found['token_BT']).long()).logits.numpy()
    greedy = []
    for tokens, length in zip(found['token_BT'], LENGTHS):
      tokens = tokens[:length].tolist()
      for _ in range(64):
        best = made(torch.tensor([tokens])).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < GAP:
          return None
        tokens.append(int(best.indices[0]))
      greedy.append(tokens[length:])
  return found | {'greedy_B64': np.array(greedy, np.int32)}


def write_weights(folder: pathlib.Path, made, name: str) -> None:
  config = json.loads(made.config.to_json_string())
  if name in ('qwen2', 'qwen3'):  # the form of transformers 4
    rope = config.pop('rope_parameters')
    config |= {'rope_theta': rope['rope_theta'], 'rope_scaling': None, 'torch_dtype': 'bfloat16',
               'use_sliding_window': False, 'sliding_window': None}
    for key in ('layer_types', 'dtype'):
      config.pop(key, None)
  (folder / 'config.json').write_text(json.dumps(config, indent=1))
  tensors = {key: x.to(torch.bfloat16).contiguous() for key, x in made.state_dict().items()
             if not (key == 'lm_head.weight' and made.config.tie_word_embeddings)}
  parts = [list(tensors)] if name != 'llama3' else [list(tensors)[::2], list(tensors)[1::2]]
  files = ['model.safetensors'] if len(parts) == 1 else [
      f'model-{i + 1:05d}-of-{len(parts):05d}.safetensors' for i in range(len(parts))]
  for file, keys in zip(files, parts):
    safetensors.torch.save_file({key: tensors[key] for key in keys}, folder / file, metadata={'format': 'pt'})
  if len(files) > 1:
    (folder / 'model.safetensors.index.json').write_text(json.dumps({
        'metadata': {}, 'weight_map': {key: file for file, keys in zip(files, parts) for key in keys}}))


# GGUF.

ARCHITECTURES = {'llama': 'llama', 'llama3': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3', 'gemma3': 'gemma3'}
PRE = {'llama': 'smollm', 'llama3': 'llama-bpe', 'qwen2': 'qwen2', 'qwen3': 'qwen2', 'gemma3': 'default'}


def gguf_name(key: str, gemma: bool) -> str:
  key = key.removesuffix('.weight').removesuffix('.bias')
  of_all = {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output'}
  if key in of_all:
    return of_all[key]
  _, _, layer, *rest = key.split('.')
  of_layer = {
      'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'post_attention_norm' if gemma else 'ffn_norm',
      'pre_feedforward_layernorm': 'ffn_norm', 'post_feedforward_layernorm': 'post_ffw_norm',
      'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v',
      'self_attn.o_proj': 'attn_output', 'self_attn.q_norm': 'attn_q_norm', 'self_attn.k_norm': 'attn_k_norm',
      'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down'}
  return f'blk.{layer}.{of_layer[".".join(rest)]}'


def write_gguf(name: str, made, read) -> None:
  """The model's file; matrices of llama and qwen3 are quantised, which changes the model given."""
  c, architecture = made.config, ARCHITECTURES[name]
  writer = gguf.GGUFWriter(str(ROOT / f'{name}.gguf'), architecture)
  writer.add_block_count(c.num_hidden_layers)
  writer.add_context_length(c.max_position_embeddings)
  writer.add_embedding_length(c.hidden_size)
  writer.add_feed_forward_length(c.intermediate_size)
  writer.add_head_count(c.num_attention_heads)
  writer.add_head_count_kv(c.num_key_value_heads)
  writer.add_layer_norm_rms_eps(c.rms_norm_eps)
  head_dim = getattr(c, 'head_dim', None) or c.hidden_size // c.num_attention_heads
  writer.add_key_length(head_dim)
  rope = c.rope_parameters.get('full_attention', c.rope_parameters)
  writer.add_rope_freq_base(rope['rope_theta'])
  if name == 'gemma3':
    for layer in made.model.layers:  # of which the file says nothing
      layer.self_attn.scaling = head_dim ** -0.5
    writer.add_sliding_window(c.sliding_window)
    writer.add_array('gemma3.attention.sliding_window_pattern',
                     [kind == 'sliding_attention' for kind in c.layer_types])
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(rope['factor'])
  if name == 'llama3':
    frequency_H = rope['rope_theta'] ** (-np.arange(0, head_dim, 2) / head_dim)
    divisors = []
    for frequency in frequency_H:
      wave = 2 * np.pi / frequency
      if wave < 32 / 4:
        divisors.append(1)
      elif wave > 32 / 1:
        divisors.append(8)
      else:
        smooth = (32 / wave - 1) / (4 - 1)
        divisors.append(1 / ((1 - smooth) / 8 + smooth))
    writer.add_tensor('rope_freqs.weight', np.array(divisors, np.float32))
  vocab = sorted(read.get_vocab().items(), key=lambda x: x[1])
  tokens = [token for token, _ in vocab] + [f'[PAD{i}]' for i in range(len(vocab), VOCAB)]
  kinds = [gguf.TokenType.NORMAL] * len(vocab) + [gguf.TokenType.UNUSED] * (VOCAB - len(vocab))
  for text, special in CONTROL[name]:
    kinds[tokens.index(text)] = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
  writer.add_tokenizer_model('llama' if name == 'gemma3' else 'gpt2')
  writer.add_tokenizer_pre(PRE[name])
  writer.add_token_list(tokens)
  writer.add_token_types(kinds)
  merges = json.loads(read.backend_tokenizer.to_str())['model']['merges']
  if name == 'gemma3':
    rank = {''.join(pair): i for i, pair in reversed(list(enumerate(merges)))}
    writer.add_token_scores([-float(rank.get(token, 10_000)) for token in tokens])
    writer.add_unk_token_id(tokens.index('<unk>'))
  else:
    writer.add_token_merges([' '.join(pair) for pair in merges])
  writer.add_bos_token_id(tokens.index(CONTROL[name][0][0]))
  writer.add_eos_token_id(tokens.index(CONTROL[name][1][0]))
  writer.add_add_bos_token(name in ('llama3', 'gemma3'))
  writer.add_chat_template(TEMPLATES[name])
  state = made.state_dict()
  for i, (key, x) in enumerate(state.items()):
    if key == 'lm_head.weight' and c.tie_word_embeddings:
      continue
    x, stored = x.numpy().copy(), gguf.GGMLQuantizationType.F32
    if x.ndim == 2:
      stored = gguf.GGMLQuantizationType.BF16
      if name in ('llama', 'qwen3') and x.shape[1] % 32 == 0:
        stored = (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1)[i % 2]
      with torch.no_grad():  # what the file will say
        state[key].copy_(torch.tensor(gguf.dequantize(gguf.quantize(x, stored), stored)))
      x = state[key].numpy().copy()
    if architecture == 'llama' and re.search('[qk]_proj', key):  # neighbours are rotated there
      heads = c.num_attention_heads if 'q_proj' in key else c.num_key_value_heads
      x = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    if name == 'gemma3' and 'norm' in key:
      x = x + 1
    kind = 'bias' if key.endswith('bias') else 'weight'
    data = x.astype(np.float32) if stored == gguf.GGMLQuantizationType.F32 else gguf.quantize(x, stored)
    writer.add_tensor(f'{gguf_name(key, name == "gemma3")}.{kind}', data, raw_dtype=stored)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def main() -> None:
  for name in CONFIGS:
    folder = ROOT / name
    folder.mkdir(parents=True, exist_ok=True)
    read = write_tokenizer(folder, name)
    for seed in range(100):
      made = model(name, seed)
      found = expected(made)
      if found is not None:
        break
    write_weights(folder, made, name)
    found['logits_BTV'] = found['logits_BTV'].astype(np.float32)
    np.savez_compressed(folder / 'expected.npz', **found)
    write_gguf(name, made, read)
    with torch.no_grad():
      logits = made(torch.tensor(found['token_BT'][:1]).long()).logits.numpy()
    np.savez_compressed(ROOT / f'{name}.npz', token_BT=found['token_BT'][:1], logits_BTV=logits)
    print(name, 'seed', seed, sum(p.stat().st_size for p in folder.iterdir()), (ROOT / f'{name}.gguf').stat().st_size)


if __name__ == '__main__':
  main()
