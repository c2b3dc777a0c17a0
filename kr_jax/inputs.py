"""Whether what a config names is there: data files, priors, checkpoint, verifier, packages. A look, nothing is read.

It is taken before anything heavy is loaded, so that all that is missing is said at once and within a second. What a
file holds is checked by whoever reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import glob
import importlib.util
import os
import re

from kr_jax import datasets
from kr_jax import knobs
from kr_jax.sections import nearest

FILES = tuple(field.name for field in dataclasses.fields(knobs.Files))  # the published sets
WITHOUT_FILES = ('gsm8k',)  # of them those that TFDS downloads
VERIFIERS = ('ends_with', 'math', 'choice', 'reasoning_gym', 'python_tests')
CHECKPOINTS = ('smollm2-135m-instruct',)  # that come by pip


def problems(c: knobs.Config, *, of_data: bool = True, of_checkpoint: bool = True) -> list[str]:
  """What of a config's inputs is missing, each in a line."""
  found = [*_of_data(c)] if of_data else []
  if of_checkpoint and c.policy.checkpoint:
    found += checkpoint_problems(c.policy.checkpoint, 'policy.checkpoint')
  return list(dict.fromkeys(found))


def checkpoint_problems(name: str, whose: str) -> list[str]:
  """Of a checkpoint's name; names of the hub, of buckets and of pip are not looked up. whose: flag or knob."""
  if name in CHECKPOINTS or name.startswith('hf:') or '://' in name or os.path.exists(os.path.expanduser(name)):
    return []
  folder = os.path.dirname(os.path.expanduser(name)) or '.'
  near = nearest(name, [*CHECKPOINTS, *glob.glob(f'{glob.escape(folder)}/*')])
  return [f'{whose}: checkpoint {name!r} is not there{near or f"; {_FORMS}"}']


_FORMS = ('give a directory with config.json and safetensors, a .gguf file, gs://BUCKET/PATH, hf:ORG/NAME[@REVISION] '
          f'or one of {CHECKPOINTS}')


def _of_data(c: knobs.Config) -> Iterator[str]:
  names = [pair[0] for pair in c.tasks.mixture if isinstance(pair, (tuple, list)) and pair] or [c.tasks.dataset]
  for name in [*names, *c.tasks.test]:
    if isinstance(name, str):
      yield from _of_dataset(name.partition(':')[0], c)
  prior, colon, column = c.tasks.prior.rpartition(':')
  prior = prior if colon and '/' not in column else c.tasks.prior
  if prior and '://' not in prior and not os.path.isfile(os.path.expanduser(prior)):
    yield f'tasks.prior={c.tasks.prior!r}: there is no file {prior!r}'
  yield from _of_verifier(c.rewards.verifier)


def _of_dataset(name: str, c: knobs.Config) -> Iterator[str]:
  base, _, _ = name.partition('/')
  if base not in (*datasets.GENERATED, *FILES):
    known = sorted([*datasets.GENERATED, *FILES])
    yield f'there is no dataset {name!r}{nearest(name, known)}; there are {known}'
  elif base == 'reasoning_gym' and importlib.util.find_spec('reasoning_gym') is None:
    yield "tasks of reasoning_gym need a package: pip install 'kr_jax[data]'"
  elif base == 'champ' and importlib.util.find_spec('champ_dataset') is None:
    yield "tasks.dataset='champ' needs a package: pip install 'kr_jax[data]'"
  elif base in FILES:
    pattern, flag = getattr(c.tasks.files, base), f'--config.tasks.files.{base}=PATH'
    if not pattern and base not in WITHOUT_FILES:
      yield f'dataset {base!r} is read from published files; point to them with {flag} (kr_jax/datasets/README.md)'
    elif pattern and '://' not in pattern and not _names_a_file(pattern):
      yield f'tasks.files.{base}={pattern!r} names no file; point to it with {flag} (kr_jax/datasets/README.md)'


def _names_a_file(pattern: str) -> bool:
  """Whether there is a file; the last part of the path may be a pattern."""
  folder, name = os.path.split(os.path.expanduser(pattern))
  return any(os.path.isfile(path) for path in glob.glob(os.path.join(glob.escape(folder), name)))


def _of_verifier(name: str) -> Iterator[str]:
  if name in VERIFIERS:
    return
  if not re.fullmatch(r'\w+(?:\.\w+)*:\w+', name):
    yield (f"rewards.verifier={name!r} is not one of {sorted(VERIFIERS)}, nor 'module:function'"
           f'{nearest(name, VERIFIERS)}')
    return
  if not _is_module(module := name.partition(':')[0]):
    yield f'rewards.verifier={name!r}: there is no module {module!r} to be imported from here'


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
