"""Vocabularies of .gguf files read texts as the tokenizers of transformers that they were made of."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers

from kr_jax.model import gguf_vocabulary
from kr_jax.model import llama_cpp
from tests import make_gguf

DATA = pathlib.Path(__file__).parents[1] / 'data'


def texts_of(folder: pathlib.Path):
  return json.loads((folder / 'expected.json').read_text(encoding='utf-8'))['texts']


def vocabulary_file(path: pathlib.Path, folder: pathlib.Path, fields=None, architecture: str = 'llama'):
  """A file with no more than the vocabulary of a directory."""
  size = json.loads((folder / 'config.json').read_text())['vocab_size']
  found = make_gguf.vocabulary(folder, size) | (fields or {})
  make_gguf.write_raw(path, architecture, {key: x for key, x in found.items() if x is not None},
                      {'token_embd.weight': np.zeros((size, 4))})
  return llama_cpp.Gguf(path)


@pytest.mark.parametrize('folder, rule, architecture', [
    ('checkpoints/llama', 'smollm', 'llama'), ('checkpoints/llama3', 'llama-bpe', 'llama'),
    ('checkpoints/qwen2', 'qwen2', 'qwen2'), ('checkpoints/gemma3', 'default', 'gemma3'),
    ('tokenizers/digits', 'gpt-2', 'llama'), ('tokenizers/legacy', 'default', 'phi3')])
def test_texts_are_read_as_transformers_reads_the_directory(folder, rule, architecture, tmp_path):
  file = vocabulary_file(tmp_path / 'a.gguf', DATA / folder, {'tokenizer.ggml.pre': rule}, architecture)
  made = tokenizers.Tokenizer.from_str(file.tokenizer_json)
  for x in texts_of(DATA / folder):
    assert made.encode(x['text'], add_special_tokens=False).ids == x['tokens'], x['text']
    if 'prompt' in x:
      assert made.encode(x['text']).ids == x['prompt']


@pytest.mark.parametrize('rule', ['default', 'dbrx', 'gpt-4o'])
def test_control_tokens_of_phi_take_blanks(rule, tmp_path):
  """After them, and of Phi-4 before them; those of other architectures take none."""
  texts = ('a<|user|>\n b', 'a <|end|>b', 'a<|user|>b', 'a<|end|>b')
  for architecture in ('phi3', 'llama'):
    fields = make_gguf.vocabulary(DATA / 'tokenizers' / 'legacy', 334)
    if rule != 'default':
      fields = make_gguf.vocabulary(DATA / 'checkpoints' / 'llama', 320) | {'tokenizer.ggml.pre': rule}
      for i, token in enumerate(('<|user|>', '<|end|>'), start=310):
        fields['tokenizer.ggml.tokens'][i], fields['tokenizer.ggml.token_type'][i] = token, make_gguf.TYPES['CONTROL']
    made = gguf_vocabulary.tokenizer(gguf_vocabulary.read(tmp_path, architecture, fields))
    user, end, bare_user, bare_end = (made.encode(x, add_special_tokens=False).ids for x in texts)
    assert (user == bare_user) == (architecture == 'phi3')
    assert (end == bare_end) == (architecture == 'phi3' and rule == 'dbrx')


PLACES = {'llama-bpe': ('<|begin_of_text|>', 128_000), 'qwen2': ('<|endoftext|>', 151_643)}


@pytest.mark.parametrize('pre', [None, 'default'])
@pytest.mark.parametrize('name, rule', [('llama3', 'llama-bpe'), ('qwen2', 'qwen2')])
def test_a_missing_rule_is_found_from_the_vocabulary(name, rule, pre, tmp_path):
  """A text is read as with the rule, and begins with BOS where the rule says so: not in the words of GPT-2."""
  folder = DATA / 'checkpoints' / name
  token, place = PLACES[rule]
  fields = make_gguf.vocabulary(folder, 320)
  tokens, kinds = fields['tokenizer.ggml.tokens'], fields['tokenizer.ggml.token_type']
  tokens = [x if x != token else '[PAD]' for x in tokens]
  tokens += [f'[PAD{i}]' for i in range(len(tokens), place)] + [token]
  kinds += [make_gguf.TYPES['UNUSED']] * (place - len(kinds)) + [make_gguf.TYPES['CONTROL']]
  fields |= {'tokenizer.ggml.tokens': tokens, 'tokenizer.ggml.token_type': kinds, 'tokenizer.ggml.bos_token_id': place}
  del fields['tokenizer.ggml.add_bos_token'], fields['tokenizer.ggml.pre']
  found = gguf_vocabulary.tokenizer(gguf_vocabulary.read(
      tmp_path, 'llama', fields | ({'tokenizer.ggml.pre': pre} if pre else {})))
  for x in texts_of(folder):
    assert found.encode(x['text'], add_special_tokens=False).ids == x['tokens'], x['text']
  assert found.encode('').ids == ([place] if rule == 'llama-bpe' else [])


def test_a_missing_rule_that_is_not_found_is_refused(tmp_path):
  folder = DATA / 'checkpoints' / 'llama3'
  with pytest.raises(ValueError, match='tokenizer.ggml.pre is missing or "default".* 320 tokens is not a known one'):
    _ = vocabulary_file(tmp_path / 'a.gguf', folder).tokenizer_json
  with pytest.raises(ValueError, match=r"tokenizer.ggml.pre='poro-chat' is not one of \['command-r', 'dbrx'"):
    _ = vocabulary_file(tmp_path / 'b.gguf', folder, {'tokenizer.ggml.pre': 'poro-chat'}).tokenizer_json
  with pytest.raises(ValueError, match="tokenizer.ggml.model='bert' is not one of"):
    _ = vocabulary_file(tmp_path / 'c.gguf', folder, {'tokenizer.ggml.model': 'bert'}).tokenizer_json


@pytest.mark.parametrize('rule, text, words', [
    ('llama-bpe', "I'Ve 12345  x\n\n", ['I', "'Ve", 'Ġ', '123', '45', 'Ġ', 'Ġx', 'ĊĊ']),
    ('dbrx', 'a 1234.', ['a', 'Ġ', '123', '4', '.']),
    ('qwen2', 'a 1234.', ['a', 'Ġ', '1', '2', '3', '4', '.']),
    ('gpt-2', 'a 1234.', ['a', 'Ġ1234', '.']),
    ('smollm', 'a 12.', ['a', 'Ġ', '1', '2', '.']),
    ('tekken', 'camelCase/\n 12', ['camel', 'Case', '/Ċ', 'Ġ', '1', '2']),
    ('gpt-4o', "camelCase's 1234", ['camel', "Case's", 'Ġ', '123', '4']),
    ('deepseek-llm', 'a 12\n,b', ['a', 'Ġ', '12', 'Ċ', ',', 'b']),
    ('deepseek-coder', 'a 12\n,b', ['a', 'Ġ', '1', '2', 'Ċ', ',', 'b'])])
def test_words_of_each_rule(rule, text, words, tmp_path):
  fields = make_gguf.vocabulary(DATA / 'checkpoints' / 'llama', 320) | {'tokenizer.ggml.pre': rule}
  made = gguf_vocabulary.tokenizer(gguf_vocabulary.read(tmp_path, 'llama', fields))
  assert [word for word, _ in made.pre_tokenizer.pre_tokenize_str(text)] == words


@pytest.mark.parametrize('rule, whole_word, composed', [
    ('llama-bpe', True, False), ('tekken', True, False), ('dbrx', False, False), ('qwen2', False, True)])
def test_a_word_that_no_merges_make(rule, whole_word, composed, tmp_path):
  """A word that is a token is taken whole by some rules; one normalises accents."""
  fields = make_gguf.vocabulary(DATA / 'checkpoints' / 'llama', 320) | {'tokenizer.ggml.pre': rule}
  fields['tokenizer.ggml.tokens'][319], fields['tokenizer.ggml.token_type'][319] = 'qqxx', make_gguf.TYPES['NORMAL']
  made = gguf_vocabulary.tokenizer(gguf_vocabulary.read(tmp_path, 'llama', fields))
  assert made.encode('qqxx', add_special_tokens=False).tokens == (['qqxx'] if whole_word else list('qqxx'))
  both = [made.encode(x, add_special_tokens=False).ids for x in ('caf\u00e9', 'cafe\u0301')]
  assert (both[0] == both[1]) == composed


def spm(tokens: list[str], kinds: list[int], scores: list[float], **more):
  return {f'tokenizer.ggml.{key}': x for key, x in {
      'model': 'llama', 'tokens': ['<unk>', '<s>', '</s>', *tokens], 'token_type': [2, 3, 3, *kinds],
      'scores': [0.0] * 3 + scores, **more}.items()}


def read_spm(text: str, *args, **more) -> list[str]:
  vocabulary = gguf_vocabulary.read(pathlib.Path('a.gguf'), more.pop('architecture', 'llama'), spm(*args, **more))
  return gguf_vocabulary.tokenizer(vocabulary).encode(text).tokens


def test_merges_of_sentencepiece_follow_scores():
  tokens, kinds = ['▁', 'a', 'b', 'ab', '▁a', 'aa'], [1] * 6
  assert read_spm('ab', tokens, kinds, [-9.0, -9.0, -9.0, -1.0, -2.0, -3.0]) == ['<s>', '▁', 'ab']
  assert read_spm('ab', tokens, kinds, [-9.0, -9.0, -9.0, -2.0, -1.0, -3.0]) == ['<s>', '▁a', 'b']
  scores = [-9.0, -9.0, -9.0, -2.0, -1.0, -3.0]
  assert read_spm('ab', tokens, kinds, scores, add_space_prefix=False, add_bos_token=False) == ['ab']


def test_runs_of_blanks_of_gemma():
  """The converter spells them with blanks and says that they come last; in the published file they come first."""
  tokens = ['▁', 'a', '▁a', '  ', '   ']
  kinds, scores = [1, 1, 1, 4, 4], [-3.0, -2.0, -1.0, -1000.0, -1000.0]
  assert read_spm('a  a     a', tokens, kinds, scores, add_space_prefix=False) == [
      '<s>', 'a', '▁▁', 'a', '▁▁▁', '▁▁', 'a']


def test_tokens_that_end_a_completion(tmp_path):
  """Those of fields, and those of names that llama.cpp knows, of whatever type."""
  gemma = DATA / 'checkpoints' / 'gemma3'
  want = json.loads((gemma / 'expected.json').read_text())['stop_ids']
  found = vocabulary_file(tmp_path / 'a.gguf', gemma, architecture='gemma3')
  assert len(want) == 2 and found.generation_config == {'eos_token_id': want}
  tokens = ['a', '<|im_end|>', '<|fin|>', '<|end|>']
  vocabulary = gguf_vocabulary.read(pathlib.Path('a.gguf'), 'llama', spm(
      tokens, [1, 1, 3, 4], [-1.0] * 4, eot_token_id=5, eom_token_id=3))
  assert vocabulary.ends == (2, 3, 4, 5, 6)
  assert gguf_vocabulary.tokenizer(vocabulary).encode('<|im_end|>', add_special_tokens=False).ids == [4]


def test_control_tokens_that_are_said_to_be_normal():
  """Those that the template writes are read as one token, if no merge makes them."""
  fields = spm(['<', 'b', '>', 'a', '<turn>', '<other>', '<b', '<b>'], [1] * 8, [-1.0] * 6 + [-2.0, -3.0],
               add_space_prefix=False, add_bos_token=False)
  found = {}
  for template in ('', '<turn>{{ a }}<b>'):
    made = gguf_vocabulary.tokenizer(gguf_vocabulary.read(
        pathlib.Path('a.gguf'), 'llama', fields | {'tokenizer.chat_template': template}))
    special = {x.content for x in made.get_added_tokens_decoder().values() if x.special}
    found[template] = special - {'<unk>', '<s>', '</s>'}, '<turn>' in made.encode('a<turn>').tokens
    assert made.encode('a<b>').tokens == ['a', '<b>']
  assert found == {'': (set(), False), '<turn>{{ a }}<b>': ({'<turn>'}, True)}


def test_ids_that_a_file_of_sentencepiece_does_not_say():
  """Of Gemma other ids than of Llama; without an unknown token there is none."""
  read = lambda tokens: gguf_vocabulary.read(pathlib.Path('a.gguf'), 'llama', spm([], [], []) | {
      'tokenizer.ggml.tokens': tokens, 'tokenizer.ggml.token_type': [3] * 3 + [1], 'tokenizer.ggml.scores': [-1.0] * 4})
  assert read(['<unk>', '<s>', '</s>', 'a']).special == {'bos': 1, 'eos': 2, 'unknown': 0}
  gemma = read(['<pad>', '<eos>', '<bos>', 'a'])
  assert gemma.special == {'bos': 2, 'eos': 1} and gguf_vocabulary.tokenizer(gemma).encode('').ids == [2]
  with pytest.raises(ValueError, match='texts begin with BOS, but the field tokenizer.ggml.bos_token_id is missing'):
    read(['<pad>', '<end>', '<begin>', 'a'])


def test_a_chat_template_by_name():
  make = lambda **more: gguf_vocabulary.read(pathlib.Path('a.gguf'), 'llama', spm([], [], []) | more).template
  named = {'tokenizer.chat_template.tool_use': 'tools'}
  assert make() is None
  assert make(**named) == [{'name': 'tool_use', 'template': 'tools'}]
  assert make(**named, **{'tokenizer.chat_template': 'chat'}) == 'chat'


@pytest.mark.parametrize('fields, error', [
    ({'tokenizer.ggml.token_type': None}, 'lacks the field tokenizer.ggml.token_type'),
    ({'tokenizer.ggml.merges': None}, 'lacks the field tokenizer.ggml.merges'),
    ({'tokenizer.ggml.merges': ['a']}, r"merges\[0\]='a' is not two tokens"),
    ({'tokenizer.ggml.merges': ['a b', 'Ġ a b']}, r"merges\[0\]='a b' is not two tokens whose union is a token"),
    ({'tokenizer.ggml.tokens': 'abc'}, "tokenizer.ggml.tokens holds 'abc'; it is to be a list of strs"),
    ({'tokenizer.ggml.tokens': 7}, 'tokenizer.ggml.tokens holds 7'),
    ({'tokenizer.ggml.token_type': [1.5]}, 'tokenizer.ggml.token_type holds 1.5'),
    ({'tokenizer.ggml.token_type': [1]}, 'token_type has 1 elements for 320 tokens'),
    ({'tokenizer.ggml.add_bos_token': 'false'}, "add_bos_token='false' is not true or false"),
    ({'tokenizer.ggml.add_bos_token': 0}, 'add_bos_token=0 is not true or false'),
    ({'tokenizer.ggml.add_space_prefix': 'false'}, "add_space_prefix='false' is not true or false"),
    ({'tokenizer.ggml.eos_token_id': 320}, 'eos_token_id=320 is not an id below 320'),
    ({'tokenizer.ggml.eos_token_id': '</s>'}, "eos_token_id='</s>' is not an id below 320"),
    ({'tokenizer.ggml.eot_token_id': 999}, 'eot_token_id=999 is not an id below 320'),
    ({'tokenizer.ggml.bos_token_id': None, 'tokenizer.ggml.add_bos_token': True}, 'bos_token_id is missing'),
    ({'tokenizer.ggml.token_type': [5] * 320}, 'no tokenizer can be made of its fields: .* out of vocabulary; convert'),
    ({'tokenizer.chat_template': 3}, 'tokenizer.chat_template is no text, but 3')])
def test_a_broken_vocabulary_is_refused(fields, error, tmp_path):
  fields = {'tokenizer.ggml.pre': 'smollm'} | fields
  file = vocabulary_file(tmp_path / 'a.gguf', DATA / 'checkpoints' / 'llama', fields)
  with pytest.raises(ValueError, match=f'a.gguf.*{error}'):
    _ = file.tokenizer_json


def test_tokens_that_stand_twice(tmp_path):
  """Unused ones do not count: padding of a vocabulary."""
  read = lambda kinds: gguf_vocabulary.read(pathlib.Path('a.gguf'), 'llama', spm(
      ['a', '[PAD]', '[PAD]'], kinds, [-1.0] * 3))
  assert gguf_vocabulary.tokenizer(read([1, 1, 5])).token_to_id('[PAD]') == 4
  with pytest.raises(ValueError, match=r"tokenizer.ggml.tokens holds '\[PAD\]' twice, as 4 and 5"):
    read([1, 1, 1])


def test_tokens_that_are_too_long_to_be_split(monkeypatch):
  read_spm('ab', ['a', 'b', 'ab'], [1] * 3, [-1.0, -1.0, -2.0])
  monkeypatch.setattr(gguf_vocabulary, '_MOST_SPLITS', 8)
  with pytest.raises(ValueError, match='tokenizer.ggml.tokens holds tokens of up to .* characters, which have too'):
    read_spm('ab', ['a', 'b', 'ab', 'abab'], [1] * 4, [-1.0, -1.0, -2.0, -3.0])


def test_scores_that_say_no_order():
  with pytest.raises(ValueError, match='tokenizer.ggml.scores holds nan, which orders no merges'):
    read_spm('ab', ['a', 'b', 'ab'], [1] * 3, [-1.0, -1.0, float('nan')])
  with pytest.raises(ValueError, match='all of tokenizer.ggml.scores are -1000.0, so the order of merges is lost'):
    read_spm('ab', ['a', 'b', 'ab', 'ba', 'aa'], [1] * 5, [-1000.0] * 5)
