"""Eight CPU devices, no silent broadcasting over ranks, one set of arithmetic data for all tests.

Programs of the tests are small and many: XLA builds them in half the time if it does not optimise, in a third less
again if it emits loops without MLIR, and a program that another test or process has built already is read from a
directory that all share.
"""

import collections
import importlib.metadata
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # libtpu compiles here, it does not look for a TPU host
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # nor does it need one to itself
os.environ['XLA_FLAGS'] = (f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'
                           ' --xla_backend_optimization_level=0')
if importlib.metadata.version('jaxlib').startswith('0.10.'):  # another may not know the flag, and then runs nothing
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(ROOT / '.pytest_cache' / 'xla')
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '0'
sys.path.insert(0, str(ROOT))  # configs/ is not installed

import hypothesis  # after the environment is set
import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
# A test that draws fewer or more says so.
hypothesis.settings.register_profile('tests', max_examples=25, deadline=None)
hypothesis.settings.load_profile('tests')

# Each compiled program holds memory maps, of which Linux gives a process 65530; beyond them it crashes.
MOST_MAPS = 40_000


def pytest_addoption(parser):
  parser.addoption('--all', action='store_true', help='also the tests marked exhaustive')


def pytest_collection_modifyitems(config, items):
  """Leaves exhaustive tests out unless --all is given; begins with the files that have most slow tests, beside
  which another core does the rest."""
  if not config.getoption('--all'):
    left_out = [item for item in items if item.get_closest_marker('exhaustive')]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker('exhaustive')]
  slow = collections.Counter(
      item.path for item in items if item.get_closest_marker('slow') or item.get_closest_marker('exhaustive'))
  items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope='module', autouse=True)
def room_for_programs():
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and maps.read_text().count('\n') > MOST_MAPS:
    jax.clear_caches()


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory) -> str:
  return str(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='session')
def finished(tmp_path_factory, data_dir) -> str:
  """The workdir of a finished run (tests/knobs.py), for tests that read it alone."""
  from tests import knobs  # slow to load, and only some need it
  return knobs.run(tmp_path_factory.mktemp('finished'), data_dir)


@pytest.fixture(scope='session')
def storage(tmp_path_factory):
  """A server of buckets (tests/fakes/bucket.py), of which no fault is ordered."""
  from tests.fakes import bucket  # only some need it
  with bucket.served(tmp_path_factory.mktemp('storage')) as server:
    yield server


@pytest.fixture
def bucket(storage, tmp_path, monkeypatch):
  """The URL of an empty bucket, and a machine that has nothing in its cache."""
  for name, value in (storage.environment | {'KR_JAX_CACHE': str(tmp_path / 'cache')}).items():
    monkeypatch.setenv(name, value)
  yield storage.make()
  storage.faults.clear()
  storage.delay_s = 0.0


@pytest.fixture
def clock():
  """The clock of a run (phases.py)."""
  from kr_jax import phases  # slow to load, and only some need it
  yield phases.start()
  phases.stop()


@pytest.fixture
def stored(tmp_path):
  """A function (dataset, pattern of its files) -> {split: its rows by id}, as TFDS stores them."""
  from kr_jax import tasks  # slow to load, and only some need it

  def stored(dataset, pattern='', **options):
    builder = tasks.builder(dataset, str(tmp_path / 'stored'), files={dataset: str(pattern)}, **options)
    text = lambda row: {k: x.decode() if isinstance(x, bytes) else int(x) for k, x in row.items()}
    return {split: {row['id']: row for row in map(text, builder.as_data_source(split))}
            for split in builder.info.splits}

  return stored
