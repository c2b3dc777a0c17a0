"""Two simulated worlds, in which rules can be compared without a policy.

A rule sees rewards only. Estimates and budgets come from the code that the trainer runs.

static: how good are one step's budgets? M tasks have success rates p_i drawn from a population. A rule
observes a few rollouts of each and shares R rollouts among them. The true rates judge its budgets:

    objective = sum_i V(N_i, p_i),  as a share of the oracle's, which knows p_i

learning: how fast does a policy learn by each rule? In log-odds, the success of task i of I is linear in D
shared features, plus a part b_i that no update moves:

    logit_i = theta . x_i + b_i,    |x_i| ~ 1,    p_i = sigmoid(logit_i),    theta = 0 at the start
    G = sum_r A_r [(reward_r - p_i) x_i + noise_r],    i = the task of rollout r
    theta += length * G / |G|,    noise_r ~ N(0, sigma^2 / D) in each of the D directions

(reward - p) x is the gradient of the log-likelihood of a rollout's outcome. The noise stands for the rest of a
completion's gradient, so its noise-to-signal ratio, the nu of kr_jax/allocation/value.py, is sigma^2. All
rollouts weigh the same. The fixed length stands for Adam, or for an active clip of the gradient's norm.

Tasks come in families: x_i = sqrt(rho) f + sqrt(1 - rho) u_i, where f and u_i have random directions, so
x_i . x_j ~ rho within a family, and learning one task moves its family. Half the variance of the start
logits is between the families, so some are hard as a whole. At rho = 0 tasks share directions by chance only.

Source: the objective is that of Li et al. 2025, arXiv 2509.25849, eq. 8; the worlds are our own. They show
what to try first on real policies, not what holds for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import special
from scipy import stats as statistics
import tqdm

from kr_jax import knobs
from kr_jax import tasks
from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.allocation import value as value_lib
from kr_jax.learning import grpo
from kr_jax.types import Array, TaskStats

MEASURES = ('objective', 'mixed_tasks', 'effective_gradient_ratio')
RULES = ('uniform', 'paper', 'point', 'posterior', 'known prior', 'oracle')
BASELINE = 'uniform:std'
_BETWEEN_FAMILIES = 0.5  # share of the variance of the start logits


# The static world.


class Population(NamedTuple):
  """Where success rates come from."""

  draw: Callable[[np.random.Generator, int], np.ndarray]  # (rng, M) -> p_M
  prior: tuple[float, float] | None = None  # (a, b) if the population is a Beta distribution


def beta_populations() -> dict[str, Population]:
  """Jeffreys', flat, U-shaped as late in training, and hard."""
  return {f'Beta({a:g},{b:g})': Population(functools.partial(_beta, a, b), (a, b))
          for a, b in ((0.5, 0.5), (1, 1), (0.2, 0.2), (0.15, 0.6))}


def _beta(a: float, b: float, rng: np.random.Generator, M: int) -> np.ndarray:
  return rng.beta(a, b, M)


class StaticSetup(NamedTuple):
  """Options of the static world, described by `simulate static --help`."""

  tasks: int = 256
  history: int = 8
  per_task: int = 8
  low: int = 2
  high: int = 128
  repeats: int = 64
  value: str = 'infogain'
  nu: float = 2.0
  seed: int = 0


def static(populations: dict[str, Population], setup: StaticSetup) -> dict[str, Any]:
  """Compares the rules on each population.

  Returns:
    {population: {rule: {measure: [mean, half width of the 95 % interval]}}}. Of MEASURES,
    'objective' is in per cent of the oracle's; the others are expected under the true rates.
    'known prior' is the posterior under the true prior, for populations that have one: no rule can
    expect more from the history. 'X - paper' is a difference paired by repeat.

  Raises:
    ValueError: an option out of its range.
  """
  _check_options(setup, tasks=1, history=0, low=1, high=setup.low, repeats=2)
  value_lib.check(setup.value, setup.nu)
  result = {}
  bar = tqdm.tqdm(total=len(populations) * setup.repeats, desc='static', unit='repeat')
  for name, population in populations.items():
    judged = []
    for repeat in range(setup.repeats):
      rng = np.random.default_rng((setup.seed, repeat))
      p_M = population.draw(rng, setup.tasks)
      budgets = rule_budgets(p_M, observed(p_M, setup.history, rng), population.prior, setup)
      judged.append(judge(p_M, budgets, setup))
      bar.update()
    by_rule = {rule: np.array([measures[rule] for measures in judged]) for rule in RULES if rule in judged[0]}
    for rule in ('posterior', 'known prior'):
      if rule in by_rule:
        by_rule[f'{rule} - paper'] = by_rule[rule] - by_rule['paper']
    result[name] = {rule: dict(zip(MEASURES, map(interval, x.T))) for rule, x in by_rule.items()}
  bar.close()
  return result


