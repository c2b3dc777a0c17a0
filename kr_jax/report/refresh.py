"""The page of a run, written anew while it runs."""

from __future__ import annotations

import time

from absl import logging

from kr_jax import phases
from kr_jax import processes
from kr_jax.report import page

_SHARE = 0.02  # of a run's time that pages may take, but for the first and the last


class Refresher:
  """Writes the page of a run, which nothing of it can stop; of several processes the first does.

  Args:
    is_on: whether pages are asked for.
  """

  def __init__(self, workdir: str, is_on: bool = True):
    self._workdir, self._is_on = workdir, is_on and processes.is_first()
    self._began, self._took, self._has_warned = time.monotonic(), 0.0, False

  def refresh(self, *, last: bool = False) -> None:
    """Writes the page, unless that would take too large a share of the run's time. last: in any
    case, and with plots."""
    began = time.monotonic()
    if not self._is_on or (not last and self._took > _SHARE * (began - self._began)):
      return
    with phases.phase('report'):
      try:
        page.write([self._workdir], pictures=last)
      except Exception as error:  # of drawing libraries and disks; a page is never worth a run
        if not self._has_warned:
          logging.warning('the report is not written: %s: %s', type(error).__name__, error)
        self._has_warned = True
    self._took += time.monotonic() - began
