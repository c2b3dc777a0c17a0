"""Config -> checked Setup: all that can be checked before anything is computed.

The only module that sees the whole config. Every other one takes its own section, or plain arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import json
import math
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.sharding import Mesh
import numpy as np

from kr_jax import evaluate
from kr_jax import hub
from kr_jax import knobs
from kr_jax import memory
from kr_jax import prior_rates
from kr_jax import processes
from kr_jax import rewards
from kr_jax import sample
from kr_jax import sharding
from kr_jax import tasks as tasks_lib
from kr_jax import types
from kr_jax import warm_start
from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.datasets import names
from kr_jax.learning import update
from kr_jax.model import families
from kr_jax.model import policy
from kr_jax.model import pretrained
from kr_jax.model import tokenizer as tokenizer_lib
from kr_jax.model import weights
from kr_jax.record import claim as claim_lib

# Knobs of the policy that are of a run, and not of a checkpoint; and sizes that a config may declare of one.
_OF_RUN = ('dtype', 'remat', 'lora_rank', 'lora_alpha')
_SIZES = ('vocab_size', 'num_layers', 'width', 'num_heads', 'num_kv_heads', 'head_width', 'hidden_width',
          'num_experts', 'experts_per_token', 'qk_norm', 'qkv_bias', 'tie_embeddings')
_FAR = 8  # times the memory of a device
PINNED = 'hub'  # in config.json: Setup.pinned


class Setup(NamedTuple):
  """A checked config, as the loop's parts take it."""

  config: knobs.Config
  tokenizer: tokenizer_lib.Characters | tokenizer_lib.Subwords | None  # None: as `abstract` leaves it
  policy: policy.Config  # without adapters: what is sampled from
  trained: policy.Config  # with them
  sample: sample.Config
  evaluate: sample.Config
  rewards: rewards.Config
  update: update.Config
  sft: update.Config  # of the warm start
  learn_mesh: Mesh | None  # None: there is one device
  sample_mesh: Mesh | None
  train_tasks: Sequence[types.Task] = ()
  shares: dict[str, float] = {}  # of the datasets that they are from
  prior_rate_I: np.ndarray | None = None  # of the training tasks, where tasks.prior knows them; nan elsewhere
  test_tasks: Sequence[types.Task] = ()
  warm_start_tasks: Sequence[types.Task] = ()
  pinned: Mapping[str, Mapping[str, str]] = {}  # by kind, names of the hub as the config says them: with the commit

  @property
  def needs_base(self) -> bool:
    """Whether updates read the initial policy: to add adapters to it, or for a KL divergence."""
    return bool(self.trained.lora_rank or self.update.grpo.kl_coef)


def prepare(config: Mapping[str, Any], workdir: str = '', *, trains: bool = True) -> Setup:
  """Reads the config and the data.

  Args:
    workdir: of a run that may be gone on with: of the hub it goes on with the commits that it began with, where the
      config says none.
    trains: whether the run learns; else it evaluates alone, and needs less memory.

  Raises:
    ValueError: a knob, a split or a prompt outside its limits, named with the limit; or a run that takes more memory
      than there is.
  """
  asked = knobs.read(config)
  config, pinned = _pinned(asked, workdir)
  config = _with_verifier(config)
  train, test = _datasets(config.tasks)
  tokenizer, trained = _policy(config)
  _warn_of_context(config, trained)
  setup = _checked(config, tokenizer, trained, trains=trains)
  read_tasks = functools.partial(
      _read_tasks, config=config, tokenizer=tokenizer, serves_all=bool(asked.rewards.verifier))
  setup = setup._replace(
      pinned=pinned,
      train_tasks=read_tasks(train),
      shares={names.source(dataset): weight for (dataset, _), weight in train.items()},
      test_tasks=read_tasks(test, most=config.evaluate.tasks),
      warm_start_tasks=_solved(config, [dataset for dataset, _ in train], read_tasks))
  setup = setup._replace(prior_rate_I=prior_rates.read(config.tasks.prior, setup.train_tasks))
  _check_tasks(setup)
  _check_memory(setup.config, setup.trained, setup.learn_mesh, setup.sample_mesh, trains, len(setup.test_tasks))
  return setup


