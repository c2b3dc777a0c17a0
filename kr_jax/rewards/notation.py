r"""A mathematical answer as tokens: LaTeX, unicode and plain text in one notation.

What only changes the appearance is dropped: sizes, colours, fonts of mathematics, spacing. Text stays apart from
formulas: \text{m} is the text 'm', m is a variable.

Imports nothing heavy.
"""

from __future__ import annotations

import re
from typing import NamedTuple
import unicodedata


class Token(NamedTuple):
  """A piece of notation.

  kind is one of these:
    'number'   digits with at most one decimal point
    'name'     a variable: a letter or a Greek letter's name
    'word'     two letters or more without a command, such as cm or sin
    'text'     what stands in \\text{...} and its like
    'command'  the name of any other command, such as frac
    'op'       one character: an operator, a bracket, punctuation
  """

  kind: str
  text: str
  spaced: bool = False  # whether space stands before it

  def is_op(self, *texts: str) -> bool:
    return self.kind == 'op' and self.text in texts

  def is_command(self, *texts: str) -> bool:
    return self.kind == 'command' and self.text in texts


Tokens = tuple[Token, ...]

_SUPERSCRIPTS = dict(zip('⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ', '0123456789+-()nix'))
_SUBSCRIPTS = dict(zip('₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₓ', '0123456789+-()nx'))
_CHARACTERS = str.maketrans({
    **dict.fromkeys('−–—‐‑﹣', '-'), **dict.fromkeys('·∙⋅•', r'\cdot '), **dict.fromkeys('‘’′´', "'"),
    **dict.fromkeys('“”', '"'), '″': "''", '×': r'\times ', '÷': '/', '∕': '/', '⁄': '/', '°': r'^\circ ',
    '∘': r'\circ ', '∞': r'\infty ', '≤': r'\le ', '⩽': r'\le ', '≥': r'\ge ', '⩾': r'\ge ', '≠': r'\ne ',
    '∪': r'\cup ', '∩': r'\cap ', '±': r'\pm ', '∓': r'\mp ', '∅': r'\emptyset ', '∈': r'\in ', '∉': r'\notin ',
    '≈': r'\approx ', '≅': r'\approx ', '∖': r'\setminus ', '√': r'\sqrt ', '∛': r'\sqrt[3]', '∠': r'\angle ',
    'ℝ': r'\mathbb{R}', 'ℤ': r'\mathbb{Z}', 'ℕ': r'\mathbb{N}', 'ℚ': r'\mathbb{Q}', 'ℂ': r'\mathbb{C}', '∗': '*',
    '。': '.', '、': ', ', '⟨': r'\langle ', '⟩': r'\rangle ', '→': r'\to ', '∣': '|', 'ℏ': r'\hbar ', '∶': ':',
    'Ω': 'Ω', '℃': r'^\circ C', '℉': r'^\circ F', 'π': r'\pi ', '…': r'\ldots '})
_GREEK = {chr(code): unicodedata.name(chr(code)).split()[-1].lower() for code in (*range(0x3b1, 0x3ca),)
          if 'FINAL' not in unicodedata.name(chr(code))}
_GREEK |= {chr(ord(small) - 32): name.capitalize() for small, name in _GREEK.items()}
_GREEK = {letter: {'lamda': 'lambda', 'Lamda': 'Lambda'}.get(name, name) for letter, name in _GREEK.items()}
GREEK_NAMES = frozenset(_GREEK.values())
_NAMES = {*GREEK_NAMES, 'hbar', 'ell', 'nabla', 'partial', 'aleph'}
_VARIANTS = {'var' + name: name for name in ('epsilon', 'theta', 'phi', 'rho', 'pi', 'sigma')}

_TEXT = {'text', 'mathrm', 'mbox', 'hbox', 'textbf', 'textit', 'operatorname', 'textrm', 'textnormal', 'textsf', 'texttt',
         'mathsf', 'mathtt', 'rm', 'unit', 'si', 'textup'}
