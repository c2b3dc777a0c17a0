"""Compares estimates of success rates: on recorded verdicts of real runs, and in simulated worlds.

    .venv/bin/python -m tests.benchmarks.estimates                        # the records of tests/data/verdicts (a minute)
    .venv/bin/python -m tests.benchmarks.estimates --seeds 20 --jobs 2    # simulated worlds too

Of a record each estimate sees the verdicts of a step after it forecast them. A record holds what uniform or adaptive
budgets gave, so forecasts are judged, not budgets: by the likelihood of the mean and of the counts (nats a rollout; of
the mean and the spread), and by the share of rollouts in mixed groups that is expected, quarter by quarter, beside what
was observed. In a simulated world (kr_jax/allocation/passes.py) budgets follow from the estimate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent import futures
import functools
import json
import multiprocessing
import os
import pathlib
from typing import Any

import jax
import numpy as np
from scipy import optimize
from scipy import special
import tqdm

from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.allocation import passes
from kr_jax.allocation import recalibrate
from kr_jax.allocation import scores
from kr_jax.allocation import worlds
from kr_jax.allocation.value import Beta, Window

RECORDS = pathlib.Path(__file__).parents[1] / 'data' / 'verdicts'
WORLDS = {  # options of passes.PassesSetup
    'drift +.05 a step': {'per_task': 4, 'passes': 8, 'measured': 7, 'drift': 0.05},
    'no drift': {'per_task': 4, 'passes': 8, 'measured': 7},
    '+.02, slopes lognormal(1)': {'per_task': 4, 'passes': 8, 'measured': 7, 'drift': 0.02, 'drift_spread': 1.0},
    '+.05 for 60 steps': {'per_task': 4, 'passes': 8, 'measured': 7, 'drift': 0.05, 'drift_steps': 60},
}


class Posterior:
  """The trainer's statistics."""

  def __init__(self, tasks: int, per_step: int, stratum_I: np.ndarray | None = None, *, discount: float = 0.75,
               by_step: bool = False, steps: int = 8):
    self.discount = discount ** (tasks / per_step) if by_step else discount
    self.stats = estimate.init(tasks, groups=steps * per_step, stratum_I=stratum_I)

  def forecast(self, step: int, index_M: np.ndarray) -> Beta | Window:
    return estimate.posterior(self.stats, index_M)

  def observe(self, step: int, index_M: np.ndarray, task_R: np.ndarray, verdict_R: np.ndarray) -> None:
    self.stats = estimate.observe(
        self.stats, index_M, task_R, verdict_R, np.ones(len(task_R)), discount=self.discount)


class PaperWindow(Posterior):

  def forecast(self, step, index_M):
    return estimate.window(self.stats, index_M)


class Constant(Posterior):
  """The mean of all verdicts so far."""

  def forecast(self, step, index_M):
    right, wrong = self.stats.successes_I.sum(), self.stats.failures_I.sum()
    return Beta(*np.outer(((right + 1) / (right + wrong + 2), (wrong + 1) / (right + wrong + 2)), np.ones(len(index_M))))


class MeanRecalibrated(Posterior):
  """The mean alone is fitted, by logistic regression on the last 8 steps; the concentration stays."""

  def __init__(self, tasks, per_step, stratum_I=None):
    super().__init__(tasks, per_step, discount=0.98, by_step=True)

  def forecast(self, step, index_M):
    seen = self.stats.forecast_H4[self.stats.forecast_H4[:, 3] > 0]

    def loss(theta):
      z = theta[0] + theta[1] * seen[:, 0]
      penalty = theta - (0, 1)
      return (2 * penalty @ penalty - seen[:, 2] @ special.log_expit(z) - (seen[:, 3] - seen[:, 2])
              @ special.log_expit(-z))

    a, b = optimize.minimize(loss, (0.0, 1.0)).x if len(seen) else (0.0, 1.0)
    return recalibrate.apply(estimate.evidence(self.stats, index_M), np.array([a, b, 1.0, 1.0]))


class Bank:
  """Posteriors of several discounts, mixed by how well each forecast the counts of the last steps."""

  DISCOUNTS = (0.3, 0.6, 0.75, 0.9, 1.0)

  def __init__(self, tasks, per_step, stratum_I=None):
    self.members = [Posterior(tasks, per_step, stratum_I, discount=discount) for discount in self.DISCOUNTS]
    self.log_weight = np.zeros(len(self.members))

  def forecast(self, step, index_M):
    weight = special.softmax(self.log_weight)[:, None]
    found = [member.forecast(step, index_M) for member in self.members]
    mean, total = (np.stack(x) for x in zip(*((beta.a_M / (beta.a_M + beta.b_M), beta.a_M + beta.b_M)
                                              for beta in found)))
    mean_M = (weight * mean).sum(axis=0)
    variance_M = (weight * (mean * (1 - mean) / (total + 1) + (mean - mean_M) ** 2)).sum(axis=0)
    total_M = np.maximum(mean_M * (1 - mean_M) / variance_M - 1, 1e-3)
    return Beta(mean_M * total_M, (1 - mean_M) * total_M)

  def observe(self, step, index_M, task_R, verdict_R):
    count_M, right_M = (np.bincount(task_R, x_R, len(index_M)) for x_R in (np.ones(len(task_R)), verdict_R))
    for k, member in enumerate(self.members):
      self.log_weight[k] = 0.95 * self.log_weight[k] - len(task_R) * scores.count_log_loss(
          member.forecast(step, index_M), right_M, count_M)
      member.observe(step, index_M, task_R, verdict_R)
    self.log_weight -= self.log_weight.max()


