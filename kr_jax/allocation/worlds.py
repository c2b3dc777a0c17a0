"""Two simulated worlds, in which rules are compared without a policy, by the estimates and budgets of the trainer.

(A third, of many passes over a split, is in passes.py.)

static: the budgets of one step. A rule sees a few rollouts of each task, whose success rate p_i is drawn from a
population. The true rates judge its budgets:

    objective = sum_i V(N_i, p_i),  as a share of the oracle's, which knows p_i

The posterior's budgets are also spent in two and in three waves, each by the verdicts of those before (`spend`).

learning: many steps. The success of task i of I is, in log-odds, linear in D shared features, plus a part b_i that no
update moves:

    logit_i = theta . x_i + b_i,    |x_i| ~ 1,    p_i = sigmoid(logit_i),    theta = 0 at the start
    G = sum_r A_r [(reward_r - p_i) x_i + noise_r],    i = the task of rollout r
    theta += length * G / |G|,    noise_r ~ N(0, sigma^2 / D) in each of the D directions

(reward - p) x is the gradient of the log-likelihood of a rollout's outcome. The noise stands for the rest of a
completion's gradient, so nu (value.py) is sigma^2. The fixed length stands for Adam, or an active clip of the norm.

Tasks come in families: x_i = sqrt(rho) f + sqrt(1 - rho) u_i, where f and u_i have random directions, so x_i . x_j ~
rho within a family, and learning one task moves its family. Half the variance of the start logits is between the
families, so some are hard as a whole. At rho = 0 tasks share directions by chance only.

Source: the objective is that of Li et al. 2025, arXiv 2509.25849, eq. 8; the worlds are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from kr_jax.allocation.value import Beta, Group, Window
from kr_jax.knobs import knob
from kr_jax.learning import grpo
from kr_jax.types import Array, TaskStats

MEASURES = ('objective', 'mixed_tasks', 'effective_gradient_ratio')
RULES = ('uniform', 'paper', 'point', 'posterior', 'known prior', 'oracle')
WAVES = {'2 waves': 2, '3 waves': 3}
ESTIMATES, ADVANTAGES = knobs.Alloc.choices('estimate'), knobs.Grpo.choices('advantage')
BASELINE = 'uniform:std'
_DYNAMIC = 3  # candidates of a task that the rule 'dynamic' considers
_BETWEEN_FAMILIES = 0.5  # share of the variance of the start logits
_advantage = jax.jit(grpo.advantage, static_argnames=('num_tasks', 'kind'))


@knobs.section
class Setup(knobs.Section):
  """Options of all worlds."""

  per_task: int = knob(8, 'rollouts of a task in a step, on average', low=1)
  low: int = knob(2, 'least rollouts that a task gets', low=1)
  high: int = knob(128, 'most rollouts that a task gets', low=1)
  seed: int = knob(0, 'of the draws, the first of them if there are several', low=0)

  def conflicts(self):
    if not self.low <= self.per_task <= self.high:
      yield f'per_task={self.per_task} must lie in low..high, {self.low}..{self.high}'


class Population(NamedTuple):
  """Where success rates come from."""

  draw: Callable[[np.random.Generator, int], np.ndarray]  # (rng, M) -> p_M
  prior: tuple[float, float] | None = None  # (a, b) if the population is a Beta distribution


def _beta(a: float, b: float) -> Population:
  return Population(lambda rng, M: rng.beta(a, b, M), (a, b))


def beta_populations() -> dict[str, Population]:
  """Jeffreys', flat, U-shaped as late in training, and hard."""
  return {f'Beta({a:g},{b:g})': _beta(a, b) for a, b in ((0.5, 0.5), (1, 1), (0.2, 0.2), (0.15, 0.6))}


@knobs.section
class StaticSetup(Setup):
  """Options of the static world."""

  tasks: int = knob(256, 'tasks M that share the rollouts', low=1)
  history: int = knob(8, 'rollouts of each task that the rules have seen', low=0)
  repeats: int = knob(64, 'draws of tasks and histories', low=2)
  value: str = knob('infogain', 'which is maximised', choices=tuple(value_lib.VALUES))
  nu: float = knob(2.0, "of the value 'snr'", above=0)


