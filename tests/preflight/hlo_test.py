"""What a program does, as its text says it and as arithmetic has it."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import pytest

from kr_jax import sharding
from kr_jax.preflight import hlo
from tests.tpu_test import P, POLICY, UPDATE, mesh_of, update_for

MESH = {'data': 2, 'fsdp': 4, 'model': 2}
STATE = '(s32[], s32[], f32[8,32]{1,0}, f32[32,16]{1,0})'
DOT = ('%x = f32[8,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}',)
FLOPS = 2 * 8 * 16 * 32  # of it


def module(main, **computations):
  """The text of a program of these lines."""
  text = ['HloModule jit_f, is_scheduled=true, entry_computation_layout={(s32[])->s32[]}', '',
          'FileNames', '1 "a.py"', '']
  for name, lines in {**computations, 'main': main}.items():
    entry = 'ENTRY ' * (name == 'main')
    text += [f'{entry}%{name} (p: s32[], /*index=1*/q: (f32[], f32[])) -> f32[8,16] {{',
             *(f'  {line}' for line in lines), '}', '']
  return '\n'.join(text)


def reads(*names):
  """The parameter of a loop and elements of it."""
  of = {'i': ('s32[]', 0), 'n': ('s32[]', 1), 'a': ('f32[8,32]{1,0}', 2), 'b': ('f32[32,16]{1,0}', 3)}
  return [f'%p = {STATE} parameter(0)', *(
      f'%{x} = {of[x][0]} get-tuple-element(%p), index={of[x][1]}' for x in names)]


def loop(name='loop', *, first=0, step=1, bound=10, direction='LT', within=DOT, rest=''):
  """The lines that run a loop over i, and the computations that it calls; bound None: of the program."""
  body = [*reads('i', 'n', 'a', 'b'), *within, f'%step = s32[] constant({step})',
          '%next = s32[]{:T(128)} add(%i, %step), metadata={op_name="not/a/loop"}',
          f'ROOT %out = {STATE} tuple(%next, %n, %a, /*index=3*/%b)']
  condition = [*reads('i', 'n'), f'ROOT %on = pred[] compare(%i, %n), direction={direction}']
  n = '%n = s32[] ' + (f'constant({bound})' if bound is not None else 'parameter(2)')
  lines = ['%a = f32[8,32]{1,0} parameter(0)', '%b = f32[32,16]{1,0} parameter(1)', n,
           f'%first = s32[] constant({first})', '%i = s32[] copy(%first)',
           f'%t = {STATE} tuple(%i, %n, %a, %b)',
           f'%w = {STATE} while(%t), condition=%{name}_condition, body=%{name}_body{rest}']
  return lines, {f'{name}_body': body, f'{name}_condition': condition}


def flops(main, computations=None, **trips):
  return hlo.count(module(main, **(computations or {})), MESH, trips).flops


@pytest.mark.parametrize('first, step, bound, direction, trips', [
    (0, 1, 10, 'LT', 10), (0, 2, 8, 'LT', 4), (0, 2, 7, 'LT', 4), (3, 1, 3, 'LE', 1),
    (9, -3, 0, 'GT', 3), (9, -3, 0, 'GE', 4), (0, 5, 15, 'NE', 3), (5, 1, 5, 'LT', 0)])
def test_a_loop_whose_counter_is_known_counts_as_often_as_it_runs(first, step, bound, direction, trips):
  lines, computations = loop(first=first, step=step, bound=bound, direction=direction)
  assert flops(lines, computations) == trips * FLOPS


def test_a_known_trip_count_is_taken():
  lines, computations = loop(bound=None, rest=', backend_config={"known_trip_count":{"n":"7"},"x":{}}')
  assert flops(lines, computations) == 7 * FLOPS


def test_a_counter_is_followed_through_fusions():
  lines, computations = loop(bound=6)
  condition = [*reads('i', 'n'), 'ROOT %on = pred[] fusion(%n, %i), kind=kLoop, calls=%fused']
  fused = ['%n = s32[] parameter(0)', '%i = s32[] parameter(1)',
           'ROOT %lt = pred[] compare(%i, %n), direction=LT']
  assert flops(lines, {**computations, 'loop_condition': condition, 'fused': fused}) == 6 * FLOPS


def test_a_bound_is_followed_through_loops_and_conditionals():
  lines, computations = loop(bound=3)
  once_more = [f'%u = {STATE} tuple(%i, %m, %a, %b)',
               f'%v = {STATE} while(%u), condition=%loop_condition, body=%loop_body']
  main = [*lines, '%m = s32[] get-tuple-element(%w), index=1', *once_more]
  assert flops(main, computations) == (3 + 3) * FLOPS
  branches = {'some': [*reads('i', 'n', 'a', 'b'), '%m = s32[] copy(%n)', *once_more],
              'none': ['%x = s32[] q()']}
  main = [*lines, '%c = s32[] conditional(%i, %i, %t), branch_computations={%none, %some}']
  assert flops(main, {**computations, **branches}) == (3 + 3) * FLOPS


def test_a_counter_may_have_a_counter():
  """i is 0, 1, 3, 6 as n is 1, 2, 3, 4."""
  lines, computations = loop(bound=1)
  body = [x.replace('add(%i, %step)', 'add(%i, %n)') for x in computations['loop_body'][:-1]]
  body += ['%more = s32[] add(%n, %step)', f'ROOT %out = {STATE} tuple(%next, %more, %a, %b)']
  condition = [*reads('i'), '%m = s32[] constant(10)', 'ROOT %on = pred[] compare(%i, %m), direction=LT']
  assert flops(lines, {'loop_body': body, 'loop_condition': condition}) == 4 * FLOPS


def test_a_loop_that_ends_when_data_say_so_is_not_followed():
  lines, computations = loop(bound=6)
  condition = [*reads('i', 'n', 'a'), '%lt = pred[] compare(%i, %n), direction=LT',
               '%done = pred[] custom-call(%a), custom_call_target="Done"',
               'ROOT %on = pred[] and(%lt, %done)']
  with pytest.raises(ValueError, match='needs a jax.named_scope'):
    flops(lines, {**computations, 'loop_condition': condition})


def test_loops_in_loops_multiply():
  """And the inner one finds its bound, which the outer one hands on."""
  _, inner = loop('inner', bound=3)
  within = ['%zero = s32[] constant(0)', f'%t = {STATE} tuple(%zero, %n, %a, %b)',
            f'%w = {STATE} while(%t), condition=%inner_condition, body=%inner_body']
  lines, outer = loop('outer', bound=5, within=within)
  assert flops(lines, {**inner, **outer}) == 5 * 5 * FLOPS


def test_a_bound_that_another_loop_moves_is_not_followed():
  _, inner = loop('inner', bound=3)
  within = ['%zero = s32[] constant(0)', f'%t = {STATE} tuple(%zero, %i, %a, %b)',
            f'%w = {STATE} while(%t), condition=%inner_condition, body=%inner_body']
  lines, outer = loop('outer', bound=5, within=within)
  with pytest.raises(ValueError, match='the loop w runs is not in the text'):
    flops(lines, {**inner, **outer})


def at(path):
  return f', metadata={{op_name="{path}" stack_frame_id=7}}, backend_config={{"x":[]}}'


@pytest.mark.parametrize('path', [
    'jit(f)/steps/while', 'jit(f)/other/steps/while', 'jit(f)/steps/jit(g)/while',
    'jit(f)/transpose(jvp(steps))/while', 'jit(f)/other/while/body/steps/while'])
def test_a_loop_of_unknown_trips_has_those_of_its_scope(path):
  lines, computations = loop(bound=None, rest=at(path))
  assert flops(lines, computations, steps=2.5, other=100, f=100) == 2.5 * FLOPS


@pytest.mark.parametrize('path', [
    'jit(f)/while', 'jit(steps)/while', 'jit(f)/steps/while/body/while',
    'jit(f)/steps/while/body/gather', 'jit(f)/steps/gather'])
def test_a_loop_of_unknown_trips_without_a_scope_is_an_error(path):
  lines, computations = loop(bound=None, rest=at(path))
  with pytest.raises(ValueError, match='needs a jax.named_scope') as e:
    flops(lines, computations, steps=3)
  assert path in str(e.value) and "['steps']" in str(e.value)


def test_a_loop_without_metadata_has_the_scope_of_its_body():
  dot = DOT[0] + at('jit(f)/steps/while/body/dot_general')
  lines, computations = loop(bound=None, within=[dot])
  assert flops(lines, computations, steps=3) == 3 * FLOPS


def test_a_loop_of_unknown_trips_with_nothing_in_it_needs_no_scope():
  lines, computations = loop(bound=None, within=[])
  assert flops([*lines, *DOT], computations) == FLOPS


def test_scopes_of_nested_loops():
  """A refill of decoding steps, both as often as data say."""
  _, inner = loop('inner', bound=None)
  within = [f'%w = {STATE} while(%p), condition=%inner_condition, body=%inner_body'
            + at('jit(f)/refill/while/body/decode/while')]
  lines, outer = loop('outer', bound=None, within=within, rest=at('jit(f)/refill/while'))
  assert flops(lines, {**inner, **outer}, refill=3, decode=4) == 3 * 4 * FLOPS
  with pytest.raises(ValueError, match='body/decode/while'):
    flops(lines, {**inner, **outer}, refill=3)


def test_of_a_conditional_the_branch_with_most_flops_counts():
  big = '%y = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}'
  branches = {'small': ['%a = f32[8,32]{1,0} parameter(0)', big],
              'large': ['%a = f32[8,32]{1,0} parameter(0)', '%b = f32[32,16]{1,0} parameter(1)', *DOT]}
  operands = ['%a = f32[8,32]{1,0} parameter(0)', '%i = s32[] parameter(1)']
  chosen = '%c = f32[] conditional(%i, %a, %a), '
  assert flops([*operands, chosen + 'branch_computations={%large, %small}'], branches) == FLOPS
  assert flops([*operands, chosen + 'true_computation=%small, false_computation=%large'],
               branches) == FLOPS


def test_what_is_called_counts_where_it_is_called():
  called = {'fused': ['%a = f32[8,32]{1,0} parameter(0)', '%b = f32[32,16]{1,0} parameter(1)', *DOT]}
  operands = ['%a = f32[8,32]{1,0} parameter(0)', '%b = f32[32,16]{1,0} parameter(1)']
  lines = [*operands, '%f = f32[] fusion(%a, %b), kind=kOutput, calls=%fused, backend_config={}',
           '%c = f32[] call(%a, %b), to_apply=%fused',
           '%s = ((f32[8,32]), f32[], u32[]) async-start(%a, %b), calls=%fused',
           '%d = f32[] async-done(%s), calls=%fused',
           '%k = f32[] custom-call(%a, %b), custom_call_target="x", called_computations={%fused}']
  assert flops(lines, called) == 4 * FLOPS


def test_a_batched_product():
  assert flops(['%a = f32[4,8,32]{2,1,0} parameter(0)', '%b = f32[4,32,16]{2,1,0} parameter(1)',
                '%x = f32[4,8,16]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, '
                'rhs_batch_dims={0}, rhs_contracting_dims={1}']) == 2 * 4 * 8 * 16 * 32


def convolution(lhs, rhs, out, rest):
  return flops([f'%a = bf16[{lhs}]{{1,0}} parameter(0)', f'%b = bf16[{rhs}]{{1,0}} parameter(1)',
                f'ROOT %x = f32[{out}]{{1,0:T(8,128)}} convolution(%a, %b), {rest}, metadata={{}}'])


@pytest.mark.parametrize('lhs, rhs, out, rest, multiplications', [
    ('80,256', '256,512', '80,512', 'dim_labels=bf_io->bf', 80 * 256 * 512),
    ('80,256', '512,80', '256,512', 'dim_labels=fb_oi->bf', 256 * 80 * 512),
    # td,dnh->tnh: each of 4 heads is met by the one element of the input, and by 6 of padding.
    ('80,256,1', '256,4,64', '80,4,64',
     'window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_i0o->b0f', 80 * 256 * 4 * 64),
    # tnh,nhd->td: heads are added up.
    ('80,4,64', '4,64,256', '80,256,1', 'window={size=4}, dim_labels=b0f_0io->bf0',
     80 * 256 * 4 * 64),
    # bij,bjk->bik: element b of the output meets only tap b of the window where no hole is.
    ('5,8,32', '5,32,16', '5,8,16', 'window={size=5 stride=4 lhs_dilate=5}, dim_labels=0bf_0io->0bf',
     5 * 8 * 32 * 16),
    # A picture: of 3 x 3 taps the corners meet 4, the 4 x 2 edges 6 and the 4 inside 9.
    ('2,4,4,3', '3,3,3,7', '2,4,4,7', 'window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f',
     2 * 3 * 7 * (4 * 4 + 8 * 6 + 4 * 9)),
    # Of 6 channels each by itself, and halves of a batch each with its own filters.
    ('2,9,6', '3,1,6', '2,7,6',
     'window={size=3}, dim_labels=b0f_0io->b0f, feature_group_count=6', 2 * 7 * 3 * 6),
    ('8,9,4', '3,4,6', '4,7,6',
     'window={size=3}, dim_labels=b0f_0io->b0f, batch_group_count=2', 4 * 7 * 3 * 4 * 6)])
def test_of_a_convolution_only_what_is_no_padding_counts(lhs, rhs, out, rest, multiplications):
  assert convolution(lhs, rhs, out, rest) == 2 * multiplications


@pytest.mark.parametrize('stride', [1, 2, 3])
@pytest.mark.parametrize('dilate', [1, 2, 3])
def test_windows_of_all_kinds(stride, dilate):
  lhs = 5
  for taps, low, apart in itertools.product((1, 2, 4), (-2, 0, 3), (1, 2)):
    out = 7
    there = sum(0 <= x < dilate * (lhs - 1) + 1 and x % dilate == 0 for x in (
        stride * o + apart * tap - low for o in range(out) for tap in range(taps)))
    window = f'size={taps} stride={stride} pad={low}_9 lhs_dilate={dilate} rhs_dilate={apart}'
    assert convolution(f'1,{lhs},1', f'{taps},1,1', f'1,{out},1',
                       f'window={{{window}}}, dim_labels=b0f_0io->b0f') == 2 * there


def collectives(*lines, mesh=None, **computations):
  text = module(['%a = f32[64,32]{1,0} parameter(0)', '%b = bf16[64]{0} parameter(1)', *lines],
                **computations)
  return hlo.count(text, mesh or MESH, {}).collectives


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


def test_a_collective_in_a_loop_moves_each_time():
  reduce = '%r = f32[8,32]{1,0} all-reduce(%a), replica_groups=[8,2]<=[16]'
  lines, computations = loop(bound=6, within=[reduce])
  found = hlo.count(module(lines, **computations), MESH, {}).collectives
  assert found == {('all-reduce', ('model',)): (6 * 4 * 8 * 32, 6)}


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
  lines, computations = loop(bound=4, within=['%m = f32[64,32]{1,0} custom-call()', *within])
  lines += ['%x = f32[64,32]{1,0} parameter(3)', *(x.replace('%a', '%x') for x in fusions)]
  found = hlo.count(module(lines, **computations, **parts), MESH, {}).collectives
  assert found == {('all-gather', ('model',)): (5 * SIZE, 5)}


def test_chips_that_the_mesh_does_not_have_are_an_error():
  with pytest.raises(ValueError, match='more chips than mesh='):
    collectives('%x = f32[64,32]{1,0} all-reduce(%a), replica_groups=[8,2]<=[16]', mesh={'data': 8})


def test_what_is_no_program_is_an_error():
  with pytest.raises(ValueError, match='ENTRY'):
    hlo.count('HloModule jit_f\n', MESH, {})


KERNEL = [
    '%custom-call.1 = (f32[8,128]{1,0:T(8,128)S(1)}, bf16[8,32]{1,0}) custom-call(%a, /*index=1*/%b), '
    'custom_call_target="tpu_custom_call", operand_layout_constraints={f32[8,32]{1,0}, '
    'f32[32,16]{1,0}}, frontend_attributes={kernel_metadata={',
    '"xprof_metadata":"{\\"block_q\\": 128}"',
    '}}, metadata={op_name="jit(f)/while/body/jvp(scores)/pallas_call" stack_frame_id=1}, '
    'backend_config={"custom_call_config":{"body":"TUzvUgFN"}}']


def test_kernels_are_found_by_name_and_shapes():
  lines, computations = loop(bound=4, within=['\n'.join(KERNEL)])
  found = hlo.count(module(lines, **computations), MESH, {})
  operands = ('f32', (8, 32)), ('f32', (32, 16))
  results = ('f32', (8, 128)), ('bf16', (8, 32))
  assert found == (0, {('scores', (operands, results)): 4}, {})


def test_all_shapes():
  fused = ['%p = f32[8,32]{1,0} parameter(0)',
           '%y = (s32[], pred[2,<=3]{1,0}) custom-call(%p)' + at('a/b')]
  text = module(['%g = bf16[16]{0} all-gather-done(%h), metadata={op_name="c"}'], fused=fused)
  assert list(hlo.shapes(text)) == [
      ('parameter', 'f32', (8, 32), ''), ('custom-call', 's32', (), 'a/b'),
      ('custom-call', 'pred', (2, 3), 'a/b'), ('all-gather', 'bf16', (16,), 'c')]


# What real compilers make of programs.


def compiled(mesh, function, *args):
  """The text of function(*args), of (shape, partition) or (shape, partition, dtype)."""
  def abstract(shape, spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
  with jax.set_mesh(mesh):
    return jax.jit(function).lower(*(abstract(*x) for x in args)).compile().as_text()


def meshes():
  """On a TPU's chips and on this machine: data=2, model=2."""
  return [mesh_of('v5e:2x2', data=2, model=2), sharding.mesh(jax.devices()[:4], data=2, model=2)]


