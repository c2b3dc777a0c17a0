"""MATH-500: 500 competition problems of MATH, levels 1 to 5, with worked solutions.

Sources: Lightman et al. 2023, arXiv 2305.20050; Hendrycks et al. 2021, arXiv 2103.03874.
"""

from __future__ import annotations

from kr_jax.datasets import published


class Builder(published.Builder):
  """TFDS builder of `math_500`. A task's difficulty is its level."""

  name = 'math_500'
  PUBLISHED = 'test.jsonl of HuggingFaceH4/MATH-500 on the Hugging Face hub'
  SCHEMA = {'unique_id': str, 'problem': str, 'solution': str, 'answer': str, 'level': int}

  def task(self, row):
    return {'id': row['unique_id'], 'prompt': row['problem'], 'answer': row['answer'],
            'difficulty': row['level'], 'solution': row['solution']}
