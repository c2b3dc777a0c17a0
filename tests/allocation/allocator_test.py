"""The allocator for other trainers: ids and counts in, the budgets of the table of statistics out."""

import ast
import configparser
import json
import pathlib
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest

from kr_jax import allocation
from kr_jax import knobs
from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.allocation.allocator import Allocator

ROOT = pathlib.Path(__file__).parents[2]


def counts(rng, ids, rate_of, most=9):
  """Verdicts of 1..most rollouts of each task: right ones, wrong ones."""
  count_M = rng.integers(1, most + 1, len(ids))
  right_M = rng.binomial(count_M, [rate_of[x] for x in ids])
  return right_M, count_M - right_M


def trained(steps=6, seed=0, **options):
  """An allocator of twelve tasks, four of them a step."""
  rng = np.random.default_rng(seed)
  allocator, names = Allocator(**options), [f'task {i}' for i in range(12)]
  rate_of = dict(zip(names, np.linspace(0, 1, 12)))
  for _ in range(steps):
    ids = [str(x) for x in rng.choice(names, 4, replace=False)]
    allocator.observe(ids, *counts(rng, ids, rate_of))
  return allocator


def stats_of(allocator):
  return {name: np.array(x) for name, x in allocator.state_dict()['stats'].items()}


# What is observed.


def test_forgetting_by_hand():
  """A pass is four observed tasks, and leaves half of the evidence."""
  allocator = Allocator(num_tasks=4, pass_discount=0.5)
  allocator.observe(['a'], [3], [1])
  allocator.observe(['b', 'c'], [0, 2], [2, 0])
  stats = stats_of(allocator)
  np.testing.assert_allclose(stats['successes_I'], [3 * 0.5 ** (2 / 4), 0, 2], rtol=1e-12)
  np.testing.assert_allclose(stats['failures_I'], [0.5 ** (2 / 4), 2, 0], rtol=1e-12)
  np.testing.assert_array_equal(stats['rollouts_I'], [4, 2, 2])


def test_forgetting_by_hand_where_the_size_of_the_split_is_not_known():
  """New tasks are no pass; the two of three that come again are two thirds of one."""
  allocator = Allocator(pass_discount=0.5)
  allocator.observe(['a'], [3], [1])
  allocator.observe(['b'], [0], [2])
  np.testing.assert_array_equal(stats_of(allocator)['successes_I'], [3, 0])
  allocator.observe(['a', 'b', 'c'], [1, 1, 1], [0, 0, 0])
  np.testing.assert_allclose(stats_of(allocator)['successes_I'], [3 * 0.5 ** (2 / 3) + 1, 1, 1], rtol=1e-12)


@pytest.mark.parametrize('recalibrate', [pytest.param(True, marks=pytest.mark.slow), False])
def test_it_is_a_table_of_all_tasks(recalibrate):
  """Reference: the statistics of all 20 tasks from the start, observed rollout by rollout in any order."""
  rng = np.random.default_rng(1)
  rate_I, label_I = rng.beta(0.5, 0.5, 20), rng.integers(0, 3, 20)
  prior = {i: float(rate_I[i]) for i in range(0, 20, 2)}
  allocator = Allocator(num_tasks=20, prior=prior, prior_rollouts=3, strata=dict(enumerate(label_I.tolist())),
                        recalibrate=recalibrate)
  # Labels are numbered as they appear, behind the stratum of tasks without one.
  stratum_I = [1 + list(dict.fromkeys(label_I.tolist())).index(x) for x in label_I.tolist()]
  stats = estimate.init(20, groups=512 if recalibrate else 0, stratum_I=stratum_I, prior_rollouts=3,
                        prior_rate_I=[prior.get(i, np.nan) for i in range(20)])
  for _ in range(12):
    index_M = rng.permutation(20)[:5]
    right_M, wrong_M = counts(rng, index_M, rate_I)
    length_M = rng.integers(1, 9, 5)
    allocator.observe(index_M, right_M, wrong_M, (right_M + wrong_M) * length_M)
    rollouts = [(m, y) for m in range(5) for y, n in ((1, right_M[m]), (0, wrong_M[m])) for _ in range(n)]
    rng.shuffle(rollouts)
    task_R, verdict_R = np.array(rollouts).T
    stats = estimate.observe(stats, index_M, task_R, verdict_R, length_M[task_R], discount=0.75)
  for a, b in zip(allocator.posterior(range(20)), estimate.posterior(stats, np.arange(20))):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  np.testing.assert_allclose(allocator.expected_tokens(range(20), default=1),
                             estimate.tokens(stats, np.arange(20), default=1), rtol=1e-6)
  budget_M = allocator.budgets(range(20), 160)
  np.testing.assert_array_equal(budget_M, allocate.budgets(estimate.posterior(stats, np.arange(20)), 160))
  assert len(set(budget_M.tolist())) > 3


