r"""A second opinion: where verifiers part on completions that are already there.

    .venv/bin/python -m kr_jax.rewards.audit FILE.jsonl ... [--verifier=math] [--other=module:function ...] [--json]

Each line of a file is an object with a completion, or a list of them, and the answer that is right. Its fields may
have the names that evaluation tools give them (COMPLETIONS, ANSWERS); --completion and --answer name others. The
opinions are this verifier; math-verify with its defaults, where it is installed; verifiers of one's own (--other);
and `published`, where lines say themselves whether a completion is right (PUBLISHED).

Prints how often the opinions agree, then the completions on which they part, for a person to read. An opinion that
raises, hangs or dies is a `fault` there, not wrong. All opinions are asked in worker processes, with the limits of
time and memory that a run has.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import importlib.util
import itertools
import json
import logging
import pathlib
import sys
from typing import Any, NamedTuple

from tqdm import tqdm

from kr_jax.answers import marks
from kr_jax.rewards import verdicts
from kr_jax.rewards.verdicts import Verdict
from kr_jax.rewards.verifiers import Config
from kr_jax.rewards.workers import Workers
from kr_jax.types import Task

# The names of fields, tried in this order.
COMPLETIONS = ('completion', 'completions', 'response', 'responses', 'output', 'outputs', 'generation', 'generations',
               'model_output', 'llm_output', 'resps', 'code', 'text')
ANSWERS = ('answer', 'gold', 'ground_truth', 'gt', 'gts', 'reference', 'expected_answer', 'correct_answer', 'target',
           'final_answer', 'label', 'reward_model', 'solution')
PUBLISHED = ('expected', 'right', 'is_correct', 'correct', 'score')  # read where they are true or false

MATH_VERIFY = 'kr_jax.rewards.audit:plain_math_verify'
_BATCH = 256  # completions that are verified between two steps of the progress bar
_TAIL = 300  # characters shown of the end of a completion
_OPINIONS = {verdicts.RIGHT: 'right', verdicts.WRONG: 'wrong', verdicts.NO_ANSWER: 'wrong',
             verdicts.ABSTAINED: 'abstained'}  # of outcomes; the others are faults
_MOST_NOTES = 5  # on what was not verified, and why


class Line(NamedTuple):
  """A completion, the answer that is right, and where both were read."""

  where: str  # FILE:LINE
  completion: str
  answer: str
  published: bool | None  # whether the file says that the completion is right; None: it does not say


def plain_math_verify(completion: str, task: Task) -> bool | Verdict:
  """math-verify's verdict with its defaults, but for its time limit; it abstains where it cannot read the answer."""
  import math_verify  # here, as the import takes a second and the package may be missing
  logging.getLogger('math_verify').setLevel(logging.ERROR)  # it warns that its own time limit is off
  marked = '$' in task.answer or '\\boxed' in task.answer
  # Its time limit is a signal, which works in main threads only; that of the worker processes holds.
  reference = math_verify.parse(task.answer if marked else f'${task.answer}$', parsing_timeout=None)
  if not reference:
    return Verdict(None, reason='math-verify cannot read the reference')
  return math_verify.verify(reference, math_verify.parse(completion, parsing_timeout=None), timeout_seconds=None)


def read(path: str, completion_field: str = '', answer_field: str = '') -> Iterator[Line]:
  """The completions of a file; a field of '' is the first known one that a line has.

  Raises ValueError, naming file and line, for a line that is no JSON object or lacks a field.
  """
  with open(path, encoding='utf-8') as file:
    for number, text in enumerate(file, start=1):
      if text.strip():
        yield from _lines(f'{path}:{number}', text, completion_field, answer_field)


