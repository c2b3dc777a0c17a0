"""What every dataset shares: the fields of a stored task, and the TFDS builder that stores them.

TFDS orders the tasks of a split by a hash of their ids, writes them once, and finds them again by the name,
the config and the version of the dataset. The name of a config ends in a digest of what the tasks are made of: files,
arguments, and the source code that reads or generates them. So edited code gives new data.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
import contextlib
import hashlib
import inspect
import sys
import types
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

# Of the fields that a task may leave out.
DEFAULTS = {'difficulty': 0, 'solution': '', 'verifier': '', 'info': ''}


def digest(text: str) -> str:
  """Sixteen characters that name a text: the id of a problem that has none."""
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def code(*modules: types.ModuleType | str) -> str:
  """Sixteen characters that name the source code of modules, and of this one."""
  found = []
  for module in (*modules, __name__):
    module = sys.modules.get(module) if isinstance(module, str) else module
    with contextlib.suppress(OSError, TypeError):  # of what was typed in
      found.append(inspect.getsource(module))
  return digest('\n'.join(found))


def of_code(module: types.ModuleType) -> tfds.core.BuilderConfig:
  """The config of a dataset that a module generates, with what it names in MADE_WITH."""
  return tfds.core.BuilderConfig(name=f'code-{code(module, *getattr(module, "MADE_WITH", ()))}')


class TaskBuilder(tfds.core.GeneratorBasedBuilder):
  """TFDS builder of a dataset. A subclass has a `name`, a docstring and `splits`."""

  VERSION = tfds.core.Version('1.0.0')

  @abc.abstractmethod
  def splits(self) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """The tasks of each split: 'id', 'prompt', 'answer', and of DEFAULTS the fields that differ."""

  def _create_builder_config(self, builder_config, *_, **__):
    return builder_config  # TFDS warns of each that is no constant of the class

  def _info(self) -> tfds.core.DatasetInfo:
    # Not dataset_info_from_configs: it takes the folder's README.md for the description of each dataset.
    features = {name: tfds.features.Text() for name in ('id', 'prompt', 'answer', *DEFAULTS)}
    features['difficulty'] = tfds.features.Scalar(np.int32)
    return tfds.core.DatasetInfo(
        builder=self, description=self.__doc__, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    del dl_manager  # TFDS downloads nothing
    return {split: self._generate_examples(tasks) for split, tasks in self.splits().items()}

  def _generate_examples(self, tasks) -> Iterator:
    for task in tasks:
      yield task['id'], DEFAULTS | task
