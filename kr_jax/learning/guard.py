"""Whether what is learnt is finite: parameters, the optimiser's state, and what the policy computes.

    an array is sound if max |x| is finite, and of a parameter at most LARGEST

A policy that is no longer finite shows in no reward: all of its rollouts are alike, so its loss is 0 and its gradient
too. A parameter above LARGEST is as bad as an infinite one, and hides: the norm of a layer sums up squares, float32
does not hold them, and what is divided by them is 0.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kr_jax import errors
from kr_jax import sharding
from kr_jax.model import policy
from kr_jax.types import Array

LARGEST = 1e15  # of a parameter: float32 holds sums of 10^8 such squares
_TOKENS = 8  # of the rows that a policy is tried on


class Diverged(errors.Told, FloatingPointError):
  """What is learnt is not finite. The message says where."""


def names(tree: Any) -> tuple[str, ...]:
  """The names of the arrays of numbers with a fraction, in the order of `largest`: 'params.layers.q_DNH'."""
  return tuple(jax.tree_util.keystr(path, simple=True, separator='.')
               for path, x in jax.tree_util.tree_leaves_with_path(tree) if _has_fractions(x))


def largest(tree: Any) -> Array:
  """max |x| of each array of numbers with a fraction, float32, in the order of `names`; inf where one is nan."""
  # A maximum of XLA on a CPU leaves nan out of arrays that are large.
  of = lambda x: jnp.max(jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)), initial=0).astype(jnp.float32)
  found = [of(x) for x in jax.tree.leaves(tree) if _has_fractions(x)]
  return sharding.replicate(jnp.stack(found)) if found else jnp.zeros(0)


def _has_fractions(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)


def of_state(params: Any, opt_state: Any) -> Array:
  """`largest` of parameters, then of the optimiser's state; `state_names` has their names."""
  return largest((params, opt_state))


def state_names(params: Any, opt_state: Any) -> tuple[str, ...]:
  """The names of the arrays that `of_state` tells of."""
  return names({'params': params}) + names({'opt_state': opt_state})


def sound(largest_X: Array, params: Any) -> Array:
  """Which arrays of a state are sound, of what `of_state` gave. params: its parameters, or their shapes."""
  limit_X = np.where(np.arange(len(largest_X)) < len(names(params)), np.float32(LARGEST), np.float32(np.inf))
  return jnp.isfinite(largest_X) & (largest_X <= limit_X)


_largest = jax.jit(largest)


def first_bad(tree: Any, limit: float = np.inf) -> str | None:
  """The name of the first array with a number that is not finite, or is beyond the limit; None: there is none.

  tree: of arrays of the host or of devices, on whatever mesh; keys and whole numbers are passed over.
  """
  largest_X = np.asarray(_largest(tree))
  bad_X = ~(np.isfinite(largest_X) & (largest_X <= limit))
  return names(tree)[int(bad_X.argmax())] if bad_X.any() else None


def check_params(params: Any, source: str, limit: float = LARGEST) -> None:
  """Raises Diverged, which names the tensor, where parameters that come from `source` are not sound."""
  if name := first_bad(params, limit):
    raise Diverged(f'{source} has {_worst(params, name)}; its values must be finite, and at most {limit:g}. Give '
                   'another one')


@functools.partial(jax.jit, static_argnums=0)
def _tried(config: policy.Config, trained: Any, opt_state: Any, base: Any) -> tuple[Array, Array]:
  """Which arrays of the state are sound; and whether the policy's logits of a few tokens are finite."""
  shape = sharding.row_shards(), _TOKENS
  token_BT = jnp.arange(_TOKENS * shape[0]).reshape(shape) * 7919 % config.vocab_size  # from all over the vocabulary
  logits_BTV = policy.logits(config, policy.join(config, trained, base), sharding.constrain_rows(token_BT))
  return sound(of_state(trained, opt_state), trained), sharding.replicate(jnp.all(jnp.isfinite(logits_BTV)))


def problem(config: policy.Config, trained: Any, opt_state: Any, base: Any) -> str | None:
  """What of a policy or its optimiser is not finite, in words; None: nothing is. One program for a run.

  Args:
    config: of the policy that is trained, with its adapters.
    base: what adapters are added to; {} where there is none.
  """
  sound_X, logits_are_finite = jax.device_get(_tried(config, trained, opt_state, base))
  if not sound_X.all():
    name = state_names(trained, opt_state)[int(np.argmin(sound_X))]
    return _worst({'params': trained, 'opt_state': opt_state}, name)
  return None if logits_are_finite else (
      'logits that are not finite, though the parameters are: the largest of these is '
      '{} in {}'.format(*_largest_of({'params': trained})))


def check(config: policy.Config, trained: Any, opt_state: Any, base: Any, what: str, advice: str) -> None:
  """Raises Diverged, of what and with what to do, where `problem` finds one."""
  if found := problem(config, trained, opt_state, base):
    raise Diverged(f'{what} has {found}. {advice}')


def check_sampled(logp_sum: Array, step: int, last_good: str | None) -> None:
  """Raises Diverged where a step's rollouts have log-probabilities that are not finite: nothing is learnt from them.

  logp_sum: of the log-probabilities of all tokens.
  """
  if not np.isfinite(logp_sum):
    raise Diverged(f'step {step}: the log-probabilities of the sampled tokens add up to {float(logp_sum):g}: the '
                   f'policy is not finite any more, and nothing was learnt from them. {go_back(last_good)}')


def go_back(last_good: str | None) -> str:
  """What to do about a policy that is not finite. last_good: the latest checkpoint; None: there is none."""
  where = f'The last good checkpoint is {last_good}' if last_good else 'No checkpoint was saved'
  return (f'{where}; run the same command again with a lower optimizer.learning_rate or optimizer.max_grad_norm to go '
          'on from there')


def _largest_of(tree: Any) -> tuple[str, str]:
  """The largest |value| of a tree, and the name of its array."""
  largest_X = np.asarray(_largest(tree))
  i = int(np.argmax(largest_X))
  return f'{largest_X[i]:.3g}', names(tree)[i]


def _worst(tree: Any, name: str) -> str:
  """The largest |value| of an array, in words; of arrays of all layers also the first layer that has it."""
  x = {jax.tree_util.keystr(path, simple=True, separator='.'): x
       for path, x in jax.tree_util.tree_leaves_with_path(tree)}[name]
  size, layer = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)), ''
  value = float('nan') if jnp.any(jnp.isnan(x)) else float(jnp.max(size))
  if '.layers.' in f'.{name}' and x.ndim:
    layer = f' (layer {int(np.argmax(np.asarray(jnp.max(size, axis=tuple(range(1, x.ndim))))))})'
  return f'a value of {value:g} in {name}{layer}'
