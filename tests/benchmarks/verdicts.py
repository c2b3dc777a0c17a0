r"""Measures how often the verifier `math` is wrong, and the processor time of a verdict.

    .venv/bin/python -m tests.benchmarks.verdicts [--answers FILE ...] [--field NAME] [--limit N] [--json]

FILE holds published answers: .jsonl, or .json of a list, of texts or of objects with the answer in the field NAME; .txt
of an answer a line. Without --answers it takes the made-up references of tests/make_verifier_corpus.py. Each answer is
judged against itself and, in completions made from it (variants.py), against

  rewritings   that mean the same, and ways to mark an answer: to be accepted
  bad_forms    a box inside <answer>, LaTeX spaces, braces, units: to be accepted
  near_misses  a digit, a sign, an element, ... changed: to be refused
  others       the answer of another row, half of them of the same shape: to be refused

Near misses and others count where they surely differ (formulas.py); those that it cannot tell are left out and counted
as `doubtful`. A vote is split if maj@k gives a rewriting and its answer two votes. --limit bounds the cases of a kind,
drawn at random by --seed; all answers are judged against themselves. Times are of the process, of one verdict each, the
verdicts of one answer in a row, as in a step of training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
import contextlib
import json
import pathlib
import random
import re
import signal
import sys
import time
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from kr_jax import rewards
from kr_jax import types
from kr_jax.rewards import verdicts
from tests import make_verifier_corpus
from tests.benchmarks import formulas
from tests.benchmarks import machine
from tests.benchmarks import variants

LIMIT_S = 10.0  # of one verdict; a verdict that takes longer is a refusal
ACCEPTED = ('self', 'rewritings', 'bad_forms')  # groups of right answers
WORKERS, STEP, ROUNDS = 2, 2048, 3


class Case(NamedTuple):
  """A completion, and the reference that it is judged against."""

  group: str
  kind: str
  completion: str
  reference: str
  answer: str  # the text that the completion marks


def read(path: str, field: str) -> list[str]:
  """The answers in a file. Raises ValueError for a line without the field, naming it."""
  text = pathlib.Path(path).read_text()
  if path.endswith('.txt'):
    return [line for line in text.splitlines() if line.strip()]
  rows = json.loads(text) if path.endswith('.json') else [json.loads(x) for x in text.split('\n') if x.strip()]
  found = []
  for i, row in enumerate(rows):
    answer = row.get(field) if isinstance(row, dict) else row
    if not isinstance(answer, (str, int, float)):
      raise ValueError(f'{path}: row {i} has no text in the field {field!r}; name the field of answers with --field '
                       f'(fields: {list(row) if isinstance(row, dict) else None})')
    found.append(str(answer))
  return [answer for answer in found if answer.strip()]


def boxed(answer: str) -> str:
  return rf'\boxed{{{answer}}}'


def _balanced(text: str) -> bool:
  braces = re.sub(r'\\[{}\\]', '', text)
  return braces.count('{') == braces.count('}')


def own(answers: Sequence[str]) -> Iterator[Case]:
  return (Case('self', 'self', boxed(answer), answer, answer) for answer in answers if _balanced(answer))


def rewritten(answers: Sequence[str], kind: str, rng: random.Random) -> Iterator[Case]:
  for answer in answers:
    new = variants.REWRITINGS[kind](answer, rng)
    if new is not None:
      yield Case('rewritings', kind, boxed(new), answer, new)


def marked(answers: Sequence[str], kind: str, _: random.Random) -> Iterator[Case]:
  for answer in answers:
    if completion := variants.MARKS[kind](answer):
      yield Case('rewritings', kind, completion, answer, answer)


def badly_formed(answers: Sequence[str], kind: str, rng: random.Random) -> Iterator[Case]:
  for answer in answers:
    if completion := variants.BAD_FORMS[kind](answer, rng):
      yield Case('bad_forms', kind, completion, answer, answer)


def near(answers: Sequence[str], kind: str, rng: random.Random) -> Iterator[Case | None]:
  """None stands for a near miss of which is not sure that it is one."""
  for answer in answers:
    new = variants.NEAR_MISSES[kind](answer, rng)
    if new is not None and new != answer:
      sure = kind in variants.MADE_TO_DIFFER or formulas.differ(new, answer)
      if sure is not False:
        yield Case('near_misses', kind, boxed(new), answer, new) if sure else None


def others(answers: Sequence[str], kind: str, rng: random.Random) -> Iterator[Case | None]:
  shape = lambda text: re.sub(r'\d+', '0', text) if kind == 'same shape' else ''
  groups = {}
  for answer in answers:
    groups.setdefault(shape(answer), []).append(answer)
  for answer in answers:
    other = rng.choice(groups[shape(answer)])
    if other != answer and (sure := formulas.differ(other, answer)) is not False:
      yield Case('others', kind, boxed(other), answer, other) if sure else None


def cases(answers: Iterable[str], limit: int, seed: int) -> tuple[list[Case], dict[str, int]]:
  """The cases, by reference, and the number of doubtful ones of each group."""
  distinct = [answer for answer in dict.fromkeys(answers) if _balanced(answer)]
  found, doubtful = list(own(distinct)), dict.fromkeys(('near_misses', 'others'), 0)
  kinds = [*((rewritten, kind) for kind in variants.REWRITINGS), *((marked, kind) for kind in variants.MARKS),
           *((badly_formed, kind) for kind in variants.BAD_FORMS), *((near, kind) for kind in variants.NEAR_MISSES),
           *((others, kind) for kind in ('any shape', 'same shape'))]
  for make, kind in kinds:
    rng = random.Random(f'{kind} {seed}')
    drawn = rng.sample(distinct, len(distinct))
    count = 0
    for case in make(drawn, kind, rng):
      if case is None:
        doubtful['near_misses' if make is near else 'others'] += 1
        continue
      found.append(case)
      count += 1
      if count == limit:
        break
  order = {answer: i for i, answer in enumerate(distinct)}
  return sorted(found, key=lambda case: order[case.reference]), doubtful


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
  def stop(*_):
    raise TimeoutError(f'more than {seconds} s')

  previous = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


def task(answer: str) -> types.Task:
  return types.Task(id='made/0', index=0, prompt='', answer=answer, difficulty=0, solution='', tokens=())


def judge(found: Sequence[Case]) -> tuple[np.ndarray, np.ndarray]:
  """Whether each case is accepted, bool, and the milliseconds of processor time of its verdict."""
  verify = rewards.VERIFIERS['math']
  for warm_up in (r'\boxed{x^2 + 1}', r'\boxed{1/3}', r'\boxed{(1, 2]}'):  # imports, and tables made at first use
    verify(warm_up, task(r'\frac{2}{7} + y'))
  accepted, ms = np.zeros(len(found), bool), np.zeros(len(found))
  for i, case in enumerate(tqdm(found, desc='verdicts', file=sys.stderr)):
    start = time.process_time()
    try:
      with time_limit(LIMIT_S):
        accepted[i] = verdicts.checked(verify(case.completion, task(case.reference))).right is True
    except Exception:  # it raises or takes too long: not accepted
      pass
    ms[i] = 1e3 * (time.process_time() - start)
  return accepted, ms


def in_worker_processes(found: Sequence[Case], seed: int) -> dict:
  """Seconds of the verdicts of STEP distinct completions by two processes that have started; of other completions in
  each round."""
  distinct = list({(case.completion, case.reference): case for case in found}.values())
  random.Random(seed).shuffle(distinct)
  seconds = []
  with rewards.Workers(rewards.Config(verifier='math', workers=WORKERS)) as workers:
    workers.score(['1'] * 64, [task(str(i)) for i in range(64)])
    for first in range(0, min(ROUNDS * STEP, len(distinct) - STEP + 1), STEP):
      step = distinct[first:first + STEP]
      tasks = [task(case.reference)._replace(id=f'made/{i}') for i, case in enumerate(step)]
      start = time.perf_counter()
      workers.score([case.completion for case in step], tasks)
      seconds.append(time.perf_counter() - start)
  return {'workers': WORKERS, 'completions': STEP, 'seconds': seconds,
          'median': float(np.median(seconds)) if seconds else None}


def is_one_vote(case: Case) -> bool:
  """Whether maj@k joins a rewriting with its answer."""
  extract, same = rewards.ANSWERS['math'], getattr(rewards.verifiers, 'SAME', {}).get('math')
  try:
    with time_limit(LIMIT_S):
      one, two = (extract(boxed(answer), task(case.reference)) for answer in (case.answer, case.reference))
      return one == two or bool(same and one and two and same(one, two))
  except Exception:  # an extraction that fails gives no vote
    return False


def figures(found: Sequence[Case], accepted: np.ndarray, ms: np.ndarray, doubtful: dict[str, int]) -> dict:
  """What is printed: by group and kind, how many are wrong of how many; times."""
  groups = {}
  for case, is_accepted in zip(found, accepted):
    group = groups.setdefault(case.group, {'cases': 0, 'wrong': 0, 'kinds': {}})
    kind = group['kinds'].setdefault(case.kind, {'cases': 0, 'wrong': 0})
    for counts in (group, kind):
      counts['cases'] += 1
      counts['wrong'] += int(is_accepted != (case.group in ACCEPTED))
  for name, count in doubtful.items():
    groups.setdefault(name, {'cases': 0, 'wrong': 0, 'kinds': {}})['doubtful'] = count
  of_group = {name: float(ms[[case.group == name for case in found]].mean())
              for name, group in groups.items() if group['cases']}
  slowest = [{'ms': float(ms[i]), 'completion': found[i].completion[-200:], 'reference': found[i].reference[:200]}
             for i in np.argsort(-ms)[:5]]
  return {'groups': groups, 'ms': {'mean': float(ms.mean()), 'p95': float(np.quantile(ms, 0.95)), 'of_group': of_group,
                                   'slowest': slowest}}


def show(result: dict) -> None:
  for name, group in result['groups'].items():
    verb = 'refused' if name in ACCEPTED else 'accepted'
    share = 100 * group['wrong'] / max(group['cases'], 1)
    doubtful = f', {group["doubtful"]} doubtful ones left out' if 'doubtful' in group else ''
    print(f'{name}: {group["wrong"]} of {group["cases"]} {verb} ({share:.2f} %){doubtful}')
    for kind, counts in group['kinds'].items():
      if counts['wrong']:
        print(f'  {kind:34}{counts["wrong"]:>6} of {counts["cases"]}')
  print('votes: {split} of {cases} rewritings are split from their answer'.format(**result['votes']))
  print('a verdict takes {mean:.2f} ms on the mean, 95 % at most {p95:.2f} ms'.format(**result['ms']))
  if result['processes']['seconds']:
    print('{completions} distinct completions take {workers} processes {median:.2f} s'.format(**result['processes']))
  for slow in result['ms']['slowest']:
    print(f'  {slow["ms"]:8.1f} ms  {slow["completion"][-70:]!r} for {slow["reference"][:50]!r}')


def write_wrong(path: str, found: Sequence[Case], accepted: np.ndarray, split: Sequence[Case]) -> None:
  """One JSON object a line for each wrong verdict and split vote, by group and kind."""
  wrong = [case for case, is_accepted in zip(found, accepted) if is_accepted != (case.group in ACCEPTED)]
  wrong = sorted(wrong, key=lambda case: (case.group, case.kind)) + [case._replace(group='votes') for case in split]
  with open(path, 'w') as file:
    file.writelines(json.dumps(case._asdict(), ensure_ascii=False) + '\n' for case in wrong)


def measure(answers: Iterable[str], limit: int, seed: int = 0, wrong: str = '', processes: bool = False) -> dict:
  """All figures of some answers.

  Args:
    wrong: a file for the cases that come out wrong, or ''.
    processes: whether to measure worker processes too.
  """
  found, doubtful = cases(answers, limit, seed)
  accepted, ms = judge(found)
  rewritings = [case for case in found if case.group == 'rewritings' and case.kind in variants.REWRITINGS]
  split = [case for case in tqdm(rewritings, desc='votes', file=sys.stderr) if not is_one_vote(case)]
  if wrong:
    write_wrong(wrong, found, accepted, split)
  result = figures(found, accepted, ms, doubtful)
  result['votes'] = {'cases': len(rewritings), 'split': len(split)}
  return result | ({'processes': in_worker_processes(found, seed)} if processes else {})


def made_up() -> list[str]:
  """The references of the corpus that the tests have."""
  return [reference for pairs in make_verifier_corpus.PAIRS.values() for reference, _, _ in pairs]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--answers', nargs='+', default=[], metavar='FILE', help='files of published answers')
  parser.add_argument('--field', default='answer', help='of the answer in the rows of files')
  parser.add_argument('--rows', type=int, default=0, help='rows of each file, drawn at random; 0: all')
  parser.add_argument('--limit', type=int, default=200, help='cases of each kind at most')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--wrong', default='', metavar='FILE', help='write the cases that come out wrong, as JSON lines')
  parser.add_argument('--json', action='store_true', help='print one JSON object last')
  args = parser.parse_args()
  answers = [] if args.answers else made_up()
  for path in args.answers:
    rows = read(path, args.field)
    answers += random.Random(args.seed).sample(rows, args.rows) if 0 < args.rows < len(rows) else rows
  result = {'machine': machine.describe(), 'answers': len(set(answers))}
  print('{answers} answers, {machine}'.format(**result))
  result |= measure(answers, args.limit, args.seed, args.wrong, processes=True)
  show(result)
  if args.json:
    print(json.dumps(result))


if __name__ == '__main__':
  main()
