"""The state of a run: before any training or from its latest checkpoint; and what is made of it.

Randomness: every key is folded from (config.seed, stream, step), none is carried along; a resumed run
draws what the uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import json
import os
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp

from kr_jax import evaluate
from kr_jax import files
from kr_jax import knobs
from kr_jax import mirror
from kr_jax import phases
from kr_jax import prior_rates
from kr_jax import processes
from kr_jax import rewards
from kr_jax import sharding
from kr_jax import tasks as tasks_lib
from kr_jax import types
from kr_jax import warm_start
from kr_jax.allocation import estimate
from kr_jax.costs import arithmetic
from kr_jax.costs import programs
from kr_jax.learning import guard
from kr_jax.learning import update
from kr_jax.model import decode
from kr_jax.model import export
from kr_jax.model import families
from kr_jax.model import policy
from kr_jax.model import pretrained
from kr_jax.model import weights
from kr_jax.prepare import Setup
from kr_jax.record import checkpoint
from kr_jax.record import claim as claim_lib

SOURCE_VERSION = 'source_version'  # in config.json: pretrained.version of policy.checkpoint, as the run began
# Streams of random keys.
INIT, ROLLOUTS, EVALUATE, NOISE, KEEP = range(5)
# Knobs that say which policy a run trains; those of them that say how it is computed may change.
_OF_POLICY = ('policy', 'seed', 'tasks.dataset', 'tasks.mixture', 'tasks.test', 'warm_start.num_steps',
              'sample.prompt_length', 'sample.completion_length')
_OF_COMPUTATION = ('policy.dtype', 'policy.remat')

_STRATUM = 32  # tasks of a dataset and a difficulty that share a prior of their own, at least


def checkpoint_directory(setup: Setup, workdir: str, *stage: str) -> str:
  """Where the checkpoints are, of a stage if one is named. workdir: as it was given, or the directory of its record."""
  return files.join(mirror.url(setup.config.checkpoint.directory or workdir), *stage, 'checkpoints')


def workers(setup: Setup) -> rewards.Workers:
  """The verifier processes of a config."""
  c = setup.config
  batches = tasks_lib.considered(c.tasks) // c.tasks.per_step if c.alloc.rule == 'dynamic' else c.alloc.waves
  return rewards.Workers(
      setup.rewards, completion_length=setup.sample.completion_length, calls_a_step=batches,
      verifiers=rewards.names([*setup.train_tasks, *setup.test_tasks], setup.rewards))


def check_workers(setup: Setup) -> None:
  """Raises ValueError where processes of verifiers do not start or cannot import a verifier of the user's."""
  names = rewards.names([*setup.train_tasks, *setup.test_tasks], setup.rewards)
  if any(rewards.verifiers.is_imported(name) for name in names):
    try:
      workers(setup).close()
    except RuntimeError as error:  # the import ended its process, or does not end
      raise ValueError(f'rewards.verifier={setup.rewards.verifier!r}: {error}') from error


def _initial_params(setup: Setup, workdir: str, stopping: processes.StopSignal) -> Any:
  """Parameters before reinforcement learning: a checkpoint's or random ones, after the warm start."""
  key = jax.random.fold_in(jax.random.key(setup.config.seed), INIT)
  source = setup.config.policy.checkpoint
  params = weights.params(source, setup.policy) if source else policy.init(setup.policy, key)
  if source:
    guard.check_params(params, f'policy.checkpoint={source!r}')
  if setup.warm_start_tasks:
    with phases.phase('warm_start', whole=True):
      params = warm_start.run(
          params, setup.warm_start_tasks, setup.tokenizer, setup.policy, setup.sample,
          setup.config.warm_start, setup.sft, os.path.join(workdir, 'warm_start'),
          checkpoint_directory(setup, workdir, 'warm_start'), seed=setup.config.seed, stopping=stopping,
          max_bad_steps=setup.config.train.max_bad_steps, minutes=setup.config.checkpoint.minutes)
  return params


def _check_revision(setup: Setup, workdir: str) -> None:
  """Raises ValueError where the published checkpoint has another revision than the run began with, or was overwritten
  in its bucket since, and is read again."""
  began = claim_lib.recorded(workdir, 'policy.checkpoint')
  if pretrained.is_of_hub(began) and began != setup.config.policy.checkpoint:
    raise ValueError(f'the run in {workdir} began with {began}, not with {setup.config.policy.checkpoint!r}; set '
                     f'policy.checkpoint={began!r}')
  source, began = setup.config.policy.checkpoint, claim_lib.recorded(workdir, SOURCE_VERSION)
  if began is not None and pretrained.version(source) != began:
    changed = f'policy.checkpoint={source!r} has been overwritten since the run in {workdir} began'
    if setup.needs_base:
      raise ValueError(f'{changed}: its adapters, or its KL divergence, are of what was there. Start another run; or '
                       f'put that at another path, and correct policy.checkpoint and {SOURCE_VERSION} in config.json')
    logging.warning('%s; the run goes on from its own checkpoint, with the tokenizer that is there now', changed)


