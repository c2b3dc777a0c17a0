"""Published problem sets: files that a user downloads and points to, read, checked, and stored as tasks.

A `ProblemSet` says where its files are published, which fields a row has, and which task a row is; sets.py lists
them. A row that is not as published is a ValueError with its file and number.

Problems of mathematics name no verifier: the config's serves, and is `math` unless a user sets it. What no other
verifier can judge names its own: a choice of letters, programs.
"""

from __future__ import annotations

import codecs
import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import logging
import re
from typing import IO, Any
import zlib

from etils import epath
import tensorflow_datasets as tfds

from kr_jax.datasets import builder
from kr_jax.datasets import parquet_file

Row = dict[str, Any]
Task = dict[str, Any]  # as of builder.TaskBuilder.splits
LocatedRows = Iterable[tuple[str, Row]]  # each row after its place: '/a/b.csv, row 7'

VERIFIER = 'math'  # of tasks that name none, unless the config says another
# Of the files that are read.
# Of files of rows: bytes of a row, of a file that is read at once (.json, .csv), and of an unpacked one, where it is
# more than so many times what is packed.
_MOST_ROW, _MOST_AT_ONCE, _MOST_UNPACKED, _MOST_RATIO = 2 ** 28, 2 ** 30, 2 ** 31, 100
ENDINGS = ('.csv', '.csv.gz', '.json', '.json.gz', '.jsonl', '.jsonl.gz', '.parquet')


@dataclasses.dataclass(frozen=True)
class ProblemSet:
  """A problem set that is published as files."""

  name: str
  about: str
  where: str  # the files, and where they are published
  schema: dict[str, Any]  # of a row, as for `misfit`
  task: Callable[[Row], Task]  # raises ValueError for a row that is no task
  source: str = ''  # the paper
  split: str = 'test'  # of all rows
  merged: bool = False  # as for `read`
  # Of a set with several splits: (files, data_dir) -> the rows of each split.
  rows_by_split: Callable[[Sequence[epath.Path], str], Mapping[str, LocatedRows]] | None = None
  hub: str = ''  # where the Hugging Face hub has the files: 'ORG/NAME/PATH', or a pattern
  needs_files: bool = True  # else its rows_by_split does without files as well
  version: str = '1.0.0'


def rows(paths: Iterable[epath.Path]) -> Iterator[tuple[str, dict[str, Any]]]:
  """The rows of files of these formats, each after its file and number: '/a/b.csv, row 7'.

  The formats are those of ENDINGS; a .json holds a list. Rows are numbered from 1; those of .jsonl are its lines.
  Raises ValueError for a file of another ending or without a row, and for a row that cannot be read.
  """
  readers = {'.jsonl': _json_rows, '.json': _listed_rows, '.parquet': _parquet_rows, '.csv': _csv_rows}
  for path in paths:
    if not path.name.endswith(ENDINGS):
      raise ValueError(f'{path} ends in none of {sorted(ENDINGS)}; name it by its format')
    number = 0
    for number, row in readers[epath.Path(path.name.removesuffix('.gz')).suffix](path):
      yield f'{path}, row {number}', row
    if not number:
      raise ValueError(f'{path} is empty: it has no row; download it again')


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[IO[bytes]]:
  """A file to be read, unpacked where its name ends in .gz."""
  with path.open('rb') as file:
    if not path.name.endswith('.gz'):
      yield file
      return
    with gzip.open(file) as unpacked:
      try:
        yield unpacked
      except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f'{path} is not gzip: {error}') from error


def _json_rows(path):
  with _opened(path) as file:
    number, total, most = 0, 0, max(_MOST_UNPACKED, _MOST_RATIO * path.stat().length)
    while line := file.readline(_MOST_ROW + 1):
      number, total = number + 1, total + len(line)
      if len(line) > _MOST_ROW:
        raise ValueError(f'{path}, row {number}: it has more than {_MOST_ROW} bytes, the limit of a row')
      if total > most and path.name.endswith('.gz'):
        raise ValueError(f'{path} unpacks to more than {_MOST_RATIO} times its size and {_MOST_UNPACKED} bytes: it '
                         'is no file of problems')
      if line.strip():
        yield number, _json(f'{path}, row {number}', line)


def _bytes(path):
  with _opened(path) as file:
    data = file.read(_MOST_AT_ONCE + 1)
  if len(data) > _MOST_AT_ONCE:
    raise ValueError(f'{path} has more than {_MOST_AT_ONCE} bytes, the limit of a file that is read at once; write its '
                     'rows as .jsonl or .parquet')
  return data


def _listed_rows(path):
  rows = _json(path, _bytes(path))
  if not isinstance(rows, list):
    raise ValueError(f'{path} is {shown(rows)}, not a list of rows')
  return enumerate(rows, start=1)


