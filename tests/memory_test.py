"""What a run takes at the least, and how one is refused that no memory holds."""

import importlib
import logging
import pathlib

import jax
import pytest

from configs import hardware as profiles
from kr_jax import knobs as knobs_lib
from kr_jax import memory
from kr_jax import prepare
from kr_jax import shipped
from kr_jax.costs import hardware as hardware_lib
from kr_jax.model import policy
from kr_jax.model import weights
from tests.knobs import debug_config

CHECKPOINTS = pathlib.Path(__file__).parent / 'data' / 'checkpoints'
GB = 10 ** 9
HOST = memory.Machine(device_bytes=None, host_bytes=8 * GB, process_bytes=None, devices=1, devices_are_host=True)


def read(**changed):
  """Config and sizes of a debug config of a vocabulary of 16."""
  c = knobs_lib.read(debug_config('', **changed))
  sizes = knobs_lib.as_dict(c.policy)
  del sizes['checkpoint'], sizes['yarn']
  return c, policy.Config(**sizes | {'vocab_size': 16})


def parts(phase, *args, **axes):
  found = memory.needs(*args, **axes)
  return {part.name: part.bytes for part in (found.host if phase == 'host' else found.device[phase])}


def test_parts_by_hand():
  """One layer of width 32: attention 32 x (2 x (2 + 1) x 16), MLP 3 x 32 x 64; and a tied table of 16 x 32."""
  c, sizes = read()
  n = 32 * 96 + 3 * 32 * 64 + 16 * 32
  state = {'parameters': 4 * n, 'moments of the optimiser': 8 * n}
  column = 2 * 1 * 16 * 4
  assert parts(memory.SAMPLING, c, sizes) == state | {
      'keys and values of slots': 16 * 22 * column, 'keys and values of prompts': 8 * 21 * column,
      'logits of slots': 4 * 16 * 16, 'tokens of rollouts': 8 * 32 * 22}
  assert parts(memory.EVALUATION, c, sizes, test_tasks=9)['tokens of rollouts'] == 8 * 9 * 8 * 22
  # 16 rows of 42 tokens, of which half are computed; a row holds one of the longest segments, 8 of which are computed.
  microbatches = (32 + 7) // 8
  learning = parts(memory.LEARNING, c, sizes)
  assert learning == state | {
      'gradients': 4 * n, 'packed tokens': microbatches * (25 * 336 + 8 * 16 * 42),
      'what layers keep of a microbatch': (32 + 2 * 64) * 4 * 336}
  assert parts('host', c, sizes) == {
      'packed tokens of the host': microbatches * (12 * 336 + 8 * 16 * 42), 'values of budgets': 8 * 63 * 8,
      'processes of verifiers': 10 * 2 ** 20}
  assert memory.needs(c, sizes).device_bytes == sum(learning.values())


def test_meshes_waves_and_what_is_trained_change_the_parts():
  c, sizes = read(policy__dtype='bfloat16', alloc__waves=2)
  n = memory.parameters(sizes)
  divided = parts(memory.SAMPLING, c, sizes, learn={'fsdp': 2, 'model': 2}, sample={'fsdp': 2, 'model': 2})
  assert (divided['parameters'], divided["the sampler's parameters"]) == (n, n)
  assert divided['tokens of rollouts'] == 8 * 8 * 22 and divided['keys and values of slots'] == 8 * 22 * 2 * 16 * 2 // 2
  adapted, initial = read(policy__lora_rank=2), read(grpo__kl_coef=0.1)
  assert parts(memory.LEARNING, *adapted)['parameters'] == 4 * n
  assert parts(memory.LEARNING, *adapted)['gradients'] == parts(memory.LEARNING, *adapted)['adapters'] < n
  assert parts(memory.LEARNING, *initial)['the initial policy, of grpo.kl_coef'] == 4 * n


@pytest.mark.parametrize('name', sorted(path.name for path in CHECKPOINTS.iterdir() if (path / 'config.json').exists()))
def test_no_more_parameters_are_counted_than_there_are(name):
  sizes = weights.config(CHECKPOINTS / name, length=64, dtype='float32', remat='none', lora_rank=0, lora_alpha=1.0)
  shapes = jax.eval_shape(lambda: policy.init(sizes, jax.random.key(0)))
  exact = sum(x.size for x in jax.tree.leaves(shapes))
  assert 0.8 * exact < memory.parameters(sizes) <= exact


@pytest.mark.parametrize('name', [name for name in shipped.names() if name != 'hardware'])
def test_shipped_configs_fit_the_slices_that_they_are_meant_for(name):
  config, found = importlib.import_module(f'configs.{name}').get_config(), hardware_lib.read(profiles.get_config())
  for topology in config.topologies:
    chips = eval(topology.partition(':')[2].replace('x', '*'))  # noqa: S307, of our own configs
    device = hardware_lib.device(found.of_topology(topology))
    setup = prepare.abstract(config, devices=[None] * chips * device.per_chip)
    assert prepare.needs(setup).device_bytes < device.hbm_bytes, topology


