"""The tasks of a split, in an order fixed by (seed, step).

`batch(step)` is a pure function: an epoch is a permutation seeded by (seed, epoch), cut into whole
batches, so that no task stands twice in a step; the I % M tasks left over change with the epoch. Any
step can be asked for directly, and a resumed run sees what the uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Sequence
import importlib
import logging
import os

import numpy as np

from kr_jax import types
from kr_jax.tokenizer import PAD


def builder(dataset: str, data_dir: str):
  """The TFDS builder of kr_jax/datasets/<dataset>.py, its files written if they are not there."""
  names = sorted(f[:-3] for f in os.listdir(os.path.join(os.path.dirname(__file__), 'datasets'))
                 if f.endswith('.py') and f != '__init__.py')
  if dataset not in names:
    raise ValueError(f'tasks.dataset={dataset!r} is not one of {names}')
  made = importlib.import_module(f'kr_jax.datasets.{dataset}').Builder(
      data_dir=os.path.expanduser(data_dir) if data_dir else None, file_format='array_record')
  logging.getLogger('absl').info('dataset %s in %s', dataset, made.data_dir)
  made.download_and_prepare()
  return made


def read(dataset: str, split: str, tokenizer, *, data_dir: str = '') -> list[types.Task]:
  """All tasks of a split, in the order of their rows.

  Raises:
    ValueError: an unknown dataset or split, an empty split, or two tasks with one id.
  """
  made = builder(dataset, data_dir)
  name = split.partition('[')[0]
  if name not in made.info.splits:
    raise ValueError(f'dataset {dataset!r} has no split {name!r}; it has {sorted(made.info.splits)}')
  if not made.info.splits[split].num_examples:  # which TFDS cannot read
    raise ValueError(f'{dataset}/{split} holds no task; name a split with at least one')
  tasks = []
  for row in made.as_data_source(split):
    text = {k: v.decode() for k, v in row.items() if isinstance(v, bytes)}
    tasks.append(types.Task(
        id=text['id'], index=len(tasks), prompt=text['prompt'], answer=text['answer'],
        difficulty=int(row['difficulty']), solution=text['solution'],
        tokens=tokenizer.encode(text['prompt'])))
  check(tasks, f'{dataset}/{split}')
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


def batch(tasks: Sequence[types.Task], step: int, *, per_step: int, seed: int) -> list[types.Task]:
  """The M = per_step tasks of a step. Raises ValueError if the split holds fewer than M."""
  if per_step > len(tasks):
    raise ValueError(f'tasks.per_step={per_step} is more than the {len(tasks)} tasks of the split')
  epoch, i = divmod(step, len(tasks) // per_step)
  order = np.random.default_rng((seed, epoch)).permutation(len(tasks))
  return [tasks[j] for j in order[i * per_step:(i + 1) * per_step]]


def prompts(tasks: Sequence[types.Task], prompt_length: int) -> types.Prompts:
  """Tokens of the tasks' prompts, padded on the right to P = prompt_length."""
  token_MP = np.full((len(tasks), prompt_length), PAD, np.int32)
  for m, task in enumerate(tasks):
    token_MP[m, :len(task.tokens)] = task.tokens
  return types.Prompts(
      token_MP=token_MP,
      length_M=np.array([len(task.tokens) for task in tasks], np.int32),
      index_M=np.array([task.index for task in tasks], np.int32))
