"""The comparison of rules: its plan, its runs with made-up workers, and its analysis of lines made by hand."""

import json
import math

import jax
import numpy as np
import pytest

from configs import common
from kr_jax import prepare
from tests import knobs as tests_knobs
from tests.benchmarks.proof import __main__ as command
from tests.benchmarks.proof import analysis
from tests.benchmarks.proof import plan
from tests.benchmarks.proof import runs
from tests.benchmarks.proof import signal
from tests.benchmarks.proof import tables
from tests.report import made_run

ISSUE = {  # what the issue names: an arm's knobs beside those of the plain knapsack
    'uniform': {'alloc.rule': 'uniform'}, 'uniform_2n': {'alloc.rule': 'uniform', 'alloc.rollouts_per_step': 128},
    'dapo': {'alloc.rule': 'dynamic', 'alloc.low': 0, 'tasks.candidates_per_step': 24},
    'paper': {'alloc.estimate': 'window', 'alloc.high': 128}, 'knapsack': {}, 'snr': {'alloc.value': 'snr'},
    **{x: {'alloc.value': x} for x in ('variance', 'mixed', 'hit', 'coba')},
    **{x: {'grpo.advantage': x} for x in ('loo', 'posterior', 'maxrl')},
    **{x: {'grpo.weight': x} for x in ('task', 'sqrt')}, 'waves': {'alloc.waves': 2},
    'candidates': {'alloc.low': 0, 'tasks.candidates_per_step': 16}, 'tokens': {'alloc.cost': 'tokens'}}
MORE = {  # two changes at once
    **{f'candidates_{x}': ISSUE['candidates'] | {'alloc.value': x} for x in ('variance', 'mixed', 'hit')},
    **{f'candidates_{x}': ISSUE['candidates'] | {'grpo.advantage': x} for x in ('loo', 'posterior')},
    **{f'uniform_{x}': ISSUE['uniform'] | {'grpo.advantage': x} for x in ('loo', 'posterior')}}


def base():
  c = common.base()
  c.num_steps, c.evaluate.every = 400, 50
  c.tasks.dataset, c.tasks.per_step, c.alloc.rollouts_per_step = 'ciphers_late', 8, 64
  c.sample.slots, c.sample.prompt_length, c.sample.completion_length = 64, 9, 8
  c.alloc.high, c.pack.row_length = 32, 64
  c.warm_start.num_steps = 30
  return c


def of_debug(data_dir):
  c = tests_knobs.debug_config(data_dir, evaluate__every=2)
  c.alloc.rollouts_per_step = 32
  return c


def line(arm, seed, success, *, role='test', multiple=1.0, rollouts=(0, 100, 200), cell=('late', 'small'), **more):
  """A line whose costs are rollouts, 10 tokens and 1000 FLOPs each, and .01 s."""
  points = {'rollouts': list(rollouts), 'tokens': [10 * x for x in rollouts], 'flops': [1000 * x for x in rollouts],
            'device_s': [0.01 * x for x in rollouts], 'success': list(success),
            **{status: list(success) for status in runs.STATUSES}}
  return {'family': cell[0], 'batch': cell[1], 'arm': arm, 'seed': seed, 'role': role, 'multiple': multiple,
          'points': points, 'effective_gradient_ratio': 0.4, 'mixed_tasks': 3.0, 'forgotten': 0.1} | more


# The plan.


@pytest.mark.slow
def test_the_arms_are_those_of_the_issue_and_runs_could_follow_their_configs():
  assert plan.ARMS.keys() == {*ISSUE, *MORE}
  plain = plan.config(plan.Run('late', 'small', 'knapsack', 3, 'test', 1.0), base())
  for arm, changed in {**ISSUE, **MORE}.items():
    c = plan.config(plan.Run('late', 'small', arm, 3, 'test', 3.0), base())
    prepare.abstract(c, jax.devices()[:1])  # which refuses what no step could follow
    found = {f'{section}.{name}': x for section in ('alloc', 'grpo', 'tasks') for name, x in c[section].items()}
    assert {name: found[name] for name in changed} == changed
    differs = {name for name, x in found.items() if x != plain[name.split('.')[0]][name.split('.')[1]]}
    assert differs <= {*changed, 'alloc.nu_every', 'alloc.tokens_per_step', 'alloc.rollouts_per_step'}, (arm, differs)
    halves = arm in ('uniform_2n', 'dapo')
    assert (c.num_steps, c.evaluate.every) == ((200, 25) if halves else (400, 50))
    assert c.seed == 3 and c.optimizer.learning_rate == pytest.approx(3 * common.base().optimizer.learning_rate)
    assert plan.warm_start('late', c) == plan.warm_start('late', plain)  # which arms of a seed share
  assert not set(plan.TUNING_SEEDS) & set(plan.TEST_SEEDS) and len(plan.TEST_SEEDS) >= 12
  assert len(plan.RESERVED) <= plan.MOST_FINALISTS == 6