class DriftFilter:
  """A Kalman filter of log-odds: each has a normal posterior, which widens by NOISE a step; what all have in common of
  their moves is a drift, followed by the mean innovation. A visit is a step of Newton's method to the mode."""

  NOISE, RATE = 2e-3, 0.1

  def __init__(self, tasks, per_step, stratum_I=None):
    self.mean_I, self.variance_I = np.zeros(tasks), np.full(tasks, 6.0)
    self.seen_I, self.moved_I, self.moved, self.drift = np.zeros(tasks, int), np.zeros(tasks), 0.0, 0.0

  def _now(self, step, index_M):
    unseen_M = self.variance_I[index_M] >= 6.0
    age_M = step - self.seen_I[index_M]
    mean_M = self.mean_I[index_M] + self.moved - self.moved_I[index_M]
    return np.where(unseen_M, self.moved, mean_M), np.minimum(self.variance_I[index_M] + self.NOISE * age_M, 6.0)

  def forecast(self, step, index_M):
    mean_M, variance_M = self._now(step, index_M)
    p_M = special.expit(mean_M / np.sqrt(1 + np.pi * variance_M / 8))
    spread_M = np.minimum((p_M * (1 - p_M)) ** 2 * variance_M, 0.8 * p_M * (1 - p_M))
    total_M = np.maximum(p_M * (1 - p_M) / spread_M - 1, 0.25)
    return Beta(np.maximum(p_M * total_M, 1e-3), np.maximum((1 - p_M) * total_M, 1e-3))

  def observe(self, step, index_M, task_R, verdict_R):
    count_M, right_M = (np.bincount(task_R, x_R, len(index_M)) for x_R in (np.ones(len(task_R)), verdict_R))
    mean_M, variance_M = self._now(step, index_M)
    mode_M = mean_M.copy()
    for _ in range(8):
      p_M = special.expit(mode_M)
      curvature_M = 1 / variance_M + count_M * p_M * (1 - p_M)
      mode_M += np.clip((right_M - count_M * p_M - (mode_M - mean_M) / variance_M) / curvature_M, -1, 1)
    self.mean_I[index_M], self.variance_I[index_M] = mode_M, np.minimum(1 / curvature_M, 5.9)
    age_M = step - self.seen_I[index_M]
    innovation = np.sum((mode_M - mean_M) / variance_M) / np.sum(np.maximum(age_M, 1) / variance_M)
    self.drift += self.RATE * innovation
    self.moved_I[index_M], self.seen_I[index_M] = self.moved, step
    self.moved += self.drift


Estimator = Posterior | Bank | DriftFilter
ESTIMATES: dict[str, Callable[..., Estimator]] = {
    'constant': functools.partial(Constant, discount=1.0, steps=0),
    "the paper's window": functools.partial(PaperWindow, steps=0),
    'discount .98 a step': functools.partial(Posterior, discount=0.98, by_step=True, steps=0),
    'undiscounted': functools.partial(Posterior, discount=1.0, steps=0),
    'mean recalibrated': MeanRecalibrated,
    'mean and spread (default)': Posterior,
    '.. discount .9 a pass': functools.partial(Posterior, discount=0.9),
    '.. discount .5 a pass': functools.partial(Posterior, discount=0.5),
    '.. fitted to 4 steps': functools.partial(Posterior, steps=4),
    'bank of discounts': Bank,
    'filter with drift': DriftFilter,
}


