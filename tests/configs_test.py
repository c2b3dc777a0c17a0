"""Every shipped config loads, is locked, passes its checks, and says how to run it."""

import dataclasses
import importlib
import pathlib

import jax
import pytest

from configs import arithmetic
from configs import common
from configs import presets
from configs import qwen25_math_7b
from kr_jax import knobs
from kr_jax import prepare
from kr_jax import state
from kr_jax import tasks
from kr_jax import train
from kr_jax.datasets import ciphers
from kr_jax.model import weights
from kr_jax.preflight import whole_run
from kr_jax.record import metrics

NAMES = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / 'configs').glob('*.py')
               if p.stem not in ('common', 'presets', 'hardware') and not p.stem.startswith('proof_'))

# What stands in a checkpoint's place: a tiny one of its family.
CHECKPOINTS = {'smollm2_arithmetic': 'llama', 'r1_distill_1p5b': 'qwen2', 'qwen3_4b': 'qwen3',
               'qwen25_math_7b': 'qwen2', 'gsm8k_qwen3_1p7b': 'qwen3',
               'mbpp_qwen25_coder_1p5b': 'qwen2', 'qwen3_30b_a3b': 'qwen3'}
DATA = pathlib.Path(__file__).parent / 'data'


def config_of(name, variant, data_dir, **files):
  """With what is on this machine: a tiny checkpoint, and the published files that tests have."""
  config = importlib.import_module(f'configs.{name}').get_config(variant)
  config.tasks.data_dir, config.mesh.devices = data_dir, 1
  config.mesh.expert, config.mesh.sample_model = 1, 0
  config.policy.vocab_size = 0  # the tiny one has other sizes
  config.policy.checkpoint = str(DATA / 'checkpoints' / CHECKPOINTS[name]) if name in CHECKPOINTS else ''
  for dataset, pattern in config.tasks.files.items():
    if pattern or dataset in (config.tasks.dataset, *config.tasks.test):
      config.tasks.files[dataset] = str(DATA / 'datasets' / dataset / '*')
  return config


@pytest.mark.parametrize('variant', ['', 'debug'])
@pytest.mark.parametrize('name', NAMES)
def test_a_config_is_locked_and_passes_its_checks(name, variant, data_dir, monkeypatch):
  """Of published files, of which tests have a few rows, with as many tasks as a step takes."""
  config = config_of(name, variant, data_dir)
  assert config.is_locked
  with pytest.raises(AttributeError, match='Did you mean "rule"'):
    config.alloc.rul = 'uniform'
  read = tasks.read

  def filled(dataset, split, *args, **options):
    found = read(dataset, split, *args, **options)
    more = range(len(found), config.tasks.per_step)
    return found + [found[0]._replace(id=f'{found[0].id}/{i}', index=i) for i in more]

  monkeypatch.setattr(tasks, 'read', filled)
  # The tiny checkpoints have words of one letter.
  config.sample.prompt_length = max(config.sample.prompt_length, 4096 if config.policy.checkpoint else 0)
  config.pack.row_length = max(
      config.pack.row_length, config.sample.prompt_length + config.sample.completion_length)
  setup = prepare.prepare(config)
  assert len(setup.train_tasks) >= config.tasks.per_step and setup.test_tasks
  assert {task.source for task in setup.test_tasks} == set(config.tasks.test or [config.tasks.dataset])


@pytest.mark.parametrize('name', [name for name in NAMES if name in CHECKPOINTS])
def test_a_config_declares_its_checkpoint(name, data_dir):
  """So that a preflight needs none, and another one is refused."""
  config = importlib.import_module(f'configs.{name}').get_config()
  if config.topologies:
    assert config.policy.vocab_size
    here = config_of(name, '', data_dir)
    config.policy.checkpoint, config.tasks.files = here.policy.checkpoint, here.tasks.files
    with pytest.raises(ValueError, match='has not the declared sizes: policy.vocab_size=15.* where there is '
                       r'\d+, policy.num_layers=.*set policy.vocab_size=0'):
      prepare.prepare(config)


@pytest.mark.exhaustive
def test_steps_from_a_checkpoint(data_dir, tmp_path, monkeypatch):
  """The paper's run on shrunken shapes: two steps, which are the same gone on with from the first; and what
  is exported."""
  read = tasks.read
  monkeypatch.setattr(tasks, 'read', lambda *args, **options: [
      task._replace(tokens=task.tokens[-40:], verifier='') for task in read(*args, **options)])

  def run(workdir, steps):
    config = config_of('qwen25_math_7b', 'debug', data_dir)
    config.num_steps, config.evaluate.tasks, config.evaluate.rollouts = steps, 2, 2
    config.evaluate.every = config.checkpoint.every = 1
    config.tasks.per_step, config.alloc.rollouts_per_step, config.optimizer.minibatches = 2, 8, 1
    config.sample.prompt_length, config.sample.completion_length, config.pack.row_length = 40, 8, 64
    config.rewards.verifier, config.rewards.pattern = 'tests.graders:even', ''
    setup = prepare.prepare(config)
    train.train(setup, str(workdir))
    return setup, [r for r in metrics.read(str(workdir / 'metrics.jsonl')) if 'loss' in r]

  _, whole = run(tmp_path / 'whole', 2)
  run(tmp_path / 'parts', 1)
  setup, parts = run(tmp_path / 'parts', 2)
  for row, other in zip(whole, parts, strict=True):
    assert all(row[key] == other[key] for key in ('loss', 'grad_norm', 'reward_mean', 'policy_entropy'))
  assert state.export_checkpoint(setup, str(tmp_path / 'parts'), str(tmp_path / 'export'), dtype='float32') == 2
  config, params = weights.load(tmp_path / 'export')
  _, first = weights.load(setup.config.policy.checkpoint)
  assert dataclasses.replace(config, dtype=setup.policy.dtype, remat=setup.policy.remat) == setup.policy
  moved = jax.tree.map(lambda x, y: float(abs(x - y).max()), params, first)
  assert 0 < max(jax.tree.leaves(moved)) < 1e-3


