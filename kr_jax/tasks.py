"""The tasks of a split, or of a mixture of datasets, in an order fixed by (seed, step).

`batch(step)` is a pure function: an epoch is a permutation seeded by (seed, epoch) and cut into whole batches, so
that no task is twice in a step; the I % M tasks left over change with the epoch. Any step can be asked for
directly, and a resumed run sees the tasks of the uninterrupted run.

In a mixture each dataset has its own epochs. Of M tasks, dataset k has M w_k / sum w in expectation, exactly: its
count in a step is this share rounded up or down, by one draw that all datasets have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import importlib
import itertools
import logging
import os
import types as python_types

import numpy as np

from kr_jax import checks
from kr_jax import files as files_lib
from kr_jax import hub
from kr_jax import knobs
from kr_jax import modules
from kr_jax import types
from kr_jax.datasets import GENERATED
from kr_jax.datasets import names
from kr_jax.datasets.names import part  # others find it here
from kr_jax.types import PAD

BARE = '{problem}'  # a template
_MOST_CHARACTERS = 2 ** 22  # of a prompt, which no published context has room for
_LAST = 'dataset_info.json'  # that TFDS writes


def _module(dataset: str) -> python_types.ModuleType:
  """The module with the builder of a dataset. Raises ValueError for an unknown dataset, or a module without one."""
  from kr_jax.datasets import own  # slow: they load TFDS
  from kr_jax.datasets import published
  from kr_jax.datasets import sets
  if names.is_file(dataset):
    return own
  if names.is_module(dataset):
    return _loaded(dataset)
  name, _, task = dataset.partition('/')
  if name not in (*GENERATED, *sets.SETS) or bool(task) != (name == 'reasoning_gym'):
    raise ValueError(f'tasks.dataset={dataset!r} is not one of {sorted([*GENERATED, *sets.SETS])}; of '
                     "reasoning_gym name a task: 'reasoning_gym/chain_sum'; 'file:PATH' is a file of problems and "
                     "answers, 'PATH.py' a module with a Builder")
  return importlib.import_module(f'kr_jax.datasets.{name}') if name in GENERATED else published


def _loaded(path: str) -> python_types.ModuleType:
  """The module of a user with a Builder."""
  from kr_jax.datasets import builder as builder_lib
  from tensorflow_datasets.core import registered
  with registered.skip_registration():  # an edited module has a builder of the same name
    module = modules.load(path)
  found = getattr(module, 'Builder', None)
  if not (isinstance(found, type) and issubclass(found, builder_lib.TaskBuilder)):
    raise ValueError(f'tasks.dataset={path!r} has no class Builder that is a kr_jax.datasets.builder.TaskBuilder')
  return module


def verifier(dataset: str) -> str:
  """The verifier that serves the tasks of a dataset where neither they nor the config name one.

  Raises ValueError for an unknown dataset.
  """
  return getattr(_module(dataset), 'VERIFIER', 'ends_with')


def files_of(dataset: str, files: Mapping[str, str]) -> str:
  """What a published set is read from: what `files` says; else where the hub has it, if it is fetched from there
  unless a user says otherwise; '' for nothing, and for other datasets."""
  from kr_jax.datasets import sets
  if names.is_file(dataset) or dataset not in sets.SETS:
    return ''
  of_hub = sets.SETS[dataset].needs_files and hub.is_installed() and sets.SETS[dataset].hub
  return files.get(dataset, '') or (f'{hub.PREFIX}{of_hub}' if of_hub else '')


def _local(path: str, whose: str) -> str:
  """The path, or pattern, on this machine; files of the hub and of buckets are fetched."""
  from kr_jax.datasets import published
  return hub.data(path, whose, published.ENDINGS) if hub.is_name(path) else files_lib.local(path) if path else ''


def builder(dataset: str, data_dir: str, *, files: Mapping[str, str] | None = None,
            reasoning_gym: Mapping[str, int] | None = None, columns: Mapping[str, str] | None = None):
  """The TFDS builder of a dataset, whose files are written if they are not there.

  Args:
    files: by dataset, the path of the published files (the section tasks.files).
    reasoning_gym: train, test and seed of generated tasks (the section tasks.reasoning_gym).
    columns: of a file of problems and answers (the section tasks.columns).

  Raises:
    ValueError: an unknown dataset, or published files that are not named, are not there or hold a row that is
      not as published.
  """
  from kr_jax.datasets import builder as builder_lib
  from kr_jax.datasets import sets
  module = _module(dataset)
  if names.is_file(dataset):
    whose = f'tasks.dataset={names.FILE}'
    config = module.files(_local(names.path(dataset), whose), columns or {}, whose)
  elif dataset in sets.SETS:
    config = module.files(sets.SETS[dataset], _local(files_of(dataset, files or {}), f'tasks.files.{dataset}='))
  elif dataset.startswith('reasoning_gym/'):
    config = module.procedure(dataset, **(reasoning_gym or {}))
  else:
    config = builder_lib.of_code(module)
  data_dir = files_lib.expanded(data_dir)
  # Data that are read by row have to be on this machine; those of a bucket are fetched, or sent once they are made.
  here = files_lib.cache('data', files_lib.digest(data_dir)) if files_lib.is_remote(data_dir) else data_dir
  arguments = {'config': config, 'data_dir': here or None, 'file_format': 'array_record'}
  stored = module.Builder(**arguments)
  shared = '' if here == data_dir else files_lib.join(data_dir, os.path.relpath(stored.data_dir, here))
  if shared:
    files_lib.fetch_all(shared, stored.data_dir, last=_LAST)
    stored = module.Builder(**arguments)  # which looks once what is there
  logging.getLogger('absl').info('dataset %s in %s', dataset, stored.data_dir)
  if not os.path.isdir(stored.data_dir):
    _tell_others(dataset, stored)
  try:
    stored.download_and_prepare()
  except FileExistsError:  # another process has written the same files in the meantime
    stored = module.Builder(**arguments)
    stored.download_and_prepare()
  if shared and files_lib.missing(files_lib.join(shared, _LAST)):
    files_lib.send_all(stored.data_dir, shared, last=_LAST)
  return stored


def _tell_others(dataset: str, stored) -> None:
  """Says where copies are that were made of other files, other arguments or older code: nothing removes them."""
  folder, kind = os.path.dirname(os.path.dirname(stored.data_dir)), stored.builder_config.name.rpartition('-')[0]
  others = [name for name in os.listdir(folder) if name.rpartition('-')[0] == kind] if os.path.isdir(folder) else []
  if others:
    logging.getLogger('absl').info(
        'dataset %s is made anew, of other files, arguments or code than %d copies in %s, which may be removed: %s',
        dataset, len(others), folder, ', '.join(sorted(others)[:5]))


def alphabet(datasets: Sequence[str], data_dir: str = '', template: str = BARE, **made_of) -> str:
  """The characters of some datasets and of the template, for a policy from scratch.

  made_of: as for `builder`; files of problems and answers are read.

  Raises ValueError for a dataset without an alphabet.
  """
  characters = {}  # in order
  for dataset in datasets:
    module = _module(dataset)
    found = getattr(module, 'ALPHABET', None)
    if names.is_file(dataset):
      rows, fields = builder(dataset, data_dir, **made_of).as_data_source('all'), ('prompt', 'answer', 'solution')
      found = module.alphabet((row[field].decode() for row in rows for field in fields), dataset)
    if found is None:
      raise ValueError(f'dataset {dataset!r} has no alphabet, which a policy from scratch needs; train '
                       'a published checkpoint on it, which has a tokenizer')
    characters |= dict.fromkeys(found)
  check_template(template)
  return ''.join(characters | dict.fromkeys(template.format(problem='')))


def read(dataset: str, split: str, tokenizer, *, data_dir: str = '', template: str = BARE,
         **made_of) -> list[types.Task]:
  """All tasks of a split, in the order of their rows. The split 'all' is all of them together.

  Args:
    template: the prompt of a problem, for str.format: '{problem} Think first.'
    made_of: files, reasoning_gym and columns, as for `builder`.

  Raises:
    ValueError: an unknown split, an empty split, two tasks with one id, or a template without the problem; and
      where `builder` raises one.
  """
  stored = builder(dataset, data_dir, **made_of)
  name = split.partition('[')[0]
  if name not in (*stored.info.splits, 'all'):
    raise ValueError(f'dataset {dataset!r} has no split {name!r}; it has {sorted(stored.info.splits)}')
  try:
    size = stored.info.splits[split].num_examples
  except (ValueError, LookupError, AssertionError) as error:  # of TFDS
    why = f'{checks.split_problem(split) or "is no split"} ({" ".join(str(error).split())})'
    raise ValueError(f'{dataset}/{split}: {why}') from error
  if not size:  # TFDS cannot read it
    raise ValueError(f'{dataset}/{split} holds no task; name a split with at least one')
  check_template(template)
  tasks = []
  for row in stored.as_data_source(split):
    fields = {name: x.decode() if isinstance(x, bytes) else int(x) for name, x in row.items()}
    if (size := len(fields['prompt'])) > _MOST_CHARACTERS:  # it would take long to be read
      raise ValueError(f'{dataset}/{split}: the prompt of {fields["id"]!r} has {size} characters, above the limit of '
                       f'{_MOST_CHARACTERS}; leave the task out')
    fields['prompt'] = template.format(problem=fields['prompt'])
    tasks.append(types.Task(**fields, index=len(tasks), tokens=tokenizer.prompt(fields['prompt']),
                            source=names.source(dataset)))
  check(tasks, f'{dataset}/{split}')
  return tasks


def check_template(template: str) -> None:
  """Raises ValueError for a template that is no text around {problem}."""
  if problem := checks.template_problem(template):
    raise ValueError(f'tasks.template={checks.shown(template)} {problem}')


def join(parts: Sequence[Sequence[types.Task]], name: str) -> list[types.Task]:
  """The tasks of several splits as one split, with new indices. Raises ValueError for a shared id."""
  tasks = [task._replace(index=i) for i, task in enumerate(itertools.chain(*parts))]
  check(tasks, name)
  return tasks


def check(tasks: Sequence[types.Task], name: str) -> None:
  """Raises ValueError for an empty split or a repeated id."""
  if not tasks:
    raise ValueError(f'{name} holds no task; name a split with at least one')
  seen = {}
  for task in tasks:
    if task.id in seen:
      raise ValueError(f'{name}: rows {seen[task.id]} and {task.index} share the id {task.id!r}; '
                       'ids must be unique, statistics are kept by them')
    seen[task.id] = task.index


def check_prompts(tasks: Sequence[types.Task], prompt_length: int, name: str) -> None:
  """Raises ValueError for an empty prompt or one longer than P."""
  for task in tasks:
    if not 1 <= len(task.tokens) <= prompt_length:
      raise ValueError(
          f'{name}: the prompt of {task.id!r} has {len(task.tokens)} tokens, not 1..'
          f'sample.prompt_length={prompt_length}; set the knob to at least '
          f'{max(len(t.tokens) for t in tasks)}, or drop the task')


def check_mixture(mixture: Sequence[tuple[str, float]]) -> None:
  """Raises ValueError for a mixture that is not pairs (DATASET, WEIGHT) of different datasets."""
  for pair in mixture:
    if problem := checks.pair_problem(pair):
      raise ValueError(f'tasks.mixture holds {checks.shown(pair)}, {problem}')
  datasets = [part(name, '')[0] for name, _ in mixture]
  if len(set(datasets)) < len(datasets):
    raise ValueError(f'tasks.mixture={tuple(mixture)} names a dataset twice; weights are of datasets')


def considered(c: knobs.Tasks) -> int:
  """How many tasks a step considers, of which c.per_step at the most get rollouts."""
  return c.candidates_per_step or c.per_step


def batch(tasks: Sequence[types.Task], step: int, *, per_step: int, seed: int,
          weights: Mapping[str, float] | None = None) -> list[types.Task]:
  """The M = per_step tasks of a step.

  Args:
    weights: of the datasets of a mixture, above 0; None: the tasks are one dataset.

  Raises:
    ValueError: the split, or a dataset of the mixture, holds fewer tasks than a step may take of it.
  """
  if per_step > len(tasks):
    raise ValueError(f'a step of {per_step} tasks is more than the {len(tasks)} tasks of the split; lower '
                     'tasks.per_step, or tasks.candidates_per_step where it is set')
  if not weights:
    return _of_epoch(tasks, step, per_step, seed)
  count_K, most_K = _counts(step, per_step, seed, np.array(list(weights.values())))
  ordered = []  # (where in the step, task)
  for k, source in enumerate(weights):
    dataset = [task for task in tasks if task.source == source]
    if most_K[k] > len(dataset):
      raise ValueError(f'a step takes up to {most_K[k]} tasks of {source!r}, which has {len(dataset)}; lower its '
                       'weight in tasks.mixture, tasks.per_step or tasks.candidates_per_step')
    taken = _of_epoch(dataset, step, most_K[k], seed, k)[:count_K[k]]
    ordered += [((i + 0.5) / len(taken), task) for i, task in enumerate(taken)]
  # Datasets take turns: their tasks may differ in length, and neighbours share a device.
  return [task for _, task in sorted(ordered, key=lambda pair: pair[0])]


def _of_epoch(tasks, step, most, seed, k=0):
  """The `most` tasks that an epoch of dataset k of a mixture has for a step."""
  epoch, i = divmod(step, len(tasks) // most)
  order = np.random.default_rng((seed, epoch, k)).permutation(len(tasks))
  return [tasks[row] for row in order[i * most:(i + 1) * most]]


def _counts(step, per_step, seed, weight_K):
  """How many tasks of each of K datasets a step takes, and how many a step may take at the most.

  The shares of the datasets lie side by side in 0..M. Points at u, u + 1, .. with one random u, each a task, fall
  into them.
  """
  # Rounded, so that a whole share stays whole.
  end_K = np.round(per_step * np.cumsum(weight_K) / weight_K.sum(), 9)
  most_K = np.ceil(np.round(np.diff(end_K, prepend=0), 9)).astype(int)
  u = np.random.default_rng((seed, step, len(weight_K))).random()
  before_K = np.floor(end_K[:-1] + u)  # points before the end of each share but the last, which ends at M
  return np.diff(before_K, prepend=0, append=per_step).astype(int), most_K


def prompts(tasks: Sequence[types.Task], prompt_length: int) -> types.Prompts:
  """Tokens of the tasks' prompts, padded on the right to P = prompt_length."""
  token_MP = np.full((len(tasks), prompt_length), PAD, np.int32)
  for m, task in enumerate(tasks):
    token_MP[m, :len(task.tokens)] = task.tokens
  return types.Prompts(
      token_MP=token_MP,
      length_M=np.array([len(task.tokens) for task in tasks], np.int32),
      index_M=np.array([task.index for task in tasks], np.int32))
