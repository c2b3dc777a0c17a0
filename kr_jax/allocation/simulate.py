"""Compares allocation rules without a policy, in the simulated worlds of kr_jax/allocation/worlds.py and passes.py.

    python -m kr_jax.allocation.simulate static --populations rates.json
    python -m kr_jax.allocation.simulate passes --preset dapo --drift 0.01
    python -m kr_jax.allocation.simulate learning --method posterior:snr:4:loo
    python -m kr_jax.allocation.simulate decide

Prints a table, and writes a JSON file and, of `static` and `learning`, a plot to --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import functools
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import sys
from typing import Any

import jax
import matplotlib
import matplotlib.figure
import numpy as np

from kr_jax import knobs
from kr_jax.allocation import allocate
from kr_jax.allocation import forecast
from kr_jax.allocation import passes
from kr_jax.allocation import value as value_lib
from kr_jax.allocation import worlds
from kr_jax.types import Array

METHODS = ('uniform:loo', 'window:infogain:std', 'posterior:infogain:std', 'posterior:variance:loo',
           'posterior:snr:0.5:loo', 'posterior:snr:2:loo', 'posterior:snr:8:loo')
STARTS = ((-1.5, 3.0), (-4.0, 2.0))  # mean and standard deviation of the start logits
SIGMAS = (0.0, 2.0, 5.0, 30.0)
_LEGEND = """objective in % of an oracle's (of one wave), then of uniform budgets'
losses and Brier score in nats a rollout, less the oracle's; lost: log loss less that of the exact filter
in the large: mean forecast less mean success rate; gradient ratio, mixed tasks: expected for observed
unseen: the longest that a task went without rollouts, in passes"""


def static_table(result: dict[str, Any]) -> str:
  lines = []
  for name, by_rule in result.items():
    lines += ['', f'{name:21} {"objective, % of oracle":>24} {"mixed tasks":>18} {"effective gradient ratio":>26}']
    for rule, measured in by_rule.items():
      cells = [f'{mean:.{digits}f} ± {half:.{digits}f}'
               for (mean, half), digits in zip(measured.values(), (2, 1, 3))]
      lines.append(f'  {rule:<19} {cells[0]:>24} {cells[1]:>18} {cells[2]:>26}')
  return '\n'.join(lines[1:])


def passes_table(result: dict[str, Any]) -> str:
  """A row for each method; after an abrupt change another table, of what its forecasts lose visit by visit."""
  heads = ('objective, %', '% of uniform', 'log loss', 'lost', 'counts', 'Brier', 'in the large', 'gradient ratio',
           '     mixed tasks', 'unseen')
  width = max(map(len, result)) + 2

  def line(name, cells):
    return f'{name:{width}}' + ''.join(f'{cell:>{max(len(head), 6) + 3}}' for cell, head in zip(cells, heads))

  lines = [line('', heads)]
  for name, measured in result.items():
    mean = {measure: x for measure, (x, _) in measured.items()}
    pair = lambda kind, digits: ' for '.join(
        '-' if math.isnan(x) else f'{x:.{digits}f}' for x in (mean[f'expected_{kind}'], mean[f'observed_{kind}']))
    lines.append(line(name, [
        '{:.2f} ± {:.2f}'.format(*measured['objective']), f'{mean["of_uniform"]:.1f}', f'{mean["log_loss"]:.4f}',
        f'{mean["lost"]:.4f}', f'{mean["count_log_loss"]:.4f}', f'{mean["brier"]:.4f}', f'{mean["calibration"]:+.4f}',
        pair('ratio', 2), pair('mixed', 1), f'{mean["unseen"]:.1f}']))
  visits = [visit for visit in passes.VISITS if visit in next(iter(result.values()))]
  if visits:
    lines += ['', f'{"lost, by visits since the change":{width}}' + ''.join(f'{visit:>18}' for visit in visits)]
    cell = lambda pair: '-' if math.isnan(pair[0]) else '{:.4f} ± {:.4f}'.format(*pair)
    lines += [f'{name:{width}}' + ''.join(f'{cell(measured[visit]):>18}' for visit in visits)
              for name, measured in result.items()]
  return '\n'.join(lines)


def learning_table(rows: list[dict[str, Any]]) -> str:
  """A table for each start: a row for each method, a column for each sigma."""
  def line(name, cells):
    return f'{name:24}' + ''.join(f'{cell:>18}' for cell in cells)

  lines = []
  for start, group in itertools.groupby(rows, lambda row: row['start']):
    group = list(group)
    first = group[0]['success_by_seed'][worlds.BASELINE][:, 0].mean()
    lines += ['', f'start logits {start[0]:g} ± {start[1]:g}: the share of the rollouts of '
              f'{worlds.BASELINE} that reaches its final success',
              line('', [f'sigma {row["sigma"]:g}' for row in group])]
    lines += [line(name, [_cell(row['share'][name]) for row in group]) for name in group[0]['share']]
    last = [row['success_by_seed'][worlds.BASELINE][:, -1].mean() for row in group]
    lines.append(line(f'its success, {first:.3f} to', [f'{x:.3f}' for x in last]))
  return '\n'.join(lines[1:])


def _cell(share_by_seed: list[float | None]) -> str:
  """Mean and range over the seeds; or how many of them reached the baseline's success."""
  reached = len(share_by_seed) - share_by_seed.count(None)
  if not reached:
    return 'never'
  if reached < len(share_by_seed):
    return f'in {reached} of {len(share_by_seed)}'
  return f'{np.mean(share_by_seed):.2f} ({min(share_by_seed):.2f}-{max(share_by_seed):.2f})'


