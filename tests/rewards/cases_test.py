"""Completions from public reports on graders, or made up after them, and the right verdict on each."""

import json
import pathlib

import pytest

from kr_jax import rewards
from kr_jax import types

CASES = [json.loads(line) for line in
         (pathlib.Path(__file__).parents[1] / 'data' / 'verdict_cases.jsonl').read_text().splitlines()]
# Right answers that are refused, and why.
REFUSED = {
    'H124': 'squared is not read as a power', 'H128': 'factorial is not read as a word', 'H206': 'x^2 < 4 is not solved',
    'H253': 'a reason in the box', 'H309': 'a sentence in the box', 'H357': 'determinants are not computed',
    'H415': 'sums are not computed', 'H496': 'braces that show around a letter'}


@pytest.mark.parametrize('verifier', ['math', 'choice', pytest.param('reasoning_gym', marks=pytest.mark.slow)])
def test_cases(verifier):
  cases = [case for case in CASES if case['verifier'] == verifier]
  assert len(cases) == {'math': 640, 'choice': 80, 'reasoning_gym': 9}[verifier]
  wrong = set()
  for case in cases:
    task = types.Task(id=case['id'], index=0, prompt='', answer=case['answer'], difficulty=0, solution='', tokens=(),
                      info=case.get('info') or '')
    if rewards.VERIFIERS[verifier](case['completion'], task).right is not case['expected']:
      wrong.add(case['id'])
      assert case['expected'], case  # nothing wrong is accepted
  assert wrong == {case['id'] for case in cases} & REFUSED.keys()
