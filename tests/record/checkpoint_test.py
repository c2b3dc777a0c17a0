"""What is saved comes back, or is known to be damaged."""

import pathlib
import re
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from kr_jax import errors
from kr_jax import files
from kr_jax import sharding
from kr_jax import types
from kr_jax.record import checkpoint
from kr_jax.record import ledger
from kr_jax.record import metrics
from tests import knobs

ROOT = pathlib.Path(__file__).parents[2]


def run(seed: int, step: int = 7, I: int = 5) -> tuple[types.TrainState, types.TaskStats]:
  """A state and statistics with values that no rounding leaves as they are."""
  rng = np.random.default_rng(seed)
  params = {'layers': {'w_LDF': jnp.asarray(rng.normal(size=(2, 40, 30)), jnp.float32),
                       'scale_D': jnp.asarray(rng.normal(size=8), jnp.bfloat16)},
            'odd': jnp.array([-0.0, 1e-42, 3e38], jnp.float32)}
  optimizer = optax.adamw(1e-3)
  grads = jax.tree.map(lambda x: x * 0 + x.dtype.type(0.3), {**params, 'odd': jnp.ones(3)})
  _, opt_state = optimizer.update(grads, optimizer.init(params), params)
  return (types.TrainState(jnp.int32(step), params, opt_state, jax.random.key(seed)),
          types.TaskStats(
              rng.random(I) / 3, rng.random(I) / 7, rng.random((2, I)) / 9, rng.random(I) / 5, rng.random(I) / 3,
              rng.integers(2**40, 2**50, I), rng.integers(-1, 2, (I, 16), np.int8), rng.random(I) / 11,
              rng.integers(0, 9, I, np.int32), rng.random((2, I)) / 7, rng.random((6, 4)) / 9, rng.random(3) / 3,
              rng.random((2, 2)) / 7, rng.random(4) / 13))


def same(x, y) -> None:
  """Equal trees, bit for bit."""
  assert jax.tree.structure(x) == jax.tree.structure(y)
  for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
    assert a.dtype == b.dtype
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_same_sees_a_bit():
  state, stats = run(0)
  same((state, stats), run(0))
  for other in ((state._replace(key=jax.random.key(1)), stats),
                (state, stats._replace(successes_I=np.nextafter(stats.successes_I, 1)))):
    with pytest.raises(AssertionError):
      same((state, stats), other)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
  with checkpoint.Checkpoints(str(tmp_path / 'checkpoints')) as checkpoints:
    checkpoints.save(7, *run(0))
  with checkpoint.Checkpoints(str(tmp_path / 'checkpoints')) as checkpoints:
    state, stats = checkpoints.restore(*run(1, step=0))
  same((state, stats), run(0))
  assert isinstance(state, types.TrainState) and isinstance(stats, types.TaskStats)
  assert all(isinstance(x, np.ndarray) for x in stats)
  assert jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
  same(jax.random.normal(jax.random.fold_in(state.key, 3), (4,)),
       jax.random.normal(jax.random.fold_in(jax.random.key(0), 3), (4,)))


def test_comes_back_on_the_devices_of_the_arguments(tmp_path):
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('fsdp',))
  one = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'fsdp'))

  def put(sharding, seed):
    state, stats = run(seed)
    state.params['layers']['w_LDF'] = jax.device_put(state.params['layers']['w_LDF'], sharding)
    return state, stats

  for i, (saved, asked) in enumerate(((one, split), (split, one))):
    with checkpoint.Checkpoints(str(tmp_path / str(i))) as checkpoints:
      checkpoints.save(7, *put(saved, 0))
      state, stats = checkpoints.restore(*put(asked, 1))
    same((state, stats), run(0))
    assert state.params['layers']['w_LDF'].sharding == asked


def test_parameters_alone(tmp_path):
  """Without the optimiser, on whatever devices."""
  other = jax.sharding.SingleDeviceSharding(jax.devices()[3])
  shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=other), tree)
  state, stats = run(0)
  with checkpoint.Checkpoints(str(tmp_path / 'checkpoints')) as checkpoints:
    checkpoints.save(7, state, stats)
  with checkpoint.Checkpoints(str(tmp_path / 'checkpoints')) as checkpoints:
    step, params = checkpoints.params(shapes(state.params))
    assert step == 7 and params['odd'].devices() == {jax.devices()[3]}
    same(params, state.params)
    with pytest.raises(ValueError, match=r'params/others is not in it, and float32\(3,\) by the config'):
      checkpoints.params(shapes(state.params | {'others': jnp.zeros(3)}))