def decision_table(found: dict[tuple[str, int, float], dict[str, forecast.Range]]) -> str:
  """A row of Markdown for each spread, epoch and signal-to-noise; a column for each rule, and the verdict."""
  rules = list(next(iter(found.values())))
  rows = [['success rates', 'steps of a pass', 'signal-to-noise', *rules, 'verdict'], ['---'] * (len(rules) + 4)]
  for (spread, epoch, signal), ranges in found.items():
    said, rule = forecast.verdict(ranges)
    rows.append([spread, f'{epoch}', f'{signal:g}', *map(forecast.shown, ranges.values()),
                 f'{said}: {rule}' if rule else said])
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


class Figure(matplotlib.figure.Figure):
  """A figure that a notebook draws as the last expression of a cell, without pyplot."""

  def __init__(self, width: float, height: float):
    super().__init__(figsize=(width, height), layout='constrained', dpi=120)

  def _repr_png_(self) -> bytes:
    png = io.BytesIO()
    self.savefig(png, format='png')
    return png.getvalue()


def plot_budgets(success_rate_M: Array | None = None, total: int | None = None, *, low: int = 2, high: int = 128,
                 nus: Sequence[float] = (0.5, 2.0, 8.0)) -> Figure:
  """Budgets against success rate for each value, where the success rates are known.

  Args:
    success_rate_M: of the tasks that share the total; the default is 199 at even distances.
    total: rollouts; the default is 8 a task.
    nus: noise-to-signal ratios of the value 'snr', a line each.
  """
  p_M = np.linspace(0, 1, 201)[1:-1] if success_rate_M is None else np.sort(success_rate_M)
  total = 8 * len(p_M) if total is None else total
  solve = functools.partial(allocate.budgets, p_M, total, low=low, high=high, solver='greedy')
  figure = Figure(7, 4)
  axes = figure.add_subplot()
  axes.plot(p_M, solve(rule='uniform'), color='black', lw=1.5, ls='--', label='uniform')
  axes.plot(p_M, solve(value='infogain'), color='tab:orange', lw=2, label="infogain (the paper's)")
  axes.plot(p_M, solve(value='variance'), color='tab:green', lw=2, label='variance')
  for nu, color in zip(nus, matplotlib.colormaps['Blues'](np.linspace(0.45, 1, len(nus)))):
    axes.plot(p_M, solve(value='snr', nu=nu), color=color, lw=2, label=f'snr, nu = {nu:g}')
  axes.set(xlabel='success rate p of a task', ylabel='budget N (rollouts)', xlim=(0, 1),
           title=f'{total} rollouts shared by {len(p_M)} tasks, {low} to {high} each')
  axes.set_yscale('log', base=2)
  axes.yaxis.set_major_formatter('{x:g}')
  figure.legend(loc='outside right center', frameon=False, fontsize=8)
  return figure


