"""launch/tpu.sh: its gcloud lines are documented, and every verb does what it says in a cloud that is a directory.

The cloud is played by the gcloud, ssh and scp of tests/fakes, whose machines are directories here; launch/host.sh runs
there in earnest. No line of this has met Google Cloud.
"""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.fakes import cloud as fake
from tests.fakes import flags
from tests.fakes import hosts

ROOT = pathlib.Path(__file__).parents[1]
FAKES = ROOT / 'tests' / 'fakes'
SYSTEM = '/usr/local/bin:/usr/bin:/bin'
# A type of each chip on one host and on several, and where it is.
TYPES = {
    'v4:2x2x1': 'us-central2-b', 'v4:2x2x2': 'us-central2-b', 'v5e:2x2': 'us-west4-a', 'v5e:2x4': 'us-west4-a',
    'v5e:4x4': 'us-west4-a', 'v5p:2x2x1': 'us-east5-a', 'v5p:2x2x2': 'us-east5-a', 'v6e:1x1': 'us-east5-b',
    'v6e:2x2': 'us-east5-b', 'v6e:4x4': 'us-east5-b', 'tpu7x:2x2x1': 'us-central1-c', 'tpu7x:2x2x2': 'us-central1-c'}
# Of the stand-in for a training, program.py.
COMPLETE = [{'step': 0, 'value': 31}, {'step': 1, 'value': 962}, {'step': 2, 'value': 563}, {'step': 3, 'value': 303},
            {'step': 4, 'value': 316}, {'step': 5, 'value': 720}, {'step': 6, 'value': 128}, {'step': 7, 'value': 948}]
# Of a row of metrics: what depends on the clock.
TIMES = ('wall_s', 'step_s', 'compile_count', 'tokens_per_s')


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
  """A checkout of the launch scripts and configs."""
  return checkout(tmp_path_factory.mktemp('tree'), 'launch', 'configs', 'setup.cfg')


def checkout(root, *names):
  """Copies what has these names to a checkout, at a commit."""
  for name in names:
    (root / name).parent.mkdir(exist_ok=True)
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns('*.ipynb', '__pycache__'))
    else:
      shutil.copy(ROOT / name, root / name)
  (root / '.gitignore').write_text('runs/\n')
  git = ['git', '-C', root, '-c', 'user.name=name', '-c', 'user.email=name@example.com']
  for words in (['init', '-q', '-b', 'main'], ['add', '-A'], ['commit', '-qm', 'all']):
    subprocess.run([*git, *words], check=True, capture_output=True)
  return root


class Cloud:
  """A cloud in a directory, and the laptop of its user."""

  def __init__(self, path: pathlib.Path, tree: pathlib.Path):
    self.path, self.tree, self.name = path, tree, re.sub('[^a-z0-9]', '-', path.parent.name.lower()).strip('-')
    self.workdir = path / 'bucket'
    self.run = [f'--workdir={self.workdir}', '--config=configs/arithmetic.py']
    self.environment = {'PATH': f'{FAKES}:{os.path.dirname(sys.executable)}:{SYSTEM}', 'HOME': str(path / 'laptop'),
                        'FAKE_CLOUD': str(path), 'FAKE_PYTHON': sys.executable, 'FAKE_PROJECT': 'p',
                        'TPU_SECOND': '0.01'}
    (path / 'laptop').mkdir(parents=True)

  def plan(self, *rules: dict) -> None:
    (self.path / 'plan.json').write_text(json.dumps(rules))

  def __call__(self, *words: str, status: int = 0, answer: str = '') -> str:
    """Runs tpu.sh, and returns all that it wrote."""
    got = subprocess.run(['bash', self.tree / 'launch' / 'tpu.sh', words[0], f'--name={self.name}', *words[1:]],
                         text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, input=answer, cwd='/',
                         env=self.environment)
    assert got.returncode == status, got.stdout
    return got.stdout

  def start(self, *words: str) -> subprocess.Popen:
    """Starts tpu.sh, and returns once it follows a run."""
    begun = self.followed()
    process = subprocess.Popen(
        ['bash', self.tree / 'launch' / 'tpu.sh', words[0], f'--name={self.name}', *words[1:]], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd='/', env=self.environment,
        start_new_session=True)
    while self.followed() == begun:
      assert process.poll() is None, process.stdout.read()
      time.sleep(0.05)
    return process

  def wait_for_steps(self, count: int) -> None:
    while not (self.workdir / 'metrics.jsonl').exists() or len(self.metrics()) < count:
      time.sleep(0.05)

  def followed(self) -> int:
    calls = self.path / 'calls.jsonl'
    return calls.read_text().count(' follow ') if calls.exists() else 0

  def there(self) -> dict[str, list[str]]:
    """The names of what there is, by its kind."""
    found = json.loads((self.path / 'cloud.json').read_text())
    return {kind: sorted(found[kind]) for kind in fake.KINDS if found[kind]}

  def calls(self, *words: str) -> int:
    """How often gcloud was called with these words in front."""
    lines = (self.path / 'calls.jsonl').read_text().splitlines()
    return sum(call['program'] == 'gcloud' and tuple(call['arguments'][:len(words)]) == words
               for call in map(json.loads, lines))

  def hosts(self) -> list[pathlib.Path]:
    """The directories of its machines, by number."""
    return sorted((self.path / 'hosts').iterdir(), key=lambda root: hosts.number(str(root)))

  def host(self, number: int, path: str) -> str:
    """What stands in a file of a machine."""
    return (self.hosts()[number] / path).read_text()

  def metrics(self) -> list[dict]:
    return [json.loads(line) for line in (self.workdir / 'metrics.jsonl').read_text().splitlines()]


