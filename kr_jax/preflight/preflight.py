"""What a config takes on a TPU slice, by the real TPU compiler, on a machine without a TPU.

The programs of a step are compiled for the slice from shapes alone. They are the program's phases:

    reshard      makes the sampling params of the parameters
    sample       reads prompts and decodes completions, of the first wave where a step has several
    place        sends what was read of the prompts to the rollouts of a later wave
    wave         decodes a later wave
    evaluate     the same for held-out tasks, where these are more
    score        takes log-probabilities of the policy as it stands, where the loss asks for them
    reference    takes those of the initial policy
    update       moves the parameters

The compiler tells the memory of each (`memory_analysis`), which is held against the memory of a chip:

    peak = arguments + output - what is updated in place + temporaries + resident

where resident are the arrays on the device that are no arguments. The jaxpr tells the FLOPs (flops.py), the
compiled text the bytes that collectives send (hlo.py). Both count a loop as often as it runs; the trips of loops
that end when their work is done follow from assumed lengths. Seconds are arithmetic:

    max(FLOPs / peak FLOP/s, bytes read / memory bandwidth, bytes sent / ICI bandwidth) / efficiency
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import concurrent.futures
import math
import re
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import ml_collections
import numpy as np

from kr_jax import prepare
from kr_jax import processes
from kr_jax import queues as queues_lib
from kr_jax import sample
from kr_jax import sharding
from kr_jax import types
from kr_jax.allocation import allocate
from kr_jax.costs import arithmetic
from kr_jax.costs import flops
from kr_jax.costs import hardware as hardware_lib
from kr_jax.costs import hlo
from kr_jax.learning import pack
from kr_jax.learning import update
from kr_jax.model import decode
from kr_jax.model import moe
from kr_jax.model import policy
from kr_jax.preflight import whole_run
from kr_jax.prepare import Setup


class Assumed(NamedTuple):
  """What no compiler can know."""

  efficiency: float = 0.4  # share of a chip's peak that programs reach
  mean_prompt: int = 0  # tokens; 0: the longest
  mean_completion: int = 0


class Program(NamedTuple):
  """A jitted function and the shapes that a step gives it."""

  phase: str
  function: Any
  args: tuple[Any, ...]
  mesh: Mesh
  times: int  # how often a step runs it
  resident: Any  # arrays on the devices that are no arguments
  trips: dict[str, float]  # trips of loops that end when their work is done, by scope
  useful_flops: float  # of one run, on all devices
  attention_flops: float = 0.0  # of these, the attention of decoding, which depends on lengths
  read_bytes: float = 0.0  # that a chip reads from memory at the least


class Phase(NamedTuple):
  """A program on one chip. FLOPs, collectives and seconds are of one run; None: the program did not compile."""

  phase: str
  times: int
  argument_bytes: int
  output_bytes: int  # without what is updated in place
  temp_bytes: int | None
  resident_bytes: int
  peak_bytes: int
  hbm_bytes: int
  fits: bool
  useful_flops: float
  executed_flops: float | None
  collectives: list[dict[str, Any]]  # kind, axes, bytes sent, count
  seconds: float | None
  compile_seconds: float


def devices(topology: str) -> Sequence[Any]:
  """Of a slice, 'v5e:4x4'. Raises ValueError for a slice that the TPU compiler does not know."""
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  except Exception as error:  # of types that jaxlib does not export
    raise ValueError(f'--topology={topology} is none of the TPU compiler: {str(error)[:300]}; write '
                     "'v5e:4x4' or 'v5p:2x2x4', with libtpu installed (pip install libtpu)") from error


def setup(config: ml_collections.ConfigDict, topology: str) -> Setup:
  """prepare.abstract on a slice. Raises ValueError as it does."""
  found = prepare.abstract(config, devices(topology))
  if found.learn_mesh is None:
    one = sharding.mesh(devices(topology)[:1])
    found = found._replace(learn_mesh=one, sample_mesh=one)
  return found


# The programs of a step.


def _abstract(mesh: Mesh, function: Callable[..., Any], *args: Any) -> Any:
  """Shapes of a function's results on a mesh."""
  with jax.set_mesh(mesh):
    return jax.eval_shape(function, *args)


