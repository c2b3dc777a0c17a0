"""Files of problems and answers, of a user: tasks.dataset='file:PATH'.

A row is a task. Its columns are those that tasks.columns names; a column that it does not name is found by what such
columns are commonly called. A name with dots is of an object in a column: 'reward_model.ground_truth'. A row that is no
task is a ValueError with its file and number.

The splits: `test` is a tenth of the tasks, 512 at the most, those whose ids have the smallest digests; `train` is the
rest. A file of one row has no `test`. A row that is added moves few of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import json
import math
import re
from typing import Any

from etils import epath
import tensorflow_datasets as tfds

from kr_jax.datasets import builder
from kr_jax.datasets import published

VERIFIER = 'math'  # of rows that name none, unless the config says another
# What columns are commonly called, the likeliest first. A verifier or info is never guessed.
NAMES = {
    'problem': ('problem', 'question', 'prompt', 'instruction', 'query', 'input'),
    'answer': ('answer', 'final_answer', 'expected_answer', 'ground_truth', 'reward_model.ground_truth', 'target',
               'label', 'output'),
    'id': ('id', 'unique_id', 'task_id', 'problem_id', 'question_id', 'uuid'),
    'difficulty': ('difficulty', 'level'),
    'solution': ('solution', 'rationale', 'reasoning', 'explanation'),
}
# A file may name these for its rows. A function of a user is named by the config alone: a file may be anybody's.
VERIFIERS = ('choice', 'ends_with', 'math', 'python_tests', 'reasoning_gym')
MOST_TESTED = 512
MOST_CHARACTERS = 512  # different ones that a policy from scratch reads and writes


@dataclasses.dataclass(eq=False)
class Own(tfds.core.BuilderConfig):
  """Files and the names of their columns; the name differs for every other choice."""

  paths: tuple[epath.Path, ...] = ()
  columns: dict[str, str] = dataclasses.field(default_factory=dict)  # the section tasks.columns


def files(pattern: str, columns: Mapping[str, str], whose: str) -> Own:
  """The config of a builder for a path, whose last part may be a pattern ('*.jsonl').

  whose: the text with which an error begins.

  Raises ValueError where the path names no file.
  """
  paths = published.found(pattern)
  if not paths:
    raise ValueError(f'{whose}{pattern!r} names no file; give the path of a file that ends in one of '
                     f'{list(published.ENDINGS)}, or a pattern of several')
  asked = json.dumps([published.digest(paths), dict(columns), builder.code(__name__, published)], sort_keys=True)
  return Own(name=f'{label(pattern)}-{builder.digest(asked)}', paths=tuple(paths), columns=dict(columns))


def label(pattern: str) -> str:
  """What the ids of the tasks of a path begin with: 'sums' of '/data/sums.csv', 'data' of '/data/*.csv'."""
  path = epath.Path(pattern)
  for name in (path.name, path.parent.name):
    stem = next((name.removesuffix(ending) for ending in sorted(published.ENDINGS, key=len, reverse=True)
                 if name.endswith(ending)), name)
    if words := re.findall(r'[\w-]*\w', re.sub(r'\[.*?\]', '', stem)):
      return '_'.join(words)
  return 'file'


class Columns:
  """Which column of a row is what; it is settled by the first row."""

  def __init__(self, named: Mapping[str, str]):
    """named: the section tasks.columns."""
    self._named, self._found = {name: x for name, x in named.items() if name != 'after'}, None
    self._after = named.get('after', '')

  def task(self, row: published.Row) -> published.Task:
    """Raises ValueError for a row that is no task."""
    if self._found is None:
      self._found = self._of_first(row)
    found = {role: _value(row, column) for role, column in self._found.items()}
    if missing := [self._found[role] for role in ('problem', 'answer') if found.get(role) is _ABSENT]:
      raise ValueError(f'it has no {missing[0]}')
    found = {role: x for role, x in found.items() if x not in (None, '', _ABSENT)}
    text = {role: _text(x, self._found[role]) for role, x in found.items() if role not in ('problem', 'info')}
    answer, solution = text.get('answer', ''), text.get('solution', '')
    if self._after:
      solution, answer = solution or answer, self._marked(answer)
    if text.get('verifier', VERIFIERS[0]) not in VERIFIERS:
      raise ValueError(f'the verifier {text["verifier"]!r} is not one of {list(VERIFIERS)}; a function of your own is '
                       'named by rewards.verifier, for all tasks that name none')
    prompt, info = _problem(found.get('problem', ''), self._found['problem']), found.get('info', '')
    return {'prompt': prompt, 'answer': answer, 'solution': solution,
            'difficulty': _whole(text.get('difficulty', ''), self._found.get('difficulty', '')),
            'info': info if isinstance(info, str) else json.dumps(info),
            **{role: text[role] for role in ('id', 'verifier') if text.get(role)}}

  def _marked(self, text: str) -> str:
    """What stands after the mark."""
    _, mark, answer = text.rpartition(self._after)
    if not mark:
      raise ValueError(f'the answer has no {self._after!r} (tasks.columns.after): {text[-60:]!r}')
    return answer.strip()

  def _of_first(self, row: published.Row) -> dict[str, str]:
    """The columns, by what they are."""
    columns = list(map(str, row))
    found = {role: column for role, column in self._named.items() if column}
    for role, column in found.items():
      if _value(row, column) is _ABSENT:
        near = difflib.get_close_matches(column, columns, n=1)
        raise ValueError(f'tasks.columns.{role}={column!r} is no column; there are '
                         f'{list(map(published.short, columns))[:50]}'
                         f'{f"; did you mean {near[0]!r}?" if near else ""}')
    written = {column.lower(): column for column in reversed(columns)}  # as the file has it
    for role, names in NAMES.items():
      candidates = (written.get(name, name) for name in names if role not in found)
      if column := next((x for x in candidates if x not in found.values() and _fits(role, _value(row, x))), None):
        found[role] = column
    for role in ('problem', 'answer'):
      if role not in found and not (role == 'answer' and 'info' in found):
        raise ValueError(f'there is no {role}: no column is called one of {list(NAMES[role])}, there are '
                         f'{list(map(published.short, columns))[:50]}; '
                         f'name it with --config.tasks.columns.{role}=COLUMN')
    return found


_ABSENT = object()


def _value(row: published.Row, column: str) -> Any:
  """What stands in a column, or in an object in it; _ABSENT where there is no such column."""
  if column in row:
    return row[column]
  for name in column.split('.'):
    if not isinstance(row, dict) or name not in row:
      return _ABSENT
    row = row[name]
  return row


def _fits(role: str, x: Any) -> bool:
  """Whether a column that is called as it could be is taken: of what a task may lack, by what stands there."""
  if x is _ABSENT or role in ('problem', 'answer'):
    return x is not _ABSENT
  try:
    _whole(x, role) if role == 'difficulty' else _text(x, role)
  except ValueError:
    return False
  return True


def _problem(x: Any, column: str) -> str:
  """The text of a problem, which may be the one message of a chat."""
  if isinstance(x, list):
    if problem := published.misfit(x, [{'role': str, 'content': str}], column):
      raise ValueError(problem)
    if [message['role'] for message in x] != ['user']:
      raise ValueError(f'{column} has the roles {[message["role"] for message in x]}, not one user; tasks.system says '
                       'a system message')
    return x[0]['content']
  return _text(x, column)


def _text(x: Any, column: str) -> str:
  """A text or a number as a text; '' for nothing. Raises ValueError for anything else."""
  if x is None:
    return ''
  if isinstance(x, float) and x.is_integer():
    x = int(x)
  if isinstance(x, bool) or not isinstance(x, str | int | float) or isinstance(x, float) and not math.isfinite(x):
    raise ValueError(f'{column} is {published.shown(x)}, neither a text nor a number')
  return str(x).strip()


def _whole(x: Any, column: str) -> int:
  """A difficulty: a whole number, also as a text, 'Level 5'; 0 for nothing."""
  text = _text(x, column)
  found = re.fullmatch(r'(?:level\s*)?(\d{1,9})', text, re.IGNORECASE)
  if text and not found:
    raise ValueError(f'{column} is {published.shown(x)}, not a whole number')
  return int(found[1]) if found else 0


class Builder(builder.TaskBuilder):
  """Problems and answers of a file; the config is an Own."""

  name = 'own'

  def splits(self) -> dict[str, list[published.Task]]:
    c = self.builder_config
    problem_set = published.ProblemSet(
        name=c.name.rpartition('-')[0], about='', where='', schema={}, task=Columns(c.columns).task)
    places = []

    def located():
      for place, row in published.rows(c.paths):
        places.append(place)
        yield place, row

    tasks, first = published.read(problem_set, located()), {}
    for task, place in zip(tasks, places, strict=True):
      if (other := first.setdefault(' '.join(task['prompt'].split()), place)) != place:
        raise ValueError(f'{place}: its problem is that of {other}; leave one of them: one might be trained on and the '
                         'other tested')
    tested = set(sorted((task['id'] for task in tasks), key=builder.digest)[:count_tested(len(tasks))])
    by_split = {'test': [task for task in tasks if task['id'] in tested],
                'train': [task for task in tasks if task['id'] not in tested]}
    return {split: some for split, some in by_split.items() if some}  # TFDS has no empty ones


def count_tested(tasks: int) -> int:
  """How many of so many tasks are held out."""
  return min(MOST_TESTED, max(1, tasks // 10)) if tasks > 1 else 0


def alphabet(texts: Iterable[str], dataset: str) -> str:
  """The characters of texts, in order, for a policy from scratch. Raises ValueError for more than it can have."""
  found = sorted(set().union(*texts))
  if len(found) > MOST_CHARACTERS:
    raise ValueError(f'dataset {dataset!r} has {len(found)} different characters, of which a policy from scratch reads '
                     f'and writes {MOST_CHARACTERS} at the most; train a published checkpoint on it, which has a '
                     'tokenizer')
  return ''.join(found)