def test_a_warm_start_is_of_its_seed_and_its_policy():
  run, c = plan.Run('late', 'small', 'uniform', 3, 'test', 1.0), base()
  found = plan.warm_start('late', plan.config(run, c))
  assert found != plan.warm_start('late', plan.config(run._replace(seed=4), c))
  c.policy.width *= 2
  assert found != plan.warm_start('late', plan.config(run, c))
  c.warm_start.num_steps = 0
  assert plan.warm_start('late', plan.config(run, c)) is None


def test_what_the_plan_refuses(monkeypatch, tmp_path):
  with pytest.raises(ValueError, match="the arm 'best' is not one of uniform, uniform_2n"):
    plan.config(plan.Run('late', 'small', 'best', 0, 'test', 1.0), base())
  odd = base()
  odd.num_steps = 399
  with pytest.raises(ValueError, match='num_steps=399 and evaluate.every=50 must both be even'):
    plan.config(plan.Run('late', 'small', 'dapo', 0, 'test', 1.0), odd)
  monkeypatch.setattr(plan.shipped, 'FOLDER', str(tmp_path))
  with pytest.raises(ValueError, match=r'--family=late needs .*proof_late\.py, which is not there'):
    plan.module('late')
  (tmp_path / 'proof_late.py').write_text('TARGET = 0.5\n')
  with pytest.raises(ValueError, match='proof_late.py lacks BATCHES, get_config'):
    plan.module('late')


# The runs.


class Worker:
  """Answers at once, as `answer` says of the run."""

  def __init__(self, inbox, answer):
    self._inbox, self._answer, self.closed = inbox, answer, False

  def begin(self, order):
    for message in self._answer(plan.Run(*order['run'])):
      self._inbox.put((self, message))

  def close(self):
    self.closed = True

  def wait(self):
    assert self.closed


def test_nothing_is_tuned_on_what_is_tested(tmp_path):
  """Whatever --seeds says; and a rate with more seeds than another is told by those that all have."""
  stage = lambda *flags: command.next_stage(command.parse(
      ['--family', 'late', '--batch', 'small', '--arms', 'uniform', f'--record={tmp_path}', '--jobs=1', *flags]))
  found = stage('--seeds', '0', '1', '100')
  assert {(run.role, run.seed) for run in found} == {('tuning', 100)}
  assert {(run.role, run.seed) for run in stage('--seeds', '0', '1')} == {('test', 0), ('test', 1)}
  assert stage('--seeds', '100', '--role', 'test') == []
  lines = [*tuning('uniform', 1, 0.4), *tuning('uniform', 3, 0.5),
           line('uniform', 5, [1.0, 1.0, 1.0], role='tuning', multiple=1.0)]
  assert analysis.cells(lines)['late_small'].tuned('uniform') == 3.0


def test_lines_of_another_config_are_counted(monkeypatch):
  monkeypatch.setattr(plan, '_variant', lambda family, batch: base())
  run = plan.Run('late', 'small', 'uniform', 100, 'tuning', 1 / 3)
  found = line('uniform', 100, [0.0, 0.1, 0.2], role='tuning', multiple=plan.rounded(1 / 3),
               digest=plan.digest(plan.config(run)))
  assert command.outdated([found]) == {}
  changed = base()
  changed.evaluate.every = 10
  monkeypatch.setattr(plan, '_variant', lambda family, batch: changed)
  assert command.outdated([found, found | {'seed': 101}]) == {'late_small': 2}


