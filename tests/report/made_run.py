"""Made-up runs: workdirs as training leaves them, of a policy that learns by a formula, in a few milliseconds.

A task of difficulty d is solved with the chance sigmoid(1.2 (skill - d) + its own part), and the skill grows with the
mixed groups of a step. Records have every field that runs write; figures of cost follow from the tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from configs import hardware as hardware_config
from kr_jax import health
from kr_jax import knobs
from kr_jax.allocation import scores
from kr_jax.allocation.value import Beta
from kr_jax.costs import hardware
from kr_jax.record import calibration
from kr_jax.record import ledger
from kr_jax.record import rollouts as rollouts_lib
from kr_jax.report import run
from kr_jax.rewards import verdicts

NAME = 'arithmetic/ends_with'  # of the only dataset and verifier
PARAMETERS = 800_000
_BINS = 10


def make(workdir, *, rule: str = 'knapsack', seed: int = 0, steps: int = 12, every: int = 4, tasks: int = 24,
         per_step: int = 8, rollouts: int = 64, held_out: int = 16, kills: int = 0, gain: float = 0.05,
         device: str = 'TPU v5 lite', skip: tuple[str, ...] = (), **changed: Any) -> str:
  """Writes a run into a directory, and returns it.

  Args:
    every: steps between evaluations, the last one after the last step.
    kills: how often the run was killed; a kill costs two steps that are done again.
    gain: of skill, of a mixed group.
    device: its kind, as JAX names it.
    skip: files that are left out: 'config.json', 'metrics.jsonl', 'ledger.jsonl', 'hardware.json', 'rollouts'.
    changed: values of config.json, by section: grpo={'keep': 0.5}.
  """
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  world = _World(rule, seed, tasks, per_step, rollouts, held_out, gain)
  config = _config(rule, seed, steps, every, per_step, rollouts, changed)
  records, sampled = [world.evaluation(0)], {}
  for step in range(steps):
    record, chosen = world.step(step)
    records.append(record)
    sampled[step] = chosen
    if step + 1 == steps or (step + 1) % every == 0:
      records.append(world.evaluation(step + 1))
  if 'config.json' not in skip:
    (workdir / 'config.json').write_text(json.dumps(config, indent=1))
  if 'metrics.jsonl' not in skip:
    write_lines(workdir / 'metrics.jsonl', records)
  if 'ledger.jsonl' not in skip:
    write_lines(workdir / 'ledger.jsonl', ledger_lines(records, kills=kills, device=device))
  if 'hardware.json' not in skip:
    hardware.save(str(workdir), hardware.read(hardware_config.get_config()))
  if 'rollouts' not in skip:
    (workdir / 'rollouts').mkdir(exist_ok=True)
    for step, chosen in sampled.items():
      (workdir / 'rollouts' / f'{step:06}.jsonl.zst').write_bytes(rollouts_lib.packed(chosen))
  return str(workdir)


def run_of(steps=(), evaluations=(), entries=(), attempts=(), priced: bool = False) -> run.Run:
  """A run of records that are given, without a workdir. priced: by the project's profiles."""
  of = hardware.read(hardware_config.get_config()) if priced else None
  return run.Run('/none', {}, list(steps), list(evaluations),
                 ledger.Ledger(list(attempts), list(entries), [], []), of, [], [])


def evaluation(step: int, success: float | None, right: list[int] | None = None, **more: Any) -> dict[str, Any]:
  """The record of an evaluation; right: of each held-out task, of four rollouts."""
  tasks = {} if right is None else {'eval_tasks': {'right': right, 'verified': [4] * len(right)}}
  return {'step': step, 'eval/avg@4': success, **tasks, **more}


def write_lines(path, lines: list[dict[str, Any]]) -> None:
  pathlib.Path(path).write_text(''.join(json.dumps(line) + '\n' for line in lines))


def _config(rule, seed, steps, every, per_step, rollouts, changed) -> dict[str, Any]:
  config = knobs.as_dict(dataclasses.replace(
      knobs.Config(rewards=knobs.Rewards(verifier='ends_with')), seed=seed, num_steps=steps)) | {'train_ids': '0' * 64}
  given = {'alloc': {'rule': rule, 'rollouts_per_step': rollouts}, 'tasks': {'per_step': per_step},
           'evaluate': {'rollouts': 4, 'every': every}}
  for values in (given, changed):
    for section, x in values.items():
      config[section] = config.get(section, {}) | x if isinstance(x, dict) else x
  return config


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