def _at(tree: Any, of: Any) -> Any:
  """Shapes with the shardings of a tree, or with one."""
  if isinstance(of, jax.sharding.Sharding):
    of = jax.tree.map(lambda _: of, tree)
  return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, of)


def device_bytes(tree: Any) -> int:
  """Of a tree of shapes with shardings, on one device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize if x.dtype != jax.dtypes.prng_key
             else 0 for x in jax.tree.leaves(tree))


class _Held(NamedTuple):
  """Shapes of what is resident between programs, and of what the sampler reads."""

  state: types.TrainState
  base: Any  # {} where nothing needs it
  params: Any  # that sampling_params are made of
  sampling_params: Any


def programs(setup: Setup, assumed: Assumed = Assumed()) -> list[Program]:
  """Of a step, in the order in which they run, and of an evaluation, where it takes more memory.

  Raises ValueError for assumed lengths above those of the config.
  """
  c, P, C = setup.config, setup.sample.prompt_length, setup.sample.completion_length
  lengths = {'tasks': c.tasks.per_step, 'rollouts': c.alloc.rollouts_per_step,
             'prompt': assumed.mean_prompt or P, 'completion': assumed.mean_completion or C}
  if lengths['prompt'] > P or lengths['completion'] > C:
    raise ValueError(f'mean lengths of {lengths["prompt"]} and {lengths["completion"]} tokens are above '
                     f'sample.prompt_length={P} or sample.completion_length={C}')
  held = _held(setup)
  adapters = () if held.params is held.state.params else held.state.params
  reshard = Program(
      'reshard', decode.sampling_params, (setup.policy, held.params), setup.sample_mesh, 1,
      (adapters, held.state.opt_state, held.base), {}, 0.0,
      read_bytes=device_bytes(held.params) + device_bytes(held.sampling_params))
  first, *later = allocate.wave_rollouts(c.alloc)
  sampler = _sampler('sample', setup, held, lengths | {'rollouts': first}, keeps=bool(later))
  waves = _later_waves(setup, held, lengths | {'rollouts': later[0]}, sampler, times=len(later)) if later else []
  evaluation = _sampler('evaluate', setup, held, lengths | {
      'tasks': c.evaluate.tasks_per_batch, 'rollouts': c.evaluate.tasks_per_batch * c.evaluate.rollouts})
  tasks = lambda program: program.args[3].task_ZK.shape[1]
  more = [evaluation._replace(times=0)] if tasks(evaluation) > tasks(sampler) else []
  return [reshard, sampler, *waves, *more, *_learners(setup, held, lengths)]


def _held(setup: Setup) -> _Held:
  learn, samples = setup.learn_mesh, setup.sample_mesh
  key = jax.eval_shape(lambda: jax.random.key(0))
  init = lambda c: _abstract(learn, lambda key: policy.init(c, key), key)
  params = init(setup.policy)
  trained = params = _at(params, sharding.of(learn, params))
  if setup.trained.lora_rank:
    trained, _ = policy.split(setup.trained, init(setup.trained))
    trained = _at(trained, sharding.of(learn, trained))
  state = _abstract(learn, lambda params, key: update.init(params, key, setup.update), trained, key)
  state = _at(state, sharding.of(learn, state))
  sampling_params = _abstract(samples, lambda params: decode.sampling_params(setup.policy, params), params)
  return _Held(state, params if setup.needs_base else {}, params if setup.trained.lora_rank else state.params,
               _at(sampling_params, sharding.of(samples, sampling_params, ('model',))))


def _sampler(phase: str, setup: Setup, held: _Held, lengths: dict[str, float], keeps: bool = False) -> Program:
  """The decoding of rollouts, equally many of each task. keeps: whether later waves need the prompts."""
  samples, config, (M, R, prompt, completion) = setup.sample_mesh, setup.sample, lengths.values()
  at = lambda tree, *spec: _at(tree, NamedSharding(samples, PartitionSpec(*spec)))
  shards = math.prod(samples.shape[axis] for axis in sharding.ROWS)
  queues = queues_lib.assign_to_queues(np.full(M, R // M) + (np.arange(M) < R % M), total=R, shards=shards)
  prompts = types.Prompts(*(np.zeros(shape, np.int32) for shape in ((M, config.prompt_length), M, M)))
  K, Q = queues.task_ZK.shape[1], queues.local_ZQ.shape[1]
  slots = min(config.slots, Q)
  model = samples.shape['model']
  heads = math.lcm(setup.policy.num_kv_heads, model) / model  # of a chip
  column = arithmetic.column_bytes(setup.policy, config.cache) * heads / setup.policy.num_kv_heads
  of = arithmetic.equal_lengths(**lengths)
  refills = max(Q / slots, 1)
  # Each decoding step reads all weights but experts without a token and, for each slot, its prompt and the completion
  # so far.
  read = refills * completion * (_weight_bytes(setup.policy, held.sampling_params, slots)
                                 + slots * (prompt + completion / 2) * column)
  return Program(
      phase, sample._decode,
      (setup.policy, held.sampling_params, prompts, at(queues, sharding.ROWS), at(held.state.key), config, keeps),
      samples, 1, (held.state, held.base),
      {sample.PREFILL: -(-math.ceil(M / shards) // min(config.prefill, K)), sample.REFILL: refills,
       sample.DECODE: completion},
      arithmetic.sample_flops(setup.policy, of), arithmetic.decode_attention_flops(setup.policy, of), read)


def _later_waves(setup: Setup, held: _Held, lengths: dict[str, float], first: Program, times: int) -> list[Program]:
  """The placing of prefixes for a wave of so many rollouts, and its decoding, of which no prompt is read."""
  samples, wave = setup.sample_mesh, _sampler('wave', setup, held, lengths)
  at = lambda tree, *spec: _at(tree, NamedSharding(samples, PartitionSpec(*spec)))
  policy_config, *arrays, config, keeps = first.args
  _, prefixes = _abstract(samples, lambda *arrays: sample._decode(policy_config, *arrays, config, keeps), *arrays)
  shards = math.prod(samples.shape[axis] for axis in sharding.ROWS)
  source_ZK = jax.ShapeDtypeStruct((shards, len(prefixes.logits_KV) // shards), np.int32)
  prefixes = sample._Prefixes(
      at(prefixes.logits_KV, sharding.ROWS), at(prefixes.cache, None, sharding.ROWS, 'model'))
  place = Program('place', sample._place, (prefixes, at(source_ZK, sharding.ROWS)), samples, times,
                  (*wave.resident, held.sampling_params), {}, 0.0, read_bytes=device_bytes(prefixes))
  return [place, wave._replace(
      function=sample._decode_on, args=(*wave.args[:-1], prefixes), times=times,
      useful_flops=arithmetic.sample_flops(setup.policy, arithmetic.equal_lengths(**lengths | {'tasks': 0})))]


def _weight_bytes(c: policy.Config, sampling_params: Any, tokens: float) -> float:
  """Of the weights that a chip reads for so many tokens at once."""
  if not c.num_experts:
    return device_bytes(sampling_params)
  of_experts = device_bytes([stage[name] for stage in sampling_params['layers'] for name in moe.MATRICES])
  return device_bytes(sampling_params) - (1 - arithmetic.touched_experts(c, tokens)) * of_experts


def _learners(setup: Setup, held: _Held, lengths: dict[str, float]) -> list[Program]:
  """The phases that learn from rollouts, none of which is left out."""
  learn, u, (state, base, *_) = setup.learn_mesh, setup.update, held
  microbatches = _microbatches(
      setup, lengths, math.prod(learn.shape[axis] for axis in sharding.ROWS))
  tokens, experience = _batch(setup, lengths)
  bounds = np.zeros(2, np.int32)
  of = arithmetic.equal_lengths(**lengths)

  def score(phase, trained, base, policy_config, resident):
    return Program(phase, update.logps, (trained, base, tokens, bounds[0], policy_config, u), learn, 1, resident,
                   {update.MICROBATCHES: microbatches * u.minibatches}, arithmetic.score_flops(policy_config, of))

  found, logp, one_update = [], tokens.sampler_logp_BT, u.epochs * u.minibatches == 1
  own_ratios = update.has_own_ratios(u.grpo)
  if own_ratios and not one_update:
    found.append(score('score', state.params, base, setup.trained, state.opt_state))
  if u.grpo.kl_coef:
    found.append(score('reference', base, {}, setup.policy, state))
  tokens = tokens._replace(
      old_logp_BT=None if own_ratios and one_update else logp,
      ref_logp_BT=logp if u.grpo.kl_coef else None)
  return [*found, Program(
      'update', update._step, (state, base, experience, tokens, bounds, setup.trained, u), learn,
      u.epochs * u.minibatches, (), {update.MICROBATCHES: microbatches},
      arithmetic.update_flops(setup.trained, of) / u.minibatches)]


def _batch(setup: Setup, lengths: dict[str, float]) -> tuple[update.Tokens, update.Experience]:
  """Shapes of the microbatches of a step, and of what they are weighted by."""
  learn, u, M, R = setup.learn_mesh, setup.update, lengths['tasks'], lengths['rollouts']
  P, C = setup.sample.prompt_length, setup.sample.completion_length
  with jax.set_mesh(learn):
    shape = update.microbatch_shape(P, C, R / M, u)
  most = pack.max_microbatches(R, P + C - 1, minibatches=u.minibatches, shape=shape)
  of = jax.ShapeDtypeStruct
  rows = lambda n, width: of((most, shape.shards * n, width), jnp.int32)
  apart = types.Rows(rows(shape.rows, shape.row_length), rows(shape.rows, shape.row_length),
                     rows(1, shape.tokens)) if shape.shared else None
  rollouts = types.Rollouts(
      types.Prompts(of((M, P), jnp.int32), of((M,), jnp.int32), of((M,), jnp.int32)),
      task_R=of((R,), jnp.int32), token_RC=of((R, C), jnp.int32), logp_RC=of((R, C), jnp.float32),
      length_R=of((R,), jnp.int32), ended_R=of((R,), jnp.int32), decode_steps=of((), jnp.int32))
  tokens = _abstract(learn, update._gather, rollouts, pack.Microbatch(
      rows(1, shape.tokens), rows(1, shape.tokens), apart))
  experience = update.Experience(*(of((R,), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)))
  return (_at(tokens, NamedSharding(learn, PartitionSpec(None, sharding.ROWS))),
          _at(experience, NamedSharding(learn, PartitionSpec())))


def _microbatches(setup: Setup, lengths: dict[str, float], devices: int) -> int:
  """How many microbatches the rollouts of an update fill, if all have mean length: of one device's share."""
  R = -(-lengths['rollouts'] // (setup.update.minibatches * devices))
  group = max(round(lengths['rollouts'] / lengths['tasks']), 1)
  shape = update.microbatch_shape(
      setup.sample.prompt_length, setup.sample.completion_length, group, setup.update)
  most = pack.max_microbatches(R, lengths['prompt'] + lengths['completion'] - 1, minibatches=1, shape=shape)
  packed = pack.segments(
      np.arange(R) // group, np.full(R, lengths['prompt'] - 1), np.full(R, lengths['completion']),
      np.zeros(R, int), minibatches=1, microbatches=most, shape=shape)
  return int(packed.first[-1])


# Their compilation.


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, int]:
  """A compiled program and 0, or None and the bytes that it would need where the chip has fewer."""
  try:
    return lowered.compile(), 0
  except jax.errors.JaxRuntimeError as error:
    found = re.search(r'Used ([\d.]+)([KMGTP]) of|temporaries \(([\d.]+)([KMGTP])\)', str(error))
    if 'RESOURCE_EXHAUSTED' not in str(error) or not found:
      raise
    size, unit = [x for x in found.groups() if x]
    return None, int(float(size) * 2 ** {'K': 10, 'M': 20, 'G': 30, 'T': 40, 'P': 50}[unit])


