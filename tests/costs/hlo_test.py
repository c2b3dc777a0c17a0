"""Bytes that collectives send, as texts by hand and those of real compilers have them."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import pytest

from kr_jax import sharding
from kr_jax.costs import hlo
from tests import tpu_test

MESH = {'data': 2, 'fsdp': 4, 'model': 2}
STATE = '(s32[], s32[], f32[8,32]{1,0})'
REDUCE = '%r = f32[8,32]{1,0} all-reduce(%a), replica_groups=[8,2]<=[16]'
SENT = 4 * 8 * 32  # bytes of it, between two chips


def module(main, **computations):
  """The text of a program of these lines."""
  text = ['HloModule jit_f, is_scheduled=true, entry_computation_layout={(s32[])->s32[]}', '',
          'FileNames', '1 "a.py"', '']
  for name, lines in {**computations, 'main': main}.items():
    entry = 'ENTRY ' * (name == 'main')
    text += [f'{entry}%{name} (p: s32[], /*index=1*/q: (f32[], f32[])) -> f32[8,16] {{',
             *(f'  {line}' for line in lines), '}', '']
  return '\n'.join(text)


def loop(name='loop', *, limit='constant(10)', compare='compare(%i, %n), direction=LT', within=(REDUCE,), rest='',
         step='constant(1)'):
  """The lines that run a loop, and the computations that it calls."""
  state = [f'%p = {STATE} parameter(0)', '%i = s32[] get-tuple-element(%p), index=0']
  body = [*state, '%a = f32[8,32]{1,0} get-tuple-element(%p), index=2', *within, f'%step = s32[] {step}',
          '%next = s32[]{:T(128)} add(%i, %step), metadata={op_name="not/a/loop"}',
          f'ROOT %out = {STATE} tuple(%next, %i, /*index=2*/%a)']
  condition = [*state, f'%n = s32[] {limit}', f'ROOT %on = pred[] {compare}']
  lines = ['%a = f32[8,32]{1,0} parameter(0)', '%i = s32[] constant(0)', f'%t = {STATE} tuple(%i, %i, %a)',
           f'%w = {STATE} while(%t), condition=%{name}_condition, body=%{name}_body{rest}']
  return lines, {f'{name}_body': body, f'{name}_condition': condition}


def executions(main, computations=None, **trips):
  """Of the all-reduce of pairs, the only collective."""
  found = hlo.count(module(main, **(computations or {})), MESH, trips)
  if not found:
    return 0
  (key, moved), = found.items()
  assert key == ('all-reduce', ('model',)) and moved.bytes == moved.count * SENT
  return moved.count


# How often what is in a loop runs.

UNKNOWN = 'get-tuple-element(%p), index=1'


def test_a_loop_to_a_constant_counts_as_often_as_it_runs():
  assert executions(*loop()) == 10
  assert executions(*loop(limit=UNKNOWN, rest=', backend_config={"known_trip_count":{"n":"7"},"x":{}}')) == 7


@pytest.mark.parametrize('changed', [
    {'limit': UNKNOWN}, {'compare': 'compare(%i, %n), direction=GT'}, {'compare': 'compare(%n, %i), direction=LT'},
    {'compare': 'custom-call(%i, %n), custom_call_target="Done"'}], ids=str)
def test_the_trips_of_another_loop_are_not_in_the_text(changed):
  with pytest.raises(ValueError, match='the loop w is none that the program wrote'):
    executions(*loop(**changed))
  assert executions(*loop(**changed, within=[])) == 0  # nobody needs to know


def test_a_loop_around_a_ring_takes_two_steps_a_trip():
  assert executions(*loop(limit='constant(4)', step='constant(2)')) == 2
  assert executions(*loop(limit='constant(5)', step='constant(2)')) == 3
  with pytest.raises(ValueError, match='what a trip of loop_body adds to its counter, next, is no constant'):
    executions(*loop(step='get-tuple-element(%p), index=1'))


def test_loops_in_loops_multiply():
  _, inner = loop('inner', limit='constant(3)')
  within = [f'%w = {STATE} while(%p), condition=%inner_condition, body=%inner_body']
  lines, outer = loop('outer', limit='constant(5)', within=within)
  assert executions(lines, {**inner, **outer}) == 5 * 3


def at(path):
  return f', metadata={{op_name="{path}" stack_frame_id=7}}, backend_config={{"x":[]}}'


@pytest.mark.parametrize('path', [
    'jit(f)/steps/while', 'jit(f)/other/steps/jit(g)/while', 'jit(f)/transpose(jvp(steps))/while',
    'jit(f)/other/while/body/steps/while'])
def test_a_loop_of_unknown_trips_has_the_trips_of_its_scope(path):
  assert executions(*loop(limit=UNKNOWN, rest=at(path)), steps=2.5, other=100, f=100) == 2.5


@pytest.mark.parametrize('path, message', [
    ('jit(f)/while', 'needs a jax.named_scope'), ('jit(steps)/while', 'needs a jax.named_scope'),
    ('jit(f)/steps/while/body/while', 'needs a jax.named_scope'),
    ('jit(f)/steps/gather', 'the loop jit.f./steps/gather is none that the program wrote')])
def test_a_loop_of_unknown_trips_without_a_scope_is_an_error(path, message):
  with pytest.raises(ValueError, match=message):
    executions(*loop(limit=UNKNOWN, rest=at(path)), steps=3)


def test_a_loop_without_metadata_has_the_scope_of_its_body():
  reduce = REDUCE + at('jit(f)/steps/while/body/dot_general')
  assert executions(*loop(limit=UNKNOWN, within=[reduce]), steps=3) == 3


def test_of_a_conditional_the_branch_that_sends_most_counts():
  small = '%y = f32[2,2]{1,0} all-reduce(%b), replica_groups=[8,2]<=[16]'
  branches = {'small': ['%b = f32[2,2]{1,0} parameter(0)', small], 'large': ['%a = f32[8,32]{1,0} parameter(0)', REDUCE]}
  operands = ['%a = f32[8,32]{1,0} parameter(0)', '%i = s32[] parameter(1)']
  chosen = '%c = f32[] conditional(%i, %a, %a), '
  assert executions([*operands, chosen + 'branch_computations={%large, %small}'], branches) == 1
  assert executions([*operands, chosen + 'true_computation=%small, false_computation=%large'], branches) == 1


def test_what_is_called_counts_where_it_is_called():
  called = {'fused': ['%a = f32[8,32]{1,0} parameter(0)', REDUCE]}
  kernel = ['%k = f32[] custom-call(%a), custom_call_target="x", called_computations={%fused}, metadata={',
            '"lines": "of its own"', '}']
  lines = ['%a = f32[8,32]{1,0} parameter(0)',
           '%f = f32[] fusion(%a), kind=kOutput, calls=%fused, backend_config={}', '%c = f32[] call(%a), to_apply=%fused',
           '%s = ((f32[8,32]), f32[], u32[]) async-start(%a), calls=%fused', '%d = f32[] async-done(%s), calls=%fused',
           '\n'.join(kernel)]
  assert executions(lines, called) == 4


@pytest.mark.parametrize('opcode', ['ragged-all-to-all', 'collective-broadcast'])
def test_a_collective_of_another_kind_is_an_error(opcode):
  with pytest.raises(ValueError, match=f'{opcode} of x is not counted'):
    hlo.count(module(['%a = f32[8]{0} parameter(0)', f'%x = f32[8]{{0}} {opcode}(%a)']), MESH, {})


# What a collective sends.


def collectives(*lines, mesh=None, **computations):
  text = module(['%a = f32[64,32]{1,0} parameter(0)', '%b = bf16[64]{0} parameter(1)', *lines],
                **computations)
  return hlo.count(text, mesh or MESH, {})


SIZE = 4 * 64 * 32  # bytes of %a


@pytest.mark.parametrize('kind, result, sent', [
    ('all-gather', 'f32[256,32]', 3), ('reduce-scatter', 'f32[16,32]', 3 / 4),
    ('all-reduce', 'f32[64,32]', 2 * 3 / 4), ('all-to-all', 'f32[64,32]', 3 / 4)])
def test_bytes_of_a_ring(kind, result, sent):
  groups = 'replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}'
  found = collectives(f'%x = {result}{{1,0}} {kind}(%a), channel_id=1, {groups}, dimensions={{0}}')
  assert found == {(kind, ('fsdp',)): (sent * SIZE, 1)}


@pytest.mark.parametrize('groups, axes, n', [
    ('{{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}', ('model',), 2),
    ('{{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}', ('data',), 2),
    ('{}', ('data', 'fsdp', 'model'), 16),
    ('[8,2]<=[16]', ('model',), 2), ('[2,8]<=[16]', ('fsdp', 'model'), 8),
    ('[4,4]<=[2,4,2]T(0,2,1)', ('fsdp',), 4), ('[2,8]<=[8,2]T(1,0)', ('data', 'fsdp'), 8),
    ("mesh['x'=2,'y'=4,'z'=2] {'y'}", ('fsdp',), 4), ("mesh['x'=8,'y'=2] {'x'}", ('data', 'fsdp'), 8),
    ("mesh['x'=8,'y'=2] {'x':(2)4}", ('fsdp',), 4), ("mesh['x'=16] {'x':(1)2}", ('data',), 2),
    ("mesh['x'=16] {'x':(1)2,'x':(8)2}", ('data', 'model'), 4),
    ("mesh['x'=2,'y'=8], device_ids=([8,2]T(1,0)) {'x'}", ('model',), 2),
    ("mesh['x'=2,'y'=8], device_ids=(0,8,1,9,2,10,3,11,4,12,5,13,6,14,7,15) {'x'}", ('fsdp',), 2)])
def test_axes_of_groups(groups, axes, n):
  found = collectives(f'%x = f32[64,32]{{1,0}} all-to-all(%a), replica_groups={groups}, '
                      'dimensions={0}, backend_config={"x":{"y":{}}}')
  assert found == {('all-to-all', axes): ((n - 1) / n * SIZE, 1)}


@pytest.mark.parametrize('pairs, axes', [
    ('{{0,1},{1,0},{2,3},{3,2}}', ('model',)), ('{{0,2},{2,4},{4,6},{6,0}}', ('fsdp',)),
    ('{{0,2},{6,8}}', ('data', 'fsdp')), ('{{3,4}}', ('fsdp', 'model'))])
def test_a_permute_sends_all_it_has_once(pairs, axes):
  start = '(f32[64,32]{1,0}, f32[64,32]{1,0}, u32[], u32[])'
  found = collectives(f'%x = {start} collective-permute-start(%a), source_target_pairs={pairs}, x={{}}',
                      '%y = f32[64,32]{1,0} collective-permute-done(%x)')
  assert found == {('collective-permute', axes): (SIZE, 1)}


def test_a_group_of_one_chip_moves_nothing():
  assert not collectives(
      '%x = f32[64,32]{1,0} all-reduce(%a), replica_groups={{0},{1},{2}}, to_apply=%add',
      '%y = f32[64,32]{1,0} collective-permute(%a), source_target_pairs={{0,0},{1,1}}')


def test_the_parts_of_a_combined_collective_add_up():
  found = collectives(
      '%x = (f32[64,32]{1,0}, /*index=1*/bf16[64]{0}) all-reduce(%a, /*index=1*/%b), '
      'replica_groups=[8,2]<=[16]',
      '%y = ((f32[64,32]{1,0}, bf16[64]{0}), (f32[128,32]{1,0}, bf16[128]{0})) '
      'all-gather-start(%a, %b), replica_groups=[8,2]<=[16], dimensions={0}',
      '%z = (f32[128,32]{1,0}, bf16[128]{0}) all-gather-done(%y)')
  both = SIZE + 2 * 64
  assert found == {('all-reduce', ('model',)): (both, 1), ('all-gather', ('model',)): (both, 1)}


def test_a_reduction_of_which_slices_are_read_is_a_reduce_scatter():
  reduce = '%r = (f32[64,32]{1,0}, f32[64,32]{1,0}) all-reduce(%p, %p), replica_groups=[8,2]<=[16]'
  parts = ['%q = f32[64,32]{1,0} get-tuple-element(%r), index=0',
           '%s = f32[64,32]{1,0} get-tuple-element(%r), index=1', '%zero = s32[] constant(0)',
           '%t = f32[32,32]{1,0} dynamic-slice(%q, %zero, %zero), dynamic_slice_sizes={32,32}']
  sliced = '%u = f32[32,32]{1,0} dynamic-slice(%s, %zero, %zero), dynamic_slice_sizes={32,32}'
  whole = '%u = f32[64,32]{1,0} negate(%s)'
  fusion = '%x = f32[32,32]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1'
  of = lambda last: {'all-reduce-scatter.1': ['%p = f32[64,32]{1,0} parameter(0)', reduce, *parts, last]}
  assert collectives(fusion, **of(sliced)) == {('reduce-scatter', ('model',)): (SIZE, 1)}
  assert collectives(fusion, **of(whole)) == {('all-reduce', ('model',)): (2 * SIZE, 1)}


def test_a_collective_spread_over_fusions_counts_once_an_execution():
  gather = ('%g = f32[128,32]{1,0} all-gather(%p), channel_id=6, replica_groups=[8,2]<=[16], '
            'dimensions={0}, frontend_attributes={chain_id="3"}')
  part = ['%p = f32[64,32]{1,0} parameter(0)', gather]
  fusions = [f'%x{i} = f32[128,32]{{1,0}} fusion(%a), kind=kCustom, calls=%part{i}' for i in range(3)]
  parts = {f'part{i}': part for i in range(3)}
  assert collectives(*fusions, **parts) == {('all-gather', ('model',)): (SIZE, 1)}
  within = [x.replace('%a', '%m') for x in fusions]
  lines, computations = loop(limit='constant(4)', within=['%m = f32[64,32]{1,0} custom-call()', *within])
  lines += ['%x = f32[64,32]{1,0} parameter(3)', *(x.replace('%a', '%x') for x in fusions)]
  found = hlo.count(module(lines, **computations, **parts), MESH, {})
  assert found == {('all-gather', ('model',)): (5 * SIZE, 5)}


def test_chips_that_the_mesh_does_not_have_are_an_error():
  with pytest.raises(ValueError, match='more chips than mesh='):
    collectives('%x = f32[64,32]{1,0} all-reduce(%a), replica_groups=[8,2]<=[16]', mesh={'data': 8})


def test_what_is_no_program_is_an_error():
  with pytest.raises(ValueError, match='ENTRY'):
    hlo.count('HloModule jit_f\n', MESH, {})


# What real compilers make of programs.


def compiled(mesh, function, *args):
  """The text of function(*args), of (shape, partition) or (shape, partition, dtype)."""
  def abstract(shape, spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
  with jax.set_mesh(mesh):
    return jax.jit(function).lower(*(abstract(*x) for x in args)).compile().as_text()


@pytest.mark.parametrize('platform', ['tpu', 'cpu'])
def test_a_scan_of_products(platform):
  """x W, rows over data and columns over model, ten times."""
  chips = tpu_test.devices('v5e:2x2') if platform == 'tpu' else jax.devices()[:4]
  mesh = sharding.mesh(chips, data=2, model=2)

  def layer(x, w):
    x = jax.lax.with_sharding_constraint(x, PartitionSpec('data'))
    return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), PartitionSpec('data', 'model')), None

  text = compiled(mesh, lambda x, w: jax.lax.scan(layer, x, w)[0],
                  ((256, 512), ('data',)), ((10, 512, 512), (None, None, 'model')))
  # Of [128, 512] each chip has half the columns when the next layer comes. A CPU computes in float32.
  sent = {'tpu': 2, 'cpu': 4}[platform] * 128 * 256
  assert hlo.count(text, mesh.shape, {}) == {('all-gather', ('model',)): (10 * sent, 10)}


def test_gradients_of_layers_whose_parameters_are_divided():
  """Each matrix is gathered to go forward and again to go back, and its gradient is added up."""
  L, T, D, F = 6, 256, 512, 1024
  mesh = tpu_test.mesh_of('v5e:2x2', fsdp=4)
  whole = functools.partial(jax.lax.with_sharding_constraint, shardings=PartitionSpec())

  @jax.checkpoint
  def layer(x, w):
    up, down = w
    x = x + jax.nn.relu(x @ whole(up)) @ whole(down)
    return jax.lax.with_sharding_constraint(x, PartitionSpec('fsdp')), None

  def loss(w, x):
    return jnp.sum(jax.lax.scan(layer, x, w)[0].astype(jnp.float32) ** 2)

  def gradient(up, down, x):
    grads = jax.grad(loss)((up, down), x)
    return jax.lax.with_sharding_constraint(
        grads, (PartitionSpec(None, 'fsdp'), PartitionSpec(None, None, 'fsdp')))

  text = compiled(mesh, gradient, ((L, D, F), (None, 'fsdp')), ((L, F, D), (None, None, 'fsdp')),
                  ((T, D), ('fsdp',)))
  sent = L * 3 / 4 * (2 * 2 * D * F)  # of both matrices, in bfloat16
  kinds = {kind: moved.bytes for (kind, _), moved in hlo.count(text, mesh.shape, {}).items()}
  assert kinds.pop('all-gather') == 2 * sent
  # The compiler adds some up whole and then takes its part, which sends twice as much.
  assert kinds.pop('reduce-scatter') + kinds.pop('all-reduce', 0) / 2 == sent and not kinds


def test_a_program_that_waits_for_data():
  """Its scope is that of the jaxpr, and the scan inside is found by its constant; on a TPU's chips."""
  mesh = tpu_test.mesh_of('v5e:2x2', model=4)

  def layer(x, w):
    return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), PartitionSpec()), None

  def f(x, w, n):
    with jax.named_scope('microbatches'):
      return jax.lax.fori_loop(0, n, lambda i, x: jax.lax.scan(layer, x, w)[0], x)

  text = compiled(mesh, f, ((64, 512), ()), ((3, 512, 512), (None, None, 'model')), ((), (), jnp.int32))
  (kind, axes), moved = next(iter(hlo.count(text, mesh.shape, {'microbatches': 7}).items()))
  assert axes == ('model',) and moved.count == 7 * 3
  with pytest.raises(ValueError, match="the loop in 'jit.f./microbatches/while'"):
    hlo.count(text, mesh.shape, {'steps': 3})
