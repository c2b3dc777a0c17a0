"""What a run needs to go on as if it had not stopped, kept by Orbax.

A checkpoint holds the TrainState (step, params, optimiser state, the key that all randomness is
folded from) and the TaskStats. It is saved after the statistics of its last step were updated.
Everything else (tasks, keys of a step) is a pure function of the config and the step.

It holds checksums of its values too (checksums.py), which are verified where it is read. One that is damaged is never
taken: the one before it is, with a warning that names both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import concurrent.futures
import contextlib
import json
import os
import time
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from kr_jax import errors
from kr_jax import files
from kr_jax import mirror
from kr_jax import phases
from kr_jax import processes
from kr_jax import progress
from kr_jax import types
from kr_jax.record import checksums
from kr_jax.record import reading
from kr_jax.record import saved

# Directories of items are made while the program waits. If Orbax makes them in a thread, and a full disk refuses one,
# whatever writes into it waits for ever.
_ASYNC = ocp.AsyncOptions(create_directories_asynchronously=False)
# Orbax asks tensorstore for its metrics before and after each save, to log how many bytes were written. tensorstore
# 0.1.86 never frees what it answers: half of what memory grew by with each checkpoint. Orbax has no switch for it; where
# another version keeps the function elsewhere, memory grows, and nothing else is different.
with contextlib.suppress(ImportError):
  from orbax.checkpoint._src.serialization import tensorstore_utils
  tensorstore_utils.get_tensorstore_raw_bytes = lambda *_, **__: 0


class NoneWhole(errors.Told, ValueError):
  """All checkpoints are damaged."""


class Checkpoints:
  """The checkpoints in a directory. Saving does not hold up the run. Of several processes all call all of it together.

  Args:
    keep: how many of the latest are kept.
    best: how many of those with the highest scores (`note_score`) are kept beside them.
    every: steps from one that `is_due` to the next; 0: none is.
    minutes: of work that may be lost, after which one is due as well; 0: by steps alone.
    writes: whether this is the run, which removes what was left half written, and moves aside what is damaged.
    step: the only one that is looked at, of those who read; None: the latest, and any before it.

  Attributes:
    writes: as above.
  """

  def __init__(self, directory: str, *, keep: int = 1, best: int = 0, every: int = 0, minutes: float = 0.0,
               writes: bool = True, step: int | None = None):
    self._directory, self._keep, self._best, self._every = absolute(directory), keep, best, every
    self._minutes, self.writes, self._only = minutes, writes, step
    self._orbax = ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(async_options=_ASYNC)),
        async_options=_ASYNC)
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    self._pending: concurrent.futures.Future | None = None
    self._saving: int | None = None  # the step that is on its way
    self._saved_at = self._asked_at = time.monotonic()
    logging.get_absl_logger().addFilter(self._is_told)
    if writes and processes.is_first():
      saved.clear(self._directory)
    self._steps = self._listed()
    self._scores = saved.read_scores(self._directory) if best and processes.is_first() else {}

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind, error, trace) -> None:
    try:
      self.close()
    except Exception as unsaved:  # what ends the run is raised
      if error is None:
        raise
      logging.error('%s', unsaved)

  def _listed(self) -> list[int]:
    """The steps that there are, as the first process sees them."""
    found = []
    if processes.is_first():
      try:
        found = saved.steps(self._directory)
      except OSError as error:
        raise ValueError(f'the checkpoints in {self._directory} cannot be read: {error}') from error
    found = json.loads(processes.of_first(json.dumps(found)))
    return found if self._only is None else [step for step in found if step == self._only]

  def latest(self) -> int | None:
    """The step of the latest checkpoint, which may still be on its way; None: there is none."""
    return self._saving if self._saving is not None else max(self._steps, default=None)

  def require(self) -> int:
    """The step of the latest checkpoint. Raises ValueError if there is none."""
    step = self.latest()
    if step is None and self._only is not None:
      there = ', '.join(map(str, saved.steps(self._directory)))
      raise ValueError(f'{self._directory} holds no checkpoint of step {self._only}; '
                       f'{f"there are those of {there}" if there else "there is none"}')
    if step is None:
      raise ValueError(f'{self._directory} holds no checkpoint; train first')
    return step

  # Saving.

  def prepare(self, state: types.TrainState) -> None:
    """Compiles what saving such a state needs, so that nothing is compiled where the first is saved."""
    checksums.of(state._asdict())

  def is_due(self, done: int) -> bool:
    """Whether a checkpoint is to be saved after so many steps: in all processes the same."""
    now, asked_at = time.monotonic(), self._asked_at
    self._asked_at = now
    if self._every and done % self._every == 0:
      return True
    if not self._minutes:
      return False
    # The next step is taken to be as long as the last one.
    is_late = now - self._saved_at + (now - asked_at) >= 60 * self._minutes
    return bool(processes.gather(np.array(is_late))[0])

  def save(self, step: int, state: types.TrainState, stats: types.TaskStats) -> None:
    """Saves under the number of updates done; does nothing where that is saved. The record is never behind it, in a
    bucket neither.

    Raises files.Unsaved where this or an earlier one cannot be written.
    """
    if step == self.latest():
      return
    mirror.push()
    self._saved_at = time.monotonic()
    phases.count(checkpoint_bytes=sum(x.nbytes for x in jax.tree.leaves((state._replace(key=None), stats))))
    with self._writing(step):
      self._settle()
      self._check_there()
      if processes.is_first():
        self._make_way(step)
      trees = {'state': state._asdict(), 'stats': _not_empty(stats)}
      item = checksums.item(step, **{name: checksums.of(tree) for name, tree in trees.items()})
      self._orbax.save(self._path(step), force=True, args=ocp.args.Composite(
          **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
          **{reading.CHECKSUMS: ocp.args.JsonSave(item)}))
      self._saving = step
      self._pending = self._thread.submit(self._finish, {*self._steps, step})

  def _finish(self, found: set[int]) -> list[int]:
    """Waits for what is being saved, and removes what is not kept any more; the steps that are left."""
    self._orbax.wait_until_finished()
    left = saved.kept(found, keep=self._keep, best=self._best, scores=dict(self._scores))
    if processes.is_first():
      for step in found - left:
        try:
          saved.remove(self._directory, step)
        except OSError as error:
          logging.warning('%s is not needed any more, and cannot be removed: %s', self._path(step), error)
    return sorted(left)

  def _settle(self) -> None:
    """Waits for what is being saved."""
    pending, self._pending, self._saving = self._pending, None, None
    if pending:
      self._steps = pending.result()

  def _check_there(self) -> None:
    """Raises OSError where the directory was removed since there were checkpoints in it, and warns of one that was."""
    if files.is_remote(self._directory) or not self._steps or not processes.is_first():
      return
    there = saved.steps(self._directory)
    if not os.path.isdir(self._directory):
      raise FileNotFoundError(2, os.strerror(2), self._directory)
    for step in [step for step in self._steps if step not in there]:
      logging.warning('the checkpoint %s was removed, and not by this run', self._path(step))
      self._steps.remove(step)

  def _make_way(self, step: int) -> None:
    """Moves aside what has the name of a step that is to be saved."""
    path = self._path(step)
    if files.is_remote(path):
      return  # what is there is no checkpoint, and was left by a save
    if os.path.isdir(path) and not os.listdir(path):
      os.rmdir(path)
    elif os.path.lexists(path):
      logging.warning('%s is in the way of a checkpoint, and is now %s', path, saved.move_aside(self._directory, step))

  def note_score(self, step: int, score: float | None) -> None:
    """Notes how good the policy of a step is, for `best`: the higher the better; None: nobody knows."""
    if not self._best or score is None or not processes.is_first() or self._scores.get(step) == score:
      return
    self._scores[step] = float(score)
    try:
      saved.write_scores(self._directory, self._scores)
    except OSError as error:
      raise self._unsaved(error) from error

  def wait(self) -> None:
    """Waits for what is being saved. Raises files.Unsaved as `save` does."""
    with self._writing(self._saving):
      self._settle()

  def close(self) -> None:
    """Waits, and ends the threads. Raises files.Unsaved as `save` does."""
    try:
      self.wait()
    except BaseException:
      with contextlib.suppress(Exception):  # what another part of the same save says
        self._orbax.close()
      raise
    else:
      self._orbax.close()
    finally:
      self._thread.shutdown()
      logging.get_absl_logger().removeFilter(self._is_told)

  def _is_told(self, record: Any) -> bool:
    """Whether a record of the log is told: not Orbax's tracebacks of errors that are raised, and told, here."""
    return record.levelno < logging.converter.STANDARD_ERROR or f'{os.sep}orbax{os.sep}' not in record.pathname

  @contextlib.contextmanager
  def _writing(self, step: int | None) -> Iterator[None]:
    """Says in a sentence why a directory cannot be written, and which checkpoint is the last good one."""
    unfinished, unsaved = {step, self._saving} - {None}, None
    with reading.quiet() as settle:
      try:
        yield
      except Exception as error:
        unsaved = self._unsaved(error)
        if unsaved is error:
          raise
      if unsaved is None:
        return
      settle()
    for step in unfinished if processes.is_first() else ():
      saved.clear(self._directory, step)  # which takes room that the record needs
    raise unsaved

  def _unsaved(self, error: Exception) -> Exception:
    """files.Unsaved of an error of a disk or a bucket; another error as it is, with a note."""
    last = self._last_good()
    if files.is_remote(self._directory):  # of several clients there are many kinds
      why = ' '.join(str(error).partition('[http_')[0].split())
      return files.Unsaved(f'a checkpoint cannot be written to {self._directory}: {why}. {last}', names_checkpoint=True)
    found = files.explained(error, self._directory, 'a checkpoint')
    if isinstance(error, TimeoutError) and 'barrier' in str(error):  # of Orbax, where another process has ended
      found = files.Unsaved('a checkpoint cannot be written: another process has ended, or did not write its part; it '
                            'says why')
    if found is error:
      error.add_note(last)
      return error
    return files.Unsaved(f'{found}. {last}', again=getattr(found, 'again', True), names_checkpoint=True)

  def _last_good(self) -> str:
    """A sentence that names the last checkpoint that is whole, by what is there now."""
    try:
      found = saved.steps(self._directory)
    except OSError:
      return 'Which checkpoints are there cannot be told now'
    return f'The one before it stays: {self._path(max(found))}' if found else 'No checkpoint is there'

  def _path(self, step: int) -> str:
    return files.join(self._directory, str(step))

  # Reading.

  def restore(self, state: types.TrainState, stats: types.TaskStats) -> tuple[types.TrainState, types.TaskStats]:
    """The latest checkpoint that is whole, in the shapes and on the devices of the arguments, whose state may be of
    jax.ShapeDtypeStruct.

    Raises ValueError where there is none, or it has other shapes.
    """
    wanted = {'state': state._asdict(), 'stats': _not_empty(stats)}
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted['state'])
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), stats=ocp.args.StandardRestore(wanted['stats']))

    def read(step):
      found = self._read(step, args)
      found = {name: found[name] for name in wanted}
      if len(found['stats']['rollouts_I']) != len(stats.rollouts_I):  # of a version that kept no checksums
        raise reading.Other(reading.other_tasks(len(found['stats']['rollouts_I']), len(stats.rollouts_I)))
      return found

    def check(step, found):
      if (held := int(found['state']['step'])) != step:
        raise checksums.Damaged(f'it holds step {held}')

    _, found = self._newest({name: checksums.shapes(tree) for name, tree in wanted.items()}, read, check)
    return types.TrainState(**found['state']), stats._replace(**found['stats'])

  def params(self, shapes: Any) -> tuple[int, Any]:
    """The step and the parameters of the latest checkpoint that is whole. The optimiser's state, which is larger, is
    not read.

    Args:
      shapes: jax.ShapeDtypeStruct of the parameters, with the devices that they go to, whatever they were saved on.

    Raises ValueError where there is none, or it holds other parameters.
    """
    args = ocp.args.Composite(state=ocp.args.PyTreeRestore(
        {'params': shapes}, restore_args={'params': ocp.checkpoint_utils.construct_restore_args(shapes)},
        partial_restore=True))

    def read(step):
      found = self._read(step, args)['state']
      if not all(isinstance(x, jax.Array) for x in jax.tree.leaves(found)):
        raise reading.Other('it holds other parameters than the config asks for')
      return {'state': found}

    step, found = self._newest({'state': checksums.shapes({'params': shapes})}, read, is_part=True)
    return step, found['state']['params']

  def _read(self, step: int, args: ocp.args.Composite) -> Any:
    """What Orbax reads, in this process: it waits for no other one, which may have failed."""
    handler = ocp.CompositeCheckpointHandler()  # a new one, as they remember how an item was read before
    try:
      return handler.restore(epath.Path(self._path(step)), args=args)
    finally:
      handler.close()

  def _newest(self, wanted: dict[str, dict[str, Any]], read: Callable[[int], dict[str, Any]],
              check: Callable[[int, dict[str, Any]], None] = lambda step, found: None, *, is_part: bool = False
              ) -> tuple[int, dict[str, Any]]:
    """What is read of the newest checkpoint that is whole, and its step.

    Args:
      wanted: checksums.shapes of each tree, by its name.
      read: the trees of a step, by their names.
      check: raises checksums.Damaged where they are not of that step.
      is_part: whether the checkpoint may hold more.
    """
    self.require()
    self._settle()
    damaged: dict[int, str] = {}
    while left := [step for step in self._steps if step not in damaged]:
      step = max(left)
      path = self._path(step)
      expected, why = reading.agreed(path, lambda: reading.expected(path, step, wanted, is_part))
      if not why:
        result, why = reading.agreed(path, lambda: read(step))
      if not why:
        sums = {name: checksums.of(tree) for name, tree in result.items()}
        _, why = reading.agreed(path, lambda: reading.verify(expected, sums) or check(step, result))
      if not why:
        self._fall_back(step, damaged)
        return step, result
      if self.writes or step in self._listed():
        damaged[step] = why
      else:
        self._steps.remove(step)  # the run that it is of has removed it
    names = '; '.join(f'{self._path(step)}: {why}' for step, why in damaged.items())
    if not damaged:
      raise ValueError(f'{self._directory} holds no checkpoint any more')
    raise NoneWhole(f'no checkpoint can be read, and none was changed: {names}. Put a copy of one back, or begin anew '
                    'in another --workdir')

  def _fall_back(self, step: int, damaged: dict[int, str]) -> None:
    """Warns of the checkpoints that were damaged, and moves them aside, so that their steps can be saved again."""
    self._steps = [other for other in self._steps if other not in damaged]
    if not processes.is_first():
      return
    for bad, why in damaged.items():
      if self.writes:
        try:
          kept = f'It is kept as {saved.move_aside(self._directory, bad)}, which nothing reads; remove it when you like'
        except OSError as error:
          kept = f'It cannot be moved aside: {error}'
      else:
        kept = 'It is left as it is'
      text = (f'the checkpoint {self._path(bad)} is damaged ({why}): that of step {step} is taken in its place, '
              f'{self._path(step)}, and {bad - step} steps are lost. {kept}')
      logging.error('%s', text)
      progress.say(text, alarm=True)


def absolute(directory: str) -> str:
  """A path as Orbax needs it; of gs://BUCKET/PATH itself."""
  directory = files.expanded(directory)
  return directory if files.is_remote(directory) else os.path.abspath(directory)


def _not_empty(stats: types.TaskStats) -> dict[str, np.ndarray]:
  """The arrays that have elements: Orbax saves no others."""
  return {name: x for name, x in stats._asdict().items() if x.size}
