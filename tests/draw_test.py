"""Draws against a number at a time, their distribution, and what is left out of it against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from kr_jax import draw
from kr_jax import knobs

FILTERS = knobs.Filters()
truncate = jax.jit(draw.truncate, static_argnums=1)


def inverted(mass_X, uniform):
  """A number at a time."""
  total = 0.0
  for x, mass in enumerate(mass_X):
    total += mass
    if total > uniform * mass_X.sum():
      return x
  raise AssertionError(f'{uniform} of {mass_X}')


def drawn(logits_V, key, words=1):
  mass_PW = np.exp(logits_V - logits_V.max()).reshape(-1, words)
  part, word = np.asarray(jax.random.uniform(key, (2,)), np.float64)
  part = inverted(mass_PW.sum(axis=1), part)
  return part * words + inverted(mass_PW[part], word)


@pytest.mark.slow
@pytest.mark.parametrize('V, words', [(7, 1), (12, 2), (64, 8), (1000, 8), (1024, 32)])
def test_a_draw_inverts_the_distribution(V, words):
  logits_SV = np.random.default_rng(V).normal(0, 3, (200, V)).astype(np.float32)
  logits_SV[:, ::3] = -np.inf
  key_S = jax.random.split(jax.random.key(V), 200)
  got_S = jax.jit(draw._draw)(logits_SV, key_S)
  want_S = [drawn(logits_V.astype(np.float64), key, words) for logits_V, key in zip(logits_SV, key_S)]
  np.testing.assert_array_equal(got_S, want_S)


def test_draws_have_the_distribution():
  """Chi-squared of 40,000."""
  logits_V = np.random.default_rng(0).normal(0, 1.5, 12).astype(np.float32)
  key_S = jax.random.split(jax.random.key(0), 40_000)
  token_S = jax.jit(draw._draw)(jnp.broadcast_to(logits_V[None], (40_000, 12)), key_S)
  expected = 40_000 * np.exp(logits_V) / np.exp(logits_V).sum()
  found = np.bincount(token_S, minlength=12)
  assert scipy.stats.chisquare(found, expected, sum_check=False).pvalue > 1e-3


def test_inversion_by_hand():
  """Of masses 1, 2 and 1: shares below a quarter, three quarters, one. What has none is never taken."""
  mass_SX = jnp.broadcast_to(jnp.array([0.0, 1, 0, 2, 1, 0])[None], (7, 6))
  got = jax.jit(draw._invert)(mass_SX, jnp.array([0.0, 0.24, 0.25, 0.74, 0.76, 1 - 2 ** -24, 1.0]))
  assert got.tolist() == [1, 1, 3, 3, 4, 4, 4]


def truncated_by_loops(logits_V, config):
  probability_V = np.exp(logits_V - logits_V.max())
  probability_V /= probability_V.sum()
  order = sorted(range(len(logits_V)), key=lambda v: -logits_V[v])
  kept = set(order)
  if config.top_k:
    kept &= set(order[:config.top_k])
  nucleus, mass = set(), 0.0
  for v in order:
    if mass < config.top_p:
      nucleus.add(v)
      mass += probability_V[v]
  kept &= nucleus
  kept &= {v for v in order if probability_V[v] >= config.min_p * probability_V.max()}
  return kept


@pytest.mark.parametrize('changed', [
    {'top_k': 1}, {'top_k': 3}, {'top_k': 99}, {'top_p': 0.5}, {'top_p': 0.9}, {'top_p': 1e-6},
    {'min_p': 0.2}, {'min_p': 0.99}, {'top_k': 4, 'top_p': 0.8, 'min_p': 0.05}], ids=str)
def test_what_is_left_out_equals_a_loop_over_tokens(changed):
  config = FILTERS.replace(**changed)
  logits_SV = np.random.default_rng(0).normal(0, 2, (50, 9)).astype(np.float32)
  got_SV = np.asarray(truncate(logits_SV, config))
  for logits_V, got_V in zip(logits_SV, got_SV):
    kept = truncated_by_loops(logits_V.astype(float), config)
    assert set(np.flatnonzero(np.isfinite(got_V))) == kept
    np.testing.assert_array_equal(got_V[list(kept)], logits_V[list(kept)])


def test_truncation_by_hand():
  """Probabilities .4, .3, .2, .1: the likeliest two reach .7, those of half of .4 or more are three."""
  logits_SV = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32))
  kept = lambda **knobs: np.flatnonzero(np.isfinite(truncate(logits_SV, FILTERS.replace(**knobs))))
  assert kept(top_p=0.6).tolist() == kept(top_k=2).tolist() == [1, 3]
  assert kept(min_p=0.49).tolist() == [1, 2, 3]
  assert kept().tolist() == [0, 1, 2, 3]
