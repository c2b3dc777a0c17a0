"""The programs of the loop go through the real TPU compiler, on this CPU (libtpu, no TPU needed)."""

import functools

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax import allocate
from kr_jax import pack
from kr_jax import policy
from kr_jax import sample
from kr_jax import types
from kr_jax import update

POLICY = policy.Config(
    vocab_size=512, num_layers=2, width=256, num_heads=4, num_kv_heads=2, head_width=64,
    hidden_width=512, rope_theta=1e4, norm_eps=1e-6, qk_norm=True, qkv_bias=True,
    tie_embeddings=False, dtype='bfloat16')
SAMPLE = sample.Config(slots=16, refill=4, prompt_length=32, completion_length=32, temperature=1.0)
UPDATE = update.Config(
    learning_rate=1e-4, warmup_steps=0, decay_steps=0, weight_decay=0.0, max_grad_norm=1.0,
    row_length=128, microbatch_rows=4, clip_low=0.2, clip_high=0.28, advantage='std', temperature=1.0)
M, R, P, C = 8, 64, 32, 32


@functools.cache
def device(topology):
  return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[0]


def compile_for(topology, function, tree, *static):
  """The compiled program of function(*tree, *static) on one chip."""
  sharding = jax.sharding.SingleDeviceSharding(device(topology))
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
  return function.lower(*args, *static).compile()


def abstract_rollouts():
  prompts = types.Prompts(np.zeros((M, P), np.int32), np.ones(M, np.int32), np.arange(M, dtype=np.int32))
  return types.Rollouts(
      prompts=prompts, task_R=np.zeros(R, np.int32), token_RC=np.zeros((R, C), np.int32),
      logp_RC=np.zeros((R, C), np.float32), length_R=np.ones(R, np.int32),
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


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v6e:2x2'])
def test_the_sampler_compiles(topology):
  rollouts = abstract_rollouts()
  sampler = jax.jit(lambda params, prompts, budget_M, key: sample._rollouts(
      POLICY, params, prompts, budget_M, key, SAMPLE, R))
  key = jax.eval_shape(lambda: jax.random.key(0))
  program = compile_for(topology, sampler, (
      abstract_state().params, rollouts.prompts, np.zeros(M, np.int32), key))
  # Slots and prefixes, keys and values, bfloat16 in rows of 128 lanes.
  cache = POLICY.num_layers * POLICY.num_kv_heads * 128 * 2 * 2 * (SAMPLE.slots * (P + C) + M * P)
  assert program.memory_analysis().temp_size_in_bytes < 3 * cache


def empty_rows():
  rows = -(-pack.max_rows(R, P + C, UPDATE.row_length) // UPDATE.microbatch_rows)
  shape = (rows * UPDATE.microbatch_rows, UPDATE.row_length)
  return pack.Packed(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.array(1, np.int32))


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v6e:2x2'])
def test_the_measurement_of_noise_compiles(topology):
  state = abstract_state()
  program = compile_for(
      topology, update.gradient_noise,
      (state.params, abstract_rollouts(), np.zeros(R, np.float32), empty_rows(), state.key),
      POLICY, UPDATE)
  assert program.memory_analysis().output_size_in_bytes < 1024  # four numbers, in a tile


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v6e:2x2'])
def test_the_update_compiles(topology):
  program = compile_for(
      topology, update.step,
      (abstract_state(), abstract_rollouts(), np.zeros(R, np.float32), empty_rows()), POLICY, UPDATE)
  params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_state().params))
  # The donated state is updated in place.
  assert program.memory_analysis().alias_size_in_bytes >= 3 * params
