"""The jitted, packed, microbatched updates against a loop over rollouts.

The loop computes the loss of each token and its derivatives by the token's logp and entropy, by hand and in
float64. JAX takes these derivatives on to the parameters, through the plain logits of rows of one rollout.
"""

import collections
import dataclasses
import functools
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import presets
from kr_jax import knobs as knobs_lib
from kr_jax import sharding
from kr_jax import types
from kr_jax.costs import arithmetic
from kr_jax.learning import grpo
from kr_jax.learning import guard
from kr_jax.learning import measurements
from kr_jax.learning import pack
from kr_jax.learning import update
from kr_jax.model import policy
from kr_jax.model.tokenizer import STOP
from tests import knobs
from tests.learning import grpo_test

POLICY = policy.Config(
    vocab_size=7, num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=24,
    rope_theta=100.0, norm_eps=1e-6, qk_norm=True, qkv_bias=False, tie_embeddings=True,
    dtype='float32', remat='none', lora_rank=0, lora_alpha=1.0)
CONFIG = knobs.updates(learning_rate=1e-2, max_grad_norm=1e9, row_length=24, microbatch_rows=2,
                       prompt_sharing=0.6, temperature=0.8)
P, C = 4, 5
# By group: mixed, empty, one rollout, all right, all wrong, mixed.
BUDGET_M = [4, 0, 1, 3, 2, 5]
REWARD_R = np.array([1, 0, 0, 1] + [1] + [1, 1, 1] + [0, 0] + [0, 0, 1, 0, 0], np.float32)
MIXED_R = np.repeat(np.array([True, False, False, False, False, True]), BUDGET_M)
# By rollout, with each group in three waves or fewer; and what is known of each task, of one nothing.
WAVE_R = np.array([0, 0, 1, 2] + [0] + [0, 1, 1] + [0, 0] + [0, 0, 1, 1, 1], np.int32)
PAST = grpo.Past(np.float32([0.3, 0.5, 0.9, 1, 0, 0.2]), np.float32([4, 0, 2, 9, 0, 3]))
# An optimiser that adds gradients up and moves nothing.
ADD_UP = optax.chain(optax.trace(decay=1.0), optax.scale(0.0))


def make_rollouts(seed=0, budget_M=BUDGET_M):
  """Ragged rollouts, among them a completion of one token (STOP) and one without a STOP."""
  rng = np.random.default_rng(seed)
  M, R = len(budget_M), sum(budget_M)
  length_M = rng.integers(1, P + 1, M).astype(np.int32)
  length_R = rng.integers(1, C + 1, R).astype(np.int32)
  length_R[0], length_R[1], length_R[10], length_R[11] = 1, C, 1, C
  token_RC = rng.integers(2, 7, (R, C)).astype(np.int32)
  token_RC[np.arange(R), length_R - 1] = STOP
  token_RC[1, C - 1] = token_RC[11, C - 1] = 3
  token_RC[np.arange(C)[None] >= length_R[:, None]] = 0
  token_MP = rng.integers(2, 7, (M, P)).astype(np.int32)
  token_MP[np.arange(P)[None] >= length_M[:, None]] = 0
  return types.Rollouts(
      prompts=types.Prompts(token_MP, length_M, np.arange(M, dtype=np.int32)),
      task_R=np.repeat(np.arange(M), budget_M).astype(np.int32), token_RC=token_RC,
      # Off-policy by up to half a nat, so that some ratios are clipped on either side.
      logp_RC=rng.uniform(-2.5, -1.5, (R, C)).astype(np.float32), length_R=length_R,
      ended_R=np.where(token_RC[np.arange(R), length_R - 1] == STOP, 1, 2),
      decode_steps=np.array(9))


def by_rollout(rollouts, packed, x_BT):
  """x_RC of x_BT of the targets of all microbatches; 0 where there is none."""
  tokens = update.gather(rollouts, packed)
  x_RC = np.zeros(np.shape(rollouts.token_RC), np.float32)
  c_BT = tokens.position_BT - rollouts.prompts.length_M[
      np.minimum(rollouts.task_R[tokens.rollout_BT], len(rollouts.prompts.length_M) - 1)] + 1
  mask_BT = np.asarray(tokens.mask_BT)
  x_RC[np.asarray(tokens.rollout_BT)[mask_BT], np.asarray(c_BT)[mask_BT]] = np.asarray(x_BT)[mask_BT]
  return x_RC


def params_of(seed=0, policy_config=POLICY):
  """On the host, as updates donate their state."""
  return jax.tree.map(lambda x: 2 * np.array(x), policy.init(policy_config, jax.random.key(seed)))


def state_of(config=CONFIG):
  return update.init(params_of(), jax.random.key(1), config)


def rows(rollouts):
  """Each rollout's prompt and completion in a row of its own."""
  row_RT = np.zeros((len(rollouts.task_R), P + C), np.int32)
  for r, m in enumerate(np.minimum(rollouts.task_R, len(rollouts.prompts.length_M) - 1)):
    n = rollouts.prompts.length_M[m]
    row_RT[r, :n] = rollouts.prompts.token_MP[m, :n]
    row_RT[r, n:n + C] = rollouts.token_RC[r, :P + C - n]
  return row_RT


@functools.partial(jax.jit, static_argnums=(0, 4))
def scored(policy_config, params, rollouts, row_RT, temperature):
  """logp_RC and entropy_RC of every completion, each alone in its row."""
  logits_RTV = policy.logits(policy_config, params, row_RT) / temperature
  at_RC = (rollouts.prompts.length_M[rollouts.task_R] - 1)[:, None] + jnp.arange(C)[None]
  logp_RCV = jnp.take_along_axis(jax.nn.log_softmax(logits_RTV), at_RC[..., None], axis=1)
  entropy_RC = -jnp.sum(jnp.exp(logp_RCV) * logp_RCV, axis=2)
  return jnp.take_along_axis(logp_RCV, rollouts.token_RC[..., None], axis=2)[..., 0], entropy_RC


@functools.partial(jax.jit, static_argnums=(0, 4))
def pulled_back(policy_config, params, rollouts, row_RT, temperature, by_logp_RC, by_entropy_RC):
  """The gradient by the parameters, from those by logp_RC and entropy_RC."""
  _, pull = jax.vjp(lambda p: scored(policy_config, p, rollouts, row_RT, temperature), params)
  return pull((by_logp_RC, by_entropy_RC))[0]


class Loops(NamedTuple):
  """The parts of a loss, token by token; 0 beyond a completion's end."""

  loss_RC: np.ndarray
  by_logp_RC: np.ndarray  # the derivative of the whole loss
  by_entropy_RC: np.ndarray
  low_RC: np.ndarray
  high_RC: np.ndarray
  log_ratio_RC: np.ndarray
  kl_RC: np.ndarray
  tis_RC: np.ndarray


