"""GPQA Diamond: 198 questions of physics, chemistry and biology with four choices.

The choices of a question are in an order drawn by its id alone; its answer is the right one's letter.

Source: Rein et al. 2023, arXiv 2311.12022.
"""

from __future__ import annotations

from kr_jax.datasets import published

CHOICES = ('Correct Answer', 'Incorrect Answer 1', 'Incorrect Answer 2', 'Incorrect Answer 3')


class Builder(published.Builder):
  """TFDS builder of `gpqa_diamond`."""

  name = 'gpqa_diamond'
  PUBLISHED = 'gpqa_diamond.csv of Idavidrein/gpqa on the Hugging Face hub'
  SCHEMA = {'Record ID': str, 'Question': str, **dict.fromkeys(CHOICES, str)}

  def task(self, row):
    question, *choices = (row[name].strip() for name in ('Question', *CHOICES))
    if not question:
      raise ValueError('the prompt is empty')
    if '' in choices:
      raise ValueError(f'{CHOICES[choices.index("")]!r} is empty')
    if choices[0] in choices[1:]:
      raise ValueError(f'the right choice {choices[0]!r} stands among the wrong ones')
    order = sorted(range(4), key=lambda i: published.digest(f'{row["Record ID"]}/{i}'))
    listed = '\n'.join(f'({letter}) {choices[i]}' for letter, i in zip('ABCD', order))
    return {'id': row['Record ID'], 'prompt': f'{question}\n\n{listed}',
            'answer': 'ABCD'[order.index(0)], 'verifier': 'choice'}
