"""Names of the hub, commits, and what is fetched; checkpoints of it are in model/pretrained_test.py."""

import pytest

from kr_jax import hub
from tests import hub as hub_lib

ENDINGS = ('.csv', '.jsonl')


@pytest.fixture
def served(tmp_path, monkeypatch):
  """A hub on this machine, and an empty cache of its client."""
  with hub_lib.serve(monkeypatch, str(tmp_path / 'hub')) as found:
    yield found


def test_names():
  for name, parts in (
      ('hf:org/set', ('org/set', None, None)), ('hf:org/set@v1', ('org/set', None, 'v1')),
      ('hf:org/set/data/*.csv@refs/pr/3', ('org/set', 'data/*.csv', 'refs/pr/3'))):
    assert hub.parse(name, '') == parts and hub.is_name(name)
  for name in ('hf:org', 'hf:/set', 'hf:org/set@', 'hf:o rg/set'):
    with pytest.raises(ValueError, match=rf"^tasks.dataset=file:'{name}' is not of the form hf:ORG/NAME\[/PATH\]"):
      hub.parse(name, 'tasks.dataset=file:')
  assert not hub.is_name('gs://hf:org/set') and not hub.is_name(None)


def test_a_run_goes_on_with_the_commit_that_it_began_with(served, capfd):
  """Unless the name says another revision."""
  first = served.push('datasets/org/set', {'a.csv': b'1'})
  pinned = hub.pinned_as('hf:org/set/a.csv', None, hub.DATASET, '')
  assert pinned == f'hf:org/set/a.csv@{first}' and f'hf:org/set/a.csv is {pinned}' in capfd.readouterr().err
  other = served.push('datasets/org/set', {'a.csv': b'2'})
  asked = len(served.asked)
  assert hub.pinned_as('hf:org/set/a.csv', pinned, hub.DATASET, '') == pinned
  assert hub.pin(pinned, hub.DATASET, '') == pinned and len(served.asked) == asked  # nothing is asked for a commit
  for name, began in (('hf:org/set/a.csv@main', pinned), ('hf:org/set/a.csv', f'hf:org/set/b.csv@{first}'),
                      ('hf:org/set/a.csv', '/data/a.csv')):
    assert hub.pinned_as(name, began, hub.DATASET, '') == f'hf:org/set/a.csv@{other}'


def test_data(served):
  """One file, those of a pattern, or the only one that there is; nothing else is fetched."""
  served.push('datasets/org/set', {'README.md': b'#', 'data/a.csv': b'1', 'data/b.csv': b'2', 'deep/er/c.jsonl': b'3'})
  served.push('datasets/org/one', {'README.md': b'#', 'a.txt': b'', 'data/a.csv': b'4'})
  of = lambda name: hub.data(name, 'tasks.files.gsm8k=', ENDINGS)
  with open(of('hf:org/set/data/b.csv')) as file:
    assert file.read() == '2' and served.fetched() == ['data/b.csv']
  assert of('hf:org/set/data/*.csv').endswith('/data/*.csv')
  assert sorted(served.fetched()) == ['data/a.csv', 'data/b.csv']
  with open(of('hf:org/one')) as file:
    assert file.read() == '4'
  for name, said in (
      ('hf:org/set', r"^tasks.files.gsm8k='hf:org/set' says no file, and .* has \['data/a.csv', 'data/b.csv', 'dee"),
      ('hf:org/set/d.csv', r"has no file 'd.csv'; it has \['data/a.csv', 'data/b.csv', 'deep/er/c.jsonl'\]"),
      ('hf:org/two', 'org/two is not on the hub, or private'), ('hf:org/set/data/a.csv@v2', "has no revision 'v2'")):
    with pytest.raises(ValueError, match=said):
      of(name)
  served.gated.add('datasets/org/set')
  with pytest.raises(ValueError, match='org/set is gated: ask for access at https://huggingface.co/datasets/org/set'):
    of('hf:org/set/deep/er/c.jsonl')


def test_what_is_in_the_cache_needs_no_hub(served, monkeypatch):
  commit = served.push('datasets/org/set', {'a.csv': b'1', 'b.csv': b'2'})
  path = hub.data(hub.pin('hf:org/set/a.csv', hub.DATASET, ''), '', ENDINGS)
  monkeypatch.setattr(hub_lib.constants, 'ENDPOINT', 'http://127.0.0.1:9')
  assert hub.pin('hf:org/set/a.csv', hub.DATASET, '') == f'hf:org/set/a.csv@{commit}'
  assert hub.data(f'hf:org/set/a.csv@{commit}', '', ENDINGS) == path
  assert 'a.csv' in hub.names(f'hf:org/set@{commit}', hub.DATASET, '')
  with pytest.raises(ValueError, match='is not in the cache and the hub cannot be reached'):
    hub.data('hf:org/other/a.csv', '', ENDINGS)
