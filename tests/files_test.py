"""Files of this machine and of buckets, by one name."""

import os
import pathlib

import pytest

from kr_jax import files


def put(url, **content):
  for name, text in content.items():
    files.write(f'{url}/{name.replace("__", "/")}.txt', text)


def test_paths(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert [files.expanded(path) for path in ('~/runs/', 'runs', '/', '', 'gs://b/run/', 'gs://')] == [
      '/home/me/runs', 'runs', '/', '', 'gs://b/run', 'gs://']
  assert files.expanded(pathlib.Path('gs://b/run')) == 'gs://b/run' and files.expanded('/gs:/b') == '/gs:/b'
  assert files.is_remote('gs://b/x') and not files.is_remote('/gs:/b/x')
  assert (files.join('gs://b', 'x', 'y'), files.join('/b', 'x')) == ('gs://b/x/y', '/b/x')


def test_a_file_is_written_whole_or_not_at_all(tmp_path, bucket, monkeypatch):
  for place in (str(tmp_path / 'a' / 'b'), f'{bucket}/a/b'):
    files.write(f'{place}/x', 'one')
    files.write(f'{place}/x', b'two')
    assert files.read(f'{place}/x') == b'two'
    assert files.missing(f'{place}/x') is files.missing(place) is None
    assert files.missing(f'{place}/y') == f'{place}/y is not there'
    with pytest.raises(FileNotFoundError):
      files.read(f'{place}/y')
  monkeypatch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(OSError('full')))
  with pytest.raises(OSError, match='full'):
    files.write(tmp_path / 'a' / 'b' / 'x', 'three')
  assert os.listdir(tmp_path / 'a' / 'b') == ['x']


def test_what_a_bucket_holds(bucket):
  put(bucket, run__a='1', run__deep__b='22', run2__c='3')
  found = files.listed(f'{bucket}/run/')
  assert {name: file.size for name, file in found.items()} == {'a.txt': 1, 'deep/b.txt': 2}
  assert list(files.listed(f'{bucket}/run/a.txt')) == [''] and not files.listed(f'{bucket}/ru')
  assert set(files.listed(bucket)) == {'run/a.txt', 'run/deep/b.txt', 'run2/c.txt'}
  put(bucket, run__a='1')
  assert files.listed(f'{bucket}/run')['a.txt'].version != found['a.txt'].version
  files.remove(f'{bucket}/run/a.txt')
  files.remove(f'{bucket}/run/a.txt')
  assert list(files.listed(f'{bucket}/run')) == ['deep/b.txt']


def test_a_copy_is_made_once_and_anew_when_its_source_is(bucket, storage, capfd):
  put(bucket, data__a='1', data__b='2')
  here = files.local(f'{bucket}/data')
  assert sorted(os.listdir(here)) == ['a.txt', 'b.txt'] and os.path.basename(here) == 'data'
  assert capfd.readouterr().err == f'{bucket}/data: fetching a.txt\n{bucket}/data: fetching b.txt\n'
  asked = len(storage.requests)
  assert files.local(f'{bucket}/data') == here
  assert len(storage.requests) == asked + 1 and not capfd.readouterr().err
  put(bucket, data__a='3')
  newer = files.local(f'{bucket}/data')
  assert files.read(f'{newer}/a.txt') == b'3' and not os.path.exists(here)
  assert files.local('~/x') == os.path.expanduser('~/x')


def test_a_copy_without_what_a_kill_left_of_it(bucket, monkeypatch):
  put(bucket, data__a='1', data__b='2')
  fetch = files.fetch

  def killed(url, path, file):
    if path.endswith('b.txt'):
      files.write(f'{path}.0a1b2c3d.tmp', 'half')
      raise KeyboardInterrupt
    fetch(url, path, file)

  monkeypatch.setattr(files, 'fetch', killed)
  with pytest.raises(KeyboardInterrupt):
    files.local(f'{bucket}/data')
  monkeypatch.setattr(files, 'fetch', fetch)
  assert sorted(os.listdir(files.local(f'{bucket}/data'))) == ['a.txt', 'b.txt']