def without_tasks(config: Mapping[str, Any], workdir: str = '', *, trains: bool | None = None) -> Setup:
  """What `prepare` makes of a config on one device, without tasks: no data are read but for the alphabet of a policy
  from scratch, and no mesh has to fit.

  trains: as of `prepare`; None: it neither learns nor samples, and memory is not looked at.

  Raises ValueError as `prepare` does.
  """
  config = _with_verifier(_pinned(knobs.read(config), workdir)[0]).replace(mesh=knobs.Mesh(devices=1))
  return _checked(config, *_policy(config), devices=jax.devices()[:1], trains=trains)


def abstract(config: Mapping[str, Any], devices: Sequence[Any]) -> Setup:
  """What `prepare` makes of a config, on these devices, without a tokenizer or tasks: of what a run compiles
  shapes alone are known, and of a checkpoint that is not here the sizes that the config declares.

  Raises ValueError as `prepare` does, and where sizes are neither declared nor to be found.
  """
  config = knobs.read(config)
  config = config.replace(rewards=config.rewards.replace(verifier=config.rewards.verifier or 'ends_with'))
  c = config.policy
  if not c.checkpoint:
    _, trained = _from_scratch(config)
  elif c.vocab_size:
    trained = _declared(c)
  else:
    trained = _of_checkpoint(config)
  return _checked(config, None, trained, devices)


def _pinned(config: knobs.Config, workdir: str) -> tuple[knobs.Config, dict[str, dict[str, str]]]:
  """The config with commits in the names of the hub; and Setup.pinned.

  The record of a run holds the commits of what comes of the hub, and a run goes on with no others. Of several processes
  the first may be the only one that has the record.
  """
  record = claim_lib.record(workdir) if workdir else {}
  began = json.loads(processes.of_first(json.dumps(record))).get
  found: dict[str, dict[str, str]] = {}

  def pinned(name: str, kind: str, pin: Callable[[str], str]) -> str:
    if not hub.is_name(name):
      return name
    of_kind = found.setdefault(kind, {})
    if name not in of_kind:
      of_kind[name] = began(f'{PINNED}.{kind}.{name}') or pin(name)
    return of_kind[name]

  source = pinned(config.policy.checkpoint, hub.MODEL,
                  lambda name: pretrained.pin(name, began('policy.checkpoint')))
  of_data = lambda name, whose: pinned(name, hub.DATASET, lambda name: hub.pin(name, hub.DATASET, whose))
  return config.replace(
      tasks=_pinned_tasks(config.tasks, of_data), policy=config.policy.replace(checkpoint=source)), found


def _pinned_tasks(c: knobs.Tasks, pinned: Callable[[str, str], str]) -> knobs.Tasks:
  """pinned: of a path, or name of the hub, and the text with which an error begins, the path with its commit."""

  def of_dataset(name: str, whose: str) -> str:
    dataset, split = names.part(name, '')
    if not names.is_file(dataset):
      return name
    return f'{names.FILE}{pinned(names.path(dataset), f"{whose}{names.FILE}")}{split and f":{split}"}'

  tasks_lib.check_mixture(c.mixture)
  c = c.replace(mixture=tuple((of_dataset(name, 'tasks.mixture='), weight) for name, weight in c.mixture),
                test=tuple(of_dataset(name, 'tasks.test=') for name in c.test),
                dataset=c.dataset if c.mixture else of_dataset(c.dataset, 'tasks.dataset='))
  train, test = _datasets(c)
  used, files = {dataset for dataset, _ in (*train, *test)}, knobs.as_dict(c.files)
  return c.replace(files=c.files.replace(**{
      dataset: pinned(tasks_lib.files_of(dataset, files), f'tasks.files.{dataset}=') for dataset in files
      if dataset in used}))


def _with_verifier(config: knobs.Config) -> knobs.Config:
  """The verifier of tasks that name none, where the config leaves it to the dataset: that of the first."""
  if config.rewards.verifier:
    return config
  (dataset, _), *_ = _datasets(config.tasks)[0]
  return config.replace(rewards=config.rewards.replace(verifier=tasks_lib.verifier(dataset)))


