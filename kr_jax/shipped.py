"""The configs that come with the project: where they are, and how a config is read.

In a checkout they are in configs/, beside the package. A wheel holds them in kr_jax/wheel/configs (setup.cfg): a
package of its own called `configs` would stand in the way of other projects' configs. Config files import one another
as `configs`, in both cases (`importable`).

Imports nothing heavy: the command line reads configs before anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import glob
import importlib.util
import os
import sys
import types
from typing import Any

import ml_collections

from kr_jax.sections import nearest

PREFIX = 'kr_jax:'  # of a shipped config's name, where a file may stand too
_PARTS = ('common', 'hardware', 'presets')  # no runs by themselves
_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_IN_WHEEL = os.path.join(_PACKAGE, 'wheel')
_PARENT = _IN_WHEEL if os.path.isdir(_IN_WHEEL) else os.path.dirname(_PACKAGE)
FOLDER = os.path.join(_PARENT, 'configs')
_ENTRY = os.path.join(_PARENT, '')  # of sys.path, where the same folder may stand too, without the slash


def names() -> list[str]:
  """The configs of runs: 'arithmetic', ..."""
  files = (os.path.basename(path).removesuffix('.py') for path in glob.glob(os.path.join(glob.escape(FOLDER), '*.py')))
  return sorted(name for name in files if name not in _PARTS and not name.startswith('_'))


def located(text: str) -> str:
  """A config as --config takes it, 'kr_jax:NAME[:VARIANT]', with the file in place of the name: 'FILE.py[:VARIANT]'.

  What names a file already stays as it is. Raises ValueError for a name that there is not.
  """
  if not text.startswith(PREFIX):
    return os.path.expanduser(text)
  name, colon, variant = text.removeprefix(PREFIX).partition(':')
  path = os.path.join(FOLDER, f'{name}.py')
  if os.path.basename(name) != name or not os.path.isfile(path):
    known = names()
    near = nearest(name, known) or f'; there are {", ".join(known)}'
    raise ValueError(f'there is no config {name!r} in kr_jax{near}')
  return f'{path}{colon}{variant}'


@contextlib.contextmanager
def importable(path: str) -> Iterator[None]:
  """While in it a config file may say `from configs import common`.

  A shipped file finds the shipped ones; any other file those that it would find by itself, and then the shipped ones.
  What was imported as `configs` before is so again afterwards.
  """
  is_shipped = os.path.dirname(os.path.realpath(path)) == os.path.realpath(FOLDER)
  before = {name: module for name, module in sys.modules.items() if _is_of_configs(name)}
  if is_shipped:
    for name in before:
      del sys.modules[name]
    sys.modules['configs'] = package = types.ModuleType('configs')
    package.__path__ = [FOLDER]
  else:
    sys.path.append(_ENTRY)
  try:
    yield
  finally:
    if not is_shipped:
      sys.path.remove(_ENTRY)
    for name in [*filter(_is_of_configs, sys.modules)]:
      del sys.modules[name]
    sys.modules.update(before)


def _is_of_configs(module: str) -> bool:
  return module.partition('.')[0] == 'configs'


def config(name: str) -> Any:
  """A config to change and to run: an ml_collections.ConfigDict, which takes any value.

  Knobs are checked, all at once, where the config is used.

  Args:
    name: of a shipped config, 'arithmetic' or 'arithmetic:debug'; or a file, 'FILE.py:VARIANT'.

  Raises:
    ValueError: there is no such config or file, or it makes none.
  """
  head = name.partition(':')[0]
  is_file = head.endswith('.py') or os.sep in head
  path, colon, variant = located(name if is_file or name.startswith(PREFIX) else PREFIX + name).partition(':')
  path = os.path.expanduser(path)
  if not os.path.isfile(path):
    raise ValueError(f'there is no file {path!r}; shipped configs are {", ".join(names())}')
  with importable(path):
    made = load(path).get_config(*[variant] * bool(colon))
  if not isinstance(made, ml_collections.ConfigDict):
    raise ValueError(f'get_config of {path} returned {type(made).__name__}; it must return a ConfigDict')
  return ml_collections.ConfigDict(made.to_dict(), type_safe=False)


def load(path: str) -> Any:
  """The module of a config file, which is not kept among the modules."""
  spec = importlib.util.spec_from_file_location(os.path.basename(path).removesuffix('.py'), path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
