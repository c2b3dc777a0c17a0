"""What is fuzzed: for each kind of input a way to make a case, and how it is read.

A target is a function of (rng, folder) that reads one case and returns, or raises ValueError; `names` says whether the
error has to name the file.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import copy
import functools
import io
import json
import logging
import os
import pathlib
import random
import shutil
import struct
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from configs import arithmetic
from kr_jax import knobs
from kr_jax import prepare
from kr_jax import prior_rates
from kr_jax import types
from kr_jax.datasets import own
from kr_jax.datasets import parquet_file
from kr_jax.datasets import published
from kr_jax.datasets import sets
from kr_jax.model import chat
from kr_jax.model import families
from kr_jax.model import llama_cpp
from kr_jax.model import pretrained
from kr_jax.model import tokenizer
from kr_jax.record import ledger
from kr_jax.record import metrics
from tests.fuzz import mutate

DATA = pathlib.Path(__file__).parents[1] / 'data'
ROW = {'problem': 'What is 3 + 4?', 'answer': 7, 'id': 'a/1', 'level': 'Level 2', 'solution': 'It is 7.',
       'info': {'form': 'asserts'}, 'reward_model': {'ground_truth': '7'}}


class Target(NamedTuple):
  run: Callable[[random.Random, pathlib.Path], None]
  share: int  # of the cases; the cheap ones have most
  names: str = ''  # what an error has to have


def configs(rng, folder):
  """Knobs of a ConfigDict."""
  del folder
  c = _config()
  flat = list(c.keys())
  for _ in range(rng.choice((1, 1, 2, 4))):
    section = rng.choice(flat)
    is_section = hasattr(c[section], 'keys') and len(c[section])  # an earlier change may have emptied it
    place = c[section] if is_section else c
    name = section if place is c else rng.choice(list(place.keys()))
    value = place[name]
    value = mutate.mutated_json(rng, value) if rng.randrange(2) and _is_plain(value) else rng.choice(mutate.HOSTILE)
    with place.ignore_type(), contextlib.suppress(OverflowError):  # of ml_collections, which casts to the type before
      place[name] = tuple(value) if isinstance(value, list) else value
  found = knobs.read(c)
  if rng.randrange(20) == 0:
    prepare.without_tasks(c)
  del found


def _config():
  return copy.deepcopy(_base())


@functools.cache
def _base():
  c = arithmetic.get_config('debug')
  c.unlock()
  return c


def _is_plain(value):
  return isinstance(value, (int, float, str, tuple, list))


def _rows(path: pathlib.Path) -> None:
  columns = own.Columns({'answer': '', 'after': ''})
  problem_set = published.ProblemSet(name='x', about='', where='', schema={}, task=columns.task)
  published.read(problem_set, published.rows([epath.Path(path)]))


def jsonl(rng, folder):
  path = folder / 'a.jsonl'
  lines = [mutate.as_json(rng, mutate.mutated_json(rng, ROW | {'problem': str(i), 'id': i})) for i in range(2)]
  path.write_bytes(b'\n'.join(lines))
  _rows(path)


def json_list(rng, folder):
  path = folder / 'a.json'
  path.write_bytes(mutate.as_json(rng, mutate.mutated_json(rng, [ROW, ROW | {'problem': 'b', 'id': 2}])))
  _rows(path)


def csv(rng, folder):
  path = folder / 'a.csv'
  path.write_bytes(mutate.mutated_bytes(rng, b'id,problem,answer,level\r\n1,"What, is ""1""?",7,2\r\n2,b\nc,8,\r\n'))
  _rows(path)


def parquet(rng, folder):
  """Without the process that reads it first, which takes a second: this one has limits of its own."""
  path = folder / 'a.parquet'
  path.write_bytes(mutate.mutated_bytes(rng, _parquet()))
  said = io.StringIO()
  with contextlib.redirect_stdout(said):
    if parquet_file.read_within(str(path)):
      raise ValueError(f'{path}: {said.getvalue()}')
  check, parquet_file.check = parquet_file.check, lambda path: None
  try:
    _rows(path)
  finally:
    parquet_file.check = check


@functools.cache
def _parquet() -> bytes:
  import pyarrow
  from pyarrow import parquet as lib
  file = io.BytesIO()
  lib.write_table(pyarrow.Table.from_pylist([ROW | {'problem': str(i), 'id': str(i)} for i in range(20)]), file)
  return file.getvalue()


def live_code(rng, folder):
  """A row of a published set, with tests inside of it."""
  del folder
  lines = (DATA / 'datasets' / 'live_code_bench' / 'test.jsonl').read_bytes().splitlines()
  row = mutate.mutated_json(rng, json.loads(rng.choice(lines)))
  text = row.get('private_test_cases') if isinstance(row, dict) else None
  if isinstance(text, str) and rng.randrange(2):
    row['private_test_cases'] = mutate.mutated_bytes(rng, text.encode(errors='replace')).decode('latin-1')
  published.read(sets.SETS['live_code_bench'], [('row 1', row)])


def prior(rng, folder):
  tasks = [types.Task(id=f'a/{i}', index=i, prompt='', answer='', difficulty=0, solution='', tokens=())
           for i in range(3)]
  if rng.randrange(2):
    path = folder / 'rates.json'
    path.write_bytes(mutate.as_json(rng, mutate.mutated_json(rng, {f'a/{i}': i / 3 for i in range(3)})))
    prior_rates.read(str(path), tasks)
  else:
    path = folder / 'rates.jsonl'
    path.write_bytes(b'\n'.join(mutate.as_json(rng, mutate.mutated_json(rng, {'id': f'a/{i}', 'r': 0.5}))
                                for i in range(3)))
    prior_rates.read(f'{path}:r', tasks)


def config_json(rng, folder):
  """The config.json of a checkpoint."""
  path = _checkpoint(folder)
  (path / 'config.json').write_bytes(mutate.as_json(rng, mutate.mutated_json(rng, json.loads(rng.choice(_configs())))))
  families.fields(pretrained.Directory(path).config, path, length=rng.choice((0, 99)))


@functools.cache
def _configs() -> list[str]:
  return [path.read_text() for path in sorted(DATA.glob('families/*/config.json'))]


def _checkpoint(folder: pathlib.Path, *names: str) -> pathlib.Path:
  """A copy of a small checkpoint, to be changed; these files are left out."""
  path = folder / 'checkpoint'
  if not path.exists():
    shutil.copytree(DATA / 'checkpoints' / 'qwen3', path)
  for name in names:
    (path / name).unlink(missing_ok=True)
  return path


def safetensors(rng, folder):
  """The head of a file of safetensors."""
  path = _checkpoint(folder, 'model.safetensors.index.json')
  data = _tensors()
  size = struct.unpack_from('<Q', data)[0]
  head, body = json.loads(data[8:8 + size]), data[8 + size:]
  head = dict(rng.sample(sorted(head.items()), 3)) if rng.randrange(2) else head
  text = mutate.as_json(rng, mutate.mutated_json(rng, head, ('F8_E4M3', 'I64', 'Q9', 8, [2 ** 40, 2 ** 40])))
  if rng.randrange(8) == 0:
    text = text.replace(b'norm', b'norm', 1).replace(b', "', b', "model.norm.weight": {}, "', 1)
  claimed = len(text) if rng.randrange(8) else rng.choice((0, 1, 2 ** 20, 2 ** 31, 2 ** 63, len(text) + 1))
  whole = struct.pack('<Q', claimed) + text + body
  (path / 'model.safetensors').write_bytes(mutate.mutated_bytes(rng, whole[:4000]) if rng.randrange(8) == 0 else whole)
  files = pretrained.Directory(path)
  for name, shape in list(files.shapes.items())[:3]:
    if not pretrained.unreadable(files, [name]):
      files.tensor(name, [slice(0, 1)] * len(shape))


@functools.cache
def _tensors() -> bytes:
  return (DATA / 'checkpoints' / 'qwen3' / 'model.safetensors').read_bytes()


def index(rng, folder):
  """The index of several files of safetensors."""
  path = _checkpoint(folder, 'model.safetensors')
  (path / 'a.safetensors').write_bytes(_tensors())
  content = {'weight_map': {'model.norm.weight': 'a.safetensors', 'lm_head.weight': 'a.safetensors'}}
  content = mutate.mutated_json(rng, content, ('config.json', 'a.bin', '.', '..', './a.safetensors', '~/x'))
  (path / 'model.safetensors.index.json').write_bytes(mutate.as_json(rng, content))
  _ = pretrained.Directory(path).shapes


def gguf(rng, folder):
  path = folder / 'a.gguf'
  data, at = rng.choice(_ggufs())
  head = mutate.mutated_bytes(rng, data[:at]) if rng.randrange(3) else _placed(rng, data[:at])
  path.write_bytes(head + data[at:])
  found = llama_cpp.Gguf(path)
  _ = found.config, found.shapes
  if rng.randrange(2):
    _ = found.tokenizer_json, found.generation_config
  families.fields(found.config, path)


def _placed(rng: random.Random, head: bytes) -> bytes:
  """A head with numbers in it that are others."""
  at = rng.randrange(len(head) - 8)
  return head[:at] + struct.pack('<Q', rng.choice((0, 1, 9, 2 ** 20, 2 ** 32, 2 ** 63))) + head[at + 8:]


@functools.cache
def _ggufs() -> list[tuple[bytes, int]]:
  """Files, and where what is described in them ends, about."""
  return [(path.read_bytes(), 12_000) for path in sorted((DATA / 'checkpoints').glob('*.gguf'))]


def tokenizer_json(rng, folder):
  path = _checkpoint(folder)
  double = {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'aa'}
  thrice = {'type': 'TemplateProcessing', 'single': [{'Sequence': {'id': 'A', 'type_id': 0}}] * 3, 'pair': [],
            'special_tokens': {}}
  more = (double, {'type': 'Sequence', 'normalizers': [double] * 30}, {'type': 'ByteLevel', 'add_prefix_space': True},
          {'type': 'Split', 'pattern': {'Regex': '(a+)+$'}, 'behavior': 'Isolated', 'invert': False}, 'BPE',
          'WordPiece', thrice)
  name = rng.choice(('tokenizer.json',) * 3 + ('tokenizer_config.json', 'generation_config.json'))
  for other in ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json'):
    (path / other).write_text(_text(other))
  (path / name).write_bytes(mutate.as_json(rng, mutate.mutated_json(rng, _small(name), more)))
  with contextlib.redirect_stderr(io.StringIO()):
    found = tokenizer.Subwords(path, chat=False)
    found.decode(found.encode('a<|im_end|> 12\u00e9aaab'))


@functools.cache
def _text(name: str) -> str:
  return (DATA / 'checkpoints' / 'qwen3' / name).read_text()


@functools.cache
def _small(name: str) -> Any:
  return json.loads(_text(name))


_PARTS = (
    '{{ messages[0].content }}', '{% for m in messages %}', '{% endfor %}', '{{ bos_token }}', '{% if x %}',
    '{% endif %}', "{{ 'a' * 10 ** 9 }}", '{{ 9 ** 99 }}', '{% set x = messages %}', '{{ x | tojson }}',
    '{{ x | join }}', '{{ x.y.z }}', "{{ ''.__class__ }}", '{{ range(10 ** 9) }}',
    '{% macro f(n) %}{{ f(n) }}{% endmacro %}', '{{ f(1) }}', '{%', '}}', '{#', "{% include 'x' %}",
    '{{ raise_exception("x") }}', '{{ strftime_now("%Y") }}', '{% generation %}',
    '{% endgeneration %}', '{{ messages | map(attribute="role") | list }}', '{{ "%9999999d" % 1 }}', '{{ [1] * 99 }}',
    '\0', '\u202e', 'text')


def template(rng, folder):
  del folder
  text = ''.join(rng.choice(_PARTS) for _ in range(rng.randrange(1, 7)))
  chat.render(chat.read(text), [{'role': 'user', 'content': 'Hi'}], {'bos_token': '<s>'})


def records(rng, folder):
  """metrics.jsonl and ledger.jsonl."""
  step = {'step': 3, 'reward': 0.5, 'budgets': [1, 2], 'time': 1.5, 'phases': {'sample': 0.1}, 'mixed_tasks': 2}
  (folder / 'metrics.jsonl').write_bytes(b'\n'.join(
      mutate.as_json(rng, mutate.mutated_json(rng, step | {'step': i})) for i in range(3)) + b'\n')
  (folder / 'ledger.jsonl').write_bytes(mutate.mutated_bytes(rng, b''.join(
      mutate.as_json(rng, mutate.mutated_json(rng, {'kind': 'start', 'attempt': 0, 'step': 0, 's': {}})) + b'\n'
      for _ in range(2))))
  metrics.read(str(folder / 'metrics.jsonl'))
  ledger.read(str(folder))


TARGETS = {
    'configs': Target(configs, 5), 'jsonl': Target(jsonl, 15, 'a.jsonl'), 'json': Target(json_list, 10, 'a.json'),
    'csv': Target(csv, 15, 'a.csv'), 'parquet': Target(parquet, 5, 'a.parquet'), 'live_code': Target(live_code, 5),
    'prior': Target(prior, 10, 'rates.json'), 'config_json': Target(config_json, 35, 'checkpoint'),
    'safetensors': Target(safetensors, 10, 'checkpoint'), 'index': Target(index, 5, 'checkpoint'),
    'gguf': Target(gguf, 5, 'a.gguf'), 'tokenizer_json': Target(tokenizer_json, 5, 'checkpoint'),
    'template': Target(template, 5, 'template'), 'records': Target(records, 10)}


def quiet() -> None:
  """What is read logs nothing."""
  logging.disable(logging.CRITICAL)
  pretrained.note = lambda text: None
  os.environ['RUST_BACKTRACE'] = '0'
  np.seterr(all='ignore')