def measure(program: Program, device: hardware_lib.Device, efficiency: float) -> Phase:
  """Compiles a program and says what it takes."""
  devices_, started = program.mesh.size, time.monotonic()
  # A chunk of the rows of a device's experts is as full as it is if each expert is sent as many tokens.
  trips = program.trips | {moe.CHUNKS: 1 / moe.HEADROOM}
  with jax.set_mesh(program.mesh):
    traced = program.function.trace(*program.args)
    compiled, needed = _compile(traced.lower())
  arguments = device_bytes([x for x in jax.tree.leaves(program.args) if isinstance(x, jax.ShapeDtypeStruct)])
  resident = device_bytes(program.resident)
  phase = Phase(
      phase=program.phase, times=program.times, argument_bytes=arguments, output_bytes=0, temp_bytes=None,
      resident_bytes=resident, peak_bytes=needed + resident, hbm_bytes=device.hbm_bytes, fits=False,
      useful_flops=program.useful_flops / devices_, executed_flops=None, collectives=[], seconds=None,
      compile_seconds=round(time.monotonic() - started, 1))
  if compiled is None:
    return phase
  memory = compiled.memory_analysis()
  output = memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak = memory.argument_size_in_bytes + output + memory.temp_size_in_bytes + resident
  executed = (flops.count(traced.jaxpr.jaxpr, trips) + program.attention_flops) / devices_
  collectives = hlo.count(compiled.as_text(), program.mesh.shape, trips)
  return phase._replace(
      argument_bytes=memory.argument_size_in_bytes, output_bytes=output,
      temp_bytes=memory.temp_size_in_bytes, peak_bytes=peak, fits=peak <= device.hbm_bytes, executed_flops=executed,
      collectives=[{'kind': kind, 'axes': list(axes), 'bytes': moved.bytes, 'count': moved.count}
                   for (kind, axes), moved in sorted(collectives.items())],
      seconds=max(executed / device.flops, program.read_bytes / device.hbm_bytes_per_s,
                  hlo.sent(collectives) / device.ici_bytes_per_s) / efficiency)