def by_loops(logp_RC, entropy_RC, old_RC, ref_RC, rollouts, reward_R, c: knobs_lib.Grpo, advantage_R=None) -> Loops:
  logp_RC, entropy_RC, old_RC, ref_RC, sampler_RC = (
      np.asarray(x, float) for x in (logp_RC, entropy_RC, old_RC, ref_RC, rollouts.logp_RC))
  M = len(rollouts.prompts.length_M)
  wave_R, share_W = rollouts.wave_R, (1.0,)
  if wave_R is not None:
    share_W = np.bincount(wave_R, minlength=3) / len(wave_R)
  if advantage_R is None:
    advantage_R = grpo_test.advantage_by_loops(
        reward_R, rollouts.task_R, M, c.advantage, wave_R=wave_R, past=PAST)
  weight_R = grpo_test.weights_by_loops(
      rollouts.task_R, rollouts.length_R, M, c.weight, c.aggregate, C, wave_R=wave_R, share_W=share_W,
      least=1 if c.advantage == 'posterior' else 2)
  x = Loops(*np.zeros((len(Loops._fields), *logp_RC.shape)))
  for r, n in enumerate(rollouts.length_R):
    log_ratio_C = [logp_RC[r, i] - old_RC[r, i] for i in range(n)]
    if c.loss == 'gspo':
      log_ratio_C = [sum(log_ratio_C) / max(n, 1)] * n
    for i in range(n):
      logp, w = logp_RC[r, i], weight_R[r]
      loss, by_ratio, by_logp, x.low_RC[r, i], x.high_RC[r, i] = grpo_test.loss_by_hand(
          np.exp(log_ratio_C[i]), logp, advantage_R[r], c)
      x.log_ratio_RC[r, i] = log_ratio_C[i]
      x.tis_RC[r, i] = min(np.exp(old_RC[r, i] - sampler_RC[r, i]), c.tis_cap) if c.tis_cap else 1
      x.loss_RC[r, i] += w * x.tis_RC[r, i] * loss
      x.by_logp_RC[r, i] += w * x.tis_RC[r, i] * by_logp
      # The ratio of a rollout is moved by each of its tokens.
      moved = range(n) if c.loss == 'gspo' else [i]
      for j in moved:
        x.by_logp_RC[r, j] += w * x.tis_RC[r, i] * by_ratio / len(moved)
      if c.kl_coef:
        d = ref_RC[r, i] - logp
        x.kl_RC[r, i] = -d if c.kl == 'k1' else np.exp(d) - 1 - d
        x.loss_RC[r, i] += w * c.kl_coef * x.kl_RC[r, i]
        x.by_logp_RC[r, i] += w * c.kl_coef * (-d if c.kl == 'k1' else 1 - np.exp(d))
      x.loss_RC[r, i] -= w * c.entropy_coef * entropy_RC[r, i]
      x.by_entropy_RC[r, i] -= w * c.entropy_coef
  return x


def fidelity_by_hand(logp_X, sampler_logp_X):
  """By the definition of the divergence, and by the likeliest token where it is known."""
  r_X, likely_X, sampler_likely_X = np.exp(logp_X - sampler_logp_X), logp_X > np.log(0.5), sampler_logp_X > np.log(0.5)
  js = np.mean(np.log2(2 / (1 + r_X)) + r_X * np.log2(2 * r_X / (1 + r_X))) / 2
  known = np.sum(likely_X | sampler_likely_X)
  return {'policy_fidelity': 1 - np.sqrt(js),
          'argmax_agreement': np.sum(likely_X & sampler_likely_X) / known if known else None}


def reference(params, rollouts, reward_R, config, *, ref_params=None, old_RC=None, kept_R=MIXED_R,
              times=1, policy_config=POLICY, advantage_R=None):
  """The gradient of the kept rollouts times `times`, what measurements.summarize says of them, and the log ratios.

  old_RC: None as in a single update: the sampler's log-probabilities, or the policy's own.
  advantage_R: None: by the loop over groups.
  """
  of = lambda params: scored(policy_config, params, rollouts, rows(rollouts), config.temperature)
  logp_RC, entropy_RC = of(params)
  if old_RC is None:
    old_RC = logp_RC if update.has_own_ratios(config.grpo) else rollouts.logp_RC
  ref_RC = of(ref_params)[0] if ref_params else logp_RC
  x = by_loops(logp_RC, entropy_RC, old_RC, ref_RC, rollouts, reward_R, config.grpo, advantage_R)
  if config.grpo.kl_coef or config.grpo.entropy_coef:
    kept_R = kept_R | np.ones(len(reward_R), bool)
  cotangents = (np.float32(times * kept_R[:, None] * y) for y in (x.by_logp_RC, x.by_entropy_RC))
  gradient = pulled_back(policy_config, params, rollouts, rows(rollouts), config.temperature,
                         *cotangents)
  token_RC = kept_R[:, None] & (np.arange(C)[None] < rollouts.length_R[:, None])
  mean = lambda y_RC: np.asarray(y_RC, float)[token_RC].mean()
  record = {'loss': times * x.loss_RC[kept_R].sum(), 'grad_norm': float(optax.tree.norm(gradient)),
            'tokens_updated': token_RC.sum(), 'policy_entropy': mean(entropy_RC),
            'logp_error': mean(np.abs(logp_RC - rollouts.logp_RC)),
            **fidelity_by_hand(np.asarray(logp_RC, float)[token_RC], rollouts.logp_RC[token_RC].astype(float)),
            'clip_fraction_low': mean(x.low_RC), 'clip_fraction_high': mean(x.high_RC),
            'clip_fraction_first': mean(x.low_RC + x.high_RC)}
  if config.grpo.kl_coef:
    record['kl'] = mean(x.kl_RC)
  if config.grpo.tis_cap:
    record['tis_weight'] = mean(x.tis_RC)
  return gradient, record, x.log_ratio_RC[token_RC]


def gradient_of(config, rollouts, reward_R, *, trained=None, base={}, policy_config=POLICY, mesh=None, key=None):
  """The sum of the gradients of a batch's updates when they move nothing, their record, and the state."""
  with mock.patch.object(update, 'optimizer', lambda _: ADD_UP):
    config = config.replace(weight_decay=0.125)  # a mark: no other test runs the programs compiled here
    state = update.init(params_of() if trained is None else trained, jax.random.key(1), config)
    if mesh is not None:
      state, base = (jax.device_put(x, sharding.of(mesh, x)) for x in (state, base))
    state, measured = update.step(state, rollouts, reward_R, base, policy_config, config, past=PAST, key=key)
  return state.opt_state[0].trace, measurements.summarize(measured), state


def padded(rollouts, reward_R, more=3):
  """The same step with `more` rows beyond its rollouts."""
  pad = lambda x, value=0: np.concatenate([x, np.full((more, *x.shape[1:]), value, x.dtype)])
  return rollouts._replace(
      task_R=pad(rollouts.task_R, len(BUDGET_M)), token_RC=pad(rollouts.token_RC),
      logp_RC=pad(rollouts.logp_RC), length_R=pad(rollouts.length_R), ended_R=pad(rollouts.ended_R),
      wave_R=None if rollouts.wave_R is None else pad(rollouts.wave_R, 2)), pad(reward_R)


def assert_close(tree, other, tolerance=1e-5):
  scale = max(float(np.max(np.abs(x))) for x in jax.tree.leaves(other))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * scale), tree, other)


def assert_figures(record, want, rel, atol):
  for name, x in want.items():
    assert record[name] == (None if x is None else pytest.approx(x, rel=rel, abs=atol)), name


def assert_record(record, want, log_ratio):
  assert_figures(record, want, 1e-5, 1e-7)
  for name, q in (('ratio_p01', 0.01), ('ratio_p50', 0.5), ('ratio_p99', 0.99)):
    exact = np.quantile(log_ratio, q, method='inverted_cdf')
    assert np.log(record[name]) == pytest.approx(exact, rel=0.1, abs=1e-4), name


def varied(config, **knobs):
  """A config with knobs of its loss, or its own, changed."""
  of_loss = {f.name: knobs.pop(f.name) for f in dataclasses.fields(knobs_lib.Grpo) if f.name in knobs}
  return config.replace(grpo=config.grpo.replace(**of_loss), **knobs)


def base_of(config, policy_config=POLICY):
  """Another policy, where the loss reads one."""
  return params_of(5, policy_config) if config.grpo.kl_coef else {}


# One update.

slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
KL = {'kl_coef': 0.5}
# With the updates over mini-batches below, they use each part of the loss.
VARIANTS = {
    'dual clip': {'dual_clip': 1.4},
    'gspo and all': {'loss': 'gspo', 'clip_low': 0.05, 'clip_high': 0.08, 'advantage': 'loo',
                     'weight': 'sqrt', 'aggregate': 'rollout', 'kl': 'k1', 'kl_coef': 0.3,
                     'entropy_coef': 0.2},
    'cispo and all': {'loss': 'cispo', 'advantage': 'mean', 'weight': 'task', 'aggregate': 'constant'},
}
ONE_BY_ONE = {
    **{f'{w} {a}': {'weight': w, 'aggregate': a} for w, a in grpo_test.WEIGHINGS if (w, a) != ('rollout', 'token')},
    'grpo': {}, 'loo': {'advantage': 'loo'}, 'mean': {'advantage': 'mean'},
    'gspo': {'loss': 'gspo', 'clip_low': 0.05, 'clip_high': 0.08}, 'cispo': {'loss': 'cispo'},
    'k1': {'kl': 'k1', **KL}, 'k3': {'kl': 'k3', **KL}, 'entropy': {'entropy_coef': 0.5},
    'kl and entropy': {'entropy_coef': 0.5, **KL}, 'tis': {'tis_cap': 1.2},
    'tis and old': {'tis_cap': 1.2, 'epochs': 2}, 'tis and k3': {'tis_cap': 1.2, 'epochs': 2, 'kl': 'k3', **KL},
    'tis and gspo': {'tis_cap': 1.2, 'loss': 'gspo'}, 'tis and cispo': {'tis_cap': 1.2, 'loss': 'cispo', **KL},
}


@pytest.mark.parametrize('changed, beyond', [
    *(pytest.param(x, 3 if 'all' in name else 0, id=name, marks=() if name == 'dual clip' else slow)
      for name, x in VARIANTS.items()),
    *(pytest.param(x, 0, id=name, marks=exhaustive) for name, x in ONE_BY_ONE.items())])
def test_loss_and_gradient_equal_a_loop_over_rollouts(changed, beyond):
  """And rows beyond the rollouts change nothing."""
  config = varied(CONFIG, **changed)
  rollouts, base = make_rollouts(), base_of(config)
  want, record, log_ratio = reference(params_of(), rollouts, REWARD_R, config, ref_params=base)
  got, recorded, _ = gradient_of(config, *padded(rollouts, REWARD_R, beyond), base=base)
  # Nothing moves between epochs: their gradients are the same.
  assert_close(got, jax.tree.map(lambda g: config.epochs * np.asarray(g), want))
  record['tokens_updated'] *= config.epochs
  assert_record(recorded, record, log_ratio)
  assert set(recorded) == {*record, 'padding_waste', 'attention_waste', 'ratio_p01', 'ratio_p50',
                           'ratio_p99', 'skipped'}
  if not config.grpo.tis_cap:
    assert 0 < recorded['clip_fraction_low'] < 1 and 0 < recorded['clip_fraction_high'] < 1
  else:
    assert recorded['ratio_p01'] == pytest.approx(1, abs=2e-4)  # the ratio of the policy to itself
    assert 0.6 < recorded['tis_weight'] < 1.2


def test_a_dual_clip_applies_to_high_ratios_of_wrong_rollouts():
  """The variant above would be void if no ratio reached the limit."""
  rollouts = make_rollouts()
  _, plain, log_ratio = reference(params_of(), rollouts, REWARD_R, CONFIG)
  _, limited, _ = reference(params_of(), rollouts, REWARD_R, varied(CONFIG, dual_clip=1.4))
  assert limited['clip_fraction_high'] > plain['clip_fraction_high']
  assert log_ratio.min() < np.log(0.8) and log_ratio.max() > np.log(1.4)


WASTES = ('padding_waste', 'attention_waste')
DUAL = varied(CONFIG, **VARIANTS['dual clip'])
RICH = varied(CONFIG, loss='gspo', clip_low=0.05, clip_high=0.08, aggregate='rollout', tis_cap=1.5,
              kl_coef=0.3, entropy_coef=0.2, minibatches=2)


def name(x) -> str:
  """Of a parameter of a test."""
  return {str(CONFIG): 'grpo', str(DUAL): 'dual', str(RICH): 'rich'}.get(str(x), str(x))


@pytest.mark.parametrize('config, row_length, microbatch_rows, prompt_sharing', [
    pytest.param(DUAL, 40, 3, 0.3, marks=slow), pytest.param(RICH, 40, 3, 0.3, marks=exhaustive),
    *(pytest.param(RICH, *shape, marks=exhaustive)
      for shape in ((8, 1, 1), (24, 7, 1), (24, 2, 1), (135, 1, 1), (8, 7, 0.5), (135, 1, 0.9))),
    *(pytest.param(CONFIG, *shape, marks=exhaustive) for shape in ((24, 7, 1), (40, 3, 0.3)))], ids=name)
def test_the_gradient_does_not_depend_on_packing(config, row_length, microbatch_rows, prompt_sharing):
  """8 is the longest: one rollout a row. 135 holds all in one."""
  rollouts = make_rollouts()
  base = base_of(config)
  want, record, _ = gradient_of(config, rollouts, REWARD_R, base=base)
  config = config.replace(row_length=row_length, microbatch_rows=microbatch_rows, prompt_sharing=prompt_sharing)
  got, recorded, _ = gradient_of(config, rollouts, REWARD_R, base=base)
  assert_close(got, want)
  for name in ('loss', 'tokens_updated', 'policy_entropy', 'clip_fraction_high', 'clip_fraction_low'):
    assert recorded[name] == pytest.approx(record[name], rel=1e-5), name
  assert any(recorded[name] != record[name] for name in WASTES)


def test_rollouts_without_an_advantage_change_nothing_whether_dropped_or_kept():
  rollouts = make_rollouts()
  want, record, _ = gradient_of(DUAL, rollouts, REWARD_R)
  pack_rollouts = update.pack_rollouts
  with mock.patch.object(update, 'pack_rollouts', lambda rollouts, keep_R, config: pack_rollouts(
      rollouts, np.ones(len(keep_R), bool), config)):
    got, recorded, _ = gradient_of(DUAL, rollouts, REWARD_R)
  assert_close(got, want)
  assert recorded['tokens_updated'] == rollouts.length_R.sum() > record['tokens_updated']


@exhaustive
@pytest.mark.parametrize('remat', [name for name in policy.REMAT if name != 'none'])
def test_recomputation_changes_no_gradient(remat):
  rollouts = make_rollouts()
  want, record, _ = gradient_of(CONFIG, rollouts, REWARD_R)
  got, recorded, _ = gradient_of(CONFIG, rollouts, REWARD_R,
                                 policy_config=dataclasses.replace(POLICY, remat=remat))
  assert_close(got, want, 1e-6)
  assert recorded['loss'] == pytest.approx(record['loss'], rel=1e-6)


# Waves, what is known before the step, and rollouts that are dropped.


@pytest.mark.parametrize('changed, waves', [
    pytest.param({'advantage': 'posterior', 'weight': 'task', 'aggregate': 'constant'}, True, marks=slow),
    pytest.param({'advantage': 'posterior'}, False, marks=exhaustive),
    pytest.param({'advantage': 'maxrl', 'aggregate': 'rollout', 'weight': 'sqrt'}, True, marks=exhaustive),
    pytest.param({'advantage': 'loo', 'weight': 'task', 'aggregate': 'rollout'}, True, marks=exhaustive)], ids=str)
def test_waves_and_the_past_equal_a_loop_over_rollouts(changed, waves):
  """What has an advantage learns, groups of one and of equal rewards too; nothing else is computed."""
  config = varied(CONFIG, **changed)
  rollouts = make_rollouts()._replace(wave_R=WAVE_R if waves else None)
  advantage_R = grpo_test.advantage_by_loops(
      REWARD_R, rollouts.task_R, len(BUDGET_M), config.grpo.advantage, wave_R=rollouts.wave_R, past=PAST)
  kept_R = advantage_R != 0
  assert kept_R[~MIXED_R].any() == (config.grpo.advantage == 'posterior')
  want, record, log_ratio = reference(params_of(), rollouts, REWARD_R, config, kept_R=kept_R)
  got, recorded, _ = gradient_of(config, rollouts, REWARD_R)
  assert_close(got, want)
  assert_record(recorded, record, log_ratio)


def experience_of(config, key=None, rollouts=None):
  return update._experience(rollouts or make_rollouts(), REWARD_R, config, PAST, key)