def slice_of(kind):
  return [f'--type={kind}', f'--zone={TYPES[kind]}', '--spot']


@pytest.fixture
def cloud(tmp_path, tree):
  made = Cloud(tmp_path / 'cloud', tree)
  yield made
  mark = f'FAKE_CLOUD={made.path}\0'.encode()
  for entry in os.listdir('/proc'):  # none of its machines outlives it
    with contextlib.suppress(OSError):
      if entry.isdigit() and mark in pathlib.Path(f'/proc/{entry}/environ').read_bytes():
        os.kill(int(entry), signal.SIGKILL)


def dry(tree, *words, status=0):
  """What `tpu.sh --dry-run` writes, where there is no gcloud."""
  got = subprocess.run(['bash', tree / 'launch' / 'tpu.sh', words[0], '--dry-run', '--project=p', *words[1:]],
                       text=True, capture_output=True, cwd='/', env={'PATH': SYSTEM, 'HOME': '/nowhere'})
  assert got.returncode == status, got.stdout + got.stderr
  return got.stdout if status == 0 else got.stderr


def documented(text):
  """The gcloud lines of a text, each parsed: its command, names and flags."""
  return [flags.parse(shlex.split(line)[1:])[:3] for line in text.splitlines() if line.startswith('gcloud ')]


@pytest.mark.parametrize('kind', TYPES)
@pytest.mark.parametrize('paid', ['--spot', '--flex-start', '--on-demand'])
def test_what_creates_a_slice_is_documented(tree, kind, paid):
  words = ['create', f'--type={kind}', f'--zone={TYPES[kind]}', paid, '--network=net', '--subnetwork=sub']
  if kind.startswith('v4') and paid == '--flex-start':
    assert 'v4 has none; take --spot or --on-demand' in dry(tree, *words, status=2)
    return
  lines = documented(dry(tree, *words))
  created = [line for line in lines if 'create' in line[0]]
  assert len(created) == (3 if kind in ('v5p:2x2x2', 'v6e:4x4', 'tpu7x:2x2x2') else 1)
  for command, names, given in created:
    assert names == ['kr-jax'] and given['project'] == 'p'
    if 'zone' in given:
      assert given['zone'] == TYPES[kind]
    if command.endswith('templates create'):  # gcloud asks for it otherwise
      assert given['region'] == TYPES[kind].rpartition('-')[0]


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['v4:2x2x2', 'v5e:2x4', 'v6e:2x2', 'tpu7x:2x2x2'])
def test_every_other_line_is_documented(tree, kind):
  words = [*slice_of(kind), '--config=configs/arithmetic.py', '--bucket=gs://b/d', '--yes']
  for verb in ('up', 'setup', 'run', 'logs', 'status', 'ssh', 'stop', 'delete'):
    assert documented(dry(tree, verb, *words, *(['--', 'ls', '-l'] if verb == 'ssh' else [])))


@pytest.mark.parametrize('line, refused', [
    ('compute instances destroy a', 'is no command of the table'),
    ('compute instances create a --zone=z --machine=x', 'unrecognized arguments: --machine'),
    ('compute instances create --zone=z', 'INSTANCE_NAMES: Must be specified'),
    ('compute instances create a --zone', '--zone: expected one argument'),
    ('compute instances create a --provisioning-model=CHEAP', 'Invalid choice'),
    ('compute instances create a --shielded-vtpm=yes', 'ignored explicit argument'),
    ('compute instances create a --no-zone', 'unrecognized arguments: --no-zone'),
    ('compute ssh a --internal-ip --tunnel-through-iap', 'At most one of'),
    ('compute tpus queued-resources create q --node-id=a --zone=z --runtime-version=r', 'Exactly one of'),
    ('compute tpus queued-resources create q --node-id=a --accelerator-type=v4-8', '--runtime-version: Must be')])
