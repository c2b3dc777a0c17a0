"""A parameter's name gives its partition on the mesh; without a mesh nothing is constrained."""

import dataclasses
import functools

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from kr_jax import knobs as knobs_lib
from kr_jax import sharding
from kr_jax.learning import update
from kr_jax.model import policy
from kr_jax.costs import hlo
from tests import knobs

POLICY = policy.Config(
    vocab_size=16, num_layers=2, width=16, num_heads=8, num_kv_heads=8, head_width=2, hidden_width=24,
    rope_theta=100.0, norm_eps=1e-6, qk_norm=True, qkv_bias=True, tie_embeddings=False,
    dtype='float32', remat='none', lora_rank=2, lora_alpha=1.0)
# By hand. Of layers the first axis is which layer.
D, E = ('fsdp', 'expert'), ('expert', 'model')
PARTITIONS = {
    'embed_VD': ('model', D), 'output_DV': (D, 'model'), 'norm_D': (),
    'layers': {
        'attention_norm_D': (), 'mlp_norm_D': (), 'q_norm_H': (), 'k_norm_H': (),
        'q_DNH': (None, D, 'model', None), 'k_DKH': (None, D, 'model', None),
        'v_DKH': (None, D, 'model', None), 'o_NHD': (None, 'model', None, D),
        'gate_DF': (None, D, 'model'), 'up_DF': (None, D, 'model'),
        'down_FD': (None, 'model', D),
        'q_bias_NH': (None, 'model', None), 'k_bias_KH': (None, 'model', None),
        'v_bias_KH': (None, 'model', None),
        'q_lora_DA': (None, D, None), 'q_lora_ANH': (None, None, 'model', None),
        'k_lora_DA': (None, D, None), 'k_lora_AKH': (None, None, 'model', None),
        'v_lora_DA': (None, D, None), 'v_lora_AKH': (None, None, 'model', None),
        'o_lora_NHA': (None, 'model', None, None), 'o_lora_AD': (None, None, D),
        'gate_lora_DA': (None, D, None), 'gate_lora_AF': (None, None, 'model'),
        'up_lora_DA': (None, D, None), 'up_lora_AF': (None, None, 'model'),
        'down_lora_FA': (None, 'model', None), 'down_lora_AD': (None, None, D),
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
  assert sharding.partition((Attribute('mu'), Key('w_DF'))) == PartitionSpec(D, 'model')


@pytest.mark.parametrize('name, learning, sampling', [
    ('gate_EDF', (E, 'fsdp', None), ('model', None, None)), ('down_EFD', (E, None, 'fsdp'), ('model', None, None)),
    ('router_DE', (D, None), (None, None)), ('gate_DF', (D, 'model'), (None, 'model'))])
def test_experts_are_divided_whole(name, learning, sampling):
  path = (jax.tree_util.DictKey(name),)
  assert sharding.partition(path) == PartitionSpec(*learning)
  assert sharding.partition(path, ('model',)) == PartitionSpec(*sampling)
  shape = tuple(16 for _ in learning)
  gathered = (E, None, None) if len(name) == 8 else sampling
  mesh = sharding.mesh(fsdp=2, expert=2, model=2)
  with jax.set_mesh(mesh):
    x = jax.jit(functools.partial(sharding.gather, name))(np.zeros(shape))
    assert x.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*gathered)), len(shape))


def test_a_state_is_divided_as_its_parameters_are():
  mesh = sharding.mesh(data=2, fsdp=2, model=2)
  state = update.init(params_of(), jax.random.key(0), knobs.updates())
  of = sharding.of(mesh, state)
  # 'expert' is one device here, and divides nothing.
  want = jax.tree.map(
      lambda axes: NamedSharding(mesh, PartitionSpec(*('fsdp' if axis == D else axis for axis in axes))), PARTITIONS,
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
  assert mesh.axis_names == ('data', 'fsdp', 'expert', 'model') == sharding.AXES
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 4, 'expert': 1, 'model': 1}
  assert mesh.devices.ravel().tolist() == jax.devices()
  assert sharding.mesh(jax.devices()[:1]).size == 1


SIZES = policy.without_lora(POLICY)


def meshes_of(rollouts=64, sizes=SIZES, **knobs):
  return sharding.meshes(knobs_lib.Mesh(**knobs), sizes, rollouts=rollouts)


@pytest.mark.parametrize('knobs, learn, samples', [
    ({}, (1, 8, 1), (1, 8, 1)), ({'data': 2}, (2, 4, 1), (2, 4, 1)), ({'model': 4}, (1, 2, 4), (1, 2, 4)),
    ({'sample_model': 4}, (1, 8, 1), (1, 2, 4)),
    ({'data': 2, 'model': 2, 'sample_model': 4}, (2, 2, 2), (2, 1, 4)),
    ({'model': 4, 'sample_model': 2}, (1, 2, 4), (1, 4, 2)), ({'devices': 2}, (1, 2, 1), (1, 2, 1))], ids=str)
