"""Every knob is declared once, and its error says name, value, bounds and the nearest name."""

import dataclasses

from absl import flags
from ml_collections import config_flags
import pytest

from configs import arithmetic
from configs import common
from kr_jax import knobs


def sections(cls=knobs.Config):
  """Each section's class, from the whole config down."""
  yield cls
  for field in dataclasses.fields(cls):
    if isinstance(field.default, knobs.Section):
      yield from sections(type(field.default))


def test_a_config_is_made_of_the_declarations():
  config = common.base()
  assert knobs.read(config) == knobs.read(config.to_dict()) == knobs.Config()
  changed = knobs.read(arithmetic.get_config())
  assert changed.alloc == knobs.Alloc(high=64) and changed.sample.slots == 128
  assert len({hash(changed), hash(knobs.Config())}) == 2


def at_its_bounds(field) -> tuple[list, list]:
  """Values of a knob that its bounds let in, and that they keep out."""
  bounds, kind = field.metadata['bounds'], type(field.default)
  step = 1e-9 * max(abs(bounds.high or 1), 1) if kind is float else 1
  let_in = [x for x in (bounds.low, bounds.high) if x is not None]
  kept_out = [x for x in (bounds.above, bounds.below) if x is not None]
  if bounds.low is not None:
    kept_out.append(bounds.low - step)
  if bounds.high is not None:
    kept_out.append(bounds.high + step)
  kept_out = [*map(kind, kept_out), object()] + [None] * (field.default is not None)
  return list(map(kind, let_in)), kept_out


@pytest.mark.parametrize('cls', list(sections()), ids=lambda cls: cls.__name__)
def test_every_knob_has_a_meaning_and_keeps_its_bounds(cls):
  for field in dataclasses.fields(cls):
    if isinstance(field.default, knobs.Section):
      continue
    assert field.metadata['doc'], field.name
    let_in, kept_out = at_its_bounds(field)
    if isinstance(field.default, float):
      kept_out += [float('nan'), float('inf'), 'a', True]
    for value in let_in:
      cls.check(**{field.name: value})
    for value in kept_out:
      with pytest.raises(ValueError, match=field.name):
        cls.check(**{field.name: value})


@pytest.mark.parametrize('section, name, value, message', [
    ('alloc', 'rule', 'knapsak', r"alloc.rule='knapsak' \(who gets how many rollouts; .*\) must be one of 'knapsack', "
     "'uniform', 'dynamic'; did you mean 'knapsack'\\?"),
    ('alloc', 'rule', 'dynamic', r"tasks.candidates_per_step=0 is not two or more times tasks.per_step=32, .* to 64"),
    ('alloc', 'pass_discount', 0.0, r'alloc.pass_discount=0.0 .* must be above 0 and at most 1'),
    ('alloc', 'low', -1, r'alloc.low=-1 .* must be at least 0'),
    ('alloc', 'waves', 4, r'alloc.waves=4 .* must be one of 1, 2, 3'),
    ('tasks', 'candidates_per_step', 31, 'tasks.candidates_per_step=31 is below tasks.per_step=32; set it to 0, or to'),
    ('alloc', 'high', 1, 'alloc.high=1 is below alloc.low=2'),
    ('alloc', 'nu_every', 5, "alloc.nu_every=5 measures what alloc.value='infogain' does not read"),
    ('grpo', 'dual_clip', 1.1, r'grpo.dual_clip=1.1 must be above 1 \+ grpo.clip_high=1.28'),
    ('optimizer', 'schedule', 'linear', 'optimizer.decay_steps=0 must be above optimizer.warmup_steps=0'),
    ('optimizer', 'epochs', 1.5, 'optimizer.epochs=1.5 .* must be a whole number'),
    ('sample', 'temperature', 0.0, r'sample.temperature=0.0 \(rollouts of a greedy policy would all be the same\)'),
    ('sample', 'top_k', 5, r'sample.top_k=5 \(rollouts that learn come from the policy itself: filters are for'),
    ('sample', 'refill', 65, r'sample.refill=65 is not in 1..sample.slots=64'),
    ('sample', 'stop_strings', ('a', ''), r"sample.stop_strings=\('a', ''\) .* must hold texts, none of them"),
    ('evaluate', 'temperature', 0.0, 'evaluate.rollouts=8 completions of a task are all the same'),
    ('evaluate', 'pass_at', (9,), r'evaluate.pass_at=\(9,\) holds 9, which is not a whole number in 1..ev'),
    ('evaluate', 'maj_at', (True,), 'evaluate.maj_at=.* must hold whole numbers, not True'),
    ('policy', 'num_kv_heads', 3, 'policy.num_heads=4 is not a multiple of policy.num_kv_heads=3'),
    ('policy', 'head_width', 5, 'policy.head_width=5 is odd'),
    ('evaluate', 'temperature', 1e-4, 'evaluate.temperature=0.0001 is all but greedy; set it to 0'),
    ('tasks', 'template', '{problem.real}', "tasks.template='{problem.real}' is no text around {problem}"),
    ('tasks', 'mixture', (('a', 1.0, 2.0),), r"tasks.mixture holds \('a', 1.0, 2.0\), which is not \(DATASET, WEIGHT"),
    ('optimizer', 'minibatches', 33, 'optimizer.minibatches=33 is more than tasks.per_step=32, and a mini-batch is of'),
    ('policy', 'yarn', 1.0, 'policy.yarn=1 stretches nothing; set it above 1'),
    ('policy', 'yarn', 4.0, 'policy.yarn=4 stretches the context of policy.checkpoint, and there is none'),
    ('rewards', 'pattern', '(', r"rewards.pattern='\(' is not a regex"),
    ('rewards', 'format_weight', 0.5, 'go together: set both or none'),
    ('warm_start', 'num_steps', 20, 'warm_start.num_steps=20 must be 0 or above warm_start.warmup_steps=20')])
