"""An error of a check is the user's, and one of this project's own is ours, whatever its type."""

import json
import os

import jax
import numpy as np
import pytest

import kr_jax
from kr_jax import errors
from kr_jax import knobs
from kr_jax.model import policy


def caught(function, *args, **names):
  with pytest.raises((Exception, SystemExit)) as error:
    function(*args, **names)
  return error.value


def of_this_package(source):
  """An error of code that stands in a file of this package."""
  code = compile(source, os.path.join(os.path.dirname(kr_jax.__file__), 'of_a_test.py'), 'exec')
  return caught(exec, code, {'np': np})


def test_an_error_of_a_check_is_the_users():
  assert errors.is_users(caught(knobs.Alloc, low=-1))
  assert errors.is_users(caught(knobs.read, {'seed': -1}))
  assert errors.is_users(of_this_package('raise ValueError("a")'))
  assert errors.is_users(of_this_package('try:\n  int("a")\nexcept ValueError as e:\n  raise ValueError("b") from e'))
  assert errors.is_users(of_this_package('try:\n  raise ValueError("a")\nfinally:\n  b = 1'))


@pytest.mark.parametrize('source', [
    'int("a")', 'a, b = 1, 2, 3', 'np.zeros(3).reshape(2, 2)', '[].remove(1)', 'raise KeyError("a")', '1 / 0',
    'np.zeros(2) + np.zeros(3)'])
def test_an_error_of_the_interpreter_or_a_library_is_ours(source):
  assert not errors.is_users(of_this_package(source))


def test_an_error_of_another_package_is_ours():
  def check():
    raise ValueError('a')
  assert not errors.is_users(caught(check))  # of this test
  assert not errors.is_users(caught(policy.rmsnorm, np.zeros((2, 3)), np.ones(4), 1e-6))  # of jax
  assert not errors.is_users(ValueError('never raised'))


def test_what_ends_a_run_at_work_is_said_in_one_line():
  for error, says in (
      (errors.Told('the verifier v.py:f gave no verdict'), 'error: the verifier v.py:f gave no verdict'),
      (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nMore.'),
       'error: out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes. What a config takes')):
    def run():
      with errors.told():
        raise error
    assert caught(run).code.startswith(says)
  for error in (jax.errors.JaxRuntimeError('INTERNAL: RESOURCE_EXHAUSTED'), RuntimeError('no process')):
    def ours():
      with errors.told():
        raise error
    assert caught(ours) is error


def test_an_error_of_reading_or_of_the_system_is_the_users():
  assert errors.is_users(caught(open, '/nowhere/at/all')) and errors.is_users(caught(json.loads, '{'))
  assert errors.is_users(caught(b'\xff'.decode))
