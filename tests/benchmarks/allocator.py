"""Times `allocation.budgets` beside compiled dynamic programs of the same recurrence.

    .venv/bin/python -m tests.benchmarks.allocator [--sizes 256 1024 16384] [--repeats N] [--json]

About a minute on 2 cores; needs numba. Success rates are Beta(.5, .5), seed 0; 8 rollouts a task.
Times of dp and greedy are of the whole call, numpy in and out, once compiled. The programs take
success rates, start from V(low) and trace budgets back, in float64, as numba compiles them:

  numba         the textbook's loops, which find V(N, p) in the innermost, as the authors' code does
  numba_table   the same loops, over a table of values made before them
  numba_maxima  what kernels/knapsack does: the table, maxima only, candidates outside capacities

A round times every solver (dp and greedy as the median of several calls), so that the noise of a
machine hits all alike. `programs` are those that XLA compiles for 20 calls by dp of 33 to 256 tasks with 2 to 8
rollouts each, no two of them alike. A ratio is the median over rounds of a round's ratio, its range from least
to most. A gap is relative to the float64 optimum of summed values: numba_table's, or with too many
tasks for it that of all gains sorted. The programs use one core; XLA may use all.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time

import jax
import numba
import numpy as np
from tqdm import tqdm

from kr_jax import allocation
from tests.benchmarks import machine

LOW, HIGH = 2, 128
MOST_TASKS = 2048  # above it the programs would take minutes to hours
CALLS = 5  # of dp and of greedy in a round


@numba.njit
def value(n, p):
  return (1 - p ** n - (1 - p) ** n) * p * (1 - p) ** 2


@numba.njit
def values(p_M, low, high):
  value_MJ = np.empty((len(p_M), high - low + 1))
  for m in range(len(p_M)):
    for j in range(high - low + 1):
      value_MJ[m, j] = value(low + j, p_M[m])
  return value_MJ


def textbook(make_table: bool):
  """The loops of the textbook; numba compiles make_table as a constant."""

  @numba.njit
  def solve(p_M, total, low, high):
    M, U = len(p_M), total - low * len(p_M) + 1
    value_MJ = values(p_M if make_table else p_M[:0], low, high)
    best_U, unit_MU = np.full(U, -np.inf), np.zeros((M, U), np.int32)
    best_U[0] = 0
    for m in range(M):
      new_U = np.full(U, -np.inf)
      for u in range(U):
        for j in range(min(u, high - low) + 1):
          v = value_MJ[m, j] if make_table else value(low + j, p_M[m])
          if best_U[u - j] + v > new_U[u]:
            new_U[u], unit_MU[m, u] = best_U[u - j] + v, j
      best_U = new_U
    budget_M, u = np.empty(M, np.int32), U - 1
    for m in range(M - 1, -1, -1):
      budget_M[m] = low + unit_MU[m, u]
      u -= unit_MU[m, u]
    return budget_M

  return solve


@numba.njit
def maxima(p_M, total, low, high):
  M, U, value_MJ = len(p_M), total - low * len(p_M) + 1, values(p_M, low, high)
  best_MU = np.full((M + 1, U), -np.inf)
  best_MU[0, 0] = 0
  for m in range(M):
    old_U, new_U = best_MU[m], best_MU[m + 1]
    for j in range(min(U, high - low + 1)):
      for u in range(U - j):
        v = old_U[u] + value_MJ[m, j]
        new_U[u + j] = v if v > new_U[u + j] else new_U[u + j]  # max() minds NaN: no vectors
  budget_M, u = np.empty(M, np.int32), U - 1
  for m in range(M - 1, -1, -1):
    j = np.argmax(best_MU[m, u - np.arange(min(u, high - low) + 1)] + value_MJ[m, :u + 1])
    budget_M[m] = low + j
    u -= j
  return budget_M


PROGRAMS = {'numba': textbook(False), 'numba_table': textbook(True), 'numba_maxima': maxima}


def sort(p_M: np.ndarray, total: int, low: int, high: int) -> np.ndarray:
  """The optimum by the largest gains, in float64."""
  gain_MG = np.diff(allocation.expected_value(p_M, np.arange(low, high + 1)), axis=1)
  units = total - low * len(p_M)
  taken = np.argsort(-gain_MG, axis=None, kind='stable')[:units]
  return low + np.bincount(taken // (high - low), minlength=len(p_M))


def measure(tasks: int, rounds: int, progress: tqdm) -> dict:
  """The figures of one size."""
  total = 8 * tasks
  p_M = np.random.default_rng(0).beta(0.5, 0.5, tasks)
  solvers = {name: functools.partial(allocation.budgets, p_M, total, low=LOW, high=HIGH, solver=name)
             for name in ('dp', 'greedy')}
  for name, program in PROGRAMS.items():
    program(p_M[:2], 16, LOW, HIGH)  # compiles
    solvers[name] = functools.partial(program, p_M, total, LOW, HIGH)
  if tasks > MOST_TASKS:
    solvers = {'greedy': solvers['greedy']}
  ms, worth = {name: np.zeros(rounds) for name in solvers}, {}
  for name in solvers.keys() & {'dp', 'greedy'}:
    solvers[name]()  # compiles
  for i in range(rounds):
    for name, solve in solvers.items():
      progress.set_description(f'{tasks} tasks, {name}')
      calls = []
      for _ in range(1 if name in PROGRAMS else CALLS):
        start = time.perf_counter()
        budget_M = solve()
        calls.append(1e3 * (time.perf_counter() - start))
      ms[name][i] = np.median(calls)
      worth[name] = allocation.objective(p_M, budget_M)
      progress.update()
  optimum = worth.get('numba_table', allocation.objective(p_M, sort(p_M, total, LOW, HIGH)))
  result = {'tasks': tasks, 'total': total, 'low': LOW, 'high': HIGH, 'rounds': rounds}
  spread = lambda x: [float(x.min()), float(x.max())]
  for name in ('dp', 'greedy', *PROGRAMS):
    here = name in solvers
    result[f'{name}_ms'] = float(np.median(ms[name])) if here else None
    result[f'{name}_ms_range'] = spread(ms[name]) if here else None
    result[f'{name}_gap'] = (optimum - worth[name]) / optimum if here else None
    for program in PROGRAMS if name not in PROGRAMS else ():
      key = f'{name}{program.removeprefix("numba")}_ratio'  # dp_ratio, dp_table_ratio, ...
      ratio = ms[program] / ms[name] if here and program in solvers else None
      result[key] = None if ratio is None else float(np.median(ratio))
      result[f'{key}_range'] = None if ratio is None else spread(ratio)
  result['gap'] = max(result[f'{name}_gap'] or 0.0 for name in ('dp', 'greedy'))
  return result


def programs(calls: int = 20) -> int:
  """How many programs calls of different sizes compile, in a process that has compiled none."""
  jax.clear_caches()
  rng, count = np.random.default_rng(0), 0

  def on_event(event: str, duration: float, **_):
    nonlocal count
    count += event == '/jax/core/compile/backend_compile_duration'

  jax.monitoring.register_event_duration_secs_listener(on_event)
  for _ in range(calls):
    tasks = int(rng.integers(33, 257))
    allocation.budgets(rng.beta(0.5, 0.5, tasks), int(rng.integers(2 * tasks, 8 * tasks)), low=LOW, high=HIGH)
  jax.monitoring.unregister_event_duration_listener(on_event)
  return count


def show(figures: dict) -> None:
  """A table: times, gaps, and how many times as long as dp and as greedy each program takes."""
  with_range = lambda key: '{:.4g} ({:.4g}..{:.4g})'.format(figures[key], *figures[f'{key}_range'])
  print('{tasks} tasks, {total} rollouts, {low}..{high} each, {rounds} rounds'.format(**figures))
  print(f'  {"":14}{"ms":29}{"gap":10}{"/ dp":27}/ greedy')
  for name in ('dp', 'greedy', *PROGRAMS):
    if figures[f'{name}_ms'] is not None:
      ratios = [f'{solver}{name.removeprefix("numba")}_ratio' for solver in ('dp', 'greedy')]
      line = f'  {name:14}{with_range(f"{name}_ms"):29}{figures[f"{name}_gap"]:<10.1e}'
      if name in PROGRAMS:
        line += ''.join(f'{with_range(ratio):27}' for ratio in ratios)
      print(line.rstrip())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--sizes', nargs='+', type=int, default=[256, 1024, 16384], help='tasks')
  parser.add_argument('--repeats', type=int, help='rounds; if not given 7, or 3 above 256 tasks')
  parser.add_argument('--json', action='store_true', help='print one JSON object last')
  args = parser.parse_args()
  rounds = [args.repeats or (7 if tasks <= 256 else 3) for tasks in args.sizes]
  times = sum(n * (2 + len(PROGRAMS) if tasks <= MOST_TASKS else 1)
              for n, tasks in zip(rounds, args.sizes))
  with tqdm(total=times, file=sys.stderr) as progress:
    sizes = [measure(tasks, n, progress) for tasks, n in zip(args.sizes, rounds)]
  ran_on = f'{machine.describe()}, numba {numba.__version__}'
  print(ran_on)
  for figures in sizes:
    show(figures)
  compiled = programs()
  print(f'20 calls of different sizes compiled {compiled} programs')
  if args.json:
    print(json.dumps({'machine': ran_on, 'sizes': sizes, 'programs': compiled}))


if __name__ == '__main__':
  main()