@pytest.mark.parametrize('name', NAMES)
def test_a_config_says_how_to_run_it(name):
  text = importlib.import_module(f'configs.{name}').__doc__
  for part in (f'configs/{name}.py', 'Hardware:', 'Time:', 'Expect:'):
    assert part in text
  config = importlib.import_module(f'configs.{name}').get_config()
  hardware = text.partition('Hardware:')[2].partition('Time:')[0]
  assert all(topology in hardware for topology in config.topologies)
  assert bool(config.topologies) == ('CPU' not in hardware)


@pytest.mark.parametrize('name', NAMES)
def test_evaluations_take_a_fifth_of_the_rollouts_at_the_most(name):
  """Under every preset; and the sizes of all test sets are known."""
  for variant in ('', *presets.PRESETS):
    config = knobs.read(importlib.import_module(f'configs.{name}').get_config(variant))
    assert not whole_run.held_out(config).assumed
    assert 0.05 < whole_run.evaluation_share(config) < 0.2


def test_sizes_of_test_sets_are_those_that_are_generated():
  for name in ('arithmetic', 'sums'):
    assert whole_run.SIZES[name]['test'] == len(importlib.import_module(f'kr_jax.datasets.{name}').splits()['test'])
  assert all(whole_run.SIZES[name] == {'test': ciphers.SPLITS['test']} for name in ('ciphers_late', 'ciphers_hard'))


def test_an_unknown_variant():
  with pytest.raises(ValueError, match=r"config variant 'papr' is not one of \['debug', 'paper', .*mean 'paper'\?"):
    common.finish(common.base(), 'debug,papr')


@pytest.mark.parametrize('name', presets.PRESETS)
def test_a_preset_sets_knobs_that_hold(name):
  config = common.base()
  config.grpo.update(dual_clip=9.0, tis_cap=9.0, entropy_coef=9.0, kl_coef=9.0, keep=0.9)
  if name == 'paper_rule':
    config.grpo = common.base().grpo
  presets.PRESETS[name](config)
  found = knobs.read(config)
  if name != 'paper_rule':  # a preset of the loss leaves nothing to what stood there before
    assert 9 not in (found.grpo.dual_clip, found.grpo.tis_cap, found.grpo.entropy_coef, found.grpo.kl_coef)
    assert found.grpo.keep == 1


def test_presets_are_what_their_papers_say():
  of = lambda name: knobs.read(arithmetic.get_config(name)).grpo
  for name in ('grpo', 'dr_grpo', 'rloo'):
    assert (of(name).clip_low, of(name).clip_high) == (0.2, 0.2)
  assert (of('grpo').kl, of('grpo').kl_coef, of('grpo').aggregate) == ('k3', 0.04, 'rollout')
  assert (of('dr_grpo').advantage, of('dr_grpo').aggregate) == ('mean', 'constant')
  assert (of('dapo').clip_high, of('dapo').aggregate) == (0.28, 'token')
  dynamic = knobs.read(arithmetic.get_config('dynamic'))
  assert (dynamic.alloc.rule, dynamic.tasks.per_step, dynamic.tasks.candidates_per_step) == ('dynamic', 64, 192)
  assert dynamic.grpo == of('dapo') and knobs.read(arithmetic.get_config('dapo')).alloc.rule == 'knapsack'
  assert (of('gspo').loss, of('gspo').clip_low, of('gspo').clip_high) == ('gspo', 3e-4, 4e-4)
  assert of('gspo').tis_cap == 2.0  # not the paper's: its limits are below the rounding between sampler and trainer
  assert (of('cispo').loss, of('cispo').clip_low) == ('cispo', 1.0)
  assert (of('rloo').advantage, of('rloo').aggregate) == ('loo', 'constant')
  paper = knobs.read(arithmetic.get_config('paper'))
  assert (paper.grpo.dual_clip, paper.grpo.tis_cap, paper.grpo.clip_high) == (10.0, 2.0, 0.28)
  assert (paper.alloc.estimate, paper.alloc.low, paper.alloc.high) == ('window', 2, 128)


def test_flags_have_the_last_word_over_a_preset():
  config = qwen25_math_7b.get_config()
  assert (config.alloc.estimate, config.grpo.tis_cap) == ('window', 2.0)
  config.update_from_flattened_dict({'alloc.rule': 'uniform', 'grpo.clip_high': 0.9})  # as flags do
  found = prepare.abstract(config, devices=[None] * 16)
  assert found.config.alloc.rule == 'uniform' and found.update.grpo.clip_high == 0.9
  assert knobs.as_dict(found.config)['grpo']['clip_high'] == 0.9  # what config.json holds
