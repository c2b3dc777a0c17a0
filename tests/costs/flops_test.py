"""FLOPs of jaxprs, against hand and against the closed form."""

import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import pytest

from kr_jax import sharding
from kr_jax.learning import update
from kr_jax.model import moe
from kr_jax.costs import flops
from kr_jax.costs import arithmetic
from tests import tpu_test

X, W = jax.ShapeDtypeStruct((8, 32), 'float32'), jax.ShapeDtypeStruct((32, 32), 'float32')
DOT = 2 * 8 * 32 * 32  # of x @ w


def count(function, *args, **trips):
  return flops.count(jax.jit(function).trace(*args).jaxpr.jaxpr, trips)


def test_products_by_hand():
  assert count(jnp.dot, X, W) == DOT
  batched = lambda *shape: jax.ShapeDtypeStruct(shape, 'float32')
  assert count(lambda x, y: jnp.einsum('bij,bjk->bik', x, y), batched(4, 8, 32), batched(4, 32, 16)
               ) == 2 * 4 * 8 * 32 * 16
  assert count(lambda x, y: jnp.einsum('tnh,nhd->td', x, y), batched(8, 4, 16), batched(4, 16, 5)
               ) == 2 * 8 * 4 * 16 * 5
  assert count(lambda x: x + 1, X) == 0


def test_a_scan_counts_its_length():
  layer = lambda x, w: (jnp.tanh(x @ w), None)
  w_LDD = jax.ShapeDtypeStruct((10, 32, 32), 'float32')
  assert count(lambda x, w: jax.lax.scan(layer, x, w)[0], X, w_LDD) == 10 * DOT
  # Forward, to the input and to the matrix; and the product once more where the layer is computed again.
  loss = lambda layer: lambda w, x: jnp.sum(jax.lax.scan(layer, x, w)[0])
  assert count(jax.grad(loss(layer)), w_LDD, X) == 3 * 10 * DOT
  assert count(jax.grad(loss(jax.checkpoint(layer, prevent_cse=False))), w_LDD, X) == 4 * 10 * DOT


def test_what_nothing_reads_does_not_count():
  def body(i, x):
    return jax.jit(lambda x: (x + 1, x @ x.T))(x)[0]

  def loop(n, x):
    with jax.named_scope('steps'):
      return jax.lax.fori_loop(0, n, body, x)

  assert count(loop, 3, X, steps=5) == 0


def looped(x, w, n, scope='steps', inner=lambda x, w: x @ w):
  with jax.named_scope(scope):
    return jax.lax.fori_loop(0, n, lambda i, x: inner(x, w), x)


def test_a_loop_to_an_end_that_data_say_has_the_trips_of_its_scope():
  assert count(looped, X, W, 3, steps=2.5, other=100) == 2.5 * DOT

  def around(x, w, n):  # the innermost scope counts; functions, jax.grad and jax.vmap may stand between
    with jax.named_scope('other'):
      return jax.jit(lambda x: jax.vmap(lambda x: looped(x, w, n))(x))(x[None])

  assert count(around, X, W, 3, steps=2.5, other=100) == 2.5 * DOT
  gradient = jax.grad(lambda w, x, n: jnp.sum(looped(x, w, n, inner=lambda x, w: jax.checkpoint(jnp.dot)(x, w))), 1)
  with pytest.raises(ValueError, match='Reverse-mode'):
    count(gradient, W, X, 3, steps=2)
  nested = lambda x, w, n: looped(x, w, n, 'refill', lambda x, w: looped(x, w, n, 'decode'))
  assert count(nested, X, W, 3, refill=3, decode=4) == 3 * 4 * DOT
  with pytest.raises(ValueError, match=r"the loop in '/decode' .* those with trips are \['refill'\]"):
    count(nested, X, W, 3, refill=3)  # the scope of the loop around it says nothing of it
  with pytest.raises(ValueError, match='needs a jax.named_scope'):
    count(looped, X, W, 3)
  assert count(lambda x, n: looped(x, None, n, inner=lambda x, w: x + 1), X, 3) == 0


@pytest.mark.parametrize('scopes, trips', [
    ('steps', 3), ('a/steps/b', 3), ('steps/other', 5), ('transpose(jvp(steps))', 3), ('vmap(steps)', 3)])
def test_scopes_under_transformations(scopes, trips):
  assert flops.loop_trips(scopes, {'steps': 3, 'other': 5}) == trips