def test_a_line_that_gcloud_refuses(line, refused):
  with pytest.raises(flags.UsageError, match=refused):
    flags.parse(line.split())


def test_lines_that_gcloud_takes():
  assert flags.parse('compute ssh a --command ls --zone=z --quiet -- -v'.split()) == (
      'compute ssh', ['a'], {'command': 'ls', 'zone': 'z', 'quiet': True}, ['-v'])
  assert flags.parse('compute instances create a b --no-restart-on-failure'.split())[1:3] == (
      ['a', 'b'], {'no-restart-on-failure': True})
  assert all(row['page'].startswith('https://docs.cloud.google.com/') for row in flags.TABLE['added'])


@pytest.mark.slow
def test_the_scripts_are_shell():
  """shellcheck finds nothing in them."""
  shellcheck = os.path.join(os.path.dirname(sys.executable), 'shellcheck')
  scripts = sorted((ROOT / 'launch').rglob('*.sh'))
  got = subprocess.run([shellcheck, '-x', '-P', ROOT / 'launch', *scripts], text=True, capture_output=True)
  assert got.returncode == 0, got.stdout


IMAGES = {
    'ready': ({'python': ['3.12'], 'venv': True}, 'python: .*/bin/python3.12 '),
    'old': ({}, r'python: .*/\.local/share/uv/.* \(Python 3.12.0\)'),
    'no_venv': ({'python': ['3.11']}, 'there is no Python of 3.11 to 3.13 with venv.*python: .*uv'),
    'no_pip': ({'pip': False}, 'No module named pip.*python: .*uv'),
    'no_uv': ({'pip': False, 'fails': ['uv']}, 'not resolve host.*trying the packages.*python: .*/bin/python3.12 '),
    'bare': ({'python': [], 'curl': False}, 'trying the packages.*python: .*/bin/python3.12 ')}


@pytest.mark.parametrize('name', IMAGES)
def test_a_machine_gets_a_python(tmp_path, monkeypatch, tree, name):
  image, said = IMAGES[name]
  text = setup_of(tmp_path, monkeypatch, tree, image, 0)
  assert re.search(said, text, re.DOTALL) and text.endswith('setup: done\n')


@pytest.mark.parametrize('image, said', [
    ({'pip': False, 'fails': ['uv'], 'sudo': False}, 'error: no Python of 3.11 or newer, and none could be had'),
    ({'fails': ['pip']}, 'ERROR: Could not find a version that satisfies the requirement')], ids=['nothing', 'pip'])
def test_why_a_machine_is_not_set_up(tmp_path, monkeypatch, tree, image, said):
  assert said in setup_of(tmp_path, monkeypatch, tree, image, 1)


def setup_of(path, monkeypatch, tree, image, status):
  """What `host.sh setup` says on a machine with such an image."""
  monkeypatch.setenv('FAKE_CLOUD', str(path))
  monkeypatch.setenv('FAKE_PYTHON', sys.executable)
  (path / 'plan.json').write_text(json.dumps([{'at': 'image', 'do': image}]))
  hosts.make(str(path / 'host'), 0, 4)
  at = path / 'host' / 'home' / 'kr_jax'
  at.mkdir()
  shutil.copy(tree / 'launch' / 'host.sh', at)
  subprocess.run(['tar', '-czf', at / 'project.tar.gz', 'setup.cfg', 'launch/environment.sh'], cwd=tree, check=True)
  got = subprocess.run(['/bin/bash', at / 'host.sh', 'setup', 'tpu'], text=True, stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT, env=hosts.environment(str(path / 'host')))
  assert got.returncode == status, got.stdout
  return got.stdout


