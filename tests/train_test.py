"""The loop end to end on a shrunk config: its record, what compiles, and that nothing is lost."""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from kr_jax import evaluate
from kr_jax import explore
from kr_jax import prepare
from kr_jax import rewards
from kr_jax import state
from kr_jax import tasks
from kr_jax import train
from kr_jax.allocation import estimate
from kr_jax.learning import guard
from kr_jax.learning import update
from kr_jax.model import policy
from kr_jax.record import bad_steps
from kr_jax.record import checkpoint
from kr_jax.record import goodput
from kr_jax.record import ledger
from kr_jax.record import metrics
from kr_jax.record import saved
from kr_jax.report import refresh
from kr_jax.rewards import verdicts
from tests.knobs import debug_config
from tests.knobs import run

slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
# A second run in one process finds its programs compiled, and time goes on.
NOT_REPEATED = ('wall_s', 'step_s', 'compile_count', 'tokens_per_s')
ROOT = pathlib.Path(__file__).parents[1]


def records(workdir, *, keep_times=False):
  rows = metrics.read(os.path.join(workdir, 'metrics.jsonl'))
  return [{k: v for k, v in r.items() if keep_times or k not in NOT_REPEATED} for r in rows]


def state_of(workdir, data_dir, **knobs):
  setup = prepare.prepare(debug_config(data_dir, **knobs))
  with checkpoint.Checkpoints(os.path.join(workdir, 'checkpoints')) as checkpoints:
    found, stats, _ = state.start(setup, workdir, checkpoints)
  return jax.tree.map(np.asarray, found._replace(key=jax.random.key_data(found.key))), stats


def assert_same_run(workdir, other, data_dir, *, evaluations=True):
  keep = lambda r: evaluations or 'reward_mean' in r
  assert list(filter(keep, records(workdir))) == list(filter(keep, records(other)))
  jax.tree.map(np.testing.assert_array_equal, state_of(workdir, data_dir), state_of(other, data_dir))


def send_sigterm_in(monkeypatch, module, name, call):
  """SIGTERM arrives in the middle of the given call of module.name."""
  original, calls = getattr(module, name), []

  def interrupted(*args, **kwargs):
    calls.append(None)
    if len(calls) == call:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **kwargs)

  monkeypatch.setattr(module, name, interrupted)


def test_the_record_of_a_run(finished):
  rows = records(finished, keep_times=True)
  steps = [r for r in rows if 'reward_mean' in r]
  assert [r['step'] for r in steps] == [0, 1, 2, 3]
  for r in steps:
    assert {'wall_s', 'reward_mean', 'effective_gradient_ratio', 'uniform_gradient_ratio',
            'mixed_tasks', 'objective', 'budget_min', 'budget_max', 'rollouts_total',
            'tokens_generated', 'tokens_updated', 'loss', 'entropy', 'grad_norm',
            'clip_fraction_low', 'clip_fraction_high', 'logp_error', 'policy_entropy', 'ratio_p99',
            'padding_waste', 'compile_count', 'no_answer', 'log_loss', 'constant_log_loss', 'expected_mixed_tasks',
            'reliability'} <= set(r)
    assert r['unverified'] == r['unverified_timeout'] == 0 and r['alarms'] == []
    of, = r['verification'].values()
    assert of['groups'] == 8 and of['right'] == 32 * r['success_rate'] == 32 - of['wrong']
    assert r['rollouts_total'] == 32
    assert 2 <= r['budget_min'] <= 4 <= r['budget_max'] <= 64
    assert r['objective'] >= r['uniform_objective'] - 1e-9
    assert 0 < r['entropy'] < 2 * np.log(16)
    # One update a batch is on-policy.
    assert r['clip_fraction_low'] == r['clip_fraction_high'] == 0 and r['logp_error'] < 1e-5
    assert r['ratio_p01'] == pytest.approx(1, abs=1e-3) == r['ratio_p99']
    assert 0 <= r['padding_waste'] < 1
    # Of the sampler: 32 rollouts in 16 slots, prompts of 21 tokens once for each of 8 tasks.
    assert 0 < r['slot_utilization'] <= 1 and 0 <= r['tail_share'] <= 1
    assert r['refills'] >= 2 and r['tokens_prefilled'] == 8 * 21 and r['tokens_per_s'] > 0
    assert r['success_rate'] == r['reward_mean']
    assert r['nu'] == 2
  assert any(r['mixed_tasks'] for r in steps)
  evaluations = [r for r in rows if 'eval/avg@8' in r]
  assert [r['step'] for r in evaluations] == [0, 2, 4]
  assert all('eval/avg@8_stderr' in r and 'eval/difficulty_3/avg@8' in r for r in evaluations)
  wall_s = [r['wall_s'] for r in rows]
  assert wall_s == sorted(wall_s)


