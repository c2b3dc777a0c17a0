"""The update of a step that was skipped, once more and slowly: what is not finite, and where it comes from.

The batch is that of record/bad_steps.py, the policy the latest checkpoint at or before the step. Each mini-batch is
learnt from on its own, from that policy: loss and gradient in float32, and in the dtype of the run if it is another.
Of the first microbatch that is not finite each operation is looked at (learning/locate.py).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kr_jax import completions
from kr_jax import files
from kr_jax import knobs
from kr_jax import mirror
from kr_jax import prepare
from kr_jax import rewards
from kr_jax import run_config
from kr_jax import sharding
from kr_jax import state as state_lib
from kr_jax.learning import guard
from kr_jax.learning import locate
from kr_jax.learning import update
from kr_jax.model import policy
from kr_jax.prepare import Setup
from kr_jax.record import bad_steps
from kr_jax.record import checkpoint
from kr_jax.record import metrics
from kr_jax.record import saved
from kr_jax.types import Array

_SHOWN = 3  # rollouts of each kind
_ALL_FINITE = ('all of this is finite: what is said of the run is of another policy (an earlier mini-batch had moved '
               'it), or of what the update would have made of it')
_LONGEST = 500  # characters of a text
_ARRAYS = 8  # arrays whose gradients are shown, but for those that are not finite, which all are


class _Replayed(NamedTuple):
  """A batch as an update reads it, and the policy that it is learnt from."""

  trained: Any
  base: Any
  experience: update.Experience
  tokens: update.Tokens
  first: np.ndarray  # the first microbatch of each mini-batch, and the end


def lines(workdir: str, step: int | None = None) -> Iterator[str]:
  """What is to be known of a step whose update was skipped, line by line.

  Args:
    workdir: on this machine.
    step: None: the newest whose batch is kept.

  Raises ValueError where no batch is kept, or there is no checkpoint of the run.
  """
  batch = bad_steps.load(workdir, step)
  setup = prepare.without_tasks(knobs.as_dict(run_config.recorded(workdir)), workdir)
  scores = rewards.Scores(batch.outcome_R, batch.reward_R, ())
  _check(batch, setup)
  yield from _about(workdir, batch, scores)
  mesh = None if jax.default_backend() == 'cpu' or jax.device_count() == 1 else sharding.mesh(fsdp=jax.device_count())
  with sharding.on(mesh):
    trained, base, said = _policy(setup, workdir, batch.step, mesh)
    yield from said
    verified = completions.keep(batch.rollouts, scores.verified_R)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(setup.config.seed), state_lib.KEEP), batch.step)
    plain = setup.trained.replace(dtype='float32')
    experience, tokens, packed, _ = update.read(
        trained, verified, batch.reward_R, base, plain, setup.update, batch.past, key)
    replayed = _Replayed(trained, base, experience, tokens, packed.first)
    is_finite = True
    for dtype in dict.fromkeys(('float32', setup.trained.dtype)):
      is_finite &= yield from _updates(replayed, setup.trained.replace(dtype=dtype), setup.update)
    if is_finite:
      yield _ALL_FINITE
    yield from _rollouts(replayed, plain, setup, batch)


def _check(batch: bad_steps.Batch, setup: Setup) -> None:
  """Raises ValueError where a batch is of another policy than the run's."""
  r = batch.rollouts
  most = max(x.max(initial=0) for x in (r.token_RC, r.prompts.token_MP))
  if most >= setup.policy.vocab_size:
    raise ValueError(f'the batch of step {batch.step} has token {most}, and the vocabulary of the run '
                     f'{setup.policy.vocab_size} tokens: it is of another run; delete it')


def _about(workdir: str, batch: bad_steps.Batch, scores: rewards.Scores) -> Iterator[str]:
  r = batch.rollouts
  live_R = r.length_R > 0
  yield (f'step {batch.step}: {live_R.sum()} rollouts of {np.count_nonzero(batch.budget_M)} tasks, '
         f'{scores.verified_R.sum()} of them verified; rewards {_range(batch.reward_R[scores.verified_R])}')
  for record in metrics.read(os.path.join(workdir, 'metrics.jsonl')):
    for said in record.get('alarms', ()) if record.get('step') == batch.step else ():
      if 'skipped' in said:
        yield f'in the run: {said.partition(". Look at it")[0]}'
  mask_RC = np.arange(r.token_RC.shape[1])[None] < r.length_R[:, None]
  yield f"the sampler's log-probabilities: {_range(r.logp_RC[mask_RC])}"


def _policy(setup: Setup, workdir: str, step: int, mesh: Any) -> tuple[Any, Any, list[str]]:
  """The trained parameters before a step, as near as there is a checkpoint; the base; and what is to be said of it."""
  directory = state_lib.checkpoint_directory(setup, workdir)
  steps = saved.steps(directory)
  if not steps:
    raise ValueError(f'{directory} holds no checkpoint; the policy that step {step} learnt from is not known')
  before = [at for at in steps if at <= step]
  at = max(before) if before else min(steps)
  shapes = jax.eval_shape(lambda: policy.split(setup.trained, policy.init(setup.trained, jax.random.key(0)))[0])
  with checkpoint.Checkpoints(directory, writes=False, step=at) as checkpoints:
    _, trained = checkpoints.params(sharding.shapes_on(mesh, shapes))
  of = {True: f'{step - at} steps before it' if at < step else 'as the step began', False: 'after it, as there is none '
        'from before'}[at <= step]
  said = [f'policy: checkpoint {files.join(mirror.url(directory), str(at))}, {of}']
  base = state_lib.initial_policy(setup, workdir, mesh) if setup.needs_base else {}
  for name, tree in (('parameters', trained), ('base', base)):
    if tree:
      largest_X = np.asarray(guard.largest(tree))
      most = int(largest_X.argmax())
      said.append(f'largest of the {name}: {largest_X[most]:.4g}, in {guard.names(tree)[most]}')
  return trained, base, said


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradient(policy_config: policy.Config, config: update.Config, trained: Any, arguments: Any, tokens: update.Tokens,
              first: Array, end: Array) -> tuple[Array, Any]:
  """The loss of microbatches first, ..., end - 1, and its gradient."""
  def of(trained_and_arguments, microbatch):
    loss = lambda *given: update.loss_and_counts(policy_config, config, *given, microbatch)[0]
    return jax.value_and_grad(loss)(*trained_and_arguments)

  return update.sum_over_microbatches(of, (trained, arguments), tokens, first, end)


