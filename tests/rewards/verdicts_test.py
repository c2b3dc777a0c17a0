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


@pytest.mark.parametrize('reward, shown', [
    (float('nan'), 'nan'), (float('inf'), 'inf'), (-float('inf'), '-inf'), (1e300, r'1e\+300'), (1e25, r'1e\+25'),
    (-1.5e6, r'-1.5e\+06'), (2 * 10 ** 6, r'2e\+06')])
def test_rewards_are_in_a_range(reward, shown):
  with pytest.raises(ValueError, match=rf'returned the reward {shown}; .* finite, and from -1e\+06 to 1e\+06'):
    verdicts.checked((True, reward))
  for limit in (1e6, -1e6):
    assert verdicts.checked((True, limit)).reward == limit


def test_a_verdict_is_not_a_condition():
  """As a tuple it would be true, and a verifier made of others would say yes to all."""
  with pytest.raises(TypeError, match='read its `right`'):
    Verdict(False) and True


def test_outcomes():
  assert [Verdict(*x).outcome for x in ((True,), (False,), (False, 0.0, False), (None,), (True, 1.0, False))] == [
      verdicts.RIGHT, verdicts.WRONG, verdicts.NO_ANSWER, verdicts.ABSTAINED, verdicts.RIGHT]
  assert verdicts.OUTCOMES[verdicts.INVALID] == 'invalid' and verdicts.NONE == 0
  assert [verdicts.OUTCOMES[i] for i in verdicts.VERIFIED] == ['right', 'wrong', 'no_answer']
