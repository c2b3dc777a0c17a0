"""What a whole run takes, of what a step takes: time, money and energy, with evaluations and compilation.

    training      num_steps x the seconds of a step
    evaluation    before the first step, every evaluate.every steps and after the last: held-out tasks x rollouts, in
                  batches that are filled up; a batch decodes as fast as the sampler of a step; the last takes perturbed
                  prompts too
    compilation   once, at the compiler's time on the machine of the preflight; a TPU's host has other cores

Money is chip-hours times their price. Energy is modelled as kr_jax/costs/pricing.py does: full power while programs
run, idle power while they compile. The warm start, verification, checkpoints and waiting are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any, NamedTuple

from kr_jax import knobs
from kr_jax import tasks as tasks_lib
from kr_jax.costs.hardware import Profile, Site
from kr_jax.record import terminal

# Tasks of published and generated splits that are tested on (kr_jax/datasets/README.md). A split's size is read from
# data alone, which a preflight does without.
SIZES = {
    'arithmetic': {'test': 384}, 'sums': {'test': 192}, 'ciphers_late': {'test': 384}, 'ciphers_hard': {'test': 384},
    'champ': {'test': 270}, 'gsm8k': {'test': 1319, 'train': 7473},
    'math_500': {'test': 500}, 'aime_2024': {'test': 30}, 'aime_2025': {'test': 30}, 'amc_2023': {'test': 40},
    'minerva_math': {'test': 272}, 'olympiad_bench': {'test': 674}, 'gpqa_diamond': {'test': 198},
    'mbpp': {'test': 500, 'train': 374}, 'mbpp_sanitized': {'test': 257, 'train': 120}, 'human_eval': {'test': 164}}
ASSUMED = 500  # tasks of a split whose size is not known


class HeldOut(NamedTuple):
  """Tasks of an evaluation."""

  tasks: int
  assumed: list[str]  # splits whose size is not known


def held_out(c: knobs.Config) -> HeldOut:
  """How many tasks an evaluation has, of what the config names."""
  names = c.tasks.test or [name for name, _ in c.tasks.mixture] or [c.tasks.dataset]
  tasks, assumed = 0, []
  for dataset, split in (tasks_lib.part(name, c.tasks.test_split) for name in names):
    size = _size(dataset, split, c.tasks.reasoning_gym)
    if size is None:
      assumed.append(f'{dataset}/{split}')
    tasks += min(ASSUMED if size is None else size, c.evaluate.tasks)
  return HeldOut(tasks, assumed)


def _size(dataset: str, split: str, generated: knobs.ReasoningGym) -> int | None:
  """Tasks of 'test', 'test[:25%]' or 'test[5:9]'; None: not known."""
  parts = re.fullmatch(r'(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?', split)
  of_dataset = {'train': generated.train, 'test': generated.test} if dataset.startswith('reasoning_gym/') else (
      SIZES.get(dataset, {}))
  if not parts or parts[1] not in of_dataset:
    return None
  size = of_dataset[parts[1]]

  def at(bound: str | None, default: int) -> int:
    if bound is None:
      return default
    index = round(size * int(bound[:-1]) / 100) if bound.endswith('%') else int(bound)
    return min(max(index + size if index < 0 else index, 0), size)

  return max(at(parts[3], size) - at(parts[2], 0), 0)


def evaluations(c: knobs.Config) -> int:
  """How often a run evaluates."""
  every = range(0, c.num_steps, c.evaluate.every) if c.evaluate.every else ()
  return len({0, c.num_steps, *every})


def _passes(c: knobs.Config) -> int:
  """How often all held-out tasks are sampled: the last evaluation also takes them perturbed."""
  return evaluations(c) + len(c.evaluate.perturb)


def evaluation_share(c: knobs.Config) -> float | None:
  """Rollouts of all evaluations over those that are trained on; None without steps."""
  trained = c.num_steps * c.alloc.rollouts_per_step
  return _passes(c) * held_out(c).tasks * c.evaluate.rollouts / trained if trained else None


def cost(c: knobs.Config, *, step_s: float, batch_s: float, reshard_s: float, compile_s: float, chips: float,
         profile: Profile, site: Site) -> dict[str, Any]:
  """What a run takes, as JSON has it.

  Args:
    step_s: seconds of a step.
    batch_s: of the sampling of one batch of an evaluation.
    reshard_s: of the making of the sampling params, once an evaluation.
    compile_s: of all programs.
    chips: how many are held.
  """
  found, passes = held_out(c), _passes(c)
  batches = -(-found.tasks // c.evaluate.tasks_per_batch)
  training_s, evaluation_s = c.num_steps * step_s, passes * batches * batch_s + evaluations(c) * reshard_s
  all_s = training_s + evaluation_s + compile_s
  chip_hours = chips * all_s / 3600
  kwh = None if None in (profile.watts_idle, profile.watts_max) else chips * site.pue * (
      profile.watts_max * (training_s + evaluation_s) + profile.watts_idle * compile_s) / 3.6e6
  return {
      'steps': c.num_steps, 'training_s': training_s, 'evaluations': evaluations(c), 'held_out_tasks': found.tasks,
      'assumed_tasks': found.assumed, 'evaluation_rollouts': passes * found.tasks * c.evaluate.rollouts,
      'evaluation_share_of_rollouts': evaluation_share(c), 'evaluation_s': evaluation_s, 'compile_s': compile_s,
      'chips': chips, 'chip_hours': chip_hours,
      'dollars': None if profile.dollars_per_hour is None else chip_hours * profile.dollars_per_hour,
      'dollars_per_hour': profile.dollars_per_hour, 'price_date': profile.price_date,
      'kwh': kwh, 'power_source': profile.power_source,
      'kg_co2': None if None in (kwh, site.grams_per_kwh) else kwh * site.grams_per_kwh / 1000, 'region': site.region}


# As text.


def verdict(report: Mapping[str, Any]) -> str:
  """The line with which a report begins: whether the config fits, and what a run takes."""
  topology, run = report['topology'], report.get('run')
  if not report['fits']:
    wrong = ', '.join(name for name, phase in report['phases'].items() if not phase['fits'])
    return f'{topology}: does NOT fit: {wrong}'
  if run is None:
    return f'{topology}: fits'
  money = 'money unknown (no price of the chip)' if run['dollars'] is None else (
      f'{terminal.dollars(run["dollars"])} ({run["chips"]:g} chips at ${run["dollars_per_hour"]:g} an hour'
      f'{", " + run["price_date"] if run["price_date"] else ""})')
  energy = 'energy unknown (no power of the chip)' if run['kwh'] is None else f'{run["kwh"]:,.3g} kWh modelled'
  spans = [terminal.duration(run[f'{part}_s']) for part in ('training', 'evaluation', 'compile')]
  return (f'{topology}: fits; {spans[0]} of training + {spans[1]} of evaluation + {spans[2]} of compilation, {money}, '
          f'{energy}')


def notes(run: Mapping[str, Any]) -> list[str]:
  """What the verdict rests on: lines."""
  share = run['evaluation_share_of_rollouts']
  lines = [f'a run: {run["steps"]:,} steps and {run["evaluations"]:,} evaluations of {run["held_out_tasks"]:,} '
           f'held-out tasks: {run["evaluation_rollouts"]:,} rollouts'
           + ('' if share is None else f', {share:.0%} of those that are trained on')]
  if run['assumed_tasks']:
    lines.append(f'the sizes of {", ".join(run["assumed_tasks"])} are not known; {ASSUMED} tasks of each are assumed')
  if run['kwh'] is not None:
    carbon = '' if run['kg_co2'] is None else f', {run["kg_co2"]:,.3g} kg CO2e in {run["region"]}'
    lines.append(f'energy: at full power while programs run ({run["power_source"] or "unknown"} figures){carbon}')
  lines.append("compilation took so long here; a TPU's host has other cores. Not counted: the warm start, "
               'verification, checkpoints, waiting')
  return lines
