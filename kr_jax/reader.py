"""A run's record as columns: what its steps, evaluations, tasks and rollouts were, for scripts and notebooks.

    run = kr_jax.read('runs/arithmetic')
    run.steps['reward_mean']           # a numpy array, an element a step
    run.tasks.frame()                  # a pandas DataFrame, where pandas is installed

It reads what a report reads (report/run.py): a record that is cut short or of an older version gives what can be read,
and `problems` says what cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import functools
import os
from typing import Any

import numpy as np
from scipy import special

from kr_jax import files
from kr_jax import mirror
from kr_jax.allocation import estimate
from kr_jax.record import rollouts as rollouts_lib
from kr_jax.record import split as split_lib
from kr_jax.report import compare
from kr_jax.report import page
from kr_jax.report import run as run_lib
from kr_jax.sections import nearest

_INTERVAL = (0.025, 0.975)  # of an estimate
STATUSES = ('unseen', 'unverified', *compare.CLASSES)


class Columns(Mapping):
  """A table: arrays by name, each with an element a row.

  Whole numbers are int64; numbers of which some are unknown are float64, with nan there; lists of numbers that are all
  of one length are the rows of a matrix. All else is of dtype object, with None where it is unknown.
  """

  def __init__(self, columns: Mapping[str, np.ndarray], rows: int):
    self._columns, self.rows = dict(columns), rows

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self._columns:
      raise KeyError(f'there is no column {name!r}{nearest(name, self._columns)}')
    return self._columns[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._columns)

  def __len__(self) -> int:
    return len(self._columns)

  def __repr__(self) -> str:
    return f'{self.rows} rows of {", ".join(self) or "nothing"}'

  def frame(self) -> Any:
    """A pandas DataFrame; a cell of a matrix's column is a list. Raises ImportError where pandas is not installed."""
    try:
      import pandas
    except ImportError as error:
      raise ImportError('frame() needs pandas: pip install pandas') from error
    return pandas.DataFrame(
        {name: x if x.ndim == 1 else [*x.tolist()] for name, x in self.items()}, index=range(self.rows))


def columns(records: Sequence[Mapping[str, Any]]) -> Columns:
  """The table of some records, a row a record; a record without a field does not know it."""
  names = dict.fromkeys(name for record in records for name in record)
  return Columns({name: column([record.get(name) for record in records]) for name in names}, len(records))


def column(values: Sequence[Any]) -> np.ndarray:
  """An array of values as JSON has them, as Columns says; None is unknown."""
  kinds = {type(x) for x in values}
  if kinds == {bool} or not values:
    return np.array(values, bool if values else float)
  if kinds == {int} and all(-2 ** 63 <= x < 2 ** 63 for x in values):
    return np.array(values, np.int64)
  if kinds <= {int, float, type(None)} and kinds != {type(None)}:
    return np.array([np.nan if x is None else float(x) for x in values])
  if kinds == {list} and values[0] and len({len(x) for x in values}) == 1:
    of_all = column([x for value in values for x in value])
    if of_all.dtype.kind in 'if':
      return of_all.reshape(len(values), len(values[0]), *of_all.shape[1:])
  found = np.empty(len(values), object)
  found[:] = [*values]
  return found


