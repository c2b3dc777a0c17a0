"""What tasks are, in a few bytes, so that a run goes on with the tasks that it began with: their content, not only ids.

A digest of each field over all tasks says which fields differ, and 8 bytes a task say which tasks do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import hashlib
import io
from typing import Any, NamedTuple

import numpy as np

from kr_jax import files
from kr_jax import types

FILE = 'task_digests.npz'
_TOKENS = np.uint32
# What a rollout, its verdict or its statistics depend on.
_FIELDS: dict[str, Callable[[types.Task], bytes]] = {
    'id': lambda task: task.id.encode(),
    'prompt': lambda task: task.prompt.encode(errors='surrogatepass'),
    'tokens': lambda task: np.asarray(task.tokens, _TOKENS).tobytes(),
    'answer': lambda task: task.answer.encode(errors='surrogatepass'),
    'verifier': lambda task: task.verifier.encode(),
    'info': lambda task: task.info.encode(errors='surrogatepass')}


class Fingerprint(NamedTuple):
  """Of tasks in their order."""

  fields: dict[str, str]  # a digest of each field over all tasks
  digest_I: np.ndarray  # uint64, of each task
  ids: Sequence[str] = ()  # of the tasks; (): they are not known


def of(tasks: Sequence[types.Task]) -> Fingerprint:
  """The fingerprint of tasks."""
  hashes, digest_I = {name: hashlib.sha256() for name in _FIELDS}, np.zeros(len(tasks), np.uint64)
  for i, task in enumerate(tasks):
    of_task = hashlib.blake2b(digest_size=8)
    for name, content in _FIELDS.items():
      x = content(task)
      x = b'%d:%b' % (len(x), x)  # so that no two lists of fields are the same bytes
      hashes[name].update(x)
      of_task.update(x)
    digest_I[i] = int.from_bytes(of_task.digest(), 'little')
  return Fingerprint({name: x.hexdigest()[:16] for name, x in hashes.items()}, digest_I, [task.id for task in tasks])


def difference(began: Mapping[str, str], now: Fingerprint, began_digest_I: np.ndarray | None = None) -> str | None:
  """How tasks differ from those that a run began with: which fields do and, where it is known, the first task that
  does; None where they do not, or where nothing of them was recorded.

  Args:
    began: Fingerprint.fields, as the run recorded them.
    began_digest_I: of each of its tasks; None: they are not known.
  """
  fields = [name for name, digest in now.fields.items() if began.get(name, digest) != digest]
  if not fields:
    return None
  text = f'{" and ".join(fields)} {"differ" if len(fields) > 1 else "differs"}'
  if began_digest_I is None:
    return text
  both = min(len(began_digest_I), len(now.digest_I))
  other = np.flatnonzero(began_digest_I[:both] != now.digest_I[:both])
  if len(other):
    text += f', of {len(other)} of {both} tasks, first of {now.ids[other[0]]!r} (row {other[0]})'
  if len(began_digest_I) != len(now.digest_I):
    text += f'; there were {len(began_digest_I)} tasks, there are {len(now.digest_I)}'
  return text


def save(workdir: str, of_split: Mapping[str, Fingerprint]) -> None:
  """Writes the digests of each task, by split, where they are not those that are there."""
  made = io.BytesIO()
  np.savez(made, **{name: x.digest_I for name, x in of_split.items()})
  found = load(workdir)
  if set(found) != set(of_split) or any(not np.array_equal(found[name], x.digest_I) for name, x in of_split.items()):
    files.write(files.join(workdir, FILE), made.getvalue())


def load(workdir: str) -> dict[str, np.ndarray]:
  """The digests of each task of the run in a workdir, by split; {} where they are not there or cannot be read."""
  try:
    with np.load(io.BytesIO(files.read(files.join(workdir, FILE))), allow_pickle=False) as found:
      return {name: found[name] for name in found.files if found[name].dtype == np.uint64 and found[name].ndim == 1}
  except Exception:  # zip, numpy and the disk raise many kinds; the file only helps to say which task differs
    return {}


def as_dict(of_split: Mapping[str, Fingerprint]) -> dict[str, Any]:
  """What config.json keeps."""
  return {name: dict(x.fields) for name, x in of_split.items()}
