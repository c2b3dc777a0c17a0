r"""The letter of a multiple choice that a completion marks.

The marks, first to last: <answer>...</answer>; \boxed{...}, the last box that holds a letter; 'the correct option is
(B)' and its like; a heading 'Answer' above the letter, and '#### B'; a last line that is a letter alone; what follows,
or stands before, a box that holds no letter; a completion of one line that starts with a letter, or a first line that
is one. A mark without a letter does not hide one of another kind. A mark with several letters, such as '(A) or (B)',
is an answer that is no choice, and ends the search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import re

from kr_jax.answers import marks
from kr_jax.rewards import verdicts
from kr_jax.types import Task

_SEVERAL = 'several'  # what a mark holds that is an answer, and no choice

# LaTeX, Markdown and quotes that may stand around a letter.
_MARKUP = re.compile(
    r'\\(?:(?:text|math|bold)[a-z]*|rm|bf|sf|tt|it|boxed|fbox|mbox|underline|displaystyle|large|Large|left|right)'
    r'(?![a-zA-Z])|\\[()\[\]]|[{}$*`"“”]|__|(?<!\w)[_\'‘’]|[_\'‘’](?!\w)')
_SPACE = re.compile(r'\\[,;:! ]|~|\s+')
_QUAD = re.compile(r'\\q?quad(?![a-zA-Z])')  # between a letter and its text

# The words before a letter, the letter, and what may follow it: nothing, punctuation, or a reason.
_NOUN = r'(?:answer|option|choice|alternative|letter)'
_LEAD = re.compile(
    rf'(?:(?:both|either|the|my|final|correct|right|best|most|likely|probably|clearly|indeed|therefore|thus|so|hence'
    rf'|simply|just|{_NOUN}s?|is|are|be|would|should|must)\b[\s:]*)*', re.I)
_LETTER = re.compile(
    r'(?:[(\[]\s*([A-Z])\s*[)\]]|([A-Z]))'
    r'(?=$|[)\]:;,/&]|\.(?![A-Za-z])|\s*[-–—]+(?=\s|>)|\s+(?:because|since|as|or|and|&|[(\[])|(?<=[)\]])'
    r'|\s+is\s+(?:the\s+)?(?:only\s+)?(?:correct|right|best|answer|true|valid|most)\b)', re.I)
# A further letter: in the style of the first, or after a word or sign that joins two.
_JOIN = re.compile(r'[\s).\]]*(?:,|/|&|;|\bor\b|\band\b|\bnor\b|\band/or\b)[\s,]*(?:or\b|and\b)?\s*'
                   r'(?:option|choice|answer)?\s*(?:[(\[]([A-Z])[)\]]|([A-Z])(?=$|[\s).,:;/&\]]))'
                   r'(?!\s+(?:is|was|does|has|would|cannot|can)\b)')
_NEXT = re.compile(r'[\s.,)\]]*(?:\(([A-Z])\)|\[([A-Z])\]|([A-Z])(?=[).]+(?:\s|$)))')
_LOWER_JOIN = re.compile(r'\)?\s*(?:,|/|&|\bor\b|\band\b)\s*[(]([a-z])[)]')

_MOST_CHARACTERS = 4000  # of a box
# A sentence that says what the answer is. What follows is looked at, not read, so that a later one on its line counts.
_DECLARED = re.compile(
    rf'\b(?P<bad>(?:wrong|incorrect|false|not|first|second|other)\s+)?'
    rf'(?:{_NOUN}|(?:correct|right|best|most\s+\w+)\s+(?:one|statement|response|description|conclusion))\b'
    rf'(?:\s+(?:here|(?:to|for|among|that)\s[^.\n]{{1,60}}?))?["\'*_\s]*'
    rf'(?:\b(?:is|was|would\s+be|should\s+be|must\s+be|will\s+be|has\s+to\s+be)|:|=|\s[-–—](?=\s))["\'*_\s:=]*'
    rf'(?=(?P<rest>[^\n]{{0,200}}))'
    rf'|\b(?:I|we|I\'ll|I\'d|so|therefore|thus|hence)\b[^.\n]{{0,24}}?\b(?:choose|chose|select|pick|go\s+with)\b\s+'
    rf'(?!\W*[A-Z]\W*\s(?:as|to)\b)(?=(?P<chosen>[^\n]{{0,200}}))'
    rf'|\b(?:so|therefore|thus|hence|it\s+is|it\s+must\s+be)\b[,:]?\s+(?=(?P<thus>[(\[][A-Z][)\]])\W{{0,9}}$)',
    re.I | re.M)
_IS_RIGHT = re.compile(
    rf'(?P<doubt>\b(?:if|whether|suppose|assume|assuming|why|not|thought|say|neither|nor)\b[^.\n]{{0,24}})?'
    rf'(?:\b{_NOUN}\s+)?(?:(?<!\w)[(\[]([A-Z])[)\]]|\b([A-Z]))\.?\s+(?:is|must\s+be|would\s+be)\s+'
    rf'(?:(?:therefore|thus|clearly|indeed)\s+)?(?:the\s+)?(?:only\s+)?'
    rf'(?:(?:correct|right|best|valid|true)(?:\s+{_NOUN}\b|\s+one\b|\s*[.!]|\s*$)|{_NOUN}\b)', re.M)
_HEADING = re.compile(rf'^[#>*_ ]*(?:(?:the|my|final|correct)\s+)*{_NOUN}[*_: ]*\n(?P<rest>[^\n]*)', re.I | re.M)
_HASHES = re.compile(r'####[ \t]*(?P<rest>[^\n]*)')
_LATER = re.compile(rf'[(\[]([A-Z])[)\]]|\b{_NOUN}\s+([A-Z])\b|^\W{{0,9}}([A-Z])\W{{0,9}}$', re.M)
_ALONE = re.compile(rf'\W*(?:{_NOUN}\s+)?\W*[A-Z]\W*')


def letter(text: str) -> str | None:
  """The letter of a choice, A..Z, that an answer starts with: B of 'B', '(b)' or 'B. 5 m'; None: there is none, or
  there are several."""
  found = _read(text)
  return None if found == _SEVERAL else found


def _read(text: str) -> str | None:
  """The letter that an answer starts with, _SEVERAL, or None."""
  text = _SPACE.sub(' ', _MARKUP.sub('', _SPACE.sub(' ', _QUAD.sub(' - ', text)))).strip(' #')
  text = text[_LEAD.match(text).end():]
  found = _LETTER.match(text)
  if not found:
    return None
  first, rest = found[1] or found[2], text[found.end():]
  join = _LOWER_JOIN if first.islower() else _JOIN
  further = join.match(rest) or _NEXT.match(rest) if first.isupper() else join.match(rest)
  if further and next(filter(None, further.groups())).upper() != first.upper():
    return _SEVERAL
  if found[2] and re.match(r'\s+(?:or|and|&)\s+(?!not\b)', rest):
    return None  # 'A and its inverse'
  if first in 'aA' and found[2] and re.match(r'\s+[([]', rest):
    return None  # 'a (small) part'
  return first.upper()


def _plain(text: str) -> str:
  """The text without markup, empty lines, and more than one blank in a row."""
  return re.sub(r' ?\n\s*', '\n', re.sub(r'[^\S\n]+', ' ', _MARKUP.sub('', text)))


def _declared(text: str) -> list[str]:
  """What sentences declare to be the answer, in their order."""
  found = []
  for match in _DECLARED.finditer(text):
    if not match['bad']:
      found.append((match.start(), next(x for x in match.group('rest', 'chosen', 'thus') if x is not None)))
  for match in _IS_RIGHT.finditer(text):
    if not match['doubt']:
      found.append((match.start(), match[2] or match[3]))
  return [rest for _, rest in sorted(found)]


def _marked(text: str) -> Iterator[str]:
  """The texts outside of tags that hold the answer if they hold a letter, first those that count most."""
  boxes, plain = marks.boxes(text), _plain(text)
  yield from (text[box.inside] for box in reversed(boxes) if box.end - box.start <= _MOST_CHARACTERS)
  yield from reversed(_declared(plain))
  yield from (match['rest'] for match in reversed([*_HEADING.finditer(plain), *_HASHES.finditer(plain)]))
  lines = plain.strip().splitlines()
  if len(lines) > 1 and _ALONE.fullmatch(lines[-1]):
    yield lines[-1]
  if places := [(box.start, box.end) for box in boxes] or [tag.span() for tag in marks.TAG.finditer(text)]:
    start, end = places[-1]
    later = {next(filter(None, match.groups())) for match in _LATER.finditer(_plain(text[end:]))}
    if later:
      yield later.pop() if len(later) == 1 else _SEVERAL
    yield text[text.rfind('\n', 0, start) + 1:start]
  if len(lines) == 1:
    yield text
  elif lines and _ALONE.fullmatch(lines[0]):
    yield lines[0]


def _find(text: str) -> str | None:
  """The letter that a text marks, _SEVERAL, or None."""
  for tagged in reversed(marks.TAG.findall(text)):
    if found := _find(tagged) or _read(tagged):
      return found
  for marked in _marked(text):
    if found := marked if marked == _SEVERAL else _read(marked):
      return found
  return None


def answer(completion: str, task: Task | None = None) -> str | None:
  """The marked letter, A..Z; None: none is marked, or several are. Thoughts up to </think> are not read."""
  found = _find(completion.rpartition('</think>')[2])
  return None if found == _SEVERAL else found


def verify(completion: str, task: Task) -> verdicts.Verdict:
  """Whether the marked letter is the task's. Raises ValueError if the task's answer is no letter."""
  right = _right(task)
  found = _find(completion.rpartition('</think>')[2])
  return verdicts.Verdict(found == right, answered=found is not None)


def check(tasks: Iterable[Task]) -> None:
  """Raises ValueError for a task whose answer is not the letter of a choice."""
  for task in tasks:
    _right(task)


def _right(task: Task) -> str:
  """The letter that is right. Raises ValueError if the task's answer is none."""
  right = letter(task.answer)
  if right is None:
    raise ValueError(f'the answer {task.answer!r} of {task.id} is not the letter of a choice, as the verifier choice '
                     'needs it; correct the data, or set another verifier')
  return right
