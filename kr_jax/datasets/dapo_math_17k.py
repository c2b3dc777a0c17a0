"""DAPO-Math-17k: 17 thousand problems whose answers are whole numbers, the training set of DAPO.

The published file has 1.79 million rows, in which each problem stands about a hundred times: rows with
one problem are one task, and a problem that stands there with different answers is left out. It wraps
every problem in instructions, which are taken off: `tasks.template` says how a problem is put.

Source: Yu et al. 2025, arXiv 2503.14476.
"""

from __future__ import annotations

from kr_jax.datasets import published

BEFORE = ('Solve the following math problem step by step. The last line of your response should be of '
          'the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.')
AFTER = 'Remember to put your answer on its own line after "Answer:".'


class Builder(published.Builder):
  """TFDS builder of `dapo_math_17k`. A task is named by its problem."""

  name = 'dapo_math_17k'
  PUBLISHED = 'data/dapo-math-17k.parquet of BytedTsinghua-SIA/DAPO-Math-17k on the Hugging Face hub'
  SCHEMA = {'prompt': [{'role': str, 'content': str}], 'reward_model': {'ground_truth': str}}
  SPLIT = 'train'
  MERGED = True

  def task(self, row):
    if [message['role'] for message in row['prompt']] != ['user']:
      raise ValueError(f'prompt has the roles {[x["role"] for x in row["prompt"]]}, not one user')
    problem = row['prompt'][0]['content'].strip().removeprefix(BEFORE).removesuffix(AFTER)
    return {'prompt': problem, 'answer': row['reward_model']['ground_truth']}
