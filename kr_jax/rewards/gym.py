r"""Tasks of reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760): scored by the package's own scorers.

A completion is right if the scorer of its dataset gives 1 to the marked answer, with these differences:

  - The answer goes to the scorer as it is written, and, where that earns less than 1, in forms that say the same:
    without the box, `$`, emphasis or full stop around it, and LaTeX as plain text. The best score counts.
  - Some scorers give 1 to wrong answers. `_ALSO` has what else an answer of theirs must fulfil.
  - Some scorers evaluate the answer as Python or with SymPy, so that a completion could run code. Their answers are
    plain words, a literal, or a formula of known names (`is_harmless`); any other answer of theirs is wrong, unread.

A scorer that raises does not parse the answer: it is wrong, unless memory or a file is missing. `check` finds scorers
that refuse every answer, or accept any, before a run starts.
"""

from __future__ import annotations

import ast
import collections
from collections.abc import Callable, Iterable, Iterator
import contextlib
from fractions import Fraction
import functools
import inspect
import json
import math
import operator
import re
import textwrap
import time
from typing import Any

from kr_jax.answers import marks
from kr_jax.rewards import verdicts
from kr_jax.types import Task

Entry = dict[str, Any]  # 'question', 'answer', 'metadata', as reasoning-gym makes it

_MOST_CHARACTERS = 10_000  # of an answer, or four times the gold answer's
_CHECKED_TASKS, _CHECK_SECONDS = 8, 2.0  # of each dataset, at most


def verify(completion: str, task: Task) -> verdicts.Verdict:
  """The verdict that `scored` gives, with the reward 1.0 or 0.0. Raises ValueError as `scored` does."""
  return scored(completion, task)._replace(reward=None)


def scored(completion: str, task: Task) -> verdicts.Verdict:
  """The verdict, and the score in 0..1 as reward.

  task.info is JSON (else ValueError is raised): {"dataset": its name, "entry": {"answer", "metadata", ...}}, in which
  {"tuple": [...]} stands for a tuple. A completion of several lines that marks no answer is itself read; unless it is
  right, it has no answer.
  """
  dataset, entry = _parsed(task)
  best = 0.0
  for text in _texts(completion):
    best = max(best, score(dataset, entry, text))
    if best == 1:
      break
  return verdicts.Verdict(best == 1, best, answered=best == 1 or bool((marks.raw(completion) or '').strip()))


def answer(completion: str, task: Task | None = None) -> str | None:
  """The marked answer, or the whole completion where none is marked, in the plainest form; None: it is empty."""
  text = _texts(completion)[0]
  return _plain(marks.extract(text) or marks.trim(text)) or None


_REST = re.compile(r'.*\banswer[*_ ]*(?:is\b|:)[*_:]*(.*)', re.DOTALL | re.IGNORECASE)


def _texts(completion: str) -> list[str]:
  """The answer as the completion has it, once for each reading of where it ends."""
  text = completion.rpartition('</think>')[2]
  if tags := marks.TAG.findall(text):
    return tags[-1:]
  found = marks.raw(text)
  rest = _REST.fullmatch(text) if '\n' in text and '\\boxed' not in text else None  # an answer of several lines
  return [text.strip() if found is None else found, *([rest[1]] if rest else [])]


def _parsed(task: Task) -> tuple[str, Entry]:
  try:
    info = json.loads(task.info, object_hook=lambda x: tuple(x['tuple']) if x.keys() == {'tuple'} else x)
    return info['dataset'], info['entry']
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f'the info {task.info!r} of {task.id} is not JSON with "dataset" and "entry", as the verifier '
                     'reasoning_gym needs it') from error


def score(dataset: str, entry: Entry, text: str) -> float:
  """The best score of the text's forms, in 0..1; it is 1 only for a right answer."""
  best = 0.0
  for form in dict.fromkeys(_forms(text, entry)):
    best = max(best, _score(dataset, entry, form))
    if best == 1:
      break
  return best


def _score(dataset: str, entry: Entry, text: str) -> float:
  """The score of a text; 0 where the scorer raises, returns no number in 0..1, or gives 1 to a wrong answer."""
  if not _is_read(dataset, entry, text):
    return 0.0
  scorer = _scorer(dataset)
  try:
    with contextlib.redirect_stdout(None):  # some scorers print what is wrong
      found = float(scorer(text, entry))
    if not found >= 1 - 1e-9 or found > 1:  # NaN too
      return found if 0 <= found < 1 else 0.0
    return float(dataset not in _ALSO or _ALSO[dataset](text, entry))
  except (MemoryError, OSError):  # of the machine, not of the answer
    raise
  except Exception:  # RecursionError too
    return 0.0


