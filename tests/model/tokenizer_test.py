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
import safetensors.numpy
import tokenizers

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


@pytest.mark.parametrize('alphabet, texts', [
    ('abc= ', ['a= b', ' ', '', 'c  c', ' a ']), ('0123456789+-*=\n ', ['12+34=46\n', '\n\n 7']),
    ('<pad>/s', ['<pad>', '</s>', '</s><pad>s']), ('\ue000\ue001<pad>', ['<pad>\ue000']),
    ('aäé数🙂\t', ['数🙂ä\t'])])
def test_characters_are_saved_as_a_published_tokenizer(tmp_path, alphabet, texts):
  characters = tokenizer.Characters(alphabet)
  characters.save(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps({'vocab_size': characters.vocab_size}))
  plain, ours = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json')), tokenizer.Subwords(tmp_path)
  assert plain.get_vocab_size() == characters.vocab_size and ours.stop_ids == (STOP,)
  for text in texts:
    tokens = characters.encode(text)
    assert tuple(plain.encode(text).ids) == ours.encode(text) == ours.prompt(text) == tokens
    assert plain.decode(tokens) == ours.decode([*tokens, PAD, STOP, *tokens]) == text
  with pytest.raises(ValueError, match="the tokenizer cannot read '!': .*UNK"):
    ours.encode('!')


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
  for source in sources(name):
    check_no_control_token_is_spelt(tokenizer.Subwords(source))


def check_no_control_token_is_spelt(chat, shows=True):
  """Not even where it would end the message; and it is read as it is."""
  control = chat._control
  assert len(control) >= 3
  usual = [token for token in chat.prompt('x') if token in chat._control_ids]
  for text in control:
    for message in (text, f'a{text}b', f'{text}{text}', f' {text} 1', text[:-1], text[1:], text[:3], text.upper()):
      assert not set(chat.encode(message)) & chat._control_ids
      tokens = chat.prompt(message)
      assert [token for token in tokens if token in chat._control_ids] == usual
      assert not shows or message.strip() in chat._published.decode(list(tokens), skip_special_tokens=False)


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
    ('{{ messages[0].content.split("+")[0] }}', r"alters the text '1 \+ 1 ='"),
    ('{% for part in messages[0].content %}{{ part.text }}{% endfor %}', 'one for images may want a list of parts'),
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


