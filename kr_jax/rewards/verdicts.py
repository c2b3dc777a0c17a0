"""What a verifier says of a completion, and what came of verifying a rollout.

A rollout is verified if its verifier says right or wrong. A rollout whose verifier abstains, hangs, raises, dies or
returns what is no verdict is unverified: it is not wrong, it tells nothing, and nothing is learnt from it.

Imports nothing heavy: worker processes load this module at every start.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

# What came of a rollout (Scores.outcome_R).
OUTCOMES = ('none', 'right', 'wrong', 'no_answer', 'abstained', 'timeout', 'raised', 'died', 'invalid')
NONE, RIGHT, WRONG, NO_ANSWER, ABSTAINED, TIMEOUT, RAISED, DIED, INVALID = range(len(OUTCOMES))
LARGEST = 1e6  # of |reward|: far larger ones are a fault of the verifier's, and all that is learnt would hang on them
VERIFIED = (RIGHT, WRONG, NO_ANSWER)  # the others of a rollout are unverified; NONE is no rollout


class Verdict(NamedTuple):
  """What a verifier says of a completion."""

  right: bool | None  # None: the verifier abstains
  reward: float | None = None  # None: 1.0 if right, else 0.0
  answered: bool = True  # whether the completion gave an answer, right or wrong
  reason: str = ''  # why it abstains

  def __bool__(self) -> bool:
    raise TypeError('a Verdict is neither true nor false, as its verifier may abstain; read its `right`')

  @property
  def outcome(self) -> int:
    """Of OUTCOMES."""
    if self.right is None:
      return ABSTAINED
    return RIGHT if self.right else WRONG if self.answered else NO_ANSWER


def checked(returned: Any) -> Verdict:
  """The verdict that a verifier returned as bool, (bool, float), None or Verdict; its reward is a number.

  Raises:
    TypeError: it returned anything else, such as 0.3, 'no', {'score': 0.0}, [False, 0.0] or a coroutine.
    ValueError: the reward is not finite, or beyond LARGEST.
  """
  found = returned
  if found is None:
    found = Verdict(None, reason='the verifier returned None')
  elif isinstance(found, (bool, np.bool_)):
    found = Verdict(bool(found))
  elif type(found) is tuple and len(found) == 2:
    found = Verdict(*found)
  if not (isinstance(found, Verdict) and isinstance(found.right, (bool, np.bool_, type(None)))
          and _is_real(found.reward, or_none=True) and isinstance(found.answered, (bool, np.bool_))
          and isinstance(found.reason, str)):
    if hasattr(returned, 'close') and hasattr(returned, 'cr_code'):
      returned.close()  # a coroutine that is not awaited warns when it is collected
    raise TypeError(f'a verifier returned {_short(returned)} ({type(returned).__name__}); it must return a bool, '
                    '(bool, reward), None to abstain, or kr_jax.rewards.Verdict')
  right = None if found.right is None else bool(found.right)
  if right is None:
    return Verdict(None, 0.0, bool(found.answered), found.reason)
  reward = float(right if found.reward is None else found.reward)
  if problem := reward_problem(reward):
    raise ValueError(f'a verifier returned {problem}')
  return Verdict(right, reward, bool(found.answered), found.reason)


def _is_real(x: Any, or_none: bool = False) -> bool:
  return x is None and or_none or isinstance(x, (bool, int, float, np.number)) and not isinstance(x, complex)


def reward_problem(reward: float) -> str:
  """What is wrong with a reward, with the limits; '' if nothing is."""
  if math.isfinite(reward) and abs(reward) <= LARGEST:
    return ''
  return f'the reward {reward:g}; rewards must be finite, and from {-LARGEST:g} to {LARGEST:g}'


def _short(x: Any) -> str:
  text = repr(x)
  return text if len(text) <= 100 else f'{text[:97]}...'