@functools.cache  # some scorers read files for 0.3 s when they are made; there are only as many as datasets
def _scorer(dataset: str) -> Callable[[str, Entry], float]:
  import reasoning_gym  # here, as the import takes seconds
  try:
    return reasoning_gym.get_score_answer_fn(dataset)
  except (ValueError, AssertionError) as error:  # unknown, or without a default config
    raise ValueError(f'reasoning-gym {reasoning_gym.__version__} has no scorer of {dataset!r}: {error}') from error


# Forms of an answer.

_PLAIN = [(re.compile(pattern), to) for pattern, to in (
  (r'\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])\.?|\\[,;:!]', ''), (r'\\ |\\q?quad(?![a-zA-Z])', ' '),
  (r'\\(?:text|math)(?:rm|bf|it|tt|sf|normal)?\s*\{([^{}]*)\}', r'\1'), (r'\\operatorname\s*\{([^{}]*)\}', r'\1'),
  (r'\\[dt]?frac\s*\{\s*(\w+)\s*\}\s*\{\s*(\w+)\s*\}', r'\1/\2'), (r'\\[dt]?frac\s*(\d)\s*(\d)', r'\1/\2'),
  (r'\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}', r'(\1)/(\2)'), (r'\\sqrt\s*\{([^{}]*)\}', r'sqrt(\1)'),
  (r'\^\s*\{([^{}]*)\}', r'**(\1)'), (r'\^', '**'), (r'\\(?:times|cdot|ast)(?![a-zA-Z])|[×·⋅∙]', '*'),
  (r'\\div(?![a-zA-Z])|÷', '/'), (r'[−–]', '-'), (r'\\(?:rightarrow|to)(?![a-zA-Z])', '→'),
  (r'\\(sin|cos|tan|sec|csc|cot|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|pi)(?![a-zA-Z])', r'\1'),
  (r'\\([{}%$_#&])', r'\1'), (r'(?<=\d)\s+x\s+(?=[\d(])|(?<=\))\s*x\s*(?=[\d(])', '*'))]


def _plain(text: str) -> str:
  """The text without LaTeX: '\\frac{7}{2} \\times 3' is '7/2 * 3'."""
  for _ in range(4):  # fractions and roots inside of others
    before = text
    for pattern, to in _PLAIN:
      text = pattern.sub(to, text)
    if text == before:
      break
  return text.strip()


def _forms(text: str, entry: Entry) -> Iterator[str]:
  """The text as it is written, then what says the same in the ways of other scorers."""
  yield from (text, text.strip())
  if len(text) > _longest(entry):
    return
  trimmed = marks.trim(text)
  yield trimmed
  yield trimmed + re.match(r'[.,;:!?]*', text[text.find(trimmed) + len(trimmed):])[0]  # '**He sat.**'
  if text.strip().startswith('**'):
    yield text.strip().strip('*')  # '**2*x**3**'
  yield (marks.raw(text) or text).strip()
  inside = marks.extract(text) or trimmed
  plain = _plain(inside)
  yield from (inside, plain, plain.replace('*', ' × '), re.sub(r'(?<=\d),(?=\d{3}(?!\d))', '', plain),
              re.sub(r'^[a-zA-Z]\s*=\s*', '', plain))
  # 2x is 2*x, and e is the base of the exponential function, for SymPy.
  product = re.sub(r'(?<=\d)(?=[a-zA-DF-Z(])(?![eE]\d)|(?<=\))(?=[\w(])', '*', plain)
  yield re.sub(r'(?<!\w)e(?=\*\*)', 'E', product)
  left, equals, right = product.partition('=')
  if equals and right.strip() == str((entry.get('metadata') or {}).get('target', 24)):
    yield left.strip()  # '7*3 - 4 = 17' where 17 is asked for


def _longest(entry: Entry) -> int:
  """The most characters that an answer may have."""
  return max(_MOST_CHARACTERS, 4 * len(entry.get('answer') or ''))


# What a scorer may read.