@slow
def test_dropped_rollouts_are_not_computed_and_the_others_weigh_more():
  """With a key of which some drop and some stay; without `keep` the key changes nothing, bit for bit."""
  config, key, rollouts = varied(CONFIG, advantage='posterior', keep=0.5), jax.random.key(3), make_rollouts()
  advantage_R = np.asarray(experience_of(config, key).advantage_R)
  before_R = np.asarray(experience_of(varied(config, keep=1.0)).advantage_R)
  kept_R = advantage_R != 0
  assert 0 < kept_R.sum() < np.count_nonzero(before_R)
  assert np.all(np.abs(advantage_R[kept_R]) >= np.abs(before_R[kept_R]))
  assert np.any(np.abs(advantage_R[kept_R]) > np.abs(before_R[kept_R]) + 1e-3)
  want, record, log_ratio = reference(
      params_of(), rollouts, REWARD_R, config, kept_R=kept_R, advantage_R=advantage_R.astype(float))
  got, recorded, _ = gradient_of(config, rollouts, REWARD_R, key=key)
  assert_close(got, want)
  assert_record(recorded, record, log_ratio)
  assert recorded['tokens_updated'] == rollouts.length_R[kept_R].sum()
  whole = [gradient_of(CONFIG, rollouts, REWARD_R, key=x)[:2] for x in (None, key)]
  jax.tree.map(np.testing.assert_array_equal, *whole)


@slow
def test_the_weight_of_a_wave_does_not_hang_on_rows_that_are_none():
  """A mesh may round up the rows of one wave more than those of another."""
  config = varied(CONFIG, weight='task', aggregate='constant').replace(wave_rollouts=(8, 5, 2))
  rows = make_rollouts()._replace(wave_R=WAVE_R), REWARD_R
  got, want = (update._experience(*of_rows, config).weight_R for of_rows in (padded(*rows), rows))
  np.testing.assert_array_equal(got[:15], want)


def test_dropping_keeps_a_share_of_the_rollouts_and_the_expected_advantage():
  """Of 15 rollouts, whatever rows are none, 6 on the mean: to four standard errors of 4096 keys."""
  config, padded_R = varied(CONFIG, advantage='posterior', keep=0.4), padded(make_rollouts(), REWARD_R, 3)
  of = jax.jit(jax.vmap(lambda key: update._experience(*padded_R, config, PAST, key).advantage_R))
  found = np.asarray(of(jax.random.split(jax.random.key(0), 4096)), float)
  assert not found[:, 15:].any()
  assert np.count_nonzero(found) / 4096 == pytest.approx(0.4 * 15, abs=0.15)
  want_R = grpo_test.advantage_by_loops(REWARD_R, padded_R[0].task_R, len(BUDGET_M), 'posterior', past=PAST)
  np.testing.assert_allclose(found.mean(axis=0)[:15], want_R[:15], atol=4 * found.std(axis=0).max() / 64)


def test_what_a_loss_reads_must_be_passed():
  with pytest.raises(ValueError, match="kind='posterior' reads past=None"):
    update.step(state_of(), make_rollouts(), REWARD_R, {}, POLICY, varied(CONFIG, advantage='posterior'))
  with pytest.raises(ValueError, match=r'grpo\.keep=0\.5 draws .* pass a key, or set it to 1'):
    update.step(state_of(), make_rollouts(), REWARD_R, {}, POLICY, varied(CONFIG, keep=0.5))


BFLOAT16 = dataclasses.replace(POLICY, dtype='bfloat16')


@pytest.mark.parametrize('changed, own', [
    ({}, False), ({'tis_cap': 2.0}, True), ({'loss': 'gspo', 'clip_low': 3e-4, 'clip_high': 4e-4}, True),
    ({'clip_low': 0.0}, True), ({'clip_low': 0.02, 'clip_high': 0.02}, False), ({'loss': 'gspo'}, False)], ids=str)
def test_ratios_are_to_the_trainers_policy_where_rounding_would_clip(changed, own):
  assert update.has_own_ratios(knobs.loss(**changed)) == own


@pytest.mark.parametrize('epochs', [pytest.param(1, marks=exhaustive), pytest.param(2, marks=slow)])
def test_narrow_limits_clip_nothing_before_the_policy_has_moved(epochs):
  """Of a policy in bfloat16, whose sampler's log-probabilities are off by its rounding. Against these, half would be
  clipped."""
  limits = presets.LOSSES['gspo'] | {'tis_cap': 0.0}
  rollouts, config = make_rollouts(), varied(CONFIG, epochs=epochs, **limits)
  logp_RC, _ = scored(POLICY, params_of(), rollouts, rows(rollouts), config.temperature)
  rollouts = rollouts._replace(logp_RC=np.asarray(logp_RC))
  first = {}
  for name, rule in (('own', update.has_own_ratios), ("the sampler's", lambda _: False)):
    with mock.patch.object(update, 'has_own_ratios', rule):
      state, measured = update.step(state_of(config), rollouts, REWARD_R, {}, BFLOAT16, config)
    first[name] = measurements.summarize(measured)['clip_fraction_first']
  assert first['own'] == 0
  assert first["the sampler's"] > 0.2


def test_bfloat16_leaves_state_and_scores_in_float32():
  rollouts = make_rollouts()
  packed = update.pack_rollouts(rollouts, MIXED_R, CONFIG)
  tokens = update.gather(rollouts, packed)
  state = state_of()
  logp_BT = jax.eval_shape(
      lambda params, tokens: update.logps(params, {}, tokens, 1, BFLOAT16, CONFIG), state.params, tokens)
  experience = jax.eval_shape(lambda rollouts: update._experience(rollouts, REWARD_R, CONFIG), rollouts)
  after, _ = jax.eval_shape(lambda *args: update._step(*args, BFLOAT16, CONFIG),
                            state, {}, experience, tokens._replace(old_logp_BT=logp_BT), np.zeros(2, np.int32))
  assert logp_BT.dtype == np.float32
  jax.tree.map(lambda x, y: np.testing.assert_equal(x.dtype, y.dtype), after, state)
  assert {x.dtype for x in jax.tree.leaves(after.params)} == {np.dtype('float32')}


@exhaustive
def test_bfloat16_is_of_the_computation_alone():
  rollouts = make_rollouts()
  want, record, _ = gradient_of(CONFIG, rollouts, REWARD_R)
  got, recorded, _ = gradient_of(CONFIG, rollouts, REWARD_R, policy_config=BFLOAT16)
  assert recorded['loss'] == pytest.approx(record['loss'], rel=0.02)
  cosine = optax.tree.vdot(got, want) / optax.tree.norm(got) / optax.tree.norm(want)
  assert 0.99 < cosine < 1 - 1e-7


# Adapters.


LORA = dataclasses.replace(POLICY, lora_rank=3, lora_alpha=6.0)
MATRICES = {'q': 'D NH', 'k': 'D KH', 'v': 'D KH', 'o': 'NH D', 'gate': 'D F', 'up': 'D F',
            'down': 'F D'}


def by_the_chain_rule(by_merged, adapters):
  """Of y = x (W + s A B), s = 6 / 3: dA = s dW B^T and dB = s A^T dW."""
  gradient = {}
  for name, letters in MATRICES.items():
    i, o = letters.split()
    a, b = (np.asarray(adapters[f'{name}_lora_{x}']) for x in (f'{i}A', f'A{o}'))
    flat = lambda x, axes: x.reshape(x.shape[0], int(np.prod(x.shape[1:1 + axes])), -1)
    a_LIA, b_LAO, dw_LIO = (
        flat(np.asarray(x), n) for x, n in ((a, len(i)), (b, 1), (by_merged[f'{name}_{i}{o}'], len(i))))
    gradient[f'{name}_lora_{i}A'] = 2 * (dw_LIO @ b_LAO.transpose(0, 2, 1)).reshape(a.shape)
    gradient[f'{name}_lora_A{o}'] = 2 * (a_LIA.transpose(0, 2, 1) @ dw_LIO).reshape(b.shape)
  return {'layers': gradient}