def test_meshes_of_a_run_are_of_the_same_devices_in_the_same_order(knobs, learn, samples):
  found = meshes_of(**knobs)
  assert [(m.shape['data'], m.shape['fsdp'], m.shape['model']) for m in found] == [learn, samples]
  assert all(m.devices.ravel().tolist() == jax.devices()[:int(np.prod(learn))] for m in found)


EXPERTS = SIZES.replace(num_experts=4, experts_per_token=2, hidden_width=6)


@pytest.mark.parametrize('knobs, learn, samples', [
    ({'expert': 4}, (1, 2, 4, 1), (1, 8, 1, 1)), ({'expert': 2, 'data': 2}, (2, 2, 2, 1), (2, 4, 1, 1)),
    ({'expert': 2, 'model': 2, 'sample_model': 4}, (1, 2, 2, 2), (1, 2, 1, 4)),
    ({'model': 4}, (1, 2, 1, 4), (1, 2, 1, 4))], ids=str)
def test_a_sampler_has_no_axis_of_experts(knobs, learn, samples):
  assert [tuple(m.shape.values()) for m in meshes_of(sizes=EXPERTS, **knobs)] == [learn, samples]


def test_devices_that_share_a_sampler_need_rollouts_for_one():
  learn, samples = meshes_of(rollouts=2, sample_model=4)
  assert learn.size == 8 and samples.shape['fsdp'] == 2


def test_one_device_has_no_mesh():
  assert meshes_of(devices=1) == (None, None)


@pytest.mark.parametrize('knobs, message', [
    ({'data': 3}, r'mesh.data=3, mesh.fsdp=2, .* make 6 devices, not 8; of 8 devices would fit '
                  r'\(data=8, fsdp=1, model=1\), \(data=4, fsdp=2, model=1\)'),
    ({'fsdp': 4}, 'make 4 devices, not 8'),
    ({'sizes': dataclasses.replace(SIZES, width=12)},
     r"divide policy.width=12 by 8 of 'fsdp'; .* \(data=2, fsdp=4, model=1\)"),
    ({'model': 8, 'sizes': dataclasses.replace(SIZES, num_heads=4, num_kv_heads=4)},
     r"divide policy.num_heads=4 by 8 of 'model'; .* \(data=1, fsdp=2, model=4\)$"),
    ({'model': 2, 'sizes': dataclasses.replace(SIZES, vocab_size=21)},
     "divide policy.vocab_size=21 by 2 of 'model'"),
    ({'sample_model': 3}, 'part the 8 devices of a copy unevenly when sampling; .* would fit sample_model=1, sample_model=2'),
    ({'data': 8, 'sample_model': 2}, 'part the 1 devices of a copy unevenly when sampling'),
    ({'rollouts': 7}, 'spread alloc.rollouts_per_step=7 over 8 samplers'),
    ({'expert': 2}, "mesh.expert=2, .* divide the experts of a policy that has none by 2 of 'expert'; .* would fit "
                    r'\(data=8, fsdp=1, model=1\)'),
    ({'expert': 4, 'model': 2, 'sizes': EXPERTS},
     r"divide policy.num_experts=4 by 8 of 'expert' and 'model'; .* \(data=8, fsdp=1, expert=1, model=1\)"),
    ({'expert': 4, 'sizes': EXPERTS.replace(width=12)},
     r"divide policy.width=12 by 8 of 'fsdp' and 'expert'; .* \(data=2, fsdp=2, expert=2, model=1\)"),
    ({'sample_model': 8, 'sizes': EXPERTS}, "divide policy.num_experts=4 by 8 of 'model' when sampling; "),
    ({'devices': 9}, 'mesh.devices=9 is more than the 8 there are')], ids=str)
def test_a_mesh_that_does_not_fit_is_refused_with_some_that_do(knobs, message):
  with pytest.raises(ValueError, match=message):
    meshes_of(**knobs)


def test_an_axis_that_does_not_divide_leaves_a_dimension_whole():
  mesh = sharding.mesh(fsdp=2, model=4)
  params = {'layers': {'k_DKH': np.zeros((3, 4, 2, 5)), 'q_DNH': np.zeros((3, 4, 8, 5))}}
  found = jax.tree.map(lambda x: tuple(x.spec), sharding.of(mesh, params))
  assert found == {'layers': {'k_DKH': (None, 'fsdp', None, None), 'q_DNH': (None, 'fsdp', 'model', None)}}
  for kv_heads, copies in ((1, 4), (2, 2), (4, 1), (6, 2), (8, 1)):
    with jax.set_mesh(mesh):
      assert sharding.head_copies(kv_heads) == copies
    assert sharding.head_copies(kv_heads) == 1


def test_a_gathered_parameter_is_whole_and_its_gradient_divided():
  mesh = sharding.mesh(fsdp=4, model=2)
  x = np.arange(64.0, dtype=np.float32).reshape(8, 8)
  loss = lambda x: (lambda y: (jnp.sum(y ** 3), y))(sharding.gather('w_DF', x))
  with jax.set_mesh(mesh):
    put = jax.device_put(x, NamedSharding(mesh, PartitionSpec('fsdp', 'model')))
    (_, y), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(put)
  assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, 'model')), 2)
  assert grad.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec('fsdp', 'model')), 2)
  np.testing.assert_array_equal(y, x)
  np.testing.assert_allclose(grad, 3 * x ** 2, rtol=1e-6)
  np.testing.assert_allclose(jax.grad(loss, has_aux=True)(x)[0], 3 * x ** 2, rtol=1e-6)


