"""What of a config may change when a run goes on: knobs that change no result, and knobs of which a change is recorded.

Any other knob is the run's: a config with another value of it is another run. README.md has the same table. A section
stands for all of its knobs.
"""

from __future__ import annotations

from collections.abc import Mapping

# Nothing that a run computes changes but for rounding: how long, how often, how fast, where. Knob -> why.
FREE: Mapping[str, str] = {
    'topologies': 'read by the preflight alone',
    'tasks.data_dir': 'where data are; the tasks in them are compared by their content',
    'tasks.files': 'where data are; the tasks in them are compared by their content',
    'policy.remat': 'what is computed again gives the same gradient',
    'mesh': "rollouts hang on their own keys, and an update's gradient is a sum over all devices",
    'warm_start.checkpoint_every': 'how often the warm start is saved',
    'sample.slots': "a rollout's tokens hang on its own key, not on its slot or on what is decoded beside it",
    'sample.refill': "a rollout's tokens hang on its own key, not on when it starts",
    'sample.prefill': 'a prompt is read alike, whatever is read beside it',
    'alloc.solver': 'both find the best budgets, and choose alike among equal ones',
    'rewards.workers': 'how many verdicts are made at once',
    'rewards.timeout_s': 'a verdict that does not come in time is none, and nothing is learnt from its rollout',
    'rewards.memory_mb': 'a verdict that memory does not suffice for is none, and nothing is learnt from its rollout',
    'rewards.max_faulty_steps': 'when a run without verdicts ends',
    'rewards.network': 'what verifiers may reach',
    'rewards.readable': 'what verifiers may read',
    'pack': "the whole batch fixes a token's weight, so that its gradient hangs on no packing",
    'evaluate.every': 'how often there is an evaluation',
    'evaluate.pass_at': 'figures of the same rollouts',
    'evaluate.maj_at': 'figures of the same rollouts',
    'evaluate.perturb': 'figures of prompts that are evaluated besides',
    'evaluate.tasks_per_batch': "a rollout's tokens hang on its own key, not on its batch",
    'checkpoint.every': 'how often the run is saved',
    'checkpoint.minutes': 'how often the run is saved',
    'checkpoint.keep': 'how many checkpoints stay',
    'checkpoint.best': 'how many checkpoints stay',
    'train': 'when a run whose updates are skipped ends',
    'record': 'what is kept to be read',
}
# A change takes effect from the step on at which the run goes on. Knob -> what it means for the run.
WARNED: Mapping[str, str] = {
    'num_steps': 'the run is longer or shorter; a schedule ends where optimizer.decay_steps says all the same',
    'optimizer.learning_rate': 'later updates are larger or smaller; the moments of Adam stay',
    'optimizer.schedule': 'later updates follow another schedule, counted from the first update of the run',
    'optimizer.warmup_steps': 'later updates follow another schedule, counted from the first update of the run',
    'optimizer.decay_steps': 'later updates follow another schedule, counted from the first update of the run',
    'optimizer.final_rate': 'later updates follow another schedule, counted from the first update of the run',
    'optimizer.b1': 'the moments of Adam stay, and later gradients weigh otherwise in them',
    'optimizer.b2': 'the moments of Adam stay, and later gradients weigh otherwise in them',
    'optimizer.eps': 'later updates are computed otherwise',
    'optimizer.weight_decay': 'later updates are computed otherwise',
    'optimizer.max_grad_norm': 'later updates are computed otherwise',
    'grpo.clip_low': 'later updates have another loss',
    'grpo.clip_high': 'later updates have another loss',
    'grpo.dual_clip': 'later updates have another loss',
    'grpo.kl_coef': 'later updates have another loss; the divergence is from the policy that the run began with',
    'grpo.entropy_coef': 'later updates have another loss',
    'grpo.tis_cap': 'later updates have another loss',
}
# In config.json beside the knobs: what they stand for, which a run goes on with or says that it changed.
FACTS = ('code', 'hub', 'source_version', 'task_digests')
# Knobs that an evaluation or export of a run reads nothing of.
OF_TRAINING = ('num_steps', 'topologies', 'tasks.per_step', 'tasks.candidates_per_step', 'tasks.prior',
               'tasks.prior_rollouts', 'tasks.warm_start_split', 'alloc', 'warm_start.per_step',
               'warm_start.learning_rate', 'warm_start.warmup_steps', 'grpo', 'optimizer', 'train', 'checkpoint.every',
               'checkpoint.minutes', 'checkpoint.keep', 'checkpoint.best', 'record')
# Knobs that an evaluation of a run may have otherwise, besides those of FREE.
OF_EVALUATION = ('evaluate', 'checkpoint.directory')
