"""The exact multiple-choice knapsack: the forward pass by backend, and the way back through it.

The forward pass takes maxima only and keeps `best` of every task. Values are integers, so the way back finds each
choice again from the row before it, by J sums a task. Keeping the choice in every cell instead would double the
work of the forward pass.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kr_jax.kernels.knapsack import kernel
from kr_jax.kernels.knapsack import tiles
from kr_jax.kernels.knapsack.reference import NEG

_BLOCK = 8  # candidates of a loop iteration; on a CPU 32 were 20 times slower


def best(value_MJ: jax.Array, cost_M: jax.Array, *, capacity: int) -> jax.Array:
  """best_MU of the module reference, for CPU and GPU; cost_M in 1..capacity + 1."""
  U, (M, J) = capacity + 1, value_MJ.shape
  blocks = -(-J // _BLOCK)
  value_MJ = jnp.pad(value_MJ, ((0, 0), (0, blocks * _BLOCK - J)))

  def add(best_U, task):
    value_J, cost = task
    padded = jnp.concatenate([jnp.full(U, NEG), best_U])

    def add_block(i, new_U):
      for k in range(_BLOCK):
        j = i * _BLOCK + k
        # A shift by U puts everything out of reach: candidates that cost too much, and the padding of J.
        shift = jnp.where(j < J, jnp.minimum(cost * j, U), U)
        new_U = jnp.maximum(new_U, jax.lax.dynamic_slice(padded, (U - shift,), (U,)) + value_J[j])
      return new_U

    affordable = jnp.where(cost > capacity, 0, jnp.minimum(blocks, capacity // cost // _BLOCK + 1))
    new_U = jax.lax.fori_loop(0, affordable, add_block, best_U + value_J[0])
    return new_U, new_U

  nothing_U = jnp.full(U, NEG).at[0].set(0)
  return jax.lax.scan(add, nothing_U, (value_MJ, cost_M))[1]


def trace(best: jax.Array, value_MJ: jax.Array, cost_M: jax.Array, spend: jax.Array, *, capacity: int, exact: bool
          ) -> jax.Array:
  """unit_M of a table of any shape [M, ...] that holds best[m, u], u = 0..capacity, in order."""
  M, J = value_MJ.shape
  j_J = jnp.arange(J)

  def step(u, task):
    m, value_J, cost = task
    source_J = u - cost * j_J
    before_J = best[jnp.maximum(m - 1, 0)].reshape(-1)[jnp.maximum(source_J, 0)]
    before_J = jnp.where(m > 0, before_J, jnp.where(source_J == 0, 0, NEG))
    unit = jnp.argmax(jnp.where(source_J >= 0, before_J + value_J, NEG))  # the first of equals
    return u - cost * unit, unit

  last_U = best[M - 1].reshape(-1)[:capacity + 1]
  spent = spend if exact else jnp.argmax(jnp.where(jnp.arange(capacity + 1) <= spend, last_U, NEG))
  return jax.lax.scan(step, spent, (jnp.arange(M), value_MJ, cost_M), reverse=True)[1]


@functools.partial(jax.jit, static_argnames=('capacity', 'exact'))
def knapsack(value_MJ: jax.Array, cost_M: jax.Array, spend: jax.Array | int | None = None, *,
             capacity: int, exact: bool) -> jax.Array:
  """How many units each task gets for the largest summed value, within what they may cost.

  Args:
    value_MJ: int32, the value of giving task m j units, of any sign; sum_m max_j |value| must be below 2^29. Or
      FORBIDDEN where task m must not have j units: then value 0 must be 0 for all tasks, and some choice be allowed.
    cost_M: int32 >= 1, of a unit of each task.
    spend: int32 in 0..capacity, the amount to spend; None: the capacity.
    capacity: the size of the table, a constant of the program, unlike `spend`.
    exact: whether all is spent, which must be possible (up to M * (J - 1) if every cost is 1), or at most all.

  Returns:
    unit_M, int32 in 0..J-1. Ties go to the least spent, then to the fewest units for the last task, and so on back.

  Raises:
    ValueError: shapes that do not fit, or a capacity that is negative or so large that offsets overflow.
    TypeError: values or costs that are not int32.
  """
  value_MJ, cost_M = jnp.asarray(value_MJ), jnp.asarray(cost_M)
  if value_MJ.ndim != 2 or cost_M.shape != value_MJ.shape[:1] or not value_MJ.size:
    raise ValueError('the knapsack needs values [M, J] and costs [M], M and J at least 1, '
                     f'not of shapes {value_MJ.shape} and {cost_M.shape}')
  if (value_MJ.dtype, cost_M.dtype) != (jnp.int32, jnp.int32):
    raise TypeError(f'values and costs must be int32, not {value_MJ.dtype} and {cost_M.dtype}')
  J = value_MJ.shape[1]
  if not 0 <= capacity < 2**31 // J - 1:
    raise ValueError(f'capacity={capacity} must lie in 0..{2**31 // J - 2} with {J} candidates')
  # A unit that is too expensive may as well cost capacity + 1. Offsets then fit int32.
  cost_M = jnp.minimum(cost_M, capacity + 1)
  spend = jnp.asarray(capacity if spend is None else spend, jnp.int32)
  back = functools.partial(trace, capacity=capacity, exact=exact)

  def on_any(value_MJ, cost_M, spend):
    return back(best(value_MJ, cost_M, capacity=capacity), value_MJ, cost_M, spend)

  def on_tpu(value_MJ, cost_M, spend):
    rows, tile_rows = tiles.rows(capacity)
    return back(kernel.best(value_MJ, cost_M, rows=rows, tile_rows=tile_rows), value_MJ, cost_M, spend)

  if not tiles.fits(capacity):
    return on_any(value_MJ, cost_M, spend)
  # By the platform that the program is lowered for, which need not be the platform it is lowered on.
  return jax.lax.platform_dependent(value_MJ, cost_M, spend, tpu=on_tpu, default=on_any)
