"""Published tokenizers that make too much of a text, take too long, or panic."""

import base64
import json
import queue
import threading

import pytest
import tokenizers
from tokenizers import models

from kr_jax.model import pipeline

DOUBLE = {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'aa'}
WORDS = {'type': 'Split', 'pattern': {'Regex': '(a+)+$'}, 'behavior': 'Isolated', 'invert': False}
BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
TWICE = {'type': 'TemplateProcessing', 'single': [{'Sequence': {'id': 'A', 'type_id': 0}}] * 2, 'pair': [],
         'special_tokens': {}}


def file(vocab=None, **fields) -> str:
  """A tokenizer.json of words."""
  made = tokenizers.Tokenizer(models.WordLevel({'a': 0, 'b': 1, '?': 2}, unk_token='?'))
  content = json.loads(made.to_str()) | fields
  content['model']['vocab'] = content['model']['vocab'] if vocab is None else vocab
  return json.dumps(content)


def sequence(kind: str, steps: list) -> dict:
  return {'type': 'Sequence', kind: steps}


def charsmap(*texts: bytes) -> dict:
  return {'type': 'Precompiled', 'precompiled_charsmap': base64.b64encode(
      (8).to_bytes(4, 'little') + bytes(8) + b'\0'.join(texts) + b'\0').decode()}


@pytest.mark.parametrize('step, bytes_', [
    (None, 1), ({'type': 'NFKC'}, 11), (DOUBLE, 2), (DOUBLE | {'content': ''}, 1),
    (DOUBLE | {'pattern': {'Regex': 'x*'}, 'content': 'abc'}, 4),  # it may stand between all characters
    (DOUBLE | {'pattern': {'String': ' '}, 'content': '\u2581'}, 3), ({'type': 'Prepend', 'prepend': '\u2581'}, 4),
    (sequence('normalizers', [DOUBLE] * 10), 1024), (sequence('pretokenizers', [BYTES, BYTES]), 9),
    (sequence('processors', [TWICE] * 3), 8), (sequence('decoders', [sequence('decoders', [DOUBLE] * 2)] * 2), 16),
    (charsmap(b'abc', b'abcdefgh', b''), 8), ({'type': 'Precompiled', 'precompiled_charsmap': '!'}, 1)])
def test_bytes_that_a_step_makes_of_one(step, bytes_):
  assert pipeline.growth(step) == bytes_


@pytest.mark.parametrize('fields, said', [
    ({'normalizer': sequence('normalizers', [DOUBLE] * 30)}, 'its normalizer may make 1.074e.09 bytes of one'),
    ({'normalizer': sequence('normalizers', [DOUBLE] * 3000)}, 'its normalizer may make inf bytes of one'),
    ({'pre_tokenizer': sequence('pretokenizers', [BYTES] * 30)}, 'its pre_tokenizer may make 2.059e.14 bytes'),
    ({'post_processor': sequence('processors', [TWICE] * 30)}, 'its post_processor may make'),
    ({'decoder': sequence('decoders', [DOUBLE] * 30)}, 'its decoder may make'),
    ({'model': None, 'vocab': {}}, 'it holds no model'), ({'model': 5, 'vocab': {}}, 'it holds no model'),
    ({'vocab': {'a': 0, 'b': 0, '?': 1}}, r"its tokens \['a', 'b'\] have the same id, 0"),
    ({'vocab': {'a': 2 ** 31, '?': 1}}, 'has the id 2147483648, not a number below'),
    ({'vocab': {'a': -1, '?': 1}}, 'has the id -1'), ({'vocab': {'a': True, '?': 2}}, 'has the id True'),
    ({'added_tokens': [{'id': 2 ** 31, 'content': '<s>'}]}, "the added token '<s>' has the id 2147483648"),
    ({'added_tokens': [{'id': 7, 'content': '<s>'}, {'id': 7, 'content': '</s>'}]},
     "the added tokens '<s>' and '</s>' have the same id, 7")])
def test_files_that_are_refused_before_they_are_loaded(fields, said):
  with pytest.raises(ValueError, match=f'^the tokenizer cannot be read: .*{said}.*; take the tokenizer.json that was'):
    if fields.get('model', 0) != 0:
      pipeline.read(json.dumps(json.loads(file()) | {'model': fields['model']}))
    elif 'model' in fields:
      pipeline.read(json.dumps(json.loads(file()) | {'model': None}))
    pipeline.read(file(**fields))


@pytest.mark.parametrize('text', ['', '{', '[]', '5', '[' * 10 ** 6, 'null', '{"model": {"type": "x"}}'])
def test_what_is_no_tokenizer(text):
  with pytest.raises(ValueError, match='^the tokenizer cannot be read: '):
    pipeline.read(text)


def test_padding_and_truncation_are_left_out():
  padding = {'strategy': {'Fixed': 10 ** 9}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 0,
             'pad_type_id': 0, 'pad_token': 'a'}
  truncation = {'direction': 'Right', 'max_length': 1, 'strategy': 'LongestFirst', 'stride': 10 ** 9}
  made = pipeline.read(file(padding=padding, truncation=truncation, pre_tokenizer={'type': 'WhitespaceSplit'}))
  assert pipeline.encode(made, 'a b a') == [0, 1, 0] and pipeline.decode(made, [0, 1]) == 'a b'


@pytest.mark.slow  # the library gives up after a second
def test_a_word_rule_without_end_is_an_error():
  """The library panics, which no `except Exception` sees."""
  with pytest.raises(ValueError, match='retry-limit-in-match over'):
    pipeline.encode(pipeline.read(file(pre_tokenizer=WORDS)), 'a' * 30 + 'b')


def test_a_text_has_limits():
  made = pipeline.read(file())
  with pytest.raises(ValueError, match='it has 4194305 characters, above the limit of 4194304'):
    pipeline.encode(made, 'a' * (pipeline.MOST_CHARACTERS + 1))
  with pytest.raises(ValueError, match='it has 2049 characters, above the limit of 2048'):
    pipeline.encode(made, 'a' * 2049, 2.0 ** 20)
  growing = file(normalizer=sequence('normalizers', [DOUBLE] * 3), pre_tokenizer=BYTES)
  assert pipeline.text_growth(growing) == 24


def test_what_takes_too_long_is_left_alone():
  """The next call has another thread."""
  over = threading.Event()
  with pytest.raises(ValueError, match=r'the tokenizer takes more than 0\.01 s for a text'):
    pipeline.within(over.wait, 0.01)
  assert pipeline.within(lambda: 7) == 7
  over.set()


def test_a_program_that_was_stopped_meanwhile_goes_on(monkeypatch):
  """All the time of a wait is over when it is woken, and nothing was computed."""
  class Stopped(queue.SimpleQueue):
    stops = 1

    def get(self, block=True, timeout=None):
      if timeout is not None and self.stops:
        self.stops = 0
        raise queue.Empty
      return super().get(block, timeout)

  monkeypatch.setattr(pipeline.queue, 'SimpleQueue', Stopped)
  monkeypatch.setattr(pipeline, '_threads', [])
  assert pipeline.within(lambda: 7) == 7


def test_whatever_is_raised_is_a_value_error():
  def panics():
    raise type('PanicException', (BaseException,), {})('in Rust')

  with pytest.raises(ValueError, match='^in Rust$'):
    pipeline.within(panics)
  with pytest.raises(ValueError, match='^KeyError$'):
    pipeline.within(lambda: (_ for _ in ()).throw(KeyError()))
