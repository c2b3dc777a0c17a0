"""Energy, money and carbon of a run: pure functions of its ledger and of hardware profiles.

    energy    sum over phases [P_idle + (P_max - P_idle) u] t  x  chips  x  PUE / 3.6e6   kWh, t in seconds
    money     chip-hours  x  price of a chip-hour
    carbon    energy  x  grams a kWh of the grid

u is the share of a phase's time in which the devices had work. A busy chip is taken to draw full power: chips that wait
for memory or links draw most of it too (v4: 170 W on the mean of Google's programs, of 90 to 192). Of a CPU, which is
host and device at once, u is 1 but in phases of waiting. So energy that is modelled is an upper bound. The note of the
figure has the lower one, in which u is the share of the peak FLOP/s or bandwidth that a phase reached, where its FLOPs
or bytes are known. Where an attempt measured joules, these are taken, times PUE. A sample's joules go to the phase that
ran, so a short phase without any had less than a sample; a long one was not measured, and is modelled. So are start and
data, which the meter comes after; where nothing is known of the chips they are left out.

All attempts of a run count, and the steps that were repeated after a kill; time between attempts does not. Unknown is
None. Source of the formula: Bai et al. 2023, arXiv 2401.00625. Differs: u is of each phase, not of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kr_jax.costs import hardware as hardware_lib
from kr_jax.costs.hardware import Hardware, Profile

_JOULES_A_KWH = 3.6e6
_METERS = ('nvml', 'rapl', 'nvml+rapl')  # that measure; codecarbon may estimate
_BEFORE = ('start', 'data')  # phases before the meter is found
_WITHIN = 'compile'  # its joules are those of the phase that compiles
_UNREAD_S = 10.0  # a longer phase without joules was not measured


class Figure(NamedTuple):
  value: float | None = None  # None: not known
  provenance: str | None = None  # 'measured' | 'counted' | 'modelled'; None: not known
  note: str = ''


UNKNOWN = Figure()


class Price(NamedTuple):
  """What a run took, over all attempts."""

  kwh: Figure
  dollars: Figure
  kg_co2: Figure
  chip_hours: Figure
  device_s: Figure
  by_phase: dict[str, dict[str, Figure]]  # wall_s, busy_s, device_s, chip_hours, kwh, dollars, mfu, bandwidth_use


class _Entry(NamedTuple):
  """What an entry of a ledger took. None: not known."""

  entry: Mapping[str, Any]  # itself
  phase: str
  wall_s: float
  device_s: float | None
  chip_hours: float | None
  kwh: float | None
  least_kwh: float | None  # by use of peaks
  is_read: bool  # whether its energy is a meter's
  is_measured: bool  # and no estimate
  dollars: float | None
  busy_flops: float | None  # that the chips could have done while they were busy
  busy_bytes: float | None  # that they could have read


def price(entries: Sequence[Mapping[str, Any]], attempts: Sequence[Mapping[str, Any]],
          hardware: Hardware | None) -> Price:
  """Prices a run.

  Args:
    entries, attempts: lines of a ledger (kr_jax/record/ledger.py).
    hardware: None: nothing is known of the chips.
  """
  found, numbers = _priced(entries, attempts, hardware), {entry.get('attempt') for entry in entries}
  held = [attempt for attempt in attempts if attempt.get('attempt') in numbers]  # others have taken nothing yet
  kwh = _total(x.kwh for x in found)
  grams = hardware.site.grams_per_kwh if hardware else None
  by_phase = {phase: _of_phase([x for x in found if x.phase == phase])
              for phase in dict.fromkeys(x.phase for x in found)}
  return Price(
      kwh=_energy(found, kwh, held, hardware), dollars=_money(found, held, hardware),
      kg_co2=UNKNOWN if kwh is None or grams is None else Figure(
          kwh * grams / 1000, 'modelled', f'{grams:g} g a kWh: {_joined(hardware.site.region, hardware.site.date)}'),
      chip_hours=_figure(_total(x.chip_hours for x in found), 'measured'),
      device_s=_figure(_total(x.device_s for x in found), 'measured'), by_phase=by_phase)


def _priced(entries, attempts, hardware) -> list[_Entry]:
  by_number = {attempt.get('attempt'): attempt for attempt in attempts}
  profiles = {number: _profile(attempt, hardware) for number, attempt in by_number.items()}
  return [_entry(entry, by_number.get(entry.get('attempt'), {}), profiles.get(entry.get('attempt')), hardware)
          for entry in entries]


def _profile(attempt: Mapping[str, Any], hardware: Hardware | None) -> Profile | None:
  kind = attempt.get('device_kind')
  return hardware.of_device(kind) if hardware and kind else None


def _entry(entry, attempt, profile: Profile | None, hardware: Hardware | None) -> _Entry:
  wall_s, busy_s = entry['wall_s'], min(entry.get('busy_s') or 0.0, entry['wall_s'])
  of = lambda name: getattr(profile, name) if profile else None
  chips = hardware_lib.chips(attempt, profile) if profile else None
  hours = None if chips is None else chips * wall_s / 3600
  peak = lambda rate, scale: None if None in (chips, of(rate)) else of(rate) * scale * chips * busy_s
  busy_flops, busy_bytes = peak('tflops', 1e12), peak('hbm_gb_per_s', 1e9)
  least_s = _least_s(entry, busy_s, busy_flops, busy_bytes)
  pue, meter, joules = hardware.site.pue if hardware else 1.0, attempt.get('energy'), entry.get('joules')
  power = lambda s: None if None in (chips, of('watts_idle'), of('watts_max'), s) else (
      (of('watts_idle') * wall_s + (of('watts_max') - of('watts_idle')) * s) * chips * pue / _JOULES_A_KWH)
  is_host = profile is not None and profile.devices_per_chip is None
  kwh, least_kwh = power(wall_s * (entry['phase'] != 'wait') if is_host else busy_s), power(least_s)
  is_before = entry['phase'] in _BEFORE and kwh is None
  if joules is None and (wall_s < _UNREAD_S or entry['phase'] == _WITHIN or is_before):
    joules = 0.0
  if is_read := bool(meter) and joules is not None:
    # Of a run on several hosts the first measures its own.
    kwh = least_kwh = joules * max(attempt.get('processes') or 1, 1) * pue / _JOULES_A_KWH
  return _Entry(
      entry, entry['phase'], wall_s, entry.get('device_s'), hours, kwh, least_kwh, is_read,
      is_read and meter in _METERS and (attempt.get('processes') or 1) == 1,
      None if None in (hours, of('dollars_per_hour')) else hours * of('dollars_per_hour'), busy_flops, busy_bytes)


def _least_s(entry, busy_s: float, busy_flops: float | None, busy_bytes: float | None) -> float | None:
  """Seconds at peak FLOP/s, or at peak bandwidth, that do the work of an entry; None where its work is not known."""
  if not busy_s:
    return 0.0
  shares = [entry[name] / most for name, most in (('flops_executed', busy_flops), ('hbm_bytes_read', busy_bytes))
            if entry.get(name) and most]
  return busy_s * min(max(shares), 1.0) if shares else None


def _of_phase(found: Sequence[_Entry]) -> dict[str, Figure]:
  total = lambda name, provenance: _figure(_total(getattr(x, name) for x in found), provenance)
  return {
      'wall_s': total('wall_s', 'measured'),
      'busy_s': Figure(sum(x.entry.get('busy_s') or 0.0 for x in found), 'measured', 'at most'),
      'device_s': total('device_s', 'measured'), 'chip_hours': total('chip_hours', 'measured'),
      'kwh': total('kwh', 'measured' if all(x.is_measured for x in found) else 'modelled'),
      'dollars': total('dollars', 'modelled'), 'mfu': _use(found, 'flops_useful', 'busy_flops'),
      'bandwidth_use': _use(found, 'hbm_bytes_read', 'busy_bytes')}


def _use(found: Sequence[_Entry], counter: str, most: str) -> Figure:
  """Share of what the chips could have done while they were busy, in the entries that count it."""
  counted = [(x.entry[counter], getattr(x, most)) for x in found if x.entry.get(counter) is not None]
  could = _total(y for _, y in counted)
  return Figure(sum(x for x, _ in counted) / could, 'counted') if could else UNKNOWN


def _total(numbers: Iterable[float | None]) -> float | None:
  """Their sum; None where one is not known, or there is none."""
  numbers = list(numbers)
  return None if not numbers or None in numbers else sum(numbers)


def _figure(value: float | None, provenance: str) -> Figure:
  return UNKNOWN if value is None else Figure(value, provenance)


def _joined(*parts: str | None) -> str:
  return ', '.join(filter(None, parts))


def _used(attempts, hardware: Hardware | None) -> list[Profile]:
  """The profiles of the attempts, each once."""
  return [profile for profile in dict.fromkeys(_profile(attempt, hardware) for attempt in attempts) if profile]


def _energy(found: Sequence[_Entry], kwh: float | None, attempts, hardware: Hardware | None) -> Figure:
  if kwh is None:
    return Figure(note='power of the chips is not known' if found else '')
  measured = sum(x.kwh for x in found if x.is_measured)
  notes = [f'PUE {hardware.site.pue:g}' if hardware else 'without PUE']
  meters = _joined(*dict.fromkeys(attempt.get('energy') for attempt in attempts))
  if meters:
    notes.append(f'read by {meters}')
  if all(x.is_measured for x in found):
    return Figure(kwh, 'measured', _joined(*notes))
  if measured:
    notes.append(f'{measured / kwh:.0%} of it measured')
  if any(attempt.get('energy') and (attempt.get('processes') or 1) > 1 for attempt in attempts):
    notes.append('measured on one host, for all')
  modelled = {x.entry.get('attempt') for x in found if not x.is_read}
  for profile in _used([attempt for attempt in attempts if attempt.get('attempt') in modelled], hardware):
    notes.append(f'{profile.name} {profile.watts_idle:g}-{profile.watts_max:g} W {profile.power_source or ""}'.strip())
  least = _total(x.least_kwh for x in found)
  if least is not None and least < kwh:
    notes.append(f'at least {least:.3g} by use of peak FLOPs')
  return Figure(kwh, 'modelled', _joined(*notes))


def _money(found: Sequence[_Entry], attempts, hardware: Hardware | None) -> Figure:
  dollars = _total(x.dollars for x in found)
  if dollars is None:
    return Figure(note='the price of a chip-hour is not known' if found else '')
  return Figure(dollars, 'modelled', _joined(*(
      f'{x.name} ${x.dollars_per_hour:g} a chip-hour, {_joined(x.price_date, x.price_source)}'.rstrip(', ')
      for x in _used(attempts, hardware))))


def cumulative(entries: Sequence[Mapping[str, Any]], attempts: Sequence[Mapping[str, Any]],
               hardware: Hardware | None) -> list[dict[str, float | None]]:
  """Running sums at the end of each step, over all attempts: what was spent until the step was done for good.

  Steps that were repeated count twice. An evaluation that is recorded at step s was paid with the sums of step s - 1,
  but for its own entry, which is of step s.

  Returns rows {step, rollouts, tokens, flops, device_s, dollars, kwh}, by rising step. Rollouts and generated tokens
  are those that are trained on; executed FLOPs, time, money and energy are of evaluations too. A sum is None where one
  of its terms is not known; tokens, flops and rollouts are None where no entry counts them.
  """
  names = {'rollouts': 'rollouts', 'tokens': 'tokens_generated', 'flops': 'flops_executed'}
  counted = {name: any(counter in entry for entry in entries) for name, counter in names.items()}
  sums = {name: 0 if counted[name] else None for name in names} | {'device_s': 0.0, 'dollars': 0.0, 'kwh': 0.0}
  rows: dict[int, dict[str, float | None]] = {}
  attempt = None
  for x in _priced(entries, attempts, hardware):
    entry = x.entry
    if entry.get('attempt') != attempt:  # it repeats the steps from its first on
      attempt = entry.get('attempt')
      rows = {step: row for step, row in rows.items() if step < entry['step']}
    of_evaluation = entry['phase'] == 'evaluate'  # its rollouts and tokens are not trained on
    for name, counter in names.items():
      if counted[name] and not (of_evaluation and name != 'flops'):
        sums[name] += entry.get(counter, 0)
    for name in ('device_s', 'dollars', 'kwh'):
      more = getattr(x, name)
      sums[name] = None if None in (sums[name], more) else sums[name] + more
    rows[entry['step']] = {'step': entry['step'], **sums}
  return [rows[step] for step in sorted(rows)]
