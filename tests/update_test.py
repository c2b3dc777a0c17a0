"""The jitted, packed, microbatched update against a loop over rollouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kr_jax import policy
from kr_jax import types
from kr_jax import update
from kr_jax.tokenizer import STOP

POLICY = policy.Config(
    vocab_size=7, num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=24,
    rope_theta=100.0, norm_eps=1e-6, qk_norm=True, qkv_bias=False, tie_embeddings=True,
    dtype='float32')
CONFIG = update.Config(
    learning_rate=1e-2, warmup_steps=0, decay_steps=0, weight_decay=0.0, max_grad_norm=1e9,
    row_length=24, microbatch_rows=2, clip_low=0.2, clip_high=0.28, advantage='std', temperature=0.8)
P, C = 4, 5
# By group: mixed, empty, one rollout, all right, all wrong, mixed.
BUDGET_M = [4, 0, 1, 3, 2, 5]
REWARD_R = np.array([1, 0, 0, 1] + [1] + [1, 1, 1] + [0, 0] + [0, 0, 1, 0, 0], np.float32)
MIXED_R = np.repeat(np.array([True, False, False, False, False, True]), BUDGET_M)


def make_rollouts(seed=0):
  """Ragged rollouts, among them a completion of one token (STOP) and one that nothing ends."""
  rng = np.random.default_rng(seed)
  M, R = len(BUDGET_M), sum(BUDGET_M)
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
      task_R=np.repeat(np.arange(M), BUDGET_M).astype(np.int32), token_RC=token_RC,
      # Off-policy by up to half a nat, so that some ratios are clipped on either side.
      logp_RC=rng.uniform(-2.5, -1.5, (R, C)).astype(np.float32), length_R=length_R,
      ended_R=np.where(token_RC[np.arange(R), length_R - 1] == STOP, 1, 2),
      decode_steps=np.array(9))


def state_of(config=CONFIG):
  params = jax.tree.map(lambda x: 2 * x, policy.init(POLICY, jax.random.key(0)))
  return update.init(params, jax.random.key(1), config)


@functools.partial(jax.jit, static_argnums=3)
def logps(params, rollouts, row_RT, temperature):
  """logp_RC of every completion, each alone in its row."""
  logits_RTV = policy.logits(POLICY, params, row_RT) / temperature
  at_RC = (rollouts.prompts.length_M[rollouts.task_R] - 1)[:, None] + jnp.arange(C)[None]
  logp_RCV = jnp.take_along_axis(jax.nn.log_softmax(logits_RTV), at_RC[..., None], axis=1)
  return jnp.take_along_axis(logp_RCV, rollouts.token_RC[..., None], axis=2)[..., 0]


def rows(rollouts):
  """Each rollout's prompt and completion in a row of its own."""
  row_RT = np.zeros((len(rollouts.task_R), P + C), np.int32)
  for r, m in enumerate(rollouts.task_R):
    n = rollouts.prompts.length_M[m]
    row_RT[r, :n] = rollouts.prompts.token_MP[m, :n]
    row_RT[r, n:n + C] = rollouts.token_RC[r, :P + C - n]
  return row_RT


def reference_loss(params, rollouts, reward_R, config):
  """Rollout by rollout."""
  logp_RC = logps(params, rollouts, rows(rollouts), config.temperature)
  total = 0.0
  for r, m in enumerate(rollouts.task_R):
    group = reward_R[rollouts.task_R == m].astype(np.float64)
    advantage = 0.0 if group.min() == group.max() else (
        (reward_R[r] - group.mean()) / (group.std() + 1e-6))
    n = rollouts.length_R[r]
    ratio = jnp.exp(logp_RC[r, :n] - rollouts.logp_RC[r, :n])
    total -= jnp.sum(jnp.minimum(
        ratio * advantage,
        jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high) * advantage))
  return total / rollouts.length_R.sum()