def _lines(where: str, text: str, completion_field: str, answer_field: str) -> Iterator[Line]:
  try:
    row = json.loads(text)
  except ValueError as error:
    raise ValueError(f'{where} is not JSON: {error}; a file must hold one JSON object a line') from error
  if not isinstance(row, dict):
    raise ValueError(f'{where} is a {type(row).__name__}; a file must hold one JSON object a line')
  completions = _field(where, row, 'completion', completion_field, COMPLETIONS, _texts)
  answer = _field(where, row, 'answer', answer_field, ANSWERS, _answer)
  published = next((row[name] for name in PUBLISHED if _is_verdict(row.get(name), len(completions))), None)
  of_each = published if isinstance(published, list) else [published] * len(completions)
  for completion, is_right in zip(completions, of_each, strict=True):
    yield Line(where, completion, answer, is_right)


def _field(where: str, row: dict, what: str, given: str, known: Sequence[str], read_value: Callable) -> Any:
  """What `read_value` finds in the field `given`, or in the first known one in which it finds more than ''."""
  found = [read_value(marks.extract(row[name]) if name == 'solution' and isinstance(row[name], str) else row[name])
           for name in ([given] if given else known) if name in row]
  found = sorted((x for x in found if x is not None), key=lambda x: x in ('', ['']))
  if found:
    return found[0]
  raise ValueError(f'{where} has no {what} as a text in {given or ", ".join(known)}; its fields are {", ".join(row)}; '
                   f'name the one with --{what}')


def _texts(value: Any) -> list[str] | None:
  """The completions in a value: a text, a list of texts, messages of a chat, or lists of these; None: none."""
  if isinstance(value, str):
    return [value]
  if isinstance(value, dict):
    return next((_texts(value[name]) for name in ('content', 'text') if name in value), None)
  if isinstance(value, list):
    if value and all(isinstance(x, dict) and 'role' in x for x in value):
      return _texts(value[-1])
    found = [_texts(x) for x in value]
    return list(itertools.chain(*found)) if found and None not in found else None
  return None


def _answer(value: Any) -> str | None:
  """The answer in a value: a text, a number, a list of these; of a text with '####', what is behind it; None: none."""
  if isinstance(value, dict):
    return _answer(value.get('ground_truth'))
  if isinstance(value, list):
    found = [_answer(x) for x in value]
    return ', '.join(found) if found and None not in found else None
  if isinstance(value, bool) or not isinstance(value, (str, int, float)):
    return None
  return str(value).rpartition('####')[2].strip()


def _is_verdict(value: Any, completions: int) -> bool:
  """Whether a value says of so many completions which are right."""
  return (isinstance(value, bool) and completions == 1
          or isinstance(value, list) and len(value) == completions and all(isinstance(x, bool) for x in value))


def opinions(verifier: str, others: Iterable[str] = ()) -> dict[str, str]:
  """The verifiers by the names that are shown, math-verify only where it is installed."""
  installed = {'math-verify': MATH_VERIFY} if importlib.util.find_spec('math_verify') else {}
  return {verifier: verifier} | installed | {name: name for name in others}


def audit(lines: Iterable[Line], verifiers: dict[str, str], config: Config) -> Iterator[tuple[Line, dict[str, str]]]:
  """Each line with its opinions by name: 'right', 'wrong', 'abstained', or 'fault (timeout)' and its like.

  Says on stderr, a few times, why something is not verified. Raises ValueError for a verifier that is unknown or
  cannot be imported.
  """
  with Workers(config, verifiers=list(verifiers.values())) as workers:
    lines, notes = iter(lines), 0
    while batch := list(itertools.islice(lines, _BATCH)):
      task_R = [Task(id=line.where, index=0, prompt='', answer=line.answer, difficulty=0, solution='', tokens=(),
                     verifier=verifier) for line in batch for verifier in verifiers.values()]
      completion_R = [line.completion for line in batch for _ in verifiers]
      scores = workers.score(completion_R, task_R)
      for note in scores.examples[:_MOST_NOTES - notes]:
        tqdm.write(note, file=sys.stderr)
        notes += 1
      found = iter(scores.outcome_R.tolist())
      for line in batch:
        said = {name: _opinion(next(found)) for name in verifiers}
        if line.published is not None:
          said['published'] = 'right' if line.published else 'wrong'
        yield line, said


