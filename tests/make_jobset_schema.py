"""Makes data/jobset_schema.json: what the published schema of JobSet v1alpha2 says, for gke_test.py.

    .venv/bin/python -m tests.make_jobset_schema CRD.yaml --commit=COMMIT

CRD.yaml is config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of github.com/kubernetes-sigs/jobset (Apache-2.0)
at that commit. Descriptions, the status, rules in CEL and containers other than a pod's own are left out. A field that
the schema does not name is refused, as `kubectl apply` refuses it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import yaml

SOURCE = ('https://github.com/kubernetes-sigs/jobset/blob/{commit}/config/components/crd/bases/'
          'jobset.x-k8s.io_jobsets.yaml')
VERSION = 'v1alpha2'
PATH = pathlib.Path(__file__).parent / 'data' / 'jobset_schema.json'
_LEFT_OUT = ('status', 'ephemeralContainers', 'initContainers')


def reduced(schema: dict[str, Any]) -> dict[str, Any]:
  """A schema of Kubernetes' OpenAPI as JSON Schema has it, closed and without prose."""
  found = {}
  for name, x in schema.items():
    if name == 'properties':
      found[name] = {key: reduced(value) for key, value in x.items() if key not in _LEFT_OUT}
    elif name in ('items', 'additionalProperties') and isinstance(x, dict):
      found[name] = reduced(x)
    elif name in ('anyOf', 'allOf', 'oneOf'):
      found[name] = [reduced(value) for value in x]
    elif name != 'description' and name != 'default' and not name.startswith('x-kubernetes'):
      found[name] = x
  if 'properties' in found and not schema.get('x-kubernetes-preserve-unknown-fields'):
    found.setdefault('additionalProperties', False)
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('crd', type=pathlib.Path)
  parser.add_argument('--commit', required=True)
  args = parser.parse_args()
  versions = yaml.safe_load(args.crd.read_text())['spec']['versions']
  schema = reduced(next(v['schema']['openAPIV3Schema'] for v in versions if v['name'] == VERSION))
  schema['properties']['metadata'] = {'type': 'object'}  # which is of every kind
  text = json.dumps({'source': SOURCE.format(commit=args.commit), 'schema': schema}, separators=(',', ':'))
  PATH.write_text(f'{text}\n')
  print(f'{PATH}: {len(text)} bytes')


if __name__ == '__main__':
  main()
