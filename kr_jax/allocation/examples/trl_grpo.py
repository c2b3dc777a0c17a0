"""A GRPOTrainer of TRL whose groups have the sizes that an Allocator gives. Written for TRL 1.16.

    trainer = RaggedGRPOTrainer(allocator=Allocator(num_tasks=len(dataset)), model=..., reward_funcs=..., args=config,
                                train_dataset=dataset)  # with a column `id`

A batch has generation_batch_size / num_generations prompts, as in TRL, and generation_batch_size completions, which the
allocator shares out. Data loaders read a batch ahead, so a batch's budgets do not know the verdicts of the one before.
TRL's own frac_reward_zero_std and logged advantages are of equal groups and say nothing here. To go on after a stop,
save allocator.state_dict() beside each checkpoint. JAX_PLATFORMS=cpu keeps jax from taking a GPU's memory.
"""

from accelerate.utils import gather_object
import numpy as np
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler


class RaggedSampler(RepeatSampler):
  """The rows of each batch, each as often as its budget says, side by side; and the batch `repeats` times."""

  def __init__(self, data_source, allocator, total, batch_size, repeats, **options):
    super().__init__(data_source, mini_repeat_count=1, batch_size=batch_size, **options)
    self.allocator, self.total, self.repeats = allocator, total, repeats

  def __iter__(self):
    rows = list(super().__iter__())
    for start in range(0, len(rows), self.batch_size):
      row_M = rows[start:start + self.batch_size]
      budget_M = self.allocator.budgets([self.data_source[row]['id'] for row in row_M], self.total)
      for _ in range(self.repeats):
        yield from np.repeat(row_M, budget_M).tolist()

  def __len__(self):
    return super().__len__() // self.batch_size * self.total * self.repeats


def advantages(ids, reward_R, by_std):
  """reward - mean of the completions of its task, over their std; 0 where the reward is nan."""
  task_R, advantage_R = np.unique(ids, return_inverse=True)[1], np.zeros(len(ids))
  for task in range(task_R.max() + 1):
    at = np.flatnonzero((task_R == task) & ~np.isnan(reward_R))
    if len(at) > 1:
      std = np.std(reward_R[at], ddof=1) + 1e-4 if by_std else 1.0
      advantage_R[at] = (reward_R[at] - np.mean(reward_R[at])) / std
  return advantage_R


class RaggedGRPOTrainer(GRPOTrainer):
  def __init__(self, *args, allocator, right=lambda reward_R: reward_R > 0.5, **options):
    self.allocator, self.right = allocator, right  # right: which completions are, by their rewards
    super().__init__(*args, **options)

  def _get_train_sampler(self, dataset=None):
    total = self.args.generation_batch_size
    return RaggedSampler(self.train_dataset if dataset is None else dataset, self.allocator, total,
                         total // self.num_generations, self.num_iterations * self.args.steps_per_generation,
                         shuffle=self.shuffle_dataset, seed=self.args.seed)

  def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **options):
    each = 1 if self.model.training else num_generations  # a prompt stands there once for each completion
    return super()._generate_single_turn(prompt_ids, images, multimodal_fields, each, **options)

  def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
    rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # of all processes
    if self.model.training:
      reward_RF, ids = np.array(rewards.tolist()), gather_object([row['id'] for row in inputs])
      scored_R = ~np.isnan(reward_RF).all(axis=1)
      reward_R = np.where(scored_R, np.nansum(reward_RF * self.reward_weights.tolist(), axis=1), np.nan)
      self.advantage_R = advantages(ids, reward_R, by_std=self.scale_rewards == 'group')
      right_R = scored_R & self.right(reward_R)
      self.allocator.observe(ids, right_R, scored_R & ~right_R)
    return rewards

  def _generate_and_score_completions(self, inputs):
    output = super()._generate_and_score_completions(inputs)
    if self.model.training:
      first = self.accelerator.process_index * len(inputs)
      output['advantages'] = output['advantages'].new_tensor(self.advantage_R[first:first + len(inputs)].tolist())
    return output