def test_entries_of_an_id_are_summed_and_tasks_without_rollouts_passed_over():
  together, apart = Allocator(num_tasks=8), Allocator(num_tasks=8)
  together.observe(['a', 'b'], [2, 1], [1, 0], [30, 8])
  right_R = np.array([True, False, True, True])
  apart.observe(['a', 'a', 'b', 'a', 'c'], [*right_R, 0], [*~right_R, 0], [10, 10, 8, 10, 0])
  assert together.state_dict() == apart.state_dict() and len(apart) == 2
  apart.observe([], [], [], [])
  apart.observe(['d'], [0], [0], [0])
  assert together.state_dict() == apart.state_dict()


def test_lengths_by_outcome():
  """Rollouts of 10 and 20 tokens are right, of 60 wrong; of the group together only the mean is known."""
  apart, together = Allocator(), Allocator()
  apart.observe(['a', 'a', 'a'], [1, 0, 1], [0, 1, 0], [10, 60, 20])
  together.observe(['a'], [2], [1], [90])
  np.testing.assert_allclose(stats_of(apart)['tokens_OI'], [[60], [30]])
  np.testing.assert_allclose(stats_of(together)['tokens_OI'], [[30], [60]])


def test_ids_of_any_hashable_kind():
  allocator = Allocator()
  ids = ['1', 1, (1, 'x'), frozenset([1]), b'1', None]
  allocator.observe(ids, range(6), [5 - k for k in range(6)])
  assert len(allocator) == 6
  mean = {x: allocator.posterior([x]).a_M[0] for x in ids}
  assert sorted(ids, key=mean.get) == ids  # each has its own


class Tensor:
  """As a vector of torch: its elements are no numbers, and are equal to nothing but themselves."""

  def __init__(self, x):
    self.x = np.asarray(x)
    self.ndim = self.x.ndim

  def tolist(self):
    return self.x.tolist()

  def item(self):
    return self.x.item()

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self.x, dtype)


@pytest.mark.parametrize('vector', [
    list, np.array, Tensor, lambda ids: [np.int64(x) for x in ids], lambda ids: [Tensor(x) for x in ids],
    lambda ids: np.array(ids, object), lambda ids: (x for x in ids)],
                         ids=['list', 'array', 'tensor', 'numpy', 'tensors', 'objects', 'generator'])
def test_a_number_is_one_id_in_any_array(vector):
  allocator = Allocator()
  allocator.observe([3, 5], [4, 0], [0, 4])
  allocator.observe(vector([5, 3]), Tensor([0, 4]), np.array([4.0, 0.0]))
  assert len(allocator) == 2
  np.testing.assert_array_equal(allocator.posterior(vector([3])).a_M, allocator.posterior([3]).a_M)
  assert json.loads(json.dumps(allocator.state_dict()))['ids'] == [3, 5]


@pytest.mark.parametrize('ids, right, wrong, tokens, message', [
    (['a', 'b'], [1], [1], None, r'successes must hold a number for each of 2 ids, not int64 of shape \(1,\)'),
    (['a'], [-1], [1], None, r'successes\[0\]=-1 must be a whole number in 0\.\.1048576'),
    (['a', 'b'], [1, 1], [1, .5], None, r'failures\[1\]=0\.5 must be a whole number'),
    (['a'], [float('nan')], [1], None, r'successes\[0\]=nan'),
    (['a'], [2e6], [1], None, r'successes\[0\]=2e\+06 must be a whole number in 0\.\.1048576, the rollouts of this'),
    (['a'], ['1'], [1], None, 'successes must hold a number for each of 1 ids, not <U1'),
    (['a'], [1], [1], [-3], r'tokens\[0\]=-3 must be a whole number, 0 or more'),
    (['a'], [1], [1], [float('inf')], r'tokens\[0\]=inf'),
    ('abc', [1], [1], None, "ids='abc' is one id; give a list of them"),
    (['a', ['b']], [1, 1], [1, 1], None, r"ids\[1\]=\['b'\] cannot be looked up"),
    ([('a', [])], [1], [1], None, r'ids\[0\]=.* cannot be looked up'),
    ([float('nan')], [1], [1], None, r'ids\[0\]=nan is equal to no id'),
    (np.ones((2, 2)), [1, 1], [1, 1], None, r'ids\[0\]=\[1\.0, 1\.0\] cannot be looked up'),
])
def test_what_is_no_verdict_is_refused(ids, right, wrong, tokens, message):
  allocator = Allocator()
  with pytest.raises(ValueError, match=message):
    allocator.observe(ids, right, wrong, tokens)
  assert allocator.state_dict() == Allocator().state_dict()