def _json(place, text):
  try:
    return json.loads(text.decode('utf-8-sig'), object_pairs_hook=_named_once)
  except UnicodeDecodeError as error:
    raise ValueError(f'{place}: not UTF-8 ({error.reason})') from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{place}: not JSON ({error})') from error


def _named_once(pairs: list[tuple[str, Any]]) -> Row:
  """An object of JSON. Raises ValueError for a name that is there twice: nothing says which one is meant."""
  if len(found := dict(pairs)) < len(pairs):
    raise ValueError(f'it names {_twice([name for name, _ in pairs])!r} twice')
  return found


def _twice(names: Sequence[Any]) -> Any:
  """One that is there more than once; None where none is."""
  name, count = collections.Counter(names).most_common(1)[0] if names else (None, 0)
  return name if count > 1 else None


def _csv_rows(path):
  data = _bytes(path).removeprefix(codecs.BOM_UTF8)  # which would shift the place of what cannot be decoded
  try:
    text = data.decode()
  except UnicodeDecodeError as error:
    # The rows before the byte; the first of them is the header.
    number = sum(1 for _ in csv.reader(io.StringIO(data[:error.start].decode() + '.', newline=''))) - 1
    raise ValueError(f'{path}, row {number}: not UTF-8 ({error.reason})') from error
  number, reader = 0, csv.DictReader(io.StringIO(text, newline=''), strict=True)
  try:
    if (twice := _twice(reader.fieldnames or ())) is not None:
      raise ValueError(f'{path}: its header names the column {twice!r} twice; leave one of them, or rename it')
    for number, row in enumerate(reader, start=1):
      if None in row:
        raise ValueError(f'{path}, row {number}: it has more fields than the header: {shown(row[None])}; quote a field '
                         'that has a comma in it')
      yield number, row
  except csv.Error as error:
    raise ValueError(f'{path}, row {number + 1}: not CSV ({error})') from error


def _parquet_rows(path):
  parquet_file.check(path)
  import pyarrow  # slow to load, and other formats do without
  from pyarrow import parquet
  number = 0
  with path.open('rb') as file:
    try:
      for batch in parquet.ParquetFile(file).iter_batches(batch_size=parquet_file.BATCH):
        for number, row in enumerate(_batch_rows(batch), start=number + 1):
          yield number, row
    except UnicodeDecodeError as error:
      raise ValueError(f'{path}, row {number + 1}: not UTF-8 ({error.reason})') from error
    except (pyarrow.ArrowException, OSError) as error:
      raise ValueError(f'{path} is not Parquet, or broken after row {number}: {error}') from error
    except (ValueError, OverflowError) as error:  # a date that Python does not have
      raise ValueError(f'{path}, row {number + 1}: it cannot be read: {error}') from error


def _batch_rows(batch):
  """Rows of a batch of Parquet. What cannot be decoded is raised at its row."""
  try:
    return batch.to_pylist()
  except UnicodeDecodeError:  # it does not say in which row: rows one by one fail at this row
    return (batch.slice(i, 1).to_pylist()[0] for i in range(batch.num_rows))


def misfit(x: Any, schema: Any, name: str = '') -> str | None:
  """What keeps a value from its schema; None where nothing does.

  Args:
    schema: a type or a union of types; {field: schema} for a dict, which may have other fields; [schema] for a
      list of one or more.
    name: of the value.
  """
  if isinstance(schema, dict):
    if not isinstance(x, dict):
      return f'{name or "it"} is {shown(x)}, not an object'
    for field, inner in schema.items():
      full = f'{name}.{field}' if name else field
      if field not in x:
        return f'{full} is missing; there are {sorted(map(short, x))}'
      if found := misfit(x[field], inner, full):
        return found
    return None
  if isinstance(schema, list):
    if not isinstance(x, list) or not x:
      return f'{name} is {shown(x)}, not a list of one or more'
    return next(filter(None, (misfit(y, schema[0], f'{name}[{i}]') for i, y in enumerate(x))), None)
  if not isinstance(x, schema) or isinstance(x, bool):
    return f'{name} is {shown(x)}, not {getattr(schema, "__name__", schema)}'
  return None


def short(name: Any) -> str:
  """A name that an error shows: that of a broken file may be long."""
  return str(name) if len(str(name)) <= 60 else f'{str(name)[:57]}...'


def shown(x: Any) -> str:
  """A value and its type, in a line at most."""
  try:
    text = repr(x)
  except RecursionError:
    text = 'nested values'
  return f'{text if len(text) <= 60 else text[:57] + "..."} ({type(x).__name__})'


