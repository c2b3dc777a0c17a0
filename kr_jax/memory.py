"""The memory that a run takes at the least, by arithmetic of its config, and whether the machine has as much.

Each part is counted only where it is certainly there at once with the others of its phase, so that no config is refused
that would run. Most activations, what programs need for themselves, and Python's own memory are not counted:
--mode=preflight measures them. Nothing is allocated here, and no device is asked for more than its limit.

    state        parameters in float32, two moments of those that learn, and a copy for a KL divergence
    sampling     state; the parameters that the sampler reads; keys and values of prompts and of slots; tokens
    learning     state; gradients; the packed tokens of all microbatches; what layers keep for the backward pass
    host         packed tokens, once more; the values of all budgets; processes of verifiers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import itertools
import math
import os
from typing import Any, NamedTuple

from absl import logging

from kr_jax import disks
from kr_jax import knobs
from kr_jax.costs import arithmetic
from kr_jax.learning import pack
from kr_jax.model import policy

SAMPLING, EVALUATION, LEARNING = 'sampling', 'an evaluation', 'learning'
_WARN = 0.9  # share of a limit above which a run is warned of it
_WORKERS = 'processes of verifiers'
_WORKER = 10 * 2 ** 20  # bytes of a verifier's process that no other shares; 24 MiB were measured
_MICROBATCH = 25  # bytes of a token of update.Tokens
_SIZES = ('policy.num_layers', 'policy.width', 'policy.hidden_width')


class Part(NamedTuple):
  """Something that takes memory."""

  name: str
  bytes: int
  knobs: tuple[str, ...]  # that it grows with, the first to be lowered first


class Needs(NamedTuple):
  """What a run takes at the least."""

  device: Mapping[str, tuple[Part, ...]]  # of a device, by phase
  host: tuple[Part, ...]  # of a process, besides

  @property
  def device_bytes(self) -> int:
    return max(map(_sum, self.device.values()))


class Machine(NamedTuple):
  """What there is. None: not known."""

  device_bytes: int | None  # of each device; None as well where devices use the host's
  host_bytes: int | None
  process_bytes: int | None  # of this process, without those that it starts
  devices: int  # that this process uses
  devices_are_host: bool


def _sum(parts: Sequence[Part]) -> int:
  return sum(part.bytes for part in parts)


# What is there.


def machine(devices: Sequence[Any]) -> Machine:
  """What this process has. devices: those that it uses."""
  limits = [limit for device in devices if (limit := _limit(device))]
  return Machine(min(limits, default=None), host_bytes(), process_bytes(), len(devices),
                 all(device.platform == 'cpu' for device in devices))


def _limit(device: Any) -> int | None:
  try:
    return (device.memory_stats() or {}).get('bytes_limit')
  except (RuntimeError, NotImplementedError, AttributeError):  # a device that does not tell
    return None


def host_bytes(meminfo: str = '/proc/meminfo', own: str = '/proc/self/cgroup', root: str = '/sys/fs/cgroup'
               ) -> int | None:
  """Memory and swap of this machine, or what the control groups of this process leave of them; None: not known."""
  try:
    with open(meminfo) as file:
      kb = {name: int(rest.split()[0]) for name, _, rest in (line.partition(':') for line in file)}
    total, swap = 1024 * kb['MemTotal'], 1024 * kb.get('SwapTotal', 0)
  except (OSError, ValueError, LookupError):
    try:
      total, swap = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'), 0
    except (OSError, ValueError, AttributeError):
      return None
  return min([total, *_group_limits(own, root)]) + swap


def _group_limits(own: str, root: str) -> Iterator[int]:
  """The limits of memory of the control groups that this process is in, of both versions, outer groups included."""
  try:
    with open(own) as file:
      groups = [line.rstrip('\n').split(':', 2)[1:] for line in file]
  except (OSError, ValueError):
    return
  for kinds, path in groups:
    if kinds and 'memory' not in kinds.split(','):
      continue
    folder, name = (os.path.join(root, 'memory'), 'memory.limit_in_bytes') if kinds else (root, 'memory.max')
    for group in ['', *itertools.accumulate(path.strip('/').split('/'), os.path.join)]:
      with contextlib.suppress(OSError, ValueError):  # 'max' is no limit
        with open(os.path.join(folder, group, name)) as file:
          yield int(file.read())


def process_bytes() -> int | None:
  """What `ulimit -v` and `ulimit -d` leave this process; None: all."""
  try:
    import resource
  except ImportError:
    return None
  limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
  return min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=None)


# What is needed.


def needs(c: knobs.Config, sizes: policy.Config, learn: Mapping[str, int] = {}, sample: Mapping[str, int] = {}, *,
          test_tasks: int = 1) -> Needs:
  """What a run takes at the least.

  Args:
    sizes: of the policy that is trained, with its adapters.
    learn, sample: the axes of both meshes, by name; {}: there is one device.
    test_tasks: held-out tasks that there are; 1 while it is not known.
  """
  axes = lambda mesh, *names: math.prod(mesh.get(name, 1) for name in names)
  state, copy = _state(c, sizes, axes(learn, 'fsdp', 'expert', 'model')), axes(sample, 'model')
  samplers = axes(sample, 'data', 'fsdp', 'expert')
  sampler = _sampler(c, sizes, copy)
  evaluated, R = min(c.evaluate.tasks_per_batch, test_tasks), c.alloc.rollouts_per_step
  at_once = R - R // c.alloc.waves * (c.alloc.waves - 1)  # of the largest wave
  learning, packed = _learning(c, sizes, axes(learn, *('data', 'fsdp', 'expert')), axes(learn, 'model'))
  device = {
      SAMPLING: (*state, *sampler, *_decoding(
          c, sizes, c.tasks.per_step, at_once, samplers, copy, 'alloc.rollouts_per_step')),
      EVALUATION: (*state, *sampler, *_decoding(
          c, sizes, evaluated, evaluated * c.evaluate.rollouts, samplers, copy, 'evaluate.tasks_per_batch',
          'evaluate.rollouts')),
      LEARNING: (*state, *_gradients(sizes, axes(learn, 'fsdp', 'expert', 'model')), *learning)}
  workers = c.rewards.workers or 1
  host = packed, _budgets(c), Part(_WORKERS, workers * _WORKER, ('rewards.workers',))
  return Needs(device, host)


def parameters(sizes: policy.Config) -> int:
  """Those of the matrices, without adapters."""
  tables = 1 if sizes.tie_embeddings else 2
  return sizes.num_layers * arithmetic.layer_weights(sizes) + tables * sizes.vocab_size * sizes.width


def _trained(sizes: policy.Config) -> int:
  return sizes.num_layers * arithmetic.adapter_weights(sizes) if sizes.lora_rank else parameters(sizes)


def _knobs(sizes: policy.Config) -> tuple[str, ...]:
  """That the parameters grow with."""
  return (*_SIZES, *(('policy.num_experts',) if sizes.num_experts else ()))


def _state(c: knobs.Config, sizes: policy.Config, devices: int) -> tuple[Part, ...]:
  learns = ('policy.lora_rank',) if sizes.lora_rank else _knobs(sizes)
  parts = [Part('parameters', 4 * parameters(sizes) // devices, _knobs(sizes)),
           Part('moments of the optimiser', 8 * _trained(sizes) // devices, learns)]
  if sizes.lora_rank:
    parts.append(Part('adapters', 4 * _trained(sizes) // devices, learns))
  elif c.grpo.kl_coef:
    parts.append(Part('the initial policy, of grpo.kl_coef', 4 * parameters(sizes) // devices, _knobs(sizes)))
  return tuple(parts)


def _gradients(sizes: policy.Config, devices: int) -> tuple[Part, ...]:
  learns = ('policy.lora_rank',) if sizes.lora_rank else _knobs(sizes)
  return Part('gradients', 4 * _trained(sizes) // devices, learns),


def _sampler(c: knobs.Config, sizes: policy.Config, devices: int) -> tuple[Part, ...]:
  """The parameters that the sampler reads; in float32 they may be those that learn."""
  if sizes.dtype != 'bfloat16':
    return ()
  return Part("the sampler's parameters", 2 * parameters(sizes) // devices, _knobs(sizes)),


def _decoding(c: knobs.Config, sizes: policy.Config, prompts: int, rollouts: int, samplers: int, copy: int,
              *grows: str) -> tuple[Part, ...]:
  """What samplers keep of so many prompts and rollouts."""
  P, C, column = c.sample.prompt_length, c.sample.completion_length, arithmetic.column_bytes(sizes, c.sample.cache)
  queue = math.ceil(rollouts / samplers)
  prompts, slots = min(math.ceil(prompts / samplers), queue), min(c.sample.slots, queue)
  of_slots = ('sample.slots', 'sample.completion_length')
  return (Part('keys and values of slots', slots * C * column // copy, of_slots),
          Part('keys and values of prompts', prompts * P * column // copy, ('sample.prompt_length', 'tasks.per_step')),
          Part('logits of slots', 4 * slots * sizes.vocab_size, of_slots[:1]),
          Part('tokens of rollouts', 8 * queue * C, (*grows, 'sample.completion_length')))


def _learning(c: knobs.Config, sizes: policy.Config, shards: int, model: int) -> tuple[tuple[Part, ...], Part]:
  """Of a device; and what the host packs, of all of them."""
  longest = c.sample.prompt_length + c.sample.completion_length - 1
  shape = pack.shape(
      prompt_length=c.sample.prompt_length, completion_length=c.sample.completion_length,
      rollouts_per_task=c.alloc.rollouts_per_step / c.tasks.per_step, row_length=c.pack.row_length,
      microbatch_rows=c.pack.microbatch_rows, prompt_sharing=c.pack.prompt_sharing, shards=shards)
  most = pack.max_microbatches(c.alloc.rollouts_per_step, longest, minibatches=c.optimizer.minibatches, shape=shape)
  positions = shape.rows * shape.row_length if shape.shared else 0
  of_all = most * shape.shards
  grows = 'pack.microbatch_rows', 'pack.row_length', 'alloc.rollouts_per_step', 'sample.completion_length'
  # The scan over layers stacks what the backward pass reads: its input, and the two products of a dense MLP.
  kept = sizes.width + (2 * sizes.hidden_width if sizes.remat == 'none' and not sizes.num_experts else 0)
  kept *= (2 if sizes.dtype == 'bfloat16' else 4) * sizes.num_layers
  of_device = (Part('packed tokens', of_all * (_MICROBATCH * shape.tokens + 8 * positions) // shards, grows),
               Part('what layers keep of a microbatch', kept * shape.tokens * (shape.shards // shards) // model, (
                   *grows[:2], 'policy.num_layers', 'policy.width')))
  return of_device, Part('packed tokens of the host', of_all * (12 * shape.tokens + 8 * positions), grows)


def _budgets(c: knobs.Config) -> Part:
  considered = c.tasks.candidates_per_step or c.tasks.per_step
  values = (c.alloc.high - c.alloc.low + 1) * considered if c.alloc.rule == 'knapsack' else considered
  return Part('values of budgets', 8 * values, ('alloc.high', 'tasks.candidates_per_step', 'tasks.per_step'))


def check_generation(sizes: policy.Config, prompts: int, prompt_length: int, completion_length: int, slots: int,
                     there: Machine) -> None:
  """Raises ValueError where the machine cannot hold a checkpoint, and what it reads and writes at once."""
  columns = prompts * prompt_length + min(slots, prompts) * completion_length
  of = {'parameters': 4 * parameters(sizes), 'keys and values': columns * arithmetic.column_bytes(sizes)}
  limit = there.host_bytes if there.devices_are_host else there.device_bytes
  if limit and sum(of.values()) > limit:
    raise ValueError(
        f'{prompts} prompts of up to {prompt_length} tokens and completions of up to {completion_length} take at least '
        f'{disks.size(sum(of.values()))} of memory, and there are {disks.size(limit)}: '
        + ', '.join(f'{disks.size(n)} are {name}' for name, n in of.items())
        + '; lower max_tokens, or give fewer prompts')


def check_budgets(c: knobs.Config) -> None:
  """Raises ValueError where this machine cannot hold the values of all budgets of a step, which its processors find."""
  part, limit = _budgets(c), host_bytes()
  if limit and part.bytes > limit:
    raise ValueError(f'{part.name} take {disks.size(part.bytes)} of the memory of this machine, which has '
                     f'{disks.size(limit)}: '
                     f'lower {_values(c, None, part)}')


# Both compared.


class _Total(NamedTuple):
  """All that has to fit into one memory at once."""

  where: str
  limit: int | None  # None: not known
  parts: tuple[Part, ...]


def _totals(found: Needs, there: Machine, phases: Sequence[str]) -> Iterator[_Total]:
  host, n = found.host, there.devices
  for phase, parts in ((phase, found.device[phase]) for phase in phases):
    if there.devices_are_host:
      of_all = tuple(part._replace(bytes=n * part.bytes) for part in parts)
      yield _Total(f'memory of this machine, in {phase},', there.host_bytes, (*of_all, *host))
      yield _Total(f'memory of this process (ulimit -v), in {phase},', there.process_bytes, (
          *of_all, *(part for part in host if part.name != _WORKERS)))
    else:
      yield _Total(f'memory of a device, in {phase},', there.device_bytes, parts)
  if not there.devices_are_host:
    yield _Total('memory of this machine,', there.host_bytes, host)


def check(c: knobs.Config, sizes: policy.Config, learn: Mapping[str, int] = {}, sample: Mapping[str, int] = {}, *,
          there: Machine, test_tasks: int = 1, trains: bool = True) -> None:
  """Raises ValueError for a run that the machine cannot hold, and warns of one that comes near.

  Arguments are those of `needs`, and:
    there: as of `machine`.
    trains: whether it learns; else it evaluates alone.
  """
  phases = (SAMPLING, EVALUATION, LEARNING) if trains else (EVALUATION,)
  totals = lambda c, sizes: [total for total in _totals(
      needs(c, sizes, learn, sample, test_tasks=test_tasks), there, phases) if total.limit]
  found = max(totals(c, sizes), key=lambda total: _sum(total.parts) / total.limit, default=None)
  if found is None or _sum(found.parts) <= _WARN * found.limit:
    return
  parts = sorted((part for part in found.parts if part.bytes), key=lambda part: -part.bytes)
  needed, limit = _sum(parts), found.limit
  text = (f'the run takes at least {disks.size(needed)} of the {found.where} which has {disks.size(limit)}: '
          + ', '.join(f'{disks.size(part.bytes)} are {part.name} ({_values(c, sizes, part)})' for part in parts[:3]))
  if needed <= limit:
    logging.warning('%s; other activations and what programs need for themselves come on top, so it may not fit', text)
    return
  fits = lambda c, sizes: all(_sum(total.parts) <= total.limit for total in totals(c, sizes))
  raise ValueError(f'{text}; {_advice(c, sizes, parts, fits)}')


def _values(c: knobs.Config, sizes: policy.Config | None, part: Part) -> str:
  return ', '.join(f'{name}={_value(c, sizes, name)}' for name in part.knobs if _value(c, sizes, name))


def _value(c: knobs.Config, sizes: policy.Config | None, name: str) -> Any:
  section, _, knob = name.partition('.')
  return getattr(sizes if section == 'policy' else getattr(c, section), knob)


def _advice(c: knobs.Config, sizes: policy.Config, parts: Sequence[Part],
            fits: Callable[[knobs.Config, policy.Config], bool]) -> str:
  """What to set: the first knob of the largest parts of which a smaller value would fit."""
  other = 'use more devices (mesh.fsdp), or a machine with more memory'
  for name in dict.fromkeys(name for part in parts for name in part.knobs):
    if name.startswith('policy.') and c.policy.checkpoint and name != 'policy.lora_rank':
      continue
    if (value := _largest(c, sizes, name, fits)) is not None:
      return f'lower {name} to {value} at the most' + (f', or {other}' if name.startswith('policy.') else '')
  of_all = c.policy.checkpoint and not sizes.lora_rank
  return (f'train adapters alone (policy.lora_rank=32), {other}' if of_all else
          f'lower several of these knobs, {other}')


def _largest(c: knobs.Config, sizes: policy.Config, name: str, fits: Callable[[knobs.Config, policy.Config], bool]
             ) -> int | None:
  """The largest smaller value of a knob that fits; None where none does."""
  section, _, knob = name.partition('.')

  def fits_at(value: int, if_refused: bool) -> bool:
    try:
      if section == 'policy':
        return fits(c, sizes.replace(**{knob: value}))
      return fits(c.replace(**{section: getattr(c, section).replace(**{knob: value})}), sizes)
    except ValueError:  # of knobs that do not go together: it is too small
      return if_refused

  low, high = 0, _value(c, sizes, name)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits_at(middle, if_refused=True) else (low, middle)
  return low if low and fits_at(low, if_refused=False) else None
