"""Whether what a config names is there: data files, priors, checkpoint, verifier, packages. A look, no data are read.

It is taken before anything heavy is loaded, so that all that is missing is said at once and within a second. What a
file holds is checked by whoever reads it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
import contextlib
import dataclasses
import glob
import importlib.util
import os
import re

from kr_jax import datasets
from kr_jax import files
from kr_jax import hub
from kr_jax import knobs
from kr_jax import modules
from kr_jax.datasets import names
from kr_jax.sections import nearest

FILES = tuple(field.name for field in dataclasses.fields(knobs.Files))  # the published sets
WITHOUT_FILES = ('gsm8k',)  # of them those that TFDS downloads
VERIFIERS = ('ends_with', 'math', 'choice', 'reasoning_gym', 'python_tests')
CHECKPOINTS = ('smollm2-135m-instruct',)  # that come by pip


def problems(c: knobs.Config, *, of_data: bool = True, of_checkpoint: bool = True) -> list[str]:
  """What of a config's inputs is missing, each in a line."""
  found = [*_of_data(c), *_of_data_dir(c.tasks.data_dir)] if of_data else []
  if of_checkpoint and c.policy.checkpoint:
    found += checkpoint_problems(c.policy.checkpoint, 'policy.checkpoint')
  return list(dict.fromkeys(found))


def checkpoint_problems(name: str, whose: str) -> list[str]:
  """Of a checkpoint's name; names of the hub and of pip are not looked up. whose: flag or knob."""
  if hub.is_name(name):
    return _of_hub(name, f'{whose}=')
  if files.is_remote(name) and not name.startswith('http'):
    return [f'{whose}: checkpoint {problem}'] if (problem := files.missing(name)) else []
  if name in CHECKPOINTS or name.startswith('http') or os.path.exists(os.path.expanduser(name)):
    return []
  folder = os.path.dirname(os.path.expanduser(name)) or '.'
  near = nearest(name, [*CHECKPOINTS, *glob.glob(f'{glob.escape(folder)}/*')])
  return [f'{whose}: checkpoint {name!r} is not there{near or f"; {_FORMS}"}']


_FORMS = ('give a directory with config.json and safetensors, a .gguf file, gs://BUCKET/PATH, hf:ORG/NAME[@REVISION] '
          f'or one of {CHECKPOINTS}')


def _of_hub(name: str, whose: str) -> list[str]:
  """Of a name of the hub, which is not looked up."""
  return [] if hub.is_installed() else [f"{whose}{name!r} needs huggingface_hub: pip install 'kr_jax[hub]'"]


def code(c: knobs.Config) -> dict[str, str]:
  """The digests of the files of Python that a config names, by their paths. Raises ValueError where there is none."""
  verifier = c.rewards.verifier.rpartition(':')[0]
  paths = [*filter(names.is_module, _datasets(c)), *([verifier] if modules.is_path(verifier) else ())]
  return {path: modules.digest(path) for path in dict.fromkeys(paths)}


def _datasets(c: knobs.Config) -> list[str]:
  """The datasets that are trained or tested on."""
  trained = [pair[0] for pair in c.tasks.mixture if isinstance(pair, (tuple, list)) and pair] or [c.tasks.dataset]
  return list(dict.fromkeys(names.part(x, '')[0] for x in [*trained, *c.tasks.test] if isinstance(x, str)))


def _of_data(c: knobs.Config) -> Iterator[str]:
  for dataset in _datasets(c):
    yield from _of_dataset(dataset, c)
  prior, colon, column = c.tasks.prior.rpartition(':')
  prior = prior if colon and '/' not in column else c.tasks.prior
  if prior and files.is_remote(prior) and (problem := files.missing(prior)):
    yield f'tasks.prior={c.tasks.prior!r}: {problem}'
  elif prior and not files.is_remote(prior) and not os.path.isfile(os.path.expanduser(prior)):
    yield f'tasks.prior={c.tasks.prior!r}: there is no file {prior!r}'
  yield from _of_verifier(c.rewards.verifier)


