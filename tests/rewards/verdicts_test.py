"""What counts as a verdict, and what does not."""

import asyncio

import numpy as np
import pytest

from kr_jax.rewards import verdicts
from kr_jax.rewards.verdicts import Verdict


@pytest.mark.parametrize('returned, verdict', [
    (True, Verdict(True, 1.0)), (False, Verdict(False, 0.0)), (np.bool_(True), Verdict(True, 1.0)),
    ((False, 0.25), Verdict(False, 0.25)), ((True, -3), Verdict(True, -3.0)),
    ((np.bool_(True), np.float32(2)), Verdict(True, 2.0)),
    (None, Verdict(None, 0.0, reason='the verifier returned None')), ((None, 1.0), Verdict(None, 0.0)),
    (Verdict(True), Verdict(True, 1.0)), (Verdict(False, answered=False), Verdict(False, 0.0, answered=False)),
    (Verdict(None, reason='no judge'), Verdict(None, 0.0, reason='no judge'))])
def test_verdicts_by_hand(returned, verdict):
  found = verdicts.checked(returned)
  assert found == verdict and isinstance(found.right, (bool, type(None))) and isinstance(found.reward, float)


async def _coroutine():
  return True


@pytest.mark.parametrize('returned', [
    0.3, 1, 0, 'no', 'True', {'score': 0.0}, [False, 0.0], [], (), (True,), (True, 1.0, 2.0), (0.5, True), (True, 'x'),
    ('no', 1.0), (True, None, 'x'), object(), np.array([True]), (True, 1j), Verdict('yes'), Verdict(1),
    Verdict(True, 'x'), Verdict(True, 1.0, 'x')])
def test_anything_else_is_an_error(returned):
  with pytest.raises(TypeError, match=r'it must return a bool, \(bool, reward\), None to abstain, or kr_jax'):
    verdicts.checked(returned)


def test_a_coroutine_is_an_error():
  with pytest.raises(TypeError, match='coroutine'):
    verdicts.checked(_coroutine())
  assert asyncio.iscoroutinefunction(_coroutine)


@pytest.mark.parametrize('reward', [float('nan'), float('inf'), -float('inf'), 1e300, 3.5e38])
def test_rewards_are_finite_as_float32(reward):
  with pytest.raises(ValueError, match='rewards must be finite as float32'):
    verdicts.checked((True, reward))
  assert not verdicts.is_finite(reward) and verdicts.is_finite(3.4e38)


def test_a_verdict_is_not_a_condition():
  """As a tuple it would be true, and a verifier made of others would say yes to all."""
  with pytest.raises(TypeError, match='read its `right`'):
    Verdict(False) and True


def test_outcomes():
  assert [Verdict(*x).outcome for x in ((True,), (False,), (False, 0.0, False), (None,), (True, 1.0, False))] == [
      verdicts.RIGHT, verdicts.WRONG, verdicts.NO_ANSWER, verdicts.ABSTAINED, verdicts.RIGHT]
  assert verdicts.OUTCOMES[verdicts.INVALID] == 'invalid' and verdicts.NONE == 0
  assert [verdicts.OUTCOMES[i] for i in verdicts.VERIFIED] == ['right', 'wrong', 'no_answer']
