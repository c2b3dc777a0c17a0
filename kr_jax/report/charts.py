"""The charts of a report: Vega-Lite specifications as dicts, from a view (scorecard.py).

A function draws one chart, and returns None where the view has nothing to draw. Field names are this module's own and
no text of a run stands in an expression: what a run wrote is data alone.
"""

from __future__ import annotations

from collections.abc import Iterable
import math
from typing import Any

from kr_jax.report.drawing import amount
from kr_jax.report.drawing import by
from kr_jax.report.drawing import chart
from kr_jax.report.drawing import colored
from kr_jax.report.drawing import COLORS
from kr_jax.report.drawing import known
from kr_jax.report.drawing import layer
from kr_jax.report.drawing import quantity
from kr_jax.report.drawing import rounded
from kr_jax.report.drawing import shapes
from kr_jax.report.drawing import share
from kr_jax.report.drawing import Spec
from kr_jax.report.drawing import tip
from kr_jax.report.run import AXES

View = dict[str, Any]
_FORMATS = {'dollars': '$,~g', 'kwh': '~g'}  # of ticks on AXES; '~s' of the others
_SUCCESS = 'held-out success'
_BESIDE_UNIFORM = {'observed': 'observed', 'expected': 'expected of these budgets',
                   'uniform': 'expected of uniform budgets'}
_BESIDE_CONSTANT = {'forecast': 'forecasts of each task', 'constant': 'one rate for all tasks'}
_LINES = {'observed': ('c0', [1, 0]), 'forecast': ('c0', [1, 0]), 'expected': ('c1', [6, 3]),
          'uniform': ('muted', [2, 3]), 'constant': ('muted', [2, 3])}  # colour and dashes
_NAMED = 5  # categories of badput that have a colour
_VERDICTS = {'right': 'c0', 'wrong': 'c1', 'no_answer': 'c4'}
_OTHER_VERDICTS = ('c5', 'c3', 'c2', 'muted')
_WITHIN = ('truncated_without_answer',)  # these are among those without an answer
_ROW, _BAR = 24, 34  # pixels of a row of points, and of a bar


def groups(view: View) -> list[str]:
  return list(dict.fromkeys(run['group'] for run in view['runs']))


def _recorded(view: View) -> str:
  """What the run that was recorded is called, beside which the only run of a view is shown."""
  return f'{view["beside"]["name"].removesuffix(" budgets")} (recorded)'


def words(name: str) -> str:
  return name.replace('_', ' ')


def _of_run(rows: Iterable[dict[str, Any]], run: str) -> list[dict[str, Any]]:
  return [row for row in rows if row['run'] == run]


