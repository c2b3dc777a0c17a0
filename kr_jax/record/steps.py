"""What a step leaves in the record: a line of metrics, written one step late.

A step's figures are fetched while the device samples the next one, so that the device never waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import time
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from kr_jax import health
from kr_jax import knobs
from kr_jax import processes
from kr_jax import rewards
from kr_jax import types
from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.allocation import value
from kr_jax.costs import hardware as hardware_lib
from kr_jax.learning import grpo
from kr_jax.learning import measurements
from kr_jax.record import bad_steps
from kr_jax.record import calibration
from kr_jax.record import metrics
from kr_jax.record import rollouts as rollouts_lib
from kr_jax.record import terminal
from kr_jax.rewards import verdicts
from kr_jax.types import Array

_BINS = 10  # of estimated success rates, in which budgets are averaged
_CLIPPED = 0.01  # share of the first update's tokens: if more are clipped, it is said


class Learnt(NamedTuple):
  """What the update of a step learns from: M tasks and R rollouts, some of which may be none."""

  tasks_M: Sequence[types.Task]
  budget_M: np.ndarray
  rollouts: types.Rollouts  # verified or not
  scores: rewards.Scores
  row_L: np.ndarray | None = None  # where its rollouts stand among all of the step, in order; None: they are all


def measure(alloc: knobs.Alloc, stats: types.TaskStats, budget_M: np.ndarray, rollouts: types.Rollouts,
            slots: int, sample_s: float, scores: rewards.Scores, seen: calibration.Seen = calibration.Seen(), *,
            uniform_index_M: np.ndarray | None = None, counts_evidence: bool = False, logp_sum: Array | None = None,
            learnt_L: np.ndarray | None = None, belief_M: value.Beta | None = None) -> dict[str, Any]:
  """The figures of a step but for those of its update and the counts of its verdicts.

  Rewards and success are of verified rollouts, None where there is none; `effective_gradient_ratio` is the share of
  all rollouts that are verified, in a group of both verdicts, and not discarded. What is expected is so under the
  posterior, whatever the estimate that the budgets came from, so that rules can be compared: of the step's budgets, and
  of as many rollouts spread evenly (`uniform_...`). With waves the objective of the budgets is None: each wave had its
  own.

  Args:
    stats: from before the step.
    budget_M: of all waves.
    slots: rollouts that each shard decoded at once.
    sample_s: seconds that sampling took.
    seen: of the steps before.
    uniform_index_M: rows of the tasks that uniform budgets would go to; None: those of the step.
    counts_evidence: as of allocate.of_step.
    logp_sum: the sum of rollouts.logp_RC, asked for before the update, which it would have to wait for.
    learnt_L: the rollouts that the update learns from, as Learnt.row_L.
    belief_M: estimate.posterior of stats, which takes time; None: it is asked for.
  """
  n, tokens = int(budget_M.sum()), int(np.asarray(rollouts.length_R).sum())
  verified_R, M = scores.verified_R, len(budget_M)
  task_R = np.where(verified_R, rollouts.task_R, M)
  success_rate_M = belief_M or estimate.posterior(stats, rollouts.prompts.index_M)
  uniform = success_rate_M if uniform_index_M is None else estimate.posterior(stats, uniform_index_M)
  uniform_M = n // len(uniform.a_M) + (np.arange(len(uniform.a_M)) < n % len(uniform.a_M))
  objective = _objective(alloc, stats, counts_evidence)
  mixed_M = grpo.mixed_tasks(scores.verdict_R, task_R, M)
  effective_R = np.append(mixed_M, False)[task_R]
  right_WM = _by_wave(rollouts, verified_R * scores.verdict_R, M)
  verified_WM = _by_wave(rollouts, verified_R, M)
  expected_tasks, expected_rollouts = calibration.expected_mixed(
      success_rate_M, _by_wave(rollouts, np.ones(len(task_R)), M), right_WM, verified_WM - right_WM)
  mean = lambda x_R: float(x_R[verified_R].mean(dtype=float)) if verified_R.any() else None
  bin_M = np.minimum((estimate.mean_rate(success_rate_M) * _BINS).astype(int), _BINS - 1)
  return {
      'reward_mean': mean(scores.reward_R),
      'success_rate': mean(scores.verdict_R),
      'effective_gradient_ratio': float(effective_R[slice(None) if learnt_L is None else learnt_L].sum() / n),
      'expected_gradient_ratio': expected_rollouts / n,
      'uniform_gradient_ratio': allocate.expected_gradient_ratio(uniform, uniform_M),
      'mixed_tasks': int(mixed_M.sum()),
      'expected_mixed_tasks': expected_tasks,
      'uniform_mixed_tasks': allocate.expected_mixed_tasks(uniform, uniform_M),
      'objective': objective(success_rate_M, budget_M) if alloc.waves == 1 else None,
      'uniform_objective': objective(uniform, uniform_M),
      'nu': estimate.nu(stats, default=alloc.nu),
      'budget_min': int(budget_M.min()),
      'budget_max': int(budget_M.max()),
      'rollouts_total': n,
      'tokens_generated': tokens,
      'length_mean': tokens / n,
      'truncated': float(np.sum(np.asarray(rollouts.ended_R) == types.ENDED_LENGTH) / n),
      'slot_utilization': tokens / (int(rollouts.decode_steps) * slots),
      'tail_share': int(rollouts.tail_steps) / int(rollouts.decode_steps),
      'refills': int(rollouts.refills),
      'tokens_per_s': tokens / sample_s,  # of the sampler
      'tokens_prefilled': int(np.asarray(rollouts.prompts.length_M)[budget_M > 0].sum()),
      # The sampled tokens' mean -log p: an unbiased estimate, over all rollouts.
      'entropy': -float(jnp.sum(rollouts.logp_RC) if logp_sum is None else logp_sum) / tokens,
      **health.totals(scores.outcome_R),
      **calibration.of_step(success_rate_M, right_WM.sum(axis=0), verified_WM.sum(axis=0), seen),
      'budget_by_success_rate': [
          float(budget_M[bin_M == i].mean()) if np.any(bin_M == i) else None for i in range(_BINS)],
      # What came of each task, in the order of the step.
      'group_index': np.asarray(rollouts.prompts.index_M).tolist(),
      'group_budget': budget_M.tolist(),
      'group_right': right_WM.sum(axis=0).astype(int).tolist(),
      'group_verified': verified_WM.sum(axis=0).astype(int).tolist(),
  }


def _objective(alloc: knobs.Alloc, stats: types.TaskStats, counts_evidence: bool) -> Callable[..., float]:
  """The summed value of (success_rate, budget_M), of what allocate.of_step maximises."""
  all_I = estimate.posterior(stats, np.arange(len(stats.rollouts_I)))
  return lambda success_rate, budget_M: allocate.objective(
      success_rate, budget_M, alloc.value, estimate.nu(stats, default=alloc.nu),
      evidence_M=success_rate.a_M + success_rate.b_M if counts_evidence else None,
      failure_rate=1 - float(estimate.mean_rate(all_I).mean()))


def _by_wave(rollouts: types.Rollouts, x_R: np.ndarray, num_tasks: int) -> np.ndarray:
  """The sums of x over the rollouts of each wave and task, x_WM; there is one wave where the rollouts name none."""
  wave_R = np.zeros(len(x_R), int) if rollouts.wave_R is None else np.asarray(rollouts.wave_R)
  x_WM = np.zeros((wave_R.max(initial=0) + 1, num_tasks + 1))  # the last column is of places without a rollout
  np.add.at(x_WM, (wave_R, np.asarray(rollouts.task_R)), x_R)
  return x_WM[:, :-1]


def _of_all(x_R: np.ndarray, row_L: np.ndarray | None, rows: int) -> np.ndarray:
  """What is known of the rollouts that an update learns from, in the rows of all; nan of the others."""
  if row_L is None:
    return x_R
  of_all_R = np.full(rows, np.nan)
  of_all_R[row_L] = x_R[:len(row_L)]
  return of_all_R


class Record:
  """What a run leaves: metrics.jsonl and what other sinks get of it, rollouts to read, messages and a progress bar.

  Args:
    first_step: the step that the run goes on from; what the record holds beyond it is dropped.
    decode: tokens -> text.
    learning_rate: of the number of updates before.
    answers: as rollouts.Sampler takes it.
    began: unix time at which the process did; None: now.
    on_line: as metrics.Writer takes it.
    names: of the arrays that an update measures.
    last_good: names the latest checkpoint; None: there is none.
  """

  def __init__(self, config: knobs.Config, workdir: str, first_step: int, decode: Callable[[np.ndarray], str],
               learning_rate: optax.Schedule, answers: Callable[..., rewards.Answers] | None = None,
               began: float | None = None, on_line: Callable[[dict[str, Any]], None] | None = None, *,
               names: bad_steps.Names, last_good: Callable[[], str | None] = lambda: None):
    self._config, self._decode, self._first_step, self.last_good = config, decode, first_step, last_good
    updates = config.optimizer.epochs * config.optimizer.minibatches
    # All at once and now, as the devices are busy later.
    self._rate_S = np.asarray(learning_rate(jnp.arange(config.num_steps) * updates))
    self._last = None  # step, figures, histograms, and the measurements of the update, still on the device
    self._shown = {}  # on the bar, beside a step's figures
    self._has_evaluated = False  # so that its programs are compiled
    # An evaluation of step k was taken before that step.
    is_evaluation = lambda record: 'reward_mean' not in record
    self._writer = metrics.Writer(
        workdir, first_step=first_step, keep=lambda record: record['step'] < first_step or (
            record['step'] == first_step and is_evaluation(record)),
        record=config.record, config=knobs.as_dict(config), on_line=on_line)
    self._writer.event('start', at=began)
    self._writer.event('ready')
    self._rollouts = rollouts_lib.Sampler(
        workdir, decode, rollouts=config.record.rollouts, megabytes=config.record.rollouts_mb, seed=config.seed,
        verifier=config.rewards.verifier, stop_strings=config.sample.stop_strings, answers=answers)
    self._bar = processes.progress(config.alloc.rule, first_step, config.num_steps)
    self._compiles = metrics.CompileCount()
    self._health = health.Watch(
        ((record['step'], record['verification']) for record in self._writer.records if 'verification' in record),
        seed=config.seed)
    self._seen = calibration.Seen().add(self._writer.records)
    self._bad = bad_steps.Watch(workdir, config.train.max_bad_steps, self._writer.records, names, last_good)
    evaluations = [record for record in self._writer.records if f'eval/{self._score}' in record]
    # By the steps before which it was evaluated.
    self._success = {record['step']: record[f'eval/{self._score}'] for record in evaluations}
    self._last_evaluation = evaluations[-1] if evaluations else None
    # wall_s counts seconds from here, and leaves out the time in which a run was stopped.
    before = [record.get('wall_s', 0.0) for record in self._writer.records]
    self._start = time.monotonic() - max(before, default=0.0)
    self._writer.records.clear()  # a run of many steps has many
    self._mark = time.monotonic()  # the end of the last step or evaluation
    self._compiled_s = 0.0  # when the bar heard of it last

  def __enter__(self) -> Record:
    return self

  def __exit__(self, *_) -> None:
    self._compiles.close()
    self._rollouts.flush()
    self._bar.close()
    self._writer.event('end')
    self._writer.close()

  @property
  def _score(self) -> str:
    return f'avg@{self._config.evaluate.rollouts}'

  def has_evaluation(self, step: int) -> bool:
    return step in self._success

  def success(self, step: int) -> float | None:
    """Held-out success before a step, avg@n; None: it was not evaluated, or this is not the first process."""
    return self._success.get(step)

  @contextlib.contextmanager
  def evaluating(self) -> Iterator[Callable[[int, int], None]]:
    """An evaluation, which has a bar: yields a function of the rollouts that are done and of all."""
    self.flush()
    self.flush_rollouts()  # for the page
    began = time.monotonic()
    self._writer.event('evaluation')
    try:
      compiled_s = None if self._has_evaluated else lambda: self._compiles.seconds
      with processes.progress_to('evaluate', 'rollout', compiled_s=compiled_s) as show:
        yield show
    finally:
      self._has_evaluated = True
      self._writer.event('evaluated')
      self._leave_out(time.monotonic() - began)

  def _leave_out(self, seconds: float) -> None:
    """Leaves seconds of this moment out of the bar's rate."""
    self._compiled_s = self._compiles.seconds  # whatever was compiled in them
    self._bar.leave_out(seconds)
    self._mark = time.monotonic()

  def evaluation(self, step: int, measured: dict[str, Any]) -> None:
    """Writes an evaluation that was taken before a step. measured: as of evaluate.record."""
    self.flush()
    record = {'step': step, 'wall_s': self._wall_s(), **measured}
    before, self._last_evaluation = self._last_evaluation, record
    self._success[step] = measured[f'eval/{self._score}']
    self._writer.write(record)
    self._shown['eval'] = _number(measured[f'eval/{self._score}'], '.3f')
    self._bar.write(terminal.evaluation(record, before, self._score))

  def step(self, step: int, stats: types.TaskStats, tasks_M: Sequence[types.Task], budget_M: np.ndarray,
           rollouts: types.Rollouts, slots: int, sample_s: float, scores: rewards.Scores,
           measured: list[dict[str, Any]], *, uniform_index_M: np.ndarray | None = None, logp_sum: Array | None = None,
           learnt: Learnt | None = None) -> None:
    """Notes a step, for `flush` to write; keeps some of its rollouts; says what is wrong with its verdicts.

    Args:
      rollouts: all, verified or not.
      measured: as of update.step.
      learnt: what the update learnt from; None: all.
      The others: as of `measure`.
    """
    learnt = learnt or Learnt(tasks_M, budget_M, rollouts, scores)
    belief_M = estimate.posterior(stats, rollouts.prompts.index_M)
    figures = measure(
        self._config.alloc, stats, budget_M, rollouts, slots, sample_s, scores, self._seen,
        uniform_index_M=uniform_index_M, counts_evidence=self._config.grpo.uses_past, logp_sum=logp_sum,
        learnt_L=learnt.row_L, belief_M=belief_M)
    self._seen = self._seen.add([figures])
    now = time.monotonic()
    length_R = np.asarray(rollouts.length_R)
    histograms = {'budgets': budget_M, 'lengths': length_R[length_R > 0], 'rewards': scores.reward_R[scores.verified_R]}
    figures |= self._verified(step, tasks_M, rollouts, scores) | {
        'learning_rate': float(self._rate_S[step]), 'step_s': now - self._mark}
    advantage_R = measured[0].get('advantage_R')
    self._rollouts.step(step, stats, tasks_M, budget_M, rollouts, scores,
                        None if advantage_R is None else _of_all(np.asarray(advantage_R), learnt.row_L, len(length_R)),
                        belief_M)
    batch = functools.partial(bad_steps.batch, step, stats, *learnt[:4])
    self._last, self._mark = (step, figures, histograms, measured, batch), now

  def _verified(self, step: int, tasks_M: Sequence[types.Task], rollouts: types.Rollouts, scores: rewards.Scores
                ) -> dict[str, Any]:
    """What a step's line says of its verdicts; says what is wrong with them."""
    row_X, token_XC = processes.own_rows(rollouts.token_RC)
    task_R, ended_R, length_R = (np.asarray(x) for x in (rollouts.task_R, rollouts.ended_R, rollouts.length_R))
    place = {r: x for x, r in enumerate(row_X.tolist())}
    text = lambda r: self._decode(token_XC[place[r]][:length_R[r]])
    name_M = health.names(tasks_M, self._config.rewards.verifier)

    def wrong_example(name: str) -> str:
      for r in row_X[::-1].tolist():
        if scores.outcome_R[r] == verdicts.WRONG and name_M[task_R[r]] == name:
          return health.wrong_example(text(r), tasks_M[task_R[r]].answer)
      return ''

    found = health.counts(scores.outcome_R, ended_R, task_R, name_M)
    examples = self._health.look(step, found, health.Rollouts(
        tasks_M, name_M, task_R, ended_R, scores.outcome_R, row_X[length_R[row_X] > 0], text), scores.examples)
    alarms = self._health.step(step, found, scores.examples, wrong_example)
    for message in alarms:
      self._bar.write(message, alarm=True)
    for message in self._health.notices:
      self._bar.write(message)
    return {'verification': found, 'alarms': alarms} | ({'verification_examples': examples} if examples else {})

  def costs(self, step: int, entries: Sequence[dict[str, Any]], about: dict[str, Any],
            hardware: hardware_lib.Hardware | None) -> None:
    """Tells the sinks what a step cost. entries, about: as the ledger has them."""
    self._writer.costs(step, entries, about, hardware)

  def begin(self, step: int) -> None:
    """Says that a step begins; what the first one runs is compiled first."""
    self._writer.event('step', step)
    if step == self._first_step:
      self._bar.compiling()

  def flush(self) -> None:
    """Writes the last step's record. Raises guard.Diverged once the updates of too many steps were skipped."""
    if self._last is None:
      return
    step, figures, histograms, measured, batch = self._last
    self._last = None
    of_update = measurements.summarize(measured)
    alarms = self._bad.step(of_update['skipped'], measured, batch, step, figures['learning_rate'])
    for message in alarms:
      figures['alarms'].append(message)
      self._bar.write(message, alarm=True)
    if step == 0 and (clipped := of_update['clip_fraction_first'] or 0.0) > _CLIPPED:
      figures['alarms'].append(self._clipped(clipped))
      self._bar.write(figures['alarms'][-1], alarm=True)
    self._writer.write({'step': step, 'wall_s': self._wall_s(), **figures, **of_update,
                        'compile_count': self._compiles.count}, histograms)
    self._bad.check()
    unverified = {'unverified': f'{figures["unverified"]:.0%}'} if figures['unverified'] else {}
    self._bar.set_postfix(
        reward=_number(figures['reward_mean'], '.2f'), **unverified,
        gradient=f'{figures["effective_gradient_ratio"]:.2f}'
                 f' (expected {figures["expected_gradient_ratio"]:.2f}, of uniform'
                 f' {figures["uniform_gradient_ratio"]:.2f})',
        budgets=f'{figures["budget_min"]}-{figures["budget_max"]}', **self._shown, refresh=False)
    self._bar.leave_out(self._compiles.seconds - self._compiled_s)
    self._compiled_s = self._compiles.seconds
    self._bar.update()

  def flush_rollouts(self) -> None:
    """Writes the kept rollouts that wait, as none of them is sampled again once their step is in a checkpoint."""
    self._rollouts.flush()

  def _clipped(self, share: float) -> str:
    """What is said where the first update clips tokens: the policy has not moved, so their ratios should be 1."""
    c = self._config.grpo
    return (f'step 0: {share:.1%} of the tokens were clipped before the policy had moved: the '
            f'log-probabilities of sampler and trainer differ by more than grpo.clip_low={c.clip_low:g} and '
            f'grpo.clip_high={c.clip_high:g} allow. Set grpo.tis_cap=2, which takes ratios to the trainer\'s own and '
            "weighs the difference, or policy.dtype='float32', or wider bounds")

  def _wall_s(self) -> float:
    return round(time.monotonic() - self._start, 3)


def _number(x: float | None, form: str) -> str:
  return 'unknown' if x is None else format(x, form)
