"""A simulated world of many passes over a split, in which success rates move and the trainer's estimates follow them.

The success of task i of I at step t is, in log-odds,

    x_i + u_k + v_i min(t, drift_steps) + change [t >= change_step],    k = i mod strata, the task's stratum

where sigmoid(x_i) is drawn from Beta(a, b), u_k are quantiles of N(0, strata_spread^2) and v_i = drift * a lognormal of
mean 1 and deviation drift_spread of its logarithm. Budgets do not move success rates: in the world `learning` they do
(worlds.py). So all methods forecast the same rates, and differ by what they learnt of them.

A method is an estimate and the parts that it is used with (`parse`). With one seed all see the same tasks in the same
order, and the n-th rollout of a task in a step has the same luck. Beside each runs an exact Bayes filter that saw the
same verdicts and knows population and moves (`Filter`): no estimate can forecast better by what it saw.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from concurrent import futures
import itertools
import multiprocessing
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import special
import tqdm

from kr_jax import knobs
from kr_jax import tasks
from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.allocation import scores
from kr_jax.allocation import value as value_lib
from kr_jax.allocation import worlds
from kr_jax.allocation.value import Beta, Window
from kr_jax.knobs import knob
from kr_jax.types import Array

# Tasks of the split, tasks and rollouts a task of a step, most rollouts of a task: of the configs in configs/.
PRESETS = {
    'arithmetic': {'tasks': 1024, 'per_step': 64, 'per_task': 4, 'high': 64},
    'smollm2': {'tasks': 512, 'per_step': 16, 'per_task': 8, 'high': 32},
    'gsm8k': {'tasks': 7473, 'per_step': 64, 'per_task': 8, 'high': 128},
    'mbpp': {'tasks': 374, 'per_step': 64, 'per_task': 8, 'high': 128},
    'dapo': {'tasks': 17_398, 'per_step': 128, 'per_task': 8, 'high': 128},
    'paper': {'tasks': 17_398, 'per_step': 256, 'per_task': 8, 'high': 128},
}
ESTIMATES = ('uniform', 'window', 'discounted', 'recalibrated', 'known_prior', 'known_drift', 'oracle')
METHODS = ('uniform', 'window', 'discounted:.98:step', 'discounted:1', 'known_prior', 'recalibrated', 'known_drift')
PARTS = ('recalibrated', 'recalibrated+strata', 'recalibrated+prior', 'recalibrated+waves=2', 'recalibrated+waves=3',
         'recalibrated+candidates=2', 'recalibrated+value=variance', 'recalibrated+value=mixed',
         'recalibrated+value=hit', 'recalibrated+value=coba', 'recalibrated+value=snr',
         'recalibrated+value=snr+evidence')
MEASURES = ('objective', 'of_uniform', 'log_loss', 'lost', 'count_log_loss', 'brier', 'calibration', 'expected_ratio',
            'observed_ratio', 'expected_mixed', 'observed_mixed', 'unseen')
VISITS = ('before', 'first', 'second', 'third', 'later')  # since an abrupt change


@knobs.section
class PassesSetup(worlds.Setup):
  """Options of the world."""

  tasks: int = knob(1024, 'tasks I of the split', low=1)
  per_step: int = knob(64, 'tasks M of a step', low=1)
  passes: int = knob(3, 'passes over the split', low=1)
  measured: int = knob(1, 'passes at the end that are measured', low=1)
  a: float = knob(0.5, 'of the population Beta(a, b) of success rates', low=0.1)
  b: float = knob(0.5, 'of the population Beta(a, b) of success rates', low=0.1)
  drift: float = knob(0.0, 'by which the log-odds of a task rise in a step, on the mean of the tasks')
  drift_spread: float = knob(0.0, "deviation of the logarithm of tasks' drifts", low=0)
  drift_steps: int = knob(0, 'steps after which the drift ends; 0: it does not', low=0)
  change: float = knob(0.0, 'by which all log-odds rise at once')
  change_step: int = knob(0, 'step at which they do', low=0)
  strata: int = knob(1, 'strata of the tasks', low=1)
  strata_spread: float = knob(1.0, 'deviation of the log-odds between strata', low=0)
  prior_noise: float = knob(1.0, 'deviation of the log-odds of success rates known before, of +prior', above=0)
  prior_rollouts: float = knob(4.0, 'rollouts that such a rate is worth', above=0)
  lag: int = knob(0, 'steps that verdicts come late; 0, as in kr_jax: the next step knows them', low=0)
  value: str = knob('infogain', 'which is maximised, unless a method says +value', choices=tuple(value_lib.VALUES))
  nu: float = knob(2.0, "of the value 'snr'", above=0)
  seeds: int = knob(4, 'runs of each method', low=2)

  def conflicts(self):
    yield from super().conflicts()
    if self.per_step > self.tasks:
      yield f'per_step={self.per_step} is more than tasks={self.tasks}'
    if self.measured > self.passes:
      yield f'measured={self.measured} is more than passes={self.passes}'
    if self.change and not 0 < self.change_step < self.steps:
      yield (f'change_step={self.change_step} must lie in 1..{self.steps - 1}, as there are {self.steps} steps; set '
             'it, or change=0')
    if self.strata > self.tasks:
      yield f'strata={self.strata} is more than tasks={self.tasks}'

  @property
  def steps_a_pass(self) -> int:
    return self.tasks // self.per_step

  @property
  def steps(self) -> int:
    return self.passes * self.steps_a_pass


class Method(NamedTuple):
  """How forecasts are made and used."""

  estimate: str  # in ESTIMATES
  discount: float = 0.75  # share of the evidence that a pass leaves, or a step
  is_by_step: bool = False
  fitted_steps: int = 8  # steps that forecasts are recalibrated to; 0: they are not
  strata: bool = False  # whether a stratum has a prior of its own
  prior: bool = False  # whether rates known before training are used
  waves: int = 1
  candidates: int = 1  # tasks that a step considers, in units of those that get rollouts
  value: str = ''  # '': the setup's
  evidence: bool = False  # whether the value 'snr' counts the evidence from before the step


def parse(text: str) -> Method:
  """A method of its name: ESTIMATE[:NUMBER..][+PART..].

    uniform             uniform budgets; forecasts are the mean of all verdicts so far
    window              the paper's estimate
    discounted:D        posterior of evidence of which a pass leaves the share D; discounted:D:step: a step
    recalibrated:D:T    the same, recalibrated to the last T steps; the default is that of training, .75 and 8
    known_prior         undiscounted posterior with the population as its prior
    known_drift         exact posterior, of one who knows the population and every move (`Filter`)
    oracle              knows success rates

  Parts: strata, prior, evidence, waves=2, candidates=2 (times as many), value=NAME.

  Raises:
    ValueError: a text of no such form.
  """
  name, *parts = text.split('+')
  kind, *numbers = name.split(':')
  options: dict[str, Any] = {}
  try:
    match kind, numbers:
      case 'discounted', [discount, *rest] if rest in ([], ['step']):
        options = {'discount': float(discount), 'is_by_step': bool(rest), 'fitted_steps': 0}
      case 'recalibrated', [] | [_] | [_, _]:
        options = dict(zip(('discount', 'fitted_steps'), (f(x) for f, x in zip((float, int), numbers))))
      case 'uniform' | 'window' | 'known_prior' | 'known_drift' | 'oracle', []:
        options = {'discount': 1.0, 'fitted_steps': 0}
      case _:
        raise ValueError('of no such form')
    for part in parts:
      match part.split('='):
        case ['strata' | 'prior' | 'evidence' as flag]:
          options[flag] = True
        case ['waves' | 'candidates' as count, number]:
          options[count] = int(number)
        case 'value', value:
          options['value'] = value
        case _:
          raise ValueError('no such part')
    method = Method(kind, **options)
    if not (0 < method.discount <= 1 and method.fitted_steps >= 0 and method.candidates >= 1):
      raise ValueError('out of bounds')
    knobs.Alloc(value=method.value or 'infogain', waves=method.waves,
                estimate='window' if kind == 'window' else 'posterior')
    if method.waves > 1 and (kind == 'uniform' or method.candidates > 1):
      raise ValueError('not simulated')
  except ValueError:
    raise ValueError(
        f'--method {text!r} is not ESTIMATE[:NUMBER][+PART], such as recalibrated, recalibrated:.9:4, '
        f'discounted:.98:step, recalibrated+strata+waves=2; estimates are {ESTIMATES}, parts strata, prior, evidence, '
        f'waves=2 or 3 (not of uniform and window, nor with candidates), candidates=NUMBER and value=NAME, of '
        f'{tuple(value_lib.VALUES)}; discounts lie above 0, and at 1 at the most') from None
  return method


class World(NamedTuple):
  """The tasks, and how they move."""

  start_I: np.ndarray  # log-odds x_i of the population
  stratum_I: np.ndarray
  offset_I: np.ndarray  # u_k of each task's stratum
  slope_I: np.ndarray  # v_i
  known_I: np.ndarray  # log-odds of the success rates known before training
  setup: PassesSetup

  def moved(self, step: int, index_M: np.ndarray) -> np.ndarray:
    """By how much the log-odds of tasks differ from x_i at a step."""
    setup = self.setup
    drifted = min(step, setup.drift_steps) if setup.drift_steps else step
    return self.offset_I[index_M] + self.slope_I[index_M] * drifted + setup.change * (step >= setup.change_step)

  def rates(self, step: int, index_M: np.ndarray) -> np.ndarray:
    return special.expit(self.start_I[index_M] + self.moved(step, index_M))


def make_world(setup: PassesSetup, seed: int) -> World:
  rng = np.random.default_rng((seed, 0))
  I = setup.tasks
  # A ratio of gamma variables has the log-odds of a beta variable, also where that rounds to 0 or 1.
  start_I = np.log(rng.gamma(setup.a, size=I)) - np.log(rng.gamma(setup.b, size=I))
  stratum_I = np.arange(I) % setup.strata
  quantile_K = special.ndtri((np.arange(setup.strata) + 0.5) / setup.strata)
  offset_I = setup.strata_spread * quantile_K[stratum_I]
  spread = setup.drift_spread
  slope_I = setup.drift * np.exp(spread * rng.normal(size=I) - spread ** 2 / 2)
  known_I = start_I + offset_I + setup.prior_noise * rng.normal(size=I)
  return World(start_I, stratum_I, offset_I, slope_I, known_I, setup)


class Filter:
  """The exact posterior of each task's success rate, of one who knows the population and every move.

  The posterior of x_i stands on a grid of log-odds, whose nodes cover all but about e^-18 of the population on either
  side. It is handed on as the Beta distribution of its mean and variance.
  """

  _DISTANCE = 0.1  # between nodes: sums are right to 1e-6 of posteriors of up to 500 rollouts, of deviation .09

  def __init__(self, world: World, *, knows_prior: bool = False):
    self._world, setup = world, world.setup
    self._node_Z = np.arange(-18 / setup.a, 18 / setup.b, self._DISTANCE)
    log_Z = setup.a * special.log_expit(self._node_Z) + setup.b * special.log_expit(-self._node_Z)
    self._log_IZ = np.repeat(np.float32(log_Z)[None], setup.tasks, axis=0)
    if knows_prior:
      known_I = (world.known_I - world.offset_I)[:, None]
      self._log_IZ -= np.float32((self._node_Z - known_I) ** 2 / (2 * setup.prior_noise ** 2))

  def forecast(self, step: int, index_M: np.ndarray) -> Beta:
    """The Beta distributions of the posteriors' means and variances."""
    log_MZ = self._log_IZ[index_M].astype(float)
    weight_MZ = np.exp(log_MZ - log_MZ.max(axis=1, keepdims=True))
    weight_MZ /= weight_MZ.sum(axis=1, keepdims=True)
    p_MZ = special.expit(self._node_Z + self._world.moved(step, index_M)[:, None])
    mean_M, rest_M = (weight_MZ * p_MZ).sum(axis=1), (weight_MZ * (1 - p_MZ)).sum(axis=1)
    variance_M = (weight_MZ * (p_MZ - mean_M[:, None]) ** 2).sum(axis=1)
    total_M = np.maximum(mean_M * rest_M / np.maximum(variance_M, 1e-300) - 1, 1e-3)
    return Beta(np.maximum(mean_M * total_M, 1e-9), np.maximum(rest_M * total_M, 1e-9))

  def observe(self, step: int, index_M: np.ndarray, task_R: np.ndarray, verdict_R: np.ndarray) -> None:
    right_M, count_M = (np.bincount(task_R, weights=x_R, minlength=len(index_M))[:, None]
                        for x_R in (verdict_R, np.ones(len(task_R))))
    log_odds_MZ = self._node_Z + self._world.moved(step, index_M)[:, None]
    # log_expit(x) = x + log_expit(-x)
    self._log_IZ[index_M] += np.float32(right_M * log_odds_MZ + count_M * special.log_expit(-log_odds_MZ))
    self._log_IZ[index_M] -= self._log_IZ[index_M].max(axis=1, keepdims=True)