def static(populations: dict[str, Population], setup: StaticSetup) -> dict[str, Any]:
  """Compares the rules on each population.

  Returns:
    {population: {rule: {measure: [mean, half width of the 95 % interval]}}}. Of MEASURES, 'objective' is in per cent
    of the oracle's; the others are expected under the true rates. 'known prior' is the posterior under the true prior
    of a population that has one. 'X - paper' is a difference paired by repeat. '2 waves' and '3 waves' spend the
    posterior's budgets in waves, where the oracle's are of one; 'X / one wave' is in per cent of the posterior's.
  """
  result = {}
  for name, population in populations.items():
    judged = []
    for repeat in tqdm.trange(setup.repeats, desc=name, unit='repeat'):
      rng = np.random.default_rng((setup.seed, repeat))
      p_M = population.draw(rng, setup.tasks)
      stats = observed(p_M, setup.history, rng)
      budgets = rule_budgets(p_M, stats, population.prior, setup)
      in_waves = waves_spent(p_M, stats, rng.random((setup.tasks, setup.high)), setup)
      judged.append(judge(p_M, budgets, setup, in_waves))
    by_rule = {rule: np.array([measures[rule] for measures in judged]) for rule in judged[0]}
    for rule in ('posterior', 'known prior'):
      if rule in by_rule:
        by_rule[f'{rule} - paper'] = by_rule[rule] - by_rule['paper']
    for rule in in_waves:
      share = np.divide(by_rule[rule], by_rule['posterior'], out=np.ones_like(by_rule[rule]),
                        where=by_rule['posterior'] > 0)
      by_rule[f'{rule} / one wave'] = 100 * share
    result[name] = {rule: dict(zip(MEASURES, map(interval, x.T))) for rule, x in by_rule.items()}
  return result


def observed(p_M: np.ndarray, history: int, rng: np.random.Generator) -> TaskStats:
  """The statistics after `history` rollouts of each task."""
  M = len(p_M)
  task_R = np.repeat(np.arange(M), history)
  reward_R = rng.random(len(task_R)) < p_M[task_R]
  # One step only: there are no earlier forecasts that could be recalibrated.
  stats = estimate.init(M, groups=0)
  return estimate.observe(stats, np.arange(M), task_R, reward_R, np.ones(len(task_R)), discount=1.0)


def rule_budgets(p_M: np.ndarray, stats: TaskStats, prior: tuple[float, float] | None, setup: StaticSetup
                 ) -> dict[str, np.ndarray]:
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
    success_rates['known prior'] = Beta(stats.successes_I + prior[0], stats.failures_I + prior[1])
  budgets = {'uniform': _budgets(p_M, setup, setup.value, setup.nu, rule='uniform')}
  return budgets | {rule: _budgets(rate, setup, setup.value, setup.nu) for rule, rate in success_rates.items()}


def _budgets(success_rate: Array | Beta | Window, setup: Setup, value: str, nu: float,
             rule: str = 'knapsack') -> np.ndarray:
  """budget_M of `per_task` rollouts a task. All named values are concave, so 'greedy' is exact."""
  M = value_lib.check_success_rate(success_rate)
  return allocate.budgets(success_rate, M * setup.per_task, low=setup.low, high=setup.high, rule=rule, value=value,
                          nu=nu, solver='greedy')