def _updates(r: _Replayed, policy_config: policy.Config, config: update.Config) -> Generator[str, None, bool]:
  """Loss and gradient of each mini-batch; where they are not finite, where that begins. Returns whether all are."""
  is_finite = True
  of = lambda first, end: _gradient(policy_config, config, r.trained, (r.base, r.experience), r.tokens, first, end)
  for u, (first, end) in enumerate(zip(r.first[:-1], r.first[1:])):
    loss, gradient = of(first, end)
    name_X, largest_X = guard.names(gradient), np.asarray(guard.largest(gradient))
    squares = sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(gradient))
    yield (f'mini-batch {u + 1} of {len(r.first) - 1} in {policy_config.dtype}: {end - first} microbatches, loss '
           f'{float(loss):.6g}, gradient norm {squares ** 0.5:.6g}')
    bad_X = ~np.isfinite(largest_X)
    shown = [*np.flatnonzero(bad_X), *[x for x in np.argsort(-largest_X) if not bad_X[x]][:_ARRAYS]]
    yield from (f'  {"NOT FINITE" if bad_X[x] else "finite"}  largest |gradient| {largest_X[x]:.4g}  {name_X[x]}'
                for x in shown)
    if np.isfinite(loss) and np.isfinite(squares):
      continue
    is_finite = False
    for i in range(first, end):
      loss, gradient = of(i, i + 1)
      if np.isfinite(loss) and guard.first_bad(gradient) is None:
        continue
      yield f'  microbatch {i - first + 1} has the first of it; by operation, the first that gives'
      microbatch = update.microbatch_of(r.tokens, i)
      loss_of = lambda *given: update.loss_and_counts(policy_config, config, *given, microbatch)[0]
      found = locate.places(jax.value_and_grad(loss_of), r.trained, (r.base, r.experience))
      yield from (f'    {place}' for place in found)
      if not found:
        yield '    nothing: what it takes is not finite: parameters, log-probabilities of the sampler, or rewards'
      break
  return is_finite


def _rollouts(r: _Replayed, plain: policy.Config, setup: Setup, batch: bad_steps.Batch) -> Iterator[str]:
  """The rollouts that the policy gives other log-probabilities than the sampler did, and those that weigh most."""
  logp = np.asarray(update.logps(r.trained, r.base, r.tokens, r.first[-1], plain, setup.update))
  t = jax.tree.map(np.asarray, r.tokens)
  rollout_X, gap_X = t.rollout_BT[t.mask_BT], (logp - t.sampler_logp_BT)[t.mask_BT]
  target_X, logp_X = t.target_BT[t.mask_BT], logp[t.mask_BT]
  size_X = np.nan_to_num(np.abs(gap_X), nan=np.inf, posinf=np.inf)
  yield 'largest |log-probability now, minus when it was sampled|, of the tokens that are learnt from:'
  seen = []
  for x in np.argsort(-size_X, kind='stable'):
    if (row := int(rollout_X[x])) not in seen:
      seen.append(row)
      token = setup.tokenizer.decode(np.array([target_X[x]])) if setup.tokenizer else ''
      yield (f'  {gap_X[x]:.4g}: token {target_X[x]} {token!r}, now {logp_X[x]:.4g}; '
             f'{_of_rollout(r, batch, row, setup)}')
    if len(seen) == _SHOWN:
      break
  advantage_R = np.asarray(r.experience.advantage_R)
  yield 'largest |advantage|:'
  for row in np.argsort(-np.nan_to_num(np.abs(advantage_R), nan=np.inf), kind='stable')[:_SHOWN].tolist():
    yield f'  {_of_rollout(r, batch, row, setup)}'


def _of_rollout(r: _Replayed, batch: bad_steps.Batch, row: int, setup: Setup) -> str:
  rollouts, m = batch.rollouts, int(batch.rollouts.task_R[row])
  length = int(rollouts.length_R[row])
  text = setup.tokenizer.decode(rollouts.token_RC[row, :length]) if setup.tokenizer else ''
  task = batch.ids[m] if m < len(batch.ids) else 'of no task'
  return (f'rollout {row} of {task}: {rewards.OUTCOMES[batch.outcome_R[row]]}, reward '
          f'{batch.reward_R[row]:g}, advantage {float(r.experience.advantage_R[row]):.4g}, {length} tokens: '
          f'{text[:_LONGEST]!r}')


def _range(x: np.ndarray) -> str:
  """The least and the largest number, and how many are not finite."""
  bad = np.count_nonzero(~np.isfinite(x))
  return (f'{x.min():.4g} to {x.max():.4g}' if x.size else 'none') + (f', {bad} of them NOT FINITE' if bad else '')
