"""What a config takes on a slice, against arithmetic and against a run; and what does not fit is refused."""

import functools
import importlib
import json
import math
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from configs import common
from configs import hardware as hardware_config
from kr_jax import prepare
from kr_jax import sample
from kr_jax import sharding
from kr_jax import train
from kr_jax import types as types_lib
from kr_jax.allocation import allocate
from kr_jax.learning import pack
from kr_jax.learning import update
from kr_jax.model import decode
from kr_jax.model import policy
from kr_jax.costs import arithmetic
from kr_jax.costs import hardware as hardware_lib
from kr_jax.preflight import preflight
from kr_jax.preflight.suggest import overridden
from tests import configs_test
from tests import main_test

GIGA = 1e9
HARDWARE = hardware_lib.read(hardware_config.get_config())
V5E = hardware_lib.device(HARDWARE.of_topology('v5e'))


def small(**knobs):
  """A config that the TPU compiler takes seconds for: two layers, rows of 128 tokens."""
  c = common.base()
  c.policy.update(num_layers=2, width=256, head_width=64, hidden_width=512, dtype='bfloat16', remat='full')
  c.sample.update(slots=16, prefill=8, prompt_length=64, completion_length=65)
  c.pack.microbatch_rows = 2
  c.alloc.rollouts_per_step = 256
  c.tasks.per_step = c.evaluate.tasks_per_batch = 32
  return overridden(c.lock(), knobs)


# A vocabulary and rows that fill a TPU's tiles, so that bytes are those of numbers; whole rows.
TILED = {'policy.checkpoint': 'nowhere', 'policy.vocab_size': 512, 'policy.width': 512, 'pack.prompt_sharing': 1.0,
         'pack.microbatch_rows': 8, 'policy.remat': 'none'}


@pytest.fixture(scope='module')
def report():
  return run(small(**TILED))


def weights_of(config) -> int:
  """Parameters, counted one by one."""
  c = preflight.setup(config, 'v5e:2x2').trained
  shapes = jax.eval_shape(lambda key: policy.init(c, key), jax.random.key(0))
  return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def run(config, topology='v5e:2x2', hardware=HARDWARE, **options):
  return preflight.run(config, topology, preflight.Assumed(), hardware, **options)


def phases_of(report):
  return {name: types.SimpleNamespace(**phase) for name, phase in report['phases'].items()}


def test_few_tokens_read_few_experts():
  """Of four experts, of which a token meets two, one token reads half, two three quarters."""
  c = policy.Config(vocab_size=8, num_layers=2, width=8, num_heads=2, num_kv_heads=2, head_width=4, hidden_width=8,
                    num_experts=4, experts_per_token=2)
  mesh = sharding.mesh(preflight.devices('v5e:2x2'), model=4)
  with jax.set_mesh(mesh):
    params = jax.eval_shape(lambda: decode.sampling_params(c, policy.init(c, jax.random.key(0))))
  params = preflight._at(params, sharding.of(mesh, params, ('model',)))
  experts = 2 * 4 * 3 * 8 * 8  # bytes, of one of four, of two layers
  of = lambda tokens, c=c: preflight._weight_bytes(c, params, tokens)
  assert of(2) - of(1) == experts / 4 and preflight.device_bytes(params) - of(2) == experts / 4
  assert of(1, c.replace(num_experts=0)) == preflight.device_bytes(params)


@pytest.mark.slow
def test_a_report_is_of_the_programs_of_a_step(report):
  assert list(report['phases']) == ['reshard', 'sample', 'update'] and report['fits']
  assert report['chips'] == 4 and report['mesh']['learn'] == {'data': 1, 'fsdp': 4, 'expert': 1, 'model': 1}
  params, phases = weights_of(small(**TILED)), phases_of(report)
  for phase in phases.values():
    assert phase.hbm_bytes == 15.75 * 2 ** 30 and phase.fits
    assert phase.peak_bytes == (
        phase.argument_bytes + phase.output_bytes + phase.temp_bytes + phase.resident_bytes)
  # Parameters and two moments in float32, divided by four, but for norms.
  state = 3 * 4 * params / 4
  assert state < phases['sample'].resident_bytes < 1.02 * state
  tokens = 64 * 128 * (7 * 4 + 1)  # seven numbers and a mask, of 64 rollouts a chip
  assert state + tokens < phases['update'].argument_bytes < 1.02 * (state + tokens)
  assert phases['update'].output_bytes < 1e5  # the state is updated in place
  assert params < phases['reshard'].argument_bytes < 1.02 * params
  assert 2 * params < phases['sample'].argument_bytes < 1.02 * 2 * params
  json.dumps(report)


