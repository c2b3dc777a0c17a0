"""Tile sizes of the knapsack kernel, and when its table fits."""

from kr_jax.kernels.chip import LANES, SUBLANES, round_up

# Rows of 128 lanes that one pass over the candidates keeps in registers, for every chip. The more rows are in
# flight, the better the latency of the rotations is hidden, until registers spill. Cycles that a candidate takes
# for 1024 entries, counted in the instructions that libtpu 0.0.42.1 emits (not timed):
#   rows               64    128   192
#   v4                 7.1   6.7   6.1 with 10 times the spills
#   v5e, v5p           5.8   5.1   4.7
#   v6e, tpu7x         4.4   3.6   3.5
TILE_ROWS = 128

# The table and the two buffers of its streamed copy are int32. The least VMEM that a kernel gets unasked is 16 MiB
# (v4); a quarter of it is left to the compiler.
MAX_ROWS = 12 * 2**20 // (3 * 4 * LANES)


def rows(capacity: int) -> tuple[int, int]:
  """Rows of a table of capacity + 1 entries and of its tiles: whole tiles, whole registers."""
  least = -(-(capacity + 1) // LANES)
  tiles = -(-least // TILE_ROWS)
  tile_rows = round_up(-(-least // tiles), SUBLANES)
  return tiles * tile_rows, tile_rows


def fits(capacity: int) -> bool:
  """Whether the table and its padding, a tile, are small enough for VMEM."""
  return sum(rows(capacity)) <= MAX_ROWS
