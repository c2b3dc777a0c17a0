"""Families: what config.json says of a policy and back, and where its parameters lie."""

import json
import math
import pathlib

import jax
import pytest

from kr_jax.model import attention
from kr_jax.model import families
from kr_jax.model import policy

ROOT = pathlib.Path(__file__).parents[1] / 'data' / 'checkpoints'
NAMES = ('llama', 'qwen2', 'qwen3', 'qwen3_moe', 'mistral', 'phi3', 'smollm3', 'olmo2', 'olmo3', 'gemma3_text')
SMALL = {'vocab_size': 96, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 4, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'max_position_embeddings': 128}
SLIDING = ['sliding_attention', 'full_attention'] * 2
LONG = {'type': 'longrope', 'short_factor': [1.0] * 4, 'long_factor': [2.0] * 4}


def config(family, length=0, **published) -> policy.Config:
  return policy.Config(**families.fields({'model_type': family} | SMALL | published, 'x/config.json', length))


@pytest.mark.parametrize('family, want', [
    ('llama', (32_000, 4096, 11_008, 32, 32, 32, 128, 2048, 1e-6, False, 1e4)),
    ('mistral', (32_000, 4096, 14_336, 32, 32, 8, 128, 131_072, 1e-6, False, 1e4)),
    ('qwen2', (151_936, 4096, 22_016, 32, 32, 32, 128, 32_768, 1e-6, False, 1e4)),
    ('qwen3', (151_936, 4096, 22_016, 32, 32, 32, 128, 32_768, 1e-6, False, 1e4)),
    ('qwen3_moe', (151_936, 2048, 768, 24, 32, 4, 64, 32_768, 1e-6, False, 1e4)),
    ('gemma3_text', (262_208, 2304, 9216, 26, 8, 4, 256, 131_072, 1e-6, True, 1e6)),
    ('phi3', (32_064, 3072, 8192, 32, 32, 32, 96, 4096, 1e-5, False, 1e4)),
    ('smollm3', (128_256, 2048, 11_008, 36, 16, 4, 128, 32_768, 1e-6, True, 2e6)),
    ('olmo2', (50_304, 4096, 11_008, 32, 32, 32, 128, 2048, 1e-5, False, 1e4)),
    ('olmo3', (50_304, 4096, 11_008, 32, 32, 32, 128, 2048, 1e-5, False, 5e5))])
def test_fields_that_are_absent(family, want):
  """They are what they are to transformers 5."""
  c = policy.Config(**families.fields({'model_type': family}, ''))
  assert want == (c.vocab_size, c.width, c.hidden_width, c.num_layers, c.num_heads, c.num_kv_heads, c.head_width,
                  c.context, c.norm_eps, c.tie_embeddings, c.rope_theta)
  assert c.family == family


def test_the_parts_of_each_family():
  parts = {name: {part for part in ('qk_norm', 'qk_norm_whole', 'qkv_bias', 'norm_offset', 'post_norms',
                                    'embedding_scale', 'num_experts', 'query_scalar') if getattr(config(name), part)}
           | (set() if config(name).pre_norms else {'no pre_norms'}) for name in NAMES}
  olmo = {'qk_norm', 'qk_norm_whole', 'post_norms', 'no pre_norms'}
  assert parts == {
      'llama': set(), 'mistral': set(), 'phi3': set(), 'smollm3': set(), 'qwen2': {'qkv_bias'}, 'qwen3': {'qk_norm'},
      'qwen3_moe': {'qk_norm', 'num_experts'}, 'olmo2': olmo, 'olmo3': olmo,
      'gemma3_text': {'qk_norm', 'norm_offset', 'post_norms', 'embedding_scale', 'query_scalar'}}
  assert config('gemma3_text').activation == 'gelu' and config('gemma3_text').query_scalar == 256


def test_the_text_tower_of_a_multimodal_gemma():
  """Its config.json leaves out what is usual, and ties the output matrix at the top."""
  text = {'model_type': 'gemma3_text', 'hidden_size': 2560, 'intermediate_size': 10_240, 'num_hidden_layers': 34,
          'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'}, 'sliding_window': 1024}
  c = policy.Config(**families.fields({'model_type': 'gemma3', 'vision_config': {'hidden_size': 9},
                                       'text_config': text}, ''))
  assert (c.family, c.vocab_size, c.width, c.num_layers, c.head_width, c.num_kv_heads, c.tie_embeddings) == (
      'gemma3_text', 262_208, 2560, 34, 256, 4, True)
  assert (c.rope_theta, c.local_rope_theta, c.rope_scaling, c.window) == (
      1e6, 1e4, attention.Scaling('linear', 8.0), 1024)
  assert [i for i, local in enumerate(c.local_layers) if not local] == [5, 11, 17, 23, 29]
  untied = {'model_type': 'gemma3', 'text_config': text, 'tie_word_embeddings': False}
  assert not families.fields(untied, '')['tie_embeddings']
  assert families.published(c)['architectures'] == ['Gemma3ForCausalLM']


