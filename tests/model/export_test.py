"""Exports: what is written is read bit for bit, in the form that others read, and nothing else is touched."""

import glob
import json
import os
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from kr_jax import sharding
from kr_jax.model import export
from kr_jax.model import policy
from kr_jax.model import tokenizer
from kr_jax.model import weights

ROOT = pathlib.Path(__file__).parents[1] / 'data' / 'checkpoints'  # tests/make_checkpoints.py
families = pytest.mark.parametrize('name', ['gemma3', 'qwen2', *(
    pytest.param(name, marks=pytest.mark.slow) for name in ('llama', 'llama3', 'qwen3'))])
C = policy.Config(vocab_size=11, num_layers=2, width=8, num_heads=2, num_kv_heads=1, head_width=4, hidden_width=12)


@pytest.fixture(scope='module')
def params():
  return policy.init(C, jax.random.key(0))


def assert_same(params, others):
  jax.tree.map(np.testing.assert_array_equal, params, others)


def held(directory) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in directory.iterdir()}


def of_json(directory, name='config.json'):
  return json.loads((directory / name).read_text())


def tensors(directory) -> dict[str, np.ndarray]:
  """As vLLM finds them: in all *.safetensors, but where there is an index in the files that it names."""
  files = glob.glob(str(directory / '*.safetensors'))
  index = directory / 'model.safetensors.index.json'
  if index.exists():
    of_index = json.loads(index.read_text())['weight_map']
    files = [file for file in files if os.path.basename(file) in of_index.values()]
    for file in files:
      with safetensors.safe_open(file, 'numpy') as opened:
        assert {of_index[name] for name in opened.keys()} == {os.path.basename(file)}
  assert files
  found = [safetensors.numpy.load_file(file) for file in files]
  assert sum(map(len, found)) == len({name for x in found for name in x})  # none is there twice
  return {name: tensor for x in found for name, tensor in x.items()}


@families
def test_what_is_saved_is_read_bit_for_bit(name, tmp_path):
  config, params = weights.load(ROOT / name)
  params = jax.tree.map(lambda x: x * 1.2345678, params)  # as many bits as training leaves
  export.save(tmp_path, config, params, source=ROOT / name, dtype='float32')
  found, again = weights.load(tmp_path)
  assert found == config
  assert_same(again, params)
  published = of_json(tmp_path)
  assert published['max_position_embeddings'] == 512 and published['dtype'] == published['torch_dtype'] == 'float32'
  ids = {field: x for field, x in of_json(ROOT / name).items() if field.endswith('token_id') and x is not None}
  assert ids.items() <= published.items()
  assert (tmp_path / 'tokenizer.json').read_text() == (ROOT / name / 'tokenizer.json').read_text()


def test_what_others_read(tmp_path, params, monkeypatch):
  """The form that transformers and vLLM look for; each file begins where the last one is full."""
  monkeypatch.setattr(export, '_FILE_BYTES', 1000)
  export.save(tmp_path, C, params)
  found = tensors(tmp_path)
  assert 'lm_head.weight' not in found  # as embeddings are tied
  assert found['model.layers.1.self_attn.q_proj.weight'].shape == (8, 8)
  files = sorted(p.name for p in tmp_path.glob('*.safetensors'))
  assert files == [f'model-{i + 1:05d}-of-{len(files):05d}.safetensors' for i in range(len(files))] and len(files) > 2
  index = of_json(tmp_path, 'model.safetensors.index.json')
  assert index['metadata']['total_size'] == sum(x.nbytes for x in found.values())
  with safetensors.safe_open(tmp_path / files[0], 'numpy') as file:
    assert file.metadata() == {'format': 'pt'}
  assert of_json(tmp_path)['architectures'] == ['Qwen3ForCausalLM']
  modes = {oct(p.stat().st_mode) for p in tmp_path.iterdir()}
  assert len(modes) == 1  # whoever may read the config may read the tensors
  assert_same(weights.load(tmp_path)[1], params)