# Commands that only change what their argument, or what follows, looks like.
_APPEARANCE = {
    'left', 'right', 'middle', 'big', 'Big', 'bigg', 'Bigg', 'bigl', 'bigr', 'Bigl', 'Bigr', 'biggl', 'biggr', 'Biggl',
    'Biggr', 'bigm', 'Bigm', 'displaystyle', 'textstyle', 'scriptstyle', 'limits', 'nolimits', 'mathbf', 'boldsymbol',
    'bm', 'bf', 'bfseries', 'mathit', 'it', 'em', 'emph', 'tiny', 'small', 'normalsize', 'large', 'Large', 'LARGE',
    'huge', 'Huge', 'underline', 'uline', 'framebox', 'fbox', 'boxed', 'mathstrut', 'strut', 'mathcal', 'mathscr',
    'mathopen', 'mathclose', 'mathrel', 'mathbin', 'mathord', 'phantom', 'ensuremath', 'sf', 'tt', 'cal', 'noindent',
    'centering', 'bold', 'strong', 'underbrace', 'overbrace', 'cancel', 'mathop', 'newline', 'textcolor', 'color'}
_SPACES = {'quad', 'qquad', 'space', 'hspace', 'hfill', 'enspace', 'thinspace', 'thickspace', 'medspace', 'nbsp',
           ',', ';', ':', '!', ' ', '>', '/'}
_SYNONYMS = {
    'leq': 'le', 'leqslant': 'le', 'leqq': 'le', 'geq': 'ge', 'geqslant': 'ge', 'geqq': 'ge', 'neq': 'ne', 'lt': '<',
    'gt': '>', 'dfrac': 'frac', 'tfrac': 'frac', 'cfrac': 'frac', 'sfrac': 'frac', 'varnothing': 'emptyset',
    'lbrace': '{', 'rbrace': '}', 'vert': '|', 'lvert': '|', 'rvert': '|', 'mid': '|', 'Vert': '||', 'colon': ':',
    'lbrack': '[', 'rbrack': ']', 'ast': '*', 'star': '*', 'bullet': 'cdot', 'div': '/', 'degree': 'degree', 'prime': "'",
    'simeq': 'approx', 'thickapprox': 'approx', 'dbinom': 'binom', 'tbinom': 'binom', 'arcsec': 'asec', 'lg': 'lg',
    'lparen': '(', 'rparen': ')', 'isin': 'in', 'wedge': 'land', 'vee': 'lor', 'dots': 'ldots', 'cdots': 'ldots',
    'imath': 'i', 'jmath': 'j', 'Longrightarrow': 'implies', 'Rightarrow': 'implies', 'iff': 'implies',
    'Leftrightarrow': 'implies', 'infin': 'infty', 'backslash': 'setminus', 'smallsetminus': 'setminus',
    'doteq': '=', 'triangleq': '=', 'minus': '-', 'plus': '+', 'overrightarrow': 'vec', 'widehat': 'hat', 'bar': 'overline'}
NUMBER_SETS = {'R': 'reals', 'Z': 'integers', 'N': 'naturals', 'Q': 'rationals', 'C': 'complexes'}
_BRACED = {'{': '\\{', '}': '\\}'}  # as ops, apart from the braces of arguments

_TOKEN = re.compile(
    r'\\(?P<command>[a-zA-Z]+)\*?|\\(?P<escaped>.)|(?P<number>\d+(?:\.\d*)?|\.\d+)|(?P<letters>[^\W\d_]+)'
    r'|(?P<space>\s+|~)|(?P<op><=|>=|!=|==|\*\*|\.\.\.|.)', re.DOTALL)


