"""Every knob, with its unit: `base()`. An experiment's config sets what differs and calls `finish`."""

import ml_collections


def base() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.num_steps = 100  # updates by reinforcement learning
  # TPU slices that it is meant for, which --mode=preflight compiles it for: ('v5e:4x4', 'v6e:4x4').
  c.topologies = ()

  c.tasks = ml_collections.ConfigDict()
  c.tasks.dataset = 'arithmetic'  # a module of kr_jax/datasets; 'reasoning_gym/TASK' of reasoning_gym
  # Datasets to train on instead, each with its weight: (('gsm8k', 2.0), ('champ:test[:200]', 1.0)).
  c.tasks.mixture = ()
  c.tasks.test = ()  # datasets to evaluate on instead: ('math_500', 'champ:test[200:]')
  c.tasks.template = '{problem}'  # the prompt of a problem; other braces are doubled
  c.tasks.chat = True  # the prompt is a user's message in a checkpoint's chat template, if it has one
  c.tasks.system = ''  # system message of that chat; '': what the template has without one
  c.tasks.thinking = True  # enable_thinking of templates that know it (Qwen3)
  c.tasks.data_dir = ''  # where TFDS keeps the data; '' is TFDS's own place
  c.tasks.train_split = 'train'  # TFDS split names, sub-splits allowed: 'train[:100]'
  c.tasks.test_split = 'test'
  c.tasks.warm_start_split = 'warm_start'
  c.tasks.per_step = 32  # M
  # Paths of the published files that datasets are read from (README.md); 'DIRECTORY/*.jsonl' is several.
  c.tasks.files = ml_collections.ConfigDict({name: '' for name in (
      'aime_2024', 'aime_2025', 'amc_2023', 'dapo_math_17k', 'gpqa_diamond', 'gsm8k', 'math_500',
      'minerva_math', 'olympiad_bench')})
  c.tasks.reasoning_gym = ml_collections.ConfigDict()
  c.tasks.reasoning_gym.train = 4096  # tasks to generate, at most
  c.tasks.reasoning_gym.test = 512
  c.tasks.reasoning_gym.seed = 0

  c.alloc = ml_collections.ConfigDict()
  c.alloc.preset = ''  # or 'paper', which sets rule, estimate, value and cost to the paper's
  c.alloc.rule = 'knapsack'  # or 'uniform'
  c.alloc.rollouts_per_step = 256  # R; where the cost is tokens, R at the most
  c.alloc.low = 2  # least rollouts a task gets, >= 1
  c.alloc.high = 128  # most rollouts a task gets
  c.alloc.estimate = 'posterior'  # of success rates; or 'window', the paper's
  c.alloc.discount = 0.98  # share of the evidence on success rates that a step leaves, (0, 1]
  c.alloc.value = 'infogain'  # of a task's rollouts; or 'variance', 'snr' (kr_jax/allocation/value.py)
  c.alloc.nu = 2.0  # of 'snr': noise-to-signal ratio of a rollout's gradient, until measured
  c.alloc.nu_every = 0  # steps from one measurement of nu, of 1.6 updates, to the next; 0: none
  c.alloc.solver = 'dp'  # or 'greedy', for tens of thousands of tasks
  c.alloc.cost = 'rollouts'  # what a step has a fixed number of; or 'tokens', of completions
  c.alloc.tokens_per_step = 0  # expected completion tokens of a step, where the cost is tokens

  c.policy = ml_collections.ConfigDict()
  # What training starts from: a directory with config.json and safetensors, a .gguf file, gs://BUCKET/PATH,
  # or 'smollm2-135m-instruct'. '': from scratch, with the sizes below, which are a checkpoint's else.
  c.policy.checkpoint = ''
  # V. 0: the tokenizer's or the checkpoint's. Else all sizes below, to tie_embeddings, are declared: a preflight
  # needs no checkpoint, and one that has others is refused.
  c.policy.vocab_size = 0
  c.policy.num_layers = 4  # L
  c.policy.width = 128  # D
  c.policy.num_heads = 4  # N, a multiple of num_kv_heads
  c.policy.num_kv_heads = 2  # K
  c.policy.head_width = 32  # H, even
  c.policy.hidden_width = 512  # F
  c.policy.rope_theta = 10_000.0
  c.policy.norm_eps = 1e-6
  c.policy.qk_norm = True
  c.policy.qkv_bias = False
  c.policy.tie_embeddings = True
  c.policy.dtype = 'float32'  # of the computation: float32 or bfloat16
  c.policy.remat = 'none'  # what training saves memory by: 'none', 'dots', 'attention', 'full'
  c.policy.lora_rank = 0  # of adapters, which alone are trained then; 0: all is trained
  c.policy.lora_alpha = 16.0  # adapters are scaled by lora_alpha / lora_rank

  c.mesh = ml_collections.ConfigDict()
  c.mesh.devices = 0  # of those there are; 0: all, of all hosts
  c.mesh.data = 1  # copies of the parameters that learn
  c.mesh.fsdp = 0  # devices among which a copy is divided by width; 0: what the others leave
  c.mesh.model = 1  # and by heads, hidden units and words
  c.mesh.sample_model = 0  # devices that share a copy when sampling; 0: mesh.model

  c.warm_start = ml_collections.ConfigDict()
  c.warm_start.num_steps = 0  # supervised updates before reinforcement learning
  c.warm_start.per_step = 64  # solutions an update
  c.warm_start.learning_rate = 1e-3
  c.warm_start.warmup_steps = 20
  c.warm_start.checkpoint_every = 100  # updates

  c.sample = ml_collections.ConfigDict()
  c.sample.slots = 64  # S, rollouts decoded at once
  c.sample.refill = 1  # free slots to wait for before new rollouts start, 1..slots
  c.sample.prefill = 64  # prompts read at once
  c.sample.prompt_length = 64  # P, tokens of the longest prompt
  c.sample.completion_length = 64  # C, tokens at which a completion is cut off
  c.sample.temperature = 1.0
  c.sample.top_k = 0  # these three stand for all tokens: a step learns from the policy's own
  c.sample.top_p = 1.0
  c.sample.min_p = 0.0
  c.sample.stop_strings = ()  # texts after which a completion is cut, beside the token that stops it
  c.sample.cache = ''  # of keys and values: '' is the dtype of the computation; or 'int8'

  c.rewards = ml_collections.ConfigDict()
  c.rewards.verifier = 'ends_with'  # of tasks that name none: one of kr_jax.rewards.VERIFIERS, 'math',
  # 'choice', 'reasoning_gym', or your own 'module:function'
  c.rewards.workers = 2  # processes
  c.rewards.timeout_s = 5.0  # seconds a verdict may take
  c.rewards.memory_mb = 1024  # MiB that a process may take beyond what it starts with
  c.rewards.pattern = ''  # regex of which verifiers see the last match (its group 1); '': all there is
  c.rewards.partial_credit = False  # reasoning_gym's scores are rewards; or its verdicts are
  c.rewards.format = ''  # regex; a completion it is found in earns format_weight more
  c.rewards.format_weight = 0.0
  c.rewards.length_buffer = 0  # last tokens of completion_length, over which the reward falls by 1

  c.grpo = ml_collections.ConfigDict()
  c.grpo.preset = ''  # or a name in kr_jax.learning.grpo.PRESETS, which sets what its paper publishes
  c.grpo.advantage = 'std'  # reward - mean of the group, over its std; or 'loo', leave-one-out, 'mean'
  c.grpo.weight = 'rollout'  # of a task of N rollouts: N; or 'task', 1, or 'sqrt', sqrt(N)
  c.grpo.aggregate = 'token'  # mean over tokens; or 'rollout', of rollouts' means, or 'constant'
  c.grpo.loss = 'grpo'  # a ratio a token; or 'gspo', a ratio a rollout, or 'cispo'
  c.grpo.clip_low = 0.2  # bounds of the ratio to the old policy: 1 - clip_low, 1 + clip_high
  c.grpo.clip_high = 0.28
  c.grpo.dual_clip = 0.0  # most that a ratio multiplies a negative advantage by; 0: no bound
  c.grpo.kl = 'k3'  # estimate of the divergence from the initial policy; or 'k1'
  c.grpo.kl_coef = 0.0  # its weight in the loss
  c.grpo.entropy_coef = 0.0  # weight of the policy's entropy, which is raised
  c.grpo.tis_cap = 0.0  # cap of a token's weight for trainer against sampler; 0: not weighed

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.epochs = 1  # passes over a step's rollouts
  c.optimizer.minibatches = 1  # updates of a pass, each from whole tasks
  c.optimizer.learning_rate = 1e-4
  c.optimizer.schedule = 'constant'  # of the rate after the warm-up; or 'linear', 'cosine'
  c.optimizer.warmup_steps = 0  # updates of linear warm-up
  c.optimizer.decay_steps = 0  # updates after which the rate stands at its final share
  c.optimizer.final_rate = 0.0  # that share of learning_rate
  c.optimizer.b1 = 0.9  # of Adam
  c.optimizer.b2 = 0.99
  c.optimizer.eps = 1e-8
  c.optimizer.weight_decay = 0.0  # of matrices; norms and biases have none
  c.optimizer.max_grad_norm = 1.0  # global norm above which gradients are scaled down

  c.pack = ml_collections.ConfigDict()
  c.pack.row_length = 128  # places of a row, at least prompt_length + completion_length - 1
  c.pack.microbatch_rows = 16  # rows of each device whose gradient is taken at once
  c.pack.prompt_sharing = 0.0  # share of their tokens that are computed, as groups share prompts; 1: all, none
  # is shared; 0: what full lengths give, and 1 where that is above 0.75

  c.evaluate = ml_collections.ConfigDict()
  c.evaluate.every = 25  # steps; 0: only before the first and after the last
  c.evaluate.tasks = 1_000_000  # held-out tasks of a dataset to use, at most
  c.evaluate.rollouts = 8  # n of avg@n: completions of a task
  c.evaluate.pass_at = ()  # the k of pass@k, each in 1..rollouts: '(1, 4)'
  c.evaluate.maj_at = ()  # the k of maj@k, each in 1..rollouts; for a verifier in kr_jax.rewards.ANSWERS
  c.evaluate.temperature = 1.0  # 0: greedy, of one rollout
  c.evaluate.top_k = 0  # likeliest tokens that may be sampled; 0: all
  c.evaluate.top_p = 1.0  # of the likeliest tokens the fewest that hold this probability may be; 1: all
  c.evaluate.min_p = 0.0  # tokens of at least this share of the likeliest's probability may be; 0: all
  c.evaluate.tasks_per_batch = 128  # tasks sampled by one program

  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.directory = ''  # where all processes read and write them: gs://BUCKET/PATH; '': the workdir
  c.checkpoint.every = 20  # steps
  c.checkpoint.keep = 2  # checkpoints
  return c