def test_a_system_message_that_the_template_leaves_out_is_said(tmp_path, capsys):
  path = changed(tmp_path, chat_template="{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
  assert tokenizer.Subwords(path, system='Hi').prompt('a') == tokenizer.Subwords(path).encode('a')
  assert "the chat template leaves out tasks.system='Hi'; put the text in tasks.template" in capsys.readouterr().err
  # One that acts on it does not write it.
  changed(tmp_path, chat_template="{{ 'fast ' if messages[0].content == '/no_think' }}{{ messages[-1].content }}")
  assert tokenizer.Subwords(path, system='/no_think').prompt('a') == tokenizer.Subwords(path).encode('fast a')
  assert not capsys.readouterr().err


def test_stop_tokens_that_are_none(tmp_path):
  path = changed(tmp_path, file='generation_config.json', eos_token_id=320)
  with pytest.raises(ValueError, match=r"stop tokens \[1, 320\] \(texts: \['<\|im_end\|>', None\]\) are not ids below "
                     'vocab_size=320'):
    tokenizer.Subwords(path)
  for wrong in ('1', True, [1], {'id': 1}, -1, 2.0):
    changed(tmp_path, file='generation_config.json', eos_token_id=[wrong])
    with pytest.raises(ValueError, match=rf'stop tokens {re.escape(str([1, wrong]))}.*; correct eos_token_id in gener'):
      tokenizer.Subwords(path)


def test_a_broken_tokenizer(tmp_path):
  path = changed(tmp_path)
  (path / 'tokenizer.json').write_text('{"version": "1.0"}')
  with pytest.raises(ValueError, match='model: the tokenizer cannot be read: .*; take .* or upgrade the package tok'):
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


# A tokenizer of each kind (tests/make_tokenizers.py), and what transformers reads with it.

KINDS = pathlib.Path(__file__).parents[1] / 'data' / 'tokenizers'
NAMES = sorted(path.name for path in KINDS.iterdir())
UNFAITHFUL = ('digits', 'normalized', 'unigram', 'wordlevel', 'wordpiece')  # do not decode to what was encoded
SYSTEM = 'Count well.'


def of_kind(directory, name, *, file='tokenizer_config.json', **fields) -> pathlib.Path:
  """A copy of a kind, with fields of a file changed, or left out where they are None."""
  path = directory / name
  if not path.exists():
    shutil.copytree(KINDS / name, path)
  old = json.loads((path / file).read_text()) if (path / file).exists() else {}
  (path / file).write_text(json.dumps({key: x for key, x in (old | fields).items() if x is not None}))
  return path


@pytest.mark.parametrize('name', NAMES)
def test_texts_and_chats_of_each_kind(name):
  case = json.loads((KINDS / name / 'expected.json').read_text())
  bare = tokenizer.Subwords(KINDS / name, chat=False)
  assert len(case['texts']) == len(case['chats']) == 10
  for text in case['texts']:
    assert list(bare.encode(text['text'])) == text['tokens']
  for system in ('', SYSTEM):
    chat = tokenizer.Subwords(KINDS / name, system=system)
    for message in case['chats']:
      if message['system'] == system:
        assert list(chat.prompt(message['message'])) == message['tokens']


@pytest.mark.parametrize('name', NAMES)
def test_no_text_of_any_kind_becomes_control_tokens(name):
  chat = tokenizer.Subwords(KINDS / name)
  check_no_control_token_is_spelt(chat, shows=name not in UNFAITHFUL)
  # What encodes such texts encodes others as published.
  for text in json.loads((KINDS / name / 'expected.json').read_text())['texts']:
    for place in (chat._chat, tokenizer._Place()):
      assert tuple(chat._encode_by_twin(text['text'], place)) == chat._encode(text['text'], place)


def test_a_control_token_takes_the_white_space_that_is_its_own():
  """|end| and |assistant| take what follows them: the template's new line after them is no token."""
  chat = tokenizer.Subwords(KINDS / 'bytes')
  begin, user, assistant, end = (chat._control[x] for x in ('<s>', '|user|', '|assistant|', '|end|'))
  assert chat.prompt('a') == (begin, user, *chat.encode('a'), end, assistant)
  assert chat.prompt('a  ') == (begin, user, *chat.encode('a  '), end, assistant)
  assert chat.prompt('  a') == (begin, user, *chat.encode('a'), end, assistant)  # |user| as well
  spelt = chat.prompt('a|end|\nb')
  assert spelt.count(end) == 1 and chat._published.decode(list(spelt[2:-2])) == ' a|end|\nb'


def test_added_tokens_that_are_not_special_are_text():
  """Published vocabularies have digits, umlauts and tags among them."""
  chat = tokenizer.Subwords(KINDS / 'digits')
  added = {token.content: i for i, token in chat._published.get_added_tokens_decoder().items()}
  assert chat.encode('12+ü<b>') == tuple(added[x] for x in ('1', '2', '+', 'ü', '<b>'))
  assert chat.encode('sum') == (added['sum'],)
  assert set(chat._control) == {'<s>', '</s>', '<|User|>', '<|Assistant|>', '<think>', '</think>'}
  assert {chat.prompt(f'1{x}2').count(chat._control[x]) for x in ('</think>', '</s>')} == {0}
  # Without a template that writes it a tag is one of many.
  bare = tokenizer.Subwords(KINDS / 'digits', chat=False)
  assert bare._control == chat._control


def test_a_tag_is_control_where_the_template_writes_it(tmp_path):
  path = of_kind(tmp_path, 'digits', chat_template='<|User|>{{ messages[0].content }}')
  plain = tokenizer.Subwords(path)
  of_kind(tmp_path, 'digits', chat_template='The sum 12 + <|User|>{{ messages[0].content }}')
  assert set(tokenizer.Subwords(path)._control) == set(plain._control) == {'<s>', '</s>', '<|User|>', '<|Assistant|>'}
  assert plain.encode('<think>') == (plain._published.token_to_id('<think>'),)


def test_a_character_that_pads_is_text():
  """Somebody's pad_token is '!': it is still read, and still written."""
  chat = tokenizer.Subwords(KINDS / 'digits')
  assert '!' in [token.content for token in chat._published.get_added_tokens_decoder().values() if token.special]
  assert chat.encode('!') == (0,) and chat.decode([0, 0]) == '!!'
  assert 0 in chat.prompt('a!')


@pytest.mark.parametrize('file, fields', [
    ('tokenizer_config.json', {'additional_special_tokens': ['user']}),
    ('tokenizer_config.json', {'extra_special_tokens': ['user'], 'additional_special_tokens': ['12']}),
    ('tokenizer_config.json', {'extra_special_tokens': {'user_token': 'user'}}),
    ('tokenizer_config.json', {'extra_special_tokens': {'sum_token': 'sum'}, 'additional_special_tokens': ['user']}),
    ('tokenizer_config.json', {'user_token': {'content': 'user', '__type': 'AddedToken', 'lstrip': False}}),
    ('tokenizer_config.json', {'pad_token': 'user'}),
    ('tokenizer_config.json', {'added_tokens_decoder': {'43': {'content': 'user', 'special': True}}}),
    ('special_tokens_map.json', {'pad_token': 'user'}),
    ('special_tokens_map.json', {'pad_token': {'content': 'user', 'lstrip': False, 'normalized': False}}),
    ('special_tokens_map.json', {'additional_special_tokens': ['user']})])
def test_special_tokens_are_those_of_all_files(tmp_path, file, fields):
  """'user' is a word of the vocabulary, unless one of the files says that it is special."""
  usual = tokenizer.Subwords(of_kind(tmp_path, 'wordlevel'))
  assert usual.encode('user 12') == (43, 5) and 'user' not in usual._control
  found = tokenizer.Subwords(of_kind(tmp_path, 'wordlevel', file=file, **fields))
  assert found._control['user'] == 43
  assert found.encode('user 12') == (0, 5)  # an unknown word
  assert 43 in found.prompt('12')  # the template writes it as control


def test_special_tokens_of_several_files(tmp_path):
  """Lists do not replace each other, and of one token the flags that are read last hold, as in transformers."""
  path = of_kind(tmp_path, 'wordlevel', additional_special_tokens=['user'])
  of_kind(tmp_path, 'wordlevel', file='special_tokens_map.json', additional_special_tokens=['assistant'])
  assert {'user', '[BOS]'} < tokenizer.Subwords(path)._control.keys()
  pieces = lambda: tokenizer.Subwords(path, chat=False)._published.encode('=  a', add_special_tokens=False).tokens
  path = of_kind(tmp_path, 'bytes', eos_token={'content': '=', 'rstrip': True}, additional_special_tokens=['='])
  assert pieces() == ['=', '\u0120', '\u0120a']
  of_kind(tmp_path, 'bytes', added_tokens_decoder={'296': {'content': '=', 'rstrip': True, 'special': True}})
  assert pieces() == ['=  ', '\u0120a']  # with the blanks that it takes


def test_tokens_of_the_oldest_file(tmp_path):
  """added_tokens.json has what tokenizer.json does not, if no newer file lists added tokens."""
  path = of_kind(tmp_path, 'wordlevel', file='added_tokens.json', **{'<late>': 900, '<later>': 901, '[UNK]': 0})
  usual = tokenizer.Subwords(KINDS / 'wordlevel')._published.get_vocab_size()
  usual_control, published = tokenizer.Subwords(KINDS / 'wordlevel')._control, tokenizer.Subwords(path)._published
  assert [published.token_to_id(x) for x in ('[UNK]', '<late>', '<later>')] == [0, usual, usual + 1]
  of_kind(tmp_path, 'wordlevel', additional_special_tokens=['<late>'])
  assert {'<late>'} == tokenizer.Subwords(path)._control.keys() - usual_control.keys()
  of_kind(tmp_path, 'wordlevel', additional_special_tokens=None,
          added_tokens_decoder={'0': {'content': '[UNK]', 'special': True}})
  assert tokenizer.Subwords(path, chat=False)._published.token_to_id('<late>') is None


def test_a_name_of_a_special_token_is_given_to_the_template(tmp_path):
  path = of_kind(tmp_path, 'wordlevel', file='special_tokens_map.json', user_token='user')
  path = of_kind(tmp_path, 'wordlevel', chat_template='{{ user_token }} {{ bos_token }} {{ messages[0].content }}')
  assert tokenizer.Subwords(path).prompt('12') == (43, 1, 5)


@pytest.mark.parametrize('fields', [
    {'added_tokens_decoder': [1]}, {'added_tokens_decoder': {'x': {'content': 'y'}}}, {'eos_token': {'text': 'y'}},
    {'eos_token': 5}, {'pad_token': ['y']}, {'additional_special_tokens': '<y>'}, {'additional_special_tokens': [None]},
    {'added_tokens_decoder': {'1': 'user'}, 'extra_special_tokens': 5}])
def test_special_tokens_of_another_form(tmp_path, fields):
  with pytest.raises(ValueError, match='the special tokens of tokenizer_config.json cannot be read'):
    tokenizer.Subwords(of_kind(tmp_path, 'bytes', **fields))


def test_state_that_is_left_in_a_tokenizer_is_not_used(tmp_path):
  model = json.loads((ROOT / 'llama' / 'tokenizer.json').read_text())['model']
  path = changed(
      tmp_path, file='tokenizer.json', model=model | {'dropout': 0.9},
      truncation={'direction': 'Right', 'max_length': 12, 'strategy': 'LongestFirst', 'stride': 0},
      padding={'strategy': {'Fixed': 48}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 257,
               'pad_type_id': 0, 'pad_token': '</s>'})
  found, usual = tokenizer.Subwords(path), tokenizer.Subwords(ROOT / 'llama')
  for text in ('a', 'The quick brown fox jumps over the lazy dog. ' * 5):
    assert found.encode(text) == usual.encode(text) and found.prompt(text) == usual.prompt(text)
  assert len(usual.encode(text)) > 48
  found.save(tmp_path)
  stored = json.loads((tmp_path / 'tokenizer.json').read_text())
  assert stored['truncation'] is stored['padding'] is None
  assert stored == json.loads((ROOT / 'llama' / 'tokenizer.json').read_text())


def test_a_bare_prompt_has_what_is_before_a_text_alone():
  """The published pipeline writes </s> after a text, which would end the completion."""
  bare = tokenizer.Subwords(KINDS / 'metaspace_first', chat=False)
  assert bare._published.encode('a').ids == [1, *bare.encode('a'), 2]
  assert bare.prompt('a') == (1, *bare.encode('a')) and bare.prompt('') == (1,)
  assert tokenizer.Subwords(KINDS / 'wordpiece', chat=False).prompt('the')[0] == 2  # [CLS], of [CLS] the [SEP]
  nothing = tokenizer.Subwords(KINDS / 'bytes', chat=False)
  assert nothing.prompt('a') == nothing.encode('a')


def test_thinking_that_the_template_does_not_know_is_said(capsys):
  for thinking, said in ((None, False), (True, True), (False, True)):
    tokenizer.Subwords(ROOT / 'llama', thinking=thinking)
    assert (f'thinking={thinking} changes nothing: the chat template knows no' in capsys.readouterr().err) == said
  tokenizer.Subwords(ROOT / 'qwen3', thinking=False)
  assert not capsys.readouterr().err
  tokenizer.Subwords(ROOT / 'qwen3', thinking=False, chat=False)
  assert 'tasks.thinking=False changes nothing: no chat template is used' in capsys.readouterr().err


def test_the_published_default_of_thinking_holds(tmp_path):
  template = ('{% if not enable_thinking is defined %}{% set enable_thinking = false %}{% endif %}'
              "{{ 'think ' if enable_thinking }}{{ messages[0].content }}")
  path = changed(tmp_path, chat_template=template)
  usual = tokenizer.Subwords(path)
  assert usual.prompt('Hi') == usual.encode('Hi') == tokenizer.Subwords(path, thinking=False).prompt('Hi')
  assert tokenizer.Subwords(path, thinking=True).prompt('Hi') == usual.encode('think Hi')


def test_a_refused_system_message_says_what_to_do(tmp_path):
  path = changed(tmp_path, chat_template="{% if messages[0].role == 'system' %}{{ raise_exception('System role not "
                 "supported') }}{% endif %}{{ messages[0].content }}")
  tokenizer.Subwords(path)
  with pytest.raises(ValueError, match="model: the chat template fails: System role not supported; .*tasks.template"):
    tokenizer.Subwords(path, system='Hi')


def test_a_completion_ends_where_the_template_ends_a_message(tmp_path):
  """Whatever the files say: of Gemma's they often name <eos> alone."""
  for source in sources('gemma3'):
    gemma = tokenizer.Subwords(source)
    assert gemma.stop_ids == (gemma._control['<eos>'], gemma._control['<end_of_turn>'])
  path = pathlib.Path(shutil.copytree(KINDS / 'legacy', tmp_path / 'legacy'))
  assert tokenizer.Subwords(path).stop_ids == (2, 333)  # </s>, which the files name, and <|end|>
  assert tokenizer.Subwords(path, chat=False).stop_ids == (2,)
  of_kind(tmp_path, 'legacy', file='generation_config.json', eos_token_id=[333, 2])
  assert tokenizer.Subwords(path).stop_ids == (2, 333)
  # Templates that end a message where another follows, and that take no such message last.
  for template in ('{% for m in messages %}{{ m.content }}{{ "<|end|>" if not loop.last }}{% endfor %}',
                   "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
                   '{% for m in messages %}{{ m.content }}<|end|>{% endfor %}'):
    assert tokenizer.Subwords(of_kind(tmp_path, 'legacy', chat_template=template)).stop_ids == (2, 333)
  # A template that has no such message, or ends it with text.
  of_kind(tmp_path, 'legacy', file='generation_config.json', eos_token_id=2)
  for template in ('{{ messages[0].content }}', '{% for m in messages %}{{ m.content }}.{% endfor %}<|end|>',
                   "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
                   '{{ messages[0].content }}<|end|>'):
    assert tokenizer.Subwords(of_kind(tmp_path, 'legacy', chat_template=template)).stop_ids == (2,)


@pytest.mark.parametrize('stored, stops', [
    ({'eos_token_id': 2}, (2,)), ({'eos_token_id': [2, 1]}, (2, 1)), ({'text_config': {'eos_token_id': [1]}}, (2, 1)),
    ({'eos_token_id': None, 'text_config': None}, (2,))])
def test_stop_tokens_of_the_older_place(tmp_path, stored, stops):
  path = of_kind(tmp_path, 'metaspace_first', file='config.json', **stored)
  (path / 'generation_config.json').unlink()
  assert tokenizer.Subwords(path).stop_ids == stops


def test_ids_that_the_vocabulary_does_not_have(tmp_path):
  """A text, the template or a stop token may need an added token that the checkpoint has no embedding of."""
  path = of_kind(tmp_path, 'legacy', file='config.json', vocab_size=333)
  with pytest.raises(ValueError, match=r"stop tokens \[2, 333\] \(texts: \['</s>', '<\|end\|>'\]\) are not ids below"):
    tokenizer.Subwords(path)
  path = of_kind(tmp_path, 'legacy', file='config.json', vocab_size=332)
  of_kind(tmp_path, 'legacy', chat_template='<|assistant|>{{ messages[0].content }}')
  with pytest.raises(ValueError, match=r"'<\|assistant\|>' with the id 332, which is not below vocab_size=332"):
    tokenizer.Subwords(path)
  of_kind(tmp_path, 'legacy', chat_template='{{ messages[0].content }}')
  assert tokenizer.Subwords(path).encode('<|assistant|>')  # read as text
  path = of_kind(tmp_path, 'digits', file='config.json', vocab_size=290)
  of_kind(tmp_path, 'digits', chat_template='{{ messages[0].content }}', eos_token='!')
  of_kind(tmp_path, 'digits', file='generation_config.json', eos_token_id=5)
  found = tokenizer.Subwords(path)
  with pytest.raises(ValueError, match=r"text of 'a<b>' needs the token '<b>' with the id 290, which is not below"):
    found.prompt('a<b>')


def test_the_size_of_the_vocabulary(tmp_path):
  path = of_kind(tmp_path, 'legacy', file='config.json', vocab_size=None, text_config={'vocab_size': 340})
  assert tokenizer.Subwords(path).vocab_size == 340
  # A configuration may leave out what is its default.
  safetensors.numpy.save_file({'model.embed_tokens.weight': np.zeros((350, 2), np.float32)}, path / 'model.safetensors')
  of_kind(tmp_path, 'legacy', file='config.json', text_config={})
  assert tokenizer.Subwords(path).vocab_size == 350
  of_kind(tmp_path, 'legacy', file='config.json', vocab_size='334')
  with pytest.raises(ValueError, match="vocab_size='334' of config.json is not a number of tokens"):
    tokenizer.Subwords(path)
  of_kind(tmp_path, 'legacy', file='config.json', vocab_size=True, text_config='x')
  with pytest.raises(ValueError, match='vocab_size=True of config.json is not a number of tokens'):
    tokenizer.Subwords(path)


def test_a_model_that_does_not_know_a_special_character(tmp_path):
  path = of_kind(tmp_path, 'wordlevel', pad_token='§', chat_template='12 {{ messages[0].content }}')
  of_json = json.loads((path / 'tokenizer.json').read_text())
  of_json['model']['unk_token'] = 'none'
  (path / 'tokenizer.json').write_text(json.dumps(of_json))
  with pytest.raises(ValueError, match="the tokenizer cannot read '12 .': .*UNK.*; change or leave out this text"):
    tokenizer.Subwords(path)


@pytest.mark.parametrize('ignore_merges', [False, True])
def test_byte_pairs_do_not_make_a_control_token_of_a_text(tmp_path, ignore_merges):
  vocab = {x: i for i, x in enumerate(['a', '<', 's', '>', '<s', '<s>', 'a<s>', '</s>'])}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab, [('<', 's'), ('<s', '>'), ('a', '<s>')], ignore_merges=ignore_merges))
  made.add_special_tokens(['<s>', '</s>'])
  made.save(str(tmp_path / 'tokenizer.json'))
  for name, fields in (('config', {'vocab_size': 8}), ('tokenizer_config', {'eos_token': '</s>'})):
    (tmp_path / f'{name}.json').write_text(json.dumps(fields))
  bare = tokenizer.Subwords(tmp_path)
  assert bare.encode('a<sa') == (0, 4, 0)
  assert bare.encode('<s>') == (4, 3)
  assert bare.encode('a<s>') == ((6,) if ignore_merges else (0, 4, 3))  # 6 is a word like others