@pytest.mark.slow
def test_each_step_has_noise_of_its_own(tmp_path, data_dir):
  """Of the same policy and the same eight tasks two steps sample other tokens."""
  workdir = run(tmp_path, data_dir, num_steps=2, tasks__train_split='train[:8]', optimizer__learning_rate=0.0,
                evaluate__every=0, alloc__rule='uniform')
  first, second = (r for r in records(workdir) if 'reward_mean' in r)
  assert first['tokens_prefilled'] == second['tokens_prefilled']
  assert abs(first['entropy'] - second['entropy']) > 1e-3  # of the same tokens, in another order, to a rounding


@slow
def test_the_initial_policy_outlives_updates(tmp_path, data_dir):
  """An update donates its parameters; a KL divergence is taken from the first ones."""
  workdir = run(tmp_path, data_dir, num_steps=3, grpo__kl_coef=0.1, optimizer__learning_rate=1e-2, evaluate__every=0)
  kl = [r['kl'] for r in records(workdir) if 'reward_mean' in r]
  assert abs(kl[0]) < 1e-6 < kl[1] < kl[2]


@slow
def test_nothing_compiles_from_step_two_on(tmp_path, data_dir):
  """Over budgets that change, an evaluation and checkpoints; from a cold start."""
  jax.clear_caches()
  workdir = run(tmp_path, data_dir, num_steps=9, tasks__train_split='train[:16]')
  steps = [r for r in records(workdir, keep_times=True) if 'reward_mean' in r]
  assert len({json.dumps(r['budget_by_success_rate']) for r in steps}) > 4
  assert len({r['compile_count'] for r in steps[2:]}) == 1


@exhaustive
def test_budgets_of_tokens_by_a_measured_noise_and_leave_one_out(tmp_path, data_dir):
  """All that differs from the default; stopped and gone on with; nothing compiles from step two on."""
  knobs = {'alloc__value': 'snr', 'alloc__nu_every': 2, 'alloc__cost': 'tokens',
           'alloc__tokens_per_step': 400, 'grpo__advantage': 'loo', 'evaluate__every': 0,
           'tasks__train_split': 'train[:16]'}
  steps_of = lambda workdir, **kw: [r for r in records(workdir, **kw) if 'reward_mean' in r]
  jax.clear_caches()
  workdir = run(tmp_path / 'whole', data_dir, num_steps=8, **knobs)
  steps = steps_of(workdir, keep_times=True)
  assert len({r['compile_count'] for r in steps[2:]}) == 1
  assert all(r['budget_min'] >= 2 and r['rollouts_total'] <= 32 for r in steps)
  assert len({r['rollouts_total'] for r in steps}) > 1
  assert steps[0]['nu'] == 2 and len({r['nu'] for r in steps}) > 2
  run(tmp_path / 'parts', data_dir, num_steps=4, **knobs)
  parts = run(tmp_path / 'parts', data_dir, num_steps=8, **knobs)
  assert steps_of(parts) == steps_of(workdir)


WAVES = {'alloc__waves': 2, 'alloc__low': 0, 'tasks__candidates_per_step': 12, 'tasks__train_split': 'train[:24]',
         'grpo__advantage': 'posterior', 'grpo__keep': 0.5, 'alloc__value': 'snr', 'evaluate__every': 0}


@exhaustive  # by default with the adapters below
@pytest.mark.parametrize('knobs, num_steps', [
    (WAVES, 9),
    ({'alloc__waves': 3, 'tasks__train_split': 'train[:16]', 'grpo__weight': 'task', 'evaluate__every': 0}, 9),
    (WAVES | {'alloc__waves': 3, 'alloc__cost': 'tokens', 'alloc__tokens_per_step': 400}, 50)])
