"""AIME 2025: the 30 problems of both papers, 15 a file, whose answers are whole numbers in 0..999."""

from __future__ import annotations

from kr_jax.datasets import published


class Builder(published.Builder):
  """TFDS builder of `aime_2025`. Its rows have no ids: a task is named by its problem."""

  name = 'aime_2025'
  PUBLISHED = ('aime2025-I.jsonl and aime2025-II.jsonl of opencompass/AIME2025 on the Hugging Face hub '
               "(both: 'aime2025-*.jsonl')")
  SCHEMA = {'question': str, 'answer': str}

  def task(self, row):
    return {'prompt': row['question'], 'answer': row['answer']}
