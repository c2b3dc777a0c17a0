"""Times the sampler, beside those of google-tunix and transformers where they are at hand.

    .venv/bin/python -m tests.benchmarks.sampler [--peer=PYTHON] [--parity=PYTHON] [--json]
    .venv/bin/python -m tests.benchmarks.sampler --waves 1 2 3

4 layers of width 256, ffn 768, 4 heads, vocabulary 1024, float32; 16 prompts of 64 tokens, 8 rollouts of
each, at temperature 1 with log-probabilities. First all of 64 tokens; then of log-normal lengths (median
64, sigma 1, at most 512), for which a static batch waits until the longest is done: the others sample 512
tokens, and only those that our rollouts keep are counted. What we drew with none so long is drawn again.

PYTHON of --peer has google-tunix 0.1.7, that of --parity torch 2.13.0 and transformers (the [parity]
extra). All sides sample in turn, so that a machine's noise meets all; times are medians, of ratios the
median over the rounds and its range.

--waves compares waves within a step instead, at the sizes of configs/arithmetic.py: 256 rollouts of 64 tasks, of
budgets that differ as Dirichlet(1) beyond 2 each, with the 2 d + 1 tokens that a task of difficulty d takes. Each wave
waits until the host has the tokens of the one before; verdicts are not counted. All are in turn, too; ratios are to
the first of --waves with the first of --wave_slots.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from configs import arithmetic
from kr_jax import completions
from kr_jax import sample
from kr_jax import types
from kr_jax.allocation import allocate
from kr_jax.model import decode
from kr_jax.model import policy
from kr_jax.model.tokenizer import STOP
from tests import knobs
from tests.benchmarks import machine
from tests.benchmarks.peer import Peer
from tests.benchmarks.update import M, N, P, POLICY

C, LONGEST = 64, 512
_DECODE, _PREFILL = decode.decode, decode.prefill


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


# Waves, at the sizes of configs/arithmetic.py.

DIFFICULTIES = np.arange(3, 11)


def ends_never(config, params, token_BP, length_B, **more):
  """decode.prefill, after which no completion ends at once."""
  logits_BV, cache = _PREFILL(config, params, token_BP, length_B, **more)
  return logits_BV.at[:, STOP].set(-1e9), cache


def ends_by_difficulty(config, params, token_S, slots, prefix, own):
  """decode.decode, with STOP after the tokens of a worked solution. A prompt's length says the difficulty here."""
  logits_SV, own = _DECODE(config, params, token_S, slots, prefix, own)
  is_end_S = slots.count_S == 2 * (slots.prompt_length_S - DIFFICULTIES[0])
  is_stop_V = jnp.arange(logits_SV.shape[1]) == STOP
  return jnp.where(is_stop_V[None], jnp.where(is_end_S, 1e9, -1e9)[:, None], logits_SV), own