@pytest.mark.slow
def test_collectives_are_those_of_divided_parameters(report):
  """In bfloat16 each microbatch gathers every matrix once, as nothing is computed again, the embedding twice, and
  scatters the gradients."""
  c, phase = preflight.setup(small(**TILED), 'v5e:2x2').trained, report['phases']['update']
  sent = {kind: sum(x['bytes'] for x in phase['collectives'] if x['kind'] == kind)
          for kind in ('all-gather', 'reduce-scatter', 'all-reduce')}
  microbatches = 256 // 4 // 8
  gathered = c.num_layers * arithmetic.layer_weights(c) + 2 * c.vocab_size * c.width
  once = 2 * 3 / 4 * microbatches * gathered
  assert once < sent['all-gather'] < 1.15 * once
  assert 0.98 < (sent['reduce-scatter'] + sent['all-reduce'] / 2) / once < 1.2
  assert all(x['axes'] == ['fsdp'] for x in phase['collectives'])


@pytest.mark.slow
def test_seconds_and_dollars_are_arithmetic(report):
  seconds = 0
  for phase in report['phases'].values():
    sent = sum(moved['bytes'] for moved in phase['collectives'])
    least = max(phase['executed_flops'] / V5E.flops, sent / V5E.ici_bytes_per_s)
    assert phase['seconds'] * 0.4 >= (1 - 1e-9) * least
    seconds += phase['times'] * phase['seconds']
  assert report['seconds_per_step'] == pytest.approx(seconds)
  assert report['dollars_per_step'] == pytest.approx(seconds * 4 * 1.2 / 3600)
  assert report['tokens_per_step'] == 256 * 65
  useful = sum(phase['times'] * phase['useful_flops'] for phase in report['phases'].values())
  assert report['useful_share_of_peak'] == pytest.approx(useful / seconds / 197e12)


@pytest.mark.slow
def test_flops_are_those_of_microbatches_and_tokens(report):
  """64 rollouts a chip of 64 + 65 tokens, eight in each microbatch: forward and back. And all that is decoded."""
  c, phases = preflight.setup(small(**TILED), 'v5e:2x2').trained, phases_of(report)
  matrices, vocabulary = c.num_layers * arithmetic.layer_weights(c), c.width * c.vocab_size
  attention = c.num_layers * (2 + 3 + 4) * c.num_heads * c.head_width * 128 * (128 + 128)
  assert phases['update'].executed_flops == pytest.approx(
      64 * (128 * 2 * 3 * (matrices + vocabulary) + attention), rel=2e-3)
  assert phases['update'].useful_flops < phases['update'].executed_flops
  assert phases['sample'].executed_flops == pytest.approx(phases['sample'].useful_flops, rel=0.05)
  assert phases['reshard'].executed_flops == 0


def test_an_evaluation_of_more_tasks_than_a_step_has_is_looked_at_too():
  setup = preflight.setup(small(**{'evaluate.tasks_per_batch': 40}), 'v5e:2x2')
  found = {p.phase: p for p in preflight.programs(setup)}
  assert list(found) == ['reshard', 'sample', 'evaluate', 'update'] and found['evaluate'].times == 0
  assert found['evaluate'].args[2].token_MP.shape == (40, 64)


