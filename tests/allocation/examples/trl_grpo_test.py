"""The example for TRL, on stand-ins of what it uses of TRL 1.16.0: their names, signatures and order of calls."""

import collections
import pathlib
import runpy
import sys
import types

import numpy as np
import pytest

from kr_jax.allocation.allocator import Allocator

EXAMPLE = pathlib.Path(__file__).parents[3] / 'kr_jax' / 'allocation' / 'examples' / 'trl_grpo.py'


class Tensor(np.ndarray):
  """What the example uses of torch.Tensor."""

  def new_tensor(self, data):
    return np.array(data, self.dtype).view(Tensor)


class RepeatSampler:
  """trl.trainer.utils.RepeatSampler."""

  def __init__(self, data_source, mini_repeat_count, batch_size=1, repeat_count=1, shuffle=True, seed=None):
    self.data_source, self.mini_repeat_count, self.batch_size = data_source, mini_repeat_count, batch_size
    self.repeat_count, self.num_samples, self.shuffle = repeat_count, len(data_source), shuffle
    self.generator = np.random.default_rng(seed)

  def __iter__(self):
    indexes = self.generator.permutation(self.num_samples) if self.shuffle else np.arange(self.num_samples)
    for start in range(0, self.num_samples - self.batch_size + 1, self.batch_size):
      for _ in range(self.repeat_count):
        yield from np.repeat(indexes[start:start + self.batch_size], self.mini_repeat_count).tolist()

  def __len__(self):
    return self.num_samples // self.batch_size * self.batch_size * self.mini_repeat_count * self.repeat_count