_WORDS = re.compile(r'[\w\s]*')
# An item of a list: a word or a number. SymPy evaluates texts in a list, so that they must be harmless too.
_ITEM = re.compile(r'[\w\s+-]*(?:\.\d+)?')
_CONSTANTS = {'pi', 'E', 'I'}
_GROWING = {'exp', 'sinh', 'cosh'}  # as a power does
_FUNCTIONS = {'sin', 'cos', 'tan', 'sec', 'csc', 'cot', 'asin', 'acos', 'atan', 'arcsin', 'arccos', 'arctan', 'sinh',
              'cosh', 'tanh', 'asinh', 'acosh', 'atanh', 'exp', 'log', 'ln', 'sqrt', 'Abs', 'abs'}
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
# Of a formula: the digits of a number that it can make; an exponent, of a name or number and of anything else; the
# digits in an exponent that has names.
_MOST_DIGITS, _HIGHEST_EXPONENT, _HIGHEST_OF_SUM, _MOST_EXPONENT_DIGITS = 1000, 100, 12, 6
# NaN passes comparisons that it should fail, and 1e9999999 takes a scorer's time: no task asks for such numbers.
_NO_NUMBER = re.compile(r'(?<![a-z])(?:nan|inf)|\de[+-]?\d{4}', re.IGNORECASE)
# They repeat moves as often as a number says.
_REPEATING = ('rubiks_cube', 'rush_hour')
# Of scorers whose time grows with the square of the length, or faster.
_MOST_CHARACTERS_OF = {'propositional_logic': 300}


def _is_read(dataset: str, entry: Entry, text: str) -> bool:
  """Whether a scorer may read a text."""
  gold = entry.get('answer') or ''
  if text == gold:
    return True
  if len(text) > _MOST_CHARACTERS_OF.get(dataset, _longest(entry)):
    return False
  if (re.search(r'\d', gold) and _NO_NUMBER.search(text) and not _NO_NUMBER.search(gold)
      or dataset in _REPEATING and re.search(r'\d{3}', text)):
    return False
  return not _evaluates(dataset) or is_harmless(text)


def is_harmless(text: str) -> bool:
  """Whether evaluating a text, by Python or SymPy, can neither run code nor take long.

  That is so for words without punctuation, a list of words and numbers, and a formula of numbers, one-letter names
  and common functions.
  """
  if not text.isascii() or '__' in text or '#' in text:
    return False
  if _WORDS.fullmatch(text):
    return True
  try:
    tree = ast.parse(text.strip(), mode='eval').body
    return _is_literal(tree) or _digits(tree) <= _MOST_DIGITS
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return False


def _is_literal(node: ast.expr) -> bool:
  if isinstance(node, (ast.List, ast.Tuple)):
    return all(map(_is_literal, node.elts))
  if isinstance(node, ast.UnaryOp):
    return isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant) and _digits(node.operand) > 0
  if isinstance(node, ast.Constant) and isinstance(node.value, str):
    return bool(_ITEM.fullmatch(node.value))
  return isinstance(node, ast.Constant) and _digits(node) <= _MOST_DIGITS


def _digits(node: ast.expr) -> int:
  """At least the digits of any number that a formula makes on its way. Raises ValueError for what is no formula."""
  if isinstance(node, ast.Constant) and type(node.value) in (int, float) and math.isfinite(node.value):
    return len(str(node.value))
  if isinstance(node, ast.Name) and (len(node.id) == 1 or node.id in _CONSTANTS):
    return 1
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
    return _digits(node.operand)
  if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
      and len(node.args) == 1 and not node.keywords):
    digits = 4 * _digits(node.args[0])  # SymPy simplifies functions of functions for minutes
    return max(digits, _power_digits(node.args[0])) if node.func.id in _GROWING else digits
  if isinstance(node, ast.BinOp):
    left, right = _digits(node.left), _digits(node.right)
    if isinstance(node.op, (ast.Add, ast.Sub)):
      return max(left, right) + 1
    if isinstance(node.op, (ast.Mult, ast.Div)):
      return left + right
    if isinstance(node.op, ast.Pow) and any(isinstance(x, (ast.Name, ast.Call)) for x in ast.walk(node.right)):
      if right <= _MOST_EXPONENT_DIGITS:
        return left * _power_digits(node.right)
    elif isinstance(node.op, ast.Pow):
      highest = _HIGHEST_EXPONENT if isinstance(node.left, (ast.Name, ast.Constant)) else _HIGHEST_OF_SUM
      if (exponent := abs(_value(node.right))) <= highest:
        return left * max(1, math.ceil(exponent))
  raise ValueError('no formula')