def replay(record: dict[str, np.ndarray], make: Callable[..., Estimator]) -> dict[str, Any]:
  """How well an estimate forecasts a record, over the run and by quarter."""
  index_TM, right_TM = record['index_TM'].astype(int), record['right_TM'].astype(int)
  count_TM = right_TM + record['wrong_TM']
  difficulty_I = record['difficulty_I'].astype(int)
  estimator = make(len(difficulty_I), index_TM.shape[1], np.unique(difficulty_I, return_inverse=True)[1])
  by_step = []
  for step, (index_M, right_M, count_M) in enumerate(zip(index_TM, right_TM, count_TM)):
    found = estimator.forecast(step, index_M)
    p_M = estimate.mean_rate(found)
    rate = p_M if isinstance(found, Window) else found
    is_mixed_M = (right_M > 0) & (right_M < count_M)
    by_step.append((count_M.sum(), scores.log_loss(p_M, right_M, count_M), scores.brier(p_M, right_M, count_M),
                    scores.count_log_loss(np.clip(rate, 1e-6, 1 - 1e-6) if rate is p_M else rate, right_M, count_M),
                    allocate.expected_gradient_ratio(rate, np.maximum(count_M, 1)), count_M @ is_mixed_M / count_M.sum()))
    task_R = np.repeat(np.arange(len(index_M)), count_M)
    number_R = np.arange(len(task_R)) - np.repeat(np.cumsum(count_M) - count_M, count_M)
    estimator.observe(step, index_M, task_R, (number_R < right_M[task_R]).astype(float))
  rollouts_T, *losses, expected_T, observed_T = np.array(by_step).T
  quarters = lambda x_T: [float(x.mean()) for x in np.array_split(x_T, 4)]
  return {**dict(zip(('log_loss', 'brier', 'count_log_loss'), (float(rollouts_T @ x / rollouts_T.sum()) for x in losses))),
          'expected': quarters(expected_T), 'observed': quarters(observed_T)}


def replay_all(folder: pathlib.Path) -> dict[str, dict[str, dict[str, Any]]]:
  """By run and estimate the means over the seeds of a run."""
  runs: dict[str, list[dict[str, np.ndarray]]] = {}
  for path in sorted(folder.glob('*.npz')):
    runs.setdefault(path.stem.rpartition('_')[0], []).append(dict(np.load(path)))
  result = {}
  for name, records in runs.items():
    result[name] = {}
    for kind, make in ESTIMATES.items():
      found = [replay(record, make) for record in records]
      result[name][kind] = {measure: np.mean([f[measure] for f in found], axis=0).tolist() for measure in found[0]}
  return result


def _simulate(job: tuple[str, str, int]) -> dict[str, float]:
  world, kind, seed = job
  setup = passes.PassesSetup(**WORLDS[world])
  estimator = ESTIMATES[kind](setup.tasks, setup.per_step)
  return passes.follow(passes.make_world(setup, seed), passes.parse('recalibrated'), seed=seed, estimator=estimator)


def _on_cpu() -> None:
  jax.config.update('jax_platforms', 'cpu')


def simulate(names: list[str], seeds: int, jobs: int) -> dict[str, dict[str, dict[str, list[float]]]]:
  """By world and estimate, each measure's mean and half width of the 95 % interval over the seeds."""
  work = [(world, kind, seed) for world in names for kind in ESTIMATES for seed in range(seeds)]
  os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
  with futures.ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn'), initializer=_on_cpu) as pool:
    found = dict(zip(work, tqdm.tqdm(pool.map(_simulate, work), total=len(work), unit='run')))
  return {world: {kind: {measure: worlds.interval([found[world, kind, seed][measure] for seed in range(seeds)])
                         for measure in ('objective', 'lost', 'log_loss', 'calibration')}
                  for kind in ESTIMATES} for world in names}


def table(result: dict[str, Any]) -> str:
  lines = []
  shown = lambda x: ' '.join(f'{y:.2f}' for y in x)
  for name, by_kind in result['records'].items():
    observed = next(iter(by_kind.values()))['observed']
    lines += ['', f'{name}: gradient ratio observed by quarter {shown(observed)}',
              f'  {"":27} {"log loss":>9} {"Brier":>7} {"of counts":>10}   expected']
    lines += [f'  {kind:27} {x["log_loss"]:9.4f} {x["brier"]:7.4f} {x["count_log_loss"]:10.4f}   {shown(x["expected"])}'
              for kind, x in by_kind.items()]
  for name, by_kind in result.get('worlds', {}).items():
    lines += ['', f'{name}', f'  {"":27} {"objective, % of oracle":>24} {"nats lost to a filter":>24} {"calibration":>18}']
    cell = lambda pair, digits: f'{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}'
    lines += [f'  {kind:27} {cell(x["objective"], 2):>24} {cell(x["lost"], 4):>24} {cell(x["calibration"], 3):>18}'
              for kind, x in by_kind.items()]
  return '\n'.join(lines[1:])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--records', type=pathlib.Path, default=RECORDS, help='folder of tests/record_verdicts.py')
  parser.add_argument('--seeds', type=int, default=0, help='of simulated worlds; 0: none')
  parser.add_argument('--worlds', nargs='+', choices=list(WORLDS), default=list(WORLDS), metavar='WORLD')
  parser.add_argument('--jobs', type=int, default=1)
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  _on_cpu()
  result = {'records': replay_all(args.records)}
  if args.seeds:
    result['worlds'] = simulate(args.worlds, args.seeds, args.jobs)
  print(table(result))
  if args.json:
    print(json.dumps(result))


if __name__ == '__main__':
  main()