def one_sgd_step(config, rollouts, reward_R, keep_R, monkeypatch):
  """The gradient of update.step, read off a step of plain gradient descent."""
  monkeypatch.setattr(update, 'optimizer', lambda config: optax.sgd(1.0))
  config = config._replace(weight_decay=0.125)  # a mark: programs compiled here stay here
  state = state_of(config)
  before = jax.tree.map(np.array, state.params)
  packed = update.pack_rollouts(rollouts, keep_R, config)
  state, metrics = update.step(state, rollouts, reward_R, packed, POLICY, config)
  return jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params), metrics


def padded(rollouts, reward_R, more=3):
  """The same step with `more` rows beyond its rollouts."""
  pad = lambda x, value=0: np.concatenate([x, np.full((more, *x.shape[1:]), value, x.dtype)])
  return rollouts._replace(
      task_R=pad(rollouts.task_R, len(BUDGET_M)), token_RC=pad(rollouts.token_RC),
      logp_RC=pad(rollouts.logp_RC), length_R=pad(rollouts.length_R), ended_R=pad(rollouts.ended_R)
  ), pad(reward_R)


def assert_close(tree, other, tolerance=1e-5):
  scale = max(float(np.max(np.abs(x))) for x in jax.tree.leaves(other))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * scale), tree, other)


def test_loss_and_gradient_equal_a_loop_over_rollouts(monkeypatch):
  rollouts = make_rollouts()
  params = state_of().params
  loss, gradient = jax.jit(jax.value_and_grad(
      lambda params: reference_loss(params, rollouts, REWARD_R, CONFIG)))(params)
  got, metrics = one_sgd_step(CONFIG, rollouts, REWARD_R, MIXED_R, monkeypatch)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  assert_close(got, jax.tree.map(np.asarray, gradient))
  np.testing.assert_allclose(metrics['grad_norm'], optax.tree.norm(gradient), rtol=1e-5)
  assert metrics['tokens_updated'] == rollouts.length_R[MIXED_R].sum()
  assert 0 < metrics['clip_fraction'] < 1


@pytest.mark.parametrize('row_length, microbatch_rows', [
    pytest.param(9, 1, marks=pytest.mark.slow), (24, 7), pytest.param(135, 1, marks=pytest.mark.slow)])
def test_the_gradient_does_not_depend_on_packing(monkeypatch, row_length, microbatch_rows):
  rollouts = make_rollouts()
  want, _ = one_sgd_step(CONFIG, rollouts, REWARD_R, MIXED_R, monkeypatch)
  config = CONFIG._replace(row_length=row_length, microbatch_rows=microbatch_rows)
  got, _ = one_sgd_step(config, rollouts, REWARD_R, MIXED_R, monkeypatch)
  assert_close(got, want)
  # Rollouts without an advantage change nothing, whether they are dropped or kept.
  kept, _ = one_sgd_step(config, rollouts, REWARD_R, np.ones(len(MIXED_R), bool), monkeypatch)
  assert_close(kept, want)


def test_rows_beyond_the_rollouts_change_nothing(monkeypatch):
  rollouts = make_rollouts()
  want, wanted = one_sgd_step(CONFIG, rollouts, REWARD_R, MIXED_R, monkeypatch)
  got, metrics = one_sgd_step(CONFIG, *padded(rollouts, REWARD_R), np.append(MIXED_R, [False] * 3),
                              monkeypatch)
  assert_close(got, want)
  assert metrics['tokens_updated'] == wanted['tokens_updated']
  np.testing.assert_allclose(metrics['loss'], wanted['loss'], rtol=1e-6)


def test_the_leave_one_out_advantage_is_that_of_grpo(monkeypatch):
  rollouts = make_rollouts()
  std, _ = one_sgd_step(CONFIG, rollouts, REWARD_R, MIXED_R, monkeypatch)
  loo, _ = one_sgd_step(CONFIG._replace(advantage='loo'), rollouts, REWARD_R, MIXED_R, monkeypatch)
  # The first group alone: 'std' divides by 1/2, 'loo' multiplies by 4/3.
  first_R = MIXED_R & (rollouts.task_R == 0)
  one = lambda advantage: one_sgd_step(CONFIG._replace(advantage=advantage), rollouts,
                                       np.where(first_R, REWARD_R, 0), first_R, monkeypatch)[0]
  assert_close(one('loo'), jax.tree.map(lambda g: g * (4 / 3) / 2, one('std')), 1e-4)
  with pytest.raises(AssertionError):
    assert_close(loo, std, 0.1)