class Estimator:
  """What a method knows of tasks: `Filter`, true rates, or the trainer's statistics."""

  def __init__(self, method: Method, world: World):
    setup = world.setup
    self._method, self._world = method, world
    self._stats = estimate.init(
        setup.tasks, groups=method.fitted_steps * setup.per_step,
        stratum_I=world.stratum_I if method.strata else None,
        prior_rate_I=special.expit(world.known_I) if method.prior else None, prior_rollouts=setup.prior_rollouts)
    self._filter = Filter(world, knows_prior=method.prior) if method.estimate == 'known_drift' else None

  def forecast(self, step: int, index_M: np.ndarray) -> Beta | Window | np.ndarray:
    stats, setup = self._stats, self._world.setup
    right_M, wrong_M = stats.successes_I[index_M], stats.failures_I[index_M]
    match self._method.estimate:
      case 'known_drift':
        return self._filter.forecast(step, index_M)
      case 'oracle':
        return self._world.rates(step, index_M)
      case 'known_prior':
        return Beta(right_M + setup.a, wrong_M + setup.b)
      case 'uniform':
        right, wrong = stats.successes_I.sum(), stats.failures_I.sum()
        return np.full(len(index_M), (right + 1) / (right + wrong + 2))
      case 'window':
        return estimate.window(stats, index_M)
    return estimate.posterior(stats, index_M)

  def due(self, index_M: np.ndarray) -> np.ndarray:
    """bool, the tasks of which too little is known to leave them out, if not all get rollouts."""
    return estimate.due(self._stats, index_M)

  def observe(self, step: int, index_M: np.ndarray, task_R: np.ndarray, verdict_R: np.ndarray) -> None:
    if self._filter:
      self._filter.observe(step, index_M, task_R, verdict_R)
    elif self._method.estimate != 'oracle':
      discount = self._method.discount ** (self._world.setup.tasks / len(index_M) if self._method.is_by_step else 1)
      self._stats = estimate.observe(
          self._stats, index_M, task_R, verdict_R, np.ones(len(task_R)), discount=discount)