@pytest.mark.parametrize('platform', [0, 1], ids=['tpu', 'cpu'])
def test_a_scan_of_products(platform):
  """x W, rows over data and columns over model, ten times."""
  mesh = meshes()[platform]

  def f(x, w):
    def layer(x, w):
      x = jax.lax.with_sharding_constraint(x, PartitionSpec('data'))
      return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), PartitionSpec('data', 'model')), None
    return jax.lax.scan(layer, x, w)[0]

  text = compiled(mesh, f, ((256, 512), ('data',)), ((10, 512, 512), (None, None, 'model')))
  # Of [128, 512] each chip has half the columns when the next layer comes. A CPU computes in float32.
  sent = [2, 4][platform] * 128 * 256
  assert hlo.count(text, mesh.shape, {}) == (
      10 * 2 * 256 * 512 * 512 / 4, {}, {('all-gather', ('model',)): (10 * sent, 10)})


@pytest.mark.parametrize('platform', [0, 1], ids=['tpu', 'cpu'])
@pytest.mark.parametrize('spec, shapes', [
    ('bij,bjk->bik', ((8, 128, 256), (8, 256, 64))),
    ('btnh,bsnh->bnts', ((8, 32, 4, 64), (8, 48, 4, 64))),
    ('btd,dnh->btnh', ((8, 32, 256), (256, 4, 64))),
    ('btnh,nhd->btd', ((8, 32, 4, 64), (4, 64, 256)))])