# The noise of the gradient.


def halves_of(verdict_R, task_R):
  """Every other rollout of an outcome of a task; which half begins is not specified."""
  half_R, seen = np.zeros(len(verdict_R), int), {0: 0, 1: 0}
  for r, v in enumerate(verdict_R):
    seen[int(v)] += 1
    half_R[r] = seen[int(v)] % 2
  return half_R


def noise_by_loops(score_RG, verdict_R, task_R, sign_M):
  """The docstring of update.gradient_noise, rollout by rollout. score_RG: of each the gradient."""
  half_R = halves_of(verdict_R, task_R)
  gradient, scale, squares = np.zeros((2, score_RG.shape[1])), np.zeros((2, len(sign_M))), 0.0
  for m, h in np.ndindex(len(sign_M), 2):
    group = [r for r in range(len(task_R)) if task_R[r] == m and half_R[r] == h]
    for r in group:
      others = [verdict_R[o] for o in group if o != r]
      advantage = verdict_R[r] - np.mean(others) if others else 0.0
      gradient[h] += sign_M[m] * advantage * score_RG[r]
      scale[h, m] += advantage * verdict_R[r]
      squares += advantage ** 2
  signal, signal_scale = gradient[0] @ gradient[1], scale[0] @ scale[1]
  if signal_scale == 0:
    return np.zeros(4)
  spread = np.sum((gradient[0] - gradient[1]) ** 2)
  noise = spread - signal / signal_scale * np.sum((scale[0] - scale[1]) ** 2)
  return np.array([signal, signal_scale, noise, squares])


@pytest.mark.parametrize('beyond', [0, pytest.param(3, marks=pytest.mark.slow)])
def test_gradient_noise_equals_a_loop_over_rollouts(beyond):
  rollouts = make_rollouts()
  params = state_of().params

  def rollout_logps(params):
    logp_RC = logps(params, rollouts, rows(rollouts), CONFIG.temperature)
    return jnp.sum(jnp.where(jnp.arange(C)[None] < rollouts.length_R[:, None], logp_RC, 0), axis=1)

  score_R = jax.jit(jax.jacrev(rollout_logps))(params)
  score_RG = np.concatenate(
      [np.asarray(x, float).reshape(len(REWARD_R), -1) for x in jax.tree.leaves(score_R)], axis=1)
  key = jax.random.key(0)
  sign_M = np.asarray(jax.random.rademacher(key, (len(BUDGET_M),), np.float32))
  assert sign_M[0] != sign_M[5]  # of the mixed groups
  want = noise_by_loops(score_RG, REWARD_R, rollouts.task_R, sign_M)
  keep_R = MIXED_R
  if beyond:
    rollouts, reward_R = padded(rollouts, REWARD_R, beyond)
    keep_R = np.append(MIXED_R, [False] * beyond)
  else:
    reward_R = REWARD_R
  packed = update.pack_rollouts(rollouts, keep_R, CONFIG)
  got = update.gradient_noise(params, rollouts, reward_R, packed, key, POLICY, CONFIG)
  assert want[1] > 0
  np.testing.assert_allclose(got, want, rtol=2e-4)


def test_gradient_noise_by_hand():
  """Four rollouts, two right, scores 1, 2, 3, 4 on one parameter.

  Halves: successes 1 and 2, failures 3 and 4, so (1, 3) and (2, 4); with two rollouts A = 1 and -1:
  gradients 1 - 3 = 2 - 4 = -2, scales 1 and 1, no spread, four A^2.
  """
  np.testing.assert_allclose(
      noise_by_loops(np.array([[1.0], [2], [3], [4]]), np.array([1, 1, 0, 0.0]), np.zeros(4, int),
                     np.array([-1.0])), [4, 1, 0, 4])


