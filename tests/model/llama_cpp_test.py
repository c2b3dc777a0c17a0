"""Files of llama.cpp say what the directories say that they were made of (tests/make_gguf.py)."""

import dataclasses
import json
import pathlib

import gguf
import numpy as np
import pytest

from kr_jax.model import families
from kr_jax.model import llama_cpp
from kr_jax.model import policy
from kr_jax.model import pretrained
from kr_jax.model import weights
from tests import make_gguf

DATA = pathlib.Path(__file__).parents[1] / 'data'
# What a file does not tell: fields of policy.Config by checkpoint.
UNTOLD = {
    'gemma3_published': {'query_scalar'}, 'gemma3_text_wide': {'query_scalar'}, 'mistral_kv1': {'family'},
    'mistral_wide': {'family'}, 'mistral_window': {'family', 'window', 'local_layers'},
    'qwen2_window': {'window', 'local_layers'}, 'qwen2_yarn_factor': {'rope_scaling'},
    'qwen3_moe_wide': {'normalize_experts'}, 'qwen3_moe_window': {'window', 'local_layers'},
    'qwen3_window': {'window', 'local_layers'}, 'smollm3_kv1': {'no_rope_layers'}, 'smollm3_wide': {'no_rope_layers'},
    'smollm3_window': {'window', 'local_layers', 'no_rope_layers'}}
FAMILIES = sorted(path.name for path in (DATA / 'families').iterdir())
QUICK = ('gemma3_wide', 'llama_wide_llama3', 'olmo3_wide_yarn', 'phi3_long', 'qwen3_moe_kv1', 'smollm3_window')


def whole(files, name) -> np.ndarray:
  return files.tensor(name, [slice(None)] * len(files.shapes[name]))


def made_of(name: str, tmp_path: pathlib.Path, **options) -> llama_cpp.Gguf:
  make_gguf.write(tmp_path / f'{name}.gguf', DATA / 'families' / name, **options)
  return llama_cpp.Gguf(next(path for path in sorted(tmp_path.glob(f'{name}*.gguf'))))


def config_of(files) -> policy.Config:
  return policy.Config(**families.fields(files.config, files.path))


@pytest.mark.parametrize('name', ['gemma3', 'llama3', 'qwen2'])
def test_a_file_says_what_the_directory_says(name):
  """Names, shapes and, where nothing is quantised, numbers."""
  published, file = (pretrained.read(DATA / 'checkpoints' / path) for path in (name, f'{name}.gguf'))
  assert published.shapes == file.shapes
  for tensor in published.shapes:
    np.testing.assert_allclose(whole(file, tensor), whole(published, tensor).astype(np.float32), atol=1e-6)
  for field in ('model_type', 'vocab_size', 'hidden_size', 'num_key_value_heads', 'tie_word_embeddings',
                'rms_norm_eps'):
    assert file.config[field] == published.config[field]


@pytest.mark.parametrize(
    'name', [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_a_file_of_each_family(name, tmp_path):
  """The config of the policy, and every tensor bit by bit but for Gemma's norms, to which llama.cpp adds 1."""
  file, published = made_of(name, tmp_path), pretrained.Directory(DATA / 'families' / name)
  ours, theirs = config_of(file), config_of(published)
  told = {f.name for f in dataclasses.fields(ours)} - UNTOLD.get(name, set()) - {'rope_scaling'}
  assert {key: getattr(ours, key) for key in told} == {key: getattr(theirs, key) for key in told}
  if 'rope_scaling' not in UNTOLD.get(name, ()) and theirs.rope_scaling is not None:
    a, b = ours.rope_scaling, theirs.rope_scaling
    assert a._replace(attention_factor=0) == b._replace(attention_factor=0)
    assert a.attention_factor == pytest.approx(b.attention_factor, rel=1e-6)  # of 32 bits
  own = {make_gguf.text_name(x): x for x in published.shapes if make_gguf.text_name(x)}
  assert file.shapes == {x: published.shapes[y] for x, y in own.items()}
  for x, y in own.items():
    tolerance = 1e-6 if name.startswith('gemma') and 'norm' in x else 0
    np.testing.assert_allclose(whole(file, x), whole(published, y).astype(np.float32), rtol=0, atol=tolerance)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow if name in QUICK else pytest.mark.exhaustive)
    for name in sorted(set(FAMILIES) - set(UNTOLD) | {'mistral_wide'})])
def test_logits_of_a_file_are_those_of_transformers(name, tmp_path):
  expected = np.load(DATA / 'families' / name / 'expected.npz')
  tokens_BT = expected['token_BT']
  config, params = weights.load(made_of(name, tmp_path).path, length=tokens_BT.shape[1])
  np.testing.assert_allclose(policy.logits(config, params, tokens_BT), expected['logits_BTV'], atol=1e-4)


def test_llama_3_scaling_is_found_in_its_divisors():
  assert pretrained.read(DATA / 'checkpoints' / 'llama3.gguf').config['rope_scaling'] == {
      'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
      'original_max_position_embeddings': 32}


