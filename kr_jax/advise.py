"""Whether a knapsack is worth it for a run, by the run's own record and the simulator.

    measured = advise.measure(report.run.read(workdir))
    print(advise.text(measured, advise.forecast(measured)))

What a forecast asks of a run is read from the verdicts of its first pass over the split (ten steps, where a pass has
fewer), whatever its rule: statistics of each task, the prior that is fitted to them, and so a population of success
rates. Noise is taken from the record where the run measured it (`alloc.nu_every`), else a range is assumed. The
simulator (allocation/forecast.py) tells what share of uniform budgets' rollouts each rule would need in worlds that
span what is assumed. A rule is worth it that needs clearly less in the median world and somewhat less in every one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
import os
import re
from typing import Any, NamedTuple

import numpy as np
from scipy import special
import tqdm

from kr_jax import files
from kr_jax import mirror
from kr_jax.allocation import estimate
from kr_jax.allocation import forecast as forecast_lib
from kr_jax.allocation import worlds
from kr_jax.allocation.forecast import Noise, Range
from kr_jax.allocation.value import Beta
from kr_jax.record import rollouts as rollouts_lib
from kr_jax.record import split as split_lib
from kr_jax.report import run as run_lib

EDGES = (0.05, 0.2, 0.8, 0.95)  # between classes of success rates
NU, ALIGNMENT = (1.0, 5.0, 30.0), (0.1, 0.25, 0.4)  # least, middle, most, where they are not measured
LIFT = 0.5
SEEDS = 2  # worlds of each noise
_DEFAULT = {'alloc.rule': 'knapsack', 'alloc.estimate': 'posterior', 'alloc.value': 'infogain', 'alloc.nu_every': 0,
            'tasks.candidates_per_step': 0}
KNOBS = {  # 2M: twice tasks.per_step
    'paper_rule': _DEFAULT | {'alloc.estimate': 'window', 'alloc.low': 2, 'alloc.waves': 1, 'alloc.cost': 'rollouts'},
    'knapsack': _DEFAULT,
    'candidates': _DEFAULT | {'alloc.low': 0, 'alloc.solver': 'dp', 'tasks.candidates_per_step': '2M'},
    'dynamic': {'alloc.rule': 'dynamic', 'alloc.low': 0, 'alloc.waves': 1, 'alloc.cost': 'rollouts',
                'tasks.candidates_per_step': '3M'},
    'snr': _DEFAULT | {'alloc.value': 'snr', 'alloc.nu_every': 10, 'grpo.advantage': 'loo'}}
_FEWEST, _ENOUGH = 3, 10  # steps
_NU_SPREAD = 1.5  # at least, to either side of a measured nu
_HALF = 0.5  # of the steps, which a rise of success that is taken from the record must cover
_LENGTHS_MATTER = 1.5  # times as long: failures against successes, from which tokens are worth counting
_PROOF = os.path.join('configs', 'recorded', 'proof', 'report.md')


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
  """What a record says. What is None is not known; `assumed` names what is not of the record."""

  workdir: str
  config: str  # as --config took it; 'CONFIG' where that is not known
  knobs: Mapping[str, Any]  # of KNOBS, as the run has them
  rule: str | None
  first_step: int
  steps: int  # that were read
  recorded: int  # steps in all
  belief: Beta  # of the success rate of each task of the split
  tasks: int
  per_step: int
  rollouts: int  # of a step
  low: int
  high: int
  num_steps: int  # of the run, from first_step on
  advantage: str
  only: str  # 'right' or 'wrong' where every verdict is that, else ''
  silent: float  # share of the groups without a gradient
  gradient_ratio: float | None  # effective, mean of the steps
  nu: tuple[float, float, float]
  alignment: tuple[float, float, float]
  lift: float
  lengths: tuple[float, float, float] | None  # tokens: 10 % and 90 % of the rollouts that were kept; wrong over right
  assumed: frozenset[str]

  @property
  def per_task(self) -> float:
    return self.rollouts / self.per_step

  @property
  def mean(self) -> float:
    return float(self.belief.mean_M.mean())

  @property
  def classes(self) -> list[float]:
    """The shares of tasks in the classes of success rates between EDGES."""
    below = special.betainc(self.belief.a_M, self.belief.b_M, np.array(EDGES)[:, None]).mean(axis=1)
    return np.diff(below, prepend=0.0, append=1.0).tolist()

  @property
  def case(self) -> forecast_lib.Case:
    return forecast_lib.Case(population(self.belief), self.tasks, self.per_step, self.per_task, self.num_steps,
                             self.low, self.high, self.lift, self.advantage)


class Forecast(NamedTuple):
  """What is expected of rules."""

  verdict: str
  why: str
  rule: str | None  # to try
  ranges: dict[str, Range]  # by rule; empty where nothing was simulated
  signal_to_noise: tuple[float, float, float] | None  # of a step, least, middle, most


def run(workdirs: Sequence[str], *, first_step: int = 0, output: str | None = None) -> None:
  """Prints advice about runs, one after the other; writes the figures to a file of JSON, a list where they are several.

  Raises ValueError as `measure`, and for a workdir that cannot be read.
  """
  found = []
  for workdir in workdirs:
    with mirror.opened(workdir) as place, tqdm.tqdm(total=3 * SEEDS, desc='simulate', unit='world', leave=False,
                                                    disable=None) as bar:
      measured = dataclasses.replace(measure(run_lib.read(place.path), first_step), workdir=workdir)
      expected = forecast(measured, on_world=bar.update)
    print('\n' * bool(found) + text(measured, expected), flush=True)
    found.append(figures(measured, expected))
  if output:
    files.write(output, json.dumps(found if len(found) > 1 else found[0], indent=1) + '\n')


# What is measured.


def measure(run: run_lib.Run, first_step: int = 0) -> Measured:
  """What the record of a run says of its tasks from a step on.

  Raises ValueError for a record that tells too little: it is older, cut short or empty.
  """
  steps, assumed = [record for record in run.steps if record['step'] >= first_step], set()
  if len(steps) < _FEWEST:
    raise ValueError(f'{run.workdir} holds {len(steps)} steps{f" from step {first_step} on" * bool(first_step)}, and '
                     f'advice needs {_FEWEST} at the least, {_ENOUGH} or more for a good one; train on, or name an '
                     'earlier --step')
  found = [split_lib.groups(record) for record in steps]
  if None in found:
    raise ValueError(f'{run.workdir} does not tell what came of each task of step {steps[found.index(None)]["step"]}, '
                     'as of a version before group_right; train ten steps with this version')
  per_step = _knob(run, 'tasks.per_step', max(len(x.index_M) for x in found), assumed)
  rollouts = _knob(run, 'alloc.rollouts_per_step', max(int(x.budget_M.sum()) for x in found), assumed)
  if rollouts < 2 * per_step:
    raise ValueError(f'{run.workdir} has {rollouts} rollouts of {per_step} tasks a step, and rules are compared with '
                     'uniform budgets, whose groups of one rollout have no gradient; raise alloc.rollouts_per_step')
  split = _split(run, found, assumed)
  pass_steps = math.ceil(len(split.id_I) / per_step)
  read = found[:max(_ENOUGH, pass_steps)]
  stats = split_lib.replay(split, read, pass_discount=1.0, recalibration_groups=0)
  verified, right = (sum(int(x.sum()) for x in column) for column in zip(*((x.verified_M, x.right_M) for x in read)))
  if not verified:
    raise ValueError(f'{run.workdir} holds no verdict in {len(read)} steps; mend the verifier first: report.md says '
                     'what is wrong with it')
  seen = np.concatenate([np.stack([x.right_M, x.verified_M])[:, x.verified_M > 0] for x in read], axis=1)
  ratios = [x for record in steps[:len(read)] if (x := run_lib.number(record, 'effective_gradient_ratio')) is not None]
  nu = _nu(run, steps) or NU
  num_steps = _knob(run, 'num_steps', run.steps[-1]['step'] + 1, assumed) - first_step
  rise = _lift(run) if not first_step else None
  lift, num_steps = rise or (LIFT, max(num_steps, len(steps)))
  assumed |= {name for name, known in (('nu', _nu(run, steps)), ('lift', rise)) if not known} | {'alignment'}
  return Measured(
      run.workdir, _config(run), {name: run.knob(name) for name in {x for knobs in KNOBS.values() for x in knobs}},
      run.rule, first_step, len(read), len(run.steps), estimate.posterior(stats, np.arange(len(split.id_I))),
      len(split.id_I), per_step, rollouts, _knob(run, 'alloc.low', 2, assumed), _knob(run, 'alloc.high', 128, assumed),
      num_steps, _advantage(run), 'right' if right == verified else 'wrong' if not right else '',
      float(((seen[0] == 0) | (seen[0] == seen[1])).mean()), float(np.mean(ratios)) if ratios else None, nu, ALIGNMENT,
      lift, _lengths(run, steps[0]['step'], len(read)), frozenset(assumed))


def _knob(run: run_lib.Run, name: str, default: int, assumed: set[str]) -> int:
  """A whole number of the run's config; the default where it is not known, which is noted."""
  found = run.knob(name)
  if type(found) is int and found >= 0:
    return found
  assumed.add(name)
  return default


