"""What the fake gcloud does for each command: its state changes in cloud.py, its answers in gcloud's own words.

The wording of errors is what users of the real one have posted; launch/tpu.sh tells them apart by it.
"""

from __future__ import annotations

import os
import sys

from tests.fakes import cloud
from tests.fakes import shell
from tests.fakes.cloud import Refused

Flags = dict[str, str]  # of switches: True
QUOTA = """Could not fetch resource:
 - Quota 'PREEMPTIBLE_TPU_LITE_PODSLICE_V6' exceeded.  Limit: 0.0 in region us-east5.
\tmetric name = compute.googleapis.com/preemptible_tpu_lite_podslice_v6
\tlimit name = PREEMPTIBLE-TPU-LITE-PODSLICE-V6-per-project-region"""
STOCKOUT = """Could not fetch resource:
---
code: ZONE_RESOURCE_POOL_EXHAUSTED
errorDetails:
- errorInfo:
    domain: compute.googleapis.com
    reason: resource_availability
message: The zone 'projects/p/zones/us-east5-a' does not have enough resources available to fulfill the request."""
TPU_QUOTA = ("RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been exceeded. "
             'Limit: 0 in zone us-west4-a.')
TPU_STOCKOUT = ('RESOURCE_EXHAUSTED: There is no more capacity in the zone "us-west4-a"; you can try in another zone '
                'where Cloud TPU Nodes are offered (see https://cloud.google.com/tpu/docs/regions) [EID: 0xba393c90]')
DENIED = "PERMISSION_DENIED: The caller does not have permission 'compute.instances.create' on 'projects/p'."
UNDERWAY = ('Did not create the following within 1800s: https://compute.googleapis.com/x. These operations may still '
            'be underway remotely and may still succeed; use gcloud list and describe commands')
OLD = ("argument --provisioning-model: Invalid choice: 'SPOT'.\n\nValid choices are [STANDARD].")


def _fail(event: str, of_tpus: bool, **known: bool) -> dict | None:
  """Raises what the plan says for an event; returns a rule that comes true later."""
  rule = cloud.planned(event, **known)
  texts = {'quota': TPU_QUOTA if of_tpus else QUOTA, 'stockout': TPU_STOCKOUT if of_tpus else STOCKOUT,
           'denied': DENIED, 'old': OLD, 'outage': 'HTTPError 503: The service is currently unable to answer.'}
  if rule and rule['do'] in texts:
    raise Refused(texts[rule['do']])
  return rule


def _take(there: dict, kind: str, name: str) -> dict:
  if name not in there[kind]:
    raise Refused(f"Could not fetch resource:\n - The resource 'projects/p/{kind}/{name}' was not found"
                  if kind in ('instances', 'templates', 'policies', 'groups') else
                  f"NOT_FOUND: Resource 'projects/p/locations/z/{kind}/{name}' was not found")
  return there[kind][name]


def _add(there: dict, kind: str, name: str, thing: dict) -> dict:
  if name in there[kind]:
    raise Refused(f"Could not fetch resource:\n - The resource 'projects/p/{kind}/{name}' already exists"
                  if kind != 'queued' else f"ALREADY_EXISTS: Resource '{name}' already exists")
  there[kind][name] = {'name': name} | thing
  return there[kind][name]


def _labels(flags: Flags) -> dict[str, str]:
  return dict(pair.split('=') for pair in flags.get('labels', '').split(',') if pair)


def _instance(there: dict, name: str, number: int, machine: str, labels: dict, group: str = '') -> None:
  devices = int(machine.rpartition('-')[2].rstrip('t')) * (2 if machine.startswith('tpu7x') else 1)
  address = cloud.add_host(there, name, number, devices)
  _add(there, 'instances', name, {'status': 'RUNNING', 'labels': labels, 'group': group,
                                  'networkInterfaces': [{'networkIP': address}]})


def create_instance(there: dict, names: list[str], flags: Flags) -> list[dict]:
  rule = _fail('create', of_tpus=False)
  for name in names:
    if name in there['instances']:
      _add(there, 'instances', name, {})
    _instance(there, name, 0, flags['machine-type'], _labels(flags))
  if rule and rule['do'] == 'underway':
    there['instances'][names[0]]['status'] = 'PENDING'
    raise Refused(UNDERWAY)
  return []


def list_instances(there: dict, names: list[str], flags: Flags) -> list[dict]:
  _fail('look', of_tpus=False, created=bool(there['instances']))
  for group in there['groups'].values():
    _advance_group(there, group)
  for instance in there['instances'].values():
    instance['status'] = {'PENDING': 'STAGING', 'STAGING': 'RUNNING'}.get(instance['status'], instance['status'])
  return list(there['instances'].values())


