"""Every knob of a run, declared once: its default, its meaning with the unit, and its bounds.

A section of a config is a frozen dataclass here (sections.py). configs/common.py makes a config of the defaults;
`read` turns a config with its overrides into `Config`. The default of a new knob is what was done before there was the
knob: runs of older versions go on, and are compared, by it.

Imports nothing heavy: configs load this module before anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any

from kr_jax import checks
from kr_jax import sections
from kr_jax.checks import shown
from kr_jax.data_knobs import Columns, Files, ReasoningGym
from kr_jax.sections import ANY, SEED, Section, as_dict, knob, nearest, section  # others find all of a config here

_SIZE = 2 ** 24  # of a dimension of a policy, at the most
_RATE = 1e3  # of Adam, whose updates have about the size of the rate


@section
class Tasks(Section):
  SECTION = 'tasks'
  dataset: str = knob('arithmetic', "what to train on: a name of kr_jax/datasets, 'reasoning_gym/TASK', 'file:PATH' of "
                      "problems and answers (.csv, .jsonl, .json, .parquet), or your own builder's 'PATH.py'")
  mixture: tuple = knob((), "datasets to train on instead, with weights: (('gsm8k', 2.0), ('champ:test[:200]', 1.0))")
  test: tuple = knob((), "datasets to evaluate on instead: ('math_500', 'champ:test[200:]')", of=str)
  template: str = knob('{problem}', 'the prompt of a problem; other braces are doubled')
  chat: bool = knob(True, "whether a prompt is a user's message in the checkpoint's chat template")
  system: str = knob('', "system message of that chat; '': what the template has without one")
  thinking: bool | None = knob(None, "enable_thinking of templates that know it (Qwen3); None: the template's own "
                               'default')
  data_dir: str = knob('', "where TFDS keeps the data, gs://BUCKET/PATH too; '': its own place", path='written')
  train_split: str = knob('train', "TFDS split; sub-splits are allowed: 'train[:100]'")
  test_split: str = knob('test', 'TFDS split')
  warm_start_split: str = knob('warm_start', 'TFDS split')
  per_step: int = knob(32, 'M, tasks of a step', low=1)
  candidates_per_step: int = knob(
      0, 'tasks that a step considers, of which per_step at the most get rollouts; 0: per_step, which all get some',
      low=0)
  prior: str = knob('', "success rates known before training: 'FILE.json' of id -> rate, or 'FILE.jsonl:COLUMN' (.csv, "
                    ".parquet) beside a column id; '': none", path='read')
  prior_rollouts: float = knob(4.0, 'rollouts of a task that its rate in tasks.prior is worth', above=0, high=1e6)
  files: Files = Files()
  columns: Columns = Columns()
  reasoning_gym: ReasoningGym = ReasoningGym()

  def conflicts(self):
    if problem := checks.template_problem(self.template):
      yield f'tasks.template={shown(self.template)} {problem}'
    for name in ('train_split', 'test_split', 'warm_start_split'):
      if problem := checks.split_problem(getattr(self, name)):
        yield f'tasks.{name}={shown(getattr(self, name))} {problem}'
    for pair in self.mixture:
      if problem := checks.pair_problem(pair):
        yield f'tasks.mixture holds {shown(pair)}, {problem}'
    if 0 < self.candidates_per_step < self.per_step:
      yield (f'tasks.candidates_per_step={self.candidates_per_step} is below tasks.per_step={self.per_step}; set it to '
             '0, or to at least that')


@section
class Alloc(Section):
  SECTION = 'alloc'
  rule: str = knob('knapsack', "who gets how many rollouts; 'dynamic': all the same, and tasks.per_step candidates "
                   'are sampled at a time until so many groups are mixed; updates learn from these',
                   choices=('knapsack', 'uniform', 'dynamic'))
  rollouts_per_step: int = knob(256, 'R; where the cost is tokens, R at the most', low=1)
  low: int = knob(2, 'least rollouts of a task, each of which must be observed; 0: a task may get none', low=0)
  high: int = knob(128, 'most rollouts of a task', low=1, high=65_536)
  estimate: str = knob('posterior', "of success rates; 'window' is the paper's", choices=('posterior', 'window'))
  pass_discount: float = knob(
      0.75, 'share of the evidence on success rates that a pass over the split leaves', above=0, high=1)
  recalibrate: bool = knob(True, 'whether posteriors are fitted to the verdicts of the last steps')
  value: str = knob('infogain', "of a task's rollouts (kr_jax/allocation/value.py)",
                    choices=('infogain', 'variance', 'snr', 'mixed', 'hit', 'coba'))
  waves: int = knob(1, "parts of a step's rollouts, each with budgets by the verdicts of those before",
                    choices=(1, 2, 3))
  nu: float = knob(2.0, "noise-to-signal ratio of a rollout's gradient, of 'snr', until it is measured", above=0,
                   high=1e15)
  nu_every: int = knob(0, 'steps from one measurement of nu, of 1.6 updates, to the next; 0: none', low=0, high=ANY)
  solver: str = knob('dp', "of the knapsack; 'greedy' is for tens of thousands of tasks", choices=('dp', 'greedy'))
  cost: str = knob('rollouts', 'what a step has a fixed number of', choices=('rollouts', 'tokens'))
  tokens_per_step: int = knob(0, 'expected completion tokens of a step, where the cost is tokens', low=0)

  def conflicts(self):
    if self.high < self.low:
      yield f'alloc.high={self.high} is below alloc.low={self.low}'
    if self.nu_every and self.value != 'snr':
      yield (f"alloc.nu_every={self.nu_every} measures what alloc.value={self.value!r} does not read; set "
             "alloc.value='snr', or alloc.nu_every=0")
    if self.waves > 1 and self.estimate == 'window':
      yield (f"alloc.waves={self.waves} needs posteriors, which the verdicts of a wave change; set "
             "alloc.estimate='posterior', or alloc.waves=1")
    for name, only in (('waves', 1), ('cost', 'rollouts')):
      if self.rule == 'dynamic' and getattr(self, name) != only:
        yield (f"alloc.{name}={getattr(self, name)!r} does not go with alloc.rule='dynamic', whose generation batches "
               f'are of alloc.rollouts_per_step rollouts each; set alloc.{name}={only!r}')
    if self.waves > self.rollouts_per_step:
      yield f'alloc.waves={self.waves} is more than alloc.rollouts_per_step={self.rollouts_per_step}'


@section
class Sizes(Section):
  """Sizes of a policy, and how it computes."""

  SECTION = 'policy'
  vocab_size: int = knob(
      0, "V; 0: the tokenizer's or the checkpoint's; else all sizes below, to tie_embeddings, are declared: a "
      'preflight needs no checkpoint, and a checkpoint of other sizes is refused', low=0, high=_SIZE)
  num_layers: int = knob(4, 'L', low=1, high=10_000)
  width: int = knob(128, 'D', low=1, high=_SIZE)
  num_heads: int = knob(4, 'N, a multiple of num_kv_heads', low=1, high=_SIZE)
  num_kv_heads: int = knob(2, 'K', low=1, high=_SIZE)
  head_width: int = knob(32, 'H, even', low=1, high=_SIZE)
  hidden_width: int = knob(512, 'F, of each expert where there are experts', low=1, high=_SIZE)
  num_experts: int = knob(0, 'E; 0: the MLP is one, of all tokens', low=0, high=_SIZE)
  experts_per_token: int = knob(8, 'that a token is sent to, where there are experts', low=1)
  rope_theta: float = knob(10_000.0, 'base of the rotary frequencies', above=1, high=1e12)
  norm_eps: float = knob(1e-6, 'added to mean squares by the norms', above=0, high=1)
  qk_norm: bool = knob(True, 'norms of queries and keys')
  qkv_bias: bool = knob(False, 'biases of queries, keys and values')
  tie_embeddings: bool = knob(True, 'whether the output matrix is the embedding')
  dtype: str = knob('float32', 'of the computation', choices=('float32', 'bfloat16'))
  remat: str = knob('none', 'what training computes again to save memory',
                    choices=('none', 'dots', 'attention', 'full'))
  lora_rank: int = knob(0, 'of adapters, which alone are trained then; 0: all is trained', low=0, high=_SIZE)
  lora_alpha: float = knob(16.0, 'adapters are scaled by lora_alpha / lora_rank', above=0, high=1e6)

  def conflicts(self):
    if self.num_heads % self.num_kv_heads:
      yield f'policy.num_heads={self.num_heads} is not a multiple of policy.num_kv_heads={self.num_kv_heads}'
    if self.head_width % 2:
      yield f'policy.head_width={self.head_width} is odd; rotary positions need pairs'
    if 0 < self.num_experts < self.experts_per_token:
      yield f'policy.experts_per_token={self.experts_per_token} is more than policy.num_experts={self.num_experts}'


@section
class Policy(Sizes):
  checkpoint: str = knob('', 'what training starts from: a directory with config.json and safetensors, a .gguf file, '
                         "'hf:ORG/NAME@REVISION', gs://BUCKET/PATH, or 'smollm2-135m-instruct'; '': from scratch",
                         path='read')
  yarn: float = knob(0.0, "factor by which yarn stretches the checkpoint's context, for sequences beyond it; 0: it is "
                     'read as it was published', low=0, high=1e4)

  def conflicts(self):
    yield from super().conflicts()
    if 0 < self.yarn <= 1:
      yield f'policy.yarn={self.yarn:g} stretches nothing; set it above 1, or to 0 for none'
    if self.yarn and not self.checkpoint:
      yield f'policy.yarn={self.yarn:g} stretches the context of policy.checkpoint, and there is none; set it to 0'


@section
class Mesh(Section):
  SECTION = 'mesh'
  devices: int = knob(0, 'devices to use; 0: all, of all hosts', low=0)
  data: int = knob(1, 'copies of the parameters that learn', low=1)
  fsdp: int = knob(0, 'devices among which a copy is divided by width; 0: what the other axes leave', low=0)
  expert: int = knob(1, 'devices among which it is divided by experts, and all but experts by width', low=1)
  model: int = knob(1, 'devices among which it is divided by heads, hidden units or experts, and vocabulary', low=1)
  sample_model: int = knob(0, 'devices that share a copy when sampling; 0: mesh.model', low=0)


@section
class WarmStart(Section):
  SECTION = 'warm_start'
  num_steps: int = knob(0, 'updates of supervised fine-tuning before reinforcement learning', low=0)
  per_step: int = knob(64, 'solutions of an update', low=1)
  learning_rate: float = knob(1e-3, 'of Adam', low=0, high=_RATE)
  warmup_steps: int = knob(20, 'updates over which the rate rises', low=0)
  checkpoint_every: int = knob(100, 'updates', low=1, high=ANY)

  def conflicts(self):
    if 0 < self.num_steps <= self.warmup_steps:
      yield f'warm_start.num_steps={self.num_steps} must be 0 or above warm_start.warmup_steps={self.warmup_steps}'


@section
class Filters(Section):
  """How a token is drawn from the policy's distribution."""

  SECTION = 'evaluate'
  temperature: float = knob(1.0, '0 is greedy', low=0, high=100)
  top_k: int = knob(0, 'likeliest tokens that may be sampled; 0: all', low=0)
  top_p: float = knob(1.0, 'of the likeliest tokens the fewest that hold this probability; 1: all', above=0, high=1)
  min_p: float = knob(0.0, "tokens of at least this share of the likeliest's probability; 0: all", low=0, below=1)

  def conflicts(self):
    yield from super().conflicts()
    if 0 < self.temperature < 0.001:
      yield f'evaluate.temperature={self.temperature:g} is all but greedy; set it to 0, which is, or to 0.001 or more'


