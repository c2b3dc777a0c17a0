"""Sizes of blocks and tiles, and when a kernel's tiles fit."""

from __future__ import annotations

from kr_jax.kernels.chip import LANES, of_chip, round_up

# Columns of a block of logits outside the kernel: [T, 2048] in float32, 8 kB a token. Forward and backward on two
# CPU cores, T = 2048, D = 576, V = 49152, float32, against 2764 ms of plain logits:
#   columns       1024    2048    4096    8192
#   ms            2683    2539    2527    2529
# Up to this V there is one block, which is not computed twice: with V = 1024 and D = 256 it took 34.6 ms, two
# blocks of 512 took 47.7, plain logits 34.5.
BLOCK_WIDTH = 2048

# Of tokens and of columns, the best first; which of them fits depends on the chip. Bytes moved for a floating-point
# operation decide the order (bfloat16; a chip can do 224 operations for a byte that it reads on v4, 240 on v5e,
# 166 on v5p, 560 on v6e, 313 on tpu7x; not timed):
#   forward   a tile of the output matrix is read for 2 * tile_T * D * tile_V operations: tile_T a byte;
#   backward  a tile of tokens, 2 bytes, and of their gradient, 4 in and 4 out, move for 6 * tile_T * D * tile_V:
#             0.6 * tile_V a byte.
# With D = 2560 the passes get (1024, 512) and (256, 1024) on all but v4, and there (512, 256) and (128, 256), with
# which the backward pass waits for memory: 154 a byte. Larger tiles take libtpu longer, as it unrolls them:
# (512, 1024) backward twice as long as (256, 1024), 10 seconds or more.
FORWARD = ((1024, 512), (1024, 256), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128))
BACKWARD = ((256, 1024), (256, 512), (128, 512), (256, 256), (128, 256), (256, 128), (128, 128))

# Float32 is multiplied in six passes of bfloat16 parts and has only twice the bytes, so a third of a tile is
# enough. Unrolled, the program of a tile is six times as long.
MOST_LOGITS_FLOAT32 = 2**16

LEAST_VMEM = 16 * 2**20  # v4, the least of all chips with a kernel


def vmem() -> int:
  """Bytes of VMEM. A program compiled elsewhere without a mesh does not know its chip and must fit all of them."""
  return of_chip('vmem_capacity_bytes', LEAST_VMEM)


def _working_bytes(D: int, itemsize: int, tile_T: int, tile_V: int) -> int:
  """Bytes in addition to the blocks, for both passes; found by lowering the limit until libtpu 0.0.42.1 refused.

  Eight tiles of logits in float32, columns of tokens (a number takes a row of 128 lanes) in two buffers each, and
  of float32 matrices the three bfloat16 parts that they are multiplied in.
  """
  parts = 6 * D * (tile_T + tile_V) if itemsize == 4 else 0
  return 8 * 4 * tile_T * tile_V + 8 * 4 * LANES * tile_T + parts


def _forward_bytes(D: int, itemsize: int, tile_T: int, tile_V: int) -> int:
  """Two buffers for tokens and for the output matrix."""
  return 2 * itemsize * D * (tile_T + tile_V) + _working_bytes(D, itemsize, tile_T, tile_V)


def _backward_bytes(D: int, itemsize: int, tile_T: int, tile_V: int) -> int:
  """Two buffers for tokens, the output matrix and its gradient; both gradients in float32; a product."""
  return (D * tile_V * (4 * itemsize + 4) + D * tile_T * (2 * itemsize + 4)
          + 4 * D * max(tile_T, tile_V) + _working_bytes(D, itemsize, tile_T, tile_V))


def _best(sizes, count, T: int, D: int, itemsize: int) -> tuple[int, int] | None:
  """The first size that takes at most seven eighths of VMEM, with no more rows than there are tokens."""
  for tile_T, tile_V in sizes:
    if itemsize == 4 and tile_T * tile_V > MOST_LOGITS_FLOAT32:
      continue
    if count(D, itemsize, tile_T, tile_V) <= vmem() * 7 // 8:
      tiles = -(-T // tile_T)
      return round_up(-(-T // tiles), LANES), tile_V
  return None


def forward(T: int, D: int, itemsize: int) -> tuple[int, int] | None:
  """(tile_T, tile_V) of the forward pass, or None if D is too large for any."""
  return _best(FORWARD, _forward_bytes, T, D, itemsize)


def backward(T: int, D: int, itemsize: int) -> tuple[int, int] | None:
  """(tile_T, tile_V) of the backward pass, or None if D is too large for any."""
  return _best(BACKWARD, _backward_bytes, T, D, itemsize)
