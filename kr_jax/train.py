"""The loop: tasks -> budgets -> rollouts -> rewards -> update -> statistics.

`prepare` checks everything that can be checked before anything is computed; `train` runs the loop,
keeps its record and its checkpoints, and goes on where the workdir's last checkpoint stands.

Randomness: every key is folded from (config.seed, stream, step), none is carried along; a resumed
run draws what the uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import hashlib
import json
import math
import os
import signal
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from kr_jax import evaluate
from kr_jax import processes
from kr_jax import rewards
from kr_jax import sample
from kr_jax import sharding
from kr_jax import tasks as tasks_lib
from kr_jax import types
from kr_jax import warm_start
from kr_jax.allocation import allocate
from kr_jax.allocation import estimate
from kr_jax.learning import grpo
from kr_jax.learning import update
from kr_jax.model import policy
from kr_jax.model import tokenizer as tokenizer_lib
from kr_jax.model import weights
from kr_jax.record import checkpoint
from kr_jax.record import metrics

# Streams of random keys.
_INIT, _ROLLOUTS, _EVALUATE, _NOISE = range(4)
# Knobs that a run may go on with changed: they say how long, how often and where, not what.
MAY_CHANGE = ('num_steps', 'topologies', 'checkpoint.every', 'checkpoint.keep', 'tasks.data_dir', 'tasks.files',
              'mesh', 'rewards.workers', 'evaluate.every', 'evaluate.pass_at', 'evaluate.maj_at')
# Knobs of the policy that are of a run, and not of a checkpoint; and sizes that a config may declare of one.
_OF_RUN = ('dtype', 'remat', 'lora_rank', 'lora_alpha')
_SIZES = ('vocab_size', 'num_layers', 'width', 'num_heads', 'num_kv_heads', 'head_width', 'hidden_width',
          'qk_norm', 'qkv_bias', 'tie_embeddings')
# Knobs of alloc that a preset sets, whatever they say; those of the loss are grpo.PRESETS.
PRESETS = {'': {}, 'paper': {'rule': 'knapsack', 'estimate': 'window', 'value': 'infogain',
                             'cost': 'rollouts'}}


class Setup(NamedTuple):
  """A checked config, as the loop's parts take it."""

  config: ml_collections.ConfigDict
  alloc: ml_collections.ConfigDict  # with its preset
  checkpoint: str  # where training starts from; '': from scratch
  tokenizer: tokenizer_lib.Characters | tokenizer_lib.Subwords | None  # None: as `abstract` leaves it
  policy: policy.Config  # without adapters: what is sampled from
  trained: policy.Config  # with them
  sample: sample.Config
  evaluate: sample.Config
  rewards: rewards.Config
  update: update.Config
  warm_start: warm_start.Config
  meshes: tuple[Mesh, Mesh] | None  # to learn and to sample on; None: there is one device
  train_tasks: Sequence[types.Task] = ()
  shares: dict[str, float] = {}  # of the datasets that they are from
  test_tasks: Sequence[types.Task] = ()
  warm_start_tasks: Sequence[types.Task] = ()


