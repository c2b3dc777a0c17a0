"""Disks that are full, read-only or gone: what is said of them, and what a run does."""

import ctypes
import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import types

import pytest

from kr_jax import disks
from kr_jax import files
from kr_jax import mirror
from kr_jax.record import ledger
from kr_jax.record import metrics
from kr_jax.record import sinks

ROOT = os.path.dirname(os.path.dirname(__file__))
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def disk(tmp_path):
  """A function (kB) -> a directory that is a disk of that size."""
  mounted = []

  def disk(kb):
    path = tmp_path / f'disk{len(mounted)}'
    path.mkdir()
    if LIBC.mount(b'tmpfs', os.fsencode(path), b'tmpfs', 0, f'size={kb}k'.encode()):
      pytest.skip('a disk of its own cannot be mounted here')
    mounted.append(path)
    return path

  yield disk
  for path in mounted:
    LIBC.umount2(os.fsencode(path), 2)  # MNT_DETACH


def fill(path) -> str:
  """Leaves nothing free on the disk of a directory, and returns the file that holds it."""
  name = os.path.join(path, 'ballast')
  file = os.open(name, os.O_WRONLY | os.O_CREAT)
  for size in (2 ** 16, 2 ** 12):
    try:
      while os.write(file, b'x' * size):
        pass
    except OSError:
      pass
  os.close(file)
  return name


def tensorstore(number):
  return ValueError(f'RESOURCE_EXHAUSTED: Error writing "params/0.0" in OCDBT database: Failed writing: '
                    f'"/w/run/4/d/25ab": Failed to write 39 bytes to file 11: {os.strerror(number)} '
                    f'[os_error_code=\'{number}\' x=\'y\']')


@pytest.mark.parametrize('number, why, todo', [
    (errno.ENOSPC, r'the disk of /w/run is full \(.* of .* free now\)', 'Free some room there'),
    (errno.EDQUOT, 'the quota on the disk of /w/run is used up', 'Remove files of yours there'),
    (errno.EFBIG, 'a file in /w/run would be larger', 'Look at `ulimit -f`'),
    (errno.EROFS, 'the disk of /w/run can only be read', 'Mount it so that it can be written'),
    (errno.EMFILE, 'this process has as many files open as it may', 'Raise `ulimit -n`'),
    (errno.EISDIR, '/w/run/4.* is a directory, where a file belongs', 'Move it away'),
    (errno.EIO, 'the disk of /w/run fails', 'Look at `dmesg`'),
    (errno.ENOENT, 'what /w/run held is not there any more: it was removed', 'Put back what it held'),
    (errno.ESTALE, 'what /w/run held is not there any more', 'Put back what it held'),
    (errno.EACCES, '/w/run may not be written any more', 'Look at its owner and permissions')])
def test_what_an_error_of_a_disk_means(number, why, todo):
  """Of the system, of a library that puts it into a text, and of one that was raised while that was handled."""
  inner = OSError(number, os.strerror(number), '/w/run/4')
  outer = RuntimeError('a thread failed')
  outer.__cause__ = inner
  for error in (inner, tensorstore(number), outer, ExceptionGroup('some', [inner])):
    found = disks.explained(error, '/w/run')
    assert isinstance(found, files.Unsaved) and not found.again
    text = f'the record cannot be written: {why}.*\\. {todo}.*, and give the same command again'
    assert re.fullmatch(text, str(found)), str(found)
  assert files.explained(found, '/w') is found


