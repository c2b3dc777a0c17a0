"""A published tokenizer within limits: what it may do to a text, and for how long.

A tokenizer.json is a stranger's program: normalizers that double a text thirty times, word rules that go back without
end. The library `tokenizers` runs it in this process, panics where a rule gives up, and aborts the process where
memory ends. So what bounds its output is read from the file before it is loaded (`growth`), and texts are encoded and
decoded in a thread that is waited for SECONDS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import base64
import binascii
import collections
import contextlib
import json
import math
import os
import queue
import threading
from typing import Any

SECONDS = 60.0  # for a text; of a usual tokenizer a million characters take one
_LOOKS = 20  # within these seconds
MOST_CHARACTERS = 2 ** 22  # of a text
# Bytes that each part of a pipeline may make of one. Of a normalizer and a word rule the text's length decides too.
_MOST_GROWTH = {'normalizer': 2 ** 16, 'pre_tokenizer': 2 ** 16, 'post_processor': 2 ** 6, 'decoder': 2 ** 6}
_MOST_BYTES = 2 ** 31  # that it may make of a text
_MOST_ID = 2 ** 24  # of a token; the largest vocabularies have 2 ** 18
# Bytes that a step makes of one at the most, where no field says it. Unicode's normal forms are those of UTF-8.
_GROWTH = {'ByteLevel': 3, 'NFC': 3, 'NFD': 3, 'NFKC': 11, 'NFKD': 11, 'Lowercase': 2, 'BertNormalizer': 6, 'CTC': 2,
           'BPEDecoder': 2, 'WordPiece': 2}
# Where the steps of a sequence are listed.
_INNER = ('normalizers', 'pretokenizers', 'decoders', 'processors')


def read(tokenizer_json: str) -> Any:
  """The tokenizer of a tokenizer.json, which neither truncates nor pads nor drops merges.

  Raises ValueError for a file that is none, or that may make too much of a text.
  """
  import tokenizers  # a policy from scratch does not need it
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')  # one text has no use of threads, and forks complain of them
  try:
    check(json.loads(tokenizer_json))
    made = tokenizers.Tokenizer.from_str(tokenizer_json)
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # the library raises the bare class, and panics as a BaseException
    raise ValueError(f'the tokenizer cannot be read: {error}; take the tokenizer.json that was published, or '
                     f'upgrade the package tokenizers, which is {tokenizers.__version__} here') from error
  made.no_truncation()
  made.no_padding()
  if getattr(made.model, 'dropout', None):
    made.model.dropout = None
  return made


def check(of_json: Any) -> None:
  """Raises ValueError for the content of a tokenizer.json that may make too much of a text, or whose tokens share ids.
  """
  if not isinstance(of_json, dict) or not isinstance(of_json.get('model'), dict):
    raise ValueError(f'it holds no model')
  for name, limit in _MOST_GROWTH.items():
    if (found := growth(of_json.get(name))) > limit:
      raise ValueError(f'its {name} may make {found:.4g} bytes of one, above the limit of {limit}')
  vocabulary = of_json['model'].get('vocab')
  if isinstance(vocabulary, Mapping):
    _check_ids(vocabulary)
  if isinstance(added := of_json.get('added_tokens'), list):
    _check_added(added)


def _check_ids(vocabulary: Mapping[str, Any]) -> None:
  ids = vocabulary.values()
  if wrong := next((x for x in ids if type(x) is not int or not 0 <= x < _MOST_ID), None):
    raise ValueError(f'a token of its vocabulary has the id {wrong!r}, not a number below {_MOST_ID}')
  if len(set(ids)) < len(vocabulary):
    twice, _ = collections.Counter(ids).most_common(1)[0]
    names = [token for token, i in vocabulary.items() if i == twice]
    raise ValueError(f'its tokens {names[:3]} have the same id, {twice}')


def _check_added(added: list[Any]) -> None:
  """Of tokens beside the vocabulary. Other faults of their form the library names."""
  first: dict[int, str] = {}
  for token in added:
    i, text = (token.get('id'), token.get('content')) if isinstance(token, dict) else (None, None)
    if type(i) is not int or not isinstance(text, str):
      continue
    if not 0 <= i < _MOST_ID:
      raise ValueError(f'the added token {text!r} has the id {i}, not a number below {_MOST_ID}')
    if first.setdefault(i, text) != text:
      raise ValueError(f'the added tokens {first[i]!r} and {text!r} have the same id, {i}')


def growth(step: Any) -> float:
  """Bytes that a step of a pipeline, as tokenizer.json describes it, makes of one at the most; inf above any limit."""
  if not isinstance(step, Mapping):
    return 1.0
  inner = [x for name in _INNER if isinstance(step.get(name), list) for x in step[name]]
  if inner:
    found = 1.0
    for x in inner:
      found *= growth(x)
    return min(found, math.inf)
  kind, size = step.get('type'), lambda name: len(str(step.get(name, '')).encode(errors='replace'))
  if kind == 'Replace':
    pattern = step.get('pattern')
    text = pattern.get('String') if isinstance(pattern, Mapping) else None
    return max(1.0, size('content') / len(text.encode(errors='replace'))) if isinstance(text, str) and text else (
        1.0 + size('content'))
  if kind == 'Prepend':
    return 1.0 + size('prepend')
  if kind == 'Metaspace':
    return 1.0 + size('replacement')
  if kind == 'Precompiled':
    return _of_charsmap(step.get('precompiled_charsmap'))
  if kind == 'TemplateProcessing':
    pieces = [x for x in step.get('single') or () if isinstance(x, Mapping) and 'Sequence' in x]
    return float(max(1, len(pieces)))
  return float(_GROWTH.get(kind, 1))


def _of_charsmap(charsmap: Any) -> float:
  """Of a table of sentencepiece: the longest text that it writes. It has the size of a trie, the trie, and texts with
  a 0 after each."""
  try:
    table = base64.b64decode(charsmap or b'', validate=True)
  except (binascii.Error, TypeError, ValueError):
    return 1.0  # the library says what is wrong
  texts = table[4 + int.from_bytes(table[:4], 'little'):]
  return float(max(1, max(map(len, texts.split(b'\0')), default=1)))


def text_growth(tokenizer_json: str) -> float:
  """Bytes that a tokenizer makes of one of a text, at the most, before it looks for tokens."""
  of_json = json.loads(tokenizer_json)
  return growth(of_json.get('normalizer')) * growth(of_json.get('pre_tokenizer'))


def encode(tokenizer: Any, text: str, of_one: float = 1.0) -> list[int]:
  """The tokens of a text, without those that a post-processor adds. of_one: text_growth.

  Raises ValueError for a text that is too long, or that the tokenizer cannot read in time.
  """
  if len(text) > (most := min(MOST_CHARACTERS, _MOST_BYTES / of_one)):
    raise ValueError(f'it has {len(text)} characters, above the limit of {most:.0f}')
  encoded, = within(lambda: tokenizer.encode_batch([text], add_special_tokens=False))
  return encoded.ids


def decode(tokenizer: Any, tokens: Iterable[int]) -> str:
  """The text of tokens, special ones included. Raises ValueError where the tokenizer cannot tell it in time."""
  tokens = list(tokens)
  found, = within(lambda: tokenizer.decode_batch([tokens], skip_special_tokens=False))
  return found


class _Thread:
  """A thread that calls functions, one after the other."""

  def __init__(self):
    self.calls, self.results = queue.SimpleQueue(), queue.SimpleQueue()
    self.owner = os.getpid()  # a fork has no threads
    threading.Thread(target=self._serve, name='tokenizer', daemon=True).start()

  def _serve(self) -> None:
    while (function := self.calls.get()) is not None:
      try:
        self.results.put((function(), None))
      except BaseException as error:  # a panic of the library is no Exception
        self.results.put((None, error))


_threads: list[_Thread] = []  # those that wait for a call


def within(function: Callable[[], Any], seconds: float | None = None) -> Any:
  """What a function of the library returns, which lets other threads run meanwhile.

  Raises ValueError for whatever it raises, and where it takes longer than SECONDS: its thread is left alone, and ends
  with the process.
  """
  seconds = SECONDS if seconds is None else seconds
  try:
    thread = _threads.pop()
  except IndexError:
    thread = None
  if thread is None or thread.owner != os.getpid():
    thread = _Thread()
  thread.calls.put(function)
  for _ in range(_LOOKS):  # so that a program that is stopped for an hour loses one of them
    with contextlib.suppress(queue.Empty):
      found, error = thread.results.get(timeout=seconds / _LOOKS)
      break
  else:
    raise ValueError(f'the tokenizer takes more than {seconds:g} s for a text')
  _threads.append(thread)
  if error is not None:
    raise ValueError(str(error) or type(error).__name__) from error
  return found