def _advance_group(there: dict, group: dict) -> None:
  """A group waits for room, then has all its instances; a rule may hold it up or take them away again."""
  if group['stage'] == 'refused':
    return
  group['looks'] += 1
  if group['looks'] == 2:
    template = there['templates'][group['template']]
    for i in range(group['size']):
      _instance(there, f'{group["name"]}-{"qhzk"[i % 4]}{i:03d}', i, template['machine'], template['labels'],
                group['name'])
    if group['stage'] == 'preempted':
      cloud.preempt(there)
  elif group['looks'] > 2:  # what has stopped is deleted
    for name in [i['name'] for i in there['instances'].values() if i['status'] == 'STOPPING']:
      del there['instances'][name]


def create_group(there: dict, names: list[str], flags: Flags) -> list[dict]:
  rule = _fail('create', of_tpus=False)
  _take(there, 'templates', flags['template'])
  _take(there, 'policies', flags['workload-policy'].rpartition('/')[2])
  stage = {'quota later': 'refused', 'preempted': 'preempted'}.get((rule or {}).get('do'), 'waits')
  _add(there, 'groups', names[0], {'size': int(flags['size']), 'template': flags['template'], 'looks': 0,
                                   'stage': stage})
  return []


def group_errors(there: dict, names: list[str], flags: Flags) -> list[dict]:
  if _take(there, 'groups', names[0])['stage'] != 'refused':
    return []
  return [{'error': {'code': 'QUOTA_EXCEEDED', 'message': QUOTA.partition('- ')[2].partition('\n')[0]}}]


def delete_group(there: dict, names: list[str], flags: Flags) -> list[dict]:
  _take(there, 'groups', names[0])
  for instance in [i for i in there['instances'].values() if i['group'] == names[0]]:
    cloud.remove_host(instance['name'])
    del there['instances'][instance['name']]
  del there['groups'][names[0]]
  return []


def delete_instance(there: dict, names: list[str], flags: Flags) -> list[dict]:
  for name in names:
    _take(there, 'instances', name)
    cloud.remove_host(name)
    del there['instances'][name]
  return []


def create_template(there: dict, names: list[str], flags: Flags) -> list[dict]:
  _add(there, 'templates', names[0], {'labels': _labels(flags), 'machine': flags['machine-type']})
  return []


def create_policy(there: dict, names: list[str], flags: Flags) -> list[dict]:
  _add(there, 'policies', names[0], {'region': flags['region'], 'topology': flags['accelerator-topology']})
  return []


def _delete_of(kind: str, used_by: str = '', key: str = ''):
  def delete(there: dict, names: list[str], flags: Flags) -> list[dict]:
    _take(there, kind, names[0])
    if used_by and there[used_by]:
      raise Refused(f"The resource '{names[0]}' is already being used by '{next(iter(there[used_by]))}'")
    del there[kind][names[0]]
    return []
  return delete


def _describe_of(kind: str):
  return lambda there, names, flags: [_take(there, kind, names[0])]


def _hosts_of(accelerator: str) -> tuple[int, int]:
  """The hosts of a TPU, and the devices of each."""
  family, _, count = accelerator.rpartition('-')
  chips = int(count) // 2 if family == 'v4' else int(count)  # cores of v4 are counted, chips of the others
  hosts = 1 if chips <= (4 if family == 'v4' else 8) else chips // 4
  return hosts, chips // hosts


def create_queued(there: dict, names: list[str], flags: Flags) -> list[dict]:
  rule = _fail('create', of_tpus=True)
  stages = ['CREATING', 'WAITING_FOR_RESOURCES', 'PROVISIONING']
  ends = {'quota later': 'refused', 'stockout later': 'no room', 'preempted': 'preempted'}
  end = ends.get((rule or {}).get('do'), '')
  _add(there, 'queued', names[0], {'state': {'state': 'CREATING'}, 'stages': stages, 'end': end,
                                   'node': flags['node-id'], 'hosts': _hosts_of(flags['accelerator-type'])})
  return []


