"""Sources of energy, of which this machine may have none: a made powercap tree, and modules that stand in."""

import sys
import types

import pytest

from kr_jax.costs import meters


@pytest.fixture
def powercap(tmp_path, monkeypatch):
  """A function that sets microjoules of zones; and their tree is read."""
  monkeypatch.setattr(meters, '_POWERCAP', str(tmp_path))
  names = {'intel-rapl:0': 'package-0', 'intel-rapl:1': 'package-1', 'intel-rapl:0:0': 'core', 'intel-rapl:0:1': 'dram',
           'intel-rapl:2': 'psys'}

  def write(**zones):
    for zone, name in names.items():
      (tmp_path / zone).mkdir(exist_ok=True)
      values = {'name': name, 'max_energy_range_uj': '9999999', 'energy_uj': str(zones.get(name.replace('-', '_'), 0))}
      for file, text in values.items():
        (tmp_path / zone / file).write_text(f'{text}\n')
    return tmp_path

  return write


class NVMLError(Exception):
  pass


def nvml(monkeypatch, energy, power):
  """A module with two cards: millijoules and milliwatts, or an error where the function returns None."""
  def reading(read):
    def get(handle):
      if read(handle) is None:
        raise NVMLError
      return read(handle)
    return get

  monkeypatch.setitem(sys.modules, 'pynvml', types.SimpleNamespace(
      NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 2, nvmlDeviceGetHandleByIndex=int,
      nvmlDeviceGetTotalEnergyConsumption=reading(energy), nvmlDeviceGetPowerUsage=reading(power)))


def test_packages_and_memory_of_a_cpu(powercap):
  """The package's cores, and the platform that holds all, are not counted twice."""
  powercap(package_0=5_000_000, package_1=1_000_000, core=7, dram=2, psys=9)
  meter = meters.find('cpu')
  assert meter.name == 'rapl' and meter.read() == 0
  powercap(package_0=6_500_000, package_1=1_250_000, core=9_000_000, dram=500_002, psys=9_999_999)
  assert meter.read() == pytest.approx(1.5 + 0.25 + 0.5)
  # Package 0 wraps around after 9999999.
  powercap(package_0=500_000, package_1=1_250_000, dram=500_002)
  assert meter.read() == pytest.approx(2.25 + 4.0)


def test_a_counter_that_wraps_around_by_hand():
  values = iter([7, 9, 2, 2, 1])
  read = meters.wrapping(lambda: next(values), 9)
  assert [read() for _ in range(4)] == [2, 5, 5, 14]


def test_what_cannot_be_read_is_no_meter(powercap, monkeypatch):
  """Root alone may read energy on most kernels; and one that fails later reads as None."""
  monkeypatch.setitem(sys.modules, 'pynvml', None)
  assert meters.find('cpu') is None  # there are no zones
  root = powercap()
  meter = meters.find('cpu')
  (root / 'intel-rapl:1' / 'energy_uj').unlink()
  assert meter.read() is None and meters.find('cpu') is None
  powercap()
  assert meters.find('tpu') is None and meters.find('gpu') is None  # a host's energy is not a card's
  assert meters.find('cpu', codecarbon=True).name == 'rapl'  # codecarbon is not installed


def test_cards_with_a_counter(powercap, monkeypatch):
  millijoules = {0: 1000, 1: 5000}
  nvml(monkeypatch, millijoules.get, lambda _: None)
  assert meters.find('gpu').name == 'nvml' and meters.find('cpu') is None
  powercap(package_0=10)
  meter = meters.find('gpu')
  assert meter.name == 'nvml+rapl' and meter.read() == 0
  millijoules[1] += 2500
  powercap(package_0=1_000_010)
  assert meter.read() == pytest.approx(2.5 + 1)


def test_cards_without_a_counter_have_power(monkeypatch):
  nvml(monkeypatch, lambda _: None, {0: 1000, 1: 2000}.get)
  meter = meters.find('gpu')
  assert meter.name == 'nvml' and 0 <= meter.read() < 3 * 60
  nvml(monkeypatch, lambda _: None, lambda _: None)
  assert meters.find('gpu') is None


def test_power_over_time_by_hand():
  """10 to 20 W in 2 s, then 20 to 0 W in 1 s."""
  seconds, watts = iter([5.0, 7.0, 8.0]), iter([10.0, 20.0, 0.0])
  read = meters.integrated(lambda: next(watts), lambda: next(seconds))
  assert read() == 30 and read() == 40


def test_codecarbon_where_it_is_asked_for(monkeypatch):
  """Its tasks follow one another: 1e-6 kWh each."""
  made, running = [], []

  class OfflineEmissionsTracker:
    def __init__(self, **options):
      made.append(options)

    def start_task(self, name):
      running.append(name)

    def stop_task(self, name):
      assert running == [name]
      return types.SimpleNamespace(energy_consumed=1e-6) if running.pop() else None

  monkeypatch.setitem(sys.modules, 'codecarbon', types.SimpleNamespace(OfflineEmissionsTracker=OfflineEmissionsTracker))
  assert meters.find('cpu', codecarbon=True).read() == 0  # ten seconds have not gone by
  running.clear()
  monkeypatch.setattr(meters, '_CODECARBON_EVERY_S', 0)
  meter = meters.find('cpu', codecarbon=True)
  assert meter.name == 'codecarbon' and not made[0]['save_to_file']
  first = meter.read()
  assert meter.read() - first == pytest.approx(3.6)
  made.clear()
  meters.find('cpu')
  assert meters.find('tpu', codecarbon=True) is None and not made  # it would see the host alone


def test_what_a_tpu_tells(monkeypatch, caplog):
  """Off a TPU libtpu is not loaded; what fails is said once."""
  data = {'duty_cycle_pct': ['50.0', '25'], 'hbm_capacity_usage': ['1e9', '2'], 'new_metric': ['1'],
          'tensorcore_util': []}
  monitoring = types.SimpleNamespace(
      list_supported_metrics=lambda: list(data), get_metric=lambda name: types.SimpleNamespace(data=lambda: data[name]))
  monkeypatch.setitem(sys.modules, 'libtpu', None)
  monkeypatch.setitem(sys.modules, 'libtpu.sdk', None)
  assert meters.tpu_metrics() == {} and meters.tpu_metrics('tpu') == meters.tpu_metrics('tpu') == {}
  assert caplog.text.count('libtpu does not tell how busy TPUs are: ModuleNotFoundError') == 1
  monkeypatch.setitem(sys.modules, 'libtpu', types.SimpleNamespace())
  monkeypatch.setitem(sys.modules, 'libtpu.sdk', types.SimpleNamespace(tpumonitoring=monitoring))
  assert meters.tpu_metrics('cpu') == {}
  assert meters.tpu_metrics('tpu') == {'duty_cycle_pct': [50.0, 25.0], 'hbm_capacity_usage': [1e9, 2.0]}
