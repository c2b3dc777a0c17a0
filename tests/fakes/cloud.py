"""A cloud in a directory, for the fakes of gcloud, ssh and scp: what there is, and what is to fail.

$FAKE_CLOUD names the directory, which holds

    cloud.json      what there is: instances, templates, policies, groups, queued resources, TPU nodes
    plan.json       what is to fail: a list of {"at": EVENT, "do": WHAT, "times": N}, taken in order
    calls.jsonl     each call of a fake: its program and arguments
    hosts/NAME/     a machine: `home`, `bin` and `image` (what its image has), and `killed`, once it is gone

Machines are directories here: ssh runs a command in a host's `home`, with an environment of its own. When a machine
goes, its processes are killed and its disk is lost. Time passes by calls: each look at something takes it a stage on.
Few modules are imported, and late: the fakes are started hundreds of times.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time

KINDS = ('instances', 'templates', 'policies', 'groups', 'queued', 'nodes')
KILL = 9


class Refused(Exception):
  """What the cloud answers instead of doing it."""


def path(*names: str) -> str:
  return os.path.join(os.environ['FAKE_CLOUD'], *names)


def read(name: str):
  """What a JSON file of the cloud holds; None where it is not there."""
  if not os.path.exists(path(name)):
    return None
  with open(path(name)) as file:
    return json.load(file)


def write(name: str, x) -> None:
  with open(path(name), 'w') as file:
    json.dump(x, file, indent=1)


@contextlib.contextmanager
def locked(name: str):
  with open(path(f'{name}.lock'), 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


@contextlib.contextmanager
def opened():
  """What there is, for one process at a time; changes are kept."""
  with locked('cloud'):
    there = read('cloud.json') or {kind: {} for kind in KINDS} | {'addresses': 1}
    try:
      yield there
    finally:
      write('cloud.json', there)


def record(program: str, arguments: list[str]) -> None:
  with open(path('calls.jsonl'), 'a') as file:
    file.write(json.dumps({'program': program, 'arguments': arguments}) + '\n')


def planned(event: str, text: str = '', **known) -> dict | None:
  """Takes the next rule for an event from the plan, or returns None.

  A rule may demand more: `matching`, which the text must hold, and values of what is known (such as a host's number).
  """
  with locked('plan'):
    rules = read('plan.json') or []
    for rule in rules:
      fits = all(rule[name] == value for name, value in known.items() if name in rule)
      if rule['at'] == event and rule.get('times', 1) > 0 and rule.get('matching', '') in text and fits:
        rule['times'] = rule.get('times', 1) - 1
        write('plan.json', rules)
        return rule
  return None


def add_host(there: dict, name: str, number: int, devices: int) -> str:
  """Makes a machine with an empty disk. Returns its address, which is one of this machine's own."""
  from tests.fakes import hosts
  there['addresses'] += 1
  hosts.make(path('hosts', name), number, devices)
  return f'127.0.0.{there["addresses"]}'


def running(root: str) -> list[int]:
  """The processes of a machine: those that have its FAKE_HOST in their environment, and are not dead."""
  mark, found = f'FAKE_HOST={root}\0'.encode(), []
  for entry in os.listdir('/proc'):
    with contextlib.suppress(OSError):
      if not entry.isdigit():
        continue
      with open(f'/proc/{entry}/environ', 'rb') as environment, open(f'/proc/{entry}/stat') as status:
        if mark in environment.read() and status.read().rpartition(')')[2].split()[0] != 'Z':
          found.append(int(entry))
  return found


def remove_host(name: str) -> None:
  """Ends a machine: its processes are killed, its disk is lost."""
  import shutil
  root = path('hosts', name)
  if not os.path.exists(root):
    return
  with open(os.path.join(root, 'killed'), 'w'):
    pass
  while pids := running(root):
    for pid in pids:
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, KILL)
    time.sleep(0.01)
  shutil.rmtree(os.path.join(root, 'home'), ignore_errors=True)


def host_at(address: str) -> str:
  """The directory of the machine that has an address.

  Raises:
    Refused: there is none, or it does not answer.
  """
  with opened() as there:
    for instance in there['instances'].values():
      if instance['networkInterfaces'][0]['networkIP'] == address and instance['status'] == 'RUNNING':
        return path('hosts', instance['name'])
    for node in there['nodes'].values():
      for i, endpoint in enumerate(node['networkEndpoints']):
        if endpoint['ipAddress'] == address and node['state'] == 'READY':
          return path('hosts', f'{node["name"]}-{i}')
  raise Refused(f'ssh: connect to host {address} port 22: Connection timed out')


def preempt(there: dict) -> None:
  """Takes all slices back: their machines stop at once, as spot capacity does."""
  for instance in list(there['instances'].values()):
    remove_host(instance['name'])
    # --instance-termination-action=DELETE: it stops, and is deleted.
    if instance['group']:
      instance['status'] = 'STOPPING'
    else:
      del there['instances'][instance['name']]
  for node in there['nodes'].values():
    for i in range(len(node['networkEndpoints'])):
      remove_host(f'{node["name"]}-{i}')
    node['state'] = 'PREEMPTED'
  for queued in there['queued'].values():
    queued['state'] = {'state': 'SUSPENDED', 'stateInitiator': 'SERVICE'}