def _policy(config: knobs.Config) -> tuple[tokenizer_lib.Characters | tokenizer_lib.Subwords, policy.Config]:
  """Tokenizer and sizes of the policy, its adapters included."""
  c, checkpoint = config.tasks, config.policy.checkpoint
  if not checkpoint:
    return _from_scratch(config)
  tokenizer = tokenizer_lib.Subwords(checkpoint, chat=c.chat, system=c.system, thinking=c.thinking)
  found = _of_checkpoint(config)
  _check_declared(config.policy, found)
  return tokenizer, found


def _of_checkpoint(config: knobs.Config) -> policy.Config:
  """The policy of a checkpoint, for the sequences of this run."""
  c = config.policy
  found = weights.config(c.checkpoint, length=_longest(config), **{name: getattr(c, name) for name in _OF_RUN})
  return families.stretched(found, c.yarn) if c.yarn else found


def _longest(config: knobs.Config) -> int:
  """Tokens of the longest sequence of a run."""
  return config.sample.prompt_length + config.sample.completion_length


def _warn_of_context(config: knobs.Config, found: policy.Config) -> None:
  """Says so where sequences may be longer than the checkpoint was made to read."""
  context, longest = families.longest(found), _longest(config)
  if not context or longest <= context or not processes.is_first():
    return
  offer = ''
  if config.policy.yarn or not found.rope_scaling and found.family != 'phi3':
    offer = (f', or set policy.yarn={math.ceil(longest / found.context)}, which stretches its context and changes how '
             'it reads shorter sequences a little')
  logging.warning(
      'sample.prompt_length=%d and sample.completion_length=%d make sequences of up to %d tokens, and %s was made to '
      'read %d (max_position_embeddings): later tokens have positions that it was not trained on, and completions that '
      'reach them are likely to be bad. Set both so that their sum is at most %d%s.',
      config.sample.prompt_length, config.sample.completion_length, longest, config.policy.checkpoint, context, context,
      offer)


def _datasets(c: knobs.Tasks) -> tuple[dict[tuple[str, str], float], list[tuple[str, str]]]:
  """Dataset and split of what is trained on, each with its weight, and of what is tested on."""
  tasks_lib.check_mixture(c.mixture)
  train = {tasks_lib.part(name, c.train_split): weight for name, weight in c.mixture or ((c.dataset, 1.0),)}
  return train, [tasks_lib.part(name, c.test_split) for name in c.test or [name for name, _ in train]]


def _declared(c: knobs.Policy, **changed: Any) -> policy.Config:
  """A policy of the sizes in the config."""
  sizes = knobs.as_dict(c)
  del sizes['checkpoint'], sizes['yarn']
  return policy.Config(**sizes | changed)


def _from_scratch(config: knobs.Config) -> tuple[tokenizer_lib.Characters, policy.Config]:
  """Tokenizer and sizes of a policy that is no checkpoint: for the characters of its datasets."""
  train, test = _datasets(config.tasks)
  tokenizer = tokenizer_lib.Characters(tasks_lib.alphabet(
      [dataset for dataset, _ in (*train, *test)], **_made_of(config.tasks)))
  found = _declared(config.policy, vocab_size=tokenizer.vocab_size)
  _check_declared(config.policy, found)
  return tokenizer, found


def _made_of(c: knobs.Tasks) -> dict[str, Any]:
  """What tasks.read and tasks.alphabet take."""
  return {'data_dir': c.data_dir, 'template': c.template, 'files': knobs.as_dict(c.files),
          'reasoning_gym': knobs.as_dict(c.reasoning_gym), 'columns': knobs.as_dict(c.columns)}


def _check_declared(c: knobs.Policy, found: policy.Config) -> None:
  """Raises ValueError where a config declares other sizes than are found."""
  wrong = [f'policy.{name}={getattr(c, name)} where there is {getattr(found, name)}' for name in _SIZES
           if getattr(c, name) != getattr(found, name)] if c.vocab_size else []
  if wrong:
    raise ValueError(f'{c.checkpoint or "the tokenizer"} has not the declared sizes: {", ".join(wrong)}; '
                     'correct them, or set policy.vocab_size=0, which declares none')