def prepare(config: ml_collections.ConfigDict) -> Setup:
  """Reads the config and the data.

  Raises:
    ValueError: a knob, a split or a prompt outside its limits, named with the limit.
  """
  train, test = _parts(config.tasks)
  c, name = config.tasks, config.policy.checkpoint
  if name:
    tokenizer = tokenizer_lib.Subwords(name, chat=c.chat, system=c.system, thinking=c.thinking)
    trained = weights.config(name, **{knob: config.policy[knob] for knob in _OF_RUN})
    _check_declared(config.policy, trained)
  else:
    tokenizer, trained = _from_scratch(config)
  setup = _checked(config, tokenizer, trained)
  def read(parts, most=None):
    found = []
    for dataset, split in parts:
      tasks = tasks_lib.read(dataset, split, tokenizer, data_dir=c.data_dir, template=c.template,
                             files=c.files, reasoning_gym=c.reasoning_gym)[:most]
      tasks_lib.check_prompts(tasks, config.sample.prompt_length, f'{dataset}/{split}')
      found.append(tasks)
    return tasks_lib.join(found, ' and '.join(f'{dataset}/{split}' for dataset, split in parts))

  setup = setup._replace(
      train_tasks=read(train), shares={dataset: weight for (dataset, _), weight in train.items()},
      test_tasks=read(test, config.evaluate.tasks),
      warm_start_tasks=read([(dataset, c.warm_start_split) for dataset, _ in train])
      if config.warm_start.num_steps else [])
  for name, tasks in (('tasks', setup.train_tasks), ('warm_start', setup.warm_start_tasks)):
    if tasks and config[name].per_step > len(tasks):
      raise ValueError(f'{name}.per_step={config[name].per_step} is more than the {len(tasks)} tasks '
                       'of its split')
  rewards.names(setup.train_tasks, setup.rewards)
  evaluate.check_verifiers(rewards.names(setup.test_tasks, setup.rewards), config.evaluate.maj_at)
  tasks_lib.batch(setup.train_tasks, 0, per_step=c.per_step, seed=config.seed, weights=setup.shares)
  warm_start.solutions(setup.warm_start_tasks, tokenizer, setup.sample)
  return setup


