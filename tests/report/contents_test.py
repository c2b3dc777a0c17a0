"""Numbers, tables and sections of small views by hand."""

import pytest

from kr_jax.report import contents
from kr_jax.report.contents import Row
from tests.report import made_view


@pytest.mark.parametrize('x, unit, said', [
    (None, 'kWh', '–'), (0, '', '0'), (0.0, 'share', '0.0 %'), (12.5, '$', '$12.50'), (0.01234, '$', '$0.0123'),
    (2.5e-7, '$', '$2.50e-07'), (0.4567, 'share', '45.7 %'), (0.00012345, 'share', '0.012 %'), (800000, '', '800 k'),
    (57022, 'tokens', '57,022 tokens'), (1234567, 'tokens', '1.23 M tokens'), (3.456e15, 'FLOP', '3.46 PFLOP'),
    (0.0032, 'GB', '3.2 MB'), (17.2, 'GB', '17.2 GB'), (999, 'bytes', '999 B'), (1500, 'bytes', '1.5 kB'),
    (0.25, 'ratio', '0.25'), (63.11, 's', '63.1 s'), (-0.05, '', '-0.05'), (0.902, 's', '0.902 s')])
def test_numbers(x, unit, said):
  assert contents.number(x, unit) == said


def test_estimates():
  assert contents.estimate({'mean': 0.0312, 'low': 0.001, 'high': None}) == '0.031 (0.001 to –)'
  assert contents.estimate(0.5) == '0.500' and contents.estimate(None) == '–'
  assert contents.estimate({'mean': 0.5, 'low': None, 'high': None}) == '0.500 (–)'


def test_what_runs_share_is_said_once():
  view = made_view.empty('a/0', 'a/1')
  view['runs'][0]['header'].append(['hardware', '8 x TPU'])
  assert contents.facts(view) == [('commit', 'abc')]
  assert contents.differences(view) == contents.Table(
      'runs', 'The runs', ['run', 'data', 'hardware'], [Row(['a/0', 'a/0', '8 x TPU']), Row(['a/1', 'a/1', '–'])])
  assert contents.facts(made_view.empty('a')) == [('commit', 'abc'), ('data', 'a')]
  assert not contents.differences(made_view.empty('a')).rows


def section(view, key):
  return next(s for s in contents.sections(view) if s.key == key)


def test_the_scorecard_says_each_note_once():
  view, value = made_view.empty('a', 'b'), lambda *x: dict(zip(('run', 'value', 'provenance', 'note'), x))
  view['scorecard'] = [
      {'resource': 'energy', 'metric': 'energy', 'unit': 'kWh', 'values': [
          value('a', 0.5, 'modelled', 'PUE 1.1'), value('b', 0.25, 'measured', 'PUE 1.1')]},
      {'resource': 'energy', 'metric': 'emissions', 'unit': 'kg', 'values': [
          value('a', 1.0, 'modelled', 'PUE 1.1'), value('b', None, None, 'no grid')]},
      {'resource': 'money', 'metric': 'the run', 'unit': '$', 'values': [value('b', 2.0, 'modelled', '')]}]
  table, = section(view, 'scorecard').tables
  assert table.columns == ['metric', 'source', 'a', 'b'] and table.notes == ['PUE 1.1', 'no grid']
  assert table.rows == [
      Row(['energy'], is_heading=True),
      Row(['energy', 'measured, modelled', '0.5 kWh', '0.25 kWh'], notes={0: [1]}),
      Row(['emissions', 'modelled', '1 kg', '–'], notes={2: [1], 3: [2]}),
      Row(['money'], is_heading=True), Row(['the run', 'modelled', '–', '$2.00'])]


def test_the_first_run_of_each_group_is_shown():
  view = made_view.empty('b/0', 'b/1', 'a/0', 'a/1')
  assert contents.shown_runs(view) == ['b/0', 'a/0']
  view['mixed'] = [{'run': run['run'], 'step': 0, 'name': 'observed', 'tasks': 1} for run in view['runs']]
  figures, = section(view, 'gradient').charts
  assert [f.of for f in figures.shown] == ['b/0', 'a/0'] and [f.of for f in figures.more] == ['b/1', 'a/1']
  assert len({f.key for f in (*figures.shown, *figures.more)}) == 4
  view['hardest'] = [{'run': run, 'task': task} for run, task in (('b/1', 1), ('a/0', 2), ('a/0', 3))]
  assert contents.hardest(view) == ([('a/0', view['hardest'][1:])], [('b/1', view['hardest'][:1])])


def test_tables_of_one_run_do_not_name_it():
  row = {'phase': 'warm_start', 'gb': 2.0, 'source': 'host'}
  for runs, columns, cells in ((['a'], ['phase', 'peak', 'of'], ['warm start', '2 GB', 'host']),
                               (['a', 'b'], ['run', 'phase', 'peak', 'of'], ['a', 'warm start', '2 GB', 'host'])):
    view = made_view.empty(*runs)
    view['memory'] = [{'run': run, **row} for run in runs]
    found = section(view, 'memory')
    assert found.folded[0].columns == columns and found.folded[0].rows[0].cells == cells
    assert 'host process' in found.lead
    assert found.folded[0].numbers == (len(columns) - 2,)


def test_sections_of_nothing_say_so():
  found = contents.sections(made_view.empty())
  assert [s.key for s in found] == [
      'verdicts', 'scorecard', 'success', 'calibration', 'budgets', 'gradient', 'status', 'goodput', 'phases', 'memory',
      'network', 'verification', 'hardest', 'pareto', 'reproduce', 'missing']  # and no comparison of one group
  assert all(s.empty and not s.charts for s in found if s.key != 'scorecard')
  assert not contents.pictures(made_view.empty())


def test_a_comparison_needs_a_target():
  view = made_view.empty('a', 'b')
  assert '--target' in section(view, 'comparison').empty
  view['comparison'] = {'target': 0.8, 'baseline': 'a', 'rows': [
      {'group': 'b', 'axis': 'dollars', 'cost': 1.5, 'ratio': None, 'low': 1.25, 'high': None, 'text': 'why'}]}
  table, = section(view, 'comparison').tables
  assert table.rows == [Row(['b', 'dollars', '$1.50', '–', '1.25 to –', 'why'])]
  assert 'held-out success of 0.8' in section(view, 'comparison').lead


def test_without_charts_their_tables_are_shown():
  view = made_view.empty('a')
  view['network'] = [{'run': 'a', 'phase': 'update', 'what': 'host', 'bytes': 10}]
  found = section(view, 'network')
  assert found.charts and not found.tables
  assert not found.without_charts().charts and found.without_charts().tables == found.folded
