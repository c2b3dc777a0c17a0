"""Rollouts to read: of each step a bounded sample, in rollouts/STEP.jsonl.zst (rollouts_text.py shows them).

A sample is a pure function of seed, step and what came of the step. These take turns until it is full, so that of each
there is one where there is room:

    new_success     the first right rollout of a task that only failed before in this run
    fault           rollouts without a verdict
    mixed           a right and a wrong rollout of one group
    truncated       rollouts that were cut
    largest_budget  a rollout of each of the three tasks with the most
    chosen          any others

Texts are cut in the middle where they are long. All files together stay below a bound: when it is reached, steps of the
older half are dropped, those of odd numbers first, then every second of the even ones, and so on. So a long run has all
of its last steps, and every 2nd, 4th, 8th, ... of its first. Of several processes the first writes, from the rollouts
that it can read.

Nothing of this is needed to resume: steps that are repeated are written again. Nothing of it stops a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import itertools
import json
import math
import os
import re
import time
from typing import Any, NamedTuple

from absl import logging
import numpy as np
import pyarrow
from scipy import special

from kr_jax import processes
from kr_jax import rewards
from kr_jax import types
from kr_jax.allocation import estimate
from kr_jax.allocation import value
from kr_jax.rewards import verdicts

WHY = ('new_success', 'fault', 'mixed', 'truncated', 'largest_budget', 'chosen')
GROUPS = ('mixed', 'all_right', 'all_wrong', 'unverified')
STATUSES = tuple(dict.fromkeys((*GROUPS, *verdicts.OUTCOMES[1:], *WHY)))
_LARGEST = 3  # tasks with the largest budgets
_TOGETHER, _WAIT_S = 8, 10.0  # steps that are written at once, at most; seconds that the first of them waits, at most
_LONGEST, _LONGEST_ANSWER = 8000, 1000  # characters of a prompt or completion, of an answer
_INTERVAL = (0.025, 0.975)  # of an estimate
_ENDED = {types.ENDED_STOP: 'stop', types.ENDED_LENGTH: 'length'}
_ENCODER = json.JSONEncoder(allow_nan=False, check_circular=False)  # a check takes a quarter of the time
_ZSTD = pyarrow.Codec('zstd')
_NAME = re.compile(r'(\d+)\.jsonl\.zst')


def choose(outcome_R: np.ndarray, verified_R: np.ndarray, ended_R: np.ndarray, task_R: np.ndarray, budget_M: np.ndarray,
           new_M: np.ndarray, *, most: int, row_X: np.ndarray, rng: np.random.Generator) -> dict[int, list[str]]:
  """The rollouts to keep, at most `most`, with the reasons of each, of WHY.

  Args:
    outcome_R, verified_R: as of rewards.Scores.
    ended_R, task_R: as of types.Rollouts.
    new_M: bool, tasks that only failed before.
    row_X: those to choose from: rollouts, each once.
  """
  row_X = rng.permutation(row_X)
  right, wrong, any_of = {}, {}, {}  # rows by task
  faults, truncated = [], []
  for r, m, is_right, is_verified, ended in zip(row_X.tolist(), task_R[row_X].tolist(), *(
      x_R[row_X].tolist() for x_R in (outcome_R == verdicts.RIGHT, verified_R, ended_R))):
    any_of.setdefault(m, r)
    if not is_verified:
      faults.append((r,))
    else:
      (right if is_right else wrong).setdefault(m, []).append(r)
    if ended == types.ENDED_LENGTH:
      truncated.append((r,))
  first = {m: min(rows) for m, rows in right.items() if new_M[m]}
  largest = sorted(any_of, key=lambda m: -budget_M[m])[:_LARGEST]
  turns = {
      'new_success': [(r,) for r in first.values()], 'fault': faults,
      'mixed': [(first.get(m, rows[0]), wrong[m][0]) for m, rows in right.items() if m in wrong],
      'truncated': truncated, 'largest_budget': [(any_of[m],) for m in largest]}
  in_turn = itertools.zip_longest(*(zip(itertools.repeat(why), rows) for why, rows in turns.items()))
  kept: dict[int, list[str]] = {}
  rest = iter(row_X.tolist())
  while len(kept) < min(most, len(row_X)):
    for why, rows in filter(None, next(in_turn, ())):
      if len(kept.keys() | set(rows)) <= most:
        for r in rows:
          kept.setdefault(r, []).append(why)
    if len(kept) < most and (r := next((r for r in rest if r not in kept), None)) is not None:
      kept[r] = ['chosen']
  return kept


def to_drop(kept: Sequence[int]) -> int:
  """Which of some steps, in order, is dropped first: of the older half the oldest that the fewest twos divide."""
  older = kept[:max(len(kept) // 2, 1)]
  twos = lambda step: (step & -step).bit_length() if step else 64
  return min(older, key=lambda step: (twos(step), step))


class _Kept(NamedTuple):
  """The sample of a step, and what its lines are made of. K: the rollouts that are kept."""

  step: int
  belief_M: value.Beta  # from before the step
  tasks_M: Sequence[types.Task]
  budget_M: np.ndarray
  task_R: np.ndarray
  ended_R: np.ndarray
  outcome_R: np.ndarray
  reward_R: np.ndarray
  verified_R: np.ndarray
  advantage_R: np.ndarray | None
  row_K: np.ndarray
  why_K: list[list[str]]
  token_KC: np.ndarray
  length_K: list[int]


class Sampler:
  """Writes the samples of a run, those of a few short steps together.

  What waits is written by `flush`, which whoever saves a checkpoint calls before: steps after it are repeated after a
  kill, and written then.

  Args:
    workdir: of the run.
    decode: tokens -> text.
    rollouts: of a step, at most; 0: nothing is written.
    megabytes: of all files together.
    verifier: of tasks that name none.
    stop_strings: those of the config, that completions were cut at.
    answers: rewards.Workers.answers, asked for the rollouts that are kept; None: answers are not extracted.
  """

  def __init__(self, workdir: str, decode: Callable[[np.ndarray], str], *, rollouts: int = 16, megabytes: float = 64.0,
               seed: int = 0, verifier: str = '', stop_strings: Sequence[str] = (),
               answers: Callable[..., rewards.Answers] | None = None):
    self._folder, self._decode, self._most, self._bytes = folder(workdir), decode, rollouts, megabytes * 2 ** 20
    self._seed, self._verifier, self._stop_strings, self._answers = seed, verifier, tuple(stop_strings), answers
    self._is_on = rollouts > 0 and processes.is_first()
    self._has_warned, self._size = False, {}
    self._waiting: list[_Kept] = []
    self._since = 0.0  # monotonic time from which the first of them waits
    if self._is_on:
      with self._warning():
        os.makedirs(self._folder, exist_ok=True)
        for entry in os.scandir(self._folder):
          if name := _NAME.fullmatch(entry.name):
            self._size[int(name[1])] = entry.stat().st_size
          elif entry.name.endswith('.zst.tmp'):  # of a process that was killed
            os.remove(entry.path)

  @contextlib.contextmanager
  def _warning(self) -> Iterator[None]:
    """Says once what failed, and lets the run go on."""
    try:
      yield
    except OSError as error:
      if not self._has_warned:
        logging.warning('rollouts of this step, and maybe of later ones, are not kept: %s', error)
      self._has_warned = True

  def step(self, step: int, stats: types.TaskStats, tasks_M: Sequence[types.Task], budget_M: np.ndarray,
           rollouts: types.Rollouts, scores: rewards.Scores, advantage_R: np.ndarray | None = None,
           belief_M: value.Beta | None = None) -> None:
    """Chooses the sample of a step, and writes those of all steps that wait where there are enough, or the first has
    waited long enough.

    Args:
      stats: from before the step.
      budget_M: of all waves.
      rollouts: all, verified or not.
      advantage_R: None: not known.
      belief_M: estimate.posterior of stats, which takes time; None: it is asked for.
    """
    if not self._is_on:
      return
    row_X, token_XC = processes.own_rows(rollouts.token_RC)
    task_R, length_R, ended_R = (np.asarray(x_R) for x_R in (rollouts.task_R, rollouts.length_R, rollouts.ended_R))
    index_M = np.asarray(rollouts.prompts.index_M)
    new_M = (stats.rollouts_I[index_M] > 0) & (stats.successes_I[index_M] == 0)
    why = choose(scores.outcome_R, scores.verified_R, ended_R, task_R, budget_M, new_M, most=self._most,
                 row_X=row_X[length_R[row_X] > 0], rng=np.random.default_rng((self._seed, step)))
    if not why:
      return
    row_K = np.array(sorted(why), int)  # of a task side by side
    self._waiting.append(_Kept(
        step, belief_M or estimate.posterior(stats, index_M), tasks_M, budget_M, task_R, ended_R, scores.outcome_R,
        scores.reward_R, scores.verified_R, advantage_R, row_K, [why[r] for r in row_K.tolist()],
        token_XC[np.searchsorted(row_X, row_K)], length_R[row_K].tolist()))
    now = time.monotonic()
    if len(self._waiting) == 1:
      self._since = now
    if len(self._waiting) >= _TOGETHER or now - self._since >= _WAIT_S:
      self.flush()

  def flush(self) -> None:
    """Writes what waits."""
    waiting, self._waiting = self._waiting, []
    for kept in waiting:
      records = self._records(kept)
      with self._warning():
        self._write(kept.step, records)

  def _records(self, kept: _Kept) -> list[dict[str, Any]]:
    """The lines of a step."""
    records, row_K = [], kept.row_K
    m_K = kept.task_R[row_K]
    groups = _groups(kept, np.unique(m_K))
    text_K = [self._decode(token_C[:length]) for token_C, length in zip(kept.token_KC, kept.length_K)]
    task_K = [kept.tasks_M[m] for m in m_K.tolist()]
    unknown_R = np.full(len(kept.task_R), np.nan)
    advantage_R = np.where(kept.verified_R, unknown_R if kept.advantage_R is None else kept.advantage_R, np.nan)
    for m, task, text, extracted, length, why, ended, outcome, reward, advantage in zip(
        m_K.tolist(), task_K, text_K, self._extracted(text_K, task_K), kept.length_K, kept.why_K,
        *(x_R[row_K].tolist() for x_R in (kept.ended_R, kept.outcome_R, kept.reward_R, advantage_R))):
      is_of_string = ended == types.ENDED_STOP and any(stop in text for stop in self._stop_strings)
      records.append({
          'step': kept.step, 'task': task.id, 'source': task.source, 'verifier': self._name(task),
          'difficulty': int(task.difficulty), 'prompt': cut(task.prompt), 'completion': cut(text),
          'answer': cut(task.answer, _LONGEST_ANSWER),
          'extracted': None if extracted is None else cut(extracted, _LONGEST_ANSWER),
          'verdict': verdicts.OUTCOMES[outcome], 'reward': reward,
          'advantage': advantage if math.isfinite(advantage) else None, 'budget': int(kept.budget_M[m]), **groups[m],
          'ended': 'stop_string' if is_of_string else _ENDED[ended], 'length': length, 'why': why})
    return records

  def _name(self, task: types.Task) -> str:
    return str(task.verifier or self._verifier)

  def _extracted(self, text_K: Sequence[str], task_K: Sequence[types.Task]) -> list[str | None]:
    """The answers of completions, by verifiers that have an extraction; none any more after one that failed."""
    found: list[str | None] = [None] * len(text_K)
    known = [k for k, task in enumerate(task_K) if self._name(task) in rewards.ANSWERS]
    if self._answers is None or not known:
      return found
    try:
      answers = self._answers([text_K[k] for k in known], [task_K[k] for k in known])
      why = f'{answers.timeouts} timeouts, {answers.errors} errors' if answers.timeouts or answers.errors else ''
      for k, answer in zip(known, answers.answer_R):
        found[k] = answer
    except (ValueError, RuntimeError, OSError) as error:
      why = str(error)
    if why:  # they take time, which the run does not have for this
      self._answers = None
      logging.warning('answers of kept rollouts are not extracted any more: %s', why)
    return found

  def _write(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes the file of a step, whole or not at all, and keeps to the bound. Raises OSError."""
    data = packed(records)
    if len(data) > self._bytes:
      raise OSError(f'step {step} has {len(data)} bytes, more than record.rollouts_mb allows of all steps')
    path = _path(self._folder, step)
    try:
      with open(f'{path}.tmp', 'wb') as file:
        file.write(data)
      os.replace(f'{path}.tmp', path)
    except OSError:
      with contextlib.suppress(OSError):  # what is left of it would hold the space that others lack
        os.remove(f'{path}.tmp')
      raise
    self._size[step] = len(data)
    while sum(self._size.values()) > self._bytes:
      dropped = to_drop(sorted(self._size))
      del self._size[dropped]
      with contextlib.suppress(FileNotFoundError):
        os.remove(_path(self._folder, dropped))


