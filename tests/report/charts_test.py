"""What the charts hold, of small views by hand."""

import inspect

import pytest

from kr_jax.report import charts
from tests.report import made_view

FUNCTIONS = [f for name, f in inspect.getmembers(charts, inspect.isfunction)
             if f.__module__ == charts.__name__ and name[0] != '_' and name not in ('groups', 'words')]


def values(layer):
  return layer['data']['values']


def layers(spec):
  return spec.get('layer', [spec])


def drawn(spec):
  """(mark, number of rows) of each layer."""
  marks = [layer['mark'] if isinstance(layer['mark'], str) else layer['mark']['type'] for layer in layers(spec)]
  return list(zip(marks, [len(values(layer)) for layer in layers(spec)]))


@pytest.mark.parametrize('function', FUNCTIONS, ids=lambda f: f.__name__)
def test_nothing_is_drawn_of_nothing(function):
  given = {'view': made_view.empty(), 'run': 'a', 'axis': 'tokens', 'of': 'training', 'name': None}
  assert function(*(given[name] for name in inspect.signature(function).parameters)) is None


def curve(run, step, success, **more):
  return {'run': run, 'group': run.partition('/')[0], 'step': step, 'success': success, 'low': 0.2,
          'high': 0.6, **{axis: 10.0 * step for axis in charts.AXES}, **more}


def test_success_of_one_run_has_its_interval():
  view = made_view.empty('a')
  view['curves'] = [curve('a', 0, 0.25), curve('a', 1, 0.5, low=None), curve('a', 2, None)]
  view['bands'] = [{'group': 'a', 'axis': 'tokens', 'x': 0, 'mean': 0.25, 'low': 0.25, 'high': 0.25, 'seeds': 1}]
  assert drawn(charts.success(view, 'tokens')) == [('area', 1), ('line', 2), ('point', 2)]
  view['curves'] = [curve('a', 0, 0.25, dollars=None)]
  assert charts.success(view, 'dollars') is None  # its cost is unknown


def test_a_recorded_run_is_a_dashed_line_beside_the_only_run():
  view = made_view.empty('a')
  view['curves'] = [curve('a', 0, 0.25), curve('a', 1, 0.5)]
  rows = [{'step': step, 'rollouts': 10 * step, 'tokens': None, 'success': 0.3, 'low': None, 'high': None}
          for step in (0, 1, 2)]
  view['beside'] = {'said': 'uniform: 0.4', 'name': 'uniform budgets', 'rows': rows}
  spec = charts.success(view, 'rollouts')
  assert drawn(spec) == [('area', 2), ('line', 2), ('line', 3), ('point', 5)]
  dashed = layers(spec)[2]
  assert dashed['mark']['strokeDash'] and {row['group'] for row in values(dashed)} == {'uniform (recorded)'}
  assert dashed['encoding']['color']['scale'] == {'domain': ['a', 'uniform (recorded)'], 'range': ['c0', 'muted']}
  assert drawn(charts.success(view, 'tokens')) == [('area', 2), ('line', 2), ('point', 2)]  # which it does not know


def test_success_of_several_runs_has_the_band_of_their_group():
  view = made_view.empty('a/0', 'a/1', 'b')
  view['curves'] = [curve(run, step, 0.5) for run in ('a/0', 'a/1', 'b') for step in (0, 1)]
  view['bands'] = [{'group': 'a', 'axis': axis, 'x': x, 'mean': 0.5, 'low': 0.4, 'high': 0.6, 'seeds': 2}
                   for axis in ('tokens', 'kwh') for x in (0, 10)]
  spec = charts.success(view, 'tokens')
  assert drawn(spec) == [('area', 2), ('area', 2), ('line', 4), ('line', 2), ('line', 2), ('point', 6)]
  assert {row.get('group') for row in values(layers(spec)[0])} == {'b'}  # the interval of the run that is alone
  assert layers(spec)[0]['encoding']['color']['scale'] == {'domain': ['a', 'b'], 'range': ['c0', 'c1']}


def test_difficulties_are_in_their_order():
  view = made_view.empty('a')
  view['difficulty'] = [{'run': 'a', 'step': 0, 'difficulty': d, 'success': 0.5} for d in ('10', '9', 'hard', '2')]
  assert charts.difficulty(view, 'a')['encoding']['color']['scale']['domain'] == ['2', '9', '10', 'hard']


def test_named_lines():
  view = made_view.empty('a', 'b')
  view['gradient'] = [{'run': run, 'step': 0, 'name': name, 'ratio': 0.5} for run in 'ab'
                      for name in ('uniform', 'observed')]
  spec = charts.gradient(view, 'a')
  assert [row['name'] for row in values(spec)] == ['expected of uniform budgets', 'observed']
  assert spec['encoding']['color']['scale'] == {
      'domain': ['observed', 'expected of uniform budgets'], 'range': ['c0', 'muted']}


