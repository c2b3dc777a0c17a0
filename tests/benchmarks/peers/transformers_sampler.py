"""Times `generate` of transformers on the model of tests/benchmarks/sampler.py.

Runs where torch and transformers are installed. With --serve it says 'ready', then for each line N that
comes samples N tokens for each of 128 prompts, and prints the seconds; at the end, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
import transformers

M, N, P = 16, 8, 64


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--longest', type=int, default=64, help='tokens of a completion at the most')
  parser.add_argument('--serve', action='store_true', required=True)
  args = parser.parse_args()
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=1024, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
      num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=P + args.longest,
      tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
  prompts = torch.randint(2, 1024, (M, P)).repeat_interleave(N, dim=0)

  @torch.inference_mode()
  def sample(tokens: int) -> float:
    start = time.perf_counter()
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
                         top_p=1.0, temperature=1.0, max_new_tokens=tokens, min_new_tokens=tokens,
                         eos_token_id=None)
    seconds = time.perf_counter() - start
    if out.shape[1] != P + tokens:
      raise RuntimeError(f'completions of {out.shape[1] - P} tokens instead of {tokens}')
    return seconds

  print('ready', flush=True)
  for line in sys.stdin:
    print(json.dumps(sample(int(line))), flush=True)
  print(json.dumps({'transformers_version': transformers.__version__,
                    'torch_version': torch.__version__, 'threads': torch.get_num_threads()}), flush=True)


if __name__ == '__main__':
  main()