def read(problem_set: ProblemSet, located: LocatedRows) -> list[Task]:
  """The tasks of rows, as they are stored.

  A task without an id of its own is named by its prompt. In a merged set, rows with one prompt, up to blanks,
  are one task with the answer of the first row; 7, 07, 7.0 and $7$ do not differ. A prompt with different answers is
  left out, with a warning: nothing says which one is right.

  Raises:
    ValueError: a row that is not of the schema, has no prompt, has neither an answer nor info, or repeats an id.
  """
  found: dict[str, Task] = {}
  first: dict[str, str] = {}  # the place of a task's first row
  contested: dict[str, str] = {}
  for place, row in located:
    try:
      task, key = _task(problem_set, row)
      if key in found and not problem_set.merged:
        raise ValueError(f'its id {key!r}, of its problem unless it has its own, is that of {first[key]}; ids must be '
                         'unique, statistics are kept by them')
    except ValueError as error:
      raise ValueError(f'{place}: {error}') from error
    if key not in found:
      found[key], first[key] = task, place
    elif _by_value(task['answer']) != _by_value(found[key]['answer']):
      contested.setdefault(key, f'{place} has {task["answer"]!r}, {first[key]} {found[key]["answer"]!r}')
  if contested:
    logging.getLogger('absl').warning(
        '%s: %d of %d problems have different answers in different rows and are left out: %s%s',
        problem_set.name, len(contested), len(found), '; '.join(list(contested.values())[:5]),
        '; ...' if len(contested) > 5 else '')
  return [task for key, task in found.items() if key not in contested]


_WHOLE = re.compile(r'([+-]?)(\d{1,3}(?:(?:,|\{,\}|\\,|\\!)\d{3})+|\d+)(?:\.0*)?')


def _by_value(answer: str) -> str:
  """A text that equal whole numbers share: '-7' of '-07', '-7.0' and '$-7$'; other texts only lose blanks and `$`."""
  text = ' '.join(answer.strip().strip('$').split())
  found = _WHOLE.fullmatch(text)
  if not found:
    return text
  digits = re.sub(r'\D', '', found[2]).lstrip('0') or '0'
  return f'-{digits}' if found[1] == '-' and digits != '0' else digits


def _task(problem_set: ProblemSet, row: Row) -> tuple[Task, str]:
  """The task of a row, and what tells the task from others of its set."""
  if problem := misfit(row, problem_set.schema):
    raise ValueError(problem)
  task = dict(problem_set.task(row))
  for name in ('prompt', 'answer'):
    task[name] = task[name].strip()
    if not task[name] and not (name == 'answer' and task.get('info')):  # tests may say what is right
      raise ValueError(f'the {name} is empty')
  key = task.get('id') or builder.digest(' '.join(task['prompt'].split()))
  return {**task, 'id': f'{problem_set.name}/{key}'}, key


@dataclasses.dataclass(eq=False)
class Files(tfds.core.BuilderConfig):
  """A problem set and its files, whose digest is in the name."""

  problem_set: ProblemSet | None = dataclasses.field(default=None, repr=False)  # TFDS logs its configs
  paths: tuple[epath.Path, ...] = ()


def files(problem_set: ProblemSet, pattern: str) -> Files:
  """The config of a builder for a path, whose last part may be a pattern ('*.jsonl').

  Raises ValueError where the path is '' and the set needs files, or where the path names no file.
  """
  name, where = problem_set.name, problem_set.where
  if not pattern and problem_set.needs_files:
    raise ValueError(f"dataset {name!r} is fetched from the Hugging Face hub where huggingface_hub is installed: pip "
                     f"install 'kr_jax[hub]'. Or download {where}, and point to it with "
                     f'--config.tasks.files.{name}=PATH')
  paths = found(pattern) if pattern else []
  if pattern and not paths:
    raise ValueError(f'tasks.files.{name}={pattern!r} names no file; point to {where}')
  made_by = builder.code(__name__, *sorted({f.__module__ for f in (problem_set.task, problem_set.rows_by_split) if f}))
  return Files(
      name=f'{name}-{builder.digest(f"{digest(paths)} {made_by}")}', version=problem_set.version,
      description=f'{problem_set.about} {problem_set.source}'.strip(), problem_set=problem_set, paths=tuple(paths))


def found(pattern: str) -> list[epath.Path]:
  """The files of a path, whose last part may be a pattern, in order."""
  path = epath.Path(pattern).expanduser()
  return sorted(p for p in path.parent.glob(path.name) if p.is_file()) if path.parent.is_dir() else []


def digest(paths: Iterable[epath.Path]) -> str:
  """Sixteen characters that stand for names and contents of files."""
  digest = hashlib.sha256()
  for path in paths:
    digest.update(f'{path.name}\n'.encode())
    with path.open('rb') as file:
      digest.update(hashlib.file_digest(file, 'sha256').digest())
  return digest.hexdigest()[:16]


class Builder(builder.TaskBuilder):
  """Published problem sets, each a config."""

  name = 'published'

  def splits(self) -> dict[str, list[Task]]:
    problem_set, paths = self.builder_config.problem_set, self.builder_config.paths
    if problem_set.rows_by_split:
      by_split = problem_set.rows_by_split(paths, self.data_dir_root)
    else:
      by_split = {problem_set.split: rows(paths)}
    return {split: read(problem_set, located) for split, located in by_split.items()}