def test_waves_and_choice(tmp_path, data_dir, knobs, num_steps):
  """Budgets by the verdicts so far, of tasks that are chosen; stopped and gone on with; nothing compiles from step
  two on."""
  steps_of = lambda workdir, **kw: [r for r in records(workdir, **kw) if 'reward_mean' in r]
  jax.clear_caches()
  workdir = run(tmp_path / 'whole', data_dir, num_steps=num_steps, **knobs)
  steps = steps_of(workdir, keep_times=True)
  assert len({r['compile_count'] for r in steps[2:]}) == 1
  assert all(r['rollouts_total'] <= 32 and r['objective'] is None for r in steps)
  assert len({json.dumps(r['budget_by_success_rate']) for r in steps}) > 4
  run(tmp_path / 'parts', data_dir, num_steps=num_steps // 2, **knobs)
  parts = run(tmp_path / 'parts', data_dir, num_steps=num_steps, **knobs)
  assert steps_of(parts) == steps_of(workdir)
  jax.tree.map(np.testing.assert_array_equal, *(state_of(w, data_dir, **knobs) for w in (parts, workdir)))


DYNAMIC = {'alloc__rule': 'dynamic', 'alloc__low': 0, 'tasks__candidates_per_step': 24, 'evaluate__every': 0,
           'tasks__train_split': 'train[:48]'}


@slow
def test_dynamic_sampling(tmp_path, data_dir):
  """Generation batches of eight groups until eight groups are mixed, all of them charged; stopped and gone on with;
  nothing compiles after the first step, whatever was sampled."""
  steps_of = lambda workdir, **kw: [r for r in records(workdir, **kw) if 'reward_mean' in r]
  workdir = run(tmp_path / 'whole', data_dir, num_steps=4, **DYNAMIC)
  steps = steps_of(workdir, keep_times=True)
  assert len({r['compile_count'] for r in steps}) == 1 < len({r['rollouts_total'] for r in steps})
  for r in steps:
    is_mixed = [0 < right < n for right, n in zip(r['group_right'], r['group_verified'], strict=True)]
    last = [sum(is_mixed[:8 * k]) >= 8 for k in (1, 2, 3)]
    batches = last.index(True) + 1 if True in last else 3
    assert r['rollouts_total'] == 32 * batches and r['group_budget'] == [4] * 8 * batches
    assert r['mixed_tasks'] == sum(is_mixed)
    assert r['effective_gradient_ratio'] == min(sum(is_mixed), 8) / (8 * batches)
    assert 0 < r['tokens_updated'] < r['tokens_generated']
  sampled = sum(r['rollouts_total'] for r in steps)
  assert sum(e.get('rollouts', 0) for e in ledger.read(workdir).entries if e['phase'] == 'sample') == sampled
  run(tmp_path / 'parts', data_dir, num_steps=2, **DYNAMIC)
  parts = run(tmp_path / 'parts', data_dir, num_steps=4, **DYNAMIC)
  assert steps_of(parts) == steps_of(workdir)
  (found, stats), of_parts = (state_of(w, data_dir, **DYNAMIC) for w in (workdir, parts))
  jax.tree.map(np.testing.assert_array_equal, (found, stats), of_parts)
  assert stats.rollouts_I.sum() == sampled


def test_a_choice_needs_a_floor_of_0(data_dir):
  with pytest.raises(ValueError, match='alloc.low=2 gives each task some; set alloc.low=0'):
    prepare.prepare(debug_config(data_dir, tasks__candidates_per_step=12))


@slow
def test_adapters_and_every_term_of_the_loss(tmp_path, data_dir):
  """Two passes of two mini-batches of two waves; stopped and gone on with; nothing compiles from step two on."""
  knobs = WAVES | {
      'policy__lora_rank': 4, 'policy__num_layers': 2, 'policy__width': 128, 'policy__hidden_width': 512,
      'grpo__keep': 1.0, 'grpo__kl_coef': 0.1, 'grpo__entropy_coef': 0.01, 'grpo__tis_cap': 2.0, 'grpo__dual_clip': 3.0,
      'grpo__weight': 'task', 'grpo__aggregate': 'rollout', 'optimizer__minibatches': 2, 'optimizer__epochs': 2,
      'optimizer__learning_rate': 3e-2, 'optimizer__schedule': 'cosine', 'optimizer__decay_steps': 40,
      'evaluate__tasks': 4, 'checkpoint__keep': 9}
  steps_of = lambda workdir, **kw: [r for r in records(workdir, **kw) if 'reward_mean' in r]
  jax.clear_caches()
  workdir = run(tmp_path / 'whole', data_dir, num_steps=4, **knobs)
  steps = steps_of(workdir, keep_times=True)
  assert len({r['compile_count'] for r in steps[2:]}) == 1
  assert all(r['rollouts_total'] <= 32 and r['objective'] is None for r in steps)
  assert steps[0]['kl'] < steps[-1]['kl']
  assert all(0.9 < r['tis_weight'] < 1.1 and r['policy_entropy'] > 0 for r in steps)
  assert all(r['ratio_p01'] < 0.999 < 1.001 < r['ratio_p99'] for r in steps)  # the policy moves
  assert all(r['tokens_updated'] == 2 * r['tokens_generated'] for r in steps)  # KL: also of equals

  run(tmp_path / 'pieces', data_dir, num_steps=2, **knobs)
  run(tmp_path / 'pieces', data_dir, num_steps=4, **knobs)
  assert steps_of(tmp_path / 'pieces') == steps_of(workdir)
  # A checkpoint holds the adapters, their moments, and no more.
  setup = prepare.prepare(debug_config(data_dir, **knobs))
  adapters, base = policy.split(setup.trained, policy.init(setup.trained, jax.random.key(0)))
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  saved = sum(p.stat().st_size for p in (tmp_path / 'whole/checkpoints/4/state').rglob('*')
              if p.is_file() and 'd' in p.parts)
  with checkpoint.Checkpoints(os.path.join(workdir, 'checkpoints')) as checkpoints:
    begun, _, found = state.start(setup, workdir, checkpoints)
  assert jax.tree.map(np.shape, begun.params) == jax.tree.map(np.shape, adapters)
  assert size(begun.opt_state) < 2 * size(adapters) + 64
  # And some 2 kB an array that Orbax adds.
  assert saved < 3 * size(adapters) + 100_000 < size(base) / 4
  # The base is what the warm start left.
  with checkpoint.Checkpoints(os.path.join(workdir, 'warm_start', 'checkpoints')) as stage:
    plain = update.init(base, jax.random.key(0), setup.sft)
    warm, _ = stage.restore(plain, estimate.init(1))
  jax.tree.map(np.testing.assert_array_equal, found, warm.params)
  last = [r for r in records(workdir) if 'eval/avg@8' in r][-1]
  measured = state.evaluate_checkpoint(setup, workdir)
  assert {'step': measured['step'], **evaluate.record(measured)} == last


@slow
def test_the_papers_rule(tmp_path, data_dir):
  workdir = run(tmp_path, data_dir, num_steps=5, alloc__estimate='window', alloc__solver='greedy',
                tasks__train_split='train[:16]', evaluate__every=0)
  steps = [r for r in records(workdir) if 'reward_mean' in r]
  assert [r['budget_max'] for r in steps[:4]] == [4] * 4  # uniform until a task was seen 8 times
  assert steps[4]['budget_max'] > 4 and steps[4]['budget_min'] == 2
  assert [r['rollouts_total'] for r in steps] == [32] * 5


@slow
def test_success_rates_come_from_verdicts_where_the_reward_is_shaped(tmp_path, data_dir):
  workdir = run(tmp_path, data_dir, rewards__verifier='tests.graders:shaped')
  steps = [r for r in records(workdir) if 'reward_mean' in r]
  assert all(r['reward_mean'] < 0 <= r['success_rate'] <= 1 for r in steps)
  _, stats = state_of(workdir, data_dir)
  counted = sum(r['success_rate'] * r['rollouts_total'] * 0.75 ** ((3 - r['step']) * 8 / 1024) for r in steps)
  assert stats.successes_I.sum() == pytest.approx(counted) and counted > 0
  assert all(0 <= r['eval/avg@8'] <= 1 for r in records(workdir) if 'eval/avg@8' in r)
  # Groups whose verdicts are all the same learn from rewards that are not.
  assert all(r['tokens_updated'] > 0 for r in steps)


# Rollouts that are not verified.


@pytest.mark.slow
def test_nothing_is_learnt_from_what_is_not_verified(tmp_path, data_dir):
  """All that is verified is right: no group is mixed, and the policy stays."""
  workdir = run(tmp_path, data_dir, num_steps=2, rewards__verifier='tests.graders:right_or_nothing',
                evaluate__every=0, warm_start__num_steps=0, warm_start__warmup_steps=0, optimizer__learning_rate=0.1)
  _, *steps, evaluation = records(workdir)
  assert len(steps) == 2
  for r in steps:
    assert r['success_rate'] == r['reward_mean'] == 1 and 0.2 < r['unverified'] < 0.8
    assert r['mixed_tasks'] == r['effective_gradient_ratio'] == r['tokens_updated'] == r['grad_norm'] == 0
    assert r['unverified_abstained'] == 32 * r['unverified'] and r['rollouts_total'] == 32
    of, = r['verification'].values()
    assert (of['right'], of['abstained']) == (32 - r['unverified_abstained'], r['unverified_abstained'])
  assert 'unverified and left out' in steps[0]['alarms'][0] and steps[1]['alarms'] == []
  assert evaluation['eval/avg@8'] == 1 and 0.2 < evaluation['eval/unverified'] < 0.8
  setup = prepare.prepare(debug_config(data_dir))
  found, stats = state_of(workdir, data_dir)
  initial = policy.init(setup.policy, jax.random.fold_in(jax.random.key(setup.config.seed), state.INIT))
  jax.tree.map(np.testing.assert_array_equal, found.params, initial)
  assert stats.failures_I.sum() == 0 < stats.successes_I.sum() < stats.rollouts_I.sum() == sum(
      32 - r['unverified_abstained'] for r in steps)


@slow
def test_a_run_learns_beside_rollouts_that_are_not_verified(tmp_path, data_dir):
  """In a mixed group that loses some too; stopped and gone on with; nothing compiles from step two on."""
  knobs = {'rewards__verifier': 'tests.graders:abstains_at_times', 'tasks__train_split': 'train[:16]',
           'alloc__value': 'snr', 'alloc__nu_every': 2, 'grpo__kl_coef': 0.1, 'evaluate__pass_at': (1, 8)}
  jax.clear_caches()
  workdir = run(tmp_path / 'whole', data_dir, num_steps=8, **knobs)
  steps = [r for r in records(workdir, keep_times=True) if 'reward_mean' in r]
  assert len({r['compile_count'] for r in steps[2:]}) == 1
  assert len({r['unverified'] for r in steps}) > 2 and any(r['mixed_tasks'] for r in steps)
  for r in steps:
    assert 0 < r['tokens_updated'] < r['tokens_generated'] and np.isfinite([r['loss'], r['kl']]).all()
    assert r['effective_gradient_ratio'] <= 1 - r['unverified'] and r['budget_min'] >= 2
  _, stats = state_of(workdir, data_dir, **knobs)
  verified = [round((1 - r['unverified']) * r['rollouts_total']) for r in steps]
  assert stats.rollouts_I.sum() == sum(verified)
  assert stats.successes_I.sum() + stats.failures_I.sum() == pytest.approx(
      sum(n * 0.75 ** ((7 - i) / 2) for i, n in enumerate(verified)))  # a pass is of two steps
  last = records(workdir)[-1]
  assert 0 < last['eval/unverified'] < 1 and last['eval/pass@8_left_out'] > 0 == last['eval/avg@8_left_out']
  run(tmp_path / 'parts', data_dir, num_steps=4, **knobs)
  parts = run(tmp_path / 'parts', data_dir, num_steps=8, **knobs)
  of_steps = lambda workdir: [r | {'alarms': None} for r in records(workdir) if 'reward_mean' in r]
  assert of_steps(parts) == of_steps(workdir)


@slow
def test_a_step_without_a_verdict_changes_nothing(tmp_path, data_dir, monkeypatch):
  """Neither policy nor statistics, nor their evidence's age; and the run goes on."""
  scores = explore._scores
  knobs = {'evaluate__every': 0, 'alloc__value': 'snr', 'alloc__nu_every': 1}
  workdir = run(tmp_path, data_dir, num_steps=1, **knobs)
  before, stats = state_of(workdir, data_dir)
  with monkeypatch.context() as patch:
    patch.setattr(explore, '_scores', lambda *args: (lambda found: found._replace(
        outcome_R=np.where(found.outcome_R > 0, verdicts.DIED, 0).astype(np.int8), reward_R=0 * found.reward_R))(
            scores(*args)))
    run(tmp_path, data_dir, num_steps=2, **knobs)
  after, found = state_of(workdir, data_dir)
  assert (before.step, after.step) == (1, 2)
  jax.tree.map(np.testing.assert_array_equal, (before._replace(step=0), stats), (after._replace(step=0), found))
  row = [r for r in records(workdir) if 'reward_mean' in r][1]
  assert row['reward_mean'] is row['success_rate'] is None and row['unverified_died'] == 32
  assert row['tokens_generated'] > 0 == row['tokens_updated'] and 0 < row['entropy'] < 2 * np.log(16)


@slow
def test_the_same_seed_gives_the_same_run(finished, tmp_path, data_dir):
  assert_same_run(run(tmp_path, data_dir), finished, data_dir)


@exhaustive
def test_another_seed_gives_another_run(finished, tmp_path, data_dir):
  assert records(run(tmp_path, data_dir, seed=1)) != records(finished)


@exhaustive
def test_a_longer_run_goes_on_as_if_it_had_not_stopped(finished, tmp_path, data_dir):
  """From checkpoints that stand elsewhere, as those of several hosts do."""
  elsewhere = {'checkpoint__directory': str(tmp_path / 'elsewhere')}
  workdir = tmp_path / 'run'
  run(workdir, data_dir, num_steps=2, **elsewhere)
  run(workdir, data_dir, **elsewhere)
  assert not (workdir / 'checkpoints').exists() and not (workdir / 'warm_start' / 'checkpoints').exists()
  assert {p.name for p in (tmp_path / 'elsewhere').iterdir()} == {'checkpoints', 'warm_start'}
  shutil.copytree(tmp_path / 'elsewhere' / 'checkpoints', workdir / 'checkpoints')
  assert_same_run(workdir, finished, data_dir)


@slow
def test_a_run_goes_on_on_another_mesh(finished, tmp_path, data_dir):
  run(tmp_path, data_dir, num_steps=2)
  run(tmp_path, data_dir, num_steps=3, mesh__devices=4, mesh__data=2, mesh__sample_model=2)
  found, want = ([r for r in records(workdir) if 'loss' in r][2] for workdir in (tmp_path, finished))
  assert found['tokens_generated'] == want['tokens_generated'] and found['step'] == 2
  for name in ('loss', 'grad_norm', 'entropy'):
    assert found[name] == pytest.approx(want[name], rel=1e-4), name


@exhaustive
def test_the_next_step_is_the_same_on_other_devices_and_with_other_slots(tmp_path, data_dir):
  """After a checkpoint of 8 devices; to the rounding of sums, which Adam's eps keeps from being divided by 0."""
  same = {'optimizer__eps': 1e-3, 'policy__num_layers': 2}
  run(tmp_path / 'saved', data_dir, num_steps=2, mesh__devices=8, mesh__data=2, mesh__fsdp=2, mesh__model=2, **same)
  found = []
  for number, others in enumerate((
      {'mesh__devices': 8, 'mesh__data': 2, 'mesh__fsdp': 2, 'mesh__model': 2},
      {'mesh__devices': 1, 'sample__slots': 5},
      {'mesh__devices': 4, 'mesh__fsdp': 4, 'sample__slots': 3, 'sample__prefill': 2},
      {'mesh__devices': 8, 'mesh__data': 4, 'mesh__model': 2, 'sample__slots': 2, 'mesh__sample_model': 1})):
    workdir = shutil.copytree(tmp_path / 'saved', tmp_path / str(number))
    run(workdir, data_dir, num_steps=3, **same, **others)
    step = next(r for r in records(workdir) if r['step'] == 2 and 'loss' in r)
    found.append(({name: step[name] for name in ('loss', 'grad_norm', 'entropy')}, step['tokens_generated'],
                  *state_of(workdir, data_dir, **same)))
  for measured, tokens, state, stats in found[1:]:
    assert measured == pytest.approx(found[0][0], rel=1e-5) and tokens == found[0][1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), state.params, found[0][2].params)
    jax.tree.map(np.testing.assert_array_equal, stats, found[0][3])


