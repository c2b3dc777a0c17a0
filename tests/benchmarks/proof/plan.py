"""What is compared, how, and what would count as what: fixed before the runs of the test seeds.

**Families** are config files, configs/proof_NAME.py, each with its target and two batch sizes; a cell is a family at a
batch size, whose learning rate is the base rate. In a cell all arms share tasks, policy, evaluations and number of
steps, but for those that take more rollouts a step. Runs of one seed share the warm start, the order of the data and
the draws of the evaluations, so that they are pairs.

**Tuning.** The learning rate of each arm is the multiple of the base rate, of MULTIPLES, whose mean area under held-out
success against rollouts is the largest over TUNING_SEEDS. The area is taken up to the rollouts of a uniform run, over
these rollouts: it is the mean success on the way. A run that ends before keeps its last success.

**Screening.** All arms are tuned in the cells of SCREENED_IN. Their areas at their best multiples, minus uniform's,
are averaged over these cells. The finalists are RESERVED and the best of the others, MOST_FINALISTS in all; uniform is
run beside them. In the other cells uniform and the finalists alone are tuned. All results are reported.

**Test**, on TEST_SEEDS at the tuned rates, in all cells.

- The metric is the cost until held-out success holds the family's TARGET, as a ratio to the uniform run of the seed
  (below 1 is better), in rollouts, generated tokens, executed FLOPs and seconds of the steps. Evaluations, the warm
  start, compilation and checkpoints are left out. A run that never holds the target is censored
  (kr_jax/report/compare.py). Intervals hold for all arms of a cell together: their level is 1 - .05 / arms.
- Success at equal rollouts is that of each run where uniform's last evaluation is, interpolated. Differences are
  paired, with Student's interval, and their p-values are corrected over the arms of a cell (Holm).
- The status of a held-out task is that of the seed's first evaluation: none right is hard, .8 or more is solved, else
  mixed. A solved task is forgotten if its rate fell to half or less at the end.

**Goals**, of an arm, where a cell has LEAST_PAIRS pairs of it; else they are not known:

- rollouts: the median ratio is .6 or less at the small batch of two or more of the families late, hard, pretrained,
  and the upper end of the interval is 1 or less in all cells.
- gradient: the effective gradient ratio is 1.2 times uniform's or more, in the mean, at the small batch of each of
  these families.
- success: at equal rollouts it is in no cell significantly below uniform's.
- paper: nor below that of the paper's rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import hashlib
import json
import os
from typing import Any, NamedTuple

from ml_collections import config_dict

from kr_jax import shipped

FAMILIES = ('shared', 'late', 'hard', 'pretrained')
BATCHES = ('small', 'large')
GOAL_FAMILIES = ('late', 'hard', 'pretrained')
BASELINE, DEFAULT, PAPER = 'uniform', 'knapsack', 'paper'
RESERVED = (DEFAULT, PAPER)
TUNING_SEEDS, TEST_SEEDS = (100, 101), tuple(range(12))
MULTIPLES = (1 / 3, 1.0, 3.0)
SCREENED_IN = ('late_small', 'hard_small')
MOST_FINALISTS = 6
LEVEL = 0.95
MOST_ROLLOUTS, LEAST_GRADIENT = 0.6, 1.2  # of the goals, as multiples of uniform's
LEAST_PAIRS = 6  # for a goal to be judged
QUICK = {'family': ('late',), 'batch': ('small',), 'arms': ('uniform', 'knapsack'), 'seeds': (0, 1, 2)}

# What arms are made of, whatever the defaults are.
_PLAIN = {'alloc.rule': 'knapsack', 'alloc.estimate': 'posterior', 'alloc.value': 'infogain', 'alloc.waves': 1,
          'alloc.low': 2, 'alloc.cost': 'rollouts', 'alloc.nu_every': 0, 'tasks.candidates_per_step': 0,
          'grpo.advantage': 'std', 'grpo.weight': 'rollout'}
# A run leaves one line, and is made on one core.
_LEAN = {'record.page': False, 'record.rollouts': 0, 'checkpoint.every': 10_000, 'rewards.workers': 1}
_MEASUREMENTS = 40  # of nu in a run
# With tokens as cost: the mean completion, as a share of the longest, and how many times the rollouts they may buy.
_MEAN_COMPLETION, _MORE = 0.65, 1.25
_OF_WARM_START = ('policy', 'warm_start', 'tasks', 'pack', 'optimizer', 'sample', 'seed')  # what it hangs on
_NOT_OF_WARM_START = {
    'tasks': ('per_step', 'candidates_per_step'), 'optimizer': ('learning_rate',), 'sample': ('slots',)}

Config = config_dict.ConfigDict


class Arm(NamedTuple):
  """A rule: knobs that it sets, and what follows from other knobs of the config."""

  about: str
  knobs: Mapping[str, Any] = {}
  change: Callable[[Config], None] = lambda c: None


class Run(NamedTuple):
  """A run of the plan."""

  family: str
  batch: str
  arm: str
  seed: int
  role: str  # 'tuning' | 'test'
  multiple: float  # of the cell's learning rate

  @property
  def cell(self) -> str:
    return f'{self.family}_{self.batch}'

  @property
  def key(self) -> tuple[Any, ...]:
    """What tells it from others in the record, where numbers are rounded."""
    return (*self[:5], rounded(self.multiple))

  def __str__(self) -> str:
    return f'{self.cell} {self.arm} x{self.multiple:.3g} seed {self.seed} ({self.role})'


def rounded(x: float) -> float:
  """A number as it is recorded, of 5 digits."""
  return float(f'{x:.5g}')


def _halved(c: Config) -> None:
  """Half the steps, and as many evaluations."""
  if c.num_steps % 2 or c.evaluate.every % 2:
    raise ValueError(f'num_steps={c.num_steps} and evaluate.every={c.evaluate.every} must both be even, as an arm '
                     'takes half of the steps; change the batch of the family')
  c.num_steps //= 2
  c.evaluate.every //= 2


def _twice(c: Config) -> None:
  c.alloc.rollouts_per_step *= 2
  _halved(c)


def _dynamic(c: Config) -> None:
  c.tasks.candidates_per_step = 3 * c.tasks.per_step
  _halved(c)


def _measured(c: Config) -> None:
  c.alloc.nu_every = max(1, c.num_steps // _MEASUREMENTS)


def _choosing(c: Config) -> None:
  c.tasks.candidates_per_step = 2 * c.tasks.per_step


def _in_waves(c: Config) -> None:
  c.sample.slots = max(1, min(c.sample.slots, c.alloc.rollouts_per_step // 2))


def _in_tokens(c: Config) -> None:
  """As many tokens as uniform budgets are expected to take, for more rollouts where they are short."""
  R = c.alloc.rollouts_per_step
  c.alloc.tokens_per_step = round(R * c.sample.completion_length * _MEAN_COMPLETION)
  c.alloc.rollouts_per_step = int(R * _MORE)


def _as_paper(c: Config) -> None:
  from configs import presets
  presets.PRESETS['paper_rule'](c)


ARMS: dict[str, Arm] = {
    'uniform': Arm('equal budgets (GRPO)', {'alloc.rule': 'uniform'}),
    'uniform_2n': Arm('equal budgets twice as large, half the steps', {'alloc.rule': 'uniform'}, _twice),
    'dapo': Arm('dynamic sampling, all its rollouts charged, half the steps',
                {'alloc.rule': 'dynamic', 'alloc.low': 0}, _dynamic),
    'paper': Arm("the paper's rule as published", {}, _as_paper),
    'knapsack': Arm('posterior, infogain, std'),
    **{value: Arm(f'the knapsack with the value {value}', {'alloc.value': value})
       for value in ('variance', 'mixed', 'hit', 'coba')},
    'snr': Arm('the knapsack with the value snr, nu measured', {'alloc.value': 'snr'}, _measured),
    **{kind: Arm(f'the knapsack with the advantage {kind}', {'grpo.advantage': kind})
       for kind in ('loo', 'posterior', 'maxrl')},
    **{weight: Arm(f'the knapsack with the weight {weight}', {'grpo.weight': weight}) for weight in ('task', 'sqrt')},
    'waves': Arm('the knapsack in two waves', {'alloc.waves': 2}, _in_waves),
    'candidates': Arm('the knapsack without a floor, of twice as many tasks', {'alloc.low': 0}, _choosing),
    **{f'candidates_{value}': Arm(f'candidates with the value {value}', {'alloc.low': 0, 'alloc.value': value},
                                  _choosing) for value in ('variance', 'mixed', 'hit')},
    **{f'candidates_{kind}': Arm(f'candidates with the advantage {kind}', {'alloc.low': 0, 'grpo.advantage': kind},
                                 _choosing) for kind in ('loo', 'posterior')},
    # What of these is the advantage's alone.
    **{f'uniform_{kind}': Arm(f'equal budgets with the advantage {kind}', {
        'alloc.rule': 'uniform', 'grpo.advantage': kind}) for kind in ('loo', 'posterior')},
    'tokens': Arm('the knapsack with tokens as cost', {'alloc.cost': 'tokens'}, _in_tokens)}


def module(family: str) -> Any:
  """The config file of a family. Raises ValueError where there is none, or it lacks what the plan reads."""
  path = os.path.join(shipped.FOLDER, f'proof_{family}.py')
  if not os.path.isfile(path):
    raise ValueError(f'--family={family} needs {path}, which is not there; the families are {", ".join(FAMILIES)}')
  with shipped.importable(path):
    found = shipped.load(path)
  if lacks := [name for name in ('TARGET', 'BATCHES', 'get_config') if not hasattr(found, name)]:
    raise ValueError(f'{path} lacks {", ".join(lacks)}; see tests/benchmarks/proof/plan.py')
  return found


@functools.cache
def _family(family: str) -> Any:
  return module(family)


def target(family: str) -> float:
  return _family(family).TARGET


@functools.cache
def _variant(family: str, batch: str) -> Config:
  path = os.path.join(shipped.FOLDER, f'proof_{family}.py')
  with shipped.importable(path):
    return _family(family).get_config(batch)


def config(run: Run, base: Config | None = None) -> Config:
  """The config of a run.

  base: of the cell; None: as the family's file says.

  Raises ValueError for an arm that there is not.
  """
  if run.arm not in ARMS:
    raise ValueError(f'the arm {run.arm!r} is not one of {", ".join(ARMS)}')
  arm, made = ARMS[run.arm], base if base is not None else _variant(run.family, run.batch)
  c = config_dict.ConfigDict(made.to_dict(), type_safe=False)
  for name, value in {**_LEAN, **_PLAIN, **arm.knobs}.items():
    section, _, knob = name.rpartition('.')
    c[section][knob] = value
  arm.change(c)
  c.seed = run.seed
  c.optimizer.learning_rate *= run.multiple
  return c


def digest(tree: Any) -> str:
  """Of a config, or a part of one."""
  tree = tree.to_dict() if isinstance(tree, config_dict.ConfigDict) else tree
  return hashlib.sha256(json.dumps(tree, sort_keys=True, default=list).encode()).hexdigest()[:12]


def warm_start(family: str, c: Config) -> str | None:
  """The name of the warm start that a run begins with; runs that share it have one name. None: it has none."""
  if not c.warm_start.num_steps:
    return None
  tree = {name: x for name, x in c.to_dict().items() if name in _OF_WARM_START}
  for section, left_out in _NOT_OF_WARM_START.items():
    tree[section] = {name: x for name, x in tree[section].items() if name not in left_out}
  return f'{family}_{c.seed}_{digest([tree, _source(c.tasks.dataset)])}'


def _source(dataset: str) -> str:
  """The programs that make a dataset, as far as they are files of its own name or of its first part."""
  folder, found = os.path.join(os.path.dirname(shipped.__file__), 'datasets'), ''
  for path in (dataset, *(os.path.join(folder, f'{name}.py') for name in (dataset, dataset.partition('_')[0]))):
    if path.endswith('.py') and os.path.isfile(path):
      with open(path) as file:
        found += file.read()
  return found


def runs(cells: Sequence[str], arms: Sequence[str], seeds: Sequence[int], role: str,
         multiples: Sequence[float] | Callable[[str, str], Sequence[float]]) -> list[Run]:
  """Runs in the order in which they are made: those that share compiled programs after one another.

  multiples: all, or those of a cell and an arm.
  """
  of = multiples if callable(multiples) else lambda cell, arm: multiples
  return [Run(*cell.rsplit('_', 1), arm, seed, role, multiple) for cell in cells for arm in arms
          for multiple in of(cell, arm) for seed in seeds]