class Run:
  """What a workdir holds, as it was when it was read.

  Attributes:
    workdir: as it was named.
    config: the knobs that ran, nested dicts; empty where they are not known.
    steps: a row a step: the fields of metrics.jsonl (kr_jax/record/README.md).
    evaluations: a row an evaluation; `step` is the step before which it was taken.
    problems: sentences about what is missing or cannot be read. Those of `tasks` and `rollouts` are added when they are
      read first.
  """

  def __init__(self, workdir: str, place: str):
    self.workdir, self._place, self._run = workdir, place, run_lib.read(place)
    self.config, self.problems = self._run.config, self._run.missing
    self.steps, self.evaluations = columns(self._run.steps), columns(self._run.evaluations)

  def __repr__(self) -> str:
    score = self._run.success(self._run.evaluations[-1]) if self._run.evaluations else None
    success = '' if score is None else f', {self._run.score} {score:.3f}'
    total = self._run.knob('num_steps')
    return (f'<run {self.workdir}: {self.steps.rows} of {"unknown" if total is None else total} steps{success}'
            f'{"; complete" if self.is_complete else ""}>')

  @property
  def is_complete(self) -> bool:
    """Whether all of its steps are done and the evaluation after them is recorded."""
    total = self._run.knob('num_steps')
    return isinstance(total, int) and self.steps.rows >= total and any(
        record['step'] == total for record in self._run.evaluations)

  @functools.cached_property
  def rollouts(self) -> Columns:
    """A row a rollout that was kept, a sample of each step: prompt, completion, verdict, reward, ..."""
    return columns([*map(_flat, rollouts_lib.read(self._place, problems=self.problems))])

  @functools.cached_property
  def tasks(self) -> Columns:
    """A row a training task that was seen, in the order of the split:

    index, id, source, difficulty: who it is; the last three are None where the record does not tell.
    visits: steps that it was in. rollouts, verified, right: of all of them. first_step, last_step: of its visits.
    last_budget, last_verified, last_right: of its last visit.
    estimate_mean, estimate_low, estimate_high: its success rate as it is known after the last step, with the 95 %
      interval; nan where the record does not tell.
    status: of STATUSES, by its last visit with a verdict: from 'extremely hard', no rollout right, to 'extremely easy',
      all right; 'unverified': no rollout had a verdict.
    """
    of_steps, split = self._groups()
    rows: dict[int, dict[str, Any]] = {}
    for step, found in of_steps:
      for index, budget, right, verified in zip(*(x_M.tolist() for x_M in found)):
        row = rows.setdefault(index, {
            'index': index, 'id': None, 'source': None, 'difficulty': None, 'visits': 0, 'rollouts': 0, 'verified': 0,
            'right': 0, 'first_step': step})
        for name, n in (('visits', 1), ('rollouts', budget), ('verified', verified), ('right', right)):
          row[name] += n
        row |= {'last_step': step, 'last_budget': budget, 'last_verified': verified, 'last_right': right}
        row |= dict.fromkeys(('estimate_mean', 'estimate_low', 'estimate_high'))
        if verified:
          row['status'] = compare.CLASSES[compare.status(right, verified)]
        row.setdefault('status', 'unverified')
    if split is not None:
      for index, row in rows.items():
        row |= {'id': split.id_I[index], 'source': split.source_I[index],
                'difficulty': int(split.difficulty_I[index])}
      self._add_estimates(rows, [found for _, found in of_steps], split)
    found = columns([rows[index] for index in sorted(rows)])
    unknown = {name: found[name].astype(float) for name in found if name.startswith('estimate_')}  # None: nan
    return Columns({**found, **unknown}, found.rows)

  def _groups(self) -> tuple[list[tuple[int, split_lib.Groups]], split_lib.Split | None]:
    """What came of the tasks of each step, and who they are; says what is not known."""
    split = None
    try:
      split = split_lib.read(self._place)
      if split is None and self._run.steps:
        self.problems.append(f'{split_lib.FILE} is not there, as of runs of older versions: who the tasks are, and '
                             'estimates of their success, are unknown')
    except ValueError as error:
      self.problems.append(f'{error}: who the tasks are, and estimates of their success, are unknown')
    found = [(record['step'], split_lib.groups(record, split and len(split.id_I))) for record in self._run.steps]
    known = [(step, x) for step, x in found if x is not None]
    if len(known) < len(found):
      self.problems.append(f'{len(found) - len(known)} of {len(found)} steps do not tell what came of their tasks, and '
                           'are left out of tasks')
    return known, split

  def _add_estimates(self, rows: Mapping[int, dict[str, Any]], of_steps: Sequence[split_lib.Groups],
                     split: split_lib.Split) -> None:
    """Adds what is known of the tasks' success rates; says why where it is not."""
    knobs = [self._run.knob(name) for name in ('alloc.pass_discount', 'tasks.per_step', 'alloc.recalibrate')]
    last = self._run.steps[-1]['step'] if self._run.steps else -1
    if len(of_steps) != last + 1 or None in knobs:
      self.problems.append('estimates of the success of tasks are unknown: they need every step, and the knobs of the '
                           'run')
      return
    discount, per_step, recalibrate = knobs
    stats = split_lib.replay(split, of_steps, pass_discount=discount,
                             recalibration_groups=estimate.recalibration_groups(per_step, recalibrate))
    belief = estimate.posterior(stats, np.array([*rows], int))
    low_M, high_M = special.betaincinv(belief.a_M, belief.b_M, np.array(_INTERVAL)[:, None])
    for row, mean, low, high in zip(rows.values(), estimate.mean_rate(belief).tolist(), low_M.tolist(),
                                    high_M.tolist()):
      row |= {'estimate_mean': mean, 'estimate_low': low, 'estimate_high': high}

  def report(self, output: str | None = None) -> str:
    """Writes the report of the run as it stands now, and returns the path of its report.html.

    output: a directory; None: the workdir.
    """
    with mirror.opened(self.workdir) as place, mirror.output(output or place.path) as folder:
      path = page.write([place.path], output=folder)[0]
    return files.join(files.expanded(output or self.workdir), os.path.basename(path))


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
  """A rollout whose estimate stands in fields of its own."""
  before = record.get('estimate')
  parts = {f'estimate_{name}': before.get(name) for name in ('mean', 'low', 'high')} if isinstance(before, dict) else {}
  return {name: x for name, x in record.items() if name != 'estimate'} | parts


def read(workdir: str | os.PathLike) -> Run:
  """Reads the workdir of a run, on this machine or in a bucket.

  Raises ValueError where there is no such directory, or it cannot be read.
  """
  workdir = files.expanded(workdir)
  with mirror.opened(workdir) as place:
    run = Run(workdir, place.path)
    if place.path != workdir:  # a copy, which is removed at the end
      run.rollouts, run.tasks
  return run
