"""AIME 2024: the 30 problems of both papers, whose answers are whole numbers in 0..999."""

from __future__ import annotations

from kr_jax.datasets import published


class Builder(published.Builder):
  """TFDS builder of `aime_2024`."""

  name = 'aime_2024'
  PUBLISHED = 'data/train-00000-of-00001.parquet of HuggingFaceH4/aime_2024 on the Hugging Face hub'
  SCHEMA = {'id': int, 'problem': str, 'solution': str, 'answer': str}

  def task(self, row):
    return {'id': str(row['id']), 'prompt': row['problem'], 'answer': row['answer'],
            'solution': row['solution']}
