"""What a rule would need of uniform budgets' rollouts, forecast for a run by the world `learning` (worlds.py).

The world has the run's population of success rates, its rollouts a task, bounds and passes over the split, at a size of
seconds: fewer tasks a step and fewer steps. Two things are fitted to the run:

    nu       so that a step has the signal-to-noise of the run's steps (`batch_signal_to_noise`)
    length   so that uniform budgets close the share of what is missing of success that the run says (`lift`)

The signal of a step is the mean over rollouts of its gradient, given its tasks; the noise is all that other rollouts of
the same tasks would change. With leave-one-out advantages a task of N rollouts pushes by N s^2, s^2 the sample variance
of its N verdicts, and with q = p (1-p), F families, rho the cosine of features in a family:

    signal = M N^2 [E q^2 + rho (M/F - 1) (E q)^2]
    noise  = M N^2 [E var(s^2) + nu E q / (N-1)],    var(s^2) = [q (1 - 3q) - q^2 (N-3) / (N-1)] / N

Where each batch has other tasks (`anew`), the signal is that of all tasks, M^2 N^2 rho (E q)^2 / F, and what tasks
differ by is noise too.

A forecast says what to try first, not what is true of a policy: its tasks share nothing but directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import itertools
import math
import multiprocessing
from typing import NamedTuple

import jax
import numpy as np
import tqdm

from kr_jax.allocation import worlds
from kr_jax.types import Array

FAMILIES = 4  # in which tasks share directions
LIMIT = 1.2  # share of uniform's rollouts after which a rule is followed no longer
# What is compared with uniform budgets, as methods of worlds.py. {advantage} is the run's, {nu} that of the world.
RULES = {'paper_rule': 'window:infogain:{advantage}', 'knapsack': 'posterior:infogain:{advantage}',
         'candidates': 'posterior:infogain:{advantage}+candidates=2', 'dynamic': 'dynamic:{advantage}',
         'snr': 'posterior:snr:{nu:g}:loo'}
_MOST_TASKS, _MOST_STEPS, _MOST_SPLIT, _MOST_PER_TASK = 16, 80, 4096, 64  # of the world
_LARGEST_NU, _LEAST_NU = 1e6, 0.05
_LENGTHS = 2.0 ** np.arange(-7, 5)  # of an update, tried in this order
_SMOOTH = 0.05  # share of the steps over which success is a trailing mean
_DRAWS = 8192  # of the population, for its moments
WORTH, NO_DIFFERENCE, NOT_WORTH = 'worth it', 'no difference expected', 'not worth it'
MOST_SHARE = 0.95  # of uniform's rollouts, in the median world: what is above is not worth a change
SURELY = 0.98  # in the worst world: a rule beside itself is off by a hundredth or two
_AS_GOOD = 0.03  # of shares, below which the default is taken
# The decision table: what a user can measure in ten steps. An epoch is of so many of a run's 80 steps.
SPREADS = {'solved or not, Beta(.2, .2)': (0.2, 0.2), 'most unsolved, Beta(.15, .6)': (0.15, 0.6),
           'even, Beta(1, 1)': (1.0, 1.0), 'all in the middle, Beta(4, 4)': (4.0, 4.0)}
EPOCHS, SIGNALS = (8, 40), (0.1, 1.0, 10.0)
_ALIGNMENT = 0.25


class Case(NamedTuple):
  """A run, as far as a forecast asks."""

  population: worlds.Population  # of success rates at the start
  tasks: int  # I of the split
  per_step: int  # M
  per_task: float  # R / M
  steps: int
  low: int
  high: int
  lift: float = 0.5  # share of what is missing of success that uniform budgets close in these steps
  advantage: str = 'std'


class Noise(NamedTuple):
  """What a gradient is like."""

  nu: float  # noise-to-signal ratio of a rollout's gradient
  alignment: float  # cosine of the useful directions of tasks that are alike


class Outcome(NamedTuple):
  """A rule beside uniform budgets in one world."""

  noise: Noise  # of the run
  seed: int
  share: float | None  # of uniform's rollouts, to uniform's final success; None: more than LIMIT
  gain: float  # in success at equal rollouts


class Range(NamedTuple):
  """Shares over several worlds. None: more than LIMIT."""

  median: float | None
  low: float | None
  high: float | None
  gain: float  # median
  reached: int
  worlds: int


def _parts(p_X: Array, M: int, N: int, alignment: float, anew: bool) -> tuple[float, float, float]:
  """E q, and signal and noise of a step without nu, over M N^2. Raises ValueError where there is no gradient."""
  if M < 1 or N < 2:
    raise ValueError(f'{M} tasks of {N} rollouts have no gradient; give at least one task and two rollouts of each')
  q_X = np.asarray(p_X) * (1 - np.asarray(p_X))
  variance_X = (q_X * (1 - 3 * q_X) - q_X ** 2 * (N - 3) / (N - 1)) / N
  q, square, variance = (float(x_X.mean()) for x_X in (q_X, q_X ** 2, variance_X))
  if anew:
    shared = alignment * q ** 2 / FAMILIES
    return q, M * shared, square - shared + variance
  return q, square + alignment * max(M / FAMILIES - 1, 0) * q ** 2, variance


def batch_signal_to_noise(p_X: Array, M: int, N: int, noise: Noise, *, anew: bool = False) -> float:
  """Signal over noise, in power, of a step's gradient under uniform budgets; 0 where no task is between 0 and 1.

  Args:
    p_X: success rates, a sample of the tasks.
    M, N: tasks of a step and rollouts of each.
    anew: whether the noise is that of other tasks, too: the signal is the mean gradient over all tasks then.

  Raises:
    ValueError: there are no tasks, or fewer than two rollouts of each.
  """
  q, signal, variance = _parts(p_X, M, N, noise.alignment, anew)
  return signal / (variance + noise.nu * q / (N - 1)) if q else 0.0


def nu_of(p_X: Array, M: int, N: int, alignment: float, signal_to_noise: float, *, anew: bool = False) -> float:
  """The nu at which a step has this signal-to-noise, in .05..1e6. Raises ValueError as above, and for none above 0."""
  if not signal_to_noise > 0 or math.isinf(signal_to_noise):
    raise ValueError(f'a batch signal-to-noise of {signal_to_noise} must be a number above 0')
  q, signal, variance = _parts(p_X, M, N, alignment, anew)
  if not q:
    return _LEAST_NU
  return float(np.clip((signal / signal_to_noise - variance) * (N - 1) / q, _LEAST_NU, _LARGEST_NU))


def small(case: Case) -> worlds.LearningSetup:
  """The options of the world, but for alignment and length. Raises ValueError for a case without a world."""
  N = int(min(max(round(case.per_task), 2), _MOST_PER_TASK))
  if case.steps < 1 or case.tasks < case.per_step or case.per_step < 1:
    raise ValueError(f'{case.steps} steps of {case.per_step} of {case.tasks} tasks are no run to forecast')
  if not 0 < case.lift < 1:
    raise ValueError(f'lift={case.lift} must lie between 0 and 1; it is the share of what is missing that is learnt')
  M, steps = min(case.per_step, _MOST_TASKS), min(case.steps, _MOST_STEPS)
  passes = case.steps * case.per_step / case.tasks
  low = min(max(case.low, 1), N)
  return worlds.LearningSetup(
      tasks=int(np.clip(round(M * steps / passes), M, _MOST_SPLIT)), per_step=M, per_task=N, steps=steps, low=low,
      high=int(np.clip(case.high, N, M * N - low * (M - 1))), families=min(FAMILIES, M))


def calibrated(world: worlds.World, setup: worlds.LearningSetup, lift: float, *, advantage: str, sigma: float,
               seed: int) -> float:
  """The shortest length of an update with which uniform budgets close `lift` of what is missing of success.

  Where none does, the one that comes nearest: as a learning rate would be tuned.
  """
  method = worlds.Method('uniform', 'infogain', 1.0, advantage)
  found = []
  for length in _LENGTHS:
    success = worlds.learn(world, method, setup.replace(length=float(length)), sigma=sigma, seed=seed)
    target = success[0] + lift * (1 - success[0])
    last = smooth(success)[-1]
    if last >= target:
      if not found:
        return float(length)
      before = found[-1]
      return float(length * 2 ** ((target - last) / (last - before)))
    found.append(last)
    if len(found) > 2 and found[-1] < found[-2] < found[-3]:
      break
  return float(_LENGTHS[int(np.argmax(found))])


def smooth(success: np.ndarray) -> np.ndarray:
  """A trailing mean, over a twentieth of the steps."""
  return worlds.smooth(success, max(1, round(_SMOOTH * (len(success) - 1))))


def outcomes(case: Case, noises: Sequence[Noise], rules: Mapping[str, str] = RULES, *, seeds: int = 3,
             on_run: Callable[[], None] = lambda: None) -> dict[str, list[Outcome]]:
  """Each rule beside uniform budgets, in a world of each noise and seed.

  Args:
    noises: of the run's own steps.
    rules: as RULES.
    seeds: worlds of each noise.
    on_run: is called after each world.

  Raises:
    ValueError: a case that is no run, or an unknown rule.
  """
  setup = small(case)
  methods = [{name: worlds.parse_method(text.format(nu=max(noise.nu, _LEAST_NU), advantage=case.advantage))
              for name, text in rules.items()} for noise in noises]
  uniform = worlds.Method('uniform', 'infogain', 1.0, case.advantage)
  longer = setup.replace(steps=math.ceil(LIMIT * setup.steps))
  p_X = case.population.draw(np.random.default_rng(0), _DRAWS)
  found = {name: [] for name in rules}
  for noise, by_rule in zip(noises, methods):
    length, N = None, setup.per_task
    nu = noise.nu
    if setup.per_step < case.per_step and (of_run := batch_signal_to_noise(p_X, case.per_step, N, noise)):
      nu = nu_of(p_X, setup.per_step, N, noise.alignment, of_run)
    sigma = math.sqrt(nu)
    for seed in range(seeds):
      world = worlds.make_world(case.population, setup.replace(alignment=noise.alignment), seed)
      if length is None:
        length = calibrated(world, setup, case.lift, advantage=case.advantage, sigma=sigma, seed=seed)
      run = lambda method, options: worlds.learn(world, method, options.replace(length=length), sigma=sigma, seed=seed)
      window = max(1, round(_SMOOTH * setup.steps))
      base = worlds.smooth(run(uniform, setup), window)
      for name, method in by_rule.items():
        success = worlds.smooth(run(method, longer), window)
        found[name].append(Outcome(noise, seed, worlds.share_needed(success, base),
                                   float(success[setup.steps] - base[-1])))
      on_run()
  return found


def summary(of_rule: Sequence[Outcome]) -> Range:
  """The median, the least and the largest share over worlds; the median gain."""
  share = np.sort([math.inf if x.share is None else x.share for x in of_rule])
  told = lambda x: None if math.isinf(x) else float(x)
  middle = share[len(share) // 2] if len(share) % 2 else (share[len(share) // 2 - 1] + share[len(share) // 2]) / 2
  return Range(told(middle), told(share[0]), told(share[-1]), float(np.median([x.gain for x in of_rule])),
               int(np.isfinite(share).sum()), len(share))


def verdict(ranges: Mapping[str, Range]) -> tuple[str, str | None]:
  """WORTH, NO_DIFFERENCE or NOT_WORTH; and the rule to take where it is worth it.

  A rule is worth it that needs at most .98 of uniform's rollouts in every world, and .95 in the median one: of several
  the one that needs least, or the default where it is as good.
  """
  known = {rule: x for rule, x in ranges.items()
           if x.high is not None and x.high <= SURELY and x.median <= MOST_SHARE}
  if known:
    best = min(known, key=lambda rule: known[rule].median)
    is_default = 'knapsack' in known and known['knapsack'].median <= known[best].median + _AS_GOOD
    return WORTH, 'knapsack' if is_default else best
  return (NOT_WORTH if all(x.low is None or x.low > 1 for x in ranges.values()) else NO_DIFFERENCE), None


def shown(found: Range) -> str:
  """'.62 (.55-.70)'; what is above LIMIT is said to be."""
  said = lambda x: f'>{LIMIT:g}' if x is None else f'{x:.2f}'
  return f'{said(found.median)} ({said(found.low)}-{said(found.high)})'


# The decision table.


def _cell(job: tuple[str, int, float, int, int, Mapping[str, str]]) -> dict[str, Range]:
  spread, epoch, signal_to_noise, seeds, steps, rules = job
  M, N, (a, b) = _MOST_TASKS, 8, SPREADS[spread]
  population = worlds.Population(lambda rng, num: rng.beta(a, b, num), (a, b))
  p_X = population.draw(np.random.default_rng(0), _DRAWS)
  case = Case(population, tasks=M * epoch, per_step=M, per_task=N, steps=steps, low=2, high=64)
  noise = Noise(nu_of(p_X, M, N, _ALIGNMENT, signal_to_noise), _ALIGNMENT)
  return {rule: summary(x) for rule, x in outcomes(case, [noise], rules, seeds=seeds).items()}


def _on_cpu() -> None:
  jax.config.update('jax_platforms', 'cpu')


def decision(*, seeds: int = 2, jobs: int = 1, spreads: Sequence[str] = tuple(SPREADS), epochs: Sequence[int] = EPOCHS,
             signals: Sequence[float] = SIGNALS, steps: int = _MOST_STEPS,
             rules: Mapping[str, str] = RULES) -> dict[tuple[str, int, float], dict[str, Range]]:
  """The ranges of RULES by spread of success rates, epoch length in steps and batch signal-to-noise.

  Of a run of so many steps of 16 tasks with 8 rollouts each. Raises ValueError for no seed or no process.
  """
  if seeds < 1 or jobs < 1:
    raise ValueError(f'--seeds {seeds} and --jobs {jobs} must be at least 1')
  cells = list(itertools.product(spreads, epochs, signals))
  run = [(*cell, seeds, steps, rules) for cell in cells]
  bar = lambda done: tqdm.tqdm(done, total=len(cells), desc='decide', unit='row')
  if jobs == 1:
    return dict(zip(cells, bar(map(_cell, run))))
  context = multiprocessing.get_context('spawn')  # jax has threads, which a fork would lose
  with futures.ProcessPoolExecutor(jobs, context, initializer=_on_cpu) as pool:
    return dict(zip(cells, bar(pool.map(_cell, run))))
