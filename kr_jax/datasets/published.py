"""Published problem sets: the files that a user points to, read, checked, and stored by TFDS as tasks.

A dataset's own module says where its file is published, what fields a row must have, and what task a
row is; all else is here. Rows are numbered from 1, and one that is not as published is a ValueError with
its file and number, before anything is stored.

What is stored is found again by the digest of its files: another file gives other data, never the old.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator
import csv
import dataclasses
import hashlib
import io
import json
import logging
from typing import Any

from etils import epath
import numpy as np
import tensorflow_datasets as tfds


def features() -> tfds.features.FeaturesDict:
  """What is stored of a task: the fields of types.Task that its prompt's reader does not make."""
  return tfds.features.FeaturesDict({
      'id': tfds.features.Text(),
      'prompt': tfds.features.Text(),
      'answer': tfds.features.Text(),
      'difficulty': tfds.features.Scalar(np.int32),
      'solution': tfds.features.Text(),
      'verifier': tfds.features.Text(),
      'info': tfds.features.Text(),
  })


def digest(text: str) -> str:
  """Sixteen characters that name a text: an id for what has none of its own."""
  return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(eq=False)
class Files(tfds.core.BuilderConfig):
  """The files of a dataset; the name is their digest."""

  paths: tuple[epath.Path, ...] = ()


def rows(paths: Iterable[epath.Path]) -> Iterator[tuple[str, dict[str, Any]]]:
  """The rows of .jsonl, .parquet and .csv files, each after its file and number: '/a/b.csv, row 7'.

  Rows are numbered from 1; those of .jsonl are its lines. Raises ValueError for a file of another ending
  or without a row, and for a row that cannot be read.
  """
  readers = {'.jsonl': _json_rows, '.parquet': _parquet_rows, '.csv': _csv_rows}
  for path in paths:
    if path.suffix not in readers:
      raise ValueError(f'{path} ends in none of {sorted(readers)}; name it by its format')
    number = 0
    for number, row in readers[path.suffix](path):
      yield f'{path}, row {number}', row
    if not number:
      raise ValueError(f'{path} is empty: it has no row; download it again')


def _json_rows(path):
  with path.open('rb') as file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      try:
        row = json.loads(line.decode('utf-8-sig'))
      except UnicodeDecodeError as error:
        raise ValueError(f'{path}, row {number}: not UTF-8 ({error.reason})') from error
      except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}, row {number}: not JSON ({error})') from error
      yield number, row


def _csv_rows(path):
  data = path.read_bytes()
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    # The rows before the byte; the first of them is the header.
    number = sum(1 for _ in csv.reader(io.StringIO(data[:error.start].decode() + '.', newline=''))) - 1
    raise ValueError(f'{path}, row {number}: not UTF-8 ({error.reason})') from error
  number, reader = 0, csv.DictReader(io.StringIO(text, newline=''), strict=True)
  try:
    for number, row in enumerate(reader, start=1):
      yield number, row
  except csv.Error as error:
    raise ValueError(f'{path}, row {number + 1}: not CSV ({error})') from error


def _parquet_rows(path):
  import pyarrow  # slow to load, and other formats do without
  from pyarrow import parquet
  with path.open('rb') as file:
    try:
      batches = parquet.ParquetFile(file).iter_batches(batch_size=4096)
    except pyarrow.ArrowException as error:
      raise ValueError(f'{path} is not Parquet: {error}') from error
    number = 0
    for batch in batches:
      try:
        batch_rows = batch.to_pylist()
      except UnicodeDecodeError:  # it does not say in which row
        batch_rows = [_parquet_row(batch, i, f'{path}, row {number + 1 + i}')
                      for i in range(batch.num_rows)]
      for row in batch_rows:
        number += 1
        yield number, row


def _parquet_row(batch, i, where):
  try:
    return batch.slice(i, 1).to_pylist()[0]
  except UnicodeDecodeError as error:
    raise ValueError(f'{where}: not UTF-8 ({error.reason})') from error


def misfit(x: Any, schema: Any, name: str = '') -> str | None:
  """What keeps a value from its schema; None where nothing does.

  Args:
    schema: a type, or a union of types; {field: schema} for a dict, which may have other fields as well;
      [schema] for a list of one or more.
    name: of the value.
  """
  if isinstance(schema, dict):
    if not isinstance(x, dict):
      return f'{name or "it"} is {_short(x)}, not an object'
    for field, inner in schema.items():
      full = f'{name}.{field}' if name else field
      if field not in x:
        return f'{full} is missing; there are {sorted(map(str, x))}'
      if found := misfit(x[field], inner, full):
        return found
    return None
  if isinstance(schema, list):
    if not isinstance(x, list) or not x:
      return f'{name} is {_short(x)}, not a list of one or more'
    return next(filter(None, (misfit(y, schema[0], f'{name}[{i}]') for i, y in enumerate(x))), None)
  if not isinstance(x, schema) or isinstance(x, bool):
    return f'{name} is {_short(x)}, not {getattr(schema, "__name__", schema)}'
  return None


