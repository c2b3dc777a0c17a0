"""What a benchmark ran on."""

import os
import pathlib
import platform

import jax


def describe() -> str:
  """Processor, cores, versions."""
  cpus = pathlib.Path('/proc/cpuinfo')
  names = [line.split(':')[1].strip() for line in cpus.read_text().splitlines()
           if line.startswith('model name')] if cpus.exists() else []
  return (f'{(names or [platform.processor()])[0]} {platform.machine()}, {os.cpu_count()} cores, '
          f'jax {jax.__version__} on {jax.devices()[0].device_kind}')
