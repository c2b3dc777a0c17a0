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

Robustness is the success on the same tasks with perturbed prompts, over the success as they are. A perturbation changes
words of prose alone, by the task's id and nothing else, and keeps what is asked: `perturb` says which words these are.
It costs as much as an evaluation, so that it is a part of --mode=evaluate and of a run's last evaluation alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import hashlib
import itertools
import random
import re
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

# A word of prose begins after a space, has five lower-case letters or more, and is outside of what means what it
# spells: code, LaTeX, quotations, braces and indented lines.
_PROSE = re.compile(
    r'```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\begin\{.*?\\end\{|\{[^{}]*\}'
    r'|"[^"\n]*"|“[^”\n]*”|(?<!\w)\'[^\'\n]*\'(?!\w)|^(?:[ ]{2,}|\t)[^\n]*'
    r'|(?<!\S)(?P<word>[a-z]{5,})(?=[.,;:!?)]*(?:\s|\Z))', re.DOTALL | re.MULTILINE)
# How words of numbers and operators begin. These are no words of prose.
_QUANTITIES = (
    'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten', 'eleven', 'twel', 'thir', 'for',
    'fif', 'twen', 'hundred', 'thousand', 'million', 'half', 'third', 'quarter', 'twice', 'thrice', 'double', 'triple',
    'dozen', 'plus', 'minus', 'times', 'divide', 'square', 'cube', 'percent')
_OPENINGS = ('Here is a problem for you.\n\n', 'Please have a look at this problem.\n\n',
             'I would like to know the following.\n\n', 'Let us try this one.\n\n')
