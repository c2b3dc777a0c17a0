"""The tasks of a split, or of several datasets', in an order fixed by (seed, step).

`batch(step)` is a pure function: an epoch is a permutation seeded by (seed, epoch), cut into whole
batches, so that no task stands twice in a step; the I % M tasks left over change with the epoch. Any
step can be asked for directly, and a resumed run sees what the uninterrupted one would have.

In a mixture each dataset has epochs of its own. Of M tasks dataset k has M w_k / sum w in expectation,
exactly: its count in a step is that number rounded up or down, by one draw that all datasets share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import importlib
import logging
import math
import os
import re

import numpy as np

from kr_jax import types
from kr_jax.types import PAD

BARE = '{problem}'  # a template


def _module(dataset: str):
  """The module of 'NAME' or 'NAME/...'. Raises ValueError for a dataset that is none."""
  folder = os.path.join(os.path.dirname(__file__), 'datasets')
  names = sorted({f[:-3] for f in os.listdir(folder) if f.endswith('.py')} - {'__init__', 'published'})
  name, _, rest = dataset.partition('/')
  if name not in names or bool(rest) != (name == 'reasoning_gym'):
    raise ValueError(f'tasks.dataset={dataset!r} is not one of {names}; of reasoning_gym name a task: '
                     "'reasoning_gym/chain_sum'")
  return importlib.import_module(f'kr_jax.datasets.{name}')


def builder(dataset: str, data_dir: str, *, files: Mapping[str, str] | None = None,
            reasoning_gym: Mapping[str, int] | None = None):
  """The TFDS builder of kr_jax/datasets/<dataset>.py, its files written if they are not there.

  Args:
    files: by dataset, the published files of those that are read from one.
    reasoning_gym: train, test and seed of what is generated: the section of the config.

  Raises:
    ValueError: an unknown dataset, or one whose files are not named, are not there or hold a row that is
      not as published.
  """
  from kr_jax.datasets import published  # which loads TFDS
  module, config = _module(dataset), None
  if dataset.startswith('reasoning_gym/'):
    config = module.procedure(dataset, **(reasoning_gym or {}))
  elif issubclass(module.Builder, published.Builder):
    config = module.Builder.config((files or {}).get(dataset, ''))
  make = lambda: module.Builder(
      config=config, data_dir=os.path.expanduser(data_dir) if data_dir else None,
      file_format='array_record')
  made = make()
  logging.getLogger('absl').info('dataset %s in %s', dataset, made.data_dir)
  try:
    made.download_and_prepare()
  except FileExistsError:  # another process has written the same in the meantime
    made = make()
    made.download_and_prepare()
  return made


def alphabet(datasets: Sequence[str]) -> str:
  """The characters of some datasets, for a policy from scratch. Raises ValueError where one has none."""
  found = {}
  for dataset in datasets:
    module = _module(dataset)
    if not hasattr(module, 'ALPHABET'):
      raise ValueError(f'dataset {dataset!r} has no alphabet, which a policy from scratch needs; train '
                       'a published checkpoint on it, which has a tokenizer')
    found |= dict.fromkeys(module.ALPHABET)
  return ''.join(found)


def part(name: str, split: str) -> tuple[str, str]:
  """Dataset and split that 'DATASET' or 'DATASET:SPLIT' means; `split` where it names none."""
  dataset, own = re.fullmatch(r'(.*?)(?::(\w+(?:\[[^\]]*\])?))?', name, re.DOTALL).groups()
  return dataset, own or split


def read(dataset: str, split: str, tokenizer, *, data_dir: str = '', template: str = BARE,
         files: Mapping[str, str] | None = None, reasoning_gym: Mapping[str, int] | None = None
         ) -> list[types.Task]:
  """All tasks of a split, in the order of their rows.

  Args:
    template: what a prompt is of its problem, as str.format writes it: '{problem} Think first.'
    files, reasoning_gym: as for `builder`.

  Raises:
    ValueError: an unknown dataset or split, an empty split, two tasks with one id, or a template without
      the problem; and what `builder` raises.
  """
  made = builder(dataset, data_dir, files=files, reasoning_gym=reasoning_gym)
  name = split.partition('[')[0]
  if name not in made.info.splits:
    raise ValueError(f'dataset {dataset!r} has no split {name!r}; it has {sorted(made.info.splits)}')
  if not made.info.splits[split].num_examples:  # which TFDS cannot read
    raise ValueError(f'{dataset}/{split} holds no task; name a split with at least one')
  check_template(template)
  tasks = []
  for row in made.as_data_source(split):
    text = {k: v.decode() for k, v in row.items() if isinstance(v, bytes)}
    prompt = template.format(problem=text['prompt'])
    tasks.append(types.Task(
        id=text['id'], index=len(tasks), prompt=prompt, answer=text['answer'],
        difficulty=int(row['difficulty']), solution=text['solution'], tokens=tokenizer.prompt(prompt),
        source=dataset, verifier=text.get('verifier', ''), info=text.get('info', '')))
  check(tasks, f'{dataset}/{split}')
  return tasks


def check_template(template: str) -> None:
  """Raises ValueError for a template that is not a text around {problem}."""
  try:
    if template.format(problem='<one>') != template.format(problem='<two>'):
      return
    why = 'does not hold it'
  except (LookupError, ValueError, AttributeError, TypeError) as error:
    why = repr(error)
  raise ValueError(f'tasks.template={template!r} is no text around {{problem}} ({why}); other braces '
                   'are doubled: \\boxed{{}}')


def join(parts: Sequence[Sequence[types.Task]], name: str) -> list[types.Task]:
  """The tasks of several splits as one, whose rows they then are. Raises ValueError for a shared id."""
  tasks = [task._replace(index=i) for i, task in enumerate(t for some in parts for t in some)]
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
  """Raises ValueError for what is not pairs of a dataset, named once, and a weight above 0."""
  for pair in mixture:
    if (not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str)
        or not isinstance(pair[1], (int, float)) or not 0 < pair[1] < math.inf):
      raise ValueError(f'tasks.mixture holds {pair!r}, which is not (DATASET, WEIGHT) with a weight '
                       'above 0')
  names = [part(name, '')[0] for name, _ in mixture]
  if len(set(names)) < len(names):
    raise ValueError(f'tasks.mixture={tuple(mixture)} names a dataset twice; weights are of datasets')


def batch(tasks: Sequence[types.Task], step: int, *, per_step: int, seed: int,
          weights: Mapping[str, float] | None = None) -> list[types.Task]:
  """The M = per_step tasks of a step.

  Args:
    weights: of the datasets that the tasks are from, above 0; None: the tasks are not told apart.

  Raises:
    ValueError: the split, or a dataset of the mixture, holds fewer tasks than a step may take of it.
  """
  if per_step > len(tasks):
    raise ValueError(f'tasks.per_step={per_step} is more than the {len(tasks)} tasks of the split')
  parts = [[t for t in tasks if t.source == source] for source in weights] if weights else [tasks]
  weight_K = np.array(list(weights.values()) if weights else [1.0])
  # The datasets' shares lie side by side in 0..M; a task falls to the one in which a grid of spacing 1,
  # moved by u, has it. Rounding keeps whole shares whole.
  edge_K = np.round(per_step * np.cumsum(weight_K) / weight_K.sum(), 9)
  most_K = np.ceil(np.round(np.diff(edge_K, prepend=0), 9)).astype(int)
  u = np.random.default_rng((seed, step, len(parts))).random()
  count_K = np.diff(np.floor(edge_K[:-1] + u), prepend=0, append=per_step).astype(int)
  placed = []
  for k, (part_, most, count) in enumerate(zip(parts, most_K, count_K)):
    if most > len(part_):
      raise ValueError(f'a step takes up to {most} tasks of {list(weights)[k]!r}, which has '
                       f'{len(part_)}; lower its weight in tasks.mixture, or tasks.per_step')
    # A batch of an epoch has room for as many as may be taken.
    epoch, i = divmod(step, len(part_) // most)
    order = np.random.default_rng((seed, epoch, k) if k else (seed, epoch)).permutation(len(part_))
    taken = order[i * most:i * most + count]
    placed += [((j + 0.5) / count, part_[row]) for j, row in enumerate(taken)]
  # Datasets take turns, as their tasks may differ in length and neighbours share a device.
  return [task for _, task in sorted(placed, key=lambda x: x[0])]


def prompts(tasks: Sequence[types.Task], prompt_length: int) -> types.Prompts:
  """Tokens of the tasks' prompts, padded on the right to P = prompt_length."""
  token_MP = np.full((len(tasks), prompt_length), PAD, np.int32)
  for m, task in enumerate(tasks):
    token_MP[m, :len(task.tokens)] = task.tokens
  return types.Prompts(
      token_MP=token_MP,
      length_M=np.array([len(task.tokens) for task in tasks], np.int32),
      index_M=np.array([task.index for task in tasks], np.int32))
