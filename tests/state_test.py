"""A checkpoint evaluated and exported as the run that left it would have."""

import json
import os

import jax
import numpy as np
import pytest

from kr_jax import evaluate
from kr_jax import knobs
from kr_jax import prepare
from kr_jax import rewards
from kr_jax import state
from kr_jax.allocation import estimate
from kr_jax.learning import guard
from kr_jax.learning import update
from kr_jax.model import decode
from kr_jax.model import policy
from kr_jax.model import tokenizer
from kr_jax.model import weights
from kr_jax.record import checkpoint
from kr_jax.record import claim as claim_lib
from kr_jax.record import metrics
from kr_jax.rewards import verdicts
from tests.knobs import debug_config


def last_record(workdir):
  rows = metrics.read(os.path.join(workdir, 'metrics.jsonl'))
  return {k: v for k, v in rows[-1].items() if k != 'wall_s'}


@pytest.mark.slow
def test_a_checkpoint_repeats_the_last_evaluation_of_its_run(finished, data_dir):
  measured = state.evaluate_checkpoint(prepare.prepare(debug_config(data_dir)), finished)
  assert {'step': measured['step'], **evaluate.record(measured)} == last_record(finished)
  assert os.path.isdir(measured['checkpoint']) and measured['checkpoint'].endswith('checkpoints/4')


@pytest.mark.slow
def test_with_other_metrics(finished, data_dir, monkeypatch):
  """Those that its run did not have, of the same rollouts."""
  monkeypatch.setitem(rewards.ANSWERS, 'tests.graders:has_a_one', rewards.ANSWERS['ends_with'])
  measured = state.evaluate_checkpoint(prepare.prepare(debug_config(
      data_dir, evaluate__pass_at=(1, 4, 8), evaluate__maj_at=(1, 8))), finished)
  assert measured['config']['evaluate']['pass_at'] == [1, 4, 8]
  assert json.loads(json.dumps(measured, allow_nan=False)) == measured
  flat, last = evaluate.record(measured), last_record(finished)
  assert flat.pop('eval_tasks') == last.pop('eval_tasks')
  assert flat.items() >= last.items() - {('step', 4)}
  mean = lambda name: measured['groups']['source_arithmetic']['metrics'][name]['mean']
  assert mean('pass@1') == pytest.approx(mean('avg@8')) == pytest.approx(flat['eval/avg@8'])
  assert mean('pass@1') <= mean('pass@4') <= mean('pass@8') and 0 <= mean('maj@8') <= mean('pass@8')


def test_off_the_devices_nothing_is_a_program_of_theirs(monkeypatch, data_dir):
  """Of a TPU the state is looked at and saved by a processor, which has no kernels of TPUs."""
  setup = prepare.prepare(debug_config(data_dir))
  params = policy.init(setup.policy, jax.random.key(0))
  before = update.init(params, jax.random.key(setup.config.seed), setup.update)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  with state.off_devices(setup, before, {}) as (there, base):
    guard.check(setup.trained, there.params, there.opt_state, base, 'the policy', '')
  assert jax.tree.all(jax.tree.map(lambda x, y: (jax.random.key_data(x) == jax.random.key_data(y)).all() if
                                   jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else (x == y).all(),
                                   before, there))

  def without_processors(*_, backend=None):
    raise RuntimeError(f'Unknown backend {backend}')

  monkeypatch.setattr(jax, 'local_devices', without_processors)  # as by JAX_PLATFORMS=tpu
  with state.off_devices(setup, before, {}) as (there, _):
    assert there is before


def test_nothing_to_evaluate_or_export(tmp_path, data_dir):
  setup = prepare.prepare(debug_config(data_dir))
  with pytest.raises(ValueError, match='holds no checkpoint; train first'):
    state.evaluate_checkpoint(setup, str(tmp_path))
  with pytest.raises(ValueError, match='holds no checkpoint; train first'):
    state.export_checkpoint(setup, str(tmp_path), str(tmp_path / 'export'))


