"""Makes a checkpoint of a given size whose tensors take no room on the disk: all are 0.

    python tests/make_sparse_checkpoint.py PATH --gigabytes 16

It has the proportions of Qwen3-8B (16.4 GB of bfloat16) in files of at most 5 GB and an index. A file is the header of
safetensors and a hole.
"""

from __future__ import annotations

import argparse
import json
import pathlib

WHOLE = 16.4  # gigabytes of Qwen3-8B
HEAD_WIDTH = 128
FILE_BYTES = 5_000_000_000


def sizes(gigabytes: float) -> dict[str, int]:
  """Fields of config.json: heads, widths and vocabulary of Qwen3-8B, all by one factor, and layers for the rest."""
  kv_heads = max(1, round(8 * (gigabytes / WHOLE) ** 0.5))
  width = 4 * HEAD_WIDTH * kv_heads
  found = {'vocab_size': 37 * width, 'hidden_size': width, 'intermediate_size': 3 * width,
           'num_attention_heads': 4 * kv_heads, 'num_key_value_heads': kv_heads, 'head_dim': HEAD_WIDTH,
           'num_hidden_layers': 1}
  of_layer = sum(x[0] * x[-1] for name, x in tensors(found).items() if '.0.' in name and len(x) == 2)
  left = gigabytes * 1e9 / 2 - 2 * found['vocab_size'] * width
  return found | {'num_hidden_layers': max(1, round(left / of_layer))}


def tensors(c: dict[str, int]) -> dict[str, tuple[int, ...]]:
  """Names and shapes."""
  D, F, H = c['hidden_size'], c['intermediate_size'], c['head_dim']
  N, K = c['num_attention_heads'] * H, c['num_key_value_heads'] * H
  of_layer = {
      'self_attn.q_proj': (N, D), 'self_attn.k_proj': (K, D), 'self_attn.v_proj': (K, D), 'self_attn.o_proj': (D, N),
      'self_attn.q_norm': (H,), 'self_attn.k_norm': (H,), 'mlp.gate_proj': (F, D), 'mlp.up_proj': (F, D),
      'mlp.down_proj': (D, F), 'input_layernorm': (D,), 'post_attention_layernorm': (D,)}
  return {'model.embed_tokens.weight': (c['vocab_size'], D), 'lm_head.weight': (c['vocab_size'], D),
          'model.norm.weight': (D,),
          **{f'model.layers.{i}.{name}.weight': shape
             for i in range(c['num_hidden_layers']) for name, shape in of_layer.items()}}


def write(path: pathlib.Path, gigabytes: float) -> int:
  """Writes the checkpoint, and returns the number of its parameters."""
  path.mkdir(parents=True, exist_ok=True)
  c = sizes(gigabytes)
  (path / 'config.json').write_text(json.dumps(c | {
      'model_type': 'qwen3', 'tie_word_embeddings': False, 'rope_theta': 1e6, 'rms_norm_eps': 1e-6,
      'hidden_act': 'silu', 'max_position_embeddings': 4096}, indent=1))
  headers, end, total = [{}], 0, 0
  for name, shape in tensors(c).items():
    count = shape[0] * (shape[1] if len(shape) > 1 else 1)
    if end + 2 * count > FILE_BYTES:
      headers, end = [*headers, {}], 0
    headers[-1][name] = {'dtype': 'BF16', 'shape': shape, 'data_offsets': (end, end + 2 * count)}
    end, total = end + 2 * count, total + count
  file_of = {}
  for k, header in enumerate(headers):
    file = f'model-{k + 1:05d}-of-{len(headers):05d}.safetensors'
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(path / file, 'wb') as f:
      f.write(len(text).to_bytes(8, 'little') + text)
      f.truncate(8 + len(text) + max(x['data_offsets'][1] for x in header.values()))
    file_of |= dict.fromkeys(header, file)
  (path / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': file_of}))
  return total


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('path', type=pathlib.Path)
  parser.add_argument('--gigabytes', type=float, default=16, help='of bfloat16')
  flags = parser.parse_args()
  print(f'{flags.path}: {write(flags.path, flags.gigabytes):,} parameters')


if __name__ == '__main__':
  main()