@pytest.mark.slow
@pytest.mark.parametrize('kind, count', [('v5e:2x2', 1), ('v5p:2x2x2', 2)])
def test_a_slice_from_its_creation_to_its_end(cloud, kind, count):
  """All verbs, one after another."""
  last = count - 1
  cloud.plan({'at': 'ssh', 'do': 'refuse'}, {'at': 'ssh', 'matching': ' run ', 'do': 'drop'},
             {'at': 'step', 'step': 3, 'host': 0, 'do': 'wait'})
  assert 'is ready' in cloud('create', *slice_of(kind), *cloud.run)
  assert 'is there already, and ready' in cloud('create')
  assert f'setup is done: 4 devices on each of {count} host' in cloud('setup')
  calls = cloud.host(last, 'image/pip_calls')
  cloud('setup')
  assert calls == cloud.host(last, 'image/pip_calls') and calls.endswith('project[tpu]\n')
  cloud('run', *cloud.run, '--detach')
  assert 'a run is going already' in cloud('run', *cloud.run, '--detach', status=1)
  assert re.search(f'host {last} .*: runs since', cloud('status'))
  assert cloud('ssh', f'--host={last}', '--', 'cat', '../image/number') == str(last)
  cloud.wait_for_steps(3)
  assert 'it has ended with 75' in cloud('stop')
  assert re.search('host 0 .*: left with 75: train: 4 of 8 steps', cloud('status'))
  assert 'stopped, and saved' in cloud('logs')
  assert 'the run is complete' in cloud('run', *cloud.run)
  assert cloud.metrics() == COMPLETE
  assert 'nothing is deleted' in cloud('delete', status=2, answer='n') and cloud.there()
  cloud('delete', '--yes')
  assert not cloud.there()


@pytest.mark.slow
@pytest.mark.parametrize('kind, first, made', [
    ('v4:2x2x2', 'stockout later', ('compute', 'tpus', 'queued-resources', 'create')),
    ('v5p:2x2x2', 'preempted', ('compute', 'instance-groups', 'managed', 'create')),
    pytest.param('v6e:2x2', 'stockout', ('compute', 'instances', 'create'), marks=pytest.mark.exhaustive)])
def test_a_preempted_run_is_kept_until_it_is_complete(cloud, kind, first, made):
  """The first slice does not come to be, the second is taken away at step 5, and the third ends the run."""
  cloud.plan({'at': 'create', 'do': first}, {'at': 'step', 'step': 5, 'host': 0, 'do': 'preempt'})
  cloud('up', '--keep', '--delete-after', *slice_of(kind), *cloud.run)
  assert cloud.metrics() == COMPLETE and cloud.calls(*made) == 3 and not cloud.there()
  log = (cloud.tree / 'runs' / 'tpu' / cloud.name / 'keep.log').read_text()
  assert re.search('try 1 of 20.*again in 30 s.*try 2 of 20.*the run was lost.*again in.*try.*the run is complete', log,
                   re.DOTALL)
  assert all(re.match(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ', line) for line in log.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize('kind, do, said', [
    ('v4:2x2x2', 'quota', 'TPUV5sPreemptibleLitepod.*quota is too small'),
    ('v4:2x2x2', 'quota later', 'Limit 0 in zone.*quota is too small'),
    ('v4:2x2x2', 'stockout', 'no more capacity.*try another zone'),
    ('v4:2x2x2', 'preempted', 'the request is SUSPENDED'),
    ('v5p:2x2x2', 'quota later', "Quota 'PREEMPTIBLE.*quota is too small"),
    ('v6e:2x2', 'quota', "Quota 'PREEMPTIBLE.*quota is too small"),
    ('v6e:2x2', 'stockout', 'does not have enough resources.*us-east5-b has no ct6e-standard-4t just now'),
    ('v6e:2x2', 'denied', 'does not have permission'),
    ('v6e:2x2', 'old', 'gcloud is too old for it: gcloud components update')], ids=lambda x: x.partition('.*')[0][:12])
def test_why_a_slice_is_not_created(cloud, kind, do, said):
  cloud.plan({'at': 'create', 'do': do, 'times': 9})
  keep = [] if do in ('stockout', 'preempted') else ['--keep']  # which tries these again, and nothing else
  assert re.search(said, cloud('up', *keep, *slice_of(kind), *cloud.run, status=1), re.DOTALL)


@pytest.mark.slow
def test_a_host_that_fails_ends_all_and_is_named(cloud):
  cloud.plan({'at': 'step', 'step': 3, 'host': 1, 'do': 'exit', 'code': 1},
             {'at': 'step', 'step': 3, 'host': 0, 'do': 'wait'})
  text = cloud('up', '--keep', *slice_of('v4:2x2x2'), *cloud.run, status=1)
  assert re.search('host 1 left with 1; the others are stopped.*the run left with 1 on host 1 first.*'
                   'what the plan has for step 3', text, re.DOTALL)
  assert re.search('host 0 .*: left with 75', cloud('status'))


@pytest.mark.slow
def test_what_is_asked_for_may_come_later(cloud):
  cloud.plan({'at': 'create', 'do': 'underway'}, {'at': 'look', 'created': True, 'do': 'outage'})
  assert re.search('waiting: .*STAGING.*is ready', cloud('create', *slice_of('v6e:2x2')), re.DOTALL)