@pytest.mark.parametrize('changed, message, fits', [
    ({'sample__completion_length': 10 ** 7, 'pack__row_length': 10 ** 8}, 'are what layers keep .* are packed', None),
    ({'policy__width': 2 ** 17, 'policy__hidden_width': 2 ** 17}, 'are moments of the optimiser', 'policy.width'),
    ({'pack__microbatch_rows': 10 ** 7}, 'are what layers keep of a microbatch', 'pack.microbatch_rows'),
    ({'evaluate__rollouts': 10 ** 6, 'sample__slots': 10 ** 12, 'policy__head_width': 512},
     r'in an evaluation, .* keys and values of slots \(sample.slots=1000000000000', 'sample.slots'),
    ({'rewards__workers': 1000}, r'are processes of verifiers \(rewards.workers=1000\)', 'rewards.workers'),
    ({'alloc__high': 65_536, 'alloc__rollouts_per_step': 10 ** 5, 'tasks__per_step': 30_000}, 'values of budgets',
     'alloc.high')])
def test_what_no_memory_holds_is_refused_with_what_would_fit(changed, message, fits):
  c, sizes = read(**changed)
  with pytest.raises(ValueError, match=message) as error:
    memory.check(c, sizes, there=HOST)
  text = str(error.value)
  assert 'which has 8 GB' in text and '\n' not in text and len(text) < 900
  if fits is None:  # one knob is not enough
    assert text.endswith('lower several of these knobs, use more devices (mesh.fsdp), or a machine with more memory')
    return
  assert f'; lower {fits} to ' in text
  _, name, _, value = text.rpartition('; ')[2].partition(' at the most')[0].split(' ')
  section, knob = name.split('.')
  changed_to = lambda value: read(**changed | {f'{section}__{knob}': value})
  memory.check(*changed_to(int(value)), there=HOST)
  with pytest.raises(ValueError):
    memory.check(*changed_to(int(value) + 1), there=HOST)


def test_a_device_has_its_own_memory_and_a_near_limit_is_said(caplog):
  c, sizes = read()
  there = HOST._replace(devices_are_host=False, device_bytes=100_000)
  with pytest.raises(ValueError, match='of the memory of a device, in learning, which has 100 kB'):
    memory.check(c, sizes, there=there)
  needed = memory.needs(c, sizes).device_bytes
  with caplog.at_level(logging.WARNING):
    memory.check(c, sizes, there=there._replace(device_bytes=needed))
    assert 'so it may not fit' in caplog.text
    caplog.clear()
    memory.check(c, sizes, there=there._replace(device_bytes=2 * needed))
    memory.check(c, sizes, there=there._replace(device_bytes=None, host_bytes=None))  # not known
  assert not caplog.text
  of_evaluation = sum(part.bytes for part in memory.needs(c, sizes).device[memory.EVALUATION])
  memory.check(c, sizes, there=there._replace(device_bytes=2 * of_evaluation), trains=False)


def test_a_limit_of_the_process_is_kept_by_what_it_takes_itself():
  c, sizes = read(rewards__workers=64)
  there = HOST._replace(process_bytes=100 * 2 ** 20)
  memory.check(c, sizes, there=there)  # its workers are processes of their own
  with pytest.raises(ValueError, match='of the memory of this process'):
    memory.check(*read(pack__microbatch_rows=16_000), there=there)


def test_a_published_checkpoint_is_not_asked_to_be_smaller():
  c, sizes = read(policy__width=2 ** 21)
  c = c.replace(policy=c.policy.replace(checkpoint='org/large'))
  with pytest.raises(ValueError, match=r'; train adapters alone \(policy.lora_rank=32\), use more devices'):
    memory.check(c, sizes, there=HOST)


def test_a_generation_that_no_memory_holds_is_refused():
  _, sizes = read()
  memory.check_generation(sizes, 2, 64, 64, 64, HOST)
  memory.check_generation(sizes, 2, 64, 10 ** 9, 64, HOST._replace(host_bytes=None))
  with pytest.raises(ValueError, match='2 prompts of up to 64 tokens .* keys and values; lower max_tokens, or'):
    memory.check_generation(sizes, 2, 64, 10 ** 9, 64, HOST)


def test_memory_of_a_machine_and_its_control_groups(tmp_path):
  (tmp_path / 'meminfo').write_text('MemTotal: 1000 kB\nMemFree: 5 kB\nSwapTotal: 10 kB\n')
  (tmp_path / 'cgroup').write_text('9:memory:/a/b\n8:cpu:/a\n0::/x/y\n')
  found = lambda: memory.host_bytes(str(tmp_path / 'meminfo'), str(tmp_path / 'cgroup'), str(tmp_path / 'groups'))
  assert found() == 1010 * 1024
  for path, limit in (('memory/a/b/memory.limit_in_bytes', '9223372036854771712'), ('x/y/memory.max', 'max'),
                      ('x/memory.max', '700000'), ('memory/memory.limit_in_bytes', '800000')):
    (tmp_path / 'groups' / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'groups' / path).write_text(limit)
  assert found() == 700_000 + 10 * 1024
  assert memory.host_bytes() > 2 ** 28
  assert memory.host_bytes(str(tmp_path / 'none')) is None or memory.host_bytes(str(tmp_path / 'none')) > 2 ** 28


def test_a_run_is_refused_before_data_are_read(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, '_read_tasks', lambda *_, **__: pytest.fail('data were read'))
  for changed in ({'policy__width': 2 ** 20, 'policy__hidden_width': 2 ** 20}, {'pack__microbatch_rows': 2 ** 30}):
    with pytest.raises(ValueError, match='the run takes at least .* at the most'):
      prepare.prepare(debug_config(str(tmp_path), **changed))
