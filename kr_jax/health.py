"""Whether verdicts can be trusted: what came of rollouts, by dataset and verifier, and when to speak of it.

Two things are said. Rollouts are unverified: nothing is learnt from them. And of a dataset and verifier answers are
found and none is right: the tasks are too hard for the policy, or the verifier refuses right answers. Which of the two
it is, only a look at an answer tells. It is said after 512 answers of 64 groups, and again whenever the answers have
doubled. If tasks are alike and a share p of answers is right, none of 512 is with the chance (1-p)^512, which is below
1 % from p = .9 % on; if a share q of tasks can be solved at all, none of 64 is drawn with the chance (1-q)^64, which
is below 1 % from q = 7 % on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kr_jax import types
from kr_jax.rewards import verdicts

UNVERIFIED = tuple(
    name for i, name in enumerate(verdicts.OUTCOMES) if i != verdicts.NONE and i not in verdicts.VERIFIED)
_ANSWERS, _GROUPS = 512, 64  # after which it is said that none is right
_EVERY = 20  # steps between two messages of one kind of unverified rollouts
_LONGEST = 400  # characters of an example


def names(tasks: Iterable[types.Task], verifier: str) -> list[str]:
  """The dataset and the verifier of each task, 'DATASET/VERIFIER'. verifier: of tasks that name none."""
  return [f'{task.source}/{task.verifier or verifier}' for task in tasks]


def counts(outcome_R: np.ndarray, ended_R: np.ndarray, task_R: np.ndarray, name_M: Sequence[str]
           ) -> dict[str, dict[str, int]]:
  """What came of the rollouts of each name: counts.

  Args:
    outcome_R: of verdicts.OUTCOMES.
    ended_R, task_R: as of types.Rollouts.
    name_M: as of `names`.

  Returns:
    {name: {'groups': tasks with a rollout, 'right', 'wrong', 'no_answer', 'truncated_without_answer' (a part of
    'no_answer'), and UNVERIFIED: rollouts}}.
  """
  task_R, found = np.asarray(task_R), {}
  for name in dict.fromkeys(name_M):
    in_R = np.append(np.array([other == name for other in name_M]), False)[task_R]
    number_of = np.bincount(outcome_R[in_R], minlength=len(verdicts.OUTCOMES)).tolist()
    of = {kind: number_of[i] for i, kind in enumerate(verdicts.OUTCOMES) if i != verdicts.NONE}
    truncated_R = in_R & (outcome_R == verdicts.NO_ANSWER) & (np.asarray(ended_R) == types.ENDED_LENGTH)
    found[name] = {'groups': len(np.unique(task_R[in_R])), 'truncated_without_answer': int(truncated_R.sum()), **of}
  return found


def totals(outcome_XR: np.ndarray) -> dict[str, float | int]:
  """Of rollouts of any shape 'unverified' and 'no_answer', shares of all, and 'unverified_KIND', counts; a share is
  0 where there is no rollout."""
  number_of = np.bincount(np.ravel(outcome_XR), minlength=len(verdicts.OUTCOMES)).tolist()
  by_kind = {kind: number_of[verdicts.OUTCOMES.index(kind)] for kind in UNVERIFIED}
  n = max(sum(number_of[1:]), 1)
  return {'unverified': sum(by_kind.values()) / n, 'no_answer': number_of[verdicts.NO_ANSWER] / n,
          **{f'unverified_{kind}': x for kind, x in by_kind.items()}}


class Watch:
  """What is to be said of a step's verdicts.

  Args:
    before: numbers and `counts` of the steps that this run went on from; what was said of them is not said again.
  """

  def __init__(self, before: Iterable[tuple[int, dict[str, dict[str, int]]]] = ()):
    self._answers, self._groups, self._right = {}, {}, {}  # so far, by name
    self._said = {}  # name and kind of unverified rollouts -> the step at which they were spoken of last
    for step, found in before:
      self._unverified(step, found)
      self._add(found)

  def _add(self, found: dict[str, dict[str, int]]) -> None:
    for name, of in found.items():
      for total, x in ((self._answers, of['right'] + of['wrong']), (self._groups, of['groups']),
                       (self._right, of['right'])):
        total[name] = total.get(name, 0) + x

  def _unverified(self, step: int, found: dict[str, dict[str, int]]) -> dict[tuple[str, str], int]:
    """Counts of unverified rollouts by name and kind, if they are to be spoken of at this step; else nothing."""
    kinds = {(name, kind): of[kind] for name, of in found.items() for kind in UNVERIFIED if of[kind]}
    if not any(step - self._said.get(key, step - _EVERY) >= _EVERY for key in kinds):
      return {}
    self._said |= dict.fromkeys(kinds, step)
    return kinds

  def _alarms(self, name: str) -> int:
    """How often it would have been said by now that no answer is right."""
    if self._right.get(name):
      return 0
    return min(self._answers.get(name, 0) // _ANSWERS, self._groups.get(name, 0) // _GROUPS).bit_length()

  def step(self, step: int, found: dict[str, dict[str, int]], examples: Sequence[str],
           wrong_example: Callable[[str], str]) -> list[str]:
    """The messages of a step.

    Args:
      found: its `counts`.
      examples: of what was not verified.
      wrong_example: name -> the end of a wrong completion and its task's answer, or ''; called for a message alone.
    """
    said = []
    if kinds := self._unverified(step, found):
      of_each = ', '.join(f'{name} {kind} {n}' for (name, kind), n in kinds.items())
      example = f'; for example: {_short(examples[0])}' if examples else ''
      rollouts = sum(of[kind] for of in found.values() for kind in verdicts.OUTCOMES[1:])
      said.append(f'unverified and left out: {sum(kinds.values())} of {rollouts} rollouts ({of_each}){example}')
    before = {name: self._alarms(name) for name in found}
    self._add(found)
    for name, alarms in before.items():
      if self._alarms(name) > alarms:
        said.append(f'of {self._answers[name]} answers of {name} none was right{wrong_example(name)}: the tasks are '
                    "too hard for this policy, or the verifier or the dataset's answers are wrong")
    return [f'step {step}: {text}' for text in said]


def _short(text: str) -> str:
  """The beginning and the end of a text, which of an error say where and what; control characters, which a terminal
  would obey, as Python writes them."""
  half = _LONGEST // 2
  text = text if len(text) <= _LONGEST else f'{text[:half]} … {text[-half:]}'
  return ''.join(x if x.isprintable() or x == '\n' else repr(x)[1:-1] for x in text)


def wrong_example(completion: str, answer: str) -> str:
  """How a wrong completion ends, as a message shows it. answer: of its task."""
  end = completion if len(completion) <= 80 else f'…{completion[-80:]}'
  return f'; the last one ends {end!r}, where the answer is {_short(answer)!r}'

