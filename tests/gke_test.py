"""launch/gke.yaml: what the schema of JobSet says, and what it cannot say."""

import copy
import json
import pathlib

import jsonschema
import pytest
import yaml

from kr_jax import exits
from kr_jax import main

ROOT = pathlib.Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / 'tests' / 'data' / 'jobset_schema.json').read_text())['schema']
JOBSET = yaml.safe_load((ROOT / 'launch' / 'gke.yaml').read_text())
JOB = JOBSET['spec']['replicatedJobs'][0]['template']['spec']
POD = JOB['template']['spec']
RUN = POD['containers'][0]


def problems(jobset):
  return [f'{"/".join(map(str, error.absolute_path))}: {error.message}'
          for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(jobset)]


def test_it_is_what_the_published_schema_says():
  assert problems(JOBSET) == []
  assert JOBSET['apiVersion'] == 'jobset.x-k8s.io/v1alpha2' and JOBSET['kind'] == 'JobSet'


@pytest.mark.parametrize('path, value', [
    (('spec', 'failurePolicy', 'rules', 0, 'action'), 'Retry'), (('spec', 'failurePolicy', 'maxRestart'), 3),
    (('spec', 'replicatedJobs', 0, 'template', 'spec', 'completions'), '4'),
    (('spec', 'replicatedJobs', 0, 'template', 'spec', 'template', 'spec', 'nodeselector'), {})])
def test_what_it_does_not_say_is_refused(path, value):
  changed = copy.deepcopy(JOBSET)
  node = changed
  for part in path[:-1]:
    node = node[part]
  node[path[-1]] = value
  assert len(problems(changed)) == 1


def test_the_hosts_are_those_of_the_slice():
  """v5e has four chips a host, as its machine type ct5lp-hightpu-4t says."""
  selector, chips = POD['nodeSelector'], RUN['resources']['limits']['google.com/tpu']
  x, y = map(int, selector['cloud.google.com/gke-tpu-topology'].split('x'))
  assert selector['cloud.google.com/gke-tpu-accelerator'] == 'tpu-v5-lite-podslice'
  assert JOB['completions'] == JOB['parallelism'] == x * y // chips == 4
  assert JOBSET['spec']['network']['enableDNSHostnames'] and 'hostNetwork' not in POD


def test_exit_statuses_start_it_again_or_end_it():
  """Kubernetes asks for restartPolicy Never beside a podFailurePolicy, whose reason the JobSet then reads."""
  policy, = JOB['podFailurePolicy']['rules']
  assert policy['action'] == 'FailJob' and policy['onExitCodes']['operator'] == 'In'
  ends = policy['onExitCodes']['values']
  assert ends == [1, 2] and exits.AGAIN not in ends and policy['onExitCodes']['containerName'] == RUN['name']
  assert POD['restartPolicy'] == 'Never' and JOB['backoffLimit'] == 0
  rule, = JOBSET['spec']['failurePolicy']['rules']
  assert (rule['action'], rule['onJobFailureReasons']) == ('FailJobSet', ['PodFailurePolicy'])
  assert f'|| exit {exits.AGAIN}\n' in RUN['args'][0] and '\nexec python -m kr_jax.main' in RUN['args'][0]


def test_the_command_is_one_that_the_program_takes():
  *_, command = RUN['args'][0].strip().splitlines()
  values = {variable['name']: variable['value'] for variable in RUN['env']}
  given = [part.strip('"').replace('"', '') for part in command.split() if part.startswith('--')]
  taken = main.MODES['train'].needs + main.MODES['train'].takes
  assert {flag.partition('=')[0].removeprefix('--') for flag in given} <= set(taken)
  assert {flag.partition('=')[2] for flag in given} == {'auto', '$CONFIG', '$WORKDIR'}
  assert values['WORKDIR'].startswith('gs://')
  assert (ROOT / 'configs' / f'{values["CONFIG"].removeprefix("kr_jax:")}.py').is_file()