def abstract(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> Setup:
  """What `prepare` makes of a config, on these devices, without a tokenizer or tasks: of what a run compiles
  shapes alone are known, and of a checkpoint that is not here the sizes that the config declares.

  Raises ValueError as `prepare` does, and where sizes are neither declared nor to be found.
  """
  knobs = config.policy.to_dict()
  name = knobs.pop('checkpoint')
  if not name:
    _, trained = _from_scratch(config)
  elif knobs['vocab_size']:
    trained = policy.Config(**knobs)
  else:
    trained = weights.config(name, **{knob: knobs[knob] for knob in _OF_RUN})
  return _checked(config, None, trained, devices)


def _parts(c: ml_collections.ConfigDict) -> tuple[dict[tuple[str, str], float], list[tuple[str, str]]]:
  """Dataset and split of what is trained on, each with its weight, and of what is tested on."""
  tasks_lib.check_mixture(c.mixture)
  train = {tasks_lib.part(name, c.train_split): weight
           for name, weight in c.mixture or ((c.dataset, 1.0),)}
  return train, [tasks_lib.part(name, c.test_split) for name in c.test or [name for name, _ in train]]


def _from_scratch(config: ml_collections.ConfigDict) -> tuple[tokenizer_lib.Characters, policy.Config]:
  """Tokenizer and sizes of a policy that is no checkpoint: for the characters of its datasets."""
  knobs, (train, test) = config.policy.to_dict(), _parts(config.tasks)
  tokenizer = tokenizer_lib.Characters(tasks_lib.alphabet([dataset for dataset, _ in (*train, *test)]))
  del knobs['checkpoint']
  found = policy.Config(**knobs | {'vocab_size': tokenizer.vocab_size})
  _check_declared(config.policy, found)
  return tokenizer, found


def _check_declared(c: ml_collections.ConfigDict, found: policy.Config) -> None:
  """Raises ValueError where a config declares other sizes than are found."""
  wrong = [f'policy.{name}={c[name]} where there is {getattr(found, name)}' for name in _SIZES
           if c[name] != getattr(found, name)] if c.vocab_size else []
  if wrong:
    raise ValueError(f'{c.checkpoint or "the tokenizer"} has not the declared sizes: {", ".join(wrong)}; '
                     'correct them, or set policy.vocab_size=0, which declares none')


def _checked(config: ml_collections.ConfigDict, tokenizer, trained: policy.Config,
             devices: Sequence[Any] | None = None) -> Setup:
  """A setup but for its tasks. Raises ValueError for knobs that no run could follow."""
  _check_ranges(config)
  alloc = _alloc(config)
  sample_config = sample.Config(**config.sample, stop_ids=tokenizer.stop_ids if tokenizer else (0,))
  evaluate_config = sample_config._replace(
      **{name: config.evaluate[name] for name in ('temperature', 'top_k', 'top_p', 'min_p')})
  update_config = update.Config(grpo=_loss(config), **config.optimizer, **config.pack,
                                temperature=config.sample.temperature)
  sft_config = update_config._replace(
      learning_rate=config.warm_start.learning_rate, warmup_steps=config.warm_start.warmup_steps,
      schedule='linear' if config.warm_start.num_steps else 'constant',
      decay_steps=config.warm_start.num_steps, final_rate=0.0, temperature=1.0)
  rewards_config = rewards.Config(**config.rewards)
  meshes = sharding.meshes(sharding.Config(**config.mesh), trained,
                           rollouts=config.alloc.rollouts_per_step, devices=devices)
  rewards.check(rewards_config, config.sample.completion_length)
  evaluate.check(**{
      name: config.evaluate[name] for name in ('rollouts', 'temperature', 'pass_at', 'maj_at')})
  sample.check(sample_config)
  sample.check(evaluate_config, 'evaluate')
  for checked in (update_config, sft_config):
    update.check(checked)
  update.microbatch_shape(
      config.sample.prompt_length, config.sample.completion_length,
      config.alloc.rollouts_per_step / config.tasks.per_step, update_config)
  return Setup(
      config=config, alloc=alloc, checkpoint=config.policy.checkpoint, tokenizer=tokenizer,
      policy=policy.without_lora(trained), trained=trained,
      sample=sample_config, evaluate=evaluate_config, rewards=rewards_config, update=update_config,
      warm_start=warm_start.Config(
          num_steps=config.warm_start.num_steps, per_step=config.warm_start.per_step,
          checkpoint_every=config.warm_start.checkpoint_every, update=sft_config),
      meshes=meshes)


def _check_ranges(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for a knob of the loop itself out of its range."""
  for name, low in (('seed', 0), ('num_steps', 0), ('evaluate.every', 0), ('evaluate.rollouts', 1),
                    ('evaluate.tasks', 1), ('evaluate.tasks_per_batch', 1), ('tasks.per_step', 1),
                    ('checkpoint.every', 1), ('checkpoint.keep', 1), ('warm_start.num_steps', 0),
                    ('warm_start.per_step', 1), ('warm_start.checkpoint_every', 1),
                    ('alloc.nu_every', 0)):
    section, _, knob = name.rpartition('.')
    x = (config[section] if section else config)[knob]
    if x < low:
      raise ValueError(f'{name}={x} is below {low}')
  if 0 < config.warm_start.num_steps <= config.warm_start.warmup_steps:
    raise ValueError(f'warm_start.num_steps={config.warm_start.num_steps} must be 0 or above '
                     f'warm_start.warmup_steps={config.warm_start.warmup_steps}')
  if not config.sample.temperature > 0:
    raise ValueError(f'sample.temperature={config.sample.temperature} must be above 0: '
                     'rollouts of a greedy policy are all the same')
  for name, all_ in (('top_k', 0), ('top_p', 1), ('min_p', 0)):
    if config.sample[name] != all_:
      raise ValueError(
          f'sample.{name}={config.sample[name]} leaves tokens out, so that rollouts would come from '
          'another distribution than the policy that learns from them; set it to '
          f'{all_}, and evaluate.{name} for evaluations')


def _preset(section: str, name: str, presets: dict[str, dict[str, Any]]) -> dict[str, Any]:
  if name not in presets:
    raise ValueError(f'{section}.preset={name!r} is not one of {tuple(presets)}')
  return presets[name]


def _loss(config: ml_collections.ConfigDict) -> grpo.Config:
  """The section grpo with its preset. Raises ValueError for a preset there is not."""
  knobs = config.grpo.to_dict()
  return grpo.Config(**knobs | _preset('grpo', knobs.pop('preset'), grpo.PRESETS))


def _alloc(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The section alloc with its preset. Raises ValueError for what no step could follow."""
  alloc = config.alloc.copy_and_resolve_references()
  M, R, C = config.tasks.per_step, alloc.rollouts_per_step, config.sample.completion_length
  for name, known in (('estimate', estimate.ESTIMATES), ('cost', ('rollouts', 'tokens'))):
    if alloc[name] not in known:
      raise ValueError(f'alloc.{name}={alloc[name]!r} is not one of {known}')
  alloc.update(_preset('alloc', alloc.preset, PRESETS))
  if not 0 < alloc.discount <= 1:
    raise ValueError(f'alloc.discount={alloc.discount} is not in (0, 1]')
  if alloc.nu_every and alloc.value != 'snr':
    raise ValueError(f"alloc.nu_every={alloc.nu_every} measures what alloc.value={alloc.value!r} does "
                     "not read; set alloc.value='snr', or alloc.nu_every=0")
  allocate.check(M, R, alloc.low, alloc.high, alloc.rule)
  if alloc.cost == 'tokens' and not alloc.low * M <= alloc.tokens_per_step <= R * C:
    raise ValueError(
        f'alloc.tokens_per_step={alloc.tokens_per_step} is not in {alloc.low * M}..{R * C}: from a '
        'token for each of alloc.low * tasks.per_step rollouts to sample.completion_length for each of '
        'alloc.rollouts_per_step')
  _budgets(alloc, estimate.init(M), np.arange(M), C)  # and what the allocator itself refuses
  return alloc


def _budgets(alloc: ml_collections.ConfigDict, stats: types.TaskStats, index_M: np.ndarray,
             completion_length: int) -> np.ndarray:
  """budget_M: how many rollouts each task of a step gets, by what is known of them."""
  success_rate_M = (estimate.posterior if alloc.estimate == 'posterior' else estimate.window)(
      stats, index_M)
  total, cost_M = alloc.rollouts_per_step, None
  if alloc.cost == 'tokens':
    # No rollout counts less than a share of one in R, so that there are never more than R.
    cost_M = np.maximum(estimate.tokens(stats, index_M, default=completion_length),
                        alloc.tokens_per_step / alloc.rollouts_per_step)
    # Where the policy has become so wordy that the least budgets cost more, they are what is spent.
    total = max(alloc.tokens_per_step, alloc.low * cost_M.sum())
  return allocate.budgets(
      success_rate_M, total, low=alloc.low, high=alloc.high, rule=alloc.rule, value=alloc.value,
      nu=estimate.nu(stats, default=alloc.nu), solver=alloc.solver, cost_M=cost_M)


def learning(setup: Setup) -> contextlib.AbstractContextManager:
  """Sets the mesh to learn on."""
  return jax.set_mesh(setup.meshes[0]) if setup.meshes else contextlib.nullcontext()


def sampling(setup: Setup) -> contextlib.AbstractContextManager:
  """Sets the mesh to sample on."""
  return jax.set_mesh(setup.meshes[1]) if setup.meshes else contextlib.nullcontext()


def _checkpoints(setup: Setup, workdir: str, *stage: str) -> str:
  """The directory of the checkpoints, of a stage if one is named."""
  return os.path.join(setup.config.checkpoint.directory or workdir, *stage, 'checkpoints')


def workers(setup: Setup) -> rewards.Workers:
  """The verifier processes of a config."""
  return rewards.Workers(
      setup.rewards, completion_length=setup.sample.completion_length,
      verifiers=rewards.names([*setup.train_tasks, *setup.test_tasks], setup.rewards))


def evaluation(setup: Setup, params: Any, key: jax.Array, pool: rewards.Workers
               ) -> dict[str, Any]:
  """evaluate.summarize of the test tasks."""
  c, tasks = setup.config.evaluate, setup.test_tasks
  with learning(setup):
    key = jax.random.fold_in(key, _EVALUATE)
  with sampling(setup):
    found = evaluate.outcomes(
        setup.policy, params, tasks, sharding.move(key), setup.evaluate, pool, setup.tokenizer,
        rollouts=c.rollouts, batch=min(c.tasks_per_batch, len(tasks)), answers=bool(c.maj_at))
  return evaluate.summarize(found, tasks, [task.source for task in tasks],
                            passes=c.pass_at, majorities=c.maj_at)


def start(setup: Setup, workdir: str, checkpoints: checkpoint.Checkpoints,
          stopping: Callable[[], bool] = lambda: False
          ) -> tuple[types.TrainState, types.TaskStats, Any]:
  """State and statistics of the latest checkpoint, or before any training; and the base.

  A checkpoint holds what is trained and no more. The base, which adapters are added to and a KL
  divergence is taken from, is the initial policy: it is made again from what training started from (a
  published checkpoint, or the seed) and the warm start's own checkpoint; {} where nothing needs it.
  """
  c, key = setup.trained, jax.random.key(setup.config.seed)
  init_key = jax.random.fold_in(key, _INIT)
  needs_base = c.lora_rank or setup.update.grpo.kl_coef
  is_new = checkpoints.latest() is None
  stats = estimate.init(len(setup.train_tasks))
  params = base = {}
  with learning(setup):
    if needs_base or is_new:
      params = (weights.params(setup.checkpoint, setup.policy) if setup.checkpoint
                else policy.init(setup.policy, init_key))
      if setup.warm_start_tasks:
        params = warm_start.run(
            params, setup.warm_start_tasks, setup.tokenizer, setup.policy, setup.sample,
            setup.warm_start, os.path.join(workdir, 'warm_start'),
            _checkpoints(setup, workdir, 'warm_start'), seed=setup.config.seed, stopping=stopping)
    if needs_base:
      base = jax.tree.map(jnp.copy, params)  # as updates donate what is trained

    def begin(params):
      trained = policy.split(c, policy.init(c, init_key))[0] if c.lora_rank else params
      return update.init(trained, key, setup.update)

    if is_new:
      return begin(params), stats, base
    state = jax.eval_shape(lambda: begin(policy.init(setup.policy, init_key)))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    of = (sharding.of(setup.meshes[0], state) if setup.meshes else jax.tree.map(lambda _: one, state))
    return *checkpoints.restore(jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, of), stats), base


def _served(setup: Setup, state: types.TrainState, base: Any) -> Any:
  """What the sampler reads of the policy as it stands."""
  with learning(setup):
    merged = policy.merge(setup.trained, state.params, base)
  with sampling(setup):
    return policy.sampling_params(setup.policy, merged)


def evaluate_checkpoint(setup: Setup, workdir: str) -> dict[str, Any]:
  """What evaluation.json holds of a workdir's latest checkpoint: step, path, the knobs that matter, and
  evaluate.summarize. Raises ValueError where there is no checkpoint."""
  directory = _checkpoints(setup, workdir)
  with checkpoint.Checkpoints(directory) as checkpoints:
    latest = checkpoints.require()
    state, _, base = start(setup, workdir, checkpoints)
  params = _served(setup, state, base)
  config = json.loads(setup.config.to_json())  # tuples are lists, as they will be read
  with workers(setup) as pool:
    return {
        'step': int(state.step),
        'checkpoint': os.path.join(checkpoint.absolute(directory), str(latest)),
        'config': {name: config[name]
                   for name in ('seed', 'tasks', 'policy', 'sample', 'rewards', 'evaluate')},
        **evaluation(setup, params, state.key, pool)}


def export_checkpoint(setup: Setup, workdir: str, directory: str) -> int:
  """Writes a workdir's latest checkpoint as weights.save does, and returns its step. Raises ValueError
  where there is no checkpoint, or the policy is of no published family."""
  with checkpoint.Checkpoints(_checkpoints(setup, workdir)) as checkpoints:
    checkpoints.require()
    state, _, base = start(setup, workdir, checkpoints)
    with learning(setup):
      merged = policy.merge(setup.trained, state.params, base)
  weights.save(directory, setup.policy, merged, source=setup.checkpoint or None)
  return int(state.step)


def claim(setup: Setup, workdir: str) -> None:
  """Makes the workdir this run's. Raises ValueError if it cannot be written or is another run's, and
  RuntimeError where the processes of a run have other configs or data."""
  # Statistics are kept by row: the rows must be the tasks that they were.
  ids = hashlib.sha256('\n'.join(task.id for task in setup.train_tasks).encode()).hexdigest()
  processes.check_same('config and training tasks', f'{setup.config.to_json()}{ids}'.encode())
  error = None
  if processes.is_first():
    try:
      checkpoint.claim(workdir, setup.config.to_dict() | {'train_ids': ids}, may_change=MAY_CHANGE)
    except ValueError as found:
      error = found
  if processes.any_of(error is not None):
    raise error or ValueError(f'--workdir={workdir} was refused; see the message of process 0')


def train(setup: Setup, workdir: str) -> None:
  """Trains to config.num_steps in `workdir`, from where its last checkpoint stands.

  Writes metrics.jsonl, TensorBoard events, checkpoints/ and warm_start/.

  Raises:
    ValueError: the workdir cannot be written or holds a run of another config.
    FloatingPointError: the loss or the gradient is not finite.
    SystemExit: SIGTERM or SIGINT came; all is saved.
  """
  c, alloc = setup.config, setup.alloc
  claim(setup, workdir)
  R = alloc.rollouts_per_step
  with contextlib.ExitStack() as context:
    stopping = context.enter_context(_StopSignal())
    pool = context.enter_context(workers(setup))
    checkpoints = context.enter_context(checkpoint.Checkpoints(
        _checkpoints(setup, workdir), keep=c.checkpoint.keep))
    state, stats, base = start(setup, workdir, checkpoints, stopping)
    first_step = int(state.step)
    record = context.enter_context(_Record(setup, workdir, first_step))
    key, noise_key = (jax.random.fold_in(state.key, stream) for stream in (_ROLLOUTS, _NOISE))

    def evaluated(step):
      if not processes.any_of(record.has_evaluation(step)):
        params = _served(setup, state, base)
        record.evaluation(step, evaluate.record(evaluation(setup, params, state.key, pool)))

    context.enter_context(learning(setup))
    for step in range(first_step, c.num_steps):
      if c.evaluate.every and step % c.evaluate.every == 0 or step == 0:
        evaluated(step)
      tasks_M = tasks_lib.batch(setup.train_tasks, step, per_step=c.tasks.per_step, seed=c.seed,
                                weights=setup.shares)
      prompts = tasks_lib.prompts(tasks_M, c.sample.prompt_length)
      budget_M = _budgets(alloc, stats, prompts.index_M, setup.sample.completion_length)
      expected_M = estimate.tokens(stats, prompts.index_M, default=0.0)
      processes.check_same(f'tasks and budgets of step {step}', prompts.index_M, budget_M, expected_M)
      step_key, started = jax.random.fold_in(key, step), time.monotonic()
      with sampling(setup):
        rollouts = sample.rollouts(
            setup.policy, _served(setup, state, base), prompts, budget_M, sharding.move(step_key),
            setup.sample, total=R, expected_M=expected_M)
      record.flush()  # the last step's, while the device samples this one's
      jax.block_until_ready(rollouts.length_R)
      sample_s = time.monotonic() - started
      rollouts = sample.apply_stop_strings(sharding.move(rollouts), setup.tokenizer.decode, setup.sample)
      scores = _scores(setup, pool, tasks_M, rollouts)
      if alloc.nu_every and step % alloc.nu_every == 0:
        noise = update.gradient_noise(
            state.params, base, rollouts, scores.verdict_R, jax.random.fold_in(noise_key, step),
            setup.trained, setup.update)
      state, measured = update.step(state, rollouts, scores.reward_R, base, setup.trained, setup.update)
      record.step(step, stats, budget_M, rollouts, sample_s, scores, measured)
      stats = estimate.observe(stats, prompts.index_M, rollouts.task_R, scores.verdict_R,
                               rollouts.length_R, discount=alloc.discount)
      if alloc.nu_every and step % alloc.nu_every == 0:
        stats = estimate.observe_gradient(stats, noise, discount=alloc.discount ** alloc.nu_every)
      done, stop = step + 1, processes.any_of(stopping())
      if stop or done == c.num_steps or done % c.checkpoint.every == 0:
        record.flush()  # which stops at a loss that is not finite, before it is saved
        checkpoints.save(done, state, stats)
      if stop:
        raise SystemExit(f'stopped after {done} of {c.num_steps} steps; '
                         'run the same command again to go on')
    evaluated(c.num_steps)


def _scores(setup: Setup, pool: rewards.Workers, tasks_M: Sequence[types.Task],
            rollouts: types.Rollouts) -> rewards.Scores:
  """Verdicts and rewards of a step, of all processes; 0 where there is no rollout."""
  task_R, length_R = np.asarray(rollouts.task_R), np.asarray(rollouts.length_R)
  row_X, texts = sample.texts(rollouts, setup.tokenizer.decode)
  scores = pool.score(texts, [tasks_M[m] for m in task_R[row_X]], length_R[row_X])
  merge = lambda x_X: processes.merge_rows(row_X, x_X, len(task_R))
  timeouts, errors = processes.gather(np.array([scores.timeouts, scores.errors])).sum(axis=0)
  return rewards.Scores(merge(scores.verdict_R), merge(scores.reward_R), int(timeouts), int(errors))


class _StopSignal:
  """Notes SIGTERM and SIGINT, so that a step is finished and saved; a second SIGINT interrupts."""

  def __enter__(self):
    self._asked = False
    if threading.current_thread() is threading.main_thread():
      self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
    else:
      self._old = {}
    return lambda: self._asked

  def _note(self, number, frame):
    if self._asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._asked = True

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)


