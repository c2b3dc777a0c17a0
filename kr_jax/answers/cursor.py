"""A place in a row of tokens that a reader moves along, and the numbers that it reads there."""

from __future__ import annotations

from fractions import Fraction

from kr_jax.answers import notation
from kr_jax.answers.notation import Token, Tokens


# Short words of a language, which are no products of letters; at, as and is may be.
_WORDS = frozenset('''
  all and any are but each else even for from has have if less mod more most no none not odd of only or per some
  such than that the then they this very what when with you one two four five six nine ten zero'''.split())


class NotAFormula(ValueError):
  """The tokens are no formula that is read here."""


class Cursor:
  """Tokens and the place of the next one; a token that stands for several is divided where it is read."""

  def __init__(self, tokens: Tokens):
    self.tokens, self.i = list(tokens), 0

  def peek(self, ahead: int = 0) -> Token:
    i = self.i + ahead
    return self.tokens[i] if i < len(self.tokens) else Token('end of text', '')

  def next(self) -> Token:
    token = self.peek()
    self.i += 1
    return token

  def expect(self, text: str) -> None:
    if not self.next().is_op(text):
      raise NotAFormula(f'{text} is missing')

  def letters(self, token: Token) -> list[Token]:
    """A word as variables; short ones only, as others are words of a language."""
    if len(token.text) > 4 or not token.text.isalpha() or token.text.lower() in _WORDS:
      raise NotAFormula(token.text)
    return [Token('name', letter, token.spaced and i == 0) for i, letter in enumerate(token.text)]

  def argument_tokens(self) -> Tokens:
    """The tokens of an argument of a command: of a group in braces, or one."""
    if not self.peek().is_op('{'):
      token = self.next()
      if token.kind == 'number' and len(token.text) > 1 and token.text.isdigit():  # \\frac12
        self.i -= 1
        self.tokens[self.i:self.i + 1] = [token._replace(text=token.text[1:])]
        return (token._replace(text=token.text[0]),)
      return (token,)
    begin, level = self.i + 1, 0
    while True:
      token = self.next()
      if token.kind == 'end of text':
        raise NotAFormula('a brace does not close')
      level += notation.depth(token)
      if level == 0:
        return tuple(self.tokens[begin:self.i - 1])

  def power_of_ten(self) -> tuple[Fraction, Fraction] | None:
    """(m, n) of m e n, which stands for m 10^n, if it comes next."""
    number, e, sign = self.peek(), self.peek(1), self.peek(2)
    signed = sign.is_op('-', '+') and not sign.spaced
    digits = self.peek(3) if signed else sign
    if not (e.kind == 'name' and e.text in 'eE' and not e.spaced and digits.kind == 'number' and digits.text.isdigit()
            and not digits.spaced):
      return None
    self.i += 4 if signed else 3
    return _fraction(number), Fraction(digits.text) * (-1 if sign.is_op('-') else 1)

  def number(self) -> Fraction:
    """The number that comes next: 12, 0.5, 2 1/3 or 0.1\\overline{6}."""
    token = self.next()
    if self.peek().is_command('overline', 'dot') and '.' in token.text:
      return self._repeating(token.text)
    return _fraction(token) + (self._proper_fraction() if token.text.isdigit() else 0)

  def _proper_fraction(self) -> Fraction:
    """A proper fraction that follows a whole number at once, 1/3 or \\frac13; 0: none does."""
    first, line, last = self.peek(), self.peek(1), self.peek(2)
    if first.is_command('frac'):
      begin, tokens = self.i, list(self.tokens)
      self.next()
      parts = [self.argument_tokens(), self.argument_tokens()]
      if all(len(part) == 1 and part[0].text.isdigit() for part in parts):
        top, bottom = (int(part[0].text) for part in parts)
        if top < bottom:
          return Fraction(top, bottom)
      self.i, self.tokens = begin, tokens
    elif first.spaced and line.is_op('/') and all(
        x.kind == 'number' and x.text.isdigit() and int(x.text) for x in (first, last)):
      self.i += 3
      return Fraction(int(first.text), int(last.text))
    return Fraction(0)

  def _repeating(self, text: str) -> Fraction:
    """The number 0.1\\overline{6}, whose last digits repeat for ever."""
    self.next()
    group = self.argument_tokens()
    if len(group) != 1 or not group[0].text.isdigit():
      raise NotAFormula('a repeating decimal')
    whole, _, once = text.partition('.')
    again, nines = group[0].text, 10 ** len(group[0].text) - 1
    return Fraction(int((whole + once) or '0') * nines + int(again), nines * 10 ** len(once))


def _fraction(token: Token) -> Fraction:
  return Fraction(token.text.rstrip('.'))
