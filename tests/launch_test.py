"""The launch scripts: any directory, twice the same, and what they say."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.soak import faults
from tests.soak import watch

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path):
  """The scripts beside an environment whose python repeats its arguments."""
  for name in ('launch', 'configs', '.ci'):
    shutil.copytree(ROOT / name, tmp_path / name)
  shutil.copy(ROOT / 'setup.cfg', tmp_path)
  python = tmp_path / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/sh\necho "python $*"\n')
  python.chmod(0o755)
  return tmp_path


def run(script, *args, cwd='/'):
  return subprocess.run([script, *args], cwd=cwd, text=True, capture_output=True, check=True,
                        env={'PATH': os.environ['PATH']}).stdout.splitlines()


def test_local_installs_once_and_runs_the_main_job(clone):
  first = run(clone / 'launch' / 'local.sh')
  assert any('-m pip install' in line and line.endswith(f'-e {clone}[train]') for line in first)
  second = run(clone / 'launch' / 'local.sh')
  assert not any('pip' in line for line in second)
  command = (f'python -m kr_jax.main --config={clone}/configs/ciphers.py '
             f'--workdir={clone}/runs/ciphers')
  assert first[-1] == second[-1] == command


def test_local_takes_a_config_and_flags(clone):
  last = run(clone / 'launch' / 'local.sh', 'configs/arithmetic.py:debug', '--config.seed=1',
             cwd=clone)[-1]
  assert last == ('python -m kr_jax.main --config=configs/arithmetic.py:debug --config.seed=1 '
                  f'--workdir={clone}/runs/arithmetic_debug')
  last = run(clone / 'launch' / 'local.sh', 'configs/arithmetic.py', '--workdir=/x')[-1]
  assert last == f'python -m kr_jax.main --config={clone}/configs/arithmetic.py --workdir=/x'


def test_local_evaluates_a_run_by_its_own_config(clone):
  """Unless one is given."""
  evaluate = lambda *flags: run(clone / 'launch' / 'local.sh', *flags, '--mode=evaluate', '--workdir=/x')[-1]
  assert evaluate('--config.evaluate.rollouts=2') == (
      'python -m kr_jax.main --config.evaluate.rollouts=2 --mode=evaluate --workdir=/x')
  assert evaluate('configs/arithmetic.py') == (
      f'python -m kr_jax.main --config={clone}/configs/arithmetic.py --mode=evaluate --workdir=/x')


def test_local_installs_the_tpu_compiler_for_a_preflight(clone):
  out = run(clone / 'launch' / 'local.sh', '--mode=preflight')
  assert any('-m pip install' in line and line.endswith(f'-e {clone}[tpu]') for line in out)


def test_test_and_ci_run_pytest_with_its_extra(clone):
  out = run(clone / 'launch' / 'test.sh', '-k', 'name')
  assert any(line.endswith(f'-e {clone}[test]') for line in out)
  command = f'python -m pytest -n {os.cpu_count() + 1} --dist loadfile --no-loadscope-reorder'
  assert out[-1] == f'{command} -k name'
  assert run(clone / '.ci' / 'run')[-1] == command


def test_a_changed_setup_is_installed_again(clone):
  run(clone / 'launch' / 'test.sh')
  with open(clone / 'setup.cfg', 'a') as file:
    file.write('# changed\n')
  assert any('pip install' in line for line in run(clone / 'launch' / 'test.sh'))


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
  """What launch/tpu.sh reads of a checkout."""
  path = tmp_path_factory.mktemp('checkout')
  for name in ('launch', 'configs'):
    shutil.copytree(ROOT / name, path / name)
  return path


def tpu(tree, *words, **environment):
  """What launch/tpu.sh prints and says; it needs no gcloud for that."""
  return subprocess.run([tree / 'launch' / 'tpu.sh', *words], text=True, capture_output=True, cwd='/',
                        env={'PATH': '/usr/bin:/bin'} | environment)


V6E = ('--project=p', '--type=v6e:2x2', '--zone=us-east5-a', '--spot')


@pytest.mark.parametrize('words, said', [
    (['grow'], "'grow' is none of up, create, setup, run, logs, status, ssh, stop, delete"),
    (['create', '--zune=x'], '--zune is no setting'),
    (['create', '--quick'], '--quick is no flag'),
    (['create', 'v5e:4x4'], "'v5e:4x4': flags begin with --"),
    (['create', '--project=p'], 'say --type=CHIP:TOPOLOGY'),
    (['create', '--project=p', '--type=v5e-16'], 'write CHIP:TOPOLOGY, as --type=v5e:4x4; chips: v4 v5e v5p v6e tpu7x'),
    (['create', '--project=p', '--type=v5e:2x2x1'], 'v5e has no topology 2x2x1; it has 1x1 2x2 2x4 4x4'),
    (['create', '--project=p', '--type=v5e:4x4'], 'say where: --zone=ZONE; v5e is in us-central1-a'),
    (['create', '--project=p', '--type=v5e:4x4', '--zone=us-east5-a', '--spot'], '--any-zone takes us-east5-a'),
    (['create', *V6E[:3]], 'say how the slice is paid for: --spot'),
    (['create', '--project=p', '--type=v4:2x2x1', '--zone=us-central2-b', '--flex-start'], 'v4 has none'),
    (['create', *V6E, '--provisioning=free'], 'it is spot, flex-start or on-demand'),
    (['create', *V6E, '--wait=soon'], '--wait=soon: write a duration, as 90s, 15m, 6h or 2d'),
    (['create', *V6E, '--name=My_TPU'], '--name=My_TPU: small letters, digits and -'),
    (['create', '--project=p', '--type=v5e:4x4', '--zone=us-west4-a', '--spot', '--max-run=4h'], '--max-run=4h'),
    (['up', *V6E], 'say what to train: --config='),
    (['up', *V6E, '--config=configs/none.py'], 'there is no'),
    (['up', *V6E, '--config=configs/arithmetic.py', '--keep'], '--keep needs a place that outlives the slice'),
    (['up', *V6E, '--config=configs/arithmetic.py', '--bucket=bucket'], 'write gs://BUCKET/DIRECTORY'),
    (['up', '--project=p', '--type=v6e:4x4', '--zone=us-east5-a', '--spot', '--config=configs/arithmetic.py'],
     '4 hosts need a place that all see'),
    (['create', '--env=/none'], '--env=/none: there is no such file'),
])
def test_tpu_refuses_before_anything_is_made(checkout, words, said):
  done = tpu(checkout, *words, '--dry-run')
  assert done.returncode == 2 and said in done.stderr and not done.stdout, done.stderr


def test_tpu_says_where_gcloud_is_to_be_had(checkout, tmp_path):
  for name in ('bash', 'dirname', 'mktemp', 'rm', 'sed', 'tr', 'grep', 'cat', 'env'):
    (tmp_path / name).symlink_to(shutil.which(name))
  done = tpu(checkout, 'create', *V6E, PATH=str(tmp_path))
  assert done.returncode == 2 and 'gcloud is not here: https://cloud.google.com/sdk/docs/install' in done.stderr


def test_tpu_dry_run_prints_what_creates_a_slice(checkout):
  one = tpu(checkout, 'create', *V6E, '--dry-run').stdout
  assert ('gcloud compute instances create kr-jax --zone=us-east5-a --machine-type=ct6e-standard-4t '
          '--image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e --image-project=ubuntu-os-accelerator-images '
          '--boot-disk-size=100GB --maintenance-policy=TERMINATE --scopes=cloud-platform --labels=kr_jax=kr-jax '
          '--provisioning-model=SPOT --instance-termination-action=DELETE --project=p --quiet\n') in one
  queued = tpu(checkout, 'create', '--project=p', '--type=v5e:4x4', '--zone=us-west4-a', '--spot', '--dry-run').stdout
  assert ('gcloud compute tpus queued-resources create kr-jax --node-id=kr-jax --zone=us-west4-a '
          '--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite '
          '--valid-until-duration=21600s') in queued
  assert not (checkout / 'runs').exists()


def test_tpu_quotes_twice_what_goes_through_two_shells(checkout):
  flags = ['--config.evaluate.pass_at=(1, 8)', "--config.tasks.prompt=it's $HOME & \"so\""]
  done = tpu(checkout, 'run', *V6E, '--config=kr_jax:arithmetic', '--workdir=gs://b/r', '--dry-run', '--', *flags)
  line = next(shlex.split(line) for line in done.stdout.splitlines() if 'host.sh run' in line)
  command = next(word for word in line if word.startswith('--command=')).removeprefix('--command=')
  assert shlex.split(command) == ['bash', 'kr_jax/host.sh', 'run', '--config=kr_jax:arithmetic', '--workdir=gs://b/r',
                                  *flags, '2>&1']


def test_tpu_takes_settings_from_a_file_and_flags_win(checkout, tmp_path):
  (tmp_path / 'spot.env').write_text('# mine\nproject=p\nZONE=us-west4-a\n\ntype="v5e:4x4"\n  provisioning=spot\n'
                                     'bucket=gs://b/runs/')
  out = tpu(checkout, 'create', f'--env={tmp_path}/spot.env', '--zone=us-central1-a', '--dry-run').stdout
  assert '--zone=us-central1-a --accelerator-type=v5litepod-16' in out and '--spot --project=p' in out
  (tmp_path / 'spot.env').write_text('project=$(touch /none)\ncolour=red\n')
  done = tpu(checkout, 'create', f'--env={tmp_path}/spot.env', '--dry-run')
  assert done.returncode == 2 and f'{tmp_path}/spot.env: colour is no setting' in done.stderr


@pytest.mark.parametrize('kind, hosts, devices', [
    ('v4:2x2x2', 2, 4), ('v5e:2x4', 1, 8), ('v5e:4x4', 4, 4), ('v6e:1x1', 1, 1), ('v6e:16x16', 64, 4),
    ('v5p:2x2x1', 1, 4), ('tpu7x:2x2x2', 2, 8)])
def test_tpu_knows_hosts_and_devices_of_a_type(checkout, kind, hosts, devices):
  code = f'die() {{ exit 2; }}; . "$0"; type={kind}; read_type; echo $hosts $devices_per_host'
  done = subprocess.run(['bash', '-c', code, checkout / 'launch' / 'tpu' / 'chips.sh'], text=True, capture_output=True)
  assert done.stdout.split() == [str(hosts), str(devices)]


@pytest.mark.parametrize('text, meaning', [
    ("Could not fetch resource:\n - Quota 'TPUS_PER_TPU_FAMILY' exceeded.  Limit: 0.0 in region us-east5.", 'quota'),
    ("Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0", 'quota'),
    ('code: ZONE_RESOURCE_POOL_EXHAUSTED\nmessage: The zone does not have enough resources', 'stockout'),
    ('"code": 8, "message": "There is no more capacity in the zone; you can try in another zone', 'stockout'),
    ("The resource 'projects/p/zones/z/instances/x' already exists", 'exists'),
    ("The resource 'projects/p/zones/z/instances/x' was not found", 'missing'),
    ("PERMISSION_DENIED: Permission 'tpu.nodes.get' denied on resource (or it may not exist).", 'refused'),
    ("argument --provisioning-model: Invalid choice: 'FLEX_START'.", 'refused'),
    ("Internal error. Please try again or contact Google Support. (Code: '5F')", 'passing'),
    ('Connection reset by peer', 'unknown')])
def test_tpu_tells_a_stock_out_from_a_quota(checkout, tmp_path, text, meaning):
  (tmp_path / 'error').write_text(text)
  calls = checkout / 'launch' / 'tpu' / 'calls.sh'
  done = subprocess.run(['bash', '-c', '. "$0"; scratch="$1" reason', calls, tmp_path], text=True, capture_output=True)
  assert done.stdout.strip() == meaning


# launch/soak.sh.


@pytest.mark.parametrize('script, module, flag', [('soak', 'soak', '--only=a second run'),
                                                  ('proof', 'benchmarks.proof', '--family=late')])
def test_what_tests_need_is_installed_before(clone, script, module, flag):
  lines = run(clone / 'launch' / f'{script}.sh', '--json', flag)
  assert any('[test]' in line for line in lines) and lines[-1] == f'python -m tests.{module} --json {flag}'


def test_faults_of_a_soak_come_by_seed_and_each_before_one_comes_again():
  plan = faults.plan(30000, 100.0, 1, [*faults.FAULTS])
  assert plan == faults.plan(30000, 100.0, 1, [*faults.FAULTS]) != faults.plan(30000, 100.0, 2, [*faults.FAULTS])
  assert 250 < len(plan) < 350 and plan == sorted(plan) and plan[-1][0] < 29998
  first = [name for _, name in plan[:len(faults.FAULTS)]]
  assert sorted(first) == sorted(faults.FAULTS)


def test_what_grows_in_a_soak_is_named():
  samples = [watch.Sample(step, 500_000 + 100 * step * (step < 400), 30, 12 + step // 50, 3, 14)
             for step in range(1000)]
  found = watch.growth(samples)
  assert found['of_steps'] == [499, 998] and found['grows'] == ['threads']
  assert found['growth_in_100_steps'] == pytest.approx(
      {'memory_kb': 0, 'open_files': 0, 'threads': 2, 'processes': 0, 'compiled': 0}, abs=0.05)
  assert watch.growth(samples[:watch.LONG]) is None


def test_the_newest_step_of_a_record_that_is_written_anew(tmp_path):
  path, tail = tmp_path / 'metrics.jsonl', watch.Tail(str(tmp_path))
  line = lambda step: json.dumps({'step': step, 'reward_mean': 0.5, 'compile_count': 3}) + '\n'
  assert tail.look() == -1
  path.write_text(line(0) + line(1) + line(2)[:-5])
  assert tail.look() == 1 and tail.compiled == 3
  path.write_text(line(0) + line(1) + line(2) + '[1]\nno line\n{"step": 3, "eval": 1}\n')
  assert tail.look() == 2 and watch.steps(str(tmp_path)) == [0, 1, 2]
  (tmp_path / 'new').write_text(line(0))
  os.replace(tmp_path / 'new', path)
  assert tail.look() == 0


def test_a_soak_refuses_what_is_no_flag_of_it():
  done = subprocess.run([sys.executable, '-m', 'tests.soak', '--sed=2'], cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 2 and '--sed=2 is no flag of a soak' in done.stderr


@pytest.mark.exhaustive
def test_a_short_soak_loses_nothing(tmp_path):
  kinds = ['SIGKILL', 'SIGTERM', 'a second run', 'a worker killed', 'a cut metrics.jsonl']
  done = subprocess.run(
      [sys.executable, '-m', 'tests.soak', '--steps=60', '--every=10', '--json', f'--folder={tmp_path}',
       *(f'--only={kind}' for kind in kinds)], cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 0, done.stdout
  found = json.loads(done.stdout.splitlines()[-1])
  assert found['account']['steps'] == 60 and found['lost'] == []
