"""Experts against a plain numpy form, on meshes against one device, and the kernel against its reference."""

import contextlib
import functools

import jax
from jax.extend.core import jaxprs_in_params
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from kr_jax import sharding
from kr_jax.model import moe
from kr_jax.costs import hlo

B, T, D, F, E, X = 8, 6, 16, 8, 8, 3
NAMES = ('h_BTD', 'router_DE', 'gate_EDF', 'up_EDF', 'down_EFD')
SIZES = dict(B=B, T=T, D=D, F=F, E=E)


def shapes_of(**sizes):
  sizes = SIZES | sizes
  return [[sizes[letter] for letter in name.rpartition('_')[2]] for name in NAMES]


def arguments(**sizes):
  rng = np.random.default_rng(0)
  return [np.float32((1.0 if name[0] == 'h' else 0.3) * rng.normal(size=shape))
          for name, shape in zip(NAMES, shapes_of(**sizes))]


def silu(x):
  return x / (1 + np.exp(-x))


def reference(h_BTD, router_DE, gate_EDF, up_EDF, down_EFD, normalize):
  """Token by token and expert by expert, in the dtype of the arguments."""
  y_BTD, expert_BTX = np.zeros_like(h_BTD), np.zeros((B, T, X), int)
  for b, t in np.ndindex(B, T):
    h_D = h_BTD[b, t]
    p_E = np.exp(h_D @ router_DE)
    p_E /= p_E.sum()
    expert_BTX[b, t] = np.argsort(-p_E, kind='stable')[:X]
    total = sum(p_E[e] for e in expert_BTX[b, t]) if normalize else 1.0
    for e in expert_BTX[b, t]:
      y_BTD[b, t] += p_E[e] / total * ((silu(h_D @ gate_EDF[e]) * (h_D @ up_EDF[e])) @ down_EFD[e])
  return y_BTD, expert_BTX


def mlp(*args, normalize=True):
  return moe.mlp(*args, per_token=X, normalize=normalize, activation=jax.nn.silu)


def loss(*args, normalize=True):
  """A sum in which each number of y_BTD has a weight of its own."""
  y_BTD, expert_BTX = mlp(*args, normalize=normalize)
  return jnp.sum(y_BTD * np.random.default_rng(9).normal(size=y_BTD.shape).astype(np.float32)), (y_BTD, expert_BTX)


def with_gradients(args, **options):
  """y_BTD and expert_BTX, and the gradient by each argument."""
  function = functools.partial(loss, **options)
  (_, found), grads = jax.jit(jax.value_and_grad(function, argnums=range(len(NAMES)), has_aux=True))(*args)
  return *found, grads


def test_experts_by_hand():
  """Of p = (3/4, 1/4); the experts make of 1: 2 and 10."""
  args = np.ones((1, 1, 1)), np.log([[3.0, 1.0]]), np.ones((2, 1, 1)), np.array([[[2.0]], [[10.0]]]), np.ones((2, 1, 1))
  args = [x.astype(np.float32) for x in args]
  of = lambda per_token, normalize: jax.jit(functools.partial(
      moe.mlp, per_token=per_token, normalize=normalize, activation=lambda x: x))(*args)
  for per_token, normalize, y in ((1, True, 2.0), (1, False, 1.5), (2, True, 4.0)):
    found, expert_BTX = of(per_token, normalize)
    np.testing.assert_allclose(found, [[[y]]], rtol=1e-6)
    assert expert_BTX.tolist() == [[[0, 1][:per_token]]]


@pytest.mark.parametrize('normalize', [True, False])
def test_experts_and_gradients_are_those_of_the_plain_form(normalize):
  args = arguments()
  exact = [x.astype(np.float64) for x in args]
  want, want_experts = reference(*exact, normalize)
  y_BTD, expert_BTX, grads = with_gradients(args, normalize=normalize)
  np.testing.assert_allclose(y_BTD, want, atol=1e-5)
  np.testing.assert_array_equal(expert_BTX, want_experts)
  weight_BTD = np.random.default_rng(9).normal(size=want.shape)
  rng, step = np.random.default_rng(1), 1e-6
  for i, name in enumerate(NAMES):
    direction = rng.normal(size=exact[i].shape)
    moved = lambda sign: np.sum(weight_BTD * reference(
        *exact[:i], exact[i] + sign * step * direction, *exact[i + 1:], normalize)[0])
    slope = (moved(1) - moved(-1)) / (2 * step)
    assert np.sum(grads[i] * direction) == pytest.approx(slope, rel=1e-4, abs=1e-4), name