class GRPOTrainer:
  """trl.GRPOTrainer, of one process, its model a table of success rates by prompt."""

  def __init__(self, model, reward_funcs, args, train_dataset):
    self.model, self.reward_funcs, self.args, self.train_dataset = model, reward_funcs, args, train_dataset
    self.num_generations, self.num_iterations = args.num_generations, args.num_iterations
    self.shuffle_dataset, self.scale_rewards = True, args.scale_rewards
    self.reward_weights = np.ones(len(reward_funcs)).view(Tensor)
    self.accelerator = types.SimpleNamespace(process_index=0)
    self.rng, self.seen = np.random.default_rng(0), []

  def _get_train_sampler(self, dataset=None):
    raise AssertionError('groups of one size')

  def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
    # As vLLM is asked: for each of the first, num_generations-th, ... prompts, num_generations completions.
    prompts = [prompt for prompt in prompt_ids[::num_generations] for _ in range(num_generations)]
    return [(prompt, self.rng.uniform() < self.model.rates[prompt]) for prompt in prompts], None

  def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
    assert [prompt for prompt, _ in completions] == prompts
    return np.array([[func(x) for func in self.reward_funcs] for x in completions], float).view(Tensor)

  def _generate_and_score_completions(self, inputs):
    prompts = [row['prompt'] for row in inputs]
    completions, _ = self._generate_single_turn(prompts, None, {}, self.num_generations)
    rewards = self._calculate_rewards(inputs, prompts, completions, completions)
    equal = rewards.sum(axis=1).reshape(-1, self.num_generations)  # what the example replaces
    return {'advantages': (equal - equal.mean(axis=1, keepdims=True)).ravel().astype(np.float32).view(Tensor)}

  def train(self):
    """One epoch; a batch is read before the one before it is used."""
    sampler, ahead = self._get_train_sampler(self.train_dataset), []
    rows = iter(sampler)
    for step in range(len(sampler) // self.args.generation_batch_size):
      while len(ahead) < 2 and (batch := [row for _, row in zip(range(self.args.generation_batch_size), rows)]):
        ahead.append(batch)
      inputs = [self.train_dataset[row] for row in ahead.pop(0)]
      if step % (self.num_iterations * self.args.steps_per_generation) == 0:
        output = self._generate_and_score_completions(inputs)
      self.seen.append(([row['id'] for row in inputs], output))
    assert not ahead and next(rows, None) is None


@pytest.fixture
def example(monkeypatch):
  for name, members in {'accelerate': {}, 'accelerate.utils': dict(gather_object=lambda x: x),
                        'trl': dict(GRPOTrainer=GRPOTrainer), 'trl.trainer': {},
                        'trl.trainer.utils': dict(RepeatSampler=RepeatSampler)}.items():
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
  return types.SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


def trainer_of(example, num_tasks=12, training=True, rewards=None, **args):
  """Tasks whose success rates run from 0 to 1."""
  rows = [{'id': f'task {i}', 'prompt': f'prompt {i}'} for i in range(num_tasks)]
  rates = {row['prompt']: i / (num_tasks - 1) for i, row in enumerate(rows)}
  args = dict(generation_batch_size=24, num_generations=6, num_iterations=1, steps_per_generation=1, seed=0,
              scale_rewards='group') | args
  return example.RaggedGRPOTrainer(
      types.SimpleNamespace(training=training, rates=rates), rewards or [lambda completion: float(completion[1])],
      types.SimpleNamespace(**args), rows, allocator=Allocator(num_tasks=num_tasks, high=16))


@pytest.mark.slow
def test_groups_have_the_sizes_that_the_allocator_gives(example):
  trainer = trainer_of(example)
  asked, budgets = [], trainer.allocator.budgets
  trainer.allocator.budgets = lambda ids, total: asked.append((ids, budgets(ids, total))) or asked[-1][1]
  for _ in range(8):
    trainer.train()
  assert len(trainer.seen) == len(asked) == 8 * 3
  for (ids, _), (tasks, budget_M) in zip(trainer.seen, asked):
    assert ids == [x for x, n in zip(tasks, budget_M) for _ in range(n)] and len(ids) == 24
  last = collections.Counter(x for ids, _ in trainer.seen[-12:] for x in ids)
  assert last['task 0'] < last['task 4'] > last['task 11']
  assert len(trainer.allocator) == 12


def test_advantages_are_of_the_ragged_groups(example):
  trainer = trainer_of(example, scale_rewards='none')
  for _ in range(3):
    trainer.train()
  sizes = set()
  for ids, output in trainer.seen:
    advantage_R = output['advantages']
    assert advantage_R.shape == (24,) and advantage_R.dtype == np.float32
    for x in set(ids):
      group = advantage_R[np.array(ids) == x]
      sizes.add(len(group))
      assert abs(group.sum()) < 1e-5 and len(set(np.round(group, 5).tolist())) <= 2
      if len(set(np.round(group, 5).tolist())) == 2:  # 1 - mean and -mean
        assert group.max() - group.min() == pytest.approx(1, abs=1e-5)
  assert len(sizes) > 2


def test_what_is_observed_is_what_was_rewarded(example):
  verdicts = []
  trainer = trainer_of(example, rewards=[lambda completion: verdicts.append(completion) or float(completion[1])])
  trainer.allocator = Allocator(num_tasks=12, high=16, pass_discount=1.0)
  for _ in range(2):
    trainer.train()
  state = trainer.allocator.state_dict()
  assert sum(state['stats']['rollouts_I']) == len(verdicts) == 6 * 24
  for x, right, wrong in zip(state['ids'], state['stats']['successes_I'], state['stats']['failures_I']):
    of_task = [verdict for prompt, verdict in verdicts if prompt.removeprefix('prompt ') == x.removeprefix('task ')]
    assert (right, wrong) == (sum(of_task), len(of_task) - sum(of_task))


def test_a_batch_repeats_for_each_iteration_and_step_of_a_generation(example):
  trainer = trainer_of(example, num_iterations=2, steps_per_generation=3)
  trainer.train()
  assert len(trainer.seen) == 3 * 6
  for k in range(0, 18, 6):
    assert all(ids == trainer.seen[k][0] for ids, _ in trainer.seen[k:k + 6])
  assert sum(trainer.allocator.state_dict()['stats']['rollouts_I']) == 3 * 24


def test_what_no_function_rewards_is_not_observed(example):
  """The verdict of every rollout of two tasks is missing; another function's reward is of no weight."""
  trainer = trainer_of(example, rewards=[
      lambda x: float('nan') if x[0] in ('prompt 3', 'prompt 4') else float(x[1]), lambda x: float('nan')])
  trainer.train()
  assert len(trainer.allocator) == 10
  for ids, output in trainer.seen:
    of_none = np.isin(ids, ['task 3', 'task 4'])
    assert np.all(output['advantages'][of_none] == 0) and np.all(np.isfinite(output['advantages']))


def test_advantages_by_hand(example):
  ids, reward_R = ['a', 'b', 'a', 'b', 'c', 'a'], np.array([1, 0, 0, 0, 1, np.nan])
  np.testing.assert_allclose(example.advantages(ids, reward_R, by_std=False), [.5, 0, -.5, 0, 0, 0])
  scaled = 0.5 / (np.sqrt(0.5) + 1e-4)
  np.testing.assert_allclose(example.advantages(ids, reward_R, by_std=True), [scaled, 0, -scaled, 0, 0, 0])


def test_another_process_has_its_part_of_the_advantages(example, monkeypatch):
  """Its own rollouts are the second half of all."""
  trainer = trainer_of(example, scale_rewards='none')
  trainer.accelerator.process_index = 1
  mine = [trainer.train_dataset[row] for row in (0, 0, 5)]
  monkeypatch.setitem(type(trainer)._calculate_rewards.__globals__, 'gather_object',
                      lambda ids: ['task 5', 'task 5', 'task 0', *ids])
  monkeypatch.setattr(GRPOTrainer, '_calculate_rewards', lambda self, *_: np.array([[0], [1], [0], [1], [0], [0.0]]))
  monkeypatch.setattr(GRPOTrainer, '_generate_and_score_completions', lambda self, inputs: (
      self._calculate_rewards(inputs, [], [], []), {'advantages': np.zeros(3, np.float32).view(Tensor)})[1])
  output = trainer._generate_and_score_completions(mine)
  np.testing.assert_allclose(output['advantages'], [2 / 3, -1 / 3, -1 / 3], rtol=1e-6)
  np.testing.assert_array_equal(trainer.allocator.state_dict()['stats']['rollouts_I'], [3, 3])


def test_evaluation_is_as_it_was(example):
  trainer = trainer_of(example, training=False)
  inputs = [trainer.train_dataset[row] for row in np.repeat([2, 3], 6)]
  output = trainer._generate_and_score_completions(inputs)
  assert abs(output['advantages'][:6].sum()) < 1e-5 and len(trainer.allocator) == 0