def _groups(kept: _Kept, m_K: np.ndarray) -> dict[int, dict[str, Any]]:
  """Of some tasks what their rollouts have in common: counts of the group, its status, and the estimate before."""
  belief = value.Beta(*(x_M[m_K] for x_M in kept.belief_M))
  estimates = np.stack([estimate.mean_rate(belief),
                        *special.betaincinv(belief.a_M, belief.b_M, np.array(_INTERVAL)[:, None])])
  count = lambda is_R: np.bincount(kept.task_R[is_R], minlength=len(kept.budget_M))[m_K].tolist()
  found = {}
  for m, right, verified, mean, low, high in zip(
      m_K.tolist(), count(kept.outcome_R == verdicts.RIGHT), count(kept.verified_R),
      *estimates.astype(float).round(4).tolist()):
    found[m] = {
        'right_in_group': right, 'verified_in_group': verified,
        'estimate': {'mean': mean, 'low': low, 'high': high},
        'status': 'unverified' if not verified else 'mixed' if 0 < right < verified else
                  'all_right' if right else 'all_wrong'}
  return found


def cut(text: str, longest: int = _LONGEST) -> str:
  """A text without its middle where it is longer, which is said there."""
  half = longest // 2
  return text if len(text) <= longest else (
      f'{text[:half]}\n[... {len(text) - 2 * half} characters are left out ...]\n{text[-half:]}')


