"""How values cross between processes, and how assertions are counted."""

import json
import math

import hypothesis
from hypothesis import strategies
import pytest

from kr_jax.rewards import calls

scalars = (strategies.none() | strategies.booleans() | strategies.integers(-10 ** 30, 10 ** 30) | strategies.text()
           | strategies.floats(allow_nan=False) | strategies.binary() | strategies.complex_numbers(allow_nan=False))
hashable = strategies.recursive(
    scalars, lambda x: strategies.lists(x).map(tuple) | strategies.frozensets(x, max_size=3), max_leaves=5)
values = strategies.recursive(
    hashable, lambda x: strategies.lists(x) | strategies.sets(hashable, max_size=3)
    | strategies.dictionaries(hashable, x, max_size=3), max_leaves=10)


def crossed(x, keep=lambda x: -1):
  return calls.unpack(json.loads(json.dumps(calls.pack(x, keep))), lambda n: ('object', n))


def same_types(x, y):
  """Whether two equal values are of the same types at every place; those of sets are not looked at."""
  if type(x) is not type(y):
    return False
  if isinstance(x, dict):
    return same_types([*x.items()], [*y.items()])
  return not isinstance(x, (list, tuple)) or all(map(same_types, x, y))


@hypothesis.given(values)
def test_plain_values_cross_as_they_are(x):
  assert crossed(x) == x and same_types(x, crossed(x))


def test_other_values():
  class Liar(list):
    def __eq__(self, other):
      return True

  class Number(int):
    def __eq__(self, other):
      return True
    __hash__ = int.__hash__

  class Always:
    def __eq__(self, other):
      return True

  assert type(crossed(Liar([1]))) is list and crossed(Liar([1])) != [2]
  assert type(crossed([Number(1)])[0]) is int and crossed({Number(1)}) == {1}
  assert crossed((Always(), 1), lambda x: 7) == (('object', 7), 1)
  assert math.isnan(crossed(float('nan'))) and crossed([-math.inf]) == [-math.inf]
  assert crossed(range(3)) == range(3) and crossed(bytearray(b'a')) == b'a'
  assert crossed([int, str]) == [int, str] and crossed(Always, lambda x: 3) == ('object', 3)
  assert list(crossed(i * i for i in range(4))) == [0, 1, 4, 9]
  assert len(list(crossed(iter(int, 1)))) == calls.ITEMS  # it has no end


def test_values_that_are_too_deep():
  deep = []
  for _ in range(10 ** 5):
    deep = (deep,)
  with pytest.raises(RecursionError):
    calls.pack(deep)
  while deep:  # Python's own way to free it is recursive
    deep, = deep


@pytest.mark.parametrize('tree', [
    {}, {'tuple': [1], 'set': [2]}, {'code': 'x'}, {'set': [[1]]}, {'dict': [[1], []]}, {'dict': 3}, {'complex': 'x'},
    {'range': [1, 'x', 1]}, {'class': 'print_'}, {'bytes': 'xyz'}, {'class': 3}, {'tuple': {'range': [0, 10 ** 18, 1]}},
    {'iterator': {'range': [0, 10 ** 18, 1]}}, {'dict': [{'range': [0, 10 ** 18, 1]}, {'range': [0, 10 ** 18, 1]}]}])
def test_what_pack_does_not_make_is_refused(tree):
  with pytest.raises((ValueError, TypeError, LookupError, AttributeError)):
    calls.unpack(tree, lambda n: None)


def test_assertions_are_noted():
  seen = []
  notes = calls._Notes(all_of_them=True)
  names = {'note_': notes.note, 'seen': seen}
  exec(compile(calls.noted('assert 1 == 1\nfor i in range(3):\n  assert i < 2, seen.append(i)\n'
                           'assert 1 / 0\nassert []\nseen.append("end")'), 'tests', 'exec'), names)
  assert (notes.passed, notes.failed, seen) == (3, 3, ['end'])
  first = calls._Notes(all_of_them=False)
  with pytest.raises(calls.Ended):
    exec(compile(calls.noted('assert 1\nassert 0\nassert 1'), 'tests', 'exec'), {'note_': first.note})
  assert (first.passed, first.failed) == (1, 1)


def test_exceptions_of_a_program_are_built_in_ones_that_end_no_loop():
  raised = lambda *names: type(calls._exception({'raised': list(names)}))
  assert raised('Mine', 'ZeroDivisionError', 'ArithmeticError') is ZeroDivisionError
  for names in (['StopIteration', 'Exception'], ['GeneratorExit', 'BaseException'], ['SystemExit'], ['print'], [3]):
    assert raised(*names) in (Exception, RuntimeError)
  for answer in ({}, [], None, {'raised': 3}, {'raised': {}}):
    assert type(calls._exception(answer)) is RuntimeError