def test_a_step_in_waves_reads_prompts_once():
  """Of 256 rollouts 86 in the first wave and 85 in two more: all together the work of one wave."""
  one, three = ({p.phase: p for p in preflight.programs(preflight.setup(small(**{'alloc.waves': waves}), 'v5e:2x2'))}
                for waves in (1, 3))
  assert list(one) == ['reshard', 'sample', 'update']
  assert list(three) == ['reshard', 'sample', 'place', 'wave', 'update']
  assert [p.times for p in three.values()] == [1, 1, 2, 2, 1]
  assert three['sample'].useful_flops + 2 * three['wave'].useful_flops == one['sample'].useful_flops
  # 22 rollouts a shard in 16 slots.
  assert three['sample'].trips[sample.REFILL] == three['wave'].trips[sample.REFILL] == 22 / 16
  # The prefixes of 9 tasks, in chunks of 8, on each of four shards: 64 columns of two layers and two heads.
  prefixes = three['wave'].args[-1]
  assert prefixes.cache[0].k_LSKTH.shape == (2, 4 * 16, 2, 64, 64) and len(prefixes.logits_KV) == 4 * 16
  assert jax.tree.leaves(three['place'].args)[:-1] == jax.tree.leaves(prefixes)
  logits = 4 * prefixes.logits_KV.shape[1]
  assert preflight.device_bytes(prefixes) == three['place'].read_bytes == 16 * (2 * 2 * 2 * 64 * 64 * 2 + logits)


@pytest.mark.slow
@pytest.mark.parametrize('knobs', [
    {}, pytest.param({'mesh.sample_model': 2, 'sample.cache': 'int8'}, marks=pytest.mark.exhaustive)], ids=str)
def test_prefixes_stay_between_waves(knobs):
  """Nothing but prefixes is held in addition; and each layer's are sent once."""
  config = small(**TILED, **knobs, **{'alloc.waves': 2})
  report = run(config, phases=['sample', 'place', 'wave'])
  first, place, wave = phases_of(report).values()
  program = {p.phase: p for p in preflight.programs(preflight.setup(config, 'v5e:2x2'))}['wave']
  prefixes, shards = preflight.device_bytes(program.args[-1]), 4 // knobs.get('mesh.sample_model', 1)
  assert report['fits'] and prefixes <= place.output_bytes < 2.1 * prefixes  # heads of 64 take tiles of 128
  assert wave.argument_bytes - first.argument_bytes == pytest.approx(place.output_bytes, rel=0.02)
  assert first.output_bytes - wave.output_bytes == pytest.approx(place.output_bytes, rel=0.02)
  rollouts = 128 // shards * 128 * 8  # a token and its log-probability; 65 columns are a tile
  assert rollouts <= wave.output_bytes < 1.1 * rollouts and wave.executed_flops < first.executed_flops
  sent = sum(x['bytes'] for x in place.collectives if x['kind'] == 'all-gather')
  assert sent == pytest.approx(prefixes * (shards - 1), rel=0.05)
  assert not any('model' in x['axes'] for x in place.collectives)


