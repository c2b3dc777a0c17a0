"""Advice by hand from tiny records, in worlds where it is known, and of records that tell too little."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import common
from kr_jax import advise
from kr_jax import prepare
from kr_jax.allocation import forecast
from kr_jax.record import rollouts as rollouts_lib
from kr_jax.report import run as run_lib
from tests.report import made_run

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = {'alloc': {'rule': 'uniform', 'rollouts_per_step': 8, 'low': 2, 'high': 8, 'estimate': 'posterior',
                    'value': 'infogain', 'nu_every': 0, 'waves': 1, 'cost': 'rollouts'},
          'tasks': {'per_step': 2, 'candidates_per_step': 0},
          'grpo': {'advantage': 'std'}, 'num_steps': 20, 'evaluate': {'rollouts': 4}}


def step(number, right, index=(0, 1), budget=(4, 4), **more):
  return {'step': number, 'reward_mean': 0.5, 'effective_gradient_ratio': 0.5, 'nu': 2.0, 'group_index': list(index),
          'group_budget': list(budget), 'group_right': list(right), 'group_verified': list(budget), **more}


def write(folder, records, config=None, rollouts=()):
  made_run.write_lines(folder / 'metrics.jsonl', records)
  if config:
    (folder / 'config.json').write_text(json.dumps(config))
  for record in rollouts:
    (folder / 'rollouts').mkdir(exist_ok=True)
    (folder / 'rollouts' / f'{record["step"]:06}.jsonl.zst').write_bytes(rollouts_lib.packed([record]))
  return run_lib.read(str(folder))


def evaluation(number, success):
  return {'step': number, 'eval/avg@4': success}


def four(right=(4, 2)):
  """Four steps of tasks 0 to 3, two by two: right[0] of the first and right[1] of the second are right of four each."""
  return [step(i, right, index=(2 * (i % 2), 2 * (i % 2) + 1)) for i in range(4)]


def test_what_is_measured_by_hand(tmp_path):
  kept = [{'step': i, 'task': 'a', 'length': n, 'verdict': verdict} for i, (n, verdict) in enumerate(
      [(10, 'right'), (10, 'right'), (30, 'wrong'), (20, 'wrong')])]
  found = advise.measure(write(tmp_path, [evaluation(0, 0.2), *four(), evaluation(15, 0.6)], CONFIG, kept))
  assert (found.tasks, found.per_step, found.rollouts, found.per_task, found.low, found.high) == (4, 2, 8, 4, 2, 8)
  assert (found.steps, found.recorded, found.first_step, found.rule) == (4, 4, 0, 'uniform')
  assert found.silent == 0.5 and found.gradient_ratio == 0.5  # the group of every first task is all right
  # Each task has two groups of four: 8 and 8 of 8 right, or 4 of 8; of the mean .75 and 4 tasks the prior is drawn to
  # (3 + 1) / (4 + 2).
  assert found.belief.mean_M[0] == found.belief.mean_M[2] > 0.85
  assert 0.5 < found.belief.mean_M[1] < 0.6
  assert sum(found.classes) == pytest.approx(1) and found.classes[0] < 0.01 and found.classes[4] > 0.2
  assert found.nu == (1.0, 5.0, 30.0)
  assert found.lift == pytest.approx(0.5) and found.num_steps == 15  # .4 of .8 was learnt, in 15 steps
  assert found.lengths == pytest.approx((10, 27, 2.5))
  assert found.assumed == {'tasks', 'nu', 'alignment'}


def test_what_is_not_recorded_is_assumed(tmp_path):
  found = advise.measure(write(tmp_path, four()))
  assert (found.per_step, found.rollouts, found.low, found.high, found.num_steps, found.lift) == (2, 8, 2, 128, 4, 0.5)
  assert found.config == 'CONFIG' and found.rule is None and found.lengths is None
  assert found.assumed == {'tasks', 'nu', 'alignment', 'lift', 'num_steps', 'alloc.low', 'alloc.high', 'tasks.per_step',
                           'alloc.rollouts_per_step'}


def test_a_measured_nu_and_a_later_start(tmp_path):
  records = [evaluation(0, 0.2), *(record | {'nu': nu} for record, nu in zip(four(), (99.0, 8.0, 6.0, 5.0)))]
  config = CONFIG | {'alloc': CONFIG['alloc'] | {'nu_every': 1}}
  run = write(tmp_path, records, config)
  found = advise.measure(run)
  assert found.nu == (5 / 1.5, 5.0, 7.5) and 'nu' not in found.assumed and 'lift' in found.assumed
  later = advise.measure(run, first_step=1)
  assert (later.first_step, later.steps, later.recorded, later.num_steps) == (1, 3, 4, 19)


@pytest.mark.parametrize('change, match', [
    ([], r'holds 0 steps, and advice needs 3 at the least'),
    (four()[:1], r'holds 1 steps, and advice needs 3'),
    ([{'step': i, 'reward_mean': 0.5} for i in range(4)], 'does not tell what came of each task of step 0, as of'),
    ([step(i, (0, 1), budget=(1, 1)) for i in range(4)], '2 rollouts of 2 tasks a step, and rules are compared with'),
    ([step(i, (0, 0), group_verified=[0, 0]) for i in range(4)], 'holds no verdict in 4 steps; mend the verifier'),
])
def test_records_that_tell_too_little(tmp_path, change, match):
  with pytest.raises(ValueError, match=match):
    advise.measure(write(tmp_path, change))


def test_nothing_to_learn_is_said_without_a_simulation(tmp_path, monkeypatch):
  monkeypatch.setattr(forecast, 'outcomes', None)
  for right, why in (((4, 4), 'solved: nothing is left'), ((0, 0), 'without a right rollout')):
    measured = advise.measure(write(tmp_path, four(right), CONFIG))
    found = advise.forecast(measured)
    assert found.verdict == 'not worth it' and why in found.why and not found.ranges
    assert f'verdict: not worth it: every task of 4 steps is {why}' in advise.text(measured, found)
    assert json.loads(json.dumps(advise.figures(measured, found), allow_nan=False))['forecast']['rule'] is None


def made(share, **of_run):
  """A forecast from worlds in which the knapsack needs this share."""
  return lambda case, noises, rules, **_: {rule: [forecast.Outcome(noise, 0, share, 0.01) for noise in noises]
                                           for rule in rules}


def test_what_is_said(tmp_path, monkeypatch, capsys):
  write(tmp_path, four(), CONFIG)
  monkeypatch.setattr(forecast, 'outcomes', made(0.8))
  advise.run([str(tmp_path)], output=str(tmp_path / 'out' / 'advice.json'))
  said = capsys.readouterr().out
  for line in (f'{tmp_path}: uniform, 4 of 4 steps read, from step 0 on, few for an estimate',
               'measured   tasks, rollouts a step             2, 8: 4 a task, 2 to 8',
               'at least   steps of a pass over the split     2 (4 tasks); 10 passes in 20 steps',
               'knapsack     0.80 (0.80-0.80)     success +0.010 at equal rollouts',
               'verdict: worth it: knapsack needs less than uniform budgets in all worlds',
               'set: --config.alloc.rule=knapsack\n', 'to measure nu: python -m kr_jax.main --config=CONFIG --workdir=',
               "  {'alloc.rule': 'uniform', 'tasks.candidates_per_step': 0}\n",
               'a simulation is no proof'):
    assert line in said, line
  assert len(said.splitlines()) < 30
  written = json.loads((tmp_path / 'out' / 'advice.json').read_text())
  assert written['forecast']['ranges']['knapsack'] == {
      'median': 0.8, 'low': 0.8, 'high': 0.8, 'gain': 0.01, 'reached': 3, 'worlds': 3}
  assert written['measured']['tasks'] == 4 and written['forecast']['flags'] == ['--config.alloc.rule=knapsack']
  monkeypatch.setattr(forecast, 'outcomes', made(None))
  advise.run([str(tmp_path)] * 2)
  assert capsys.readouterr().out.count('verdict: not worth it: every rule needs more') == 2


@pytest.mark.slow
def test_the_command(tmp_path):
  """It needs no config, no data and no checkpoint."""
  write(tmp_path, four((4, 4)))
  done = subprocess.run([sys.executable, '-m', 'kr_jax.main', '--mode=advise', f'--workdir={tmp_path}',
                         f'--json={tmp_path}/advice.json'], cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 0 and 'verdict: not worth it: every task of 4 steps is solved' in done.stdout, done.stderr
  assert json.loads((tmp_path / 'advice.json').read_text())['forecast']['verdict'] == 'not worth it'
  done = subprocess.run([sys.executable, '-m', 'kr_jax.main', '--mode=advise', f'--workdir={tmp_path}', '--step=3'],
                        cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 1 and done.stderr.startswith(f'error: {tmp_path} holds 1 steps from step 3 on'), done.stderr


def test_flags_by_hand(tmp_path):
  measured = advise.measure(write(tmp_path, four(), CONFIG))
  assert advise.flags(measured, 'candidates') == [
      '--config.alloc.rule=knapsack', '--config.tasks.candidates_per_step=4', '--config.alloc.low=0',
      '--config.alloc.solver=dp']
  assert advise.flags(measured, 'dynamic') == [
      '--config.alloc.rule=dynamic', '--config.alloc.low=0', '--config.tasks.candidates_per_step=6']
  assert advise.flags(measured, 'snr')[-2:] == ['--config.grpo.advantage=loo', '--config.alloc.nu=5.0']
  assert set(advise.KNOBS) == set(forecast.RULES)


@pytest.mark.parametrize('config', ['', 'dynamic', 'snr'])
@pytest.mark.parametrize('rule', advise.KNOBS)
def test_a_run_by_the_flags_of_a_rule_is_not_refused(tmp_path, rule, config):
  """Whatever the rule of the run that was measured, whose other knobs stay."""
  measured = advise.measure(write(tmp_path, four(), CONFIG))
  c = common.base()
  c.unlock()
  c.tasks.dataset, c.tasks.per_step, c.alloc.rollouts_per_step, c.alloc.high = 'ciphers_late', 2, 8, 8
  for knobs in (advise.knobs_of(measured, config) if config else {}, advise.knobs_of(measured, rule)):
    c.update_from_flattened_dict(knobs)
  prepare.abstract(c, jax.devices()[:1])


def test_a_measured_signal_to_noise_decides_the_noise(tmp_path, monkeypatch):
  noises = []
  monkeypatch.setattr(forecast, 'outcomes', lambda case, found, rules, **_: noises.extend(found) or made(0.9)(
      case, found, rules))
  measured = advise.measure(write(tmp_path, four(), CONFIG))
  advise.forecast(measured, batch_signal_to_noise=0.003)
  p_X = measured.case.population.draw(np.random.default_rng(0), 4096)
  for noise in noises:
    assert forecast.batch_signal_to_noise(p_X, 2, 4, noise, anew=True) == pytest.approx(0.003)
  assert [x.alignment for x in noises] == [0.1, 0.25, 0.4]
  noises.clear()
  least, middle, most = advise.forecast(measured).signal_to_noise
  assert least < middle < most and [x.nu for x in noises] == [30.0, 5.0, 1.0]
  with pytest.raises(ValueError, match='a batch signal-to-noise of -1 must be a number above 0'):
    advise.forecast(measured, batch_signal_to_noise=-1)


def test_the_population_is_that_of_the_tasks():
  belief = advise.Beta(np.array([1e6, 1e6, 3e6]), np.array([1e6, 3e6, 1e6]))
  draw = advise.population(belief).draw
  np.testing.assert_allclose(np.sort(draw(np.random.default_rng(0), 3)), [0.25, 0.5, 0.75], atol=0.01)
  assert draw(np.random.default_rng(0), 2).shape == (2,) and draw(np.random.default_rng(0), 999).mean() > 0.4


@pytest.mark.slow
def test_it_is_worth_it_where_rates_are_spread_and_gradients_are_noise(tmp_path):
  """Of twelve tasks in fours ten are solved or hopeless. Where all are alike no difference is seen."""
  def of(rates, nu):
    rng = np.random.default_rng(0)
    records = []
    for i in range(16):
      index = [(4 * i + j) % 64 for j in range(4)]
      records.append(step(i, rng.binomial(8, rates[index]).tolist(), index=index, budget=[8] * 4, nu=nu))
    config = CONFIG | {'alloc': CONFIG['alloc'] | {'rollouts_per_step': 32, 'high': 32, 'nu_every': 1},
                       'tasks': {'per_step': 4}, 'num_steps': 48}
    return advise.measure(write(tmp_path, records, config))

  rules = {'knapsack': forecast.RULES['knapsack']}
  u_shaped = of(np.resize([0.0, 0.999, 0.999, 0.999, 0.999, 0.1], 64), 30.0)
  assert advise.forecast(u_shaped, rules=rules, seeds=1).verdict == 'worth it'
  alike = of(np.full(64, 0.5), 0.1)
  assert advise.forecast(alike, rules=rules, seeds=1).verdict == 'no difference expected'