@pytest.mark.slow
def test_a_setup_that_fails_names_its_host(cloud):
  cloud.plan({'at': 'image', 'host': 1, 'do': {'fails': ['pip']}})
  cloud('create', *slice_of('v5p:2x2x2'))
  text = cloud('setup', status=1)
  assert re.search(r'host \d \(\S*-h001\) failed.*Could not find a version', text, re.DOTALL) and '-q000' not in text
  (cloud.hosts()[1] / 'image' / 'pip_fails').unlink()
  (cloud.hosts()[0] / 'image' / 'devices').write_text('3')
  text = cloud('setup', status=1)
  assert re.search(r'\S*-q000\) failed.*this host should have 4 devices of tpu; JAX sees 3', text, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['v6e:2x2', 'v5e:2x2'])  # by gcloud compute ssh; and by tpu-vm ssh, which tries again
def test_a_connection_that_breaks_does_not_end_the_run(cloud, kind):
  cloud.plan({'at': 'ssh', 'matching': 'follow', 'do': 'drop', 'times': 2},
             {'at': 'ssh', 'matching': ' run ', 'do': 'drop'})
  cloud('up', *slice_of(kind), *cloud.run)
  assert cloud.metrics() == COMPLETE
  log, = (cloud.tree / 'runs' / 'tpu' / cloud.name / 'logs').glob('run-*.log')
  assert log.read_text() == cloud.host(0, 'home/kr_jax/run.log')


@pytest.mark.slow
def test_a_run_goes_on_without_the_laptop_and_is_followed_again(cloud):
  cloud.plan({'at': 'step', 'step': 3, 'host': 0, 'do': 'wait'})
  follower = cloud.start('up', '--keep', *slice_of('v6e:2x2'), *cloud.run)
  os.killpg(follower.pid, signal.SIGINT)
  assert 'the run goes on' in follower.communicate()[0] and follower.returncode == 130
  assert 'runs since' in cloud('status')
  follower = cloud.start('up', '--keep')
  cloud.wait_for_steps(3)
  cloud('stop')
  assert 'a run is going' in follower.communicate()[0] and follower.returncode == 75
  assert cloud.metrics() == COMPLETE[:4]


@pytest.mark.exhaustive
def test_a_preempted_training_is_resumed_exactly(tmp_path):
  """Two hosts of two CPU devices train in earnest; at step 5 their slice is taken away."""
  tree = checkout(tmp_path / 'tree', 'launch', 'configs', 'setup.cfg', 'kr_jax', 'tests/graders.py')
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  knobs = {
      'num_steps': 8, 'checkpoint.every': 3, 'tasks.data_dir': tmp_path / 'data', 'policy.num_layers': 1,
      'tasks.per_step': 4, 'alloc.rollouts_per_step': 16, 'warm_start.num_steps': 0, 'warm_start.warmup_steps': 0,
      'rewards.verifier': 'tests.graders:has_a_one', 'rewards.workers': 1, 'evaluate.every': 4, 'evaluate.tasks': 4,
      'evaluate.rollouts': 4, 'evaluate.tasks_per_batch': 4, 'record.page': False}
  rows = {}
  for name in ('whole', 'parts'):
    cloud = Cloud(tmp_path / name / 'cloud', tree)
    cloud.environment |= {
        'FAKE_TRAINING': 'real', 'FAKE_PORT': str(port), 'JAX_PLATFORMS': 'cpu', 'TPU_SECOND': '0.1',
        'XLA_FLAGS': '--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0',
        'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.pytest_cache' / 'xla')}
    if name == 'parts':
      cloud.plan({'at': 'step', 'step': 5, 'host': 0, 'do': 'preempt'})
    cloud('up', '--keep', *slice_of('v4:2x2x2'), f'--workdir={cloud.workdir}', '--config=configs/arithmetic.py:debug',
          '--', *(f'--config.{knob}={x}' for knob, x in knobs.items()))
    assert cloud.calls('compute', 'tpus', 'queued-resources', 'create') == 1 + (name == 'parts')
    rows[name] = [{k: x for k, x in row.items() if k not in TIMES} for row in cloud.metrics()]
  assert [row['step'] for row in rows['whole'] if 'loss' in row] == list(range(8))
  assert any(row.get('grad_norm') for row in rows['whole'])
  for whole, parts in zip(rows['whole'], rows['parts'], strict=True):
    assert {k for k in whole.keys() | parts.keys() if whole.get(k) != parts.get(k)} == set(), whole['step']
