"""The first operation that gives a number that is not finite, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax.learning import locate


def only(function, *args):
  place, = locate.places(function, *args)
  return place


def test_what_is_finite_has_no_place():
  def loss(x):
    y, _ = jax.lax.scan(jax.checkpoint(lambda c, x: (jnp.sin(c) * x, None)), 1.0, x)
    return jax.nn.silu(jax.lax.cond(y > 0, jnp.exp, jnp.tanh, y)) + jnp.sum(jnp.where(x > 9, x, -jnp.inf) > 0)
  x = jnp.arange(3.0)
  assert locate.places(jax.value_and_grad(loss), x) == []
  # And the jaxpr was run to its end, with what it gives.
  search, closed = locate._Search(), jax.make_jaxpr(jax.value_and_grad(loss))(x)
  found = search.run(closed.jaxpr, closed.consts, [x], ())
  for mine, wanted in zip(found, jax.tree.leaves(jax.value_and_grad(loss)(x))):
    np.testing.assert_allclose(mine, wanted, rtol=1e-6)


def test_an_operation_is_named_with_what_it_took():
  place = only(lambda x: jnp.sum(jnp.sqrt(x - 3)), jnp.array([3.0, 7.0, 2.0]))
  assert (place.what, place.operation, place.trips) == ('nan', 'sqrt float32[3]', ())
  assert place.inputs == ('float32[3] from -1 to 4',) and place.source.startswith('locate_test.py:')
  assert str(place).startswith('nan: sqrt float32[3] at locate_test.py:')
  assert str(place).endswith(', of float32[3] from -1 to 4')


def test_an_infinity_is_remembered_on_the_way_to_nan():
  inf, nan = locate.places(lambda x: jnp.exp(x) - jnp.exp(x), jnp.array([100.0, 1.0]))
  assert (inf.what, inf.operation, nan.what, nan.operation) == ('inf', 'exp float32[2]', 'nan', 'sub float32[2]')


def test_one_number_of_a_large_array_is_seen():
  x = np.ones((336, 16), np.float32)
  x[200, 7] = -1
  place = only(lambda x: jnp.sum(jnp.sqrt(x)), x)
  assert place.operation == 'sqrt float32[336,16]' and place.inputs == ('float32[336,16] from -1 to 1',)
  assert locate.places(lambda x: 2 * x, np.where(x < 0, np.nan, x)) == []  # that of the argument is no place


@pytest.mark.parametrize('reverse, trip', [(False, 1), (True, 1)])
def test_a_trip_of_a_loop_is_told(reverse, trip):
  step = lambda c, x: (c + jnp.log(x), c)
  x = jnp.array([1.0, -2.0, 3.0])
  place = only(lambda x: jax.lax.scan(step, 0.0, x, reverse=reverse), x)
  assert (place.operation, place.trips) == ('log float32[]', (trip,))
  place = only(lambda n: jax.lax.while_loop(lambda c: c > -5, lambda c: jnp.sqrt(c - 1) * 4 - 3, n), 2.0)
  assert (place.operation, place.trips) == ('sqrt float32[]', (2,))  # after 2, 1 and -3


def test_what_a_gradient_alone_makes_is_found():
  """The square root of 0 has a slope that is infinite, times 0 it is nan."""
  loss = lambda x: jnp.sum(jnp.where(x > 0, jnp.sqrt(x), 0.0))
  assert locate.places(loss, jnp.zeros(2)) == []
  assert [place.what for place in locate.places(jax.grad(loss), jnp.zeros(2))] == ['inf', 'nan']


def test_a_line_of_the_package_is_named():
  from kr_jax.learning import grpo
  place = only(lambda x: grpo.divergence_bits(jnp.sqrt(x)) + jnp.log(x), jnp.float32([-1]))
  assert place.source.startswith('locate_test.py:')
  place = next(p for p in locate.places(lambda x: grpo.divergence_bits(x) * 1e38 * 1e38, jnp.float32([3])))
  assert place.what == 'inf' and 'locate_test.py' in place.source
