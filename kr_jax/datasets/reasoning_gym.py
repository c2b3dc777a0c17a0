"""The procedural tasks of reasoning-gym, each by its name: 'reasoning_gym/chain_sum(max_terms=3, max_digits=2)'.

The splits are one sequence, first `test` tasks and then `train`: they share no seed, and more training tasks leave
the test as it is. Problems that repeat others, and those whose own answer the scorer does not accept, are left out, so
that small families of problems give fewer tasks than asked for.

`info` is JSON {"dataset": "chain_sum", "entry": {...}}: what reasoning-gym's scorer reads.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
import dataclasses
import itertools
import json
import logging
from typing import Any

import tensorflow_datasets as tfds

from kr_jax.datasets import builder

# A policy from scratch reads and writes these: printable ASCII and line breaks.
ALPHABET = '\n' + ''.join(map(chr, range(32, 127)))


@dataclasses.dataclass(eq=False)
class Procedure(tfds.core.BuilderConfig):
  """What is generated; the name differs for every other choice of the fields."""

  task: str = ''  # its name in reasoning-gym
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # of its config
  dataset: str = ''  # as the user named it
  train: int = 0  # tasks, at most
  test: int = 0
  seed: int = 0


def procedure(dataset: str, *, train: int, test: int, seed: int) -> Procedure:
  """What 'reasoning_gym/TASK(NAME=VALUE, ...)' asks for. Raises ValueError where it is broken or unknown."""
  task, arguments = _parse(dataset)
  try:
    import reasoning_gym
    from reasoning_gym import factory
  except ImportError as error:
    raise ValueError(f"dataset {dataset!r} needs a package: pip install 'kr_jax[data]'") from error
  if task not in factory.DATASETS:
    raise ValueError(f'dataset {dataset!r}: reasoning-gym has no {task!r}, only {sorted(factory.DATASETS)}')
  config = factory.DATASETS[task][1]
  known = [field.name for field in dataclasses.fields(config) if field.name not in ('seed', 'size')]
  if unknown := sorted(set(arguments) - set(known)):
    raise ValueError(f'dataset {dataset!r}: {task} takes no {unknown}; it takes {known}, and '
                     'tasks.reasoning_gym has sizes and seed')
  made_by = [reasoning_gym.__version__, builder.code(__name__)]
  asked = json.dumps([task, arguments, train, test, seed, *made_by], sort_keys=True)
  return Procedure(name=f'{task}-{builder.digest(asked)}', task=task, arguments=arguments,
                   dataset=dataset, train=train, test=test, seed=seed)


def _parse(dataset):
  try:
    call = ast.parse(dataset.partition('/')[2], mode='eval').body
    if isinstance(call, ast.Name):
      return call.id, {}
    if call.args:
      raise ValueError
    return call.func.id, {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
  except (SyntaxError, AttributeError, ValueError) as error:
    raise ValueError(
        f'dataset {dataset!r} is neither reasoning_gym/TASK nor reasoning_gym/TASK(NAME=VALUE, ...)') from error


def tagged(x: Any) -> Any:
  """x with each tuple as {'tuple': [...]}: JSON has no tuples, and some scorers compare them."""
  if isinstance(x, dict):
    return {key: tagged(value) for key, value in x.items()}
  if isinstance(x, (list, tuple)):
    values = [tagged(value) for value in x]
    return {'tuple': values} if isinstance(x, tuple) else values
  return x


def restored(info: str) -> dict[str, Any]:
  """The entry of a task, as its scorer reads it. The verifier in kr_jax/rewards does the same."""
  return json.loads(info, object_hook=lambda x: tuple(x['tuple']) if x.keys() == {'tuple'} else x)['entry']


class Builder(builder.TaskBuilder):
  """Tasks of reasoning-gym; generated. The config is a Procedure."""

  name = 'reasoning_gym'

  def splits(self) -> dict[str, list[dict[str, str]]]:
    c, entries, seen = self.builder_config, self._entries(), set()
    return {split: self._tasks(entries, split, getattr(c, split), seen) for split in ('test', 'train')}

  def _entries(self) -> Iterator[dict[str, Any]]:
    import reasoning_gym
    c = self.builder_config
    try:
      yield from reasoning_gym.create_dataset(c.task, **c.arguments, seed=c.seed, size=c.test + c.train)
    except (AssertionError, TypeError, ValueError) as error:
      raise ValueError(f'dataset {c.dataset!r}: reasoning-gym refuses its arguments: {error!r}') from error

  def _tasks(self, entries: Iterator[dict[str, Any]], split: str, size: int, seen: set[str]) -> list[dict[str, str]]:
    """The tasks of the next `size` entries; adds their questions to `seen`. Raises ValueError where none is left."""
    import reasoning_gym
    c, tasks, score, repeated, refused = self.builder_config, [], None, 0, 0
    for entry in itertools.islice(entries, size):
      # By name, as a verifier has it. Some names make a dataset only with arguments: the first entry shows it.
      score = score or reasoning_gym.get_score_answer_fn(c.task)
      info = json.dumps({'dataset': c.task, 'entry': tagged(entry)}, default=str)  # some have fractions
      if entry['question'] in seen:
        repeated += 1
      elif entry['answer'] is not None and score(entry['answer'], restored(info)) < 1 - 1e-9:
        refused += 1
      else:
        seen.add(entry['question'])
        tasks.append({
            'id': f'{c.dataset}/{builder.digest(entry["question"])}', 'prompt': entry['question'],
            'answer': entry['answer'] or '', 'verifier': 'reasoning_gym', 'info': info})
    left_out = f'{repeated} repeat others, {refused} have an answer that their scorer does not accept'
    if not tasks:
      raise ValueError(f'{c.dataset}/{split} has no task: of {size}, {left_out}; name another task')
    if len(tasks) < size:
      logging.getLogger('absl').warning('%s/%s has %d tasks: of %d, %s', c.dataset, split, len(tasks), size, left_out)
    return tasks
