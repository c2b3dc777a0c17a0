"""Minerva Math: 272 problems of university courses in science, with short answers.

Source: Lewkowycz et al. 2022, arXiv 2206.14858, section 2.5 (OCWCourses).
"""

from __future__ import annotations

from kr_jax.datasets import published


class Builder(published.Builder):
  """TFDS builder of `minerva_math`. Its rows have no ids: a task is named by its problem."""

  name = 'minerva_math'
  PUBLISHED = 'test.jsonl of math-ai/minervamath on the Hugging Face hub'
  SCHEMA = {'question': str, 'answer': str}

  def task(self, row):
    return {'prompt': row['question'], 'answer': row['answer']}
