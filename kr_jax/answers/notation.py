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

_TEXT = {'text', 'mathrm', 'mbox', 'hbox', 'textbf', 'textit', 'operatorname', 'textrm', 'textnormal', 'textsf',
         'texttt', 'mathsf', 'mathtt', 'rm', 'unit', 'si', 'textup'}
_COLORS = {'color': 1, 'textcolor': 1, 'colorbox': 1, 'fcolorbox': 2}  # and how many colours they take
# Commands that only change what their argument, or what follows, looks like.
_APPEARANCE = {
    'left', 'right', 'middle', 'big', 'Big', 'bigg', 'Bigg', 'bigl', 'bigr', 'Bigl', 'Bigr', 'biggl', 'biggr', 'Biggl',
    'Biggr', 'bigm', 'Bigm', 'displaystyle', 'textstyle', 'scriptstyle', 'limits', 'nolimits', 'mathbf', 'boldsymbol',
    'bm', 'bf', 'bfseries', 'mathit', 'it', 'em', 'emph', 'tiny', 'small', 'normalsize', 'large', 'Large', 'LARGE',
    'huge', 'Huge', 'underline', 'uline', 'framebox', 'fbox', 'boxed', 'mathstrut', 'strut', 'mathcal', 'mathscr',
    'mathopen', 'mathclose', 'mathrel', 'mathbin', 'mathord', 'ensuremath', 'sf', 'tt', 'cal', 'noindent',
    'centering', 'bold', 'strong', 'underbrace', 'overbrace', 'mathop', 'newline', *_COLORS}
_SPACES = {'quad', 'qquad', 'space', 'hspace', 'hfill', 'enspace', 'thinspace', 'thickspace', 'medspace', 'nbsp',
           ',', ';', ':', '!', ' ', '>', '/'}
_SYNONYMS = {
    'leq': 'le', 'leqslant': 'le', 'leqq': 'le', 'geq': 'ge', 'geqslant': 'ge', 'geqq': 'ge', 'neq': 'ne', 'lt': '<',
    'gt': '>', 'dfrac': 'frac', 'tfrac': 'frac', 'cfrac': 'frac', 'sfrac': 'frac', 'varnothing': 'emptyset',
    'lbrace': '{', 'rbrace': '}', 'vert': '|', 'lvert': '|', 'rvert': '|', 'mid': '|', 'Vert': '||', 'colon': ':',
    'lbrack': '[', 'rbrack': ']', 'ast': '*', 'star': '*', 'bullet': 'cdot', 'div': '/', 'prime': "'",
    'simeq': 'approx', 'thickapprox': 'approx', 'dbinom': 'binom', 'tbinom': 'binom',
    'lparen': '(', 'rparen': ')', 'isin': 'in', 'wedge': 'land', 'vee': 'lor', 'dots': 'ldots', 'cdots': 'ldots',
    'imath': 'i', 'jmath': 'j', 'Longrightarrow': 'implies', 'Rightarrow': 'implies', 'iff': 'implies',
    'Leftrightarrow': 'implies', 'infin': 'infty', 'backslash': 'setminus', 'smallsetminus': 'setminus',
    'doteq': '=', 'triangleq': '=', 'minus': '-', 'plus': '+', 'overrightarrow': 'vec', 'widehat': 'hat',
    'bar': 'overline'}
NUMBER_SETS = {'R': 'reals', 'Z': 'integers', 'N': 'naturals', 'Q': 'rationals', 'C': 'complexes'}
FUNCTIONS = {
    'sin': 'sin', 'cos': 'cos', 'tan': 'tan', 'tg': 'tan', 'cot': 'cot', 'ctg': 'cot', 'sec': 'sec', 'csc': 'csc',
    'sinh': 'sinh', 'cosh': 'cosh', 'tanh': 'tanh', 'coth': 'coth', 'ln': 'ln', 'log': 'log', 'lg': 'lg', 'exp': 'exp',
    'sqrt': 'sqrt', 'abs': 'abs', 'floor': 'floor', 'ceil': 'ceil', 'gcd': 'gcd', 'lcm': 'lcm', 'max': 'max',
    'min': 'min', 'factorial': 'factorial', 'binom': 'binom', 'cbrt': 'cbrt', 'sgn': 'sign', 'sign': 'sign',
    'Re': 're', 'Im': 'im', 'comb': 'binom', 'asinh': 'asinh', 'acosh': 'acosh', 'atanh': 'atanh', 'arcsinh': 'asinh',
    'arccosh': 'acosh', 'arctanh': 'atanh', 'arsinh': 'asinh', 'arcosh': 'acosh', 'artanh': 'atanh', 'erf': 'erf',
    'log2': 'log2', 'log10': 'lg', 'gamma': 'gamma'}