def _opinion(outcome: int) -> str:
  return _OPINIONS.get(outcome) or f'fault ({verdicts.OUTCOMES[outcome]})'


def _with_progress(paths: Sequence[str], completion_field: str, answer_field: str, limit: int) -> Iterator[Line]:
  """The completions of all files, `limit` of each at most (0: all), with a bar of the files' lines."""
  for path in paths:
    shown = tqdm(read(path, completion_field, answer_field), desc=pathlib.Path(path).name, unit=' completions',
                 file=sys.stderr)
    yield from itertools.islice(shown, limit or None)


def _report(counts: collections.Counter, apart: Sequence[dict], names: Sequence[str], show: int) -> None:
  """Prints the table of opinions, and what parts, the rarest first."""
  print(f'{counts.total()} completions, {len(apart)} on which opinions part')
  width = max(map(len, (*names, 'fault (timeout)'))) + 2
  print(''.join(name.ljust(width) for name in names) + 'completions')
  for said, count in counts.most_common():
    print(''.join(dict(said).get(name, '-').ljust(width) for name in names) + str(count))
  for one in sorted(apart, key=lambda one: counts[tuple(one['opinions'].items())])[:show or None]:
    print(f'\n{one["where"]}  ' + ', '.join(f'{name}: {opinion}' for name, opinion in one['opinions'].items()))
    print(f'  reference  {one["reference"]!r}\n  answer     {one["answer"]!r}\n  completion ...{one["completion"]!r}')
  if show and len(apart) > show:
    print(f'\n{len(apart) - show} more; --show=0 shows all')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('files', nargs='+', metavar='FILE.jsonl')
  parser.add_argument('--verifier', default='math', help='the verifier whose verdicts are audited')
  parser.add_argument('--other', action='append', default=[], metavar='MODULE:FUNCTION', help='a further opinion')
  parser.add_argument('--completion', default='', metavar='FIELD', help='where a line has its completion')
  parser.add_argument('--answer', default='', metavar='FIELD', help='where a line has the answer that is right')
  parser.add_argument('--limit', type=int, default=0, help='completions of each file; 0: all')
  parser.add_argument('--show', type=int, default=50, help='completions shown on which opinions part; 0: all')
  parser.add_argument('--workers', type=int, default=0, help='processes; 0: as many as there are processors')
  parser.add_argument('--timeout', type=float, default=5.0, help='seconds of a verdict')
  parser.add_argument('--json', action='store_true', help='print one JSON object last, all that parts in it')
  args = parser.parse_args()
  verifiers = opinions(args.verifier, args.other)
  if 'math-verify' not in verifiers:
    print('math-verify is not installed and is not asked: pip install math-verify')
  config = Config(verifier=args.verifier, workers=args.workers, timeout_s=args.timeout,
                  max_faulty_steps=sys.maxsize)  # an opinion that always fails is a result here
  counts, apart = collections.Counter(), []
  try:
    for line, said in audit(_with_progress(args.files, args.completion, args.answer, args.limit), verifiers, config):
      counts[tuple(said.items())] += 1
      if len(set(said.values())) > 1:
        apart.append({'where': line.where, 'opinions': said, 'answer': marks.extract(line.completion),
                      'reference': line.answer, 'completion': line.completion[-_TAIL:]})
  except (ValueError, OSError) as error:
    raise SystemExit(f'error: {error}') from error
  names = list(dict.fromkeys(name for said in counts for name, _ in said))
  _report(counts, apart, names, args.show)
  if args.json:
    print(json.dumps({'completions': counts.total(), 'apart': apart,
                      'counts': [{'opinions': dict(said), 'completions': n} for said, n in counts.most_common()]}))


if __name__ == '__main__':
  main()