_UNFILTERED = 'rollouts that learn come from the policy itself: filters are for evaluate'


@section
class Sample(Section):
  SECTION = 'sample'
  slots: int = knob(64, 'S, rollouts that a device decodes at once', low=1, high=ANY)
  refill: int = knob(1, 'free slots to wait for before new rollouts start', low=1)
  prefill: int = knob(64, 'prompts read at once', low=1, high=ANY)
  prompt_length: int = knob(64, 'P, tokens of the longest prompt', low=1)
  completion_length: int = knob(64, 'C, tokens at which a completion is truncated', low=1)
  temperature: float = knob(1.0, 'rollouts of a greedy policy would all be the same', low=0.001, high=100)
  top_k: int = knob(0, _UNFILTERED, choices=(0,))
  top_p: float = knob(1.0, _UNFILTERED, choices=(1.0,))
  min_p: float = knob(0.0, _UNFILTERED, choices=(0.0,))
  stop_strings: tuple = knob((), 'texts that end a completion, as the stop token does', of=str)
  cache: str = knob('', "dtype of cached keys and values; '': that of the computation", choices=('', 'int8'))

  def conflicts(self):
    if self.refill > self.slots:
      yield f'sample.refill={self.refill} is not in 1..sample.slots={self.slots}'


@section
class Rewards(Section):
  SECTION = 'rewards'
  verifier: str = knob('', "of tasks that name none: 'ends_with', 'math', 'choice', 'reasoning_gym', 'python_tests', "
                       "your own 'module:function' or 'PATH.py:function'; '': the dataset's, 'math' or 'ends_with'")
  workers: int = knob(0, 'processes; 0: as many as the processors that the run may use, at most 64', low=0, high=1024)
  timeout_s: float = knob(5.0, 'seconds of a verdict, at most', low=0.001, high=86_400)
  memory_mb: int = knob(1024, 'MiB that a process may take beyond what it starts with', low=1)
  max_faulty_steps: int = knob(3, 'steps in a row without any verdict of a verifier, which end the run', low=1,
                              high=ANY)
  network: bool = knob(False, 'whether verifiers may use the network')
  readable: tuple = knob((), 'folders that verifiers may read, in addition to the packages that are imported',
                         of=str)
  pattern: str = knob('', "regex of which verifiers see the last match (its group 1); '': the whole completion")
  partial_credit: bool = knob(False, "whether reasoning_gym's scores, and python_tests' shares, are the rewards")
  format: str = knob('', 'regex; a completion it is found in earns format_weight more')
  format_weight: float = knob(0.0, 'reward', low=-1e3, high=1e3)
  length_buffer: int = knob(0, 'last tokens of completion_length, over which the reward falls by 1', low=0)

  def conflicts(self):
    for name in ('pattern', 'format'):
      try:
        re.compile(getattr(self, name))
      except re.error as error:
        yield f'rewards.{name}={getattr(self, name)!r} is not a regex: {error}'
    if bool(self.format) != bool(self.format_weight):
      yield (f'rewards.format={self.format!r} and rewards.format_weight={self.format_weight} go together: '
             'set both or none')