def _check_options(setup: StaticSetup | LearningSetup, **least: int) -> None:
  """Raises ValueError for options below their least value, or a per_task outside low..high."""
  for name, bound in least.items():
    if getattr(setup, name) < bound:
      raise ValueError(f'--{name}={getattr(setup, name)} must be at least {bound}')
  if not setup.low <= setup.per_task <= setup.high:
    raise ValueError(f'--per_task={setup.per_task} must lie in --low..--high, {setup.low}..{setup.high}')


def observed(p_M: np.ndarray, history: int, rng: np.random.Generator) -> TaskStats:
  """The statistics after `history` rollouts of each task."""
  M = len(p_M)
  task_R = np.repeat(np.arange(M), history)
  reward_R = rng.random(len(task_R)) < p_M[task_R]
  return estimate.observe(estimate.init(M), np.arange(M), task_R, reward_R,
                          np.ones(len(task_R)), discount=1.0)


def rule_budgets(p_M: np.ndarray, stats: TaskStats, prior: tuple[float, float] | None,
                 setup: StaticSetup) -> dict[str, np.ndarray]:
  """budget_M by each of RULES; only 'oracle' sees the true rates p_M."""
  index_M = np.arange(len(p_M))
  n_M = stats.successes_I + stats.failures_I
  success_rates = {
      'paper': estimate.window(stats, index_M),
      'point': np.where(n_M > 0, stats.successes_I / np.maximum(n_M, 1), 0.5),
      'posterior': estimate.posterior(stats, index_M),
      'oracle': p_M,
  }
  if prior is not None:
    success_rates['known prior'] = value_lib.Beta(stats.successes_I + prior[0],
                                                  stats.failures_I + prior[1])
  budgets = {'uniform': _budgets(p_M, setup, setup.value, setup.nu, rule='uniform')}
  for rule, success_rate in success_rates.items():
    budgets[rule] = _budgets(success_rate, setup, setup.value, setup.nu)
  return budgets


def _budgets(success_rate: Array | value_lib.Beta | value_lib.Window, setup: StaticSetup | LearningSetup,
             value: str, nu: float, rule: str = 'knapsack') -> np.ndarray:
  """budget_M of `per_task` rollouts a task. All named values are concave, so 'greedy' is exact."""
  M = value_lib.check_success_rate(success_rate)
  return allocate.budgets(success_rate, M * setup.per_task, low=setup.low, high=setup.high, rule=rule,
                          value=value, nu=nu, solver='greedy')


def judge(p_M: np.ndarray, budgets: dict[str, np.ndarray], setup: StaticSetup
          ) -> dict[str, tuple[float, float, float]]:
  """MEASURES of each rule's budgets, by the true success rates."""
  best = allocate.objective(p_M, budgets['oracle'], setup.value, setup.nu)

  def measures(budget_M):
    objective = allocate.objective(p_M, budget_M, setup.value, setup.nu)
    return (100 * objective / best if best else 100.0,  # where no task can be mixed, any rule is best
            allocate.expected_mixed_tasks(p_M, budget_M),
            allocate.expected_gradient_ratio(p_M, budget_M))

  return {rule: measures(budget_M) for rule, budget_M in budgets.items()}


def interval(x: Array) -> list[float]:
  """[mean, half width of the mean's 95 % interval], by Student's t."""
  x = np.asarray(x, float)
  half = statistics.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
  return [float(x.mean()), float(half)]


# The learning world.


class Method(NamedTuple):
  """How a run chooses budgets and weighs rollouts."""

  estimate: str  # in ESTIMATES, or 'uniform', a rule that needs no estimate
  value: str
  nu: float
  advantage: str  # in ADVANTAGES


class LearningSetup(NamedTuple):
  """Options of the learning world, described by `simulate learning --help`."""

  tasks: int = 2048
  features: int = 128
  families: int = 8
  alignment: float = 0.0
  per_step: int = 128
  per_task: int = 8
  low: int = 1
  high: int = 64
  steps: int = 1920
  length: float = 1.0
  discount: float = 0.98
  seeds: int = 4
  seed: int = 0


