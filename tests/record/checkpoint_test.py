"""What is saved comes back, and a workdir is one config's."""

import concurrent.futures
import json
import multiprocessing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kr_jax import types
from kr_jax.record import checkpoint

CONFIG = {'seed': 0, 'tasks': {'dataset': 'arithmetic', 'per_step': 32, 'data_dir': ''},
          'checkpoint': {'every': 20, 'keep': 2}}


def run(seed: int, step: int = 7, I: int = 5) -> tuple[types.TrainState, types.TaskStats]:
  """A state and statistics with values that no rounding leaves as they are."""
  rng = np.random.default_rng(seed)
  params = {'layers': {'w_LDF': jnp.asarray(rng.normal(size=(2, 8, 3)), jnp.float32),
                       'scale_D': jnp.asarray(rng.normal(size=8), jnp.bfloat16)},
            'odd': jnp.array([-0.0, 1e-42, jnp.inf], jnp.float32)}
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
    with pytest.raises(ValueError, match='holds other parameters than the config asks for'):
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


def refusal_of_other_shapes(directory: str) -> str:
  """What restoring says where a parameter has another shape than was saved."""
  state, stats = run(0)
  with checkpoint.Checkpoints(directory) as checkpoints:
    checkpoints.save(7, state, stats)
    try:
      checkpoints.restore(state._replace(params={**state.params, 'odd': jnp.zeros(4)}), stats)
    except ValueError as error:
      return str(error)
  return ''


def test_params_of_other_shapes_are_not_restored(tmp_path):
  # In a process of its own: Orbax gives up in the midst of reading, and what it leaves behind
  # would be a warning, so an error, in whichever test collects it.
  with concurrent.futures.ProcessPoolExecutor(
      1, mp_context=multiprocessing.get_context('spawn')) as process:
    message = process.submit(refusal_of_other_shapes, str(tmp_path)).result()
  assert '(4,)' in message and '(3,)' in message


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


def changed(**knobs) -> dict:
  """CONFIG with 'section__knob' set."""
  config = json.loads(json.dumps(CONFIG))
  for name, x in knobs.items():
    *sections, knob = name.split('__')
    node = config
    for section in sections:
      node = node[section]
    node[knob] = x
  return config


def claimed(workdir) -> dict:
  return json.loads((workdir / 'config.json').read_text())


def test_claim_a_fresh_workdir_and_again(tmp_path):
  workdir = tmp_path / 'runs' / 'one'
  for _ in range(2):
    checkpoint.claim(str(workdir), CONFIG, may_change=())
    assert claimed(workdir) == CONFIG
    assert [path.name for path in workdir.iterdir()] == ['config.json']


def test_claim_a_workdir_without_the_record_of_the_checkpoints(tmp_path):
  directory = tmp_path / 'shared' / 'checkpoints'
  (directory / '4.orbax-checkpoint-tmp').mkdir(parents=True)
  checkpoint.claim(str(tmp_path / 'new'), CONFIG, may_change=(), directory=str(directory))
  (directory / '4').mkdir()
  checkpoint.claim(str(tmp_path / 'new'), CONFIG, may_change=(), directory=str(directory))
  with pytest.raises(ValueError, match=f'{directory} holds checkpoints of a run, and --workdir={tmp_path}/other has no '
                     'record of it'):
    checkpoint.claim(str(tmp_path / 'other'), CONFIG, may_change=(), directory=str(directory))


def test_claim_with_changed_knobs_names_old_and_new(tmp_path):
  checkpoint.claim(str(tmp_path), CONFIG, may_change=())
  with pytest.raises(ValueError) as error:
    checkpoint.claim(str(tmp_path), changed(seed=3, tasks__per_step=16, tasks__data_dir='/data'),
                     may_change=('tasks.data_dir', 'checkpoint'))
  message = str(error.value)
  assert f'--workdir={tmp_path} holds a run of another config' in message
  assert 'seed was 0, is 3; tasks.per_step was 32, is 16' in message
  assert 'Name another --workdir' in message
  assert 'data_dir' not in message and 'checkpoint' not in message
  assert claimed(tmp_path) == CONFIG


def test_claim_with_a_knob_more_or_less(tmp_path):
  checkpoint.claim(str(tmp_path), CONFIG, may_change=())
  with pytest.raises(ValueError, match=r'tasks.extra was None, is 1\.'):
    checkpoint.claim(str(tmp_path), changed(tasks__extra=1), may_change=())
  less = changed()
  del less['tasks']['per_step']
  with pytest.raises(ValueError, match=r'tasks.per_step was 32, is None\.'):
    checkpoint.claim(str(tmp_path), less, may_change=())


def test_claim_with_a_knob_that_is_newer_than_the_run(tmp_path):
  """It was its default."""
  checkpoint.claim(str(tmp_path), CONFIG, may_change=())
  newer = changed(tasks__columns={'problem': '', 'answer': ''}, mesh={'data': 1}, topologies=[])
  checkpoint.claim(str(tmp_path), newer, may_change=())
  assert claimed(tmp_path) == newer
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
  with pytest.raises(ValueError, match=r"config: tasks.columns.answer was '', is 'x'\."):
    checkpoint.claim(str(tmp_path), changed(tasks__columns={'answer': 'x', 'problem': ''}), may_change=())


@pytest.mark.parametrize('knobs, may_change', [
    ({'checkpoint__every': 5, 'checkpoint__keep': 9}, ('checkpoint',)),
    ({'checkpoint__every': 5}, ('checkpoint.every',)),
    ({'seed': 1}, ('seed', 'tasks')),
    ({'tasks__files': {'one': 'a', 'two': 'b'}}, ('tasks.files',)),
])
def test_claim_with_knobs_that_may_change(tmp_path, knobs, may_change):
  checkpoint.claim(str(tmp_path), CONFIG, may_change=may_change)
  checkpoint.claim(str(tmp_path), changed(**knobs), may_change=may_change)
  assert claimed(tmp_path) == changed(**knobs)
  with pytest.raises(ValueError, match='holds a run of another config'):  # by no other name
    checkpoint.claim(str(tmp_path), CONFIG, may_change=('keep', 'every', 'check', 'tasks.seed'))


@pytest.mark.parametrize('name', ['file', 'file/workdir'])
def test_claim_what_cannot_be_written(tmp_path, name):
  (tmp_path / 'file').write_text('held')
  with pytest.raises(ValueError, match=rf'cannot write to --workdir={tmp_path}/{name}: .*; '
                                       'name a directory that can be written'):
    checkpoint.claim(str(tmp_path / name), CONFIG, may_change=())
  assert (tmp_path / 'file').read_text() == 'held'
