"""What a run needs to go on as if it had not stopped, kept by Orbax.

A checkpoint holds the TrainState (step, params, optimiser state, the key that all randomness is
folded from) and the TaskStats. It is saved after the statistics of its last step were updated.
Everything else (tasks, keys of a step) is a pure function of the config and the step.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from kr_jax import files
from kr_jax import knobs
from kr_jax import mirror
from kr_jax import phases
from kr_jax import types

_CONFIG = 'config.json'


def _not_empty(stats: types.TaskStats) -> dict[str, np.ndarray]:
  """The arrays that have elements: Orbax saves no others."""
  return {name: x for name, x in stats._asdict().items() if x.size}


class Checkpoints:
  """The checkpoints in a directory; the latest `keep` are kept. Saving does not hold up the run."""

  def __init__(self, directory: str, *, keep: int = 1):
    self._orbax = ocp.CheckpointManager(absolute(directory), options=ocp.CheckpointManagerOptions(max_to_keep=keep))

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def latest(self) -> int | None:
    """The step of the latest checkpoint, which may still be on its way; None: there is none."""
    return self._orbax.latest_step()

  def require(self) -> int:
    """The step of the latest checkpoint. Raises ValueError if there is none."""
    step = self.latest()
    if step is None:
      raise ValueError(f'{self._orbax.directory} holds no checkpoint; train first')
    return step

  def save(self, step: int, state: types.TrainState, stats: types.TaskStats) -> None:
    """Saves under the number of updates done; does nothing where that is saved. The record is never behind it, in a
    bucket neither.

    Raises files.Unsaved where this or an earlier one cannot be written to a bucket.
    """
    if step != self.latest():
      mirror.push()
      phases.count(checkpoint_bytes=sum(x.nbytes for x in jax.tree.leaves((state._replace(key=None), stats))))
      with self._writing():
        self._orbax.save(step, args=ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), stats=ocp.args.StandardSave(_not_empty(stats))))

  def restore(self, state: types.TrainState, stats: types.TaskStats) -> tuple[types.TrainState, types.TaskStats]:
    """The latest checkpoint, in the shapes and on the devices of the arguments, whose state may be of
    jax.ShapeDtypeStruct.

    Raises:
      ValueError: there is none, or it has other shapes.
    """
    step = self.require()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state._asdict())
    restored = self._orbax.restore(step, args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), stats=ocp.args.StandardRestore(_not_empty(stats))))
    saved = stats._replace(**restored['stats'])
    if len(saved.rollouts_I) != len(stats.rollouts_I):
      raise ValueError(f'{self._orbax.directory} holds statistics of {len(saved.rollouts_I)} tasks, '
                       f'the training split has {len(stats.rollouts_I)}; name another --workdir')
    return types.TrainState(**restored['state']), saved

  def params(self, shapes: Any) -> tuple[int, Any]:
    """The step and the parameters of the latest checkpoint; the optimiser's state, which is larger, is not read.

    Args:
      shapes: jax.ShapeDtypeStruct of the parameters, with the devices that they go to, whatever they were saved on.

    Raises:
      ValueError: there is none, or it holds other parameters.
    """
    step = self.require()
    restored = self._orbax.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(
        {'params': shapes}, restore_args={'params': ocp.checkpoint_utils.construct_restore_args(shapes)},
        partial_restore=True)))['state']['params']
    if not all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored)):
      raise ValueError(f'{self._orbax.directory} holds other parameters than the config asks for; give the config of '
                       'the run')
    return step, restored

  def wait(self) -> None:
    """Waits for what is being saved. Raises files.Unsaved as `save` does."""
    with self._writing():
      self._orbax.wait_until_finished()

  def close(self) -> None:
    self.wait()
    self._orbax.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Says in a sentence why a bucket cannot be written."""
    directory = str(self._orbax.directory)
    try:
      yield
    except Exception as error:  # of several clients there are many kinds
      if not files.is_remote(directory):
        raise
      why = str(error).partition('[http_')[0].strip()
      raise files.Unsaved(f'a checkpoint cannot be written to {directory}: {why}. The one before it stays') from error


def absolute(directory: str) -> str:
  """A path as Orbax needs it; of gs://BUCKET/PATH itself."""
  directory = files.expanded(directory)
  return directory if files.is_remote(directory) else os.path.abspath(directory)


def claim(workdir: str, config: dict[str, Any], *, may_change: tuple[str, ...], directory: str = '') -> None:
  """Makes the workdir this config's, or checks that it is.

  Args:
    config: nested dicts of plain values.
    may_change: knobs ('section.knob') and sections that a run may go on with changed.
    directory: where the run's checkpoints are; '': none is looked for.

  Raises:
    ValueError: the workdir cannot be written, or belongs to a run with other knobs; or it has no record of the run that
      the checkpoints are of.
  """
  path = os.path.join(workdir, _CONFIG)
  if problem := files.unwritable(workdir):
    raise ValueError(f'cannot write to --workdir={problem}; name a directory that can be written')
  if directory and not record(workdir) and _holds_any(directory):
    raise ValueError(f'{directory} holds checkpoints of a run, and --workdir={workdir} has no record of it: copy what '
                     'its workdir held there, or name another --workdir or checkpoint.directory')
  changed = changes(workdir, config, may_change=may_change)
  if changed:
    raise ValueError(f'--workdir={workdir} holds a run of another config: {"; ".join(changed)}. '
                     'Name another --workdir, or set these knobs back')
  files.write(path, json.dumps(config, indent=1, sort_keys=True))


def _holds_any(directory: str) -> bool:
  """Whether there are checkpoints in a directory."""
  names = files.listed(directory) if files.is_remote(directory) else (
      os.listdir(directory) if os.path.isdir(directory) else ())
  return any(name.partition('/')[0].isdigit() for name in names)


def recorded(workdir: str, knob: str) -> Any:
  """The value of a knob, 'section.knob', of the run in a workdir; None where there is no record of it."""
  return record(workdir).get(knob)


def changes(workdir: str, config: dict[str, Any], *, of: tuple[str, ...] = ('',), may_change: tuple[str, ...] = ()
            ) -> list[str]:
  """How a config differs from that of the run in a workdir: 'seed was 0, is 1'; [] where there is no record of it.

  A knob that the record does not have is newer than the run, and was its default: a new knob's default is what was done
  before there was the knob.

  Args:
    config: nested dicts of plain values.
    of: knobs ('section.knob') and sections that are compared; '': all.
    may_change: those of them that are not.
  """
  as_read = lambda tree: _flatten(json.loads(json.dumps(tree)))  # tuples are lists
  began, new = record(workdir), as_read(config)
  if not began:
    return []
  old = {name: x for name, x in as_read(knobs.as_dict(knobs.Config())).items() if name in new} | began
  is_of = lambda name, parts: any(not part or f'{name}.'.startswith(f'{part}.') for part in parts)
  return [f'{name} was {old.get(name)!r}, is {new.get(name)!r}' for name in sorted(old | new)
          if old.get(name) != new.get(name) and is_of(name, of) and not is_of(name, may_change)]


def record(workdir: str) -> dict[str, Any]:
  """The knobs of the run in a workdir, by 'section.knob'; {} where there is no record of it."""
  try:
    return _flatten(json.loads(files.read(files.join(workdir, _CONFIG))))
  except (FileNotFoundError, NotADirectoryError):
    return {}


def _flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for name, x in tree.items():
    flat |= _flatten(x, f'{prefix}{name}.') if isinstance(x, dict) else {prefix + name: x}
  return flat
