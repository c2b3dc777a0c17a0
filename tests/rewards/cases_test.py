"""Completions from public reports on graders, and the right verdict on each."""

import json
import pathlib

import pytest

from kr_jax import rewards
from kr_jax import types

CASES = [json.loads(line) for line in
         (pathlib.Path(__file__).parents[1] / 'data' / 'verdict_cases.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('verifier', ['math', 'choice', pytest.param('reasoning_gym', marks=pytest.mark.slow)])
def test_cases(verifier):
  cases = [case for case in CASES if case['verifier'] == verifier]
  assert len(cases) == {'math': 170, 'choice': 46, 'reasoning_gym': 9}[verifier]
  for case in cases:
    task = types.Task(id=case['id'], index=0, prompt='', answer=case['answer'], difficulty=0, solution='', tokens=(),
                      info=case.get('info') or '')
    assert rewards.VERIFIERS[verifier](case['completion'], task).right is case['expected'], case['id']
