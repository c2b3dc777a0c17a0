"""The configs that come with the project, by name."""

import os
import sys

import pytest

import kr_jax
from kr_jax import knobs
from kr_jax import shipped

OWN = 'from configs import common\n\ndef get_config():\n  c = common.base()\n  c.seed = 3\n  return c.lock()\n'


def test_every_run_is_named_and_no_part_is():
  files = {name.removesuffix('.py') for name in os.listdir(shipped.FOLDER) if name.endswith('.py')}
  assert files - set(shipped.names()) == {'common', 'hardware', 'presets'}
  assert shipped.names() == sorted(shipped.names()) and 'arithmetic' in shipped.names()


def test_names_become_files():
  path = os.path.join(shipped.FOLDER, 'arithmetic.py')
  assert shipped.located('kr_jax:arithmetic:debug,dapo') == f'{path}:debug,dapo'
  assert shipped.located('kr_jax:arithmetic') == path and shipped.located('runs/x.py:debug') == 'runs/x.py:debug'
  with pytest.raises(ValueError, match="no config 'arithmetc' in kr_jax; did you mean 'arithmetic'"):
    shipped.located('kr_jax:arithmetc:debug')
  with pytest.raises(ValueError, match='there are arithmetic, '):
    shipped.located('kr_jax:../tests/knobs')


def test_a_config_is_free_to_be_changed():
  config = kr_jax.config('arithmetic:debug')
  assert (config.num_steps, config.tasks.per_step, config.policy.width) == (4, 8, 32)
  config.alloc.low, config.alloc.rul = 2.5, 1
  with pytest.raises(ValueError, match="there is no knob alloc.rul; did you mean 'rule'.*alloc.low=2.5.*whole number"):
    knobs.read(config)
  assert kr_jax.config('kr_jax:arithmetic').num_steps == 120  # which was not changed by that


def test_a_file_of_ones_own_finds_the_shipped_ones(tmp_path, monkeypatch):
  (tmp_path / 'own.py').write_text(OWN)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [x for x in sys.path if not os.path.exists(os.path.join(x, 'configs'))])
  assert kr_jax.config('own.py').seed == 3
  assert kr_jax.config(f'{tmp_path}/own.py').seed == 3


def test_another_projects_configs_stay_theirs(tmp_path, monkeypatch):
  """Shipped files find the shipped ones; files of that project, its own."""
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / '__init__.py').write_text('')
  (tmp_path / 'configs' / 'common.py').write_text('import ml_collections\n\ndef base():\n'
                                                  '  return ml_collections.ConfigDict({"seed": 0, "theirs": True})\n')
  (tmp_path / 'own.py').write_text(OWN)
  monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
  theirs = {name: module for name, module in sys.modules.items() if name.startswith('configs')}
  for name in theirs:
    monkeypatch.delitem(sys.modules, name)
  assert kr_jax.config(str(tmp_path / 'own.py')).to_dict() == {'seed': 3, 'theirs': True}
  import configs.common  # as that project does before
  assert configs.__path__ == [str(tmp_path / 'configs')]
  before = list(sys.path)
  assert kr_jax.config('arithmetic:debug').alloc.rule == 'knapsack'
  assert sys.modules['configs.common'] is configs.common and sys.path == before
  for name in ('configs', 'configs.common'):
    monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize('name, wrong', [
    ('none.py:debug', "there is no file 'none.py'; shipped configs are arithmetic"),
    ('arithmetic:debgu', "'debgu' is not one of .* did you mean 'debug'")])
def test_what_is_no_config(name, wrong):
  with pytest.raises(ValueError, match=wrong):
    kr_jax.config(name)


def test_a_file_that_makes_no_config(tmp_path):
  (tmp_path / 'empty.py').write_text('def get_config():\n  pass\n')
  with pytest.raises(ValueError, match='get_config of .*empty.py returned NoneType; it must return a ConfigDict'):
    kr_jax.config(str(tmp_path / 'empty.py'))