def test_a_copy_that_is_not_what_the_bucket_says_is_refused(bucket, tmp_path, monkeypatch):
  """Short reads and other bytes of the same length, of a file and of a directory; nothing of it is left to be taken."""
  put(bucket, data__a='12345')
  url, file, here = f'{bucket}/data/a.txt', files.listed(f'{bucket}/data')['a.txt'], tmp_path / 'new' / 'a'
  for wrong, why in ((file._replace(size=6), '5 bytes came, of 6'), (file._replace(md5='00=='), 'its checksum is')):
    with pytest.raises(OSError, match=f'{url}: {why}.*try again'):
      files.fetch(url, str(here), wrong)
  assert os.listdir(here.parent) == []
  call = files._call

  def short(url, method, *arguments, **named):
    found = call(url, method, *arguments, **named)
    if method == 'get_file':
      os.truncate(arguments[1], 3)
    return found

  for get in (lambda: files.local(f'{bucket}/data'),
              lambda: files.fetch_all(f'{bucket}/data', str(tmp_path / 'all'), last='a.txt')):
    monkeypatch.setattr(files, '_call', short)
    with pytest.raises(ValueError, match='3 bytes came, of 5'):
      get()
    monkeypatch.setattr(files, '_call', call)
    get()
  assert files.read(f'{files.local(f"{bucket}/data")}/a.txt') == files.read(tmp_path / 'all' / 'a.txt') == b'12345'


def test_some_of_a_directory_or_a_single_file(bucket):
  put(bucket, a1='1', a2='2', b='3', deep__a3='4')
  found = files.local(f'{bucket}/a?.txt')
  assert found.endswith('/a?.txt') and sorted(os.listdir(os.path.dirname(found))) == ['a1.txt', 'a2.txt']
  assert files.read(files.local(f'{bucket}/b.txt')) == b'3'
  assert os.listdir(files.local(bucket, lambda name: name == 'b.txt')) == ['b.txt']
  assert files.missing(f'{bucket}/a?.txt') is None and 'not there' in files.missing(f'{bucket}/c?.txt')
  with pytest.raises(ValueError, match=f'{bucket}/c is not there'):
    files.local(f'{bucket}/c')


def test_a_directory_is_there_once_its_last_file_is(tmp_path, bucket):
  for name in ('first', 'last'):
    files.write(tmp_path / 'made' / 'deep' / name, name)
  files.fetch_all(f'{bucket}/data', str(tmp_path / 'fetched'), last='deep/last')
  files.write(f'{bucket}/data/deep/first', 'half')
  files.fetch_all(f'{bucket}/data', str(tmp_path / 'fetched'), last='deep/last')
  assert not (tmp_path / 'fetched').exists()
  files.send_all(str(tmp_path / 'made'), f'{bucket}/data', last='deep/last')
  files.fetch_all(f'{bucket}/data', str(tmp_path / 'fetched'), last='deep/last')
  assert (tmp_path / 'fetched' / 'deep' / 'first').read_text() == 'first'
  assert os.listdir(tmp_path) and not [name for name in os.listdir(tmp_path) if name.endswith('.tmp')]


def test_a_directory_that_can_be_written(tmp_path, bucket):
  assert files.unwritable(tmp_path / 'new') is files.unwritable(f'{bucket}/new') is None
  assert not os.listdir(tmp_path / 'new') and not files.listed(bucket)
  (tmp_path / 'file').write_text('')
  assert files.unwritable(tmp_path / 'file' / 'run') == f'{tmp_path}/file/run: Not a directory'


@pytest.mark.parametrize('status, pattern, message, why', [
    (403, '', 'Caller does not have storage.objects.create', 'no permission .*storage.objects.create.*Object Admin'),
    (401, '', 'Anonymous caller does not have access', 'no credentials .*gcloud auth application-default login'),
    (404, '', 'The specified bucket does not exist.', 'there is nothing of this name, or no bucket'),
    (403, 'GET /storage/v1/b/[^/]*$', 'does not have storage.buckets.get', "the role 'Storage Legacy Bucket Reader'"),
])
def test_why_a_bucket_cannot_be_written(bucket, storage, status, pattern, message, why):
  storage.fail(status, pattern, message=message)
  problem = files.unwritable(f'{bucket}/run')
  assert problem.startswith(f'{bucket}/run: ') and '\n' not in problem
  with pytest.raises(ValueError, match=why):
    raise ValueError(problem)


def test_why_a_bucket_does_not_answer(bucket, storage, monkeypatch):
  """A fault that passes is waited for; one that stays is told of within seconds."""
  storage.fail(503, times=1)
  assert files.unwritable(bucket) is None and not storage.faults[0].times
  monkeypatch.setattr(files, 'LOOK_S', .2)
  storage.fail(503)
  assert files.unwritable(bucket) == (
      f'{bucket}: no answer within 0.2 s: look at the network of this machine, or try again')


def test_what_is_not_installed_or_unknown(bucket, monkeypatch):
  def raises(*_, **__):
    raise ImportError('Please install gcsfs')

  assert 'nowhere:// is no kind of bucket' in files.missing('nowhere://x/y')
  files.client.cache_clear()
  monkeypatch.setattr('fsspec.filesystem', raises)
  assert files.unwritable(bucket) == f"{bucket}: gcsfs is not installed: pip install 'kr_jax[gcs]'"
