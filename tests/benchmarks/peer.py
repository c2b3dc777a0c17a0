"""Another library beside ours, in a process of its own that waits for its turn."""

import json
import os
import pathlib
import subprocess

_SCRIPTS = pathlib.Path(__file__).parent / 'peers'


class Peer:
  """A script of peers/, by an interpreter that has the library: a line in asks, a line of seconds comes."""

  def __init__(self, python: str, script: str, *args: str):
    command = [python, str(_SCRIPTS / script), '--serve', *args]
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, stdout=subprocess.PIPE,
                                     env=os.environ | {'PYTHONPATH': ''})
    for line in self._process.stdout:
      if line.strip() == 'ready':
        return
    raise RuntimeError(f'{" ".join(command)} ended with code {self._process.wait()}')

  def __call__(self, kind: str) -> float:
    """Seconds."""
    print(kind, file=self._process.stdin, flush=True)
    return float(self._process.stdout.readline())

  def close(self) -> dict:
    """What it says of itself."""
    out, _ = self._process.communicate()
    return json.loads(out.splitlines()[-1])