@pytest.mark.parametrize('changed', [
    pytest.param({}, marks=exhaustive), pytest.param({'kl_coef': 0.3}, marks=exhaustive),
    pytest.param({'tis_cap': 1.2, 'kl_coef': 0.3, 'entropy_coef': 0.1}, marks=slow)], ids=str)
def test_adapters_alone_learn_and_by_the_chain_rule(changed):
  config = varied(CONFIG, b1=0.5, **changed)
  rollouts = make_rollouts()
  trained, base = policy.split(LORA, params_of(0, LORA))
  rng = np.random.default_rng(0)
  trained = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), trained)
  before = jax.tree.map(np.array, (trained, base))
  merged = jax.tree.map(np.array, policy.merge(LORA, trained, base))
  by_merged, record, _ = reference(merged, rollouts, REWARD_R, config, ref_params=base)
  state = update.init(trained, jax.random.key(0), config)
  # There are moments of the adapters alone.
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  counters = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 0]
  assert size(state.opt_state) == 2 * size(trained) + size(counters)
  assert size(counters) <= 16
  state, measured = update.step(state, rollouts, REWARD_R, base, LORA, config)
  # Adam's first moment is (1 - b1) g.
  got = jax.tree.map(lambda m: m / 0.5, state.opt_state[1][0].mu)
  assert_close(got, by_the_chain_rule(by_merged['layers'], trained['layers']))
  assert measured[0]['loss'] == pytest.approx(record['loss'], rel=1e-5)
  assert jax.tree.structure(state.params) == jax.tree.structure(trained)
  jax.tree.map(lambda x, y: np.testing.assert_array_less(1e-4, np.abs(np.asarray(x) - y).max()),
               state.params, before[0])
  jax.tree.map(np.testing.assert_array_equal, base, before[1])


# A mesh.

# Sizes that eight devices divide.
WIDE = dataclasses.replace(POLICY, vocab_size=16, num_heads=8, num_kv_heads=8, hidden_width=32)
MESHES = [{'fsdp': 8}, {'data': 2, 'fsdp': 2, 'model': 2}]  # mesh_test.py takes steps on others


@pytest.mark.parametrize('axes, config', [
    pytest.param(MESHES[1], CONFIG, marks=slow), *(pytest.param(axes, RICH, marks=exhaustive) for axes in MESHES)],
    ids=name)