def _with_group(view: View, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  group_of = {run['run']: run['group'] for run in view['runs']}
  return [row | {'group': group_of.get(row['run'], row['run'])} for row in rows]


def _with_interval(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  return [row for row in rows if None not in (row['low'], row['high'])]


# ---- learning ----


def success(view: View, axis: str) -> Spec | None:
  """Held-out success against a cost: a line a group; of one run with its interval, of several with the seeds' band.

  A recorded run that stands beside the only run is a dashed line, where it knows that cost.
  """
  title, form, names = AXES[axis], _FORMATS.get(axis, '~s'), groups(view)
  several = {g for g in names if sum(run['group'] == g for run in view['runs']) > 1}
  runs = known(view['curves'], axis, 'success', 'run', 'group', 'step', keep=('low', 'high'))
  bands = known((b for b in view['bands'] if b['axis'] == axis and b['group'] in several), 'x', 'mean', 'group',
                keep=('low', 'high'))
  banded = {row['group'] for row in bands}
  alone = [row for row in runs if row['group'] not in banded]
  if not runs:
    return None
  beside, said = known(view['beside']['rows'], axis, 'success', 'step', keep=('low', 'high')), _recorded(view)
  names = [*names, said] if beside else names
  beside = [row | {'run': said, 'group': said} for row in beside]
  colors = [f'c{i % COLORS}' for i in range(len(names) - 1)] + ['muted'] if beside else ()
  color, each = by('group', names, colors), {'field': 'run'}
  x, x_band, y, y_band = amount(axis, title, form), amount('x', title, form), share('success', _SUCCESS), share(
      'mean', _SUCCESS)
  area, thick = {'type': 'area', 'opacity': 0.15}, {'type': 'line', 'strokeWidth': 2.5}
  span = {'y': share('low', _SUCCESS), 'y2': {'field': 'high'}}
  layers = [
      layer(_with_interval(alone), area, x=x, **span, color=color, detail=each),
      layer(_with_interval(bands), area, x=x_band, **span, color=color),
      layer([row for row in runs if row['group'] in banded], {'type': 'line', 'opacity': 0.4, 'strokeWidth': 1},
            x=x, y=y, color=color, detail=each),
      layer(bands, thick, x=x_band, y=y_band, color=color),
      layer(alone, thick, x=x, y=y, color=color, detail=each),
      layer(beside, {'type': 'line', 'strokeDash': [6, 3]}, x=x, y=y, color=color),
      layer(runs + beside, {'type': 'point', 'filled': True, 'size': 36, 'opacity': 0.9}, x=x, y=y, color=color,
            shape=shapes('group', names),
            tooltip=tip('run', step=',', success='.3f', low='.3f', high='.3f', **{axis: ',.5~r'}))]
  return chart(f'Held-out success against {title}', *(x for x in layers if x['data']['values']), height=320)


def difficulty(view: View, run: str) -> Spec | None:
  """Success over steps, a line a difficulty."""
  rows = known(_of_run(view['difficulty'], run), 'step', 'difficulty', 'success')
  if not rows:
    return None
  rows = [row | {'name': str(row['difficulty'])} for row in rows]
  names = sorted({row['name'] for row in rows}, key=lambda name: (_as_number(name), name))
  legend = {'title': 'difficulty', 'columns': COLORS}
  dashes = [[1, 0] if i < COLORS else [4, 3] for i in range(len(names))]
  return chart(f'Held-out success by difficulty, {run}', layer(
      rows, {'type': 'line', 'point': {'size': 24}}, x=quantity('step', 'step'), y=share('success', _SUCCESS),
      color={**by('name', names), 'legend': legend},
      strokeDash={'field': 'name', 'type': 'nominal', 'scale': {'domain': names, 'range': dashes}, 'legend': legend},
      tooltip=tip('name', step=',', success='.3f')))


def _as_number(text: str) -> float:
  """Names that are no number come last."""
  try:
    x = float(text)
  except ValueError:
    return math.inf
  return x if math.isfinite(x) else math.inf


def reliability(view: View, run: str) -> Spec | None:
  """Observed against forecast success, of each half of the run."""
  rows = known(_of_run(view['reliability'], run), 'half', 'forecast', 'observed', keep=('low', 'high', 'rollouts'))
  if not rows:
    return None
  rows = [row | {'half': f'{row["half"]} half'} for row in rows]
  names = [n for n in ('first half', 'second half') if any(row['half'] == n for row in rows)]
  color = by('half', names, ('c1', 'c0'), columns=2)
  x, y = share('forecast', 'forecast before the step'), share('observed', 'observed success')
  size = {'field': 'rollouts', 'type': 'quantitative', 'scale': {'range': [20, 160]}, 'legend': None}
  return chart(
      f'Success rates, forecast and observed, {run}',
      layer([{'forecast': 0, 'observed': 0}, {'forecast': 1, 'observed': 1}], {'type': 'line', 'style': 'reference'},
            x=x, y=y),
      layer(_with_interval(rows), {'type': 'rule', 'strokeWidth': 1.5, 'opacity': 0.7}, x=x,
            y=share('low', 'observed success'), y2={'field': 'high'}, color=color),
      layer(rows, {'type': 'line', 'strokeWidth': 1.5}, x=x, y=y, color=color),
      layer(rows, {'type': 'point', 'filled': True, 'opacity': 1}, x=x, y=y, color=color, size=size,
            tooltip=tip('half', forecast='.3f', observed='.3f', low='.3f', high='.3f', rollouts=',')))


def log_loss(view: View, run: str) -> Spec | None:
  """Log loss of the forecasts beside a constant's, trailing means."""
  return _lines(view['log_loss'], run, 'nats', _BESIDE_CONSTANT, quantity(
      'nats', 'nats a rollout (lower is better)', scale={'zero': True}), f'Log loss of the forecasts, {run}')


def gradient(view: View, run: str) -> Spec | None:
  """Share of rollouts in mixed groups: observed, expected, and expected of uniform budgets."""
  return _lines(view['gradient'], run, 'ratio', _BESIDE_UNIFORM, share('ratio', 'rollouts in mixed groups / all'),
                f'Effective gradient ratio, {run}')


def mixed(view: View, run: str) -> Spec | None:
  """Mixed tasks a step: observed, expected, and expected of uniform budgets."""
  return _lines(view['mixed'], run, 'tasks', _BESIDE_UNIFORM, quantity(
      'tasks', 'mixed tasks a step', scale={'zero': True}), f'Mixed tasks, {run}')


def _lines(rows, run: str, field: str, said: dict[str, str], y: Spec, name: str) -> Spec | None:
  """A line over steps for each name. said: what each is called."""
  rows = [row for row in known(_of_run(rows, run), 'step', field, 'name') if row['name'] in said]
  if not rows:
    return None
  there = [name for name in said if any(row['name'] == name for row in rows)]
  names = [said[name] for name in there]
  rows = [row | {'name': said[row['name']]} for row in rows]
  legend = {'title': None, 'symbolType': 'stroke', 'symbolSize': 400}
  dashes = {'domain': names, 'range': [_LINES[name][1] for name in there]}
  return chart(name, layer(
      rows, {'type': 'line', 'clip': True}, x=quantity('step', 'step'), y=y,
      color={**by('name', names, [_LINES[name][0] for name in there]), 'legend': legend},
      strokeDash={'field': 'name', 'type': 'nominal', 'scale': dashes, 'legend': legend},
      tooltip=tip('name', step=',', **{field: '.3f'})))


def budgets(view: View, run: str) -> Spec | None:
  """Mean budget of a task by its estimated success rate, over steps; blank where no task was. Runs share the scale."""
  rows = known(_of_run(view['budgets'], run), 'step', 'bin_low', 'bin_high', 'budget')
  if not rows:
    return None
  steps, of_all = sorted({row['step'] for row in rows}), [row['budget'] for row in known(view['budgets'], 'budget')]
  width = steps[-1] - steps[-2] if len(steps) > 1 else 1
  end = dict(zip(steps, [*steps[1:], steps[-1] + width]))
  rows = [row | {'end': end[row['step']]} for row in rows]
  legend = {'title': 'mean rollouts of a task', 'direction': 'horizontal', 'gradientLength': 180, 'tickCount': 4}
  return chart(f'Budgets by estimated success rate, {run}', layer(
      rows, {'type': 'rect', 'style': 'cell'},
      x=quantity('step', 'step', scale={'domain': [steps[0], end[steps[-1]]], 'nice': False}), x2={'field': 'end'},
      y=share('bin_low', 'estimated success rate'), y2={'field': 'bin_high'},
      color=quantity('budget', None, scale={'domain': [min(of_all), max(of_all)]}, legend=legend),
      tooltip=tip(step=',', bin_low='.1f', bin_high='.1f', budget='.2f')))


def status(view: View, run: str, of: str) -> Spec | None:
  """How many tasks went from which class at the start to which at the end. of: 'held-out' or 'training'."""
  found = next((row for row in view['status'] if row['run'] == run and row['of'] == of), None)
  if found is None or not any(map(any, found['matrix'])):
    return None
  classes, most = found['classes'], max(max(row) for row in found['matrix'])
  rows = [{'start': classes[i], 'end': classes[j], 'tasks': n, 'ink': 'on' if n > 0.55 * most else 'off'}
          for i, row in enumerate(found['matrix']) for j, n in enumerate(row)]
  x = {'field': 'end', 'type': 'nominal', 'sort': classes, 'title': 'at the end',
       'axis': {'labelAngle': -30, 'orient': 'bottom', 'labelOverlap': False}}
  y = {'field': 'start', 'type': 'nominal', 'sort': classes, 'title': 'at the start'}
  return chart(
      f'Status of {of} tasks from start to end, {run}',
      layer(rows, {'type': 'rect', 'style': 'outline', 'strokeWidth': 2}, x=x, y=y,
            color={'field': 'tasks', 'type': 'quantitative', 'legend': None, 'scale': {'domainMin': 0}},
            tooltip=tip('start', 'end', tasks=',')),
      layer([row for row in rows if row['tasks']], {'type': 'text', 'fontSize': 13}, x=x, y=y,
            text={'field': 'tasks', 'type': 'quantitative', 'format': ','},
            fill={'field': 'ink', 'type': 'nominal', 'legend': None,
                  'scale': colored(('on', 'off'), ('on_heat', 'text'))}),
      resolve={'scale': {'color': 'independent', 'fill': 'independent'}})


# ---- costs ----


def goodput(view: View) -> Spec | None:
  """Wall time of each run: productive, and what else it went to; the smallest categories are one."""
  rows = [row for row in known(view['goodput'], 'run', 'category', 'kind', 'seconds') if row['seconds'] > 0]
  if not rows:
    return None
  lost: dict[str, float] = {}
  for row in rows:
    if row['kind'] != 'productive':
      lost[row['category']] = lost.get(row['category'], 0) + row['seconds']
  named = [c for c in sorted(lost, key=lost.get, reverse=True) if c != 'other'][:_NAMED]
  names, sums = ['productive', *map(words, named), 'all else'], {}
  for row in rows:
    name = words(row['category']) if row['category'] in named else 'all else'
    key = row['run'], 'productive' if row['kind'] == 'productive' else name
    sums[key] = sums.get(key, 0) + row['seconds']
  names = [name for name in names if any(name == of for _, of in sums)]
  total = {run: sum(s for (of, _), s in sums.items() if of == run) for run, _ in sums}
  rows = [{'run': run, 'category': name, 'seconds': rounded(s), 'share': rounded(s / total[run]),
           'order': names.index(name)} for (run, name), s in sums.items()]
  colors = [{'productive': 'c0', 'all else': 'muted'}.get(name, f'c{i}') for i, name in enumerate(names)]
  y = {'field': 'run', 'type': 'nominal', 'sort': [run['run'] for run in view['runs']], 'title': None,
       'axis': {'labelLimit': 110} if len(view['runs']) > 1 else None}
  return chart('Where the wall time of each run went', layer(
      rows, {'type': 'bar', 'style': 'outline'}, x=_stacked('share of the wall time'), y=y,
      color=by('category', names, colors, columns=2), order={'field': 'order', 'type': 'quantitative'},
      tooltip=tip('run', 'category', share='.1%', seconds=',.1f')), height=_BAR * len(total))


def _stacked(title: str) -> Spec:
  return quantity('share', title, stack='zero', scale={'domain': [0, 1]}, axis={'format': '.0%'})


def phases(view: View) -> Spec | None:
  return _amounts(view, view['phases'], 'phase', amount('seconds', 'wall seconds', '~s'), 'Wall time by phase')


def memory(view: View) -> Spec | None:
  return _amounts(view, view['memory'], 'phase', amount('gb', 'peak memory, GB', '~g'), 'Peak memory by phase')


def network(view: View) -> Spec | None:
  """Bytes on a logarithmic axis, as collectives and host copies differ by orders of magnitude."""
  said = lambda row: row['phase'] if row['what'] == row['phase'] else f'{row["phase"]}: {row["what"]}'
  rows = [row | {'what': said(row)} for row in view['network'] if row['bytes']]
  if not rows:
    return None
  x = amount('bytes', 'bytes', '~s', [row['bytes'] for row in rows])
  return _amounts(view, rows, 'what', x, 'Bytes by phase', bars=False, form='.3~s')


def _amounts(view: View, rows, name: str, x: Spec, said: str, *, bars: bool = True, form: str = ',.4~r') -> Spec | None:
  """Amounts by name: bars of one run; points of several, whose bars would hide each other, and of a logarithm."""
  field = x['field']
  rows = [row | {name: words(row[name])} for row in _with_group(view, known(rows, 'run', name, field))]
  if not any(row[field] for row in rows):
    return None
  most = {row[name]: max(r[field] for r in rows if r[name] == row[name]) for row in rows}
  y = {'field': name, 'type': 'nominal', 'title': None, 'sort': sorted(most, key=most.get, reverse=True)}
  axis = {'labelLimit': 140, 'labelOverlap': False}
  shown, names = tip('run', name, **{field: form}), groups(view)
  if bars and len(view['runs']) == 1:
    return chart(said, layer(rows, 'bar', x=x, y={**y, 'axis': axis}, tooltip=shown), height=_ROW * len(most))
  return chart(said, layer(
      rows, {'type': 'point', 'filled': True, 'size': 70, 'opacity': 0.85}, x=x,
      y={**y, 'axis': {**axis, 'grid': True}},
      yOffset={'field': 'group', 'type': 'nominal', 'sort': names}, color=by('group', names),
      shape=shapes('group', names), tooltip=shown), height=_ROW * len(most))


def verification(view: View, name: str | None = None) -> Spec | None:
  """Shares of verdicts: of the run's datasets and verifiers, or of one of them in all runs."""
  rows = [row for row in known(view['verification'], 'run', 'name', 'kind', 'share', keep=('rollouts',))
          if row['share'] > 0 and row['kind'] not in _WITHIN and name in (None, row['name'])]
  if not rows:
    return None
  usual = [kind for kind in _VERDICTS if any(row['kind'] == kind for row in rows)]
  unusual = sorted({row['kind'] for row in rows} - set(usual))
  kinds = usual + unusual
  colors = [*map(_VERDICTS.get, usual), *(_OTHER_VERDICTS[i % len(_OTHER_VERDICTS)] for i in range(len(unusual)))]
  rows = [row | {'kind': words(row['kind']), 'order': kinds.index(row['kind'])} for row in rows]
  of = 'name' if name is None else 'run'
  return chart('Verdicts by dataset and verifier' if name is None else f'Verdicts of {name}', layer(
      rows, {'type': 'bar', 'style': 'outline'}, x=_stacked('share of rollouts'),
      y={'field': of, 'type': 'nominal', 'title': None, 'sort': None, 'axis': {'labelLimit': 140}},
      color=by('kind', list(map(words, kinds)), colors, columns=2), order={'field': 'order', 'type': 'quantitative'},
      tooltip=tip('run', 'name', 'kind', share='.1%', rollouts=',')), height=_BAR * len({row[of] for row in rows}))


def pareto(view: View, axis: str) -> Spec | None:
  """Success against cost of every evaluation; a line joins those that none beats in both."""
  title, form = AXES[axis], _FORMATS.get(axis, '~s')
  rows = _with_group(view, known((p for p in view['pareto'] if p['axis'] == axis), 'cost', 'success', 'run', 'step',
                                 'on_front'))
  if not rows:
    return None
  front = sorted((row for row in rows if row['on_front']), key=lambda row: row['cost'])
  costs, names = [row['cost'] for row in rows], groups(view)
  is_wide = min(costs) > 0 and max(costs) > 30 * min(costs)
  x, y = amount('cost', title, form, costs if is_wide else ()), share('success', _SUCCESS)
  faint = {'condition': {'test': 'datum.on_front', 'value': 1}, 'value': 0.35}
  return chart(
      f'Success against {title} of every evaluation',
      layer(front, {'type': 'line', 'interpolate': 'step-after', 'style': 'reference'}, x=x, y=y,
            order={'field': 'cost', 'type': 'quantitative'}),
      layer(rows, {'type': 'point', 'filled': True, 'size': 60}, x=x, y=y, color=by('group', names),
            shape=shapes('group', names), opacity=faint, tooltip=tip('run', step=',', success='.3f', cost=',.5~r')))


def comparison(view: View) -> Spec | None:
  """The baseline's cost to the target in multiples of each group's, with intervals; the line is 1."""
  rows = [row | {'what': AXES[row['axis']]} for row in known(
      view['comparison']['rows'], 'group', 'axis', 'ratio', 'low', 'high') if row['low'] > 0]
  if not rows:
    return None
  names, whole = list(dict.fromkeys(row['group'] for row in rows)), groups(view)
  color = by('group', names, [f'c{whole.index(g) % COLORS}' if g in whole else 'muted' for g in names])
  y = {'field': 'what', 'type': 'nominal', 'title': None, 'sort': None}
  ends = [1, *(row[end] for row in rows for end in ('low', 'high'))]
  x = lambda field: amount(field, 'cost of the baseline / of the group (above 1: cheaper)', '~g', ends)
  offset = {'field': 'group', 'type': 'nominal', 'sort': names}
  return chart(
      'Cost to the target beside the baseline',
      layer([{'at': 1}], {'type': 'rule', 'style': 'reference'}, x=x('at')),
      layer(rows, {'type': 'rule', 'strokeWidth': 2}, x=x('low'), x2={'field': 'high'}, y=y, yOffset=offset,
            color=color),
      layer(rows, {'type': 'point', 'filled': True, 'size': 70, 'opacity': 1}, x=x('ratio'), y=y, yOffset=offset,
            color=color, tooltip=tip('group', 'what', ratio='.3f', low='.3f', high='.3f')),
      height=(20 + 14 * len(names)) * len({row['what'] for row in rows}))