def _advantage(run: run_lib.Run) -> str:
  found = run.knob('grpo.advantage')
  return found if found in worlds.ADVANTAGES else 'std'


def _config(run: run_lib.Run) -> str:
  """The config of the run's last command."""
  commands = [x.get('command') for x in run.ledger.attempts]
  found = re.search(r'--config[= ](\S+)', commands[-1] or '') if commands else None
  return found[1] if found else 'CONFIG'


def _split(run: run_lib.Run, found: list[split_lib.Groups], assumed: set[str]) -> split_lib.Split:
  """The tasks of the split; of a record without them, as many as its steps name, all of one stratum."""
  least = 1 + max(int(x.index_M.max(initial=0)) for x in found)
  try:
    split = split_lib.read(run.workdir)
  except ValueError:
    split = None
  if split is None or len(split.id_I) < least:
    assumed.add('tasks')
    names = [''] * least
    return split_lib.Split(names, names, np.zeros(least, np.int64), np.zeros(least, np.int32), np.zeros((2, least)))
  return split


def _nu(run: run_lib.Run, steps: list[dict[str, Any]]) -> tuple[float, float, float] | None:
  """Least, last and largest nu of the later half of the steps; None where the run does not measure it."""
  if not run.knob('alloc.nu_every'):
    return None
  found = [x for record in steps[len(steps) // 2:] if (x := run_lib.number(record, 'nu')) is not None and x > 0]
  if not found:
    return None
  return min(*found, found[-1] / _NU_SPREAD), found[-1], max(*found, found[-1] * _NU_SPREAD)


def _lift(run: run_lib.Run) -> tuple[float, int] | None:
  """The share of what was missing of held-out success that was learnt, and in how many steps.

  None where evaluations cover less than half of the run, or show no rise.
  """
  points = [(record['step'], y) for record in run.evaluations if (y := run.success(record)) is not None]
  total = run.knob('num_steps')
  if len(points) < 2 or points[0][0] or not isinstance(total, int) or points[-1][0] < max(_HALF * total, 1):
    return None
  first, last = points[0][1], points[-1][1]
  lift = (last - first) / (1 - first) if first < 1 else 0.0
  return (min(lift, 0.9), points[-1][0]) if lift >= 0.05 else None


def _lengths(run: run_lib.Run, first: int, steps: int) -> tuple[float, float, float] | None:
  kept = [record for step in run.rollout_steps if first <= step < first + steps
          for record in rollouts_lib.read(run.workdir, step, problems=[])]
  pairs = [(n, record.get('verdict')) for record in kept if (n := run_lib.number(record, 'length')) and n > 0]
  of = lambda is_right: [n for n, verdict in pairs if (verdict == 'right') == is_right]
  if not of(True) or not of(False):
    return None
  low, high = np.quantile([n for n, _ in pairs], (0.1, 0.9))
  return float(low), float(high), float(np.mean(of(False)) / np.mean(of(True)))


def population(belief: Beta) -> worlds.Population:
  """Success rates of tasks of the split, each once while there are as many, drawn from what is known of them."""
  def draw(rng: np.random.Generator, num: int) -> np.ndarray:
    I = len(belief.a_M)
    row_X = rng.permutation(I)[:num] if num <= I else rng.integers(I, size=num)
    return rng.beta(np.asarray(belief.a_M)[row_X], np.asarray(belief.b_M)[row_X])

  return worlds.Population(draw)


# What is expected.


def forecast(measured: Measured, *, batch_signal_to_noise: float | None = None,
             rules: Mapping[str, str] = forecast_lib.RULES, seeds: int = SEEDS,
             on_world: Callable[[], None] = lambda: None) -> Forecast:
  """What share of uniform budgets' rollouts rules would need, and whether one is worth it.

  Args:
    batch_signal_to_noise: of a step of the run under uniform budgets, where it was measured from batches of other tasks
      each (tests/benchmarks/proof/signal.py does); None: noise is that of measured.nu.
    rules: as of forecast.RULES.
    seeds: worlds of each noise.
    on_world: is called after each of the 3 * seeds worlds.

  Raises ValueError for a signal-to-noise that is not above 0, or an unknown rule.
  """
  if measured.only:
    of = 'solved: nothing is left to learn' if measured.only == 'right' else (
        'without a right rollout: no budget finds one soon. Make tasks easier, the warm start longer')
    return Forecast(forecast_lib.NOT_WORTH, f'every task of {measured.steps} steps is {of}', None, {}, None)
  case = measured.case
  p_X, N = case.population.draw(np.random.default_rng(0), 4096), max(round(case.per_task), 2)
  of_step = lambda noise: forecast_lib.batch_signal_to_noise(p_X, case.per_step, N, noise)
  # From the least signal-to-noise to the most.
  noises = [Noise(nu, alignment) for nu, alignment in zip(measured.nu[::-1], measured.alignment)]
  if batch_signal_to_noise is not None:
    noises = [noise._replace(nu=forecast_lib.nu_of(
        p_X, case.per_step, N, noise.alignment, batch_signal_to_noise, anew=True)) for noise in noises]
  ranges = {rule: forecast_lib.summary(found) for rule, found in forecast_lib.outcomes(
      case, noises, rules, seeds=seeds, on_run=on_world).items()}
  said, rule = forecast_lib.verdict(ranges)
  why = {forecast_lib.WORTH: f'{rule} needs less than uniform budgets in all worlds',
         forecast_lib.NO_DIFFERENCE: f'no rule needs at most {forecast_lib.MOST_SHARE:g} of the rollouts of uniform '
                                     f'budgets in the median world and {forecast_lib.SURELY:g} in all worlds',
         forecast_lib.NOT_WORTH: 'every rule needs more than uniform budgets in all worlds'}[said]
  return Forecast(said, why, rule, ranges, tuple(map(of_step, noises)))


def flags(measured: Measured, rule: str) -> list[str]:
  """The flags that make the run one by a rule; none where it is that."""
  return [f'--config.{name}={x}' for name, x in knobs_of(measured, rule).items() if measured.knobs.get(name) != x]


def knobs_of(measured: Measured, rule: str) -> dict[str, Any]:
  """The knobs of a rule, for tasks and noise of the run."""
  times = lambda x: int(x[:-1]) * measured.per_step if isinstance(x, str) and x.endswith('M') else x
  of_noise = {'alloc.nu': float(f'{measured.nu[1]:.2g}')} if rule == 'snr' else {}
  return {name: times(x) for name, x in KNOBS[rule].items()} | of_noise


# What is said.


def text(measured: Measured, found: Forecast) -> str:
  """All of it, one screen."""
  m, lines = measured, []

  def say(how: str, what: str, figure: str) -> None:
    lines.append(f'{how:<10} {what:<34} {figure}')

  how = lambda *names: 'assumed' if m.assumed & {*names} else 'measured'
  of_pass = m.tasks / m.per_step
  lines.append(f'{m.workdir}: {m.rule or "unknown rule"}, {m.steps} of {m.recorded} steps read, from step '
               f'{m.first_step} on{", few for an estimate" * (m.steps < _ENOUGH)}')
  say(how('tasks.per_step', 'alloc.rollouts_per_step'), 'tasks, rollouts a step',
      f'{m.per_step}, {m.rollouts}: {m.per_task:g} a task, {m.low} to {m.high}')
  say('at least' if 'tasks' in m.assumed else 'measured', 'steps of a pass over the split',
      f'{of_pass:.3g} ({m.tasks:,} tasks); {m.num_steps / of_pass:.2g} passes in {m.num_steps} steps')
  ratio = '' if m.gradient_ratio is None else f'; rollouts in groups with a gradient: {m.gradient_ratio:.0%}'
  say('measured', 'groups without a gradient', f'{m.silent:.0%}{ratio}')
  bounds = ('0', *(f'{x:g}' for x in EDGES), '1')
  say('fitted', 'success rates of tasks', f'mean {m.mean:.2f}; ' + ', '.join(
      f'{low}-{high}: {x:.0%}' for low, high, x in zip(bounds, bounds[1:], m.classes)))
  say(how('nu'), "noise over signal of a rollout's gradient, nu", '{1:.2g} ({0:.2g}-{2:.2g})'.format(*m.nu))
  say('assumed', "alignment of two tasks' gradients", '{1:g} ({0:g}-{2:g})'.format(*m.alignment))
  if found.signal_to_noise:
    say('assumed', "a step's signal-to-noise", '{1:.2g} ({0:.2g}-{2:.2g})'.format(*found.signal_to_noise))
  say(how('lift'), 'learnt of what is missing', f'{m.lift:.0%} in {m.num_steps} steps')
  if m.lengths:
    say('measured', 'tokens of rollouts that were kept', '{:.0f} to {:.0f}; wrong over right {:.2f}'.format(*m.lengths))
  if found.ranges:
    one = next(iter(found.ranges.values()))
    lines += ['', f'simulated: share of the rollouts of uniform budgets until their final success, median (least-most) '
              f'of {one.worlds} worlds', f'{"uniform":<12} 1.00']
    lines += [f'{rule:<12} {forecast_lib.shown(x):<20} success {x.gain:+.3f} at equal rollouts'
              for rule, x in found.ranges.items()]
  return '\n'.join([*lines, '', f'verdict: {found.verdict}: {found.why}', *_next(m, found)])


def _next(m: Measured, found: Forecast) -> list[str]:
  """What to set, what would be measured, and what would settle it."""
  lines = []
  if found.rule:
    lines.append(f'set: {" ".join(flags(m, found.rule)) or "nothing, the run has it"}')
  if m.lengths and m.lengths[2] >= _LENGTHS_MATTER:
    lines.append('wrong rollouts are long: --config.alloc.cost=tokens with --config.alloc.tokens_per_step counts them '
                 'for what they cost; this is not simulated')
  if found.ranges and 'nu' in m.assumed:
    # All else stays, the number of steps too, as advice is about the run that the config describes.
    lines.append(f'to measure nu: python -m kr_jax.main --config={m.config} --workdir={m.workdir.rstrip("/")}_nu '
                 '--config.alloc.value=snr --config.alloc.nu_every=1; stop it after 20 steps (Ctrl-C), and advise '
                 'of that workdir')
  if found.ranges:
    knobs = ', '.join(f'{name!r}: {x!r}' for name, x in knobs_of(m, found.rule or 'knapsack').items())
    lines.append(f"to settle it: launch/sweep.py {m.config}, with a sweep() that yields, each with 'seed' of 0 to 4,\n"
                 f"  {{{knobs}}}\n  {{'alloc.rule': 'uniform', 'tasks.candidates_per_step': 0}}\n"
                 '  and then --mode=report --target=SUCCESS, which compares them')
  proof = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), _PROOF)
  fared = f'; how such forecasts fared: {_PROOF}' if os.path.exists(proof) else ''
  return [*lines, f'a simulation is no proof: its tasks share directions and nothing else{fared}']


def figures(measured: Measured, found: Forecast) -> dict[str, Any]:
  """The same for scripts, as JSON has it; null is unknown, or a share beyond forecast.LIMIT."""
  left_out = ('belief', 'knobs', 'assumed')
  plain = {field.name: getattr(measured, field.name) for field in dataclasses.fields(measured)
           if field.name not in left_out}
  return {'measured': plain | {'mean': measured.mean, 'classes': measured.classes, 'edges': EDGES,
                               'assumed': sorted(measured.assumed)},
          'forecast': found._asdict() | {'ranges': {rule: x._asdict() for rule, x in found.ranges.items()},
                                         'limit': forecast_lib.LIMIT,
                                         'flags': flags(measured, found.rule) if found.rule else []}}
