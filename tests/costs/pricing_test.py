"""Energy, money and carbon, by hand; pure, over all attempts; unknown stays unknown."""

import copy

import pytest

from kr_jax.costs import hardware
from kr_jax.costs import pricing

# A chip of 100 to 300 W at 3.6 dollars an hour, of which an attempt holds four; and cores of 1 to 5 W.
HARDWARE = hardware.read({
    'site': {'pue': 1.2, 'grams_per_kwh': 500.0, 'region': 'here', 'date': '2024'},
    'profiles': {
        'x': {'device_kinds': ('chip x',), 'devices_per_chip': 2, 'tflops': 10.0, 'hbm_gb_per_s': 100.0,
              'watts_idle': 100.0, 'watts_max': 300.0, 'power_source': 'inferred', 'dollars_per_hour': 3.6,
              'price_date': '2025-02', 'price_source': 'a list'},
        'cpu': {'device_kinds': ('cpu',), 'devices_per_chip': None, 'watts_idle': 1.0, 'watts_max': 5.0}}})


def attempt(n=0, **more):
  return {'attempt': n, 'started': 0.0, 'first_step': 0, 'device_kind': 'Chip X mark 2', 'devices': 8, 'cores': 2,
          'processes': 1, 'platform': 'tpu', 'energy': None, 'parameters': 1000, **more}


def entry(step, phase, wall_s, busy_s=0.0, n=0, **more):
  return {'attempt': n, 'step': step, 'phase': phase, 'wall_s': wall_s, 'device_s': 8 * wall_s, 'busy_s': busy_s,
          'peak_bytes': None, 'joules': None, **more}


ENTRIES = [
    entry(0, 'start', 10.0),
    entry(0, 'sample', 20.0, 20.0, rollouts=4, tokens_generated=40, flops_executed=8 * 10 ** 13),
    entry(0, 'update', 10.0, 5.0, flops_useful=5 * 10 ** 13, flops_executed=10 ** 14)]


def test_a_run_by_hand():
  """Four chips: 40 s idle power, 25 s of which at full power; the update could do 4 x 10 TFLOP/s for 5 s."""
  found = pricing.price(ENTRIES, [attempt()], HARDWARE)
  kwh = (40 * 100 + 25 * 200) * 4 * 1.2 / 3.6e6
  assert found.kwh.value == pytest.approx(kwh) and found.kwh.provenance == 'modelled'
  # Sampling did a tenth of its FLOPs in 20 s: 2 s at the peak, the update half of them: 2.5 s.
  assert f'at least {(40 * 100 + 4.5 * 200) * 4 * 1.2 / 3.6e6:.3g} by use of peak' in found.kwh.note
  assert 'x 100-300 W inferred' in found.kwh.note and 'PUE 1.2' in found.kwh.note
  assert found.kg_co2.value == pytest.approx(kwh / 2) and 'here, 2024' in found.kg_co2.note
  assert found.dollars.value == pytest.approx(4 * 40 / 3600 * 3.6) and '2025-02' in found.dollars.note
  assert (found.device_s.value, found.chip_hours.value) == (320, pytest.approx(160 / 3600))
  update = {name: x.value for name, x in found.by_phase['update'].items()}
  assert update == {'wall_s': 10, 'busy_s': 5, 'device_s': 80, 'chip_hours': pytest.approx(40 / 3600),
                    'kwh': pytest.approx((10 * 100 + 5 * 200) * 4 * 1.2 / 3.6e6), 'dollars': pytest.approx(0.04),
                    'mfu': 0.25, 'bandwidth_use': None}
  assert found.by_phase['update']['mfu'].provenance == 'counted'