def test_products_with_many_dimensions(platform, spec, shapes):
  """Of which a TPU makes convolutions; b is over data."""
  mesh = meshes()[platform]
  names = spec.split('->')[0].split(',')
  size = math.prod(dict(itertools.chain(*map(zip, names, shapes))).values())
  of = [(shape, ('data',) if name[0] == 'b' else ()) for name, shape in zip(names, shapes)]
  found = hlo.count(compiled(mesh, lambda x, y: jnp.einsum(spec, x, y), *of), mesh.shape, {})
  assert found.flops == 2 * size / 2
  assert not found.collectives


def test_gradients_of_layers_whose_parameters_are_divided():
  """Each matrix is gathered to go forward and again to go back, and its gradient is added up."""
  L, T, D, F = 6, 256, 512, 1024
  mesh = mesh_of('v5e:2x2', fsdp=4)
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
  found = hlo.count(text, mesh.shape, {})
  # Forward, back to the input and to the matrix; and the first product once more.
  assert found.flops == L * (3 * 2 + 1) * 2 * (T // 4) * D * F
  sent = L * 3 / 4 * (2 * 2 * D * F)  # of both matrices, in bfloat16
  kinds = {kind: moved.bytes for (kind, _), moved in found.collectives.items()}
  assert kinds.pop('all-gather') == 2 * sent
  # The compiler adds some up whole and then takes its part, which sends twice as much.
  assert kinds.pop('reduce-scatter') + kinds.pop('all-reduce', 0) / 2 == sent and not kinds


def test_a_loop_to_a_bound_that_comes_with_the_data():
  mesh = mesh_of('v5e:2x2', fsdp=4)

  def f(x, w, n):
    with jax.named_scope('microbatches'):
      return jax.lax.fori_loop(0, n, lambda i, x: jax.lax.scan(
          lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], x)

  text = compiled(mesh, f, ((64, 128), ('fsdp',)), ((3, 128, 128), ()), ((), (), jnp.int32))
  for trips in (1, 7):
    found = hlo.count(text, mesh.shape, {'microbatches': trips})
    assert found == (trips * 3 * 2 * 16 * 128 * 128, {}, {})
  with pytest.raises(ValueError, match='jit.f./microbatches/while'):
    hlo.count(text, mesh.shape, {'steps': 3})


@pytest.mark.slow
def test_the_update():
  """Of rows whose 80 distinct tokens are computed on each of 4 chips, two microbatches."""
  program, _ = update_for('v5e:2x2', POLICY, UPDATE, P, fsdp=4)
  mesh = {'data': 1, 'fsdp': 4, 'model': 1}
  once, twice = (hlo.count(program.as_text(), mesh, {'microbatches': n}) for n in (1, 2))
  c, T = POLICY, 80
  qo, kv = c.width * c.num_heads * c.head_width, c.width * c.num_kv_heads * c.head_width
  layer = 2 * qo + 2 * kv + 3 * c.width * c.hidden_width
  words = c.width * c.vocab_size  # few enough that their scores are no kernel's
  assert once.flops == T * 6 * (c.num_layers * layer + words)
  assert twice.flops == 2 * once.flops
  # Attention reads whole rows.
  row, N, K, H = UPDATE.row_length, c.num_heads, c.num_kv_heads, c.head_width
  (forward, (operands, _)), (dkv, _), (dq, _) = once.kernels
  assert forward == 'splash_mha_fwd_segmented_residuals'
  assert dkv == 'splash_mha_dkv_segmented_no_residuals' and dq == 'splash_mha_dq_segmented_no_residuals'
  assert operands[2:5] == (('bf16', (N, row, H)), ('bf16', (K, row, H)), ('bf16', (K, row, H)))
  assert set(once.kernels.values()) == {c.num_layers}
  # In bfloat16: matrices once, as nothing is computed again, embeddings and words once an update.
  sent = 2 * 3 / 4 * (c.num_layers * layer + 2 * words)
  gathered, reduced = (once.collectives[kind, ('fsdp',)] for kind in ('all-gather', 'reduce-scatter'))
  assert sent < gathered.bytes < 1.02 * sent  # and norms, and numbers of tokens
  # Of gradients those to o and to embeddings, which a scatter adds up, are not reduced to parts.
  assert reduced.bytes == 2 * 3 / 4 * (c.num_layers * (layer - qo) + words)