def test_ids_that_change_are_found_out():
  allocator = Allocator(num_tasks=3)
  allocator.observe(['a', 'b'], [1, 1], [1, 1])
  before = allocator.state_dict()
  with pytest.raises(ValueError, match='4 different tasks were observed, and num_tasks=3; give the size of the split'):
    allocator.observe(['c', 'd'], [1, 1], [1, 1])
  assert allocator.state_dict() == before


def test_tokens_are_of_all_steps_or_of_none():
  allocator = Allocator()
  np.testing.assert_array_equal(allocator.expected_tokens(['a'], default=7), [7])
  allocator.observe(['a', 'b'], [1, 0], [1, 2], [20, 80])
  tokens = allocator.expected_tokens(['a', 'b', 'c'], default=7)
  assert 10 < tokens[0] < tokens[2] < tokens[1] < 40
  with pytest.raises(ValueError, match='tokens must be given of all steps or of none; the steps before had them'):
    allocator.observe(['a'], [1], [0])
  allocator = trained()
  with pytest.raises(ValueError, match='the steps before had none'):
    allocator.observe(['a'], [1], [0], [3])
  with pytest.raises(ValueError, match='no tokens were observed'):
    allocator.expected_tokens(['a'], default=7)


# Budgets.


def test_tasks_in_the_middle_get_most_and_unseen_ones_what_the_prior_says():
  allocator = Allocator()
  allocator.observe(['never', 'sometimes', 'always'], [0, 10, 40], [40, 30, 0])
  budget_M = allocator.budgets(['never', 'sometimes', 'always', 'new', 'newer'], 80)
  assert budget_M.dtype == np.int32 and budget_M.sum() == 80 and budget_M.min() >= 2
  assert budget_M[1] > budget_M[0] and budget_M[1] > budget_M[2] and abs(budget_M[3] - budget_M[4]) <= 1
  assert len(allocator) == 3  # asking changes nothing


def test_budgets_do_not_depend_on_the_order_of_tasks():
  allocator, names = trained(), [f'task {i}' for i in range(12)]
  budget_of = dict(zip(names, allocator.budgets(names, 100)))
  assert list(allocator.budgets(names[::-1], 100)) == [budget_of[x] for x in names[::-1]]


@pytest.mark.slow
def test_options_reach_the_allocator():
  names, seen = [f'task {i}' for i in range(12)], lambda **options: trained(**options)
  np.testing.assert_array_equal(seen(rule='uniform').budgets(names, 48), np.full(12, 4))
  assert seen(high=6).budgets(names, 60).max() == 6
  assert np.any(seen(value='snr', nu=50.0).budgets(names, 100) != seen(value='snr', nu=0.1).budgets(names, 100))
  first = lambda N, p: (1 - (1 - p) ** N) * (1 - p)
  np.testing.assert_array_equal(seen(value=first, solver='greedy').budgets(names, 100),
                                allocate.budgets(seen().posterior(names), 100, value=first))
  cost_M = np.arange(1, 13)
  assert seen().budgets(names, 500.0, cost_M) @ cost_M <= 500
  few = seen(low=0).budgets(names, 30, most_tasks=5)
  assert few.sum() == 30 and np.count_nonzero(few) <= 5


def test_coba_knows_the_failure_rate_of_all_tasks():
  """Easy tasks get more where the rest of the split fails, as coba's value follows the failures."""
  def of(rest):
    allocator = Allocator(value='coba')
    allocator.observe(['easy', 'hard', *range(20)], [6, 2, *[rest] * 20], [2, 6, *[8 - rest] * 20])
    return allocator.budgets(['easy', 'hard'], 40)
  assert of(0)[0] > of(8)[0]


