"""Knobs with which a config fits a TPU slice: the fastest by arithmetic of those that fit by the compiler.

Update and sampler are searched apart: of the update mesh.model, policy.remat and pack.microbatch_rows, of the
sampler mesh.sample_model and sample.slots. Arithmetic sorts the choices by seconds and leaves out those that cannot
fit; the compiler then decides on one after the other. A choice that needs no less memory than one that did not fit
is left out too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import itertools
import math
from typing import Any, NamedTuple

import jax
import ml_collections

from kr_jax import sharding
from kr_jax.costs import arithmetic
from kr_jax.costs import hardware as hardware_lib
from kr_jax.costs.hardware import Hardware
from kr_jax.learning import update
from kr_jax.model import policy
from kr_jax.preflight import preflight
from kr_jax.preflight.preflight import Assumed


class _Choice(NamedTuple):
  """Knobs to try."""

  seconds: float  # of a step, by arithmetic
  overrides: dict[str, Any]
  need: tuple[float, ...]  # a choice with larger numbers needs more memory


_SAMPLES, _LEARNS = ('reshard', 'sample', 'place', 'wave', 'evaluate'), ('score', 'reference', 'update')
# Numbers of a token and layer that are kept for the backward pass at the least: of experts none.
_mlp_width = lambda c: 0 if c.num_experts else c.hidden_width
_SAVED = {
    'full': lambda c: c.width,
    'attention': lambda c: c.width + c.num_heads * c.head_width,
    'dots': lambda c: 3 * c.width + 2 * (c.num_heads + c.num_kv_heads) * c.head_width + 2 * _mlp_width(c),
    'none': lambda c: 4 * c.width + 3 * (c.num_heads + c.num_kv_heads) * c.head_width + 3 * _mlp_width(c)}
# Products with matrices, in forward passes: one forward, two backward and what is computed again.
_PASSES = {'full': 4.0, 'attention': 4.0, 'dots': 3.0, 'none': 3.0}


def overridden(config: ml_collections.ConfigDict, overrides: dict[str, Any]) -> ml_collections.ConfigDict:
  """A config with other knobs: {'sample.slots': 16}."""
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(overrides)
  return config


def suggest(config: ml_collections.ConfigDict, topology: str, assumed: Assumed, hardware: Hardware,
            phases: Sequence[str] = ()) -> dict[str, Any] | None:
  """Overrides of a few knobs with which a config fits.

  Args:
    phases: those that do not fit, whose knobs alone are searched; (): all.

  Returns {} where nothing need change, None where nothing fits.
  """
  found: dict[str, Any] = {}
  # The update first: its mesh limits the sampler's.
  for choices, names in ((_updates, _LEARNS), (_samplers, _SAMPLES)):
    if phases and not set(names) & set(phases):
      continue
    device = hardware_lib.device(hardware.of_topology(topology))
    fitting = _fitting(config, found, choices(overridden(config, found), topology, assumed, device), names, topology,
                       assumed, hardware)
    if fitting is None:
      return None
    found |= fitting
  sections = config.to_dict()

  def changes(name: str) -> bool:
    section, knob = name.split('.')
    return sections[section][knob] != found[name]

  return {name: value for name, value in found.items() if changes(name)}


def _fitting(config: ml_collections.ConfigDict, found: dict[str, Any], choices: Iterator[_Choice],
             phases: Sequence[str], topology: str, assumed: Assumed, hardware: Hardware) -> dict[str, Any] | None:
  """Overrides of the fastest choice whose phases fit together with what was found before; None: no choice does."""
  failed: list[_Choice] = []
  for choice in sorted(choices, key=lambda choice: choice.seconds):
    if any(all(x >= y for x, y in zip(choice.need, other.need)) for other in failed):
      continue
    if preflight.run(overridden(config, found | choice.overrides), topology, assumed, hardware, phases)['fits']:
      return choice.overrides
    failed.append(choice)
  return None


def advice(report: dict[str, Any]) -> str:
  """What to do, of a report with a suggestion."""
  overrides = report['suggestion']
  if overrides is None:
    return (f'nothing fits {report["topology"]}: take a larger slice, or a smaller alloc.rollouts_per_step, '
            'sample.completion_length or pack.row_length')
  if not overrides:
    return f'fits {report["topology"]} as it is, and the fastest that does'
  return f'fits {report["topology"]}: ' + ' '.join(f'--config.{name}={x}' for name, x in overrides.items())


def _samplers(config: ml_collections.ConfigDict, topology: str, assumed: Assumed, device: hardware_lib.Device
              ) -> Iterator[_Choice]:
  """Samplers whose weights and caches alone leave room, with the time to read them from memory."""
  base = preflight.setup(config, topology)
  c, learn = base.policy, base.learn_mesh
  copy = learn.size // learn.shape['data']
  sampler = next(p for p in preflight.programs(base, assumed) if p.phase == 'sample')
  resident = preflight.device_bytes(sampler.resident)
  P, C = base.sample.prompt_length, base.sample.completion_length
  prompt, completion = assumed.mean_prompt or P, assumed.mean_completion or C
  R, M = config.alloc.rollouts_per_step, config.tasks.per_step
  for model in (m for m in range(1, copy + 1) if copy % m == 0 and not sharding.misfit_of_sampler(c, m)):
    shards = learn.size // model
    rollouts, tasks = -(-R // shards), -(-M // shards) + 1  # of a shard
    if rollouts * shards > 2 * R:  # most slots would be empty
      continue
    heads = c.num_kv_heads / math.lcm(c.num_kv_heads, model) * model
    column = arithmetic.column_bytes(c, base.sample.cache) / heads
    vocabulary = (2 - c.tie_embeddings) * c.vocab_size * c.width
    weights = 2 * (c.num_layers * arithmetic.layer_weights(c) + vocabulary) / model
    for slots in {min(2 ** i, rollouts) for i in range(2, 10)}:
      if resident + weights + column * (slots * C + tasks * P) > device.hbm_bytes:
        continue
      read = weights + slots * (prompt + completion / 2) * column
      logits = 4 * slots * c.vocab_size * (model - 1) / model  # sent, as each chip needs them whole
      seconds = max(rollouts / slots, 1) * completion * max(
          read / device.hbm_bytes_per_s, logits / device.ici_bytes_per_s)
      yield _Choice(seconds, {'mesh.sample_model': model, 'sample.slots': slots}, (slots, -model))


def _updates(config: ml_collections.ConfigDict, topology: str, assumed: Assumed, device: hardware_lib.Device
             ) -> Iterator[_Choice]:
  """Updates whose state and saved activations alone leave room, with the time of their FLOPs, or of the parameters
  and gradients that they send, whichever is longer."""
  n = len(preflight.devices(topology))
  data, expert, R = config.mesh.data, config.mesh.expert, config.alloc.rollouts_per_step
  for model, rows, remat in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16), policy.REMAT):
    fsdp = n // data // expert // model
    overrides = {'mesh.fsdp': 0, 'mesh.model': model, 'pack.microbatch_rows': rows, 'policy.remat': remat}
    try:
      base = preflight.setup(overridden(config, overrides | {'mesh.sample_model': 0}), topology)
    except ValueError:
      continue
    if rows * data * fsdp * expert * base.update.minibatches > R and rows > 1:  # microbatches of padding
      continue
    c, program = base.trained, preflight.programs(base, assumed)[-1]
    microbatches = program.trips[update.MICROBATCHES]
    with jax.set_mesh(base.learn_mesh):
      shape = update.microbatch_shape(
          base.sample.prompt_length, base.sample.completion_length, R / config.tasks.per_step, base.update)
    tokens = shape.tokens * (1 if shape.shared else rows)
    saved = tokens * c.num_layers * 2 * (c.width if remat == 'full' else _SAVED[remat](c) / model)
    arguments = preflight.device_bytes(
        [x for x in jax.tree.leaves(program.args) if isinstance(x, jax.ShapeDtypeStruct)])
    if arguments + saved > device.hbm_bytes:
      continue
    passes, active = _PASSES[remat], c.num_layers * arithmetic.active_weights(c) / model
    sent = 0.0
    if fsdp > 1:  # matrices are gathered for each pass, and their gradients scattered
      weights = c.num_layers * arithmetic.layer_weights(c) / model
      sent += microbatches * 2 * weights / expert * passes
    if expert > 1:  # tokens are gathered for each pass, and their sums scattered
      sent += microbatches * 4 * (expert - 1) * tokens * c.num_layers * c.width * passes
    if model > 1:  # activations of attention and MLP are added up, forward and backward
      sent += microbatches * 4 * tokens * c.num_layers * c.width * 2 * passes / 3
    flops = microbatches * tokens * 2 * passes * (active + c.width * c.vocab_size / model)
    yield _Choice(max(flops / device.flops, sent / device.ici_bytes_per_s), overrides,
                  (rows, list(_SAVED).index(remat), -model))