@pytest.mark.parametrize('family, published, local, window', [
    ('mistral', {'sliding_window': 16}, (True,) * 4, 16),
    ('mistral', {'sliding_window': None}, (), 0),
    ('phi3', {'sliding_window': 16}, (True,) * 4, 16),
    ('qwen2', {'sliding_window': 16, 'max_window_layers': 1}, (), 0),  # unless it is used
    ('qwen2', {'sliding_window': 16, 'max_window_layers': 3, 'use_sliding_window': True}, (False,) * 3 + (True,), 16),
    ('qwen3', {'sliding_window': 16, 'use_sliding_window': True}, (), 0),  # the first 28 layers read all
    ('qwen3', {'sliding_window': 16, 'use_sliding_window': True, 'layer_types': SLIDING}, (True, False) * 2, 16),
    ('qwen3', {'layer_types': ['attention'] * 4}, (), 0),
    ('qwen3_moe', {'sliding_window': 16, 'use_sliding_window': True}, (True,) * 4, 16),
    ('gemma3_text', {'sliding_window': 16, 'sliding_window_pattern': 3}, (True, True, False, True), 16),
    ('gemma3_text', {'layer_types': ['full_attention'] * 4}, (), 0),
    ('olmo3', {'sliding_window': 16}, (True, True, True, False), 16),
    ('smollm3', {'use_sliding_window': True, 'sliding_window': 16}, (False,) * 3 + (True,), 16)])
def test_layers_that_read_a_window(family, published, local, window):
  c = config(family, **published)
  assert (c.local_layers, c.window) == (local, window)


def test_layers_that_do_not_rotate():
  assert config('smollm3').no_rope_layers == (False, False, False, True)
  assert config('smollm3', no_rope_layer_interval=2).no_rope_layers == (False, True) * 2
  assert config('smollm3', no_rope_layers=[1, 0, 0, 1]).no_rope_layers == (False, True, True, False)
  assert config('smollm3', no_rope_layers=[1] * 4).no_rope_layers == ()


def test_experts():
  c = config('qwen3_moe', num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)
  assert (c.num_experts, c.experts_per_token, c.hidden_width, c.normalize_experts) == (8, 2, 24, True)
  five = config('qwen3_moe', num_local_experts=8, num_experts_per_tok=2)  # as transformers 5 calls them
  assert (five.num_experts, five.hidden_width, five.normalize_experts) == (8, 768, False)


