"""avg@k by hand, and batches that are filled up."""

import jax
import numpy as np
import pytest

from kr_jax import evaluate
from kr_jax import policy
from kr_jax import rewards
from kr_jax import sample
from kr_jax import tokenizer
from kr_jax import types

POLICY = policy.Config(
    vocab_size=5, num_layers=1, width=8, num_heads=1, num_kv_heads=1, head_width=8, hidden_width=8,
    rope_theta=100.0, norm_eps=1e-6, qk_norm=False, qkv_bias=False, tie_embeddings=True,
    dtype='float32', remat='none', lora_rank=0, lora_alpha=1.0)
SAMPLE = sample.Config(slots=8, refill=1, prompt_length=3, completion_length=3, temperature=1.0)
TOKENIZER = tokenizer.Characters('abc')


def make_tasks(count):
  return [types.Task(id=f't{i}', index=i, prompt='abc'[:i % 3 + 1], answer='abc'[i % 3],
                     difficulty=i % 2, solution='', tokens=TOKENIZER.encode('abc'[:i % 3 + 1]))
          for i in range(count)]


def test_summary_by_hand():
  measured = evaluate.summarize(np.array([1.0, 0.0, 0.5, 0.25]), make_tasks(4), k=8)
  assert measured['eval/avg@8'] == 0.4375
  # Squared distances .5625^2 + .4375^2 + .0625^2 + .1875^2 = .546875, over 3, over 4 tasks.
  np.testing.assert_allclose(measured['eval/avg@8_stderr'], (0.546875 / 3 / 4) ** 0.5)
  assert measured['eval/difficulty_0/avg@8'] == 0.75
  assert measured['eval/difficulty_1/avg@8'] == 0.125
  assert measured['eval/difficulty_0/avg@8_stderr'] == 0.25


def test_one_task_has_no_spread():
  assert evaluate.summarize(np.array([0.5]), make_tasks(1), k=2)['eval/avg@2_stderr'] == 0


@pytest.mark.parametrize('batch', [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5)), 7])
def test_success_rates_do_not_depend_on_the_batch(batch):
  """And equal what a plain loop over tasks verifies."""
  tasks = make_tasks(5)
  params = jax.tree.map(lambda x: 4 * x, policy.init(POLICY, jax.random.key(0)))
  key = jax.random.key(5)
  with rewards.Workers('ends_with', workers=1, timeout_s=60) as workers:
    rate_I = evaluate.success_rates(
        POLICY, params, tasks, key, SAMPLE, workers, TOKENIZER, k=6, batch=batch)
  want = []
  for task in tasks:
    token_MP = np.zeros((1, 3), np.int32)
    token_MP[0, :len(task.tokens)] = task.tokens
    rollouts = sample.rollouts(
        POLICY, params, types.Prompts(token_MP, np.array([len(task.tokens)]), np.array([task.index])),
        np.array([6]), key, SAMPLE, total=6)
    texts = [TOKENIZER.decode(token_C) for token_C in rollouts.token_RC]
    want.append(np.mean([text.endswith(task.answer) for text in texts]))
  np.testing.assert_array_equal(rate_I, want)
  assert 0 < rate_I.mean() < 1
