"""A run as it stands in its workdir, for reports: what is there, and sentences about what is not.

Records may be missing, cut short or of an older version; then fields are absent, and whoever reads one gets None. Only
a workdir that is none is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

from kr_jax.costs import hardware as hardware_lib
from kr_jax.costs import pricing
from kr_jax.record import goodput as goodput_lib
from kr_jax.record import ledger as ledger_lib
from kr_jax.record import rollouts

AXES = {'rollouts': 'rollouts', 'tokens': 'generated tokens', 'flops': 'executed FLOPs', 'device_s': 'device-seconds',
        'dollars': 'dollars', 'kwh': 'kWh'}  # of cost, by which runs are compared, and what they are called
_LARGEST = 1e30  # sums of such numbers and their squares are finite
_SCORE = re.compile(r'eval/(avg@\d+)')


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """What a workdir holds."""

  workdir: str
  config: dict[str, Any]  # of config.json; empty where it is not known
  steps: list[dict[str, Any]]  # records of metrics.jsonl, one a step, in their order
  evaluations: list[dict[str, Any]]  # the others, one a step
  ledger: ledger_lib.Ledger
  hardware: hardware_lib.Hardware | None
  rollout_steps: list[int]  # of which rollouts were kept
  missing: list[str]  # sentences
  evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)  # evaluation.json of --mode=evaluate

  @property
  def name(self) -> str:
    """The last part of the workdir's path."""
    return pathlib.Path(self.workdir).name or self.workdir

  @property
  def rule(self) -> str | None:
    return self.knob('alloc.rule')

  @property
  def seed(self) -> int | None:
    seed = self.knob('seed')
    return seed if isinstance(seed, int) else None

  @property
  def profile(self) -> hardware_lib.Profile | None:
    """The figures of the devices, where they are known."""
    kinds = [kind for attempt in self.ledger.attempts if isinstance(kind := attempt.get('device_kind'), str)]
    return None if self.hardware is None or not kinds else self.hardware.of_device(kinds[-1])

  @functools.cached_property
  def price(self) -> pricing.Price | None:
    """None where there is no ledger."""
    entries = self.ledger.entries
    return pricing.price(entries, self.ledger.attempts, self.hardware) if entries else None

  @functools.cached_property
  def goodput(self) -> dict[str, Any] | None:
    """As of record.goodput; None where there is no ledger."""
    return goodput_lib.goodput(self.ledger) if self.ledger.entries else None

  @functools.cached_property
  def by_phase(self) -> dict[str, list[dict[str, Any]]]:
    """The ledger's entries of each phase."""
    found = {}
    for entry in self.ledger.entries:
      found.setdefault(entry['phase'], []).append(entry)
    return found

  @property
  def score(self) -> str | None:
    """The name of the held-out success, 'avg@8', as the last evaluation has it; else as the config does."""
    for record in reversed(self.evaluations):
      if names := [found[1] for name in record if (found := _SCORE.fullmatch(name))]:
        return names[0]
    rollouts_a_task = self.knob('evaluate.rollouts')
    return None if rollouts_a_task is None else f'avg@{rollouts_a_task}'

  def knob(self, name: str) -> Any:
    """The value of a knob by its name, 'alloc.rule'; None where it is not known."""
    tree = self.config
    for part in name.split('.'):
      tree = tree.get(part) if isinstance(tree, dict) else None
    return tree

  def success(self, record: dict[str, Any], end: str = '') -> float | None:
    """The held-out success of an evaluation. end: '' the mean, or '_stderr', '_low', '_high'."""
    name = f'eval/{self.score}'
    found, error = number(record, f'{name}{end}'), number(record, f'{name}_stderr')
    if found is None and end in ('_low', '_high') and error is not None and (mean := number(record, name)) is not None:
      return min(max(mean + 1.96 * error * (1 if end == '_high' else -1), 0.0), 1.0)  # records of older versions
    return found


def read(workdir: str, *, hardware: hardware_lib.Hardware | None = None) -> Run:
  """Reads a workdir.

  Args:
    hardware: to price the run by; None: that of the workdir.

  Raises:
    ValueError: the workdir is no directory or cannot be read.
  """
  path, missing = pathlib.Path(workdir), []
  try:
    if not path.is_dir():
      raise ValueError(f'--workdir={workdir} is no directory; name the workdir of a run')
    list(path.iterdir())
  except OSError as error:
    raise ValueError(f'--workdir={workdir} cannot be read: {error}') from error
  config = _config(path, missing)
  steps, evaluations = _metrics(path, missing)
  ledger = _ledger(workdir, steps, missing)
  if hardware is None:
    hardware = _hardware(workdir, missing)
  kept = _rollout_steps(workdir, missing)
  return Run(str(workdir), config, steps, evaluations, ledger, hardware, kept, missing, _evaluation(path, missing))


def number(record: dict[str, Any], name: str) -> float | int | None:
  """A figure of a record; None where it is absent or no `figure`."""
  return figure(record.get(name))


def figure(x: Any) -> float | int | None:
  """A recorded figure; None where it is null, no number, or larger than anything that a run counts."""
  return x if type(x) in (int, float) and -_LARGEST <= x <= _LARGEST else None  # True is no number


def numbers(x: Any) -> list[float | int]:
  """A recorded list of figures; empty where it is none or holds anything else."""
  return x if isinstance(x, list) and all(figure(y) is not None for y in x) else []


