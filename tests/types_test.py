"""The records stay light: reward workers load them at every start."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Prints which of the heavy modules a program asked for, installed or not.
PROGRAM = """
import sys
asked = set()
class Note:
  def find_spec(self, name, path=None, target=None):
    if name in {heavy}:
      asked.add(name)
sys.meta_path.insert(0, Note())
import {modules}
print(sorted(asked))
"""


def asked(modules: str, heavy: tuple[str, ...]) -> str:
  return subprocess.run(
      [sys.executable, '-c', PROGRAM.format(modules=modules, heavy=heavy)], cwd=ROOT, check=True,
      capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize('modules, heavy', [
    ('kr_jax.types, kr_jax.rewards', ('jax', 'tensorflow', 'torch')),
    ('kr_jax.tasks', ('tensorflow', 'torch')),
])
def test_importing_asks_for_nothing_heavy(modules, heavy):
  assert asked(modules, heavy) == '[]'


def test_a_heavy_import_is_found():
  assert asked('kr_jax.record.metrics', ('jax',)) == "['jax']"