@pytest.mark.parametrize(
    'step', [pytest.param(1, marks=exhaustive), pytest.param(2, marks=slow), pytest.param(3, marks=exhaustive)])
def test_sigterm_loses_nothing(finished, tmp_path, data_dir, monkeypatch, step):
  with monkeypatch.context() as patch:
    send_sigterm_in(patch, update, 'step', step)
    with pytest.raises(SystemExit, match=f'stopped after {step} of 4 steps'):
      run(tmp_path, data_dir)
  run(tmp_path, data_dir)
  assert_same_run(tmp_path, finished, data_dir)


@exhaustive
def test_sigterm_while_the_page_is_written_is_honoured_before_another_step(tmp_path, data_dir, monkeypatch):
  send_sigterm_in(monkeypatch, refresh.Refresher, 'refresh', 1)  # after the evaluation before step 2
  with pytest.raises(SystemExit, match='stopped after 2 of 4 steps'):
    run(tmp_path, data_dir)


@slow
def test_sigterm_in_the_warm_start_loses_nothing(finished, tmp_path, data_dir, monkeypatch):
  with monkeypatch.context() as patch:
    send_sigterm_in(patch, update, 'sft', 3)
    with pytest.raises(SystemExit, match='stopped after 3 of 4 warm-start steps'):
      run(tmp_path, data_dir)
  run(tmp_path, data_dir)
  assert_same_run(tmp_path, finished, data_dir)
  assert records(tmp_path / 'warm_start') == records(os.path.join(finished, 'warm_start'))