def carry_out(todo, record, answer, jobs=2, warm=None, **more):
  orders = {run: {'run': tuple(run), 'warm': warm and warm / str(run.seed)} for run in todo}
  return runs.carry_out(orders, lambda number, inbox: Worker(inbox, answer), jobs,
                        lambda line: runs.append(record, line), **more)


def done(run):
  return [{'line': line(run.arm, run.seed, [0.1, 0.2, 0.3], role=run.role, multiple=run.multiple), 'leaves': False}]


def test_what_is_recorded_is_not_run_again_and_a_failure_stops_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(plan, 'TUNING_SEEDS', (100,))
  args = command.parse(['--family', 'late', '--batch', 'small', '--arms', 'uniform', 'knapsack', '--seeds', '100',
                        '101', '--role', 'tuning', f'--record={tmp_path}', '--jobs=1'])
  todo = command.next_stage(args)
  assert len(todo) == 2 * 2 * 3 and len({run.key for run in todo}) == 12

  def answer(run):
    if run.seed == 101 and run.arm == 'uniform':
      return [{'error': 'ValueError: no'}] if run.multiple == 1 else [{'died': -9}]
    return done(run)

  failed = carry_out(todo, tmp_path, answer)
  assert [(run.arm, run.seed) for run, _ in failed] == [('uniform', 101)] * 3
  assert {why for _, why in failed} == {'ValueError: no', 'the worker ended with -9; its log says why'}
  left = command.next_stage(args)
  assert left == [run for run, _ in sorted(failed, key=lambda x: x[0].multiple)]  # 1/3 is recorded with 5 digits
  assert command.next_stage(args, left) == []
  with open(runs.path_of(tmp_path, 'late_small'), 'a') as file:  # as a crash leaves it
    file.write('{"family": "la')
  assert carry_out(left, tmp_path, done) == [] and command.next_stage(args) == []
  assert len(runs.read(tmp_path)) == 12 and 'FAILED: ValueError: no' in capsys.readouterr().out
  assert carry_out(todo, tmp_path, pytest.fail, until=-math.inf) == []  # after the minutes none is begun


def test_a_warm_start_is_made_once_and_waited_for(tmp_path):
  """Two workers: while a run makes the warm start of its seed, one of the other seed is begun, of another arm."""
  events, todo = [], plan.runs(['late_small'], ['uniform', 'paper'], [1, 2], 'test', [1.0])

  def answer(run):
    events.append(f'begin {run.arm} {run.seed}')
    return done(run)

  orders = {run: {'run': tuple(run), 'warm': tmp_path / str(run.seed)} for run in todo}
  make = lambda: runs.carry_out(orders, lambda number, inbox: Worker(inbox, answer), 2, lambda line: events.append(
      f"end {line['arm']} {line['seed']}"))
  assert make() == []
  assert events == ['begin uniform 1', 'begin paper 2', 'end uniform 1', 'begin paper 1', 'end paper 2',
                    'begin uniform 2', 'end paper 1', 'end uniform 2']
  events.clear()
  for seed in (1, 2):
    (tmp_path / str(seed)).mkdir()
  assert make() == []
  assert events[:2] == ['begin uniform 1', 'begin paper 1']  # both seeds have one, and each worker its own programs
  assert events[3] == 'begin uniform 2'


def test_the_line_of_a_run(tmp_path):
  """Costs are those of steps alone; statuses are of the first evaluation."""
  workdir = made_run.make(tmp_path / 'run', steps=8, every=4, rollouts=64, held_out=16)
  run = plan.Run('late', 'small', 'knapsack', 0, 'test', 1 / 3)
  found = runs.measured(run, workdir, 'abc')
  assert runs.key(found) == run.key and len(json.dumps(found)) < 2048
  points = found['points']
  assert points['rollouts'] == [0, 256, 512] and found['rollouts'] == 512
  entries = [json.loads(x) for x in (tmp_path / 'run' / 'ledger.jsonl').read_text().splitlines()]
  steps = [x for x in entries if x.get('phase') in (
      'allocate', 'reshard', 'sample', 'detokenise', 'verify', 'pack', 'score', 'update', 'record', 'wait')]
  seconds = sum(x['device_s'] for x in steps) - runs.loading_s(steps)
  assert points['device_s'][-1] == pytest.approx(seconds, rel=1e-4) and points['device_s'][0] == 0
  assert points['flops'][-1] == pytest.approx(sum(x.get('flops_executed', 0) for x in steps), rel=1e-4)
  assert any(x.get('phase') == 'evaluate' and x['device_s'] for x in entries)
  assert len(points['success']) == len(points['hard']) == 3


