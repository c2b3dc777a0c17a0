"""The figures of the updates of a batch, of the sums that each measured on the device.

An update that was skipped, as its loss or gradient was not finite, is in no figure but `skipped`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kr_jax.types import Array

# Edges of the bins in which the logs of ratios are counted: each is a tenth further from 0 than the one before.
_SIZES = 1e-4 * 1.1 ** np.arange(120)
LOG_RATIO_EDGES = np.concatenate([-_SIZES[::-1], _SIZES]).astype(np.float32)
_KNOWN = ('skipped', 'padding_waste', 'attention_waste')  # though nothing was learnt
_BY_ARRAY = ('largest', 'grad_norms')  # of parameters and of the optimiser's state; they tell why an update was skipped


def summarize(measured: Sequence[dict[str, Array]]) -> dict[str, float | None]:
  """One record of the updates of a batch, fetched from the device.

  Returns:
    skipped: the number of updates that were; the figures are of the others, and None where these had
      no token to learn from.
    loss, grad_norm (before the clip): means over the updates.
    padding_waste, attention_waste: of pack.waste.
    tokens_updated: the number of tokens with a gradient, of all updates. The figures below are means over them.
    clip_fraction_first: the clipped share of the first update alone, before the policy has moved; where it is not
      near 0, the clip takes rounding between sampler and trainer for movement of the policy.
    policy_entropy, in nats; clip_fraction_low and clip_fraction_high; kl and tis_weight, where they are in the loss.
    logp_error: |logp - the sampler's logp|, of the first update alone, before the policy has moved.
    policy_fidelity: 1 - sqrt(JS), of the divergence in bits between the policies of sampler and trainer, of the same
      tokens: 1 where they are one policy; None where there is no token.
    argmax_agreement: of these tokens, among those that sampler or trainer gives a probability above 1/2, the share that
      both do. Such a token is surely the likeliest; where only one is above 1/2, the other may still agree, so that
      the share is the least that agree. None where there is no such token.
    ratio_p01, ratio_p50, ratio_p99: quantiles of the ratio to the old policy; their log is exact to 10 %.
    expert_load: tokens that the busiest expert of a layer was sent over those of the mean expert, a mean over layers;
      experts_unused: share of all layers' experts that no token was sent to; both where there are experts.
  """
  measured = jax.device_get(measured)
  done = [m for m in measured if not m['skipped']]
  record = _of_updates(measured[0], done or measured) | {'skipped': len(measured) - len(done)}
  if record['skipped'] and not any(m['tokens_updated'] for m in done):
    record |= dict.fromkeys(set(record) - set(_KNOWN)) | {'tokens_updated': 0}
  return {name: _number(x) for name, x in record.items()}


def _of_updates(first: dict[str, Any], measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
  sums = {name: np.sum([m[name] for m in measured], axis=0) for name in measured[-1] if name not in _BY_ARRAY}
  tokens, first_tokens = max(int(sums['tokens_updated']), 1), max(int(first['tokens_updated']), 1)
  record = {'loss': sums['loss'] / len(measured), 'grad_norm': sums['grad_norm'] / len(measured),
            'tokens_updated': sums['tokens_updated'],
            'padding_waste': first['padding_waste'], 'attention_waste': first['attention_waste'],
            'logp_error': first['logp_error'] / first_tokens,
            'clip_fraction_first': (first['clipped_low'] + first['clipped_high']) / first_tokens,
            'clip_fraction_low': sums['clipped_low'] / tokens, 'clip_fraction_high': sums['clipped_high'] / tokens}
  record |= _fidelity(first)
  record |= {name: sums[name] / tokens for name in ('policy_entropy', 'kl', 'tis_weight') if name in sums}
  if 'load' in sums:
    load_LE = sums['load']
    record['expert_load'] = np.mean(load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-9))
    record['experts_unused'] = np.mean(load_LE == 0)
  return record | ratio_quantiles(sums['ratios'])


def _number(x: Any) -> float | int | None:
  """A plain number; None where it is not known, or not finite."""
  return None if x is None or not np.isfinite(x) else np.asarray(x).item()


def _fidelity(first: dict[str, np.ndarray]) -> dict[str, float | None]:
  """policy_fidelity and argmax_agreement, from the counts of the first update."""
  tokens, known = int(first['tokens_updated']), int(first['argmax_known'])
  # A mean over few tokens may be above 1, which the divergence is not.
  return {'policy_fidelity': 1 - np.sqrt(np.minimum(float(first['divergence']) / tokens, 1.0)) if tokens else None,
          'argmax_agreement': int(first['argmax_same']) / known if known else None}


def ratio_quantiles(count: np.ndarray) -> dict[str, float]:
  """Quantiles of the ratio from the counts in the bins of LOG_RATIO_EDGES; 1 where all counts are 0."""
  edges = LOG_RATIO_EDGES
  middle = np.concatenate([edges[:1], (edges[1:] + edges[:-1]) / 2, edges[-1:]])
  below = np.cumsum(count) / max(count.sum(), 1)
  return {f'ratio_p{round(100 * q):02}': float(np.exp(middle[np.searchsorted(below, q)])) if count.sum() else 1.0
          for q in (0.01, 0.5, 0.99)}
