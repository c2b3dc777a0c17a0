"""The sampler goes through the real TPU compiler, on this CPU (libtpu, no TPU needed)."""

import dataclasses
import re

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from kr_jax import sample
from kr_jax import sharding
from kr_jax import types
from kr_jax.model import decode
from kr_jax.model import policy
from tests import knobs
from tests.tpu_test import GEMMA, M, POLICY, R, mesh_of

SAMPLE = knobs.sampler(slots=16, prompt_length=128, completion_length=128)


def sampler_for(topology, policy_config, config, tasks, rollouts, **axes):
  """The compiled sampler of so many tasks and rollouts a shard, and the bytes of its slots and prefixes."""
  mesh = mesh_of(topology, **axes)
  shards = axes.get('data', 1)
  num_tasks, total = shards * (tasks - (shards > 1)), shards * rollouts
  P, C = config.prompt_length, config.completion_length
  of = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    key = jax.eval_shape(lambda: jax.random.key(0))
    sampling_params = jax.eval_shape(lambda key: decode.sampling_params(policy_config, policy.init(policy_config, key)), key)
    sampling_params = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), sampling_params,
                          sharding.of(mesh, sampling_params, ('model',)))
    queues = sample.assign_to_queues(np.full(num_tasks, total // num_tasks), total=total, shards=shards)
    assert queues.task_ZK.shape == (shards, tasks) and queues.local_ZQ.shape == (shards, rollouts)
    queues = jax.tree.map(lambda x: of(x, PartitionSpec(sharding.ROWS)), queues)
    prompts = types.Prompts(np.zeros((num_tasks, P), np.int32), np.ones(num_tasks, np.int32),
                            np.arange(num_tasks, dtype=np.int32))
    program = sample._decode.lower(policy_config, sampling_params, prompts, queues, key, config).compile()
  value = 1 if config.cache == 'int8' else 2
  column = 2 * policy_config.num_layers * policy_config.num_kv_heads // axes.get('model', 1) * (
      policy_config.head_width * value + 4 * (config.cache == 'int8'))
  return program, column * (config.slots * -(-C // 128) * 128 + tasks * P)


@pytest.mark.slow
@pytest.mark.parametrize('topology, cache', [
    ('v4:2x2x1', ''), ('v5e:2x2', ''), ('v5e:2x2', 'int8'), ('v5p:2x2x1', ''), ('v6e:2x2', ''),
    ('tpu7x:2x2x1', '')])
def test_the_sampler_compiles(topology, cache):
  program, _ = sampler_for(topology, dataclasses.replace(POLICY, num_layers=1),
                           SAMPLE.replace(cache=cache), M, R)
  assert 'decode_attention' in program.as_text()


@pytest.mark.slow
def test_the_sampler_of_layers_that_read_a_window_compiles():
  program, _ = sampler_for('v5e:2x2', GEMMA, SAMPLE, M, R)
  assert 'decode_attention' in program.as_text()


# Qwen3-4B but for its 36 layers, of which four stand for all.
QWEN = policy.Config(
    vocab_size=151936, num_layers=4, width=2560, num_heads=32, num_kv_heads=8, head_width=128,
    hidden_width=9728, rope_theta=1e6, norm_eps=1e-6, qk_norm=True, qkv_bias=False, tie_embeddings=True,
    dtype='bfloat16', remat='none', lora_rank=0, lora_alpha=1.0)


@pytest.mark.slow
def test_a_sampler_of_4b_shapes_holds_little_but_its_cache():
  """On v5e:4x4, data 4 x model 4: 32 slots, 16 tasks and 128 rollouts a shard."""
  config = knobs.sampler(slots=32, prefill=4, prompt_length=512, completion_length=2048)
  program, cache = sampler_for('v5e:4x4', QWEN, config, 16, 128, data=4, model=4)
  temporaries = program.memory_analysis().temp_size_in_bytes
  print(f'{temporaries / 1e9:.2f} GB, of them {cache / 1e9:.2f} of slots and prefixes')
  assert temporaries < 1.3 * cache
  # No step gathers parameters or turns a cache around.
  text = program.as_text()
  assert not re.search(r'= bf16\[32,2,2048,128\]\S* copy\(', text)
  assert not re.search(r'= bf16\[[\d,]*(2560|9728)[\d,]*\]\S* all-gather\(', text)
