"""Three steps of sampling and learning are the same on every mesh."""

import functools
import re

import jax
import numpy as np
import pytest

from kr_jax import knobs as knobs_lib
from kr_jax import queues as queues_lib
from kr_jax import sample
from kr_jax import sharding
from kr_jax import types
from kr_jax.learning import update
from kr_jax.model import decode
from kr_jax.model import policy
from tests import knobs

# Two key/value heads: fewer than the longest 'model' axes.
POLICY = policy.Config(
    vocab_size=16, num_layers=2, width=16, num_heads=8, num_kv_heads=2, head_width=4, hidden_width=24,
    rope_theta=100.0, norm_eps=1e-6, qk_norm=True, qkv_bias=False, tie_embeddings=True,
    dtype='float32', remat='none', lora_rank=0, lora_alpha=1.0)
EXPERTS = POLICY.replace(num_experts=8, experts_per_token=2, hidden_width=8)
SAMPLE = knobs.sampler(slots=3, refill=1, prefill=2, prompt_length=4, completion_length=5)
# Adam divides by what may be the rounding of 0; a larger eps forgives that.
UPDATE = knobs.updates(learning_rate=3e-3, eps=1e-3, row_length=9, microbatch_rows=1)
PROMPTS = types.Prompts(
    token_MP=np.array([[2, 3, 0, 0], [4, 5, 6, 2], [6, 6, 6, 0]], np.int32),
    length_M=np.array([2, 4, 3], np.int32), index_M=np.array([5, 4, 7], np.int32))
BUDGETS = ([4, 6, 6], [10, 3, 2], [2, 0, 14])


def three_steps(meshes, policy_config):
  """Tokens, and losses and loads of experts, of each step; and the parameters after them."""
  learn, samples = meshes or (None, None)
  on = lambda mesh: jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0])
  tokens, losses = [], []
  with on(learn):
    params = jax.tree.map(lambda x: 2 * x, policy.init(policy_config, jax.random.key(0)))
    state = update.init(params, jax.random.key(1), UPDATE)
    for step, budget_M in enumerate(BUDGETS):
      key = jax.random.fold_in(state.key, step)
      with on(samples):
        rollouts = sample.rollouts(
            policy_config, decode.sampling_params(policy_config, state.params), PROMPTS, np.array(budget_M),
            sharding.move(key), SAMPLE, total=16)
      rollouts = sharding.move(rollouts)
      n = sum(budget_M)
      token_RC = np.asarray(rollouts.token_RC)
      assert not np.any(token_RC[n:])
      tokens.append(token_RC[:n].tolist())
      reward_R = np.float32(token_RC.sum(axis=1) % 3 == 0)
      state, measured = update.step(state, rollouts, reward_R, {}, policy_config, UPDATE)
      assert measured[0]['logp_error'] < 1e-3  # over all tokens: the trainer says what the sampler said
      losses += [(float(m['loss']), *np.ravel(m.get('load', ()))) for m in measured]
  return tokens, losses, jax.tree.map(np.asarray, state.params)


@functools.cache
def on_one_device(policy_config):
  return three_steps(None, policy_config)


@pytest.mark.slow
@pytest.mark.parametrize('policy_config, axes', [
    (POLICY.replace(num_layers=1), {'data': 2, 'fsdp': 2, 'model': 2}),
    *(pytest.param(c, {'fsdp': 2, 'model': 4}, marks=pytest.mark.exhaustive) for c in (POLICY, EXPERTS))],
    ids=lambda x: str(x) if isinstance(x, dict) else 'experts' if x is EXPERTS else '')
def test_no_collective_of_the_sampler_joins_queues(policy_config, axes):
  """Each loops as often as its own queue asks: one that waits for another would wait for ever. In every wave."""
  mesh = sharding.mesh(**axes)
  key = jax.random.key(0)
  with jax.set_mesh(mesh):
    params = jax.eval_shape(lambda key: decode.sampling_params(policy_config, policy.init(policy_config, key)), key)
    params = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), params,
                          sharding.of(mesh, params, ('model',)))
    queues = queues_lib.assign_to_queues(np.array([4, 6, 6]), total=16, shards=sharding.row_shards())
    args = policy_config, params, PROMPTS, queues, key, SAMPLE
    _, prefixes = sample._decode.eval_shape(*args, True)  # as without waves, but that it gives prefixes as well
    lowered = [sample._decode.lower(*args), sample._decode_on.lower(*args, prefixes)]
  for program in lowered:
    text, m = program.compile().as_text(), axes['model']
    groups = re.findall(r'replica_groups=(\[[\d,]+\]<=\[8\]|{{[\d,{}]+}}),', text)
    assert len(groups) == len(re.findall(r'channel_id=', text)) > 0
    along_model = np.arange(8).reshape(-1, m).tolist()  # neighbours
    assert set(groups) <= {f'[{8 // m},{m}]<=[8]', str(along_model).translate(str.maketrans('[]', '{}', ' '))}
    assert 'collective-permute' not in text


def assert_steps_are_those_of_one_device(policy_config, **axes):
  want_tokens, want_losses, want = on_one_device(policy_config)
  assert len({tuple(x) for step in want_tokens for x in step}) > 20 and np.ptp([loss for loss, *_ in want_losses]) > 0
  meshes = sharding.meshes(knobs_lib.Mesh(**axes), policy_config, rollouts=16)
  tokens, losses, params = three_steps(meshes, policy_config)
  assert tokens == want_tokens
  np.testing.assert_allclose(losses, want_losses, atol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max()), params, want)


@pytest.mark.slow
@pytest.mark.parametrize('data, fsdp, model, sample_model', [
    (2, 2, 2, 4),  # by default all axes at once, and a sampler on another mesh than the learner's
    *(pytest.param(*axes, marks=pytest.mark.exhaustive) for axes in [
        (8, 1, 1, 0), (1, 8, 1, 4), (1, 2, 4, 1),
        *((data, fsdp, 8 // data // fsdp, 0) for data in (1, 2, 4) for fsdp in (1, 2, 4, 8) if data * fsdp <= 8)])])
def test_steps_are_those_of_one_device(data, fsdp, model, sample_model):
  assert_steps_are_those_of_one_device(POLICY, data=data, fsdp=fsdp, model=model, sample_model=sample_model)


@pytest.mark.exhaustive
@pytest.mark.parametrize('axes', [
    {'fsdp': 2, 'expert': 2, 'model': 2, 'sample_model': 4}, {'data': 2, 'expert': 4},
    {'expert': 8, 'sample_model': 8}, {'data': 2, 'fsdp': 2, 'expert': 2}, {'data': 2, 'expert': 2, 'model': 2},
    {'fsdp': 4, 'model': 2, 'sample_model': 1}, {'data': 8}], ids=str)
def test_steps_of_a_policy_with_experts_are_those_of_one_device(axes):
  assert_steps_are_those_of_one_device(EXPERTS, **axes)
