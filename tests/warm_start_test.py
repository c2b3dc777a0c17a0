"""Solutions as rollouts, and a stage that learns them. Its stop and resume: train_test.py."""

import jax
import numpy as np
import optax
import pytest

from kr_jax import knobs as knobs_lib
from kr_jax import processes
from kr_jax import sample
from kr_jax import types
from kr_jax import warm_start
from kr_jax.learning import guard
from kr_jax.learning import update
from kr_jax.model import decode
from kr_jax.model import policy
from kr_jax.model import tokenizer
from kr_jax.model.tokenizer import STOP
from kr_jax.record import metrics
from tests import knobs

TOKENIZER = tokenizer.Characters('abc')
SAMPLE = knobs.sampler(slots=8, refill=1, prompt_length=3, completion_length=4)


def task(i, prompt, solution):
  return types.Task(id=f't{i}', index=i, prompt=prompt, answer='', difficulty=1, solution=solution,
                    tokens=TOKENIZER.encode(prompt))


def test_solutions_by_hand():
  rollouts = warm_start.solutions([task(0, 'ab', 'cab'), task(1, 'c', 'a')], TOKENIZER, SAMPLE)
  assert rollouts.token_RC.tolist() == [[4, 2, 3, STOP], [2, STOP, 0, 0]]
  assert rollouts.length_R.tolist() == [4, 2]
  assert rollouts.prompts.token_MP.tolist() == [[2, 3, 0], [4, 0, 0]]
  assert rollouts.task_R.tolist() == [0, 1]


@pytest.mark.parametrize('solution, message', [
    ('', 'has no solution for the warm start .* warm_start.num_steps=0'), ('abca', 'sample.completion_length=4')])
def test_solutions_that_do_not_fit(solution, message):
  with pytest.raises(ValueError, match=message):
    warm_start.solutions([task(0, 'a', solution)], TOKENIZER, SAMPLE)


POLICY = policy.Config(
    vocab_size=5, num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_width=8,
    hidden_width=32, rope_theta=100.0, norm_eps=1e-6, qk_norm=False, qkv_bias=False,
    tie_embeddings=True, dtype='float32', remat='none', lora_rank=0, lora_alpha=1.0)
TASKS = [task(0, 'ab', 'cab'), task(1, 'c', 'a'), task(2, 'ba', 'b'), task(3, 'aaa', 'ccc')]


@pytest.mark.slow
def test_the_stage_learns_its_solutions(tmp_path):
  stage = knobs_lib.WarmStart(num_steps=100, per_step=4, checkpoint_every=50)
  sft = knobs.updates(learning_rate=3e-2, schedule='linear', warmup_steps=2, decay_steps=100, row_length=14,
                      microbatch_rows=1)
  params = warm_start.run(
      policy.init(POLICY, jax.random.key(0)), TASKS, TOKENIZER, POLICY, SAMPLE,
      stage, sft, str(tmp_path), str(tmp_path / 'checkpoints'), seed=0, max_bad_steps=3, stopping=processes.NEVER)
  losses = [r['loss'] for r in metrics.read(tmp_path / 'metrics.jsonl')]
  assert len(losses) == 100 and losses[0] > 1.2 and losses[-1] < 0.05
  prompts = warm_start.solutions(TASKS, TOKENIZER, SAMPLE).prompts
  rollouts = sample.rollouts(POLICY, decode.sampling_params(POLICY, params), prompts, np.ones(4), jax.random.key(2),
                             SAMPLE.replace(temperature=0.0), total=4)
  assert [TOKENIZER.decode(token_C) for token_C in rollouts.token_RC] == ['cab', 'a', 'b', 'ccc']


@pytest.mark.slow
def test_a_stage_that_diverges_stops_and_saves_nothing(tmp_path, monkeypatch, capsys):
  """Each update would take parameters beyond what they may be, so that none is made."""
  monkeypatch.setattr(update, 'optimizer', lambda _: optax.sgd(1e30))
  stage = knobs_lib.WarmStart(num_steps=30, per_step=4, checkpoint_every=1)
  sft = knobs.updates(row_length=14, microbatch_rows=1, weight_decay=0.375)  # no other test's program

  def run(most):
    warm_start.run(policy.init(POLICY, jax.random.key(0)), TASKS, TOKENIZER, POLICY, SAMPLE, stage, sft, str(tmp_path),
                   str(tmp_path / 'checkpoints'), seed=0, stopping=processes.NEVER, max_bad_steps=most)

  with pytest.raises(guard.Diverged, match=(
      r'warm-start step 1: the update was skipped: loss and gradient are finite, and the update would take a value of '
      r'params.\S+ to \S+. So were train.max_bad_steps=2 in a row. The last good checkpoint is \S+/checkpoints/1. '
      'Lower warm_start.learning_rate')):
    run(2)
  assert [(r['step'], r['loss'], r['skipped']) for r in metrics.read(tmp_path / 'metrics.jsonl')] == [
      (0, None, 1), (1, None, 1)]
  assert 'warm-start step 0: the update was skipped' in capsys.readouterr().out
  with pytest.raises(guard.Diverged, match='warm-start step 1: .*max_bad_steps=2 in a row'):
    run(2)  # which goes on from the first step, and counts it