def test_what_the_first_step_loads_is_left_out_by_hand():
  seconds = ((0, 5.0), (0, 1.0), (1, 2.0), (2, 1.0), (2, 1.5))  # 6, 2 and 2.5 of a step
  assert runs.loading_s([{'step': step, 'device_s': s} for step, s in seconds]) == pytest.approx(3.5)
  assert runs.loading_s([]) == 0


def test_statuses_and_what_is_forgotten_by_hand():
  first = {'right': [0, 3, 4, 5, 5, 0], 'verified': [5, 5, 5, 5, 5, 0]}
  last = {'right': [1, 5, 2, 3, 5, 1], 'verified': [5, 5, 5, 5, 5, 5]}
  assert runs.statuses(first).tolist() == ['hard', 'mixed', 'solved', 'solved', 'solved', '']
  found = runs.by_status([first, last])
  assert found == {'solved': [pytest.approx(14 / 15), pytest.approx(10 / 15)], 'mixed': [0.6, 1.0], 'hard': [0.0, 0.2]}
  assert runs.forgotten(first, last) == pytest.approx(1 / 3)  # 4 -> 2 of 5
  assert runs.forgotten({'right': [0], 'verified': [5]}, {'right': [5], 'verified': [5]}) is None


def test_two_comparisons_do_not_share_a_folder(tmp_path):
  with runs.alone(tmp_path), pytest.raises(ValueError, match='is that of a comparison that is at work'):
    with runs.alone(tmp_path):
      pass


def test_flags_that_are_refused(capsys):
  for flags, said in ((['--jobs=0'], '--jobs=0 must be 1 to'), (['--arms', 'best'], "invalid choice: 'best'"),
                      (['--quick', '--arms', 'snr'], '--quick says which runs')):
    with pytest.raises(SystemExit):
      command.parse(flags)
    assert said in capsys.readouterr().err
  assert command.parse(['--quick', '--jobs=1']).arms == ('uniform', 'knapsack')


@pytest.mark.exhaustive
def test_a_run_does_not_depend_on_what_ran_before_in_its_process(tmp_path, data_dir):
  """The same run before and after another one, of other programs: the same line but for seconds. The warm start of the
  first one is copied."""
  of = lambda arm, seed: plan.Run('late', 'small', arm, seed, 'test', 1.0)
  lines, told = [], []
  for n, run in enumerate((of('snr', 1), of('loo', 2), of('snr', 1))):
    c = plan.config(run, of_debug(data_dir))
    lines.append(runs.make(run, c, tmp_path / str(n), tmp_path / f'warm_{run.seed}', lambda: told.append(run)))
    del lines[-1]['points']['device_s']
  assert told == [of('snr', 1), of('loo', 2)]
  assert lines[0] == lines[2] and lines[0]['points'] != lines[1]['points']


# The analysis.


def test_area_and_success_at_equal_rollouts_by_hand():
  one = line('uniform', 0, [0.2, 0.4, 0.8])
  assert analysis.area(one, 200) == pytest.approx((30 + 60) / 200)
  assert analysis.area(one, 100) == pytest.approx(0.3)
  assert analysis.area(one, 400) == pytest.approx((90 + 160) / 400)  # the last success is kept
  assert analysis.success_at(one, 150) == pytest.approx(0.6) and analysis.success_at(one, 300) == 0.8
  unknown = line('uniform', 0, [0.2, None, 0.8])
  assert analysis.success_at(unknown, 100) == pytest.approx(0.5) and analysis.success_at(unknown, 9, 'pass@4') is None
  with pytest.raises(ValueError, match='the area up to 0 rollouts is none'):
    analysis.area(one, 0)