def _config(path: pathlib.Path, missing: list[str]) -> dict[str, Any]:
  try:
    config = json.loads((path / 'config.json').read_text())
    if not isinstance(config, dict):
      raise ValueError('it is no object')
    return config
  except (OSError, ValueError, RecursionError) as error:
    missing.append(f'config.json {_why(error)}: rule, seed, model and data are unknown')
  return {}


def _why(error: Exception) -> str:
  return 'is not there' if isinstance(error, FileNotFoundError) else f'cannot be read ({error})'


def _evaluation(path: pathlib.Path, missing: list[str]) -> dict[str, Any]:
  """What --mode=evaluate wrote last; few runs have it."""
  try:
    found = json.loads((path / 'evaluation.json').read_text())
    return found if isinstance(found, dict) else {}
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, RecursionError) as error:
    missing.append(f'evaluation.json {_why(error)}')
    return {}


def _metrics(path: pathlib.Path, missing: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """The records of metrics.jsonl: of each step the last one, of steps and of evaluations."""
  try:
    lines = (path / 'metrics.jsonl').read_bytes().split(b'\n')
  except OSError as error:
    missing.append(f'metrics.jsonl {_why(error)}: nothing is known of steps and evaluations')
    return [], []
  steps, evaluations, unread, lines = {}, {}, 0, [line for line in lines if line.strip()]
  for line in lines:
    try:
      record = json.loads(line, parse_constant=lambda _: None)  # NaN and Infinity are unknown
      step = record['step']
      if not isinstance(step, int):
        raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
      unread += 1
      continue
    if 'reward_mean' in record:
      steps[step] = record
    elif any(_SCORE.fullmatch(name) for name in record):
      evaluations[step] = record
    else:
      unread += 1
  if unread:
    missing.append(f'{unread} of {len(lines)} lines of metrics.jsonl are no records, as after a kill or a full disk, '
                   'and were left out')
  if not steps:
    missing.append('metrics.jsonl holds no step')
  if not evaluations:
    missing.append('metrics.jsonl holds no evaluation: held-out success is unknown')
  if steps and len(steps) < max(steps) + 1:
    missing.append(f'metrics.jsonl holds {len(steps)} of the {max(steps) + 1} steps to the last one')
  old = [name for name, field in (
      ('calibration', 'reliability'), ('the status of training tasks', 'group_right'),
      ('verifier health', 'verification')) if steps and not any(field in record for record in steps.values())]
  if evaluations and not any('eval_tasks' in record for record in evaluations.values()):
    old.append('the status of held-out tasks')
  if old:
    missing.append(f'metrics.jsonl is of an older version: without {", ".join(old)}')
  return [steps[step] for step in sorted(steps)], [evaluations[step] for step in sorted(evaluations)]


def _ledger(workdir: str, steps: list[dict[str, Any]], missing: list[str]) -> ledger_lib.Ledger:
  """The ledger, without lines that cannot be added up."""
  found = ledger_lib.read(workdir)
  is_number = lambda record, *names: all(number(record, name) is not None for name in names)
  attempts = [_attempt(x) for x in found.attempts if is_number(x, 'attempt', 'started', 'first_step')]
  numbers_of = {x['attempt'] for x in attempts}
  entries = [x for x in found.entries if is_number(x, 'attempt', 'step', 'wall_s') and isinstance(x.get('phase'), str)
             and x['attempt'] in numbers_of]
  plain = lambda record: {name: x for name, x in record.items() if name == 'phase' or number(record, name) is not None}
  entries = [plain(record) for record in entries]  # null counters are unknown, as absent ones are
  dropped = len(found.attempts) - len(attempts) + len(found.entries) - len(entries)
  if dropped:
    missing.append(f'{dropped} lines of ledger.jsonl are of no known form and were left out')
  if not entries:
    missing.append('ledger.jsonl is not there or empty, as of runs of older versions: seconds of phases, FLOPs, '
                   'memory, energy, money and bytes sent are unknown')
  else:
    missing += [text.replace(f'{workdir.rstrip("/")}/', '') for text in found.problems]
    first = min(x['first_step'] for x in attempts)
    if first > 0:
      missing.append(f'ledger.jsonl begins with step {first}: what the steps before it cost is unknown')
    last = max(x['step'] for x in entries)
    if steps and steps[-1]['step'] > last:
      missing.append(f'ledger.jsonl ends with step {last}: what the steps after it cost is unknown')
  ends = [x for x in found.ends if is_number(x, 'attempt', 'ended') and isinstance(x.get('reason'), str)]
  return ledger_lib.Ledger(attempts, entries, ends, found.problems)


def _attempt(record: dict[str, Any]) -> dict[str, Any]:
  """The line of an attempt, without fields that are not of their kind."""
  kinds = dict.fromkeys(('commit', 'device_kind', 'platform', 'memory', 'energy', 'hardware', 'command'), str)
  kinds['versions'] = dict
  return {name: x for name, x in record.items() if (
      isinstance(x, kinds[name]) if name in kinds else number(record, name) is not None)}


def _hardware(workdir: str, missing: list[str]) -> hardware_lib.Hardware | None:
  try:
    found = hardware_lib.load(workdir)
  except ValueError as error:
    missing.append(f'hardware.json cannot be read ({error}): energy, money and use of peaks are unknown')
    return None
  if found is None:
    missing.append('hardware.json is not there: energy, money and use of peaks are unknown; --hardware=FILE prices the '
                   'run')
  return found


def _rollout_steps(workdir: str, missing: list[str]) -> list[int]:
  kept = rollouts.steps(workdir)
  if not kept:
    missing.append('rollouts/ holds nothing: there are no completions to show')
  return kept