def rotations(tmp_path, divisors: list[float], **fields):
  """rope_scaling of a head of 8 in a file with these divisors of frequencies."""
  of_llama = {f'llama.{key}': x for key, x in {
      'attention.head_count': 4, 'embedding_length': 32, 'block_count': 1, 'feed_forward_length': 64, 'vocab_size': 9,
      'attention.layer_norm_rms_epsilon': 1e-5, 'context_length': 64, 'rope.freq_base': 500_000.0}.items()}
  of_llama |= {f'llama.rope.scaling.{key}': x for key, x in fields.items()}
  make_gguf.write_raw(tmp_path / 'a.gguf', 'llama', of_llama, {'rope_freqs.weight': np.array(divisors)})
  return llama_cpp.Gguf(tmp_path / 'a.gguf').config['rope_scaling']


def test_divisors_beside_another_scaling(tmp_path):
  """Divisors of 1 leave it; others would scale twice."""
  yarn = {'type': 'yarn', 'factor': 4.0, 'original_context_length': 16}
  assert rotations(tmp_path, [1.0] * 4) is None
  assert rotations(tmp_path, [1.0] * 4, **yarn) == {
      'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16}
  llama_3 = [1.7358, 8.0, 8.0, 8.0]  # of 16 tokens, in which the first number turns 16 / (2 pi) = 2.546 times
  assert rotations(tmp_path, llama_3)['original_max_position_embeddings'] == 16
  with pytest.raises(ValueError, match="scaling.type='yarn' and the divisors in rope_freqs.weight scale .* twice"):
    rotations(tmp_path, llama_3, **yarn)


@pytest.mark.parametrize('divisors, error', [
    ([1.0] * 3, r'has the shape \[3\], where 4 frequencies rotate'),
    ([8.0] * 4, 'holds other divisors than Llama 3'), ([1.0, 1.0, 8.0, 8.0], 'holds other divisors than Llama 3'),
    ([1.0, 0.0, 8.0, 8.0], 'holds numbers that divide no frequency')])
def test_divisors_that_are_not_those_of_llama_3(divisors, error, tmp_path):
  with pytest.raises(ValueError, match=f'a.gguf: rope_freqs.weight {error}'):
    rotations(tmp_path, divisors)


def test_layers_of_smollm3_that_do_not_rotate(tmp_path):
  """Every fourth, of which the file says nothing."""
  assert made_of('smollm3_kv1', tmp_path).config['no_rope_layers'] == [1, 1, 1, 0, 1]


def test_gemma_3_27b_alone_scales_queries_by_its_width(tmp_path):
  found = {}
  for layers in (34, 62):
    file = made_of('gemma3_wide', tmp_path, fields={
        'gemma3.block_count': layers, 'gemma3.embedding_length': 5376, 'gemma3.attention.head_count': 32,
        'gemma3.attention.sliding_window_pattern': None})
    found[layers] = file.config['query_pre_attn_scalar']
    local = [kind == 'sliding_attention' for kind in file.config['layer_types']]
    assert local[:6] == [True] * 5 + [False] and len(local) == layers
  assert found == {34: 12, 62: 168}


def test_only_the_part_is_read(tmp_path, monkeypatch):
  """The rows of a query that llama.cpp interleaves, those of one expert, and columns."""
  read = []
  dequantize = gguf.dequantize
  monkeypatch.setattr(gguf, 'dequantize', lambda data, kind: read.append(data.shape) or dequantize(data, kind))
  file = pretrained.read(DATA / 'checkpoints' / 'llama.gguf')
  q = whole(file, 'model.layers.0.self_attn.q_proj.weight')
  down = whole(file, 'model.layers.0.mlp.down_proj.weight')
  bytes_of_rows = read[-1][1]
  experts = made_of('qwen3_moe_kv1', tmp_path)
  up = whole(experts, 'model.layers.0.mlp.experts.3.up_proj.weight')
  read.clear()
  np.testing.assert_array_equal(
      file.tensor('model.layers.0.self_attn.q_proj.weight', (slice(8, 16), slice(0, 32))), q[8:16])
  np.testing.assert_array_equal(file.tensor('model.layers.0.mlp.down_proj.weight', (slice(0, 32), slice(32, 64))),
                                down[:, 32:])
  np.testing.assert_array_equal(
      experts.tensor('model.layers.0.mlp.experts.3.up_proj.weight', (slice(2, 3), slice(0, 16))), up[2:3])
  assert [shape[0] for shape in read] == [8, 32, 1] and read[1][1] == bytes_of_rows // 2


@pytest.mark.parametrize('kind', ['Q8_0', 'BF16'])
def test_quantised_tensors_are_what_gguf_says(kind, tmp_path):
  """Of the directory's tensors quantised and dequantised by gguf's own code, interleaved rows among them."""
  file, published = made_of('qwen2_yarn', tmp_path, kind=kind), pretrained.Directory(DATA / 'families' / 'qwen2_yarn')
  kind = gguf.GGMLQuantizationType[kind]
  for name in ('model.embed_tokens.weight', 'model.layers.1.self_attn.k_proj.weight'):
    x = np.ascontiguousarray(whole(published, name).astype(np.float32))
    assert x.shape[1] % 32 == 0
    np.testing.assert_array_equal(whole(file, name), gguf.dequantize(gguf.quantize(x, kind), kind))


@pytest.mark.parametrize('fields, error', [
    ({'qwen3.block_count': 'two'}, "qwen3.block_count='two' is not a whole number of 0 or more"),
    ({'qwen3.block_count': 2_000_000_000}, 'block_count=2000000000, but the file has .* tensors'),
    ({'qwen3.block_count': None}, 'lacks the field qwen3.block_count'),
    ({'qwen3.attention.head_count': 0}, 'qwen3.attention.head_count=0 is below 1$'),
    ({'qwen3.attention.head_count': [4, 2]}, r'head_count=\[4, 2\] differs between layers'),
    ({'qwen3.attention.layer_norm_rms_epsilon': True}, 'layer_norm_rms_epsilon=True is not a number'),
    ({'qwen3.attention.value_length': 8}, 'key_length=4 and qwen3.attention.value_length=8 differ'),
    ({'qwen3.expert_count': 8, 'qwen3.attention.scale': 0.5},
     'qwen3.attention.scale=0.5 is not supported; qwen3.expert_count=8 is not supported'),
    ({'qwen3.rope.scaling.type': 'longrope', 'qwen3.rope.scaling.factor': 2.0}, "type='longrope' is not one of"),
    ({'qwen3.rope.scaling.type': 'yarn'}, 'but qwen3.rope.scaling.factor is missing'),
    ({'qwen3.rope.scaling.type': 'yarn', 'qwen3.rope.scaling.factor': 2.0}, 'lacks the field .*_context_length')])
def test_fields_that_do_not_fit(fields, error, tmp_path):
  with pytest.raises(ValueError, match=f'qwen3_kv1.gguf[: ].*{error}'):
    _ = made_of('qwen3_kv1', tmp_path, fields=fields).config


@pytest.mark.parametrize('pattern', [[True], ['local'] * 6, 0, 'every'])
def test_a_pattern_of_layers_that_does_not_fit(pattern, tmp_path):
  with pytest.raises(ValueError, match='sliding_window_pattern=.* is neither a period nor a list of'):
    _ = made_of('gemma3_wide', tmp_path, fields={'gemma3.attention.sliding_window_pattern': pattern}).config


def test_tensors_that_are_no_parameters(tmp_path):
  """They are left out; one that is not known keeps its name, by which the loader refuses it."""
  no_parameters = ('rope_freqs.weight', 'blk.0.attn_rot_embd.weight', 'v.blk.0.attn_q.weight', 'mm.0.weight')
  make_gguf.write_raw(tmp_path / 'a.gguf', 'gemma3', {}, {
      name: np.zeros((2, 4)) for name in (*no_parameters, 'token_embd.weight', 'blk.0.ssm_in.weight')})
  assert llama_cpp.Gguf(tmp_path / 'a.gguf').shapes == {
      'model.embed_tokens.weight': (2, 4), 'blk.0.ssm_in.weight': (2, 4)}


def test_files_of_text(tmp_path):
  file = pretrained.read(DATA / 'checkpoints' / 'llama.gguf')
  file.save_text(tmp_path)
  assert json.loads((tmp_path / 'tokenizer.json').read_text()) == json.loads(file.tokenizer_json)
  for name in ('tokenizer_config.json', 'generation_config.json'):
    assert json.loads((tmp_path / name).read_text()) == file.json(name)
  assert file.json('special_tokens_map.json') == {}


def test_experts_that_are_not_as_many_as_the_file_says(tmp_path):
  with pytest.raises(ValueError, match=r'expert_count=9, but blk.0.ffn_gate_exps.weight has the shape \[8, 8, 16\]'):
    _ = made_of('qwen3_moe_kv1', tmp_path, fields={'qwen3moe.expert_count': 9}).config


def test_an_architecture_that_is_not_read(tmp_path):
  make_gguf.write_raw(tmp_path / 'a.gguf', 'mamba', {}, {'t': np.zeros(4)})
  with pytest.raises(ValueError, match="general.architecture='mamba' is not one of .*'llama'"):
    llama_cpp.Gguf(tmp_path / 'a.gguf')


@pytest.mark.parametrize('kind', ['adapter', 'mmproj'])
def test_a_file_that_is_no_whole_model(kind, tmp_path):
  tensors = {'blk.0.attn_q.weight.lora_a': np.zeros((2, 4))}
  make_gguf.write_raw(tmp_path / 'a.gguf', 'llama', {'general.type': kind}, tensors)
  with pytest.raises(ValueError, match=f"a.gguf: general.type='{kind}', and only a whole model is read; give the file"):
    llama_cpp.Gguf(tmp_path / 'a.gguf')


def test_gemma_3_of_another_converter_is_refused(tmp_path):
  """It leaves out how rotations are scaled."""
  with pytest.raises(ValueError, match='lacks the field gemma3.rope.freq_base, .* that llama.cpp converted'):
    _ = made_of('gemma3_wide', tmp_path, fields={'gemma3.rope.freq_base': None}).config
