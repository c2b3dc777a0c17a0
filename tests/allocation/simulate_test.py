"""The commands as a user meets them, their tables and plots."""

import json

from matplotlib import image
import numpy as np
import pytest

from kr_jax.allocation import allocate
from kr_jax.allocation import forecast
from kr_jax.allocation import passes
from kr_jax.allocation import simulate
from kr_jax.allocation import worlds


def test_populations_of_the_user(tmp_path):
  path = tmp_path / 'rates.json'
  for text, rates in (('[0, 1, 0.25]', {'rates.json': {0, 1, 0.25}}),
                      ('{"a": [0.25], "b": [1]}', {'a': {0.25}, 'b': {1}})):
    path.write_text(text)
    populations = simulate.read_populations(str(path))
    drawn = {name: set(population.draw(np.random.default_rng(0), 50)) for name, population in populations.items()}
    assert drawn == rates


@pytest.mark.parametrize('text, match', [
    ('0.5, 0.2', 'is not JSON .*write a list'),
    ('[]', r"'rates\.json' must be a list of at least one success rate, not \[\]"),
    ('{}', 'holds no population'),
    ('{"a": 0.5}', "'a' must be a list .*not 0.5"),
    ('{"a": [0.5, 1.5]}', r"'a' has 1\.5 at position 1; success rates are numbers in \[0, 1\]"),
    ('[NaN]', 'has nan at position 0'),
    ('["0.5"]', "has '0.5' at position 0"),
    ('[true]', 'has True at position 0'),
])
def test_bad_populations_are_named(tmp_path, text, match):
  path = tmp_path / 'rates.json'
  path.write_text(text)
  with pytest.raises(ValueError, match=match):
    simulate.read_populations(str(path))


def test_never_is_said():
  row = {'start': [0, 1], 'sigma': 0.0,
         'share': {'uniform:std': [1.0, 0.5], 'mine': [None, 0.25], 'other': [None, None]},
         'success_by_seed': {'uniform:std': np.array([[0.25, 0.5], [0.25, 0.75]])}}
  table = simulate.learning_table([row])
  assert '0.75 (0.50-1.00)' in table and 'in 1 of 2' in table and 'never' in table
  assert '0.250 to' in table and '0.625' in table


def test_budgets_are_plotted():
  figure = simulate.plot_budgets([0.5, 0.1, 0.9], 12, nus=(1.0,))
  axes, = figure.axes
  lines = {line.get_label(): line.get_ydata() for line in axes.lines}
  assert list(lines) == ['uniform', "infogain (the paper's)", 'variance', 'snr, nu = 1']
  np.testing.assert_array_equal(lines['uniform'], [4, 4, 4])
  np.testing.assert_array_equal(lines['variance'],
                                allocate.budgets([0.1, 0.5, 0.9], 12, value='variance'))
  assert figure._repr_png_().startswith(b'\x89PNG')  # what a notebook asks for


def test_static_command(tmp_path, capsys):
  rates = tmp_path / 'rates.json'
  rates.write_text('{"mine": [0.5, 0.25]}')
  simulate.main(['static', '--debug', '--json', '--out', str(tmp_path / 'out'),
                 '--populations', str(rates)])
  out = capsys.readouterr().out.splitlines()
  done = json.loads(out[-1])
  assert done == json.loads((tmp_path / 'out' / 'static.json').read_text())
  assert done['config']['repeats'] == 4
  assert list(done['results']) == [*worlds.beta_populations(), 'mine']
  assert any(line.startswith('  posterior - paper') for line in out)
  assert image.imread(tmp_path / 'out' / 'budgets.png').std() > 0.02


def test_learning_command(tmp_path, capsys):
  simulate.main(['learning', '--debug', '--json', '--out', str(tmp_path / 'out'),
                 '--start', '-1', '2', '--alignment', '0.4'])
  out = capsys.readouterr().out.splitlines()
  done = json.loads(out[-1])
  assert done == json.loads((tmp_path / 'out' / 'learning.json').read_text())
  assert [(row['start'], row['sigma']) for row in done['results']] == [([-1, 2], 0), ([-1, 2], 2)]
  assert all(len(share) == 2 for row in done['results'] for share in row['share'].values())
  assert image.imread(tmp_path / 'out' / 'learning.png').std() > 0.02