class _Record:
  """The run's metrics.jsonl, events and progress bar. A step's record is written one step late, so
  that the device never waits for it."""

  def __init__(self, setup: Setup, workdir: str, first_step: int):
    self._setup, self._last = setup, None
    # An evaluation of step k was taken before that step.
    self._writer = metrics.Writer(
        workdir, keep=lambda r: r['step'] < first_step + ('reward_mean' not in r),
        first_step=first_step)
    self._bar = processes.progress(setup.alloc.preset or setup.alloc.rule, first_step,
                                 setup.config.num_steps)
    self._shown = {}
    # wall_s counts seconds from here, and leaves out the time in which a run was stopped.
    before = [r['wall_s'] for r in self._writer.records]
    self._start = time.monotonic() - max(before, default=0.0)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()
    self._writer.close()

  def has_evaluation(self, step: int) -> bool:
    return any(r['step'] == step and f'eval/avg@{self._setup.config.evaluate.rollouts}' in r
               for r in self._writer.records)

  def evaluation(self, step: int, measured: dict[str, float]) -> None:
    self.flush()
    self._writer.write({'step': step, 'wall_s': self._wall_s(), **measured})
    k = self._setup.config.evaluate.rollouts
    self._shown['eval'] = f'{measured[f"eval/avg@{k}"]:.3f}'
    if not self._bar.disable:
      self._bar.write(f'step {step}: avg@{k} of held-out tasks {measured[f"eval/avg@{k}"]:.3f} '
                      f'± {measured[f"eval/avg@{k}_stderr"]:.3f}')

  def step(self, step, stats, budget_M, rollouts, sample_s, scores, measured) -> None:
    """Notes a step. stats: from before it. What is expected is so under the posterior, whatever the
    estimate that the budgets came from, so that rules can be compared."""
    alloc, n = self._setup.alloc, int(budget_M.sum())
    success_rate_M = estimate.posterior(stats, rollouts.prompts.index_M)
    nu = estimate.nu(stats, default=alloc.nu)
    uniform_M = allocate.budgets(success_rate_M, n, low=1, high=n, rule='uniform')
    objective = lambda budget_M: allocate.objective(success_rate_M, budget_M, alloc.value, nu)
    mixed_M = grpo.mixed_tasks(scores.verdict_R, rollouts.task_R, len(budget_M))
    bins = np.minimum((estimate.mean_rate(success_rate_M) * 10).astype(int), 9)
    with sampling(self._setup):
      slots = sample.slots(self._setup.sample, len(rollouts.task_R))
    tokens = int(np.asarray(rollouts.length_R).sum())
    self._last = step, measured, {
        'reward_mean': float(scores.reward_R.sum() / n),
        'success_rate': float(scores.verdict_R.sum() / n),
        'effective_gradient_ratio': float(budget_M @ mixed_M / n),
        'expected_gradient_ratio': allocate.expected_gradient_ratio(success_rate_M, budget_M),
        'uniform_gradient_ratio': allocate.expected_gradient_ratio(success_rate_M, uniform_M),
        'mixed_tasks': int(mixed_M.sum()),
        'objective': objective(budget_M),
        'uniform_objective': objective(uniform_M),
        'nu': nu,
        'budget_min': int(budget_M.min()),
        'budget_max': int(budget_M.max()),
        'rollouts_total': n,
        'tokens_generated': tokens,
        'truncated': float(np.sum(np.asarray(rollouts.ended_R) == types.ENDED_LENGTH) / n),
        'slot_utilization': tokens / (int(rollouts.decode_steps) * slots),
        'tail_share': int(rollouts.tail_steps) / int(rollouts.decode_steps),
        'refills': int(rollouts.refills),
        'tokens_per_s': tokens / sample_s,  # of the sampler
        'tokens_prefilled': int(np.asarray(rollouts.prompts.length_M)[budget_M > 0].sum()),
        # The sampled tokens' mean -log p: an unbiased estimate, over all rollouts.
        'entropy': -float(jnp.sum(rollouts.logp_RC)) / tokens,
        'verifier_timeouts': scores.timeouts,
        'verifier_errors': scores.errors,
        # By estimated success rate in ten bins, for the heat map.
        'budget_by_success_rate': [
            float(budget_M[bins == i].mean()) if np.any(bins == i) else None for i in range(10)],
    }

  def flush(self) -> None:
    """Writes the last step's record. Raises FloatingPointError if its update was not finite."""
    if self._last is None:
      return
    step, measured, record = self._last
    self._last = None
    update_metrics = update.summarize(measured)
    for name in ('loss', 'grad_norm'):
      if not math.isfinite(update_metrics[name]):
        raise FloatingPointError(
            f'{name} is {update_metrics[name]} at step {step}; the last checkpoint is from before. '
            'Lower optimizer.learning_rate or optimizer.max_grad_norm, in another --workdir')
    self._writer.write({'step': step, 'wall_s': self._wall_s(), **record, **update_metrics,
                        'compile_count': metrics.compile_count()})
    self._bar.set_postfix(
        reward=f'{record["reward_mean"]:.2f}',
        gradient=f'{record["effective_gradient_ratio"]:.2f}'
                 f' (uniform {record["uniform_gradient_ratio"]:.2f})',
        budgets=f'{record["budget_min"]}-{record["budget_max"]}', **self._shown, refresh=False)
    self._bar.update()

  def _wall_s(self) -> float:
    return round(time.monotonic() - self._start, 3)