def follow(world: World, method: Method, *, seed: int, estimator: Any = None) -> dict[str, float]:
  """MEASURES of one run; and after an abrupt change `lost` by VISITS. estimator: like Estimator; None: the method's."""
  setup = world.setup
  I, M = setup.tasks, setup.per_step
  candidates = min(method.candidates * M, I)
  alloc = worlds.alloc_of(
      setup, M, value=method.value or setup.value, nu=setup.nu, waves=method.waves,
      rule='uniform' if method.estimate == 'uniform' else 'knapsack', low=0 if candidates > M else setup.low,
      solver='dp' if candidates > M or method.evidence else 'greedy')  # of values that may not be concave
  estimator, exact = estimator or Estimator(method, world), Filter(world, knows_prior=method.prior)
  seen_I, late, by_visit = np.full(I, -1), collections.deque(), collections.defaultdict(list)
  visits_I, longest, measured = np.zeros(I, int), 0, []
  for step in range(setup.steps):
    index_M = np.array(tasks.batch(range(I), step, per_step=candidates, seed=seed))
    p_M, forecast = world.rates(step, index_M), estimator.forecast(step, index_M)
    best = exact.forecast(step, index_M)
    luck_MN = np.random.default_rng((seed, 1, step)).random((candidates, setup.high))
    evidence_M = forecast.a_M + forecast.b_M if method.evidence and isinstance(forecast, Beta) else None
    more = {'most_tasks': M if candidates > M else None, 'evidence_M': evidence_M}
    due_M = estimator.due(index_M) if candidates > M and method.estimate == 'recalibrated' else None
    spent = worlds.spend(forecast, p_M, luck_MN, alloc, due_M=due_M, **more)
    count_M = spent.budget_M
    if step >= setup.steps - setup.measured * setup.steps_a_pass:
      oracle = worlds.spend(p_M, p_M, luck_MN, alloc.replace(waves=1, rule='knapsack'), **more)
      uniform = worlds.spend(p_M[:M], p_M[:M], luck_MN[:M], alloc.replace(waves=1, rule='uniform'),
                             evidence_M=None if evidence_M is None else evidence_M[:M])
      measured.append((spent.objective, oracle.objective, uniform.objective,
                       *_scores(forecast, best, p_M, spent, alloc.waves)))
    if setup.change:
      since_M = np.where(step < setup.change_step, 0, np.minimum(visits_I[index_M], len(VISITS) - 2) + 1)
      for visit in range(len(VISITS)) if step >= setup.change_step - setup.steps_a_pass else ():
        m = since_M == visit
        by_visit[visit].append((count_M[m].sum(), _lost(forecast, best, p_M, count_M, m) * count_M[m].sum()))
      visits_I[index_M] += (count_M > 0) & (step >= setup.change_step)
    here_M = index_M[count_M > 0]
    longest, seen_I[here_M] = max(longest, (step - seen_I[here_M]).max()), step
    chosen_M = allocate.chosen(count_M, M)  # of the candidates: the tasks that training knows of after the step
    late.append((step, index_M[chosen_M], np.repeat(np.arange(M), count_M[chosen_M]), spent.verdict_R))
    if len(late) > setup.lag:
      verdicts = late.popleft()
      estimator.observe(*verdicts)
      exact.observe(*verdicts)
  longest = max(longest, (setup.steps - seen_I).max())
  value, oracle, uniform, *rest = np.mean(measured, axis=0)
  result = dict(zip(MEASURES, (100 * value / oracle, 100 * value / uniform, *rest, longest * M / I), strict=True))
  for visit, pairs in by_visit.items():
    count, lost = np.sum(pairs, axis=0)
    result[VISITS[visit]] = lost / count if count else np.nan
  return {name: float(x) for name, x in result.items()}


