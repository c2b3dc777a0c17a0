"""The example for verl, on stand-ins of what it uses of verl 0.9.1: their names, signatures and order of calls."""

import collections
import pathlib
import runpy
import sys
import types
import uuid

import numpy as np
import pytest

from kr_jax.allocation.allocator import Allocator

EXAMPLE = pathlib.Path(__file__).parents[3] / 'kr_jax' / 'allocation' / 'examples' / 'verl_ppo.py'
QUEUE = {}  # key of a rollout's output -> its fields, as the transfer queue of verl holds them


class Batch(dict):
  """What the example uses of a TensorDict."""

  def __len__(self):
    return len(self['uid'])


class Nested(list):
  """A ragged tensor: the reward of each token of each rollout."""

  def unbind(self):
    return list(self)


def kv_batch_get(keys, partition_id, select_fields):
  assert partition_id == 'train'
  return {field: Nested(QUEUE[key][field] for key in keys) for field in select_fields}


def assign_non_tensor_stack(tensor_dict, key, val):
  assert isinstance(val, list) and all(type(x) is int for x in val) and len(val) == len(tensor_dict)
  tensor_dict[key] = val


class PPOTrainerSync:
  """verl.trainer.ppo.v1.PPOTrainerSync, its agent loop a table of success rates by row."""

  def __init__(self, config):
    self.config, self.rng, self.advantages = config, np.random.default_rng(0), []

  def _next_train_batch(self, num_prompts=None):
    index = self.rng.permutation(self.config.num_rows)[:num_prompts or self.config.data.train_batch_size]
    return Batch(uid=[str(uuid.uuid4()) for _ in index], index=index.tolist(), data_source=['sums'] * len(index))

  def _run_prompt(self, uid, index, __rollout_n__=None):
    n = self.config.actor_rollout_ref.rollout.n if __rollout_n__ is None else __rollout_n__
    for session in range(n):
      reward = float(self.rng.uniform() < index / (self.config.num_rows - 1))
      for output in range(1 + session % 2):  # every other rollout has two outputs, each with its reward
        QUEUE[f'{uid}_{session}_{output}'] = {'rm_scores': np.array([0.0] * output + [reward])}

  def step(self):
    prompts = self._next_train_batch()
    for m in range(len(prompts)):
      self._run_prompt(**{key: prompts[key][m] for key in ('uid', 'index', '__rollout_n__') if key in prompts})
    QUEUE.update({f'pad{k}_0_0': {'rm_scores': np.zeros(1)} for k in range(3)})
    keys = self.rng.permutation(sorted(QUEUE)).tolist()
    batch = self._compute_advantage(types.SimpleNamespace(keys=keys, partition_id='train'), {})
    QUEUE.clear()
    return prompts, batch

  def _compute_advantage(self, batch, metrics):
    # As compute_grpo_outcome_advantage: groups of one uid, of any size.
    score = {key: QUEUE[key]['rm_scores'].sum() for key in batch.keys}
    groups = collections.defaultdict(list)
    for key in batch.keys:
      groups[key.split('_')[0]].append(score[key])
    self.advantages.append({key: score[key] - np.mean(groups[key.split('_')[0]]) for key in batch.keys})
    return batch


@pytest.fixture
def example(monkeypatch):
  QUEUE.clear()
  registry = {'sync': PPOTrainerSync}
  for name, members in {
      'transfer_queue': dict(kv_batch_get=kv_batch_get), 'verl': {}, 'verl.trainer': {}, 'verl.trainer.ppo': {},
      'verl.trainer.ppo.v1': dict(PPOTrainerSync=PPOTrainerSync),
      'verl.trainer.ppo.v1.trainer_base': dict(TRAINER_REGISTRY=registry), 'verl.utils': {},
      'verl.utils.tensordict_utils': dict(assign_non_tensor_stack=assign_non_tensor_stack)}.items():
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
  sys.modules['verl.utils'].tensordict_utils = sys.modules['verl.utils.tensordict_utils']
  return types.SimpleNamespace(registry=registry, **runpy.run_path(str(EXAMPLE)))


def config(num_rows=12, train_batch_size=4, n=6):
  return types.SimpleNamespace(
      num_rows=num_rows, data=types.SimpleNamespace(train_batch_size=train_batch_size),
      actor_rollout_ref=types.SimpleNamespace(rollout=types.SimpleNamespace(n=n)))


@pytest.mark.slow
def test_prompts_get_the_rollouts_that_the_allocator_gives(example):
  example.use(Allocator(num_tasks=12, high=16))
  trainer = example.registry['sync'](config())
  sampled = collections.Counter()
  for _ in range(24):
    prompts, batch = trainer.step()
    budget_of = dict(zip(prompts['uid'], prompts['__rollout_n__']))
    rollouts = collections.Counter(key.split('_')[0] for key in batch.keys if key.endswith('_0') and key[:3] != 'pad')
    assert rollouts == budget_of and sum(budget_of.values()) == 24
    sampled.update(dict(zip(prompts['index'], prompts['__rollout_n__'])))
  allocator = trainer.allocator
  ids = [f'sums/{i}' for i in range(12)]
  assert len(allocator) == 12 and not trainer.id_of
  rollouts = dict(zip(allocator.state_dict()['ids'], allocator.state_dict()['stats']['rollouts_I']))
  assert rollouts == {x: sampled[i] for i, x in enumerate(ids)}  # each once, padding not
  seen = allocator.posterior(ids)
  assert np.corrcoef(seen.a_M / (seen.a_M + seen.b_M), np.arange(12))[0, 1] > 0.9
  budget_M = allocator.budgets(ids, 72)
  assert budget_M[4] > budget_M[0] and budget_M[4] > budget_M[11]


def test_verdicts_are_of_the_reward_that_the_user_says(example):
  allocator = Allocator(num_tasks=12)
  example.use(allocator, right=lambda reward: reward < 0.5)
  trainer = example.registry['sync'](config())
  for _ in range(9):
    trainer.step()
  seen = allocator.posterior(['sums/0', 'sums/11'])
  rate = seen.a_M / (seen.a_M + seen.b_M)
  assert rate[0] > 0.8 and rate[1] < 0.2


def test_prompts_that_come_in_place_of_failed_ones_are_known(example):
  """verl asks for a few more prompts within a step."""
  example.use(Allocator(num_tasks=12))
  trainer = example.registry['sync'](config())
  prompts = [trainer._next_train_batch(), trainer._next_train_batch(1)]
  assert prompts[1]['__rollout_n__'] == [6]
  assert len(trainer.id_of) == 5


def test_rows_without_an_index_are_found_out(example):
  example.use(Allocator(num_tasks=12))
  trainer = example.registry['sync'](config())
  trainer.rng = types.SimpleNamespace(permutation=lambda n: np.zeros(n, int))
  with pytest.raises(ValueError, match="the task 'sums/0' stands 4 times in ids"):
    trainer._next_train_batch()