@section
class Grpo(Section):
  SECTION = 'grpo'
  advantage: str = knob('std', "reward - mean of the group, over its std; or 'loo', minus the mean of the others; or "
                        "'mean'; 'maxrl', over the mean; 'posterior', minus what the others and earlier steps predict",
                        choices=('std', 'loo', 'mean', 'maxrl', 'posterior'))
  keep: float = knob(1.0, "share of a step's rollouts that updates learn from, on average: those of small |advantage| "
                     'are dropped at random, and weighed more where they stay', above=0, high=1)
  weight: str = knob('rollout', "of a task of N rollouts: N; or 'task', 1; or 'sqrt', sqrt(N)",
                     choices=('rollout', 'task', 'sqrt'))
  aggregate: str = knob('token', "mean over tokens; or 'rollout', over rollouts' means; or 'constant'",
                        choices=('token', 'rollout', 'constant'))
  loss: str = knob('grpo', "a ratio a token; or 'gspo', a ratio a rollout; or 'cispo'",
                   choices=('grpo', 'gspo', 'cispo'))
  clip_low: float = knob(0.2, 'the ratio to the old policy is clipped at 1 - clip_low; 1: no limit', low=0, high=1)
  clip_high: float = knob(0.28, 'the ratio to the old policy is clipped at 1 + clip_high', low=0)
  dual_clip: float = knob(0.0, 'most that a ratio multiplies a negative advantage by; 0: no limit', low=0)
  kl: str = knob('k3', 'estimate of the divergence from the initial policy', choices=('k1', 'k3'))
  kl_coef: float = knob(0.0, 'its weight in the loss', low=0, high=1e4)
  entropy_coef: float = knob(0.0, "weight of the policy's entropy, which is raised", low=0, high=1e4)
  tis_cap: float = knob(0.0, "cap of a token's importance weight, trainer over sampler; 0: no weight", low=0)

  @property
  def uses_past(self) -> bool:
    """Whether advantages use what is known of a task from before the step."""
    return self.advantage == 'posterior'

  def conflicts(self):
    if 0 < self.dual_clip <= 1 + self.clip_high:
      yield f'grpo.dual_clip={self.dual_clip} must be above 1 + grpo.clip_high={1 + self.clip_high}, or 0 for none'
    if self.keep < 1 and (self.kl_coef or self.entropy_coef):
      yield (f'grpo.keep={self.keep:g} saves nothing with grpo.kl_coef={self.kl_coef:g} and grpo.entropy_coef='
             f'{self.entropy_coef:g}, as every rollout then has a gradient; set grpo.keep=1, or both to 0')


