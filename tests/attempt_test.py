"""What an attempt says at its beginning."""

import json

import jax

from configs import hardware as profiles
from kr_jax import attempt
from kr_jax import prepare
from kr_jax.costs import hardware as hardware_lib
from kr_jax.model import policy
from kr_jax.record import ledger
from tests.knobs import debug_config


def test_the_beginning_of_an_attempt(tmp_path, data_dir, clock, capsys):
  setup = prepare.prepare(debug_config(data_dir))
  hardware = hardware_lib.read(profiles.get_config())
  with attempt.begin(setup, str(tmp_path), hardware, clock, 2):
    assert clock.phase == 'other'
  said = capsys.readouterr().out
  parameters = sum(x.size for x in jax.tree.leaves(policy.init(setup.policy, jax.random.key(0))))
  assert 'R = 32 rollouts of M = 8 tasks, by knapsack' in said and 'going on at 2' in said and '$' in said
  first, *_ = ledger.read(str(tmp_path)).attempts
  assert (first['parameters'], first['first_step'], first['hardware']) == (parameters, 2, 'cpu')
  assert first['weights_compression'] == first['cache_compression'] == 1
  assert hardware_lib.load(str(tmp_path)) == hardware
  with attempt.begin(setup, str(tmp_path), None, clock, 2):
    pass
  assert hardware_lib.load(str(tmp_path)) == hardware  # that of the attempt before stays
  assert ledger.read(str(tmp_path)).attempts[1]['hardware'] is None
  json.loads((tmp_path / 'hardware.json').read_text())


def test_the_least_memory(data_dir):
  setup = prepare.prepare(debug_config(data_dir))
  c, n = setup.sample, 10 ** 6
  cache = c.slots * (c.prompt_length + c.completion_length) * 2 * 1 * 1 * 16 * 4  # one layer, one head, width 16
  # float32: parameters, two moments; then gradients, or what the sampler reads and its cache.
  assert attempt.least_bytes(setup, n) == 12 * n + max(4 * n, 4 * n + cache)