def plot_learning(rows: list[dict[str, Any]], rollouts_per_step: int) -> Figure:
  """Success against rollouts, mean and range over the seeds; a panel for each start and sigma."""
  columns = len({row['sigma'] for row in rows})
  height = math.ceil(len(rows) / columns)
  figure = Figure(3.2 * columns, 2.7 * height + 0.8)
  for axes, row in zip(figure.subplots(height, columns, squeeze=False).flat, rows):
    for (name, success_by_seed), color in zip(row['success_by_seed'].items(), matplotlib.colormaps['tab10'].colors):
      x = np.arange(success_by_seed.shape[1]) * rollouts_per_step / 1000
      axes.fill_between(x, success_by_seed.min(0), success_by_seed.max(0), color=color, alpha=0.12, lw=0)
      axes.plot(x, success_by_seed.mean(0), color=color, lw=1.2, label=name)
    axes.set_title(f'start {row["start"][0]:g} ± {row["start"][1]:g}, sigma {row["sigma"]:g}', fontsize=9)
    axes.tick_params(labelsize=8)
    axes.set_xlabel('rollouts (thousands)', fontsize=8)
    axes.set_ylabel('success, mean of tasks', fontsize=8)
  legend = figure.legend(*axes.get_legend_handles_labels(), loc='outside upper center', ncols=min(4, 2 * columns),
                         frameon=False, fontsize=8)
  for line in legend.get_lines():
    line.set_linewidth(2.5)
  return figure


def read_populations(path: str) -> dict[str, worlds.Population]:
  """Populations of a JSON file, a list of success rates or {name: list}; draws are with replacement.

  Raises:
    ValueError: the file does not exist or holds something else.
  """
  try:
    tree = json.loads(pathlib.Path(path).read_text())
  except OSError as error:
    raise ValueError(f'--populations {path}: {error.strerror}; name a JSON file') from None
  except ValueError as error:
    raise ValueError(f'--populations {path} is not JSON ({error}); write a list of success rates, such as '
                     '[0.1, 0.5]') from None
  lists = tree if isinstance(tree, dict) else {pathlib.Path(path).name: tree}
  if not lists:
    raise ValueError(f'--populations {path} holds no population; write {{"name": [0.1, 0.5]}}')
  return {name: _draw_from(rates, f'--populations {path}: {name!r}') for name, rates in lists.items()}


def _draw_from(rates: Any, name: str) -> worlds.Population:
  if not isinstance(rates, list) or not rates:
    raise ValueError(f'{name} must be a list of at least one success rate, not {rates!r}')
  for i, rate in enumerate(rates):
    if type(rate) not in (int, float) or not 0 <= rate <= 1:  # to isinstance, a bool is an int
      raise ValueError(f'{name} has {rate!r} at position {i}; success rates are numbers in [0, 1]')
  return worlds.Population(lambda rng, M: rng.choice(np.array(rates, float), M))


@knobs.section
class Decide(knobs.Section):
  """Options of the decision table."""

  seeds: int = knobs.knob(2, 'worlds of each row', low=1)
  jobs: int = knobs.knob(os.cpu_count() or 1, 'processes', low=1)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
  """Says defaults, and leaves the lines of a text as they are."""