def initial_stats(setup: Setup) -> types.TaskStats:
  """What is known of the training tasks before a rollout."""
  c = setup.config
  return estimate.init(
      len(setup.train_tasks), groups=estimate.recalibration_groups(c.tasks.per_step, c.alloc.recalibrate),
      stratum_I=prior_rates.strata(setup.train_tasks, _STRATUM), prior_rate_I=setup.prior_rate_I,
      prior_rollouts=c.tasks.prior_rollouts)


def start(setup: Setup, workdir: str, checkpoints: checkpoint.Checkpoints,
          stopping: processes.StopSignal = processes.NEVER
          ) -> tuple[types.TrainState, types.TaskStats, Any]:
  """State and statistics of the latest checkpoint, or before any training; and the base.

  A checkpoint holds what is trained and no more. The base, which adapters are added to and a KL
  divergence is taken from, is the initial policy: it is made again from what training started from (a
  published checkpoint, or the seed) and the warm start's own checkpoint; {} where nothing needs it.

  Raises ValueError where the published checkpoint has another revision than the run began with.
  """
  _check_revision(setup, workdir)
  c, key = setup.trained, jax.random.key(setup.config.seed)
  init_key = jax.random.fold_in(key, INIT)
  stats = initial_stats(setup)
  is_new = checkpoints.latest() is None
  params = base = {}
  with sharding.on(setup.learn_mesh):
    if is_new or setup.needs_base and checkpoints.writes:
      params = _initial_params(setup, workdir, stopping)
    elif setup.needs_base:  # the run may be at work, and go on with its warm start
      params = initial_policy(setup, workdir, setup.learn_mesh)
    if setup.needs_base:
      base = jax.tree.map(jnp.copy, params)  # as updates donate what is trained

    def begin(params):
      trained = policy.split(c, policy.init(c, init_key))[0] if c.lora_rank else params
      return update.init(trained, key, setup.update)

    if is_new:
      state = sharding.place(begin(params))
      checkpoints.prepare(state)
      return state, stats, base
    shapes = jax.eval_shape(lambda: begin(policy.init(setup.policy, init_key)))
    state, stats = checkpoints.restore(sharding.shapes_on(setup.learn_mesh, shapes), stats)
    return state, stats, base


def merged(setup: Setup, state: types.TrainState, base: Any) -> Any:
  """The policy's parameters, its adapters in them."""
  with sharding.on(setup.learn_mesh):
    return policy.merge(setup.trained, state.params, base)


@contextlib.contextmanager
def off_devices(setup: Setup, state: types.TrainState, base: Any) -> Iterator[tuple[types.TrainState, Any]]:
  """State and base on a processor of this machine, where everything is computed while in this; of one process alone.

  Where JAX_PLATFORMS leaves processors out, both stay where they are, and whatever is computed waits for the devices.
  """
  try:
    cpu = jax.local_devices(backend='cpu')[0]
  except RuntimeError:
    with sharding.on(setup.learn_mesh):
      yield state, base
    return
  with jax.default_device(cpu):
    key = jax.random.key(setup.config.seed)  # a copy would ask a program of the devices
    yield jax.device_put(state._replace(key=key), cpu), jax.device_put(base, cpu)


def sampling_params(setup: Setup, state: types.TrainState, base: Any) -> Any:
  """What the sampler reads of the policy as it stands."""
  with phases.phase('reshard'):
    params = merged(setup, state, base)
    with sharding.on(setup.sample_mesh):
      return programs.run(decode.sampling_params, setup.policy, params)


def compression(setup: Setup) -> dict[str, float]:
  """Bytes over bytes: 'weights', the trainer's parameters over those that the sampler reads, copies of heads included;
  'cache', keys and values in float32 over those that the sampler keeps."""
  params = jax.eval_shape(lambda: policy.init(setup.policy, jax.random.key(0)))
  with sharding.on(setup.sample_mesh):
    sampled = jax.eval_shape(functools.partial(decode.sampling_params, setup.policy), params)
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  column = arithmetic.column_bytes(setup.policy, setup.sample.cache)
  return {'weights': size(params) / size(sampled),
          'cache': arithmetic.column_bytes(setup.policy.replace(dtype='float32')) / column}


def perturbed_tasks(setup: Setup) -> dict[str, list[types.Task]]:
  """The test tasks with perturbed prompts, by name of the perturbation.

  Raises ValueError as evaluate.perturbed does.
  """
  return {name: evaluate.perturbed(
      setup.test_tasks, name, setup.tokenizer, prompt_length=setup.evaluate.prompt_length,
      verifier=setup.rewards.verifier) for name in setup.config.evaluate.perturb}