def test_latest_and_keep(tmp_path):
  with checkpoint.Checkpoints(str(tmp_path), keep=2) as checkpoints:
    assert checkpoints.latest() is None
    for step in (2, 5, 9):
      checkpoints.save(step, *run(step, step=step))
      assert checkpoints.latest() == step
  assert sorted(path.name for path in tmp_path.iterdir()) == ['5', '9']
  with checkpoint.Checkpoints(str(tmp_path), keep=2) as checkpoints:
    assert checkpoints.latest() == 9
    same(checkpoints.restore(*run(0)), run(9, step=9))


def test_a_step_is_saved_once(tmp_path):
  with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(7, *run(0))
    checkpoints.save(7, *run(1))
    same(checkpoints.restore(*run(2)), run(0))


def test_the_record_of_a_bucket_is_sent_before_a_checkpoint(tmp_path, monkeypatch):
  sent = []
  with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
    monkeypatch.setattr(checkpoint.mirror, 'push', lambda: sent.append(checkpoints.latest()))
    checkpoints.save(1, *run(0))
    checkpoints.save(2, *run(0))
    checkpoints.save(2, *run(0))
  assert sent == [None, 1]


def test_a_checkpoint_that_a_kill_left_unfinished_is_not_the_latest(tmp_path):
  with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(7, *run(0))
  (tmp_path / '9.orbax-checkpoint-tmp').mkdir()
  with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
    assert checkpoints.latest() == 7
    same(checkpoints.restore(*run(1)), run(0))


def test_no_checkpoint_to_restore(tmp_path):
  with checkpoint.Checkpoints(str(tmp_path / 'none')) as checkpoints:
    with pytest.raises(ValueError, match=r'/none holds no checkpoint; train first'):
      checkpoints.restore(*run(0))


def test_params_of_other_shapes_are_not_restored(tmp_path):
  state, stats = run(0)
  with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(7, state, stats)
    with pytest.raises(ValueError, match=r'params/odd is float32\(3,\) in it, and float32\(4,\) by the config'):
      checkpoints.restore(state._replace(params={**state.params, 'odd': jnp.zeros(4)}), stats)
    assert checkpoints.latest() == 7 and (tmp_path / '7').is_dir()


def test_params_of_other_names_are_not_restored(tmp_path):
  state, stats = run(0)
  with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(7, state, stats)
    with pytest.raises(ValueError, match='even'):
      checkpoints.restore(
          state._replace(params={**state.params, 'even': state.params['odd']}), stats)


def test_statistics_of_another_split_are_not_restored(tmp_path):
  with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(7, *run(0, I=5))
    with pytest.raises(ValueError, match=r'\b5\b.*\b6\b|\b6\b.*\b5\b'):
      checkpoints.restore(*run(0, I=6))


# Damage.


def two(directory, *steps: int, keep: int = 9) -> str:
  """A directory with checkpoints of these steps, 5 and 9 unless any is named."""
  with checkpoint.Checkpoints(str(directory), keep=keep) as checkpoints:
    for step in steps or (5, 9):
      checkpoints.save(step, *run(step, step=step))
  return str(directory)


