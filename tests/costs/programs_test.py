"""What programs cost that ran, against hand; and on eight devices against the arithmetic of the mesh."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kr_jax import phases
from kr_jax import queues as queues_lib
from kr_jax import sample
from kr_jax import sharding
from kr_jax import types
from kr_jax.costs import arithmetic
from kr_jax.costs import programs
from kr_jax.learning import update
from kr_jax.model import decode
from kr_jax.model import policy
from tests import knobs

N = 32
DOT = 2 * 8 * N * N  # of x @ w


@jax.jit
def nested(x, w, n, m):
  """A product; n times one more, and m times two more."""
  def inner(i, x):
    return x @ w @ w

  def outer(i, x):
    with jax.named_scope('inner'):
      return jax.lax.fori_loop(0, m, inner, x @ w)

  with jax.named_scope('outer'):
    return jax.lax.fori_loop(0, n, outer, x @ w)


@pytest.fixture
def compiled():
  """What jax traces, lowers or compiles in a test."""
  events = []
  listener = lambda event, duration, **_: events.append(event)
  jax.monitoring.register_event_duration_secs_listener(listener)
  yield events
  jax.monitoring.unregister_event_duration_listener(listener)


ARGS = np.ones((8, N), np.float32), np.ones((N, N), np.float32), np.int32(2), np.int32(3)


def test_a_program_that_ran_is_counted_without_compiling_again(compiled):
  """2 trips of the outer loop, and 3 of the inner one in each: 6 trips in all."""
  call = programs.begin(nested, ARGS)
  nested(*ARGS)
  compiled.clear()
  found = programs.executed(call, {'outer': 2, 'inner': 2 * 3})
  assert found == {
      'flops_executed': DOT * (1 + 2 + 6 * 2), 'collective_bytes': 0, 'host_bytes': 4 * (8 * N + N * N + 2)}
  assert all(isinstance(n, int) for n in found.values())
  program = programs.begin(nested, ARGS).program(('outer', 'inner'))
  assert program.flops({'outer': 0, 'inner': 0}) == DOT and program.collective_bytes({'outer': 5, 'inner': 5}) == 0
  assert 4 * (2 * 8 * N + N * N) <= program.memory < 8 * 4 * (2 * 8 * N + N * N) and not program.decodes_by_kernel
  assert not compiled


def test_a_program_is_counted_once_for_all_runs(monkeypatch):
  nested(*ARGS)
  program = programs.begin(nested, ARGS).program(('outer', 'inner'))
  monkeypatch.setattr(programs, '_count', None)
  for n in range(3):
    call = programs.begin(nested, (*ARGS[:2], np.int32(n), np.int32(1)))
    assert call.program(('outer', 'inner')) is program


def test_what_tells_programs_apart():
  """Shapes, static arguments, what is of the host, and on a mesh how arrays are divided; not what arrays hold."""
  function = jax.jit(lambda x, key, n: x * n, static_argnums=2)
  shapes = lambda *args: programs.begin(function, args).shapes
  x, key = jnp.ones((8, N)), jax.random.key(0)
  first = shapes(x, key, 2)
  assert shapes(x + 1, jax.random.key(1), 2) is first
  found = [first, shapes(x[:4], key, 2), shapes(x.astype(int), key, 2), shapes(x, jax.random.split(key), 2),
           shapes(x, key, 3), shapes(np.asarray(x), key, 2)]
  mesh = sharding.mesh(fsdp=8)
  with jax.set_mesh(mesh):
    for axes in ((), ('fsdp',)):
      found.append(shapes(jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))), key, 2))
  assert len(set(found)) == len(found) == 8


@pytest.mark.parametrize('trips', [{}, {'outer': 1}, {'outer': 1, 'inner': 1, 'other': 1}], ids=str)
def test_trips_of_other_loops_are_an_error(trips):
  nested(*ARGS)
  program = programs.begin(nested, ARGS).program(('outer', 'inner'))
  with pytest.raises(ValueError, match=r"counted with \['inner', 'outer'\]; pass the trips of each"):
    program.flops(trips)


def test_what_is_donated_may_be_gone(compiled):
  move = jax.jit(lambda x, w: x @ w, donate_argnums=0)
  x, w = jnp.ones((8, N)), jnp.ones((N, N))
  call = programs.begin(move, (x, w))
  move(x, w)
  compiled.clear()
  assert x.is_deleted()
  assert programs.executed(call, {}) == {'flops_executed': DOT, 'collective_bytes': 0, 'host_bytes': 0}
  assert not compiled


def test_a_call_is_counted_in_the_phase_that_runs():
  x, w = jnp.ones((8, N)), np.ones((N, N), np.float32)
  times = jax.jit(lambda x, w: x @ w)
  assert float(programs.run(times, x, w)[0, 0]) == N  # no clock runs
  clock = phases.start()
  try:
    with phases.phase('update'):
      assert float(programs.run(times, x, w)[0, 0]) == N
      assert jax.eval_shape(lambda x: programs.run(times, x, w), x).shape == (8, N)  # runs nothing
    rows = {row['phase']: row for row in clock.drain()}
  finally:
    phases.stop()
  assert rows['update']['flops_executed'] == DOT and rows['update']['host_bytes'] == w.nbytes
  assert 'flops_executed' not in rows['start']


def test_what_cannot_be_counted_stops_nothing_and_is_said_once(caplog):
  @jax.jit
  def image(x):
    return jax.lax.conv(x, x, (1, 1), 'SAME')

  x = jnp.ones((1, 1, 4, 4))
  call = programs.begin(image, (x,))
  image(x)
  with caplog.at_level(logging.WARNING):
    for _ in range(2):
      assert programs.executed(call, {}) == {'collective_bytes': 0, 'host_bytes': 0}
    no_program = programs.begin(lambda x: x, (x,))
    assert programs.executed(no_program, {}) == {'host_bytes': 0}
  first, second = caplog.messages
  assert first.startswith('FLOPs of the program image are not known: ValueError: FLOPs of conv_general_dilated')
  assert second.startswith('FLOPs of the program <lambda> are not known: AttributeError')


def test_all_devices_send(compiled):
  """Of eight devices each has a row of x: three times they gather all, 7 rows of 32 numbers each."""
  mesh = sharding.mesh(fsdp=8)
  at = lambda x, *spec: jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*spec))

  @jax.jit
  def function(x, w, n):
    with jax.named_scope('steps'):
      return jax.lax.fori_loop(0, n, lambda i, x: at(at(at(x, 'fsdp') + 1) @ w, 'fsdp'), x)

  with jax.set_mesh(mesh):
    w = jax.device_put(np.ones((N, N), np.float32), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    args = np.ones((8, N), np.float32), w, np.int32(3)
    call = programs.begin(function, args)
    function(*args)
  compiled.clear()
  # An array of the host goes to each device.
  assert programs.executed(call, {'steps': 3}) == {
      'flops_executed': 3 * DOT, 'collective_bytes': 3 * 8 * 7 * 4 * N, 'host_bytes': 8 * 4 * (8 * N + 1)}
  assert not compiled


# The programs of a step, on eight devices of a CPU.

POLICY = policy.Config(
    vocab_size=64, num_layers=2, width=32, num_heads=8, num_kv_heads=8, head_width=8, hidden_width=48, rope_theta=100.0,
    tie_embeddings=True, dtype='float32', remat='none', lora_rank=0)
P, C = 4, 5


def rollouts_of(R):
  token_RC = np.full((R, C), 2, np.int32)
  return types.Rollouts(
      types.Prompts(np.full((R, P), 2, np.int32), np.full(R, P, np.int32), np.arange(R, dtype=np.int32)),
      task_R=np.arange(R, dtype=np.int32), token_RC=token_RC, logp_RC=np.float32(token_RC),
      ended_R=np.ones(R, np.int32), length_R=np.full(R, C, np.int32), decode_steps=np.int32(1))


@pytest.mark.exhaustive
@pytest.mark.parametrize('remat, gathers', [('none', 1), ('full', 2)])
def test_an_update_sends_parameters_and_gradients(remat, gathers):
  """Each of eight devices has an eighth of each matrix and two rows of 24 tokens.

  In each microbatch a device gathers the matrices of the layers: once, where they are kept for the backward pass, and
  again where layers are computed again. The vocabulary's is the same in all microbatches, so that XLA gathers it before
  the loop. A CPU adds up whole gradients, which sends 2 (n - 1) / n of them, and takes its part then. Gradients to
  embeddings are divided by width: token ids are gathered for them, and each device sends the others their part of the
  width of its tokens.
  """
  n, rows, T, microbatches, c = 8, 2, 24, 2, POLICY.replace(remat=remat)
  config = knobs.updates(row_length=T, microbatch_rows=rows, prompt_sharing=1.0)
  mesh, trips = sharding.mesh(fsdp=n), {update.MICROBATCHES: microbatches}
  with jax.set_mesh(mesh):
    state = update.init(policy.init(c, jax.random.key(0)), jax.random.key(1), config)
    rollouts = rollouts_of(microbatches * n * rows * 3)
    packed = update.pack_rollouts(rollouts, rollouts.length_R > 0, config)
    assert packed.first.tolist() == [0, microbatches]
    tokens = update.gather(rollouts, packed)
    tokens = tokens._replace(old_logp_BT=tokens.sampler_logp_BT)
    experience = update._experience(rollouts, np.zeros(len(rollouts.task_R), np.float32), config)
    args = state, {}, experience, tokens, packed.first, c, config
    call = programs.begin(update._step, args)
    update._step(*args)
  layers, vocabulary = c.num_layers * arithmetic.layer_weights(c), c.width * c.vocab_size
  of_tokens = microbatches * (4 * n * rows * T + 4 * rows * T * c.width)  # ids of all, gradients of its own
  gathered = microbatches * gathers * 4 * layers + 4 * vocabulary + of_tokens
  added = microbatches * 4 * (layers + vocabulary)
  found = programs.executed(call, trips)
  want = n * (n - 1) / n * (gathered + 2 * added)
  # Norms, counts and the gradient's norm are added up too.
  assert 1 < found['collective_bytes'] / want < 1.02
  tokens_computed = microbatches * n * rows * T
  masked = 2 * c.num_layers * c.num_heads * c.head_width * tokens_computed * T
  forward = 2 * tokens_computed * (layers + vocabulary) + 2 * masked
  # Of a layer that is computed again nothing asks for the last product.
  again = 2 * tokens_computed * c.num_layers * (
      arithmetic.layer_weights(c) - c.width * c.hidden_width) + 2 * masked if remat == 'full' else 0
  assert found['flops_executed'] == 3 * forward + again


@pytest.mark.exhaustive
def test_a_sampler_sends_what_model_divides():
  """On four shards of two devices, which divide heads, units and vocabulary between them.

  After attention and after the MLP of each layer, and after the embedding, the two add up what they have: each sends
  the width of each token. Of the last layer only the last token of a prompt is left. And logits are gathered.
  """
  shards, model, M, c = 4, 2, 8, POLICY
  mesh, config = sharding.mesh(fsdp=shards, model=model), knobs.sampler(
      slots=2, prefill=2, prompt_length=P, completion_length=C)
  prompts = rollouts_of(M).prompts
  with jax.set_mesh(mesh):
    params = decode.sampling_params(c, policy.init(c, jax.random.key(0)))
    queues = queues_lib.assign_to_queues(np.full(M, 2), total=2 * M, shards=shards)
    args = c, params, prompts, queues, sharding.move(jax.random.key(0)), config
    call = programs.begin(sample._decode, args)
    steps = int(sample._decode(*args)[0][-1][:, 0].sum())
  K = 4  # places for prompts, of 3 tasks and padding to two chunks
  chunks = sum(-(-int(tasks) // 2) for tasks in queues.tasks_Z)
  trips = {sample.PREFILL: chunks / shards, sample.REFILL: 1, sample.DECODE: steps / shards, 'windows': 0}
  layers, width, logits = c.num_layers, 4 * c.width, 4 * c.vocab_size // model
  prompt = 2 * (P * width * (1 + 2 * (layers - 1)) + 2 * width)  # of a chunk of two
  step = 2 * (width * (1 + 2 * layers) + logits)  # of two slots
  want = model * (chunks * prompt + steps * step) + shards * model * K * logits
  assert programs.executed(call, trips)['collective_bytes'] == want