@slow
def test_a_kill_repeats_the_steps_after_the_last_checkpoint(finished, tmp_path, data_dir):
  """What a kill at step 3 leaves: the checkpoint of step 2, and half a record."""
  workdir = tmp_path / 'killed'
  shutil.copytree(finished, workdir)
  shutil.rmtree(workdir / 'checkpoints' / '4')
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  (workdir / 'metrics.jsonl').write_text('\n'.join(lines[:-2]) + '\n' + lines[-2][:30])
  run(workdir, data_dir)
  assert_same_run(workdir, finished, data_dir)


@exhaustive
def test_a_checkpoint_is_not_ahead_of_the_ledger(tmp_path, data_dir, monkeypatch):
  """A kill right after a checkpoint loses no rollouts of the steps that it counts, though no other write is due."""
  monkeypatch.setattr(ledger, '_EVERY_S', 600)
  monkeypatch.setattr(ledger, '_APPEND_S', 600)
  original, counted = checkpoint.Checkpoints.save, []

  def save(self, step, *args):
    with open(tmp_path / 'ledger.now.json') as file:
      counted.append((step, sum(entry.get('rollouts', 0) for entry in json.load(file)['entries']
                                if entry['phase'] == 'sample')))
    return original(self, step, *args)

  monkeypatch.setattr(checkpoint.Checkpoints, 'save', save)
  run(tmp_path, data_dir, num_steps=3, checkpoint__every=1, evaluate__every=0, warm_start__num_steps=0)
  assert counted == [(step, 32 * step) for step in (1, 2, 3)]


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(finished, data_dir):
  before = records(finished, keep_times=True)
  run(finished, data_dir)
  assert records(finished, keep_times=True) == before