def test_a_known_rate_and_strata_speak_before_any_rollout():
  allocator = Allocator(prior={'known': 0.9, 'hard': 0.0}, prior_rollouts=6, strata={'x1': 'x', 'x2': 'x', 'y1': 'y'})
  known, unknown, hard = estimate.mean_rate(allocator.posterior(['known', 'unknown', 'hard']))
  assert hard < unknown < known < 0.9
  allocator.observe(['x1', 'y1'], [0, 20], [20, 0])
  x2, none = estimate.mean_rate(allocator.posterior(['x2', 'unknown']))
  assert x2 < none


@pytest.mark.parametrize('ids, total, message', [
    (['a', 'b', 'a'], 9, "the task 'a' stands 2 times in ids"), ([], 4, 'no tasks'),
    (['a'], 1, '1 rollouts cannot be shared by 1 tasks at 2..128'), ('ab', 8, 'is one id'),
    (5, 8, 'ids=5 is one id'), (np.array(5), 8, 'ids=5 is one id'), ([np.zeros(2)], 8, 'cannot be looked up'),
    ([{}], 8, 'cannot be looked up')])
def test_what_has_no_budgets_is_refused(ids, total, message):
  with pytest.raises(ValueError, match=message):
    Allocator().budgets(ids, total)


def test_no_tasks_get_no_rollouts():
  budget_M = Allocator().budgets([], 0)
  assert budget_M.shape == (0,) and budget_M.dtype == np.int32
  assert Allocator().posterior([]).a_M.shape == (0,)


@pytest.mark.parametrize('options, message', [
    (dict(low=5, high=4), 'alloc.high=4 is below alloc.low=5'), (dict(value='variancee'), "did you mean 'variance'"),
    (dict(pass_discount=0), 'alloc.pass_discount=0'), (dict(num_tasks=0), 'num_tasks=0 must be a positive whole'),
    (dict(num_tasks=2.5), 'num_tasks=2.5'), (dict(prior={'a': 1.5}), r"prior\['a'\]=1.5 must be a rate in \[0, 1\]"),
    (dict(prior={'a': float('nan')}), 'leave out what is not known'), (dict(prior_rollouts=0), 'prior_rollouts=0'),
    (dict(prior={'a': None}), r"prior\['a'\]=None must be"),
    (dict(strata={'a': [1]}), r"strata\['a'\]=\[1\] is no label"),
    (dict(nu=-1.0), 'alloc.nu=-1.0'), (dict(rule='best'), "alloc.rule='best'")])
def test_settings_out_of_bounds_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    Allocator(**options)


def test_defaults_are_those_of_a_run():
  settings, alloc = Allocator().state_dict()['settings'], knobs.Alloc()
  for name in set(settings) - {'num_tasks', 'prior_rollouts'}:
    assert settings[name] == getattr(alloc, name), name
  assert settings['prior_rollouts'] == knobs.Tasks().prior_rollouts


def test_more_tasks_compile_nothing():
  """Steps of 16 tasks that were not there before; the programs are those of the first."""
  allocator, rng = Allocator(high=16), np.random.default_rng(0)
  def step(k):
    ids = [f'{k}/{m}' for m in range(8)] + [f'{max(k - 1, 0)}/{m}' for m in range(8, 16)]
    budget_M = allocator.budgets(ids, 96)
    right_M = rng.binomial(budget_M, 0.4)
    allocator.observe(ids, right_M, budget_M - right_M)
  step(0)
  events = []
  count = lambda event, duration, **_: events.append(event)
  jax.monitoring.register_event_duration_secs_listener(count)
  try:
    for k in range(1, 8):
      step(k)
  finally:
    jax.monitoring.unregister_event_duration_listener(count)
  assert '/jax/core/compile/backend_compile_duration' not in events


# What it tells of itself.


