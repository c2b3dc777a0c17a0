"""The forward pass of the knapsack on a TPU: the table stays in VMEM, a copy a task streams out.

The table is a scratch buffer [tile_rows + rows, 128]. Entry u is in row tile_rows + u // 128 and lane u % 128. The
tile before entry 0 is padding, which no choice reaches. A candidate j reads the table s = cost * j entries to the
left: whole rows and then lanes, which a select between two rows and one rotation shift. Tiles are updated in
place from the last to the first, as a candidate reads nothing to the right of what it writes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from kr_jax.kernels.chip import LANES
from kr_jax.kernels.knapsack.reference import NEG


def _add_task(cost_M_ref, value_J_ref, best_ref, table_ref, *, num_budgets: int, tile_rows: int):
  """One task: table <- max over its candidates, and best <- table."""
  tiles = best_ref.shape[0] // tile_rows
  shape = (tile_rows, LANES)
  lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  cost = cost_M_ref[pl.program_id(0)]

  @pl.when(pl.program_id(0) == 0)
  def _():
    def clear(i, _):
      origin = (i == 1) & (jax.lax.broadcasted_iota(jnp.int32, shape, 0) == 0) & (lane == 0)
      table_ref[pl.ds(pl.multiple_of(i * tile_rows, 8), tile_rows), :] = jnp.where(origin, 0, NEG)

    jax.lax.fori_loop(0, tiles + 1, clear, None)

  def update(i, _):
    first = pl.multiple_of((tiles - 1 - i) * tile_rows, 8)  # of the tile, in the unpadded table
    here = pl.ds(pl.multiple_of(first + tile_rows, 8), tile_rows)
    # lax.div of numbers >= 0, as the sign that // asks for cannot be lowered without a TPU here.
    most = jax.lax.div((first + tile_rows) * LANES - 1, cost)

    def candidate(j, best):
      # s is at most the tile's last entry, so that first - rows - 1 >= -tile_rows: in the padding.
      s = cost * j
      rows, lanes = jax.lax.div(s, LANES), jax.lax.rem(s, LANES)
      near = table_ref[pl.ds(first + tile_rows - rows, tile_rows), :]
      far = table_ref[pl.ds(first + tile_rows - rows - 1, tile_rows), :]
      moved = pltpu.roll(jnp.where(lane < LANES - lanes, near, far), lanes, 1)
      return jnp.maximum(best, moved + value_J_ref[0, j])

    end = jnp.minimum(most, num_budgets - 1) + 1
    best = jax.lax.fori_loop(1, end, candidate, table_ref[here, :] + value_J_ref[0, 0])
    table_ref[here, :] = best
    best_ref[pl.ds(first, tile_rows), :] = best

  jax.lax.fori_loop(0, tiles, update, None)


def best(value_MJ: jax.Array, cost_M: jax.Array, *, rows: int, tile_rows: int, interpret: Any = False) -> jax.Array:
  """best[m, u] of the module reference, for u < 128 * rows.

  Args:
    value_MJ: int32.
    cost_M: int32, in 1..128 * rows.
    rows: of the table, a multiple of tile_rows.
    tile_rows: rows updated at a time, a multiple of 8.
    interpret: False, or pltpu.InterpretParams to run where there is no TPU.

  Returns:
    int32 [M, rows, 128]: best[m, u] is at [m, u // 128, u % 128].
  """
  M, J = value_MJ.shape
  return pl.pallas_call(
      functools.partial(_add_task, num_budgets=J, tile_rows=tile_rows),
      out_shape=jax.ShapeDtypeStruct((M, rows, LANES), jnp.int32),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(M,),
          in_specs=[pl.BlockSpec((None, 1, J), lambda m, _: (m, 0, 0), memory_space=pltpu.SMEM)],
          out_specs=pl.BlockSpec((None, rows, LANES), lambda m, _: (m, 0, 0)),
          scratch_shapes=[pltpu.VMEM((tile_rows + rows, LANES), jnp.int32)]),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('arbitrary',)),
      interpret=interpret,
      name='knapsack',
  )(cost_M, value_MJ[:, None])
