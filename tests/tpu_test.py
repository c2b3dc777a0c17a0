"""The programs of the loop go through the real TPU compiler, on this CPU (libtpu, no TPU needed)."""

import dataclasses
import functools
import importlib
import math
import re

import jax
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from kr_jax import preflight
from kr_jax import queues as queues_lib
from kr_jax import sample
from kr_jax import sharding
from kr_jax import types
from kr_jax.allocation import solve
from kr_jax.kernels.knapsack import knapsack
from kr_jax.learning import guard
from kr_jax.learning import noise
from kr_jax.learning import update
from kr_jax.model import attention
from kr_jax.model import decode
from kr_jax.model import policy
from tests import configs_test
from tests import knobs

POLICY = policy.Config(
    vocab_size=512, num_layers=2, width=256, num_heads=4, num_kv_heads=2, head_width=64,
    hidden_width=512, rope_theta=1e4, norm_eps=1e-6, qk_norm=True, qkv_bias=True,
    tie_embeddings=False, dtype='bfloat16', remat='none', lora_rank=0, lora_alpha=1.0)
# With all that Gemma 3 has of its own.
GEMMA = dataclasses.replace(
    POLICY, head_width=256, qkv_bias=False, tie_embeddings=True, activation='gelu', norm_offset=1.0,
    post_norms=True, embedding_scale=True, query_scalar=128.0, window=64, local_layers=(True, False),
    local_rope_theta=1e4, rope_scaling=attention.Scaling('linear', 8.0))
EXPERTS = dataclasses.replace(
    POLICY, qkv_bias=False, num_experts=16, experts_per_token=4, hidden_width=128, remat='attention')
# Qwen3-4B but for its 36 layers, of which four stand for all.
QWEN = policy.Config(
    vocab_size=151936, num_layers=4, width=2560, num_heads=32, num_kv_heads=8, head_width=128,
    hidden_width=9728, rope_theta=1e6, norm_eps=1e-6, qk_norm=True, qkv_bias=False, tie_embeddings=True,
    dtype='bfloat16', remat='none', lora_rank=0, lora_alpha=1.0)
UPDATE = knobs.updates(row_length=128, microbatch_rows=1)
SAMPLE = knobs.sampler(slots=16, prompt_length=128, completion_length=128)
M, R, P, C = 8, 64, 32, 32
ALL_CHIPS = 'v5e:2x2', 'v4:2x2x1', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'
# Of all chips one compiles by default.
CHIPS = [ALL_CHIPS[0], *(pytest.param(topology, marks=pytest.mark.exhaustive) for topology in ALL_CHIPS[1:])]


@functools.cache
def devices(topology):
  return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices


def mesh_of(topology, **axes):
  """Of as many chips as its axes multiply to."""
  return sharding.mesh(devices(topology)[:math.prod(axes.values())], **axes)


def traced_for(topology, function, tree, *static, **axes):
  """function(*tree, *static), traced on a mesh."""
  mesh = mesh_of(topology, **axes)
  args = jax.tree.map(
      lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None) or at),
      tree, sharding.of(mesh, tree))
  with jax.set_mesh(mesh):
    return function.trace(*args, *static)


def compiled_for(topology, function, tree, *static, **axes):
  return traced_for(topology, function, tree, *static, **axes).lower().compile()


# The allocator.


@pytest.mark.parametrize('topology', CHIPS)
def test_the_allocator_beside_its_kernel_compiles(topology):
  gain_MG, units = np.zeros((M, 31), np.float32), np.int32(R - 2 * M)
  size_M = np.zeros(M, np.int32)
  compiled_for(topology, solve.greedy, (gain_MG, size_M, units))
  compiled_for(topology, solve.even, (gain_MG.astype(np.int32), size_M, size_M))


# The update.


def abstract_rollouts(length=P):
  prompts = types.Prompts(np.zeros((M, length), np.int32), np.ones(M, np.int32),
                          np.arange(M, dtype=np.int32))
  return types.Rollouts(
      prompts=prompts, task_R=np.zeros(R, np.int32), token_RC=np.zeros((R, length), np.int32),
      logp_RC=np.zeros((R, length), np.float32), length_R=np.ones(R, np.int32),
      ended_R=np.ones(R, np.int32), decode_steps=np.zeros((), np.int32))


def abstract_tokens(rollouts, config, topology, **axes):
  """Of all microbatches of rollouts, on a mesh."""
  mesh = mesh_of(topology, **axes)
  with jax.set_mesh(mesh):
    packed = update.pack_rollouts(rollouts, np.zeros(len(rollouts.task_R), bool), config)
  tokens = jax.eval_shape(update._gather, rollouts, packed.microbatches)
  of_rows = NamedSharding(mesh, PartitionSpec(None, sharding.ROWS))
  tokens = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of_rows), tokens)
  return tokens._replace(old_logp_BT=tokens.sampler_logp_BT)