def test_of_equal_experts_those_of_low_numbers_are_chosen():
  h_BTD, router_DE, *_ = arguments()
  _, expert_BTX = moe.route(h_BTD, 0 * router_DE, per_token=X, normalize=True)
  assert np.unique(expert_BTX.reshape(-1, X), axis=0).tolist() == [[0, 1, 2]]


def test_a_token_goes_to_the_same_experts_alone_as_among_others():
  """So a sampler, which reads one token of each sequence, routes as the trainer does."""
  h_BTD, router_DE, *_ = arguments()
  route = jax.jit(functools.partial(moe.route, per_token=X, normalize=True))
  weight_BTX, expert_BTX = route(h_BTD, router_DE)
  for t in range(T):
    weight_B1X, expert_B1X = route(h_BTD[:, t:t + 1], router_DE)
    np.testing.assert_array_equal(expert_B1X, expert_BTX[:, t:t + 1])
    np.testing.assert_allclose(weight_B1X, weight_BTX[:, t:t + 1], rtol=1e-6)


def test_the_router_computes_in_float32():
  """Two experts that bfloat16 cannot tell apart."""
  router_DE = np.zeros((D, E), np.float32)
  router_DE[:, 4], router_DE[:, 2] = 1.001, 1.0
  _, expert_BTX = moe.route(jnp.ones((1, 1, D), jnp.bfloat16), router_DE, per_token=2, normalize=True)
  assert expert_BTX.tolist() == [[[4, 2]]]


def routed(args, experts):
  """With a router that sends all tokens to these experts."""
  h_BTD, router_DE, *matrices = args
  h_BTD, router_DE = h_BTD.copy(), 0.01 * router_DE
  h_BTD[..., 0], router_DE[0] = 1.0, 0.0
  router_DE[0, list(experts)] = 30.0
  return [h_BTD, router_DE, *matrices]


def test_experts_without_tokens():
  args = routed(arguments(), (1, 6, 4))
  want, _ = reference(*(x.astype(np.float64) for x in args), True)
  y_BTD, expert_BTX, grads = with_gradients(args)
  assert set(np.unique(expert_BTX)) == {1, 4, 6}
  np.testing.assert_allclose(y_BTD, want, atol=1e-5)
  for grad_EIO in grads[2:]:
    assert [e for e in range(E) if np.any(grad_EIO[e])] == [1, 4, 6] and np.all(np.isfinite(grad_EIO))


slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive


@pytest.mark.parametrize('axes, experts', [
    pytest.param({'expert': 8}, (), marks=slow), pytest.param({'data': 2, 'expert': 4}, (), marks=slow),
    ({'fsdp': 2, 'expert': 2, 'model': 2}, ()), pytest.param({'fsdp': 4, 'model': 2}, (), marks=exhaustive),
    pytest.param({'data': 2, 'fsdp': 2, 'expert': 2}, (), marks=exhaustive),
    # In two chunks on one device, and in few or none on the others.
    pytest.param({'data': 2, 'expert': 4}, (2, 3), marks=slow),
    pytest.param({'expert': 8}, (5,), marks=exhaustive)], ids=str)
def test_experts_on_a_mesh_are_those_of_one_device(axes, experts):
  args = routed(arguments(T=96), experts) if experts else arguments()
  y_BTD, expert_BTX, grads = with_gradients(args)
  with jax.set_mesh(sharding.mesh(**axes)):
    y_there, expert_there, grads_there = with_gradients(args)
  np.testing.assert_array_equal(expert_there, expert_BTX)
  np.testing.assert_allclose(y_there, y_BTD, atol=1e-5)
  for name, found, want in zip(NAMES, grads_there, grads, strict=True):
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max(), err_msg=name)


