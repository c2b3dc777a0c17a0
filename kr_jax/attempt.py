"""The beginning of an attempt, one start of a run: whose the workdir is, the first line of its ledger, its prices,
and what it says first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import hashlib
import json
from typing import Any

from absl import logging
import jax

from kr_jax import compiled
from kr_jax import disks
from kr_jax import files
from kr_jax import inputs
from kr_jax import knobs
from kr_jax import mirror
from kr_jax import phases
from kr_jax import prepare
from kr_jax import processes
from kr_jax import progress
from kr_jax import state as state_lib
from kr_jax.costs import hardware as hardware_lib
from kr_jax.costs import meters
from kr_jax.model import policy
from kr_jax.model import pretrained
from kr_jax.model import weights
from kr_jax.prepare import Setup
from kr_jax.record import claim as claim_lib
from kr_jax.record import fingerprint
from kr_jax.record import ledger
from kr_jax.record import lock
from kr_jax.record import resume
from kr_jax.record import saved
from kr_jax.record import split
from kr_jax.record import terminal

_TASK_BYTES = 64  # of a task's statistics in a checkpoint


@contextlib.contextmanager
def held(workdir: str, directory: str = '') -> Iterator[None]:
  """Holds the workdir, and the directory of the checkpoints where that is another one: no other run is in them while
  this one is. Of several processes the first holds them.

  Args:
    directory: checkpoint.directory of the config.

  Raises ValueError, in all processes, where another run is in one of them.
  """
  places = {mirror.url(workdir): f'--workdir={mirror.url(workdir)}'}
  if directory:
    places |= {files.expanded(directory): f'checkpoint.directory={directory}'}
  several = jax.distributed.is_initialized()  # else no devices are looked for, which the other run may hold
  error = None
  with contextlib.ExitStack() as context:
    try:
      for path, whose in places.items() if not several or processes.is_first() else ():
        context.enter_context(lock.held(path, whose))
    except ValueError as found:
      error = found
    if processes.any_of(error is not None) if several else error:
      raise error or ValueError(f'--workdir={workdir} was refused; see the message of process 0')
    yield


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
  if source and claim_lib.recorded(workdir, 'seed') is None:
    weights.check(source, setup.policy)
  config, code = knobs.as_dict(setup.config), inputs.code(setup.config)
  tasks = {'train': fingerprint.of(setup.train_tasks), 'test': fingerprint.of(setup.test_tasks)}
  digests = fingerprint.as_dict(tasks)
  processes.check_same('config and tasks', json.dumps([config, code, digests]).encode())
  error = None
  if processes.is_first():
    try:
      _tell_of_code(workdir, code)
      version = claim_lib.recorded(workdir, state_lib.SOURCE_VERSION) or pretrained.version(source)
      pinned = claim_lib.run_config(workdir).get(prepare.PINNED, {})
      pinned = {kind: {**pinned.get(kind, {}), **setup.pinned.get(kind, {})} for kind in {*pinned, *setup.pinned}}
      # Statistics are kept by row: the rows must be the tasks that they were.
      ids = hashlib.sha256('\n'.join(task.id for task in setup.train_tasks).encode()).hexdigest()
      facts = {'train_ids': ids, 'code': code, prepare.PINNED: pinned, state_lib.SOURCE_VERSION: version,
               'task_digests': digests}
      config |= {name: x for name, x in facts.items() if x}
      may_change = (*resume.FREE, *resume.FACTS)
      if not claim_lib.changes(
          workdir, config, may_change=(*may_change, *resume.WARNED, claim_lib.CHANGED, 'train_ids')):
        _check_tasks(workdir, tasks)  # which would be others by another config
        _check_steps(setup, workdir)
      _check_room(setup, workdir)
      claim_lib.claim(workdir, config, may_change=may_change, warned=tuple(resume.WARNED),
                      directory=state_lib.checkpoint_directory(setup, workdir), url=mirror.url(workdir))
      fingerprint.save(workdir, tasks)
    except ValueError as found:
      error = found
  if processes.any_of(error is not None):
    raise error or ValueError(f'--workdir={workdir} was refused; see the message of process 0')


def _check_tasks(workdir: str, tasks: Mapping[str, fingerprint.Fingerprint]) -> None:
  """Raises ValueError where tasks are not what they were when the run began. A record of an older version says nothing
  of them."""
  began, digests = claim_lib.run_config(workdir).get('task_digests', {}), fingerprint.load(workdir)
  for split, name in (('train', 'training'), ('test', 'held-out')):
    if how := fingerprint.difference(began.get(split, {}), tasks[split], digests.get(split)):
      raise ValueError(f'the {name} tasks are not those that the run in --workdir={mirror.url(workdir)} began with: '
                       f'{how}. Put the data back as they were, or name another --workdir')


def tell_of_changes(setup: Setup, workdir: str) -> None:
  """Says which files of Python and held-out tasks are not what they were when the run began, where it is evaluated."""
  _tell_of_code(workdir, inputs.code(setup.config))
  began = claim_lib.run_config(workdir)
  if began.get('evaluate', {}).get('tasks') == setup.config.evaluate.tasks and (how := fingerprint.difference(
      began.get('task_digests', {}).get('test', {}), fingerprint.of(setup.test_tasks),
      fingerprint.load(workdir).get('test'))):
    logging.warning('the held-out tasks are not those that the run in %s began with: %s. It is evaluated on those that '
                    'are there now', mirror.url(workdir), how)


def _check_steps(setup: Setup, workdir: str) -> None:
  """Raises ValueError where a run would end before the step that it is at."""
  asked, url = setup.config.num_steps, mirror.url(workdir)
  done = saved.latest(state_lib.checkpoint_directory(setup, workdir))
  if done is not None and asked < done:
    raise ValueError(claim_lib.too_few(asked, done, url))


def _check_room(setup: Setup, workdir: str) -> None:
  """Raises ValueError where the disk has no room for a checkpoint, and warns where it has none for two."""
  directory = state_lib.checkpoint_directory(setup, workdir)
  if files.is_remote(directory) or saved.latest(directory) == setup.config.num_steps:
    return
  shapes = _shapes(setup, setup.trained)
  trained = policy.split(setup.trained, shapes)[0] if setup.trained.lora_rank else shapes
  # Parameters and two moments in float32, and what is known of each task.
  refused, warned = disks.lacking(directory, 12 * _size(trained) + _TASK_BYTES * len(setup.train_tasks))
  if refused:
    raise ValueError(refused)
  if warned:
    logging.warning('%s', warned)


def _tell_of_code(workdir: str, code: Mapping[str, str]) -> None:
  """Says which files of Python, by their digests, have changed since the run began: it goes on with them."""
  for path, digest in code.items():
    if (began := claim_lib.recorded(workdir, f'code.{path}')) not in (None, digest):
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
        memory_bytes=prepare.needs(setup).device_bytes, hardware=hardware, programs=compiled.directory()))
  found = ledger.Writer(workdir, clock, first_step, attempt, meter.read if meter else lambda: None,
                        meters.tpu_busy)
  clock.begin('other')
  return found


def about(setup: Setup, hardware: hardware_lib.Hardware | None) -> dict[str, Any]:
  """What the ledger says of an attempt."""
  profile = hardware and hardware.of_device(jax.devices()[0].device_kind)
  sampler = {f'{name}_compression': x for name, x in state_lib.compression(setup).items()}
  return {**ledger.environment(), 'hardware': profile and profile.name, 'parameters': _size(_shapes(setup)), **sampler}


def _shapes(setup: Setup, of: policy.Config | None = None) -> Any:
  return jax.eval_shape(lambda: policy.init(of or setup.policy, jax.random.key(0)))


def _size(tree: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))
