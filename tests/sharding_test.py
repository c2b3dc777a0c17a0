"""Each parameter's name says where it is on the mesh; without a mesh nothing is asked for."""

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from kr_jax import policy
from kr_jax import sharding
from kr_jax import update
from tests import knobs

POLICY = policy.Config(
    vocab_size=16, num_layers=2, width=16, num_heads=8, num_kv_heads=8, head_width=2, hidden_width=24,
    rope_theta=100.0, norm_eps=1e-6, qk_norm=True, qkv_bias=True, tie_embeddings=False,
    dtype='float32', remat='none', lora_rank=2, lora_alpha=1.0)
# By hand. Of layers the first axis is which layer.
PARTITIONS = {
    'embed_VD': ('model', 'fsdp'), 'output_DV': ('fsdp', 'model'), 'norm_D': (),
    'layers': {
        'attention_norm_D': (), 'mlp_norm_D': (), 'q_norm_H': (), 'k_norm_H': (),
        'q_DNH': (None, 'fsdp', 'model', None), 'k_DKH': (None, 'fsdp', 'model', None),
        'v_DKH': (None, 'fsdp', 'model', None), 'o_NHD': (None, 'model', None, 'fsdp'),
        'gate_DF': (None, 'fsdp', 'model'), 'up_DF': (None, 'fsdp', 'model'),
        'down_FD': (None, 'model', 'fsdp'),
        'q_bias_NH': (None, 'model', None), 'k_bias_KH': (None, 'model', None),
        'v_bias_KH': (None, 'model', None),
        'q_lora_DA': (None, 'fsdp', None), 'q_lora_ANH': (None, None, 'model', None),
        'k_lora_DA': (None, 'fsdp', None), 'k_lora_AKH': (None, None, 'model', None),
        'v_lora_DA': (None, 'fsdp', None), 'v_lora_AKH': (None, None, 'model', None),
        'o_lora_NHA': (None, 'model', None, None), 'o_lora_AD': (None, None, 'fsdp'),
        'gate_lora_DA': (None, 'fsdp', None), 'gate_lora_AF': (None, None, 'model'),
        'up_lora_DA': (None, 'fsdp', None), 'up_lora_AF': (None, None, 'model'),
        'down_lora_FA': (None, 'model', None), 'down_lora_AD': (None, None, 'fsdp'),
    },
}


def params_of():
  return policy.init(POLICY, jax.random.key(0))


def test_partitions_by_name():
  params = params_of()
  got = jax.tree_util.tree_map_with_path(lambda path, _: tuple(sharding.partition(path)), params)
  assert got == PARTITIONS
  # A partition has an axis for each of the array's, or none.
  jax.tree.map(lambda x, axes: len(axes) in (0, x.ndim) or pytest.fail(f'{x.shape} {axes}'), params,
               got, is_leaf=lambda x: isinstance(x, tuple))


def test_a_name_without_letters_is_replicated():
  Key, Attribute = jax.tree_util.DictKey, jax.tree_util.GetAttrKey
  for path in ((), (Key('count'),), (Attribute('mu'), Key('scale_D')), (Attribute('key'),),
               (Key('w_Db'),), (jax.tree_util.SequenceKey(0),)):
    assert sharding.partition(path) == PartitionSpec()
  assert sharding.partition((Attribute('mu'), Key('w_DF'))) == PartitionSpec('fsdp', 'model')


def test_a_state_is_divided_as_its_parameters_are():
  mesh = sharding.mesh(data=2, fsdp=2, model=2)
  state = update.init(params_of(), jax.random.key(0), knobs.updates())
  of = sharding.of(mesh, state)
  want = jax.tree.map(lambda axes: NamedSharding(mesh, PartitionSpec(*axes)), PARTITIONS,
                      is_leaf=lambda x: isinstance(x, tuple))
  adam = of.opt_state[1][0]
  assert of.params == adam.mu == adam.nu == want
  assert of.step == of.key == adam.count == NamedSharding(mesh, PartitionSpec())
  placed = jax.device_put(state, of)
  x = placed.opt_state[1][0].nu['layers']['q_DNH']
  assert {s.data.shape for s in x.addressable_shards} == {(2, 8, 4, 2)}
  np.testing.assert_array_equal(placed.params['embed_VD'], state.params['embed_VD'])


