"""Profiles of chips: read, checked, kept, and found by device and by slice."""

import json

from absl import flags
from ml_collections import config_flags
import pytest

from configs import hardware as hardware_config
from kr_jax.costs import hardware

ALL = hardware.read(hardware_config.get_config())


def one(**figures):
  return hardware.read({'site': {'pue': 1.1}, 'profiles': {'x': figures}})


@pytest.mark.parametrize('kind, name', [
    ('TPU v4', 'v4'), ('TPU v5 lite', 'v5e'), ('TPU v5e', 'v5e'), ('TPU v5', 'v5p'), ('TPU v5p', 'v5p'),
    ('TPU v6 lite', 'v6e'), ('TPU v6e', 'v6e'), ('TPU7x', 'tpu7x'), ('TPU v7x', 'tpu7x'),
    ('NVIDIA H100 80GB HBM3', 'h100'),
    ('NVIDIA H200', 'h200'), ('NVIDIA A100-SXM4-80GB', 'a100'), ('Tesla T4', 't4'), ('cpu', 'cpu')])
def test_the_profile_of_a_device(kind, name):
  """By the longest beginning, in any order of the profiles."""
  for profiles in (ALL.profiles, ALL.profiles[::-1]):
    assert hardware.Hardware(profiles).of_device(kind).name == name


def test_a_device_without_a_profile_has_none_and_one_profile_is_that_of_every_device():
  assert ALL.of_device('Apple M9') is None
  alone = hardware.read(hardware_config.get_config('v5e,us-west4'))
  assert alone.of_device('cpu').name == 'v5e' and alone.site.grams_per_kwh == 357
  with pytest.raises(ValueError, match="'v5f' is neither a profile, of .*'v5e'.* nor a region, of .*'us-west4'"):
    hardware_config.get_config('v5f')


@pytest.mark.parametrize('topology, flops, gib', [
    ('v4:2x2x1', 137.5e12, 15.25), ('v5e:4x4', 197e12, 15.75), ('v5p:2x2x1', 459e12, 95.74),
    ('v6e:8x8', 918e12, 31.25), ('v5e', 197e12, 15.75), ('tpu7x:2x2x1', 1153.5e12, 94.75)])
def test_the_device_of_a_topology(topology, flops, gib):
  """Compiled for, v4 and TPU7x have two devices a chip; the memory is the TPU compiler's own limit."""
  device = hardware.device(ALL.of_topology(topology))
  assert device.name == topology.partition(':')[0] and device.flops == flops
  assert device.hbm_bytes == int(gib * 2 ** 30)
  assert device.flops > 100 * device.hbm_bytes_per_s > 100 * device.ici_bytes_per_s


@pytest.mark.parametrize('topology', ['v3:2x2', 'V5E:2x2', ''])
def test_a_chip_without_figures_is_an_error(topology):
  with pytest.raises(ValueError) as e:
    ALL.of_topology(topology)
  assert repr(topology) in str(e.value) and repr(topology.partition(':')[0]) in str(e.value)
  assert all(repr(profile.name) in str(e.value) for profile in ALL.profiles)
  with pytest.raises(ValueError, match="profile 'h100' has no hbm_usable_gib; set --hardware.profiles.h100.hbm_us"):
    hardware.device(ALL.of_topology('h100'))


def test_chips_of_an_attempt():
  """Cores of a CPU, whose devices may be virtual; of TPU7x half of the devices."""
  attempt = {'devices': 8, 'cores': 2}
  count = lambda name, **attempt: hardware.chips(attempt, ALL.of_topology(name))
  assert [count(name, **attempt) for name in ('cpu', 'v5e', 'v4', 'tpu7x')] == [2, 8, 8, 4]
  assert count('cpu', devices=8) is None and count('v5e') is None