def parser() -> argparse.ArgumentParser:
  top = argparse.ArgumentParser(prog='python -m kr_jax.allocation.simulate', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = top.add_subparsers(dest='world', required=True)
  for name, setup, text in (
      ('static', worlds.StaticSetup, 'how good are the budgets of one step? (seconds)'),
      ('passes', passes.PassesSetup,
       'how well do estimates keep up, at the sizes of a config? (minutes, and more for --preset dapo or paper)'),
      ('learning', worlds.LearningSetup,
       'how fast does each rule learn? (half an hour; fewer --method, --sigma or --steps take less)'),
      ('decide', Decide, 'which rule when, by what ten steps of a run tell (two minutes)')):
    command = commands.add_parser(name, help=text, description=text, formatter_class=_Help)
    command.add_argument('--out', type=pathlib.Path, default='runs/simulate', help='directory of the JSON and PNG')
    command.add_argument('--json', action='store_true', help='print one JSON object as the last line')
    command.add_argument('--debug', action='store_true', help='shrink everything to seconds')
    for field in dataclasses.fields(setup):
      # What is not typed is left to a preset, and to the default after it.
      command.add_argument(f'--{field.name}', type=type(field.default), default=argparse.SUPPRESS,
                           help=f'{field.metadata["doc"]} (default: {field.default})'.replace('%', '%%'))
  commands.choices['static'].add_argument(
      '--populations', nargs='+', default=[], metavar='FILE.json',
      help='success rates of your own: a list of numbers in [0, 1], or {"name": list}')
  for command in (commands.choices['passes'], commands.choices['learning']):
    command.add_argument('--preset', choices=tuple(passes.PRESETS), default=argparse.SUPPRESS,
                         help='tasks, per_step, per_task and high of a config; flags have the last word')
  in_passes = commands.choices['passes']
  in_passes.epilog = inspect.getdoc(passes.parse).partition('\n\nRaises')[0]
  in_passes.add_argument(
      '--method', nargs='+', default=list(passes.METHODS), metavar='ESTIMATE[:NUMBER][+PART]',
      help="what to compare, see below; 'parts': a row for each part")
  in_passes.add_argument('--jobs', type=int, default=os.cpu_count(), help='processes')
  learning = commands.choices['learning']
  learning.add_argument(
      '--method', nargs='+', default=list(METHODS), metavar='ESTIMATE:VALUE[:NU]:ADVANTAGE',
      help=f'what to compare with {worlds.BASELINE}: uniform:ADVANTAGE, or an estimate of '
      f'{worlds.ESTIMATES}, a value of {tuple(value_lib.VALUES)}, and an advantage of {worlds.ADVANTAGES}')
  learning.add_argument('--start', nargs=2, type=float, action='append', metavar=('MEAN', 'SD'),
                        default=argparse.SUPPRESS, help=f'of the start logits; may be repeated (default: {STARTS})')
  learning.add_argument('--sigma', nargs='+', type=float, default=list(SIGMAS),
                        help="norm of the noise of a rollout's gradient; nu = sigma^2")
  return top


def _setup(cls: Callable[..., Any], args: argparse.Namespace, **debug: int) -> Any:
  """The options of a world: defaults, those of a preset, of --debug, and those that were typed, which win."""
  preset = passes.PRESETS[args.preset] if 'preset' in args else {}
  typed = {field.name: getattr(args, field.name) for field in dataclasses.fields(cls) if field.name in args}
  return cls(**preset | (debug if args.debug else {}) | typed)


def run_static(args: argparse.Namespace) -> dict[str, Any]:
  setup = _setup(worlds.StaticSetup, args, tasks=32, repeats=4)
  populations = worlds.beta_populations()
  for path in args.populations:
    more = read_populations(path)
    if twice := populations.keys() & more.keys():
      raise ValueError(f'--populations {path}: two populations are named {min(twice)!r}; rename one')
    populations |= more
  result = worlds.static(populations, setup)
  plot_budgets(total=199 * setup.per_task, low=setup.low, high=setup.high).savefig(args.out / 'budgets.png')
  print(static_table(result))
  print(f'\n± 95 % interval of {setup.repeats} repeats; objective: the value {setup.value!r}')
  return {'config': knobs.as_dict(setup) | {'populations': args.populations}, 'results': result}


def run_passes(args: argparse.Namespace) -> dict[str, Any]:
  setup = _setup(passes.PassesSetup, args, tasks=64, per_step=16, per_task=4, seeds=2)
  methods = [name for text in args.method for name in (passes.PARTS if text == 'parts' else (text,))]
  result = passes.passes(methods, setup, jobs=args.jobs)
  print(passes_table(result))
  print(f'\n{setup.measured} of {setup.passes} passes of {setup.steps_a_pass} steps, the last; ± 95 % interval of '
        f"{setup.seeds} seeds\n{_LEGEND}")
  number = lambda x: None if math.isnan(x) else x
  results = {name: {measure: [number(x) for x in pair] for measure, pair in measured.items()}
             for name, measured in result.items()}
  return {'config': knobs.as_dict(setup) | {'methods': methods}, 'results': results}


def run_learning(args: argparse.Namespace) -> dict[str, Any]:
  setup = _setup(worlds.LearningSetup, args, tasks=64, features=8, per_step=16, steps=8, seeds=2)
  methods, starts, sigmas = args.method, getattr(args, 'start', STARTS), args.sigma
  if args.debug:
    starts, sigmas, methods = starts[:1], sigmas[:2], methods[:3]
  rows = worlds.learning(methods, starts, sigmas, setup)
  plot_learning(rows, setup.per_step * setup.per_task).savefig(args.out / 'learning.png')
  print(learning_table(rows))
  print(f'\nmean (least-most) of {setup.seeds} seeds, or in how many it was reached within the rollouts of '
        f'{worlds.BASELINE}')
  results = []
  for row in rows:
    success_by_seed = row.pop('success_by_seed')
    last = {name: success[:, -1].tolist() for name, success in success_by_seed.items()}
    results.append(row | {'success_first': success_by_seed[worlds.BASELINE][:, 0].tolist(), 'success_last': last})
  config = {'methods': methods, 'starts': [list(x) for x in starts], 'sigmas': sigmas}
  return {'config': knobs.as_dict(setup) | config, 'results': results}


def run_decide(args: argparse.Namespace) -> dict[str, Any]:
  setup = _setup(Decide, args, seeds=1)
  shrunk = {'spreads': list(forecast.SPREADS)[-1:], 'epochs': [8], 'signals': [10.0], 'steps': 8} if args.debug else {}
  found = forecast.decision(seeds=setup.seeds, jobs=setup.jobs, **shrunk)
  print(decision_table(found))
  print(f"\nshare of uniform budgets' rollouts, median (least-most) of {setup.seeds} worlds")
  results = [{'spread': spread, 'epoch': epoch, 'signal_to_noise': signal, 'verdict': forecast.verdict(ranges),
              'ranges': {rule: x._asdict() for rule, x in ranges.items()}}
             for (spread, epoch, signal), ranges in found.items()]
  return {'config': knobs.as_dict(setup), 'results': results}


def main(argv: Sequence[str] | None = None) -> None:
  args = parser().parse_args(argv)
  # A training run may hold the accelerator, and tables this small are no work for it.
  jax.config.update('jax_platforms', 'cpu')
  try:
    args.out.mkdir(parents=True, exist_ok=True)  # before minutes of work, not after
    run = {'static': run_static, 'passes': run_passes, 'learning': run_learning, 'decide': run_decide}[args.world]
    done = run(args)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  (args.out / f'{args.world}.json').write_text(json.dumps(done, indent=1) + '\n')
  print(f'see {args.out}')
  if args.json:
    print(json.dumps(done))


if __name__ == '__main__':
  main()