def test_an_older_export_is_replaced(tmp_path, params, monkeypatch):
  """By fewer files and by more; what others put there stays."""
  directory = tmp_path / 'out'
  changed = jax.tree.map(lambda x: x + 1, params)
  for file_bytes, count in ((1000, None), (10 ** 9, 1), (2000, None)):
    monkeypatch.setattr(export, '_FILE_BYTES', file_bytes)
    params, changed = changed, params
    export.save(directory, C, params, tokenizer=tokenizer.Characters('012345678') if count else None)
    assert_same(weights.load(directory)[1], params)
    tensors(directory)
    files = sorted(p.name for p in directory.glob('*.safetensors'))
    assert (files == ['model.safetensors']) == (count == 1)
    assert ('tokenizer.json' in held(directory)) == (count == 1)
    (directory / 'README.md').write_text('mine')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out']
  assert held(directory)['README.md'] == b'mine'
  for broken in ('', '[]', '{"files": 3}', '{"files": [3]}'):
    (directory / 'kr_jax_export.json').write_text(broken)
    before = held(directory)
    with pytest.raises(ValueError, match='kr_jax_export.json is not the list of files that an export wrote; name'):
      export.save(directory, C, params)
    assert held(directory) == before


def test_what_must_not_be_overwritten(tmp_path):
  source = pathlib.Path(shutil.copytree(ROOT / 'llama', tmp_path / 'source'))
  (tmp_path / 'link').symlink_to(source)
  (tmp_path / 'notes').mkdir()
  (tmp_path / 'notes' / 'a.txt').write_text('mine')
  before = held(source)
  config, params = weights.load(source)
  save = lambda directory, **options: export.save(directory, config, params, **options)
  for directory in (source, tmp_path / 'link', f'{tmp_path}/notes/../source/'):
    with pytest.raises(ValueError, match='would replace its own source'):
      save(directory, source=source)
  with pytest.raises(ValueError, match='would replace its own source'):
    save(source, source=tmp_path / 'link')
  with pytest.raises(ValueError, match=r"notes holds \['a.txt'\], which no export wrote"):
    save(tmp_path / 'notes', source=source)
  with pytest.raises(ValueError, match='which no export wrote'):  # a checkpoint that somebody downloaded
    save(source)
  with pytest.raises(ValueError, match='is a file; name a directory'):
    save(source / 'config.json')
  with pytest.raises(ValueError, match="'gs://bucket/out' is not a directory of this machine"):
    save('gs://bucket/out')
  with pytest.raises(ValueError, match='x/out cannot be written: .*a directory that can be, on a disk with room'):
    save('/proc/x/out')
  assert held(source) == before
  assert sorted(p.name for p in tmp_path.iterdir()) == ['link', 'notes', 'source']


