"""What of compiled programs is kept, what a second start compiles, and the trace of some steps."""

import json
import logging
import os
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import pytest

from kr_jax import compiled
from kr_jax.record import ledger
from tests.benchmarks import cold_start

NAMES = ('jax_compilation_cache_dir', 'jax_enable_compilation_cache', 'jax_persistent_cache_min_compile_time_secs',
         'jax_persistent_cache_min_entry_size_bytes', 'jax_persistent_cache_enable_xla_caches')


@pytest.fixture
def settings(monkeypatch, tmp_path):
  """As of a process without any; those of the tests come back."""
  before = {name: getattr(jax.config, name) for name in NAMES}
  for name in [*NAMES, 'jax_compilation_cache_max_size']:
    monkeypatch.delenv(name.upper(), raising=False)
  monkeypatch.setenv('KR_JAX_CACHE', str(tmp_path / 'cache'))
  jax.config.update('jax_compilation_cache_dir', None)
  yield jax.config
  for name, value in before.items():
    jax.config.update(name, value)


class AtOnce:
  """A thread that is over when it has begun."""

  def __init__(self, target, args, daemon):
    self.start = lambda: target(*args)


@pytest.mark.parametrize('places, directory', [
    ((), 'CACHE/xla'), (('runs/a', ''), 'CACHE/xla'), (('gs://b/runs/a', ''), 'gs://b/runs/xla'),
    (('runs/a', 'gs://b/a/'), 'gs://b/xla'), (('gs://b', ''), 'gs://b/xla')])
def test_programs_are_kept_where_all_hosts_see_them(settings, monkeypatch, tmp_path, places, directory):
  tidied = []
  monkeypatch.setattr(compiled, 'tidy_bucket', tidied.append)
  monkeypatch.setattr(compiled.threading, 'Thread', AtOnce)
  directory = directory.replace('CACHE', str(tmp_path / 'cache'))
  assert compiled.keep(*places) == compiled.directory() == directory
  assert settings.jax_persistent_cache_min_compile_time_secs == 0
  assert settings.jax_persistent_cache_min_entry_size_bytes == -1
  # XLA's own caches are written by C++, which knows no buckets.
  assert (settings.jax_persistent_cache_enable_xla_caches == 'none') == directory.startswith('gs://')
  assert os.path.isdir(tmp_path / 'cache' / 'xla') == (not directory.startswith('gs://'))
  assert tidied == [directory] * directory.startswith('gs://')


def test_what_the_user_has_set_holds(settings, monkeypatch, tmp_path):
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '3')
  settings.update('jax_persistent_cache_min_compile_time_secs', 3.0)
  settings.update('jax_compilation_cache_dir', '/mine')
  assert compiled.keep('gs://b/run') == compiled.directory() == '/mine'
  assert settings.jax_persistent_cache_min_compile_time_secs == 3
  settings.update('jax_enable_compilation_cache', False)
  assert compiled.keep('gs://b/run') is compiled.directory() is None and not (tmp_path / 'cache').exists()


def test_a_directory_that_cannot_be_written_is_a_warning(settings, monkeypatch, tmp_path, caplog):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('KR_JAX_CACHE', str(tmp_path / 'file'))
  with caplog.at_level(logging.WARNING, 'absl'):
    assert compiled.keep('runs/a') is compiled.directory() is None
  assert f'compiled programs are not kept, as {tmp_path}/file/xla cannot be written' in caplog.text


# Frames that the program zstd wrote: of nothing, of 300,000 zeros (with checksums), of 'hello' (without).
ZSTANDARD = tuple(map(bytes.fromhex, (
    '28b52ffd240001000099e9d851', '28b52ffd04585400001000000100fbff39c00202001000039f04002d28de26',
    '28b52ffd005829000068656c6c6f')))


def test_zstandards_frames_have_their_end():
  """Blocks that are raw, repeated and compressed; cut anywhere, they have none."""
  for content in ZSTANDARD:
    assert compiled._zstandard_is_whole(content)
    assert not any(compiled._zstandard_is_whole(content[:end]) for end in range(len(content)))
  assert not compiled._zstandard_is_whole(bytes.fromhex('28b52ffd2400070000'))  # a block of the reserved kind