def _power_digits(exponent: ast.expr) -> int:
  """At least the digits of e to a formula, or above _MOST_DIGITS; where it has names, the power stays a symbol."""
  names, digits = {node.id for node in ast.walk(exponent) if isinstance(node, ast.Name)}, _digits(exponent)
  return 10 ** min(digits, 4) // 2 if names <= _CONSTANTS | _FUNCTIONS else digits


def _value(node: ast.expr) -> Fraction:
  """The exact value of a formula of numbers and + - * /. Raises ValueError for another one."""
  if isinstance(node, ast.Constant) and type(node.value) in (int, float) and math.isfinite(node.value):
    return Fraction(str(node.value))
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
    value = _value(node.operand)
    return -value if isinstance(node.op, ast.USub) else value
  if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
    left, right = _value(node.left), _value(node.right)
    if right or not isinstance(node.op, ast.Div):
      return _ARITHMETIC[type(node.op)](left, right)
  raise ValueError('no formula of numbers and + - * /')


# Functions that evaluate a text, besides those of SymPy.
_EVALUATORS = {'eval', 'exec', 'literal_eval', 'parse_expr', 'system', 'popen', 'Popen', 'run', 'check_output'}


@functools.cache
def _evaluates(dataset: str) -> bool:
  """Whether the scorer of a dataset, or a function of reasoning-gym that it calls, evaluates a text."""
  scorer = _scorer(dataset)
  todo, seen = [inspect.unwrap(getattr(scorer, '__func__', scorer))], set()
  while todo:
    function = todo.pop()
    if function in seen:
      continue
    seen.add(function)
    try:
      tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
      return True  # nothing shows that it does not
    for node in ast.walk(tree):
      if isinstance(node, (ast.Import, ast.ImportFrom)) and 'sympy' in ast.unparse(node):
        return True
      names = ast.unparse(node.func).split('.') if isinstance(node, ast.Call) else ['']
      base = function.__globals__.get(names[0])
      called = base if len(names) == 1 else inspect.getattr_static(getattr(scorer, '__self__', None), names[-1], None)
      called = getattr(called, '__func__', called)
      origin = getattr(base, '__module__', None) or getattr(base, '__name__', '')
      if inspect.isfunction(called) and called.__module__.startswith('reasoning_gym.'):
        todo.append(called)
      elif names[-1] in _EVALUATORS or origin.startswith('sympy'):
        return True
  return False


# What a right answer fulfils besides, where a scorer gives 1 to wrong ones.

_NUMBER = re.compile(r'[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,3})?', re.IGNORECASE)
_DECIMAL = re.compile(r'\+?(\d*)\.?(\d*)(?:e([-+]?\d{1,3}))?', re.IGNORECASE)


def _is_number_list(text: str, entry: Entry) -> bool:
  """Whether the numbers of a text are those of the gold answer; where that has none, the text must be empty too.

  number_sorting accepts numbers that are off by 1; gsm_symbolic and fraction_simplification read the first of several,
  gsm_symbolic without its sign; polynomial_equations skips what is no number.
  """
  gold = entry['answer']
  if not _NUMBER.search(gold):
    return text.strip() in (gold, '""', "''", '')
  return sorted(map(Fraction, _NUMBER.findall(text))) == sorted(map(Fraction, _NUMBER.findall(gold)))


def _is_duration(text: str, entry: Entry) -> bool:
  """Whether a text has the gold answer's number of days. time_intervals reads the first number of '27 days or 7'."""
  return ':' in entry['answer'] or _is_number_list(text, entry)


def _is_gold(text: str, entry: Entry) -> bool:
  """Whether a text is the gold answer, but for case and blanks.

  game_of_life_halting accepts any text. The others accept an answer with something after it, or ten right letters.
  """
  return ''.join(text.split()).casefold() == ''.join(entry['answer'].split()).casefold()


def _is_probability(text: str, entry: Entry) -> bool:
  """Whether a text is the gold answer's number, exactly or rounded to four digits or more.

  coin_flip accepts what is within 0.0001, or starts like the gold answer: 0 is right for 0.234375.
  """
  exact = (entry.get('metadata') or {}).get('rational') or {}
  gold = Fraction(exact['numerator'], exact['denominator']) if exact else Fraction(entry['answer'])
  value = Fraction(text.replace(',', '').strip())
  if value in (gold, Fraction(entry['answer'])):
    return True
  found = _DECIMAL.fullmatch(text.strip())
  if not found:
    return False
  digits = len((found[1] + found[2]).lstrip('0'))
  unit = Fraction(10) ** (int(found[3] or 0) - len(found[2]))  # of the last digit
  return digits >= 4 and abs(value - gold) <= unit / 2


