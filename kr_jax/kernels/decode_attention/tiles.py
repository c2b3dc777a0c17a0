"""The number of columns of the cache in a block of the kernel."""

from __future__ import annotations

from kr_jax.kernels.chip import LANES, SUBLANES, of_chip, round_up

# What a step of the grid takes in addition to its work, if any: a common figure, not timed here.
STEP_SECONDS = 0.35e-6

# Bytes a second that a core reads from memory. This is the v5e, for programs compiled where no chip is known.
BANDWIDTH = 8.2e11

# Seven eighths of 16 MiB: 16 MiB are all VMEM of v4, and what libtpu gives a kernel unasked on v5e. On chips with
# more VMEM larger blocks would gain nothing, as the table below shows.
VMEM = 14 * 2**20


def _bytes_of_column(K: int, G: int, H: int, itemsize: int) -> int:
  """Bytes of VMEM that a column takes. libtpu 0.0.42.1 refused no block that this function lets in.

  There are two buffers for keys and values, and four times the logits, float32 in whole registers. With int8
  there are also two buffers for the two scales, and a copy of keys and values in bfloat16.
  """
  width = round_up(H, LANES)
  integers = 2 * K * width * 2 + 4 * 4 * max(K, SUBLANES) if itemsize == 1 else 0
  return 4 * K * width * itemsize + integers + 4 * 4 * K * round_up(G, SUBLANES)


def block(T: int, K: int, G: int, H: int, itemsize: int) -> int | None:
  """Columns of a block, T or a multiple of 128; or None if not even 128 fit.

  The fewer the blocks, the fewer the steps; but a slot has no use for half of its last block, on average.
  With 2560 columns, G = 4 and H = 128 (by this count, not timed):
                       v4     v5e    v5p    v6e    tpu7x
    K = 8, bfloat16    512    640    640    896    1280
    K = 8, int8        640    896    1280   1280   1280
    K = 2, bfloat16    1280   1280   1280   1280   2560
    K = 2, int8        1280   1280   2560   2560   2560

  Args:
    T: columns.
    K: key/value heads, G query heads to each.
    H: width of a head.
    itemsize: bytes of a number of the cache.
  """
  step = STEP_SECONDS * of_chip('mem_bw_bytes_per_second', BANDWIDTH)  # in bytes that could have been read
  column = 2 * K * (round_up(H, LANES) * itemsize + (4 if itemsize == 1 else 0))
  most = VMEM // _bytes_of_column(K, G, H, itemsize)
  fitting = [n for n in range(round_up(T, LANES), 0, -LANES) if n <= most]
  return min(T, min(fitting, key=lambda n: -(-T // n) * step + n * column / 2)) if fitting else None
