"""One run works in a directory, a dead one keeps nothing, and a refusal says who is in."""

import json
import os
import subprocess
import sys

import pytest

from kr_jax import files
from kr_jax.record import lock

HOLDS = '''
import sys, time
from kr_jax.record import lock
with lock.held(sys.argv[1], '--workdir=' + sys.argv[1]):
  if len(sys.argv) > 2:  # a child that outlives it
    import subprocess
    subprocess.Popen(['sleep', '30'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  print('in', flush=True)
  time.sleep(30)
'''


def held_by_another(directory, *arguments):
  """A process that holds the lock of a directory."""
  process = subprocess.Popen([sys.executable, '-c', HOLDS, str(directory), *arguments], text=True,
                             stdout=subprocess.PIPE)
  assert process.stdout.readline() == 'in\n'
  return process


def take(directory) -> None:
  with lock.held(str(directory), f'--workdir={directory}'):
    pass


def test_of_a_directory_until_its_holder_dies(tmp_path):
  """Whatever of its children lives on."""
  with held_by_another(tmp_path / 'run', 'child') as process:
    try:
      with pytest.raises(ValueError, match=rf'^--workdir={tmp_path}/run is in use by a run: process {process.pid} on '
                         rf'.*, which began at 20.* UTC\. Wait for its end, stop it \(kill {process.pid} on .*\), or name '
                         'another --workdir$'):
        take(tmp_path / 'run')
      assert files.read(tmp_path / 'run' / 'lock')  # a refusal leaves it as it is
    finally:
      process.kill()
  take(tmp_path / 'run')
  assert not (tmp_path / 'run' / 'lock').exists()


def test_leaves_no_trace(tmp_path):
  take(tmp_path / 'a' / 'b')
  assert not (tmp_path / 'a').exists()
  with lock.held(tmp_path / 'a' / 'b', ''):
    (tmp_path / 'a' / 'file').touch()
  assert [x.name for x in (tmp_path / 'a').iterdir()] == ['file']


def test_a_process_may_hold_it_more_than_once(tmp_path):
  (tmp_path / 'link').symlink_to(tmp_path)
  with lock.held(tmp_path, 'a'):
    with lock.held(f'{tmp_path}/link/', 'b'):
      pass
    assert (tmp_path / 'lock').exists()
    assert lock.Holder.read((tmp_path / 'lock').read_bytes()).pid == os.getpid()
    lock.check()
  assert not (tmp_path / 'lock').exists()


def test_a_file_that_was_removed_is_no_lock(tmp_path):
  """Whoever opened it before looks for the one that is there now."""
  number = os.open(tmp_path / 'lock', os.O_RDWR | os.O_CREAT)
  assert lock._is_still(tmp_path / 'lock', number)
  os.remove(tmp_path / 'lock')
  assert not lock._is_still(tmp_path / 'lock', number)
  (tmp_path / 'lock').touch()
  assert not lock._is_still(tmp_path / 'lock', number)
  os.close(number)


