r"""Whether verdicts can be trusted: what came of rollouts, by dataset and verifier, and when to speak of it.

Two things raise an alarm. Rollouts are unverified: nothing is learnt from them. And of a dataset and verifier answers
never match, although the form of the completions is at fault and not what they say. Then a knapsack starves the tasks,
as their success rate looks like 0. Either of two signs is taken for it:

    silent     none was right, and in nine of ten completions that ended by themselves no answer was found
    unmatched  a second, lenient look finds the right answer at the end of completions that failed: a box, '####',
               'answer is', a tag, bold, the last line, number or characters. One completion of a group is looked at.

How often an answer stands there by chance is measured at once: the same completion is looked at for the answers of
other tasks of the step. `unmatched` needs the right answer in 15 % of 64 groups, and five times as often as another's.
If the right one stood there as often as another's, whatever the rate, a run of steps of 8 groups or more would have it
so, after 64 groups or later, with a chance below 1e-4. If a fifth of the completions that end by themselves answer,
`silent` comes after 256 of them with a chance below 1e-5. Tasks that are only too hard raise neither: their answers are
found, and are not the right ones.

Of hard tasks a notice is given: none of 512 answers of 64 groups is right. If tasks are alike and a share p of answers
is right, none of 512 is with the chance (1-p)^512, which is below 1 % from p = .9 % on; if a share q of tasks can be
solved at all, none of 64 is drawn with the chance (1-q)^64, which is below 1 % from q = 7 % on. Another notice is given
where completions are cut before they answer. All is said again whenever its numbers have doubled.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import decimal
import functools
import itertools
import re
from typing import Any, NamedTuple

import numpy as np

from kr_jax import types
from kr_jax.answers import marks
from kr_jax.rewards import verdicts

UNVERIFIED = tuple(
    name for i, name in enumerate(verdicts.OUTCOMES) if i != verdicts.NONE and i not in verdicts.VERIFIED)
# What examples are kept of. Those of no answer ended by themselves.
KINDS = ('wrong', 'no_answer', 'truncated_without_answer', *UNVERIFIED)
EXAMPLES = 3  # of a kind
_ANSWERS, _GROUPS = 512, 64  # after which it is said that none is right
_SILENT, _SILENT_GROUPS, _SILENT_SHARE = 256, 32, 0.9  # completions without an answer, and their share
_LOOKED, _HOLD, _CHANCE = 64, 0.15, 5  # groups looked at, share with the right answer, times that of other answers
_MATCHED, _MATCHED_OF = 0.02, 256  # share of right rollouts, and of how many: the verifier reads the form
_LOOKS, _OTHERS = 16, 8  # groups of a step that are looked at, and answers of other tasks
_EVERY = 20  # steps between two messages of one kind of unverified rollouts
_LONGEST = 400  # characters of an example
_END = 600  # characters of the end of a completion that are looked at
_SET = ('completions do not have the form that the verifier reads. Set rewards.verifier or rewards.pattern to what '
        'reads theirs, or tasks.template to what asks for the form that it reads')


class Rollouts(NamedTuple):
  """A step's rollouts, as they are looked at."""

  tasks_M: Sequence[types.Task]
  name_M: Sequence[str]  # as of `names`
  task_R: np.ndarray  # task_R and ended_R are as of types.Rollouts
  ended_R: np.ndarray
  outcome_R: np.ndarray  # of verdicts.OUTCOMES
  row_X: np.ndarray  # the rollouts that this process can read
  text: Callable[[int], str]  # the completion of one of them


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


# The lenient look.

_NUMBER = re.compile(r'[-−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?')
_MARKS = (re.compile(r'####[ \t]*([^\n]+)'), re.compile(r'\*\*([^*\n]+)\*\*'), marks.TAG,
          re.compile(r'\banswer\b[\s*_]*(?:is\b|:|=)[\s*_:]*([^\n]+)', re.IGNORECASE))
_LATEX = re.compile(r'\\(?:text|mathrm|mathbf|left|right|displaystyle|[,;:! ()\[\]])|[\s${}]')
_THOUSANDS = re.compile(r'(?<=\d),(?=\d{3}(?!\d))')


@functools.lru_cache(maxsize=2048)  # answers are compared with many completions
def same_form(text: str) -> str:
  r"""An answer as it is compared in the lenient look: '\boxed{1,000}.', '$1000$' and '1000.0' are '1000'."""
  text = _THOUSANDS.sub('', _LATEX.sub('', marks.box(text) or marks.trim(text))).replace('−', '-').casefold()
  text = text.rstrip('.').removeprefix('+')
  if re.fullmatch(r'-?\d{1,40}(?:\.\d{1,40})?', text):
    number = decimal.Decimal(text)
    return str(number.quantize(1)) if number == number.to_integral() and abs(number) < 10 ** 20 else str(
        number.normalize())
  return text