def flip(path, bit: int) -> None:
  """Changes a bit of a file, of those in its middle."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1 << bit
  path.write_bytes(content)


def largest(directory):
  """The largest file of a tree, which holds values."""
  return max((path for path in directory.rglob('*') if path.is_file()), key=lambda path: (path.stat().st_size, path))


def is_damaged(bad: str, good: int, why: str, lost: int) -> str:
  """A pattern of the warning."""
  parent = bad.rpartition('/')[0]
  return (f'the checkpoint {bad} is damaged \\({why}\\): that of step {good} is taken in its place, {parent}/{good}, '
          f'and {lost} steps are lost')


def test_a_damaged_newest_one_falls_back_to_the_one_before(tmp_path, caplog, capsys):
  directory = two(tmp_path)
  flip(largest(tmp_path / '9' / 'state'), 3)
  with checkpoint.Checkpoints(directory, keep=2) as checkpoints:
    assert checkpoints.latest() == 9
    same(checkpoints.restore(*run(1)), run(5, step=5))
    assert checkpoints.latest() == 5
    said = is_damaged(f'{directory}/9', 5, '.+', 4) + (f'. It is kept as {directory}/9.damaged-1, which nothing reads; '
                                                       'remove it when you like')
    assert re.fullmatch(said, caplog.messages[-1]) and caplog.records[-1].levelname == 'ERROR'
    assert re.fullmatch(f'ALARM: {said}\n', capsys.readouterr().out)
    checkpoints.save(9, *run(3, step=9))
  assert sorted(path.name for path in tmp_path.iterdir()) == ['5', '9', '9.damaged-1']
  with checkpoint.Checkpoints(directory) as checkpoints:
    same(checkpoints.restore(*run(1)), run(3, step=9))


@pytest.mark.slow
def test_who_only_reads_moves_nothing(tmp_path, caplog):
  directory = two(tmp_path)
  flip(largest(tmp_path / '9' / 'state'), 3)
  (tmp_path / '11.orbax-checkpoint-tmp').mkdir()
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, run(0)[0].params)
  for of in (lambda found: found.restore(*run(1))[0].params, lambda found: found.params(shapes)[1]):
    with checkpoint.Checkpoints(directory, writes=False) as checkpoints:
      same(of(checkpoints), run(5, step=5)[0].params)
    assert re.fullmatch(is_damaged(f'{directory}/9', 5, '.+', 4) + '. It is left as it is', caplog.messages[-1])
  assert sorted(path.name for path in tmp_path.iterdir()) == ['11.orbax-checkpoint-tmp', '5', '9']
  with checkpoint.Checkpoints(directory, writes=False, step=9) as checkpoints:
    with pytest.raises(ValueError, match=f'^no checkpoint can be read, and none was changed: {directory}/9: '):
      checkpoints.restore(*run(1))
  with checkpoint.Checkpoints(directory, writes=False, step=5) as checkpoints:
    assert checkpoints.params(shapes)[0] == 5
  with checkpoint.Checkpoints(directory, writes=False, step=7) as checkpoints:
    with pytest.raises(ValueError, match=f'{directory} holds no checkpoint of step 7; there are those of 5, 9'):
      checkpoints.require()


def test_where_none_is_whole_all_are_named_and_stay(tmp_path):
  directory = two(tmp_path)
  for step in (5, 9):
    (tmp_path / f'{step}' / 'state' / 'manifest.ocdbt').write_bytes(b'')
  with checkpoint.Checkpoints(directory) as checkpoints:
    with pytest.raises(ValueError, match=f'no checkpoint can be read, and none was changed: {directory}/9: .*; '
                       f'{directory}/5: .*') as error:
      checkpoints.restore(*run(1))
  assert '\n' not in str(error.value) and sorted(path.name for path in tmp_path.iterdir()) == ['5', '9']
  assert isinstance(error.value, errors.Told)


def test_one_that_a_run_removes_meanwhile_is_not_damaged(tmp_path, caplog):
  directory = two(tmp_path)
  with checkpoint.Checkpoints(directory, writes=False) as checkpoints:
    shutil.rmtree(tmp_path / '9')
    same(checkpoints.restore(*run(1)), run(5, step=5))
    shutil.rmtree(tmp_path / '5')
    with pytest.raises(ValueError, match=f'{directory} holds no checkpoint any more'):
      checkpoints.restore(*run(1))
  assert not [record for record in caplog.records if record.levelname == 'ERROR']


def test_a_policy_that_is_no_number_is_not_taken(tmp_path, caplog):
  directory, (state, stats) = two(tmp_path, 5), run(9, step=9)
  state.params['layers']['scale_D'] = state.params['layers']['scale_D'].at[2].set(jnp.nan)
  with checkpoint.Checkpoints(directory, keep=2) as checkpoints:
    checkpoints.save(9, state, stats)
  with checkpoint.Checkpoints(directory) as checkpoints:
    same(checkpoints.restore(*run(1)), run(5, step=5))
  assert 'damaged (params/layers/scale_D holds values that are infinite or no numbers)' in caplog.messages[-1]


def test_a_checkpoint_under_the_name_of_another_is_not_taken(tmp_path, caplog):
  directory = two(tmp_path)
  (tmp_path / '9').rename(tmp_path / '12')
  with checkpoint.Checkpoints(directory) as checkpoints:
    same(checkpoints.restore(*run(1)), run(5, step=5))
  assert '/12 is damaged (it is the checkpoint of step 9)' in caplog.messages[-1]
  with checkpoint.Checkpoints(directory, keep=2) as checkpoints:
    checkpoints.save(6, *run(6, step=7))
    same(checkpoints.restore(*run(1)), run(5, step=5))
  assert '/6 is damaged (it holds step 7)' in caplog.messages[-1]


def test_one_of_an_older_version_is_taken_with_a_warning(tmp_path, caplog):
  """Which Orbax's manager saved, without checksums."""
  state, stats = run(9, step=9)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(9, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state._asdict()), stats=ocp.args.StandardSave(stats._asdict())))
  caplog.clear()
  with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
    same(checkpoints.restore(*run(1)), (state, stats))
    assert [text for text in caplog.messages if 'checksums' in text] == [
        f'{tmp_path}/9 holds no checksums: it is of an older version, and is taken as it is']
    same(checkpoints.params(jax.tree.map(ocp.utils.to_shape_dtype_struct, state.params))[1], state.params)


