"""What a run says at its start, after an evaluation and at its end. Texts alone; kr_jax/progress.py shows them.

Costs are of a hardware profile, which is an assumption: each figure says whether it is measured, counted or modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import math
import statistics
from typing import Any, NamedTuple

from kr_jax import knobs
from kr_jax.costs import hardware as hardware_lib
from kr_jax.costs import pricing

_Z = 1.959964  # of a two-sided 95 % interval


def table(rows: Sequence[tuple[str, str]]) -> str:
  """Lines of a name and a text; names take one column."""
  width = max((len(name) for name, _ in rows), default=0)
  return '\n'.join(f'{name:<{width}}  {text}' for name, text in rows)


def count(n: float) -> str:
  """A number with three digits and a suffix: 1.23 M."""
  for limit, suffix in ((1e12, ' T'), (1e9, ' G'), (1e6, ' M'), (1e4, ' k')):
    if abs(n) >= limit * 0.9995:
      return f'{n / (1e3 if suffix == " k" else limit):.3g}{suffix}'
  return f'{n:.0f}' if n == round(n) else f'{n:.3g}'


def dollars(x: float) -> str:
  """An amount of money, with two digits at least where it is small: $0.0049."""
  return f'${x:,.0f}' if x >= 100 else f'${x:.2f}' if x >= 1 or x == 0 else f'${x:.2g}'


def duration(seconds: float) -> str:
  """'52 h', '8.3 h', '12 min' or '40 s'."""
  for unit, word in ((3600, 'h'), (60, 'min')):
    if seconds >= unit:
      n = seconds / unit
      return f'{n:,.0f} {word}' if n >= 9.95 else f'{n:.1f} {word}'
  return f'{seconds:.0f} s'


def size(n: float) -> str:
  """Bytes in GB, and in MB where there are few."""
  return f'{n / 1e9:.3g} GB' if n >= 1e8 else f'{n / 1e6:.3g} MB'


def energy(kwh: float) -> str:
  """kWh, and Wh where there are few."""
  return f'{kwh:.3g} kWh' if kwh >= 0.1 or kwh == 0 else f'{1000 * kwh:.3g} Wh'


def carbon(kg: float) -> str:
  """kg of CO2 equivalents, and grams where there are few."""
  return f'{kg:.3g} kg CO2e' if kg >= 0.1 or kg == 0 else f'{1000 * kg:.3g} g CO2e'


def dollars_per_hour(about: Mapping[str, Any], hardware: hardware_lib.Hardware | None) -> tuple[float, str] | None:
  """What an hour of the devices costs, and by which price; None where no profile has one.

  Args:
    about: the first line of an attempt in the ledger: 'device_kind', 'devices', and 'cores' of a CPU.
  """
  profile = hardware and hardware.of_device(about['device_kind'])
  chips = profile and hardware_lib.chips(about, profile)
  if not chips or profile.dollars_per_hour is None:
    return None
  source = ', '.join(filter(None, (profile.price_source, profile.price_date)))
  each = f'{chips:g} x {profile.name} at {dollars(profile.dollars_per_hour)}'
  return chips * profile.dollars_per_hour, f'{each} ({source})' if source else each


def opening(config: knobs.Config, about: Mapping[str, Any], *, train_tasks: int, test_tasks: int, first_step: int = 0,
            memory_bytes: int | None = None, hardware: hardware_lib.Hardware | None = None,
            programs: str | None = None) -> str:
  """What is going to run, as a table.

  Args:
    about: the first line of the attempt in the ledger: 'parameters', 'device_kind', 'devices', 'processes', 'cores'.
    train_tasks, test_tasks: how many there are.
    first_step: that the run goes on from.
    memory_bytes: that a device needs at least; None: not known.
    programs: where compiled ones are kept; None: nowhere.
  """
  c = config
  names = ', '.join(str(pair[0]) for pair in c.tasks.mixture) or c.tasks.dataset
  origin = c.policy.checkpoint or f'from scratch, {c.policy.num_layers} layers'
  lora = f', LoRA of rank {c.policy.lora_rank}' if c.policy.lora_rank else ''
  every = f'every {c.evaluate.every}' if c.evaluate.every else 'before the first and after the last'
  processes = f', {about["processes"]} processes' if about.get('processes', 1) > 1 else ''
  rows = [
      ('policy', f'{count(about["parameters"])} parameters ({origin}{lora}), {c.policy.dtype}'),
      ('tasks', f'{names}: {train_tasks} to train on, {test_tasks} held out'),
      ('step', f'R = {c.alloc.rollouts_per_step} rollouts of M = {c.tasks.per_step} tasks, by {c.alloc.rule}'),
      ('steps', f'{c.num_steps}' + (f', going on at {first_step}' if first_step else '') + f'; evaluated {every}'),
      ('devices', f'{about["devices"]} x {about["device_kind"]}{processes}')]
  if memory_bytes is not None:
    rows.append(('memory', f'at least {size(memory_bytes)} a device, and activations'))
  if price := dollars_per_hour(about, hardware):
    rows.append(('cost', f'{dollars(price[0])} an hour: {price[1]}'))
  elif hardware is not None:
    rows.append(('cost', f'unknown: --hardware has no price of {about["device_kind"]!r}'))
  if programs:
    rows.append(('compiled', f'programs are kept in {programs}'))
  return table(rows)


class Change(NamedTuple):
  """How much a score has risen."""

  mean: float
  error: float | None  # half of its 95 % interval; None: not known

  def __str__(self) -> str:
    interval = '' if self.error is None else f' [{self.mean - self.error:+.3f}, {self.mean + self.error:+.3f}]'
    return f'{self.mean:+.3f}{interval}'


def change(before: Mapping[str, Any], after: Mapping[str, Any], score: str) -> Change | None:
  """From one evaluation to a later one; None where a score is not known.

  The same tasks are in both, so that their differences are what is averaged: the mean, +- 1.96 standard errors, of the
  tasks that have verified rollouts in both. Without counts by task it is the difference of the scores, whose errors
  count as independent.

  Args:
    before, after: records of evaluations, 'eval_tasks' among their figures.
    score: 'avg@8'.
  """
  old, new = before.get('eval_tasks'), after.get('eval_tasks')
  if old and new and len(old['right']) == len(new['right']):
    counts = zip(old['right'], old['verified'], new['right'], new['verified'])
    differences = [right / n - right_before / n_before for right_before, n_before, right, n in counts if n_before and n]
    if len(differences) > 1:
      error = _Z * statistics.stdev(differences) / math.sqrt(len(differences))
      return Change(statistics.fmean(differences), error)
  scores, errors = ([record.get(f'eval/{score}{end}') for record in (before, after)] for end in ('', '_stderr'))
  return None if None in scores else Change(
      scores[1] - scores[0], None if None in errors else _Z * math.hypot(*errors))


def _score(record: Mapping[str, Any], score: str) -> str:
  """A score with its interval."""
  mean, low, high = (record.get(f'eval/{score}{part}') for part in ('', '_low', '_high'))
  if mean is None:
    return 'unknown'
  return f'{mean:.3f}' if low is None or high is None else f'{mean:.3f} [{low:.3f}, {high:.3f}]'


def evaluation(record: Mapping[str, Any], before: Mapping[str, Any] | None, score: str) -> str:
  """An evaluation in one line: the score with its 95 % interval, the change since the one before, what is left out."""
  text = f'step {record["step"]}: {score} of held-out tasks {_score(record, score)}'
  if before is not None and (found := change(before, record, score)):
    text += f', {found} since step {before["step"]}'
  if unverified := record.get('eval/unverified'):
    text += f'; {unverified:.1%} of rollouts unverified'
  return text


def compiled(asked: int, cached: int, seconds: float) -> str:
  """'3 programs, and 42 from the cache, in 5 s', of the programs that a start asked for."""
  new = asked - cached
  return (f'{new} program{"s" * (new != 1)}' + (f', and {cached} from the cache' if cached else '')
          + f', in {duration(seconds)}')


def _figure(figure: pricing.Figure, form: Callable[[float], str]) -> str | None:
  """A figure of a price with its provenance; None where it is not known."""
  return None if figure.value is None else f'{form(figure.value)} ({figure.provenance})'


def closing(evaluations: Sequence[Mapping[str, Any]], score: str, *, steps: int, seconds: float | None = None,
            price: pricing.Price | None = None, page: str | None = None,
            entries: Sequence[Mapping[str, Any]] = (), beside: str = '') -> str:
  """What was learnt and what it cost, as a table.

  Args:
    evaluations: records, from the first to the last.
    steps: that were trained.
    seconds: of the run, over all its starts.
    price: None: not known.
    page: where the report is.
    entries: of the ledger, for what its last attempt compiled.
    beside: what another run got that was recorded; '': none is known.
  """
  learnt = 'nothing was evaluated'
  if evaluations:
    first, last = evaluations[0], evaluations[-1]
    learnt = f'{score} of held-out tasks {_score(last, score)}'
    if len(evaluations) > 1:
      found = change(first, last, score)
      learnt = (f'{score} of held-out tasks {_score(first, score)} -> {_score(last, score)}'
                + (f', {found}' if found else ''))
  rows = [('learnt', f'{learnt}, in {steps} steps')]
  if beside:
    rows.append(('beside', beside))
  costs = [duration(seconds)] if seconds is not None else []
  if price is not None:
    costs += filter(None, (
        _figure(price.device_s, lambda x: f'{x / 3600:.3g} device-hours'),
        _figure(price.dollars, dollars), _figure(price.kwh, energy), _figure(price.kg_co2, carbon)))
    unknown = [name for name, x in (('dollars', price.dollars), ('energy', price.kwh)) if x.value is None]
    if unknown:
      costs.append(f'{" and ".join(unknown)} unknown')
  if costs:
    rows.append(('cost', ', '.join(costs)))
  last = max((entry['attempt'] for entry in entries), default=None)
  if of_last := [entry for entry in entries if entry['attempt'] == last and entry['phase'] == 'compile']:
    total = lambda name: sum(entry.get(name, 0) for entry in of_last)
    rows.append(('compiled', compiled(total('compiles'), total('compiles_cached'), total('wall_s'))))
  if page:
    rows.append(('report', page))
  return table(rows)