@pytest.mark.slow
def test_gradients_of_experts_are_divided_as_the_matrices_are():
  """So none is summed as a whole: along 'fsdp' each device receives its part alone."""
  mesh = sharding.mesh(fsdp=2, expert=2, model=2)
  params = dict(zip(NAMES[1:], arguments()[1:]))

  def grads(params, h_BTD):
    return jax.grad(lambda params: loss(h_BTD, *(sharding.gather(name, params[name]) for name in NAMES[1:]))[0])(params)

  with jax.set_mesh(mesh):
    h_BTD = sharding.put(arguments()[0], PartitionSpec(sharding.ROWS))
    program = jax.jit(grads).lower(jax.device_put(params, sharding.of(mesh, params)), h_BTD).compile()
  for name, found in program.output_shardings.items():
    assert found.is_equivalent_to(sharding.of(mesh, params)[name], len(params[name].shape)), name
  moved = hlo.count(program.as_text(), mesh.shape, {moe.CHUNKS: 1.0})
  matrix = 4 * D * F * E // 4  # bytes of one of a device's experts' matrices
  assert moved['reduce-scatter', ('fsdp',)].bytes == 3 * matrix / 2
  assert all(x.bytes < matrix for (kind, axes), x in moved.items() if kind == 'all-reduce' and 'fsdp' in axes)


@pytest.mark.parametrize('axes', [
    {'data': 2, 'model': 4}, pytest.param({'model': 8}, marks=slow),
    pytest.param({'model': 8, 'mapped': False}, marks=slow)], ids=str)
