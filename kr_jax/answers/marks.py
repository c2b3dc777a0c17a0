r"""The answer that a completion marks. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import NamedTuple

_BOX = re.compile(r'\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]', re.DOTALL)
_BARE_BOX = re.compile(r'\\boxed\s+([^\s{}$,]+)')
TAG = re.compile(r'<answer>((?:(?!<answer>).)*?)</answer>', re.DOTALL)
_HASHES = re.compile(r'(?<!#)####(?!#)[ \t]*([^\n]*)')
_IS = re.compile(r'\banswer[*_\s]*(?:is\b|:|=)[:*_\s]*', re.IGNORECASE)
_DISPLAY = re.compile(r'\$\$(.+?)\$\$|\\\[(.+?)\\\]', re.DOTALL)
# What may stand between boxes that together are a list.
_BETWEEN = re.compile(r'(?:[\s$,;&]|\\[()\[\],;:! ]|\\text\s*\{[\s,]*(?:and|or)\s*\}|\band\b|\bor\b|\\q?quad\b)*')
# A clause after an answer in words: ', in total', ' because ...'.
_CLAUSE = re.compile(
    r',\s+(?!(?:and|or)\b)[a-z]{2,}|\s(?:because|since|which|where|so that|as (?:we|it|the|shown|required|desired))\b')


def extract(completion: str) -> str | None:
  r"""The answer that a completion marks; None: there is none.

  The last mark of the first kind that occurs counts. The kinds are <answer>...</answer>; '#### ...' on the last line;
  \boxed{...} that is not empty and whose braces close; '#### ...' to the end of its line; 'answer is ...' or
  'answer: ...' to the end of the sentence; the line after a heading with 'answer' in it. A mark inside <answer> counts
  before the rest of it. Boxes with nothing but commas or 'and' between them are one list. A completion of one line
  without a mark is itself the answer. Thoughts up to </think> are not read.
  """
  found = raw(completion)
  return trim(found) or None if found is not None else None


def raw(completion: str) -> str | None:
  """`extract` as the completion has it: with the punctuation and marks of formulas around it."""
  text = completion.rpartition('</think>')[2]
  tags = TAG.findall(text)
  if tags:
    found = _marked(tags[-1])
    return found if found is not None else tags[-1]
  found = _marked(text)
  if found is None and '\n' not in text.strip():
    found = text
  return found


def _marked(text: str) -> str | None:
  """What a box, '####' or words mark."""
  last_line = text.rstrip().rpartition('\n')[2]
  hashes = None if '\\boxed' in last_line else _last(_HASHES, last_line)  # which a box before may contradict
  return hashes or box(text) or _last(_HASHES, text) or _phrase(text)


def _last(pattern: re.Pattern[str], text: str) -> str | None:
  """Group 1 of the last match that is not blank."""
  return next((x for x in reversed(pattern.findall(text)) if x.strip()), None)


def _phrase(text: str) -> str | None:
  """What follows the last 'answer is' or 'answer:', or a heading."""
  marks = [*_IS.finditer(text)]
  if not marks:
    return _under_heading(text)
  rest = text[marks[-1].end():]
  display = _DISPLAY.match(rest)
  if display:
    return display[1] or display[2]
  sentence = re.split(r'\n|\.\s', rest, maxsplit=1)[0]
  clause = _CLAUSE.search(sentence)
  if clause and re.search(r'[\d\\$]', sentence[:clause.start()]):
    sentence = sentence[:clause.start()]
  return sentence


def _under_heading(text: str) -> str | None:
  """The first line after the last heading with 'answer' in it."""
  found, is_next = None, False
  for line in text.splitlines():
    if line.startswith('#'):
      is_next = re.search(r'\banswer\b', line, re.IGNORECASE) is not None
    elif is_next and line.strip():
      found, is_next = line, False
  return found


class Box(NamedTuple):
  """Where a box stands in a text, and where its content does."""

  start: int
  inside: slice
  end: int


def boxes(text: str) -> list[Box]:
  """The boxes that close, in the order of their starts. A box may stand in another one."""
  opened, found = [], []
  for token in _BOX.finditer(text):
    if token[0][-1] == '{' and token[0] != '\\{':
      opened.append(token)
    elif token[0] == '}' and opened:
      start = opened.pop()
      if start[0] != '{':
        found.append(Box(start.start(), slice(start.end(), token.start()), token.end()))
  return sorted(found, key=lambda box: box.start)


def box(text: str) -> str | None:
  """The content of the last box that closes and is not empty, or of the last boxes that are a list."""
  last, found = None, []
  for place in reversed(boxes(text)):
    if last and not (place.end <= last.start and _BETWEEN.fullmatch(text, place.end, last.start)):
      break
    if inside := text[place.inside].strip():
      last = place
      found.insert(0, inside)
  if not found:
    return _last(_BARE_BOX, text)
  return ', '.join(found) if len(set(found)) > 1 else text[last.inside]


_AROUND = (('**', '**'), ('__', '__'), ('$$', '$$'), ('$', '$'), ('`', '`'), ('\\(', '\\)'), ('\\[', '\\]'))
_SPACE_BEFORE = re.compile(r'(?:\\[,;:! ]|\\q?quad(?![a-zA-Z])|[~\s])+')
_SPACE_AFTER = re.compile(r'\\(?:[,;:!]|q?quad)?$')


def _without_space(text: str) -> str:
  """The text without blanks and LaTeX's spaces at its ends, in a time that does not grow with the square of them."""
  leading = _SPACE_BEFORE.match(text)
  text = text[leading.end():] if leading else text
  while True:
    text = text.rstrip().rstrip('~')
    # Of '\\ ' the backslash is left; two of them end a line.
    trailing = _SPACE_AFTER.search(text[-6:])
    if not trailing or text[:len(text) - len(trailing[0])].endswith('\\'):
      return text if not text or not text[-1].isspace() else text.rstrip()
    text = text[:len(text) - len(trailing[0])]


def trim(text: str) -> str:
  """The text without the spaces and the marks of emphasis and formulas around it, and punctuation after it."""
  while True:
    before, text = text, _without_space(text)
    if not text.endswith(('\\right.', '\\.', '...')):  # 1, 2, 3, ... are not 1, 2, 3
      text = text.rstrip('.,;:。').rstrip()
    if text.count('**') % 2:  # the '**' that opens stands before the mark of the answer
      text = text.removesuffix('**')
    for start, end in _AROUND:
      inside = text[len(start):len(text) - len(end)]
      if len(text) > len(start + end) and text == start + inside + end and start not in inside:
        text = inside
    if text == before:
      return text


def without_dollars(text: str) -> str:
  """The text without the signs that enclose formulas; one that is left over is a currency."""
  text = (box(text) if '\\boxed' in text else None) or text  # some references mark their answer
  text = re.sub(r'\$\s*\n\s*\$', ', ', text)  # a formula in each line
  if '\\begin' not in text:  # and some escape each backslash twice
    text = re.sub(r'\\\\(?=[a-zA-Z])', r'\\', text)
  text = text.replace('\\$', '\ue000')
  if text.count('$') % 2:
    text = re.sub(r'\$(?=\s*[\d.])', '\ue000', text, count=1)
  return text.replace('$', ' ').replace('\ue000', '\\$')