class Bucket:
  """Of files by name: (size, version)."""

  def __init__(self, monkeypatch, **found):
    self.removed = []
    there = {f'{name}-cache': compiled.files.File(*x) for name, x in found.items()}
    monkeypatch.setattr(compiled.files, 'listed', lambda url: there | {'other': compiled.files.File(99, '0')})
    monkeypatch.setattr(compiled.files, 'remove', self.removed.append)


def test_the_oldest_of_a_bucket_are_dropped_beyond_a_size(monkeypatch, caplog):
  bucket = Bucket(monkeypatch, new=(10, '30'), old=(10, '4'), older=(10, '1'))
  compiled.tidy_bucket('gs://b/xla', most_bytes=15)
  assert sorted(bucket.removed) == ['gs://b/xla/old-cache', 'gs://b/xla/older-cache']
  bucket.removed.clear()
  compiled.tidy_bucket('gs://b/xla', most_bytes=30)
  assert bucket.removed == []

  def fails(url):
    raise OSError('no answer')

  monkeypatch.setattr(compiled.files, 'listed', fails)
  compiled.tidy_bucket('gs://b/xla')


def test_what_a_kill_cut_short_is_dropped(tmp_path):
  """JAX would neither read nor replace it. What was looked at once is not read again."""
  whole, zstd = zlib.compress(b'a program' * 99), ZSTANDARD[1]
  names = ('jit_a-1-cache', 'jit_b-2-cache', 'jit_c-3-cache', 'jit_d-4-cache', 'autotuned', 'jit_e-5-cache')
  for name, content in zip(names, (whole, whole[:20], b'', zstd, b'x', zstd[:-1])):
    (tmp_path / name).write_bytes(content)
  there = lambda: sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith('.'))
  compiled.tidy(tmp_path)
  assert there() == ['autotuned', 'jit_a-1-cache', 'jit_d-4-cache']
  (tmp_path / 'jit_a-1-cache').write_bytes(whole[:20])
  os.utime(tmp_path / 'jit_a-1-cache', (1, 1))
  compiled.tidy(tmp_path)
  assert len(there()) == 3


def test_the_oldest_are_dropped_beyond_a_size(tmp_path):
  (tmp_path / 'inner').mkdir()
  for i, name in enumerate(('b', 'a', 'inner/c', 'd')):
    path = tmp_path / name
    path.write_bytes(bytes(10))
    os.utime(path, (100 + i, 100))
  compiled.tidy(tmp_path, most_bytes=25)
  assert sorted(path.name for path in tmp_path.rglob('?')) == ['c', 'd']


def test_a_trace_of_some_steps(tmp_path, capfd):
  """Of steps 2 and 3 alone, whole, by the names that a session of several hosts needs."""
  with compiled.Profile(str(tmp_path), (2, 3), first_step=1) as trace:
    for step in range(1, 6):
      trace.begin(step)
      with jax.profiler.TraceAnnotation(f'phase-of-{step}'):
        jnp.sum(jnp.arange(8)).block_until_ready()
      trace.end(step)
  session = tmp_path / 'plugins' / 'profile' / 'steps_2_3'
  assert sorted(path.name for path in session.iterdir()) == [
      'process_0.perfetto_trace.json.gz', 'process_0.trace.json.gz', 'process_0.xplane.pb']
  text = (session / 'process_0.xplane.pb').read_bytes()
  assert [step for step in range(1, 6) if f'phase-of-{step}'.encode() in text] == [2, 3]
  assert f'trace of steps 2 to 3: {tmp_path}' in capfd.readouterr().out


@pytest.mark.parametrize('first_step, traced, said', [
    (3, [3], 'goes on at step 3, so that steps 3 to 3 are traced'), (4, [], 'none of steps 2 to 3 is traced')])