@pytest.mark.slow
def test_shapes_of_waves_are_those_that_a_step_gives(monkeypatch):
  """On eight devices of this machine."""
  config = importlib.import_module('configs.arithmetic').get_config('debug')
  config = overridden(config, {'alloc.waves': 2, 'policy.num_layers': 1, 'mesh.sample_model': 2})
  setup = prepare.abstract(config, jax.devices())
  want = {p.phase: p for p in preflight.programs(setup) if p.phase in ('sample', 'place', 'wave')}
  seen = []
  for name in ('_decode', '_place', '_decode_on'):
    def spied(*args, function=getattr(sample, name)):
      seen.append((function, args))
      return function(*args)
    monkeypatch.setattr(sample, name, spied)
  M, totals = config.tasks.per_step, allocate.wave_rollouts(config.alloc)
  prompts = types_lib.Prompts(np.zeros((M, setup.sample.prompt_length), np.int32), np.ones(M, np.int32),
                              np.arange(M, dtype=np.int32))
  with jax.set_mesh(setup.sample_mesh):
    params = decode.sampling_params(setup.policy, policy.init(setup.policy, jax.random.key(0)))
    waves = sample.Waves(setup.policy, params, prompts, jax.random.key(0), setup.sample, totals=totals)
    for total in totals:
      waves.sample(np.full(M, total // M))
  for program, (function, args) in zip(want.values(), seen, strict=True):
    assert program.function is function and shapes(args) == shapes(program.args)
  for x, y in zip(*(jax.tree.leaves(args[-1]) for args in (seen[2][1], want['wave'].args))):
    assert x.sharding.shard_shape(x.shape) == y.sharding.shard_shape(y.shape)


def test_shorter_rollouts_take_less():
  config = small()
  setup = preflight.setup(config, 'v5e:2x2')
  full, half = ({p.phase: p for p in preflight.programs(setup, assumed)}
                for assumed in (preflight.Assumed(), preflight.Assumed(0.4, 20, 30)))
  # 64 rollouts a shard in 16 slots, 8 prompts in chunks of 8; tokens of a rollout.
  assert full['sample'].trips == {sample.PREFILL: 1, sample.REFILL: 4, sample.DECODE: 65}
  assert half['sample'].trips == {sample.PREFILL: 1, sample.REFILL: 4, sample.DECODE: 30}
  assert half['update'].trips[update.MICROBATCHES] < full['update'].trips[update.MICROBATCHES]
  assert half['update'].useful_flops < half['sample'].useful_flops * 3 < full['update'].useful_flops * 3
  for assumed in (preflight.Assumed(0.4, 65, 30), preflight.Assumed(0.4, 20, 66)):
    with pytest.raises(ValueError, match='are above sample.prompt_length=64 or sample.completion_length=65'):
      preflight.programs(setup, assumed)


@pytest.mark.parametrize('prompt, completion, prompt_sharing', [
    (64, 65, 0.0), (20, 30, 0.0), (3, 60, 0.0), (20, 30, 1.0)])
def test_microbatches_are_as_many_as_packing_fills(prompt, completion, prompt_sharing):
  config = small(**{'pack.prompt_sharing': prompt_sharing})
  setup = preflight.setup(config, 'v5e:2x2')
  lengths = {'tasks': 32, 'rollouts': 256, 'prompt': prompt, 'completion': completion}
  shape = pack.shape(prompt_length=64, completion_length=65, rollouts_per_task=8, row_length=128,
                     microbatch_rows=2, prompt_sharing=prompt_sharing, shards=4)
  packed = pack.segments(
      np.arange(256) // 8, np.full(256, prompt - 1), np.full(256, completion), np.zeros(256, int),
      minibatches=1, shape=shape, microbatches=pack.max_microbatches(256, 128, minibatches=1, shape=shape))
  assert preflight._microbatches(setup, lengths, 4) == pytest.approx(packed.first[-1], rel=0.15)


@pytest.mark.parametrize('knobs, phases', [
    ({'grpo.tis_cap': 2.0, 'optimizer.minibatches': 2}, ['reshard', 'sample', 'score', 'update']),
    ({'grpo.kl_coef': 0.1}, ['reshard', 'sample', 'reference', 'update']),
    ({'policy.lora_rank': 4, 'grpo.kl_coef': 0.1}, ['reshard', 'sample', 'reference', 'update'])], ids=str)
def test_log_probabilities_are_taken_where_the_loss_asks_for_them(knobs, phases):
  found = preflight.programs(preflight.setup(small(**knobs), 'v5e:2x2'))
  assert [p.phase for p in found] == phases
  by_phase = {p.phase: p for p in found}
  score, update_ = by_phase[phases[2]].useful_flops, by_phase['update'].useful_flops * by_phase['update'].times
  # Adapters alone have gradients: of the products of the layers and of the output a pass is left out.
  assert 2 * score < update_ < 2.3 * score if 'policy.lora_rank' in knobs else update_ == 3 * score
  if 'policy.lora_rank' in knobs:  # the base is resident with a state of adapters, over heads and units whole
    base, adapters = weights_of(small()), weights_of(small(**knobs)) - weights_of(small())
    assert base < preflight.device_bytes(by_phase['sample'].resident) < base + 3 * 4 * adapters


@pytest.mark.exhaustive
@pytest.mark.parametrize('knobs', [{'grpo.tis_cap': 2.0, 'optimizer.minibatches': 2},
                                   {'policy.lora_rank': 4, 'grpo.kl_coef': 0.1}], ids=str)
def test_programs_that_take_log_probabilities_fit(knobs):
  report = run(small(**knobs))
  phases = list(report['phases'].values())
  assert report['fits'] and phases[2]['executed_flops'] < phases[3]['executed_flops'] * phases[3]['times']


@pytest.mark.slow
@pytest.mark.parametrize('knobs', [{'grpo.kl_coef': 0.1, 'grpo.tis_cap': 2.0, 'optimizer.minibatches': 2},
                                   pytest.param({'policy.lora_rank': 2}, marks=pytest.mark.exhaustive)], ids=str)
def test_shapes_are_those_that_a_run_gives(knobs, data_dir, tmp_path, monkeypatch):
  """On eight devices of this machine: what each program is lowered for is what training calls it with."""
  config = importlib.import_module('configs.arithmetic').get_config('debug')
  config = overridden(config, knobs | {
      'num_steps': 1, 'warm_start.num_steps': 0, 'evaluate.every': 0, 'evaluate.tasks': 16,
      'evaluate.rollouts': 1, 'policy.num_layers': 1, 'tasks.data_dir': data_dir, 'mesh.sample_model': 2})
  want = {}
  for program in preflight.programs(prepare.abstract(config, jax.devices())):
    want.setdefault(program.function, []).append(program.args)
  seen = {function: [] for function in want}
  for module, name in ((decode, 'sampling_params'), (sample, '_decode'), (update, 'logps'), (update, '_step')):
    def spied(*args, function=getattr(module, name)):
      seen.get(function, []).append(jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
          if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) else x, args))
      return function(*args)
    monkeypatch.setattr(module, name, spied)
  train.train(prepare.prepare(config), str(tmp_path / 'run'))
  for function, wanted in want.items():
    # Evaluations sample too: before and after the step, with a batch of their own.
    found = [args for args in seen[function] if shapes(args) in map(shapes, wanted)]
    assert len(found) >= len(wanted), function
    for args in found:
      for x, y in zip(*map(jax.tree.leaves, (args, wanted[[*map(shapes, wanted)].index(shapes(args))]))):
        if isinstance(x, jax.ShapeDtypeStruct) and isinstance(y, jax.ShapeDtypeStruct) and x.ndim:
          assert x.sharding.shard_shape(x.shape) == y.sharding.shard_shape(y.shape)