def _short(x):
  text = repr(x)
  return f'{text if len(text) <= 60 else text[:57] + "..."} ({type(x).__name__})'


def read(dataset: str, located: Iterable[tuple[str, dict[str, Any]]], schema: dict[str, Any],
         task: Callable[[dict[str, Any]], dict[str, Any]], *, merged: bool = False
         ) -> list[dict[str, str | int]]:
  """Rows as the tasks that are stored.

  Args:
    located: each row after where it stands, as `rows` gives them.
    schema: of a row, as for `misfit`.
    task: what is stored of a row: prompt and answer, and what differs from the defaults. A task without
      an id of its own is named by its prompt.
    merged: whether rows with one prompt, up to blanks, are one task. Those whose answers differ are left
      out, with a warning: which of them is right, nothing says.

  Raises:
    ValueError: a row that is not of the schema, has no prompt or no answer, or repeats an id.
  """
  found: dict[str, dict[str, str | int]] = {}
  stands: dict[str, str] = {}  # where each was first
  contested: dict[str, str] = {}
  for where, row in located:
    try:
      if problem := misfit(row, schema):
        raise ValueError(problem)
      new = {'difficulty': 0, 'solution': '', 'verifier': 'math', 'info': '', **task(row)}
      for name in ('prompt', 'answer'):
        new[name] = new[name].strip()
        if not new[name]:
          raise ValueError(f'the {name} is empty')
      key = new.get('id') or digest(' '.join(new['prompt'].split()))
      if key in found and not merged:
        raise ValueError(f'its id {key!r} is that of {stands[key]}; ids must be unique, statistics are '
                         'kept by them')
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from error
    old = found.setdefault(key, {**new, 'id': f'{dataset}/{key}'})
    stands.setdefault(key, where)
    if old['answer'] != new['answer']:
      contested.setdefault(key, f'{where} has {new["answer"]!r}, {stands[key]} {old["answer"]!r}')
  if contested:
    logging.getLogger('absl').warning(
        '%s: %d of %d problems have different answers in different rows and are left out: %s%s',
        dataset, len(contested), len(found), '; '.join(list(contested.values())[:5]),
        '; ...' if len(contested) > 5 else '')
  return [x for key, x in found.items() if key not in contested]


class Builder(tfds.core.GeneratorBasedBuilder):
  """A dataset of published files. Its config is Files."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'As published.'}
  PUBLISHED: str  # the file and where it is
  SCHEMA: dict[str, Any]  # of a row, as for `misfit`
  SPLIT = 'test'
  MERGED = False

  @classmethod
  def config(cls, pattern: str) -> Files:
    """The config for a path, whose last part may be a pattern ('*.jsonl').

    Raises ValueError where it is '' or names no file.
    """
    if not pattern:
      raise ValueError(f'dataset {cls.name!r} is read from {cls.PUBLISHED}; download it, and point to '
                       f'it with --config.tasks.files.{cls.name}=PATH')
    path = epath.Path(pattern).expanduser()
    paths = sorted(p for p in path.parent.glob(path.name) if p.is_file()) if path.parent.is_dir() else []
    if not paths:
      raise ValueError(f'tasks.files.{cls.name}={pattern!r} names no file; point to {cls.PUBLISHED}')
    name = hashlib.sha256()
    for path in paths:
      name.update(f'{path.name}\n'.encode())
      with path.open('rb') as file:
        name.update(hashlib.file_digest(file, 'sha256').digest())
    return Files(name=name.hexdigest()[:16], paths=tuple(paths))

  @abc.abstractmethod
  def task(self, row: dict[str, Any]) -> dict[str, Any]:
    """A row as a task, as for `read`. Raises ValueError for a row that has none."""

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(description=self.PUBLISHED, features=features())

  def rows(self) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    """The rows of each split, as for `read`."""
    return {self.SPLIT: rows(self.builder_config.paths)}

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    del dl_manager
    return {split: self._generate_examples(
        read(self.name, located, self.SCHEMA, self.task, merged=self.MERGED))
            for split, located in self.rows().items()}

  def _generate_examples(self, tasks) -> Iterator:
    for task in tasks:
      yield task['id'], task