def _of_data_dir(path: str) -> Iterator[str]:
  """Of the directory of data: it is there and can be read, or it can be made."""
  whose = f'tasks.data_dir={path!r}'
  path = files.expanded(path or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')
  if files.is_remote(path):
    if files.missing(path) and (problem := files.unwritable(path)):
      yield f'{whose}: {problem}'
  elif os.path.isdir(path):
    if not os.access(path, os.R_OK | os.X_OK):
      yield f'{whose}: {path} cannot be read; name another directory'
  elif problem := _unmade(path):
    yield f'{whose}: {path} cannot be made: {problem}; name a directory that can be written'


def _unmade(path: str) -> str | None:
  """Why a directory cannot be made; None where it can: it was made, and removed."""
  missing = []
  while path and not os.path.lexists(path):
    missing.append(path)
    path = os.path.dirname(path)
  if not missing:
    return 'it is no directory'
  made = []
  try:
    for folder in reversed(missing):
      os.mkdir(folder)
      made.append(folder)
    return None
  except OSError as error:
    return error.strerror
  finally:
    for folder in reversed(made):
      with contextlib.suppress(OSError):  # another process has written there
        os.rmdir(folder)


def _of_dataset(name: str, c: knobs.Config) -> Iterator[str]:
  base, _, _ = name.partition('/')
  if names.is_file(name):
    yield from _of_files(names.path(name), f'tasks.dataset={names.FILE}', 'give the path of a file, or a pattern')
  elif names.is_module(name):
    if not os.path.isfile(modules.located(name)):
      yield f'tasks.dataset={name!r}: there is no file {modules.located(name)!r}'
  elif base not in (*datasets.GENERATED, *FILES):
    known = sorted([*datasets.GENERATED, *FILES])
    yield (f"there is no dataset {name!r}{nearest(name, known)}; there are {known}, 'file:PATH' of problems and "
           "answers, and 'PATH.py' of your own builder")
  elif base == 'reasoning_gym' and importlib.util.find_spec('reasoning_gym') is None:
    yield "tasks of reasoning_gym need a package: pip install 'kr_jax[data]'"
  elif base == 'champ' and importlib.util.find_spec('champ_dataset') is None:
    yield "tasks.dataset='champ' needs a package: pip install 'kr_jax[data]'"
  elif base in FILES:
    pattern, flag = getattr(c.tasks.files, base), f'--config.tasks.files.{base}=PATH'
    if not pattern and base not in WITHOUT_FILES and not hub.is_installed():
      yield (f"dataset {base!r} is read from published files: pip install 'kr_jax[hub]', to which the Hugging Face hub "
             f'gives them, or point to them with {flag} (kr_jax/datasets/README.md)')
    yield from _of_files(pattern, f'tasks.files.{base}=', f'point to it with {flag} (kr_jax/datasets/README.md)')


def _of_files(pattern: str, whose: str, advice: str) -> Iterator[str]:
  """Of the path of data; '' is none."""
  if hub.is_name(pattern):
    yield from _of_hub(pattern, whose)
  elif files.is_remote(pattern):
    if problem := files.missing(pattern):
      yield f'{whose.removesuffix("=")}: {problem}'
  elif pattern and not _names_a_file(pattern):
    yield f'{whose}{pattern!r} names no file; {advice}'


def _names_a_file(pattern: str) -> bool:
  """Whether there is a file; the last part of the path may be a pattern."""
  folder, name = os.path.split(os.path.expanduser(pattern))
  return any(os.path.isfile(path) for path in glob.glob(os.path.join(glob.escape(folder), name)))


def _of_verifier(name: str) -> Iterator[str]:
  if name in VERIFIERS or not name:
    return
  module, _, function = name.rpartition(':')
  if modules.is_path(module) and function.isidentifier():
    if not os.path.isfile(modules.located(module)):
      yield f'rewards.verifier={name!r}: there is no file {modules.located(module)!r}'
    elif problem := _of_function(modules.located(module), function):
      yield f'rewards.verifier={name!r}: {problem}'
    return
  if not re.fullmatch(r'\w+(?:\.\w+)*:\w+', name):
    yield (f"rewards.verifier={name!r} is not one of {sorted(VERIFIERS)}, nor 'module:function' or 'PATH.py:function'"
           f'{nearest(name, VERIFIERS)}')
    return
  if not _is_module(module):
    yield f'rewards.verifier={name!r}: there is no module {module!r} to be imported from here'


def _of_function(path: str, name: str) -> str:
  """Why a file of Python has no function of this name; '' where it may have it. The file is read, and not run."""
  try:
    with open(path, 'rb') as file:
      nodes = list(ast.walk(ast.parse(file.read())))
  except (OSError, SyntaxError, ValueError) as error:
    return f'{path!r} cannot be read: {error}'
  found = {getattr(node, 'name', None) for node in nodes} | {getattr(node, 'asname', None) for node in nodes}
  found |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
  functions = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
  return '' if found & {name, '*'} else f'{path!r} has no function {name!r}{nearest(name, functions)}'


def _is_module(name: str) -> bool:
  """Whether there is a module, 'package.inner'. It is not imported, as its code runs in worker processes alone."""
  first, *rest = name.split('.')
  try:
    spec = importlib.util.find_spec(first)
  except ValueError:  # something that was put among the modules
    return True
  folders = [] if spec is None else list(spec.submodule_search_locations or ())
  for part in rest:
    inner = [os.path.join(folder, part) for folder in folders]
    if not any(os.path.isdir(path) or glob.glob(f'{glob.escape(path)}.*') for path in inner):
      return False
    folders = inner
  return spec is not None
