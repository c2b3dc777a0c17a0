"""What is said of a run and of a recorded one beside it."""

import json

import pytest

from kr_jax import knobs
from kr_jax import library
from kr_jax.record import beside
from kr_jax.report import page
from kr_jax.report import panels
from kr_jax.report import paired
from kr_jax.report import run as run_lib
from kr_jax.report import scorecard
from tests.report import made_run


def row(step, success, rollouts=None, **more):
  return {'step': step, 'rollouts': 64 * step if rollouts is None else rollouts, 'tokens': 640 * step,
          'success': success, 'low': None, 'high': None, **more}


def said(*curve, last=None):
  last = last or row(12, 0.6, low=0.55, high=0.65)
  return paired.sentence(beside.Recorded('uniform budgets', {}, [row(0, 0.1), last]), list(curve))


def test_what_both_got_and_when_one_was_where_the_other_ended():
  """By hand: from .4 at 256 to .8 at 512 rollouts, .6 is held after 384, with two digits 380."""
  assert said(row(0, 0.1), row(4, 0.4), row(8, 0.8), row(12, 0.9, low=0.85, high=0.95)) == (
      'uniform budgets, the same seed and rollouts (recorded): 0.600 [0.550, 0.650]; this run 0.900 [0.850, 0.950]; '
      'it held 0.600 after 380 of 768 rollouts')


def test_what_is_not_known_is_not_said():
  assert said(row(0, 0.1), row(12, 0.5)).endswith('; this run 0.500, and it has not held 0.600')
  assert said(row(0, None)).endswith('(recorded): 0.600 [0.550, 0.650]; this run is not evaluated')
  assert 'the same seed, 768 rollouts (recorded)' in said(row(0, 0.1), row(12, 0.5, 900.0))  # as a kill wasted some
  assert said(row(0, 0.1, None), {**row(12, 0.7), 'rollouts': None}).endswith('this run 0.700')
  assert said(row(0, 0.1), row(12, 0.5), last=row(12, 0.0)).endswith('(recorded): 0.000; this run 0.500')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """By rule: one run of uniform budgets, which is recorded, and runs that name it."""
  path = tmp_path_factory.mktemp('runs')
  name = {'record': {'beside': str(path / 'uniform.json')}}
  found = {'uniform': run_lib.read(made_run.make(path / 'uniform', rule='uniform', gain=0.03))}
  uniform = found['uniform']
  (path / 'uniform.json').write_text(beside.as_text(
      'uniform budgets', 'COMMAND', uniform.config, {}, panels.curves(uniform), {}))
  for label, how in (('pair', {}), ('other', {'seed': 1})):
    found[label] = run_lib.read(made_run.make(path / label, gain=0.1, **how, **name))
  return found


def test_a_pair_is_shown_on_the_page(runs):
  found = paired.of(runs['pair'])
  assert found.said.startswith('uniform budgets, the same seed and rollouts (recorded): 0.')
  assert [r['success'] for r in found.rows] == [r['success'] for r in panels.curves(runs['uniform'])]
  view = page.cleaned(scorecard.view([runs['pair']]))
  text = page.markdown(view, [])
  assert 'The dashed line is a run that was recorded' in text and 'the same seed and rollouts' in text
  assert 'uniform (recorded)' in page.html(view, '')
  assert scorecard.view([runs['pair'], runs['uniform']])['beside']['rows'] == ()  # their own are compared


def test_a_run_that_is_no_pair_says_why(runs, tmp_path):
  assert paired.of(runs['uniform']) == paired.NOTHING
  path = runs['pair'].knob('record.beside')
  assert paired.of(runs['other']) == paired.Paired(f'nothing: seed differs from the run recorded in {path}')
  view = page.cleaned(scorecard.view([runs['other']]))
  assert 'Beside this run stands nothing: seed differs' in page.markdown(view, [])
  gone = run_lib.read(made_run.make(tmp_path / 'gone', steps=2, every=2, record={'beside': '/nowhere.json'}))
  assert "nothing: record.beside='/nowhere.json': /nowhere.json holds no recorded run" in paired.of(gone).said
  assert json.loads(json.dumps(view['beside'])) == {'said': paired.of(runs['other']).said, 'name': '', 'rows': []}


def test_the_last_lines_of_a_run_say_it(runs, capsys):
  config = knobs.Config(num_steps=12, evaluate=knobs.Evaluate(rollouts=4))
  for label in ('pair', 'other'):
    library.say_closing(config, runs[label].workdir, None)
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said['beside'] == paired.of(runs[label]).said
