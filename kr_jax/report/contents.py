"""What stands in a report, and in which order: charts and tables of a view (scorecard.py), as the templates print them.

A section's text is plain; whoever prints it escapes it. Of groups of several runs the charts of one run are shown, that
of the group's first one, and those of the others can be opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import math
from typing import Any

from kr_jax.report import charts
from kr_jax.report import drawing
from kr_jax.report.charts import View
from kr_jax.report.charts import words

UNKNOWN = '–'
_PREFIXES = ((1e18, 'E'), (1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'))
_ALWAYS = ('B', 'FLOP', 'FLOPs', 'FLOP/s', 'B/s')  # these have a prefix from 1000 on, other units from 100,000 on


@dataclasses.dataclass(frozen=True)
class Chart:
  """A chart: one specification, or one an axis."""

  key: str
  title: str
  specs: dict[str, drawing.Spec]
  of: str = ''  # the run, where there are several


@dataclasses.dataclass(frozen=True)
class Charts:
  """Charts that stand together: those that are shown, and those that a reader can open."""

  shown: list[Chart]
  more: list[Chart] = dataclasses.field(default_factory=list)
  two: bool = True  # beside each other, where there is room


@dataclasses.dataclass(frozen=True)
class Row:
  cells: list[str]
  first: bool = False  # of its kind: a line is drawn above
  is_heading: bool = False  # of the rows below; it has one cell
  notes: dict[int, list[int]] = dataclasses.field(default_factory=dict)  # their numbers, by column


@dataclasses.dataclass(frozen=True)
class Table:
  """numbers, wide: which columns are such."""

  key: str
  title: str
  columns: list[str]
  rows: list[Row]
  numbers: tuple[int, ...] = ()
  wide: tuple[int, ...] = ()
  notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Section:
  """folded: tables that a reader can open. empty: what is said where there is nothing."""

  key: str
  title: str
  lead: str = ''
  charts: list[Charts] = dataclasses.field(default_factory=list)
  tables: list[Table] = dataclasses.field(default_factory=list)
  folded: list[Table] = dataclasses.field(default_factory=list)
  empty: str = ''
  pictures: tuple[str, ...] = ()  # of plots/, in Markdown

  def without_charts(self) -> Section:
    """Where nothing can draw them: tables that could be opened are shown."""
    return dataclasses.replace(self, charts=[], tables=self.tables + self.folded, folded=[])


# ---- numbers ----


def number(x: float | None, unit: str = '') -> str:
  """Three digits or a whole number, and a unit, with a prefix where the number is large; a dash where it is unknown."""
  if x is None:
    return UNKNOWN
  if unit == '$':
    return f'${x:,.2f}' if abs(x) >= 1 else f'${_digits(x)}'
  if unit in ('share', '%'):
    percent = 100 * x if unit == 'share' else x
    return f'{percent:.1f} %' if abs(percent) >= 1 or percent == 0 else f'{percent:.2g} %'
  if unit == 'GB':  # of a small model that would be 0.003
    x, unit = 1e9 * x, 'bytes'
  unit = {'bytes': 'B', 'ratio': ''}.get(unit, unit)
  for size, prefix in _PREFIXES:
    if abs(x) >= max(size, 1e3 if unit in _ALWAYS else 1e5):
      return f'{_digits(x / size)} {prefix}{"" if unit in _ALWAYS else " "}{unit}'.strip()
  return f'{_digits(x)} {unit}'.strip()


def _digits(x: float) -> str:
  if isinstance(x, int) or (x == round(x) and abs(x) < 1e5):
    return f'{round(x):,}'
  if abs(x) < 1e-3:
    return f'{x:.2e}'
  text = f'{x:,.{max(0, 2 - math.floor(math.log10(abs(x))))}f}'
  return text.rstrip('0').rstrip('.') if '.' in text else text


def rate(x: float | None) -> str:
  """A success rate."""
  return UNKNOWN if x is None else f'{x:.3f}'


def span(low: float | None, high: float | None, form: Callable[[float | None], str] = rate) -> str:
  return UNKNOWN if low is None and high is None else f'{form(low)} to {form(high)}'


def estimate(x: Any) -> str:
  """An estimate of a success rate, with its interval where it has one."""
  return f'{rate(x.get("mean"))} ({span(x.get("low"), x.get("high"))})' if isinstance(x, dict) else rate(x)


# ---- sections ----


def sections(view: View) -> list[Section]:
  """All of a report, in order; those of what a single run has no use for are left out."""
  found = [
      Section('verdicts', 'Verdicts', 'One line an area; the sections below show where each comes from.',
              empty='' if view['verdicts'] else 'Nothing can be judged.'),
      Section('scorecard', 'Scorecard', 'Five resources and what a run makes of them. Measured: read from a clock, a '
              'counter of the device or a meter. Counted: an exact sum of what the run did. Modelled: computed from '
              'these and the hardware profile. A dash is unknown.', tables=[_scorecard(view)]),
      _success(view), _calibration(view), _budgets(view), _gradient(view), _status(view), _goodput(view),
      _phases(view), _memory(view), _network(view), _verification(view),
      Section('hardest', 'Hardest tasks solved', 'Tasks that were thought hardest when a rollout solved them for the '
              'first time, and that rollout.', empty='' if view['hardest'] else 'No such rollout was kept.'),
      _pareto(view), _comparison(view),
      Section('reproduce', 'Reproduce it', empty='' if view['reproduce'] else 'The command is not known.'),
      Section('missing', 'What is missing', empty='' if view['missing'] else 'Nothing: all records are there.')]
  return [section for section in found if section is not None]


def facts(view: View) -> list[tuple[str, str]]:
  """(name, text) of what all runs share."""
  return [(name, texts[0]) for name, texts in _header(view) if len(set(texts)) == 1]


def differences(view: View) -> Table:
  """What each run is, a row a run, by what not all of them share."""
  columns = [(name, texts) for name, texts in _header(view) if len(set(texts)) > 1]
  rows = [Row([run['run'], *(texts[i] for _, texts in columns)]) for i, run in enumerate(view['runs']) if columns]
  return Table('runs', 'The runs', ['run', *(name for name, _ in columns)], rows)


def _header(view: View) -> list[tuple[str, list[str]]]:
  """(name, the text of each run)."""
  of_runs = [dict(map(tuple, run['header'])) for run in view['runs']]
  return [(name, [of.get(name, UNKNOWN) for of in of_runs])
          for name in dict.fromkeys(name for of in of_runs for name in of)]


def _scorecard(view: View) -> Table:
  """A row a metric, a column a run; notes are numbered, and each is said once."""
  runs, notes, rows, before = [run['run'] for run in view['runs']], [], [], None
  for row in view['scorecard']:
    of = {value['run']: value for value in row['values']}
    kinds = sorted({v['provenance'] for v in row['values'] if v['provenance']})
    marks = {}
    for i, run in enumerate(runs):
      if note := of.get(run, {}).get('note'):
        notes += [note] * (note not in notes)
        marks[i + 2] = [notes.index(note) + 1]
    if len({tuple(x) for x in marks.values()}) == 1 and len(marks) == len(runs):
      marks = {0: marks[2]}  # of the metric, then
    if row['resource'] != before:
      before = row['resource']
      rows.append(Row([before], is_heading=True))
    rows.append(Row([row['metric'], ', '.join(kinds) or UNKNOWN,
                     *(number(of.get(run, {}).get('value'), row['unit']) for run in runs)], notes=marks))
  return Table('scorecard', 'Five resources', ['metric', 'source', *runs], rows,
               numbers=tuple(range(2, len(runs) + 2)), notes=notes)


def _table(view: View, key: str, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]],
           numbers: Sequence[int]) -> Table:
  """A table whose first column is the run; the column is left out where there is one run."""
  rows = [list(row) for row in rows]
  if len(view['runs']) > 1:
    rows = [Row(row, first=i > 0 and row[0] != rows[i - 1][0]) for i, row in enumerate(rows)]
    return Table(key, title, ['run', *columns], rows, tuple(n + 1 for n in numbers))
  return Table(key, title, list(columns), [Row(row[1:]) for row in rows], tuple(numbers))


def _switched(key: str, title: str, draw: Callable[[str], drawing.Spec | None]) -> Charts:
  """One chart with an axis to choose, of those that are known."""
  specs = {axis: spec for axis in charts.AXES if (spec := draw(axis)) is not None}
  return Charts([Chart(key, title, specs)] if specs else [], two=False)


def _one(key: str, title: str, spec: drawing.Spec | None, of: str = '') -> Charts:
  return Charts([] if spec is None else [Chart(key, title, {'': spec}, of)], two=False)


def shown_runs(view: View) -> list[str]:
  """The first run of each group."""
  return list({run['group']: run['run'] for run in reversed(view['runs'])}.values())[::-1]


def _each(view: View, *drawn: tuple[str, str, Callable[[View, str], drawing.Spec | None]]) -> Charts:
  """Charts (key, title, how) of each run."""
  shown, more, first, several = [], [], shown_runs(view), len(view['runs']) > 1
  for i, run in enumerate(run['run'] for run in view['runs']):
    for key, title, draw in drawn:
      if (spec := draw(view, run)) is not None:
        chart = Chart(f'{key}-{i}', title, {'': spec}, run if several else '')
        (shown if run in first else more).append(chart)
  return Charts(shown, more)


def _has(*drawn: Charts) -> bool:
  return any(x.shown or x.more for x in drawn)


def _section(key, title, lead, drawn, empty, *, tables=(), folded=(), pictures=()) -> Section:
  """Its lead is of what it shows; where it shows nothing it says so."""
  tables, folded = ([t for t in some if t.rows] for some in (tables, folded))
  there = _has(*drawn) or tables or folded
  return Section(key, title, lead if there else '', [f for f in drawn if _has(f)], tables, folded,
                 '' if there else empty, pictures)


def _success(view: View) -> Section:
  last = {point['run']: point for point in view['curves'] if point['success'] is not None}
  bands = any(b['seeds'] > 1 for b in view['bands'])
  lead = ('Held-out success against what had been spent by then, steps that a kill wasted included. ' +
          ('A thick line is the mean over seeds, its band runs from the least to the largest.' if bands else
           'The band is the 95 % interval of an evaluation.'))
  if view['beside']['rows']:
    lead += (f' The dashed line is a run that was recorded, of the same config but for its budgets: '
             f'{view["beside"]["said"]}. One pair of runs tells of one seed.')
  elif view['beside']['said']:
    lead += f' Beside this run stands {view["beside"]["said"]}.'
  rows = ([run, number(x['step']), rate(x['success']), span(x['low'], x['high'])] for run, x in last.items())
  return _section(
      'success', 'Success and what it cost', lead,
      [_switched('success', 'Held-out success', lambda axis: charts.success(view, axis)),
       _each(view, ('difficulty', 'By difficulty', charts.difficulty))],
      'No evaluation is recorded.', pictures=('success', 'success_by_difficulty'),
      tables=[_table(view, 'last', 'The last evaluation', ['step', 'held-out success', '95 % interval'], rows,
                     (0, 1, 2))])


def _calibration(view: View) -> Section:
  return _section(
      'calibration', 'Calibration of the estimates', 'Budgets are as good as the success rates that they come from. On '
      'the dotted line a forecast is right; a point is a bin of forecasts, with its 95 % interval, and larger the more '
      'rollouts it holds. Trailing means of the log loss stand beside it.',
      [_each(view, ('reliability', 'Forecast and observed', charts.reliability),
             ('log-loss', 'Log loss', charts.log_loss))],
      'No forecasts are recorded.', pictures=('calibration',))


def _budgets(view: View) -> Section:
  return _section(
      'budgets', 'Budgets by success rate', 'Mean rollouts of a task by its estimated success rate, over the run. It '
      'is blank where there was no task.', [_each(view, ('budgets', 'Budgets', charts.budgets))],
      'No budgets are recorded.', pictures=('budgets',))


def _gradient(view: View) -> Section:
  return _section(
      'gradient', 'Effective gradient', 'A group teaches only where it is mixed, with a right and a wrong rollout. '
      'Observed, expected by the forecasts, and what the same forecasts expect of uniform budgets; trailing means.',
      [_each(view, ('gradient', 'Rollouts in mixed groups', charts.gradient),
             ('mixed', 'Mixed tasks', charts.mixed))],
      'No step is recorded.', pictures=('gradient_ratio',))


def _status(view: View) -> Section:
  drawn = [_each(view, (f'status-{of}', f'{of.capitalize()} tasks', functools.partial(charts.status, of=of)))
           for of in ('held-out', 'training')]
  counts = lambda x: [Row([name, *map(number, row)]) for name, row in zip(x['classes'], x['matrix'])]
  tables = [Table(f'status-{i}', f'{x["of"].capitalize()} tasks, {x["run"]}: from (row) to (column)',
                  ['', *x['classes']], counts(x), numbers=tuple(range(1, len(x['classes']) + 1)))
            for i, x in enumerate(view['status']) if any(map(any, x['matrix']))]
  return _section(
      'status', 'Status of tasks', 'Tasks by the class of their success rate, from the start (row) to the end '
      '(column): held-out tasks from the first evaluation to the last, training tasks from their first visit to their '
      'last.', [Charts([x for some in drawn for x in some.shown], [x for some in drawn for x in some.more])],
      'No counts of single tasks are recorded.', folded=tables)


def _goodput(view: View) -> Section:
  total = {}
  for row in view['goodput']:
    total[row['run']] = total.get(row['run'], 0) + (row['seconds'] or 0)
  share = lambda row: row['seconds'] / total[row['run']] if row['seconds'] and total[row['run']] else row['seconds']
  rows = ([row['run'], words(row['category']), row['kind'], number(row['seconds'], 's'), number(share(row), 'share')]
          for row in view['goodput'])
  return _section(
      'goodput', 'Goodput', 'Where the wall time went, over all restarts: productive steps, and what else.',
      [_one('goodput', 'Wall time', charts.goodput(view))], 'There is no ledger.', pictures=('goodput',),
      folded=[_table(view, 'goodput-table', 'Seconds by category', ['category', 'kind', 'wall time', 'share'], rows,
                     (2, 3))])


def _phases(view: View) -> Section:
  rows = ([row['run'], words(row['phase']), number(row['seconds'], 's'),
           *(number(row[name], 'share') for name in ('device_busy_share', 'mfu', 'bandwidth_use'))]
          for row in view['phases'])
  table = _table(view, 'phases-table', 'Phases and their use of the devices',
                 ['phase', 'wall time', 'devices busy', 'MFU', 'bandwidth use'], rows, (1, 2, 3, 4))
  single = len(view['runs']) == 1
  return _section(
      'phases', 'Phases', 'Wall time of each phase, how much of it the devices had work (at the most), and what share '
      'of their peak arithmetic (MFU) and of their memory bandwidth they used.',
      [_one('phases', 'Wall time by phase', charts.phases(view))], 'There is no ledger.',
      tables=[table] if single else [], folded=[] if single else [table])


def _memory(view: View) -> Section:
  host = {row['source'] for row in view['memory']} == {'host'}
  rows = ([row['run'], words(row['phase']), number(row['gb'], 'GB'), row['source']] for row in view['memory'])
  return _section(
      'memory', 'Memory', 'The largest memory in use in each phase' +
      (', of the host process: these devices do not tell theirs.' if host else ', of the busiest device.'),
      [_one('memory', 'Peak memory by phase', charts.memory(view))], 'No memory is recorded.',
      folded=[_table(view, 'memory-table', 'Peak memory', ['phase', 'peak', 'of'], rows, (1,))])


def _network(view: View) -> Section:
  rows = ([row['run'], words(row['phase']), row['what'], number(row['bytes'], 'bytes')] for row in view['network'])
  return _section(
      'network', 'Network', 'Bytes that devices sent each other (collectives), that went between host and devices, and '
      'that checkpoints hold; the axis is logarithmic.', [_one('network', 'Bytes by phase', charts.network(view))],
      'No bytes are recorded.', folded=[_table(view, 'network-table', 'Bytes', ['phase', 'what', 'bytes'], rows, (2,))])


def _verification(view: View) -> Section:
  if len(view['runs']) == 1:
    drawn = _one('verification', 'Verdicts', charts.verification(view)).shown
  else:
    names = dict.fromkeys(row['name'] for row in view['verification'])
    drawn = [Chart(f'verification-{i}', 'Verdicts', {'': spec}, name) for i, name in enumerate(names)
             if (spec := charts.verification(view, name)) is not None]
  rows = ([row['run'], row['name'], words(row['kind']), number(row['rollouts']), number(row['share'], 'share')]
          for row in view['verification'])
  return _section(
      'verification', 'Verifier health', 'Verdicts by dataset and verifier. A dataset that answers but never matches '
      'is most often a grader of the wrong format, not a hard one.',
      [Charts(drawn)], 'No verdicts are recorded.',
      folded=[_table(view, 'verification-table', 'Counts of verdicts',
                     ['dataset/verifier', 'verdict', 'rollouts', 'share'], rows, (2, 3))])


def _pareto(view: View) -> Section:
  rows = ([row['run'], charts.AXES[row['axis']], number(row['step']), _cost(row['cost'], row['axis']),
           rate(row['success'])] for row in view['pareto'] if row['on_front'])
  return _section(
      'pareto', 'Pareto set', 'Evaluations that none beats in success and cost at once stand on the dotted line; the '
      'others are faint.',
      [_switched('pareto', 'Every evaluation', lambda axis: charts.pareto(view, axis))],
      'No evaluation has a known cost.',
      folded=[_table(view, 'pareto-table', 'The Pareto set', ['axis', 'step', 'cost', 'held-out success'], rows,
                     (1, 2, 3))])


def _cost(x: float | None, axis: str) -> str:
  return number(x, {'dollars': '$', 'kwh': 'kWh', 'device_s': 's'}.get(axis, ''))


def _comparison(view: View) -> Section | None:
  """None where there is one group and no target: there is nothing to compare."""
  found = view['comparison']
  if found['target'] is None:
    if len(charts.groups(view)) < 2:
      return None
    return Section('comparison', 'Comparison', empty='There is no target. Costs are compared at a held-out success '
                   'that is fixed before the runs: --target=.8')
  rows = [Row([row['group'], charts.AXES[row['axis']], _cost(row['cost'], row['axis']), number(row['ratio']),
               span(row['low'], row['high'], number), row['text']],
              first=i > 0 and row['axis'] != found['rows'][i - 1]['axis'])
          for i, row in enumerate(found['rows'])]
  others = [g for g in charts.groups(view) if g != found['baseline']]
  beside = f'; ratios are the cost of {found["baseline"]} over that of the group' if found['baseline'] else ''
  return _section(
      'comparison', 'Comparison', f'What it costs to hold a held-out success of {found["target"]:g}, fixed '
      f'beforehand{beside}. Pairs of runs share their seed; intervals are of 95 %. A multiple is said only where its '
      'interval leaves 1 out.', [_one('comparison', 'Cost of the baseline / cost of the group', charts.comparison(view),
                                           others[0] if len(others) == 1 else '')],
      'No group is there to compare.',
      tables=[Table('comparison-table', f'Cost to {found["target"]:g}',
                    ['group', 'axis', 'cost (median)', 'ratio', '95 % interval', 'what it shows'], rows,
                    numbers=(2, 3, 4), wide=(5,))])


def hardest(view: View) -> tuple[list[tuple[str, list[dict[str, Any]]]], list[tuple[str, list[dict[str, Any]]]]]:
  """(run, its tasks) of the runs that are shown, and of those that a reader can open."""
  of_run: dict[str, list[dict[str, Any]]] = {}
  for row in view['hardest']:
    of_run.setdefault(row['run'], []).append(row)
  shown = shown_runs(view)
  return ([x for x in of_run.items() if x[0] in shown], [x for x in of_run.items() if x[0] not in shown])


# ---- pictures ----


def pictures(view: View) -> dict[str, drawing.Spec]:
  """The charts of plots/*.png, by name, of the first run of each group."""
  axis = next((a for a in charts.AXES if charts.success(view, a)), None)
  found: dict[str, drawing.Spec | None] = {
      'success': None if axis is None else charts.success(view, axis), 'goodput': charts.goodput(view)}
  whole = {name: drawing.beside([spec], [title], 1)
           for (name, spec), title in zip(found.items(), ('Held-out success', 'Wall time')) if spec is not None}
  runs = shown_runs(view)
  for name, drawn in (('success_by_difficulty', (('Success by difficulty', charts.difficulty),)),
                      ('budgets', (('Budgets', charts.budgets),)),
                      ('gradient_ratio', (('Effective gradient ratio', charts.gradient),
                                          ('Mixed tasks', charts.mixed))),
                      ('calibration', (('Calibration', charts.reliability), ('Log loss', charts.log_loss)))):
    some = [(spec, title if len(runs) == 1 else f'{title}: {run}') for run in runs for title, draw in drawn
            if (spec := draw(view, run)) is not None]
    if some:
      whole[name] = drawing.beside(*zip(*some), 1 if len(some) == 1 else 2)
  return whole