@pytest.mark.parametrize('scopes', ['', 'a/b', 'jit(steps)', 'stepsize'])
def test_scopes_without_trips(scopes):
  with pytest.raises(ValueError, match='needs a jax.named_scope'):
    flops.loop_trips(scopes, {'steps': 3})


def test_of_a_conditional_the_branch_with_most_counts():
  one, three = (lambda x, w: x @ w), (lambda x, w: x @ w @ w @ w)
  assert count(lambda x, w, i: jax.lax.switch(i, [one, three, lambda x, w: x], x, w), X, W, 1) == 3 * DOT
  by_platform = lambda **branches: count(
      lambda x, w: jax.lax.platform_dependent(x, w, **branches), X, W)
  assert by_platform(tpu=one, default=three) == DOT
  assert by_platform(cpu=three, default=one) == DOT
  assert by_platform(cpu=three, tpu=one, default=three) == DOT


@pytest.mark.parametrize('platform, products', [('tpu', 1), ('cpu', 3), ('gpu', 2), ('other', 4)])
def test_of_branches_by_platform_the_one_of_the_platform_counts(platform, products):
  times = lambda n: lambda x, w: functools.reduce(jnp.dot, [x, *[w] * n])
  traced = jax.jit(lambda x, w: jax.lax.platform_dependent(
      x, w, cpu=times(3), tpu=times(1), cuda=times(2), default=times(4))).trace(X, W)
  found = flops.count(traced.jaxpr.jaxpr, {}, platform=platform)
  assert found == products * DOT and isinstance(found, int)


def test_kernels_are_found_where_the_platform_runs_them():
  def kernel(x_ref, out_ref):
    out_ref[...] = x_ref[...]

  run = lambda x: pl.pallas_call(kernel, out_shape=X, name='mine')(x)
  function = lambda x: jax.lax.scan(lambda x, _: (jax.lax.platform_dependent(
      x, tpu=run, default=lambda x: x), None), x, length=2)[0]
  jaxpr = jax.jit(function).trace(X).jaxpr.jaxpr
  assert flops.runs_kernel(jaxpr, 'mine') and not flops.runs_kernel(jaxpr, 'mine', 'cpu')
  assert not flops.runs_kernel(jaxpr, 'other')


def test_shards_each_count():
  """Rows over 'data', and each shard of 'model' has its columns; over an axis that is not taken shapes are whole."""
  mesh = sharding.mesh(data=2, fsdp=2, model=2)
  of_rows, of_columns = PartitionSpec('data'), PartitionSpec(None, 'model')

  def inner(x, w):
    return jax.shard_map(jnp.dot, in_specs=(PartitionSpec(), of_columns), out_specs=of_columns,
                         axis_names={'model'})(x, w)

  def outer(x, w):
    return jax.shard_map(inner, in_specs=(of_rows, PartitionSpec()), out_specs=of_rows, axis_names={'data'})(x, w)

  with jax.set_mesh(mesh):
    assert count(inner, X, W) == count(outer, X, W) == DOT
    # Each of eight computes all of it.
    whole = jax.shard_map(jnp.dot, in_specs=(PartitionSpec(),) * 2, out_specs=PartitionSpec())
    assert count(whole, X, W) == 8 * DOT


def test_kernels_count_by_name_and_shapes():
  def kernel(x_ref, w_ref, t_ref, out_ref):
    out_ref[...] = jnp.zeros_like(out_ref)

  def run(name):
    return lambda *args: pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((48, 4), 'float32'), name=name)(*args)

  args = [jax.ShapeDtypeStruct(shape, 'float32') for shape in ((48, 20), (20, 700), (48, 1))]
  assert count(run('token_logprob_forward'), *args) == 2 * 48 * 20 * 700
  assert count(run('decode_attention'), *args) == 0
  with pytest.raises(ValueError, match="the kernel 'other' are not known"):
    count(run('other'), *args)


