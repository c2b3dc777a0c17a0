r"""The answer that a completion marks. Imports nothing heavy."""

from __future__ import annotations

import re

_BOX = re.compile(r'\\(?:boxed|fbox)\s*\{|\\.|[{}]', re.DOTALL)
_TAG = re.compile(r'<answer>((?:(?!<answer>).)*?)</answer>', re.DOTALL)
_HASHES = re.compile(r'####[ \t]*([^\n]*)')
_IS = re.compile(r'\banswer[*_\s]*(?:is\b|:)[:*_\s]*', re.IGNORECASE)
_DISPLAY = re.compile(r'\$\$(.+?)\$\$|\\\[(.+?)\\\]', re.DOTALL)


def extract(completion: str) -> str | None:
  r"""The answer that a completion marks; None: there is none.

  The last mark of the first kind that occurs counts. The kinds are <answer>...</answer>; \boxed{...} that is not
  empty and whose braces close; '#### ...' to the end of the line; 'answer is ...' or 'answer: ...' to the end of the
  sentence. A completion of one line without a mark is itself the answer. Thoughts up to </think> are not read.
  """
  text = completion.rpartition('</think>')[2]
  found = [*_TAG.findall(text)][-1:] or _boxes(text) or [*filter(str.strip, _HASHES.findall(text))][-1:]
  if not found and (marks := [*_IS.finditer(text)]):
    rest = text[marks[-1].end():]
    display = _DISPLAY.match(rest)
    found = [display[1] or display[2] if display else re.split(r'\n|\.\s', rest, maxsplit=1)[0]]
  if not found and '\n' not in text.strip():
    found = [text]
  return trim(found[0]) or None if found else None


def _boxes(text: str) -> list[str]:
  """The content of the last box that closes: a list of one text, or of none."""
  opened, last = [], None
  for token in _BOX.finditer(text):
    if token[0][-1] == '{' and token[0] != '\\{':
      opened.append(token)
    elif token[0] == '}' and opened:
      start = opened.pop()
      inside = text[start.end():token.start()]
      if start[0] != '{' and inside.strip() and (last is None or start.start() > last[0]):
        last = start.start(), inside
  return [last[1]] if last else []


def trim(text: str) -> str:
  """The text without the spaces and the marks of emphasis and formulas around it, and punctuation after it."""
  while True:
    before, text = text, text.strip()
    if not text.endswith('\\right.'):
      text = text.rstrip('.,;:').rstrip()
    if text.count('**') % 2:  # the '**' that opens stands before the mark of the answer
      text = text.removesuffix('**')
    for start, end in (('**', '**'), ('__', '__'), ('$$', '$$'), ('$', '$'), ('`', '`'), ('\\(', '\\)'),
                       ('\\[', '\\]')):
      inside = text[len(start):len(text) - len(end)]
      if len(text) > len(start + end) and text == start + inside + end and start not in inside:
        text = inside
    if text == before:
      return text
