"""What a run says: the table at its start, an evaluation in a line, and what was learnt for how much."""

import numpy as np
import pytest

from kr_jax import knobs
from kr_jax.costs import hardware as hardware_lib
from kr_jax.costs import pricing
from kr_jax.record import terminal

V5E = hardware_lib.Profile('v5e', ('tpu v5 lite',), dollars_per_hour=1.2, price_date='2025-02', price_source='list')
CORE = hardware_lib.Profile('cpu', ('cpu',), devices_per_chip=None, dollars_per_hour=0.05)
HARDWARE = hardware_lib.Hardware((V5E, CORE))
TPU = {'parameters': 4.02e9, 'device_kind': 'TPU v5 lite', 'devices': 16, 'processes': 4, 'cores': 96}


@pytest.mark.parametrize('n, text', [
    (7, '7'), (4096, '4096'), (12_345, '12.3 k'), (999_960, '1 M'), (1_234_567, '1.23 M'), (4.02e9, '4.02 G'),
    (2.5e13, '25 T'), (0.25, '0.25')])
def test_counts(n, text):
  assert terminal.count(n) == text


@pytest.mark.parametrize('x, text', [(0, '$0.00'), (0.0049, '$0.0049'), (1.5, '$1.50'), (1152.4, '$1,152')])
def test_dollars(x, text):
  assert terminal.dollars(x) == text


@pytest.mark.parametrize('seconds, text', [(0, '0 s'), (59, '59 s'), (90, '1.5 min'), (3600, '1.0 h'), (35820, '10 h'),
                                           (187_200, '52 h')])
def test_durations(seconds, text):
  assert terminal.duration(seconds) == text


def test_sizes_energy_and_carbon():
  assert [terminal.size(x) for x in (483_000, 9e9)] == ['0.483 MB', '9 GB']
  assert [terminal.energy(x) for x in (0, 2.5, 0.0000752)] == ['0 kWh', '2.5 kWh', '0.0752 Wh']
  assert [terminal.carbon(x) for x in (1234.0, 0.05)] == ['1.23e+03 kg CO2e', '50 g CO2e']


def test_an_hour_of_devices():
  assert terminal.dollars_per_hour(TPU, HARDWARE) == (pytest.approx(19.2), '16 x v5e at $1.20 (list, 2025-02)')
  virtual = {'device_kind': 'cpu', 'devices': 8, 'cores': 2}  # of eight devices, two cores are paid for
  assert terminal.dollars_per_hour(virtual, HARDWARE)[0] == pytest.approx(0.1)
  for unknown in (None, hardware_lib.Hardware((V5E, hardware_lib.Profile('cpu', ('cpu',))))):
    assert terminal.dollars_per_hour(virtual, unknown) is None


def test_opening():
  config = knobs.Config(policy=knobs.Policy(checkpoint='checkpoints/Qwen3-4B', dtype='bfloat16'),
                        tasks=knobs.Tasks(mixture=(('gsm8k', 2.0), ('champ', 1.0))))
  text = terminal.opening(config, TPU, train_tasks=7473, test_tasks=500, first_step=20, memory_bytes=9 * 10**9,
                          hardware=HARDWARE)
  assert text.splitlines() == [
      'policy   4.02 G parameters (checkpoints/Qwen3-4B), bfloat16',
      'tasks    gsm8k, champ: 7473 to train on, 500 held out',
      'step     R = 256 rollouts of M = 32 tasks, by knapsack',
      'steps    100, going on at 20; evaluated every 25',
      'devices  16 x TPU v5 lite, 4 processes',
      'memory   at least 9 GB a device, and activations',
      'cost     $19.20 an hour: 16 x v5e at $1.20 (list, 2025-02)']
  other = terminal.opening(config, TPU | {'device_kind': 'axon'}, train_tasks=1, test_tasks=1, hardware=HARDWARE)
  assert other.splitlines()[-1] == "cost     unknown: --hardware has no price of 'axon'"
  assert 'cost' not in terminal.opening(config, TPU, train_tasks=1, test_tasks=1)
  kept = terminal.opening(config, TPU, train_tasks=1, test_tasks=1, programs='gs://b/xla')
  assert kept.splitlines()[-1] == 'compiled  programs are kept in gs://b/xla'


def record(step, mean, right, verified, **more):
  return {'step': step, 'eval/avg@4': mean, 'eval_tasks': {'right': right, 'verified': verified}, **more}


