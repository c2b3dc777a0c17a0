"""What is suggested fits, by the compiler; and where nothing fits it is said."""

import importlib

import pytest

from kr_jax import preflight
from kr_jax.costs import hardware as hardware_lib
from tests.preflight.preflight_test import GIGA, HARDWARE, V5E, run, small

SUGGEST = importlib.import_module('kr_jax.preflight.suggest')  # the folder's face has the function of this name


ASSUMED = preflight.Assumed()


def chips_of(hbm_bytes):
  """Chips with so little memory."""
  tree = hardware_lib.as_dict(HARDWARE)
  tree['profiles']['v5e']['hbm_usable_gib'] = hbm_bytes / 2 ** 30
  return hardware_lib.read(tree)


def test_overrides_leave_the_config_as_it_is():
  config = small()
  assert preflight.overridden(config, {'sample.slots': 8}).sample.slots == 8 and config.sample.slots == 16
  with pytest.raises((AttributeError, KeyError)):
    preflight.overridden(config, {'sample.slot': 8})


def suggest(config, topology='v5e:2x2', hardware=HARDWARE, **options):
  return preflight.suggest(config, topology, ASSUMED, hardware, **options)


@pytest.mark.exhaustive
def test_what_is_too_large_is_refused_with_what_fits():
  """On chips with so little memory that samplers of their own do not fit: two that share weights do."""
  few = {'alloc.rollouts_per_step': 64, 'tasks.per_step': 8, 'evaluate.tasks_per_batch': 8}
  of = lambda hardware: run(small(**few), hardware=hardware, phases=['reshard', 'sample'])
  need = of(HARDWARE)['phases']['sample']
  fewer = chips_of(need['peak_bytes'] - 0.3 * need['temp_bytes'])
  report = of(fewer)
  refused = [name for name, phase in report['phases'].items() if not phase['fits']]
  assert 'sample' in refused and not report['fits'] and preflight.table(report).startswith('v5e:2x2: does NOT fit: ')
  overrides = suggest(small(**few), hardware=fewer, phases=refused)
  assert overrides and set(overrides) <= {'mesh.sample_model', 'sample.slots'}
  text = preflight.advice(report | {'suggestion': overrides})
  assert text.startswith('fits v5e:2x2: --config.') and all(f'--config.{x}=' in text for x in overrides)


@pytest.mark.slow
def test_where_nothing_fits_it_says_so():
  assert suggest(small(), hardware=chips_of(10 ** 6)) is None
  assert 'take a larger slice' in preflight.advice({'topology': 'v5e:2x2', 'suggestion': None})
  assert 'as it is' in preflight.advice({'topology': 'v5e:2x2', 'suggestion': {}})


@pytest.mark.slow
def test_the_fastest_choice_that_fits_is_suggested(monkeypatch):
  """Those that need no less than one that did not fit are not compiled, nor those that arithmetic refuses."""
  tried = []

  def compiled(config, topology, assumed, hardware, phases):
    tried.append((phases, config.mesh.model, config.pack.microbatch_rows, config.policy.remat, config.sample.slots))
    if 'update' in phases:
      return {'fits': config.pack.microbatch_rows <= 4}
    return {'fits': config.sample.slots <= 16}

  monkeypatch.setattr(SUGGEST.preflight, 'run', compiled)
  found = suggest(small())
  assert found['pack.microbatch_rows'] <= 4 and found.get('sample.slots', 16) == 16
  updates = [x for x in tried if 'update' in x[0]]
  assert [x for x in tried if 'sample' in x[0]] == tried[len(updates):]  # the update's mesh is found first
  refused = set()
  for _, model, rows, remat, _ in updates[:-1]:
    need = rows, list(SUGGEST._SAVED).index(remat), -model
    assert not any(all(x >= y for x, y in zip(need, other)) for other in refused)
    refused.add(need)
  # Nothing where nothing need change; and the knobs alone of phases that do not fit.
  assert suggest(preflight.overridden(small(), found)) == {}
  tried.clear()
  assert suggest(small(), phases=['sample']).keys() <= {'mesh.sample_model', 'sample.slots'}
  assert not any('update' in x[0] for x in tried)


def test_choices_by_hand():
  """More slots read the weights less often, and a sampler with all weights sends nothing."""
  samplers = {(x.overrides['mesh.sample_model'], x.overrides['sample.slots']): x.seconds
              for x in SUGGEST._samplers(small(), 'v5e:2x2', ASSUMED, V5E)}
  assert {model for model, _ in samplers} == {1, 2, 4}
  assert all(samplers[1, slots] > samplers[1, 2 * slots] for slots in (4, 8, 16, 32))
  updates = [x.overrides for x in SUGGEST._updates(small(), 'v5e:2x2', ASSUMED, V5E)]
  assert {x['policy.remat'] for x in updates} == {'none', 'dots', 'attention', 'full'}
  assert {x['mesh.model'] for x in updates} == {1, 2, 4}


@pytest.mark.exhaustive
def test_a_config_that_is_too_large_is_refused():
  """qwen3_4b whose samplers have all parameters each: with what is suggested it fits."""
  knobs = {'mesh.sample_model': 1, 'sample.slots': 64}
  config = preflight.overridden(importlib.import_module('configs.qwen3_4b').get_config(), knobs)
  report = run(config, 'v5e:4x4', phases=['reshard'])
  assert not report['fits'] and report['phases']['reshard']['peak_bytes'] > 16.9 * GIGA
  overrides = suggest(config, 'v5e:4x4', phases=['reshard'])
  print(f'\n{overrides}')
  assert overrides
  assert run(preflight.overridden(config, overrides), 'v5e:4x4', phases=['reshard', 'sample'])['fits']