def abstract_state(policy_config=POLICY, config=UPDATE):
  return jax.eval_shape(lambda key: update.init(policy.init(policy_config, key), key, config), jax.random.key(0))


def traced_update(topology, policy_config, config, length, **axes):
  """The update of rollouts of `length` prompt and `length` completion tokens, traced; and its state."""
  rollouts, state = abstract_rollouts(length), abstract_state(policy_config, config)
  experience = jax.eval_shape(lambda rollouts: update._experience(
      rollouts, np.zeros(R, np.float32), config), rollouts)
  tokens = abstract_tokens(rollouts, config, topology, **axes)
  return traced_for(topology, update._step, (state, {}, experience, tokens, np.zeros(2, np.int32)),
                    policy_config, config, **axes), state


def compiled_update(*args, **axes):
  traced, state = traced_update(*args, **axes)
  return traced.lower().compile(), state


@pytest.mark.slow
@pytest.mark.parametrize('topology', CHIPS)
def test_the_measurement_of_noise_compiles(topology):
  state, rollouts = abstract_state(), abstract_rollouts()
  program = compiled_for(
      topology, noise.gradient_noise_of_tokens,
      (state.params, {}, rollouts.task_R, np.zeros(R, np.float32),
       abstract_tokens(rollouts, UPDATE, topology), np.int32(0), state.key), M, POLICY, UPDATE)
  assert program.memory_analysis().output_size_in_bytes < 1024  # four numbers, in a tile


@pytest.mark.exhaustive
@pytest.mark.parametrize('axes', [{}, {'fsdp': 2, 'model': 2}], ids=str)
def test_the_look_before_a_checkpoint_compiles(axes):
  """And takes little memory beside the state."""
  state = abstract_state()
  mesh, tree = mesh_of('v5e:2x2', **axes), (state.params, state.opt_state, {})
  shapes = sharding.shapes_on(mesh, tree)
  with jax.set_mesh(mesh):
    program = guard._tried.trace(POLICY, *shapes).lower().compile()
  params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
  assert 'splash' in program.as_text() and program.memory_analysis().temp_size_in_bytes < params


@pytest.mark.exhaustive  # by default with the experts below
def test_the_update_of_layers_that_read_a_window_compiles():
  program, _ = compiled_update('v5e:2x2', GEMMA, UPDATE, P, data=2, model=2)
  # Each layer runs the attention of its kind.
  assert 'splash' in program.as_text() and 'conditional' in program.as_text()


@pytest.mark.exhaustive  # by default on the mesh below
@pytest.mark.parametrize('topology', ALL_CHIPS)
def test_the_update_compiles(topology):
  program, state = compiled_update(topology, POLICY, UPDATE, P)
  params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
  # The donated state is updated in place.
  assert program.memory_analysis().alias_size_in_bytes >= 3 * params
  assert 'splash' in program.as_text() and 'token_logprob' in program.as_text()


@pytest.mark.slow
@pytest.mark.parametrize('axes', [
    {'fsdp': 2, 'model': 2}, *(pytest.param(axes, marks=pytest.mark.exhaustive) for axes in (
        {'data': 2, 'fsdp': 2}, {'data': 4}, {'model': 2, 'data': 2}))], ids=str)
def test_the_update_compiles_on_a_mesh(axes):
  """And leaves parameters and moments divided by the table, no matrix of them whole on every chip."""
  program, state = compiled_update('v5e:2x2', POLICY, UPDATE, P, **axes)
  assert 'splash' in program.as_text() and 'token_logprob' in program.as_text()
  # The donated state is updated in place.
  shards = axes.get('fsdp', 1) * axes.get('model', 1)
  params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
  assert program.memory_analysis().alias_size_in_bytes >= 3 * params / shards
  found, _ = program.output_shardings
  wanted = sharding.of(mesh_of('v5e:2x2', **axes), state)
  whole = set()
  for (path, x), found, wanted in zip(
      jax.tree_util.tree_leaves_with_path(state), *map(jax.tree.leaves, (found, wanted)), strict=True):
    assert found.is_equivalent_to(wanted, x.ndim), path
    if found.is_fully_replicated and x.size > 2048:
      whole.add(path)
  # 'data' divides rows and nothing else.
  assert bool(whole) == (axes == {'data': 4})


def kernels_of_experts(program):
  """How many of megablox's kernels a program calls, and how many of them sum outer products."""
  calls = re.findall(r'custom_call_target="tpu_custom_call".*jit\((t?gmm)\)', program.as_text())
  return len(calls), calls.count('tgmm')


