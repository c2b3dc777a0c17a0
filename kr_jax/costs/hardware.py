"""What a chip does in a second, what power it draws and what it costs: profiles, each figure with a date or a source.

The figures are a config's (configs/hardware.py), not this module's. A figure that is None is not known: what depends on
it is None too, and never 0. A run keeps the profiles that it was priced by, in hardware.json.

A chip is what is rented and powered. JAX's devices are its cores on some chips: TPU7x has two. Compiled for without a
TPU, v4 has two as well. Of a CPU a chip is a core, however many devices JAX makes of the host.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
from typing import Any, NamedTuple

from kr_jax import checks
from kr_jax import files
from kr_jax import sections

_FILE = 'hardware.json'
_GIB = 2 ** 30


@dataclasses.dataclass(frozen=True)
class Profile:
  """Figures of a chip. None: not known."""

  name: str
  device_kinds: tuple[str, ...] = ()  # beginnings of jax's device_kind, in lower case
  devices_per_chip: int | None = 1  # as a run counts them; None: a chip is a core of the host
  compiled_devices_per_chip: int = 1  # as jax counts those of a slice that it compiles for
  tflops: float | None = None  # a second at the most, bfloat16
  hbm_gb: float | None = None
  hbm_usable_gib: float | None = None  # of programs: the TPU compiler's own limit
  hbm_gb_per_s: float | None = None
  ici_gb_per_s: float | None = None  # sent, over all links together
  watts_idle: float | None = None
  watts_max: float | None = None
  power_source: str | None = None  # 'published' | 'inferred'
  dollars_per_hour: float | None = None
  price_date: str | None = None
  price_source: str | None = None


@dataclasses.dataclass(frozen=True)
class Site:
  """Where chips stand."""

  pue: float = 1.0  # power of the building over that of its machines
  grams_per_kwh: float | None = None  # CO2 equivalents of the grid
  region: str | None = None
  date: str | None = None  # of the grid's figure


class Device(NamedTuple):
  """A device as the TPU compiler counts it."""

  name: str
  flops: float  # a second, bfloat16
  hbm_bytes: int  # that programs may use
  hbm_bytes_per_s: float
  ici_bytes_per_s: float  # that it sends, over all its links together
  per_chip: int  # devices


@dataclasses.dataclass(frozen=True)
class Hardware:
  profiles: tuple[Profile, ...]
  site: Site = Site()

  def of_device(self, device_kind: str) -> Profile | None:
    """The profile whose kind is the longest beginning of this one; a single profile is that of every device."""
    if len(self.profiles) == 1:
      return self.profiles[0]
    known = [(len(kind), profile) for profile in self.profiles for kind in profile.device_kinds
             if device_kind.lower().startswith(kind)]
    return max(known, key=lambda found: found[0])[1] if known else None

  def of_topology(self, topology: str) -> Profile:
    """Of a slice, 'v5e:4x4'. Raises ValueError where there is none."""
    name = topology.partition(':')[0]
    for profile in self.profiles:
      if profile.name == name:
        return profile
    raise ValueError(f'there are no figures of the chip {name!r} of {topology!r}; there are of '
                     f'{tuple(profile.name for profile in self.profiles)}')


def device(profile: Profile) -> Device:
  """A device of a slice that is compiled for. Raises ValueError for a profile that lacks a figure of it."""
  needed = ('tflops', 'hbm_usable_gib', 'hbm_gb_per_s', 'ici_gb_per_s')
  if missing := [name for name in needed if getattr(profile, name) is None]:
    raise ValueError(f'the hardware profile {profile.name!r} has no {", ".join(missing)}; set '
                     f'--hardware.profiles.{profile.name}.{missing[0]}')
  n = profile.compiled_devices_per_chip
  return Device(profile.name, profile.tflops * 1e12 / n, int(profile.hbm_usable_gib / n * _GIB),
                profile.hbm_gb_per_s * 1e9 / n, profile.ici_gb_per_s * 1e9 / n, n)


def chips(attempt: Mapping[str, Any], profile: Profile) -> float | None:
  """How many chips an attempt of a ledger holds; None where its line does not tell.

  Of a CPU these are the cores of the first process's host; several processes are taken to share it.
  """
  if profile.devices_per_chip is None:
    return attempt.get('cores')
  devices = attempt.get('devices')
  return devices and devices / profile.devices_per_chip


# Trees and files.


def read(tree: Mapping[str, Any]) -> Hardware:
  """Of configs/hardware.py's tree {'site': {...}, 'profiles': {name: {...}}}.

  Raises ValueError that names every field that is unknown or out of its bounds.
  """
  wrong = []
  for name in tree:
    if name not in ('site', 'profiles'):
      wrong.append(f'there is no hardware.{name}{sections.nearest(name, ("site", "profiles"))}')

  def fields_of(x, where):
    if hasattr(x, 'items'):
      return dict(x.items())
    wrong.append(f'{where}={x!r} must be a section')
    return {}

  site = _section(Site, fields_of(tree.get('site', {}), 'hardware.site'), 'hardware.site', wrong)
  profiles = tuple(
      _section(Profile, fields_of(figures, f'hardware.profiles.{name}') | {'name': str(name)},
               f'hardware.profiles.{name}', wrong)
      for name, figures in fields_of(tree.get('profiles', {}), 'hardware.profiles').items())
  if not profiles:
    wrong.append('hardware.profiles holds no profile')
  if wrong:
    raise ValueError('; '.join(wrong))
  return Hardware(profiles, site)


def _section(cls: type, tree: Mapping[str, Any], where: str, wrong: list[str]) -> Any:
  """A Profile or Site of a tree; what is wrong with the tree is added to `wrong`."""
  fields = {field.name: field for field in dataclasses.fields(cls)}
  values = {}
  for name, value in tree.items():
    if name not in fields:
      wrong.append(f'there is no {where}.{name}{sections.nearest(name, fields)}')
      continue
    if error := _wrong(name, value, fields[name].type):
      wrong.append(f'{where}.{name}={value!r} {error}')
      continue
    is_text = fields[name].type.startswith('str')
    values[name] = tuple(value) if name == 'device_kinds' else value if value is None or is_text else (
        int(value) if fields[name].type.startswith('int') else float(value))
  low, high = (values.get(f'watts_{name}') for name in ('idle', 'max'))
  if low is not None and high is not None and low > high:
    wrong.append(f'{where}.watts_idle={low:g} must be at most watts_max={high:g}')
  return cls(**({'name': ''} if cls is Profile else {}) | values)


_LEAST = {'pue': 1.0, 'devices_per_chip': 1, 'compiled_devices_per_chip': 1}
_MAY_BE_ZERO = ('dollars_per_hour', 'watts_idle', 'grams_per_kwh')


def _wrong(name: str, value: Any, kind: str) -> str | None:
  """What is wrong with the value of a field; None where nothing is."""
  if value is None:
    return None if 'None' in kind else 'must be known'
  if name == 'device_kinds':
    is_texts = isinstance(value, (tuple, list)) and all(isinstance(x, str) and x and x == x.lower() for x in value)
    return None if is_texts else 'must be a tuple of texts in lower case'
  if name == 'power_source':
    return None if value in ('published', 'inferred') else "must be 'published', 'inferred' or None"
  if kind.startswith('str'):
    return None if isinstance(value, str) else 'must be a text'
  is_number = checks.is_finite(value)
  if not is_number or kind.startswith('int') and value != int(value):
    return 'must be a whole number' if kind.startswith('int') else 'must be a finite number; None where it is unknown'
  if name in _LEAST:
    return None if value >= _LEAST[name] else f'must be at least {_LEAST[name]:g}'
  if name in _MAY_BE_ZERO:
    return None if value >= 0 else 'must be at least 0'
  return None if value > 0 else 'must be above 0, or None where it is unknown'


def as_dict(hardware: Hardware) -> dict[str, Any]:
  """The tree that `read` takes: plain values."""
  profiles = {}
  for profile in hardware.profiles:
    figures = dataclasses.asdict(profile)
    profiles[figures.pop('name')] = figures | {'device_kinds': list(profile.device_kinds)}
  return {'site': dataclasses.asdict(hardware.site), 'profiles': profiles}


def save(workdir: str, hardware: Hardware) -> None:
  """Writes hardware.json, in the place of one that is there."""
  files.write(files.join(workdir, _FILE), json.dumps(as_dict(hardware), indent=1) + '\n')


def load(workdir: str) -> Hardware | None:
  """Of hardware.json; None where there is none. Raises ValueError where it cannot be read."""
  path = files.join(workdir, _FILE)
  try:
    tree = json.loads(files.read(path))
    if not isinstance(tree, dict):
      raise ValueError('it holds no object')
    return read(tree)
  except FileNotFoundError:
    return None
  except (ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
    raise ValueError(f'{path} cannot be read: {error}') from error
