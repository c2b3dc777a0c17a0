"""Times the sampler, beside those of google-tunix and transformers where they are at hand.

    .venv/bin/python -m tests.benchmarks.sampler [--peer=PYTHON] [--parity=PYTHON] [--json]

4 layers of width 256, ffn 768, 4 heads, vocabulary 1024, float32; 16 prompts of 64 tokens, 8 rollouts of
each, at temperature 1 with log-probabilities. First all of 64 tokens; then of log-normal lengths (median
64, sigma 1, at most 512), for which a static batch waits until the longest is done: the others sample 512
tokens, and only those that our rollouts keep are counted. What we drew with none so long is drawn again.

PYTHON of --peer has google-tunix 0.1.7, that of --parity torch 2.13.0 and transformers (the [parity]
extra). All sides sample in turn, so that a machine's noise meets all; times are medians, of ratios the
median over the rounds and its range.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from kr_jax import sample
from kr_jax import types
from kr_jax.model import decode
from kr_jax.model import policy
from kr_jax.model.tokenizer import STOP
from tests import knobs
from tests.benchmarks import machine
from tests.benchmarks.peer import Peer
from tests.benchmarks.update import M, N, P, POLICY

C, LONGEST = 64, 512
_DECODE = decode.decode


def survival(n: np.ndarray) -> np.ndarray:
  """P(length > n) of the second table."""
  normal = lambda x: 0.5 * (1 + jax.scipy.special.erf(x / 2 ** 0.5))
  return 1 - normal(jnp.log(jnp.maximum(n, 1e-9) / C))


def ends_by_length(config, params, token_S, slots, prefix, own):
  """decode.decode, with STOP as probable as its place in a log-normal length makes it."""
  logits_SV, own = _DECODE(config, params, token_S, slots, prefix, own)
  n_S = slots.count_S.astype(float)  # tokens so far
  hazard_S = jnp.clip(1 - survival(n_S + 1) / survival(n_S), 1e-6, 1 - 1e-6)
  others_S = jax.nn.logsumexp(logits_SV.at[:, STOP].set(-jnp.inf), axis=-1)
  return logits_SV.at[:, STOP].set(others_S + jnp.log(hazard_S / (1 - hazard_S))), own


class Ours:
  """Our sampler; each call is of another key."""

  def __init__(self, slots: int, heavy: bool):
    rng = np.random.default_rng(0)
    self._prompts = types.Prompts(
        rng.integers(2, POLICY.vocab_size, (M, P)).astype(np.int32), np.full(M, P, np.int32),
        np.arange(M, dtype=np.int32))
    self.longest = LONGEST if heavy else C
    # What no token is ends nothing.
    self._config = knobs.sampler(
        slots=slots, refill=1, prefill=M, prompt_length=P, completion_length=self.longest,
        stop_ids=(STOP,) if heavy else (-1,))
    self._decode = ends_by_length if heavy else _DECODE
    self._params = policy.init(POLICY, jax.random.key(0))
    self._step = 0

  def __call__(self) -> tuple[float, types.Rollouts]:
    """Seconds, from the parameters that are trained on, and what was sampled."""
    self._step += 1
    start = time.perf_counter()
    with mock.patch.object(decode, 'decode', self._decode):
      rollouts = sample.rollouts(
          POLICY, decode.sampling_params(POLICY, self._params), self._prompts, np.full(M, N),
          jax.random.key(self._step), self._config, total=M * N)
    rollouts = jax.tree.map(np.asarray, rollouts)
    return time.perf_counter() - start, rollouts


def measure(ours: Ours, peers: dict[str, Peer], slots: int, repeats: int) -> dict:
  """Tokens a second of all sides, and ratios."""
  times, used = {name: [] for name in ('ours', *peers)}, []
  tokens = []
  for i in tqdm(range(repeats + 1), file=sys.stderr):
    seconds, rollouts = ours()
    while rollouts.length_R.max() < ours.longest:
      seconds, rollouts = ours()
    length_R = rollouts.length_R
    row = {'ours': seconds} | {name: peer(str(ours.longest)) for name, peer in peers.items()}
    if i:  # the first compiles
      for name, seconds in row.items():
        times[name].append(seconds)
      tokens.append(length_R.sum())
      used.append(length_R.sum() / (slots * int(rollouts.decode_steps)))
  tokens = np.array(tokens)
  figures = {f'{name}_tokens_per_s': float(np.median(tokens / seconds)) for name, seconds in times.items()}
  for name in peers:
    ratio = np.array(times[name]) / times['ours']
    figures |= {f'{name}_ratio': float(np.median(ratio)),
                f'{name}_ratio_range': [float(ratio.min()), float(ratio.max())]}
  return figures | {'tokens': float(tokens.mean()), 'slots': slots,
                    'slot_utilization': float(np.median(used))}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--peer', help='interpreter of an environment with google-tunix 0.1.7')
  parser.add_argument('--parity', help='interpreter of an environment with torch and transformers')
  parser.add_argument('--slots', type=int, default=[128, 16], nargs=2, help='ours: equal lengths, drawn')
  parser.add_argument('--repeats', type=int, default=[5, 2], nargs=2, help='rounds, in the same order')
  parser.add_argument('--json', action='store_true', help='print one JSON object last')
  args = parser.parse_args()
  scripts = {'tunix': (args.peer, 'tunix_sampler.py'),
             'transformers': (args.parity, 'transformers_sampler.py')}
  print(machine.describe())
  tables, about = {}, {}
  for table, slots, repeats in zip(('equal', 'drawn'), args.slots, args.repeats):
    ours = Ours(slots, table == 'drawn')
    peers = {name: Peer(python, script, f'--longest={ours.longest}')
             for name, (python, script) in scripts.items() if python}
    figures = tables[table] = measure(ours, peers, slots, repeats)
    about |= {name: peer.close() for name, peer in peers.items()}
    print(f'{table} lengths: {figures["ours_tokens_per_s"]:,.0f} tokens/s, {slots} slots '
          f'{figures["slot_utilization"]:.0%} in use', *(
              f'; {name} {figures[f"{name}_tokens_per_s"]:,.0f}: {figures[f"{name}_ratio"]:.2f} times '
              '({:.2f}..{:.2f})'.format(*figures[f'{name}_ratio_range']) for name in peers))
  if args.json:
    print(json.dumps({'machine': machine.describe(), **tables['equal'], 'drawn': tables['drawn'], **about}))


if __name__ == '__main__':
  main()
