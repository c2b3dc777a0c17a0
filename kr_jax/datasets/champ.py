"""CHAMP: 270 competition problems with worked solutions, out of the package champ-dataset.

Problems are plain text, 'x^(n+1)'. Answers are made checkable: their explanations are dropped ('0 (i.e., no
such values)' is '0', 'C(10, 5), or equivalently 252' is '252'), and powers and roots are written in LaTeX.
Some answers remain words ('No integer solutions').

Source: Mao, Kim and Zhou 2024, arXiv 2401.06961.
"""

from __future__ import annotations

import re

from kr_jax.datasets import builder

VERIFIER = 'math'  # unless the config says another

# (pattern, replacement), applied in this order.
PLAIN = (
    (r' \((i\.e\.,|none of|no such) .*\)$', ''),
    (r'^.*, or (equivalently|an equivalent form such as) (?=\S)', ''),
    (r', or approximately .*$', ''),
    (r' is the only possible value$', ''),
    (r'^(The limit exists and is equal to|The only possible value for the limit is) ', ''),
    (r'\^\(([^()]*)\)', r'^{\1}'),
    (r'sqrt\(([^()]*)\)', r'\\sqrt{\1}'),
    (r'\bC\(([^(),]*), ([^(),]*)\)', r'\\binom{\1}{\2}'),
)


def plain(answer: str) -> str:
  """An answer without its explanation, in LaTeX."""
  for pattern, replacement in PLAIN:
    answer = re.sub(pattern, replacement, answer)
  return answer


class Builder(builder.TaskBuilder):
  """Competition problems with worked solutions, of champ-dataset 1.0.0."""

  name = 'champ'

  def splits(self) -> dict[str, list[dict[str, str]]]:
    try:
      import champ_dataset
    except ImportError as error:
      raise ValueError("dataset 'champ' needs a package: pip install 'kr_jax[data]'") from error
    return {'test': [
        {'id': f'champ/{problem.identifier}', 'prompt': problem.text, 'answer': plain(problem.answer),
         'solution': '\n'.join(step.text for step in problem.solution.steps)}
        for problem in champ_dataset.load('v0').problems.values()]}