@pytest.mark.slow
@pytest.mark.parametrize('topology, axes', [
    ('v5e:2x2', {'fsdp': 2, 'expert': 2}),
    *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in [
        ('v5e:2x2', {'expert': 2, 'model': 2}), ('v6e:2x2', {'data': 2, 'expert': 2}), ('v5p:2x2x1', {'expert': 4}),
        ('v5p:2x2x2', {'fsdp': 2, 'expert': 2, 'model': 2}), ('v6e:2x2', {})])], ids=str)
def test_the_update_of_experts_compiles(topology, axes):
  """Their products by megablox's kernels: three forward, two of them again to go back, and six back. Every second
  layer reads a window, by attention of its own."""
  window = {'window': 64, 'local_layers': (True, False), 'local_rope_theta': 1e4}
  program, state = compiled_update(topology, EXPERTS.replace(**window), UPDATE, P, **axes)
  assert kernels_of_experts(program) == (11, 3)
  assert 'splash' in program.as_text() and 'conditional' in program.as_text()
  found, _ = program.output_shardings
  for name in ('gate_EDF', 'down_EFD', 'router_DE'):
    x = state.params['layers'][name]
    wanted = sharding.of(mesh_of(topology, **axes), state).params['layers'][name]
    assert found.params['layers'][name].is_equivalent_to(wanted, x.ndim), name


@pytest.mark.exhaustive
@pytest.mark.parametrize('topology, axes', [('v5e:2x2', {'data': 2, 'model': 2}), ('v6e:2x2', {'model': 4}),
                                            ('v5p:2x2x1', {'data': 4})], ids=str)
def test_the_sampler_of_experts_compiles(topology, axes):
  program, _ = compiled_sampler(topology, EXPERTS.replace(num_experts=24), SAMPLE, 4, 32, **axes)
  assert kernels_of_experts(program)[0]
  # Of a layer's experts nothing is copied: the kernel reads them where those of all layers stand.
  E, D, F = 24 // axes.get('model', 1), EXPERTS.width, EXPERTS.hidden_width
  assert not re.search(rf'= bf16\[(1,)?{E},({D},{F}|{F},{D})\]\S* (fusion|dynamic-slice|copy)\(', program.as_text())


def largest(jaxpr):
  """Elements of the largest array in a program, in all but its kernels."""
  sizes = [math.prod(x.aval.shape) for eqn in jaxpr.eqns for x in eqn.outvars]
  sizes += [largest(inner) for eqn in jaxpr.eqns if eqn.primitive.name != 'pallas_call'
            for inner in jaxprs_in_params(eqn.params)]
  return max(sizes, default=0)


LONG = dataclasses.replace(POLICY, vocab_size=4096, width=128, num_heads=2, num_kv_heads=1, hidden_width=256)