def test_an_export_that_is_killed_is_no_checkpoint(tmp_path, params, monkeypatch):
  """While it is written the older one stands; after that, config.json comes last; and the next one goes on."""
  directory = tmp_path / 'out'
  export.save(directory, C, params)
  before = held(directory)

  def killed(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(safetensors.numpy, 'save_file', killed)
    export.save(directory, C, params)
  assert held(directory) == before
  replace = pathlib.Path.replace
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(pathlib.Path, 'replace',
                  lambda self, to: killed() if self.suffix == '.safetensors' else replace(self, to))
    export.save(directory, C, params)
  with pytest.raises(ValueError, match='it has no config.json'):
    weights.load(directory)
  export.save(directory, C, params)
  assert_same(weights.load(directory)[1], params)
  # Of a process that was ended at once, what it was writing is left beside.
  (tmp_path / '.out.partial').mkdir()
  (tmp_path / '.out.partial' / 'stray.safetensors').write_text('')
  export.save(directory, C, params)
  assert held(directory).keys() == before.keys() and not (tmp_path / '.out.partial').exists()


def test_the_dtype_of_the_source_is_kept(tmp_path):
  config, params = weights.load(ROOT / 'qwen2')  # torch_dtype is bfloat16
  export.save(tmp_path / 'kept', config, params, source=ROOT / 'qwen2')
  assert {x.dtype for x in tensors(tmp_path / 'kept').values()} == {np.dtype(ml_dtypes.bfloat16)}
  assert of_json(tmp_path / 'kept')['dtype'] == of_json(tmp_path / 'kept')['torch_dtype'] == 'bfloat16'
  # Its config need not say it.
  source = pathlib.Path(shutil.copytree(ROOT / 'qwen2', tmp_path / 'source'))
  for said in (None, 'auto', ['bfloat16']):
    (source / 'config.json').write_text(json.dumps(of_json(source) | {'torch_dtype': said, 'dtype': None}))
    export.save(tmp_path / 'again', config, params, source=source)
    assert of_json(tmp_path / 'again')['dtype'] == of_json(tmp_path / 'again')['torch_dtype'] == 'bfloat16'
  rounded = jax.tree.map(lambda x: np.asarray(x, ml_dtypes.bfloat16).astype(np.float32), params)
  assert_same(weights.load(tmp_path / 'kept')[1], rounded)
  export.save(tmp_path / 'half', config, params, source=ROOT / 'qwen2', dtype='float16')
  assert {x.dtype for x in tensors(tmp_path / 'half').values()} == {np.dtype(np.float16)}
  with pytest.raises(ValueError, match=r"'float64', which is not one of \['bfloat16', 'float16', 'float32'\]"):
    export.save(tmp_path / 'none', config, params, dtype='float64')
  large = params | {'embed_VD': params['embed_VD'].at[3, 4].set(-1e5)}
  with pytest.raises(ValueError, match='model.embed_tokens.weight holds 100000, beyond the largest number of float16'):
    export.save(tmp_path / 'none', config, large, dtype='float16')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['again', 'half', 'kept', 'source']


def test_what_is_saved_of_a_gguf_file(tmp_path):
  config, params = weights.load(ROOT / 'llama.gguf')
  export.save(tmp_path, config, params, source=ROOT / 'llama.gguf')
  found, again = weights.load(tmp_path)
  assert found == config
  assert_same(again, params)
  assert {'tokenizer.json', 'tokenizer_config.json', 'generation_config.json'} <= held(tmp_path).keys()


def test_a_policy_from_scratch(tmp_path, params):
  """With its characters, and without ids of tokens that its family usually has."""
  export.save(tmp_path, C, params, tokenizer=tokenizer.Characters('0123=+-9a'.replace('9', '')))
  published = of_json(tmp_path)
  assert published['model_type'] == 'qwen3' and published['dtype'] == 'float32'
  assert all(published[f'{name}_token_id'] is None for name in ('bos', 'eos', 'pad'))
  config, again = weights.load(tmp_path)
  assert config.replace(family='', context=0) == C
  assert_same(again, params)
  assert tokenizer.Subwords(tmp_path, chat=False).encode('1+2') == tokenizer.Characters('0123=+-a').encode('1+2')


def test_a_policy_of_no_family_or_with_adapters(tmp_path, params):
  with pytest.raises(ValueError, match='no published family has the parts of'):
    export.save(tmp_path / 'none', C.replace(qkv_bias=True), params)
  with pytest.raises(ValueError, match='adapters of rank 2 is no published model; export policy.merge'):
    export.save(tmp_path / 'none', C.replace(lora_rank=2), params)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_fused_matrices_experts_and_a_text_tower(tmp_path):
  """As their families are published."""
  phi = C.replace(family='phi3', qk_norm=False, tie_embeddings=False)
  params = policy.init(phi, jax.random.key(1))
  export.save(tmp_path / 'phi', phi, params)
  found = tensors(tmp_path / 'phi')
  assert found['model.layers.0.self_attn.qkv_proj.weight'].shape == (16, 8)
  np.testing.assert_array_equal(found['model.layers.1.mlp.gate_up_proj.weight'][12:], params['layers']['up_DF'][1].T)
  assert_same(weights.load(tmp_path / 'phi')[1], params)
  moe = C.replace(family='qwen3_moe', num_experts=3, experts_per_token=2)
  params = policy.init(moe, jax.random.key(2))
  export.save(tmp_path / 'moe', moe, params)
  found = tensors(tmp_path / 'moe')
  np.testing.assert_array_equal(
      found['model.layers.1.mlp.experts.2.down_proj.weight'], params['layers']['down_EFD'][1, 2].T)
  assert found['model.layers.0.mlp.gate.weight'].shape == (3, 8)
  assert_same(weights.load(tmp_path / 'moe')[1], params)
  source = pathlib.Path(shutil.copytree(ROOT / 'gemma3', tmp_path / 'multimodal'))
  text = of_json(source)
  (source / 'config.json').write_text(json.dumps({
      'model_type': 'gemma3', 'text_config': text, 'vision_config': {}, 'eos_token_id': [1, 3], 'dtype': 'bfloat16',
      'image_token_index': 7}))
  config, params = weights.load(source)
  export.save(tmp_path / 'text', config, params, source=source)
  published = of_json(tmp_path / 'text')
  assert published['architectures'] == ['Gemma3ForCausalLM'] and published['dtype'] == 'bfloat16'
  assert not {'text_config', 'vision_config', 'image_token_index'} & published.keys()
  assert weights.config(tmp_path / 'text') == config


@pytest.mark.slow
def test_parameters_on_a_mesh(tmp_path, params):
  mesh = sharding.mesh(fsdp=8)
  with jax.set_mesh(mesh):
    spread = jax.device_put(params, sharding.of(mesh, params))
  export.save(tmp_path, C, spread)
  assert_same(weights.load(tmp_path)[1], params)
