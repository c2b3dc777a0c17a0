"""The multiple-choice knapsack as the textbook has it: the specification.

    best[m, u] = max_j best[m - 1, u - cost_m * j] + value[m, j],   0 <= j < J,  cost_m * j <= u
    best[-1, 0] = 0, the rest of best[-1] is out of reach

Source: Kellerer, Pferschy, Pisinger 2004, Knapsack Problems, section 11.5. Every cell keeps its choice here;
ops.py keeps `best` alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# The value of entries that no choice reaches. With S = sum_m max_j |value| < 2^29, the entries in reach lie within
# -S..S, above -2^29. The others, NEG with values added to it, lie within NEG - S..NEG + S, below -2^29. So an entry
# out of reach never wins over an entry in reach, and no sum wraps. NEG as the value of a candidate forbids it: it puts
# an entry in reach out of it. Where no units are worth 0, no entry falls below NEG, so that NEG + NEG does not wrap.
NEG = -2**30


def knapsack(value_MJ: jax.Array, cost_M: jax.Array, *, capacity: int, exact: bool) -> jax.Array:
  """unit_M, as `ops.knapsack` documents it."""
  u_U = jnp.arange(capacity + 1)
  j_J = jnp.arange(value_MJ.shape[1])
  # A unit that is too expensive may as well cost capacity + 1. The cost of J of them then fits int32.
  cost_M = jnp.minimum(cost_M, capacity + 1)

  def add(best_U, task):
    value_J, cost = task
    source_UJ = u_U[:, None] - cost * j_J[None]
    best_UJ = jnp.where(source_UJ >= 0, best_U[source_UJ], NEG) + value_J[None]
    return best_UJ.max(axis=1), jnp.argmax(best_UJ, axis=1)  # argmax: the first of equals

  best_U, unit_MU = jax.lax.scan(add, jnp.where(u_U == 0, 0, NEG), (value_MJ, cost_M))

  def trace(u, task):
    unit_U, cost = task
    return u - cost * unit_U[u], unit_U[u]

  spent = jnp.array(capacity) if exact else jnp.argmax(best_U)
  _, unit_M = jax.lax.scan(trace, spent, (unit_MU, cost_M), reverse=True)
  return unit_M