@pytest.mark.parametrize('family, published, named', [
    ('mamba', {}, "x/config.json: model_type 'mamba' is not one of .*'qwen3'"),
    (['llama'], {}, r"model_type \['llama'\] is not one of"),
    ('llama', {'num_hidden_layers': 2 ** 30}, 'num_hidden_layers is 1073741824, above the limit of 10000'),
    ('qwen3_moe', {'num_experts': 2 ** 20}, 'num_experts=1048576 in each of 4 layers are above the limit of 262144'),
    ('llama', {'hidden_size': 3, 'head_dim': None}, '1 numbers of a head of head_dim=1 cannot rotate in pairs'),
    ('gemma3', {'text_config': [1]}, r'text_config is \[1\], not an object'),
    ('llama', {'vocab_size': '96', 'num_hidden_layers': 4.0, 'hidden_size': None, 'num_attention_heads': 0,
               'rms_norm_eps': '1e-5', 'tie_word_embeddings': 1, 'hidden_act': 'relu', 'attention_bias': True,
               'mlp_bias': True},
     "hidden_size is None, not a whole number; num_attention_heads is 0, not at least 1; vocab_size is '96', not a "
     'whole number; num_hidden_layers is 4.0, not a whole number; attention_bias=True is not supported; mlp_bias=True '
     "is not supported; the activation 'relu' is not one of .*; rms_norm_eps is '1e-5', not a number; "
     'tie_word_embeddings is 1, not true or false'),
    ('llama', {'transformers_weights': 'b.safetensors'}, "transformers_weights='b.safetensors' is not supported"),
    ('llama', {'hidden_act': ['silu']}, "the activation \\['silu'\\] is not one of"),
    ('llama', {'num_key_value_heads': 3}, 'num_attention_heads=4 is not a multiple of num_key_value_heads=3'),
    ('llama', {'head_dim': 7}, '7 numbers of a head of head_dim=7 cannot rotate in pairs'),
    ('llama', {'layer_types': SLIDING}, "not supported of 'llama', whose layers all read all tokens"),
    ('mistral', {'layer_types': SLIDING}, "not supported of 'mistral', whose layers all read the window"),
    ('qwen3', {'layer_types': SLIDING}, 'layers read a window, and sliding_window is null or use_sliding_window false'),
    ('qwen3', {'layer_types': SLIDING[:3]}, "holds 3 of \\['full_attention', 'sliding_attention'\\], not num_"),
    ('qwen3', {'layer_types': ['linear_attention'] * 4}, "holds 4 of \\['linear_attention'\\]"),
    ('qwen3', {'layer_types': 'full_attention'}, "holds 'full_attention', not num_hidden_layers=4 of"),
    ('gemma3_text', {'sliding_window': None}, 'layers read a window, and sliding_window is null'),
    ('gemma3_text', {'sliding_window_pattern': 0}, 'sliding_window_pattern is 0, not at least 1'),
    ('gemma3_text', {'final_logit_softcapping': 30.0, 'use_bidirectional_attention': True},
     'use_bidirectional_attention=True is not supported; final_logit_softcapping=30.0 is not supported'),
    ('smollm3', {'no_rope_layers': [1, 0]}, r'no_rope_layers=\[1, 0\] must hold num_hidden_layers=4 numbers'),
    ('smollm3', {'no_rope_layers': [1, 0, 2, 1]}, r'no_rope_layers=\[1, 0, 2, 1\] must hold'),
    ('qwen3_moe', {'num_experts': 4}, 'num_experts_per_tok=8 is above num_experts=4'),
    ('qwen3_moe', {'mlp_only_layers': [0], 'decoder_sparse_step': 2},
     r'mlp_only_layers=\[0\] is not supported; decoder_sparse_step=2 is not supported'),
    ('llama', {'quantization_config': {'quant_method': 'fp8'}},
     "quantization_config: the weights are quantised by 'fp8'; take the checkpoint that this one was made of"),
    ('llama', {'quantization_config': {'bits': 4}}, "quantised by 'a method without a name'"),
    ('gemma3', {'text_config': {}, 'quantization_config': {'quant_method': 'bitsandbytes'}}, "by 'bitsandbytes'")])
def test_a_config_that_is_not_supported(family, published, named):
  """All that is wrong is named at once."""
  with pytest.raises(ValueError, match=named):
    config(family, **published)


def test_biases_that_are_always_there():
  assert config('qwen2', attention_bias=True).qkv_bias


