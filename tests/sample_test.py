"""The sampler against a naive one that knows no slots, no cache and no queue."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from kr_jax import completions
from kr_jax import sample
from kr_jax import sharding
from kr_jax import types
from kr_jax.costs import arithmetic
from kr_jax.learning import update
from kr_jax.model import decode
from kr_jax.model import policy
from kr_jax.model.tokenizer import STOP
from tests import draw_test
from tests import knobs
from tests.learning import update_test

POLICY = policy.Config(
    vocab_size=7, num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=24,
    rope_theta=100.0, norm_eps=1e-6, qk_norm=False, qkv_bias=False, tie_embeddings=True,
    dtype='float32', remat='none', lora_rank=0, lora_alpha=1.0)
CONFIG = knobs.sampler(slots=4, refill=2, prefill=2, prompt_length=5, completion_length=6)
PROMPTS = types.Prompts(
    token_MP=np.array([[2, 3, 0, 0, 0], [4, 5, 6, 2, 3], [6, 6, 6, 0, 0]], np.int32),
    length_M=np.array([2, 5, 3], np.int32), index_M=np.array([10, 4, 7], np.int32))
KEY = jax.random.key(3)
MOST = 16  # rollouts of the program that most tests share
score = jax.jit(policy.logits, static_argnums=0)


@pytest.fixture(scope='module')
def params():
  # Large weights make the next token depend on all before it.
  return jax.tree.map(lambda x: 3 * x, policy.init(POLICY, jax.random.key(0)))


def naive(params, prompts, budget_M, key, config):
  """One rollout at a time, scored from scratch for every token."""
  completions = []
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
        token = int(np.argmax(logits_V) if config.temperature == 0 else draw_test.drawn(
            logits_V, jax.random.fold_in(rollout_key, len(tokens))))
        tokens.append(token)
        logps.append(logits_V[token] - np.log(np.sum(np.exp(logits_V))))
      completions.append((m, tokens, logps))
  return completions


def run(params, budget_M, config=CONFIG, prompts=PROMPTS, key=KEY, policy_config=POLICY, **more):
  return sample.rollouts(policy_config, decode.sampling_params(policy_config, params), prompts, np.array(budget_M),
                         key, config, **{'total': int(np.sum(budget_M))} | more)


@pytest.mark.parametrize('temperature', [1.0, pytest.param(0.7, marks=pytest.mark.slow), 0.0])
def test_rollouts_equal_the_naive_sampler(params, temperature):
  config = CONFIG.replace(temperature=temperature)
  budget_M = [4, 1, 11]
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
    pytest.param(1, 1, marks=pytest.mark.exhaustive),
    pytest.param(3, 1, marks=pytest.mark.exhaustive), (3, 3), pytest.param(16, 5, marks=pytest.mark.slow),
    pytest.param(64, 1, marks=pytest.mark.exhaustive)])
def test_rollouts_do_not_depend_on_slots(params, slots, refill):
  want = run(params, [4, 1, 11])
  got = run(params, [4, 1, 11], CONFIG.replace(slots=slots, refill=refill))
  np.testing.assert_array_equal(got.token_RC, want.token_RC)
  np.testing.assert_allclose(got.logp_RC, want.logp_RC, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(got.ended_R, want.ended_R)


@pytest.mark.slow
def test_rollouts_do_not_depend_on_other_budgets_or_the_order_of_tasks(params):
  want = run(params, [2, 3, 11])
  more = run(params, [6, 3, 7])
  np.testing.assert_array_equal(want.token_RC[:2], more.token_RC[:2])
  np.testing.assert_array_equal(want.token_RC[2:5], more.token_RC[6:9])
  turned = types.Prompts(*(x[::-1] for x in PROMPTS))
  backwards = run(params, [11, 3, 2], prompts=turned)
  np.testing.assert_array_equal(want.token_RC[5:], backwards.token_RC[:11])


def test_rollouts_of_one_task_differ_and_so_do_steps(params):
  rollouts = run(params, [0, 16, 0])
  assert len({tuple(x) for x in rollouts.token_RC.tolist()}) > 8
  other = run(params, [0, 16, 0], key=jax.random.fold_in(KEY, 1))
  assert not np.array_equal(rollouts.token_RC, other.token_RC)


def test_budgets_do_not_compile_again(params):
  """Over 50 steps, some of which spend less than the total."""
  run(params, [4, 4, 8])
  before = sample._decode._cache_size()
  rng = np.random.default_rng(0)
  for step in range(50):
    budget_M = rng.multinomial(rng.integers(1, 17), rng.dirichlet(np.ones(3)))
    rollouts = run(params, budget_M, total=16, key=jax.random.fold_in(KEY, step),
                   expected_M=rng.uniform(1, 9, 3))
    assert np.sum(np.asarray(rollouts.length_R) > 0) == sum(budget_M)
  assert sample._decode._cache_size() == before


@pytest.mark.parametrize('temperature', [1.0, pytest.param(0.7, marks=pytest.mark.slow)])
def test_log_probabilities_are_those_of_the_update(params, temperature):
  rollouts = run(params, [4, 1, 11], CONFIG.replace(temperature=temperature))
  config = knobs.updates(row_length=24, microbatch_rows=2, temperature=temperature)
  packed = update.pack_rollouts(rollouts, np.ones(MOST, bool), config)
  logp_RC = update_test.by_rollout(rollouts, packed, update.logps(
      params, {}, update.gather(rollouts, packed), packed.first[-1], POLICY, config))
  np.testing.assert_allclose(rollouts.logp_RC, logp_RC, atol=1e-4)
  assert np.count_nonzero(logp_RC) == np.asarray(rollouts.length_R).sum()


@pytest.mark.parametrize('budget_M', [[2, 1, 4], [0, 0, 1], [2, 0, 0], [1, 9, 5]])
def test_budgets_below_the_total_leave_the_rest_unsampled(params, budget_M):
  if sum(budget_M) == 1:  # a program of one slot
    want, of_R = run(params, budget_M), [0]
  else:  # a task's first rollouts are those of a smaller budget
    want, first_M = run(params, [2, 9, 5]), [0, 2, 11]
    of_R = np.concatenate([first + np.arange(n) for first, n in zip(first_M, budget_M)])
  got = run(params, budget_M, total=MOST)
  for name in ('task_R', 'token_RC', 'logp_RC', 'length_R', 'ended_R'):
    x, rest = np.split(np.asarray(getattr(got, name)), [sum(budget_M)])
    np.testing.assert_allclose(x, np.asarray(getattr(want, name))[of_R], atol=1e-5)
    assert np.all(rest == (3 if name == 'task_R' else 0)), name
  assert sum(budget_M) > 1 or int(got.decode_steps) <= int(want.decode_steps)  # S is no smaller


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
  rollouts = run(params, [2, 3, 2], prompts=prompts, total=MOST)
  assert rollouts.length_R.tolist() == [1] * 7 + [0] * 9
  assert rollouts.ended_R[:7].tolist() == [types.ENDED_STOP] * 7
  assert rollouts.token_RC[:7, 0].tolist() == [STOP] * 7
  assert int(rollouts.decode_steps) == 2  # 4 slots, 7 rollouts


def test_a_completion_nothing_ends_is_cut_at_its_length(params):
  never = params | {'embed_VD': params['embed_VD'].at[STOP].set(0)}
  never['norm_D'] = never['norm_D'] * 50  # STOP's logit is 0 among large ones
  rollouts = run(never, [2, 3, 2], CONFIG.replace(temperature=0.0), total=MOST)
  assert rollouts.length_R.tolist() == [6] * 7 + [0] * 9
  assert rollouts.ended_R[:7].tolist() == [types.ENDED_LENGTH] * 7


def test_any_of_the_stop_tokens_ends_a_completion(params):
  want = run(params, [0, 16, 0])
  got = run(params, [0, 16, 0], CONFIG.replace(stop_ids=(STOP, 3)))
  assert 3 in np.asarray(want.token_RC)
  for token_C, n, other_C, ended in zip(want.token_RC, got.length_R, got.token_RC, got.ended_R):
    stops = np.flatnonzero(np.isin(token_C, (STOP, 3)))
    assert n == (stops[0] + 1 if len(stops) else 6)
    assert ended == (types.ENDED_STOP if len(stops) else types.ENDED_LENGTH)
    np.testing.assert_array_equal(other_C[:n], token_C[:n])
    assert not np.any(other_C[n:])


@pytest.mark.slow
def test_one_program_keeps_any_rollouts_and_leaves_them_on_the_mesh(params):
  mesh = sharding.mesh(jax.devices()[:2], data=2)
  with jax.set_mesh(mesh):
    rollouts = run(jax.device_put(params, sharding.of(mesh, params)), [4, 1, 11], total=16)
    before = completions._keep._cache_size()
    for keep_R in np.random.default_rng(0).random((4, 16)) < np.array([[0], [0.3], [0.8], [1]]):
      got = completions.keep(rollouts, keep_R)
      assert got.task_R.tolist() == np.where(keep_R, rollouts.task_R, 3).tolist()
      for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(rollouts)):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim) and x.dtype == y.dtype
    assert completions._keep._cache_size() == before + 1


@pytest.mark.exhaustive
@pytest.mark.parametrize('prefill', [1, 3, 8])
def test_prompts_read_together_are_read_alike(params, prefill):
  want = run(params, [1, 9, 2])
  got = run(params, [1, 9, 2], CONFIG.replace(prefill=prefill))
  np.testing.assert_array_equal(got.token_RC, want.token_RC)


@pytest.fixture
def lengths_read(monkeypatch):
  """The lengths of the prompts that are read, a list for each chunk; of programs that are traced anew."""
  read, prefill = [], decode.prefill

  def counted(config, params, token_BP, length_B, **more):
    jax.debug.callback(lambda x: read.append(x.tolist()), length_B)
    return prefill(config, params, token_BP, length_B, **more)

  monkeypatch.setattr(decode, 'prefill', counted)
  return read


def test_every_prompt_is_read_once_whatever_its_budget(params, lengths_read):
  """Three prompts in chunks of two: only as many chunks as hold tasks."""
  for budget_M, chunks in (([1, 9, 2], [[2, 5], [3, 1]]), ([0, 9, 0], [[5, 2]])):
    lengths_read.clear()
    jax.block_until_ready(run(params, budget_M, CONFIG.replace(min_p=1e-30), total=12))
    jax.effects_barrier()
    assert sorted(lengths_read) == sorted(chunks)


def test_expected_lengths_change_the_order_and_no_token(params):
  want = run(params, [5, 6, 5])
  got = run(params, [5, 6, 5], expected_M=np.array([1.0, 5.0, 3.0]))
  np.testing.assert_array_equal(got.token_RC, want.token_RC)
  np.testing.assert_allclose(got.logp_RC, want.logp_RC, atol=1e-5)


# A mesh.

WIDE = dataclasses.replace(POLICY, num_heads=8, num_kv_heads=4, vocab_size=8, hidden_width=32)
MESH = {'data': 2, 'fsdp': 2, 'model': 2}


@pytest.mark.slow
@pytest.mark.parametrize('axes, budget_M', [
    ({'data': 8}, [3, 0, 2]), ({'data': 2, 'fsdp': 2, 'model': 2}, [4, 1, 11]),
    *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (
        ({'data': 2}, [4, 1, 11]), ({'data': 8}, [16, 0, 0]), ({'model': 4}, [4, 1, 11])))], ids=str)
def test_rollouts_do_not_depend_on_the_mesh(axes, budget_M):
  devices = int(np.prod(list(axes.values())))
  params = jax.tree.map(lambda x: 3 * x, policy.init(WIDE, jax.random.key(0)))
  want = run(params, budget_M, policy_config=WIDE, total=16)
  mesh = sharding.mesh(jax.devices()[:devices], **axes)
  with jax.set_mesh(mesh):
    got = run(jax.device_put(params, sharding.of(mesh, params)), budget_M, policy_config=WIDE, total=16)
  for name in ('task_R', 'token_RC', 'length_R', 'ended_R'):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
  np.testing.assert_allclose(got.logp_RC, want.logp_RC, rtol=1e-5, atol=1e-5)


# What a wave takes.


def counted(clock):
  """What was counted of sampling since the last drain."""
  return {row['phase']: row for row in clock.drain()}['sample']


def test_what_a_wave_takes_is_counted(params, clock):
  """Three prompts in two chunks of two; and in each step four slots, of six columns of the ring each. Attention reads
  prompts in windows of eight slots of a task: three windows for all 13 rollouts, of which 4 / 16 are there at once."""
  budget_M, c = [4, 1, 8], POLICY
  waves = sample.Waves(c, decode.sampling_params(c, params), PROMPTS, KEY, CONFIG, totals=(MOST,))
  rollouts = waves.sample(np.array(budget_M))
  found = waves.counters(rollouts)
  length_R, steps = np.asarray(rollouts.length_R), int(rollouts.decode_steps)
  assert found['tokens_prompt'] == 2 + 5 + 3 and found['rollouts'] == 13
  assert found['tokens_generated'] == length_R.sum()
  assert found['flops_useful'] == arithmetic.sample_flops(c, arithmetic.Lengths(
      PROMPTS.length_M, np.repeat(PROMPTS.length_M, budget_M), length_R[:13]))
  assert found['hbm_bytes_read'] > steps * 4 * (arithmetic.layer_weights(c) + c.width * c.vocab_size)
  heads, output = c.num_heads * c.head_width, 2 * c.width * c.vocab_size
  last = 2 * (heads * c.width + 3 * c.width * c.hidden_width)  # of the one layer, for the last token alone
  prompt = 5 * 2 * arithmetic.layer_weights(c) - 4 * last + output + 4 * heads * 5 ** 2
  step = 4 * (2 * arithmetic.layer_weights(c) + output + 4 * heads * 6)
  window = 4 * 8 * heads * 5
  assert found['flops_executed'] == 2 * 2 * prompt + steps * step + round(steps * 3 / 4 * window)
  assert found['collective_bytes'] == 0 < found['host_bytes'] - rollouts.token_RC.nbytes < 2000
  assert all(isinstance(n, int) for n in found.values())


def test_rollouts_count_themselves_where_a_clock_runs(params, clock):
  rollouts = run(params, [4, 1, 8], total=MOST)
  assert counted(clock)['tokens_generated'] == np.asarray(rollouts.length_R).sum()


def test_without_a_clock_what_programs_take_is_not_known(params):
  waves = sample.Waves(POLICY, decode.sampling_params(POLICY, params), PROMPTS, KEY, CONFIG, totals=(MOST,))
  assert set(waves.counters(waves.sample(np.array([4, 1, 8])))) == {
      'tokens_prompt', 'tokens_generated', 'rollouts', 'flops_useful', 'hbm_bytes_read'}


# Waves.


TOTALS = (8, 5, 5)


def in_waves(params, budget_WM, config=CONFIG, totals=TOTALS, policy_config=POLICY, expected_M=None, key=KEY):
  """The rollouts of each wave, and of the step."""
  waves = sample.Waves(policy_config, decode.sampling_params(policy_config, params), PROMPTS, key, config,
                       totals=totals)
  rollouts = [waves.sample(np.array(budget_M), expected_M) for budget_M in budget_WM]
  return rollouts, completions.join(rollouts, waves.rows)


def assert_same_rollouts(got, want):
  for name in ('task_R', 'token_RC', 'length_R', 'ended_R'):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
  np.testing.assert_allclose(got.logp_RC, want.logp_RC, rtol=1e-5, atol=1e-5)


WAVES = [[[3, 0, 1], [2, 0, 3]], [[1, 2, 2], [0, 2, 0], [2, 0, 0]], [[1, 1, 1], [0, 0, 0], [4, 0, 0]]]


@pytest.mark.parametrize('budget_WM', [
    pytest.param(budget_WM, marks=pytest.mark.slow) for budget_WM in WAVES], ids=str)
def test_waves_have_the_rollouts_of_one_wave(params, budget_WM):
  """Three rollouts and two more are the five of one wave, whose tokens the naive sampler has."""
  budget_M = np.sum(budget_WM, axis=0)
  rollouts, got = in_waves(params, budget_WM, totals=TOTALS[:len(budget_WM)])
  want = run(params, budget_M, total=len(got.task_R))
  assert_same_rollouts(got, want)
  assert [x.wave_R for x in (*rollouts, want)] == [None] * (len(rollouts) + 1)
  of_waves = [w for m in range(3) for w, x in enumerate(budget_WM) for _ in range(x[m])]
  assert got.wave_R.tolist()[:budget_M.sum()] == of_waves and got.wave_R.dtype == np.int32
  for name in ('decode_steps', 'tail_steps', 'refills'):
    assert int(getattr(got, name)) == sum(int(getattr(x, name)) for x in rollouts)


@pytest.mark.slow
def test_waves_use_what_one_wave_uses(params, clock):
  """Of two tasks of 2 and 3 tokens, which the first wave reads."""
  waves = sample.Waves(POLICY, decode.sampling_params(POLICY, params), PROMPTS, KEY, CONFIG, totals=TOTALS[:2])
  found = [waves.counters(waves.sample(np.array(budget_M))) for budget_M in WAVES[0]]
  clock.drain()
  run(params, np.sum(WAVES[0], axis=0), total=13)
  one = counted(clock)
  assert [x['tokens_prompt'] for x in found] == [5, 0] and one['tokens_prompt'] == 5
  for name in ('flops_useful', 'tokens_generated', 'rollouts'):
    assert sum(x[name] for x in found) == one[name] > 0
  assert all(x['flops_executed'] > 0 == x['collective_bytes'] for x in found)


@pytest.mark.parametrize('num_waves', [2, pytest.param(3, marks=pytest.mark.slow)])
def test_budgets_of_waves_do_not_compile_again(params, num_waves):
  """Over 50 steps, of which some spend less than the totals, or nothing in a wave: a program of the first wave and
  one of all later ones."""
  programs = sample._decode, sample._decode_on, sample._place, sample._by_task, completions._join
  rng, totals = np.random.default_rng(0), TOTALS[:num_waves]
  counts = []
  for step in range(50):
    first_M = rng.multinomial(rng.integers(1, 9), rng.dirichlet(np.ones(3)))
    more_WM = [rng.multinomial(rng.integers(0, 6), rng.dirichlet(np.ones(3))) * (first_M > 0) for _ in totals[1:]]
    _, got = in_waves(params, [first_M, *more_WM], totals=totals, key=jax.random.fold_in(KEY, step),
                      expected_M=rng.uniform(1, 9, 3))
    assert len(got.task_R) == sum(totals)
    assert np.bincount(got.task_R, minlength=4)[:3].tolist() == np.sum([first_M, *more_WM], axis=0).tolist()
    counts.append([program._cache_size() for program in programs])
  assert counts[0] == counts[-1]


@pytest.mark.slow
def test_prompts_are_read_in_the_first_wave_alone(params, lengths_read):
  jax.block_until_ready(in_waves(params, [[1, 1, 1], [2, 0, 1], [1, 2, 0]], CONFIG.replace(min_p=1e-29)))
  jax.effects_barrier()
  assert sorted(lengths_read) == [[2, 5], [3, 1]]


MESH_WAVES = [[7, 1, 3], [0, 5, 1], [3, 0, 3]], (12, 6, 6)  # 24 rows of a step, in waves of 12, 8 and 8


@pytest.mark.slow
@pytest.mark.parametrize('axes, cache', [
    (MESH, 'int8'), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (
        (MESH, ''), ({'data': 8}, 'int8'), ({'data': 2}, ''), ({'data': 8}, ''), ({'model': 4}, ''),
        ({'fsdp': 4, 'model': 2}, '')))], ids=str)
def test_waves_do_not_depend_on_the_mesh(axes, cache):
  """Prefixes are sent where rollouts need them."""
  params, config = jax.tree.map(lambda x: 3 * x, policy.init(WIDE, jax.random.key(0))), CONFIG.replace(cache=cache)
  budget_WM, totals = MESH_WAVES
  want = run(params, np.sum(budget_WM, axis=0), config, policy_config=WIDE, total=sum(totals))
  devices = int(np.prod(list(axes.values())))
  mesh = sharding.mesh(jax.devices()[:devices], **axes)
  with jax.set_mesh(mesh):
    shards = sharding.row_shards()
    params = jax.device_put(params, sharding.of(mesh, params))
    rollouts, got = in_waves(params, budget_WM, config, totals=totals, policy_config=WIDE)
    one = run(params, np.sum(budget_WM, axis=0), config, policy_config=WIDE, total=sum(totals))
  assert [len(x.task_R) for x in rollouts] == [-(-total // shards) * shards for total in totals]
  assert_same_rollouts(got, one)
  n = np.sum(budget_WM)
  assert_same_rollouts(jax.tree.map(lambda x: np.asarray(x)[:n] if np.ndim(x) else x, got._replace(prompts=0)),
                       jax.tree.map(lambda x: np.asarray(x)[:n] if np.ndim(x) else x, want._replace(prompts=0)))
  assert got.token_RC.sharding.is_equivalent_to(one.token_RC.sharding, 2)
  assert got.wave_R.is_fully_replicated


@pytest.mark.slow
def test_waves_are_joined_on_the_mesh_to_learn_on():
  """Of four samplers, for eight shards of rows: the eight rows of a later wave are divided, the twelve of the first
  and all 28 are not. (The programs that sample are those of the test above.)"""
  params, config = jax.tree.map(lambda x: 3 * x, policy.init(WIDE, jax.random.key(0))), CONFIG.replace(cache='int8')
  budget_WM, totals = MESH_WAVES
  want = run(params, np.sum(budget_WM, axis=0), config, policy_config=WIDE, total=sum(totals))
  learn, samples = sharding.mesh(data=8), sharding.mesh(**MESH)
  with jax.set_mesh(samples):
    waves = sample.Waves(WIDE, decode.sampling_params(WIDE, jax.device_put(params, sharding.of(samples, params))),
                         PROMPTS, KEY, config, totals=totals)
    rollouts = [waves.sample(np.array(budget_M)) for budget_M in budget_WM]
  with jax.set_mesh(learn):
    moved = [sharding.move(x) for x in rollouts]
    assert [x.token_RC.is_fully_replicated for x in moved] == [True, False, False]
    got, all_rows = completions.join(moved, waves.rows), completions.join(moved)
  assert len(all_rows.task_R) == 28 and len(got.task_R) == waves.rows == 24
  n = np.sum(budget_WM)
  np.testing.assert_array_equal(all_rows.token_RC[:n], want.token_RC[:n])
  np.testing.assert_array_equal(got.token_RC[:n], want.token_RC[:n])


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{}, {'data': 2, 'model': 2}], ids=str)
def test_prefixes_are_placed_as_a_loop_places_them(axes):
  mesh = sharding.mesh(jax.devices()[:4], **axes) if axes else None
  rng = np.random.default_rng(0)
  shards = axes.get('data', 1)
  x_ZKV = rng.normal(size=(shards * 3, 8)).astype(np.float32)
  k, scale = rng.integers(-99, 99, (2, shards * 3, 2, 5, 4)).astype(np.int8), rng.random((2, shards * 3, 2, 5))
  prefixes = sample._Prefixes(x_ZKV, (decode.Cache(k, -k, scale, 2 * scale),))
  source_ZK = rng.integers(0, shards * 3, (shards, 3)).astype(np.int32)
  with sharding.on(mesh):
    got = sample._place(prefixes, source_ZK)
  np.testing.assert_array_equal(got.logits_KV, [x_ZKV[i] for i in source_ZK.ravel()])
  for x, y in zip(jax.tree.leaves(got.cache), jax.tree.leaves(prefixes.cache)):
    for layer, of_layer in zip(np.asarray(x), y):
      np.testing.assert_array_equal(layer, [np.float32(of_layer[i]) for i in source_ZK.ravel()])
  if axes:
    assert got.cache[0].k_LSKTH.sharding.shard_shape(k.shape) == (2, 3, 1, 5, 4)


def test_a_later_wave_reads_no_prompt(params):
  with pytest.raises(ValueError, match=r'tasks \[1\] have budgets \[2\] in wave 1 and none in wave 0'):
    in_waves(params, [[2, 0, 2], [1, 2, 1]])


def test_waves_have_totals(params):
  with pytest.raises(ValueError, match='must be >= 0 and sum to at most 5'):
    in_waves(params, [[2, 1, 1], [2, 2, 2]])
  with pytest.raises(ValueError, match=r'all waves .* totals=\(8, 5, 5\) names 3'):
    in_waves(params, [[2, 1, 1], [2, 2, 0], [0, 0, 0], [1, 0, 0]])


# Truncated distributions.


def test_only_what_is_left_is_sampled_and_logp_is_the_policys(params):
  config = CONFIG.replace(top_k=2, temperature=1.3)
  rollouts = run(params, [8, 8, 8], config)
  for r in range(24):
    m, n = int(rollouts.task_R[r]), int(rollouts.length_R[r])
    prompt = PROMPTS.token_MP[m, :PROMPTS.length_M[m]].tolist()
    row = np.zeros((1, 11), np.int32)
    row[0, :len(prompt) + n] = prompt + np.asarray(rollouts.token_RC[r, :n]).tolist()
    logits_TV = np.asarray(score(POLICY, params, row)[0], float)[len(prompt) - 1:len(prompt) - 1 + n] / 1.3
    token_T = row[0, len(prompt):len(prompt) + n]
    assert np.all(np.sum(logits_TV > logits_TV[np.arange(n), token_T][:, None], axis=1) < 2)
    logp_T = logits_TV[np.arange(n), token_T] - np.log(np.exp(logits_TV).sum(axis=1))
    np.testing.assert_allclose(rollouts.logp_RC[r, :n], logp_T, atol=1e-4)


# Slots.


# Lengths of log-sd 1, and estimates of them with an error of log-sd 0.7: then KNOWN is what an estimate
# leaves unknown of the logarithm, and the best guess given the estimate has the rest of the spread.
MEDIAN, ERROR = 32, 0.7
KNOWN = ERROR / (1 + ERROR ** 2) ** 0.5


def planted(mean_M):
  """logits_MV of how long a completion of a task will be: log-normal, capped at 8 medians.

  Around what is known of the task the lengths have a log-sd of KNOWN.
  """
  V = 8 * MEDIAN + 1
  up_to_MV = scipy.stats.norm.cdf(np.log(np.maximum(np.arange(V), 1e-9) / mean_M[:, None]) / KNOWN)
  up_to_MV[:, :2], up_to_MV[:, -1] = 0, 1  # two tokens at least: the one that says so, and STOP
  with np.errstate(divide='ignore'):
    return jnp.array(np.log(np.diff(up_to_MV, prepend=0, axis=1)), jnp.float32)


@pytest.fixture
def plays_lengths(monkeypatch):
  """A policy whose parameters are `planted`: a prompt is one token, its task; the first token says how
  long the completion will be, and is repeated until STOP."""
  def prefill(config, logits_MV, token_BP, length_B, **_):
    empty = jnp.zeros((len(length_B), 1, token_BP.shape[1], 1))
    return logits_MV[token_BP[:, 0]], (decode.Cache(empty, empty),)

  def lookup(config, logits_MV, token_S, slots, prefix, own):
    V = logits_MV.shape[1]
    said_S = jnp.where(slots.count_S + 1 >= token_S, STOP, token_S)  # the next is token number count + 1
    return jnp.where(jnp.arange(V)[None] == said_S[:, None], 0.0, -jnp.inf), own

  monkeypatch.setattr(decode, 'prefill', prefill)
  monkeypatch.setattr(decode, 'decode', lookup)


@pytest.mark.parametrize('ordered, least, draws', [
    pytest.param(True, 0.93, 2, marks=pytest.mark.slow), pytest.param(False, 0.80, 5, marks=pytest.mark.exhaustive),
    pytest.param(True, 0.93, 5, marks=pytest.mark.exhaustive)])
def test_slots_are_in_use(plays_lengths, ordered, least, draws):
  """64 slots, 1024 rollouts of 128 tasks, refills included; a static batch would use a fifth. On the
  mean of draws: one with a long completion at the end of the queue has a tail in any order."""
  S, R, M = 64, 1024, 128
  used, tails, static = [], [], []
  for seed in range(draws):
    mean_M = MEDIAN * np.exp((1 - KNOWN ** 2) ** 0.5 * np.random.default_rng(seed).normal(size=M))
    prompts = types.Prompts(np.arange(M, dtype=np.int32)[:, None], np.ones(M, np.int32),
                            np.arange(M, dtype=np.int32))
    config = knobs.sampler(slots=S, refill=1, prefill=M, prompt_length=1, completion_length=8 * MEDIAN)
    rollouts = sample.rollouts(
        POLICY, planted(mean_M), prompts, np.full(M, R // M), jax.random.key(seed), config, total=R,
        expected_M=mean_M if ordered else None)
    length_R = np.asarray(rollouts.length_R)
    assert 0.8 < np.log(length_R).std() < 1.1 and 25 < np.median(length_R) < 40
    used.append(length_R.sum() / (S * int(rollouts.decode_steps)))
    tails.append(int(rollouts.tail_steps) / int(rollouts.decode_steps))
    static.append(length_R.mean() / length_R.max())
  print(f'ordered {ordered}: used {np.round(used, 3)}, tail {np.round(tails, 3)}, '
        f'a static batch {np.round(static, 3)}')
  assert np.mean(used) >= least


@pytest.mark.parametrize('budget_M', [[1, 2, 4], [7, -1, 0]])
def test_bad_budgets(params, budget_M):
  with pytest.raises(ValueError, match='must be >= 0 and sum to at most 6'):
    run(params, budget_M, total=6)


def test_a_sampler_needs_a_stop_token():
  with pytest.raises(ValueError, match='sample.stop_ids is empty'):
    CONFIG.replace(stop_ids=())
