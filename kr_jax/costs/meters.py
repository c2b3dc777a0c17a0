"""Energy that a machine has taken, where something measures it; and what a TPU tells of itself.

    NVML        an NVIDIA card's energy counter, or its power over time where it has none (pip install nvidia-ml-py)
    RAPL        a CPU's packages and memory, from /sys/class/powercap; on most kernels root alone may read it
    codecarbon  measures where the two above can, and else estimates from load; only where it is asked for

On a GPU the energy is that of the cards, and of the CPU where RAPL is readable; on a CPU it is RAPL's. No public
counter reads a TPU's power, so a TPU has no meter: a host's RAPL alone would leave out what takes the most. What libtpu
tells is the share of time in which a TPU is busy, and its memory in use (`tpu_metrics`); the ledger has the former.

A meter counts for the whole machine: other work on it counts too.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import glob
import importlib
import logging
import os
import re
import threading
import time
from typing import Any

_POWERCAP = '/sys/class/powercap'
_TPU_METRICS = ('duty_cycle_pct', 'hbm_capacity_usage', 'hbm_capacity_total', 'tensorcore_util')
_JOULES_A_KWH = 3.6e6
_CODECARBON_EVERY_S = 10.0  # codecarbon keeps all its tasks


class Meter:
  """Sums what its sources have counted since it was made. Any thread may read it.

  Args:
    name: of the sources: 'nvml', 'rapl', 'nvml+rapl' or 'codecarbon'.
    sources: functions that return cumulative joules, and raise where they cannot.
  """

  def __init__(self, name: str, sources: list[Callable[[], float]]):
    self.name, self._sources, self._lock = name, sources, threading.Lock()

  def read(self) -> float | None:
    """Joules so far; None where a source cannot be read now. Never raises."""
    with self._lock:
      try:
        return sum(source() for source in self._sources)
      except Exception:  # of libraries that are not installed here; energy is never worth a run
        return None


def find(platform: str | None = None, *, codecarbon: bool = False) -> Meter | None:
  """The best meter of this machine; None where nothing measures what the devices take.

  Args:
    platform: of the devices, as jax calls it; None: of jax's default.
    codecarbon: whether codecarbon is asked first.
  """
  if platform is None:
    import jax  # heavy
    platform = jax.default_backend()
  if platform not in ('cpu', 'gpu', 'cuda'):
    return None
  if codecarbon and (source := _codecarbon()):
    return _working('codecarbon', [source])
  rapl = _rapl()
  if platform == 'cpu':
    return _working('rapl', [rapl]) if rapl else None
  nvml = _nvml()
  if not nvml:
    return None
  return (rapl and _working('nvml+rapl', [nvml, rapl])) or _working('nvml', [nvml])


def _working(name: str, sources: list[Callable[[], float]]) -> Meter | None:
  meter = Meter(name, sources)
  return meter if meter.read() is not None else None


# Sources: each a function of cumulative joules, or None where it cannot be read.


def _nvml() -> Callable[[], float] | None:
  try:
    pynvml = importlib.import_module('pynvml')
    pynvml.nvmlInit()
    cards = [_card(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
  except Exception:  # not installed, no driver, no permission, or no counter of either kind
    return None
  return (lambda: sum(card() for card in cards)) if cards else None


def _card(pynvml: Any, handle: Any) -> Callable[[], float]:
  """Joules of a card. Raises where it tells neither energy nor power."""
  try:
    first = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    return lambda: (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - first) / 1000  # of millijoules
  except pynvml.NVMLError:  # cards before Volta
    return integrated(lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)


def integrated(watts: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> Callable[[], float]:
  """Joules so far, of a power that is read each time: between two times it is their mean."""
  last_s, last_watts, joules = clock(), watts(), 0.0

  def read() -> float:
    nonlocal last_s, last_watts, joules
    now_s, now_watts = clock(), watts()
    joules += (now_s - last_s) * (now_watts + last_watts) / 2
    last_s, last_watts = now_s, now_watts
    return joules

  return read


def _rapl() -> Callable[[], float] | None:
  """Of all packages, and of memory beside them; 'psys' holds both, and cores and uncore are in their package."""
  zones = []
  for path in sorted(glob.glob(os.path.join(_POWERCAP, 'intel-rapl:*'))):
    try:
      name = _text(path, 'name')
      is_package = re.fullmatch(r'intel-rapl:\d+', os.path.basename(path)) and name.startswith('package')
      if is_package or name == 'dram':
        zones.append(wrapping(lambda path=path: int(_text(path, 'energy_uj')), int(_text(path, 'max_energy_range_uj'))))
    except (OSError, ValueError):  # a part of what is there would be no measurement
      return None
  return (lambda: sum(zone() for zone in zones) / 1e6) if zones else None


def _text(*parts: str) -> str:
  with open(os.path.join(*parts)) as file:
    return file.read().strip()


def wrapping(counter: Callable[[], int], largest: int) -> Callable[[], int]:
  """What a counter has counted since now, if it begins at 0 again after `largest`; read at least once a round."""
  last, total = counter(), 0

  def read() -> int:
    nonlocal last, total
    now = counter()
    total += now - last if now >= last else now - last + largest + 1
    last = now
    return total

  return read


def _codecarbon() -> Callable[[], float] | None:
  """Energy between two readings is that of a task of codecarbon, by its public interface."""
  logging.getLogger('codecarbon').setLevel(logging.ERROR)
  try:
    tracker = importlib.import_module('codecarbon').OfflineEmissionsTracker(
        country_iso_code='USA', save_to_file=False, log_level='error', allow_multiple_runs=True)
    tracker.start_task('0')
  except Exception:  # not installed, or it finds nothing to read
    return None
  joules, tasks, began = 0.0, 0, time.monotonic()

  def read() -> float:
    nonlocal joules, tasks, began
    if time.monotonic() - began < _CODECARBON_EVERY_S:
      return joules
    began = time.monotonic()
    joules += tracker.stop_task(str(tasks)).energy_consumed * _JOULES_A_KWH
    tasks += 1
    tracker.start_task(str(tasks))
    return joules

  return read


def tpu_metrics(platform: str | None = None) -> dict[str, list[float]]:
  """What libtpu tells of each chip now: shares of time in percent, memory in bytes; {} off a TPU.

  Args:
    platform: of the devices; None: of jax's default. Off a TPU libtpu is not loaded: it would complain.
  """
  if platform is None:
    import jax  # heavy
    platform = jax.default_backend()
  if platform != 'tpu':
    return {}
  found = {}
  try:
    monitoring = importlib.import_module('libtpu.sdk').tpumonitoring
    for name in set(_TPU_METRICS) & set(monitoring.list_supported_metrics()):
      values = [float(x) for x in monitoring.get_metric(name).data()]
      if values:
        found[name] = values
  except Exception as error:  # of a libtpu that has no such metric, or is too old
    _say(f'libtpu does not tell how busy TPUs are: {type(error).__name__}: {error}')
  return dict(sorted(found.items()))


@functools.cache
def _say(text: str) -> None:
  """Says a text once: the metrics are asked for again and again."""
  logging.getLogger('absl').warning(text)


def tpu_busy(platform: str | None = None) -> float | None:
  """The share of time in which TPUs are busy now, a mean over chips; None off a TPU. platform: as of `tpu_metrics`."""
  found = tpu_metrics(platform).get('duty_cycle_pct')
  return sum(found) / len(found) / 100 if found else None