def test_bandwidth_where_bytes_are_counted():
  """Four chips read 400 GB/s: 2000 of 8000 GB in 20 s."""
  entries = [entry(0, 'sample', 25.0, 20.0, hbm_bytes_read=2 * 10 ** 12), entry(1, 'sample', 5.0, 5.0)]
  use = lambda entries, name: pricing.price(entries, [attempt()], HARDWARE).by_phase['sample'][name]
  assert use(entries, 'bandwidth_use').value == pytest.approx(0.25)
  assert use(entries[1:], 'bandwidth_use') == use(entries, 'mfu') == pricing.UNKNOWN


def test_pricing_is_pure_and_pricing_twice_gives_the_same():
  entries, attempts = copy.deepcopy(ENTRIES), [attempt()]
  first = pricing.price(entries, attempts, HARDWARE)
  assert pricing.price(entries, attempts, HARDWARE) == first
  assert pricing.cumulative(entries, attempts, HARDWARE) == pricing.cumulative(entries, attempts, HARDWARE)
  assert entries == ENTRIES and attempts == [attempt()]
  # What is written and read again prices the same; phases add up to the run.
  again = hardware.read(hardware.as_dict(HARDWARE))
  assert pricing.price(entries, attempts, again) == first
  for name in ('kwh', 'dollars', 'device_s', 'chip_hours'):
    assert sum(of[name].value for of in first.by_phase.values()) == pytest.approx(getattr(first, name).value)


def test_joules_that_were_measured_are_taken():
  """A phase without a sample has none; of several hosts one was read; an estimate is no measurement."""
  entries = [entry(0, 'sample', 20.0, 20.0, joules=3e6), entry(0, 'verify', 1.0)]
  kwh = lambda **more: pricing.price(entries, [attempt(**more)], HARDWARE).kwh
  assert kwh(energy='nvml')[:2] == (pytest.approx(1.0), 'measured') and 'read by nvml' in kwh(energy='nvml').note
  assert kwh(energy='nvml', processes=2)[:2] == (pytest.approx(2.0), 'modelled')
  assert 'on one host, for all' in kwh(energy='nvml', processes=2).note
  assert kwh(energy='codecarbon')[:2] == (pytest.approx(1.0), 'modelled')
  assert kwh()[1] == 'modelled' and kwh().value == pytest.approx((21 * 100 + 20 * 200) * 4 * 1.2 / 3.6e6)
  # Without a profile measured energy is still known.
  assert pricing.price(entries, [attempt(energy='rapl')], None).kwh.value == pytest.approx(3e6 / 3.6e6)
  # Of two attempts one measured.
  mixed = pricing.price([*entries, entry(1, 'update', 10.0, 10.0, n=1)], [attempt(energy='nvml'), attempt(1)], HARDWARE)
  more = 10 * 300 * 4 * 1.2 / 3.6e6
  assert mixed.kwh[:2] == (pytest.approx(1 + more), 'modelled')
  assert f'{1 / (1 + more):.0%} of it measured' in mixed.kwh.note


def test_a_long_phase_without_joules_was_not_measured():
  """It is modelled; where nothing is known of the chips it is unknown, but for what comes before the meter."""
  entries = [entry(0, 'start', 12.0), entry(0, 'sample', 20.0, 20.0, joules=3e6), entry(0, 'compile', 50.0)]
  found = pricing.price(entries, [attempt(energy='nvml')], HARDWARE).kwh
  start = 12 * 100 * 4 * 1.2 / 3.6e6
  assert found[:2] == (pytest.approx(1 + start), 'modelled') and f'{1 / (1 + start):.0%} of it measured' in found.note
  assert 'x 100-300 W' in found.note
  assert pricing.price(entries, [attempt(energy='nvml')], None).kwh[:2] == (pytest.approx(3e6 / 3.6e6), 'measured')
  dead = [*entries, entry(1, 'sample', 20.0, 20.0)]
  assert pricing.price(dead, [attempt(energy='nvml')], None).kwh.value is None
  assert pricing.price(dead, [attempt(energy='nvml')], HARDWARE).kwh.value == pytest.approx(
      1 + start + 20 * 300 * 4 * 1.2 / 3.6e6)


