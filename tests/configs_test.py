"""Every shipped config loads, is locked, passes its checks, and says how to run it."""

import importlib
import pathlib

import pytest

from configs import common
from kr_jax import train

NAMES = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / 'configs').glob('*.py')
               if p.stem != 'common')


@pytest.mark.parametrize('variant', ['', 'debug'])
@pytest.mark.parametrize('name', NAMES)
def test_a_config_is_locked_and_passes_its_checks(name, variant, data_dir):
  config = importlib.import_module(f'configs.{name}').get_config(variant)
  assert config.is_locked
  with pytest.raises(AttributeError, match='Did you mean "rule"'):
    config.alloc.rul = 'uniform'
  config.tasks.data_dir = data_dir
  setup = train.prepare(config)
  assert len(setup.test_tasks) >= 16


@pytest.mark.parametrize('name', NAMES)
def test_a_config_says_how_to_run_it(name):
  text = importlib.import_module(f'configs.{name}').__doc__
  for part in (f'configs/{name}.py', 'Hardware:', 'Time:', 'Expect:'):
    assert part in text


def test_an_unknown_variant():
  with pytest.raises(ValueError, match="config variant 'fast' is not 'debug'"):
    common.finish(common.base(), 'fast')