@exhaustive
def test_evaluations_leave_the_training_as_it_is(finished, tmp_path, data_dir, monkeypatch):
  monkeypatch.setitem(rewards.ANSWERS, 'tests.graders:has_a_one', rewards.ANSWERS['ends_with'])
  other = run(tmp_path, data_dir, evaluate__every=1, evaluate__rollouts=3, evaluate__temperature=0.5,
              evaluate__tasks_per_batch=5, evaluate__pass_at=(2,), evaluate__maj_at=(2, 3))
  assert [r['step'] for r in records(other) if 'eval/maj@3' in r] == [0, 1, 2, 3, 4]
  assert_same_run(other, finished, data_dir, evaluations=False)


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_and_stop_the_run(tmp_path, data_dir, monkeypatch):
  """From step 1 on: the checkpoint of step 1 has the policy that all of them leave, and statistics go on."""
  original = update.step

  def broken(state, rollouts, *args, **kwargs):
    if int(state.step) >= 1:
      rollouts = rollouts._replace(logp_RC=np.nan * rollouts.logp_RC)
    return original(state, rollouts, *args, **kwargs)

  monkeypatch.setattr(update, 'step', broken)
  with pytest.raises(guard.Diverged, match=(
      f'the updates of steps 1 to 2 were skipped, train.max_bad_steps=2 in a row. At step 2 the loss is nan .*'
      f'The last good checkpoint is {tmp_path}/checkpoints/2: .*--mode=replay --workdir={tmp_path} --step=2')):
    run(tmp_path, data_dir, train__max_bad_steps=2, checkpoint__every=1, checkpoint__keep=3, evaluate__every=0)
  steps = [r for r in records(tmp_path) if 'reward_mean' in r]
  assert [(r['skipped'], r['loss'] is None) for r in steps] == [(0, False), (1, True), (1, True)]
  assert bad_steps.kept(str(tmp_path)) == [1, 2]
  assert saved.steps(str(tmp_path / 'checkpoints')) == [1, 2]  # that of step 3 would be after the stop