def test_what_is_no_checkpoint_is_not_looked_at(tmp_path):
  directory = two(tmp_path, 5)
  for name in ('17', 'tmp', '7.orbax-checkpoint-tmp-123', '9.orbax-checkpoint-tmp'):
    (tmp_path / name).mkdir()
  (tmp_path / '12').write_text('notes')
  for writes in (False, True):
    with checkpoint.Checkpoints(directory, writes=writes, keep=2) as checkpoints:
      assert checkpoints.latest() == 5
      same(checkpoints.restore(*run(1)), run(5, step=5))
      names = sorted(path.name for path in tmp_path.iterdir())
      assert names == ['12', '17', '5'] + (['tmp'] if writes else [
          '7.orbax-checkpoint-tmp-123', '9.orbax-checkpoint-tmp', 'tmp'])
  with checkpoint.Checkpoints(directory, keep=3) as checkpoints:
    for step in (12, 17):
      checkpoints.save(step, *run(1, step=step))
    assert checkpoints.latest() == 17
  assert (tmp_path / '12.damaged-1').read_text() == 'notes'
  assert sorted(path.name for path in tmp_path.iterdir()) == ['12', '12.damaged-1', '17', '5', 'tmp']


# When one is saved, and which stay.


def test_the_best_stay_over_a_restart(tmp_path):
  there = lambda: sorted(int(path.name) for path in tmp_path.iterdir() if path.is_dir())
  open_ = lambda: checkpoint.Checkpoints(str(tmp_path), keep=1, best=1)
  with open_() as checkpoints:
    for step, score in ((2, .5), (4, .9), (6, .1)):
      checkpoints.save(step, *run(1, step=step))
      checkpoints.note_score(step, score)
  assert there() == [4, 6]
  with open_() as checkpoints:
    checkpoints.save(8, *run(1, step=8))
    checkpoints.wait()
    assert there() == [4, 8]
    checkpoints.note_score(8, .95)
    checkpoints.save(10, *run(1, step=10))
    checkpoints.note_score(10, None)
  assert there() == [8, 10]
  with checkpoint.Checkpoints(str(tmp_path), keep=1) as checkpoints:
    checkpoints.note_score(10, 1.0)
    checkpoints.save(12, *run(1, step=12))
  assert there() == [12] and '10' not in (tmp_path / 'scores.json').read_text()


