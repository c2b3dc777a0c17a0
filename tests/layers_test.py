"""Imports run strictly downwards."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = (
    ('types', 'pretrained', 'processes', 'hlo'),
    ('answers', 'sharding', 'tokenizer', 'metrics', 'kernels', 'datasets', 'value'),
    ('tasks', 'rewards', 'allocate', 'estimate', 'policy', 'pack'),
    ('weights', 'sample', 'grpo', 'checkpoint', 'resources'),
    ('update', 'evaluate', 'generate', 'worlds'),
    ('warm_start',),
    ('train', 'report', 'simulate'),
    ('preflight',),
    ('main',),
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
FILES = sorted((ROOT / 'kr_jax').rglob('*.py'))


def imported(source: str) -> set[str]:
  """The modules of kr_jax, configs and tests that a source imports, from the root."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'imports are absolute'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return {name for name in names if name.split('.')[0] in ('kr_jax', 'configs', 'tests')}


def violations(module: str, source: str) -> list[str]:
  """What a module of kr_jax (its first name below the package) must not import."""
  bad = []
  for name in imported(source):
    parts = name.split('.')
    if parts[0] != 'kr_jax':
      bad.append(name)
    elif module in ('kernels', 'datasets'):
      if parts[1] != module:
        bad.append(name)
    elif LAYER[parts[1]] >= LAYER[module]:
      bad.append(name)
  return bad


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.name)
def test_imports_run_downwards(path):
  module = path.relative_to(ROOT / 'kr_jax').parts[0].removesuffix('.py')
  if module != '__init__':
    assert not violations(module, path.read_text())


def test_an_upward_import_is_found():
  assert violations('policy', 'from kr_jax import sample\n') == ['kr_jax.sample']
  assert violations('sample', 'from kr_jax import grpo\n') == ['kr_jax.grpo']
  assert violations('train', 'from configs import common\n') == ['configs.common']
  assert not violations('sample', 'from kr_jax.policy import Config\nimport jax\n')


def test_every_module_has_a_test_and_every_test_a_module():
  modules = {p.relative_to(ROOT / 'kr_jax').with_suffix('') for p in FILES
             if p.name != '__init__.py'}
  # The files of kernels/<op>/ are tested together, in kernels/<op>_test.py.
  modules = {p.parent if p.parts[0] == 'kernels' else p for p in modules}
  tests = {p.relative_to(ROOT / 'tests').with_name(p.name.removesuffix('_test.py'))
           for p in (ROOT / 'tests').rglob('*_test.py')}
  of_the_project = {pathlib.Path(name) for name in (
      'layers', 'configs', 'launch', 'mesh', 'tpu', 'tpu_sampler')}
  assert tests - of_the_project == modules