def _checked(config: knobs.Config, tokenizer, trained: policy.Config, devices: Sequence[Any] | None = None, *,
             trains: bool | None = None) -> Setup:
  """A setup but for its tasks. Raises ValueError for knobs that no run could follow together.

  trains: as of `without_tasks`.
  """
  c = config
  filters = lambda section: {name: getattr(section, name) for name in ('temperature', 'top_k', 'top_p', 'min_p')}
  sample_config = sample.Config(**knobs.as_dict(c.sample), stop_ids=tokenizer.stop_ids if tokenizer else (0,))
  update_config = update.Config(
      **knobs.as_dict(c.optimizer), **knobs.as_dict(c.pack), grpo=c.grpo, temperature=c.sample.temperature,
      wave_rollouts=allocate.wave_rollouts(c.alloc))
  learn_mesh, sample_mesh = sharding.meshes(c.mesh, trained, rollouts=c.alloc.rollouts_per_step, devices=devices)
  rewards_config = rewards.Config(**knobs.as_dict(c.rewards))
  rewards.check(rewards_config, c.sample.completion_length)
  if trained.lora_rank > trained.width:
    raise ValueError(f'policy.lora_rank={trained.lora_rank} is more than the width {trained.width} of the policy, and '
                     'adapters are of a lower rank than their matrices; lower it, or set it to 0 to train all')
  if trains is not None:
    _check_memory(c, trained, learn_mesh, sample_mesh, trains)
  _check_alloc(c)
  update.microbatch_shape(c.sample.prompt_length, c.sample.completion_length,
                          c.alloc.rollouts_per_step / c.tasks.per_step, update_config)
  return Setup(
      config=config, tokenizer=tokenizer, policy=policy.without_lora(trained), trained=trained,
      sample=sample_config, evaluate=sample_config.replace(**filters(c.evaluate)), rewards=rewards_config,
      update=update_config, sft=_sft(c.warm_start, update_config), learn_mesh=learn_mesh,
      sample_mesh=sample_mesh)


def needs(setup: Setup) -> memory.Needs:
  """The memory that a run takes at the least."""
  axes = lambda mesh: {} if mesh is None else dict(mesh.shape)
  return memory.needs(setup.config, setup.trained, axes(setup.learn_mesh), axes(setup.sample_mesh),
                      test_tasks=max(len(setup.test_tasks), 1))


def check_slice(setup: Setup, device_bytes: int) -> None:
  """Raises ValueError, as memory.check does, where devices that have so much memory are far from holding a run: a
  compiler takes minutes to find that out, and its figures are of no use."""
  axes = lambda mesh: {} if mesh is None else dict(mesh.shape)
  memory.check(setup.config, setup.trained, axes(setup.learn_mesh), axes(setup.sample_mesh),
               there=memory.Machine(_FAR * device_bytes, None, None, 1, False))


def _check_memory(c: knobs.Config, trained: policy.Config, learn_mesh: Mesh | None, sample_mesh: Mesh | None,
                  trains: bool, test_tasks: int = 1) -> None:
  """Raises ValueError as memory.check does."""
  devices = jax.local_devices()[:1] if learn_mesh is None else learn_mesh.local_devices
  axes = lambda mesh: {} if mesh is None else dict(mesh.shape)
  memory.check(c, trained, axes(learn_mesh), axes(sample_mesh), there=memory.machine(devices), test_tasks=test_tasks,
               trains=trains)


def _sft(c: knobs.WarmStart, like: update.Config) -> update.Config:
  """How the warm start updates: its rate falls linearly to 0."""
  rate = {'schedule': 'linear', 'decay_steps': c.num_steps} if c.num_steps else {'schedule': 'constant'}
  return like.replace(learning_rate=c.learning_rate, warmup_steps=c.warmup_steps, final_rate=0.0,
                      temperature=1.0, **rate)


