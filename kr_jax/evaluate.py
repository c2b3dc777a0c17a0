"""Success on held-out tasks, by the program that samples in training.

    avg@k = mean over tasks of (verified rollouts of k) / k

The tasks are the independent draws, so the standard error is that of the mean of their rates. The
keys are folded from an evaluation key that never changes with the step: evaluations of one run
share their noise, and their differences are sharper than their standard errors say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kr_jax import policy
from kr_jax import rewards
from kr_jax import sample
from kr_jax import tasks as tasks_lib
from kr_jax import types


def success_rates(policy_config: policy.Config, params: Any, tasks: Sequence[types.Task],
                  key: jax.Array, sample_config: sample.Config, workers: rewards.Workers,
                  tokenizer, *, k: int, batch: int) -> np.ndarray:
  """Each task's share of verified rollouts among k.

  Args:
    batch: tasks a compiled program takes; the last batch is filled up with tasks it then drops.

  Returns:
    success_rate_I, float64.
  """
  rates = []
  for i in range(0, len(tasks), batch):
    some = list(tasks[i:i + batch])
    filled = (some * batch)[:batch]
    rollouts = sample.rollouts(
        policy_config, params, tasks_lib.prompts(filled, sample_config.prompt_length),
        np.full(batch, k), key, sample_config, total=batch * k)
    token_RC = np.asarray(rollouts.token_RC)[:len(some) * k]
    scores = workers.score([tokenizer.decode(token_C) for token_C in token_RC],
                           [task for task in some for _ in range(k)])
    rates.append(scores.verdict_R.reshape(len(some), k).mean(axis=1, dtype=float))
  return np.concatenate(rates)


def summarize(success_rate_I: np.ndarray, tasks: Sequence[types.Task], k: int) -> dict[str, float]:
  """avg@k and its standard error, over all tasks and by difficulty."""
  difficulty_I = np.array([task.difficulty for task in tasks])
  metrics = {}

  def add(prefix, rate_I):
    error = rate_I.std(ddof=1) / np.sqrt(len(rate_I)) if len(rate_I) > 1 else 0.0
    metrics[f'{prefix}avg@{k}'] = float(rate_I.mean())
    metrics[f'{prefix}avg@{k}_stderr'] = float(error)

  add('eval/', success_rate_I)
  for difficulty in np.unique(difficulty_I):
    add(f'eval/difficulty_{difficulty}/', success_rate_I[difficulty_I == difficulty])
  return metrics
