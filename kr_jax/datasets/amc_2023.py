"""AMC 2023: 40 problems of AMC 12, without their choices; the answers are numbers."""

from __future__ import annotations

from kr_jax.datasets import published


class Builder(published.Builder):
  """TFDS builder of `amc_2023`. A task is named by its problem."""

  name = 'amc_2023'
  PUBLISHED = 'test-00000-of-00001.parquet of math-ai/amc23 on the Hugging Face hub'
  SCHEMA = {'question': str, 'answer': str | int | float}

  def task(self, row):
    answer = row['answer']
    # Copies of this set write 27.0 where 27 is meant.
    whole = isinstance(answer, float) and answer.is_integer()
    return {'prompt': row['question'], 'answer': str(int(answer) if whole else answer)}