def test_calibration_by_hand():
  allocator = Allocator(recalibrate=False)
  assert allocator.calibration()['groups'] == 0 and np.isnan(allocator.calibration()['log_loss'])
  allocator.observe(['a', 'b'], [1, 4], [3, 0])  # forecast with Beta(.5, .5)
  found = allocator.calibration()
  assert found['groups'] == 2
  assert found['log_loss'] == pytest.approx(np.log(2))
  assert found['constant_log_loss'] == pytest.approx(-(5 * np.log(5 / 8) + 3 * np.log(3 / 8)) / 8)
  assert found['gradient_ratio'] == 0.5
  # P(all four equal) = 2 (1/2 3/2 5/2 7/2) / (1 2 3 4)
  assert found['expected_gradient_ratio'] == pytest.approx(1 - 2 * 105 / 16 / 24)
  # C(4, 1) B(1.5, 3.5) / B(.5, .5) = 4 (.5)(.5 1.5 2.5) / 24, and (.5 1.5 2.5 3.5) / 24
  assert found['count_log_loss'] == pytest.approx(-(np.log(4 * 0.5 * 1.875 / 24) + np.log(6.5625 / 24)) / 8)


@pytest.mark.slow
def test_calibration_is_of_forecasts_made_before_the_verdicts_and_of_the_last_groups():
  allocator = Allocator()
  for k in range(300):
    a, b = allocator.posterior([k, k + 1])
    allocator.observe([k, k + 1], [1, 2], [1, 2])
    assert allocator.state_dict()['recent'][-1] == [a[1], b[1], 2, 4]
  assert allocator.calibration()['groups'] == 512


# Saved and restored.

through_json = lambda state: json.loads(json.dumps(state))
through_pickle = lambda state: pickle.loads(pickle.dumps(state))


@pytest.mark.parametrize('through', [through_json, through_pickle], ids=['json', 'pickle'])
@pytest.mark.slow
@pytest.mark.parametrize('ids', [[f'task {i}' for i in range(12)], list(range(12)), [('set', i) for i in range(12)]],
                         ids=['texts', 'numbers', 'tuples'])
def test_a_restored_allocator_goes_on_alike(ids, through):
  """Over more steps, with tasks that it has not seen before, known rates and strata: to the last bit."""
  options = dict(num_tasks=12, prior={ids[1]: 0.7, ids[11]: 0.1}, strata={x: ('odd', i % 2) for i, x in enumerate(ids)})
  rng, rate_of = np.random.default_rng(2), dict(zip(ids, np.linspace(0, 1, 12)))
  allocator = Allocator(**options)
  batch = lambda known: [ids[i] for i in rng.permutation(known)[:4]]
  for _ in range(5):
    chosen = batch(8)
    allocator.observe(chosen, *counts(rng, chosen, rate_of), np.full(4, 40))
  restored = Allocator(**options)
  restored.load_state_dict(through(allocator.state_dict()))
  assert restored.state_dict() == allocator.state_dict()
  for _ in range(5):
    chosen = batch(12)
    np.testing.assert_array_equal(restored.budgets(chosen, 40), allocator.budgets(chosen, 40))
    verdicts = counts(rng, chosen, rate_of)
    for x in (restored, allocator):
      x.observe(chosen, *verdicts, np.full(4, 40))
  assert restored.state_dict() == allocator.state_dict() and restored.calibration() == allocator.calibration()


def test_a_state_is_a_copy():
  allocator = trained()
  state = allocator.state_dict()
  kept = through_pickle(state)
  trained_more, more = Allocator(), trained(steps=7)
  trained_more.load_state_dict(state)
  trained_more.observe(['task 1'], [1], [1])
  allocator.observe(['task 1'], [1], [1])
  assert state == kept and more.state_dict() != kept


def test_strata_may_be_named_in_another_order():
  ids, labels = [1, 2, 3], ['x', 'y', 'x']
  first, other = Allocator(strata=dict(zip(ids, labels))), Allocator(strata=dict(zip(ids[1:] + ids[:1], 'yxx')))
  first.observe(ids, [0, 4, 1], [4, 0, 3])
  other.load_state_dict(first.state_dict())
  np.testing.assert_allclose(other.posterior([1, 2, 3]).a_M, first.posterior([1, 2, 3]).a_M, rtol=1e-12)
  assert stats_of(other)['stratum_I'].tolist() == [2, 1, 2] and stats_of(first)['stratum_I'].tolist() == [1, 2, 1]