def test_holm_by_hand():
  assert analysis.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
  assert analysis.holm([0.5, None, 0.6]) == [1.0, None, 1.0] and analysis.holm([]) == []


def test_paired_differences_by_hand():
  found = analysis.paired({0: 0.5, 1: 0.7, 2: 0.9, 3: None, 4: 1.0}, {0: 0.4, 1: 0.4, 2: 0.7, 3: 0.1})
  assert found['pairs'] == 3 and found['mean'] == pytest.approx(0.2)
  half = 4.302653 * 0.1 / math.sqrt(3)
  assert (found['low'], found['high']) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
  assert found['p'] == pytest.approx(0.0741799, rel=1e-4)  # t = 3.4641 of two degrees of freedom
  assert analysis.paired({0: 0.5}, {0: 0.4})['p'] is None and analysis.paired({}, {})['mean'] is None
  assert analysis.geometric({0: 2.0, 1: 8.0, 2: 0.0}, {0: 1.0, 1: 1.0, 2: 1.0})['mean'] == pytest.approx(4.0)


def tuning(arm, multiple, success, cells=(('late', 'small'), ('hard', 'small'))):
  return [line(arm, seed, [0.0, success, success], role='tuning', multiple=plan.rounded(multiple), cell=cell)
          for cell in cells for seed in plan.TUNING_SEEDS]


def test_rates_are_tuned_and_arms_screened_by_hand():
  """The area of [0, s, s] over 0, 100, 200 is .75 s."""
  lines = [*tuning('uniform', 1 / 3, 0.2), *tuning('uniform', 1, 0.4), *tuning('uniform', 3, 0.4),
           *tuning('knapsack', 1, 0.6), *tuning('paper', 3, 0.2), *tuning('loo', 1, 0.8), *tuning('snr', 1, 0.7),
           *tuning('hit', 1, 0.5), *tuning('coba', 1, 0.45), *tuning('task', 1, 0.42),
           *tuning('sqrt', 1, 0.9, cells=(('late', 'small'),)), *tuning('knapsack', 3, 0.9)[:1]]
  of = analysis.cells(lines)
  assert of['late_small'].tuned('uniform') == 1.0  # the nearer to 1 of two equal ones
  assert of['late_small'].tuned('knapsack') == 1.0  # as a seed of x3 is missing
  rows = {row['arm']: row for row in analysis.screening(of)}
  assert rows['knapsack']['gain'] == pytest.approx(0.15) and rows['paper']['gain'] == pytest.approx(-0.15)
  assert rows['sqrt']['gain'] is None and rows['sqrt']['by_cell']['late_small'] == pytest.approx(0.375)
  assert analysis.finalists(analysis.screening(of)) == ['knapsack', 'paper', 'loo', 'snr', 'hit', 'coba']
  assert not analysis.is_screened(of)


def test_costs_to_the_target_beside_uniform_by_hand():
  """To .5: uniform takes 150 rollouts, the knapsack 50, 75 and 100; the paper's rule never gets there on one seed."""
  lines = [line('uniform', seed, [0.0, 0.3, 0.7]) for seed in range(3)]
  lines += [line('knapsack', seed, [0.0, success, 1.0]) for seed, success in enumerate([1.0, 2 / 3, 0.5])]
  lines += [line('paper', seed, [0.0, 0.2, last], effective_gradient_ratio=0.8)
            for seed, last in enumerate([0.4, 0.5, 0.7])]
  cell = analysis.cells(lines)['late_small']
  assert cell.total == 200
  found = analysis.compared(cell, 0.5)
  ratio = found['knapsack']['ratio']
  assert found['knapsack']['level'] == pytest.approx(0.975)  # two arms
  for axis in runs.AXES:
    assert ratio[axis]['median'] == pytest.approx(0.5) and ratio[axis]['censored'] == 0
  logs = np.log([1 / 3, 1 / 2, 2 / 3])
  half = 6.205347 * logs.std(ddof=1) / math.sqrt(3)
  assert ratio['tokens']['high'] == pytest.approx(math.exp(logs.mean() + half), rel=1e-5)
  of_paper = found['paper']['ratio']['rollouts']
  assert of_paper['censored'] == 1 and of_paper['median'] == pytest.approx(200 / 150) and of_paper['high'] is None
  assert found['paper']['reach']['rollouts'] == {0: None, 1: 200.0, 2: 160.0}
  difference = found['knapsack']['difference']['success']
  assert difference['mean'] == pytest.approx(0.3) and difference['p_holm'] >= difference['p']
  assert found['paper']['gradient']['mean'] == pytest.approx(2.0)
  assert found['knapsack']['beside_paper']['mean'] == pytest.approx(1 - 1.6 / 3)


