"""The beginning of an attempt, one start of a run: whose the workdir is, the first line of its ledger, its prices,
and what it says first."""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import json
import math
from typing import Any

from absl import logging
import jax

from kr_jax import compiled
from kr_jax import inputs
from kr_jax import knobs
from kr_jax import mirror
from kr_jax import phases
from kr_jax import prepare
from kr_jax import processes
from kr_jax import progress
from kr_jax import state as state_lib
from kr_jax.costs import arithmetic
from kr_jax.costs import hardware as hardware_lib
from kr_jax.costs import meters
from kr_jax.model import policy
from kr_jax.model import pretrained
from kr_jax.model import weights
from kr_jax.prepare import Setup
from kr_jax.record import checkpoint
from kr_jax.record import ledger
from kr_jax.record import split
from kr_jax.record import terminal

# Knobs that a run may go on with changed: they say how long, how often and where, not what.
MAY_CHANGE = ('num_steps', 'topologies', 'checkpoint.every', 'checkpoint.keep', 'tasks.data_dir', 'tasks.files',
              'mesh', *(f'rewards.{name}' for name in (
                  'workers', 'timeout_s', 'memory_mb', 'max_faulty_steps', 'network', 'readable')),
              'evaluate.every', 'evaluate.pass_at', 'evaluate.maj_at', 'evaluate.perturb', 'record', 'code',
              prepare.PINNED, state_lib.SOURCE_VERSION)


def claim(setup: Setup, workdir: str) -> None:
  """Makes the workdir this run's. Raises ValueError if it cannot be written or is another run's, the processes of a run
  do not share the directory of its checkpoints, prompts cannot be perturbed, or a new run would begin with a checkpoint
  that cannot be read, and RuntimeError where the processes have other configs or data."""
  with mirror.opened(workdir, create=True) as place:
    _claim(setup, place.path)


def _claim(setup: Setup, workdir: str) -> None:
  """`claim` of a directory of this machine."""
  mirror.check_shared(setup.config.checkpoint.directory or mirror.url(workdir))
  state_lib.perturbed_tasks(setup)  # the last evaluation's, refused now
  source = setup.config.policy.checkpoint
  if source and checkpoint.recorded(workdir, 'seed') is None:
    weights.check(source, setup.policy)
  config, code = knobs.as_dict(setup.config), inputs.code(setup.config)
  # Statistics are kept by row: the rows must be the tasks that they were.
  ids = hashlib.sha256('\n'.join(task.id for task in setup.train_tasks).encode()).hexdigest()
  processes.check_same('config and training tasks', f'{json.dumps([config, code])}{ids}'.encode())
  error = None
  if processes.is_first():
    _tell_of_code(workdir, code)
    try:
      version = checkpoint.recorded(workdir, state_lib.SOURCE_VERSION) or pretrained.version(source)
      facts = {'train_ids': ids, 'code': code, prepare.PINNED: setup.pinned, state_lib.SOURCE_VERSION: version}
      checkpoint.claim(workdir, config | {name: x for name, x in facts.items() if x}, may_change=MAY_CHANGE,
                       directory=state_lib.checkpoint_directory(setup, workdir))
    except ValueError as found:
      error = found
  if processes.any_of(error is not None):
    raise error or ValueError(f'--workdir={workdir} was refused; see the message of process 0')


def _tell_of_code(workdir: str, code: Mapping[str, str]) -> None:
  """Says which files of Python, by their digests, have changed since the run began: it goes on with them."""
  for path, digest in code.items():
    if (began := checkpoint.recorded(workdir, f'code.{path}')) not in (None, digest):
      logging.warning('%s has changed since the run in %s began (sha256 %s..., now %s...); the run goes on with it as '
                      'it is now', path, workdir, began, digest)


def begin(setup: Setup, workdir: str, hardware: hardware_lib.Hardware | None, clock: phases.Clock, first_step: int
          ) -> ledger.Writer:
  """The ledger of the attempt, which has its first line; the first process saves the prices and the tasks, and
  says what will run.

  Args:
    hardware: that the run is priced by; None: by none, or by that of the attempts before.
    first_step: the step that the attempt begins with.
  """
  c, meter = setup.config, meters.find(codecarbon=setup.config.record.codecarbon)
  attempt = about(setup, hardware) | {'energy': meter and meter.name}
  if processes.is_first():
    if hardware is not None:
      hardware_lib.save(workdir, hardware)
    split.write(workdir, setup.train_tasks, state_lib.initial_stats(setup))
    progress.say(terminal.opening(
        c, attempt, train_tasks=len(setup.train_tasks), test_tasks=len(setup.test_tasks), first_step=first_step,
        memory_bytes=least_bytes(setup, attempt['parameters']), hardware=hardware, programs=compiled.directory()))
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