def plain(text: str) -> str:
  """The text in LaTeX's characters: superscripts are powers, digits and signs those of ASCII."""
  if text.isascii():
    return text
  text = re.sub(f'[{"".join(_SUPERSCRIPTS)}]+', lambda run: f'^{{{"".join(map(_SUPERSCRIPTS.get, run[0]))}}}', text)
  text = re.sub(f'[{"".join(_SUBSCRIPTS)}]+', lambda run: f'_{{{"".join(map(_SUBSCRIPTS.get, run[0]))}}}', text)
  text = text.translate(_CHARACTERS)
  text = ''.join(f' {unicodedata.normalize("NFKC", x)}' if unicodedata.category(x) == 'No' else x for x in text)
  text = unicodedata.normalize('NFKC', text).translate(_CHARACTERS)
  return re.sub('[\u200b-\u200f\u2060\ufeff]', '', text)


def tokens(text: str) -> Tokens:
  r"""The tokens of an answer. A number takes in the commas of thousands that LaTeX marks: 1{,}234, 11,\!111."""
  text = plain(text)
  text = re.sub(r'(?<=\d)(?:\{,\}|,\s*\\[!,]\s*|\\[!,;: ]\s*)(?=\d{3}(?!\d))', ',', text)
  found: list[Token] = []
  spaced, position = False, 0
  while match := _TOKEN.match(text, position):
    position = match.end()
    kind, value = match.lastgroup, match[match.lastgroup]
    if kind == 'space' or kind == 'escaped' and value in _SPACES or kind == 'command' and value in _SPACES:
      spaced = True
      if value == 'hspace':
        position = _skip_group(text, position)
      continue
    if kind == 'command' and value in _TEXT:
      content, position = _group(text, position)
      if content is not None:
        found += _text(content, spaced)
      spaced = False
      continue
    if kind == 'command' and value in ('begin', 'end'):
      content, position = _group(text, position)
      found.append(Token(value, (content or '').strip('* '), spaced))
    elif kind == 'command' and value == 'mathbb':
      content, position = _group(text, position)
      found.append(Token('command', NUMBER_SETS.get((content or '').strip(), 'mathbb'), spaced))
    elif kind == 'command' and value in _APPEARANCE:
      if value in ('color', 'textcolor'):
        position = _skip_group(text, position)
      elif value in ('left', 'right') and text[position:position + 1] == '.':
        position += 1
      continue
    else:
      found += _tokens_of(kind, value, spaced)
    spaced = False
  return tuple(_times(found))


def _times(found: list[Token]) -> list[Token]:
  """The tokens, the letter x between a number and a power of ten as a sign of multiplication."""
  for i in range(1, len(found) - 2):
    if (found[i].kind == 'name' and found[i].text in 'xX' and found[i - 1].kind == 'number' and found[i + 1].text == '10'
        and found[i + 2].is_op('^')):
      found[i] = Token('command', 'times', found[i].spaced)
  return found


def _tokens_of(kind: str, value: str, spaced: bool) -> list[Token]:
  """The tokens of one match of _TOKEN that is neither space nor text nor appearance."""
  if kind == 'command':
    value = _SYNONYMS.get(value, _VARIANTS.get(value, value))
    if value in _NAMES or value in ('i', 'j'):
      return [Token('name', value, spaced)]
    return [Token('command' if value.isalpha() else 'op', _BRACED.get(value, value), spaced)]
  if kind == 'letters':
    if value[0] in _GREEK:
      return [Token('name', _GREEK.get(letter, letter), spaced and i == 0) for i, letter in enumerate(value)]
    return [Token('name' if len(value) == 1 else 'word', value, spaced)]
  if kind == 'escaped':
    value = {'{': '\\{', '}': '\\}', '|': '||', '\\': '\\\\'}.get(value, value)
    return [] if value in '()[]' else [Token('op', value, spaced)]  # \\( and \\[ enclose formulas
  if kind == 'op' and value in ('<=', '>=', '!='):
    return [Token('command', {'<=': 'le', '>=': 'ge', '!=': 'ne'}[value], spaced)]
  if value == '...':
    return [Token('command', 'ldots', spaced)]
  value = {'==': '=', '**': '^'}.get(value, value)
  return [Token('number' if kind == 'number' else 'op', value, spaced)]