def at_end(completion: str) -> tuple[frozenset[str], str]:
  """What the end of a completion may answer, each in `same_form`; and its last line, in lower case."""
  end = completion[-_END:]
  line = end.rstrip('. \t\r\n').rpartition('\n')[2]
  found = [marks.box(end), line, *(pattern.findall(end)[-1:] for pattern in (*_MARKS, _NUMBER))]
  texts = [x for part in found if part for x in ([part] if isinstance(part, str) else part)]
  texts += [re.split(r'\.\s', x, maxsplit=1)[0] for x in texts]
  return frozenset(filter(None, map(same_form, texts))), line.casefold()


def holds(end: tuple[frozenset[str], str], answer: str) -> bool:
  """Whether an answer stands at the end of a completion: is one of its answers, or words of its last line, or, of two
  characters or more, its last ones."""
  form = same_form(answer)
  if not form:
    return False
  words = answer.strip().casefold()
  return form in end[0] or len(words) > 1 and end[1].endswith(words) or (
      len(words) > 2 and words in end[1] and not _NUMBER.fullmatch(words)
      and re.search(rf'(?<!\w){re.escape(words)}(?!\w)', end[1]) is not None)


class Watch:
  """What is to be said of a step's verdicts.

  Args:
    before: numbers and `verification` of the steps that this run went on from; what was said of them is not said again.
    seed: of examples and of what is looked at.

  Attributes:
    notices: of the last step: what is said beside the alarms, and is none.
  """

  def __init__(self, before: Iterable[tuple[int, dict[str, dict[str, int]]]] = (), seed: int = 0):
    self._seed, self.notices = seed, []
    self._total: dict[str, collections.Counter[str]] = {}  # so far, by name
    self._steps = collections.Counter()  # of name and kind: steps with such a rollout
    self._said = {}  # name and kind of unverified rollouts -> the step at which they were spoken of last
    self._level = collections.Counter()  # of name and sign: how often its numbers had doubled when it was said last
    self._ends: dict[tuple[str, str], str] = {}  # of name and sign: the last example
    for step, found in before:
      self._unverified(step, found)
      self._add(found)
      for name in found:
        self._due(name)

  def _of(self, name: str) -> collections.Counter[str]:
    return self._total.setdefault(name, collections.Counter())

  def _add(self, found: Mapping[str, Mapping[str, int]]) -> None:
    for name, of in found.items():
      self._of(name).update(of)
      self._steps.update((name, kind) for kind in KINDS if _count(of, kind))

  def _unverified(self, step: int, found: dict[str, dict[str, int]]) -> dict[tuple[str, str], int]:
    """Counts of unverified rollouts by name and kind, if they are to be spoken of at this step; else nothing."""
    kinds = {(name, kind): of[kind] for name, of in found.items() for kind in UNVERIFIED if of[kind]}
    if not any(step - self._said.get(key, step - _EVERY) >= _EVERY for key in kinds):
      return {}
    self._said |= dict.fromkeys(kinds, step)
    return kinds

  def _signs(self, name: str) -> dict[str, int]:
    """The signs that hold of all steps so far, the first the one to speak of, with how often its numbers doubled."""
    of = self._of(name)
    verified, stopped, silent = _sums(of)
    level = lambda n, least, groups: min(n // least, of['groups'] // groups).bit_length()
    is_unmatched = (of['looked_at'] > 0 and of['right'] <= _MATCHED * verified
                    and of['holds_answer'] >= _HOLD * of['looked_at']
                    and of['holds_answer'] * of['others'] >= _CHANCE * (of['holds_other'] + 1) * of['looked_at'])
    found = {
        'unmatched': is_unmatched * (of['looked_at'] // _LOOKED).bit_length(),
        'silent': (not of['right'] and silent >= _SILENT_SHARE * stopped) * level(silent, _SILENT, _SILENT_GROUPS),
        'cut': (not of['right'] and of['truncated_without_answer'] >= _SILENT_SHARE * verified)
               * level(of['truncated_without_answer'], _ANSWERS, _GROUPS),
        'hard': (not of['right'] and not (of['looked_at'] < _LOOKED and is_unmatched))
                * level(of['right'] + of['wrong'], _ANSWERS, _GROUPS)}
    return {sign: level for sign, level in found.items() if level}

  def _due(self, name: str) -> str:
    """The sign that is to be spoken of now, or ''; it counts as said."""
    sign, level = next(iter(self._signs(name).items()), ('', 0))
    if level <= self._level[name, sign]:
      return ''
    self._level[name, sign] = level
    return sign

  def look(self, step: int, found: dict[str, dict[str, int]], rollouts: Rollouts, faults: Sequence[str] = ()
           ) -> dict[str, dict[str, list[str]]]:
    """Looks at the texts of a step, before `step`.

    Names of which too few rollouts are right get further counts in `found`: completions that were 'looked_at', of which
    'holds_answer' have the right answer at their end; and answers of 'others', of which 'holds_other' stand there.

    Args:
      found: the step's `counts`.
      faults: as of rewards.Scores.examples.

    Returns:
      {name: {kind: examples}}, texts in which control characters are escaped: up to EXAMPLES of the first step with a
      kind, one of the second, fourth, eighth, ... such step. So a run has few, and the last is of its second half.
    """
    rng = np.random.default_rng((self._seed, step))
    row_X = rng.permutation(np.asarray(rollouts.row_X, int))
    name_X = np.array([*rollouts.name_M, ''])[np.asarray(rollouts.task_R)[row_X]] if len(row_X) else row_X
    examples = {}
    for name, of in found.items():
      own_X = row_X[name_X == name]
      if not self._matches(name, of):
        of |= self._look_at(name, rollouts, own_X)
      for kind in KINDS:
        n = self._steps[name, kind] + 1
        if _count(of, kind) and not n & (n - 1):
          texts = _examples(kind, rollouts, own_X, faults)[:EXAMPLES if n == 1 else 1]
          if texts:
            examples.setdefault(name, {})[kind] = texts
    return examples

  def _matches(self, name: str, of: Mapping[str, int]) -> bool:
    """Whether enough rollouts are right, this step's among them, to say that the verifier reads their form."""
    of = self._of(name) + collections.Counter(of)
    verified, _, _ = _sums(of)
    return verified >= _MATCHED_OF and of['right'] > _MATCHED * verified

  def _look_at(self, name: str, rollouts: Rollouts, row_X: np.ndarray) -> dict[str, int]:
    """The counts of a look at one completion of each group that failed and ended by itself."""
    outcome_X = np.asarray(rollouts.outcome_R)[row_X]
    is_failed_X = np.isin(outcome_X, (verdicts.WRONG, verdicts.NO_ANSWER)) & (
        np.asarray(rollouts.ended_R)[row_X] == types.ENDED_STOP)
    row_of = {int(rollouts.task_R[r]): int(r) for r in row_X[is_failed_X]}  # of a group one
    answers = {m: task.answer for m, task in enumerate(rollouts.tasks_M)
               if rollouts.name_M[m] == name and same_form(task.answer)}
    counts = collections.Counter(dict.fromkeys(('looked_at', 'holds_answer', 'others', 'holds_other'), 0))
    for m, r in [*row_of.items()][:_LOOKS]:
      text, answer = rollouts.text(r), rollouts.tasks_M[m].answer
      is_silent = rollouts.outcome_R[r] == verdicts.NO_ANSWER
      self._ends[name, 'silent' if is_silent else 'hard'] = wrong_example(text, answer)
      following = (x for after in (True, False) for other, x in answers.items() if (other > m) is after)
      others = [*itertools.islice((x for x in following if same_form(x) != same_form(answer)), _OTHERS)]
      if m not in answers or not others:
        continue
      end = at_end(text)
      is_there = holds(end, answer)
      if is_there:
        self._ends[name, 'unmatched'] = wrong_example(text, answer)
      counts.update(looked_at=1, holds_answer=int(is_there), others=len(others),
                    holds_other=sum(holds(end, x) for x in others))
    return dict(counts)

  def step(self, step: int, found: dict[str, dict[str, int]], examples: Sequence[str],
           wrong_example: Callable[[str], str]) -> list[str]:
    """The alarms of a step.

    Args:
      found: its `counts`, and those of `look`.
      examples: of what was not verified.
      wrong_example: name -> the end of a wrong completion and its task's answer, or ''; called for a message alone,
        where `look` had none.
    """
    said, self.notices = [], []
    if kinds := self._unverified(step, found):
      of_each = ', '.join(f'{name} {kind} {n}' for (name, kind), n in kinds.items())
      example = f'; for example: {_short(examples[0])}' if examples else ''
      rollouts = sum(of[kind] for of in found.values() for kind in verdicts.OUTCOMES[1:])
      said.append(f'unverified and left out: {sum(kinds.values())} of {rollouts} rollouts ({of_each}){example}')
    self._add(found)
    for name in found:
      if sign := self._due(name):
        example = self._ends.get((name, sign)) or ('' if sign == 'cut' else wrong_example(name))
        (said if sign in ('unmatched', 'silent') else self.notices).append(self._message(name, sign, example))
    self.notices = [f'step {step}: {text}' for text in self.notices]
    return [f'step {step}: {text}' for text in said]

  def _message(self, name: str, sign: str, example: str) -> str:
    of = self._of(name)
    verified, stopped, silent = _sums(of)
    looked = '' if not of['others'] else (
        f'the right answer stands at the end of {of["holds_answer"]} of {of["looked_at"]} completions of {name} that '
        f'failed and ended by themselves (another answer of {of["holds_other"] / of["others"]:.1%})')
    if sign == 'unmatched':
      return f'{looked}, and the verifier took {of["right"]} of {verified} for right{example}: {_SET}'
    if sign == 'silent':
      return (f'in {silent} of {stopped} completions of {name} that ended by themselves the verifier found no answer, '
              f'and none was right{example}: {_SET}')
    if sign == 'cut':
      return (f'{of["truncated_without_answer"]} of {verified} completions of {name} were cut before they answered, '
              'and none was right: raise sample.completion_length, or ask for less in tasks.template')
    why = f'the tasks are too hard for this policy: {looked}' if looked else (
        "the tasks are too hard for this policy, or the verifier or the dataset's answers are wrong")
    return f'of {of["right"] + of["wrong"]} answers of {name} none was right{example}: {why}'


def _sums(of: Mapping[str, int]) -> tuple[int, int, int]:
  """Rollouts that were verified; of these those that ended by themselves; of these those without an answer."""
  verified, cut = of['right'] + of['wrong'] + of['no_answer'], of['truncated_without_answer']
  return verified, verified - cut, of['no_answer'] - cut


def _count(of: Mapping[str, int], kind: str) -> int:
  """Rollouts of a kind, of KINDS."""
  return of.get(kind, 0) - (of.get('truncated_without_answer', 0) if kind == 'no_answer' else 0)


def _examples(kind: str, rollouts: Rollouts, row_X: np.ndarray, faults: Sequence[str]) -> list[str]:
  """Completions of a kind, up to EXAMPLES, of different tasks where there are: what they end with, and the answer."""
  truncated = kind == 'truncated_without_answer'
  is_cut_X = np.asarray(rollouts.ended_R)[row_X] == types.ENDED_LENGTH
  outcome = verdicts.NO_ANSWER if truncated else verdicts.OUTCOMES.index(kind)
  is_kind_X = (np.asarray(rollouts.outcome_R)[row_X] == outcome) & (
      is_cut_X == truncated if outcome == verdicts.NO_ANSWER else True)
  of_task, texts = {int(rollouts.task_R[r]): int(r) for r in row_X[is_kind_X]}, []
  for m, r in [*of_task.items()][:EXAMPLES]:
    task = rollouts.tasks_M[m]
    verifier = rollouts.name_M[m].removeprefix(f'{task.source}/')
    said = next((x for x in faults if x.startswith(f'{verifier}: {kind}')), '') if kind in UNVERIFIED else ''
    texts.append(_short(f'{task.id} {_ends(rollouts.text(r), task.answer)}' + (f'; {said}' if said else '')))
  return texts


def kept(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
  """The examples of a run's metrics.jsonl: of each name and kind the first and the latest, EXAMPLES in all."""
  found: dict[str, dict[str, list[str]]] = {}
  for record in records:
    for name, of in (record.get('verification_examples') or {}).items():
      for kind, texts in of.items():
        seen = found.setdefault(name, {}).setdefault(kind, [])
        seen += [text for text in texts if text not in seen]
        if len(seen) > EXAMPLES:
          seen[1:] = seen[1 - EXAMPLES:]
  return found


def _short(text: str) -> str:
  """The beginning and the end of a text, which of an error say where and what; control characters, which a terminal
  would obey, as Python writes them."""
  half = _LONGEST // 2
  text = text if len(text) <= _LONGEST else f'{text[:half]} … {text[-half:]}'
  return ''.join(x if x.isprintable() or x == '\n' else repr(x)[1:-1] for x in text)


def wrong_example(completion: str, answer: str) -> str:
  """How a wrong completion ends, as a message shows it. answer: of its task."""
  return f'; the last one {_ends(completion, answer)}'


def _ends(completion: str, answer: str) -> str:
  end = completion if len(completion) <= 80 else f'…{completion[-80:]}'
  return f'ends {end!r}, where the answer is {_short(answer)!r}'
