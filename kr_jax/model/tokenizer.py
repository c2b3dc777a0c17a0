"""Text <-> tokens: one character a token, or by the tokenizer of a published checkpoint.

Both have `prompt`, the tokens that the policy reads of a task's text; `encode`; `decode`, up to the first stop
token; `stop_ids`; `vocab_size`; and `save`. Control tokens of a prompt come from the chat template alone.

A rendered chat is encoded whole by the published tokenizer. Where its text spells a control token, a twin encodes
it, in which each control token has another name, a character of NAMES: the template's control tokens are written by
these names, and the text's are text. All else of the twin is as published.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
import functools
import itertools
import json
import os
import pathlib
import re
import sys
from typing import Any, NamedTuple

from kr_jax.model import chat as chat_lib
from kr_jax.model import pipeline
from kr_jax.model import pretrained
from kr_jax.types import PAD

STOP = 1  # ends a completion of Characters
NAMES = 0x100000  # the first character of Unicode's last plane, which is for private use
_MOST_CONTROL = 0xfffd  # control tokens, each with a character of this plane

_NAMED = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
_NEUTRAL = '.'  # a text of no control token
_MARK = '\ue000message\ue001'  # one that a template cannot write


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
        raise ValueError(f'{_shown(text)} holds {character!r}, which is not in the alphabet {self.alphabet!r}')
    return tuple(self._token[character] for character in text)

  prompt = encode

  def decode(self, tokens: Iterable[int]) -> str:
    """The text up to the first stop token; padding is dropped."""
    kept = itertools.takewhile(lambda token: token != STOP, tokens)
    return ''.join(self.alphabet[int(token) - 2] for token in kept if token != PAD)

  def save(self, directory: str | os.PathLike) -> None:
    """Writes the files that `Subwords` and transformers read the same tokens from: a vocabulary of whole
    characters, without a chat template. A text with a character outside the alphabet is an error there as well.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    # A text must not spell these two: a character outside the alphabet stands in them where it has to.
    other = next(x for x in map(chr, itertools.count(0xe000)) if x not in self.alphabet)
    pad, stop = (name if set(name) - set(self.alphabet) else name + other for name in ('<pad>', '</s>'))
    made = tokenizers.Tokenizer(models.WordLevel({pad: PAD, stop: STOP, **self._token}, unk_token=other))
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
    made.decoder = decoders.Fuse()
    made.add_special_tokens([pad, stop])
    directory = pathlib.Path(directory)
    made.save(str(directory / 'tokenizer.json'))
    for name, fields in (
        ('tokenizer_config', {'tokenizer_class': 'PreTrainedTokenizerFast', 'pad_token': pad, 'eos_token': stop,
                              'clean_up_tokenization_spaces': False}),
        ('generation_config', {'pad_token_id': PAD, 'eos_token_id': STOP})):
      (directory / f'{name}.json').write_text(json.dumps(fields, indent=2), encoding='utf-8')


class _Place(NamedTuple):
  """Where a text stands: what is before and after it, and the control tokens of these."""

  before: str = ''
  after: str = ''
  control: tuple[int, ...] = ()