BOXED = '{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}.'


def large(c: ml_collections.ConfigDict, checkpoint: str, **sizes) -> ml_collections.ConfigDict:
  """Knobs of published checkpoints of billions of parameters, of these sizes, on TPUs."""
  c.policy.checkpoint = checkpoint
  c.policy.update(sizes)
  c.policy.dtype = 'bfloat16'
  c.policy.remat = 'attention'
  c.sample.slots = 64
  c.sample.prefill = 8
  c.pack.microbatch_rows = 1
  return c


def math(c: ml_collections.ConfigDict, checkpoint: str, **sizes) -> ml_collections.ConfigDict:
  """The paper's data and evaluations, from files in data/, with half of its tasks a step."""
  c = large(c, checkpoint, **sizes)
  c.num_steps = 500
  c.tasks.per_step = 128
  c.alloc.rollouts_per_step = 1024
  c.optimizer.learning_rate = 1e-6
  c.optimizer.minibatches = 4
  c.sample.prompt_length = 1024
  c.sample.completion_length = 4096
  c.pack.row_length = 5120
  c.tasks.dataset = 'dapo_math_17k'
  c.tasks.test = ('aime_2024', 'aime_2025', 'amc_2023', 'math_500', 'minerva_math', 'olympiad_bench',
                  'gpqa_diamond')
  c.tasks.template = BOXED
  c.tasks.files.update({
      'dapo_math_17k': 'data/dapo-math-17k.parquet',
      'aime_2024': 'data/aime_2024/train-00000-of-00001.parquet',
      'aime_2025': 'data/aime2025-*.jsonl',
      'amc_2023': 'data/amc23/test-00000-of-00001.parquet',
      'math_500': 'data/MATH-500/test.jsonl',
      'minerva_math': 'data/minervamath/test.jsonl',
      'olympiad_bench': 'data/OE_TO_maths_en_COMP.parquet',
      'gpqa_diamond': 'data/gpqa_diamond.csv'})
  c.rewards.verifier = 'math'
  c.evaluate.every = 10
  c.evaluate.rollouts = 16
  c.evaluate.temperature = 0.6
  return c


