"""Tasks are told from others by their content."""

import numpy as np
import pytest

from kr_jax import types
from kr_jax.record import fingerprint

TASKS = [types.Task(id=f't{i}', index=i, prompt=f'{i} + 1', answer=f'{i + 1}', difficulty=1, solution='', tokens=(i, 3),
                    info='{}') for i in range(5)]


def test_the_same_tasks_are_the_same():
  now = fingerprint.of(TASKS)
  again = fingerprint.of([task._replace(difficulty=2, solution='x', source='y') for task in TASKS])
  assert now.fields == again.fields and np.array_equal(now.digest_I, again.digest_I)
  assert fingerprint.difference(now.fields, again, now.digest_I) is None
  assert fingerprint.difference({}, again) is None  # the record of an older version


@pytest.mark.parametrize('field, value', [('id', 'x'), ('prompt', 'x'), ('tokens', (2, 4)), ('answer', 'x'),
                                          ('verifier', 'math'), ('info', '')])
def test_another_value_of_a_field(field, value):
  began = fingerprint.of(TASKS)
  now = fingerprint.of([*TASKS[:2], TASKS[2]._replace(**{field: value}), *TASKS[3:]])
  name = 'x' if field == 'id' else 't2'
  assert fingerprint.difference(began.fields, now, began.digest_I) == (
      f"{field} differs, of 1 of 5 tasks, first of '{name}' (row 2)")
  assert fingerprint.difference(began.fields, now) == f'{field} differs'


def test_more_tasks_and_their_order():
  began = fingerprint.of(TASKS)
  assert fingerprint.difference(began.fields, fingerprint.of(TASKS[:3]), began.digest_I) == (
      'id and prompt and tokens and answer and verifier and info differ; there were 5 tasks, there are 3')
  assert 'first of \'t1\' (row 0)' in fingerprint.difference(
      began.fields, fingerprint.of([TASKS[1], TASKS[0], *TASKS[2:]]), began.digest_I)


def test_neighbouring_texts_are_not_one():
  one, other = (fingerprint.of([TASKS[0]._replace(prompt=x), TASKS[1]._replace(prompt=y)])
                for x, y in (('ab', 'c'), ('a', 'bc')))
  assert one.fields['prompt'] != other.fields['prompt']


def test_the_file_helps_and_is_not_needed(tmp_path):
  made = {'train': fingerprint.of(TASKS), 'test': fingerprint.of(TASKS[:2])}
  assert fingerprint.load(str(tmp_path)) == {}
  fingerprint.save(str(tmp_path), made)
  found = fingerprint.load(str(tmp_path))
  assert all(np.array_equal(found[name], x.digest_I) for name, x in made.items())
  path = tmp_path / fingerprint.FILE
  before = path.stat().st_mtime_ns
  fingerprint.save(str(tmp_path), made)
  assert path.stat().st_mtime_ns == before
  for garbage in (b'', b'PK\x03\x04', path.read_bytes()[:-20]):
    path.write_bytes(garbage)
    assert fingerprint.load(str(tmp_path)) == {}
