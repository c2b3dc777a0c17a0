"""Times one GRPO update, beside that of google-tunix where an interpreter that has it is named.

    .venv/bin/python -m tests.benchmarks.update [--peer=PYTHON] [--repeats 7]
        [--microbatch_rows 16] [--json]

4 layers of width 256, ffn 768, 4 heads, vocabulary 1024, float32; 16 tasks of 8 rollouts of 64 + 64
tokens, all with a gradient. Once more with half of the groups at equal rewards, which have none.
PYTHON comes from an environment of its own:

    python -m venv DIR && DIR/bin/pip install google-tunix==0.1.7

Both sides update in turn, so that a machine's noise meets both; of times the medians are given, of
ratios the median over the rounds and its range. Tunix takes the fastest of four microbatches.

    half_ratio     our time with half of the groups constant, over that with none
    peak_gflops    a product of float32 matrices of 2048 x 2048 in the same rounds
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from kr_jax import types
from kr_jax.learning import measurements
from kr_jax.learning import update
from kr_jax.model import policy
from tests import knobs
from tests.benchmarks import machine
from tests.benchmarks.peer import Peer

M, N, P, C = 16, 8, 64, 64  # tasks, rollouts of each, prompt and completion tokens
POLICY = policy.Config(
    vocab_size=1024, num_layers=4, width=256, num_heads=4, num_kv_heads=4, head_width=64,
    hidden_width=768, rope_theta=1e4, norm_eps=1e-6, qk_norm=False, qkv_bias=False,
    tie_embeddings=True, dtype='float32', remat='none', lora_rank=0, lora_alpha=1.0)


def rollouts() -> types.Rollouts:
  rng = np.random.default_rng(0)
  tokens = lambda *shape: rng.integers(2, POLICY.vocab_size, shape).astype(np.int32)
  prompts = types.Prompts(tokens(M, P), np.full(M, P, np.int32), np.arange(M, dtype=np.int32))
  R = M * N
  return types.Rollouts(
      prompts, np.repeat(np.arange(M), N).astype(np.int32), tokens(R, C),
      np.full((R, C), -np.log(POLICY.vocab_size), np.float32), np.full(R, C, np.int32),
      np.full(R, types.ENDED_LENGTH, np.int32), np.array(C, np.int32))


class Ours:
  """Our updates, one after the other."""

  def __init__(self, microbatch_rows: int):
    self.config = knobs.updates(row_length=P + C - 1, microbatch_rows=microbatch_rows)
    self.rollouts = rollouts()
    full_MN = np.tile(np.arange(N) % 2, (M, 1)).astype(np.float32)
    half_MN = np.where(np.arange(M)[:, None] % 2, full_MN, 0)
    self.reward_R = {'full': full_MN.reshape(-1), 'half': half_MN.reshape(-1)}
    self.state = update.init(policy.init(POLICY, jax.random.key(0)), jax.random.key(1), self.config)

  def __call__(self, kind: str) -> float:
    start = time.perf_counter()
    self.state, measured = update.step(self.state, self.rollouts, self.reward_R[kind], {}, POLICY,
                                       self.config)
    jax.block_until_ready(self.state)
    seconds = time.perf_counter() - start
    expected = M * N * C // (1 if kind == 'full' else 2)
    tokens = measurements.summarize(measured)['tokens_updated']
    assert tokens == expected, f'{tokens} tokens had a gradient, not {expected}'
    return seconds


def peak_gflops(a: jax.Array) -> float:
  start = time.perf_counter()
  (a @ a).block_until_ready()
  return 2 * a.shape[0] ** 3 / (time.perf_counter() - start) / 1e9


def measure(peer: str | None, repeats: int, microbatch_rows: int) -> dict:
  """All figures of a run."""
  sides = {'ours': Ours(microbatch_rows)} | (
      {'peer': Peer(peer, 'tunix_update.py')} if peer else {})
  a = jnp.ones((2048, 2048))
  times, peak = {(side, kind): [] for kind in ('full', 'half') for side in sides}, []
  for i in tqdm(range(repeats + 1), file=sys.stderr):
    for (side, kind), seconds in times.items():
      seconds.append(sides[side](kind))
    peak.append(peak_gflops(a))
    if not i:  # compiles
      for values in (*times.values(), peak):
        values.clear()
  rounds = {key: np.array(seconds) for key, seconds in times.items()}
  tokens = M * N * (P + C)
  params = sum(x.size for x in jax.tree.leaves(sides['ours'].state.params))
  spread = lambda ratio: [float(np.median(ratio)), [float(min(ratio)), float(max(ratio))]]
  median = {key: float(np.median(seconds)) for key, seconds in rounds.items()}
  half, half_range = spread(rounds['ours', 'half'] / rounds['ours', 'full'])
  figures = {
      'ours_s': median['ours', 'full'], 'ours_tokens_per_s': tokens / median['ours', 'full'],
      'half_s': median['ours', 'half'], 'half_ratio': half, 'half_ratio_range': half_range,
      'peak_gflops': float(np.median(peak)),
      # Of what is computed: prompts once a task, but their last token. Without attention.
      'ours_gflops': 6 * params * (M * (P - 1) + M * N * C) / median['ours', 'full'] / 1e9,
      'microbatch_rows': microbatch_rows}
  if peer:
    ratio, ratio_range = spread(rounds['peer', 'full'] / rounds['ours', 'full'])
    peer_half, _ = spread(rounds['peer', 'half'] / rounds['peer', 'full'])
    ratio_half, _ = spread(rounds['peer', 'half'] / rounds['ours', 'half'])
    figures |= {
        'peer_s': median['peer', 'full'], 'peer_tokens_per_s': tokens / median['peer', 'full'],
        'ratio': ratio, 'ratio_range': ratio_range, 'peer_half_ratio': peer_half,
        'ratio_half': ratio_half,
        'peer': {k: v for k, v in sides['peer'].close().items() if 'seconds' not in k}}
  return figures


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--peer', help='interpreter of an environment with google-tunix 0.1.7')
  parser.add_argument('--repeats', type=int, default=7, help='rounds')
  parser.add_argument('--microbatch_rows', type=int, default=16, help='ours, of a rollout each')
  parser.add_argument('--json', action='store_true', help='print one JSON object last')
  args = parser.parse_args()
  figures = measure(args.peer, args.repeats, args.microbatch_rows)
  print(machine.describe())
  print('{ours_s:.2f} s an update, {ours_tokens_per_s:,.0f} tokens/s, {ours_gflops:.0f} of '
        '{peak_gflops:.0f} GFLOP/s; half of the groups constant: {half_ratio:.2f} of the time'
        .format(**figures))
  if args.peer:
    print('Tunix: {peer_s:.2f} s, {peer_tokens_per_s:,.0f} tokens/s, half constant: '
          '{peer_half_ratio:.2f}; ours is {ratio:.2f} times as fast ({ratio_range[0]:.2f}..'
          '{ratio_range[1]:.2f}), with half constant {ratio_half:.2f}'
          .format(**figures))
  if args.json:
    print(json.dumps({'machine': machine.describe(), **figures}))


if __name__ == '__main__':
  main()