def finish(c: ml_collections.ConfigDict, variant: str) -> ml_collections.ConfigDict:
  """Locks a config, shrunk to seconds where the variant is 'debug'.

  Raises ValueError for another variant than '' and 'debug'.
  """
  if variant not in ('', 'debug'):
    raise ValueError(f"config variant {variant!r} is not 'debug'; drop what follows the colon")
  if variant == 'debug':
    c.num_steps = 4
    c.tasks.per_step = 8
    c.alloc.rollouts_per_step = 32
    c.topologies = ()
    c.mesh = base().mesh
    c.policy.vocab_size = 0
    c.policy.num_layers = 2
    c.policy.width = 32
    c.policy.num_heads = 2
    c.policy.num_kv_heads = 1
    c.policy.head_width = 16
    c.policy.hidden_width = 64
    c.warm_start.num_steps = min(c.warm_start.num_steps, 4)
    c.warm_start.per_step = 16
    c.warm_start.warmup_steps = 1
    c.warm_start.checkpoint_every = 2
    c.sample.slots = 16
    if c.sample.completion_length > 64:
      c.sample.completion_length = 64
      c.pack.row_length = c.sample.prompt_length + 64
    c.evaluate.every = 2
    c.evaluate.tasks = 16
    c.evaluate.rollouts = min(c.evaluate.rollouts, 8)
    c.evaluate.tasks_per_batch = 16
    c.checkpoint.every = 2
  return c.lock()