def test_the_gradient_does_not_depend_on_the_mesh(axes, config):
  config = config.replace(microbatch_rows=1)
  rollouts = make_rollouts()
  params, base = params_of(0, WIDE), base_of(config, WIDE)
  want, record, _ = gradient_of(config, rollouts, REWARD_R, trained=params, base=base,
                                policy_config=WIDE)
  mesh = sharding.mesh(**axes)
  with jax.set_mesh(mesh):
    got, recorded, state = gradient_of(config, rollouts, REWARD_R, trained=params, base=base,
                                       policy_config=WIDE, mesh=mesh)
  assert_close(got, want)
  # Each device has prompts of its own.
  assert_figures(recorded, {name: x for name, x in record.items() if name not in WASTES}, 1e-4, 1e-6)
  # Parameters and the optimiser's copies of them are divided as before.
  shards = axes.get('fsdp', 1) * axes.get('model', 1)
  for tree in (state.params, got):
    for name in ('q_DNH', 'o_NHD', 'gate_DF', 'down_FD'):
      x = tree['layers'][name]
      assert {s.data.size for s in x.addressable_shards} == {x.size // shards}, name
    x = tree['embed_VD']
    assert {s.data.size for s in x.addressable_shards} == {x.size // shards}
  assert state.params['layers']['attention_norm_D'].sharding.is_fully_replicated


@slow
def test_what_is_dropped_does_not_depend_on_the_mesh():
  """And every device has all advantages, which the host reads."""
  config = varied(CONFIG, advantage='posterior', keep=0.5)
  rollouts, key = make_rollouts()._replace(wave_R=WAVE_R), jax.random.key(3)
  want = experience_of(config, key, rollouts)
  with jax.set_mesh(sharding.mesh(**MESHES[1])):
    got = experience_of(config, key, rollouts)
  np.testing.assert_array_equal(got.advantage_R != 0, want.advantage_R != 0)
  for x_R, want_R in zip(got, want):
    assert x_R.is_fully_replicated
    np.testing.assert_allclose(x_R, want_R, rtol=1e-5)


@slow
def test_an_optimiser_begins_where_its_parameters_are():
  mesh = sharding.mesh(fsdp=4, model=2)
  params = params_of(0, WIDE)
  with jax.set_mesh(mesh):
    state = update.init(jax.device_put(params, sharding.of(mesh, params)), jax.random.key(0), CONFIG)
  for x, wanted in zip(jax.tree.leaves(state.opt_state),
                       jax.tree.leaves(sharding.of(mesh, state.opt_state)), strict=True):
    assert x.sharding.is_equivalent_to(wanted, x.ndim)


# Mini-batches and epochs.


# With momentum an update without a gradient would show. Its updates are of the gradient's size, unlike Adam's, so
# that rounding of entries near 0 does not matter.
MOMENTUM = optax.sgd(3e-3, momentum=0.9)


@pytest.fixture
def momentum(monkeypatch):
  monkeypatch.setattr(update, 'optimizer', lambda _: MOMENTUM)


TERMS = {'tis_cap': 1.2, 'kl_coef': 0.3, 'entropy_coef': 0.1}  # of a loss, in addition to that of the advantages


def marked(**knobs):
  """A config of its own, so that no other test runs the programs compiled with this optimiser."""
  return varied(CONFIG, weight_decay=0.25, **knobs)


@pytest.mark.parametrize('changed', [
    {'minibatches': 3, 'epochs': 2},
    pytest.param({'minibatches': 3, 'epochs': 2, **TERMS}, marks=slow),
    pytest.param({'minibatches': 2, 'epochs': 3, 'tis_cap': 1.2, 'loss': 'gspo'}, marks=exhaustive),
    pytest.param({'minibatches': 1, 'epochs': 2, 'loss': 'cispo'}, marks=exhaustive)], ids=str)
def test_updates_are_those_of_a_loop_over_minibatches(momentum, changed):
  """Each is of whole tasks at `minibatches` times their weight in the batch, and the old policy is the one
  before the first. Of three mini-batches of two mixed tasks one is empty: it moves nothing, no momentum either.
  """
  config = marked(**changed)
  rollouts, base = make_rollouts(), base_of(config)
  params = params_of()
  of = lambda params: scored(POLICY, params, rollouts, rows(rollouts), config.temperature)[0]
  old_RC = of(params) if config.grpo.tis_cap else rollouts.logp_RC
  all_kept = bool(config.grpo.kl_coef)
  kept_R = np.ones(len(REWARD_R), bool) if all_kept else MIXED_R
  length_R = rollouts.length_R + rollouts.prompts.length_M[rollouts.task_R] - 1
  minibatch_R = pack.assign(rollouts.task_R, length_R, kept_R, minibatches=config.minibatches)
  opt_state, move = MOMENTUM.init(params), jax.jit(MOMENTUM.update)
  losses, sums, tokens = [], collections.Counter(), 0
  for _ in range(config.epochs):
    for u in range(config.minibatches):
      which_R = minibatch_R == u
      if not which_R.any():
        losses.append(0.0)
        continue
      gradient, record = minibatch_reference(params, rollouts, config, base, old_RC, which_R)
      losses.append(record['loss'])
      sums.update(record['sums'])
      tokens += record['tokens_updated']
      updates, opt_state = move(gradient, opt_state, params)
      params = optax.apply_updates(params, updates)
  start = params_of()
  state, measured = update.step(state_of(config), rollouts, REWARD_R, base, POLICY, config)
  movement = lambda params: jax.tree.map(lambda a, b: np.asarray(a) - b, params, start)
  assert_close(movement(state.params), movement(params), 1e-4)
  np.testing.assert_allclose([m['loss'] for m in measured], losses, rtol=1e-4, atol=1e-6)
  assert int(state.step) == 1
  assert len(measured) == config.epochs * config.minibatches
  if not all_kept and config.minibatches == 3:
    assert [int(m['tokens_updated']) > 0 for m in measured] == [True, True, False] * config.epochs
    assert_close(state.opt_state[0].trace, opt_state[0].trace, 1e-4)
  record = measurements.summarize(measured)
  assert record['tokens_updated'] == tokens == config.epochs * rollouts.length_R[kept_R].sum()
  for name in ('clip_fraction_high', 'kl', 'tis_weight'):
    if name in record:
      assert record[name] == pytest.approx(sums[name] / tokens, rel=1e-4, abs=1e-6), name
  assert ('kl' in record, 'tis_weight' in record) == (config.grpo.kl_coef > 0, config.grpo.tis_cap > 0)
  # The policy has moved; the sampler's error is from before.
  first_RC = (minibatch_R == 0)[:, None] & (np.arange(C)[None] < rollouts.length_R[:, None])
  assert record['logp_error'] == pytest.approx(
      np.abs(np.asarray(of(start)) - rollouts.logp_RC)[first_RC].mean(), rel=1e-4)


def minibatch_reference(params, rollouts, config, base, old_RC, which_R):
  """`reference`, of some rollouts whether they have an advantage or not."""
  c = config.grpo
  of = lambda params: scored(POLICY, params, rollouts, rows(rollouts), config.temperature)
  logp_RC, entropy_RC = of(params)
  ref_RC = of(base)[0] if base else logp_RC
  x = by_loops(logp_RC, entropy_RC, old_RC, ref_RC, rollouts, REWARD_R, c)
  scaled = lambda y: np.float32(config.minibatches * which_R[:, None] * y)
  gradient = pulled_back(POLICY, params, rollouts, rows(rollouts), config.temperature,
                         scaled(x.by_logp_RC), scaled(x.by_entropy_RC))
  return gradient, {
      'loss': config.minibatches * x.loss_RC[which_R].sum(), 'tokens_updated': rollouts.length_R[which_R].sum(),
      'sums': {'clip_fraction_high': x.high_RC[which_R].sum(), 'kl': x.kl_RC[which_R].sum(),
               'tis_weight': x.tis_RC[which_R].sum()}}


@exhaustive
@pytest.mark.parametrize('config', [CONFIG, RICH.replace(minibatches=1)], ids=['grpo', 'rich'])
def test_the_gradients_of_minibatches_add_up_to_that_of_the_batch(config):
  rollouts, base = make_rollouts(), base_of(config)
  whole, record, _ = gradient_of(config, rollouts, REWARD_R, base=base)
  parts, recorded, _ = gradient_of(config.replace(minibatches=3), rollouts, REWARD_R, base=base)
  assert_close(parts, jax.tree.map(lambda g: 3 * g, whole))
  assert recorded['loss'] == pytest.approx(record['loss'], rel=1e-5)
  assert recorded['tokens_updated'] == record['tokens_updated']


# Rollouts that are left out. Of the mixed groups the first keeps a right and a wrong one, the last loses its right one.
LEFT_OUT_R = np.isin(np.arange(len(REWARD_R)), [0, 1, 4, 9, 12])


def left_out(rollouts, where_R):
  """The step with `where_R` no rollouts, as completions.keep leaves them."""
  return rollouts._replace(
      task_R=np.where(where_R, len(BUDGET_M), rollouts.task_R), length_R=np.where(where_R, 0, rollouts.length_R),
      ended_R=np.where(where_R, types.NOT_SAMPLED, rollouts.ended_R))


@pytest.mark.parametrize('changed, beyond', [
    ({}, 0), pytest.param(VARIANTS['gspo and all'], 3, marks=slow),  # runs the program of the variant
    pytest.param({'prompt_sharing': 1.0, 'loss': 'gspo'}, 0, marks=slow)], ids=str)
def test_what_is_left_out_has_no_part_in_the_loss(changed, beyond):
  """Whatever reward it has, and though row 0, whose tokens padding reads, is left out."""
  config, rollouts = varied(CONFIG, **changed), left_out(make_rollouts(), LEFT_OUT_R)
  base, mixed_R = base_of(config), (np.arange(len(REWARD_R)) < 4) & ~LEFT_OUT_R
  reward_R = np.where(LEFT_OUT_R, 7, REWARD_R).astype(np.float32)
  assert REWARD_R[mixed_R].tolist() == [0, 1]
  want, record, log_ratio = reference(params_of(), rollouts, reward_R, config, ref_params=base, kept_R=mixed_R)
  got, recorded, _ = gradient_of(config, *padded(rollouts, reward_R, beyond), base=base)
  assert_close(got, want)
  assert_record(recorded, record, log_ratio)


@pytest.mark.parametrize('changed, all_left_out', [
    ({}, False), ({}, True), pytest.param(TERMS, True, marks=slow)], ids=str)
def test_without_a_mixed_group_nothing_moves(momentum, changed, all_left_out):
  """Nor without any rollout, where a term of the loss is of all."""
  config = marked(minibatches=3, epochs=2, **changed)
  rollouts, base = make_rollouts(), base_of(config)
  state, _ = update.step(state_of(config), rollouts, REWARD_R, base, POLICY, config)  # gives momentum
  before = jax.tree.map(np.array, (state.params, state.opt_state))
  reward_R = REWARD_R if all_left_out else np.ones(len(MIXED_R), np.float32)
  if all_left_out:
    rollouts = left_out(rollouts, np.ones(len(MIXED_R), bool))
  state, measured = update.step(state, rollouts, reward_R, base, POLICY, config)
  jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.opt_state))
  assert int(state.step) == 2
  record = measurements.summarize(measured)
  assert record['tokens_updated'] == record['loss'] == record['grad_norm'] == 0
  assert record['ratio_p50'] == 1 and record['padding_waste'] == record['logp_error'] == 0
  assert record['policy_fidelity'] is record['argmax_agreement'] is None  # as nothing is known


def test_one_program_serves_every_batch(momentum):
  before = update._step._cache_size()
  config = marked(minibatches=3, epochs=2)
  state = state_of(config)
  budgets = (BUDGET_M, [2, 2, 3, 3, 3, 2], [15, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 12])
  for seed, budget_M in enumerate(budgets):
    rollouts = make_rollouts(seed, budget_M)
    for reward_R in (REWARD_R, np.zeros(len(REWARD_R), np.float32)):
      state, _ = update.step(state, rollouts, reward_R, {}, POLICY, config)
  for where_R in (LEFT_OUT_R, ~LEFT_OUT_R):
    state, _ = update.step(state, left_out(rollouts, where_R), REWARD_R, {}, POLICY, config)
  assert update._step._cache_size() <= before + 1
  assert int(state.step) == 10


def test_what_updates_take_is_counted(momentum, clock):
  """Useful FLOPs by the lengths of the mixed groups' rollouts, a prompt once; the others by what is packed.

  A microbatch computes 32 tokens, and attention of two rows of 24. Each of two epochs counts.
  """
  config, rollouts, c = marked(minibatches=3, epochs=2), make_rollouts(), POLICY
  state, measured = update.step(state_of(config), rollouts, REWARD_R, {}, c, config)
  counts = {row['phase']: row for row in clock.drain()}
  length_M, length_R = rollouts.prompts.length_M, rollouts.length_R[MIXED_R]
  of = arithmetic.Lengths(length_M[[0, 5]], length_M[rollouts.task_R[MIXED_R]], length_R)
  packed = update.pack_rollouts(rollouts, MIXED_R, config)
  used, found = packed.first[-1], counts['update']
  assert found['flops_useful'] == 2 * arithmetic.update_flops(c, of)
  assert found['tokens_updated'] == 2 * length_R.sum() == measurements.summarize(measured)['tokens_updated']
  computed = np.count_nonzero(packed.microbatches.rollout_BT >= 0)
  assert (found['tokens_computed'], found['tokens_padded']) == (2 * computed, 2 * (32 * used - computed))
  token = 2 * (c.num_layers * arithmetic.layer_weights(c) + c.width * c.vocab_size)
  square = 4 * c.num_layers * c.num_heads * c.head_width * 24 ** 2
  assert found['flops_executed'] == 2 * used * 3 * (32 * token + 2 * square)
  assert found['collective_bytes'] == 0 and 'score' not in counts  # ratios are to the sampler's policy
  arrays = (packed.microbatches, rollouts)
  assert counts['pack']['host_bytes'] == sum(np.asarray(x).nbytes for x in jax.tree.leaves(arrays))