def _makes_target(text: str, entry: Entry) -> bool:
  """Whether a formula of + - * / has the target's value, exactly, and uses each of the numbers once.

  puzzle24 accepts other numbers than the given ones, and values in 24..25.
  """
  tree = ast.parse(text.strip(), mode='eval').body
  used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
  return sorted(used) == sorted(entry['metadata']['numbers']) and _value(tree) == entry['metadata'].get('target', 24)


_ALSO: dict[str, Callable[[str, Entry], bool]] = {
    'coin_flip': _is_probability, 'countdown': _makes_target, 'puzzle24': _makes_target,
    'number_sorting': _is_number_list, 'gsm_symbolic': _is_number_list, 'polynomial_equations': _is_number_list,
    'fraction_simplification': _is_number_list, 'time_intervals': _is_duration,
    **dict.fromkeys(('figlet_font', 'game_of_life', 'game_of_life_halting', 'letter_jumble', 'spell_backward',
                     'word_sorting'), _is_gold)}


# Before a run.

_NONSENSE = ('', '0', 'x', 'nan', '[]', '{}', '-987654321', 'nonsense and more nonsense')
_OPPOSITES = (('True', 'False'), ('Yes', 'No'), ('0', '1'))


def check(tasks: Iterable[Task]) -> None:
  """Raises ValueError for a dataset whose own answers are refused, or which accepts wrong ones.

  Some tasks of each dataset are tried, for at most two seconds a dataset: each with its own answer, with nonsense, with
  opposites, with the answers of the others, and with its own answer's first digit changed. Other tasks' answers may
  be right where a task has many solutions; a dataset is refused if more than half of them are.
  """
  by_dataset: dict[str, list[Task]] = {}
  for task in tasks:
    by_dataset.setdefault(task.source or task.id.rpartition('/')[0], []).append(task)
  for some in by_dataset.values():
    step = max(1, len(some) // _CHECKED_TASKS)
    _check_dataset([(task, *_parsed(task)) for task in some[::step][:_CHECKED_TASKS]])


def _check_dataset(sample: list[tuple[Task, str, Entry]]) -> None:
  end = time.monotonic() + _CHECK_SECONDS
  tried, accepted, example = collections.Counter(), collections.Counter(), {}
  for task, dataset, entry in sample:
    gold = entry.get('answer')
    right = lambda text, dataset=dataset, entry=entry: score(dataset, entry, text) == 1
    if gold is not None and not right(gold):
      raise ValueError(f'the verifier reasoning_gym refuses the answer {gold!r} of {task.id}, a task of {dataset}; '
                       'no completion could be right. Name another dataset, or set a verifier of your own')
    others = {entry.get('answer') for _, name, entry in sample if name == dataset} - {gold, None}
    # A task without a gold answer may happen to be solved by nothing at all.
    probes = [(text if gold is None else 'wrong', text) for text in _wrong(gold, right)]
    for kind, text in [*probes, *(('others', text) for text in others)]:
      if time.monotonic() > end:
        break
      tried[kind] += 1
      if right(text):
        accepted[kind] += 1
        example.setdefault(kind, f'reasoning-gym accepts the wrong answer {text!r} to {task.id}, a task of {dataset} '
                           f'whose answer is {gold!r}; verdicts would mean nothing. Name another dataset, or set a '
                           'verifier of your own')
  for kind, number in accepted.items():
    if kind == 'wrong' or number > tried[kind] / 2:
      raise ValueError(example[kind])


def _wrong(gold: str | None, right: Callable[[str], bool]) -> Iterator[str]:
  """Answers that are wrong whatever the task is."""
  same = lambda text: gold is not None and text.strip().casefold() == gold.strip().casefold()
  is_zero = gold is not None and '0' in gold and not re.search('[1-9]', gold)
  for text in _NONSENSE:
    if not (same(text) or text == '0' and is_zero or gold is not None and not gold.strip() and len(text) < 3):
      yield text  # several texts may stand for no answer
  for one, two in _OPPOSITES:
    if same(one) or same(two):
      yield two if same(one) else one
    elif right(one):
      yield two
  if gold is not None and _NUMBER.fullmatch(gold) and not is_zero:
    first = re.search('[1-9]', gold)
    yield f'{gold[:first.start()]}{int(first[0]) % 9 + 1}{gold[first.end():]}'
