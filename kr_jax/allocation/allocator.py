"""The allocator for other trainers: verdicts by the ids of tasks in, budgets out, numpy on both sides.

    allocator = Allocator(num_tasks=17_398)
    budget_M = allocator.budgets(ids, 1024)        # before a step: how many rollouts each task gets
    allocator.observe(ids, successes, failures)    # after it: how many of them were right and wrong

It holds the statistics of estimate.py of every task that was observed, and asks allocate.py for the budgets. Tasks may
appear at any time. `examples` has it in trainers of TRL and verl.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Iterable, Mapping
import numbers
from typing import Any

import numpy as np

from kr_jax import knobs
from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.allocation import scores
from kr_jax.allocation import value as value_lib
from kr_jax.allocation.value import Beta, Value
from kr_jax.types import Array, TaskStats

_VERSION = 1  # of what state_dict returns
_STATE = dict(settings=Mapping, ids=list, labels=list, stats=Mapping, recent=list, tokens=(bool, type(None)))
_WHOLE = 'save what state_dict returns as a whole'
_GROUPS = 512  # the last groups that forecasts are recalibrated to, and that `calibration` scores
_COUNTS = ('successes_I', 'failures_I', 'tokens_OI', 'visits_I', 'rates_I', 'rollouts_I', 'known_OI')
_MOST = 2 ** 20  # rollouts of an outcome of a task in a step; a larger count is taken for a mistake


class Allocator:
  """Budgets of tasks that are known by an id, from the verdicts on their rollouts so far.

  Equal calls give equal budgets: in a distributed trainer each process can have an Allocator that observes the rollouts
  of all.
  """

  def __init__(self, *, low: int = 2, high: int = 128, rule: str = 'knapsack', value: str | Value = 'infogain',
               nu: float = 2.0, solver: str = 'dp', pass_discount: float = 0.75, recalibrate: bool = True,
               num_tasks: int | None = None, prior: Mapping[Hashable, float] | None = None,
               prior_rollouts: float = 4.0, strata: Mapping[Hashable, Hashable] | None = None):
    """Makes an allocator that has seen nothing.

    Args:
      low, high: bounds of each budget.
      rule, value, nu, solver: as in `allocate.budgets`.
      pass_discount: share of the evidence that a pass over the split leaves, because the policy moves meanwhile.
      recalibrate: whether posteriors are fitted to the verdicts of the last steps.
      num_tasks: tasks of the split: when so many were observed, a pass is over. None: the tasks observed so far, and
        one that is observed for the first time does not count towards a pass.
      prior: success rates known before, such as another model's: id -> rate in [0, 1]. Not all tasks need one.
      prior_rollouts: rollouts that a rate in `prior` is worth.
      strata: id -> label, such as dataset and difficulty. Tasks of a label share a fitted prior; so do the others.

    Raises:
      ValueError: a setting out of its bounds.
    """
    knobs.Alloc(low=low, high=high, rule=rule, solver=solver, pass_discount=pass_discount, recalibrate=recalibrate)
    knobs.Tasks.check(prior_rollouts=prior_rollouts)
    value_lib.check(value, nu)
    if num_tasks is not None and not (isinstance(num_tasks, numbers.Integral) and num_tasks > 0):
      raise ValueError(f'num_tasks={num_tasks!r} must be a positive whole number, or None where it is not known')
    for x, rate in (prior or {}).items():
      if not (isinstance(rate, (numbers.Real, np.bool_)) and 0 <= rate <= 1):
        raise ValueError(f'prior[{x!r}]={rate!r} must be a rate in [0, 1]; leave out what is not known')
    for x, label in (strata or {}).items():
      if not isinstance(label, Hashable):
        raise ValueError(f'strata[{x!r}]={label!r} is no label that can be looked up; give texts or numbers')
    self._settings = dict(
        low=int(low), high=int(high), rule=rule, nu=float(nu), solver=solver, recalibrate=recalibrate,
        value=value if isinstance(value, str) else getattr(value, '__qualname__', type(value).__name__),
        num_tasks=num_tasks and int(num_tasks), pass_discount=float(pass_discount),
        prior_rollouts=float(prior_rollouts))
    self._value = value
    self._prior = dict(prior or {})
    self._strata = dict(strata or {})
    self._stratum = {label: y for y, label in enumerate(dict.fromkeys([None, *self._strata.values()]))}
    self._row: dict[Hashable, int] = {}
    self._stats = self._unseen([])
    self._recent = collections.deque(maxlen=_GROUPS)  # (a, b) of the forecast, right and all rollouts of a group
    self._tokens: bool | None = None  # whether steps come with tokens; None before any

  def __len__(self) -> int:
    """The number of tasks observed so far."""
    return len(self._row)

  def budgets(self, ids: Iterable[Hashable], total: float, cost: Array | None = None, *, most_tasks: int | None = None
              ) -> np.ndarray:
    """How many rollouts each task of a step gets; nothing is remembered of the call.

    Args:
      ids: of M tasks, each once: a list, or a vector of numpy, torch or jax. Tasks not observed have the prior's rate.
      total: R, the rollouts to share; with `cost` the capacity, in its unit.
      cost: cost_M, positive, the cost of a rollout of each task, such as `expected_tokens`.
      most_tasks: tasks that get any, at most, where low = 0. None: any number.

    Returns:
      budget_M, int32, each in low..high, as `allocate.budgets` says. np.repeat(rows, budget_M) repeats rows so.

    Raises:
      ValueError: ids that are repeated or no ids, and as `allocate.budgets`.
    """
    ids = _ids(ids)
    if len(set(ids)) < len(ids):
      twice, count = collections.Counter(ids).most_common(1)[0]
      raise ValueError(f'the task {twice!r} stands {count} times in ids; a task has one budget a step, so name it once')
    if not ids and not total:
      return np.zeros(0, np.int32)
    stats, index_M = self._with(ids)
    failure_rate = None
    if self._value == 'coba':
      all_I = estimate.posterior(stats, np.arange(len(stats.rollouts_I)))
      failure_rate = 1 - float(estimate.mean_rate(all_I).mean())
    chosen = {name: self._settings[name] for name in ('low', 'high', 'rule', 'nu', 'solver')}
    return allocate.budgets(estimate.posterior(stats, index_M), total, value=self._value, cost_M=cost,
                            most_tasks=most_tasks, failure_rate=failure_rate, **chosen)

  def observe(self, ids: Iterable[Hashable], successes: Array, failures: Array, tokens: Array | None = None) -> None:
    """Takes in the verdicts of a step. Call it once a step, with all rollouts that were verified.

    Args:
      ids: of M tasks. The counts of a repeated id are summed, so an entry may also be a single rollout.
      successes, failures: [M], how many rollouts of each task were right and wrong in this step. Tasks without
        either are passed over.
      tokens: [M], the completion tokens of these rollouts together; of all steps or of none. Entries of single
        rollouts tell the lengths of right and wrong ones apart.

    Raises:
      ValueError: counts that are negative, not whole, beyond 2^20 or not one for each id; tokens of some steps only;
        more tasks than `num_tasks`. The allocator is then as before the call.
    """
    ids = _ids(ids)
    right_M, wrong_M = _counts('successes', successes, len(ids)), _counts('failures', failures, len(ids))
    if self._tokens not in (None, tokens is not None):
      raise ValueError('tokens must be given of all steps or of none; the steps before had '
                       + ('them' if self._tokens else 'none'))
    token_M = np.zeros(len(ids)) if tokens is None else _counts('tokens', tokens, len(ids), most=np.inf)
    group_ids = list(dict.fromkeys(x for x, n in zip(ids, right_M + wrong_M) if n))
    if not group_ids:
      return
    stats, index_K = self._with(group_ids)
    if self._settings['num_tasks'] and len(stats.rollouts_I) > self._settings['num_tasks']:
      raise ValueError(
          f"{len(stats.rollouts_I)} different tasks were observed, and num_tasks={self._settings['num_tasks']}; give "
          'the size of the split, and ids that stay the same each time that a task comes')
    group_of = {x: k for k, x in enumerate(group_ids)}
    group_M = [group_of.get(x, len(group_ids)) for x in ids]  # ids without a rollout are of none
    total = lambda x_M: np.bincount(group_M, weights=x_M, minlength=len(group_ids) + 1)[:len(group_ids)]
    right_K, wrong_K, length_M = total(right_M), total(wrong_M), token_M / np.maximum(right_M + wrong_M, 1)
    forecast = estimate.posterior(stats, index_K)
    # A row for each rollout, the right ones of all groups first.
    outcomes = ((right_K, total(length_M * right_M)), (wrong_K, total(length_M * wrong_M)))
    each = lambda x_K, count_K: np.repeat(x_K, count_K.astype(int))
    self._stats = estimate.observe(
        stats, index_K, np.concatenate([each(np.arange(len(group_ids)), n_K) for n_K, _ in outcomes]),
        np.arange(int((right_K + wrong_K).sum())) < right_K.sum(),
        np.concatenate([each(x_K / np.maximum(n_K, 1), n_K) for n_K, x_K in outcomes]),
        discount=self._discount(stats, index_K))
    for x in group_ids:
      self._row.setdefault(x, len(self._row))
    self._recent.extend(zip(*(x_K.tolist() for x_K in (*forecast, right_K, right_K + wrong_K))))
    self._tokens = tokens is not None

  def posterior(self, ids: Iterable[Hashable]) -> Beta:
    """The forecast of the success rate of each task; of tasks not observed it is the prior."""
    return estimate.posterior(*self._with(_ids(ids)))

  def expected_tokens(self, ids: Iterable[Hashable], *, default: float) -> np.ndarray:
    """Expected completion tokens of a rollout of each task: a cost for `budgets`, with a total in tokens.

    Args:
      default: what all tasks have before any step was observed.

    Raises:
      ValueError: steps were observed without their tokens.
    """
    if self._tokens is False:
      raise ValueError('no tokens were observed; give observe(..., tokens=) those of each task')
    return estimate.tokens(*self._with(_ids(ids)), default=default)

  def calibration(self) -> dict[str, float]:
    """How well the last 512 groups were forecast.

    Returns:
      groups: how many there are.
      log_loss, constant_log_loss: of the forecast rate, and of the groups' mean rate as known afterwards; nats a
        rollout. A forecast that tells tasks apart is below the constant.
      count_log_loss: of the groups' counts under the whole posterior, nats a rollout.
      expected_gradient_ratio, gradient_ratio: share of the rollouts in groups with both outcomes, as forecast for
        these groups' sizes and as it came out. nan, as the losses, where nothing was observed.
    """
    a_K, b_K, right_K, count_K = np.array(self._recent, float).reshape(-1, 4).T
    if not len(a_K):
      return dict(groups=0, **dict.fromkeys(('log_loss', 'constant_log_loss', 'count_log_loss',
                                             'expected_gradient_ratio', 'gradient_ratio'), float('nan')))
    forecast, mixed_K = Beta(a_K, b_K), (right_K > 0) & (right_K < count_K)
    return dict(
        groups=len(a_K),
        log_loss=scores.log_loss(a_K / (a_K + b_K), right_K, count_K),
        constant_log_loss=scores.log_loss(right_K.sum() / count_K.sum(), right_K, count_K),
        count_log_loss=scores.count_log_loss(forecast, right_K, count_K),
        expected_gradient_ratio=allocate.expected_gradient_ratio(forecast, count_K.astype(int)),
        gradient_ratio=float(count_K @ mixed_K / count_K.sum()))

  def state_dict(self) -> dict[str, Any]:
    """All that was observed, in dicts, lists, numbers and texts: for json, pickle and torch.save.

    JSON needs ids, and labels of strata, that are texts, whole numbers or tuples of them.
    """
    return dict(version=_VERSION, settings=dict(self._settings), ids=list(self._row), labels=list(self._stratum),
                stats={name: x.tolist() for name, x in self._stats._asdict().items()},
                recent=[list(group) for group in self._recent], tokens=self._tokens)

  def load_state_dict(self, state: Mapping[str, Any]) -> None:
    """Goes on from a `state_dict`, as the allocator that it is of would have.

    Raises:
      ValueError: a state of another version, of other settings, or of another prior or strata of the tasks in it; or
        one that is damaged. The allocator is then as before the call.
    """
    version = state.get('version') if isinstance(state, Mapping) else None
    if version != _VERSION:
      raise ValueError(f'a state of version {version!r} cannot be read; this code has version {_VERSION}')
    if missing := [name for name, kind in _STATE.items() if name not in state or not isinstance(state[name], kind)]:
      raise ValueError(f'the state lacks {missing}, or they are damaged; {_WHOLE}')
    theirs = state['settings']
    if other := [f'{name}={theirs.get(name)!r}, here {x!r}' for name, x in self._settings.items()
                 if theirs.get(name) != x]:
      raise ValueError(f"the state is of an allocator with {'; '.join(other)}; make one with the state's settings")
    ids = _ids([_hashable(x) for x in state['ids']])
    if len(set(ids)) < len(ids):
      raise ValueError(f'the state has {len(ids) - len(set(ids))} ids twice; {_WHOLE}')
    labels = [_hashable(x) for x in state['labels']]
    unseen = self._unseen(ids)
    stats = _read(state['stats'], unseen)
    recent = _numbers('recent', state['recent'], np.dtype(float))
    if recent.size % 4 or recent.min(initial=0) < 0:
      raise ValueError(f'recent of the state is not of groups of four numbers, 0 or more; {_WHOLE}')
    same_I = np.all(stats.known_OI == unseen.known_OI, axis=0)
    for x, y, same in zip(ids, stats.stratum_I, same_I):
      if not same or labels[y:y + 1] != [self._strata.get(x)]:
        raise ValueError(f'the state has another prior or stratum of task {x!r} than this allocator; make one with the '
                         'prior, prior_rollouts and strata that the state was made with')
    self._stats = stats._replace(stratum_I=unseen.stratum_I)
    self._row = {x: i for i, x in enumerate(ids)}
    self._recent = collections.deque(map(tuple, recent.reshape(-1, 4).tolist()), maxlen=_GROUPS)
    self._tokens = state['tokens']

  def _unseen(self, ids: list[Hashable]) -> TaskStats:
    """Statistics of tasks that were never observed."""
    return estimate.init(
        len(ids), groups=_GROUPS if self._settings['recalibrate'] else 0,
        stratum_I=np.array([self._stratum[self._strata.get(x)] for x in ids], np.int32),
        prior_rate_I=np.array([self._prior.get(x, np.nan) for x in ids], float),
        prior_rollouts=self._settings['prior_rollouts'])

  def _with(self, ids: list[Hashable]) -> tuple[TaskStats, np.ndarray]:
    """The statistics with rows for these tasks, new ones behind those that there are, and the tasks' rows."""
    new = [x for x in dict.fromkeys(ids) if x not in self._row]
    stats, row = self._stats, self._row
    if new:
      row = row | {x: len(row) + i for i, x in enumerate(new)}
      # The letter I of a name is the axis of tasks; what has none is of all tasks together.
      axis = lambda name: name.rpartition('_')[2].find('I')
      stats = TaskStats(*(np.concatenate([x, y], axis=axis(name)) if axis(name) >= 0 else x
                          for name, x, y in zip(TaskStats._fields, stats, self._unseen(new))))
    return stats, np.array([row[x] for x in ids], np.int64)

  def _discount(self, stats: TaskStats, index_K: np.ndarray) -> float:
    """The `discount` with which `estimate.observe` lets a step of K tasks leave what it should leave.

    observe discounts by discount ** (K / I), where I are the tasks seen so far.
    """
    I, K, num_tasks = len(stats.rollouts_I), len(index_K), self._settings['num_tasks']
    share_of_pass = K / num_tasks if num_tasks else np.sum(stats.rollouts_I[index_K] > 0) / I
    return self._settings['pass_discount'] ** (share_of_pass * I / K)


