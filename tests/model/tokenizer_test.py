"""Text <-> tokens."""

import json
import pathlib
import re
import shutil
import unicodedata

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from kr_jax.model import tokenizer
from kr_jax.model.tokenizer import STOP
from kr_jax.types import PAD

ALPHABET = 'abc= '


def test_literal():
  characters = tokenizer.Characters('ab=')
  assert (PAD, STOP) == (0, 1)
  assert characters.vocab_size == 5
  assert characters.encode('b=a') == (3, 4, 2)
  assert characters.decode([3, 4, 2]) == 'b=a'
  assert characters.encode('') == ()
  assert characters.decode([]) == ''


@given(st.text(ALPHABET))
def test_decode_inverts_encode(text):
  characters = tokenizer.Characters(ALPHABET)
  tokens = characters.encode(text)
  assert len(tokens) == len(text)
  assert all(STOP < token < characters.vocab_size for token in tokens)
  assert characters.decode(tokens) == text


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


# Of published checkpoints (tests/make_checkpoints.py).

ROOT = pathlib.Path(__file__).parents[1] / 'data' / 'checkpoints'
FAMILIES = ('gemma3', 'llama', 'llama3', 'qwen2', 'qwen3')


def expected(name):
  return json.loads((ROOT / name / 'expected.json').read_text())


def sources(name):
  return (ROOT / name, ROOT / f'{name}.gguf')


@pytest.mark.parametrize('name', FAMILIES)
def test_texts_as_the_published_tokenizer_reads_them(name):
  for source in sources(name):
    bare = tokenizer.Subwords(source, chat=False)
    assert bare.vocab_size == 320
    for case in expected(name)['texts']:
      assert list(bare.encode(case['text'])) == case['tokens']
      assert list(bare.prompt(case['text'])) == case['prompt']
      decoded = bare.decode(case['tokens'])
      assert decoded.replace('\ufffd', '') in unicodedata.normalize('NFC', case['text']) or name == 'gemma3'


@pytest.mark.parametrize('name', FAMILIES)
def test_chats_as_the_published_template_writes_them(name):
  for source in sources(name):
    for system in ('', 'Count well.'):
      for thinking in (True, False):
        if source.suffix == '.gguf' and name == 'qwen2':
          continue  # of which the file has the template alone
        chat = tokenizer.Subwords(source, system=system, thinking=thinking)
        for case in expected(name)['chats']:
          if (case['system'], case['thinking']) == (system, thinking):
            assert list(chat.prompt(case['message'])) == case['tokens']


@pytest.mark.parametrize('name', FAMILIES)
def test_stop_ids_are_those_of_all_files_the_tokenizers_first(name):
  found = tokenizer.Subwords(ROOT / name).stop_ids
  assert sorted(found) == expected(name)['stop_ids']
  end = json.loads((ROOT / name / 'tokenizer_config.json').read_text())['eos_token']
  assert found[0] == tokenizer.Subwords(ROOT / name)._control[end]


@pytest.mark.parametrize('name', FAMILIES)
def test_a_text_never_becomes_control_tokens(name):
  """Not even where it would end the message; and it is read as it is."""
  for source in sources(name):
    chat = tokenizer.Subwords(source)
    control = chat._control
    assert len(control) >= 3
    usual = [token for token in chat.prompt('x') if token in control.values()]
    for text in control:
      for message in (text, f'a{text}b', f'{text}{text}', f'{text[:-1]}', f'{text[:3]}'):
        assert not set(chat.encode(message)) & set(control.values())
        tokens = chat.prompt(message)
        assert [token for token in tokens if token in control.values()] == usual
        assert list(chat.encode(message)) == list(chat._plain.encode(message, add_special_tokens=False).ids)


def test_a_text_is_read_with_what_stands_around_it(tmp_path):
  """A word may begin in the template and end in the message."""
  chat = tokenizer.Subwords(changed(tmp_path, chat_template='of t{{ messages[0].content }}ser'))
  assert chat.prompt('he an') == chat.encode('of the anser')
  assert chat.encode('of t') + chat.encode('he an') + chat.encode('ser') != chat.encode('of the anser')


def test_decode_ends_at_a_stop_and_drops_special_tokens():
  chat = tokenizer.Subwords(ROOT / 'llama3')
  hello = chat.encode('Hello, world')
  bos = chat._control['<|begin_of_text|>']
  for stop in chat.stop_ids:
    assert chat.decode(np.array([bos, *hello, stop, *hello, 0])) == 'Hello, world'
  assert chat.decode([]) == ''
  assert tokenizer.Subwords(ROOT / 'qwen3').decode([*chat.encode(''), 319]) == ''  # of no token


