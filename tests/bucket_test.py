"""A run by gs:// alone, on a server of the storage API (fakes/bucket.py), and that server itself."""

import collections
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from urllib import error as url_error
from urllib import parse
from urllib import request

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax import files
from kr_jax import prior_rates
from kr_jax import tasks
from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.record import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
# Orbax leaves futures behind where a checkpoint cannot be written.
pytestmark = pytest.mark.filterwarnings('ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning')
DEBUG = ('--config=configs/arithmetic.py:debug', '--config.checkpoint.every=1', '--config.evaluate.rollouts=2',
         '--config.policy.num_layers=1', '--config.mesh.devices=1', '--config.tasks.warm_start_split=warm_start[:256]')


# ---- the server ----


def ask(storage, method, path, body=None, **headers):
  """Status, headers and content of an answer."""
  asked = request.Request(storage.url + path, method=method, data=body,
                          headers={name.replace('_', '-'): x for name, x in headers.items()})
  try:
    with request.urlopen(asked) as answer:
      return answer.status, answer.headers, answer.read()
  except url_error.HTTPError as answer:
    with answer:
      return answer.code, answer.headers, answer.read()


def objects(storage, bucket, **query):
  return json.loads(ask(storage, 'GET', f'/storage/v1/b/{bucket}/o?{parse.urlencode(query)}')[2])


@pytest.fixture
def name(storage, bucket):
  """The name of a bucket that holds some objects."""
  name = bucket.removeprefix('gs://')
  for key in ('a', 'd/1', 'd/2', 'e/3', 'é f'):
    storage.store.write(name, key, key.encode())
  return name


def test_lists_come_in_pages(storage, name):
  names = lambda found: [x['name'] for x in found['items']]
  assert names(objects(storage, name)) == ['a', 'd/1', 'd/2', 'e/3', 'é f']
  found = objects(storage, name, delimiter='/', maxResults=2)
  assert (names(found), found['prefixes']) == (['a'], ['d/'])
  found = objects(storage, name, delimiter='/', maxResults=2, pageToken=found['nextPageToken'])
  assert (names(found), found['prefixes'], 'nextPageToken' in found) == (['é f'], ['e/'], False)
  assert names(objects(storage, name, prefix='d/', startOffset='d/2')) == ['d/2']
  assert ask(storage, 'GET', '/storage/v1/b/nowhere/o')[0] == ask(storage, 'GET', '/storage/v1/b/nowhere')[0] == 404


def test_objects_and_parts_of_them(storage, name):
  path = f'/storage/v1/b/{name}/o/d%2F1'
  about = json.loads(ask(storage, 'GET', path)[2])
  assert (about['size'], about['name']) == ('3', 'd/1')
  for asked, part in (('bytes=1-1', b'/'), ('bytes=1-9', b'/1'), ('bytes=-1', b'1')):
    status, headers, content = ask(storage, 'GET', f'{path}?alt=media', Range=asked)
    assert (status, content) == (206, part) and headers['Content-Range'].endswith('/3')
  assert ask(storage, 'GET', f'{path}?alt=media', Range='bytes=3-9')[0] == 416
  assert ask(storage, 'GET', f'{path}?alt=media&ifGenerationNotMatch={about["generation"]}')[0] == 304
  assert ask(storage, 'DELETE', path)[0] == 204 and ask(storage, 'DELETE', path)[0] == 404


def test_uploads(storage, name):
  upload = lambda query: ask(storage, 'POST', f'/upload/storage/v1/b/{name}/o?{query}', b'new')
  assert upload('uploadType=media&name=d%2F1&ifGenerationMatch=0')[0] == 412
  old = storage.store.about(name, 'd/1')['generation']
  assert upload(f'uploadType=media&name=d%2F1&ifGenerationMatch={old}')[0] == 200
  assert storage.store.read(name, 'd/1') == b'new' and storage.store.about(name, 'd/1')['generation'] > old
  location = upload('uploadType=resumable&name=big')[1]['Location'].removeprefix(storage.url)
  status, headers, _ = ask(storage, 'PUT', location, b'abcd', Content_Range='bytes 0-3/*')
  assert (status, headers['Range']) == (308, 'bytes=0-3')
  assert ask(storage, 'PUT', location, b'cdef', Content_Range='bytes 2-5/6')[0] == 200  # a part again
  assert storage.store.read(name, 'big') == b'abcdef'