def test_a_budget_reaches_to_the_next_step_and_runs_share_the_scale():
  view = made_view.empty('a', 'b')
  view['budgets'] = [{'run': run, 'step': step, 'bin_low': 0.0, 'bin_high': 0.1, 'budget': budget}
                     for run, step, budget in (('a', 0, 4.0), ('a', 5, 8.0), ('b', 0, 2.0))]
  spec = charts.budgets(view, 'a')
  assert [(row['step'], row['end']) for row in values(spec)] == [(0, 5), (5, 10)]
  assert spec['encoding']['color']['scale']['domain'] == [2.0, 8.0]
  assert [row['end'] for row in values(charts.budgets(view, 'b'))] == [1]


def test_status_has_every_cell_and_writes_those_with_tasks():
  view = made_view.empty('a')
  view['status'] = [{'run': 'a', 'of': 'training', 'classes': ['x', 'y'], 'matrix': [[0, 3], [1, 0]]}]
  cells, texts = layers(charts.status(view, 'a', 'training'))
  assert [(row['start'], row['end'], row['tasks']) for row in values(cells)] == [
      ('x', 'x', 0), ('x', 'y', 3), ('y', 'x', 1), ('y', 'y', 0)]
  assert [(row['tasks'], row['ink']) for row in values(texts)] == [(3, 'on'), (1, 'off')]
  assert charts.status(view, 'a', 'held-out') is None


def test_goodput_names_the_largest_losses():
  view = made_view.empty('a')
  losses = {'init': 6, 'compile': 5, 'data': 4, 'evaluation': 3, 'verification': 2, 'record': 1, 'other': 9, 'wait': 0}
  view['goodput'] = [{'run': 'a', 'category': 'productive', 'kind': 'productive', 'seconds': 30.0}] + [
      {'run': 'a', 'category': name, 'kind': 'badput', 'seconds': float(s)} for name, s in losses.items()]
  rows = values(charts.goodput(view))
  assert {row['category']: row['seconds'] for row in rows} == {
      'productive': 30, 'init': 6, 'compile': 5, 'data': 4, 'evaluation': 3, 'verification': 2, 'all else': 10}
  assert sum(row['share'] for row in rows) == pytest.approx(1, abs=1e-4) and rows[0]['share'] == 0.5


def test_amounts_are_bars_of_one_run_and_points_of_several():
  for runs, mark in ((['a'], 'bar'), (['a', 'b'], 'point')):
    view = made_view.empty(*runs)
    view['phases'] = [{'run': run, 'phase': phase, 'seconds': s} for run in runs
                      for phase, s in (('data', 1.0), ('warm_start', 2.0), ('score', None))]
    spec = charts.phases(view)
    assert drawn(spec) == [(mark, 2 * len(runs))] and spec['encoding']['y']['sort'] == ['warm start', 'data']


def test_bytes_are_on_a_logarithmic_axis():
  view = made_view.empty('a')
  view['network'] = [{'run': 'a', 'phase': phase, 'what': what, 'bytes': n} for phase, what, n in (
      ('update', 'collectives', 10 ** 9), ('checkpoint', 'checkpoint', 10 ** 6), ('sample', 'collectives', 0))]
  spec = charts.network(view)
  assert [row['what'] for row in values(spec)] == ['update: collectives', 'checkpoint']
  assert spec['encoding']['x']['scale']['type'] == 'log'


def test_verdicts_add_up():
  """Truncated rollouts without an answer are among those without an answer."""
  view = made_view.empty('a', 'b')
  shares = {'timeout': 0.25, 'right': 0.5, 'no_answer': 0.25, 'truncated_without_answer': 0.125}
  view['verification'] = [{'run': run, 'name': name, 'kind': kind, 'rollouts': 4, 'share': share} for run in 'ab'
                          for name in ('one', 'two') for kind, share in shares.items()]
  rows = values(charts.verification(view, 'two'))
  assert len(rows) == 6 and sum(row['share'] for row in rows) == 2
  assert charts.verification(view)['encoding']['color']['scale']['domain'] == ['right', 'no answer', 'timeout']


def test_pareto_joins_the_front():
  view = made_view.empty('a')
  points = [(100.0, 0.9, True), (1.0, 0.1, True), (50.0, 0.05, False)]
  view['pareto'] = [{'run': 'a', 'step': i, 'axis': 'tokens', 'cost': cost, 'success': success, 'on_front': on}
                    for i, (cost, success, on) in enumerate(points)]
  line, points = layers(charts.pareto(view, 'tokens'))
  assert [row['cost'] for row in values(line)] == [1.0, 100.0] and len(values(points)) == 3
  assert points['encoding']['x']['scale']['type'] == 'log'
  view['pareto'][1]['cost'] = 0.0  # a logarithm has no 0
  assert 'type' not in layers(charts.pareto(view, 'tokens'))[1]['encoding']['x']['scale']


def test_a_ratio_without_an_interval_is_not_drawn():
  view = made_view.empty('a', 'b')
  row = {'group': 'b', 'axis': 'tokens', 'ratio': 2.0, 'low': 1.5, 'high': 3.0}
  view['comparison']['rows'] = [row, row | {'axis': 'kwh', 'high': None}, row | {'axis': 'flops', 'ratio': None}]
  one, interval, point = layers(charts.comparison(view))
  assert [row['what'] for row in values(point)] == ['generated tokens'] and values(one) == [{'at': 1}]
  assert interval['encoding']['color']['scale']['range'] == ['c1']  # that of its group elsewhere