def changed(directory, name='llama', *, file='tokenizer_config.json', **fields) -> pathlib.Path:
  path = pathlib.Path(shutil.copytree(ROOT / name, directory / 'model', dirs_exist_ok=True))
  config = json.loads((path / file).read_text()) | fields
  (path / file).write_text(json.dumps(config))
  return path


@pytest.mark.parametrize('template, named', [
    ('{% for', 'the chat template is broken: '),
    ('{{ raise_exception("never") }}', 'the chat template fails: never'),
    ('{{ messages[0].content.__class__.__mro__ }}', 'the chat template fails: .*unsafe'),
    ('{{ messages.append(1) }}', 'the chat template fails: '),
    ('{{ messages[0].content }} {{ messages[0].content }}', 'writes a message 2 times'),
    ('none', 'writes a message 0 times'),
    ('{{ messages[0].content | upper }}', 'writes a message 0 times'),
    ('{{ messages[0].content | replace("1", "2") }}', r"alters the text '1 \+ 1 ='"),
    ('{{ messages[0].content if "\ue000" in messages[0].content else "another" }}', 'alters the text')])
def test_a_template_that_does_not_let_a_text_stand(tmp_path, template, named):
  with pytest.raises(ValueError, match=named):
    tokenizer.Subwords(changed(tmp_path, chat_template=template))


def test_a_system_message_needs_a_chat(tmp_path):
  with pytest.raises(ValueError, match="tasks.system='Hi' needs a chat template"):
    tokenizer.Subwords(ROOT / 'llama', chat=False, system='Hi')
  path = changed(tmp_path, chat_template=None)
  with pytest.raises(ValueError, match='needs a chat template'):
    tokenizer.Subwords(path, system='Hi')
  assert tokenizer.Subwords(path).prompt('Hi') == tokenizer.Subwords(path).encode('Hi')


def test_stop_tokens_that_are_none(tmp_path):
  path = changed(tmp_path, file='generation_config.json', eos_token_id=320)
  with pytest.raises(ValueError, match=r'stop tokens \[1, 320\] are not ids below vocab_size=320'):
    tokenizer.Subwords(path)


def test_a_broken_tokenizer(tmp_path):
  path = changed(tmp_path)
  (path / 'tokenizer.json').write_text('{"version": "1.0"}')
  with pytest.raises(ValueError, match='the tokenizer cannot be read'):
    tokenizer.Subwords(path)


@pytest.mark.parametrize('name', FAMILIES)
def test_saved_as_it_was(name, tmp_path):
  for source in sources(name):
    chat = tokenizer.Subwords(source)
    chat.save(tmp_path)
    shutil.copy(ROOT / name / 'config.json', tmp_path)
    again = tokenizer.Subwords(tmp_path)
    assert again.prompt('What is 12 + 34?') == chat.prompt('What is 12 + 34?')
    assert again.stop_ids == chat.stop_ids


def words_by_hand(text: str) -> list[str]:
  """SmolLM2's rule: digits one by one; of what is between them GPT-2's words."""
  found = []
  for part in re.findall(r'[0-9]|[^0-9]+', text):
    found += re.findall(
        r"[0-9]|'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?[^\s\w]+(?:_|[^\s\w])*| ?_+|\s+(?!\S)|\s+", part)
  return found


def test_byte_pairs_by_hand():
  """The GGUF file's words, and merges in their order, on plain text."""
  of_json = json.loads(tokenizer.Subwords(ROOT / 'llama.gguf')._files.tokenizer_json)['model']
  rank = {tuple(pair): i for i, pair in enumerate(of_json['merges'])}
  bare = tokenizer.Subwords(ROOT / 'llama.gguf', chat=False)
  printable = lambda word: word.replace(' ', '\u0120').replace('\n', '\u010a')
  for text in ('The sum of 12 and 34 is 46.', "what's x123y  4\n\nfor", 'fox  jumps', 'a b-c (d)'):
    tokens = []
    for word in words_by_hand(text):
      parts = list(printable(word))
      while pairs := [pair for pair in zip(parts, parts[1:]) if pair in rank]:
        best = min(pairs, key=rank.get)
        i = next(i for i, pair in enumerate(zip(parts, parts[1:])) if pair == best)
        parts[i:i + 2] = [''.join(best)]
      tokens += [of_json['vocab'][part] for part in parts]
    assert list(bare.encode(text)) == tokens
