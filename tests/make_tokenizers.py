"""Makes tests/data/tokenizers: a tiny tokenizer of each kind, and what transformers reads with it.

    pip install 'kr_jax[parity]' && python tests/make_tokenizers.py

KIND/ holds config.json with vocab_size, tokenizer.json, tokenizer_config.json with a chat template,
generation_config.json, for one special_tokens_map.json, and expected.json: the tokens of some texts and chats.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
import transformers

ROOT = pathlib.Path(__file__).parent / 'data' / 'tokenizers'
CORPUS = '''What is the sum of 12 and 34? The sum of 12 and 34 is 46. user assistant system
def add(a, b): return a + b  # Tür, naïve café, x² ÷ 2
Please reason step by step. The answer is 5. <b>bold</b> The quick brown fox jumps over the lazy dog.
'''
TEXTS = ['The answer is 46.', ' leading and trailing  ', 'x = 12 + 34', 'Tür ÷ naïve 数学 🙂', 'a\n\n\nb\t c',
         'def f(x):\n    return x**2', '<b>it\'s</b> 3.14', '', '1', '\n']
MESSAGES = ['What is 12 + 34?', '  padded  ', 'two\nlines\n\n', '数学 9', '12+34 Tür <b>']
SYSTEM = 'Count well.'
CHATML = '''{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}'''


def token(text: str, *, special: bool = True, normalized: bool = False, **flags: bool) -> tokenizers.AddedToken:
  return tokenizers.AddedToken(text, special=special, normalized=normalized, **flags)


def turns(begin: str, end: str, *, first: str = '{{ bos_token }}') -> str:
  """A template that writes begin and end around each message; {role} stands for its role."""
  begin, end = (x.replace('{role}', '{{ message.role }}') for x in (begin, end))
  last = begin.replace('{{ message.role }}', 'assistant')
  return (f'{first}{{% for message in messages %}}{begin}{{{{ message.content }}}}{end}{{% endfor %}}'
          f'{{% if add_generation_prompt %}}{last}{{% endif %}}')


def byte_level(**options: Any) -> tokenizers.Tokenizer:
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
  made.decoder = decoders.ByteLevel()
  made.train_from_iterator(CORPUS.splitlines(), trainers.BpeTrainer(
      vocab_size=290, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return made


def sentence_pieces(scheme: str) -> tokenizers.Tokenizer:
  """Byte pairs with byte fallback. scheme: of Metaspace; or 'legacy', which is a normalizer."""
  of_bytes = [f'<0x{i:02X}>' for i in range(256)]
  made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token='<unk>'))
  if scheme == 'legacy':
    made.normalizer = normalizers.Sequence([normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
  else:
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
  made.train_from_iterator(CORPUS.splitlines(), trainers.BpeTrainer(
      vocab_size=330, special_tokens=['<unk>', '<s>', '</s>', *of_bytes], show_progress=False, limit_alphabet=45,
      max_token_length=6))
  of_json = json.loads(made.to_str())
  of_json['added_tokens'] = []  # the trainer takes its special tokens for added ones
  made = tokenizers.Tokenizer.from_str(json.dumps(of_json))
  made.decoder = decoders.Sequence([decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                    decoders.Strip(' ', 1, 0)])
  return made


def with_added(made: tokenizers.Tokenizer, *added: tokenizers.AddedToken) -> tokenizers.Tokenizer:
  made.add_tokens(list(added))
  return made


def around(made: tokenizers.Tokenizer, single: str) -> tokenizers.Tokenizer:
  """Special tokens around a text, as '<s> $A </s>'."""
  names = [x for x in single.split(' ') if x != '$A']
  made.post_processor = processors.TemplateProcessing(
      single=single, special_tokens=[(name, made.token_to_id(name)) for name in names])
  return made


def wordpiece() -> tokenizers.Tokenizer:
  made = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
  made.normalizer = normalizers.BertNormalizer()
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  made.train_from_iterator(CORPUS.splitlines(), trainers.WordPieceTrainer(
      vocab_size=120, special_tokens=['[PAD]', '[UNK]', '[CLS]', '[SEP]'], show_progress=False))
  made.decoder = decoders.WordPiece()
  return around(with_added(made, token('[MASK]', lstrip=True)), '[CLS] $A [SEP]')


def unigram() -> tokenizers.Tokenizer:
  """Its vocabulary holds <s> and </s>, likelier than any text, which the model would read wherever they are spelt."""
  characters = sorted(set(''.join(CORPUS.split())) | {'\u2581', '<', '/', '>', '|', '_'})
  words = {f'\u2581{word}' for word in CORPUS.split()[:24]}
  vocab = [('<unk>', 0.0), ('<s>', 0.0), ('</s>', 0.0), *((x, -8.0) for x in characters),
           *((x, -6.0) for x in sorted(words))]
  made = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
  made.normalizer = normalizers.NFKC()
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='always')
  made.decoder = decoders.Metaspace(prepend_scheme='always')
  return made


def wordlevel() -> tokenizers.Tokenizer:
  words = ['[UNK]', '[BOS]', '[EOS]', *sorted(set(CORPUS.split()))]
  made = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='[UNK]'))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return with_added(made, *(token(x, special=False) for x in words[:3]))


def normalized() -> tokenizers.Tokenizer:
  """A control token that is looked for in the normalised text, so '<TURN>' and wide letters spell it as well."""
  made = tokenizers.Tokenizer(models.BPE())
  made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.train_from_iterator(CORPUS.lower().splitlines(), trainers.BpeTrainer(
      vocab_size=280, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return with_added(made, token('<s>'), token('</s>'), token('<turn>', normalized=True))


def kinds() -> dict[str, tuple[tokenizers.Tokenizer, dict[str, Any], str]]:
  """Tokenizer, fields of tokenizer_config.json, template."""
  llama_2 = turns('[INST] ', ' [/INST]')
  of_llama = lambda scheme: with_added(sentence_pieces(scheme), token('<unk>'), token('<s>'), token('</s>'))
  named = {'bos_token': '<s>', 'eos_token': '</s>'}
  state = around(of_llama('first'), '<s> $A </s>')
  state.enable_truncation(12)
  state.enable_padding(length=48, pad_id=2, pad_token='</s>')
  return {
      'bytes': (with_added(
          byte_level(add_prefix_space=True), token('<s>'), token('</s>'), token('|user|', lstrip=True, rstrip=True),
          token('|assistant|', rstrip=True), token('|system|', single_word=True), token('|end|', rstrip=True)),
                named, turns('|{role}|\n', '|end|\n')),
      'metaspace_first': (state, named | {'unk_token': '<unk>'}, llama_2),
      'metaspace_always': (around(of_llama('always'), '<s> $A'), named, llama_2),
      'metaspace_never': (around(of_llama('never'), '<s> $A'), named, llama_2),
      'legacy': (around(with_added(
          of_llama('legacy'), token('</s>', special=False, rstrip=True), token('<|user|>', rstrip=True),
          token('<|system|>', rstrip=True), token('<|assistant|>', rstrip=True), token('<|end|>', rstrip=True)),
                        '<s> $A'), named, turns('<|{role}|>\n', '<|end|>\n')),
      'unigram': (unigram(), named | {'unk_token': '<unk>', 'additional_special_tokens': [
          '<|im_start|>', {'content': '<|im_end|>', 'lstrip': False, 'rstrip': True, 'normalized': False,
                           'single_word': False, '__type': 'AddedToken'}]}, CHATML),
      'wordpiece': (wordpiece(), {'bos_token': '[CLS]', 'eos_token': '[SEP]', 'unk_token': '[UNK]',
                                  'pad_token': '[PAD]', 'mask_token': '[MASK]'}, turns('{role}: ', '[SEP]')),
      'wordlevel': (wordlevel(), {}, turns(' {role} : ', ' [EOS] ')),
      'digits': (with_added(
          byte_level(add_prefix_space=False), *(token(x, special=False, normalized=x == '2')
                                                for x in ('1', '2', '+', 'ü', '<b>')),
          token('<s>'), token('</s>'), token('<|User|>', special=False), token('<|Assistant|>', special=False),
          token('<think>', special=False), token('</think>', special=False), token('sum', special=False)),
                 {'bos_token': {'content': '<s>', '__type': 'AddedToken', 'lstrip': False, 'rstrip': False,
                                'normalized': True, 'single_word': False}, 'eos_token': '</s>',
                  'pad_token': '!', 'added_tokens_decoder': None},
                 "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}<|Assistant|>"
                 "{{ message.content.split('</think>')[-1] }}{{ eos_token }}{% else %}<|User|>{{ message.content }}"
                 '{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}'),
      'normalized': (normalized(), named, turns('<turn>{role}\n', '</s>')),
  }


def main() -> None:
  for name, (made, config, template) in kinds().items():
    folder = ROOT / name
    folder.mkdir(parents=True, exist_ok=True)
    if name == 'digits':  # flags that tokenizer.json and this file have differently
      config['added_tokens_decoder'] = {
          str(i): {x: getattr(y, x) for x in ('content', 'lstrip', 'rstrip', 'normalized', 'single_word')} |
                  {'special': y.special or y.content == '</s>'}
          for i, y in made.get_added_tokens_decoder().items() if y.content != '<think>'}
    made.save(str(folder / 'tokenizer.json'), pretty=False)
    write = lambda file, x: (folder / f'{file}.json').write_text(json.dumps(x, ensure_ascii=False, indent=1))
    write('tokenizer_config', config | {'tokenizer_class': 'PreTrainedTokenizerFast', 'chat_template': template})
    if name == 'wordlevel':
      write('special_tokens_map', {'bos_token': '[BOS]', 'eos_token': {'content': '[EOS]', 'lstrip': False, 'rstrip':
            True, 'normalized': False, 'single_word': False}, 'unk_token': '[UNK]'})
    read = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    write('config', {'vocab_size': len(read)})
    write('generation_config', {'eos_token_id': read.eos_token_id})
    chats = [(system, message) for system in ('', SYSTEM) for message in MESSAGES]
    write('expected', {
        'texts': [{'text': text, 'tokens': read.encode(text, add_special_tokens=False)} for text in TEXTS],
        'chats': [{'system': system, 'message': message, 'tokens': read.apply_chat_template(
            [{'role': 'system', 'content': system}] * bool(system) + [{'role': 'user', 'content': message}],
            add_generation_prompt=True, return_dict=False)} for system, message in chats]})
    print(name, len(read), sum(path.stat().st_size for path in folder.iterdir()))


if __name__ == '__main__':
  main()
