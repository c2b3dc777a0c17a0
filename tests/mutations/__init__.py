"""Planted faults: one-line mutations of the package, each of which a test of the default tier must catch."""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]


class Fault(NamedTuple):
  """A line that is changed, and the test that fails then."""

  file: str
  old: str  # occurs once in the file
  new: str
  test: str  # as pytest names it
  what: str  # what is wrong then

  def planted(self, text: str) -> str:
    """The file's text with the fault. Raises ValueError unless the old text occurs once."""
    if text.count(self.old) != 1:
      raise ValueError(f'{self.file}: {self.old!r} occurs {text.count(self.old)} times, not once')
    return text.replace(self.old, self.new)


def faults() -> list[Fault]:
  return [Fault(**fault) for fault in json.loads((ROOT / 'tests' / 'mutations' / 'faults.json').read_text())]
