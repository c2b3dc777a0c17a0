"""A trainer of verl whose prompts get the rollouts that an Allocator gives. Written for verl 0.9.1, V1, `sync`.

verl's agent loop reads how often a prompt is sampled from its field __rollout_n__, and verl groups advantages by uid:
all there is to do is to fill in the field and to pass on the verdicts. A step has train_batch_size * rollout.n
rollouts.
Name a module of your own in VERL_USE_EXTERNAL_MODULES, which verl imports in each process:

    from kr_jax.allocation import Allocator
    from kr_jax.allocation.examples import verl_ppo
    verl_ppo.use(Allocator(num_tasks=7473))  # the rows of the training set; each needs its own extra_info.index

A group of one has its reward as advantage in verl: keep Allocator.low at 2 or more. To go on after a stop, save
allocator.state_dict() in _save_checkpoint. JAX_PLATFORMS=cpu keeps jax from taking a GPU's memory.
"""

import transfer_queue as tq
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.utils import tensordict_utils as tu


def use(allocator, right=lambda reward: reward > 0.5):
  """Puts the trainer in the place of trainer.v1.trainer_mode=sync. right: whether a rollout of this reward is."""
  RaggedPPOTrainer.allocator, RaggedPPOTrainer.right = allocator, staticmethod(right)
  TRAINER_REGISTRY['sync'] = RaggedPPOTrainer


class RaggedPPOTrainer(PPOTrainerSync):
  def __init__(self, config):
    super().__init__(config)
    self.id_of = {}  # uid, which verl makes anew each time that a prompt comes -> id of the task

  def _next_train_batch(self, num_prompts=None):
    batch = super()._next_train_batch(num_prompts)
    ids = [f'{source}/{index}' for source, index in zip(batch['data_source'], batch['index'])]
    budget_M = self.allocator.budgets(ids, len(ids) * self.config.actor_rollout_ref.rollout.n)
    tu.assign_non_tensor_stack(batch, '__rollout_n__', budget_M.tolist())
    self.id_of.update(zip(batch['uid'], ids))
    return batch

  def _compute_advantage(self, batch, metrics):
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=['rm_scores'])
    reward_of = {}  # a rollout may have several outputs, which share its reward; padding has uids of its own
    for key, score in zip(batch.keys, data['rm_scores'].unbind()):
      uid, rollout, _ = key.rsplit('_', 2)
      if uid in self.id_of:
        reward_of[uid, rollout] = float(score.sum())
    right_R = [self.right(reward) for reward in reward_of.values()]
    self.allocator.observe([self.id_of[uid] for uid, _ in reward_of], right_R, [not x for x in right_R])
    for uid in {uid for uid, _ in reward_of}:
      del self.id_of[uid]
    return super()._compute_advantage(batch, metrics)