@pytest.mark.parametrize('change, options, message', [
    (dict(version=0), {}, 'a state of version 0 cannot be read; this code has version 1'),
    (None, {}, 'a state of version None cannot be read'),
    (dict(ids=None), {}, r"the state lacks \['ids'\]"),
    ({}, dict(high=64, num_tasks=9), 'high=128, here 64; num_tasks=None, here 9; make one with'),
    ({}, dict(value=lambda N, p: p), "value='infogain', here .*lambda"),
    ({}, dict(prior={'task 1': 0.5}), "another prior or stratum of task 'task 1'"),
    ({}, dict(strata={'task 3': 'x'}), "another prior or stratum of task 'task 3'"),
    (dict(ids=['a', 'b']), {}, r"stats\['successes_I'\] of the state has 12 numbers, and its ids ask for 2"),
    (dict(ids=['a', 'a']), {}, 'the state has 1 ids twice'),
    (dict(settings=None, recent='x'), {}, r"the state lacks \['settings', 'recent'\], or they are damaged; save what"),
    (dict(recent=[[1, 2]]), {}, 'recent of the state is not of groups of four numbers'),
])
def test_a_state_that_does_not_fit_is_refused(change, options, message):
  state = None if change is None else trained(steps=12).state_dict() | change
  if state and state['ids'] is None:
    del state['ids']
  allocator = Allocator(**options)
  before = allocator.state_dict()
  with pytest.raises(ValueError, match=message):
    allocator.load_state_dict(state)
  assert allocator.state_dict() == before


@pytest.mark.parametrize('name, value, message', [
    ('successes_I', [float('nan')] * 12, 'has a number that is not finite'),
    ('failures_I', [-1] * 12, 'has the count -1, below 0'),
    ('tokens_OI', [[1], [1, 2]], 'are no numbers'), ('stratum_I', [2 ** 40] * 12, 'are no numbers'),
    ('calibration', [float('inf')] * 4, 'has a number that is not finite')])
def test_damaged_statistics_are_refused(name, value, message):
  state = trained(steps=12).state_dict()
  state['stats'][name] = value
  with pytest.raises(ValueError, match=rf"stats\['{name}'\] of the state {message}"):
    Allocator().load_state_dict(state)


# The light install.


def requirements():
  """Import names of the packages that setup.cfg asks for: of the core, and of the extra for training."""
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  modules = {'absl_py': 'absl', 'orbax_checkpoint': 'orbax'}
  names = lambda text: {modules.get(name, name) for name in (
      line.split('>=')[0].strip().replace('-', '_') for line in text.splitlines()) if name and not name.startswith('#')}
  core = names(config['options']['install_requires'])
  return core, names(config['options.extras_require']['train']) - core


def test_the_core_is_what_the_allocator_imports_and_what_reads_flags():
  core, train = requirements()
  found = set()
  for path in [*(ROOT / 'kr_jax' / 'allocation').glob('*.py'), *(ROOT / 'kr_jax' / 'kernels' / 'knapsack').glob('*.py'),
               *(ROOT / 'kr_jax' / f'{name}.py' for name in ('knobs', 'sections', 'types'))]:
    if path.stem not in ('forecast', 'passes', 'simulate', 'worlds'):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
          found |= {alias.name.partition('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
          found.add(node.module.partition('.')[0])
  imported = found - set(sys.stdlib_module_names) - {'kr_jax'}
  assert imported == core - {'absl', 'ml_collections'} == {'jax', 'numpy', 'scipy'}
  assert {'flax', 'optax', 'orbax', 'tensorflow_datasets'} <= train


@pytest.mark.slow
def test_it_runs_without_the_other_packages():
  """In a process of its own, where importing one of them is an error."""
  _, train = requirements()
  code = f'''
import sys
for name in {sorted(train - {'absl'})}:  # jax imports absl where it is there
  sys.modules[name] = None
from kr_jax import allocation
budget_M = allocation.Allocator().budgets(['a', 'b'], 8)
print(budget_M.sum(), sorted(name for name in sys.modules if name.startswith('kr_jax.')))
'''
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True, check=True)
  total, _, modules = done.stdout.partition(' ')
  assert total == '8'
  ours = {name.split('.')[1] for name in ast.literal_eval(modules)}
  assert ours == {'allocation', 'checks', 'data_knobs', 'kernels', 'knobs', 'sections', 'types'}


def test_the_face_of_the_folder():
  assert allocation.Allocator is Allocator and allocation.Posterior is allocation.Beta
  seen = allocation.Posterior(np.array([0.5, 4.5]), np.array([8.5, 4.5]))
  assert allocation.budgets(seen, 16).sum() == 16