@pytest.mark.parametrize('remat, prompt_sharing', [('none', 1.0), ('full', 0.6)])
def test_no_array_of_the_update_is_quadratic_in_the_row(remat, prompt_sharing):
  """Neither [T, T] attention nor [T, V] logits are among them, both of the same size here."""
  T = LONG.vocab_size
  traced, _ = traced_update('v5e:2x2', dataclasses.replace(LONG, remat=remat),
                            UPDATE.replace(row_length=T, prompt_sharing=prompt_sharing), T // 2)
  assert largest(traced.jaxpr.jaxpr) < (T - 1) ** 2


@pytest.mark.exhaustive
@pytest.mark.parametrize('remat, prompt_sharing', [('none', 1.0), ('full', 0.6)])
def test_temporaries_of_the_update_grow_linearly_with_the_row(remat, prompt_sharing):
  """Neither [T, T] attention nor [T, V] logits stand in memory."""
  config = dataclasses.replace(LONG, remat=remat)
  temporaries, sizes = [], []
  for length in (2048, 4096):
    program, _ = compiled_update(
        'v5e:2x2', config, UPDATE.replace(row_length=length, prompt_sharing=prompt_sharing), length // 2)
    temporaries.append(program.memory_analysis().temp_size_in_bytes)
    shapes = re.findall(r'= \w+\[([\d,]+)\]', program.as_text())
    sizes.append(max(math.prod(map(int, shape.split(','))) for shape in shapes))
  assert sizes[1] <= 2 * sizes[0]
  # Arrays in VMEM are not counted, and those of short rows are more: so many bytes can come on top.
  vmem = 128 * 2**20
  assert temporaries[1] <= 2 * (temporaries[0] + vmem)


# The sampler.


def compiled_sampler(topology, policy_config, config, tasks, rollouts, **axes):
  """The sampler of so many tasks and rollouts a shard, and the bytes of its slots and prefixes."""
  mesh = mesh_of(topology, **axes)
  shards = axes.get('data', 1)
  num_tasks, total = shards * (tasks - (shards > 1)), shards * rollouts
  P, C = config.prompt_length, config.completion_length
  of = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(lambda key: decode.sampling_params(policy_config, policy.init(policy_config, key)), key)
    params = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), params,
                          sharding.of(mesh, params, ('model',)))
    queues = queues_lib.assign_to_queues(np.full(num_tasks, total // num_tasks), total=total, shards=shards)
    assert queues.task_ZK.shape == (shards, tasks) and queues.local_ZQ.shape == (shards, rollouts)
    queues = jax.tree.map(lambda x: of(x, PartitionSpec(sharding.ROWS)), queues)
    prompts = types.Prompts(np.zeros((num_tasks, P), np.int32), np.ones(num_tasks, np.int32),
                            np.arange(num_tasks, dtype=np.int32))
    program = sample._decode.lower(policy_config, params, prompts, queues, key, config).compile()
  value = 1 if config.cache == 'int8' else 2
  column = 2 * policy_config.num_layers * policy_config.num_kv_heads // axes.get('model', 1) * (
      policy_config.head_width * value + 4 * (config.cache == 'int8'))
  return program, column * (config.slots * -(-C // 128) * 128 + tasks * P)


@pytest.mark.exhaustive  # by default the one below
@pytest.mark.parametrize('topology, cache', [('v5e:2x2', 'int8'), *((topology, '') for topology in ALL_CHIPS)])
def test_the_sampler_compiles(topology, cache):
  program, _ = compiled_sampler(topology, dataclasses.replace(POLICY, num_layers=1), SAMPLE.replace(cache=cache), M, R)
  assert 'decode_attention' in program.as_text()


@pytest.mark.exhaustive
@pytest.mark.parametrize('cache', ['int8', ''])
def test_the_sampler_of_layers_that_read_a_window_compiles(cache):
  """Beside layers that read all."""
  program, _ = compiled_sampler('v5e:2x2', GEMMA, SAMPLE.replace(cache=cache), M, R)
  assert 'decode_attention' in program.as_text()


@pytest.mark.exhaustive
def test_a_sampler_of_4b_shapes_holds_little_but_its_cache():
  """On v5e:4x4, data 4 x model 4: 32 slots, 16 tasks and 128 rollouts a shard."""
  config = knobs.sampler(slots=32, prefill=4, prompt_length=512, completion_length=2048)
  program, cache = compiled_sampler('v5e:4x4', QWEN, config, 16, 128, data=4, model=4)
  assert program.memory_analysis().temp_size_in_bytes < 1.3 * cache
  # No step gathers parameters or turns a cache around.
  text = program.as_text()
  assert not re.search(r'= bf16\[32,2,2048,128\]\S* copy\(', text)
  assert not re.search(r'= bf16\[[\d,]*(2560|9728)[\d,]*\]\S* all-gather\(', text)


# The shipped configs: each program of a step is lowered, which takes kernels to the compiler's door.


def shipped(name, variant):
  """A config, and the first slice that it is meant for."""
  config = importlib.import_module(f'configs.{name}').get_config(variant)
  if config.policy.checkpoint and not config.policy.vocab_size:  # then the sizes are the checkpoint's
    config.policy.checkpoint = str(configs_test.DATA / 'checkpoints' / configs_test.CHECKPOINTS[name])
  return config, (config.topologies or ('v5e:2x2',))[0]


@functools.cache
def lowered_knapsack(M, J, capacity):
  of = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)
  return jax.jit(functools.partial(knapsack, capacity=capacity, exact=True)).trace(
      of(M, J), of(M), of()).lower(lowering_platforms=('tpu',))


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['', pytest.param('debug', marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize('name', [
    'arithmetic', 'smollm2_arithmetic', 'gsm8k_qwen3_1p7b', 'r1_distill_1p5b', 'qwen3_4b', 'qwen25_math_7b',
    'mbpp_qwen25_coder_1p5b', 'qwen3_30b_a3b'])
def test_a_shipped_config_is_lowered_for_a_tpu(name, variant):
  config, topology = shipped(name, variant)
  alloc, tasks = config.alloc, config.tasks.per_step
  lowered_knapsack(tasks, alloc.high - alloc.low + 1, alloc.rollouts_per_step - alloc.low * tasks)
  programs = preflight.programs(preflight.setup(config, topology))
  assert {'reshard', 'sample', 'update'} <= {program.phase for program in programs}
  for program in programs:
    with jax.set_mesh(program.mesh):
      program.function.lower(*program.args)
