"""Makes data/gcloud_flags.json: what `gcloud` documents of the commands that launch/tpu.sh runs.

    python tests/make_gcloud_flags.py          # where a Google Cloud SDK is installed; without a network

Two sources of the SDK itself are put together. `gcloud meta lint-gcloud-commands`, which parses a command line without
running it, tells how arguments belong together: which are needed, which exclude each other, which have choices. The
table of its shell completion tells which of them are documented; the others are hidden, and may vanish.
ADDED holds what later versions document, each with its page.
"""

from __future__ import annotations

import json
import os
import pathlib
import runpy
import subprocess
import tempfile

FILE = pathlib.Path(__file__).parent / 'data' / 'gcloud_flags.json'
PAGE = 'https://cloud.google.com/sdk/gcloud/reference/'
COMMANDS = (
    'alpha compute tpus queued-resources create',
    'compute instance-groups managed create',
    'compute instance-groups managed delete',
    'compute instance-groups managed describe',
    'compute instance-groups managed list-errors',
    'compute instance-templates create',
    'compute instance-templates delete',
    'compute instances create',
    'compute instances delete',
    'compute instances list',
    'compute resource-policies create workload-policy',
    'compute resource-policies delete',
    'compute scp',
    'compute ssh',
    'compute tpus queued-resources create',
    'compute tpus queued-resources delete',
    'compute tpus queued-resources describe',
    'compute tpus tpu-vm describe',
    'compute tpus tpu-vm scp',
    'compute tpus tpu-vm ssh',
    'config get',
)
MODELS = ['FLEX_START', 'RESERVATION_BOUND', 'SPOT', 'STANDARD']
# (command, flag): what it takes and where that is documented. `True` is any value, a list has the choices.
ADDED = {
    ('compute instances create', '--provisioning-model'): (
        MODELS, 'https://docs.cloud.google.com/compute/docs/instances/create-flex-start-vm'),
    ('compute instances create', '--request-valid-for-duration'): (
        True, 'https://docs.cloud.google.com/compute/docs/instances/create-flex-start-vm'),
    ('compute instance-templates create', '--provisioning-model'): (
        MODELS, 'https://docs.cloud.google.com/compute/docs/instance-groups/bulk-create-instances-in-mig'),
    ('compute instance-groups managed create', '--target-size-policy-mode'): (
        ['bulk', 'individual'], 'https://docs.cloud.google.com/compute/docs/tpus/create-tpu-mig-multi-host-slice'),
}


def sdk() -> pathlib.Path:
  """The directory of the installed SDK."""
  found = subprocess.run(['gcloud', 'info', '--format=value(installation.sdk_root)'], check=True, text=True,
                         capture_output=True).stdout.strip()
  return pathlib.Path(found)


def documented(tree: dict, command: str) -> set[str]:
  """The flags of a command that completion offers, without those that every command has."""
  node, flags = tree, set()
  for word in command.split():
    node = node['commands'][word]
    flags |= set(node['flags'])
  return flags


def compact(argument: dict, known: set[str]) -> dict | None:
  """An argument or a group of some, without what is hidden."""
  if 'group' in argument:
    group = argument['group']
    members = [x for member in group['arguments'] if (x := compact(member, known))]
    out = {'group': members} | {name: True for name in ('mutex', 'required') if group.get(name)}
    return out if members else None
  if argument.get('positional'):
    return {'positional': argument['name']} | ({'required': True} if argument.get('required') else {})
  name = f'--{argument["name"]}'
  if name not in known:
    return None
  takes = argument.get('choices') or argument['type'] != 'bool'
  return {'flag': name, 'takes': takes} | ({'required': True} if argument.get('required') else {})


def arguments(tree: dict, command: str, config: str) -> list[dict]:
  """What a command takes. config: a directory for the SDK's own notes."""
  out = subprocess.run(['gcloud', 'meta', 'lint-gcloud-commands', f'--command-string=gcloud {command}'], check=True,
                       text=True, capture_output=True, env=os.environ | {'CLOUDSDK_CONFIG': config}).stdout
  known = documented(tree, command)
  return [x for argument in json.loads(out)[0]['args_structure']['arguments'] if (x := compact(argument, known))]


def main():
  root = sdk()
  tree = runpy.run_path(str(root / 'data' / 'cli' / 'gcloud_completions.py'))['STATIC_COMPLETION_CLI_TREE']
  with tempfile.TemporaryDirectory() as config:
    table = {command: arguments(tree, command, config) for command in COMMANDS}
  lines = [f'  "sdk": {json.dumps((root / "VERSION").read_text().strip())}', f'  "page": "{PAGE}"']
  wide = {flag: takes if isinstance(takes, list) else takes != 'bool' for flag, takes in tree['flags'].items()}
  lines.append(f'  "wide": {json.dumps(wide)}')
  added = [{'command': command, 'flag': flag, 'takes': takes, 'page': page}
           for (command, flag), (takes, page) in ADDED.items()]
  rows = ',\n'.join(f'    {json.dumps(row)}' for row in added)
  lines.append(f'  "added": [\n{rows}\n  ]')
  rows = ',\n'.join(f'   "{command}": [\n' + ',\n'.join(f'    {json.dumps(x)}' for x in found) + '\n   ]'
                    for command, found in table.items())
  lines.append(f'  "commands": {{\n{rows}\n  }}')
  FILE.write_text('{\n' + ',\n'.join(lines) + '\n}\n')


if __name__ == '__main__':
  main()