@exhaustive
@pytest.mark.parametrize('every, saved_steps, says', [
    (1, [1], r'after 2 steps the policy has a value of nan in params.\S+. It is not saved. The last good checkpoint is '
     r'\S+/checkpoints/1; run the same command again with a lower optimizer.learning_rate'),
    (9, [], 'step 2: the log-probabilities of the sampled tokens add up to nan: .* nothing was learnt from them. No '
     'checkpoint was saved')])
def test_a_policy_that_is_not_finite_is_never_saved(tmp_path, data_dir, monkeypatch, every, saved_steps, says):
  """Though its update was made: it is seen before it is saved, or in what it samples."""
  original = update.step

  def broken(state, *args, **kwargs):
    state, measured = original(state, *args, **kwargs)
    worse = jax.tree.map(lambda x: x * np.nan, state.params) if int(state.step) == 2 else state.params
    return state._replace(params=worse), measured

  monkeypatch.setattr(update, 'step', broken)
  with pytest.raises(guard.Diverged, match=says):
    run(tmp_path, data_dir, checkpoint__every=every, evaluate__every=0)
  assert saved.steps(str(tmp_path / 'checkpoints')) == saved_steps
  assert [r['step'] for r in records(tmp_path) if 'reward_mean' in r] == [0, 1]


