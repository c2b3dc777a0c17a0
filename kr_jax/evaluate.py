"""Success on held-out tasks, by the program that samples in training.

    avg@R  = c / n                             of a task's n verified rollouts of R, c of them right
    pass@k = 1 - C(n-c, k) / C(n, k)           that one of k is right
    maj@k  = E[the majority answer of k is right]

all means over tasks. pass@k and maj@k are expectations over k of the n rollouts, drawn without
replacement: unbiased for k new rollouts, and computed exactly, not by drawing. The majority answer is the one that
most of the k give; where several tie, each is chosen with equal chance; a rollout without an answer has no vote.

Each task has an n of its own, as unverified rollouts are left out. A task with n < k, or with n = 0 for avg@R, is left
out of that metric and counted. So the metrics are those of all rollouts as far as rollouts are unverified by chance;
where they are unverified because they are long or wrong, the metrics are of the others.

The tasks are the independent draws: the standard error is that of the mean over tasks, and the interval
is the 95 % percentile bootstrap over tasks, from a seed that never changes. The sampling keys are folded
from an evaluation key that never changes with the step: evaluations of one run share their noise, and
their differences are sharper than their errors say.

Here R is the rollouts of a task. Source of pass@k: Chen et al. 2021, arXiv 2107.03374, eq. 1.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import hashlib
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

from kr_jax import completions
from kr_jax import health
from kr_jax import processes
from kr_jax import rewards
from kr_jax import sample
from kr_jax import tasks as tasks_lib
from kr_jax import types
from kr_jax.model import policy
from kr_jax.rewards import verdicts

_RESAMPLES, _SEED = 4000, 0  # of the bootstrap


class Outcomes(NamedTuple):
  """What R rollouts of each of I tasks came to."""

  outcome_IR: np.ndarray  # int8, of verdicts.OUTCOMES
  answer_IR: np.ndarray | None  # uint64, a number of each answer, 0: no answer; None where not asked for
  failed_extractions: int = 0  # answers that did not come: their rollouts have no vote

  @property
  def right_IR(self) -> np.ndarray:
    return self.outcome_IR == verdicts.RIGHT

  @property
  def verified_IR(self) -> np.ndarray:
    return np.isin(self.outcome_IR, verdicts.VERIFIED)


def check_verifiers(verifiers: Sequence[str], maj_at: Sequence[int]) -> None:
  """Raises ValueError for a vote on answers that a verifier of the tasks has no extraction for."""
  for verifier in verifiers:
    if maj_at and verifier not in rewards.ANSWERS:
      raise ValueError(
          f'evaluate.maj_at={tuple(maj_at)} votes on answers, and the verifier {verifier!r} has no '
          f'extraction of them in rewards.ANSWERS, only {sorted(rewards.ANSWERS)}; add one, or set '
          'evaluate.maj_at=()')


def outcomes(policy_config: policy.Config, params: Any, tasks: Sequence[types.Task], key: jax.Array,
             sample_config: sample.Config, workers: rewards.Workers, tokenizer, *, rollouts: int,
             batch: int, answers: bool = False) -> Outcomes:
  """Samples and verifies R = rollouts completions of each task.

  Args:
    batch: tasks a compiled program takes; the last batch is filled up with tasks it then drops.
    answers: whether to extract answers, for a vote.
  """
  R = rollouts
  outcome_IR, answer_IR, failed = [], [], 0
  for i in range(0, len(tasks), batch):
    some = list(tasks[i:i + batch])
    filled = (some * batch)[:batch]
    sampled = sample.rollouts(
        policy_config, params, tasks_lib.prompts(filled, sample_config.prompt_length),
        np.full(batch, R), key, sample_config, total=batch * R)
    sampled = completions.apply_stop_strings(sampled, tokenizer.decode, sample_config)
    n = len(some) * R
    row_X, texts = completions.texts(sampled, tokenizer.decode)
    row_X = row_X[row_X < n]
    task_X = [some[r // R] for r in row_X]
    texts, again = itertools.tee(itertools.islice(texts, len(row_X)))
    of_tasks = lambda x_X: processes.merge_rows(row_X, x_X, n).reshape(len(some), R)
    outcome_IR.append(of_tasks(workers.score(texts, task_X).outcome_R))
    if answers:
      found = workers.answers(again, task_X)
      answer_IR.append(of_tasks(np.array([_number(x) for x in found.answer_R], np.uint64)))
      failed += found.timeouts + found.errors
  return Outcomes(np.concatenate(outcome_IR), np.concatenate(answer_IR) if answers else None,
                  int(processes.gather(np.array(failed)).sum()))


def _number(answer: str | None) -> int:
  """Of 64 bits, the same where answers are and, but for one chance in 2^64, only there; 0: no answer."""
  return 0 if answer is None else int.from_bytes(
      hashlib.sha256(answer.encode(errors='surrogatepass')).digest()[:8], 'little') or 1


def avg(right_IR: np.ndarray, verified_IR: np.ndarray) -> np.ndarray:
  """Each task's share of right rollouts among the verified ones; NaN without one. Returns avg_I, float64."""
  n_I = verified_IR.sum(axis=1)
  return np.where(n_I > 0, (right_IR & verified_IR).sum(axis=1) / np.maximum(n_I, 1), np.nan)


