"""The plan of the package: imports run strictly downwards, between folders and inside them."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# From the ground up. A folder stands for its modules, whose own order is below.
LAYERS = (
    ('checks',),
    ('disks',),
    ('types', 'phases', 'sections', 'exits', 'errors', 'progress', 'files', 'hub', 'modules', 'scratch'),
    ('rendezvous',),
    ('stopping',),
    ('data_knobs',),
    ('knobs', 'processes', 'shipped'),
    ('arguments', 'mirror', 'compiled', 'sharding', 'kernels', 'datasets', 'answers'),
    ('model', 'rewards'),
    ('costs',),
    ('inputs', 'tasks', 'prior_rates', 'learning', 'health', 'queues', 'draw', 'completions'),
    ('sample', 'allocation'),
    ('memory',),
    ('record', 'evaluate', 'generate'),
    ('warm_start', 'report'),
    ('prepare', 'run_config', 'reader', 'advise'),
    ('state',),
    ('attempt', 'explore', 'replay'),
    ('train', 'preflight'),
    ('library',),
    ('main',),
)
INSIDE = {
    'answers': (('marks', 'notation'), ('cursor',), ('syntax', 'units'), ('values', 'kinds'), ('regions', 'things'),
                ('equality',)),
    'datasets': (('builder', 'names', 'parquet_file'),
                 ('arithmetic', 'champ', 'ciphers', 'published', 'reasoning_gym', 'sums'),
                 ('ciphers_hard', 'ciphers_late', 'sets', 'own')),
    'allocation': (('value', 'solve'), ('scores', 'prior', 'recalibrate'), ('estimate',), ('allocate',), ('worlds',),
                   ('passes', 'forecast'), ('simulate',), ('allocator',), ('examples',)),
    'model': (('gguf_file', 'gguf_vocabulary', 'attention', 'template', 'pipeline', 'safetensors_file', 'moe'),
              ('llama_cpp', 'config_json', 'policy', 'chat'), ('pretrained', 'families', 'decode'),
              ('tokenizer', 'weights', 'export')),
    'learning': (('grpo', 'pack', 'guard', 'measurements', 'locate'), ('update',), ('noise',)),
    'rewards': (('verdicts', 'isolation', 'orphans', 'calls', 'code_blocks'), ('choice', 'gym', 'walls'), ('programs',),
                ('verifiers',), ('worker',), ('pool',), ('workers',), ('audit',)),
    'costs': (('arithmetic', 'hardware'), ('flops', 'pricing', 'meters'), ('hlo',), ('programs',)),
    'record': (('lines', 'checksums', 'saved'), ('reading',),
               ('sinks', 'rollouts', 'bad_steps', 'checkpoint', 'claim', 'lock', 'log', 'resume', 'fingerprint', 'calibration', 'ledger'),
               ('metrics', 'goodput', 'split', 'unbegun', 'rollouts_text', 'beside'), ('terminal',), ('steps',)),
    'report': (('run', 'drawing'), ('compare', 'charts'), ('panels', 'contents'), ('summary', 'figures', 'paired'), ('verdicts',),
               ('scorecard',), ('page',), ('refresh',)),
    'preflight': (('whole_run',), ('preflight',), ('suggest',)),
}
# These import nothing of kr_jax but themselves.
ALONE = ('kernels', 'datasets', 'answers')
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


def _layer(layers, name: str) -> int:
  return next(i for i, names in enumerate(layers) if name in names)


def violations(module: str, source: str) -> list[str]:
  """What a module of kr_jax, such as 'sample' or 'model.policy', must not import."""
  folder, _, inner = module.partition('.')
  bad = []
  for name in imported(source):
    root, first, *rest = name.split('.')
    if root != 'kr_jax':
      bad.append(name)
    elif first == folder and inner:
      if folder in INSIDE and _layer(INSIDE[folder], rest[0]) >= _layer(INSIDE[folder], inner.split('.')[0]):
        bad.append(name)
    elif folder in ALONE or _layer(LAYERS, first) >= _layer(LAYERS, folder):
      bad.append(name)
  return bad


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT / 'kr_jax')))
def test_imports_run_downwards(path):
  if path.name != '__init__.py':  # a folder's face imports what it shows
    module = '.'.join(path.relative_to(ROOT / 'kr_jax').with_suffix('').parts)
    assert not violations(module, path.read_text())


def test_an_upward_import_is_found():
  assert violations('model.policy', 'from kr_jax import sample\n') == ['kr_jax.sample']
  assert violations('sample', 'from kr_jax.record import steps\n') == ['kr_jax.record.steps']
  assert violations('model.policy', 'from kr_jax.model import weights\n') == ['kr_jax.model.weights']
  assert violations('kernels.knapsack.ops', 'from kr_jax import types\n') == ['kr_jax.types']
  assert violations('train', 'from configs import common\n') == ['configs.common']
  assert not violations('sample', 'from kr_jax.model.policy import Config\nimport jax\n')
  assert not violations('model.weights', 'from kr_jax.model import policy\n')


def test_every_module_has_a_test_and_every_test_a_module():
  modules = {p.relative_to(ROOT / 'kr_jax').with_suffix('') for p in FILES
             if p.name != '__init__.py'}
  # The files of kernels/<op>/ are tested together, in kernels/<op>_test.py, and with them what they share.
  modules = {p.parent if p.parts[0] == 'kernels' else p for p in modules} - {pathlib.Path('kernels')}
  tests = {p.relative_to(ROOT / 'tests').with_name(p.name.removesuffix('_test.py'))
           for p in (ROOT / 'tests').rglob('*_test.py')}
  of_the_project = {pathlib.Path(name) for name in (
      'bucket', 'bad_inputs', 'layers', 'configs', 'gke', 'launch', 'sweep', 'mesh', 'notebooks', 'tpu', 'tpu_launch',
      'docs', 'mutations', 'kills', 'wheel', 'fuzz', 'benchmarks/proof', 'benchmarks/verdict_rates', 'rewards/attacks', 'rewards/cases',
      'model/parity')}
  assert tests - of_the_project == modules