def test_copies_and_many_at_once(storage, name):
  post = lambda path, body=b'': ask(storage, 'POST', path, body)[0]
  objects_of = f'/storage/v1/b/{name}/o'
  assert post(f'{objects_of}/a/rewriteTo/b/{name}/o/x%2Fy') == post(f'{objects_of}/a/copyTo/b/{name}/o/z') == 200
  assert post(f'{objects_of}/z/moveTo/o/moved') == 200
  assert post(f'{objects_of}/all/compose', b'{"sourceObjects": [{"name": "x/y"}, {"name": "moved"}]}') == 200
  assert storage.store.read(name, 'all') == b'aa'
  batch = ''.join(f'DELETE /storage/v1/b/{name}/o/{x} HTTP/1.1\n\n' for x in ('all', 'nothing'))
  answer = ask(storage, 'POST', '/batch/storage/v1', batch.encode())[2].decode()
  assert answer.count('204 No Content') == answer.count('404 No such object') == 1
  assert storage.store.names(name) == ['a', 'd/1', 'd/2', 'e/3', 'moved', 'x/y', 'é f']


def test_faults_are_met_so_many_times(storage, name):
  storage.fail(503, 'GET', times=2)
  assert [ask(storage, 'GET', f'/storage/v1/b/{name}')[0] for _ in range(3)] == [503, 503, 200]


# ---- what a run reads and writes ----


def test_data_are_made_once_for_all_machines(bucket, storage, tmp_path, monkeypatch):
  """The second machine makes none, and one that has them asks for nothing but whether they are there."""
  read = lambda: [task.id for task in tasks.read('sums', 'test', Letters(), data_dir=f'{bucket}/data')]
  first = read()
  sent = sum('POST' in line for line in storage.requests)
  monkeypatch.setenv('KR_JAX_CACHE', str(tmp_path / 'another'))
  storage.requests.clear()
  monkeypatch.setattr('kr_jax.datasets.sums.Builder.splits', lambda _: pytest.fail('they are made again'))
  assert read() == first and len(first) and sent
  assert not [line for line in storage.requests if 'POST' in line]


class Letters:
  """A tokenizer."""

  def prompt(self, text):
    return [ord(letter) for letter in text]


def test_files_of_problems_and_of_rates(bucket, tmp_path):
  rows = [{'problem': f'{i} + 1', 'answer': f'{i + 1}'} for i in range(4)]
  files.write(f'{bucket}/in/part-1.jsonl', ''.join(json.dumps(row) + '\n' for row in rows[:2]))
  files.write(f'{bucket}/in/part-2.jsonl', ''.join(json.dumps(row) + '\n' for row in rows[2:]))
  made = tasks.builder('file:' + f'{bucket}/in/part-*.jsonl', str(tmp_path / 'data'))
  assert made.info.splits['all'].num_examples == 4
  files.write(f'{bucket}/rates.json', '{"1": 0.25}')
  known = [types.Task(*[f'{i}' if field == 'id' else '' for field in types.Task._fields]) for i in range(2)]
  assert prior_rates.read(f'{bucket}/rates.json', known)[1] == .25
  with pytest.raises(ValueError, match=f'tasks.prior=.*{bucket}/none.json is not there'):
    prior_rates.read(f'{bucket}/none.json', known)


@pytest.mark.slow
def test_checkpoints_by_the_clients_of_orbax(bucket):
  state = types.TrainState(step=jnp.asarray(3), params={'w': jnp.arange(6.0)}, opt_state=(), key=jax.random.key(1))
  stats = estimate.init(2)
  with checkpoint.Checkpoints(f'{bucket}/run/checkpoints') as checkpoints:
    assert checkpoints.latest() is None
    for step in (2, 3):
      checkpoints.save(step, state, stats)
  kept = {name.split('/')[2] for name in map(str, files.listed(bucket)) if name.startswith('run/checkpoints/')}
  assert kept == {'3'}
  with checkpoint.Checkpoints(f'{bucket}/run/checkpoints') as checkpoints:
    found, _ = checkpoints.restore(state, stats)
  np.testing.assert_array_equal(found.params['w'], np.arange(6.0))


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written(bucket, storage):
  state = types.TrainState(step=jnp.asarray(3), params={'w': jnp.arange(6.0)}, opt_state=(), key=jax.random.key(1))
  with pytest.raises(files.Unsaved, match=f'cannot be written to {bucket}/run: .*ordered by the test.*No checkpoint is there'):
    with checkpoint.Checkpoints(f'{bucket}/run') as checkpoints:
      storage.fail(403, 'POST')
      checkpoints.save(1, state, estimate.init(2))


# ---- whole runs ----


