"""Times the vanilla sampler of google-tunix on the model of tests/benchmarks/sampler.py.

Runs where google-tunix 0.1.7 is installed. With --serve it says 'ready', then for each line N that comes
samples N tokens for each of 128 prompts, and prints the seconds; at the end, one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time

import jax
import numpy as np

sys.path.insert(0, os.path.dirname(__file__))
import tunix_update  # the model
from tunix.generate import sampler as sampler_lib


class Tokenizer:
  """Prompts are numbers with blanks between them."""

  def encode(self, text, **kwargs):
    return [int(word) for word in text.split()]

  def decode(self, ids, **kwargs):
    return ''

  def bos_id(self):
    return 0  # none is put in front

  def eos_id(self):
    return 1

  def pad_id(self):
    return 0


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--longest', type=int, default=64, help='tokens that the cache has room for')
  parser.add_argument('--serve', action='store_true', required=True)
  args = parser.parse_args()
  sizes = tunix_update.SIZES
  P = sizes['prompt_length']
  prompts = np.random.default_rng(0).integers(2, sizes['vocab_size'], (sizes['tasks'], P))
  texts = [' '.join(map(str, prompt)) for prompt in np.repeat(prompts, sizes['group'], axis=0)]
  # As the cluster's rollouts do: on a mesh, of a cache as long as is needed.
  sampler = sampler_lib.Sampler(
      tunix_update.make_model(sizes), Tokenizer(), sampler_lib.CacheConfig(
          cache_size=P + args.longest, num_layers=sizes['num_layers'],
          num_kv_heads=sizes['num_kv_heads'], head_dim=sizes['head_width']))

  def sample(tokens: int, seed: int) -> float:
    start = time.perf_counter()
    out = sampler(texts, max_generation_steps=tokens, max_prompt_length=P, temperature=1.0, top_p=1.0,
                  seed=seed, forbidden_tokens=[1], return_logprobs=True)
    jax.block_until_ready(out.tokens)
    seconds = time.perf_counter() - start
    short = [len(x) for x in out.tokens if len(x) != tokens]
    if short:
      raise RuntimeError(f'completions of {short} tokens instead of {tokens}')
    return seconds

  print('ready', flush=True)
  for i, line in enumerate(sys.stdin):
    print(json.dumps(sample(int(line), i)), flush=True)
  print(json.dumps({'tunix_version': importlib.metadata.version('google-tunix'),
                    'jax_version': jax.__version__}), flush=True)


if __name__ == '__main__':
  main()
