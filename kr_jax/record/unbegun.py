"""A workdir of a run that failed before its first step is nobody's: its command may be corrected there."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import os
from typing import Any

from kr_jax import files
from kr_jax.record import claim
from kr_jax.record import lines
from kr_jax.record import saved

_METRICS = 'metrics.jsonl'
# What a run leaves before its first step, and the next one would take for its own.
_LEFT = (claim.CONFIG, _METRICS, 'tasks.jsonl.zst', 'task_digests.npz', os.path.join('warm_start', _METRICS))


def forget(workdir: str, config: Mapping[str, Any], url: str = '') -> list[str]:
  """Removes the record of a run of another config that made no step and left no checkpoint.

  Args:
    workdir: on this machine, which nobody else works in.
    config: of the run that is to begin, nested dicts of plain values.
    url: the workdir as it was given; '': as `workdir`.

  Returns:
    How the configs differ; [] where nothing was removed.
  """
  url, began = url or workdir, claim.run_config(workdir)
  known = claim.flat(config)
  changed = [name for name in claim.changes(workdir, config) if name.partition(' was ')[0] in known]
  if not began or not changed or has_begun(workdir, url):
    return []
  elsewhere = _elsewhere(began)
  if elsewhere and claim.run_config(files.expanded(elsewhere)).get('workdir') in (url, os.path.abspath(url)):
    _remove(files.join(files.expanded(elsewhere), claim.CONFIG))
  for name in _LEFT:
    _remove(os.path.join(workdir, name))
  return changed


def has_begun(workdir: str, url: str = '') -> bool:
  """Whether the run in a workdir made a step or left a checkpoint. Arguments are as of `forget`."""
  elsewhere = _elsewhere(claim.run_config(workdir))
  places = {workdir, files.expanded(elsewhere) if elsewhere else url or workdir}
  return _has_step(workdir) or any(
      saved.latest(files.join(place, *stage, 'checkpoints')) is not None
      for place in places for stage in ((), ('warm_start',)))


def _elsewhere(config: Mapping[str, Any]) -> str:
  """checkpoint.directory of a config that was recorded."""
  return (config.get('checkpoint') or {}).get('directory') or ''


def _has_step(workdir: str) -> bool:
  """Whether a step has its line; one that cannot be read may be of a step."""
  path = os.path.join(workdir, _METRICS)
  if not os.path.exists(path):
    return False
  found = lines.read(path, lambda record: True)
  return bool(found.unread) or found.is_cut or any('reward_mean' in record for record in found.records)


def _remove(path: str) -> None:
  if files.is_remote(path):
    files.remove(path)
  else:
    with contextlib.suppress(FileNotFoundError):
      os.remove(path)