def _lost(forecast: Beta | Window | np.ndarray, best: Beta, p_M: np.ndarray, count_M: np.ndarray, m: Array) -> float:
  """The log loss of the forecast less that of the exact filter, expected under the true rates, of some tasks."""
  loss = lambda q_M: scores.log_loss(q_M[m], (count_M * p_M)[m], count_M[m])
  return loss(_mean(forecast)) - loss(_mean(best)) if count_M[m].sum() else 0.0


def _mean(forecast: Beta | Window | np.ndarray) -> np.ndarray:
  return forecast if isinstance(forecast, np.ndarray) else estimate.mean_rate(forecast)


def _scores(forecast: Beta | Window | np.ndarray, best: Beta, p_M: np.ndarray, spent: worlds.Spent, waves: int
            ) -> tuple[float, ...]:
  """MEASURES of one step, from 'log_loss' to 'observed_mixed'.

  Log losses and Brier scores are less those of an oracle that knows the rates. All but the log loss of counts are
  expected under the true rates.
  """
  n_M, right_M = spent.budget_M, spent.right_M
  rate = _mean(forecast) if isinstance(forecast, Window) else forecast
  q_M, expected_M, R = _mean(forecast), n_M * p_M, n_M.sum()
  of_one_wave = waves == 1
  mixed_M = (right_M > 0) & (right_M < n_M)
  return (scores.log_loss(q_M, expected_M, n_M) - scores.log_loss(p_M, expected_M, n_M),
          _lost(forecast, best, p_M, n_M, slice(None)),
          scores.count_log_loss(rate, right_M, n_M) - scores.count_log_loss(p_M, right_M, n_M),
          scores.brier(q_M, expected_M, n_M) - scores.brier(p_M, expected_M, n_M),
          n_M @ (q_M - p_M) / R,
          allocate.expected_gradient_ratio(rate, n_M) if of_one_wave else np.nan, n_M @ mixed_M / R,
          allocate.expected_mixed_tasks(rate, n_M) if of_one_wave else np.nan, mixed_M.sum())


