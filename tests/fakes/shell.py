"""ssh and scp to machines that are directories (cloud.py).

ssh runs a command in the home of a machine, with the machine's programs alone. As the real one it waits until all that
holds the command's output has closed it, and a connection that breaks leaves running what has a session of its own.
Rules of the plan: {"at": "ssh", "do": "refuse"}, or "drop", after the first output; with "matching", a part of the
command, and "host", a number.
"""

from __future__ import annotations

import os
import signal
import sys

from tests.fakes import cloud
from tests.fakes import hosts


def ssh(words: list[str]) -> int:
  """Runs ssh with its arguments. Returns its exit status."""
  cloud.record('ssh', words)
  words = [word for word in words if not word.startswith('-o')]
  address, command = words[0].rpartition('@')[2], ' '.join(words[2:] if words[1:2] == ['--'] else words[1:])
  try:
    root = cloud.host_at(address)
  except cloud.Refused as error:
    print(error, file=sys.stderr)
    return 255
  rule = cloud.planned('ssh', command, host=hosts.number(root))
  if rule and rule['do'] == 'refuse':
    print(f'ssh: connect to host {address} port 22: Connection refused', file=sys.stderr)
    return 255
  output, into = os.pipe()
  child = os.fork()
  if not child:
    os.setsid()
    os.dup2(into, 1)
    os.closerange(3, 256)  # what is open here is not open there
    os.chdir(os.path.join(root, 'home'))
    os.execve('/bin/bash', ['bash', '-c', command] if command else ['bash', '-s'], hosts.environment(root))
  os.close(into)
  signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(255))
  status = None
  try:
    while data := os.read(output, 1 << 16):
      sys.stdout.buffer.write(data)
      sys.stdout.buffer.flush()
      if rule and rule['do'] == 'drop':
        print('client_loop: send disconnect: Broken pipe', file=sys.stderr)
        return 255
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  finally:  # a connection that ends takes the command's session with it
    if status is None:
      os.killpg(child, signal.SIGHUP)
  if os.path.exists(os.path.join(root, 'killed')):
    print(f'Connection to {address} closed by remote host.', file=sys.stderr)
    return 255
  return status if status >= 0 else 128 - status


def _place(word: str) -> str:
  host, colon, path = word.partition(':')
  return os.path.join(cloud.host_at(host.rpartition('@')[2]), 'home', path) if colon else word


def scp(words: list[str]) -> int:
  """Runs scp with its arguments. Returns its exit status."""
  import shutil
  cloud.record('scp', words)
  recurse = '-r' in words
  *sources, target = [word for word in words if not word.startswith('-')]
  try:
    target = _place(target)
    for source in map(_place, sources):
      if not os.path.isdir(source):
        shutil.copy(source, target)
      elif recurse:
        inside = os.path.join(target, os.path.basename(source)) if os.path.isdir(target) else target
        shutil.copytree(source, inside, dirs_exist_ok=True)
      else:
        print(f'scp: {source}: not a regular file', file=sys.stderr)
        return 1
  except cloud.Refused as error:
    print(error, 'scp: Connection closed', sep='\n', file=sys.stderr)
    return 255
  except OSError as error:
    print(f'scp: {error}', file=sys.stderr)
    return 1
  return 0
