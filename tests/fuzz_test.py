"""Mutated inputs of each kind (tests/fuzz): some here, all kinds by the thousand where --all is given."""

import json
import logging
import subprocess
import sys

import pytest

from kr_jax.model import pretrained
from tests.fuzz import __main__ as fuzz
from tests.fuzz import targets

FEW = {'configs': 5, 'tokenizer_json': 10, 'template': 10, 'parquet': 10}


@pytest.fixture
def quiet(monkeypatch):
  monkeypatch.setattr(pretrained, 'note', lambda text: None)
  logging.disable(logging.CRITICAL)
  yield
  logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize('name', targets.TARGETS)
def test_cases_are_read_or_refused(name, tmp_path, quiet):
  found = []
  fuzz.run(name, 0, 0, FEW.get(name, 20), tmp_path, lambda case, what: found.append((case, what)))
  assert not found


@pytest.mark.parametrize('error, is_found', [
    (ValueError('a.json: it is no list of rows'), False), (ValueError('it is no list of rows'), True),
    (ValueError('a.json'), True), (ValueError('a.json' + 'x' * 9999), True), (KeyError('a.json: no such key'), True),
    (None, False)])
def test_what_is_a_finding(monkeypatch, tmp_path, error, is_found):
  def target(rng, folder):
    if error:
      raise error

  monkeypatch.setitem(targets.TARGETS, 'made', targets.Target(target, 1, 'a.json'))
  found = []
  fuzz.run('made', 0, 3, 2, tmp_path, lambda case, what: found.append(case))
  assert found == [3, 4] * is_found


def test_a_case_is_made_by_its_number(monkeypatch, tmp_path):
  drawn = []
  monkeypatch.setitem(targets.TARGETS, 'made', targets.Target(lambda rng, folder: drawn.append(rng.random()), 1))
  fuzz.run('made', 0, 0, 4, tmp_path, None)
  fuzz.run('made', 0, 2, 1, tmp_path, None)
  fuzz.run('made', 1, 2, 1, tmp_path, None)
  assert drawn[4] == drawn[2] != drawn[5] and len(set(drawn)) == 5


def test_a_child_that_hangs_or_dies_is_a_finding_and_the_next_case_runs(monkeypatch):
  """A child's exit status and the case that it wrote down say which."""
  starts = []

  def ended(command, **options):
    first = int(command[6])
    starts.append(first)
    with open(command[-1], 'r+b') as progress:
      progress.write((first + 1).to_bytes(8, 'little'))
    return subprocess.CompletedProcess(command, -14 if first == 0 else 0, b'{"case": 0, "what": "x"}\n', b'')

  monkeypatch.setattr(subprocess, 'run', ended)
  findings, _ = fuzz.fuzz('csv', 5, 10)
  assert starts == [0, 2] and [finding['case'] for finding in findings] == [0, 1, 0]
  assert findings[1]['what'].startswith('the process ended: SIGALRM')


@pytest.mark.exhaustive  # minutes
def test_twenty_thousand_cases():
  done = subprocess.run([sys.executable, '-m', 'tests.fuzz', '--cases=20000', '--seed=7'], stdout=subprocess.PIPE,
                        text=True, check=False)
  result = json.loads(done.stdout.splitlines()[-1])
  assert not done.returncode, done.stdout
  assert result['cases'] >= 20_000 and not result['findings']