def pass_at(right_IR: np.ndarray, verified_IR: np.ndarray, k: int) -> np.ndarray:
  """Each task's chance that one of k of its verified rollouts is right; k >= 1.

  Returns pass_I, float64; NaN where fewer than k are verified.
  """
  counts_I2 = np.stack([verified_IR.sum(axis=1), (right_IR & verified_IR).sum(axis=1)], axis=1)
  counts_X2, index_I = np.unique(counts_I2, axis=0, return_inverse=True)
  # C(n-c, k) / C(n, k) = prod_{n-c < i <= n} (1 - k/i), as binomials overflow; 0 where any i <= k.
  pass_X = [1 - np.prod(1 - np.minimum(k / np.arange(n - c + 1, n + 1), 1)) if n >= k else np.nan
            for n, c in counts_X2]
  return np.array(pass_X)[index_I.ravel()]


def maj_at(right_IR: np.ndarray, verified_IR: np.ndarray, answer_IR: np.ndarray, k: int) -> np.ndarray:
  """Each task's chance that the majority answer of k of its verified rollouts is right; k >= 1.

  An answer is as right as the share of its verified rollouts that are: 0 or 1, unless the verifier reads more than
  the answer. Returns majority_I, float64; NaN where fewer than k are verified.
  """
  return np.array([_majority(right_R[verified_R], answer_R[verified_R], k)
                   for right_R, verified_R, answer_R in zip(right_IR, verified_IR, answer_IR)])


@functools.lru_cache
def _draw(n: int, k: int) -> np.ndarray:
  """[m, x]: that x of an answer's m votes are among the k of n, by independent draws of k/n each.

  Given that they make k in all, which `_majority` divides by, that is what draws without replacement do.
  """
  return stats.binom.pmf(np.arange(k + 1), np.arange(n + 1)[:, None], k / n)


def _majority(right_R: np.ndarray, answer_R: np.ndarray, k: int) -> float:
  """maj@k of one task, of its verified rollouts."""
  n = len(right_R)
  if n < k:
    return np.nan
  draw = _draw(n, k)
  votes: dict[int, list[bool]] = {}
  for right, answer in zip(right_R, answer_R):
    if answer:
      votes.setdefault(answer, []).append(bool(right))
  silent = n - sum(map(len, votes.values()))
  wins = 0.0
  for answer, rights in votes.items():
    others = [len(x) for other, x in votes.items() if other != answer]
    for most in np.flatnonzero(draw[len(rights)]) if any(rights) else ():
      if most > 0:
        wins += (np.mean(rights) * draw[len(rights), most]
                 * _no_other_has_more(draw, silent, others, most, k - most))
  return min(wins / draw[n, k], 1.0)  # rounding may add to 1


