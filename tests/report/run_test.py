"""A workdir as a report reads it: whole, and with whatever may be missing."""

import json
import pathlib
import random

import pytest

from configs import hardware as hardware_config
from kr_jax.costs import hardware
from kr_jax.report import run
from kr_jax.report import scorecard
from tests.report import made_run

RECORDED = pathlib.Path(__file__).parents[2] / 'configs' / 'recorded' / 'smollm2_arithmetic.jsonl'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  return made_run.make(tmp_path_factory.mktemp('whole') / 'made', steps=4, every=2, kills=1)


def test_a_whole_run(whole):
  found = run.read(whole)
  assert (found.name, found.rule, found.seed, found.score, found.missing) == ('made', 'knapsack', 0, 'avg@4', [])
  assert [record['step'] for record in found.steps] == [0, 1, 2, 3] == found.rollout_steps
  assert [record['step'] for record in found.evaluations] == [0, 2, 4]
  assert (found.knob('alloc.rule'), found.knob('alloc.no_such'), found.knob('seed.no_such')) == ('knapsack', None, None)
  assert found.profile.name == 'v5e'
  assert len(found.ledger.attempts) == 2 and found.goodput['attempts'] == 2
  assert found.price.dollars.value > 0
  assert sum(map(len, found.by_phase.values())) == len(found.ledger.entries)


def test_other_hardware_prices_the_run_again(whole):
  tree = hardware_config.get_config('v5e')
  tree.profiles.v5e.dollars_per_hour *= 2
  other = run.read(whole, hardware=hardware.read(tree))
  assert other.price.dollars.value == pytest.approx(2 * run.read(whole).price.dollars.value)


@pytest.mark.parametrize('name, sentence', [
    ('config.json', 'config.json is not there: rule, seed, model and data are unknown'),
    ('metrics.jsonl', 'metrics.jsonl is not there: nothing is known of steps and evaluations'),
    ('ledger.jsonl', 'ledger.jsonl is not there or empty, as of runs of older versions'),
    ('hardware.json', 'hardware.json is not there: energy, money and use of peaks are unknown'),
    ('rollouts', 'rollouts/ holds nothing: there are no completions to show')])
def test_what_is_missing_is_said(tmp_path, name, sentence):
  workdir = made_run.make(tmp_path, steps=2, every=2, skip=(name,))
  assert [text for text in run.read(workdir).missing if text.startswith(sentence)]
  assert len(run.read(workdir).missing) == 1
  scorecard.view([run.read(workdir)])


def test_no_workdir(tmp_path):
  for path in (tmp_path / 'none', tmp_path / 'file'):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match=f'--workdir={path} is no directory; name the workdir of a run'):
      run.read(str(path))


def test_lines_that_are_no_records(tmp_path):
  """Half a line, garbage, a number that is none, and a step that was written twice."""
  evaluation = {'step': 0, 'eval/avg@4': 0.25, 'eval/avg@4_stderr': 0.05}
  step = {'step': 0, 'reward_mean': float('nan'), 'loss': float('inf')}
  lines = [json.dumps(evaluation), 'garbage', '[]', '{"step": "x"}', json.dumps(step), '{"step": 0}', '\x00\x00',
           json.dumps(step | {'tail': 1}), '{"step": 1, "reward']
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines))
  found = run.read(str(tmp_path))
  assert found.steps == [{'step': 0, 'reward_mean': None, 'loss': None, 'tail': 1}]
  assert found.evaluations == [evaluation]
  assert any(text.startswith('6 of 9 lines of metrics.jsonl are no records') for text in found.missing)
  # Records of older versions have no interval: 1.96 standard errors.
  assert found.success(evaluation) == 0.25
  assert found.success(evaluation, '_low') == pytest.approx(0.152)
  assert found.success(evaluation, '_high') == pytest.approx(0.348)


