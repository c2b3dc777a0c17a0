"""The prior is that of the tasks, each counted once, whatever rollouts budgets gave them."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.allocation import prior


def stats_of(groups, num_strata=1, **options) -> types.TaskStats:
  """Statistics of a list of (right, wrong), a group of each task; tasks take turns in their strata."""
  I = len(groups)
  stats = estimate.init(I, stratum_I=np.arange(I) % num_strata, **options)
  return observe(stats, np.arange(I), *np.array(groups, int).reshape(I, 2).T)


def observe(stats, index_M, right_M, wrong_M) -> types.TaskStats:
  M = len(index_M)
  task_R = np.concatenate([np.repeat(np.arange(M), right_M), np.repeat(np.arange(M), wrong_M)])
  verdict_R = np.repeat([1.0, 0.0], [right_M.sum(), wrong_M.sum()])
  return estimate.observe(stats, index_M, task_R, verdict_R, np.ones(len(task_R)), discount=1.0)


def mean(stats) -> float:
  a_I, b_I = prior.fit(stats)
  return a_I[0] / (a_I[0] + b_I[0])


def test_nothing_seen_is_jeffreys_prior():
  np.testing.assert_allclose(prior.fit(estimate.init(3)), 0.5)
  assert [len(x_I) for x_I in prior.fit(estimate.init(0))] == [0, 0]


def test_by_hand():
  """Rates 1, 1, 0, 0, then four of 1/2, of two rollouts each: m = 1/2; the squares over m (1-m) sum to 4, less 8 / 2 is
  0, and the scale is 8 / 2. With the default's 8 tasks rho = (0 + 4) / (4 + 8); and all tasks are the stratum's."""
  a_I, b_I = prior.fit(stats_of([(2, 0)] * 2 + [(0, 2)] * 2 + [(1, 1)] * 4))
  rho = (0 + 8 / 3) / (4 + 8)
  np.testing.assert_allclose(a_I + b_I, 1 / rho - 1)
  np.testing.assert_allclose(a_I, b_I)


def fit_by_loops(stats):
  """Task by task, as the docstring says."""
  I, strata = len(stats.visits_I), max(stats.stratum_I, default=0) + 1
  seen = [i for i in range(I) if stats.visits_I[i] > 0]
  rate = {i: stats.rates_I[i] / stats.visits_I[i] for i in seen}
  overall = (sum(rate.values()) + 1) / (len(seen) + 2)
  means, excess, scale = [], [], []
  for y in range(strata):
    mine = [i for i in seen if stats.stratum_I[i] == y]
    m = (sum(rate[i] for i in mine) + 8 * overall) / (len(mine) + 8)
    means.append(m)
    counted = [(stats.successes_I[i], stats.successes_I[i] + stats.failures_I[i]) for i in mine]
    counted = [(k, n) for k, n in counted if n > 1.5]
    excess.append(sum((k / n - m) ** 2 / (m * (1 - m)) - 1 / n for k, n in counted))
    scale.append(sum(1 - 1 / n for _, n in counted))
  rho = (sum(excess) + 4) / (sum(scale) + 8)
  out = []
  for i in range(I):
    y = stats.stratum_I[i]
    c = 1 / min(max((excess[y] + 8 * rho) / (scale[y] + 8), 0.05), 0.95) - 1
    out.append((means[y] * c + stats.known_OI[1, i], (1 - means[y]) * c + stats.known_OI[0, i]))
  return np.array(out).reshape(I, 2).T


groups = st.tuples(st.integers(0, 9), st.integers(0, 9))


@given(groups=st.lists(groups, min_size=1, max_size=24), num_strata=st.integers(1, 3), known=st.booleans())
def test_is_that_of_the_loops(groups, num_strata, known):
  rates = {'prior_rate_I': np.linspace(0, 1, len(groups)), 'prior_rollouts': 3.0} if known else {}
  stats = stats_of(groups, num_strata, **rates)
  stats = observe(stats, np.arange(len(groups)), *np.array(groups[::-1], int).T)  # a second visit, of other sizes
  a_I, b_I = prior.fit(stats)
  np.testing.assert_allclose((a_I, b_I), fit_by_loops(stats), rtol=1e-9)
  assert np.all(a_I > 0) and np.all(b_I > 0)


def test_a_task_counts_once_whatever_its_rollouts():
  """Half of the tasks at .1 with 30 rollouts, half at .95 with 2: the mean rate is .525, and .153 of all rollouts."""
  rng = np.random.default_rng(0)
  p_I, n_I = np.tile([0.1, 0.95], 2000), np.tile([30, 2], 2000)
  right_I = rng.binomial(n_I, p_I)
  found = mean(stats_of(np.stack([right_I, n_I - right_I], axis=1)))
  assert found == pytest.approx(0.525, abs=0.02)
  assert right_I.sum() / n_I.sum() == pytest.approx(0.153, abs=0.01)


@pytest.mark.slow
def test_budgets_that_follow_from_verdicts_do_not_bend_the_mean():
  """1,000 random populations, three visits each with budgets by the posterior of the visits before."""
  rng, error, pooled = np.random.default_rng(1), [], []
  for _ in range(1000):
    I = 2000
    a, b = rng.uniform(0.15, 3, 2)
    p_I, stats = rng.beta(a, b, I), estimate.init(I, groups=0)
    for _ in range(3):
      posterior = estimate.posterior(stats, np.arange(I))
      # As a knapsack: what a posterior expects of the information gain decides, between 2 and 32 rollouts.
      gain_I = posterior.a_M * posterior.b_M ** 2 / (posterior.a_M + posterior.b_M) ** 3
      n_I = np.clip(8 * gain_I / gain_I.mean(), 2, 32).astype(int)
      right_I = rng.binomial(n_I, p_I)
      stats = stats._replace(
          successes_I=stats.successes_I + right_I, failures_I=stats.failures_I + n_I - right_I,
          visits_I=stats.visits_I + 1, rates_I=stats.rates_I + right_I / n_I)
    error.append(mean(stats) - p_I.mean())
    pooled.append(stats.successes_I.sum() / (stats.successes_I + stats.failures_I).sum() - p_I.mean())
  assert np.abs(error).max() < 0.02 and abs(np.mean(error)) < 0.001
  assert np.abs(pooled).max() > 0.1


def test_strata_have_priors_of_their_own():
  rng = np.random.default_rng(3)
  p_I = np.where(np.arange(4000) % 2, rng.beta(8, 2, 4000), rng.beta(0.3, 0.9, 4000))
  right_I = rng.binomial(8, p_I)
  a_I, b_I = prior.fit(stats_of(np.stack([right_I, 8 - right_I], axis=1), 2))
  np.testing.assert_allclose((a_I[0], b_I[0]), (0.3, 0.9), rtol=0.15)
  np.testing.assert_allclose((a_I[1], b_I[1]), (8, 2), rtol=0.15)


def test_a_stratum_of_few_tasks_has_what_all_have():
  stats = stats_of([(2, 6)] * 200)._replace(stratum_I=np.array([0] * 199 + [1], np.int32))
  a_I, b_I = prior.fit(stats)
  assert a_I[-1] / (a_I[-1] + b_I[-1]) == pytest.approx(0.25, abs=0.01)


def test_a_known_rate_is_worth_its_rollouts():
  stats = estimate.init(3, prior_rate_I=np.array([0.25, np.nan, 1.0]), prior_rollouts=4.0)
  a_I, b_I = prior.fit(stats)
  np.testing.assert_allclose(a_I, [1.5, 0.5, 4.5])
  np.testing.assert_allclose(b_I, [3.5, 0.5, 0.5])