def _no_other_has_more(draw: np.ndarray, silent: int, others: Sequence[int], most: int, left: int) -> float:
  """The chance that other answers have `left` of the draws, none more than `most`, times the chance
  that the answer with `most` is chosen: 1 / (1 + answers that tie with it)."""
  chance = np.zeros((left + 1, left // most + 1))  # [draws, ties]
  chance[:, 0] = draw[silent, :left + 1]
  for m in others:
    added = np.zeros_like(chance)
    for x in range(min(m, most, left) + 1):
      tie = int(x == most)
      added[x:, tie:] += draw[m, x] * chance[:left + 1 - x, :chance.shape[1] - tie]
    chance = added
  return float(np.sum(chance[left] / np.arange(1, chance.shape[1] + 1)))


def interval(x_I: np.ndarray) -> tuple[float, float]:
  """95 % percentile bootstrap interval of the mean over tasks, from a fixed seed."""
  # Tasks of one value are exchangeable: how often each of the X values is drawn is all of a resample.
  value_X, count_X = np.unique(x_I, return_counts=True)
  drawn = np.random.default_rng(_SEED).multinomial(len(x_I), count_X / len(x_I), size=_RESAMPLES)
  low, high = np.quantile(drawn @ value_X / len(x_I), (0.025, 0.975))
  return float(low), float(high)


def summarize(found: Outcomes, tasks: Sequence[types.Task], source_I: Sequence[str], *,
              passes: Sequence[int] = (), majorities: Sequence[int] = ()) -> dict[str, Any]:
  """Every metric over all tasks, by source and by difficulty; plain values, as JSON has them.

  Args:
    source_I: where each task comes from: its dataset.
    passes: the k of pass@k.
    majorities: the k of maj@k; they need answers.

  Returns:
    {'verification': health.totals and 'failed_extractions', 'groups': {'all' | 'source_NAME' | 'difficulty_D':
    {'tasks': count, 'metrics': {'avg@8': {'mean', 'stderr', 'low', 'high', 'left_out': tasks}, ...}}}}. All but
    'left_out' is None where every task is left out.
  """
  right_IR, verified_IR = found.right_IR, found.verified_IR
  metric_I = {f'avg@{right_IR.shape[1]}': avg(right_IR, verified_IR)}
  metric_I |= {f'pass@{k}': pass_at(right_IR, verified_IR, k) for k in passes}
  metric_I |= {f'maj@{k}': maj_at(right_IR, verified_IR, found.answer_IR, k) for k in majorities}
  is_in = {'all': np.full(len(tasks), True)}
  for name, label_I in (('source', np.array(source_I)),
                        ('difficulty', np.array([task.difficulty for task in tasks]))):
    is_in |= {f'{name}_{label}': label_I == label for label in np.unique(label_I)}

  def estimate(x_I):
    left_out, x_I = int(np.isnan(x_I).sum()), x_I[~np.isnan(x_I)]
    if not len(x_I):
      return dict.fromkeys(('mean', 'stderr', 'low', 'high')) | {'left_out': left_out}
    error = x_I.std(ddof=1) / np.sqrt(len(x_I)) if len(x_I) > 1 else 0.0
    low, high = interval(x_I)
    return {'mean': float(x_I.mean()), 'stderr': float(error), 'low': low, 'high': high, 'left_out': left_out}

  return {
      'verification': health.totals(found.outcome_IR) | {'failed_extractions': found.failed_extractions},
      'groups': {
          group: {'tasks': int(in_I.sum()),
                  'metrics': {name: estimate(x_I[in_I]) for name, x_I in metric_I.items()}}
          for group, in_I in is_in.items()}}


def record(summary: dict[str, Any]) -> dict[str, float | None]:
  """A summary under the names of metrics.jsonl: eval/unverified and its likes, eval/[GROUP/]METRIC, and _stderr, _low,
  _high of it, and _left_out where it is of all tasks."""
  flat = {f'eval/{name}': x for name, x in summary['verification'].items()}
  for group, x in summary['groups'].items():
    for metric, estimate in x['metrics'].items():
      name = f'eval/{metric}' if group == 'all' else f'eval/{group}/{metric}'
      flat |= {name if part == 'mean' else f'{name}_{part}': y for part, y in estimate.items()
               if part != 'left_out' or group == 'all'}
  return flat


def table(summary: dict[str, Any]) -> str:
  """A summary as text: a line a group, a column a metric, with its interval; and what is left out of it."""
  groups, verification = summary['groups'], summary['verification']
  cell = lambda y: 'unknown' if y['mean'] is None else f'{y["mean"]:.3f} [{y["low"]:.3f}, {y["high"]:.3f}]'
  rows = [['', 'tasks', *groups['all']['metrics']]]
  rows += [[group, str(x['tasks']),
            *map(cell, x['metrics'].values())]
           for group, x in groups.items()]
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = [f'{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  '
           + '  '.join(f'{x:<{w}}' for x, w in zip(row[2:], widths[2:])) for row in rows]
  notes = ['mean [95 % bootstrap interval over tasks]']
  if verification['unverified']:
    kinds = ', '.join(f'{kind} {n}' for kind in health.UNVERIFIED if (n := verification[f'unverified_{kind}']))
    left_out = ', '.join(f'{n} of {name}' for name, y in groups['all']['metrics'].items() if (n := y['left_out']))
    notes.append(f'{verification["unverified"]:.1%} of the rollouts are unverified and left out ({kinds}); '
                 f'tasks that are left out: {left_out or "none"}')
  return '\n'.join([*(line.rstrip() for line in lines), *notes])