class Step:
  """The sampler of a step, in waves; each call is of another key, and of other tasks and budgets."""

  def __init__(self, waves: int, slots: int):
    c = arithmetic.get_config().unlock()
    c.alloc.waves = waves
    self.slots, self._alloc, self._M, self._P = slots, c.alloc, c.tasks.per_step, c.sample.prompt_length
    sizes = 'num_layers', 'width', 'num_heads', 'num_kv_heads', 'head_width', 'hidden_width'
    self._policy = policy.Config(vocab_size=16, **{name: c.policy[name] for name in sizes})
    self._config = knobs.sampler(slots=slots, refill=c.sample.refill, prefill=c.sample.prefill,
                                 prompt_length=self._P, completion_length=c.sample.completion_length)
    self._params = policy.init(self._policy, jax.random.key(0))

  def __call__(self, step: int) -> tuple[float, int, int]:
    """Seconds, from the parameters that are trained on; tokens and decoding steps."""
    rng = np.random.default_rng(step)
    difficulty_M = rng.choice(DIFFICULTIES, self._M)
    prompts = types.Prompts(rng.integers(2, 16, (self._M, self._P)).astype(np.int32),
                            np.int32(difficulty_M + DIFFICULTIES[0]), np.arange(self._M, dtype=np.int32))
    totals = allocate.wave_rollouts(self._alloc)
    lows = [self._alloc.low // len(totals) + (w < self._alloc.low % len(totals)) for w in range(len(totals))]
    share_M = rng.dirichlet(np.ones(self._M))
    budget_WM = [low + rng.multinomial(total - low * self._M, share_M) for total, low in zip(totals, lows)]
    start = time.perf_counter()
    with mock.patch.multiple(decode, prefill=ends_never, decode=ends_by_difficulty):
      waves = sample.Waves(self._policy, decode.sampling_params(self._policy, self._params), prompts,
                           jax.random.key(step), self._config, totals=totals)
      rollouts = []
      for budget_M in budget_WM:
        rollouts.append(waves.sample(budget_M, 2.0 * difficulty_M + 1))
        np.asarray(rollouts[-1].token_RC)  # what is verified before the next budgets
      joined = jax.block_until_ready(completions.join(rollouts, waves.rows))
    seconds, length_R = time.perf_counter() - start, np.asarray(joined.length_R)
    assert np.array_equal(length_R, 2 * difficulty_M[joined.task_R] + 1)
    return seconds, int(length_R.sum()), int(joined.decode_steps)


def measure_waves(numbers: list[int], slots: list[int], repeats: int) -> list[dict]:
  """Of each number of waves and of slots: milliseconds, the ratio to the first, and the share of slots in use."""
  sides = {key: Step(*key) for key in itertools.product(numbers, slots)}
  found = {key: [] for key in sides}
  for step in tqdm(range(repeats + 1), file=sys.stderr):
    for key, side in sides.items():
      found[key].append(side(step))
  first_T = np.array(next(iter(found.values())))[1:, 0]
  rows = []
  for (waves, S), measured in found.items():
    seconds_T, tokens_T, steps_T = np.array(measured)[1:].T  # the first compiles
    ratio_T = seconds_T / first_T
    rows.append({'waves': waves, 'slots': S, 'ms': 1e3 * float(np.median(seconds_T)),
                 'ratio': float(np.median(ratio_T)), 'ratio_quartiles': np.quantile(ratio_T, (0.25, 0.75)).tolist(),
                 'decode_steps': float(np.mean(steps_T)), 'slot_utilization': float((tokens_T / steps_T / S).mean())})
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--peer', help='interpreter of an environment with google-tunix 0.1.7')
  parser.add_argument('--parity', help='interpreter of an environment with torch and transformers')
  parser.add_argument('--slots', type=int, default=[128, 16], nargs=2, help='ours: equal lengths, drawn')
  parser.add_argument('--repeats', type=int, default=[5, 2], nargs=2, help='rounds, in the same order')
  parser.add_argument('--waves', type=int, nargs='+', choices=(1, 2, 3), help='compare waves within a step instead')
  parser.add_argument('--wave_slots', type=int, default=[128, 64], nargs='+', help='of each of --waves')
  parser.add_argument('--wave_repeats', type=int, default=40, help='steps of each')
  parser.add_argument('--json', action='store_true', help='print one JSON object last')
  args = parser.parse_args()
  if args.waves:
    print(machine.describe())
    rows = measure_waves(args.waves, args.wave_slots, args.wave_repeats)
    for row in rows:
      print('{waves} waves, {slots} slots: {ms:.1f} ms, {ratio:.2f} times (half of the steps {low:.2f} to {high:.2f}), '
            '{decode_steps:.1f} decoding steps, slots {slot_utilization:.0%} in use'.format(
                **row, low=row['ratio_quartiles'][0], high=row['ratio_quartiles'][1]))
    if args.json:
      print(json.dumps({'machine': machine.describe(), 'waves': rows}))
    return
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