def test_a_sampler_has_whole_experts_divided_over_model(axes):
  """And no device waits for one that decodes other rollouts."""
  args, axes = arguments(), dict(axes)
  want, want_experts = jax.jit(mlp)(*args)
  mapped = axes.pop('mapped', True)  # not where there is one shard of rows
  mesh, rows = sharding.mesh(**axes), PartitionSpec(sharding.ROWS)
  with jax.set_mesh(mesh):
    params = dict(zip(NAMES[1:], args[1:]))
    at = sharding.of(mesh, params, ('model',))
    params = [jax.device_put(params[name], at[name]) for name in NAMES[1:]]
    assert {s.data.shape for s in params[1].addressable_shards} == {(E // axes['model'], D, F)}
    of_shard = jax.shard_map(mlp, in_specs=(rows, *[PartitionSpec()] * 4), out_specs=rows,
                             axis_names=set(sharding.ROWS), check_vma=False)
    program = jax.jit(of_shard if mapped else mlp).lower(args[0], *params).compile()
    y_BTD, expert_BTX = program(jax.device_put(args[0], program.input_shardings[0][0]), *params)
  np.testing.assert_array_equal(expert_BTX, want_experts)
  np.testing.assert_allclose(y_BTD, want, atol=1e-5)
  moved = hlo.count(program.as_text(), mesh.shape, {moe.CHUNKS: 1.0})
  # Each device's part of the sum for the tokens of its shard, and nothing else.
  m, bytes_ = axes['model'], 4 * B * T * D // axes.get('data', 1)
  assert {x: moved.bytes for x, moved in moved.items()} == {('all-reduce', ('model',)): 2 * (m - 1) / m * bytes_}


def grouped(jaxpr):
  """Shapes of the grouped products in a program."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'ragged_dot_general':
      yield [x.aval.shape for x in eqn.invars]
    for inner in jaxprs_in_params(eqn.params):
      yield from grouped(inner)


def test_memory_is_that_of_twice_the_balanced_share():
  """Whatever the balance: rows of products are 2 of 8 parts of the pairs of all tokens, in whole tiles."""
  args = [np.zeros(shape, np.float32) for shape in shapes_of(T=512)]
  with jax.set_mesh(sharding.mesh(expert=8)):
    traced = jax.jit(jax.grad(lambda *args: loss(*args)[0], argnums=range(5))).trace(*args)
  rows = {shape[0][0] for shape in grouped(traced.jaxpr.jaxpr)}
  assert rows == {2 * B * 512 * X // 8}


def test_too_many_pairs_to_sort():
  args = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes_of(B=1024, T=2 ** 18)]
  with pytest.raises(ValueError, match='805306368 pairs .* 8 experts; set a smaller pack.microbatch_rows'):
    jax.eval_shape(mlp, *args)


def test_load_counts_the_tokens_that_count():
  expert_BTX = np.array([[[0, 3], [3, 1]], [[2, 3], [0, 1]]], np.int32)
  counted_BT = np.array([[True, True], [False, True]])
  assert moe.load(expert_BTX, counted_BT, 5).tolist() == [2, 2, 0, 2, 0]


@pytest.mark.parametrize('axes', [{}, pytest.param({'data': 2, 'model': 4}, marks=slow)], ids=str)
def test_one_of_several_layers_is_read(axes):
  h_BTD, router_DE, *matrices = arguments()
  want, _ = jax.jit(mlp)(h_BTD, router_DE, *matrices)
  stacked = [np.stack([0 * x, x, np.nan * x]) for x in matrices]
  of_layer = jax.jit(lambda layer, *args: moe.mlp(
      *args, per_token=X, normalize=True, activation=jax.nn.silu, layer=layer)[0])
  with jax.set_mesh(sharding.mesh(**axes)) if axes else contextlib.nullcontext():
    np.testing.assert_allclose(of_layer(np.int32(1), h_BTD, router_DE, *stacked), want, atol=1e-6)


# The kernel.


@pytest.mark.parametrize('size_E', [
    (3, 0, 200, 7), pytest.param((0, 0, 0, 256), marks=slow), *(pytest.param(x, marks=exhaustive) for x in (
        (0, 1, 0, 0), (256, 0, 0, 0), (10, 20, 30, 40), (128, 0, 128, 0), (0, 0, 0, 0)))], ids=str)
@pytest.mark.parametrize('dtype', [np.float32, pytest.param(jnp.bfloat16, marks=exhaustive)])
def test_the_kernel_computes_the_products_of_the_reference(size_E, dtype):
  """Rows behind the last expert's have no meaning, even where they are no numbers."""
  rng, n = np.random.default_rng(0), sum(size_E)
  groups = moe.Groups(np.array(size_E, np.int32), tile=128)
  x_GI, y_GO, matrix = (rng.normal(size=shape).astype(dtype) for shape in ((256, 40), (256, 136), (4, 40, 136)))
  x_GI[n:] = y_GO[n:] = np.nan
  close = functools.partial(np.testing.assert_allclose, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-4, atol=1e-3)
  zero = lambda x: np.where(np.arange(256)[:, None] < n, x, 0).astype(dtype)
  exact = lambda x: np.asarray(x, np.float32)
  for rows, transposed in ((x_GI, False), (y_GO, True)):
    found = moe.kernel_times(rows, matrix, groups, transposed, interpret=True)
    close(exact(found[:n]), exact(moe.plain_times(zero(rows), matrix, groups, transposed)[:n]))
  of_layer = functools.partial(moe.kernel_times, x_GI, np.stack([0 * matrix, matrix]), transposed=False, interpret=True)
  one = moe.kernel_times(x_GI, matrix, groups, False, interpret=True)
  np.testing.assert_array_equal(of_layer(groups._replace(layer=1))[:n], one[:n])
  close(moe.kernel_outer(x_GI, y_GO, groups, interpret=True), moe.plain_outer(zero(x_GI), zero(y_GO), groups))


@pytest.mark.slow
def test_experts_by_the_kernel_are_those_of_the_reference(monkeypatch):
  args = arguments()
  y_BTD, _, grads = with_gradients(args)
  monkeypatch.setattr(sharding, 'platform', lambda: 'tpu')
  monkeypatch.setattr(moe, 'gmm', functools.partial(moe.gmm, interpret=True))
  monkeypatch.setattr(moe, 'tgmm', functools.partial(moe.tgmm, interpret=True))
  monkeypatch.setattr(moe, 'kernel_times', functools.partial(moe.kernel_times, interpret=True))
  monkeypatch.setattr(moe, 'kernel_outer', functools.partial(moe.kernel_outer, interpret=True))
  y_there, _, grads_there = with_gradients(args)
  np.testing.assert_allclose(y_there, y_BTD, atol=1e-5)
  for name, found, want in zip(NAMES, grads_there, grads, strict=True):
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max(), err_msg=name)
