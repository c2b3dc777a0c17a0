"""The loop end to end on the shrunk config: its record, its checks, and that nothing is lost."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from configs import arithmetic
from kr_jax import evaluate
from kr_jax import tasks
from kr_jax import train
from kr_jax import warm_start
from kr_jax.allocation import estimate
from kr_jax.learning import grpo
from kr_jax.learning import update
from kr_jax.model import policy
from kr_jax.record import checkpoint
from kr_jax.record import metrics

slow = pytest.mark.slow
# A second run in one process finds its programs compiled, and time goes on.
NOT_REPEATED = ('wall_s', 'compile_count', 'tokens_per_s')


def config_of(data_dir, **knobs):
  c = arithmetic.get_config('debug')
  c.tasks.data_dir = data_dir
  c.rewards.workers = 1
  c.mesh.devices = c.policy.num_layers = 1
  for name, x in knobs.items():
    section, _, knob = name.rpartition('__')
    (c[section] if section else c)[knob] = x
  return c


def run(workdir, data_dir, **knobs):
  train.train(train.prepare(config_of(data_dir, **knobs)), str(workdir))
  return str(workdir)


def records(workdir, *, keep_times=False):
  rows = metrics.read(os.path.join(workdir, 'metrics.jsonl'))
  return [{k: v for k, v in r.items() if keep_times or k not in NOT_REPEATED} for r in rows]


def state_of(workdir, data_dir):
  setup = train.prepare(config_of(data_dir))
  with checkpoint.Checkpoints(os.path.join(workdir, 'checkpoints')) as checkpoints:
    state, stats, _ = train.start(setup, workdir, checkpoints)
  return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key))), stats


def assert_same_run(workdir, other, data_dir, *, evaluations=True):
  keep = lambda r: evaluations or 'reward_mean' in r
  assert list(filter(keep, records(workdir))) == list(filter(keep, records(other)))
  jax.tree.map(np.testing.assert_array_equal, state_of(workdir, data_dir), state_of(other, data_dir))


def send_sigterm_in(monkeypatch, module, name, call):
  """SIGTERM arrives in the middle of the given call of module.name."""
  original, calls = getattr(module, name), []

  def interrupted(*args):
    calls.append(None)
    if len(calls) == call:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(*args)

  monkeypatch.setattr(module, name, interrupted)


@pytest.fixture(scope='module', autouse=True)
def learnable():
  """Rewards that a policy of a few steps can earn: any completion with a 1 in it, on half the tasks."""
  with pytest.MonkeyPatch.context() as patch:
    from kr_jax import rewards
    patch.setitem(rewards.VERIFIERS, 'ends_with', has_a_one)
    yield


def has_a_one(completion, task):
  return '1' in completion and int(task.answer) % 2 == 0


@pytest.fixture(scope='module')
def finished(tmp_path_factory, data_dir):
  return run(tmp_path_factory.mktemp('finished'), data_dir)


def test_the_record_of_a_run(finished):
  rows = records(finished, keep_times=True)
  steps = [r for r in rows if 'reward_mean' in r]
  assert [r['step'] for r in steps] == [0, 1, 2, 3]
  for r in steps:
    assert {'wall_s', 'reward_mean', 'effective_gradient_ratio', 'uniform_gradient_ratio',
            'mixed_tasks', 'objective', 'budget_min', 'budget_max', 'rollouts_total',
            'tokens_generated', 'tokens_updated', 'loss', 'entropy', 'grad_norm',
            'clip_fraction_low', 'clip_fraction_high', 'logp_error', 'policy_entropy', 'ratio_p99',
            'padding_waste', 'compile_count'} <= set(r)
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


@slow
def test_nothing_compiles_from_step_two_on(tmp_path, data_dir):
  """Over budgets that change, an evaluation and checkpoints; from a cold start."""
  jax.clear_caches()
  workdir = run(tmp_path, data_dir, num_steps=9, tasks__train_split='train[:16]')
  steps = [r for r in records(workdir, keep_times=True) if 'reward_mean' in r]
  assert len({json.dumps(r['budget_by_success_rate']) for r in steps}) > 4
  assert len({r['compile_count'] for r in steps[2:]}) == 1


@slow
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


@slow
def test_adapters_and_every_term_of_the_loss(tmp_path, data_dir):
  """Two passes of two mini-batches; stopped and gone on with; nothing compiles from step two on."""
  knobs = {'policy__lora_rank': 4, 'policy__num_layers': 2, 'policy__width': 128, 'policy__hidden_width': 512,
           'grpo__kl_coef': 0.1, 'grpo__entropy_coef': 0.01,
           'grpo__tis_cap': 2.0, 'grpo__dual_clip': 3.0, 'grpo__weight': 'task',
           'grpo__aggregate': 'rollout', 'optimizer__minibatches': 2, 'optimizer__epochs': 2,
           'optimizer__learning_rate': 3e-2, 'optimizer__schedule': 'cosine',
           'optimizer__decay_steps': 40, 'evaluate__every': 0, 'checkpoint__keep': 9}
  steps_of = lambda workdir, **kw: [r for r in records(workdir, **kw) if 'reward_mean' in r]
  jax.clear_caches()
  workdir = run(tmp_path / 'whole', data_dir, num_steps=6, **knobs)
  steps = steps_of(workdir, keep_times=True)
  assert len({r['compile_count'] for r in steps[2:]}) == 1
  assert steps[0]['kl'] < steps[-1]['kl']
  assert all(0.9 < r['tis_weight'] < 1.1 and r['policy_entropy'] > 0 for r in steps)
  assert all(r['ratio_p01'] < 0.999 < 1.001 < r['ratio_p99'] for r in steps)  # the policy moves
  assert all(r['tokens_updated'] == 2 * r['tokens_generated'] for r in steps)  # KL: also of equals

  run(tmp_path / 'pieces', data_dir, num_steps=2, **knobs)
  run(tmp_path / 'pieces', data_dir, num_steps=6, **knobs)
  assert steps_of(tmp_path / 'pieces') == steps_of(workdir)
  # A checkpoint holds the adapters, their moments, and no more.
  setup = train.prepare(config_of(data_dir, **knobs))
  adapters, base = policy.split(setup.trained, policy.init(setup.trained, jax.random.key(0)))
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  saved = sum(p.stat().st_size for p in (tmp_path / 'whole/checkpoints/6/state').rglob('*')
              if p.is_file() and 'd' in p.parts)
  with checkpoint.Checkpoints(os.path.join(workdir, 'checkpoints')) as checkpoints:
    state, _, found = train.start(setup, workdir, checkpoints)
  assert jax.tree.map(np.shape, state.params) == jax.tree.map(np.shape, adapters)
  assert size(state.opt_state) < 2 * size(adapters) + 64
  # And some 2 kB an array that Orbax adds.
  assert saved < 3 * size(adapters) + 100_000 < size(base) / 4
  # The base is what the warm start left.
  with checkpoint.Checkpoints(os.path.join(workdir, 'warm_start', 'checkpoints')) as stage:
    plain = update.init(base, jax.random.key(0), setup.warm_start.update)
    warm, _ = stage.restore(plain, estimate.init(1))
  jax.tree.map(np.testing.assert_array_equal, found, warm.params)
  last = [r for r in records(workdir) if 'eval/avg@8' in r][-1]
  measured = train.evaluate_checkpoint(setup, workdir)
  assert {'step': measured['step'], **evaluate.record(measured)} == last


def test_presets_of_the_loss():
  for preset, knobs in grpo.PRESETS.items():
    loss = train._loss(config_of('', grpo__preset=preset))
    assert all(getattr(loss, name) == x for name, x in knobs.items())


@slow
def test_the_papers_rule(tmp_path, data_dir):
  """Its preset overrides what the other knobs say."""
  workdir = run(tmp_path, data_dir, num_steps=5, alloc__preset='paper', alloc__value='snr',
                alloc__solver='greedy', tasks__train_split='train[:16]', evaluate__every=0)
  steps = [r for r in records(workdir) if 'reward_mean' in r]
  assert [r['budget_max'] for r in steps[:4]] == [4] * 4  # uniform until a task was seen 8 times
  assert steps[4]['budget_max'] > 4 and steps[4]['budget_min'] == 2
  assert [r['rollouts_total'] for r in steps] == [32] * 5


def test_budgets_of_tokens():
  alloc = config_of('', alloc__cost='tokens', alloc__tokens_per_step=100).alloc
  stats = estimate.init(8)
  budgets_of = lambda alloc, stats: train._budgets(alloc, stats, np.arange(8), 22)
  # Until any completion was seen, all are as long as they may be: 16 rollouts cost 352.
  assert budgets_of(alloc, stats).tolist() == [2] * 8  # the least, though they cost more
  seen = estimate.observe(stats, np.arange(8), np.arange(8), np.ones(8), np.full(8, 5), discount=1.0)
  budget_M = budgets_of(alloc, seen)
  assert budget_M.sum() * 5 == 100 and budget_M.min() >= 2
  # However short they are, there are R rollouts at the most.
  alloc.tokens_per_step = 700
  assert budgets_of(alloc, seen).sum() == 32
  alloc.update(rule='uniform', tokens_per_step=125)
  assert budgets_of(alloc, seen).tolist() == [4] + [3] * 7


@slow
def test_success_rates_come_from_verdicts_where_the_reward_is_shaped(tmp_path, data_dir, monkeypatch):
  from kr_jax import rewards
  monkeypatch.setitem(rewards.VERIFIERS, 'ends_with', shaped)
  workdir = run(tmp_path, data_dir)
  steps = [r for r in records(workdir) if 'reward_mean' in r]
  assert all(r['reward_mean'] < 0 <= r['success_rate'] <= 1 for r in steps)
  _, stats = state_of(workdir, data_dir)
  counted = sum(r['success_rate'] * r['rollouts_total'] * 0.98 ** (3 - r['step']) for r in steps)
  assert stats.successes_I.sum() == pytest.approx(counted) and counted > 0
  assert all(0 <= r['eval/avg@8'] <= 1 for r in records(workdir) if 'eval/avg@8' in r)
  # Groups whose verdicts are all the same learn from rewards that are not.
  assert all(r['tokens_updated'] > 0 for r in steps)


def shaped(completion, task):
  return has_a_one(completion, task), -1 - len(completion)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(finished, tmp_path, data_dir):
  assert_same_run(run(tmp_path, data_dir), finished, data_dir)


@slow
def test_another_seed_gives_another_run(finished, tmp_path, data_dir):
  assert records(run(tmp_path, data_dir, seed=1)) != records(finished)


@slow
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


@pytest.mark.parametrize('step', [pytest.param(n, marks=slow) for n in (1, 2, 3)])
def test_sigterm_loses_nothing(finished, tmp_path, data_dir, monkeypatch, step):
  with monkeypatch.context() as patch:
    send_sigterm_in(patch, update, 'step', step)
    with pytest.raises(SystemExit, match=f'stopped after {step} of 4 steps'):
      run(tmp_path, data_dir)
  run(tmp_path, data_dir)
  assert_same_run(tmp_path, finished, data_dir)


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


def test_a_finished_run_is_left_as_it_is(finished, data_dir):
  before = records(finished, keep_times=True)
  run(finished, data_dir)
  assert records(finished, keep_times=True) == before


def test_evaluate_checkpoint_repeats_the_last_evaluation(finished, data_dir):
  measured = train.evaluate_checkpoint(train.prepare(config_of(data_dir)), finished)
  assert {'step': measured['step'], **evaluate.record(measured)} == records(finished)[-1]
  assert os.path.isdir(measured['checkpoint']) and measured['checkpoint'].endswith('checkpoints/4')


@pytest.mark.slow
def test_evaluate_checkpoint_with_other_knobs(finished, data_dir):
  """The metrics that its run did not have; the same rollouts."""
  measured = train.evaluate_checkpoint(train.prepare(config_of(
      data_dir, evaluate__pass_at=(1, 4, 8), evaluate__maj_at=(1, 8))), finished)
  assert measured['config']['evaluate']['pass_at'] == [1, 4, 8]
  assert json.loads(json.dumps(measured, allow_nan=False)) == measured
  flat, last = evaluate.record(measured), records(finished)[-1]
  assert flat.items() >= last.items() - {('step', 4)}
  mean = lambda name: measured['groups']['source_arithmetic']['metrics'][name]['mean']
  assert mean('pass@1') == pytest.approx(mean('avg@8')) == pytest.approx(flat['eval/avg@8'])
  assert mean('pass@1') < mean('pass@4') < mean('pass@8') and 0 <= mean('maj@8') <= mean('pass@8')


@slow
def test_evaluations_leave_the_training_as_it_is(finished, tmp_path, data_dir):
  other = run(tmp_path, data_dir, evaluate__every=1, evaluate__rollouts=3, evaluate__temperature=0.5,
              evaluate__tasks_per_batch=5, evaluate__pass_at=(2,), evaluate__maj_at=(2, 3))
  assert [r['step'] for r in records(other) if 'eval/maj@3' in r] == [0, 1, 2, 3, 4]
  assert_same_run(other, finished, data_dir, evaluations=False)


def test_evaluating_nothing(tmp_path, data_dir):
  with pytest.raises(ValueError, match='holds no checkpoint; train first'):
    train.evaluate_checkpoint(train.prepare(config_of(data_dir)), str(tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, data_dir, monkeypatch):
  original = update.step

  def broken(state, *args):
    state, measured = original(state, *args)
    return state, [m | {'loss': m['loss'] * np.nan} for m in measured]

  monkeypatch.setattr(update, 'step', broken)
  with pytest.raises(FloatingPointError, match='loss is nan at step 0'):
    run(tmp_path, data_dir)
  assert not [name for name in os.listdir(tmp_path / 'checkpoints') if name.isdigit()]


@pytest.mark.parametrize('knobs, named', [
    ({'alloc__rollouts_per_step': 15}, 'total must lie in 16..512'),
    ({'alloc__rollouts_per_step': 513}, 'total must lie in 16..512'),
    ({'alloc__low': 0}, 'alloc.low=0 is below 1'),
    ({'alloc__high': 1}, 'alloc.high=1 is below alloc.low=2'),
    ({'alloc__rule': 'random'}, "alloc.rule='random' is not one of"),
    ({'alloc__discount': 0.0}, r'alloc.discount=0.0 is not in \(0, 1\]'),
    ({'alloc__preset': 'verl'}, r"alloc.preset='verl' is not one of \('', 'paper'\)"),
    ({'alloc__estimate': 'mean'}, "alloc.estimate='mean' is not one of"),
    ({'alloc__value': 'entropy'}, "alloc.value='entropy' is not one of"),
    ({'alloc__nu': 0.0}, 'alloc.nu=0.0 must be a positive number'),
    ({'alloc__nu_every': -1}, 'alloc.nu_every=-1 is below 0'),
    ({'alloc__nu_every': 5}, "alloc.nu_every=5 measures what alloc.value='infogain' does not read"),
    ({'alloc__solver': 'milp'}, "alloc.solver='milp' is not one of"),
    ({'alloc__cost': 'seconds'}, "alloc.cost='seconds' is not one of"),
    ({'alloc__cost': 'tokens'}, 'alloc.tokens_per_step=0 is not in 16..704'),
    ({'alloc__cost': 'tokens', 'alloc__tokens_per_step': 705}, 'tokens_per_step=705 is not in 16..704'),
    ({'alloc__cost': 'tokens', 'alloc__tokens_per_step': 99, 'alloc__solver': 'greedy'},
     "solver='greedy' is exact for equal costs only"),
    ({'alloc__cost': 'tokens', 'alloc__tokens_per_step': 99, 'alloc__estimate': 'window'},
     "the paper's rule knows no costs"),
    ({'grpo__advantage': 'max'}, "grpo.advantage='max' is not one of"),
    ({'grpo__preset': 'ppo'}, "grpo.preset='ppo' is not one of"),
    ({'grpo__weight': 'tokens'}, "grpo.weight='tokens' is not one of"),
    ({'grpo__dual_clip': 1.1}, 'grpo.dual_clip=1.1 must be above 1 [+] grpo.clip_high=1.28'),
    ({'optimizer__minibatches': 0}, 'minibatches=0 is below 1'),
    ({'optimizer__schedule': 'linear'}, 'decay_steps=0 must be above warmup_steps=10'),
    ({'policy__remat': 'all'}, "policy.remat='all' is not one of"),
    ({'policy__lora_rank': -1}, 'policy.lora_rank=-1 is below 0'),
    ({'sample__slots': 0}, 'sample.slots=0 is below 1'),
    ({'sample__refill': 17}, 'sample.refill=17'),
    ({'sample__temperature': 0.0}, 'sample.temperature=0.0 must be above 0'),
    ({'sample__top_k': 5}, 'sample.top_k=5 leaves tokens out.* set it to 0, and evaluate.top_k'),
    ({'sample__top_p': 0.9}, 'sample.top_p=0.9 leaves tokens out'),
    ({'evaluate__min_p': -0.1}, r'evaluate.min_p=-0.1 is not in'),
    ({'evaluate__temperature': -1.0}, 'temperature=-1.0 is below 0'),
    ({'sample__prompt_length': 20}, r'has 21 tokens, not 1..sample.prompt_length=20; .* at least 21'),
    ({'sample__completion_length': 19}, 'sample.completion_length=19'),
    ({'pack__row_length': 41}, 'pack.row_length=41 is below the 42 tokens'),
    ({'pack__microbatch_rows': 0}, 'microbatch_rows=0 is below 1'),
    ({'tasks__dataset': 'none'}, "tasks.dataset='none' is not one of"),
    ({'tasks__mixture': (('arithmetic', 1.0), ('none', 1.0))}, "tasks.dataset='none' is not one of"),
    ({'tasks__mixture': (('arithmetic', 0.0),)}, 'with a weight above 0'),
    ({'tasks__mixture': (('arithmetic', 1), ('champ:test', 1))}, "'champ' has no alphabet"),
    ({'tasks__test': ('arithmetic:dev',)}, "dataset 'arithmetic' has no split 'dev'"),
    ({'tasks__test': ('arithmetic', 'arithmetic:test[:5]')}, 'and arithmetic/test.* share'),
    ({'tasks__template': 'Think.'}, "tasks.template='Think.' is no text around {problem}"),
    ({'tasks__train_split': 'training'}, "has no split 'training'"),
    ({'tasks__train_split': 'train[:0]'}, 'holds no task'),
    ({'tasks__test_split': 'test[:0]'}, 'holds no task'),
    ({'tasks__train_split': 'train[:7]'}, 'tasks.per_step=8 is more than the 7 tasks'),
    ({'tasks__per_step': 0}, 'tasks.per_step=0 is below 1'),
    ({'evaluate__rollouts': 0}, 'evaluate.rollouts=0 is below 1'),
    ({'evaluate__temperature': 0.0}, 'evaluate.rollouts=8 completions of a task are all the same'),
    ({'evaluate__pass_at': (9,)}, 'holds 9, which is not a whole number in 1..evaluate.rollouts=8'),
    ({'evaluate__maj_at': (9,)}, 'holds 9, which is not a whole number in 1..evaluate.rollouts=8'),
    ({'num_steps': -1}, 'num_steps=-1 is below 0'),
    ({'seed': -1}, 'seed=-1 is below 0'),
    ({'checkpoint__every': 0}, 'checkpoint.every=0 is below 1'),
    ({'policy__num_kv_heads': 3}, 'policy.num_heads=2 is not a multiple'),
    ({'rewards__verifier': 'none'}, "rewards.verifier='none' is not one of"),
    ({'rewards__timeout_s': 0.0}, 'rewards.timeout_s=0.0 must be above 0'),
    ({'warm_start__per_step': 10_000}, 'warm_start.per_step=10000'),
    ({'warm_start__warmup_steps': 4}, 'warm_start.num_steps=4 must be 0 or above'),
])
def test_bad_input_is_refused_before_anything_is_computed(
    tmp_path, data_dir, monkeypatch, knobs, named):
  for module, name in ((policy, 'init'), (warm_start, 'run')):
    monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail('something was computed'))
  with pytest.raises(ValueError, match=named):
    run(tmp_path / 'run', data_dir, **knobs)
  assert not (tmp_path / 'run').exists()


def test_a_mixture_and_several_test_sets(data_dir, monkeypatch):
  bits = 'reasoning_gym/count_bits'
  config = config_of(
      data_dir, tasks__mixture=(('arithmetic:train[:40]', 3.0), (bits, 1.0)), warm_start__num_steps=0,
      tasks__test=(f'{bits}:test[:3]', 'arithmetic'), evaluate__tasks=5, sample__prompt_length=128,
      pack__row_length=150)
  config.tasks.reasoning_gym = {'train': 30, 'test': 10, 'seed': 0}
  setup = train.prepare(config)
  assert setup.shares == {'arithmetic': 3.0, bits: 1.0}
  assert [t.source for t in setup.train_tasks] == ['arithmetic'] * 40 + [bits] * 30
  assert [t.index for t in setup.train_tasks] == list(range(70))  # the rows of the statistics
  assert [t.source for t in setup.test_tasks] == [bits] * 3 + ['arithmetic'] * 5
  assert setup.tokenizer.decode(setup.train_tasks[69].tokens) == setup.train_tasks[69].prompt
  found = evaluate.Outcomes(np.arange(32).reshape(8, 4) < 12, None, 0, 0)
  monkeypatch.setattr(evaluate, 'outcomes', lambda *_, **__: found)
  groups = train.evaluation(setup, None, jax.random.key(0), None)['groups']
  assert {name: (x['tasks'], x['metrics']['avg@4']['mean']) for name, x in groups.items()
          if name.startswith('source_')} == {f'source_{bits}': (3, 1.0), 'source_arithmetic': (5, 0.0)}


@slow
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