class Subwords:
  """The tokenizer of a published checkpoint.

  Control tokens are the special ones, whichever of the checkpoint's files names them; and of the other added tokens
  those that are spelt '<|NAME|>', or in brackets, such as '<think>', where the chat template spells them too. A
  special token of one character to which the model gives this token anyhow ('!', named to pad with) is text.

  Args:
    path: as pretrained.find takes it.
    chat: whether prompts go through the chat template, where there is one; else a prompt is the bare text.
    system: the system message of a chat; '': the template's own, or none.
    thinking: `enable_thinking` of templates that know it (Qwen3); None: the template's own default.

  Raises:
    ValueError: files are missing or broken, the template fails or alters texts, the template or a stop token has
      an id that the vocabulary does not have, or `system` has no template.
  """

  def __init__(self, path: str | os.PathLike, *, chat: bool = True, system: str = '',
               thinking: bool | None = None):
    self._files = pretrained.read(path)
    self._name, config = self._files.path, self._files.tokenizer_config
    self._published, self._named = self._in_file(_read, self._files)
    self._growth = pipeline.text_growth(self._files.tokenizer_json)
    self.vocab_size = self._in_file(_vocab_size, self._files)
    template = self._in_file(chat_lib.choose, config.get('chat_template')) if chat else None
    self._added = {token.content: i for i, token in self._published.get_added_tokens_decoder().items()}
    self._control = _control_tokens(self._published, self._named.values(), str(config.get('chat_template') or ''))
    self._any_control = _any_of(self._control)
    unknown = _unknown(self._files.tokenizer_json)
    self._control_ids = {i for token, i in self._control.items() if token != unknown}
    self._template = self._in_file(chat_lib.read, template) if template else None
    self._thinking = thinking
    self._system = [{'role': 'system', 'content': system}] if system else []
    if system and self._template is None:
      raise ValueError(f'tasks.system={system!r} needs a chat template, which {self._name} does not have or '
                       'tasks.chat=False leaves out; put the text in tasks.template')
    if thinking is not None and 'enable_thinking' not in (template or ''):
      print(f'{self._name}: tasks.thinking={thinking} changes nothing: '
            f'{"the chat template knows no enable_thinking" if template else "no chat template is used"}',
            file=sys.stderr)
    self._first = self._before_a_text()
    self._chat = self._place() if template else _Place()
    self.stop_ids = self._stops()
    if template:
      self.prompt('1 + 1 =')  # a template that alters texts, or writes unknown tokens, fails here

  def _in_file(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a function gives, whose errors are the checkpoint's."""
    try:
      return function(*args, **options)
    except ValueError as error:
      raise ValueError(f'{self._name}: {error}') from error

  def _before_a_text(self) -> tuple[int, ...]:
    """The special tokens that the published pipeline writes before a text: BOS, or nothing."""
    import tokenizers
    from tokenizers import models
    word = tokenizers.Tokenizer(models.WordLevel({'word': 0}, unk_token='word')).encode('word')
    encoded = self._in_file(pipeline.within, lambda: self._published.post_process(word))
    return tuple(i for i, _ in itertools.takewhile(lambda x: x[1], zip(encoded.ids, encoded.special_tokens_mask)))

  def _stops(self) -> tuple[int, ...]:
    """The end token of the tokenizer, the stop tokens of the checkpoint's generation_config, and the token that ends
    an assistant's message in the chat template.
    """
    found = self._files.generation_config.get('eos_token_id')
    if found is None:
      found = _of_config(self._files.config, 'eos_token_id', [])  # the older place
    ends = [self._published.token_to_id(self._named['eos_token'])] if 'eos_token' in self._named else []
    ends += [*(found if isinstance(found, list) else [found]), *self._turn_ends()]
    ends = list({repr(end): end for end in ends}.values())  # without what is there twice
    if not ends or not all(type(end) is int and 0 <= end < self.vocab_size for end in ends):  # True is no id
      tokens = [self._published.id_to_token(end) if type(end) is int and 0 <= end < 2 ** 31 else None for end in ends]
      raise ValueError(f'{self._name}: the stop tokens {str(ends)[:200]} (texts: {str(tokens)[:200]}) are not ids '
                       f'below vocab_size={self.vocab_size}; correct eos_token_id in generation_config.json or '
                       'eos_token in tokenizer_config.json')
    return tuple(ends)

  def _turn_ends(self) -> list[int]:
    """The control token that follows a message of an assistant; none where the template writes no such message."""
    if self._template is None:
      return []
    answer, question = {'role': 'assistant', 'content': _MARK}, {'role': 'user', 'content': _NEUTRAL}
    for more in ([answer], [answer, question]):  # some write it between messages alone
      try:
        _, mark, after = self._rendered(_NEUTRAL, *more, prompt=False).rpartition(_MARK)
      except ValueError:
        continue
      if mark and (found := self._any_control.match(after.lstrip())):
        return [self._control[found[0]]]
    return []

  def _rendered(self, text: str, *more: dict[str, str], prompt: bool = True, system: str = '') -> str:
    """A chat of a user's text and more messages; system: one to take instead of the system message."""
    messages = [*[x | ({'content': system} if system else {}) for x in self._system],
                {'role': 'user', 'content': text}, *more]
    return self._in_file(chat_lib.render, self._template, messages, self._named, thinking=self._thinking,
                         prompt=prompt)

  def _place(self) -> _Place:
    """What the template writes around a message."""
    parts = self._rendered(_MARK).split(_MARK)
    if len(parts) != 2:
      raise ValueError(f'{self._name}: the chat template writes a message {len(parts) - 1} times, and not once as it '
                       'is (one for images may want a list of parts); set tasks.chat=False, or change the template')
    before, after = parts
    if self._system and self._rendered(_NEUTRAL, system=_MARK) == self._rendered(_NEUTRAL):
      print(f'{self._name}: the chat template leaves out tasks.system={self._system[0]["content"]!r}; put the text in '
            'tasks.template', file=sys.stderr)
    return _Place(before, after, self._control_of(self._ids(f'{before}{_NEUTRAL}{after}')))

  def _ids(self, text: str) -> list[int]:
    try:
      return pipeline.encode(self._published, text, self._growth)
    except ValueError as error:
      raise ValueError(f'{self._name}: the tokenizer cannot read {_shown(text)}: {error}; change or leave out this '
                       'text') from error

  def _control_of(self, tokens: Iterable[int]) -> tuple[int, ...]:
    return tuple(token for token in tokens if token in self._control_ids)

  def _encode(self, text: str, place: _Place) -> tuple[int, ...]:
    """Tokens of a text in its place, of which no control token comes from the text."""
    tokens = self._ids(f'{place.before}{text}{place.after}')
    control, is_spelt = self._control_of(tokens), bool(self._any_control.search(text))
    if is_spelt or control != place.control:
      by_twin = self._encode_by_twin(text, place)
      # One of the template's may be text beside this text, as published: |end| that is to be a word of its own.
      if by_twin is None and (is_spelt or not _is_part(control, place.control)):
        raise ValueError(f'{self._name}: the text {_shown(text)} spells a control token that the tokenizer cannot '
                         'read as text; leave it out')
      tokens = tokens if by_twin is None else by_twin
    if tokens and max(tokens) >= self.vocab_size:
      raise ValueError(f'{self._name}: a prompt or text of {_shown(text)} needs the token '
                       f'{self._published.id_to_token(max(tokens))!r} with the id {max(tokens)}, which is not below '
                       f'vocab_size={self.vocab_size}: the checkpoint has no embedding of it; take the tokenizer that '
                       'these weights were trained with')
    return tuple(tokens)

  def _encode_by_twin(self, text: str, place: _Place) -> list[int] | None:
    """The tokens, of which the template's control tokens alone are control; None where the twin cannot do it."""
    twin, names = self._twin
    if any(name in text for name in names.values()):
      raise ValueError(f'the text {_shown(text)} spells a control token, and holds a character for private use above '
                       f'U+{NAMES:X}; leave out one of them')
    before, after = (self._any_added.sub(lambda found: names.get(found[0], found[0]), part)
                     for part in (place.before, place.after))
    encode = lambda message: pipeline.encode(twin, f'{before}{message}{after}', self._growth)
    tokens, as_published = encode(text), self._ids(f'{place.before}{_NEUTRAL}{place.after}')
    return tokens if encode(_NEUTRAL) == as_published and self._control_of(tokens) == place.control else None

  @functools.cached_property
  def _any_added(self) -> re.Pattern[str]:
    return _any_of(self._added)

  @functools.cached_property
  def _twin(self) -> tuple[Any, dict[str, str]]:
    """A tokenizer in which control tokens have other names, and these names."""
    if len(self._control) > _MOST_CONTROL:
      raise ValueError(f'{self._name}: it has {len(self._control)} control tokens, above the limit of {_MOST_CONTROL}')
    names = {token: chr(NAMES + i) for i, token in enumerate(self._control)}
    return _renamed(json.loads(self._published.to_str()), names), names

  def encode(self, text: str) -> tuple[int, ...]:
    """Tokens of a text; a spelt control token is encoded as text."""
    return self._encode(text, _Place())

  def prompt(self, text: str) -> tuple[int, ...]:
    """Tokens that the policy reads of a task: a chat in which the user says this text; without a chat template
    the text, after BOS where the checkpoint has one. Raises ValueError where the template alters the text but for
    white space around it, or a token is not in the vocabulary.
    """
    if self._template is None:
      return (*self._first, *self.encode(text))
    before, after, _ = self._chat
    rendered = self._rendered(text)
    message = rendered.removeprefix(before).removesuffix(after)
    if before + message + after != rendered or message not in text or message.strip() != text.strip():
      raise ValueError(f'{self._name}: the chat template alters the text {_shown(text)}')
    return self._encode(message, self._chat)

  def decode(self, tokens: Iterable[int]) -> str:
    """The text up to the first stop token; other special tokens are dropped."""
    kept = itertools.takewhile(lambda token: token not in self.stop_ids, map(int, tokens))
    return self._in_file(pipeline.decode, self._published, [token for token in kept if token not in self._silent])

  @functools.cached_property
  def _silent(self) -> set[int]:
    added, named = self._published.get_added_tokens_decoder(), self._named.values()
    return {i for text, i in self._control.items() if added[i].special or text in named}

  def save(self, directory: str | os.PathLike) -> None:
    """Writes the files of the tokenizer, without somebody's truncation, padding and dropout."""
    directory = pathlib.Path(directory)
    self._files.save_text(directory)
    of_json = json.loads(self._files.tokenizer_json)
    if of_json.get('truncation') or of_json.get('padding') or of_json['model'].get('dropout'):
      of_json |= {'truncation': None, 'padding': None}
      if 'dropout' in of_json['model']:
        of_json['model']['dropout'] = None
      (directory / 'tokenizer.json').write_text(json.dumps(of_json, ensure_ascii=False), encoding='utf-8')


def _read(files: pretrained.Directory | pretrained.Gguf) -> tuple[Any, dict[str, str]]:
  """The published tokenizer, which neither truncates nor pads nor drops merges, and its special tokens by name.

  The special tokens of all files are added to it as transformers adds them: those of added_tokens_decoder, or else
  those of special_tokens_map.json and added_tokens.json, come before those of tokenizer.json; what no file lists as an
  added token is a special one. Raises ValueError for a file that is not of this form.
  """
  made = pipeline.read(files.tokenizer_json)
  config, older = files.tokenizer_config, {}
  if 'added_tokens_decoder' not in config:
    older = files.json('special_tokens_map.json')
  try:
    named, more = _special_tokens(config, older)
    listed = [x for _, x in sorted((config.get('added_tokens_decoder') or {}).items(), key=lambda x: int(x[0]))]
    texts = {name: _text(x) for name, x in named.items()}
    added = made.get_added_tokens_decoder()
    known = {token.content: token for token in added.values()}
    changed = {_text(x): _added_token(x, special=x.get('special', False) or _text(x) in texts.values()) for x in listed}
    if 'added_tokens_decoder' not in config:
      special = {*texts.values(), *map(_text, more)}
      for text, i in sorted(files.json('added_tokens.json').items(), key=lambda x: x[1]):
        if i not in added:
          changed[text] = _added_token({'content': text, 'normalized': text not in special}, special=text in special)
    of_files = {*known, *changed}
    for x in [*named.values(), *more]:
      if _text(x) not in of_files:
        changed[_text(x)] = _added_token(x, special=True)
    if not listed:
      for token in known.values():
        if not token.special and token.content in texts.values():
          token.special = True
          changed[token.content] = token
    pipeline.within(lambda: made.add_tokens(list(changed.values())))
  except (TypeError, ValueError, KeyError, AttributeError) as error:
    raise ValueError(f'the special tokens of tokenizer_config.json cannot be read: {error!r}; correct them, or save '
                     'the tokenizer again with transformers') from error
  return made, texts


def _special_tokens(config: Mapping[str, Any], older: Mapping[str, Any]
                    ) -> tuple[dict[str, str | dict[str, Any]], list[str | dict[str, Any]]]:
  """Special tokens by name, in the order of transformers, and those without a name.

  config, older: the fields of tokenizer_config.json, and of special_tokens_map.json, which go first. Raises TypeError
  for a token or a list of another form.
  """
  more = [x for fields in (config, older) for name in ('extra_special_tokens', 'additional_special_tokens')
          if (x := fields.get(name))]
  lists = [x for x in more if not isinstance(x, dict)]
  if wrong := [x for x in lists if not isinstance(x, list) or not all(isinstance(y, (str, dict)) for y in x)]:
    raise TypeError(f'extra or additional special tokens {wrong[0]!r} are no list of tokens')
  fields = {**config, **older}
  if wrong := {name: fields[name] for name in _NAMED if not isinstance(fields.get(name), (str, dict, type(None)))}:
    raise TypeError(f'{wrong} are no tokens')
  own = {name: token for x in more if isinstance(x, dict) for name, token in x.items()}
  names = [*_NAMED, *(name for name in fields if name.endswith('_token') and name not in _NAMED), *own]
  named = {name: x for name in names if isinstance(x := own.get(name, fields.get(name)), (str, dict))}
  return named, lists[0] if lists else []


def _text(token: str | dict[str, Any]) -> str:
  """The text of a token that a file has as a text or an object."""
  return token['content'] if isinstance(token, dict) else token


def _added_token(token: str | dict[str, Any], special: bool) -> Any:
  import tokenizers
  flags = {name: token[name] for name in ('single_word', 'lstrip', 'rstrip', 'normalized') if name in token
           } if isinstance(token, dict) else {}
  return tokenizers.AddedToken(_text(token), special=special, **flags)


def _vocab_size(files: pretrained.Directory | pretrained.Gguf) -> int:
  """The tokens that the checkpoint has embeddings of."""
  found = _of_config(files.config, 'vocab_size')
  if found is None:  # a configuration of transformers leaves out what is its default
    found = next((shape[0] for name, shape in files.shapes.items() if name.endswith('embed_tokens.weight')), None)
  if type(found) is not int or found < 1:
    raise ValueError(f'vocab_size={found!r} of config.json is not a number of tokens; write the number of rows of '
                     'embed_tokens')
  return found


def _of_config(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
  """A field of config.json, or of the text tower of a multimodal one."""
  text = config.get('text_config')
  found = [config.get(name), text.get(name) if isinstance(text, dict) else None, default]
  return next((x for x in found if x is not None), None)


def _control_tokens(published: Any, named: Collection[str], template: str) -> dict[str, int]:
  """The ids of control tokens by their texts; the rule stands at Subwords."""
  found = {}
  for i, token in published.get_added_tokens_decoder().items():
    text = token.content
    if token.special or text in named:
      control = not (len(text) == 1 and _is_character(published.model, text, i))
    else:
      brackets = text[:1] + text[-1:] in ('<>', '[]', '{}', '||')
      control = bool(re.fullmatch(r'<[|｜].*[|｜]>', text)) or (len(text) > 2 and brackets and text in template)
    if control and text.strip(' \n\t\u2581'):  # added tokens of blanks alone (Gemma) are text
      found[text] = i
  return found


def _is_character(model: Any, text: str, i: int) -> bool:
  """Whether the model reads a text as this token, added or not."""
  try:
    return pipeline.within(lambda: [x.id for x in model.tokenize(text)]) == [i]
  except ValueError:  # the model does not know it
    return False


def _shown(text: str) -> str:
  """A text in a line at most: that of a task may be long."""
  return repr(text) if len(text) <= 200 else f'{text[:150]!r}... ({len(text)} characters)'


def _is_part(found: Iterable[int], all_: Iterable[int]) -> bool:
  """Whether all of `found` is in `all_`, in this order."""
  rest = iter(all_)
  return all(x in rest for x in found)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
  """A pattern that finds the first of some tokens in a text, and of those that begin there the longest."""
  return re.compile('|'.join(map(re.escape, sorted(tokens, key=len, reverse=True))) or '(?!)')


def _unknown(tokenizer_json: str) -> str | None:
  """The token that the model gives to what it does not know, which is not control."""
  model = json.loads(tokenizer_json)['model']
  return model['vocab'][model['unk_id']][0] if model.get('unk_id') is not None else model.get('unk_token')


def _renamed(of_json: dict[str, Any], names: Mapping[str, str]) -> Any:
  """A tokenizer in which some tokens have other names, and no text is read as one of them by the old name."""
  import tokenizers
  model, new = of_json['model'], lambda token: names.get(token, token)
  if isinstance(model['vocab'], dict):
    model['vocab'] = {new(token): i for token, i in model['vocab'].items()}
  else:
    model['vocab'] = [[new(token), score] for token, score in model['vocab']]
  if model.get('unk_token') is not None:
    model['unk_token'] = new(model['unk_token'])
  if 'merges' in model:
    prefix = model.get('continuing_subword_prefix') or ''
    model['merges'] = [(a, b) for a, b in model['merges'] if not {a, b, a + b.removeprefix(prefix)} & names.keys()]
  added = [token | {'content': new(token['content'])} for token in of_json['added_tokens']]
  return pipeline.within(lambda: tokenizers.Tokenizer.from_str(json.dumps(of_json | {'added_tokens': added})))
