"""Text <-> tokens, one character a token."""

from __future__ import annotations

from collections.abc import Iterable

PAD, STOP = 0, 1


class Characters:
  """A tokenizer over a fixed alphabet: token 0 pads, token 1 ends a completion."""

  def __init__(self, alphabet: str):
    if len(set(alphabet)) != len(alphabet):
      raise ValueError(f'alphabet {alphabet!r} holds a character twice')
    self.alphabet = alphabet
    self._token = {character: i for i, character in enumerate(alphabet, start=2)}

  @property
  def vocab_size(self) -> int:
    return len(self.alphabet) + 2

  def encode(self, text: str) -> tuple[int, ...]:
    """Raises ValueError for a character outside the alphabet."""
    for character in text:
      if character not in self._token:
        raise ValueError(
            f'{text!r} holds {character!r}, which is not in the alphabet {self.alphabet!r}')
    return tuple(self._token[character] for character in text)

  def decode(self, tokens: Iterable[int]) -> str:
    """The text up to the first stop token; padding is dropped."""
    text = []
    for token in tokens:
      if token == STOP:
        break
      if token != PAD:
        text.append(self.alphabet[int(token) - 2])
    return ''.join(text)