def test_an_attempt_that_has_just_begun_costs_nothing():
  """Of its chips neither price nor power is known."""
  found = pricing.price([entry(0, 'sample', 1.0)], [attempt(), attempt(1, device_kind='chip y')], hardware.read(
      hardware.as_dict(HARDWARE) | {'profiles': hardware.as_dict(HARDWARE)['profiles'] | {
          'y': {'device_kinds': ['chip y']}}}))
  assert found.dollars.value == pytest.approx(4 / 3600 * 3.6) and 'y' not in found.dollars.note.replace('hour', '')
  assert 'x 100-300 W' in found.kwh.note


@pytest.mark.parametrize('attempts, known', [
    ([attempt(device_kind='Chip Y')], None), ([attempt()], None), ([attempt(device_kind='cpu', cores=None)], HARDWARE),
    ([attempt(device_kind='Chip Y')], HARDWARE), ([], HARDWARE)], ids=str)
def test_unknown_is_none(attempts, known):
  found = pricing.price(ENTRIES, attempts, known)
  assert found.kwh.value is found.dollars.value is found.kg_co2.value is found.chip_hours.value is None
  assert found.kwh.provenance is None and 'not known' in found.kwh.note and 'not known' in found.dollars.note
  assert found.device_s == pricing.Figure(320.0, 'measured')
  assert found.by_phase['update']['mfu'] == pricing.UNKNOWN
  last = pricing.cumulative(ENTRIES, attempts, known)[-1]
  assert (last['dollars'], last['kwh'], last['device_s'], last['rollouts']) == (None, None, 320, 4)


def test_cores_of_a_cpu_are_its_chips():
  """Two cores, of which jax makes eight devices, and which work but for waiting; no price is known of them."""
  found = pricing.price([*ENTRIES, entry(1, 'wait', 5.0)], [attempt(device_kind='cpu')], HARDWARE)
  assert found.kwh.value == pytest.approx((40 * 5 + 5 * 1) * 2 * 1.2 / 3.6e6)
  assert found.chip_hours.value == pytest.approx(90 / 3600) and found.dollars.value is None
  assert pricing.price([], [], HARDWARE).kwh == pricing.UNKNOWN


def test_sums_by_step_over_attempts():
  """Attempt 0 does steps 0 to 2 and is killed; attempt 1 goes on with 1: what is repeated counts twice."""
  steps = lambda n, *of: [entry(step, 'sample', 10.0, 10.0, n=n, rollouts=4, tokens_generated=5, flops_executed=6)
                          for step in of]
  entries = [*steps(0, 0, 1, 2), entry(1, 'evaluate', 5.0, n=1, rollouts=9, tokens_generated=9, flops_executed=1),
             *steps(1, 1, 2)]
  attempts = [attempt(), attempt(1, first_step=1)]
  rows = pricing.cumulative(entries, attempts, HARDWARE)
  assert [row['step'] for row in rows] == [0, 1, 2]
  assert [row['rollouts'] for row in rows] == [4, 16, 20] and [row['tokens'] for row in rows] == [5, 20, 25]
  assert [row['flops'] for row in rows] == [6, 25, 31] and [row['device_s'] for row in rows] == [80, 360, 440]
  assert [row['dollars'] for row in rows] == pytest.approx([4 * s / 3600 * 3.6 for s in (10, 45, 55)])
  assert rows[-1]['kwh'] == pytest.approx(pricing.price(entries, attempts, HARDWARE).kwh.value)
  # Killed before step 2 was repeated: step 2 is not done.
  rows = pricing.cumulative(entries[:5], attempts, HARDWARE)
  assert [(row['step'], row['rollouts']) for row in rows] == [(0, 4), (1, 16)]
  # An entry that counts nothing leaves the sums unknown where none counts.
  assert pricing.cumulative([entry(0, 'start', 1.0)], attempts, HARDWARE)[0]['tokens'] is None
  assert pricing.cumulative([], [], HARDWARE) == []