def _text(content: str, spaced: bool) -> list[Token]:
  """The tokens of the content of a text, its letters and words marked as text."""
  found = [x._replace(kind='text') if x.kind in ('name', 'word') else x for x in tokens(content.replace('$', ' '))]
  return [x._replace(spaced=x.spaced or spaced and i == 0) for i, x in enumerate(found)]


def _group(text: str, position: int) -> tuple[str | None, int]:
  """The content of the braces that open at a position, and the position after them; None: no braces open there."""
  opening = re.compile(r'\s*\{').match(text, position)
  if not opening:
    return None, position
  depth, i = 1, opening.end()
  while i < len(text) and depth:
    depth += {'{': 1, '}': -1}.get(text[i], 0)
    i += 2 if text[i] == '\\' else 1
  i = min(i, len(text))
  return (text[opening.end():i - 1] if depth == 0 else text[opening.end():i]), i


def _skip_group(text: str, position: int) -> int:
  return _group(text, position)[1]


DEPTH = {'(': 1, '[': 1, '{': 1, '\\{': 1, ')': -1, ']': -1, '}': -1, '\\}': -1}


def depth(token: Token) -> int:
  """What a token adds to the depth of nesting."""
  if token.kind == 'op':
    return DEPTH.get(token.text, 0)
  if token.kind == 'command':
    return {'langle': 1, 'rangle': -1, 'lfloor': 1, 'rfloor': -1, 'lceil': 1, 'rceil': -1}.get(token.text, 0)
  return {'begin': 1, 'end': -1}.get(token.kind, 0)


def split(tokens: Tokens, is_separator) -> list[Tokens]:
  """The parts between separators outside of brackets; [tokens] where brackets do not match."""
  parts, start, level = [], 0, 0
  for i, token in enumerate(tokens):
    level += depth(token)
    if level < 0:
      return [tokens]
    if level == 0 and depth(token) == 0 and is_separator(token):
      parts.append(tokens[start:i])
      start = i + 1
  return [*parts, tokens[start:]] if level == 0 else [tokens]


def written(tokens: Tokens) -> str:
  r"""The tokens as one text, the same for most ways to write them.

  Braces around one token are left out, so that \frac12 is \frac{1}{2}; spaces count between words and numbers only.
  """
  parts: list[str] = []
  previous = None
  for token in _without_braces(tokens):
    text = ('\\' if token.kind in ('command', 'begin', 'end') else '') + token.text
    if previous and token.kind in _APART and previous.kind in _APART and {token.kind, previous.kind} & _SPACED:
      text = ' ' + text
    parts.append(text)
    previous = token
  return ''.join(parts)


_APART, _SPACED = {'number', 'word', 'text', 'name'}, {'number', 'word', 'text'}


def _without_braces(tokens: Tokens) -> list[Token]:
  found: list[Token] = []
  i, arguments = 0, 0  # arguments: how many of \\frac are to come
  while i < len(tokens):
    token = tokens[i]
    if token.is_op('{') and i + 2 < len(tokens) and tokens[i + 2].is_op('}') and not tokens[i + 1].is_op('{'):
      found.append(tokens[i + 1])
      i += 3
      arguments = max(arguments - 1, 0)
      continue
    i += 1
    if arguments and token.kind == 'number' and token.text.isdigit():
      digits = min(arguments, len(token.text))
      found += [token._replace(text=digit) for digit in token.text[:digits]]
      token, arguments = token._replace(text=token.text[digits:]), arguments - digits
      if not token.text:
        continue
    else:
      arguments = 2 if token.is_command('frac', 'binom') else 0
    found.append(token)
  return found