@section
class Optimizer(Section):
  SECTION = 'optimizer'
  epochs: int = knob(1, "passes over a step's rollouts", low=1, high=1000)
  minibatches: int = knob(1, 'updates of a pass, each from whole tasks', low=1)
  learning_rate: float = knob(1e-4, 'of Adam', low=0, high=_RATE)
  schedule: str = knob('constant', 'of the rate after the warm-up', choices=('constant', 'linear', 'cosine'))
  warmup_steps: int = knob(0, 'updates of linear warm-up', low=0)
  decay_steps: int = knob(0, 'updates after which the rate stands at its final share', low=0)
  final_rate: float = knob(0.0, 'that share of learning_rate', low=0, high=1)
  b1: float = knob(0.9, 'of Adam', low=0, below=1)
  b2: float = knob(0.99, 'of Adam', low=0, below=1)
  eps: float = knob(1e-8, 'of Adam; 0 would divide 0 by 0', above=0, high=1)
  weight_decay: float = knob(0.0, 'of matrices; norms and biases have none', low=0, high=1e3)
  max_grad_norm: float = knob(1.0, 'global norm above which gradients are scaled down', above=0)

  def conflicts(self):
    if self.schedule != 'constant' and self.decay_steps <= self.warmup_steps:
      yield (f'optimizer.decay_steps={self.decay_steps} must be above optimizer.warmup_steps='
             f'{self.warmup_steps} with optimizer.schedule={self.schedule!r}')


