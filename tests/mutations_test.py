"""The list of planted faults is of this tree: each line is there, and its test is one of the default tier."""

import ast
import collections

from tests.mutations import ROOT, faults


def decorators(path, name):
  """The source of a test's decorators. Raises StopIteration if there is no such test."""
  tree = ast.parse((ROOT / path).read_text())
  found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
  return ' '.join(map(ast.unparse, found.decorator_list))


def test_the_list_is_of_this_tree():
  listed = faults()
  assert len(listed) >= 40
  for fault in listed:
    assert fault.planted((ROOT / fault.file).read_text()) != (ROOT / fault.file).read_text()
    assert fault.old.count('\n') <= 1, 'a fault is of one line'
    path, _, name = fault.test.partition('::')
    marks = decorators(path, name.partition('[')[0])
    assert not marks.startswith(('exhaustive', 'pytest.mark.exhaustive')), fault.test
  assert len(set(listed)) == len(listed)


def test_faults_are_spread_over_the_package():
  count = collections.Counter(fault.file for fault in faults())
  folders = {path.rpartition('/')[0] for path in count}
  assert {'kr_jax', 'kr_jax/allocation', 'kr_jax/model', 'kr_jax/learning', 'kr_jax/rewards', 'kr_jax/record',
          'kr_jax/preflight', 'kr_jax/datasets'} <= folders
  assert max(count.values()) <= 5