def test_passes_command(tmp_path, capsys):
  simulate.main(['passes', '--debug', '--json', '--out', str(tmp_path / 'out'), '--jobs', '1', '--method', 'uniform',
                 'discounted:1+waves=2', '--change', '-1', '--change_step', '6'])
  out = capsys.readouterr().out.splitlines()
  done = json.loads(out[-1])
  assert done == json.loads((tmp_path / 'out' / 'passes.json').read_text())
  assert done['config']['methods'] == ['uniform', 'discounted:1+waves=2'] and done['config']['change'] == -1
  uniform, waves = done['results'].values()
  assert uniform['of_uniform'] == pytest.approx([100, 0]) and waves['expected_ratio'] == [None, None]
  assert set(uniform) == {*passes.MEASURES, *passes.VISITS}
  assert out[0].split()[:2] == ['objective,', '%'] and out[1].startswith('uniform ')
  assert ' - for 0.' in out[2]  # what waves expect is not known, and what was seen is
  assert any(line.startswith('lost, by visits since the change') for line in out)


def test_flags_win_over_presets():
  read = lambda *argv: simulate._setup(passes.PassesSetup, simulate.parser().parse_args(['passes', *argv]), tasks=32)
  plain, dapo = read(), read('--preset', 'dapo')
  assert plain == passes.PassesSetup()
  assert (dapo.tasks, dapo.per_step, dapo.per_task, dapo.high, dapo.low) == (17_398, 128, 8, 128, 2)
  typed = read('--per_task', '4', '--preset', 'dapo', '--low', '1')
  assert (typed.tasks, typed.per_task, typed.low) == (17_398, 4, 1)
  # A typed default wins as well, and over what --debug shrinks.
  assert read('--preset', 'dapo', '--tasks', '1024', '--debug').tasks == 1024
  assert read('--preset', 'dapo', '--debug', '--per_step', '16').tasks == 32


def test_decision_table_by_hand():
  of = lambda share: {'knapsack': forecast.Range(share, 0.5, share, 0.0, 2, 2)}
  table = simulate.decision_table({('even', 8, 0.1): of(0.75), ('even', 8, 10.0): of(None)})
  assert table == '''\
| success rates | steps of a pass | signal-to-noise | knapsack | verdict |
| --- | --- | --- | --- | --- |
| even | 8 | 0.1 | 0.75 (0.50-0.75) | worth it: knapsack |
| even | 8 | 10 | >1.2 (0.50->1.2) | no difference expected |'''


@pytest.mark.slow
def test_decide(tmp_path, capsys):
  simulate.main(['decide', '--debug', '--jobs', '1', '--json', '--out', str(tmp_path)])
  done = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert done == json.loads((tmp_path / 'decide.json').read_text())
  row, = done['results']
  assert (row['epoch'], row['signal_to_noise']) == (8, 10.0) and list(row['ranges']) == list(forecast.RULES)


@pytest.mark.parametrize('argv, named', [
    (('static', '--populations', 'no.json'), 'error: --populations no.json: No such file'),
    (('static', '--low', '0'), 'error: low=0 (least rollouts that a task gets) must be at least 1'),
    (('learning', '--method', 'mine'), "error: --method 'mine' is not"),
    (('passes', '--method', 'mine'), "error: --method 'mine' is not ESTIMATE"),
    (('passes', '--change', '1'), 'error: change_step=0 must lie in 1..'),
    (('decide', '--seeds', '0'), 'error: seeds=0 (worlds of each row) must be at least 1'),
])
def test_bad_flags_are_short_errors(tmp_path, argv, named):
  with pytest.raises(SystemExit) as stop:
    simulate.main([*argv, '--debug', '--out', str(tmp_path)])
  assert named in str(stop.value)


def test_two_populations_of_one_name(tmp_path):
  rates = tmp_path / 'rates.json'
  rates.write_text('[0.5]')
  with pytest.raises(SystemExit, match="two populations are named 'rates.json'"):
    simulate.main(['static', '--debug', '--out', str(tmp_path), '--populations', str(rates), str(rates)])


def test_help(capsys):
  for argv in (['--help'], ['static', '--help'], ['passes', '--help'], ['learning', '--help'], ['decide', '--help']):
    with pytest.raises(SystemExit):
      simulate.main(argv)
    out = capsys.readouterr().out
    assert out.startswith('usage: python -m kr_jax.allocation.simulate') and 'None' not in out