def test_where_no_lock_can_be_made_none_is_held(tmp_path, monkeypatch, caplog):
  (tmp_path / 'file').touch()
  take(tmp_path / 'file')
  take(tmp_path / 'file' / 'run')
  assert not caplog.text

  def flock(*_):
    raise OSError(lock.errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(lock.fcntl, 'flock', flock)
  take(tmp_path / 'run')
  assert 'keeps no locks (No locks available): see to it that no two runs work there' in caplog.text


def test_who_is_dead():
  own = lock.Holder.own()
  assert own.is_alive() and not own.is_dead() and lock.Holder.read(json.dumps(own._asdict()).encode()) == own
  for gone in (own._replace(ticks=own.ticks + 1), own._replace(pid=2 ** 22 + 1)):
    assert gone.is_dead() and not gone.is_alive()
  for elsewhere in ({'host': 'another'}, {'boot': 'another'}, {'namespace': 'of a container'}):
    unknown = own._replace(pid=2 ** 22 + 1, **elsewhere)
    assert not unknown.is_dead() and not unknown.is_alive()
  for content in (b'', b'[]', b'{"pid": 3}', b'\xff'):
    assert lock.Holder.read(content) is None


def left(url, **changed) -> lock.Holder:
  """A lock in a bucket as another process leaves it."""
  holder = lock.Holder.own()._replace(token='other', **changed)
  files.write(f'{url}/lock', json.dumps(holder._asdict()))
  return holder


@pytest.fixture
def fast(monkeypatch):
  for name, value in (('_RENEWED_S', .05), ('_EXPIRES_S', .6), ('_LOOK_S', .1)):
    monkeypatch.setattr(lock, name, value)


@pytest.mark.slow
def test_of_a_bucket(bucket, fast):
  url = f'{bucket}/run'
  with lock.held(url, ''):
    first = files.read(f'{url}/lock')
    with lock.held(f'{url}/', ''):
      pass
    assert lock.Holder.read(first).pid == os.getpid()
    while files.read(f'{url}/lock') == first:  # it is renewed
      pass
  assert files.missing(f'{url}/lock')


def test_of_a_bucket_whose_holder_lives(bucket, fast):
  holder = left(f'{bucket}/run')  # this process, which is alive
  with pytest.raises(ValueError, match=f'--workdir={bucket}/run is in use by a run: process {holder.pid} on'):
    take(f'{bucket}/run')
  assert lock.Holder.read(files.read(f'{bucket}/run/lock')) == holder


def test_of_a_bucket_whose_holder_elsewhere_renews_it(bucket, fast, monkeypatch):
  looks, look = [], lock._Object._look

  def renewed(self):
    left(f'{bucket}/run', host='elsewhere', started=f'{len(looks)}')
    looks.append(1)
    return look(self)

  left(f'{bucket}/run', host='elsewhere')
  monkeypatch.setattr(lock._Object, '_look', renewed)
  with pytest.raises(ValueError, match=rf'is in use by a run: process {os.getpid()} on elsewhere'):
    take(f'{bucket}/run')


@pytest.mark.parametrize('gone, waits', [({'ticks': 1}, False), ({'host': 'elsewhere'}, True)])
def test_of_a_bucket_whose_holder_is_gone(bucket, fast, caplog, gone, waits):
  """At once where it was of this host; else when it was not renewed for a while, by the bucket's clock."""
  left(f'{bucket}/run', **gone)
  with lock.held(f'{bucket}/run', '--workdir=X'):
    assert lock.Holder.read(files.read(f'{bucket}/run/lock')).is_alive()
  assert ('may be in use by a run' in caplog.text) == waits
  assert '--workdir=X was left by a run that ended without a word: process' in caplog.text


def test_two_that_find_an_old_lock_do_not_both_take_it(bucket, fast):
  """What one found is removed by no other once it is another's."""
  left(f'{bucket}/run', host='elsewhere')
  mine = lock._Object(f'{bucket}/run/lock', lock.Holder.own())
  seen = mine._look()
  holder = left(f'{bucket}/run')
  mine._remove(seen.generation)
  assert not mine._create() and lock.Holder.read(files.read(f'{bucket}/run/lock')) == holder


def test_a_lock_that_another_took_is_lost(bucket, fast):
  with lock.held(f'{bucket}/run', ''):
    lock.check()
    left(f'{bucket}/run', host='elsewhere')
    (_, held), = lock._held.values()
    held._thread.join(5)
    with pytest.raises(lock.Lost, match='lock was taken by another run: process .* on elsewhere'):
      lock.check()
  assert lock.Holder.read(files.read(f'{bucket}/run/lock')).host == 'elsewhere'


def test_a_bucket_that_cannot_be_written_is_left_to_whoever_writes_there(bucket, storage):
  storage.fail(403, 'POST')
  take(f'{bucket}/run')


def test_what_tells_no_date():
  assert lock._date({'mtime': 1.5}) is lock._date({'updated': 'then'}) is lock._date({}) is None