# Files.


def folder(workdir: str) -> str:
  return os.path.join(workdir, 'rollouts')


def _path(folder: str, step: int) -> str:
  return os.path.join(folder, f'{step:06d}.jsonl.zst')


def packed(records: Sequence[Mapping[str, Any]]) -> bytes:
  """The content of a file."""
  return _ZSTD.compress(''.join(_ENCODER.encode(record) + '\n' for record in records).encode(), asbytes=True)


def unpacked(path: str) -> list[Any]:
  """The records of a file. Raises OSError, ValueError and RecursionError."""
  with pyarrow.CompressedInputStream(pyarrow.OSFile(path), 'zstd') as file:
    return [json.loads(line) for line in file.read().decode().splitlines()]


def steps(workdir: str) -> list[int]:
  """The steps that are kept, in order."""
  try:
    return sorted(int(name[1]) for name in map(_NAME.fullmatch, os.listdir(folder(workdir))) if name)
  except OSError:
    return []


def _read_step(workdir: str, step: int) -> tuple[list[dict[str, Any]], str]:
  """The records of a step, and what is wrong with its file: then there are none."""
  path = _path(folder(workdir), step)
  try:
    found = unpacked(path)
    if not found:
      raise ValueError('it is empty')
    if not all(isinstance(record, dict) and record.get('step') == step and 'task' in record for record in found):
      raise ValueError('a line is no rollout')
    return found, ''
  except (OSError, ValueError, RecursionError) as error:
    return [], f'{path} cannot be read and is left out: {error}'


def read(workdir: str, step: int | None = None, task: str | None = None, status: str | None = None, *,
         problems: list[str] | None = None, newest_first: bool = False) -> Iterator[dict[str, Any]]:
  """The rollouts that are kept, in the order of steps.

  Args:
    step, task: None: all.
    status: of STATUSES: what came of the group or of the rollout, or why it is kept; None: all.
    problems: gets what is wrong with files; None: it is logged.
  """
  kept = [x for x in steps(workdir) if step in (None, x)]
  for x in reversed(kept) if newest_first else kept:
    records, problem = _read_step(workdir, x)
    if problem:
      logging.warning('%s', problem) if problems is None else problems.append(problem)
    yield from (record for record in records if task in (None, record['task']) and (
        status is None or status in (record.get('status'), record.get('verdict'), *(record.get('why') or ()))))