def test_without_two_of_either_outcome_there_is_no_measurement():
  rollouts = make_rollouts()
  verdict_R = np.zeros(len(REWARD_R), np.float32)
  verdict_R[0] = 1
  packed = update.pack_rollouts(rollouts, rollouts.task_R == 0, CONFIG)
  got = update.gradient_noise(state_of().params, rollouts, verdict_R, packed, jax.random.key(0),
                              POLICY, CONFIG)
  np.testing.assert_array_equal(got, np.zeros(4))


@pytest.mark.parametrize('nu', [0.5, 8.0])
@pytest.mark.parametrize('alignment', [0.0, 0.4])
def test_a_planted_nu_is_found(monkeypatch, nu, alignment):
  """Scores (v - p) x + noise of power nu |x|^2, of tasks whose x share a direction."""
  M, N, G, steps = 48, 8, 128, 40
  task_R = np.repeat(np.arange(M), N).astype(np.int32)
  R, rng = M * N, np.random.default_rng(3)
  unit = lambda *shape: (lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True))(
      rng.normal(size=shape))
  x_MG = alignment ** 0.5 * unit(1, G) + (1 - alignment) ** 0.5 * unit(M, G)
  rollouts = make_rollouts()
  rollouts = rollouts._replace(
      prompts=types.Prompts(np.ones((M, 1), np.int32), np.ones(M, np.int32),
                            np.arange(M, dtype=np.int32)),
      task_R=task_R, length_R=np.ones(R, np.int32), token_RC=np.zeros((R, 1), np.int32))

  def planted(policy_config, params, rollouts, packed, microbatch, config):
    # logp of a rollout is linear in the parameters; its score stands in logp_RC.
    rollout_BT = jax.lax.dynamic_slice_in_dim(packed.rollout_BT, microbatch * 2, 2)
    logp_BT = rollouts.logp_RC[jnp.maximum(rollout_BT, 0)] @ params
    first_BT = jax.lax.dynamic_slice_in_dim(packed.position_BT, microbatch * 2, 2) == 0
    return update.Scores(logp_BT, logp_BT, rollout_BT, first_BT & (rollout_BT >= 0))

  monkeypatch.setattr(update, 'score', planted)
  config = CONFIG._replace(weight_decay=0.375 + nu + alignment)  # a mark, as above
  total = np.zeros(4)
  p_M = rng.uniform(0.2, 0.8, M)
  for step in range(steps):
    verdict_R = (rng.uniform(size=R) < p_M[task_R]).astype(np.float32)
    noise_RG = nu ** 0.5 * rng.normal(size=(R, G)) / G ** 0.5
    score_RG = (verdict_R - p_M[task_R])[:, None] * x_MG[task_R] + noise_RG
    rollouts = rollouts._replace(logp_RC=score_RG.astype(np.float32))
    packed = update.pack_rollouts(rollouts, np.ones(R, bool), config)
    total += np.asarray(update.gradient_noise(
        np.zeros(G, np.float32), rollouts, verdict_R, packed, jax.random.key(step), POLICY, config))
  signal, signal_scale, noise, noise_scale = total
  assert signal / signal_scale == pytest.approx(1, rel=0.25)
  assert noise / noise_scale == pytest.approx(nu, rel=0.1)


def test_without_a_mixed_group_nothing_moves():
  state = state_of()
  rollouts = make_rollouts()
  packed = update.pack_rollouts(rollouts, MIXED_R, CONFIG)
  state, _ = update.step(state, rollouts, REWARD_R, packed, POLICY, CONFIG)  # gives momentum
  before = jax.tree.map(np.array, (state.params, state.opt_state))
  none = update.pack_rollouts(rollouts, np.zeros(len(MIXED_R), bool), CONFIG)
  state, metrics = update.step(state, rollouts, np.ones(len(MIXED_R), np.float32), none, POLICY,
                               CONFIG)
  jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.opt_state))
  assert int(state.step) == 2
  assert metrics['tokens_updated'] == metrics['loss'] == metrics['grad_norm'] == 0


