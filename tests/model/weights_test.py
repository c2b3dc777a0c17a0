"""Published checkpoints: what transformers computes with them, and back again."""

import json
import pathlib
import shutil

import jax
from jax.sharding import NamedSharding
import numpy as np
import pytest
import safetensors.numpy

from kr_jax import sample
from kr_jax import sharding
from kr_jax import types
from kr_jax.model import decode
from kr_jax.model import policy
from kr_jax.model import pretrained
from kr_jax.model import weights
from tests import knobs

ROOT = pathlib.Path(__file__).parents[1] / 'data' / 'checkpoints'  # tests/make_checkpoints.py
FAMILIES = ('gemma3', 'llama', 'llama3', 'qwen2', 'qwen3')
LENGTHS = np.array((3, 14, 25), np.int32)  # of the prompts of greedy_B64
logits = jax.jit(policy.logits, static_argnums=0)
families = pytest.mark.parametrize('name', FAMILIES)


def expected(name):
  return np.load(ROOT / name / 'expected.npz')


def copied(name, directory) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(ROOT / name, directory / name))


def changed(path, **fields) -> pathlib.Path:
  """With other fields in its config.json; None takes one out."""
  file = path / 'config.json'
  config = json.loads(file.read_text()) | fields
  file.write_text(json.dumps({name: x for name, x in config.items() if x is not None}))
  return path


def assert_same(params, others):
  jax.tree.map(np.testing.assert_array_equal, params, others)


@families
def test_logits(name):
  """Of the directory and of the GGUF file, which is another checkpoint where its matrices are quantised."""
  of_file = np.load(ROOT / f'{name}.npz')
  for source, want in ((ROOT / name, expected(name)), (ROOT / f'{name}.gguf', of_file)):
    config, params = weights.load(source)
    rows = len(want['token_BT'])
    found = logits(config, params, np.resize(want['token_BT'], (3, want['token_BT'].shape[1])))
    np.testing.assert_allclose(found[:rows], want['logits_BTV'], atol=1e-4)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow if name in ('gemma3', 'llama') else pytest.mark.exhaustive)
    for name in FAMILIES])
def test_greedy_tokens(name):
  """64 after each of three prompts of different lengths, sampled together."""
  config, params = weights.load(ROOT / name)
  want, P = expected(name), int(LENGTHS.max())
  prompts = types.Prompts(np.where(np.arange(P)[None] < LENGTHS[:, None], want['token_BT'], 0), LENGTHS,
                          np.arange(3, dtype=np.int32))
  rollouts = sample.rollouts(
      config, decode.sampling_params(config, params), prompts, np.ones(3, int), jax.random.key(0),
      knobs.sampler(slots=3, prompt_length=P, completion_length=64, temperature=0.0, stop_ids=(-1,)),
      total=3)
  np.testing.assert_array_equal(rollouts.token_RC, want['greedy_B64'])


@families
def test_what_is_saved_is_read_bit_for_bit(name, tmp_path):
  config, params = weights.load(ROOT / name)
  params = jax.tree.map(lambda x: x * 1.2345678, params)  # as many bits as training leaves
  weights.save(tmp_path, config, params, source=ROOT / name)
  found, again = weights.load(tmp_path)
  assert found == config
  assert_same(again, params)
  assert json.loads((tmp_path / 'config.json').read_text())['max_position_embeddings'] == 512
  assert (tmp_path / 'tokenizer.json').read_text() == (ROOT / name / 'tokenizer.json').read_text()


def test_what_is_saved_of_a_gguf_file_or_of_nothing(tmp_path):
  config, params = weights.load(ROOT / 'llama.gguf')
  weights.save(tmp_path / 'gguf', config, params, source=ROOT / 'llama.gguf')
  weights.save(tmp_path / 'alone', config, params, dtype='bfloat16')
  assert_same(weights.load(tmp_path / 'gguf')[1], params)
  assert {'tokenizer.json', 'tokenizer_config.json', 'generation_config.json'} <= {
      p.name for p in (tmp_path / 'gguf').iterdir()}
  config, rounded = weights.load(tmp_path / 'alone')
  assert_same(rounded, jax.tree.map(lambda x: np.asarray(x, jax.numpy.bfloat16).astype(np.float32), params))


def test_many_files(tmp_path, monkeypatch):
  config, params = weights.load(ROOT / 'llama')
  monkeypatch.setattr(weights, '_FILE_BYTES', 40_000)
  weights.save(tmp_path, config, params)
  files = sorted(p.name for p in tmp_path.glob('*.safetensors'))
  assert len(files) > 2 and files[0] == f'model-00001-of-{len(files):05d}.safetensors'
  assert_same(weights.load(tmp_path)[1], params)


def test_a_policy_from_scratch_is_one_of_a_family(tmp_path):
  """And one that has two families' parts is none's."""
  c = policy.Config(
      vocab_size=11, num_layers=2, width=8, num_heads=2, num_kv_heads=1, head_width=4, hidden_width=12,
      rope_theta=100.0, norm_eps=1e-6, qk_norm=True, qkv_bias=False, tie_embeddings=True,
      dtype='float32', remat='none', lora_rank=0, lora_alpha=16.0)
  params = policy.init(c, jax.random.key(0))
  weights.save(tmp_path, c, params)
  assert json.loads((tmp_path / 'config.json').read_text())['model_type'] == 'qwen3'
  found, again = weights.load(tmp_path)
  assert found == c
  assert_same(again, params)
  for parts in ({'qkv_bias': True}, {'post_norms': True}, {'activation': 'gelu'}):
    with pytest.raises(ValueError, match='no published family has the parts of'):
      weights.save(tmp_path / 'none', c.replace(**parts), params)
  assert not (tmp_path / 'none').exists()