def shapes(args):
  return [(x.shape, str(x.dtype)) for x in jax.tree.leaves(args) if hasattr(x, 'shape')]


# What does not fit.


def test_a_program_that_the_compiler_refuses():
  """It says what it would need: two products of [2^17, 2^17] in float32, on a chip of 15.75 GiB."""
  mesh = sharding.mesh(preflight.devices('v5e:2x2')[:1])
  x = jax.ShapeDtypeStruct((2 ** 17, 2 ** 17), jnp.float32,
                           sharding=jax.sharding.NamedSharding(mesh, PartitionSpec()))
  program = preflight.Program('update', jax.jit(lambda x: x @ x @ x), (x,), mesh, 1, (x,), {}, 1.0)
  phase = preflight.measure(program, V5E, 0.4)
  assert not phase.fits and phase.temp_bytes is phase.seconds is phase.executed_flops is None
  assert phase.resident_bytes == 2 ** 36 and phase.peak_bytes >= 2 * 2 ** 36


@pytest.mark.parametrize('message, needed', [
    ('Used 1.50G of 15.75G hbm', 1.5 * 2 ** 30), ('HLO temporaries (54.01T) exceeds', 54.01 * 2 ** 40)])
def test_what_the_compiler_says_of_memory(message, needed):
  def compile_():
    raise jax.errors.JaxRuntimeError(f'RESOURCE_EXHAUSTED: {message}')

  assert preflight._compile(types.SimpleNamespace(compile=compile_)) == (None, int(needed))


def test_what_is_far_too_large_is_not_compiled(monkeypatch):
  monkeypatch.setattr(preflight, 'programs', lambda *_: pytest.fail('something was traced'))
  with pytest.raises(ValueError, match='the run takes at least .* memory of a device, in sampling, .*policy.width'):
    run(small(**TILED | {'policy.width': 2 ** 24}), 'v5e:2x2')


@pytest.mark.parametrize('message', [
    'INTERNAL: Used 3.00G of 15.75G hbm', 'RESOURCE_EXHAUSTED: no threads are left'])
def test_another_error_of_the_compiler_is_no_lack_of_memory(message):
  def compile_():
    raise jax.errors.JaxRuntimeError(message)

  mesh = sharding.mesh(preflight.devices('v5e:2x2')[:1])
  broken = preflight.Program('update', types.SimpleNamespace(trace=lambda: types.SimpleNamespace(
      lower=lambda: types.SimpleNamespace(compile=compile_))), (), mesh, 1, (), {}, 1.0)
  with pytest.raises(jax.errors.JaxRuntimeError, match=message):
    preflight.measure(broken, V5E, 0.4)


