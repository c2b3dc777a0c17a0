"""Names of datasets."""

import pytest

from kr_jax.datasets import names


@pytest.mark.parametrize('name, dataset, split', [
    ('champ', 'champ', 'train'), ('champ:test[:25%]', 'champ', 'test[:25%]'), ('', '', 'train'),
    ("reasoning_gym/x(a='b:c', d={1: 2}):test[5:7]", "reasoning_gym/x(a='b:c', d={1: 2})", 'test[5:7]'),
    ('file:a.csv', 'file:a.csv', 'train'), ('file:data', 'file:data', 'train'), ('file:data:all', 'file:data', 'all'),
    ('file:gs://b/a-*.csv:test', 'file:gs://b/a-*.csv', 'test'), ('file:hf:org/set', 'file:hf:org/set', 'train'),
    ('file:hf:org/set/a.csv@main:test[:5]', 'file:hf:org/set/a.csv@main', 'test[:5]'),
    ('sets/my_set.py:dev', 'sets/my_set.py', 'dev')])
def test_a_dataset_and_its_split(name, dataset, split):
  assert names.part(name, 'train') == (dataset, split)


def test_kinds():
  of = lambda name: (names.is_file(name), names.is_module(name), names.path(name), names.source(name))
  assert of('file:a/b.csv') == (True, False, 'a/b.csv', 'file:a/b.csv')
  assert of('file:hf:org/set/a.csv@0f0f') == (True, False, 'hf:org/set/a.csv@0f0f', 'file:hf:org/set/a.csv')
  assert of('file:a@b.csv') == (True, False, 'a@b.csv', 'file:a@b.csv')
  assert of('my/set.py') == (False, True, 'my/set.py', 'my/set.py')
  assert of('file:odd.py') == (True, False, 'odd.py', 'file:odd.py') and of('gsm8k')[:2] == (False, False)