def test_a_control_token_that_is_text_beside_a_text(tmp_path):
  """As published: |end| is to be a word of its own, and beside a letter it is none."""
  path = of_kind(tmp_path, 'bytes', added_tokens_decoder=None)
  of_json = json.loads((path / 'tokenizer.json').read_text())
  for token in of_json['added_tokens']:
    token['single_word'] = token['content'] == '|end|'
  (path / 'tokenizer.json').write_text(json.dumps(of_json))
  chat = tokenizer.Subwords(path)
  end = chat._control['|end|']
  assert [chat.prompt(text).count(end) for text in ('a.', 'a', '7')] == [1, 0, 0]
  assert list(chat.prompt('a')) == chat._published.encode(
      '<s>|user|\na|end|\n|assistant|\n', add_special_tokens=False).ids


def test_texts_that_cannot_be_told_from_control_tokens(tmp_path):
  chat = tokenizer.Subwords(KINDS / 'legacy')
  assert chat.prompt('\U00100000')
  with pytest.raises(ValueError, match='spells a control token, and holds a character for private use above U.100000'):
    chat.prompt('</s> \U00100000')
  # |system| is control as a word of its own, and this one is not.
  chat = tokenizer.Subwords(of_kind(tmp_path, 'bytes', chat_template='x|system|y {{ messages[0].content }}'))
  assert chat.prompt('a') == chat.encode('x|system|y a')
  with pytest.raises(ValueError, match="the text '</s>' spells a control token that the tokenizer cannot read as text"):
    chat.prompt('</s>')
  # A normalizer that drops characters for private use, in which a control token is looked for after it.
  path = of_kind(tmp_path, 'wordpiece', chat_template='{{ messages[0].content }}[MASK]')
  of_json = json.loads((path / 'tokenizer.json').read_text())
  for token in of_json['added_tokens']:
    token['normalized'] = True
  (path / 'tokenizer.json').write_text(json.dumps(of_json))
  with pytest.raises(ValueError, match="the text 'a .mask.' spells a control token that the tokenizer cannot read as"):
    tokenizer.Subwords(path).prompt('a [mask]')


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


