"""A line an area: on both sides of each threshold."""

import pytest

from kr_jax.report import run as run_lib
from kr_jax.report import verdicts
from tests.report import made_run
from tests.report.made_run import evaluation
from tests.report.made_run import run_of

AREAS = ('learning', 'allocation', 'calibration', 'verification', 'compute', 'memory', 'energy', 'money', 'network',
         'goodput')


def of(*runs):
  return {row['area']: row for row in verdicts.of_groups({'a': runs})}


def steps(n=4, **figures):
  return run_of([{'step': i, 'reward_mean': 0.5, **figures} for i in range(n)])


def ledger(device='TPU v5 lite', **entry):
  """A run of one attempt and one entry, on two devices, priced by the project's profiles."""
  attempt = {'attempt': 0, 'started': 1.74e9, 'first_step': 0, 'device_kind': device, 'devices': 2, 'memory': 'device'}
  entry = {'attempt': 0, 'step': 0, 'phase': 'update', 'began': 1.74e9, 'wall_s': 10.0, 'busy_s': 10.0,
           'device_s': 20.0} | entry
  return run_of(entries=[entry], attempts=[attempt], priced=True)


def test_a_whole_run_has_a_line_an_area(tmp_path):
  found = of(run_lib.read(made_run.make(tmp_path, steps=4, every=2)))
  assert tuple(found) == AREAS
  assert all(row['level'] in verdicts.LEVELS and row['text'] for row in found.values())


def test_nothing_recorded_is_unknown():
  assert {row['level'] for row in of(run_of()).values()} == {'unknown'}


@pytest.mark.parametrize('right, level, text', [
    ([4, 4, 4, 3], 'good', 'held-out success 0.250 to 0.938 (+0.688 ± 0.122)'),
    ([4, 0, 1, 1], 'warn', 'held-out success 0.250 to 0.375 (+0.125 ± 0.424)'),
    ([0, 0, 0, 0], 'bad', 'held-out success 0.250 to 0.000 (-0.250 ± 0.200)')])
def test_learning(right, level, text):
  """Rises of tasks by hand: 3/4, 3/4, 3/4, 1/2; 3/4, -1/4, 0, 0; -1/4, -1/4, -1/2, 0."""
  before = [1, 1, 1, 1] if level != 'bad' else [1, 1, 2, 0]
  evaluations = [evaluation(step, sum(of) / 16, of) for step, of in ((0, before), (8, right))]
  found = of(run_of(evaluations=evaluations))['learning']
  assert (found['level'], found['text']) == (level, text)


def test_allocation():
  beside = {'expected_gradient_ratio': 0.6, 'mixed_tasks': 3, 'expected_mixed_tasks': 4.0, 'uniform_mixed_tasks': 5.0}
  level = lambda seen, uniform: of(steps(effective_gradient_ratio=seen, uniform_gradient_ratio=uniform, **beside))[
      'allocation']
  assert level(0.5, 0.5) == {
      'area': 'allocation', 'level': 'good', 'text': '50% of the rollouts are in mixed groups; 60% were expected, of '
      'uniform budgets 50%; mixed tasks a step: 3.0, expected 4.0, of uniform budgets 5.0'}
  assert [level(*x)['level'] for x in ((0.5, 0.7), (0.2, 0.5), (0.04, 0.5), (0.04, 0.7))] == [
      'warn', 'warn', 'bad', 'bad']


def test_calibration_is_of_the_second_half():
  step = {'step': 0, 'reward_mean': 0.5, 'log_loss': 9.0, 'constant_log_loss': 0.5}
  level = lambda loss: of(run_of([step, step, step | {'log_loss': loss}, step | {'log_loss': loss}]))[
      'calibration']['level']
  assert [level(x) for x in (0.4, 0.49, 0.51)] == ['good', 'warn', 'bad']


def test_calibration_is_of_mixed_groups_too():
  found = lambda seen: of(steps(log_loss=0.4, constant_log_loss=0.5, expected_gradient_ratio=0.5,
                                effective_gradient_ratio=seen))['calibration']
  assert found(0.45)['level'] == 'good'
  assert found(0.35)['level'] == found(0.65)['level'] == 'warn'
  assert found(0.35)['text'].endswith('; 50% of the rollouts expected in mixed groups, 35% seen')


def test_verification():
  level = lambda unverified, no_answer=0.0, **more: of(steps(unverified=unverified, no_answer=no_answer, **more))[
      'verification']['level']
  assert [level(0.0), level(0.02), level(0.06), level(0.0, 0.6), level(0.0, alarms=['x'])] == [
      'good', 'warn', 'bad', 'warn', 'warn']


def test_compute_by_hand():
  """Two v5e chips do 2 x 197e12 FLOPs a second; 10 s."""
  level = lambda share: of(ledger(flops_useful=int(share * 2 * 197e13)))['compute']
  assert [level(x)['level'] for x in (0.35, 0.2, 0.05)] == ['good', 'warn', 'bad']
  assert level(0.35)['text'] == 'updates use 35.0% of the peak FLOP/s; 0.00556 device-hours'
  assert of(ledger())['compute']['level'] == 'unknown'


def test_memory_by_hand():
  found = lambda gb, **more: of(ledger(peak_bytes=int(gb * 1e9), **more))['memory']
  assert found(8.6) == {'area': 'memory', 'level': 'good', 'text': 'at most 8.60 of 17.2 GB of a device, in update'}
  assert found(16.5)['level'] == 'warn'
  assert found(8.6, device='abacus')['level'] == 'unknown'


def test_energy_and_money():
  idle = of(ledger(busy_s=4.0))
  assert idle['energy']['level'] == 'warn' and 'the devices wait for 60% of the time' in idle['energy']['text']
  busy = of(ledger())
  assert busy['energy']['level'] == 'good' and '(modelled)' in busy['energy']['text']
  # $1.20 an hour and chip, of February 2025; the run began in the same month.
  assert busy['money'] == {'area': 'money', 'level': 'good', 'text': '$0.00667 (modelled)'}
  assert of(ledger(phase='evaluate'))['money']['text'] == '$0.00667 (modelled); 100% of it for evaluation'
  late = ledger()
  late.ledger.attempts[0]['started'] += 2 * 365 * 86400
  assert of(late)['money']['text'].endswith('the price is of 2025-02')
  assert of(ledger(device='abacus'))['money']['level'] == 'unknown'


def test_network_by_hand():
  """Two v5e chips send 2 x 200 GB a second: 4000 GB in 10 s."""
  found = lambda gb: of(ledger(collective_bytes=int(gb * 1e9)))['network']
  assert found(400) == {'area': 'network', 'level': 'good',
                        'text': '400 GB sent between devices, 10.0% of the busy time at the rate of the links'}
  assert found(2400)['level'] == 'warn'
  assert found(0)['text'] == 'nothing is sent between devices'


def test_goodput_by_hand():
  level = lambda phase: of(ledger(phase=phase))['goodput']
  assert level('update')['level'] == 'good' and level('verify')['level'] == 'bad'
  assert level('verify')['text'] == ('0% of 10 s productive, in 1 attempt; most of the rest is verification (100%)')


def test_the_worst_group_sets_the_level():
  groups = {'a': [ledger()], 'b': [ledger(phase='verify')], 'c': [run_of()]}
  row = next(row for row in verdicts.of_groups(groups) if row['area'] == 'goodput')
  assert row['level'] == 'bad'
  assert [part.partition(':')[0] for part in row['text'].split('; ') if ':' in part] == ['a', 'b', 'c']