def evaluation(setup: Setup, params: Any, key: jax.Array, pool: rewards.Workers, *,
               perturbed: Mapping[str, Sequence[types.Task]] = {}, stopping: processes.StopSignal = processes.NEVER,
               progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
  """evaluate.summarize of the test tasks, and 'perturbed': evaluate.robustness by name, where there are any.

  Args:
    params: as of `sampling_params`.
    key: of the run.
    perturbed: as of `perturbed_tasks`; each takes as long as an evaluation without.
    stopping: as of evaluate.outcomes.
    progress: called at first and after each batch with the rollouts done and all that there are to do.

  Raises processes.Stopped where it was to stop.
  """
  c, tasks, done = setup.config.evaluate, setup.test_tasks, 0
  with sharding.on(setup.learn_mesh):
    key = jax.random.fold_in(key, EVALUATE)

  def count(rollouts):
    nonlocal done
    done += rollouts
    if progress:
      progress(done, (1 + len(perturbed)) * len(tasks) * c.rollouts)

  count(0)

  def outcomes(of_tasks, answers):
    with sharding.on(setup.sample_mesh):
      return evaluate.outcomes(
          setup.policy, params, of_tasks, sharding.move(key), setup.evaluate, pool, setup.tokenizer,
          rollouts=c.rollouts, batch=min(c.tasks_per_batch, len(tasks)), answers=answers, stopping=stopping,
          progress=count)

  found = outcomes(tasks, bool(c.maj_at))
  summary = evaluate.summarize(
      found, tasks, [task.source for task in tasks], passes=c.pass_at, majorities=c.maj_at)
  if perturbed:
    summary['perturbed'] = {name: evaluate.robustness(found, outcomes(others, False), tasks, others)
                            for name, others in perturbed.items()}
  return summary


def evaluate_checkpoint(setup: Setup, workdir: str, *, step: int | None = None,
                        progress: Callable[[int, int], None] | None = None,
                        stopping: processes.StopSignal = processes.NEVER) -> dict[str, Any]:
  """What evaluation.json holds of a workdir's latest checkpoint: step, path, the knobs that matter, and `evaluation`,
  with perturbed prompts where evaluate.perturb names any.

  Args:
    step: of the checkpoint; None: the latest that is whole.
    progress, stopping: as of `evaluation`.

  Raises ValueError where there is no checkpoint, or prompts cannot be perturbed.
  """
  directory, perturbed = checkpoint_directory(setup, workdir), perturbed_tasks(setup)
  with checkpoint.Checkpoints(directory, writes=False, step=step) as checkpoints:
    checkpoints.require()
    state, _, base = start(setup, workdir, checkpoints)
  params = sampling_params(setup, state, base)
  config = json.loads(json.dumps(knobs.as_dict(setup.config)))  # tuples are lists, as they will be read
  with workers(setup) as pool:
    pool.leave_by(stopping.leave)
    return {
        'step': int(state.step),
        'checkpoint': os.path.join(checkpoint.absolute(directory), str(int(state.step))),
        'config': {name: config[name]
                   for name in ('seed', 'tasks', 'policy', 'sample', 'rewards', 'evaluate')},
        **evaluation(setup, params, state.key, pool, perturbed=perturbed, progress=progress,
                     stopping=stopping)}


def _read_params(c: policy.Config, directory: str, mesh: Any, step: int | None = None) -> tuple[int, Any]:
  """The step and the trained parameters of a checkpoint in a directory. step: None: the latest that is whole."""
  shapes = jax.eval_shape(lambda: policy.split(c, policy.init(c, jax.random.key(0)))[0])
  with checkpoint.Checkpoints(directory, writes=False, step=step) as checkpoints:
    return checkpoints.params(sharding.shapes_on(mesh, shapes))


def initial_policy(setup: Setup, workdir: str, mesh: Any) -> Any:
  """The parameters that reinforcement learning began with: those of the warm start's checkpoint, or what training
  started from.

  setup: as prepare.without_tasks makes it.
  """
  if setup.config.warm_start.num_steps:
    # No earlier one: adapters are of the last.
    return _read_params(setup.policy, checkpoint_directory(setup, workdir, 'warm_start'), mesh,
                        setup.config.warm_start.num_steps)[1]
  return _initial_params(setup, workdir, processes.NEVER)


def export_checkpoint(setup: Setup, workdir: str, directory: str, *, step: int | None = None, dtype: str = '') -> int:
  """Writes a workdir's latest checkpoint as export.save does, and returns its step.

  Args:
    setup: as prepare.without_tasks makes it. The devices of this process are taken as they are, whichever the run had.
    step: of the checkpoint; None: the latest that is whole.
    dtype: as export.save takes it.

  Raises ValueError where there is no checkpoint, the config is not the run's, or the policy is of no published family.
  """
  if changed := claim_lib.changes(
      workdir, knobs.as_dict(setup.config), of=_OF_POLICY, may_change=_OF_COMPUTATION):
    raise ValueError(f'the run in {workdir} trained another policy: {"; ".join(changed)}; set these knobs back (where '
                     f'a checkpoint has moved, correct its path in {os.path.join(workdir, "config.json")})')
  c, source = setup.trained, setup.config.policy.checkpoint
  families.published(setup.policy)  # refused before anything is read
  mesh = sharding.mesh(fsdp=jax.device_count()) if jax.device_count() > 1 else None

  with sharding.on(mesh):
    step, params = _read_params(c, checkpoint_directory(setup, workdir), mesh, step)
    if c.lora_rank:
      params = policy.merge(c, params, initial_policy(setup, workdir, mesh))
    export.save(directory, setup.policy, params, source=source or None, dtype=dtype, tokenizer=setup.tokenizer)
  return step