@pytest.mark.slow
def test_an_export_needs_no_data_and_no_devices_of_the_run(finished, data_dir, tmp_path):
  """Here the run had one device, and this process has eight."""
  setup = prepare.without_tasks(debug_config('/nowhere'))
  assert state.export_checkpoint(setup, finished, str(tmp_path / 'export'), dtype='bfloat16') == 4
  with checkpoint.Checkpoints(state.checkpoint_directory(setup, finished)) as checkpoints:
    saved, _, _ = state.start(prepare.prepare(debug_config(data_dir)), finished, checkpoints)
  config, params = weights.load(tmp_path / 'export')
  assert config.replace(family='', context=0) == setup.policy
  rounded = jax.tree.map(lambda x: x.astype('bfloat16').astype('float32'), saved.params)
  jax.tree.map(np.testing.assert_array_equal, params, rounded)
  text = '12+34'
  assert tokenizer.Subwords(tmp_path / 'export', chat=False).encode(text) == setup.tokenizer.encode(text)


def test_an_export_of_another_config_than_the_run_had(tmp_path):
  """It would scale the adapters otherwise, or write the config and the tokenizer of another checkpoint."""
  setup = prepare.without_tasks(debug_config('/nowhere', policy__lora_rank=2, warm_start__num_steps=0))
  claim_lib.claim(str(tmp_path), knobs.as_dict(setup.config), may_change=())
  other = setup._replace(config=setup.config.replace(
      num_steps=9, policy=setup.config.policy.replace(lora_alpha=99.0, dtype='bfloat16')))
  with pytest.raises(ValueError, match='trained another policy: policy.lora_alpha was 16.0, is 99.0; set these knobs'):
    state.export_checkpoint(other, str(tmp_path), str(tmp_path / 'export'))


@pytest.mark.slow
@pytest.mark.parametrize('warm', [True, False])
def test_an_export_of_adapters(tmp_path, warm, monkeypatch):
  """They are added to what the run began with: the policy after its warm start, or the one that the seed gives. So are
  they where the run is read."""
  setup = prepare.without_tasks(debug_config('', policy__lora_rank=2, warm_start__num_steps=4 if warm else 0))
  seed = jax.random.fold_in(jax.random.key(setup.config.seed), state.INIT)
  base, stats = policy.init(setup.policy, jax.random.key(7) if warm else seed), estimate.init(1)
  trained = jax.tree.map(lambda x: x + 0.1, policy.split(setup.trained, policy.init(setup.trained, seed))[0])
  warm_start = [(base, setup.sft, 4, ('warm_start',))] if warm else []
  for params, config, step, stage in ((trained, setup.update, 3, ()), *warm_start):
    with checkpoint.Checkpoints(state.checkpoint_directory(setup, str(tmp_path), *stage)) as checkpoints:
      checkpoints.save(step, update.init(params, seed, config)._replace(step=np.int32(step)), stats)
  assert state.export_checkpoint(setup, str(tmp_path), str(tmp_path / 'export')) == 3
  want = policy.merge(setup.trained, trained, base)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), weights.load(tmp_path / 'export')[1], want)
  monkeypatch.setattr(state, 'initial_stats', lambda _: stats)
  with checkpoint.Checkpoints(state.checkpoint_directory(setup, str(tmp_path)), writes=False) as checkpoints:
    *_, read = state.start(setup, str(tmp_path), checkpoints)
  jax.tree.map(np.testing.assert_array_equal, read, base)


def test_random_streams_are_apart():
  assert len({state.INIT, state.ROLLOUTS, state.EVALUATE, state.NOISE}) == 4


@pytest.fixture(scope='module')
def of_eight_tasks(data_dir):
  return prepare.prepare(debug_config(data_dir, evaluate__tasks=8))


