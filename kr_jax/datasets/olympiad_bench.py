"""OlympiadBench: its 674 open-ended mathematical problems in English without pictures.

A problem's answers, where it has several, are one text with commas. The tolerance that one of them has
(`error`) is not used, and a unit is not part of an answer.

Source: He et al. 2024, arXiv 2402.14008.
"""

from __future__ import annotations

from kr_jax.datasets import published


class Builder(published.Builder):
  """TFDS builder of `olympiad_bench`."""

  name = 'olympiad_bench'
  PUBLISHED = ('OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet, in OlympiadBench/ of '
               'Hothan/OlympiadBench on the Hugging Face hub')
  SCHEMA = {'id': int, 'question': str, 'context': str | None, 'solution': [str], 'final_answer': [str]}

  def task(self, row):
    return {'id': str(row['id']), 'prompt': f'{row["context"] or ""}\n\n{row["question"]}',
            'answer': ', '.join(row['final_answer']), 'solution': row['solution'][0]}
