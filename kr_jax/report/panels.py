"""What is drawn of one run: rows of plain values, for charts and tables of a page.

Every function takes a run, and returns rows without the run's labels. Long runs are thinned: a row of a thinned line is
the mean of the steps that it stands for, and a trailing mean holds only what was known by its step. What is unknown is
None or has no row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kr_jax import health
from kr_jax.allocation import scores
from kr_jax.costs import pricing
from kr_jax.record import rollouts
from kr_jax.record import terminal
from kr_jax.report import compare
from kr_jax.report import run as run_lib
from kr_jax.report.run import figure
from kr_jax.report.run import number
from kr_jax.report.run import numbers
from kr_jax.rewards import verdicts

Row = dict[str, Any]
_COLUMNS = 60  # of budgets over time, at the most
_POINTS = 200  # of a line over steps, at the most
_WINDOWS = 15  # a trailing mean is over a part of so many of the run
_HARDEST = 8  # tasks
_STEPS_READ = 60  # at the most, to find them
_KINDS = (*verdicts.OUTCOMES, 'truncated_without_answer')  # of what came of rollouts; the last is a part of no_answer
_BYTES = {'collectives': 'collective_bytes', 'host': 'host_bytes', 'checkpoint': 'checkpoint_bytes'}  # counters


def curves(run: run_lib.Run) -> list[Row]:
  """An evaluation a row: success, its 95 % interval, and what the run had cost before the evaluation's step.

  Costs are those of all attempts. Where there is no ledger, rollouts and tokens are those of the recorded steps.
  """
  cost_of = _costs(run)
  return [{'step': record['step'], 'success': run.success(record), 'low': run.success(record, '_low'),
           'high': run.success(record, '_high'), **cost_of(record['step'])} for record in run.evaluations]


def _costs(run: run_lib.Run) -> Callable[[int], Row]:
  """The costs before a step, by AXES."""
  rows, steps = [], [record['step'] for record in run.steps]
  entries, attempts = run.ledger.entries, run.ledger.attempts
  # A ledger that begins late tells the cost of no step, and one that ends early none after its end.
  if entries and min(attempt['first_step'] for attempt in attempts) == 0:
    rows = pricing.cumulative(entries, attempts, run.hardware)
  elif not entries:
    total = dict.fromkeys(('rollouts', 'tokens'), 0)
    for record in run.steps if steps == list(range(len(steps))) else ():
      for axis, name in (('rollouts', 'rollouts_total'), ('tokens', 'tokens_generated')):
        more = number(record, name)
        total[axis] = None if None in (total[axis], more) else total[axis] + more
      rows.append({'step': record['step'], **total})
  known = {axis for axis in compare.AXES if any(number(row, axis) is not None for row in rows)}
  last = max((row['step'] for row in rows), default=-1)

  def cost_of(step: int) -> Row:
    if step > last + 1:
      return dict.fromkeys(compare.AXES)
    before = max((row for row in rows if row['step'] < step), key=lambda row: row['step'], default=None)
    return {axis: (0.0 if axis in known else None) if before is None else number(before, axis)
            for axis in compare.AXES}

  return cost_of


def difficulty(run: run_lib.Run) -> list[Row]:
  """Held-out success by difficulty, at each evaluation."""
  found = []
  for record in run.evaluations:
    for name in record:
      parts = name.split('/')
      if len(parts) == 3 and parts[1].startswith('difficulty_') and parts[2] == run.score:
        found.append({'step': record['step'], 'difficulty': parts[1].removeprefix('difficulty_'),
                      'success': number(record, name)})
  return found


def reliability(run: run_lib.Run) -> list[Row]:
  """Success rates forecast and observed, of each half of the run, by bins of the forecast; intervals are of 95 %."""
  of_steps, found = [x for record in run.steps if (x := _reliability(record)) is not None], []
  of_steps = [x for x in of_steps if len(x) == len(of_steps[-1])]
  half = (len(of_steps) + 1) // 2
  for name, part in (('first', of_steps[:half]), ('second', of_steps[half:])):
    if not part:
      continue
    sum_B5 = np.sum(part, axis=0)
    low_B, high_B = scores.interval(sum_B5)
    found += [{'half': name, 'forecast': float(row[1] / row[0]), 'observed': float(row[2] / row[0]),
               'low': float(low), 'high': float(high), 'rollouts': int(row[0])}
              for row, low, high in zip(sum_B5, low_B, high_B) if row[0]]
  return found


def _reliability(record: Row) -> np.ndarray | None:
  """reliability_B5 of a step; None where it has none of that form."""
  rows = record.get('reliability')
  if not isinstance(rows, list) or not rows or any(len(numbers(row)) != 5 for row in rows):
    return None
  reliability_B5 = np.array(rows, float)
  n_B, expected_B, right_B, groups_B, _ = reliability_B5.T
  is_one = (reliability_B5 >= 0).all() and np.all(right_B <= n_B) and np.all(expected_B <= n_B + 1e-6)
  return reliability_B5 if is_one and np.all((groups_B > 0) == (n_B > 0)) else None


def log_loss(run: run_lib.Run) -> list[Row]:
  return _lines(run, 'nats', (('forecast', 'log_loss'), ('constant', 'constant_log_loss')))


def gradient(run: run_lib.Run) -> list[Row]:
  """The share of rollouts in mixed groups: observed, expected of the run's budgets, and of uniform ones."""
  return _lines(run, 'ratio', (('observed', 'effective_gradient_ratio'), ('expected', 'expected_gradient_ratio'),
                               ('uniform', 'uniform_gradient_ratio')))