@pytest.mark.parametrize('times, outer', [(moe.plain_times, moe.plain_outer), (moe.kernel_times, moe.kernel_outer)])
def test_of_a_grouped_product_each_row_counts_once(times, outer):
  groups = lambda size_E: moe.Groups(size_E, tile=128)
  of = lambda *shape, dtype='float32': jax.ShapeDtypeStruct(shape, dtype)
  x, y, w, size_E = of(256, 20), of(256, 136), of(3, 20, 136), of(3, dtype='int32')
  want = 2 * 256 * 20 * 136
  assert count(lambda x, w, size_E: times(x, w, groups(size_E), False), x, w, size_E) == want
  assert count(lambda y, w, size_E: times(y, w, groups(size_E), True), y, w, size_E) == want
  assert count(lambda x, y, size_E: outer(x, y, groups(size_E)), x, y, size_E) == want


def test_products_of_another_kind_are_an_error():
  image = jax.ShapeDtypeStruct((1, 2, 8, 8), 'float32')
  with pytest.raises(ValueError, match='conv_general_dilated are not counted'):
    count(lambda x: jax.lax.conv(x, x, (1, 1), 'SAME'), image)


# Of the update, traced for a TPU, on which attention and log-probabilities are kernels.

ROWS, T = 2, 512
POLICY = dataclasses.replace(
    tpu_test.POLICY, vocab_size=4096, width=128, num_heads=2, num_kv_heads=1, hidden_width=256)


def of_update(policy_config=POLICY, microbatches=1, **axes):
  """FLOPs of a chip, of an update of rows of which each is one rollout."""
  config = tpu_test.UPDATE.replace(row_length=T, microbatch_rows=ROWS, prompt_sharing=1.0)
  traced, _ = tpu_test.traced_update('v5e:2x2', policy_config, config, T // 2, **axes)
  return flops.count(traced.jaxpr.jaxpr, {
      update.MICROBATCHES: microbatches, moe.CHUNKS: 1 / moe.HEADROOM}) / 4


def test_an_update_executes_what_it_uses_and_a_third_of_outputs_and_half_of_attention():
  """Of two rows a chip, nothing of whose layers is computed again."""
  c = POLICY
  matrices = ROWS * T * 2 * c.num_layers * arithmetic.layer_weights(c)
  read = ROWS * arithmetic.forward_flops(c, T, outputs=0)
  outputs, attention = ROWS * arithmetic.forward_flops(c, T) - read, read - matrices
  # Logits are computed in both passes, and scores and their gradient in both kernels of the second, of whole
  # blocks of 512; and the entropy's gradient is summed up by a product with ones.
  want = 3 * matrices + 4 * outputs + 9 / 2 * attention * 2
  assert of_update(microbatches=7, fsdp=4) == pytest.approx(7 * want, rel=2e-3)
  of = arithmetic.equal_lengths(tasks=0, rollouts=ROWS, prompt=1, completion=T)
  assert 1 < want / arithmetic.update_flops(c, of) < 2.5


@pytest.mark.slow
def test_what_remat_computes_again():
  c = POLICY
  layer = ROWS * T * 2 * c.num_layers
  attention = 2 * 2 * ROWS * c.num_layers * c.num_heads * c.head_width * T * T  # of whole blocks
  none, dots, kept, full = (of_update(dataclasses.replace(c, remat=x), fsdp=4)
                            for x in ('none', 'dots', 'attention', 'full'))
  assert dots == none
  # The last product of a layer is not asked for again.
  assert kept - none == layer * (arithmetic.layer_weights(c) - c.width * c.hidden_width)
  assert full - kept == attention


@pytest.mark.slow
def test_a_mesh_divides_the_work_of_an_update():
  c = dataclasses.replace(POLICY, num_kv_heads=2, vocab_size=8192)  # of which each half is a kernel's
  # Half as many rows at once.
  assert of_update(c, data=2, model=2) == pytest.approx(of_update(c, fsdp=4) / 2, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{'fsdp': 4}, {'expert': 4}, {'fsdp': 2, 'expert': 2}], ids=str)
def test_of_experts_the_active_ones_count(axes):
  """Three products forward, two of them again, and six back; however experts are divided."""
  c = dataclasses.replace(POLICY, num_experts=8, experts_per_token=2)
  dense = dataclasses.replace(c, num_experts=0)
  experts = 2 * ROWS * T * c.num_layers * c.experts_per_token * c.width * c.hidden_width
  router = 2 * ROWS * T * c.num_layers * c.width * c.num_experts
  mlp = 2 * ROWS * T * c.num_layers * c.width * c.hidden_width
  assert of_update(c, **axes) == pytest.approx(of_update(dense, fsdp=4) - 9 * mlp + 11 * experts + 3 * router, rel=1e-6)