def _run(job: tuple[str, int, PassesSetup]) -> dict[str, float]:
  name, seed, setup = job
  return follow(make_world(setup, seed), parse(name), seed=seed)


def _on_cpu() -> None:
  jax.config.update('jax_platforms', 'cpu')


def passes(methods: Sequence[str], setup: PassesSetup, *, jobs: int = 1) -> dict[str, dict[str, list[float]]]:
  """Follows each method through the same worlds.

  Args:
    methods: as of `parse`.
    jobs: processes that share the runs.

  Returns:
    {method: {measure: [mean, half width of the 95 % interval over the seeds]}}, for MEASURES and, after an abrupt
    change, 'lost' by VISITS. 'objective' is in per cent of what an oracle's budgets have that knows the success rates
    and has one wave; 'of_uniform' in per cent of uniform budgets of the step's first tasks; both of the value that the
    method's budgets maximise. Losses are in nats a rollout, less the oracle's; 'lost' is less the exact filter's.
    'unseen' is the longest that a task went without rollouts, in passes. With waves what is expected is nan.

  Raises:
    ValueError: an unknown method, or one that is named twice.
  """
  for name in methods:
    parse(name)
  if len(set(methods)) < len(methods):
    raise ValueError(f'--method names {max(methods, key=list(methods).count)!r} twice; name each method once')
  if jobs < 1:
    raise ValueError(f'--jobs {jobs} must be at least 1')
  runs = [(name, seed, setup) for name, seed in itertools.product(
      methods, range(setup.seed, setup.seed + setup.seeds))]
  bar = lambda done: tqdm.tqdm(done, total=len(runs), desc='passes', unit='run')
  if jobs == 1:
    measured = list(bar(map(_run, runs)))
  else:
    # A solver of three numbers waits for the threads of its linear algebra, on cores that all have a run of their own.
    os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
    context = multiprocessing.get_context('spawn')  # jax has threads, which a fork would lose
    with futures.ProcessPoolExecutor(jobs, context, initializer=_on_cpu) as pool:
      measured = list(bar(pool.map(_run, runs)))
  by_method = {name: measured[i * setup.seeds:(i + 1) * setup.seeds] for i, name in enumerate(methods)}
  return {name: {measure: worlds.interval([run[measure] for run in of_seeds]) for measure in of_seeds[0]}
          for name, of_seeds in by_method.items()}