def test_what_is_useful_does_not_depend_on_packing(clock):
  """Nor do the tokens that have a gradient; those that are computed do."""
  rollouts, found = make_rollouts(), []
  for shape in ({}, {'prompt_sharing': 1.0}, {'row_length': 40, 'microbatch_rows': 3}, {'minibatches': 2}):
    packed = update.pack_rollouts(rollouts, MIXED_R, CONFIG.replace(**shape))
    update._count_update(update._learnt(rollouts, MIXED_R), packed, POLICY, times=1)
    found.append({row['phase']: row for row in clock.drain()}['start'])
  assert len({(x['flops_useful'], x['tokens_updated']) for x in found}) == 1
  assert len({x['tokens_computed'] for x in found}) > 1 < len({x['tokens_padded'] for x in found})


@slow
def test_scores_are_counted_in_a_phase_of_their_own(clock):
  """Of the old policy and of the initial one; all rollouts count, as the loss has a KL divergence."""
  config, rollouts = varied(CONFIG, tis_cap=1.2, kl_coef=0.3, epochs=2), make_rollouts()
  update.step(state_of(config), rollouts, REWARD_R, params_of(5), POLICY, config)
  counts = {row['phase']: row for row in clock.drain()}
  of = arithmetic.lengths(rollouts.prompts.length_M, rollouts.task_R, rollouts.length_R)
  assert counts['score']['flops_useful'] == 2 * arithmetic.score_flops(POLICY, of)
  assert counts['update']['flops_useful'] == 2 * arithmetic.update_flops(POLICY, of)
  assert 3 * counts['score']['flops_executed'] == counts['update']['flops_executed']


def test_updates_raise_what_was_right_and_lower_what_was_wrong(momentum):
  rollouts = make_rollouts()
  of = lambda params: np.asarray(
      scored(POLICY, params, rollouts, rows(rollouts), CONFIG.temperature)[0])
  # On-policy: the old log-probabilities are the policy's own.
  rollouts = rollouts._replace(logp_RC=of(params_of()))
  config = marked(minibatches=3, epochs=2)
  state, measured = update.step(state_of(config), rollouts, REWARD_R, {}, POLICY, config)
  assert measurements.summarize(measured[:1])['clip_fraction_high'] == 0
  assert measurements.summarize(measured)['logp_error'] < 1e-5
  change_R = np.sum((of(state.params) - of(params_of()))
                    * (np.arange(C)[None] < rollouts.length_R[:, None]), axis=1)
  advantage_R = grpo_test.advantage_by_loops(REWARD_R, rollouts.task_R, len(BUDGET_M), 'std')
  for task in (0, 5):
    assert (advantage_R * change_R)[rollouts.task_R == task].sum() > 0.1


# Updates that are skipped.


def poisoned(rollouts, *tasks):
  """Rollouts whose old log-probabilities are no numbers, of these tasks."""
  return rollouts._replace(logp_RC=np.where(np.isin(rollouts.task_R, tasks)[:, None], np.nan, rollouts.logp_RC))


@pytest.mark.parametrize('tasks, skipped', [((0,), 1), ((0, 5), 2), ((1, 3), 0)])
def test_a_loss_that_is_not_finite_is_not_learnt_from(momentum, tasks, skipped):
  """Of each pass over three mini-batches, which hold task 0, task 5 and nothing; the others have no advantage."""
  config, rollouts = marked(minibatches=3, epochs=2), make_rollouts()
  state, _ = update.step(state_of(config), rollouts, REWARD_R, {}, POLICY, config)  # gives momentum
  before = jax.tree.map(np.array, state._replace(key=None))
  state, measured = update.step(state, poisoned(rollouts, *tasks), REWARD_R, {}, POLICY, config)
  assert [bool(m['skipped']) for m in measured].count(True) == 2 * skipped
  assert all(np.isfinite(m['loss']) != m['skipped'] for m in measured)
  same = jax.tree.map(np.array_equal, before.params, state.params)
  assert int(state.step) == 2 and all(jax.tree.leaves(same)) == (skipped == 2)
  assert guard.first_bad((state.params, state.opt_state)) is None
  if skipped == 2:
    jax.tree.map(np.testing.assert_array_equal, before.opt_state, state.opt_state)
    record = measurements.summarize(measured)
    assert record['skipped'] == 4 and record['loss'] is record['grad_norm'] is record['logp_error'] is None


@pytest.mark.parametrize('bad', [np.inf, 4e15])
def test_an_update_to_what_is_not_sound_is_not_made(momentum, bad):
  """Though loss and gradient are finite: momentum of the last norm is too large for a parameter, or infinite."""
  config, rollouts = marked(minibatches=3, epochs=2), make_rollouts()
  state = state_of(config)
  trace = {**state.opt_state[0].trace, 'norm_D': np.full(POLICY.width, bad / 3e-3, np.float32)}
  state = state._replace(opt_state=(state.opt_state[0]._replace(trace=trace), *state.opt_state[1:]))
  before = jax.tree.map(np.array, (state.params, state.opt_state))
  state, measured = update.step(state, rollouts, REWARD_R, {}, POLICY, config)
  jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.opt_state))
  assert all(np.isfinite(m['loss']) and np.isfinite(m['grad_norm']) for m in measured)
  assert [bool(m['skipped']) for m in measured] == [True, True, False] * 2  # the third has nothing to learn from
  bad = np.array(guard.state_names(state.params, state.opt_state))[~guard.sound(measured[0]['largest'], state.params)]
  assert {name.rpartition('.')[2] for name in bad} == {'norm_D'} and bad[0] == 'params.norm_D'


# The fidelity of sampler and trainer.


def test_divergence_by_hand():
  """Of a token of twice the probability (log2(2/3) + 2 log2(4/3)) / 2, of one of none 1/2, of none other 0."""
  log_ratio = np.array([0, np.log(2), -np.inf, -100, 1e-4, -1e-4], np.float32)
  small = 1e-8 / (8 * np.log(2))  # the first term of its series
  of = jax.jit(grpo.divergence_bits)
  np.testing.assert_allclose(of(log_ratio), [0, 0.12255624891826566, 0.5, 0.5, small, small], rtol=1e-4)
  assert np.isfinite(of(np.float32([60, 1000, np.inf, 0, 0, 0]))).all()


def test_the_counts_of_fidelity_by_hand():
  """Of five completion tokens two are the likeliest by both policies, one by the trainer's alone, one by the sampler's
  alone; of a last one it is not known, and of what is no completion token nothing counts."""
  p_BT = np.float32([[0.8, 0.8, 0.6, 0.4, 0.3, 0.9]])
  q_BT = np.float32([[0.8, 0.6, 0.3, 0.8, 0.4, 0.6]])
  tokens = update.Tokens(
      *(np.zeros((1, 6), np.int32),) * 3, rows=None, rollout_BT=np.zeros((1, 6), np.int32),
      target_BT=np.zeros((1, 6), np.int32), mask_BT=np.arange(6)[None] < 5, sampler_logp_BT=np.log(q_BT))
  experience = update.Experience(np.array([5]), np.ones(1, np.float32), np.ones(1, np.float32))
  loss = jax.jit(update._loss, static_argnums=4)
  _, counts = loss(np.log(p_BT), np.zeros((1, 6), np.float32), tokens, experience, CONFIG.grpo)
  assert (int(counts['argmax_known']), int(counts['argmax_same'])) == (4, 2)
  r_T = np.float64([1, 4 / 3, 2, 1 / 2, 3 / 4])
  terms_T = (np.log2(2 / (1 + r_T)) + r_T * np.log2(2 * r_T / (1 + r_T))) / 2
  assert counts['divergence'] == pytest.approx(terms_T.sum(), rel=1e-5)


