"""The view of runs: all that a page about one run or several shows, as plain values.

Runs whose configs differ by the seed alone are a group. The scorecard has the five resources and the other metrics of
Bai et al. 2023, arXiv 2401.00625 (computation, memory, energy, money, network). Each figure says whether it is
measured, counted or modelled. A figure that cannot be known is None, and its note says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import datetime
import json
import time
from typing import Any

from kr_jax import knobs
from kr_jax.report import compare
from kr_jax.report import figures
from kr_jax.report import paired
from kr_jax.report import panels
from kr_jax.report import run as run_lib
from kr_jax.report import verdicts
from kr_jax.report.figures import Figure
from kr_jax.report.run import figure
from kr_jax.report.run import number

# Knobs of where, how often and how safely a run works, not of what it learns: they make no other group.
_ASIDE = ('seed', 'topologies', 'checkpoint', 'record', 'train', 'tasks.data_dir', 'tasks.files', 'hub', 'changed',
          'task_digests', 'evaluate.pass_at', 'evaluate.maj_at', 'evaluate.perturb', *(
    f'rewards.{name}' for name in ('workers', 'timeout_s', 'memory_mb', 'max_faulty_steps', 'network', 'readable')))
_MOST_KNOBS = 8  # that are named in a sentence
_IN_A_LABEL = 3
_BASELINE = 'uniform'  # the rule whose first group others are compared with
_PANELS = (panels.curves, panels.difficulty, panels.reliability, panels.log_loss, panels.budgets, panels.gradient,
           panels.mixed, panels.status, panels.goodput, panels.phases, panels.memory, panels.network,
           panels.verification, panels.alarms)


def view(runs: Sequence[run_lib.Run], *, target: float | None = None) -> dict[str, Any]:
  """The view of runs, in their order.

  Args:
    target: a held-out success that was fixed before the runs; None: costs until it are not compared.

  Raises:
    ValueError: there is no run, or the target is no success.
  """
  if not runs:
    raise ValueError('there is no run to report; give --workdir')
  if target is not None:
    compare.check_target(target)
  labels, missing = label(runs)
  named = list(zip(labels, runs))
  tables = {}
  for rows_of in _PANELS:
    tables[rows_of.__name__] = [
        (of if rows_of is panels.curves else {'run': of['run']}) | row for of, run in named for row in rows_of(run)]
  groups, tables['hardest'] = {}, []
  for of, run in named:
    groups.setdefault(of['group'], []).append(run)
    problems = list(run.missing)
    tables['hardest'] += [{'run': of['run']} | row for row in panels.hardest(run, problems)]
    of_run = f'{of["run"]}: ' if len(runs) > 1 else ''
    missing += [of_run + text.replace(f'{run.workdir}/', '') for text in problems]
  baseline = next((group for group, of in groups.items() if of[0].rule == _BASELINE), None)
  comparison = compare.costs(tables['curves'], {of['run']: run.seed for of, run in named}, target,
                             baseline if len(groups) > 1 else None)
  of_runs = [{**of, 'seed': run.seed, 'workdir': run.workdir, 'header': header(run)} for of, run in named]
  return {
      'title': f'{next(iter(groups))}: what it learnt and what it cost' if len(groups) == 1 else
               f'{", ".join(groups)}: what they learnt and what they cost',
      'generated': _date(time.time()), 'missing': missing,
      'runs': of_runs, 'verdicts': verdicts.of_groups(groups),
      'scorecard': scorecard([(of['run'], run) for of, run in named], target), **tables,
      'bands': compare.bands(tables['curves']), 'pareto': pareto(tables['curves']), 'comparison': comparison,
      'reproduce': [line for run in runs for line in reproduce(run)],
      # Of several runs their own are compared.
      'beside': (paired.of(runs[0]) if len(runs) == 1 else paired.NOTHING)._asdict()}


def label(runs: Sequence[run_lib.Run]) -> tuple[list[dict[str, str]], list[str]]:
  """{'run', 'group'} of each run, and sentences about configs that should not be compared.

  A group is called by its rule, and by the knobs that other groups have otherwise. A run is called by its group and its
  seed, and by its workdir where that is not enough or where the config is unknown.
  """
  flat = [dict(_flat(run.config)) for run in runs]
  flat = [{name: x for name, x in of.items() if not any(
      name == aside or name.startswith(f'{aside}.') for aside in _ASIDE)} for of in flat]
  # A knob that a run does not know is newer than it, and was its default.
  defaults = dict(_flat(json.loads(json.dumps(knobs.as_dict(knobs.Config())))))
  newer = {name: defaults[name] for of in flat for name in of if name in defaults}
  flat = [of and {**newer, **of} for of in flat]
  known = [of for of in flat if of]
  differ = [name for name in dict.fromkeys(name for of in known for name in of)
            if len({repr(of.get(name)) for of in known}) > 1]
  shown = [name for name in differ if name not in ('alloc.rule', 'train_ids')]
  found, configs = [], {}
  for run, of in zip(runs, flat):
    group = run.name
    if of:
      group = ', '.join([str(run.rule or run.name), *(
          f'{name.rpartition(".")[2]}={_short(of.get(name))}' for name in shown[:_IN_A_LABEL])])
      if 'train_ids' in differ:
        group += f', tasks {str(of.get("train_ids"))[:6]}'
    config = of or {'workdir': run.workdir}
    same = configs.setdefault(group, [])  # that are called alike: they differ by knobs that are not named
    same += [config] * (config not in same)
    group += f' ({same.index(config) + 1})' * (same.index(config) > 0)
    found.append({'run': group if not of or run.seed is None else f'{group}, seed {run.seed}', 'group': group})
  names = [of['run'] for of in found]
  for i, run in enumerate(runs):
    if names.count(names[i]) > 1:
      found[i]['run'] = f'{names[i]}, {run.name}'
  names = [of['run'] for of in found]
  for i in range(len(runs)):
    if names.count(names[i]) > 1:
      found[i]['run'] = f'{names[i]} ({names[:i + 1].count(names[i])})'
  missing = []
  if shown:
    values_of = lambda name: ' or '.join(dict.fromkeys(_short(of.get(name)) for of in known))
    values = '; '.join(f'{name} is {values_of(name)}' for name in shown[:_MOST_KNOBS])
    more = f', and {len(shown) - _MOST_KNOBS} knobs more' if len(shown) > _MOST_KNOBS else ''
    missing.append('the runs differ by more than rule and seed, so that differences are not of the rule alone: '
                   f'{values}{more}')
  if 'train_ids' in differ:
    missing.append('the runs have other training tasks')
  if len({run.score for run in runs if run.evaluations}) > 1:
    missing.append('the runs are evaluated with different numbers of rollouts a task')
  return found, missing


def _flat(tree: dict[str, Any], prefix: str = '') -> Iterable[tuple[str, Any]]:
  for name, x in tree.items():
    if isinstance(x, dict):
      yield from _flat(x, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', x


def _short(x: Any) -> str:
  text = 'unset' if x is None else str(x)
  return text if len(text) <= 40 else f'{text[:39]}…'


def _change(x: dict[str, Any]) -> str:
  """A knob that a run went on with changed (record/claim.py)."""
  return f'{x.get("knob")} was {_short(x.get("was"))}, and is {_short(x.get("is"))} from step {x.get("step")} on'


def header(run: run_lib.Run) -> list[list[str]]:
  """What a run was: [name, text] of what is known."""
  attempts, knob = run.ledger.attempts, run.knob
  last = attempts[-1] if attempts else {}
  each = lambda name: ', '.join(dict.fromkeys(str(x) for a in attempts if (x := a.get(name)) is not None))
  parameters = number(last, 'parameters')
  sizes = f'{knob("policy.num_layers")} layers of width {knob("policy.width")}, from random parameters'
  model = knob('policy.checkpoint') or (sizes if run.config else '')
  data = knob('tasks.dataset') or ''
  if isinstance(mixture := knob('tasks.mixture'), list) and mixture:
    data = ', '.join(map(str, mixture))
  profile = run.profile
  prices = ''
  if profile is not None and profile.dollars_per_hour is not None:
    prices = f'{profile.name}: ${profile.dollars_per_hour:g} a chip-hour, {profile.price_source}, {profile.price_date}'
  ends = {end.get('attempt'): end.get('reason') for end in run.ledger.ends}
  # The page that a run writes last is made before its ledger ends.
  is_evaluated = bool(run.evaluations) and run.evaluations[-1]['step'] == knob('num_steps')
  end = ends.get(last.get('attempt')) or ('done but for its last page' if is_evaluated else 'runs, or was killed')
  until = [began + entry['wall_s'] for entry in run.ledger.entries if (began := number(entry, 'began')) is not None]
  rows = [
      ('commit', each('commit')),
      ('model', f'{model}; {parameters:,} parameters' if parameters is not None else model),
      ('data', f'{data}, verified by {knob("rewards.verifier")}' if data else ''),
      ('rule', f'{run.rule}, {knob("alloc.rollouts_per_step")} rollouts of {knob("tasks.per_step")} tasks a step'
       if run.config else ''),
      ('steps', f'{run.steps[-1]["step"] + 1} of {knob("num_steps") or "?"}' if run.steps else ''),
      ('changed', '; '.join(_change(x) for x in knob('changed') or () if isinstance(x, dict))),
      ('hardware', f'{each("devices")} × {each("device_kind")}' if attempts else ''),
      ('prices', prices),
      ('when', f'{_date(attempts[0]["started"])}' + (f' to {_date(max(until))}' if until else '') if attempts else ''),
      ('attempts', f'{len(attempts)}; the last one {end}' if attempts else ''),
      ('versions', ', '.join(f'{name} {x}' for name, x in last.get('versions', {}).items())),
      ('workdir', run.workdir)]
  return [[name, text] for name, text in rows if text]


def _date(seconds: float) -> str:
  try:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime('%Y-%m-%d %H:%M UTC')
  except (ValueError, OverflowError, OSError):
    return 'an unknown time'


def pareto(curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """The view's `pareto`: every evaluation of every run on each axis, and whether it is on the axis's front."""
  found = []
  for axis in compare.AXES:
    points = [p for p in curves if None not in (p[axis], p['success'])]
    front = compare.pareto([p[axis] for p in points], [p['success'] for p in points])
    found += [{'run': p['run'], 'step': p['step'], 'axis': axis, 'cost': p[axis], 'success': p['success'],
               'on_front': is_on} for p, is_on in zip(points, front)]
  return found


def reproduce(run: run_lib.Run) -> list[str]:
  """The commands of a run and of its page."""
  commands = next((a['command'] for a in run.ledger.attempts if isinstance(a.get('command'), str)), None)
  lines = [commands or 'python -m kr_jax.main --config=CONFIG.py --workdir=DIR, with the knobs of config.json']
  return [*lines, f'python -m kr_jax.main --mode=report --workdir={run.workdir}']


def scorecard(runs: Sequence[tuple[str, run_lib.Run]], target: float | None) -> list[dict[str, Any]]:
  """The figures of runs, by resource. Rows of which nothing is known of any run are left in: the note says why."""
  of_runs, rows = [(name, figures.of_run(run, target)) for name, run in runs], []
  for key in dict.fromkeys(key for _, found in of_runs for key in found):
    resource, metric, unit = key
    values = []
    for name, of_run in of_runs:
      found = of_run.get(key, Figure())
      if found.value is not None and figure(found.value) is None:
        found = Figure(note='the records give no number that can be')
      values.append({'run': name, 'value': found.value, 'provenance': found.provenance, 'note': found.note})
    rows.append({'resource': resource, 'metric': metric, 'unit': unit, 'values': values})
  return rows