def test_what_an_error_says(section, name, value, message):
  tree = knobs.as_dict(knobs.Config())
  tree[section][name] = value
  with pytest.raises(ValueError, match=message):
    knobs.read(tree)


@pytest.mark.parametrize('knob, value, message', [
    ('tasks.candidates_per_step', 32, 'tasks.candidates_per_step=32 is not two or more times .*; set it to 64'),
    ('tasks.candidates_per_step', 120, 'tasks.candidates_per_step=120 is not two or more times .*; set it to 128'),
    ('alloc.rollouts_per_step', 250, r"alloc.rollouts_per_step=250 is not a multiple of tasks.per_step=32, .* to 256"),
    ('alloc.waves', 2, r"alloc.waves=2 does not go with alloc.rule='dynamic', .*; set alloc.waves=1"),
    ('alloc.cost', 'tokens', r"alloc.cost='tokens' does not go with alloc.rule='dynamic', .*; set alloc.cost='roll")])
def test_what_dynamic_sampling_does_not_go_with(knob, value, message):
  tree = knobs.as_dict(knobs.Config())
  tree['tasks']['candidates_per_step'], tree['alloc']['rule'] = 96, 'dynamic'
  knobs.read(tree)
  section, name = knob.split('.')
  tree[section][name] = value
  with pytest.raises(ValueError, match=message):
    knobs.read(tree)


def test_numbers_of_numpy_and_lists_are_taken():
  import numpy as np
  assert knobs.Alloc(low=np.int64(3)).low == 3
  tree = knobs.as_dict(knobs.Config()) | {'topologies': ['v5e:2x2']}
  tree['optimizer']['learning_rate'] = 1
  config = knobs.read(tree)
  assert config.topologies == ('v5e:2x2',) and isinstance(config.optimizer.learning_rate, float)


def test_two_seeds_are_two_runs():
  import jax
  data = lambda seed: tuple(jax.random.key_data(jax.random.key(seed)).tolist())
  highest = next(f for f in dataclasses.fields(knobs.Config) if f.name == 'seed').metadata['bounds'].high
  assert len({data(seed) for seed in (0, 1, 2 ** 31 - 1, 2 ** 31, highest)}) == 5
  assert highest == 2 ** 32 - 1 and data(highest + 1) == data(0)


def test_a_section_changed():
  assert knobs.Grpo().replace(clip_low=0.1) == knobs.Grpo(clip_low=0.1)
  with pytest.raises(ValueError, match='grpo.clip_low'):
    knobs.Grpo().replace(clip_low=-0.1)
  assert knobs.Alloc.choices('solver') == ('dp', 'greedy')


@pytest.mark.parametrize('arguments, thinking', [
    ([], None), (['--config.tasks.thinking=False'], False), (['--config.tasks.thinking=true'], True),
    (['--noconfig.tasks.thinking'], False)])
def test_a_knob_that_is_none_is_set_by_a_flag(arguments, thinking):
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_dict('config', common.base(), flag_values=values, sys_argv=arguments)
  values(['main', *arguments])
  assert knobs.read(config.value).tasks.thinking is thinking


@pytest.mark.parametrize('value', [0, 1, 'off', 0.0])
def test_a_knob_that_is_none_takes_no_number_for_a_truth_value(value):
  with pytest.raises(ValueError, match=r'tasks.thinking=.* must be None, True or False'):
    knobs.Tasks(thinking=value)
