"""The beginning of an attempt, one start of a run: the first line of its ledger, its prices, and what it says first."""

from __future__ import annotations

import math
from typing import Any

import jax

from kr_jax import phases
from kr_jax import processes
from kr_jax import progress
from kr_jax import state as state_lib
from kr_jax.costs import arithmetic
from kr_jax.costs import hardware as hardware_lib
from kr_jax.costs import meters
from kr_jax.model import policy
from kr_jax.prepare import Setup
from kr_jax.record import ledger
from kr_jax.record import terminal


def begin(setup: Setup, workdir: str, hardware: hardware_lib.Hardware | None, clock: phases.Clock, first_step: int
          ) -> ledger.Writer:
  """The ledger of the attempt, which has its first line; the first process saves the prices and says what will run.

  Args:
    hardware: that the run is priced by; None: by none, or by that of the attempts before.
    first_step: the step that the attempt begins with.
  """
  c, meter = setup.config, meters.find(codecarbon=setup.config.record.codecarbon)
  attempt = about(setup, hardware) | {'energy': meter and meter.name}
  if processes.is_first():
    if hardware is not None:
      hardware_lib.save(workdir, hardware)
    progress.say(terminal.opening(
        c, attempt, train_tasks=len(setup.train_tasks), test_tasks=len(setup.test_tasks), first_step=first_step,
        memory_bytes=least_bytes(setup, attempt['parameters']), hardware=hardware))
  found = ledger.Writer(workdir, clock, first_step, attempt, meter.read if meter else lambda: None,
                        meters.tpu_busy)
  clock.begin('other')
  return found


def about(setup: Setup, hardware: hardware_lib.Hardware | None) -> dict[str, Any]:
  """What the ledger says of an attempt."""
  profile = hardware and hardware.of_device(jax.devices()[0].device_kind)
  sampler = {f'{name}_compression': x for name, x in state_lib.compression(setup).items()}
  return {**ledger.environment(), 'hardware': profile and profile.name, 'parameters': _size(_shapes(setup)), **sampler}


def least_bytes(setup: Setup, parameters: int) -> int:
  """terminal.least_bytes of a setup."""
  trained = policy.split(setup.trained, _shapes(setup, setup.trained))[0] if setup.trained.lora_rank else None
  axes = lambda mesh, *names: math.prod(mesh.shape[axis] for axis in names) if mesh else 1
  sample_devices = axes(setup.sample_mesh, 'model')
  c = setup.sample
  column = arithmetic.column_bytes(setup.policy, c.cache)
  return terminal.least_bytes(
      parameters=parameters, trained=_size(trained) if trained else parameters,
      learn_devices=axes(setup.learn_mesh, 'fsdp', 'expert', 'model'),
      sample_itemsize=2 if setup.policy.dtype == 'bfloat16' else 4, sample_devices=sample_devices,
      cache_bytes=c.slots * (c.prompt_length + c.completion_length) * column // sample_devices)


def _shapes(setup: Setup, of: policy.Config | None = None) -> Any:
  return jax.eval_shape(lambda: policy.init(of or setup.policy, jax.random.key(0)))


def _size(tree: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))
