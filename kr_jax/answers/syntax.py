r"""Formulas: tokens -> a tree.

A node is a tuple: ('number', Fraction), ('name', text), ('infinity',) or (operation, node, ...), where 'apply' has the
name of a function in front of its arguments and 'call' a variable's.

Imports nothing heavy.
"""

from __future__ import annotations

from fractions import Fraction
import functools
from typing import Any, NamedTuple

from kr_jax.answers import notation
from kr_jax.answers.cursor import Cursor, NotAFormula
from kr_jax.answers.notation import Token, Tokens

Node = tuple[Any, ...]

CONSTANTS = ('pi', 'e', 'i')  # names that are no variables
_MOST_TOKENS, _MOST_NESTING = 600, 30


class Reading(NamedTuple):
  """How to read notation that means one thing here and another there."""

  calls: bool = True  # a(x + 1) is a function's value, not a product
  log_base: int = 0  # of \\log without a base; 0: e
  tight: bool = False  # 1/2x is 1/(2x)
  euler: bool = False  # 2e3 is a product, not 2000
  far: bool = True  # sin x y is sin(x y), not sin(x) y


_WORDS = {'pi': ('name', 'pi'), 'inf': ('infinity',), 'infinity': ('infinity',), 'oo': ('infinity',)}
_GREEK = notation.GREEK_NAMES - {'mu', 'nu', 'xi'}  # without a backslash these are products
_DECORATIONS = ('vec', 'hat', 'dot', 'ddot', 'tilde', 'overline', 'widetilde', 'mathbb', 'mathfrak')
_TIMES = ('cdot', 'times')
_MODULES = ('np', 'numpy', 'math', 'sympy', 'sp', 'cmath')


def parse(tokens: Tokens, reading: Reading = Reading()) -> Node:
  """The tree of a formula. Raises NotAFormula."""
  if len(tokens) > _MOST_TOKENS:
    raise NotAFormula(f'{len(tokens)} tokens')
  level = deepest = 0
  for token in tokens:
    level += notation.depth(token)
    deepest = max(deepest, level)
  if deepest > _MOST_NESTING or level:
    raise NotAFormula('brackets')
  return _Reader(tokens, reading).whole()


@functools.lru_cache(4096)
def node(tokens: Tokens, reading: Reading = Reading()) -> Node | None:
  """The tree of a formula; None: the tokens are none."""
  try:
    return parse(tokens, reading)
  except (NotAFormula, ValueError, RecursionError):
    return None