def run(config: ml_collections.ConfigDict, topology: str, assumed: Assumed, hardware: hardware_lib.Hardware,
        phases: Sequence[str] = ()) -> dict[str, Any]:
  """What a config takes on a slice: a report, as JSON has it.

  Args:
    hardware: figures of the chips.
    phases: those to compile; (): all.

  Returns: fits; phases, {name: Phase as a dict}; of a step of all chips tokens_per_step, seconds_per_step,
    dollars_per_step and useful_share_of_peak, which useful FLOPs have of the chips' peak; and run, which
    whole_run.cost says of all steps and evaluations. None where a program does not compile, or was left out.

  Raises ValueError as `setup`, `programs` and prepare.check_slice do, and for a chip without figures.
  """
  profile = hardware.of_topology(topology)
  device, found = hardware_lib.device(profile), setup(config, topology)
  prepare.check_slice(found, device.hbm_bytes)
  wanted = [p for p in programs(found, assumed) if not phases or p.phase in phases]
  # Two compilations at a time, as each has phases that use one core. Of programs with experts two at a time end in a
  # segmentation fault of the compiler, in about half of the runs (libtpu 0.0.52).
  at_once = 1 if found.policy.num_experts else 2
  with processes.progress(f'compile for {topology}', 0, len(wanted), unit='program') as bar, \
      concurrent.futures.ThreadPoolExecutor(at_once) as pool:
    tasks = [pool.submit(measure, program, device, assumed.efficiency) for program in wanted]
    for _ in concurrent.futures.as_completed(tasks):
      bar.update()
  measured = [task.result() for task in tasks]
  learn, samples, chips = found.learn_mesh, found.sample_mesh, len(devices(topology)) / device.per_chip
  report = {
      'topology': topology, 'chips': chips, 'devices': learn.size, 'device': device._asdict(),
      'assumed': assumed._asdict(), 'mesh': {'learn': dict(learn.shape), 'sample': dict(samples.shape)},
      'fits': all(phase.fits for phase in measured),
      'phases': {phase.phase: phase._asdict() for phase in measured},
      'tokens_per_step': config.alloc.rollouts_per_step * (assumed.mean_completion or found.sample.completion_length)}
  seconds = useful = of_run = None
  if all(phase.seconds is not None for phase in measured):
    seconds = sum(phase.times * phase.seconds for phase in measured)
    useful = sum(phase.times * phase.useful_flops for phase in measured) / seconds / device.flops
    if not phases:
      of_run = _whole_run(found, wanted, measured, seconds, chips, profile, hardware.site)
  price = profile.dollars_per_hour
  return report | {
      'seconds_per_step': seconds, 'useful_share_of_peak': useful, 'run': of_run,
      'dollars_per_step': None if None in (seconds, price) else seconds * chips * price / 3600}