def _ids(ids: Iterable[Hashable]) -> list[Hashable]:
  """Ids as a list. Scalars of numpy and torch become numbers: those of torch are equal to nothing but themselves."""
  ids = ids.tolist() if hasattr(ids, 'tolist') else ids
  if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
    raise ValueError(f'ids={ids!r} is one id; give a list of them')
  ids = [x.item() if getattr(x, 'ndim', None) == 0 else x for x in ids]
  for m, x in enumerate(ids):
    try:
      hash(x)
    except TypeError:
      raise ValueError(f'ids[{m}]={x!r} cannot be looked up; ids are hashable, such as texts or numbers') from None
    if x != x:
      raise ValueError(f'ids[{m}]={x!r} is equal to no id, not even to itself; give the task another')
  return ids


def _hashable(x: Any) -> Any:
  """An id as it was before JSON made lists of tuples."""
  return tuple(map(_hashable, x)) if isinstance(x, list) else x


def _read(lists: Mapping[str, Any], like: TaskStats) -> TaskStats:
  """Statistics of nested lists, of the shapes and dtypes of others."""
  read = {name: _numbers(f'stats[{name!r}]', lists.get(name, ()), x.dtype) for name, x in like._asdict().items()}
  for name, x in like._asdict().items():
    if read[name].size != x.size:
      raise ValueError(f'stats[{name!r}] of the state has {read[name].size} numbers, and its ids ask for {x.size}; '
                       f'{_WHOLE}')
    if name in _COUNTS and read[name].min(initial=0) < 0:
      raise ValueError(f'stats[{name!r}] of the state has the count {read[name].min():g}, below 0; {_WHOLE}')
  return TaskStats(*(read[name].reshape(x.shape) for name, x in like._asdict().items()))


