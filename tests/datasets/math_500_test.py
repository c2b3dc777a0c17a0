"""MATH-500."""

from tests.make_datasets import DIRECTORY


def test_its_tasks(stored):
  assert stored('math_500', DIRECTORY / 'math_500' / 'test.jsonl') == {'test': {
      'math_500/test/prealgebra/1.json': {
          'id': 'math_500/test/prealgebra/1.json', 'prompt': 'Compute $3+\\frac12$.',
          'answer': '\\frac72', 'difficulty': 1, 'solution': 'It is $\\boxed{\\frac72}$.',
          'verifier': 'math', 'info': ''},
      'math_500/test/algebra/2.json': {
          'id': 'math_500/test/algebra/2.json', 'prompt': 'Solve $x^2=x$ for $x>0$.', 'answer': '1',
          'difficulty': 5, 'solution': 'Divide by $x$: $\\boxed{1}$.', 'verifier': 'math', 'info': ''}}}
