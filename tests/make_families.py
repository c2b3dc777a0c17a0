"""Makes tests/data/families: tiny random checkpoints of each family, and what transformers computes with them.

    pip install 'kr_jax[parity]' && python tests/make_families.py [NAME ...]

NAME/ holds config.json and safetensors as published files are: half of the configs in the form of transformers 5,
half in that of transformers 4; fused matrices, one tensor an expert, a text tower under its prefix. expected.npz holds
logits of three sequences, and 64 greedy tokens after each of three prompts of different lengths, each likelier than
any other token by more than GAP; and the logits of the first sequence with each of the values of changes.json in
config.json, so that no field is read in vain. transformers computes all of them in float64 throughout, from the files,
without a cache.

Sequences are longer than windows. Numbers of the files are those of bfloat16.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import shutil
import sys
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import transformers

ROOT = pathlib.Path(__file__).parent / 'data' / 'families'
VOCAB = 64
TOKENS = 20  # of each sequence of logits
LENGTHS = (3, 9, 16)  # of the prompts of greedy tokens
GAP = 2e-3  # of logits
ROUTER_GAP = 1e-3  # of logits of the router, between experts that are chosen and those that are not
SEEDS = 200
LEAST_CHANGE = 0.02  # that a field of config.json makes to logits, of their standard deviation


class Shape(NamedTuple):
  """A tiny checkpoint: the fields of its config.json that are not SIZES, and how its files are written."""

  family: str
  fields: dict[str, Any]
  four: bool = False  # config.json is in the form of transformers 4
  lengths: tuple[int, ...] = LENGTHS
  left_out: tuple[str, ...] = ()  # fields that config.json does not say
  inside: bool = False  # a multimodal model's tensors have the names of its modules, not the published ones


SIZES = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=24, max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
             pad_token_id=0)
VISION = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8,
              patch_size=4)
CLASSES = {
    'llama': 'Llama', 'mistral': 'Mistral', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3', 'qwen3_moe': 'Qwen3Moe',
    'gemma3_text': 'Gemma3Text', 'gemma3': 'Gemma3', 'phi3': 'Phi3', 'smollm3': 'SmolLM3', 'olmo2': 'Olmo2',
    'olmo3': 'Olmo3'}


def rope(kind: str = 'default', theta: float = 1e4, **fields) -> dict[str, Any]:
  return {'rope_type': kind, 'rope_theta': theta, **fields}


def two_ropes(of_all: dict[str, Any], of_local: dict[str, Any]) -> dict[str, Any]:
  return {'full_attention': of_all, 'sliding_attention': of_local}


YARN = dict(kind='yarn', theta=100.0, factor=4.0, original_max_position_embeddings=64)
LLAMA3 = rope('llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
EXPERTS = dict(num_experts=8, moe_intermediate_size=8)
LOCAL, FULL = 'sliding_attention', 'full_attention'
# Of a head of 8 numbers 6 rotate: 3 pairs.
LONGROPE = dict(
    kind='longrope', theta=100.0, partial_rotary_factor=0.75, short_factor=[1.0, 1.25, 2.0],
    long_factor=[1.5, 3.0, 9.0])
GEMMA = dict(hidden_size=24, num_hidden_layers=5, head_dim=8, query_pre_attn_scalar=8, sliding_window=5)

SHAPES = {
    'llama_kv1': Shape('llama', dict(
        num_key_value_heads=1, num_hidden_layers=3, tie_word_embeddings=True, rope_parameters=rope(theta=5e5)),
        four=True),
    'llama_wide_llama3': Shape('llama', dict(head_dim=12, rope_parameters=LLAMA3)),
    'llama_linear': Shape('llama', dict(
        num_key_value_heads=4, tie_word_embeddings=True, rope_parameters=rope('linear', theta=100.0, factor=3.0)),
        four=True),
    'mistral_window': Shape('mistral', dict(sliding_window=6, num_hidden_layers=3), four=True),
    'mistral_wide': Shape('mistral', dict(
        hidden_size=20, head_dim=8, sliding_window=None, rope_parameters=rope(theta=1e6))),
    'mistral_kv1': Shape('mistral', dict(
        num_key_value_heads=1, sliding_window=None, tie_word_embeddings=True), four=True, left_out=('head_dim',)),
    'qwen2_kv1': Shape('qwen2', dict(num_key_value_heads=1, tie_word_embeddings=True)),
    'qwen2_yarn': Shape('qwen2', dict(hidden_size=32, rope_parameters=rope(**YARN)), four=True),
    'qwen2_yarn_factor': Shape('qwen2', dict(head_dim=12, rope_parameters=rope(
        **YARN, attention_factor=1.3, beta_fast=8.0, beta_slow=0.5, truncate=False))),
    'qwen2_window': Shape('qwen2', dict(
        num_hidden_layers=4, use_sliding_window=True, sliding_window=5, max_window_layers=2,
        rope_parameters=rope(**YARN)), four=True, left_out=('layer_types',)),
    'qwen3_kv1': Shape('qwen3', dict(
        num_key_value_heads=1, head_dim=4, tie_word_embeddings=True, rope_parameters=rope(theta=1e6)), four=True),
    'qwen3_wide_yarn': Shape('qwen3', dict(
        head_dim=12, rope_parameters=rope(**YARN, mscale=1.0, mscale_all_dim=0.5))),
    'qwen3_window': Shape('qwen3', dict(
        head_dim=8, num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    'qwen3_moe_kv1': Shape('qwen3_moe', dict(
        **EXPERTS, num_experts_per_tok=2, norm_topk_prob=True, num_key_value_heads=1, head_dim=4)),
    'qwen3_moe_wide': Shape('qwen3_moe', dict(
        **EXPERTS, num_experts_per_tok=3, norm_topk_prob=False, head_dim=12), four=True),
    'qwen3_moe_window': Shape('qwen3_moe', dict(
        **EXPERTS, num_experts_per_tok=2, norm_topk_prob=True, head_dim=8, use_sliding_window=True, sliding_window=6,
        tie_word_embeddings=True)),
    'gemma3_text_kv1': Shape('gemma3_text', GEMMA | dict(
        num_key_value_heads=1, sliding_window_pattern=3,
        rope_parameters=two_ropes(rope('linear', theta=1e4, factor=8.0), rope(theta=100.0))),
        four=True, left_out=('layer_types',)),
    'gemma3_text_wide': Shape('gemma3_text', GEMMA | dict(
        head_dim=12, query_pre_attn_scalar=20, layer_types=[FULL, LOCAL, LOCAL, FULL, LOCAL],
        rope_parameters=two_ropes(rope(theta=1e6), rope(theta=1e4)))),
    'gemma3_text_all_full': Shape('gemma3_text', GEMMA | dict(num_hidden_layers=2, layer_types=[FULL, FULL])),
    'gemma3_published': Shape('gemma3', GEMMA | dict(
        num_hidden_layers=6, query_pre_attn_scalar=256,
        rope_parameters=two_ropes(rope('linear', theta=1e6, factor=8.0), rope(theta=1e4))),
        four=True, left_out=(
            'layer_types', 'rope_theta', 'rope_local_base_freq', 'query_pre_attn_scalar', 'hidden_activation',
            'tie_word_embeddings', 'attention_bias', 'rms_norm_eps')),
    'gemma3_wide': Shape('gemma3', GEMMA | dict(
        head_dim=12, query_pre_attn_scalar=12, layer_types=[LOCAL, LOCAL, FULL, LOCAL, FULL])),
    'gemma3_kv1': Shape('gemma3', GEMMA | dict(
        num_key_value_heads=1, layer_types=[LOCAL, FULL, LOCAL, FULL, LOCAL]), inside=True),
    'phi3_kv1': Shape('phi3', dict(num_key_value_heads=1, rope_parameters=rope(theta=25e4)), four=True),
    'phi3_wide': Shape('phi3', dict(head_dim=12, rope_parameters=rope(theta=100.0, partial_rotary_factor=0.5))),
    'phi3_window': Shape('phi3', dict(num_key_value_heads=4, sliding_window=7), four=True),
    'phi3_short': Shape('phi3', dict(
        hidden_size=32, tie_word_embeddings=True, original_max_position_embeddings=96, max_position_embeddings=384,
        rope_parameters=rope(**LONGROPE)), four=True),
    # Its sequences are beyond the original context, those of short_logits_BTV are not.
    'phi3_long': Shape('phi3', dict(
        hidden_size=32, tie_word_embeddings=True, original_max_position_embeddings=8, max_position_embeddings=256,
        rope_parameters=rope(**LONGROPE)), lengths=(9, 14, 20)),
    'smollm3_kv1': Shape('smollm3', dict(
        num_key_value_heads=1, num_hidden_layers=5, no_rope_layer_interval=2, rope_parameters=rope(theta=5e6)),
        four=True, left_out=('no_rope_layers', 'layer_types', 'tie_word_embeddings')),
    'smollm3_wide': Shape('smollm3', dict(
        head_dim=12, num_hidden_layers=3, no_rope_layers=[0, 1, 1], tie_word_embeddings=False,
        rope_parameters=rope(**YARN))),
    'smollm3_window': Shape('smollm3', dict(
        num_hidden_layers=4, use_sliding_window=True, sliding_window=5, no_rope_layers=[1, 0, 1, 0],
        rope_parameters=rope(theta=100.0))),
    'olmo2_kv1': Shape('olmo2', dict(num_key_value_heads=1), four=True),
    'olmo2_wide': Shape('olmo2', dict(head_dim=12, rope_parameters=rope(theta=5e5))),
    'olmo2_tied': Shape('olmo2', dict(num_key_value_heads=4, tie_word_embeddings=True), four=True),
    'olmo3_kv1': Shape('olmo3', dict(
        num_key_value_heads=1, num_hidden_layers=5, sliding_window=5,
        rope_parameters=two_ropes(rope(theta=5e5), rope(theta=5e5))), four=True, left_out=('layer_types',)),
    'olmo3_wide_yarn': Shape('olmo3', dict(
        head_dim=12, num_hidden_layers=3, sliding_window=6, layer_types=[LOCAL, FULL, LOCAL],
        rope_parameters=two_ropes(rope(**YARN), rope(theta=100.0)))),
    'olmo3_yarn_factor': Shape('olmo3', dict(
        hidden_size=32, num_hidden_layers=4, sliding_window=6, rope_parameters=two_ropes(
            rope(**YARN | {'theta': 5e5}, attention_factor=1.2, beta_fast=16.0, beta_slow=1.0), rope(theta=5e5))),
        four=True),
}
# Other values of fields of these config.json; 'a.b' is b inside a.
CHANGES = {
    'llama_kv1': {'rope_theta': 100.0, 'rms_norm_eps': 1e-2},
    'llama_wide_llama3': {
        'rope_parameters.rope_theta': 2e3, 'rope_parameters.factor': 2.0, 'rope_parameters.low_freq_factor': 0.25,
        'rope_parameters.high_freq_factor': 2.0, 'rope_parameters.original_max_position_embeddings': 128},
    'llama_linear': {'rope_scaling.factor': 2.0},
    'mistral_window': {'sliding_window': 7},
    'qwen2_yarn': {'rope_scaling.factor': 8.0, 'rope_scaling.original_max_position_embeddings': 256},
    'qwen2_yarn_factor': {
        'rope_parameters.factor': 2.0, 'rope_parameters.attention_factor': 0.8, 'rope_parameters.beta_fast': 1.0,
        'rope_parameters.beta_slow': 0.1, 'rope_parameters.truncate': True},
    'qwen2_window': {'max_window_layers': 3, 'sliding_window': 6, 'use_sliding_window': False},
    'qwen3_wide_yarn': {'rope_parameters.mscale': 0.5, 'rope_parameters.mscale_all_dim': 2.0},
    'qwen3_window': {'layer_types': [LOCAL, FULL, FULL], 'sliding_window': 5},
    'qwen3_moe_kv1': {'num_experts_per_tok': 1, 'norm_topk_prob': False},
    'qwen3_moe_wide': {'num_experts_per_tok': 8, 'norm_topk_prob': True},
    'qwen3_moe_window': {'sliding_window': 4},
    'gemma3_text_kv1': {
        'sliding_window_pattern': 2, 'rope_theta': 100.0, 'rope_local_base_freq': 1e4, 'rope_scaling.factor': 2.0,
        'query_pre_attn_scalar': 2, 'sliding_window': 4, 'hidden_activation': 'silu'},
    'gemma3_text_wide': {
        'layer_types': [FULL, LOCAL, LOCAL, LOCAL, LOCAL], 'rope_parameters.full_attention.rope_theta': 1e3,
        'rope_parameters.sliding_attention.rope_theta': 100.0},
    'gemma3_published': {
        'text_config.sliding_window_pattern': 2, 'text_config.rope_theta': 100.0, 'text_config.sliding_window': 6},
    'phi3_wide': {'rope_parameters.partial_rotary_factor': 1.0, 'rope_parameters.rope_theta': 1e4},
    'phi3_window': {'sliding_window': None},
    'phi3_short': {'rope_scaling.short_factor': [1.0, 2.0, 3.0], 'max_position_embeddings': 9600,
                   'original_max_position_embeddings': 192, 'rope_theta': 10.0},
    'phi3_long': {'rope_parameters.long_factor': [1.0, 3.0, 9.0], 'rope_parameters.attention_factor': 1.1},
    'smollm3_kv1': {'no_rope_layer_interval': 3, 'no_rope_layers': [1, 1, 1, 0, 0]},
    'smollm3_wide': {'no_rope_layers': [1, 0, 1]},
    'smollm3_window': {'sliding_window': 4, 'layer_types': [LOCAL, LOCAL, FULL, FULL]},
    'olmo2_wide': {'rms_norm_eps': 1e-1},
    'olmo3_kv1': {'sliding_window': 6, 'rope_theta': 100.0, 'layer_types': [FULL] * 5},
    'olmo3_wide_yarn': {
        'rope_parameters.full_attention.factor': 16.0, 'rope_parameters.sliding_attention.rope_theta': 1e4},
    'olmo3_yarn_factor': {'rope_scaling.attention_factor': 0.8, 'rope_theta': 100.0},
}


def compute_in_float64() -> None:
  """Makes float64 of each float32 that modeling code asks for: of norms, softmax, rotations and frequencies."""
  torch.set_default_dtype(torch.float64)
  torch.Tensor.float = torch.Tensor.double

  class Wide:
    float32 = float = torch.float64

    def __getattr__(self, name):
      return getattr(torch, name)

  folders = {family.removesuffix('_text') for family in CLASSES}
  for module in ('modeling_rope_utils', *(f'models.{name}.modeling_{name}' for name in folders)):
    importlib.import_module(f'transformers.{module}').torch = Wide()


# Checkpoints.


def config_of(shape: Shape) -> transformers.PretrainedConfig:
  fields = json.loads(json.dumps(SIZES | shape.fields))  # a copy: configs change the dicts that they are given
  named = lambda name: getattr(transformers, f'{CLASSES[name]}Config')
  if shape.family != 'gemma3':
    return named(shape.family)(**fields)
  return named('gemma3')(
      text_config=named('gemma3_text')(**fields).to_dict(), vision_config=VISION, mm_tokens_per_image=1,
      boi_token_index=VOCAB - 3, eoi_token_index=VOCAB - 2, image_token_index=VOCAB - 1)


def randomise(made: transformers.PreTrainedModel, rng: np.random.Generator) -> None:
  """Gives each parameter numbers at which it matters: no norm is near 1, no bias near 0."""
  config = made.config.get_text_config()
  # Layers add about 1 to what they read, and a tied embedding must not outweigh them: the likeliest token would be the
  # last one again. Gemma multiplies embeddings by sqrt(D).
  embedding = {'gemma3_text': 0.06, 'olmo2': 0.3}.get(config.model_type, 0.7) if config.tie_word_embeddings else 1.0
  with torch.no_grad():
    for name, x in made.named_parameters():
      noise = torch.tensor(rng.normal(size=x.shape))
      if 'norm' in name:
        x += 0.3 * noise
        if name.endswith('model.norm.weight') and embedding < 0.5:
          x += 0.3 / embedding  # logits are as large as those of the others
      elif 'embed_tokens' in name:
        x.copy_(noise * embedding)
      else:
        x.copy_(noise * (0.5 if name.endswith('bias') else 1.6 * x.shape[-1] ** -0.5))
      x.copy_(x.bfloat16().double())


def as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
  """The fields of a config.json as transformers 4 wrote them."""
  config = dict(config)
  if 'text_config' in config:
    config['text_config'] = as_transformers_4(config['text_config'])
    return config
  ropes = config.pop('rope_parameters')
  of_all = dict(ropes.get(FULL, ropes))
  if 'dtype' in config:
    config['torch_dtype'] = config.pop('dtype')
  config['rope_theta'] = of_all.pop('rope_theta')
  if config['model_type'].startswith('gemma3'):
    config['rope_local_base_freq'] = ropes[LOCAL]['rope_theta']
    config['sliding_window_pattern'] = config.pop('_sliding_window_pattern', 6)
  if config['model_type'] == 'phi3':
    config['partial_rotary_factor'] = of_all.pop('partial_rotary_factor')
    of_all.pop('original_max_position_embeddings', None)  # config.json says it outside
    of_all['type'] = of_all.pop('rope_type')
  kind = of_all.get('rope_type', of_all.get('type'))
  config['rope_scaling'] = None if kind == 'default' else of_all
  return config


def write(folder: pathlib.Path, shape: Shape, made: transformers.PreTrainedModel) -> None:
  shutil.rmtree(folder, ignore_errors=True)
  made = made.to(torch.bfloat16)
  for config in (made.config, *(getattr(made.config, name) for name in made.config.sub_configs)):
    config.dtype = torch.bfloat16
  made.save_pretrained(folder)
  (folder / 'generation_config.json').unlink(missing_ok=True)
  of_json = json.loads((folder / 'config.json').read_text())
  of_json = as_transformers_4(of_json) if shape.four else of_json
  text = of_json.get('text_config', of_json)
  for name in shape.left_out:
    text.pop(name, None)
    of_json.pop(name, None)
  (folder / 'config.json').write_text(json.dumps(of_json, indent=1))
  file = folder / 'model.safetensors'
  if shape.inside:
    inside = lambda name: 'model.' + name.replace('language_model.model.', 'language_model.')
    tensors = {inside(name): x for name, x in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file, metadata={'format': 'pt'})
  file.chmod(0o644)


# What transformers computes.


class NearTie(Exception):
  pass


def watch_router(made: transformers.PreTrainedModel) -> None:
  """Makes the model raise NearTie where another expert is nearly chosen."""
  def check(module, _, output):
    best = output[0].topk(module.top_k + 1).values
    if (best[..., -2] - best[..., -1]).min() < ROUTER_GAP:
      raise NearTie
  for module in made.modules():
    if type(module).__name__.endswith('TopKRouter'):
      module.register_forward_hook(check)


def greedy(made, tokens: list[int], count: int) -> list[int]:
  """Tokens by a forward pass over the whole sequence for each. Raises NearTie."""
  written = []
  for _ in range(count):
    best = made(torch.tensor([tokens + written]), use_cache=False).logits[0, -1].topk(2)
    if best.values[0] - best.values[1] < GAP:
      raise NearTie
    written.append(int(best.indices[0]))
  if len(set(written)) < 10:  # a loop of few tokens says little
    raise NearTie
  return written


def logits(made: transformers.PreTrainedModel, token_BT: np.ndarray) -> np.ndarray:
  return made(torch.tensor(token_BT).long(), use_cache=False).logits.numpy().astype(np.float32)


def expected(made: transformers.PreTrainedModel, shape: Shape) -> dict[str, np.ndarray]:
  """Logits and greedy tokens. Raises NearTie where rounding could change a choice."""
  token_BT = np.random.default_rng(0).integers(3, VOCAB - 4, (3, TOKENS)).astype(np.int32)
  found = {'token_BT': token_BT, 'logits_BTV': logits(made, token_BT), 'length_B': np.array(shape.lengths, np.int32)}
  context = shape.fields.get('original_max_position_embeddings', TOKENS)
  if context < TOKENS:
    found['short_logits_BTV'] = logits(made, token_BT[:, :context])
  found['greedy_B64'] = np.array([greedy(made, row[:length].tolist(), 64)
                                  for row, length in zip(token_BT, shape.lengths)], np.int32)
  return found


def read(folder: pathlib.Path) -> transformers.PreTrainedModel:
  return transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float64, attn_implementation='eager', experts_implementation='eager').eval()


def changed(folder: pathlib.Path, changes: dict[str, Any], found: dict[str, np.ndarray]) -> np.ndarray:
  """Logits of the first sequence with each change: changed_CTV."""
  of_json, token_1T, of_changes = json.loads((folder / 'config.json').read_text()), found['token_BT'][:1], []
  for name, value in changes.items():
    other = json.loads(json.dumps(of_json))
    *outer, last = name.split('.')
    inner = other
    for part in outer:
      inner = inner[part]
    inner[last] = value
    (folder / 'config.json').write_text(json.dumps(other))
    of_changes.append(logits(read(folder), token_1T)[0])
    if np.abs(of_changes[-1] - found['logits_BTV'][0]).max() < LEAST_CHANGE * found['logits_BTV'].std():
      raise RuntimeError(f'{folder.name}: {name}={value} changes nothing')
  (folder / 'config.json').write_text(json.dumps(of_json, indent=1))
  (folder / 'changes.json').write_text(json.dumps(changes, indent=1))
  return np.stack(of_changes)


def make(name: str) -> None:
  shape, folder = SHAPES[name], ROOT / name
  for seed in range(SEEDS):
    made = transformers.AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.float64)
    randomise(made, np.random.default_rng(seed))
    write(folder, shape, made)
    model = read(folder)
    watch_router(model)
    try:
      found = expected(model, shape)
    except NearTie:
      continue
    if name in CHANGES:
      found['changed_CTV'] = changed(folder, CHANGES[name], found)
    np.savez_compressed(folder / 'expected.npz', **found)
    size = sum(p.stat().st_size for p in folder.iterdir())
    print(f'{name:<22} seed {seed:>3}  {size:>6} bytes  logits of std {found["logits_BTV"].std():.1f}, '
          f'{len(np.unique(found["greedy_B64"]))} greedy tokens differ', flush=True)
    return
  raise RuntimeError(f'{name}: each of {SEEDS} seeds has a near tie')


def main() -> None:
  transformers.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  compute_in_float64()
  with torch.no_grad():
    for name in sys.argv[1:] or SHAPES:
      make(name)


if __name__ == '__main__':
  main()
