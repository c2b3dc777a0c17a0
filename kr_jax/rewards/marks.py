r"""The answer that a completion marks. Imports nothing heavy."""

from __future__ import annotations

import re

_BOX = re.compile(r'\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]', re.DOTALL)
_BARE_BOX = re.compile(r'\\boxed\s+([^\s{}$,]+)')
_TAG = re.compile(r'<answer>((?:(?!<answer>).)*?)</answer>', re.DOTALL)
_HASHES = re.compile(r'####[ \t]*([^\n]*)')
_IS = re.compile(r'\banswer[*_\s]*(?:is\b|:|=)[:*_\s]*', re.IGNORECASE)
_HEADING = re.compile(r'^#+[^\n#]*\banswer\b[^\n]*\n\s*(\S[^\n]*)', re.IGNORECASE | re.MULTILINE)
_DISPLAY = re.compile(r'\$\$(.+?)\$\$|\\\[(.+?)\\\]', re.DOTALL)
# What may stand between boxes that together are a list.
_BETWEEN = re.compile(r'(?:[\s$,;&]|\\[()\[\],;:! ]|\\text\s*\{[\s,]*(?:and|or)\s*\}|\band\b|\bor\b|\\q?quad\b)*')
# A clause after an answer in words: ', in total', ' because ...'.
_CLAUSE = re.compile(
    r',\s+(?!(?:and|or)\b)[a-z]{2,}|\s(?:because|since|which|where|so that|as (?:we|it|the|shown|required|desired))\b')


def extract(completion: str) -> str | None:
  r"""The answer that a completion marks; None: there is none.

  The last mark of the first kind that occurs counts. The kinds are <answer>...</answer>; \boxed{...} that is not
  empty and whose braces close; '#### ...' to the end of the line; 'answer is ...' or 'answer: ...' to the end of the
  sentence; the line after a heading with 'answer' in it. A mark inside <answer> counts before the rest of it. Boxes
  with nothing but commas or 'and' between them are one list. A completion of one line without a mark is itself the
  answer. Thoughts up to </think> are not read.
  """
  found = raw(completion)
  return trim(found) or None if found is not None else None


def raw(completion: str) -> str | None:
  """`extract` as the completion has it: with the punctuation and marks of formulas around it."""
  text = completion.rpartition('</think>')[2]
  tags = _TAG.findall(text)
  if tags:
    found = box(tags[-1]) or _last(_HASHES, tags[-1]) or _phrase(tags[-1])
    return found if found is not None else tags[-1]
  found = box(text) or _last(_HASHES, text) or _phrase(text)
  if found is None and '\n' not in text.strip():
    found = text
  return found


def _last(pattern: re.Pattern[str], text: str) -> str | None:
  """Group 1 of the last match that is not blank."""
  return next((x for x in reversed(pattern.findall(text)) if x.strip()), None)


def _phrase(text: str) -> str | None:
  """What follows the last 'answer is' or 'answer:', or a heading."""
  marks = [*_IS.finditer(text)]
  if not marks:
    return _last(_HEADING, text)
  rest = text[marks[-1].end():]
  display = _DISPLAY.match(rest)
  if display:
    return display[1] or display[2]
  sentence = re.split(r'\n|\.\s', rest, maxsplit=1)[0]
  clause = _CLAUSE.search(sentence)
  if clause and re.search(r'[\d\\$]', sentence[:clause.start()]):
    sentence = sentence[:clause.start()]
  return sentence


def box(text: str) -> str | None:
  """The content of the last box that closes, or of the last boxes that are a list."""
  opened, boxes = [], []  # boxes: start, end, content
  for token in _BOX.finditer(text):
    if token[0][-1] == '{' and token[0] != '\\{':
      opened.append(token)
    elif token[0] == '}' and opened:
      start = opened.pop()
      inside = text[start.end():token.start()]
      if start[0] != '{' and inside.strip():
        boxes.append((start.start(), token.end(), inside))
  if not boxes:
    return _last(_BARE_BOX, text)
  start, end, inside = max(boxes)
  found = [inside]
  for before in sorted(boxes, reverse=True)[1:]:
    if before[1] > start or not _BETWEEN.fullmatch(text, before[1], start):
      break
    found.insert(0, before[2])
    start = before[0]
  return ', '.join(map(str.strip, found)) if len(set(map(str.strip, found))) > 1 else inside


_AROUND = (('**', '**'), ('__', '__'), ('$$', '$$'), ('$', '$'), ('`', '`'), ('\\(', '\\)'), ('\\[', '\\]'))
_SPACE = re.compile(r'^(?:\\[,;:! ]|\\q?quad(?![a-zA-Z])|~|\s)+|(?:\\[,;:! ]|\\q?quad(?![a-zA-Z])|~|\s)+$')


def trim(text: str) -> str:
  """The text without the spaces and the marks of emphasis and formulas around it, and punctuation after it."""
  while True:
    before, text = text, _SPACE.sub('', text)
    if not text.endswith(('\\right.', '\\.')):
      text = text.rstrip('.,;:。').rstrip()
    if text.count('**') % 2:  # the '**' that opens stands before the mark of the answer
      text = text.removesuffix('**')
    for start, end in _AROUND:
      inside = text[len(start):len(text) - len(end)]
      if len(text) > len(start + end) and text == start + inside + end and start not in inside:
        text = inside
    if text == before:
      return text
