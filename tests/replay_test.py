"""The update of a kept batch, once more: of a finished run, with a batch of its tasks that was made here."""

import shutil

import numpy as np
import pytest

from kr_jax import replay
from kr_jax import rewards
from kr_jax import types
from kr_jax.learning import grpo
from kr_jax.record import bad_steps
from kr_jax.record import claim
from kr_jax.record import saved


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy of the finished run, that a batch may be written to."""
  return shutil.copytree(finished, tmp_path / 'run')


def batch_of(workdir, data_dir, step, **changed) -> bad_steps.Batch:
  """Completions of random tokens, of two tasks with both verdicts each."""
  c = claim.run_config(str(workdir))['sample']
  rng, C, P = np.random.default_rng(0), c['completion_length'], c['prompt_length']
  length_R = rng.integers(1, C + 1, 8).astype(np.int32)
  rollouts = types.Rollouts(
      types.Prompts(rng.integers(2, 9, (2, P)).astype(np.int32), np.int32([3, P]), np.int32([0, 1])),
      task_R=np.repeat(np.int32([0, 1]), 4), token_RC=rng.integers(2, 9, (8, C)).astype(np.int32),
      logp_RC=np.full((8, C), -2.5, np.float32), length_R=length_R, ended_R=np.full(8, 2, np.int32),
      decode_steps=np.int32(0))
  of = rewards.OUTCOMES.index
  outcome_R = np.int8([of('right'), of('wrong'), of('wrong'), of('timeout')] * 2)
  return bad_steps.Batch(
      step, rollouts._replace(**changed), outcome_R, np.float32([1, 0, 0, 0] * 2), np.int32([4, 4]),
      grpo.Past(np.float32([0.5, 0.5]), np.float32([1, 1])), ['sums/a', 'sums/b'])


@pytest.mark.slow
def test_a_batch_that_is_finite_is_said_to_be(workdir, data_dir):
  last = saved.steps(str(workdir / 'checkpoints'))[-1]
  bad_steps.save(str(workdir), batch_of(workdir, data_dir, last + 2))
  lines = [*replay.lines(str(workdir))]
  assert lines[0] == f'step {last + 2}: 8 rollouts of 2 tasks, 6 of them verified; rewards 0 to 1'
  assert f'policy: checkpoint {workdir}/checkpoints/{last}, 2 steps before it' in lines
  mini, = [line for line in lines if line.startswith('mini-batch')]
  assert 'in float32: 1 microbatches, loss ' in mini and 'nan' not in mini
  assert replay._ALL_FINITE in lines and not any('NOT FINITE' in line for line in lines)
  assert sum('rollout ' in line and 'advantage' in line and 'sums/' in line for line in lines) == 6


@pytest.mark.exhaustive  # each operation is compiled on its own
def test_a_log_probability_that_is_no_number_is_found(workdir, data_dir):
  """Of one rollout of the second task, which is named with what it says."""
  wanted = batch_of(workdir, data_dir, 0)
  logp_RC = wanted.rollouts.logp_RC.copy()
  logp_RC[5, 0] = np.nan
  bad_steps.save(str(workdir), wanted._replace(rollouts=wanted.rollouts._replace(logp_RC=logp_RC)))
  lines = [*replay.lines(str(workdir), 0)]
  assert '1 of them NOT FINITE' in lines[1] and 'after it, as there is none from before' in lines[2]
  assert any(line.startswith('  NOT FINITE  largest |gradient| ') for line in lines)
  at = next(i for i, line in enumerate(lines) if line.startswith('largest |log-probability now'))
  assert lines[at + 1].startswith('  nan: token ') and 'rollout 5 of sums/b: wrong, reward 0' in lines[at + 1]
  place = next(line for line in lines if line.startswith('    '))
  assert 'learning/' in place or 'not finite' in place


def test_a_batch_of_another_run_is_refused(workdir, data_dir):
  bad_steps.save(str(workdir), batch_of(workdir, data_dir, 0, token_RC=np.full((8, 4), 9999, np.int32),
                                        logp_RC=np.zeros((8, 4), np.float32), length_R=np.full(8, 2, np.int32)))
  with pytest.raises(ValueError, match='has token 9999, and the vocabulary of the run .* of another run'):
    next(replay.lines(str(workdir)))


def test_without_a_batch_or_a_checkpoint_there_is_nothing_to_replay(workdir, data_dir):
  with pytest.raises(ValueError, match='holds no batch: of this run no update was skipped'):
    next(replay.lines(str(workdir)))
  shutil.rmtree(workdir / 'checkpoints')
  bad_steps.save(str(workdir), batch_of(workdir, data_dir, 1))
  with pytest.raises(ValueError, match='holds no checkpoint; the policy that step 1 learnt from is not known'):
    [*replay.lines(str(workdir))]