@pytest.mark.parametrize('topology, named', [
    ('v3:2x2', "no figures of the chip 'v3' of 'v3:2x2'; there are of .*'v4', 'v5e'"),
    ('h100:2', "profile 'h100' has no hbm_usable_gib"),
    ('v5e:3x3', 'topology=v5e:3x3 is none of the TPU compiler')])
def test_slices_that_are_none(topology, named):
  with pytest.raises(ValueError, match=named):
    run(small(), topology)


def test_a_checkpoint_that_is_not_here_needs_declared_sizes():
  config = small(**{'policy.checkpoint': 'nowhere'})
  with pytest.raises(ValueError, match="checkpoint 'nowhere' is not there"):
    preflight.setup(config, 'v5e:2x2')
  declared = preflight.setup(overridden(config, {'policy.vocab_size': 512}), 'v5e:2x2')
  assert declared.trained.vocab_size == 512 and declared.trained.width == 256


# The command.


@pytest.mark.exhaustive
def test_the_command(tmp_path):
  """A debug config: exit 0 and the same figures as JSON; without a slice, a short error."""
  flags = ('--mode=preflight', '--config.sample.prompt_length=64', '--config.pack.row_length=128',
           '--config.policy.head_width=64')
  got = main_test.main(*flags, '--topology=v5e:2x2', f'--json={tmp_path}/x.json', '--mean_completion=10',
                       '--hardware.profiles.v5e.dollars_per_hour=2')
  assert got.returncode == 0, got.stderr
  report = json.loads((tmp_path / 'x.json').read_text())
  assert report['assumed'] == {'efficiency': 0.4, 'mean_prompt': 0, 'mean_completion': 10}
  assert preflight.table(report) + '\n' == got.stdout and got.stdout.startswith('v5e:2x2: fits; ')
  # 4 steps, evaluations before steps 0 and 2 and after the last, of 16 tasks; two dollars for each of four chips.
  run, seconds = report['run'], report['seconds_per_step']
  assert (run['evaluations'], run['held_out_tasks'], run['training_s']) == (3, 16, pytest.approx(4 * seconds))
  assert run['dollars'] == pytest.approx(
      4 * 2 * (run['training_s'] + run['evaluation_s'] + run['compile_s']) / 3600) and run['evaluation_s'] > 0
  for phase in report['phases'].values():
    assert {'argument_bytes', 'temp_bytes', 'peak_bytes', 'hbm_bytes', 'fits'} <= set(phase)
  got = main_test.main(*flags)
  assert got.returncode == 1 and 'Traceback' not in got.stderr
  assert 'the config names no topologies; say one: --topology=v5e:4x4' in got.stderr


@pytest.mark.slow
def test_after_a_preflight_no_run_speaks_of_host_bounds():
  """A preflight installs libtpu. jax then loads it in each run, and off a TPU it complains of what it cannot find."""
  code = ('from absl import flags; from kr_jax import main; flags.FLAGS.mark_as_parsed(); {}; '
          'import jax; print(jax.devices()[0].platform)')
  env = {name: x for name, x in os.environ.items() if name != 'JAX_PLATFORMS' and not name.startswith('TPU_')}
  run = lambda call: subprocess.run([sys.executable, '-c', code.format(call)], cwd=main_test.ROOT, text=True,
                                    capture_output=True, env=env | {'PYTHONWARNINGS': ''})
  got = run('main.library.quiet_libtpu()')
  assert got.stdout == 'cpu\n' and 'host bounds' not in got.stderr and 'TPU' not in got.stderr
  assert 'Failed to find host bounds' in run('pass').stderr


# The shipped configs, at full size.


def config_of(name):
  return importlib.import_module(f'configs.{name}').get_config()


SHIPPED = [(name, topology) for name in configs_test.CHECKPOINTS for topology in config_of(name).topologies]
POD = {'mesh.data': 16, 'tasks.per_step': 2048, 'alloc.rollouts_per_step': 16384}
GATHERED = {}  # by topology: dimensions of what the update of qwen3_4b gathers