def test_one_program_serves_every_packing():
  update.step.clear_cache()
  state = state_of()
  rollouts = make_rollouts()
  for keep_R in (MIXED_R, ~MIXED_R, np.ones(len(MIXED_R), bool)):
    packed = update.pack_rollouts(rollouts, keep_R, CONFIG)
    state, _ = update.step(state, rollouts, REWARD_R, packed, POLICY, CONFIG)
  assert update.step._cache_size() == 1


def test_a_step_raises_what_was_right_and_lowers_what_was_wrong():
  rollouts = make_rollouts()
  state = state_of(CONFIG._replace(learning_rate=1e-3))
  mask_RC = np.arange(C)[None] < rollouts.length_R[:, None]
  logp = lambda params: np.array(
      [x[mask].mean() for x, mask in zip(
          np.asarray(logps(params, rollouts, rows(rollouts), CONFIG.temperature)), mask_RC)][:4])
  # On-policy: the old log-probabilities are the policy's own.
  rollouts.logp_RC[:] = logps(state.params, rollouts, rows(rollouts), CONFIG.temperature)
  before = logp(state.params)
  packed = update.pack_rollouts(rollouts, MIXED_R, CONFIG)
  state, metrics = update.step(state, rollouts, REWARD_R, packed, POLICY, CONFIG)
  assert metrics['clip_fraction'] == 0
  change_R = logp(state.params) - before
  assert change_R[REWARD_R[:4] == 1].mean() > change_R[REWARD_R[:4] == 0].mean()


def test_imitate_is_maximum_likelihood(monkeypatch):
  monkeypatch.setattr(update, 'optimizer', lambda config: optax.sgd(1.0))
  rollouts = make_rollouts()
  config = CONFIG._replace(temperature=1.0, weight_decay=0.125)  # as above
  state = state_of(config)
  params = jax.tree.map(jnp.copy, state.params)

  def nll(params):
    logp_RC = logps(params, rollouts, rows(rollouts), 1.0)
    return -sum(jnp.sum(logp_RC[r, :n]) for r, n in enumerate(rollouts.length_R)
                ) / rollouts.length_R.sum()

  loss, gradient = jax.jit(jax.value_and_grad(nll))(params)
  packed = update.pack_rollouts(rollouts, np.ones(len(MIXED_R), bool), config)
  state, metrics = update.imitate(state, rollouts, packed, POLICY, config)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  assert_close(jax.tree.map(lambda a, b: np.asarray(a - b), params, state.params), gradient)


def test_the_learning_rate_warms_up_stays_or_decays():
  def rates(config, steps):
    """The size of Adam's first updates under a constant gradient is the rate."""
    tx = update.optimizer(config)
    opt_state, sizes = tx.init(jnp.zeros(1)), []
    for _ in range(steps):
      updates, opt_state = tx.update(jnp.ones(1), opt_state, jnp.zeros(1))
      sizes.append(-float(updates[0]))
    return sizes

  config = CONFIG._replace(learning_rate=1.0, warmup_steps=3)
  np.testing.assert_allclose(rates(config, 5), [0.25, 0.5, 0.75, 1, 1], rtol=1e-4)
  np.testing.assert_allclose(rates(config._replace(decay_steps=7), 8),
                             [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('changed, named', [
    ({'learning_rate': -1.0}, 'learning_rate=-1.0 is below 0'),
    ({'microbatch_rows': 0}, 'microbatch_rows=0 is below 1'),
    ({'clip_low': float('nan')}, 'clip_low=nan'),
    ({'max_grad_norm': 0.0}, 'max_grad_norm=0.0 must be above 0'),
    ({'advantage': 'max'}, r"grpo.advantage='max' is not one of \('std', 'loo'\)"),
])
def test_bad_config(changed, named):
  with pytest.raises(ValueError, match=named):
    update.check(CONFIG._replace(**changed))