def test_a_tokenizer_that_hangs_or_panics_names_the_text(tmp_path, monkeypatch):
  path = tmp_path / 'qwen3'
  shutil.copytree(ROOT / 'qwen3', path)
  found = tokenizer.Subwords(path)
  monkeypatch.setattr(tokenizer.pipeline, 'MOST_CHARACTERS', 400)
  with pytest.raises(ValueError, match=r"qwen3: the tokenizer cannot read '.*'\.\.\. \(5\d\d characters\): it has 5"):
    found.prompt('a' * 500)
  of_json = json.loads((path / 'tokenizer.json').read_text())
  double = {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'aa'}
  of_json['normalizer'] = {'type': 'Sequence', 'normalizers': [double] * 30}
  (path / 'tokenizer.json').write_text(json.dumps(of_json))
  with pytest.raises(ValueError, match='qwen3: the tokenizer cannot be read: its normalizer may make 1.074e.09 bytes'):
    tokenizer.Subwords(path)


def test_stop_tokens_that_no_integer_holds(tmp_path):
  path = tmp_path / 'qwen3'
  shutil.copytree(ROOT / 'qwen3', path)
  (path / 'generation_config.json').write_text(json.dumps({'eos_token_id': 2 ** 70}))
  with pytest.raises(ValueError, match='the stop tokens .*1180591620717411303424.* are not ids below'):
    tokenizer.Subwords(path)


def test_control_tokens_beyond_the_private_plane(tmp_path, monkeypatch):
  monkeypatch.setattr(tokenizer, '_MOST_CONTROL', 1)
  with pytest.raises(ValueError, match='control tokens, above the limit of 1'):
    tokenizer.Subwords(ROOT / 'qwen3').encode('<|im_end|>')