def mixed(run: run_lib.Run) -> list[Row]:
  return _lines(run, 'tasks', (('observed', 'mixed_tasks'), ('expected', 'expected_mixed_tasks'),
                               ('uniform', 'uniform_mixed_tasks')))


def _lines(run: run_lib.Run, unit: str, names: Sequence[tuple[str, str]]) -> list[Row]:
  """Trailing means of figures of steps, thinned."""
  found = []
  for label, name in names:
    points = [(record['step'], x) for record in run.steps if (x := number(record, name)) is not None]
    mean = trailing([x for _, x in points], max(1, len(run.steps) // _WINDOWS))
    found += [{'step': points[i][0], 'name': label, unit: mean[i]} for i in thinned(len(points), _POINTS)]
  return found


def trailing(x_S: Sequence[float], window: int) -> list[float]:
  """The mean of each figure and of those before it, `window` of them at the most."""
  sum_S = np.concatenate([[0.0], np.cumsum(np.asarray(x_S, float))])
  end_S = np.arange(1, len(x_S) + 1)
  begin_S = np.maximum(end_S - window, 0)
  return ((sum_S[end_S] - sum_S[begin_S]) / (end_S - begin_S)).tolist()


def thinned(n: int, most: int) -> list[int]:
  """`most` of n positions, evenly, the last one among them; all where there are no more."""
  return list(range(n)) if n <= most else [(i + 1) * n // most - 1 for i in range(most)]


def budgets(run: run_lib.Run) -> list[Row]:
  """Mean budgets by estimated success rate; a row a bin and a part of the run, of at most 60 parts."""
  records = [r for r in run.steps if isinstance(r.get('budget_by_success_rate'), list) and r['budget_by_success_rate']]
  found, ends = [], [0] + [i + 1 for i in thinned(len(records), _COLUMNS)]
  for begin, end in zip(ends, ends[1:]):
    part = records[begin:end]
    bins = len(part[0]['budget_by_success_rate'])
    for b in range(bins):
      some = [x for r in part if len(r['budget_by_success_rate']) == bins
              and (x := figure(r['budget_by_success_rate'][b])) is not None]
      if some:
        found.append({'step': part[0]['step'], 'bin_low': b / bins, 'bin_high': (b + 1) / bins,
                      'budget': float(np.mean(some))})
  return found


def status(run: run_lib.Run) -> list[Row]:
  """How many tasks moved from which class to which: held-out ones from the first evaluation to the last, training
  tasks from their first visit to their last."""
  found = []
  evaluated = [x for r in run.evaluations if (x := _task_counts(r)) is not None]
  if len(evaluated) > 1 and len(evaluated[0]['right']) == len(evaluated[-1]['right']):
    found.append(('held-out', compare.moves_held_out(evaluated[0], evaluated[-1])))
  visits = [visit for record in run.steps for visit in _visits(record)]
  found.append(('training', compare.moves_in_training(visits)))
  return [{'of': of, 'classes': list(compare.CLASSES), 'matrix': compare.status_matrix(moves)}
          for of, moves in found if moves]


def _task_counts(record: Row) -> dict[str, list[int]] | None:
  """The right and the verified rollouts of each held-out task."""
  counts = record.get('eval_tasks')
  if not isinstance(counts, dict):
    return None
  right, verified = (numbers(counts.get(name)) for name in ('right', 'verified'))
  if not right or len(right) != len(verified) or not all(0 <= k <= n for k, n in zip(right, verified)):
    return None
  return {'right': right, 'verified': verified}


def rise(run: run_lib.Run) -> terminal.Change | None:
  """How much held-out success rose from the first evaluation to the last, of which the error is known; else None."""
  ends = (run.evaluations[0], run.evaluations[-1]) if len(run.evaluations) > 1 else ()
  if not ends or None in map(run.success, ends):
    return None
  first, last = ({'eval_tasks': _task_counts(record), **{
      f'eval/{run.score}{end}': run.success(record, end) for end in ('', '_stderr')}} for record in ends)
  found = terminal.change(first, last, run.score)
  return None if found is None or found.error is None else found


def robustness(run: run_lib.Run) -> list[Row]:
  """Held-out success under perturbed prompts over that under the prompts as they are: of the last evaluation that
  tells, else of evaluation.json."""
  for record in reversed(run.evaluations):
    names = [name for name in record if name.startswith('eval/perturbed_') and name.endswith('/ratio')]
    if names:
      return [{'name': name.removeprefix('eval/perturbed_').removesuffix('/ratio'), 'step': record['step'],
               **{part: number(record, f'{name}{end}') for part, end in (
                   ('ratio', ''), ('low', '_low'), ('high', '_high'))}} for name in names]
  found = []
  for name, of in _dict(run.evaluation.get('perturbed')).items():
    ratio = _dict(_dict(_dict(of).get('metrics')).get('ratio'))
    found.append({'name': name, 'step': run.evaluation.get('step'), 'ratio': number(ratio, 'mean'),
                  'low': number(ratio, 'low'), 'high': number(ratio, 'high')})
  return found


def _visits(record: Row) -> list[tuple[int, int, int]]:
  """(task, right, verified) of a step's groups."""
  columns = [numbers(record.get(f'group_{name}')) for name in ('index', 'right', 'verified')]
  if len({len(column) for column in columns}) > 1:
    return []
  return [(task, right, n) for task, right, n in zip(*columns) if 0 <= right <= n]


def goodput(run: run_lib.Run) -> list[Row]:
  if run.goodput is None:
    return []
  rows = [('productive', 'productive', run.goodput['productive_s'])]
  rows += [(kind, 'badput', seconds) for kind, seconds in run.goodput['badput'].items()]
  return [{'category': category, 'kind': kind, 'seconds': seconds} for category, kind, seconds in rows if seconds]


def phases(run: run_lib.Run) -> list[Row]:
  """Seconds of each phase, over all attempts; the share of them in which the devices had work; use of peaks."""
  found = []
  for phase, of in (run.price.by_phase if run.price else {}).items():
    seconds, busy = of['wall_s'].value or 0.0, of['busy_s'].value
    found.append({'phase': phase, 'seconds': seconds,
                  'device_busy_share': min(busy / seconds, 1.0) if seconds and busy is not None else None,
                  'mfu': of['mfu'].value, 'bandwidth_use': of['bandwidth_use'].value})
  return found


def memory(run: run_lib.Run) -> list[Row]:
  """The largest memory that was in use in each phase."""
  source = {attempt['attempt']: attempt.get('memory') for attempt in run.ledger.attempts}
  found = []
  for phase, of in run.by_phase.items():
    peaks = [(x, source[entry['attempt']]) for entry in of if (x := number(entry, 'peak_bytes')) is not None]
    if peaks:
      most, of_what = max(peaks, key=lambda peak: peak[0])
      found.append({'phase': phase, 'gb': most / 1e9, 'source': of_what if of_what in ('device', 'host') else 'host'})
  return found


def peak(run: run_lib.Run) -> Row | None:
  """The row of `memory` with the most; writing a report does not count. None where none was seen."""
  return max((row for row in memory(run) if row['phase'] != 'report'), key=lambda row: row['gb'], default=None)


def network(run: run_lib.Run) -> list[Row]:
  found = []
  for phase, of in run.by_phase.items():
    for form, name in _BYTES.items():
      counts = [x for entry in of if (x := number(entry, name)) is not None]
      if counts:
        found.append({'phase': phase, 'what': form, 'bytes': sum(counts)})
  return found


def verification(run: run_lib.Run) -> list[Row]:
  """What came of rollouts, by dataset and verifier: a row a kind, with its share and up to three examples."""
  counts = {}
  for record in run.steps:
    for name, of in _dict(record.get('verification')).items():
      for kind in _dict(of):
        if (n := number(of, kind)) is not None:
          of_name = counts.setdefault(name, {})
          of_name[kind] = of_name.get(kind, 0) + n
  examples = health.kept({'verification_examples': {
      name: {kind: [str(text) for text in texts] for kind, texts in _dict(of).items() if isinstance(texts, list)}
      for name, of in _dict(record.get('verification_examples')).items()}} for record in run.steps)
  found = []
  for name, of in counts.items():
    total = sum(of.get(kind, 0) for kind in verdicts.OUTCOMES)
    found += [{'name': name, 'kind': kind, 'rollouts': n, 'share': n / total if total else None,
               'examples': examples.get(name, {}).get(kind, [])}
              for kind, n in of.items() if n and kind in _KINDS]
  return found


def _dict(x: Any) -> dict[str, Any]:
  return x if isinstance(x, dict) else {}


def alarms(run: run_lib.Run) -> list[Row]:
  return [{'step': record['step'], 'text': str(text)} for record in run.steps
          for text in (record['alarms'] if isinstance(record.get('alarms'), list) else ())]


def hardest(run: run_lib.Run, problems: list[str]) -> list[Row]:
  """The tasks that were thought hardest when a rollout solved them for the first time, and that rollout.

  Of long runs only the steps are read that solved the tasks with the most rollouts before.

  Args:
    problems: gets sentences about files that cannot be read.
  """
  solved, kept = _first_successes(run), set(run.rollout_steps)
  steps = [step for step in dict.fromkeys(step for step, *_ in solved) if step in kept]
  if not solved:  # records of steps do not tell
    steps = run.rollout_steps
    steps = [steps[i] for i in thinned(len(steps), _STEPS_READ)]
  first = {}
  for step in sorted(steps[:_STEPS_READ]):
    for record in rollouts.read(run.workdir, step, status='new_success', problems=problems):
      if number(_dict(record.get('estimate')), 'mean') is not None:
        first.setdefault(record['task'], record)
  found = sorted(first.values(), key=lambda record: record['estimate']['mean'])[:_HARDEST]
  text = lambda record, name: '' if record.get(name) is None else str(record[name])
  return [{'task': text(record, 'task'), 'prompt': text(record, 'prompt'), 'answer': text(record, 'answer'),
           'rollouts_before': _rollouts_before(solved, record), 'step': record.get('step'),
           'completion': text(record, 'completion'),
           'estimate': {name: number(record['estimate'], name) for name in ('mean', 'low', 'high')}}
          for record in found]


def _first_successes(run: run_lib.Run) -> list[tuple[int, int, int, int, int]]:
  """(step, task, rollouts before, budget, right) of the steps in which a task that had failed before was solved for the
  first time; those with the most rollouts before first."""
  before, solved, found = {}, set(), []
  for record in run.steps:
    columns = [numbers(record.get(f'group_{name}')) for name in ('index', 'right', 'budget')]
    for task, right, budget in zip(*columns):
      if right and task not in solved:
        solved.add(task)
        if task in before:
          found.append((record['step'], task, before[task], budget, right))
      before[task] = before.get(task, 0) + budget
  return sorted(found, key=lambda of: -of[2])


def _rollouts_before(solved: Sequence[tuple[int, int, int, int, int]], record: Row) -> int | None:
  """Rollouts that the task of a kept rollout had had before its step. Kept rollouts do not name the row of their task:
  None where another task was solved in that step by as many right ones of as many rollouts."""
  found = [before for step, _, before, budget, right in solved
           if (step, budget, right) == tuple(record.get(name) for name in ('step', 'budget', 'right_in_group'))]
  return found[0] if len(found) == 1 else None