def _numbers(name: str, lists: Any, dtype: np.dtype) -> np.ndarray:
  """The numbers of nested lists. Raises ValueError for what is none."""
  try:
    x = np.array(lists, dtype)
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(f'{name} of the state are no numbers ({error}); {_WHOLE}') from error
  if not np.all(np.isfinite(x)):
    raise ValueError(f'{name} of the state has a number that is not finite; {_WHOLE}')
  return x


def _counts(name: str, x: Array, num_ids: int, *, most: float = _MOST) -> np.ndarray:
  """float64 [M] of a count for each id. Raises ValueError for what is none."""
  x_M = np.asarray(x)
  if x_M.shape != (num_ids,) or x_M.dtype.kind not in 'biuf':
    raise ValueError(f'{name} must hold a number for each of {num_ids} ids, not {x_M.dtype} of shape {x_M.shape}')
  x_M = x_M.astype(float)
  good_M = (x_M >= 0) & (x_M <= most) & (x_M < np.inf) & (x_M == np.floor(x_M))
  if not good_M.all():
    m = int(np.argmin(good_M))
    raise ValueError(f'{name}[{m}]={x_M[m]:g} must be a whole number' + (
        f' in 0..{most}, the rollouts of this step' if most < np.inf else ', 0 or more'))
  return x_M
