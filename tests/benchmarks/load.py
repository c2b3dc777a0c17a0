"""Measures the memory and the time in which a process loads its shard of a checkpoint.

    python -m tests.benchmarks.load [--gigabytes 16] [--processes 8] [--checkpoint PATH] [--model 1] [--json]

The checkpoint is made for it and sparse (tests/make_sparse_checkpoint.py), unless one is given. The processes, of one
device each, are joined as those of a run; a mesh of 'fsdp' and 'model' divides the parameters among them. Process 0
loads its shard, and its memory that is of no file (RssAnon: not the page cache) is sampled while it does; the others
wait, as this machine would not hold all shards. The ratio is of the most memory that loading took to the shard's size
in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time

from tests import make_sparse_checkpoint


def anonymous() -> int:
  """Bytes of this process that are of no file."""
  status = pathlib.Path('/proc/self/status').read_text()
  return 1024 * int(status.split('RssAnon:')[1].split()[0])


@contextlib.contextmanager
def sampled():
  """A list of two numbers: bytes that are of no file at first, and at most while in it."""
  found, stop = [anonymous()] * 2, threading.Event()

  def watch():
    while not stop.wait(0.002):
      found[1] = max(found[1], anonymous())

  thread = threading.Thread(target=watch)
  thread.start()
  try:
    yield found
  finally:
    stop.set()
    thread.join()


def measure(path: pathlib.Path, mesh) -> dict[str, float]:
  """Loads this process's shard onto a mesh; None: all of it onto one device."""
  import jax
  from kr_jax import sharding
  from kr_jax.model import weights
  config = weights.config(path)
  with sharding.on(mesh):
    jax.block_until_ready(jax.numpy.zeros(8) + 1)  # what is loaded once is no part of it
    with sampled() as found:
      started = time.monotonic()
      params = weights.params(path, config)
      jax.block_until_ready(params)
      seconds = time.monotonic() - started
  of_leaf = lambda x: sum({str(shard.index): shard.data.nbytes for shard in x.addressable_shards}.values())
  shard = sum(map(of_leaf, jax.tree.leaves(params)))
  return {'shard_bytes': shard, 'most_bytes': found[1] - found[0], 'ratio': (found[1] - found[0]) / shard,
          'seconds': seconds}


def _one(flags: argparse.Namespace) -> None:
  """One of the processes; the first measures, the others wait for it."""
  import jax
  from kr_jax import processes
  from kr_jax import sharding
  processes.start(flags.coordinator, flags.processes, flags.process)
  mesh = sharding.mesh(fsdp=flags.processes // flags.model, model=flags.model)
  if flags.process == 0:
    print(json.dumps(measure(flags.checkpoint, mesh)), flush=True)
  sys.stdin.read()  # until the first is done: one that ends takes the others with it
  jax.distributed.shutdown()


def run(checkpoint: pathlib.Path, processes: int, model: int) -> dict[str, float]:
  """What the first of so many processes measured."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  flags = [f'--processes={processes}', f'--model={model}', f'--checkpoint={checkpoint}',
           f'--coordinator=127.0.0.1:{port}']
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=1'}
  started = [subprocess.Popen([sys.executable, '-m', 'tests.benchmarks.load', *flags, f'--process={i}'], env=env,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for i in range(processes)]
  line = started[0].stdout.readline()
  for process in started:
    if line:
      process.stdin.close()
    else:  # the first has failed; the others would wait for it
      process.kill()
  codes = [process.wait() for process in started]
  if any(codes):
    raise RuntimeError(f'the processes ended with {codes}')
  return json.loads(line)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--gigabytes', type=float, default=16, help='of bfloat16')
  parser.add_argument('--processes', type=int, default=8)
  parser.add_argument('--model', type=int, default=1, help="length of the mesh's 'model'; 'fsdp' is the rest")
  parser.add_argument('--checkpoint', type=pathlib.Path, help='unless set, one is made')
  parser.add_argument('--json', action='store_true')
  parser.add_argument('--coordinator', help=argparse.SUPPRESS)
  parser.add_argument('--process', type=int, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.coordinator:
    _one(flags)
    return
  with tempfile.TemporaryDirectory() as folder:
    if not flags.checkpoint:
      flags.checkpoint = pathlib.Path(folder)
      make_sparse_checkpoint.write(flags.checkpoint, flags.gigabytes)
    found = run(flags.checkpoint, flags.processes, flags.model)
  print(f'{found["shard_bytes"] / 1e9:.2f} GB in {found["seconds"]:.1f} s, at most {found["most_bytes"] / 1e9:.2f} GB '
        f'of memory: {found["ratio"]:.3f} times the shard')
  if flags.json:
    print(json.dumps(found))


if __name__ == '__main__':
  main()
