"""What transformers and a slow byte-pair encoder make of checkpoints: for tests/benchmarks/parity.py.

    PYTHON transformers_parity.py REQUEST.json ANSWER.npz

REQUEST: {'models': {name: {'path', 'file': of a GGUF file in it or null, 'tokens': rows, 'prompts': rows, 'greedy':
tokens after each prompt, 'texts'}}, 'gguf', 'texts'}. ANSWER: NAME/logits/ROW of each row of tokens, NAME/greedy/ROW of
each prompt, NAME/texts the tokens of its texts, and 'slow' those of the texts by the rule of SmolLM2, with -1 after
each text.
"""

import json
import pathlib
import sys

import gguf
import numpy as np
import regex
import torch
import transformers

GPT_2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def printable() -> dict[int, str]:
  """GPT-2's character for each byte."""
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [b for b in range(256) if b not in shown]
  return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Slow:
  """Digits one by one, then GPT-2's words, then the pair of the lowest rank, until there is none."""

  def __init__(self, path: str):
    fields = gguf.GGUFReader(path).fields
    self.vocab = {token: i for i, token in enumerate(fields['tokenizer.ggml.tokens'].contents())}
    merges = fields['tokenizer.ggml.merges'].contents()
    self.rank = {tuple(merge.split(' ')): i for i, merge in enumerate(merges)}
    self.byte = printable()

  def __call__(self, text: str) -> list[int]:
    tokens = []
    for part in regex.findall(r'\p{N}|[^\p{N}]+', text):
      for word in GPT_2.findall(part):
        parts = [self.byte[b] for b in word.encode()]
        while True:
          pairs = [self.rank.get(pair, len(self.rank)) for pair in zip(parts, parts[1:])]
          if not pairs or min(pairs) == len(self.rank):
            break
          i = pairs.index(min(pairs))
          parts[i:i + 2] = [parts[i] + parts[i + 1]]
        tokens += [self.vocab[part] for part in parts]
    return tokens


def main() -> None:
  request = json.loads(pathlib.Path(sys.argv[1]).read_text())
  found = {}
  joined = lambda rows: np.array([token for row in rows for token in (*row, -1)], np.int32)
  for name, model in request['models'].items():
    of_file = {'gguf_file': model['file']} if model['file'] else {}
    made = transformers.AutoModelForCausalLM.from_pretrained(
        model['path'], dtype=torch.float32, **of_file).eval()
    with torch.no_grad():
      for i, row in enumerate(model['tokens']):
        found[f'{name}/logits/{i}'] = made(torch.tensor([row])).logits[0].float().numpy()
      if not model['file']:
        made.generation_config.eos_token_id = None  # no random token ends a text
      for i, row in enumerate(model['prompts']):
        written = made.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)).long(),
                                max_new_tokens=model['greedy'], do_sample=False)
        found[f'{name}/greedy/{i}'] = written[0, len(row):].numpy()
    if model['texts'] and not model['file']:
      tokenizer = transformers.AutoTokenizer.from_pretrained(model['path'])
      found[f'{name}/texts'] = joined(tokenizer.encode(text, add_special_tokens=False) for text in model['texts'])
  found['slow'] = joined(map(Slow(request['gguf']), request['texts']))
  np.savez(sys.argv[2], **found)


if __name__ == '__main__':
  main()