@section
class Pack(Section):
  SECTION = 'pack'
  row_length: int = knob(128, 'tokens of a row, at least prompt_length + completion_length - 1', low=1)
  microbatch_rows: int = knob(16, 'rows of each device whose gradient is taken at once', low=1)
  prompt_sharing: float = knob(
      0.0, "share of the rows' tokens that are computed, as a group's prompt is computed once; 1: no prompt is "
      'shared; 0: what full lengths give, and 1 where that is above 0.75', low=0, high=1)


PERTURBATIONS = ('case', 'spaces', 'typos', 'opening')  # of prompts (evaluate.perturb)


@section
class Evaluate(Filters):
  every: int = knob(25, 'steps; 0: only before the first and after the last', low=0, high=ANY)
  tasks: int = knob(1_000_000, 'held-out tasks of a dataset, at most', low=1, high=ANY)
  rollouts: int = knob(8, 'n of avg@n: completions of a task', low=1, high=1_000_000)
  pass_at: tuple = knob((), "the k of pass@k, each in 1..rollouts: '(1, 4)'", of=int)
  maj_at: tuple = knob((), 'the k of maj@k, each in 1..rollouts; for a verifier in kr_jax.rewards.ANSWERS',
                       of=int)
  tasks_per_batch: int = knob(128, 'tasks sampled by one program, at most', low=1, high=ANY)
  perturb: tuple = knob((), "ways to perturb prompts, of 'case', 'spaces', 'typos' and 'opening': ('typos',); the last "
                        'evaluation of a run, and --mode=evaluate, then measure success on such prompts too', of=str)

  def conflicts(self):
    yield from super().conflicts()
    if any(x not in PERTURBATIONS or self.perturb.count(x) > 1 for x in self.perturb):
      yield f'evaluate.perturb={self.perturb} must hold names of {PERTURBATIONS}, each once'
    if self.temperature == 0 and self.rollouts > 1:
      yield (f'evaluate.rollouts={self.rollouts} completions of a task are all the same at '
             'evaluate.temperature=0; set evaluate.rollouts=1')
    for name in ('pass_at', 'maj_at'):
      for k in getattr(self, name):
        if not 1 <= k <= self.rollouts:
          yield (f'evaluate.{name}={getattr(self, name)} holds {k!r}, which is not a whole number in '
                 f'1..evaluate.rollouts={self.rollouts}')


