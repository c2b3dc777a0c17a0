r"""The vocabulary of a .gguf file as a tokenizer of transformers: tokenizer.json, its config and its end tokens.

Two kinds are read: 'gpt2', byte-level BPE, whose words are split by the rule that tokenizer.ggml.pre names; and
'llama', BPE of sentencepiece, whose merges follow from the scores of its tokens. Where a file has no rule (llama.cpp
wrote none before May 2024), the ids of control tokens tell whose vocabulary it is; a file of another vocabulary is
refused. Source: src/llama-vocab.cpp and conversion/base.py of llama.cpp; the patterns are those of the
tokenizer.json that each rule stands for, and the order of merges is that of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
import pathlib
from typing import Any, NamedTuple

_MOST_SPLITS = 2 ** 30  # characters that are compared to find merges; Gemma's vocabulary takes 2 ** 24
_AGAIN = 'convert the model again with a newer llama.cpp'  # at the end of errors
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # token types
_SPACE = '\u2581'  # a blank of sentencepiece


class _Rule(NamedTuple):
  """How a text is split before byte pairs are merged."""

  patterns: tuple[str, ...]  # each splits what the one before left whole
  gpt_2: bool = False  # the words of GPT-2 come last
  nfc: bool = False  # texts are normalised
  ignore_merges: bool = False  # a word that is a token is not merged
  add_bos: bool = False  # where the file does not say


_END = r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r'[^\r\n\p{L}\p{N}]?\p{L}+'
_QWEN_2 = rf'{_SUFFIX}|{_WORD}|\p{{N}}{_END}'
_LLAMA_3 = rf'{_SUFFIX}|{_WORD}|\p{{N}}{{1,3}}{_END}'
# Words of capitals, then small letters.
_CAPITAL, _SMALL = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_CASED = [rf'[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}{a}{_SMALL}{b}' for a, b in ('*+', '+*')]
_CASED_END = _END.replace(r'[\r\n]*', r'[\r\n/]*', 1)
_TEKKEN = rf'{"|".join(_CASED)}|\p{{N}}{_CASED_END}'
_GPT_4O = rf'{"|".join(f"{word}{_SUFFIX}?" for word in _CASED)}|\p{{N}}{{1,3}}{_CASED_END}'
_CHINESE = '[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+'
# Letters with a case, without the alphabets that DeepSeek's list leaves out.
_DEEPSEEK_LETTER = (
    r'[[\p{Lu}\p{Ll}\p{Lt}]&&[^' + '\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8f\u2d00-\u2d2d\ua78f-\ua7ff\uab30-\uab6f'
    '\U00010570-\U000105bf\U00016e40-\U00016e7f\U0001d400-\U0001d7cb\U0001df00-\U0001dfff]]')
_DEEPSEEK_MARK = '[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]'

_DIGITS = _Rule((r'\p{N}',), gpt_2=True)
_OF_LLAMA_3 = _Rule((_LLAMA_3,), ignore_merges=True, add_bos=True)
_OF_QWEN_2 = _Rule((_QWEN_2,), nfc=True)
_RULES = {
    'llama-bpe': _OF_LLAMA_3, 'llama3': _OF_LLAMA_3, 'llama-v3': _OF_LLAMA_3,
    'smaug-bpe': _OF_LLAMA_3._replace(add_bos=False),  # SmolLM3: Llama 3's vocabulary
    'dbrx': _Rule((_LLAMA_3,)),  # Phi-4, OLMo 2 and 3
    'qwen2': _OF_QWEN_2, 'deepseek-r1-qwen': _OF_QWEN_2, 'megrez': _OF_QWEN_2,
    'gpt-4o': _Rule((_GPT_4O,)),  # Phi-4-mini
    'tekken': _Rule((_TEKKEN,), ignore_merges=True, add_bos=True),  # Mistral Nemo
    'smollm': _DIGITS, 'starcoder': _DIGITS, 'refact': _DIGITS, 'command-r': _DIGITS._replace(nfc=True),
    'gpt-2': _Rule((), gpt_2=True), 'phi-2': _Rule((), gpt_2=True),
    'olmo': _Rule((), gpt_2=True, nfc=True), 'mpt': _Rule((), gpt_2=True, nfc=True),
    'deepseek-llm': _Rule((
        r'[\r\n]', rf'\s?{_DEEPSEEK_LETTER}+', rf'\s?{_DEEPSEEK_MARK}+', r'\s+$', _CHINESE, r'\p{N}+')),
    'deepseek-coder': _Rule((r'[\r\n]', r'\s?\p{L}+', r'\s?\p{P}+', _CHINESE, r'\p{N}')),
}
# Rules of vocabularies, by a control token and its id.
_PLACES = (
    ('<|begin_of_text|>', 128_000, 'llama-bpe'), ('<|endoftext|>', 151_643, 'qwen2'),
    ('<\uff5cend\u2581of\u2581sentence\uff5c>', 151_643, 'deepseek-r1-qwen'), ('<|endoftext|>', 100_257, 'dbrx'),
    ('<|endoftext|>', 199_999, 'gpt-4o'), ('[INST]', 3, 'tekken'), ('<|im_start|>', 1, 'smollm'),
    ('<fim_prefix>', 1, 'starcoder'), ('<\uff5cbegin\u2581of\u2581sentence\uff5c>', 100_000, 'deepseek-llm'),
    ('<\uff5cbegin\u2581of\u2581sentence\uff5c>', 32_013, 'deepseek-coder'), ('<|endoftext|>', 50_256, 'gpt-2'))
# llama.cpp ends a completion at tokens of these names, of whatever type and beside those that fields name.
_ENDS = frozenset((
    '<|eot_id|>', '<|im_end|>', '<|end|>', '<end_of_turn>', '<|endoftext|>', '<|eom_id|>', '<EOT>', '_<EOT>', '[EOT]',
    '<|end_of_text|>', '<end_of_utterance>', '<\uff5cend\u2581of\u2581sentence\uff5c>'))
# Control tokens of the Phi family take the blanks around them (Phi-4) or after them (others), but these do not. No
# file says so.
_NO_STRIPS = frozenset(('<s>', '<|endoftext|>', '<|endofprompt|>'))
# Texts of tokens whose ids a file may leave out.
_UNTOLD = {'llama': {'bos': ('<bos>', '<s>'), 'eos': ('<eos>', '</s>'), 'unknown': ('<unk>',)}, 'gpt2': {}}


class Vocabulary(NamedTuple):
  """What a .gguf file says of its tokenizer."""

  tokens: tuple[str, ...]
  kinds: tuple[int, ...]  # of tokens
  rule: _Rule | None  # None: of sentencepiece
  merges: list[tuple[str, str]]  # in their order
  special: dict[str, int]  # ids of 'bos', 'eos', 'eot', 'eom', 'unknown' and 'padding', where there are such
  ends: tuple[int, ...]  # ids that end a completion
  add_bos: bool
  add_blank: bool  # of sentencepiece: a text is read as if a blank stood before it
  strips: frozenset[str]  # control tokens that take the blanks after them
  strips_before: bool  # and those before them
  template: Any  # of chats; None: there is none

  @property
  def tokenizer_config(self) -> dict[str, Any]:
    """The fields of tokenizer_config.json."""
    names = {'bos': 'bos_token', 'eos': 'eos_token', 'unknown': 'unk_token', 'padding': 'pad_token'}
    found = {names[name]: self.tokens[i] for name, i in self.special.items() if name in names}
    return {'tokenizer_class': 'PreTrainedTokenizerFast', 'add_bos_token': self.add_bos} | found | (
        {'chat_template': self.template} if self.template else {})


def read(path: pathlib.Path, architecture: str, fields: Mapping[str, Any]) -> Vocabulary:
  """The vocabulary in the fields of a file.

  Raises ValueError, which names file and field, where one is missing, is of another kind or does not fit the others,
  or where the rule of words is not known.
  """
  model = fields.get('tokenizer.ggml.model')
  if model not in tuple(_UNTOLD):  # it may be a list, which no dict looks up
    raise ValueError(f'{path}: tokenizer.ggml.model={model!r} is not one of {sorted(_UNTOLD)}; take the safetensors '
                     'of this model, with its tokenizer.json')
  tokens, kinds = _list(path, fields, 'tokens', str), _list(path, fields, 'token_type', int)
  if len(tokens) != len(kinds):
    raise ValueError(f'{path}: tokenizer.ggml.token_type has {len(kinds)} elements for {len(tokens)} tokens; {_AGAIN}')
  kinds = [_CONTROL if token in _ENDS else kind for token, kind in zip(tokens, kinds)]
  if model == 'llama':  # llama.cpp's converter writes blanks into tokens of blanks alone (Gemma)
    tokens = [token.replace(' ', _SPACE) if kind == _USER_DEFINED and not token.strip(' ') else token
              for token, kind in zip(tokens, kinds)]
  _one_of_each(path, tokens, kinds)
  special = _special(path, fields, tokens, _UNTOLD[model])
  rule = _rule(path, architecture, fields, tokens) if model == 'gpt2' else None
  merges = _merges(path, fields, tokens) if rule else _merges_of_scores(path, fields, tokens, kinds)
  template = _template(path, fields)
  kinds = _corrected(tokens, kinds, merges, str(template))
  add_bos = _switch(path, fields, 'add_bos_token', rule.add_bos if rule else True)
  if add_bos and 'bos' not in special:
    raise ValueError(f'{path}: texts begin with BOS, but the field tokenizer.ggml.bos_token_id is missing; {_AGAIN}')
  ends = {special[name] for name in ('eos', 'eot', 'eom') if name in special}
  ends |= {i for i, token in enumerate(tokens) if token in _ENDS}
  add_blank = _switch(path, fields, 'add_space_prefix', rule is None and architecture != 'gemma3')
  strips = {token for token, kind in zip(tokens, kinds) if kind in (_CONTROL, _USER_DEFINED)} - _NO_STRIPS
  return Vocabulary(
      tuple(tokens), tuple(kinds), rule, merges, special, tuple(sorted(ends)), add_bos, add_blank,
      frozenset(strips if architecture == 'phi3' else ()), rule == _RULES['dbrx'], template)


def _list(path: pathlib.Path, fields: Mapping[str, Any], name: str, kind: type) -> list[Any]:
  found = fields.get(f'tokenizer.ggml.{name}')
  if found is None:
    raise ValueError(f'{path} lacks the field tokenizer.ggml.{name}, so its tokenizer cannot be read; {_AGAIN}')
  is_list = isinstance(found, list) and found
  wrong = next((x for x in found if not isinstance(x, kind)), None) if is_list else found
  if wrong is not None:
    raise ValueError(f'{path}: tokenizer.ggml.{name} holds {wrong!r}; it is to be a list of {kind.__name__}s; {_AGAIN}')
  return found


def _switch(path: pathlib.Path, fields: Mapping[str, Any], name: str, default: bool) -> bool:
  found = fields.get(f'tokenizer.ggml.{name}', default)
  if not isinstance(found, bool):
    raise ValueError(f'{path}: tokenizer.ggml.{name}={found!r} is not true or false; {_AGAIN}')
  return found


def _one_of_each(path: pathlib.Path, tokens: list[str], kinds: list[int]) -> None:
  """Raises ValueError where two tokens are alike. Unused and empty ones do not count."""
  first = {}
  for i, (token, kind) in enumerate(zip(tokens, kinds)):
    if token and kind != _UNUSED and first.setdefault(token, i) != i:
      raise ValueError(f'{path}: tokenizer.ggml.tokens holds {token!r} twice, as {first[token]} and {i}; {_AGAIN}')


def _corrected(tokens: list[str], kinds: list[int], merges: list[tuple[str, str]], template: str) -> list[int]:
  """Kinds of tokens, where some converters take control tokens for normal ones: those in brackets that the chat
  template writes and no merge makes, so that a text would never be read as them.
  """
  made = {''.join(pair) for pair in merges}
  return [_CONTROL if kind == _NORMAL and token[:1] + token[-1:] in ('<>', '[]', '{}', '||') and len(token) > 2 and
          token in template and token not in made else kind for token, kind in zip(tokens, kinds)]


def _special(path: pathlib.Path, fields: Mapping[str, Any], tokens: list[str], untold: Mapping[str, tuple[str, ...]]
             ) -> dict[str, int]:
  found = {}
  for name in ('bos', 'eos', 'eot', 'eom', 'unknown', 'padding'):
    i = fields.get(key := f'tokenizer.ggml.{name}_token_id')
    if i is None:
      i = next((tokens.index(text) for text in untold.get(name, ()) if text in tokens), None)
    if i is None:
      continue
    if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(tokens):
      raise ValueError(f'{path}: {key}={i!r} is not an id below {len(tokens)}, the number of tokens; {_AGAIN}')
    found[name] = i
  return found


def _rule(path: pathlib.Path, architecture: str, fields: Mapping[str, Any], tokens: list[str]) -> _Rule:
  """The rule that the file names, or the one of its vocabulary."""
  name = fields.get('tokenizer.ggml.pre', 'default')
  if name == 'default':
    found = [rule for token, i, rule in _PLACES if i < len(tokens) and tokens[i] == token]
    if len(found) != 1:
      raise ValueError(
          f'{path} does not say how words are split (tokenizer.ggml.pre is missing or "default"), and its vocabulary '
          f'of {len(tokens)} tokens is {f"that of {found}" if found else "not a known one"}; convert the model '
          'again with a newer llama.cpp, or take its safetensors')
    name = 'smaug-bpe' if (architecture, *found) == ('smollm3', 'llama-bpe') else found[0]
  if name not in tuple(_RULES):
    raise ValueError(f'{path}: tokenizer.ggml.pre={name!r} is not one of {sorted(_RULES)}; take the safetensors of '
                     'this model, with its tokenizer.json')
  return _RULES[name]


def _merges(path: pathlib.Path, fields: Mapping[str, Any], tokens: list[str]) -> list[tuple[str, str]]:
  known, found = set(tokens), []
  for i, merge in enumerate(_list(path, fields, 'merges', str)):
    cut = merge.find(' ', 1)  # a token may begin with a blank
    pair = merge[:cut], merge[cut + 1:]
    if cut < 1 or not known.issuperset((*pair, ''.join(pair))):
      raise ValueError(f'{path}: tokenizer.ggml.merges[{i}]={merge!r} is not two tokens whose union is a token; '
                       f'{_AGAIN}')
    found.append(pair)
  return found


def _merges_of_scores(path: pathlib.Path, fields: Mapping[str, Any], tokens: list[str],
                      kinds: list[int]) -> list[tuple[str, str]]:
  """The merges of a sentencepiece vocabulary: the pair whose union has the highest score is merged first."""
  scores = _list(path, fields, 'scores', float)
  if len(scores) != len(tokens):
    raise ValueError(f'{path}: tokenizer.ggml.scores has {len(scores)} elements for {len(tokens)} tokens; {_AGAIN}')
  if any(map(math.isnan, scores)):
    raise ValueError(f'{path}: tokenizer.ggml.scores holds nan, which orders no merges; {_AGAIN}')
  # A user-defined token comes before all others; the converter writes another score.
  score_of = {token: 0.0 if kind == _USER_DEFINED else score for token, kind, score in zip(tokens, kinds, scores)
              if kind in (_NORMAL, _USER_DEFINED)}
  unions = [score for token, score in score_of.items() if len(token) > 1]
  if len(unions) > 2 and len(set(unions)) == 1:
    raise ValueError(f'{path}: all of tokenizer.ggml.scores are {unions[0]}, so the order of merges is lost; take the '
                     'safetensors of this model, with its tokenizer.json')
  if sum(len(token) ** 2 for token in score_of) > _MOST_SPLITS:
    raise ValueError(f'{path}: tokenizer.ggml.tokens holds tokens of up to {max(map(len, score_of))} characters, which '
                     'have too many merges; take the safetensors of this model, with its tokenizer.json')
  id_of = {token: i for i, token in enumerate(tokens)}
  found = []
  for token, score in score_of.items():
    pairs = [(token[:n], token[n:]) for n in range(1, len(token)) if token[:n] in score_of and token[n:] in score_of]
    found += [(score, a, b) for a, b in sorted(pairs, key=lambda pair: (id_of[pair[0]], id_of[pair[1]]))]
  found.sort(key=lambda x: (-x[0], -len(x[1]), -len(x[2])))  # ties as transformers has them: the longer token first
  return [(a, b) for _, a, b in found]


def _template(path: pathlib.Path, fields: Mapping[str, Any]) -> Any:
  """The chat template, or several by name where none is the default."""
  prefix = 'tokenizer.chat_template'
  found = {key[len(prefix):].lstrip('.'): text for key, text in fields.items()
           if key == prefix or key.startswith(f'{prefix}.')}
  if wrong := [name for name, text in found.items() if not isinstance(text, str)]:
    raise ValueError(f'{path}: {prefix} is no text, but {found[wrong[0]]!r}; {_AGAIN}')
  return found.get('') or [{'name': name, 'template': text} for name, text in found.items()] or None


def tokenizer(vocabulary: Vocabulary) -> Any:
  """The tokenizer, of the library `tokenizers`."""
  import tokenizers  # slow to load
  from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
  tokens, rule = vocabulary.tokens, vocabulary.rule
  vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, vocabulary.kinds)) if token and kind != _UNUSED}
  if rule:
    made = tokenizers.Tokenizer(models.BPE(vocab, vocabulary.merges, ignore_merges=rule.ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated') for pattern in rule.patterns),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.gpt_2)])
    if rule.nfc:
      made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
  else:
    unknown = vocabulary.special.get('unknown')
    made = tokenizers.Tokenizer(models.BPE(
        vocab, vocabulary.merges, byte_fallback=True, fuse_unk=True,
        unk_token=None if unknown is None else tokens[unknown]))
    blank = normalizers.Replace(' ', _SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), blank]) if vocabulary.add_blank else blank
    made.decoder = decoders.Sequence([
        decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse(),
        *([decoders.Strip(' ', 1, 0)] if vocabulary.add_blank else [])])
  made.add_tokens([
      tokenizers.AddedToken(token, special=kind != _USER_DEFINED, normalized=False, rstrip=token in vocabulary.strips,
                            lstrip=vocabulary.strips_before and token in vocabulary.strips)
      for token, kind in zip(tokens, vocabulary.kinds) if token and kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)])
  if vocabulary.add_bos:
    bos = vocabulary.special['bos']
    made.post_processor = processors.TemplateProcessing(
        single=f'{tokens[bos]} $A', special_tokens=[(tokens[bos], bos)])
  return made
