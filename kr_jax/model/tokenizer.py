"""Text <-> tokens: one character a token, or by the tokenizer of a published checkpoint.

Both have `prompt`, the tokens that the policy reads of a task's text; `encode`; `decode`, up to the first stop
token; `stop_ids`; and `vocab_size`. Control tokens of a prompt come from the chat template alone.
"""

from __future__ import annotations

from collections.abc import Iterable
import functools
import itertools
import json
import os
import pathlib
import re
from typing import Any

from kr_jax.model import pretrained
from kr_jax.types import PAD

STOP = 1  # ends a completion of Characters


class Characters:
  """A tokenizer over a fixed alphabet: token 0 pads, token 1 ends a completion."""

  stop_ids = (STOP,)

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
        raise ValueError(f'{text!r} holds {character!r}, which is not in the alphabet {self.alphabet!r}')
    return tuple(self._token[character] for character in text)

  prompt = encode

  def decode(self, tokens: Iterable[int]) -> str:
    """The text up to the first stop token; padding is dropped."""
    kept = itertools.takewhile(lambda token: token != STOP, tokens)
    return ''.join(self.alphabet[int(token) - 2] for token in kept if token != PAD)


class Subwords:
  """The tokenizer of a published checkpoint.

  Args:
    path: as pretrained.find takes it.
    chat: whether prompts go through the chat template, where there is one; else a prompt is the bare text.
    system: the system message of a chat; '': the template's own, or none.
    thinking: `enable_thinking` of templates that know it (Qwen3).

  Raises:
    ValueError: files are missing or broken, the template fails or alters texts, or `system` has no template.
  """

  def __init__(self, path: str | os.PathLike, *, chat: bool = True, system: str = '', thinking: bool = True):
    import tokenizers  # a policy from scratch does not need it
    self._files = pretrained.read(path)
    name, stored = self._files.path, self._files.tokenizer_json
    try:
      self._published = tokenizers.Tokenizer.from_str(stored)
    except Exception as error:  # tokenizers raises the bare class
      raise ValueError(f'{name}: the tokenizer cannot be read: {error}') from error
    of_json = json.loads(stored)
    added = of_json.get('added_tokens') or []
    # Added tokens of blanks alone (Gemma) are text.
    self._control = {x['content']: x['id'] for x in added if x['special'] or x['content'].strip(' \n\t\u2581')}
    of_json['added_tokens'] = [x for x in added if x['content'] not in self._control]
    self._plain = tokenizers.Tokenizer.from_str(json.dumps(of_json))
    self._any_control = re.compile(
        '(' + '|'.join(map(re.escape, sorted(self._control, key=len, reverse=True)) or ['(?!)']) + ')')
    self._first = tuple(self._published.encode('', add_special_tokens=True).ids)  # BOS, where there is one
    self.vocab_size = self._files.config['vocab_size']
    self.stop_ids = self._stops()
    self._template = self._chat_template() if chat else None
    self._thinking = thinking
    self._system = [{'role': 'system', 'content': system}] if system else []
    if system and self._template is None:
      raise ValueError(f'tasks.system={system!r} needs a chat template, which {name} does not have or '
                       'tasks.chat=False leaves out; put the text in tasks.template')
    self.prompt('1 + 1 =')  # a template that fails or alters texts fails here

  def _stops(self) -> tuple[int, ...]:
    """The end token of the tokenizer, then the stop tokens of the checkpoint's generation_config."""
    token = _text(self._files.tokenizer_config.get('eos_token'))
    ends = [] if token is None else [self._published.token_to_id(token)]
    of_config = self._files.config.get('eos_token_id')  # the older place, read where generation_config has none
    found = self._files.generation_config.get('eos_token_id', of_config)
    ends += found if isinstance(found, list) else [] if found is None else [found]
    if not ends or not all(isinstance(end, int) and 0 <= end < self.vocab_size for end in ends):
      raise ValueError(f'{self._files.path}: the stop tokens {ends} are not ids below '
                       f'vocab_size={self.vocab_size}; set eos_token_id in generation_config.json')
    return tuple(dict.fromkeys(ends))

  def _chat_template(self) -> Any:
    """The template, compiled in a sandbox; None where there is none."""
    from jinja2 import sandbox
    template = self._files.tokenizer_config.get('chat_template')
    if isinstance(template, list):
      template = {x['name']: x['template'] for x in template}.get('default')
    if not template:
      return None
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    environment.filters['tojson'] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    environment.globals['raise_exception'] = _refuse
    # No strftime_now: a prompt with the day would differ after a resume.
    try:
      return environment.from_string(template)
    except Exception as error:
      raise ValueError(f'{self._files.path}: the chat template is broken: {error}') from error

  def _rendered(self, text: str) -> str:
    tokens = {name: _text(x) for name, x in self._files.tokenizer_config.items()
              if name.endswith('_token') and x is not None}
    try:
      return self._template.render(
          messages=[*self._system, {'role': 'user', 'content': text}], add_generation_prompt=True, tools=None,
          enable_thinking=self._thinking, **tokens)
    except Exception as error:
      raise ValueError(f'{self._files.path}: the chat template fails: {error}') from error

  @functools.cached_property
  def _around(self) -> tuple[str, str]:
    """The texts that the template writes before and after a message."""
    mark = '\ue000message\ue001'
    parts = self._rendered(mark).split(mark)
    if len(parts) != 2:
      raise ValueError(f'{self._files.path}: the chat template writes a message {len(parts) - 1} times')
    return parts[0], parts[1]

  def encode(self, text: str) -> tuple[int, ...]:
    """Tokens of a text; a spelt control token is encoded as text."""
    return tuple(self._plain.encode(text, add_special_tokens=False).ids)

  def prompt(self, text: str) -> tuple[int, ...]:
    """Tokens that the policy reads of a task: a chat in which the user says this text; without a chat template
    the text, after BOS where the checkpoint has one. Raises ValueError where the template alters the text.
    """
    if self._template is None:
      return (*self._first, *self.encode(text))
    (before, after), rendered = self._around, self._rendered(text)
    message = rendered.removeprefix(before).removesuffix(after)
    if before + message + after != rendered or message not in text:
      raise ValueError(f'{self._files.path}: the chat template alters the text {text!r}')
    # Control tokens have odd indices. A text between two of them is encoded whole: a token may begin in the
    # template and end in the message.
    first, last = self._any_control.split(before), self._any_control.split(after)
    pieces = [*first[:-1], first[-1] + message + last[0], *last[1:]]
    return tuple(token for i, piece in enumerate(pieces)
                 for token in ([self._control[piece]] if i % 2 else self.encode(piece)))

  def decode(self, tokens: Iterable[int]) -> str:
    """The text up to the first stop token; other special tokens are dropped."""
    kept = itertools.takewhile(lambda token: token not in self.stop_ids, map(int, tokens))
    return self._published.decode(list(kept), skip_special_tokens=True)

  def save(self, directory: str | os.PathLike) -> None:
    """Writes the files of the tokenizer."""
    self._files.save_text(pathlib.Path(directory))


def _text(token: str | dict[str, Any] | None) -> str | None:
  """The text of a token of tokenizer_config.json, where it is a text or an object."""
  return token['content'] if isinstance(token, dict) else token


def _refuse(message: str) -> None:
  raise ValueError(message)
