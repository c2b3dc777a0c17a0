"""The record of a run whose workdir is in a bucket."""

import errno
import json
import os
import pathlib
import threading

import jax
import numpy as np
import pytest

from kr_jax import files
from kr_jax import mirror
from kr_jax import processes
from kr_jax.record import lock


@pytest.fixture
def scratch(tmp_path, monkeypatch):
  """The directory of temporary files."""
  (tmp_path / 'scratch').mkdir()
  monkeypatch.setattr(mirror.tempfile, 'tempdir', str(tmp_path / 'scratch'))
  return tmp_path / 'scratch'


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(mirror, 'WAITS_S', (.01, .01))


def held(url):
  return {name: files.read(f'{url}/{name}').decode() for name in files.listed(url)}


def test_a_workdir_of_this_machine(tmp_path):
  with mirror.opened(tmp_path) as place:
    assert place.path == place.url == mirror.url(tmp_path) == str(tmp_path)
    place.push()
    mirror.push()
  with pytest.raises(ValueError, match='new is no directory; train first'):
    with mirror.opened(tmp_path / 'new'):
      pass
  with mirror.opened(tmp_path / 'new', create=True) as place:
    assert not os.path.exists(place.path)


def test_a_record_is_fetched_and_what_has_changed_is_sent(bucket, storage, scratch):
  url = f'{bucket}/runs/one'
  for name in ('config.json', 'metrics.jsonl', 'rollouts/1', 'checkpoints/4/x', 'warm_start/checkpoints/x',
               'export/model', 'profile/trace', 'gone'):
    files.write(f'{url}/{name}', name)
  with mirror.opened(f'{url}/') as place:
    path = pathlib.Path(place.path)
    assert path.name == 'one' and path.parent.parent == scratch and mirror.url(path) == url
    found = {str(file.relative_to(path)) for file in path.rglob('*') if file.is_file()}
    assert found == {'config.json', 'metrics.jsonl', 'rollouts/1', 'gone'}
    storage.requests.clear()
    place.push()
    assert not storage.requests
    with open(path / 'metrics.jsonl', 'a') as file:
      file.write(' and more')
    files.write(path / 'plots' / 'x.png', 'new')
    (path / 'half.tmp').write_text('')
    (path / 'gone').unlink()
    mirror.push()
    assert len(storage.requests) == 3
    assert held(url)['metrics.jsonl'] == 'metrics.jsonl and more'
    (path / 'summary.json').write_text('last')
  found = held(url)
  assert found['summary.json'] == 'last' and found['plots/x.png'] == 'new' and found['checkpoints/4/x']
  assert not {'gone', 'half.tmp'} & set(found) and not os.listdir(scratch)


def test_what_is_open_is_opened_again_as_it_is(bucket, scratch):
  with mirror.opened(f'{bucket}/run', create=True) as place:
    files.write(f'{place.path}/x', 'x')
    for again in (f'{bucket}/run/', place.path):
      with mirror.opened(again) as inner:
        assert inner is place
    with pytest.raises(ValueError, match=f'^--workdir={bucket}/run holds another'):
      with mirror.opened(place.path) as inner:
        raise ValueError(f'--workdir={inner.path} holds another')
    assert not files.listed(f'{bucket}/run')
  assert held(f'{bucket}/run') == {'x': 'x'}
  with pytest.raises(ValueError, match=f'{bucket}/other holds nothing; train first'):
    with mirror.opened(f'{bucket}/other'):
      pass


def test_an_error_leaves_with_the_record_sent_and_names_the_bucket(bucket, scratch):
  with pytest.raises(SystemExit, match=f'stopped; see {bucket}/run/x'):
    with mirror.opened(f'{bucket}/run', create=True) as place:
      files.write(f'{place.path}/x', 'x')
      raise SystemExit(f'stopped; see {place.path}/x')
  assert held(f'{bucket}/run') == {'x': 'x'} and not os.listdir(scratch)


def test_nothing_is_sent_where_another_run_is(bucket, scratch):
  with pytest.raises(lock.Lost), mirror.opened(f'{bucket}/run', create=True) as place:
    files.write(f'{place.path}/x', 'x')
    raise lock.Lost('the lock was taken')
  assert held(f'{bucket}/run') == {} and os.listdir(scratch)