class _World:
  """Tasks, a policy of one number, and what is known of the tasks."""

  def __init__(self, rule, seed, tasks, per_step, rollouts, held_out, gain):
    self.random = np.random.default_rng((7, seed))
    self.rule, self.per_step, self.rollouts, self.gain = rule, per_step, rollouts, gain
    self.skill, self.wall_s, self.seen = 1.5, 6.0, calibration.Seen()
    same = np.random.default_rng(3)  # the tasks are those of every run
    self.difficulty_I, self.own_I = same.integers(1, 6, tasks), same.normal(0, 0.7, tasks)
    self.test_difficulty_I, self.test_own_I = 1 + np.arange(held_out) % 5, same.normal(0, 0.7, held_out)
    self.right_I, self.wrong_I, self.solved_I = np.zeros(tasks), np.zeros(tasks), np.full(tasks, False)
    self.tokens = 0

  def rate(self, difficulty, own):
    return _sigmoid(1.2 * (self.skill - difficulty) + own)

  def budgets(self, index_M) -> np.ndarray:
    """An equal number, or more where the rate that is known is near 1/3."""
    if self.rule == 'uniform':
      weight_M = np.ones(self.per_step)
    else:
      p_M = (self.right_I[index_M] + 0.5) / (self.right_I[index_M] + self.wrong_I[index_M] + 1)
      weight_M = 0.1 + p_M * (1 - p_M) ** 2 * 8
    spare = self.rollouts - 2 * self.per_step
    more_M = np.floor(spare * weight_M / weight_M.sum()).astype(int)
    more_M[np.argsort(-weight_M, kind='stable')[:spare - more_M.sum()]] += 1
    return 2 + more_M

  def step(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    index_M = self.random.choice(len(self.own_I), self.per_step, replace=False)
    budget_M, p_M = self.budgets(index_M), self.rate(self.difficulty_I[index_M], self.own_I[index_M])
    forecast = Beta(self.right_I[index_M] + 0.5, self.wrong_I[index_M] + 0.5)
    fault_M = (self.random.random(self.per_step) < 0.05).astype(int)
    verified_M = budget_M - fault_M
    right_M = self.random.binomial(verified_M, p_M)
    mixed_M = (right_M > 0) & (right_M < verified_M)
    tokens = int(self.random.poisson(9 * self.rollouts + 2 * budget_M @ self.difficulty_I[index_M]))
    chosen = self._rollouts(step, index_M, budget_M, right_M, verified_M, forecast)
    self.wall_s += 0.4 + tokens / 2000
    uniform_M = np.full(self.per_step, self.rollouts // self.per_step)
    record = self._record(step, index_M, budget_M, verified_M, right_M, mixed_M, forecast, uniform_M, tokens)
    self.seen = self.seen.add([record])
    self.right_I[index_M] = 0.8 * self.right_I[index_M] + right_M
    self.wrong_I[index_M] = 0.8 * self.wrong_I[index_M] + verified_M - right_M
    self.skill += self.gain * mixed_M.sum()
    return record, chosen

  def _record(self, step, index_M, budget_M, verified_M, right_M, mixed_M, forecast, uniform_M, tokens):
    R, mean_M = self.rollouts, forecast.a_M / (forecast.a_M + forecast.b_M)
    mixing = lambda N_M: 1 - mean_M ** N_M - (1 - mean_M) ** N_M
    bin_M = np.minimum((mean_M * _BINS).astype(int), _BINS - 1)
    no_answer = int(self.random.binomial((verified_M - right_M).sum(), 0.3))
    faults = int((budget_M - verified_M).sum())
    counts = {'groups': self.per_step, 'truncated_without_answer': no_answer // 2,
              **dict.fromkeys(verdicts.OUTCOMES[1:], 0), 'right': int(right_M.sum()),
              'wrong': int((verified_M - right_M).sum()) - no_answer, 'no_answer': no_answer, 'timeout': faults}
    examples = {'verification_examples': {NAME: {
        'no_answer': ['I do not know.'], 'wrong': ['3+4=8']}}}
    return {
        'step': step, 'wall_s': round(self.wall_s, 3), 'reward_mean': float(right_M.sum() / verified_M.sum()),
        'success_rate': float(right_M.sum() / verified_M.sum()),
        'effective_gradient_ratio': float(budget_M[mixed_M].sum() / R),
        'expected_gradient_ratio': float(budget_M @ mixing(budget_M) / R),
        'uniform_gradient_ratio': float(uniform_M @ mixing(uniform_M) / R),
        'mixed_tasks': int(mixed_M.sum()), 'expected_mixed_tasks': float(mixing(budget_M).sum()),
        'uniform_mixed_tasks': float(mixing(uniform_M).sum()),
        'objective': float(mixing(budget_M) @ (mean_M * (1 - mean_M) ** 2)),
        'uniform_objective': float(mixing(uniform_M) @ (mean_M * (1 - mean_M) ** 2)), 'nu': 2.0,
        'budget_min': int(budget_M.min()), 'budget_max': int(budget_M.max()), 'rollouts_total': R,
        'tokens_generated': tokens, 'truncated': no_answer / R / 2, 'slot_utilization': 0.9, 'tail_share': 0.05,
        'refills': 3, 'tokens_per_s': 2000.0, 'tokens_prefilled': 10 * self.per_step, 'entropy': 0.8,
        'step_s': 0.4 + tokens / 2000, 'length_mean': tokens / R, 'learning_rate': 1e-4,
        'unverified': faults / R, 'no_answer': no_answer / R,
        **{f'unverified_{kind}': counts[kind] for kind in health.UNVERIFIED},
        **calibration.of_step(forecast, right_M, verified_M, self.seen),
        'budget_by_success_rate': [
            float(budget_M[bin_M == i].mean()) if np.any(bin_M == i) else None for i in range(_BINS)],
        'group_index': index_M.tolist(), 'group_right': right_M.tolist(), 'group_verified': verified_M.tolist(),
        'group_budget': budget_M.tolist(), 'verification': {NAME: counts}, **(examples if step == 0 else {}),
        'alarms': [f'step {step}: unverified and left out: {faults} of {R} rollouts ({NAME} timeout {faults})'
                   ] if faults and step == 0 else [],
        'loss': 0.01, 'grad_norm': 0.7, 'tokens_updated': tokens - 20, 'padding_waste': 0.2, 'attention_waste': 0.05,
        'logp_error': 1e-6, 'policy_fidelity': 0.995, 'argmax_agreement': 0.999, 'clip_fraction_first': 0.0,
        'clip_fraction_low': 0.0, 'clip_fraction_high': 0.0, 'policy_entropy': 0.8, 'ratio_p01': 0.9,
        'ratio_p50': 1.0, 'ratio_p99': 1.1, 'compile_count': 20}

  def _rollouts(self, step, index_M, budget_M, right_M, verified_M, forecast) -> list[dict[str, Any]]:
    """One of each of the step's tasks, as record/rollouts.py keeps them; the right one where there is one."""
    found = []
    low_M, high_M = scores.interval(np.stack([
        forecast.a_M + forecast.b_M, forecast.a_M, forecast.a_M, np.ones(self.per_step), np.zeros(self.per_step)], 1))
    for m, i in enumerate(index_M):
      n, right = int(verified_M[m]), int(right_M[m])
      status = 'all_right' if right == n else 'mixed' if right else 'all_wrong'
      new = right > 0 and not self.solved_I[i] and self.right_I[i] + self.wrong_I[i] > 0
      self.solved_I[i] |= right > 0
      answer, verdict = str(20 + int(i)), 'right' if right else 'wrong'
      said = answer if right else str(int(answer) + 1)
      found.append({
          'step': step, 'task': f'arithmetic-{i}', 'source': 'arithmetic', 'verifier': 'ends_with',
          'difficulty': int(self.difficulty_I[i]), 'prompt': f'{i}+20=', 'completion': f' {said}', 'answer': answer,
          'extracted': said, 'verdict': verdict, 'reward': float(right > 0), 'advantage': 1.0 if right else -1.0,
          'budget': int(budget_M[m]), 'right_in_group': right, 'verified_in_group': n,
          'estimate': {'mean': float(forecast.a_M[m] / (forecast.a_M[m] + forecast.b_M[m])),
                       'low': float(low_M[m]), 'high': float(high_M[m])},
          'ended': 'stop', 'length': 3, 'status': status,
          'why': (['mixed'] if status == 'mixed' else []) + (['new_success'] if new else []) or ['chosen']})
    return found

  def evaluation(self, step: int) -> dict[str, Any]:
    self.wall_s += 0.5
    p_I = self.rate(self.test_difficulty_I, self.test_own_I)
    right_I, verified_I = self.random.binomial(4, p_I), np.full(len(p_I), 4)

    def estimate(name, in_I):
      x_I = right_I[in_I] / 4
      mean, error = float(x_I.mean()), float(x_I.std(ddof=1) / math.sqrt(len(x_I)))
      return {f'eval/{name}': mean, f'eval/{name}_stderr': error, f'eval/{name}_low': max(mean - 1.96 * error, 0.0),
              f'eval/{name}_high': min(mean + 1.96 * error, 1.0)}

    found = estimate('avg@4', np.full(len(p_I), True)) | {'eval/avg@4_left_out': 0}
    for d in np.unique(self.test_difficulty_I):
      found |= estimate(f'difficulty_{d}/avg@4', self.test_difficulty_I == d)
    return {'step': step, 'wall_s': round(self.wall_s, 3), 'eval/unverified': 0.0, 'eval/no_answer': 0.1,
            **{f'eval/unverified_{kind}': 0 for kind in health.UNVERIFIED}, 'eval/failed_extractions': 0, **found,
            'eval_tasks': {'right': right_I.tolist(), 'verified': verified_I.tolist()}}


def ledger_lines(records: list[dict[str, Any]], *, kills: int = 0, device: str = 'TPU v5 lite') -> list[dict[str, Any]]:
  """The lines of ledger.jsonl of a run with these metrics; after a kill two steps are done again."""
  steps = [r for r in records if 'reward_mean' in r]
  evaluated = {r['step'] for r in records if 'reward_mean' not in r}
  at = sorted({len(steps) * (i + 1) // (kills + 1) for i in range(kills)})
  lines, clock, begin = [], _Clock(1.7e9), 0
  for attempt, end in enumerate([*at, len(steps)]):
    clock.wall_s += 30.0 * (attempt > 0)  # until it was started again
    lines.append({
        'attempt': attempt, 'started': clock.wall_s, 'first_step': begin, 'commit': 'abc1234', 'device_kind': device,
        'devices': 8, 'processes': 1, 'cores': 2, 'platform': 'tpu' if 'TPU' in device else 'cpu',
        'memory': 'device' if 'TPU' in device else 'host', 'energy': None, 'hardware': None,
        'parameters': PARAMETERS, 'weights_compression': 0.5, 'cache_compression': 0.25,
        'versions': {'jax': '0.10.2', 'kr_jax': '0.12.0'}})
    entry = lambda step, phase, wall_s, **more: lines.append(clock.entry(attempt, step, phase, wall_s, **more))
    entry(begin, 'start', 4.0)
    entry(begin, 'restore' if begin else 'data', 1.0)
    entry(begin, 'compile', 6.0, compiles=20)
    for record in steps[begin:end]:
      _of_step(entry, record, record['step'] in evaluated)
    if end == len(steps):
      entry(end, 'evaluate', 0.5, rollouts=64, tokens_generated=600, tokens_prompt=160)
      entry(end, 'report', 0.5)
      lines.append({'attempt': attempt, 'ended': clock.wall_s, 'reason': 'done'})
    begin = max(0, end - 2)
  return lines


class _Clock:

  def __init__(self, wall_s: float):
    self.wall_s = wall_s

  def entry(self, attempt, step, phase, wall_s, *, busy=0.0, peak=None, **counters) -> dict[str, Any]:
    began, self.wall_s = self.wall_s, self.wall_s + wall_s
    return {'attempt': attempt, 'step': step, 'phase': phase, 'began': began, 'wall_s': wall_s,
            'device_s': 8 * wall_s, 'busy_s': busy * wall_s, 'peak_bytes': peak, 'joules': None, **counters}


def _of_step(entry, record: dict[str, Any], evaluates: bool) -> None:
  """The entries of a step, of an evaluation before it, and of a checkpoint after every fourth."""
  step, tokens, R = record['step'], record['tokens_generated'], record['rollouts_total']
  if evaluates:
    entry(step, 'evaluate', 0.5, busy=0.8, peak=200 * 2 ** 20, rollouts=64, tokens_generated=600, tokens_prompt=160)
  useful = 2 * PARAMETERS * tokens
  entry(step, 'allocate', 0.02)
  entry(step, 'sample', tokens / 4000, busy=0.95, peak=300 * 2 ** 20, rollouts=R, tokens_generated=tokens,
        tokens_prompt=record['tokens_prefilled'], flops_useful=useful, flops_executed=int(1.2 * useful),
        collective_bytes=10 * PARAMETERS, host_bytes=4 * tokens)
  entry(step, 'verify', 0.1)
  entry(step, 'pack', 0.03)
  entry(step, 'update', tokens / 6000 + 0.2, busy=0.97, peak=500 * 2 ** 20, tokens_updated=record['tokens_updated'],
        tokens_computed=tokens + record['tokens_prefilled'], tokens_padded=tokens // 4, flops_useful=3 * useful,
        flops_executed=4 * useful, collective_bytes=24 * PARAMETERS, host_bytes=8 * tokens)
  entry(step, 'record', 0.01)
  if step % 4 == 3:
    entry(step, 'checkpoint', 0.05, checkpoint_bytes=12 * PARAMETERS)
