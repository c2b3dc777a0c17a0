"""The figures of a scorecard, by hand."""

import pytest

from kr_jax.report import figures
from kr_jax.report import run as run_lib
from kr_jax.report.figures import Figure
from tests.report import made_run


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  workdir = made_run.make(tmp_path_factory.mktemp('made') / 'run', steps=4, every=2)
  found = run_lib.read(workdir)
  found.evaluations[-1].update({'eval/perturbed_case/ratio': 0.5, 'eval/perturbed_case/ratio_low': 0.25,
                                'eval/perturbed_case/ratio_high': 0.75})
  return found


@pytest.mark.parametrize('over, under, found', [
    (Figure(6.0, 'counted'), Figure(3.0, 'counted'), Figure(2.0, 'counted')),
    (Figure(6.0, 'counted'), Figure(3.0, 'measured'), Figure(2.0, 'measured')),
    (Figure(6.0, 'modelled'), Figure(3.0, 'measured'), Figure(2.0, 'modelled')),
    (Figure(6.0, 'counted'), Figure(0, 'counted'), Figure(None, None, 'nothing to divide by')),
    (Figure(None, None, 'why'), Figure(3.0, 'counted', 'not why'), Figure(None, None, 'why')),
    (Figure(6.0, 'counted', 'not why'), Figure(None, None, 'why'), Figure(None, None, 'why'))])
def test_a_ratio_is_as_uncertain_as_its_less_certain_part(over, under, found):
  assert figures.ratio(over, under) == found


def test_totals(made):
  entries = made.ledger.entries
  assert figures.total(made, 'tokens_generated') == sum(e.get('tokens_generated', 0) for e in entries)
  assert figures.total(made, 'tokens_generated', 'sample') == sum(r['tokens_generated'] for r in made.steps)
  assert figures.total(made, 'no_such') is None and figures.total(made, 'wall_s', 'no_such') is None


def test_the_figures_of_a_run(made):
  """By the generator: 800,000 parameters, 2 a token of FLOPs to sample and three times as many to update."""
  found = figures.of_run(made)
  tokens = sum(record['tokens_generated'] for record in made.steps)
  wall_s = sum(entry['wall_s'] for entry in made.ledger.entries)
  value = lambda *key: (found[key].value, found[key].provenance)
  assert value('computation', 'training time, all attempts', 's') == (pytest.approx(wall_s), 'measured')
  assert value('computation', 'device time held', 'device-h') == (pytest.approx(8 * wall_s / 3600), 'measured')
  assert value('computation', 'generated in training', 'tokens') == (tokens, 'counted')
  assert value('computation', 'useful work', 'FLOP') == (8 * 800_000 * tokens, 'counted')
  assert value('computation', 'useful part of the work', 'share') == (pytest.approx(4 / 5.2, rel=1e-3), 'counted')
  assert value('computation', 'throughput of sampling', 'tokens/s') == (pytest.approx(4000.0), 'measured')
  assert value('memory', 'size of the model', 'GB') == (pytest.approx(0.0032), 'counted')
  assert value('memory', 'peak in use', 'GB') == (pytest.approx(0.524288), 'measured')
  assert value('memory', "compression of the sampler's cache", 'ratio') == (0.25, 'counted')
  assert value('energy', 'energy', 'kWh')[1] == 'modelled'
  # Eight chips of $1.20 an hour.
  dollars = 8 * 1.2 * wall_s / 3600
  assert value('money', 'the run', '$') == (pytest.approx(dollars), 'modelled')
  assert value('money', 'a parameter', '$') == (pytest.approx(dollars / 800_000), 'modelled')
  assert value('network', 'sent by collectives', 'GB') == (pytest.approx(4 * 34 * 800_000 / 1e9), 'counted')
  assert found['other', 'robustness: success kept under case', 'ratio'] == Figure(
      0.5, 'measured', '95 % interval 0.250 to 0.750, at step 4')
  assert value('other', "fidelity of the sampler's policy, 1 - sqrt(JS)", 'share') == (
      pytest.approx(0.995), 'measured')


def test_dollars_to_a_target(made):
  key = ('money', 'to a held-out success of 0.99', '$')
  assert key not in figures.of_run(made)
  never = figures.of_run(made, 0.99)[key]
  assert (never.value, never.provenance) == (None, None) and never.note.startswith('not held after $')
  target = made.success(made.evaluations[-1])
  found = figures.of_run(made, target)['money', f'to a held-out success of {target:g}', '$']
  assert 0 < found.value < made.price.dollars.value and found.provenance == 'modelled'


def test_what_is_not_recorded_is_unknown_and_says_why(tmp_path):
  found = figures.of_run(run_lib.read(str(tmp_path)))
  assert {x.value for x in found.values()} == {x.provenance for x in found.values()} == {None}
  assert all(x.note for x in found.values())
  metrics_alone = run_lib.read(made_run.make(tmp_path, steps=2, every=2, skip=('ledger.jsonl',)))
  found = figures.of_run(metrics_alone)
  assert found['computation', 'training time, all attempts', 's'] == Figure(
      metrics_alone.evaluations[-1]['wall_s'], 'measured',
      'of metrics.jsonl: without starts, warm start and repeated steps')
  assert found['computation', 'generated in training', 'tokens'].value == sum(
      record['tokens_generated'] for record in metrics_alone.steps)
  assert found['money', 'the run', '$'].value is None