def test_arrays_that_are_put_on_a_mesh_are_divided():
  tree = {'a': np.arange(32).reshape(2, 16), 'none': None}
  assert sharding.put(tree, PartitionSpec(None, sharding.ROWS)) is tree
  with jax.set_mesh(sharding.mesh(data=2, fsdp=4)):
    x = sharding.put(tree, PartitionSpec(None, sharding.ROWS))['a']
  assert {s.data.shape for s in x.addressable_shards} == {(2, 2)}
  np.testing.assert_array_equal(x, tree['a'])


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


@pytest.mark.parametrize('with_mesh', [False, True])
def test_a_new_array_is_placed_as_one_that_is_read(with_mesh):
  with sharding.on(sharding.mesh(fsdp=8) if with_mesh else None):
    new = {'w': jnp.ones(8), 'weak': jnp.asarray(1.0) * jnp.asarray(2.0), 'key': jax.random.key(0)}
    assert new['weak'].weak_type
    placed = sharding.place(new)
  assert not placed['weak'].weak_type and placed['weak'] == 2 and placed['weak'].dtype == new['weak'].dtype
  assert all(x.committed for x in jax.tree.leaves(placed))
  assert {len(x.devices()) for x in jax.tree.leaves(placed)} == {8 if with_mesh else 1}


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


def test_sampling_params_are_divided_over_model_alone():
  mesh = sharding.mesh(data=2, fsdp=2, model=2)
  params = {'embed_VD': jnp.zeros((8, 4)), 'layers': ({'q_DNH': jnp.zeros((3, 4, 2, 2))},) * 2}
  with jax.set_mesh(mesh):
    sampling_params = jax.jit(lambda x: sharding.constrain(x, axes=('model',)))(params)
  wanted = {'embed_VD': PartitionSpec('model', None),
            'layers': ({'q_DNH': PartitionSpec(None, None, 'model', None)},) * 2}
  for x, spec in zip(jax.tree.leaves(sampling_params), jax.tree.leaves(wanted), strict=True):
    assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


def test_axes_that_a_shard_map_has_taken():
  assert sharding.unmapped(sharding.AXES) == ()
  with jax.set_mesh(sharding.mesh(data=4, model=2)):
    assert sharding.unmapped(sharding.AXES) == sharding.AXES
    seen = []

    def inside(x):
      seen.append(sharding.unmapped(sharding.AXES))
      return x

    rows = PartitionSpec(sharding.ROWS)
    jax.jit(jax.shard_map(inside, in_specs=rows, out_specs=rows, axis_names=set(sharding.ROWS)))(jnp.zeros(4))
    assert seen == [('model',)]


@pytest.mark.parametrize('axes, sums', [({'data': 4, 'fsdp': 2}, 1), ({'data': 8}, 1), ({'fsdp': 8}, 0),
                                        ({'data': 2, 'fsdp': 2, 'model': 2}, 3)], ids=str)
def test_copies_send_one_another_one_sum(axes, sums):
  """Not one of each of three turns, but where the partitioner asks for that."""
  def total(rows, w_DF):
    turn = lambda i, w: w + jnp.einsum('bd,bf->df', *[jax.lax.dynamic_index_in_dim(rows, i, keepdims=False)] * 2)
    return sharding.constrain({'w_DF': jax.lax.fori_loop(0, 3, turn, w_DF)})['w_DF']

  rows = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32)
  mesh = sharding.mesh(**axes)
  with jax.set_mesh(mesh):
    rows_there = sharding.put(rows, PartitionSpec(None, sharding.ROWS))
    program = jax.jit(lambda rows, w: sharding.sum_over_copies(total, rows, w)).lower(
        rows_there, jnp.zeros((8, 8))).compile()
    found = program(rows_there, jnp.zeros((8, 8)))
  np.testing.assert_allclose(found, np.einsum('nbd,nbf->df', rows, rows), rtol=1e-4)
  moved = hlo.count(program.as_text(), mesh.shape, {})
  assert sum(x.count for (_, over), x in moved.items() if 'data' in over) == sums


def test_rows_are_spread_over_all_axes_but_model():
  assert sharding.row_shards() == 1
  with jax.set_mesh(sharding.mesh(data=2, fsdp=2, model=2)):
    assert sharding.row_shards() == 4
  with jax.set_mesh(sharding.mesh(fsdp=2, expert=4)):
    assert sharding.row_shards() == 8


def test_the_platform_is_that_of_the_mesh():
  assert sharding.platform() == 'cpu'
  with jax.set_mesh(sharding.mesh(data=8)):
    assert sharding.platform() == 'cpu'
  devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices
  with jax.set_mesh(sharding.mesh(devices, fsdp=2, model=2)):
    assert sharding.platform() == 'tpu'
  assert sharding.platform() == 'cpu'
