"""Eight CPU devices, no silent broadcasting over ranks, one set of arithmetic data for all tests.

Programs of the tests are small and many: XLA builds them in half the time if it does not optimise.
"""

import os
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # libtpu compiles here, it does not look for a TPU host
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # nor does it need one to itself
os.environ['XLA_FLAGS'] = (f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'
                           ' --xla_backend_optimization_level=0')
sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))  # configs/ is not installed

import jax  # after the environment is set
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_collection_modifyitems(items):
  """Begins with the file that takes longest, beside which the other cores do the rest."""
  items.sort(key=lambda item: item.path.name != 'preflight_test.py')


@pytest.fixture(scope='module', autouse=True)
def programs_of_their_file():
  """Each compiled program holds memory maps, of which Linux gives a process 65530; beyond it crashes."""
  yield
  jax.clear_caches()


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory) -> str:
  return str(tmp_path_factory.mktemp('data'))


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