def test_parameters_come_to_their_shards():
  """Of a file's bytes each device's part alone."""
  config, params = weights.load(ROOT / 'qwen2')
  mesh = sharding.mesh(data=2, fsdp=2, model=2)
  read, tensor = [], pretrained.Directory.tensor

  def counted(self, name, index):
    x = tensor(self, name, index)
    read.append((name, x.size))
    return x

  with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
    patch.setattr(pretrained.Directory, 'tensor', counted)
    found = weights.params(ROOT / 'qwen2', config)
  assert_same(found, params)
  jax.tree.map(lambda x, want: x.sharding.is_equivalent_to(want, x.ndim) or pytest.fail(str(x.sharding)),
               found, sharding.of(mesh, params))
  assert {size for name, size in read if name.endswith('q_proj.weight')} == {32 * 32 // 4}


def test_config_of_transformers_4_and_5(tmp_path):
  """Rotations of both, local layers by a pattern, and what is not said."""
  five = copied('gemma3', tmp_path)
  c = weights.config(five)
  assert (c.window, c.global_every, c.rope_theta, c.rope_scaling, c.local_rope_theta) == (
      8, 3, 1e6, (8.0,), 1e4)
  four = changed(five, rope_parameters=None, layer_types=None, rope_theta=1e6, rope_local_base_freq=1e4,
                 rope_scaling={'type': 'linear', 'factor': 8.0}, sliding_window_pattern=3)
  assert weights.config(four) == c
  llama = weights.config(copied('llama3', tmp_path))
  assert llama.rope_scaling == (8.0, 1.0, 4.0, 32.0)
  four = changed(tmp_path / 'llama3', rope_parameters=None, rope_theta=1e4, rope_scaling={
      'rope_type': 'llama3', 'factor': 8, 'low_freq_factor': 1, 'high_freq_factor': 4,
      'original_max_position_embeddings': 32}, num_key_value_heads=2, tie_word_embeddings=None)
  assert weights.config(four) == llama
  small = changed(four, num_key_value_heads=None, head_dim=None)
  assert weights.config(small).num_kv_heads == 4 and weights.config(small).head_width == 8
  assert weights.config(small, dtype='bfloat16', remat='full', lora_rank=2).lora_rank == 2


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
  path = copied('llama', tmp_path) / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  del tensors['model.norm.weight']
  tensors['model.layers.1.mlp.up_proj.weight'] = tensors['model.layers.1.mlp.up_proj.weight'][:, :-1].copy()
  tensors['model.layers.0.self_attn.q_proj.bias'] = np.zeros(32, np.float32)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']  # tied: a copy
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.zeros(4, np.float32)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError) as error:
    weights.load(path.parent)
  assert str(error.value).endswith(
      'does not hold the tensors that its config asks for: model.norm.weight is missing; '
      'model.layers.0.self_attn.q_proj.bias [32] is unknown; '
      'model.layers.1.mlp.up_proj.weight has the shape [64, 31], not [64, 32]')


@pytest.mark.parametrize('fields, named', [
    ({'model_type': 'mamba'}, "model_type 'mamba' is not one of .*'qwen3'"),
    ({'attention_bias': True, 'mlp_bias': True, 'hidden_size': None, 'vocab_size': 'many',
      'hidden_act': 'relu', 'num_hidden_layers': None},
     "vocab_size is 'many', not a number above 0; num_hidden_layers is None.*; hidden_size is None.*; "
     "attention_bias=True is not supported; mlp_bias=True.*; the activation 'relu' is not one of"),
    ({'hidden_act': 'relu', 'rope_parameters': {'rope_type': 'yarn', 'factor': 4},
      'layer_types': ['sliding_attention', 'full_attention']},
     "'relu' is not one of .*; rope scaling of the type 'yarn' .*; layers that read a window"),
    ({'rope_parameters': {'rope_type': 'llama3', 'factor': 4}}, "lacks \\['low_freq_factor', 'high"),
    ({'quantization_config': {'bits': 4}}, 'quantization_config=.* is not supported'),
    ({'layer_types': ['chunked_attention'] * 2}, 'chunked_attention')])
def test_a_config_that_is_not_supported(tmp_path, fields, named):
  path = changed(copied('llama', tmp_path), **fields)
  with pytest.raises(ValueError, match=named):
    weights.config(path)


def test_local_layers_without_a_period(tmp_path):
  kinds = ['sliding_attention', 'full_attention', 'full_attention', 'sliding_attention', 'full_attention']
  with pytest.raises(ValueError, match='has no period that ends'):
    weights.config(changed(copied('gemma3', tmp_path), layer_types=kinds))


def test_an_export_in_another_dtype(tmp_path):
  config, params = weights.load(ROOT / 'llama')
  with pytest.raises(ValueError, match="'float16'; only 'float32' and 'bfloat16'"):
    weights.save(tmp_path, config, params, dtype='float16')
