"""Text <-> tokens."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from kr_jax import tokenizer
from kr_jax.tokenizer import PAD, STOP

ALPHABET = 'abc= '


def test_literal():
  characters = tokenizer.Characters('ab=')
  assert (PAD, STOP) == (0, 1)
  assert characters.vocab_size == 5
  assert characters.encode('b=a') == (3, 4, 2)
  assert characters.decode([3, 4, 2]) == 'b=a'
  assert characters.encode('') == ()
  assert characters.decode([]) == ''


@settings(deadline=None, max_examples=50)
@given(st.text(ALPHABET))
def test_decode_inverts_encode(text):
  characters = tokenizer.Characters(ALPHABET)
  tokens = characters.encode(text)
  assert len(tokens) == len(text)
  assert all(STOP < token < characters.vocab_size for token in tokens)
  assert characters.decode(tokens) == text


@settings(deadline=None, max_examples=50)
@given(st.text(ALPHABET), st.integers(0, 4), st.text(ALPHABET))
def test_decode_ends_at_the_first_stop_and_drops_padding(text, pads, rest):
  characters = tokenizer.Characters(ALPHABET)
  tokens = [*characters.encode(text), *[PAD] * pads]
  assert characters.decode(tokens) == text
  assert characters.decode([*tokens, STOP, *characters.encode(rest), STOP]) == text


def test_decodes_a_row_of_an_array():
  token_C = np.array([4, 2, STOP, 3, PAD], np.int32)
  assert tokenizer.Characters('ab=').decode(token_C) == '=a'


def test_a_character_twice_in_the_alphabet():
  with pytest.raises(ValueError, match=r"alphabet 'aba' holds a character twice"):
    tokenizer.Characters('aba')


def test_a_character_outside_the_alphabet():
  with pytest.raises(ValueError, match=r"'a\?b' holds '\?', .* the alphabet 'ab='"):
    tokenizer.Characters('ab=').encode('a?b')
