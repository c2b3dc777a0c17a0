"""The programs of the loop go through the real TPU compiler, on this CPU (libtpu, no TPU needed)."""

import dataclasses
import functools
import math
import re

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from kr_jax import sharding
from kr_jax import types
from kr_jax.allocation import allocate
from kr_jax.learning import noise
from kr_jax.learning import update
from kr_jax.model import policy
from tests import knobs

POLICY = policy.Config(
    vocab_size=512, num_layers=2, width=256, num_heads=4, num_kv_heads=2, head_width=64,
    hidden_width=512, rope_theta=1e4, norm_eps=1e-6, qk_norm=True, qkv_bias=True,
    tie_embeddings=False, dtype='bfloat16', remat='none', lora_rank=0, lora_alpha=1.0)
# With all that Gemma 3 has of its own.
GEMMA = dataclasses.replace(
    POLICY, head_width=256, qkv_bias=False, tie_embeddings=True, activation='gelu', norm_offset=1.0,
    post_norms=True, embedding_scale=True, query_scalar=128.0, window=64, global_every=2,
    local_rope_theta=1e4, rope_scaling=(8.0,))
UPDATE = knobs.updates(row_length=128, microbatch_rows=1)
M, R, P, C = 8, 64, 32, 32


@functools.cache
def devices(topology):
  return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices


def mesh_of(topology, **axes):
  """Of as many chips as it has places."""
  return sharding.mesh(devices(topology)[:math.prod(axes.values())], **axes)


def compile_for(topology, function, tree, *static, **axes):
  """The compiled program of function(*tree, *static) on a mesh."""
  mesh = mesh_of(topology, **axes)
  args = jax.tree.map(
      lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None) or at),
      tree, sharding.of(mesh, tree))
  with jax.set_mesh(mesh):
    return function.lower(*args, *static).compile()


def abstract_rollouts(length=P):
  prompts = types.Prompts(np.zeros((M, length), np.int32), np.ones(M, np.int32),
                          np.arange(M, dtype=np.int32))
  return types.Rollouts(
      prompts=prompts, task_R=np.zeros(R, np.int32), token_RC=np.zeros((R, length), np.int32),
      logp_RC=np.zeros((R, length), np.float32), length_R=np.ones(R, np.int32),
      ended_R=np.ones(R, np.int32), decode_steps=np.zeros((), np.int32))


@functools.cache
def abstract_state():
  return jax.eval_shape(lambda key: update.init(policy.init(POLICY, key), key, UPDATE),
                        jax.random.key(0))


@pytest.mark.parametrize('topology', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_the_allocator_beside_its_kernel_compiles(topology):
  gain_MG, units = np.zeros((M, 31), np.float32), np.int32(R - 2 * M)
  compile_for(topology, allocate.greedy, (gain_MG, units))
  compile_for(topology, allocate._even, (gain_MG.astype(np.int32), np.zeros(M, np.int32)))


def abstract_tokens(rollouts, config, topology, **axes):
  """Of all microbatches of rollouts, on a mesh."""
  mesh = mesh_of(topology, **axes)
  with jax.set_mesh(mesh):
    packed = update.pack_rollouts(rollouts, np.zeros(len(rollouts.task_R), bool), config)
  tokens = jax.eval_shape(update._gather, rollouts, packed.microbatches)
  of_rows = NamedSharding(mesh, PartitionSpec(None, sharding.ROWS))
  tokens = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of_rows), tokens)
  return tokens._replace(old_logp_BT=tokens.sampler_logp_BT)


@functools.cache
def update_for(topology, policy_config, config, length, **axes):
  """The compiled update of rollouts of `length` prompt and `length` completion tokens, and its state."""
  rollouts = abstract_rollouts(length)
  state = jax.eval_shape(lambda key: update.init(policy.init(policy_config, key), key, config),
                         jax.random.key(0))
  experience = jax.eval_shape(lambda rollouts: update._experience(
      rollouts, np.zeros(R, np.float32), config), rollouts)
  tokens = abstract_tokens(rollouts, config, topology, **axes)
  return compile_for(topology, update._step, (state, {}, experience, tokens, np.zeros(2, np.int32)),
                     policy_config, config, **axes), state


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v6e:2x2'])
def test_the_measurement_of_noise_compiles(topology):
  state, rollouts = abstract_state(), abstract_rollouts()
  program = compile_for(
      topology, noise.gradient_noise_of_tokens,
      (state.params, {}, rollouts.task_R, np.zeros(R, np.float32),
       abstract_tokens(rollouts, UPDATE, topology), np.int32(0), state.key), M, POLICY, UPDATE)
  assert program.memory_analysis().output_size_in_bytes < 1024  # four numbers, in a tile


@pytest.mark.slow
def test_the_update_of_layers_that_read_a_window_compiles():
  program, _ = update_for('v5e:2x2', GEMMA, UPDATE, P, data=2, model=2)
  # Each layer runs the attention of its kind.
  assert 'splash' in program.as_text() and 'conditional' in program.as_text()


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_the_update_compiles(topology):
  program, state = update_for(topology, POLICY, UPDATE, P)
  params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
  # The donated state is updated in place.
  assert program.memory_analysis().alias_size_in_bytes >= 3 * params
  assert 'splash' in program.as_text() and 'token_logprob' in program.as_text()


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{'data': 4}, {'fsdp': 4}, {'model': 2, 'data': 2}], ids=str)
def test_the_update_compiles_on_a_mesh(axes):
  """And leaves parameters and moments parted by the table, none of them whole on every chip."""
  program, state = update_for('v5e:2x2', POLICY, UPDATE, P, **axes)
  mesh = mesh_of('v5e:2x2', **axes)
  found, _ = program.output_shardings
  wanted = sharding.of(mesh, state)
  whole = set()
  for (path, x), found, wanted in zip(
      jax.tree_util.tree_leaves_with_path(state), *map(jax.tree.leaves, (found, wanted)), strict=True):
    assert found.is_equivalent_to(wanted, x.ndim), path
    if found.is_fully_replicated and x.size > 2048:
      whole.add(path)
  # Rows are spread over 'data', and nothing else is.
  assert bool(whole) == (axes == {'data': 4})


@pytest.mark.slow
@pytest.mark.parametrize('remat, prompt_sharing', [('none', 1.0), ('full', 0.6)])
def test_temporaries_of_the_update_grow_linearly_with_the_row(remat, prompt_sharing):
  """Neither [T, T] attention nor [T, V] logits stand in memory."""
  config = dataclasses.replace(POLICY, remat=remat, vocab_size=4096, width=128, num_heads=2, num_kv_heads=1,
                               hidden_width=256)
  temporaries, largest = [], []
  for length in (2048, 4096):
    program, _ = update_for('v5e:2x2', config,
                            UPDATE.replace(row_length=length, microbatch_rows=1, prompt_sharing=prompt_sharing),
                            length // 2)
    temporaries.append(program.memory_analysis().temp_size_in_bytes)
    shapes = re.findall(r'= \w+\[([\d,]+)\]', program.as_text())
    largest.append(max(math.prod(map(int, shape.split(','))) for shape in shapes))
  print(remat, prompt_sharing, temporaries, largest)
  assert largest[1] <= 2 * largest[0]
  # What is kept in VMEM is not counted, and of short rows that is more: so much can come on top.
  vmem = 128 * 2**20
  assert temporaries[1] <= 2 * (temporaries[0] + vmem)