class _Reader(Cursor):
  """A recursive descent over tokens."""

  def __init__(self, tokens: Tokens, reading: Reading):
    super().__init__(tokens)
    self._reading = reading
    self._bars = 0  # of absolute values that are open
    self._deep = 0

  def whole(self) -> Node:
    node = self._infix(self.sum())
    if self.i < len(self.tokens):
      raise NotAFormula(f'{self.peek()} is left')
    return node

  def sum(self) -> Node:
    self._deep += 1
    if self._deep > 4 * _MOST_NESTING:
      raise NotAFormula('nesting')
    node = self._term()
    while self.peek().is_op('+', '-') or self.peek().is_command('pm', 'mp'):
      sign = self.next().text
      node = ({'+': 'add', '-': 'subtract'}.get(sign, sign), node, self._term())
    self._deep -= 1
    return node

  def _term(self) -> Node:
    node = self._unary()
    while True:
      token = self.peek()
      if token.is_op('*') or token.is_command(*_TIMES):
        self.next()
        node = ('multiply', node, self._unary())
      elif token.is_op('/'):
        self.next()
        divisor = self._unary()
        while self._reading.tight and self._starts_factor():
          divisor = ('multiply', divisor, self._power())
        node = ('divide', node, divisor)
      elif self._starts_factor():
        node = ('multiply', node, self._power())
      else:
        return node

  def _unary(self) -> Node:
    token = self.peek()
    if token.is_op('-', '+'):
      self.next()
      node = self._unary()
      return node if token.text == '+' else _negative(node)
    if token.is_command('pm', 'mp'):
      self.next()
      return (token.text, ('number', Fraction(0)), self._unary())
    return self._power()

  def _starts_factor(self) -> bool:
    token = self.peek()
    if token.kind in ('name', 'word', 'text'):
      return True
    if token.kind == 'number':  # 2 3 is no product, x2 and (x)2 are
      before = self.tokens[self.i - 1]
      if before.kind == 'number' and token.text == '10' and self.peek(1).is_op('^'):  # 2.5 10^3
        return True
      return before.kind != 'number' and not (token.spaced and before.kind in ('text', 'word'))
    if token.kind == 'op':
      return token.text in ('(', '[', '{') or token.text in ('|', '||') and not self._bars
    return token.kind == 'command' and token.text not in (*_TIMES, *_NOT_FACTORS)

  def _power(self) -> Node:
    node = self._postfix(self._atom())
    if self.peek().is_op('^'):
      self.next()
      if self.peek().is_command('circ', 'degree'):
        self.next()
        return ('degrees', node)
      node = self._postfix(('power', node, self._exponent()))
    return node

  def _exponent(self) -> Node:
    token = self.peek()
    if token.is_op('-', '+'):
      self.next()
      inner = self._exponent()
      return inner if token.text == '+' else _negative(inner)
    if token.kind == 'word':  # x^ab is x^a b
      self.tokens[self.i:self.i + 1] = self.letters(token)
      return ('name', self.next().text)
    node = self._group('{') if token.is_op('{') else self._postfix(self._atom())
    if self.peek().is_op('^'):  # 2^3^2 is 2^(3^2)
      self.next()
      node = ('power', node, self._exponent())
    return node

  def _postfix(self, node: Node) -> Node:
    while True:
      token = self.peek()
      if token.is_op('!'):
        self.next()
        if self.peek().is_op('!') and not self.peek().spaced:
          self.next()
          node = ('double_factorial', node)
        else:
          node = ('factorial', node)
      elif token.is_command('degree'):
        self.next()
        node = ('degrees', node)
      else:
        return node

  def _atom(self) -> Node:
    token = self.peek()
    read = {'number': self._number, 'name': self._name, 'word': self._word, 'text': self._word,
            'command': self._command, 'op': self._bracket}.get(token.kind)
    if read is None:
      raise NotAFormula(f'{token} begins nothing')
    return read()

  def _number(self) -> Node:
    if self._reading.euler or not (power := self.power_of_ten()):
      return ('number', self.number())
    return ('multiply', ('number', power[0]), ('power', ('number', Fraction(10)), ('number', power[1])))

  def _name(self) -> Node:
    name = self.next().text
    self._subscript_before_power()
    if self.peek().is_op('_'):
      self.next()
      name += '_' + notation.written(self.argument_tokens())
    name += self._primes()
    if self.peek().is_op('(') and name not in CONSTANTS:
      if call := self._call(name):
        return call
    return ('name', name)

  def _subscript_before_power(self) -> None:
    """Puts v^2_0 in the order of v_0^2."""
    if not self.peek().is_op('^'):
      return
    begin, tokens = self.i, list(self.tokens)
    self.next()
    power = self.argument_tokens()
    if not self.peek().is_op('_'):
      self.tokens = tokens  # x^12 is no x^1 2
    else:
      self.next()
      index = self.argument_tokens()
      braced = lambda inner: [Token('op', '{'), *inner, Token('op', '}')]
      self.tokens[begin:self.i] = [Token('op', '_'), *braced(index), Token('op', '^'), *braced(power)]
    self.i = begin

  def _primes(self) -> str:
    """The primes that follow a name, y' or y^{\\prime}."""
    begin, marks = self.i, ()
    if self.peek().is_op('^'):
      self.next()
      marks = self.argument_tokens() if self.peek().is_op('{') else ()
    while self.peek().is_op("'"):
      marks += (self.next(),)
    if marks and all(mark.is_op("'") for mark in marks):
      return "'" * len(marks)
    self.i = begin
    return ''

  def _call(self, name: str) -> Node | None:
    """A function's value f(x, 2); None where the brackets hold a factor."""
    level = inside = 0
    is_list = False
    for token in self.tokens[self.i:]:
      level += notation.depth(token)
      if level == 0:
        break
      is_list |= level == 1 and token.is_op(',', ';')
      inside += 1
    # A variable times one number would be written with the number in front.
    is_number = inside == 2 and self.peek(1).kind == 'number'
    if self._reading.calls or is_list or is_number:
      return ('call', ('name', name), *self._arguments())
    return None

  def _arguments(self) -> list[Node]:
    """What stands in round brackets, divided by commas."""
    bars, self._bars = self._bars, 0
    self.expect('(')
    found = [self.sum()]
    while self.peek().is_op(',', ';'):
      self.next()
      found.append(self.sum())
    self.expect(')')
    self._bars = bars
    return found

  def _word(self) -> Node:
    token = self.peek()
    text = token.text
    if text in _MODULES and self.peek(1).is_op('.'):
      self.i += 2
      return self._atom()
    if text in notation.FUNCTIONS:
      self.next()
      return self._function(notation.FUNCTIONS[text])
    if text.lower() in _WORDS:
      self.next()
      return _WORDS[text.lower()]
    if text in _GREEK or token.kind == 'text' and (len(text) == 1 or self.peek(1).is_op('_')):
      self.tokens[self.i] = Token('name', text, token.spaced)
    elif token.kind == 'text':
      raise NotAFormula(text)
    else:
      self.tokens[self.i:self.i + 1] = self.letters(token)
    return self._name()

  def _function(self, name: str) -> Node:
    base = power = None
    if self.peek().is_op('_'):
      self.next()
      base = self._argument()
    if self.peek().is_op('^'):
      self.next()
      power = self._exponent()
      if power == _negative(('number', Fraction(1))) and name in notation.INVERSES:
        name, power = notation.INVERSES[name], None
    if name == 'sqrt' and self.peek().is_op('['):
      self.next()
      base = self.sum()
      self.expect(']')
    if self.peek().is_op('('):
      arguments = self._arguments()
      if self.peek().is_op('^') and power is None and len(arguments) == 1:
        self.next()
        power = self._exponent()
    elif self.peek().is_op('{', '['):
      arguments = [self._group(self.peek().text)]
    elif name in ('sqrt', 'cbrt'):
      arguments = [self._number() if self.peek().kind == 'number' else self._argument()]
    else:
      arguments = [self._juxtaposed()]
    if name == 'log':
      node = ('log', arguments[0], base) if base is not None else self._log(arguments)
    elif name == 'sqrt':
      node = ('root', arguments[0], base if base is not None else ('number', Fraction(2)))
    elif base is not None:
      raise NotAFormula(f'{name} with an index')
    else:
      node = ('apply', name, *arguments)
    return node if power is None else ('power', node, power)

  def _log(self, arguments: list[Node]) -> Node:
    if len(arguments) > 1:  # as in Python, log(x, 2)
      return ('log', *arguments[:2])
    if self._reading.log_base:
      return ('log', arguments[0], ('number', Fraction(self._reading.log_base)))
    return ('apply', 'ln', arguments[0])

  def _juxtaposed(self) -> Node:
    """The argument of a function without brackets: factors up to the next function or operator."""
    sign = self.peek().is_op('-')
    if sign:
      self.next()
    node = self._power()
    while self._starts_factor() and not notation.takes_factors(self.peek()) and not self.peek().is_op('(', '[') and (
        self._reading.far or node[0] == 'number'):
      node = ('multiply', node, self._power())
    if self.peek().is_op('/') and self.peek(1).kind == 'number':  # sin pi/4
      self.next()
      node = ('divide', node, self._power())
    return _negative(node) if sign else node

  def _argument(self) -> Node:
    if self.peek().is_op('{'):
      return self._group('{')
    if self.peek().kind == 'number':
      return ('number', Fraction(self.argument_tokens()[0].text))
    if self.peek().kind == 'word':
      self.tokens[self.i:self.i + 1] = self.letters(self.peek())
      return ('name', self.next().text)
    return self._atom()

  def _group(self, opening: str) -> Node:
    """What stands in brackets, whose opening one comes next."""
    bars, self._bars = self._bars, 0
    self.next()
    node = self._infix(self.sum())
    self.expect({'{': '}', '(': ')', '[': ']'}[opening])
    self._bars = bars
    return node

  def _infix(self, top: Node) -> Node:
    """What stands before \\over or \\choose, and the rest after it; what stands there alone if there is none."""
    if self.peek().is_command('over'):
      self.next()
      return ('divide', top, self.sum())
    if self.peek().is_command('choose'):
      self.next()
      return ('apply', 'binom', top, self.sum())
    return top

  def _bracket(self) -> Node:
    token = self.peek()
    if token.text in ('(', '[', '{'):
      return self._group(token.text)
    if token.text == '|':
      self.next()
      self._bars += 1
      node = self.sum()
      self.expect('|')
      self._bars -= 1
      return ('apply', 'abs', node)
    raise NotAFormula(f'{token.text} begins nothing')

  def _command(self) -> Node:
    name = self.next().text
    if name == 'frac':
      return ('divide', self._argument(), self._argument())
    if name == 'binom':
      return ('apply', 'binom', self._argument(), self._argument())
    if name in notation.FUNCTIONS:
      return self._function(notation.FUNCTIONS[name])
    if name == 'infty':
      return ('infinity',)
    if name in ('lfloor', 'lceil'):
      node = self.sum()
      if not self.next().is_command('r' + name[1:]):
        raise NotAFormula(f'{name} does not close')
      return ('apply', 'floor' if name == 'lfloor' else 'ceil', node)
    if name in ('angle', 'measuredangle', 'triangle', 'odot'):
      return ('name', _points(name, self._points()))
    if name in _DECORATIONS:
      inside = self.argument_tokens()
      text = notation.written(inside)
      if name == 'overline' and len(text) == 2 and text.isupper():  # a segment
        text = ''.join(sorted(text))
      return ('name', f'{name} {text}')
    raise NotAFormula(f'\\{name}')

  def _points(self) -> str:
    text = ''
    while self.peek().kind in ('name', 'word', 'text') and self.peek().text.isalpha():
      text += self.next().text
    return text


_NOT_FACTORS = frozenset((
    'le', 'ge', 'ne', 'in', 'notin', 'cup', 'cap', 'pm', 'mp', 'to', 'approx', 'equiv', 'pmod', 'bmod', 'mod', 'over',
    'choose', 'implies', 'land', 'lor', 'rfloor', 'rceil', 'rangle', 'circ', 'degree', 'setminus', 'subset',
    'subseteq', 'ldots', 'sim', 'perp', 'parallel', 'forall', 'exists', 'therefore', 'because', 'qed', 'checkmark'))


def _negative(node: Node) -> Node:
  return ('subtract', ('number', Fraction(0)), node)


def _points(name: str, points: str) -> str:
  """A name of what three points make; an angle's outer points and all of a triangle's change places."""
  if name == 'triangle':
    points = ''.join(sorted(points))
  elif len(points) == 3:
    points = min(points, points[::-1])
  return f'{name} {points}'


def names(node: Node) -> frozenset[str]:
  """The variables of a formula."""
  if node[0] == 'name':
    return frozenset() if node[1] in CONSTANTS else frozenset((node[1],))
  return frozenset().union(*(names(x) for x in node[1:] if isinstance(x, tuple)))