def test_when_one_is_due(tmp_path, monkeypatch):
  now = [1000.0]
  monkeypatch.setattr(checkpoint.time, 'monotonic', lambda: now[0])
  gathered = []
  monkeypatch.setattr(checkpoint.processes, 'gather', lambda x: gathered.append(x) or x[None])

  def due(checkpoints, steps, seconds):
    found = []
    for step in steps:
      now[0] += seconds
      if checkpoints.is_due(step):
        found.append(step)
        checkpoints._saved_at = now[0]
    return found

  with checkpoint.Checkpoints(str(tmp_path), every=4) as checkpoints:
    gathered.clear()
    assert due(checkpoints, range(1, 13), 1e6) == [4, 8, 12] and not gathered  # nobody is asked
  with checkpoint.Checkpoints(str(tmp_path), every=100, minutes=1) as checkpoints:
    assert due(checkpoints, range(1, 13), 16) == [3, 6, 9, 12]  # 64 s were more than a minute of work
    assert due(checkpoints, [100], 1) == [100]
    assert due(checkpoints, [101, 102, 103], 61) == [101, 102, 103]
    monkeypatch.setattr(checkpoint.processes, 'gather', lambda x: np.array([True, False]))  # the first decides
    assert due(checkpoints, [104], 0) == [104]


# Disks.


def test_a_file_that_is_too_large_is_said_and_the_one_before_stays(tmp_path, caplog):
  directory, (state, stats) = two(tmp_path, 5), run(9, step=9)
  state.params['large'] = jax.random.normal(jax.random.key(0), (60_000,))
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with checkpoint.Checkpoints(directory) as checkpoints:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
      with pytest.raises(files.Unsaved, match='a checkpoint cannot be written: .*larger.* The one before it '
                         f'stays: {directory}/5') as error:
        checkpoints.save(9, state, stats)
        checkpoints.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert '\n' not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ['5']
    assert 'Error' not in caplog.text and error.value.names_checkpoint
    checkpoints.save(9, state, stats)
  with checkpoint.Checkpoints(directory) as checkpoints:
    assert checkpoints.latest() == 9


def test_another_process_that_did_not_write_its_part(tmp_path, monkeypatch):
  """Its disk may be full, of which it says so itself; a new start of all may go on."""
  directory = two(tmp_path / 'run', 5)
  with checkpoint.Checkpoints(directory) as checkpoints:
    late = TimeoutError('Timed out while waiting for async_write_complete barrier.')
    monkeypatch.setattr(checkpoints._orbax, 'save', lambda *_, **__: (_ for _ in ()).throw(late))
    with pytest.raises(files.Unsaved, match='another process has ended, or .*The one before it stays: .*/5') as error:
      checkpoints.save(6, *run(6, step=6))
      checkpoints.wait()
    assert error.value.again


def test_checkpoints_that_were_removed(tmp_path, caplog):
  directory = two(tmp_path / 'run', 5)
  with checkpoint.Checkpoints(directory, keep=3) as checkpoints:
    checkpoints.save(6, *run(6, step=6))
    checkpoints.wait()
    shutil.rmtree(tmp_path / 'run' / '5')
    checkpoints.save(7, *run(7, step=7))
    checkpoints.wait()
    assert f'the checkpoint {directory}/5 was removed, and not by this run' in caplog.text
    shutil.rmtree(tmp_path / 'run')
    with pytest.raises(files.Unsaved, match=f'a checkpoint cannot be written: .*{directory}.*No checkpoint is there'):
      checkpoints.save(8, *run(8, step=8))
  assert not (tmp_path / 'run').exists()


FULL = '''
import subprocess, sys
subprocess.run(['mount', '-t', 'tmpfs', '-o', 'nr_inodes=4', 'tmpfs', {directory!r}], check=True)
from tests.record.checkpoint_test import run
from kr_jax.record import checkpoint
try:
  with checkpoint.Checkpoints({directory!r} + '/c') as checkpoints:
    checkpoints.save(9, *run(9, step=9))
except checkpoint.files.Unsaved as error:
  print(error)
'''


@pytest.mark.slow
@pytest.mark.skipif(subprocess.run(['unshare', '-Urm', 'true'], capture_output=True).returncode != 0,
                    reason='no disk of its own can be mounted here')