def _check_alloc(c: knobs.Config) -> None:
  """Raises ValueError for budgets that no step could follow."""
  M, R, C = c.tasks.per_step, c.alloc.rollouts_per_step, c.sample.completion_length
  allocate.check(M, R, c.alloc.low, c.alloc.high, c.alloc.rule, c.alloc.waves)
  memory.check_budgets(c)
  if c.alloc.cost == 'tokens' and not c.alloc.low * M <= c.alloc.tokens_per_step <= R * C:
    raise ValueError(
        f'alloc.tokens_per_step={c.alloc.tokens_per_step} is not in {c.alloc.low * M}..{R * C}: from a '
        'token for each of alloc.low * tasks.per_step rollouts to sample.completion_length for each of '
        'alloc.rollouts_per_step')
  if c.tasks.candidates_per_step > M and c.alloc.low:
    raise ValueError(
        f'tasks.candidates_per_step={c.tasks.candidates_per_step} is more than tasks.per_step={M}, so some tasks get '
        f'no rollouts, and alloc.low={c.alloc.low} gives each task some; set alloc.low=0'
        + ('' if c.alloc.rule == 'dynamic' else ', or tasks.candidates_per_step=0'))
  # And what the allocator itself refuses.
  considered = tasks_lib.considered(c.tasks)
  budget_X = allocate.of_step(c.alloc, estimate.init(considered), np.arange(considered), completion_length=C,
                              most_tasks=M, counts_evidence=c.grpo.uses_past)
  if not budget_X.any():  # and none would ever be, as nothing would be learnt of the tasks
    raise ValueError(
        f'alloc.tokens_per_step={c.alloc.tokens_per_step} pays for no rollout of the first step, each of which is '
        f'expected to take sample.completion_length={C} tokens; raise alloc.tokens_per_step, or alloc.low from 0')


def _read_tasks(datasets: Sequence[tuple[str, str]], *, config: knobs.Config, tokenizer, serves_all: bool,
                most: int | None = None) -> list[types.Task]:
  """The tasks of several datasets and splits as one; `most` of each.

  serves_all: whether rewards.verifier serves the tasks of all datasets that name none; else those of a dataset that is
    made for another name the other.
  """
  found = []
  for dataset, split in datasets:
    tasks = tasks_lib.read(dataset, split, tokenizer, **_made_of(config.tasks))[:most]
    tasks_lib.check_prompts(tasks, config.sample.prompt_length, f'{dataset}/{split}')
    if not serves_all and (own := tasks_lib.verifier(dataset)) != config.rewards.verifier:
      tasks = [task._replace(verifier=task.verifier or own) for task in tasks]
    found.append(tasks)
  return tasks_lib.join(found, ' and '.join(f'{dataset}/{split}' for dataset, split in datasets))


def _solved(config: knobs.Config, datasets: Sequence[str], read_tasks: Callable[..., list[types.Task]]
            ) -> list[types.Task]:
  """The tasks whose solutions the warm start learns, if there is one."""
  if not config.warm_start.num_steps:
    return []
  try:
    return read_tasks([(dataset, config.tasks.warm_start_split) for dataset in datasets])
  except ValueError as error:
    raise ValueError(f'{error}; tasks.warm_start_split names the tasks whose solutions the warm start learns, and '
                     'warm_start.num_steps=0 leaves it out') from error


def _check_tasks(setup: Setup) -> None:
  """Raises ValueError for tasks that no step, evaluation or warm start could take."""
  c, solved = setup.config, len(setup.warm_start_tasks)
  if c.warm_start.num_steps and c.warm_start.per_step > solved:
    raise ValueError(f'warm_start.per_step={c.warm_start.per_step} is more than the {solved} tasks of its split')
  rewards.names(setup.train_tasks, setup.rewards)
  for tasks in (setup.train_tasks, setup.test_tasks):
    rewards.check_tasks(tasks, setup.rewards)
  evaluate.check_verifiers(rewards.names(setup.test_tasks, setup.rewards), c.evaluate.maj_at)
  trained = {task.id for task in setup.train_tasks}
  if (both := sum(task.id in trained for task in setup.test_tasks)) and processes.is_first():
    logging.warning('%d of the %d held-out tasks are trained on as well, so that success on them says little; name '
                    'other splits, by tasks.train_split and tasks.test_split, or other datasets in tasks.test',
                    both, len(setup.test_tasks))
  tasks_lib.batch(setup.train_tasks, 0, per_step=tasks_lib.considered(c.tasks), seed=c.seed, weights=setup.shares)
  warm_start.solutions(setup.warm_start_tasks, setup.tokenizer, setup.sample)