def waves_spent(p_M: np.ndarray, stats: TaskStats, luck_MN: np.ndarray, setup: StaticSetup) -> dict[str, Spent]:
  """The posterior's budgets in WAVES, as far as the rollouts suffice for them."""
  M, posterior = len(p_M), estimate.posterior(stats, np.arange(len(p_M)))
  return {name: spend(posterior, p_M, luck_MN, alloc_of(setup, M, value=setup.value, nu=setup.nu, waves=waves))
          for name, waves in WAVES.items() if setup.per_task >= waves * -(-setup.low // waves)}


def alloc_of(setup: Setup, num_tasks: int, *, value: str, nu: float, waves: int = 1, rule: str = 'knapsack',
             **more: Any) -> knobs.Alloc:
  """The knobs of budgets of `per_task` rollouts a task. All named values are concave above 0: 'greedy' is exact."""
  return knobs.Alloc(**{
      'rule': rule, 'rollouts_per_step': num_tasks * setup.per_task, 'low': setup.low, 'high': setup.high,
      'value': value, 'nu': nu, 'waves': waves, 'solver': 'greedy'} | more)


class Spent(NamedTuple):
  """A step's rollouts. The measures are expected under the true rates, those of a wave after the verdicts before it."""

  budget_M: np.ndarray
  right_M: np.ndarray
  verdict_R: np.ndarray  # bool, those of a task side by side
  objective: float
  mixed_tasks: float
  gradient_ratio: float


def spend(forecast: Array | Beta | Window, p_M: np.ndarray, luck_MN: np.ndarray, alloc: knobs.Alloc, *,
          most_tasks: int | None = None, evidence_M: Array | None = None, due_M: Array | None = None) -> Spent:
  """Spends the rollouts of a step by a forecast of success rates, in alloc.waves waves.

  The failure rate that the value 'coba' reads is that of these tasks.

  Args:
    forecast: success rates that are believed; with more than one wave not a Window.
    p_M: the true ones.
    luck_MN: uniform in [0, 1): the n-th rollout of task m is right where luck_MN[m, n] < p_M[m].
    most_tasks, evidence_M, due_M: of `allocate.of_wave`.
  """
  N = luck_MN.shape[1]
  verdict_MN = luck_MN < p_M[:, None]
  within = lambda n_M: np.arange(N) < n_M[:, None]
  n_M, objective, known = np.zeros(len(p_M), int), 0.0, {'evidence_M': evidence_M}
  for wave in range(alloc.waves):
    right_M = (verdict_MN & within(n_M)).sum(axis=1)
    rate, group = forecast, Group(right_M, n_M - right_M) if wave else None
    if wave and isinstance(forecast, Beta):
      rate = Beta(forecast.a_M + right_M, forecast.b_M + n_M - right_M)
    more_M = allocate.of_wave(rate, alloc, wave=wave, group=group, most_tasks=most_tasks, due_M=due_M, **known)
    worth = lambda n_M: allocate.objective(p_M, n_M, alloc.value, alloc.nu, group=group, **known)
    objective += worth(more_M) - worth(np.zeros_like(more_M))
    mixed_M = (right_M > 0) & (right_M < n_M)
    mixed_M = mixed_M + value_lib.expected(p_M, more_M[:, None], 'mixed', group=group)[:, 0]
    n_M = n_M + more_M
  is_spent_MN = within(n_M)
  return Spent(n_M, (verdict_MN & is_spent_MN).sum(axis=1), verdict_MN[is_spent_MN], objective, float(mixed_M.sum()),
               float(n_M @ mixed_M / n_M.sum()))


def judge(p_M: np.ndarray, budgets: dict[str, np.ndarray], setup: StaticSetup,
          in_waves: Mapping[str, Spent] | None = None) -> dict[str, tuple[float, ...]]:
  """MEASURES of each rule's budgets, and of those in waves, by the true success rates."""
  best = allocate.objective(p_M, budgets['oracle'], setup.value, setup.nu)
  share = lambda objective: 100 * objective / best if best else 100.0  # where no task can be mixed, any rule is best

  def measures(budget_M):
    return (share(allocate.objective(p_M, budget_M, setup.value, setup.nu)),
            allocate.expected_mixed_tasks(p_M, budget_M), allocate.expected_gradient_ratio(p_M, budget_M))

  judged = {rule: measures(budget_M) for rule, budget_M in budgets.items()}
  return judged | {rule: (share(spent.objective), spent.mixed_tasks, spent.gradient_ratio)
                   for rule, spent in (in_waves or {}).items()}


def interval(x: Array) -> list[float]:
  """[mean, half width of the mean's 95 % interval], by Student's t."""
  x = np.asarray(x, float)
  half = statistics.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
  return [float(x.mean()), float(half)]


class Method(NamedTuple):
  """How a run chooses budgets and weighs rollouts."""

  estimate: str  # in ESTIMATES, or 'uniform' or 'dynamic', rules that need no estimate
  value: str
  nu: float
  advantage: str  # in ADVANTAGES
  candidates: int = 1  # tasks that a step considers, in units of those that it learns from


@knobs.section
class LearningSetup(Setup):
  """Options of the learning world."""

  tasks: int = knob(2048, 'tasks I in all', low=1)
  features: int = knob(128, 'shared features D', low=1)
  families: int = knob(8, 'families of tasks', low=1)
  alignment: float = knob(0.0, 'rho, the cosine of the features in a family', low=0, high=1)
  per_step: int = knob(128, 'tasks M of a step', low=1)
  low: int = knob(1, 'least rollouts that a task gets', low=1)
  high: int = knob(64, 'most rollouts that a task gets', low=1)
  steps: int = knob(1920, 'updates', low=1)
  length: float = knob(1.0, 'of an update', above=0)
  pass_discount: float = knob(0.75, 'share of the evidence that a pass over the tasks leaves', above=0, high=1)
  fitted_steps: int = knob(8, 'last steps that posteriors are recalibrated to; 0: they are not', low=0)
  seeds: int = knob(4, 'runs of each method', low=1)

  def conflicts(self):
    yield from super().conflicts()
    if self.per_step > self.tasks:
      yield f'per_step={self.per_step} is more than tasks={self.tasks}'


class World(NamedTuple):
  """The tasks of the learning world before training."""

  feature_ID: np.ndarray  # x_i
  start_I: np.ndarray  # logits b_i


def parse_method(text: str) -> Method:
  """'uniform:std', 'window:infogain:std', 'posterior:snr:2:loo': estimate, value, nu, advantage; '+candidates=2'."""
  try:
    name, candidates, number = text.partition('+candidates=')
    match name.split(':'):
      case 'uniform' | 'dynamic' as kind, advantage:
        method = Method(kind, 'infogain', 1.0, advantage, _DYNAMIC if kind == 'dynamic' else 1)
      case kind, 'snr', nu, advantage if kind in ESTIMATES:
        method = Method(kind, 'snr', float(nu), advantage)
      case kind, value, advantage if kind in ESTIMATES and value != 'snr':
        method = Method(kind, value, 1.0, advantage)
      case _:
        raise ValueError('of no such form')
    value_lib.check(method.value, method.nu)
    knobs.Grpo.check(advantage=method.advantage)
    if candidates and (method.estimate != 'posterior' or int(number) < 2):
      raise ValueError('not simulated')
  except ValueError:
    raise ValueError(
        f'--method {text!r} is not uniform:ADVANTAGE, dynamic:ADVANTAGE or ESTIMATE:VALUE[:NU]:ADVANTAGE, such as '
        f'window:infogain:std, posterior:snr:2:loo; estimates are {ESTIMATES}, values {tuple(value_lib.VALUES)}, '
        f"advantages {ADVANTAGES}; nu follows 'snr', +candidates=2 or more a posterior") from None
  return method._replace(candidates=int(number)) if candidates else method


def make_world(start: tuple[float, float] | Population, setup: LearningSetup, seed: int) -> World:
  """Tasks whose start logits have the mean and the standard deviation in `start`, or whose success rates are of it.

  Success rates of a population count as within 1/1000..999/1000; half the variance of their ranks is between families.
  """
  rng = np.random.default_rng((seed, 0))
  family_I = np.arange(setup.tasks) % setup.families
  if isinstance(start, Population):
    start_I = special.logit(np.clip(start.draw(rng, setup.tasks), 1 / 1000, 999 / 1000))
    rank_I = np.argsort(np.argsort(start_I, kind='stable')) + setup.tasks / 12 ** 0.5 * rng.normal(size=setup.tasks)
    family_I = np.argsort(np.argsort(rank_I, kind='stable')) * setup.families // setup.tasks
  directions = lambda num: rng.normal(size=(num, setup.features)) / np.sqrt(setup.features)
  feature_ID = (np.sqrt(setup.alignment) * directions(setup.families)[family_I]
                + np.sqrt(1 - setup.alignment) * directions(setup.tasks))
  if isinstance(start, Population):
    return World(feature_ID, start_I)
  # Quantiles of a normal distribution rather than draws, which would differ more from seed to seed.
  family_start = special.ndtri((np.arange(setup.families) + 0.5) / setup.families)
  between = _BETWEEN_FAMILIES if setup.families > 1 else 0.0
  spread_I = np.sqrt(between) * family_start[family_I] + np.sqrt(1 - between) * rng.normal(size=setup.tasks)
  mean, sd = start
  return World(feature_ID, mean + sd * spread_I)


def gradient(feature_MD: np.ndarray, p_M: np.ndarray, reward_R: np.ndarray, task_R: np.ndarray,
             kind: str, noise_D: np.ndarray, past: grpo.Past | None = None) -> np.ndarray:
  """G_D with advantages of the kind. noise_D: the noise of one rollout, scaled here to that of the sum."""
  advantage_R = np.asarray(_advantage(np.float32(reward_R), task_R, num_tasks=len(p_M), kind=kind, past=past), float)
  push_M = np.bincount(task_R, weights=advantage_R * (reward_R - p_M[task_R]), minlength=len(p_M))
  # A sum of independent normal noises is one normal noise of the summed variance.
  return push_M @ feature_MD + noise_D * np.sqrt(np.sum(advantage_R ** 2))


def _sampled(method: Method, setup: LearningSetup, stats: TaskStats, index_X: np.ndarray, p_X: np.ndarray,
             rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
  """index_M, task_R and reward_R that a step learns from, of the X tasks that it considers; all rollouts sampled."""
  M, N, knapsack = setup.per_step, setup.per_task, method.estimate in ESTIMATES
  if method.estimate == 'dynamic':  # batches of M tasks, until M groups are mixed; the others teach nothing
    reward_XN = (rng.random((len(p_X), N)) < p_X[:, None]).astype(float)
    is_mixed_X = np.ptp(reward_XN, axis=1) > 0
    mixed_Y = np.cumsum(is_mixed_X.reshape(-1, M).sum(axis=1))
    batches = 1 + min(int(np.searchsorted(mixed_Y, M)), len(mixed_Y) - 1)
    row_M = np.argsort(~is_mixed_X[:batches * M], kind='stable')[:M]
    return index_X[row_M], np.repeat(np.arange(M), N), reward_XN[row_M].ravel(), batches * M * N
  rate = estimate.success_rate(stats, index_X, method.estimate) if knapsack else np.full(M, 0.5)
  if len(p_X) > M:
    alloc = alloc_of(setup, M, value=method.value, nu=method.nu, low=0, solver='dp')
    budget_X = allocate.of_wave(rate, alloc, most_tasks=M, due_M=estimate.due(stats, index_X))
    row_M = allocate.chosen(budget_X, M)
    index_X, p_X, budget_M = index_X[row_M], p_X[row_M], budget_X[row_M]
  else:
    budget_M = _budgets(rate, setup, method.value, method.nu, rule='knapsack' if knapsack else 'uniform')
  task_R = np.repeat(np.arange(M), budget_M)
  return index_X, task_R, (rng.random(M * N) < p_X[task_R]).astype(float), M * N


def learn(world: World, method: Method, setup: LearningSetup, *, sigma: float, seed: int) -> np.ndarray:
  """The true mean success over all tasks, before the first step and after each.

  With the same seed all methods get the same tasks in the same order, and the same noise directions. 'dynamic' makes
  fewer steps, longer by the root of their rollouts: where noise rules, larger steps are then worth as much.
  """
  (I, D), M, R = world.feature_ID.shape, setup.per_step, setup.per_step * setup.per_task
  rng, considered = np.random.default_rng((seed, 1)), min(method.candidates * M, I // M * M)
  is_posterior = method.advantage == 'posterior'
  groups = setup.fitted_steps * M * (is_posterior or method.estimate == 'posterior')  # else nothing reads them
  logit_I, stats = world.start_I.copy(), estimate.init(I, groups=groups)
  success, spent = [special.expit(logit_I).mean()], [0]
  while spent[-1] < setup.steps * R:
    index_X = np.array(tasks.batch(range(I), len(spent) - 1, per_step=considered, seed=seed))
    index_M, task_R, reward_R, rollouts = _sampled(method, setup, stats, index_X, special.expit(logit_I[index_X]), rng)
    noise_D = rng.normal(size=D) * sigma / np.sqrt(D)
    past = grpo.Past(*estimate.reward(stats, estimate.posterior(stats, index_M))) if is_posterior else None
    p_M, kind = special.expit(logit_I[index_M]), method.advantage
    gradient_D = gradient(world.feature_ID[index_M], p_M, reward_R, task_R, kind, noise_D, past)
    if (norm := np.linalg.norm(gradient_D)) > 0:  # not if no group was mixed
      logit_I += setup.length * (rollouts / R) ** 0.5 / norm * (world.feature_ID @ gradient_D)
    if is_posterior or method.estimate in ESTIMATES:  # else nothing reads statistics
      stats = estimate.observe(stats, index_M, task_R, reward_R, np.ones(R), discount=setup.pass_discount)
    success.append(special.expit(logit_I).mean())
    spent.append(spent[-1] + rollouts)
  return np.interp(np.arange(setup.steps + 1), np.array(spent) / R, success)


def smooth(x: np.ndarray, window: int) -> np.ndarray:
  """Trailing means, of at most `window` points up to each point."""
  total = np.cumsum(np.pad(x, (1, 0)))
  start = np.maximum(np.arange(len(x)) + 1 - window, 0)
  return (total[1:] - total[start]) / (np.arange(len(x)) + 1 - start)


def share_needed(success: np.ndarray, baseline: np.ndarray) -> float | None:
  """The share of the baseline's rollouts after which its final success is reached; None if never.

  Both are (smoothed) successes before the first step and after each, interpolated linearly. The share is 0 if the
  baseline ended no better than it began.
  """
  reached = np.flatnonzero(success >= baseline[-1])
  if not len(reached):
    return None
  t = reached[0]
  if t == 0:
    return 0.0
  return float((t - (success[t] - baseline[-1]) / (success[t] - success[t - 1])) / (len(baseline) - 1))


def learning(methods: Sequence[str], starts: Sequence[tuple[float, float]], sigmas: Sequence[float],
             setup: LearningSetup) -> list[dict[str, Any]]:
  """Trains by BASELINE and by each method in each world.

  Returns:
    An object for each start and sigma: 'start', 'sigma' and, by method and seed, 'share' (`share_needed`) and
    'success_by_seed' (`learn`, a trailing mean over an epoch).

  Raises:
    ValueError: an unknown method, or a start or a sigma that is no such number.
  """
  parsed = {name: parse_method(name) for name in (BASELINE, *methods)}
  for number in (*sigmas, *(sd for _, sd in starts)):
    if not 0 <= number < np.inf:
      raise ValueError(f'--sigma and the SD of --start must be numbers of at least 0, not {number}')
  if not np.all(np.isfinite(starts)):
    raise ValueError(f'the MEAN of --start must be a number; it is one of {starts}')
  rows = []
  bar = tqdm.tqdm(total=len(starts) * len(sigmas) * setup.seeds * len(parsed), desc='learning', unit='run')
  for start, sigma in itertools.product(starts, sigmas):
    success = {name: [] for name in parsed}
    for seed in range(setup.seed, setup.seed + setup.seeds):
      world = make_world(start, setup, seed)
      for name, method in parsed.items():
        curve = learn(world, method, setup, sigma=sigma, seed=seed)
        success[name].append(smooth(curve, setup.tasks // setup.per_step))
        bar.update()
    share = {name: [share_needed(*pair) for pair in zip(runs, success[BASELINE])] for name, runs in success.items()}
    rows.append({'start': list(start), 'sigma': sigma, 'share': share,
                 'success_by_seed': {name: np.array(runs) for name, runs in success.items()}})
  bar.close()
  return rows