VARIANTS = [
    ('llama', {'hidden_act': 'gelu_pytorch_tanh'}), ('mistral', {'head_dim': 16, 'sliding_window': None}),
    ('qwen2', {'sliding_window': 16, 'max_window_layers': 2, 'use_sliding_window': True}),
    ('qwen3', {'rope_scaling': {'type': 'yarn', 'factor': 4.0}}), ('smollm3', {'no_rope_layer_interval': 2}),
    ('qwen3_moe', {'num_experts': 8, 'num_experts_per_tok': 2, 'use_sliding_window': True, 'sliding_window': 16}),
    ('phi3', {'partial_rotary_factor': 0.75}), ('phi3', {'rope_scaling': LONG, 'original_max_position_embeddings': 32}),
    ('gemma3_text', {'query_pre_attn_scalar': 20.5, 'sliding_window_pattern': 2}),
    ('olmo3', {'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}, 'rope_theta': 1e4})]


@pytest.mark.parametrize('family, published', [*((name, {}) for name in NAMES), *VARIANTS])
def test_what_is_written_is_read(family, published):
  c = config(family, **published)
  again = families.published(c)
  assert policy.Config(**families.fields(json.loads(json.dumps(again)), '')) == c
  assert again['architectures'][0].endswith('ForCausalLM') and again['model_type'] == family


def test_a_window_that_no_layer_reads():
  """transformers makes a mask of it for Gemma 3 and OLMo 3, and takes its absence from Mistral for a default."""
  full = {'layer_types': ['full_attention'] * 4}
  assert 'sliding_window' not in families.published(config('gemma3_text', **full))
  assert families.published(config('mistral', sliding_window=None))['sliding_window'] is None


def test_a_whole_part_of_a_head_is_written():
  """Whatever share it is."""
  for width in range(2, 44, 2):
    c = config('phi3', head_dim=44).replace(rope_width=width)
    assert math.floor(44 * families.published(c)['partial_rotary_factor']) == width


def test_a_policy_from_scratch_is_one_of_a_family():
  c = policy.Config(vocab_size=11)
  family = lambda **parts: families.published(c.replace(**parts))['model_type']
  assert (family(), family(qk_norm=False), family(qk_norm=False, qkv_bias=True)) == ('qwen3', 'llama', 'qwen2')
  assert family(num_experts=16) == 'qwen3_moe'
  for parts in ({'qkv_bias': True}, {'post_norms': True}, {'qk_norm': False, 'num_experts': 16}):
    with pytest.raises(ValueError, match='no published family has the parts of'):
      family(**parts)
  with pytest.raises(ValueError, match="'mistral', the family of this policy, is not published with policy.qk_norm=T"):
    family(family='mistral')
  with pytest.raises(ValueError, match="'phi3', .* with policy.rope_scaling=Scaling"):
    family(family='phi3', qk_norm=False, rope_scaling=attention.Scaling('linear', 2.0))


@pytest.mark.parametrize('family', NAMES)
def test_every_parameter_has_its_place(family):
  """Of fused tensors each row has one."""
  c = config(family, num_experts=2, num_experts_per_tok=1) if family == 'qwen3_moe' else config(family)
  rows = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: policy.init(c, jax.random.key(0)))):
    parameter = path[-1].key
    stored, of_layers = families.stored(c, parameter)
    assert of_layers == ('layers' in str(path)) == ('model.layers.{}.' in stored.name)
    size = dict(zip(reversed(parameter.rpartition('_')[2]), reversed(leaf.shape)))
    count = math.prod(size[letter] for letter in families.dimensions(stored.letters)[0])
    assert (stored.name, stored.first) not in rows
    rows[stored.name, stored.first] = count, stored.rows or count
  for name in {name for name, _ in rows}:
    parts = sorted((first, *x) for (other, first), x in rows.items() if other == name)
    assert [first for first, *_ in parts] == [sum(count for _, count, _ in parts[:i]) for i in range(len(parts))]
    assert {whole for *_, whole in parts} == {sum(count for _, count, _ in parts)}


def test_names_of_tensors():
  name = lambda family, parameter, **published: families.stored(config(family, **published), parameter)[0].name
  assert name('llama', 'mlp_norm_D').format(3) == 'model.layers.3.post_attention_layernorm.weight'
  assert name('gemma3_text', 'mlp_norm_D').format(3) == 'model.layers.3.pre_feedforward_layernorm.weight'
  assert name('olmo2', 'attention_post_norm_D').format(3) == 'model.layers.3.post_attention_layernorm.weight'
  assert name('qwen3_moe', 'up_EDF').format(3, e=7) == 'model.layers.3.mlp.experts.7.up_proj.weight'
  assert families.stored(config('phi3'), 'v_DKH')[0] == families.Stored(
      'model.layers.{}.self_attn.qkv_proj.weight', 'KHD', first=48, rows=64)
  assert families.dimensions('NHD') == ['NH', 'D'] and families.dimensions('H') == ['H']


def test_a_context_that_is_stretched():
  c = config('qwen2', max_position_embeddings=4096)
  longer = families.stretched(c, 2.0)
  assert longer.rope_scaling == attention.Scaling('yarn', 2.0, 1.0, 32.0, 4096.0, 0.1 * math.log(2) + 1)
  assert (families.longest(c), families.longest(longer)) == (4096, 8192)
  assert families.published(longer)['rope_scaling'] == {
      'rope_type': 'yarn', 'factor': 2.0, 'original_max_position_embeddings': 4096, 'beta_slow': 1.0, 'beta_fast': 32.0}
  with pytest.raises(ValueError, match="policy.yarn=4: the checkpoint scales its rotations itself, by 'yarn'"):
    families.stretched(longer, 4.0)
  with pytest.raises(ValueError, match='policy.yarn=4 stretches the context of a checkpoint, and there is none'):
    families.stretched(c.replace(context=0), 4.0)
  with pytest.raises(ValueError, match="policy.yarn=4: models of 'phi3' are not published with yarn; set"):
    families.stretched(config('phi3'), 4.0)


def test_configs_of_transformers_4_and_5():
  """Of the checkpoints in tests/data, one or the other."""
  for name in ('gemma3', 'llama3', 'qwen2'):
    published = json.loads((ROOT / name / 'config.json').read_text())
    c = policy.Config(**families.fields(published, ''))
    five = families.published(c)
    four = {field: x for field, x in five.items() if field != 'rope_parameters'}
    assert policy.Config(**families.fields(five, '')) == policy.Config(**families.fields(four, '')) == c