def test_shipped_figures_have_sources():
  assert {profile.name for profile in ALL.profiles} == {
      'v4', 'v5e', 'v5p', 'v6e', 'tpu7x', 'h100', 'h200', 'a100', 't4', 'cpu'}
  for profile in ALL.profiles:
    assert (profile.dollars_per_hour is None) == (profile.price_date is None) == (profile.price_source is None)
    assert (profile.watts_max is None) == (profile.power_source is None)
  assert (ALL.of_topology('v5e').dollars_per_hour, ALL.site.grams_per_kwh, ALL.site.pue) == (1.2, 413, 1.1)
  v4 = ALL.of_topology('v4')
  assert (v4.watts_idle, v4.watts_max, v4.power_source, v4.dollars_per_hour) == (90, 192, 'published', 3.22)


@pytest.mark.parametrize('figures, message', [
    ({'dollars_per_hour': -1}, 'hardware.profiles.x.dollars_per_hour=-1 must be at least 0'),
    ({'tflop': 3}, "there is no hardware.profiles.x.tflop; did you mean 'tflops'"),
    ({'tflops': 0}, 'tflops=0 must be above 0, or None where it is unknown'),
    ({'tflops': float('inf')}, 'tflops=inf must be a finite number; None'),
    ({'watts_idle': 5, 'watts_max': 2}, 'watts_idle=5 must be at most watts_max=2'),
    ({'devices_per_chip': 1.5}, 'devices_per_chip=1.5 must be a whole number'),
    ({'compiled_devices_per_chip': None}, 'compiled_devices_per_chip=None must be known'),
    ({'device_kinds': 'cpu'}, "device_kinds='cpu' must be a tuple of texts"),
    ({'device_kinds': ['TPU v4']}, 'must be a tuple of texts in lower case'),
    ({'price_date': 2025}, 'price_date=2025 must be a text'),
    ({'power_source': 'guess'}, "power_source='guess' must be 'published', 'inferred' or None")])
def test_a_wrong_figure_is_named(figures, message):
  with pytest.raises(ValueError) as e:
    one(**figures)
  assert message in str(e.value)


def test_all_that_is_wrong_is_said_at_once():
  with pytest.raises(ValueError, match="no hardware.sites; did you mean 'site'.*hardware.site.pue=0.5 must be at "
                                       'least 1.*holds no profile'):
    hardware.read({'sites': {}, 'site': {'pue': 0.5}})


def test_profiles_are_kept_as_they_are(tmp_path):
  assert hardware.load(str(tmp_path)) is None
  for kept in (ALL, one(tflops=3)):
    hardware.save(str(tmp_path / 'run'), kept)
    assert hardware.load(str(tmp_path / 'run')) == kept
  assert json.loads((tmp_path / 'run' / 'hardware.json').read_text()) == hardware.as_dict(kept)
  for text in ('{"profiles": ', '[]', '[' * 100_000, '{"profiles": {"x": 3}}', '{"profiles": {"x": {"tflops": "many"}}}'):
    (tmp_path / 'hardware.json').write_text(text)
    with pytest.raises(ValueError, match='hardware.json cannot be read'):
      hardware.load(str(tmp_path))


@pytest.mark.filterwarnings('ignore:the load_module')  # of ml_collections
def test_flags_override_a_figure():
  """Also one that is not known."""
  values = flags.FlagValues()
  argv = ['main', '--hardware.profiles.v5e.dollars_per_hour=1', '--hardware.profiles.tpu7x.watts_max=700']
  flag = config_flags.DEFINE_config_file('hardware', hardware_config.__file__, flag_values=values, sys_argv=argv)
  values(argv)
  found = hardware.read(flag.value)
  assert found.of_topology('v5e').dollars_per_hour == 1.0 and found.of_topology('tpu7x').watts_max == 700.0


def test_what_is_no_section_is_an_error():
  with pytest.raises(ValueError, match='hardware.site=3 must be a section; hardware.profiles=.* must be a section; '):
    hardware.read({'site': 3, 'profiles': ['v5e']})
  with pytest.raises(ValueError, match='hardware.profiles.x=None must be a section'):
    hardware.read({'profiles': {'x': None}})
