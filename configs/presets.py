"""Presets: what a paper publishes of its loss or its rule, as knobs.

    launch/local.sh configs/arithmetic.py:dapo --config.grpo.clip_high=0.3

A preset is a variant of a config. It sets all the knobs that its paper speaks of, before flags are applied, so
that a flag has the last word and config.json holds what ran.
"""

from __future__ import annotations

import functools
from typing import Any

import ml_collections

# What a paper that says nothing else has.
_PLAIN = {'advantage': 'std', 'weight': 'rollout', 'aggregate': 'token', 'loss': 'grpo', 'clip_low': 0.2,
          'clip_high': 0.2, 'dual_clip': 0.0, 'kl_coef': 0.0, 'entropy_coef': 0.0, 'tis_cap': 0.0, 'keep': 1.0}
LOSSES: dict[str, dict[str, Any]] = {
    # Shao et al. 2024, arXiv 2402.03300, eq. 3 and 4.
    'grpo': _PLAIN | {'aggregate': 'rollout', 'kl': 'k3', 'kl_coef': 0.04},
    # Liu et al. 2025, arXiv 2503.20783, section 3.2.
    'dr_grpo': _PLAIN | {'advantage': 'mean', 'aggregate': 'constant'},
    # Yu et al. 2025, arXiv 2503.14476, eq. 10.
    'dapo': _PLAIN | {'clip_high': 0.28},
    # Zheng et al. 2025, arXiv 2507.18071, eq. 5-7. These limits are below the rounding between sampler and trainer:
    # ratios are to the trainer's own policy (update.has_own_ratios), and tis_cap weighs the sampler's error apart.
    'gspo': _PLAIN | {'aggregate': 'rollout', 'loss': 'gspo', 'clip_low': 3e-4, 'clip_high': 4e-4, 'tis_cap': 2.0},
    # MiniMax 2025, arXiv 2506.13585, eq. 4: a ratio has no lower limit; the upper one is not published.
    'cispo': _PLAIN | {'loss': 'cispo', 'clip_low': 1.0, 'clip_high': 0.28},
    # Ahmadian et al. 2024, arXiv 2402.14740, section 3.
    'rloo': _PLAIN | {'advantage': 'loo', 'aggregate': 'constant'},
    # Li et al. 2025, arXiv 2509.25849, and the authors' code.
    'paper_loss': _PLAIN | {'clip_high': 0.28, 'dual_clip': 10.0, 'tis_cap': 2.0},
}


def loss(c: ml_collections.ConfigDict, *, name: str) -> None:
  """Sets the section grpo to what a paper publishes."""
  c.grpo.update(LOSSES[name])


def paper_rule(c: ml_collections.ConfigDict) -> None:
  """The rule of Knapsack RL, arXiv 2509.25849, special cases of its code included."""
  c.alloc.update({'rule': 'knapsack', 'estimate': 'window', 'value': 'infogain', 'nu_every': 0,
                  'cost': 'rollouts', 'waves': 1, 'low': 2, 'high': 128})
  c.tasks.candidates_per_step = 0


def paper(c: ml_collections.ConfigDict) -> None:
  """Rule and loss of Knapsack RL."""
  paper_rule(c)
  loss(c, name='paper_loss')


def dynamic(c: ml_collections.ConfigDict) -> None:
  """Rule and loss of DAPO, arXiv 2503.14476, section 3.2; up to three generation batches a step."""
  c.alloc.update({'rule': 'dynamic', 'cost': 'rollouts', 'waves': 1, 'low': 0})
  c.tasks.candidates_per_step = 3 * c.tasks.per_step
  loss(c, name='dapo')


PRESETS = {'paper': paper, 'paper_rule': paper_rule, 'dynamic': dynamic,
           **{name: functools.partial(loss, name=name) for name in LOSSES}}
