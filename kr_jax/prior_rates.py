"""What is known of tasks before training: success rates from a file, and the tasks that share a prior.

A rate may be another model's on the task, or what the publisher of a dataset says. allocation/estimate.py counts it as
a few rollouts.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
import json
import logging
import reprlib
from typing import Any

from etils import epath
import numpy as np

from kr_jax import files
from kr_jax import types
from kr_jax.sections import nearest

_MOST_BYTES = 2 ** 28  # of an object of rates
_FORMS = "'FILE.json' of id -> rate, or 'FILE.jsonl:COLUMN' (.csv, .parquet) with a column id"


def read(spec: str, tasks: Sequence[types.Task]) -> np.ndarray:
  """The success rates that a file has for tasks.

  Args:
    spec: the knob tasks.prior: 'FILE.json', an object of id -> rate; or 'FILE.jsonl:COLUMN' (.jsonl.gz, .csv, .parquet,
      or .json that is a list), whose rows have an `id` and the column. Tasks of the file that are not of the split are
      passed over, as are those whose rate is null or empty. '': no file.
    tasks: of the training split.

  Returns:
    rate_I, float64 in [0, 1]; nan where the file has none.

  Raises:
    ValueError: the file is not there, cannot be read, has no such column, has an id twice, a rate that is no number
      in [0, 1], or no task of the split.
  """
  rate_I = np.full(len(tasks), np.nan)
  if not spec:
    return rate_I
  path, column = _parse(spec)
  rates: dict[str, float] = {}
  for place, name, value in _column_rates(path, column) if column else _object_rates(path):
    if value in (None, ''):
      continue
    if name in rates:
      raise ValueError(f'{place}: the id {name!r} is there a second time; leave one rate for each task')
    rates[name] = _rate(value, f'{place}: the rate of {name!r}')
  known = [i for i, task in enumerate(tasks) if not np.isnan(rates.get(task.id, np.nan))]
  if not known:
    example = tasks[0].id
    raise ValueError(
        f'tasks.prior={spec!r} has a rate for none of the {len(tasks)} tasks that are trained on: it has no id '
        f'{example!r}{nearest(example, rates)}; it has {len(rates)} ids, such as {reprlib.repr(list(rates)[:3])}. '
        'Name tasks as the training split does')
  rate_I[known] = [rates[tasks[i].id] for i in known]
  logging.getLogger('absl').info('tasks.prior: success rates are known of %d of %d tasks; their mean is %.3f',
                                 len(known), len(tasks), rate_I[known].mean())
  return rate_I


def strata(tasks: Sequence[types.Task], fewest: int) -> np.ndarray:
  """The tasks that share a prior: those of one dataset and difficulty; where these are fewer than `fewest`, they are
  put with all such tasks of the dataset.

  Returns:
    stratum_I, int32 from 0 on without gaps, in the order of dataset and difficulty, whatever the order of the tasks.
  """
  size = collections.Counter((task.source, task.difficulty) for task in tasks)
  # (source, False, 0) is of the dataset alone.
  label_I = [(task.source, True, task.difficulty) if size[task.source, task.difficulty] >= fewest
             else (task.source, False, 0) for task in tasks]
  number = {label: i for i, label in enumerate(sorted(set(label_I)))}
  return np.array([number[label] for label in label_I], np.int32)


def _parse(spec: str) -> tuple[epath.Path, str]:
  """The file and the column of a spec; '': the file is an object."""
  name, colon, column = spec.rpartition(':')
  if not colon or '/' in column:  # the colon of gs://
    name, column = spec, ''
  try:
    path = epath.Path(files.local(name))
  except ValueError as error:
    raise ValueError(f'tasks.prior={spec!r}: {error}') from error
  if not path.is_file():
    raise ValueError(f'tasks.prior={spec!r}: there is no file {str(path)!r}; give {_FORMS}')
  if not column and path.suffix != '.json':
    raise ValueError(f'tasks.prior={spec!r} names no column, and the file is no .json; give {_FORMS}')
  return path, column


def _object_rates(path: epath.Path) -> Iterator[tuple[str, str, Any]]:
  """Place, id and rate of each entry of an object, those of an id that is there twice as well."""
  if (size := path.stat().length) > _MOST_BYTES:
    raise ValueError(f'{path} has {size} bytes, above the limit of {_MOST_BYTES} for an object of id -> rate; give '
                     "rows, and name the column: 'FILE.jsonl:COLUMN'")
  try:
    found = json.loads(path.read_bytes().decode('utf-8-sig'), object_pairs_hook=_Pairs)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is not JSON in UTF-8: {error}') from error
  if not isinstance(found, _Pairs):
    raise ValueError(f"{path} is no object of id -> rate; of a list of rows name the column: '{path}:COLUMN'")
  return ((f'{path}, entry {number}', name, value) for number, (name, value) in enumerate(found, start=1))


class _Pairs(tuple):
  """The entries of a JSON object, repeated names too."""


def _column_rates(path: epath.Path, column: str) -> Iterator[tuple[str, str, Any]]:
  """Place, id and rate of each row."""
  from kr_jax.datasets import published  # slow: loads TFDS
  for number, (place, row) in enumerate(published.rows([path])):
    if not isinstance(row, dict):
      raise ValueError(f'{place} is {reprlib.repr(row)}, not an object with an id and {column!r}')
    for name in ('id', column) if number == 0 else ():
      if name not in row:
        raise ValueError(f'{place} has no column {name!r}{nearest(name, row)}; it has {reprlib.repr(sorted(row))}')
    if row.get('id') in (None, ''):
      raise ValueError(f'{place} has no id; each row needs the id of a task')
    if not isinstance(row['id'], (str, int, float)):
      raise ValueError(f'{place} has the id {reprlib.repr(row["id"])}, neither a text nor a number')
    yield place, str(row['id']), row.get(column)


def _rate(value: Any, what: str) -> float:
  """Raises ValueError for what is no number in [0, 1]. Of a .csv numbers are texts."""
  try:
    rate = float('nan') if isinstance(value, bool) or isinstance(value, str) and '_' in value else float(value)
  except (TypeError, ValueError, OverflowError):
    rate = float('nan')
  if not 0 <= rate <= 1:
    raise ValueError(f'{what} is {reprlib.repr(value)}, not a number in [0, 1]; give the share of rollouts that are '
                     'right, and leave the task out if it is not known')
  return rate