FUNCTIONS |= {arc + name: 'a' + name for name in ('sin', 'cos', 'tan', 'cot', 'sec', 'csc') for arc in ('arc', 'a')}
INVERSES = {name: 'a' + name for name in ('sin', 'cos', 'tan', 'cot', 'sec', 'csc', 'sinh', 'cosh', 'tanh')}
_BRACED = {'{': '\\{', '}': '\\}'}  # as ops, apart from the braces of arguments

_TOKEN = re.compile(
    r'\\(?P<command>[a-zA-Z]+)\*?|\\(?P<escaped>.)|(?P<number>\d+(?:\.\d*)?|\.\d+)|(?P<letters>[^\W\d_]+)'
    r'|(?P<space>\s+|~)|(?P<op><=|>=|!=|==|\*\*|\.\.\.|.)', re.DOTALL)

_MOST_NESTED = 8  # texts in one another


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


def tokens(text: str, nested: int = 0) -> Tokens:
  r"""The tokens of an answer, in which the commas of thousands are plain: 1{,}234 and 11,\!111 are 1,234 and 11,111.

  nested: how many \text the answer stands in.
  """
  text = plain(text)
  text = re.sub(r'\{([:,.])\}', r'\1', text)
  text = re.sub(r'(?<=\d)(?:,\s*\\[!,]\s*|\\[!,;: ]\s*)(?=\d{3}(?!\d))', ',', text)
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
        found += _text(content, spaced, nested + 1)
      spaced = False
      continue
    if kind == 'command' and value in ('begin', 'end'):
      content, position = _group(text, position)
      found.append(Token(value, (content or '').strip('* '), spaced))
    elif kind == 'command' and value == 'mathbb':
      content, position = _group(text, position)
      if content is None and (letter := re.compile(r'\s*([A-Z])').match(text, position)):
        content, position = letter[1], letter.end()
      found.append(Token('command', NUMBER_SETS.get((content or '').strip(), 'mathbb'), spaced))
    elif kind == 'command' and value in _APPEARANCE:
      for _ in range(_COLORS.get(value, 0)):
        position = _skip_group(text, position)
      if value in ('left', 'right') and text[position:position + 1] == '.':
        position += 1
      continue
    else:
      found += _tokens_of(kind, value, spaced)
    spaced = False
  return tuple(_times(found))


def _times(found: list[Token]) -> list[Token]:
  """The tokens, the letter x between a number and a power of ten as a sign of multiplication."""
  for i in range(1, len(found) - 2):
    before, token, ten, power = found[i - 1:i + 3]
    is_x = token.kind == 'name' and token.text in 'xX'
    if is_x and before.kind == 'number' and ten.text == '10' and power.is_op('^'):
      found[i] = Token('command', 'times', token.spaced)
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


def _text(content: str, spaced: bool, nested: int) -> list[Token]:
  """The tokens of the content of a text, its letters and words marked as text."""
  found = [x._replace(kind='text') if x.kind in ('name', 'word') else x for x in (
      tokens(content.replace('$', ' '), nested) if nested < _MOST_NESTED else [Token('text', content)])]
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


def takes_factors(token: Token) -> bool:
  """Whether a token is a function whose argument may stand without brackets."""
  return token.kind in ('word', 'text', 'command') and token.text in FUNCTIONS and token.text not in ('sqrt', 'binom')


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
    kinds = {token.kind, previous.kind} if previous else set()
    if kinds == {'number'} or kinds <= _WRITTEN and kinds & {'word', 'text'}:
      text = ' ' + text
    parts.append(text)
    previous = token
  return ''.join(parts)


_WRITTEN = {'number', 'name', 'word', 'text'}  # in letters and digits


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