_CHANGED = 0.25  # chance of a word to be changed; one is in any case
_SPELT = ('python_tests', 'reasoning_gym')  # verifiers of tasks whose letters and spaces may be the problem itself


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
             batch: int, answers: bool = False, stopping: processes.StopSignal = processes.NEVER,
             progress: Callable[[int], None] | None = None) -> Outcomes:
  """Samples and verifies R = rollouts completions of each task.

  Args:
    batch: tasks a compiled program takes; the last batch is filled up with tasks it then drops.
    answers: whether to extract answers, for a vote.
    stopping: asked after each batch and while it is sampled and verified.
    progress: called after each batch with its number of rollouts.

  Raises processes.Stopped, in all processes, where it was to stop.
  """
  R = rollouts
  outcome_IR, answer_IR, failed = [], [], 0
  for i in range(0, len(tasks), batch):
    some = list(tasks[i:i + batch])
    filled = (some * batch)[:batch]
    sampled = sample.rollouts(
        policy_config, params, tasks_lib.prompts(filled, sample_config.prompt_length),
        np.full(batch, R), key, sample_config, total=batch * R)
    stopping.wait(sampled.length_R)
    n = len(some) * R
    sampled = completions.apply_stop_strings(sampled, tokenizer.decode, sample_config)
    row_X, texts = completions.texts(sampled, tokenizer.decode)
    row_X = row_X[row_X < n]
    task_X = [some[r // R] for r in row_X]
    texts, again = itertools.tee(itertools.islice(texts, len(row_X)))
    of_tasks = lambda x_X: processes.merge_rows(row_X, x_X, n).reshape(len(some), R)
    outcome_IR.append(of_tasks(stopping.during(lambda: workers.score(texts, task_X)).outcome_R))
    if answers:
      found = stopping.during(lambda: workers.answers(again, task_X))
      answer_IR.append(of_tasks(np.array([_number(x) for x in found.answer_R], np.uint64)))
      failed += found.timeouts + found.errors
    if progress:
      progress(n)
  return Outcomes(np.concatenate(outcome_IR), np.concatenate(answer_IR) if answers else None,
                  int(processes.gather(np.array(failed)).sum()))


def perturb(text: str, name: str, seed: str) -> str:
  """A prompt in which words of prose are changed, each with a chance of 1/4 and at least one where there is one.

  Digits, operators and their words, names, code, LaTeX, quotations and short words stay as they are.

  Args:
    name: of knobs.PERTURBATIONS. 'case': in capitals; 'spaces': after one more space; 'typos': with two neighbouring
      letters swapped, neither the first nor the last of the word; 'opening': none is, and a sentence comes first.
    seed: what the changes hang on: the task's id.
  """
  rng = random.Random(f'{name}/{seed}')  # hash() would differ by process
  if name == 'opening':
    return rng.choice(_OPENINGS) + text

  def typo(word):
    i = rng.choice([i for i in range(1, len(word) - 2) if word[i] != word[i + 1]] or [0])
    return word[:i] + word[i + 1] + word[i] + word[i + 2:] if i else word

  change = {'case': str.upper, 'spaces': lambda word: f' {word}', 'typos': typo}[name]
  words = [m.span() for m in _PROSE.finditer(text) if m['word'] and not m['word'].startswith(_QUANTITIES)]
  chosen = [span for span in words if rng.random() < _CHANGED] or words and [rng.choice(words)]
  for start, end in reversed(chosen):
    text = text[:start] + change(text[start:end]) + text[end:]
  return text


def perturbed(tasks: Sequence[types.Task], name: str, tokenizer, *, prompt_length: int, verifier: str
              ) -> list[types.Task]:
  """The tasks with their prompts perturbed.

  Args:
    verifier: of tasks that name none.

  Raises:
    ValueError: the perturbation changes no prompt, may change what a task asks, or makes a prompt that is too long or
      that the policy has no tokens for.
  """
  what, found = f'evaluate.perturb={name!r}', []
  for task in tasks:
    if name != 'opening' and (task.verifier or verifier) in _SPELT:
      raise ValueError(f'{what} may change what {task.id!r} asks: of tasks of the verifier '
                       f"{task.verifier or verifier!r} letters and spaces may be the problem itself; use 'opening'")
    prompt = perturb(task.prompt, name, task.id)
    try:
      found.append(task._replace(prompt=prompt, tokens=tokenizer.prompt(prompt)))
    except ValueError as error:
      raise ValueError(f'{what} makes a prompt of {task.id!r} that the policy cannot read: {error}; leave {name!r} out'
                       ) from error
  if all(new.tokens == task.tokens for new, task in zip(found, tasks)):
    raise ValueError(f'{what} changes none of the {len(tasks)} held-out prompts, which have no words of prose; leave '
                     f'{name!r} out')
  tasks_lib.check_prompts(found, prompt_length, what)
  return found


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
  low, high = np.quantile(_resampled(x_I[:, None])[:, 0], (0.025, 0.975))
  return float(low), float(high)


def _resampled(x_IY: np.ndarray) -> np.ndarray:
  """Means over tasks of each of Y figures, of bootstrap resamples of the tasks."""
  # Tasks of one value are exchangeable: how often each of the X values is drawn is all of a resample.
  value_XY, count_X = np.unique(x_IY, axis=0, return_counts=True)
  drawn = np.random.default_rng(_SEED).multinomial(len(x_IY), count_X / len(x_IY), size=_RESAMPLES)
  return drawn @ value_XY / len(x_IY)


def ratio(x_I: np.ndarray, y_I: np.ndarray) -> dict[str, float | None]:
  """The mean of x over that of y, of the tasks that have both, with the 95 % interval of a bootstrap over tasks.

  Returns 'mean', 'low' and 'high'. All are None where y is 0 throughout, and high where more than 2.5 % of the
  resamples have no y above 0.
  """
  x_I2 = np.stack([x_I, y_I], axis=1)
  x_I2 = x_I2[~np.isnan(x_I2).any(axis=1)]
  if not x_I2[:, 1].any():
    return dict.fromkeys(('mean', 'low', 'high'))
  mean_2, mean_X2 = x_I2.mean(axis=0), _resampled(x_I2)
  is_known_X = mean_X2[:, 1] > 0
  ratio_X = mean_X2[:, 0] / np.where(is_known_X, mean_X2[:, 1], 1)
  # Where there is none it may be anything: the interval is the widest that it could be.
  low = np.quantile(np.where(is_known_X, ratio_X, 0), 0.025)
  high = np.quantile(np.where(is_known_X, ratio_X, np.finfo(float).max), 0.975, method='higher')
  return {'mean': float(mean_2[0] / mean_2[1]), 'low': float(low),
          'high': float(high) if high < np.finfo(float).max else None}


def _estimate(x_I: np.ndarray) -> dict[str, float | int | None]:
  left_out, x_I = int(np.isnan(x_I).sum()), x_I[~np.isnan(x_I)]
  if not len(x_I):
    return dict.fromkeys(('mean', 'stderr', 'low', 'high')) | {'left_out': left_out}
  error = x_I.std(ddof=1) / np.sqrt(len(x_I)) if len(x_I) > 1 else 0.0
  low, high = interval(x_I)
  return {'mean': float(x_I.mean()), 'stderr': float(error), 'low': low, 'high': high, 'left_out': left_out}


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
    'left_out' is None where every task is left out. And 'tasks': {'right', 'verified'}, rollouts of each task in order.
  """
  right_IR, verified_IR = found.right_IR, found.verified_IR
  metric_I = {f'avg@{right_IR.shape[1]}': avg(right_IR, verified_IR)}
  metric_I |= {f'pass@{k}': pass_at(right_IR, verified_IR, k) for k in passes}
  metric_I |= {f'maj@{k}': maj_at(right_IR, verified_IR, found.answer_IR, k) for k in majorities}
  is_in = {'all': np.full(len(tasks), True)}
  for name, label_I in (('source', np.array(source_I)),
                        ('difficulty', np.array([task.difficulty for task in tasks]))):
    is_in |= {f'{name}_{label}': label_I == label for label in np.unique(label_I)}
  return {
      'verification': health.totals(found.outcome_IR) | {'failed_extractions': found.failed_extractions},
      'groups': {
          group: {'tasks': int(in_I.sum()),
                  'metrics': {name: _estimate(x_I[in_I]) for name, x_I in metric_I.items()}}
          for group, in_I in is_in.items()},
      'tasks': {'right': (right_IR & verified_IR).sum(axis=1).tolist(), 'verified': verified_IR.sum(axis=1).tolist()}}


def robustness(found: Outcomes, of_perturbed: Outcomes, tasks: Sequence[types.Task],
               perturbed_tasks: Sequence[types.Task]) -> dict[str, Any]:
  """What comes of perturbed prompts beside the same tasks' own: plain values.

  Returns {'changed': share of the prompts that are changed, 'metrics': {'avg@R': as of `summarize`, 'ratio': as of
  `ratio`, of avg@R over avg@R of the prompts as they are}}.
  """
  avg_I, plain_I = (avg(x.right_IR, x.verified_IR) for x in (of_perturbed, found))
  changed = sum(new.tokens != task.tokens for new, task in zip(perturbed_tasks, tasks, strict=True))
  return {'changed': changed / len(tasks),
          'metrics': {f'avg@{found.outcome_IR.shape[1]}': _estimate(avg_I), 'ratio': ratio(avg_I, plain_I)}}


def record(summary: dict[str, Any]) -> dict[str, Any]:
  """A summary under the names of metrics.jsonl: eval/unverified and its likes, eval/[GROUP/]METRIC, and _stderr, _low,
  _high of it, and _left_out where it is of all tasks; of perturbed prompts, where it has 'perturbed',
  eval/perturbed_NAME/METRIC, as of a group, /ratio and /changed; and eval_tasks, counts of each task."""
  flat = {f'eval/{name}': x for name, x in summary['verification'].items()}
  perturbed_by = {f'perturbed_{name}': x for name, x in summary.get('perturbed', {}).items()}
  for group, x in (summary['groups'] | perturbed_by).items():
    for metric, estimate in x['metrics'].items():
      name = f'eval/{metric}' if group == 'all' else f'eval/{group}/{metric}'
      flat |= {name if part == 'mean' else f'{name}_{part}': y for part, y in estimate.items()
               if part != 'left_out' or group == 'all'}
  flat |= {f'eval/{name}/changed': x['changed'] for name, x in perturbed_by.items()}
  return flat | {'eval_tasks': summary['tasks']}


def table(summary: dict[str, Any]) -> str:
  """A summary as text: a line a group, a column a metric, with its interval; and what is left out of it."""
  groups, verification = summary['groups'], summary['verification']
  cell = lambda y: 'unknown' if y['mean'] is None else f'{y["mean"]:.3f} [{y["low"]:.3f}, {y["high"]:.3f}]'
  metrics, perturbed_by = list(groups['all']['metrics']), summary.get('perturbed', {})
  rows = [['', 'tasks', *metrics]]
  rows += [[group, str(x['tasks']), *map(cell, x['metrics'].values())] for group, x in groups.items()]
  rows += [[f'perturbed_{name}', str(groups['all']['tasks']),
            *(cell(x['metrics'][metric]) if metric in x['metrics'] else '' for metric in metrics)]
           for name, x in perturbed_by.items()]
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = [f'{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  '
           + '  '.join(f'{x:<{w}}' for x, w in zip(row[2:], widths[2:])) for row in rows]
  notes = ['mean [95 % bootstrap interval over tasks]']
  if verification['unverified']:
    kinds = ', '.join(f'{kind} {n}' for kind in health.UNVERIFIED if (n := verification[f'unverified_{kind}']))
    left_out = ', '.join(f'{n} of {name}' for name, y in groups['all']['metrics'].items() if (n := y['left_out']))
    notes.append(f'{verification["unverified"]:.1%} of the rollouts are unverified and left out ({kinds}); '
                 f'tasks that are left out: {left_out or "none"}')
  for name, x in perturbed_by.items():
    mean, low, high = ('unknown' if y is None else f'{y:.3f}' for y in x['metrics']['ratio'].values())
    times = 'no ratio, as nothing is right unperturbed' if mean == 'unknown' else (
        f'{mean} [{low}, {high}] times the {metrics[0]} of the same tasks unperturbed')
    notes.append(f'perturbed_{name}: {times}; {x["changed"]:.0%} of the prompts are changed')
  return '\n'.join([*(line.rstrip() for line in lines), *notes])
