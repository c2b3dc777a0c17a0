"""Files of the Hugging Face hub: what names mean, which commit they stand for, and what is fetched.

    hf:ORG/NAME[/PATH][@REVISION]

PATH is a file, or a pattern of files. `pin` puts the commit in the place of the revision, so that what was read once
can be read again. Files stay in the hub's own cache. Its locks see to it that processes that share the cache fetch a
file once. Every function takes `whose`, the text with which its errors begin: 'tasks.files.gsm8k='.

Imports huggingface_hub, which is optional, when something is fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import sys
from typing import Any, NamedTuple

PREFIX = 'hf:'
MODEL, DATASET = 'model', 'dataset'  # kinds of repositories
FORM = 'hf:ORG/NAME[/PATH][@REVISION]'
_NAME = re.compile(r'hf:([^/@\s]+/[^/@\s]+)(?:/([^@]+))?(?:@(\S+))?')
_COMMIT = re.compile('[0-9a-f]{40}')
_EVERYWHERE = ('.gitattributes',)  # what every repository has


class Name(NamedTuple):
  """The parts of a name."""

  repository: str
  path: str | None
  revision: str | None


def is_name(name: str | os.PathLike | None) -> bool:
  return isinstance(name, str) and name.startswith(PREFIX)


def is_installed() -> bool:
  """Whether the client of the hub is there."""
  return importlib.util.find_spec('huggingface_hub') is not None


def parse(name: str, whose: str, form: str = FORM) -> Name:
  """Raises ValueError for a name that is not of the form."""
  parts = _NAME.fullmatch(name)
  if not parts:
    raise ValueError(f'{whose}{name!r} is not of the form {form}')
  return Name(*parts.groups())


def unpinned(name: str) -> str:
  """The name without its revision."""
  return name.partition('@')[0]


def pin(name: str, kind: str, whose: str, patterns: Sequence[str] = _EVERYWHERE) -> str:
  """The name with the commit as its revision; says so on stderr where the name had another revision or none.

  patterns: of files that are fetched on the way.

  Raises ValueError where the hub does not give them.
  """
  if _COMMIT.fullmatch(parse(name, whose).revision or ''):
    return name
  pinned = f'{unpinned(name)}@{snapshot(name, kind, whose, patterns).name}'
  print(f'{name} is {pinned}', file=sys.stderr)
  return pinned


def pinned_as(name: str, began: Any, kind: str, whose: str, patterns: Sequence[str] = _EVERYWHERE) -> str:
  """The name as `pin` gives it; or `began`, where that is this name with a commit, and this one says no revision.

  began: what a run recorded that is gone on with.
  """
  if is_name(began) and '@' not in name and unpinned(began) == name:
    return began
  return pin(name, kind, whose, patterns)


def snapshot(name: str, kind: str, whose: str, patterns: Sequence[str], ignore: Sequence[str] | None = None
             ) -> pathlib.Path:
  """The folder of a commit in the hub's cache, with the files of these patterns; it is named by the commit.

  Raises ValueError where the hub does not give them.
  """
  repository, _, revision = parse(name, whose)
  with _explained(name, whose, kind) as client:
    return pathlib.Path(client.snapshot_download(
        repository, repo_type=kind, revision=revision, allow_patterns=list(patterns),
        ignore_patterns=None if ignore is None else list(ignore)))


def names(name: str, kind: str, whose: str) -> tuple[str, ...]:
  """The files of a repository; where the hub cannot be reached, those of them that are in the cache.

  Raises ValueError where the hub refuses to say it.
  """
  is_pinned = _COMMIT.fullmatch(parse(name, whose).revision or '')
  try:
    return (_names if is_pinned else _names.__wrapped__)(name, kind, whose)
  except ConnectionError:
    folder = snapshot(name, kind, whose, _EVERYWHERE)
    return tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()))


@functools.cache  # the files of a commit do not change
def _names(name: str, kind: str, whose: str) -> tuple[str, ...]:
  repository, _, revision = parse(name, whose)
  with _explained(name, whose, kind, ConnectionError) as client:
    found = client.HfApi().repo_info(repository, revision=revision or 'main', repo_type=kind, timeout=30)
  return tuple(sorted(file.rfilename for file in found.siblings))


def data(name: str, whose: str, endings: Sequence[str]) -> str:
  """The path, on this machine, of a data set's files: a pattern where the name has one. They are fetched.

  A name without a path means the one file of the repository that has one of these endings.

  Raises ValueError where the hub does not give them, or the path names no file of the repository.
  """
  path = parse(name, whose).path
  if path is None:
    files = [file for file in names(name, DATASET, whose) if file.endswith(tuple(endings))]
    if len(files) != 1:
      shown = f'{files[:12]}{"..." if files[12:] else ""}' if files else f'none that ends in one of {list(endings)}'
      raise ValueError(f'{whose}{name!r} says no file, and the repository has {shown}; name a file or a pattern, as in '
                       f'{FORM}')
    path, = files
  folder = snapshot(name, DATASET, whose, [path])
  if not any(found.is_file() for found in folder.glob(path)):
    near = [file for file in names(name, DATASET, whose) if file.endswith(tuple(endings))]
    raise ValueError(f'{whose}{name!r}: the repository has no file {path!r}; it has {near[:12]}')
  return str(folder / path)


@functools.cache
def header(pinned: str, file: str, whose: str) -> dict[str, tuple[str, tuple[int, ...]]]:
  """dtype and shape of each tensor of a file of safetensors, of which no more than its head is fetched.

  Raises ValueError where the hub does not give it, or it is no such file.
  """
  repository, _, revision = parse(pinned, whose)
  with _explained(pinned, whose, MODEL) as client:
    found = client.HfApi().parse_safetensors_file_metadata(repository, file, revision=revision)
  return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.tensors.items()}


@contextlib.contextmanager
def _explained(name: str, whose: str, kind: str, unreachable: type[Exception] = ValueError) -> Iterator[Any]:
  """Yields the client of the hub; its errors become ValueErrors that say what to do, or `unreachable` where the hub
  cannot be reached."""
  try:
    import huggingface_hub  # optional
    from huggingface_hub import errors
    from huggingface_hub import utils
  except ImportError as error:
    raise ValueError(f"{whose}{name!r} needs huggingface_hub: pip install 'kr_jax[hub]'") from error
  repository, _, revision = parse(name, whose)
  if not sys.stderr.isatty():
    utils.disable_progress_bars()  # of which a log would have hundreds of lines
  try:
    yield huggingface_hub
  except Exception as error:  # of the hub, of the network, of which there are many kinds, and of the disk
    token, raised = 'set HF_TOKEN to a token of https://huggingface.co/settings/tokens', ValueError
    url = f'https://huggingface.co/{"" if kind == MODEL else "datasets/"}{repository}'
    if isinstance(error, errors.GatedRepoError):
      why = f'is gated: ask for access at {url} and {token}'
    elif isinstance(error, errors.RepositoryNotFoundError):
      why = f'is not on the hub, or private: correct the name, or {token}'
    elif isinstance(error, errors.RevisionNotFoundError):
      why = f'has no revision {revision or "main"!r}; name a branch, a tag or a commit'
    elif isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)) or _is_of_network(error):
      why, raised = ('is not in the cache and the hub cannot be reached '
                     f'({str(error.__cause__ or error).splitlines()[0]}): connect, unset HF_HUB_OFFLINE, or fetch it '
                     'elsewhere and give its path'), unreachable
    else:
      why = f'cannot be fetched from the hub: {error}'
    raise raised(f'{whose}{name!r}: {repository} {why}') from error


def _is_of_network(error: Exception) -> bool:
  """By name: versions of huggingface_hub are made of httpx or of httpx2."""
  return any(kind.__name__ == 'TransportError' for kind in type(error).__mro__)