def _whole_run(setup: Setup, wanted: Sequence[Program], measured: Sequence[Phase], step_s: float, chips: float,
               profile: hardware_lib.Profile, site: hardware_lib.Site) -> dict[str, Any]:
  """Of all programs, compiled."""
  c, of = setup.config, {phase.phase: phase for phase in measured}
  sampler, = (p for p in wanted if p.phase == 'sample')
  compile_s = sum(phase.compile_seconds for phase in measured)
  if 'evaluate' in of:
    batch_s = of['evaluate'].seconds
  else:  # its batches refill the slots more or less often, and are compiled apart
    shards = math.prod(setup.sample_mesh.shape[axis] for axis in sharding.ROWS)
    refills = max(math.ceil(c.evaluate.tasks_per_batch * c.evaluate.rollouts / shards) / setup.sample.slots, 1)
    batch_s = of['sample'].seconds * refills / sampler.trips[sample.REFILL]
    compile_s += of['sample'].compile_seconds
  return whole_run.cost(c, step_s=step_s, batch_s=batch_s, reshard_s=of['reshard'].seconds, compile_s=compile_s,
                        chips=chips, profile=profile, site=site)


def table(report: dict[str, Any]) -> str:
  """A report as text, of which the first line is the verdict."""
  giga = lambda x: '-' if x is None else f'{x / 1e9:.2f}'
  mesh = lambda shape: ' x '.join(f'{axis} {n}' for axis, n in shape.items())
  assumed, phases = report['assumed'], report['phases'].values()
  lines = [whole_run.verdict(report), *(whole_run.notes(report['run']) if report['run'] else ()), '',
           f'{report["chips"]:g} chips; {report["devices"]} devices of {report["device"]["hbm_bytes"] / 1e9:.1f} GB; '
           f'learns on {mesh(report["mesh"]["learn"])}, samples on {mesh(report["mesh"]["sample"])}', '',
           'a device, GB  arguments   output   temporaries  resident    peak      fits']
  for p in phases:
    lines.append(f'{p["phase"]:<12}{giga(p["argument_bytes"]):>11}{giga(p["output_bytes"]):>9}'
                 f'{giga(p["temp_bytes"]):>14}{giga(p["resident_bytes"]):>9}{giga(p["peak_bytes"]):>9}'
                 f'{"yes" if p["fits"] else "NO":>10}')
  lines += ['', 'a device, a run   TFLOP useful   executed   GB sent   seconds   a step']
  for p in phases:
    sent = sum(moved['bytes'] for moved in p['collectives'])
    number = lambda x, scale: '-' if x is None else f'{x / scale:.2f}'
    lines.append(f'{p["phase"]:<12}{number(p["useful_flops"], 1e12):>18}{number(p["executed_flops"], 1e12):>11}'
                 f'{sent / 1e9:>10.2f}{number(p["seconds"], 1):>10}{p["times"]:>8} x')
  lines += ['', 'sent by a device, a run']
  for p in phases:
    for moved in p['collectives']:
      lines.append(f'{p["phase"]:<12}{moved["kind"]:<20}{" x ".join(moved["axes"]):<16}'
                   f'{moved["bytes"] / 1e9:>9.3f} GB in {moved["count"]:,.0f}')
  lengths = ', '.join(f'{name.removeprefix("mean_")}s of {n or "full length"}{" tokens" if n else ""}'
                      for name, n in assumed.items() if name != 'efficiency')
  if report['seconds_per_step'] is not None:
    dollars = '' if report['dollars_per_step'] is None else f', ${report["dollars_per_step"]:.2f}'
    lines += ['', f'a step: {report["tokens_per_step"]:,} tokens sampled in {report["seconds_per_step"]:.0f} s{dollars}'
                  f'; useful FLOPs {report["useful_share_of_peak"]:.1%} of peak '
                  f'(arithmetic: {lengths}, at {assumed["efficiency"]:.0%} of the chips\' peaks)']
  return '\n'.join(lines)