@section
class Checkpoint(Section):
  SECTION = 'checkpoint'
  directory: str = knob('', "where all processes write and read them: gs://BUCKET/PATH; '': in the workdir",
                        path='written')
  every: int = knob(20, 'steps', low=1, high=ANY)
  minutes: float = knob(0.0, 'of work that may be lost, after which one is saved as well; 0: by steps alone', low=0,
                        high=1e6)
  keep: int = knob(2, 'checkpoints, the latest', low=1, high=ANY)
  best: int = knob(0, 'checkpoints that are kept besides, those of the highest held-out success; one is saved at each '
                   'evaluation then; 0: none', low=0, high=ANY)


@section
class Train(Section):
  SECTION = 'train'
  max_bad_steps: int = knob(3, 'steps in a row whose update is skipped, as it is not finite, which end the run; of the '
                            'warm start too', low=1, high=ANY)


@section
class Record(Section):
  """What of a run is kept, and where it is written besides the workdir."""

  SECTION = 'record'
  page: bool = knob(True, 'whether report.html is written, at evaluations and at the end')
  wandb: bool = knob(False, 'whether figures go to Weights & Biases too; its own environment variables set it up')
  goodput: bool = knob(False, "whether the times of steps go to Google Cloud's ml-goodput-measurement too")
  codecarbon: bool = knob(False, 'whether energy that nothing else measures is estimated by codecarbon')
  rollouts: int = knob(16, 'rollouts that are kept to be read, of a step, at most; 0: none', low=0)
  rollouts_mb: float = knob(64.0, 'MB that they take, of all steps together, at most', low=0)
  beside: str = knob('', "recorded run of the same config and other budgets, beside which this one is shown: "
                     "FILE.json, or 'kr_jax:NAME'; '': none", path='read')


@section
class Config(Section):
  """All knobs of a run."""

  seed: int = knob(0, 'of all that is random', low=0, high=SEED)
  num_steps: int = knob(100, 'updates by reinforcement learning', low=0)
  topologies: tuple = knob((), "TPU slices that the config is meant for, and preflight's unless given: ('v5e:4x4',)",
                           of=str)
  tasks: Tasks = Tasks()
  alloc: Alloc = Alloc()
  policy: Policy = Policy()
  mesh: Mesh = Mesh()
  warm_start: WarmStart = WarmStart()
  sample: Sample = Sample()
  rewards: Rewards = Rewards()
  grpo: Grpo = Grpo()
  optimizer: Optimizer = Optimizer()
  pack: Pack = Pack()
  train: Train = Train()
  evaluate: Evaluate = Evaluate()
  checkpoint: Checkpoint = Checkpoint()
  record: Record = Record()

  def conflicts(self):
    if self.optimizer.minibatches > self.tasks.per_step:
      yield (f'optimizer.minibatches={self.optimizer.minibatches} is more than tasks.per_step={self.tasks.per_step}, '
             'and a mini-batch is of whole tasks; lower it to at most that')
    M, X, R = self.tasks.per_step, self.tasks.candidates_per_step, self.alloc.rollouts_per_step
    if self.alloc.rule == 'dynamic' and (X % M or X < 2 * M):
      yield (f"tasks.candidates_per_step={X} is not two or more times tasks.per_step={M}, and alloc.rule='dynamic' "
             f'samples so many at a time; set it to {max(round(X / M), 2) * M}')
    if self.alloc.rule == 'dynamic' and R % M:
      yield (f"alloc.rollouts_per_step={R} is not a multiple of tasks.per_step={M}, and alloc.rule='dynamic' needs "
             f'groups of one size; set it to {max(round(R / M), 1) * M}')


def read(tree: Mapping[str, Any]) -> Config:
  """The config of nested mappings such as an ml_collections.ConfigDict. Raises ValueError as sections.read does."""
  return sections.read(tree, Config)