def test_what_is_no_error_of_a_disk_stays(tmp_path):
  bugs = [ValueError('no'), OSError(errno.EPIPE, 'x'), FileNotFoundError(errno.ENOENT, 'x', '/elsewhere/data'),
          PermissionError(errno.EACCES, 'x', '/elsewhere/data'), RuntimeError('a verifier: Permission denied'),
          KeyError('No space'),
          FileNotFoundError(errno.ENOENT, 'x', str(tmp_path / 'file')),
          RuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 10 bytes')]
  assert [disks.explained(bug, str(tmp_path)) for bug in bugs] == bugs
  bug = ValueError('ours')
  try:
    try:
      raise OSError(errno.ENOSPC, 'full', str(tmp_path))
    except OSError:
      raise bug from None
  except ValueError:
    assert disks.explained(bug, str(tmp_path)) is bug
  made_anew = tensorstore(errno.ENOENT)
  made_anew.args = (str(made_anew).replace('/w/run', str(tmp_path)),)
  assert 'is not there any more' in str(disks.explained(made_anew, str(tmp_path)))
  full = OSError(errno.ENOSPC, 'full')
  assert files.explained(full, 'gs://bucket/run') is full and files.free_bytes('gs://bucket/run') is None


def test_where_the_room_is_missing(tmp_path, monkeypatch):
  """The disk of the file that an error names; and where it names none, and the run's own has room, no disk is named."""
  full = OSError(errno.ENOSPC, 'full', '/elsewhere/data/x')
  assert 'the disk of /elsewhere/data is full' in str(disks.explained(full, str(tmp_path), 'the data'))
  assert 'a checkpoint cannot be written' in str(disks.explained(full, str(tmp_path), 'a checkpoint', 15 * 10 ** 8))
  assert 'it needs 1.5 GB' in str(disks.explained(full, str(tmp_path), 'a checkpoint', 15 * 10 ** 8))
  full = OSError(errno.ENOSPC, 'full')
  for free, why in ((10, f'the disk of {tmp_path} is full'),
                    (2 ** 40, f'a disk is full, though that of {tmp_path} is not')):
    monkeypatch.setattr(disks, 'free_bytes', lambda path: free)
    assert why in str(disks.explained(full, str(tmp_path)))


def test_room_for_checkpoints(monkeypatch):
  found = {}
  for free in (None, 20, 19, 10, 9):
    monkeypatch.setattr(disks, 'free_bytes', lambda path: free)
    found[free] = disks.lacking('/w', 10)
  assert found[None] == found[20] == (None, None)
  assert found[19][0] is found[10][0] is None
  assert 'takes about 10 bytes, and the disk of /w has 19 bytes free' in found[19][1]
  assert 'two have to fit' in found[10][1] and 'name another disk by --workdir' in found[9][0] and found[9][1] is None


def test_a_file_system_that_tells_no_size_is_not_full(tmp_path, monkeypatch):
  """As some of FUSE, of which 0 of 0 bytes are free."""
  monkeypatch.setattr(disks.shutil, 'disk_usage', lambda path: types.SimpleNamespace(total=0, used=0, free=0))
  assert disks.free_bytes(str(tmp_path)) is None and disks.lacking(str(tmp_path), 10) == (None, None)


def test_the_last_checkpoint(tmp_path):
  assert disks.last_checkpoint(str(tmp_path / 'none')) is None is disks.last_checkpoint(str(tmp_path))
  for name in ('2', '10', '12.orbax-checkpoint-tmp'):
    (tmp_path / name).mkdir()
  (tmp_path / '14').write_text('a file')
  assert disks.last_checkpoint(str(tmp_path)) == 10


def test_free_room(disk):
  path = disk(100)
  assert disks.free_bytes(str(path / 'new' / 'run')) == 100 * 1024
  fill(path)
  assert disks.free_bytes(str(path)) == 0
  assert files.unwritable(path) == f'{path}: No space left on device (0 bytes of 102 kB free)'


def test_a_full_disk_and_then_a_free_one(disk, clock, monkeypatch):
  """Metrics and ledger stop the run in order, whole, and the next start goes on with all that there is."""
  path = disk(64)
  monkeypatch.setattr(sinks, 'of_run', lambda *_: sinks.Sinks({}))
  records = [{'step': i, 'wall_s': i, 'reward_mean': 0.5, 'x': 'x' * 999} for i in range(9)]
  new = lambda: metrics.Writer(str(path), keep=lambda record: True, first_step=0)
  (path / 'config.json').write_text('{}')
  (path / 'checkpoints' / '3').mkdir(parents=True)
  with pytest.raises(files.Unsaved) as error:
    with mirror.opened(path, create=True), new() as writer, ledger.Writer(str(path), clock, 0, {}) as costs:
      writer.write(records[0])
      costs.step(0)
      ballast = fill(path)
      for record in records[1:]:
        writer.write(record)
  assert str(error.value) == (
      f'the record cannot be written: the disk of {path} is full (0 bytes of 65.5 kB free now). Free some room there, '
      f'and give the same command again: it goes on from the checkpoint of step 3 in {path}/checkpoints')
  assert not error.value.again
  kept = metrics.read(str(path / 'metrics.jsonl'))
  assert 1 <= len(kept) < 9 and kept == records[:len(kept)]
  os.remove(ballast)
  with new() as writer, ledger.Writer(str(path), clock, len(kept), {}) as costs:
    assert writer.records == kept and costs.attempt == 1
    writer.write(records[8])
  assert metrics.read(str(path / 'metrics.jsonl')) == [*kept, records[8]]


def test_a_record_on_a_full_disk_stays_as_it_was(disk, monkeypatch):
  """A damaged record that cannot be kept beside the new one, for want of room, stays; nothing is dropped."""
  path = disk(32)
  content = b'garbage\n' + json.dumps({'step': 1, 'x': 'x' * 9999}).encode() + b'\n'
  (path / 'metrics.jsonl').write_bytes(content)
  fill(path)
  with pytest.raises(OSError, match='No space left'):
    metrics.Writer(str(path), keep=lambda record: True, first_step=0)
  assert (path / 'metrics.jsonl').read_bytes() == content and not (path / 'metrics.jsonl.tmp').exists()


def test_a_limit_of_a_files_size(tmp_path, monkeypatch):
  """As `ulimit -f` sets it."""
  monkeypatch.setattr(sinks, 'of_run', lambda *_: sinks.Sinks({}))
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    with pytest.raises(files.Unsaved, match='larger than this process or that disk allows. Look at `ulimit -f`'):
      with mirror.opened(tmp_path, create=True), metrics.Writer(
          str(tmp_path), keep=lambda record: True, first_step=0) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        writer.write({'step': 0, 'x': 'x' * 2000})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_config_says_where_checkpoints_are(tmp_path):
  (tmp_path / 'other' / 'checkpoints' / '7').mkdir(parents=True)
  for directory, text in ((tmp_path / 'other', 'from the checkpoint of step 7 in'),
                          ('gs://b/run', 'from the last checkpoint'),
                          (tmp_path / 'none', 'there is no checkpoint of a step yet')):
    (tmp_path / 'config.json').write_text(json.dumps({'checkpoint': {'directory': str(directory)}}))
    with pytest.raises(files.Unsaved, match=text), mirror.opened(tmp_path, create=True):
      raise OSError(errno.ENOSPC, 'full', str(tmp_path / 'x'))
  with pytest.raises(files.Unsaved, match='^no answer$'), mirror.opened(tmp_path, create=True):  # of a bucket
    raise files.Unsaved('no answer')
  with pytest.raises(OSError, match='full') as error, mirror.opened(tmp_path):  # which reads alone
    raise OSError(errno.ENOSPC, 'full')
  assert not isinstance(error.value, files.Unsaved)


# Whole runs.


def run(workdir, data_dir, *flags, when=None, **options):
  """A run of seconds that is given 60 steps: its exit status, what it said on stderr, and the seconds that it took to
  end after `when`, which is called once there is a checkpoint of step 2."""
  process = subprocess.Popen(
      [sys.executable, '-m', 'kr_jax.main', '--config=configs/arithmetic.py:debug', f'--workdir={workdir}',
       f'--config.tasks.data_dir={data_dir}', '--config.policy.num_layers=1', '--config.mesh.devices=1',
       '--config.warm_start.num_steps=0', '--config.evaluate.every=0', '--config.checkpoint.every=2',
       '--config.record.page=False', '--config.num_steps=60', *flags], cwd=ROOT, text=True, stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE, env=os.environ | {'PYTHONWARNINGS': ''}, **options)
  try:
    began = time.monotonic()
    while when and process.poll() is None and time.monotonic() - began < 300:
      if os.path.isdir(os.path.join(workdir, 'checkpoints', '2')):
        when()
        began = time.monotonic()
        break
      time.sleep(0.05)
    return process.wait(400), process.stderr.read(), time.monotonic() - began
  finally:
    process.kill()
    process.stderr.close()


@pytest.mark.exhaustive
def test_a_run_on_a_disk_that_becomes_full(disk, data_dir):
  """It ends in order within a minute; once there is room the same command goes on with all that was saved."""
  path = disk(20_000)
  workdir = str(path / 'run')
  status, said, seconds = run(workdir, data_dir, when=lambda: fill(path))
  assert status == 1 and seconds < 60 and 'Traceback' not in said, said
  last = said.splitlines()[-1]
  assert last.startswith('error: ') and f'{path}' in last and 'is full (' in last and 'Free some room there' in last
  step = disks.last_checkpoint(os.path.join(workdir, 'checkpoints'))
  assert step >= 2 and f'{workdir}/checkpoints' in last
  before = metrics.read(os.path.join(workdir, 'metrics.jsonl'))
  os.remove(path / 'ballast')
  status, said, _ = run(workdir, data_dir, '--config.num_steps=8')
  assert status == 0, said
  after = metrics.read(os.path.join(workdir, 'metrics.jsonl'))
  kept = [record for record in before if record['step'] < step]
  assert len(kept) >= 2 and after[:len(kept)] == kept
  assert [record['step'] for record in after if 'reward_mean' in record] == [*range(8)]
  said = (path / 'run' / 'log.txt').read_text()
  assert said.count(' start: ') == 2 and said.endswith(' end: done\n')


@pytest.mark.exhaustive
@pytest.mark.parametrize('kb', [16, 60, 250, 400])
def test_a_run_on_a_disk_that_is_too_small(disk, data_dir, kb):
  """At any moment of its start, at its first step and its first checkpoint, wherever there is no room left."""
  workdir = str(disk(kb) / 'run')
  status, said, _ = run(workdir, data_dir)
  last = said.splitlines()[-1]
  assert status == 1 and 'Traceback' not in said and last.startswith('error: ') and 'free' in last, said


@pytest.mark.exhaustive
def test_a_run_whose_workdir_is_removed(tmp_path, data_dir):
  workdir = str(tmp_path / 'run')
  status, said, seconds = run(workdir, data_dir, when=lambda: shutil.rmtree(workdir, ignore_errors=True))
  last = said.splitlines()[-1]
  assert status == 1 and seconds < 60 and 'Traceback' not in said, said
  assert last.startswith('error: ') and 'removed' in last and 'Put back what' in last


@pytest.mark.exhaustive
def test_a_run_whose_files_are_limited(tmp_path, data_dir):
  workdir, limit = str(tmp_path / 'run'), 60_000
  status, said, _ = run(workdir, data_dir, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
  last = said.splitlines()[-1]
  assert status == 1 and 'Traceback' not in said and last.startswith('error: ') and 'ulimit -f' in last, said


@pytest.mark.exhaustive
def test_a_run_whose_streams_are_full_or_gone(tmp_path, data_dir):
  """Nobody reads what it says, or can: it trains to its end."""
  for i, shell in enumerate((
      '"$@" >/dev/full 2>/dev/full', '"$@" >&- 2>&-', '"$@" 2>&1 | head -1; exit ${PIPESTATUS[0]}')):
    workdir = tmp_path / f'run{i}'
    done = subprocess.run(
        ['bash', '-c', shell, 'bash', sys.executable, '-m', 'kr_jax.main', '--config=configs/arithmetic.py:debug',
         f'--workdir={workdir}', f'--config.tasks.data_dir={data_dir}', '--config.policy.num_layers=1',
         '--config.mesh.devices=1', '--config.record.page=False', '--config.warm_start.num_steps=0'], cwd=ROOT,
        capture_output=True, timeout=400,
        env=os.environ | {'PYTHONIOENCODING': 'ascii', 'LC_ALL': 'C', 'PYTHONWARNINGS': ''})
    assert done.returncode == 0 and (workdir / 'summary.json').exists()
    assert (workdir / 'log.txt').read_text().endswith(' end: done\n')
