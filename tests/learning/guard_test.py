"""What is not finite is found, and named."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kr_jax import sharding
from kr_jax import types
from kr_jax.learning import guard
from kr_jax.learning import update
from kr_jax.model import policy
from tests import knobs

CHECKPOINTS = pathlib.Path(__file__).parents[1] / 'data' / 'checkpoints'
POLICY = policy.Config(
    vocab_size=7, num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=24,
    rope_theta=100.0, norm_eps=1e-6, qk_norm=False, qkv_bias=False, tie_embeddings=True, dtype='float32',
    remat='none', lora_rank=0, lora_alpha=1.0)


def tree(**changed):
  return {'a': np.ones((2, 3), np.float32), 'layers': {'b': np.zeros(4, np.float32)}, 'count': np.int32(3)} | changed


@pytest.mark.parametrize('x, name', [
    (tree(), None), (tree(a=np.float32([1, np.nan])), 'a'), (tree(a=np.float32([-np.inf])), 'a'),
    (tree(layers={'b': np.float32([2, np.inf]), 'c': np.float32([np.nan])}), 'layers.b'),
    (tree(a=np.zeros((0, 3), np.float32)), None), (tree(a=np.array(1, np.int32)), None), ({}, None),
    (tree(a=jnp.array([1, jnp.nan], jnp.bfloat16)), 'a'), (tree(key=jax.random.key(0)), None)])
def test_the_first_array_that_is_not_finite(x, name):
  assert guard.first_bad(x) == name


@pytest.mark.parametrize('shape', [(3,), (17,), (336, 16), (1000,), (2, 8, 128)])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_one_number_of_an_array_of_any_size_is_seen(shape, value):
  """A maximum alone, of XLA on a CPU, leaves nan out of large arrays."""
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  assert guard.first_bad({'x': x}) is None
  x.reshape(-1)[x.size // 2] = value
  assert guard.first_bad({'x': x}) == 'x' and np.asarray(guard.largest({'x': x})) == np.inf


def test_a_limit_is_of_absolute_values():
  x = {'a': np.float32([3, -4])}
  assert guard.first_bad(x, 4.0) is None and guard.first_bad(x, 3.5) == 'a'
  assert np.isfinite(np.float32(guard.LARGEST) ** 2 * np.float32(1e8))  # what it is for


def test_the_state_of_a_run_has_names():
  state = types.TrainState(np.int32(0), {'w': np.float32([1])}, ({'mu': np.float32([np.nan])},), jax.random.key(0))
  assert guard.first_bad(state) == 'opt_state.0.mu'
  assert guard.state_names(state.params, state.opt_state) == ('params.w', 'opt_state.0.mu')


def test_a_tensor_of_a_source_is_named_with_its_layer():
  params = {'embed_VD': np.ones((3, 2), np.float32), 'layers': {'q_DNH': np.ones((4, 2, 2, 2), np.float32)}}
  guard.check_params(params, 'policy.checkpoint=x')
  params['layers']['q_DNH'][2, 1, 0, 0] = np.nan
  with pytest.raises(guard.Diverged, match=r'^policy.checkpoint=x has a value of nan in layers.q_DNH \(layer 2\)'):
    guard.check_params(params, 'policy.checkpoint=x')
  params['layers']['q_DNH'][2, 1, 0, 0] = 2e15
  with pytest.raises(guard.Diverged, match=r'a value of 2e\+15 in layers.q_DNH \(layer 2\).*at most 1e\+15'):
    guard.check_params(params, 'policy.checkpoint=x')


@pytest.fixture(scope='module')
def state():
  config = knobs.updates()
  return jax.tree.map(np.array, update.init(policy.init(POLICY, jax.random.key(0)), jax.random.key(1), config)._replace(
      key=None))


def changed(params, name, value):
  x = np.array(params[name])
  x.reshape(-1)[-1] = value
  return {**params, name: x}


def test_a_policy_that_is_not_finite_is_told(state):
  """By its parameters, by its optimiser, or by the logits that it gives to parameters that are finite."""
  problem = lambda params, opt_state=state.opt_state: guard.problem(POLICY, params, opt_state, {})
  assert problem(state.params) is None
  programs = guard._tried._cache_size()  # those of other tests among them
  assert 'a value of nan in params.embed_VD' in problem(changed(state.params, 'embed_VD', np.nan))
  assert 'a value of 1e+16 in params.norm_D' in problem(changed(state.params, 'norm_D', 1e16))
  adam = jax.tree.map(lambda x: np.full_like(x, np.inf) if x.ndim else x, state.opt_state)
  assert 'opt_state' in problem(state.params, adam) and 'embed_VD' in problem(state.params, adam)
  layers = {name: np.full_like(x, 1e15) for name, x in state.params['layers'].items()}
  found = problem({**state.params, 'layers': layers})
  assert 'logits that are not finite' in found and '1e+15 in params.layers.' in found
  assert guard._tried._cache_size() == programs


@pytest.mark.slow
def test_a_policy_on_a_mesh_is_looked_at(state):
  mesh = sharding.mesh(data=2, fsdp=2, model=2)
  of = lambda params: guard.problem(POLICY, jax.device_put(params, sharding.of(mesh, params)), {}, {})
  with sharding.on(mesh):
    assert of(state.params) is None
    assert 'a value of nan in params.embed_VD' in of(changed(state.params, 'embed_VD', np.nan))


@pytest.mark.slow
def test_adapters_are_looked_at_with_their_base():
  config = dataclasses.replace(POLICY, lora_rank=2)
  trained, base = policy.split(config, policy.init(config, jax.random.key(0)))
  assert guard.problem(config, trained, {}, base) is None
  found = guard.problem(config, trained, {}, changed(base, 'norm_D', np.nan))
  assert 'logits that are not finite' in found


@pytest.mark.exhaustive
def test_a_checkpoint_that_is_not_finite_is_refused_before_training(tmp_path, data_dir):
  """By the name of the tensor, and its layer; nothing was trained."""
  source = shutil.copytree(CHECKPOINTS / 'qwen2', tmp_path / 'source')
  path, = source.glob('*.safetensors')
  tensors = safetensors.numpy.load_file(path)
  name = next(name for name in tensors if 'layers.1.mlp.up_proj' in name)
  tensors[name] = tensors[name].copy()
  tensors[name][0, 0] = np.inf
  safetensors.numpy.save_file(tensors, path, metadata={'format': 'pt'})
  with pytest.raises(guard.Diverged, match=r"^policy.checkpoint='\S+/source' has a value of inf in layers.up_DF "
                                           r'\(layer 1\)'):
    knobs.run(tmp_path / 'run', data_dir, policy__checkpoint=str(source), warm_start__num_steps=0,
              sample__prompt_length=64, pack__row_length=128)
  assert not (tmp_path / 'run' / 'checkpoints').exists() or not [*(tmp_path / 'run' / 'checkpoints').glob('[0-9]*')]