def test_the_record_is_sent_in_the_background(bucket, monkeypatch, scratch):
  monkeypatch.setattr(mirror, 'EVERY_S', .02)
  sent, write = threading.Event(), files.write

  def noted(path, content):
    write(path, content)
    if files.is_remote(path):
      sent.set()

  monkeypatch.setattr(files, 'write', noted)
  with mirror.opened(f'{bucket}/run', create=True) as place:
    files.write(f'{place.path}/x', 'x')
    assert sent.wait(20)
    assert held(f'{bucket}/run') == {'x': 'x'}


def test_a_bucket_that_fails_at_times(bucket, storage, scratch, monkeypatch, caplog):
  """What fails is tried again, and said once."""
  with mirror.opened(f'{bucket}/run', create=True) as place:
    for text in ('one', 'two'):
      storage.fail(403, 'POST', times=1, message='at times')
      files.write(f'{place.path}/x', text)
      place.push()
      assert held(f'{bucket}/run') == {'x': text}
  assert [record.getMessage() for record in caplog.records if 'at times' in record.getMessage()] == [
      f'the record is not copied to {bucket}/run: {bucket}/run/x: no permission (Forbidden: '
      f'{storage.url}/upload/storage/v1/b/{bucket[5:]}/o at times): grant the account that runs this the role Storage '
      f'Object Admin on {bucket}, or create the machine with --scopes=cloud-platform. It is tried again']


def test_a_bucket_that_fails_for_good(bucket, storage, scratch, caplog):
  """The record stays on this machine; an error of the run goes before that of its copy."""
  with pytest.raises(files.Unsaved, match=f'cannot be copied to {bucket}/run: .*It stays in {scratch}') as error:
    with mirror.opened(f'{bucket}/run', create=True) as place:
      files.write(f'{place.path}/x', 'x')
      storage.fail(403, 'POST')
  assert pathlib.Path(place.path, 'x').read_text() == 'x' and place.path in str(error.value)
  with pytest.raises(FloatingPointError, match=f'^loss is nan; the record .* {bucket}/other: .*It stays in {scratch}'):
    with mirror.opened(f'{bucket}/other', create=True) as place:
      files.write(f'{place.path}/x', 'x')
      raise FloatingPointError('loss is nan')
  assert pathlib.Path(place.path, 'x').exists()
  with pytest.raises(KeyboardInterrupt):
    with mirror.opened(f'{bucket}/other', create=True) as place:
      files.write(f'{place.path}/x', 'x')
      raise KeyboardInterrupt
  assert f'It stays in {place.path}' in caplog.text
  storage.fail(403)
  kept = os.listdir(scratch)
  with pytest.raises(ValueError, match='no permission'):
    with mirror.opened(f'{bucket}/run', create=True):
      pass
  assert os.listdir(scratch) == kept


def test_a_bucket_that_is_gone(bucket, scratch, monkeypatch):
  """Nothing is taken for sent."""
  write, gone = files.write, FileNotFoundError(f'{bucket}: there is nothing of this name, or no bucket')
  with pytest.raises(files.Unsaved, match=f'{bucket}: there is nothing of this name, or no bucket. It stays in'):
    with mirror.opened(f'{bucket}/run', create=True) as place:
      write(f'{place.path}/x', 'x')
      monkeypatch.setattr(files, 'write', lambda *_: (_ for _ in ()).throw(gone))
  assert pathlib.Path(place.path, 'x').exists()


def test_what_another_program_clears_stays_in_the_bucket(bucket, scratch):
  with mirror.opened(f'{bucket}/run', create=True) as place:
    for name in ('config.json', 'old', 'older'):
      files.write(f'{place.path}/{name}', name)
    place.push()
    os.remove(f'{place.path}/older')  # by the run
    place.push()
    assert set(held(f'{bucket}/run')) == {'config.json', 'old'}
    for name in os.listdir(place.path):
      os.remove(f'{place.path}/{name}')
    files.write(f'{place.path}/new', 'new')
  assert set(held(f'{bucket}/run')) == {'config.json', 'old', 'new'}


def test_a_thread_that_reads_a_run_at_work(bucket, scratch):
  """It has a directory of its own, whose end changes nothing for the run, whichever is opened first."""
  files.write(f'{bucket}/run/config.json', '{}')
  reads, may_end, found = threading.Event(), threading.Event(), []

  def read():
    with mirror.opened(f'{bucket}/run') as place:
      found.append((place.path, mirror.url(place.path)))
      reads.set()
      may_end.wait(20)

  thread = threading.Thread(target=read)
  thread.start()
  assert reads.wait(20)
  with mirror.opened(f'{bucket}/run') as place:
    may_end.set()
    thread.join()
    assert found[0] == (found[0][0], f'{bucket}/run') and found[0][0] != place.path
    files.write(f'{place.path}/x', 'x')
    mirror.push()
    assert held(f'{bucket}/run') == {'config.json': '{}', 'x': 'x'}
  assert not os.listdir(scratch)