def test_a_disk_without_room_for_a_directory_does_not_hang(tmp_path):
  done = subprocess.run(['unshare', '-Urm', sys.executable, '-c', FULL.format(directory=str(tmp_path))], text=True,
                        capture_output=True, timeout=120, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  assert re.fullmatch('a checkpoint cannot be written: the disk of .* is full .*No checkpoint is there\n', done.stdout)


# At length.


@pytest.mark.exhaustive
def test_200_damages(tmp_path, monkeypatch):
  """Bits, cuts, emptied and deleted files of every kind: each falls back or changes nothing."""
  base, tried = tmp_path / 'base', tmp_path / 'tried'
  two(base)
  monkeypatch.setattr(checkpoint.logging, 'error', lambda *_: None)
  rng, found = np.random.default_rng(23), []
  names = sorted(path.relative_to(base / '9') for path in (base / '9').rglob('*') if path.is_file())
  # Where values lie every second damage is a bit.
  kinds = [(name, kind) for kind in ('bit', 'cut', 'emptied', 'deleted') for name in names]
  values = [name for name in names if (base / '9' / name).stat().st_size > 1000]
  while len(kinds) < 200:
    kinds += [(name, 'bit') for name in values]
  for name, kind in kinds:
    shutil.rmtree(tried, ignore_errors=True)
    shutil.copytree(base, tried)
    path = tried / '9' / name
    content = bytearray(path.read_bytes())
    if kind == 'bit' and content:
      content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    left = {'cut': rng.integers(len(content) + 1), 'emptied': 0}.get(kind)
    path.write_bytes(content[:left])
    if kind == 'deleted':
      path.unlink()
    with checkpoint.Checkpoints(str(tried)) as checkpoints:
      state, stats = checkpoints.restore(*run(1))
    same((state, stats), run(int(state.step), step=int(state.step)))
    found.append((kind, int(state.step)))
  assert all((kind, 5) in found for kind in ('bit', 'cut', 'emptied', 'deleted')) and found.count(('bit', 5)) > 30


@pytest.mark.slow
@pytest.mark.parametrize('data, fsdp, model', [(1, 1, 1), (1, 2, 2), (1, 8, 1), (2, 1, 4)])
def test_saved_on_eight_devices_and_read_on_others(tmp_path, data, fsdp, model):
  """The checksums hold on other factorisations, and see a difference there."""
  def placed(mesh, state):
    shapes = sharding.shapes_on(mesh, state)
    return jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), state, shapes), shapes

  state, stats = run(5, step=5)
  with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(5, placed(sharding.mesh(data=2, fsdp=2, model=2), state)[0], stats)
  count = data * fsdp * model
  mesh = None if count == 1 else sharding.mesh(jax.devices()[:count], data=data, fsdp=fsdp, model=model)
  with checkpoint.Checkpoints(str(tmp_path)) as checkpoints, sharding.on(mesh):
    found, _ = checkpoints.restore(placed(mesh, state)[1], stats)
    same(found, state)
    assert len(found.params['layers']['w_LDF'].sharding.device_set) == count
    assert checkpoints.params(placed(mesh, state)[1].params)[0] == 5
  flip(largest(tmp_path / '5' / 'state'), 3)
  with checkpoint.Checkpoints(str(tmp_path)) as checkpoints, sharding.on(mesh):
    with pytest.raises(ValueError, match='no checkpoint can be read'):
      checkpoints.restore(placed(mesh, state)[1], stats)


@pytest.mark.exhaustive
def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_if_it_had_not_been(finished, tmp_path, data_dir):
  """It goes on from the one before, and its record repeats those steps."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  flip(largest(workdir / 'checkpoints' / '4' / 'state'), 3)
  knobs.run(workdir, data_dir)
  assert (workdir / 'checkpoints' / '4.damaged-1').is_dir()
  rows = lambda of: [{name: x for name, x in row.items() if not name.endswith('_s') and name != 'compile_count'}
                     for row in metrics.read(str(pathlib.Path(of) / 'metrics.jsonl'))]
  assert rows(workdir) == rows(finished)
  starts = ledger.read(str(workdir)).attempts
  assert [start['first_step'] for start in starts] == [0, 2]
  read = lambda of: ocp.PyTreeCheckpointer().restore(f'{of}/checkpoints/4/stats')
  jax.tree.map(np.testing.assert_array_equal, read(workdir), read(finished))