def test_a_run_of_an_older_version(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(RECORDED.read_text())
  found = run.read(str(tmp_path))
  assert (len(found.steps), len(found.evaluations), found.score, found.seed) == (200, 11, 'avg@4', None)
  assert ('metrics.jsonl is of an older version: without calibration, the status of training tasks, verifier health, '
          'the status of held-out tasks') in found.missing
  assert (found.price, found.goodput, found.profile, found.by_phase) == (None, None, None, {})


def test_a_ledger_that_does_not_cover_the_run(tmp_path):
  workdir = pathlib.Path(made_run.make(tmp_path, steps=4, every=2, kills=1))
  lines = (workdir / 'ledger.jsonl').read_text().splitlines()
  late = [line for line in lines if json.loads(line)['attempt'] == 1]
  first = json.loads(late[0])
  made_run.write_lines(workdir / 'ledger.jsonl', [first | {'first_step': 1}, *map(json.loads, late[1:])])
  assert 'ledger.jsonl begins with step 1: what the steps before it cost is unknown' in run.read(str(workdir)).missing
  (workdir / 'ledger.jsonl').write_text('\n'.join(lines[:8]) + '\n')
  assert any(text.startswith('ledger.jsonl ends with step 0') for text in run.read(str(workdir)).missing)
  bad = [{'attempt': 0, 'started': 'then'}, {'attempt': 7, 'step': 0, 'phase': 'sample', 'wall_s': 1.0},
         {'attempt': 0, 'step': 0, 'phase': 3, 'wall_s': 1.0}]
  with open(workdir / 'ledger.jsonl', 'a') as file:
    file.writelines(json.dumps(record) + '\n' for record in bad)
  assert '3 lines of ledger.jsonl are of no known form and were left out' in run.read(str(workdir)).missing


def test_figures_that_are_none():
  record = {'x': 1, 'yes': True, 'text': '1', 'none': None, 'inf': float('inf'), 'list': [1, 2.5], 'bad': [1, None]}
  assert [run.number(record, name) for name in record] == [1] + [None] * 6
  assert run.numbers(record['list']) == [1, 2.5]
  assert run.numbers(record['bad']) == run.numbers(record['x']) == run.numbers(None) == []


def _mangle(rng, x):
  """The JSON value with one part of it left out or replaced."""
  if isinstance(x, dict) and x and rng.random() < 0.9:
    name = rng.choice(sorted(x))
    if rng.random() < 0.3:
      return {other: y for other, y in x.items() if other != name}
    return x | {name: _mangle(rng, x[name])}
  if isinstance(x, list) and x and rng.random() < 0.8:
    i = rng.randrange(len(x))
    return [*x[:i], _mangle(rng, x[i]), *x[i + 1:]]
  return rng.choice([None, 'x', -1, 1e308, float('nan'), [], {}, [None], {'x': 'y'}, True, 2 ** 70])


@pytest.mark.slow
def test_no_record_breaks_the_view(whole, tmp_path):
  """Files that are cut or mangled anywhere give a view of plain finite values, and never an error."""
  rng, files = random.Random(0), {path: path.read_bytes() for path in pathlib.Path(whole).rglob('*') if path.is_file()}
  for trial in range(25):
    workdir = tmp_path / str(trial)
    for path, data in files.items():
      lines = data.split(b'\n')
      if path.suffix in ('.jsonl', '.json') and rng.random() < 0.7:
        if path.suffix == '.json':
          data = json.dumps(_mangle(rng, json.loads(data))).encode()
        else:
          for _ in range(3):
            i = rng.randrange(len(lines) - 1)
            lines[i] = json.dumps(_mangle(rng, json.loads(lines[i]))).encode()
          data = b'\n'.join(lines)
      elif rng.random() < 0.3:
        data = data[:rng.randrange(len(data))]
      target = workdir / path.relative_to(whole)
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(data)
    json.dumps(scorecard.view([run.read(str(workdir)), run.read(whole)], target=0.5), allow_nan=False)