class Machine:
  """A machine with a disk of its own."""

  def __init__(self, storage, disk, data_dir, devices=1):
    (disk / 'tmp').mkdir(parents=True)
    self.disk, flags = disk, f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'
    self._environment = os.environ | storage.environment | {
        'HOME': str(disk), 'KR_JAX_CACHE': str(disk / 'cache'), 'TMPDIR': str(disk / 'tmp'), 'XLA_FLAGS': flags}
    self._data = f'--config.tasks.data_dir={data_dir}'

  def start(self, *arguments):
    data = [self._data] if DEBUG[0] in arguments else []
    return subprocess.Popen([sys.executable, '-m', 'kr_jax.main', *arguments, *data], cwd=ROOT, env=self._environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

  def run(self, *arguments, status=0):
    process = self.start(*arguments)
    output = process.communicate()[0]
    assert process.returncode == status, output
    assert os.listdir(self.disk / 'tmp') == []
    return output


def metrics(text):
  """The records, without what a clock or a compiler has a part in."""
  return [{name: x for name, x in json.loads(line).items() if not name.endswith('_s') and name != 'compile_count'}
          for line in text.splitlines()]


def params(directory):
  return checkpoint.ocp.PyTreeCheckpointer().restore(f'{directory}/state')['params']


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written_is_said_in_a_line(storage, bucket, tmp_path, data_dir):
  storage.fail(403, 'POST', message='no objects.create')
  output = Machine(storage, tmp_path / 'a', data_dir).run(*DEBUG, f'--workdir={bucket}/run', status=1)
  assert output.startswith(f'error: cannot write to --workdir={bucket}/run: no permission (Forbidden: ')
  assert output.count('\n') == 1


@pytest.mark.exhaustive
@pytest.mark.filterwarnings('ignore:Sharding info not provided')
def test_a_run_by_a_bucket_alone(storage, bucket, tmp_path, data_dir):
  """Killed and gone on with on a fresh disk, it ends with the parameters and metrics of a run that was not."""
  url, machine = f'{bucket}/run', lambda name: Machine(storage, tmp_path / name, data_dir)
  killed = machine('killed').start(*DEBUG, f'--workdir={url}')
  second = storage.store.directory / bucket[5:] / parse.quote('run/checkpoints/2/commit_success.txt', safe='')
  end = time.monotonic() + 300
  while not second.exists() and killed.poll() is None and time.monotonic() < end:
    time.sleep(.02)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  assert files.listed(f'{url}/checkpoints') and not files.missing(f'{url}/metrics.jsonl')
  storage.fail(503, times=3)  # at times
  assert 'going on at 2' in machine('fresh').run(*DEBUG, f'--workdir={url}')
  machine('whole').run(*DEBUG, f'--workdir={tmp_path}/run')
  assert metrics(files.read(f'{url}/metrics.jsonl').decode()) == metrics((tmp_path / 'run/metrics.jsonl').read_text())
  jax.tree.map(np.testing.assert_array_equal, params(f'{url}/checkpoints/4'), params(f'{tmp_path}/run/checkpoints/4'))
  ends = [json.loads(line) for line in files.read(f'{url}/ledger.jsonl').decode().splitlines()]
  assert [line['reason'] for line in ends if 'reason' in line] == ['done']
  assert len([line for line in ends if 'started' in line]) == 2

  assert f'see {url}/evaluation.json' in machine('evaluate').run(*DEBUG, '--mode=evaluate', f'--workdir={url}')
  assert json.loads(files.read(f'{url}/evaluation.json'))['checkpoint'] == f'{url}/checkpoints/4'
  output = machine('report').run('--mode=report', f'--workdir={url}', f'--output={bucket}/page')
  assert f'see {bucket}/page/report.html' in output and b'gs://' not in files.read(f'{bucket}/page/report.md')[:20]
  assert 'wrong' in machine('rollouts').run('--mode=rollouts', f'--workdir={url}')
  assert f'see {url}/export' in machine('export').run(*DEBUG, '--mode=export', f'--workdir={url}')
  assert {'config.json', 'model.safetensors', 'tokenizer.json'} <= set(files.listed(f'{url}/export'))
  output = machine('generate').run('--mode=generate', f'--checkpoint={url}/export', '--prompt=+1+2=', '--max_tokens=4')
  assert 'fetching model.safetensors' in output


@pytest.mark.exhaustive
def test_two_hosts_with_a_bucket_and_two_without(storage, bucket, tmp_path, data_dir):
  """Two processes of four devices share nothing but the bucket; without it they are told so."""

  def run(workdirs):
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    started = [Machine(storage, tmp_path / f'{port}-{i}', data_dir, devices=4).start(
        *(x for x in DEBUG if 'devices' not in x), '--config.mesh.devices=8', '--config.sample.slots=4',
        f'--coordinator=127.0.0.1:{port}', '--processes=2', f'--process={i}', f'--workdir={workdir}')
        for i, workdir in enumerate(workdirs)]
    return [(process.communicate()[0], process.returncode) for process in started]

  for output, status in run([f'{bucket}/run'] * 2):
    assert status == 0, output
  assert len(metrics(files.read(f'{bucket}/run/metrics.jsonl').decode())) == 7
  steps = collections.Counter(name.split('/')[0] for name in files.listed(f'{bucket}/run/checkpoints'))
  assert set(steps) == {'3', '4'}
  for output, status in run([tmp_path / 'disk-0', tmp_path / 'disk-1']):
    assert status == 1 and f'process 1 ({socket.gethostname()}) does not see what process 0' in output, output