def test_success_by_source(of_eight_tasks, monkeypatch):
  setup = of_eight_tasks
  tasks = [task._replace(source='others' if i < 3 else 'arithmetic') for i, task in enumerate(setup.test_tasks)]
  found = evaluate.Outcomes(np.where(np.arange(32).reshape(8, 4) < 12, verdicts.RIGHT, verdicts.WRONG), None)
  monkeypatch.setattr(evaluate, 'outcomes', lambda *_, **__: found)
  groups = state.evaluation(setup._replace(test_tasks=tasks), None, jax.random.key(0), None)['groups']
  assert {name: (x['tasks'], x['metrics']['avg@4']['mean']) for name, x in groups.items()
          if name.startswith('source_')} == {'source_others': (3, 1.0), 'source_arithmetic': (5, 0.0)}


def test_robustness_is_of_the_perturbed_test_tasks(of_eight_tasks, monkeypatch):
  """And progress is of all that is sampled; where none is to be perturbed, nothing is."""
  c = of_eight_tasks.config
  setup = of_eight_tasks._replace(config=c.replace(evaluate=c.evaluate.replace(rollouts=4, perturb=('typos',))))
  with pytest.raises(ValueError, match="evaluate.perturb='typos' changes none of the 8 held-out prompts"):
    state.perturbed_tasks(setup)  # which are sums of digits
  sampled, done, others = [], [], [task._replace(tokens=()) for task in setup.test_tasks[:6]] + setup.test_tasks[6:]

  def outcomes(policy_config, params, tasks, *_, rollouts, progress, **__):
    sampled.append(tasks)
    progress(len(tasks) * rollouts)
    right_IR = np.arange(32).reshape(8, 4) < (8 if tasks is others else 16)
    return evaluate.Outcomes(np.where(right_IR, verdicts.RIGHT, verdicts.WRONG), None)

  monkeypatch.setattr(evaluate, 'outcomes', outcomes)
  args = setup, None, jax.random.key(0), None
  summary = state.evaluation(*args, perturbed={'typos': others}, progress=lambda *x: done.append(x))
  assert sampled == [setup.test_tasks, others] and done == [(0, 64), (32, 64), (64, 64)]
  assert summary['groups']['all']['metrics']['avg@4']['mean'] == 0.5
  found = summary['perturbed']['typos']
  assert (found['changed'], found['metrics']['avg@4']['mean'], found['metrics']['ratio']['mean']) == (0.75, 0.25, 0.5)
  assert 'perturbed' not in state.evaluation(*args)


@pytest.mark.parametrize('changed, weights_ratio, cache_ratio', [
    ({}, 1, 1), ({'policy__dtype': 'bfloat16', 'policy__head_width': 8}, 2, 2),
    ({'sample__cache': 'int8', 'policy__head_width': 8}, 1, 32 / 12)], ids=str)
def test_compression_by_hand(changed, weights_ratio, cache_ratio):
  """But for norms, which stay in float32. Of int8 a head has 8 bytes and a scale of 4, where float32 has 32 bytes."""
  setup = prepare.without_tasks(debug_config('/nowhere', **changed))
  found = state.compression(setup)
  assert found['cache'] == pytest.approx(cache_ratio)
  assert found['weights'] == pytest.approx(weights_ratio, rel=0.02) and found['weights'] <= weights_ratio
  params = jax.eval_shape(lambda: decode.sampling_params(
      setup.policy, policy.init(setup.policy, jax.random.key(0))))
  cache = jax.eval_shape(lambda params: decode.prefill(
      setup.policy, params, np.zeros((1, 3), np.int32), np.ones(1, np.int32), int8=setup.sample.cache == 'int8'),
      params)[1]
  numbers = 2 * setup.policy.num_layers * setup.policy.num_kv_heads * 3 * setup.policy.head_width
  assert found['cache'] == pytest.approx(4 * numbers / sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)))