@exhaustive
def test_a_mixture_learns_and_goes_on(tmp_path, data_dir):
  """Of one dataset: as far as the loop can tell, one of several."""
  knobs = {'tasks__mixture': (('arithmetic:train[:40]', 1.0),), 'tasks__test': ('arithmetic:test[:5]',),
           'num_steps': 2}
  workdir = run(tmp_path, data_dir, **knobs)
  run(tmp_path, data_dir, **knobs | {'num_steps': 3})
  assert [r['step'] for r in records(workdir) if 'reward_mean' in r] == [0, 1, 2]
  with pytest.raises(ValueError, match='tasks.mixture was'):
    run(tmp_path, data_dir, **knobs | {'tasks__mixture': (('arithmetic:train[:40]', 2.0),)})


def test_duplicate_ids_are_refused(tmp_path, data_dir, monkeypatch):
  read = tasks.read
  twice = lambda *args, **kwargs: (lambda t: tasks.check(t + t[:1], 'twice'))(read(*args, **kwargs))
  monkeypatch.setattr(tasks, 'read', twice)
  with pytest.raises(ValueError, match='share the id'):
    run(tmp_path, data_dir)


def test_a_workdir_of_another_config_is_refused(finished, data_dir):
  before = records(finished)
  with pytest.raises(ValueError, match="alloc.rule was 'knapsack', is 'uniform'"):
    run(finished, data_dir, alloc__rule='uniform')
  assert records(finished) == before


def test_a_workdir_of_other_tasks_is_refused(finished, tmp_path, data_dir):
  workdir = tmp_path / 'other'
  shutil.copytree(finished, workdir)
  text = (workdir / 'config.json').read_text()
  (workdir / 'config.json').write_text(text.replace('"train_ids": "', '"train_ids": "0'))
  with pytest.raises(ValueError, match='train_ids was'):
    run(workdir, data_dir)


def test_an_unwritable_workdir_is_refused(tmp_path, data_dir):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='cannot write to --workdir'):
    run(tmp_path / 'file' / 'run', data_dir)


@exhaustive
def test_the_ledger_accounts_for_a_run_with_three_kills(tmp_path):
  command = (sys.executable, '-m', 'kr_jax.main', '--config=configs/arithmetic.py:debug', f'--workdir={tmp_path}/run',
             '--config.num_steps=12')
  wall_s, metrics_path = 0.0, tmp_path / 'run' / 'metrics.jsonl'
  for steps in (3, 6, 9, None):
    began = time.time()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while steps and process.poll() is None and (
        not metrics_path.exists() or sum('reward_mean' in r for r in metrics.read(str(metrics_path))) < steps):
      time.sleep(0.05)
    if steps:
      process.kill()
    assert process.wait() == (-signal.SIGKILL if steps else 0)
    wall_s += time.time() - began
  found = ledger.read(str(tmp_path / 'run'))
  of_run = goodput.goodput(found)
  assert of_run['attempts'] == 4 and not found.problems and [end['attempt'] for end in found.ends] == [3]
  assert sum(entry['wall_s'] for entry in found.entries) == pytest.approx(of_run['wall_s'])
  assert of_run['wall_s'] == pytest.approx(wall_s, rel=0.02)
  assert of_run['badput']['wasted_progress'] > 0 and of_run['badput']['recovery'] > 0
  # Every step once, and those after a checkpoint that was not there yet twice.
  rollouts = sum(entry.get('rollouts', 0) for entry in found.entries if entry['phase'] == 'sample')
  assert rollouts >= 12 * 32