def test_the_change_of_a_score():
  """Tasks rise by .25, .75, 0 and, without verified rollouts, nothing: the mean is 1/3, its standard error .2205."""
  before = record(0, 0.3, [1, 0, 4, 2], [4, 4, 4, 0])
  after = record(5, 0.6, [2, 3, 2, 1], [4, 4, 2, 4])
  found = terminal.change(before, after, 'avg@4')
  assert found.mean == pytest.approx(1 / 3)
  assert found.error == pytest.approx(1.96 * 0.220479, abs=1e-4)
  assert str(found) == '+0.333 [-0.099, +0.765]'
  plain = [{'step': 0, 'eval/avg@4': 0.5}, {'step': 5, 'eval/avg@4': 0.25}]  # of an older version
  assert terminal.change(*plain, 'avg@4') == (-0.25, None)
  assert terminal.change(*(x | {'eval/avg@4_stderr': e} for x, e in zip(plain, (0.03, 0.04))), 'avg@4') == (
      -0.25, pytest.approx(1.959964 * 0.05))
  assert terminal.change(plain[0], plain[1] | {'eval/avg@4': None}, 'avg@4') is None
  assert terminal.change(record(0, None, [0], [0]), after | {'eval_tasks': {'right': [1], 'verified': [1]}},
                         'avg@4') is None


def test_the_interval_of_a_change_holds_the_truth():
  rng, held = np.random.default_rng(0), 0
  for _ in range(200):
    p_I = rng.uniform(0.2, 0.7, 60)
    draw = lambda p_I: record(0, 0.5, rng.binomial(8, p_I).tolist(), [8] * 60)
    found = terminal.change(draw(p_I), draw(p_I + 0.1), 'avg@4')
    held += abs(found.mean - 0.1) <= found.error
  assert 180 <= held <= 198  # of 200; 190 are expected


def test_an_evaluation_is_a_line():
  before = record(0, 0.3, [1, 0, 4, 2], [4, 4, 4, 0])
  after = record(5, 0.6, [2, 3, 2, 1], [4, 4, 2, 4], **{'eval/avg@4_low': 0.5, 'eval/avg@4_high': 0.7})
  assert terminal.evaluation(before, None, 'avg@4') == 'step 0: avg@4 of held-out tasks 0.300'
  assert terminal.evaluation(after, before, 'avg@4') == (
      'step 5: avg@4 of held-out tasks 0.600 [0.500, 0.700], +0.333 [-0.099, +0.765] since step 0')
  assert terminal.evaluation({'step': 2, 'eval/avg@4': None, 'eval/unverified': 1.0}, before, 'avg@4') == (
      'step 2: avg@4 of held-out tasks unknown; 100.0% of rollouts unverified')


def test_closing():
  price = pricing.Price(kwh=pricing.UNKNOWN, dollars=pricing.Figure(0.0049, 'modelled'), kg_co2=pricing.UNKNOWN,
                        chip_hours=pricing.UNKNOWN, device_s=pricing.Figure(7200.0, 'measured'), by_phase={})
  evaluations = [record(0, 0.3, [1, 0, 4, 2], [4, 4, 4, 0]), record(3, 0.4, [1], [1]),
                 record(5, 0.6, [2, 3, 2, 1], [4, 4, 2, 4])]
  assert terminal.closing(evaluations, 'avg@4', steps=5, seconds=120, price=price, page='runs/x/report.html'
                          ).splitlines() == [
      'learnt  avg@4 of held-out tasks 0.300 -> 0.600, +0.333 [-0.099, +0.765], in 5 steps',
      'cost    2.0 min, 2 device-hours (measured), $0.0049 (modelled), energy unknown',
      'report  runs/x/report.html']
  assert terminal.closing(evaluations[:1], 'avg@4', steps=5) == 'learnt  avg@4 of held-out tasks 0.300, in 5 steps'
  assert terminal.closing([], 'avg@4', steps=0, beside='uniform budgets: 0.5') == (
      'learnt  nothing was evaluated, in 0 steps\nbeside  uniform budgets: 0.5')
  assert terminal.closing([], 'avg@4', steps=0) == 'learnt  nothing was evaluated, in 0 steps'
  compile = lambda attempt, **counts: {'attempt': attempt, 'phase': 'compile', 'wall_s': 2.0, **counts}
  entries = [compile(0, compiles=9), {'attempt': 1, 'phase': 'update', 'wall_s': 5.0},
             compile(1, compiles=5, compiles_cached=5), compile(1, compiles=2, compiles_cached=1)]
  last = lambda entries: terminal.closing([], 'avg@4', steps=0, entries=entries).splitlines()[-1]
  assert last(entries) == 'compiled  1 program, and 6 from the cache, in 4 s'
  assert last(entries[:1]) == 'compiled  9 programs, in 2 s' and last(entries[1:2]).startswith('learnt')