class World(NamedTuple):
  """The tasks of the learning world before training."""

  feature_ID: np.ndarray  # x_i
  start_I: np.ndarray  # logits b_i


ESTIMATES, ADVANTAGES = knobs.Alloc.choices('estimate'), knobs.Grpo.choices('advantage')


def parse_method(text: str) -> Method:
  """'uniform:std', 'window:infogain:std', 'posterior:snr:2:loo': estimate, value, nu, advantage."""
  kind, *middle, advantage = text.split(':') if ':' in text else (text, '')
  bad = ValueError(
      f'--method {text!r} is not uniform:ADVANTAGE or ESTIMATE:VALUE[:NU]:ADVANTAGE, such as '
      f'uniform:std, window:infogain:std, posterior:snr:2:loo; estimates are {ESTIMATES}, '
      f"values {tuple(value_lib.VALUES)}, advantages {ADVANTAGES}; nu follows 'snr' only")
  if advantage not in ADVANTAGES or kind not in ('uniform', *ESTIMATES):
    raise bad
  if kind == 'uniform' and not middle:
    return Method('uniform', 'infogain', 1.0, advantage)
  num_parts = 2 if middle[:1] == ['snr'] else 1
  if kind == 'uniform' or len(middle) != num_parts:
    raise bad
  try:
    nu = float(middle[1]) if len(middle) == 2 else 1.0
    value_lib.check(middle[0], nu)
  except ValueError:
    raise bad from None
  return Method(kind, middle[0], nu, advantage)


def make_world(start: tuple[float, float], setup: LearningSetup, seed: int) -> World:
  """Tasks whose start logits have the mean and the standard deviation in `start`."""
  rng = np.random.default_rng((seed, 0))
  family_I = np.arange(setup.tasks) % setup.families
  directions = lambda num: rng.normal(size=(num, setup.features)) / np.sqrt(setup.features)
  feature_ID = (np.sqrt(setup.alignment) * directions(setup.families)[family_I]
                + np.sqrt(1 - setup.alignment) * directions(setup.tasks))
  # Quantiles of a normal distribution rather than draws, which would differ more from seed to seed.
  family_start = special.ndtri((np.arange(setup.families) + 0.5) / setup.families)
  between = _BETWEEN_FAMILIES if setup.families > 1 else 0.0
  spread_I = (np.sqrt(between) * family_start[family_I]
              + np.sqrt(1 - between) * rng.normal(size=setup.tasks))
  mean, sd = start
  return World(feature_ID, mean + sd * spread_I)


@functools.partial(jax.jit, static_argnames=('num_tasks', 'kind'))
def _advantage(reward_R: Array, task_R: Array, num_tasks: int, kind: str) -> Array:
  return grpo.advantage(reward_R, task_R, num_tasks, kind=kind)


def gradient(feature_MD: np.ndarray, p_M: np.ndarray, reward_R: np.ndarray, task_R: np.ndarray,
             kind: str, noise_D: np.ndarray) -> np.ndarray:
  """G_D with advantages of the kind. noise_D: the noise of one rollout, scaled here to that of the sum."""
  advantage_R = np.asarray(
      _advantage(np.float32(reward_R), task_R, num_tasks=len(p_M), kind=kind), float)
  push_M = np.bincount(task_R, weights=advantage_R * (reward_R - p_M[task_R]), minlength=len(p_M))
  # A sum of independent normal noises is one normal noise of the summed variance.
  return push_M @ feature_MD + noise_D * np.sqrt(np.sum(advantage_R ** 2))


def choose(method: Method, stats: TaskStats, index_M: np.ndarray, setup: LearningSetup
           ) -> np.ndarray:
  """budget_M of a step."""
  if method.estimate == 'uniform':
    return _budgets(np.full(len(index_M), 0.5), setup, method.value, method.nu, rule='uniform')
  success_rate = estimate.success_rate(stats, index_M, method.estimate)
  return _budgets(success_rate, setup, method.value, method.nu)