def everywhere(arm, success, seeds=6, **more):
  return [line(arm, seed, [0.0, y, y + 0.01 * seed], cell=(family, batch), **more)
          for family in plan.FAMILIES for batch in plan.BATCHES for seed, y in [(s, success) for s in range(seeds)]]


def test_goals_are_met_missed_or_not_known(monkeypatch):
  monkeypatch.setattr(analysis.compare, '_RESAMPLES', 200)
  lines = [*everywhere('uniform', 0.5), *everywhere('knapsack', 0.95, effective_gradient_ratio=0.5),
           *everywhere('paper', 0.3)]
  found = analysis.analysed(lines, lambda family: 0.45)
  assert found['goals'] == {
      'knapsack': {'rollouts': True, 'gradient': True, 'success': True, 'paper': True},
      'paper': {'rollouts': False, 'gradient': False, 'success': False, 'paper': True}}
  found = analysis.analysed([x for x in lines if x['seed'] < 5], lambda family: 0.45)  # five pairs are too few
  assert set(found['goals']['knapsack'].values()) == {None}
  found = analysis.analysed([x for x in lines if x['family'] != 'late'], lambda family: 0.45)
  assert found['goals']['knapsack'] == dict.fromkeys(('rollouts', 'gradient', 'success', 'paper'))
  assert found['goals']['paper']['success'] is False  # as one cell is enough
  text = tables.report(found)
  assert 'not known' in text and '| knapsack |' in text and len(found['test']) == 6
  json.dumps(runs.rounded(found), allow_nan=False)


def test_the_plot_is_small(tmp_path):
  lines = [line(arm, seed, [0.0, 0.3, 0.1 * seed]) for arm in ('uniform', 'knapsack') for seed in range(3)]
  tables.draw(analysis.cells(lines), {'late_small': 0.4}, tmp_path / 'a.png')
  assert 5_000 < (tmp_path / 'a.png').stat().st_size < 30_000


def test_a_report_of_nothing():
  found = analysis.analysed([], lambda family: 0.5)
  assert found['test'] == {} and tables.report(found).startswith('# The proof')


# The batch's signal-to-noise.


def test_signal_and_noise_by_hand():
  """Gradients (1, 1), (1, -1) and (1, 0): the mean is (1, 0). Products of pairs: 0, 1 and 1; squares 2, 2 and 1."""
  g_BX = np.array([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]])
  found = signal.ratio(g_BX @ g_BX.T)
  assert found['signal'] == pytest.approx(2 / 3) and found['noise'] == pytest.approx(1.0)
  assert found['ratio'] == pytest.approx(2 / 3)
  with pytest.raises(ValueError, match='2 batches have no signal-to-noise ratio'):
    signal.ratio(np.eye(2))


def test_signal_and_noise_are_free_of_bias_and_add_up():
  """A mean of |m|^2 = 1 in 50 directions, and noise of variance 1/5 in each: a ratio of 0.1."""
  rng, found = np.random.default_rng(0), []
  mean_X = np.full(50, 1 / math.sqrt(50))
  for _ in range(60):
    g_BX = mean_X + rng.normal(0, math.sqrt(1 / 5), (16, 50))
    of = signal.ratio(g_BX @ g_BX.T)
    found.append((of['signal'], of['noise']))
  signals, noises = np.mean(found, axis=0)
  assert signals == pytest.approx(1, abs=0.1) and noises == pytest.approx(10, rel=0.03)
  of = signal.summarized({'solved': 0.25 * g_BX, 'mixed': 0.75 * g_BX, 'hard': 0 * g_BX})
  assert 'hard' not in of and of['solved']['share'] + of['mixed']['share'] == pytest.approx(1)
  assert of['all']['low'] < of['all']['ratio'] < of['all']['high']