@functools.cache
def shipped(name, topology, **knobs):
  """A report; of the update of qwen3_4b also what is gathered."""
  compiled = preflight._compile

  def kept(lowered):
    found = compiled(lowered)
    if name == 'qwen3_4b' and found[0] and '_step' in lowered.as_text()[:200]:
      shapes = re.findall(r'= (.*?) all-gather(?:-start)?\(', found[0].as_text())
      GATHERED[topology] = [[int(n) for n in dims.split(',')] for shape in shapes
                            for dims in re.findall(r'\w+\[([\d,]+)\]', shape)]
    return found

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(preflight, '_compile', kept)
    report = run(overridden(config_of(name), knobs), topology)
  print(f'\n{name}\n{preflight.table(report)}')
  return report


@pytest.mark.exhaustive
@pytest.mark.parametrize('name, topology', SHIPPED)
def test_a_config_fits_the_slices_it_is_meant_for(name, topology):
  report = shipped(name, topology)
  assert report['fits']
  assert max(phase['compile_seconds'] for phase in report['phases'].values()) < 360


@pytest.mark.exhaustive
def test_long_completions_fit():
  """16k tokens, by the config's own knobs."""
  report = shipped('qwen25_math_7b', 'v5p:2x2x4', **{
      'sample.completion_length': 16384, 'pack.row_length': 18432})
  assert report['fits']


@pytest.mark.exhaustive
def test_parameters_are_fully_sharded():
  """Of qwen3_4b on 16 chips: each has a sixteenth of parameters and moments, sends what that asks for, and
  makes no logits whole."""
  report = shipped('qwen3_4b', 'v5e:4x4')
  config = config_of('qwen3_4b')
  setup = preflight.setup(config, 'v5e:4x4')
  c, phase = setup.trained, report['phases']['update']
  layers, vocabulary = c.num_layers * arithmetic.layer_weights(c), c.width * c.vocab_size
  state = 12 * (layers + vocabulary) / 16
  tokens_bytes = 8 * 4 * 64 * 5120  # of all microbatches of a chip, at the most
  assert state < phase['argument_bytes'] < 1.02 * state + tokens_bytes
  # Each microbatch gathers layers to go forward and to go back, and scatters their gradients and the
  # embedding's, all in bfloat16; the embedding is gathered.
  n = preflight.programs(setup)[-1].trips[update.MICROBATCHES]
  arithmetic = 15 / 16 * 2 * n * (3 * layers + 2 * vocabulary)
  sent = sum(moved['bytes'] for moved in phase['collectives'])
  print(f'\n{sent / GIGA:.1f} GB sent, {arithmetic / GIGA:.1f} GB by arithmetic: {sent / arithmetic:.3f}')
  assert sent < 1.3 * arithmetic
  # Of the vocabulary the embedding is gathered, in parts or whole, and nothing else.
  wide = [dims for dims in GATHERED['v5e:4x4'] if c.vocab_size in dims]
  assert wide and all(c.width in dims for dims in wide)


@pytest.mark.exhaustive
def test_weak_scaling_to_a_pod():
  """qwen3_4b on 16 and on 256 chips, at equal work a chip: 16 copies, with 16 times the tasks."""
  few, many = shipped('qwen3_4b', 'v5e:4x4'), shipped('qwen3_4b', 'v5e:16x16', **POD)
  assert few['fits'] and many['fits'] and many['chips'] == 16 * few['chips']
  ring = (255 / 256) / (15 / 16)
  for name in few['phases']:
    x, y = few['phases'][name], many['phases'][name]
    sent = [sum(moved['bytes'] for moved in phase['collectives']) for phase in (x, y)]
    ratio = {key: y[key] / max(x[key], 1) for key in ('peak_bytes', 'executed_flops')}
    print(f'\n{name}: peak x {ratio["peak_bytes"]:.3f}, FLOPs x {ratio["executed_flops"]:.3f}, '
          f'sent x {sent[1] / sent[0]:.3f} (ring x {ring:.3f})')
    assert ratio['peak_bytes'] == pytest.approx(1, abs=0.05)
    assert name == 'reshard' or ratio['executed_flops'] == pytest.approx(1, abs=0.05)
    assert sent[1] <= ring * sent[0]
