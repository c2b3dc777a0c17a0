"""FLOPs that one run of a program executes, by a walk over its jaxpr.

Products of matrices, grouped ones among them, and kernels of Pallas count, 2 for each multiplication with addition.
Each equation counts as often as it runs:

    scan          its length
    while         the trips that the caller gives for the jax.named_scope around the loop
    cond          the branch with most FLOPs; of jax.lax.platform_dependent the branch of the platform
    shard_map     once on each shard, as the shapes inside are those of a shard
    ragged_dot    once for each row, as a row has one group
    pallas_call   what arithmetic.kernel_flops says of its name and shapes

Equations whose results nothing reads are left out first.

Of integer trips the sum is an integer. It is over all chips. Divided by their number it is what one chip executes of
the compiled program, with three differences. Where no axis of a product is divided over an axis of the mesh (key/value
heads that are fewer than 'model'), each chip along it repeats the product, and the chip executes more. Of the small
sampler the partitioner may gather the output matrix and compute all logits on each chip. Padding of tiles counts in
neither.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
import re

from jax.extend import core
from jax.interpreters import partial_eval

from kr_jax.costs import arithmetic

# No program of this project has these; they would be missed.
_UNCOUNTED = ('conv_general_dilated',)


def count(jaxpr: core.Jaxpr, trips: Mapping[str, float], scopes: str = '', platform: str = 'tpu') -> float:
  """FLOPs of one run on all chips together.

  Args:
    jaxpr: `jax.jit(f).trace(*args).jaxpr.jaxpr`, traced under jax.set_mesh.
    trips: trip count of a loop each time it is reached, by the name of the jax.named_scope that the loop stands in.
    scopes: those around the jaxpr, since the last loop: 'steps/jvp(layer)'.
    platform: 'tpu', 'gpu' or 'cpu', that the program is for.

  Raises:
    ValueError: a loop with FLOPs has no scope with trips, or a kernel or product is of an unknown kind.
  """
  live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return sum(_of_equation(eqn, trips, f'{scopes}/{eqn.source_info.name_stack}', platform) for eqn in live.eqns)


def runs_kernel(jaxpr: core.Jaxpr, name: str, platform: str = 'tpu') -> bool:
  """Whether the program may run a Pallas kernel of this name on the platform."""
  return any(eqn.primitive.name == 'pallas_call' and eqn.params['name'] == name
             or any(runs_kernel(inside, name, platform) for inside in _inside(eqn, platform)) for eqn in jaxpr.eqns)


def _inside(eqn: core.JaxprEqn, platform: str) -> list[core.Jaxpr]:
  if eqn.primitive.name == 'cond':
    return [branch.jaxpr for branch in _branches(eqn, platform)]
  return [] if eqn.primitive.name == 'pallas_call' else list(core.jaxprs_in_params(eqn.params))


def loop_trips(scopes: str, trips: Mapping[str, float]) -> float:
  """Trips of a loop by the innermost of its scopes that has trips.

  Args:
    scopes: names with slashes between them, of the scopes since the loop around it: 'steps/transpose(jvp(layer))'.

  Raises ValueError where none has.
  """
  # jax.grad and jax.vmap write their names around those of scopes; jit(f) names a function and no scope.
  names = [re.sub(r'^(?:(?:jvp|transpose|vmap)\()*|\)*$', '', scope) for scope in scopes.split('/')]
  found = [name for name in names if name in trips]
  if not found:
    raise ValueError(f'how often the loop in {scopes!r} runs is not known: it needs a jax.named_scope with trips; '
                     f'those with trips are {sorted(trips)}')
  return trips[found[-1]]


def _of_equation(eqn: core.JaxprEqn, trips: Mapping[str, float], scopes: str, platform: str) -> float:
  name, params = eqn.primitive.name, eqn.params
  if name == 'dot_general':
    return _of_product(eqn)
  if name == 'ragged_dot_general':
    return _of_grouped_product(eqn)
  if name == 'pallas_call':
    operands, results = ([x.aval.shape for x in side] for side in (eqn.invars, eqn.outvars))
    return arithmetic.kernel_flops(params['name'], operands, results)
  if name == 'scan':
    return params['length'] * count(params['jaxpr'].jaxpr, trips, platform=platform)
  if name == 'while':
    once = count(params['body_jaxpr'].jaxpr, trips, platform=platform)
    return once * loop_trips(scopes, trips) if once else 0
  if name == 'cond':
    return max(count(branch.jaxpr, trips, scopes, platform) for branch in _branches(eqn, platform))
  if name in _UNCOUNTED:
    raise ValueError(f'FLOPs of {name} are not counted; add it to kr_jax/costs/flops.py')
  inside = sum(count(jaxpr, trips, scopes, platform) for jaxpr in core.jaxprs_in_params(params))
  if name == 'shard_map':
    return inside * math.prod(params['mesh'].shape[axis] for axis in params['newly_manual_axes'])
  return inside


def _of_product(eqn: core.JaxprEqn) -> int:
  (contracted, _), _ = eqn.params['dimension_numbers']
  lhs = eqn.invars[0].aval.shape
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracted)


def _of_grouped_product(eqn: core.JaxprEqn) -> int:
  numbers = eqn.params['ragged_dot_dimension_numbers']
  (contracted, _), _ = numbers.dot_dimension_numbers
  lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  if set(numbers.lhs_ragged_dimensions) & set(contracted):
    out = out[1:]  # a product a group, each of its own rows
  return 2 * math.prod(out) * math.prod(lhs[d] for d in contracted)


def _branches(eqn: core.JaxprEqn, platform: str) -> list[core.ClosedJaxpr]:
  """Those that may run: of jax.lax.platform_dependent the platform's."""
  branches = list(eqn.params['branches'])
  platforms = eqn.params.get('branches_platforms')  # of each branch; None: all others
  if not platforms:
    return branches
  names = {'gpu': ('gpu', 'cuda', 'rocm')}.get(platform, (platform,))
  return [branch for branch, of in zip(branches, platforms) if of is None or set(names) & set(of)][:1]