def test_no_place_on_this_machine(bucket, scratch, monkeypatch):
  monkeypatch.setattr(files, 'listed', lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
  with pytest.raises(KeyboardInterrupt):
    with mirror.opened(f'{bucket}/run', create=True):
      pass
  assert not os.listdir(scratch)
  full = OSError(errno.ENOSPC, 'No space left on device', str(scratch / 'x'))
  monkeypatch.setattr(files, 'listed', lambda _: (_ for _ in ()).throw(full))
  with pytest.raises(ValueError, match=f'^the record of {bucket}/run cannot be written: the disk of .*full .*TMPDIR'):
    with mirror.opened(f'{bucket}/run', create=True):
      pass
  assert not os.listdir(scratch)
  scratch.rmdir()
  with pytest.raises(ValueError, match=f'the record of {bucket}/run has no place on this machine: .*set TMPDIR'):
    with mirror.opened(f'{bucket}/run', create=True):
      pass


def test_other_processes_fetch_the_config_and_send_nothing(bucket, scratch, monkeypatch):
  for name in ('config.json', 'metrics.jsonl'):
    files.write(f'{bucket}/run/{name}', name)
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(processes, 'is_first', lambda: False)
  with mirror.opened(f'{bucket}/run') as place:
    assert os.listdir(place.path) == ['config.json']
    files.write(f'{place.path}/x', 'x')
    mirror.push()
  assert set(held(f'{bucket}/run')) == {'config.json', 'metrics.jsonl'} and not os.listdir(scratch)


def test_an_output(bucket, tmp_path, scratch):
  with mirror.output(tmp_path / 'here') as path:
    assert path == str(tmp_path / 'here')
  url = f'{bucket}/export'
  for names in (['config.json', 'a'], ['config.json', 'b']):
    with mirror.output(url, mark='mark') as path:
      for name in names:
        files.write(f'{path}/{name}', names[-1])
      files.write(f'{path}/mark', json.dumps({'files': [*names, 'mark']}))
    mine = set(found := held(url)) - {*names, 'mark'}
    assert mine == ({'mine'} if names[-1] == 'b' else set()) and found['config.json'] == names[-1]
    files.write(f'{url}/mine', 'of the user')
  with mirror.output(url) as path:
    files.write(f'{path}/report.html', 'page')
  assert set(held(url)) == {'config.json', 'mark', 'mine', 'b', 'report.html'} and not os.listdir(scratch)
  with pytest.raises(ValueError, match=f'{bucket}/new cannot be written: .*full.*; it is put together in {scratch}'):
    with mirror.output(f'{bucket}/new', mark='mark'):
      raise OSError(errno.ENOSPC, 'full')
  files.write(f'{url}/mark', '[]')
  with pytest.raises(ValueError, match=f'{url}/mark is not the list of files that this command wrote'):
    with mirror.output(url, mark='mark'):
      pass
  files.write(f'{bucket}/other/x', 'x')
  with pytest.raises(ValueError, match=r"other holds \['x'\], which were not written by this command"):
    with mirror.output(f'{bucket}/other', mark='mark'):
      pass


def test_processes_that_do_not_share_a_directory(tmp_path, monkeypatch):
  """Process 1 of host b is asked for by hand: it finds what process 0 writes, or does not."""
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  sees, gathered = True, []

  def gather(x):
    other = np.array(sees) if x.shape == () and x.dtype == bool and len(gathered) == 2 else (
        np.frombuffer(b'b'.ljust(64, b'\0'), np.uint8) if x.shape == (64,) else x)
    gathered.append(x)
    return np.stack([x, other])

  monkeypatch.setattr(processes, 'gather', gather)
  monkeypatch.setattr(mirror.socket, 'gethostname', lambda: 'a')
  mirror.check_shared(str(tmp_path / 'run'))
  assert len(gathered) == 4 and not os.listdir(tmp_path / 'run')
  sees = False
  gathered.clear()
  with pytest.raises(ValueError, match=r'process 1 \(b\) does not see what process 0 \(a\) writes to .*/run: .*gs://'):
    mirror.check_shared(str(tmp_path / 'run'))
  (tmp_path / 'file').write_text('')
  gathered.clear()
  with pytest.raises(ValueError, match='Not a directory|File exists'):
    mirror.check_shared(str(tmp_path / 'file'))
