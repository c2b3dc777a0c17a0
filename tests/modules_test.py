"""Modules by the path of their file."""

import sys

import pytest

from kr_jax import modules


def test_a_module_runs_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
  path = tmp_path / 'my-set.v1.py'
  path.write_text('class Thing: pass\nmade = object()')
  monkeypatch.chdir(tmp_path)
  first = modules.load('my-set.v1.py')
  assert modules.load(str(path)) is first and first.__file__ == str(path)
  assert '.' not in first.__name__ and sys.modules[first.__name__].Thing is first.Thing
  path.write_text('made = 2')
  assert modules.load(str(path)).made == 2 and first.made != 2
  assert modules.digest(str(path)) == '9d7ad110ba9c23ab' != modules.digest(__file__)


def test_a_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'a.py').write_text('x = 3')
  assert modules.located('~/a.py') == str(tmp_path / 'a.py') and modules.load('~/a.py').x == 3


def test_files_that_are_no_modules(tmp_path):
  known = set(sys.modules)
  for text, said in (('x = ', 'bad.py cannot be imported: SyntaxError'), ('1 / 0', 'ZeroDivisionError'),
                     ('import no_such_thing', 'No module .*; what it imports must be importable from where')):
    (tmp_path / 'bad.py').write_text(text)
    with pytest.raises(ValueError, match=said):
      modules.load(str(tmp_path / 'bad.py'))
  with pytest.raises(ValueError, match='none.py cannot be read: No such file'):
    modules.load(str(tmp_path / 'none.py'))
  assert not [name for name in sys.modules if name not in known and name.startswith('bad')]
