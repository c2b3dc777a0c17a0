"""The sampler against a naive one that knows no slots, no cache and no queue."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax import policy
from kr_jax import sample
from kr_jax import types
from kr_jax.tokenizer import STOP

POLICY = policy.Config(
    vocab_size=7, num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=24,
    rope_theta=100.0, norm_eps=1e-6, qk_norm=False, qkv_bias=False, tie_embeddings=True,
    dtype='float32', remat='none', lora_rank=0, lora_alpha=1.0)
CONFIG = sample.Config(slots=4, refill=2, prompt_length=5, completion_length=6, temperature=1.0)
PROMPTS = types.Prompts(
    token_MP=np.array([[2, 3, 0, 0, 0], [4, 5, 6, 2, 3], [6, 6, 6, 0, 0]], np.int32),
    length_M=np.array([2, 5, 3], np.int32), index_M=np.array([10, 4, 7], np.int32))
KEY = jax.random.key(3)


@pytest.fixture(scope='module')
def params():
  # Large weights make the next token depend on all before it.
  return jax.tree.map(lambda x: 3 * x, policy.init(POLICY, jax.random.key(0)))


def naive(params, prompts, budget_M, key, config):
  """One rollout at a time, scored from scratch for every token."""
  completions = []
  score = jax.jit(policy.logits, static_argnums=0)
  for m, budget in enumerate(budget_M):
    prompt = list(prompts.token_MP[m, :prompts.length_M[m]])
    for number in range(budget):
      rollout_key = jax.random.fold_in(jax.random.fold_in(key, prompts.index_M[m]), number)
      tokens, logps = [], []
      while len(tokens) < config.completion_length and STOP not in tokens:
        row = np.zeros((1, config.prompt_length + config.completion_length), np.int32)
        row[0, :len(prompt) + len(tokens)] = prompt + tokens
        logits_V = score(POLICY, params, row)[0, len(prompt) + len(tokens) - 1]
        logits_V = np.asarray(logits_V, np.float64) / (config.temperature or 1)
        noise_V = jax.random.gumbel(jax.random.fold_in(rollout_key, len(tokens)), logits_V.shape)
        token = int(np.argmax(logits_V + np.asarray(noise_V) * (config.temperature > 0)))
        tokens.append(token)
        logps.append(logits_V[token] - np.log(np.sum(np.exp(logits_V))))
      completions.append((m, tokens, logps))
  return completions


def run(params, budget_M, config=CONFIG, prompts=PROMPTS, key=KEY):
  return sample.rollouts(POLICY, params, prompts, np.array(budget_M), key, config,
                         total=int(np.sum(budget_M)))


@pytest.mark.parametrize('temperature', [1.0, 0.7, 0.0])
def test_rollouts_equal_the_naive_sampler(params, temperature):
  config = CONFIG._replace(temperature=temperature)
  budget_M = [4, 1, 6]
  rollouts = run(params, budget_M, config)
  for r, (m, tokens, logps) in enumerate(naive(params, PROMPTS, budget_M, KEY, config)):
    assert rollouts.task_R[r] == m
    n = rollouts.length_R[r]
    assert rollouts.token_RC[r, :n].tolist() == tokens
    assert not rollouts.token_RC[r, n:].any() and not rollouts.logp_RC[r, n:].any()
    np.testing.assert_allclose(rollouts.logp_RC[r, :n], logps, atol=1e-4)
    assert rollouts.ended_R[r] == (
        types.ENDED_STOP if tokens[-1] == STOP else types.ENDED_LENGTH)
  # The fixture shows both ends, and a stop at once; else this test says less than it seems to.
  if temperature == 1.0:
    assert set(rollouts.ended_R.tolist()) == {types.ENDED_STOP, types.ENDED_LENGTH}


@pytest.mark.parametrize('slots, refill', [
    pytest.param(1, 1, marks=pytest.mark.slow),
    pytest.param(3, 1, marks=pytest.mark.slow), (3, 3), (16, 5), (64, 1)])
def test_rollouts_do_not_depend_on_slots(params, slots, refill):
  want = run(params, [4, 1, 11])
  got = run(params, [4, 1, 11], CONFIG._replace(slots=slots, refill=refill))
  np.testing.assert_array_equal(got.token_RC, want.token_RC)
  np.testing.assert_allclose(got.logp_RC, want.logp_RC, atol=1e-5)
  np.testing.assert_array_equal(got.ended_R, want.ended_R)


def test_rollouts_do_not_depend_on_other_budgets_or_the_order_of_tasks(params):
  want = run(params, [2, 3, 5])
  more = run(params, [6, 3, 1])
  np.testing.assert_array_equal(want.token_RC[:2], more.token_RC[:2])
  np.testing.assert_array_equal(want.token_RC[2:5], more.token_RC[6:9])
  turned = types.Prompts(*(x[::-1] for x in PROMPTS))
  backwards = run(params, [5, 3, 2], prompts=turned)
  np.testing.assert_array_equal(want.token_RC[5:], backwards.token_RC[:5])


def test_rollouts_of_one_task_differ_and_so_do_steps(params):
  rollouts = run(params, [0, 16, 0])
  assert len({tuple(x) for x in rollouts.token_RC.tolist()}) > 8
  other = run(params, [0, 16, 0], key=jax.random.fold_in(KEY, 1))
  assert not np.array_equal(rollouts.token_RC, other.token_RC)


def test_budgets_do_not_compile_again(params):
  run(params, [4, 4, 8])
  before = sample._rollouts._cache_size()
  for budget_M in ([16, 0, 0], [1, 14, 1], [5, 5, 6], [2, 0, 3]):
    rollouts = sample.rollouts(POLICY, params, PROMPTS, np.array(budget_M), KEY, CONFIG, total=16)
    assert np.sum(np.asarray(rollouts.length_R) > 0) == sum(budget_M)
  assert sample._rollouts._cache_size() == before


@pytest.mark.parametrize('budget_M', [[2, 1, 4], [0, 0, 1], [3, 0, 0], [1, 9, 5]])
def test_budgets_below_the_total_leave_the_rest_unsampled(params, budget_M):
  want = run(params, budget_M)
  n = sum(budget_M)
  got = sample.rollouts(POLICY, params, PROMPTS, np.array(budget_M), KEY, CONFIG, total=16)
  for name in ('task_R', 'token_RC', 'logp_RC', 'length_R', 'ended_R'):
    x, rest = np.asarray(getattr(got, name))[:n], np.asarray(getattr(got, name))[n:]
    np.testing.assert_allclose(x, getattr(want, name), atol=1e-5)
    assert np.all(rest == (3 if name == 'task_R' else 0)), name
  assert int(got.decode_steps) <= int(want.decode_steps)  # S is no smaller


def one_token(token, logit=60.0):
  """Parameters whose policy says `token` for ever: blocks that add nothing, one aligned row."""
  params = jax.tree.map(jnp.zeros_like, policy.init(POLICY, jax.random.key(0)))
  embed_VD = jnp.zeros((7, 16)).at[:, 0].set(-1.0).at[token, 0].set(1.0)
  return params | {'embed_VD': embed_VD, 'norm_D': jnp.zeros(16).at[0].set(
      jnp.where(token == 2, 1.0, -1.0) * logit)}


def test_the_first_token_may_end_a_completion():
  # Every prompt here ends on a token other than STOP, embedded at -1: -1 * -60 favours... STOP's 1.
  params = one_token(STOP)
  prompts = PROMPTS
  rollouts = run(params, [2, 3, 2], prompts=prompts)
  assert rollouts.length_R.tolist() == [1] * 7
  assert rollouts.ended_R.tolist() == [types.ENDED_STOP] * 7
  assert rollouts.token_RC[:, 0].tolist() == [STOP] * 7
  assert int(rollouts.decode_steps) == 2  # 4 slots, 7 rollouts


def test_a_completion_nothing_ends_is_cut_at_its_length(params):
  never = params | {'embed_VD': params['embed_VD'].at[STOP].set(0)}
  never['norm_D'] = never['norm_D'] * 50  # STOP's logit is 0 among large ones
  rollouts = run(never, [2, 3, 2], CONFIG._replace(temperature=0.0))
  assert rollouts.length_R.tolist() == [6] * 7
  assert rollouts.ended_R.tolist() == [types.ENDED_LENGTH] * 7


@pytest.mark.parametrize('budget_M', [[1, 2, 4], [7, -1, 0]])
def test_bad_budgets(params, budget_M):
  with pytest.raises(ValueError, match='must be >= 0 and sum to at most 6'):
    sample.rollouts(POLICY, params, PROMPTS, np.array(budget_M), KEY, CONFIG, total=6)


@pytest.mark.parametrize('changed, named', [
    ({'slots': 0}, 'sample.slots=0 is below 1'),
    ({'refill': 5}, 'sample.refill=5 is not in 1..sample.slots=4'),
    ({'completion_length': 0}, 'sample.completion_length=0'),
    ({'prompt_length': 0}, 'sample.prompt_length=0'),
    ({'temperature': float('nan')}, 'sample.temperature=nan'),
])
def test_bad_config(changed, named):
  with pytest.raises(ValueError, match=named):
    sample.check(CONFIG._replace(**changed))