def test_a_mesh_of_all_devices():
  mesh = sharding.mesh(fsdp=4, data=2)
  assert mesh.axis_names == ('data', 'fsdp', 'model') == sharding.AXES
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 4, 'model': 1}
  assert mesh.devices.ravel().tolist() == jax.devices()
  assert sharding.mesh(jax.devices()[:1]).size == 1


@pytest.mark.parametrize('sizes', [{}, {'data': 3}, {'data': 4, 'fsdp': 4}])
def test_a_mesh_of_another_number_of_devices(sizes):
  n = int(np.prod(list(sizes.values()), dtype=int))
  with pytest.raises(ValueError, match=f'needs {n} devices; there are 8'):
    sharding.mesh(**sizes)


def test_without_a_mesh_nothing_is_constrained():
  params = {'w_DF': jnp.ones((8, 8))}
  assert sharding.constrain(params) is params
  assert sharding.constrain_rows(params['w_DF']) is params['w_DF']
  assert 'sharding_constraint' not in str(jax.make_jaxpr(sharding.constrain)(params))


def test_under_a_mesh_values_are_where_their_name_says():
  x_DF = jnp.arange(64.0).reshape(8, 8)
  mesh = sharding.mesh(data=2, fsdp=2, model=2)
  with jax.set_mesh(mesh):
    tree, rows = jax.jit(lambda x: (sharding.constrain({'layers': {'w_DF': x[None]}, 'w_D': x[0]}),
                                    sharding.constrain_rows(x)))(x_DF)
  assert {s.data.shape for s in tree['layers']['w_DF'].addressable_shards} == {(1, 4, 4)}
  assert {s.data.shape for s in rows.addressable_shards} == {(2, 8)}
  assert tree['w_D'].sharding.is_fully_replicated
  np.testing.assert_array_equal(rows, x_DF)


def test_what_is_served_is_divided_over_model_alone():
  mesh = sharding.mesh(data=2, fsdp=2, model=2)
  params = {'embed_VD': jnp.zeros((8, 4)), 'layers': ({'q_DNH': jnp.zeros((4, 2, 2))},) * 2}
  with jax.set_mesh(mesh):
    served = jax.jit(lambda x: sharding.constrain(x, axes=('model',)))(params)
  wanted = {'embed_VD': PartitionSpec('model', None),
            'layers': ({'q_DNH': PartitionSpec(None, 'model', None)},) * 2}
  for x, spec in zip(jax.tree.leaves(served), jax.tree.leaves(wanted), strict=True):
    assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


def test_axes_that_a_shard_map_has_taken():
  assert sharding.unmapped(sharding.AXES) == ()
  with jax.set_mesh(sharding.mesh(data=4, model=2)):
    assert sharding.unmapped(sharding.AXES) == sharding.AXES
    seen = []

    def inside(x):
      seen.append(sharding.unmapped(sharding.AXES))
      return x

    rows = PartitionSpec(('data', 'fsdp'))
    jax.jit(jax.shard_map(inside, in_specs=rows, out_specs=rows, axis_names={'data', 'fsdp'}))(
        jnp.zeros(4))
    assert seen == [('model',)]


def test_rows_are_spread_over_data_and_fsdp():
  assert sharding.row_shards() == 1
  with jax.set_mesh(sharding.mesh(data=2, fsdp=2, model=2)):
    assert sharding.row_shards() == 4


def test_the_platform_is_that_of_the_mesh():
  assert sharding.platform() == 'cpu'
  with jax.set_mesh(sharding.mesh(data=8)):
    assert sharding.platform() == 'cpu'
  devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices
  with jax.set_mesh(sharding.mesh(devices, fsdp=2, model=2)):
    assert sharding.platform() == 'tpu'
  assert sharding.platform() == 'cpu'