def test_divergence_over_a_small_vocabulary():
  """Its mean under the sampler is (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2, whichever way round."""
  of = jax.jit(grpo.divergence_bits)
  for seed, sharpness in enumerate((0.01, 1.0, 6.0)):
    p_V, q_V = np.exp(np.random.default_rng(seed).normal(0, sharpness, (2, 7)))
    p_V, q_V = p_V / p_V.sum(), q_V / q_V.sum()
    m_V = (p_V + q_V) / 2
    want = sum(np.sum(x_V * np.log2(x_V / m_V)) for x_V in (p_V, q_V)) / 2
    for one_V, other_V in ((p_V, q_V), (q_V, p_V)):
      found_V = of(np.log(one_V / other_V).astype(np.float32))
      assert np.sum(other_V * np.asarray(found_V, float)) == pytest.approx(want, rel=1e-4) and 0 < want < 1


@pytest.mark.parametrize('prompt_sharing, tokens', [(1.0, 48), (0.6, 32)])
def test_waste_is_a_share_of_the_computed_tokens(prompt_sharing, tokens):
  """A microbatch has two rows of 24 positions, and computes as many tokens, or fewer where prompts are shared."""
  rollouts, config = make_rollouts(), CONFIG.replace(prompt_sharing=prompt_sharing)
  packed = update.pack_rollouts(rollouts, MIXED_R, config)
  waste, used = pack.waste(packed), int(packed.first[-1])
  prompt_R = rollouts.prompts.length_M[rollouts.task_R] - 1
  positions = (rollouts.length_R + prompt_R)[MIXED_R].sum()
  assert waste['attention_waste'] == pytest.approx(1 - positions / (48 * used))
  computed = tokens * used * (1 - waste['padding_waste'])
  own = rollouts.length_R[MIXED_R].sum()
  if prompt_sharing == 1:
    assert computed == pytest.approx(positions)
  else:  # a prompt is computed again in each shard that holds a part of its task
    assert own + prompt_R[0] + prompt_R[-1] <= computed + 1e-6 < positions


def test_a_prompt_is_computed_once_for_its_group():
  """Of one task all 15 rollouts stand in one shard."""
  rollouts = make_rollouts(0, [15])
  config = CONFIG.replace(microbatch_rows=8)
  packed = update.pack_rollouts(rollouts, np.ones(15, bool), config)
  assert packed.first[-1] == 1
  prompt = rollouts.prompts.length_M[0] - 1
  assert prompt > 0
  assert np.count_nonzero(packed.microbatches.rollout_BT >= 0) == prompt + rollouts.length_R.sum()


# Supervised fine-tuning, the optimiser, knobs.


@slow
def test_sft_is_maximum_likelihood():
  rollouts = make_rollouts()
  mask_RC = np.arange(C)[None] < rollouts.length_R[:, None]
  logp_RC, _ = scored(POLICY, params_of(), rollouts, rows(rollouts), CONFIG.temperature)
  gradient = pulled_back(POLICY, params_of(), rollouts, rows(rollouts), CONFIG.temperature,
                         np.float32(mask_RC / -mask_RC.sum()), np.zeros(mask_RC.shape, np.float32))
  with mock.patch.object(update, 'optimizer', lambda _: ADD_UP):
    # The number of mini-batches does not matter here.
    config = CONFIG.replace(minibatches=4, weight_decay=0.125)
    state, measured = update.sft(state_of(config), rollouts, POLICY, config)
  np.testing.assert_allclose(measured['loss'], -np.asarray(logp_RC)[mask_RC].mean(), rtol=1e-5)
  np.testing.assert_allclose(measured['grad_norm'], optax.tree.norm(gradient), rtol=1e-5)
  assert_close(state.opt_state[0].trace, gradient)
  assert int(state.step) == 1


def rates(config, steps):
  """The size of Adam's first updates under a constant gradient is the rate."""
  tx = update.optimizer(config)
  opt_state, sizes = tx.init(jnp.zeros(1)), []
  for _ in range(steps):
    updates, opt_state = tx.update(jnp.ones(1), opt_state, jnp.zeros(1))
    sizes.append(-float(updates[0]))
  return sizes


@pytest.mark.parametrize('changed, want', [
    ({}, [1, 1, 1]),
    ({'warmup_steps': 3}, [0.25, 0.5, 0.75, 1, 1, 1]),
    ({'warmup_steps': 3, 'schedule': 'linear', 'decay_steps': 7},
     [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0, 0]),
    ({'schedule': 'linear', 'decay_steps': 4, 'final_rate': 0.2}, [1, 0.8, 0.6, 0.4, 0.2, 0.2]),
    ({'warmup_steps': 1, 'schedule': 'cosine', 'decay_steps': 5},
     [0.5, 1, (1 + 0.5 ** 0.5) / 2, 0.5, (1 - 0.5 ** 0.5) / 2, 0, 0]),
    ({'schedule': 'cosine', 'decay_steps': 2, 'final_rate': 0.5}, [1, 0.75, 0.5, 0.5]),
])
def test_the_learning_rate_warms_up_then_stays_or_falls(changed, want):
  config = CONFIG.replace(learning_rate=1.0, **changed)
  np.testing.assert_allclose(rates(config, len(want)), want, rtol=1e-4, atol=1e-6)
  schedule = update.learning_rate(config)
  np.testing.assert_allclose([schedule(i) for i in range(len(want))], want, rtol=1e-5, atol=1e-6)


def test_weight_decay_is_of_matrices():
  policy_config = dataclasses.replace(POLICY, qkv_bias=True, tie_embeddings=False)
  names = jax.eval_shape(lambda key: policy.init(policy_config, key), jax.random.key(0))
  params = jax.tree.map(lambda _: jnp.ones(1), names)
  tx = update.optimizer(CONFIG.replace(learning_rate=0.5, weight_decay=0.1))
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  flat = {**updates.pop('layers'), **updates}
  spared = {name for name, x in flat.items() if not np.any(x)}
  assert spared == {'attention_norm_D', 'mlp_norm_D', 'norm_D', 'q_norm_H', 'k_norm_H', 'q_bias_NH',
                    'k_bias_KH', 'v_bias_KH'}
  for name in set(flat) - spared:
    np.testing.assert_allclose(flat[name], -0.05, rtol=1e-6)


def test_gradients_are_scaled_down_to_a_norm():
  """Adam's first update of a gradient g is g / (|g| + eps): here of one of norm 1, with eps 1."""
  tx = update.optimizer(CONFIG.replace(learning_rate=1.0, max_grad_norm=1.0, eps=1.0))
  params = {'w_DD': jnp.zeros((1, 2))}
  updates, _ = tx.update({'w_DD': jnp.array([[3.0, 4.0]])}, tx.init(params), params)
  np.testing.assert_allclose(updates['w_DD'], [[-0.6 / 1.6, -0.8 / 1.8]], rtol=1e-5)


def test_a_bad_config_is_an_error():
  """Of each section, by its name; the values of single knobs are tested in knobs_test.py."""
  with pytest.raises(ValueError, match=r"optimizer\.decay_steps=5 must be above optimizer\.warmup_steps=5 with "
                     r"optimizer\.schedule='linear'"):
    CONFIG.replace(schedule='linear', warmup_steps=5, decay_steps=5)
  with pytest.raises(ValueError, match=r'grpo\.dual_clip=1\.2 must be above 1 \+ grpo\.clip_high=1\.28'):
    varied(CONFIG, dual_clip=1.2)
  with pytest.raises(ValueError, match=r'pack\.microbatch_rows=0.*; sample\.temperature=0\.0'):
    CONFIG.replace(microbatch_rows=0, temperature=0.0)