def describe_queued(there: dict, names: list[str], flags: Flags) -> list[dict]:
  _fail('look', of_tpus=True)
  queued = _take(there, 'queued', names[0])
  if queued['stages']:
    queued['state'] = {'state': queued['stages'].pop(0)}
  elif queued['state']['state'] == 'PROVISIONING':
    if queued['end'] == 'preempted':
      queued['state'] = {'state': 'SUSPENDED', 'stateInitiator': 'SERVICE'}
    elif queued['end']:
      text = ("Quota 'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' exhausted. Limit 0 in zone us-west4-a"
              if queued['end'] == 'refused' else TPU_STOCKOUT)
      queued['state'] = {'state': 'FAILED', 'failedData': {'error': {'code': 8, 'message': text}}}
    else:
      queued['state'] = {'state': 'ACTIVE'}
      name = queued['node']
      count, devices = queued['hosts']
      addresses = [cloud.add_host(there, f'{name}-{i}', i, devices) for i in range(count)]
      _add(there, 'nodes', name, {'state': 'READY', 'networkEndpoints': [{'ipAddress': x} for x in addresses]})
  return [queued]


def delete_queued(there: dict, names: list[str], flags: Flags) -> list[dict]:
  queued = _take(there, 'queued', names[0])
  node = there['nodes'].pop(queued['node'], None)
  if node and not flags.get('force'):
    there['nodes'][queued['node']] = node
    raise Refused(f"FAILED_PRECONDITION: Queued resource '{names[0]}' has a node; use --force")
  for i in range(len((node or {'networkEndpoints': []})['networkEndpoints'])):
    cloud.remove_host(f'{queued["node"]}-{i}')
  del there['queued'][names[0]]
  return []


def describe_node(there: dict, names: list[str], flags: Flags) -> list[dict]:
  _fail('look', of_tpus=True)
  return [_take(there, 'nodes', names[0])]


def _address(command: str, name: str, flags: Flags) -> str:
  """Of a host that is named as gcloud names it: an instance, or a TPU and the number of a worker."""
  with cloud.opened() as there:
    if 'tpu-vm' not in command:
      return _take(there, 'instances', name)['networkInterfaces'][0]['networkIP']
    node = _take(there, 'nodes', name)
    if node['state'] != 'READY':
      raise Refused(f'Cloud TPU VM is in the state {node["state"]}, which is unusable.')
    return node['networkEndpoints'][int(flags.get('worker', 0))]['ipAddress']


def ssh(command: str, names: list[str], flags: Flags) -> int:
  """Calls ssh, as gcloud does. Returns its exit status."""
  user, _, name = names[0].rpartition('@')
  words = [flags['ssh-flag']] if 'ssh-flag' in flags else []
  words.append(f'{user or "user"}@{_address(command, name, flags)}')
  words += ['--', flags['command']] if 'command' in flags else []
  status = shell.ssh(words)
  for _ in range(9 if 'tpu-vm' in command else 0):  # gcloud tries again by itself where the connection fails or breaks
    if status == 255:
      print(f'Retrying: SSH command error: [/usr/bin/ssh] exited with return code [{status}].', file=sys.stderr)
      status = shell.ssh(words)
  if status == 255:
    print(f'ERROR: (gcloud.{command.replace(" ", ".")}) [/usr/bin/ssh] exited with return code [255].', file=sys.stderr)
  return status


def scp(command: str, names: list[str], flags: Flags) -> int:
  """Calls scp, as gcloud does. Returns its exit status."""
  places = []
  for place in names:
    host, colon, path = place.partition(':')
    places.append(f'user@{_address(command, host.rpartition("@")[2], flags)}:{path}' if colon else place)
  return shell.scp((['-r'] if flags.get('recurse') else []) + places)


def configuration(there: dict, names: list[str], flags: Flags) -> list[dict]:
  print(os.environ.get('FAKE_' + names[0].rpartition('/')[2].upper(), ''))
  return []


COMMANDS = {
    'alpha compute tpus queued-resources create': create_queued,
    'compute instance-groups managed create': create_group,
    'compute instance-groups managed delete': delete_group,
    'compute instance-groups managed describe': _describe_of('groups'),
    'compute instance-groups managed list-errors': group_errors,
    'compute instance-templates create': create_template,
    'compute instance-templates delete': _delete_of('templates', 'groups'),
    'compute instances create': create_instance,
    'compute instances delete': delete_instance,
    'compute instances describe': _describe_of('instances'),
    'compute instances list': list_instances,
    'compute resource-policies create workload-policy': create_policy,
    'compute resource-policies delete': _delete_of('policies', 'groups'),
    'compute tpus queued-resources create': create_queued,
    'compute tpus queued-resources delete': delete_queued,
    'compute tpus queued-resources describe': describe_queued,
    'compute tpus tpu-vm describe': describe_node,
    'config get': configuration,
}
SHELLS = {'compute scp': scp, 'compute ssh': ssh, 'compute tpus tpu-vm scp': scp, 'compute tpus tpu-vm ssh': ssh}