def learn(world: World, method: Method, setup: LearningSetup, *, sigma: float, seed: int
          ) -> np.ndarray:
  """The true mean success over all tasks, before the first step and after each.

  With the same seed all methods get the same tasks in the same order, and the same noise directions.
  """
  (I, D), M = world.feature_ID.shape, setup.per_step
  R = M * setup.per_task
  rng = np.random.default_rng((seed, 1))
  logit_I, stats = world.start_I.copy(), estimate.init(I)
  success = [special.expit(logit_I).mean()]
  for step in range(setup.steps):
    index_M = np.array(tasks.batch(range(I), step, per_step=M, seed=seed))
    task_R = np.repeat(np.arange(M), choose(method, stats, index_M, setup))
    p_M, feature_MD = special.expit(logit_I[index_M]), world.feature_ID[index_M]
    reward_R = (rng.random(R) < p_M[task_R]).astype(float)
    noise_D = rng.normal(size=D) * sigma / np.sqrt(D)
    gradient_D = gradient(feature_MD, p_M, reward_R, task_R, method.advantage, noise_D)
    norm = np.linalg.norm(gradient_D)
    if norm > 0:  # not if no group was mixed
      logit_I += setup.length / norm * (world.feature_ID @ gradient_D)
    if method.estimate != 'uniform':  # 'uniform' reads no statistics
      stats = estimate.observe(stats, index_M, task_R, reward_R, np.ones(R),
                               discount=setup.discount)
    success.append(special.expit(logit_I).mean())
  return np.array(success)


def smooth(x: np.ndarray, window: int) -> np.ndarray:
  """Trailing means, of at most `window` points up to each point."""
  total = np.cumsum(np.pad(x, (1, 0)))
  start = np.maximum(np.arange(len(x)) + 1 - window, 0)
  return (total[1:] - total[start]) / (np.arange(len(x)) + 1 - start)


def share_needed(success: np.ndarray, baseline: np.ndarray) -> float | None:
  """The share of the baseline's rollouts after which its final success is reached; None if never.

  Both arguments are (smoothed) successes before the first step and after each, and are interpolated
  linearly. The share is 0 if the baseline ended no better than it began.
  """
  reached = np.flatnonzero(success >= baseline[-1])
  if not len(reached):
    return None
  t, steps = int(reached[0]), len(baseline) - 1
  if t == 0:
    return 0.0
  return float((t - (success[t] - baseline[-1]) / (success[t] - success[t - 1])) / steps)


def learning(methods: Sequence[str], starts: Sequence[tuple[float, float]],
             sigmas: Sequence[float], setup: LearningSetup) -> list[dict[str, Any]]:
  """Trains by BASELINE and by each method in each world.

  Returns:
    An object for each start and sigma: 'start', 'sigma' and, by method and seed, 'share' (`share_needed`)
    and 'success_by_seed', the true mean success over all tasks (a trailing mean over an epoch) before the
    first step and after each.

  Raises:
    ValueError: an option out of its range, or an unknown method.
  """
  parsed = {name: parse_method(name) for name in (BASELINE, *methods)}
  _check_learning(starts, sigmas, setup)
  rows = []
  bar = tqdm.tqdm(total=len(starts) * len(sigmas) * setup.seeds * len(parsed), desc='learning',
                  unit='run')
  for start, sigma in itertools.product(starts, sigmas):
    success = {name: [] for name in parsed}
    for seed in range(setup.seed, setup.seed + setup.seeds):
      world = make_world(start, setup, seed)
      for name, method in parsed.items():
        curve = learn(world, method, setup, sigma=sigma, seed=seed)
        success[name].append(smooth(curve, setup.tasks // setup.per_step))
        bar.update()
    rows.append({
        'start': list(start), 'sigma': sigma,
        'share': {name: list(map(share_needed, runs, success[BASELINE]))
                  for name, runs in success.items()},
        'success_by_seed': {name: np.array(runs) for name, runs in success.items()}})
  bar.close()
  return rows


def _check_learning(starts, sigmas, setup: LearningSetup) -> None:
  _check_options(setup, tasks=1, features=1, families=1, per_step=1, low=1, high=setup.low, steps=1, seeds=1)
  if setup.per_step > setup.tasks:
    raise ValueError(f'--per_step={setup.per_step} is more than --tasks={setup.tasks}')
  if not 0 <= setup.alignment <= 1:
    raise ValueError(f'--alignment={setup.alignment} must lie in [0, 1]')
  if not 0 < setup.discount <= 1:
    raise ValueError(f'--discount={setup.discount} must lie in (0, 1]')
  if not 0 < setup.length < np.inf:
    raise ValueError(f'--length={setup.length} must be a positive number')
  for number in (*sigmas, *(sd for _, sd in starts)):
    if not 0 <= number < np.inf:
      raise ValueError(f'--sigma and the SD of --start must be numbers of at least 0, not {number}')
  if not np.all(np.isfinite(starts)):
    raise ValueError(f'the MEAN of --start must be a number; it is one of {starts}')