def test_a_run_that_goes_on_traces_what_is_left(tmp_path, capfd, monkeypatch, first_step, traced, said):
  monkeypatch.setattr(compiled.Profile, '_write', lambda *_: None)
  annotated = []
  monkeypatch.setattr(jax.profiler, 'StepTraceAnnotation', lambda name, step_num: annotated.append(step_num)
                      or jax.profiler.TraceAnnotation(name))
  with compiled.Profile(str(tmp_path), (2, 3), first_step) as trace:
    for step in range(first_step, 5):
      trace.begin(step)
      trace.end(step)
  assert annotated == traced and said in capfd.readouterr().out


def test_a_trace_that_cannot_be_written_stops_no_run(tmp_path, caplog):
  (tmp_path / 'file').touch()
  with caplog.at_level(logging.WARNING, 'absl'):
    with pytest.raises(SystemExit):
      with compiled.Profile(str(tmp_path / 'file' / 'profile'), (0, 9)) as trace:
        trace.begin(0)
        raise SystemExit('stopped in the middle of a step')
  assert '--profile: no trace is written' in caplog.text


def test_a_trace_that_cannot_begin_stops_no_run(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(compiled.tempfile, 'tempdir', str(tmp_path / 'none'))
  with compiled.Profile(str(tmp_path), (0, 1)) as trace:
    for step in range(3):
      trace.begin(step)
      trace.end(step)
  assert caplog.text.count('--profile: nothing is traced: FileNotFoundError') == 1 and not os.listdir(tmp_path)


@pytest.mark.exhaustive
def test_a_second_start_and_one_that_goes_on_compile_nothing(tmp_path, data_dir):
  """In fresh processes; the first cuts a program short, which the second compiles anew, and it alone."""
  flags = (f'--config.tasks.data_dir={data_dir}', '--config.policy.num_layers=1', '--config.record.page=False',
           '--config.num_steps=2', '--config.checkpoint.every=1', '--config.evaluate.tasks=4',
           '--config.grpo.kl_coef=0.1')
  found = cold_start.measure('configs/arithmetic.py:debug', tmp_path, flags=flags,
                             xla_flags='--xla_backend_optimization_level=0')
  assert found['cold']['asked'] > 20 and not found['cold']['missed'] == []
  for name in ('warm', 'resumed'):
    assert found[name]['asked'] == found[name]['cached'] > 10 and found[name]['missed'] == []
  starts = ledger.read(str(tmp_path / 'first')).attempts
  assert [start['first_step'] for start in starts] == [0, 1]
  cut = max((tmp_path / 'cache' / 'xla').glob('jit__step-*-cache'))
  cut.write_bytes(cut.read_bytes()[:100])
  again = cold_start.start('configs/arithmetic.py:debug', tmp_path / 'third', tmp_path / 'cache', flags=flags,
                           xla_flags='--xla_backend_optimization_level=0')
  assert again['missed'] == ['jit__step'] and again['cached'] == again['asked'] - 1
  assert 'Error reading persistent compilation cache' not in (tmp_path / 'third.0.log').read_text()


IN_A_BUCKET = '''
import json, sys
import jax, jax.numpy as jnp
from kr_jax import compiled
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition('/')[2]))
assert compiled.keep(sys.argv[1]) == sys.argv[2]
assert float(jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((4, 4)))) > 0
print(json.dumps([events.count('cache_misses'), events.count('cache_hits')]))
'''


@pytest.mark.slow
def test_programs_in_a_bucket_are_read_by_the_next_machine(bucket):
  environment = {name: x for name, x in os.environ.items() if not name.startswith(('JAX_C', 'JAX_PERSISTENT'))}
  start = lambda: json.loads(subprocess.run(
      [sys.executable, '-W', 'error', '-c', IN_A_BUCKET, f'{bucket}/runs/a', f'{bucket}/runs/xla'], env=environment,
      check=True, capture_output=True, text=True).stdout.splitlines()[-1])
  missed, cached = start()
  assert missed > 0 and cached == 0
  assert start() == [0, missed]
